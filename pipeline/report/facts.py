"""What results/ says about a row of params.yaml, beside its published figures: the rows of results.json.

Nothing is computed here but medians, ranges, differences and the verdict (pipeline.verdict). Figures are fractions in
results/ and percent here, with two decimals; speeds, times and memory are as they were measured.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.files import read_json
from pipeline.params import Row, VerdictConfig
from pipeline.tasks import FIGURES, MS_FLIP, primary
from pipeline.verdict import median_interval, row_verdict

CHECKPOINTS: Mapping[str, str] = {"last": "last", "best": "best on validation"}
"""The two checkpoints of a seed, and their names in headings."""

ENDED_BADLY = ("failed", "diverged", "stopped")
"""How a seed ends that has no figures: it is shown in every table, with its reason."""

VERDICTS = ("reproduced", "above", "below", "undecided", "no verdict", "not run")
"""In the order in which they are counted."""


def row_facts(row: Row, results: Path, settings: VerdictConfig) -> dict[str, Any]:
    """One row of results.json.

    `status`: "not run"; "trained" (not evaluated yet); "out of date" (the figures belong to an earlier training);
    "incomplete" (a seed failed, diverged, was stopped or has no result); "finished". A figure that is None in any
    evaluated seed has no median and no range. ValueError when a result file is torn, of another version's layout, or
    of another task than the row.
    """
    evaluated = read(results, "evaluate", row.name, row.task)
    trained = read(results, "train", row.name, row.task)
    benchmark = read(results, "benchmark", row.name, row.task)
    checked = read(results, "published", row.name, row.task)
    first = primary(row.task)
    decides = evaluated["decides"] if evaluated else "best" if row.checkpoint_rule == "best" else "last"
    seeds = _seeds(evaluated, trained, row.task, decides)
    done = [seed for seed in seeds if "step" in seed]
    figures = {
        name: None if any(seed.get(name) is None for seed in done) else [float(seed[name]) for seed in done]
        for name in _names(row.task)
        if any(name in seed for seed in done)
    }
    median = {name: None if values is None else statistics.median(values) for name, values in figures.items()}
    values = figures.get(first) or []
    status = _status(row, seeds, evaluated, trained)
    failed = sum(seed["status"] in ENDED_BADLY for seed in seeds)
    verdict = row_verdict(row, [seed.get(first) for seed in done], failed, settings)
    interval = median_interval(values, settings.coverage) if values else None
    facts = {
        "dataset": row.dataset,
        "task": row.task,
        "primary": first,
        "checkpoint_rule": evaluated["checkpoint_rule"] if evaluated else row.checkpoint_rule,
        "decides": decides,
        "status": status,
        "planned_seeds": len({seed["seed"] for seed in seeds} | set(row.seeds)),
        "verdict": asdict(verdict if status != "not run" else replace(verdict, kind="not run"))
        | {"margin": settings.margin_points},
        "median": median,
        "range": {name: None if values is None else [min(values), max(values)] for name, values in figures.items()},
        "median_interval": {"low": interval[0], "high": interval[1], "coverage": 100 * interval[2]}
        if interval
        else None,
        "median_seed": min(done, key=lambda seed: abs(seed[first] - median[first]))["seed"] if values else None,
        "published": dict(row.published),
        "published_authors": dict(row.published_authors),
        "difference": {
            name: value - row.published[name]
            for name, value in median.items()
            if value is not None and name in row.published
        },
        "baseline": None,
        "published_checkpoint": None,
        "seeds": seeds,
    }
    if evaluated and evaluated["baseline"]:
        baseline = evaluated["baseline"]
        facts["baseline"] = {"class": baseline["class"]} | _percent(baseline, row.task)
    if checked:  # the published weights through our evaluation: should repeat the published figures
        other = checked["other_padding"]
        facts["published_checkpoint"] = _padded(checked, row.task) | {
            "other_padding": _padded(other, row.task) if other else None,
            "agrees": checked["agrees"],
            "per_class": _per_class(checked["figures"].get("per_class") or {}),
        }
    rounded: dict[str, Any] = _rounded(facts)
    rounded["cost"] = _cost(seeds)
    rounded["memory"] = _memory(row, seeds, benchmark)
    rounded["speed"] = _speed(row, benchmark)
    rounded["benchmark"] = benchmark
    rounded["registered"] = read(results, "register", row.name, row.task)
    return rounded


def counts(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many of the rows that others have published figures of have each verdict, in the order of VERDICTS."""
    kinds = [facts["verdict"]["kind"] for facts in published_rows(rows).values()]
    return {kind: kinds.count(kind) for kind in VERDICTS}


