"""The files of results/: where each kind lies, and how it is read and written.

Each holds the version of its layout. A file of another version is refused with the command that makes it again, and so
is one with an unknown, missing or wrong value.

A stage that waits for data, terms or GPUs leaves {"version": ..., "waiting": "why"}: to whoever reads, no result.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pipeline.params.parse import parse
from pipeline.storage.files import read_json, write_json, write_text
from pipeline.storage.results.data import ConvertedWeights, FetchedDataset, Manifest, wrong_manifest, wrong_weights
from pipeline.storage.results.rows import (
    Benchmark,
    Evaluation,
    PublishedEvaluation,
    Ready,
    Registration,
    TrainingResult,
    wrong_evaluation,
    wrong_published,
    wrong_training,
)

_Result = TypeVar("_Result")

RESULTS = Path("results")
"""The folder of all results, in the working directory."""


class _File(NamedTuple):
    """Where a kind of result lies, and how its file is read."""

    stage: str
    version: int
    """Rises whenever the fields or their meaning change."""
    wrong: Callable[[Any], str] = lambda result: ""
    """What is wrong with a result although each value may be, after the name of its file; empty: nothing."""
    of: Literal["row", "dataset", "name"] = "row"
    """The field that holds what its file is called after."""


_FILES: Mapping[type, _File] = {
    Ready: _File("ready", 2),
    FetchedDataset: _File("fetch", 1, of="dataset"),
    Manifest: _File("shard", 2, wrong_manifest, of="dataset"),
    ConvertedWeights: _File("weights", 1, wrong_weights, of="name"),
    TrainingResult: _File("train", 2, wrong_training),
    Evaluation: _File("evaluate", 1, wrong_evaluation),
    PublishedEvaluation: _File("published", 1, wrong_published, of="name"),
    Benchmark: _File("benchmark", 3),
    Registration: _File("register", 1),
}

PLOTS: Mapping[str, tuple[str, ...]] = {
    "classes": ("class", "split", "pixels", "images", "instances"),
    "curves": ("training", "figure", "step", "value"),
    "confusion": ("actual", "predicted", "share"),
}
"""What `dvc plots` draws, results/plots/<plot>/<name>.csv, with the columns of each file."""

_PLOTS_OF: Mapping[type, tuple[str, ...]] = {Manifest: ("classes",), Evaluation: ("curves", "confusion")}


def result_path(result_type: type, name: str, *, results: Path = RESULTS) -> Path:
    """The file of a stage's result for a row, dataset or entry of weights."""
    return results / _FILES[result_type].stage / f"{name}.json"


def made_by(result_type: type, name: str) -> str:
    """The command that makes a result again."""
    return f"dvc repro -f {_FILES[result_type].stage}@{name}"


def read_result(result_type: type[_Result], name: str, *, results: Path = RESULTS) -> _Result:
    """A stage's result. ValueError, with the command that makes it, where it is missing or waited for, torn, of another
    version of its layout, holds a key or value that it should not, or contradicts itself."""
    path = result_path(result_type, name, results=results)
    content = read_json(path, made_by=made_by(result_type, name))
    if why := _waits(content):
        raise ValueError(f"{path} waits for {why}; when that is here: dvc repro {_FILES[result_type].stage}@{name}")
    return _checked(result_type, name, content, path)


def find_result(result_type: type[_Result], name: str, *, results: Path = RESULTS) -> _Result | None:
    """`read_result`, or None where the stage has not run, or waits."""
    path = result_path(result_type, name, results=results)
    if not path.exists():
        return None
    content = read_json(path, made_by=made_by(result_type, name))
    return None if _waits(content) else _checked(result_type, name, content, path)


def sound_result(result_type: type[_Result], name: str, *, results: Path = RESULTS) -> _Result | None:
    """`find_result`, or None where the file is torn or of another version: for whoever asks what there is to go on."""
    try:
        return find_result(result_type, name, results=results)
    except ValueError:
        return None


