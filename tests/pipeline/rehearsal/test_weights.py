"""Random weights in the published layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2f.model import build_model
from m2f.weights import backbone_from_swin, backbone_from_torchvision, load_backbone, read_checkpoint
from pipeline.params.load import load_params
from pipeline.params.schema import Row
from pipeline.rehearsal.weights import write_random_backbone
from tests.helpers.shared import PROJECT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "layout", "convert"),
    [("ade20k_r50", "torchvision", backbone_from_torchvision), ("ade20k_swin-t", "swin", backbone_from_swin)],
)
def test_they_are_converted_and_loaded_as_published_ones(row: str, layout: str, convert, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = load_params(PROJECT / "params.yaml").row(row).model
    write_random_backbone(model, layout, tmp_path / "backbone.pth")  # type: ignore[arg-type]
    network = build_model(model)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    load_backbone(network, convert(read_checkpoint(tmp_path / "backbone.pth")))
    changed = {name for name, value in network.state_dict().items() if (value != before[name]).any()}
    assert changed and all(name.startswith("backbone.") for name in changed)


@pytest.mark.slow
def test_a_full_disk_is_an_error_of_the_system(small_row: Row) -> None:
    with pytest.raises(OSError, match="No space left"):
        write_random_backbone(small_row.model, "torchvision", Path("/dev/full"))
