"""Batches are copied beside the step before; the order of what is asked of a GPU, told without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pipeline.data.loader.device_batches import on_device
from pipeline.data.loader.train_batches import Batch


def batch(number: int, **changed: Any) -> Batch:
    given: dict[str, Any] = {
        "images": torch.full((1, 3, 2, 2), number, dtype=torch.uint8),
        "sizes": torch.tensor([[2, 2]]),
        "segments": torch.zeros(1, 2, 2, dtype=torch.uint8),
        "masks": None,
        "labels": (torch.tensor([4]),),
        "positions": (number,),
        "seeds": (number,),
        "names": (f"image {number}",),
    }
    return Batch(**given | changed)


@dataclass
class Queues:
    """What the host asks of a GPU's streams, in its order."""

    told: list[str] = field(default_factory=list)
    current: str = "computing"

    def stream(self, name: str) -> Any:
        queues = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                queues.told.append(f"{name} waits for {other.name}")

        made = Stream()
        made.name = name  # type: ignore[attr-defined]
        return made

    @contextmanager
    def within(self, stream: Any) -> Iterator[None]:
        self.current = stream.name
        yield
        self.current = "computing"


def test_a_gpu_copies_each_batch_on_a_stream_of_its_own_and_the_next_step_alone_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queues = Queues()

    class Copied:
        def __init__(self, number: int) -> None:
            self.number = number

        def large(self) -> Iterator[Any]:
            yield self

        def record_stream(self, stream: Any) -> None:
            queues.told.append(f"keep {self.number} for {stream.name}")

    def to(given: Batch, device: torch.device) -> Any:
        queues.told.append(f"copy {given.positions[0]} while {queues.current}")
        return Copied(given.positions[0])

    monkeypatch.setattr(Batch, "to", to)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: queues.stream("copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: queues.stream("computing"))
    monkeypatch.setattr(torch.cuda, "stream", queues.within)
    for copied in on_device(iter([batch(0), batch(1)]), torch.device("cuda")):
        queues.told.append(f"step {copied.number}")  # type: ignore[attr-defined]
    each = [["copy {} while copying", "computing waits for copying", "keep {} for computing", "step {}"]] * 2
    assert queues.told == [line.format(number) for number, lines in enumerate(each) for line in lines]


def test_on_a_cpu_batches_are_given_as_they_are() -> None:
    given = [batch(0), batch(1)]
    assert [*on_device(iter(given), torch.device("cpu"))] == given


@pytest.mark.parametrize("masks", [None, (torch.ones(2, 2, 2, dtype=torch.bool),)], ids=["segments", "masks"])
def test_all_that_has_pixels_goes_to_the_device_and_labels_stay(masks: Any) -> None:
    given = batch(3) if masks is None else batch(3, segments=None, masks=masks)
    moved = given.to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.large()} == {"meta"}
    assert [tensor.shape for tensor in moved.large()] == [tensor.shape for tensor in given.large()]
    assert moved.labels is given.labels and moved.sizes is given.sizes and moved.names == ("image 3",)


@pytest.mark.gpu
def test_on_a_gpu_that_is_here_the_pixels_arrive() -> None:
    given = [batch(number).pin_memory() for number in range(5)]
    found = [copied.images.sum().item() for copied in on_device(iter(given), torch.device("cuda"))]
    assert found == [12 * number for number in range(5)]
