"""The graph as a .pt2 file of torch.export, and that file loaded again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from pipeline.export.check import Run

METADATA = "metadata.json"
"""The file inside a .pt2 file that holds what an ONNX file has as metadata: read it with `extra_files`."""


def write_pt2(graph: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a graph with its weights, for torch.export.load."""
    with path.open("wb") as file:
        torch.export.save(graph, file, extra_files={METADATA: json.dumps(dict(metadata))})


def open_pt2(path: Path) -> Run:
    """A .pt2 file as torch.export.load gives it."""
    with path.open("rb") as file:
        # the guards refuse Swins on images of one window, for which the graph is as right
        module = torch.export.load(file).module(check_guards=False)

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            classes, masks = module(images, sizes)
        return classes, masks

    return run
