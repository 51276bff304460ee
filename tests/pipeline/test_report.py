from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.files import write_json
from pipeline.params import Params, parse_params
from pipeline.report import markdown, row_facts, text_table, write_report
from pipeline.report_page import _ticks, thinned

AUGMENTATION = {"crop": [64, 64], "short_sides": [64], "long_side_max": 128}
ROW = {
    "dataset": "d",
    "weights": "none",
    "model": {"num_classes": 2},
    "train": {"steps": 100, "augmentation": AUGMENTATION},
    "test": {"short_side": 64, "long_side_max": 128},
}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def params() -> Params:
    return parse_params(
        {
            "datasets": {"d": {"layout": "folder", "class_names": ["road", "<sky>"]}},
            "rows": {
                "ours": {**ROW, "seeds": [0, 1, 2]},
                "published": {**ROW, "seeds": [0], "published": {"miou": 80.44}, "published_authors": {"miou": 79.4}},
            },
        }
    )


def figures(miou: float, step: int = 100) -> dict[str, Any]:
    return {
        "step": step,
        "miou": miou,
        "mean_accuracy": miou + 0.05,
        "pixel_accuracy": 0.9,
        "per_class": {"road": miou, "<sky>": None},
    }


def evaluated(row: str, mious: list[float | None], key: str = "k") -> dict[str, Any]:
    """Evaluation of seeds 0, 1, ...; None: diverged."""
    seeds: list[dict[str, Any]] = []
    for seed, miou in enumerate(mious):
        entry: dict[str, Any] = {"seed": seed, "run_key": f"{key}{seed}", "reason": None, "mlflow_run_id": None}
        if miou is None:
            entry |= {"status": "diverged", "reason": "the loss is not finite at step 7"}
        else:
            best = figures(miou + 0.01, step=80)
            entry |= {"status": "finished", "checkpoints": {"last": figures(miou), "best": best}}
        seeds.append(entry)
    baseline = {"class": "road", "miou": 0.0625, "mean_accuracy": 0.5, "pixel_accuracy": 0.3}
    return {"row": row, "dataset": "d", "decides": "last", "seeds": seeds, "baseline": baseline, "overlays": []}


def trained(row: str, seeds: int, key: str = "k") -> dict[str, Any]:
    return {
        "row": row,
        "dataset": "d",
        "seeds": [
            {
                "seed": seed,
                "run_key": f"{key}{seed}",
                "status": "finished",
                "run_dir": f"runs/{key}{seed}",
                "checkpoints": {"last": {"step": 100, "path": "x", "sha256": "feed" * 16}},
                "train_s": 75.0,
                "workers": 2,
                "images_per_s": 10.0,
                "mlflow_run_id": None,
                "environment": {"device": "a CPU", "git_commit": "c0ffee", "libraries": {"torch": "2.0"}},
            }
            for seed in range(seeds)
        ],
    }


def test_the_median_and_range_are_those_of_the_unrounded_seeds(params: Params, tmp_path: Path) -> None:
    # Percent: 71.234, 70.456, 72.9. Middle: 71.234 -> 71.23; lowest 70.456 -> 70.46; highest 72.9.
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.71234, 0.70456, 0.729]))
    facts = row_facts(params.rows["ours"], tmp_path)
    assert facts["median"]["miou"] == 71.23
    assert facts["range"]["miou"] == [70.46, 72.9]
    assert [seed["miou"] for seed in facts["seeds"]] == [71.23, 70.46, 72.9]
    assert facts["baseline"] == {"class": "road", "miou": 6.25, "mean_accuracy": 50.0, "pixel_accuracy": 30.0}
    assert facts["status"] == "finished"


def test_the_median_of_an_even_number_of_seeds_is_the_mean_of_the_middle_two(params: Params, tmp_path: Path) -> None:
    # 70.004 and 71.004 would be 70.50 from rounded figures too; 70.004 and 70.014 give 70.009 -> 70.01, rounded 70.005.
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.70004, 0.70014]))
    assert row_facts(params.rows["ours"], tmp_path)["median"]["miou"] == 70.01


def test_the_difference_is_ours_less_the_published_figure(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "published.json", evaluated("published", [0.8]))
    facts = row_facts(params.rows["published"], tmp_path)
    assert facts["difference"] == {"miou": -0.44}  # 80.00 - 80.44
    assert facts["published"] == {"miou": 80.44}
    assert facts["published_authors"] == {"miou": 79.4}


def test_the_published_checkpoint_evaluated_here_stands_beside_the_published_figure(
    params: Params, tmp_path: Path
) -> None:
    figures = {"miou": 0.80436, "mean_accuracy": 0.9, "pixel_accuracy": 0.95}
    write_json(tmp_path / "published" / "published.json", {"figures": figures, "difference": -0.004})
    facts = row_facts(params.rows["published"], tmp_path)
    assert facts["published_checkpoint"]["miou"] == 80.44
    text = markdown({"published": facts})
    assert (
        "published: the published checkpoint, evaluated here, has mIoU 80.44, -0.00 from the published figure." in text
    )
    assert row_facts(params.rows["ours"], tmp_path)["published_checkpoint"] is None


def test_a_row_without_results_is_not_run(params: Params, tmp_path: Path) -> None:
    facts = row_facts(params.rows["ours"], tmp_path)
    assert (facts["status"], facts["seeds"], facts["median"]) == ("not run", [], {})


