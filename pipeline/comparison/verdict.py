"""Whether a row's seeds reproduce its published figure. docs/rows.md has the rule in words, studies/verdicts.md
how often it errs.

The seeds give an interval in which a figure such as the published one is expected, were it of further trainings of
ours: a predictive interval. All of it within the margin of the published figure: reproduced. Otherwise, all of it on
one side of the published figure: above or below. Otherwise: undecided. So seeds that vary too much to tell anything are
never called a reproduction, and a difference that their spread explains is never called one.

Figures are percent, differences percent points, spreads standard deviations between seeds in points.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import bdtr, nctdtr, ndtr, ndtri, stdtrit

from pipeline.params.schema import Row, VerdictConfig
from pipeline.params.tasks import LABELS, primary

Decision = Literal["reproduced", "above", "below", "undecided", "not run", "no verdict"]

NO_SPREAD_POINTS = 0.005
"""A spread under this is none: every printed digit of the seeds agrees, as different trainings do not."""

SEEDS_FOR_SPREAD = 3
"""Fewer seeds say too little about their spread: Student's quantile for a coverage of 90 % is 6.3 of two seeds, 2.9 of
three, 2.1 of five."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the seeds say about a published figure."""

    decision: Decision
    reason: str
    """Why, in a sentence or two with the numbers."""
    interval: tuple[float, float] | None = None
    """Where the seeds let a figure such as the published one be expected; None: they do not say."""
    interval_name: str | None = None
    """What is expected there: "one further training, 90 %" or "the median of 5 further trainings, 90 %", with ", spread
    assumed" where the seeds do not show theirs."""


def row_verdict(
    row: Row, values: Sequence[float | None], failed: int, settings: VerdictConfig, *, figure: str | None = None
) -> Verdict:
    """A row's verdict by one figure: its task's first unless `figure` names another.

    values: the figure of every evaluated seed, percent; None or NaN where a seed has none.
    failed: the seeds that did not finish: failed, diverged or stopped.
    """
    figure = figure or primary(row.task)
    published = row.reference.get(figure)
    if published is None:
        return Verdict(decision="no verdict", reason=_unpublished(row, figure))
    if not values and not failed:
        return Verdict(decision="not run", reason=f"No seed is evaluated yet; {published:.2f} is published.")
    finished = [value for value in values if value is not None and math.isfinite(value)]
    missing = _missing(len(row.seeds), len(values), len(values) - len(finished), failed)
    if not finished:
        return Verdict(decision="undecided", reason=missing)
    verdict = judge(
        finished,
        published,
        trainings=row.published_trainings,
        margin=settings.margin_points,
        coverage=settings.coverage,
        assumed_spread=settings.assumed_spread_points,
    )
    # Counted as the lowest of all, the failed ones would hold the median.
    if failed >= len(finished) and verdict.decision in ("reproduced", "above"):
        missing += f" With half or more unfinished it stays undecided; the others alone would be {verdict.decision}."
        verdict = replace(verdict, decision="undecided")
    return replace(verdict, reason=f"{verdict.reason} {missing}".rstrip())


def judge(
    values: Sequence[float],
    published: float,
    *,
    trainings: int = 1,
    margin: float,
    coverage: float,
    assumed_spread: float | None = None,
) -> Verdict:
    """Reproduced, above, below or undecided, from the figures of our seeds and the published one.

    trainings: how many the published figure is the median of; 1: it is a single one's.
    margin: the difference that does not matter.
    coverage: of the interval; "reproduced", "above" and "below" are each wrong at most (1 - coverage) / 2 of the time.
    assumed_spread: taken where the seeds do not show theirs (fewer than three, or equal figures); None: undecided then.
    """
    if not math.isfinite(published):
        raise ValueError(f"the published figure is {published}; give a number")
    if margin <= 0:
        raise ValueError(f"the margin is {margin} points; it must be above 0")
    _check(values, coverage)
    compared = _compared(values, published)
    spread = _spread(values, assumed_spread)
    if spread is None:
        return Verdict(decision="undecided", reason=f"{compared}; {_why_no_spread(values)}.")
    low, high = _expected(values, coverage, trainings, spread)
    decision: Decision
    if published - margin <= low and high <= published + margin:
        decision, where = "reproduced", f"no more than {points(margin)} from the published figure"
    elif high < published:
        decision, where = "below", "wholly below the published figure"
    elif low > published:
        decision, where = "above", "wholly above the published figure"
    else:
        decision, away = "undecided", max(published - low, high - published)
        where = (
            f"around the published figure, but up to {away:.2f} points from it, beyond the margin of {points(margin)}"
        )
    of = "one further training" if trainings == 1 else f"the median of {trainings} further trainings"
    percent = f"{100 * coverage:g} %"
    assumed = (
        f"; assuming a spread of {points(spread.points)}, since {_why_no_spread(values)}" if spread.assumed else ""
    )
    return Verdict(
        decision=decision,
        reason=f"{compared}; {of} is expected between {low:.2f} and {high:.2f} ({percent}{assumed}), {where}.",
        interval=(low, high),
        interval_name=f"{of}, {percent}" + (", spread assumed" if spread.assumed else ""),
    )


