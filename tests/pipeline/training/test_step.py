from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.loader.train_batches import TrainingOrder, training_batches
from pipeline.params.schema import Row
from pipeline.training.step import build, training_step
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
