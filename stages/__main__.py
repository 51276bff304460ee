"""The command `m2f`: every stage as a subcommand. `python -m stages` is the same."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType
from typing import NamedTuple

from stages import (
    GOES_ON,
    benchmark,
    browse,
    check,
    evaluate,
    export,
    fetch,
    init,
    package,
    plan,
    predict,
    preflight,
    published,
    ready,
    register,
    report,
    reuse,
    run,
    shard,
    storage,
    track,
    train,
    weights,
)


class _Command(NamedTuple):
    module: ModuleType
    does: str
    stopped: str = GOES_ON
    """What becomes of its work when it is stopped."""


COMMANDS = {
    "init": _Command(init, "begin a project: params.yaml and dvc.yaml", init.STOPPED),
    "check": _Command(check, "say what keeps a row from being made here"),
    "plan": _Command(plan, "estimate GPU-hours, days, storage and money of rows"),
    "preflight": _Command(preflight, "rehearse a row on stand-in images, in minutes", preflight.STOPPED),
    "fetch": _Command(fetch, "get a dataset's archives, verified"),
    "shard": _Command(shard, "turn a dataset's archives into Arrow files"),
    "browse": _Command(browse, "show a dataset as a page, also augmented"),
    "weights": _Command(weights, "get the weights that rows start from"),
    "ready": _Command(ready, "note whether a row can be made, for its other stages"),
    "train": _Command(train, "train the seeds of a row"),
    "evaluate": _Command(evaluate, "evaluate the checkpoints of a row's seeds"),
    "report": _Command(report, "put results beside the published figures: reports/"),
    "predict": _Command(predict, "predict images or videos with a trained network"),
    "register": _Command(register, "put checkpoints into MLflow's model registry"),
    "export": _Command(export, "write a network as ONNX or for other libraries", export.STOPPED),
    "published": _Command(published, "evaluate a row's published checkpoint"),
    "benchmark": _Command(benchmark, "measure a row's memory and speed on this machine"),
    "track": _Command(track, "bring MLflow up to date, as after an outage"),
    "reuse": _Command(reuse, "let one training stand for another run key"),
    "storage": _Command(storage, "list, verify, copy and prune the storage root"),
    "package": _Command(package, "note which version of this package is installed"),
}
"""In the order in which they are used."""

_PATHS = {"cluster", "folder", "images", "out", "own", "params"}
"""Arguments for which a shell offers files."""

_SOURCES = "sources"
"""What the argument `source` names besides files; for `--names` like a section of params.yaml."""

_NAMES = {"row": "rows", "rows": "rows", "dataset": "datasets"}
"""Arguments for which it offers the names in a section of params.yaml."""
_NAMES_OF = {"weights": "weights", "published": "checkpoints"}
"""Likewise for the argument `name` of a command."""


def main() -> None:
    """Call the stage that the first word names, with the other words."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        sys.argv = [f"m2f {name}", *sys.argv[2:]]
        run(COMMANDS[name].module.main, stopped=COMMANDS[name].stopped)
        return
    run(_of_no_stage, stopped="nothing was done")


def _of_no_stage() -> None:
    parser = _parser()
    if sys.argv[1:] == []:
        parser.print_help()
        return
    arguments = parser.parse_args()  # of a wrong command it says which there are
    if arguments.version:
        from pipeline.provenance.package import DISTRIBUTION, package_version

        print(f"{DISTRIBUTION} {package_version() or 'is not installed; it runs from its sources'}")
    elif arguments.print_completion:
        print(_completion(arguments.print_completion))
    elif arguments.names:
        print("\n".join(_names(arguments.names)))
    else:
        parser.error("name a command")


def _names(section: str) -> list[str]:
    """The names in a section of params.yaml or checkpoints.yaml, or of the networks that were trained or registered
    here."""
    if section == _SOURCES:
        from pipeline.storage.results.folder import names_of, sound_result
        from pipeline.storage.results.rows import Registration, TrainingResult

        registered = (sound_result(Registration, row) for row in names_of(Registration))
        return [*names_of(TrainingResult), *(f"models:/{each.model}@best" for each in registered if each)]

    from pathlib import Path

    import yaml

    path = Path(f"{section}.yaml") if Path(f"{section}.yaml").exists() else Path("params.yaml")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
        return [str(name) for name, _ in tree[section].items()]
    except FileNotFoundError:
        raise ValueError("params.yaml does not exist; run from the project's folder") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"params.yaml has no names under {section}, or is torn; see what is wrong with it: m2f plan"
        ) from None


def _parser(*, arguments: bool = False) -> argparse.ArgumentParser:
    """The commands' names; with `arguments`, also what a shell completes after each."""
    parser = argparse.ArgumentParser(
        prog="m2f",
        description="Train, evaluate and use the rows of params.yaml. Run it in the project's folder.",
        epilog="`dvc repro evaluate@ROW` calls fetch, shard, weights, ready, train and evaluate as far as needed.",
    )
    parser.add_argument("--version", action="store_true", help="print the version of this package")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        help="print a script with which this shell completes commands, options and paths",
    )
    parser.add_argument(
        "--names",
        choices=sorted({*_NAMES.values(), *_NAMES_OF.values(), _SOURCES}),
        help="print the names in this section of params.yaml, or of trained rows and registered models (sources), as "
        "completion does",
    )
    commands = parser.add_subparsers(title="commands, in the order in which they are used", metavar="COMMAND")
    for name, command in COMMANDS.items():
        if not arguments:
            commands.add_parser(name, help=command.does)
            continue
        whole = command.module.command_line()
        for action in whole._actions:  # where shtab looks for `complete`
            if completed := _completed(name, action.dest):
                action.complete = completed
        commands.add_parser(name, help=command.does, parents=[whole], add_help=False)
    return parser


def _completed(command: str, argument: str) -> object:
    """What shtab is to offer for an argument; None: nothing but its choices."""
    import shtab

    if argument in _PATHS:
        return shtab.FILE
    if argument == "source":
        names = f"m2f --names {_SOURCES} 2>/dev/null"
        return {
            "bash": "_m2f_sources",
            "zsh": f"{{_files; compadd -- $({names})}}",
            "tcsh": shtab.FILE["tcsh"],
            "preamble": {"bash": f'_m2f_sources() {{\n  compgen -f -- "$1"\n  compgen -W "$({names})" -- "$1"\n}}'},
        }
    section = _NAMES_OF.get(command) if argument == "name" else _NAMES.get(argument)
    return section and shtab.cmd(f"m2f --names {section} 2>/dev/null")


def _completion(shell: str) -> str:
    import shtab

    script: str = shtab.complete(_parser(arguments=True), shell)
    return script


if __name__ == "__main__":
    main()
