"""The loop's promises: exact resume, the same samples and losses on any number of workers, divergence is final."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from m2f.config import BackboneConfig, Kernels
from m2f.kernels.build import loops, use
from m2f.losses import Divergence
from pipeline.data.loader.train_batches import TrainingOrder, training_batches
from pipeline.params.schema import Row
from pipeline.provenance.environment import Environment
from pipeline.runs.checkpoints import checkpoint_path, newest_checkpoint
from pipeline.runs.curve_file import read_curve
from pipeline.runs.outcome import note_of
from pipeline.runs.run import Run
from pipeline.storage.results.data import Manifest
from pipeline.training import loop
from pipeline.training import step as train_step
from pipeline.training.loop import train
from pipeline.training.worker import Worker
from tests.helpers import golden


@pytest.fixture
def make_run(small_manifest: Manifest, small_row: Row, tmp_path: Path) -> Callable[..., Run]:
    """A Run of the small row in a folder of its own; keywords replace its fields."""

    def make(name: str, row: Row = small_row, **fields: Any) -> Run:
        values: dict[str, Any] = {
            "row": row,
            "seed": 5,
            "run_key": name,
            "run_dir": tmp_path / name,
            "manifest": small_manifest,
        }
        return Run(**(values | fields))

    return make


def weights_of(run: Run, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint_path(run.run_dir, step))


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Interrupted(Exception):
    """Stands for a kill between two steps."""


def stop_before_step(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """The loop dies when it computes the learning rate of `stop` for the first time."""
    original = train_step.learning_rate_factor
    armed = True

    def factor(step: int, **keywords: Any) -> float:
        nonlocal armed
        if step == stop and armed:
            armed = False
            raise Interrupted
        return original(step, **keywords)

    monkeypatch.setattr(train_step, "learning_rate_factor", factor)


def with_swin(row: Row) -> Row:
    """The row on a small Swin with drop path."""
    backbone = BackboneConfig(name="swin-tiny", drop_path_rate=0.3)
    return dataclasses.replace(row, model=dataclasses.replace(row.model, backbone=backbone))


@pytest.mark.parametrize(("stop", "swin"), [(1, False), (5, False), (5, True)])
def test_an_interrupted_run_ends_with_the_same_bits_as_an_undisturbed_one(
    make_run: Callable[..., Run], small_row: Row, monkeypatch: pytest.MonkeyPatch, stop: int, swin: bool
) -> None:
    row = with_swin(small_row) if swin else small_row
    undisturbed, interrupted = make_run("undisturbed", row=row), make_run("interrupted", row=row)
    train(undisturbed)
    stop_before_step(monkeypatch, stop)
    with pytest.raises(Interrupted):
        train(interrupted)
    # checkpoints are written after 2, 3 (validation), 4 and 6 steps
    newest = newest_checkpoint(interrupted.run_dir)
    assert newest == (None if stop == 1 else checkpoint_path(interrupted.run_dir, 4))
    train(interrupted)
    assert_same_bits(weights_of(undisturbed, 6), weights_of(interrupted, 6))
    one, other = (read_curve(run.run_dir / "curve.jsonl") for run in (undisturbed, interrupted))
    assert [without_time(point) for point in one] == [without_time(point) for point in other]
    assert [point["step"] for point in one] == [1, 2, 3, 4, 5, 6]


def kernels_of(run: Run) -> str | None:
    """What the run's environment.json names."""
    noted = note_of(run.run_dir, Environment)
    assert noted is not None
    return noted.kernels


def with_kernels(row: Row, kernels: Kernels) -> Row:
    return dataclasses.replace(row, train=dataclasses.replace(row.train, kernels=kernels))


@pytest.fixture
def any_kernels() -> Iterator[None]:
    """Leaves the process with the kernels that it began with."""
    yield
    use("auto")


