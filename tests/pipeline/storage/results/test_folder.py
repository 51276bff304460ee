"""Results of stages: what is written is read again, and a file that is not what it should be is one sentence."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.params.parse import parse
from pipeline.storage.results import folder as results_folder
from pipeline.storage.results.data import ConvertedWeights, FetchedDataset, FetchedSource
from pipeline.storage.results.folder import (
    every_result,
    find_result,
    made_by,
    names_of,
    read_result,
    result_path,
    waiting,
    write_metrics,
    write_result,
    write_waiting,
)
from pipeline.storage.results.rows import (
    Aliases,
    BestVersion,
    Evaluation,
    Ready,
    RegisteredVersion,
    Registration,
    TrainingResult,
)
from tests.helpers import made_up
from tests.helpers.manifests import made_up_manifest
from tests.helpers.shared import PROJECT

ARCHIVE = FetchedSource(name="mine.zip", bytes=12, sha256="5a" * 32, path="archives/5a5a5a5a5a5a5a5a/mine.zip")
FETCHED = FetchedDataset(dataset="mine", sources=(ARCHIVE,), terms="CC0", generate={"train": 3})
CHECKPOINT = made_up.checkpoint("semantic", 0.5, per_class={"iou": {"road": 0.5, "sky": None}})
EXAMPLES = (
    Ready(row="mine", run=False, needs=("a GPU",), settings="a" * 64),
    FETCHED,
    made_up_manifest(),
    ConvertedWeights(name="mine", url="https://host/r50.pth", source_sha256="0b", sha256="c1", path="weights/c1"),
    made_up.training("mine", [made_up.trained_seed(0), made_up.trained_seed(1)]),
    made_up.evaluation("mine", [made_up.evaluated_seed(0, CHECKPOINT)], median={"miou": 0.5}),
    made_up.published_evaluation("mine", made_up.padded(CHECKPOINT), published={"miou": 50.5, "device": "A100"}),
    made_up.benchmark("mine"),
    Registration(
        row="mine",
        model="mine",
        aliases=Aliases(
            best=BestVersion(version=2, seed=1, run_key="k1", figure="miou", value=0.5, kept="it is of other data"),
            median=RegisteredVersion(version=1, seed=None, run_key=None, figure=None, value=None),
        ),
        tracking_uri="sqlite:///mlflow.db",
    ),
)
"""One of every kind."""

AGAIN = "; make it again with: dvc repro -f fetch@mine"


def content(result: Any) -> dict[str, Any]:
    """What the file of a result holds."""
    values: dict[str, Any] = json.loads(
        json.dumps({"version": results_folder._FILES[type(result)].version, **dataclasses.asdict(result)})
    )
    return values


def refusal(folder: Path, text: str) -> str:
    """What is said about results/fetch/mine.json with this text, from the file's name on."""
    path = result_path(FetchedDataset, "mine", results=folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json") as refused:
        read_result(FetchedDataset, "mine", results=folder)
    assert str(refused.value).startswith(str(path))
    return str(refused.value).removeprefix(str(path))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_a_result_is_read_as_it_was_written(tmp_path: Path, example: Any) -> None:
    result_type = type(example)
    assert find_result(result_type, "mine", results=tmp_path) is None
    assert write_result(example, "mine", results=tmp_path) == result_path(result_type, "mine", results=tmp_path)
    assert (
        read_result(result_type, "mine", results=tmp_path)
        == find_result(result_type, "mine", results=tmp_path)
        == example
    )
    write_result(example, "another", results=tmp_path)
    assert list(names_of(result_type, results=tmp_path)) == ["another", "mine"]


def test_every_kind_has_its_example_and_a_stage_of_its_own() -> None:
    assert {type(example) for example in EXAMPLES} == set(results_folder._FILES)
    assert len({file.stage for file in results_folder._FILES.values()}) == len(results_folder._FILES)


def test_results_lie_in_the_folder_of_their_stage() -> None:
    assert result_path(FetchedDataset, "mine") == Path("results/fetch/mine.json")


def test_what_has_not_run_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fetch/mine\.json does not exist; make it with: dvc repro -f fetch@mine$"):
        read_result(FetchedDataset, "mine", results=tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (["version"], 0, " has version 0 of its layout, but version 1 is needed"),
        (["version"], 2, " has version 2 of its layout, but version 1 is needed"),
        (["version"], True, " has version True of its layout, but version 1 is needed"),
        (["version"], None, " has no version of its layout, but version 1 is needed"),
        (["terms"], None, ": terms is None; expected str"),
        (["license"], "CC0", ": unknown key 'license'; known: dataset, generate, sources, terms, waits"),
        (["sources"], "mine.zip", ": sources is 'mine.zip'; expected a list"),
        (["sources", 0], "mine.zip", ": sources[0] is 'mine.zip'; expected the keys name, bytes, sha256, path"),
        (["sources", 0, "bytes"], "12", ": sources[0].bytes is '12'; expected int"),
        (["sources", 0, "bytes"], True, ": sources[0].bytes is True; expected int"),
        (["sources", 0, "byte"], 12, ": sources[0]: unknown key 'byte'; did you mean 'bytes'?"),
        (["generate", "train"], 3.5, ": generate.train is 3.5; expected int"),
        (["generate"], [3], ": generate is [3]; expected a mapping"),
    ],
)
def test_a_wrong_value_is_refused_with_the_command(tmp_path: Path, path: list[Any], value: Any, sentence: str) -> None:
    wrong = content(FETCHED)
    node: Any = wrong
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert refusal(tmp_path, json.dumps(wrong)) == sentence + AGAIN


