from __future__ import annotations

from pathlib import Path

from pipeline.comparison.rows import row_facts
from pipeline.comparison.tables import table_line
from pipeline.params.load import load_params
from pipeline.params.schema import Params, VerdictConfig
from pipeline.provenance.run_key import settings_key
from pipeline.report.sentences import attention, how_to_read, table_notes
from tests.helpers import made_up
from tests.helpers.report_rows import RULE, ended, evaluated, page_of, trained, written
from tests.helpers.shared import PROJECT


def test_what_needs_a_look_is_told_with_the_command_that_mends_it(params: Params, tmp_path: Path) -> None:
    warning = made_up.below_reference(50, 0.31, 0.4125, "other seeds")
    seeds = [made_up.trained_seed(seed, below_reference=(warning,) if seed == 1 else ()) for seed in range(3)]
    warned = made_up.training("panoptic", seeds, settings_key(params.rows["panoptic"]))
    result = evaluated("panoptic", [0.52, 0.52, 0.52], task="panoptic")
    written(tmp_path, result)
    written(tmp_path, warned)
    written(tmp_path, trained("instance", 3))
    written(tmp_path, evaluated("ours", [0.7, 0.71], key="old"))
    written(tmp_path, trained("ours", 2, key="new"))
    stopped = made_up.evaluation("published", [ended(0, "stopped", "mIoU 31.00 is 10 points behind")])
    written(tmp_path, stopped)
    rows = {name: row_facts(row, tmp_path, RULE) for name, row in params.rows.items()}
    assert attention(rows) == [
        ("ours", "the figures are of an earlier training or of other settings; dvc repro evaluate@ours"),
        ("published", "seed 0 stopped: mIoU 31.00 is 10 points behind"),
        (
            "panoptic",
            "seed 1 was clearly below the other seeds at step 50: PQ 31.00, where 41.25 was expected",
        ),
        ("instance", "trained, but not evaluated; dvc repro evaluate@instance"),
    ]
    page = page_of(params, tmp_path)
    assert all(f">{name}</a>: {sentence}</li>" in page for name, sentence in attention(rows))


def test_a_seed_that_has_no_result_yet_is_missing(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("ours", [0.7, 0.71]))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert table_line("ours", facts)["seeds"].text == "2 of 3"
    assert attention({"ours": facts}) == [("ours", "a seed has no result yet; dvc repro evaluate@ours")]


def test_memory_that_the_published_table_misprints_is_named_below_the_table(tmp_path: Path) -> None:
    params = load_params(PROJECT / "params.yaml")
    facts = {name: row_facts(row, tmp_path, RULE) for name, row in params.rows.items() if row.task == "semantic"}
    assert table_line("ade20k_swin-s", facts["ade20k_swin-s"])["published memory"].text == "4.92"
    said = (
        "The published memory is corrected where it is a misprint: ade20k_swin-t 3.74 GiB (printed: 3826), "
        "ade20k_swin-s 4.92 GiB (printed: 3.74); see docs/rows.md."
    )
    assert said in table_notes("semantic", facts)
    assert not any("misprint" in note for note in table_notes("semantic", {"ade20k_r50": facts["ade20k_r50"]}))


def test_the_verdict_is_explained_in_two_sentences_with_an_example_by_the_rows_own_rule() -> None:
    # 80.2, 80.3, 80.4: mean 80.3, s 0.1; 80.3 -+ 2.920 * 0.1 * sqrt(4 / 3) is 79.96 to 80.64.
    rule, example = how_to_read(RULE)
    assert rule == (
        "The seeds of a row give a range in which a further training is expected (90 %). All of it within 1 point of "
        "the published figure means reproduced; otherwise, all of it on one side means above or below, and anything "
        "else undecided."
    )
    assert example == (
        "Example: the seeds 80.20, 80.30, 80.40 give the range 79.96 to 80.64. The published figure is 80.44, and "
        "within 1 point of it is 79.44 to 81.44: reproduced."
    )
    # Half a point around 80.44 is 79.94 to 80.94; 0.2 points is 80.24 to 80.64, which 79.96 lies outside of.
    assert how_to_read(VerdictConfig(margin_points=0.5))[1].endswith("is 79.94 to 80.94: reproduced.")
    assert how_to_read(VerdictConfig(margin_points=0.2))[1].endswith("is 80.24 to 80.64: undecided.")
