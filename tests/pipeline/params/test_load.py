"""params.yaml: the rows of the published tables, and what a slip of the pen gets."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.params.load import load_params, parse_params
from pipeline.params.schema import DatasetConfig
from pipeline.provenance.run_key import settings_facts
from tests.helpers.shared import shared

PROJECT = Path(__file__).resolve().parents[3]
TREE = yaml.safe_load((PROJECT / "params.yaml").read_text())


def changed(*path: str, value: Any = None, delete: bool = False) -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    node = tree
    for key in path[:-1]:
        node = node.setdefault(key, {})  # what the row's preset holds is set in the row
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
        (
            changed("rows", "shapes_tiny", "train", "optimizer", "lr", value=float("nan")),
            "rows.shapes_tiny.train.optimizer.lr is nan; expected a finite number",
        ),
        (
            changed("rows", "shapes_tiny", "test", "window", value={"size": 512, "overlap": 257}),
            "rows.shapes_tiny.test.window has windows of 512 pixels that overlap by 257; give 0 to 256",
        ),
        (
            changed("rows", "shapes_tiny", "test", "window", value={"size": 512, "stride": 256}),
            "rows.shapes_tiny.test.window has the keys size, stride; give size and overlap",
        ),
        (
            changed("rows", "shapes_tiny", "test", "window", value={"size": 16, "overlap": 0}),
            "rows.shapes_tiny.test.window has windows of 16 pixels; they must have 32 or more",
        ),
        (
            changed("rows", "cityscapes_r50", "test", "window", value={"size": 512, "overlap": 128}),
            "rows.cityscapes_r50.test has both window and ms_flip, which shows every image whole; take one out",
        ),
        (
            changed("rows", "shapes_tiny", "max_gpu_hours", value=-1),
            "rows.shapes_tiny.max_gpu_hours is -1; it must be above 0",
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
            changed("rows", "shapes_tiny", "train", "optimizer", "lr", value=-0.001),
            "rows.shapes_tiny.train.optimizer.lr is -0.001; it must be above 0",
        ),
        (
            changed("rows", "shapes_tiny", "model", "loss", value={"importance": 1.5}),
            "rows.shapes_tiny.model.loss.importance is 1.5; it must be between 0 and 1",
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
            changed("rows", "shapes_tiny", "early_warning", value={"points": 0.0}),
            "rows.shapes_tiny.early_warning.points is 0.0; it must be above 0",
        ),
        (
            changed("rows", "shapes_tiny", "early_warning", value={"after": 25}),
            "rows.shapes_tiny.early_warning.after is 25.0; it must be between 0 and 1",
        ),
        (
            changed("rows", "shapes_tiny", "seeds", value=[1, 1]),
            "rows.shapes_tiny.seeds is [1, 1]; it must list at least one seed, none twice",
        ),
        (
            changed("datasets", "shapes", "layout", value="shapez"),
            "datasets.shapes.layout is 'shapez'; did you mean 'shapes'?",
        ),
        (
            changed("datasets", "coco", "sha256", value=["00"]),
            "datasets.coco.sha256 lists 1 digests for 4 sources; give one each, or none",
        ),
        (
            changed("datasets", "ade20k", "bytes", value=[1, 2]),
            "datasets.ade20k.bytes lists 2 lengths for 1 sources; give one each, or none",
        ),
        (
            changed("datasets", "ade20k", "bytes", value=[-1]),
            "datasets.ade20k.bytes is [-1]; a length is above 0, or 0",
        ),
        (
            changed("datasets", "nuclei", "class_names", value=["a", "b", "a"]),
            "datasets.nuclei.class_names has 'a' more than once; name every class once",
        ),
        (
            changed("datasets", "nuclei", "thing_classes", value=["nucleus", "nucleus"]),
            "datasets.nuclei.thing_classes has 'nucleus' more than once; name every class once",
        ),
        (
            changed("datasets", "nuclei", "annotation_files", value={"instance": "a.json"}),
            "datasets.nuclei.annotation_files: no annotation file is called 'instance'; did you mean 'instances'?",
        ),
        (
            changed("datasets", "nuclei", "annotation_files", value={"instances": "{fold}/a.json"}),
            "datasets.nuclei.annotation_files.instances has {fold}; {folder} and {split} are what it may have",
        ),
        (
            changed("datasets", "nuclei", "annotation_files", value={"instances": "{folder}/{a.json"}),
            "datasets.nuclei.annotation_files.instances has {; {folder} and {split} are what it may have",
        ),
        (
            changed("datasets", "nuclei", "annotation_files", value={"panoptic": ""}),
            "datasets.nuclei.annotation_files.panoptic is empty; name a file in a source, or take it out",
        ),
        (
            changed("datasets", "ade20k", "annotation_files", value={"instances": "a.json"}),
            "datasets.ade20k.annotation_files is for the layout coco; the layout here is folder",
        ),
        (
            changed("datasets", "ade20k", "value_range", value=[255, 0]),
            "datasets.ade20k.value_range is [255.0, 0.0]; it must be two numbers that rise",
        ),
        (
            changed("datasets", "ade20k", "max_pixels", value=0),
            "datasets.ade20k.max_pixels is 0; it must be 1 to 1073741824",
        ),
        (
            changed("datasets", "cityscapes", "login", value="cityscape"),
            "datasets.cityscapes.login is 'cityscape'; did you mean 'cityscapes'?",
        ),
        (
            changed("datasets", "ade20k", "mirrors", value=["data", "https://me:secret@example.org/"]),
            "datasets.ade20k.mirrors[1] holds a user name or password, and params.yaml is for everybody to read",
        ),
        (changed("rows", "shapes_tiny", value=3), "rows.shapes_tiny is 3; expected the keys name, dataset"),
        (
            changed("verdict", "margin_points", value=0),
            "verdict.margin_points is 0.0; it must be above 0 and below 100",
        ),
        (changed("verdict", "coverage", value=90), "verdict.coverage is 90.0; it must be at least 0.5 and below 1"),
        (changed("verdict", "margin", value=1), "verdict: unknown key 'margin'; did you mean 'margin_points'?"),
        (
            changed("rows", "ade20k_swin-s", "published_trainings", value=0),
            "rows.ade20k_swin-s.published_trainings is 0; it must be at least 1",
        ),
        (
            [],
            "expected the sections datasets, rows, weights, checkpoints, presets, recipes, sites, verdict, found list",
        ),
    ],
)
def test_a_wrong_entry_is_one_sentence_that_names_it_and_the_remedy(tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^params.yaml") as caught:
        parse_params(tree)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_unknown_row_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="no row is called 'shapes_tony'; did you mean 'shapes_tiny'"):
        load_params(PROJECT / "params.yaml").row("shapes_tony")


@pytest.mark.parametrize("section", ["datasets", "weights", "presets", "rows", "checkpoints"])
@pytest.mark.parametrize(
    "name",
    [
        "street.v2", "my set", "a@b", "a:b", "a/b", "../../x", "a[0]", "a(b)", "a;b", "a$b", "", "-x", "_x", "1a",
        "größe", "a\n", 101 * "a", 2024, 1.5, True, None,
    ],
)  # fmt: skip
def test_a_name_that_dvc_or_a_file_system_cannot_take_is_one_sentence(section: str, name: Any) -> None:
    tree = small_tree()
    tree[section][name] = {}
    quotes = "" if isinstance(name, str) else ", in quotes if YAML reads it as something else than text"
    sentence = (
        f"params.yaml: {section} has an entry called {name!r}; begin with a letter, and go on with at most 99 letters "
        f"a-z, digits, _ and -{quotes}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        parse_params(tree)


def test_names_of_every_other_form_are_taken() -> None:
    tree = small_tree()
    for name in ("train", "A-b_9", "none-", "first2", 100 * "a"):
        tree["rows"][name] = tree["rows"]["first"]
        tree["presets"][name] = {}
    assert len(parse_params(tree).rows) == 7


@pytest.mark.parametrize(("section", "one", "other"), [("rows", "First", "first"), ("presets", "a_b-c", "A-B_c")])
def test_names_that_a_file_system_or_mlflow_takes_for_one_are_one_sentence(section: str, one: str, other: str) -> None:
    tree = small_tree()
    tree[section] |= {one: {}, other: {}}
    names = [name for name in tree[section] if name in (one, other)]
    with pytest.raises(
        ValueError, match=f"{section} has entries called '{names[0]}' and '{names[1]}', which some file"
    ):
        parse_params(tree)


@pytest.mark.parametrize("section", ["datasets", "weights", "presets", "rows", "checkpoints"])
def test_beside_a_dvc_yaml_every_section_that_it_reads_has_to_be_there(section: str, tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").touch()
    without = {key: value for key, value in small_tree().items() if key != section}
    for tree in (without, {**without, section: None}):
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
        with pytest.raises(ValueError, match=f"has no section '{section}', or an empty one; dvc.yaml reads it: write"):
            load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    "url", ["", "/data/a.pth", "ftp://host/a.pth", "https://", "https://a host/a.pth", "http://[::1"]
)
def test_an_address_that_nothing_can_be_downloaded_from_is_refused(url: str) -> None:
    tree, entry = small_tree(), {"dataset": "mine", "url": "http://127.0.0.1/a.pth"}
    bad = re.escape(f"is {url!r}; it must be an address that begins with https:// or http://")
    with pytest.raises(ValueError, match=f"checkpoints.first.url {bad}"):
        parse_params({**tree, "checkpoints": {"first": {**entry, "url": url}}})
    if url:
        with pytest.raises(ValueError, match=f"checkpoints.first.log_url {bad}"):
            parse_params({**tree, "checkpoints": {"first": {**entry, "log_url": url}}})
        with pytest.raises(ValueError, match=f"weights.w.url {bad}"):
            parse_params({**tree, "weights": {"none": {}, "w": {"url": url}}})


def test_checkpoints_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    tree = small_tree()
    entry = {"dataset": "mine", "url": "http://127.0.0.1/a.pth"}
    whole = parse_params({**tree, "checkpoints": {"first": entry}})
    del tree["checkpoints"]
    for name in ("params.yaml", "other.yaml"):
        (tmp_path / name).write_text(yaml.safe_dump(tree))
    beside = tmp_path / "checkpoints.yaml"
    beside.write_text(yaml.safe_dump({"checkpoints": {"first": entry}}))
    assert load_params(tmp_path / "params.yaml") == whole
    assert load_params(tmp_path / "other.yaml").checkpoints == {}  # a file of another name holds its own
    for content, sentence in (
        ({"checkpoints": {"first": {"rwo": 1}}}, "checkpoints.yaml: checkpoints.first: unknown key 'rwo'"),
        ({"checkpoint": {}}, "checkpoints.yaml holds {'checkpoint': {}}; expected the section checkpoints alone"),
        (None, "checkpoints.yaml holds None; expected the section checkpoints alone"),
    ):
        beside.write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{sentence}")):
            load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**tree, "checkpoints": {"first": entry}}))
    for content in ({"checkpoints": None}, {"checkpoints": {"second": entry}}):
        beside.write_text(yaml.safe_dump(content))
        assert set(load_params(tmp_path / "params.yaml").checkpoints) == {"first", *(content["checkpoints"] or ())}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**tree, "checkpoints": {"first": {"rwo": 1}}}))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/params.yaml: checkpoints.first: unknown key 'rwo'")):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**tree, "checkpoints": {"first": entry}}))
    beside.write_text(yaml.safe_dump({"checkpoints": {"first": entry}}))
    with pytest.raises(ValueError, match="checkpoints.yaml both have checkpoints.first; give one of them another name"):
        load_params(tmp_path / "params.yaml")


def test_where_no_dvc_yaml_is_a_row_needs_what_it_names_alone(tmp_path: Path) -> None:
    tree = {key: value for key, value in small_tree().items() if key not in ("weights", "checkpoints")}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    assert load_params(tmp_path / "params.yaml").rows == parse_params(small_tree()).rows


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"checkpoint": {}}, "params.yaml: unknown key 'checkpoint'; did you mean 'checkpoints'?"),
        ({"checkpoints": []}, r"params.yaml: checkpoints is \[\]; expected a mapping"),
        ({"weights": {"a": {}}}, "params.yaml: weights has no entry 'none', which rows.first names; write none: {}"),
        ({"rows": {"x": {"dataset": "mine", "weights": "none"}}}, "params.yaml: rows.x has no 'preset', which dvc"),
        ({"rows": {"x": {"dataset": "mine", "preset": "small"}}}, "params.yaml: rows.x has no 'weights', which dvc"),
        ({"rows": {"x": {}}}, "params.yaml: rows.x has no 'weights', which dvc.yaml reads; write weights: none"),
        ({"rows": {"x": None}}, "params.yaml: rows.x is None; expected the keys name, dataset, model"),
    ],
)  # fmt: skip
def test_beside_a_dvc_yaml_what_it_reads_of_a_row_has_to_be_there(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**small_tree(), **changes}))
    with pytest.raises(ValueError, match=sentence):
        load_params(tmp_path / "params.yaml")


@pytest.mark.slow
def test_dvc_itself_stops_at_a_dot_in_a_name_and_at_a_missing_section(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  train:\n    foreach: ${rows}\n    do:\n      cmd: 'true'\n      params:\n        - rows.${key}\n"
        "  published:\n    foreach: ${checkpoints}\n    do:\n      cmd: 'true'\n"
    )

    def dvc(*words: str) -> tuple[bool, str]:
        command = [sys.executable, "-m", "dvc", *words]
        answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return answer.returncode == 0, answer.stdout + answer.stderr

    assert dvc("init", "--no-scm")[0]
    for name, changes, said in (
        ("first", {}, None),
        ("street.v2", {}, "'rows.street.v2' are missing"),
        ("first", {"checkpoints": None}, "expected list/dictionary, got NoneType"),
    ):
        tree = {"checkpoints": {}, "rows": {name: {}}, **changes}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
        done, output = dvc("repro", "--force", f"train@{name}")
        assert done == (said is None) and (said or "") in output, (name, changes, output)


def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.yaml does not exist; run from the project's folder"):
        load_params(tmp_path / "nowhere.yaml")
    for text, sentence in (
        (b"rows: [", "is not YAML: while parsing"),
        # of the two, PyYAML would take the last
        (b"rows:\n  first: {}\n  first: {}\n", "is not YAML: lines 2 and 3 give one mapping the key 'first' twice"),
        (b"rows: {a: {task: a, seeds: [1], task: b}}", "is not YAML: lines 1 and 1 give one mapping the key 'task'"),
        ("terms: für alle".encode("latin-1"), r"is not UTF-8 text \(byte 8\); save it as UTF-8"),
        ("terms: für alle".encode("utf-16"), r"is not UTF-8 text \(byte 0\); save it as UTF-8"),
        (b"rows:\n  first: 2026-02-30", r"is not YAML: line 2 holds '2026-02-30', which looks like a date or a number"),
        (b"rows: !!int x", "is not YAML: line 1 holds 'x', which looks like a date or a number and is none; correct"),
        (b"rows: !!bool x", "is not YAML: line 1 holds 'x'"),
        (b"rows: !!set x", "is not YAML: expected a mapping node"),
        (b"", "expected the sections datasets, rows, weights, .*, found NoneType"),
        (b"- rows", "expected the sections datasets, rows, weights, .*, found list"),
    ):  # fmt: skip
        (tmp_path / "broken.yaml").write_bytes(text)
        with pytest.raises(ValueError, match=f"broken.yaml:? ?{sentence}"):
            load_params(tmp_path / "broken.yaml")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(small_tree()), encoding="utf-8-sig")
    assert load_params(tmp_path / "params.yaml") == parse_params(small_tree())


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (
            ("train", "augmentation", "jitter"),
            [0.1, 2.0],
            "rows.shapes_tiny.train.augmentation must have either short_sides or jitter",
        ),
        (
            ("train", "augmentation", "short_sides"),
            [],
            "rows.shapes_tiny.train.augmentation must have either short_sides or jitter",
        ),
        (
            ("train", "augmentation", "long_side_max"),
            191,
            "train.augmentation.long_side_max is 191; it must be at least the largest of short_sides, 192",
        ),
        (
            ("train", "augmentation"),
            {"crop": [128, 128], "jitter": [2.0, 0.1]},
            "rows.shapes_tiny.train.augmentation.jitter is [2.0, 0.1]; it must rise from above 0",
        ),
        (
            ("train", "augmentation"),
            {"crop": [128, 128], "jitter": [0, 2]},
            "rows.shapes_tiny.train.augmentation.jitter is [0.0, 2.0]; it must rise from above 0",
        ),
        (
            ("train", "augmentation"),
            {"crop": [128, 128], "jitter": [0.1, 1.0, 2.0]},
            "augmentation.jitter has 3 entries; expected 2",
        ),
        (
            ("train", "schedule"),
            {"name": "multistep"},
            "train.schedule.milestones is []; they must rise, and only the schedule multistep has them",
        ),
        (
            ("train", "schedule"),
            {"name": "multistep", "milestones": [900, 800]},
            "train.schedule.milestones is [900, 800]; they must rise",
        ),
        (
            ("train", "schedule"),
            {"name": "poly", "milestones": [800]},
            "train.schedule.milestones is [800]; they must rise, and only the schedule multistep has them",
        ),
        (("train", "schedule"), {"name": "step"}, "train.schedule.name is 'step'; did you mean 'multistep'?"),
        (("test", "pad_multiple"), 16, "rows.shapes_tiny.test.pad_multiple is 16; it must be 1 or a multiple of 32"),
        (("test", "pad_multiple"), 0, "rows.shapes_tiny.test.pad_multiple is 0; it must be 1 or a multiple of 32"),
        (
            ("test", "ms_flip"),
            {"short_sides": [128], "long_side_max": 384},
            "rows.shapes_tiny.test.ms_flip averages semantic scores, but the row's task is panoptic",
        ),
        (
            ("test", "ms_flip"),
            {"short_sides": [128]},
            "rows.shapes_tiny.test.ms_flip: 'long_side_max' is missing",
        ),
        (("task",), "panoptical", "rows.shapes_tiny.task is 'panoptical'; did you mean 'panoptic'?"),
        (("train", "tf32"), True, "rows.shapes_tiny.train.tf32 is True; known: all, convolutions, off"),
        (("train", "precision"), False, "train.precision is False; known: bf16, float32, fp16"),
        (
            ("train", "precision"),
            "bfloat16",
            "train.precision is 'bfloat16'; did you mean 'float32'? (known: bf16, float32, fp16)",
        ),
        (("train", "images"), "things", "train.images is 'things'; did you mean 'with_things'?"),
        (("checkpoint_rule",), "first", "rows.shapes_tiny.checkpoint_rule is 'first'; known: best, last, unknown"),
    ],
)
def test_settings_that_contradict_one_another_are_one_sentence(keys: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^params.yaml") as caught:
        parse_params(changed("rows", "shapes_tiny", *keys, value=value))
    assert message in str(caught.value)


def test_a_bare_off_which_yaml_reads_as_false_is_off() -> None:
    params = parse_params(changed("rows", "shapes_tiny", "train", "tf32", value=yaml.safe_load("off")))
    assert params.rows["shapes_tiny"].train.tf32 == "off"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("test", "short_side"), 0, r"rows.shapes_tiny.test.short_side is 0; it must be at least 1"),
        (("test", "long_side_max"), -5, r"test.long_side_max is -5; it must be at least 1"),
        (("test", "max_instances"), 0, r"test.max_instances is 0; it must be at least 1"),
        (("test", "score_threshold"), 80.0, r"test.score_threshold is 80.0; it must be between 0 and 1"),
        (("train", "augmentation", "short_sides"), [0, 64], r"augmentation.short_sides is \[0, 64\]; it must be at"),
        (("train", "augmentation", "flip"), 1.5, r"augmentation.flip is 1.5; it must be between 0 and 1"),
        (("model", "query_decoder", "queries"), 0, r"model.query_decoder.queries is 0; it must be at least 1"),
        (("model", "query_decoder", "layers"), -1, r"model.query_decoder.layers is -1; it must be 0 or more"),
        (("model", "pixel_decoder", "heads"), 3, r"heads is 3; model.pixel_decoder.channels \(64\) must be a multiple"),
        (
            ("model", "pixel_decoder"),
            {"name": "fapn", "channels": 64, "layers": 3},
            r"pixel_decoder.layers is 3, but the pixel decoder fapn has no layers; leave it out",
        ),
    ],
)
def test_a_number_that_cannot_be_what_it_stands_for_is_one_sentence(
    keys: tuple[str, ...], value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_params(changed("rows", "shapes_tiny", *keys, value=value))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("published", "miuo"), 47.9, "published: no published figure is called 'miuo'; did you mean 'miou'?"),
        (("published", "miou"), "47.9", "published.miou is '47.9'; expected a number of percent, 0 to 100; leave out"),
        (("published", "miou"), None, "published.miou is None; expected a number of percent, 0 to 100; leave out what"),
        (("published", "miou"), float("nan"), "published.miou is nan; expected a number of percent"),
        (("published_authors", "pq"), 479, "published_authors.pq is 479; expected a number of percent, 0 to 100"),
        (("published", "inf_fps"), "9", "published.inf_fps is '9'; expected a number, 0 or more"),
        (("published", "device"), 100, "published.device is 100; expected text"),
    ],
)  # fmt: skip
def test_a_published_figure_has_a_known_name_and_is_a_number(keys: tuple[str, str], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^params.yaml: rows.shapes_tiny.published") as caught:
        parse_params(changed("rows", "shapes_tiny", keys[0], value={keys[1]: value}))
    assert message in str(caught.value)


def test_a_published_figure_may_be_100_or_0_and_have_a_speed_and_its_device() -> None:
    published = {"pq": 100, "ap": 0.0, "inf_fps": 120.5, "device": "A100"}
    assert parse_params(changed("rows", "shapes_tiny", "published", value=published)).row("shapes_tiny").published


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": {}}, ".splits is empty; name the folders, such as train: training, or take it out"),
        ({"splits": {"../x": "training"}}, ".splits has a split called '../x'; begin with a letter, and go on with"),
        ({"splits": {"": "training"}}, ".splits has a split called ''; begin with a letter"),
        ({"splits": {"train": "training/"}}, ".splits.train is 'training/'; give the folder without / at its ends"),
        ({"splits": {"train": "../training"}}, ".splits.train is '../training'; give the folder without"),
        ({"splits": {"train": ""}}, ".splits.train is ''; give the folder without"),
        ({"sources": ["data/a.zip", ""]}, ".sources[1] is empty; name an archive, a folder or a URL"),
        ({"sources": ["http://[::1/a.zip"]}, ".sources[0] is 'http://[::1/a.zip', which is no URL (Invalid IPv6 URL)"),
        ({"value_range": [-1.0e308, 1.0e308]}, ".value_range is [-1e+308, 1e+308]; it must be two numbers that rise"),
        ({"shard_mib": 0}, ".shard_mib is 0; it must be at least 1"),
    ],
)
def test_a_datasets_files_and_values_are_checked_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^params.yaml: datasets.mine") as caught:
        parse_params({"datasets": {"mine": {"layout": "folder", **settings}}, "rows": {}})
    assert message in str(caught.value)


def test_the_views_of_ms_flip_have_sides() -> None:
    for short_sides, message in (
        ([], "short_sides is empty; list at least one"),
        ([0], r"\[0\]; it must be at least 1"),
    ):
        views = {"short_sides": short_sides, "long_side_max": 64}
        with pytest.raises(ValueError, match=message):
            parse_params(changed("rows", "camvid_tiny", "test", "ms_flip", value=views))


def test_an_instance_row_needs_a_dataset_with_things() -> None:
    message = r"rows.shapes_tiny has no class to train on; the task instance needs `thing_classes` in dataset shapes$"
    with pytest.raises(ValueError, match=message):
        parse_params(
            {
                **changed("rows", "shapes_tiny", "task", value="instance"),
                "datasets": {**TREE["datasets"], "shapes": {**TREE["datasets"]["shapes"], "thing_classes": []}},
            }
        )


RED, BLUE = [200, 0, 0], [0, 0, 200]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ignore_label": "none"}, ".ignore_label is 'none'; expected int"),
        ({"ignore_label": [0, "x"]}, ".ignore_label[1] is 'x'; expected int"),
        ({"ignore_label": True}, ".ignore_label is True; expected int"),
        ({"thing_classes": ["a", "bus"]}, ".thing_classes has 'bus', which is not among class_names"),
        ({"label_suffix": "_mask.png"}, ".label_suffix is '_mask.png'; give it without folder and without .png"),
        ({"label_suffix": "masks/x"}, ".label_suffix is 'masks/x'; give it without folder"),
        ({"palette": {"a": RED}}, ".palette has no colour for 'b'; every class of class_names needs one"),
        ({"palette": {"a": RED, "b": []}}, ".palette.b[0] has 0 entries; expected 3"),
        ({"palette": {"a": RED, "b": BLUE, "c": [1, 1, 1]}}, ".palette names 'c', which is not among class_names"),
        ({"palette": {"a": RED, "b": RED}}, ".palette gives [200, 0, 0] to both 'a' and 'b'"),
        ({"palette": {"a": [BLUE, RED], "b": [1, 1, 1], "ignore": RED}}, "gives [200, 0, 0] to both 'a' and 'ignore'"),
        ({"palette": {"a": RED, "b": [0, 0, 256]}}, ".palette.b holds [0, 0, 256]; red, green and blue are 0 to 255"),
        ({"palette": {"a": RED, "b": [0, 0]}}, ".palette.b[0] has 2 entries; expected 3"),
        ({"palette": {"a": RED, "b": "blue"}}, ".palette.b is 'blue'; expected a list"),
        ({"palette": {"a": RED, "b": BLUE}, "label_offset": -1}, " has a palette, so its labels have no ids; take out"),
        ({"palette": {"a": RED, "b": BLUE}, "ignore_label": 0}, " has a palette, so its labels have no ids; take out"),
        (
            {"class_names": [f"c{index}" for index in range(256)]},
            ".ignore_label is 255, which is the class 'c255'; of more than 255 classes, set it to a label that is no",
        ),
        ({"layout": "coco", "label_offset": -1}, ".label_offset is for the layouts folder and voc; take it out"),
        ({"layout": "cityscapes", "palette": {"a": RED, "b": BLUE}}, ".palette is for the layouts folder and voc"),
    ],
)
def test_what_label_maps_mean_is_checked_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    data = {"layout": "folder", "class_names": ["a", "b"], **settings}
    with pytest.raises(ValueError, match=r"^params.yaml: datasets.mine") as caught:
        parse_params({"datasets": {"mine": data}, "rows": {}})
    assert message in str(caught.value)


def test_label_maps_may_have_several_ignored_ids_colours_and_many_classes() -> None:
    def parsed(**settings: Any) -> DatasetConfig:
        data = {"layout": "folder", "class_names": ["a", "b"], **settings}
        return parse_params({"datasets": {"mine": data}, "rows": {}}).dataset("mine")

    assert (parsed().ignore_labels, parsed(ignore_label=0).ignore_labels) == ((255,), (0,))
    assert parsed(ignore_label=[0, 255]).ignore_labels == (0, 255)
    palette = parsed(palette={"a": RED, "b": [BLUE, [1, 1, 1]], "ignore": [0, 0, 0]}).palette
    assert palette == {"a": ((200, 0, 0),), "b": ((0, 0, 200), (1, 1, 1)), "ignore": ((0, 0, 0),)}
    many = [f"c{index}" for index in range(300)]
    assert [parsed(class_names=many, ignore_label=value).ignore_labels for value in (65535, [])] == [(65535,), ()]


def test_settings_of_label_maps_that_are_not_used_are_in_no_key() -> None:
    camvid = parse_params(TREE).dataset("camvid")
    facts = settings_facts(camvid)
    assert {"ignore_label": 11, "label_offset": 0}.items() <= facts.items()
    assert not facts.keys() & {"label_suffix", "palette"}
    assert settings_facts(replace(camvid, label_suffix="_mask"))["label_suffix"] == "_mask"


def test_num_classes_follows_from_dataset_and_task_and_may_be_given() -> None:
    panoptic = parse_params(changed("rows", "shapes_tiny", "task", value="panoptic"))
    instance = parse_params(changed("rows", "shapes_tiny", "task", value="instance"))
    assert panoptic.rows["shapes_tiny"].model.num_classes == 9
    assert instance.rows["shapes_tiny"].model.num_classes == 3  # car, person, sign
    assert parse_params(changed("rows", "shapes_tiny", "model", "num_classes", value=9)) == panoptic
    tree = changed("rows", "shapes_tiny", "model", "num_classes", value=9)
    tree["rows"]["shapes_tiny"]["task"] = "instance"
    with pytest.raises(ValueError, match="num_classes is 9, but dataset shapes names 3 thing classes"):
        parse_params(tree)


def small_tree(**row: Any) -> dict[str, Any]:
    """Two rows on one preset; `row`: what the first adds."""
    preset = {
        "model": {"backbone": {"name": "tiny", "frozen_norm": False}},
        "train": {
            "steps": 100,
            "augmentation": {"crop": [64, 64], "short_sides": [64, 96], "long_side_max": 128},
            "optimizer": {"lr": 0.5, "eps": 0.25},
        },
        "test": {"short_side": 64, "long_side_max": 128},
        "seeds": [3, 4],
    }
    data = {"layout": "shapes", "class_names": ["a", "b"], "generate": {"train": 1, "val": 1}}
    named = {"dataset": "mine", "preset": "small", "weights": "none"}
    return {
        "datasets": {"mine": data},
        "weights": {"none": {}},
        "presets": {"none": {}, "small": preset},
        "rows": {"first": {**named, **row}, "second": named},
        "checkpoints": {},
    }


def test_a_rows_own_settings_come_before_those_of_its_preset_and_lists_are_one_setting() -> None:
    train = {"optimizer": {"lr": 0.125}, "augmentation": {"short_sides": [80]}}
    rows = parse_params(small_tree(train=train, seeds=[7])).rows
    first, second = rows["first"], rows["second"]
    assert (first.train.optimizer.lr, first.train.optimizer.eps) == (0.125, 0.25)
    assert (first.train.augmentation.short_sides, first.train.augmentation.crop) == ((80,), (64, 64))
    assert first.seeds == (7,) and first.train.steps == 100
    assert (second.train.optimizer.lr, second.train.augmentation.short_sides, second.seeds) == (0.5, (64, 96), (3, 4))


def test_a_recipe_comes_between_a_row_and_its_preset() -> None:
    tree = small_tree(recipe="other", train={"optimizer": {"lr": 0.125}})
    optimizer = {"lr": 0.0625, "eps": 0.5}
    tree["recipes"] = {"other": {"train": {"optimizer": optimizer}, "figures": "published_authors", "seeds": [9]}}
    first, second = (parse_params(tree).rows[name] for name in ("first", "second"))
    assert (first.train.optimizer.lr, first.train.optimizer.eps, first.train.steps) == (0.125, 0.5, 100)
    assert (first.seeds, first.figures) == ((9,), "published_authors")
    assert (second.train.optimizer.eps, second.seeds, second.figures) == (0.25, (3, 4), "published")
    for recipe, sentence in (
        ("othr", "rows.first: no recipe is called 'othr'; did you mean 'other'?"),
        (1, "rows.first.recipe is 1; expected the name of a recipe, or none"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            parse_params({**tree, "rows": {"first": {**tree["rows"]["second"], "recipe": recipe}}})
    with pytest.raises(ValueError, match=r"recipes.other holds 'preset', which each row says for itself"):
        parse_params({**tree, "recipes": {"other": {"preset": "small"}}})


def test_a_setting_of_one_row_leaves_every_other_row_as_it_was() -> None:
    before = parse_params(copy.deepcopy(TREE)).rows
    for name, row in before.items():
        after = parse_params(changed("rows", name, "train", "optimizer", "lr", value=0.015625)).rows
        assert after[name].train.optimizer.lr == 0.015625 and after[name] != row
        assert {other: after[other] for other in after if other != name} == {
            other: before[other] for other in before if other != name
        }


def test_without_a_preset_a_row_says_all_itself() -> None:
    tree = small_tree()
    written_out = {**tree["presets"]["small"], "dataset": "mine", "weights": "none"}
    for row in (written_out, {**written_out, "preset": "none"}):
        rows = parse_params({**tree, "rows": {"first": row, "second": tree["rows"]["second"]}}).rows
        assert rows["first"] == replace(rows["second"], name="first")


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        (("rows", "first", "preset"), "smal", "rows.first: no preset is called 'smal'; did you mean 'small'?"),
        (("rows", "first", "preset"), ["small"], "rows.first.preset is ['small']; expected the name"),
        (("rows", "first", "dataset"), ["mine"], "rows.first.dataset is ['mine']; expected the name of a dataset"),
        (("presets", "small"), 3, "presets.small is 3; expected a mapping"),
        (("presets", "small", "trian"), {}, "presets.small: unknown key 'trian'; did you mean 'train'?"),
        (("presets", "small", "train", "step"), 1, "presets.small.train: unknown key 'step'; did you mean 'steps'?"),
        (("presets", "small", "train", "steps"), "many", "presets.small.train.steps is 'many'; expected int"),
        (("presets", "small", "train"), [], "presets.small.train is []; expected the keys steps, augmentation"),
        (("presets", "small", "dataset"), "mine", "presets.small holds 'dataset', which each row says for itself"),
        (("rows", "first", "dataset"), ["mine"], "rows.first.dataset is ['mine']; expected the name"),
        (("rows", "first", "dataset"), {}, "rows.first.dataset is {}; expected the name"),
        (("rows", "first", "train"), 5, "rows.first.train is 5; expected the keys steps, augmentation"),
        (("datasets", "mine", "class_names"), "coc", "no list of class names is called 'coc'; did you mean 'coco'?"),
        (("rows",), "all", "params.yaml: rows is 'all'; expected a mapping"),
        (("presets",), {}, "rows.first: no preset is called 'small'; none are defined"),
        (("presets", "none"), {"seeds": [1]}, "presets.none holds seeds; none stands for no preset, so choose"),
        (("weights", "none"), {"url": "x"}, "weights.none is {'url': 'x'}; none stands for random weights, so write"),
        (("weights",), {"w": {"site": "x", "name": "y"}}, "weights.w: no site is called 'x'; none are defined"),
        (("weights",), {"w": {"site": 3, "name": "y"}}, "weights.w.site is 3; expected text, in quotes"),
    ],
)  # fmt: skip
def test_a_wrong_preset_site_or_list_is_one_sentence(section: tuple[str, ...], value: Any, message: str) -> None:
    tree = small_tree()
    node: Any = tree
    for key in section[:-1]:
        node = node[key]
    node[section[-1]] = value
    with pytest.raises(ValueError, match=r"^params.yaml") as caught:
        parse_params(tree)
    assert message in str(caught.value)


def test_a_sites_address_is_filled_with_an_entrys_name_and_stamp() -> None:
    sites = {
        "here": {"url": "http://127.0.0.1/{name}/{name}_{stamp}.pth", "log_url": "http://127.0.0.1/{date}.json"},
        "plain": {"url": "http://127.0.0.1/{name}.pth", "sha256_prefix": "{digest}", "layout": "swin", "terms": "a"},
    }  # fmt: skip
    tree = {**small_tree(), "sites": sites}
    tree["checkpoints"] = {"first": {"dataset": "mine", "site": "here", "name": "net-a", "stamp": "2022_1-ab12"}}
    tree["weights"]["w"] = {"site": "plain", "name": "net-b-ab12", "terms": "ours"}
    params = parse_params(tree)
    assert params.checkpoints["first"].url == "http://127.0.0.1/net-a/net-a_2022_1-ab12.pth"
    assert params.checkpoints["first"].log_url == "http://127.0.0.1/2022_1.json"
    assert params.weights["w"].url == "http://127.0.0.1/net-b-ab12.pth"
    assert (params.weights["w"].sha256_prefix, params.weights["w"].layout) == ("ab12", "swin")
    assert params.weights["w"].terms == "ours"  # an entry's own comes first
    sites["here"]["log_url"] = "http://127.0.0.1/{log}_{date}.json"
    first = tree["checkpoints"]["first"]
    for own, log_url in (({"log": "old"}, "http://127.0.0.1/old_2022_1.json"), ({"log_url": ""}, "")):
        with_log = parse_params({**tree, "checkpoints": {"first": {**first, **own}}})
        assert with_log.checkpoints["first"].log_url == log_url  # what the entry gives itself is not made
    del tree["checkpoints"]["first"]["stamp"]
    with pytest.raises(ValueError, match=r"checkpoints.first: its site's url is .*, and the entry has no 'stamp'$"):
        parse_params(tree)
    for text, lacking in (("{stmp}", "stmp"), ("{name.real}", "name.real"), ("{}", ""), ("{name:9}", "name:9")):
        sites["plain"]["url"] = text
        with pytest.raises(ValueError, match=rf"weights.w: its site's url is '.*', and the entry has no '{lacking}'$"):
            parse_params(tree)


@pytest.mark.parametrize("url", ["{name.x}", "{name[a]}", "{0}", "{", "{name:d}"])
def test_a_sites_address_that_cannot_be_filled_is_one_sentence(url: str) -> None:
    tree = {**small_tree(), "sites": {"here": {"url": url}}, "weights": {"w": {"site": "here", "name": "net"}}}
    with pytest.raises(ValueError, match=r"^params.yaml: weights.w: its site's url is '.*', and the entry has no "):
        parse_params(tree)


def test_a_row_may_pad_to_nothing_or_to_a_multiple_of_32_and_keep_its_milestones() -> None:
    for multiple in (1, 32, 64):
        tree = changed("rows", "shapes_tiny", "test", "pad_multiple", value=multiple)
        assert parse_params(tree).rows["shapes_tiny"].test.pad_multiple == multiple
    tree = changed("rows", "shapes_tiny", "train", "schedule", value={"name": "multistep", "milestones": [600, 900]})
    assert parse_params(tree).rows["shapes_tiny"].train.schedule.milestones == (600, 900)


# The rows of the tables

SEMANTIC = json.loads((PROJECT / "tests/reference/rows.json").read_text())
COCO = json.loads((PROJECT / "tests/reference/rows_coco.json").read_text())
AUTHORS = json.loads((PROJECT / "tests/reference/rows_authors.json").read_text())
PUBLISHED_ROWS = {**SEMANTIC["rows"], **COCO["rows"]}
PARAMS = load_params(PROJECT / "params.yaml")


def test_the_27_rows_of_the_tables_are_there_and_all_others_are_ours_or_the_authors() -> None:
    assert len(PUBLISHED_ROWS) == 27
    assert set(PUBLISHED_ROWS) <= set(PARAMS.rows)
    others = {name: row for name, row in PARAMS.rows.items() if name not in PUBLISHED_ROWS}
    ours = {name for name, row in others.items() if not row.published_authors}
    assert ours == {"shapes_tiny", "camvid_tiny", "nuclei_tiny"}
    assert not any(row.published for row in others.values())  # the authors' alone
    assert {*AUTHORS["rows"]} < {*others}


def test_every_published_training_has_its_log() -> None:
    checkpoints = {name: PARAMS.checkpoints[name] for name in PUBLISHED_ROWS if name in PARAMS.checkpoints}
    assert len(checkpoints) == 24 and len({checkpoint.log_url for checkpoint in checkpoints.values()}) == 24
    for name, checkpoint in checkpoints.items():
        assert checkpoint.log_url.endswith(".json"), name
        # the same training: its date is in both names
        date = re.search(r"_(\d{8}_\d{6})-", checkpoint.url)
        assert date and f"_{date[1]}." in checkpoint.log_url, name


@pytest.mark.parametrize("name", PUBLISHED_ROWS)
def test_a_row_has_the_published_optimiser_head_and_loss(name: str) -> None:
    row, common = PARAMS.rows[name], SEMANTIC["common"]
    optimizer, recipe = row.train.optimizer, common["optimizer"]
    assert (optimizer.lr, optimizer.weight_decay, optimizer.eps) == tuple(
        recipe[key] for key in ("lr", "weight_decay", "eps")
    )
    assert list(optimizer.betas) == recipe["betas"]
    assert optimizer.backbone_lr_factor == recipe["backbone_lr_mult"]
    assert optimizer.clip_norm == common["grad_clip"]["max_norm"]
    assert row.train.precision == common["precision"]
    assert row.train.schedule.warmup_steps == 0

    head, query, pixel = common["head"], row.model.query_decoder, row.model.pixel_decoder
    assert (query.layers, query.heads, query.feedforward) == (
        head["decoder_layers"],
        head["heads"],
        head["decoder_ffn"],
    )
    assert pixel.channels == head["feat"] == head["out"]
    assert (pixel.layers, pixel.heads, pixel.points, pixel.feedforward) == (
        head["encoder_layers"],
        head["heads"],
        head["encoder_points"],
        head["encoder_ffn"],
    )
    loss, theirs = row.model.loss, common["loss"]
    assert (loss.class_weight, loss.mask_weight, loss.dice_weight, loss.no_object_weight) == (
        theirs["cls"],
        theirs["mask"],
        theirs["dice"],
        theirs["no_object_weight"],
    )
    assert theirs["matcher"] == {key: theirs[key] for key in ("cls", "mask", "dice")}  # one set of weights for both
    assert (loss.points, loss.oversample, loss.importance) == (
        theirs["points"],
        theirs["oversample"],
        theirs["importance"],
    )


SWIN = {(96, 6): "swin-t", (96, 18): "swin-s", (128, 18): "swin-b", (192, 18): "swin-l"}
"""By width and depth of the third level."""


@pytest.mark.parametrize("name", AUTHORS["rows"])
def test_a_row_that_the_authors_alone_have_is_theirs(name: str) -> None:
    row, theirs = PARAMS.rows[name], {**AUTHORS["common"], **AUTHORS["rows"][name]}
    model, train, augmentation, test = row.model, row.train, row.train.augmentation, row.test
    assert (row.task, model.num_classes, model.query_decoder.queries) == (
        theirs["task"], theirs["num_classes"], theirs["queries"],
    )  # fmt: skip
    assert row.published_authors == theirs["published"] == row.reference and not row.published
    assert PARAMS.checkpoints[name].url == theirs["checkpoint_url"]
    assert (train.steps, train.global_batch) == (theirs["max_iter"], theirs["images_per_batch"])
    assert (train.precision == "fp16") == theirs["amp"]
    assert (train.optimizer.lr, train.optimizer.weight_decay) == (theirs["lr"], theirs["weight_decay"])
    assert train.optimizer.backbone_lr_factor == theirs["backbone_multiplier"]
    assert ["full_model", train.optimizer.clip_norm] == theirs["clip"]
    assert (theirs["schedule"], theirs["warmup_iters"]) == ("WarmupPolyLR", train.schedule.warmup_steps)
    assert (train.schedule.name, train.schedule.power) == ("poly", 0.9)
    assert (train.images == "with_things") == (theirs["filter_empty"] and row.task == "instance")

    assert list(augmentation.short_sides) == theirs["min_size_train"]
    assert augmentation.long_side_max == theirs["max_size_train"]
    assert list(augmentation.crop) == theirs["crop"] and augmentation.jitter is None
    assert augmentation.max_label_share == theirs["single_category_max_area"]
    assert augmentation.photometric == theirs["color_aug_ssd"]
    assert augmentation.rules == "detectron2"
    assert (test.short_side, test.long_side_max) == (theirs["min_size_test"], theirs["max_size_test"])
    assert test.pad_multiple == theirs["test_size_divisibility"]
    if row.task == "panoptic":
        assert test.overlap_threshold == theirs["overlap_threshold"]
        assert test.score_threshold == theirs["object_mask_threshold"]
    assert (test.ap_rule == "cityscapes") == (row.dataset == "cityscapes_objects")

    backbone, loss, head = theirs["backbone"], model.loss, theirs["mask_former"]
    if "depth" in backbone:
        assert model.backbone.name == f"r{backbone['depth']}"
        assert (model.backbone.batch_statistics, model.backbone.frozen_norm) == {
            "SyncBN": (True, False), "FrozenBN": (False, True),
        }[backbone["norm"]]  # fmt: skip
        assert row.weights == f"torchvision_{model.backbone.name}"
        assert theirs["weights"].endswith(f"R-{backbone['depth']}.pkl")  # torchvision's, by their tools/README.md
    else:
        assert model.backbone.name == SWIN[backbone["embed_dim"], backbone["depths"][2]]
        assert model.backbone.drop_path_rate == backbone["drop_path_rate"]
        site = PARAMS.weights[row.weights].url.rpartition("/swin_")[2].removesuffix(".pth")
        assert theirs["weights"] == f"swin_{site}.pkl"
    assert (loss.no_object_weight, loss.class_weight, loss.mask_weight, loss.dice_weight) == tuple(
        head[f"{key}_weight"] for key in ("no_object", "class", "mask", "dice")
    )
    assert (loss.points, loss.oversample, loss.importance) == (
        head["train_num_points"], head["oversample_ratio"], head["importance_sample_ratio"],
    )  # fmt: skip
    assert model.query_decoder.layers == head["dec_layers"] - 1  # theirs counts the raw queries


@pytest.mark.parametrize("name", SEMANTIC["rows"])
def test_a_semantic_row_is_the_published_one(name: str) -> None:
    row, theirs, common = PARAMS.rows[name], SEMANTIC["rows"][name], SEMANTIC["common"]
    train, augmentation = row.train, row.train.augmentation
    assert (row.task, row.dataset, row.model.num_classes) == ("semantic", theirs["dataset"], theirs["num_classes"])
    assert row.model.query_decoder.queries == common["head"]["queries"]
    assert (train.steps, train.val_interval) == (theirs["max_iters"], theirs["val_interval"])
    assert (train.groups, train.group_size) == (theirs["gpus"], theirs["batch_per_gpu"])
    assert train.images == "all"
    assert (train.schedule.name, train.schedule.power) == ("poly", common["lr_schedule"]["power"])
    assert train.schedule.milestones == ()

    assert list(augmentation.crop) == theirs["crop_hw"]
    assert list(augmentation.short_sides) == theirs["short_side_choices"]
    assert augmentation.long_side_max == theirs["long_side_max"]
    assert augmentation.jitter is None
    assert augmentation.max_label_share == theirs["crop_cat_max_ratio"]
    assert augmentation.flip == theirs["flip_prob"]
    assert augmentation.photometric == theirs["photometric"]

    backbone = theirs["backbone"]
    swin = {(96, 6): "swin-t", (96, 18): "swin-s", (128, 18): "swin-b", (192, 18): "swin-l"}
    expected = f"r{backbone['depth']}" if backbone["type"] == "resnet" else swin[
        backbone["embed_dim"], backbone["depths"][2]
    ]  # fmt: skip
    assert row.model.backbone.name == expected
    assert row.model.backbone.drop_path_rate == backbone.get("drop_path_rate", 0.0)
    assert row.model.backbone.frozen_norm and row.model.backbone.batch_statistics
    url = PARAMS.weights[row.weights].url
    assert url == theirs["pretrained"] or torchvision(url) == theirs.get("pretrained_torchvision")

    assert [row.test.long_side_max, row.test.short_side] == theirs["test_resize"]
    # A row without an entry of its own pads as all do; null is no padding.
    multiple = theirs.get("test_pad_multiple", common["input"]["test_pad_multiple"])
    assert row.test.pad_multiple == (multiple or 1)
    views = row.dataset if row.dataset == "cityscapes" else f"ade20k {row.test.short_side}"
    assert row.test.ms_flip is not None
    assert list(row.test.ms_flip.short_sides) == common["tta"]["authors_short_sides"][views]
    assert row.test.ms_flip.long_side_max == common["tta"]["authors_long_side_max"][views]
    # The reference's ratios of the test size give the same short sides.
    ratios = [ratio * row.test.short_side for ratio in common["tta"]["reference_ratios"]]
    assert list(row.test.ms_flip.short_sides) == ratios

    assert row.checkpoint_rule == "unknown"
    assert row.seeds == (0, 1, 2, 3, 4)
    published = {key: value for key, value in theirs["published"].items() if key != "printed_mem"}
    if misprint := theirs["published"].get("printed_mem"):
        published["train_mem_gb_as_printed"] = float(misprint.split()[0])
    assert row.published == published
    protocol = theirs["published"].get("protocol")
    assert row.published_trainings == {"median of 5 trainings": 5, None: 1}[protocol]
    assert row.published_authors == {k: v for k, v in theirs["published_authors"].items() if k != "note"}
    checkpoint = PARAMS.checkpoints[name]
    assert (checkpoint.url, checkpoint.log_url) == (theirs["checkpoint_url"], theirs["log_url"])
    assert checkpoint.dataset == row.dataset


@pytest.mark.parametrize("name", COCO["rows"])
def test_a_coco_row_is_the_published_one(name: str) -> None:
    row, theirs, common = PARAMS.rows[name], COCO["rows"][name], COCO["common"]
    train, augmentation = row.train, row.train.augmentation
    assert (row.task, row.dataset) == (theirs["task"], "coco")
    assert row.model.num_classes == theirs["things"] + theirs["stuff"]
    assert row.model.query_decoder.queries == theirs["queries"]
    assert (train.steps, train.val_interval) == (theirs["max_iters"], theirs["val_interval"])
    assert (train.groups, train.group_size) == (theirs["gpus"], theirs["batch_per_gpu"])
    assert train.global_batch == 16
    assert train.images == "with_things"
    assert train.schedule.name == "multistep"
    assert list(train.schedule.milestones) == theirs["lr_milestones"]
    assert train.schedule.gamma == common["lr_gamma"]

    # common["augmentation"]: flip p 0.5, U(0.1, 2.0) of 1024 x 1024, crop and pad to 1024 x 1024, no colours
    assert (augmentation.crop, augmentation.jitter, augmentation.flip) == ((1024, 1024), (0.1, 2.0), 0.5)
    assert "flip p 0.5" in common["augmentation"] and "U(0.1, 2.0) of 1024 x 1024" in common["augmentation"]
    assert (augmentation.short_sides, augmentation.long_side_max) == ((), 0)
    assert (augmentation.photometric, augmentation.max_label_share) == (False, 1.0)

    backbone = row.model.backbone
    assert backbone.name == theirs["backbone"].removesuffix("-in22k")
    assert backbone.frozen_norm
    if backbone.name.startswith("swin"):
        assert backbone.drop_path_rate == common["drop_path_rate"]
    else:
        assert not backbone.batch_statistics and "running statistics" in common["backbone_norm"]
    url = PARAMS.weights[row.weights].url
    assert url == theirs["pretrained"] or f"torchvision {torchvision(url)}" == theirs["pretrained"]

    assert common["test_resize"] == "keep ratio, fit in 1333x800"
    assert (row.test.short_side, row.test.long_side_max) == (800, 1333)
    after = common["postprocess"]
    assert (row.test.score_threshold, row.test.overlap_threshold, row.test.max_instances) == (
        after["score_threshold"],
        after["overlap_threshold"],
        after["max_instances"],
    )
    assert (row.test.pad_multiple, row.test.ms_flip) == (32, None)

    assert row.checkpoint_rule == "last"
    assert row.seeds == (0,)
    assert row.published == (theirs["published"] or {})
    assert row.published_authors == theirs["published_authors"]
    if theirs["checkpoint_url"] is None:
        assert name not in PARAMS.checkpoints
    else:
        assert PARAMS.checkpoints[name].url == theirs["checkpoint_url"]
        assert PARAMS.checkpoints[name].dataset == "coco"
        # the log of the training that ended with the checkpoint, in the older release's folder but for one
        begun = re.search(r"_(\d{8}_\d{6})-", theirs["checkpoint_url"])
        assert begun is not None
        release = "v3.0" if name == "coco_panoptic_r50" else "v2.0"
        log = rf"https://download.openmmlab.com/mmdetection/{release}/mask2former/([\w-]+)/\1_{begun[1]}\.log\.json"
        assert re.fullmatch(log, PARAMS.checkpoints[name].log_url), PARAMS.checkpoints[name].log_url


@pytest.mark.parametrize("name", [*SEMANTIC["rows"], *COCO["rows"]])
def test_every_published_row_has_the_authors_checkpoint_and_swins_have_hugging_faces(name: str) -> None:
    authors = PARAMS.checkpoints[f"{name}_authors"]
    assert (authors.row, authors.dataset) == (name, PARAMS.rows[name].dataset)
    assert (authors.layout, authors.figures) == ("detectron2", "published_authors")
    task = "semantic" if PARAMS.rows[name].task == "semantic" else PARAMS.rows[name].task
    folder = f"https://dl.fbaipublicfiles.com/maskformer/mask2former/{authors.dataset}/{task}/maskformer2_"
    assert re.fullmatch(re.escape(folder) + r"\w+/model_final_[0-9a-f]{6}\.pkl", authors.url), authors.url
    backbone = PARAMS.rows[name].model.backbone.name
    if backbone in ("swin-t", "swin-s"):
        other = PARAMS.checkpoints[f"{name}_hf"]
        assert (other.row, other.layout, other.figures) == (name, "huggingface", "published_authors")
        size = {"swin-t": "tiny", "swin-s": "small"}[backbone]
        assert f"/mask2former-swin-{size}-" in other.url and other.url.endswith(
            f"-{task}/resolve/main/pytorch_model.bin"
        )
    assert backbone.startswith("swin") or f"{name}_hf" not in PARAMS.checkpoints


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("third", {"row": "nothing"}, "checkpoints: no row is called 'nothing'"),
        ("third", {}, "checkpoints: no row is called 'third'"),
        ("third", {"row": "first"}, "third is of row first; begin its name with the row's, as first_authors"),
        ("first_b", {"row": "first", "dataset": "other"}, "dataset is 'other', but row first is on 'mine'"),
    ],
)
def test_a_checkpoint_of_another_row_or_dataset_is_refused(name: str, entry: dict[str, Any], message: str) -> None:
    tree = small_tree()
    tree["checkpoints"] = {name: {"dataset": "mine", "url": "http://127.0.0.1/a.pth", **entry}}
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_params(tree)


def test_a_row_may_have_several_checkpoints_and_one_called_as_the_row_is_its() -> None:
    tree = small_tree()
    entry = {"dataset": "mine", "url": "http://127.0.0.1/a.pth"}
    tree["checkpoints"] = {"first": entry, "first_authors": {**entry, "row": "first", "layout": "detectron2"}}
    found = parse_params(tree).checkpoints
    assert {name: (each.row, each.layout) for name, each in found.items()} == {
        "first": ("first", "reference"),
        "first_authors": ("first", "detectron2"),
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a.pkl"}, "weights.w.path is for whole networks; write layout: mask2former, or take it out"),
        ({"url": "http://127.0.0.1/a.pth", "classes": "anew"}, "weights.w.classes is for whole networks"),
        ({"layout": "mask2former"}, "weights.w has layout mask2former and no source; give a url, a path or a row"),
        ({"layout": "mask2former", "path": "a", "row": "first"}, "weights.w names a path and a row; give one source"),
        (
            {"layout": "mask2former", "path": "a", "classes": "match", "class_names": ["b", "b"]},
            "weights.w.class_names has 'b' more than once; name every class once",
        ),
        ({"layout": "mask2former", "path": "a", "sha256_prefix": "ab"}, "weights.w.sha256_prefix is for a url; take"),
        ({"layout": "mask2former", "path": "a", "classes": "match"}, "weights.w.classes is match, which needs the"),
        ({"layout": "mask2former", "path": "a", "seed": 0}, "weights.w.seed is a row's; take it out, or give the row"),
        (
            {"layout": "mask2former", "path": "a", "classes": "anew", "class_names": ["b"]},
            "weights.w.class_names is for classes: match, and classes is anew; take one out",
        ),
        ({"layout": "mask2former", "row": "firts"}, "weights.w: no row is called 'firts'; did you mean 'first'"),
    ],
)
def test_weights_whose_settings_do_not_go_together_are_refused(entry: dict[str, Any], message: str) -> None:
    tree = small_tree()
    tree["weights"] = {"none": {}, "w": entry}
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_params(tree)


def test_a_row_cannot_start_from_itself() -> None:
    tree = small_tree()
    tree["weights"] = {"none": {}, "w": {"layout": "mask2former", "row": "first"}}
    parse_params(tree)
    tree["rows"]["first"]["weights"] = "w"
    with pytest.raises(ValueError, match=r"weights\.w\.row is first, which itself starts from these weights"):
        parse_params(tree)


@pytest.mark.parametrize(
    ("freeze", "weights", "message"),
    [
        (["backbone"], "none", "train.freeze holds backbone, which begins at random; name weights"),
        (["pixel_decoder"], "swin", "train.freeze holds pixel_decoder, which begins at random; start from a whole"),
        (["query_decoder"], "whole", "train.freeze[0] is 'query_decoder'"),
    ],
)
def test_what_begins_at_random_cannot_be_frozen(freeze: list[str], weights: str, message: str) -> None:
    tree = small_tree()
    tree["weights"] = {
        "none": {},
        "swin": {"url": "http://127.0.0.1/a.pth", "layout": "swin"},
        "whole": {"path": "a.pkl", "layout": "mask2former", "classes": "match", "class_names": "coco"},
    }
    tree["rows"]["first"]["weights"] = "whole"
    tree["rows"]["first"].setdefault("train", {})["freeze"] = ["backbone", "pixel_decoder"]
    assert parse_params(tree).rows["first"].train.freeze == ("backbone", "pixel_decoder")
    tree["rows"]["first"] |= {"weights": weights, "train": {**tree["rows"]["first"]["train"], "freeze": freeze}}
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_params(tree)


def torchvision(url: str) -> str | None:
    """torchvision's name of the weights that an address holds."""
    known = {"resnet50-0676ba61.pth": "ResNet50", "resnet101-63fe2227.pth": "ResNet101"}
    model = known.get(url.rpartition("/")[2])
    return model and f"{model}_Weights.IMAGENET1K_V1"


