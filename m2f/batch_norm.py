"""Batch norm with the statistics of a whole step, of which this process holds a part of the pictures.

B pictures here, C channels, H x W pixels; N = pixels of a channel over the whole step
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Total = Callable[[Tensor], Tensor]
"""Gives the sum of a tensor over all parts of the step, in place; every part calls it with an equally large one."""

_PIXELS = (0, 2, 3)


class StepBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over all parts of a step: same names, state, running statistics and, in evaluation, results.

    In training it calls `total` once forward, with 2 C + 1 elements, and once backward, with 2 C; the host does not
    wait for the device. The gradients of weight and bias are this part's share of them, as of every other parameter.
    """

    def __init__(self, channels: int, *, total: Total, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.total = total

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, total: Total) -> StepBatchNorm2d:
        """One that holds the parameters and buffers of a norm and stands in its place."""
        assert norm.affine and norm.track_running_stats and norm.momentum is not None
        new = cls(norm.num_features, total=total, eps=norm.eps, momentum=norm.momentum).train(norm.training)
        new.weight, new.bias = norm.weight, norm.bias
        new.running_mean, new.running_var = norm.running_mean, norm.running_var
        new.num_batches_tracked = norm.num_batches_tracked
        return new

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W), of the input's type."""
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            mean_C, variance_C, count = step_statistics(input, self.total)
            self._keep(mean_C, variance_C * (count / (count - 1)))
        return _Normalise.apply(input, self.weight, self.bias, mean_C, variance_C, count, self.eps, self.total)

    def _keep(self, mean_C: Tensor, unbiased_variance_C: Tensor) -> None:
        """Move the running statistics towards the step's."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(unbiased_variance_C, self.momentum)


def step_batch_norm(module: nn.Module, total: Total) -> nn.Module:
    """The module with every `nn.BatchNorm2d` in it replaced by a StepBatchNorm2d with its parameters and buffers."""
    if isinstance(module, nn.BatchNorm2d):
        return StepBatchNorm2d.of(module, total)
    for name, child in module.named_children():
        module.add_module(name, step_batch_norm(child, total))
    return module


def step_statistics(x_BCHW: Tensor, total: Total) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of every channel over the whole step, (C,) of at least float32, and N, a float64 scalar.

    Parts may be of different sizes. Each computes its own mean and variance; sums of float64 join them, so that a mean
    far from 0 beside the spread costs no digits of float32.
    """
    variance_C, mean_C = torch.var_mean(_exact(x_BCHW), _PIXELS, correction=0)
    dtype = mean_C.dtype
    channels = len(mean_C)
    own_count = x_BCHW.numel() // channels
    sums = torch.full((2 * channels + 1,), own_count, dtype=torch.float64, device=x_BCHW.device)
    sum_C = sums[:channels].mul_(mean_C)
    sums[channels:-1].mul_(variance_C).addcmul_(sum_C, mean_C)  # of squares: n * variance + n * mean * mean
    count = total(sums)[-1]
    moments_2C = (sums[:-1] / count).view(2, channels)
    mean_C, variance_C = moments_2C
    variance_C.addcmul_(mean_C, mean_C, value=-1).clamp_(min=0)
    mean_C, variance_C = moments_2C.to(dtype)
    return mean_C, variance_C, count


def _exact(x: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, of which mean and variance depend on x of all parts."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BCHW: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        mean_C: Tensor,
        variance_C: Tensor,
        count: Tensor,
        eps: float,
        total: Total,
    ) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight_C, mean_C, variance_C, count)
        ctx.eps, ctx.total = eps, total
        return F.batch_norm(x_BCHW, mean_C, variance_C, weight_C, bias_C, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        """With y = n * weight + bias and g = dL/dy: dL/dx = weight / sd * (g - mean(g) - n * mean(g * n)), whose means
        are over all parts, and sum(g * n) and sum(g) of this part are the gradients of weight and bias."""
        x_BCHW, weight_C, mean_C, variance_C, count = ctx.saved_tensors
        dtype, x_BCHW, gradient_BCHW = x_BCHW.dtype, _exact(x_BCHW), _exact(gradient_BCHW)
        inverse_C = (variance_C + ctx.eps).rsqrt_()
        # backward of evaluation's batch norm, without its first part; a CPU reads mean and variance, a GPU the inverse
        _, to_weight_C, to_bias_C = torch.ops.aten.native_batch_norm_backward(
            gradient_BCHW, x_BCHW, weight_C, mean_C, variance_C, mean_C, inverse_C, False, ctx.eps, [False, True, True]
        )
        to_x_BCHW = None
        if ctx.needs_input_grad[0]:
            scale_C = weight_C * inverse_C
            slope_C, shift_C = ctx.total(torch.stack((to_weight_C, to_bias_C))).mul_(-scale_C / count)
            to_x_BCHW = F.batch_norm(x_BCHW, mean_C, variance_C, slope_C, shift_C, training=False, eps=ctx.eps)
            to_x_BCHW = to_x_BCHW.addcmul_(gradient_BCHW, scale_C[:, None, None]).to(dtype)
        return to_x_BCHW, to_weight_C, to_bias_C, None, None, None, None, None
