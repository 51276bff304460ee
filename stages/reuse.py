"""Let an earlier, finished training stand for one that has another run key, such as after a change of code that changes
no number. Written down with its reason in the storage root, results/ and the report; then run `dvc repro` as usual.
"""

from __future__ import annotations

import argparse

from stages import called, run


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(prog=called("reuse"), description=__doc__)
    parser.add_argument("row", help="an entry of `rows` in params.yaml")
    parser.add_argument("seed", type=int)
    parser.add_argument("run_key", help="of the earlier training: a folder below runs/ in the storage root")
    parser.add_argument("--because", required=True, metavar="REASON", help="why it is as good; the report shows it")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.data.shards.look import current_manifest
    from pipeline.params.load import load_params
    from pipeline.runs.reuse import reuse_run
    from pipeline.storage.results.data import ConvertedWeights
    from pipeline.storage.results.folder import read_result

    params = load_params(arguments.params)
    row = params.row(arguments.row)
    if arguments.seed not in row.seeds:
        raise ValueError(f"{arguments.seed} is no seed of row {row.name}, which has {', '.join(map(str, row.seeds))}")
    note = reuse_run(
        row,
        arguments.seed,
        arguments.run_key,
        manifest=current_manifest(params, row.dataset),
        weights=read_result(ConvertedWeights, row.weights),
        reason=arguments.because,
    )
    print(f"{row.name} seed {arguments.seed}: run {note.run_key} stands for {note.instead_of}")
    for difference in note.differences:
        print(f"  differs in {difference}")
    print(f"now: dvc repro -f train@{row.name}; to take it back, delete {note.note} in the storage root")


if __name__ == "__main__":
    run(main)
