"""Which checkpoints of a row are registered, and which of them may be called best; in a real registry."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from urllib3.util import connection

from pipeline.params.schema import DatasetConfig, Params, Row
from pipeline.registry.candidates import candidates, chosen
from pipeline.registry.register import licence, model_name, register, register_published
from pipeline.registry.source import open_source
from pipeline.runs.checkpoints import save_model
from pipeline.storage.results.rows import (
    Aliases,
    BestCheckpoint,
    BestVersion,
    PaddedEvaluation,
    RegisteredVersion,
    Registration,
)
from pipeline.tracking import mlflow_runs
from pipeline.tracking.client import mlflow_client
from pipeline.tracking.experiments import experiment_id
from tests.helpers.made_up import checkpoint, evaluated_seed, evaluation, published_evaluation, training
from tests.helpers.registered import CLASSES, decided_network, manifest_of, results_of, row_of
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S, until


@pytest.fixture
def registry(empty_mlflow: Path, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A client of the test's own registry, which the pipeline uses."""
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow puts a loaded model's code in front
    return MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def row(small_row: Row) -> Row:
    return row_of("semantic", small_row)


def registered(row: Row, storage: Path, values: dict[int, float | str], **settings: Any) -> Registration:
    """What `register` gives for seeds with these figures."""
    force, digest = settings.pop("force", False), settings.pop("digest", None)
    manifest = manifest_of(storage, sizes=[(64, 96)])
    if digest is not None:
        manifest = dataclasses.replace(manifest, digest=digest)
    return register(
        row, manifest=manifest, weights_terms="", force=force, **results_of(row, storage, values, **settings)
    )


def seeds(result: Registration) -> dict[str, tuple[int, int | None]]:
    """By alias, the version that has it and its seed."""
    aliases = {"best": result.aliases.best, "median": result.aliases.median}
    return {alias: (version.version, version.seed) for alias, version in aliases.items()}


def versions(client: MlflowClient, name: str = "odd-semantic") -> list[int]:
    return sorted(int(version.version) for version in client.search_model_versions(f"name = '{name}'"))


# Which checkpoints


@pytest.mark.parametrize(
    ("values", "best", "median"),
    [
        ({0: 0.5}, 0, 0),
        ({0: 0.5, 1: 0.6}, 1, 0),  # of two, the median is the lower
        ({0: 0.5, 1: 0.7, 2: 0.6}, 1, 2),
        ({0: 0.5, 1: 0.7, 2: 0.6, 3: 0.4}, 1, 0),  # 0.4 [0.5] 0.6 0.7
        ({0: 0.5, 1: "it diverged", 2: 0.6, 3: 0.4}, 2, 0),  # a failed seed counts for nothing
        ({0: 0.5, 1: 0.5, 2: 0.5}, 2, 1),  # equal: in the order of the row's seeds
    ],
)
def test_the_best_and_the_median_seed_are_chosen(
    values: dict[int, float | str], best: int, median: int, row: Row, storage: Path
) -> None:
    ranked = candidates(**results_of(row, storage, values))
    assert {alias: candidate.seed for alias, candidate in chosen(ranked).items()} == {"best": best, "median": median}


def test_the_figure_is_that_of_the_checkpoint_which_decides(row: Row, storage: Path) -> None:
    results = results_of(row, storage, {0: 0.5})
    (trained,) = results["trained"].seeds
    assert trained.checkpoints is not None
    best = BestCheckpoint(step=1, path="checkpoints/step-00000001.safetensors", sha256="ab", figure="miou", value=0.7)
    trained = dataclasses.replace(trained, checkpoints=dataclasses.replace(trained.checkpoints, best=best))
    last, better = checkpoint(row.task, 0.5, step=2), checkpoint(row.task, 0.8, step=1)
    evaluated = evaluation(row.name, [evaluated_seed(0, last, better, key="run")], decides="best")
    (candidate,) = candidates(evaluated, training(row.name, [trained]))
    assert (candidate.value, candidate.checkpoint) == (0.8, "runs/run0/checkpoints/step-00000001.safetensors")


