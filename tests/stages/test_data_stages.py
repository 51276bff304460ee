"""fetch, shard, weights and storage as commands."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.storage.files import sha256
from pipeline.storage.results.data import ConvertedWeights, Manifest
from pipeline.storage.results.folder import read_result
from tests.helpers.coco_files import published, write_coco
from tests.helpers.images import encoded, labels, put, write_folder, zipped
from tests.helpers.waiting import LIMIT_S
from tests.pipeline.conftest import NO_WEIGHTS

PROJECT = Path(__file__).resolve().parents[2]

MINE = {"layout": "folder", "sources": ["data/mine.zip"], "class_names": ["sky", "road", "car"], "ignore_label": 9}


@pytest.fixture
def workspace(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml and a small archive, data/mine.zip, under a test storage root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    (tmp_path / "data").mkdir()
    zipped(write_folder(tmp_path / "mine"), tmp_path / "data/mine.zip")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"datasets": {"mine": MINE}, "weights": {"none": {}}}))
    return tmp_path


def stage(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=LIMIT_S)


def failure(*words: str) -> str:
    """The one line on stderr of a stage that fails."""
    ended = stage(*words)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    return ended.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_fetch_then_shard_write_their_facts_and_say_what_they_made(workspace: Path) -> None:
    fetched = stage("stages.fetch", "mine")
    assert fetched.returncode == 0, fetched.stderr
    assert "mine: mine.zip" in fetched.stdout
    sharded = stage("stages.shard", "mine")
    assert sharded.returncode == 0, sharded.stderr
    assert sharded.stdout.startswith("mine train: 3 images, 1 shard, ")
    table = (workspace / "results/plots/classes/mine.csv").read_text()
    assert table.startswith("class,split,pixels,images,instances\nsky,train,246,3,0\n")
    first = (workspace / "results/shard/mine.json").read_bytes()
    assert str(workspace).encode() not in first + (workspace / "results/fetch/mine.json").read_bytes()
    assert stage("stages.shard", "mine").returncode == 0
    assert (workspace / "results/shard/mine.json").read_bytes() == first


@pytest.mark.slow
def test_coco_archives_become_shards_without_being_unpacked(workspace: Path, storage: Path) -> None:
    sources = [str(path) for path in published(write_coco(workspace / "coco"), zipfile.ZIP_STORED)]
    classes = {"class_names": ["sky", "car", "dog"], "thing_classes": ["car", "dog"]}
    datasets = {"tiny": {"layout": "coco", "sources": sources, "splits": {"val": "val2017"}, **classes}}
    (workspace / "params.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    assert stage("stages.fetch", "tiny").returncode == 0
    sharded = stage("stages.shard", "tiny")
    assert sharded.returncode == 0, sharded.stderr
    assert sharded.stdout.startswith("tiny val: 2 images, 1 shard, ")
    manifest = read_result(Manifest, "tiny", results=workspace / "results")
    assert manifest.labels == ("instances", "panoptic", "semantic")
    assert [path.name for path in storage.rglob("*.png")] == ["samples.png"]

    datasets["tiny"]["splits"]["train"] = "train2017"
    (workspace / "params.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    assert "split train has neither annotations/panoptic_train2017.json nor" in failure("stages.shard", "tiny")


def test_wrong_names_and_missing_facts_end_in_one_sentence(workspace: Path) -> None:
    assert "no dataset is called 'mines'; did you mean 'mine'?" in failure("stages.fetch", "mines")
    assert "results/fetch/mine.json does not exist; make it with: dvc repro -f fetch@mine" in failure(
        "stages.shard", "mine"
    )
    assert "no weights entry is called 'nine'" in failure("stages.weights", "nine")
    assert "nowhere.yaml does not exist" in failure("stages.fetch", "mine", "--params", "nowhere.yaml")


@pytest.mark.slow
def test_a_bad_picture_leaves_no_manifest_and_no_shards(workspace: Path, storage: Path) -> None:
    put(workspace / "mine/annotations/training/p1.png", encoded(labels(4, 4)))
    zipped(workspace / "mine", workspace / "data/mine.zip")
    assert stage("stages.fetch", "mine").returncode == 0
    assert "p1.png is 4 x 4 (height x width), but its image" in failure("stages.shard", "mine")
    assert not (workspace / "results/shard").exists()
    assert list((storage / "shards").iterdir()) == []


def fetched_under(workspace: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    """stages.fetch mine, begun by a process whose command line is `dvc repro <targets>`."""
    program = workspace / "bin" / "dvc"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-m', 'stages.fetch', 'mine']).returncode)\n"
    )
    return subprocess.run([sys.executable, program, "repro", *targets], capture_output=True, text=True, timeout=LIMIT_S)


@pytest.mark.slow
def test_sharded_pictures_may_be_gone_unless_they_are_asked_for_by_name(workspace: Path) -> None:
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    params["datasets"] = {"mine": MINE}
    params["rows"] = {"own": {**params["rows"]["camvid_tiny"], "dataset": "mine"}}
    params["checkpoints"] = {}
    (workspace / "params.yaml").write_text(yaml.safe_dump(params))
    (workspace / "data/mine.zip").rename(workspace / "mine.zip")
    refused = fetched_under(workspace, "evaluate@own")  # nothing was fetched yet
    assert refused.returncode == 1
    assert "error: row own cannot be made here: it needs data/mine.zip (or another" in refused.stderr
    (workspace / "mine.zip").rename(workspace / "data/mine.zip")
    assert fetched_under(workspace, "evaluate@own").returncode == 0
    assert stage("stages.shard", "mine").returncode == 0
    before = (workspace / "results/fetch/mine.json").read_bytes()
    (workspace / "data/mine.zip").unlink()
    for targets in ((), ("evaluate@own",)):
        kept = fetched_under(workspace, *targets)
        assert kept.returncode == 0, kept.stderr
        assert "mine: mine.zip is not here; its shards stay in use" in kept.stderr
        assert (workspace / "results/fetch/mine.json").read_bytes() == before
    assert "mine.zip does not exist; put the archive" in fetched_under(workspace, "fetch@mine").stderr
    assert "mine.zip does not exist; put the archive" in failure("stages.fetch", "mine")


@pytest.mark.slow
def test_a_killed_sharding_goes_on_and_ends_with_the_same_bytes(workspace: Path) -> None:
    killed_and_resumed(workspace, images=600, kills=3, words=["--processes", "0"])


@pytest.mark.full
@pytest.mark.ray
def test_sharding_with_ray_killed_at_twenty_moments_ends_with_the_same_bytes(workspace: Path) -> None:
    killed_and_resumed(workspace, images=2000, kills=20, words=["--processes", "2"])


def killed_and_resumed(workspace: Path, *, images: int, kills: int, words: list[str]) -> None:
    """Shard once; then again, killed at random moments and begun anew whenever it had ended, to the end."""
    noise = np.random.default_rng(0)
    for index in range(images):
        image, name = noise.integers(0, 256, (64, 64, 3), np.uint8), f"training/q{index:05d}"
        put(workspace / f"mine/images/{name}.jpg", encoded(image, ".jpg"))
        put(workspace / f"mine/annotations/{name}.png", encoded(labels(64, 64)))
    zipped(workspace / "mine", workspace / "data/mine.zip")
    params = yaml.safe_load((workspace / "params.yaml").read_text())
    params["datasets"]["mine"] |= {"shard_mib": 1, "pixels": "raw"}
    (workspace / "params.yaml").write_text(yaml.safe_dump(params))
    assert stage("stages.fetch", "mine").returncode == 0
    begun_s = time.monotonic()
    whole = stage("stages.shard", "mine", *words)
    took_s = time.monotonic() - begun_s
    assert whole.returncode == 0, whole.stderr
    manifest = read_result(Manifest, "mine", results=workspace / "results")
    assert len(manifest.splits["train"].shards) >= 3
    root = workspace / "storage/shards"
    files = {path.name: sha256(path) for path in root.glob("*/*")}
    moments, result = random.Random(1), workspace / "results/shard/mine.json"
    for _ in range(kills):
        if result.exists():  # ended before it was killed
            shutil.rmtree(root)
            result.unlink()
        command = [sys.executable, "-m", "stages.shard", "mine", *words]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as sharding:
            time.sleep(moments.uniform(0.3, 1) * took_s)
            sharding.kill()
    resumed = stage("stages.shard", "mine", *words)
    assert resumed.returncode == 0, resumed.stderr
    assert read_result(Manifest, "mine", results=workspace / "results") == manifest
    assert {path.name: sha256(path) for path in root.glob("*/*")} == files
    assert [path.name for path in root.iterdir()] == [Path(manifest.samples.path).parent.name]


def test_no_weights_are_a_fact_too(workspace: Path) -> None:
    assert stage("stages.weights", "none").returncode == 0
    assert read_result(ConvertedWeights, "none", results=workspace / "results") == NO_WEIGHTS


def test_storage_lists_verifies_and_prunes_only_what_no_result_names(workspace: Path, storage: Path) -> None:
    stage("stages.fetch", "mine")
    stage("stages.shard", "mine")
    put(storage / "shards/0123456789abcdef/train-00000.arrow", b"x" * 2048)
    put(storage / "runs/fedcba9876543210/last.pt", b"x")
    listed = stage("stages.storage", "list").stdout
    assert "unnamed  shards/0123456789abcdef" in listed
    assert listed.count(" named ") == 2, listed
    assert "4 of 4 files" in stage("stages.storage", "verify").stdout  # archive, two shards, samples

    (workspace / "results").rename(workspace / "away")
    assert failure("stages.storage", "prune", "--yes", "--runs").startswith("error: results/ holds no result here")
    (workspace / "away").rename(workspace / "results")
    dry = stage("stages.storage", "prune")
    assert "would delete shards/0123456789abcdef" in dry.stdout
    assert "runs/" not in dry.stdout
    assert (storage / "shards/0123456789abcdef").exists()
    assert "deleted shards/0123456789abcdef" in stage("stages.storage", "prune", "--yes").stdout
    assert not (storage / "shards/0123456789abcdef").exists()
    assert (storage / "runs/fedcba9876543210").exists()
    assert "deleted runs/fedcba9876543210" in stage("stages.storage", "prune", "--yes", "--runs").stdout

    manifest = read_result(Manifest, "mine", results=workspace / "results")
    shard = manifest.splits["val"].shards[0].path
    (storage / shard).write_bytes(b"altered")
    found = hashlib.sha256(b"altered").hexdigest()
    verified = stage("stages.storage", "verify")
    assert verified.returncode == 1
    assert f"{shard} is altered: its sha256 is {found}" in verified.stdout


@pytest.mark.parametrize("name", ["fetch", "shard", "weights", "storage"])
def test_help_is_quick(name: str) -> None:
    loaded = "import sys, stages.{0}\nassert not {{'torch', 'numpy', 'cv2', 'pyarrow'}} & set(sys.modules)"
    ended = subprocess.run([sys.executable, "-c", loaded.format(name)], cwd=PROJECT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
