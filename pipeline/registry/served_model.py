"""A trained row in MLflow's model registry: images in, label maps, segments or instances out.

MLflow runs this file to load the model ("models from code": nothing is unpickled), with the modules below beside it,
and without this project. What it predicts is what evaluation measured: both call `pipeline.evaluation.predict.predict`
on `pipeline.data.images.resize.network_image`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import threading
import urllib.parse
from collections.abc import Iterable, Mapping
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
from m2f.inference.recorded import RecordedNetwork
from m2f.kernels.build import use
from m2f.model import build_model
from pipeline.compute.precision import allow_tf32
from pipeline.data.images.codecs import IGNORE_WIDE, decode_image, encode_masks, encode_segments
from pipeline.data.images.image_files import ImageReading, stored_image
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
    "m2f.backbones",
    "m2f.backbones.resnet",
    "m2f.backbones.swin",
    "m2f.config",
    "m2f.constants",
    "m2f.counting",
    "m2f.deformable_attention",
    "m2f.deterministic_sampling",
    "m2f.draws",
    "m2f.fapn",
    "m2f.inference",
    "m2f.inference.augmented",
    "m2f.inference.bands",
    "m2f.inference.instance",
    "m2f.inference.panoptic",
    "m2f.inference.recorded",
    "m2f.inference.semantic",
    "m2f.inference.windowed",
    "m2f.inference.windowed_objects",
    "m2f.kernels",
    "m2f.kernels.build",
    "m2f.kernels.cpu",
    "m2f.kernels.gpu",
    "m2f.kernels.triton_attention",
    "m2f.kernels.triton_labels",
    "m2f.kernels.triton_masked_attention",
    "m2f.layers",
    "m2f.mask_product",
    "m2f.model",
    "m2f.pixel_decoder",
    "m2f.query_decoder",
    "m2f.recompute",
    "m2f.types",
    "pipeline",
    "pipeline.compute",
    "pipeline.compute.precision",
    "pipeline.data",
    "pipeline.data.images",
    "pipeline.data.images.codecs",
    "pipeline.data.images.image_files",
    "pipeline.data.images.resize",
    "pipeline.evaluation",
    "pipeline.evaluation.predict",
    "pipeline.params",
    "pipeline.params.checks",
    "pipeline.params.class_names",
    "pipeline.params.load",
    "pipeline.params.parse",
    "pipeline.params.schema",
    "pipeline.params.sentences",
    "pipeline.params.shorthand",
    "pipeline.params.tasks",
    "pipeline.provenance",
    "pipeline.provenance.code",
    "pipeline.provenance.names",
    "pipeline.provenance.sources",
    "pipeline.registry",
    "pipeline.registry.served_model",
)
"""What a registered model brings of the project: all that this module imports."""

READ_BY_MODULES = ("m2f/kernels/cpu.c",)
"""Files of the project that these modules read."""

LIBRARIES = (
    "mlflow",
    "torch",
    "numpy",
    "pandas",
    "opencv-python-headless",
    "pillow",
    "safetensors",
    "pycocotools",
)
"""What they need installed; registered with the versions in use."""

COLUMN = "image"
"""What a request's column of images is called."""

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")
"""Of image files that are taken, by Pillow's names. Others are not even opened: Pillow starts programs for some."""

SMALLEST_SIDE = 32
"""Pixels that the network needs (m2f.model.Mask2Former)."""


class Refusal(MlflowException):
    """A request that is not answered, with one sentence and HTTP status 400.

    MLflow's server writes all of the request before an error's message, images included: here it has only the sentence.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)
        self.sentence = sentence

    def serialize_as_json(self) -> str:
        """What the server sends."""
        self.message = self.sentence
        text: str = super().serialize_as_json()
        return text


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
        use(settings["kernels"], device="cuda" if torch.cuda.is_available() else "cpu")
        self.test = parse(TestConfig, settings["test"], "test")
        self.class_names: list[str] = settings["class_names"]
        self.thing_ids: list[int] = settings["thing_ids"]
        self.reading = parse(ImageReading, settings["reading"], "reading")
        network = build_model(parse(ModelConfig, settings["model"], "model"))
        network.load_state_dict(load_file(context.artifacts["weights"]))
        self.model = RecordedNetwork(network)
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.one_at_a_time = threading.Lock()  # a server's threads would fill a GPU's memory together

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One dict per image, at the image's own size (h, w).

        `model_input`: the column `image` of a data frame or dict, or a list, or one image alone. An image is a file's
        bytes (PNG, JPEG, BMP, WebP, TIFF or PPM), as text in base64 or a data URI, or an (h, w, 3) uint8 RGB array.
        The parameter `png` asks for maps as PNG files, for clients over HTTP: 8 or 16 bits, and nothing is 65535.

        semantic: `labels`, (h, w) class ids, uint8 or, of over 255 classes, int64; `class_names`, by id.
        panoptic: `segments`, (h, w) int32 index into `segments_info`, -1: none; `segments_info`, by index: `class`,
            `class_id`, `is_thing`, `score`.
        instance: `instances`, best first: `class`, `class_id`, `score`, `box` (x1, y1, x2, y2 in pixels), `mask`
            (COCO's run lengths: `size`, `counts`); `size`, (height, width).

        Refusal says what is wrong with the request, or with which image.
        """
        png = bool((params or {}).get("png", False))
        images = _images(model_input)  # whatever its hint is: MLflow looks into data, or warns, for every other hint
        predictions = []
        for number, image in enumerate(images, start=1):
            try:
                predictions.append(self._predict(_decoded(image, self.reading), png))
            except ValueError as error:
                raise Refusal(f"image {number} of {len(images)} {error}") from None
        return predictions

    def _predict(self, image: np.ndarray, png: bool) -> dict[str, Any]:
        size = (image.shape[0], image.shape[1])
        shown = network_image(image, self.test)
        if self.test.pad_multiple == 1 and min(shown.shape[1:]) < SMALLEST_SIDE:
            raise ValueError(
                f"is {_pixels(size)}, and {_pixels(tuple(shown.shape[1:]))} at the size of this model's test settings; "
                f"they pad nothing, so that both sides must have {SMALLEST_SIDE} pixels there"
            )
        with self.one_at_a_time:
            allow_tf32(self.tf32)
            config = PredictConfig(test=self.test, task=self.task, thing_ids=self.thing_ids, panoptic="segments")
            original = None if self.test.window is None else torch.from_numpy(image).permute(2, 0, 1)
            predictions = predict(self.model, shown, size, config, original=original)
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


