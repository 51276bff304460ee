from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import statistics
from typing import Any

import numpy as np
import pytest

from pipeline.comparison.verdict import (
    Verdict,
    chance_to_tell,
    judge,
    median_interval,
    median_variance,
    predictive_interval,
    row_verdict,
)
from pipeline.params.load import load_params, parse_params
from pipeline.params.schema import Row, VerdictConfig
from tests.helpers.shared import PROJECT

RULE = VerdictConfig()
FIVE = [48.0, 48.1, 48.2, 48.3, 48.4]  # mean and median 48.2; deviation sqrt(0.1 / 4) = 0.158114
T4 = 2.131847  # Student's t, 4 degrees of freedom, 95 %
HALF = T4 * 0.158114 * math.sqrt(1 / 5 + 1)  # 0.369246
AUGMENTATION = {"crop": [64, 64], "short_sides": [64], "long_side_max": 128}


def by(values: list[float], published: float, **settings: Any) -> Verdict:
    """The verdict of the default rule, unless `settings` change it."""
    rule = {"margin": 1.0, "coverage": 0.9, "assumed_spread": 1.0} | settings
    return judge(values, published, **rule)


def row(**entries: Any) -> Row:
    tree = {
        "datasets": {"d": {"layout": "folder", "class_names": ["a", "b"], "thing_classes": ["a", "b"]}},
        "rows": {
            "r": {
                "dataset": "d",
                "model": {"num_classes": 2},
                "train": {"steps": 100, "augmentation": AUGMENTATION},
                "test": {"short_side": 64, "long_side_max": 128},
                "seeds": [0, 1, 2, 3, 4],
                **entries,
            }
        },
    }
    return parse_params(tree).rows["r"]


PUBLISHED = row(published={"miou": 48.2})


# The chance to tell a difference


def test_how_likely_seeds_show_a_difference() -> None:
    rule = {"coverage": 0.9, "assumed_spread": 1.0}
    # one seed takes the assumed spread of 1: Phi((2 - 1.644854 * sqrt(2)) / (0.5 * sqrt(2))) = Phi(-0.46128)
    assert chance_to_tell(1, 2.0, spread=0.5, **rule) == pytest.approx(0.3223, abs=1e-5)
    # of a median of 5, v(5) = 0.286834: Phi(1 / sqrt(1.286834) - 1.644854) = Phi(-0.76332)
    assert chance_to_tell(1, 1.0, spread=1.0, trainings=5, **rule) == pytest.approx(0.22264, abs=1e-5)
    # without a difference, what is said of it is wrong in half of what the coverage leaves
    for seeds in (3, 5, 10):
        assert chance_to_tell(seeds, 0.0, spread=0.4, **rule) == pytest.approx(0.05)
    assert chance_to_tell(3, 0.0, spread=0.4, coverage=0.8, assumed_spread=1.0) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="the spreads are 0 and 1 points; they must be above 0"):
        chance_to_tell(3, 1.0, spread=0.0, **rule)


@pytest.mark.parametrize("trainings", [1, 5])
@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_the_chance_is_how_often_the_rule_says_below(seeds: int, trainings: int) -> None:
    rng, draws = np.random.default_rng(3), 4000
    ours = rng.standard_normal((draws, seeds)) - 2  # truly 2 spreads of 1 below
    published = np.median(rng.standard_normal((draws, trainings)), axis=1)
    rule = {"trainings": trainings, "coverage": 0.9, "assumed_spread": 1.0}
    said = [judge(list(a), b, margin=1.0, **rule).decision for a, b in zip(ours, published, strict=True)]
    # four standard errors, 4 * sqrt(0.25 / 4000) = 0.032; of medians the formula is nearly right
    assert said.count("below") / draws == pytest.approx(chance_to_tell(seeds, 2.0, spread=1.0, **rule), abs=0.032)


# The interval for the median


def test_the_range_of_five_draws_holds_the_median_fifteen_times_in_sixteen() -> None:
    # All five are above the median with probability 1/32, all below with 1/32: 1 - 2/32 = 0.9375.
    assert median_interval([3.0, 1.0, 5.0, 2.0, 4.0], 0.9) == (1.0, 5.0, 0.9375)


