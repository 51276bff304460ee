from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from studies import soak
from studies.soak import EVERY_S, FAULT_TYPES, Fault, Sample, Seen, Watch, consequences, growth, role, schedule, slope
from tests.cluster.hosts import Hosts
from tests.helpers.project_copy import Copy
from tests.helpers.shared import PROJECT

HOUR_S = 3600.0


# Faults


def test_the_same_seed_gives_the_same_faults_wherever_it_is_drawn() -> None:
    assert schedule(1, 4) == [
        Fault(68.1, "worker stopped", "worker1", 3.5),
        Fault(157.8, "link cut", "worker2", 16.2),
        Fault(223.4, "worker killed", "worker2", 0.0),
    ]
    assert schedule(2, 45) != schedule(1, 45)


def test_a_longer_time_adds_faults_and_changes_none() -> None:
    short, long = schedule(1, 10), schedule(1, 45)
    assert long[: len(short)] == short and len(long) > len(short)
    assert all(fault.at_s < 45 * 60 for fault in long)


def test_faults_keep_their_distance_and_stay_within_what_their_kind_allows() -> None:
    faults = schedule(3, 600)
    for one, next_one in itertools.pairwise(faults):
        assert EVERY_S[0] - 0.1 <= next_one.at_s - one.at_s <= EVERY_S[1] + 0.1
    for fault in faults:
        fault_type = FAULT_TYPES[fault.fault_type]
        assert fault_type.lasts_s[0] <= fault.lasts_s <= fault_type.lasts_s[1] and fault.host in fault_type.hosts
    # ten hours have some 400 faults: every kind comes about as often as its weight says
    weights = sum(fault_type.weight for fault_type in FAULT_TYPES.values())
    for name, fault_type in FAULT_TYPES.items():
        share = sum(fault.fault_type == name for fault in faults) / len(faults)
        assert share == pytest.approx(fault_type.weight / weights, abs=0.06)


# What they do


def test_a_curve_tells_how_far_a_training_is_and_how_far_it_went_back(tmp_path: Path) -> None:
    watch = Watch(tmp_path, tmp_path / "log", 0.0)
    lines = [f'{{"step": {step}, "loss": 1.0, "time_ms": 5}}' for step in (2, 4, 6, 8)]
    watch.look("a", lines[:2])
    watch.look("a", lines[:2])  # nothing new
    watch.look("a", [*lines, '{"step": 1'])  # a line that is being written
    watch.look("a", lines[:2])  # it goes on from a checkpoint after 4 steps
    watch.look("a", lines[:3])
    assert [(look.step, look.kept) for look in watch.seen] == [(4, None), (8, None), (8, 4), (6, None)]


def test_the_consequences_of_a_fault_are_its_longest_pause_and_what_was_done_twice() -> None:
    fault = Fault(100.0, "worker killed", "worker1")
    seen = [
        Seen(98.0, "a", 40),
        Seen(99.0, "a", 42),
        Seen(121.0, "a", 42, kept=30),  # 12 steps are done again
        Seen(124.0, "a", 32),  # 25 s after the last point, 24 s after the fault
        Seen(125.0, "a", 34),
        Seen(190.0, "a", 34, kept=20),  # that is the next fault's
    ]
    said = [(90.0, "lost a worker (earlier)"), (101.0, "step 42"), (103.5, "x: lost a worker (1 of 3 times): killed")]
    assert consequences(fault, 100.0, 170.0, seen, said) == {
        "noticed_s": 3.5,
        "noticed": "x: lost a worker (1 of 3 times): killed",
        "pause_s": 25.0,
        "again_s": 24.0,
        "twice": 12,
        "seed_change": False,
        "survived": True,
    }


def test_a_fault_after_which_no_step_comes_is_not_survived() -> None:
    fault = Fault(100.0, "raylet killed", "worker1")
    found = consequences(fault, 100.0, 170.0, [Seen(99.0, "a", 42)], [])
    assert (found["survived"], found["again_s"], found["noticed"]) == (False, None, None)


