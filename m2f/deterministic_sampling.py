"""Bilinear sampling whose backward gives the same bits in every run on a GPU.

F.grid_sample's adds to the maps in whatever order the GPU's threads come to them. This one adds row by row with
index_add_, of which PyTorch takes a form of fixed order under torch.use_deterministic_algorithms.

G groups of maps, D maps of a group, h x w pixels, N x P points of a group, M = N * P
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def grid_sample(maps_GDhw: Tensor, grid_GNP2: Tensor) -> Tensor:
    """The D maps of a group at its points, (G, D, N, P): bilinear, 0 outside; points are (x, y) from -1 to 1 at the
    maps' outer edges, F.grid_sample's align_corners=False.

    On a GPU under torch.use_deterministic_algorithms its backward has a fixed order, and is slower; else it is
    F.grid_sample.
    """
    if maps_GDhw.is_cuda and torch.are_deterministic_algorithms_enabled():
        return ordered_grid_sample(maps_GDhw, grid_GNP2)
    return F.grid_sample(maps_GDhw, grid_GNP2, align_corners=False)


def ordered_grid_sample(maps_GDhw: Tensor, grid_GNP2: Tensor) -> Tensor:
    """`grid_sample` with the backward of fixed order, wherever it runs."""
    return _Sample.apply(maps_GDhw, grid_GNP2)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps_GDhw: Tensor, grid_GNP2: Tensor) -> Tensor:
        ctx.save_for_backward(maps_GDhw, grid_GNP2)
        return F.grid_sample(maps_GDhw, grid_GNP2, align_corners=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_GDNP: Tensor) -> tuple[Tensor | None, Tensor | None]:
        maps_GDhw, grid_GNP2 = ctx.saved_tensors
        (G, D, height, width), sizes = maps_GDhw.shape, grid_GNP2.shape
        x_GM, y_GM = _pixels(grid_GNP2, height, width)
        gradient_GMD = gradient_GDNP.flatten(2).transpose(1, 2)
        to_maps = to_grid = None
        if ctx.needs_input_grad[0]:
            rows = gradient_GDNP.new_zeros(G * height * width, D)
            for row_GM, (x_weight_GM, _), (y_weight_GM, _) in _corners(x_GM, y_GM, height, width):
                share_GMD = gradient_GMD * (x_weight_GM * y_weight_GM).unsqueeze(-1)
                rows.index_add_(0, row_GM.flatten(), share_GMD.flatten(0, 1))
            to_maps = rows.view(G, height, width, D).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            values = maps_GDhw.permute(0, 2, 3, 1).reshape(G * height * width, D)
            to_x_GM, to_y_GM = torch.zeros_like(x_GM), torch.zeros_like(y_GM)
            for row_GM, (x_weight_GM, x_slope_GM), (y_weight_GM, y_slope_GM) in _corners(x_GM, y_GM, height, width):
                value_GMD = values.index_select(0, row_GM.flatten()).view_as(gradient_GMD)
                agreement_GM = (value_GMD * gradient_GMD).sum(-1)
                to_x_GM.addcmul_(agreement_GM, x_slope_GM * y_weight_GM)
                to_y_GM.addcmul_(agreement_GM, x_weight_GM * y_slope_GM)
            # a step of 1 in the grid is one of half the map in pixels
            to_grid = torch.stack((to_x_GM * (width / 2), to_y_GM * (height / 2)), dim=-1).view(sizes)
        return to_maps, to_grid


def _pixels(grid_GNP2: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Points of the grid as columns and rows, (G, M) each; pixel j's centre is at j."""
    x_GM, y_GM = grid_GNP2.flatten(1, 2).unbind(-1)
    return ((x_GM + 1) * width - 1) / 2, ((y_GM + 1) * height - 1) / 2


def _corners(
    x_GM: Tensor, y_GM: Tensor, height: int, width: int
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """The four pixels around every point: row of a table of all groups' pixels, and what `_neighbours` says of both."""
    groups = torch.arange(len(x_GM), device=x_GM.device)[:, None] * (height * width)
    columns = _neighbours(x_GM, width)
    for row_GM, y_weight_GM, y_slope_GM in _neighbours(y_GM, height):
        for column_GM, x_weight_GM, x_slope_GM in columns:
            row = groups + row_GM * width + column_GM
            yield row, (x_weight_GM, x_slope_GM), (y_weight_GM, y_slope_GM)


def _neighbours(position_GM: Tensor, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The two pixels around positions along an axis: index, weight, and what the weight gains from a step of one pixel.

    Outside the map weight and gain are 0.
    """
    low = position_GM.floor()
    fraction = position_GM - low
    result = []
    for neighbour, weight, slope in ((low, 1 - fraction, -1.0), (low + 1, fraction, 1.0)):
        index = neighbour.clamp(0, size - 1)
        inside = (index == neighbour).to(position_GM.dtype)
        result.append((index.long(), weight * inside, slope * inside))
    return result
