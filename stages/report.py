"""Put what exists in results/ beside the published figures: reports/results.md, results.json and index.html."""

from __future__ import annotations

import argparse
from pathlib import Path

from stages import called, run


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(prog=called("report"), description=__doc__)
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    parser.add_argument("--out", default="reports", help="folder; default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.params.load import load_params
    from pipeline.report.write import write_report

    table = write_report(load_params(arguments.params), out=Path(arguments.out))
    print(table)
    print(f"\nreport: {arguments.out}/index.html (also results.md, results.json)")


if __name__ == "__main__":
    run(main)
