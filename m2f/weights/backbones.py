"""Published backbones under this network's names, and a network's start from them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from m2f.weights.reference import INDEX, reference_name

_SWIN_FROM_REFERENCE = [
    (r"^backbone\.patch_embed\.", "backbone.patch_embedding."),
    (r"^backbone\.stages\.(\d+)\.blocks\.(\d+)\.", r"backbone.stages.\1.\2."),
    (r"^backbone\.stages\.(\d+)\.downsample\.", r"backbone.merges.\1."),
    (r"\.attn\.w_msa\.relative_position_bias_table$", ".attention.relative_bias"),
    (r"\.attn\.w_msa\.", ".attention."),
    (r"\.ffn\.layers\.0\.0\.", ".feedforward.0."),
    (r"\.ffn\.layers\.1\.", ".feedforward.2."),
]
_ORIGINAL_SWIN = [  # to the reference's names
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^layers\.", "stages."),
    (r"\.attn\.", ".attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
]


def backbone_from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A torchvision ResNet's tensors under our names (`backbone.*`), its classifier left out."""
    return {f"backbone.{name}": tensor for name, tensor in state_dict.items() if not name.startswith("fc.")}


def backbone_from_swin(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Swin classifier's tensors under our names (`backbone.*`), from mmsegmentation's or the original names.

    The original files order patch merging's four neighbours differently, which is put right; classifier, final
    norm and buffers that follow from the window's size are left out. The levels' own norms are in neither.
    ValueError for a name that is neither's.
    """
    original = any(name.startswith("layers.") for name in state_dict)
    converted = {}
    for name, tensor in state_dict.items():
        theirs = name.removeprefix("backbone.")
        if theirs.startswith(("norm.", "head.")) or theirs.endswith((INDEX, ".attn_mask")):
            continue
        if original:
            if "downsample" in theirs:
                tensor = channel_first(tensor)
            for pattern, replacement in _ORIGINAL_SWIN:
                theirs = re.sub(pattern, replacement, theirs)
        ours = f"backbone.{theirs}"
        for pattern, replacement in _SWIN_FROM_REFERENCE:
            ours = re.sub(pattern, replacement, ours)
        if reference_name(ours) != f"backbone.{theirs}" or reference_name(ours) == ours:
            raise ValueError(f"{name} is no tensor of a Swin classifier")
        converted[ours] = tensor
    return converted


def channel_first(merging: Tensor) -> Tensor:
    """Patch merging's last axis, (..., 4 C): from the original order, four neighbours of C channels each, read
    down first, to C channels of four neighbours each, read across first."""
    *rest, width = merging.shape
    return merging.view(*rest, 2, 2, width // 4).movedim(-1, -3).transpose(-1, -2).reshape(*rest, width)


def neighbour_first(merging: Tensor) -> Tensor:
    """The way back from `channel_first`."""
    *rest, width = merging.shape
    return merging.view(*rest, width // 4, 2, 2).transpose(-1, -2).movedim(-3, -1).reshape(*rest, width)


def load_backbone(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Start `model.backbone` from converted weights; ValueError unless every entry fits.

    Absent may be counters and the norms of a Swin's levels, which classifiers lack. Tables of relative positions
    of another window size are resized (bicubic).
    """
    own = {name: value for name, value in model.state_dict().items() if name.startswith("backbone.")}
    fitted = {
        name: _resized_table(value, own[name].shape[0]) if name.endswith(".relative_bias") and name in own else value
        for name, value in tensors.items()
    }
    missing = [
        name
        for name, value in own.items()
        if name not in fitted and value.is_floating_point() and not name.startswith("backbone.norms.")
    ]
    unexpected = [name for name in fitted if name not in own]
    wrong = [name for name in fitted if name in own and fitted[name].shape != own[name].shape]
    if missing or unexpected or wrong:
        raise ValueError(
            f"these weights belong to another backbone: {len(missing)} entries missing, {len(unexpected)} unexpected, "
            f"{len(wrong)} of another shape; first: {(missing + unexpected + wrong)[0]}"
        )
    model.load_state_dict(fitted, strict=False)


def _resized_table(table: Tensor, length: int) -> Tensor:
    """A table of relative positions, ((2 w - 1) ** 2, heads), for another window size."""
    if table.shape[0] == length:
        return table
    old, new = round(table.shape[0] ** 0.5), round(length**0.5)
    grid = table.T.reshape(1, -1, old, old)
    return torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic").flatten(2)[0].T.contiguous()
