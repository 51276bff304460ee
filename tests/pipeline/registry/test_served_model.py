"""A registered model: the same predictions as evaluation, to the last bit, wherever and however it is loaded."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from pycocotools import mask as coco_mask
from safetensors import safe_open

from m2f.kernels.build import use
from pipeline.evaluation.predict import Predictions
from pipeline.evaluation.task_metrics import predict_images
from pipeline.params.schema import MsFlipConfig, Row
from pipeline.provenance.code import code_digest
from pipeline.registry.candidates import candidates
from pipeline.registry.model_folder import save_model, served_settings, trained_network
from pipeline.registry.register import register
from pipeline.registry.served_model import LIBRARIES, MODULES, PREDICTING, Refusal, _png
from pipeline.runs.checkpoints import load_checkpoint
from pipeline.storage.results.data import Manifest
from tests.helpers.images import encoded, image
from tests.helpers.imports import imported, reached
from tests.helpers.registered import SIZES, decided_network, manifest_of, results_of, row_of
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S, answers, until

TASKS = ("semantic", "panoptic", "instance")


@pytest.fixture(autouse=True)
def search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow puts the code of every model that is loaded in front of the search path."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def saved(row: Row, manifest: Manifest, storage: Path, folder: Path) -> Path:
    """The folder of a registered model of the row."""
    (candidate,) = candidates(**results_of(row, storage, {4: 0.5}))
    save_model(folder, trained_network(row, candidate), served_settings(row, manifest))
    return folder


def predicted_in_evaluation(row: Row, manifest: Manifest, storage: Path) -> list[Predictions]:
    """What evaluation makes of the row's checkpoint."""
    model = decided_network(row, seed=0)
    load_checkpoint(storage / "runs/run4/checkpoints/step-00000002.safetensors", model=model, run_key="run4")
    places = range(manifest.splits["val"].records)
    return [predictions for _, predictions in predict_images(model, manifest, row, places=places)]


def assert_same(served: dict[str, Any], predictions: Predictions, task: str) -> int:
    """Compares all that is predicted of a picture; returns how much was found."""
    if task == "semantic":
        assert predictions.labels is not None and served["labels"].dtype == np.uint8
        assert np.array_equal(served["labels"], predictions.labels.numpy())
        assert served["class_names"] == ["sky", "road", "car"]
        return len(np.unique(served["labels"]))
    if task == "panoptic":
        assert predictions.segments is not None and served["segments"].dtype == np.int32
        assert np.array_equal(served["segments"], predictions.segments.segments.numpy())
        found = served["segments_info"]
        assert [entry["class_id"] for entry in found] == predictions.segments.labels.tolist()
        assert [entry["score"] for entry in found] == predictions.segments.scores.tolist()
        assert all(entry["is_thing"] == (entry["class"] == "car") for entry in found)
        return len(found)
    assert predictions.instances is not None
    found = served["instances"]
    masks = [coco_mask.decode(entry["mask"]) for entry in found]
    assert np.array_equal(np.stack(masks), predictions.instances.masks.numpy())
    assert [entry["score"] for entry in found] == predictions.instances.scores.tolist()
    assert [entry["box"] for entry in found] == predictions.instances.boxes.tolist()
    assert {(entry["class"], entry["class_id"]) for entry in found} == {("car", 0)}
    assert served["size"] == list(predictions.instances.masks.shape[1:])
    return len(found)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("pad_multiple", [32, 1], ids=["padded", "not padded"])
def test_its_predictions_are_those_that_evaluation_measures(
    task: str, pad_multiple: int, small_row: Row, storage: Path, tmp_path: Path
) -> None:
    row = row_of(task, small_row, pad_multiple=pad_multiple)
    sizes = SIZES if pad_multiple == 32 else SIZES[:3]  # unpadded pictures must have sides of 32 themselves
    manifest = manifest_of(storage, sizes)
    model = mlflow.pyfunc.load_model(str(saved(row, manifest, storage, tmp_path / "model")))
    arrays = [image(*size, seed=seed) for seed, size in enumerate(sizes)]
    files = [encoded(array) for array in arrays]
    evaluated = predicted_in_evaluation(row, manifest, storage)
    found = [assert_same(*pair, task) for pair in zip(model.predict(files), evaluated, strict=True)]
    assert max(found) > 1, "something must be found for the comparison to mean anything"
    for given in (
        {"image": [arrays[1]]},
        pd.DataFrame({"image": [arrays[1]]}),
        base64.b64encode(files[1]).decode(),
        files[1],
    ):
        (served,) = model.predict(given)
        assert_same(served, evaluated[1], task)


