"""The report of everything: 27 rows, five seeds, every kind of verdict and seed, from generated results."""

from __future__ import annotations

import json
import re
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from pipeline.params.load import load_params
from pipeline.params.schema import Params
from pipeline.report.html.svg import Mark, Point, line_chart, log_ticks, scatter, small_strip, strip
from pipeline.report.html.thumbnails import PAGE_MIB, PANEL_KIB, ROW_OVERLAYS, panel_limit
from pipeline.report.rows import VERDICTS
from pipeline.report.write import write_report
from tests.helpers.report_results import PROJECT, PageParser, write_results

PAGE_LIMIT_MIB = 16
"""Pictures in base64 are 4 / 3 of PAGE_MIB; the rest is tables and lines."""


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(PROJECT / "params.yaml")


@pytest.fixture(scope="module")
def full(params: Params, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(reports/, the terminal's tables) of all published rows."""
    folder = tmp_path_factory.mktemp("full")
    write_results(params, folder, points=1500, size=(192, 384))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M2F_STORAGE", str(folder / "storage"))
        table = write_report(params, results=folder / "results", out=folder / "reports")
    return folder / "reports", table


def test_the_largest_page_is_whole_small_and_loads_nothing(full: tuple[Path, str]) -> None:
    page = (full[0] / "index.html").read_text()
    assert len(page.encode()) < PAGE_LIMIT_MIB * 2**20
    parser = PageParser()
    parser.feed(page)
    assert parser.open == []
    assert {load.partition(",")[0] for load in parser.loads} == {"data:image/jpeg;base64"}
    assert len(parser.loads) == 3 * ROW_OVERLAYS * 27
    assert {link.partition("/")[0] for link in parser.links if not link.startswith("#")} == {"https:"}
    targets = set(re.findall(r'id="?([\w-]+)', page))
    assert {link[1:] for link in parser.links if link.startswith("#")} <= targets


def test_pictures_share_the_limit_of_the_page() -> None:
    # 100 panels have room for 60 KiB each (6,000 of 8,192 KiB); 819.2 have 10 KiB each.
    assert panel_limit(100) == PANEL_KIB * 1024
    assert panel_limit(8192) == PAGE_MIB * 2**20 / 8192 == 1024


def test_every_kind_of_row_and_seed_is_told(full: tuple[Path, str]) -> None:
    written = json.loads((full[0] / "results.json").read_text())
    assert sum(written["verdicts"].values()) == 27
    assert min(written["verdicts"][kind] for kind in VERDICTS) > 0
    assert written["rows"]["cityscapes_r101"]["verdict"]["kind"] == "below"
    assert written["rows"]["ade20k_swin-b"]["verdict"]["kind"] == "above"
    text = (full[0] / "results.md").read_text()
    for told in ("| 3 | diverged: the loss is not finite", "| 4 | failed: worker 3 was lost", "CPU \\*", "4 of 5"):
        assert told in text, told
        assert told.strip("| ").partition(" | ")[2] in (full[0] / "index.html").read_text()


def test_the_terminals_tables_fit_120_columns(full: tuple[Path, str]) -> None:
    tables = full[1].partition("\n\ncityscapes_r101: ")[0]
    assert max(map(len, tables.splitlines())) <= 120
    assert len(tables.splitlines()) == 3 * 3 + 2 + 27  # a title, headings and a line each; blank lines; the rows


def test_markdown_tables_have_as_many_cells_as_headings(full: tuple[Path, str]) -> None:
    lines = (full[0] / "results.md").read_text().splitlines()
    counts = [len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0 for line in lines]
    assert all(a == b for a, b in pairwise(counts) if a and b)
    assert sum(line.startswith("| ---") for line in lines) == 3 + 27


def test_speeds_are_joined_on_the_published_device_and_apart_on_others(full: tuple[Path, str]) -> None:
    page = (full[0] / "index.html").read_text()
    captions = re.findall(r"<figcaption><b>(\w+)</b> (.*?)</figcaption>(.*?)</svg>", page)
    assert [(dataset, note) for dataset, note, _ in captions] == [
        ("shapes", "PQ on CPU"),
        ("cityscapes", "mIoU on A100"),
        ("ade20k", "mIoU on A100"),
        ("ade20k", "mIoU on CPU: ours only, not comparable with the published device"),
        ("coco", "PQ on A100"),
        ("coco", "AP on A100"),
    ]
    joined = [chart.count('class="join"') for _, _, chart in captions]
    assert joined == [0, 5, 5, 0, 0, 0]  # swin-l has no benchmark; two of ADE20K's are on a CPU; COCO's have no speed


def test_labels_of_close_points_do_not_collide(params: Params) -> None:
    # The published points of ADE20K: r101 and swin-t lie 0.85 pictures/s and 0.06 mIoU apart.
    rows = {name: row.published for name, row in params.rows.items() if name.startswith("ade20k")}
    points = [
        Point(
            name=name.rpartition("_")[2],
            published=Mark(speed=figures["inf_fps"], value=figures["miou"]),
            ours=Mark(speed=figures["inf_fps"] + 0.4, value=figures["miou"] + 0.2),
        )
        for name, figures in rows.items()
    ]
    chart = scatter(points, x_label="pictures/s", label="")
    boxes = [
        (float(x), float(x) + 6.6 * len(text), float(y) - 11, float(y) + 3)
        for x, y, text in re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)" text-anchor="start">(.*?)<', chart)
    ]
    assert len(boxes) == 7
    for a, b in combinations(boxes, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
    assert all(left >= 0 and right <= 400 for left, right, _, _ in boxes)


def test_dots_of_equal_seeds_are_stacked() -> None:
    chart = strip({0: 50.0, 1: 50.0, 2: 60.0}, dict.fromkeys(range(3), "#000"), label="")
    assert re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', chart) == ["62.0", "54.0", "62.0"]


def test_a_seed_beyond_the_axis_is_drawn_at_its_end() -> None:
    chart = small_strip([-9.0, 0.0], -4.5, reach=5.0, margin=1.0, label="")
    assert re.findall(r'<circle class="seed" cx="([\d.]+)"', chart) == ["6.0", "60.0"]


def test_ticks_of_losses_are_1_2_and_5_times_powers_of_ten() -> None:
    assert log_ticks(8.0, 90.0) == [5, 10, 20, 50, 100]
    assert log_ticks(1.0, 1.0) == [1, 2]


def test_a_chart_without_points_is_none() -> None:
    assert line_chart([], label="") == ""
