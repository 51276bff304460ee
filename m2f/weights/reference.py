"""mmsegmentation's and mmdetection's names of this network's tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from m2f.config import ModelConfig
from m2f.weights.fit import check_fit, entries, with_counters

_TO_REFERENCE = [
    (r"^backbone\.patch_embedding\.", "backbone.patch_embed."),
    (r"^backbone\.stages\.(\d+)\.(\d+)\.", r"backbone.stages.\1.blocks.\2."),
    (r"^backbone\.merges\.(\d+)\.", r"backbone.stages.\1.downsample."),
    (r"^backbone\.norms\.", "backbone.norm"),
    (r"(blocks\.\d+)\.attention\.relative_bias$", r"\1.attn.w_msa.relative_position_bias_table"),
    (r"(blocks\.\d+)\.attention\.", r"\1.attn.w_msa."),
    (r"^pixel_decoder\.input_projections\.(\d+)\.norm\.", r"pixel_decoder.input_convs.\1.gn."),
    (r"^pixel_decoder\.input_projections\.", "pixel_decoder.input_convs."),
    (r"^pixel_decoder\.(lateral|output)\.norm\.", r"pixel_decoder.\1_convs.0.gn."),
    (r"^pixel_decoder\.(lateral|output)\.", r"pixel_decoder.\1_convs.0."),
    (r"^pixel_decoder\.mask_features\.", "pixel_decoder.mask_feature."),
    (
        r"^pixel_decoder\.layers\.(\d+)\.attention\.offsets\.",
        r"pixel_decoder.encoder.layers.\1.self_attn.sampling_offsets.",
    ),
    (
        r"^pixel_decoder\.layers\.(\d+)\.attention\.weights\.",
        r"pixel_decoder.encoder.layers.\1.self_attn.attention_weights.",
    ),
    (
        r"^pixel_decoder\.layers\.(\d+)\.attention\.(value|output)\.",
        r"pixel_decoder.encoder.layers.\1.self_attn.\2_proj.",
    ),
    (r"^pixel_decoder\.layers\.", "pixel_decoder.encoder.layers."),
    (r"^query_decoder\.query_feature\.", "query_feat."),
    (r"^query_decoder\.query_position\.", "query_embed."),
    (r"^query_decoder\.level_embedding\.", "level_embed."),
    (r"^query_decoder\.class_head\.", "cls_embed."),
    (r"^query_decoder\.mask_head\.", "mask_embed."),
    (r"^query_decoder\.norm\.", "transformer_decoder.post_norm."),
    (r"^query_decoder\.layers\.(\d+)\.(cross|self)_attention\.", r"transformer_decoder.layers.\1.\2_attn.attn."),
    (r"^query_decoder\.layers\.", "transformer_decoder.layers."),
    # within a layer of either decoder
    (r"\.feedforward\.0\.", ".ffn.layers.0.0."),
    (r"\.feedforward\.2\.", ".ffn.layers.1."),
    (r"(layers\.\d+)\.norm1\.", r"\1.norms.0."),
    (r"(layers\.\d+)\.norm2\.", r"\1.norms.1."),
    (r"(layers\.\d+)\.norm3\.", r"\1.norms.2."),
]
_REFERENCE_HEADS = ("decode_head.", "panoptic_head.")
"""mmsegmentation's and mmdetection's name for everything but the backbone."""

TABLE = ".relative_position_bias_table"
"""Biases of relative positions in the reference's Swin."""
INDEX = ".relative_position_index"
"""A buffer beside it that follows from the window's size."""


def reference_name(name: str, *, head: str = "decode_head.") -> str:
    """The reference's name of one of our state-dict entries."""
    ours = name
    for pattern, replacement in _TO_REFERENCE:
        name = re.sub(pattern, replacement, name)
    return name if ours.startswith("backbone.") else head + name


def from_reference(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A dict for `build_model(config).load_state_dict` from mmsegmentation's or mmdetection's names.

    Integer counters and the index buffers of Swin's windows may be absent; the latter are left out. ValueError
    lists what is missing, left over or of another shape.
    """
    head = next((h for h in _REFERENCE_HEADS if any(name.startswith(h) for name in state_dict)), _REFERENCE_HEADS[0])
    wanted = entries(config)
    theirs = {name: reference_name(name, head=head) for name in wanted}
    expected = {theirs[name]: meta for name, meta in wanted.items()}
    given = with_counters({name: tensor for name, tensor in state_dict.items() if not name.endswith(INDEX)}, expected)
    check_fit(given, expected)
    return {name: given[theirs[name]] for name in wanted}


def to_reference(
    state_dict: Mapping[str, Tensor], config: ModelConfig, *, head: str = "decode_head."
) -> dict[str, Tensor]:
    """The state dict of `build_model(config)` under the names of mmsegmentation, or of mmdetection with the head
    "panoptic_head.": the way back from `from_reference`.

    Names, shapes and dtypes are the reference's. Tensors are not copied; the index buffers of Swin's windows, which
    our state dicts lack, are made. ValueError lists what is missing, left over or of another shape.
    """
    if head not in _REFERENCE_HEADS:
        raise ValueError(f"head is {head!r}; known: {', '.join(_REFERENCE_HEADS)}")
    wanted = entries(config)
    check_fit(state_dict, wanted)
    converted = {}
    for name in wanted:
        theirs, tensor = reference_name(name, head=head), state_dict[name]
        converted[theirs] = tensor
        if theirs.endswith(TABLE):
            window = (math.isqrt(tensor.shape[0]) + 1) // 2
            converted[theirs.removesuffix(TABLE) + INDEX] = relative_position_index(window, tensor.device)
    return converted


def relative_position_index(window: int, device: torch.device) -> Tensor:
    """Row of the table that holds the bias of pixel n looking at pixel m of a window, (N, N) int64.

    Pixels count row by row; the row is (dy + window - 1) * (2 window - 1) + dx + window - 1, where (dy, dx) is n's
    position less m's: the same in the reference and the original Swin.
    """
    pixel = torch.arange(window * window, device=device)
    dy, dx = (p[:, None] - p[None] + window - 1 for p in (pixel // window, pixel % window))
    return dy * (2 * window - 1) + dx
