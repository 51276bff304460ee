"""A real Slurm on the hosts of the lab: its controller on the head, a node on each worker, with two cores each.

slurm = Slurm(lab)
with slurm:
    job = slurm.submit("--nodes=2", "evaluate@faults")
    slurm.state(job)
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time

from tests.cluster.hosts import ADDRESSES, Hosts
from tests.cluster.small_project import write_project
from tests.helpers.waiting import LIMIT_S, until

NODES = ("worker1", "worker2")

_CONF = (
    f"""
ClusterName=lab
SlurmctldHost=head({ADDRESSES["head"]})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=FOLDER/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=FOLDER/slurmctld.log
SlurmdLogFile=FOLDER/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=15
KillWait=30
MinJobAge=3600
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
    + "".join(f"NodeName={node} NodeAddr={ADDRESSES[node]} CPUs=2 RealMemory=8000 Gres=gpu:2\n" for node in NODES)
    + """
PartitionName=normal Nodes=worker[1-2] Default=YES PriorityTier=1
PartitionName=urgent Nodes=worker[1-2] PriorityTier=10
"""
)


def why_not() -> str:
    """Why there can be no Slurm here; empty: there can."""
    tools = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"
    missing = sorted(package for tool, package in tools.items() if shutil.which(tool, path=path) is None)
    return f"needs a Slurm: Debian's {', '.join(missing)}" if missing else ""


class Slurm:
    """Slurm on the lab's hosts, and a copy of the project that all of them see."""

    def __init__(self, lab: Hosts) -> None:
        self.lab = lab
        self.folder = lab.folder / "slurm"
        self.project = self.folder / "project"
        self._daemons: dict[str, list[subprocess.Popen[bytes]]] = {}

    def __enter__(self) -> Slurm:
        self.folder.mkdir()
        write_project(self.project)
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(_CONF.replace("FOLDER", str(self.folder)))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nIgnoreSystemd=yes\n")
        # devices that stand for GPUs: Slurm counts them, and nobody uses them
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        try:
            self.start("head", "slurmctld -D")
            for node in NODES:
                self.start_node(node)
            until(lambda: self.ask("sinfo -h -p normal -t idle -o %D").strip() == "2", said=self.logs)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self.start(node, f"slurmd -D -N {node}")

    def start(self, host: str, daemon: str) -> None:
        """Start munge and one of Slurm's daemons on a host."""
        munged = f"munged --force --foreground --key-file={self.folder}/munge.key --socket=/run/munge/socket"
        munged += " --pid-file=/run/munge/pid --log-file=/run/munge/log --seed-file=/run/munge/seed"
        command = f"mkdir -p /run/munge /run/slurmd; chmod 755 /run/munge; {munged} & {self._conf()} {daemon}"
        self._daemons.setdefault(host, []).append(self.lab.start(host, command, self.folder / f"{host}-daemons.log"))

    def lose(self, node: str) -> None:
        """Kill everything on a node but its sshd."""
        for pid in self.lab.all_pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons.pop(node):
            daemon.wait(LIMIT_S)

    def stop(self) -> None:
        """End all daemons and jobs."""
        for host, daemons in self._daemons.items():
            for name in ("slurmctld", "slurmd", "slurmstepd", "munged"):
                self.lab.kill(host, name)
            for daemon in daemons:
                daemon.wait(LIMIT_S)

    def _conf(self) -> str:
        return f"export SLURM_CONF={self.folder}/slurm.conf;"

    def ask(self, command: str, *, host: str = "head") -> str:
        """What one of Slurm's commands prints."""
        return self.lab.on(host, f"{self._conf()} {command}", check=False).stdout

    def submit(self, options: str, targets: str) -> str:
        """`sbatch` of the project's script on these hosts, which have no GPUs; the job's number."""
        # a cluster that was here before has left its settings in the shell
        call = f"unset ${{!M2F_@}}; cd {self.project} && export PATH=~/m2f-environment/bin:$PATH"
        call += " && sbatch --parsable --gres=none"
        said = self.ask(f"{call} {options} deploy/slurm/row.sbatch {targets}")
        assert re.fullmatch(r"\d+\n", said), said
        return said.strip()

    def state(self, job: str) -> str:
        """What Slurm calls the state of a job."""
        found = re.search(r"JobState=(\w+)", self.ask(f"scontrol show --oneliner job {job}"))
        return found[1] if found else ""

    def log(self, job: str) -> str:
        """What a job has said so far."""
        path = self.project / f"slurm-{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def ends(self, job: str) -> str:
        """Wait for the end of a job; its state."""
        going = ("", "PENDING", "RUNNING", "COMPLETING", "REQUEUED")
        begun_s = time.monotonic()
        while (state := self.state(job)) in going:
            assert time.monotonic() - begun_s < LIMIT_S, f"{state}\n{self.log(job)}\n{self.logs()}"
            time.sleep(0.5)
        return state

    def logs(self) -> str:
        """What the daemons have to say."""
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in sorted(self.folder.glob("*.log")))