def test_a_model_of_a_row_with_ms_flip_predicts_at_a_single_scale(
    small_row: Row, storage: Path, tmp_path: Path
) -> None:

    plain = row_of("semantic", small_row)
    both = row_of("semantic", small_row, ms_flip=MsFlipConfig(short_sides=(40, 70), long_side_max=200))
    manifest = manifest_of(storage)
    assert served_settings(both, manifest) == served_settings(plain, manifest)


def test_maps_can_be_had_as_png_files(small_row: Row, storage: Path, tmp_path: Path) -> None:
    manifest = manifest_of(storage)
    images = [encoded(image(67, 101))]
    for task, name in (("semantic", "labels"), ("panoptic", "segments")):
        model = mlflow.pyfunc.load_model(str(saved(row_of(task, small_row), manifest, storage, tmp_path / task)))
        (plain,), (packed,) = model.predict(images), model.predict(images, params={"png": True})
        read = cv2.imdecode(np.frombuffer(packed[name], np.uint8), cv2.IMREAD_UNCHANGED).astype(np.int64)
        assert np.array_equal(np.where(read == 65535, -1, read), plain[name])
    # no segment, the 300th of 301 classes: 16 bits hold both
    read = cv2.imdecode(np.frombuffer(_png(np.array([[-1, 300]])), np.uint8), cv2.IMREAD_UNCHANGED)
    assert read.tolist() == [[65535, 300]]


