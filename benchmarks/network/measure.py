"""Rounds of each form in turn, medians and ratios, and the file that has them all."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.network.counts import lines, table
from benchmarks.network.forms import known_forms, timed
from benchmarks.network.parts import parts
from benchmarks.network.plan import plan
from benchmarks.network.process import Apart, Here
from benchmarks.out import sole_writer
from m2f.kernels.build import use
from pipeline.compute.precision import in_precision
from pipeline.provenance.environment import device_name
from pipeline.storage.files import write_json


@dataclass(frozen=True)
class Measured:
    """One line of the table."""

    row: str
    what: str
    precision: str
    seconds: Mapping[str, float]
    """Median, by form."""
    to_huggingface: Mapping[str, float]
    """Median of each round's ratio to Hugging Face's time, by form; empty without it."""
    to_plain: float | None
    peak_mib: Mapping[str, float]
    """Of the form's process: resident memory on a CPU, allocated memory on a GPU."""
    rounds: Mapping[str, Sequence[float]]
    """Seconds of every round, by form."""
    failed: Mapping[str, str]
    """Forms that cannot do this, and what they said."""


def measure(
    what: str,
    row: str,
    forms: Sequence[str],
    rounds: int,
    device: torch.device,
    precision: str,
    until: float,
    *,
    start: Callable[..., Here | Apart] = Apart,
) -> Measured:
    """Rounds in turn after one of each form that does not count, and the memory of each. No round but the first begins
    after `until`, a time.monotonic(). `start`: what makes rounds of a form."""
    running = {form: start(what, form, row, device, precision) for form in forms}
    failed: dict[str, str] = {}
    peak: dict[str, float] = {}
    times: dict[str, list[float]] = {form: [] for form in forms}

    def asked(form: str, question: Callable[[], float]) -> float | None:
        try:
            return question()
        except RuntimeError as error:
            failed[form] = str(error).splitlines()[0]
            del times[form]  # its medians and ratios would be of fewer rounds
            return None

    try:
        for form in forms:
            asked(form, running[form].round)
        for number in range(rounds):
            if number and time.monotonic() > until:
                break
            able = list(times)
            shift = number % max(1, len(able))
            for form in [*able[shift:], *able[:shift]]:
                if (seconds := asked(form, running[form].round)) is not None:
                    times[form].append(seconds)
        for form in list(times):
            if (mib := asked(form, running[form].end)) is not None:
                peak[form] = mib
    finally:
        for each in running.values():
            if isinstance(each, Apart):
                each.kill()

    def ratio(form: str, to: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[form], times[to], strict=True)), 3)

    return Measured(
        row=row,
        what=what,
        precision=precision,
        seconds={form: round(statistics.median(values), 4) for form, values in times.items()},
        to_huggingface={form: ratio(form, "huggingface") for form in times if form != "huggingface"}
        if "huggingface" in times
        else {},
        to_plain=ratio("ours", "plain") if {"ours", "plain"} <= set(times) else None,
        peak_mib=peak,
        rounds={form: [round(value, 4) for value in values] for form, values in times.items()},
        failed=failed,
    )


def machine_gflops(device: torch.device, precision: str) -> dict[str, float]:
    """What the device makes of the two operations that most of the work is, in 10^9 operations a second: products of
    2048 x 2048 matrices (8192 x 8192 on a GPU), and 3 x 3 convolutions of 256 channels on 128 x 128 pixels."""
    side, images = (8192, 16) if device.type == "cuda" else (2048, 1)
    matrix = torch.randn(side, side, device=device)
    image, weight = torch.randn(images, 256, 128, 128, device=device), torch.randn(256, 256, 3, 3, device=device)
    found = {}
    with torch.inference_mode(), in_precision(precision, device):
        for name, call, operations in (
            ("matrix products", lambda: matrix @ matrix, 2 * side**3),
            ("convolutions", lambda: nn.functional.conv2d(image, weight, padding=1), images * 2**15 * 256 * 256 * 9),
        ):
            timed("huggingface", call, device)
            seconds = statistics.median(timed("huggingface", call, device) for _ in range(9))
            found[name] = round(operations / seconds / 1e9, 1)
    return found


def line(measured: Measured) -> str:
    """A measurement for the terminal."""
    times = ", ".join(f"{form} {seconds:.3f} s" for form, seconds in measured.seconds.items())
    ratios = ", ".join(f"{form} {ratio:.2f}" for form, ratio in measured.to_huggingface.items())
    memory = ", ".join(f"{form} {mib:,.0f}" for form, mib in measured.peak_mib.items())
    to = f"; of Hugging Face's time: {ratios}" if ratios else ""
    plain = f"; ours of plain: {measured.to_plain:.2f}" if measured.to_plain is not None else ""
    failed = "".join(f"; {form} failed: {why}" for form, why in measured.failed.items())
    return f"{measured.row} {measured.what}, {measured.precision}: {times}{to}{plain}; peak MiB: {memory}{failed}"


def parts_line(found: Mapping[str, Any]) -> str:
    """A step by part, for the terminal."""
    each = (
        f"{name} {part['seconds']:.3f} s"
        + (f" ({part['share_of_limit']:.0%} of the limit)" if part["share_of_limit"] else "")
        for name, part in found["parts"].items()
    )
    counts = ", ".join(f"{count} {name}" for name, count in found["profiler"].items() if name != "attention")
    bits = found["same_bits"]
    equal = "equal bit for bit" if not bits["parameters that differ"] else f"{bits['parameters that differ']} differ"
    seen = f"; {counts}" if counts else ""
    return f"{found['row']} by part, {found['precision']}: {', '.join(each)}{seen}; parameters of two steps: {equal}"


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    """Measure, and write after each."""
    end = time.monotonic() + arguments.limit_s
    forms = known_forms(arguments.forms)
    only_counts = set(arguments.only) == {"counts"}
    gflops = {} if only_counts else {each: machine_gflops(device, each) for each in arguments.precision}
    found: dict[str, Any] = {
        "device": device_name() if device.type == "cuda" else f"{device_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": use("auto", device=device.type),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32},
        "limit_s": None if math.isinf(arguments.limit_s) else arguments.limit_s,
        "gflops": gflops,
    }
    print(json.dumps(found))
    planned = plan(arguments)
    found |= {
        "counts": {},
        "measured": [],
        "parts": [],
        "published": [],
        "left": [" ".join(filter(None, each)) for each in planned],
    }
    with sole_writer(arguments.out, found):
        for number, (row, what, precision) in enumerate(planned):
            left = planned[number:]
            shares = len(left) + 12 * (left[-1][1] == "published")
            until = time.monotonic() + (end - time.monotonic()) / shares
            if what == "published":
                from benchmarks.network.rows import beside_published

                for each in beside_published(end):
                    found["published"].append(each)
                    print(json.dumps(each), flush=True)
                    write_json(arguments.out, found)
            elif what == "counts":
                found["counts"][row] = table(row, arguments.batch)
                print("\n".join(lines(row, arguments.batch, found["counts"][row])), flush=True)
            elif what == "parts":
                limit = max(gflops[precision].values())
                found["parts"].append(parts(row, arguments.batch, device, precision, limit, arguments.rounds, until))
                print(parts_line(found["parts"][-1]), flush=True)
            else:
                measured = measure(what, row, forms, arguments.rounds, device, precision, until)
                found["measured"].append(asdict(measured))
                print(line(measured), flush=True)
            del found["left"][0]
            write_json(arguments.out, found)
