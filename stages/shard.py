"""Turn a dataset's verified archives into Arrow files and a manifest: results/shard/<dataset>.json."""

from __future__ import annotations

import argparse
import os

from stages import run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.shard", description=__doc__)
    parser.add_argument("dataset", help="an entry of `datasets` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="0: this one; default: one per core")
    arguments = parser.parse_args()

    from pipeline.fetch import open_sources
    from pipeline.files import read_json, write_json
    from pipeline.params import load_params
    from pipeline.shards import build

    dataset = arguments.dataset
    config = load_params(arguments.params).dataset(dataset)
    facts = read_json(f"results/fetch/{dataset}.json", made_by=f"python -m stages.fetch {dataset}")
    manifest = build(dataset, config, open_sources(facts), facts=facts["sources"], processes=arguments.processes)
    write_json(f"results/shard/{dataset}.json", manifest)
    for split, entry in manifest["splits"].items():
        size = sum(shard["bytes"] for shard in entry["shards"]) / 2**20
        print(f"{dataset} {split}: {entry['records']} pictures, {len(entry['shards'])} shards, {size:.1f} MiB")


if __name__ == "__main__":
    run(main)
