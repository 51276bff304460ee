"""The graph as an ONNX file, and that file in ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.export.graph import INPUTS, OUTPUTS
from pipeline.params.sentences import error_shown

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from pipeline.export.check import Run

OPSET = 19
"""Of ONNX's operators; GridSample, of which the deformable attention is made, is in 16 and later, and DeformConv, of
which the feature-aligned pyramid is, in 19."""


def require_onnx() -> None:
    """ValueError unless all that writes and runs ONNX files is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the format onnx needs a module that cannot be imported ({error_shown(error)}); install it with: "
            "pip install onnx onnxscript onnxruntime"
        ) from None


def write_onnx(graph: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a graph as one ONNX file, weights inside. ValueError where this version of ONNX lacks an operator."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of every operation that it does not fold
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # its own progress
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph, dynamo=True, opset_version=OPSET, input_names=list(INPUTS), output_names=list(OUTPUTS)
            )
    except torch.onnx.OnnxExporterError as error:
        reason = error_shown(error.__cause__ or error)
        raise ValueError(
            f"torch {torch.__version__} and onnxscript cannot write this network as ONNX ({reason}); install "
            "newer versions with: pip install -U onnx onnxscript"
        ) from None
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(str(path), external_data=False)


def open_onnx(path: Path) -> Run:
    """An ONNX file in ONNX Runtime, on the CPU. ValueError where this version of it lacks an operator."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = _understood(lambda: onnxruntime.InferenceSession(path.read_bytes(), options, ["CPUExecutionProvider"]))

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        fed = dict(zip(INPUTS, (images.numpy(), sizes.numpy()), strict=True))
        classes, masks = _understood(lambda: session.run(list(OUTPUTS), fed))
        return torch.from_numpy(classes), torch.from_numpy(masks)

    return run


def _understood(call: Callable[[], Any]) -> Any:
    """What ONNX Runtime gives; ValueError for what it says against the file."""
    import onnxruntime

    try:
        return call()
    except Exception as error:  # ONNX Runtime's own, of a class for each of its status codes
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the exported network ({error_shown(error)}); install "
            "a newer version with: pip install -U onnxruntime"
        ) from None