def predictive_interval(
    values: Sequence[float], coverage: float, *, trainings: int = 1, assumed_spread: float | None = None
) -> tuple[float, float] | None:
    """Where one further draw of the same distribution, or the median of `trainings` further draws, is expected.

    One draw: mean -+ t * s * sqrt(1/n + 1) with Student's t of n - 1 degrees of freedom, exact for normal draws. A
    median: ours -+ t * s * sqrt(v(n) + v(m)), v being the variance of a median of normal draws of variance 1.
    None where the draws show no spread and none is assumed.
    """
    _check(values, coverage)
    spread = _spread(values, assumed_spread)
    return None if spread is None else _expected(values, coverage, trainings, spread)


def chance_to_tell(
    seeds: int, difference: float, *, spread: float, trainings: int = 1, coverage: float, assumed_spread: float
) -> float:
    """How likely so many seeds show that a recipe differs: that the whole interval of `judge` lies on the right side of
    the published figure.

    difference, spread: the true ones, in points; the published trainings have the same spread, and are normal too.
    trainings: how many the published figure is the median of.

    With u = sqrt(1/n + 1), of medians sqrt(v(n) + v(m)), ours less the published figure is normal with mean
    `difference` and deviation spread * u. Three seeds or more show their spread s: the interval lies on one side if
    (ours less published) / (s * u) exceeds Student's t of n - 1 degrees of freedom, and this ratio follows the
    noncentral t distribution with noncentrality difference / (spread * u); of medians nearly. Fewer take the assumed
    spread a, with the normal quantile z: Phi((difference - z * a * u) / (spread * u)). ValueError for a spread of 0.
    """
    if spread <= 0 or assumed_spread <= 0:
        raise ValueError(f"the spreads are {spread:g} and {assumed_spread:g} points; they must be above 0")
    unit = math.sqrt(_variance(seeds, trainings))
    shift = abs(difference) / (spread * unit)
    if seeds >= SEEDS_FOR_SPREAD:
        return 1 - float(nctdtr(seeds - 1, shift, _quantile(seeds - 1, coverage)))
    return float(ndtr(shift - _quantile(math.inf, coverage) * assumed_spread / spread))


