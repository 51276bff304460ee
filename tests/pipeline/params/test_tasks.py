"""What tasks report, as tables and other programs show it."""

from __future__ import annotations

import pytest

from pipeline.params.tasks import headline, in_words, percent


def test_a_fraction_is_shown_in_percent_and_what_is_not_known_stays_so() -> None:
    assert percent(0.25) == 25.0
    assert percent(None) is None


@pytest.mark.parametrize(("task", "names"), [("panoptic", ("pq", "ap", "miou")), ("semantic", ("miou",))])
def test_a_task_is_known_by_few_of_its_figures(task: str, names: tuple[str, ...]) -> None:
    assert headline(task) == names


def test_a_sentence_says_them_in_percent() -> None:
    assert in_words({"pq": 0.52, "ap": None, "miou": 0.617, "sq": 0.8}, "panoptic") == "PQ 52.00, AP -, mIoU 61.70"