@pytest.mark.parametrize(
    ("count", "coverage", "expected"),
    [
        (2, 0.9, (1, 2, 0.5)),  # 1 - 2/4
        (3, 0.9, (1, 3, 0.75)),  # 1 - 2/8: what it has, not what was wanted
        (3, 0.7, (1, 3, 0.75)),
        (5, 0.95, (1, 5, 0.9375)),
        (5, 0.6, (2, 4, 0.625)),  # 1 - 2 (1 + 5)/32
        (5, 0.625, (2, 4, 0.625)),
        (5, 0.63, (1, 5, 0.9375)),
        (6, 0.9, (1, 6, 0.96875)),  # 1 - 2/64
        (8, 0.9, (2, 7, 0.9296875)),  # 1 - 2 (1 + 8)/256
        (10, 0.9, (2, 9, 0.978515625)),  # 1 - 2 (1 + 10)/1024; from the third on: 1 - 2 (1 + 10 + 45)/1024 = 0.891
    ],
)
def test_the_interval_is_the_narrowest_that_covers_enough_or_the_range_with_what_it_covers(
    count: int, coverage: float, expected: tuple[int, int, float]
) -> None:
    assert median_interval(list(range(1, count + 1)), coverage) == pytest.approx(expected, abs=1e-12)


def test_one_draw_has_no_interval_for_its_median() -> None:
    assert median_interval([48.2], 0.9) is None


def test_equal_draws_have_an_interval_of_no_width() -> None:
    assert median_interval([48.2] * 5, 0.9) == (48.2, 48.2, 0.9375)


# The predictive interval


def test_one_further_draw_is_expected_by_students_t_around_the_mean() -> None:
    # 1 to 5: mean 3, deviation sqrt(10/4); 3 -+ 2.131847 * 1.581139 * sqrt(1.2) = 3 -+ 3.692467
    assert predictive_interval([5.0, 1.0, 4.0, 2.0, 3.0], 0.9) == pytest.approx((3 - 3.692467, 3 + 3.692467), abs=1e-5)
    # 95 %: t = 2.776445
    assert predictive_interval([1, 2, 3, 4, 5], 0.95) == pytest.approx((3 - 4.808943, 3 + 4.808943), abs=1e-5)
    # Two draws, t of one degree of freedom is tan(0.45 pi) = 6.313752; deviation of 48, 49 is 0.707107
    half = 6.313752 * 0.707107 * math.sqrt(1.5)
    assert predictive_interval([48.0, 49.0], 0.9) == pytest.approx((48.5 - half, 48.5 + half), abs=1e-5)


def test_a_median_of_five_further_draws_is_expected_around_our_median() -> None:
    # Around 2, the median, not the mean 4; the variance of a median of five is 0.286834, of a draw's:
    # deviation of 0, 1, 2, 3, 14: sqrt((16 + 9 + 4 + 1 + 100) / 4) = 5.700877
    half = T4 * 5.700877 * math.sqrt(2 * 0.286834)
    expected = (2 - half, 2 + half)
    assert predictive_interval([0, 1, 2, 3, 14], 0.9, trainings=5) == pytest.approx(expected, abs=1e-4)


def test_the_variance_of_a_median_is_that_of_the_tables() -> None:
    # Of normal order statistics: one draw 1; two, their mean, 1/2; three 1 - sqrt(3)/pi; the others by simulation below
    assert median_variance(1) == pytest.approx(1, abs=1e-6)
    assert median_variance(2) == pytest.approx(0.5, abs=1e-4)
    assert median_variance(3) == pytest.approx(1 - math.sqrt(3) / math.pi, abs=1e-6)
    assert median_variance(4) == pytest.approx(0.2982, abs=1e-4)
    assert median_variance(5) == pytest.approx(0.2868, abs=1e-4)
    assert median_variance(101) == pytest.approx(math.pi / 2 / 101, rel=0.01)  # of many draws: pi / (2 n)


def test_the_variance_of_a_median_is_what_drawing_medians_finds() -> None:
    draw = random.Random(3)
    for count in (4, 5, 10):
        medians = [statistics.median(draw.gauss(0, 1) for _ in range(count)) for _ in range(20_000)]
        assert statistics.pvariance(medians, 0) == pytest.approx(median_variance(count), rel=0.03)


@pytest.mark.parametrize("trainings", [1, 5])
def test_the_predictive_interval_moves_and_scales_with_the_figures_in_any_order(trainings: int) -> None:
    low, high = predictive_interval(FIVE, 0.9, trainings=trainings) or (0, 0)
    for order in itertools.permutations(FIVE):
        assert predictive_interval(order, 0.9, trainings=trainings) == pytest.approx((low, high), abs=1e-9)
    moved = [3 * value + 7 for value in FIVE]
    assert predictive_interval(moved, 0.9, trainings=trainings) == pytest.approx((3 * low + 7, 3 * high + 7), abs=1e-9)


