"""Pictures of what was predicted beside what is true."""

from __future__ import annotations

import numpy as np

from pipeline.data.images.draw import class_colours, painted, segment_colours, stacked
from pipeline.data.loader.val_images import ValImage
from pipeline.evaluation.predict import Predictions
from pipeline.storage.stores import StoredPath

SHOWN_SCORE = 0.5
"""Instances that are less sure are not drawn."""


def write_overlay(path: StoredPath, val_image: ValImage, predictions: Predictions, num_classes: int) -> None:
    """A PNG of three panels: the picture, the prediction over it, the truth over it; where there is nothing, grey.

    Panoptic segments have their class's colour, things lighter or darker than their neighbours; instances a colour
    each, the surest on top.
    """
    import cv2

    from pipeline.storage.files import whole_file

    height, width = val_image.original_size
    image = val_image.image.permute(1, 2, 0).numpy()
    image = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_AREA)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)

    if predictions.segments is not None:
        assert val_image.segments is not None
        found = predictions.segments
        panels = [
            painted(grey, found.segments.cpu().numpy(), segment_colours(found.labels.tolist(), num_classes)),
            painted(grey, val_image.segments.numpy(), segment_colours(val_image.labels.tolist(), num_classes)),
        ]
    elif predictions.instances is not None:
        assert val_image.instances is not None
        from pycocotools import mask as coco

        sure = predictions.instances.masks[predictions.instances.scores >= SHOWN_SCORE].cpu().numpy()  # best first
        real = [
            run
            for run, crowd in zip(val_image.instances.run_lengths, val_image.instances.crowd, strict=True)
            if not crowd
        ]
        true = coco.decode(real).transpose(2, 0, 1) if real else np.zeros((0, height, width), np.uint8)
        panels = [painted(grey, stacked(masks, (height, width)), class_colours(len(masks))) for masks in (sure, true)]
    else:
        assert predictions.labels is not None and val_image.label_map is not None
        colours = class_colours(num_classes)
        panels = [
            painted(grey, labels, colours, borders=False)
            for labels in (predictions.labels.cpu().numpy(), val_image.label_map.numpy())
        ]
    gap = np.full((height, 4, 3), 255, np.uint8)
    sheet = np.hstack([image, gap, panels[0], gap, panels[1]])
    done, encoded = cv2.imencode(".png", sheet[..., ::-1])
    if not done:
        raise OSError(f"could not encode the overlay {path}")
    with whole_file(path) as partial:
        partial.write_bytes(encoded.tobytes())
