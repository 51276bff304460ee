"""`ray up`, a row on two hosts, a laptop that goes away, results home, `ray down`: for real, on hosts in namespaces.

The tests share one cluster, in this order.
"""

from __future__ import annotations

import json
import re
import signal

import pytest

from tests.cluster.conftest import Cluster, wait_for
from tests.cluster.hosts import ADDRESSES
from tests.helpers.waiting import LIMIT_S

pytestmark = pytest.mark.cluster

REPRO = "repro evaluate@shapes_tiny M2F_WORKERS=2"


def runs(cluster: Cluster) -> dict[str, str]:
    """Run key -> status of the trainings that MLflow knows, asked from a worker."""
    ask = (
        "from mlflow import MlflowClient; c = MlflowClient('http://10.77.0.10:5000'); import json;"
        "e = [x.experiment_id for x in c.search_experiments()];"
        "print(json.dumps({r.data.tags['m2f.run_key']: r.info.status for r in c.search_runs(e)"
        " if 'm2f.run_key' in r.data.tags}))"
    )
    found: dict[str, str] = json.loads(cluster.lab.on("worker1", f'python -c "{ask}"').stdout.splitlines()[-1])
    return found


def test_ray_up_starts_three_machines_that_know_the_token(cluster: Cluster) -> None:
    wait_for("three machines", lambda: cluster.head("ray status").count("local.cluster.node") == 1)
    wait_for("three machines", lambda: "3 local.cluster.node" in cluster.head("ray status"))
    stranger = cluster.lab.on("worker2", "RAY_AUTH_TOKEN=other ray status --address 10.77.0.10:6379", check=False)
    assert stranger.returncode != 0


@pytest.mark.full
def test_a_row_trains_on_two_hosts_while_the_laptop_goes_away_and_comes_back(cluster: Cluster) -> None:
    lab = cluster.lab
    log = lab.folder / "submit.log"
    laptop = lab.start("laptop", f"cd ~/project && ray submit cluster.yaml pipeline/submit.py -- {REPRO}", log)
    wait_for("steps", lambda: " steps (" in log.read_text() or laptop.poll() is not None)
    assert laptop.poll() is None, log.read_text()
    training = {host: lab.pids(host, "RayTrainWorker") for host in ("head", "worker1", "worker2")}
    for host in training:  # held, so that it is still under way when the laptop is back, however fast this machine is
        lab.kill(host, "RayTrainWorker", signal.SIGSTOP)
    assert {host: bool(pids) for host, pids in training.items()} == {"head": False, "worker1": True, "worker2": True}
    try:
        lab.cut("laptop")
        assert laptop.wait(timeout=LIMIT_S) != 0  # ssh gives up
        lab.heal("laptop")
        # The same submitted again joins the job that runs; its log comes from the start.
        log = lab.folder / "joined.log"
        again = lab.start("laptop", f"cd ~/project && python -m pipeline.submit run cluster.yaml {REPRO}", log)
        joins = re.compile(r"m2f-\d{8}-\d{6} does this already; joining it")
        wait_for("the job is joined", lambda: joins.search(log.read_text()) or again.poll() is not None)
    finally:
        lab.heal("laptop")
        for host in training:
            lab.kill(host, "RayTrainWorker", signal.SIGCONT)
    code, output = again.wait(timeout=LIMIT_S), log.read_text()
    assert code == 0 and joins.search(output), output
    assert "shapes_tiny | Running stage 'train@shapes_tiny'" in output
    assert re.search(r"^  shapes_tiny: done after \d+ s", output, re.MULTILINE)
    assert "results brought home: " in output and "train@shapes_tiny" in output

    (seed,) = cluster.result("train/shapes_tiny.json")["seeds"]
    assert (seed["status"], seed["workers"]) == ("finished", 2)
    assert runs(cluster) == {seed["run_key"]: "FINISHED"}
    assert cluster.result("evaluate/shapes_tiny.json")["median"]["pq"] is not None
    # What came home is up to date there: DVC would do nothing.
    assert "train@shapes_tiny" not in json.loads(cluster.laptop("dvc status --json evaluate@shapes_tiny")[1])


@pytest.mark.full
def test_a_finished_row_is_not_run_again_and_an_old_job_can_be_attached_to(cluster: Cluster) -> None:
    code, output = cluster.laptop(f"python -m pipeline.submit run cluster.yaml {REPRO}")
    assert code == 0 and "Running stage" not in output and "0 results brought home" in output
    code, output = cluster.laptop("ray submit cluster.yaml pipeline/submit.py -- attach")
    assert code == 0 and "shapes_tiny: done" in output
    jobs = cluster.laptop("ray submit cluster.yaml pipeline/submit.py -- status")[1]
    assert len(re.findall(r"^m2f-\S+  succeeded .*evaluate@shapes_tiny", jobs, re.MULTILINE)) == 2


