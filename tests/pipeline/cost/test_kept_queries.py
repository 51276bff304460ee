"""How many queries a timed prediction has to work on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from m2f.inference import instances, panoptic_segments
from m2f.types import Prediction
from pipeline.cost.kept_queries import SEGMENTS, TypicalClasses
from pipeline.params.schema import Row

QUERIES, CLASSES = 20, 3


class Fresh(nn.Module):
    """A network that is sure of nothing; each query's mask is a row of its own."""

    def forward(self, images: torch.Tensor, *, auxiliary: bool) -> Prediction:
        assert not auxiliary
        masks_QQQ = torch.full((QUERIES, QUERIES, QUERIES), -9.0)
        masks_QQQ[range(QUERIES), range(QUERIES)] = 9.0
        return Prediction(torch.zeros(1, QUERIES, CLASSES + 1), masks_QQQ[None])


def timed(row: Row, task: Any) -> Prediction:
    decoder = dataclasses.replace(row.model.query_decoder, queries=QUERIES)
    model = dataclasses.replace(row.model, num_classes=CLASSES, query_decoder=decoder)
    made: Prediction = TypicalClasses(Fresh(), dataclasses.replace(row, task=task, model=model))(
        torch.zeros(1, 3, 80, 80), auxiliary=False
    )
    return made


def test_eleven_queries_compete_for_the_pixels_of_a_panoptic_picture(small_row: Row) -> None:
    (fresh,) = panoptic_segments(Fresh()(torch.zeros(1), auxiliary=False), (80, 80), thing_ids=range(CLASSES))
    assert len(fresh.labels) == 0
    (found,) = panoptic_segments(timed(small_row, "panoptic"), (80, 80), thing_ids=range(CLASSES))
    assert SEGMENTS == 11
    # each wins the 4 rows of pixels around its row of logits, or more; things, so all stay apart
    assert found.labels.tolist() == [0, 1, 2] * 3 + [0, 1]
    assert found.scores.min() > 0.999


@pytest.mark.parametrize("most", [10, 20])
def test_every_instance_is_of_a_query_of_its_own(small_row: Row, most: int) -> None:
    (found,) = instances(timed(small_row, "instance"), (80, 80), max_instances=most)
    assert found.scores.min() > 0.5
    tops = found.boxes[:, 1].tolist()
    assert len(set(tops)) == len(tops) == most  # the masks begin in different rows
