"""params.yaml as the rows, datasets and weights that it describes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.params.checks import check_dataset, check_limits, check_row, check_verdict
from pipeline.params.parse import names_given, parse, pick
from pipeline.params.schema import Params, PublishedConfig, Row, WeightsConfig
from pipeline.params.shorthand import (
    check_preset,
    trained_classes,
    with_class_names,
    with_num_classes,
    with_preset,
    with_site,
)

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
"""Names of entries are parts of commands, files and stages' names."""


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml. ValueError says which key is wrong and what is known."""
    import yaml

    path = Path(path)
    try:
        # The parser in C where PyYAML has it: ten times as fast.
        tree = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; run from the project's folder or give --params") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return parse_params(tree, str(path))


def parse_params(tree: Any, where: str = "params.yaml") -> Params:
    """Params from a parsed YAML tree."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where}: expected the sections {names_given(Params)}, found {type(tree).__name__}")
    datasets = {
        name: with_class_names(data, f"{where}: datasets.{name}")
        for name, data in _section(tree, "datasets", where).items()
    }
    settings = {**tree, "datasets": datasets, "rows": {}, "weights": {}, "checkpoints": {}}
    params = parse(Params, settings, where, in_file=True)
    for name, data in params.datasets.items():
        check_dataset(data, f"{where}: datasets.{name}")
    check_verdict(params.verdict, f"{where}: verdict")
    for name, preset in params.presets.items():
        check_preset(preset, f"{where}: presets.{name}")
    weights = {name: _weights(name, entry, params, where) for name, entry in _section(tree, "weights", where).items()}
    params = dataclasses.replace(params, weights=weights)
    rows = {name: _row(name, row, params, where) for name, row in _section(tree, "rows", where).items()}
    params = dataclasses.replace(params, rows=rows)
    checkpoints = _section(tree, "checkpoints", where)
    return dataclasses.replace(
        params, checkpoints={name: _checkpoint(name, entry, params, where) for name, entry in checkpoints.items()}
    )


def _section(tree: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    section = tree.get(key) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{where}: {key} is {section!r}; expected a mapping")
    for name in section:
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ValueError(
                f"{where}: {key} has an entry called {name!r}; begin with a letter, and go on with "
                "letters, digits, _, - and ."
            )
    return dict(section)


def _weights(name: str, entry: Any, params: Params, where: str) -> WeightsConfig:
    at = f"{where}: weights.{name}"
    return parse(WeightsConfig, with_site(entry, params.sites, at), at)


def _row(name: str, tree: Any, params: Params, where: str) -> Row:
    """One row with all that its preset and its dataset say, checked."""
    at = f"{where}: rows.{name}"
    full = with_num_classes(with_preset(tree, params.presets, at), params.datasets)
    if isinstance(full, Mapping) and isinstance(full.get("dataset"), str):
        pick(params.datasets, full["dataset"], "dataset", at)  # the number of classes is of a dataset that there is
    row = parse(Row, {"name": name, **full} if isinstance(full, Mapping) else full, at)
    if row.weights != "none":
        pick(params.weights, row.weights, "weights entry", at)
    called, names = trained_classes(params.datasets[row.dataset], row.task)
    if len(names) != row.model.num_classes:
        raise ValueError(
            f"{at}.model.num_classes is {row.model.num_classes}, but dataset {row.dataset} names {len(names)} {called}"
        )
    check_row(row, at)
    check_limits(row, at)
    return row


def _checkpoint(name: str, entry: Any, params: Params, where: str) -> PublishedConfig:
    """One published checkpoint, of a row that there is."""
    at = f"{where}: checkpoints.{name}"
    checkpoint = parse(PublishedConfig, with_site(entry, params.sites, at), at)
    dataset = pick(params.rows, name, "row", f"{where}: checkpoints").dataset
    if checkpoint.dataset != dataset:
        raise ValueError(f"{at}.dataset is {checkpoint.dataset!r}, but row {name} is on {dataset!r}")
    return checkpoint
