"""A real S3 server, moto's, on loopback, for the tests of storage roots that are URLs."""

from __future__ import annotations

import json
import os
import select
import socket
import socketserver
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from tests.helpers.waiting import answers, until

KEYS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}

_SERVER = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from moto.server import main
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""
"""Ends with the process that holds its stdin, whatever becomes of the tests."""


@contextmanager
def s3_server() -> Iterator[str]:
    """Address of a server with nothing in it; ended with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(port)],
        env={**os.environ, **KEYS},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(
            lambda: answers(f"{address}/moto-api/"),
            ended=lambda: process.poll() is not None,
            said=lambda: "moto's server has ended or does not answer",
        )
        yield address
    finally:
        process.kill()
        process.wait()


@contextmanager
def checking(server: str) -> Iterator[None]:
    """While the block runs, the server refuses what the user whose keys a request has may not do."""

    def after(requests: str) -> None:
        plain = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{server}/moto-api/reset-auth", requests.encode(), plain, method="POST")
        urllib.request.urlopen(request).close()

    after("0")
    try:
        yield
    finally:
        after("inf")


def user(server: str, *rights: str, below: str = "*") -> dict[str, str]:
    """The keys of a new user, as environment variables. rights: GetObject and so on; below: their bucket/prefix."""
    import boto3

    iam, name = boto3.client("iam", endpoint_url=server), uuid.uuid4().hex
    resources = [f"arn:aws:s3:::{below}/*", f"arn:aws:s3:::{below.partition('/')[0]}"] if below != "*" else ["*"]
    allowed = {"Effect": "Allow", "Action": [f"s3:{right}" for right in rights], "Resource": resources}
    iam.create_user(UserName=name)
    policy = {"Version": "2012-10-17", "Statement": [allowed]}
    iam.put_user_policy(UserName=name, PolicyName="rights", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


class Cutting(socketserver.ThreadingTCPServer):
    """In front of a server: once `allowed` bytes have gone to it, every connection that sends is closed."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, server: str, allowed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.server, self.allowed = server, allowed
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Forward(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Cutting)
        host, port = self.server.server.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as there:
            ends = {self.request: there, there: self.request}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(1 << 16)
                    if end is self.request:
                        self.server.allowed -= len(data)
                    if not data or self.server.allowed < 0:
                        return
                    ends[end].sendall(data)


@contextmanager
def cutting(server: str, allowed: int) -> Iterator[str]:
    """Address of a proxy that lets `allowed` bytes through to the server."""
    with Cutting(server, allowed) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        yield proxy.address
        proxy.shutdown()
