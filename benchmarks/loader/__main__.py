"""Training images per second of one process, beside the recipe written down plainly with OpenCV.

    python -m benchmarks.loader --images data/camvid.zip --ignore-label 11

Real images (a folder or archive in ADE20K's layout) are enlarged to the sizes of the published data sets: PNG of
2048 x 1024 (Cityscapes), JPEG of 683 x 512 (ADE20K) and of 640 x 480 (COCO). Each is augmented by its row's recipe, in
turns on the same images: by OpenCV alone (decode, resize all, crop, flip, distort), by the loader from shards of
either layout, and decoded only. One thread, files in the page cache, seconds of the process's CPU time, so that other
work on the machine counts little; the figures are medians over the rounds.

Prints the tables of studies/measured.md: images per second, where the loader's time goes, and what no loader can
avoid: copying the rows that the crop shows and resizing just these.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.loader.sizes import GROUP, SIZES


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder or zip archive in ADE20K's layout")
    parser.add_argument("--ignore-label", type=int, default=255, help="its label of nothing; default: %(default)s")
    parser.add_argument("--count", type=int, default=24, help="images of every size; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="turns; default: %(default)s")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--images-per-s-per-gpu", type=float, help="what a GPU trains on: how many are fed")
    options = parser.parse_args()
    if options.rounds < 1 or options.count < GROUP:
        sys.exit(f"error: --rounds must be at least 1, and --count at least {GROUP}, which make a batch")
    if options.images_per_s_per_gpu is not None and not options.images_per_s_per_gpu > 0:
        sys.exit("error: --images-per-s-per-gpu must be more than 0")

    import cv2
    import torch

    from benchmarks.loader.tables import compare, enlarged

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for name in options.sizes:
        size = SIZES[name]
        files = enlarged(options.images, options.ignore_label, size, options.count)
        with tempfile.TemporaryDirectory() as storage:
            os.environ["M2F_STORAGE"] = storage
            os.environ.pop("M2F_SHARD_CACHE", None)
            compare(name, size, files, Path(storage), options.rounds, options.images_per_s_per_gpu)


if __name__ == "__main__":
    main()
