from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import fetch as fetch_module
from pipeline.data.fetch import fetch, folder_digest, open_sources
from pipeline.data.login import LOGINS
from pipeline.params.load import load_params
from pipeline.params.schema import DatasetConfig
from pipeline.storage.files import sha256
from pipeline.storage.results.data import FetchedDataset, FetchedSource
from pipeline.storage.results.folder import read_result
from tests.helpers.http_server import Server, serving
from tests.helpers.images import config, put, write_folder, zipped
from tests.helpers.project_copy import Copy
from tests.helpers.shared import PROJECT, shared


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """made/data.zip, a small dataset in ADE20K's layout."""
    (tmp_path / "made").mkdir()
    return zipped(write_folder(tmp_path / "d"), tmp_path / "made/data.zip")


VOC = {"train": "train", "val": "val"}


def published(server: Server, archive: Path, **settings: Any) -> DatasetConfig:
    """A dataset entry for an archive that the server has, with its length and digest."""
    server.files[archive.name] = archive.read_bytes()
    about = {"bytes": (archive.stat().st_size,), "sha256": (sha256(archive),)}
    return config(**{"sources": (server.url(archive.name),), **about, **settings})


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_terms_are_named_and_must_be_accepted_before_a_download(
    tmp_path: Path, storage: Path, server: Server, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = published(server, archive, terms="research only")
    with pytest.raises(ValueError, match=r"research only.*set datasets\.mine\.accept_terms: true"):
        fetch("mine", entry, base=tmp_path)
    assert server.requests == []
    facts = fetch("mine", dataclasses.replace(entry, accept_terms=True), base=tmp_path)
    assert "mine: to be downloaded: data.zip (0.0 MiB)\nmine comes under these terms: research only" in (
        capsys.readouterr().err
    )
    digest, size = sha256(archive), archive.stat().st_size
    path = f"archives/{digest[:16]}/data.zip"
    source = FetchedSource(name="data.zip", bytes=size, sha256=digest, path=path)
    assert facts == FetchedDataset(dataset="mine", sources=(source,), terms="research only", generate={})
    assert fetch("mine", entry, base=tmp_path) == facts, "what is here needs no acceptance"
    assert len(server.requests) == 1


def test_a_downloaded_archive_that_is_altered_is_taken_away(
    tmp_path: Path, storage: Path, server: Server, archive: Path
) -> None:
    entry = published(server, archive, bytes=(), sha256=())
    server.files["data.zip"] = archive.read_bytes()[:-100]
    with pytest.raises(ValueError, match=r"data\.zip is not a whole zip archive"):
        fetch("mine", entry, base=tmp_path)
    assert files(storage) == []
    server.files["data.zip"] = archive.read_bytes()
    assert fetch("mine", entry, base=tmp_path).sources[0].sha256 == sha256(archive)


def test_what_was_fetched_is_read_once_and_not_checked_again(
    tmp_path: Path, storage: Path, server: Server, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    check = fetch_module.check_archive
    monkeypatch.setattr(fetch_module, "check_archive", lambda path, name: (checked.append(name), check(path, name))[1])
    known, unknown = published(server, archive), published(server, archive, bytes=(), sha256=())
    fetch("known", known, base=tmp_path)
    assert checked == [], "its digest says that it is the published archive"
    for _ in range(2):
        fetch("local", config(sources=("made/data.zip",)), base=tmp_path)
    assert checked == [], "the same archive has been checked under another name"
    shutil.rmtree(storage)
    for _ in range(2):
        fetch("unknown", unknown, base=tmp_path)
    assert checked == ["data.zip"]


# Mirrors


def test_a_mirrors_folder_is_looked_into_first_and_needs_no_acceptance(
    tmp_path: Path, storage: Path, server: Server, archive: Path
) -> None:
    entry = published(server, archive, terms="research only", mirrors=("gone", "made"))
    facts = fetch("mine", entry, base=tmp_path)
    assert server.requests == []
    assert os.path.samefile(open_sources(facts)[0], archive)
    shutil.rmtree(storage)
    downloaded = fetch("mine", dataclasses.replace(entry, accept_terms=True, mirrors=()), base=tmp_path)
    assert downloaded == facts, "where it came from makes no difference"


def test_another_archive_in_a_mirrors_folder_is_left_out_with_a_word(
    tmp_path: Path, storage: Path, server: Server, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = published(server, archive, mirrors=("short", "other"))
    data = archive.read_bytes()
    put(tmp_path / "short/data.zip", data[:-1])
    put(tmp_path / "other/data.zip", data[:-1] + b"x")
    assert fetch("mine", entry, base=tmp_path).sources[0].sha256 == sha256(archive)
    said = capsys.readouterr().err
    assert f"short/data.zip is {len(data) - 1:,} bytes long, published are {len(data):,}" in said
    assert f"other/data.zip has sha256 {sha256(tmp_path / 'other/data.zip')}, expected {sha256(archive)}" in said
    assert said.count("it is left out (list it in datasets.mine.sources to use it as it is)") == 2


def test_mirrors_that_are_addresses_are_asked_in_turn(
    tmp_path: Path, storage: Path, server: Server, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as mirror:
        mirror.answers = [404]
        mirror.content = b"not the archive"
        bases = (mirror.url("a"), mirror.url("b/"))
        entry = published(server, archive, mirrors=bases)
        fetch("mine", entry, base=tmp_path)
        assert [request.path for request in mirror.requests] == ["/files/a/data.zip", "/files/b/data.zip"]
        said = capsys.readouterr().err
        assert "404 Not Found; trying the next place" in said
        assert f"15 bytes long on the server, published are {archive.stat().st_size:,}" in said
        assert len(server.requests) == 1
        shutil.rmtree(storage)
        mirror.content = archive.read_bytes()
        fetch("mine", entry, base=tmp_path)
        assert len(server.requests) == 1


def test_a_dataset_that_lies_unpacked_in_a_mirror_is_read_in_place(
    tmp_path: Path, storage: Path, server: Server, archive: Path
) -> None:
    entry = published(server, archive, terms="research only", mirrors=("have",))
    write_folder(tmp_path / "have")  # images/ and annotations/, of which nobody knows what they are of
    with pytest.raises(ValueError, match="accept_terms"):
        fetch("mine", entry, base=tmp_path)
    for name in ("mine", "data"):  # the dataset's name, or the archive's
        folder = (tmp_path / "have/images").parent / name
        write_folder(folder)
        assert open_sources(fetch("mine", entry, base=tmp_path)) == [folder]
        shutil.rmtree(folder / "annotations/training")
        with pytest.raises(ValueError, match="accept_terms"):
            fetch("mine", entry, base=tmp_path)
    assert server.requests == []


def test_unpacked_coco_and_cityscapes_are_known_by_their_folders(tmp_path: Path, storage: Path) -> None:
    params = load_params(PROJECT / "params.yaml")
    for split in ("train", "val"):
        put(tmp_path / f"data/leftImg8bit/{split}/a/p.png", b"x")
        put(tmp_path / f"data/gtFine/{split}/a/p.png", b"x")
        put(tmp_path / f"data/coco/{split}2017/p.jpg", b"x")
        put(tmp_path / f"data/coco/annotations/instances_{split}2017.json", b"x")
    facts = fetch("cityscapes", params.dataset("cityscapes"), base=tmp_path)
    assert open_sources(facts) == [tmp_path / "data"]
    with pytest.raises(ValueError, match="accept_terms"):  # COCO without its panoptic annotations
        fetch("coco", params.dataset("coco"), base=tmp_path)
    for split in ("train", "val"):
        put(tmp_path / f"data/coco/annotations/panoptic_{split}2017.json", b"x")
    facts = fetch("coco", params.dataset("coco"), base=tmp_path)
    assert open_sources(facts) == [tmp_path / "data/coco"]


def test_unpacked_objects_are_known_by_their_folders(tmp_path: Path, storage: Path) -> None:
    params = load_params(PROJECT / "params.yaml")
    for split in ("training", "validation"):
        for top in ("images", "annotations"):
            put(tmp_path / f"data/ADEChallengeData2016/{top}/{split}/p.png", b"x")
    with pytest.raises(ValueError, match="accept_terms"):  # without objects
        fetch("ade20k_objects", params.dataset("ade20k_objects"), base=tmp_path)
    for split in ("training", "validation"):
        put(tmp_path / f"data/ADEChallengeData2016/annotations_instance/{split}/p.png", b"x")
    for split in ("train", "val"):
        put(tmp_path / f"data/cityscapes/leftImg8bit/{split}/a/p.png", b"x")
        put(tmp_path / f"data/cityscapes/gtFine/{split}/a/p.png", b"x")
    for name, folder in (("ade20k_objects", "ADEChallengeData2016"), ("cityscapes_objects", "cityscapes")):
        assert open_sources(fetch(name, params.dataset(name), base=tmp_path)) == [tmp_path / "data" / folder]


def test_an_archive_of_two_datasets_is_kept_once(tmp_path: Path, storage: Path, archive: Path) -> None:
    first, second = (open_sources(fetch(name, config(sources=(str(archive),)), base=tmp_path)) for name in ("a", "b"))
    assert first == second


def test_unpacked_voc_is_known_by_its_folders_and_lists(tmp_path: Path, storage: Path, server: Server) -> None:
    entry = config(layout="voc", sources=(server.url("voc.tar"),), mirrors=("data",), terms="research", splits=VOC)
    put(tmp_path / "data/voc/JPEGImages/a.jpg", b"x")
    put(tmp_path / "data/voc/SegmentationClass/a.png", b"x")
    put(tmp_path / "data/voc/ImageSets/Segmentation/train.txt", b"a")
    with pytest.raises(ValueError, match="accept_terms"):  # without the list of the split val
        fetch("mine", entry, base=tmp_path)
    put(tmp_path / "data/voc/ImageSets/Segmentation/val.txt", b"a")
    assert open_sources(fetch("mine", entry, base=tmp_path)) == [tmp_path / "data/voc"]
    assert server.requests == []


# Before a download


def test_room_is_checked_for_all_that_is_missing_before_the_first_byte(
    tmp_path: Path, storage: Path, server: Server, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 2 * 2**20))
    server.files = {"a.zip": b"a" * 2**20, "b.zip": b"b" * 2**21}
    entry = config(sources=(server.url("a.zip"), server.url("b.zip")))
    for about in ({"bytes": (2**20, 2**21)}, {}):  # published, or as the server says
        with pytest.raises(ValueError, match=r"downloading mine takes 3\.0 MiB more, but only 2\.0 MiB are free"):
            fetch("mine", dataclasses.replace(entry, **about), base=tmp_path)
    assert server.requests == []


def test_the_published_datasets_say_what_they_weigh_and_ask_first(
    tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = load_params(PROJECT / "params.yaml")
    for name, said in (
        ("ade20k", "ADEChallengeData2016.zip (0.90 GiB)"),
        ("ade20k_objects", "ADEChallengeData2016.zip (0.90 GiB), annotations_instance.tar (86.2 MiB)"),
        ("cityscapes", "leftImg8bit_trainvaltest.zip (10.80 GiB), gtFine_trainvaltest.zip (0.24 GiB)"),
        ("coco", "train2017.zip (18.01 GiB), val2017.zip (0.76 GiB), annotations_trainval2017.zip (0.24 GiB), panop"),
    ):
        with pytest.raises(ValueError, match=rf"set datasets\.{name}\.accept_terms: true .*or put the archives where"):
            fetch(name, params.dataset(name), base=tmp_path)
        assert f"{name}: to be downloaded: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "coco"])
def test_samples_of_the_published_archives_come_as_the_archives_would(
    tmp_path: Path, storage: Path, server: Server, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    files, addresses = {
        "ade20k": (["ADEChallengeData2016-sample.zip"], [server.url("ADEChallengeData2016.zip")]),
        "cityscapes": (
            ["leftImg8bit_trainvaltest-sample.zip", "gtFine_trainvaltest-sample.zip"],
            [server.package(3, "leftImg8bit_trainvaltest.zip"), server.package(1, "gtFine_trainvaltest.zip")],
        ),
        "coco": (["coco-panoptic-sample.zip"], [server.url("panoptic_annotations_trainval2017.zip")]),
    }[name]
    samples = [shared(f"data/{file}") for file in files]
    for sample, address in zip(samples, addresses, strict=True):
        server.files[address.partition("#")[0].rpartition("/")[2]] = sample.read_bytes()
    server.accounts = {"me": "secret"}
    site = dataclasses.replace(LOGINS["cityscapes"], url=server.login_url)
    monkeypatch.setitem(LOGINS, "cityscapes", site)
    monkeypatch.setenv(site.username, "me")
    monkeypatch.setenv(site.password, "secret")
    server.drops = [100_000]
    entry = dataclasses.replace(
        load_params(PROJECT / "params.yaml").dataset(name),
        sources=tuple(addresses),
        bytes=tuple(sample.stat().st_size for sample in samples),
        sha256=tuple(sha256(sample) for sample in samples),
        accept_terms=True,
    )
    facts = fetch(name, entry, base=tmp_path)
    assert [source.sha256 for source in facts.sources] == list(entry.sha256)
    names = [address.rpartition("#" if "#" in address else "/")[2] for address in addresses]
    assert [path.name for path in open_sources(facts)] == names
    assert server.requests[1].range == "bytes=100000-"
    assert len(server.forms) == (2 if name == "cityscapes" else 0)


# Archives and folders on this machine


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
    assert [name for name in files(storage) if not name.startswith("verified/")] == []  # what was read is noted there


def test_an_archive_altered_after_fetching_is_noticed(tmp_path: Path, storage: Path) -> None:
    archive = zipped(write_folder(tmp_path / "d"), tmp_path / "mine.zip")
    facts = fetch("mine", config(sources=("mine.zip",)), base=tmp_path)
    with archive.open("ab") as file:  # the link shares its bytes
        file.write(b"x")
    with pytest.raises(ValueError, match=r"has changed since it was fetched.*run python -m stages\.fetch mine"):
        open_sources(facts)
    (storage / facts.sources[0].path).unlink()
    with pytest.raises(ValueError, match=r"missing from the storage root .*python -m stages\.fetch mine"):
        open_sources(facts)


def test_a_folder_is_read_in_place_and_known_by_names_sizes_and_contents(tmp_path: Path, storage: Path) -> None:
    folder = write_folder(tmp_path / "mine")
    facts = fetch("mine", config(sources=("mine",)), base=tmp_path)
    assert open_sources(facts) == [folder]
    assert str(tmp_path) not in str(facts)
    assert facts.sources[0].sha256 == folder_digest(folder)[0]
    (folder / "images/training/p0.jpg").rename(folder / "images/training/p7.jpg")
    with pytest.raises(ValueError, match="has changed since it was fetched"):
        open_sources(facts)


def test_a_folder_that_holds_storage_or_results_is_no_dataset(
    tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(storage.parent / "d")
    assert fetch("mine", config(sources=(str(storage.parent / "d"),)), base=tmp_path).sources[0].name == "d"
    with pytest.raises(ValueError, match=rf"^{storage.parent} is to be read as a dataset, but holds .*{storage.name},"):
        fetch("mine", config(sources=(str(storage.parent),)), base=tmp_path)
    monkeypatch.chdir(write_folder(tmp_path / "elsewhere/project"))
    with pytest.raises(ValueError, match="holds results, which changes with every command; move"):
        fetch("mine", config(sources=(".",)), base=Path.cwd())


def test_a_name_that_is_not_utf8_is_said_when_a_folder_is_fetched(tmp_path: Path, storage: Path) -> None:
    put(write_folder(tmp_path / "d") / os.fsdecode(b"images/training/\xff.png"), b"x")
    with pytest.raises(ValueError, match=r"d holds a file whose name is not UTF-8, 'images/training/\\udcff.png'; ren"):
        fetch("mine", config(sources=("d",)), base=tmp_path)


def test_what_is_missing_is_said_with_what_to_do(tmp_path: Path, storage: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.zip does not exist; put the archive or folder there, or change"):
        fetch("mine", config(sources=("gone.zip",)), base=tmp_path)
    with pytest.raises(ValueError, match="~nobody-of-this-name/a.zip names the home folder of a user that"):
        fetch("mine", config(sources=("~nobody-of-this-name/a.zip",)), base=tmp_path)
    with pytest.raises(ValueError, match=r"datasets\.mine\.sources is empty"):
        fetch("mine", config(), base=tmp_path)
    with pytest.raises(ValueError, match="s3://bucket/a.zip cannot be downloaded"):
        fetch("mine", config(sources=("s3://bucket/a.zip",)), base=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is empty"):
        fetch("mine", config(sources=("empty",)), base=tmp_path)


def test_generated_pictures_need_nothing(tmp_path: Path, storage: Path) -> None:
    facts = fetch("shapes", DatasetConfig(layout="shapes", generate={"train": 3, "seed": 7}), base=tmp_path)
    assert facts == FetchedDataset(dataset="shapes", sources=(), terms="", generate={"train": 3, "seed": 7})
    assert open_sources(facts) == []


# Killed


@pytest.mark.parametrize(
    "kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=[pytest.mark.slow, pytest.mark.full])]
)
def test_a_fetch_that_is_killed_at_random_moments_goes_on_with_the_next_byte(
    tmp_path: Path, server: Server, kills: int
) -> None:
    draw = random.Random(kills)
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as file:
        file.writestr("images/training/p.jpg", draw.randbytes(20 << 20))
    content = server.files["data.zip"] = (tmp_path / "made.zip").read_bytes()
    server.bytes_per_s = 20e6
    (tmp_path / "copy").mkdir()
    copy = Copy(tmp_path / "copy")
    copy.params["datasets"]["mine"] = {"layout": "folder", "sources": [server.url()]}
    copy.write_params()
    storage = copy.folder / "storage"

    def reached() -> int:
        """The byte up to which the last answer has come."""
        first = (server.requests[-1].range or "0").removeprefix("bytes=").removesuffix("-") if server.requests else "0"
        return int(first) + sum(server.sent[-1:])

    moments = sorted(draw.randrange(len(content)) for _ in range(kills * 3 // 4))
    moments += [len(content)] * (kills - len(moments))  # while it checks the archive and puts it in its place
    wanted: list[str | None] = [None]  # ranges that the next run may ask for
    interrupted = 0
    for moment in [*moments, None]:
        before = len(server.requests)
        server.held_from = math.inf if moment in (None, len(content)) else moment  # so that none is missed
        process = subprocess.Popen(
            [sys.executable, "-m", "stages.fetch", "mine"], cwd=copy.folder, stdout=subprocess.DEVNULL, text=True
        )
        while process.poll() is None and (moment is None or reached() < moment):
            time.sleep(0.001)
        if moment is not None:
            time.sleep(draw.uniform(0, 0.1))
            process.kill()
        ended = process.wait()
        assert ended == (0 if moment is None else ended)
        assert [request.range for request in server.requests[before:]] in ([], wanted), "what is here is not sent again"
        parts = [path.stat().st_size for path in storage.rglob("*.part")]
        interrupted += 0 < sum(parts) < len(content)
        wanted = [f"bytes={parts[0]}-" if parts[0] else None] if parts else wanted
    assert interrupted >= kills // 2
    assert sum(server.sent) <= len(content) + len(server.requests) * 2**19, "all but what was on its way came once"
    digest = hashlib.sha256(content).hexdigest()
    path = f"archives/{digest[:16]}/data.zip"
    source = FetchedSource(name="data.zip", bytes=len(content), sha256=digest, path=path)
    facts = read_result(FetchedDataset, "mine", results=copy.folder / "results")
    assert facts == FetchedDataset(dataset="mine", sources=(source,), terms="", generate={})
    assert (storage / path).read_bytes() == content
    assert files(storage) == [path, f"{Path(path).parent}/url.json"]
