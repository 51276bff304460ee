"""The compiled loops give what the plain forms give."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f.deformable_attention import attend, plain_attend
from m2f.draws import uniform
from m2f.kernels import build, cpu
from m2f.kernels.build import loops, source_digest, use
from m2f.losses import point_losses
from m2f.matcher import _mask_costs
from m2f.points import TrueMasks, sample_logits, sample_masks, uncertain_points
from m2f.types import Prediction, Target

pytestmark = pytest.mark.skipif(loops() is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    """Every test begins with compiled loops, and leaves the process as it was."""
    use("compiled")
    yield
    use("auto")


SIZES = ((3, 5), (7, 4))
POSITIONS = torch.rand(6, 2, generator=torch.Generator().manual_seed(1))


def attention_inputs(*, channels: int, points: int = 2) -> list[Tensor]:
    """Value, offsets and logits of 2 images, 6 queries at POSITIONS, 3 heads, 2 levels; many points lie outside."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, sum(h * w for h, w in SIZES), 3, channels, generator=generator)
    offsets = 3 * torch.randn(2, 6, 3, len(SIZES), points, 2, generator=generator)
    return [value, offsets, torch.randn(2, 6, 3, len(SIZES), points, generator=generator)]


def test_the_loops_count_in_digests_as_they_are_now() -> None:
    assert source_digest() == cpu.LOOPS


def test_a_comment_in_the_loops_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = build._SOURCE.read_text()
    for name, changed, same in (
        ("comment.c", "/* more */\n\n" + text, True),
        ("code.c", text.replace("- 0.5f", "- 0.25f", 1), False),
    ):
        (tmp_path / name).write_text(changed)
        monkeypatch.setattr(build, "_SOURCE", tmp_path / name)
        assert (source_digest() == cpu.LOOPS) == same


def test_the_middle_of_four_pixels_is_their_mean_times_the_weight() -> None:
    value = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 4, 1, 1)
    # one point a pixel right and down of the corner, the other far outside; weights e^1 / (e^1 + e^0) and the rest
    offsets, logits = torch.tensor([1.0, 1, 9, 9]).view(1, 1, 1, 1, 2, 2), torch.tensor([1.0, 0]).view(1, 1, 1, 1, 2)
    found = cpu.deformable_attention(value, ((2, 2),), torch.zeros(1, 2), offsets, logits)
    assert found.item() == pytest.approx(3 * math.e / (math.e + 1), abs=1e-6)


@pytest.mark.parametrize("channels", [1, 5, 16, 32, 256])
def test_attention_and_its_gradients_are_the_plain_forms(channels: int) -> None:
    found = []
    for form in (plain_attend, cpu.deformable_attention):
        inputs = [t.clone().requires_grad_() for t in attention_inputs(channels=channels)]
        output = form(inputs[0], SIZES, POSITIONS, inputs[1], inputs[2])
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
        found.append([output.detach(), *(t.grad for t in inputs)])
    for plain, compiled in zip(*found, strict=True):
        assert plain is not None and compiled is not None
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("more", [{"channels": cpu.MOST_CHANNELS + 1}, {"channels": 1, "points": 33}])
def test_a_head_of_more_channels_or_points_than_the_loops_have_room_for_takes_the_plain_form(
    more: dict[str, int],
) -> None:
    value, offsets, logits = attention_inputs(**more)
    plain = plain_attend(value, SIZES, POSITIONS, offsets, logits)
    assert torch.equal(attend(value, SIZES, POSITIONS, offsets, logits), plain)


