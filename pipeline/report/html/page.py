"""The report as one HTML page that loads nothing: a summary, accuracy against speed, the tables, then every
row that ran. templates/ has its HTML, svg.py draws its charts, style.css has its style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from pipeline.comparison.rows import Facts, counts, published_rows
from pipeline.comparison.tables import TITLES, by_task, finished_first, split
from pipeline.params.schema import VerdictConfig
from pipeline.report.html.environment import environment
from pipeline.report.html.overview import overview
from pipeline.report.html.row_section import Details, row_section
from pipeline.report.html.speed import speed_charts, without_speed
from pipeline.report.sentences import LEGEND, RULE, attention, how_to_read
from pipeline.tracking.pages import MlflowPages

SIGNS = {"reproduced": "=", "above": "▲", "below": "▼", "undecided": "?", "no verdict": "–", "not run": "○"}
"""A verdict's sign, so that nothing is said by colour alone."""


def page(
    rows: Mapping[str, Facts],
    details: Mapping[str, Details],
    *,
    settings: VerdictConfig,
    notes: Sequence[str],
    tracking: str,
) -> str:
    """The whole page.

    details: of the rows that ran; settings: by which verdicts were found; notes: what else is to be said; tracking:
    MLflow's address without a password.
    """
    ran, _ = split(finished_first(rows))
    mlflow = MlflowPages(tracking)
    tasks = by_task(rows)
    charts = speed_charts(rows)
    links = [("speed", "Speed")] if charts else []
    links += [(task, TITLES[task].partition(" ")[0]) for task in tasks]
    links += [("rows", "Row by row")] if ran else []
    in_mlflow = any(
        facts.registered or facts.mlflow_run_id or any(seed.mlflow_run_id for seed in facts.seeds)
        for facts in ran.values()
    )
    published = published_rows(rows)
    return _environment().get_template("page.html").render(
        style=Markup(Path(__file__).with_name("style.css").read_text(encoding="utf-8")),
        links=links,
        published=len(published),
        counts=counts(rows),
        own=[name for name in ran if name not in published],
        worries=attention(rows),
        verdict=how_to_read(settings) if published else (),
        legend=(LEGEND, RULE) if published else (LEGEND,),
        notes=[note for note in (*notes, mlflow.sentence() if in_mlflow else "") if note],
        charts=charts,
        without_speed=without_speed(rows),
        overviews=[overview(task, of_task, mlflow) for task, of_task in tasks.items()],
        sections=[row_section(name, facts, details[name], mlflow) for name, facts in ran.items()],
    )  # fmt: skip


@cache
def _environment() -> Environment:
    made = environment(Path(__file__).with_name("templates"))
    made.globals["SIGNS"] = SIGNS
    return made
