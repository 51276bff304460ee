"""Trains the seeds of a row: finished ones are found again, the rest are trials of Ray Tune, each on its own worker
group.

As many worker groups work at once as the cluster holds; further seeds queue. A seed that fails or diverges leaves the
others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.params.schema import Row
from pipeline.provenance.environment import Environment
from pipeline.runs.outcome import Launch, RunStatus, Stopped, finished_result, note_of, run_status, worker_groups_of
from pipeline.runs.owner import owned
from pipeline.runs.reuse import reused_run
from pipeline.storage.files import delete, write_json
from pipeline.storage.results.data import ConvertedWeights, Manifest
from pipeline.storage.results.folder import made_by, write_result
from pipeline.storage.results.rows import PublishedEvaluation, TrainedSeed, TrainingResult, WorkerGroupSpan
from pipeline.storage.root import storage_root, stored
from pipeline.storage.stores import StoredPath

if TYPE_CHECKING:
    from ray.tune import ResultGrid
    from ray.util.queue import Queue

    from pipeline.compute.resources import Resources
    from pipeline.runs.run import Run

_TRIAL = {"node:__internal_head__": 0.001}
"""What Ray reserves for a trial, which only waits for its workers: a place on the node that outlives the others, and no
core, for the worker groups may need them all."""

_RAY_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # its boxes
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # its own CSV, JSON and TensorBoard files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would return as if all were well
}

_SECRETS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
"""What Ray Tune copies from the driver's environment to trials, in a setting that every node logs."""


def train_row(
    row: Row,
    *,
    manifest: Manifest,
    weights: ConvertedWeights,
    published: PublishedEvaluation | None = None,
    only: int | None = None,
    results: Path | None = None,
    before_training: Callable[[Row], None] | None = None,
) -> TrainingResult:
    """Train every seed of a row that is not finished; the result is written to the folder `results`.

    A finished seed is recognised by its run key in the storage root, or by a note that another run is reused for it
    (pipeline.runs.reuse), and never trained again; nor is one that diverged, which a retry would replay, or one that
    the early warning stopped as long as the row wants that. `published`: the published checkpoint's evaluation, with
    whose curve the early warning compares. `only`: this seed alone. `before_training`: called before any seed is
    trained, to refuse what is not possible here or costs too much. ValueError when another process trains one of them;
    and, after writing, when no seed finished.
    """
    from pipeline.provenance.run_key import run_key, settings_key
    from pipeline.tracking import mlflow_runs

    seeds = row.seeds if only is None else (only,)
    keys = {
        seed: run_key(row, seed=seed, data_digest=manifest.digest, weights_sha256=weights.sha256)
        for seed in dict.fromkeys((*seeds, *row.seeds))
    }
    notes = {seed: note for seed, key in keys.items() if (note := reused_run(_run_dir(key)))}
    keys |= {seed: note.run_key for seed, note in notes.items()}
    pending = [seed for seed in seeds if not _has_ended(row, _run_dir(keys[seed]))]
    for number, seed in enumerate(seeds, start=1):
        what = "to be trained" if seed in pending else _in_words(_run_dir(keys[seed]))
        what += f", reused instead of {notes[seed].instead_of}" if seed in notes else ""
        _say(f"{row.name}: seed {seed} ({number} of {len(seeds)}), run {keys[seed]}: {what}")
    if pending and before_training is not None:
        before_training(row)
    with owned([_run_dir(keys[seed]) for seed in pending]):
        pending = [seed for seed in pending if not _has_ended(row, _run_dir(keys[seed]))]  # another had them until now
        if pending:
            _train(row, pending, keys, manifest, weights, published)
    # Also where all were found finished: a driver that was lost with its node did not say so.
    found = {seed: _entry(row, seed, key) for seed, key in keys.items()}
    mlflow_runs.track_row(
        row, [found[seed] for seed, key in keys.items() if run_status(_run_dir(key))], manifest=manifest
    )
    entries = tuple(dataclasses.replace(found[seed], reused=notes.get(seed)) for seed in seeds)
    result = TrainingResult(row=row.name, dataset=row.dataset, settings=settings_key(row), seeds=entries)
    if results is not None:
        write_result(result, row.name, results=results)
    if not any(entry.status == "finished" for entry in entries):
        reasons = "; ".join(f"seed {entry.seed}: {entry.reason}" for entry in entries)
        raise ValueError(f"no seed of row {row.name} finished ({reasons})")
    return result


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run_dir(key: str) -> StoredPath:
    return storage_root() / "runs" / key


