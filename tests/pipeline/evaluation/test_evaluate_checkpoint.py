"""One evaluation: found again, gone on with, and shared, always with the same figures."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m2f import build_model
from pipeline.compute.resources import Resources
from pipeline.evaluation import evaluate_checkpoint
from pipeline.evaluation.evaluate_checkpoint import Job, evaluate, evaluation_key, finished_evaluation, parts_of
from pipeline.evaluation.published import CODES
from pipeline.evaluation.task_metrics import measure, predict_images
from pipeline.params.schema import Row
from pipeline.provenance.code import Code
from pipeline.runs.checkpoints import save_model
from pipeline.storage.files import sha256
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.rows import EvaluatedCheckpoint
from tests.helpers.mutations import Project, other_comments
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import until

RUN = "0123456789abcdef"

ALONE = Resources(workers=0, use_gpu=False, cpus_per_worker=1, loader_processes=0, groups_at_once=None)

STEPS = 2


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """(storage root, manifest) of 2 training and 12 validation pictures of 64 x 96."""
    from pipeline.data.fetch import fetch, open_sources
    from pipeline.data.shards.build import build
    from pipeline.params.load import load_params

    root = tmp_path_factory.mktemp("many") / "storage"
    shapes = load_params(PROJECT / "params.yaml").dataset("shapes")
    config = dataclasses.replace(shapes, generate={"train": 2, "val": 12, "height": 64, "width": 96, "seed": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M2F_STORAGE", str(root))
        fetched = fetch("shapes", config, base=PROJECT)
        return root, build("shapes", config, open_sources(fetched), facts=fetched.sources, processes=0)


@pytest.fixture
def job(many_images: tuple[Path, Manifest], small_row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The evaluation of a fresh network of the small row, in a storage root of the test's own."""
    shutil.copytree(many_images[0], tmp_path / "storage")
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "storage"))
    torch.manual_seed(0)
    # sure of what it predicts, so that something is found and matched
    row = dataclasses.replace(small_row, test=dataclasses.replace(small_row.test, score_threshold=0.0))
    model = build_model(row.model)
    path = save_model(tmp_path / "storage/runs" / RUN, step=STEPS, run_key=RUN, tensors=model.state_dict())
    return made(row, many_images[1], path)


def made(row: Row, manifest: Manifest, path: Path) -> Job:
    digest = sha256(path)
    return Job(
        row=row,
        manifest=manifest,
        checkpoint=path,
        sha256=digest,
        run_key=RUN,
        step=STEPS,
        run_dir=path.parent.parent,
        key=evaluation_key(row, manifest, sha256=digest, device="cpu"),
        what="a test",
        processes=0,
    )


def undisturbed(job: Job) -> tuple[EvaluatedCheckpoint, bytes]:
    """The figures, and the confusions, of an evaluation that nothing interrupts; nothing of it is left."""
    result = evaluate(job, ALONE)
    confusions = (job.folder / "confusion.json").read_bytes()
    shutil.rmtree(job.folder)
    return result, confusions


