"""Get a dataset's archives, verified: results/fetch/<dataset>.json.

In a `dvc repro` of everything nothing is got for rows that cannot be trained here, and by a row's name nothing that the
row could not use for want of something else. What has been sharded before may be gone, unless it is asked for by name.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from stages import asked_rows, called, run, targets


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("fetch"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="an entry of `datasets` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.cost.needs import any_ready, refuse_asked
    from pipeline.data.fetch import fetch, gone
    from pipeline.params.load import load_params
    from pipeline.storage.results.data import FetchedDataset, Manifest
    from pipeline.storage.results.folder import sound_result, write_result, write_waiting
    from pipeline.storage.root import in_project

    params, base = load_params(arguments.params), in_project(Path(arguments.params).parent)
    config = params.dataset(arguments.dataset)
    asked, before = targets(), sound_result(FetchedDataset, arguments.dataset)
    if asked == []:
        on_it = [row for row in params.rows.values() if row.dataset == arguments.dataset]
        if not any_ready(on_it, params, base=base):
            why = f"a row on {arguments.dataset} that can be trained here"
            if before is not None:
                write_result(replace(before, waits=why), arguments.dataset)
            else:
                write_waiting(FetchedDataset, arguments.dataset, why)
            return
    refuse_asked(asked_rows(params), params, lambda row: row.dataset == arguments.dataset, base=base)
    by_name = asked is None or any(target.endswith(f"fetch@{arguments.dataset}") for target in asked)
    if before is not None and not by_name and sound_result(Manifest, arguments.dataset) is not None:
        missing = gone(arguments.dataset, config, before, base=base)
        if missing:
            print(f"{arguments.dataset}: {', '.join(missing)} is not here; its shards stay in use", file=sys.stderr)
            write_result(replace(before, waits=""), arguments.dataset)
            return
    fetched = fetch(arguments.dataset, config, base=base)
    write_result(fetched, arguments.dataset)
    for source in fetched.sources:
        print(f"{arguments.dataset}: {source.name}, {source.bytes / 2**20:.1f} MiB, sha256 {source.sha256[:16]}")


if __name__ == "__main__":
    run(main)
