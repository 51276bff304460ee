"""What ended a training's workers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from m2f.losses import Divergence
from pipeline.runs.run import Run
from pipeline.training import failures
from tests.helpers.worker_groups import lost


def test_a_dead_worker_explains_the_broken_connections_of_the_others() -> None:
    assert failures.what_failed(lost())[0] == "lost"
    alone = WorkerGroupError("", {0: RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc] Connection closed")})
    assert failures.what_failed(alone)[0] == "lost"


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ValueError("wrong"), "final"),
        (FileNotFoundError("gone"), "final"),
        (Divergence("nan"), "final"),
        (torch.OutOfMemoryError("CUDA out of memory"), "final"),
        (OSError(5, "Input/output error"), "bug"),
        (KeyError("typo"), "bug"),
    ],
)
def test_what_a_retry_would_meet_again_is_final_and_a_bug_is_not_a_lost_worker(error: Exception, failure: str) -> None:
    assert failures.what_failed(WorkerGroupError("", {0: error})) == (failure, error)


def test_what_a_library_guesses_about_a_loss_is_left_out(small_run: Run) -> None:
    error = RuntimeError(
        "Traceback:\n[gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:17033. This is typically "
        "caused by a remote worker crashing."
    )
    said = failures.sentence(error, small_run)
    assert said == "RuntimeError: [gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:17033."


def test_a_worker_group_that_does_not_get_free_in_time_is_no_failure() -> None:
    assert failures.what_failed(ControllerError(WorkerGroupStartupTimeoutError(2)))[0] == "no room"
    assert failures.what_failed(ControllerError(RuntimeError("x")))[0] == "lost"


@pytest.mark.parametrize(
    ("at_once", "again", "advice"),
    [
        (None, False, "set M2F_GROUPS_AT_ONCE below that or M2F_CHECKPOINT_ACTIVATIONS to 1, or use more workers"),
        (2, True, "set M2F_GROUPS_AT_ONCE below that, or use more workers"),
        (1, False, "set M2F_CHECKPOINT_ACTIVATIONS to 1, or take GPUs with more"),
        (1, True, "take GPUs with more"),
    ],
)
def test_who_has_too_little_memory_is_told_what_was_not_tried(
    small_run: Run, at_once: int | None, again: bool, advice: str
) -> None:
    run = dataclasses.replace(small_run, groups_at_once=at_once, checkpoint_activations=again)
    said = failures.sentence(torch.OutOfMemoryError("CUDA out of memory"), run)
    groups = "1 group" if at_once == 1 else f"{at_once or 'all its'} groups"
    assert said == f"a worker's GPU has not the memory for {groups} of 1 image at once; {advice} (CUDA out of memory)"
