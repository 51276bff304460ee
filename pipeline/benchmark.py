"""What a row costs on this machine: parameters, operations, memory, time of a training step, pictures per second.

Needs torch alone where the dataset has no shards; with shards, what reads them.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from m2f import build_model
from m2f.model import normalise, pad
from m2f.optim import build_optimizer
from pipeline.answers import single_scale
from pipeline.params import DatasetConfig, Row
from pipeline.picture_sizes import Size, counted, input_size, shown_size
from pipeline.precision import allow_tf32
from pipeline.progress import Progress
from pipeline.provenance import environment
from pipeline.results import Benchmark, InferenceCost, Operations, Spread, TrainingCost
from pipeline.train_loop import Run, Worker, backward, build

if TYPE_CHECKING:
    from pipeline.loader import Batch

WARM_UP, PICTURES = 5, 195
"""Pictures that do not count, and that do, as in the tables (mmsegmentation, tools/analysis_tools/benchmark.py)."""

STEPS = 20
"""Training steps that count, after as many as WARM_UP that do not."""

LEAST = 3
"""Pictures and steps that count, however long they take."""

MASKS = 10
"""True masks of a generated training picture. ADE20K's pictures hold 10.5 classes on average, COCO's 7.3 objects."""

_COUNTED = (
    "one forward pass of the network for one picture; products of convolutions, linear layers and attention, a "
    "multiplication and an addition as 2; not norms, activations, resizing and the sampling of deformable attention"
)

_ANSWERS: Mapping[str, str] = {
    "semantic": "the label map (class scores, resized to the picture's own size, and their argmax)",
    "panoptic": "the panoptic segments at the picture's own size (fresh weights leave fewer than trained ones)",
    "instance": "the instances at the picture's own size",
}


class Machine(NamedTuple):
    """Where the benchmark runs."""

    device: torch.device

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU, whose work has to be waited for."""
        return self.device.type == "cuda"

    def seconds(self, work: Callable[[], object]) -> float:
        """How long `work` takes, with nothing else under way."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        begun_s = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begun_s

    def forget_peak(self) -> None:
        """Begin to watch the memory anew."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_mib(self) -> tuple[float | None, float | None]:
        """Most memory that tensors took, and that was reserved for them, since `forget_peak`; None on a CPU."""
        if not self.cuda:
            return None, None
        reserved = torch.cuda.max_memory_reserved(self.device)
        return torch.cuda.max_memory_allocated(self.device) / 2**20, reserved / 2**20


def benchmark(
    row: Row, dataset: DatasetConfig, *, manifest: Mapping[str, Any] | None, seconds: float = 60.0, groups: int = 1
) -> Benchmark:
    """Measure a row on this machine's GPU, or its CPU.

    `manifest`: of the dataset's shards, whose pictures are then read; None: random pictures of the published sizes.
    `seconds`: for inference and for training each; fewer pictures and steps are measured where they take longer,
    but at least LEAST. `groups`: of pictures per training step on this device; the recipe's GPUs have one each.

    ValueError where there are neither shards nor published sizes, or groups are not 1 to those of the row.
    """
    pictures = counted(row.dataset, manifest)
    if pictures is None:
        raise ValueError(
            f"the picture sizes of dataset {row.dataset} are not known yet; run dvc repro shard@{row.dataset} first"
        )
    if not 1 <= groups <= row.train.groups:
        raise ValueError(f"row {row.name} has {row.train.groups} groups; measure 1 to {row.train.groups}, not {groups}")
    busy, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if busy > cores / 4:
        print(
            f"{row.name}: about {busy:.1f} other processes want this machine's {cores} cores; times will be too long",
            file=sys.stderr,
            flush=True,
        )
    allow_tf32(row.train.tf32)
    worker = Worker.here()
    machine = Machine(worker.device)
    run = Run(row=row, seed=0, run_key="benchmark", run_dir=Path("benchmark"), manifest=manifest or {})
    model, gradients = build(run, worker)
    parameters = [parameter.numel() for parameter in model.parameters()]
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    size = input_size(pictures.usual, row.test)
    inference = _inference(model, row, dataset, machine, manifest, pictures.usual, seconds)
    training = _training(model, gradients, run, worker, machine, seconds, groups)
    return Benchmark(
        row=row.name,
        dataset=row.dataset,
        task=row.task,
        device_kind="cuda" if machine.cuda else "cpu",
        threads=None if machine.cuda else torch.get_num_threads(),
        other_load=round(busy, 2),
        environment=environment(tf32=row.train.tf32),
        parameters=sum(parameters),
        parameters_trained=sum(trained),
        flops=Operations(picture=size, forward=forward_flops(row, size), counted=_COUNTED),
        inference=inference,
        training=training if isinstance(training, TrainingCost) else None,
        skipped=None if isinstance(training, TrainingCost) else training,
    )


