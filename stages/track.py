"""Bring MLflow up to date with results/ and the run folders, after an outage or for a new tracking server."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages import run

if TYPE_CHECKING:
    from pipeline.storage.results import EvaluatedSeed, TrainedSeed, Which


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.track", description=__doc__)
    parser.add_argument("rows", nargs="*", help="entries of `rows` in params.yaml; default: all that have results")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    arguments = parser.parse_args()

    from pipeline.params.load import load_params
    from pipeline.storage.results import Evaluation, PublishedEvaluation, TrainingResult, find_result
    from pipeline.tracking.client import shown_uri
    from pipeline.tracking.mlflow_runs import track_published, track_row

    params = load_params(arguments.params)
    late, tracked = [], False
    for row in [params.row(name) for name in arguments.rows or params.rows]:
        ids: dict[str, str | None] = {}
        published = find_result(PublishedEvaluation, row.name)
        if published is not None and published.curve and row.name in params.checkpoints:
            ids["published"] = track_published(row, params.checkpoints[row.name], published, patient=True)
        if (trained := find_result(TrainingResult, row.name)) is not None:
            seeds: Sequence[TrainedSeed | EvaluatedSeed] = trained.seeds
            decides: Which | None = None
            evaluated = find_result(Evaluation, row.name)
            if evaluated and [seed.run_key for seed in evaluated.seeds] == [seed.run_key for seed in seeds]:
                seeds, decides = evaluated.seeds, evaluated.decides
            ids |= track_row(row, seeds, decides=decides, patient=True)
        tracked |= bool(ids)
        if ids:
            missing = [name for name, run_id in ids.items() if run_id is None]
            late += missing
            print(f"{row.name}: {len(ids) - len(missing)} of {len(ids)} runs are up to date in {shown_uri()}")
    if not tracked:
        print("no training has been tracked yet: results/ holds no training and no published log of these rows")
    if late:
        raise OSError(f"{shown_uri()} did not take {len(late)} runs; run python -m stages.track again")


if __name__ == "__main__":
    run(main)