def _checked(result_type: type[_Result], name: str, content: Any, path: Path) -> _Result:
    """A result of what its file holds."""
    command, file = made_by(result_type, name), _FILES[result_type]
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object; make it again with: {command}")
    version = content.pop("version", None)
    if type(version) is not int or version != file.version:
        found = "no version of its layout" if version is None else f"version {reprlib.repr(version)} of its layout"
        raise ValueError(f"{path} has {found}, but version {file.version} is needed; make it again with: {command}")
    try:
        result = parse(result_type, content, str(path), in_file=True)
    except ValueError as error:
        raise ValueError(f"{error}; make it again with: {command}") from None
    if (of := getattr(result, file.of)) != name:
        raise ValueError(f"{path} is of {file.of} {of!r}, not of {name}; make it again with: {command}")
    if wrong := file.wrong(result):
        raise ValueError(f"{path} {wrong}; make it again with: {command}")
    return result


def waiting(result_type: type, name: str, *, results: Path = RESULTS) -> str:
    """What a stage waits for; empty: it has run, or was never begun."""
    return waiting_in(result_path(result_type, name, results=results))


def waiting_in(path: Path) -> str:
    """`waiting`, of a file below results/."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    return _waits(content)


def _is_torn(path: Path) -> bool:
    """Whether a file is no JSON, as a copy that was cut short."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return False
    except (ValueError, RecursionError):
        return True
    return False


def _waits(content: Any) -> str:
    why = content.get("waiting") if isinstance(content, dict) else None
    return why if isinstance(why, str) else ""


def write_waiting(result_type: type, name: str, why: str, *, results: Path = RESULTS) -> None:
    """Say in a result's file what its stage waits for. A file that holds anything else is left as it is, unless it is
    torn."""
    path = result_path(result_type, name, results=results)
    if not path.exists() or waiting(result_type, name, results=results) or _is_torn(path):
        write_json(path, {"version": _FILES[result_type].version, "waiting": why})
    if result_type is Evaluation and not (results / "metrics" / f"{name}.json").exists():
        write_metrics(name, {}, results=results)
    for plot in _PLOTS_OF.get(result_type, ()):
        if not plot_path(plot, name, results=results).exists():
            write_plot(plot, name, (), results=results)


def write_result(result: Any, name: str, *, results: Path = RESULTS) -> Path:
    """Write a stage's result, whole or not at all; its path."""
    path = result_path(type(result), name, results=results)
    write_json(path, {"version": _FILES[type(result)].version, **dataclasses.asdict(result)})
    return path


def write_metrics(row: str, metrics: Mapping[str, Mapping[str, float]], *, results: Path = RESULTS) -> None:
    """Write what `dvc metrics` and `dvc exp show` show of a row: results/metrics/<row>.json."""
    write_json(results / "metrics" / f"{row}.json", metrics)


def plot_path(plot: str, name: str, *, results: Path = RESULTS) -> Path:
    """The table of a row or dataset that `dvc plots` draws; `plot` is one of PLOTS."""
    return results / "plots" / plot / f"{name}.csv"


def write_plot(plot: str, name: str, lines: Iterable[Sequence[object]], *, results: Path = RESULTS) -> None:
    """Write such a table. Without lines there is nothing to draw yet."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([PLOTS[plot], *lines])
    write_text(plot_path(plot, name, results=results), text.getvalue())


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """results/package.json, in a project without the code: the package that makes its results."""

    name: str
    version: str | None
    sha256: str
    """Of all its files (pipeline.provenance.package)."""


PACKAGE = RESULTS / "package.json"
"""The file of a project that says which package makes its results: what the code is in a clone to DVC."""


def write_package(package: Package, *, path: Path = PACKAGE) -> None:
    """Write results/package.json, whole or not at all."""
    write_json(path, dataclasses.asdict(package))


def names_of(result_type: type, *, results: Path = RESULTS) -> Iterator[str]:
    """The rows, datasets or weights that have such a result, sorted."""
    names = (path.stem for path in sorted((results / _FILES[result_type].stage).glob("*.json")))
    return (name for name in names if not waiting(result_type, name, results=results))


def every_result(results: Path = RESULTS) -> Iterator[Any]:
    """All results as JSON, whatever their kind and version: what a file of an earlier version names is kept too."""
    return (content for _, content in result_files(results))


def result_files(results: Path = RESULTS) -> Iterator[tuple[Path, Any]]:
    """`every_result`, each with its file."""
    stages = {file.stage for file in _FILES.values()}
    for path in sorted(results.glob("*/*.json")):
        if path.parent.name in stages and not waiting_in(path):
            yield path, read_json(path, made_by=f"dvc repro -f {path.parent.name}@{path.stem}")
