"""Forward passes that are recorded for sizes that come often.

A list of the CPU's operations takes the place of a GPU's recording here. It has the same two conditions: nothing may
depend on values, and all replays write to the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.network.counts import Operations
from m2f import build_model
from m2f.inference.recorded import MOST, OFTEN, RecordedNetwork
from m2f.kernels import build, gpu
from m2f.model import Mask2Former
from m2f.types import Prediction
from pipeline.params.load import load_params

PARAMS = load_params(Path(__file__).parents[3] / "params.yaml")
TINY = PARAMS.rows["shapes_tiny"].model


class Tape(TorchDispatchMode):
    """The operations that were made inside, which can be made again. What asks for a value ends it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host waits for a value")
        result = func(*args, **(kwargs or {}))
        self.made.append((func, args, kwargs or {}, result))
        return result

    def again(self, given: Tensor, instead: Tensor) -> dict[int, Tensor]:
        """Make them with another first tensor; the tensors by the id of those that were recorded."""
        now = {id(given): instead}
        for func, args, kwargs, result in self.made:
            found = func(*tree_map(lambda x: now.get(id(x), x), args), **tree_map(lambda x: now.get(id(x), x), kwargs))
            for was, made in zip(tree_leaves(result), tree_leaves(found), strict=True):
                now[id(was)] = made
        return now


