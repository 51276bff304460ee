"""A plan as text of at most 100 columns: a table of the rows, one of their seeds, and what is shared."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.cost.speed import HOUR_S
from pipeline.storage.progress import duration

WIDTH = 100
"""Columns of a terminal that all of it fits into, where rows are called as those of params.yaml."""

_LEFT = ("row", "range", "from")
"""Columns of words; figures stand to the right of theirs."""


def text(plan: Mapping[str, Any], *, details: bool = False) -> str:
    """What `python -m stages.plan` prints; `details`: also steps, cost and evidence of every row."""
    parts = [_costs(plan), _time(plan), _seeds(plan), _details(plan) if details else "", _storage(plan)]
    unknown = [entry["row"] for entry in plan["rows"] if entry["source"] is None]
    if unknown:
        said = f"Not counted, for their speed is not known: {', '.join(unknown)}. What measures it:"
        parts.append(f"{_wrapped(said)}\n  python -m stages.benchmark {unknown[0]}")
    parts += [_assumptions(plan), "" if details else "--details shows steps, cost and evidence of every row."]
    return "\n\n".join(part for part in parts if part)


def _costs(plan: Mapping[str, Any]) -> str:
    """What is left to be done."""
    total = plan["total"]
    head = ["row", "seeds", "seed takes", "row takes", "GiB", "GPU-hours", "range"]
    lines = []
    for entry in plan["rows"]:
        known = entry["source"] is not None
        lines.append(
            [
                entry["row"],
                f"{entry['seeds_left']} of {entry['seeds']}",
                duration(entry["seed_h"][1] * HOUR_S) if known else "-",
                duration(entry["hours"][1] * HOUR_S) if known and entry["hours"][1] else "-",
                f"{entry['gib']:,.1f}",
                *(_hours(entry["gpu_hours"]) if entry["gpu_hours"] else ("-", "")),
            ]
        )
    size = f"{sum(entry['gib'] for entry in plan['rows']):,.1f}"
    lines.append(["all", f"{total['seeds_left']}", "", "", size, *_hours(total["gpu_hours"])])
    return _aligned(head, lines)


def _time(plan: Mapping[str, Any]) -> str:
    """Of all rows together; empty: nothing is left, or known."""
    gpus, total = plan["settings"]["gpus"], plan["total"]
    least, expected, greatest = total["hours"]
    if not greatest:
        return ""
    spread = f" ({duration(least * HOUR_S)} to {duration(greatest * HOUR_S)})" if least != greatest else ""
    cost = "" if total["money"] is None else f" Cost: {_money(total['money'])}."
    said = f"On {gpus} GPU{'s' * (gpus > 1)} that are always busy: {duration(expected * HOUR_S)}{spread}.{cost}"
    return _wrapped(said)


def _seeds(plan: Mapping[str, Any]) -> str:
    """What one, three and five seeds of every row cost, and what they can show."""
    settings = plan["settings"]
    cells: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "GPU-hours": lambda seeds: _hours(seeds["gpu_hours"])[0] if seeds["gpu_hours"] else "-",
        "cost": lambda seeds: f"{seeds['money'][1]:,.0f}" if seeds["money"] else "-",
        "chance": lambda seeds: "-" if seeds["chance"] is None else f"{seeds['chance']:.0%}",
    }
    if settings["price_per_gpu_hour"] is None:
        del cells["cost"]
    counts = [*plan["rows"][0]["by_seeds"]]
    lines = [
        [entry["row"], *(cell(entry["by_seeds"][count]) for cell in cells.values() for count in counts)]
        for entry in plan["rows"]
    ]
    said = _wrapped(
        f"What {', '.join(counts[:-1])} and {counts[-1]} seeds of a row cost, evaluation included, and the chance that "
        f"they show a difference of {settings['difference']:g} points from the published figure, where the standard "
        f"deviation between seeds is {settings['spread']:g} (--spread gives another; others report 0.1 to 0.7):"
    )
    numbers = [count.rjust(3) for count in counts]  # three of them are wider than the heading above
    table = _aligned(["row", *numbers * len(cells)], lines, above={"": 1} | dict.fromkeys(cells, len(counts)))
    return f"{said}\n\n{table}"


def _details(plan: Mapping[str, Any]) -> str:
    lines = []
    for entry in plan["rows"]:
        known = entry["source"] is not None
        lines.append(
            [
                entry["row"],
                f"{entry['steps']:,}",
                f"{entry['step_s']:.3g}" if known else "-",
                _money(entry["money"]),
                f"{entry['evidence']}, {entry['device']}" if known else "not known",
            ]
        )
    steps = f"{plan['total']['steps']:,}"
    lines.append(["all seeds to be trained", steps, "", _money(plan["total"]["money"]), ""])
    return _aligned(["row", "steps", "s/step", "cost", "from"], lines)


def _hours(spread: Sequence[float]) -> tuple[str, str]:
    least, hours, greatest = (f"{each:,.0f}" if each >= 10 else f"{each:.2g}" for each in spread)
    return hours, f"{least} to {greatest}" if least != greatest else ""


def _money(spread: Sequence[float] | None) -> str:
    return "-" if spread is None else f"{spread[1]:,.0f} ({spread[0]:,.0f} to {spread[2]:,.0f})"


def _aligned(head: Sequence[str], lines: Sequence[Sequence[str]], *, above: Mapping[str, int] | None = None) -> str:
    """Columns of text: names to the left, figures to the right. `above`: headings that so many columns share. What has
    no room goes on below the last column."""
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    printed = [
        "  ".join(
            cell.ljust(width) if name in _LEFT else cell.rjust(width)
            for cell, width, name in zip(line, widths, head, strict=True)
        )
        for line in (head, *lines)
    ]
    if above:
        left = iter(widths)
        shared = [name.rjust(sum(2 + next(left) for _ in range(count)) - 2) for name, count in above.items()]
        printed.insert(0, "  ".join(shared))
    last = " " * sum(2 + width for width in widths[:-1])
    return "\n".join(_wrapped(line.rstrip(), below=last) for line in printed)


def _storage(plan: Mapping[str, Any]) -> str:
    sizes = [facts[key] for facts in plan["datasets"].values() for key in ("archives_gib", "shards_gib")]
    but = " but for what is unknown" if None in sizes else ""
    lines = [f"Storage: {plan['total']['gib']:,.1f} GiB in all{but}, with checkpoints and overlays of every seed, and"]
    width = max(len(name) for name in plan["datasets"])
    for name, facts in plan["datasets"].items():
        archives, shards = (
            "unknown" if gib is None else f"{gib:,.1f}" for gib in (facts["archives_gib"], facts["shards_gib"])
        )
        made = "" if facts["made"] else ", to be made"
        lines.append(f"  {name.ljust(width)}  {archives} of archives, {shards} of shards ({facts['pixels']}{made})")
    return "\n".join(lines)


def _assumptions(plan: Mapping[str, Any]) -> str:
    settings = plan["settings"]
    evidence = {entry["evidence"]: None for entry in plan["rows"] if entry["evidence"]}
    sentences = {
        "published": "published: from the published inference speed on an A100 (docs/costs.md), 0.5 to 2.2 times that",
        "benchmark": f"benchmark: a measured step, {settings['efficiency']:.0%} of perfect scaling, 0.9 to 1.15 times",
        "log": "log: of the published training, 0.7 to 1.4 times that",
        "trained": "trained: the median of finished seeds",
    }
    notes = [sentences[each] for each in evidence]
    if scaled := [entry["row"] for entry in plan["rows"] if "operations" in (entry["source"] or "")]:
        notes.append(f"{', '.join(scaled)}: by the speed of the default pixel decoder and the operations of both")
    if any(entry["device_type"] == "cpu" for entry in plan["rows"]):
        notes.append("a row measured on a CPU takes one such machine, and no GPU-hours")
    return _wrapped(f"Expected, and least to greatest. {'; '.join(notes)}.") if notes else ""


def _wrapped(line: str, *, below: str = "") -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent=below, break_long_words=False, break_on_hyphens=False)
