"""Evaluation: the recipe's test pictures through a network, shared over workers and merged exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from m2f.inference import semantic_labels
from m2f.metrics import SemanticMetric
from m2f.model import build_model, normalise, pad
from pipeline.loader import Picture, validation_pictures
from pipeline.params import Row

if TYPE_CHECKING:
    from pipeline.cluster import Resources

OVERLAYS = 8
"""Validation pictures shown with prediction and truth."""


@torch.inference_mode()
def predict_labels(model: nn.Module, picture: Picture, row: Row) -> np.ndarray:
    """Class ids of one picture at its original size, (h, w) uint8. The model is in evaluation mode."""
    device = next(model.parameters()).device
    images = pad(normalise(picture.image[None].to(device)), row.test.pad_multiple)
    prediction = model(images, auxiliary=False)
    valid_size = (picture.image.shape[1], picture.image.shape[2])
    return semantic_labels(prediction, picture.original_size, valid_size)[0].to(torch.uint8).cpu().numpy()


def semantic_metric(
    model: nn.Module,
    manifest: Mapping[str, Any],
    row: Row,
    *,
    worker: int = 0,
    workers: int = 1,
    processes: int = 0,
    on_picture: Callable[[Picture, np.ndarray], None] | None = None,
) -> SemanticMetric:
    """The metric over this worker's share of the validation pictures; puts the model in evaluation mode."""
    model.eval()
    metric = SemanticMetric(num_classes=row.model.num_classes)
    for picture in validation_pictures(manifest, row.test, worker=worker, workers=workers, processes=processes):
        labels = predict_labels(model, picture, row)
        metric.update(labels, picture.label_map)
        if on_picture is not None:
            on_picture(picture, labels)
    return metric


FIGURES = ("miou", "mean_accuracy", "pixel_accuracy")
"""What is reported of a semantic metric."""


def figures(metric: SemanticMetric) -> dict[str, float]:
    """FIGURES of a metric, as fractions; ValueError when it counted nothing."""
    result = metric.result()
    if result["miou"] is None:
        raise ValueError("no validation picture has a labelled pixel, so there is no mIoU; check the annotations")
    return {name: result[name] for name in FIGURES}  # type: ignore[literal-required]