def forward_flops(row: Row, size: Size) -> int:
    """Floating-point operations of one forward pass at `size`, a multiplication and an addition as 2.

    Counted on shapes alone: the same on every device, and nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build_model(row.model).eval().requires_grad_(False)
        images = torch.zeros(1, 3, *size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images, auxiliary=False)
    return int(counter.get_total_flops())


# Inference


@torch.inference_mode()
def _inference(
    model: nn.Module,
    row: Row,
    dataset: DatasetConfig,
    machine: Machine,
    manifest: Mapping[str, Any] | None,
    usual: Size,
    seconds: float,
) -> InferenceCost:
    model.eval()
    machine.forget_peak()
    shown = _validation(row, manifest, usual)
    things = [place for place, name in enumerate(dataset.class_names) if name in dataset.thing_classes]
    sizes: list[Size] = []

    def one() -> float:
        image_3HW, size = next(shown)
        sizes.append(size)
        images = pad(normalise(image_3HW[None].to(machine.device)), row.test.pad_multiple)
        valid = (image_3HW.shape[1], image_3HW.shape[2])
        return machine.seconds(
            lambda: single_scale(
                model, images, valid, size, row.test, task=row.task, thing_ids=things, segments_only=True
            )
        )

    taken_s = _repeated(f"{row.name}: inference", one, count=PICTURES, unit="pictures", seconds=seconds)
    counts = Counter(sizes[-len(taken_s) :])
    where = "real pictures of the validation split" if manifest is not None else "random pictures of the published size"
    memory_mib, reserved_mib = machine.peak_mib()
    return InferenceCost(
        fps=len(taken_s) / sum(taken_s),
        pictures=len(taken_s),
        sizes=tuple((height, width, count) for (height, width), count in counts.most_common()),
        memory_mib=memory_mib,
        reserved_mib=reserved_mib,
        seconds=_spread(taken_s),
        protocol=f"batch 1, {where} in order, the first {len(sizes) - len(taken_s)} dropped; forward pass and "
        f"{_ANSWERS[row.task]}; loading, resizing and normalising not counted",
    )


def _validation(row: Row, manifest: Mapping[str, Any] | None, usual: Size) -> Iterator[tuple[Tensor, Size]]:
    """Pictures as the network is shown them, (3, H, W) uint8 before padding, with their own sizes; endless."""
    if manifest is not None:
        from pipeline.loader import validation_pictures

        while True:
            for picture in validation_pictures(manifest, row.test, task=row.task):
                yield picture.image, picture.original_size
    size = shown_size(usual, short_side=row.test.short_side, long_side_max=row.test.long_side_max, pad_multiple=1)
    draws = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=draws), usual


# Training


def _training(
    model: nn.Module, gradients: Tensor, run: Run, worker: Worker, machine: Machine, seconds: float, groups: int
) -> TrainingCost | str:
    """The cost of a training step; text: why it could not be measured."""
    row, config = run.row, run.row.train
    model.train()
    machine.forget_peak()
    optimizer = build_optimizer(model, config.optimizer)
    batches = _batches(run, groups)

    def one() -> float:
        batch = next(batches)
        return machine.seconds(lambda: _step(model, gradients, optimizer, batch, run, worker))

    try:
        taken_s = _repeated(f"{row.name}: training", one, count=STEPS, unit="steps", seconds=seconds)
    except torch.OutOfMemoryError:
        room = torch.cuda.get_device_properties(machine.device).total_memory / 2**30
        return f"{groups * config.group_size} pictures do not fit into this GPU's {room:.0f} GiB"
    if run.manifest:
        source = "random crops of the training split"
    else:
        source = f"random pictures with {_masks(row)} masks each"
    spread, (memory_mib, reserved_mib) = _spread(taken_s), machine.peak_mib()
    return TrainingCost(
        step_s=spread.median,
        seconds=spread,
        steps=len(taken_s),
        workers=1,
        groups=groups,
        pictures=groups * config.group_size,
        crop=config.augmentation.crop,
        memory_mib=memory_mib,
        reserved_mib=reserved_mib,
        precision=config.precision,
        protocol=f"{source}; copying to the device, forward, matching, losses, backward, clipping and optimiser; "
        "loading not counted",
    )


def _step(
    model: nn.Module, gradients: Tensor, optimizer: torch.optim.Optimizer, batch: Batch, run: Run, worker: Worker
) -> None:
    """One step as pipeline.train_loop.train makes it, of one worker."""
    gradients.zero_()
    backward(model, batch, run, worker)
    norm = torch.linalg.vector_norm(gradients)
    gradients.mul_((run.row.train.optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0))
    optimizer.step()


def _batches(run: Run, groups: int) -> Iterator[Batch]:
    """Batches of this many groups."""
    config = run.row.train
    count = groups * config.group_size
    if not run.manifest:
        for step in itertools.count():
            yield cast("Batch", _Generated.of(run.row, count, step))
    from pipeline.loader import training_batches

    yield from training_batches(
        run.manifest,
        config.augmentation,
        task=run.row.task,
        pictures=config.pictures,
        seed=run.seed,
        first_step=0,
        steps=WARM_UP + STEPS,  # of a schedule that may be shorter
        global_batch=config.global_batch,
        picture_range=range(count),
    )


def _masks(row: Row) -> int:
    return min(MASKS, row.model.num_classes)


@dataclass(frozen=True)
class _Generated:
    """A batch of noise, with horizontal bands for masks; the fields of pipeline.loader.Batch that a step reads."""

    images: Tensor
    sizes: Tensor
    segments: Tensor | None
    masks: tuple[Tensor, ...] | None
    labels: tuple[Tensor, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, row: Row, count: int, step: int) -> _Generated:
        height, width = row.train.augmentation.crop
        draws = torch.Generator().manual_seed(step)
        masks = _masks(row)
        bands_HW = (torch.arange(height) * masks // height).to(torch.uint8)[:, None].expand(height, width).contiguous()
        labels = tuple(torch.randperm(row.model.num_classes, generator=draws)[:masks] for _ in range(count))
        apart_THW = bands_HW == torch.arange(masks)[:, None, None]
        return cls(
            images=torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=draws),
            sizes=torch.tensor([[height, width]] * count),
            segments=None if row.task == "instance" else bands_HW.repeat(count, 1, 1),
            masks=(apart_THW,) * count if row.task == "instance" else None,
            labels=labels,
            seeds=tuple(step * count + place for place in range(count)),
        )


# Time


def _repeated(what: str, one: Callable[[], float], *, count: int, unit: str, seconds: float) -> list[float]:
    """What `one` gives, `count` times or until the seconds are over, but at least LEAST times.

    WARM_UP earlier ones do not count; where even they would take a third of the time, a single one.
    """
    begun_s = time.monotonic()
    progress = Progress(what, 0, unit=unit)

    def passed_s() -> float:
        return time.monotonic() - begun_s

    for _ in range(WARM_UP):
        one()
        if passed_s() > seconds / 3:
            break
    taken_s: list[float] = []
    while len(taken_s) < LEAST or (len(taken_s) < count and passed_s() < seconds):
        taken_s.append(one())
        progress.add()
    print(f"{what}: {len(taken_s)} {unit} timed, median {_spread(taken_s).median:.3g} s", file=sys.stderr, flush=True)
    return taken_s


def _spread(values: Sequence[float]) -> Spread:
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64))
    median, p10, p90 = quantiles.tolist()
    return Spread(median=median, p10=p10, p90=p90)