def test_a_row_that_fails_makes_the_exit_code_and_says_why(cluster: Cluster) -> None:
    submit = "ray submit cluster.yaml pipeline/submit.py -- repro evaluate@broken M2F_WORKERS=2"
    code, output = cluster.laptop(submit, check=False)
    assert code == 1
    assert re.search(r"broken \| error: .*2 workers for row broken, which has 1 groups", output)
    assert re.search(r"^  broken: FAILED", output, re.MULTILINE)
    assert "curves     http://10.77.0.10:5000 (MLflow; " in output
    assert "bring home python -m pipeline.submit results cluster.yaml" in output


def test_what_the_cluster_lacks_is_said_at_once(cluster: Cluster) -> None:
    submit = "ray submit cluster.yaml pipeline/submit.py -- repro train@ade20k_r50 train@cityscapes_r50"
    code, output = cluster.laptop(submit, check=False)
    assert code == 1
    assert "error: row ade20k_r50 needs 8 GPUs, but the cluster has none and can start none" in output
    assert "row cityscapes_r50 needs 8 GPUs" in output
    assert "Running stage" not in output


@pytest.mark.full
def test_a_job_of_ray_job_submit_does_the_same_and_can_be_stopped(cluster: Cluster) -> None:
    lab = cluster.lab
    submit = "ray job submit --address http://127.0.0.1:8265 --working-dir . -- python pipeline/submit.py"
    job = lab.start(
        "head", f"cd ~/m2f-upload && {submit} repro train@shapes_tiny M2F_WORKERS=2", lab.folder / "job.log"
    )
    assert job.wait(timeout=LIMIT_S) == 0, (lab.folder / "job.log").read_text()

    # one that takes long: other settings than the laptop's finished row
    params = cluster.project / "params.yaml"
    params.write_text(params.read_text().replace("steps: 80", "steps: 8000"))
    log = lab.folder / "long.log"
    long = lab.start("laptop", f"cd ~/project && python -m pipeline.submit run cluster.yaml {REPRO}", log)
    wait_for("steps", lambda: " steps (" in log.read_text() or long.poll() is not None)
    other = "ray submit cluster.yaml pipeline/submit.py -- repro train@shapes_tiny M2F_WORKERS=1"
    code, output = cluster.laptop(other, check=False)
    assert code == 1 and re.search(r"error: m2f-\S+ works on shapes_tiny; join it with: attach m2f-", output)
    assert "stopped" in cluster.laptop("ray submit cluster.yaml pipeline/submit.py -- stop")[1]
    assert long.wait(timeout=LIMIT_S) == 1
    wait_for("no training is left", lambda: not lab.pids("worker1", "RayTrainWorker"))


def test_only_the_head_itself_sees_the_dashboard(cluster: Cluster) -> None:
    probe = "timeout 3 bash -c 'exec 3<>/dev/tcp/{}/8265' 2>/dev/null && echo open || echo closed"
    assert cluster.head(probe.format("127.0.0.1")).strip() == "open"
    assert cluster.lab.on("worker1", probe.format(ADDRESSES["head"])).stdout.strip() == "closed"


@pytest.mark.full
def test_down_leaves_nothing_running_and_up_again_shows_the_old_runs(cluster: Cluster) -> None:
    before = runs(cluster)
    assert before
    cluster.down()
    assert cluster.ray_is_running() == []
    cluster.up()
    assert runs(cluster) == before


@pytest.mark.full
@pytest.mark.timeout(900)
def test_run_starts_a_cluster_that_is_down_ctrl_c_leaves_it_up_and_down_ends_it_after_the_job(cluster: Cluster) -> None:
    lab = cluster.lab
    if cluster.ray_is_running():
        cluster.down()
    # longer than this test, and other settings than those of a finished row
    params = cluster.project / "params.yaml"
    params.write_text(re.sub(r"steps: (80|8000)\b", "steps: 9000", params.read_text()))
    log = lab.folder / "run.log"
    run = "python -m pipeline.submit run cluster.yaml"
    first = lab.start("laptop", f"cd ~/project && {run} --down {REPRO}", log)
    wait_for("steps", lambda: " steps (" in log.read_text() or first.poll() is not None)
    assert first.poll() is None, log.read_text()
    assert "cluster.yaml: the cluster is down; starting it. Ray on 3 machines of your own, until: " in log.read_text()
    for name in ("pipeline.submit run", "submit.py"):  # what a terminal's Ctrl-C reaches
        lab.kill("laptop", name, signal.SIGINT)
    stays = f"the cluster stays up, and a job that has started goes on: `{run} attach` joins it"
    wait_for("Ctrl-C is heard", lambda: stays in log.read_text())
    first.wait(timeout=LIMIT_S)
    assert lab.pids("worker1", "RayTrainWorker")

    output = cluster.laptop(f"{run} --down status", check=False)[1]
    assert "error: --down goes with repro and attach" in output
    assert "stopped" in cluster.laptop(f"{run} stop")[1]
    code, output = cluster.laptop(f"{run} --down attach", check=False)
    assert code == 1 and "results brought home" in output, output
    assert cluster.ray_is_running() == []
