"""A trained network by the name that a user gives: a row, a registered model, or a checkpoint file."""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.images.image_files import ImageReading
from pipeline.params.schema import Params, Row
from pipeline.params.shorthand import trained_classes
from pipeline.prediction.network import TrainedNetwork, Version
from pipeline.registry.candidates import candidates
from pipeline.storage.results.folder import find_result, read_result
from pipeline.storage.results.rows import Evaluation, TrainedSeed, TrainingResult, Which
from pipeline.storage.root import stored

if TYPE_CHECKING:
    from collections.abc import Mapping

REGISTERED = "models:/"
"""How the address of a registered model begins, with an alias or a version: models:/ade20k-r50@best, models:/name/3."""


def open_source(
    source: str, *, params: Params, row: str | None = None, seed: int | None = None, checkpoint: Which | None = None
) -> TrainedNetwork:
    """The network that `source` names: a row of params.yaml, `models:/name@alias`, or a file with the row it is of.

    Of a row: of `seed` or, without one, the best seed as evaluated; its `checkpoint`, by default the one that decides
    the row's figure. ValueError says in a sentence what is wrong, also with what belongs to another sort of source.
    A registered model is run by the code that is here, with a warning where it was registered with other code.
    """
    path = Path(source)
    if source.startswith(REGISTERED):
        _refuse(source, "a registered model", row=row, seed=seed, checkpoint=checkpoint)
        return _registered(source, params)
    if source in params.rows:
        _refuse(source, "a row", row=row)
        return _of_row(params.row(source), params, seed, checkpoint)
    if path.is_file() or path.is_dir():
        _refuse(source, "a file", seed=seed, checkpoint=checkpoint)
        if row is None:
            raise ValueError(f"{source} is a checkpoint file; say with --row which row's network it is of")
        return _of_file(path, params.row(row), params)
    if row is not None or "." in source or "/" in source:  # no row's name has these
        raise ValueError(f"{source} is not there; give a checkpoint file, a row, or models:/name@alias")
    try:
        params.row(source)
    except ValueError as error:
        raise ValueError(f"{source} is no file, no registered model (models:/name@alias) and no row: {error}") from None
    raise AssertionError(source)


def _refuse(source: str, what: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name} is not for {what}, which {source} is; leave it out")


# A row


def _of_row(row: Row, params: Params, seed: int | None, checkpoint: Which | None) -> TrainedNetwork:
    trained = read_result(TrainingResult, row.name)
    evaluated = find_result(Evaluation, row.name)
    chosen = _chosen_seed(row, trained, evaluated, seed)
    which: Which = checkpoint or ("best" if row.checkpoint_rule == "best" else "last")
    assert chosen.checkpoints is not None
    found = chosen.checkpoints[which]
    from pipeline.runs.checkpoints import check_digest, load_checkpoint

    path = stored(f"{chosen.run_dir}/{found.path}", made_by=f"dvc repro -f train@{row.name}")
    check_digest(path, found.sha256, row=row.name)
    network = _empty(row, params)
    load_checkpoint(path, model=network.network, digest=found.sha256)
    said = f"seed {chosen.seed} of {row.name}, {which} checkpoint, step {found.step}"
    return replace(network, description=said, digest=found.sha256, run_key=chosen.run_key)


def _chosen_seed(row: Row, trained: TrainingResult, evaluated: Evaluation | None, seed: int | None) -> TrainedSeed:
    """The seed that is asked for, else the best as evaluated or, where that was not done, at its last validation."""
    finished = {each.seed: each for each in trained.seeds if each.checkpoints is not None}
    if not finished:
        raise ValueError(f"no seed of row {row.name} has finished; train it with: dvc repro -f train@{row.name}")
    if seed is not None:
        if seed not in finished:
            there = ", ".join(map(str, finished))
            raise ValueError(f"seed {seed} of row {row.name} has not finished; there are the seeds {there}")
        return finished[seed]
    if evaluated is not None and len(finished) > 1:
        best = candidates(evaluated, trained)[-1]
        return next(each for each in finished.values() if each.run_key == best.run_key)
    from pipeline.params.tasks import primary

    first = primary(row.task)
    return max(finished.values(), key=lambda each: each.metrics.get(first) or 0.0)