def test_more_coverage_is_a_wider_interval_and_a_published_median_a_narrower_one() -> None:
    def width(**settings: Any) -> float:
        low, high = predictive_interval(FIVE, **settings) or (0, 0)
        return high - low

    assert width(coverage=0.8) < width(coverage=0.9) < width(coverage=0.95)
    assert width(coverage=0.9, trainings=9) < width(coverage=0.9, trainings=5) < width(coverage=0.9, trainings=1)


def test_one_figure_or_equal_ones_have_a_predictive_interval_only_of_an_assumed_spread() -> None:
    assert predictive_interval([48.2], 0.9) is None
    assert predictive_interval([48.2] * 5, 0.9) is None
    # The normal quantile of 95 % is 1.644854: one draw 1.644854 * 0.5 * sqrt(2), five 1.644854 * 0.5 * sqrt(1.2)
    assert predictive_interval([48.2], 0.9, assumed_spread=0.5) == pytest.approx((47.036913, 49.363087), abs=1e-5)
    assert predictive_interval([48.2] * 5, 0.9, assumed_spread=0.5) == pytest.approx((47.299078, 49.100922), abs=1e-5)


def test_two_figures_further_apart_than_the_assumed_spread_are_taken_at_their_word() -> None:
    # 40 and 44: deviation 2.828427, above the assumed 1; 42 -+ 1.644854 * 2.828427 * sqrt(1.5)
    expected = (42 - 5.697953, 42 + 5.697953)
    assert predictive_interval([40.0, 44.0], 0.9, assumed_spread=1.0) == pytest.approx(expected, abs=1e-4)


# The rule


@pytest.mark.parametrize(
    ("published", "decision"),
    [
        (48.2, "reproduced"),
        (48.2 + 1 - HALF - 0.001, "reproduced"),  # the interval ends within the margin by a hair
        (48.2 + 1 - HALF + 0.001, "below"),  # reaches past it, and lies below the published figure
        (48.2 - 1 + HALF + 0.001, "reproduced"),
        (48.2 - 1 + HALF - 0.001, "above"),
        (60.0, "below"),
        (30.0, "above"),
    ],
)
def test_seeds_that_vary_little_are_reproduced_or_differ(published: float, decision: str) -> None:
    assert by(FIVE, published).decision == decision


@pytest.mark.parametrize(
    ("published", "decision"),
    [
        (48.2, "undecided"),  # 5 * HALF = 1.846: equal medians, but a further training may be 1.8 points away
        (48.2 + 5 * HALF - 0.001, "undecided"),
        (48.2 + 5 * HALF + 0.001, "below"),
        (48.2 - 5 * HALF + 0.001, "undecided"),
        (48.2 - 5 * HALF - 0.001, "above"),
    ],
)
def test_seeds_that_vary_much_are_never_reproduced(published: float, decision: str) -> None:
    wide = [48.2 + 5 * (value - 48.2) for value in FIVE]
    assert by(wide, published).decision == decision


def test_a_small_difference_beyond_the_spread_but_within_the_margin_is_reproduced() -> None:
    verdict = by(FIVE, 48.7)  # the interval ends at 48.57, under 48.7, and 47.83 is 0.87 from it
    assert verdict.interval == pytest.approx((48.2 - HALF, 48.2 + HALF), abs=1e-5)
    assert verdict.decision == "reproduced"
    assert by(FIVE, 48.7, margin=0.5).decision == "below"


def test_the_sixth_draw_outside_the_range_is_no_evidence() -> None:
    wide = [47.7, 48.0, 48.2, 48.4, 48.7]
    assert by(wide, 48.9).decision == "undecided"  # deviation 0.381, expected 47.31 to 49.09


def test_a_published_median_is_decided_where_a_single_training_is_not() -> None:
    seeds = [47.6, 47.9, 48.2, 48.5, 48.8]  # deviation 0.474: -+ 1.11 for one training, -+ 0.77 for a median of five
    assert by(seeds, 48.2).decision == "undecided"
    assert by(seeds, 48.2, trainings=5).decision == "reproduced"
    assert by(seeds, 49.2).decision == "undecided"
    assert by(seeds, 49.2, trainings=5).decision == "below"


