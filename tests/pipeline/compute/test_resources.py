from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.compute.resources import Node, resources_for, share
from pipeline.params.load import load_params

PARAMS = load_params(Path(__file__).parents[3] / "params.yaml")


def test_groups_are_shared_whole_and_as_evenly_as_possible() -> None:
    # 8 groups on 3 workers: 3, 3, 2
    assert [list(share(8, worker=w, workers=3)) for w in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert list(share(8, worker=0, workers=1)) == list(range(8))


def test_more_workers_than_groups_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F_WORKERS", "9")
    with pytest.raises(ValueError, match="9 workers for row cityscapes_r50, which has 8 groups; use 1 to 8"):
        resources_for(PARAMS.row("cityscapes_r50"), [Node(gpus=16, cpus=64)])


def test_batch_statistics_on_a_cpu_run_on_one_worker_or_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M2F_WORKERS", raising=False)
    row = PARAMS.row("ade20k_r50")
    assert resources_for(row, [Node(gpus=0, cpus=4)]).workers == 1
    assert resources_for(row, [Node(gpus=8, cpus=64)]).workers == 8
    monkeypatch.setenv("M2F_WORKERS", "2")
    assert resources_for(PARAMS.row("ade20k_swin-t"), [Node(gpus=0, cpus=4)]).workers == 2  # layer norm
    with pytest.raises(ValueError, match="which workers on CPUs do not share; set M2F_WORKERS=1"):
        resources_for(row, [Node(gpus=0, cpus=4)])


def test_groups_that_share_batch_statistics_go_through_together(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(gpus=8, cpus=64)
    row = PARAMS.row("ade20k_r50")  # 8 groups: on 3 workers 3, 3 and 2
    monkeypatch.setenv("M2F_WORKERS", "3")
    monkeypatch.setenv("M2F_GROUPS_AT_ONCE", "3")
    assert resources_for(row, [node]).groups_at_once == 3
    monkeypatch.setenv("M2F_GROUPS_AT_ONCE", "2")
    with pytest.raises(ValueError, match=r"the 3 groups of a worker cannot be taken 2 at a time; .* or use 4 workers"):
        resources_for(row, [node])
    assert resources_for(PARAMS.row("ade20k_swin-t"), [node]).groups_at_once == 2  # layer norm
    assert resources_for(row, [node], training=False).groups_at_once == 2


def test_workers_follow_the_machine_up_to_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M2F_WORKERS", raising=False)
    row = PARAMS.row("shapes_tiny")  # 4 groups
    assert resources_for(row, [Node(gpus=0, cpus=2)]).workers == 2
    assert resources_for(row, [Node(gpus=0, cpus=64)]).workers == 4
    assert resources_for(row, [Node(gpus=16, cpus=64)]).workers == 4


def test_a_setting_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F_WORKERS", "two")
    with pytest.raises(ValueError, match="M2F_WORKERS is 'two'; it must be a whole number, 0 or more"):
        resources_for(PARAMS.row("shapes_tiny"), [Node(gpus=0, cpus=2)])


def test_evaluation_is_not_bound_by_groups_or_batch_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M2F_WORKERS", raising=False)
    row = PARAMS.row("ade20k_r50")
    assert resources_for(row, [Node(gpus=16, cpus=64)], training=False).workers == 16
    assert resources_for(row, [Node(gpus=0, cpus=4)], training=False).workers == 4
    monkeypatch.setenv("M2F_WORKERS", "2")
    assert resources_for(row, [Node(gpus=0, cpus=4)], training=False).workers == 2


def test_more_workers_than_there_are_cores_or_gpus_is_one_sentence_instead_of_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("M2F_WORKERS", "4")
    row = PARAMS.row("shapes_tiny")
    with pytest.raises(ValueError, match="M2F_WORKERS=4, but there are 2 cores here; set it to 2 or less"):
        resources_for(row, [Node(gpus=0, cpus=2)])
    with pytest.raises(ValueError, match="M2F_WORKERS=4, but there are 3 GPUs here"):
        resources_for(row, [Node(gpus=3, cpus=64)])


def test_a_training_takes_a_worker_group_and_there_are_as_many_worker_groups_as_there_is_room_or_need_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("M2F_WORKERS", raising=False)
    five = dataclasses.replace(PARAMS.row("ade20k_swin-t"), seeds=(0, 1, 2, 3, 4))  # 8 groups
    # 2 nodes of 8 GPUs and 64 cores hold two worker groups of 8; a head without GPUs lends no cores to them
    found = resources_for(five, [Node(0, 16), Node(8, 64), Node(8, 64)])
    assert (found.workers, found.seeds_at_once, found.cpus_per_worker) == (8, 2, 8)
    assert str(found) == "8 workers with 1 GPU and 8 cores each"
    monkeypatch.setenv("M2F_WORKERS", "1")
    # 16 GPUs hold 16 worker groups of one, but there are five seeds
    assert resources_for(five, [Node(8, 64), Node(8, 64)]).seeds_at_once == 5
    # without GPUs the cores are shared by those who work at once: 5 of 12 cores' 2 each; one seed alone takes them all
    found = resources_for(five, [Node(0, 12)])
    assert (found.seeds_at_once, found.cpus_per_worker) == (5, 2)
    alone = dataclasses.replace(five, seeds=(0,))
    assert str(resources_for(alone, [Node(0, 2)])) == "1 worker with 2 cores"


def test_a_workers_cores_are_all_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F_WORKERS", "3")
    row = dataclasses.replace(PARAMS.row("ade20k_swin-t"), seeds=(0,))
    # 4 + 2 cores for 3 workers are 2 each; 5 + 1 hold only two workers of 2 cores, so they get 1
    assert resources_for(row, [Node(0, 4), Node(0, 2)]).cpus_per_worker == 2
    assert resources_for(row, [Node(0, 5), Node(0, 1)]).cpus_per_worker == 1


def test_a_cluster_without_a_place_for_a_worker_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M2F_WORKERS", raising=False)
    with pytest.raises(ValueError, match="no GPU and no core that a worker could take"):
        resources_for(PARAMS.row("shapes_tiny"), [Node(0, 0)])


def test_sixteen_groups_take_two_nodes_of_eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M2F_WORKERS", raising=False)
    row = PARAMS.row("coco_panoptic_swin-l-in22k")  # 16 groups of one picture
    found = resources_for(row, [Node(0, 6), Node(8, 96), Node(8, 96), Node(8, 96), Node(8, 96)])
    # 16 workers of 12 cores are all that two nodes have: 2 * 96
    assert (found.workers, found.cpus_per_worker) == (16, 12)
    assert resources_for(row, [Node(8, 96)]).workers == 8  # as many as there are: 2 groups each


# Which GPUs

MIXED = [Node(0, 6), Node(8, 96, "A100"), Node(8, 192, "H100"), Node(4, 64, "A100")]


def test_a_node_is_read_from_what_ray_says_of_it() -> None:
    node = {"CPU": 96.0, "GPU": 8.0, "memory": 1e12, "node:10.0.0.1": 1.0, "accelerator_type:A100": 1.0}
    assert Node.of(node) == Node(8, 96, "A100")
    assert Node.of({"node:10.0.0.1": 1.0}) == Node(0, 0)


def test_only_gpus_of_the_wanted_type_are_counted_shared_and_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M2F_WORKERS", raising=False)
    row = dataclasses.replace(PARAMS.row("ade20k_swin-t"), seeds=(0, 1, 2, 3, 4))  # 8 groups
    found = resources_for(row, MIXED)  # 20 GPUs: two worker groups of 8; 96 / 8 = 12 cores each, on H100 as on A100
    assert (found.workers, found.seeds_at_once, found.cpus_per_worker, found.gpu_type) == (8, 2, 12, None)
    assert found.per_worker == {"CPU": 12, "GPU": 1}
    monkeypatch.setenv("M2F_ACCELERATOR_TYPE", "H100")
    found = resources_for(row, MIXED)  # 8 GPUs with 192 / 8 = 24 cores each
    assert (found.workers, found.seeds_at_once, found.cpus_per_worker) == (8, 1, 24)
    assert found.per_worker == {"CPU": 24, "GPU": 1, "accelerator_type:H100": 0.001}
    assert str(found) == "8 workers with 1 H100 and 24 cores each"
    monkeypatch.setenv("M2F_ACCELERATOR_TYPE", "A100")
    assert resources_for(row, MIXED, training=False).workers == 12
    monkeypatch.setenv("M2F_WORKERS", "16")
    with pytest.raises(ValueError, match="M2F_WORKERS=16, but there are 12 A100 GPUs here; set it to 12 or less"):
        resources_for(PARAMS.row("coco_panoptic_swin-l-in22k"), MIXED)
    monkeypatch.setenv("M2F_WORKERS", "0")  # this process, on what it finds
    assert resources_for(row, [Node(1, 8)]).gpu_type is None


def test_a_type_of_gpu_that_is_not_there_is_one_sentence_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F_ACCELERATOR_TYPE", "V100")
    row = PARAMS.row("ade20k_swin-t")
    with pytest.raises(ValueError, match="M2F_ACCELERATOR_TYPE=V100, but no node .*; there are A100 and H100$"):
        resources_for(row, MIXED)
    with pytest.raises(ValueError, match="no node here has such GPUs; Ray knows the type of none$"):
        resources_for(row, [Node(8, 96)])
