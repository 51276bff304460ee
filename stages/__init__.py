"""One thin script per DVC stage: `m2f <stage> --help`, or `python -m stages.<stage> --help`."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pipeline.params.schema import Params


GOES_ON = "the same command goes on with what is finished by now"


def run(main: Callable[[], None], *, stopped: str = GOES_ON) -> None:
    """Call a stage's `main`; what the user can mend (ValueError, OSError, a store that fails) ends in one line and
    exit code 1.

    Ctrl-C and SIGTERM end it with the exit codes of a process that they kill, 130 and 143, after it has tidied up;
    `stopped` says what becomes of its work then.
    """
    received = signal.SIGINT

    def on_sigterm(*_: object) -> None:
        nonlocal received
        received = signal.SIGTERM
        raise KeyboardInterrupt  # which Ray hands on where it would turn a SystemExit into its own

    signal.signal(signal.SIGTERM, on_sigterm)
    # warns of image files that are read in another way then, or refused in a sentence
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    try:
        main()
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr)
        sys.exit(128 + received)
    except BrokenPipeError:  # of `... | head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("m2f", "pipeline", "stages"):
            raise
        print(
            f"error: {sys.executable} has no module {error.name}; activate the project's environment first "
            "(. .venv/bin/activate), or make it: `make install` in a clone, `pip install` of the package elsewhere",
            file=sys.stderr,
        )
        sys.exit(1)
    except PermissionError as error:
        from pipeline.storage.root import store_failure

        _end(store_failure(error) or error)
    except (ValueError, OSError) as error:
        _end(error)
    except Exception as error:
        from pipeline.storage.root import store_failure

        if not (said := store_failure(error)):
            raise
        _end(said)


def called(stage: str) -> str:
    """What the usage line of a stage calls it: as the user did."""
    return f"m2f {stage}" if sys.argv[0] == f"m2f {stage}" else f"python -m stages.{stage}"


def targets() -> list[str] | None:
    """The targets of the `dvc repro` or `dvc exp run` that has started this process; None: DVC has not.

    Without any the whole pipeline is meant: stages then do what is cheap and possible here and wait for the rest, while
    what was asked for by name has to be there or is an error. DVC tells a command nothing of this, so the command line
    of the process that started it is read.
    """
    import psutil

    for process in psutil.Process().parents():
        try:
            found = _targets(process.cmdline())
        except psutil.Error:  # it has ended, or is another user's
            continue
        if found is not None:
            return found
    return None


_WITH_VALUE = {"-S", "--set-param", "-n", "--name", "-j", "--jobs", "-m", "--message", "-C", "--copy-paths"}
"""Options of `dvc exp run` after which a value stands; `dvc repro` has none such."""

_DVC_WITH_VALUE = ("--cd", "--cprofile-dump", "--viztracer-depth")
"""Options of `dvc` itself after which a value stands."""

_EVERYTHING = ("dvc.yaml", "./dvc.yaml", ".", "./")
"""Targets that mean the whole pipeline."""


def _targets(command: Sequence[str]) -> list[str] | None:
    words, previous = list[str](), ""
    for word in _after_dvc(command):
        if not word.startswith("-") and previous not in (*_WITH_VALUE, *_DVC_WITH_VALUE):
            words.append(word)
        previous = word
    if words[:1] == ["repro"]:
        named = words[1:]
    elif words[:1] in (["exp"], ["experiments"]) and words[1:2] in (["run"], ["r"]):
        named = words[2:]
    else:
        return None
    return [] if all(target in _EVERYTHING for target in named) else named


def _after_dvc(command: Sequence[str]) -> Sequence[str]:
    """What follows `dvc` in a command that starts it, in whatever way; empty: it does not."""
    words = list(command)
    program = PurePath(words.pop(0)).name if words else ""
    if re.fullmatch(r"python[\d.]*t?(\.exe)?", program, re.IGNORECASE):
        while words and words[0].startswith("-"):
            option = words.pop(0)
            if option == "-m":
                return words[1:] if words[:1] == ["dvc"] else []
            if option in ("-X", "-W", "--check-hash-based-pycs"):  # a value follows
                del words[:1]
            elif option.startswith("-c"):
                return []
        program = PurePath(words.pop(0)).name if words else ""
    return words if program in ("dvc", "dvc.exe") else []


def asked_rows(params: Params) -> dict[str, set[str]]:
    """Rows that a `dvc repro` names, with the stages of each; empty: none, or DVC has not started this."""
    found: dict[str, set[str]] = {}
    for target in targets() or ():
        stage, _, name = target.rpartition(":")[2].partition("@")
        if stage == "published" and name in params.checkpoints:
            name = params.checkpoints[name].row
        if name in params.rows and stage not in ("fetch", "shard", "weights"):  # those are of datasets and weights
            found.setdefault(name, set()).add(stage)
    return found


def waits(result_type: type, row: str, *, name: str = "") -> bool:
    """Whether a row's stage has nothing to do now, as `stages.ready` has found out; its result then says what is
    missing, unless it holds more than that.

    `name`: the result's, if it is not the row's: a second published checkpoint, which is made when it is asked for.
    """
    if targets() != []:
        return False
    from pipeline.storage.results.folder import read_result, write_waiting
    from pipeline.storage.results.rows import Ready

    ready = read_result(Ready, row)
    needs = list(ready.needs) if not ready.run else []
    if name not in ("", row):
        needs.append("being asked for by name")
    if needs:
        write_waiting(result_type, name or row, "; ".join(needs))
    return bool(needs)


def _end(error: object) -> NoReturn:
    if isinstance(error, OSError) and error.filename and error.strerror:
        said = f"{error.filename}: {error.strerror}"
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            said += "; let this user read and write there, or set M2F_STORAGE to a storage root where it may"
        error = said
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(1)
