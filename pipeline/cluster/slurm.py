"""Rows in a job of Slurm: a Ray cluster on the nodes of its allocation, for as long as it runs. deploy/slurm/row.sbatch
calls it.

The job's first process (`run_job`) starts Ray on each node as a step of the job, and the rows in a process of their own
(`work`). Slurm signals to it that the time is over soon, or that another job takes the nodes. Then it ends the
rows and puts the job into the queue again, where it goes on from its checkpoints.

Jobs share the project's folder, and a project has one dvc.lock. So each job works in a copy of the project, made when
it starts first: code that is changed meanwhile does not touch it. Results go home when shared stages and the job end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.cluster.stages import say

JOBS = Path(".dvc/tmp/slurm")
"""In the project: a folder for each job that runs or is to go on, and the locks between jobs. Git, DVC and `take_code`
leave it out."""
MOST_REQUEUES = 20
"""How often a job puts itself into the queue again, so that one that never reaches a checkpoint ends."""
START_WAIT_S = 120.0
"""How long Ray may take to start on the first node."""
END_WAIT_S = {signal.SIGUSR1: 60.0, signal.SIGTERM: 8.0}
"""How long the rows may take to end: a job that Slurm ends has 30 seconds for everything by default."""
STEP_WAIT_S = 10.0
"""How long Ray may take to end on all nodes, and removing its files after it."""
SIGNAL_WAIT_S = 5.0
"""What Slurm tells a job's other processes has reached the first one after this long."""
AGAIN_S = 5.0
"""After a node's Ray has ended, it is started again so much later; each time twice as long, up to MOST_AGAIN_S."""
MOST_AGAIN_S = 300.0
LEAST_TIME_S = 300
"""The shortest time limit of a job: it is told to stop 180 seconds before its end, and Slurm may do so 60 s early."""
ENDED = (
    *(None, "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"),
    "PREEMPTED",
)
"""States of a job that will not go on; None: Slurm has forgotten it."""
OBJECT_STORE_BYTES = 500 * 2**20
"""Of Ray on each node: images do not go through it."""

