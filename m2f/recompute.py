"""Results that are cheap to make again are not kept for the backward pass.

Autograd keeps each tensor that a backward pass reads. To make a norm, an activation or a sum again takes little time
beside the convolution or matrix product that reads it, and its input is mostly kept anyway. The bits are the same,
since the same operation is made with the same numbers.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_Make = Callable[..., Tensor]


class _Recipe:
    """How to make one tensor again. What was made stays until everybody who asked for the tensor has it."""

    def __init__(self, make: _Make, inputs: tuple[_Kept, ...]) -> None:
        self._make, self._inputs = make, inputs
        self._asking = 0
        self._made: Tensor | None = None

    def promise(self, shape: torch.Size) -> _Promise:
        """For somebody who will ask once more."""
        self._asking += 1
        return _Promise(self, shape)

    def tensor(self) -> Tensor:
        """The tensor, without gradient."""
        made = self._made
        if made is None:
            with torch.no_grad():
                made = self._make(*(_unpacked(x) for x in self._inputs))
        self._asking -= 1
        self._made = made if self._asking > 0 else None
        return made


class _Promise(NamedTuple):
    """What autograd keeps instead of a tensor."""

    recipe: _Recipe
    shape: torch.Size


_Kept = Tensor | _Promise


@dataclass
class _Slot:
    """What autograd holds: an activation keeps its own result before anybody can say that it is cheap."""

    kept: _Kept


@dataclass
class _Marks:
    recipes: dict[int, tuple[weakref.ref[Tensor], _Recipe]] = field(default_factory=dict)
    """Of marked tensors, by address."""
    slots: list[_Slot] = field(default_factory=list)
    """Of tensors kept since the last marked one was begun."""


_marks: ContextVar[_Marks | None] = ContextVar("marks", default=None)


@contextlib.contextmanager
def recomputing(enabled: bool) -> Iterator[None]:
    """Inside, if `enabled`, autograd does not keep what `cheap` makes."""
    if not enabled or not torch.is_grad_enabled():
        yield
        return
    token = _marks.set(_Marks())
    try:
        with torch.autograd.graph.saved_tensors_hooks(_slot, lambda slot: _unpacked(slot.kept)):
            yield
    finally:
        _marks.reset(token)


def cheap(make: _Make, *inputs: Tensor, again: _Make | None = None) -> Tensor:
    """make(*inputs), which inside `recomputing` is not kept but made again from the inputs when it is needed.

    `again`: what to call the second time, if not `make`: the same numbers without its effects. Nobody may change the
    result or the inputs in place.
    """
    marks = None if torch.compiler.is_compiling() else _marks.get()
    if marks is None:
        return make(*inputs)
    marks.slots.clear()
    result = make(*inputs)
    if result.requires_grad and result.is_contiguous():
        recipe = _Recipe(again or make, tuple(_packed(x.detach(), marks) for x in inputs))
        marks.recipes[result.data_ptr()] = (weakref.ref(result), recipe)
        for slot in marks.slots:
            if isinstance(slot.kept, Tensor):
                slot.kept = _packed(slot.kept, marks)
    marks.slots.clear()
    return result


def checkpointed(module: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """module(*inputs), of which only the inputs are kept: the backward pass makes all else again, with the same bits.

    The module draws nothing and has no state that it changes.
    """
    outside = None if torch.compiler.is_compiling() else _marks.get()
    if outside is not None:  # recipes would keep what is inside the module
        _marks.set(_Marks())
    try:
        result: Tensor = checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
    finally:
        if outside is not None:
            _marks.set(outside)
    return result


def _slot(tensor: Tensor) -> _Slot:
    marks = _marks.get()
    assert marks is not None
    slot = _Slot(_packed(tensor, marks))
    marks.slots.append(slot)
    return slot


def _packed(tensor: Tensor, marks: _Marks) -> _Kept:
    """What to keep of a tensor: itself, or a promise where it was marked and still lives (memory is used again)."""
    if (entry := marks.recipes.get(tensor.data_ptr())) is None:
        return tensor
    alive, recipe = entry[0](), entry[1]
    if alive is None or alive.numel() != tensor.numel() or not tensor.is_contiguous():
        return tensor
    return recipe.promise(tensor.shape)


def _unpacked(kept: _Kept) -> Tensor:
    return kept.recipe.tensor().view(kept.shape) if isinstance(kept, _Promise) else kept
