"""A training's worker: its place among the others, and what they do together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.evaluation.task_metrics import TaskMetrics


@dataclass(frozen=True, slots=True)
class Worker:
    """This process's place: rank among `size` workers, and its device."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def here(cls) -> Worker:
        """From torch.distributed when it is initialised; alone otherwise."""
        alone = not (dist.is_available() and dist.is_initialized())
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return cls(0, 1, device) if alone else cls(dist.get_rank(), dist.get_world_size(), device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: float) -> float:
        """The largest of the workers' values, the same on every worker."""
        if self.size > 1:
            tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            return tensor.item()
        return value

    def figures(self, metrics: TaskMetrics) -> dict[str, float | None]:
        """The figures of all workers' metrics together, the same on every worker."""
        if self.size == 1:
            return metrics.figures()
        parts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(metrics, parts)
        for part in (parts or [])[1:]:
            metrics.merge(part)
        figures: list[Any] = [metrics.figures() if self.rank == 0 else None]
        dist.broadcast_object_list(figures)
        result: dict[str, float | None] = figures[0]
        return result
