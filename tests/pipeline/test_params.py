"""params.yaml: what is there, and what a slip of the pen gets."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.params import load_params, parse_params

PROJECT = Path(__file__).resolve().parents[2]
TREE = yaml.safe_load((PROJECT / "params.yaml").read_text())


def changed(*path: str, value: Any = None, delete: bool = False) -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    node = tree
    for key in path[:-1]:
        node = node[key]
    if delete:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            changed("rows", "shapes_tiny", "train", "step", value=3),
            "rows.shapes_tiny.train: unknown key 'step'; did you mean 'steps'?",
        ),
        (changed("row", value={}), "params.yaml: unknown key 'row'; did you mean 'rows'?"),
        (
            changed("rows", "shapes_tiny", "dataset", value="shape"),
            "no dataset is called 'shape'; did you mean 'shapes'?",
        ),
        (
            changed("rows", "shapes_tiny", "weights", value="torchvision_r5"),
            "no weights entry is called 'torchvision_r5'; did you mean 'torchvision_r50'?",
        ),
        (changed("rows", "shapes_tiny", "train", "steps", delete=True), "rows.shapes_tiny.train: 'steps' is missing"),
        (
            changed("rows", "shapes_tiny", "train", "steps", value="many"),
            "rows.shapes_tiny.train.steps is 'many'; expected int",
        ),
        (
            changed("rows", "shapes_tiny", "train", "steps", value=0),
            "rows.shapes_tiny.train.steps is 0; it must be at least 1",
        ),
        (
            changed("rows", "shapes_tiny", "train", "optimizer", "lr", value="1e-3"),
            "optimizer.lr is '1e-3'; expected float; YAML reads 1e-4 as text, write 1.0e-4",
        ),
        (
            changed("rows", "shapes_tiny", "train", "augmentation", "crop", value=[100, 128]),
            "crop is [100, 128]; both sides must be multiples of 32",
        ),
        (
            changed("rows", "shapes_tiny", "train", "augmentation", "crop", value=[128]),
            "augmentation.crop has 1 entries; expected 2",
        ),
        (
            changed("rows", "shapes_tiny", "model", "num_classes", value=8),
            "num_classes is 8, but dataset shapes names 9 classes",
        ),
        (
            changed("rows", "shapes_tiny", "seeds", value=[1, 1]),
            "rows.shapes_tiny.seeds is [1, 1]; it must list at least one seed, none twice",
        ),
        (
            changed("datasets", "shapes", "layout", value="shapez"),
            "datasets.shapes.layout is 'shapez'; did you mean 'shapes'?",
        ),
        (changed("rows", "shapes_tiny", value=3), "rows.shapes_tiny is 3; expected the keys name, dataset"),
        ([], "expected the sections datasets, rows, weights, checkpoints, found list"),
    ],
)
def test_a_wrong_entry_is_one_sentence_that_names_it_and_the_remedy(tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^params.yaml") as caught:
        parse_params(tree)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_row_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="no row is called 'shapes_tony'; did you mean 'shapes_tiny'"):
        load_params(PROJECT / "params.yaml").row("shapes_tony")


def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.yaml does not exist; run from the project's folder"):
        load_params(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("rows: [")
    with pytest.raises(ValueError, match="broken.yaml is not YAML: while parsing"):
        load_params(tmp_path / "broken.yaml")


def test_rows_hold_the_published_recipe_and_figures() -> None:
    from tests.shared import shared

    reference = json.loads(shared("reference/rows.json").read_text())
    params, common = load_params(PROJECT / "params.yaml"), reference["common"]
    compared = [name for name in params.rows if name in reference["rows"]]
    assert set(compared) == set(reference["rows"])
    for name in compared:
        row, theirs = params.rows[name], reference["rows"][name]
        augmentation, optimizer = row.train.augmentation, row.train.optimizer
        assert row.dataset == theirs["dataset"]
        assert row.model.num_classes == theirs["num_classes"]
        assert list(augmentation.crop) == theirs["crop_hw"]
        assert list(augmentation.short_sides) == theirs["short_side_choices"]
        assert augmentation.long_side_max == theirs["long_side_max"]
        assert augmentation.max_label_share == theirs["crop_cat_max_ratio"]
        assert augmentation.flip == theirs["flip_prob"]
        assert augmentation.photometric == theirs["photometric"]
        assert (row.train.group_size, row.train.groups) == (theirs["batch_per_gpu"], theirs["gpus"])
        assert (row.train.steps, row.train.val_interval) == (theirs["max_iters"], theirs["val_interval"])
        assert [row.test.long_side_max, row.test.short_side] == theirs["test_resize"]
        assert row.published == {k: v for k, v in theirs["published"].items() if k != "printed_mem"}
        assert row.model.backbone.drop_path_rate == theirs["backbone"].get("drop_path_rate", 0.0)
        assert row.published_authors["miou"] == theirs["published_authors"]["miou"]
        ours = (
            optimizer.lr,
            optimizer.weight_decay,
            optimizer.eps,
            list(optimizer.betas),
            optimizer.backbone_lr_factor,
        )
        recipe = common["optimizer"]
        assert ours == (*(recipe[k] for k in ("lr", "weight_decay", "eps", "betas")), recipe["backbone_lr_mult"])
        assert optimizer.clip_norm == common["grad_clip"]["max_norm"]
        assert (row.train.schedule.name, row.train.schedule.power) == ("poly", common["lr_schedule"]["power"])
        head, loss, model = common["head"], common["loss"], row.model
        assert model.query_decoder.queries == head["queries"]
        assert model.query_decoder.layers == head["decoder_layers"]
        assert model.query_decoder.feedforward == head["decoder_ffn"]
        assert model.pixel_decoder.channels == head["feat"] == head["out"]
        assert (model.pixel_decoder.layers, model.pixel_decoder.feedforward) == (
            head["encoder_layers"],
            head["encoder_ffn"],
        )
        assert model.pixel_decoder.points == head["encoder_points"]
        assert (model.loss.class_weight, model.loss.mask_weight, model.loss.dice_weight) == (
            loss["cls"],
            loss["mask"],
            loss["dice"],
        )
        assert (model.loss.points, model.loss.oversample, model.loss.importance) == (
            loss["points"],
            loss["oversample"],
            loss["importance"],
        )
        assert model.loss.no_object_weight == loss["no_object_weight"]
