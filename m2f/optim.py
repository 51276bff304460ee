"""The recipe's optimiser: AdamW with parameter groups and its schedules."""

from __future__ import annotations

import torch
from torch import nn

from m2f.config import OptimizerConfig, ScheduleConfig

NORM_LAYERS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)
"""Layers whose parameters get no weight decay."""

NO_WEIGHT_DECAY = (
    "query_decoder.query_position.weight",
    "query_decoder.query_feature.weight",
    "query_decoder.level_embedding.weight",
    "attention.relative_bias",
)
"""Ends of the names of other parameters without weight decay (the pixel decoder's level encoding has it)."""


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """Trainable parameters by learning rate and weight decay: at most four dicts of `params`, `lr`, `weight_decay`.

    Parameters under `backbone.` get `lr * backbone_lr_factor`; norms and NO_WEIGHT_DECAY get no weight
    decay. Frozen parameters are left out. Groups and parameters come in the model's order, so an
    optimiser's state fits a model built again.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            in_backbone = own_name.startswith("backbone.")
            decays = not isinstance(module, NORM_LAYERS) and not own_name.endswith(NO_WEIGHT_DECAY)
            key = (config.lr * (config.backbone_lr_factor if in_backbone else 1.0), config.weight_decay * decays)
            groups.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, one fused kernel per group where the device has it (CPU and CUDA do)."""
    devices = {parameter.device.type for parameter in model.parameters()}
    fused = devices <= {"cpu", "cuda"}
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )


def learning_rate_factor(step: int, *, steps: int, schedule: ScheduleConfig) -> float:
    """Factor of the base rate in iteration `step` of `steps`, counted from 0.

    Poly: (1 - step / (steps - 1)) ** power, so the last iteration runs at exactly 0; a run of one step
    runs at 1. Multistep: gamma to the power of the milestones m <= step, so iteration m is the first at the
    lower rate (mmengine's MultiStepLR, counted in iterations). With warm-up the factor also rises linearly
    over the first `warmup_steps`, the first of which is just above 0: (step + 1) / (warmup_steps + 1).

    ValueError when the step is not in the run or the schedule is not known.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is outside a run of {steps} steps, which counts from 0 to {steps - 1}")
    if schedule.name == "poly":
        factor = (1 - step / (steps - 1)) ** schedule.power if steps > 1 else 1.0
    elif schedule.name == "multistep":
        factor = schedule.gamma ** sum(milestone <= step for milestone in schedule.milestones)
    else:
        raise ValueError(f"schedule.name is {schedule.name!r}; known: poly, multistep")
    if step < schedule.warmup_steps:
        factor *= (step + 1) / (schedule.warmup_steps + 1)
    return factor


def learning_rate(base_lr: float, step: int, *, steps: int, schedule: ScheduleConfig) -> float:
    """`base_lr` times `learning_rate_factor`."""
    return base_lr * learning_rate_factor(step, steps=steps, schedule=schedule)
