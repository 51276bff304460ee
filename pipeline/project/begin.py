"""Write the files of a new project, all or none."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.project.settings import EMBEDDED, NOTHING_OWN, Entries, project_settings
from pipeline.project.stages import project_stages, shown_folders
from pipeline.provenance.environment import committed
from pipeline.storage.files import write_text

_COPIES = Path(__file__).with_name("repository")
"""Where an installed package has copies of the repository's files (setup.py)."""

_LAST = "params.yaml"
"""Written after the others: where it is, a project was begun."""

_IGNORED_BY_GIT = "/config.local\n/tmp\n/cache\n"
"""In .dvc/, as DVC itself writes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """What a project was begun with."""

    row: str
    """One's own, or the embedded one."""
    files: tuple[str, ...] = ()
    """Relative to its folder."""
    to_name: bool = False
    """Whether params.yaml has classes of one's own that wait for their names."""
    changes_left_out: bool = False
    """Whether this clone's own params.yaml has changes to what a project begins with: it begins without them."""


def begin(folder: Path, *, own: Path | None = None) -> Begun:
    """Make `folder` a project, with the images in `own` as a dataset and a row. ValueError where one of its files is
    there already, or the images are not understood; then nothing is written."""
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    begun, entries = (Begun(row=EMBEDDED), NOTHING_OWN) if own is None else _with_own(folder, own)
    here = _repository("params.yaml")
    settings = project_settings(committed("params.yaml") or here, entries)
    _check(settings)
    begun = replace(begun, changes_left_out=settings != project_settings(here, entries))
    stages = project_stages(_repository("dvc.yaml"))
    files = {
        "params.yaml": settings,
        "dvc.yaml": stages,
        ".gitignore": _repository(".gitignore"),
        ".dvcignore": _repository(".dvcignore"),
        ".dvc/config": _config(without_git=not _below_git(folder)),
        ".dvc/.gitignore": _IGNORED_BY_GIT,
        **{
            f".dvc/plots/{path.name}": path.read_text("utf-8")
            for path in sorted(_in_repository(".dvc/plots").iterdir())
        },
    }
    files |= {f"{shown}/.gitkeep": "" for shown in shown_folders(stages)}
    _write_all(folder, files)
    return replace(begun, files=tuple(files))


def _in_repository(name: str) -> Path:
    root = _COPIES if _COPIES.is_dir() else Path(__file__).parents[2]
    return root / name


def _repository(name: str) -> str:
    return _in_repository(name).read_text(encoding="utf-8")


def _config(*, without_git: bool) -> str:
    """DVC's settings. That there is no Git stands where `dvc config core.no_scm false` changes it, as DVC's own message
    advises after a `git init`."""
    lines = [line for line in _repository(".dvc/config").splitlines(True) if "no_scm" not in line]
    if without_git:
        lines.insert(lines.index("[core]\n") + 1, "    no_scm = true\n")
    return "".join(lines)


def _with_own(folder: Path, own: Path) -> tuple[Begun, Entries]:
    """What a project with one's own images begins with, and their entries in params.yaml."""
    from pipeline.project.own_images import look
    from pipeline.project.own_row import dataset_entry, dataset_name, row_entry, row_name

    source = Path(os.path.abspath(own.expanduser()))
    if folder.is_relative_to(source):
        raise ValueError(
            f"{own} holds the project's folder; put the images into a folder of their own, such as data/mine"
        )
    found, name = look(source), dataset_name(source)
    path = source.relative_to(folder) if source.is_relative_to(folder) else source
    entries = Entries(dataset_entry(name, found, source=path.as_posix()), row_entry(name, found))
    return Begun(row=row_name(name), to_name=not found.named), entries


def _check(settings: str) -> None:
    """ValueError where the stages would refuse what is to be written."""
    import yaml

    from pipeline.params.load import parse_params

    parse_params(yaml.safe_load(settings), "the new params.yaml")


def _below_git(folder: Path) -> bool:
    """Whether a folder, which need not be there, lies in a Git checkout."""
    return any((place / ".git").exists() for place in (folder, *folder.parents))


def _write_all(folder: Path, files: Mapping[str, str]) -> None:
    """Write all files, or none. ValueError names the first that is there; what a kill has left does not count."""
    made = [each for each in (*reversed(folder.parents), folder) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            _check_room(folder, files)
            for name in sorted(files, key=lambda name: name == _LAST):
                path = folder / name
                made += [each for each in reversed(path.parents) if not each.exists()]
                path.parent.mkdir(parents=True, exist_ok=True)
                made.append(path)
                write_text(path, files[name])
    except BaseException as error:
        for each in reversed(made):
            if each.is_dir():
                each.rmdir()
            else:
                each.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ValueError(
                f"{error.filename or folder} cannot be written ({error.strerror}); name a folder where this user may "
                "write"
            ) from None
        raise


def _check_room(folder: Path, files: Mapping[str, str]) -> None:
    """ValueError where one of the files is there. Without the last one, those that are as they should be are what a
    killed call has left."""
    left = () if os.path.lexists(folder / _LAST) else files
    for name, text in files.items():
        path = folder / name
        if os.path.lexists(path) and not (name in left and path.is_file() and path.read_bytes() == text.encode()):
            raise ValueError(
                f"{path} exists, and nothing was written; name another folder, or remove what is in the way"
            )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process begins a project in the folder while the block runs, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
