"""What a laptop does around Ray's own commands: check, up, run, results, down. See pipeline/submit.py."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster.config import make_token, node_groups, prices, read_cluster_file

HEAD_COMMANDS = ("repro", "attach", "status", "stop")
"""Commands of pipeline/submit.py that run on the head."""
_SUBMIT = Path(__file__).resolve().parents[1] / "submit.py"
_RAYS = 'echo "ray-$(pgrep -xc gcs_server)"'
"""On the head: says ray-1 where Ray runs, ray-0 where it does not."""


def check(words: list[str]) -> int:
    """Say what is wrong with a cluster file, and what its AWS account lacks if that can be asked."""
    from pipeline.cluster.check import account_problems, problems

    path = _cluster(words, "check")
    found = problems(path)
    if not found:
        found, known = account_problems(path)
        for sentence in known:
            print(f"{path}: {sentence}")
    for sentence in found:
        print(f"{path}: {sentence}")
    if not found:
        print(f"{path}: nothing wrong that can be known before `ray up`")
    return 1 if found else 0


def up(words: list[str]) -> int:
    """`ray up` of a checked file."""
    if check(words):
        return 1
    make_token(read_cluster_file(words[0]))
    return _ray("up", "--yes", "--no-config-cache", *words)


def check_targets(targets: Sequence[str]) -> None:
    """ValueError for a target that the project in this folder does not have."""
    import yaml

    from pipeline.cluster.job import PREFLIGHT
    from pipeline.cluster.stages import plan
    from pipeline.params.load import load_params, read_settings

    _in_project()
    params = load_params("params.yaml")
    for target in targets:
        if target.startswith(PREFLIGHT):
            params.row(target.removeprefix(PREFLIGHT))
    pipeline = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    named = [target for target in targets if not target.startswith(PREFLIGHT)]
    plan(named, pipeline, read_settings(Path("params.yaml")))


def run(words: list[str]) -> int:
    """Start the cluster if it is down, send the code, run a head's command, bring the results home."""
    from pipeline.cluster.check import problems

    path, *rest = [word for word in words if word != "--down"] or ["cluster.yaml"]
    ends = "--down" in words
    if not rest or rest[0] not in HEAD_COMMANDS:
        raise ValueError(f"say what to run: run {path} repro register@<row>, or {', '.join(HEAD_COMMANDS[1:])}")
    if ends and rest[0] not in ("repro", "attach"):
        raise ValueError(f"--down goes with repro and attach, which wait for a job; for now: down {path}")
    try:
        if rest[0] == "repro":
            if found := problems(path):
                raise ValueError(f"{path}: {'; '.join(found)}")
            if not head_runs(path):
                print(f"{path}: the cluster is down; starting it. {what_starts(path)}", flush=True)
                if code := up([path]):
                    return code
            else:
                make_token(read_cluster_file(path))
            if code := _ray("rsync-up", path):
                return code
            rest += [shlex.quote(f"M2F_CLUSTER_FILE={path}"), *_commit(rest)]
        code = _ray("submit", path, str(_SUBMIT), "--", *rest)
        if ends:
            return _down_after_job(path) or (1 if code else 0)
        if rest[0] in ("repro", "attach"):
            results([path])
    except KeyboardInterrupt:
        command = "python -m pipeline.submit"
        print(
            f"\nthe cluster stays up, and a job that has started goes on: `{command} run {path} attach` joins it, "
            f"`{command} run {path} stop` ends it, `{command} down {path}` ends the cluster"
        )
        return 130
    return 1 if code else 0


def _down_after_job(path: str) -> int:
    """`down`, unless a job still runs or the head does not say."""
    asked = _asked("submit", path, str(_SUBMIT), "--", "status")
    running = re.findall(r"^(m2f-\S+)  (?:running|pending) ", asked.stdout, re.MULTILINE)
    if asked.returncode or running:
        why = f"{', '.join(running)} still runs" if running else "the head does not say whether the job has ended"
        print(f"the cluster stays up, because {why}; later: python -m pipeline.submit down {path}", file=sys.stderr)
        return 1
    return down([path])


