"""This project's network beside Hugging Face's Mask2Former (transformers) and beside its own plain form, in one run.

    python -m benchmarks.network --device cpu --out network.json
    python -m benchmarks.network --device cpu --rows r50 --rounds 7 --out network.json

Three forms of one network, with random weights: "ours" (kernels auto), "plain" (PyTorch's operations) and
"huggingface", where transformers is installed (pip install transformers; nothing else here needs it). Measured are
inference of one image up to its label map, by the same function for all, and a training step of the published recipe:
forward, matching, losses with 12,544 points, backward, clipping and AdamW. Rounds are interleaved, so that a machine
that slows down does so for all; times are medians, and ratios are medians of each round's ratio. Peak memory is that
of a process of its own. The file is written after each measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from m2f import Target, build_model
from m2f.config import BackboneConfig, Kernels, LossConfig, ModelConfig
from m2f.inference import semantic_labels
from m2f.kernels.build import use
from m2f.losses import set_losses
from m2f.types import Prediction
from pipeline.provenance.environment import device_name
from pipeline.storage.files import write_json

CLASSES, QUERIES, MASKS, POINTS = 150, 100, 10, 12_544
"""ADE20K's classes, and about the true masks of its images (10.5 classes on average)."""

ROWS: Mapping[str, BackboneConfig] = {"r50": BackboneConfig(name="r50"), "swin-t": BackboneConfig(name="swin-t")}
"""Backbones that both have. Drop path is off: both would drop other images."""

FORMS: Mapping[str, Kernels | None] = {"ours": "auto", "plain": "plain", "huggingface": None}
"""Kernels of this project's forms; None: transformers."""

SIZES = ((512, 512), (640, 640), (1024, 2048))
"""(height, width) of the images at which inference is measured."""

CROP = (512, 512)
LR, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.05, 0.01

Form = Literal["ours", "plain", "huggingface"]


@dataclass(frozen=True)
class Measured:
    """One line of the table."""

    row: str
    what: str
    seconds: Mapping[str, float]
    """Median, by form."""
    to_huggingface: Mapping[str, float]
    """Median of each round's ratio to Hugging Face's time, by form; empty without it."""
    to_plain: float | None
    peak_mib: Mapping[str, float]
    """Of a process that does this once, by form: resident memory on a CPU, allocated memory on a GPU."""
    rounds: Mapping[str, Sequence[float]]
    """Seconds of every round, by form."""


# The forms


def our_network(row: str) -> nn.Module:
    """This project's network."""
    loss = LossConfig(points=POINTS)
    return build_model(ModelConfig(num_classes=CLASSES, backbone=ROWS[row], loss=loss))


def huggingface_network(row: str) -> nn.Module:
    """Hugging Face's network of the same sizes. ImportError without transformers."""
    from transformers import (  # type: ignore[import-not-found,unused-ignore]
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        ResNetConfig,
        SwinConfig,
    )

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ResNetConfig(out_features=stages)
    if row == "swin-t":
        backbone = SwinConfig(depths=[2, 2, 6, 2], drop_path_rate=0.0, out_features=stages)
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=CLASSES, num_queries=QUERIES, train_num_points=POINTS, dropout=0.0
    )
    return Mask2FormerForUniversalSegmentation(config)


def build(form: str, row: str, device: torch.device) -> nn.Module:
    """A network of a form; the same weights in every run."""
    torch.manual_seed(0)
    network = huggingface_network(row) if FORMS[form] is None else our_network(row)
    return network.to(device)


def predicted(form: str, network: nn.Module, images: Tensor) -> Prediction:
    """What inference needs of a forward pass."""
    if FORMS[form] is not None:
        prediction: Prediction = network(images, auxiliary=False)
        return prediction
    output = network(pixel_values=images, output_auxiliary_logits=False)
    return Prediction(output.class_queries_logits, output.masks_queries_logits)


def inference(form: str, row: str, size: tuple[int, int], device: torch.device) -> Callable[[], object]:
    """A call that makes one image's label map."""
    network = build(form, row, device).eval()
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).to(device)

    @torch.inference_mode()
    def call() -> Tensor:
        return semantic_labels(predicted(form, network, images), size)

    return call


