"""The network's settings. Defaults are the published recipe; params.yaml holds only what a row changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

OFF = "off"
"""In the metadata of a setting's field: the value at which the program is as if there were no such setting, as in
`field(default=0.0, metadata={OFF: 0.0})`. A setting that is added later names one, so that work done before keeps its
name."""

Kernels = Literal["auto", "plain", "compiled"]
"""How some operations are made (m2f.kernels). plain: by PyTorch's own; compiled: by loops in C on a CPU, by kernels in
Triton on a GPU; auto: compiled where they can be had, else plain."""

BACKBONE_NAMES = ("r50", "r101", "tiny", "swin-t", "swin-s", "swin-b", "swin-l", "swin-tiny")
"""Backbones that `m2f.backbones` builds."""
BATCH_NORM_BACKBONES = ("r50", "r101")
"""Those whose norms depend on other pictures of the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """A four-level backbone: feature maps at strides 4, 8, 16 and 32."""

    name: str = "r50"
    """One of BACKBONE_NAMES."""
    frozen_norm: bool = True
    """Keep the affine parameters of batch norm at their initial values (all published ResNet rows)."""
    batch_statistics: bool = True
    """In training, normalise with the statistics of the whole step (the semantic rows); False: with the
    running statistics of the initial weights (the COCO rows). Means nothing to group and layer norm."""
    drop_path_rate: float = 0.0
    """Share of pictures whose residual branches the last Swin block drops in training; rises linearly from 0 at the
    first (all published Swin rows: 0.3). ResNets have none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelDecoderConfig:
    """From the backbone's maps to mask features at stride 4 and the maps of strides 32, 16 and 8 for the queries."""

    name: Literal["deformable", "fapn"] = field(default="deformable", metadata={OFF: "deformable"})
    """deformable: multi-scale deformable attention over strides 32, 16 and 8, then one top-down step to stride 4 (all
    published rows). fapn: a feature-aligned pyramid (m2f.fapn), which has no other settings than `channels`."""
    channels: int = 256
    """Width of all its maps, the per-pixel embedding included."""
    layers: int = 6
    heads: int = 8
    points: int = 4
    """Sampled positions per head and level."""
    feedforward: int = 1024
    float32: bool = field(default=False, metadata={OFF: False})
    """Whether it computes in float32 where the rest of the network does in 16 bits, as the authors' does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryDecoderConfig:
    """Masked-attention decoder (paper, sec. 3.2)."""

    queries: int = 100
    layers: int = 9
    """Layer i attends to stride 32, 16, 8, 32, ...; gives layers + 1 predictions."""
    heads: int = 8
    feedforward: int = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the set losses; the matching cost uses the same three (paper, sec. 3.3 and 4.1)."""

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    """Weight of a query without an object in the class loss's weighted mean."""
    class_weights: tuple[float, ...] = field(default=(), metadata={OFF: ()})
    """Weight of every class in the class loss, by class id; empty: 1 each (all published rows). params.yaml may give
    class names instead; classes that it leaves out have 1."""
    points: int = 12_544
    """Points at which masks are compared, per mask (112 * 112)."""
    oversample: float = 3.0
    """The losses choose their uncertain points among `oversample * points` uniform ones."""
    importance: float = 0.75
    """Share of the points chosen by uncertainty; the rest are uniform."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that decides the network's function and its training loss."""

    num_classes: int
    """Classes without "no object"."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    pixel_decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    query_decoder: QueryDecoderConfig = field(default_factory=QueryDecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW as published (mmsegmentation configs/mask2former)."""

    lr: float = 1e-4
    weight_decay: float = 0.05
    """On every parameter but norms, query embeddings and the decoder's level embedding."""
    backbone_lr_factor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 0.01
    """Largest 2-norm of the whole gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over the steps, as a factor of each group's rate."""

    name: Literal["poly", "multistep"] = "poly"
    """`poly`: (1 - step / (steps - 1)) ** power, zero on the last step (the semantic rows). `multistep`: `gamma` to the
    power of the milestones behind (the COCO rows)."""
    power: float = 0.9
    milestones: tuple[int, ...] = ()
    """`multistep`: steps, counted from 0, from which on the rate is lower."""
    gamma: float = 0.1
    """`multistep`: what every milestone multiplies the rate by."""
    warmup_steps: int = 0
    """Linear rise from 0 over the first steps, on top of the schedule (published rows: none)."""
