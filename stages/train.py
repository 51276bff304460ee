"""Train the seeds of a row: results/train/<row>.json. Finished seeds are found again by their run keys."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stages import called, run, waits

if TYPE_CHECKING:
    from pipeline.storage.results.rows import TrainedSeed


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(prog=called("train"), description=__doc__)
    parser.add_argument("row", help="an entry of `rows` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="only this seed, without writing results; default: the row's seeds")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.storage.results.rows import TrainingResult

    if waits(TrainingResult, arguments.row):
        return

    from pipeline.cost.preconditions import refuse_to_train
    from pipeline.data.shards.look import current_manifest
    from pipeline.params.load import load_params
    from pipeline.storage.results.data import ConvertedWeights
    from pipeline.storage.results.folder import RESULTS, find_result, read_result
    from pipeline.storage.results.rows import PublishedEvaluation
    from pipeline.training.seeds import train_row

    params = load_params(arguments.params)
    row = params.row(arguments.row)
    manifest = current_manifest(params, row.dataset)
    weights = read_result(ConvertedWeights, row.weights)
    result = train_row(
        row,
        manifest=manifest,
        weights=weights,
        published=find_result(PublishedEvaluation, row.name),  # taken where it is: nothing depends on it
        only=arguments.seed,
        results=RESULTS if arguments.seed is None else None,
        before_training=lambda row: refuse_to_train(row, manifest, params.dataset(row.dataset)),
    )
    for seed in result.seeds:
        print(f"{row.name} seed {seed.seed}: {_outcome(seed, row.task)}, run {seed.run_key}")


def _outcome(seed: TrainedSeed, task: str) -> str:
    from pipeline.params.tasks import in_words

    if seed.status != "finished":
        return f"{seed.status} ({seed.reason})"
    return f"validation {in_words(seed.metrics, task)} after {seed.steps} steps in {seed.train_s:.0f} s"


if __name__ == "__main__":
    run(main)
