"""Where MLflow shows a run or a registered model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote

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

    def version(self, model: str, version: int) -> str | None:
        """The page of a registered model's version."""
        return self._page(f"models/{quote(model, safe='')}/versions/{version}")

    def sentence(self) -> str:
        """Where the links lead, and what must run for it."""
        if self.address is None:
            return "Runs and registered models are in MLflow; its store has no address to link to."
        if self.address == self.tracking_uri.rstrip("/"):
            return f"Run keys and registered models are links to MLflow at {self.address}."
        return (
            f"Run keys and registered models are links to MLflow at {self.address}. Start mlflow ui first, as in "
            "docs/tracking.md: it shows the local database there."
        )

    def _page(self, place: str) -> str | None:
        return f"{self.address}/#/{place}" if self.address else None
