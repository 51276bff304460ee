"""docs/rows.md says what params.yaml and the defaults say, and leaves no setting of a row out."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from pipeline.comparison.verdict import judge
from pipeline.params.load import load_params
from pipeline.params.schema import Row, VerdictConfig
from pipeline.params.tasks import LABELS, MS_FLIP
from tests.helpers.shared import PROJECT

PARAMS = load_params(PROJECT / "params.yaml")
RAW = yaml.safe_load((PROJECT / "params.yaml").read_text())["rows"]
PUBLISHED = [row for row in PARAMS.rows.values() if row.published or row.published_authors]
TEXT = (PROJECT / "docs/rows.md").read_text()
FIGURES = {**{name: LABELS[name] for name in ("pq", "ap", "ap50", "miou")}, MS_FLIP: "ms+flip"}
FAPN = "ade20k_swin-l-fapn-in22k"
ALONE = {row.name for row in PUBLISHED if row.name.endswith("_authors")} | {FAPN}
"""Published rows that the table of figures leaves out."""
BY_ROW = "by row"
"""What the page shows instead of a value that differs between the published rows."""


def tables() -> Iterator[list[list[str]]]:
    """The tables of the page: lines of cells, the first of which are the headings."""
    for block in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        yield [lines[0], *lines[2:]]


def preset(row: Row) -> str:
    return RAW[row.name]["preset"]


def shared(row: Row) -> list[str]:
    """What the table of presets says of a row, after the line's first cell."""
    train, test, augmentation = row.train, row.test, row.train.augmentation
    schedule = train.schedule
    rate = schedule.name if schedule.name == "poly" else f"x {schedule.gamma:g} at " + ", ".join(
        f"{step:,}" for step in schedule.milestones
    )  # fmt: skip
    scale = (
        "U({:g}, {:g}) of the crop".format(*augmentation.jitter)
        if augmentation.jitter
        else f"{min(augmentation.short_sides)} to {max(augmentation.short_sides)}, at most {augmentation.long_side_max}"
    )
    views = test.ms_flip and f"{', '.join(map(str, test.ms_flip.short_sides))}; at most {test.ms_flip.long_side_max}"
    return [
        f"{train.steps:,}",
        f"{train.groups} x {train.group_size}",
        rate,
        "{} x {}".format(*augmentation.crop),
        scale,
        f"{test.short_side}, at most {test.long_side_max}" + (", not padded" if test.pad_multiple == 1 else ""),
        views or "",
    ]


def figures(row: Row) -> dict[tuple[str, str], str]:
    """A row's published figures: by their name in the table of figures, whose they are, and the value."""
    return {
        (FIGURES[name], who): str(published[name])
        for who, published in (("", row.published), ("A", row.published_authors))
        for name in FIGURES
        if name in published
    }


def weights(row: Row) -> str:
    """By the rule in the line of `weights`."""
    name = row.model.backbone.name
    if name.startswith("r"):
        return f"torchvision_{name}"
    swin = "swin_" + name[-1] + ("_in22k" if row.name.split("_authors")[0].endswith("in22k") else "")
    return swin + "_original" * (row.figures == "published_authors" or row.dataset == "coco")