def test_the_run_is_the_one_that_the_evaluation_was_sent_to(row: Row, storage: Path) -> None:
    results = results_of(row, storage, {0: 0.5}, runs={0: "of the row's earlier name"})
    seed = dataclasses.replace(results["evaluated"].seeds[0], mlflow_run_id="of its present one")
    evaluated = dataclasses.replace(results["evaluated"], seeds=(seed,))
    assert [each.mlflow_run_id for each in candidates(evaluated, results["trained"])] == ["of its present one"]


def test_without_a_finished_seed_there_is_nothing_to_register(row: Row, storage: Path) -> None:
    with pytest.raises(ValueError, match="no seed of row odd_semantic is finished, so there is nothing to register"):
        candidates(**results_of(row, storage, {0: "lost its workers"}))


def test_a_seed_whose_figure_had_nothing_to_count_is_refused(row: Row, storage: Path) -> None:
    results = results_of(row, storage, {0: 0.5})
    nothing = evaluation(row.name, [evaluated_seed(0, checkpoint(row.task, None), key="run")])
    with pytest.raises(ValueError, match=r"seed 0 has no mIoU in results/evaluate/odd_semantic\.json: .* nothing that"):
        candidates(nothing, results["trained"])


def test_an_evaluation_of_other_trainings_is_refused(row: Row, storage: Path) -> None:
    results = results_of(row, storage, {0: 0.5}), results_of(row, storage, {0: 0.5}, run="other")
    with pytest.raises(
        ValueError, match="evaluate/odd_semantic.json holds run run0, .* dvc repro evaluate@odd_semantic"
    ):
        candidates(results[0]["evaluated"], results[1]["trained"])


def test_an_altered_checkpoint_is_not_registered(row: Row, storage: Path, registry: MlflowClient) -> None:
    results = results_of(row, storage, {0: 0.5})
    path = storage / "runs/run0/checkpoints/step-00000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="is not the one train@odd_semantic wrote"):
        register(row, manifest=manifest_of(storage), weights_terms="", **results)
    assert versions(registry) == []


# Versions


def test_a_version_says_where_it_came_from(row: Row, storage: Path, registry: MlflowClient) -> None:
    result = registered(row, storage, {0: 0.5, 1: 0.625}, digest="d" * 64)
    assert result == Registration(
        row="odd_semantic",
        model="odd-semantic",
        aliases=Aliases(
            best=BestVersion(version=1, seed=1, run_key="run1", figure="miou", value=0.625, kept=None),
            median=RegisteredVersion(version=2, seed=0, run_key="run0", figure="miou", value=0.5),
        ),
        tracking_uri=os.environ["MLFLOW_TRACKING_URI"],
    )
    version = registry.get_model_version_by_alias("odd-semantic", "best")
    (trained,) = results_of(row, storage, {1: 0.625})["trained"].seeds
    assert trained.checkpoints is not None
    assert {**version.tags, "digest": ""} == {
        "row": "odd_semantic",
        "task": "semantic",
        "dataset": "mine",
        "backbone": "tiny",
        "metric": "miou",
        "miou": "62.5",
        "mean_accuracy": "62.5",
        "pixel_accuracy": "62.5",
        "seed": "1",
        "run_key": "run1",
        "dataset_digest": "d" * 64,
        "licence": "images: CC0 (made up)",
        "checkpoint_sha256": trained.checkpoints.last.sha256,
        "git_commit": "c0ffee",
        "digest": "",
    }
    assert version.description.startswith(
        "mIoU 62.50, mean acc. 62.50, pixel acc. 62.50 (percent, validation), seed 1 of"
    )
    assert "Made by `dvc repro register@odd_semantic`" in version.description
    assert version.description.endswith("Terms: images: CC0 (made up).")
    model = mlflow.pyfunc.load_model("models:/odd-semantic@best")
    assert model.metadata.metadata["class_names"] == ["sky", "road", "car"]


