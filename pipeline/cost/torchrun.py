"""The processes that torchrun starts, as the workers of a step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun has started, each with a GPU of its own, or on a CPU; nothing without torchrun.

    ValueError where it has started more than there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    gpus, place = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if gpus:
        if place >= gpus:
            raise ValueError(
                f"torchrun has started process {place + 1} of this machine, which has {gpus} GPUs; start it with "
                f"--nproc-per-node {gpus} or less"
            )
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
