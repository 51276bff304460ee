"""Bring MLflow up to date with results/ and the run folders, after an outage or for a new tracking server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages import called, run

if TYPE_CHECKING:
    from pipeline.params.schema import Params, Row
    from pipeline.storage.results.rows import EvaluatedSeed, TrainedSeed, Which


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
    from pipeline.storage.results.folder import names_of
    from pipeline.storage.results.rows import TrainingResult
    from pipeline.tracking.client import shown_uri
    from pipeline.tracking.mlflow_runs import rows_experiment
    from pipeline.tracking.pages import MlflowPages

    params = load_params(arguments.params)
    late, unread, tasks = list[str](), list[str](), dict[str, None]()
    for row in [params.row(name) for name in arguments.rows or params.rows]:
        ids: dict[str, str | None] = {}
        for part in (_published, _trained):
            try:
                ids |= part(row, params)
            except (ValueError, OSError) as error:  # of a file that is torn: the others go on
                unread.append(row.name)
                print(f"error: {row.name}: {' '.join(str(error).split())}", file=sys.stderr)
        if ids:
            tasks[row.task] = None
            missing = [name for name, run_id in ids.items() if run_id is None]
            late += missing
            print(f"{row.name}: {len(ids) - len(missing)} of {len(ids)} runs are up to date in {shown_uri()}")
    if not arguments.rows and (gone := [name for name in names_of(TrainingResult) if name not in params.rows]):
        print(f"left as they are, because {arguments.params} has no such row: {', '.join(gone)}")
    if not tasks and not unread:
        print("no training has been tracked yet: results/ holds no training and no published log of these rows")
    if late:
        raise OSError(f"{shown_uri()} did not take {how_many(len(late), 'run')}; run python -m stages.track again")
    experiment = rows_experiment(patient=True) if tasks else None
    for task in tasks:
        pages = MlflowPages(shown_uri())
        if page := pages.rows(experiment, task):
            print(f"{task} rows beside each other: {page}{pages.how}")
    if unread:
        raise ValueError(f"not all of {', '.join(dict.fromkeys(unread))} is up to date in {shown_uri()}, as said above")


def _published(row: Row, params: Params) -> dict[str, str | None]:
    """The run of the row's published training, if its log is here: None where the server does not take it."""
    from pipeline.storage.results.data import Manifest
    from pipeline.storage.results.folder import find_result, sound_result
    from pipeline.storage.results.rows import PublishedEvaluation
    from pipeline.tracking.mlflow_runs import track_published

    published = find_result(PublishedEvaluation, row.name)
    if published is None or not published.curve or row.name not in params.checkpoints:
        return {}
    manifest, config = sound_result(Manifest, row.dataset), params.checkpoints[row.name]
    return {"published": track_published(row, config, published, manifest=manifest, patient=True)}


def _trained(row: Row, params: Params) -> dict[str, str | None]:
    """The runs of the row's trainings, by their keys, and its own."""
    from pipeline.comparison.rows import is_of_other_settings
    from pipeline.storage.results.data import Manifest
    from pipeline.storage.results.folder import find_result, sound_result
    from pipeline.storage.results.rows import Evaluation, TrainingResult
    from pipeline.tracking.mlflow_runs import track_row

    trained = find_result(TrainingResult, row.name)
    if trained is None:
        return {}
    seeds: Sequence[TrainedSeed | EvaluatedSeed] = trained.seeds
    decides: Which = "last"
    evaluated = find_result(Evaluation, row.name)
    if evaluated and [seed.run_key for seed in evaluated.seeds] == [seed.run_key for seed in seeds]:
        seeds, decides = evaluated.seeds, evaluated.decides
    if stale := is_of_other_settings(row, trained):
        print(
            f"{row.name}: its trainings are of other settings than params.yaml has now, so the row itself is left as "
            f"it is in MLflow until: dvc repro evaluate@{row.name}"
        )
    verdict, manifest = params.verdict, sound_result(Manifest, row.dataset)
    return track_row(row, seeds, manifest=manifest, decides=decides, verdict=verdict, stale=stale, patient=True)


if __name__ == "__main__":
    run(main)
