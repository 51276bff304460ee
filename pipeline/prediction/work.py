"""The work itself: pictures through the network, several at a time where their sizes allow it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from m2f.inference.recorded import RecordedNetwork
from pipeline.data.images.resize import network_image
from pipeline.data.images.sizes import input_size
from pipeline.evaluation.predict import (
    PredictConfig,
    Predictions,
    WindowedPredictions,
    predict,
    predict_batch,
    predict_windows,
)
from pipeline.params.sentences import how_many
from pipeline.prediction.annotations import annotated
from pipeline.prediction.contact_sheet import write_contact_sheet
from pipeline.prediction.folder import Folder, open_folder
from pipeline.prediction.images import Found, Picture, read_images
from pipeline.prediction.summary import write_summary, write_videos
from pipeline.prediction.video import frame_count
from pipeline.storage.progress import Progress

if TYPE_CHECKING:
    from pipeline.prediction.network import TrainedNetwork

WAITING = 4
"""Batches' worth of pictures of other sizes that wait until there are enough of one size."""


RETRIES = 3
"""How often the part of a lost worker is begun again; what is finished of it stays."""

PROGRESS_EVERY_S = 2.0


def predict_all(
    network: TrainedNetwork,
    found: Sequence[Found],
    out: Path,
    *,
    source: str,
    batch: int,
    palette: bool,
    device: torch.device | None = None,
    workers: int = 0,
) -> dict[str, str]:
    """Predict pictures and write all that belongs to them into `out`; why, by file, some could not be predicted.

    device: None: a CPU. workers: Ray tasks that share the pictures; 0: this process does it. source: what `found` was
    found in. batch: most pictures of one forward pass; only those that are of one size when they are padded go
    together, as padding is not nothing to the network. What `out` holds already is not made again. ValueError where
    `out` cannot be used, or no picture could be predicted.
    """
    if batch < 1:
        raise ValueError(f"--batch is {batch}; give 1 or more")
    if workers < 0:
        raise ValueError(f"--workers is {workers}; give 0, for none, or more")
    facts = {**network.facts(), "images": source}
    folder = open_folder(
        out.absolute(), facts, class_names=tuple(network.class_names), task=network.task, palette=palette
    )
    device = device or torch.device("cpu")
    total = sum(frame_count(each.path) if each.is_video else 1 for each in found)
    progress = Progress(f"predicting with {network.description}", total, unit="images")
    try:
        if workers:
            names, failures = _predict_with_ray(network, found, folder, batch, device, workers, progress)
        else:
            names, failures = _predict(network, found, folder, batch, device, progress)
        if not names:
            raise ValueError(f"no image of {source} could be predicted: {next(iter(failures.values()))}")
    except ValueError:
        folder.discard()
        raise
    progress.done()
    folder.forget_others(names)
    write_summary(folder, network, names, failures, facts)
    entries = list(folder.entries(names))
    videos = write_videos(folder, found, entries)
    write_contact_sheet(folder, network, entries, source=source, failures=failures, videos=videos)
    return failures


def _predict(
    network: TrainedNetwork,
    found: Sequence[Found],
    folder: Folder,
    batch: int,
    device: torch.device,
    progress: Progress,
) -> tuple[list[str], dict[str, str]]:
    """The names of the pictures, in their order, and why some failed, by file."""
    names, failures = list[str](), dict[str, str]()
    network.put_on(device)
    network = replace(network, network=RecordedNetwork(network.network).eval())

    def unfinished() -> Iterator[Picture]:
        for picture in read_images(found, network.reading, is_done=folder.is_done):
            if picture.error:
                failures[picture.file] = picture.error
                progress.say(f"left out: {picture.error}")
                continue
            names.append(picture.name)
            if picture.pixels is not None:
                yield picture
            else:
                progress.restart(progress.count + 1, max(progress.total, progress.count + 1))

    for pictures in _batches(unfinished(), network, batch):
        for picture, predictions in zip(pictures, _predictions(pictures, network), strict=True):
            if isinstance(predictions, ValueError):
                failures[picture.file] = f"{picture.file}: {predictions}"
                names.remove(picture.name)
                progress.say(f"left out: {failures[picture.file]}")
            else:
                folder.add(picture, annotated(predictions, network))
            progress.add()
    return names, failures


