"""Turn a dataset's verified archives into Arrow files of verified records.

Writes results/shard/<dataset>.json, the manifest, and results/plots/classes/<dataset>.csv: pixels, images and
instances of every class (`dvc plots show` draws them). Run again after an interruption it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys

from stages import called, run, targets


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("shard"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="an entry of `datasets` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="shards made at once by Ray, here or on the cluster at RAY_ADDRESS (default: one per core; 0: no Ray)",
    )
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.storage.results.data import FetchedDataset, Manifest
    from pipeline.storage.results.folder import read_result, sound_result, write_plot, write_result, write_waiting

    dataset = arguments.dataset
    if targets() == [] and ((fetched := sound_result(FetchedDataset, dataset)) is None or fetched.waits):
        write_waiting(Manifest, dataset, f"a row on {dataset} that can be trained here")
        return

    from pipeline.data.fetch import open_sources
    from pipeline.data.shards.build import build
    from pipeline.data.shards.look import look
    from pipeline.data.shards.manifest import class_lines
    from pipeline.params.load import load_params
    from pipeline.params.sentences import how_many

    config = load_params(arguments.params).dataset(dataset)
    fetched = read_result(FetchedDataset, dataset)
    manifest = build(dataset, config, open_sources(fetched), facts=fetched.sources, processes=arguments.processes)
    found = look(manifest, config)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if found.errors:
        raise ValueError("; ".join(found.errors))
    write_plot("classes", dataset, class_lines(manifest))
    write_result(manifest, dataset)
    for split, skipped in manifest.skipped.items():
        if skipped:
            print(
                f"{dataset} {split}: {how_many(len(skipped), 'record')} skipped, listed in the manifest",
                file=sys.stderr,
            )
    if manifest.left_out:
        print(f"{dataset}: class_names leaves out the categories {', '.join(manifest.left_out)}", file=sys.stderr)
    for split, entry in manifest.splits.items():
        size = manifest.bytes[split] / 2**20
        counts = f"{how_many(entry.records, 'image')}, {how_many(len(entry.shards), 'shard')}"
        print(f"{dataset} {split}: {counts}, {size:.1f} MiB")


if __name__ == "__main__":
    run(main)
