"""The manifests for KubeRay: its definition accepts them, they fit the rows, and their command line runs a row."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.cluster.job import planned
from pipeline.submit import parse_targets
from tests.cluster.conftest import wait_for
from tests.cluster.hosts import ADDRESSES, Hosts
from tests.cluster.kuberay import FOLDER, OVERLAYS, built, environment, of_kind, schema
from tests.cluster.small_project import write_project
from tests.helpers.shared import PROJECT, shared


def template(group: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = group["template"]["spec"]
    return pod


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Head group and worker groups."""
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_definition_of_a_rayjob_accepts_what_is_applied(overlay: str) -> None:
    rules = schema(shared("kuberay/ray.io_rayjobs.yaml"))
    objects = built(FOLDER / overlay)
    job = of_kind(objects, "RayJob")
    jsonschema.Draft7Validator(rules).validate(job)
    # which also has what a volume claim and a pod may say
    pod = rules["properties"]["spec"]["properties"]["rayClusterSpec"]["properties"]["headGroupSpec"]["properties"]
    pod = pod["template"]["properties"]["spec"]
    claim = pod["properties"]["volumes"]["items"]["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]
    jsonschema.validate(of_kind(objects, "PersistentVolumeClaim")["spec"], claim["properties"]["spec"])
    jsonschema.validate(yaml.safe_load((FOLDER / "results.yaml").read_text())["spec"], pod)
    # a misspelt key is found
    groups(job)[0]["template"]["spec"]["tolerashuns"] = []
    with pytest.raises(jsonschema.ValidationError, match="tolerashuns"):
        jsonschema.Draft7Validator(rules).validate(job)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_itself_makes_the_same_objects_as_these_tests(overlay: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    made = subprocess.run(["kubectl", "kustomize", FOLDER / overlay], capture_output=True, text=True, check=True).stdout

    def by_name(objects: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
        return {(each["kind"], each["metadata"]["name"]): each for each in objects}

    assert by_name(yaml.safe_load_all(made)) == by_name(built(FOLDER / overlay))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_an_overlay_runs_has_the_gpus_it_needs(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M2F_WORKERS", raising=False)
    job = of_kind(built(FOLDER / overlay), "RayJob")
    python, script, command, *words = shlex.split(job["spec"]["entrypoint"])
    assert (python, script, command) == ("python", "/m2f/pipeline/submit.py", "repro")
    targets, settings = parse_targets(words)
    assert settings == {}
    todo = planned(targets, PROJECT)
    head, *workers = groups(job)
    assert "num-gpus" not in head["rayStartParams"]
    assert bool(workers) == bool(todo.needs)
    gpus = 0
    for group in workers:
        assert group["replicas"] == group["minReplicas"] or group["minReplicas"] == 1
        assert group["replicas"] <= group["maxReplicas"]
        resources = template(group)["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"]
        gpus += group["replicas"] * int(resources["limits"]["nvidia.com/gpu"])
    assert all(need.gpus <= gpus for need in todo.needs)


def test_pods_run_as_the_images_user_without_rights_and_know_secrets_by_name_alone() -> None:
    objects = built(FOLDER / "one-row")
    job = of_kind(objects, "RayJob")
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    (user,) = (
        re.search(r"--uid (\d+)", line) for line in (PROJECT / "Dockerfile").read_text().splitlines() if "uid" in line
    )
    assert user
    names = {each["metadata"]["name"] for each in objects}
    for pod in [*map(template, groups(job)), yaml.safe_load((FOLDER / "results.yaml").read_text())["spec"]]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user[1])
        assert pod["automountServiceAccountToken"] is False
        assert pod.get("priorityClassName", "m2f-head") in names
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            for variable in container.get("env", ()):
                secret = re.search(r"KEY$|TOKEN|PASSWORD|SECRET", variable["name"])
                assert not secret or "valueFrom" in variable, variable
    for key, value in of_kind(objects, "ConfigMap")["data"].items():
        assert not re.search(r"KEY|TOKEN|PASSWORD|SECRET", key) and "@" not in value


def test_the_versions_and_settings_of_the_manifests_are_the_projects() -> None:
    objects = built(FOLDER / "one-row")
    job = of_kind(objects, "RayJob")
    lock = (PROJECT / "requirements.lock").read_text()
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}\n" in lock
    assert {container["image"] for group in groups(job) for container in template(group)["containers"]} == {
        "<registry>/m2f:<commit>"
    }
    code = subprocess.run(
        ["grep", "-rhoE", "M2F_[A-Z_]+", "--include=*.py", "--include=*.sh", PROJECT / "pipeline"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    variables = [each["name"] for group in groups(job) for c in template(group)["containers"] for each in c["env"]]
    variables += of_kind(objects, "ConfigMap")["data"]
    assert {name for name in variables if name.startswith("M2F_")} <= {*code}
    # both say how soon a lost machine is noticed
    head = {each["name"]: each.get("value") for each in template(groups(job)[0])["containers"][0]["env"]}
    start = " ".join(yaml.safe_load((PROJECT / "cluster.yaml").read_text())["head_start_ray_commands"])
    for name, value in head.items():
        assert not name.startswith("RAY_") or f"{name}={value}" in start, name


@pytest.mark.cluster
@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_command_line_of_the_job_runs_a_row_with_the_environment_of_the_pods(lab: Hosts) -> None:
    """Hosts stand for the pods: what KubeRay itself adds is the token, and the addresses of `ray start`."""
    job = of_kind(built(FOLDER / "one-row"), "RayJob")
    head, worker = groups(job)
    project = lab.folder / "kuberay/m2f"  # the image's folder
    write_project(project)
    given = {
        "POD_IP": ADDRESSES["head"],
        "M2F_STORAGE": f"{lab.folder}/shared/kuberay",  # the ConfigMap's, but a folder
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": str(project),  # what the image has installed
    }

    def inside(container: dict[str, Any], command: str) -> str:
        """A command as a container runs it: with its environment, in the image's folder."""
        variables = environment(container, given) | {"HOME": "/tmp/home/pod", "M2F_SHARD_CACHE": "/tmp/home/shards"}
        assert variables["AWS_SHARED_CREDENTIALS_FILE"] == "/m2f-secrets/credentials"
        exported = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        return f"export PATH=~/m2f-environment/bin:$PATH {exported}; mkdir -p $HOME; cd {project}; {command}"

    head_ray, mlflow = template(head)["containers"]
    start = "ray start --object-store-memory=150000000"
    lab.on("head", inside(head_ray, f"{start} --head --port=6379 --num-cpus=0 --dashboard-host=0.0.0.0"))
    lab.on(
        "worker1", inside(template(worker)["containers"][0], f"{start} --address={ADDRESSES['head']}:6379 --num-cpus=2")
    )
    log = lab.folder / "kuberay/mlflow.log"
    server = lab.start("head", inside(mlflow, shlex.join([*mlflow["command"], *mlflow["args"]])), log)
    try:
        wait_for("MLflow", lambda: lab.on("head", "exec 3<>/dev/tcp/10.77.0.10/5000", check=False).returncode == 0)
        entry = (
            job["spec"]["entrypoint"].replace("/m2f/", f"{project}/").replace("register@ade20k_swin-s", "train@brief")
        )
        submit = f"ray job submit --address http://{ADDRESSES['head']}:8265 -- {entry} M2F_WORKERS=2"
        stranger = f"unset RAY_AUTH_TOKEN; {submit}"
        assert lab.on("worker2", inside(head_ray, stranger), check=False).returncode != 0
        said = lab.on("worker2", inside(head_ray, submit)).stdout
        assert re.search(r"^  brief: done after \d+ s", said, re.MULTILINE), said
        assert "curves     http://10.77.0.10:5000 (MLflow; " in said
        home = lab.home("head") / "pod/m2f"
        (seed,) = json.loads((home / "results/train/brief.json").read_text())["seeds"]
        assert (seed["status"], seed["workers"]) == ("finished", 2)
        assert (home / "tracking/mlflow.db").is_file()
    finally:
        for host in ("head", "worker1"):
            lab.on(host, "~/m2f-environment/bin/ray stop --force", check=False)
        lab.kill("head", "tracking_server.sh")
        lab.kill("head", "mlflow")
        server.wait(60)
