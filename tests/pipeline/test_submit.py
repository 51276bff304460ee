"""Rows on a cluster: what is run, what it needs, how results travel. The cluster itself is in tests/cluster/."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline import submit
from pipeline.cluster import job as cluster_job
from pipeline.cluster import workspace
from pipeline.cluster.config import Machines
from pipeline.cluster.job import Need, at_once, missing, need
from pipeline.cluster.stages import Plan, plan, run_plan
from pipeline.params.load import load_params
from pipeline.params.schema import Row
from pipeline.submit import parse_targets, targets_of
from tests.helpers.shared import PROJECT

PIPELINE: Mapping[str, Any] = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
PARAMS: Mapping[str, Any] = yaml.safe_load((PROJECT / "params.yaml").read_text())


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
        (["jump"], "error: jump is no command; there are check, up, run, results, down, repro, attach, status, stop\n"),
        (["repro"], "error: name what to make: repro evaluate@ade20k_swin-s\n"),
        (["repro", "--force", "a@b"], "error: --force is neither a target like evaluate@ade20k_swin-s nor a setting"),
        (["results"], "error: name one cluster file: python -m pipeline.submit results cluster.yaml\n"),
        (["run", "cluster.yaml", "train"], "error: say what to run: run cluster.yaml repro evaluate@<row>, or attach"),
    ],
)
def test_a_wrong_command_ends_in_one_sentence(words: list[str], sentence: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "pipeline.submit", *words], cwd=PROJECT, capture_output=True, text=True
    )
    assert answer.returncode == 1
    assert answer.stderr.startswith(sentence)


def test_a_command_line_is_targets_and_settings() -> None:
    assert parse_targets(["evaluate@a", "M2F_WORKERS=2", "evaluate@b"]) == (
        ["evaluate@a", "evaluate@b"],
        {"M2F_WORKERS": "2"},
    )


def test_a_jobs_targets_are_read_from_its_command() -> None:
    assert targets_of("python pipeline/submit.py repro 'evaluate@a*' M2F_WORKERS=2") == ["evaluate@a*"]
    assert targets_of("python train.py repro x") == []
    assert targets_of(None) == []


# What is run


def test_rows_of_one_dataset_share_its_stages_and_run_side_by_side() -> None:
    todo = plan(["evaluate@ade20k_r50", "evaluate@ade20k_r101", "report"], PIPELINE, PARAMS)
    assert todo.shared == ("fetch@ade20k", "shard@ade20k", "weights@torchvision_r50", "weights@torchvision_r101")
    assert todo.rows == {
        "ade20k_r50": ("train@ade20k_r50", "evaluate@ade20k_r50"),
        "ade20k_r101": ("train@ade20k_r101", "evaluate@ade20k_r101"),
    }
    assert todo.last == ("report",)
    assert todo.needs["ade20k_r50"] == {"fetch@ade20k", "shard@ade20k", "weights@torchvision_r50"}


def test_a_target_may_hold_wildcards_and_may_be_a_shared_stage() -> None:
    todo = plan(["published@coco_instance_*", "shard@shapes"], PIPELINE, PARAMS)
    assert len(todo.rows) == sum(name.startswith("coco_instance_") for name in PARAMS["checkpoints"]) > 1
    assert todo.shared == ("fetch@coco", "shard@coco", "fetch@shapes", "shard@shapes")


def test_a_target_that_is_no_stage_is_said() -> None:
    with pytest.raises(
        ValueError, match=r"evaluate@ade20k is no stage of dvc.yaml; there are fetch@<entry of datasets>"
    ):
        plan(["evaluate@ade20k"], PIPELINE, PARAMS)


# What it needs


@pytest.fixture(scope="module")
def rows() -> Mapping[str, Row]:
    return load_params(PROJECT / "params.yaml").rows


def some(count: int, *, gpus: int = 0, cpus: int = 0) -> list[Machines]:
    return [Machines(kind="some", count=count, gpus=gpus, cpus=cpus)]


def test_a_published_row_needs_a_gpu_for_each_group_and_a_tiny_one_none(
    rows: Mapping[str, Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert need(rows["ade20k_swin-s"]) == Need("ade20k_swin-s", gpus=8, cpus=1)
    assert need(rows["shapes_tiny"]) == Need("shapes_tiny", gpus=0, cpus=1)
    assert need(rows["ade20k_swin-s"], trains=False) == Need("ade20k_swin-s", gpus=1, cpus=1)
    monkeypatch.setenv("M2F_WORKERS", "2")
    assert need(rows["ade20k_swin-s"]) == Need("ade20k_swin-s", gpus=2, cpus=1)
    assert need(rows["shapes_tiny"]) == Need("shapes_tiny", gpus=0, cpus=2)


def test_what_the_cluster_lacks_is_said_and_what_it_may_start_counts() -> None:
    wanted = [Need("a", gpus=8, cpus=1)]
    assert missing(wanted, here=some(1, cpus=8), more=some(2, gpus=8)) == []
    assert missing(wanted, here=some(1, gpus=4, cpus=8), more=some(1, gpus=4)) == []
    assert missing(wanted, here=some(1, gpus=4, cpus=8), more=[]) == [
        "row a needs 8 GPUs, but the cluster has 4 and can start no more; "
        "set M2F_WORKERS=4 to train on those, or add machines to the cluster file"
    ]
    assert missing(wanted, here=some(3, cpus=8), more=[]) == [
        "row a needs 8 GPUs, but the cluster has none and can start none; add machines to the cluster file"
    ]
    assert missing([Need("b", gpus=0, cpus=3)], here=some(2, cpus=1), more=[]) == [
        "row b needs 3 cores (M2F_WORKERS), but the cluster has 2; set M2F_WORKERS=2 or less"
    ]


TYPES: Mapping[str, Any] = {
    "head": {"resources": {"CPU": 6}},
    "p4d": {"resources": {"CPU": 96, "GPU": 8, "accelerator_type:A100": 1}},  # as `ray up` on AWS writes it
    "g6e": {"resources": {"CPU": 192, "GPU": 8, "accelerator_type:L40S": 1}},
    "unknown": {"resources": {"CPU": 8, "GPU": 1}},
}


def test_only_gpus_of_the_wanted_kind_count(rows: Mapping[str, Row], monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"head_node_type": "head", "available_node_types": TYPES}
    assert cluster_job.of_kind(config, None) == config
    assert list(cluster_job.of_kind(config, "L40S")["available_node_types"]) == ["head", "g6e"]
    assert cluster_job.of_kind({}, "A100")["available_node_types"] == {}
    monkeypatch.setenv("M2F_ACCELERATOR_TYPE", "A100")
    wanted = [need(rows["ade20k_swin-s"])]
    assert wanted == [Need("ade20k_swin-s", gpus=8, cpus=1, kind="A100")]
    assert missing(wanted, here=some(1, gpus=4, cpus=8), more=[]) == [
        "row ade20k_swin-s needs 8 A100 GPUs, but the cluster has 4 and can start no more; "
        "set M2F_WORKERS=4 to train on those, or add machines to the cluster file"
    ]


def test_as_many_rows_run_at_once_as_there_may_be_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = [Need("a", gpus=8, cpus=1)], [Need("a", gpus=0, cpus=2)]
    assert at_once(gpu, here=some(1, gpus=0), more=some(4, gpus=8)) == 4
    assert at_once(gpu, here=some(2, gpus=6), more=[]) == 1
    assert at_once(cpu, here=some(2, cpus=2), more=[]) == 1  # without M2F_WORKERS a row takes every core
    monkeypatch.setenv("M2F_WORKERS", "2")
    assert at_once(cpu, here=some(2, cpus=2), more=[]) == 2


def test_machines_that_do_not_join_are_waited_for_and_then_said(capsys: pytest.CaptureFixture[str]) -> None:
    joined = iter([1, 2, 3])
    cluster_job.wait_for_machines(3, lambda: next(joined), wait_s=60)
    assert capsys.readouterr().out == "waiting for 2 of 3 machines to join\n"
    cluster_job.wait_for_machines(3, lambda: 2, wait_s=0)
    assert capsys.readouterr().out == "warning: 2 of 3 machines have joined; going on with these (see: ray status)\n"


# Running it, with DVC


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of three stages on two rows; row b's training fails."""
    commands = {
        "shard": "echo sharding ${key} && echo 1 > results/shard/${key}.json",
        "train": "echo training ${key} && test ${key} != b && echo 2 > results/train/${key}.json",
        "evaluate": "cat results/train/${key}.json > results/evaluate/${key}.json",
    }
    deps = {"train": ["results/shard/${item.dataset}.json"], "evaluate": ["results/train/${key}.json"]}
    stages = {
        name: {
            "foreach": "${datasets}" if name == "shard" else "${rows}",
            "do": {
                "cmd": command,
                "deps": deps.get(name, []),
                "outs": [{f"results/{name}/${{key}}.json": {"cache": False, "persist": True}}],
            },
        }
        for name, command in commands.items()
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (tmp_path / "params.yaml").write_text(
        "datasets: {d: 1, e: 1}\nrows: {a: {dataset: d}, b: {dataset: d}, c: {dataset: e}}\n"
    )
    for name in ("shard", "train", "evaluate"):
        (tmp_path / "results" / name).mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def made(project: Path, *targets: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    files = [yaml.safe_load((project / name).read_text()) for name in ("dvc.yaml", "params.yaml")]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    todo = plan(targets, files[0]["stages"], files[1])
    return run_plan(todo, project, side_by_side=3, environment=environment, write=lines.append), lines


@pytest.mark.slow
def test_a_failing_row_leaves_the_others_and_its_code_is_the_jobs(project: Path) -> None:
    code, lines = made(project, "evaluate@*")
    assert code != 0
    assert lines.index("shard@d | > echo sharding d && echo 1 > results/shard/d.json") < min(
        i for i, line in enumerate(lines) if " | > echo training" in line
    )
    assert {"a | training a", "b | training b", "c | training c"} <= set(lines)
    outcomes = dict(line.strip().split(": ", 1) for line in lines[lines.index("") + 1 :])
    assert {row: text.split()[0] for row, text in outcomes.items()} == {
        "shard@d": "done", "shard@e": "done", "a": "done", "b": "FAILED", "c": "done"
    }  # fmt: skip
    assert [(project / f"results/evaluate/{row}.json").exists() for row in "abc"] == [True, False, True]
    assert set(yaml.safe_load((project / "dvc.lock").read_text())["stages"]) == {
        "shard@d", "shard@e", "train@a", "evaluate@a", "train@c", "evaluate@c"
    }  # fmt: skip
    code, lines = made(project, "evaluate@a", "evaluate@c")
    assert code == 0 and not any("> echo" in line for line in lines)  # nothing runs twice


@pytest.mark.slow
def test_a_row_whose_pictures_failed_is_not_run(project: Path) -> None:
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("echo sharding ${key}", "test ${key} != e"))
    code, lines = made(project, "train@a", "train@c")
    assert code != 0
    assert "  c: NOT RUN, for shard@e failed" in lines
    assert (project / "results/train/a.json").exists()


def test_an_empty_plan_is_done(tmp_path: Path) -> None:
    assert run_plan(Plan((), {}, (), {}), tmp_path, side_by_side=1, environment={}, write=lambda line: None) == 0


# How code and results travel


def tree(folder: Path, lock: Mapping[str, str] | None = None, **files: tuple[str, int]) -> Path:
    """A project's results: train@a=(content, time); the lock says of each what it was made from."""
    for stage, (content, time) in files.items():
        path = folder / "results" / f"{stage.replace('_', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        os.utime(path, (time, time))
    stages = {
        name.replace("_", "@"): {"cmd": text, "outs": [{"path": f"results/{name.replace('_', '/')}.json"}]}
        for name, text in (lock or {}).items()
    }
    folder.mkdir(exist_ok=True)
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    return folder


def shown(folder: Path) -> dict[str, tuple[str, str]]:
    """Stage -> (result, what the lock says of it)."""
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {name: ((folder / entry["outs"][0]["path"]).read_text(), entry["cmd"]) for name, entry in stages.items()}


def test_the_newer_result_stays_with_its_entry_of_the_lock(tmp_path: Path) -> None:
    # a: only there; b: newer there; c: newer here; d: the same; e: only here
    there = tree(
        tmp_path / "there", {"train_a": "a there", "train_b": "b there", "train_c": "c there", "train_d": "d there"},
        train_a=("A", 1), train_b=("B new", 9), train_c=("C old", 1), train_d=("D", 1),
    )  # fmt: skip
    here = tree(
        tmp_path / "here", {"train_b": "b here", "train_c": "c here", "train_d": "d here", "train_e": "e here"},
        train_b=("B old", 2), train_c=("C new", 8), train_d=("D", 7), train_e=("E", 1),
    )  # fmt: skip
    assert workspace.add_newer_results(there, here) == ["train@a", "train@b"]
    assert shown(here) == {
        "train@a": ("A", "a there"),
        "train@b": ("B new", "b there"),
        "train@c": ("C new", "c here"),
        "train@d": ("D", "d here"),
        "train@e": ("E", "e here"),
    }
    assert (here / "results/train/b.json").stat().st_mtime == 9
    assert workspace.add_newer_results(there, here) == []


def test_a_job_takes_only_results_that_the_workspace_lacks(tmp_path: Path) -> None:
    upload = tree(tmp_path / "upload", {"train_a": "a", "train_b": "b"}, train_a=("A", 9), train_b=("B", 9))
    ours = tree(tmp_path / "ours", {"train_a": "ours"}, train_a=("A ours", 1))
    assert workspace.add_missing_results(upload, ours) == ["train@b"]
    assert shown(ours) == {"train@a": ("A ours", "ours"), "train@b": ("B", "b")}


def test_a_result_of_a_stage_that_has_not_ended_travels_without_a_lock(tmp_path: Path) -> None:
    there, here = tree(tmp_path / "there", train_a=("A", 1)), tmp_path / "here"
    here.mkdir()
    assert workspace.add_newer_results(there, here) == ["results/train/a.json"]
    assert (here / "results/train/a.json").read_text() == "A"
    assert not (here / "dvc.lock").exists()


def test_code_is_taken_whole_and_results_and_ignored_files_stay(tmp_path: Path) -> None:
    upload, ours = tmp_path / "upload", tmp_path / "ours"
    for folder, text in ((upload, "new"), (ours, "old")):
        (folder / "m2f").mkdir(parents=True)
        (folder / "m2f" / "model.py").write_text(text)
        (folder / "dvc.yaml").write_text("stages: {}")
        (folder / ".gitignore").write_text("/storage/\n")
    (ours / "m2f" / "gone.py").write_text("")
    for kept in ("results/a.json", "storage/b", "tracking/mlflow.db", "reports/index.html"):
        (ours / kept).parent.mkdir(exist_ok=True)
        (ours / kept).write_text("kept")
    (ours / "dvc.lock").write_text("kept")
    assert workspace.code_changes(upload, ours) == ["m2f/gone.py", "m2f/model.py"]
    workspace.take_code(upload, ours)
    assert (ours / "m2f/model.py").read_text() == "new" and not (ours / "m2f/gone.py").exists()
    assert {path.relative_to(ours).as_posix() for path in ours.rglob("*") if path.is_file()} == {
        "m2f/model.py", "dvc.yaml", "dvc.lock", ".gitignore",
        "results/a.json", "storage/b", "tracking/mlflow.db", "reports/index.html",
    }  # fmt: skip
    assert workspace.code_changes(upload, ours) == []


def copy_of(folder: Path, **files: str) -> Path:
    """A copy of a project with these files beside its dvc.yaml."""
    for name, text in {"dvc.yaml": "stages: {}", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    """Files and links of a folder and the folders in it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def test_links_programs_and_files_that_become_folders_arrive_as_they_are(tmp_path: Path) -> None:
    upload = copy_of(tmp_path / "upload", **{"run": "sh", "text": "t", "m2f/a.py": "a", "part/b.py": "b", "whole": "w"})
    links = {"link": "m2f/a.py", "folder": "m2f", "nowhere": "missing"}
    for name, to in links.items():
        (upload / name).symlink_to(to)
    (upload / "run").chmod(0o755)
    ours = copy_of(
        tmp_path / "ours",
        **{"run": "sh", "text": "t", "m2f/a.py": "a", "part": "b", "whole/c/d.py": "", "link": "a", "old/e.py": ""},
    )
    (ours / "folder").symlink_to("old")
    (ours / "text").chmod(0o755)
    changed = ["folder", "link", "nowhere", "old/e.py", "part", "part/b.py", "run", "text", "whole", "whole/c/d.py"]
    assert workspace.code_changes(upload, ours) == changed
    workspace.take_code(upload, ours)
    assert workspace.code_changes(upload, ours) == []
    assert names(ours) == names(upload) and not (ours / "old").exists()
    assert {name: os.readlink(ours / name) for name in links} == links
    assert [(ours / name).read_text() for name in ("part/b.py", "whole")] == ["b", "w"]
    assert [os.access(ours / name, os.X_OK) for name in ("run", "text")] == [True, False]


def test_a_gitignore_counts_in_its_folder_and_below_as_git_reads_it(tmp_path: Path) -> None:
    upload = copy_of(
        tmp_path / "upload",
        **{
            ".gitignore": "*.db\n/data/\n/out/*\n!/out/kept/\n",
            "docs/.gitignore": "/draft.md\n!shown.db\n",
        },
    )
    taken = {"docs/shown.db", "docs/more/shown.db", "docs/more/draft.md", "docs/data/x", "out/kept/x", "draft.md"}
    ignored = {"a.db", "shown.db", "docs/a.db", "docs/draft.md", "data/x", "data/shown.db", "out/x", "out/kept/a.db"}
    copy_of(upload, **dict.fromkeys(taken | ignored, "theirs"))
    before = names(upload)
    ours = copy_of(tmp_path / "ours", **dict.fromkeys(ignored, "ours"))
    workspace.take_code(upload, ours)
    assert names(ours) == before
    assert {name for name in before if (ours / name).read_text() == "theirs"} == taken
    assert {name for name in before if (ours / name).read_text() == "ours"} == ignored


def test_a_line_less_in_the_uploads_gitignore_removes_nothing(tmp_path: Path) -> None:
    ours = copy_of(tmp_path / "ours", **{".gitignore": "/weights/\n", "weights/a": "ours"})
    upload = copy_of(tmp_path / "upload", **{".gitignore": "", "weights/b": "theirs"})
    workspace.take_code(upload, ours)
    assert names(ours) == {"dvc.yaml", ".gitignore", "weights/a", "weights/b"}


def test_what_stays_and_is_in_the_way_of_code_is_said(tmp_path: Path) -> None:
    upload = copy_of(tmp_path / "upload", **{".gitignore": "*.db\n", "notes": "now a file"})
    ours = copy_of(tmp_path / "ours", **{"notes/a.db": "ours"})
    with pytest.raises(ValueError, match=r"could not be taken from .*upload to .*ours: .*Is a directory: .*notes"):
        workspace.take_code(upload, ours)
    assert (ours / "notes/a.db").read_text() == "ours"


def test_a_folder_without_the_project_is_no_upload(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no project \(no dvc.yaml\); bring it with: ray rsync-up"):
        workspace.take_code(tmp_path, tmp_path / "ours")
