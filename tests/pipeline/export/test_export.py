"""Files that other programs run: the numbers, what they say of themselves, and where they are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m2f import build_model
from m2f.kernels.build import use
from pipeline.export import export as module
from pipeline.export.export import Exported, export
from pipeline.export.graph import traced
from pipeline.export.torch_file import METADATA
from pipeline.params.load import load_params
from pipeline.params.schema import Row
from pipeline.prediction.network import TrainedNetwork
from pipeline.storage.results.data import Manifest
from tests.helpers.shared import PROJECT
from tests.helpers.trained import trained

onnx = pytest.importorskip("onnx", reason="needs the extra export")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")


@pytest.fixture(autouse=True)
def kernels_as_before() -> Iterator[None]:
    yield
    use("auto")


def source_of(row: Row) -> TrainedNetwork:
    torch.manual_seed(0)
    names = load_params(PROJECT / "params.yaml").dataset(row.dataset).class_names
    network = build_model(row.model).eval()
    return trained(network, row, names, thing_ids=(1,), run_key="feed")


@pytest.fixture(scope="module")
def source() -> TrainedNetwork:
    """The row shapes_tiny with one layer of each decoder."""
    row = load_params(PROJECT / "params.yaml").row("shapes_tiny")
    model = dataclasses.replace(
        row.model,
        pixel_decoder=dataclasses.replace(row.model.pixel_decoder, layers=1),
        query_decoder=dataclasses.replace(row.model.query_decoder, layers=1),
    )
    test = dataclasses.replace(row.test, score_threshold=0.0, overlap_threshold=0.0)
    return source_of(dataclasses.replace(row, model=model, test=test))


@pytest.fixture(scope="module")
def graph(source: TrainedNetwork) -> torch.export.ExportedProgram:
    """Tracing takes most of an export's time."""
    return traced(source.network, "uint8")


@pytest.fixture
def traced_before(graph: torch.export.ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "traced", lambda network, pixels: graph)


def assert_equal_numbers(made: Exported) -> None:
    assert made.parity.apart == 0
    assert all(made.parity.largest[name] < 1e-4 * made.parity.magnitude[name] for name in made.parity.largest)
    assert made.path.stat().st_size == made.bytes > 2**20


@pytest.mark.slow
def test_a_torch_export_file_has_this_projects_numbers(
    source: TrainedNetwork, traced_before: None, small_manifest: Manifest, tmp_path: Path
) -> None:
    made = export(source, tmp_path / "it.pt2", form="torch.export", manifest=small_manifest, check_images=2)
    assert_equal_numbers(made)
    assert made.compared is not None and made.compared.images == 2 and made.compared.figure == "pq"
    assert abs(made.compared.before - made.compared.after) <= 1e-4
    extra = {METADATA: ""}
    torch.export.load(made.path.open("rb"), extra_files=extra)
    about = json.loads(extra[METADATA])
    assert about["run_key"] == "feed" and json.loads(about["mean_rgb"]) == [123.675, 116.28, 103.53]


@pytest.mark.slow
def test_an_onnx_file_has_this_projects_numbers_and_says_what_they_mean(
    source: TrainedNetwork, traced_before: None, small_manifest: Manifest, tmp_path: Path
) -> None:
    made = export(source, tmp_path / "it.onnx", form="onnx", manifest=small_manifest, check_images=3)
    assert_equal_numbers(made)
    assert made.compared is not None and abs(made.compared.before - made.compared.after) <= 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["it.onnx"]  # weights inside

    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(source.class_names)
    assert (about["row"], about["task"], about["run_key"], about["opset"]) == ("shapes_tiny", "panoptic", "feed", "19")
    images, sizes = session.get_inputs()
    assert (images.name, images.type, images.shape[1]) == ("images", "tensor(uint8)", 3)
    assert (sizes.name, sizes.type, sizes.shape[1]) == ("sizes", "tensor(int64)", 2)
    assert [output.name for output in session.get_outputs()] == ["class_logits", "mask_logits"]

    # a whole image, and the same with padding of another colour
    noise = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    other = noise.clone()
    other[:, :, 50:], other[:, :, :, 70:] = 7, 9
    fed = [{"images": each.numpy(), "sizes": torch.tensor([[50, 70]]).numpy()} for each in (noise, other)]
    first, second = (session.run(None, each) for each in fed)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


@pytest.mark.full
def test_a_network_with_a_feature_aligned_pyramid_is_exported(source: TrainedNetwork, tmp_path: Path) -> None:
    model = source.row.model
    pyramid = dataclasses.replace(model, pixel_decoder=dataclasses.replace(model.pixel_decoder, name="fapn"))
    with_pyramid = source_of(dataclasses.replace(source.row, model=pyramid))
    for file, form in (("it.onnx", "onnx"), ("it.pt2", "torch.export")):
        made = export(with_pyramid, tmp_path / file, form=form)
        assert made.parity.apart == 0
        assert all(made.parity.largest[name] < 1e-4 * made.parity.magnitude[name] for name in made.parity.largest)


@pytest.mark.full
@pytest.mark.parametrize("name", ["shapes_tiny", "ade20k_r50", "ade20k_swin-t", "ade20k_swin-l-in22k"])
def test_the_networks_of_the_rows_are_exported(name: str, tmp_path: Path) -> None:
    source = source_of(load_params(PROJECT / "params.yaml").row(name))
    for file, form in (("it.onnx", "onnx"), ("it.pt2", "torch.export")):
        made = export(source, tmp_path / file, form=form, pixels="uint8" if form == "onnx" else "float32")
        print(f"{name}: {form} {made.bytes / 2**20:.1f} MiB, {made.parity}")
        # of 1200 queries; R-50 and Swin-T have one whose attention differs by a pixel
        assert made.parity.queries == 12 * source.row.model.query_decoder.queries
        assert made.parity.apart <= 0.01 * made.parity.queries