_SRUN = ("srun", "--overlap", "--cpu-bind=none", "--export=ALL")
"""The environment is to reach a step also where sbatch was called with --export=NONE."""
_NODE = """
umask 077
ulimit -n "$(ulimit -Hn)"
trap 'ended=1; kill -TERM $ray 2>/dev/null' TERM
rm -rf "$RAY_TMPDIR" && mkdir -p "$RAY_TMPDIR" || exit
gpus=$SLURM_GPUS_ON_NODE
if [ -z "$gpus" ] && scontrol show node "$SLURMD_NODENAME" | grep -qi 'Gres=.*gpu'; then gpus=0; fi
if [ -z "$ended" ]; then "$@" --num-cpus="$SLURM_CPUS_ON_NODE" ${gpus:+--num-gpus=$gpus} & ray=$!; fi
if [ -n "$ended" ]; then kill -TERM $ray 2>/dev/null; fi
while kill -0 $ray 2>/dev/null; do wait $ray; code=$?; done
rm -rf "$RAY_TMPDIR"
exit ${code:-143}
"""
"""What a step runs on its node, with Ray's command as its words. Cores and GPUs are those that Slurm gave the job;
where Slurm does not count GPUs, Ray does."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What Slurm says of a job, in the environment of its first process."""

    job: str
    """Its number; of a task of an array, that of this task."""
    cluster: str
    """Another one, which may share the project's folder, has jobs of the same numbers."""
    nodes: tuple[str, ...]
    """This node first."""
    project: Path
    """Where sbatch was called."""
    starts: int
    """How often the job has been started before."""
    task: int | None
    """Of an array; None: there is none."""
    array: str | None = None
    """The array's number, which is also that of its last task."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Allocation:
        """ValueError outside a job, where sbatch was not called in the project, and for a job of another form."""
        if "SLURM_JOB_ID" not in environment:
            raise ValueError("this is no job of Slurm; call: sbatch deploy/slurm/row.sbatch evaluate@<row>")
        project = Path(environment.get("SLURM_SUBMIT_DIR", "."))
        if not (project / "dvc.yaml").is_file():
            raise ValueError(f"{project} is not the project (no dvc.yaml); call sbatch where dvc.yaml lies")
        if "SLURMD_NODENAME" not in environment:
            raise ValueError(f"job {environment['SLURM_JOB_ID']} has other nodes than this one (salloc?); call sbatch")
        if "SLURM_HET_SIZE" in environment:
            raise ValueError("a heterogeneous job (sbatch ... : ...) cannot hold a Ray cluster; ask for equal nodes")
        names = _scontrol("show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()
        if "SLURM_GPUS" in environment and len(names) > 1:
            raise ValueError(
                f"--gpus={environment['SLURM_GPUS']} leaves open how many GPUs each of {len(names)} nodes has; "
                "call sbatch with --gpus-per-node or --gres=gpu:8 instead"
            )
        here = environment["SLURMD_NODENAME"]
        task = environment.get("SLURM_ARRAY_TASK_ID")
        return cls(
            job=environment["SLURM_JOB_ID"],
            cluster=environment.get("SLURM_CLUSTER_NAME") or "slurm",
            nodes=(here, *(name for name in names if name != here)),
            project=project,
            starts=int(environment.get("SLURM_RESTART_COUNT") or 0),
            task=None if task is None else int(task),
            array=environment.get("SLURM_ARRAY_JOB_ID"),
        )

    @property
    def workspace(self) -> Path:
        """The job's copy of the project."""
        return self.project / JOBS / f"{self.cluster}-{self.job}"

    @property
    def name(self) -> str:
        """What scontrol calls this job; by its number alone, the last task of an array would be the whole array."""
        return self.job if self.task is None else f"{self.array}_{self.task}"

    def targets(self, named: Sequence[str]) -> list[str]:
        """Those of this job: of an array's task, the one at its place. ValueError if there is none."""
        if self.task is None:
            return [*named]
        if self.task >= len(named):
            raise ValueError(
                f"task {self.task} of the array has no target, for {len(named)} are named; "
                f"call sbatch --array=0-{len(named) - 1}"
            )
        return [named[self.task]]

    def address(self) -> str:
        """Of this node, as the others reach it; with no others it needs none."""
        for name in self.nodes[1:]:
            shown = _scontrol("show", "--oneliner", "node", name).split()
            there = next((word.partition("=")[2] for word in shown if word.startswith("NodeAddr=")), name)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
                asked.connect((there, 9))  # sends nothing, but chooses the way
                return str(asked.getsockname()[0])
        return "127.0.0.1"


def run_job(named: Sequence[str]) -> int:
    """Make the job's workspace and its Ray cluster, run the rows, bring the results home. The exit code."""
    from pipeline.cluster.job import planned

    received: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    allocation = Allocation.of(os.environ)
    targets = allocation.targets(named)
    _check_time(allocation)
    _remove_ended(allocation)
    _take_project(allocation)
    say(f"job {allocation.job} on {' '.join(allocation.nodes)}: {' '.join(targets)}")
    goes_on = False
    try:
        planned(targets, allocation.workspace)  # says what is wrong with them before Ray starts
        code = _run_rows(allocation, targets, received)
        if code is None:
            goes_on = _goes_on(allocation, received[0])
            code = 128 + received[0]
    finally:
        if not goes_on:
            _close(allocation.workspace, allocation.project)
    return code  # it does not count for a job that is in the queue again