def count_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places of all pictures that are predicted from now on."""
    seen: list[int] = []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        for val_image, predictions in predict_images(*arguments, **keywords):
            seen.append(val_image.index)
            yield val_image, predictions

    monkeypatch.setattr("pipeline.evaluation.task_metrics.predict_images", counted)
    return seen


@pytest.mark.parametrize(
    ("workers", "address", "on_ray"), [(0, "head:6379", False), (1, "", False), (1, "head:6379", True), (2, "", True)]
)
def test_one_worker_of_a_cluster_is_not_this_process_which_may_have_no_gpu(
    job: Job, workers: int, address: str, on_ray: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    asked: list[str] = []

    def end(name: str) -> None:
        asked.append(name)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(evaluate_checkpoint, "_make_with_ray", lambda *_: end("ray"))
    monkeypatch.setattr(evaluate_checkpoint, "make_parts", lambda *_: end("here"))
    with pytest.raises(ValueError, match=r"^a test: the GPU has no memory for a validation image; .*allocate 2 GiB"):
        evaluate(job, dataclasses.replace(ALONE, workers=workers))
    assert asked == ["ray" if on_ray else "here"]


def test_a_gpu_that_torch_cannot_use_ends_an_evaluation_in_a_sentence(job: Job, old_driver: None) -> None:
    with pytest.raises(ValueError, match=r"cannot use the GPU of host .* \(.*driver .* is too old.*; install a newer"):
        evaluate(job, dataclasses.replace(ALONE, use_gpu=True))


# Parts


@pytest.mark.parametrize(
    ("records", "size"), [(1, 1), (12, 1), (130, 2), (500, 7), (2000, 31), (5000, 64), (90000, 64)]
)
def test_parts_are_runs_of_neighbours_that_hold_every_picture_once(records: int, size: int) -> None:
    parts = parts_of(records)
    assert [place for part in parts for place in part] == list(range(records))
    assert {len(part) for part in parts[:-1]} <= {size} and len(parts[-1]) <= size


# Finished work


def test_a_finished_evaluation_is_found_and_no_picture_is_predicted_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_images(monkeypatch)
    first = evaluate(job, ALONE)
    assert seen == list(range(12)) and first.figures["pq"] is not None
    expected = measure(network(job), job.manifest, job.row)
    assert (first.figures, first.step, first.key) == (expected.figures(), STEPS, job.key)
    assert not (job.folder / "parts").exists()
    seen.clear()
    job.checkpoint.unlink()  # not even the checkpoint is looked at
    assert evaluate(job, ALONE) == first and seen == []


def network(job: Job) -> torch.nn.Module:
    from pipeline.runs.checkpoints import load_checkpoint

    model = build_model(job.row.model)
    load_checkpoint(job.checkpoint, model=model)
    return model


def test_other_test_settings_are_another_evaluation_and_the_first_is_found_when_they_come_back(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_images(monkeypatch)
    first = evaluate(job, ALONE)
    test = dataclasses.replace(job.row.test, short_side=32)
    other = made(dataclasses.replace(job.row, test=test), job.manifest, job.checkpoint)
    assert other.key != job.key and evaluate(other, ALONE).figures != first.figures
    assert len(seen) == 24
    assert evaluate(job, ALONE) == first and len(seen) == 24


@pytest.mark.slow
def test_a_result_that_is_torn_altered_or_not_whole_is_made_again(job: Job) -> None:
    first = evaluate(job, ALONE)
    path = job.folder / "result.json"
    content = json.loads(path.read_text())
    assert finished_evaluation(job.folder, "panoptic") == first
    for wrong in (
        '{"key": "',
        json.dumps({**content, "more": 1}),  # another version's
        json.dumps({**content, "key": "0" * 16}),
        json.dumps({**content, "figures": {}}),
        json.dumps({**content, "figures": {**content["figures"], "pq": 0.125}}),
    ):
        path.write_text(wrong)
        assert finished_evaluation(job.folder, "panoptic") is None
    assert evaluate(job, ALONE) == first
    (job.folder / "figures.json").write_text("{")
    assert finished_evaluation(job.folder, "panoptic") is None
    assert evaluate(job, ALONE) == first
    shutil.rmtree(job.folder / "overlays")
    assert finished_evaluation(job.folder, "panoptic") is None
    assert evaluate(job, ALONE) == first and len(evaluate_checkpoint.overlays_of(job.folder)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "{}", "[]", '{"semantic": 1, "panoptic": 2, "instance": 3}'])
def test_a_part_that_was_altered_is_deleted_with_a_sentence_and_made_anew(job: Job, text: str) -> None:
    expected, _ = undisturbed(job)
    part = job.folder / "parts" / "000003-000003.json"
    part.parent.mkdir(parents=True)
    part.write_text(text)
    with pytest.raises(
        ValueError, match=r"000003-000003\.json was altered .* and is deleted; run the same command again"
    ):
        evaluate(job, ALONE)
    assert evaluate(job, ALONE) == expected


def test_everything_that_decides_a_figure_is_in_the_key(job: Job) -> None:
    row, manifest = job.row, job.manifest

    def key(row: Row = row, manifest: Manifest = manifest, **changed: Any) -> str:
        return evaluation_key(row, manifest, **{"sha256": job.sha256, "device": "cpu", **changed})

    model = dataclasses.replace(row.model, query_decoder=dataclasses.replace(row.model.query_decoder, queries=13))
    tf32 = dataclasses.replace(row, train=dataclasses.replace(row.train, tf32="all"))
    others = {
        key(sha256="another"),
        key(device="cuda"),
        key(row=dataclasses.replace(row, model=model)),
        key(row=dataclasses.replace(row, task="instance")),
        key(row=dataclasses.replace(row, test=dataclasses.replace(row.test, max_instances=7))),
        key(row=dataclasses.replace(row, test=dataclasses.replace(row.test, precision="bf16"))),
        key(manifest=dataclasses.replace(manifest, digest="another")),
        key(row=tf32, device="cuda"),
        key(code=Code(roots=("m2f.model.build_model",))),
    }
    assert len(others) == 9 and key() not in others
    # TF32 means nothing on a CPU, and what a row is called or trained with is in its checkpoint
    assert key(row=tf32) == key()
    assert key(row=dataclasses.replace(row, name="b", seeds=(7,), published={"pq": 1.0}, max_gpu_hours=9.0)) == key()


def test_compiled_kernels_that_cannot_be_had_are_one_sentence_with_the_row(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2f.kernels.build._tried", lambda: "there is no C compiler (cc, gcc, clang)")
    row = dataclasses.replace(job.row, train=dataclasses.replace(job.row.train, kernels="compiled"))
    with pytest.raises(ValueError, match=rf"^rows\.{row.name}\.train\.kernels is compiled, but there is no C compiler"):
        evaluation_key(row, job.manifest, sha256=job.sha256, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("code", [evaluate_checkpoint.CODE, *CODES.values()], ids=["evaluate", *CODES])
def test_comments_in_every_file_that_evaluation_reaches_keep_every_key(code: Code) -> None:
    project = Project(code)
    modules = set(project.definitions)
    assert {
        "pipeline.evaluation.predict",
        "pipeline.evaluation.task_metrics",
        "m2f.inference.panoptic",
        "m2f.metrics.panoptic",
        "m2f.model",
    } <= modules
    texts = {}
    for module in modules:
        change = other_comments(project, module)
        assert change is not None
        texts |= change.texts
    assert project.digest(texts) == project.written.digest
    inference = project.text("m2f.inference.panoptic").replace(">=", ">")
    assert project.digest({"m2f.inference.panoptic": inference}) != project.written.digest


# Interrupted and shared work


DRIVER = """
import pickle, sys, time
from pathlib import Path

