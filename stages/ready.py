"""Find out whether a row can be made here: results/ready/<row>.json.

Asked for by name, a row that lacks something is an error. In a `dvc repro` of everything it waits: its other stages do
nothing and say so in their results, and a line here says what is missing. What is wrong with shards that are there is
only said where they may be made anew in the same `dvc repro`; a training refuses them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stages import called, run, targets


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("ready"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", help="an entry of `rows` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    import dataclasses
    import hashlib
    import json

    from pipeline.cost.needs import needs, refuse
    from pipeline.cost.preconditions import known_errors
    from pipeline.params.load import load_params
    from pipeline.storage.results.folder import write_result
    from pipeline.storage.results.rows import Ready
    from pipeline.storage.root import in_project

    params = load_params(arguments.params)
    row, base = params.row(arguments.row), in_project(Path(arguments.params).parent)
    asked = targets()
    found = needs(row, params, base=base, by_name=asked != [])
    errors = known_errors(row, params)
    shaping = {name: value for name, value in dataclasses.asdict(row).items() if name != "registry"}
    settings = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()
    if asked == []:
        found += [f"a correction ({error})" for error in errors]
        write_result(Ready(row=row.name, run=not found, needs=tuple(found), settings=settings), row.name)
        if found:
            print(f"{row.name} waits for {'; '.join(found)}")
        return
    refuse(row, params, {target.rpartition(":")[2].partition("@")[0] for target in asked or ()}, base=base)
    if errors and asked is None:
        raise ValueError(f"row {row.name} cannot be made here: {'; '.join(errors)}")
    for error in errors:
        print(f"{row.name} will not be trained as its shards are now: {error}", file=sys.stderr)
    write_result(Ready(row=row.name, run=True, needs=tuple(found), settings=settings), row.name)


if __name__ == "__main__":
    run(main)
