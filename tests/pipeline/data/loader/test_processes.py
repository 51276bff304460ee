"""Items in order, whoever makes them, and in pinned memory where a GPU copies them."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils.data import Dataset

from pipeline.data.loader.processes import load_items


class Pinned:
    """An item that says where it was pinned."""

    def __init__(self, index: int) -> None:
        self.index, self.pinned_in = index, 0

    def pin_memory(self) -> Pinned:
        self.pinned_in = os.getpid()
        return self


class Items(Dataset[Pinned]):
    def __getitem__(self, index: int) -> Pinned:
        return Pinned(index)


@pytest.mark.gpu
@pytest.mark.parametrize("pin", [True, False])
def test_items_of_other_processes_are_pinned_in_this_one_where_there_is_a_gpu(pin: bool) -> None:
    items = list(load_items(Items(), range(5), 2, pin=pin))
    assert [item.index for item in items] == list(range(5))
    assert {item.pinned_in for item in items} == {os.getpid() if pin else 0}


def test_without_a_gpu_nothing_is_pinned() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for processes in (0, 2):
        items = list(load_items(Items(), range(5), processes, pin=True))
        assert [(item.index, item.pinned_in) for item in items] == [(index, 0) for index in range(5)]
