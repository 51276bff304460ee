from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.comparison.rows import counts, row_facts
from pipeline.comparison.tables import table_line
from pipeline.params.schema import Params
from pipeline.params.tasks import FIGURES
from pipeline.report.sentences import published_sentences
from pipeline.report.text import markdown, text_table
from pipeline.storage.results.folder import write_result
from tests.helpers import made_up
from tests.helpers.report_rows import RULE, evaluated, figures, published, written


def test_multi_scale_and_flip_stands_beside_the_authors(params: Params, tmp_path: Path) -> None:
    checkpoint = figures("semantic", 0.8, miou_ms_flip=0.815)
    written(tmp_path, evaluated("published", [checkpoint]))
    facts = row_facts(params.rows["published"], tmp_path, RULE)
    assert facts.median["miou_ms_flip"] == 81.5
    assert facts.difference == {"miou": -0.44}  # the authors' 82.2 is not judged against
    text = markdown({"published": facts}, RULE)
    assert (
        "| Row | Verdict | mIoU | seeds | published | difference | mIoU authors' | mIoU (ms+flip) "
        "| mIoU (ms+flip) authors' | memory, GiB, published | images/s, published |\n" in text
    )
    assert "| published | undecided | 80.00 | 1 | 80.44 | -0.44 | 79.40 | 81.50 | 82.20 | 5.67 | 9.17 A100 |\n" in text


def test_a_panoptic_row_compares_pq_and_ap(params: Params, tmp_path: Path) -> None:
    # PQ 51.5, 52.6, 52.1: median 52.1, 52.1 - 52.0 = +0.10. AP 41.0, 41.9, 41.5: median 41.5, 41.5 - 41.8 = -0.30.
    # mIoU 61, 63, 62: median 62, published by nobody but the authors. The other figures are PQ's.
    seeds = [
        figures("panoptic", pq, ap=ap, miou=miou)
        for pq, ap, miou in ((0.515, 0.41, 0.61), (0.526, 0.419, 0.63), (0.521, 0.415, 0.62))
    ]
    written(tmp_path, evaluated("panoptic", [*seeds], task="panoptic"))
    facts = row_facts(params.rows["panoptic"], tmp_path, RULE)
    assert facts.difference == {"pq": 0.1, "ap": -0.3}
    assert (facts.task, facts.primary, facts.status) == ("panoptic", "pq", "finished")
    text = markdown({"panoptic": facts}, RULE)
    assert (
        "## Panoptic segmentation\n" in text
        and "| Row | Verdict | PQ | range | seeds | published | difference | PQ authors' | AP | AP published "
        "| AP difference | AP authors' | mIoU | mIoU authors' |\n"
        in text
    )
    # Mean 52.067, s = sqrt((0.567^2 + 0.533^2 + 0.033^2) / 2) = 0.551; 52.067 -+ 2.920 * 0.551 * sqrt(4 / 3) is
    # 50.21 to 53.92, which holds 52.0 and reaches further than a point from it.
    assert (
        "| panoptic | undecided | 52.10 | 51.50 to 52.60 | 3 | 52.00 | +0.10 | 51.90 | 41.50 | 41.80 | -0.30 | 41.70 "
        "| 62.00 | 61.70 |\n" in text
    )
    assert "one further training is expected between 50.21 and 53.92 (90 %)" in text
    assert "| 0 | 51.50 | 52.50 (step 80) | 51.50 | 51.50 | 51.50 | 51.50 | 41.00 | 61.00 | - | k0 |\n" in text
    assert "Semantic" not in text and "Instance" not in text


def test_a_row_without_published_figures_has_no_difference_and_shows_the_authors(
    params: Params, tmp_path: Path
) -> None:
    # The best checkpoints decide: 43.0, 45.0 and 44.0, each a point above the last.
    result = evaluated("instance", [0.42, 0.44, 0.43], task="instance", rule="best")
    written(tmp_path, result)
    facts = row_facts(params.rows["instance"], tmp_path, RULE)
    assert facts.difference == {}
    text = markdown({"instance": facts}, RULE)
    assert "| Row | Verdict | AP | range | seeds | AP authors' |\n" in text  # nothing is published but the authors'
    assert "| instance | no verdict | 44.00 | 43.00 to 45.00 | 3 | 43.70 |\n" in text
    assert "\nAP is published only by the authors, under another recipe: 43.70.\n" in text


