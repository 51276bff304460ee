"""Reading masks at points: bilinear, at normalised (x, y), and the choice of points the losses look at.

A point (x, y) in [0, 1] runs over the whole picture, borders included: pixel j of W has its centre at
(j + 0.5) / W. Outside the picture a mask is 0 (`grid_sample` with align_corners=False and zero padding).

L predictions, B pictures, Q queries, T most masks of a picture, R rows (picked masks), P points, h x w logits,
H x W pictures
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m2f.constants import to_device
from m2f.deterministic_sampling import grid_sample
from m2f.draws import keys_of, uniform
from m2f.kernels import cpu
from m2f.types import Target


def sample_logits(logits_BQhw: Tensor, points_BP2: Tensor) -> Tensor:
    """Mask logits at points, (B, Q, P) float32: the Q maps of a picture at the same P points."""
    grid_B1P2 = (2 * points_BP2 - 1).unsqueeze(1)
    return grid_sample(logits_BQhw.float(), grid_B1P2).squeeze(2)


def sample_masks(target: Target, points: Tensor) -> Tensor:
    """The T true masks of one picture at points, (T, P) float32 in [0, 1].

    `points`: (P, 2), the same for all masks, or (T, P, 2), each mask's own.
    """
    masks = TrueMasks.of([target])
    if points.dim() == 2:
        return masks.at_shared_points(points[None])[0]
    index_T = torch.arange(len(target), device=points.device)
    return masks.at_own_points(torch.zeros_like(index_T), index_T, points)


@dataclass(frozen=True, eq=False)
class TrueMasks:
    """The true masks of a batch, as integer maps and the value that marks each mask in its map.

    Masks are only ever evaluated at points: four pixels are read and compared with the value. A
    segment map is shared by all masks of its picture; a dense mask is a map of its own.
    """

    maps: Tensor
    """(M, H, W) integers or bool."""
    map_index: Tensor
    """(B, 1), or (B, T) where every mask has its own map: index into `maps`."""
    value: Tensor
    """(B, T) int32. Pictures with fewer masks than T are filled up with values that mean nothing."""

    @classmethod
    def of(cls, targets: Sequence[Target]) -> TrueMasks:
        """Targets of equally large pictures; ValueError otherwise. Segment maps stay maps if all targets have one."""
        sizes = {target.size for target in targets}
        if len(sizes) != 1:
            raise ValueError(f"targets of one batch must have one (height, width), got {sorted(sizes)}; pad them alike")
        device, most = targets[0].labels.device, max(len(t) for t in targets)
        maps = [t.segments for t in targets if t.segments is not None]
        if len(maps) == len(targets):
            maps_MHW = torch.stack(maps)
            map_index = torch.arange(len(targets), device=device)[:, None]
            value = torch.arange(most, dtype=torch.int32, device=device).expand(len(targets), most)
        else:
            maps_MHW = torch.cat([t.masks for t in targets])
            map_index = torch.zeros(len(targets), most, dtype=torch.int64)
            first = 0
            for b, target in enumerate(targets):
                map_index[b, : len(target)] = torch.arange(first, first + len(target))
                first += len(target)
            map_index = to_device(map_index, device)
            value = torch.ones_like(map_index, dtype=torch.int32)
        return cls(maps_MHW, map_index, value)

    def at_shared_points(self, points_LBP2: Tensor) -> Tensor:
        """All masks of each picture at the picture's points, (..., B, T, P) float32; rows beyond a picture's masks
        mean nothing. `points`: (..., B, P, 2)."""
        if cpu.takes(points_LBP2) and self.maps.numel():
            *leading, images, points, _ = points_LBP2.shape
            map_BT, layers = self.map_index.expand_as(self.value), math.prod(leading)
            map_R, value_R = (x.flatten().repeat(layers) for x in (map_BT, self.value))
            masks_RP = cpu.equal(self.maps, map_R, value_R, points_LBP2.reshape(-1, points, 2))
            return masks_RP.view(*leading, images, self.value.shape[1], points)
        return self._read(self.map_index, self.value, points_LBP2.unsqueeze(-3))

    def at_own_points(self, image_R: Tensor, mask_R: Tensor, points_RP2: Tensor) -> Tensor:
        """Mask `mask_R[r]` of picture `picture_R[r]` at its own points, (R, P) float32."""
        map_R = self.map_index.expand_as(self.value)[image_R, mask_R]
        if cpu.takes(points_RP2) and self.maps.numel():
            return cpu.equal(self.maps, map_R, self.value[image_R, mask_R], points_RP2)
        return self._read(map_R, self.value[image_R, mask_R], points_RP2)

    def _read(self, map_index: Tensor, value: Tensor, points: Tensor) -> Tensor:
        """Leading dimensions of `map_index` (...), `value` (...) and `points` (..., P, 2) broadcast."""
        height, width = self.maps.shape[-2:]
        if not self.maps.numel() or not value.numel():
            return points.new_zeros(*torch.broadcast_shapes(value.shape, points.shape[:-2]), points.shape[-2])
        flat = self.maps.flatten()
        start = (map_index * (height * width)).unsqueeze(-1)
        value = value.unsqueeze(-1)
        result = points.new_zeros(torch.broadcast_shapes(value.shape, start.shape, points.shape[:-1]))
        inside = torch.empty_like(result)
        columns = _neighbours(points[..., 0], width)
        for row, row_weight in _neighbours(points[..., 1], height):
            row_start = start + row * width
            for column, column_weight in columns:
                pixel = row_start + column
                # index_select and a comparison written as float: on a CPU 5 times as fast as flat[pixel] and a bool
                torch.eq(flat.index_select(0, pixel.flatten()).view_as(pixel).int(), value, out=inside)
                result.addcmul_(inside, row_weight * column_weight)
        return result


def _neighbours(position: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The two pixels around normalised positions along one axis: (index, weight), weight 0 outside."""
    pixel = position * size - 0.5
    low = pixel.floor()
    result = []
    for neighbour in (low, low + 1):
        index = neighbour.clamp(0, size - 1)
        result.append((index.long(), (1 - (pixel - neighbour).abs_()) * (index == neighbour).float()))
    return result