def _has_ended(row: Row, run_dir: StoredPath) -> bool:
    """Whether a seed is not to be trained, or not any more."""
    end = run_status(run_dir)
    if end is None:
        return False
    return end.status in ("finished", "diverged") or (end.status == "stopped" and row.early_warning.stop)


def _in_words(run_dir: StoredPath) -> str:
    end = run_status(run_dir)
    assert end is not None
    return {"finished": "finished", "diverged": "diverged, and is not tried again", "stopped": "stopped"}[end.status]


def _entry(row: Row, seed: int, key: str) -> TrainedSeed:
    """One seed of the result, from its run folder."""
    run_dir = _run_dir(key)
    launched = note_of(run_dir, Launch)  # without one it never got a place
    worker_groups = worker_groups_of(run_dir)
    result, end = finished_result(run_dir), run_status(run_dir)
    warned = result or note_of(run_dir, Stopped)
    return TrainedSeed(
        seed=seed,
        run_key=key,
        status=end.status if end else "failed",
        reason=_reason(end, key),
        run_dir=f"runs/{key}",
        steps=row.train.steps,
        checkpoints=result.checkpoints if result else None,
        metrics=result.metrics if result else {},
        below_reference=warned.below_reference if warned else (),
        peak_memory_mib=result.peak_memory_mib if result else None,
        train_s=result.train_s if result else None,
        worker_s=_worker_s(worker_groups, result.train_s) if result and worker_groups else None,
        workers=_workers(worker_groups, row.train.steps) or (launched.workers if launched else None),
        worker_groups=worker_groups,
        images_per_s=result.images_per_s if result else None,
        mlflow_run_id=launched.mlflow_run_id if launched else None,
        environment=note_of(run_dir, Environment),
    )


def _workers(worker_groups: Sequence[WorkerGroupSpan], steps: int) -> int | None:
    """The number of workers that made the most of a run's steps; of two, the larger. None when no worker got as far.

    `worker_groups`: which workers went on with it from which step.
    """
    made: dict[int, int] = {}
    for span, end in zip(worker_groups, [*(later.from_step for later in worker_groups[1:]), steps], strict=False):
        made[span.workers] = made.get(span.workers, 0) + end - span.from_step
    return max(made, key=lambda workers: (made[workers], workers), default=None)


def _worker_s(worker_groups: Sequence[WorkerGroupSpan], train_s: float) -> float:
    """The time of a training times its workers, group by group; what was lost and done again counts once."""
    ends = [*(later.train_s for later in worker_groups[1:]), train_s]
    return round(sum((end - span.train_s) * span.workers for span, end in zip(worker_groups, ends, strict=True)), 1)


def _reason(end: RunStatus | None, key: str) -> str | None:
    if end is None:
        return "it could not write down how it ended; its last line in the log says why"
    if end.status == "diverged":
        return f"{end.reason}; a retry would replay it; to try all the same, delete runs/{key} in the storage root"
    return end.reason


def _train(
    row: Row,
    pending: Sequence[int],
    keys: Mapping[int, str],
    manifest: Manifest,
    weights: ConvertedWeights,
    published: PublishedEvaluation | None,
) -> None:
    """Train some seeds to their ends, in this process or as trials."""
    from pipeline.compute.resources import cluster_resources
    from pipeline.runs.run import Run
    from pipeline.tracking.experiments import check_database
    from pipeline.training.worker_group import train_seed

    resources = cluster_resources(row)
    initial = stored(weights.path, made_by=made_by(ConvertedWeights, row.weights)) if weights.path else None
    curve = _published_curve(row, published)
    runs = {
        seed: Run(
            row=row,
            seed=seed,
            run_key=keys[seed],
            run_dir=_run_dir(keys[seed]),
            manifest=manifest,
            weights=None if weights.network else initial,
            network=initial if weights.network else None,
            loader_processes=resources.loader_processes,
            groups_at_once=resources.groups_at_once,
            checkpoint_activations=resources.checkpoint_activations,
            published_curve=curve,
            other_seeds=tuple(_run_dir(key) for other, key in keys.items() if other != seed),
        )
        for seed in pending
    }
    if weights.network:
        _say(f"{row.name}: {weights.network} ({weights.url})")
        for run in runs.values():
            write_json(run.run_dir / "initial_weights.json", dataclasses.asdict(weights))
    check_database(f"row {row.name} is not tracked for now; later, python -m stages.track sends it")
    if resources.workers == 0:
        for run in runs.values():
            train_seed(run, resources)
        return
    seeds = f"{len(pending)} seeds" if len(pending) > 1 else "1 seed"
    at_once = min(len(pending), resources.seeds_at_once)
    worker_groups = f"{at_once} worker groups" if at_once > 1 else "one worker group"
    _say(f"{row.name}: {seeds} to train on {worker_groups} of {resources}")
    _say(f"{row.name}: starting Ray and the workers, up to two minutes on a small machine")
    try:
        _forget_rays_notes(runs)  # what an interrupted driver has left
        _train_as_trials(runs, resources)
    finally:
        _forget_rays_notes(runs)


