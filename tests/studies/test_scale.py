from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest

from pipeline.params.load import load_params
from pipeline.params.schema import Params
from studies import scale, soak
from studies.scale import (
    MEASURED,
    SIZES,
    Bound,
    Training,
    all_reduce_s,
    best_interval_s,
    bounds,
    lost_share,
    share_s,
    simulated_loss,
    trainings,
)
from tests.helpers.shared import PROJECT


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(PROJECT / "params.yaml")


@pytest.fixture(scope="module")
def r50(params: Params) -> Training:
    (training,) = trainings(params, ["ade20k_r50"])
    return training


# One training


def test_a_training_asks_for_what_its_recipe_says(r50: Training) -> None:
    assert r50.gpus == 8 and r50.pools == 1
    # 44.0 million parameters (docs/costs.md): four bytes each, and with two moments of Adam three times that.
    assert r50.gradient_bytes == pytest.approx(44.0e6 * 4, rel=0.005)
    assert r50.checkpoint_bytes == pytest.approx(44.0e6 * 12, rel=0.005)
    # docs/costs.md plans it with 3 x 512 x 512 / (512 x 704 x 26.59) s a picture, two of them on a GPU, at 0.9.
    assert r50.step_s == pytest.approx(2 * 3 * 512 * 512 / (512 * 704 * 26.59) / 0.9, rel=0.01)
    assert r50.interval_s == pytest.approx(1000 * r50.step_s)
    # raw: four bytes of each of 512 x 683 pixels, 16 pictures a step
    assert r50.read_bytes_s == pytest.approx(16 / r50.step_s * 4 * 512 * 683)
    # a point of 33 values every 50 steps; 8 of the machine and 5 of each of 8 GPUs every 10 s
    assert r50.metrics_s == pytest.approx(33 / (50 * r50.step_s) + 4.8)


def test_the_values_of_a_point_are_those_that_a_training_logs(params: Params) -> None:
    decoder = params.row("ade20k_r50").model.query_decoder
    assert 3 * (decoder.layers + 1) + 3 == scale.POINT


def test_a_row_of_sixteen_groups_takes_two_pools(params: Params) -> None:
    (large,) = trainings(params, ["coco_panoptic_swin-l-in22k"])
    assert (large.gpus, large.pools) == (16, 2)


# Formulas and simulations


def test_a_ring_sends_every_part_twice_but_its_own() -> None:
    assert all_reduce_s(8e9, workers=2, bytes_s=4e9) == 2.0  # half of it each way
    assert all_reduce_s(8e9, workers=8, bytes_s=4e9) == 3.5  # 2 x 7/8 x 2 s
    assert all_reduce_s(8e9, workers=1, bytes_s=4e9) == 0.0


def test_transfers_share_a_server_equally() -> None:
    # 100 at 10 a second alone; two at once get 6 of 12 each
    assert share_s([0.0], 100, each=10, together=12) == [10.0]
    assert share_s([0.0, 0.0], 100, each=10, together=12) == pytest.approx([100 / 6, 100 / 6])
    # The second begins at 5 s, when the first has 50 left: both at 6 until 5 + 50/6 s, then the second alone has 50
    # left, at 10 a second.
    first, second = share_s([0.0, 5.0], 100, each=10, together=12)
    assert first == pytest.approx(5 + 50 / 6) and second == pytest.approx(50 / 6 + 5)
    # nobody waits for anybody at a server without a limit, and the order of arrivals does not matter
    assert share_s([3.0, 0.0, 1.0], 100, each=10, together=math.inf) == pytest.approx([10, 10, 10])
    assert share_s([5.0, 0.0], 100, each=10, together=12) == pytest.approx([second, first])


def test_the_best_interval_is_where_checkpoints_cost_as_much_as_work_done_again() -> None:
    # 2 s for one, a fault in 10,000 s: sqrt(40,000) = 200 s; 1 % for checkpoints, 1 % for 100 s done again.
    assert best_interval_s(2.0, 10_000.0) == 200.0
    assert lost_share(200.0, 2.0, 10_000.0, 0.0) == pytest.approx(0.02)
    assert lost_share(200.0, 2.0, 10_000.0, 50.0) == pytest.approx(0.025)
    for other in (100.0, 150.0, 300.0, 400.0):
        assert lost_share(other, 2.0, 10_000.0, 50.0) > 0.025


def test_the_simulation_loses_what_the_formula_says_where_faults_are_rare() -> None:
    for interval_s in (100.0, 200.0, 600.0):
        facts = {"stall_s": 2.0, "mean_s": 10_000.0, "restart_s": 50.0}
        assert simulated_loss(interval_s, **facts) == pytest.approx(lost_share(interval_s, **facts), rel=0.08)


