"""Say what keeps a row from being made here: missing data, terms, GPUs, GPU-hours or another row that it starts from,
and, once its data is sharded, all that would end one of its later stages. Nothing is started.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stages import called, run


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("check"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", help="an entry of `rows` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.cost.needs import needs, untrained_weights
    from pipeline.cost.preconditions import preconditions
    from pipeline.data.shards.look import current_manifest
    from pipeline.params.load import load_params
    from pipeline.storage.results.data import Manifest
    from pipeline.storage.results.folder import find_result
    from pipeline.storage.root import in_project

    params = load_params(arguments.params)
    row = params.row(arguments.row)
    missing = needs(row, params, base=in_project(Path(arguments.params).parent), trained_counts=True)
    missing += untrained_weights(row, params)
    errors = list[str]()
    if find_result(Manifest, row.dataset) is None:
        print(f"{row.name}: what its data holds is checked when it is sharded: dvc repro shard@{row.dataset}")
    else:
        try:
            manifest = current_manifest(params, row.dataset)
        except ValueError as error:
            errors.append(str(error))
        else:
            errors, warnings = preconditions(row, manifest, params.dataset(row.dataset))
            for warning in warnings:
                print(f"warning: {row.name}: {warning}", file=sys.stderr)
    for need in missing:
        print(f"{row.name} needs {need}")
    for problem in errors:
        print(f"{row.name}: {problem}")
    if missing or errors:
        sys.exit(1)
    print(f"{row.name} has all it needs; make it with: dvc repro register@{row.name}")


if __name__ == "__main__":
    run(main)
