"""The network's benchmark: what it counts and times, on a small network."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.network import __main__ as command
from benchmarks.network import counts, forms, measure, parts, plan, process, step
from benchmarks.network.process import Here
from benchmarks.network.rows import semantic_rows
from m2f.config import BackboneConfig
from pipeline.params.load import load_params
from tests.helpers.shared import PROJECT

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small backbone, and crops of 64 x 64 pixels."""
    monkeypatch.setattr(forms, "BACKBONES", {"tiny": BackboneConfig(name="tiny")})
    monkeypatch.setattr(forms, "CROP", (64, 64))


@pytest.mark.usefixtures("small")
def test_a_steps_matching_crosses_to_the_host_once_and_its_draws_to_the_device_once() -> None:
    found = counts.counted("tiny", 2)
    assert list(found) == list(step.PARTS[:-1])
    assert found["matching"].copies_to_host == 1 and found["matching"].copies_from_host == 1
    assert sum(part.copies_to_host for part in found.values()) == 1
    assert found["matching"].operations < 200  # 10 predictions of 2 images; one after the other they were 1,247
    assert all(found[part].operations > 0 for part in found)


@pytest.mark.usefixtures("small")
@pytest.mark.long
def test_a_larger_batch_has_larger_products_but_not_more_operations() -> None:
    two, three = (counts.counted("tiny", batch) for batch in (2, 3))
    for part in ("backbone", "pixel decoder", "query decoder"):
        assert two[part].operations == three[part].operations
    assert three["backbone"].flops == 1.5 * two["backbone"].flops


def test_a_product_is_counted_as_a_multiplication_and_an_addition() -> None:
    with counts.Operations() as operations:
        a = torch.zeros(4, 6, device="meta")
        b = a.t().view(6, 4)  # views are nothing to do
        (a @ b + 1).cpu().tolist()
    assert operations.counts == {"operations": 3, "copies to the host": 1}  # zeros, product, sum


def test_memory_is_of_tensors_that_live_at_once_and_a_view_takes_none() -> None:
    # 1 KiB that was there, 4 and 8 made; the 4 go before another 2 come: at most 13, and 11 are left
    known = torch.zeros(256, device="meta")
    memory = counts.Memory([known])
    with memory:
        memory.begin()
        four, eight = torch.zeros(1024, device="meta"), torch.zeros(2048, device="meta")
        view = eight.view(2, 1024)
        del four
        two = torch.zeros(512, device="meta")
    assert (memory.peak, memory.bytes) == (13 * 1024, 11 * 1024)
    del eight
    assert memory.bytes == 11 * 1024 and view.numel() * 4 + two.numel() * 4 == 10 * 1024  # the view keeps it
    memory.begin()
    assert memory.peak == 11 * 1024


@pytest.mark.usefixtures("small")
def test_kernels_make_fewer_operations_and_keep_less_and_their_table_says_so() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    found = counts.table("tiny", 2)
    for part in ("pixel decoder", "query decoder"):
        assert found["kernels"][part]["operations"] < found["plain"][part]["operations"]
    assert found["kernels"]["losses"]["left_mib"] < found["plain"]["losses"]["left_mib"]
    assert found["kernels"]["backbone"] == found["plain"]["backbone"]
    lines = [*counts.lines("tiny", 2, found)]
    assert len(lines) == 9 and max(map(len, lines)) <= 100
    operations = found["plain"]["backbone"]["operations"]
    assert lines[2].split()[:4] == ["backbone", f"{operations}", "->", f"{operations}"]
    plain, kernels, recorded = (int(word) for word in lines[8].split() if word.isdigit())
    assert plain > kernels > 100 > recorded == 4


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.long
def test_the_parts_of_a_step_have_times_and_shares_and_two_steps_have_the_same_bits() -> None:
    found = parts.parts("tiny", 2, CPU, "float32", gflops=100.0, rounds=1, until=0.0)
    assert list(found["parts"]) == list(step.PARTS)
    for name, part in found["parts"].items():
        assert name in ("losses", "matching") or part["seconds"] > 0
        # operations per second of 100 * 10^9
        if part["share_of_limit"] and part["seconds"] > 1e-3:
            expected = part["flops"] / part["seconds"] / 100e9
            assert part["share_of_limit"] == pytest.approx(expected, rel=0.05, abs=1e-3)
    assert found["same_bits"]["loss"] and found["same_bits"]["parameters that differ"] == 0
    assert sum(found["profiler"]["attention"].values()) > 0
    assert "by part" in measure.parts_line(found)
    json.dumps(found)


def test_launches_and_synchronisations_are_the_profilers() -> None:
    counts = {
        "cudaLaunchKernel": 900,
        "cuLaunchKernelEx": 20,
        "cudaStreamSynchronize": 2,
        "cudaDeviceSynchronize": 1,
        "Memcpy DtoH (Device -> Pinned)": 1,
        "Memcpy HtoD (Pageable -> Device)": 3,
        "aten::_scaled_dot_product_flash_attention": 27,
        "aten::_scaled_dot_product_flash_attention_backward": 27,
        "aten::mm": 5,
    }
    found = parts.seen(counts, cuda=True)
    assert found["launches"] == 920 and found["stream synchronisations"] == 2 and found["device synchronisations"] == 1
    assert found["copies to the host"] == 1 and found["copies from memory that is not pinned"] == 3
    assert set(found["attention"].values()) == {27} and len(found["attention"]) == 2


