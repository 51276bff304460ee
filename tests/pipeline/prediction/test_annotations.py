"""Predictions in COCO's words, on maps that are counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from pycocotools import mask as coco

from m2f.inference import Instances, Segments
from pipeline.evaluation.predict import Predictions
from pipeline.prediction.annotations import annotated
from pipeline.prediction.network import TrainedNetwork

Make = Callable[..., TrainedNetwork]


def test_segments_have_ids_areas_and_boxes_and_the_label_map_is_the_one_of_miou(network_of: Make) -> None:
    segments = Segments(
        segments=torch.tensor([[0, 0, -1], [1, 1, -1]], dtype=torch.int32),
        labels=torch.tensor([2, 0]),
        is_thing=torch.tensor([True, False]),
        scores=torch.tensor([0.5, 0.75]),
    )
    labels = torch.tensor([[2, 2, 1], [0, 0, 1]], dtype=torch.uint8)
    found = annotated(Predictions(labels=labels, segments=segments), network_of("panoptic"))
    assert found.segment_ids is not None and found.segment_ids.tolist() == [[1, 1, 0], [2, 2, 0]]
    assert found.label_map.tolist() == labels.tolist() and found.label_map.dtype == np.uint8
    assert found.annotations == [
        {"id": 1, "category_id": 2, "isthing": 1, "score": 0.5, "iscrowd": 0, "area": 2, "bbox": [0, 0, 2, 1]},
        {"id": 2, "category_id": 0, "isthing": 0, "score": 0.75, "iscrowd": 0, "area": 2, "bbox": [0, 1, 2, 1]},
    ]


def test_all_instances_are_annotated_and_the_sure_ones_drawn_the_surest_on_top(network_of: Make) -> None:
    masks = torch.tensor([[[1, 1, 0]], [[0, 1, 1]], [[1, 1, 1]]], dtype=torch.bool)
    instances = Instances(
        scores=torch.tensor([0.75, 0.5, 0.25]),
        labels=torch.tensor([0, 0, 0]),
        masks=masks,
        boxes=torch.tensor([[0.0, 0, 2, 1], [1, 0, 3, 1], [0, 0, 3, 1]]),
    )
    found = annotated(Predictions(instances=instances), network_of("instance"))
    assert found.objects.ids.tolist() == [[0, 0, 1]] and found.objects.labels == [0, 0]
    assert found.label_map.tolist() == [[0, 0, 0]]
    assert [each["score"] for each in found.annotations] == [0.75, 0.5, 0.25]
    assert [each["bbox"] for each in found.annotations] == [[0, 0, 2, 1], [1, 0, 2, 1], [0, 0, 3, 1]]
    decoded = [coco.decode(each["segmentation"]).tolist() for each in found.annotations]
    assert decoded == masks.int().tolist()


def test_pixels_of_no_instance_are_255(network_of: Make) -> None:
    none = Instances(
        scores=torch.zeros(0),
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 1, 2, dtype=torch.bool),
        boxes=torch.zeros(0, 4),
    )
    found = annotated(Predictions(instances=none), network_of("instance"))
    assert found.label_map.tolist() == [[255, 255]] and not found.annotations and not found.objects.labels


def test_every_class_of_a_label_map_is_one_annotation(network_of: Make) -> None:
    labels = torch.tensor([[2, 2, 0], [2, 0, 0]], dtype=torch.uint8)
    found = annotated(Predictions(labels=labels), network_of("semantic"))
    assert [(each["category_id"], each["area"], each["bbox"]) for each in found.annotations] == [
        (0, 3, [1, 0, 2, 2]),
        (2, 3, [0, 0, 2, 2]),
    ]
    assert coco.decode(found.annotations[1]["segmentation"]).tolist() == [[1, 1, 0], [1, 0, 0]]
    assert found.objects.labels == [0, 2] and found.objects.ids.tolist() == [[1, 1, 0], [1, 0, 0]]
