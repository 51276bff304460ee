"""Where a number came from: the run key that names a training, and the environment recorded beside it."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.params import Row
    from pipeline.results import Environment

PROJECT = Path(__file__).resolve().parent.parent
"""The folder that holds m2f/, pipeline/ and stages/."""

TRAINING_MODULES = (
    "m2f.backbones",
    "m2f.backbones.resnet",
    "m2f.backbones.swin",
    "m2f.deformable_attention",
    "m2f.draws",
    "m2f.layers",
    "m2f.losses",
    "m2f.matcher",
    "m2f.model",
    "m2f.optim",
    "m2f.pixel_decoder",
    "m2f.points",
    "m2f.query_decoder",
    "m2f.types",
    "m2f.weights",
    "pipeline.loader",
    "pipeline.pictures",
    "pipeline.precision",
    "pipeline.resizing",
    "pipeline.train_loop",
    "pipeline.transforms",
)
"""Modules whose code decides the weights a training ends with."""

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
)
"""Libraries whose versions are recorded beside a result."""


def run_key(row: Row, *, seed: int, data_digest: str, weights_sha256: str | None) -> str:
    """The name of one training, 16 hexadecimal digits: equal keys, equal experiment.

    A digest of the resolved model and train settings (defaults included, so that YAML's spelling does not
    matter), the seed, the dataset's manifest, the initial weights and the code that shapes a training. Left
    out: how often a run logs and saves, the row's name, its other seeds, its test sizes (evaluation is made
    again when they change) and its published figures.
    """
    train = dataclasses.asdict(row.train)
    for key in ("log_every", "checkpoint_interval"):
        del train[key]
    facts = {
        "task": row.task,
        "model": dataclasses.asdict(row.model),
        "train": train,
        "seed": seed,
        "data": data_digest,
        "weights": weights_sha256,
        "code": code_digest(TRAINING_MODULES),
    }
    text = json.dumps(facts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest(modules: Iterable[str], *, root: Path = PROJECT) -> str:
    """SHA-256 of the modules' syntax trees: comments, docstrings and formatting do not count.

    `modules` are dotted names below `root`; ValueError names one that has no source file.
    """
    digest = hashlib.sha256()
    for module in sorted(set(modules)):
        tree = ast.parse(source_file(module, root=root).read_text(encoding="utf-8"))
        digest.update(f"{module}\n{_dump(tree)}\n".encode())
    return digest.hexdigest()


def source_file(module: str, *, root: Path = PROJECT) -> Path:
    """The file of a dotted module name below `root`, found without importing it; ValueError if there is none."""
    path = root.joinpath(*module.split("."))
    for candidate in (path / "__init__.py", path.with_name(path.name + ".py")):
        if candidate.is_file():
            return candidate
    raise ValueError(f"module {module} has no source file under {root}; run keys need the project's sources")


def environment(*, tf32: str) -> Environment:
    """What a result may depend on besides its run key: versions, device, TF32, git commit (None: nobody knows).

    `tf32`: the row's choice, which means nothing without a GPU. The commit is that of the checkout, or what
    M2F_GIT_COMMIT says, as `commit_word` has it: on a cluster the code is a copy without one.
    """
    import torch

    from pipeline.results import Environment

    cuda = torch.cuda.is_available()
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        libraries={name: _version(name) for name in LIBRARIES},
        device=device_name(),
        cuda=torch.version.cuda if cuda else None,
        tf32=tf32 if cuda else None,
        **_git(),
    )


def _dump(node: Any) -> str:
    """A syntax tree as text that does not depend on the Python version: empty fields are left out."""
    if isinstance(node, ast.AST):
        fields = ((name, _dump(value)) for name, value in ast.iter_fields(node) if name != "kind")
        return f"{type(node).__name__}({', '.join(f'{name}={text}' for name, text in fields if text)})"
    if isinstance(node, list):
        return f"[{', '.join(_dump(item) for item in node if not _is_docstring(item))}]" if node else ""
    return "" if node is None else repr(node)


def _is_docstring(node: Any) -> bool:
    """A string that stands alone: of a module, class or function, or below a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} in a row's settings cannot be part of a run key")


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


def _git() -> dict[str, Any]:
    """Commit of the project's own checkout, or of the one it was copied from, and whether files differ from it."""

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    top = ask("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != PROJECT:
        commit, changed, _ = os.environ.get("M2F_GIT_COMMIT", "").partition("-changed")
        return {"git_commit": commit or None, "git_changed": bool(changed) if commit else None}
    changes = ask("status", "--porcelain", "--untracked-files=no", "--", "m2f", "pipeline", "stages", "params.yaml")
    return {"git_commit": ask("rev-parse", "HEAD"), "git_changed": None if changes is None else bool(changes)}
