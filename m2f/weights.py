"""Reading published checkpoints without running code, and naming their tensors as this network does."""

from __future__ import annotations

import io
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


def reference_name(name: str, *, head: str = "decode_head.") -> str:
    """The reference's name of one of our state-dict entries."""
    if name.startswith("backbone."):
        return name
    for pattern, replacement in _TO_REFERENCE:
        name = re.sub(pattern, replacement, name)
    return head + name


def from_reference(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A dict for `build_model(config).load_state_dict` from mmsegmentation's or mmdetection's names.

    Integer counters may be absent. ValueError lists what is missing, left over or of another shape.
    """
    with torch.device("meta"):
        wanted = build_model(config).state_dict()
    head = next((h for h in _REFERENCE_HEADS if any(name.startswith(h) for name in state_dict)), _REFERENCE_HEADS[0])
    converted, missing, wrong = {}, [], []
    for name, meta in wanted.items():
        theirs = reference_name(name, head=head)
        if theirs in state_dict:
            tensor = state_dict[theirs]
            if tensor.shape != meta.shape:
                wrong.append(f"{theirs} is {tuple(tensor.shape)}, wanted {tuple(meta.shape)}")
            converted[name] = tensor
        elif meta.is_floating_point():
            missing.append(theirs)
        else:
            converted[name] = torch.zeros(meta.shape, dtype=meta.dtype)
    known = {reference_name(name, head=head) for name in wanted}
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", [name for name in state_dict if name not in known]),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit this model: {'; '.join(problems)}")
    return converted


def backbone_from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A torchvision ResNet's tensors under our names (`backbone.*`), its classifier left out."""
    return {f"backbone.{name}": tensor for name, tensor in state_dict.items() if not name.startswith("fc.")}


def load_backbone(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Start `model.backbone` from converted weights; ValueError unless every entry fits (counters may be absent)."""
    own = {name: value for name, value in model.state_dict().items() if name.startswith("backbone.")}
    missing = [name for name, value in own.items() if name not in tensors and value.is_floating_point()]
    unexpected = [name for name in tensors if name not in own]
    wrong = [name for name in tensors if name in own and tensors[name].shape != own[name].shape]
    if missing or unexpected or wrong:
        raise ValueError(
            f"these weights belong to another backbone: {len(missing)} entries missing, {len(unexpected)} unexpected, "
            f"{len(wrong)} of another shape; first: {(missing + unexpected + wrong)[0]}"
        )
    model.load_state_dict(dict(tensors), strict=False)


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
    allowed += [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)]
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
