"""Evaluate a row's published checkpoint with our own code: results/published/<row>.json."""

from __future__ import annotations

import argparse

from stages import run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.published", description=__doc__)
    parser.add_argument("row", help="an entry of `checkpoints` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    arguments = parser.parse_args()

    from pipeline.files import read_json, write_json
    from pipeline.params import load_params, pick

    params = load_params(arguments.params)
    config = pick(params.checkpoints, arguments.row, "published checkpoint", arguments.params)
    row = params.row(arguments.row)
    manifest = read_json(f"results/shard/{row.dataset}.json", made_by=f"dvc repro shard@{row.dataset}")

    from pipeline.published import evaluate_published

    result = evaluate_published(row, config, manifest=manifest)
    write_json(f"results/published/{row.name}.json", result)
    difference = "" if result["difference"] is None else f", {result['difference']:+.2f} from the published figure"
    print(f"{row.name}: the published checkpoint has mIoU {100 * result['figures']['miou']:.2f} here{difference}")


if __name__ == "__main__":
    run(main)