def test_a_short_pause_is_told_but_is_no_interruption() -> None:
    fault = Fault(100.0, "MLflow killed", "head")
    found = consequences(fault, 100.0, 170.0, [Seen(99.0, "a", 42), Seen(102.5, "a", 44), Seen(103.0, "a", 46)], [])
    assert (found["pause_s"], found["again_s"], found["survived"]) == (3.5, None, True)


def test_a_seed_that_ends_after_a_fault_is_named_since_it_pauses_too() -> None:
    fault = Fault(100.0, "link cut", "worker1", 2.0)
    assert consequences(fault, 100.0, 170.0, [Seen(99.0, "a", 42), Seen(130.0, "b", 2)], [])["seed_change"]


# Growth


def test_a_slope_and_its_error_are_those_of_least_squares() -> None:
    # The first quarter of five hours is warm-up. Left are t = 1, 2, 3, 4 h with 0, 1, 1, 2; around their means
    # -1.5, -0.5, 0.5, 1.5 and -1, 0, 0, 1: slope 3 / 5. Rests -0.1, 0.3, -0.3, 0.1, their squares 0.2, two degrees of
    # freedom: error sqrt(0.1 / 5). They alternate, so it is not widened.
    found = slope([[(hour * HOUR_S, value) for hour, value in enumerate((50.0, 0.0, 1.0, 1.0, 2.0))]])
    assert found is not None
    assert found.per_hour == pytest.approx(0.6) and found.error == pytest.approx(0.02**0.5)
    assert (found.processes, found.samples) == (1, 4)
    assert found.grows  # 4.2 errors


def test_samples_that_resemble_each_other_say_less() -> None:
    # t = 2 to 7 h: around its mean +-0.5, 1.5, 2.5, squares 17.5. Values are even around it: slope 0. Squares of the
    # rests 12, four degrees of freedom: sqrt(3 / 17.5). Neighbours: 1 - 2 + 4 - 2 + 1 = 2, so r = 2 / 12, and the
    # error is sqrt(7 / 5) of that.
    values = (0.0, 0.0, 1.0, 1.0, -2.0, -2.0, 1.0, 1.0)
    found = slope([[(hour * HOUR_S, value) for hour, value in enumerate(values)]])
    assert found is not None
    assert found.per_hour == pytest.approx(0.0) and found.error == pytest.approx((3 / 17.5 * 7 / 5) ** 0.5)
    assert not found.grows


def test_a_restarted_process_with_another_level_is_no_growth_and_a_common_slope_is() -> None:
    minutes = [60.0 * minute for minute in range(20)]
    flat = [[(at, 300.0 + at % 120 / 60) for at in minutes], [(at + 2000, 500.0 + at % 120 / 60) for at in minutes]]
    found = slope(flat)
    assert found is not None and abs(found.per_hour) < 3 * found.error and not found.grows
    growing = [[(at, value + 6 * at / HOUR_S) for at, value in series] for series in flat]
    steeper = slope(growing)
    assert steeper is not None and steeper.per_hour == pytest.approx(found.per_hour + 6) and steeper.processes == 2


def test_what_lives_too_short_or_not_at_all_has_no_slope() -> None:
    assert slope([]) is None
    assert slope([[(15.0 * count, 100.0) for count in range(40)], []]) is None  # 585 s
    assert slope([[(15.0 * count, 100.0) for count in range(41)], []]) is not None


