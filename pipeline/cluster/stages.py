"""Stages that rows share, run once, and the stages of each row, run side by side."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.results.folder import RESULTS

_ROW_SECTIONS = ("rows", "checkpoints")
"""Stages made for each entry of these sections of params.yaml belong to one row; the others are shared."""
Alone = Callable[[], AbstractContextManager[None]]
"""A lock between jobs that would do the same."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages in the order they run."""

    shared: tuple[str, ...]
    """One after the other, first."""
    rows: Mapping[str, tuple[str, ...]]
    """Row -> its stages, one after the other; the rows side by side."""
    last: tuple[str, ...]
    """When all rows have ended: the report."""
    needs: Mapping[str, frozenset[str]]
    """Row -> the shared stages without which it cannot run."""


def plan(targets: Sequence[str], pipeline: Mapping[str, Any], params: Mapping[str, Any]) -> Plan:
    """Which stages `dvc repro <targets>` takes, split into shared ones and rows.

    `pipeline`: dvc.yaml's stages; `params`: params.yaml. A target may hold wildcards (evaluate@ade20k_*). ValueError
    for one that names no stage.
    """
    order: dict[str, None] = {}

    def add(stage: str) -> None:
        if stage not in order:
            for upstream in _upstream(stage, pipeline, params):
                add(upstream)
            order[stage] = None

    known = list(_stages(pipeline, params))
    for target in targets:
        matching = [stage for stage in known if fnmatch.fnmatchcase(stage, target)]
        if not matching:
            raise ValueError(f"{target} is no stage of dvc.yaml; there are {', '.join(_stage_names(pipeline))}")
        for stage in matching:
            add(stage)

    rows: dict[str, list[str]] = {}
    shared, last = [], []
    for stage in order:
        name, _, key = stage.partition("@")
        if not key:
            last.append(stage)
        elif _section(pipeline[name]) in _ROW_SECTIONS:
            rows.setdefault(params[_section(pipeline[name])][key].get("row", key), []).append(stage)
        else:
            shared.append(stage)

    def needed(stage: str) -> Iterator[str]:
        for upstream in _upstream(stage, pipeline, params):
            if upstream in shared:
                yield upstream
            yield from needed(upstream)

    needs = {row: frozenset(up for stage in stages for up in needed(stage)) for row, stages in rows.items()}
    return Plan(tuple(shared), {row: tuple(stages) for row, stages in rows.items()}, tuple(last), needs)


def _section(definition: Mapping[str, Any]) -> str:
    return str(definition["foreach"]).removeprefix("${").removesuffix("}")


def _stages(pipeline: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[str]:
    for name, definition in pipeline.items():
        if "foreach" in definition:
            yield from (f"{name}@{key}" for key in params[_section(definition)])
        else:
            yield name


def _stage_names(pipeline: Mapping[str, Any]) -> Iterator[str]:
    for name, definition in pipeline.items():
        yield f"{name}@<entry of {_section(definition)}>" if "foreach" in definition else name


def _upstream(stage: str, pipeline: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """The stages whose results a stage reads, by its deps in dvc.yaml."""
    name, _, key = stage.partition("@")
    definition = pipeline[name]
    if not key:
        return []
    item = params[_section(definition)][key]
    result = re.compile(re.escape(f"{RESULTS}/") + r"(\w+)/\$\{(key|item\.(\w+))\}\.json")
    found = []
    for dep in definition["do"].get("deps", ()):
        match = result.fullmatch(dep)
        if match and match[1] in pipeline:
            found.append(f"{match[1]}@{key if match[2] == 'key' else item[match[3]]}")
    return found


def say(line: str) -> None:
    """One line of the job's own."""
    print(line, flush=True)


def run_stages(
    stages: Sequence[str], workspace: Path, prefix: str, environment: Mapping[str, str], write: Callable[[str], None]
) -> int:
    """`dvc repro` of these stages in this order; its output, every line after the prefix. The exit code."""
    # Upstream stages are named before those that read them, so each is looked at alone: `dvc repro` of two rows would
    # both lock the stages they share. The lock that remains is short: wait for it.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", *stages]
    return run_command(command, workspace, prefix, environment, write)


def run_command(
    command: Sequence[str],
    workspace: Path,
    prefix: str,
    environment: Mapping[str, str],
    write: Callable[[str], None] = say,
) -> int:
    """Run a command; its output, every line after the prefix. The exit code."""
    process = subprocess.Popen(
        list(command),
        cwd=workspace,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            write(f"{prefix} | {line.rstrip()}")
    return process.wait()


def run_plan(
    todo: Plan,
    workspace: Path,
    *,
    side_by_side: int,
    environment: Mapping[str, str],
    write: Callable[[str], None] = say,
    alone: Alone = nullcontext,
) -> int:
    """Run a plan and end with a summary; 0 when everything went well, else the worst exit code.

    `alone`: held while shared stages run.
    """
    lock = threading.Lock()

    def one_line(line: str) -> None:
        with lock:
            write(line)

    def run(stages: Sequence[str], prefix: str) -> tuple[int, float]:
        start = time.monotonic()
        code = run_stages(stages, workspace, prefix, environment, one_line)
        return code, time.monotonic() - start

    codes: dict[str, int] = {}
    summary: list[str] = []

    def ended(name: str, code: int, seconds: float) -> None:
        codes[name] = code
        summary.append(f"  {name}: {'done' if code == 0 else f'FAILED (exit code {code})'} after {seconds:.0f} s")

    failed: set[str] = set()
    with alone():
        for stage in todo.shared:
            code, seconds = run([stage], stage)
            if code != 0:
                failed.add(stage)
            ended(stage, code, seconds)
    ready = {}
    for row, stages in todo.rows.items():
        if lost := sorted(todo.needs[row] & failed):
            codes[row] = 1
            summary.append(f"  {row}: NOT RUN, for {', '.join(lost)} failed")
        else:
            ready[row] = stages
    with ThreadPoolExecutor(side_by_side) as pool:
        for row, (code, seconds) in zip(ready, pool.map(run, ready.values(), ready), strict=True):
            ended(row, code, seconds)
    for stage in todo.last:
        ended(stage, *run([stage], stage))
    write("")
    for line in summary:
        write(line)
    return max(map(abs, codes.values()), default=0)
