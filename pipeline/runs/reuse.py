"""An earlier training taken for one that has another run key: only by name, with a reason, and written down.

Code that shapes a training changes its run key even where it does not change a number. Whoever knows that may say so:
runs/<run key>/reused.json names the run that stands for it, and results/train/<row>.json and the report repeat it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pipeline.params.schema import Row
from pipeline.runs.outcome import TrackedRun, finished_result, note_of, run_status, write_note
from pipeline.storage.results.data import ConvertedWeights, Manifest
from pipeline.storage.results.rows import Reused
from pipeline.storage.root import storage_root
from pipeline.storage.stores import StoredPath

_MUST_AGREE = ("seed", "task", "model.", "train.steps")


def reuse_run(
    row: Row, seed: int, earlier: str, *, manifest: Manifest, weights: ConvertedWeights, reason: str
) -> Reused:
    """Let the finished run `earlier` stand for what the row would train for a seed now; the note that is written.

    ValueError when `earlier` is no finished training, differs in seed, task, network or steps, or is not needed.
    """
    from pipeline.provenance.run_key import run_key

    key = run_key(row, seed=seed, data_digest=manifest.digest, weights_sha256=weights.sha256)
    run_dir, other = storage_root() / "runs" / key, storage_root() / "runs" / earlier
    if key == earlier or finished_result(run_dir) is not None:
        raise ValueError(f"seed {seed} of row {row.name} is finished as run {key}: there is nothing to reuse for it")
    if finished_result(other) is None:
        end = run_status(other)
        raise ValueError(
            f"runs/{earlier} in the storage root {storage_root()} is no finished training"
            f"{f' (it {end.status})' if end else ''}; python -m stages.storage list shows what there is"
        )
    trained = note_of(other, TrackedRun)
    if trained is None:
        raise ValueError(f"runs/{earlier} cannot be reused: it has no run.json, which says its settings")
    wanted = {"seed": seed, "task": row.task, "model": asdict(row.model), "train": asdict(row.train)}
    differences = list(_differences(trained.params, wanted))
    for difference in differences:
        if difference.startswith(_MUST_AGREE):
            raise ValueError(f"run {earlier} is another experiment than seed {seed} of row {row.name}: {difference}")
    if (data := trained.tags.get("m2f.data_digest", "nobody knows which")) != manifest.digest:
        differences.append(f"data: {data} there, {manifest.digest} now")
    note = Reused(
        run_key=earlier,
        instead_of=key,
        reason=reason,
        differences=tuple(differences) or ("code, or initial weights",),
        reused_s=int(time.time()),
        note=f"runs/{key}/reused.json",
    )
    write_note(run_dir, note)
    return note


def reused_run(run_dir: StoredPath) -> Reused | None:
    """The note in a run's folder that another run stands for it; None without one.

    Nor does it hold when this run has been trained since, or when checkpoints of the other are gone.
    """
    note = note_of(run_dir, Reused)
    if note is None or finished_result(run_dir) is not None:
        return None
    return note if finished_result(run_dir.parent / note.run_key) is not None else None


def _differences(there: Any, now: Any, name: str = "") -> Iterator[str]:
    """Settings that differ, in words; tuples and lists are the same to JSON."""
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*there, *now)):
            yield from _differences(there.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif _plain(there) != _plain(now) and name not in ("train.log_every", "train.checkpoint_interval"):
        yield f"{name} is {_plain(there)} there, {_plain(now)} now"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
