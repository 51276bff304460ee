"""A trained row in MLflow's model registry: pictures in, label maps, segments or instances out.

MLflow runs this file to load the model ("models from code": nothing is unpickled), with the modules below beside it,
and without this project. What it predicts is what evaluation measured: both call `pipeline.evaluation.predict.predict`
on `pipeline.data.images.resize.network_image`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from m2f.config import ModelConfig
from m2f.kernels.build import use
from m2f.model import build_model
from pipeline.compute.precision import allow_tf32
from pipeline.data.images.codecs import IGNORE_WIDE, decode_image, encode_masks, encode_segments
from pipeline.data.images.resize import network_image
from pipeline.evaluation.predict import PredictConfig, Predictions, predict
from pipeline.params.parse import parse
from pipeline.params.schema import TestConfig
from pipeline.provenance.code import Code, code_digest
from pipeline.provenance.sources import PROJECT

PREDICTING = Code(
    roots=("pipeline.registry.served_model.RegisteredModel",),
    left_out={
        "m2f.kernels.build": "compiles loops whose digest counts (m2f.kernels.cpu.LOOPS)",
        "pipeline.params": "values of settings are registered with the model",
        "pipeline.provenance": "says where a number came from",
    },
    settings="pipeline.params.schema.TestConfig",
)
"""The definitions that decide what a registered model predicts."""

MODULES = (
    "m2f",
    "m2f.augmented_inference",
    "m2f.backbones",
    "m2f.backbones.resnet",
    "m2f.backbones.swin",
    "m2f.config",
    "m2f.deformable_attention",
    "m2f.draws",
    "m2f.inference",
    "m2f.kernels",
    "m2f.kernels.build",
    "m2f.kernels.cpu",
    "m2f.layers",
    "m2f.model",
    "m2f.pixel_decoder",
    "m2f.query_decoder",
    "m2f.types",
    "pipeline",
    "pipeline.compute",
    "pipeline.compute.precision",
    "pipeline.data",
    "pipeline.data.images",
    "pipeline.data.images.codecs",
    "pipeline.data.images.resize",
    "pipeline.evaluation",
    "pipeline.evaluation.predict",
    "pipeline.params",
    "pipeline.params.checks",
    "pipeline.params.class_names",
    "pipeline.params.load",
    "pipeline.params.parse",
    "pipeline.params.schema",
    "pipeline.params.shorthand",
    "pipeline.provenance",
    "pipeline.provenance.code",
    "pipeline.provenance.names",
    "pipeline.provenance.sources",
    "pipeline.registry",
    "pipeline.registry.served_model",
)
"""What a registered model brings of the project: all that this module imports."""

LIBRARIES = (
    "mlflow",
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "opencv-python-headless",
    "safetensors",
    "pycocotools",
)
"""What they need installed; registered with the versions in use."""


class RegisteredModel(PythonModel):
    """The network of one checkpoint with the row's test settings, on the GPU if there is one."""

    def load_context(self, context: Any) -> None:
        """Build the network. ValueError when this process has imported other code of the same names."""
        from safetensors.torch import load_file

        settings = json.loads(Path(context.artifacts["settings"]).read_text(encoding="utf-8"))
        if code_digest(PREDICTING) != settings["code"]:
            raise ValueError(
                f"this process has imported m2f and pipeline from {PROJECT}, which are not the code that the model was "
                "registered with, and might predict differently; load it in a process of its own, before them"
            )
        self.task = settings["task"]
        self.tf32 = settings["tf32"]
        use(settings["kernels"])
        self.test = parse(TestConfig, settings["test"], "test")
        self.class_names: list[str] = settings["class_names"]
        self.thing_ids: list[int] = settings["thing_ids"]
        self.model = build_model(parse(ModelConfig, settings["model"], "model"))
        self.model.load_state_dict(load_file(context.artifacts["weights"]))
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.one_at_a_time = threading.Lock()  # a server's threads would fill a GPU's memory together

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One dict per picture, at the picture's own size (h, w).

        `model_input`: a data frame whose first column holds encoded pictures (PNG, JPEG and what else OpenCV reads;
        bytes, or as text in base64), or (h, w, 3) uint8 RGB arrays. MLflow makes it of a list of encoded pictures too.
        The parameter `png` asks for maps as PNG files, for clients over HTTP: 8 or 16 bits, and nothing is 65535.

        semantic: `labels`, (h, w) class ids, uint8 or, of over 255 classes, int64; `class_names`, by id.
        panoptic: `segments`, (h, w) int32 index into `segments_info`, -1: none; `segments_info`, by index: `class`,
            `class_id`, `is_thing`, `score`.
        instance: `instances`, best first: `class`, `class_id`, `score`, `box` (x1, y1, x2, y2 in pixels), `mask`
            (COCO's run lengths: `size`, `counts`); `size`, (height, width).

        MlflowException of one sentence, HTTP status 400, names the picture that is none.
        """
        png = bool((params or {}).get("png", False))
        images = model_input.iloc[:, 0].tolist()
        predictions = []
        for number, image in enumerate(images, start=1):
            try:
                predictions.append(self._predict(_decoded(image), png))
            except ValueError as error:
                raise MlflowException(
                    f"picture {number} of {len(images)} {error}", error_code=INVALID_PARAMETER_VALUE
                ) from None
        return predictions

    def _predict(self, image: np.ndarray, png: bool) -> dict[str, Any]:
        size = (image.shape[0], image.shape[1])
        with self.one_at_a_time:
            allow_tf32(self.tf32)
            config = PredictConfig(test=self.test, task=self.task, thing_ids=self.thing_ids, segments_only=True)
            predictions = predict(self.model, network_image(image, self.test), size, config)
        if self.task == "instance":
            return {"instances": self._instances(predictions), "size": list(size)}
        if self.task == "panoptic":
            assert predictions.segments is not None
            segments = predictions.segments.segments.cpu().numpy()
            return {
                "segments": _png(segments) if png else segments,
                "segments_info": self._segments(predictions),
            }
        assert predictions.labels is not None
        labels = predictions.labels.cpu().numpy()
        return {"labels": _png(labels) if png else labels, "class_names": self.class_names}

    def _segments(self, predictions: Predictions) -> list[dict[str, Any]]:
        assert predictions.segments is not None
        found = predictions.segments
        return [
            {"class": self.class_names[class_id], "class_id": class_id, "is_thing": is_thing, "score": score}
            for class_id, is_thing, score in zip(
                found.labels.tolist(), found.is_thing.tolist(), found.scores.tolist(), strict=True
            )
        ]

    def _instances(self, predictions: Predictions) -> list[dict[str, Any]]:
        assert predictions.instances is not None
        found = predictions.instances
        masks = encode_masks(found.masks.cpu().numpy())
        return [
            {
                "class": self.class_names[class_id],
                "class_id": class_id,
                "score": score,
                "box": box,
                "mask": {"size": mask["size"], "counts": mask["counts"].decode("ascii")},  # text, for JSON
            }
            for class_id, score, box, mask in zip(
                found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), masks, strict=True
            )
        ]


def _decoded(image: Any) -> np.ndarray:
    """(h, w, 3) uint8 RGB; ValueError, which goes on from "picture 1 of 2", when it is no picture."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            shape = " x ".join(map(str, image.shape))
            raise ValueError(f"is an array of {shape} {image.dtype}; give height x width x 3 uint8, RGB")
        return image
    if not isinstance(image, (str, bytes, bytearray, memoryview)):
        raise ValueError(
            f"is {type(image).__name__}; give a picture file's bytes, in JSON as base64, or a uint8 RGB array"
        )
    data = image.encode() if isinstance(image, str) else bytes(image)
    with contextlib.suppress(ValueError):
        return decode_image(data, "")
    # MLflow decodes the base64 of a data frame's column, and not that of `inputs`
    with contextlib.suppress(ValueError):
        return decode_image(base64.b64decode(b"".join(data.split()), validate=True), "")
    raise ValueError("is no whole picture that OpenCV reads, neither as it is nor as base64")


def _png(ids: np.ndarray) -> bytes:
    """A map of ids as a PNG file: 8 bits if they are uint8, else 16, with 65535 for nothing (-1)."""
    if ids.dtype != np.uint8:
        ids = np.where(ids < 0, IGNORE_WIDE, ids).astype(np.uint16)
    return encode_segments(ids)


mlflow.models.set_model(RegisteredModel())  # how a file that MLflow runs says what the model is