@pytest.fixture(scope="module")
def unpadded(small_row: Row, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A loaded model whose pictures are not padded."""
    folder = tmp_path_factory.mktemp("unpadded")
    row = row_of("semantic", small_row, pad_multiple=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M2F_STORAGE", str(folder))
        patch.setattr(sys, "path", list(sys.path))
        return mlflow.pyfunc.load_model(str(saved(row, manifest_of(folder), folder, folder / "model")))


GIVE = "give the bytes of a file (PNG, JPEG, BMP, WEBP, TIFF, PPM), in JSON as base64, or a uint8 RGB array"
PNG = encoded(image(64, 96))
TEXT = base64.b64encode(PNG).decode()


def png_of_size(width: int, height: int) -> bytes:
    """A file whose header says so, and which holds no pixel."""
    chunks = [b"IHDR" + struct.pack(">II5B", width, height, 8, 2, 0, 0, 0), b"IDAT"]
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (b"hello", f"is 5 bytes that begin with b'hello', which is no image; {GIVE}"),
        (b"", f"is empty, which is no image; {GIVE}"),
        ("", f"is empty, which is no image; {GIVE}"),
        ("data:image/png;base64,", f"is empty, which is no image; {GIVE}"),
        (base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode(), "is 23 bytes that begin with b'%!PS-Ado', which is no"),
        # a torn file would be filled with grey
        (encoded(image(64, 96), ".jpg")[:-300], "is 96 x 64 pixels, but it does not decode ("),
        (TEXT[: len(TEXT) // 2], "is 96 x 64 pixels, but it does not decode ("),
        (TEXT[:401], "is base64 that is cut off: 401 characters stand for no bytes"),
        ("no base64!", f"is text and no base64 ('no base64!'); {GIVE}"),
        ("http://here/a.png", "is text and no base64 ('http://here/a.png'); give the bytes of a file"),
        (300 * "ä", f"is text and no base64 ('{40 * 'ä'}...'); {GIVE}"),
        (None, f"is null; {GIVE}"),
        (float("nan"), f"is null; {GIVE}"),
        (7, f"is a number; {GIVE}"),
        (True, f"is a boolean; {GIVE}"),
        ([[1, 2], [3, 4]], f"is a list; {GIVE}"),
        ({"b64": TEXT}, f"is an object; {GIVE}"),
        (image(4, 5).astype(np.float32), "is an array of 4 x 5 x 3 float32; give height x width x 3 uint8, RGB"),
        (image(4, 5)[..., 0], "is an array of 4 x 5 uint8; give height x width x 3 uint8, RGB"),
        (np.zeros((0, 5, 3), np.uint8), "is an array of 0 x 5 x 3 uint8; give height x width x 3 uint8, RGB"),
        # a long side of 200 at most: 2 x 400 is shown as 1 x 200
        (image(2, 400), "is 400 x 2 pixels, and 200 x 1 pixels at the size of this model's test settings; they"),
        # decoded they would take 4.8 GB, and 240 MB
        (png_of_size(40_000, 40_000), "has more than 178,956,970 pixels; scale it down"),
        (png_of_size(10_000, 8_000), "is 10000 x 8000 pixels, 80,000,000 in all; this model takes at most"),
        (np.broadcast_to(np.uint8(0), (10_000, 8_000, 3)), "is 8000 x 10000 pixels, 80,000,000 in all; this"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_one_sentence_with_status_400(given: Any, sentence: str, unpadded: Any) -> None:
    with pytest.raises(MlflowException) as raised:
        unpadded.predict(pd.DataFrame({"image": [PNG, given]}))
    assert raised.value.message.startswith(f"image 2 of 2 {sentence}")
    assert raised.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"picture": [TEXT]}, "the request has 'picture'; it must have one column, called 'image'"),
        (pd.DataFrame({"image": [TEXT], "mask": [TEXT]}), "the request has 'image', 'mask'; it must have one column"),
        # a table without a head, whose first line is taken for the head
        (pd.DataFrame(columns=[TEXT]), f"the request has '{TEXT[:40]}...'; it must have one column, called 'image'"),
        (pd.DataFrame([[TEXT, TEXT]]), "the request has '0', '1'; it must have one column, called 'image'"),
        ({}, "the request has no column; it must have one column, called 'image'"),
        (pd.DataFrame({"image": []}), "the request has no image; give at least one, in a column called 'image'"),
        ([], "the request has no image; give at least one, in a column called 'image'"),
        (None, f"image 1 of 1 is null; {GIVE}"),
        (5, f"image 1 of 1 is a number; {GIVE}"),
        (np.array(5), f"image 1 of 1 is a number; {GIVE}"),
        ([TEXT, None], f"image 2 of 2 is null; {GIVE}"),
        (np.zeros((2, 4, 5, 3), np.uint8), "image 1 of 1 is an array of 2 x 4 x 5 x 3 uint8; give height x width x 3"),
    ],
)
def test_a_request_of_another_form_is_one_sentence(given: Any, sentence: str, unpadded: Any) -> None:
    with pytest.raises(MlflowException) as raised:
        unpadded.predict(given)
    assert raised.value.message.startswith(sentence)
    assert raised.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    "given",
    [
        [PNG],
        PNG,
        TEXT,
        [f"data:image/png;base64,{TEXT}"],
        f"DATA:image/png;charset=utf-8;base64,{urllib.parse.quote(TEXT)}",
        f"data:image/png,{urllib.parse.quote_from_bytes(PNG)}",
        base64.encodebytes(PNG).decode(),  # lines of 76 characters
        base64.urlsafe_b64encode(PNG).decode().rstrip("="),
        {"image": TEXT},
        {"image": np.array([TEXT])},
        pd.Series([PNG]),
        pd.DataFrame([[TEXT]]),
        (memoryview(PNG),),
        image(64, 96),
    ],
)
def test_an_image_may_be_given_in_any_of_these_forms(given: Any, unpadded: Any) -> None:
    (expected,) = unpadded.predict(pd.DataFrame({"image": [PNG]}))
    (found,) = unpadded.predict(given)
    assert np.array_equal(found["labels"], expected["labels"]) and len(np.unique(found["labels"])) > 1


def test_the_rows_setting_limits_the_pixels_of_an_image(small_row: Row, storage: Path, tmp_path: Path) -> None:
    row = dataclasses.replace(row_of("semantic", small_row), max_served_pixels=64 * 96)
    model = mlflow.pyfunc.load_model(str(saved(row, manifest_of(storage), storage, tmp_path / "model")))
    assert len(model.predict([PNG])) == 1
    with pytest.raises(
        MlflowException, match=r"is 97 x 64 pixels, 6,208 in all; this model takes at most 6,144: scale"
    ):
        model.predict([encoded(image(64, 97))])


def test_a_refusal_says_nothing_but_its_sentence_whatever_a_server_writes_before_it() -> None:
    refusal = Refusal("image 1 of 1 is null")
    refusal.message = f"Failed to predict data '{TEXT}'. {refusal.message}"
    sent = json.loads(refusal.serialize_as_json())
    assert sent["message"] == "image 1 of 1 is null" and sent["error_code"] == "INVALID_PARAMETER_VALUE"


WITHOUT_PROJECT = """
import importlib.util, json, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
assert importlib.util.find_spec("m2f") is None and importlib.util.find_spec("pipeline") is None
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
(served,) = model.predict([open(sys.argv[2], "rb").read()])
import m2f, pipeline.evaluation.predict
from m2f.kernels.build import use
files = [m2f.__file__, pipeline.evaluation.predict.__file__]
heavy = ("ray", "albumentations", "dvc", "pipeline.data.loader.train_batches")
loaded = [name for name in heavy if name in sys.modules]
print(json.dumps({"segments": served["segments"].tolist(), "files": files, "loaded": loaded, "kernels": use("auto")}))
"""


@pytest.mark.slow
def test_it_loads_where_this_project_is_not_and_unpickles_nothing(
    small_row: Row, storage: Path, tmp_path: Path
) -> None:
    row, manifest = row_of("panoptic", small_row), manifest_of(storage)
    folder = saved(row, manifest, storage, tmp_path / "model")
    (tmp_path / "picture.png").write_bytes(encoded(image(67, 101)))
    (expected,) = mlflow.pyfunc.load_model(str(folder)).predict([encoded(image(67, 101))])
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command = [sys.executable, "-I", "-c", WITHOUT_PROJECT, str(folder), str(tmp_path / "picture.png")]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert answer.returncode == 0, answer.stderr
    seen = json.loads(answer.stdout.splitlines()[-1])
    assert np.array_equal(seen["segments"], expected["segments"])
    assert seen["files"] == [str(folder / "code/m2f/__init__.py"), str(folder / "code/pipeline/evaluation/predict.py")]
    assert seen["loaded"] == []
    assert seen["kernels"] == use("auto"), answer.stderr  # compiled where there is a C compiler, as in evaluation


def test_a_model_holds_weights_settings_and_code_and_nothing_else(
    small_row: Row, storage: Path, tmp_path: Path
) -> None:
    row = row_of("semantic", small_row)
    folder = saved(row, manifest_of(storage), storage, tmp_path / "model")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert not {file for file in files if file.endswith((".pkl", ".pickle", ".pt", ".pth"))}
    assert {file for file in files if file.startswith("artifacts/")} == {
        "artifacts/settings.json", "artifacts/weights.safetensors"
    }  # fmt: skip
    with safe_open(folder / "artifacts/weights.safetensors", "pt") as weights:
        assert set(weights.keys()) == set(decided_network(row).state_dict())  # no optimiser
    mode = (folder / "artifacts/weights.safetensors").stat().st_mode
    assert mode & 0o777 == (folder / "artifacts/settings.json").stat().st_mode & 0o777  # not only its maker's
    pins = (folder / "requirements.txt").read_text().split()
    assert {pin.partition("==")[0] for pin in pins} == set(LIBRARIES)
    assert all("==" in pin and "+" not in pin for pin in pins)
    example = json.loads((folder / "serving_input_example.json").read_text())
    ((text,),) = example["dataframe_split"]["data"]
    assert cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_COLOR).shape == (64, 96, 3)


def test_a_model_with_other_code_than_the_process_has_imported_is_refused(
    small_row: Row, storage: Path, tmp_path: Path
) -> None:
    folder = saved(row_of("semantic", small_row), manifest_of(storage), storage, tmp_path / "model")
    path = folder / "artifacts/settings.json"
    path.write_text(path.read_text().replace(code_digest(PREDICTING), "another"))
    with pytest.raises(ValueError, match="which are not the code that the model was registered with, .* of its own"):
        mlflow.pyfunc.load_model(str(folder))


def test_the_code_registered_with_a_model_is_what_it_imports() -> None:
    assert reached("pipeline.registry.served_model") == set(MODULES)
    names = {"cv2": "opencv-python-headless", "PIL": "pillow"}
    used = {
        names.get(top, top)
        for module in reached("pipeline.registry.served_model")
        for name in imported(module)
        if (top := name.partition(".")[0]) not in sys.stdlib_module_names | {"m2f", "pipeline", ""}
    }
    # params.yaml is not read, Triton comes with torch for GPUs, and torchvision is for one pixel decoder
    assert used - {"yaml", "triton", "torchvision"} == set(LIBRARIES)


# Over HTTP


@contextlib.contextmanager
def running(command: list[str], url: str, folder: Path, **settings: str) -> Iterator[None]:
    """A server of the environment's own `mlflow`, which answers at `url`; killed at the end of the block."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **settings}
    with open(folder / "server.log", "a") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command],
            cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: answers(url), ended=lambda: server.poll() is not None, said=(folder / "server.log").read_text)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def asked(port: int, content: Any) -> tuple[int, dict[str, Any]]:
    """Status and answer of a request to a served model."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        data=json.dumps(content).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_a_served_model_answers_a_real_picture_over_http(
    small_row: Row, storage: Path, empty_mlflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    row, manifest = row_of("panoptic", small_row, short_side=160, long_side_max=320), manifest_of(storage)
    register(row, manifest=manifest, weights_terms="", **results_of(row, storage, {4: 0.5, 5: 0.6}))
    photo = (PROJECT / "studies/nuclei.jpg").read_bytes()
    text = base64.b64encode(photo).decode()
    (expected,) = mlflow.pyfunc.load_model("models:/odd-panoptic@best").predict([photo])
    assert len(expected["segments_info"]) > 1
    port = free_port()
    command = ["models", "serve", "-m", "models:/odd-panoptic@best", "--env-manager", "local", "--port", str(port)]
    with running(command, f"http://127.0.0.1:{port}/ping", tmp_path, MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false"):
        for content in ({"dataframe_split": {"columns": ["image"], "data": [[text]]}}, {"inputs": [text]}):
            status, answer = asked(port, content)
            assert status == 200
            (prediction,) = answer["predictions"]
            assert prediction["segments_info"] == expected["segments_info"]
            assert np.array_equal(prediction["segments"], expected["segments"])
        status, answer = asked(port, {"dataframe_split": {"data": [[text]]}, "params": {"png": True}})
        packed = base64.b64decode(answer["predictions"][0]["segments"])
        read = cv2.imdecode(np.frombuffer(packed, np.uint8), cv2.IMREAD_UNCHANGED).astype(np.int64)
        assert np.array_equal(np.where(read == 65535, -1, read), expected["segments"])
        for content, sentence in (
            ({"dataframe_split": {"data": [[text[:100]]]}}, "image 1 of 1 is 75 bytes that begin with b'\\xff\\xd8"),
            ({"inputs": [text, text[:-10]]}, "image 2 of 2 is 1088 x 884 pixels, but it does not decode"),
            ({"instances": [{"image": text[1:]}]}, "image 1 of 1 is "),
            ({"dataframe_records": [{"picture": text}]}, "the request has 'picture'; it must have one column, called"),
            ({"inputs": [None]}, "image 1 of 1 is null; give"),
            ({"inputs": 5}, "image 1 of 1 is a number; give"),
            ({"inputs": [[1, 2], [3, 4]]}, "image 1 of 1 is an array of 2 x 2 int64; give"),
            ({"dataframe_split": {"data": [["not base64!"]]}}, "image 1 of 1 is text and no base64 ('not b"),
        ):  # fmt: skip
            status, answer = asked(port, content)
            assert status == 400 and answer["message"].startswith(sentence) and len(answer["message"]) < 250, answer


@pytest.mark.slow
def test_a_model_is_registered_with_and_loaded_from_a_tracking_server(
    small_row: Row, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    command = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    row, manifest = row_of("semantic", small_row), manifest_of(storage)
    with running(command, f"http://127.0.0.1:{port}/health", tmp_path, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        results = results_of(row, storage, {4: 0.6, 5: 0.5})
        first = register(row, manifest=manifest, weights_terms="", **results)
        assert first.aliases.best.version == 1 and first.aliases.median.version == 2
        assert register(row, manifest=manifest, weights_terms="", **results) == first
        model = mlflow.pyfunc.load_model("models:/odd-semantic@best")
        served = model.predict([encoded(image(*size, seed=seed)) for seed, size in enumerate(SIZES)])
        for pair in zip(served, predicted_in_evaluation(row, manifest, storage), strict=True):
            assert_same(*pair, "semantic")