def head_runs(path: str) -> bool:
    """Whether Ray runs on the head. ValueError when a head does not say: to start it again would end its jobs."""
    config = read_cluster_file(path)
    if config["provider"]["type"] == "local":
        asked = subprocess.run(
            _ssh(config, config["provider"]["head_ip"], _RAYS), stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    else:
        if not _head_is_there(path, config):
            return False
        asked = _asked("exec", path, _RAYS)
    said = re.search(r"ray-(\d+)\s*$", asked.stdout)
    if said is None:
        last = (asked.stderr.strip() or asked.stdout.strip() or "no word").splitlines()[-1]
        raise ValueError(
            f"the head of {path} does not answer by ssh ({last}); look at its network and auth. "
            f"To start it over, which ends its jobs: python -m pipeline.submit up {path}"
        )
    return said[1] != "0"


def _head_is_there(path: str, config: Mapping[str, Any]) -> bool:
    """Whether the cloud has a machine that is the head. ValueError when it does not answer."""
    if config["provider"]["type"] == "gcp":
        asked = _asked("get-head-ip", path)
        if asked.returncode != 0 and "Head node of cluster" not in asked.stderr + asked.stdout:
            last = (asked.stderr.strip() or asked.stdout.strip() or "no word").splitlines()[-1]
            raise ValueError(f"Google Cloud could not be asked whether a head runs: {last}")
        return asked.returncode == 0
    from pipeline.cluster.aws import Account

    return Account(config).head() is not None


def what_starts(path: str) -> str:
    """What `up` starts and who says what it costs, in a sentence or two."""
    config = read_cluster_file(path)
    provider = config["provider"]
    end = f"until: python -m pipeline.submit down {path}"
    if provider["type"] == "local":
        return f"Ray on {1 + len(provider['worker_ips'])} machines of your own, {end}"
    types, groups, known = config["available_node_types"], node_groups(config), prices(config)
    machine, seller = ("machineType", "Google") if provider["type"] == "gcp" else ("InstanceType", "AWS")
    head = types[config["head_node_type"]]["node_config"][machine]
    more = " or ".join(
        f"up to {group.count} {types[group.node_type]['node_config'][machine]} ({group.gpus} GPUs each)"
        for group in groups
    )
    count = {config["head_node_type"]: 1, **{group.node_type: group.count for group in groups}}
    if count.keys() <= known.keys():
        alone, all_of_them = known[config["head_node_type"]], sum(known[name] * count[name] for name in count)
        cost = (
            f"By provider.price_per_hour that is {alone:,.2f} an hour for the head, {all_of_them:,.2f} with all of them"
        )
    else:
        cost = f"{seller}'s price list for {provider['region']} says what they cost an hour"
    return (
        f"One {head}, {end}; {more} while rows need them, given back after "
        f"{config.get('idle_timeout_minutes', 5)} idle minutes. {cost}"
    )


def results(words: list[str]) -> int:
    """Bring home what the head has made: results newer than ours with their entries of dvc.lock, and the report."""
    from pipeline.cluster.workspace import LOCK, add_newer_results

    path = _cluster(words, "results")
    here = _in_project()
    with tempfile.TemporaryDirectory(prefix="m2f-results-") as folder:
        for name in ("results/", "reports/", LOCK):
            failed = _asked("rsync-down", path, f"~/m2f/{name}", f"{folder}/{name}").returncode
            if failed and name == "results/":  # the others need not be there
                raise ValueError("no results could be brought from the head; is the cluster up, and has a job run?")
        taken = add_newer_results(Path(folder), here)
    print(f"{len(taken)} results brought home{': ' + ', '.join(taken) if taken else ''}")
    if taken:
        print("the table with them: python -m stages.report")
    return 0


def down(words: list[str]) -> int:
    """Results home, then `ray down`; on machines of one's own also Ray on the workers, which `ray down` leaves."""
    path = _cluster(words, "down")
    try:
        results([path])
    except ValueError as error:
        print(f"warning: {error}", file=sys.stderr)
    code = _ray("down", "--yes", path)
    config = read_cluster_file(path)
    if config["provider"]["type"] == "local":
        for address in config["provider"]["worker_ips"]:
            stop_ray = _ssh(config, address, "bash --login -i -c 'ray stop --force'")
            if subprocess.run(stop_ray, stdin=subprocess.DEVNULL, capture_output=True).returncode != 0:
                print(f"warning: Ray may still run on {address}, which did not answer", file=sys.stderr)
                code = code or 1
    return code


def _in_project() -> Path:
    here = Path.cwd()
    if not (here / "dvc.yaml").is_file():
        raise ValueError(f"{here} is not the project (no dvc.yaml); call this where cluster.yaml lies")
    return here


def _cluster(words: list[str], command: str) -> str:
    if len(words) != 1:
        raise ValueError(f"name one cluster file: python -m pipeline.submit {command} cluster.yaml")
    read_cluster_file(words[0])  # which says what is wrong with it, where Ray would not
    return words[0]


def _commit(words: Sequence[str]) -> list[str]:
    """The checkout's commit as a setting of the job, whose code is a copy without it; none where the words have one."""
    from pipeline.provenance.environment import commit_word

    word = None if any(word.startswith("M2F_GIT_COMMIT=") for word in words) else commit_word()
    return [f"M2F_GIT_COMMIT={word}"] if word else []


def _ssh(config: Mapping[str, Any], address: str, command: str) -> list[str]:
    """ssh to a machine of one's own, as Ray calls it."""
    key, user = config["auth"].get("ssh_private_key"), config["auth"]["ssh_user"]
    options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=10"]
    options += ["-o", "LogLevel=ERROR", *(["-i", os.path.expanduser(key)] if key else [])]
    return ["ssh", *options, f"{user}@{address}", command]


def _ray(command: str, *words: str) -> int:
    """Ray's own command line, with this environment's Ray; its exit code."""
    return subprocess.run(_command(command, *words), env=_environment()).returncode


def _asked(command: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The same, with its output kept."""
    return subprocess.run(_command(command, *words), env=_environment(), capture_output=True, text=True)


def _command(command: str, *words: str) -> list[str]:
    # without the style, it shows every ssh command line where the output is no terminal
    return ["ray", command, "--log-style", "pretty", *words]


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
