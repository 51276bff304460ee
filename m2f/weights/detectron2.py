"""The authors' names of this network's tensors (facebookresearch/Mask2Former, which is built on detectron2)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from m2f.config import ModelConfig
from m2f.weights.backbones import channel_first, neighbour_first
from m2f.weights.fit import check_fit, entries, with_counters
from m2f.weights.reference import INDEX

_PIXELS = "sem_seg_head.pixel_decoder."
_QUERIES = "sem_seg_head.predictor."

_TO_DETECTRON2 = [
    # ResNets
    (r"^backbone\.conv1\.", "backbone.stem.conv1."),
    (r"^backbone\.bn1\.", "backbone.stem.conv1.norm."),
    *[(rf"^backbone\.layer{level}\.", f"backbone.res{level + 1}.") for level in (1, 2, 3, 4)],
    (r"^(backbone\.res.*)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"^(backbone\.res.*)\.downsample\.0\.", r"\1.shortcut."),
    (r"^(backbone\.res.*)\.downsample\.1\.", r"\1.shortcut.norm."),
    # Swin
    (r"^backbone\.patch_embedding\.projection\.", "backbone.patch_embed.proj."),
    (r"^backbone\.patch_embedding\.", "backbone.patch_embed."),
    (r"^backbone\.stages\.(\d+)\.(\d+)\.", r"backbone.layers.\1.blocks.\2."),
    (r"^backbone\.merges\.(\d+)\.", r"backbone.layers.\1.downsample."),
    (r"^backbone\.norms\.", "backbone.norm"),
    (r"(blocks\.\d+)\.attention\.relative_bias$", r"\1.attn.relative_position_bias_table"),
    (r"(blocks\.\d+)\.attention\.", r"\1.attn."),
    (r"(blocks\.\d+)\.feedforward\.0\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.feedforward\.2\.", r"\1.mlp.fc2."),
    # pixel decoder
    (r"^pixel_decoder\.level_encoding\.weight$", f"{_PIXELS}transformer.level_embed"),
    (r"^pixel_decoder\.input_projections\.(\d+)\.conv\.", rf"{_PIXELS}input_proj.\1.0."),
    (r"^pixel_decoder\.input_projections\.(\d+)\.norm\.", rf"{_PIXELS}input_proj.\1.1."),
    (r"^pixel_decoder\.lateral\.conv\.", f"{_PIXELS}adapter_1."),
    (r"^pixel_decoder\.lateral\.norm\.", f"{_PIXELS}adapter_1.norm."),
    (r"^pixel_decoder\.output\.conv\.", f"{_PIXELS}layer_1."),
    (r"^pixel_decoder\.output\.norm\.", f"{_PIXELS}layer_1.norm."),
    (r"^pixel_decoder\.layers\.", f"{_PIXELS}transformer.encoder.layers."),
    (r"^pixel_decoder\.", _PIXELS),
    (r"(encoder\.layers\.\d+)\.attention\.offsets\.", r"\1.self_attn.sampling_offsets."),
    (r"(encoder\.layers\.\d+)\.attention\.weights\.", r"\1.self_attn.attention_weights."),
    (r"(encoder\.layers\.\d+)\.attention\.(value|output)\.", r"\1.self_attn.\2_proj."),
    (r"(encoder\.layers\.\d+)\.feedforward\.0\.", r"\1.linear1."),
    (r"(encoder\.layers\.\d+)\.feedforward\.2\.", r"\1.linear2."),
    # query decoder
    (r"^query_decoder\.query_feature\.", f"{_QUERIES}query_feat."),
    (r"^query_decoder\.query_position\.", f"{_QUERIES}query_embed."),
    (r"^query_decoder\.level_embedding\.", f"{_QUERIES}level_embed."),
    (r"^query_decoder\.norm\.", f"{_QUERIES}decoder_norm."),
    (r"^query_decoder\.class_head\.", f"{_QUERIES}class_embed."),
    *[(rf"^query_decoder\.mask_head\.{2 * i}\.", f"{_QUERIES}mask_embed.layers.{i}.") for i in (0, 1, 2)],
    (
        r"^query_decoder\.layers\.(\d+)\.cross_attention\.",
        rf"{_QUERIES}transformer_cross_attention_layers.\1.multihead_attn.",
    ),
    (r"^query_decoder\.layers\.(\d+)\.norm1\.", rf"{_QUERIES}transformer_cross_attention_layers.\1.norm."),
    (r"^query_decoder\.layers\.(\d+)\.self_attention\.", rf"{_QUERIES}transformer_self_attention_layers.\1.self_attn."),
    (r"^query_decoder\.layers\.(\d+)\.norm2\.", rf"{_QUERIES}transformer_self_attention_layers.\1.norm."),
    (r"^query_decoder\.layers\.(\d+)\.feedforward\.0\.", rf"{_QUERIES}transformer_ffn_layers.\1.linear1."),
    (r"^query_decoder\.layers\.(\d+)\.feedforward\.2\.", rf"{_QUERIES}transformer_ffn_layers.\1.linear2."),
    (r"^query_decoder\.layers\.(\d+)\.norm3\.", rf"{_QUERIES}transformer_ffn_layers.\1.norm."),
]

_CRITERION = "criterion.empty_weight"
"""The class loss's weights, which follow from the number of classes."""


