"""Get a dataset's archives, verified: results/fetch/<dataset>.json.

In a `dvc repro` of everything nothing is got for rows that cannot be trained here.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from stages import run, targets


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.fetch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="an entry of `datasets` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    arguments = parser.parse_args()

    from pipeline.data.fetch import fetch
    from pipeline.params.load import load_params
    from pipeline.storage.results import FetchedDataset, find_result, write_result, write_waiting

    params, base = load_params(arguments.params), Path(arguments.params).absolute().parent
    config = params.dataset(arguments.dataset)
    if targets() == []:
        from pipeline.cost.needs import any_ready

        on_it = [row for row in params.rows.values() if row.dataset == arguments.dataset]
        if not any_ready(on_it, params, base=base):
            why = f"a row on {arguments.dataset} that can be trained here"
            if (fetched := find_result(FetchedDataset, arguments.dataset)) is not None:
                write_result(replace(fetched, waits=why), arguments.dataset)
            else:
                write_waiting(FetchedDataset, arguments.dataset, why)
            return
    fetched = fetch(arguments.dataset, config, base=base)
    write_result(fetched, arguments.dataset)
    for source in fetched.sources:
        print(f"{arguments.dataset}: {source.name}, {source.bytes / 2**20:.1f} MiB, sha256 {source.sha256[:16]}")


if __name__ == "__main__":
    run(main)
