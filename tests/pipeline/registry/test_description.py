"""What a registered model and its versions say of themselves."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.comparison.verdict import Verdict
from pipeline.params.schema import Params, Row
from pipeline.registry.candidates import Candidate
from pipeline.registry.description import figure_tags, model_description, version_description


@pytest.fixture
def row(params: Params) -> Row:
    return dataclasses.replace(
        params.row("coco_panoptic_r50"), published={"pq": 52.0, "ap": 41.8}, published_authors={"pq": 51.9}
    )


def candidate(**fields: object) -> Candidate:
    made = Candidate(
        seed=3,
        run_key="0123456789abcdef",
        value=0.52,
        figures={"pq": 0.52, "sq": 0.83, "rq": 0.61, "ap": 0.4183, "miou": None},
        checkpoint="runs/x",
        sha256="ab",
        mlflow_run_id=None,
        git_commit="c0ffee",
    )
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


def test_figures_are_tags_in_percent_and_unknown_ones_are_left_out() -> None:
    assert figure_tags({"pq": 0.57, "ap": 0.123456789, "miou": None}) == {"pq": "57", "ap": "12.3457"}


def test_a_version_tells_its_figures_its_seed_its_code_the_command_and_the_terms(row: Row) -> None:
    text = version_description(row, candidate(), licence="images: CC BY", made_by="dvc repro register@x")
    assert text.split("\n\n") == [
        "PQ 52.00, SQ 83.00, RQ 61.00, AP 41.83 (percent, validation), seed 3 of coco_panoptic_r50.",
        "Run key 0123456789abcdef, commit c0ffee. Made by `dvc repro register@x`.",
        "Terms: images: CC BY.",
    ]


def test_a_model_tells_its_versions_beside_the_published_figures_and_the_verdict(row: Row) -> None:
    versions = {"best": ("4", {"pq": "52.5", "ap": "41", "seed": "3"}), "median": ("2", {"pq": "52", "seed": "0"})}
    verdict = Verdict(decision="reproduced", reason="The median of 5 seeds equals the published 52.00.")
    text = model_description(row, "coco-panoptic-r50", versions, verdict, licence="images: CC BY")
    parts = text.split("\n\n")
    assert parts[0].startswith(
        "Mask2Former with r50 for panoptic segmentation: row coco_panoptic_r50, trained on coco."
    )
    assert parts[1].splitlines() == [
        "| | version | seed | PQ | AP |",
        "|---|---|---|---|---|",
        "| best | 4 | 3 | 52.50 | 41.00 |",
        "| median | 2 | 0 | 52.00 | - |",
        "| published | | | 52.00 | 41.80 |",
        "| the authors' | | | 51.90 | - |",
    ]
    assert "**reproduced**: The median of 5 seeds equals the published 52.00." in parts
    assert "Recipe: 368,750 steps of 16 images, crops of 1024 x 1024, initial weights torchvision_r50." in parts
    assert "Made by `dvc repro register@coco_panoptic_r50`." in parts and "Terms: images: CC BY." in parts
    assert 'models:/coco-panoptic-r50@best"' in parts[-1]
