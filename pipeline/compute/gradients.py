"""The gradients of a training as one flat buffer, and their sum over workers while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ALIGNMENT = 16
"""Elements of float32 in 64 bytes, at multiples of which every parameter's gradient begins in the buffer: a vector of
AVX-512, and four times the 16 bytes that a GPU's thread reads at once."""

SLICE = 6 * 2**20
"""Elements of a slice, at least: 25 MB, as many as PyTorch's DistributedDataParallel takes."""


def flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Zeros, flat, of which the parameters' gradients become views.

    A view has its parameter's strides, for the fused optimiser goes through both in the order of their memory. It
    begins at a multiple of _ALIGNMENT elements; what lies between two views stays 0.
    """
    starts, length = [], 0
    for parameter in parameters:
        assert _is_dense(parameter), f"a parameter of {tuple(parameter.shape)} has gaps: strides {parameter.stride()}"
        starts.append(length)
        length += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
    gradients = torch.zeros(length, device=parameters[0].device)
    for parameter, start in zip(parameters, starts, strict=True):
        parameter.grad = gradients.as_strided(parameter.shape, parameter.stride(), start)
    return gradients


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie side by side in memory, in whatever order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


class GradientSums:
    """Sums slices of the flat buffer over workers, each as soon as the backward pass has finished its gradients.

    Slices are fixed, and summed in a fixed order, from the end of the network to its beginning, on every worker and in
    every step: a worker whose images lack something finishes some gradients in another order or not at all. They have
    a process group of their own, since a synchronised norm sums in the middle of the backward pass.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], gradients: Tensor, *, slice_elements: int = SLICE) -> None:
        """`gradients`: flat_gradients(parameters). All workers make one together."""
        self._group: Any = dist.new_group()
        self._slices, slice_of = _slices(parameters, gradients, slice_elements)
        self._counts = [slice_of.count(number) for number in range(len(self._slices))]
        self._missing: list[int] = []
        """Gradients that each slice waits for; empty outside of the last backward pass of a step."""
        self._running: list[Any] = []
        for parameter, number in zip(parameters, slice_of, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._finished(number))

    def begin(self) -> None:
        """The next backward pass is the step's last: what it has finished is summed."""
        self._missing, self._running = list(self._counts), []

    def wait(self) -> None:
        """Sum the slices that were not finished, and let the device wait for all sums."""
        self._missing = [0] * len(self._slices)
        self._launch()
        for work in self._running:
            work.wait()
        self._missing, self._running = [], []

    def _finished(self, number: int) -> None:
        if self._missing:
            self._missing[number] -= 1
            self._launch()

    def _launch(self) -> None:
        while len(self._running) < len(self._slices) and self._missing[len(self._running)] <= 0:
            part = self._slices[len(self._running)]
            self._running.append(dist.all_reduce(part, group=self._group, async_op=True))


def _slices(
    parameters: Sequence[nn.Parameter], gradients: Tensor, slice_elements: int
) -> tuple[list[Tensor], list[int]]:
    """Parts of the buffer, the last first, and the number of each parameter's part."""
    slices: list[Tensor] = []
    slice_of = list[int]()
    end = len(gradients)
    for parameter in reversed(parameters):
        assert parameter.grad is not None
        start = int(parameter.grad.storage_offset())
        slice_of.insert(0, len(slices))
        if end - start >= slice_elements or start == 0:
            slices.append(gradients[start:end])
            end = start
    return slices, slice_of