def test_points_far_outside_or_not_finite_give_nothing() -> None:
    value, offsets, logits = attention_inputs(channels=4)
    for wrong in (float("nan"), float("inf"), -float("inf"), 1e30, -1e30):
        inputs = [t.clone().requires_grad_() for t in (value, torch.full_like(offsets, wrong), logits)]
        output = cpu.deformable_attention(inputs[0], SIZES, POSITIONS, inputs[1], inputs[2])
        output.sum().backward()
        assert not output.any()
        assert all(t.grad is not None and not t.grad.any() for t in inputs)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            inputs = [t.clone().requires_grad_() for t in attention_inputs(channels=16)]
            output = cpu.deformable_attention(inputs[0], SIZES, POSITIONS, inputs[1], inputs[2])
            output.square().sum().backward()
            points = uncertain_points(torch.randn(9, 8, 8, generator=torch.Generator().manual_seed(1)), range(9),
                                      points=64, oversample=3.0, importance=0.75)  # fmt: skip
            prediction, targets = matching_inputs(6, 600)
            logits = prediction.mask_logits.requires_grad_()
            where = uniform([1, 2], 0, 1200).view(2, 600, 2)
            costs = cpu.mask_costs(logits.detach(), where, TrueMasks.of(targets).at_shared_points(where))
            losses = cpu.mask_losses(logits.flatten(0, 1), where.repeat(6, 1, 1), where.repeat(6, 1, 1)[..., 0])
            torch.cat(losses).sum().backward()
            drawn = uniform(range(7), 3, 100)
            found.append(
                [output.detach(), *(t.grad for t in inputs), points, drawn, *costs, *losses, logits.grad]  # type: ignore[list-item]
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 17, 5000])
def test_draws_are_those_of_the_plain_form_bit_for_bit(count: int) -> None:
    seeds = [0, 1, -5, 2**62 + 12345]
    compiled = uniform(seeds, 7, count)
    use("plain")
    assert torch.equal(compiled, uniform(seeds, 7, count))


@pytest.mark.parametrize("importance", [0.0, 0.5, 1.0])
def test_the_uncertain_points_are_those_of_the_plain_form(importance: float) -> None:
    logits = torch.randn(6, 9, 13, generator=torch.Generator().manual_seed(2))
    chosen = []
    for kernels in ("compiled", "plain"):
        use(kernels)  # type: ignore[arg-type]
        chosen.append(uncertain_points(logits, range(6), points=40, oversample=3.0, importance=importance))
    certain = int(40 * importance)
    assert torch.equal(chosen[0][:, certain:], chosen[1][:, certain:])
    for compiled, plain in zip(*(points[:, :certain].tolist() for points in chosen), strict=True):
        assert sorted(compiled) == sorted(plain)  # in another order


