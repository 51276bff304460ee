"""The storage root as a folder and as the URL of a bucket, on a real S3 server."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from s3fs import S3FileSystem
from safetensors.torch import load_file

from pipeline.data.archives import file_names
from pipeline.data.download import check_space
from pipeline.data.fetch import fetch, open_sources
from pipeline.data.loader.train_batches import TrainingOrder, training_batches
from pipeline.data.loader.val_images import validation_images
from pipeline.data.shards import build
from pipeline.data.shards.reader import verify_shards
from pipeline.data.shards.writer import ShardFacts
from pipeline.evaluation.evaluate import evaluate_row
from pipeline.params.load import load_params
from pipeline.params.schema import AugmentationConfig, DatasetConfig, Row, TestConfig
from pipeline.report.write import write_report
from pipeline.runs.curve_file import read_curve
from pipeline.storage import host_cache
from pipeline.storage import root as storage
from pipeline.storage.files import copy_file, delete, files_below, local_file, sha256, whole_file, write_json
from pipeline.storage.inventory import copy_named, inventory, named_digests, wrong_file
from pipeline.storage.results.data import FetchedDataset, Manifest
from pipeline.storage.results.folder import read_result, write_result
from pipeline.storage.results.rows import TrainingResult
from pipeline.storage.root import in_project, root_at, storage_root, store_failure
from pipeline.storage.stores import ObjectStore
from stages import run
from tests.helpers.http_server import serving
from tests.helpers.images import config, put, write_folder, zipped
from tests.helpers.s3_server import KEYS, checking, cutting, user
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S, until
from tests.pipeline.conftest import NO_WEIGHTS

AUGMENTATION = AugmentationConfig(crop=(8, 8), short_sides=(12,), long_side_max=32)


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy is held from before."""
    monkeypatch.setattr(host_cache, "_held", {})


def forget_stores() -> None:
    """As in a new process, with what the environment says now."""
    storage._ask.cache_clear()
    S3FileSystem.clear_instance_cache()


def use(monkeypatch: pytest.MonkeyPatch, root: object) -> None:
    monkeypatch.setenv("M2F_STORAGE", str(root))


def entry(folder: Path, **changes: Any) -> DatasetConfig:
    """A dataset that lies in an archive, of which every shard holds one or two records."""
    archive = folder / "mine.zip"
    if not archive.exists():
        zipped(write_folder(folder / "mine", train=5), archive)
    return config(sources=(str(archive),), shard_mib=0.002, **changes)


def made(folder: Path, dataset: DatasetConfig, processes: int = 0) -> tuple[FetchedDataset, Manifest]:
    """What fetching and sharding say."""
    facts = fetch("mine", dataset, base=folder)
    return facts, build.build("mine", dataset, open_sources(facts), facts=facts.sources, processes=processes)


def drawn(manifest: Manifest, processes: int = 0) -> list[np.ndarray]:
    """Pixels and labels of some training batches and of all validation pictures."""
    batches = training_batches(
        TrainingOrder(manifest=manifest, augmentation=AUGMENTATION, seed=1, global_batch=2),
        first_step=0,
        steps=4,
        image_range=range(2),
        processes=processes,
    )
    arrays = [array.numpy() for batch in batches for array in (batch.images, batch.segments)]
    images = validation_images(manifest, TestConfig(short_side=12, long_side_max=32), processes=processes)
    return arrays + [image.image.numpy() for image in images]


# What a URL may be


def test_a_url_of_files_is_their_folder_and_a_url_of_another_driver_a_root(tmp_path: Path) -> None:
    assert root_at(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert isinstance(root_at(str(tmp_path)), Path)
    assert str(root_at("memory://x/y/") / "z") == "memory://x/y/z"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("abfs://bucket/x", r"storage root abfs://bucket/x cannot be used: its driver is not installed \(.*adlfs"),
        ("nonsense://x", "storage root nonsense://x cannot be used: .*nonsense"),
    ],
)
def test_a_driver_that_is_missing_is_one_sentence(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        root_at(url)


@pytest.mark.parametrize("setting", ["s3://", "s3:/bucket/m2f", "s3:///m2f", "s3://<bucket>/m2f", "gs:bucket"])
def test_a_root_without_a_bucket_is_not_taken_for_a_folder(setting: str) -> None:
    with pytest.raises(ValueError, match=f"root {setting} names no bucket; set M2F_STORAGE as {setting[:2]}://bucket/"):
        root_at(setting)


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="must not hold a password") as error:
        root_at("s3://key:hidden@bucket/x")
    assert "hidden" not in str(error.value)


