from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.loader import __main__ as command
from benchmarks.loader import tables
from pipeline.params.schema import AugmentationConfig
from tests.helpers.images import encoded, write_folder


def test_the_tables_name_every_contender_and_where_the_time_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path))  # the benchmark sets its own, and this one comes back
    write_folder(tmp_path / "mine", train=2)
    settings = ["--count", "2", "--rounds", "1", "--sizes", "ADE20K", "COCO", "--images-per-s-per-gpu", "50"]
    monkeypatch.setattr(sys, "argv", ["loader", "--images", str(tmp_path / "mine"), *settings])
    command.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    named = [row[0].removeprefix("| ") for row in rows]
    for name in ("OpenCV, straightforward", "loader, raw", "loader, encoded", "decoding alone", "decoding", "all"):
        assert named.count(name) == 2
    cells = rows[named.index("OpenCV, straightforward")][1:]
    rate, straightforward, _, sixteen, fed = (float(cell.replace(",", "").rstrip(" |")) for cell in cells)
    assert straightforward == 1
    assert sixteen == pytest.approx(16 * rate, rel=0.01)
    assert fed == pytest.approx(16 * rate / 50, abs=1)


def test_the_plain_recipe_makes_what_the_loader_makes() -> None:
    # a picture of one colour and two halves of labels, resized from 40 x 64 to 20 x 32 and cropped to 16 x 16
    labels = np.zeros((40, 64), np.uint8)
    labels[:, 32:] = 1
    file = tables.Files(encoded(np.full((40, 64, 3), (10, 20, 30), np.uint8)), encoded(labels))
    plan = AugmentationConfig(crop=(16, 16), short_sides=(20,), long_side_max=100, photometric=False)
    shares = []
    for seed in range(40):
        shown, segments = tables.straightforward(file, plan, random.Random(seed))
        assert (shown == torch.tensor([10, 20, 30])[:, None, None]).all()
        shares.append(segments.float().mean().item())
    assert 0.25 < min(shares) <= max(shares) < 0.75  # the rule draws again until both labels show
    assert shown.shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "error: --rounds must be at least 1"),
        (["--count", "1"], "--count at least 2, which make a batch"),
        (["--images-per-s-per-gpu", "0"], "error: --images-per-s-per-gpu must be more than 0"),
    ],
)
def test_counts_that_measure_nothing_are_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["loader", "--images", "mine", *words])
    with pytest.raises(SystemExit, match=message):
        command.main()
