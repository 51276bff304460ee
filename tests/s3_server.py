"""A real S3 server, moto's, on loopback, for the tests of storage roots that are URLs."""

from __future__ import annotations

import os
import select
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

KEYS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}
LIFE_S = 900
"""The server ends itself after this long, whatever becomes of the tests."""

_SERVER = """
import signal, sys
signal.alarm(int(sys.argv[2]))
from moto.server import main
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """Address of a server with nothing in it; ended with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(port), str(LIFE_S)],
        env={**os.environ, **KEYS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(address, process)
        yield address
    finally:
        process.kill()
        process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{address}/moto-api/", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert process.poll() is None, "moto's server has ended"
            time.sleep(0.1)
    raise AssertionError("moto's server does not answer")


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