def training(form: str, row: str, batch: int, device: torch.device) -> Callable[[], object]:
    """A call that makes one training step."""
    network = build(form, row, device).train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, *CROP, generator=generator).to(device)
    blocks = torch.randint(0, MASKS, (batch, 8, 8), generator=generator)
    segments = blocks.repeat_interleave(CROP[0] // 8, 1).repeat_interleave(CROP[1] // 8, 2).to(device)
    labels = torch.arange(MASKS, device=device)

    def loss() -> Tensor:
        if FORMS[form] is None:
            masks = [(segments_HW == labels[:, None, None]).float() for segments_HW in segments]
            found: Tensor = network(pixel_values=images, mask_labels=masks, class_labels=[labels] * batch).loss
            return found
        targets = [Target.from_segments(labels, segments_HW) for segments_HW in segments]
        config = network.config.loss
        assert isinstance(config, LossConfig)
        losses = set_losses(
            network(images, seeds=range(batch)),
            targets,
            num_masks=float(MASKS * batch),
            config=config,
            seeds=range(batch),
        )
        return torch.stack(list(losses.values())).sum()

    def call() -> None:
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()

    return call


def calls(what: str, forms: Sequence[str], row: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is measured, by form: "inference 512 x 512" or "training step of 2 images"."""
    words = what.split()
    if words[0] == "inference":
        return {form: inference(form, row, (int(words[1]), int(words[3])), device) for form in forms}
    return {form: training(form, row, int(words[3]), device) for form in forms}


# Measuring


def timed(form: str, call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with the form's kernels."""
    if (kernels := FORMS[form]) is not None:
        use(kernels)
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(what: str, row: str, forms: Sequence[str], rounds: int, device: torch.device) -> Measured:
    """Interleaved rounds after one of each form that does not count, and the memory of each in its own process."""
    called = calls(what, forms, row, device)
    times: dict[str, list[float]] = {form: [] for form in forms}
    for round_ in range(rounds + 1):
        for form in forms[round_ % len(forms) :] + forms[: round_ % len(forms)]:
            seconds = timed(form, called[form], device)
            if round_:
                times[form].append(seconds)
    del called
    peak = {form: peak_mib(what, row, form, device) for form in forms}

    def ratio(form: str, to: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[form], times[to], strict=True)), 3)

    return Measured(
        row=row,
        what=what,
        seconds={form: round(statistics.median(values), 4) for form, values in times.items()},
        to_huggingface={form: ratio(form, "huggingface") for form in forms if form != "huggingface"}
        if "huggingface" in forms
        else {},
        to_plain=ratio("ours", "plain") if {"ours", "plain"} <= set(forms) else None,
        peak_mib=peak,
        rounds={form: [round(value, 4) for value in values] for form, values in times.items()},
    )


def peak_mib(what: str, row: str, form: str, device: torch.device) -> float:
    """Memory of a process that does it twice, MiB."""
    command = [sys.executable, "-m", "benchmarks.network", "--device", device.type, "--memory", what, form, row]
    threads = ["--threads", str(torch.get_num_threads())]
    done = subprocess.run([*command, *threads], capture_output=True, text=True, check=True, timeout=3600)
    return float(done.stdout.split()[-1])


def own_peak_mib(what: str, form: str, row: str, device: torch.device) -> float:
    """The same for this process."""
    call = calls(what, [form], row, device)[form]
    for _ in range(2):
        timed(form, call, device)
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def machine_gflops(device: torch.device) -> dict[str, float]:
    """What the device makes of the two operations that most of the work is, in 10^9 operations a second: products of
    2048 x 2048 matrices, and 3 x 3 convolutions of 256 channels on 128 x 128 pixels, float32."""
    matrix = torch.randn(2048, 2048, device=device)
    image, weight = torch.randn(1, 256, 128, 128, device=device), torch.randn(256, 256, 3, 3, device=device)
    found = {}
    for name, call, operations in (
        ("matrix products", lambda: matrix @ matrix, 2 * 2048**3),
        ("convolutions", lambda: nn.functional.conv2d(image, weight, padding=1), 2 * 128 * 128 * 256 * 256 * 9),
    ):
        seconds = statistics.median(timed("huggingface", call, device) for _ in range(9))
        found[name] = round(operations / seconds / 1e9, 1)
    return found


def known_forms() -> list[str]:
    """The forms that can be measured here."""
    try:
        import transformers  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        print("transformers is not installed: Hugging Face's network is left out", file=sys.stderr)
        return [form for form in FORMS if form != "huggingface"]
    return list(FORMS)


def line(measured: Measured) -> str:
    """A measurement for the terminal."""
    times = ", ".join(f"{form} {seconds:.3f} s" for form, seconds in measured.seconds.items())
    ratios = ", ".join(f"{form} {ratio:.2f}" for form, ratio in measured.to_huggingface.items())
    memory = ", ".join(f"{form} {mib:,.0f}" for form, mib in measured.peak_mib.items())
    to = f"; of Hugging Face's time: {ratios}" if ratios else ""
    plain = f"; ours of plain: {measured.to_plain:.2f}" if measured.to_plain is not None else ""
    return f"{measured.row} {measured.what}: {times}{to}{plain}; peak MiB: {memory}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=2, help="images of a training step (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU (default: its own choice)")
    parser.add_argument("--only", choices=("inference", "training"), help="default: both")
    parser.add_argument("--out", type=Path, default=Path("network.json"), help="default: %(default)s")
    parser.add_argument("--memory", nargs=3, metavar=("WHAT", "FORM", "ROW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(own_peak_mib(*arguments.memory, device))
        return
    if arguments.rounds < 1 or arguments.batch < 1:
        sys.exit("error: --rounds and --batch must be at least 1")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here that PyTorch can use; take --device cpu")
    sizes = [f"inference {height} x {width}" for height, width in SIZES]
    whats = [*sizes, f"training step of {arguments.batch} images"]
    whats = [what for what in whats if arguments.only is None or what.startswith(arguments.only)]
    forms, measured = known_forms(), []
    facts: dict[str, Any] = {
        "device": device_name() if device.type == "cuda" else f"{device_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": use("auto"),
        "gflops": machine_gflops(device),
    }
    print(json.dumps(facts))
    for row in arguments.rows:
        for what in whats:
            measured.append(measure(what, row, forms, arguments.rounds, device))
            print(line(measured[-1]), flush=True)
            write_json(arguments.out, {**facts, "measured": [asdict(each) for each in measured]})


if __name__ == "__main__":
    main()
