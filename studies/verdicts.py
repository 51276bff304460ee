"""How often the rule of pipeline.comparison.verdict errs, by simulation; studies/verdicts.md explains the tables.

Draws seeds and published figures whose true difference and spread are known, and asks the rule itself (`judge`). Equal
settings print equal tables, under a minute's worth.

python -m studies.verdicts [--draws 10000] [--margin 1.0] [--coverage 0.9] [--chart studies/verdicts.svg]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from pipeline.comparison.verdict import Verdict, judge, median_interval, predictive_interval
from pipeline.params.schema import VerdictConfig

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

SEEDS = (1, 3, 5, 10)
SPREADS = (0.1, 0.3, 0.5, 1.0)
DIFFERENCES = (0.0, 0.5, 1.0, 2.0, 4.0)
"""True differences by which ours are below the published recipe, in margins."""
PUBLISHED = {1: "a single training", 5: "the median of 5 trainings"}
DECISIONS = ("reproduced", "below", "above", "undecided")


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Median 0, deviation 1."""
    return rng.standard_normal(shape)


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Student's t with 3 degrees of freedom, scaled to deviation 1: a far draw now and then, on either side."""
    return rng.standard_t(3, shape) / np.sqrt(3)


def low_tail(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal, but every tenth draw is 4 deviations lower: trainings that half fail."""
    return rng.standard_normal(shape) - 4 * (rng.random(shape) < 0.1)


SHAPES: dict[str, Draw] = {"normal": normal, "heavy tails": heavy, "one in ten 4 spreads low": low_tail}


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What is true, and how it is looked at."""

    seeds: int
    spread: float
    difference: float = 0.0
    """Ours less the published recipe's, in points."""
    trainings: int = 1
    """The published figure is their median."""
    shape: Draw = normal
    luckiest_of: int = 1
    """The published figure is the best of so many."""


class Simulation:
    """The rule with its settings, and how many worlds of a kind are drawn."""

    def __init__(self, rule: VerdictConfig, draws: int) -> None:
        self.rule, self.draws = rule, draws

    def figures(self, world: World) -> tuple[list[list[float]], list[float]]:
        """`draws` times our seeds' figures, and the published ones; the same in every world but for their scale."""
        rng = np.random.default_rng(20)
        ours = world.difference + world.spread * world.shape(rng, (self.draws, world.seeds))
        drawn = np.median(world.shape(rng, (self.draws, world.luckiest_of, world.trainings)), axis=2)
        return ours.tolist(), (world.spread * drawn.max(axis=1)).tolist()

    def verdict(self, values: Sequence[float], published: float, trainings: int = 1) -> Verdict:
        """The rule's."""
        return judge(
            values,
            published,
            trainings=trainings,
            margin=self.rule.margin_points,
            coverage=self.rule.coverage,
            assumed_spread=self.rule.assumed_spread_points,
        )

    def shares(self, world: World) -> dict[str, float]:
        """How often each verdict is given, in percent."""
        pairs = zip(*self.figures(world), strict=True)
        counts = Counter(self.verdict(values, published, world.trainings).decision for values, published in pairs)
        return {decision: 100 * counts[decision] / self.draws for decision in DECISIONS}

    def held(self, world: World) -> float:
        """How often the predictive interval holds the published figure, in percent."""
        inside = 0
        for values, published in zip(*self.figures(world), strict=True):
            interval = predictive_interval(values, self.rule.coverage, trainings=world.trainings)
            inside += interval is not None and interval[0] <= published <= interval[1]
        return 100 * inside / self.draws


def table(title: str, headings: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Print it as Markdown."""
    print(f"\n{title}\n\n| {' | '.join(headings)} |\n|{' --- |' * len(headings)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")


def cell(shares: dict[str, float]) -> str:
    """ "63 / 2 / 2 / 33"."""
    return " / ".join(f"{shares[decision]:.0f}" for decision in DECISIONS)


def ranges(simulation: Simulation) -> None:
    """Why the seeds' range is no rule, and what the two intervals cover."""
    lines = []
    for seeds in (3, 5, 10):
        values, further = (np.array(part) for part in simulation.figures(World(seeds=seeds, spread=1)))
        outside = (further < values.min(axis=1)) | (further > values.max(axis=1))
        lines.append([str(seeds), f"{100 * outside.mean():.1f}", f"{200 / (seeds + 1):.1f}"])
    table(
        "A further training outside the seeds' range, %",
        ["seeds", "simulated", "exactly: 2 / (seeds + 1)"],
        lines,
    )

    lines = []
    for seeds in (2, 3, 5, 10):
        for trainings, of in PUBLISHED.items():
            held = [
                simulation.held(World(seeds=seeds, spread=1, trainings=trainings, shape=shape))
                for shape in SHAPES.values()
            ]
            lines.append([str(seeds), of, *(f"{share:.1f}" for share in held)])
    table(
        f"Predictive interval of {100 * simulation.rule.coverage:g} %: how often it holds the published figure, %",
        ["seeds", "published figure", *SHAPES],
        lines,
    )

    lines = []
    for seeds in (3, 5, 10):
        stated = median_interval(range(seeds), simulation.rule.coverage)
        assert stated is not None
        cells = []
        for shape in SHAPES.values():
            truth = np.median(shape(np.random.default_rng(21), (2_000_000,)))
            values, _ = simulation.figures(World(seeds=seeds, spread=1, shape=shape))
            intervals = np.array([median_interval(v, simulation.rule.coverage) for v in values])
            ordered = 100 * ((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean()
            mean, half = np.mean(values, axis=1), np.std(values, axis=1, ddof=1) / np.sqrt(seeds)
            student = 100 * (np.abs(mean - truth) <= stdtrit(seeds - 1, (1 + stated[2]) / 2) * half).mean()
            cells.append(f"{ordered:.1f} ({student:.1f})")
        lines.append([str(seeds), f"{100 * stated[2]:.2f}", *cells])
    table(
        "Interval for the median: how often it holds the true median, % (in brackets: Student's t interval)",
        ["seeds", "stated", *SHAPES],
        lines,
    )


def errors(simulation: Simulation) -> None:
    """Verdicts by seeds, spread and true difference, and the worst of each kind of error."""
    margin = simulation.rule.margin_points
    worst = dict.fromkeys(("reproduced", "below", "above"), 0.0)
    for trainings, of in PUBLISHED.items():
        lines = []
        for seeds in SEEDS:
            for spread in SPREADS:
                line = [str(seeds), f"{spread:g}"]
                for times in DIFFERENCES:
                    world = World(seeds=seeds, spread=spread, difference=-times * margin, trainings=trainings)
                    shares = simulation.shares(world)
                    line.append(cell(shares))
                    wrong = {"above": True, "below": times == 0, "reproduced": times >= 1}
                    worst |= {decision: max(worst[decision], shares[decision]) for decision in worst if wrong[decision]}
                lines.append(line)
        table(
            f"Published figure of {of}: reproduced / below / above / undecided, %",
            [
                "seeds",
                "spread",
                *(f"truly {times * margin:g} below" if times else "truly equal" for times in DIFFERENCES),
            ],
            lines,
        )
    listed = ", ".join(f"{decision} {share:.1f} %" for decision, share in worst.items())
    print(f"\nThe largest share of wrong verdicts in these tables: {listed}.")


def robustness(simulation: Simulation) -> None:
    """Five seeds whose figures are not normal, and a published figure that is the luckiest of three trainings."""
    margin = simulation.rule.margin_points
    lines = []
    cases = [*((name, shape, 1) for name, shape in SHAPES.items()), ("normal, published the best of 3", normal, 3)]
    for name, shape, luckiest in cases:
        for spread in (0.3, 0.5):
            line = [name, f"{spread:g}"]
            for times in (0, -1, 1, -2):
                world = World(seeds=5, spread=spread, difference=times * margin, shape=shape, luckiest_of=luckiest)
                line.append(cell(simulation.shares(world)))
            lines.append(line)
    table(
        "Five seeds against a single training: reproduced / below / above / undecided, %",
        [
            "figures",
            "spread",
            "truly equal",
            *(f"truly {abs(t) * margin:g} {'below' if t < 0 else 'above'}" for t in (-1, 1, -2)),
        ],
        lines,
    )


def peeking(simulation: Simulation) -> None:
    """A verdict after every seed from the third to the tenth, and a stop at the first one that is not undecided."""
    margin = simulation.rule.margin_points
    lines = []
    for spread in SPREADS:
        cells = []
        for difference, wrong in ((0.0, ("below", "above")), (-margin, ("reproduced",))):
            rates = []
            ours, published = simulation.figures(World(seeds=10, spread=spread, difference=difference))
            for counts in ((5,), (10,), tuple(range(3, 11))):
                found = 0
                for values, figure in zip(ours, published, strict=True):
                    decisions = (simulation.verdict(values[:count], figure).decision for count in counts)
                    found += next((decision for decision in decisions if decision != "undecided"), "undecided") in wrong
                rates.append(f"{100 * found / simulation.draws:.1f}")
            cells.append(" / ".join(rates))
        lines.append([f"{spread:g}", *cells])
    table(
        "Wrong verdicts of five seeds / of ten / of looking after each from 3 to 10 until one is not undecided, %",
        ["spread", "above or below, truly equal", f"reproduced, truly {margin:g} below"],
        lines,
    )


def enough(simulation: Simulation) -> None:
    """Seeds after which four cases in five are decided rightly."""
    simulation = Simulation(simulation.rule, simulation.draws // 4)
    margin = simulation.rule.margin_points
    wanted = ((0.0, "reproduced"), (-margin, "below"), (-2 * margin, "below"))
    counts = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20)
    lines = []
    for spread in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0):
        line = [f"{spread:g}"]
        for trainings in PUBLISHED:
            for difference, decision in wanted:
                worlds = (
                    World(seeds=seeds, spread=spread, difference=difference, trainings=trainings) for seeds in counts
                )
                found = (world.seeds for world in worlds if simulation.shares(world)[decision] >= 80)
                line.append(str(next(found, f"> {counts[-1]}")))
        lines.append(line)
    headings = [
        f"{decision}, truly {-difference:g} below" if difference else f"{decision}, truly equal"
        for difference, decision in wanted
    ]
    table(
        "Fewest seeds that give the right verdict four times in five",
        ["spread", *(f"{of}: {heading}" for of in ("single", "median of 5") for heading in headings)],
        lines,
    )


def chart(simulation: Simulation, path: str) -> None:
    """Draw how often each verdict is given, by true difference, for three numbers of seeds and two spreads."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "verdicts", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9}
    )
    from matplotlib import pyplot

    simulation = Simulation(simulation.rule, simulation.draws // 4)
    margin = simulation.rule.margin_points
    colours = {"below": "#b5483c", "reproduced": "#2f8f6b", "above": "#3c6fb0", "undecided": "#8a8a8a"}
    differences = np.linspace(-3, 3, 49) * margin
    spreads, counts = (0.3, 0.5), (3, 5, 10)
    figure, axes = pyplot.subplots(len(spreads), len(counts), figsize=(9, 5), sharex=True, sharey=True)
    for spread, line in zip(spreads, axes, strict=True):
        for seeds, axis in zip(counts, line, strict=True):
            shares = [simulation.shares(World(seeds=seeds, spread=spread, difference=d)) for d in differences]
            axis.axvspan(-margin, margin, color="#eeeeee", linewidth=0)
            for decision, colour in colours.items():
                style = "--" if decision == "undecided" else "-"
                axis.plot(differences, [of[decision] for of in shares], color=colour, linestyle=style, label=decision)
            axis.set(title=f"{seeds} seeds, spread {spread:g}", ylim=(0, 100), xlim=(differences[0], differences[-1]))
            axis.set_xticks(np.arange(-2, 3) * margin)
            axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("true difference, ours less the published recipe, points (grey: within the margin)", size=9)
    figure.supylabel("how often, %", size=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, facecolor="white", metadata={"Date": None} if path.endswith(".svg") else None)


def main() -> None:
    """Command line."""
    rule = VerdictConfig()
    parser = argparse.ArgumentParser(prog="python -m studies.verdicts", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--draws", type=int, default=10_000, help="of each case, a quarter where cases are many; default: %(default)s"
    )
    parser.add_argument("--margin", type=float, default=rule.margin_points, help="default: %(default)s")
    parser.add_argument("--coverage", type=float, default=rule.coverage, help="default: %(default)s")
    parser.add_argument("--chart", help="file to draw a chart into, .svg or .png; default: none is drawn")
    arguments = parser.parse_args()
    rule = VerdictConfig(margin_points=arguments.margin, coverage=arguments.coverage)
    simulation = Simulation(rule, arguments.draws)
    for part in (ranges, errors, robustness, peeking, enough):
        part(simulation)
    if arguments.chart:
        chart(simulation, arguments.chart)


if __name__ == "__main__":
    main()
