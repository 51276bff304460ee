"""How far the network, losses, gradients and metrics are from the published implementation's recorded values.

Prints the table of studies/measured.md: python -m benchmarks.parity [--draws 8]. The tests hold the same comparisons to
bounds.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.params.load import load_params
from pipeline.params.schema import Row

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from m2f.model import Mask2Former

PROJECT = Path(__file__).resolve().parent.parent
REFERENCE = PROJECT / "tests" / "reference"


@cache
def rows() -> dict[str, Row]:
    """Of params.yaml."""
    return dict(load_params(PROJECT / "params.yaml").rows)


def seeded_model(row: str, drop_path_rate: float | None = None) -> Mask2Former:
    """The row's network with the weights behind the recorded values."""
    from m2f import build_model
    from m2f.weights import from_reference
    from tests.reference.seeded_weights import seeded_state_dict

    model = build_model(rows()[row].model, drop_path_rate)
    model.load_state_dict(from_reference(seeded_state_dict(row, REFERENCE), rows()[row].model))
    return model


def rgb(image_bgr: np.ndarray) -> Tensor:
    """(..., H, W, 3) BGR to (..., 3, H, W) RGB."""
    import torch

    return torch.from_numpy(image_bgr[..., ::-1].copy()).movedim(-1, -3)


def line(what: str, figure: float, unit: str = "") -> None:
    """One row of the table."""
    print(f"| {what} | {figure:.2g}{unit} |")


def forward(row: str) -> None:
    """Largest differences of one forward pass."""
    import numpy as np
    import torch

    from m2f.inference import semantic_scores
    from m2f.model import normalise, pad

    values = np.load(REFERENCE / "forward" / f"{row}.npz")
    images = pad(normalise(rgb(values["image_bgr"])[None]))
    with torch.inference_mode():
        prediction = seeded_model(row).eval()(images)
    line(
        f"{row}: largest class-logit difference",
        np.abs(prediction.class_logits[0].numpy() - values["class_logits"]).max(),
    )
    masks = values["mask_logits_every_9th_query"]
    line(f"{row}: largest mask-logit difference", np.abs(prediction.mask_logits[0, ::9].numpy() - masks).max())
    if "scores_at" in values:  # semantic rows only
        scores = semantic_scores(prediction, (images.shape[2], images.shape[3]))
        line(f"{row}: largest score difference", np.abs(scores[0, :, ::8, ::8].numpy() - values["scores_at"]).max())


def losses(draws: int) -> None:
    """Largest relative difference of the losses on recorded logits, mean over draws."""
    import numpy as np
    import torch

    from m2f import Target
    from m2f.losses import set_losses
    from m2f.types import Prediction

    values, expected = np.load(REFERENCE / "losses.npz"), json.loads((REFERENCE / "losses.json").read_text())
    height, width = values["mask_shape"]
    targets = []
    for i in (0, 1):
        masks = np.unpackbits(values[f"masks_image{i}"], axis=-1)[..., :width].reshape(-1, height, width)
        targets.append(Target(torch.from_numpy(values[f"labels_image{i}"]), torch.from_numpy(masks.astype(bool))))
    first, last = (
        (torch.from_numpy(values[f"class_logits_layer{i}"]), torch.from_numpy(values[f"mask_logits_layer{i}"]).float())
        for i in (0, 1)
    )
    prediction = Prediction(*last, (Prediction(*first),))
    totals: dict[str, float] = {}
    for draw in range(draws):
        step = set_losses(
            prediction,
            targets,
            num_masks=sum(len(target) for target in targets),
            config=rows()["cityscapes_r50"].model.loss,
            seeds=[2 * draw, 2 * draw + 1],
        )
        for name, value in step.items():
            totals[name] = totals.get(name, 0.0) + value.item() / draws
    names = {name: name.replace("d0.", "aux0.").replace("loss_cls", "loss_class") for name in expected}
    worst = max(abs(totals[ours] / expected[name]["mean"] - 1) for name, ours in names.items())
    line(f"losses on recorded logits, mean of {draws} draws: largest relative difference", 100 * worst, " %")


def training_step(row: str, draws: int) -> None:
    """Relative differences of a whole training step without drop path, mean over draws."""
    import numpy as np
    import torch

    from m2f import Target
    from m2f.losses import set_losses
    from m2f.model import normalise
    from m2f.weights import reference_name

    expected = json.loads((REFERENCE / f"gradients_{row}.json").read_text())
    values = np.load(REFERENCE / f"gradients_{row}.npz")
    images = normalise(rgb(values["image_bgr"]))
    targets = [Target.from_label_map(torch.from_numpy(label)) for label in values["label"]]
    model = seeded_model(row, drop_path_rate=0.0).train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    total, norms = 0.0, dict.fromkeys(expected["gradient_norms"], 0.0)
    for draw in range(draws):
        model.load_state_dict(start)
        model.zero_grad()
        step = set_losses(
            model(images),
            targets,
            num_masks=sum(len(target) for target in targets),
            config=model.config.loss,
            seeds=[2 * draw, 2 * draw + 1],
        )
        loss = torch.stack(list(step.values())).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item() / draws
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                norms[reference_name(name)] += parameter.grad.norm().item() / draws
    reference_total = expected["losses"]["total"][0]
    differences = [abs(norms[name] / mean - 1) for name, (mean, _) in expected["gradient_norms"].items() if mean > 1e-4]
    line(f"{row} training step, mean of {draws} draws: summed loss", 100 * abs(total / reference_total - 1), " %")
    line(f"{row}: {len(differences)} gradient norms, largest difference", 100 * max(differences), " %")
    line(f"{row}: gradient norms, median difference", 100 * float(np.median(differences)), " %")


def miou() -> None:
    """Difference of mIoU on recorded label maps."""
    import numpy as np

    from m2f.metrics import SemanticMetric

    values, expected = np.load(REFERENCE / "miou.npz"), json.loads((REFERENCE / "miou.json").read_text())
    metric = SemanticMetric(num_classes=19)
    metric.update(values["prediction"], values["label"])
    line("mIoU on recorded label maps", abs((metric.result()["miou"] or 0.0) - expected["mIoU"]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("--draws", type=int, default=8, help="draws of the sampled points; default: %(default)s")
    draws = parser.parse_args().draws
    print("| compared | difference |\n|---|---|")
    recorded = {path.stem for path in (REFERENCE / "forward").glob("*.npz")}
    for row in rows():
        if row in recorded:
            forward(row)
    losses(5 * draws)
    for row in ("cityscapes_r50", "ade20k_swin-t"):
        training_step(row, draws)
    miou()


if __name__ == "__main__":
    main()
