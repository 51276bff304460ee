"""The loops of cpu.c as a library of this machine: compiled once for its processor, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from m2f.config import Kernels

_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILERS = ("cc", "gcc", "clang")
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
        try:
            _library()
        except OSError as error:
            raise ValueError(f"kernels is compiled, but {error}; install a C compiler, or set it to plain") from None
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
        return ctypes.CDLL(str(_compiled(compiler, source, (*_FLAGS, *flags))))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise OSError(f"{compiler} cannot compile {source.name} ({' '.join(said.split())[-200:]})") from None


@cache
def _digest() -> str:
    return source_digest()


@cache
def _found() -> ctypes.CDLL | None:
    """The library; None, after one line on stderr, where it cannot be had."""
    try:
        return _library()
    except OSError as error:
        print(f"{error}: PyTorch's own operations are used, which are slower", file=sys.stderr, flush=True)
        return None


@cache
def _library() -> ctypes.CDLL:
    """OSError says in words why there is none."""
    library = shared_library(_SOURCE)
    if not _counts_right(library):
        raise OSError(f"the C compiler made something of {_SOURCE.name} that counts wrong")
    return library


def _compiled(compiler: str, source: Path, flags: Sequence[str]) -> Path:
    """The library for this processor and compiler, made if it is not in the cache yet."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    facts = (source.read_text(), compiler, version, *flags, _processor())
    folder = _cache_folder()
    path = folder / f"{source.stem}-{hashlib.sha256('|'.join(facts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / path.name
            command = [compiler, *flags, "-o", str(made), str(source), "-lm"]
            subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            os.replace(made, path)  # several processes may do the same
    return path


def _processor() -> str:
    """What -march=native depends on: one home may serve several sorts of machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.platform()} {platform.processor()}"
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache_folder() -> Path:
    """A folder that only this user writes to: code is loaded from it."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m2f-kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        pass
    return Path(tempfile.mkdtemp(prefix="m2f-"))


def _counts_right(library: ctypes.CDLL) -> bool:
    """Whether the middle of the pixels 1, 2, 3 and 6, and a place outside, each of half the weight, come out as 1.5."""
    floats, sizes = ctypes.c_float, (ctypes.c_int64 * 2)(2, 2)
    value, position = (floats * 4)(1, 2, 3, 6), (floats * 2)(0, 0)
    offsets, logits, result = (floats * 4)(1, 1, 9, 9), (floats * 2)(7, 7), (floats * 1)()
    counts = (ctypes.c_int64(n) for n in (4, 1, 1, 1, 2, 1, 0, 1))  # S, N, K, L, P, D, begin, end
    library.deformable_forward(value, sizes, position, offsets, logits, result, *counts)
    return result[0] == 1.5
