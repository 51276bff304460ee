"""The checkpoints of a row that may be registered, and which of them are the best and the median one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.params.tasks import LABELS
from pipeline.storage.results.folder import result_path
from pipeline.storage.results.rows import Evaluation, Figures, PublishedEvaluation, TrainingResult
from pipeline.storage.root import stored


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A finished seed's checkpoint, of those that decide the row's figure, or a published one."""

    seed: int | None
    """None: it is published."""
    run_key: str
    value: float
    """The row's figure, as a fraction."""
    figures: Figures
    """All of the checkpoint's."""
    checkpoint: str
    """Path under the storage root."""
    sha256: str
    mlflow_run_id: str | None
    git_commit: str | None
    """Of the training."""

    @property
    def description(self) -> str:
        """In words."""
        return "published checkpoint" if self.seed is None else f"seed {self.seed}"


def candidates(evaluated: Evaluation, trained: TrainingResult) -> list[Candidate]:
    """The finished seeds of a row, worst first; of equals, the later seed.

    ValueError when there is none, or when the two do not hold the same trainings.
    """
    by_key = {entry.run_key: entry for entry in trained.seeds}
    found = []
    for entry in evaluated.seeds:
        if entry.checkpoints is None:
            continue
        training = by_key.get(entry.run_key)
        if training is None or training.checkpoints is None:
            row = evaluated.row
            raise ValueError(
                f"{result_path(Evaluation, row)} holds run {entry.run_key}, which {result_path(TrainingResult, row)} "
                f"does not; evaluate again with: dvc repro evaluate@{row}"
            )
        checkpoint = training.checkpoints[evaluated.decides]
        value = entry.checkpoints[evaluated.decides].figures[evaluated.primary]
        if value is None:
            raise ValueError(
                f"seed {entry.seed} has no {LABELS[evaluated.primary]} in {result_path(Evaluation, evaluated.row)}: "
                "the validation images hold nothing that it counts, so there is no best checkpoint to register"
            )
        found.append(
            Candidate(
                seed=entry.seed,
                run_key=entry.run_key,
                value=value,
                figures=entry.checkpoints[evaluated.decides].figures,
                checkpoint=f"{training.run_dir}/{checkpoint.path}",
                sha256=checkpoint.sha256,
                mlflow_run_id=entry.mlflow_run_id or training.mlflow_run_id,
                git_commit=training.environment.git_commit if training.environment else None,
            )
        )
    if not found:
        raise ValueError(f"no seed of row {evaluated.row} is finished, so there is nothing to register")
    return sorted(found, key=lambda candidate: candidate.value)


def published_candidate(result: PublishedEvaluation) -> Candidate:
    """A published checkpoint as it was converted and evaluated. ValueError: it has no figure, or is gone."""
    from pipeline.evaluation.published import run_dir
    from pipeline.runs.checkpoints import checkpoint_path
    from pipeline.storage.files import local_file, sha256

    evaluated = result.evaluated.checkpoint
    value = evaluated.figures[result.primary]
    if value is None:
        raise ValueError(
            f"{result.name} has no {LABELS[result.primary]}: the validation images hold nothing that it counts"
        )
    folder = run_dir(result.sha256)
    path = checkpoint_path(folder, evaluated.step)
    relative = f"runs/{folder.name}/checkpoints/{path.name}"
    stored(relative, made_by=f"dvc repro -f published@{result.name}")
    with local_file(path, path.stem) as file:
        digest = sha256(file)
    return Candidate(
        seed=None,
        run_key=folder.name,
        value=value,
        figures=evaluated.figures,
        checkpoint=relative,
        sha256=digest,
        mlflow_run_id=result.mlflow_run_id,
        git_commit=None,
    )


def chosen(ranked: Sequence[Candidate]) -> dict[str, Candidate]:
    """The best candidate, and the median one: of an even number the lower of the two in the middle."""
    return {"best": ranked[-1], "median": ranked[(len(ranked) - 1) // 2]}