def test_a_missing_value_is_refused_with_the_command(tmp_path: Path) -> None:
    fetched = content(FETCHED)
    assert refusal(tmp_path, json.dumps({key: value for key, value in fetched.items() if key != "terms"})) == (
        f": 'terms' is missing{AGAIN}"
    )
    del fetched["sources"][0]["sha256"]
    assert refusal(tmp_path, json.dumps(fetched)) == f": sources[0]: 'sha256' is missing{AGAIN}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_what_was_written_before_layouts_had_versions_is_refused_with_the_command(tmp_path: Path, example: Any) -> None:
    result_type = type(example)
    path = write_result(example, "mine", results=tmp_path)
    path.write_text(json.dumps(dataclasses.asdict(example)))
    with pytest.raises(ValueError, match=r"mine\.json has no version of its layout, but version ") as refused:
        read_result(result_type, "mine", results=tmp_path)
    assert str(refused.value).endswith(f"; make it again with: dvc repro -f {path.parent.name}@mine")


@pytest.mark.parametrize("text", ['["mine"]', '"mine"', "null", "3"])
def test_a_file_that_holds_no_object_is_refused_with_the_command(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text) == f" is no JSON object{AGAIN}"


LACKING = dataclasses.replace(CHECKPOINT, step=80, figures={"miou": 0.5, "pixel_accuracy": 0.9})


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (made_up_manifest(splits={}), "has no splits"),
        (dataclasses.replace(made_up_manifest(), thing_classes=("sky",)), "was altered: its digest is another"),
        (
            ConvertedWeights(name="mine", url="", source_sha256=None, sha256="ab", path=None),
            "has sha256 alone",
        ),
        (
            made_up.training("mine", [made_up.trained_seed(0), made_up.trained_seed(1), made_up.trained_seed(0)]),
            "has the seeds 0 more than once",
        ),
        (
            made_up_manifest(pixels={"val": (40, 40, 0)}),
            "has other splits in pixels than in splits",
        ),
        (
            made_up_manifest(instances={"train": (0, 0, 2), "val": (0, 0)}),
            "has instances of split val for 2 classes, but 3 classes",
        ),
        (
            made_up.evaluation("mine", [], primary="pq"),
            "has the primary figure 'pq', but that of the task semantic is 'miou'",
        ),
        (
            made_up.evaluation("mine", [made_up.evaluated_seed(0, CHECKPOINT, LACKING)]),
            "has no 'mean_accuracy' of the checkpoint of step 80",
        ),
        (
            made_up.published_evaluation("mine", made_up.padded(LACKING), published={"miou": 50.5}),
            "has no 'mean_accuracy' of the checkpoint of step 80",
        ),
    ],
)
def test_a_result_that_contradicts_itself_is_refused_with_the_command(
    tmp_path: Path, result: Any, sentence: str
) -> None:
    result_type = type(result)
    path = write_result(result, "mine", results=tmp_path)
    whole = f"{path} {sentence}; make it again with: {made_by(result_type, 'mine')}"
    with pytest.raises(ValueError, match=f"^{re.escape(whole)}$"):
        read_result(result_type, "mine", results=tmp_path)


