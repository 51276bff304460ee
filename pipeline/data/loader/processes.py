"""Items of a data set in order, made in this process or ahead of time by others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

_Item = TypeVar("_Item")

PREFETCH = 3
"""Batches that every loader process keeps ready."""


@dataclass(frozen=True)
class _Failed:
    """What went wrong in a loader process: exceptions sent by torch would bring the other process's traceback."""

    message: str


class _Guarded(Dataset[Any]):
    """A dataset that gives its errors back."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return _Failed(str(error))


def load_items(
    dataset: Dataset[_Item], indices: Iterable[int], processes: int, *, pin: bool = False
) -> Iterator[_Item]:
    """dataset[index] for every index, in order.

    pin: items made by other processes are given as their method pin_memory() returns them, from which a GPU copies
    while it and the host do something else; a thread of this process calls it ahead of time. Without a GPU it is not
    called. Items made here are left to whoever copies them.
    """
    if not processes:
        for index in indices:
            yield dataset[index]
        return
    cv2.setNumThreads(1)  # a forked process would wait forever for the threads that OpenCV has started in this one
    loader: DataLoader[Any] = DataLoader(
        _Guarded(dataset),
        batch_size=None,
        sampler=indices,
        num_workers=processes,
        prefetch_factor=PREFETCH,
        collate_fn=_as_it_is,
        worker_init_fn=_one_thread,
        pin_memory=pin and torch.cuda.is_available(),
    )
    for item in loader:
        if isinstance(item, _Failed):
            raise ValueError(item.message)
        yield item


def _as_it_is(item: _Item) -> _Item:
    return item


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
