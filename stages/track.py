"""Bring MLflow up to date with results/ and the run folders, after an outage or for a new tracking server."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages import called, run

if TYPE_CHECKING:
    from pipeline.storage.results import EvaluatedSeed, TrainedSeed, Which


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(prog=called("track"), description=__doc__)
    parser.add_argument("rows", nargs="*", help="entries of `rows` in params.yaml; default: all that have results")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.params.load import load_params
    from pipeline.params.sentences import how_many
    from pipeline.storage.results import (
        Evaluation,
        Manifest,
        PublishedEvaluation,
        TrainingResult,
        find_result,
        sound_result,
    )
    from pipeline.tracking.client import shown_uri
    from pipeline.tracking.mlflow_runs import rows_experiment, track_published, track_row
    from pipeline.tracking.pages import MlflowPages

    params = load_params(arguments.params)
    late, tasks = list[str](), dict[str, None]()
    for row in [params.row(name) for name in arguments.rows or params.rows]:
        ids: dict[str, str | None] = {}
        manifest = sound_result(Manifest, row.dataset)
        published = find_result(PublishedEvaluation, row.name)
        if published is not None and published.curve and row.name in params.checkpoints:
            config = params.checkpoints[row.name]
            ids["published"] = track_published(row, config, published, manifest=manifest, patient=True)
        if (trained := find_result(TrainingResult, row.name)) is not None:
            seeds: Sequence[TrainedSeed | EvaluatedSeed] = trained.seeds
            decides: Which = "last"
            evaluated = find_result(Evaluation, row.name)
            if evaluated and [seed.run_key for seed in evaluated.seeds] == [seed.run_key for seed in seeds]:
                seeds, decides = evaluated.seeds, evaluated.decides
            ids |= track_row(row, seeds, manifest=manifest, decides=decides, verdict=params.verdict, patient=True)
        if ids:
            tasks[row.task] = None
            missing = [name for name, run_id in ids.items() if run_id is None]
            late += missing
            print(f"{row.name}: {len(ids) - len(missing)} of {len(ids)} runs are up to date in {shown_uri()}")
    if not tasks:
        print("no training has been tracked yet: results/ holds no training and no published log of these rows")
    if late:
        raise OSError(f"{shown_uri()} did not take {how_many(len(late), 'run')}; run python -m stages.track again")
    experiment = rows_experiment(patient=True) if tasks else None
    for task in tasks:
        pages = MlflowPages(shown_uri())
        if page := pages.rows(experiment, task):
            print(f"{task} rows beside each other: {page}{pages.how}")


if __name__ == "__main__":
    run(main)
