"""Settings that weigh rare classes more, as params.yaml may give them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from pipeline.params.load import parse_params
from pipeline.params.schema import Row
from tests.helpers.shared import PROJECT

TREE = yaml.safe_load((PROJECT / "params.yaml").read_text())


def row_with(name: str = "camvid_tiny", *, weights: Any = None, sampling: Any = None) -> Row:
    """A row of params.yaml with these two settings."""
    tree = copy.deepcopy(TREE)
    row = tree["rows"][name]
    if weights is not None:
        row.setdefault("model", {}).setdefault("loss", {})["class_weights"] = weights
    if sampling is not None:
        row["train"]["sampling"] = sampling
    return parse_params(tree, "params.yaml").row(name)


def test_class_weights_are_by_class_id_or_by_name_and_a_class_left_out_has_one() -> None:
    # sky, building, pole, road, ...
    assert row_with(weights={"pole": 4, "sky": 0.5}).model.loss.class_weights == (0.5, 1.0, 4.0, *[1.0] * 8)
    assert row_with(weights=[2.0] * 11).model.loss.class_weights == (2.0,) * 11
    assert row_with().model.loss.class_weights == () and row_with().train.sampling is None
    assert row_with("nuclei_tiny", weights={"nucleus": 3}).model.loss.class_weights == (3.0,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"poles": 4}}, r"class_weights: no class is called 'poles'; did you mean 'pole'\?"),
        ({"weights": {"pole": 0}}, r"class_weights has 0\.0; every weight must be 0\.000001 to 1,000,000"),
        ({"weights": {"pole": 1e300}}, r"class_weights has 1e\+300; every weight must be 0\.000001 to 1,000,000"),
        ({"weights": {1: 2}}, "class_weights has the key 1; expected the name of a class"),
        ({"weights": {"pole": "4"}}, r"class_weights\[2\] is '4'; expected float"),
        ({"weights": [1.0, 2.0]}, "class_weights lists 2 weights for 11 classes; give one for each class, or"),
        ({"sampling": {"repeat_threshold": 0}}, r"repeat_threshold is 0\.0; .*, above 0 and at most 1"),
        ({"sampling": {"repeat_threshold": 1.5}}, r"repeat_threshold is 1\.5; .*, above 0 and at most 1"),
        ({"sampling": {}}, "sampling: 'repeat_threshold' is missing"),
    ],
)
def test_wrong_weights_and_thresholds_are_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"rows\.camvid_tiny\.(model\.loss|train)\.(sampling\.)?{message}"):
        row_with(**settings)