def test_both_checkpoints_are_shown_and_the_one_in_the_table_is_named(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("published", [0.8]))
    written(tmp_path, evaluated("instance", [0.42], task="instance", rule="best", key="i"))
    rows = {name: row_facts(params.rows[name], tmp_path, RULE) for name in ("published", "instance")}
    rows["instance"] = dataclasses.replace(rows["instance"], published={"ap": 42.9})
    text = markdown(rows, RULE)
    assert "| Seed | mIoU, last (in the table) | mIoU, best on validation | mIoU (ms+flip) | mean acc. | pixel" in text
    assert "| 0 | 80.00 | 81.00 (step 80) | - | 80.00 | 90.00 | - | k0 |" in text
    assert "| Seed | AP, last | AP, best on validation (in the table) | AP50 |" in text
    assert "| 0 | 42.00 | 43.00 (step 80) | 43.00 |" in text
    semantic, instance = text.split("## Instance segmentation")
    assert "Where it is not known which checkpoint a published figure is of, the last is compared. Each" in semantic
    known = "The checkpoint whose figures are published, and compared, is the"
    assert known not in semantic
    assert f"{known} best on validation." in instance
    of_unknown = dataclasses.replace(rows["instance"], checkpoint_rule="unknown")
    assert f"{known} best on validation: instance." in markdown({**rows, "another": of_unknown}, RULE)
    assert (rows["instance"].seeds[0].step, rows["published"].seeds[0].step) == (80, 100)


def test_a_figure_that_one_seed_lacks_has_no_median(params: Params, tmp_path: Path) -> None:
    seeds = [figures("instance", 0.4), figures("instance", 0.4, ap_large=None), figures("instance", 0.4)]
    written(tmp_path, evaluated("instance", [*seeds], task="instance"))
    facts = row_facts(params.rows["instance"], tmp_path, RULE)
    assert (facts.median["ap_large"], facts.range["ap_large"]) == (None, None)
    assert (facts.median["ap_medium"], facts.status) == (40.0, "finished")
    line = table_line("instance", facts)
    assert (line["ap"].text, line["range"].text) == ("40.00", "40.00 to 40.00")
    assert "| 1 | 40.00 | 41.00 (step 80) | 40.00 | 40.00 | 40.00 | 40.00 | - | - | k1 |" in markdown(
        {"instance": facts}, RULE
    )


def test_a_rows_other_published_checkpoints_are_listed_after_its_own(params: Params, tmp_path: Path) -> None:
    own = published("published", "semantic", figures("semantic", 0.8044), difference={"miou": 0.0})
    theirs = published("published", "semantic", figures("semantic", 0.7951), difference={"miou": 0.11})
    authors = dataclasses.replace(theirs, checkpoint="published_authors")
    written(tmp_path, own)
    for other in (authors, dataclasses.replace(authors, row="published_authors-of-another", checkpoint="")):
        write_result(other, other.name, results=tmp_path)
    facts = row_facts(params.rows["published"], tmp_path, RULE)
    assert list(facts.as_json()["other_checkpoints"]) == ["published_authors"]
    first, second = published_sentences("published", facts)
    assert first.startswith("published: the published checkpoint, evaluated here, has mIoU 80.44 (+0.00 ")
    assert second.startswith("published_authors: the published checkpoint, evaluated here, has mIoU 79.51 (+0.11 ")


def test_the_published_checkpoint_evaluated_here_stands_beside_the_published_figures(
    params: Params, tmp_path: Path
) -> None:
    checkpoint = figures("semantic", 0.80436, pixel_accuracy=0.95)
    result = published("published", "semantic", checkpoint, difference={"miou": -0.004}, pad_multiple=32)
    written(tmp_path, result)
    facts = row_facts(params.rows["published"], tmp_path, RULE)
    assert facts.as_json()["published_checkpoint"] == {
        "miou": 80.44,
        "mean_accuracy": 80.44,
        "pixel_accuracy": 95.0,
        "difference": {"miou": 0.0},
        "pad_multiple": 32,
        "other_padding": None,
        "agrees": None,
        "per_class": {"iou": {"road": 80.44, "<sky>": None}},
    }
    assert (
        "\n- published: the published checkpoint, evaluated here, has mIoU 80.44 (+0.00 from the published figure), "
        "mean acc. 80.44, pixel acc. 95.00.\n" in markdown({"published": facts}, RULE)
    )
    assert row_facts(params.rows["ours"], tmp_path, RULE).published_checkpoint is None


def test_the_padding_that_agrees_better_is_told_with_both_values(params: Params, tmp_path: Path) -> None:
    other = made_up.padded(figures("panoptic", 0.519), pad_multiple=32, difference={"pq": -0.1})
    result = published(
        "panoptic",
        "panoptic",
        figures("panoptic", 0.5203, ap=0.419),
        difference={"pq": 0.03, "ap": 0.1},
        other_padding=other,
        agrees=1,
    )
    written(tmp_path, result)
    facts = row_facts(params.rows["panoptic"], tmp_path, RULE)
    assert facts.as_json()["published_checkpoint"]["other_padding"] == {
        **dict.fromkeys(FIGURES["panoptic"], 51.9),
        "difference": {"pq": -0.1},
        "pad_multiple": 32,
    }
    text = markdown({"panoptic": facts}, RULE)
    assert "has PQ 52.03 (+0.03 from the published figure), SQ 52.03, " in text
    assert "AP 41.90 (+0.10), mIoU 52.03. PQ is 52.03 (+0.03) without padding and 51.90 (-0.10) padded to multiples "
    assert text.count(": without padding agrees better.\n") == 1