def test_growth_is_told_by_role_and_processes_of_two_hosts_with_one_number_are_two() -> None:
    samples = [
        Sample(60.0 * minute, host, "raylet", 7, 150.0, 100.0 + minute / 60, 30, 5.0 + 6.0 * minute)
        for minute in range(20)
        for host in ("worker1", "worker2")
    ]
    (line,) = growth([*samples])
    assert (line["role"], line["processes"], line["longest_min"], line["most_files"]) == ("raylet", 2, 19.0, 30)
    assert line["mib"]["per_hour"] == pytest.approx(1.0) and line["mib"]["grows"]
    assert line["files"]["per_hour"] == 0 and not line["files"]["grows"]
    assert line["cores"] == pytest.approx(0.2)  # 6 of 60 s each, of two


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/env/lib/python3.11/site-packages/ray/core/src/ray/raylet/raylet --raylet_socket_name=x", "raylet"),
        ("/env/lib/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp/ray/raylet", "gcs_server"),
        ("ray::RayTrainWorker.execute", "training worker"),
        ("ray::SomethingElse", "other Ray actor"),
        ("/env/bin/python /env/bin/mlflow server --port 5000", "MLflow server"),
        ("bash --login -c ray start", None),
        ("unshare --mount --pid bash -c ray", None),
        ("sshd: /usr/sbin/sshd -D [listener]", None),
        ("/usr/bin/python3 something.py", "other: python3"),
        ("", None),
    ],
)
def test_a_process_is_known_by_its_command_line(command: str, expected: str | None) -> None:
    assert role(command) == expected


# The record


RECORD = {
    "seed": 1,
    "trained_min": 4.0,
    "steps_done_twice": 12,
    "faults": [
        {
            "done_at_s": 68.2, "fault_type": "worker killed", "host": "worker1", "lasts_s": 0.0, "hit": 1,
            "noticed_s": 3.5, "pause_s": 25.0, "again_s": 24.0, "twice": 12, "seed_change": False, "survived": True,
        },
        {
            "done_at_s": 150.0, "fault_type": "link cut", "host": "worker2", "lasts_s": 16.2, "hit": 1,
            "noticed_s": None, "pause_s": None, "again_s": None, "twice": 0, "seed_change": False, "survived": False,
        },
    ],
    "memory": [
        {
            "role": "raylet", "processes": 2, "longest_min": 19.0, "most_mib": 100.3, "most_files": 30, "cores": 0.2,
            "mib": {"per_hour": 1.0, "error": 0.1, "grows": True}, "files": None,
        }
    ],
    "seeds": [
        {
            "run": "ab", "finished": True, "seed": 1, "equal": False, "same_to": 118, "apart": 2.4e-7,
            "pools": [[0, 2], [40, 2], [120, 1], [140, 2]], "pq": [0.3514, 0.349], "mlflow_lost": 0,
            "mlflow_doubled": 0,
        },
        {
            "run": "ef", "finished": True, "seed": 0, "equal": True, "same_to": 1000, "apart": None,
            "pools": [[0, 2], [60, 2]], "pq": [0.36, 0.36], "mlflow_lost": 0, "mlflow_doubled": 0,
        },
        {"run": "cd", "finished": False, "pools": [], "mlflow_doubled": 3},
    ],
    "left": [],
}  # fmt: skip


def test_a_record_is_shown_as_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "soak.json").write_text(json.dumps(RECORD))
    monkeypatch.setattr(sys, "argv", ["soak", "--show", str(tmp_path / "soak.json")])
    soak.main()
    shown = capsys.readouterr().out
    assert "| 68 | worker killed, worker1 | - | 3.5 | 25.0 | 24.0 | 12 | yes |" in shown
    assert "| 150 | link cut, worker2 | 16.2 | - | - | - | 0 | no |" in shown
    assert "| link cut | 1 | 0 | 0 | - | 0 |" in shown
    assert "| raylet | 2 | 19 | 100 | +1.0 ± 0.1 **grows** | 30 | too short | 0.200 |" in shown
    apart = "no: losses equal to step 118, the next 2e-07 apart"
    assert shown.splitlines()[-5:-2] == [
        "| 0 | 2 | bit for bit | 36.00, 36.00 | 0 | 0 |",
        f"| 1 | 2, 1 from step 120, 2 from step 140 | {apart} | 35.14, 34.90 | 0 | 0 |",
        "| (not finished) | - | - | - | - | 3 |",
    ]
    assert "After `down` there was still: nothing." in shown


