"""The Dockerfile's steps, read as Docker reads them and run in a Debian root of its own, where there is no Docker.

What the project's Dockerfile uses is known here, and no more: FROM debian:<suite>-slim, RUN, COPY --chown, ENV, ARG,
USER, WORKDIR and CMD in its JSON form.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import string
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.helpers.shared import PROJECT

CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
"""Of this machine: a proxy may stand between it and the package index, of which the image is to know nothing."""


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, its arguments), with continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def in_context(path: str, rules: list[str]) -> bool:
    """Whether a path relative to the project goes to Docker: the last rule of .dockerignore that fits it, or a folder
    that it is in, decides."""
    parts = path.split("/")
    heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    taken = True
    for rule in rules:
        pattern = rule.removeprefix("!")
        as_regex = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(as_regex, head) for head in heads):
            taken = rule.startswith("!")
    return taken


def context(project: Path = PROJECT) -> Iterator[str]:
    """The files that go to Docker."""
    lines = (project / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    for folder, folders, files in os.walk(project):
        place = Path(folder).relative_to(project)
        folders[:] = [name for name in folders if name not in (".git", ".venv")]
        for name in files:
            if in_context(path := (place / name).as_posix(), rules):
                yield path


class Image:
    """A root file system in which the steps of a Dockerfile are run, with what they set."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.user, self.folder = "root", "/"
        self.command: list[str] = []

    def build(self, dockerfile: str) -> None:
        """Run every step."""
        for word, rest in instructions(dockerfile):
            print(word, rest, flush=True)
            if word == "FROM":
                suite = re.fullmatch(r"debian:(\w+)-slim", rest)
                assert suite, rest
                subprocess.run(["debootstrap", "--variant=minbase", suite[1], self.root], check=True)
            elif word == "RUN":
                answer = self.run(["/bin/sh", "-c", rest])
                assert answer.returncode == 0, f"{rest}\n{answer.stdout[-5000:]}"
            elif word == "COPY":
                self._copy(rest.split())
            elif word == "ENV":
                before = dict(self.environment)
                for name, value in re.findall(r"(\w+)=(\S*)", rest):
                    self.environment[name] = string.Template(value).substitute(before)
            elif word == "ARG":
                name, _, value = rest.partition("=")
                self.environment.setdefault(name, value)
            elif word == "USER":
                self.user = rest
            elif word == "WORKDIR":
                self.folder = rest
                (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif word == "CMD":
                self.command = json.loads(rest)
            else:
                raise AssertionError(f"{word} is not known here")

    def _copy(self, words: list[str]) -> None:
        owner = next(
            (word.partition("=")[2].partition(":")[0] for word in words if word.startswith("--chown=")), "root"
        )
        *sources, target = [word for word in words if not word.startswith("--")]
        identity = self._account(owner)
        place = self.root / self.folder.lstrip("/") / target
        for path in context():
            if any(source in (".", path) or path.startswith(f"{source}/") for source in sources):
                copy = place / path
                for folder in reversed(copy.relative_to(place).parents[:-1]):
                    (place / folder).mkdir(exist_ok=True)
                    os.chown(place / folder, *identity[:2])
                shutil.copy2(PROJECT / path, copy)
                os.chown(copy, *identity[:2])

    def _account(self, name: str) -> tuple[int, int, str]:
        """Number of a user and its group, and its home folder."""
        for line in (self.root / "etc/passwd").read_text().splitlines():
            fields = line.split(":")
            if fields[0] == name:
                return int(fields[2]), int(fields[3]), fields[5]
        raise AssertionError(f"the image has no user {name}")

    def run(
        self, words: list[str], settings: Mapping[str, str] | None = None, timeout_s: float = 1800
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a container would: with the image's user, folder and environment."""
        user, group, home = self._account(self.user)
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT") if CERTIFICATES.exists() else ()
        variables = {"HOME": home, **self.environment, **dict.fromkeys(names, "/run/certificates"), **(settings or {})}
        script = (
            'set -e; root=$1; mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"; '
            'mount -t tmpfs tmpfs "$root/run"; if [ -e "$2" ]; then cp "$2" "$root/run/certificates"; fi; '
            'touch "$root/etc/resolv.conf"; mount --bind /etc/resolv.conf "$root/etc/resolv.conf"; shift 2; exec "$@"'
        )
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script, "enter"]
        enter += [str(self.root), str(CERTIFICATES), "chroot", f"--userspec={user}:{group}", str(self.root)]
        inside = ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in variables.items())]
        inside += ["/bin/sh", "-c", f'cd {self.folder}; exec "$@"', "sh", *words]
        return subprocess.run(
            [*enter, *inside],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
