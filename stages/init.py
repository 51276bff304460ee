"""Begin a project in FOLDER: params.yaml with the row shapes_tiny, dvc.yaml, and settings of DVC and Git.

With --own, also a dataset and a row for your own images. Their layout, classes and sizes are looked up in the files;
docs/own-data.md of the package's sources describes the layouts. Where one of the files exists, nothing is written.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from stages import called, run

STOPPED = "nothing was written"


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("init"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="default: this folder")
    parser.add_argument("--own", metavar="IMAGES", help="a folder or archive of labelled images")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.project.begin import begin

    for name, value in (("FOLDER", arguments.folder), ("--own", arguments.own)):
        if value == "":  # of an unset variable in a script
            raise ValueError(f"{name} is empty; name a folder, or leave it out")
    folder = Path(arguments.folder).expanduser()
    begun = begin(folder, own=Path(arguments.own) if arguments.own else None)
    row = begun.row
    written = ", ".join(dict.fromkeys(name.partition("/")[0] for name in begun.files))
    print(f"wrote {written} in {folder.resolve()}")
    if arguments.own:
        todo = "give the classes their names" if begun.to_name else "read both"
        print(f"params.yaml has your images and the row {row}: {todo}")
    if begun.changes_left_out:
        print("the settings are as they were committed: changes to this clone's own params.yaml were left out")
    print("\nNext:")
    steps = [] if folder.samefile(".") else [(f"cd {shlex.quote(str(folder))}", "")]
    programs = Path(sys.executable).parent
    if shutil.which("python") != str(programs / "python"):
        activate = f". {programs}/activate" if (programs / "activate").exists() else f"export PATH={programs}:$PATH"
        steps.append((activate, "dvc calls `python`: it must be this one"))
    steps += [
        (f"m2f check {row}", "says what the row needs"),
        (f"dvc repro evaluate@{row}", "makes it; goes on where it was stopped"),
        ("m2f report", "prints the table, makes a page"),
        (f"m2f predict {row} IMAGES --out predictions", "labels images or videos"),
    ]
    width = max(len(command) for command, _ in steps)
    for command, does in steps:
        print(f"  {command:{width}}  {does}".rstrip())


if __name__ == "__main__":
    run(main, stopped=STOPPED)
