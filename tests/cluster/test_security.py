"""What a cluster shows to those it does not know, and where its secrets are: tried from its other hosts.

docs/security.md says it; these tests hold it to that.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import Cluster, wait_for
from tests.cluster.hosts import ADDRESSES
from tests.helpers.waiting import LIMIT_S

pytestmark = [pytest.mark.cluster, pytest.mark.full]

HEAD = ADDRESSES["head"]
HOSTS = ("head", "worker1", "worker2")
PRIVATE = "/tmp/m2f-0"  # RAY_TMPDIR of root

STRANGERS = {
    "another token": "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=another",
    "no token": "RAY_AUTH_MODE=disabled",
}
"""Environments of somebody who reaches the cluster, but does not have its token."""

SECRETS = {
    "CITYSCAPES_PASSWORD": "m2f-secret-cityscapes",
    "AWS_SECRET_ACCESS_KEY": "m2f-secret-aws",
    "MLFLOW_TRACKING_PASSWORD": "m2f-secret-mlflow",
}
"""In the environment of the shells that submit a job: the laptop's, and the head's that it calls."""

REFUSED = "[Aa]uthenti|Unauthorized|Forbidden|Failed to connect to Ray|ray client connection timeout"

ON_EVERY_HOST = [
    ("sshd", r"0\.0\.0\.0|::", "22"),
    ("raylet", r"\*", r"\d+"),  # node manager, object manager
    ("ray::DashboardA", r"127\.0\.0\.1|{host}", "52365"),  # the host's agent: HTTP,
    ("ray::DashboardA", r"\*|0\.0\.0\.0", r"\d+"),  # gRPC and metrics
    ("ray::RuntimeEnv", "{host}", r"\d+"),
    ("python|ray::.*", r"\*", r"1\d{4}"),  # workers and drivers, 10002 to 19999
    ("ray::RayTrainWo", r"\*|{host}", r"\d+"),  # gradients, while a training runs
]
ON_THE_HEAD = [
    ("gcs_server", r"\*", "6379"),
    ("python", r"127\.0\.0\.1", "8265"),  # dashboard and job server
    ("python", "{host}", "5000"),  # MLflow
    ("python", r"127\.0\.0\.1|{host}", "10001"),  # Ray Client
    ("python", r"0\.0\.0\.0", "44217|44227"),  # metrics of autoscaler and dashboard
]
"""What may listen: process as `ss` shows it, address and port; patterns that match as a whole. {host}: its address."""

# One call of each of Ray's services without the token: a gRPC port answers the services it has. Then one with it.
_ASK = r"""
import json, pathlib, sys, grpc
METHODS = [
    "InternalKVGcsService/InternalKVKeys", "NodeManagerService/GetNodeStats", "ObjectManagerService/Pull",
    "ReporterService/GetTraceback", "CoreWorkerService/GetObjectStatus",
]
answers = {}
for target in sys.argv[2:]:
    answers[target] = {}
    for method in METHODS:
        with grpc.insecure_channel(target) as channel:
            try:
                channel.unary_unary("/ray.rpc." + method)(b"", timeout=5)
                answers[target][method] = "OK"
            except grpc.RpcError as error:
                answers[target][method] = error.code().name
token = pathlib.Path("~/.ray/auth_token").expanduser().read_text().strip()
with grpc.insecure_channel(sys.argv[1]) as channel:
    channel.unary_unary("/ray.rpc." + METHODS[0])(b"", timeout=5, metadata=[("authorization", "Bearer " + token)])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def up(cluster: Cluster) -> Cluster:
    """The cluster with its three machines, whatever the tests before have done to it."""
    if "head" not in cluster.ray_is_running():
        cluster.up()
    wait_for("three machines", lambda: "3 local.cluster.node" in cluster.head("ray status"))
    return cluster


