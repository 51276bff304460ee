from __future__ import annotations

from pathlib import Path

from pipeline.comparison.rows import row_facts
from pipeline.params.schema import Params
from pipeline.report.html.speed import speed_charts
from tests.helpers.report_rows import RULE, benchmark, evaluated, written


def test_a_charts_rows_have_names_of_their_own_without_the_words_that_all_begin_with(
    params: Params, tmp_path: Path
) -> None:
    written(tmp_path, evaluated("published", [0.8]), benchmark("published"))
    facts = row_facts(params.rows["published"], tmp_path, RULE)

    def names(*rows: str) -> list[str]:
        (chart,) = speed_charts(dict.fromkeys(rows, facts))
        return [name for name, _ in chart.rows]

    assert names("my_data_r50", "my_data_r50_authors", "my_data_swin-s_authors") == [
        "r50",
        "r50_authors",
        "swin-s_authors",
    ]
    assert names("x_r50", "x_r50_authors") == ["r50", "r50_authors"]
    assert names("x_tiny") == ["tiny"]
    assert names("mine", "x_tiny") == ["mine", "x_tiny"]
