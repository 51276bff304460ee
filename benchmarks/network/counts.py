"""What a training step asks of a GPU, counted without one: operations, copies, products and memory, by part.

Tensors of the meta device have no memory, and take a GPU's way through the code. Each operation is a launch or more
there. Attention counts as the memory-efficient kernel, which PyTorch chooses on a GPU for float32 and any mask.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.network.forms import CROP, our_network
from benchmarks.network.step import Step, without_second_matching
from m2f.kernels import gpu

_MIB = 2**20

_NOTHING_TO_DO = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::_reshape_alias")
"""Operations without a launch, besides views."""


class Operations(TorchDispatchMode):
    """Counts what a device would be asked to do: operations on its tensors, copies from the host and to it.

    A tensor of the meta device becomes zeros where it is copied to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        tensors = [x for x in _flat((args, kwargs)) if isinstance(x, Tensor)]
        given = any(tensor.is_meta for tensor in tensors)
        if func is torch.ops.aten._to_copy.default and device is not None and given and device.type == "cpu":
            self.counts["copies to the host"] += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        made = [x for x in _flat(result) if isinstance(x, Tensor) and x.is_meta]
        self.note_memory(made)
        if made and tensors and not given:
            self.counts["copies from the host"] += 1
        elif (made or given) and not func.is_view and not func.name().startswith(_NOTHING_TO_DO):
            self.counts["operations"] += 1
        return result

    def note_memory(self, made: Sequence[Tensor]) -> None:
        """Is told of what an operation made, which may be views of what was there."""


class Memory(Operations):
    """Counts bytes too: those that live, and the most that lived at once since `begin`."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        """`known`: tensors that were made before."""
        super().__init__()
        self._storages: dict[int, int] = {}
        self.bytes = self.peak = 0
        self.note_memory(known)

    def begin(self) -> None:
        """From here on."""
        self.peak = self.bytes
        self.counts.clear()

    def note_memory(self, made: Sequence[Tensor]) -> None:
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._released, storage._cdata)
        self.peak = max(self.peak, self.bytes)

    def _released(self, storage: int) -> None:
        self.bytes -= self._storages.pop(storage)


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, Mapping):
        values = tuple(values.values())
    if isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            yield from _flat(value)
    else:
        yield values


@dataclass(frozen=True)
class Counted:
    """What a part of a step asks of a device."""

    operations: int
    """Of PyTorch, but for views and allocations."""
    copies_from_host: int
    copies_to_host: int
    flops: int
    """Of convolutions, matrix products and attention, a multiplication and an addition as 2; not of own kernels."""
    peak_mib: int
    """The most memory that tensors take at once, parameters, gradients and images among them; without the optimiser's
    state, and without what libraries take for their work."""
    left_mib: int
    """The same at the end of the part."""


def counted(row: str, batch: int, *, kernels: bool = False) -> dict[str, Counted]:
    """Counts by part in float32, without computing anything; without the optimiser, which is one operation or two.

    `kernels`: with those of m2f.kernels.gpu, each of which is an operation; backbone and pixel decoder are not
    compiled, which a training would.
    """
    step = Step(row, batch, torch.device("meta"), "float32")
    found: dict[str, dict[str, int]] = {}
    memory = Memory([*step.network.parameters(), *step.network.buffers(), step.batch.images])

    @contextmanager
    def part(name: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as flops, memory:
            memory.begin()
            yield
        found[name] = {**memory.counts, "flops": int(flops.get_total_flops())}
        found[name] |= {"peak": memory.peak, "left": memory.bytes}

    with gpu.as_if(kernels), mock.patch.object(F, "scaled_dot_product_attention", efficient_attention):
        step.run(part)
    names = ("operations", "copies from the host", "copies to the host", "flops")
    by_name = [without_second_matching({part: found[part].get(name, 0) for part in found}) for name in names]
    return {
        part: Counted(
            *(values[part] for values in by_name),
            peak_mib=round(found[part]["peak"] / _MIB),
            left_mib=round(found[part]["left"] / _MIB),
        )
        for part in found
    }


def forward_operations(row: str, *, kernels: bool) -> int:
    """Operations of one forward pass of an evaluation in float32, on an image of CROP."""
    with torch.device("meta"):
        network, images = our_network(row).eval(), torch.empty(1, 3, *CROP)
    as_on_a_gpu = mock.patch.object(F, "scaled_dot_product_attention", efficient_attention)
    with gpu.as_if(kernels), as_on_a_gpu, torch.inference_mode(), Operations() as operations:
        network(images, auxiliary=False)
    return operations.counts["operations"]


REPLAYED = 4
"""Operations of a forward pass that is recorded: its image's copy, the recording, and copies of both results
(`m2f.inference.recorded`)."""


def efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """`scaled_dot_product_attention` as PyTorch makes it on a GPU by its memory-efficient kernel: a boolean mask
    becomes a bias, which is copied to rows of a multiple of 16 where it has none, and then spread over the heads."""
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.where(bias, 0.0, -float("inf"))
        keys = bias.shape[-1]
        bias = F.pad(bias, (0, -keys % 16))[..., :keys] if keys % 16 else bias
        bias = bias.expand(*query.shape[:2], query.shape[2], keys)
    operation = torch.ops.aten._scaled_dot_product_efficient_attention
    result: Tensor = operation(query, key, value, bias, compute_log_sumexp=True)[0]
    return result


def table(row: str, batch: int) -> dict[str, dict[str, dict[str, int]]]:
    """`counted` without and with kernels, as JSON values."""
    return {
        form: {part: dict(vars(count)) for part, count in counted(row, batch, kernels=form == "kernels").items()}
        for form in ("plain", "kernels")
    }


def lines(row: str, batch: int, found: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterator[str]:
    """A table for the terminal: plain -> kernels; and what an evaluation asks for."""
    yield f"{row}, a training step of {batch} images in float32, counted: plain -> with kernels"
    yield f"{'':16}{'operations':>18}{'copies to host':>18}{'GFLOP':>18}{'peak MiB':>18}"
    for part, plain in found["plain"].items():
        before, after = (
            (each["operations"], each["copies_to_host"], round(each["flops"] / 1e9), each["peak_mib"])
            for each in (plain, found["kernels"][part])
        )
        yield f"{part:16}" + "".join(f"{f'{a:,} -> {b:,}':>18}" for a, b in zip(before, after, strict=True))
    plain_count, count = (forward_operations(row, kernels=kernels) for kernels in (False, True))
    yield f"{row}, a forward pass of an evaluation: {plain_count} -> {count} operations, and {REPLAYED} once recorded"
