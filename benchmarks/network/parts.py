"""A training step of this project's network by part: time, launches, synchronisations, and the share of the limit.

Launches and synchronisations are PyTorch's profiler's on a GPU. Without one, `counted` counts the operations of a step
on tensors without memory (the meta device), which take a GPU's way through the code: each is a launch or more there.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.network.forms import CLIP_NORM, LR, MASKS, WEIGHT_DECAY, Batch, in_precision, our_network
from m2f.losses import set_losses
from m2f.matcher import match

PARTS = ("backbone", "pixel decoder", "query decoder", "matching", "losses", "backward", "optimiser")
"""In this order; they are a step."""

Part = Callable[[str], Any]
"""A context for the name of a part."""


class Step:
    """This project's network with its optimiser and a batch, and a step whose parts can be watched."""

    def __init__(self, row: str, batch: int, device: torch.device, precision: str) -> None:
        torch.manual_seed(0)
        self.network = our_network(row).to(device).train()
        self.trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.device, self.precision = device, precision
        self.batch, self.seeds = Batch.of(batch, device), range(batch)
        self.optimizer: torch.optim.Optimizer | None = None
        if device.type != "meta":  # fused AdamW needs memory
            self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def run(self, part: Part) -> Tensor:
        """One step, its loss. The losses match once more: what "matching" costs counts into "losses" too."""
        network, images, targets, seeds = self.network, self.batch.images, self.batch.targets, self.seeds
        config = network.config.loss
        self.network.zero_grad()
        with in_precision(self.precision, self.device):
            with part("backbone"):
                maps = network.backbone(images, seeds)
            with part("pixel decoder"):
                features, levels = network.pixel_decoder(maps)
            with part("query decoder"):
                prediction = network.query_decoder(features, levels, auxiliary=True)
            with part("matching"):
                match((*prediction.auxiliary, prediction), targets, config=config, seeds=seeds)
            with part("losses"):
                losses = set_losses(
                    prediction, targets, num_masks=float(MASKS * len(images)), config=config, seeds=seeds
                )
                total = torch.stack(list(losses.values())).sum()
        with part("backward"):
            total.backward()
        if self.optimizer is not None:
            with part("optimiser"):
                nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
                self.optimizer.step()
        return total.detach()


def _without_second_matching(values: dict[str, Any]) -> dict[str, Any]:
    values["losses"] = type(values["losses"])(values["losses"] - values["matching"])
    return values


# Time


def seconds_by_part(step: Step, rounds: int, until: float) -> dict[str, float]:
    """Medians over rounds after one that does not count; no more rounds begin after `until`, a time.monotonic()."""
    taken: dict[str, list[float]] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        if step.device.type == "cuda":
            torch.cuda.synchronize()
        taken.setdefault(name, []).append(time.perf_counter() - begun)

    step.run(part)
    if step.device.type == "cuda":
        torch.cuda.synchronize()
    taken.clear()
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        step.run(part)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {name: round(value, 5) for name, value in _without_second_matching(medians).items()}


# Counts


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
        made = any(isinstance(x, Tensor) and x.is_meta for x in _flat(result))
        if made and tensors and not given:
            self.counts["copies from the host"] += 1
        elif (made or given) and not func.is_view and not func.name().startswith(_NOTHING_TO_DO):
            self.counts["operations"] += 1
        return result


_NOTHING_TO_DO = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::_reshape_alias")
"""Operations without a launch, besides views."""


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
    """Of convolutions, matrix products and attention, a multiplication and an addition as 2."""


def counted(row: str, batch: int) -> dict[str, Counted]:
    """Counts by part in float32, without computing anything; without the optimiser, which is one operation or two."""
    step = Step(row, batch, torch.device("meta"), "float32")
    found: dict[str, dict[str, int]] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as flops, Operations() as operations:
            yield
        found[name] = {**operations.counts, "flops": int(flops.get_total_flops())}

    step.run(part)
    names = ("operations", "copies from the host", "copies to the host", "flops")
    by_name = [_without_second_matching({part: found[part].get(name, 0) for part in found}) for name in names]
    return {part: Counted(*(values[part] for values in by_name)) for part in found}


def profiled(step: Step) -> dict[str, Any]:
    """What the profiler saw of one step: on a GPU launches, synchronisations and copies; how attention was computed."""
    cuda = step.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step.run(lambda _: _nothing())
    counts = {event.key: event.count for event in profile.key_averages()}
    return seen(counts, cuda=cuda)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def seen(counts: Mapping[str, int], *, cuda: bool) -> dict[str, Any]:
    """The figures of the profiler's events, counted by name. The matching is in them twice."""

    def total(*parts: str) -> int:
        return sum(count for key, count in counts.items() if any(part in key for part in parts))

    attention = {key.removeprefix("aten::"): count for key, count in counts.items() if key.startswith(_ATTENTION)}
    if not cuda:
        return {"attention": attention}
    return {
        "launches": total("LaunchKernel"),
        "stream synchronisations": total("cudaStreamSynchronize", "cudaEventSynchronize"),
        "device synchronisations": total("cudaDeviceSynchronize"),
        "copies to the host": total("Memcpy DtoH"),
        "copies from memory that is not pinned": total("Pageable -> Device"),
        "attention": attention,
    }


_ATTENTION = (
    "aten::_scaled_dot_product_flash",
    "aten::_scaled_dot_product_efficient",
    "aten::_scaled_dot_product_cudnn",
    "aten::_scaled_dot_product_attention_math",
)


def same_bits(row: str, batch: int, device: torch.device, precision: str) -> dict[str, Any]:
    """Two networks of one seed after one step each: whether losses and parameters are equal bit for bit."""
    losses, states = [], []
    for _ in range(2):
        step = Step(row, batch, device, precision)
        losses.append(step.run(lambda _: _nothing()).item())
        states.append({name: tensor.cpu() for name, tensor in step.network.state_dict().items()})
    different = [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]
    return {"loss": losses[0] == losses[1], "parameters that differ": len(different), "of": len(states[0])}


# Together


def parts(row: str, batch: int, device: torch.device, precision: str, gflops: float, rounds: int, until: float) -> Any:
    """All of the above for a row; `gflops`: the device's measured limit in this precision, 10^9 operations a second."""
    count = counted(row, batch)
    step = Step(row, batch, device, precision)
    seconds = seconds_by_part(step, rounds, until)
    by_part = {
        name: {
            "seconds": seconds[name],
            "share_of_limit": round(count[name].flops / seconds[name] / 1e9 / gflops, 3) if name in count else None,
            **(vars(count[name]) if name in count else {}),
        }
        for name in PARTS
    }
    return {
        "row": row,
        "batch": batch,
        "precision": precision,
        "parts": by_part,
        "profiler": profiled(step),
        "same_bits": same_bits(row, batch, device, precision),
    }
