"""A training step of this project's network by part: time, launches, synchronisations, and the share of the limit.

Launches and synchronisations are PyTorch's profiler's on a GPU. Without one, benchmarks.network.counts counts them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.network.counts import counted
from benchmarks.network.step import PARTS, Step, without_second_matching

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
    return {name: round(value, 5) for name, value in without_second_matching(medians).items()}


# What the profiler sees


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
