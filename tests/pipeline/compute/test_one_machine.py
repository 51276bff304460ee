"""Ray on one machine: it listens on every address, so it wants a token."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc
import pytest

from tests.helpers.waiting import LIMIT_S

_TRAINING = """
import sys
from pipeline.compute.ray_session import connect
connect()
import ray
print(ray.get_runtime_context().gcs_address, ray.get(ray.remote(lambda: 4).remote()), flush=True)
sys.stdin.read()
"""


@pytest.mark.ray
def test_who_reaches_this_machine_gets_nothing_from_the_ray_that_a_stage_starts(tmp_path: Path) -> None:
    left_out = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS")  # tests set the first
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # names of sockets must be
        environment |= {"HOME": str(tmp_path), "RAY_TMPDIR": short, "M2F_STORAGE": str(tmp_path / "storage")}
        command = [sys.executable, "-c", _TRAINING]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as stage:
            assert stage.stdin and stage.stdout
            try:
                address, answer = stage.stdout.readline().split()
                assert answer == "4"  # its own tasks run
                with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refusal:
                    channel.unary_unary("/ray.rpc.InternalKVGcsService/InternalKVKeys")(b"", timeout=LIMIT_S)
                assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert not (tmp_path / ".ray").exists()
            finally:
                stage.stdin.close()  # ends it, and Ray with it