@pytest.mark.parametrize("scale", [0.3, 1, 2, 4])
@pytest.mark.parametrize("trainings", [1, 5])
def test_as_the_seeds_rise_the_verdict_goes_from_below_to_above_and_never_back(scale: float, trainings: int) -> None:
    seeds = [scale * (value - 48.2) for value in FIVE]
    decisions = [by([s + d / 50 for s in seeds], 0.0, trainings=trainings).decision for d in range(-300, 301)]
    passed = [decision for decision, _ in itertools.groupby(decisions)]
    assert passed in (
        ["below", "reproduced", "above"],
        ["below", "undecided", "reproduced", "undecided", "above"],
        ["below", "undecided", "above"],
    )


def test_the_verdict_depends_on_nothing_but_differences_and_mirrors() -> None:
    opposite = {"below": "above", "above": "below"}
    for published in (46.0, 47.3, 48.0, 48.2, 48.6, 49.3, 51.0):
        decision = by(FIVE, published).decision
        assert by([value + 20 for value in FIVE], published + 20).decision == decision
        assert by(FIVE[::-1], published).decision == decision
        assert by([-value for value in FIVE], -published).decision == opposite.get(decision, decision)


def test_one_seed_is_judged_by_the_assumed_spread_and_never_reproduced() -> None:
    # 1.644854 * 1 * sqrt(2) = 2.326
    assert by([52.0], 52.0).decision == "undecided"
    assert by([52.0 - 2.32], 52.0).decision == "undecided"
    assert by([52.0 - 2.33], 52.0).decision == "below"
    assert by([52.0 + 2.33], 52.0).decision == "above"
    assert by([52.0], 52.0).interval_name == "one further training, 90 %, spread assumed"


def test_one_seed_without_an_assumed_spread_is_undecided_however_far_it_is() -> None:
    verdict = by([12.0], 52.0, assumed_spread=None)
    assert (verdict.decision, verdict.interval, verdict.interval_name) == ("undecided", None, None)
    assert verdict.reason == "The one seed, 12.00, is 40.00 below the published 52.00; one seed shows no spread."


def test_equal_figures_do_not_make_the_rule_certain() -> None:
    # Any difference at all is infinitely many deviations of 0: without the assumed spread it would be "below".
    assert by([48.2] * 5, 48.3).decision == "undecided"
    assert by([48.2, 48.2, 48.2004], 48.3).decision == "undecided"  # and so with figures equal in print
    assert "5 equal figures show no spread" in by([48.2] * 5, 48.3).reason


def test_the_reason_of_each_kind_has_the_numbers() -> None:
    assert by(FIVE, 48.3).reason == (
        "The median of 5 seeds, 48.20, is 0.10 below the published 48.30; one further training is expected between "
        "47.83 and 48.57 (90 %), no more than 1 point from the published figure."
    )
    assert by(FIVE, 48.2, trainings=5, margin=1.5).reason == (
        "The median of 5 seeds, 48.20, equals the published 48.20; the median of 5 further trainings is expected "
        "between 47.94 and 48.46 (90 %), no more than 1.5 points from the published figure."
    )
    assert by(FIVE, 50.0).reason.endswith("between 47.83 and 48.57 (90 %), wholly below the published figure.")
    assert by(FIVE, 46.0).reason.endswith("between 47.83 and 48.57 (90 %), wholly above the published figure.")
    assert by([52.4], 52.0).reason == (
        "The one seed, 52.40, is 0.40 above the published 52.00; one further training is expected between 50.07 and "
        "54.73 (90 %; assuming a spread of 1 point, since one seed shows no spread), around the published figure, but "
        "up to 2.73 points from it, beyond the margin of 1 point."
    )


