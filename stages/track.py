"""Bring MLflow up to date with results/ and the run folders, after an outage or for a new tracking server."""

from __future__ import annotations

import argparse
from pathlib import Path

from stages import run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.track", description=__doc__)
    parser.add_argument("rows", nargs="*", help="entries of `rows` in params.yaml; default: all that have results")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    arguments = parser.parse_args()

    from pipeline import tracking
    from pipeline.files import read_json
    from pipeline.mlflow_client import shown_uri
    from pipeline.params import load_params
    from pipeline.storage import storage_root

    params = load_params(arguments.params)
    late, tracked = [], False
    for row in [params.row(name) for name in arguments.rows or params.rows]:
        ids: dict[str, str | None] = {}
        published, trained, evaluated = (
            Path(f"results/{stage}/{row.name}.json") for stage in ("published", "train", "evaluate")
        )
        if published.exists():
            result = read_json(published, made_by=f"dvc repro published@{row.name}")
            if result["curve"]:
                run_dir = (storage_root() / result["curve"]).parent
                ids["published"] = tracking.catch_up(run_dir, status="published", patient=True)
        if trained.exists():
            seeds = read_json(trained, made_by=f"dvc repro train@{row.name}")["seeds"]
            decides = None
            if evaluated.exists():
                result = read_json(evaluated, made_by=f"dvc repro evaluate@{row.name}")
                if [seed["run_key"] for seed in result["seeds"]] == [seed["run_key"] for seed in seeds]:
                    seeds, decides = result["seeds"], result["decides"]
            ids |= tracking.track_row(row, seeds, decides=decides, patient=True)
        tracked |= bool(ids)
        if ids:
            missing = [name for name, run_id in ids.items() if run_id is None]
            late += missing
            print(f"{row.name}: {len(ids) - len(missing)} of {len(ids)} runs are up to date in {shown_uri()}")
    if not tracked:
        print("no training has been tracked yet: results/train and results/published hold none of these rows")
    if late:
        raise OSError(f"{shown_uri()} did not take {len(late)} runs; run python -m stages.track again")


if __name__ == "__main__":
    run(main)
