"""Evaluate the checkpoints of a row's seeds: results/evaluate/<row>.json."""

from __future__ import annotations

import argparse

from stages import run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.evaluate", description=__doc__)
    parser.add_argument("row", help="an entry of `rows` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    arguments = parser.parse_args()

    from pipeline.evaluate_job import evaluate_row
    from pipeline.files import read_json
    from pipeline.params import load_params
    from pipeline.results import TrainingResult, read_result, write_result
    from pipeline.tasks import in_words

    row = load_params(arguments.params).row(arguments.row)
    manifest = read_json(f"results/shard/{row.dataset}.json", made_by=f"dvc repro shard@{row.dataset}")
    result = evaluate_row(row, manifest=manifest, train_result=read_result(TrainingResult, row.name))
    write_result(result, row.name)
    print(f"{row.name}: median {in_words(result.median, row.task)}; see python -m stages.report")


if __name__ == "__main__":
    run(main)
