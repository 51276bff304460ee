"""Evaluate the checkpoints of a row's seeds: results/evaluate/<row>.json.

Writes also what `dvc metrics`, `dvc exp show` and `dvc plots` show: results/metrics/<row>.json and results/plots/.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from stages import called, run, waits


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(prog=called("evaluate"), description=__doc__)
    parser.add_argument("row", help="an entry of `rows` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.storage.results.rows import Evaluation

    if waits(Evaluation, arguments.row):
        return

    from pipeline.comparison.rows import current_training
    from pipeline.data.shards.look import current_manifest
    from pipeline.evaluation.dvc_tables import confusions, curves, metrics
    from pipeline.evaluation.evaluate import evaluate_row
    from pipeline.params.load import load_params
    from pipeline.params.tasks import in_words
    from pipeline.storage.results.folder import find_result, write_metrics, write_plot, write_result
    from pipeline.storage.results.rows import PublishedEvaluation
    from pipeline.tracking.client import shown_uri
    from pipeline.tracking.mlflow_runs import rows_experiment, track_row
    from pipeline.tracking.pages import MlflowPages

    params = load_params(arguments.params)
    row = params.row(arguments.row)
    manifest, trained = current_manifest(params, row.dataset), current_training(row)
    result = evaluate_row(row, manifest=manifest, trained=trained)
    write_result(result, row.name)
    write_metrics(row.name, metrics(result))
    published = find_result(PublishedEvaluation, row.name)  # taken where it is: nothing depends on it
    write_plot("curves", row.name, curves(trained, row.task, published))
    write_plot("confusion", row.name, confusions(result))
    ids = track_row(row, result.seeds, manifest=manifest, decides=result.decides, verdict=params.verdict)
    seeds = tuple(replace(seed, mlflow_run_id=ids[seed.run_key] or seed.mlflow_run_id) for seed in result.seeds)
    experiment = rows_experiment() if ids[row.name] else None
    shown = replace(result, seeds=seeds, mlflow_run_id=ids[row.name], mlflow_experiment_id=experiment)
    if shown != result:
        write_result(shown, row.name)
    print(f"{row.name}: median {in_words(result.median, row.task)}; see python -m stages.report")
    pages = MlflowPages(shown_uri())
    if page := pages.rows(experiment, row.task):
        print(f"{row.name}: beside the other rows in MLflow: {page}{pages.how}")


if __name__ == "__main__":
    run(main)
