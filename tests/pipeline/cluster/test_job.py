"""What the rows of a job need, and what its cluster has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import job as cluster_job
from pipeline.cluster.config import NodeGroup
from pipeline.cluster.job import Need, at_once, missing, need, where_things_are
from pipeline.params.load import load_params
from pipeline.params.schema import Row
from pipeline.storage.results.folder import write_result
from pipeline.storage.results.rows import Aliases, BestVersion, RegisteredVersion, Registration
from tests.helpers.shared import PROJECT


@pytest.fixture(scope="module")
def rows() -> Mapping[str, Row]:
    return load_params(PROJECT / "params.yaml").rows


def some(count: int, *, gpus: int = 0, cpus: int = 0) -> list[NodeGroup]:
    return [NodeGroup(node_type="some", count=count, gpus=gpus, cpus=cpus)]


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
        "set M2F_WORKERS=4 to train on those, or add machines to the cluster"
    ]
    assert missing(wanted, here=some(3, cpus=8), more=[]) == [
        "row a needs 8 GPUs, but the cluster has none and can start none; add machines to the cluster"
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


def test_only_gpus_of_the_wanted_type_count(rows: Mapping[str, Row], monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"head_node_type": "head", "available_node_types": TYPES}
    assert cluster_job.of_gpu_type(config, None) == config
    assert list(cluster_job.of_gpu_type(config, "L40S")["available_node_types"]) == ["head", "g6e"]
    assert cluster_job.of_gpu_type({}, "A100")["available_node_types"] == {}
    monkeypatch.setenv("M2F_ACCELERATOR_TYPE", "A100")
    wanted = [need(rows["ade20k_swin-s"])]
    assert wanted == [Need("ade20k_swin-s", gpus=8, cpus=1, gpu_type="A100")]
    assert missing(wanted, here=some(1, gpus=4, cpus=8), more=[]) == [
        "row ade20k_swin-s needs 8 A100 GPUs, but the cluster has 4 and can start no more; "
        "set M2F_WORKERS=4 to train on those, or add machines to the cluster"
    ]


def test_as_many_rows_run_at_once_as_there_may_be_worker_groups(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_job_ends_by_saying_where_results_curves_and_models_are_and_how_they_come_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M2F_STORAGE", "s3://bucket/m2f")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@10.0.0.10:5000")
    monkeypatch.setenv("M2F_CLUSTER_FILE", "mine.yaml")
    version: dict[str, Any] = {"seed": 0, "run_key": "k", "figure": None, "value": None}
    aliases = Aliases(best=BestVersion(version=3, **version), median=RegisteredVersion(version=2, **version))
    write_result(
        Registration(row="a", model="shapes-a", aliases=aliases, tracking_uri="http://10.0.0.10:5000"),
        "a",
        results=tmp_path / "results",
    )
    assert where_things_are(tmp_path, ["a", "b"]) == [
        f"results    {tmp_path}/results on the head; checkpoints and overlays: s3://bucket/m2f/runs",
        "report     at home: python -m stages.report",
        "curves     http://10.0.0.10:5000 (MLflow; docs/cluster.md has the way there)",
        "model      models:/shapes-a@best (version 3), @median (version 2)",
        "bring home python -m pipeline.submit results mine.yaml",
    ]
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "index.html").write_text("")
    monkeypatch.delenv("M2F_CLUSTER_FILE")
    lines = where_things_are(tmp_path, [])
    assert lines[1] == f"report     {tmp_path}/reports/index.html on the head; at home: python -m stages.report"
    assert lines[-1].endswith("results cluster.yaml")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert where_things_are(tmp_path, [])[-1] == "bring home as docs/cluster.md says for Kubernetes"
    # a job of Slurm has them in the project
    at_home = where_things_are(tmp_path, ["a"], home=True)
    assert at_home[0] == f"results    {tmp_path}/results; checkpoints and overlays: s3://bucket/m2f/runs"
    assert at_home[1] == "report     python -m stages.report" and at_home[-1].startswith(
        "model      models:/shapes-a@best"
    )