def test_a_model_says_what_it_is_and_which_versions_it_has(row: Row, storage: Path, registry: MlflowClient) -> None:
    registered(row, storage, {0: 0.5, 1: 0.6})
    text = registry.get_registered_model("odd-semantic").description
    assert "| best | 1 | 1 | 60.00 |" in text and "| median | 2 | 0 | 50.00 |" in text
    registered(row, storage, {0: 0.5, 1: 0.6, 2: 0.7})
    text = registry.get_registered_model("odd-semantic").description
    assert "| best | 3 | 2 | 70.00 |" in text and "Made by `dvc repro register@odd_semantic`" in text
    signature = mlflow.models.get_model_info("models:/odd-semantic@best").signature
    assert signature.outputs.input_names() == ["labels", "class_names"] and signature.inputs is None


def test_versions_of_an_earlier_project_version_are_compared_by_their_fractions(
    row: Row, storage: Path, registry: MlflowClient
) -> None:
    registered(row, storage, {0: 0.5})
    first = registry.get_model_version("odd-semantic", "1")
    for key in ("miou", "mean_accuracy", "pixel_accuracy"):
        registry.delete_model_version_tag("odd-semantic", "1", key)
    registry.set_model_version_tag("odd-semantic", first.version, "value", "0.9")  # as it was written then
    assert seeds(registered(row, storage, {0: 0.6}, run="next")) == {"best": (1, 0), "median": (2, 0)}


def test_a_version_is_shown_at_the_run_that_trained_it(row: Row, storage: Path, registry: MlflowClient) -> None:
    run = mlflow_runs.open_run(dataset="mine", row=row.name, name="seed 0", run_key="run0", params={}, tags={})
    assert run is not None
    registered(row, storage, {0: 0.5, 1: 0.4}, runs={0: run, 1: "0123456789abcdef0123456789abcdef"})
    known, unknown = (registry.get_model_version("odd-semantic", number) for number in ("1", "2"))
    assert (known.run_id, unknown.run_id) == (run, None)  # results may come from another server
    (output,) = registry.get_run(run).outputs.model_outputs
    assert known.source == f"models:/{output.model_id}"
    (metric, *_) = registry.get_logged_model(output.model_id).metrics
    assert (metric.key, metric.value, metric.dataset_name) == ("test/miou", 50.0, "mine val")
    assert registry.get_run(run).data.metrics["test/miou"] == 50.0
    logged = registry.get_logged_model(unknown.source.removeprefix("models:/"))
    assert logged.experiment_id == registry.get_run(run).info.experiment_id


def test_the_terms_of_pictures_and_initial_weights_go_with_the_weights() -> None:
    assert licence("CC BY 4.0", "MIT") == "images: CC BY 4.0; initial weights: MIT"
    assert licence("", "") == "images: no terms stated"


def test_registering_again_finds_the_same_versions(row: Row, storage: Path, registry: MlflowClient) -> None:
    first = registered(row, storage, {0: 0.5, 1: 0.6})
    assert registered(row, storage, {0: 0.5, 1: 0.6}) == first
    assert versions(registry) == [1, 2]


