"""Rows on a cluster: what `ray submit` runs on its head, and what a laptop calls around it.

On the laptop:
  python -m pipeline.submit check cluster.yaml                 what is wrong with the file, and with the AWS account
  python -m pipeline.submit up cluster.yaml                    check, then `ray up`
  python -m pipeline.submit run cluster.yaml repro TARGET...   `ray up` if it is down, code, `ray submit`, results;
                                                               --down: and `ray down`
  python -m pipeline.submit results cluster.yaml               results/, reports/, dvc.lock home; newer ones win
  python -m pipeline.submit down cluster.yaml                  results, then `ray down`, on all machines

On the head, through `ray submit cluster.yaml pipeline/submit.py -- ...`, or `run cluster.yaml ...` as above:
  repro TARGET... [M2F_WORKERS=2 ...]   like `dvc repro`, as a job that outlives the connection; wildcards work;
                                        the target preflight@<row> rehearses a row first (stages.preflight)
  attach [JOB]                          join a job: its log, and its exit code
  status                                the jobs
  stop [JOB]                            end a job; what it has finished stays

Before `ray submit`, send changed code (`ray rsync-up cluster.yaml`); add M2F_GIT_COMMIT=$(git rev-parse HEAD) to the
targets, and quote wildcards twice. Every failure is its exit code 1. With RAY_AUTH_MODE=token this works as well:
`ray job submit --working-dir . -- python pipeline/submit.py repro TARGET...`.

In a job of Slurm, through `sbatch deploy/slurm/row.sbatch TARGET...`:
  slurm TARGET... [M2F_WORKERS=2 ...]   like repro, on a Ray cluster that lives as long as the job
"""

# `ray submit` copies this file alone: until the project is found, only the standard library is there.
from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

JOB_SERVER = "http://127.0.0.1:8265"
"""The head's own; it is not shown to the network."""
_SETTING = re.compile(r"(M2F_\w+)=(.*)")
_LAPTOP_COMMANDS = ("check", "up", "run", "results", "down")
_SILENCE_S = 60.0
"""How long the job server may be silent while a log is followed."""
_INSIDE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable for the processes of a job."""


def main(words: Sequence[str]) -> int:
    """Command line; the exit code."""
    command, *rest = words or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command in _LAPTOP_COMMANDS:
        from pipeline.cluster import laptop

        if {"-h", "--help"} & {*rest}:
            print(__doc__)
            return 0
        if command == "run" and rest[1:2] == ["repro"]:  # before a cluster is started for it
            laptop.check_targets(parse_targets([word for word in rest[2:] if word != "--down"])[0])
        return int(getattr(laptop, command)(rest))
    actions: dict[str, Callable[[list[str]], int]] = {
        "repro": drive if _INSIDE in os.environ else repro,
        "slurm": slurm,
        "attach": attach,
        "status": status,
        "stop": stop,
    }
    if command not in actions:
        raise ValueError(f"{command} is no command; there are {', '.join([*_LAPTOP_COMMANDS, *actions])}")
    return actions[command](rest)


# On the head, outside a job


def repro(words: list[str]) -> int:
    """Start a job, or join the one that does the same; stream its log until it ends."""
    targets, _ = parse_targets(words)
    client = _client()
    with _one_at_a_time():
        same = (job for job, theirs in _running(client).items() if sorted(theirs) == sorted(targets))
        if job := next(same, ""):
            print(f"{job} does this already; joining it", flush=True)
        else:
            job = _start(client, words)
            print(f"{job} started; it goes on when this connection ends: attach {job} joins it again", flush=True)
    return _follow(client, job)


def _start(client: Any, words: Sequence[str]) -> str:
    """Submit a job that works from a copy of the upload; its id."""
    upload = Path(os.environ.get("M2F_UPLOAD") or "~/m2f-upload").expanduser()
    if not (upload / "dvc.yaml").is_file():
        raise ValueError(f"{upload} holds no project (no dvc.yaml); bring it with: ray rsync-up cluster.yaml")
    job: str = client.submit_job(
        entrypoint=shlex.join(["python", "pipeline/submit.py", "repro", *words]),
        submission_id=time.strftime("m2f-%Y%m%d-%H%M%S"),
        runtime_env={"working_dir": str(upload)},
    )
    return job


def attach(words: list[str]) -> int:
    """Stream a job's log until it ends."""
    client = _client()
    jobs = _jobs(client)
    if not jobs:
        raise ValueError("there is no job; start one with: repro register@<row>")
    return _follow(client, _chosen(words, jobs))


def status(words: list[str]) -> int:
    """List the jobs, newest first."""
    jobs = _jobs(_client())
    for job, details in jobs.items():
        since = time.strftime("%d %b %H:%M", time.localtime((details.start_time or 0) / 1000))
        print(f"{job}  {details.status.value.lower():9}  since {since}  {' '.join(targets_of(details.entrypoint))}")
    if not jobs:
        print("no jobs")
    return 0


