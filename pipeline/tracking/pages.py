"""Where MLflow shows rows, runs and registered models, and what its experiment says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from pipeline.params.tasks import FIGURES, LABELS, MS_FLIP, primary

NOTE = "mlflow.note.content"
"""Tag of an experiment or a run that holds its description, in Markdown."""
LOCAL = "http://127.0.0.1:5000"
"""Where `mlflow ui` shows a local database (docs/tracking.md)."""


@dataclass(frozen=True, slots=True)
class MlflowPages:
    """The pages of a tracking server, or of the local database that `mlflow ui` shows."""

    tracking_uri: str
    """Without a password."""

    @property
    def address(self) -> str | None:
        """Where the pages begin; None: the address is neither a server's nor a local database's."""
        if re.match("https?://", self.tracking_uri):
            return self.tracking_uri.rstrip("/")
        return LOCAL if self.tracking_uri.startswith("sqlite:") else None

    def run(self, run_id: str | None) -> str | None:
        """A run's page. MLflow finds the run's experiment, which results do not hold, and goes on to
        #/experiments/<experiment>/runs/<run>."""
        return self._page(f"runs/{run_id}") if run_id else None

    def rows(self, experiment: str | None, task: str) -> str | None:
        """The table of all rows of a task, beside each other. experiment: its id on this server."""
        return self._page(_rows_place(experiment, task)) if experiment else None

    def model(self, name: str) -> str | None:
        """The page of a registered model."""
        return self._page(f"models/{quote(name, safe='')}")

    def version(self, model: str, version: int) -> str | None:
        """The page of a registered model's version."""
        return self._page(f"models/{quote(model, safe='')}/versions/{version}")

    @property
    def how(self) -> str:
        """What must run before a link leads anywhere, in words after it; empty: nothing."""
        return ", after: mlflow ui --backend-store-uri " + self.tracking_uri if self.address == LOCAL else ""

    def sentence(self) -> str:
        """Where the links lead, and what must run for it."""
        if self.address is None:
            return "Runs and registered models are in MLflow; its store has no address to link to."
        if self.address == self.tracking_uri.rstrip("/"):
            return f"Run keys and registered models are links to MLflow at {self.address}."
        database = self.tracking_uri.rpartition("/")[2]
        return (
            f"Run keys and registered models are links to MLflow at {self.address}. Start mlflow ui first, in "
            f"the folder of the database: mlflow ui --backend-store-uri sqlite:///{database}"
        )

    def _page(self, place: str) -> str | None:
        return f"{self.address}/#/{place}" if self.address else None


def experiment_tags(experiment: str) -> dict[str, str]:
    """Tags of the experiment of this id: what it says of itself, and for each task a table of its rows, of which an
    address can name the columns only by such a tag."""
    tables = "\n".join(f"- [{task} rows](#/{_rows_place(experiment, task)})" for task in FIGURES)
    tags = {f"mlflow.sharedViewState.{_table(task)}": json.dumps(_row_table(task)) for task in FIGURES}
    return {NOTE: f"{_DESCRIPTION}\n\n{tables}\n", **tags}


_DESCRIPTION = f"""\
A run named like a row is the row: one line of a results table, with its settings. Below it are its trainings, one for \
each seed, and the published training if its log was fetched. Unfold the row to see them.

Figures ({", ".join(LABELS[primary(task)] for task in FIGURES)}, ...) are percent. `test/` is of the evaluated \
checkpoint; a row has the median of its seeds, the lowest and the highest. `published/` and `authors/` are the \
published figures and the original authors', and `difference/` is the median less the published figure, in points. \
`val/` is measured while training, `train/` are losses, learning rate and gradient norm.

The tag `m2f.verdict` says whether the published figure was reproduced. Tables of all rows:"""


def _rows_place(experiment: str, task: str) -> str:
    return f"experiments/{experiment}/runs?viewStateShareKey={_table(task)}"


def _table(task: str) -> str:
    return f"{task}-rows"


def _row_table(task: str) -> Mapping[str, object]:
    """A state of MLflow's page of runs: rows with their figures beside the published ones, seeds below them."""
    first, *others = {"panoptic": ("pq", "ap", "miou"), "semantic": ("miou", MS_FLIP), "instance": ("ap",)}[task]
    figures = [f"test/{first}_median", f"published/{first}", f"difference/{first}"]
    figures += [f"test/{first}_lowest", f"test/{first}_highest", *(f"test/{figure}_median" for figure in others)]
    figures += [f"test/{figure}" for figure in (first, *others)]  # of seeds
    columns = {f"tags.`m2f.{tag}`": 100 for tag in ("verdict", "status", "seed")}
    columns |= {f"metrics.`{name}`": 8 * len(name) + 30 for name in figures}
    columns |= {f"params.`{name}`": 100 for name in ("backbone", "dataset", "steps", "learning_rate")}
    return {
        "searchFilter": f"tags.`m2f.task` = '{task}'",
        "orderByKey": "attributes.start_time",  # with another order MLflow does not put seeds below their row
        "orderByAsc": False,
        "selectedColumns": list(columns),
        "columnOrder": ["0", _NAME, *columns],
        "columnWidths": {_NAME: 240, **columns},
    }


_NAME = "attributes.`Run Name`"
