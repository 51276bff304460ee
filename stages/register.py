"""Register a row's best and median checkpoint in MLflow's model registry: results/register/<row>.json."""

from __future__ import annotations

import argparse
import sys

from stages import called, run, waits


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(prog=called("register"), description=__doc__)
    parser.add_argument("row", help="an entry of `rows` in params.yaml, with --published of `checkpoints`")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    parser.add_argument(
        "--force",
        action="store_true",
        help="give the alias best to the new version although the old one's figure is of other data",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="register a published checkpoint, which dvc repro published@<name> has evaluated, as <name>-published",
    )
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()
    if arguments.published:
        _register_published(arguments.row, arguments.params)
        return

    from pipeline.storage.results.rows import Registration

    if waits(Registration, arguments.row):
        return

    from pipeline.comparison.rows import current_training, row_facts
    from pipeline.data.shards.look import current_manifest
    from pipeline.params.load import load_params
    from pipeline.params.tasks import LABELS
    from pipeline.registry.register import register
    from pipeline.storage.results.folder import RESULTS, read_result, write_result, write_waiting
    from pipeline.storage.results.rows import Evaluation
    from pipeline.tracking.client import shown_uri
    from pipeline.tracking.mlflow_runs import log_row
    from pipeline.tracking.pages import MlflowPages
    from pipeline.tracking.rows import tracked_row

    params = load_params(arguments.params)
    row = params.row(arguments.row)
    if not row.registry:
        write_waiting(Registration, row.name, f"rows.{row.name}.registry: true in params.yaml")
        print(f"{row.name} is not registered: rows.{row.name}.registry is false in params.yaml")
        return
    manifest = current_manifest(params, row.dataset)
    trained, evaluated = current_training(row), read_result(Evaluation, row.name)
    terms = "" if row.weights == "none" else params.weights[row.weights].terms
    facts = row_facts(row, RESULTS, params.verdict)
    result = register(
        row,
        manifest=manifest,
        evaluated=evaluated,
        trained=trained,
        weights_terms=terms,
        verdict=facts.verdict,
        force=arguments.force,
    )
    write_result(result, row.name)
    statuses = [seed.status for seed in evaluated.seeds]
    log_row(row, tracked_row(row, manifest), statuses=statuses, facts=facts)  # which may have a benchmark by now
    for alias, version in (("best", result.aliases.best), ("median", result.aliases.median)):
        figure = ""
        if version.figure is not None and version.value is not None:
            figure = f"{LABELS[version.figure]} {100 * version.value:.2f}, "
        print(f"models:/{result.model}@{alias} is version {version.version}: {figure}seed {version.seed}")
    pages = MlflowPages(shown_uri())
    if page := pages.model(result.model):
        print(f"{row.name}: the model in MLflow: {page}{pages.how}")
    if result.aliases.best.kept:
        print(f"warning: {result.aliases.best.kept}", file=sys.stderr)


def _register_published(name: str, file: str) -> None:
    from pipeline.data.shards.look import current_manifest
    from pipeline.params.load import load_params
    from pipeline.params.parse import pick
    from pipeline.params.tasks import LABELS
    from pipeline.registry.register import register_published
    from pipeline.storage.results.folder import read_result
    from pipeline.storage.results.rows import PublishedEvaluation

    params = load_params(file)
    row = params.row(pick(params.checkpoints, name, "published checkpoint", file).row)
    result = read_result(PublishedEvaluation, name)
    model, version = register_published(row, result, manifest=current_manifest(params, row.dataset))
    assert version.figure is not None and version.value is not None
    print(
        f"models:/{model}@published is version {version.version}: "
        f"{LABELS[version.figure]} {100 * version.value:.2f}, published checkpoint {name}"
    )


if __name__ == "__main__":
    run(main)
