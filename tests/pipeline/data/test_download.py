"""Downloads from servers that do what servers do."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.download import downloaded, file_name
from pipeline.data.login import LOGINS, Login, log_in
from tests.helpers.http_server import PAGE, Server, serving

CONTENT = bytes(range(256)) * 12_000
"""3,072,000 bytes, several blocks."""

SHA256 = hashlib.sha256(CONTENT).hexdigest()

PASSWORD = "a password & more"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.content = CONTENT
        yield server


@pytest.fixture
def site(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Login:
    """The server has a login form and one account; no credentials are set."""
    server.accounts = {"me@example.org": PASSWORD}
    site = dataclasses.replace(LOGINS["cityscapes"], url=server.login_url)
    monkeypatch.setitem(LOGINS, "cityscapes", site)
    for name in (site.username, site.password):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return site


@pytest.fixture
def known(site: Login, monkeypatch: pytest.MonkeyPatch) -> Login:
    """And the right credentials are in the environment."""
    monkeypatch.setenv(site.username, "me@example.org")
    monkeypatch.setenv(site.password, PASSWORD)
    return site


def write_netrc(path: Path, text: str, mode: int = 0o600) -> None:
    path.write_text(text)
    path.chmod(mode)


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def download(url: str, **settings: Any) -> Path:
    """Where a download lies."""
    return downloaded(url, **settings).path


def part(root: Path) -> bytes:
    """What is kept of a download that did not end."""
    (path,) = root.rglob("*.part")
    return path.read_bytes()


def begun(server: Server, at: int = 1_200_000, **settings: int) -> None:
    """Leave a download that stopped at a byte."""
    server.drops = [at]
    with pytest.raises(ValueError, match="run the command again to go on"):
        downloaded(server.url(), attempts=1, pause_s=0.0, **settings)


def ranges(server: Server) -> list[str | None]:
    return [request.range for request in server.requests]


# Going on


@pytest.mark.parametrize("manner", ["plain", "reset", "chunked"])
def test_a_download_goes_on_where_the_connection_dropped(storage: Path, server: Server, manner: str) -> None:
    server.drops, server.reset, server.chunked = [1_200_000, 2_500_000], manner == "reset", manner == "chunked"
    if manner == "reset":
        server.bytes_per_s = 50e6  # so that what was sent is read before the reset
    path = download(server.url(), pause_s=0.0)
    assert path.read_bytes() == CONTENT
    assert path == storage / "archives" / SHA256[:16] / "data.zip"
    if manner != "reset":  # which throws away what is still on its way
        assert ranges(server) == [None, "bytes=1200000-", "bytes=2500000-"]
    assert len(files(storage)) == 2, "the archive and the note of its URL; no parts"


def test_a_download_goes_on_in_a_later_run(storage: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.drops = [1_200_000]
    with pytest.raises(
        ValueError, match=r"the connection ended after 1,200,000 of 3,072,000 bytes.*run the command again"
    ):
        download(server.url(), attempts=1, pause_s=0.0)
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT
    assert server.requests[-1].range == "bytes=1200000-"
    assert "downloading data.zip: 3 MiB, 2 of them in " in capsys.readouterr().err


def test_a_download_that_ended_with_its_last_byte_is_not_asked_for_again(storage: Path, server: Server) -> None:
    begun(server)
    (path,) = storage.rglob("*.part")
    path.write_bytes(CONTENT)  # killed before the file was put in its place
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_file_that_changed_on_the_server_is_loaded_from_its_beginning(storage: Path, server: Server) -> None:
    begun(server)
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT[::-1]


def test_a_file_that_changed_keeps_nothing_of_the_old_one(storage: Path, server: Server) -> None:
    begun(server)
    server.content, server.etag, server.drops = CONTENT[::-1], '"two"', [500_000]
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT[::-1]
    assert ranges(server) == [None, "bytes=1200000-", "bytes=500000-"]


def test_a_file_that_changes_at_every_try_is_given_up(
    storage: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = itertools.count()
    monkeypatch.setattr(Server, "etag", property(lambda _: f'"{next(tags)}"'), raising=False)
    server.drops = [1_000_000] * 100
    with pytest.raises(ValueError, match="3 tries in a row"):
        download(server.url(), attempts=3, pause_s=0.0)
    assert len(server.requests) == 3, "a byte that comes again is no progress"


def test_a_part_longer_than_the_file_is_thrown_away(storage: Path, server: Server) -> None:
    begun(server)
    server.content = b"short"
    assert download(server.url(), pause_s=0.0).read_bytes() == b"short"


def test_a_part_of_which_nobody_knows_what_it_is_of_is_thrown_away(storage: Path, server: Server) -> None:
    begun(server)
    (path,) = storage.rglob("*.part")
    path.with_suffix(".json").unlink()
    path.write_bytes(b"x" * 1000)
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT
    assert server.requests[-1].range is None


def test_a_server_that_ignores_ranges_sends_it_all_again(
    storage: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(server)
    server.ranges = "ignored"
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT
    assert "the server starts over from the first byte" in capsys.readouterr().err


@pytest.mark.parametrize("etag", ['"one"', None])
@pytest.mark.parametrize("ranges", ["shifted", "unnamed"])
def test_an_answer_that_is_not_the_range_asked_for_is_not_appended(
    storage: Path, server: Server, capsys: pytest.CaptureFixture[str], ranges: str, etag: str | None
) -> None:
    server.etag = etag
    begun(server)
    server.ranges = ranges
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT
    assert [request.range for request in server.requests] == [None, "bytes=1200000-", None]
    assert "asked for the bytes from 1,200,000 on, the server sent something else" in capsys.readouterr().err


def test_a_range_of_a_file_of_another_length_is_not_appended(storage: Path, server: Server) -> None:
    server.etag = None
    begun(server)
    server.content = CONTENT[::-1] + b"longer"
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT[::-1] + b"longer"


# Lengths


def test_a_length_that_is_not_the_published_one_stops_before_the_first_byte(storage: Path, server: Server) -> None:
    with pytest.raises(ValueError, match=r"is 3,072,000 bytes long on the server, published are 3,072,001; .*mirror"):
        downloaded(server.url(), size=3_072_001, pause_s=0.0)
    assert part(storage) == b""


def test_a_length_that_is_too_long_is_given_up_after_so_many_tries(storage: Path, server: Server) -> None:
    server.lengths = [5_000_000] * 20
    with pytest.raises(ValueError, match="4 tries in a row"):
        download(server.url(), attempts=4, pause_s=0.0)
    assert len(server.requests) <= 8


def test_a_length_that_is_too_short_is_noticed_by_the_digest(storage: Path, server: Server) -> None:
    server.lengths = [1_000_000]
    with pytest.raises(ValueError, match=f"expected {SHA256}; it is truncated or altered"):
        downloaded(server.url(), sha256_prefix=SHA256, pause_s=0.0)
    assert files(storage) == []


def test_a_length_that_is_not_said_is_that_of_the_published_file(storage: Path, server: Server) -> None:
    server.lengths, server.drops = [None], [2_000_000]
    assert downloaded(server.url(), size=len(CONTENT), pause_s=0.0).path.read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=2000000-"]


def test_more_bytes_than_published_are_thrown_away(storage: Path, server: Server) -> None:
    server.chunked = True
    with pytest.raises(ValueError, match="3,072,000 bytes came of a file of 1,000,000"):
        downloaded(server.url(), size=1_000_000, attempts=1, pause_s=0.0)
    assert part(storage) == b""


def test_an_answer_repacked_on_its_way_is_refused(storage: Path, server: Server) -> None:
    server.headers["Content-Encoding"] = "gzip"
    with pytest.raises(ValueError, match=r"re-packed \(gzip\) though asked not to"):
        download(server.url(), pause_s=0.0)
    assert part(storage) == b""


def test_room_is_checked_before_the_first_byte(storage: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 2 * 2**20))
    with pytest.raises(ValueError, match=r"data\.zip takes 2\.9 MiB more, but only 2\.0 MiB are free .*M2F_STORAGE"):
        download(server.url(), pause_s=0.0)
    assert part(storage) == b""


# Answers that are not the file


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(storage: Path, server: Server) -> None:
    server.answers = [503, 429]
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT
    server.answers = [404]
    with pytest.raises(ValueError, match=r"/files/gone\.zip cannot be downloaded: the server answers 404 Not Found"):
        download(server.url("gone.zip"), pause_s=0.0)
    server.answers = [500] * 3
    with pytest.raises(ValueError, match="3 tries in a row"):
        download(server.url("broken.zip"), attempts=3, pause_s=0.0)


def test_pauses_double(storage: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    server.answers = [503] * 9
    with pytest.raises(ValueError, match="9 tries in a row"):
        download(server.url(), attempts=9)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_a_web_page_is_not_taken_for_the_archive(storage: Path, server: Server) -> None:
    server.pages = 1
    with pytest.raises(ValueError, match=r"the server sent a web page \(text/html\), not the file; open it in a brow"):
        download(server.url(), pause_s=0.0)
    assert part(storage) == b""
    server.content, server.headers = b"\n" + PAGE, {}  # a page that does not say so, and comes in pieces
    server.piece, server.bytes_per_s = 4, 4000
    with pytest.raises(ValueError, match="the server sent a web page, not the file"):
        download(server.url(), pause_s=0.0)
    assert part(storage) == b""
    assert len(server.requests) == 2, "another try gives the same"


@pytest.mark.parametrize("said", [True, False])
def test_a_web_page_does_not_cost_what_has_come(storage: Path, server: Server, said: bool) -> None:
    begun(server)
    if said:
        server.pages = 1
    else:
        server.content, server.etag, server.headers = PAGE, '"page"', {}
    with pytest.raises(ValueError, match="the server sent a web page"):
        download(server.url(), pause_s=0.0)
    assert part(storage) == CONTENT[:1_200_000]
    server.content, server.etag = CONTENT, '"one"'
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT
    assert server.requests[-1].range == "bytes=1200000-"


# What is kept


def test_a_download_is_made_once_and_again_when_it_was_altered(storage: Path, server: Server) -> None:
    first = download(server.url(), pause_s=0.0)
    assert download(server.url(), pause_s=0.0) == first
    assert len(server.requests) == 1
    first.write_bytes(b"altered")
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_download_is_known_by_its_digest_wherever_it_came_from(storage: Path, server: Server) -> None:
    download(server.url(), pause_s=0.0)
    other = server.url().replace("/files/", "/elsewhere/")
    assert downloaded(other, sha256_prefix=SHA256, pause_s=0.0).sha256 == SHA256
    assert len(server.requests) == 1


def test_a_wrong_digest_leaves_nothing_behind(storage: Path, server: Server) -> None:
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{64}, expected 00ff; it is truncated or altered"):
        download(server.url(), sha256_prefix="00ff", pause_s=0.0)
    assert files(storage) == []


def test_a_name_is_never_a_path() -> None:
    names = {
        "a/b.zip": "b.zip",
        "..%2f..%2fb.zip": "b.zip",
        "%2e%2e": "download",
        "": "download",
        "b.zip?x=/y": "b.zip",
    }
    assert {path: file_name(f"http://host/{path}") for path in names} == names


# Login


def test_a_login_gets_the_file_and_leaves_no_trace(
    storage: Path, server: Server, known: Login, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _, name = server.package(3, "pictures.zip").partition("#")
    found = downloaded(url, name=name, login="cityscapes", pause_s=0.0)
    assert found.path.name == "pictures.zip"
    assert found.path.read_bytes() == CONTENT
    assert server.forms == [{"username": ["me@example.org"], "password": [PASSWORD], "submit": ["Login"]}]
    assert [request.cookie for request in server.requests] == ["session=s1"]
    seen = capsys.readouterr()
    everything = seen.out + seen.err + "".join((storage / name).read_text("latin-1") for name in files(storage))
    assert PASSWORD not in everything and "me@example.org" not in everything


def test_wrong_credentials_are_one_sentence_that_does_not_name_them(
    storage: Path, server: Server, known: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(known.password, "not " + PASSWORD)
    with pytest.raises(ValueError, match=r"refuses the user name and password from CITYSCAPES_USERNAME and") as caught:
        downloaded(server.url(), login="cityscapes", pause_s=0.0)
    assert PASSWORD not in str(caught.value) and "me@" not in str(caught.value)
    assert (len(server.forms), server.requests) == (1, [])


def test_credentials_come_from_the_environment_or_else_from_netrc(
    site: Login, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = "machine 127.0.0.1 login {} password {}\n"
    write_netrc(tmp_path / "netrc", entry.format("me@example.org", '"a password & more"'))
    log_in("cityscapes")
    assert server.forms[-1]["password"] == [PASSWORD]
    monkeypatch.setenv(site.username, "other")
    with pytest.raises(ValueError, match=r"CITYSCAPES_USERNAME is set, but CITYSCAPES_PASSWORD is not; set both"):
        log_in("cityscapes")
    monkeypatch.setenv(site.password, "wrong")
    with pytest.raises(ValueError, match="refuses the user name"):
        log_in("cityscapes")
    assert server.forms[-1]["username"] == ["other"], "the environment comes first"


def test_a_missing_unreadable_or_open_netrc_is_said_without_quoting_it(
    site: Login, server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "netrc"
    with pytest.raises(
        ValueError, match=rf"wants a login: register at https://www\.city.*CITYSCAPES.*or write into {path}"
    ):
        log_in("cityscapes")
    write_netrc(path, "machine example.org login a password b\ndefault login anybody password anything\n")
    with pytest.raises(ValueError, match="wants a login"):
        log_in("cityscapes")
    write_netrc(path, "machine 127.0.0.1 login a\nsecret b\n")
    with pytest.raises(ValueError, match=r"netrc cannot be read: line \d is not in netrc's format") as caught:
        log_in("cityscapes")
    assert "secret" not in str(caught.value)
    write_netrc(path, "machine 127.0.0.1 login a password b\n", mode=0o644)
    with pytest.raises(ValueError, match=rf"others may read it; run: chmod 600 {path}"):
        log_in("cityscapes")
    assert server.forms == []


def test_a_session_that_ends_is_opened_again(storage: Path, server: Server, known: Login) -> None:
    url, _, name = server.package(3, "pictures.zip").partition("#")
    server.drops = [1_200_000]

    class Forgetful(set[str]):
        def __rand__(self, other: set[str]) -> set[str]:
            """The first session is good for one request."""
            found = other & set(self)
            self.discard("s1")
            return found

    server.sessions = Forgetful()
    assert downloaded(url, name=name, login="cityscapes", pause_s=0.0).path.read_bytes() == CONTENT
    assert [request.range for request in server.requests] == [None, "bytes=1200000-", "bytes=1200000-"]
    assert len(server.forms) == 2


def test_a_login_that_gets_no_file_is_said_once(storage: Path, server: Server, known: Login) -> None:
    server.pages = 5
    with pytest.raises(ValueError, match=r"a web page .*the login was accepted, so perhaps .* accept the licence"):
        downloaded(server.url(), login="cityscapes", pause_s=0.0)
    assert len(server.forms) == 1


def test_a_login_that_is_down_is_tried_again(
    storage: Path, server: Server, known: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGINS, "cityscapes", dataclasses.replace(known, url="http://127.0.0.1:9/login/"))
    with pytest.raises(ValueError, match=r"cannot be downloaded \(.*refused.*\), 2 tries in a row"):
        downloaded(server.url(), login="cityscapes", attempts=2, pause_s=0.0)
    assert server.requests == []


def test_redirects_take_neither_password_nor_cookie_to_another_host(
    storage: Path, server: Server, known: Login
) -> None:
    with serving() as other:
        other.content = CONTENT
        server.form_redirect = f"http://localhost:{other.server_address[1]}/login/"
        with pytest.raises(ValueError, match="refuses the user name"):
            log_in("cityscapes")
        assert other.forms == []
        server.form_redirect = ""
        server.redirect = other.url(host="localhost")
        assert downloaded(server.url(), login="cityscapes", pause_s=0.0).path.read_bytes() == CONTENT
        assert server.requests[-1].cookie == "session=s2"
        assert [request.cookie for request in other.requests] == [None]