def _published_curve(row: Row, published: PublishedEvaluation | None) -> tuple[tuple[int, float], ...]:
    """The first figure of the row's published training by step; empty when it is not here."""
    from pipeline.params.tasks import primary
    from pipeline.runs.curve_file import read_curve
    from pipeline.training.early_warning import curve_of

    if published is None or published.curve is None:
        return ()
    return tuple(curve_of(read_curve(storage_root() / published.curve), f"val_{primary(row.task)}"))


def _train_as_trials(runs: Mapping[int, Run], resources: Resources) -> None:
    """One trial for each seed, `resources.seeds_at_once` at a time. An interruption ends all of them, and their
    workers."""
    for name, value in _RAY_TUNE.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import tune
    from ray.tune.execution import class_cache

    from pipeline.compute.ray_session import connect, ray_storage
    from pipeline.compute.worker_output import printing
    from pipeline.training.elastic import RESTARTS
    from pipeline.training.failures import fail
    from pipeline.training.worker_group import open_tracked

    if resources.seeds_at_once > 1:  # trials that begin together find MLflow's tables, experiment and row there
        open_tracked(next(iter(runs.values())), resources.workers)
    for library in ("ray.tune", "ray.train"):  # what becomes of a trial, we say ourselves
        logging.getLogger(library).setLevel(logging.CRITICAL)
    class_cache.ENV_VARS_TO_PROPAGATE -= _SECRETS
    connect()
    try:
        with printing() as lines, contextlib.redirect_stdout(io.StringIO()):  # Tune's lines about trials
            trial = tune.with_parameters(_trial, runs=runs, resources=resources, lines=lines)
            results = tune.Tuner(
                tune.with_resources(trial, _TRIAL),
                param_space={"seed": tune.grid_search(list(runs))},
                tune_config=tune.TuneConfig(max_concurrent_trials=resources.seeds_at_once),
                run_config=tune.RunConfig(
                    name=f"{next(iter(runs.values())).row.name}-seeds-{time.time_ns()}",
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=RESTARTS),  # of a trial's own process
                    **ray_storage(next(iter(runs.values())).run_dir / "ray"),
                ),
            ).fit()
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    _say_median(results, next(iter(runs.values())).row)
    for result in results:
        run_dir = runs[result.config["seed"]].run_dir
        if result.error is not None and run_status(run_dir) is None:
            fail(run_dir, f"its driver was lost ({str(result.error).strip().splitlines()[-1][:200]})")


def _trial(config: Mapping[str, Any], *, runs: Mapping[int, Run], resources: Resources, lines: Queue) -> None:
    """One seed, as the driver of its Ray Train run."""
    from ray import tune

    from pipeline.compute.worker_output import relayed
    from pipeline.runs.run import reported, run_name, say
    from pipeline.training.failures import sentence
    from pipeline.training.worker_group import train_seed

    run = runs[config["seed"]]
    with relayed(lines, run_name(run)):
        try:
            train_seed(run, resources, lines)
        except (ValueError, OSError) as error:  # the disk is full: neither we nor Tune can write down why it ended
            say(run, f"failed: {sentence(error, run)}")
            return
    if (finished := finished_result(run.run_dir)) is not None:
        tune.report(reported(run, finished.steps, finished.metrics))


def _say_median(results: ResultGrid, row: Row) -> None:
    """The medians of the last validations by what the trials have reported to Tune; of fewer than two: nothing."""
    from pipeline.params.tasks import LABELS, headline

    said, seeds = [], 0
    for label in (LABELS[name] for name in headline(row.task)):
        reported = [result.metrics.get(label) for result in results if result.metrics]
        values = [value for value in reported if value is not None]
        if len(values) > 1:
            seeds = len(values)
            said.append(f"{label} {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    if said:
        _say(f"{row.name}: last validations of {seeds} seeds, medians: {', '.join(said)}")


def _forget_rays_notes(runs: Mapping[int, Run]) -> None:
    """Remove what Ray keeps in the run folders."""
    for run in runs.values():
        with contextlib.suppress(OSError):  # there is nothing, or a trial that is ending still writes
            delete(run.run_dir / "ray")
