"""What a row costs on this machine: parameters, operations, memory, time of a training step, pictures per second.

Needs torch alone where the dataset has no shards; with shards, what reads them.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from m2f import build_model
from m2f.constants import to_device
from m2f.inference.recorded import RecordedNetwork
from m2f.kernels.build import use
from m2f.model import normalise, pad
from m2f.weights.start import freeze
from pipeline.compute.precision import allow_tf32, in_precision
from pipeline.compute.variables import CHECKPOINT_ACTIVATIONS, GROUPS_AT_ONCE, environment_int
from pipeline.cost.batches import batches_of, masks_of
from pipeline.cost.kept_queries import SEGMENTS, TypicalClasses
from pipeline.data.images.sizes import Size, counted, input_size, shown_size
from pipeline.evaluation.predict import PredictConfig, single_scale
from pipeline.params.schema import DatasetConfig, Row
from pipeline.provenance.code import Code, code_digest
from pipeline.provenance.environment import environment
from pipeline.provenance.run_key import COMPILES, KEEPS_BYTES, PROGRESS, READS_SHARDS, SETTINGS, key_of, settings_facts
from pipeline.storage.progress import Progress
from pipeline.storage.results.rows import Benchmark, InferenceCost, Operations, Spread, TrainingCost
from pipeline.training.step import build, training_step, use_kernels
from pipeline.training.worker import Worker

if TYPE_CHECKING:
    from pipeline.storage.results.data import Manifest

WARM_UP, IMAGES = 5, 195
"""Pictures that do not count, and that do, as for the published speeds (mmsegmentation 1.2.2,
tools/analysis_tools/benchmark.py)."""

STEPS = 20
"""Training steps that count, after as many as WARM_UP that do not."""

_ALONE = Worker(0, 1, torch.device("cpu"))

LEAST = 3
"""Pictures and steps that count, however long they take."""

CODE = Code(
    roots=("pipeline.cost.benchmark.benchmark",),
    left_out={
        **KEEPS_BYTES,
        **READS_SHARDS,
        **COMPILES,
        "m2f.weights.read_checkpoint": "reads tensors as they are",
        "pipeline.provenance": "says where a number came from",
        "pipeline.storage.results": "says what was measured",
    },
    sinks=PROGRESS,
    settings=SETTINGS,
)
"""The definitions that decide how long a row takes."""

_COUNTED = (
    "one forward pass of the network for one image; products of convolutions, linear layers and attention, a "
    "multiplication and an addition as 2; not norms, activations, resizing and the sampling of deformable attention"
)

_ANSWERS: Mapping[str, str] = {
    "semantic": "the label map (class scores, resized to the image's own size, and their argmax)",
    "panoptic": f"the panoptic segments at the image's own size, {SEGMENTS} queries competing",
    "instance": "the instances at the image's own size, each of a query of its own",
}


class Timer(NamedTuple):
    """How long work takes on a device, and how much of its memory."""

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


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is measured, on what and for how long."""

    row: Row
    dataset: DatasetConfig
    manifest: Manifest | None
    """Of the dataset's shards; None: pictures are random."""
    usual: Size
    """Of the dataset's pictures, for random ones."""
    timer: Timer
    worker: Worker
    seconds: float
    """For inference and for training each."""