def test_without_a_published_figure_no_padding_agrees_better(params: Params, tmp_path: Path) -> None:
    other = made_up.padded(figures("instance", 0.42))
    result = published("instance", "instance", figures("instance", 0.43), pad_multiple=32, other_padding=other)
    written(tmp_path, result)
    text = markdown({"instance": row_facts(params.rows["instance"], tmp_path, RULE)}, RULE)
    assert "AP is 42.00 without padding and 43.00 padded to multiples of 32.\n" in text


def test_a_diverged_seed_counts_as_failed_and_its_reason_is_told(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("ours", [0.7, None, 0.72]))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert facts.status == "incomplete"
    assert facts.median["miou"] == 71.0
    text = markdown({"ours": facts}, RULE)
    assert "| ours | no verdict (incomplete) | 71.00 | 70.00 to 72.00 | 2 of 3 |\n" in text
    assert "| 1 | diverged: the loss is not finite at step 7 | - | - | - | - | - | k1 |\n" in text
    assert "- ours: seed 1 diverged: the loss is not finite at step 7.\n" in text
    assert "\nPredicting road everywhere gives mIoU 6.25.\n" in text


def test_the_terminals_tables_show_rows_and_columns_with_figures_and_name_the_others(
    params: Params, tmp_path: Path
) -> None:
    written(tmp_path, evaluated("published", [0.8]))
    written(tmp_path, evaluated("panoptic", [0.52] * 3, task="panoptic"))
    rows = {name: row_facts(row, tmp_path, RULE) for name, row in params.rows.items()}
    lines = text_table(rows).splitlines()
    assert lines[0] == "Semantic segmentation"
    assert lines[1].split() == ["Row", "Verdict", "mIoU", "seeds", "published", "diff."]
    assert lines[3].split() == ["published", "undecided", "80.00", "1", "80.44", "-0.44"]
    assert lines[4:6] == ["", "Panoptic segmentation"]
    assert lines[8].startswith("panoptic")
    assert lines[9:] == ["", "2 rows not run: ours, instance", "", "Of 3 published rows: 2 undecided, 1 not run."]


def test_verdicts_are_counted_and_told_with_their_reason(params: Params, tmp_path: Path) -> None:
    # 80.2, 80.3, 80.4: mean 80.3, s 0.1; 80.3 -+ 2.920 * 0.1 * sqrt(4 / 3) is 79.96 to 80.64, within 80.44 -+ 1.
    row = dataclasses.replace(params.rows["published"], seeds=(0, 1, 2))
    written(tmp_path, evaluated("published", [0.802, 0.803, 0.804]))
    facts = row_facts(row, tmp_path, RULE)
    assert (facts.verdict.decision, facts.verdict.interval) == ("reproduced", (79.96, 80.64))
    rows = {"published": facts} | {
        name: row_facts(params.rows[name], tmp_path, RULE) for name in ("ours", "panoptic", "instance")
    }
    assert counts(rows) == {
        "reproduced": 1, "above": 0, "below": 0, "undecided": 0, "no verdict": 0, "not run": 2,
    }  # fmt: skip
    text = markdown(rows, RULE)
    assert "Of 3 published rows: 1 reproduced, 2 not run.\n" in text
    assert "\nThe median of 3 seeds, 80.30, is 0.14 below the published 80.44; " in text
    assert "\nThe median over all possible seeds lies between 80.20 and 80.40 with 75 % confidence.\n" in text


def test_rows_that_have_not_been_run_are_folded_below_the_finished_ones_which_come_first(
    params: Params, tmp_path: Path
) -> None:
    # "ours" has two of its three seeds, "published" all: it is shown first, although it comes later in params.yaml.
    written(tmp_path, evaluated("ours", [0.7, 0.71]))
    written(tmp_path, evaluated("published", [0.8]))
    text = markdown({name: row_facts(row, tmp_path, RULE) for name, row in params.rows.items()}, RULE)
    assert text.index("| published | undecided |") < text.index("| ours | no verdict (incomplete) |")
    assert text.index("### published") < text.index("### ours")
    folded = "<details>\n<summary>1 row not run: panoptic</summary>\n\n| Row | published |"
    assert folded in text and "\n| panoptic | 52.00 | 51.90 | 41.80 | 41.70 | 61.70 |\n\n</details>\n" in text
    assert "<summary>1 row not run: instance</summary>" in text


def test_html_in_names_is_text_in_markdown(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("ours", [0.7, None, 0.72]))
    text = markdown({"<b> & co": row_facts(params.rows["ours"], tmp_path, RULE)}, RULE)
    assert "<b>" not in text
    assert "\n### &lt;b> &amp; co\n" in text and "\n- &lt;b> &amp; co: seed 1 diverged" in text


def test_the_terminal_shows_the_authors_figure_where_a_row_is_judged_by_it(params: Params, tmp_path: Path) -> None:
    row = dataclasses.replace(params.rows["published"], published={}, figures="published_authors")
    written(tmp_path, evaluated("published", [0.8]))
    rows = {"published": row_facts(row, tmp_path, RULE)}
    assert text_table(rows).splitlines()[3].split() == ["published", "undecided", "80.00", "1", "79.40", "+0.60"]
