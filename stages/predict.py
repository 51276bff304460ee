"""Predict images with a trained network: label maps, overlays, COCO JSON and a page to look through.

SOURCE is a row of params.yaml (its best seed's checkpoint), a registered model (models:/name@best, models:/name/3), or
a checkpoint file with --row. IMAGES is an image, a video, a folder, a zip or tar archive, or a quoted glob. The same
command goes on where it was interrupted. Exit code 3: all is written, but some images could not be read.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from stages import called, run

SOME_LEFT_OUT = 3
"""Exit code where some pictures could not be read."""


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("predict"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="a row, models:/name@alias, or a checkpoint file")
    parser.add_argument("images", metavar="IMAGES", help="an image, video, folder, archive or glob")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results: new, or to go on with")
    parser.add_argument("--row", help="the row of a checkpoint file")
    parser.add_argument("--seed", type=int, help="of a row (default: the best)")
    parser.add_argument(
        "--checkpoint", choices=("last", "best"), help="of a row (default: the one that decides its figure)"
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="images at once; only those of one padded size go together"
    )
    parser.add_argument(
        "--window",
        metavar="SIZE,OVERLAP",
        help="predict larger images in windows of SIZE pixels that share OVERLAP (default: the row's test.window)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--workers", type=int, default=0, help="Ray workers that share the images (default: none)")
    parser.add_argument("--palette", action="store_true", help="label maps in the classes' colours (indexed PNG)")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.params.load import load_params
    from pipeline.params.sentences import how_many
    from pipeline.prediction.images import find_images

    if not arguments.out:
        raise ValueError("--out is empty; name a folder for the results")
    out = Path(arguments.out).absolute()
    params = load_params(arguments.params)
    found = find_images(arguments.images, without=out)

    from pipeline.prediction.network import device_named
    from pipeline.prediction.work import predict_all
    from pipeline.registry.source import open_source

    device = device_named(arguments.device)
    window = None if arguments.window is None else _window(arguments.window)
    network = open_source(
        arguments.source, params=params, row=arguments.row, seed=arguments.seed, checkpoint=arguments.checkpoint
    )
    if window is not None:
        network = replace(network, test=replace(network.test, window=window))
    failures = predict_all(
        network,
        found,
        out,
        source=arguments.images,
        batch=arguments.batch,
        palette=arguments.palette,
        device=device,
        workers=arguments.workers,
    )
    print(f"{arguments.out}/index.html shows the predictions of {network.description}")
    if failures:
        print(
            f"{how_many(len(failures), 'image')} could not be read; {arguments.out}/summary.csv says why",
            file=sys.stderr,
        )
        sys.exit(SOME_LEFT_OUT)


def _window(text: str) -> dict[str, int]:
    """ValueError where it is no size and overlap."""
    from pipeline.params.checks import check_window

    numbers = text.split(",")
    if len(numbers) != 2 or not all(number.strip().isdecimal() for number in numbers):
        raise ValueError(f"--window {text} is no SIZE,OVERLAP; give two numbers of pixels, such as --window 1024,256")
    window = dict(zip(("size", "overlap"), map(int, numbers), strict=True))
    check_window(window, "--window")
    return window


if __name__ == "__main__":
    run(main)