def test_the_result_of_another_row_is_refused_with_the_command(tmp_path: Path) -> None:
    path = result_path(TrainingResult, "mine", results=tmp_path)
    write_result(made_up.training("another", [made_up.trained_seed(0)]), "mine", results=tmp_path)
    sentence = f"{path} is of row 'another', not of mine; make it again with: dvc repro -f train@mine"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        read_result(TrainingResult, "mine", results=tmp_path)


def test_a_number_that_is_too_large_is_refused_with_the_command(tmp_path: Path) -> None:
    trained = content(made_up.training("mine", [made_up.trained_seed(0)]))
    path = result_path(TrainingResult, "mine", results=tmp_path)
    path.parent.mkdir(parents=True)
    for number, said in ((10**400, "is a number of 401 digits, which is too large"), ("1e999", "1e999 is too large")):
        text = json.dumps(trained).replace('"train_s": 75.0', f'"train_s": {number}')
        path.write_text(text)
        with pytest.raises(
            ValueError, match=rf"train/mine\.json.*{said}.*; make it again with: dvc repro -f train@mine$"
        ):
            read_result(TrainingResult, "mine", results=tmp_path)


def test_a_stage_that_waits_has_no_result_and_a_finished_one_is_never_replaced(tmp_path: Path) -> None:
    write_waiting(Evaluation, "mine", "a GPU", results=tmp_path)
    assert find_result(Evaluation, "mine", results=tmp_path) is None
    assert list(names_of(Evaluation, results=tmp_path)) == []
    assert waiting(Evaluation, "mine", results=tmp_path) == "a GPU" and list(every_result(tmp_path)) == []
    assert json.loads((tmp_path / "metrics/mine.json").read_text()) == {}
    assert (tmp_path / "plots/curves/mine.csv").read_text() == "training,figure,step,value\n"
    assert (tmp_path / "plots/confusion/mine.csv").read_text() == "actual,predicted,share\n"
    with pytest.raises(ValueError, match=r"mine\.json waits for a GPU; when that is here: dvc repro evaluate@mine$"):
        read_result(Evaluation, "mine", results=tmp_path)
    write_waiting(Evaluation, "mine", "pictures", results=tmp_path)
    assert waiting(Evaluation, "mine", results=tmp_path) == "pictures"
    (tmp_path / "evaluate/mine.json").write_text('{"version": 1, "row": ')  # torn: nothing is lost by it
    write_waiting(Evaluation, "mine", "a GPU", results=tmp_path)
    assert waiting(Evaluation, "mine", results=tmp_path) == "a GPU"
    for wrong in ("null", "3", '""'):
        (tmp_path / "evaluate/mine.json").write_text(f'{{"version": 1, "waiting": {wrong}}}')
        assert waiting(Evaluation, "mine", results=tmp_path) == ""
        with pytest.raises(ValueError, match="make it again with: dvc repro -f evaluate@mine"):
            find_result(Evaluation, "mine", results=tmp_path)
    evaluated = made_up.evaluation("mine", [made_up.evaluated_seed(0, CHECKPOINT)], median={"miou": 0.5})
    write_result(evaluated, "mine", results=tmp_path)
    write_metrics("mine", {"mIoU": {"median": 50.0}}, results=tmp_path)
    write_waiting(Evaluation, "mine", "a GPU", results=tmp_path)
    assert read_result(Evaluation, "mine", results=tmp_path) == evaluated
    assert json.loads((tmp_path / "metrics/mine.json").read_text()) == {"mIoU": {"median": 50.0}}


