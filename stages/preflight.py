"""Rehearse a row before its data, GPUs and hours are spent: reports/preflight/<row>.html.

The whole row at its real sizes, on stand-in images in the data set's own layout: archives are fetched and checked,
shards written, weights converted, some steps trained on all workers, a worker killed and replaced, a validation, an
evaluation, a model registered, a report. It takes minutes. The page has every step's time and memory, images per
second, memory beside the published figure, how far the loader is ahead, projected hours, and what will not hold.

It works in folders of its own, a temporary one and one below the storage root, and deletes both; no result is touched.
The server of MLFLOW_TRACKING_URI is asked whether it answers, and nothing is written there.
On a machine without GPUs a step is one group of one image. With RAY_ADDRESS the workers are those of that cluster.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stages import called, run

if TYPE_CHECKING:
    from pipeline.rehearsal.project import Extent


STOPPED = "the rehearsal's folders are deleted, and no page is written"
"""What becomes of a rehearsal that is stopped."""


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("preflight"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", help="an entry of `rows` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="of the training; default: 20, on a CPU 4")
    parser.add_argument("--images", type=int, help="that are validated and evaluated; default: 20, on a CPU 2")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sides of images, crops and test sizes")
    parser.add_argument(
        "--real-weights", action="store_true", help="fetch the row's initial weights; default: random ones like them"
    )
    parser.add_argument("--price-per-gpu-hour", type=float, help="for the projected cost")
    parser.add_argument(
        "--cluster",
        metavar="FILE",
        help="take the price from a cluster file with provider.price_per_hour; default: on a head, its cluster's",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("reports/preflight"), help="folder of the page; default: %(default)s"
    )
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()
    _check(arguments)
    price = _price(arguments.price_per_gpu_hour, arguments.cluster)

    from pipeline.compute.resources import gpus_here
    from pipeline.cost.needs import needs, untrained_weights
    from pipeline.params.load import load_params
    from pipeline.rehearsal.findings import find
    from pipeline.rehearsal.page import write_page
    from pipeline.rehearsal.project import Extent, opened
    from pipeline.rehearsal.steps import rehearse
    from pipeline.tracking.client import no_answer, shown_uri

    file = Path(arguments.params)
    params = load_params(file)
    row = params.row(arguments.row)
    tiny = row.model.backbone.name == "tiny"
    one_image = not tiny and not gpus_here(row)
    few = one_image or tiny
    extent = Extent(
        steps=arguments.steps or (4 if few else 20),
        images=arguments.images or (2 if few else 20),
        scale=arguments.scale,
        one_image=one_image,
        real_weights=arguments.real_weights,
    )
    _make_writable(arguments.out)
    missing = needs(row, params, base=file.absolute().parent) + untrained_weights(row, params)
    if why := no_answer():
        missing.append(
            f"an MLflow that answers: {shown_uri()} does not ({why}); correct MLFLOW_TRACKING_URI or start it"
        )
    print(f"rehearsing {row.name}: {_in_words(extent)}", flush=True)
    with opened(row, params, file, extent) as project:
        steps = rehearse(row, project, lambda line: print(line, flush=True))
        findings = find(
            row, params, project, extent, steps,
            missing=missing, price_per_gpu_hour=price,
        )  # fmt: skip
        page = write_page(row, extent, project, steps, findings, arguments.out)
    for figure in findings.figures:
        print(f"  {figure.name:18} {figure.value}")
    for problem in findings.problems:
        print(f"  will not hold: {problem}")
    print(f"written to {page}; all else of the rehearsal is deleted")
    if any(step.error for step in steps):
        sys.exit(1)


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("steps", 2), ("images", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    if not 0.05 <= arguments.scale <= 1:
        raise ValueError(f"--scale is {arguments.scale:g}; it must be 0.05 to 1")
    if arguments.price_per_gpu_hour is not None and not arguments.price_per_gpu_hour > 0:
        raise ValueError(f"--price-per-gpu-hour is {arguments.price_per_gpu_hour:g}; it must be above 0")


def _price(given: float | None, cluster: str | None) -> float | None:
    """Of a GPU-hour: as it is given, by the cluster file that is given, or by that of the head on which this runs."""
    from pipeline.cluster.config import LEFT_ON_HEAD, gpus_and_price

    if given is not None:
        return given
    if cluster is not None:
        return gpus_and_price(cluster)[1]
    with suppress(ValueError):  # this is no head, or its file has no price
        return gpus_and_price(LEFT_ON_HEAD)[1]
    return None


def _make_writable(out: Path) -> None:
    """Make the page's folder; ValueError, before anything is rehearsed, where no page could be written."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror}); name another folder with --out") from None


def _in_words(extent: Extent) -> str:
    scaled = "" if extent.scale == 1 else f", at {extent.scale:g} of its sizes"
    alone = ", one image a step" if extent.one_image else ""
    return f"{extent.steps} steps, {extent.images} validation images{alone}{scaled}"


if __name__ == "__main__":
    run(main, stopped=STOPPED)
