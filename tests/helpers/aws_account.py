"""An AWS account that moto plays: default network, image, quota. `ray up` meets ssh and rsync that say yes."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S

REGION = "us-east-1"
_PROGRAM = """#!/bin/sh
echo "{name} $*" >> {folder}/calls
for word; do case $word in /*/ray-bootstrap-*) cp "$word" {folder}/bootstrap.yaml ;; esac; done
"""


class AwsAccount:
    """What a test sees of the account, and of what `ray up` sent to machines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = self.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        self.vcpus = 96.0
        """Every quota."""

    def client(self, service: str, region: str = REGION) -> Any:
        import boto3

        return boto3.client(service, region_name=region)

    def machines(self) -> list[dict[str, Any]]:
        """Machines that have not ended."""
        found = self.client("ec2").describe_instances(
            Filters=[{"Name": "instance-state-name", "Values": ["pending", "running"]}]
        )
        return [machine for each in found["Reservations"] for machine in each["Instances"]]

    def calls(self) -> str:
        """Calls of ssh and rsync, one a line."""
        return (self.folder / "calls").read_text()

    def ray(self, *words: str) -> tuple[int, str]:
        """(exit code, output) of Ray's command line."""
        ray = [Path(sys.executable).parent / "ray", words[0], "--log-style", "pretty", *words[1:]]
        answer = subprocess.run(
            ray, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=LIMIT_S,
        )  # fmt: skip
        return answer.returncode, re.sub(r"\x1b\[\d*m", "", answer.stdout)


@contextlib.contextmanager
def aws_account(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AwsAccount]:
    """While the block runs, AWS is moto, the home folder is in `folder`, and no machine is reached."""
    pytest.importorskip("moto")
    for module in ("", ".validation", ".validation.exceptions"):  # moto's CloudFormation imports it for another service
        monkeypatch.setitem(sys.modules, f"openapi_spec_validator{module}", MagicMock())
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in ("ssh", "rsync"):
        (programs / name).write_text(_PROGRAM.format(name=name, folder=folder))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(folder))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    from moto.core.base_backend import BackendDict
    from moto.server import ThreadedMotoServer
    from moto.servicequotas.models import ServiceQuotasBackend
    from moto.ssm.models import Parameter, ssm_backends
    from ray.autoscaler._private.aws import utils

    from pipeline.cluster.aws import IMAGE

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    BackendDict.reset()  # what an earlier test made
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        for cache in (utils.resource_cache, utils.client_cache):  # they would keep an earlier test's account
            cache.cache_clear()
        account = AwsAccount(folder)
        names = {"L-417A185B": "Running On-Demand P instances", "L-7212CCBC": "All P Spot Instance Requests"}
        monkeypatch.setattr(
            ServiceQuotasBackend,
            "get_service_quota",
            lambda self, service_code, quota_code: {"QuotaName": names[quota_code], "Value": account.vcpus},
        )
        parameters = ssm_backends["123456789012"][REGION]._parameters
        details = dict.fromkeys(("description", "allowed_pattern", "keyid"))
        parameters[IMAGE].append(
            Parameter(
                account_id="123456789012", name=IMAGE, value=account.image, parameter_type="String",
                last_modified_date=0, version=1, data_type="text", **details,
            )
        )  # fmt: skip
        yield account
    finally:
        server.stop()
