from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.params.load import load_params
from pipeline.params.schema import Params, Row, WeightsConfig
from pipeline.runs.curve_file import point_line
from pipeline.storage.results.folder import write_result
from studies.fine_tuning import draw, label_of, panel, table
from tests.helpers import made_up
from tests.helpers.shared import PROJECT


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """The rows `anew` and `tuned` on shapes, `tuned` from camvid_tiny's weights, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("M2F_STORAGE", raising=False)
    params = load_params(PROJECT / "params.yaml")
    anew = dataclasses.replace(params.row("shapes_tiny"), name="anew")
    tuned = dataclasses.replace(anew, name="tuned", weights="w")
    weights = {**params.weights, "w": WeightsConfig(layout="mask2former", row="camvid_tiny")}
    return dataclasses.replace(params, rows={**params.rows, "anew": anew, "tuned": tuned}, weights=weights)


def train(row: Row, *seeds: dict[int, float], status: str = "finished") -> None:
    """Results and curves of a row, by the PQ of every seed at some steps."""
    entries = [made_up.trained_seed(number, key=row.name, status=status) for number in range(len(seeds))]
    for entry, values in zip(entries, seeds, strict=True):
        Path("storage", entry.run_dir).mkdir(parents=True)
        points = [(10, {"loss": 3.0}), *((step, {"val_pq": value}) for step, value in values.items())]
        lines = [point_line(step, metrics, 0) + "\n" for step, metrics in points]
        Path("storage", entry.run_dir, "curve.jsonl").write_text("".join(lines))
    write_result(made_up.training(row.name, entries), row.name)


def test_a_table_has_the_mean_of_the_seeds_and_the_gain_over_the_first_row(params: Params) -> None:
    train(params.row("anew"), {100: 0.10, 200: 0.20}, {100: 0.20, 200: 0.30})
    train(params.row("tuned"), {100: 0.40, 200: 0.45}, {100: 0.50, 200: 0.40})
    starts = panel(["anew", "tuned"], params)
    assert table(starts).splitlines() == [
        "| shapes, PQ at step | 100 | 200 | seeds at the last |",
        "| --- | --- | --- | --- |",
        "| random weights | 15.00 | 25.00 | 20.00, 30.00 |",
        "| weights of camvid_tiny | 45.00 | 42.50 | 45.00, 40.00 |",
        "| gain: weights of camvid_tiny | +30.00 | +17.50 | |",
    ]
    draw([starts], Path("it.png"))
    assert Path("it.png").read_bytes().startswith(b"\x89PNG")


def test_a_label_says_what_is_frozen(params: Params) -> None:
    row = params.row("tuned")
    frozen = dataclasses.replace(row, train=dataclasses.replace(row.train, freeze=("backbone", "pixel_decoder")))
    assert label_of(frozen, params) == "weights of camvid_tiny, backbone and pixel_decoder frozen"


def test_rows_that_cannot_be_compared_are_refused(params: Params) -> None:
    train(params.row("anew"), {100: 0.10})
    train(params.row("tuned"), {50: 0.10})
    with pytest.raises(ValueError, match="anew and tuned were validated at other steps; give both one val_interval"):
        panel(["anew", "tuned"], params)
    train(params.row("camvid_tiny"), {100: 0.10})
    with pytest.raises(ValueError, match="rows anew and camvid_tiny differ in dataset or task"):
        panel(["anew", "camvid_tiny"], params)
    train(params.row("nuclei_tiny"), {100: 0.10}, status="diverged")
    with pytest.raises(ValueError, match="seed 0 of row nuclei_tiny is diverged; train it first: dvc repro train@"):
        panel(["nuclei_tiny"], params)
