"""What a rehearsal says of the whole row."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.params.load import load_params
from pipeline.rehearsal.findings import Findings, find
from pipeline.rehearsal.project import Extent, Project
from pipeline.rehearsal.steps import Step
from pipeline.runs.curve_file import point_line
from pipeline.storage.results.folder import write_result
from tests.helpers.made_up import span, trained_seed, training
from tests.helpers.shared import PROJECT

RATES = {"loaded_per_s": 200.0, "sum_s": 0.05, "workers": 8, "write_mib_per_s": 500.0, "read_mib_per_s": 1000.0}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "storage"))
    (tmp_path / "project").mkdir()
    return Project(folder=tmp_path / "project", storage=tmp_path / "rehearsed", size=(64, 64), environment={})


def rehearsed(
    project: Project,
    *,
    gpu_memory_mib: float | None = 3072.0,
    rates: dict[str, float] | None = None,
    error: str | None = None,
    missing: tuple[str, ...] = (),
    **changes: Any,
) -> Findings:
    """Of ade20k_r50 with 8 workers: steps of 0.5 s, one of 30 s while a worker was replaced."""
    params = load_params(PROJECT / "params.yaml")
    row = dataclasses.replace(params.row("ade20k_r50"), **changes)
    seed = trained_seed(0, workers=8, worker_groups=(span(workers=8),), peak_memory_mib=gpu_memory_mib)
    write_result(training("ade20k_r50", [seed]), "ade20k_r50", results=project.folder / "results")
    curve = Path(project.storage) / seed.run_dir / "curve.jsonl"
    curve.parent.mkdir(parents=True, exist_ok=True)
    times, lines = 0.0, []
    for step in range(1, 13):
        times += 30.0 if step == 7 else 0.5
        lines.append(point_line(step, {"loss": 1.0}, int(times * 1000)))
    curve.write_text("\n".join([*lines, ""]))
    steps = [
        Step(name="training", seconds=60.0, memory_mib=2048.0),
        Step(name="loading and sums", seconds=9.0, memory_mib=None, lines=(json.dumps(rates or RATES),)),
        Step(
            name="evaluation",
            seconds=40.0,
            memory_mib=None,
            error=error,
            lines=("evaluating seed 0 of it, step 12: 20 images in 10 s, 2.0 images/s", "it: median mIoU 0.00"),
        ),
    ]
    extent = Extent(steps=12, images=20, scale=1.0, one_image=gpu_memory_mib is None, real_weights=False)
    return find(row, params, project, extent, steps, missing=missing, price_per_gpu_hour=2.0)


def values(found: Findings) -> dict[str, str]:
    return {figure.name: figure.value for figure in found.figures}


def test_a_steps_time_is_the_median_so_that_a_replaced_worker_does_not_count(project: Project) -> None:
    found = rehearsed(project)
    assert found.measured["step_s"] == 0.5
    assert values(found)["training"] == "0.5 s a step, 32 images/s"


def test_the_row_is_projected_from_steps_validations_and_evaluations(project: Project) -> None:
    # 160,000 steps of 0.5 s are 22.2 h. ms+flip shows 18.4 times the pixels of one size, so that 10 s for 20 pictures
    # are 0.027 s for one; 2,000 pictures, validated 32 times and evaluated twice at all sizes, take 1.0 h.
    found = rehearsed(project, max_gpu_hours=1000.0)
    assert values(found)["whole row"] == "23.3 h a seed; 5 seeds: 4.8 days one after the other"
    assert "GPU-hours" in values(found)["cost"] and "at 2 per GPU-hour" in values(found)["cost"]
    assert found.problems == ()


def test_a_seed_that_takes_more_gpu_hours_than_allowed_will_not_start(project: Project) -> None:
    (problem,) = rehearsed(project, max_gpu_hours=8.0).problems
    assert "max_gpu_hours of the row is 8: it will not start" in problem


def test_a_loader_slower_than_the_network_is_said_with_what_to_do(project: Project) -> None:
    (problem,) = rehearsed(project, max_gpu_hours=1000.0, rates={**RATES, "loaded_per_s": 30.0}).problems
    assert problem.startswith("the loader makes 30 images/s and the network takes 32; give workers more loader")


def test_memory_stands_beside_the_published_figure_and_is_the_processs_on_a_cpu(project: Project) -> None:
    on_gpu = next(figure for figure in rehearsed(project).figures if figure.name == "training memory")
    assert (on_gpu.value, on_gpu.note) == ("3.00 GiB of a GPU", "published: 3.31 GiB on A100")
    assert values(rehearsed(project, gpu_memory_mib=None))["training memory"].startswith("2.00 GiB, the worker's whole")


def test_failed_steps_and_what_the_row_lacks_will_not_hold(project: Project) -> None:
    found = rehearsed(project, max_gpu_hours=1000.0, error="no room", missing=("ADEChallengeData2016.zip in data/",))
    assert found.problems == ("evaluation: no room", "the row needs ADEChallengeData2016.zip in data/")


def test_too_few_steps_are_not_timed_and_nothing_is_projected(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.rehearsal.findings.read_points", lambda lines: [{"step": 1, "loss": 1, "time_ms": 5}])
    found = values(rehearsed(project))
    assert found["training"] == "not timed: too few steps; give more --steps"
    assert "whole row" not in found and "training memory" in found
