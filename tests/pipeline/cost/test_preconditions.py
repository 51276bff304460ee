"""What a row's later stages need is checked before its first step, all of it at once."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.cost import needs
from pipeline.cost import preconditions as module
from pipeline.cost.plan import checkpoint_bytes
from pipeline.cost.preconditions import known_errors, preconditions, refuse_to_train
from pipeline.data.shards.look import record_settings
from pipeline.params.schema import DatasetConfig, MsFlipConfig, Params, Row
from pipeline.provenance.run_key import run_key
from pipeline.storage.results.data import ExtremeSizes, ImageSides, Manifest
from pipeline.storage.results.folder import write_result
from tests.helpers.manifests import made_up_manifest
from tests.pipeline.conftest import NO_WEIGHTS

CONFIG = DatasetConfig(layout="folder", class_names=("sky", "road", "car"), thing_classes=("car",))
ALL = ("instances", "panoptic", "semantic")
OBJECTS = {"train": (0, 0, 2), "val": (0, 0, 1)}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def _alone(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("M2F_WORKERS", "M2F_GROUPS_AT_ONCE", "M2F_CHECKPOINT_ACTIVATIONS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(needs, "gpus_here", lambda row: False)
    monkeypatch.setattr(module, "gpus_here", lambda row: False)


@pytest.fixture
def row(small_row: Row) -> Row:
    return dataclasses.replace(small_row, name="r", dataset="mine", task="semantic")


def changed(row: Row, part: str, **fields: Any) -> Row:
    return dataclasses.replace(row, **{part: dataclasses.replace(getattr(row, part), **fields)})


def manifest(**fields: Any) -> Manifest:
    return made_up_manifest(**{"labels": ALL, "instances": OBJECTS, **fields})


def of(row: Row, found: Manifest, config: DatasetConfig = CONFIG, **how: Any) -> tuple[list[str], list[str]]:
    return preconditions(row, found, config, **{"results": Path("none"), "build": False, **how})


def sizes(*, narrowest: tuple[int, int], largest: tuple[int, int] = (500, 600)) -> dict[str, ExtremeSizes]:
    return {"val": ExtremeSizes(smallest=(40, 50), largest=largest, narrowest=narrowest)}


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_row_that_lacks_nothing_is_told_nothing(row: Row, task: Any) -> None:
    assert of(dataclasses.replace(row, task=task), manifest(extreme_sizes=sizes(narrowest=(30, 90)))) == ([], [])


def test_every_split_that_a_later_stage_reads_is_named(row: Row) -> None:
    whole = manifest()
    only_train = dataclasses.replace(whole, splits={"train": whole.splits["train"]})
    assert of(row, only_train)[0] == [
        "dataset mine has no split val, which the row is measured on; name its folder in datasets.mine.splits in "
        "params.yaml"
    ]
    only_val = dataclasses.replace(whole, splits={"val": whole.splits["val"]})
    assert of(row, only_val)[0][0].startswith("dataset mine has no split train, which the row is trained on;")


def test_the_labels_of_the_task_are_needed(row: Row) -> None:
    instance = dataclasses.replace(row, task="instance")
    assert of(instance, manifest(labels=("semantic",)))[0] == [
        "dataset mine has no instances labels, which the task instance needs, but semantic; give the row another "
        "`task` or another dataset"
    ]


def test_a_semantic_row_needs_two_classes_where_a_panoptic_one_needs_an_object(row: Row) -> None:
    cars = manifest(pixels={"train": (0, 0, 40), "val": (0, 0, 40)})
    (error,) = of(row, cars)[0]
    assert error.startswith("the training images of dataset mine have pixels of one class alone, car; ")
    assert error.endswith(", or set on_empty: allow if that is meant")
    assert of(dataclasses.replace(row, task="panoptic"), cars)[0] == []
    assert of(row, cars, dataclasses.replace(CONFIG, on_empty="allow"))[0] == []


@pytest.mark.parametrize(
    ("task", "fields", "lacks"),
    [
        ("semantic", {"pixels": {"train": (9, 9, 9), "val": (0, 0, 0)}}, "no pixel of a class"),
        ("instance", {"instances": {"train": (0, 0, 2), "val": (0, 0, 0)}}, "no object of a thing class"),
        ("panoptic", {"pixels": {"train": (9, 9, 9), "val": (0, 0, 0)}, "instances": OBJECTS | {"val": (0, 0, 0)}},
         "no pixel of a class"),
    ],
)  # fmt: skip
def test_validation_must_have_something_to_measure_whatever_may_be_empty(
    row: Row, task: Any, fields: dict[str, Any], lacks: str
) -> None:
    row = dataclasses.replace(row, task=task)
    for config in (CONFIG, dataclasses.replace(CONFIG, on_empty="allow")):
        (error,) = of(row, manifest(**fields), config)[0]
        assert error.startswith(f"the validation images of dataset mine have {lacks}")
        assert error.endswith(": validation would measure nothing")


def test_images_with_things_must_be_there_and_large_enough(row: Row) -> None:
    with_things = changed(row, "train", images="with_things")
    large = {"image_sizes": dict.fromkeys(("train", "val"), ImageSides(height=(8, 8, 40), width=(8, 8, 32)))}
    assert of(with_things, manifest(**large))[0] == []
    for fields in ({}, {**large, "instances": {"train": (0, 0, 0), "val": (0, 0, 1)}}):  # of 8 x 10; without things
        assert of(with_things, manifest(**fields))[0] == [
            "no training image of dataset mine has things and sides of at least 32 px; set rows.r.train.images to all"
        ]


def test_the_test_settings_must_leave_the_narrowest_image_large_enough(row: Row) -> None:
    row = changed(row, "test", short_side=64, long_side_max=128, pad_multiple=1)
    # 2 x 2000: scaled by min(64 / 2, 128 / 2000) to 0.1 x 128, and a side has at least 1
    (error,) = of(row, manifest(extreme_sizes=sizes(narrowest=(2, 2000))))[0]
    assert error == (
        "a validation image of 2 x 2000 (height x width) is tested at 1 x 128 by rows.r.test, but the network needs 32 "
        "pixels on both sides; set rows.r.test.pad_multiple to 32 (now 1), or take such images out"
    )
    # 25 x 100: scaled by 1.28 to 32 x 128; 24 x 100 to 31 x 128
    assert of(row, manifest(extreme_sizes=sizes(narrowest=(25, 100))))[0] == []
    assert "tested at 31 x 128" in of(row, manifest(extreme_sizes=sizes(narrowest=(24, 100))))[0][0]
    assert of(changed(row, "test", pad_multiple=32), manifest(extreme_sizes=sizes(narrowest=(2, 2000))))[0] == []


def test_every_size_of_ms_flip_is_checked_too(row: Row) -> None:
    views = MsFlipConfig(short_sides=(64, 31, 96), long_side_max=512)
    row = changed(row, "test", short_side=64, long_side_max=512, pad_multiple=1, ms_flip=views)
    (error,) = of(row, manifest(extreme_sizes=sizes(narrowest=(100, 100), largest=(100, 100))))[0]
    # 40 x 50, the smallest image, is as small: 31 x 39
    assert "of 100 x 100 (height x width) is tested at 31 x 31 by rows.r.test.ms_flip" in error


def test_more_things_than_the_network_can_find_are_counted(row: Row) -> None:
    row = dataclasses.replace(row, task="instance")
    row = changed(row, "test", max_instances=11)
    assert row.model.query_decoder.queries == 12
    counts = {"train": {0: 5, 12: 3, 13: 2, 40: 1}, "val": {11: 4, 12: 6}}
    assert of(row, manifest(things_per_image=counts)) == (
        [],
        [
            "more things than the 12 queries of rows.r.model.query_decoder.queries: in 3 training images, up to 40; "
            "those beyond cannot be found",
            "more things than rows.r.test.max_instances (11): in 6 validation images, up to 12; those beyond cannot be "
            "found",
        ],
    )
    one = manifest(things_per_image={"train": {13: 1}, "val": {0: 1}})
    assert "in 1 training image, up to 13;" in of(row, one)[1][0]
    assert of(dataclasses.replace(row, task="semantic"), manifest(things_per_image=counts)) == ([], [])


def test_a_largest_image_that_no_memory_holds_is_warned_of(row: Row) -> None:
    huge = manifest(extreme_sizes=sizes(narrowest=(40, 50), largest=(2**20, 2**20)))
    instance = changed(dataclasses.replace(row, task="instance"), "test", max_instances=100)
    (warning,) = of(instance, huge)[1]  # 100 masks of 2^40 pixels
    assert "image of 1048576 x 1048576 takes about 102400 GiB, for rows.r.test.max_instances;" in warning
    assert of(row, huge)[1] == []  # label maps are made band by band


def test_what_the_environment_says_of_workers_is_checked(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F_WORKERS", "5")
    assert of(row, manifest())[0] == ["5 workers for row r, which has 4 groups; use 1 to 4 (M2F_WORKERS)"]
    monkeypatch.setenv("M2F_WORKERS", "some")
    assert of(row, manifest())[0] == ["M2F_WORKERS is 'some'; it must be a whole number, 0 or more"]
    monkeypatch.delenv("M2F_WORKERS")
    monkeypatch.setenv("M2F_CHECKPOINT_ACTIVATIONS", "yes")
    assert of(row, manifest())[0] == ["M2F_CHECKPOINT_ACTIVATIONS is 'yes'; it must be a whole number, 0 or more"]
    monkeypatch.delenv("M2F_CHECKPOINT_ACTIVATIONS")
    monkeypatch.setenv("M2F_GROUPS_AT_ONCE", "-1")
    assert of(row, manifest())[0] == ["M2F_GROUPS_AT_ONCE is '-1'; it must be a whole number, 0 or more"]


# Disk


def test_the_checkpoints_of_all_seeds_must_find_room(
    row: Row, tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "gpus_here", lambda row: True)
    row = dataclasses.replace(row, seeds=(0, 1))
    size = checkpoint_bytes(row.model)  # two of each seed stay, and one more is written before another goes
    results = tmp_path / "results"
    write_result(NO_WEIGHTS, "none", results=results)
    free = _free(monkeypatch, 5 * size - 1)
    (error,) = of(row, manifest(), build=True, results=results)[0]
    assert error.startswith("training 2 seeds (a checkpoint is ") and "MiB more, but only" in error
    free(5 * size)
    assert of(row, manifest(), build=True, results=results)[0] == []
    # one checkpoint of seed 1 lies there already, and seed 0 has ended
    folder = storage / "runs" / run_key(row, seed=1, data_digest=manifest().digest, weights_sha256=None)
    (folder / "checkpoints").mkdir(parents=True)
    with open(folder / "checkpoints/step-00000002.safetensors", "wb") as file:
        file.truncate(size)
    free(4 * size)
    assert of(row, manifest(), build=True, results=results)[0] == []
    free(4 * size - 1)
    assert len(of(row, manifest(), build=True, results=results)[0]) == 1
    ended = storage / "runs" / run_key(row, seed=0, data_digest=manifest().digest, weights_sha256=None)
    ended.mkdir()
    (ended / "diverged.json").write_text('{"reason": "x", "step": 1, "positions": [], "names": [], "last_norm": null}')
    free(2 * size)
    assert of(row, manifest(), build=True, results=results)[0] == []


def _free(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[int], None]:
    """Sets what the file system says is free."""

    def set_free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(count, 0, count))

    set_free(count)
    return set_free


def test_room_is_not_checked_where_only_the_network_would_tell_and_is_not_to_be_built(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    _free(monkeypatch, 0)
    assert of(row, manifest())[0] == []
    assert "make room" in of(row, manifest(), build=True)[0][0]


def test_a_network_that_cannot_be_built_is_one_problem_among_others(row: Row) -> None:
    decoder = dataclasses.replace(row.model.pixel_decoder, channels=36)
    row = changed(row, "model", pixel_decoder=decoder)
    assert of(row, manifest(labels=("semantic",), pixels={"train": (9, 9, 9), "val": (0, 0, 0)}), build=True)[0][
        1:
    ] == ["model.pixel_decoder.channels is 36; it must be a multiple of 32"]


# Who asks


def test_a_training_is_told_all_problems_at_once(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("M2F_WORKERS", "5")
    row = changed(dataclasses.replace(row, task="instance"), "test", max_instances=1)
    whole = manifest(things_per_image={"train": {2: 1}, "val": {2: 1}})
    found = dataclasses.replace(whole, splits={"train": whole.splits["train"]}, labels=("semantic",))
    with pytest.raises(ValueError, match="is not trained here") as refused:
        refuse_to_train(row, found, CONFIG, results=tmp_path)
    said = str(refused.value)
    assert said.startswith("row r is not trained here: (1) dataset mine has no split val")
    assert "; (2) dataset mine has no instances labels" in said and "; (3) 5 workers for row r" in said
    assert capsys.readouterr().err.startswith("warning: r: more things than rows.r.test.max_instances (1): in")


def test_a_training_that_lacks_nothing_begins(row: Row, tmp_path: Path) -> None:
    refuse_to_train(row, manifest(), CONFIG, results=tmp_path)


def test_shards_that_will_be_made_anew_say_nothing_of_a_row(row: Row, tmp_path: Path) -> None:
    params = Params(datasets={"mine": CONFIG}, rows={"r": row})
    assert known_errors(row, params, results=tmp_path) == []  # there are none
    found = manifest(settings=record_settings(CONFIG), pixels={"train": (9, 9, 9), "val": (0, 0, 0)})
    write_result(found, "mine", results=tmp_path)
    assert known_errors(row, params, results=tmp_path)[0].startswith("the validation images of dataset mine have no")
    others = dataclasses.replace(CONFIG, ignore_label=9)
    assert known_errors(row, dataclasses.replace(params, datasets={"mine": others}), results=tmp_path) == []


def test_compiled_kernels_without_a_compiler_are_an_error_where_there_is_no_gpu(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(choice: str) -> None:
        raise ValueError(f"kernels is {choice}, but there is no C compiler")

    monkeypatch.setattr(module, "use", use)
    compiled = changed(row, "train", kernels="compiled")
    assert of(compiled, manifest())[0] == ["rows.r.train.kernels is compiled, but there is no C compiler"]
    assert of(row, manifest())[0] == []
    monkeypatch.setattr(module, "gpus_here", lambda row: True)
    assert of(compiled, manifest())[0] == []


def test_fp16_on_a_cpu_is_warned_of(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    (warning,) = of(changed(row, "train", precision="fp16"), manifest())[1]
    assert warning.startswith("rows.r.train.precision is fp16, in which a CPU takes many times as long for a step; ")
    assert of(changed(row, "train", precision="bf16"), manifest())[1] == []
    monkeypatch.setattr(module, "gpus_here", lambda row: True)
    assert of(changed(row, "train", precision="fp16"), manifest())[1] == []
