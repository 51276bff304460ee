"""The commands of a cluster. The cluster itself is in tests/cluster/."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import submit
from pipeline.submit import parse_targets, targets_of
from tests.helpers.shared import PROJECT


class JobServer:
    """A job that writes a line every 40 s of a clock that only it moves; after some lines connections break."""

    def __init__(self, breaks_after: Sequence[int], ends_after: int) -> None:
        self.clock, self.lines = 0.0, 0
        self.breaks_after, self.ends_after = set(breaks_after), ends_after

    def monotonic(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        self.clock += seconds

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "".join(f"line {n}\n" for n in range(self.lines))
        while self.lines < self.ends_after:
            if self.lines in self.breaks_after:
                self.breaks_after.remove(self.lines)
                raise OSError("broken")
            self.clock += 40
            yield f"line {self.lines}\n"
            self.lines += 1

    def get_job_info(self, job: str) -> Any:
        ended = SimpleNamespace(is_terminal=lambda: self.lines == self.ends_after, value="SUCCEEDED")
        return SimpleNamespace(status=ended, message="")


def test_a_connection_that_breaks_after_a_long_log_is_joined_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = JobServer(breaks_after=[3, 5], ends_after=6)
    monkeypatch.setattr(submit, "time", server)
    assert submit._follow(server, "m2f-1") == 0
    assert capsys.readouterr().out == "".join(f"line {n}\n" for n in range(6))


def test_a_server_that_stays_away_for_a_minute_ends_the_log_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    server = JobServer(breaks_after=[], ends_after=6)

    def gone(job: str) -> Any:
        raise OSError("refused")

    server.tail_job_logs = gone  # type: ignore[method-assign]
    monkeypatch.setattr(submit, "time", server)
    with pytest.raises(ValueError, match="the head's job server is gone .refused."):
        submit._follow(server, "m2f-1")
    assert 60 < server.clock < 65


# The file that `ray submit` copies alone


def test_the_copied_file_needs_nothing_but_python_to_start(tmp_path: Path) -> None:
    source = (PROJECT / "pipeline" / "submit.py").read_text()
    top = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
    (tmp_path / "submit.py").write_text(source)
    command = [sys.executable, "-S", "-E", "submit.py", "--help"]
    assert "repro TARGET..." in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["jump"],
            "error: jump is no command; there are check, up, run, results, down, repro, slurm, attach, status, stop\n",
        ),
        (["repro"], "error: name what to make: repro register@ade20k_swin-s\n"),
        (["repro", "--force", "a@b"], "error: --force is neither a target like register@ade20k_swin-s nor a setting"),
        (["results"], "error: name one cluster file: python -m pipeline.submit results cluster.yaml\n"),
        (["results", "none.yaml"], "error: none.yaml does not exist; the project's examples are cluster.yaml"),
        (["down", "params.yaml"], "error: params.yaml has no section provider, so it is no cluster file; compare it"),
        (["check", "docs"], "error: docs cannot be read (Is a directory); name a cluster file such as cluster.yaml\n"),
        (["check", "docs/report.png"], "error: docs/report.png is not UTF-8 text; name a cluster file such as clus"),
        # no cluster is started for these
        (["run", "cluster.yaml", "repro"], "error: name what to make: repro register@ade20k_swin-s\n"),
        (["run", "cluster.yaml", "repro", "train@none", "--down"], "error: train@none is no stage of dvc.yaml; there"),
        (["run", "cluster.yaml", "repro", "preflight@none"], "error: params.yaml: no row is called 'none'; known: "),
        (
            ["run", "cluster.onprem.yaml", "repro", "train@shapes_tiny"],
            "error: cluster.onprem.yaml: provider.head_ip: fill in",
        ),
        (["run", "cluster.yaml", "train"], "error: say what to run: run cluster.yaml repro register@<row>, or attach"),
    ],
)
def test_a_wrong_command_ends_in_one_sentence(words: list[str], sentence: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "pipeline.submit", *words], cwd=PROJECT, capture_output=True, text=True
    )
    assert answer.returncode == 1
    assert answer.stderr.startswith(sentence)


def test_help_of_a_laptops_command_is_no_cluster_file() -> None:
    asked = subprocess.run(
        [sys.executable, "-m", "pipeline.submit", "down", "--help"], cwd=PROJECT, capture_output=True, text=True
    )
    assert asked.returncode == 0 and asked.stdout.startswith("Rows on a cluster: ")


def test_a_command_line_is_targets_and_settings() -> None:
    assert parse_targets(["evaluate@a", "M2F_WORKERS=2", "evaluate@b"]) == (
        ["evaluate@a", "evaluate@b"],
        {"M2F_WORKERS": "2"},
    )


def test_a_jobs_targets_are_read_from_its_command() -> None:
    assert targets_of("python pipeline/submit.py repro 'evaluate@a*' M2F_WORKERS=2") == ["evaluate@a*"]
    assert targets_of("python train.py repro x") == []
    assert targets_of(None) == []
