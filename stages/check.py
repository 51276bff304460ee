"""Say what a row needs before it can be made here: data, accepted terms, a GPU, GPU-hours. Nothing is started."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stages import run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.check", description=__doc__)
    parser.add_argument("row", help="an entry of `rows` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    arguments = parser.parse_args()

    from pipeline.cost.needs import needs
    from pipeline.params.load import load_params

    params = load_params(arguments.params)
    row = params.row(arguments.row)
    found = needs(row, params, base=Path(arguments.params).absolute().parent, trained_counts=True)
    for need in found:
        print(f"{row.name} needs {need}")
    if found:
        sys.exit(1)
    print(f"{row.name} has all it needs; make it with: dvc repro evaluate@{row.name}")


if __name__ == "__main__":
    run(main)
