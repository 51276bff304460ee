"""The report of everything: 27 rows, five seeds, every kind of verdict and seed, from generated results."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.params.load import load_params
from pipeline.params.schema import Params
from pipeline.params.tasks import FIGURES
from pipeline.report.html.thumbnails import ROW_OVERLAYS
from pipeline.report.rows import VERDICTS
from pipeline.report.write import write_report
from tests.helpers.report_results import PROJECT, PageParser, write_results
from tests.helpers.report_rows import evaluated, figures, page_of, published, trained, written

PAGE_LIMIT_MIB = 16
"""Pictures in base64 are 4 / 3 of PAGE_MIB; the rest is tables and lines."""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(reports/, the terminal's tables) of all published rows."""
    params, folder = load_params(PROJECT / "params.yaml"), tmp_path_factory.mktemp("full")
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


def test_the_page_shows_every_task_with_its_own_figure_and_classes(
    params: Params, tmp_path: Path, storage: Path
) -> None:
    for task in ("panoptic", "instance"):
        written(tmp_path, evaluated(task, [0.5, 0.51, 0.52], task=task, key=task))
        written(tmp_path, trained(task, 3, key=task))
        (storage / "runs" / f"{task}0").mkdir(parents=True)
        points = ({"step": 50, f"val_{FIGURES[task][0]}": 0.4, "val_miou": 0.3}, {"step": 100, "val_ap_large": None})
        (storage / "runs" / f"{task}0" / "curve.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    written(tmp_path, published("panoptic", "panoptic", figures("panoptic", 0.52)))
    write_report(params, results=tmp_path, out=tmp_path / "reports")
    page = (tmp_path / "reports" / "index.html").read_text()
    titles = ["Semantic segmentation", "Panoptic segmentation", "Instance segmentation"]
    assert re.findall("<h2>(.*?)</h2>", page) == ["How the rows stand", *titles, "Row by row"]
    assert page.count("<polyline") == 2  # one validation curve each, of its own figure
    assert "Validation PQ during training" in page and "Validation AP during training" in page
    assert "published 52.00</text>" in page  # the dashed line in the chart of PQ
    assert "Validation mIoU" not in page
    assert re.findall("<summary>(.*?) of every class", page) == ["AP", "IoU"]  # PQ's two classes are all shown
    headline = "</b> {} of the last checkpoint, median of 3 seeds (50.00 to 52.00)</p>"
    assert f"<b>51.00{headline.format('PQ')}" in page and f"<b>51.00{headline.format('AP')}" in page
    assert "<li>panoptic: the published checkpoint, evaluated here, has PQ 52.00, " in page
    assert page.count("<table") == page.count('<div class="wide"><table')


def test_the_page_of_nothing_says_what_to_do(params: Params, tmp_path: Path) -> None:
    page = page_of(params, tmp_path)
    assert "Nothing has run yet" in page and "<code>make demo</code>" in page
    assert "80.44" in page  # what is published is shown all the same
    assert "Accuracy against speed" not in page and "Row by row" not in page
