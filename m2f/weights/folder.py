"""The files of one checkpoint: a single one, or Hugging Face's folders, with shards and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from m2f.backbones.swin import SWINS
from m2f.config import ModelConfig
from m2f.weights.read import read_checkpoint

_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a folder of Hugging Face's holds; the first that is there is read."""

_RESNET_DEPTHS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}


def read_files(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, of all files of an index, or of a folder with one of them."""
    if path.is_dir():
        found = next((path / name for name in _FILES if (path / name).exists()), None)
        if found is None:
            raise ValueError(f"{path} holds none of {', '.join(_FILES)}; name the checkpoint's file")
        path = found
    if path.suffix != ".json":
        return read_checkpoint(path)
    names = _read_json(path).get("weight_map")
    if not isinstance(names, Mapping) or not names or not all(_is_name(file) for file in names.values()):
        raise ValueError(f"{path} is no index of a checkpoint's files: it has no weight_map of file names")
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(names.values()):
        tensors |= read_checkpoint(path.parent / file)
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"{path} lists {missing[0]}, which {names[missing[0]]} does not hold; fetch both again")
    return {name: tensors[name] for name in names}


def _is_name(file: Any) -> bool:
    """Whether it is a file beside the index, and no path to elsewhere."""
    return isinstance(file, str) and file == Path(file).name and file not in ("", "..")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not an object")
    return value


def check_settings(path: Path, config: ModelConfig) -> None:
    """ValueError where a `config.json` of Hugging Face's beside a checkpoint describes another network."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.exists():
        return
    settings = _read_json(file)
    if (model := settings.get("model_type")) != "mask2former":
        raise ValueError(f"{file} describes a {model}, not a mask2former")
    for name, (theirs, ours) in _compared(settings, config).items():
        if theirs is not None and theirs != ours:
            raise ValueError(f"{file} has {name} {theirs}, and the row's network has {ours}")


def _compared(settings: Mapping[str, Any], config: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Settings by Hugging Face's names: theirs (None: not given) beside the row's."""
    pixels, queries = config.pixel_decoder, config.query_decoder
    labels = settings.get("id2label")
    compared = {
        "num_labels": (len(labels) if isinstance(labels, dict) else settings.get("num_labels"), config.num_classes),
        "num_queries": (settings.get("num_queries"), queries.queries),
        "decoder_layers": (settings.get("decoder_layers"), queries.layers + 1),
        "dim_feedforward": (settings.get("dim_feedforward"), queries.feedforward),
        "num_attention_heads": (settings.get("num_attention_heads"), queries.heads),
        "hidden_dim": (settings.get("hidden_dim"), pixels.channels),
        "encoder_layers": (settings.get("encoder_layers"), pixels.layers),
        "encoder_feedforward_dim": (settings.get("encoder_feedforward_dim"), pixels.feedforward),
    }
    theirs = settings.get("backbone_config")
    if not isinstance(theirs, Mapping):
        return compared
    if size := SWINS.get(config.backbone.name):
        own: dict[str, Any] = {"model_type": "swin", "embed_dim": size.channels, "window_size": size.window}
        own |= {"depths": list(size.depths), "num_heads": list(size.heads)}
    else:
        own = {"model_type": "resnet", "depths": list(_RESNET_DEPTHS.get(config.backbone.name, ()))}
    return compared | {f"backbone_config.{key}": (theirs.get(key), value) for key, value in own.items()}
