"""What the pipeline costs around the network: tracking, Ray, checkpoints, evaluation, and the way to a first step.

    python -m benchmarks.pipeline --out pipeline.json
    python -m benchmarks.pipeline --only help first_step --out pipeline.json

help: the time of every command's --help.
overhead: the step of a small row by the bare loop (pipeline.training.loop.train alone), with MLflow, and with Ray and
MLflow, in turns; the time to log a point and to write a checkpoint; and, derived from these, their share of the step
of each published row, at step times of 0.3 and 1 s.
evaluation: images per second with one worker and with two.
first_step: from `dvc repro evaluate@shapes_tiny` in a fresh copy to the first training step, and where the time goes.

Each part runs in a process of its own, in a folder of its own, for at most --limit-s; the file is written after each,
and "left" in it names those that are to come.
Ratios are of measurements in turns: other work on the machine slows down all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.out import refuse_unwritable, sole_writer
from benchmarks.pipeline.processes import PROJECT, end
from pipeline.storage.files import write_json

PARTS = ("help", "overhead", "evaluation", "first_step")


def commands() -> list[str]:
    """Modules that are commands with a command line."""
    found = [
        ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__main__")
        for folder in ("stages", "benchmarks")
        for path in sorted((PROJECT / folder).rglob("*.py"))
        if "ArgumentParser(" in path.read_text(encoding="utf-8")
    ]
    return [*found, "pipeline.submit"]


def help_times(modules: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of every command's --help: the shortest of `rounds`, in CPU time and in wall time."""
    found = {}
    for module in modules:
        cpu_s, wall_s = [], []
        for _ in range(rounds):
            before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([sys.executable, "-m", module, "--help"], cwd=PROJECT, capture_output=True, check=True)
            wall_s.append(time.perf_counter() - began_s)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        found[module] = {"cpu_s": round(min(cpu_s), 3), "wall_s": round(min(wall_s), 3)}
    return found


def measured(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A part's figures, made by a process of its own; `error` says why some or all are missing."""
    with tempfile.TemporaryDirectory(prefix="m2f-", dir="/tmp") as folder:  # Ray's socket paths must be short
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.pipeline", "--part", part, folder, "--out", str(out)]
        command += ["--rounds", str(arguments.rounds), "--steps", str(arguments.steps)]
        command += ["--images", str(arguments.images), "--forms", *arguments.forms]
        mine = {
            "M2F_STORAGE": f"{folder}/storage",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        others = {name: value for name, value in os.environ.items() if not name.startswith(("M2F_", "RAY_"))}
        environment = {**others, **mine}
        stderr = 2  # stdout is for figures
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=stderr, start_new_session=True)
        why = {}
        try:
            if code := process.wait(arguments.limit_s):
                why = {"error": f"ended with exit code {code}; its last line on stderr says why"}
        except subprocess.TimeoutExpired:
            why = {"error": f"stopped after {arguments.limit_s:g} s (--limit-s)"}
        finally:
            end(process)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        return {**found, **why}


def make(part: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A part's figures, made in this process."""
    from benchmarks.pipeline import parts

    (folder / "storage").mkdir()
    if part == "help":
        return {"commands": help_times(commands(), arguments.rounds)}
    if part == "overhead":
        return parts.overhead(
            folder,
            forms=arguments.forms,
            steps=arguments.steps,
            rounds=arguments.rounds,
            save=lambda found: write_json(arguments.out, found),
        )
    if part == "evaluation":
        return parts.evaluation(folder, images=arguments.images, rounds=arguments.rounds)
    return parts.first_step(folder)


def machine() -> dict[str, Any]:
    """What was measured on."""
    from pipeline.provenance.environment import device_name

    return {"device": device_name(), "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("pipeline.json"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns; default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="of a training that is timed; default: %(default)s")
    parser.add_argument("--images", type=int, default=200, help="that are evaluated; default: %(default)s")
    parser.add_argument(
        "--forms", nargs="+", choices=("bare", "mlflow", "ray"), default=["bare", "mlflow", "ray"], help="default: all"
    )
    parser.add_argument("--limit-s", type=float, default=900.0, help="of each part; default: %(default)s")
    parser.add_argument("--part", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part, folder = arguments.part
        write_json(arguments.out, make(part, Path(folder), arguments))
        return
    if min(arguments.rounds, arguments.steps, arguments.images) < 1 or not arguments.limit_s > 0:
        sys.exit("error: --rounds, --steps and --images must be at least 1, and --limit-s more than 0")
    refuse_unwritable(arguments.out)
    found: dict[str, Any] = {"machine": machine(), "left": list(arguments.only)}
    with sole_writer(arguments.out, found):
        for part in arguments.only:
            print(f"{part}: at most {arguments.limit_s:g} s", file=sys.stderr, flush=True)
            began_s = time.monotonic()
            found[part] = {**measured(part, arguments), "took_s": round(time.monotonic() - began_s, 1)}
            found["left"].remove(part)
            write_json(arguments.out, found)
            print(f"{part}: {json.dumps(found[part])}", flush=True)
    if any("error" in found[part] for part in arguments.only):
        sys.exit(1)


if __name__ == "__main__":
    main()