def median_interval(values: Sequence[float], coverage: float) -> tuple[float, float, float] | None:
    """(lowest, highest, coverage) of an interval for the median of whatever distribution the draws are of.

    From the k-th lowest to the k-th highest draw: the median lies outside only if fewer than k draws fall on one side
    of it, as coins do, so the coverage is exact without any assumption. The narrowest that has the wanted coverage, or
    all the draws span, with the coverage that it has: 93.75 % for five draws, 75 % for three. None for a single draw.
    """
    _check(values, coverage)
    count, ordered = len(values), sorted(values)
    if count < 2:
        return None
    covered = {k: 1 - 2 * float(bdtr(k - 1, count, 0.5)) for k in range(count // 2, 0, -1)}
    k = next((k for k, share in covered.items() if share >= coverage), 1)
    return ordered[k - 1], ordered[-k], covered[k]


@functools.cache
def median_variance(count: int) -> float:
    """Variance of the median of `count` normal draws of variance 1: 1, 0.5, 0.449, 0.298, 0.287 for one to five.

    Integrated over the density of the middle draw, or of the middle two, whose mean the median of an even number is.
    """
    x = np.linspace(-9, 9, 1801)
    beyond = (count - 1) // 2  # draws on either side of the middle
    density, below, above = np.exp(-(x**2) / 2), ndtr(x), ndtr(-x)
    if count % 2:
        median, weight = x, density * (below * above) ** beyond
    else:
        median = (x[:, None] + x) / 2
        pairs = (density * below**beyond)[:, None] * (density * above**beyond)
        weight = np.triu(pairs) + np.triu(pairs, 1)  # trapezoids: the diagonal counts half
    return float((median**2 * weight).sum() / weight.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spread:
    points: float
    degrees: float
    """Degrees of freedom of Student's t; infinite: the spread is taken as known."""
    assumed: bool


def _expected(values: Sequence[float], coverage: float, trainings: int, spread: _Spread) -> tuple[float, float]:
    centre = math.fsum(values) / len(values) if trainings == 1 else statistics.median(values)
    half = _quantile(spread.degrees, coverage) * spread.points * math.sqrt(_variance(len(values), trainings))
    return centre - half, centre + half


def _variance(seeds: int, trainings: int) -> float:
    """Of the seeds' mean, or median, less the published figure, in squares of the spread."""
    return 1 / seeds + 1 if trainings == 1 else median_variance(seeds) + median_variance(trainings)


def _spread(values: Sequence[float], assumed: float | None) -> _Spread | None:
    """The spread between seeds, their own where they show one."""
    own = _deviation(values)
    enough = SEEDS_FOR_SPREAD if assumed is not None else 2
    if len(values) >= enough and own >= NO_SPREAD_POINTS:
        return _Spread(points=own, degrees=len(values) - 1, assumed=False)
    return None if assumed is None else _Spread(points=max(own, assumed), degrees=math.inf, assumed=True)


def _deviation(values: Sequence[float]) -> float:
    """The standard deviation, of n - 1; 0 of a single draw. (statistics.stdev is exact, and ten times slower.)"""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


def _why_no_spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return "one seed shows no spread"
    if _deviation(values) < NO_SPREAD_POINTS:
        return f"{len(values)} equal figures show no spread"
    return f"{len(values)} seeds hardly show their spread"


@functools.cache
def _quantile(degrees: float, coverage: float) -> float:
    """Half of the wanted coverage lies between 0 and this quantile of Student's t."""
    upper = (1 + coverage) / 2
    return float(ndtri(upper) if math.isinf(degrees) else stdtrit(degrees, upper))


def _check(values: Sequence[float], coverage: float) -> None:
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"the figures are {list(values)}; give at least one, and numbers only")
    if not 0 < coverage < 1:
        raise ValueError(f"the coverage is {coverage}; it must be between 0 and 1, such as 0.9")


def _compared(values: Sequence[float], published: float) -> str:
    """ "The median of 5 seeds, 48.90, is 0.24 above the published 48.66"."""
    median = statistics.median(values)
    ours = f"The median of {len(values)} seeds, {median:.2f}," if len(values) > 1 else f"The one seed, {median:.2f},"
    difference = round(median - published, 2)
    if not difference:
        return f"{ours} equals the published {published:.2f}"
    return f"{ours} is {abs(difference):.2f} {'above' if difference > 0 else 'below'} the published {published:.2f}"


def _missing(planned: int, evaluated: int, without: int, failed: int) -> str:
    """Which of a row's seeds the verdict is not of; empty: it is of all."""
    planned = max(planned, evaluated + failed)
    counts = {
        "did not finish": failed,
        "without a figure": without,
        "not evaluated yet": planned - evaluated - failed,
    }
    named = [f"{count} {what}" for what, count in counts.items() if count]
    return f"Of {planned} seeds {', '.join(named)}." if named else ""


def _unpublished(row: Row, figure: str) -> str:
    if (authors := row.published_authors.get(figure)) is not None:
        return f"{LABELS[figure]} is published only by the authors, under another recipe: {authors:.2f}."
    return f"No {LABELS[figure]} is published."


def points(difference: float) -> str:
    """A difference in words: "1 point", "0.5 points"."""
    return f"{difference:.3g} point{'' if difference == 1 else 's'}"
