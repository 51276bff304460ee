"""A rehearsal as a page and as JSON."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.report.html.environment import environment
from pipeline.storage.files import write_json, write_text

if TYPE_CHECKING:
    from pipeline.params.schema import Row
    from pipeline.rehearsal.findings import Findings
    from pipeline.rehearsal.project import Extent, Project
    from pipeline.rehearsal.steps import Step


def extent_in_words(row: Row, extent: Extent, project: Project) -> list[str]:
    """What was rehearsed, and what of it is not as in the row."""
    height, width = project.size
    said = [
        f"{extent.steps} steps and {extent.images} validation images of {height} x {width}, which were generated in "
        f"the layout of {row.dataset}."
    ]
    if extent.one_image:
        said.append("On a CPU: a step is one group of one image, and images are evaluated at one size only.")
    if extent.scale != 1:
        said.append(f"Images, crops and test sizes have {extent.scale:g} times the row's sides.")
    weights = "the published ones" if extent.real_weights else "random ones, in the published layout where there is one"
    return [*said, f"Initial weights are {weights}. Nothing of it is kept but this page; no figure here is a result."]


def write_page(
    row: Row, extent: Extent, project: Project, steps: Sequence[Step], findings: Findings, folder: Path
) -> Path:
    """Write <row>.html and <row>.json; the page's path."""
    words = extent_in_words(row, extent, project)
    page = environment(Path(__file__).with_name("templates")).get_template("page.html").render(
        row=row.name, words=words, steps=steps, findings=findings, made=time.strftime("%Y-%m-%d %H:%M"),
    )  # fmt: skip
    path = folder / f"{row.name}.html"
    write_text(path, page)
    write_json(
        folder / f"{row.name}.json",
        {
            "row": row.name,
            "extent": dataclasses.asdict(extent),
            "steps": [dataclasses.asdict(step) for step in steps],
            **dataclasses.asdict(findings),
        },
    )
    return path