def test_a_version_whose_files_are_gone_is_made_again(
    registry: MlflowClient, row: Row, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registered(row, storage, {0: 0.5})
    (version,) = registry.search_model_versions("name = 'odd-semantic'")
    shutil.rmtree(next(storage.rglob(str(version.source).removeprefix("models:/"))))
    assert seeds(registered(row, storage, {0: 0.5})) == {"best": (2, 0), "median": (2, 0)}
    assert "the files of version 1 of odd-semantic are gone; it is made again" in capsys.readouterr().err
    assert seeds(registered(row, storage, {0: 0.5})) == {"best": (2, 0), "median": (2, 0)}
    model = str(registry.get_model_version("odd-semantic", "2").source).removeprefix("models:/")
    assert "MLmodel" in [entry.path for entry in registry.list_logged_model_artifacts(model)]


def test_one_seed_is_one_version_with_both_aliases(row: Row, storage: Path, registry: MlflowClient) -> None:
    assert seeds(registered(row, storage, {7: 0.5})) == {"best": (1, 7), "median": (1, 7)}
    assert versions(registry) == [1]
    assert set(registry.get_model_version("odd-semantic", "1").aliases) == {"best", "median"}


def test_a_checkpoint_under_other_test_settings_is_another_version(
    row: Row, storage: Path, registry: MlflowClient
) -> None:
    registered(row, storage, {0: 0.5})
    larger = dataclasses.replace(row, test=dataclasses.replace(row.test, short_side=80))
    assert seeds(registered(larger, storage, {0: 0.6})) == {"best": (2, 0), "median": (2, 0)}
    # neither its other seeds nor its published figures change what it answers
    elsewhere = dataclasses.replace(larger, seeds=(0, 5), published={"miou": 50.0})
    assert seeds(registered(elsewhere, storage, {0: 0.6})) == {"best": (2, 0), "median": (2, 0)}


def test_a_checkpoint_that_was_evaluated_again_keeps_its_version_and_shows_the_new_figure(
    row: Row, storage: Path, registry: MlflowClient
) -> None:
    registered(row, storage, {0: 0.5})
    registered(row, storage, {0: 0.55})
    assert registry.get_model_version_by_alias("odd-semantic", "best").tags["miou"] == "55"
    assert versions(registry) == [1]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("ade20k_swin-t", "ade20k-swin-t"),
        ("coco_panoptic_swin-t", "coco-panoptic-swin-t"),
        ("coco_instance_swin-t", "coco-instance-swin-t"),
        ("shapes_tiny", "shapes-tiny"),
    ],
)
def test_a_model_is_called_after_its_row(row: str, name: str) -> None:
    assert model_name(row) == name


def test_two_rows_cannot_share_a_model(row: Row, storage: Path, registry: MlflowClient) -> None:
    registered(row, storage, {0: 0.5})
    other = dataclasses.replace(row, name="odd-semantic")
    with pytest.raises(ValueError, match="model odd-semantic belongs to row odd_semantic; rename row odd-semantic"):
        registered(other, storage, {0: 0.5})
    registry.create_registered_model("odd-panoptic")
    with pytest.raises(ValueError, match="model odd-panoptic belongs to something else"):
        registered(dataclasses.replace(row, name="odd_panoptic"), storage, {0: 0.5})


# The alias best


def test_a_worse_candidate_never_takes_the_alias(row: Row, storage: Path, registry: MlflowClient) -> None:
    registered(row, storage, {0: 0.5, 1: 0.6, 2: 0.55})
    worse = registered(row, storage, {0: 0.4, 1: 0.59}, run="recipe2-")
    # best stays where it is; median follows the present results
    assert seeds(worse) == {"best": (1, 1), "median": (3 + 1, 0)}
    assert worse.aliases.best.kept is None and worse.aliases.best.run_key == "run1"
    assert seeds(registered(row, storage, {0: 0.61}, run="recipe3-")) == {"best": (5, 0), "median": (5, 0)}


def test_of_equal_seeds_the_best_and_the_median_have_an_alias_each(
    row: Row, storage: Path, registry: MlflowClient
) -> None:
    assert seeds(registered(row, storage, {0: 0.5, 1: 0.5})) == {"best": (1, 1), "median": (2, 0)}
    assert seeds(registered(row, storage, {0: 0.5, 1: 0.5})) == {"best": (1, 1), "median": (2, 0)}
    assert seeds(registered(row, storage, {0: 0.5}, run="again")) == {"best": (3, 0), "median": (3, 0)}


