from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.report.paths import without_folders
from tests.helpers import made_up


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sqlite:////data/ann/mlflow.db", "sqlite:///mlflow.db"),
        ("no file '/data/store/runs/k0/curve.jsonl'", "no file 'curve.jsonl'"),
        ("file:///mnt/a/b.pkl", "file://b.pkl"),
        (f"see {Path.cwd()}/results/a.json", "see results/a.json"),
        (f"see {Path.home()}/store/a.json", "see ~/store/a.json"),
        ("of /" + "Users/ann", "of ~"),
    ],
)
def test_files_are_named_without_the_folders_of_a_machine(text: str, told: str) -> None:
    assert without_folders(text) == told


@pytest.mark.parametrize(
    "text",
    ["https://a.example/home/b/c.pkl", "s3://bucket/a/b", "9.5 pictures/s, 1/2", "runs/k0/curve.jsonl", "</b></a>"],
)
def test_what_is_no_path_of_a_machine_stays(text: str) -> None:
    assert without_folders(text) == text


def test_text_at_any_depth_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = made_up.trained_seed(0, status="failed", reason="lost /data/a/b", metrics={"x": 1.0})
    assert without_folders({"all": (seed,)}) == {"all": (dataclasses.replace(seed, reason="lost b"),)}


def test_from_the_folder_of_everything_other_addresses_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert without_folders("https://a.example/b") == "https://a.example/b"
