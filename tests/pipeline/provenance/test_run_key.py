from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from m2f.config import OFF, ModelConfig
from pipeline.params.schema import AugmentationConfig, Row, SamplingConfig, TestConfig, TrainConfig
from pipeline.provenance import run_key as module
from pipeline.provenance.code import Written
from pipeline.provenance.run_key import TRAINING, TRAINING_WITH_FROZEN_PARTS, key_of, run_key, settings_facts


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
def key() -> Callable[..., str]:
    def make(row: Row, *, seed: int = 0, data: str = "d1", weights: str | None = "w1") -> str:
        return run_key(row, seed=seed, data_digest=data, weights_sha256=weights)

    return make


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
        dataclasses.replace(row, train=dataclasses.replace(train, freeze=("backbone",))),
    ]
    assert len({key(other) for other in [row, *others]}) == 7


def test_the_code_that_freezes_counts_in_rows_that_freeze_something_alone() -> None:
    freezing = {"m2f.weights.start.freeze"}
    of_all = {str(each) for each in Written.of(TRAINING).definitions}
    of_these = {str(each) for each in Written.of(TRAINING_WITH_FROZEN_PARTS).definitions}
    assert not freezing & of_all and of_these - of_all == freezing


def test_changed_code_changes_the_key(row: Row, key: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(row)
    monkeypatch.setattr(module, "code_digest", lambda code: "other code")
    assert key(row) != before


def test_class_weights_and_sampling_are_in_the_key_only_when_they_are_set(row: Row, key: Callable[..., str]) -> None:
    assert "class_weights" not in settings_facts(row.model)["loss"] and "sampling" not in settings_facts(row.train)
    weighted = dataclasses.replace(row.model, loss=dataclasses.replace(row.model.loss, class_weights=(1.0, 2.0, 1.0)))
    sampled = [
        dataclasses.replace(row.train, sampling=SamplingConfig(repeat_threshold=threshold)) for threshold in (0.1, 0.2)
    ]
    others = [dataclasses.replace(row, model=weighted), *(dataclasses.replace(row, train=train) for train in sampled)]
    assert len({key(other) for other in [row, *others]}) == 4


# Settings that are added later


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 2


@dataclass(frozen=True, kw_only=True)
class Before:
    rate: float = 0.1
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True)
class More:
    decay: float = 0.9


@dataclass(frozen=True, kw_only=True)
class After(Before):
    smoothing: float = field(default=0.0, metadata={OFF: 0.0})
    more: More | None = field(default=None, metadata={OFF: None})


@dataclass(frozen=True, kw_only=True)
class OnByDefault(Before):
    smoothing: float = field(default=0.5, metadata={OFF: 0.0})


def facts(settings: Any) -> str:
    return key_of(settings=settings_facts(settings))


def test_a_setting_that_is_added_keeps_every_key_at_its_off_value() -> None:
    assert facts(After()) == facts(Before())
    assert facts(After(smoothing=0.0, more=None)) == facts(Before())


def test_an_added_setting_that_is_not_off_gives_another_key() -> None:
    keys = {facts(Before()), facts(After(smoothing=0.1)), facts(After(more=More())), facts(OnByDefault())}
    assert len(keys) == 4
    assert facts(OnByDefault(smoothing=0.0)) == facts(Before())


def test_a_changed_default_gives_another_key() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Changed(Before):
        rate: float = 0.2

    assert facts(Changed()) != facts(Before())
    assert facts(Changed(rate=0.1)) == facts(Before())


def test_a_training_with_an_added_setting_has_the_key_that_it_had(row: Row, key: Callable[..., str]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class LaterTrain(TrainConfig):
        average: float = field(default=0.0, metadata={OFF: 0.0})

    values = {entry.name: getattr(row.train, entry.name) for entry in dataclasses.fields(row.train)}
    assert key(dataclasses.replace(row, train=LaterTrain(**values))) == key(row)
    assert key(dataclasses.replace(row, train=LaterTrain(**values, average=0.99))) != key(row)


def test_a_value_that_json_does_not_know_is_no_setting() -> None:
    with pytest.raises(TypeError, match="object in a row's settings cannot be part of a key"):
        settings_facts({"a": object()})
