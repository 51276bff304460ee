"""Parameters and operations of the published rows beside the counts in the Mask2Former paper.

    python -m benchmarks.operations

The paper (arXiv 2112.01527, tables I, III and V) counts a multiplication and an addition as one. Its implementation
makes the masks of all ten predictions at a quarter of the image's size where ours, in inference, makes the last one's
only, and its count holds the sum of class scores over queries at the input's size, for semantic and panoptic rows.
"with those" adds both to ours.
"""

from __future__ import annotations

import argparse

from pipeline.data.images.sizes import PUBLISHED, Size, area, input_size
from pipeline.params.load import load_params
from pipeline.params.schema import Row

PAPER: dict[str, tuple[int, int]] = {
    "ade20k_r50": (44, 71),
    "ade20k_r101": (63, 90),
    "ade20k_swin-t": (47, 74),
    "ade20k_swin-s": (69, 98),
    "ade20k_swin-b": (107, 223),
    "ade20k_swin-b-in22k": (107, 223),
    "ade20k_swin-l-in22k": (215, 403),
    "coco_panoptic_r50": (44, 226),
    "coco_panoptic_r101": (63, 293),
    "coco_panoptic_swin-t": (47, 232),
    "coco_panoptic_swin-s": (69, 313),
    "coco_panoptic_swin-b": (107, 466),
    "coco_panoptic_swin-b-in22k": (107, 466),
    "coco_panoptic_swin-l-in22k": (216, 868),
    "coco_instance_r50": (44, 226),
    "coco_instance_r101": (63, 293),
    "coco_instance_swin-t": (47, 232),
    "coco_instance_swin-s": (69, 313),
    "coco_instance_swin-b": (107, 466),
    "coco_instance_swin-b-in22k": (107, 466),
    "coco_instance_swin-l-in22k": (216, 868),
}
"""Millions of parameters and G multiply-adds: ADE20K's at the crop's size (table V), COCO's the mean over 100
validation pictures (tables I and III). Cityscapes' are not printed."""


def parameters(row: Row) -> int:
    """Of the whole network."""
    import torch

    from m2f import build_model

    with torch.device("meta"):  # shapes only
        return sum(parameter.numel() for parameter in build_model(row.model).parameters())


def counted_like_the_paper(row: Row, size: Size) -> float:
    """Multiply-adds with the nine other predictions' masks and the sum of scores."""
    from pipeline.cost.benchmark import forward_flops

    decoder = row.model.query_decoder
    masks = decoder.layers * decoder.queries * row.model.pixel_decoder.channels * area(size) / 16
    scores = 0 if row.task == "instance" else decoder.queries * row.model.num_classes * area(size)
    return forward_flops(row, size) / 2 + masks + scores


def compared_size(row: Row) -> Size:
    """(height, width) that stands for the paper's pictures: the crop on ADE20K, else the usual picture as tested."""
    if row.dataset == "ade20k":
        return row.train.augmentation.crop
    return input_size(PUBLISHED[row.dataset].usual, row.test)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.operations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    from pipeline.cost.benchmark import forward_flops

    print("| row | M parameters | paper | size | G multiply-adds | with those | paper |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in load_params("params.yaml").rows.items():
        if row.dataset not in PUBLISHED:
            continue
        size = compared_size(row)
        million, operations = PAPER.get(name, ("", ""))
        figures = f"{forward_flops(row, size) / 2e9:.1f} | {counted_like_the_paper(row, size) / 1e9:.1f}"
        print(
            f"| {name} | {parameters(row) / 1e6:.1f} | {million} | {size[0]} x {size[1]} | {figures} | {operations} |"
        )


if __name__ == "__main__":
    main()
