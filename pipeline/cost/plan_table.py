"""A plan as text: a table of the rows, what is shared, and who has which pool when."""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping, Sequence
from typing import Any

CHART = 64
"""Columns of the chart of pools."""


def text(plan: Mapping[str, Any]) -> str:
    """What `python -m stages.plan` prints."""
    total, settings = plan["total"], plan["settings"]
    head = [
        "",
        "row",
        "seeds",
        "steps",
        "s/step",
        "seed takes",
        "GPU-hours",
        "range",
        "cost",
        "done after",
        "GiB",
        "from",
    ]
    letters = _letters(plan)
    lines = [[letters.get(entry["row"], ""), *_line(entry)] for entry in plan["rows"]]
    hours = total["gpu_hours"]
    lines.append(
        [
            "",
            "all",
            f"{total['seeds_left']}",
            f"{total['steps']:,}",
            "",
            "",
            *_hours(hours),
            _money(total["money"]),
            _duration(total["ends_h"][1]),
            f"{sum(entry['gib'] for entry in plan['rows']):,.1f}",
            "",
        ]
    )
    if total["money"] is None:
        head, lines = _without(head, lines, "cost")
    parts = [_aligned(head, lines)]
    pools = f"{settings['pools']} pool{'s' * (settings['pools'] > 1)} of {settings['pool_gpus']} GPUs"
    least, _, greatest = total["ends_h"]
    if greatest:
        share = ", ".join(f"{each:.0%}" for each in total["utilisation"])
        ends = f"On {pools}: {_duration(total['ends_h'][1])} ({_duration(least)} to {_duration(greatest)})"
        preempted = f", {total['preempted']} preemptions" if settings["preemption_hours"] else ""
        parts.append(f"{ends}; pools occupied {share} of the time{preempted}.\n\n{_chart(plan, letters)}")
    parts.append(_storage(plan))
    unknown = [entry["row"] for entry in plan["rows"] if entry["source"] is None]
    if unknown:
        parts.append(
            f"Not counted, for their speed is not known: {', '.join(unknown)}. "
            f"python -m stages.benchmark {unknown[0]} measures it."
        )
    parts.append(_assumptions(plan))
    return "\n\n".join(parts)


def _line(entry: Mapping[str, Any]) -> list[str]:
    known = entry["source"] is not None
    return [
        entry["row"],
        f"{entry['seeds_left']} of {entry['seeds']}",
        f"{entry['steps']:,}",
        f"{entry['step_s']:.3g}" if known else "-",
        _duration(entry["seed_h"][1]) if known else "-",
        *(_hours(entry["gpu_hours"]) if entry["gpu_hours"] else ("-", "")),
        _money(entry["money"]),
        _duration(entry["ends_h"][1]) if entry["ends_h"][1] else "-",
        f"{entry['gib']:,.1f}",
        f"{entry['evidence']}, {entry['device']}" if known else "not known",
    ]


def _hours(spread: Sequence[float]) -> tuple[str, str]:
    least, hours, greatest = (f"{each:,.0f}" if each >= 10 else f"{each:.2g}" for each in spread)
    return hours, f"{least} to {greatest}" if least != greatest else ""


def _money(spread: Sequence[float] | None) -> str:
    return "-" if spread is None else f"{spread[1]:,.0f} ({spread[0]:,.0f} to {spread[2]:,.0f})"


def _duration(hours: float) -> str:
    """12 min, 5.3 h, 3.1 days."""
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def _without(head: list[str], lines: list[list[str]], column: str) -> tuple[list[str], list[list[str]]]:
    place = head.index(column)
    return [*head[:place], *head[place + 1 :]], [[*line[:place], *line[place + 1 :]] for line in lines]


def _aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of text: names to the left, figures to the right."""
    table = [head, *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    left = {"", "row", "from", "range"}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in table
    )


def _letters(plan: Mapping[str, Any]) -> dict[str, str]:
    """What stands for each scheduled row in the chart."""
    scheduled = {job["row"] for job in plan["schedule"]}
    names = [entry["row"] for entry in plan["rows"] if entry["row"] in scheduled]
    return dict(zip(names, itertools.cycle(string.ascii_letters + string.digits), strict=False))


def _chart(plan: Mapping[str, Any], letters: Mapping[str, str]) -> str:
    """A line for every pool: which row has it when."""
    end_h = plan["total"]["ends_h"][1]
    grid = [["."] * CHART for _ in range(plan["settings"]["pools"])]
    for job in plan["schedule"]:
        first, last = (int(job[side] / end_h * CHART) for side in ("start_h", "end_h"))
        for pool in job["pools"]:
            grid[pool][first:last] = letters[job["row"]] * (last - first)
    rows = [f"pool {pool + 1:<3} {''.join(line)}" for pool, line in enumerate(grid)]
    return "\n".join([*rows, f"{'':8} 0{_duration(end_h).rjust(CHART - 1)}"])


def _storage(plan: Mapping[str, Any]) -> str:
    lines = [f"Storage: {plan['total']['gib']:,.1f} GiB in all, with checkpoints and overlays of every seed, and"]
    width = max(len(name) for name in plan["datasets"])
    for name, facts in plan["datasets"].items():
        shards = f"{facts['shards_gib']:,.1f} of shards ({facts['pixels']}{'' if facts['made'] else ', to be made'})"
        lines.append(f"  {name.ljust(width)}  {facts['archives_gib']:,.1f} of archives, {shards}")
    return "\n".join(lines)


def _assumptions(plan: Mapping[str, Any]) -> str:
    settings = plan["settings"]
    kinds = {entry["evidence"]: None for entry in plan["rows"] if entry["evidence"]}
    sentences = {
        "published": "published: from the published inference speed on an A100 (docs/costs.md), 0.5 to 2.2 times that",
        "benchmark": f"benchmark: a measured step, {settings['efficiency']:.0%} of perfect scaling, 0.9 to 1.15 times",
        "log": "log: of the published training, 0.7 to 1.4 times that",
        "trained": "trained: the median of finished seeds",
    }
    notes = [sentences[kind] for kind in kinds]
    if any(entry["device_kind"] == "cpu" for entry in plan["rows"]):
        notes.append("a row measured on a CPU takes a pool to be one such machine, and no GPU-hours")
    return f"Expected, and least to greatest. {'; '.join(notes)}." if notes else ""
