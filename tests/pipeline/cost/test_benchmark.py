"""What is measured of a row: counts worked out by hand, times that are times, and no figure that was not measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipeline.cost.benchmark as module
from benchmarks.operations import PAPER, compared_size, counted_like_the_paper, parameters
from m2f import build_model
from pipeline.cost.batches import batches_of
from pipeline.cost.benchmark import benchmark, benchmark_key, forward_flops
from pipeline.cost.speed import FAPN_OPERATIONS
from pipeline.params.schema import DatasetConfig, Params, Row
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.rows import Spread
from pipeline.training.worker import Worker

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def shapes(params: Params) -> DatasetConfig:
    return params.dataset("shapes")


# Operations


def test_a_convolution_and_a_linear_layer_are_counted_by_hand(monkeypatch: pytest.MonkeyPatch, small_row: Row) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 8, 3, padding=1)
            self.linear = nn.Linear(8, 5)

        def forward(self, images: torch.Tensor, *, auxiliary: bool) -> torch.Tensor:
            return self.linear(self.convolution(images).relu().mean((2, 3)))

    monkeypatch.setattr(module, "build_model", lambda config: Net())
    # 32 * 48 pixels, each 8 outputs of 3 * 3 * 3 products; 8 * 5 products; a multiplication and an addition as 2
    assert forward_flops(small_row, (32, 48)) == 2 * (32 * 48 * 8 * 27 + 8 * 5)


def test_operations_are_the_same_counted_on_shapes_and_while_computing(small_row: Row) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model(small_row.model).eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 64, 96), auxiliary=False)
    assert forward_flops(small_row, (64, 96)) == counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in PAPER if "instance" not in name and "swin-b-in22k" not in name])
def test_parameters_and_operations_are_the_papers(params: Params, name: str) -> None:
    million, operations = PAPER[name]
    row = params.rows[name]
    assert round(parameters(row) / 1e6) == million
    # COCO's count is the mean over 100 pictures of different sizes, ours is of the usual one
    tolerance = 0.01 if row.dataset == "ade20k" else 0.05
    assert counted_like_the_paper(row, compared_size(row)) == pytest.approx(operations * 1e9, rel=tolerance)


def test_a_deformable_convolution_is_counted_as_one_that_is_not(
    monkeypatch: pytest.MonkeyPatch, small_row: Row
) -> None:
    from torchvision.ops import DeformConv2d

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = DeformConv2d(3, 8, 3, padding=1)

        def forward(self, images: torch.Tensor, *, auxiliary: bool) -> torch.Tensor:
            return self.convolution(images, torch.zeros(1, 18, *images.shape[2:], device=images.device))

    monkeypatch.setattr(module, "build_model", lambda config: Net())
    assert forward_flops(small_row, (32, 48)) == 2 * 32 * 48 * 8 * 27


@pytest.mark.full
def test_fapns_operations_are_as_many_times_the_default_decoders_as_plans_take_them(params: Params) -> None:
    fapn = params.rows["ade20k_swin-l-fapn-in22k"].model.pixel_decoder
    for name, times in FAPN_OPERATIONS.items():
        row = params.rows[f"ade20k_{name}" if name != "swin-l" else "ade20k_swin-l-in22k"]
        other = dataclasses.replace(row, model=dataclasses.replace(row.model, pixel_decoder=fapn))
        assert round(forward_flops(other, (640, 640)) / forward_flops(row, (640, 640)), 2) == times, name


# Measurements


def test_a_row_is_measured_on_the_pictures_of_its_shards(
    small_row: Row, small_manifest: Manifest, shapes: DatasetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    result = benchmark(small_row, shapes, manifest=small_manifest, seconds=1.0)
    json.dumps(dataclasses.asdict(result), allow_nan=False)
    model = build_model(small_row.model)
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert result.parameters_trained == result.parameters
    # 64 x 96 with a short side of 160: 160 x 240, padded to 160 x 256
    assert result.flops.image_size == (160, 256)
    assert result.flops.forward == forward_flops(small_row, (160, 256))
    inference, training = result.inference, result.training
    assert training is not None and result.skipped is None
    assert inference.sizes == ((64, 96, inference.images),)
    assert inference.fps > 0
    assert "real images of the validation split" in inference.protocol
    assert inference.differs.startswith("fresh weights instead of trained ones; no speed is published for this task")
    assert "random images" not in inference.differs
    assert 0 < training.seconds.p10 <= training.step_s <= training.seconds.p90
    assert (training.workers, training.groups, training.images, training.crop) == (1, 1, 1, (64, 64))
    assert "random crops of the training split" in training.protocol
    if not torch.cuda.is_available():
        assert result.device_type == "cpu"
        assert training.memory_mib is None and inference.memory_mib is None
    assert "small: training:" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_published_dataset_is_measured_without_its_shards(small_row: Row, shapes: DatasetConfig, task: Any) -> None:
    row = dataclasses.replace(small_row, dataset="coco", task=task)
    result = benchmark(row, shapes, manifest=None, seconds=0.1, groups=2)
    # COCO's 480 x 640 with a short side of 160: 160 x 213, padded to 160 x 224
    assert result.flops.image_size == (160, 224)
    assert result.inference.sizes == ((480, 640, result.inference.images),)
    assert "random images of the published size" in result.inference.protocol
    assert "random images of one size instead of the validation split's" in result.inference.differs
    assert f"{result.inference.images} images timed instead of 195" in result.inference.differs
    assert ("no speed is published" in result.inference.differs) == (task != "semantic")
    assert result.training is not None and result.training.images == 2
    assert "9 masks each" in result.training.protocol
    assert result.inference.images >= 3 and result.training.steps >= 3


def test_a_step_is_the_training_loops(
    small_row: Row,
    small_manifest: Manifest,
    shapes: DatasetConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # with all groups on one device, the benchmark's first steps end with the weights of a training's
    from safetensors.torch import load_file

    from pipeline.runs.checkpoints import checkpoint_path
    from pipeline.runs.run import Run
    from pipeline.training.loop import train
    from pipeline.training.step import build

    row = dataclasses.replace(small_row, train=dataclasses.replace(small_row.train, steps=3))
    run = Run(row=row, seed=0, run_key="k" * 16, run_dir=tmp_path / "run", manifest=small_manifest)
    train(run)
    built = []

    def remember(*arguments: Any, **keywords: Any) -> Any:
        built.append(build(*arguments, **keywords))
        return built[-1]

    monkeypatch.setattr(module, "build", remember)
    monkeypatch.setattr(module, "WARM_UP", 0)
    monkeypatch.setattr(module, "STEPS", 3)
    benchmark(row, shapes, manifest=small_manifest, seconds=0.0, groups=4)
    trained = load_file(checkpoint_path(run.run_dir, 3))
    for name, value in built[0].model.state_dict().items():
        assert torch.equal(value, trained[f"model.{name}"]), name


def test_inference_is_measured_without_gradients_and_after_those_of_the_training_are_gone(
    small_row: Row, shapes: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.training.step import build

    seen, inference = [], module._inference

    def remember(*arguments: Any, **keywords: Any) -> Any:
        training = build(*arguments, **keywords)
        seen.append(weakref.ref(training.gradients))
        return training

    def watched(model: nn.Module, *arguments: Any) -> Any:
        seen.append([parameter.grad for parameter in model.parameters()])
        seen.append(seen[0]())
        return inference(model, *arguments)

    monkeypatch.setattr(module, "build", remember)
    monkeypatch.setattr(module, "_inference", watched)
    benchmark(dataclasses.replace(small_row, dataset="coco"), shapes, manifest=None, seconds=0.0)
    _, of_inference, of_training = seen
    assert set(of_inference) == {None} and of_training is None


@pytest.mark.slow
@pytest.mark.long
def test_two_workers_measure_a_step_with_their_sums_and_the_first_has_the_result(
    small_row: Row, shapes: DatasetConfig, tmp_path: Path
) -> None:
    row = dataclasses.replace(small_row, dataset="coco")
    (tmp_path / "row.pickle").write_bytes(pickle.dumps((row, shapes)))
    (tmp_path / "two.py").write_text(
        "import pickle, sys\n"
        "import torch, torch.distributed as dist\n"
        "import pipeline.cost.benchmark as module\n"
        "from pipeline.cost.torchrun import joined\n"
        "from pipeline.training.step import build\n"
        "folder, built = sys.argv[1], []\n"
        "def remember(*arguments, **keywords):\n"
        "    built.append(build(*arguments, **keywords))\n"
        "    return built[-1]\n"
        "row, shapes = pickle.load(open(folder + '/row.pickle', 'rb'))\n"
        "torch.set_num_threads(1)\n"
        "with joined():\n"
        "    rank = dist.get_rank()\n"
        "    try:\n"
        "        module.benchmark(row, shapes, manifest=None, groups=3)\n"
        "    except ValueError as error:\n"
        "        refused = str(error)\n"
        "    module.build = remember\n"
        "    result = module.benchmark(row, shapes, manifest=None, seconds=0.0, groups=2)\n"
        "    weights = {name: value.clone() for name, value in built[0].model.state_dict().items()}\n"
        "    pickle.dump((refused, result, weights), open(f'{folder}/{rank}.pickle', 'wb'))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(
        [*command, str(tmp_path / "two.py"), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    (refused, result, weights), (_, nothing, others) = (
        pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1)
    )
    assert refused == "row small has 4 groups; 2 workers of 3 each need 6; measure with fewer workers, or fewer groups"
    assert nothing is None and result.training is not None
    # 2 of the row's 4 groups of one picture on each
    assert (result.training.workers, result.training.groups, result.training.images) == (2, 2, 2)
    assert "of the slowest of 2 workers, sums over them included" in result.training.protocol
    assert result.training.steps == 3 and answer.stderr.count("training: 3 steps timed") == 1
    # their pictures differ, and so would their weights without the sums
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    fresh = build_model(row.model).state_dict()
    assert not all(torch.equal(weights[name], fresh[name]) for name in weights)


def test_the_workers_of_a_step_have_different_generated_pictures(small_row: Row) -> None:
    workers = [Worker(rank, 2, torch.device("cpu")) for rank in range(2)]
    made = [list(itertools.islice(batches_of(small_row, None, 2, worker, steps=2), 2)) for worker in workers]
    seeds = [batch.seeds for step in zip(*made, strict=True) for batch in step]
    assert seeds == [(0, 1), (2, 3), (4, 5), (6, 7)]  # 2 groups of one picture for each worker
    first, second, *_ = (batch.images for batch in (made[0][0], made[1][0]))
    assert not torch.equal(first, second)


def test_slow_pictures_are_counted_three_times_and_fast_ones_until_there_are_enough() -> None:
    calls = []

    def one(taken_s: float) -> float:
        calls.append(taken_s)
        return taken_s

    # no time at all: one does not count, three do
    assert module._repeated("slow", lambda: one(7.0), count=195, unit="pictures", seconds=0.0) == [7.0] * 3
    assert len(calls) == 4
    # time enough: five do not count, as many as asked for do
    calls.clear()
    assert module._repeated("fast", lambda: one(0.1), count=20, unit="steps", seconds=60.0) == [0.1] * 20
    assert len(calls) == 25


def test_a_step_is_measured_with_the_memory_that_the_environment_saves(
    small_row: Row, shapes: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.training.step import build

    given, plain = [], benchmark_key(small_row, manifest=None, seconds=0.0, groups=2)

    def remember(*arguments: Any, **keywords: Any) -> Any:
        given.append(keywords)
        return build(*arguments, **keywords)

    monkeypatch.setattr(module, "build", remember)
    monkeypatch.setenv("M2F_GROUPS_AT_ONCE", "1")
    monkeypatch.setenv("M2F_CHECKPOINT_ACTIVATIONS", "1")
    row = dataclasses.replace(small_row, dataset="coco")
    result = benchmark(row, shapes, manifest=None, seconds=0.0, groups=2)
    assert given == [{"seed": 0, "groups_at_once": 1, "checkpoint_activations": True}]
    assert result is not None and result.training is not None
    assert result.training.protocol.endswith("; M2F_GROUPS_AT_ONCE=1; M2F_CHECKPOINT_ACTIVATIONS=1")
    assert benchmark_key(small_row, manifest=None, seconds=0.0, groups=2) != plain


def test_the_spread_of_eleven_values_is_the_second_middle_and_tenth() -> None:
    assert module._spread([float(value) for value in range(11)]) == Spread(median=5.0, p10=1.0, p90=9.0)


def test_a_busy_machine_is_remarked_and_recorded(
    small_row: Row, shapes: DatasetConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = dataclasses.replace(small_row, dataset="coco")
    for load, remarked in ((100.0, True), (0.0, False)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert benchmark(row, shapes, manifest=None, seconds=0.0).other_load == load
        assert ("times will be too long" in capsys.readouterr().err) == remarked


def test_pictures_of_unknown_size_need_shards(small_row: Row, shapes: DatasetConfig) -> None:
    with pytest.raises(ValueError, match="sizes of dataset shapes are not known yet; run dvc repro shard@shapes first"):
        benchmark(small_row, shapes, manifest=None)


def test_more_groups_than_the_row_has_are_refused(
    small_row: Row, small_manifest: Manifest, shapes: DatasetConfig
) -> None:
    with pytest.raises(ValueError, match="row small has 4 groups; measure 1 to 4, not 5"):
        benchmark(small_row, shapes, manifest=small_manifest, groups=5)


@pytest.mark.slow
def test_without_shards_neither_ray_nor_mlflow_nor_albumentations_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'albumentations', 'albucore', 'cv2', 'pyarrow', 'pycocotools', 'dvc'):\n"
        "    sys.modules[name] = None\n"  # importing it fails
        "import dataclasses\n"
        "from pipeline.cost.benchmark import benchmark\n"
        "from pipeline.params.load import load_params\n"
        f"params = load_params({str(PROJECT / 'params.yaml')!r})\n"
        "row = dataclasses.replace(params.rows['shapes_tiny'], dataset='coco')\n"
        "print(benchmark(row, params.dataset('shapes'), manifest=None, seconds=0).training.steps)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "3\n"


@pytest.mark.gpu
def test_memory_is_measured_on_a_gpu(small_row: Row, small_manifest: Manifest, shapes: DatasetConfig) -> None:
    result = benchmark(small_row, shapes, manifest=small_manifest, seconds=5.0)
    assert result.device_type == "cuda"
    for part in (result.inference, result.training):
        assert 0 < part.memory_mib <= part.reserved_mib
    # weights, gradients and two moments, float32
    assert result.training.memory_mib > 4 * 4 * result.parameters / 2**20