def stop(words: list[str]) -> int:
    """End a job and wait until it has."""
    client = _client()
    jobs = {job: details for job, details in _jobs(client).items() if not details.status.is_terminal()}
    if not jobs:
        raise ValueError("no job runs")
    if not words and len(jobs) > 1:
        raise ValueError(f"several jobs run; name one: stop {' | '.join(jobs)}")
    job = _chosen(words, jobs)
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.5)
    print(f"{job} {client.get_job_status(job).value.lower()}")
    return 0


def _chosen(words: list[str], jobs: Mapping[str, Any]) -> str:
    """The job that is named, or the newest that runs, or the newest."""
    if words:
        if words[0] not in jobs:
            raise ValueError(f"there is no job {words[0]}; there are {', '.join(jobs)}")
        return words[0]
    return next((job for job, details in jobs.items() if not details.status.is_terminal()), next(iter(jobs)))


def _client() -> Any:
    import logging

    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(JOB_SERVER)
    except ConnectionError as error:
        raise ValueError(
            f"no job server answers at {JOB_SERVER} ({str(error).splitlines()[0]}); this runs on the head, "
            f"through: ray submit cluster.yaml pipeline/submit.py -- ..."
        ) from None


def _jobs(client: Any) -> dict[str, Any]:
    """Our jobs by id, newest first."""
    ours = [d for d in client.list_jobs() if d.submission_id and targets_of(d.entrypoint)]
    return {d.submission_id: d for d in sorted(ours, key=lambda d: -(d.start_time or 0))}


def _running(client: Any) -> dict[str, list[str]]:
    """Targets of the jobs that have not ended."""
    return {job: targets_of(d.entrypoint) for job, d in _jobs(client).items() if not d.status.is_terminal()}


def _follow(client: Any, job: str) -> int:
    """Print a job's log until the job ends; its exit code. Ctrl-C leaves the job running."""
    printed = 0
    silent_since: float | None = None

    async def stream() -> None:
        nonlocal printed, silent_since
        position = 0
        async for lines in client.tail_job_logs(job):
            silent_since = None
            position += len(lines)
            if position > printed:  # after a lost connection the log comes from its beginning
                print(lines[len(lines) - (position - printed) :], end="", flush=True)
                printed = position

    from aiohttp import ClientError

    try:
        while True:
            try:
                asyncio.run(stream())
                details = client.get_job_info(job)
                silent_since = None
                if details.status.is_terminal():
                    break
            except (OSError, RuntimeError, ClientError) as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > _SILENCE_S:
                    raise ValueError(f"the head's job server is gone ({error}); see `ray status` there") from None
            time.sleep(1)
    except KeyboardInterrupt:
        print(f"\n{job} goes on; join it again with: attach {job}")
        return 130
    if details.status.value == "SUCCEEDED":
        return 0
    reason = (details.message or "").partition("Last available logs")[0].strip()
    print(f"{job} {details.status.value.lower()}{': ' + reason if reason else ''}", file=sys.stderr)
    return int(details.driver_exit_code or 1)


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Between looking for a job and starting one, nobody else does."""
    with open(Path("~/.m2f-submit.lock").expanduser(), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Inside a job


def drive(words: list[str]) -> int:
    """The job itself. Its working folder is a copy of the upload, which Ray made when the job was submitted."""
    here = Path(__file__).resolve().parent
    sys.path[0] = str(here.parent)  # not pipeline/, whose modules have names that others use too
    targets, settings = parse_targets(words)
    os.environ.update(settings)
    from pipeline.cluster.job import drive as run_job

    client = _client()
    me = json.loads(os.environ[_INSIDE])["metadata"].get("job_submission_id")
    running = list(_running(client).items())  # newest first: those before this one
    others = dict(running[[job for job, _ in running].index(me) + 1 :])
    workspace = Path(os.environ.get("M2F_WORKSPACE") or "~/m2f").expanduser()
    return run_job(targets, upload=here.parent, workspace=workspace, others=others)


# Inside a job of Slurm


def slurm(words: list[str]) -> int:
    """What deploy/slurm/row.sbatch calls."""
    targets, settings = parse_targets(words)
    os.environ.update(settings)
    from pipeline.cluster.slurm import run_job

    return run_job(targets)


def parse_targets(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Targets, and settings for this job (M2F_WORKERS=2). ValueError when there is no target."""
    settings = {match[1]: match[2] for word in words if (match := _SETTING.fullmatch(word))}
    targets = [word for word in words if not _SETTING.fullmatch(word)]
    for word in targets:
        if word.startswith("-") or "=" in word:
            raise ValueError(f"{word} is neither a target like register@ade20k_swin-s nor a setting like M2F_WORKERS=2")
    if not all(word.strip() for word in targets or [""]):
        raise ValueError("name what to make: repro register@ade20k_swin-s")
    return targets, settings


def targets_of(entrypoint: str | None) -> list[str]:
    """The targets in a job's command; empty for a job that is none of ours."""
    words = shlex.split(entrypoint or "")
    for i, word in enumerate(words):
        if word.endswith("submit.py") and words[i + 1 : i + 2] == ["repro"]:
            return [word for word in words[i + 2 :] if not _SETTING.fullmatch(word)]
    return []


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: what Ray's job server refuses
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
