"""pipeline/cluster/tracking_server.sh with a login: who gets in, and where the password is not."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S, until

ADDRESS = "127.0.0.77"  # a loopback address of its own: the port is always 5000
PASSWORD = "a secret & $more"
CREDENTIALS = f"[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = {PASSWORD}\n"
EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"


def start(home: Path) -> subprocess.CompletedProcess[str]:
    (home / "storage").mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(home), "M2F_STORAGE": str(home / "storage"), "PATH": path}
    command = ["bash", str(PROJECT / "pipeline/cluster/tracking_server.sh"), ADDRESS]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


def processes(home: Path) -> dict[int, str]:
    """Id and command line of every process whose home folder this is: the server's."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def status(path: str, headers: Mapping[str, str], *, data: bytes | None = None) -> int:
    request = urllib.request.Request(f"http://{ADDRESS}:5000{path}", headers=dict(headers), data=data)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def login(password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'me:{password}'.encode()).decode()}"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home folder of a user whose server runs."""
    home = tmp_path_factory.mktemp("home")
    (home / ".mlflow").mkdir()
    (home / ".mlflow/credentials").write_text(CREDENTIALS)
    try:
        answer = start(home)
        assert answer.returncode == 0, answer.stderr + (home / "m2f/tracking/server.log").read_text()[-2000:]
        yield home
    finally:
        for pid in processes(home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_with_a_login_nobody_reads_or_writes_without_it(home: Path) -> None:
    artifact = "/api/2.0/mlflow-artifacts/artifacts/x"
    assert status(EXPERIMENT, login(PASSWORD)) == 200
    assert [status(EXPERIMENT, headers) for headers in ({}, login("something else"))] == [401, 401]
    assert [status(path, {}) for path in ("/", artifact, "/graphql", "/ajax-api/2.0/mlflow/runs/search")] == [401] * 4
    assert status("/api/2.0/mlflow/experiments/create", {"Content-Type": "application/json"}, data=b"{}") == 401


@pytest.mark.slow
def test_requests_for_another_name_or_from_another_site_are_refused(home: Path) -> None:
    # Even with the login: what a browser that knows it is talked into sending.
    me = login(PASSWORD)
    hosts = {f"{ADDRESS}:5000": 200, "localhost:5000": 200, "localhost:5999": 200}
    hosts |= {"10.example.org:5000": 403, "192.168.example.org": 403, "elsewhere:5000": 403}
    assert {host: status(EXPERIMENT, {**me, "Host": host}) for host in hosts} == hosts
    elsewhere = {**me, "Origin": "http://example.org", "Content-Type": "application/json"}
    assert status("/api/2.0/mlflow/experiments/create", elsewhere, data=b'{"name": "x"}') == 403


@pytest.mark.slow
def test_the_password_is_on_no_command_line_and_in_no_file_but_its_own(home: Path) -> None:
    running = processes(home)
    assert len(running) >= 2 and not any(PASSWORD in command for command in running.values())
    holders = [file for file in home.rglob("*") if file.is_file() and PASSWORD.encode() in file.read_bytes()]
    assert holders == [home / ".mlflow/credentials"]
    modes = {name: (home / name).stat().st_mode & 0o777 for name in (".mlflow/credentials", "m2f/tracking")}
    modes |= {name: (home / "m2f/tracking" / name).stat().st_mode & 0o777 for name in ("login.db", "login.ini")}
    assert modes == {".mlflow/credentials": 0o600, "m2f/tracking": 0o700, "login.db": 0o600, "login.ini": 0o600}


@pytest.mark.slow
def test_a_server_of_which_a_part_is_killed_is_started_again_and_one_that_is_ended_leaves_nothing(home: Path) -> None:
    def servers() -> list[int]:
        return sorted(pid for pid, command in processes(home).items() if "mlflow server" in command)

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return status(EXPERIMENT, login(PASSWORD)) == 200
        return False

    before = processes(home)
    (first,) = servers()
    os.kill(first, signal.SIGKILL)
    until(lambda: servers() not in ([], [first]) and answers(), said=(home / "m2f/tracking/server.log").read_text)
    assert len(servers()) == 1
    kept = [pid for pid, command in before.items() if pid in processes(home)]
    assert all("tracking_server.sh" in before[pid] for pid in kept)  # nothing of the first server

    for pid in kept:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until(lambda: not processes(home))


@pytest.mark.parametrize("text", ["mlflow_tracking_password = a secret", "[mlflow]\nmlflow_tracking_password = 50%a\n"])
def test_credentials_that_cannot_be_read_start_no_server_and_are_not_quoted(text: str, tmp_path: Path) -> None:
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow/credentials").write_text(text)
    answer = start(tmp_path)
    assert answer.returncode == 1
    assert answer.stderr == "error: ~/.mlflow/credentials is not in its format, which docs/security.md shows\n"
    assert not (tmp_path / "m2f/tracking/server.log").exists()
