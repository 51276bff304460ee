"""Hugging Face's names of this network's tensors (transformers' Mask2FormerForUniversalSegmentation)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from m2f.config import ModelConfig
from m2f.weights.backbones import channel_first, neighbour_first
from m2f.weights.fit import check_fit, entries, pieces, with_counters
from m2f.weights.reference import INDEX, relative_position_index

_ENCODER = "model.pixel_level_module.encoder."
_PIXELS = "model.pixel_level_module.decoder."
_QUERIES = "model.transformer_module."

_TO_HUGGINGFACE = [
    # ResNets
    (r"^backbone\.conv1\.", f"{_ENCODER}embedder.embedder.convolution."),
    (r"^backbone\.bn1\.", f"{_ENCODER}embedder.embedder.normalization."),
    *[(rf"^backbone\.layer{i + 1}\.(\d+)\.", rf"{_ENCODER}encoder.stages.{i}.layers.\1.") for i in (0, 1, 2, 3)],
    *[(rf"(stages\.\d\.layers\.\d+)\.conv{i + 1}\.", rf"\1.layer.{i}.convolution.") for i in (0, 1, 2)],
    *[(rf"(stages\.\d\.layers\.\d+)\.bn{i + 1}\.", rf"\1.layer.{i}.normalization.") for i in (0, 1, 2)],
    (r"(stages\.\d\.layers\.\d+)\.downsample\.0\.", r"\1.shortcut.convolution."),
    (r"(stages\.\d\.layers\.\d+)\.downsample\.1\.", r"\1.shortcut.normalization."),
    # Swin
    (r"^backbone\.patch_embedding\.projection\.", f"{_ENCODER}embeddings.patch_embeddings.projection."),
    (r"^backbone\.patch_embedding\.", f"{_ENCODER}embeddings."),
    (r"^backbone\.stages\.(\d+)\.(\d+)\.", rf"{_ENCODER}encoder.layers.\1.blocks.\2."),
    (r"^backbone\.merges\.(\d+)\.", rf"{_ENCODER}encoder.layers.\1.downsample."),
    *[(rf"^backbone\.norms\.{i}\.", f"{_ENCODER}hidden_states_norms.stage{i + 1}.") for i in (0, 1, 2, 3)],
    (r"(blocks\.\d+)\.attention\.relative_bias$", r"\1.attention.self.relative_position_bias_table"),
    (r"(blocks\.\d+)\.attention\.proj\.", r"\1.attention.output.dense."),
    (r"(blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(blocks\.\d+)\.feedforward\.0\.", r"\1.intermediate.dense."),
    (r"(blocks\.\d+)\.feedforward\.2\.", r"\1.output.dense."),
    # pixel decoder
    (r"^pixel_decoder\.level_encoding\.weight$", f"{_PIXELS}level_embed"),
    (r"^pixel_decoder\.input_projections\.(\d+)\.conv\.", rf"{_PIXELS}input_projections.\1.0."),
    (r"^pixel_decoder\.input_projections\.(\d+)\.norm\.", rf"{_PIXELS}input_projections.\1.1."),
    (r"^pixel_decoder\.lateral\.conv\.", f"{_PIXELS}adapter_1.0."),
    (r"^pixel_decoder\.lateral\.norm\.", f"{_PIXELS}adapter_1.1."),
    (r"^pixel_decoder\.output\.conv\.", f"{_PIXELS}layer_1.0."),
    (r"^pixel_decoder\.output\.norm\.", f"{_PIXELS}layer_1.1."),
    (r"^pixel_decoder\.mask_features\.", f"{_PIXELS}mask_projection."),
    (r"^pixel_decoder\.layers\.", f"{_PIXELS}encoder.layers."),
    (r"(encoder\.layers\.\d+)\.attention\.offsets\.", r"\1.self_attn.sampling_offsets."),
    (r"(encoder\.layers\.\d+)\.attention\.weights\.", r"\1.self_attn.attention_weights."),
    (r"(encoder\.layers\.\d+)\.attention\.(value|output)\.", r"\1.self_attn.\2_proj."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    # query decoder
    (r"^query_decoder\.query_feature\.", f"{_QUERIES}queries_features."),
    (r"^query_decoder\.query_position\.", f"{_QUERIES}queries_embedder."),
    (r"^query_decoder\.level_embedding\.", f"{_QUERIES}level_embed."),
    (r"^query_decoder\.norm\.", f"{_QUERIES}decoder.layernorm."),
    (r"^query_decoder\.class_head\.", "class_predictor."),
    *[
        (rf"^query_decoder\.mask_head\.{2 * i}\.", f"{_QUERIES}decoder.mask_predictor.mask_embedder.{i}.0.")
        for i in (0, 1, 2)
    ],
    (r"^query_decoder\.layers\.", f"{_QUERIES}decoder.layers."),
    (r"(decoder\.layers\.\d+)\.(cross|self)_attention\.", r"\1.\2_attn."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.cross_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    # within a layer of either decoder
    (r"(layers\.\d+)\.feedforward\.0\.", r"\1.fc1."),
    (r"(layers\.\d+)\.feedforward\.2\.", r"\1.fc2."),
]
"""To the names in published files."""

_SPLIT = [
    (r"(blocks\.\d+)\.attention\.qkv\.", r"\1.attention.self.{}.", ("query", "key", "value")),
    (r"(decoder\.layers\.\d+)\.self_attn\.in_proj_", r"\1.self_attn.{}_proj.", ("q", "k", "v")),
]
"""What is one tensor here and three there; cross-attention is one tensor in both."""

_TO_MODULES = [
    (rf"^({re.escape(_ENCODER)})(embeddings|encoder\.layers)\.", r"\1swin.\2."),
    (r"(blocks\.\d+)\.attention\.self\.(q)uery\.", r"\1.attention.\2_proj."),
    (r"(blocks\.\d+)\.attention\.self\.(k)ey\.", r"\1.attention.\2_proj."),
    (r"(blocks\.\d+)\.attention\.self\.(v)alue\.", r"\1.attention.\2_proj."),
    (
        r"(blocks\.\d+)\.attention\.self\.relative_position_bias_table$",
        r"\1.attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"(blocks\.\d+)\.attention\.output\.dense\.", r"\1.attention.o_proj."),
    (r"(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
]
"""From the names in published files to those of the modules in transformers 5.24, which differ in Swin."""

_CRITERION = "criterion.empty_weight"
"""The class loss's weights: 1, and `no_object_weight` for "no object"."""
_UNUSED_NORM = f"{_ENCODER}swin.layernorm."
"""A norm after the last stage of transformers' Swin, whose result Mask2Former does not use."""