@pytest.fixture(scope="module")
def training(up: Cluster) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A job that trains on both workers, and its log; shells that submit it have secrets in their environment."""
    path = up.project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["rows"]["shapes_tiny"]["train"] |= {"steps": 200, "val_interval": 200, "checkpoint_interval": 100}
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    for host in ("laptop", "head"):
        exports = "".join(f"export {name}={value}\n" for name, value in SECRETS.items())
        (up.lab.home(host) / "secrets.sh").write_text(exports)
        up.lab.on(
            host, "chmod 600 ~/secrets.sh && cp -p ~/.bashrc ~/bashrc-before && echo '. ~/secrets.sh' >> ~/.bashrc"
        )
    log = up.lab.folder / "security.log"
    command = "python -m pipeline.submit run cluster.yaml repro train@shapes_tiny M2F_WORKERS=2"
    job = up.lab.start("laptop", f'cd ~/project && test "$AWS_SECRET_ACCESS_KEY" && {command}', log)
    try:
        wait_for("a step", lambda: " steps (" in log.read_text() or job.poll() is not None)
        assert job.poll() is None, log.read_text()
        yield job, log
    finally:
        job.kill()
        job.wait()
        for host in ("laptop", "head"):
            up.lab.on(host, "mv ~/bashrc-before ~/.bashrc; rm ~/secrets.sh")


@pytest.fixture(scope="module")
def listening(up: Cluster, training: tuple[subprocess.Popen[bytes], Path]) -> dict[str, set[tuple[str, str, str]]]:
    """Host -> (process, address, port) of every listening TCP socket, while a training runs."""
    there = {}
    for host in ADDRESSES:
        there[host] = set()
        for line in up.lab.on(host, "ss -H --tcp --listening --numeric --processes").stdout.splitlines():
            address, _, port = line.split()[3].rpartition(":")
            process = re.search(r'users:\(\("([^"]*)"', line)
            there[host].add((process[1] if process else "?", address.strip("[]").removeprefix("::ffff:"), port))
    assert training[0].poll() is None, training[1].read_text()
    return there


def test_nothing_listens_that_the_table_does_not_name(listening: dict[str, set[tuple[str, str, str]]]) -> None:
    for host in HOSTS:
        allowed = [*ON_EVERY_HOST, *(ON_THE_HEAD if host == "head" else [])]
        patterns = [tuple(part.replace("{host}", re.escape(ADDRESSES[host])) for part in entry) for entry in allowed]
        unknown = [
            found for found in listening[host] if not any(all(map(re.fullmatch, entry, found)) for entry in patterns)
        ]
        assert not unknown, f"{host}: {unknown}"
    known = {("gcs_server", "*", "6379"), ("python", "127.0.0.1", "8265"), ("python", HEAD, "5000")}
    assert known <= listening["head"]
    assert any(process == "ray::RayTrainWo" for process, _, _ in listening["worker1"])
    assert listening["laptop"] == {("sshd", "0.0.0.0", "22"), ("sshd", "::", "22")}


def test_what_listens_wants_the_token(up: Cluster, listening: dict[str, set[tuple[str, str, str]]]) -> None:
    # Asked from worker2. Ports that gradients take are left alone: they are no service, and have no lock either.
    processes = {}
    for host in HOSTS:
        for process, address, port in listening[host]:
            service = address == "*" and process in ("gcs_server", "raylet", "ray::DashboardA")
            if service or (address != "127.0.0.1" and re.fullmatch(r"1\d{4}", port)):
                processes[f"{ADDRESSES[host]}:{port}"] = process
    (up.lab.folder / "ask.py").write_text(_ASK)
    asked = up.lab.on("worker2", f"python {up.lab.folder}/ask.py {HEAD}:6379 {' '.join(processes)}").stdout
    answers = json.loads(asked.splitlines()[-1])
    refused: dict[str, set[str]] = {}
    for target, process in processes.items():
        # a driver or worker may have ended since; Ray Client's server has services of its own
        codes = {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}
        assert set(answers[target].values()) <= codes, (target, process, answers[target])
        service = process if process in ("gcs_server", "raylet", "ray::DashboardA") else "a worker or driver"
        wanted = {method for method, code in answers[target].items() if code == "UNAUTHENTICATED"}
        refused[service] = refused.get(service, set()) | wanted
    assert refused == {
        "gcs_server": {"InternalKVGcsService/InternalKVKeys"},
        "raylet": {"NodeManagerService/GetNodeStats", "ObjectManagerService/Pull"},
        "ray::DashboardA": {"ReporterService/GetTraceback", "CoreWorkerService/GetObjectStatus"},
        "a worker or driver": {"CoreWorkerService/GetObjectStatus"},
    }

    status = "curl --silent --max-time 10 --output /dev/null --write-out '%{http_code} ' "
    agent = next(port for process, _, port in listening["worker1"] if process == "ray::RuntimeEnv")
    addresses = (
        f"http://{HEAD}:52365/api/job_agent/jobs/ http://{ADDRESSES['worker1']}:{agent}/get_or_create_runtime_env"
    )
    assert up.lab.on("worker2", f"for at in {addresses}; do {status} $at; done").stdout == "401 401 "
    dashboard = " ".join(f"http://127.0.0.1:8265/{path}" for path in ("api/jobs/", "api/version", "nodes?view=summary"))
    assert up.head(f"for at in {dashboard}; do {status} $at; done") == "401 401 401 "
    submit = "--request POST --header 'Content-Type: application/json' --data '{\"entrypoint\": \"id\"}'"
    assert up.head(f"{status} {submit} http://127.0.0.1:8265/api/jobs/") == "401 "
    reach = "timeout 3 bash -c 'exec 3<>/dev/tcp/{}/{}' 2>/dev/null && echo open || echo closed"
    ports = {("10.77.0.10", 6379): "open", ("10.77.0.10", 8265): "closed"}
    found = {at: up.lab.on("worker2", reach.format(*at)).stdout.strip() for at in ports}
    assert found == ports


def test_no_secret_is_on_a_command_line_in_a_log_a_result_or_the_tracking_server(
    up: Cluster, training: tuple[subprocess.Popen[bytes], Path]
) -> None:
    lab, (job, log) = up.lab, training
    secrets = dict(SECRETS)
    secrets["Ray's token"] = (lab.home("head") / ".ray/auth_token").read_text().strip()
    secrets["ssh key"] = (lab.folder / "key/id").read_text().splitlines()[2]
    on_command_lines = [(host, name) for host in ADDRESSES for name in secrets if lab.pids(host, secrets[name])]
    assert on_command_lines == [] and all(lab.pids(host, "ray") for host in HOSTS)
    assert job.wait(timeout=LIMIT_S) == 0, log.read_text()
    assert "train@shapes_tiny" in log.read_text()

    (lab.folder / "patterns").write_text("".join(f"{secret}\n" for secret in secrets.values()))
    places = f"/tmp/home {PRIVATE} /tmp/ray* {lab.folder}/shared {lab.folder}/*.log"
    search = f"grep -roF --exclude-dir=m2f-environment -f {lab.folder}/patterns {places} 2>/dev/null"
    names = {secret: name for name, secret in secrets.items()}
    holders = {}
    for host in ADDRESSES:
        lines = [line.partition(":") for line in lab.on(host, search, check=False).stdout.splitlines()]
        holders[host] = sorted({(path, names[secret]) for path, _, secret in lines})
    token, exported = ("/tmp/home/.ray/auth_token", "Ray's token"), [("/tmp/home/secrets.sh", name) for name in SECRETS]
    assert holders["laptop"] == sorted([token, ("/tmp/home/.ssh/id", "ssh key"), *exported])
    assert holders["head"] == sorted([token, ("/tmp/home/ray_bootstrap_key.pem", "ssh key"), *exported])
    assert holders["worker1"] == holders["worker2"] == [token]
    # what was searched has the run in it
    lab.on("head", "grep -qrF shapes_tiny ~/m2f/tracking ~/m2f/results/train")
    logs = f"{PRIVATE}/ray/session_latest/logs"
    lab.on("head", f"grep -qF shapes_tiny {logs}/job-driver-m2f-*.log")
    for host in ("worker1", "worker2"):
        lab.on(host, f"find {logs} -name 'worker-*' -size +0 | grep -q .")


@pytest.mark.parametrize("who", STRANGERS)
def test_without_the_token_nobody_joins_reads_or_submits(who: str, up: Cluster) -> None:
    # from a home folder without a token file; every attempt at once, since Ray takes its time to give up
    stranger = f"mkdir -p /run/stranger && cd /run/stranger && export HOME=/run/stranger {STRANGERS[who]} &&"
    submit = "timeout 60 ray job submit --address http://127.0.0.1:8265 -- touch /tmp/stranger-was-here"
    join = "timeout 60 python -c \"import ray; ray.init(address='{}'); print(ray.get(ray.remote(len).remote('')))\""
    attempts = {
        "status": ("worker2", f"timeout 60 ray status --address {HEAD}:6379"),
        "driver": ("worker2", join.format(f"{HEAD}:6379")),
        "client": ("worker2", join.format(f"ray://{HEAD}:10001")),
        "worker": ("laptop", f"timeout 60 ray start --address={HEAD}:6379"),
        "job": ("laptop", submit),
    }
    forward = f"ssh -o StrictHostKeyChecking=no -i ~/.ssh/id -N -L 8265:127.0.0.1:8265 root@{HEAD}"
    tunnel = up.lab.start("laptop", forward, up.lab.folder / "tunnel.log")
    try:
        answers = "curl --silent --max-time 2 --output /dev/null http://127.0.0.1:8265"
        wait_for("the tunnel", lambda: up.lab.on("laptop", answers, check=False).returncode == 0)
        running = {}
        for name, (host, command) in attempts.items():
            log = up.lab.folder / f"stranger-{name}.log"
            running[name] = (up.lab.start(host, f"{stranger} {command}", log), log)
        ended = {name: (process.wait(timeout=LIMIT_S), log.read_text()) for name, (process, log) in running.items()}
    finally:
        up.lab.kill("laptop", "8265:127.0.0.1:8265")
        tunnel.wait(timeout=LIMIT_S)
    for name, (code, output) in ended.items():
        assert code != 0 and re.search(REFUSED, output), (name, code, output)
    assert up.lab.on("head", "ls /tmp/stranger-was-here", check=False).returncode != 0
    # with the token the same address answers, and has no fourth machine
    assert " 3 local.cluster.node" in up.lab.on("worker2", f"ray status --address {HEAD}:6379").stdout


def test_other_users_of_a_machine_read_neither_key_nor_token_nor_rays_files(up: Cluster) -> None:
    modes = {
        "~/.ray": "700",
        "~/.ray/auth_token": "600",
        PRIVATE: "700",
        "~/ray_bootstrap_key.pem": "600",
        "~/ray_bootstrap_config.yaml": "600",
        "~/m2f/tracking": "700",
    }
    for host in HOSTS:
        here = modes if host == "head" else dict(list(modes.items())[:3])
        assert up.lab.on(host, f"stat --format %a {' '.join(here)}").stdout.split() == [*here.values()]
        other = "setpriv --reuid=65534 --regid=65534 --clear-groups"
        for path in ("/tmp/home/.ray/auth_token", f"{PRIVATE}/ray/session_latest/logs"):
            assert "Permission denied" in up.lab.on(host, f"{other} ls -l {path}", check=False).stdout
    assert up.lab.on("laptop", "stat --format %a ~/.ray/auth_token ~/.ssh/id").stdout.split() == ["600", "600"]
    # the one key that `ray up` brings, to the one machine that needs it
    keys = "grep -rlF --exclude-dir=m2f-environment 'PRIVATE KEY' ~"
    assert up.lab.on("head", keys).stdout.split() == ["/tmp/home/ray_bootstrap_key.pem"]
    assert [up.lab.on(host, keys, check=False).stdout for host in ("worker1", "worker2")] == ["", ""]


def test_mlflow_answers_to_its_own_names_and_to_no_other_site(up: Cluster) -> None:
    status = "curl --silent --max-time 10 --output /dev/null --write-out '%{http_code}'"
    experiment = f"http://{HEAD}:5000/api/2.0/mlflow/experiments/get?experiment_id=0"
    hosts = {f"{HEAD}:5000": "200", "localhost:5000": "200", "10.example.org:5000": "403", "head:5000": "403"}
    answers = {host: up.lab.on("worker2", f"{status} --header 'Host: {host}' '{experiment}'").stdout for host in hosts}
    assert answers == hosts
    site = "--header 'Origin: http://example.org' --header 'Content-Type: application/json' --data '{\"name\": \"x\"}'"
    create = f"http://{HEAD}:5000/api/2.0/mlflow/experiments/create"
    assert up.lab.on("worker2", f"{status} {site} {create}").stdout == "403"