def test_a_torn_file_among_all_results_is_named_with_the_command(tmp_path: Path) -> None:
    write_result(FETCHED, "mine", results=tmp_path)
    assert [result["dataset"] for result in every_result(tmp_path)] == ["mine"]
    torn = result_path(FetchedDataset, "torn", results=tmp_path)
    torn.write_text('{"dataset": ')
    with pytest.raises(ValueError, match=r"torn\.json is not JSON .*; make it again with: dvc repro -f fetch@torn$"):
        list(every_result(tmp_path))


def test_a_folder_in_the_place_of_a_file_and_json_without_a_bottom_are_one_sentence(tmp_path: Path) -> None:
    assert refusal(tmp_path, "[" * 100_000).startswith(" is not JSON (")
    path = result_path(FetchedDataset, "another", results=tmp_path)
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"another\.json is a folder, not a file; .*: dvc repro -f fetch@another$"):
        read_result(FetchedDataset, "another", results=tmp_path)


def test_a_torn_file_is_refused_with_the_command(tmp_path: Path) -> None:
    whole = json.dumps(content(FETCHED))
    for text in ("", whole[:-1], whole[:40]):
        said = refusal(tmp_path, text)
        assert said.startswith(" is not JSON (") and said.endswith(AGAIN)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_refused_with_the_command(tmp_path: Path, word: str) -> None:
    text = json.dumps(content(FETCHED)).replace("12", word)
    assert refusal(tmp_path, text) == f" is not JSON (it holds {word}){AGAIN}"


def test_an_instance_rows_classes_are_the_things_alone() -> None:
    manifest = made_up_manifest(class_names=("car", "sky", "dog"), thing_classes=("dog", "car"))
    assert manifest.class_names_of("panoptic") == manifest.class_names_of("semantic") == ("car", "sky", "dog")
    assert (manifest.class_names_of("instance"), manifest.thing_ids_of("instance")) == (("car", "dog"), [0, 1])
    assert manifest.thing_ids_of("panoptic") == [0, 2]


def test_a_split_that_a_dataset_lacks_is_named() -> None:
    manifest = made_up_manifest()
    assert manifest.split("val") == manifest.splits["val"]
    with pytest.raises(ValueError, match=r"^dataset mine has no split test; `splits` in params\.yaml names them$"):
        manifest.split("test")


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Fields of the types that results have and settings do not."""

    by_number: Mapping[int, int]
    share: float | None
    known: ClassVar[int] = 3


def test_whole_numbers_are_keys_again() -> None:
    assert parse(Counted, {"by_number": {"0": 4, "-12": 5}, "share": 1}, "x") == Counted(
        by_number={0: 4, -12: 5}, share=1.0
    )
    for key in ("1.0", "01", "one", "1_0", ""):
        with pytest.raises(ValueError, match=rf"^x\.by_number has the key {key!r}; expected int$"):
            parse(Counted, {"by_number": {key: 4}, "share": None}, "x")


def test_a_class_variable_is_no_field() -> None:
    with pytest.raises(ValueError, match=r"^x: unknown key 'known'; known: by_number, share$"):
        parse(Counted, {"by_number": {}, "share": None, "known": 4}, "x")


def test_reading_results_loads_no_library() -> None:
    heavy = ["torch", "numpy", "pyarrow", "ray", "mlflow", "yaml"]
    code = f"import sys, pipeline.storage.results.folder\nprint([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