# From a request to arrays


def _images(model_input: Any) -> list[Any]:
    """The images of a request, one by one, as they were given. Refusal where it holds none, or other things too."""
    columns: Iterable[Any] | None = None
    if isinstance(model_input, pd.DataFrame):
        columns = list(model_input.columns)
        found = model_input.iloc[:, 0].tolist() if columns else []
        columns = None if columns == [0] else columns  # it was given without a name
    elif isinstance(model_input, Mapping):
        columns, found = list(model_input), next(iter(model_input.values()), None)
    else:
        found = model_input
    if columns is not None and list(columns) != [COLUMN]:
        named = ", ".join(_shortened(column) for column in columns) or "no column"
        raise Refusal(f"the request has {named}; it must have one column, called {COLUMN!r}")
    if isinstance(found, np.ndarray):
        found = found.tolist() if found.ndim < 2 else [found]
    elif isinstance(found, pd.Series):
        found = found.tolist()
    images = list(found) if isinstance(found, list | tuple) else [found]
    if not images:
        raise Refusal(f"the request has no image; give at least one, in a column called {COLUMN!r}")
    return images


def _decoded(image: Any, reading: ImageReading) -> np.ndarray:
    """(h, w, 3) uint8 RGB; ValueError, which goes on from "image 1 of 2", when it is none or is too large."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            shape = " x ".join(map(str, image.shape))
            raise ValueError(f"is an array of {shape} {image.dtype}; give height x width x 3 uint8, RGB")
        _check_size((image.shape[0], image.shape[1]), reading.max_pixels)
        return image
    if isinstance(image, str):
        data = _bytes_of(image)
    elif isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
    else:
        missing = image is None or image is pd.NA or (isinstance(image, float) and math.isnan(image))  # of data frames
        raise ValueError(f"is {'null' if missing else _named_type(image)}; {_GIVE}")
    size = _size_of(data)
    _check_size(size, reading.max_pixels)
    try:
        return decode_image(stored_image(data, "it", reading), "it")
    except ValueError as error:
        raise ValueError(f"is {_pixels(size)}, but {error}") from None


_GIVE = f"give the bytes of a file ({', '.join(FORMATS)}), in JSON as base64, or a uint8 RGB array"


def _bytes_of(text: str) -> bytes:
    """The bytes that base64 or a data URI stands for; ValueError as `_decoded`'s."""
    head, comma, body = text.partition(",")
    if comma and head.lstrip()[:5].lower() == "data:":
        if not head.rstrip().lower().endswith(";base64"):
            return urllib.parse.unquote_to_bytes(body)
        text = urllib.parse.unquote(body)
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")  # other alphabet, no padding: taken
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        if plain and len(plain) % 4 == 1 and plain.isascii() and plain.replace("+", "").replace("/", "").isalnum():
            raise ValueError(f"is base64 that is cut off: {len(plain):,} characters stand for no bytes") from None
        raise ValueError(f"is text and no base64 ({_shortened(text)}); {_GIVE}") from None


def _size_of(data: bytes) -> tuple[int, int]:
    """(height, width) as an image file's header says, nothing decoded; ValueError as `_decoded`'s."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; scale it down") from None
    except (OSError, SyntaxError, ValueError):
        begin = f"{len(data):,} bytes that begin with {data[:8]!r}" if data else "empty"
        raise ValueError(f"is {begin}, which is no image; {_GIVE}") from None
    return height, width


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ValueError(
            f"is {_pixels(size)}, {size[0] * size[1]:,} in all; this model takes at most {max_pixels:,}: scale it down"
        )


def _pixels(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]} pixels"


def _named_type(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _shortened(value: Any) -> str:
    """A value of a request in a sentence: at most 40 characters of it, for it may be a whole image."""
    text = str(value)
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _png(ids: np.ndarray) -> bytes:
    """A map of ids as a PNG file: 8 bits if they are uint8, else 16, with 65535 for nothing (-1)."""
    if ids.dtype != np.uint8:
        ids = np.where(ids < 0, IGNORE_WIDE, ids).astype(np.uint16)
    return encode_segments(ids)


mlflow.models.set_model(RegisteredModel())  # how a file that MLflow runs says what the model is
