from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from m2f.config import OptimizerConfig, ScheduleConfig
from m2f.optim import (
    build_optimizer,
    learning_rate,
    learning_rate_factor,
    parameter_groups,
)

REFERENCE = Path(__file__).parents[1] / "reference"


class Toy(nn.Module):
    """The network's parameter names in miniature."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.pixel_decoder = nn.ModuleDict({"norm": nn.GroupNorm(2, 4), "level_encoding": nn.Embedding(3, 4)})
        self.query_decoder = nn.ModuleDict(
            {
                "query_position": nn.Embedding(5, 4),
                "query_feature": nn.Embedding(5, 4),
                "level_embedding": nn.Embedding(3, 4),
                "norm": nn.LayerNorm(4),
                "class_head": nn.Linear(4, 3),
            }
        )
        for parameter in self.backbone[2].parameters():
            parameter.requires_grad = False


def test_groups_are_few_and_hold_every_trainable_parameter_once():
    model = Toy()
    groups = parameter_groups(model, OptimizerConfig())
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {(g["lr"], g["weight_decay"]): [names[p] for p in g["params"]] for g in groups} == {
        (1e-5, 0.05): ["backbone.0.weight"],
        (1e-5, 0.0): ["backbone.1.weight", "backbone.1.bias"],
        (1e-4, 0.0): [
            "pixel_decoder.norm.weight",
            "pixel_decoder.norm.bias",
            "query_decoder.query_position.weight",
            "query_decoder.query_feature.weight",
            "query_decoder.level_embedding.weight",
            "query_decoder.norm.weight",
            "query_decoder.norm.bias",
        ],
        (1e-4, 0.05): [
            "pixel_decoder.level_encoding.weight",
            "query_decoder.class_head.weight",
            "query_decoder.class_head.bias",
        ],
    }


def test_one_rate_for_the_backbone_too_makes_two_groups():
    groups = parameter_groups(Toy(), OptimizerConfig(backbone_lr_factor=1.0))
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-4, 0.05), (1e-4, 0.0)]


def test_a_shared_parameter_is_listed_once():
    model = Toy()
    model.query_decoder["class_head_again"] = model.query_decoder["class_head"]
    model.query_decoder["tied"] = nn.Linear(4, 3)
    model.query_decoder["tied"].weight = model.query_decoder["class_head"].weight
    parameters = [p for g in parameter_groups(model, OptimizerConfig()) for p in g["params"]]
    assert len(parameters) == len(set(parameters)) == 14


def test_learning_rates_equal_the_reference_schedule():
    expected = json.loads((REFERENCE / "schedule.json").read_text())["lr"]
    for step, rate in expected.items():
        ours = learning_rate(1e-4, int(step), steps=90_000, schedule=ScheduleConfig())
        assert ours == pytest.approx(rate, rel=1e-8, abs=0), step


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_the_last_step_runs_at_exactly_zero(warmup_steps):
    assert learning_rate_factor(9, steps=10, schedule=ScheduleConfig(warmup_steps=warmup_steps)) == 0


def test_warm_up_rises_linearly_on_top_of_the_schedule():
    plain, warm = ScheduleConfig(power=1.0), ScheduleConfig(power=1.0, warmup_steps=3)
    factors = [learning_rate_factor(step, steps=9, schedule=warm) for step in range(9)]
    # poly falls by 1/8 per step; warm-up multiplies by 1/4, 2/4, 3/4, 1
    assert factors[:4] == pytest.approx([1 / 4, 7 / 8 / 2, 6 / 8 * 3 / 4, 5 / 8])
    assert factors[3:] == [learning_rate_factor(step, steps=9, schedule=plain) for step in range(3, 9)]


def test_the_rate_falls_on_each_milestone_and_stays():
    schedule = ScheduleConfig(name="multistep", milestones=(3, 5), gamma=0.5)
    factors = [learning_rate_factor(step, steps=7, schedule=schedule) for step in range(7)]
    assert factors == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    # warm-up multiplies by 1/5, 2/5, 3/5, 4/5
    warm = dataclasses.replace(schedule, warmup_steps=4)
    assert [learning_rate_factor(step, steps=7, schedule=warm) for step in range(7)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.4, 0.5, 0.25, 0.25]
    )


def test_the_coco_rows_rates_are_those_of_torchs_multi_step_schedule():
    rows = json.loads((REFERENCE / "rows_coco.json").read_text())
    gamma = rows["common"]["lr_gamma"]
    for milestones, steps in {(tuple(r["lr_milestones"]), r["max_iters"]) for r in rows["rows"].values()}:
        # torch's, with 1,000 iterations as one; mmengine counts iterations alike
        coarse = tuple(milestone // 1000 for milestone in milestones)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
        theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(coarse), gamma)
        schedule = ScheduleConfig(name="multistep", milestones=coarse, gamma=gamma)
        for step in range(steps // 1000):
            ours = learning_rate(1e-4, step, steps=steps, schedule=schedule)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
            optimizer.step()
            theirs.step()
        exact = ScheduleConfig(name="multistep", milestones=milestones, gamma=gamma)
        edges = [edge + offset for edge in milestones for offset in (-1, 0)] + [steps - 1]
        assert [learning_rate(1e-4, step, steps=steps, schedule=exact) for step in edges] == pytest.approx(
            [1e-4, 1e-5, 1e-5, 1e-6, 1e-6]
        )


def test_a_run_of_one_step_has_a_rate():
    assert learning_rate(1e-4, 0, steps=1, schedule=ScheduleConfig()) == 1e-4


def test_steps_outside_the_run_and_unknown_schedules_are_refused():
    for step in (-1, 10):
        with pytest.raises(ValueError, match=f"step {step} is outside a run of 10 steps"):
            learning_rate_factor(step, steps=10, schedule=ScheduleConfig())
    with pytest.raises(ValueError, match=r"schedule\.name is 'cosine'; known: poly, multistep"):
        learning_rate_factor(0, steps=10, schedule=ScheduleConfig(name="cosine"))


def test_one_adamw_step_is_the_one_worked_out_by_hand():
    # first step: both moments are unbiased to the gradient, so the update is lr * sign; decay is lr * wd * weight
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    model[0].weight.grad = torch.full((1, 1), 0.3)
    config = dataclasses.replace(OptimizerConfig(), lr=0.1, weight_decay=0.05)
    build_optimizer(model, config).step()
    assert model[0].weight.item() == pytest.approx(2.0 - 0.1 * 0.05 * 2.0 - 0.1, rel=1e-6)