@pytest.mark.parametrize(
    ("values", "published", "settings", "message"),
    [
        ([], 48.0, {}, "the figures are []; give at least one, and numbers only"),
        ([48.0, math.nan], 48.0, {}, "the figures are [48.0, nan]; give at least one, and numbers only"),
        ([48.0], math.inf, {}, "the published figure is inf; give a number"),
        ([48.0], 48.0, {"margin": 0.0}, "the margin is 0.0 points; it must be above 0"),
        ([48.0], 48.0, {"coverage": 90}, "the coverage is 90; it must be between 0 and 1, such as 0.9"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(
    values: list[float], published: float, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        by(values, published, **settings)


# Rows


def test_a_row_is_judged_by_its_tasks_first_figure_unless_another_is_named() -> None:
    panoptic = row(task="panoptic", published={"pq": 52.0, "ap": 41.8})
    values = [41.7, 41.8, 41.9, 41.8, 41.8]
    assert row_verdict(panoptic, values, 0, RULE).decision == "below"
    assert row_verdict(panoptic, values, 0, RULE, figure="ap").decision == "reproduced"


def test_a_row_with_every_seed_has_the_rules_verdict_and_reason() -> None:
    assert row_verdict(PUBLISHED, FIVE, 0, RULE) == by(FIVE, 48.2)


def test_a_rows_margin_coverage_and_assumed_spread_are_those_of_params_yaml() -> None:
    assert row_verdict(PUBLISHED, FIVE, 0, VerdictConfig(margin_points=0.3)).decision == "undecided"
    assert row_verdict(PUBLISHED, FIVE, 0, VerdictConfig(margin_points=0.3, coverage=0.5)).decision == "reproduced"
    assert row_verdict(PUBLISHED, [47.9], 0, VerdictConfig(assumed_spread_points=0.1)).decision == "reproduced"


def test_the_row_published_as_a_median_is_compared_as_one() -> None:
    swin_s = load_params(PROJECT / "params.yaml").rows["ade20k_swin-s"]
    verdict = row_verdict(swin_s, [51.0, 51.2, 51.3, 51.5, 51.1], 0, RULE)
    assert verdict.interval_name == "the median of 5 further trainings, 90 %"


def test_a_row_that_has_not_run_says_so() -> None:
    verdict = row_verdict(PUBLISHED, [], 0, RULE)
    assert (verdict.decision, verdict.reason) == ("not run", "No seed is evaluated yet; 48.20 is published.")


def test_a_row_published_under_another_recipe_or_nowhere_has_no_verdict() -> None:
    authors = row(task="instance", published_authors={"ap": 46.7})
    verdict = row_verdict(authors, FIVE, 0, RULE)
    assert verdict.decision == "no verdict"
    assert verdict.reason == "AP is published only by the authors, under another recipe: 46.70."
    theirs = row_verdict(dataclasses.replace(authors, figures="published_authors"), [46.0], 0, RULE)
    assert theirs.decision == "undecided"  # a row of their recipe is judged by them
    assert theirs.reason.startswith("The one seed, 46.00, is 0.70 below the published 46.70")
    nothing = row_verdict(row(), [], 0, RULE)
    assert (nothing.decision, nothing.reason) == ("no verdict", "No mIoU is published.")
    other = row_verdict(row(published={"miou": 48.2}), FIVE, 0, RULE, figure="miou_ms_flip")
    assert (other.decision, other.reason) == ("no verdict", "No mIoU (ms+flip) is published.")


def test_a_failed_seed_is_in_the_reason() -> None:
    verdict = row_verdict(PUBLISHED, FIVE[:4], 1, RULE)
    assert verdict.decision == "reproduced"
    assert verdict.reason.endswith("from the published figure. Of 5 seeds 1 did not finish.")


def test_seeds_without_a_figure_or_to_come_are_in_the_reason() -> None:
    verdict = row_verdict(PUBLISHED, [48.1, None, 48.2, math.nan], 0, RULE)
    assert verdict.reason.startswith("The median of 2 seeds, 48.15,")
    assert verdict.reason.endswith(" Of 5 seeds 2 without a figure, 1 not evaluated yet.")


@pytest.mark.parametrize(
    ("published", "finished", "failed", "decision"),
    [
        (48.2, 3, 2, "reproduced"),
        (48.2, 3, 3, "undecided"),  # the failed ones, lowest of all, would share the median
        (40.0, 3, 2, "above"),
        (40.0, 3, 3, "undecided"),
        (60.0, 3, 3, "below"),  # and no failed seed makes a figure better
    ],
)
def test_where_half_the_seeds_fail_nothing_is_reproduced(
    published: float, finished: int, failed: int, decision: str
) -> None:
    verdict = row_verdict(row(published={"miou": published}), FIVE[:finished], failed, RULE)
    assert verdict.decision == decision
    assert f"{failed} did not finish" in verdict.reason
    assert ("half or more unfinished" in verdict.reason) == (decision == "undecided")


def test_a_row_none_of_whose_seeds_has_a_figure_is_undecided() -> None:
    failed = row_verdict(PUBLISHED, [], 5, RULE)
    assert (failed.decision, failed.reason) == ("undecided", "Of 5 seeds 5 did not finish.")
    assert row_verdict(PUBLISHED, [None], 1, RULE).reason == (
        "Of 5 seeds 1 did not finish, 1 without a figure, 3 not evaluated yet."
    )
