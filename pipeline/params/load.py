"""params.yaml as the rows, datasets and weights that it describes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.params.checks import (
    check_dataset,
    check_labels,
    check_limits,
    check_origin,
    check_published,
    check_row,
    check_url,
    check_verdict,
    check_weights,
)
from pipeline.params.parse import names_given, parse, pick
from pipeline.params.schema import Params, PublishedConfig, Row, WeightsConfig
from pipeline.params.sentences import error_shown, shown
from pipeline.params.shorthand import (
    check_preset,
    trained_classes,
    with_class_names,
    with_class_weights,
    with_colours,
    with_num_classes,
    with_preset,
    with_site,
)

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
"""Names of entries are parts of commands, files and stages' names, and of the paths of settings, which DVC splits at
dots."""

_READ_BY_DVC = ("datasets", "weights", "presets", "rows", "checkpoints")
"""Sections that dvc.yaml reads. DVC stops where one is missing, whatever it was asked for."""


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml and checkpoints.yaml. ValueError says which key is wrong and what is known."""
    path = Path(path)
    (tree, own), checkpoints_in = _settings(path), str(_checkpoints_file(path))
    if isinstance(tree, Mapping) and (path.parent / "dvc.yaml").exists():
        _check_for_dvc(tree, str(path), checkpoints_in, own)
    return parse_params(tree, str(path), checkpoints_in=checkpoints_in, own=own)


def read_settings(path: Path) -> Any:
    """The sections of params.yaml as parsed YAML, with the entries of the checkpoints.yaml beside it, unchecked."""
    return _settings(path)[0]


def _settings(path: Path) -> tuple[Any, Collection[str]]:
    """`read_settings`, and the names of the checkpoints that stand in params.yaml itself."""
    tree, beside = _read(path), _checkpoints_file(path)
    if not isinstance(tree, Mapping) or beside == path:
        return tree, ()
    other = _read(beside)
    if not isinstance(other, Mapping) or other.keys() != {"checkpoints"}:
        raise ValueError(f"{beside} holds {shown(other)}; expected the section checkpoints alone")
    own, shipped = tree.get("checkpoints") or {}, other["checkpoints"] or {}
    if not isinstance(own, Mapping) or not isinstance(shipped, Mapping):
        return {**tree, "checkpoints": own if isinstance(shipped, Mapping) else shipped}, ()  # the parser says what
    if twice := sorted(map(str, own.keys() & shipped.keys())):
        raise ValueError(f"{path} and {beside} both have checkpoints.{twice[0]}; give one of them another name")
    return {**tree, "checkpoints": {**shipped, **own}}, own.keys()


def _checkpoints_file(path: Path) -> Path:
    """Where the section `checkpoints` stands, which no row depends on: in the checkpoints.yaml beside a params.yaml, or
    where there is none, and for a file of another name, in the file itself."""
    beside = path.with_name("checkpoints.yaml")
    return beside if path.name == "params.yaml" and beside.exists() else path


def _read(path: Path) -> Any:
    """A file's YAML."""
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; run from the project's folder, give --params, or begin a project with: m2f init"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start:,}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error_shown(error)}") from None


@cache
def _loader() -> Any:
    """PyYAML's safe loader, with an error of its own for two things that it lets pass: a key that a mapping has twice,
    of which it would drop the first, and what Python's types make of a value, such as a date 2026-02-30."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # in C: ten times as fast
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            marks: dict[str, Any] = {}
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
                mark: Any = key.start_mark
                if (first := marks.setdefault(key.value, mark)) is not mark:
                    lines = f"lines {first.line + 1} and {mark.line + 1}"
                    raise yaml.YAMLError(f"{lines} give one mapping the key {shown(key.value)} twice; take one out")
            return super().construct_mapping(node, deep=deep)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep=deep)
            except (ValueError, LookupError, AttributeError):
                if not isinstance(node, yaml.ScalarNode):
                    raise
                what = f"{shown(node.value)}, which looks like a date or a number and is none"
                raise yaml.YAMLError(
                    f"line {node.start_mark.line + 1} holds {what}; correct it, or put it in quotes if it is text"
                ) from None

    return Loader


def _check_for_dvc(tree: Mapping[str, Any], where: str, checkpoints_in: str, own: Collection[str]) -> None:
    """ValueError where something is missing that dvc.yaml reads, though the stages could do without it."""
    if tree.keys() - {entry.name for entry in dataclasses.fields(Params)}:
        return  # a section's name is wrong, which the parser says
    for section in _READ_BY_DVC:
        if tree.get(section) is None:
            file = checkpoints_in if section == "checkpoints" else where
            raise ValueError(
                f"{file} has no section {section!r}, or an empty one; dvc.yaml reads it: write {section}: {{}}"
            )
    checkpoints = tree["checkpoints"] if isinstance(tree["checkpoints"], Mapping) else {}
    for name, entry in checkpoints.items():
        if isinstance(entry, Mapping) and "row" not in entry:
            at = f"{where if name in own else checkpoints_in}: checkpoints.{name}"
            raise ValueError(f"{at} has no 'row', which dvc.yaml reads; write row: {name}")
    rows = tree["rows"] if isinstance(tree["rows"], Mapping) else {}
    for name, row in rows.items():
        for key, section in (("weights", "weights"), ("preset", "presets")):
            if isinstance(row, Mapping) and key not in row:
                raise ValueError(
                    f"{where}: rows.{name} has no {key!r}, which dvc.yaml reads; write {key}: none for none"
                )
            if isinstance(row, Mapping) and row[key] == "none" and "none" not in tree[section]:
                raise ValueError(f"{where}: {section} has no entry 'none', which rows.{name} names; write none: {{}}")


def parse_params(
    tree: Any, where: str = "params.yaml", *, checkpoints_in: str = "", own: Collection[str] = ()
) -> Params:
    """Params from a parsed YAML tree; `checkpoints_in`: the file of that section but for the entries `own`, if it is
    another one."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where}: expected the sections {names_given(Params)}, found {type(tree).__name__}")
    datasets = {
        name: with_class_names(with_colours(data), f"{where}: datasets.{name}")
        for name, data in _section(tree, "datasets", where).items()
    }
    settings = {**tree, "datasets": datasets, "rows": {}, "weights": {}, "checkpoints": {}}
    params = parse(Params, settings, where, in_file=True)
    for name, data in params.datasets.items():
        check_dataset(data, f"{where}: datasets.{name}")
        check_labels(data, f"{where}: datasets.{name}")
    check_verdict(params.verdict, f"{where}: verdict")
    for section in ("presets", "recipes"):
        for name, preset in _section(tree, section, where).items():
            check_preset(name, preset, f"{where}: {section}.{name}")
    weights = {name: _weights(name, entry, params, where) for name, entry in _section(tree, "weights", where).items()}
    params = dataclasses.replace(params, weights=weights)
    rows = {name: _row(name, row, params, where) for name, row in _section(tree, "rows", where).items()}
    params = dataclasses.replace(params, rows=rows)
    for name in params.weights:
        check_origin(params, name, f"{where}: weights.{name}")
    file = checkpoints_in or where
    checkpoints = _section(tree, "checkpoints", file)
    return dataclasses.replace(
        params,
        checkpoints={
            name: _checkpoint(name, entry, params, where if name in own else file)
            for name, entry in checkpoints.items()
        },
    )


