"""A web server on loopback that serves archives, with ranges and a login form, and misbehaves as it is told."""

from __future__ import annotations

import contextlib
import http.server
import math
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

PAGE = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n"


class Request(NamedTuple):
    """What was asked for."""

    path: str
    range: str | None
    cookie: str | None


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path, or what `files` has under the last part of it."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, Handler)
        self.content = b""
        self.files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        """GETs for files."""
        self.sent: list[int] = []
        """Bytes of each answer that went out, or into the connection's buffers."""
        self.etag: str | None = '"one"'
        self.answers: list[int] = []
        """Status codes of the next answers, without a file."""
        self.drops: list[int] = []
        """The next answers end before this byte of the file."""
        self.reset = False
        """Drops are resets of the connection, which the other side notices in the middle of reading."""
        self.ranges = "sent"
        """Or `ignored`; `shifted`: another range than asked for; `unnamed`: without Content-Range."""
        self.lengths: list[int | None] = []
        """Content-Length of the next answers, true or not; None: none, and HTTP/1.0 ends with the connection."""
        self.chunked = False
        self.headers: dict[str, str] = {"Content-Type": "application/zip"}
        """Further headers of every file."""
        self.pages = 0
        """So many next requests for files are answered with a web page."""
        self.bytes_per_s = 0.0
        """0: as fast as it goes."""
        self.piece = 1 << 14
        """Bytes sent at a time unless as fast as it goes."""
        self.held_from = math.inf
        """Bytes of a file after this one wait until it is raised, unless as fast as it goes."""
        self.accounts: dict[str, str] = {}
        """Passwords; files under /file-handling/ want a session if there are any."""
        self.sessions: set[str] = set()
        self.forms: list[dict[str, list[str]]] = []
        """What was posted to /login/."""
        self.redirect = ""
        """Where requests for files are sent."""
        self.form_redirect = ""
        """Where posted forms are sent, with 307: to be posted there as well."""

    def url(self, name: str = "data.zip", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_address[1]}/files/{name}"

    @property
    def login_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/login/"

    def package(self, number: int, name: str) -> str:
        """A source as Cityscapes has them: the address does not end with a name."""
        return f"http://127.0.0.1:{self.server_address[1]}/file-handling/?packageID={number}#{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/login/":
            self.page()
            return
        server, wanted, cookie = self.server, self.headers.get("Range"), self.headers.get("Cookie")
        server.requests.append(Request(self.path, wanted, cookie))
        server.sent.append(0)
        at = len(server.sent) - 1
        if server.answers:
            self.send_error(server.answers.pop(0))
            return
        if server.redirect:
            self.go_to(server.redirect)
            return
        if path.startswith("/file-handling/") and server.accounts:
            sessions = {part.strip().removeprefix("session=") for part in (cookie or "").split(";")}
            if not sessions & server.sessions:
                self.go_to("/login/")
                return
        if server.pages:
            server.pages -= 1
            self.page()
            return
        body, start = server.files.get(self.path.rpartition("/")[2], server.content), 0
        current = self.headers.get("If-Range") in (None, server.etag)
        if wanted and current and server.ranges != "ignored":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if server.ranges == "shifted":
                start -= 1000
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start and server.ranges != "unnamed":
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        length = server.lengths.pop(0) if server.lengths else len(body) - start
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif length is not None:
            self.send_header("Content-Length", str(length))
        if server.etag:
            self.send_header("ETag", server.etag)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        end = server.drops.pop(0) if server.drops else len(body)
        with contextlib.suppress(ConnectionError):
            self.send(memoryview(body)[start:end], at, start)
            if server.chunked and end == len(body):
                self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True
        if end < len(body) and server.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def do_HEAD(self) -> None:
        body = self.server.files.get(self.path.rpartition("/")[2], self.server.content)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()

    def do_POST(self) -> None:
        server = self.server
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        server.forms.append(form)
        (name,), (password,) = form["username"], form["password"]
        if server.form_redirect:
            self.send_response(307)
            self.send_header("Location", server.form_redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif server.accounts.get(name) == password and self.headers.get("Cookie") == "seen=form":
            session = f"s{len(server.forms)}"
            server.sessions.add(session)
            self.go_to("/downloads/", cookie=f"session={session}; Path=/")
        else:
            self.page()

    def send(self, body: memoryview, at: int, start: int) -> None:
        step = self.server.piece if self.server.bytes_per_s else max(1, len(body))
        for begin in range(0, len(body), step):
            block = body[begin : begin + step]
            while self.server.bytes_per_s and start + begin > self.server.held_from:
                time.sleep(0.001)
            if self.server.chunked:
                self.wfile.write(f"{len(block):x}\r\n".encode())
            self.wfile.write(block)
            if self.server.chunked:
                self.wfile.write(b"\r\n")
            self.wfile.flush()
            self.server.sent[at] += len(block)
            if self.server.bytes_per_s:
                time.sleep(len(block) / self.server.bytes_per_s)

    def page(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(PAGE)))
        self.send_header("Set-Cookie", "seen=form; Path=/login/")
        self.end_headers()
        self.wfile.write(PAGE)

    def go_to(self, where: str, cookie: str = "") -> None:
        self.send_response(302)
        self.send_header("Location", where)
        self.send_header("Content-Length", "0")
        if cookie:
            self.send_header("Set-Cookie", cookie)
        self.end_headers()

    def version_string(self) -> str:
        return "test"

    @property
    def protocol_version(self) -> str:  # type: ignore[override]
        return "HTTP/1.1" if self.server.chunked else "HTTP/1.0"

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A running server."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
