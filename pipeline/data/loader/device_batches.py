"""Training batches on the device that trains, copied while it computes the step before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeline.data.loader.train_batches import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, with all that has pixels on `device`.

    A GPU copies on a stream of its own. When a batch is asked for, the host has queued the step before and the GPU is
    still at it: it copies beside it, from the pinned memory of the loader, and only the next step waits for the copy.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            copied = batch.to(device)
        computing.wait_stream(copying)
        for tensor in copied.large():
            tensor.record_stream(computing)  # its memory is nobody else's until the step is over
        yield copied
