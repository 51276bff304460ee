from __future__ import annotations

import hashlib
import http.server
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.fetch import download, fetch, folder_digest, open_sources
from pipeline.files import sha256
from pipeline.params import DatasetConfig
from tests.pipeline.pictures import config, write_folder, zipped

CONTENT = bytes(range(256)) * 12_000  # 3 MB, several blocks


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path, with ranges; drops the connection after each of `drops` bytes, in turn."""

    content = CONTENT
    etag = '"one"'
    drops: list[int]
    answers: list[int]
    requests: list[tuple[str, str | None]]

    def url(self, name: str = "data.zip") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/files/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        if self.server.answers:
            self.send_error(self.server.answers.pop(0))
            return
        body, start = self.server.content, 0
        if wanted and self.headers.get("If-Range") in (None, self.server.etag):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        end = self.server.drops.pop(0) if self.server.drops else len(body)
        self.wfile.write(body[start:end])
        if end < len(body):
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.drops, server.answers, server.requests = [], [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_a_download_goes_on_where_the_connection_dropped(storage: Path, server: Server) -> None:
    server.drops = [1_200_000, 2_500_000]
    path = download(server.url(), pause_s=0.0)
    assert path.read_bytes() == CONTENT
    assert path == storage / "archives" / hashlib.sha256(CONTENT).hexdigest()[:16] / "data.zip"
    assert [wanted for _, wanted in server.requests] == [None, "bytes=1200000-", "bytes=2500000-"]
    assert len(files(storage)) == 2, "the archive and the note of its URL; no parts"


def test_a_download_goes_on_in_a_later_run(storage: Path, server: Server) -> None:
    server.drops = [1_200_000]
    server.answers = []
    with pytest.raises(
        ValueError, match=r"the connection ended after 1,200,000 of 3,072,000 bytes.*run the command again"
    ):
        download(server.url(), attempts=1, pause_s=0.0)
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT
    assert server.requests[-1][1] == "bytes=1200000-"


def test_a_file_that_changed_on_the_server_is_loaded_from_its_beginning(storage: Path, server: Server) -> None:
    server.drops = [1_200_000]
    with pytest.raises(ValueError, match="run the command again"):
        download(server.url(), attempts=1, pause_s=0.0)
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT[::-1]


def test_a_part_longer_than_the_file_is_thrown_away(storage: Path, server: Server) -> None:
    server.drops = [1_200_000]
    with pytest.raises(ValueError, match="run the command again"):
        download(server.url(), attempts=1, pause_s=0.0)
    server.content = b"short"
    assert download(server.url(), pause_s=0.0).read_bytes() == b"short"


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(storage: Path, server: Server) -> None:
    server.answers = [503, 429]
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT
    server.answers = [404]
    with pytest.raises(ValueError, match=r"/files/gone\.zip cannot be downloaded: the server answers 404 Not Found"):
        download(server.url("gone.zip"), pause_s=0.0)
    server.answers = [500] * 3
    with pytest.raises(ValueError, match="3 tries in a row"):
        download(server.url("broken.zip"), attempts=3, pause_s=0.0)


def test_a_download_is_made_once_and_again_when_it_was_altered(storage: Path, server: Server) -> None:
    first = download(server.url(), pause_s=0.0)
    assert download(server.url(), pause_s=0.0) == first
    assert len(server.requests) == 1
    first.write_bytes(b"altered")
    assert download(server.url(), pause_s=0.0).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_wrong_digest_leaves_nothing_behind(storage: Path, server: Server) -> None:
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{64}, expected 00ff; it is truncated or altered"):
        download(server.url(), sha256_prefix="00ff", pause_s=0.0)
    assert files(storage) == []


def test_terms_are_named_and_must_be_accepted_before_a_download(
    tmp_path: Path, storage: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content = zipped(write_folder(tmp_path / "d"), tmp_path / "d.zip").read_bytes()
    settings: dict[str, Any] = {"sources": (server.url(),), "terms": "research only"}
    with pytest.raises(ValueError, match=r"research only.*set datasets\.mine\.accept_terms: true"):
        fetch("mine", config(**settings), base=tmp_path)
    assert server.requests == []
    facts = fetch("mine", config(**settings, accept_terms=True), base=tmp_path)
    assert "mine comes under these terms: research only" in capsys.readouterr().err
    digest = hashlib.sha256(server.content).hexdigest()
    entry = {"name": "data.zip", "path": f"archives/{digest[:16]}/data.zip", "bytes": len(server.content)}
    assert facts == {"dataset": "mine", "sources": [{**entry, "sha256": digest}], "terms": "research only"}


def test_a_downloaded_archive_that_is_altered_is_taken_away(tmp_path: Path, storage: Path, server: Server) -> None:
    whole = zipped(write_folder(tmp_path / "d"), tmp_path / "d.zip").read_bytes()
    server.content = whole[:-100]
    with pytest.raises(ValueError, match=r"data\.zip is not a whole zip archive"):
        fetch("mine", config(sources=(server.url(),)), base=tmp_path)
    assert not [name for name in files(storage) if name.endswith(".zip")]
    server.content = whole
    assert fetch("mine", config(sources=(server.url(),)), base=tmp_path)["sources"][0]["bytes"] == len(whole)


def test_a_local_archive_is_linked_and_its_facts_name_no_machine(tmp_path: Path, storage: Path) -> None:
    archive = zipped(write_folder(tmp_path / "d"), tmp_path / "mine.zip")
    os.symlink(archive, tmp_path / "link.zip")
    for source in ("mine.zip", "link.zip"):
        facts = fetch("mine", config(sources=(source,)), base=tmp_path)
        (path,) = open_sources(facts)
        assert path == storage / "archives" / sha256(archive)[:16] / source
        assert os.path.samefile(path, archive)
        assert str(tmp_path) not in str(facts)


def test_a_truncated_or_flipped_local_archive_is_refused(tmp_path: Path, storage: Path) -> None:
    data = bytearray(zipped(write_folder(tmp_path / "d"), tmp_path / "mine.zip").read_bytes())
    (tmp_path / "torn.zip").write_bytes(data[:-40])
    with zipfile.ZipFile(tmp_path / "mine.zip") as archive:
        entry = archive.infolist()[1]
    data[entry.header_offset + 30 + len(entry.filename) + entry.file_size // 2] ^= 1
    (tmp_path / "flipped.zip").write_bytes(data)
    for name in ("torn.zip", "flipped.zip"):
        with pytest.raises(ValueError, match=rf"{name} is not a whole zip archive \(.*\); it is truncated or altered"):
            fetch("mine", config(sources=(name,)), base=tmp_path)
    digest = sha256(tmp_path / "mine.zip")
    with pytest.raises(ValueError, match=f"flipped.zip has sha256 .*, expected {digest}"):
        fetch("mine", config(sources=("flipped.zip",), sha256=(digest,)), base=tmp_path)
    assert files(storage) == []


def test_an_archive_altered_after_fetching_is_noticed(tmp_path: Path, storage: Path) -> None:
    archive = zipped(write_folder(tmp_path / "d"), tmp_path / "mine.zip")
    facts = fetch("mine", config(sources=("mine.zip",)), base=tmp_path)
    with archive.open("ab") as file:  # the link shares its bytes
        file.write(b"x")
    with pytest.raises(ValueError, match=r"has changed since it was fetched.*run python -m stages\.fetch mine"):
        open_sources(facts)
    (storage / facts["sources"][0]["path"]).unlink()
    with pytest.raises(ValueError, match=r"missing from the storage root .*python -m stages\.fetch mine"):
        open_sources(facts)


def test_a_folder_is_read_in_place_and_known_by_names_sizes_and_contents(tmp_path: Path, storage: Path) -> None:
    folder = write_folder(tmp_path / "mine")
    facts = fetch("mine", config(sources=("mine",)), base=tmp_path)
    assert open_sources(facts) == [folder]
    assert str(tmp_path) not in str(facts)
    assert facts["sources"][0]["sha256"] == folder_digest(folder)[0]
    (folder / "images/training/p0.jpg").rename(folder / "images/training/p7.jpg")
    with pytest.raises(ValueError, match="has changed since it was fetched"):
        open_sources(facts)


def test_what_is_missing_is_said_with_what_to_do(tmp_path: Path, storage: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.zip does not exist; put the archive or folder there, or change"):
        fetch("mine", config(sources=("gone.zip",)), base=tmp_path)
    with pytest.raises(ValueError, match=r"datasets\.mine\.sources is empty"):
        fetch("mine", config(), base=tmp_path)
    with pytest.raises(ValueError, match="lists 1 sha256 digests for 2 sources"):
        fetch("mine", config(sources=("a", "b"), sha256=("00",)), base=tmp_path)
    with pytest.raises(ValueError, match="s3://bucket/a.zip cannot be downloaded"):
        fetch("mine", config(sources=("s3://bucket/a.zip",)), base=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is empty"):
        fetch("mine", config(sources=("empty",)), base=tmp_path)


def test_generated_pictures_need_nothing(tmp_path: Path, storage: Path) -> None:
    facts = fetch("shapes", DatasetConfig(layout="shapes", generate={"train": 3, "seed": 7}), base=tmp_path)
    assert facts == {"dataset": "shapes", "sources": [], "terms": "", "generate": {"train": 3, "seed": 7}}
    assert open_sources(facts) == []
