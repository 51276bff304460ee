"""Evaluate a row's published checkpoint with our own code: results/published/<name>.json."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from stages import called, run, waits

if TYPE_CHECKING:
    from pipeline.storage.results.rows import PaddedEvaluation


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(prog=called("published"), description=__doc__)
    parser.add_argument("name", help="an entry of `checkpoints` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.params.load import load_params
    from pipeline.params.parse import pick
    from pipeline.storage.results.folder import write_result
    from pipeline.storage.results.rows import PublishedEvaluation

    name, params = arguments.name, load_params(arguments.params)
    config = pick(params.checkpoints, name, "published checkpoint", arguments.params)
    row = params.row(config.row)
    if waits(PublishedEvaluation, row.name, name=name):
        return

    from pipeline.data.shards.look import current_manifest

    manifest = current_manifest(params, row.dataset)

    from pipeline.evaluation.published import evaluate_published
    from pipeline.tracking.mlflow_runs import track_published

    result = evaluate_published(row, config, manifest=manifest, name=name)
    write_result(result, name)
    if run_id := track_published(row, config, result, manifest=manifest):
        result = replace(result, mlflow_run_id=run_id)
        write_result(result, name)
    print(f"{name}: the published checkpoint has {_compared(result.evaluated, row.task)} here")
    if (other := result.other_padding) is not None:
        nearer = {1: "unpadded", 32: "padded", None: "neither"}[result.agrees]
        print(f"padded to a multiple of {other.pad_multiple}: {_compared(other, row.task)}; nearer: {nearer}")


def _compared(evaluated: PaddedEvaluation, task: str) -> str:
    """The published figures as we get them, and how far they are off."""
    from pipeline.params.tasks import LABELS, in_words

    figures = evaluated.checkpoint.figures
    if not evaluated.difference:
        return in_words(figures, task)
    return ", ".join(
        f"{LABELS[name]} {100 * value:.2f} ({evaluated.difference[name]:+.2f} from the published figure)"
        for name, value in figures.items()
        if value is not None and name in evaluated.difference
    )


if __name__ == "__main__":
    run(main)
