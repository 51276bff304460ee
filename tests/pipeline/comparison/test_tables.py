from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.comparison.rows import row_facts
from pipeline.comparison.tables import table_line, used_columns
from pipeline.params.schema import Params
from pipeline.report.text import markdown
from tests.helpers.report_rows import RULE, benchmark, evaluated, on_gpu, page_of, trained, written


def test_a_difference_that_rounds_to_nothing_has_no_minus(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("published", [0.804399]))  # 80.4399 - 80.44
    facts = row_facts(params.rows["published"], tmp_path, RULE)
    assert str(facts.difference["miou"]) == "0.0"
    assert table_line("published", facts)["difference miou"].text == "+0.00"


def test_gpu_hours_of_a_seed_are_its_time_on_all_its_workers(params: Params, tmp_path: Path) -> None:
    # 7,200 s x 4 workers = 8 GPU-hours a seed, 24 of three. On a CPU the time is told: 75 s.
    written(tmp_path, evaluated("ours", [0.7, 0.71, 0.72]))
    written(tmp_path, on_gpu("ours", 3))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert facts.cost is not None
    assert (facts.cost.gpu_hours, facts.cost.gpu_hours_all) == (8.0, 24.0)
    assert str(table_line("ours", facts)["training"]) == "8.0 GPU-h A100"
    assert "| 2.0 h on 4 x A100, 8.0 GPU-h | k0 |" in markdown({"ours": facts}, RULE)
    written(tmp_path, trained("ours", 3))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert facts.cost is not None
    assert (facts.cost.gpu_hours, facts.cost.gpu_hours_all) == (None, None)
    assert str(table_line("ours", facts)["training"]) == "75 s CPU"


def test_memory_is_the_benchmarks_or_else_the_most_of_the_trainings(params: Params, tmp_path: Path) -> None:
    # 5,632 MiB = 5.50 GiB, with 2 pictures a GPU as published. 16 pictures over 4 workers are 4 a GPU: not comparable.
    written(tmp_path, on_gpu("published", 1, peak_memory_mib=8192.0))
    row = params.rows["published"]
    cell = table_line("published", row_facts(row, tmp_path, RULE))["memory"]
    assert (str(cell), cell.apart) == ("8.00 4 images *", True)
    written(tmp_path, benchmark("published"))
    cell = table_line("published", row_facts(row, tmp_path, RULE))["memory"]
    assert (str(cell), cell.apart) == ("5.50 A100", False)
    written(tmp_path, benchmark("published", skipped="does not fit"))
    assert "not measured: does not fit" in page_of(params, tmp_path)


def test_a_speed_measured_on_another_device_is_marked_and_told_with_its_device(params: Params, tmp_path: Path) -> None:
    row = params.rows["published"]
    for device, shown in (
        ("NVIDIA A100-SXM4-80GB", "9.50 A100"),
        ("NVIDIA A100 80GB PCIe", "9.50 A100"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "9.50 A100 MIG 1g.10gb *"),
        ("NVIDIA H200", "9.50 H200 *"),
        ("NVIDIA GeForce RTX 4090", "9.50 RTX 4090 *"),
        ("AMD EPYC 9B14", "9.50 CPU *"),
    ):
        written(tmp_path, benchmark("published", device=device))
        line = table_line("published", row_facts(row, tmp_path, RULE))
        assert (str(line["fps"]), str(line["published fps"])) == (shown, "9.17 A100")
    written(tmp_path, benchmark("published", device="a CPU", fps=0.0123))
    assert str(table_line("published", row_facts(row, tmp_path, RULE))["fps"]) == "0.012 CPU *"


@pytest.mark.parametrize(
    ("train", "test", "shown"),
    [
        ({}, {}, "-"),
        ({"precision": "fp16"}, {"precision": "fp16"}, "fp16"),
        ({"precision": "bf16"}, {}, "bf16; tests float32"),
        ({"tf32": "all"}, {"precision": "bf16"}, "float32, TF32 all; tests bf16"),
    ],
)
def test_a_precision_that_is_not_the_published_recipes_has_a_column_of_its_own(
    train: dict[str, Any], test: dict[str, Any], shown: str, params: Params, tmp_path: Path
) -> None:
    written(tmp_path, evaluated("published", [0.8]))
    row = params.rows["published"]
    row = dataclasses.replace(
        row, train=dataclasses.replace(row.train, **train), test=dataclasses.replace(row.test, **test)
    )
    facts = row_facts(row, tmp_path, RULE)
    assert str(table_line("published", facts)["precision"]) == shown
    assert ("Precision" in [column.heading for column in used_columns({"published": facts}, "semantic")]) == (
        shown != "-"
    )
