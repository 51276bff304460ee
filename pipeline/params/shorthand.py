"""What params.yaml does not write out is filled in: a row's preset, an entry's site, lists of class names
and colours.

Everything here is of parsed YAML, before it becomes dataclasses. What is not a mapping is left for the parser to name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.params.class_names import CLASS_NAMES
from pipeline.params.parse import parse_part, pick
from pipeline.params.schema import DatasetConfig, Params, Row
from pipeline.params.sentences import shown

_OF_THE_ROW = ("name", "dataset", "weights", "preset", "recipe")
"""What a preset or a recipe cannot hold."""

_OF_THE_SITE = ("site", "name", "stamp", "log")
"""What an entry of `weights` or `checkpoints` says to its site."""

_PLACE = re.compile(r"\{([^{}]*)\}|[{}]")
"""In a site's texts: what an entry fills in, or a brace alone, which it cannot."""


def with_class_names(dataset: Any, at: str) -> Any:
    """A dataset whose `class_names` and `thing_classes` are lists where it gives the name of one."""
    if not isinstance(dataset, Mapping):
        return dataset
    named = {key: value for key in ("class_names", "thing_classes") if isinstance(value := dataset.get(key), str)}
    lists = {key: pick(CLASS_NAMES, name, "list of class names", f"{at}.{key}") for key, name in named.items()}
    return {**dataset, **lists}


def with_colours(dataset: Any) -> Any:
    """A dataset whose `palette` has lists of colours, also where it gives one colour of a class."""
    if not isinstance(dataset, Mapping) or not isinstance(palette := dataset.get("palette"), Mapping):
        return dataset
    return {**dataset, "palette": {name: [entry] if _is_colour(entry) else entry for name, entry in palette.items()}}


def _is_colour(entry: Any) -> bool:
    return isinstance(entry, list) and not any(isinstance(each, list) for each in entry)


def with_site(entry: Any, sites: Mapping[str, Mapping[str, str]], at: str) -> Any:
    """An entry of `weights` or `checkpoints` with what its site says of it.

    A site's texts hold {name}, {stamp} and {log} of the entry, and {date} and {digest}: the parts of `stamp`, or of
    `name` where there is no stamp, before and after the last dash. What the entry gives itself is not made of them.
    """
    if not isinstance(entry, Mapping) or "site" not in entry:
        return entry
    named = {key: entry[key] for key in _OF_THE_SITE if key in entry}
    for key, value in named.items():
        if not isinstance(value, str):
            raise ValueError(f"{at}.{key} is {shown(value)}; expected text, in quotes if it looks like a number")
    site = pick(sites, named.pop("site"), "site", at)
    date, _, digest = named.get("stamp", named.get("name", "")).rpartition("-")
    known = {**named, "date": date, "digest": digest}
    filled = {}
    for key, text in site.items():
        if key in entry:
            continue
        if unknown := [part for part in _PLACE.findall(text) if part not in known]:
            raise ValueError(f"{at}: its site's {key} is {shown(text)}, and the entry has no {shown(unknown[0])}")
        filled[key] = _PLACE.sub(lambda place: known[place[1]], text)
    return {**filled, **{key: value for key, value in entry.items() if key not in _OF_THE_SITE}}


def check_preset(name: str, preset: Mapping[str, Any], at: str) -> None:
    """ValueError where a preset or a recipe holds what is no setting of a row, or a value that none can have."""
    if name == "none" and preset:
        raise ValueError(f"{at} holds {', '.join(map(str, preset))}; none stands for no preset, so choose another name")
    for key in _OF_THE_ROW:
        if key in preset:
            raise ValueError(f"{at} holds {key!r}, which each row says for itself; write it in the rows")
    parse_part(Row, preset, at)


def with_preset(row: Any, params: Params, at: str) -> Any:
    """A row with its recipe's and then its preset's settings where it gives none of its own. A list is one setting."""
    if not isinstance(row, Mapping):
        return row
    full = {key: value for key, value in row.items() if key not in ("recipe", "preset")}
    for key, section in (("recipe", params.recipes), ("preset", params.presets)):
        name = row.get(key, "none")
        if not isinstance(name, str):
            raise ValueError(f"{at}.{key} is {shown(name)}; expected the name of a {key}, or none")
        if name != "none":
            full = _merged(pick(section, name, key, at), full)
    return full


def with_num_classes(row: Any, datasets: Mapping[str, DatasetConfig]) -> Any:
    """A row whose network has as many classes as its dataset, unless the row gives their number."""
    if not isinstance(row, Mapping) or not isinstance(model := row.get("model"), Mapping):
        return row
    name = row.get("dataset")
    if "num_classes" in model or not isinstance(name, str) or name not in datasets:
        return row
    _, names = trained_classes(datasets[name], row.get("task", "semantic"))
    return {**row, "model": {"num_classes": len(names), **model}}


def with_class_weights(row: Any, datasets: Mapping[str, DatasetConfig], at: str) -> Any:
    """A row whose `model.loss.class_weights` are a list, also where it gives weights by class name; a class that it
    leaves out has 1. ValueError for a class that its dataset does not train."""
    if not isinstance(row, Mapping) or not isinstance(model := row.get("model"), Mapping):
        return row
    loss, name = model.get("loss"), row.get("dataset")
    if not isinstance(loss, Mapping) or not isinstance(weights := loss.get("class_weights"), Mapping):
        return row
    if not isinstance(name, str) or name not in datasets:
        return row
    _, names = trained_classes(datasets[name], row.get("task", "semantic"))
    for given in weights:
        if not isinstance(given, str):
            raise ValueError(f"{at}.model.loss.class_weights has the key {shown(given)}; expected the name of a class")
        pick(dict.fromkeys(names), given, "class", f"{at}.model.loss.class_weights")
    listed = [weights.get(each, 1.0) for each in names]
    return {**row, "model": {**model, "loss": {**loss, "class_weights": listed}}}


def trained_classes(dataset: DatasetConfig, task: Any) -> tuple[str, tuple[str, ...]]:
    """What the classes that a task trains on are called, and their names in the order of the network's ids, which is
    that of class_names."""
    if task != "instance":
        return "classes", dataset.class_names
    return "thing classes", tuple(name for name in dataset.class_names if name in dataset.thing_classes)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings' entries; where both have one, `over`'s, and mappings in them likewise."""
    both = {key: value for key in over if isinstance(value := under.get(key), Mapping)}
    nested = {key: _merged(value, over[key]) for key, value in both.items() if isinstance(over[key], Mapping)}
    return {**under, **over, **nested}
