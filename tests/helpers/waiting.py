"""How tests wait: for what they need, on however slow a machine."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable

LIMIT_S = 900.0
"""A wait of this length is taken for one without an end. It costs a passing test nothing, and none relies on it."""


def until(
    holds: Callable[[], object], *, ended: Callable[[], bool] = lambda: False, said: Callable[[], str] = lambda: ""
) -> None:
    """Return as soon as something holds.

    AssertionError with what `said` tells when that which should bring it about has `ended`, or after LIMIT_S.
    """
    begun_s = time.monotonic()
    while not holds():
        assert not ended() or holds(), said()
        assert time.monotonic() - begun_s < LIMIT_S, said()
        time.sleep(0.05)


def answers(url: str) -> bool:
    """Whether a server answers at an address, be it with an error."""
    try:
        urllib.request.urlopen(url, timeout=60).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
