from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from m2f.config import BackboneConfig
from m2f.types import Prediction
from pipeline.data.loader.train_batches import Batch, TrainingOrder, training_batches
from pipeline.params.schema import Row
from pipeline.storage.results.data import Manifest
from pipeline.training import step as module
from pipeline.training.step import Training, build, training_step, use_kernels
from pipeline.training.worker import Worker
from tests.helpers.loading import wide


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_a_network_of_300_classes_learns_them(storage: Path, small_row: Row, task: Any) -> None:
    row = dataclasses.replace(small_row, task=task, model=dataclasses.replace(small_row.model, num_classes=300))
    order = TrainingOrder.of(row, wide(storage, task), seed=0)
    (batch,) = training_batches(order, first_step=0, steps=1, image_range=range(row.train.global_batch))
    assert all(labels.tolist() == [255, 299] for labels in batch.labels)
    training = build(row, Worker(rank=0, size=1, device=torch.device("cpu")), seed=0)
    first = training_step(training, batch, step=0)
    again = training_step(training, batch, step=1)
    training.norms.now()
    assert set(first.losses) == set(again.losses)
    assert torch.isfinite(torch.stack([*first.losses.values()])).all()
    assert sum(again.losses.values()) < sum(first.losses.values())


def with_batch_statistics(row: Row) -> Row:
    """The row on a ResNet-50 whose norms, which learn, take statistics over the step."""
    backbone = BackboneConfig(name="r50", frozen_norm=False, batch_statistics=True)
    return dataclasses.replace(row, model=dataclasses.replace(row.model, backbone=backbone))


class Double(nn.Module):
    """A network of float64: in float32 rounding grows to a thousandth of the gradient of so deep a random network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Prediction:
        prediction: Prediction = self.network(images.double(), seeds=seeds)
        return prediction


def step_of(worker: Worker, row: Row, batch: Batch) -> dict[str, Any]:
    """What a worker knows after its part of the first step."""
    torch.set_default_dtype(torch.float64)
    try:
        training = build(row, worker, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    training = dataclasses.replace(training, model=Double(training.model))
    made = training_step(training, batch, step=0)
    return {
        "loss": worker.sum(torch.stack(list(made.losses.values())).sum()).item(),
        "norm": made.grad_norm.item(),
        "direction": training.gradients / training.gradients.norm(),
        "buffers": dict(training.model.named_buffers()),
    }


def _part_of_step(rank: int, row: Row, batch: Batch, folder: Path) -> None:
    """One of two workers: the first takes 1 group, the second 3."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mine = (slice(0, 1), slice(1, 4))[rank]
    fields = ("images", "sizes", "segments", "labels", "positions", "seeds", "names")
    part = dataclasses.replace(batch, **{name: getattr(batch, name)[mine] for name in fields})
    torch.save(step_of(Worker(rank=rank, size=2, device=torch.device("cpu")), row, part), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.long
def test_two_workers_with_unequal_parts_take_the_step_of_one_where_statistics_are_of_the_whole_step(
    small_manifest: Manifest, small_row: Row, tmp_path: Path
) -> None:
    row = with_batch_statistics(small_row)
    order = TrainingOrder.of(row, small_manifest, seed=0)
    (batch,) = training_batches(order, first_step=0, steps=1, image_range=range(4))
    one = step_of(Worker(rank=0, size=1, device=torch.device("cpu")), row, batch)
    mp.spawn(_part_of_step, args=(row, batch, tmp_path), nprocs=2)
    two = torch.load(tmp_path / "0.pt")
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["norm"] == pytest.approx(two["norm"], rel=1e-5)
    assert torch.nn.functional.cosine_similarity(one["direction"], two["direction"], dim=0) > 1 - 1e-9
    for name, value in one["buffers"].items():
        torch.testing.assert_close(two["buffers"][name], value, rtol=1e-6, atol=1e-7)


class WorkerOfTwo(Worker):
    """On a GPU, beside a worker that can compile or cannot."""

    others_fail = False

    def largest(self, value: float) -> float:
        return max(value, float(self.others_fail))


@pytest.fixture
def on_a_gpu(small_row: Row, monkeypatch: pytest.MonkeyPatch) -> Training:
    monkeypatch.setattr(module, "use", lambda choice, *, device: "plain" if choice == "plain" else "compiled")
    monkeypatch.setattr(module, "keep_compiled_code", lambda: None)
    monkeypatch.setattr(module, "_compile", lambda *_: "")
    model = SimpleNamespace(uncompile=lambda: undone.append(True))
    undone: list[bool] = []
    return SimpleNamespace(  # type: ignore[return-value]
        row=small_row, worker=WorkerOfTwo(1, 2, torch.device("cuda")), model=model, undone=undone
    )


def test_a_network_that_one_worker_cannot_compile_is_plain_on_all(
    on_a_gpu: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert use_kernels(on_a_gpu, "auto", 1) == "compiled"
    assert not on_a_gpu.undone  # type: ignore[attr-defined]
    monkeypatch.setattr(WorkerOfTwo, "others_fail", True)
    assert use_kernels(on_a_gpu, "auto", 1) == "plain"
    assert on_a_gpu.undone  # type: ignore[attr-defined]


def test_a_network_that_is_to_be_compiled_and_cannot_is_an_error(
    on_a_gpu: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_compile", lambda *_: "torch.compile fails here (no space)")
    assert use_kernels(on_a_gpu, "auto", 1) == "plain"
    with pytest.raises(
        ValueError, match=r"^rows\.small\.train\.kernels is compiled, but torch.compile .*; set it to plain"
    ):
        use_kernels(on_a_gpu, "compiled", 1)
