"""What the report says about a row in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pipeline.comparison.rows import (
    CHECKPOINTS,
    ENDED_BADLY,
    Facts,
    PaddedFacts,
    PublishedFacts,
    SeedFacts,
    counts,
)
from pipeline.comparison.tables import figure_names, figure_text, signed
from pipeline.comparison.verdict import judge, points
from pipeline.params.schema import VerdictConfig
from pipeline.params.tasks import LABELS

LEGEND = (
    "Figures are percent, single scale, on the validation images. A row shows the median over its seeds, and the "
    'lowest and highest seed. "Difference" is our median less the published figure. Rows of the original '
    "authors' recipe are compared with the authors' figures, which stand beside other rows without a comparison. "
    "Where it is not known which checkpoint a published figure is of, the last is compared. Each seed shows the last "
    "and the best on validation. Memory is the most that a GPU took in training. Images/s is inference, one image at a "
    "time. A value marked * is not comparable with the published one: it was measured on another device, or with "
    "another number of images on a GPU."
)

RULE = (
    "The margin and the coverage were chosen before the rows ran (verdict in params.yaml). docs/rows.md explains "
    "the rule, and studies/verdicts.md how often it is wrong. A row has no verdict if nothing is published under "
    "the same recipe."
)

_EXAMPLE = ((80.20, 80.30, 80.40), 80.44)
"""Seeds and a published figure that explain the verdict."""


def how_to_read(settings: VerdictConfig) -> tuple[str, str]:
    """How a verdict is found, in two sentences; an example of it."""
    margin, (seeds, published) = settings.margin_points, _EXAMPLE
    judged = judge(
        seeds,
        published,
        margin=margin,
        coverage=settings.coverage,
        assumed_spread=settings.assumed_spread_points,
    )
    assert judged.interval is not None
    low, high = judged.interval
    rule = (
        f"The seeds of a row give a range in which a further training is expected ({100 * settings.coverage:g} %). "
        f"All of it within {points(margin)} of the published figure means reproduced; otherwise, all of it on one side "
        "means above or below, and anything else undecided."
    )
    example = (
        f"Example: the seeds {', '.join(f'{seed:.2f}' for seed in seeds)} give the range {low:.2f} to {high:.2f}. "
        f"The published figure is {published:.2f}, and within {points(margin)} of it is {published - margin:.2f} to "
        f"{published + margin:.2f}: {judged.decision}."
    )
    return rule, example


_MEMORY_AS_PRINTED = "The published memory is in GB as printed."

_LEGENDS: Mapping[str, str] = {
    "semantic": "ms+flip is the mean of the scores at several sizes, each also mirrored.",
    "panoptic": ("AP is of the masks of things, mIoU of the classes. One network gives PQ, AP and mIoU."),
    "instance": "AP is of masks, averaged over IoU thresholds from 0.50 to 0.95.",
}
"""By task, what its table's columns mean."""


def summary(rows: Mapping[str, Facts]) -> str:
    """How the published rows stand, in one sentence; empty where there are none."""
    counted = {decision: count for decision, count in counts(rows).items() if count}
    total = sum(counted.values())
    if not total:
        return ""
    listed = ", ".join(f"{count} {decision}" for decision, count in counted.items())
    return f"Of {total} published rows: {listed}."


def attention(rows: Mapping[str, Facts]) -> list[tuple[str, str]]:
    """(row, sentence) for what is not as it should be: failed seeds, warnings, figures that are out of date."""
    sentences = []
    for name, facts in rows.items():
        for seed in facts.seeds:
            if seed.status in ENDED_BADLY:
                sentences.append((name, f"seed {seed.seed} {seed.status}: {seed.reason or 'no reason given'}"))
            else:
                sentences += [(name, warning) for warning in below_reference(seed, facts)[-1:]]
        if facts.status == "out of date":
            sentences.append(
                (name, f"the figures are of an earlier training or of other settings; dvc repro evaluate@{name}")
            )
        elif facts.status == "trained":
            sentences.append((name, f"trained, but not evaluated; dvc repro evaluate@{name}"))
        elif facts.status == "incomplete" and len(facts.seeds) < facts.planned_seeds:
            missing = facts.planned_seeds - len(facts.seeds)
            seeds = "a seed has" if missing == 1 else f"{missing} seeds have"
            sentences.append((name, f"{seeds} no result yet; dvc repro evaluate@{name}"))
    return sentences