def _run_rows(allocation: Allocation, targets: Sequence[str], received: Sequence[int]) -> int | None:
    """The rows' exit code; None if a signal was received before they ended."""
    environment = settings(allocation, os.environ)
    _check_storage(allocation, environment["M2F_STORAGE"])
    with RayNodes(allocation, environment, received) as ray:
        if received:
            return None
        command = [sys.executable, "-m", "pipeline.cluster.slurm", str(len(allocation.nodes)), *targets]
        rows = subprocess.Popen(
            command,
            cwd=allocation.workspace,
            env={**environment, "RAY_ADDRESS": ray.address},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while (code := rows.poll()) is None and not received and (lost := ray.look()) is None:
                time.sleep(0.5)
                if not allocation.workspace.is_dir():
                    lost = f"{allocation.workspace}, in which the job works, is gone; submit the same again"
                    break
            if code != 0:
                _hears(received)  # Slurm may be what has ended the rows, or Ray
        finally:
            _end(rows, END_WAIT_S[signal.Signals(received[0]) if received else signal.SIGTERM])
    if code != 0 and received:
        return None
    if code is None:
        raise ValueError(lost)
    return code


def _check_storage(allocation: Allocation, storage: str) -> None:
    """ValueError for a storage root that cannot be written, or that is not the same folder on all nodes."""
    if "://" in storage:
        return
    probe = Path(storage) / f".slurm-{allocation.job}-{allocation.starts}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise ValueError(f"the storage root cannot be written ({error}); set M2F_STORAGE to another") from None
    try:
        for node in allocation.nodes[1:]:
            step = [*_SRUN, "--nodes=1", "--ntasks=1", f"--nodelist={node}", "test", "-e", str(probe)]
            if subprocess.run(step, stdin=subprocess.DEVNULL, capture_output=True).returncode == 1:
                raise ValueError(
                    f"the storage root {storage} of {allocation.nodes[0]} is another folder on {node}, or none; "
                    "set M2F_STORAGE to one that all nodes see, or to a bucket"
                )
    finally:
        probe.unlink(missing_ok=True)


def _hears(received: Sequence[int]) -> bool:
    """Whether Slurm has signalled, or does so soon: it may have told the job's other processes first."""
    deadline = time.monotonic() + SIGNAL_WAIT_S
    while not received and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(received)


def settings(allocation: Allocation, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of Ray and the rows: what the project has is shared, what a node has is the job's own."""
    from pipeline.provenance.environment import commit_word

    project, workspace = allocation.project, allocation.workspace
    scratch = environment.get("SLURM_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    node = f"/tmp/m2f-{os.getuid()}-{allocation.job}"  # short: the paths of sockets end at 107 characters
    storage = environment.get("M2F_STORAGE") or "storage"
    found = {
        "M2F_STORAGE": storage if "://" in storage else str((project / Path(storage).expanduser()).absolute()),
        "MLFLOW_TRACKING_URI": environment.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project.absolute()}/mlflow.db",
        "M2F_SHARD_CACHE": environment.get("M2F_SHARD_CACHE")
        or (f"{node}/shards" if scratch == "/tmp" else f"{scratch}/m2f-shards"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(workspace / "auth_token"),
        "RAY_TMPDIR": node,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # 30 by default: all that Slurm gives a job for its end
        "DVC_SITE_CACHE_DIR": f"{node}/dvc",
        "PATH": f"{Path(sys.executable).parent}:{environment.get('PATH', '')}",
    }
    if "M2F_GIT_COMMIT" not in environment and (commit := commit_word()):
        found["M2F_GIT_COMMIT"] = commit
    return {**environment, **found}


def _take_project(allocation: Allocation) -> None:
    """Copy the project, or take up what an earlier start of the job has left."""
    from pipeline.cluster.workspace import add_missing_results, take_code, without_git

    workspace, project = allocation.workspace, allocation.project
    token = workspace / "auth_token"
    if token.exists():  # made last
        say(f"start {allocation.starts + 1} of job {allocation.job}: going on in {workspace}")
        for name in ("lock", "rwlock", "rwlock.lock"):  # of processes on nodes that the job had before
            (workspace / ".dvc/tmp" / name).unlink(missing_ok=True)
        return
    take_code(project, workspace)
    without_git(workspace)
    add_missing_results(project, workspace)
    if (project / "data").exists() and not (workspace / "data").exists():
        (workspace / "data").symlink_to((project / "data").absolute())
    with open(os.open(token, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))


class RayNodes:
    """Ray on the nodes of an allocation, each as a step of the job; a block in which it runs."""

    def __init__(self, allocation: Allocation, environment: Mapping[str, str], received: Sequence[int]) -> None:
        """received: signals of Slurm, after which nothing more is started."""
        self._received = received
        self._nodes, self._folder = allocation.nodes, allocation.workspace / "ray"
        self._folder.mkdir(exist_ok=True)
        self._environment = dict(environment)
        self._steps: dict[str, subprocess.Popen[bytes]] = {}
        self._again_s: dict[str, float] = {}
        self._pause_s: dict[str, float] = {}
        self._host = allocation.address()
        self.address = ""

    def __enter__(self) -> RayNodes:
        try:
            self._start_head()
            for node in self._nodes[1:] if not self._received else ():
                self._start(node, f"--address={self.address}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for step in self._steps.values():
            step.terminate()
        deadline = time.monotonic() + STEP_WAIT_S
        for step in self._steps.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                step.wait(max(0.1, deadline - time.monotonic()))
            step.kill()
        # where srun's end was Ray's before it could tidy up
        every = [f"--nodes={len(self._nodes)}", f"--ntasks={len(self._nodes)}", "--ntasks-per-node=1"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*_SRUN, *every, "rm", "-rf", self._environment["RAY_TMPDIR"]],
                capture_output=True,
                timeout=STEP_WAIT_S,
            )

    def look(self) -> str | None:
        """Start Ray again on a node where it has ended. A sentence if that was the first: the cluster has ended."""
        for node, step in list(self._steps.items()):
            if step.poll() is None:
                continue
            if node == self._nodes[0]:
                return (
                    f"Ray has ended on {node}, the first node (exit code {step.returncode}: {self._said(node)}); "
                    "submit the same again, it goes on from the last checkpoints"
                )
            if node not in self._again_s:
                pause_s = self._pause_s.get(node, AGAIN_S)
                self._pause_s[node] = min(2 * pause_s, MOST_AGAIN_S)
                self._again_s[node] = time.monotonic() + pause_s
                say(
                    f"Ray has ended on {node} (exit code {step.returncode}: {self._said(node)}); "
                    f"starting it again in {pause_s:.0f} s"
                )
            elif time.monotonic() > self._again_s[node]:
                del self._again_s[node]
                self._start(node, f"--address={self.address}")
        return None

    def _start_head(self) -> None:
        """On ports that are free now. Another job of the node may take one before Ray does: then on others."""
        head = self._nodes[0]
        for _ in range(3):
            gcs, client = _free_ports(2)
            self.address = f"{self._host}:{gcs}"
            self._start(
                head,
                *("--head", f"--port={gcs}", f"--ray-client-server-port={client}", f"--node-ip-address={self._host}"),
                "--include-dashboard=false",
            )
            deadline = time.monotonic() + START_WAIT_S
            while self._steps[head].poll() is None and time.monotonic() < deadline and not self._received:
                if "Ray runtime started" in self._log(head).read_text(encoding="utf-8", errors="replace"):
                    return
                time.sleep(0.2)
            if _hears(self._received):
                return
            self._steps[head].kill()
            self._steps[head].wait()
        raise ValueError(f"Ray does not start on {head}: {self._said(head)}")

    def _start(self, node: str, *words: str) -> None:
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        ray += [f"--temp-dir={self._environment['RAY_TMPDIR']}", "--dashboard-agent-listen-port=0"]
        ray += [f"--object-store-memory={OBJECT_STORE_BYTES}", *words]
        step = [*_SRUN, "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--input=none"]
        with open(self._log(node), "wb") as log:
            self._steps[node] = subprocess.Popen(
                [*step, "bash", "-c", _NODE, "node", *ray],
                env={**self._environment, **_RAY_SETTINGS},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _log(self, node: str) -> Path:
        return self._folder / f"{node}.log"

    def _said(self, node: str) -> str:
        """The last words of a node's Ray."""
        lines = self._log(node).read_text(encoding="utf-8", errors="replace").splitlines()
        return " ".join(" ".join(line for line in lines if " INFO " not in line).split()[-60:])


_RAY_SETTINGS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_task_events_max_num_task_in_gcs": "2000",
}
"""As in cluster.yaml, which says why."""


def _goes_on(allocation: Allocation, number: int) -> bool:
    """After a signal: put the job into the queue again, unless it was cancelled. Whether it will go on."""
    why = "its time is over soon" if number == signal.SIGUSR1 else "Slurm wants its nodes"
    try:
        job = _shown(allocation.name, allocation.job)
        state = job.get("JobState")
        # while its processes end, a job is COMPLETING whatever comes then; one that goes on has been counted already
        if state in ENDED or (state == "COMPLETING" and int(job["Restarts"]) <= allocation.starts):
            say("cancelled; the same again goes on from the last checkpoints")
            return False
        if state != "RUNNING":  # Slurm puts it into the queue again
            return True
        if allocation.starts >= MOST_REQUEUES:
            say(f"stopped after {allocation.starts + 1} starts, because {why}; submit the same again if it is to go on")
            return False
        _scontrol("requeue", allocation.name)
    except ValueError as error:
        say(f"stopped, because {why}; submit the same again, it goes on from the last checkpoints ({error})")
        return False
    say(f"stopped, because {why}; the job is in the queue again, and goes on from its last checkpoints")
    return True


def _shown(name: str, number: str) -> dict[str, str]:
    """What Slurm knows of a job, by the words of `scontrol show job`: nothing, if it has forgotten it.

    ValueError: Slurm does not answer, which says nothing of the job.
    """
    try:
        lines = _scontrol("show", "--oneliner", "job", name).splitlines()
    except ValueError as error:
        if "Invalid job id" in str(error) or "not found" in str(error):
            return {}
        raise
    for line in lines:  # of an array's number, one for each task
        found = {key: value for key, _, value in (word.partition("=") for word in line.split())}
        if found.get("JobId") == number:
            return found
    return {}


def _check_time(allocation: Allocation) -> None:
    """ValueError where a job would be told to stop as soon as it has begun."""
    limit = _shown(allocation.name, allocation.job).get("TimeLimit", "")
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)  # otherwise there is none
    if parts is None:
        return
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    if ((days * 24 + hours) * 60 + minutes) * 60 + seconds < LEAST_TIME_S:
        raise ValueError(
            f"the job's time limit is {limit}, and it is told to stop three minutes before; "
            "call sbatch with a longer one, as --time=04:00:00"
        )


def _remove_ended(allocation: Allocation) -> None:
    """Bring home the results of jobs that were killed for good, and remove their workspaces."""
    for workspace in (allocation.project / JOBS).glob(f"{allocation.cluster}-*/"):
        number = workspace.name.rpartition("-")[2]
        if number == allocation.job:
            continue
        try:
            state = _shown(number, number).get("JobState")
        except ValueError:  # the next job looks again
            return
        if state in ENDED:
            _close(workspace, allocation.project)


def _close(workspace: Path, project: Path) -> None:
    _bring_home(workspace, project, remove=True)


def _bring_home(workspace: Path, project: Path, *, remove: bool = False) -> None:
    """Take a workspace's results into the project. `remove`: and then remove it; another job may have done so."""
    from pipeline.cluster.workspace import add_newer_results

    with _locked(project / JOBS / "results.lock"):
        taken = add_newer_results(workspace, project) if workspace.is_dir() else []
        if remove:
            shutil.rmtree(workspace, ignore_errors=True)
    if taken:
        say(f"{len(taken)} results are in {project}: {', '.join(taken)}")


def _end(rows: subprocess.Popen[bytes], wait_s: float) -> None:
    """End the rows and all that they have started, tidily if they do so in time."""
    with contextlib.suppress(ProcessLookupError):  # there is none left
        os.killpg(rows.pid, signal.SIGTERM)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            rows.poll()
            os.killpg(rows.pid, 0)
            time.sleep(0.2)
        os.killpg(rows.pid, signal.SIGKILL)
    rows.wait()


def _scontrol(*words: str) -> str:
    answer = subprocess.run(["scontrol", *words], capture_output=True, text=True)
    if answer.returncode != 0:
        raise ValueError(f"scontrol {' '.join(words)}: {answer.stderr.strip() or answer.stdout.strip()}")
    return answer.stdout


def _free_ports(count: int) -> list[int]:
    """Ports of this node on which nobody listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _locked(path: Path, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A lock between jobs; `waits` is called once if another has it. It ends with its process, also on another node."""
    with open(path, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# The rows' own process


@contextmanager
def _shared_stages(project: Path, workspace: Path) -> Iterator[None]:
    """One job at a time makes what rows share; the next finds it."""
    from pipeline.cluster.workspace import add_missing_results

    with _locked(project / JOBS / "shared.lock", lambda: say("waiting for the shared stages of another job")):
        add_missing_results(project, workspace)
        yield
        _bring_home(workspace, project)


def work(machines: int, targets: Sequence[str]) -> int:
    """Run targets in this folder, a job's workspace, on the Ray cluster of its job. The exit code."""
    from pipeline.cluster.job import planned, run_todo, where_things_are

    workspace = Path.cwd()
    project = workspace.parents[len(JOBS.parts)]
    todo = planned(targets, workspace)
    code = run_todo(todo, workspace, machines=machines, alone=partial(_shared_stages, project, workspace))
    _bring_home(workspace, project)
    say("\n" + "\n".join(where_things_are(project, list(todo.stages.rows), home=True)))
    return code


if __name__ == "__main__":
    try:
        sys.exit(work(int(sys.argv[1]), sys.argv[2:]))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
