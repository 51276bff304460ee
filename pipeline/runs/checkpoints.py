"""Checkpoints of a run: whole or not at all, read without running code, newest and best kept.

One safetensors file per checkpoint: `model.<name>`, `optimizer.<state>.<name>`, and in its header the
run key, the step and what the loop wants back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.storage.files import local_file, sha256, whole_file
from pipeline.storage.stores import StoredPath, store_of

_NAME = "step-{:08d}.safetensors"
_STATES = ("exp_avg", "exp_avg_sq", "step")


def checkpoint_path(run_dir: StoredPath, step: int) -> StoredPath:
    """Where the checkpoint made after `step` finished steps lies."""
    return run_dir / "checkpoints" / _NAME.format(step)


def step_of(path: StoredPath) -> int:
    """Finished steps of a checkpoint, from its name."""
    return int(path.stem.split("-")[1])


def save_checkpoint(
    run_dir: StoredPath,
    *,
    step: int,
    run_key: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> StoredPath:
    """Write the checkpoint of `step` finished steps. `state`: JSON values that `load_checkpoint` gives back."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return _save(run_dir, step, run_key, tensors, state)


def save_model(run_dir: StoredPath, *, step: int, run_key: str, tensors: Mapping[str, Tensor]) -> StoredPath:
    """Write a checkpoint of weights alone, to be evaluated; `tensors` by the model's names."""
    return _save(run_dir, step, run_key, {f"model.{name}": value for name, value in tensors.items()}, {})


def _save(
    run_dir: StoredPath, step: int, run_key: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> StoredPath:
    from safetensors.torch import save_file

    header = {"run_key": run_key, "step": str(step), "state": json.dumps(dict(state))}
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    path = checkpoint_path(run_dir, step)
    with whole_file(path) as partial:
        save_file(copies, partial, metadata=header)
    return path


def keep_only(run_dir: StoredPath, steps: set[int]) -> None:
    """Delete all checkpoints but those of `steps`, and halves that a killed process has left."""
    for step, path in _all(run_dir):
        if step not in steps:
            path.unlink(missing_ok=True)
    store_of(run_dir / "checkpoints").delete_partial_files()  # nobody else writes here


def newest_checkpoint(run_dir: StoredPath) -> StoredPath | None:
    """The newest checkpoint that can be read; a damaged one is set aside with a line on stderr."""
    for _, path in sorted(_all(run_dir), reverse=True):
        try:
            read_header(path)
            return path
        except ValueError as error:
            aside = f"{path.stem}.damaged"
            store_of(path).rename(aside)
            print(f"{error}; set aside as {aside}, going on from the one before", file=sys.stderr)
    return None


def set_aside_without_best(run_dir: StoredPath) -> None:
    """Set checkpoints aside, with a line on stderr, whose state names a best one that is gone or damaged: a run that
    went on from them could not finish, for it names its best checkpoint in the end."""
    for step, path in sorted(_all(run_dir), reverse=True):
        try:
            best = (read_header(path)["state"].get("best") or {}).get("step", step)
        except ValueError:  # newest_checkpoint says it
            continue
        try:
            if best != step:
                read_header(checkpoint_path(run_dir, best))
        except ValueError as error:
            aside = f"{path.stem}.damaged"
            store_of(path).rename(aside)
            print(f"{error}; {path.name}, whose best one it is, is set aside as {aside}", file=sys.stderr)


def read_header(path: StoredPath) -> dict[str, Any]:
    """run_key, step and state of a checkpoint; ValueError when the file is not whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:  # as safetensors lays it out; the tensors themselves may be gigabytes away
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("its header is longer than the file")
            entries = json.loads(file.read(length))
        header = entries.pop("__metadata__")
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if size != end:
            raise ValueError(f"it is {size:,} bytes long instead of {end:,}")
        return {"run_key": header["run_key"], "step": int(header["step"]), "state": json.loads(header["state"])}
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error})") from None


def check_digest(path: StoredPath, digest: str, *, row: str) -> None:
    """ValueError unless a checkpoint is the one that a row's training wrote, by its SHA-256."""
    with local_file(path, digest) as file:
        if sha256(file) != digest:
            raise ValueError(
                f"checkpoint {path} is not the one train@{row} wrote (its digest differs); "
                f"delete its run folder and run dvc repro -f train@{row}"
            )


def load_checkpoint(
    path: StoredPath,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    run_key: str | None = None,
    digest: str | None = None,
) -> dict[str, Any]:
    """Put a checkpoint into the model (and the optimiser); returns its header.

    digest: its SHA-256, if known. ValueError when it belongs to another run (`run_key`) or another network.
    """
    with local_file(path, digest) as file:
        return _load(path, file, model, optimizer, run_key)


def _load(
    path: StoredPath, file: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, run_key: str | None
) -> dict[str, Any]:
    from safetensors.torch import load_file

    header = read_header(file)
    if run_key is not None and header["run_key"] != run_key:
        raise ValueError(
            f"checkpoint {path} belongs to run {header['run_key']}, not to {run_key}; its settings, data or code differ"
        )
    tensors = load_file(file)
    weights = {name[len("model.") :]: value for name, value in tensors.items() if name.startswith("model.")}
    own = model.state_dict()
    unfit = [
        n for n in own.keys() | weights.keys() if n not in own or n not in weights or own[n].shape != weights[n].shape
    ]
    if unfit:
        raise ValueError(f"checkpoint {path} belongs to another model: {len(unfit)} entries differ, first {min(unfit)}")
    model.load_state_dict(weights)
    if optimizer is not None:
        _load_optimizer(optimizer, model, tensors)
    return header


def _load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    saved = optimizer.state_dict()
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved["state"] = {
        index: {key: _laid_out_as(parameter, tensors[f"optimizer.{key}.{names[parameter]}"]) for key in _STATES}
        for index, parameter in enumerate(ordered)
        if f"optimizer.step.{names[parameter]}" in tensors
    }
    optimizer.load_state_dict(saved)


def _laid_out_as(parameter: Tensor, state: Tensor) -> Tensor:
    """A parameter's state with its strides: a file has none, and the fused optimiser goes through both in the order of
    their memory."""
    if state.shape != parameter.shape or state.stride() == parameter.stride():
        return state
    return torch.empty_like(parameter).copy_(state)


def _all(run_dir: StoredPath) -> list[tuple[int, StoredPath]]:
    folder = run_dir / "checkpoints"
    return [(step_of(path), path) for path in folder.glob("step-*.safetensors")]