def test_a_figure_of_other_data_takes_the_alias_only_by_force(row: Row, storage: Path, registry: MlflowClient) -> None:
    registered(row, storage, {0: 0.5}, digest="old")
    result = registered(row, storage, {0: 0.9}, run="new", digest="new")
    assert seeds(result) == {"best": (1, 0), "median": (2, 0)}
    assert (result.aliases.best.kept or "").startswith("version 1 keeps the alias best: its figure was measured on")
    forced = registered(row, storage, {0: 0.3}, run="third", digest="new", force=True)
    assert seeds(forced) == {"best": (2, 0), "median": (3, 0)}  # the best on the new data
    assert forced.aliases.best.kept is None
    back = registered(row, storage, {0: 0.95}, run="fourth", digest="old")
    assert back.aliases.best.version == 2 and back.aliases.best.kept


def test_another_figure_is_not_comparable(row: Row, storage: Path, registry: MlflowClient) -> None:
    registered(row, storage, {0: 0.5}, digest="same")
    panoptic = dataclasses.replace(row, task="panoptic")
    result = registered(panoptic, storage, {0: 0.9}, run="panoptic", digest="same")
    assert result.aliases.best.version == 1 and result.aliases.best.kept


def test_an_alias_that_somebody_gave_to_a_version_of_their_own_is_kept(
    row: Row, storage: Path, registry: MlflowClient
) -> None:
    registered(row, storage, {0: 0.5})
    own = registry.create_model_version("odd-semantic", source=str(storage))
    registry.set_registered_model_alias("odd-semantic", "best", own.version)
    result = registered(row, storage, {0: 0.6}, run="next")
    best = result.aliases.best
    assert best.kept and dataclasses.replace(best, kept=None) == BestVersion(
        version=2, seed=None, run_key=None, figure=None, value=None
    )


def test_a_deleted_version_is_out_of_the_running(row: Row, storage: Path, registry: MlflowClient) -> None:
    registered(row, storage, {0: 0.5, 1: 0.6})
    registry.delete_model_version("odd-semantic", "1")
    assert seeds(registered(row, storage, {0: 0.5})) == {"best": (2, 0), "median": (2, 0)}


# Interrupted


def logged_models(client: MlflowClient) -> list[str]:
    """Names of all logged models, whatever their state."""
    experiment = client.get_experiment_by_name("mask2former")
    return [model.name for model in client.search_logged_models([experiment.experiment_id])] if experiment else []


def model_folders(storage: Path) -> int:
    return len(list((storage / "mlflow").glob("*/models/*")))


