"""Runs and unfinished shards that are kept although no file under results/ names them, and why."""

from __future__ import annotations

from pipeline.params.schema import Params, Row
from pipeline.registry.versions import runs_of_versions
from pipeline.runs.outcome import TrackedRun, note_of
from pipeline.runs.owner import lives_here, owner_of
from pipeline.runs.reuse import reused_run
from pipeline.storage.results.data import ConvertedWeights, Manifest
from pipeline.storage.results.folder import result_path, sound_result
from pipeline.storage.root import storage_root
from pipeline.storage.stores import StoredPath, store_of


def kept_runs(params: Params) -> dict[str, str]:
    """Why a run or an unfinished shard folder is kept, by its path under the storage root: somebody is at it, a row of
    params.yaml would go on with it, or a registered model comes from it.

    ValueError when the registry does not answer.
    """
    found = {f"runs/{key}": f"{version} of the registry comes from it" for key, version in runs_of_versions().items()}
    for name in params.rows:
        found |= _of_row(params.row(name))
    for folder in _folders("runs"):
        if (note := reused_run(folder)) is not None and f"runs/{folder.name}" in found:
            found.setdefault(f"runs/{note.run_key}", f"it is reused for run {folder.name}")
        owner = owner_of(folder)
        if store_of(folder).is_held() or (owner is not None and lives_here(owner)):
            who = f"process {owner.process} on host {owner.node}" if owner else "another process"
            found[f"runs/{folder.name}"] = f"{who} trains it"
    for folder in _folders("shards"):
        if folder.name.startswith(".building-") and store_of(folder).is_held():
            found[f"shards/{folder.name}"] = "another process is making it"
    return found


def _folders(name: str) -> list[StoredPath]:
    folder = storage_root() / name
    return [path for path in folder.iterdir() if path.is_dir()] if folder.exists() else []


def _of_row(row: Row) -> dict[str, str]:
    """The runs that the row would find again or go on with."""
    from pipeline.provenance.run_key import run_key

    manifest, weights = sound_result(Manifest, row.dataset), sound_result(ConvertedWeights, row.weights)
    if manifest is not None and weights is not None:
        keys = {
            seed: run_key(row, seed=seed, data_digest=manifest.digest, weights_sha256=weights.sha256)
            for seed in row.seeds
        }
        return {f"runs/{key}": f"it is seed {seed} of row {row.name} of params.yaml" for seed, key in keys.items()}
    missing = result_path(Manifest, row.dataset) if manifest is None else result_path(ConvertedWeights, row.weights)
    return {
        f"runs/{folder.name}": f"it is of row {row.name} of params.yaml, whose run keys nobody knows without {missing}"
        for folder in _folders("runs")
        if _row_of(folder) == row.name
    }


def _row_of(run_dir: StoredPath) -> str | None:
    """The row of a run, as run.json says; None: it does not."""
    try:
        tracked = note_of(run_dir, TrackedRun)
    except ValueError:  # of another layout
        return None
    return tracked.row if tracked else None
