"""A plan as text: a table of the rows, and what is shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cost.speed import HOUR_S
from pipeline.storage.progress import duration


def text(plan: Mapping[str, Any]) -> str:
    """What `python -m stages.plan` prints."""
    total, settings = plan["total"], plan["settings"]
    head = ["row", "seeds", "steps", "s/step", "seed takes", "GPU-hours", "range", "cost", "row takes", "GiB", "from"]
    lines = [_line(entry) for entry in plan["rows"]]
    size = f"{sum(entry['gib'] for entry in plan['rows']):,.1f}"
    steps, money = f"{total['steps']:,}", _money(total["money"])
    lines.append(["all", f"{total['seeds_left']}", steps, "", "", *_hours(total["gpu_hours"]), money, "", size, ""])
    if total["money"] is None:
        head, lines = _without(head, lines, "cost")
    parts = [_aligned(head, lines)]
    least, expected, greatest = total["hours"]
    if greatest:
        gpus = f"{settings['gpus']} GPU{'s' * (settings['gpus'] > 1)}"
        spread = f" ({duration(least * HOUR_S)} to {duration(greatest * HOUR_S)})" if least != greatest else ""
        parts.append(f"On {gpus} that are always busy: {duration(expected * HOUR_S)}{spread}.")
    parts.append(_storage(plan))
    unknown = [entry["row"] for entry in plan["rows"] if entry["source"] is None]
    if unknown:
        parts.append(
            f"Not counted, for their speed is not known: {', '.join(unknown)}. "
            f"python -m stages.benchmark {unknown[0]} measures it."
        )
    parts.append(_assumptions(plan))
    return "\n\n".join(part for part in parts if part)


def _line(entry: Mapping[str, Any]) -> list[str]:
    known = entry["source"] is not None
    return [
        entry["row"],
        f"{entry['seeds_left']} of {entry['seeds']}",
        f"{entry['steps']:,}",
        f"{entry['step_s']:.3g}" if known else "-",
        duration(entry["seed_h"][1] * HOUR_S) if known else "-",
        *(_hours(entry["gpu_hours"]) if entry["gpu_hours"] else ("-", "")),
        _money(entry["money"]),
        duration(entry["hours"][1] * HOUR_S) if known and entry["hours"][1] else "-",
        f"{entry['gib']:,.1f}",
        f"{entry['evidence']}, {entry['device']}" if known else "not known",
    ]


def _hours(spread: Sequence[float]) -> tuple[str, str]:
    least, hours, greatest = (f"{each:,.0f}" if each >= 10 else f"{each:.2g}" for each in spread)
    return hours, f"{least} to {greatest}" if least != greatest else ""


def _money(spread: Sequence[float] | None) -> str:
    return "-" if spread is None else f"{spread[1]:,.0f} ({spread[0]:,.0f} to {spread[2]:,.0f})"


def _without(head: list[str], lines: list[list[str]], column: str) -> tuple[list[str], list[list[str]]]:
    place = head.index(column)
    return [*head[:place], *head[place + 1 :]], [[*line[:place], *line[place + 1 :]] for line in lines]


def _aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of text: names to the left, figures to the right."""
    table = [head, *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    left = {"row", "from", "range"}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in table
    )


def _storage(plan: Mapping[str, Any]) -> str:
    lines = [f"Storage: {plan['total']['gib']:,.1f} GiB in all, with checkpoints and overlays of every seed, and"]
    width = max(len(name) for name in plan["datasets"])
    for name, facts in plan["datasets"].items():
        shards = f"{facts['shards_gib']:,.1f} of shards ({facts['pixels']}{'' if facts['made'] else ', to be made'})"
        lines.append(f"  {name.ljust(width)}  {facts['archives_gib']:,.1f} of archives, {shards}")
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
    if any(entry["device_type"] == "cpu" for entry in plan["rows"]):
        notes.append("a row measured on a CPU takes one such machine, and no GPU-hours")
    return f"Expected, and least to greatest. {'; '.join(notes)}." if notes else ""
