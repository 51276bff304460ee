from __future__ import annotations

import pytest

from pipeline.params.parse import parse
from pipeline.params.schema import MsFlipConfig
from pipeline.params.sentences import error_shown, shown


def test_a_value_of_up_to_120_characters_is_shown_whole_and_a_longer_one_without_its_middle() -> None:
    assert shown("a" * 118) == f"'{'a' * 118}'"  # with quotes, 120
    assert shown("b" * 600) == f"'{'b' * 57}...{'b' * 58}'"  # 1 + 57 + 3 + 58 + 1
    assert shown(list(range(100))) == "[0, 1, 2, 3, 4, 5, ...]"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("two\n  lines"), "two lines"),
        (KeyError(), "KeyError"),
        (ValueError("no \x00 and no \udcff"), "no ? and no ?"),
        (ValueError("x" * 201), f"{'x' * 200}..."),
    ],
)
def test_an_error_of_a_library_is_shown_on_one_short_line_that_can_be_printed(error: Exception, said: str) -> None:
    assert error_shown(error) == said


def test_a_setting_that_is_a_whole_section_by_mistake_is_refused_in_one_short_sentence() -> None:
    section = {f"key {number}": ["some", "values"] for number in range(100)}
    with pytest.raises(ValueError, match=r"^test.short_sides is \{'key 0'.* \.\.\.\}; expected a list$") as caught:
        parse(MsFlipConfig, {"short_sides": section, "long_side_max": 1}, "test")
    assert len(str(caught.value)) < 300
