"""Networks with weights made from their names, and the authors' names of tensors as their repository has them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from m2f import build_model
from m2f.backbones.swin import SWINS
from m2f.config import BackboneConfig, ModelConfig, PixelDecoderConfig, QueryDecoderConfig
from tests.reference.seeded_weights import seeded_tensor

TINY = ModelConfig(
    num_classes=3,
    backbone=BackboneConfig(name="swin-tiny"),
    pixel_decoder=PixelDecoderConfig(channels=64, layers=1, heads=4, feedforward=128),
    query_decoder=QueryDecoderConfig(queries=10, layers=3, heads=4, feedforward=128),
)
"""A network of every part, in milliseconds."""


def config(backbone: str, *, classes: int = 150, queries: int = 100) -> ModelConfig:
    """A published row's network."""
    return ModelConfig(
        num_classes=classes,
        backbone=BackboneConfig(name=backbone),
        query_decoder=QueryDecoderConfig(queries=queries),
    )


@functools.cache
def seeded_state(of: ModelConfig) -> dict[str, Tensor]:
    """A state dict whose every entry differs from the others."""
    with torch.device("meta"):
        wanted = build_model(of).state_dict()
    return {
        name: seeded_tensor(name.replace("query_decoder.", "query."), tuple(meta.shape), str(meta.dtype)[6:])
        if meta.is_floating_point()
        else torch.zeros(meta.shape, dtype=meta.dtype)
        for name, meta in wanted.items()
    }


def authors_shapes(backbone: str, *, classes: int, queries: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' state dict, counters aside.

    After mask2former/modeling of their repository, detectron2's ResNet with frozen norms, and their configs (CONVS_DIM
    and HIDDEN_DIM 256, DIM_FEEDFORWARD 2048, DEC_LAYERS 10).
    """
    shapes = _authors_swin(backbone) if backbone in SWINS else _authors_resnet(backbone)
    first = 96 if backbone in ("swin-t", "swin-s") else {"swin-b": 128, "swin-l": 192}.get(backbone, 256)
    pixels, queries_of = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    for i, channels in enumerate((8 * first, 4 * first, 2 * first)):
        shapes |= {
            f"{pixels}.input_proj.{i}.0.weight": (256, channels, 1, 1),
            f"{pixels}.input_proj.{i}.0.bias": (256,),
        }
        shapes |= _norm(f"{pixels}.input_proj.{i}.1", 256)
    shapes |= {f"{pixels}.transformer.level_embed": (3, 256)}
    for i in range(6):
        layer = f"{pixels}.transformer.encoder.layers.{i}"
        for name, width in {
            "sampling_offsets": 192,
            "attention_weights": 96,
            "value_proj": 256,
            "output_proj": 256,
        }.items():
            shapes |= _linear(f"{layer}.self_attn.{name}", 256, width)
        shapes |= _linear(f"{layer}.linear1", 256, 1024) | _linear(f"{layer}.linear2", 1024, 256)
        shapes |= _norm(f"{layer}.norm1", 256) | _norm(f"{layer}.norm2", 256)
    shapes |= {f"{pixels}.mask_features.weight": (256, 256, 1, 1), f"{pixels}.mask_features.bias": (256,)}
    shapes |= {f"{pixels}.adapter_1.weight": (256, first, 1, 1)} | _norm(f"{pixels}.adapter_1.norm", 256)
    shapes |= {f"{pixels}.layer_1.weight": (256, 256, 3, 3)} | _norm(f"{pixels}.layer_1.norm", 256)
    for i in range(9):
        cross, own, ffn = (
            f"{queries_of}.transformer_{kind}_layers.{i}" for kind in ("cross_attention", "self_attention", "ffn")
        )
        for attention in (f"{cross}.multihead_attn", f"{own}.self_attn"):
            shapes |= {f"{attention}.in_proj_weight": (768, 256), f"{attention}.in_proj_bias": (768,)}
            shapes |= _linear(f"{attention}.out_proj", 256, 256)
        shapes |= _linear(f"{ffn}.linear1", 256, 2048) | _linear(f"{ffn}.linear2", 2048, 256)
        shapes |= _norm(f"{cross}.norm", 256) | _norm(f"{own}.norm", 256) | _norm(f"{ffn}.norm", 256)
    shapes |= _norm(f"{queries_of}.decoder_norm", 256) | _linear(f"{queries_of}.class_embed", 256, classes + 1)
    for i in range(3):
        shapes |= _linear(f"{queries_of}.mask_embed.layers.{i}", 256, 256)
    embeddings = {"query_feat": queries, "query_embed": queries, "level_embed": 3}
    return shapes | {f"{queries_of}.{name}.weight": (count, 256) for name, count in embeddings.items()}


def _linear(name: str, width_in: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width, width_in), f"{name}.bias": (width,)}


def _norm(name: str, channels: int, statistics: bool = False) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var") if statistics else ("weight", "bias")
    return {f"{name}.{part}": (channels,) for part in parts}


def _authors_resnet(backbone: str) -> dict[str, tuple[int, ...]]:
    def conv(name: str, width_in: int, width: int, kernel: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width, width_in, kernel, kernel)} | _norm(f"{name}.norm", width, statistics=True)

    shapes = conv("backbone.stem.conv1", 3, 64, 7)
    for level, blocks in enumerate({"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}[backbone]):
        middle, width = 64 * 2**level, 256 * 2**level
        width_in = 64 if level == 0 else width // 2
        for i in range(blocks):
            block = f"backbone.res{level + 2}.{i}"
            if i == 0:
                shapes |= conv(f"{block}.shortcut", width_in, width, 1)
            shapes |= conv(f"{block}.conv1", width_in if i == 0 else width, middle, 1)
            shapes |= conv(f"{block}.conv2", middle, middle, 3) | conv(f"{block}.conv3", middle, width, 1)
    return shapes


def _authors_swin(backbone: str) -> dict[str, tuple[int, ...]]:
    size = SWINS[backbone]
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.patch_embed.proj.weight": (size.channels, 3, 4, 4),
        "backbone.patch_embed.proj.bias": (size.channels,),
    }
    shapes |= _norm("backbone.patch_embed.norm", size.channels)
    for level, (blocks, heads) in enumerate(zip(size.depths, size.heads, strict=True)):
        width = size.channels * 2**level
        for i in range(blocks):
            block = f"backbone.layers.{level}.blocks.{i}"
            shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
            shapes |= {f"{block}.attn.relative_position_bias_table": ((2 * size.window - 1) ** 2, heads)}
            shapes |= {f"{block}.attn.relative_position_index": (size.window**2, size.window**2)}
            shapes |= _linear(f"{block}.attn.qkv", width, 3 * width) | _linear(f"{block}.attn.proj", width, width)
            shapes |= _linear(f"{block}.mlp.fc1", width, 4 * width) | _linear(f"{block}.mlp.fc2", 4 * width, width)
        if level < 3:
            merging = f"backbone.layers.{level}.downsample"
            shapes |= {f"{merging}.reduction.weight": (2 * width, 4 * width)} | _norm(f"{merging}.norm", 4 * width)
        shapes |= _norm(f"backbone.norm{level}", width)
    return shapes