def uncertain_points(
    logits_Rhw: Tensor, seeds: Sequence[int], *, points: int, oversample: float, importance: float
) -> Tensor:
    """Points at which the losses compare masks, (R, points, 2), chosen per mask (PointRend; paper, sec. 3.3).

    Of `int(oversample * points)` uniform candidates the `int(importance * points)` with the smallest
    |logit| are kept; the rest of the points are uniform. `seeds`: one int per mask, on which alone its
    uniform points depend.
    """
    candidates = int(oversample * points)
    certain = int(importance * points)
    if cpu.takes(logits_Rhw):
        keys_2R = keys_of(seeds, 0)
        return cpu.uncertain_points(logits_Rhw, keys_2R, candidates=candidates, certain=certain, points=points)
    drawn_RN2 = uniform(seeds, 0, 2 * (candidates + points - certain), logits_Rhw.device).unflatten(1, (-1, 2))
    candidate_RN2 = drawn_RN2[:, :candidates]
    with torch.no_grad():
        doubt_RN = sample_logits(logits_Rhw.unsqueeze(1), candidate_RN2).squeeze(1).abs_()
        chosen_RK = _smallest(doubt_RN, certain)
    chosen_RK2 = candidate_RN2.gather(1, chosen_RK.unsqueeze(-1).expand(-1, -1, 2))
    return torch.cat((chosen_RK2, drawn_RN2[:, candidates:]), dim=1)


def _smallest(values_RN: Tensor, count: int) -> Tensor:
    """Indices of the `count` smallest values of every row, in no order, (R, count)."""
    if values_RN.device.type == "cpu":  # NumPy's selection is vectorised: 4 times as fast as topk
        return torch.from_numpy(np.argpartition(values_RN.numpy(), count - 1, axis=1)[:, :count])
    return values_RN.topk(count, dim=1, largest=False, sorted=False).indices


def uniform_points(seeds: Sequence[int], *, points: int, device: torch.device | str) -> Tensor:
    """Uniform points, (len(seeds), points, 2), each row a function of its seed alone."""
    return uniform(seeds, 0, 2 * points, device).view(len(seeds), points, 2)
