"""MLflow without its global state, and never waited for longer than an outage may cost.

A tracking server may be down, may take every connection and answer none, or may be slow. Whoever calls it in the
foreground waits PATIENCE_S in all, over any number of calls, until it answers again; the call itself goes on in
the background. A database file is no server: it is waited for.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVar

from pipeline.storage.root import in_project
from pipeline.tracking.database import UnusableDatabase, database_of, opened_alone

if TYPE_CHECKING:
    from mlflow import MlflowClient

_T = TypeVar("_T")

PATIENCE_S = 2.5
"""What a process waits for a server that does not answer: for one outage, in all its calls together. A row's driver,
a training and its evaluation are three processes, and a curve's close waits once more: together less than 10 s."""
ANSWER_S = 8.0
"""What a server may take to answer where all that is asked is whether it does: longer than one request may."""
QUICK_S = 1.5
"""A call that takes longer is part of an outage too: only a quicker one brings patience back."""

LOGIN = re.compile(r"(?<=\w://)([^/\s:]*)(:[^/\s]*)?@")
"""user@ or user:password@ in an address, in two groups; a password may hold an @."""

SAID = "M2F_SAID_OF_DATABASE"
"""In the environment: why the database cannot be used, once a process has said it, for those that it starts."""

_CLIENT_SETTINGS = {
    # One attempt, where MLflow's own settings block for about 4 minutes; what failed is sent again later.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "6",  # mostly in the background, so that a slow server is still written to
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # no lines about tables and migrations between the progress lines
}


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or sqlite:///<the project's folder>/mlflow.db; always absolute.

    A process that runs in another directory (a Ray worker) gets it from its driver as MLFLOW_TRACKING_URI.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    database = uri.removeprefix("sqlite:///")
    if database != uri and not database.startswith("/"):
        return f"sqlite:///{in_project(database)}"
    return uri


def shown_uri() -> str:
    """`tracking_uri()` to be printed: without the user and password that it may hold."""
    return LOGIN.sub("", tracking_uri())


def mlflow_client() -> MlflowClient:
    """The client of `tracking_uri()`. The first call imports MLflow, which reads its settings then: import nothing of
    MLflow before it. Importing takes seconds and is not the server's fault, so do it before a clock runs."""
    return _client_of(tracking_uri())


@cache
def _client_of(uri: str) -> MlflowClient:
    for key, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # whoever calls it says what failed
    if (database := database_of(uri)) is None:
        return MlflowClient(tracking_uri=uri)
    with opened_alone(database):
        return MlflowClient(tracking_uri=uri)


class _Patience:
    """Seconds that this process still waits for its server."""

    def __init__(self) -> None:
        self.left_s = PATIENCE_S
        self.one_at_a_time = threading.Lock()  # what goes on in the background keeps its order


_patience = _Patience()


class _Call(Generic[_T]):
    """A call of a server in a thread of its own, after those before it."""

    def __init__(self, action: Callable[[], _T], loss: str = "") -> None:
        """loss: what a failure is warned of with; empty: the caller does it."""
        self.results: list[_T] = []
        self.errors: list[Exception] = []
        self.quick = False
        self.done = threading.Event()
        self._action, self._loss = action, loss

    def run(self) -> None:
        try:
            with _patience.one_at_a_time:
                begun_s = time.monotonic()
                self.results.append(self._action())
                self.quick = time.monotonic() - begun_s <= QUICK_S
            if self.quick:
                _patience.left_s = PATIENCE_S
        except Exception as error:  # whatever a client or server may throw: the run goes on
            self.errors.append(error)
            if self._loss:
                warn(self._loss, error)
        finally:
            self.done.set()

    def start(self) -> None:
        threading.Thread(target=self.run, daemon=True, name="mlflow").start()


def attempt(loss: str, action: Callable[[], _T], *, patient: bool = False) -> _T | None:
    """What `action` returns, or None after one warning line that says what MLflow lacks for now.

    None also when the server has not answered within what is left of PATIENCE_S; the action then goes on in the
    background, for as long as the process lives. `patient`: wait as long as it takes.
    """
    if (broken := unusable()) is not None:
        warn(loss, broken)
        return None
    call = _Call(action)
    if patient or tracking_uri().startswith("sqlite:"):
        call.run()
    else:
        begun_s, allowed_s = time.monotonic(), _patience.left_s
        call.start()
        call.done.wait(allowed_s)
        if not call.quick:
            _patience.left_s = max(0.0, allowed_s - (time.monotonic() - begun_s))
    if call.results:
        return call.results[0]
    warn(loss, call.errors[0] if call.errors else TimeoutError("no answer in time"))
    return None


def unusable() -> Exception | None:
    """Why no client can be had, as of a database of an older MLflow. MLflow is imported here, before a clock runs."""
    try:
        mlflow_client()
    except Exception as error:  # sqlalchemy's and MLflow's own, of many classes
        return error
    return None


def no_answer() -> str:
    """Why `tracking_uri()` takes nothing now; empty: it would. Nothing is written, and no database is made."""
    if (database := database_of(tracking_uri())) is not None and not database.exists():
        return ""
    if (broken := unusable()) is not None:
        return _reason(broken)
    client = mlflow_client()
    call = _Call(lambda: (client.search_experiments(max_results=1), client.search_registered_models(max_results=1)))
    call.start()
    if not call.done.wait(ANSWER_S):
        return f"no answer within {ANSWER_S:.0f} s"
    return _reason(call.errors[0]) if call.errors else ""


def in_background(loss: str, action: Callable[[], object]) -> None:
    """Call `action` without waiting for it; one warning line when it fails."""
    if (broken := unusable()) is not None:
        warn(loss, broken)
        return
    _Call(action, loss).start()


def warn(loss: str, error: Exception) -> None:
    """One line that says what MLflow lacks for now, and why. Of a database that cannot be used, a command says it once:
    this process, and those that it starts."""
    reason = _reason(error)
    if isinstance(error, UnusableDatabase):
        said = f"{shown_uri()}: {reason}"
        if os.environ.get(SAID) == said:
            return
        os.environ[SAID] = said
    print(f"warning: {loss} ({shown_uri()}: {reason})", file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    """In one line without a login, short where it says nothing of what to do."""
    reason = LOGIN.sub("", " ".join(str(error).split()))  # MLflow's own sentences begin with the whole address
    return reason if isinstance(error, UnusableDatabase) else reason[:200]


def metric_name(name: str) -> str:
    """A class may be called anything; MLflow allows letters, digits and _ - . : / and space."""
    return re.sub(r"[^\w\-.:/ ]", "_", name)
