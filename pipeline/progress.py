"""Progress of long work on stderr: a line that renews itself on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts `total` things (0: unknown) and says how far it is; `scale` turns counts into the unit printed."""

    def __init__(self, what: str, total: int, *, unit: str, scale: float = 1.0, interval_s: float = 10.0) -> None:
        self.what, self.total, self.unit, self.scale = what, total, unit, scale
        self.terminal = sys.stderr.isatty()
        self.interval_s = 0.5 if self.terminal else interval_s
        self.count = 0
        self.begun_s = self.said_s = time.monotonic()

    def add(self, count: int = 1) -> None:
        """Count more of them; says so when the interval has passed."""
        self.count += count
        now_s = time.monotonic()
        if now_s - self.said_s >= self.interval_s:
            self.said_s = now_s
            self._say(now_s, end="\r" if self.terminal else "\n")

    def done(self) -> None:
        """The last line."""
        self._say(time.monotonic(), end="\n")

    def _say(self, now_s: float, *, end: str) -> None:
        elapsed_s = max(now_s - self.begun_s, 1e-9)
        rate = self.count / elapsed_s
        of = f" of {self.total * self.scale:,.0f}" if self.total else ""
        left = f", {(self.total - self.count) / rate:.0f} s left" if rate and self.count < self.total else ""
        line = f"{self.what}: {self.count * self.scale:,.0f}{of} {self.unit} in {elapsed_s:.0f} s{left}"
        print(f"{line:<79}" if self.terminal else line, end=end, file=sys.stderr, flush=True)
