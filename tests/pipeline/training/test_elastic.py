"""What follows an end of a training's workers: a state and an end go in, a state and a decision come out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.training.elastic import (
    RESTARTS,
    SAY_AGAIN_S,
    Decision,
    End,
    WorkerGroup,
    after,
    counted,
    is_to_say_it_waits,
)

WHOLE = WorkerGroup(pool=4, workers=4, saved=0)
"""A training at its start."""

SHRUNK = replace(WHOLE, workers=2, spans=True)
"""What was left of a pool on several hosts goes on."""


def end(kind: Any, *, saved: int = 0, hosts: int = 1) -> End:
    return End(kind=kind, reason="reason", saved=saved, hosts=hosts)


def test_a_lost_worker_of_a_pool_on_one_host_is_replaced_in_a_whole_pool() -> None:
    group, decision = after(WHOLE, end("lost"))
    assert group == replace(WHOLE, lost=1)
    assert decision == Decision(say="lost a worker (1 of 3 times): reason")


def test_after_a_loss_on_several_hosts_the_places_that_are_left_are_counted() -> None:
    group, decision = after(WHOLE, end("lost", hosts=2))
    assert group == replace(WHOLE, lost=1, spans=True)
    assert decision == Decision(say="lost a worker (1 of 3 times): reason", count=True)
    # once on several hosts, what is left of them may be one
    assert after(replace(SHRUNK, workers=1), end("lost", hosts=1))[1].count


def test_the_workers_with_a_place_go_on_and_without_any_place_the_whole_pool_is_waited_for() -> None:
    spans = replace(WHOLE, spans=True)
    say = "goes on with 2 of its 4 workers until the others' places are free again"
    assert counted(spans, 2) == (SHRUNK, Decision(say=say))
    assert counted(spans, 4) == (spans, Decision())
    assert counted(SHRUNK, 0) == (spans, Decision())


def test_losses_in_a_row_end_a_training_after_the_third_and_getting_further_begins_the_row_again() -> None:
    group = WHOLE
    for _ in range(RESTARTS):
        group, decision = after(group, end("lost", saved=4))
        assert decision.fail is None
    # step 4 was new to the first loss: the row is 1, 2, 3
    assert group == replace(WHOLE, saved=4, lost=3)
    assert after(group, end("lost", saved=8)) == (
        replace(WHOLE, saved=8, lost=1),
        Decision(say="lost a worker (1 of 3 times): reason"),
    )
    assert after(group, end("lost", saved=4))[1] == Decision(
        fail="lost its workers 4 times without getting further (reason)"
    )


def test_a_bug_is_tried_once_more_however_far_the_training_gets() -> None:
    group, decision = after(WHOLE, end("bug", saved=4))
    assert decision == Decision(say="failed, and is tried once more: reason")
    group, decision = after(group, end("bug", saved=8))
    assert decision == Decision(fail="reason, and again when it was tried once more")


def test_losses_and_bugs_do_not_count_for_each_other() -> None:
    group, _ = after(replace(WHOLE, lost=RESTARTS), end("bug"))
    assert (group.lost, group.bugs) == (RESTARTS, 1)
    group, decision = after(replace(WHOLE, bugs=1), end("lost"))
    assert (group.lost, group.bugs, decision.fail) == (1, 1, None)


def test_what_a_retry_would_meet_again_is_final() -> None:
    assert after(WHOLE, end("final")) == (WHOLE, Decision(fail="reason"))
    assert after(SHRUNK, end("final")) == (SHRUNK, Decision(fail="reason"))


def test_without_the_memory_a_whole_pool_fails_and_fewer_workers_wait_for_it() -> None:
    assert after(WHOLE, end("no memory")) == (WHOLE, Decision(fail="reason"))
    group, decision = after(SHRUNK, end("no memory"))
    assert group == replace(WHOLE, fits=False)
    assert decision == Decision(say="2 workers have not the memory for it; it waits for its whole pool")
    # from now on only the whole pool will do
    group, decision = after(group, end("lost", hosts=2))
    assert not group.spans and not decision.count and group.workers == 4


def test_workers_that_were_asked_to_leave_make_place_for_the_whole_pool() -> None:
    # which counts as no failure
    assert after(SHRUNK, end("left", saved=8)) == (replace(SHRUNK, workers=4), Decision())


@pytest.mark.parametrize(("group", "count"), [(WHOLE, False), (SHRUNK, True)])
def test_no_place_is_no_failure_and_fewer_workers_are_counted_again_where_they_may_go_on(
    group: WorkerGroup, count: bool
) -> None:
    assert after(group, end("no pool")) == (replace(group, waits=True), Decision(count=count))


def test_that_it_waits_for_its_whole_pool_is_said_at_once_and_then_every_ten_minutes() -> None:
    waits = replace(WHOLE, waits=True)
    assert is_to_say_it_waits(waits, now_s=0.0)
    said = replace(waits, said_s=100.0)
    assert not is_to_say_it_waits(said, now_s=100.0 + SAY_AGAIN_S)
    assert is_to_say_it_waits(said, now_s=101.0 + SAY_AGAIN_S)
    assert not is_to_say_it_waits(replace(waits, workers=2), now_s=0.0)  # it has places for two
    assert not is_to_say_it_waits(WHOLE, now_s=0.0)
    # a loss or a place for the pool: it does not wait any more
    assert not after(waits, end("lost"))[0].waits and not after(waits, end("left"))[0].waits