def _section(tree: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A section's entries by name. ValueError where DVC or a file system cannot take a name."""
    section = {} if tree.get(key) is None else tree[key]
    if not isinstance(section, Mapping):
        raise ValueError(f"{where}: {key} is {shown(section)}; expected a mapping")
    alike: dict[str, str] = {}
    for name in section:
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            quotes = "" if isinstance(name, str) else ", in quotes if YAML reads it as something else than text"
            raise ValueError(
                f"{where}: {key} has an entry called {shown(name)}; begin with a letter, and go on with at most 99 "
                f"letters a-z, digits, _ and -{quotes}"
            )
        other = alike.setdefault(name.lower().replace("_", "-"), name)
        if other != name:
            raise ValueError(
                f"{where}: {key} has entries called {other!r} and {name!r}, which some file systems or MLflow take for "
                "one; let them differ in more than capitals, _ and -"
            )
    return dict(section)


def _weights(name: str, entry: Any, params: Params, where: str) -> WeightsConfig:
    at = f"{where}: weights.{name}"
    if name == "none" and entry != {}:
        raise ValueError(
            f"{at} is {shown(entry)}; none stands for random weights, so write none: {{}} or choose another name"
        )
    weights = parse(WeightsConfig, with_class_names(with_site(entry, params.sites, at), at), at)
    check_weights(weights, at)
    return weights


def _row(name: str, tree: Any, params: Params, where: str) -> Row:
    """One row with all that its preset and its dataset say, checked."""
    at = f"{where}: rows.{name}"
    full = with_num_classes(with_preset(tree, params, at), params.datasets)
    full = with_class_weights(full, params.datasets, at)
    if isinstance(full, Mapping) and "dataset" in full:
        if not isinstance(full["dataset"], str):
            raise ValueError(f"{at}.dataset is {shown(full['dataset'])}; expected the name of a dataset")
        pick(params.datasets, full["dataset"], "dataset", at)  # the number of classes is of a dataset that there is
    row = parse(Row, {"name": name, **full} if isinstance(full, Mapping) else full, at)
    if row.weights != "none":
        pick(params.weights, row.weights, "weights entry", at)
    if "pixel_decoder" in row.train.freeze and params.weights[row.weights].layout != "mask2former":
        raise ValueError(
            f"{at}.train.freeze holds pixel_decoder, which begins at random; start from a whole network (layout: "
            "mask2former), or take it out"
        )
    if row.train.freeze and row.weights == "none":
        raise ValueError(f"{at}.train.freeze holds {row.train.freeze[0]}, which begins at random; name weights")
    called, names = trained_classes(params.datasets[row.dataset], row.task)
    if len(names) != row.model.num_classes:
        raise ValueError(
            f"{at}.model.num_classes is {row.model.num_classes}, but dataset {row.dataset} names {len(names)} {called}"
        )
    check_row(row, at)
    check_limits(row, at)
    check_published(row, at)
    return row


def _checkpoint(name: str, entry: Any, params: Params, where: str) -> PublishedConfig:
    """One published checkpoint, of a row that there is."""
    at = f"{where}: checkpoints.{name}"
    filled = with_site(entry, params.sites, at)
    checkpoint = parse(PublishedConfig, {"row": name, **filled} if isinstance(filled, Mapping) else filled, at)
    dataset = pick(params.rows, checkpoint.row, "row", f"{where}: checkpoints").dataset
    if not name.startswith(checkpoint.row):
        raise ValueError(f"{at} is of row {checkpoint.row}; begin its name with the row's, as {checkpoint.row}_authors")
    if checkpoint.dataset != dataset:
        raise ValueError(f"{at}.dataset is {shown(checkpoint.dataset)}, but row {checkpoint.row} is on {dataset!r}")
    check_url(checkpoint.url, f"{at}.url")
    if checkpoint.log_url:
        check_url(checkpoint.log_url, f"{at}.log_url")
    return checkpoint
