from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.provenance import environment as module
from pipeline.provenance.environment import commit_word, environment


def test_the_environment_names_versions_and_device() -> None:
    import torch

    facts = environment(tf32="all", deterministic=True)
    assert facts.libraries["torch"] == torch.__version__.partition("+")[0]
    assert facts.device
    assert (facts.tf32 == "all") == (facts.cuda is not None)  # it means nothing without a GPU
    assert facts.deterministic is (True if facts.cuda else None)  # nor does this


def test_without_a_checkout_of_its_own_the_commit_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROJECT", tmp_path)
    monkeypatch.delenv("M2F_GIT_COMMIT", raising=False)
    assert module._git() == {"git_commit": None, "git_changed": None}
    assert commit_word() is None


def test_a_copy_of_the_checkout_knows_its_commit_from_the_word_that_travels_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *settings, *words], cwd=checkout, check=True, capture_output=True)

    checkout, copy = tmp_path / "checkout", tmp_path / "copy"
    (checkout / "m2f").mkdir(parents=True)
    (checkout / "m2f" / "a.py").write_text("A = 1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    for text, changed in (("A = 1\n", False), ("A = 2\n", True)):
        (checkout / "m2f" / "a.py").write_text(text)
        monkeypatch.setattr(module, "PROJECT", checkout)
        monkeypatch.delenv("M2F_GIT_COMMIT", raising=False)
        state, word = module._git(), commit_word()
        assert state["git_changed"] is changed and word is not None and len(word) == (48 if changed else 40)
        monkeypatch.setattr(module, "PROJECT", copy)
        monkeypatch.setenv("M2F_GIT_COMMIT", word)
        assert module._git() == state
