"""The loops of cpu.c as a library of this machine: compiled once for its processor, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

from m2f.config import Kernels

_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILERS = ("cc", "gcc", "clang")
_VERSION_S, _COMPILE_S = 60.0, 120.0
"""A compiler that takes longer is given up."""
_COMMENTS = re.compile(r"/\*.*?\*/", re.DOTALL)

_wanted: Kernels = "auto"


def use(choice: Kernels, *, device: str = "cpu") -> Literal["plain", "compiled"]:
    """Choose for this process and a sort of device, cpu or cuda; what was chosen. ValueError where compiled ones are
    asked for and cannot be had."""
    if device == "cuda":
        from m2f.kernels import gpu

        return gpu.use(choice)
    global _wanted
    if choice == "compiled":
        library = _tried()
        if isinstance(library, str):
            raise ValueError(f"kernels is compiled, but {library}; install a C compiler, or set it to plain")
    _wanted = choice
    return "plain" if loops() is None else "compiled"


def loops(digest: str | None = None) -> ctypes.CDLL | None:
    """The compiled loops; None: take the plain forms. `digest`: by which the caller counts them in digests of the
    code; it must be `source_digest()`."""
    assert digest is None or digest == _digest(), f"{_SOURCE.name} was changed: its digest is now {_digest()}"
    return None if _wanted == "plain" else _found()


def source_digest(source: Path | None = None) -> str:
    """SHA-256 of loops without their comments and white space."""
    return hashlib.sha256(" ".join(_COMMENTS.sub(" ", (source or _SOURCE).read_text()).split()).encode()).hexdigest()


def shared_library(source: Path, *, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Loops in C as a library of this machine, compiled with more flags. OSError says in words why there is none."""
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise OSError(f"there is no C compiler ({', '.join(_COMPILERS)})")
    try:
        name = _name(compiler, source, (*_FLAGS, *flags))
        folder = cache_folder("m2f-kernels")
        kept = folder and _kept(folder, name)
        if kept is not None:
            with suppress(OSError):
                return ctypes.CDLL(str(kept))
        with tempfile.TemporaryDirectory(prefix="m2f-") as temporary:
            made = Path(temporary) / f"{name}.so"
            _run([compiler, *_FLAGS, *flags, "-o", str(made), str(source), "-lm"], timeout_s=_COMPILE_S)
            return _loaded(made, folder)
    except subprocess.SubprocessError as error:
        raise OSError(f"{compiler} cannot compile {source.name} ({_last_words(error)})") from None


@cache
def _digest() -> str:
    return source_digest()


@cache
def _found() -> ctypes.CDLL | None:
    """The library; None, after one line on stderr, where it cannot be had."""
    library = _tried()
    if isinstance(library, str):
        print(f"{library}: PyTorch's own operations are used, which are slower", file=sys.stderr, flush=True)
        return None
    return library


@cache
def _tried() -> ctypes.CDLL | str:
    """The library, or in words why there is none."""
    try:
        library = shared_library(_SOURCE)
    except OSError as error:
        return str(error)
    return library if _counts_right(library) else f"the C compiler made something of {_SOURCE.name} that counts wrong"


def _name(compiler: str, source: Path, flags: Sequence[str]) -> str:
    """Of the library for this processor and compiler."""
    version = _run([compiler, "--version"], timeout_s=_VERSION_S)
    facts = (source.read_text(), compiler, version, *flags, _processor())
    return f"{source.stem}-{_short_digest('|'.join(facts).encode())}"


def _kept(folder: Path, name: str) -> Path | None:
    """The library in the cache, whose name ends with its digest: to load one that was cut short ends the process."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        with suppress(OSError):
            if path.stem == f"{name}-{_short_digest(path.read_bytes())}":
                return path
    return None


def _loaded(made: Path, folder: Path | None) -> ctypes.CDLL:
    """A new library, from the cache if it can be kept there. Once loaded it does not need its file."""
    with suppress(OSError):  # a cache that is full, or in which no code may be loaded, is done without
        if folder is not None:
            return ctypes.CDLL(str(_keep(made, folder)))
    try:
        return ctypes.CDLL(str(made))
    except OSError as error:
        raise OSError(f"the compiled {made.stem} cannot be loaded ({_last_words(error)})") from None


def _keep(made: Path, folder: Path) -> Path:
    """Put a library into the cache, whole or not at all; several processes may do the same."""
    path = folder / f"{made.stem}-{_short_digest(made.read_bytes())}.so"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        os.replace(shutil.copy(made, temporary), path)
    return path


def _short_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _run(command: Sequence[str], *, timeout_s: float) -> str:
    """What a command prints. SubprocessError where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=True)
    except OSError as error:  # it cannot be started
        raise subprocess.SubprocessError(str(error)) from None
    return done.stdout


def _last_words(error: Exception) -> str:
    """What a compiler said on stderr, else the error, in one line."""
    said = getattr(error, "stderr", None) or str(error)
    text = said.decode(errors="replace") if isinstance(said, bytes) else said  # bytes: of a process that was stopped
    return " ".join(text.split())[-200:]


def _processor() -> str:
    """What -march=native depends on: one home may serve several sorts of machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.platform()} {platform.processor()}"
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def cache_folder(name: str) -> Path | None:
    """`own_folder` in this user's cache."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # this user has no home
        return None
    return own_folder(cache / name)


def own_folder(folder: Path) -> Path | None:
    """A folder that only this user writes to, for code is loaded from it; None where there can be none."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError:
        return None
    return folder if facts.st_uid == os.getuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def _counts_right(library: ctypes.CDLL) -> bool:
    """Whether the middle of the pixels 1, 2, 3 and 6, and a place outside, each of half the weight, come out as 1.5."""
    floats, sizes = ctypes.c_float, (ctypes.c_int64 * 2)(2, 2)
    value, position = (floats * 4)(1, 2, 3, 6), (floats * 2)(0, 0)
    offsets, logits, result = (floats * 4)(1, 1, 9, 9), (floats * 2)(7, 7), (floats * 1)()
    counts = (ctypes.c_int64(n) for n in (4, 1, 1, 1, 2, 1, 0, 1))  # S, N, K, L, P, D, begin, end
    library.deformable_forward(value, sizes, position, offsets, logits, result, *counts)
    return result[0] == 1.5