def _empty(row: Row, params: Params) -> TrainedNetwork:
    """A row's network with weights of nobody's."""
    from m2f.model import build_model

    dataset = params.dataset(row.dataset)
    _, names = trained_classes(dataset, row.task)
    return TrainedNetwork(
        description="",
        digest="",
        network=build_model(row.model).eval(),
        row=row,
        task=row.task,
        test=replace(row.test, ms_flip=None),
        class_names=names,
        thing_ids=[place for place, name in enumerate(names) if name in dataset.thing_classes],
        reading=ImageReading.of(dataset),
        tf32=row.train.tf32,
        kernels=row.train.kernels_of_predictions,
    )


# A file


def _of_file(path: Path, row: Row, params: Params) -> TrainedNetwork:
    from m2f.weights import load_any
    from pipeline.runs.checkpoints import read_header
    from pipeline.storage.digests import checkpoint_digest

    network = _empty(row, params)
    network.network.load_state_dict(load_any(path, row.model))
    run_key = None
    with suppress(ValueError):  # another project's
        run_key = str(read_header(path)["run_key"])
    return replace(network, description=f"{path.name} as {row.name}", digest=checkpoint_digest(path), run_key=run_key)


# A registered model


def _registered(source: str, params: Params) -> TrainedNetwork:
    """ValueError where the registry does not answer or has no such model."""
    from pipeline.tracking.client import mlflow_client, shown_uri, tracking_uri

    name, _, alias = source.removeprefix(REGISTERED).partition("@")
    name, _, number = name.partition("/")
    if not alias and not number.isdecimal():
        raise ValueError(f"{source} names no version; write models:/{name}@best, or a number: models:/{name}/1")
    try:
        client = mlflow_client()  # before any other import of MLflow, which reads its settings once
        from mlflow.artifacts import download_artifacts

        if alias:
            version = client.get_model_version_by_alias(name, alias)
        else:
            version = client.get_model_version(name, number)
        with tempfile.TemporaryDirectory(prefix="m2f-") as folder:
            model = client.get_logged_model(str(version.source).removeprefix(REGISTERED))
            place = Path(download_artifacts(model.artifact_location, dst_path=folder, tracking_uri=tracking_uri()))
            if "row" not in version.tags or not (place / "artifacts" / "settings.json").is_file():
                raise ValueError(
                    f"{source} was not registered by this project; name a model that dvc repro register made"
                )
            network = _of_model_folder(place / "artifacts", source, version.tags, params)
    except ValueError:
        raise
    except Exception as error:  # sqlalchemy's and MLflow's own, of many classes
        reason = " ".join(str(error).replace(tracking_uri(), shown_uri()).split())[:300]
        raise ValueError(
            f"{source} cannot be had from {shown_uri()} ({reason}); dvc repro register@<row> registers a row's models, "
            "and MLFLOW_TRACKING_URI names the server"
        ) from None
    registered = Version(name, str(version.version), model.model_id)
    return replace(network, description=f"{source}, version {version.version}", version=registered)


def _of_model_folder(folder: Path, source: str, tags: Mapping[str, str], params: Params) -> TrainedNetwork:
    """The network of a registered model's weights.safetensors and settings.json, run by the code that is here."""
    from safetensors.torch import load_file

    from m2f.config import ModelConfig
    from m2f.model import build_model
    from pipeline.params.parse import parse
    from pipeline.params.schema import TestConfig
    from pipeline.storage.files import read_json, sha256

    settings: dict[str, Any] = read_json(folder / "settings.json", made_by="dvc repro -f register@<row>")
    _warn_of_other_code(source, settings["code"])
    config = parse(ModelConfig, settings["model"], f"{source}: model")
    network = build_model(config).eval()
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    test = parse(TestConfig, settings["test"], f"{source}: test")
    row = params.rows.get(tags["row"])
    return TrainedNetwork(
        description="",
        digest=sha256(folder / "weights.safetensors"),
        network=network,
        row=None if row is None else replace(row, task=settings["task"], model=config, test=test),
        task=settings["task"],
        test=test,
        class_names=settings["class_names"],
        thing_ids=settings["thing_ids"],
        reading=parse(ImageReading, settings["reading"], f"{source}: reading"),
        tf32=settings["tf32"],
        kernels=settings["kernels"],
        run_key=tags.get("run_key"),
    )


def _warn_of_other_code(source: str, registered: str) -> None:
    from pipeline.provenance.code import code_digest
    from pipeline.registry.served_model import PREDICTING

    if registered != code_digest(PREDICTING):
        print(
            f"warning: {source} was registered with other code than this, which may predict differently",
            file=sys.stderr,
        )
