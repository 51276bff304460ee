"""Measure a row on this machine: results/benchmark/<row>.json.

Parameters, operations of a forward pass, training memory and step time of one group (what one of the recipe's GPUs
has), and inference speed by the tables' protocol. Images come from the dataset's shards, where there are some; a
published dataset without shards is measured on random images of its size. Several GPUs are measured together with
torchrun --nproc-per-node 8 -m stages.benchmark ROW: sums over them are then in the step's time.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

from stages import called, run, waits

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.storage.results.rows import Benchmark, InferenceCost, TrainingCost


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("benchmark"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", help="an entry of `rows` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="for inference and for training each; fewer images and steps are measured where they take longer, at "
        "least 3 of each; default: %(default)s",
    )
    parser.add_argument(
        "--groups", type=int, default=1, help="of images in a step on each device; default: %(default)s"
    )
    parser.add_argument("--again", action="store_true", help="measure although nothing has changed since the last time")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.storage.results.rows import Benchmark

    if waits(Benchmark, arguments.row):
        return

    from pipeline.cost.torchrun import joined

    with joined():
        _measure(arguments)


def _measure(arguments: argparse.Namespace) -> None:
    """Measure the row, or find it measured; rank 0 writes the result and tells."""
    from pipeline.cost.benchmark import benchmark, benchmark_key
    from pipeline.data.shards.look import current_manifest
    from pipeline.params.load import load_params
    from pipeline.storage.results.data import Manifest
    from pipeline.storage.results.folder import find_result, result_path, write_result
    from pipeline.storage.results.rows import Benchmark
    from pipeline.training.worker import Worker

    worker = Worker.here()
    params = load_params(arguments.params)
    row = params.row(arguments.row)
    manifest = current_manifest(params, row.dataset) if find_result(Manifest, row.dataset) else None
    how = {"manifest": manifest, "seconds": arguments.seconds, "groups": arguments.groups}
    result = None
    if not arguments.again and worker.rank == 0:
        with contextlib.suppress(ValueError):  # torn, or another version's: it is made again here
            result = find_result(Benchmark, row.name)
    if result is not None and result.key != benchmark_key(row, **how, workers=worker.size):
        result = None
    if worker.largest(0.0 if result is None else 1.0):  # as rank 0 has found it
        if worker.rank == 0:
            print(f"{row.name} was measured here before, and nothing has changed; --again measures it again")
    else:
        result = benchmark(row, params.dataset(row.dataset), **how)
        if result is not None:
            write_result(result, row.name)
    if result is not None:
        _tell(result, result_path(Benchmark, row.name))


def _tell(result: Benchmark, path: Path) -> None:
    from pipeline.params.sentences import how_many

    inference, training, (height, width) = result.inference, result.training, result.flops.image_size
    print(f"{result.row} on {result.environment.device}")
    print(f"  parameters  {result.parameters / 1e6:.1f} million, {result.parameters_trained / 1e6:.1f} trained")
    print(f"  operations  {result.flops.forward / 1e9:.1f} GFLOP for a forward pass at {height} x {width}")
    print(f"  inference   {inference.fps:.2f} images/s ({inference.images} timed){_memory(inference)}")
    if training is None:
        print(f"  training    not measured: {result.skipped}")
    else:
        each = f" on each of {training.workers} workers" if training.workers > 1 else ""
        images = how_many(training.images, "image")
        print(f"  training    {training.step_s:.3f} s for a step of {images}{each}{_memory(training)}")
    print(f"  written to {path}")


def _memory(cost: InferenceCost | TrainingCost) -> str:
    return "" if cost.memory_mib is None else f", {cost.memory_mib / 1024:.2f} GiB"


if __name__ == "__main__":
    run(main)
