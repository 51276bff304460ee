"""A network whose forward pass on a GPU is recorded once for a size of images that comes often, and then replayed.

The host asks a GPU for each of a forward pass's operations, about a thousand. For a small image that takes longer than
the operations themselves. A recording (a CUDA graph) is asked for as a whole.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from m2f.kernels import gpu
from m2f.types import Prediction

OFTEN = 4
"""So many times images of a size have come when a recording is made: it takes as long as a few forward passes."""

MOST = 8
"""Recordings of a network. They share the memory for what is between input and result."""


Forward = Callable[[Tensor], Prediction]


class Recorder(Protocol):
    """Records what a device is asked to do."""

    def takes(self, images: Tensor) -> bool:
        """Whether it records work on these."""

    def record(self, forward: Forward, images: Tensor) -> Forward:
        """What replays the work of `forward` on images of this size; its result lives until it is called again.
        RuntimeError: the work cannot be recorded."""


class CudaRecorder:
    """Recordings of a GPU, where the kernels of m2f.kernels are in use."""

    def __init__(self) -> None:
        self._memory: Any = None

    def takes(self, images: Tensor) -> bool:
        """See `Recorder`."""
        return images.is_cuda and gpu.takes(images)

    def record(self, forward: Forward, images: Tensor) -> Forward:
        """See `Recorder`."""
        with torch.inference_mode(False):  # whoever replays it may be in another mode
            shown = images.clone()
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            forward(shown)  # libraries choose their kernels and load them, which is forbidden while they are recorded
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may copy batches meanwhile
        with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
            made = forward(shown)
        self._memory = graph.pool()

        def replay(images: Tensor) -> Prediction:
            shown.copy_(images)
            graph.replay()
            return made

        return replay


class _Kind(NamedTuple):
    """What one recording is good for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    autocast: torch.dtype | None


class RecordedNetwork(nn.Module):
    """A network that is called like `network` and gives the same bits; for one thread at a time.

    A recording is compared with the forward pass that it was made from before it is used. Where it differs, or cannot
    be made, there are no recordings, and one line on stderr says why. Other weights in the same tensors need no new
    recordings.
    """

    def __init__(self, network: nn.Module, recorder: Recorder | None = None) -> None:
        super().__init__()
        self.network = network
        self._recorder: Recorder | None = recorder or CudaRecorder()
        self._seen: Counter[_Kind] = Counter()
        self._recordings: dict[_Kind, Forward] = {}

    def forward(self, images: Tensor, *, auxiliary: bool = True) -> Prediction:
        """The network's prediction, in tensors that are the caller's own."""
        replay = None if auxiliary else self.learn(images)
        if replay is not None:
            replayed = replay(images)
            return Prediction(replayed.class_logits.clone(), replayed.mask_logits.clone())
        prediction: Prediction
        try:
            prediction = self.network(images, auxiliary=auxiliary)
        except torch.OutOfMemoryError:
            if not self._recordings:
                raise
            self._stop("they need the memory that an image needs")
            prediction = self.network(images, auxiliary=auxiliary)
        return prediction

    def learn(self, images: Tensor) -> Forward | None:
        """Note that such images come, and make a recording if they come often; what `forward` does first."""
        recorder = self._recorder
        if recorder is None or self.training or torch.is_grad_enabled() or not recorder.takes(images):
            return None
        device = images.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kind = _Kind(tuple(images.shape), images.dtype, autocast)
        if kind not in self._recordings:
            self._seen[kind] += 1
            if self._seen[kind] < OFTEN or len(self._recordings) == MOST:
                return None
            try:
                self._recordings[kind] = self._recorded(recorder, images, autocast)
            except RuntimeError as error:  # CUDA's too, and that of memory
                self._stop(" ".join(str(error).split())[:200])
        return self._recordings.get(kind)

    def _recorded(self, recorder: Recorder, images: Tensor, autocast: torch.dtype | None) -> Forward:
        def forward(images: Tensor) -> Prediction:
            # a weight's copy in less precision belongs to the recording, and to no cache that is emptied
            with torch.autocast(images.device.type, autocast, enabled=autocast is not None, cache_enabled=False):
                prediction: Prediction = self.network(images, auxiliary=False)
            return prediction

        expected = forward(images)
        replay = recorder.record(forward, images)
        found = replay(images)
        if not (
            torch.equal(found.class_logits, expected.class_logits)
            and torch.equal(found.mask_logits, expected.mask_logits)
        ):
            raise RuntimeError("a replay gives other bits than the forward pass")
        return replay

    def _stop(self, why: str) -> None:
        print(
            f"forward passes are not recorded any more ({why}): small images take longer", file=sys.stderr, flush=True
        )
        self._recorder = None
        self._recordings.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> RecordedNetwork:
        """Of `nn.Module`, which moves all tensors with it: to a device, to a type."""
        self._recordings.clear()
        moved: RecordedNetwork = super()._apply(*args, **kwargs)
        return moved
