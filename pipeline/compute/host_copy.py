"""Numbers of the device for the host, which reads them later without waiting for what the device was given since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A place in the device's queue, as torch.cuda.Event."""

    def record(self) -> None:
        """Put it behind what is queued now."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""


@dataclass(frozen=True, eq=False)
class HostCopy:
    """A scalar on its way to the host."""

    number: Tensor
    """On the host; holds the scalar once `arrived` is reached."""
    arrived: Event | None
    """None: it holds it now."""

    @classmethod
    def of(cls, scalar: Tensor) -> HostCopy:
        """Begin the copy of a device's scalar, behind what is queued now."""
        if scalar.device.type != "cuda":
            return cls(scalar.detach().clone(), None)
        # memory that the host's system may move cannot be written by the device alone: the copy would be waited for
        number = torch.empty((), dtype=scalar.dtype, pin_memory=True)
        return cls.begun(scalar, number, torch.cuda.Event())

    @classmethod
    def begun(cls, scalar: Tensor, number: Tensor, arrived: Event) -> HostCopy:
        """Begin the copy into `number`, with `arrived` behind it."""
        number.copy_(scalar.detach(), non_blocking=True)
        arrived.record()
        return cls(number, arrived)

    def item(self) -> float:
        """The number; waits for its arrival, and for nothing that was queued after the copy."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.number.item()