def test_a_bound_is_passed_at_the_first_whole_pool_above_its_limit() -> None:
    bound = Bound(name="", unit="", base=10, per_pool=3, limit=20, change="")
    assert bound.load(8) == 13 and bound.load(16) == 16
    assert bound.binds_at == 32  # 22 of 20; with three pools 19
    assert bound.load(bound.binds_at) > bound.limit >= bound.load(bound.binds_at - 8)


def test_every_bound_says_what_to_do_and_grows_with_pools(r50: Training) -> None:
    for bound in bounds([r50]):
        assert bound.change and bound.per_pool > 0 and bound.limit > bound.base >= 0
        assert bound.load(bound.binds_at) >= bound.limit


def test_checkpoints_of_many_pools_wait_for_each_other_only_on_a_shared_link(r50: Training) -> None:
    alone = r50.checkpoint_bytes / 1.25e9
    assert scale.checkpoint_stall_s(r50, pools=1, each=1.25e9, together=1.25e9) == pytest.approx(alone)
    assert scale.checkpoint_stall_s(r50, pools=64, each=1.25e9, together=math.inf) == pytest.approx(alone)
    assert scale.checkpoint_stall_s(r50, pools=64, each=1.25e9, together=1.25e9) > 1.05 * alone


def test_the_head_is_measured_by_what_runs_on_it_for_a_row_and_for_a_training() -> None:
    # Two moments, 10 s apart. A training's driver is replaced between them: 500 MiB either way, 0 and 0 s seen of its
    # processor time. The raylet takes 1 s of 10; workers on other hosts do not count.
    seen = [
        ("head", "raylet", "1", 0, 20, 5.0),
        ("head", "raylet", "1", 10, 30, 6.0),
        ("head", "dvc repro", "2", 0, 44, 1.0),
        ("head", "dvc repro", "2", 10, 44, 1.5),
        ("head", "trial (driver of a seed)", "3", 0, 500, 7.0),
        ("head", "trial (driver of a seed)", "4", 10, 500, 2.0),
        ("worker1", "raylet", "1", 0, 999, 0.0),
        ("worker1", "raylet", "1", 10, 999, 9.0),
    ]
    assert set(scale.PARTS) <= {*soak.ROLES.values()}
    names = ("host", "role", "pid", "at_s", "pss_mib", "cpu_s")
    loads = scale.head_loads(dict(zip(names, map(str, each), strict=True)) for each in seen)
    assert loads == {
        "base": scale.HeadLoad(25.0, pytest.approx(0.1)),
        "row": scale.HeadLoad(44.0, pytest.approx(0.05)),
        "training": scale.HeadLoad(500.0, 0.0),
    }


def test_samples_that_are_missing_or_too_few_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples.csv"
    monkeypatch.setattr(sys, "argv", ["scale", "--measure", "head", "--samples", str(path)])
    with pytest.raises(SystemExit, match=r"error: .*No such file .*; python -m studies.soak --samples"):
        scale.main()
    path.write_text("host,role,pid,at_s,pss_mib,cpu_s\nhead,raylet,1,0,20,5\n")
    with pytest.raises(SystemExit, match="show the head less than twice"):
        scale.main()


# The page


@pytest.mark.slow
def test_the_page_shows_the_tables_that_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scale"])
    scale.main()
    page = (PROJECT / "studies/scale.md").read_text()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 50
    assert [line for line in lines if line not in page] == []


def test_the_chart_is_the_same_twice(r50: Training, tmp_path: Path) -> None:
    for name in ("chart.svg", "again.svg"):
        scale.chart([r50], str(tmp_path / name))
    assert (tmp_path / "chart.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_the_page_names_its_commands_and_what_was_measured() -> None:
    page = (PROJECT / "studies/scale.md").read_text()
    assert "`python -m studies.scale --chart studies/scale.svg`" in page and "(scale.svg)" in page
    assert "python -m studies.scale --measure mlflow" in page
    assert all(f"{gpus} GPUs" in page for gpus in SIZES)
    for database, rate in MEASURED.mlflow_metrics_s.items():
        assert re.search(rf"\| MLflow on {database}: values a second \| {rate:,.0f} \|", page)


# Measuring


@pytest.mark.slow
@pytest.mark.full
def test_senders_are_counted_by_what_a_real_server_stores(capsys: pytest.CaptureFixture[str]) -> None:
    for seconds in (3.0, 30.0, 300.0):  # until a request is answered within them, on however slow a machine
        scale.measure_mlflow("", seconds)
        shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        lines = [line.strip("| ").split(" | ") for line in shown]
        if all(float(line[2]) > 0 for line in lines[2:]):
            break
    senders = ["1, without a pause", "8, without a pause", "8, without a pause", "64, each every 5 s"]
    assert [line[0] for line in lines[2:]] == senders
    for _, values, requests_s, values_s, *_, refused in lines[2:]:
        assert int(refused) == 0
        # each is rounded: requests to 0.1 a second
        assert float(values_s.replace(",", "")) == pytest.approx(
            float(requests_s) * int(values), abs=0.06 * int(values)
        )
    assert float(lines[2][2]) > 0
