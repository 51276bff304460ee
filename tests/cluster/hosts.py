"""Several hosts on one machine: a laptop, a head and two workers, each with its own network, processes and home folder.

A host is a network, mount, process and host-name namespace whose first process is sshd. It sees the machine's file
system, but has its own /tmp (in memory, with the home folder in it), /run and /dev/shm. All hosts hang on one bridge,
which lies in a namespace of its own: the machine itself gets no address, no route and no open port.

    lab = Hosts(Path("/tmp/m2f-lab"))
    with lab:
        lab.on("laptop", "ssh 10.77.0.10 hostname")   # as a login shell there
        lab.cut("worker1"); lab.heal("worker1")       # its cable
        lab.kill("worker1", "raylet")
    with lab.full(): ...                          # the folder that all of them share
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.helpers.waiting import LIMIT_S

PREFIX = "m2flab"
"""Of every network namespace and interface: what bears it and is still there when a lab starts is removed."""

SHARED_MIB = 512
"""Size of the folder that all hosts share, a file system of its own, in memory."""

ADDRESSES = {"laptop": "10.77.0.1", "head": "10.77.0.10", "worker1": "10.77.0.11", "worker2": "10.77.0.12"}

# The first process of a host. $1: host name, $2: the lab's folder, $3: the project's environment.
_BOOT = r"""
set -eu
host=$1 lab=$2 environment=$3
hostname "$host"
mount -t tmpfs -o size=3g,mode=1777 tmpfs /mnt
mkdir -p "/mnt/${lab#/tmp/}" /mnt/home/.ssh /mnt/home/m2f-environment
mount --rbind "$lab" "/mnt/${lab#/tmp/}"
case $environment in /tmp/*)
  mkdir -p "/mnt/${environment#/tmp/}"; mount --bind "$environment" "/mnt/${environment#/tmp/}" ;;
esac
mount --move /mnt /tmp
mount -t tmpfs tmpfs /run; mkdir -p /run/sshd
mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm
for file in passwd hosts; do mount --bind "$lab/$file" "/etc/$file"; done

# The environment that cluster.onprem.yaml makes from requirements.lock is already there.
ln -s "$environment/bin" "$environment/lib" "$environment/pyvenv.cfg" /tmp/home/m2f-environment/
cp "$lab/requirements.lock" /tmp/home/m2f-environment/installed.lock
if [ "$host" = laptop ]; then
  echo 'export PATH=~/m2f-environment/bin:$PATH' > /tmp/home/.bashrc
  cp "$lab/key/id" /tmp/home/.ssh/id; chmod 600 /tmp/home/.ssh/id
fi
echo '. ~/.bashrc' > /tmp/home/.bash_profile; touch /tmp/home/.bashrc
exec env -i /usr/sbin/sshd -D -e -f "$lab/sshd_config"
"""


def why_not() -> str:
    """Why there can be no hosts here; empty: there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts in namespaces need Linux and root"
    tools = {"sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "ip": "iproute2"}
    tools |= {"unshare": "util-linux", "nsenter": "util-linux"}
    missing = sorted({package for tool, package in tools.items() if _tool(tool) is None})
    if missing:
        return f"hosts in namespaces need {', '.join(missing)}"
    probe = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        return "hosts in namespaces need CAP_SYS_ADMIN, which this container lacks"
    return ""


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin")


def _ip(*arguments: str, check: bool = True) -> str:
    answer = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and answer.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {answer.stderr.strip()}")
    return answer.stdout


class Hosts:
    """The lab; one at a time on a machine. `folder` must lie below /tmp: every host sees it, nothing else of /tmp."""

    def __init__(self, folder: Path) -> None:
        assert folder.is_relative_to("/tmp"), folder
        self.folder = folder
        self.shared = folder / "shared"
        self._init: dict[str, int] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        self._lock = open(f"/tmp/{PREFIX}.lock", "w")  # noqa: SIM115 - held as long as the lab

    # Life

    def __enter__(self) -> Hosts:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another lab runs on this machine (/tmp/{PREFIX}.lock is held)") from None
        self.stop()  # what a killed test run left
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        self._write_files()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SHARED_MIB}m", "tmpfs", self.shared], check=True)
        _ip("netns", "add", f"{PREFIX}-switch")
        _ip("-n", f"{PREFIX}-switch", "link", "add", "bridge", "type", "bridge")
        _ip("-n", f"{PREFIX}-switch", "link", "set", "bridge", "up")
        for host in ADDRESSES:
            self._boot(host)
        for host, address in ADDRESSES.items():
            self._wait_for_sshd(host, address)

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._lock.close()

    def _write_files(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "key").mkdir(parents=True)
        self.shared.mkdir()
        for name in ("id", "host"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "key" / name], check=True
            )
        (self.folder / "sshd_config").write_text(
            f"Port 22\nHostKey {self.folder}/key/host\nAuthorizedKeysFile {self.folder}/key/id.pub\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
            "StrictModes no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
        )
        (self.folder / "passwd").write_text(
            "root:x:0:0:root:/tmp/home:/bin/bash\nsshd:x:100:65534::/run/sshd:/bin/false\n"
        )
        names = "".join(f"{address} {host}\n" for host, address in ADDRESSES.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        project = Path(__file__).resolve().parents[2]
        shutil.copy(project / "requirements.lock", self.folder / "requirements.lock")

    def _boot(self, host: str) -> None:
        space = f"{PREFIX}-{host}"
        _ip("netns", "add", space)
        _ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", space, "netns", f"{PREFIX}-switch")
        _ip("-n", f"{PREFIX}-switch", "link", "set", space, "master", "bridge", "up")
        _ip("-n", space, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "link", "set", "eth0", "up")
        command = ["ip", "netns", "exec", space, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child"]
        command += ["--mount-proc", "bash", "-c", _BOOT, "boot", host, str(self.folder), sys.prefix]
        with open(self.folder / f"{host}.log", "wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._started.append(process)

    def _wait_for_sshd(self, host: str, address: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        probe = ["ip", "netns", "exec", f"{PREFIX}-{host}", "bash", "-c", f"exec 3<>/dev/tcp/{address}/22"]
        while subprocess.run(probe, capture_output=True).returncode != 0:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{host} does not answer: {(self.folder / f'{host}.log').read_text()[-500:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End every process of every host, and remove its network; what is in the lab's folder stays."""
        spaces = [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]
        for space in spaces:  # with the first process of a host all others end
            for pid in _ip("netns", "pids", space, check=False).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for process in self._started:
            process.wait(timeout=10)
        self._started.clear()
        self._init.clear()
        for space in spaces:
            _ip("netns", "delete", space, check=False)
        if self.shared.is_mount():
            subprocess.run(["umount", "--lazy", self.shared], check=True)

    # What a test does

    def on(self, host: str, command: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in a login shell of a host; its output is in `stdout`, errors included."""
        answer = subprocess.run(
            self._enter(host, command), capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL
        )
        answer.stdout += answer.stderr
        assert not check or answer.returncode == 0, f"{host}: {command}: {answer.returncode}\n{answer.stdout}"
        return answer

    def start(self, host: str, command: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command in a login shell of a host; its output goes to `log`."""
        with open(log, "wb") as file:
            return subprocess.Popen(
                self._enter(host, command), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def _enter(self, host: str, command: str) -> list[str]:
        pid = str(self._first(host))
        spaces = ["nsenter", "--target", pid, "--mount", "--uts", "--net", "--pid", "--wdns=/tmp/home"]
        variables = ["env", "-i", "HOME=/tmp/home", "TERM=dumb", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"]
        return [*spaces, *variables, "bash", "--login", "-c", command]

    def _first(self, host: str) -> int:
        """The machine's id of a host's first process."""
        if host not in self._init:
            for pid in _ip("netns", "pids", f"{PREFIX}-{host}").split():
                if _status(int(pid)).get("NSpid", "").split()[-1:] == ["1"]:
                    self._init[host] = int(pid)
        return self._init[host]

    def home(self, host: str) -> Path:
        """A host's home folder, from outside."""
        return Path(f"/proc/{self._first(host)}") / "root" / "tmp/home"

    def pids(self, host: str, name: str) -> list[int]:
        """The machine's ids of a host's processes whose name or command line holds `name`."""
        found = []
        for pid in _ip("netns", "pids", f"{PREFIX}-{host}").split():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if name in words or name == _status(int(pid)).get("Name"):
                    found.append(int(pid))
        return found

    def all_pids(self, host: str) -> list[int]:
        """The machine's ids of all of a host's processes but the first, and what holds that."""
        pids = (int(pid) for pid in _ip("netns", "pids", f"{PREFIX}-{host}").split())
        own = {pid: _status(pid).get("NSpid", "").split()[1:] for pid in pids}  # in the host's own numbers
        return [pid for pid, numbers in own.items() if numbers and numbers[-1] != "1"]

    def kill(self, host: str, name: str, sig: int = signal.SIGKILL) -> int:
        """Signal a host's processes of a name; how many there were."""
        pids = self.pids(host, name)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)
        return len(pids)

    def cut(self, host: str) -> None:
        """Pull a host's network cable."""
        _ip("-n", f"{PREFIX}-switch", "link", "set", f"{PREFIX}-{host}", "down")

    def heal(self, host: str) -> None:
        """Plug it in again."""
        _ip("-n", f"{PREFIX}-switch", "link", "set", f"{PREFIX}-{host}", "up")

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """While the block runs, the folder that all hosts share has no byte left, but what is deleted there."""
        ballast = self.shared / "ballast"
        try:
            with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):  # no space left on device
                while True:
                    file.write(bytes(2**20))
            assert shutil.disk_usage(self.shared).free == 0
            yield
        finally:
            ballast.unlink()


def _status(pid: int) -> Mapping[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
