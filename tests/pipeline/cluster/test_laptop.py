"""What the laptop's commands call, and what they say. The cluster itself is in tests/cluster/."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import submit
from pipeline.cluster import laptop
from tests.helpers.cluster_files import filled
from tests.helpers.shared import PROJECT


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(filled("cluster.onprem.yaml", tmp_path, file_mounts={"~/m2f-upload": ".", "~/.ray/auth_token": "token"}))


class Ray:
    """Ray's commands in the order they were called.

    `code` of a command: its exit code, 0 where there is none. `jobs`: what the head says of them; empty: nothing.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, runs: bool = True, jobs: str = "no jobs\n") -> None:
        self.calls: list[tuple[str, ...]] = []
        self.code: dict[str, int | Callable[[], int]] = {}
        self.jobs = jobs
        monkeypatch.setattr(laptop, "_ray", self._run)
        monkeypatch.setattr(laptop, "_asked", self._ask)
        monkeypatch.setattr(laptop, "head_runs", lambda path: runs)
        monkeypatch.setattr(laptop, "results", lambda words: self.calls.append(("results",)) or 0)
        monkeypatch.setattr(laptop, "_ssh", lambda config, address, command: ["true"])

    def _run(self, command: str, *words: str) -> int:
        self.calls.append((command, *words))
        code = self.code.get(command, 0)
        return code if isinstance(code, int) else code()

    def _ask(self, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([command], 0 if self.jobs else 1, self.jobs, "")

    def commands(self) -> list[str]:
        return [command for command, *_ in self.calls]


REPRO = ("repro", "train@shapes_tiny")


def test_up_hides_the_token_from_other_users_of_the_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As `ray get-auth-token --generate` leaves it; the machines' copies get its permissions.
    token = tmp_path / "auth_token"
    token.write_text("a token")
    token.chmod(0o644)
    mounts = {"~/m2f-upload": ".", "~/.ray/auth_token": str(token)}
    path = filled("cluster.onprem.yaml", tmp_path, file_mounts=mounts)
    ray = Ray(monkeypatch)
    assert submit.main(["up", str(path)]) == 0 and ray.commands() == ["up"]
    assert token.stat().st_mode & 0o777 == 0o600
    token.chmod(0o644)
    assert submit.main(["run", str(path), *REPRO]) == 0 and "rsync-up" in ray.commands()
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_job_is_told_the_commit_of_the_laptops_checkout_and_the_cluster_file(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.provenance import environment

    ray = Ray(monkeypatch)

    def settings(*words: str) -> list[str]:
        ray.calls.clear()
        assert submit.main(["run", path, *words]) == 0
        (job,) = [rest for command, *rest in ray.calls if command == "submit"]
        return [word for word in job[job.index("--") + 1 :] if word.startswith("M2F_")]

    file = f"M2F_CLUSTER_FILE={path}"
    for word, told in (("1f3c-changed", [file, "M2F_GIT_COMMIT=1f3c-changed"]), (None, [file])):
        monkeypatch.setattr(environment, "commit_word", lambda word=word: word)
        assert settings(*REPRO) == told
    monkeypatch.setattr(environment, "commit_word", lambda: "1f3c")
    assert settings(*REPRO, "M2F_GIT_COMMIT=mine") == ["M2F_GIT_COMMIT=mine", file]
    assert settings("attach") == []


def test_run_starts_a_cluster_that_is_down_and_says_what(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = Ray(monkeypatch, runs=False)
    assert submit.main(["run", path, *REPRO]) == 0
    assert ray.commands() == ["up", "rsync-up", "submit", "results"]
    assert (
        f"{path}: the cluster is down; starting it. Ray on 3 machines of your own, "
        f"until: python -m pipeline.submit down {path}\n"
    ) in capsys.readouterr().out


def test_what_starts_on_aws_is_named_with_the_most_there_may_be() -> None:
    assert laptop.what_starts(str(PROJECT / "cluster.yaml")).startswith(
        "One m6i.2xlarge, until: python -m pipeline.submit"
    )
    assert laptop.what_starts(str(PROJECT / "cluster.yaml")).endswith(
        "cluster.yaml; up to 4 p4d.24xlarge (8 GPUs each) while rows need them, given back after 10 idle minutes. "
        "AWS's price list for us-east-1 says what they cost an hour"
    )


def test_what_starts_has_its_price_where_the_file_names_one(tmp_path: Path) -> None:
    price = {"head": 0.5, "p4d_24xlarge": 32.0}
    said = laptop.what_starts(str(filled("cluster.yaml", tmp_path, provider__price_per_hour=price)))
    assert said.endswith(
        "By provider.price_per_hour that is 0.50 an hour for the head, 128.50 with all of them"
    )  # 4 * 32


def test_run_leaves_a_cluster_that_is_up_alone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    assert submit.main(["run", path, *REPRO]) == 0
    assert ray.commands() == ["rsync-up", "submit", "results"]


def test_a_cluster_that_does_not_come_up_gets_no_job(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch, runs=False)
    ray.code["up"] = 1
    assert submit.main(["run", path, *REPRO]) == 1
    assert ray.commands() == ["up"]


@pytest.mark.parametrize("code", [0, 1])
def test_down_at_the_end_brings_results_home_first_also_of_a_job_that_failed(
    code: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Ray(monkeypatch, jobs="m2f-20260101-000000  failed     since 01 Jan 00:00  train@shapes_tiny\n")
    ray.code["submit"] = code
    assert submit.main(["run", path, "--down", *REPRO]) == code
    assert ray.commands() == ["rsync-up", "submit", "results", "down"]


def test_a_cluster_with_a_job_that_runs_is_not_taken_down(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = Ray(monkeypatch, jobs="m2f-20260101-000000  running    since 01 Jan 00:00  train@shapes_tiny\n")
    ray.code["submit"] = 1  # the connection broke
    assert submit.main(["run", path, "--down", *REPRO]) == 1
    assert "the cluster stays up, because m2f-20260101-000000 still runs; later: " in capsys.readouterr().err
    ray.jobs = ""
    assert submit.main(["run", path, "--down", *REPRO]) == 1
    assert "because the head does not say whether the job has ended" in capsys.readouterr().err
    assert "down" not in ray.commands()


def test_ctrl_c_leaves_the_cluster_up_and_says_how_to_end_it(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = Ray(monkeypatch)

    def interrupted() -> int:
        raise KeyboardInterrupt

    ray.code["submit"] = interrupted
    assert submit.main(["run", path, "--down", *REPRO]) == 130
    assert ray.commands() == ["rsync-up", "submit"]
    said = capsys.readouterr().out
    assert "the cluster stays up, and a job that has started goes on" in said
    assert f"`python -m pipeline.submit run {path} stop` ends it" in said
    assert f"`python -m pipeline.submit down {path}` ends the cluster" in said


def test_down_goes_with_commands_that_wait_for_a_job(path: str) -> None:
    with pytest.raises(ValueError, match="--down goes with repro and attach"):
        submit.main(["run", path, "status", "--down"])


@pytest.mark.parametrize(("says", "runs"), [("ray-1", True), ("ray-0", False)])
def test_a_rack_is_up_where_ray_runs_on_its_head(
    says: str, runs: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laptop, "_ssh", lambda config, address, command: ["echo", says])
    assert laptop.head_runs(path) is runs


def test_a_head_that_does_not_answer_is_not_started_over(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "echo 'ssh: connect: refused' >&2; exit 255"
    monkeypatch.setattr(laptop, "_ssh", lambda config, address, command: ["sh", "-c", refused])
    with pytest.raises(ValueError, match=r"does not answer by ssh .ssh: connect: refused.*which ends its jobs: .* up "):
        laptop.head_runs(path)
