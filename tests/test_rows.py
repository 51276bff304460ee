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
BY_ROW = "by row"
"""What the page shows instead of a value that differs between the published rows."""


def tables() -> Iterator[list[list[str]]]:
    """The tables of the page: lines of cells, the first of which are the headings."""
    for block in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        yield [lines[0], *lines[2:]]


def cells(row: Row) -> list[str]:
    """A row's line in the table of rows."""
    return [
        row.name,
        preset(row),
        row.weights,
        figures(row.published),
        figures(row.published_authors),
    ]


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


def figures(published: typing.Mapping[str, Any]) -> str:
    shown = [f"{LABELS[name]} {published[name]}" for name in ("pq", "ap", "ap50", "miou") if name in published]
    return ", ".join(shown) + (f" (ms+flip {published[MS_FLIP]})" if MS_FLIP in published else "")


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


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_a_published_rows_line_is_what_params_yaml_holds(row: Row) -> None:
    rows = next(table for table in tables() if table[0][0] == "row")
    assert [line for line in rows[1:] if line[0] == row.name] == [cells(row)]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_the_line_of_a_rows_preset_is_what_params_yaml_holds(row: Row) -> None:
    """A line is of one preset or of several; `Swin-L` after them means those rows, and the other line the others."""
    lines = next(table for table in tables() if table[0][0] == "preset")[1:]
    mine = [line for line in lines if preset(row) in line[0].removesuffix(", Swin-L").split(", ")]
    large = [line for line in mine if line[0].endswith(", Swin-L")]
    line = large[0] if large and "swin-l" in row.name else next(line for line in mine if line not in large)
    assert line[1:] == shared(row)


def test_the_table_has_the_published_rows_alone() -> None:
    assert len(PUBLISHED) == 53
    rows = next(table for table in tables() if table[0][0] == "row")
    assert [line[0] for line in rows[1:]] == [row.name for row in PUBLISHED]


def key_of(line: list[str]) -> str:
    """A setting's key or, of what is none, the file that holds it; a colon and what it means may follow."""
    key = re.match(r"`([\w./]+)`(: |$)", line[0])
    assert key, line[0]
    return key[1]


def test_every_setting_of_a_row_has_a_line() -> None:
    known = set(settings(Row)) - {"name"}
    shown = {key_of(line) for line in SHOWN}
    assert known <= shown, sorted(known - shown)


@pytest.mark.parametrize("line", SHOWN, ids=lambda line: line[0])
def test_a_settings_line_is_true_of_every_published_row(line: list[str]) -> None:
    key, value, source = key_of(line), *line[1:]
    assert source
    if "/" in key:  # not a setting: where the code holds it
        assert (PROJECT / key).is_file()
        return
    values = [value_of(row, key) for row in PUBLISHED]
    if value.startswith(BY_ROW):
        assert any(other != values[0] for other in values), f"{key} is {values[0]!r} in every row: show it"
    else:
        assert all(yaml.safe_load(value) == other for other in values), (key, value, values[0])


def test_classes_and_queries_are_what_their_lines_say() -> None:
    said = {key_of(line): line[1] for line in SHOWN}
    classes = dict(zip(("cityscapes", "ade20k", "coco"), ((19, 8), (150, 100), (133, 80)), strict=True))
    for row in PUBLISHED:
        all_classes, things = classes.get(row.name.split("_")[0], (65, None))
        assert row.model.num_classes == (things if row.task == "instance" else all_classes)
        large = row.model.backbone.name == "swin-l" and row.task != "semantic"
        assert row.model.query_decoder.queries == (200 if large else 100)
    assert said["model.num_classes"] == (
        "by row: Cityscapes 19, ADE20K 150, COCO 133, Vistas 65; instance rows 8, 100, 80"
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