@pytest.mark.parametrize("call", ["log_model_artifacts", "finalize_logged_model", "create_model_version"])
def test_an_interrupted_registration_leaves_nothing(
    call: str, row: Row, storage: Path, registry: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(MlflowClient, call)

    def interrupted(*arguments: Any, **named: Any) -> None:
        if call == "log_model_artifacts":
            original(*arguments, **named)  # its files are there
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowClient, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        registered(row, storage, {0: 0.5})
    assert registry.search_registered_models() == [] and logged_models(registry) == []
    assert model_folders(storage) == 0
    monkeypatch.setattr(MlflowClient, call, original)
    assert seeds(registered(row, storage, {0: 0.5})) == {"best": (1, 0), "median": (1, 0)}
    assert logged_models(registry) == ["odd-semantic"] and model_folders(storage) == 1


@pytest.mark.parametrize("call", ["log_model_artifacts", "create_registered_model", "create_model_version"])
def test_a_registration_that_is_killed_is_whole_after_the_next_one(
    call: str, row: Row, storage: Path, registry: MlflowClient
) -> None:
    if (child := os.fork()) == 0:
        original = getattr(MlflowClient, call)

        def last(*arguments: Any, **named: Any) -> None:
            original(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(MlflowClient, call, last)
        try:
            registered(row, storage, {0: 0.5})
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert seeds(registered(row, storage, {0: 0.5})) == {"best": (1, 0), "median": (1, 0)}
    (version,) = registry.search_model_versions("name = 'odd-semantic'")
    assert logged_models(registry) == ["odd-semantic"] and model_folders(storage) == 1
    tags = registry.get_logged_model(version.source.removeprefix("models:/")).tags
    assert "m2f.registering" not in tags
    assert json.loads(tags["mlflow.modelVersions"]) == [{"name": "odd-semantic", "version": version.version}]


def test_what_a_killed_registration_has_left_is_cleaned_up_by_the_next_one_and_what_another_makes_is_not(
    row: Row, storage: Path, registry: MlflowClient
) -> None:
    registry.create_registered_model("odd-semantic", tags={"row": row.name})
    experiment = experiment_id(registry)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    parent = psutil.Process().parent()
    assert parent is not None
    here = {"node": socket.gethostname()}
    owners = {
        "killed": {**here, "process": ended.pid, "started_s": 1.0},
        "alive": {**here, "process": parent.pid, "started_s": parent.create_time()},
        "elsewhere": {"node": "another-host", "process": 1, "started_s": 1.0},
    }
    for name, owner in owners.items():
        tags = {"m2f.registering": json.dumps(owner), "who": name}
        registry.create_logged_model(experiment, name="odd-semantic", tags=tags)
    registered(row, storage, {0: 0.5})
    left = registry.search_logged_models([experiment])
    assert sorted(model.tags.get("who", "ours") for model in left) == ["alive", "elsewhere", "ours"]
    assert versions(registry) == [1]


def test_a_moved_storage_root_ends_a_registration_with_what_to_do(
    row: Row, storage: Path, registry: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(row, storage, {0: 0.5})
    moved = storage.with_name("moved")
    storage.rename(moved)
    monkeypatch.setenv("M2F_STORAGE", str(moved))
    said = f"^row odd_semantic could not be registered at sqlite:.*: it keeps files below {storage}, but the storage "
    with pytest.raises(ValueError, match=said):
        registered(row, moved, {0: 0.5})


# Several at once, and no server


def test_a_better_version_that_appears_meanwhile_gets_the_alias(
    row: Row, storage: Path, registry: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_alias = MlflowClient.set_registered_model_alias
    others: list[str] = []

    def slowly(client: MlflowClient, name: str, alias: str, version: str) -> None:
        if alias == "best" and not others:  # another process registers and names its version before we do
            tags = {**client.get_model_version(name, version).tags, "miou": "90", "digest": "other"}
            others.append(client.create_model_version(name, source=str(storage), tags=tags).version)
            set_alias(client, name, "best", others[0])
        set_alias(client, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", slowly)
    assert registered(row, storage, {0: 0.5}).aliases.best.value == 0.9
    assert registry.get_model_version_by_alias("odd-semantic", "best").version == others[0]


def test_of_two_versions_of_a_checkpoint_that_are_made_at_once_the_first_stays(
    row: Row, storage: Path, registry: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = MlflowClient.create_model_version
    sources: list[str] = []

    def slowly(client: MlflowClient, name: str, source: str, **given: Any) -> Any:
        if not sources:  # another process makes a version of the same checkpoint before we do
            create(client, name, str(storage), tags=given["tags"])
        sources.append(source)
        return create(client, name, source, **given)

    monkeypatch.setattr(MlflowClient, "create_model_version", slowly)
    assert seeds(registered(row, storage, {0: 0.5})) == {"best": (1, 0), "median": (1, 0)}
    assert versions(registry) == [1]
    with pytest.raises(MlflowException, match="not found"):
        registry.get_logged_model(sources[0].removeprefix("models:/"))


AT_ONCE = """
import json, sys, time
from pathlib import Path
import mlflow, torch
from pipeline.params.parse import parse
from pipeline.params.schema import DatasetConfig, Params, Row
from pipeline.registry.register import register
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.rows import Evaluation, TrainingResult
given = json.loads(Path(sys.argv[1]).read_text())
manifest = parse(Manifest, given["manifest"], "manifest")
Path(sys.argv[1]).with_suffix(".ready").touch()
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
evaluated = parse(Evaluation, given["evaluated"], "evaluated")
trained = parse(TrainingResult, given["trained"], "trained")
row = parse(Row, given["row"], "row")
register(row, manifest=manifest, weights_terms="", evaluated=evaluated, trained=trained)
"""


@pytest.mark.slow
@pytest.mark.long
def test_two_registrations_at_once_make_one_version_of_each_checkpoint_and_agree_on_the_best(
    row: Row, storage: Path, registry: MlflowClient, tmp_path: Path
) -> None:
    manifest = manifest_of(storage, sizes=[(64, 96)])
    values: list[dict[int, float | str]] = [{0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6, 2: 0.7}]
    processes = []
    for number, given in enumerate(values):
        results = results_of(row, storage, given)
        facts = {
            "row": dataclasses.asdict(row),
            "manifest": dataclasses.asdict(manifest),
            "evaluated": dataclasses.asdict(results["evaluated"]),
            "trained": dataclasses.asdict(results["trained"]),
        }
        (tmp_path / f"{number}.json").write_text(json.dumps(facts))
        command = [sys.executable, "-c", AT_ONCE, str(tmp_path / f"{number}.json"), str(tmp_path / "go")]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
        (tmp_path / "go").touch()
        for process in processes:
            _, errors = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = registry.search_model_versions("name = 'odd-semantic'")
    assert sorted(version.tags["seed"] for version in found) == ["0", "1", "2"]
    assert registry.get_model_version_by_alias("odd-semantic", "best").tags["seed"] == "2"


@pytest.mark.parametrize("answers", [False, True], ids=["nobody listens", "it takes calls and never answers"])
def test_without_a_server_registration_fails_soon_with_a_sentence(
    answers: bool, row: Row, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if answers:
            listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{address}")
        mlflow_client()
        attempts: list[float] = []
        connect = connection.create_connection

        def noted(address: tuple[str, int], timeout: float, *others: Any, **more: Any) -> socket.socket:
            attempts.append(timeout)
            return connect(address, timeout, *others, **more)

        monkeypatch.setattr(connection, "create_connection", noted)
        with pytest.raises(ValueError, match="could not be registered") as raised:
            registered(row, storage, {0: 0.5})
    assert attempts == [6.0]  # seconds for one attempt, where MLflow's own settings make 8 of 120 s
    said = str(raised.value)
    assert said.startswith(f"row odd_semantic could not be registered at http://{address} (")
    assert said.endswith("start the server or set MLFLOW_TRACKING_URI, then run: dvc repro register@odd_semantic")
    assert "secret" not in said and "\n" not in said


# Of a published checkpoint


@pytest.mark.slow
def test_a_published_checkpoint_is_a_model_of_its_own_and_found_again(
    registry: MlflowClient, row: Row, storage: Path
) -> None:
    figures = PaddedEvaluation(pad_multiple=1, checkpoint=checkpoint(row.task, 0.53, step=2), difference={})
    result = published_evaluation(row.name, figures, task=row.task, checkpoint=f"{row.name}_authors")
    manifest = manifest_of(storage, sizes=[(64, 96)])
    with pytest.raises(ValueError, match="is missing from .* dvc repro -f published@odd_semantic_authors"):
        register_published(row, result, manifest=manifest)
    folder = storage / "runs" / f"published-{result.sha256[:16]}"
    save_model(folder, step=2, run_key=folder.name, tensors=decided_network(row, 3).state_dict())
    for _ in range(2):
        name, version = register_published(row, result, manifest=manifest, terms="CC BY-NC 4.0")
        assert (name, version.version, version.seed, version.value) == ("odd-semantic-authors-published", 1, None, 0.53)
    found = registry.get_model_version_by_alias(name, "published")
    assert found.tags["url"] == result.url and found.tags["licence"].endswith("initial weights: CC BY-NC 4.0")
    assert "mIoU 53.00" in found.description and "published checkpoint of odd_semantic" in found.description
    assert versions(registry, name) == [1] and versions(registry) == []  # nothing of the row's own model
    dataset = DatasetConfig(layout="folder", class_names=CLASSES, thing_classes=("car",))
    params = Params(datasets={"mine": dataset}, rows={row.name: row})
    network = open_source(f"models:/{name}@published", params=params).network
    expected = decided_network(row, 3).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