@pytest.mark.usefixtures("small")
def test_a_measurement_has_one_round_where_its_time_is_over_and_all_where_it_is_not() -> None:
    for until, rounds in ((0.0, 1), (math.inf, 3)):
        found = measure.measure("inference 64 x 64", "tiny", ["ours", "plain"], 3, CPU, "float32", until, start=Here)
        assert [len(times) for times in found.rounds.values()] == [rounds, rounds]
        assert found.to_plain is not None and not found.failed and "ours" in measure.line(found)


def test_a_form_that_fails_is_named_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def call_of(what: str, form: str, *_: object) -> object:
        def call() -> None:
            if form == "huggingface":
                raise RuntimeError("expected m1 and m2 to have the same dtype\nmore")

        return call

    monkeypatch.setattr(process, "call_of", call_of)
    found = measure.measure(
        "inference 64 x 64", "r50", ["ours", "huggingface"], 1, CPU, "bf16", time.monotonic(), start=Here
    )
    assert found.failed == {"huggingface": "expected m1 and m2 to have the same dtype"}
    assert list(found.seconds) == ["ours"] and found.to_huggingface == {}


def test_a_form_that_fails_in_a_later_round_has_no_figures_and_the_others_have_all_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = dict.fromkeys(plan.FORMS, 0)

    def call_of(what: str, form: str, *_: object) -> object:
        def call() -> None:
            calls[form] += 1
            if form == "plain" and calls[form] == 3:
                raise RuntimeError("its process ended with exit code -9")

        return call

    monkeypatch.setattr(process, "call_of", call_of)
    found = measure.measure("inference 64 x 64", "r50", plan.FORMS, 4, CPU, "float32", math.inf, start=Here)
    assert found.failed == {"plain": "its process ended with exit code -9"}
    assert {form: len(times) for form, times in found.rounds.items()} == {"ours": 4, "huggingface": 4}
    assert found.to_plain is None and list(found.to_huggingface) == ["ours"] and "plain" not in found.peak_mib


def test_without_transformers_its_form_is_left_out_and_refused_where_it_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forms.importlib.util, "find_spec", lambda name: None)
    assert forms.known_forms(["huggingface", "ours"]) == ["ours"]
    with pytest.raises(SystemExit, match="error: --forms huggingface needs transformers: pip install transformers"):
        forms.known_forms(["huggingface"])


@pytest.mark.usefixtures("small")
def test_a_benchmark_that_is_stopped_leaves_a_file_that_says_what_is_there_and_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "network.json"
    given = ["--rows", "r50", "--sizes", "512x512", "640x640", "--only", "inference", "--forms", "ours"]
    arguments = command.arguments_of([*given, "--out", str(out)])
    measured = measure.Measured("r50", "inference 512 x 512", "float32", {"ours": 1.0}, {}, None, {}, {}, {})

    def one(what: str, *_: object) -> measure.Measured:
        if "640" in what:
            raise KeyboardInterrupt
        return measured

    monkeypatch.setattr(measure, "measure", one)
    monkeypatch.setattr(measure, "machine_gflops", lambda *_: {"matrix products": 1.0})
    with pytest.raises(KeyboardInterrupt):
        measure.run(arguments, CPU)
    found = json.loads(out.read_text())
    assert [each["what"] for each in found["measured"]] == ["inference 512 x 512"]
    assert found["left"] == ["r50 inference 640 x 640 float32"]


@pytest.mark.long
def test_a_form_in_a_process_of_its_own_makes_rounds_and_says_its_memory_or_why_it_cannot() -> None:
    apart = process.Apart("inference 64 x 64", "ours", "r50", CPU, "float32")
    assert apart.round() > 0
    assert 100 < apart.end() < 10_000
    apart = process.Apart("inference 8 x 8", "ours", "r50", CPU, "float32")
    with pytest.raises(RuntimeError, match="its process ended with exit code 1"):
        apart.round()
    apart.kill()


def test_all_kinds_are_planned_for_every_row_and_precision_and_published_rows_last() -> None:
    arguments = command.arguments_of(
        ["--rows", "r50", "--precision", "float32", "bf16", "--only", "inference", "parts"]
    )
    planned = plan.plan(arguments)
    assert len(planned) == 2 * 4 and planned[3] == ("r50", "parts", "float32")
    some = command.arguments_of(["--rows", "r50", "--sizes", "512x512", "--only", "inference"])
    assert plan.plan(some) == [("r50", "inference 512 x 512", "float32")]
    arguments.only = plan.KINDS
    assert plan.plan(arguments)[-1] == ("", "published", "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "--rounds, --batch and --threads must be at least 1"),
        (["--rounds", "-3"], "--rounds, --batch and --threads must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--limit-s", "0"], "--limit-s more than 0"),
        (["--limit-s", "nan"], "--limit-s more than 0"),
        (["--only", "published"], "--only published needs --device cuda"),
    ],
)
def test_arguments_that_cannot_be_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command.arguments_of(argv)


def test_thirteen_rows_have_published_speed_and_memory() -> None:
    rows = semantic_rows(load_params(PROJECT / "params.yaml"))
    assert len(rows) == 13 and all("train_mem_gib" in row.published for row in rows)


@pytest.mark.slow
def test_the_benchmark_needs_neither_ray_nor_mlflow_nor_albumentations(tmp_path: Path) -> None:
    code = (
        "import sys, benchmarks.network.measure, benchmarks.network.rows\n"
        "print(sorted({'ray', 'mlflow', 'albumentations', 'pyarrow', 'dvc'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