def benchmark(
    row: Row, dataset: DatasetConfig, *, manifest: Manifest | None, seconds: float = 60.0, groups: int = 1
) -> Benchmark | None:
    """Measure a row on this machine's GPU, or its CPU.

    In several processes (pipeline.cost.torchrun) each is a worker of a training step, and one measures inference; that
    one, of rank 0, has the result, the others None.

    `manifest`: of the dataset's shards, whose pictures are then read; None: random pictures of the published sizes.
    `seconds`: for inference and for training each; fewer pictures and steps are measured where they take longer,
    but at least LEAST. `groups`: of pictures per training step on each device; the recipe's GPUs have one each.

    ValueError where there are neither shards nor published sizes, or all workers' groups are not 1 to those of the row.
    """
    images = counted(row.dataset, manifest)
    if images is None:
        raise ValueError(
            f"the image sizes of dataset {row.dataset} are not known yet; run dvc repro shard@{row.dataset} first"
        )
    worker = Worker.here()
    if worker.size > 1 and groups * worker.size > row.train.groups:
        raise ValueError(
            f"row {row.name} has {row.train.groups} groups; {worker.size} workers of {groups} each need "
            f"{groups * worker.size}; measure with fewer workers, or fewer groups"
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
    timer = Timer(worker.device)
    subject = _Subject(
        row=row,
        dataset=dataset,
        manifest=manifest,
        usual=images.usual,
        timer=timer,
        worker=worker,
        seconds=seconds,
    )
    cost, kernels = _training(subject, groups)
    if worker.rank != 0:
        return None
    # after the training, and on a network of its own: gradients and moments are no part of inference's memory
    model = build_model(row.model).to(worker.device)
    parameters = [parameter.numel() for parameter in model.parameters()]
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    size = input_size(images.usual, row.test)
    inference = _inference(model, subject)
    return Benchmark(
        key=benchmark_key(row, manifest=manifest, seconds=seconds, groups=groups, workers=worker.size),
        row=row.name,
        dataset=row.dataset,
        task=row.task,
        device_type="cuda" if timer.cuda else "cpu",
        threads=None if timer.cuda else torch.get_num_threads(),
        other_load=round(busy, 2),
        environment=environment(tf32=row.train.tf32, kernels=kernels),
        parameters=sum(parameters),
        parameters_trained=sum(trained),
        flops=Operations(image_size=size, forward=forward_flops(row, size), counted=_COUNTED),
        inference=inference,
        training=cost if isinstance(cost, TrainingCost) else None,
        skipped=None if isinstance(cost, TrainingCost) else cost,
    )


def benchmark_key(row: Row, *, manifest: Manifest | None, seconds: float, groups: int, workers: int = 1) -> str:
    """The name of a measurement, 16 hexadecimal digits: of the row's settings, the pictures, how it is measured, the
    definitions that decide how long it takes, this machine's device and the libraries that compute."""
    facts = environment(tf32=row.train.tf32)
    return key_of(
        task=row.task,
        model=settings_facts(row.model),
        train=settings_facts(row.train),
        test=settings_facts(row.test),
        data=manifest and manifest.digest,
        seconds=seconds,
        groups=groups,
        workers=workers,
        code=code_digest(CODE),
        device=facts.device,
        cuda=facts.cuda,
        tf32=facts.tf32,
        kernels=use(row.train.kernels, device="cuda" if facts.cuda else "cpu"),
        threads=None if facts.cuda else torch.get_num_threads(),
        saving=_saving(),
        libraries={name: facts.libraries[name] for name in ("torch", "torchvision", "numpy", "scipy")},
    )


def forward_flops(row: Row, size: Size) -> int:
    """Floating-point operations of one forward pass at `size`, a multiplication and an addition as 2.

    Counted on shapes alone: the same on every device, and nothing is computed.
    """
    import torchvision  # noqa: F401 (defines the operation of FaPN's alignment)
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build_model(row.model).eval().requires_grad_(False)
        images = torch.zeros(1, 3, *size)
    counted_besides = {torch.ops.torchvision.deform_conv2d: _deformable_convolution_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counted_besides) as counter:
        model(images, auxiliary=False)
    return int(counter.get_total_flops())


def _deformable_convolution_flops(
    _images: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    """As of a convolution: the samples that it multiplies are not counted, like those of deformable attention."""
    return 2 * math.prod(weight) * math.prod((out_shape[0], *out_shape[2:]))


# Inference


@torch.inference_mode()
def _inference(model: nn.Module, subject: _Subject) -> InferenceCost:
    row, dataset, timer = subject.row, subject.dataset, subject.timer
    network = RecordedNetwork(model)
    timed = network if row.task == "semantic" else TypicalClasses(network, row).to(timer.device)
    timed.eval()
    timer.forget_peak()
    shown = _validation(row, subject.manifest, subject.usual)
    things = [place for place, name in enumerate(dataset.class_names) if name in dataset.thing_classes]
    config = PredictConfig(test=row.test, task=row.task, thing_ids=things, panoptic="segments")
    sizes: list[Size] = []

    def one() -> float:
        image_3HW, size = next(shown)
        sizes.append(size)
        images = pad(normalise(to_device(image_3HW[None], timer.device)), row.test.pad_multiple)
        valid = (image_3HW.shape[1], image_3HW.shape[2])
        with in_precision(row.test.precision, timer.device):
            network.learn(images)
        return timer.seconds(lambda: single_scale(timed, images, valid, size, config))

    taken_s = _repeated(f"{row.name}: inference", one, count=IMAGES, unit="images", seconds=subject.seconds)
    counts = Counter(sizes[-len(taken_s) :])
    real = subject.manifest is not None
    where = "real images of the validation split" if real else "random images of the published size"
    memory_mib, reserved_mib = timer.peak_mib()
    return InferenceCost(
        fps=len(taken_s) / sum(taken_s),
        images=len(taken_s),
        sizes=tuple((height, width, count) for (height, width), count in counts.most_common()),
        memory_mib=memory_mib,
        reserved_mib=reserved_mib,
        seconds=_spread(taken_s),
        protocol=f"batch 1, {where} in order, the first {len(sizes) - len(taken_s)} dropped; forward pass and "
        f"{_ANSWERS[row.task]}; loading, resizing and normalising not counted, nor recording the work for "
        "sizes that come often",
        differs=_differences(row, real=real, images=len(taken_s)),
    )


def _differences(row: Row, *, real: bool, images: int) -> str:
    """How a measurement of inference differs from the published one."""
    found = ["fresh weights instead of trained ones"]
    if row.test.precision != "float32":
        found.append(f"the network computes in {row.test.precision}")
    if row.task != "semantic":
        found.append("no speed is published for this task; measured as for semantic segmentation")
    if not real:
        found.append("random images of one size instead of the validation split's")
    if images != IMAGES:
        found.append(f"{images} images timed instead of {IMAGES}")
    return "; ".join(found)


def _validation(row: Row, manifest: Manifest | None, usual: Size) -> Iterator[tuple[Tensor, Size]]:
    """Pictures as the network is shown them, (3, H, W) uint8 before padding, with their own sizes; endless."""
    if manifest is not None:
        from pipeline.data.loader.val_images import validation_images

        while True:
            for val_image in validation_images(manifest, row.test, task=row.task):
                yield val_image.image, val_image.original_size
    size = shown_size(usual, short_side=row.test.short_side, long_side_max=row.test.long_side_max, pad_multiple=1)
    draws = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=draws), usual


# Training


def _training(subject: _Subject, groups: int) -> tuple[TrainingCost | str, str]:
    """The cost of a training step, of the slowest worker, or why it could not be measured; and the kernels in use."""
    row, config, timer, worker = subject.row, subject.row.train, subject.timer, subject.worker
    kernels = use(config.kernels, device=worker.device.type)
    timer.forget_peak()
    try:
        training = build(
            row,
            worker,
            seed=0,
            groups_at_once=environment_int(GROUPS_AT_ONCE) or None,
            checkpoint_activations=bool(environment_int(CHECKPOINT_ACTIVATIONS)),
        )
        training.model.train()
        freeze(training.model, config.freeze)
        kernels = use_kernels(training, config.kernels, groups)
        batches = enumerate(batches_of(row, subject.manifest, groups, worker, steps=WARM_UP + STEPS))

        def one() -> float:
            count, batch = next(batches)
            step = min(count, config.steps - 1)  # the schedule may be shorter
            worker.largest(0.0)  # all begin when the last one has its batch
            return worker.largest(timer.seconds(lambda: training_step(training, batch, step=step)))

        taken_s = _repeated(
            f"{row.name}: training", one, count=STEPS, unit="steps", seconds=subject.seconds, worker=worker
        )
    except torch.OutOfMemoryError:
        room = torch.cuda.get_device_properties(timer.device).total_memory / 2**30
        why = f"{groups * config.group_size} images do not fit into this GPU's {room:.0f} GiB"
        if worker.size > 1:  # an error, with which torchrun ends the others: they wait for this one's sums
            raise ValueError(f"row {row.name}: {why}") from None
        return why, kernels
    if subject.manifest is not None:
        source = "random crops of the training split"
    else:
        source = f"random images with {masks_of(row)} masks each"
    spread = _spread(taken_s)
    memory_mib, reserved_mib = (None if mib is None else worker.largest(mib) for mib in timer.peak_mib())
    cost = TrainingCost(
        step_s=spread.median,
        seconds=spread,
        steps=len(taken_s),
        workers=worker.size,
        groups=groups,
        images=groups * config.group_size,
        crop=config.augmentation.crop,
        memory_mib=memory_mib,
        reserved_mib=reserved_mib,
        precision=config.precision,
        protocol=f"{source}; copying to the device, forward, matching, losses, backward, clipping and optimiser; "
        f"loading not counted{_saving()}{_together(worker)}",
    )
    return cost, kernels


def _saving() -> str:
    """How the environment asks for less memory, for the protocol."""
    at_once, again = environment_int(GROUPS_AT_ONCE), environment_int(CHECKPOINT_ACTIVATIONS)
    return (f"; {GROUPS_AT_ONCE}={at_once}" if at_once else "") + (f"; {CHECKPOINT_ACTIVATIONS}=1" if again else "")


def _together(worker: Worker) -> str:
    return f"; of the slowest of {worker.size} workers, sums over them included" if worker.size > 1 else ""


# Time


def _repeated(
    what: str, one: Callable[[], float], *, count: int, unit: str, seconds: float, worker: Worker = _ALONE
) -> list[float]:
    """What `one` gives, `count` times or until the seconds are over, but at least LEAST times.

    WARM_UP earlier ones do not count; where even they would take a third of the time, a single one. As often on every
    worker that is given.
    """
    begun_s = time.monotonic()
    progress = Progress(what, 0, unit=unit) if worker.rank == 0 else None

    def passed_s() -> float:
        return worker.largest(time.monotonic() - begun_s)

    for _ in range(WARM_UP):
        one()
        if passed_s() > seconds / 3:
            break
    taken_s: list[float] = []
    while len(taken_s) < LEAST or (len(taken_s) < count and passed_s() < seconds):
        taken_s.append(one())
        if progress is not None:
            progress.add()
    if progress is not None:
        median_s = _spread(taken_s).median
        print(f"{what}: {len(taken_s)} {unit} timed, median {median_s:.3g} s", file=sys.stderr, flush=True)
    return taken_s


def _spread(values: Sequence[float]) -> Spread:
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64))
    median, p10, p90 = quantiles.tolist()
    return Spread(median=median, p10=p10, p90=p90)
