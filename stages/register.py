"""Register a row's best and median checkpoint in MLflow's model registry: results/register/<row>.json."""

from __future__ import annotations

import argparse
import sys

from stages import run, waits


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.register", description=__doc__)
    parser.add_argument("row", help="an entry of `rows` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    parser.add_argument(
        "--force",
        action="store_true",
        help="give the alias best to the new version although the old one's figure is of other data",
    )
    arguments = parser.parse_args()

    from pipeline.storage.results import Registration

    if waits(Registration, arguments.row):
        return

    from pipeline.data.shards.look import current_manifest
    from pipeline.params.load import load_params
    from pipeline.params.tasks import LABELS
    from pipeline.registry.register import register
    from pipeline.storage.results import Evaluation, TrainingResult, read_result, write_result

    params = load_params(arguments.params)
    row = params.row(arguments.row)
    manifest = current_manifest(params, row.dataset)
    trained, evaluated = read_result(TrainingResult, row.name), read_result(Evaluation, row.name)
    terms = "" if row.weights == "none" else params.weights[row.weights].terms
    result = register(
        row, manifest=manifest, evaluated=evaluated, trained=trained, weights_terms=terms, force=arguments.force
    )
    write_result(result, row.name)
    for alias, version in (("best", result.aliases.best), ("median", result.aliases.median)):
        figure = ""
        if version.figure is not None and version.value is not None:
            figure = f"{LABELS[version.figure]} {100 * version.value:.2f}, "
        print(f"models:/{result.model}@{alias} is version {version.version}: {figure}seed {version.seed}")
    if result.aliases.best.kept:
        print(f"warning: {result.aliases.best.kept}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
