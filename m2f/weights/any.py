"""A whole checkpoint of any origin, recognised by its names."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from m2f.config import ModelConfig
from m2f.weights.detectron2 import current_names, detectron2_name, from_detectron2
from m2f.weights.fit import check_fit, check_values, entries, is_counter, pieces, shown, with_counters
from m2f.weights.folder import check_settings, read_files
from m2f.weights.huggingface import from_huggingface, huggingface_names, published_names
from m2f.weights.reference import from_reference, reference_name

Names = dict[str, Tensor]

CLASS_HEAD = ("query_decoder.class_head.weight", "query_decoder.class_head.bias")
"""Our entries whose shape is that of the classes; the last row is "no object"."""


PIXEL_DECODER = "pixel_decoder."
_PYRAMID = "pixel_decoder.top."
"""In names of this project's files alone: a feature-aligned pyramid, which nobody publishes."""


@dataclass(frozen=True)
class Origin:
    """Who names this network's tensors how."""

    title: str
    marks: tuple[str, ...]
    """Beginnings of names that nobody else's files have."""
    theirs: Callable[[str], tuple[str, ...]]
    """The names of one of our entries: several where it is split there."""
    cleaned: Callable[[Mapping[str, Tensor], ModelConfig], Names]
    """A state dict without what our network lacks, under the newest names."""
    convert: Callable[[Mapping[str, Tensor], ModelConfig], Names]
    """To our names; a ValueError for what does not fit."""
    settings: bool = False
    """Whether a `config.json` beside a file describes its network."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint under our names."""

    origin: str
    tensors: Names
    missing: tuple[str, ...]
    """Our entries that it lacks, counters aside."""
    num_classes: int
    """Of its class head, without "no object"."""


def _reference(head: str) -> Origin:
    return Origin(
        title="mmsegmentation" if head == "decode_head." else "mmdetection",
        marks=(head,),
        theirs=lambda name: (reference_name(name, head=head),),
        cleaned=lambda tensors, _: dict(tensors),
        convert=from_reference,
    )


def _own_names(tensors: Mapping[str, Tensor], _: ModelConfig) -> Names:
    """This project's files: a run's checkpoints have `model.` before the names, and the optimiser's state beside."""
    if any(name.startswith("model.query_decoder.") for name in tensors):
        return {name[len("model.") :]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    return dict(tensors)


def _from_own(tensors: Mapping[str, Tensor], config: ModelConfig) -> Names:
    wanted = entries(config)
    given = with_counters(_own_names(tensors, config), wanted)
    check_fit(given, wanted)
    return {name: given[name] for name in wanted}


ORIGINS = (
    _reference("decode_head."),
    _reference("panoptic_head."),
    Origin(
        title="the authors",
        marks=("sem_seg_head.",),
        theirs=lambda name: (detectron2_name(name),),
        cleaned=lambda tensors, _: current_names(tensors),
        convert=from_detectron2,
    ),
    Origin(
        title="Hugging Face",
        marks=("model.pixel_level_module.", "model.transformer_module."),
        theirs=huggingface_names,
        cleaned=published_names,
        convert=from_huggingface,
        settings=True,
    ),
    Origin(
        title="this project",
        marks=("query_decoder.", "model.query_decoder."),
        theirs=lambda name: (name,),
        cleaned=_own_names,
        convert=_from_own,
    ),
)


def load_any(path: str | Path, config: ModelConfig, *, partial: bool = False) -> Names:
    """A dict for `build_model(config).load_state_dict` from a whole checkpoint of Mask2Former.

    Recognised by their names: checkpoints of mmsegmentation, mmdetection, the authors (detectron2), Hugging Face and
    this project. `path`: a file, several files' index (.index.json), or a folder with one of them; a `config.json` of
    Hugging Face's beside it must describe this network. `partial`: entries outside the class head may be missing; they
    are not in the dict, and a warning lists them. ValueError: the file is another network's, does not fit, or holds
    values that are no finite numbers.
    """
    loaded = load_whole(path, config, partial=partial)
    if loaded.missing:
        warnings.warn(
            f"{path} lacks {len(loaded.missing)} entries of this network: {', '.join(loaded.missing)}", stacklevel=2
        )
    return loaded.tensors


def load_whole(path: str | Path, config: ModelConfig, *, partial: bool = False, any_classes: bool = False) -> Loaded:
    """`load_any` with what else is known of the file. `any_classes`: its class head may have another number of
    classes than the row."""
    tensors = read_files(Path(path))
    origin = _origin(tensors, path)
    name = config.pixel_decoder.name
    if name == "deformable" or any(_PYRAMID in each for each in tensors):
        return _loaded(tensors, origin, path, config, partial, any_classes)
    if not partial:
        raise ValueError(
            f"{path}, a checkpoint of {origin.title}, has another pixel decoder than {name}; `partial` takes over all "
            "else"
        )
    theirs = dataclasses.replace(config, pixel_decoder=dataclasses.replace(config.pixel_decoder, name="deformable"))
    loaded = _loaded(tensors, origin, path, theirs, partial, any_classes)
    kept = {each: tensor for each, tensor in loaded.tensors.items() if not each.startswith(PIXEL_DECODER)}
    lacking = [each for each in loaded.missing if not each.startswith(PIXEL_DECODER)]
    own = [each for each in entries(config) if each.startswith(PIXEL_DECODER)]
    return dataclasses.replace(loaded, tensors=kept, missing=(*lacking, *own))


def _loaded(
    tensors: Names, origin: Origin, path: str | Path, config: ModelConfig, partial: bool, any_classes: bool
) -> Loaded:
    """A file's tensors as `config`'s network has them."""
    given = origin.cleaned(tensors, config)
    head = given.get(origin.theirs(CLASS_HEAD[1])[0])
    classes = config.num_classes if head is None or head.dim() != 1 else len(head) - 1
    if any_classes and classes > 0:
        config = dataclasses.replace(config, num_classes=classes)
    if origin.settings:
        check_settings(Path(path), config)
    holes = _holes(given, origin, config) if partial else {}
    try:
        converted = origin.convert({**given, **holes}, config)
        check_values(converted, entries(config))
    except ValueError as error:
        raise ValueError(f"{path}, a checkpoint of {origin.title}: {error}") from None
    return Loaded(
        origin=origin.title,
        tensors={name: tensor for name, tensor in converted.items() if not tensor.is_meta},
        missing=tuple(name for name, tensor in converted.items() if tensor.is_meta),
        num_classes=classes,
    )


def _origin(tensors: Mapping[str, Tensor], path: str | Path) -> Origin:
    for origin in ORIGINS:
        if any(name.startswith(origin.marks) for name in tensors):
            return origin
    raise ValueError(
        f"{path} is no checkpoint of Mask2Former: its names ({shown(list(tensors))}) are those of none of "
        f"{', '.join(origin.title for origin in ORIGINS)}"
    )


def _holes(given: Mapping[str, Tensor], origin: Origin, config: ModelConfig) -> Names:
    """Tensors without values for our entries that are missing altogether, the class head's aside."""
    holes: Names = {}
    for name, meta in entries(config).items():
        parts = origin.theirs(name)
        if not (name in CLASS_HEAD or is_counter(meta) or any(part in given for part in parts)):
            holes |= pieces(meta, parts)
    return holes
