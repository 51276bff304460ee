"""This project's network beside Hugging Face's Mask2Former (transformers) and beside its own plain form, in one run.

    python -m benchmarks.network --device cpu --out network.json
    python -m benchmarks.network --device cuda --out network.json
    python -m benchmarks.network --device cpu --rows r50 --rounds 7 --only training --out network.json
    python -m benchmarks.network --only counts --out counts.json
    python -m benchmarks.network --device cpu --sizes 512x512 --forms ours huggingface --out network.json

Three forms of one network, with random weights: "ours" (kernels auto), "plain" (PyTorch's operations) and
"huggingface", where transformers is installed (pip install transformers; nothing else here needs it). Measured are
inference of one image up to its label map, by the same function for all, and a training step of the published recipe:
forward, matching, losses with 12,544 points, backward, clipping and AdamW. Each form has a process of its own, and
they make their rounds in turn, so that a machine that slows down does so for all; times are medians, and ratios are
medians of each round's ratio. The file is written after each measurement; "left" in it names those that are to come.

"counts" is what a training step asks of a GPU, counted without one: operations, each of them a launch or more, copies
to the host, which it waits for, products, and the most memory at once, by part, with and without kernels in Triton.

"parts" is this project's training step by part: seconds, operations asked of the device, and the share of the limit,
which is the faster of a large matrix product and a large convolution, measured here. On a GPU the profiler's launches
and synchronisations of a step stand beside it, and "published" has the semantic rows of params.yaml beside their
published images per second and memory.

--limit-s (540 on a GPU, none on a CPU) bounds the whole command: the time that is left is shared equally by what is
left to measure; the 13 rows of "published" count as so many. After the end of its share a measurement begins no other
round than its first; the file has every round.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.network.plan import FORMS, KINDS, ROWS, SIZES, size_name
from benchmarks.out import refuse_unwritable


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="default: all")
    parser.add_argument("--sizes", nargs="+", choices=tuple(map(size_name, SIZES)), help="of inference (default: all)")
    parser.add_argument("--rounds", type=int, help="at most (default: 5, on a GPU 20)")
    parser.add_argument("--batch", type=int, default=2, help="images of a training step (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU (default: its own choice)")
    parser.add_argument("--only", nargs="+", choices=KINDS, help="default: all; published needs a GPU")
    parser.add_argument(
        "--precision", nargs="+", choices=("float32", "bf16"), help="default: float32; on a GPU that has bf16, both"
    )
    parser.add_argument("--limit-s", type=float, help="of the whole command (default: none, on a GPU 540)")
    parser.add_argument("--out", type=Path, default=Path("network.json"), help="default: %(default)s")
    parser.add_argument("--form", nargs=4, metavar=("WHAT", "FORM", "ROW", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    cuda = arguments.device == "cuda"
    if cuda and not _gpu_has(bf16=False):
        sys.exit("error: there is no GPU here that PyTorch can use; take --device cpu")
    arguments.rounds = (20 if cuda else 5) if arguments.rounds is None else arguments.rounds
    arguments.limit_s = (540.0 if cuda else math.inf) if arguments.limit_s is None else arguments.limit_s
    counts = (arguments.rounds, arguments.batch, 1 if arguments.threads is None else arguments.threads)
    if min(counts) < 1 or not arguments.limit_s > 0:
        sys.exit("error: --rounds, --batch and --threads must be at least 1, and --limit-s more than 0")
    if arguments.only is None:
        arguments.only = KINDS if cuda else KINDS[:-1]
    elif "published" in arguments.only and not cuda:
        sys.exit("error: --only published needs --device cuda: the published figures are a GPU's")
    if arguments.precision is None:
        arguments.precision = ["float32", "bf16"] if cuda and _gpu_has(bf16=True) else ["float32"]
    return arguments


def _gpu_has(*, bf16: bool) -> bool:
    """Whether PyTorch finds a GPU here, and one with bf16 where that is asked for."""
    import torch

    return torch.cuda.is_available() and (not bf16 or torch.cuda.is_bf16_supported())


def main() -> None:
    """Command line."""
    arguments = arguments_of()
    import torch

    from benchmarks.network.measure import run
    from benchmarks.network.process import Here, serve

    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.form:
        what, form, row, precision = arguments.form
        serve(Here(what, form, row, device, precision))
        return
    refuse_unwritable(arguments.out)
    run(arguments, device)


if __name__ == "__main__":
    main()
