"""What a result may depend on besides its key: library versions, device, commit; recorded beside it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.provenance.package import DISTRIBUTION
from pipeline.provenance.sources import PROJECT

LIBRARIES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "albumentations",
    "opencv-python-headless",
    "pillow",
    "pyarrow",
    "ray",
    "mlflow",
    DISTRIBUTION,
)
"""Libraries whose versions are recorded beside a result, and this package's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What a result may depend on besides its run key."""

    python: str
    platform: str
    libraries: Mapping[str, str | None]
    """Name -> version; None: not installed."""
    device: str
    """The GPU, or the machine's processor."""
    cuda: str | None
    """Version; None: no GPU was used."""
    tf32: str | None
    """The row's setting; None: no GPU was used."""
    kernels: str | None = None
    """plain or compiled (m2f.kernels.build); None: made before there was a choice."""
    deterministic: bool | None = None
    """The row's setting; None: no GPU was used, or made before there was a choice."""
    git_commit: str | None
    """None: nobody knows."""
    git_changed: bool | None
    """Whether files differed from the commit; None: nobody knows."""


def environment(*, tf32: str, kernels: str | None = None, deterministic: bool | None = None) -> Environment:
    """What a result may depend on besides its run key: versions, device, kernels, git commit (None: nobody knows).

    `tf32`, `deterministic`: the row's choices, which mean nothing without a GPU. The commit is that of the checkout, or
    what M2F_GIT_COMMIT says, as `commit_word` has it: on a cluster the code is a copy without one.
    """
    import torch

    cuda = torch.cuda.is_available()
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        libraries={name: _version(name) for name in LIBRARIES},
        device=device_name(),
        cuda=torch.version.cuda if cuda else None,
        tf32=tf32 if cuda else None,
        kernels=kernels,
        deterministic=deterministic if cuda else None,
        **_git(),
    )


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name() -> str:
    """This process's GPU, or the machine's processor."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit_word() -> str | None:
    """The checkout in one word, for M2F_GIT_COMMIT: 1f3c..., or 1f3c...-changed where files differ; None without."""
    state = _git()
    return state["git_commit"] and f"{state['git_commit']}{'-changed' if state['git_changed'] else ''}"


def committed(name: str) -> str | None:
    """The text of a file of the project as it was last committed; None: this is no checkout, or Git does not say."""
    return _ask_git("show", f"HEAD:{name}") if _in_checkout() else None


def _ask_git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


def _in_checkout() -> bool:
    """Whether this project is a checkout of its own, and no copy inside another."""
    top = _ask_git("rev-parse", "--show-toplevel")
    return top is not None and Path(top.strip()).resolve() == PROJECT


def _git() -> dict[str, Any]:
    """Commit of the project's own checkout, or of the one it was copied from, and whether files differ from it."""
    if not _in_checkout():
        commit, changed, _ = os.environ.get("M2F_GIT_COMMIT", "").partition("-changed")
        return {"git_commit": commit or None, "git_changed": bool(changed) if commit else None}
    decisive = ("m2f", "pipeline", "stages", "params.yaml", "checkpoints.yaml")
    changes = _ask_git("status", "--porcelain", "--untracked-files=no", "--", *decisive)
    head = _ask_git("rev-parse", "HEAD")
    return {
        "git_commit": None if head is None else head.strip(),
        "git_changed": None if changes is None else bool(changes.strip()),
    }
