"""A trained network with all that decides what it predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data.images.image_files import ImageReading
from pipeline.params.schema import Task, TestConfig
from pipeline.params.sentences import how_many

if TYPE_CHECKING:
    from typing import Literal

    import torch
    from torch import nn

    from m2f.config import Kernels
    from pipeline.params.schema import Row


class Version(NamedTuple):
    """A version of MLflow's registry."""

    name: str
    version: str
    model_id: str
    """Of the logged model that holds its files."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedNetwork:
    """A network with the weights of one checkpoint, in evaluation mode, and the settings of its row."""

    description: str
    """Where it comes from, in words: seed 0 of shapes_tiny, best checkpoint, step 1000."""
    digest: str
    """SHA-256 of the file of its weights."""
    network: nn.Module
    row: Row | None
    """Its row with the network's and test's settings; None: params.yaml no longer has a registered model's row."""
    task: Task
    test: TestConfig
    class_names: Sequence[str]
    """In the order of the network's classes."""
    thing_ids: Sequence[int]
    """Which of them are countable."""
    reading: ImageReading
    """How image files are read, as in training."""
    tf32: Literal["off", "convolutions", "all"]
    kernels: Kernels
    run_key: str | None = None
    """Of the training that made it; None: of somebody else's."""
    version: Version | None = None
    """None: it is not of MLflow's registry."""

    def facts(self) -> Mapping[str, Any]:
        """What decides its predictions, as JSON values."""
        return {
            "network": self.description,
            "weights": self.digest,
            "task": self.task,
            "test": asdict(self.test),
            "reading": asdict(self.reading),
            "class_names": list(self.class_names),
            "thing_ids": list(self.thing_ids),
        }

    def put_on(self, device: torch.device) -> None:
        """Move it to a device, with the row's choice of precision and kernels there."""
        from m2f.kernels.build import use
        from pipeline.compute.precision import allow_tf32

        allow_tf32(self.tf32)
        use(self.kernels, device=device.type)
        self.network.eval().to(device)


def device_named(name: str | None) -> torch.device:
    """The device of this name (cpu, cuda, cuda:1); None: a GPU if there is one. ValueError where it is not there."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; give cpu, cuda, or cuda:1 for the second GPU") from None
    if device.type == "cpu":
        return device
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if (device.index or 0) >= gpus:
        raise ValueError(
            f"--device {name} is not here: this machine has {how_many(gpus, 'GPU')} that torch can use; give cpu"
        )
    return device