def test_a_bucket_that_is_not_there_is_one_sentence(bucket: Path) -> None:
    with pytest.raises(
        ValueError, match=r"root s3://no-such-bucket/x cannot be used: there is no no-such-bucket; make"
    ):
        root_at("s3://no-such-bucket/x")


def test_credentials_that_are_missing_are_one_sentence(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    forget_stores()
    with pytest.raises(ValueError, match="cannot be used: Unable to locate credentials; .*AWS_ACCESS_KEY_ID"):
        root_at(f"{storage_url(bucket)}/other")


def test_credentials_that_are_refused_are_one_sentence_without_them(bucket: Path, s3: str) -> None:
    forget_stores()
    with (
        checking(s3),
        pytest.raises(ValueError, match=r"cannot be used: the credentials are refused \(.*AWS_ACCESS_KEY_ID") as error,
    ):
        root_at(f"{storage_url(bucket)}/other")
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(error.value)


READ = ("HeadBucket", "ListBucket", "GetObject")
RIGHTS = (
    "the credentials need the right to list, read, write and delete objects (for s3://: s3:ListBucket, s3:GetObject"
)


def become(monkeypatch: pytest.MonkeyPatch, keys: dict[str, str]) -> None:
    """From now on the process is another user of the store."""
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    forget_stores()


def test_who_may_only_read_is_told_so_before_a_download_or_sharding_and_where_something_is_written(
    bucket: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = entry(tmp_path)
    facts = fetch("mine", dataset, base=tmp_path)
    before = files_below(bucket)
    become(monkeypatch, user(s3, *READ))

    def refused(what: str) -> Any:
        return pytest.raises(ValueError, match=f"^s3://.*/some/prefix{what} .*AccessDenied.*; {re.escape(RIGHTS)}")

    with checking(s3):
        sources = open_sources(facts)
        with refused("/new.json may not be written"):
            write_json(storage_root() / "new.json", 1)
        with refused(f"/{facts.sources[0].path} may not be copied to s3://.*/b"):
            copy_file(storage_root() / facts.sources[0].path, storage_root() / "b")
        with refused(" may not be written"):
            check_space("downloading a", 1)
        with refused(" may not be written"):
            build.build("mine", dataset, sources, facts=facts.sources, processes=0)
    become(monkeypatch, KEYS)
    assert files_below(bucket) == before


def test_who_may_use_a_part_of_a_bucket_alone_may_have_the_storage_root_there(
    bucket: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(bucket).removeprefix("s3://")
    become(monkeypatch, user(s3, "ListBucket", "GetObject", "PutObject", "DeleteObject", below=name))
    with checking(s3):
        for name in ("a/old.json", "a/new.json"):
            write_json(storage_root() / name, 1)
        delete(storage_root() / "a/old.json")
        check_space("downloading a", 1)
        assert files_below(storage_root()) == {"a/new.json": 2}


def test_what_a_store_refuses_a_stage_is_one_line(
    bucket: Path, s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(bucket / "there.json", 1)
    for rights, said in (
        (
            (),
            r"storage root s3://\S+ cannot be used: the credentials are refused \(.*AccessDenied.* the ListObjectsV2 ",
        ),
        (("HeadBucket", "ListBucket"), r"the storage root s3://\S+ may not be used so \(.* the HeadObject operation: "),
    ):
        become(monkeypatch, user(s3, *rights or ("GetBucketAcl",)))
        with checking(s3), pytest.raises(SystemExit):
            run(lambda: print((storage_root() / "there.json").read_text()))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and re.search(f"error: (the )?{said}", lines[0]) and RIGHTS in lines[0], lines


def test_a_store_that_does_not_answer_is_one_sentence_within_seconds(
    bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ANSWER_S", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        forget_stores()
        began = time.monotonic()
        with pytest.raises(ValueError, match="has not answered for 1 s; .*AWS_ENDPOINT_URL"):
            root_at(f"{storage_url(bucket)}/other")
        assert time.monotonic() - began < 30  # the driver takes a minute, and then tries again


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_storage_root_that_may_not_be_written_ends_a_stage_in_a_sentence(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise OSError(number, os.strerror(number), "/data/runs/k")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        f"error: /data/runs/k: {os.strerror(number)}; let this user read and write there, or set M2F_STORAGE to a "
        "storage root where it may\n"
    )


LIST = f"""
import sys
from pipeline.storage import root as storage
from stages import run
from stages.storage import main

storage.ANSWER_S = {LIMIT_S}  # the driver's own attempts come to their end first
sys.argv = ["storage", "list"]
run(main)
"""


@pytest.mark.slow
def test_an_endpoint_where_nothing_is_ends_a_stage_in_one_sentence(bucket: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nothing = f"http://127.0.0.1:{unused.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "-c", LIST],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "AWS_ENDPOINT_URL": nothing},
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith(
        f"error: the storage root {bucket} cannot be used: Could not connect to the endpoint"
    )
    assert ended.stderr.count("\n") == 1


def storage_url(bucket: Path) -> str:
    return str(bucket).rpartition("/")[0]


# Uploads


def test_an_upload_that_is_cut_off_leaves_nothing_and_ends_a_stage_in_one_sentence(
    bucket: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # with the driver's own, it is five
    with cutting(s3, allowed=300_000) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        forget_stores()

        def upload() -> None:
            with whole_file(storage_root() / "weights/new") as partial:
                partial.write_bytes(os.urandom(1 << 20))

        with pytest.raises(SystemExit) as ended:
            run(upload)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the storage root does not work any more: ")
    assert said.count("\n") == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    forget_stores()
    assert files_below(storage_root()) == {}


def test_only_what_a_driver_raises_is_called_the_stores_failure() -> None:
    class Lost(Exception):
        """As Ray raises what a task raised."""

        def __init__(self, cause: Exception) -> None:
            self.cause = cause

    from botocore.exceptions import EndpointConnectionError

    error = EndpointConnectionError(endpoint_url="http://127.0.0.1:1")
    assert "Could not connect" in store_failure(Lost(error))
    assert store_failure(RuntimeError("ours")) == store_failure(Lost(KeyError("ours"))) == ""


# From archive to batches


def test_a_bucket_gives_the_facts_manifest_and_batches_that_a_folder_gives(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = entry(tmp_path)
    in_bucket = made(tmp_path, dataset)
    use(monkeypatch, tmp_path / "storage")
    in_folder = made(tmp_path, dataset)
    assert in_bucket == in_folder
    expected = drawn(in_folder[1])
    use(monkeypatch, bucket)
    for found in (drawn(in_bucket[1]), drawn(in_bucket[1], processes=2)):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    same = {name for name in files_below(tmp_path / "storage") if not name.startswith("verified/")}
    assert set(files_below(bucket)) == same
    for name in same:
        assert sha256(bucket / name) == sha256(tmp_path / "storage" / name)


def test_a_compressed_tar_archive_lies_in_the_bucket_decompressed_too(bucket: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "mine.tgz", "w:gz") as archive:
        archive.add(write_folder(tmp_path / "d"), ".")
    dataset = config(sources=("mine.tgz",))
    facts = fetch("mine", dataset, base=tmp_path)
    assert fetch("mine", dataset, base=tmp_path) == facts
    folder = f"archives/{sha256(tmp_path / 'mine.tgz')[:16]}"
    assert set(files_below(bucket)) == {f"{folder}/mine.tgz", f"{folder}/mine.decompressed.tar"}
    (copy,) = open_sources(facts)
    assert sha256(copy) == facts.sources[0].sha256
    assert file_names(copy) == file_names(tmp_path / "d")


def test_an_archive_that_is_downloaded_goes_to_the_bucket_and_is_known_there(
    bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = Path(entry(tmp_path).sources[0])
    with serving() as server:
        server.files["mine.zip"] = archive.read_bytes()
        server.drops = [100, 2000]  # the connection ends twice, and the download goes on
        dataset = config(sources=(server.url("mine.zip"),))
        facts = fetch("mine", dataset, base=tmp_path)
        assert [request.range for request in server.requests] == [None, "bytes=100-", "bytes=2000-"]
        assert fetch("mine", dataset, base=tmp_path) == facts
        assert len(server.requests) == 3, "what is in the bucket is not downloaded again"
    digest = sha256(archive)
    assert facts.sources[0].path == f"archives/{digest[:16]}/mine.zip"
    assert set(files_below(bucket)) == {f"archives/{digest[:16]}/{name}" for name in ("mine.zip", "url.json")}
    assert not list((tmp_path / "cache").rglob("*.part"))
    (copy,) = open_sources(facts)
    assert copy == tmp_path / "cache/m2f" / digest / "mine.zip"
    assert copy.read_bytes() == archive.read_bytes()


def test_a_folder_is_read_in_place_and_only_here(
    bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "pictures")
    facts, _ = made(tmp_path, config(sources=("pictures",)))
    assert f"not copied to {bucket}: only hosts that see it there can make shards of it" in capsys.readouterr().err
    (tmp_path / "pictures").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="pictures is gone, or on another host"):
        open_sources(facts)


@pytest.mark.slow
def test_an_interrupted_build_goes_on_shard_by_shard(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = entry(tmp_path)
    expected = made(tmp_path, dataset)
    for path in ("shards", "archives"):
        delete(bucket / path)
    facts = fetch("mine", dataset, base=tmp_path)
    make, names = build.make_shard, list[str]()

    def make_two(job: Any, *arguments: Any) -> ShardFacts:
        if len(names) == 2:
            raise KeyboardInterrupt
        names.append(job.name)
        return make(job, *arguments)

    monkeypatch.setattr(build, "make_shard", make_two)
    with pytest.raises(KeyboardInterrupt):
        build.build("mine", dataset, open_sources(facts), facts=facts.sources, processes=0)
    assert names == ["train-00000", "train-00001"]
    assert not [
        item
        for item in inventory(tmp_path / "results")
        if item.path.startswith("shards/") and ".building-" not in item.path
    ]

    # the last step, the copy within the store, is interrupted too
    copy, copied = ObjectStore.copy_to, list[Path]()

    def copy_three(source: ObjectStore, target: Path) -> None:
        if len(copied) == 3:
            raise KeyboardInterrupt
        copied.append(target)
        copy(source, target)

    monkeypatch.setattr(build, "make_shard", lambda job, *rest: (names.append(job.name), make(job, *rest))[1])
    monkeypatch.setattr(ObjectStore, "copy_to", copy_three)
    with pytest.raises(KeyboardInterrupt):
        build.build("mine", dataset, open_sources(facts), facts=facts.sources, processes=0)
    assert len(names) == len(set(names)) == sum(len(split.shards) for split in expected[1].splits.values())
    half = copied[0].parent
    assert not (half / "build.json").exists(), "the mark of a whole set comes last"

    monkeypatch.setattr(ObjectStore, "copy_to", copy)
    monkeypatch.setattr(build, "make_shard", make_two)  # none is left to be made
    assert made(tmp_path, dataset) == expected
    assert [path.name for path in (bucket / "shards").iterdir()] == [half.name]


@pytest.mark.slow
def test_what_is_altered_in_the_bucket_is_reported_and_made_again(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = entry(tmp_path)
    facts, manifest = made(tmp_path, dataset)
    write_result(facts, "mine", results=tmp_path / "results")
    write_result(manifest, "mine", results=tmp_path / "results")
    shard = manifest.splits["train"].shards[0]
    right = (bucket / shard.path).read_bytes()
    (bucket / shard.path).write_bytes(b"x" + right[1:])
    with pytest.raises(ValueError, match=r"train-00000\.arrow is truncated or altered: .*; make it again"):
        drawn(manifest)
    assert wrong_file(shard.path, shard.sha256).startswith(f"{shard.path} is altered")
    (bucket / shard.path).write_bytes(right[:-1])
    with pytest.raises(
        ValueError, match=r"train-00000\.arrow is truncated .*: .* bytes; make it again with: python -m"
    ):
        verify_shards(manifest, "train")
    (bucket / shard.path).unlink()
    with pytest.raises(ValueError, match=r"is missing from the storage root s3://.*; make it again with: python -m"):
        verify_shards(manifest, "train")
    assert made(tmp_path, dataset) == (facts, manifest)
    assert (bucket / shard.path).read_bytes() == right

    archive = bucket / facts.sources[0].path
    archive.write_bytes(b"x" + archive.read_bytes()[1:])
    for copy in (tmp_path / "cache").rglob("mine.zip"):
        copy.unlink()
    host_cache._held.clear()
    with pytest.raises(ValueError, match=r"mine\.zip is truncated or altered"):
        open_sources(facts)
    assert made(tmp_path, dataset) == (facts, manifest)


def test_a_host_copies_a_file_once_and_says_when_it_has_no_room(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, manifest = made(tmp_path, entry(tmp_path))
    shard = manifest.splits["train"].shards[0]
    path = storage_root() / shard.path
    with local_file(path, shard.sha256) as copy:
        assert copy == tmp_path / "cache/m2f" / shard.sha256 / "train-00000.arrow"
    path.unlink()
    with local_file(path, shard.sha256) as again:
        assert again.read_bytes() == copy.read_bytes()
    monkeypatch.setenv("M2F_SHARD_CACHE", str(tmp_path / "small"))
    monkeypatch.setenv("M2F_SHARD_CACHE_GIB", "0.000001")
    other = manifest.splits["train"].shards[1]
    with (
        pytest.raises(
            ValueError, match=r"train-00001\.arrow \(0\.0 MiB\) has no room in .*small, .*M2F_SHARD_CACHE to a folder"
        ),
        local_file(storage_root() / other.path, other.sha256),
    ):
        pass


def test_a_file_without_a_digest_is_copied_for_as_long_as_it_is_read(bucket: Path) -> None:
    (bucket / "runs/x/note").write_text("hello")
    with local_file(bucket / "runs/x/note") as copy:
        assert (copy.name, copy.read_text()) == ("note", "hello")
    assert not copy.exists()


TWO_HOSTS = """
import dataclasses, json, os, sys
from functools import partial
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from pipeline.data.shards import build as shards
from pipeline.data.archives import file_names
from pipeline.data.download import check_space
from pipeline.data.fetch import fetch, open_sources
from pipeline.params.schema import DatasetConfig
from pipeline.storage.results.folder import write_result

folder, ray_dir = map(Path, sys.argv[1:])
settings = json.loads((folder / "dataset.json").read_text())
listed = shards.folder.records

def noted(read):
    if ray.is_initialized():  # not when shards are planned
        (folder / "hosts" / ray.get_runtime_context().get_node_id()).touch()
    return read()

shards.folder.records = lambda *arguments: [
    dataclasses.replace(record, read=partial(noted, record.read)) for record in listed(*arguments)
]
shards.FEW_RECORDS = 1
nothing = {"include_dashboard": False, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": str(ray_dir), **nothing})
try:
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    os.environ["RAY_ADDRESS"] = cluster.address
    config = DatasetConfig(**settings)
    facts = fetch("mine", config, base=folder)
    manifest = shards.build("mine", config, open_sources(facts), facts=facts.sources)
    write_result(manifest, "mine", results=folder / "results")
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_two_hosts_make_the_bytes_that_one_makes(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = entry(tmp_path)
    use(monkeypatch, tmp_path / "storage")
    _, alone = made(tmp_path, dataset)
    use(monkeypatch, bucket)
    (tmp_path / "hosts").mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps(dataclasses.asdict(dataset)))
    with tempfile.TemporaryDirectory(prefix="m2f-ray-", dir="/tmp") as ray:  # Ray's socket paths must be short
        ended = subprocess.run(
            [sys.executable, "-c", TWO_HOSTS, str(tmp_path), ray],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert read_result(Manifest, "mine", results=tmp_path / "results") == alone
    for shard in alone.splits["train"].shards:
        assert (bucket / shard.path).read_bytes() == (tmp_path / "storage" / shard.path).read_bytes()
    assert len(list((tmp_path / "hosts").iterdir())) == 2


# Listing and copying


def test_what_results_name_is_copied_to_a_bucket_and_back(
    tmp_path: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tmp_path / "one")
    facts, manifest = made(tmp_path, entry(tmp_path))
    results = tmp_path / "results"
    write_result(facts, "mine", results=results)
    write_result(manifest, "mine", results=results)
    put(tmp_path / "one/runs/abc/checkpoints/step-1.safetensors", b"weights")
    put(tmp_path / "one/runs/abc/curve.jsonl", b"{}\n")
    put(tmp_path / "one/runs/abc/.curve.jsonl.x.part", b"{")
    put(tmp_path / "one/runs/other/curve.jsonl", b"{}\n")
    digest = sha256(tmp_path / "one/runs/abc/checkpoints/step-1.safetensors")
    last = {"step": 1, "path": "checkpoints/step-1.safetensors", "sha256": digest}
    write_json(results / "train/mine.json", {"seeds": [{"run_dir": "runs/abc", "checkpoints": {"last": last}}]})
    assert named_digests(results)["runs/abc/checkpoints/step-1.safetensors"] == digest

    nobodys = ("runs/other/", "verified/")
    kept = (name for name in files_below(tmp_path / "one") if not name.startswith(nobodys))
    named = {name for name in kept if not name.endswith(".part")}
    assert copy_named(bucket, results) == (len(named), len(named))
    assert set(files_below(bucket)) == named
    assert copy_named(bucket, results) == (len(named), 0)
    (bucket / "runs/abc/curve.jsonl").unlink()
    assert copy_named(bucket, results) == (len(named), 1)

    use(monkeypatch, bucket)
    assert copy_named(tmp_path / "two", results) == (len(named), len(named))
    for name in named:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert copy_named(root_at(f"{storage_url(bucket)}/another"), results) == (len(named), len(named))

    (bucket / "runs/abc/checkpoints/step-1.safetensors").write_text("altered")
    with pytest.raises(ValueError, match=r"step-1\.safetensors has not the sha256 that results/ says"):
        copy_named(tmp_path / "three", results)


# A row

TRAIN = """
import pickle
from pathlib import Path
from pipeline.training.seeds import train_row

row, manifest, weights = pickle.loads(Path("job.pickle").read_bytes())
train_row(row, manifest=manifest, weights=weights, results=Path("results"))
"""


def copy_shards(source: Path, target: Path) -> None:
    """The shards of one storage root into another."""
    for name, size in files_below(source).items():
        if name.startswith("shards/"):
            copy_file(source / name, target / name)
            assert (target / name).stat().st_size == size


def training(folder: Path, row: Row, manifest: Manifest) -> subprocess.Popen[bytes]:
    """A process that trains a row with what is in the environment, and writes its result into the folder."""
    (folder / "job.pickle").write_bytes(pickle.dumps((row, manifest, NO_WEIGHTS)))
    with open(folder / "log", "ab") as log:
        return subprocess.Popen([sys.executable, "-c", TRAIN], cwd=folder, stdout=log, stderr=log)


@pytest.mark.long
def test_a_killed_row_in_a_bucket_goes_on_and_ends_as_an_undisturbed_one_in_a_folder(
    bucket: Path,
    empty_mlflow: Path,
    tmp_path: Path,
    small_data: tuple[Path, Manifest],
    small_row: Row,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = small_data[1]
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("M2F_WORKERS", "0")
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for root in (bucket, tmp_path / "storage"):
        copy_shards(small_data[0], root)
    train = dataclasses.replace(small_row.train, steps=40, val_interval=20, checkpoint_interval=2)
    row = dataclasses.replace(small_row, train=train, seeds=(1,))

    first = training(tmp_path, row, manifest)
    until(
        lambda: any("/checkpoints/step-00000004" in name for name in files_below(bucket)),
        ended=lambda: first.poll() is not None,
        said=lambda: (tmp_path / "log").read_text()[-3000:],
    )
    first.send_signal(signal.SIGKILL)
    first.wait()
    (curve,) = bucket.glob("runs/*/curve.jsonl")
    assert len(read_curve(curve)) >= 4, "points are stored before the checkpoint that follows them"
    second = training(tmp_path, row, manifest)
    assert second.wait(LIMIT_S) == 0, (tmp_path / "log").read_text()[-3000:]
    assert "going on from step" in (tmp_path / "log").read_text()
    results = tmp_path / "results"
    resumed = read_result(TrainingResult, "small", results=results)
    evaluated = evaluate_row(row, manifest=manifest, trained=resumed)
    points = read_curve(curve)
    (seed,) = resumed.seeds
    assert seed.checkpoints is not None
    last = bucket / seed.run_dir / seed.checkpoints.last.path
    with local_file(last, seed.checkpoints.last.sha256) as file:
        weights = load_file(file)
    write_result(evaluated, "small", results=results)
    params = load_params(PROJECT / "params.yaml")
    write_report(dataclasses.replace(params, rows={"small": row}), results=results, out=tmp_path / "reports")
    page = (tmp_path / "reports/index.html").read_text()
    assert seed.run_key in page and "data:image/jpeg;base64," in page
    assert not wrong_file(f"{seed.run_dir}/checkpoints/{last.name}", sha256(last))

    use(monkeypatch, tmp_path / "storage")
    undisturbed = training(tmp_path, row, manifest)
    assert undisturbed.wait(LIMIT_S) == 0, (tmp_path / "log").read_text()[-3000:]
    trained = read_result(TrainingResult, "small", results=results)
    (seed,) = trained.seeds
    assert seed.checkpoints is not None
    run_dir = tmp_path / "storage" / seed.run_dir
    assert points == read_curve(run_dir / "curve.jsonl")
    expected = load_file(run_dir / seed.checkpoints.last.path)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert evaluate_row(row, manifest=manifest, trained=trained).median == evaluated.median


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.full
def test_seeds_train_on_ray_workers_into_a_bucket_and_leave_nothing_of_rays_there(
    bucket: Path,
    empty_mlflow: Path,
    tmp_path: Path,
    small_data: tuple[Path, Manifest],
    small_row: Row,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("M2F_WORKERS", "2")
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    copy_shards(small_data[0], bucket)
    train = dataclasses.replace(small_row.train, steps=4, val_interval=4)
    row = dataclasses.replace(small_row, train=train, seeds=(1, 2))
    with tempfile.TemporaryDirectory(prefix="ray") as ray:  # a short path, for Ray has sockets there
        monkeypatch.setenv("RAY_TMPDIR", ray)
        process = training(tmp_path, row, small_data[1])
        assert process.wait(LIMIT_S) == 0, (tmp_path / "log").read_text()[-3000:]
    seeds = read_result(TrainingResult, "small", results=tmp_path / "results").seeds
    assert [(entry.status, entry.workers) for entry in seeds] == [("finished", 2)] * 2
    for entry in seeds:
        assert [point["step"] for point in read_curve(bucket / entry.run_dir / "curve.jsonl")] == [1, 2, 3, 4]
        assert entry.checkpoints is not None
        last = entry.checkpoints.last
        assert not wrong_file(f"{entry.run_dir}/{last.path}", last.sha256)
        assert f"small seed {entry.seed}: 4 steps in" in (tmp_path / "log").read_text()
    assert not [name for name in files_below(bucket) if "/ray/" in name]


def test_an_experiment_in_a_temporary_folder_has_the_projects_storage_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (storage_root(), in_project("data")) == (tmp_path / "storage", tmp_path / "data")
    monkeypatch.setenv("DVC_ROOT", "/project")
    assert (storage_root(), in_project("data")) == (Path("/project/storage"), Path("/project/data"))
    assert in_project("/elsewhere/data") == Path("/elsewhere/data")
    use(monkeypatch, "large/files")
    assert storage_root() == Path("/project/large/files")
    use(monkeypatch, tmp_path / "own")
    assert storage_root() == tmp_path / "own"
