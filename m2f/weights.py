"""Reading published checkpoints without running code, and the reference's names of this network's tensors."""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2f.config import ModelConfig
from m2f.model import build_model

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
_REFERENCE_HEADS = ("decode_head.", "panoptic_head.")
"""mmsegmentation's and mmdetection's name for everything but the backbone."""

_TABLE = ".relative_position_bias_table"
"""Biases of relative positions in the reference's Swin."""
_INDEX = ".relative_position_index"
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
    wanted = _entries(config)
    theirs = {name: reference_name(name, head=head) for name in wanted}
    counters = {
        theirs[name]: torch.zeros(meta.shape, dtype=meta.dtype)
        for name, meta in wanted.items()
        if not meta.is_floating_point()
    }
    given = counters | {name: tensor for name, tensor in state_dict.items() if not name.endswith(_INDEX)}
    _check_fit(given, {theirs[name]: meta for name, meta in wanted.items()})
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
    wanted = _entries(config)
    _check_fit(state_dict, wanted)
    converted = {}
    for name in wanted:
        theirs, tensor = reference_name(name, head=head), state_dict[name]
        converted[theirs] = tensor
        if theirs.endswith(_TABLE):
            window = (math.isqrt(tensor.shape[0]) + 1) // 2
            converted[theirs.removesuffix(_TABLE) + _INDEX] = _relative_position_index(window, tensor.device)
    return converted


def _entries(config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of a row's network, without values."""
    with torch.device("meta"):
        return build_model(config).state_dict()


def _check_fit(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError unless names and shapes are the same."""
    wrong = [
        f"{name} is {tuple(given[name].shape)}, wanted {tuple(meta.shape)}"
        for name, meta in wanted.items()
        if name in given and given[name].shape != meta.shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", [name for name in wanted if name not in given]),
            ("unexpected", [name for name in given if name not in wanted]),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit this model: {'; '.join(problems)}")


def _relative_position_index(window: int, device: torch.device) -> Tensor:
    """Row of the table that holds the bias of pixel n looking at pixel m of a window, (N, N) int64.

    Pixels count row by row; the row is (dy + window - 1) * (2 window - 1) + dx + window - 1, where (dy, dx) is n's
    position less m's: the same in the reference and the original Swin.
    """
    pixel = torch.arange(window * window, device=device)
    dy, dx = (p[:, None] - p[None] + window - 1 for p in (pixel // window, pixel % window))
    return dy * (2 * window - 1) + dx


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
        if theirs.startswith(("norm.", "head.")) or theirs.endswith((_INDEX, ".attn_mask")):
            continue
        if original:
            if "downsample" in theirs:
                tensor = _channel_first(tensor)
            for pattern, replacement in _ORIGINAL_SWIN:
                theirs = re.sub(pattern, replacement, theirs)
        ours = f"backbone.{theirs}"
        for pattern, replacement in _SWIN_FROM_REFERENCE:
            ours = re.sub(pattern, replacement, ours)
        if reference_name(ours) != f"backbone.{theirs}" or reference_name(ours) == ours:
            raise ValueError(f"{name} is no tensor of a Swin classifier")
        converted[ours] = tensor
    return converted


def _channel_first(merging: Tensor) -> Tensor:
    """Patch merging's last axis, (..., 4 C): from the original order, four neighbours of C channels each, read
    down first, to C channels of four neighbours each, read across first."""
    *rest, width = merging.shape
    return merging.view(*rest, 2, 2, width // 4).movedim(-1, -3).transpose(-1, -2).reshape(*rest, width)


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


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, on the CPU, without running code from it.

    Reads .safetensors, torch files (mmengine's with their logs inside, torchvision's) and
    detectron2-style pickles of numpy arrays. ValueError when the file is none of these, or asks for
    anything but tensors, arrays and plain containers.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}); fetch or make it again") from None
    if start == b"PK" or not _is_plain_pickle(path):
        content = _load_torch_file(path)
    else:
        content = _load_plain_pickle(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds {type(content).__name__}, not a state dict")
    tensors = {
        str(name): torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        for name, value in content.items()
    }
    foreign = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if foreign or not tensors:
        raise ValueError(f"{path} holds no state dict: {foreign[0] + ' is no tensor' if foreign else 'it is empty'}")
    return {name: value.detach() for name, value in tensors.items()}


class _Inert:
    """Stands in for what is not needed: takes any arguments and state, keeps nothing, does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_INERT_MODULES = ("mmengine.", "mmcv.", "mmdet.", "mmseg.")
"""Logging classes that mmengine stores beside the weights; replaced by `_Inert`."""


def _numpy_globals() -> dict[str, Any]:
    """What pickled numpy arrays and scalars need, under numpy's old and new module names."""
    reconstruct = np.zeros(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    named: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for core in ("core", "_core"):
        named[f"numpy.{core}.multiarray._reconstruct"] = reconstruct
        named[f"numpy.{core}.multiarray.scalar"] = scalar
    return named


def _load_torch_file(path: Path) -> Any:
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        wanted = get_unsafe_globals_in_checkpoint(path)
    except Exception:
        wanted = []  # the legacy format and damaged files cannot be listed; loading refuses what it does not know
    known = _numpy_globals()
    # mmengine pickles its log buffers' methods as getattr(buffer, name): answered with nothing
    known["builtins.getattr"] = _Inert
    allowed: list[Any] = [(value, name) for name, value in known.items()]
    allowed += [type(np.dtype(dtype)) for dtype in (np.float32, np.float64, np.int32, np.int64, np.bool_)]
    for name in wanted:
        if name.startswith(_INERT_MODULES):
            allowed.append((_Inert, name))
        elif name not in known and not name.startswith("numpy.dtypes."):
            raise ValueError(f"{path} was refused: it asks for {name}, which is no part of a checkpoint")
    try:
        with safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {asked[1]}, which is no part of a checkpoint" if asked else "it is no plain checkpoint"
        raise ValueError(f"{path} was refused: {what}") from None
    except Exception as error:  # a damaged file can break its reader anywhere
        raise ValueError(f"{path} is not a complete checkpoint ({type(error).__name__}); fetch it again") from None


_TORCH_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def _is_plain_pickle(path: Path) -> bool:
    """A pickle protocol header that does not announce torch's old multi-part format."""
    with open(path, "rb") as file:
        start = file.read(64)
    return start[:1] == b"\x80" and _TORCH_LEGACY_MAGIC not in start


class _PlainUnpickler(pickle.Unpickler):
    """Numpy arrays and plain containers only."""

    def find_class(self, module: str, name: str) -> Any:
        known = _numpy_globals()
        if f"{module}.{name}" in known:
            return known[f"{module}.{name}"]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 spells bytes
            return lambda text, encoding: text.encode("latin1")
        raise ValueError(f"it asks for {module}.{name}, which is no part of a checkpoint")


def _load_plain_pickle(path: Path) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except ValueError as error:
        raise ValueError(f"{path} was refused: {error}") from None
    except Exception as error:  # a damaged file can break its reader anywhere
        raise ValueError(f"{path} is not a complete checkpoint ({type(error).__name__}); fetch it again") from None
