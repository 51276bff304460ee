"""What ended a Ray Train run, in a word and in a sentence."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from pipeline.params.schema import needs_synchronised_norm
from pipeline.params.sentences import how_many
from pipeline.runs.outcome import Failed, write_note
from pipeline.storage.stores import StoredPath

if TYPE_CHECKING:
    from pipeline.runs.run import Run


def fail(run_dir: StoredPath, reason: str) -> None:
    """Write down why a seed failed; its next start forgets it."""
    write_note(run_dir, Failed(reason=reason))


def what_failed(error: BaseException) -> tuple[Literal["no room", "yielded", "lost", "final", "bug"], BaseException]:
    """What ended a Ray Train run, and the exception that says most about it.

    no room: none got free in time. yielded: it was asked to make place for its whole worker group. lost: a worker died,
    with which the others' connections break. final: what a retry would meet again. bug: any other exception of the
    loop.
    """
    import torch
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import RayTrainError, WorkerGroupStartupTimeoutError

    from m2f.losses import Divergence
    from pipeline.training.loop import YieldRequested

    if isinstance(error, ControllerError):
        cause = error.controller_failure
        return ("no room" if isinstance(cause, WorkerGroupStartupTimeoutError) else "lost"), cause
    if not isinstance(error, WorkerGroupError):
        return "lost", error  # the controller itself
    failures = list(error.worker_failures.values())
    mendable = (ValueError, FileNotFoundError, PermissionError, torch.OutOfMemoryError, Divergence)
    for failure in failures:
        if isinstance(failure, mendable):
            return "final", failure
    for failure in failures:
        if isinstance(failure, YieldRequested):
            return "yielded", failure
    for failure in failures:
        if isinstance(failure, RayTrainError) or _is_broken_connection(failure):
            return "lost", failure
    return "bug", failures[0]


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a worker's exception only says that another one is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


_GUESSES = re.compile(r" Some common causes| This is typically caused by")
"""From here on, Ray and gloo guess."""


def sentence(error: BaseException, run: Run) -> str:
    """An exception in one sentence: our own as it is, another with its type and last line."""
    import torch

    text = str(getattr(error, "health_check_failure", error))
    if isinstance(error, torch.OutOfMemoryError):
        groups, size = run.groups_at_once or "all its", run.row.train.group_size
        what = f"{groups} group{'s' * (groups != 1)} of {how_many(size, 'image')} at once"
        return f"a worker's GPU has not the memory for {what}; {_savings(run)} ({_first_line(text)})"
    if isinstance(error, (ValueError, OSError)):
        return " ".join(text.split())
    return f"{type(error).__name__}: {_GUESSES.split(_last_line(text))[0]}"


def _savings(run: Run) -> str:
    """What still saves memory."""
    one = run.groups_at_once == 1
    variables = [] if one or needs_synchronised_norm(run.row) else ["M2F_GROUPS_AT_ONCE below that"]
    variables += [] if run.checkpoint_activations else ["M2F_CHECKPOINT_ACTIVATIONS to 1"]
    ways = [f"set {' or '.join(variables)}"] if variables else []
    return ", or ".join([*ways, "take GPUs with more" if one else "use more workers"])


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")[:200]


def _last_line(text: str) -> str:
    return next(iter(reversed(text.strip().splitlines())), "")[:400].strip()
