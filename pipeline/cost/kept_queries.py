"""A network with fresh weights is sure of nothing: here its predictions cost what those of a trained one cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m2f.types import Prediction
from pipeline.params.schema import Row

SEGMENTS = 11
"""Queries of a panoptic picture that compete for its pixels: one for each segment. COCO's 120,000 pictures hold 1.3
million (Deng et al., COCONut: Modernizing COCO Segmentation, 2024, sec. 1)."""

_SURE = 20.0
"""Logit of a query's class: its probability is 1 - 3e-7 among 150 classes, over every score threshold below that."""


class TypicalClasses(nn.Module):
    """A network that is called like `model`, takes as long, and is as sure of its classes as a trained one.

    panoptic: SEGMENTS queries are sure of a class each, the others of "no object". instance: every query is sure of a
    class, so that the `max_instances` likeliest pairs of query and class are of as many queries as there can be. How
    many a trained network has is between that and one. Masks are those of `model`.
    """

    def __init__(self, model: nn.Module, row: Row) -> None:
        super().__init__()
        self.model = model
        queries, classes = row.model.query_decoder.queries, row.model.num_classes
        sure = min(queries, SEGMENTS) if row.task == "panoptic" else queries
        label_Q = torch.arange(queries) % classes
        label_Q[sure:] = classes  # no object
        logits_QC1 = _SURE * nn.functional.one_hot(label_Q, classes + 1).float()
        self.register_buffer("class_logits", logits_QC1, persistent=False)
        self.class_logits: Tensor

    def forward(self, images: Tensor, *, auxiliary: bool) -> Prediction:
        """The model's prediction with other class logits."""
        made: Prediction = self.model(images, auxiliary=auxiliary)
        logits_BQC1 = self.class_logits.expand(len(images), -1, -1)
        return Prediction(logits_BQC1, made.mask_logits, made.auxiliary)
