"""The report of everything: all published rows, five seeds, every kind of verdict and seed, from generated results."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.comparison.rows import VERDICTS, row_facts
from pipeline.params.load import load_params
from pipeline.params.schema import Params
from pipeline.params.tasks import FIGURES
from pipeline.report.html.page import page
from pipeline.report.html.row_section import Details
from pipeline.report.html.thumbnails import ROW_OVERLAYS
from pipeline.report.text import markdown
from pipeline.report.write import write_report
from pipeline.storage.results.rows import Aliases, BestVersion, RegisteredVersion, Registration
from tests.helpers import made_up
from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.report_results import PROJECT, PageParser, write_results
from tests.helpers.report_rows import (
    RULE,
    benchmark,
    ended,
    evaluated,
    figures,
    page_of,
    published,
    trained,
    written,
)

HOME = "/" + "home/ann"
"""Of somebody on another machine."""

ROWS = sum(bool(row.published or row.published_authors) for row in load_params(PROJECT / "params.yaml").rows.values())
"""Published ones."""

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


@pytest.mark.slow
def test_the_largest_page_is_whole_small_and_loads_nothing(full: tuple[Path, str]) -> None:
    page = (full[0] / "index.html").read_text()
    assert len(page.encode()) < PAGE_LIMIT_MIB * 2**20
    parser = PageParser()
    parser.feed(page)
    assert parser.open == []
    assert {load.partition(",")[0] for load in parser.loads} == {"data:image/jpeg;base64"}
    assert len(parser.loads) == 3 * ROW_OVERLAYS * ROWS
    assert {link.partition("/")[0] for link in parser.links if not link.startswith("#")} == {"https:", "http:"}
    targets = set(re.findall(r'id="?([\w-]+)', page))
    assert {link[1:] for link in parser.links if link.startswith("#")} <= targets


@pytest.mark.slow
def test_every_kind_of_row_and_seed_is_told(full: tuple[Path, str]) -> None:
    written = json.loads((full[0] / "results.json").read_text())
    assert sum(written["verdicts"].values()) == ROWS
    assert min(written["verdicts"][decision] for decision in VERDICTS) > 0
    assert written["rows"]["cityscapes_r101"]["verdict"]["decision"] == "below"
    assert written["rows"]["ade20k_swin-b"]["verdict"]["decision"] == "above"
    text = (full[0] / "results.md").read_text()
    for told in ("| 3 | diverged: the loss is not finite", "| 4 | failed: worker 3 was lost", "CPU \\*", "4 of 5"):
        assert told in text, told
        assert told.strip("| ").partition(" | ")[2] in (full[0] / "index.html").read_text()


@pytest.mark.slow
def test_the_terminals_tables_fit_120_columns(full: tuple[Path, str]) -> None:
    tables = full[1].partition("\n\ncityscapes_r101: ")[0]
    assert max(map(len, tables.splitlines())) <= 120
    assert len(tables.splitlines()) == 3 * 3 + 2 + ROWS  # a title, headings and a line each; blank lines; the rows


@pytest.mark.slow
def test_markdown_tables_have_as_many_cells_as_headings(full: tuple[Path, str]) -> None:
    lines = (full[0] / "results.md").read_text().splitlines()
    counts = [len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0 for line in lines]
    assert all(a == b for a, b in pairwise(counts) if a and b)
    assert sum(line.startswith("| ---") for line in lines) == 3 + 2 + ROWS  # 2: of the semantic and COCO rows not run


@pytest.mark.slow
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
        ("cityscapes_objects", "PQ on A100"),
        ("cityscapes_objects", "AP on A100"),
        ("ade20k_objects", "PQ on A100"),
        ("ade20k_objects", "AP on A100"),
        ("vistas", "PQ on A100"),
        ("vistas", "mIoU on A100"),
    ]
    joined = [chart.count('class="join"') for _, _, chart in captions]
    # swin-l has no benchmark; two of ADE20K's are on a CPU; of COCO and of the authors' rows no speed is published
    assert joined == [0, 5, 5, *[0] * 9]


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
    assert re.findall("<h2>(.*?)</h2>", page) == ["Summary", *titles, "Row by row"]
    assert page.count("<polyline") == 2  # one validation curve each, of its own figure
    assert "Validation PQ during training" in page and "Validation AP during training" in page
    assert "published 52.00</text>" in page  # the dashed line in the chart of PQ
    assert "Validation mIoU" not in page
    assert re.findall("<summary>(.*?) of every class", page) == ["AP", "IoU"]  # PQ's two classes are all shown
    headline = "</b> {} of the last checkpoint, median of 3 seeds (50.00 to 52.00)</p>"
    assert f"<b>51.00{headline.format('PQ')}" in page and f"<b>51.00{headline.format('AP')}" in page
    assert "<li>panoptic: the published checkpoint, evaluated here, has PQ 52.00, " in page
    regions = re.findall(r'<div class="wide" role="region" aria-label="([^"]+)" tabindex="0">\n<table', page)
    assert page.count("<table") == len(regions) == len(set(regions)) == page.count('<p class="hint">')


def test_the_page_of_nothing_says_what_to_do(params: Params, tmp_path: Path) -> None:
    page = page_of(params, tmp_path)
    assert "Nothing has run yet" in page and "<code>make demo</code>" in page
    assert "<summary>2 rows not run: ours, published</summary>" in page
    assert "80.44" in page.partition("<summary>2 rows not run")[2]  # what is published is shown all the same
    assert "Accuracy against speed" not in page and "Row by row" not in page


def test_a_project_without_published_rows_reads_nothing_of_verdicts_and_published_figures(
    params: Params, tmp_path: Path
) -> None:
    written(tmp_path, evaluated("ours", [0.7]))
    own = dataclasses.replace(params, rows={"ours": params.rows["ours"]})
    for text in (page_of(own, tmp_path), markdown({"ours": row_facts(params.rows["ours"], tmp_path, RULE)}, RULE)):
        assert "70.00" in text and "means reproduced" not in text and "as printed" not in text
    assert "published tables" not in page_of(own, tmp_path) and "means reproduced" in page_of(params, tmp_path)


def test_finished_rows_come_first_and_one_line_names_those_not_run(params: Params, tmp_path: Path) -> None:
    # "ours" has two of its three seeds: it comes after "published", which has all.
    written(tmp_path, evaluated("ours", [0.7, 0.71]), evaluated("published", [0.8]))
    page = page_of(params, tmp_path)
    table, sections = page.partition("Row by row</h2>")[::2]
    assert table.index('<a href="#published">published</a></th>') < table.index('<a href="#ours">ours</a></th>')
    assert re.findall('<section class="row" id="(.*?)">', sections) == ["published", "ours"]
    assert re.findall('<details class="not-run"><summary>(.*?)</summary>', page) == [
        "1 row not run: panoptic",
        "1 row not run: instance",
    ]
    folded = page.partition("1 row not run: panoptic")[2].partition("</details>")[0]
    assert re.findall("<td[^>]*>(.*?)</td>", folded.partition("<tbody>")[2]) == [
        "52.00",
        "51.90",
        "41.80",
        "41.70",
        "61.70",
    ]


def test_names_with_html_in_them_are_text(params: Params, tmp_path: Path, storage: Path) -> None:
    name, evil = '<script>"&', "<script>alert(1)</script> & co"
    ours = figures("semantic", 0.7, per_class={"iou": {evil: 0.7, "road": 0.6}})
    written(tmp_path, evaluated("ours", [ours, ours]), benchmark("ours"))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    idle = dataclasses.replace(row_facts(params.rows["published"], tmp_path, RULE), dataset=evil)
    made = page(
        {name: facts, evil: idle}, {name: Details(weights=evil)}, settings=RULE, notes=[evil], tracking="sqlite:///a.db"
    )
    parser = PageParser()
    parser.feed(made)
    assert "<script" not in made and "co & " not in made
    assert (
        made.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; co") >= 6
    )  # twice a class, its bars, a note, a row ...
    assert f'id="{html.escape(name).replace("&quot;", "&#34;")}"' in made
    assert f"#{name}" in parser.links


@pytest.mark.slow
def test_every_chart_is_an_image_with_a_title(full: tuple[Path, str]) -> None:
    made = (full[0] / "index.html").read_text()
    charts = re.findall(r"<svg [^>]*>.{9}", made)
    assert len(charts) > 1000
    assert all('role="img"' in chart and re.search(r"><title>\w", chart) for chart in charts)


def test_nothing_names_a_folder_of_the_machine(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Path
) -> None:
    database = tmp_path / "project" / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    by_hand = {"seed": None, "run_key": None, "figure": None, "value": None}
    aliases = Aliases(best=BestVersion(version=2, **by_hand), median=RegisteredVersion(version=1, **by_hand))
    registered = Registration(row="ours", model="ours", aliases=aliases, tracking_uri=f"sqlite:///{database}")
    lost = made_up.evaluation(
        "ours", [*evaluated("ours", [0.7]).seeds, ended(1, "failed", f"{storage}/runs/k1 is full, see {HOME}/log")]
    )
    written(tmp_path, lost, trained("ours", 1, mlflow_run_id="1f00"), registered)
    monkeypatch.setattr("pipeline.report.write.read_curve", _refuse)
    write_report(params, results=tmp_path, out=tmp_path / "reports")
    for name in ("index.html", "results.md", "results.json"):
        text = (tmp_path / "reports" / name).read_text()
        found = [place for place in (str(tmp_path), str(storage), str(Path.home()), HOME) if place in text]
        assert not found, (name, found)
    assert "k1 is full, see ~/log" in text  # results.json
    assert (
        "could not be read from the storage root (no access to the root/"
        in (tmp_path / "reports" / "index.html").read_text()
    )


def _refuse(path: Path) -> list[dict[str, float]]:
    raise OSError(f"no access to {path}")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.slow
def test_on_a_phone_only_tables_scroll_sideways_and_those_that_do_say_so(
    params: Params, tmp_path: Path, storage: Path
) -> None:
    written(tmp_path, evaluated("published", [0.8]), trained("published", 1, mlflow_run_id="1f00"))
    written(tmp_path, evaluated("ours", [0.7, 0.71, 0.72]), benchmark("ours"))
    page_of(params, tmp_path)
    measured = {}
    for width in (360, 1280):
        (tmp_path / f"{width}").mkdir()
        with Browser(tmp_path / f"{width}") as browser:
            said = browser.look(
                (tmp_path / "reports" / "index.html").as_uri(),
                tmp_path / f"{width}.png",
                words=["measured: "],
                script=MEASURE % width,
                settle_s=0,
            )
        measured[width] = json.loads(said.partition("measured: ")[2])
    for width, found in measured.items():
        assert found["page"] == width
        assert found["scrolls"] == found["hints"]
    assert True in measured[360]["scrolls"] and True not in measured[1280]["scrolls"]


MEASURE = """{
document.documentElement.style.scrollBehavior = "auto"
document.querySelectorAll("details").forEach(each => { each.open = true })
const frame = document.querySelector("iframe")
if (!frame) {
  const source = document.documentElement.outerHTML
  document.body.innerHTML = '<iframe style="width: %dpx; height: 900px; border: 0"></iframe>'
  document.querySelector("iframe").srcdoc = source
} else {
  const inside = frame.contentDocument, look = each => frame.contentWindow.getComputedStyle(each)
  const tables = [...inside.querySelectorAll(".table")]
  const found = {
    page: inside.documentElement.scrollWidth,
    scrolls: tables.map(each => { const box = each.querySelector(".wide"); return box.scrollWidth > box.clientWidth }),
    hints: tables.map(each => look(each.querySelector(".hint")).visibility == "visible"),
  }
  document.querySelectorAll("pre").forEach(each => each.remove())
  if (tables.length) document.body.append(Object.assign(document.createElement("pre"),
    { textContent: "measured: " + JSON.stringify(found) }))
}
}"""
