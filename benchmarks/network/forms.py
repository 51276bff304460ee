"""The networks that `benchmarks.network` compares, and what it makes them do.

"ours" and "plain" are this project's network with its kernels and without, "huggingface" is Hugging Face's Mask2Former
of the same sizes (transformers). All have random weights.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.network.plan import FORMS, ROWS
from m2f import Target, build_model
from m2f.config import BackboneConfig, Kernels, LossConfig, ModelConfig
from m2f.inference import semantic_labels
from m2f.inference.recorded import RecordedNetwork
from m2f.kernels.build import use
from m2f.losses import set_losses
from m2f.types import Prediction
from pipeline.compute.precision import in_precision

CLASSES, QUERIES, MASKS, POINTS = 150, 100, 10, 12_544
"""ADE20K's classes, and about the true masks of its images (10.5 classes on average)."""

BACKBONES: Mapping[str, BackboneConfig] = {row: BackboneConfig(name=row) for row in ROWS}
"""Drop path is off: both implementations would drop other images."""

KERNELS: Mapping[str, Kernels | None] = dict(zip(FORMS, ("auto", "plain", None), strict=True))
"""Of this project's forms; None: transformers."""

CROP = (512, 512)
LR, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.05, 0.01


def our_network(row: str) -> nn.Module:
    """This project's network."""
    loss = LossConfig(points=POINTS)
    return build_model(ModelConfig(num_classes=CLASSES, backbone=BACKBONES[row], loss=loss))


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
    network = huggingface_network(row) if KERNELS[form] is None else our_network(row)
    return network.to(device)


def predicted(form: str, network: nn.Module, images: Tensor) -> Prediction:
    """What inference needs of a forward pass."""
    if KERNELS[form] is not None:
        prediction: Prediction = network(images, auxiliary=False)
        return prediction
    output = network(pixel_values=images, output_auxiliary_logits=False)
    return Prediction(output.class_queries_logits, output.masks_queries_logits)


def inference(form: str, row: str, size: tuple[int, int], device: torch.device, precision: str) -> Callable[[], object]:
    """A call that makes one image's label map."""
    network = build(form, row, device)
    if KERNELS[form] == "auto":
        network = RecordedNetwork(network)  # as an evaluation does
    network.eval()
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).to(device)

    @torch.inference_mode()
    def call() -> Tensor:
        with in_precision(precision, device):
            return semantic_labels(predicted(form, network, images), size)

    return call


@dataclass(frozen=True)
class Batch:
    """What a training step gets: noise, with MASKS masks in blocks of an eighth of the image."""

    images: Tensor
    targets: list[Target]

    @classmethod
    def of(cls, count: int, device: torch.device) -> Batch:
        """The same in every run."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(count, 3, *CROP, generator=generator).to(device)
        blocks = torch.randint(0, MASKS, (count, 8, 8), generator=generator)
        segments = blocks.repeat_interleave(CROP[0] // 8, 1).repeat_interleave(CROP[1] // 8, 2).to(device)
        labels = torch.arange(MASKS).to(device)
        return cls(images, [Target.from_segments(labels, segments_HW) for segments_HW in segments])


def training(form: str, row: str, batch: int, device: torch.device, precision: str) -> Callable[[], object]:
    """A call that makes one training step."""
    network = build(form, row, device).train()
    kernels = KERNELS[form]
    if kernels is not None and device.type == "cuda" and use(kernels, device="cuda") == "compiled":
        network.compile_training()  # type: ignore[operator]  # as pipeline.training.step does
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    given = Batch.of(batch, device)

    def loss() -> Tensor:
        if KERNELS[form] is None:
            masks = [target.masks.float() for target in given.targets]
            classes = [target.labels for target in given.targets]
            found: Tensor = network(pixel_values=given.images, mask_labels=masks, class_labels=classes).loss
            return found
        losses = set_losses(
            network(given.images, seeds=range(batch)),
            given.targets,
            num_masks=float(MASKS * batch),
            config=network.config.loss,
            seeds=range(batch),
        )
        return torch.stack(list(losses.values())).sum()

    def call() -> None:
        optimizer.zero_grad()
        with in_precision(precision, device):
            total = loss()
        total.backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()

    return call


def call_of(what: str, form: str, row: str, device: torch.device, precision: str) -> Callable[[], object]:
    """What is measured: "inference 512 x 512" or "training step of 2 images"."""
    words = what.split()
    if words[0] == "inference":
        return inference(form, row, (int(words[1]), int(words[3])), device, precision)
    return training(form, row, int(words[3]), device, precision)


def timed(form: str, call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with the form's kernels."""
    if (kernels := KERNELS[form]) is not None:
        use(kernels, device=device.type)
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def known_forms(wanted: Sequence[str]) -> list[str]:
    """The forms that can be measured here, of those that are wanted. Exits with one sentence where none can."""
    forms = [form for form in FORMS if form in wanted]
    if "huggingface" in forms and importlib.util.find_spec("transformers") is None:
        forms.remove("huggingface")
        if not forms:
            sys.exit("error: --forms huggingface needs transformers: pip install transformers")
        print("transformers is not installed: Hugging Face's network is left out", file=sys.stderr)
    return forms
