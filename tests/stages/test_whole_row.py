"""A row from generated pictures to the report, through DVC and Ray Train, as a user runs it."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest

from tests.helpers.project_copy import Copy


@pytest.mark.ray
@pytest.mark.long
def test_a_row_goes_from_pictures_to_a_line_in_the_report_and_a_second_seed_trains_alone(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    copy.params["datasets"]["shapes"]["generate"] |= {"train": 12, "val": 4}
    row = copy.params["rows"]["shapes_tiny"]
    row["train"] |= {"steps": 4, "val_interval": 2, "checkpoint_interval": 2, "log_every": 2}
    row["seeds"] = [0]
    copy.write_params()
    with tempfile.TemporaryDirectory(prefix="m2f-ray-", dir="/tmp") as ray:  # Ray's socket paths must be short
        settings = {"M2F_WORKERS": "2", "RAY_TMPDIR": ray, "RAY_USAGE_STATS_ENABLED": "0"}
        copy.dvc("repro", "evaluate@shapes_tiny", **settings)
        first = json.loads((tmp_path / "results/train/shapes_tiny.json").read_text())
        again = copy.dvc("repro", "evaluate@shapes_tiny", **settings)
        assert {*re.findall(r"Running stage '(\w+)@", again)} == {"ready", "fetch", "weights"}
        row["seeds"] = [0, 1]
        copy.write_params()
        copy.dvc("repro", "evaluate@shapes_tiny", **{**settings, "M2F_WORKERS": "0"})  # in one process; keys stay
    second = json.loads((tmp_path / "results/train/shapes_tiny.json").read_text())
    assert second["seeds"][0] == first["seeds"][0]
    assert [seed["status"] for seed in second["seeds"]] == ["finished", "finished"]
    assert [seed["workers"] for seed in second["seeds"]] == [2, 1]

    assert "not run: " in copy.python("-m", "stages.report")
    report = json.loads((tmp_path / "reports/results.json").read_text())["rows"]
    mious = [seed["miou"] for seed in report["shapes_tiny"]["seeds"]]
    assert report["shapes_tiny"]["median"]["miou"] == pytest.approx(
        sum(mious) / 2, abs=0.011
    )  # rounded before and after
    line = f"| shapes_tiny | no verdict | {report['shapes_tiny']['median']['pq']:.2f} |"
    assert line in (tmp_path / "reports/results.md").read_text()
    assert report["cityscapes_r50"]["published"]["miou"] == 80.44
    page = (tmp_path / "reports/index.html").read_text()
    assert first["seeds"][0]["run_key"] in page and "data:image/jpeg;base64," in page
