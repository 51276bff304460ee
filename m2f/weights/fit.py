"""Whether a state dict is that of a row's network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from m2f.config import ModelConfig
from m2f.model import build_model


def entries(config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of a row's network, without values."""
    with torch.device("meta"):
        return build_model(config).state_dict()


def check_fit(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError unless names and shapes are the same."""
    wrong = [
        f"{name} is {tuple(given[name].shape)}, wanted {tuple(meta.shape)}"
        for name, meta in wanted.items()
        if name in given and given[name].shape != meta.shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", [name for name in wanted if name not in given]),
            ("unexpected", [name for name in given if name not in wanted]),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit this model: {'; '.join(problems)}")


def check_values(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError where weights are nan, infinite, too large for float32, or whole numbers."""
    for name, meta in wanted.items():
        tensor = given[name]
        if is_counter(meta) or tensor.is_meta:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, which no weights are; save it in floating point")
        if wrong := int((~tensor.float().isfinite()).sum()):
            raise ValueError(f"{name} has {wrong} values that are nan or infinite; take an earlier checkpoint")


def with_counters(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with zeros for the integer counters that it lacks."""
    counters = {name: torch.zeros(meta.shape, dtype=meta.dtype) for name, meta in wanted.items() if is_counter(meta)}
    return counters | dict(given)


def pieces(tensor: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """A tensor as equal parts of its first axis, one for each name."""
    return dict(zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True))


def is_counter(meta: Tensor) -> bool:
    """Whether an entry counts something and decides nothing: batches that batch norm has seen."""
    return not meta.is_floating_point()


def shown(names: list[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