def _predict_with_ray(
    network: TrainedNetwork,
    found: Sequence[Found],
    folder: Folder,
    batch: int,
    device: torch.device,
    workers: int,
    progress: Progress,
) -> tuple[list[str], dict[str, str]]:
    """`_predict` in as many Ray tasks, each with every n-th picture. A worker that is lost is replaced.

    ValueError where the cluster has no room for so many.
    """
    import ray

    from pipeline.compute.ray_session import tasks_said

    progress.say("starting Ray and the workers")
    progress.restart(folder.finished(), progress.total)
    task = _ray_task(device, workers)
    sent = ray.put(network)
    silent = Progress("", 0, unit="", interval_s=float("inf"))
    device = torch.device(device.type)  # a worker has one GPU
    started = [task.remote(sent, found[worker::workers], folder, batch, device, silent) for worker in range(workers)]
    running = started
    try:
        with tasks_said(f"predicting with {network.description}"):
            while running:
                ended, running = ray.wait(running, num_returns=len(running), timeout=PROGRESS_EVERY_S)
                ray.get(ended)
                progress.add(folder.finished() - progress.count)
    finally:
        for each in running:  # after an error or an interruption: what the others have finished stays
            ray.cancel(each, force=True)
    failures = {file: why for _, of_worker in ray.get(started) for file, why in of_worker.items()}
    for why in failures.values():
        progress.say(f"left out: {why}")
    place = {each.name: number for number, each in enumerate(found)}
    names = [name for of_worker, _ in ray.get(started) for name in of_worker]
    return sorted(names, key=lambda name: place.get(name, place.get(name.rpartition("/")[0], 0))), failures


def _ray_task(device: torch.device, workers: int) -> Any:
    """`_predict` as a Ray task that takes its share of the CPUs, or a GPU."""
    import ray

    from pipeline.compute.ray_session import connect

    connect()
    what = "GPU" if device.type == "cuda" else "CPU"
    places = int(ray.cluster_resources().get(what, 0))
    if workers > places:
        raise ValueError(f"--workers is {workers}, but Ray has {places} {what}s here; give {places} or less")
    cpus = max(1, int(ray.cluster_resources()["CPU"]) // workers) if what == "CPU" else 1
    return ray.remote(_predict).options(num_cpus=cpus, num_gpus=int(what == "GPU"), max_retries=RETRIES)


def _batches(pictures: Iterable[Picture], network: TrainedNetwork, batch: int) -> Iterator[list[Picture]]:
    """Up to `batch` pictures whose sizes are equal when they are padded, in the order in which a batch is full; of
    those that wait, the one that has waited longest goes first."""
    waiting: dict[tuple[int, int], list[Picture]] = {}
    for picture in pictures:
        assert picture.pixels is not None
        if _needs_windows(picture, network):
            yield [picture]
            continue
        size = input_size((picture.pixels.shape[0], picture.pixels.shape[1]), network.test)
        waiting.setdefault(size, []).append(picture)
        if len(waiting[size]) == batch:
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) >= WAITING * batch:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def _needs_windows(picture: Picture, network: TrainedNetwork) -> bool:
    """Whether a picture does not fit into one window."""
    assert picture.pixels is not None
    window = network.test.window
    return window is not None and max(picture.pixels.shape[:2]) > window["size"]


def _in_windows(picture: Picture, network: TrainedNetwork, config: PredictConfig) -> WindowedPredictions:
    """The predictions for one picture in windows, which are counted on stderr."""
    assert picture.pixels is not None
    progress = Progress(f"{picture.file} in windows", 0, unit="windows")

    def on_window(windows: int) -> None:
        progress.total = windows
        progress.add()

    found = predict_windows(network.network, picture.pixels, config, on_window=on_window)
    progress.done(brief=True)
    return found


def _predictions(
    pictures: Sequence[Picture], network: TrainedNetwork
) -> list[Predictions | WindowedPredictions | ValueError]:
    """What the network makes of pictures of one padded size, or why it takes none of that size."""
    config = PredictConfig(test=network.test, task=network.task, thing_ids=network.thing_ids, panoptic="maps")
    try:
        if _needs_windows(pictures[0], network):
            return [_in_windows(pictures[0], network, config)]
        return [*_whole(pictures, network, config)]
    except ValueError as error:
        return [error] * len(pictures)
    except torch.OutOfMemoryError:
        assert pictures[0].pixels is not None
        height, width = pictures[0].pixels.shape[:2]
        raise ValueError(
            f"the GPU has no memory for {how_many(len(pictures), 'image')} of {width} x {height} pixels at once; give "
            "a smaller --batch, --window with smaller windows for large images, or --device cpu"
        ) from None


def _whole(pictures: Sequence[Picture], network: TrainedNetwork, config: PredictConfig) -> list[Predictions]:
    """The predictions for pictures of one padded size in one forward pass."""
    images, sizes = [], []
    for picture in pictures:
        assert picture.pixels is not None
        images.append(network_image(picture.pixels, network.test))
        sizes.append((picture.pixels.shape[0], picture.pixels.shape[1]))
    if len(pictures) == 1:
        return [predict(network.network, images[0], sizes[0], config)]
    return predict_batch(network.network, images, sizes, config)