def test_torchvisions_own_list_names_the_same_files() -> None:
    from torchvision.models import ResNet50_Weights, ResNet101_Weights

    assert PARAMS.weights["torchvision_r50"].url == ResNet50_Weights.IMAGENET1K_V1.url
    assert PARAMS.weights["torchvision_r101"].url == ResNet101_Weights.IMAGENET1K_V1.url


def test_weights_are_checked_by_the_digest_in_their_name_where_there_is_one() -> None:
    for name, weights in PARAMS.weights.items():
        assert weights.layout == ("swin" if "swin" in name else "torchvision")
        stem = weights.url.rpartition("/")[2].removesuffix(".pth")
        # resnet50-0676ba61, swin_tiny_..._20220317-1cdeb081; the original Swin files have none
        assert weights.sha256_prefix == stem.partition("-")[2], name


def test_coco_lists_its_things_first_and_every_class_once() -> None:
    coco = PARAMS.dataset("coco")
    assert (len(coco.class_names), len(coco.thing_classes)) == (133, 80)
    assert len(set(coco.class_names)) == 133
    assert coco.class_names[:80] == coco.thing_classes
    # first and last thing, first and last stuff
    assert [coco.class_names[i] for i in (0, 79, 80, 132)] == ["person", "toothbrush", "banner", "rug-merged"]


