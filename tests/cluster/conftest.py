"""A cluster that `ray up` started from cluster.onprem.yaml, on hosts in namespaces."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.hosts import ADDRESSES, Hosts, why_not
from tests.helpers.project_copy import Copy
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S

FILE = "cluster.onprem.yaml"

STEPS, CHECKPOINT_INTERVAL = 60, 10
"""Of the row `faults`, which test_faults.py trains."""


def filled_in(text: str, folder: Path) -> dict[str, Any]:
    """cluster.onprem.yaml as somebody fills it in for these hosts, on which a worker has one core and the head none."""
    for placeholder, value in {
        "<address of the head>": ADDRESSES["head"],
        "<address of worker 1>": ADDRESSES["worker1"],
        "<address of worker 2>": ADDRESSES["worker2"],
        "<user name on every machine>": "root",
        "<path of a private key that opens every machine>": "~/.ssh/id",
        "<folder that every machine sees under this name, or s3://bucket/prefix>": f"{folder}/shared/storage",
        "<folder on each machine's own fast disk>": "/tmp/shard-cache",
    }.items():
        assert placeholder in text
        text = text.replace(placeholder, value)
    config: dict[str, Any] = yaml.safe_load(text)
    small = "--object-store-memory=150000000 --num-cpus="
    for role, cores in (("head", 0), ("worker", 1)):
        commands = config[f"{role}_start_ray_commands"]
        commands[1] = commands[1].replace("ray start", f"ray start {small}{cores}")
    return config


class Cluster:
    """What a user at the laptop does, and what a test looks at."""

    def __init__(self, lab: Hosts) -> None:
        self.lab = lab
        self.project = lab.home("laptop") / "project"
        lab.on("laptop", "mkdir ~/project && ray get-auth-token --generate && chmod 600 ~/.ray/auth_token")
        (lab.folder / "copy").mkdir()
        copy = Copy(lab.folder / "copy")
        row = copy.params["rows"]["shapes_tiny"]
        copy.params["datasets"]["shapes"]["generate"] |= {"train": 12, "val": 4}
        row["train"] |= {"steps": 80, "val_interval": 40, "checkpoint_interval": 10, "log_every": 2}
        row["seeds"] = [0]
        short = {"steps": STEPS, "val_interval": STEPS, "checkpoint_interval": CHECKPOINT_INTERVAL, "log_every": 1}
        copy.params["rows"]["faults"] = {**row, "train": {**row["train"], **short}}
        copy.params["rows"]["faults_seeds"] = {**copy.params["rows"]["faults"], "seeds": [1, 2]}
        copy.params["rows"]["broken"] = {**row, "train": {**row["train"], "groups": 1}}  # for two workers: too few
        copy.write_params()
        for name in (".gitignore", "requirements.lock"):
            shutil.copy(PROJECT / name, copy.folder / name)
        config = filled_in((PROJECT / FILE).read_text(), lab.folder)
        (copy.folder / "cluster.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        shutil.copytree(copy.folder, self.project, dirs_exist_ok=True)

    def laptop(self, command: str, *, check: bool = True) -> tuple[int, str]:
        """(exit code, output) of a command in the laptop's copy of the project."""
        answer = self.lab.on("laptop", f"cd ~/project && {command}", check=check)
        return answer.returncode, answer.stdout

    def up(self) -> None:
        self.laptop("ray up --yes cluster.yaml")

    def down(self) -> str:
        return self.laptop("python -m pipeline.submit down cluster.yaml")[1]

    def head(self, command: str) -> str:
        return self.lab.on("head", command).stdout

    def ray_is_running(self) -> list[str]:
        return [host for host in ADDRESSES if self.lab.pids(host, "raylet") or self.lab.pids(host, "gcs_server")]

    def ready(self) -> None:
        """See to it that the cluster is up, with both workers in it."""
        if not self.ray_is_running():
            self.up()
        wait_for("two free workers", lambda: "0.0/2.0 CPU" in self.head("ray status"))

    def result(self, name: str) -> Any:
        """A result in the laptop's copy."""
        return json.loads((self.project / "results" / name).read_text())


def wait_for(what: str, condition: Any) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + LIMIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {LIMIT_S:.0f} s for {what}"
        time.sleep(0.3)
    return value


@pytest.fixture(scope="session")
def lab() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(Path("/tmp/m2f-lab")) as hosts:
        yield hosts
    shutil.rmtree(hosts.folder)


@pytest.fixture(scope="session")
def cluster(lab: Hosts) -> Cluster:
    """The cluster, up; its tests share it."""
    cluster = Cluster(lab)
    cluster.up()
    return cluster


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of docs/reliability.md, as these tests have measured it."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    rows: dict[str, None] = {}
    for report in reports:
        for name, row in getattr(report, "user_properties", ()):
            if name == "fault":
                rows[f"{row} `{report.nodeid.rpartition('::')[2]}` |"] = None
    if rows:
        terminalreporter.section("docs/reliability.md")
        terminalreporter.line("| fault | promised | noticed | training again | finished | steps done twice | test |")
        terminalreporter.line("| --- | --- | --- | --- | --- | --- | --- |")
        for row in rows:
            terminalreporter.line(row)
