"""Reading published checkpoints without running code."""

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


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, on the CPU, without running code from it.

    Reads .safetensors, torch files (mmengine's with their logs inside, torchvision's) and
    detectron2-style pickles of numpy arrays or tensors. ValueError when the file is none of these, or asks for
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


def _storage(content: bytes) -> Any:
    """The values of a tensor inside a plain pickle, which are a torch file of their own."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


_TORCH = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): _storage,  # torch's own would run code
}
"""What pickled tensors need."""


class _PlainUnpickler(pickle.Unpickler):
    """Numpy arrays, tensors and plain containers only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _TORCH:
            return _TORCH[module, name]
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
