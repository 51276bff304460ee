from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.runs.checkpoints import (
    checkpoint_path,
    keep_only,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    set_aside_without_best,
)

STATE = {"best": {"step": 1, "miou": 0.1 + 0.2}, "train_s": 3.5}


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, seed: int = 0) -> Path:
    model, optimizer = trained(seed)
    return save_checkpoint(folder, step=step, run_key="abc", model=model, optimizer=optimizer, state=STATE)


def test_what_was_saved_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    model, optimizer = trained(seed=1)
    header = load_checkpoint(path, model=model, optimizer=optimizer, run_key="abc")
    original, original_optimizer = trained()
    assert header == {"run_key": "abc", "step": 7, "state": STATE}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    for mine, theirs in zip(model.parameters(), original.parameters(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[mine][key], original_optimizer.state[theirs][key])


def test_a_checkpoint_of_another_run_or_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    with pytest.raises(ValueError, match="belongs to run abc, not to xyz; its settings, data or code differ"):
        load_checkpoint(path, model=trained()[0], run_key="xyz")
    with pytest.raises(ValueError, match="belongs to another model: 2 entries differ, first bias"):
        load_checkpoint(path, model=nn.Linear(3, 5))


def test_a_damaged_newest_checkpoint_is_set_aside_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newest = save(tmp_path, 5), save(tmp_path, 6)
    newest.write_bytes(newest.read_bytes()[:100])
    assert newest_checkpoint(tmp_path) == older
    assert "step-00000006.safetensors cannot be read" in capsys.readouterr().err
    assert newest.with_suffix(".damaged").exists() and not newest.exists()


def test_a_checkpoint_whose_best_one_is_gone_or_damaged_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, newest = save(tmp_path, 1), save(tmp_path, 6)  # both name step 1 as the best
    set_aside_without_best(tmp_path)
    assert best.exists() and newest.exists()
    best.write_bytes(best.read_bytes()[:100])
    set_aside_without_best(tmp_path)
    assert newest.with_suffix(".damaged").exists() and not newest.exists()
    said = capsys.readouterr().err
    assert "step-00000001.safetensors cannot be read" in said
    assert "step-00000006.safetensors, whose best one it is, is set aside as step-00000006.damaged" in said


def test_only_the_wanted_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / ".step-00000004.safetensors.x7_2.part").touch()  # of a process that was killed
    keep_only(tmp_path, {1, 3})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        checkpoint_path(tmp_path, 1).name,
        checkpoint_path(tmp_path, 3).name,
    }


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 1)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert newest_checkpoint(tmp_path) is None


def test_a_state_comes_back_in_the_order_of_memory_of_its_parameter(tmp_path: Path) -> None:
    # The fused optimiser goes through parameter, gradient and state side by side, without looking at strides.
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 45).view(1, 3, 3, 5)).square().sum().backward()
        optimizer.step()

    model, optimizer = made()
    step(model, optimizer)
    path = save_checkpoint(tmp_path, step=1, run_key="abc", model=model, optimizer=optimizer, state=STATE)
    again, optimizer_again = made()
    load_checkpoint(path, model=again, optimizer=optimizer_again, run_key="abc")
    for each in ((model, optimizer), (again, optimizer_again)):
        step(*each)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