def huggingface_names(name: str) -> tuple[str, ...]:
    """The names in published files of one of our state-dict entries: one, or three for a split one, in our order."""
    for pattern, replacement in _TO_HUGGINGFACE:
        name = re.sub(pattern, replacement, name)
    for pattern, replacement, parts in _SPLIT:
        if re.search(pattern, name):
            return tuple(re.sub(pattern, replacement.format(part), name) for part in parts)
    return (name,)


def module_name(name: str) -> str:
    """The name in transformers' own state dict of an entry of a published file."""
    for pattern, replacement in _TO_MODULES:
        name = re.sub(pattern, replacement, name)
    return name


def published_names(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of transformers' under the names in published files, without what our network lacks: index buffers,
    the loss's class weights, Swin's last norm."""
    known = {module_name(theirs): theirs for ours in entries(config) for theirs in huggingface_names(ours)}
    return {
        known.get(name, name): tensor
        for name, tensor in state_dict.items()
        if not (name.endswith(INDEX) or name == _CRITERION or name.startswith(_UNUSED_NORM))
    }


def from_huggingface(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A dict for `build_model(config).load_state_dict` from the names in Hugging Face's files or of its modules.

    Its Swin splits queries, keys and values and orders patch merging's four neighbours as the original Swin does; its
    query decoder splits those of self-attention only. Integer counters, index buffers, the loss's class weights and
    Swin's last norm may be absent; the latter three are left out. ValueError lists what is missing, left over or of
    another shape.

    Equal outputs need images of more than 32 times the attention window in height and width: transformers' Swin makes
    its windows smaller for maps that are no larger, where the published implementation and ours pad the maps.
    """
    wanted = entries(config)
    theirs = {name: huggingface_names(name) for name in wanted}
    expected: dict[str, Tensor] = {}
    for name, parts in theirs.items():
        expected |= pieces(wanted[name], parts)
    given = with_counters(published_names(state_dict, config), expected)
    check_fit(given, expected)
    converted = {}
    for name, parts in theirs.items():
        tensor = torch.cat([given[part] for part in parts]) if len(parts) > 1 else given[parts[0]]
        converted[name] = channel_first(tensor) if name.startswith("backbone.merges.") else tensor
    return converted


def to_huggingface(
    state_dict: Mapping[str, Tensor], config: ModelConfig, *, published: bool = False
) -> dict[str, Tensor]:
    """The state dict of `build_model(config)` for Mask2FormerForUniversalSegmentation: the way back from
    `from_huggingface`.

    The names are those of the modules in transformers 5.24, for `load_state_dict`; what our network lacks is made.
    `published`: the names in published files instead, which `from_pretrained` of every version reads. ValueError lists
    what is missing, left over or of another shape.
    """
    wanted = entries(config)
    check_fit(state_dict, wanted)
    converted: dict[str, Tensor] = {}
    for name in wanted:
        tensor, parts = state_dict[name], huggingface_names(name)
        if name.startswith("backbone.merges."):
            tensor = neighbour_first(tensor)
        converted |= pieces(tensor, parts)
        if published and name.endswith(".relative_bias"):
            index = relative_position_index((round(tensor.shape[0] ** 0.5) + 1) // 2, tensor.device)
            converted[parts[0].replace("relative_position_bias_table", "relative_position_index")] = index
    head = state_dict["query_decoder.class_head.bias"]
    converted[_CRITERION] = torch.ones_like(head)
    converted[_CRITERION][-1] = config.loss.no_object_weight
    if published:
        return converted
    converted = {module_name(name): tensor for name, tensor in converted.items()}
    if (norm := state_dict.get("backbone.norms.3.weight")) is not None:
        converted |= {f"{_UNUSED_NORM}weight": torch.ones_like(norm), f"{_UNUSED_NORM}bias": torch.zeros_like(norm)}
    return converted
