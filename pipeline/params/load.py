"""params.yaml as the rows, datasets and weights that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.params.checks import check_dataset, check_row, check_verdict
from pipeline.params.parse import names_given, parse, pick
from pipeline.params.schema import Params


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml. ValueError says which key is wrong and what is known."""
    import yaml

    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; run from the project's folder or give --params") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return parse_params(tree, str(path))


def parse_params(tree: Any, where: str = "params.yaml") -> Params:
    """Params from a parsed YAML tree."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where}: expected the sections {names_given(Params)}, found {type(tree).__name__}")
    rows = {
        str(name): {"name": str(name), **row} if isinstance(row, Mapping) else row
        for name, row in (tree.get("rows") or {}).items()
    }
    params = parse(Params, {**tree, "rows": rows}, where, in_file=True)
    for name, data in params.datasets.items():
        check_dataset(data, f"{where}: datasets.{name}")
    for name, row in params.rows.items():
        at = f"{where}: rows.{name}"
        data = pick(params.datasets, row.dataset, "dataset", at)
        if row.weights != "none":
            pick(params.weights, row.weights, "weights entry", at)
        kind, names = ("thing classes", data.thing_classes) if row.task == "instance" else ("classes", data.class_names)
        if len(names) != row.model.num_classes:
            raise ValueError(
                f"{at}.model.num_classes is {row.model.num_classes}, "
                f"but dataset {row.dataset} names {len(names)} {kind}"
            )
        check_row(row, at)
    check_verdict(params.verdict, f"{where}: verdict")
    for name, checkpoint in params.checkpoints.items():
        dataset = pick(params.rows, name, "row", f"{where}: checkpoints").dataset
        if checkpoint.dataset != dataset:
            raise ValueError(
                f"{where}: checkpoints.{name}.dataset is {checkpoint.dataset!r}, but row {name} is on {dataset!r}"
            )
    return params
