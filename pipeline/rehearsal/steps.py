"""The stages of a rehearsal, one after the other, each in a process of its own: time, memory, and how it ended."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.rehearsal.killing import kill_worker

if TYPE_CHECKING:
    from pipeline.params.schema import Row
    from pipeline.rehearsal.project import Project
    from pipeline.storage.stores import StoredPath


TELL_S = 15.0
"""Between lines of a step's log that are shown."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a rehearsal, as it ended."""

    name: str
    seconds: float
    memory_mib: float | None
    """Of its largest process on this machine."""
    error: str | None = None
    """None: it ended well."""
    note: str = ""
    lines: tuple[str, ...] = ()
    """What it printed last."""


def commands(row: Row) -> list[tuple[str, list[str], str]]:
    """Name, command and explanation of every step, in their order."""
    stage = [sys.executable, "-m"]
    return [
        ("fetch", [*stage, "stages.fetch", row.dataset], "stand-in archives, downloaded and checked"),
        ("shards", [*stage, "stages.shard", row.dataset], "Arrow files of the stand-ins"),
        ("weights", [*stage, "stages.weights", row.weights], "initial weights, converted"),
        ("ready", [*stage, "stages.ready", row.name], "what the row needs"),
        (
            "training",
            [*stage, "stages.train", row.name],
            "steps, a checkpoint, a killed worker, its resume, a validation",
        ),
        ("loading and sums", [*stage, "pipeline.rehearsal.measure", row.name], "the loader, sums, the storage root"),
        ("evaluation", [*stage, "stages.evaluate", row.name], "all figures of the checkpoint"),
        ("registry", [*stage, "stages.register", row.name], "a model registered in MLflow"),
        ("report", [*stage, "stages.report"], "the report's pages"),
    ]


def rehearse(row: Row, project: Project, say: Callable[[str], None]) -> list[Step]:
    """Run the steps until one fails."""
    done: list[Step] = []
    todo = commands(row)
    for number, (name, command, about) in enumerate(todo, start=1):
        say(f"[{number}/{len(todo)}] {name}: {about}")
        kill = _Kill(project) if name == "training" else None
        step = _run(name, command, project, kill, say)
        if kill is not None and step.error is None:
            step = kill.judged(step)
        done.append(step)
        say(f"      {step.error or 'done'} after {step.seconds:.0f} s{f'; {step.note}' if step.note else ''}")
        if step.error is not None:
            break
    return done


def _run(name: str, command: Sequence[str], project: Project, kill: _Kill | None, say: Callable[[str], None]) -> Step:
    began, memory, told = time.monotonic(), 0.0, _Told(say)
    log = project.folder / f"{name.replace(' ', '-')}.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            list(command), cwd=project.folder, env=dict(project.environment), stdin=subprocess.DEVNULL,
            stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            while process.poll() is None:
                memory = max(memory, _largest_mib(process.pid))
                told.tell(log)
                if kill is not None:
                    kill.when_due()
                time.sleep(0.3)
        except BaseException:  # Ctrl-C: the stage gets it too, or else is ended here
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    error = None
    if process.returncode != 0:
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        error = (said or lines or [f"it ended with exit code {process.returncode}"])[-1]
        if process.returncode < 0:  # as the system does for want of memory; its last line is about something else
            by = signal.Signals(-process.returncode).name
            error = f"it was killed by {by}; its largest process had {memory:,.0f} MiB"
    return Step(
        name=name, seconds=time.monotonic() - began, memory_mib=memory or None, error=error, lines=tuple(lines[-30:])
    )


class _Told:
    """Says what a step's log ends with, where it is new, every TELL_S seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.last, self.told_s = say, "", time.monotonic()

    def tell(self, log: Path) -> None:
        """Look at the log."""
        if time.monotonic() - self.told_s >= TELL_S:
            self.told_s = time.monotonic()
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "").strip()
            if last != self.last:
                self.last = last
                self.say(f"      {last}")


def _largest_mib(pid: int) -> float:
    """Memory of the largest of a process and its descendants."""
    import psutil

    largest = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            try:
                largest = max(largest, process.memory_info().rss)
            except psutil.Error:
                continue
    except psutil.Error:
        return 0.0
    return largest / 2**20


class _Kill:
    """Kills a worker once, after the first checkpoint."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.killed: str | None = None
        self._after_s = 0.0

    def when_due(self) -> None:
        """Look for a checkpoint, at most twice a second, and kill a worker when there is one."""
        if self.killed is None and time.monotonic() > self._after_s:
            self._after_s = time.monotonic() + 0.5
            if self._checkpoints():
                self.killed = kill_worker(self.project.storage)

    def _checkpoints(self) -> list[StoredPath]:
        return list(self.project.storage.glob("runs/*/checkpoints/step-*.safetensors"))

    def judged(self, step: Step) -> Step:
        """The training's step, with what became of the kill."""
        from pipeline.storage.results.folder import names_of, read_result
        from pipeline.storage.results.rows import TrainingResult

        if self.project.environment.get("M2F_WORKERS") == "0":
            return dataclasses.replace(step, note="no worker was killed: M2F_WORKERS=0 trains without any")
        results = self.project.folder / "results"
        (name,) = names_of(TrainingResult, results=results)
        seed = read_result(TrainingResult, name, results=results).seeds[0]
        resumed = [span.from_step for span in seed.worker_groups if span.from_step > 0]
        if self.killed is None:
            return dataclasses.replace(step, note="it ended before a worker could be killed; give more --steps")
        if not resumed:
            return dataclasses.replace(step, note=f"{self.killed} was killed after the last step")
        return dataclasses.replace(step, note=f"{self.killed} was killed, and the run went on from step {resumed[-1]}")
