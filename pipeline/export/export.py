"""A trained network as a file of another format, checked before it gets its name."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from m2f.model import MEAN_RGB, STD_RGB
from pipeline.export.check import Compared, Parity, Run, compare_figure, parity
from pipeline.export.graph import OUTPUTS, STRIDE, Pixels, traced
from pipeline.export.huggingface import open_folder, write_folder
from pipeline.export.onnx_file import OPSET, open_onnx, write_onnx
from pipeline.export.torch_file import open_pt2, write_pt2
from pipeline.storage.files import delete, whole_file
from pipeline.storage.progress import duration

if TYPE_CHECKING:
    from pipeline.prediction.network import TrainedNetwork
    from pipeline.storage.results.data import Manifest

Format = Literal["onnx", "torch.export", "huggingface"]


class Exported(NamedTuple):
    """What was written, and how it was checked."""

    path: Path
    bytes: int
    parity: Parity
    compared: Compared | None
    """None: there were no validation images."""


def metadata(source: TrainedNetwork, pixels: Pixels, form: Format) -> dict[str, str]:
    """What a file says of itself; lists are JSON."""
    row = source.row
    assert row is not None
    said = {
        "source": source.description,
        "row": row.name,
        "task": row.task,
        "run_key": source.run_key or "",
        "classes": json.dumps(list(source.class_names), ensure_ascii=False),
        "thing_ids": json.dumps(list(source.thing_ids)),
        "mean_rgb": json.dumps(MEAN_RGB),
        "std_rgb": json.dumps(STD_RGB),
        "short_side": str(row.test.short_side),
        "long_side_max": str(row.test.long_side_max),
        "images": f"(B, 3, H, W) {pixels} RGB, 0 to 255; padded right and below to multiples of {STRIDE}",
        "sizes": "(B, 2) int64, height and width of every image without its padding",
        OUTPUTS[0]: '(B, Q, C + 1) float32, "no object" last',
        OUTPUTS[1]: "(B, Q, H / 4, W / 4) float32",
        "torch": torch.__version__,
    }
    return said | ({"opset": str(OPSET)} if form == "onnx" else {})


def export(
    source: TrainedNetwork,
    out: Path,
    *,
    form: Format,
    pixels: Pixels = "uint8",
    manifest: Manifest | None = None,
    check_images: int = 0,
) -> Exported:
    """Write `out`, a file or for huggingface a folder, if it passes its checks: logits beside this project's own, and,
    with a manifest whose shards are here, the task's figure on that many validation images.

    ValueError: a check failed, or a library cannot write or run the network; then there is no `out`.
    """
    if (row := source.row) is None:
        raise ValueError(f"{source.description} is of a row that params.yaml does not have; add the row again")
    about = metadata(source, pixels, form)
    with (_whole_folder if form == "huggingface" else whole_file)(out) as partial:
        run = _write(source, partial, form, pixels, about)
        with _said(f"{row.name}: comparing logits"):
            near = parity(source.network, run, pixels)
        compared = None
        if manifest is not None and check_images > 0:
            with _said(f"{row.name}: measuring on validation images"):
                compared = compare_figure(source.network, run, pixels, row, manifest, check_images)
        size = sum(file.stat().st_size for file in (partial.iterdir() if partial.is_dir() else [partial]))
    return Exported(out, size, near, compared)


def _write(source: TrainedNetwork, partial: Path, form: Format, pixels: Pixels, about: dict[str, str]) -> Run:
    """Write a file, or fill a folder, and open it again."""
    name = about["row"]
    if form == "huggingface":
        with _said(f"{name}: writing {form}"):
            write_folder(source, partial, about)
        return open_folder(partial)
    with _said(f"{name}: tracing the network, which takes minutes"):
        graph = traced(source.network, pixels)
    with _said(f"{name}: writing {form}"):
        (write_onnx if form == "onnx" else write_pt2)(graph, partial, about)
    return (open_onnx if form == "onnx" else open_pt2)(partial)


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `out` if the block ends without an error; replaces what is there."""
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as parent:
        folder = Path(parent) / out.name
        folder.mkdir()
        yield folder
        if out.exists():
            delete(out)
        folder.rename(out)


@contextmanager
def _said(what: str) -> Iterator[None]:
    """A line on stderr when a step begins, and one with its time when it ends."""
    print(what, file=sys.stderr, flush=True)
    begun_s = time.monotonic()
    yield
    print(f"{what.split(',')[0]}: {duration(time.monotonic() - begun_s)}", file=sys.stderr, flush=True)