def published_rows(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The rows of published tables; the others are a user's own."""
    return {name: facts for name, facts in rows.items() if facts["published"] or facts["published_authors"]}


def short_device(device: str, *, gpu: bool = True) -> str:
    """A device as tables name it: "NVIDIA A100-SXM4-80GB" -> "A100"; any processor -> "CPU"."""
    if not gpu:
        return "CPU"
    model = re.sub(r"^(NVIDIA |Tesla |GeForce |AMD |Instinct )+", "", device)
    part = re.search(r" MIG \S+", model)  # a part of a GPU is another device
    return re.split(r"-| \d+GB| PCIe| MIG", model)[0] + (part[0] if part else "")


def read(results: Path, stage: str, name: str, task: str = "") -> Any:
    """results/<stage>/<name>.json, or None where the stage has not run.

    ValueError with the command that makes it again when it is torn, of another layout or not of `task`.
    """
    path = results / stage / f"{name}.json"
    if not path.exists():
        return None
    made_by = f"dvc repro -f {stage}@{name}"
    content = read_json(path, made_by=made_by)
    for part, keys in _parts(stage, content, task):
        for key in keys:
            if not isinstance(part, Mapping) or key not in part:
                raise ValueError(
                    f"{path} has no {key!r}: another version of the stage wrote it; make it again with: {made_by}"
                )
        if part is content and task and part.get("task", task) != task:
            raise ValueError(
                f"{path} is of the task {part['task']}, but row {name} is {task} now; make it again with: {made_by}"
            )
    return content


def _parts(stage: str, content: Any, task: str) -> Iterator[tuple[Any, Iterable[str]]]:
    """The parts of a stage's result that the report reads, with the keys each must have; later parts lie in earlier."""
    if stage == "evaluate":
        yield content, ("task", "checkpoint_rule", "decides", "seeds", "baseline", "overlays")
        for seed in content["seeds"]:
            yield seed, ("seed", "run_key", "status", *(["checkpoints"] if seed.get("status") == "finished" else []))
            for kind in CHECKPOINTS if seed["status"] == "finished" else ():
                yield seed["checkpoints"], [kind]
                yield seed["checkpoints"][kind], ("step", "per_class", *FIGURES[task])
    elif stage == "train":
        yield content, ["seeds"]
        for seed in content["seeds"]:
            yield seed, ("seed", "run_key", "status")
    elif stage == "published":
        yield content, ("task", "figures", "difference", "pad_multiple", "other_padding", "agrees")
        yield content["figures"], FIGURES[task]
        if content["other_padding"]:
            yield content["other_padding"], ("pad_multiple", "figures", "difference")
            yield content["other_padding"]["figures"], [primary(task)]
    elif stage == "benchmark":
        yield content, ("device", "device_kind", "parameters", "flops", "inference", "training")
        yield content["flops"], ("picture", "forward", "counted")
        yield content["inference"], ("fps", "pictures", "protocol")
        if "skipped" not in content["training"]:
            yield content["training"], ("step_s", "pictures", "memory_mib")
    elif stage == "register":
        yield content, ("model", "aliases")
        for alias in content["aliases"].values():
            yield alias, ("version", "seed", "value")


def _names(task: str) -> tuple[str, ...]:
    """Figures a checkpoint may have."""
    return (*FIGURES[task], MS_FLIP)


def _percent(figures: Mapping[str, Any], task: str) -> dict[str, float | None]:
    return {name: None if figures[name] is None else 100 * figures[name] for name in _names(task) if name in figures}


def _per_class(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    return {
        metric: {name: None if value is None else 100 * value for name, value in values.items()}
        for metric, values in metrics.items()
    }


def _padded(checked: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A published checkpoint's figures under one padding."""
    return _percent(checked["figures"], task) | {key: checked[key] for key in ("difference", "pad_multiple")}


def _seeds(
    evaluated: Mapping[str, Any] | None, trained: Mapping[str, Any] | None, task: str, decides: str
) -> list[dict[str, Any]]:
    """Every seed's figures in percent, from its evaluation, and the cost of its training.

    An evaluated seed has `step`, the figures and `per_class` of the checkpoint that decides, and both checkpoints'
    under `last` and `best`. `behind`: where its curve was clearly below the one it was compared with.
    """
    trainings = {entry["run_key"]: entry for entry in trained["seeds"]} if trained else {}
    entries = (evaluated["seeds"] if evaluated else []) or (trained["seeds"] if trained else [])
    seeds = []
    for entry in entries:
        seed = {key: entry.get(key) for key in ("seed", "run_key", "status", "reason", "mlflow_run_id")}
        if evaluated and evaluated["seeds"] and entry["status"] == "finished":
            for kind in CHECKPOINTS:
                checkpoint = entry["checkpoints"][kind]
                seed[kind] = {"step": checkpoint["step"], **_percent(checkpoint, task)}
            seed |= seed[decides]
            seed["per_class"] = _per_class(entry["checkpoints"][decides]["per_class"])
        training = trainings.get(entry["run_key"], {})
        environment = training.get("environment") or {}
        timed = ("train_s", "worker_s", "workers", "images_per_s", "peak_memory_mib")
        seed |= {key: training.get(key) for key in timed}
        seed["accepted"] = training.get("accepted")
        seed["device"] = environment.get("device")
        seed["gpu"] = bool(environment.get("cuda"))
        known = seed["gpu"] and seed["worker_s"] is not None
        seed["gpu_hours"] = seed["worker_s"] / 3600 if known else None
        seed["behind"] = [
            {**point, "value": 100 * point["value"], "expected": 100 * point["expected"]}
            for point in training.get("behind") or ()
        ]
        seeds.append(seed)
    return seeds


def _status(
    row: Row, seeds: Sequence[Mapping[str, Any]], evaluated: Mapping[str, Any] | None, trained: Mapping[str, Any] | None
) -> str:
    if not evaluated:
        return "trained" if trained else "not run"
    if trained and [s["run_key"] for s in trained["seeds"]] != [s["run_key"] for s in seeds]:
        return "out of date"
    if any("step" not in seed for seed in seeds) or {seed["seed"] for seed in seeds} != set(row.seeds):
        return "incomplete"
    return "finished"


def _cost(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the seeds' trainings took: medians of a seed, and all of them together. GPU-hours only where all were on
    GPUs."""
    timed = [seed for seed in seeds if seed["train_s"] is not None]
    if not timed:
        return None
    hours = [seed["gpu_hours"] for seed in timed if seed["gpu_hours"] is not None]
    on_gpus = len(hours) == len(timed)
    return {
        "seconds": statistics.median(seed["train_s"] for seed in timed),
        "gpu_hours": statistics.median(hours) if on_gpus else None,
        "gpu_hours_all": sum(hours) if on_gpus else None,
        "device": ", ".join(dict.fromkeys(short_device(seed["device"] or "?", gpu=seed["gpu"]) for seed in timed)),
    }


def _memory(row: Row, seeds: Sequence[Mapping[str, Any]], benchmark: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A GPU's memory in training, GiB: of benchmark@row, or else the most that a training took.

    Published figures are of one group of pictures a GPU: with another number they say nothing (`comparable`).
    """
    training = benchmark["training"] if benchmark else {}
    if benchmark and training.get("memory_mib") is not None:
        mib, pictures, device, source = training["memory_mib"], training["pictures"], benchmark["device"], "benchmark"
    else:
        known = [seed for seed in seeds if seed["peak_memory_mib"] is not None]
        if not known:
            return None
        most = max(known, key=lambda seed: seed["peak_memory_mib"])
        mib, device, source = most["peak_memory_mib"], most["device"] or "?", "trainings"
        pictures = row.train.global_batch / (most["workers"] or 1)
    return {
        "gib": mib / 1024,
        "pictures": pictures,
        "device": short_device(device),
        "from": source,
        "comparable": pictures == row.train.group_size,
    }


def _speed(row: Row, benchmark: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Inference on the benchmark's device; `comparable`: whether that is the published device."""
    if not benchmark:
        return None
    device = short_device(benchmark["device"], gpu=benchmark["device_kind"] == "cuda")
    return {
        "fps": benchmark["inference"]["fps"],
        "device": device,
        "comparable": device == row.published.get("device"),
    }


def _rounded(value: Any) -> Any:
    """Every float with the tables' two decimals."""
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return round(value, 2) + 0.0 if isinstance(value, float) else value  # -0.0 + 0.0 is 0.0
