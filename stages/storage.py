"""What lies under the storage root: list it, verify its digests, copy what results name, prune what none does.

list:   every archive, shard folder, weights file and run, its size, and whether a file under results/ names it
verify: reads every named archive, shard, weights file and checkpoint and compares its digest with results/
prune:  archives, shards and weights that no file under results/ names; a dry run unless --yes. With --runs also
        runs and unfinished shards, but for those that a row of params.yaml would go on with, that somebody is at, or
        that a registered model comes from; the dry run says why each is kept
copy:   everything that results/ names to another storage root, a folder or a URL; goes on where it was interrupted
"""

from __future__ import annotations

import argparse

from stages import called, run


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("storage"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("list", "verify", "prune", "copy"))
    parser.add_argument("to", nargs="?", metavar="ROOT", help="copy: the other storage root, as in M2F_STORAGE")
    parser.add_argument("--yes", action="store_true", help="prune: delete, do not only list")
    parser.add_argument("--runs", action="store_true", help="prune: runs and unfinished shards too")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    if (arguments.action == "copy") != (arguments.to is not None):
        command_line().error("copy needs the other storage root, and only copy takes one")

    from pipeline.params.sentences import how_many
    from pipeline.storage.inventory import copy_named, inventory, named_digests, wrong_file
    from pipeline.storage.root import root_at, storage_root

    root = storage_root()
    if arguments.action == "copy":
        files, copied = copy_named(root_at(arguments.to))
        print(
            f"{files} files that results/ names are there, {copied} of them new; to read them all and compare digests:"
        )
        print(f"M2F_STORAGE={arguments.to} python -m stages.storage verify")
        return
    if arguments.action == "verify":
        named = named_digests()
        problems = [problem for path, digest in sorted(named.items()) if (problem := wrong_file(path, digest))]
        for problem in problems:
            print(problem)
        print(f"{len(named) - len(problems)} of {len(named)} files that results/ names are whole, under {root}")
        if problems:
            raise ValueError(f"missing or altered under {root}: {how_many(len(problems), 'file')}")
        return
    if arguments.action == "prune":
        _prune(arguments.params, runs=arguments.runs, delete=arguments.yes)
        return
    items = inventory()
    for item in items:
        print(f"{item.bytes / 2**20:12,.1f} MiB  {'named  ' if item.named else 'unnamed'}  {item.path}")
    print(f"{sum(item.bytes for item in items) / 2**20:12,.1f} MiB  in all, under {root}")


def _prune(params: str, *, runs: bool, delete: bool) -> None:
    """Delete what no result names, or say what would be deleted. ValueError where there is no result."""
    from pipeline.storage.inventory import inventory, prune
    from pipeline.storage.results.folder import every_result

    if not any(every_result()):
        raise ValueError(
            "results/ holds no result here, and without one everything would count as unnamed; run prune in the "
            "project's folder"
        )
    folders, kept, unneeded = ["archives", "shards", "weights"], dict[str, str](), 0
    if runs:
        from pipeline.params.load import load_params
        from pipeline.registry.kept import kept_runs

        folders.append("runs")
        kept = kept_runs(load_params(params))
    for item in inventory():
        going_on = item.path.startswith("shards/.building-") and not runs  # or to be gone on with
        if going_on or item.path.split("/")[0] not in folders:
            continue
        size = f"{item.path} ({item.bytes / 2**20:,.1f} MiB)"
        if why := f"{item.named_in} names it" if item.named else kept.get(item.path):
            if not delete:
                print(f"would keep {size}: {why}")
            continue
        unneeded += 1
        print(f"{'deleted' if delete else 'would delete'} {size}: nothing names it")
        if delete:
            prune(item)
    if not unneeded:
        print("there is nothing to delete")
    elif not delete:
        print("nothing was deleted; add --yes to delete")


if __name__ == "__main__":
    run(main)
