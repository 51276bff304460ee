"""One thin script per DVC stage: `python -m stages.<stage> --help`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], None]) -> None:
    """Call a stage's `main`; what the user can mend (ValueError, OSError, a store that fails) ends in one line and
    exit code 1.

    Ctrl-C and SIGTERM end it with the exit codes of a process that they kill, 130 and 143, after it has tidied up.
    """
    received = signal.SIGINT

    def on_sigterm(*_: object) -> None:
        nonlocal received
        received = signal.SIGTERM
        raise KeyboardInterrupt  # which Ray hands on where it would turn a SystemExit into its own

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + received)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("m2f", "pipeline", "stages"):
            raise
        print(
            f"error: {sys.executable} has no module {error.name}; activate the project's environment first "
            "(. .venv/bin/activate), or make it with: make demo",
            file=sys.stderr,
        )
        sys.exit(1)
    except (ValueError, OSError) as error:
        _end(error)
    except Exception as error:
        from pipeline.storage.root import store_failure

        if not (said := store_failure(error)):
            raise
        _end(said)


def _end(error: object) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(1)
