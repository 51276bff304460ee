"""Progress of long work on stderr: a bar that renews itself on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 15.0
"""The rate, and with it the time left, is that of the last seconds: a link that slows down shows at once."""


class Progress:
    """Counts `total` things (0: unknown) and says how far it is, how fast it goes and how long it will take.

    `scale` turns counts into the unit printed.
    """

    def __init__(self, what: str, total: int, *, unit: str, scale: float = 1.0, interval_s: float = 10.0) -> None:
        self.what, self.total, self.unit, self.scale = what, total, unit, scale
        self.terminal = sys.stderr.isatty()
        self.interval_s = 0.5 if self.terminal else interval_s
        self.done_before = self.count = 0
        self.begun_s = self.said_s = time.monotonic()
        self.samples = deque([(self.begun_s, 0)])

    def restart(self, count: int, total: int) -> None:
        """Go on from `count`, which was done earlier (or has to be done again) and says nothing about the rate."""
        self.done_before += count - self.count
        self.count, self.total = count, total
        self.samples = deque([(time.monotonic(), count)])

    def add(self, count: int = 1, *, note: Callable[[float], str] | None = None) -> None:
        """Count more of them; says so when the interval has passed. `note`: what to add, from the count per second."""
        self.count += count
        now_s = time.monotonic()
        if now_s - self.samples[-1][0] >= WINDOW_S / 60:
            self.samples.append((now_s, self.count))
            while now_s - self.samples[0][0] > WINDOW_S and len(self.samples) > 2:
                self.samples.popleft()
        if now_s - self.said_s >= self.interval_s:
            self.said_s = now_s
            self._say(self._line(now_s, note), end="\r" if self.terminal else "\n")

    def done(self, *, brief: bool = False) -> None:
        """The last line: how much, and how long it took; `brief`: only if anything has been said before."""
        if brief and self.said_s == self.begun_s:
            return
        elapsed_s, made = max(time.monotonic() - self.begun_s, 1e-9), self.count - self.done_before
        things, taken = self._things(self.count), f"in {duration(elapsed_s)}, {self._amount(made / elapsed_s)}/s"
        if self.done_before <= 0:
            self.say(f"{things} {taken}")
        else:
            self.say(
                f"{things}, {made * self.scale:,.0f} of them {taken}" if made else f"{things}, all finished before"
            )

    def say(self, text: str) -> None:
        """A line of its own."""
        self._say(f"{self.what}: {text}", end="\n")

    def _line(self, now_s: float, note: Callable[[float], str] | None = None) -> str:
        since_s, before = self.samples[0]
        rate = (self.count - before) / max(now_s - since_s, 1e-9)
        more = f", {note(rate)}" if note else ""
        if not self.total:
            return f"{self.what}: {self._things(self.count)}, {self._amount(rate)}/s{more}"
        share = min(1.0, self.count / self.total)
        left = f", {duration((self.total - self.count) / rate)} left" if rate and self.count < self.total else ""
        done = f"{self.count * self.scale:,.0f} of {self._things(self.total)} ({share:.0%})"
        figures = f"{done}, {self._amount(rate)}/s{more}{left}"
        width = min(30, shutil.get_terminal_size().columns - len(f"{self.what} [] {figures}") - 1)
        if not self.terminal or width < 5:
            return f"{self.what}: {figures}"
        full = round(share * width)
        return f"{self.what} [{'#' * full}{'.' * (width - full)}] {figures}"

    def _things(self, count: int) -> str:
        number = f"{count * self.scale:,.0f}"
        return f"{number} {self.unit.removesuffix('s') if number == '1' else self.unit}"

    def _amount(self, count: float) -> str:
        amount = count * self.scale
        return f"{amount:,.1f} {self.unit}" if amount < 100 else f"{amount:,.0f} {self.unit}"

    def _say(self, line: str, *, end: str) -> None:
        if self.terminal:
            columns = shutil.get_terminal_size().columns - 1
            line = f"{line[:columns]:<{columns}}"  # covers the line before it
        print(line, end=end, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """42 s, 12 min, 3.4 h, 5.1 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