def test_coco_has_the_names_and_the_order_of_its_annotations() -> None:
    with zipfile.ZipFile(shared("data/coco-panoptic-sample.zip")) as archive:
        file = next(name for name in archive.namelist() if name.endswith("panoptic_val2017.json"))
        categories = json.loads(archive.read(file))["categories"]
    assert [c["id"] for c in categories] == sorted(c["id"] for c in categories)
    assert list(PARAMS.dataset("coco").class_names) == [c["name"] for c in categories]
    assert list(PARAMS.dataset("coco").thing_classes) == [c["name"] for c in categories if c["isthing"]]


def test_nuclei_are_what_the_archive_holds() -> None:
    nuclei = PARAMS.dataset("nuclei")
    with zipfile.ZipFile(shared("data/nuclei.zip")) as archive:
        for split in nuclei.splits.values():
            file = next(n for n in archive.namelist() if n.endswith(f"annotations/instances_{split}.json"))
            assert [c["name"] for c in json.loads(archive.read(file))["categories"]] == ["nucleus"]
    assert nuclei.class_names == nuclei.thing_classes == ("nucleus",)


def test_the_rows_are_those_that_the_reference_values_name() -> None:
    for name in ("rows.json", "rows_coco.json"):
        assert json.loads(shared(f"reference/{name}").read_text()) == json.loads(
            (PROJECT / "tests/reference" / name).read_text()
        )
