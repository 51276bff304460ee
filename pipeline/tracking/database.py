"""A local database of MLflow's: made whole, by one process; opened only if it is sound and of this MLflow's version.

MLflow itself makes its tables one by one, and upgrades an older database in place without asking: two processes at
once, or a kill, would leave a database that no version can use.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from pipeline.storage.disk import is_special, locked, partial_files, written_whole

if TYPE_CHECKING:
    from pipeline.storage.stores import StoredPath

OPENING_S = 60.0
"""Longest wait for another process that makes or opens the database, which takes seconds."""

_OR_A_NEW_ONE = "or move the database away: python -m stages.track then makes a new one of the run folders"


class UnusableDatabase(ValueError):
    """Why a local database takes nothing, and what to do, about "it". It stays so until somebody mends it."""


def database_of(uri: str) -> Path | None:
    """The file of a local database by its tracking URI; None: it is a server's."""
    if not uri.startswith("sqlite:///") or ":memory:" in uri:
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve()


@contextmanager
def opened_alone(database: Path) -> Iterator[None]:
    """Only this process opens the database while the block runs. It is made before if there is none.

    UnusableDatabase: it is none of MLflow's, half made, of another version, or cannot be written.
    """
    try:
        with locked(database.with_name(f"{database.name}.lock"), wait_s=OPENING_S):
            _check(database)
            yield
    except BlockingIOError:
        raise UnusableDatabase(f"another process has been opening it for {OPENING_S:.0f} s") from None
    except OSError as error:
        raise UnusableDatabase(
            f"it cannot be written ({error.strerror or error}); let this user write it and its folder, or set "
            "MLFLOW_TRACKING_URI to another database"
        ) from None


def _check(database: Path) -> None:
    """Make the database if there is none; UnusableDatabase if it is not one that this MLflow can use."""
    tables, revisions = _contents(database)
    if not tables:
        _make(database)
        return
    if not {"experiments", "alembic_version"} & tables:
        raise UnusableDatabase("it is a database of another program; set MLFLOW_TRACKING_URI to another file")
    if not revisions or any(table.startswith("_alembic_tmp_") for table in tables):
        raise UnusableDatabase(
            "it is half made: whoever made or upgraded it was interrupted; put back the copy that was made "
            f"before an upgrade, {_OR_A_NEW_ONE}"
        )
    if revisions != {newest := _newest_revision()}:
        raise UnusableDatabase(
            f"it is of another version of MLflow (its tables are at {', '.join(sorted(revisions))}, MLflow "
            f"{version('mlflow')} has {newest}); take a backup of it, then run 'mlflow db upgrade "
            f"sqlite:///{database}', or install the version that made it, {_OR_A_NEW_ONE}"
        )
    with open(database, "ab"):  # PermissionError, or a file system that is mounted for reading
        pass


def _contents(database: Path) -> tuple[set[str], set[str]]:
    """Names of the tables of a database and the revisions that they are at; both empty: there is none yet."""
    if is_special(database):  # it might never answer, or be replaced
        raise UnusableDatabase(f"it is a device, a pipe or a socket; correct MLFLOW_TRACKING_URI, {_OR_A_NEW_ONE}")
    if not database.exists() or (database.is_file() and not database.stat().st_size):
        return set(), set()
    uri = f"file:{quote(str(database))}?mode=rw"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=OPENING_S)) as connection:
            tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
            known = "alembic_version" in tables
            found = connection.execute("select version_num from alembic_version") if known else ()
            return tables, {revision for (revision,) in found}
    except sqlite3.Error as error:
        raise UnusableDatabase(
            f"it is no database that MLflow can use ({error}); correct MLFLOW_TRACKING_URI, {_OR_A_NEW_ONE}"
        ) from None


def _newest_revision() -> str:
    import mlflow.store.db_migrations
    from alembic.script import ScriptDirectory

    (folder,) = mlflow.store.db_migrations.__path__
    return str(ScriptDirectory(folder).get_current_head())


def _make(database: Path) -> None:
    """Make a database with all its tables, whole or not at all."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import Engine, event

    for left in partial_files(database.parent, database.name):  # by a kill: nobody else is at it
        left.unlink()
    event.listen(Engine, "connect", _without_waiting)
    try:
        with written_whole(database) as partial:
            # MLflow's experiment "Default" gets a place beside the database. By itself MLflow would take the working
            # folder, which may be a temporary one of Ray's.
            SqlAlchemyStore(f"sqlite:///{partial}", (database.parent / "mlruns").as_uri()).engine.dispose()
    finally:
        event.remove(Engine, "connect", _without_waiting)


def _without_waiting(connection: sqlite3.Connection, _: object) -> None:
    """Let the disk write when it likes: 70 changes of tables would wait for it, and the whole file is waited for."""
    connection.execute("PRAGMA synchronous = OFF")


def check_place(location: str, folder: StoredPath) -> None:
    """UnusableDatabase when the files of an experiment, `location`, lie in another storage root than `folder`."""
    wanted = folder.as_uri()
    ending = "/mlflow/" + wanted.rpartition("/")[2]
    if location == wanted or not location.endswith(ending):  # a place of somebody's own
        return
    kept, root = location.removesuffix(ending), folder.parent.parent
    state, mend = "is a copy or another one", f"set M2F_STORAGE={kept}"
    if kept.startswith("file://"):
        old = Path(unquote(urlsplit(kept).path))
        if isinstance(root, Path) and old.resolve() == root.resolve():
            return
        kept, mend = str(old), f"set M2F_STORAGE={old}"
        if not old.exists():
            state, mend = "was moved", f"run mkdir -p {old.parent} && ln -s {root} {old}"
    raise UnusableDatabase(
        f"it keeps files below {kept}, but the storage root is {root}, which {state}; {mend}, {_OR_A_NEW_ONE}, and "
        "dvc repro -f register@<row> registers a row's models in it"
    )
