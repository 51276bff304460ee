"""Turn a dataset's verified archives into Arrow files of verified records.

Writes results/shard/<dataset>.json, the manifest, and <dataset>.csv beside it: pixels, pictures and instances of every
class (`dvc plots show` draws them). Run again after an interruption it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys

from stages import run, targets


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.shard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="an entry of `datasets` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="shards made at once by Ray, here or on the cluster at RAY_ADDRESS (default: one per core; 0: no Ray)",
    )
    arguments = parser.parse_args()

    from pipeline.storage.results import (
        FetchedDataset,
        Manifest,
        read_result,
        result_path,
        sound_result,
        write_result,
        write_waiting,
    )

    dataset = arguments.dataset
    if targets() == [] and ((fetched := sound_result(FetchedDataset, dataset)) is None or fetched.waits):
        write_waiting(Manifest, dataset, f"a row on {dataset} that can be trained here")
        return

    from pipeline.data.fetch import open_sources
    from pipeline.data.shards.build import build
    from pipeline.data.shards.look import look
    from pipeline.data.shards.manifest import class_table
    from pipeline.params.load import load_params
    from pipeline.storage.files import write_text

    config = load_params(arguments.params).dataset(dataset)
    fetched = read_result(FetchedDataset, dataset)
    manifest = build(dataset, config, open_sources(fetched), facts=fetched.sources, processes=arguments.processes)
    found = look(manifest, config)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if found.errors:
        raise ValueError("; ".join(found.errors))
    write_text(result_path(Manifest, dataset).with_suffix(".csv"), class_table(manifest))
    write_result(manifest, dataset)
    for split, skipped in manifest.skipped.items():
        if skipped:
            print(f"{dataset} {split}: {len(skipped)} records skipped, listed in the manifest", file=sys.stderr)
    if manifest.left_out:
        print(f"{dataset}: class_names leaves out the categories {', '.join(manifest.left_out)}", file=sys.stderr)
    for split, entry in manifest.splits.items():
        size = manifest.bytes[split] / 2**20
        print(f"{dataset} {split}: {entry.records} pictures, {len(entry.shards)} shards, {size:.1f} MiB")


if __name__ == "__main__":
    run(main)