class Taped:
    """A recorder of a CPU, whose replays all write to the tensors of the first."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def takes(self, images: Tensor) -> bool:
        return True

    def record(self, forward: Callable[[Tensor], Prediction], images: Tensor) -> Callable[[Tensor], Prediction]:
        self.recordings += 1
        with Tape() as tape:
            written = forward(images)

        def replay(shown: Tensor) -> Prediction:
            self.replays += 1
            now = tape.again(images, shown)
            for kept in written[:2]:
                kept.copy_(now[id(kept)])
            return written

        return replay


@pytest.fixture(scope="module")
def tiny() -> Iterator[Mask2Former]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_wanted", "plain")  # tracing does not see the compiled loops
        torch.manual_seed(0)
        yield build_model(TINY).eval()


def images(seed: int, height: int = 32, width: int = 40) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def equal(one: Prediction, other: Prediction) -> bool:
    return torch.equal(one.class_logits, other.class_logits) and torch.equal(one.mask_logits, other.mask_logits)


@torch.inference_mode()
def test_a_size_that_comes_often_is_recorded_once_and_replayed_with_the_bits_of_the_network(tiny: Mask2Former) -> None:
    recorder = Taped()
    network = RecordedNetwork(tiny, recorder).eval()
    found = []
    for seed in range(OFTEN + 2):
        found.append(network(images(seed), auxiliary=False))
        network(images(seed, 40, 32 + seed), auxiliary=False)  # of no size twice
        assert recorder.recordings == (seed >= OFTEN - 1)
    assert recorder.replays == 1 + 3  # one to compare, and three images
    for seed, prediction in enumerate(found):  # the last replay has overwritten nothing of the others
        assert equal(prediction, tiny(images(seed), auxiliary=False))


@torch.inference_mode()
def test_a_recording_is_for_one_size_and_precision_and_gone_with_the_tensors_it_reads(tiny: Mask2Former) -> None:
    tiny = copy.deepcopy(tiny)
    recorder = Taped()
    network = RecordedNetwork(tiny, recorder).eval()
    for _ in range(OFTEN):
        network(images(0), auxiliary=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert recorder.replays == 2
        halved = [network(images(0), auxiliary=False) for _ in range(OFTEN)]
        assert recorder.recordings == 2 and equal(halved[-1], tiny(images(0), auxiliary=False))
    network(images(0, 48), auxiliary=False)
    assert recorder.recordings == 2 and recorder.replays == 4
    network.double()
    network.float()
    network(images(0), auxiliary=False)
    assert recorder.recordings == 3


def test_nothing_is_recorded_that_a_replay_could_not_give(tiny: Mask2Former) -> None:
    recorder = Taped()
    network = RecordedNetwork(tiny, recorder).eval()
    for _ in range(OFTEN):
        assert network(images(0), auxiliary=False).mask_logits.requires_grad
        with torch.no_grad():
            assert len(network(images(0)).auxiliary) == TINY.query_decoder.layers
    with torch.no_grad():
        network.train()
        network.learn(images(0))
    network.eval()
    assert recorder.recordings == 0


class Sums(torch.nn.Module):
    """A network that can be looked through."""

    def forward(self, images: Tensor, *, auxiliary: bool) -> Prediction:
        return Prediction(images.sum(), images.mean())


class Off(Taped):
    """Whose replays are 1 beside what they should be."""

    def record(self, forward: Callable[[Tensor], Prediction], images: Tensor) -> Callable[[Tensor], Prediction]:
        return super().record(lambda images: Prediction(images.sum() + 1, images.mean()), images)


class Unable(Taped):
    """That cannot record."""

    def record(self, forward: Callable[[Tensor], Prediction], images: Tensor) -> Callable[[Tensor], Prediction]:
        self.recordings += 1
        raise torch.OutOfMemoryError("no room\nat all")


@pytest.mark.parametrize(
    ("recorder", "why"), [(Off(), "a replay gives other bits than the forward pass"), (Unable(), "no room at all")]
)
@torch.inference_mode()
def test_a_recording_that_is_wrong_or_cannot_be_made_is_said_once_and_not_used(
    recorder: Taped, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    network = RecordedNetwork(Sums(), recorder).eval()
    for _ in range(3 * OFTEN):
        assert network(torch.ones(2, 3), auxiliary=False)[:2] == (6, 1)
    assert recorder.recordings == 1
    assert capsys.readouterr().err == (f"forward passes are not recorded any more ({why}): small images take longer\n")


@torch.inference_mode()
def test_only_so_many_sizes_are_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Taped()
    network = RecordedNetwork(Sums(), recorder).eval()
    for size in range(1, MOST + 3):
        for _ in range(OFTEN):
            assert network(torch.full((size,), 2.0), auxiliary=False)[:2] == (2 * size, 2)
    assert recorder.recordings == MOST
    assert capsys.readouterr().err == ""


@torch.inference_mode()
def test_an_image_that_needs_the_recordings_memory_gets_it(capsys: pytest.CaptureFixture[str]) -> None:
    class Large(Sums):
        def forward(self, images: Tensor, *, auxiliary: bool) -> Prediction:
            if len(images) > 9 and network._recordings:
                raise torch.OutOfMemoryError
            return super().forward(images, auxiliary=auxiliary)

    network = RecordedNetwork(Large(), Taped()).eval()
    for _ in range(OFTEN):
        network(torch.ones(2), auxiliary=False)
    assert network(torch.ones(10), auxiliary=False)[:2] == (10, 1)
    assert "they need the memory" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["cityscapes_r50", "ade20k_swin-t", "ade20k_swin-l-fapn-in22k"])
def test_a_forward_pass_with_a_gpus_kernels_copies_nothing_from_or_to_the_host(row: str) -> None:
    with torch.device("meta"):
        model = build_model(PARAMS.rows[row].model).eval()
        shown = torch.empty(1, 3, 96, 160)
    with torch.inference_mode(), gpu.as_if(True):
        model(shown, auxiliary=False)  # constants are copied once, before a recording
        with Operations() as operations:
            model(shown, auxiliary=False)
    assert operations.counts["operations"] > 200
    assert operations.counts["copies from the host"] == operations.counts["copies to the host"] == 0


@pytest.mark.gpu
@torch.inference_mode()
def test_a_gpu_replays_its_recordings_with_the_bits_of_the_network() -> None:
    torch.manual_seed(0)
    tiny = build_model(TINY).eval().cuda()
    assert build.use("compiled", device="cuda") == "compiled"
    network = RecordedNetwork(tiny).eval()
    for dtype in (None, torch.bfloat16):
        for height in (32, 64):
            for seed in range(OFTEN + 2):
                with torch.autocast("cuda", dtype, enabled=dtype is not None):
                    given = images(seed, height).cuda()
                    assert equal(network(given, auxiliary=False), tiny(given, auxiliary=False))
    assert len(network._recordings) == 4
