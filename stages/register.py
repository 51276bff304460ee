"""Register a row's best and median checkpoint in MLflow's model registry: results/register/<row>.json."""

from __future__ import annotations

import argparse
import sys

from stages import run


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

    from pipeline.files import read_json, write_json
    from pipeline.params import load_params
    from pipeline.registry import register
    from pipeline.results import Manifest, read_result
    from pipeline.tasks import LABELS

    params = load_params(arguments.params)
    row = params.row(arguments.row)
    manifest = read_result(Manifest, row.dataset)
    trained = read_json(f"results/train/{row.name}.json", made_by=f"dvc repro train@{row.name}")
    evaluated = read_json(f"results/evaluate/{row.name}.json", made_by=f"dvc repro evaluate@{row.name}")
    terms = "" if row.weights == "none" else params.weights[row.weights].terms
    result = register(
        row, manifest=manifest, evaluated=evaluated, trained=trained, weights_terms=terms, force=arguments.force
    )
    write_json(f"results/register/{row.name}.json", result)
    for alias, version in result["aliases"].items():
        figure = f"{LABELS[version['figure']]} {100 * version['value']:.2f}, " if version["value"] is not None else ""
        print(f"models:/{result['model']}@{alias} is version {version['version']}: {figure}seed {version['seed']}")
    if result["aliases"]["best"]["kept"]:
        print(f"warning: {result['aliases']['best']['kept']}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
