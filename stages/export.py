"""Write a trained network as a file that other programs run, and check it against this project's own numbers.

SOURCE is a row (its best seed), models:/name@alias, or a checkpoint file with --row.

onnx           one file of opset 19, for ONNX Runtime and what reads ONNX; needs pip install onnx onnxscript onnxruntime
torch.export   one .pt2 file for torch.export.load
huggingface    a folder for transformers, whose own processor resizes and normalises

Images go in as RGB of 0 to 255; the normalisation is inside. Batch, height and width are free; height and width are
multiples of 32. docs/export.md has inputs, outputs and limits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stages import called, run

STOPPED = "nothing was written; the same command begins anew"


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("export"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="a row, models:/name@alias, or a checkpoint file")
    parser.add_argument("--format", required=True, choices=("onnx", "torch.export", "huggingface"))
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="what to write")
    parser.add_argument("--row", help="of which row a checkpoint file is")
    parser.add_argument("--seed", type=int, help="of a row; default: its best one")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="of a row; default: the one that decides")
    parser.add_argument("--input", choices=("uint8", "float32"), default="uint8", help="type of the images that go in")
    parser.add_argument(
        "--check-images",
        type=int,
        default=8,
        metavar="N",
        help="validation images on which the figure is compared, where the shards are here; default: %(default)s",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()
    if arguments.check_images < 0:
        command_line().error("--check-images must be 0 or more")

    from pipeline.export.target import attach, check_target, has_validation_images

    check_target(arguments.out, force=arguments.force, folder=arguments.format == "huggingface")

    from pipeline.data.shards.look import current_manifest
    from pipeline.export.export import export
    from pipeline.export.huggingface import require_transformers
    from pipeline.export.onnx_file import require_onnx
    from pipeline.params.load import load_params
    from pipeline.registry.source import open_source
    from pipeline.storage.results.data import Manifest
    from pipeline.storage.results.folder import find_result

    if arguments.format == "onnx":
        require_onnx()
    params = load_params(arguments.params)
    source = open_source(
        arguments.source, params=params, row=arguments.row, seed=arguments.seed, checkpoint=arguments.checkpoint
    )
    manifest = None
    if source.row is not None and arguments.format == "huggingface":
        require_transformers(source.row.model)
    if source.row is not None and arguments.check_images > 0:
        dataset = source.row.dataset
        if find_result(Manifest, dataset) is not None:
            manifest = current_manifest(params, dataset)
        if manifest is None or not has_validation_images(manifest):
            manifest = None
            print(
                f"the figure is not compared: the shards of {dataset} are not here; make them with: "
                f"dvc repro shard@{dataset}",
                file=sys.stderr,
            )
    made = export(
        source,
        arguments.out,
        form=arguments.format,
        pixels=arguments.input,
        manifest=manifest,
        check_images=arguments.check_images,
    )
    print(f"{made.path}: {source.description}, {made.bytes / 2**20:,.1f} MiB")
    print(made.parity)
    if made.compared is not None:
        print(made.compared)
    if source.version is not None and arguments.format != "huggingface":
        attach(source.version, arguments.out, arguments.format)
        print(f"attached to version {source.version.version} of {source.version.name}")


if __name__ == "__main__":
    run(main, stopped=STOPPED)
