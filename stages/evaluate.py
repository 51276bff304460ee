"""Evaluate the checkpoints of a row's seeds: results/evaluate/<row>.json."""

from __future__ import annotations

import argparse
from dataclasses import replace

from stages import run, waits


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.evaluate", description=__doc__)
    parser.add_argument("row", help="an entry of `rows` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    arguments = parser.parse_args()

    from pipeline.storage.results import Evaluation

    if waits(Evaluation, arguments.row):
        return

    from pipeline.data.shards.look import current_manifest
    from pipeline.evaluation.evaluate import evaluate_row
    from pipeline.params.load import load_params
    from pipeline.params.tasks import in_words
    from pipeline.storage.results import TrainingResult, read_result, write_figures, write_result
    from pipeline.tracking.mlflow_runs import track_row

    params = load_params(arguments.params)
    row = params.row(arguments.row)
    manifest, trained = current_manifest(params, row.dataset), read_result(TrainingResult, row.name)
    result = evaluate_row(row, manifest=manifest, trained=trained)
    write_result(result, row.name)
    write_figures(row.name, result.median)
    ids = track_row(row, result.seeds, decides=result.decides)
    seeds = tuple(replace(seed, mlflow_run_id=ids[seed.run_key] or seed.mlflow_run_id) for seed in result.seeds)
    if seeds != result.seeds:  # no server answered the training
        write_result(replace(result, seeds=seeds), row.name)
    print(f"{row.name}: median {in_words(result.median, row.task)}; see python -m stages.report")


if __name__ == "__main__":
    run(main)
