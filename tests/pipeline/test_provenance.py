from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from m2f.config import ModelConfig
from pipeline import provenance
from pipeline.params import AugmentationConfig, Row, TestConfig, TrainConfig
from pipeline.provenance import code_digest, commit_word, environment, run_key

CODE = '''
"""Module docstring."""
from math import pi

SCALE = 2.0
"""What SCALE means."""


class Box:
    """A box."""

    side: int = 3
    """Its side."""


def area(radius: float) -> float:
    """Area of a circle."""
    return SCALE * pi * radius**2  # a comment
'''


@pytest.fixture
def row() -> Row:
    return Row(
        name="a",
        dataset="d",
        model=ModelConfig(num_classes=3),
        train=TrainConfig(
            steps=100,
            augmentation=AugmentationConfig(crop=(64, 64), short_sides=(64, 96), long_side_max=256),
        ),
        test=TestConfig(short_side=64, long_side_max=256),
        seeds=(0, 1),
    )


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setattr(provenance, "TRAINING_MODULES", ("m2f.draws", "m2f.types"))

    def make(row: Row, *, seed: int = 0, data: str = "d1", weights: str | None = "w1") -> str:
        return run_key(row, seed=seed, data_digest=data, weights_sha256=weights)

    return make


def digest(folder: Path, code: str) -> str:
    (folder / "pack").mkdir(exist_ok=True)
    (folder / "pack" / "__init__.py").write_text("")
    (folder / "pack" / "thing.py").write_text(code)
    return code_digest(["pack", "pack.thing"], root=folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another comment"),
        ("  # a comment", ""),
        ("Area of a circle.", "The area, in squares of the radius's unit."),
        ('    """Area of a circle."""\n', ""),
        ('"""Module docstring."""\n', ""),
        ('"""What SCALE means."""\n', ""),
        ("SCALE * pi * radius**2", "(\n        SCALE * pi\n        * radius ** 2\n    )"),
        ("SCALE = 2.0\n", "\n\nSCALE   =   2.0\n"),
        ("SCALE = 2.0", "SCALE = 2.00"),
    ],
)
def test_comments_docstrings_and_formatting_keep_the_code_digest(tmp_path: Path, old: str, new: str) -> None:
    changed = CODE.replace(old, new)
    assert changed != CODE
    assert digest(tmp_path, changed) == digest(tmp_path, CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [("SCALE = 2.0", "SCALE = 2.5"), ("side: int = 3", "side: int = 4"), ("radius**2", "radius**3"), ("pi *", "pi +")],
)
def test_a_changed_constant_or_operation_changes_the_code_digest(tmp_path: Path, old: str, new: str) -> None:
    changed = CODE.replace(old, new)
    assert changed != CODE
    assert digest(tmp_path, changed) != digest(tmp_path, CODE)


def test_code_that_moves_to_another_module_changes_the_digest(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("A = 1\n")
    (tmp_path / "two.py").write_text("B = 2\n")
    before = code_digest(["one", "two"], root=tmp_path)
    (tmp_path / "one.py").write_text("A = 1\nB = 2\n")
    (tmp_path / "two.py").write_text("")
    assert code_digest(["one", "two"], root=tmp_path) != before


def test_the_syntax_tree_as_text_is_the_same_under_every_python() -> None:
    # Fields that newer Pythons add to these nodes (type_params, ...) are empty here, and empty fields are left out.
    import ast

    assert provenance._dump(ast.parse("def f(x: int = 1):\n    'doc'\n    return f'{x}!'")) == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='x', annotation=Name(id='int', ctx=Load()))], "
        "defaults=[Constant(value=1)]), body=[Return(value=JoinedStr(values=[FormattedValue(value=Name(id='x', "
        "ctx=Load()), conversion=-1), Constant(value='!')]))])])"
    )


def test_a_module_without_a_source_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"module pack\.absent has no source file under"):
        code_digest(["pack.absent"], root=tmp_path)


def test_a_run_key_is_16_hexadecimal_digits_and_repeats(row: Row, key: Callable[..., str]) -> None:
    assert len(key(row)) == 16
    assert int(key(row), 16) >= 0
    assert key(row) == key(dataclasses.replace(row))


def test_seed_data_and_weights_each_change_the_key(row: Row, key: Callable[..., str]) -> None:
    keys = {key(row), key(row, seed=1), key(row, data="d2"), key(row, weights="w2"), key(row, weights=None)}
    assert len(keys) == 5


def test_adding_a_seed_changes_no_other_seeds_key(row: Row, key: Callable[..., str]) -> None:
    more = dataclasses.replace(row, seeds=(0, 1, 2))
    assert [key(more, seed=s) for s in (0, 1)] == [key(row, seed=s) for s in (0, 1)]


def test_settings_that_shape_no_weights_keep_the_key(row: Row, key: Callable[..., str]) -> None:
    quiet = dataclasses.replace(row.train, log_every=1, checkpoint_interval=7)
    for other in (
        dataclasses.replace(row, train=quiet),
        dataclasses.replace(row, published={"miou": 50.0}, published_authors={"miou": 49.0}),
        dataclasses.replace(row, max_gpu_hours=1000.0),
        dataclasses.replace(row, test=TestConfig(short_side=96, long_side_max=256)),
        dataclasses.replace(row, name="b"),
    ):
        assert key(other) == key(row)


def test_settings_that_shape_the_weights_change_the_key(row: Row, key: Callable[..., str]) -> None:
    train = row.train
    others = [
        dataclasses.replace(
            row, train=dataclasses.replace(train, optimizer=dataclasses.replace(train.optimizer, lr=2e-4))
        ),
        dataclasses.replace(row, train=dataclasses.replace(train, steps=101)),
        dataclasses.replace(row, train=dataclasses.replace(train, groups=4)),
        dataclasses.replace(row, train=dataclasses.replace(train, precision="bf16")),
        dataclasses.replace(row, model=ModelConfig(num_classes=4)),
    ]
    assert len({key(other) for other in [row, *others]}) == 6


def test_a_changed_training_module_changes_the_key(
    row: Row, key: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(row)
    monkeypatch.setattr(provenance, "TRAINING_MODULES", ("m2f.draws",))
    assert key(row) != before


def test_the_environment_names_versions_and_device() -> None:
    import torch

    facts = environment(tf32="all")
    assert facts.libraries["torch"] == torch.__version__.partition("+")[0]
    assert facts.device
    assert (facts.tf32 == "all") == (facts.cuda is not None)  # it means nothing without a GPU


def test_without_a_checkout_of_its_own_the_commit_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    monkeypatch.delenv("M2F_GIT_COMMIT", raising=False)
    assert provenance._git() == {"git_commit": None, "git_changed": None}
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
        monkeypatch.setattr(provenance, "PROJECT", checkout)
        monkeypatch.delenv("M2F_GIT_COMMIT", raising=False)
        state, word = provenance._git(), commit_word()
        assert state["git_changed"] is changed and word is not None and len(word) == (48 if changed else 40)
        monkeypatch.setattr(provenance, "PROJECT", copy)
        monkeypatch.setenv("M2F_GIT_COMMIT", word)
        assert provenance._git() == state
