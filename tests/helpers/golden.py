"""The golden trajectory: the losses of the first steps of a real row, which a refactor leaves as they are.

    python -m tests.helpers.golden            # shows them beside the recorded ones, and the digest of the weights
    python -m tests.helpers.golden --record   # and records them anew

Row `shapes_tiny` of params.yaml on its own dataset, both as they stand there, in this process and on one thread. The
digest belongs to one machine: it is compared before and after a change there, and is not recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from m2f.kernels.build import use
from pipeline.data.fetch import fetch, open_sources
from pipeline.data.shards.build import build
from pipeline.params.load import load_params
from pipeline.provenance.environment import device_name
from pipeline.runs.checkpoints import checkpoint_path
from pipeline.runs.curve_file import read_curve
from pipeline.runs.run import YIELD, Run
from pipeline.storage.files import write_json
from pipeline.storage.results.data import Manifest
from pipeline.training.loop import YieldRequested, train
from tests.helpers.shared import PROJECT

ROW, SEEDS, STEPS, DIGITS = "shapes_tiny", (0, 1), 20, 6
RECORD = Path(__file__).parent / "golden_losses.json"


@dataclass(frozen=True)
class Trajectory:
    """The first STEPS steps of one seed."""

    losses: list[float]
    """The training loss of each step, to DIGITS significant digits."""
    digest: str
    """SHA-256 of the network's and the optimiser's tensors after the last of them."""


def made_on() -> dict[str, str]:
    """What the digits depend on besides the code."""
    processor = f"{device_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "processor": processor,
        "model": processor_model(),
        "arithmetic": arithmetic(),
        "torch": torch.__version__,
        "kernels": use("auto"),
    }


def processor_model() -> str:
    """Family, model, stepping, cache, cores and a digest of abilities. Several share a name in virtual machines, and
    libraries choose other loops for each."""
    facts = dict.fromkeys(("cpu family", "model", "stepping", "cache size", "siblings", "flags"), "")
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            if key.strip() in facts:
                facts[key.strip()] = value.strip()
    flags = facts.pop("flags")
    return "-".join([*facts.values(), hashlib.sha256(flags.encode()).hexdigest()[:8]])


def arithmetic() -> str:
    """16 digits that tell apart processors of one name, as virtual machines give it, by how PyTorch rounds on them.

    A digest of what its own operations make of fixed numbers; nothing of this project takes part.
    """
    draw = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    for channels, side in ((3, 64), (32, 24), (64, 12), (128, 6)):
        x, kernel, matrix = (
            torch.randn(shape, generator=draw).requires_grad_()
            for shape in ((2, channels, side, side), (64, channels, 3, 3), (64, 64))
        )
        tokens = F.group_norm(F.conv2d(x, kernel, padding=1), 8).flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(tokens[:, :30], tokens, F.gelu(tokens @ matrix))
        loss = F.layer_norm(mixed, (64,)).exp().sigmoid().log().sum()
        for tensor in (loss, *torch.autograd.grad(loss, (x, kernel, matrix))):
            digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()[:16]


def recorded() -> dict[str, Any]:
    """{"row": ..., "made_on": ..., "losses": {"0": [47.4934, ...], "1": ...}}."""
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record


def tolerance(step: int) -> float:
    """How far a loss may be from the recorded one, relatively, where the processor, torch or the kernels are others.

    Rounding grows through matching. With two threads, and with the vector instructions of 2008, the losses were at most
    1e-6 apart in steps 0 and 1, 1.1e-3 to step 9 and 1.5e-2 to step 19.
    """
    return 1e-5 if step < 2 else 5e-3 if step < 10 else 4e-2


def make_shards() -> Manifest:
    """The manifest of the row's dataset, sharded below M2F_STORAGE."""
    params = load_params(PROJECT / "params.yaml")
    name = params.row(ROW).dataset
    config = params.dataset(name)
    fetched = fetch(name, config, base=PROJECT)
    return build(name, config, open_sources(fetched), facts=fetched.sources, processes=0)


def trajectory(seed: int, manifest: Manifest, folder: Path) -> Trajectory:
    """Train a seed in an empty `folder` for STEPS steps of its whole schedule.

    Only how often it logs and saves is not the row's: these two settings shape no weights.
    """
    from safetensors.torch import load_file, save

    row = load_params(PROJECT / "params.yaml").row(ROW)
    row = dataclasses.replace(row, train=dataclasses.replace(row.train, log_every=1, checkpoint_interval=STEPS))
    run = Run(row=row, seed=seed, run_key="golden", run_dir=folder, manifest=manifest)
    (folder / YIELD).touch()
    with contextlib.suppress(YieldRequested):  # after its first checkpoint
        train(run)
    losses = [float(f"{point['loss']:.{DIGITS}g}") for point in read_curve(folder / "curve.jsonl")]
    tensors = load_file(checkpoint_path(folder, STEPS))
    return Trajectory(losses, hashlib.sha256(save(tensors)).hexdigest())


def trajectories() -> dict[str, Trajectory]:
    """Every seed's, in a storage root of their own."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["M2F_STORAGE"] = folder
        manifest, found = make_shards(), {}
        for seed in SEEDS:
            run_dir = Path(folder, "runs", str(seed))
            run_dir.mkdir(parents=True)
            found[str(seed)] = trajectory(seed, manifest, run_dir)
        return found


def show(seed: str, losses: Sequence[float], before: Sequence[float]) -> None:
    """A line for each step: the recorded loss and the one found now."""
    for step, (old, new) in enumerate(zip(before, losses, strict=True)):
        apart = "equal" if new == old else f"{abs(new / old - 1):.1e} apart"
        print(f"seed {seed}, step {step:2}: recorded {old:.{DIGITS}g}, now {new:.{DIGITS}g}, {apart}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The losses of a row's first steps beside the recorded ones.")
    parser.add_argument("--record", action="store_true", help="record them anew")
    parser.add_argument("--threads", type=int, default=1, help="of torch; what is recorded was made on one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before, found = recorded()["losses"], trajectories()
    for seed, new in found.items():
        show(seed, new.losses, before[seed])
        print(f"seed {seed}: digest {new.digest}")
    if arguments.record:
        losses = {seed: new.losses for seed, new in found.items()}
        write_json(RECORD, {"row": ROW, "made_on": made_on(), "losses": losses})


if __name__ == "__main__":
    main()
