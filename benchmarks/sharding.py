"""Images per second that are sharded, and the share of the cores' time that this uses.

Enlarges real images, from an archive in ADE20K's folder layout, to Cityscapes' 2048 x 1024 (PNG) and to a usual size
of ADE20K, 683 x 512 (JPEG), puts them into archives, and shards these with Ray, encoded and raw. The time is that of
the whole build: listing, reading, verifying, writing, digests and the sample sheet; Ray is running before. The last
column counts the workers that run or wait for nothing but a core: what the share would be were nothing else running.

python -m benchmarks.sharding --archive data/camvid.zip [--images 200] [--processes N]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import psutil

FORMATS = {"cityscapes-sized PNG": (1024, 2048, ".png", 1), "ade20k-sized JPEG": (512, 683, ".jpg", 5)}
"""Height, width, suffix, and how many times as many pictures as asked for, since they are smaller."""


def enlarged(source: Path, target: Path, count: int, height: int, width: int, suffix: str) -> None:
    """Write an archive of `count` pictures with labels, the source's first ones again and again, at another size."""
    import cv2
    import numpy as np

    from pipeline.data.archives import file_names, read_file

    names = [name for name in file_names(source) if "images/" in name]
    options = [cv2.IMWRITE_JPEG_QUALITY, 90] if suffix == ".jpg" else []
    with zipfile.ZipFile(target, "w") as archive:
        for index in range(count):
            name = names[index % len(names)]
            label = str(Path(name.replace("images/", "annotations/")).with_suffix(".png"))
            image = cv2.imdecode(np.frombuffer(read_file(source, name), np.uint8), cv2.IMREAD_COLOR)
            ids = cv2.imdecode(np.frombuffer(read_file(source, label), np.uint8), cv2.IMREAD_UNCHANGED)
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
            ids = cv2.resize(ids, (width, height), interpolation=cv2.INTER_NEAREST)
            archive.writestr(f"images/train/{index:06d}{suffix}", cv2.imencode(suffix, image, options)[1].tobytes())
            archive.writestr(f"annotations/train/{index:06d}.png", cv2.imencode(".png", ids)[1].tobytes())


def ours() -> list[psutil.Process]:
    """This process and Ray's workers below it."""
    import psutil

    found = [psutil.Process()]
    for process in found[0].children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            if process.cmdline()[0].startswith("ray::"):
                found.append(process)
    return found


def cpu_s() -> float:
    """CPU seconds of our processes so far."""
    return sum(sum(process.cpu_times()[:2]) for process in ours())


class Ready:
    """Samples, 20 times a second, how many of Ray's workers are running or would be if a core were free."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        import psutil

        workers, place = ours()[1:], 0
        while not self.over.wait(0.05):
            if place % 20 == 0:
                workers = ours()[1:]
            place += 1
            count = 0
            for process in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    count += process.status() == psutil.STATUS_RUNNING
            self.counts.append(count)

    def __enter__(self) -> Ready:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def measured(
    archive: Path, classes: int, ignore_label: int, pixels: Literal["encoded", "raw"], processes: int
) -> dict[str, Any]:
    """Shard an archive; pictures, seconds, CPU seconds and bytes written."""
    import numpy as np

    from pipeline.data.shards import build
    from pipeline.params.schema import DatasetConfig
    from pipeline.storage.files import sha256
    from pipeline.storage.results.data import FetchedSource

    config = DatasetConfig(
        layout="folder",
        splits={"train": "train"},
        class_names=tuple(f"class {index}" for index in range(classes)),
        ignore_label=ignore_label,
        pixels=pixels,
    )
    size, path = archive.stat().st_size, str(archive.absolute())
    facts = [FetchedSource(name=archive.name, bytes=size, sha256=sha256(archive), path=path)]
    before_s, begun_s = cpu_s(), time.monotonic()
    with Ready() as ready:
        manifest = build.build("benchmark", config, [archive], facts=facts, processes=processes)
    took_s = time.monotonic() - begun_s
    return {
        "images": manifest.splits["train"].records,
        "shards": len(manifest.splits["train"].shards),
        "bytes": manifest.bytes["train"],
        "took_s": took_s,
        "cpu_s": cpu_s() - before_s,
        "ready": np.minimum(ready.counts, processes).mean() / processes,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharding", description=__doc__)
    parser.add_argument("--archive", type=Path, required=True, help="a zip archive in ADE20K's folder layout")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--classes", type=int, default=11, help="default: CamVid's")
    parser.add_argument("--ignore-label", type=int, default=11, help="default: CamVid's")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where archives and shards are written for the time being")
    arguments = parser.parse_args()

    from pipeline.compute.ray_session import connect
    from pipeline.data.shards import build

    build.FEW_RECORDS = 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        os.environ["M2F_STORAGE"] = f"{folder}/storage"
        Path(folder, "storage").mkdir()
        connect()
        print("| images | shards | images/s | written, MiB/s | share of cores | ready |")
        print("|---|---|---|---|---|---|")
        for name, (height, width, suffix, times) in FORMATS.items():
            archive = Path(folder) / f"{name}.zip"
            enlarged(arguments.archive, archive, arguments.images * times, height, width, suffix)
            for pixels in ("encoded", "raw"):
                found = measured(archive, arguments.classes, arguments.ignore_label, pixels, arguments.processes)
                busy = found["cpu_s"] / (found["took_s"] * arguments.processes)
                print(
                    f"| {name}, {pixels} | {found['shards']} | {found['images'] / found['took_s']:.1f} "
                    f"| {found['bytes'] / 2**20 / found['took_s']:.0f} | {busy:.0%} "
                    f"| {found['ready']:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