def settings(type_: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of every setting of a dataclass; one that may be absent is one setting."""
    hints = typing.get_type_hints(type_)
    for field in dataclasses.fields(type_):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from settings(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def value_of(row: Row, key: str) -> Any:
    value: Any = row
    for part in key.split("."):
        value = getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


SHOWN = [line for table in tables() if table[0] == ["setting", "value", "source"] for line in table[1:]]


def keys_of(line: list[str]) -> list[str]:
    """Keys of settings or, of what is none, the file that holds it; a colon and what it means may follow."""
    keys = re.match(r"((?:`[\w./]+`(?:, )?)+)(?:: |$)", line[0])
    assert keys, line[0]
    return re.findall(r"`([\w./]+)`", keys[1])


def test_the_table_of_figures_has_those_of_params_yaml_and_no_others() -> None:
    head, *lines = next(table for table in tables() if table[0][0] == "rows")
    shown: dict[str, dict[tuple[str, str], str]] = {}
    for rows, figure, *values in lines:
        name, _, who = figure.partition(", ")
        for backbone, value in zip(head[2:], values, strict=True):
            if value:
                shown.setdefault(f"{rows}_{backbone}", {})[name, who] = value
    assert shown == {row.name: figures(row) for row in PUBLISHED if row.name not in ALONE}


def test_the_rows_that_the_table_leaves_out_have_figures_of_others_or_their_own_words() -> None:
    rows = {row.name: row for row in PUBLISHED}
    assert len(rows) == 53
    for name in ALONE - {FAPN}:
        assert rows[name].published_authors == rows[name.removesuffix("_authors")].published_authors
        assert f"`{name}`" in TEXT
    assert "mIoU {miou}, with ms+flip {miou_ms_flip}".format(**rows[FAPN].published_authors) in " ".join(TEXT.split())


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_the_line_of_a_rows_preset_is_what_params_yaml_holds(row: Row) -> None:
    """A line is of one preset or of several; a second one with "Swin-L" is of those rows alone."""
    lines = next(table for table in tables() if table[0][0] == "preset")[1:]
    mine = [line for line in lines if preset(row) in re.sub(r" \(.*\)$", "", line[0]).split(", ")]
    large = [line for line in mine if line[0].endswith(" (Swin-L)") and len(mine) > 1]
    line = large[0] if large and "swin-l" in row.name else next(line for line in mine if line not in large)
    assert line[1:] == shared(row)


def test_every_setting_of_a_row_has_a_line() -> None:
    known = set(settings(Row)) - {"name"}
    shown = {key for line in SHOWN for key in keys_of(line)}
    assert known <= shown, sorted(known - shown)


@pytest.mark.parametrize(
    ("key", "value"),
    [pytest.param(key, line[1], id=key) for line in SHOWN for key in keys_of(line)],
)
def test_a_settings_line_is_true_of_every_published_row(key: str, value: str) -> None:
    if "/" in key:  # not a setting: where the code holds it
        assert (PROJECT / key).is_file()
        return
    values = [value_of(row, key) for row in PUBLISHED]
    if value.startswith(BY_ROW):
        assert any(other != values[0] for other in values), f"{key} is {values[0]!r} in every row: show it"
    else:
        assert all(yaml.safe_load(value) == other for other in values), (key, value, values[0])


def test_classes_queries_and_weights_are_what_their_lines_say() -> None:
    said = {key: line[1] for line in SHOWN for key in keys_of(line)}
    classes = dict(zip(("cityscapes", "ade20k", "coco"), ((19, 8), (150, 100), (133, 80)), strict=True))
    for row in PUBLISHED:
        all_classes, things = classes.get(row.name.split("_")[0], (65, None))
        assert row.model.num_classes == (things if row.task == "instance" else all_classes)
        large = row.model.backbone.name == "swin-l" and row.task != "semantic"
        assert row.model.query_decoder.queries == (200 if large else 100)
        assert row.weights == weights(row)
    assert said["model.num_classes"] == (
        "by row: Cityscapes 19, ADE20K 150, COCO 133, Vistas 65; instance rows 8, 100, 80"
    )
    assert said["weights"] == (
        "by row: torchvision_r50, torchvision_r101; Swin: swin_t to swin_l_in22k, in A's and COCO rows with _original"
    )
    assert said["model.query_decoder.queries"] == "by row: panoptic and instance rows of Swin-L 200, others 100"


def test_every_table_is_whole() -> None:
    for table in tables():
        assert all(len(line) == len(table[0]) for line in table), table[0]


def test_files_that_the_page_names_are_there() -> None:
    names = re.findall(r"`((?:m2f|pipeline|stages|tests|docs|studies)/[\w./*-]+)`", TEXT)
    assert names
    for name in names:
        assert any(PROJECT.glob(name)), name
    assert "docs/rows.md" in (PROJECT / "README.md").read_text()


def test_the_yaml_that_the_page_shows_is_what_params_yaml_holds() -> None:
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    shown = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]
    assert [list(block) for block in shown] == [["rows"], ["weights"], ["verdict"]]
    for block in shown:
        for section, entries in block.items():
            for name, entry in entries.items():
                assert params[section][name] == entry, name
    assert VerdictConfig(**shown[-1]["verdict"]) == PARAMS.verdict == VerdictConfig()


def test_the_examples_of_the_verdict_are_what_the_rule_says() -> None:
    examples = next(table for table in tables() if table[0] == ["seeds", "interval", "verdict"])[1:]
    assert len(examples) == 4
    for seeds, interval, verdict in examples:
        judged = judge([float(seed) for seed in seeds.split(", ")], 47.87, margin=1.0, coverage=0.9, assumed_spread=1.0)
        assert judged.decision == verdict.partition(":")[0]
        assert judged.interval is not None
        assert interval == "{:.2f} to {:.2f}".format(*judged.interval)
    assert "with the published figure 47.87" in TEXT