def below_reference(seed: SeedFacts, facts: Facts) -> list[str]:
    """Sentences of a seed's early warnings."""
    label = LABELS[facts.primary]
    against = {"published": "the published curve", "other seeds": "the other seeds"}
    return [
        f"seed {seed.seed} was clearly below {against[point.reference]} at step {point.step:,}: "
        f"{label} {point.value:.2f}, where {point.expected:.2f} was expected"
        for point in seed.below_reference
    ]


def table_notes(task: str, rows: Mapping[str, Facts]) -> list[str]:
    """What stands below the table of a task's rows; of published figures only where a row has some."""
    printed = task != "semantic" and any(facts.published for facts in rows.values())
    return [_LEGENDS[task], *([_MEMORY_AS_PRINTED] if printed else []), *_misprints(rows), *_checkpoint_notes(rows)]


def _misprints(rows: Mapping[str, Facts]) -> list[str]:
    """Rows whose published memory is not what is printed."""
    figures = {name: facts.published for name, facts in rows.items()}
    wrong = [
        f"{name} {published['train_mem_gib']} GiB (printed: {published['train_mem_gb_as_printed']})"
        for name, published in figures.items()
        if {"train_mem_gib", "train_mem_gb_as_printed"} <= published.keys()
    ]
    said = f"The published memory is corrected where it is a misprint: {', '.join(wrong)}; see docs/rows.md."
    return [said] if wrong else []


def _checkpoint_notes(rows: Mapping[str, Facts]) -> list[str]:
    """Published rows of which it is known which checkpoint their figures are of."""
    published = {name: facts.checkpoint_rule for name, facts in rows.items() if facts.reference}
    named = {rule: [name for name, its_rule in published.items() if its_rule == rule] for rule in CHECKPOINTS}
    return [
        f"The checkpoint whose figures are published, and compared, is the {CHECKPOINTS[rule]}"
        + ("." if len(names) == len(published) else f": {', '.join(names)}.")
        for rule, names in named.items()
        if names
    ]


def published_sentences(name: str, facts: Facts) -> list[str]:
    """What the row's published checkpoints score here, and under which padding each agrees better."""
    own = {name: facts.published_checkpoint} if facts.published_checkpoint else {}
    return [_published_sentence(each, checked, facts) for each, checked in {**own, **facts.other_checkpoints}.items()]


def _published_sentence(name: str, checked: PublishedFacts, facts: Facts) -> str:
    def told(figure: str, of: PaddedFacts, words: str = "") -> str:
        difference = of.difference.get(figure)
        return figure_text(of.figures.get(figure)) + ("" if difference is None else f" ({signed(difference)}{words})")

    first, words, ours = facts.primary, " from the published figure", checked.evaluated
    figures = [figure for figure in figure_names(facts) if ours.figures.get(figure) is not None]
    listed = ", ".join(f"{LABELS[figure]} {told(figure, ours, words if figure == first else '')}" for figure in figures)
    text = f"{name}: the published checkpoint, evaluated here, has {listed}."
    if other := checked.other_padding:
        both = sorted((ours, other), key=lambda of: of.pad_multiple)
        compared = " and ".join(f"{told(first, of)} {_padding(of.pad_multiple)}" for of in both)
        text += f" {LABELS[first]} is {compared}"
        text += "." if checked.agrees is None else f": {_padding(checked.agrees)} agrees better."
    return text


def _padding(multiple: int) -> str:
    return "without padding" if multiple == 1 else f"padded to multiples of {multiple}"


def interval_sentence(facts: Facts) -> str:
    """Between which values the median of all possible seeds lies, and how surely; empty: too few seeds to say."""
    interval = facts.median_interval
    if not interval:
        return ""
    return (
        f"The median over all possible seeds lies between {interval.low:.2f} and {interval.high:.2f} "
        f"with {interval.coverage:g} % confidence."
    )


def not_run_sentence(names: Collection[str]) -> str:
    """How many rows of a table have not been run, and which."""
    return f"{len(names)} row{'' if len(names) == 1 else 's'} not run: {', '.join(names)}"


def baseline_sentence(facts: Facts) -> str:
    """What a prediction of one class everywhere scores; empty: not known."""
    baseline = facts.baseline
    if not baseline:
        return ""
    figure = facts.primary if baseline.figures.get(facts.primary) is not None else "miou"
    value = baseline.figures.get(figure)
    return "" if value is None else f"Predicting {baseline.class_name} everywhere gives {LABELS[figure]} {value:.2f}."
