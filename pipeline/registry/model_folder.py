"""The folder of an MLflow model: weights, settings, code and an example."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.params.schema import Row
from pipeline.registry.candidates import Candidate
from pipeline.storage.results.data import Manifest

if TYPE_CHECKING:
    from torch import nn


def served_settings(row: Row, manifest: Manifest) -> dict[str, Any]:
    """What a registered model needs besides its weights: all that decides what it predicts, at a single scale."""
    from pipeline.provenance.code import code_digest
    from pipeline.registry.served_model import PREDICTING

    return {
        "task": row.task,
        "model": asdict(row.model),
        "test": asdict(replace(row.test, ms_flip=None)),
        "tf32": row.train.tf32,
        "kernels": row.train.kernels_of_predictions,
        "class_names": list(manifest.class_names_of(row.task)),
        "thing_ids": manifest.thing_ids_of(row.task),
        "reading": {
            "exif": manifest.settings.get("exif", "apply"),
            "value_range": manifest.settings.get("value_range"),
            "max_pixels": row.max_served_pixels,
        },
        "code": code_digest(PREDICTING),
    }


def trained_network(row: Row, candidate: Candidate) -> nn.Module:
    """The network of a checkpoint; ValueError when the file is gone, altered or of another run."""
    from m2f.model import build_model
    from pipeline.runs.checkpoints import check_digest, load_checkpoint
    from pipeline.storage.root import stored

    path = stored(candidate.checkpoint, made_by=f"dvc repro -f train@{row.name}")
    check_digest(path, candidate.sha256, row=row.name)
    network = build_model(row.model)
    load_checkpoint(path, model=network, run_key=candidate.run_key, digest=candidate.sha256)
    return network


def save_model(
    path: Path,
    network: nn.Module,
    settings: Mapping[str, Any],
    *,
    run_id: str | None = None,
    model_id: str | None = None,
) -> None:
    """Write a network as an MLflow model folder: weights alone, `served_settings`, and the code that predicts."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ParamSchema, ParamSpec
    from safetensors.torch import save_file

    from pipeline.registry.served_model import LIBRARIES
    from pipeline.storage.files import whole_file, write_json

    own = ["torchvision"] if settings["model"]["pixel_decoder"]["name"] == "fapn" else []  # m2f.fapn
    with tempfile.TemporaryDirectory() as folder:
        weights, served, code = (Path(folder) / part for part in ("weights.safetensors", "settings.json", "code"))
        with whole_file(weights) as partial:  # which everybody may read
            save_file({name: value.contiguous() for name, value in network.state_dict().items()}, partial)
        write_json(served, settings)
        copy_code(code)
        mlflow.pyfunc.save_model(
            path=str(path),
            mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
            python_model=str(code / "pipeline" / "registry" / "served_model.py"),
            artifacts={"weights": str(weights), "settings": str(served)},
            code_paths=[str(code / "m2f"), str(code / "pipeline")],
            # no schema of what comes in: the model looks itself, and its refusals are shorter than MLflow's
            signature=ModelSignature(
                outputs=_predictions(settings["task"]), params=ParamSchema([ParamSpec("png", "boolean", False)])
            ),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in (*LIBRARIES, *own)],
            metadata={key: settings[key] for key in ("task", "class_names", "thing_ids")},
            input_example=_example(),
        )


def _predictions(task: str) -> Any:
    """MLflow's schema of what the model predicts for an image (served_model.RegisteredModel.predict); the parameter png
    makes text of the maps."""
    from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

    def thing(**types: Any) -> Array:
        return Array(Object([Property(name, dtype) for name, dtype in types.items()]))

    whole, real, text, yes = DataType.long, DataType.double, DataType.string, DataType.boolean
    if task == "semantic":
        columns = {"labels": Array(Array(whole)), "class_names": Array(text)}
    elif task == "panoptic":
        info = thing(**{"class": text}, class_id=whole, is_thing=yes, score=real)
        columns = {"segments": Array(Array(whole)), "segments_info": info}
    else:
        mask = Object([Property("size", Array(whole)), Property("counts", text)])
        found = thing(**{"class": text}, class_id=whole, score=real, box=Array(real), mask=mask)
        columns = {"instances": found, "size": Array(whole)}
    return Schema([ColSpec(dtype, name) for name, dtype in columns.items()])


def _example() -> Any:
    """A picture of 64 x 96 that is nobody's, as a client would send it."""
    import cv2
    import numpy as np
    import pandas as pd

    rows, columns = np.mgrid[:64, :96]
    image = np.stack((4 * rows, 2 * columns, 2 * (rows + 32)), axis=2).astype(np.uint8)
    return pd.DataFrame({"image": [cv2.imencode(".png", image)[1].tobytes()]})


def copy_code(folder: Path) -> None:
    """The modules that a registered model needs, in their packages below `folder`, and the files that they read."""
    from pipeline.provenance.sources import PROJECT, source_file
    from pipeline.registry.served_model import MODULES, READ_BY_MODULES

    for source in (*map(source_file, MODULES), *(PROJECT / file for file in READ_BY_MODULES)):
        assert source is not None
        target = folder / source.relative_to(PROJECT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _public_version(library: str) -> str:
    """The installed version as a package index knows it, without a local part (2.9.0+cu128)."""
    return importlib.metadata.version(library).partition("+")[0]
