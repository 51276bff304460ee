"""Folders for transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from m2f import build_model
from m2f.config import PixelDecoderConfig
from m2f.kernels.build import use
from pipeline.export.export import export
from pipeline.export.huggingface import require_transformers
from pipeline.params.load import load_params
from tests.helpers.shared import PROJECT
from tests.helpers.trained import trained

pytest.importorskip("transformers")


def test_a_backbone_that_transformers_lacks_is_one_sentence() -> None:
    row = load_params(PROJECT / "params.yaml").row("shapes_tiny")
    with pytest.raises(ValueError, match="transformers has no backbone like tiny; it has those of rows with r50, r101"):
        require_transformers(row.model)


def test_a_pixel_decoder_that_transformers_lacks_is_one_sentence() -> None:
    row = load_params(PROJECT / "params.yaml").row("ade20k_r50")
    other = dataclasses.replace(row.model, pixel_decoder=PixelDecoderConfig(name="fapn"))
    with pytest.raises(ValueError, match=r"transformers has no pixel decoder like fapn; export the row for another"):
        require_transformers(other)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["swin-tiny", pytest.param("r50", marks=pytest.mark.full)])
def test_transformers_gives_this_projects_numbers(backbone: str, tmp_path: Path) -> None:
    params = load_params(PROJECT / "params.yaml")
    row = params.row("shapes_tiny")
    model = dataclasses.replace(row.model, backbone=dataclasses.replace(row.model.backbone, name=backbone))
    torch.manual_seed(0)
    names = params.dataset("shapes").class_names
    source = trained(build_model(model).eval(), dataclasses.replace(row, model=model), names)
    made = export(source, tmp_path / "it", form="huggingface")
    use("auto")
    assert made.parity.apart == 0 and [path.name for path in tmp_path.iterdir()] == ["it"]
    assert {path.name for path in made.path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert json.loads((made.path / "config.json").read_text())["id2label"]["0"] == names[0]