@pytest.mark.usefixtures("any_kernels")
def test_a_run_keeps_the_kernels_that_it_began_with(
    make_run: Callable[..., Run], small_row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = make_run("run", row=with_kernels(small_row, "plain"))
    stop_before_step(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(begun)
    assert kernels_of(begun) == "plain"
    # the same run, where auto would be compiled: both settings give one run only here, for a key has the setting
    train(make_run("run", row=with_kernels(small_row, "auto")))
    assert kernels_of(begun) == "plain"


@pytest.mark.skipif(loops() is None, reason="needs a C compiler")
@pytest.mark.usefixtures("any_kernels")
def test_a_run_that_began_with_compiled_kernels_does_not_go_on_without_a_compiler(
    make_run: Callable[..., Run], small_row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("run", row=small_row)
    stop_before_step(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(run)
    assert kernels_of(run) == "compiled"

    monkeypatch.setattr("m2f.kernels.build._tried", lambda: "there is no C compiler (cc, gcc, clang)")
    with pytest.raises(
        ValueError,
        match=r"train.kernels is compiled, but there is no C compiler [^;]*; the run began with them and keeps",
    ):
        train(run)
    assert newest_checkpoint(run.run_dir) == checkpoint_path(run.run_dir, 4)


def without_time(point: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name not in ("time_ms", "time")}


def test_newest_and_best_checkpoint_are_kept_and_a_finished_run_is_not_trained_again(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("run")
    result = train(run)
    assert result is not None
    kept = {int(path.stem.split("-")[1]) for path in (run.run_dir / "checkpoints").iterdir()}
    assert kept == {6, result.checkpoints.best.step}
    best = max(
        (point for point in read_curve(run.run_dir / "curve.jsonl") if "val_pq" in point), key=lambda p: p["val_pq"]
    )
    assert result.checkpoints.best.figure == "pq"
    assert result.checkpoints.best.value == best["val_pq"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "build", None)  # a training would call it
        assert train(run) == result


def test_a_finished_run_whose_checkpoint_is_gone_is_trained_again_to_the_same_bits(
    make_run: Callable[..., Run],
) -> None:
    run = make_run("run")
    result = train(run)
    before = weights_of(run, 6)
    for path in (run.run_dir / "checkpoints").iterdir():
        path.unlink()
    again = train(run)
    assert_same_bits(before, weights_of(run, 6))
    # the files' digests differ: their headers say how long the training took
    assert again is not None and result is not None
    assert again.checkpoints.best.step == result.checkpoints.best.step and again.metrics == result.metrics


def _trained(rank: int, size: int, run: Run, address: Path) -> None:
    """One of several workers, in a process of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=size)
    try:
        train(run)
    finally:
        torch.distributed.destroy_process_group()


def train_on(workers: int, run: Run) -> None:
    run.run_dir.mkdir(parents=True)
    mp.spawn(_trained, args=(workers, run, run.run_dir / "rendezvous"), nprocs=workers)


@pytest.mark.parametrize(
    "swin", [pytest.param(False, marks=pytest.mark.full), pytest.param(True, marks=pytest.mark.long)]
)
def test_one_two_and_three_workers_see_the_same_samples_and_the_same_first_ten_losses(
    make_run: Callable[..., Run], small_row: Row, swin: bool
) -> None:
    # 4 groups on 3 workers are shared 2, 1, 1. A low learning rate keeps rounding from growing over the ten steps.
    small_row = with_swin(small_row) if swin else small_row
    slow_row = dataclasses.replace(
        small_row,
        train=dataclasses.replace(
            small_row.train,
            steps=10,
            val_interval=10,
            optimizer=dataclasses.replace(small_row.train.optimizer, lr=1e-6),
        ),
    )
    curves = {}
    for workers in (1, 2, 3):
        run = make_run(f"on{workers}", row=slow_row)
        train_on(workers, run)
        curves[workers] = read_curve(run.run_dir / "curve.jsonl")
    for workers in (2, 3):
        for alone, shared in zip(curves[1], curves[workers], strict=True):
            for name in ("loss", "loss_class", "aux0.loss_mask", "aux1.loss_dice"):
                assert shared[name] == pytest.approx(alone[name], rel=1e-5), (workers, alone["step"], name)
        assert curves[workers][0]["grad_norm"] == pytest.approx(curves[1][0]["grad_norm"], rel=1e-4)
        for name in ("val_miou", "val_pq", "val_ap"):  # counted by all workers, merged on the first
            assert curves[workers][-1][name] == pytest.approx(curves[1][-1][name], abs=1e-3)


def build(run: Run) -> train_step.Training:
    """The run's training before its first step, as `train` builds it."""
    return train_step.build(run.row, Worker.here(), seed=run.seed, groups_at_once=run.groups_at_once)


def order(run: Run) -> TrainingOrder:
    """The run's order, with its pictures' segments by class."""
    augmentation = run.row.train.augmentation
    return TrainingOrder(manifest=run.manifest, augmentation=augmentation, seed=run.seed, global_batch=4)


def test_taking_groups_one_at_a_time_changes_only_rounding(make_run: Callable[..., Run]) -> None:
    runs = [make_run("all"), make_run("one", groups_at_once=1)]
    gradients = []
    for run in runs:
        training = build(run)
        batches = training_batches(order(run), first_step=0, steps=1, image_range=range(4))
        losses = train_step.backward(training, next(iter(batches)))
        gradients.append((training.gradients, sum(losses.values())))
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradients[0][0], gradients[1][0], rtol=1e-3, atol=1e-4 * gradients[0][0].abs().max().item()
    )


def test_a_non_finite_loss_stops_the_run_for_good_and_says_where(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("run")
    original = loop.build

    def poisoned(*arguments: Any, **keywords: Any) -> Any:
        training = original(*arguments, **keywords)
        with torch.no_grad():
            training.model.query_decoder.class_head.bias[0] = float("nan")
        return training

    monkeypatch.setattr(loop, "build", poisoned)
    with pytest.raises(Divergence, match="row small, seed 5 diverged in step 0"):
        train(run)
    note = json.loads((run.run_dir / "diverged.json").read_text())
    assert note["step"] == 0 and note["positions"] == [0, 1, 2, 3]
    assert not (run.run_dir / "finished.json").exists() and newest_checkpoint(run.run_dir) is None
    monkeypatch.undo()
    with pytest.raises(Divergence, match="diverged in step 0"):  # a healthy retry is refused as well
        train(run)


def test_a_non_finite_gradient_is_found_before_anything_is_saved(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("run")
    original = train_step.backward
    steps = 0

    def poisoned(training: train_step.Training, batch: Any) -> Any:
        nonlocal steps
        losses = original(training, batch)
        steps += 1
        if steps == 2:  # step 1, after which a checkpoint is due
            next(training.model.parameters()).grad.fill_(float("inf"))
        return losses

    monkeypatch.setattr(train_step, "backward", poisoned)
    with pytest.raises(Divergence, match="diverged in step 1: the gradient's norm is inf"):
        train(run)
    assert json.loads((run.run_dir / "diverged.json").read_text())["positions"] == [4, 5, 6, 7]
    assert newest_checkpoint(run.run_dir) is None


def test_a_picture_with_no_labelled_pixel_trains_like_any_other(make_run: Callable[..., Run]) -> None:
    run = make_run("run")
    training = build(run)
    batches = training_batches(order(run), first_step=0, steps=1, image_range=range(4))
    batch = next(iter(batches))
    nothing = tuple(labels[:0] for labels in batch.labels)
    for labels in (batch.labels[:3] + nothing[3:], nothing):
        segments = batch.segments.clone()
        segments[len(labels) - sum(len(x) == 0 for x in labels) :] = 255
        training.gradients.zero_()
        losses = train_step.backward(training, dataclasses.replace(batch, segments=segments, labels=labels))
        assert all(torch.isfinite(value) for value in losses.values())
        assert torch.isfinite(training.gradients).all() and training.gradients.abs().sum() > 0
    assert losses["loss_mask"] == 0  # no masks at all: only "no object" is learnt


def test_a_run_that_would_cost_more_gpu_hours_than_allowed_stops_with_the_estimate(
    make_run: Callable[..., Run],
) -> None:
    run = make_run("run")
    worker = Worker(0, 8, torch.device("cpu"))
    # 6 steps of 900 s on 8 GPUs: 12 hours, allowed are 8
    with pytest.raises(ValueError, match=r"about 12.0 GPU-hours .* set rows.small.max_gpu_hours \(now 8\) above that"):
        loop.refuse_if_too_long(run, worker, seconds_per_step=900)
    loop.refuse_if_too_long(run, worker, seconds_per_step=500)


def test_a_training_is_estimated_by_its_steps_6_to_20_not_by_its_start() -> None:
    # a start of 100 s, 5 steps of 10 s, and then 2 s each: 2 s, as all later steps
    now_s = 100.0
    step_time = loop.StepTime(clock=lambda: now_s)
    found = {}
    for steps in range(1, 31):
        now_s += 10.0 if steps <= 5 else 2.0
        if (seconds := step_time.after(steps)) is not None:
            found[steps] = seconds
    assert found == {20: 2.0}


def test_batch_statistics_cannot_be_accumulated(make_run: Callable[..., Run], small_row: Row) -> None:
    backbone = dataclasses.replace(small_row.model.backbone, name="r50", batch_statistics=True)
    row = dataclasses.replace(small_row, model=dataclasses.replace(small_row.model, backbone=backbone))
    run = make_run("run", row=row, groups_at_once=1)
    with pytest.raises(ValueError, match="statistics of the whole step, so its groups cannot be taken 1 at a time"):
        train(run)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(storage root, manifest) of the dataset of params.yaml."""
    root = tmp_path_factory.mktemp("shapes") / "storage"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M2F_STORAGE", str(root))
        return root, golden.make_shards()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", golden.SEEDS)
def test_the_first_steps_of_a_real_row_follow_the_recorded_losses(
    shapes: tuple[Path, dict[str, Any]], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A change that is meant to leave the numbers alone leaves all six digits; CONTRIBUTING says how to record others.
    monkeypatch.setenv("M2F_STORAGE", str(shapes[0]))
    losses, recorded = golden.trajectory(seed, shapes[1], tmp_path).losses, golden.recorded()
    if recorded["made_on"] == golden.made_on():
        assert losses == recorded["losses"][str(seed)]
    else:
        for step, (loss, expected) in enumerate(zip(losses, recorded["losses"][str(seed)], strict=True)):
            assert loss == pytest.approx(expected, rel=golden.tolerance(step)), f"step {step}"


def test_a_training_in_fp16_leaves_out_steps_that_overflow_and_goes_on_with_its_scale(
    small_row: Row, small_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dataclasses.replace(small_row, train=dataclasses.replace(small_row.train, precision="fp16", log_every=1))
    monkeypatch.setattr("pipeline.compute.precision._FIRST_SCALE", 2.0**14)  # too high for the first steps

    def run(name: str) -> loop.Run:  # 6 steps, a checkpoint after every second
        return loop.Run(row=row, seed=5, run_key="k", run_dir=tmp_path / name, manifest=small_manifest)

    loop.train(run("undisturbed"))
    interrupted = run("interrupted")
    interrupted.run_dir.mkdir()
    (interrupted.run_dir / loop.YIELD).touch()
    for _ in range(4):
        with contextlib.suppress(loop.YieldRequested):
            loop.train(interrupted)
    curves = [read_curve(tmp_path / name / "curve.jsonl") for name in ("undisturbed", "interrupted")]
    norms = [[point["grad_norm"] for point in curve if "grad_norm" in point] for curve in curves]
    assert norms[0] == norms[1] and norms[0][0] == 0.0 and norms[0][-1] > 0.0


def test_a_run_that_is_asked_to_yield_does_so_after_a_checkpoint_and_loses_nothing(
    small_row: Row, small_manifest: Manifest, tmp_path: Path
) -> None:
    def run(name: str) -> loop.Run:  # 6 steps, a checkpoint after every second
        return loop.Run(row=small_row, seed=5, run_key="k", run_dir=tmp_path / name, manifest=small_manifest)

    undisturbed = loop.train(run("undisturbed"))
    asked, request = run("asked"), tmp_path / "asked" / loop.YIELD
    asked.run_dir.mkdir()
    request.touch()
    for step in (2, 3, 4):  # 3: validation saves too
        with pytest.raises(loop.YieldRequested, match=f"yielded after step {step}"):
            loop.train(asked)
        assert [point["step"] for point in read_curve(asked.run_dir / "curve.jsonl")] == list(range(1, step + 1))
    result = loop.train(asked)  # the last step is an end
    assert result is not None and undisturbed is not None and result.metrics == undisturbed.metrics
    losses = [
        [point["loss"] for point in read_curve(tmp_path / name / "curve.jsonl")] for name in ("asked", "undisturbed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


# Starting from a whole network


def test_a_run_starts_from_a_whole_network_and_frozen_parts_stay_as_they_were(
    make_run: Callable[..., Run], small_row: Row, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from m2f import build_model
    from m2f.weights import Loaded
    from m2f.weights.start import start_tensors

    # of a backbone with batch norm, also after a validation, which ends with model.train()
    backbone = BackboneConfig(name="r50", frozen_norm=False)
    row = dataclasses.replace(
        small_row,
        model=dataclasses.replace(small_row.model, backbone=backbone),
        train=dataclasses.replace(small_row.train, steps=2, val_interval=1, freeze=("backbone", "pixel_decoder")),
    )
    torch.manual_seed(1)
    start = build_model(row.model).state_dict()
    classes = [f"class {i}" for i in range(row.model.num_classes)]
    loaded = Loaded(origin="this project", tensors=start, missing=(), num_classes=row.model.num_classes)
    tensors, _ = start_tensors(loaded, classes)
    save_file(tensors, tmp_path / "start.safetensors")
    run = make_run("whole", row, network=tmp_path / "start.safetensors")
    train(run)
    made = weights_of(run, 2)
    frozen = {name for name in start if name.startswith(("backbone.", "pixel_decoder."))}
    assert all(torch.equal(made[f"model.{name}"], start[name]) for name in frozen)
    moved = [name for name in start if not torch.equal(made[f"model.{name}"], start[name])]
    assert moved and all(name.startswith("query_decoder.") for name in moved)
    assert not any("backbone" in name for name in made if name.startswith("optimizer."))
    query = "query_decoder.query_position.weight"
    assert (made[f"model.{query}"] - start[query]).abs().max() < 0.01  # two steps away from where it began


def test_every_validation_is_reported_with_row_seed_step_and_figures_in_percent(small_run: Run) -> None:
    told: list[dict[str, Any]] = []
    finished = train(small_run, told.append)
    assert finished is not None
    last = told[-1]
    assert (last["row"], last["seed"], last["step"]) == (small_run.row.name, small_run.seed, finished.steps)
    assert last["PQ"] == pytest.approx(100 * (finished.metrics["pq"] or 0.0))
    assert [each["step"] for each in told] == sorted({each["step"] for each in told})