from pipeline.evaluation import evaluate_checkpoint as evaluation
from tests.pipeline.evaluation.test_evaluate_checkpoint import ALONE

job, pause_after, ready, go, out = pickle.loads(Path(sys.argv[1]).read_bytes())
write, parts = evaluation.write_json, []

def counted(path, value):
    write(path, value)
    parts.append(path)
    if len(parts) == pause_after:
        Path(ready).touch()
        time.sleep(3600)

evaluation.write_json = counted
if go:
    Path(ready).touch()
    while not Path(go).exists():
        time.sleep(0.01)
Path(out).write_bytes(pickle.dumps(evaluation.evaluate(job, ALONE)))
"""


@pytest.fixture
def start(job: Job, tmp_path: Path) -> Any:
    """Starts the evaluation in a process of its own; gives it and the files that say it is ready and what it found."""
    processes: list[subprocess.Popen[bytes]] = []
    (tmp_path / "driver.py").write_text(DRIVER)

    def begin(name: str, *, pause_after: int = 0, go: Path | None = None) -> tuple[subprocess.Popen[bytes], Path, Path]:
        ready, out = tmp_path / f"{name}.ready", tmp_path / f"{name}.out"
        (tmp_path / f"{name}.job").write_bytes(pickle.dumps((job, pause_after, str(ready), go and str(go), str(out))))
        with open(tmp_path / f"{name}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / f"{name}.job")],
                    cwd=PROJECT,
                    env={**os.environ, "PYTHONPATH": str(PROJECT)},
                    stdout=log,
                    stderr=log,
                )
            )
        return processes[-1], ready, out

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def wait_for(path: Path, process: subprocess.Popen[bytes], folder: Path) -> None:
    def said() -> str:
        return "\n".join(log.read_text() for log in folder.glob("*.log"))

    until(path.exists, ended=lambda: process.poll() is not None, said=said)


@pytest.mark.slow
def test_after_sigkill_only_what_was_not_finished_is_evaluated_again_with_equal_figures(
    job: Job, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, confusions = undisturbed(job)
    process, ready, _ = start("killed", pause_after=7)
    wait_for(ready, process, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen = count_images(monkeypatch)
    assert evaluate(job, ALONE) == expected
    assert seen == list(range(7, 12))
    assert (job.folder / "confusion.json").read_bytes() == confusions


@pytest.mark.slow
def test_two_evaluations_at_once_find_the_same_figures_and_leave_one_result(
    job: Job, start: Callable[..., Any], tmp_path: Path
) -> None:
    expected, confusions = undisturbed(job)
    go = tmp_path / "go"
    begun = [start(name, go=go) for name in ("one", "two")]
    for process, ready, _ in begun:
        wait_for(ready, process, tmp_path)
    go.touch()
    for process, _, out in begun:
        wait_for(out, process, tmp_path)
        process.wait()
        assert pickle.loads(out.read_bytes()) == expected
    assert finished_evaluation(job.folder, "panoptic") == expected
    assert (job.folder / "confusion.json").read_bytes() == confusions
    assert [path.name for path in job.folder.rglob("*.part")] == []