def validate(
    model: nn.Module,
    manifest: Mapping[str, Any],
    row: Row,
    *,
    worker: int,
    workers: int,
    sum_over_workers: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """mIoU, mean accuracy and pixel accuracy over all validation pictures, the same on every worker."""
    metric = semantic_metric(model, manifest, row, worker=worker, workers=workers)
    device = next(model.parameters()).device
    total = sum_over_workers(metric.confusion.to(device)).cpu()
    return figures(SemanticMetric(num_classes=row.model.num_classes, confusion=total))


def evaluate_row(row: Row, *, manifest: Mapping[str, Any], train_result: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate the last and the best checkpoint of every finished seed; the content of results/evaluate/<row>.json.

    The last checkpoint decides the reported figure (the published rule is not stated). ValueError when a
    checkpoint is gone, altered or of another run.
    """
    from pipeline.cluster import cluster_resources
    from pipeline.files import sha256
    from pipeline.storage import storage_root, stored

    resources = cluster_resources(row, training=False)
    seeds: list[dict[str, Any]] = []
    overlays: list[str] = []
    for trained in train_result["seeds"]:
        entry = {key: trained[key] for key in ("seed", "run_key", "status", "reason", "mlflow_run_id")}
        seeds.append(entry)
        if trained["status"] != "finished":
            continue
        entry["checkpoints"] = {}
        by_step: dict[int, SemanticMetric] = {}
        for kind, checkpoint in trained["checkpoints"].items():
            path = stored(f"{trained['run_dir']}/{checkpoint['path']}", made_by=f"dvc repro -f train@{row.name}")
            if checkpoint["step"] not in by_step:
                if sha256(path) != checkpoint["sha256"]:
                    raise ValueError(
                        f"checkpoint {path} is not the one train@{row.name} wrote (its digest differs); "
                        f"delete its run folder and run dvc repro -f train@{row.name}"
                    )
                folder = storage_root() / trained["run_dir"] / "overlays" if kind == "last" else None
                by_step[checkpoint["step"]] = evaluate_checkpoint(
                    path, trained["run_key"], row, manifest, resources, folder
                )
                if folder is not None and not overlays:
                    overlays = [str(p.relative_to(storage_root())) for p in sorted(folder.glob("*.png"))]
            entry["checkpoints"][kind] = described(
                by_step[checkpoint["step"]], checkpoint["step"], manifest["class_names"]
            )
        _track(trained, entry["checkpoints"]["last"])

    finished = [entry["checkpoints"]["last"] for entry in seeds if entry["status"] == "finished"]
    return {
        "row": row.name,
        "dataset": row.dataset,
        "decides": "last",
        "seeds": seeds,
        "median": {name: float(np.median([figure[name] for figure in finished])) for name in FIGURES},
        "baseline": commonest_class(manifest),
        "overlays": overlays,
        "train": [
            {key: trained.get(key) for key in ("seed", "train_s", "workers", "images_per_s")}
            for trained in train_result["seeds"]
            if trained["status"] == "finished"
        ],
    }


def commonest_class(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What predicting the training pictures' commonest class everywhere scores on the validation pictures."""
    common = int(np.argmax(manifest["pixels"]["train"]))
    metric = SemanticMetric(num_classes=len(manifest["class_names"]))
    metric.confusion[:, common] = torch.tensor(manifest["pixels"]["val"])
    return {"class": manifest["class_names"][common], **figures(metric)}


def described(metric: SemanticMetric, step: int, class_names: Sequence[str]) -> dict[str, Any]:
    per_class = metric.result()["per_class"]["iou"]
    return {"step": step, **figures(metric), "per_class": dict(zip(class_names, per_class, strict=True))}


def _track(trained: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    """Figures, per-class IoU and overlays into the seed's MLflow run."""
    from pipeline import tracking
    from pipeline.storage import storage_root

    run_id = trained["mlflow_run_id"]
    summary = {f"test_{name}": described[name] for name in FIGURES}
    summary |= {f"iou/{name}": iou for name, iou in described["per_class"].items() if iou is not None}
    tracking.log_summary(run_id, summary)
    folder = storage_root() / trained["run_dir"] / "overlays"
    tracking.log_files(run_id, {f"overlays/{path.name}": path for path in sorted(folder.glob("*.png"))})


def evaluate_checkpoint(
    path: Path, run_key: str, row: Row, manifest: Mapping[str, Any], resources: Resources, overlays: Path | None
) -> SemanticMetric:
    """One checkpoint over all validation pictures: in this process, or as one Ray task per worker."""
    if resources.workers <= 1:
        confusions = [_evaluate_part(path, run_key, row, manifest, 0, 1, overlays, resources.loader_processes)]
    else:
        import ray

        from pipeline.cluster import connect

        connect()
        task = ray.remote(_evaluate_part).options(
            num_cpus=resources.cpus_per_worker, num_gpus=1 if resources.use_gpu else 0, max_retries=3
        )
        parts = [
            task.remote(path, run_key, row, manifest, worker, resources.workers, overlays, resources.loader_processes)
            for worker in range(resources.workers)
        ]
        try:
            confusions = ray.get(parts)
        except ray.exceptions.RayTaskError as error:  # its text is a traceback; the sentence is in its cause
            if isinstance(error.cause, (ValueError, OSError)):
                raise error.cause from None
            raise
    return SemanticMetric(num_classes=row.model.num_classes, confusion=torch.from_numpy(sum(confusions)))


def _evaluate_part(
    path: Path,
    run_key: str,
    row: Row,
    manifest: Mapping[str, Any],
    worker: int,
    workers: int,
    overlays: Path | None,
    processes: int,
) -> np.ndarray:
    """The confusion matrix of one worker's share, (C, C) int64; draws its share of the overlays."""
    from pipeline.checkpoints import load_checkpoint

    model = build_model(row.model)
    load_checkpoint(path, model=model, run_key=run_key)
    if torch.cuda.is_available():
        model.cuda()
    total = manifest["splits"]["val"]["records"]
    shown = set(np.linspace(0, total - 1, min(OVERLAYS, total)).round().astype(int).tolist())
    position = worker  # this worker sees every `workers`-th record

    def draw(picture: Picture, labels: np.ndarray) -> None:
        nonlocal position
        if position in shown and overlays is not None:
            write_overlay(overlays / f"{position:05d}.png", picture, labels, row.model.num_classes)
        position += workers

    metric = semantic_metric(model, manifest, row, worker=worker, workers=workers, processes=processes, on_picture=draw)
    return metric.confusion.numpy()


def class_colours(num_classes: int) -> np.ndarray:
    """One RGB colour per class, (num_classes, 3) uint8: hues a golden angle apart, in three lightnesses."""
    import colorsys

    colours = [colorsys.hls_to_rgb(i * 0.618034 % 1, (0.45, 0.6, 0.32)[i % 3], 0.75) for i in range(num_classes)]
    return (np.array(colours) * 255).astype(np.uint8)


def write_overlay(path: Path, picture: Picture, labels: np.ndarray, num_classes: int) -> None:
    """A PNG of three panels: the picture, the prediction over it, the truth over it (ignored pixels left grey)."""
    import cv2

    from pipeline.files import whole_file

    height, width = labels.shape
    image = picture.image.permute(1, 2, 0).numpy()
    image = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_AREA)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    colours = np.vstack([class_colours(num_classes), np.zeros((256 - num_classes, 3), np.uint8)])

    def blend(label_map: np.ndarray) -> np.ndarray:
        coloured = (0.35 * grey + 0.65 * colours[label_map]).astype(np.uint8)
        return np.where((label_map < num_classes)[..., None], coloured, grey)

    gap = np.full((height, 4, 3), 255, np.uint8)
    panels = np.hstack([image, gap, blend(labels), gap, blend(np.asarray(picture.label_map))])
    done, encoded = cv2.imencode(".png", panels[..., ::-1])
    if not done:
        raise OSError(f"could not encode the overlay {path}")
    with whole_file(path) as partial:
        partial.write_bytes(encoded.tobytes())
