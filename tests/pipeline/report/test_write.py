from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.params.schema import Params
from pipeline.report.write import write_report
from pipeline.storage.results.folder import write_result
from tests.helpers import made_up
from tests.helpers.manifests import made_up_manifest
from tests.helpers.report_results import PageParser
from tests.helpers.report_rows import ended, evaluated, figures, page_of, trained, written

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def test_a_row_whose_primary_figure_counts_nothing_is_shown_without_it(params: Params, tmp_path: Path) -> None:
    nothing = figures("instance", 0.4, ap=None)
    seeds = evaluated("instance", [0.4, 0.4, 0.4], task="instance").seeds
    seeds = (seeds[0], made_up.evaluated_seed(1, nothing), seeds[2])
    result = made_up.evaluation("instance", seeds, task="instance")
    written(tmp_path, result)
    table = write_report(params, results=tmp_path, out=tmp_path / "reports")
    assert table.splitlines()[3].split() == ["instance", "no", "verdict", "-", "3"]
    assert "has no AP, because" in (tmp_path / "reports" / "index.html").read_text()


def test_the_page_is_whole_and_loads_nothing_from_outside(params: Params, tmp_path: Path, storage: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "reports"
    overlays = ("runs/k0/overlays/00000.png", "runs/gone.png")
    facts = evaluated("ours", [0.7, 0.71, 0.72], overlays=overlays)
    written(results, facts)
    written(results, trained("ours", 3), dataclasses.replace(facts, row="renamed"))
    manifest = made_up_manifest(dataset="d")
    write_result(manifest, "d", results=results)
    (storage / "runs" / "k0" / "overlays").mkdir(parents=True)
    (storage / "runs" / "k0" / "overlays" / "00000.png").write_bytes(PNG)
    curve = "".join(json.dumps({"step": s, "loss": 10 - s / 10, "lr": 0.1}) + "\n" for s in range(10, 60, 10))
    (storage / "runs" / "k0" / "curve.jsonl").write_text(curve + '{"step": 50, "val_miou": 0.5}\n')

    table = write_report(params, results=results, out=out)
    assert table.splitlines()[3].startswith("ours")
    page = (out / "index.html").read_text()
    parser = PageParser()
    parser.feed(page)
    assert parser.open == []
    assert [load[:23] for load in parser.loads] == ["data:image/jpeg;base64,"]
    assert "#ours" in parser.links
    assert "url(" not in page
    assert "@import" not in page
    assert page.count("<polyline") == 2  # loss and mIoU of seed 0
    assert "Curves or images are left out: 3 files could not be read" in page  # two seeds' curves, a picture
    assert "&lt;sky&gt;" in page
    assert "<sky>" not in page
    for fact in (
        "k0",
        "c0ffee",
        manifest.digest,
        "feed" * 16,
        "be57" * 16,
        "torch 2.0",
        "a CPU",
        "71.00",
        "6.25",
        "renamed",
    ):
        assert fact in page, fact
    assert "no such row any more: renamed" in (out / "results.md").read_text()
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows["ours"]["median"]["miou"] == 71.0
    assert rows["published"]["status"] == "not run"


def test_a_storage_root_that_fails_is_asked_once_and_the_report_is_made(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(path: Path) -> Any:
        asked.append(path)
        raise OSError("the bucket does not answer")

    monkeypatch.setattr("pipeline.report.write.read_curve", refuse)
    written(tmp_path, trained("ours", 3))
    written(tmp_path, evaluated("ours", [0.7, 0.71, 0.72]))
    left_out = "Curves or images are left out: 3 files could not be read from the storage root (the bucket does not"
    assert left_out in page_of(params, tmp_path)
    assert len(asked) == 1


def test_what_a_user_may_name_is_escaped(params: Params, tmp_path: Path) -> None:
    first, _, third = evaluated("ours", [0.7, None, 0.72]).seeds
    result = made_up.evaluation("ours", [first, ended(1, "diverged", "<script>alert(1)</script> | a"), third])
    written(tmp_path, result)
    assert "<script" not in page_of(params, tmp_path)
    text = (tmp_path / "reports" / "results.md").read_text()
    assert "| 1 | diverged: &lt;script>alert(1)&lt;/script> \\| a | - |" in text