def detectron2_name(name: str) -> str:
    """The authors' name of one of our state-dict entries."""
    for pattern, replacement in _TO_DETECTRON2:
        name = re.sub(pattern, replacement, name)
    return name


def current_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors' under the names of their newest code, without what follows from the settings.

    Their first version called the query features `static_query` and had no `pixel_decoder.` in its names; their code
    still reads such files (mask2former/modeling/meta_arch/mask_former_head.py).
    """
    renamed = {}
    for name, tensor in state_dict.items():
        if name.endswith(INDEX) or name == _CRITERION:
            continue
        if name.startswith("sem_seg_head.") and not name.startswith((_PIXELS, _QUERIES)):
            name = name.replace("sem_seg_head.", _PIXELS, 1)
        renamed[name.replace(f"{_QUERIES}static_query.", f"{_QUERIES}query_feat.")] = tensor
    return renamed


def from_detectron2(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A dict for `build_model(config).load_state_dict` from the authors' names.

    Their networks take RGB images, normalised with ImageNet's mean and standard deviation as ours are (INPUT.FORMAT,
    MODEL.PIXEL_MEAN and PIXEL_STD of their configs), and their ResNets have the stride in the 3 x 3 convolution
    (STRIDE_IN_1X1: False): no convolution is flipped or scaled. Their Swins order patch merging's four neighbours as
    the original Swin does, which is put right. Integer counters, index buffers of Swin's windows and the loss's class
    weights may be absent; the latter two are left out. ValueError lists what is missing, left over or of another shape.
    """
    wanted = entries(config)
    theirs = {name: detectron2_name(name) for name in wanted}
    expected = {theirs[name]: meta for name, meta in wanted.items()}
    given = with_counters(current_names(state_dict), expected)
    check_fit(given, expected)
    return {
        name: channel_first(given[theirs[name]]) if name.startswith("backbone.merges.") else given[theirs[name]]
        for name in wanted
    }


def to_detectron2(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of `build_model(config)` under the authors' names: the way back from `from_detectron2`.

    Counters, which their frozen norms lack, index buffers and the loss's class weights are left out; their code makes
    them. ValueError lists what is missing, left over or of another shape.
    """
    wanted = entries(config)
    check_fit(state_dict, wanted)
    return {
        detectron2_name(name): neighbour_first(state_dict[name])
        if name.startswith("backbone.merges.")
        else state_dict[name]
        for name, meta in wanted.items()
        if meta.is_floating_point()
    }