def test_a_record_that_is_none_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["soak", "--show", str(tmp_path / "soak.json")])
    with pytest.raises(SystemExit, match=r"error: .*soak.json is no record of a soak \(.*No such file"):
        soak.main()


# The comparison


def test_checkpoints_are_equal_when_every_bit_is_whatever_their_headers_say(tmp_path: Path) -> None:
    weights = {"model.w": torch.tensor([1.0, -0.0]), "optimizer.step.w": torch.tensor(3.0)}
    save_file(weights, tmp_path / "one", metadata={"state": "12 s"})
    save_file(weights, tmp_path / "other", metadata={"state": "99 s"})
    save_file({**weights, "model.w": torch.tensor([1.0, 0.0])}, tmp_path / "sign")
    save_file({"model.w": weights["model.w"]}, tmp_path / "fewer")
    assert soak.equal(tmp_path / "one", tmp_path / "other")
    assert not soak.equal(tmp_path / "one", tmp_path / "sign")
    assert not soak.equal(tmp_path / "one", tmp_path / "fewer")


def test_a_run_is_told_by_its_pools_and_by_what_mlflow_has_of_it(tmp_path: Path) -> None:
    (tmp_path / "worker_groups.json").write_text('[{"from_step": 0, "workers": 2}, {"from_step": 4, "workers": 1}]')
    unfinished = {"run": tmp_path.name, "finished": False, "pools": [(0, 2), (4, 1)], "mlflow_doubled": 1}
    assert soak.about(tmp_path, [2, 4, 4], 8) == unfinished
    (tmp_path / "finished.json").write_text('{"seed": 5}')
    assert soak.about(tmp_path, [2, 4, 4], 8) == unfinished | {"finished": True, "seed": 5, "mlflow_lost": 2}  # 6 and 8


@pytest.mark.full
def test_a_seed_trained_twice_without_faults_is_equal(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    copy = Copy(tmp_path / "copy")
    copy.params["datasets"]["shapes"]["generate"] |= {"train": 8, "val": 2}
    copy.params["rows"]["shapes_tiny"]["train"] |= {"steps": 3, "val_interval": 3, "log_every": 1}
    copy.write_params()
    copy.dvc("repro", "--no-run-cache", "shard@shapes", M2F_STORAGE=str(tmp_path / "kept"))
    shutil.copy(copy.folder / "params.yaml", tmp_path)
    shutil.copytree(copy.folder / "results", tmp_path / "results")
    entry = {"run": "key", "seed": 0, "finished": True}
    whole = soak.Soak(minutes=1.0, seed=1, steps=3, lab=Hosts(tmp_path), record={"seeds": [entry]})
    shutil.move(whole._undisturbed(entry), whole.kept / "runs/key")
    whole.check()
    assert (entry["equal"], entry["same_to"], entry["apart"]) == (True, 3, None)
    # and one whose second loss is another: 1 % more
    curve = whole.kept / "runs/key/curve.jsonl"
    points = [json.loads(line) for line in curve.read_text().splitlines()]
    points[1]["loss"] *= 1.01
    curve.write_text("".join(json.dumps(point) + "\n" for point in points))
    found = soak.beside(curve.parent, tmp_path / "again/key", 3)
    assert found["same_to"] == 1 and found["apart"] == pytest.approx(0.01)


def test_the_page_names_the_command_and_the_bounds_of_the_faults() -> None:
    page = " ".join((PROJECT / "studies/soak.md").read_text().split())
    assert "python -m studies.soak --minutes 45 --seed 1 --out soak.json" in page
    assert f"every {EVERY_S[0]:g} to {EVERY_S[1]:g} s a fault is drawn" in page
    assert f"a checkpoint every {soak.CHECKPOINT_EVERY}" in page and f"every {soak.LOG_EVERY} steps" in page
    cut = FAULT_TYPES["link cut"].lasts_s
    assert f"link cut for {cut[0]:g} to {cut[1]:g} s ({FAULT_TYPES['link cut'].weight})" in page
