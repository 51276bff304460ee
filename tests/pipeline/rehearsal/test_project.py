"""The project of a rehearsal."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.params.load import load_params
from pipeline.project.begin import begin
from pipeline.rehearsal.project import Extent, opened
from tests.helpers.images import write_folder
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S

PARAMS = PROJECT / "params.yaml"


def extent(**changes: Any) -> Extent:
    settings: dict[str, Any] = {"steps": 4, "images": 1, "scale": 0.1, "one_image": True, "real_weights": False}
    return Extent(**{**settings, **changes})


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage root that holds something."""
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "storage"))
    (tmp_path / "storage/runs").mkdir(parents=True)
    return tmp_path / "storage"


@pytest.mark.parametrize("name", ["ade20k_r50", "coco_panoptic_r50", "shapes_tiny", "cityscapes_swin-t"])
def test_it_has_the_row_alone_shortened_and_scaled(name: str, storage: Path) -> None:
    params = load_params(PARAMS)
    row = params.row(name)
    with opened(row, params, PARAMS, extent()) as project:
        short = load_params(project.folder / "params.yaml")
        assert list(short.rows) == [name]
        train = short.row(name).train
        assert (train.steps, train.val_interval, train.checkpoint_interval, train.log_every) == (4, 4, 2, 1)
        assert train.global_batch == 1
        assert train.optimizer == row.train.optimizer
        assert short.row(name).model == row.model
        assert max(train.augmentation.crop) == max(64, round(0.1 * max(row.train.augmentation.crop) / 32) * 32)
        assert short.row(name).test.long_side_max == round(0.1 * row.test.long_side_max)
        assert short.row(name).test.ms_flip is None
        assert project.environment["M2F_STORAGE"].startswith(str(storage / "preflight" / name))
        assert project.environment["M2F_WORKERS"] == "1"
    assert not project.folder.exists()
    assert [path.name for path in storage.iterdir()] == ["runs"]


@pytest.mark.parametrize("scale", [0.05, 0.33])
def test_the_smallest_scale_leaves_long_sides_that_hold_the_short_ones(scale: float) -> None:
    params = load_params(PARAMS)
    for name in ("shapes_tiny", "ade20k_r50"):  # of 128 x 192 pixels, and with several test sizes
        row = params.row(name)
        with opened(row, params, PARAMS, extent(scale=scale, one_image=name == "shapes_tiny")) as project:
            short = load_params(project.folder / "params.yaml").row(name)
            assert short.train.augmentation.long_side_max >= max(short.train.augmentation.short_sides)


def test_the_unscaled_row_keeps_its_recipe_but_for_its_length() -> None:
    params = load_params(PARAMS)
    row = params.row("ade20k_swin-t")
    with opened(row, params, PARAMS, extent(scale=1.0, one_image=False)) as project:
        short = load_params(project.folder / "params.yaml").row("ade20k_swin-t")
        assert short.test == row.test and short.train.augmentation == row.train.augmentation
        assert short.train.global_batch == row.train.global_batch
        assert project.size == (512, 683)


def test_archives_and_weights_are_handed_out_with_their_digests() -> None:
    params = load_params(PARAMS)
    with opened(params.row("ade20k_r50"), params, PARAMS, extent()) as project:
        written = yaml.safe_load((project.folder / "params.yaml").read_text())
        source = written["datasets"]["ade20k"]["sources"][0]
        assert source.startswith("http://127.0.0.1:") and source.endswith("/ADEChallengeData2016.zip")
        with urllib.request.urlopen(source, timeout=10) as answer:
            assert len(answer.read()) == written["datasets"]["ade20k"]["bytes"][0]
        assert written["weights"]["torchvision_r50"]["url"].endswith("/backbone.pth")


def test_without_room_nothing_is_begun_and_the_setting_to_change_is_named(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, usage = load_params(PARAMS), shutil.disk_usage
    full = storage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=0 if path == full else 1 << 40))
    for full, named in ((storage, "M2F_STORAGE"), (Path(tempfile.gettempdir()), "TMPDIR")):
        with (
            pytest.raises(ValueError, match=f"^rehearsing shapes_tiny takes .* {full}; make room, or set {named} to"),
            opened(params.row("shapes_tiny"), params, PARAMS, extent()),
        ):
            pass
    assert [path.name for path in storage.iterdir()] == ["runs"]


def test_stand_ins_of_archives_with_odd_names_can_be_downloaded(tmp_path: Path) -> None:
    own = write_folder(tmp_path / "données à moi: #2 50%?")
    begin(tmp_path / "new", own=own)
    file = tmp_path / "new/params.yaml"
    params = load_params(file)
    with opened(params.row("donn_es_moi_2_50_tiny"), params, file, extent()) as project:
        command = [sys.executable, "-m", "stages.shard", "donn_es_moi_2_50"]
        for stage in ("fetch", "shard"):
            command[2] = f"stages.{stage}"
            done = subprocess.run(
                command, cwd=project.folder, env=project.environment, capture_output=True, text=True, timeout=LIMIT_S
            )
            assert done.returncode == 0, done.stderr
