"""What follows an end of a training's workers: a state and an end go in, a state and a decision come out."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from typing import Any

import pytest

from pipeline.params.load import load_params
from pipeline.runs.run import Run
from pipeline.training.elastic import (
    RESTARTS,
    SAY_AGAIN_S,
    Decision,
    End,
    WorkerGroup,
    after,
    counted,
    is_to_say_it_waits,
    sized,
)
from tests.helpers.ray_nodes import RayNodes
from tests.helpers.shared import PROJECT
from tests.helpers.worker_groups import group_of

WHOLE = WorkerGroup(full=4, workers=4, saved=0)
"""A training at its start."""

SHRUNK = replace(WHOLE, workers=2, spans=True)
"""What was left of a worker group on several nodes goes on."""


def end(failure: Any, *, saved: int = 0, nodes: int = 1) -> End:
    return End(failure=failure, reason="reason", saved=saved, nodes=nodes)


def test_a_lost_worker_of_a_worker_group_on_one_node_is_replaced_in_a_whole_worker_group() -> None:
    group, decision = after(WHOLE, end("lost"))
    assert group == replace(WHOLE, lost=1)
    assert decision == Decision(say="lost a worker (1 of 3 times): reason")


def test_after_a_loss_on_several_nodes_the_places_that_are_left_are_counted() -> None:
    group, decision = after(WHOLE, end("lost", nodes=2))
    assert group == replace(WHOLE, lost=1, spans=True)
    assert decision == Decision(say="lost a worker (1 of 3 times): reason", count=True)
    # once on several nodes, what is left of them may be one
    assert after(replace(SHRUNK, workers=1), end("lost", nodes=1))[1].count


def test_the_workers_with_a_place_go_on_and_without_any_place_the_whole_worker_group_is_waited_for() -> None:
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


def test_without_the_memory_a_whole_worker_group_fails_and_fewer_workers_wait_for_it() -> None:
    assert after(WHOLE, end("no memory")) == (WHOLE, Decision(fail="reason"))
    group, decision = after(SHRUNK, end("no memory"))
    assert group == replace(WHOLE, fits=False)
    assert decision == Decision(say="2 workers have not the memory for it; it waits for its whole worker group")
    # from now on only the whole worker group will do
    group, decision = after(group, end("lost", nodes=2))
    assert not group.spans and not decision.count and group.workers == 4


def test_workers_that_were_asked_to_yield_make_place_for_the_whole_worker_group() -> None:
    # which counts as no failure
    assert after(SHRUNK, end("yielded", saved=8)) == (replace(SHRUNK, workers=4), Decision())


@pytest.mark.parametrize(("group", "count"), [(WHOLE, False), (SHRUNK, True)])
def test_no_place_is_no_failure_and_fewer_workers_are_counted_again_where_they_may_go_on(
    group: WorkerGroup, count: bool
) -> None:
    assert after(group, end("no room")) == (replace(group, waits=True), Decision(count=count))


def test_that_it_waits_for_its_whole_worker_group_is_said_at_once_and_then_every_ten_minutes() -> None:
    waits = replace(WHOLE, waits=True)
    assert is_to_say_it_waits(waits, now_s=0.0)
    said = replace(waits, said_s=100.0)
    assert not is_to_say_it_waits(said, now_s=100.0 + SAY_AGAIN_S)
    assert is_to_say_it_waits(said, now_s=101.0 + SAY_AGAIN_S)
    assert not is_to_say_it_waits(replace(waits, workers=2), now_s=0.0)  # it has places for two
    assert not is_to_say_it_waits(WHOLE, now_s=0.0)
    # a loss or a place for the worker group: it does not wait any more
    assert not after(waits, end("lost"))[0].waits and not after(waits, end("yielded"))[0].waits


def test_fewer_workers_take_no_more_groups_at_once_than_the_whole_worker_group_did(small_run: Run) -> None:
    # 4 groups: one each for 4 workers, so one at once for 3 of them; two each for 2
    assert sized(small_run, group_of(4), 3).groups_at_once == 1
    assert sized(small_run, group_of(2), 1).groups_at_once == 2
    assert sized(small_run, group_of(4), 4) is small_run
    few = dataclasses.replace(small_run, groups_at_once=1)
    assert sized(few, group_of(2), 1) is few
    # batch statistics are of the whole step: all of a worker's groups go through together
    row = load_params(PROJECT / "params.yaml").rows["ade20k_r50"]
    synchronised = dataclasses.replace(small_run, row=row)
    assert sized(synchronised, group_of(8), 4) is synchronised


@pytest.mark.ray
@pytest.mark.long
def test_a_worker_group_is_reserved_whole_or_not_at_all_and_on_one_node_if_one_has_the_room() -> None:
    code = """
        import collections, os, ray, time
        from ray.util import placement_group, placement_group_table
        from pipeline.compute.resources import Node, resources_for
        from pipeline.params.load import load_params
        from pipeline.training.elastic import places

        ray.init(log_to_driver=False)
        rows = load_params("params.yaml").rows
        nodes = [Node.of(node["Resources"]) for node in ray.nodes()]
        small, large = (resources_for(rows[name], nodes) for name in ("ade20k_swin-t", "coco_panoptic_swin-l-in22k"))

        def reserved(resources, workers, wait_s):
            group = placement_group([resources.per_worker] * workers, strategy="PACK")
            ready = group.wait(wait_s)
            nodes = placement_group_table(group)["bundles_to_node_id"].values()
            return group, sorted(collections.Counter(nodes).values()) if ready else None

        def free(expected):
            "The GPUs that nobody has, which Ray knows a little later."
            for _ in range(600):
                if (found := ray.available_resources().get("GPU", 0)) == expected:
                    break
                time.sleep(0.5)
            return found

        sixteen, where = reserved(large, 16, 600)
        print(where)
        ray.util.remove_placement_group(sixteen)
        few, _ = reserved(small, 2, 600)
        eight, where = reserved(small, 8, 600)  # 6 and 8 places: on the node that has 8
        print(where)
        print(places(small))
        second, where = reserved(small, 8, 3)  # 6 are free: it holds none of them
        third, also = reserved(small, 8, 3)
        print(where, also, free(6.0))
        ray.util.remove_placement_group(eight)
        while not second.wait(1) and not third.wait(1):
            pass
        print(free(6.0))  # one of the two has all of the eight
        for group in (second, third, few):
            ray.util.remove_placement_group(group)

        os.environ["M2F_ACCELERATOR_TYPE"] = "H100"
        named = resources_for(rows["coco_panoptic_swin-l-in22k"], nodes)
        group, where = reserved(named, named.workers, 600)
        (node,) = {*placement_group_table(group)["bundles_to_node_id"].values()}
        resources = [node_of["Resources"] for node_of in ray.nodes() if node_of["NodeID"] == node]
        print(where, "accelerator_type:H100" in resources[0], free(8.0))
    """
    with RayNodes() as nodes:
        for gpu_type in ("A100", "H100"):
            nodes.add(cpus=16, gpus=8, resources=json.dumps({f"accelerator_type:{gpu_type}": 1}))
        answer = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=PROJECT,
            env={**os.environ, **nodes.settings, "M2F_WORKERS": ""},
            capture_output=True,
            text=True,
        )
    lines = ["[8, 8]", "[8]", "6", "None None 6.0", "6.0", "[8] True 8.0"]
    assert answer.stdout.splitlines() == lines, answer.stderr