def test_of_equally_uncertain_points_the_earlier_are_chosen() -> None:
    points = uncertain_points(torch.zeros(1, 4, 4), [5], points=4, oversample=3.0, importance=0.5)
    drawn = uniform([5], 0, 2 * (12 + 2)).view(14, 2)
    assert torch.equal(points[0], torch.cat((drawn[:2], drawn[12:])))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_true_masks_at_points_are_those_of_the_plain_form(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    maps = torch.randint(0, 4, (2, 6, 11), generator=generator).to(dtype)
    masks = TrueMasks(maps, torch.arange(2)[:, None], torch.arange(3, dtype=torch.int32).expand(2, 3))
    shared, own = torch.rand(2, 50, 2, generator=generator), torch.rand(4, 50, 2, generator=generator) * 1.2 - 0.1
    image, mask = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 1, 1])
    compiled = [masks.at_shared_points(shared), masks.at_own_points(image, mask, own)]
    use("plain")
    plain = [masks.at_shared_points(shared), masks.at_own_points(image, mask, own)]
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def matching_inputs(queries: int, points: int) -> tuple[Prediction, list[Target]]:
    """2 images with 3 and 1 masks, logits up to about 100."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, queries, 6, 9, generator=generator) * torch.tensor([1.0, 40.0]).view(2, 1, 1, 1)
    classes = torch.randn(2, queries, 5, generator=generator)
    segments = torch.randint(0, 3, (2, 8, 12), generator=generator)
    labels = [torch.tensor([0, 3, 1]), torch.tensor([2])]
    return Prediction(classes, logits), [Target.from_segments(*pair) for pair in zip(labels, segments, strict=True)]


@pytest.mark.parametrize("points", [1, 40, 1300])
@pytest.mark.parametrize("queries", [1, 4, 6])
def test_matching_costs_are_those_of_the_plain_form(queries: int, points: int) -> None:
    prediction, targets = matching_inputs(queries, points)
    where = uniform([1, 2], 0, 2 * points).view(2, points, 2)
    masks = TrueMasks.of(targets).at_shared_points(where)
    exact = _mask_costs(sample_logits(prediction.mask_logits, where).double(), masks.double())
    for found, wanted in zip(cpu.mask_costs(prediction.mask_logits, where, masks), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)


def test_matching_costs_of_logits_that_are_not_finite_are_not_finite() -> None:
    where, masks = torch.full((1, 3, 2), 0.5), torch.zeros(1, 2, 3)
    for wrong in (float("nan"), float("inf"), -float("inf")):
        logits = torch.zeros(1, 5, 4, 4)
        logits[0, 4] = wrong
        entropy, _ = cpu.mask_costs(logits, where, masks)
        assert entropy[0, :4].isfinite().all() and not entropy[0, 4].isfinite().any()


@pytest.mark.parametrize("points", [1, 40, 1300])
def test_mask_losses_and_their_gradient_are_those_of_the_plain_form(points: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 6, 9, generator=generator) * torch.tensor([1.0, 10.0, 60.0]).view(3, 1, 1)
    where, masks = torch.rand(3, points, 2, generator=generator), torch.rand(3, points, generator=generator)
    found = []
    for plain in (True, False):
        leaf = (logits.double() if plain else logits).clone().requires_grad_()
        if plain:
            losses = point_losses(
                F.grid_sample(leaf[:, None], 2 * where[:, None].double() - 1, align_corners=False)[:, 0, 0],
                masks.double(),
            )
        else:
            losses = cpu.mask_losses(leaf, where, masks)
        (losses[0] @ torch.tensor([1.0, 2, 3]).to(leaf) - losses[1] @ torch.tensor([3.0, 1, 2]).to(leaf)).backward()
        assert leaf.grad is not None
        found.append([loss.detach().double() for loss in losses] + [leaf.grad.double()])
    for plain_one, compiled_one in zip(*found, strict=True):
        torch.testing.assert_close(compiled_one, plain_one, rtol=1e-5, atol=1e-6)


def test_no_pairs_have_no_losses() -> None:
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    entropy, dice = cpu.mask_losses(logits, torch.zeros(0, 5, 2), torch.zeros(0, 5))
    (entropy.sum() + dice.sum()).backward()
    assert entropy.shape == dice.shape == (0,) and logits.grad is not None


@pytest.mark.parametrize("kernels", ["plain", "compiled"])
def test_no_masks_at_points_are_no_rows(kernels: str) -> None:
    use(kernels)  # type: ignore[arg-type]
    masks = TrueMasks(torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int64),
                      torch.zeros(1, 0, dtype=torch.int32))  # fmt: skip
    nobody = torch.zeros(0, dtype=torch.int64)
    assert masks.at_shared_points(torch.rand(1, 5, 2)).shape == (1, 0, 5)
    assert masks.at_own_points(nobody, nobody, torch.rand(0, 5, 2)).shape == (0, 5)


def test_other_tensors_than_32_bits_on_a_cpu_take_the_plain_form() -> None:
    value, offsets, logits = (t.double() for t in attention_inputs(channels=4))
    assert not cpu.takes(value)
    assert not cpu.takes(torch.zeros(2, device="meta"))
    assert attend(value, SIZES, POSITIONS, offsets, logits).dtype == torch.float64


def test_attention_to_no_points_is_the_plain_forms() -> None:
    value, offsets, logits = attention_inputs(channels=4)
    found = attend(value.requires_grad_(), SIZES, POSITIONS, offsets[..., :0, :], logits[..., :0])
    found.sum().backward()
    assert not found.any() and value.grad is not None and not value.grad.any()


def test_masks_of_maps_without_pixels_are_nowhere() -> None:
    for target in (
        Target(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 0, 4, dtype=torch.bool)),
        Target.from_segments(torch.zeros(2, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int32)),
    ):
        for points in (torch.rand(5, 2), torch.rand(2, 5, 2)):
            assert torch.equal(sample_masks(target, points), torch.zeros(2, 5))


def test_points_of_maps_without_pixels_are_an_error_as_in_the_plain_form() -> None:
    with pytest.raises(RuntimeError, match="non-empty"):
        uncertain_points(torch.zeros(2, 0, 4), [1, 2], points=4, oversample=3.0, importance=0.5)


def test_points_for_whose_draws_there_is_no_memory_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """Of the threads, the last one gets no memory."""

        def uncertain(self, *values: ctypes.c_int64) -> int:
            return int(values[-1].value < 2)

    monkeypatch.setattr(cpu, "loops", lambda *_: Full())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(MemoryError, match="no memory to draw 14 points"):
        uncertain_points(torch.zeros(2, 4, 4), [1, 2], points=4, oversample=3.0, importance=0.5)
