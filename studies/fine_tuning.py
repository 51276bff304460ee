"""What a start from trained weights is worth: validation curves of rows that differ in their start alone.

python -m studies.fine_tuning coast_random,coast_shapes camvid_random,camvid_shapes --out docs/fine-tuning.png

Each argument is a panel of the image and a table: rows of params.yaml that are trained here, the first of which the
others are compared with. A curve is the mean over the row's seeds, in percent; the band spans them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.params.load import load_params
from pipeline.params.schema import Params, Row
from pipeline.params.tasks import LABELS, primary
from pipeline.runs.curve_file import read_curve
from pipeline.storage.files import whole_file
from pipeline.storage.results.folder import made_by, read_result
from pipeline.storage.results.rows import TrainingResult
from pipeline.storage.root import stored

COLOURS = ("#767676", "#0b62a4", "#c2571a", "#2f7d4f")
"""Of a panel's curves; the first is what the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A row's validations while it trained."""

    row: str
    dataset: str
    figure: str
    """What is measured: pq, miou or ap."""
    label: str
    """What it starts from."""
    values: Mapping[int, tuple[float, ...]]
    """Percent of every seed, by step."""

    def mean(self, step: int) -> float:
        """Over the seeds."""
        return statistics.mean(self.values[step])


def start_of(name: str, params: Params) -> Start:
    """The validations of a row's finished seeds. ValueError where it is not trained here."""
    row = params.row(name)
    trained = read_result(TrainingResult, name)
    figure = primary(row.task)
    values: dict[int, list[float]] = {}
    for seed in trained.seeds:
        if seed.status != "finished":
            raise ValueError(f"seed {seed.seed} of row {name} is {seed.status}; train it first: dvc repro train@{name}")
        points = read_curve(stored(f"{seed.run_dir}/curve.jsonl", made_by=made_by(TrainingResult, name)))
        for point in points:
            if point.get(f"val_{figure}") is not None:
                values.setdefault(point["step"], []).append(100 * point[f"val_{figure}"])
    complete = {step: tuple(found) for step, found in sorted(values.items()) if len(found) == len(trained.seeds)}
    return Start(row=name, dataset=row.dataset, figure=figure, label=label_of(row, params), values=complete)


def label_of(row: Row, params: Params) -> str:
    """What a row starts from, in words."""
    origin = params.weights[row.weights].row or row.weights
    said = "random weights" if row.weights == "none" else f"weights of {origin}"
    return said + (f", {' and '.join(row.train.freeze)} frozen" if row.train.freeze else "")


def panel(names: Sequence[str], params: Params) -> list[Start]:
    """The starts that are compared. ValueError unless they are measured alike, at the same steps."""
    starts = [start_of(name, params) for name in names]
    first = starts[0]
    for other in starts[1:]:
        if (other.dataset, other.figure) != (first.dataset, first.figure):
            raise ValueError(f"rows {first.row} and {other.row} differ in dataset or task; compare rows of one")
        if other.values.keys() != first.values.keys():
            raise ValueError(
                f"rows {first.row} and {other.row} were validated at other steps; give both one val_interval"
            )
    return starts


def table(starts: Sequence[Start]) -> str:
    """A table in Markdown: the mean of the seeds at every validation, their range at the last, and the gain."""
    first, steps = starts[0], list(starts[0].values)
    columns = [
        f"{first.dataset}, {LABELS[first.figure]} at step",
        *(f"{step:,}" for step in steps),
        "seeds at the last",
    ]
    lines = [
        f"| {' | '.join(columns)} |",
        f"| {' | '.join(['---'] * (len(steps) + 2))} |",
    ]
    for start in starts:
        means = " | ".join(f"{start.mean(step):.2f}" for step in steps)
        lines.append(f"| {start.label} | {means} | {', '.join(f'{value:.2f}' for value in start.values[steps[-1]])} |")
    for start in starts[1:]:
        gains = " | ".join(f"{start.mean(step) - first.mean(step):+.2f}" for step in steps)
        lines.append(f"| gain: {start.label} | {gains} | |")
    return "\n".join(lines)


def draw(panels: Sequence[Sequence[Start]], path: Path) -> None:
    """A PNG with a panel for each dataset."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.4 * len(panels), 3.2), dpi=110, layout="constrained")
        for axes, starts in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for start, colour in zip(starts, COLOURS, strict=False):
                steps = list(start.values)
                axes.plot(
                    steps, [start.mean(step) for step in steps], color=colour, marker="o", ms=3.5, label=start.label
                )
                low, high = ([bound(start.values[step]) for step in steps] for bound in (min, max))
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.set_title(starts[0].dataset, loc="left", fontweight="bold")
            axes.set_xlabel("step")
            axes.set_ylabel(f"validation {LABELS[starts[0].figure]}, %")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, loc="lower right")
        with whole_file(path) as partial:
            figure.savefig(partial, format="png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.fine_tuning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "panels", nargs="+", metavar="ROW,ROW", help="rows that are compared, the first with the others"
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw them too (default: the tables alone)")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        params = load_params(given.params)
        for names in (each.split(",") for each in given.panels):
            if len(names) > len(COLOURS):
                raise ValueError(f"{','.join(names)} are {len(names)} rows; compare up to {len(COLOURS)}")
        panels = [panel(names.split(","), params) for names in given.panels]
        if given.out is not None:
            draw(panels, given.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(table(starts) for starts in panels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