def test_a_row_that_was_only_trained_says_so(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "train" / "ours.json", trained("ours", 3))
    facts = row_facts(params.rows["ours"], tmp_path)
    assert (facts["status"], facts["median"], len(facts["seeds"])) == ("trained", {}, 3)


def test_a_diverged_seed_counts_as_failed_and_its_reason_is_told(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.7, None, 0.72]))
    facts = row_facts(params.rows["ours"], tmp_path)
    assert facts["status"] == "incomplete"
    assert facts["median"]["miou"] == 71.0
    text = markdown({"ours": facts})
    assert "| ours (incomplete) | 2 of 3 | 71.00 | 70.00 to 72.00 | - | - | 90.00 | 6.25 (road) |" in text
    assert "| 1 | diverged: the loss is not finite at step 7 | - | - | - | k1 |" in text


def test_a_missing_seed_makes_a_row_incomplete(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.7, 0.71]))
    assert row_facts(params.rows["ours"], tmp_path)["status"] == "incomplete"


def test_figures_of_an_earlier_training_are_out_of_date(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.7, 0.71, 0.72], key="old"))
    write_json(tmp_path / "train" / "ours.json", trained("ours", 3, key="new"))
    assert row_facts(params.rows["ours"], tmp_path)["status"] == "out of date"


def test_a_torn_result_is_named_with_the_command_that_makes_it(params: Params, tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "ours.json").write_text("{")
    with pytest.raises(ValueError, match=r"ours\.json is not JSON .*make it again with: dvc repro -f evaluate@ours"):
        row_facts(params.rows["ours"], tmp_path)


def test_the_terminals_table_shows_rows_with_figures_and_names_the_others(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "published.json", evaluated("published", [0.8]))
    rows = {name: row_facts(row, tmp_path) for name, row in params.rows.items()}
    lines = text_table(rows).splitlines()
    assert lines[0].split()[:3] == ["Row", "Seeds", "mIoU"]
    assert " ".join(lines[2].split()) == ("published 1 80.00 80.00 to 80.00 80.44 -0.44 90.00 6.25 (road) finished")
    assert lines[3] == "not run: ours"


class Outside(HTMLParser):
    """Addresses a page would load, and tags left open."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing_from_outside(params: Params, tmp_path: Path, storage: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "reports"
    facts = evaluated("ours", [0.7, 0.71, 0.72])
    facts["overlays"] = ["runs/k0/overlays/00000.png", "runs/gone.png"]
    write_json(results / "evaluate" / "ours.json", facts)
    write_json(results / "train" / "ours.json", trained("ours", 3))
    write_json(results / "shard" / "d.json", {"digest": "da7a"})
    write_json(results / "evaluate" / "renamed.json", facts)
    (storage / "runs" / "k0" / "overlays").mkdir(parents=True)
    (storage / "runs" / "k0" / "overlays" / "00000.png").write_bytes(PNG)
    curve = "".join(json.dumps({"step": s, "loss": 10 - s / 10, "lr": 0.1}) + "\n" for s in range(10, 60, 10))
    (storage / "runs" / "k0" / "curve.jsonl").write_text(curve + '{"step": 50, "val_miou": 0.5}\n')

    table = write_report(params, results=results, out=out)
    assert table.splitlines()[2].startswith("ours")
    page = (out / "index.html").read_text()
    parser = Outside()
    parser.feed(page)
    assert parser.open == []
    assert [load[:22] for load in parser.loads] == ["#ours", "data:image/png;base64,"]
    assert "url(" not in page
    assert "@import" not in page
    assert page.count("<polyline") == 2  # loss and mIoU of seed 0; the other seeds' folders are elsewhere
    assert "&lt;sky&gt;" in page
    assert "<sky>" not in page
    for fact in ("k0", "c0ffee", "da7a", "feed" * 16, "torch 2.0", "a CPU", "71.00", "6.25", "renamed"):
        assert fact in page, fact
    assert "no such row any more: renamed" in (out / "results.md").read_text()
    written = json.loads((out / "results.json").read_text())["rows"]
    assert written["ours"]["median"]["miou"] == 71.0
    assert written["published"]["status"] == "not run"


def test_a_large_picture_is_shown_smaller(params: Params, tmp_path: Path, storage: Path) -> None:
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (400, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(storage / "big.png")
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.7]) | {"overlays": ["big.png"]})
    write_report(params, results=tmp_path, out=tmp_path / "reports")
    page = (tmp_path / "reports" / "index.html").read_text()
    assert re.search(r'src="data:image/jpeg;base64,[A-Za-z0-9+/=]{1000,}"', page)


def test_ticks_are_round_and_enclose_the_values() -> None:
    assert _ticks(0.0, 600.0) == [0, 200, 400, 600]
    assert _ticks(68.9, 71.2) == [68.5, 69, 69.5, 70, 70.5, 71, 71.5]
    assert _ticks(5.0, 5.0) == [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]


def test_a_long_curve_keeps_its_last_point_and_the_means_of_pieces() -> None:
    # 7 points, 4 wanted: three pieces of two, and the last.
    points = [(float(x), 10.0 * x) for x in range(7)]
    assert thinned(points, 4) == [(0.5, 5.0), (2.5, 25.0), (4.5, 45.0), (6.0, 60.0)]
    assert thinned(points, 7) == points
