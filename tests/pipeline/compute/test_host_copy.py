from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.compute.host_copy import HostCopy


class Queue:
    """A device whose copy arrives when its event is waited for, and the event behind it."""

    def __init__(self, number: Tensor) -> None:
        self.number, self.calls = number, []

    def record(self) -> None:
        self.calls.append("record")
        self.arriving = self.number.item()
        self.number.fill_(float("nan"))  # it has not arrived yet

    def synchronize(self) -> None:
        self.calls.append("synchronize")
        self.number.fill_(self.arriving)


def test_a_number_is_read_after_its_own_arrival_and_as_it_was_when_it_was_sent() -> None:
    norm, number = torch.tensor(3.0), torch.zeros(())
    queue = Queue(number)
    copy = HostCopy.begun(norm, number, queue)
    assert queue.calls == ["record"] and number.isnan()
    norm.fill_(5.0)  # the step after it
    assert copy.item() == 3.0
    assert queue.calls == ["record", "synchronize"]


def test_on_a_cpu_a_number_is_there_at_once() -> None:
    norm = torch.tensor(3.0)
    copy = HostCopy.of(norm)
    norm.fill_(5.0)
    assert copy.item() == 3.0 and copy.arrived is None


@pytest.mark.gpu
def test_reading_a_gpus_number_does_not_wait_for_work_that_was_queued_behind_it() -> None:
    copy = HostCopy.of(torch.tensor(3.0, device="cuda"))
    torch.cuda._sleep(10**9)  # about half a second
    behind = torch.cuda.Event()
    behind.record()
    assert copy.number.is_pinned()
    assert copy.item() == 3.0
    assert not behind.query()
