"""Get a dataset's archives, verified: results/fetch/<dataset>.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from stages import run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.fetch", description=__doc__)
    parser.add_argument("dataset", help="an entry of `datasets` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    arguments = parser.parse_args()

    from pipeline.data.fetch import fetch
    from pipeline.params.load import load_params
    from pipeline.storage.results import write_result

    config = load_params(arguments.params).dataset(arguments.dataset)
    fetched = fetch(arguments.dataset, config, base=Path(arguments.params).absolute().parent)
    write_result(fetched, arguments.dataset)
    for source in fetched.sources:
        print(f"{arguments.dataset}: {source.name}, {source.bytes / 2**20:.1f} MiB, sha256 {source.sha256[:16]}")


if __name__ == "__main__":
    run(main)
