"""The network against outputs of the published implementation (tests/reference/), and its small promises."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from m2f import Target, build_model
from m2f.config import BackboneConfig, ModelConfig, PixelDecoderConfig, QueryDecoderConfig
from m2f.inference import semantic_scores
from m2f.losses import set_losses
from m2f.mask_product import masks_of
from m2f.model import normalise, pad
from m2f.optim import parameter_groups
from m2f.weights import from_reference, reference_name
from pipeline.params.load import load_params
from tests.helpers.published_outputs import assert_published
from tests.reference.seeded_weights import seeded_state_dict

REFERENCE = Path(__file__).parent.parent / "reference"
PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
TINY = PARAMS.rows["shapes_tiny"].model
SEMANTIC = list(json.loads((REFERENCE / "rows.json").read_text())["rows"])
"""The rows of mmsegmentation's table."""
SEMANTIC_SWINS = ["cityscapes_swin-t", "ade20k_swin-t", "ade20k_swin-s", "ade20k_swin-b-in22k"]


def seeded_model(row: str, drop_path_rate: float | None = None):
    config = PARAMS.rows[row].model
    model = build_model(config, drop_path_rate)
    model.load_state_dict(from_reference(seeded_state_dict(row, REFERENCE), config))
    return model


def rgb(image_bgr: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image_bgr[..., ::-1].copy()).movedim(-1, -3)


FORWARD = [
    "cityscapes_r50",
    "ade20k_r50",
    *(pytest.param(row, marks=pytest.mark.slow) for row in SEMANTIC_SWINS),
]
"""Rows with recorded outputs; the first two are among the quick tests."""


@pytest.mark.parametrize("row", FORWARD)
def test_the_forward_pass_equals_the_published_implementation(row: str) -> None:
    values = np.load(REFERENCE / "forward" / f"{row}.npz")
    images = pad(normalise(rgb(values["image_bgr"])[None]))
    prediction = assert_published(seeded_model(row).eval(), images, values)
    with torch.inference_mode():
        scores = semantic_scores(prediction, images.shape[-2:])
        height, width = values["argmax"].shape
        own = semantic_scores(prediction, (height, width), (height, width))[0]
    # sums over 100 queries, up to 11: 1e-5 of their size is rounding
    np.testing.assert_allclose(scores[0, :, ::8, ::8].numpy(), values["scores_at"], atol=1e-4, rtol=1e-5)
    # a pixel may be labelled otherwise where two classes' scores are equal but for rounding, and nowhere else
    lost = own.amax(0) - own.gather(0, torch.from_numpy(values["argmax"][None]).long())[0]
    assert lost.max() < 1e-4 and (lost > 0).double().mean() < 2e-4


@pytest.fixture
def two_threads() -> Iterator[None]:
    """The order of additions that the recorded values agree with.

    In the ResNet's step 30 pixels make a batch norm's statistics, and rounding, float64's too, moves some attention
    masks over their threshold: with one thread a norm differs by up to 7 % (median 1 %), the summed loss by 0.03 %.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("row", ["cityscapes_r50", "ade20k_swin-t"])
def test_one_training_step_has_the_published_losses_and_gradient_norms(row: str) -> None:
    draws = 4
    expected = json.loads((REFERENCE / f"gradients_{row}.json").read_text())
    total, _ = expected["losses"].pop("total")
    values = np.load(REFERENCE / f"gradients_{row}.npz")
    images = normalise(rgb(values["image_bgr"]))
    targets = [Target.from_label_map(torch.from_numpy(label)) for label in values["label"]]
    model = seeded_model(row, drop_path_rate=0.0).train()
    names = {reference_name(name): parameter for name, parameter in model.named_parameters()}
    start = {name: value.clone() for name, value in model.state_dict().items()}

    losses: dict[str, float] = {}
    norms = dict.fromkeys(expected["gradient_norms"], 0.0)
    for draw in range(draws):
        model.load_state_dict(start)  # batch norm's running statistics moved
        model.zero_grad()
        step = set_losses(
            model(images, seeds=[draw, 100 + draw]),
            targets,
            num_masks=max(sum(len(target) for target in targets), 1),
            config=model.config.loss,
            seeds=[draw, 100 + draw],
        )
        sum(step.values()).backward()
        for name, value in step.items():
            losses[name] = losses.get(name, 0.0) + value.item() / draws
        for name in norms:
            norms[name] += names[name].grad.norm().item() / draws

    def ours(name: str) -> str:  # "d3.loss_cls" -> "aux3.loss_class"
        return (
            name.replace("d", "aux", 1).replace("loss_cls", "loss_class")
            if name[0] == "d"
            else name.replace("_cls", "_class")
        )

    assert sum(losses.values()) == pytest.approx(total, rel=0.002)
    for name, (mean, std) in expected["losses"].items():
        error = 4 * std / draws**0.5 + 4 * std / expected["draws"] ** 0.5
        assert losses[ours(name)] == pytest.approx(mean, abs=0.002 * mean + error), name
    trained = {name for name, parameter in names.items() if parameter.requires_grad}
    assert set(norms) == trained
    for name, (mean, _) in expected["gradient_norms"].items():
        assert norms[name] == pytest.approx(mean, rel=0.03, abs=1e-5), name


@pytest.mark.parametrize("row", SEMANTIC)
def test_every_parameter_has_the_published_learning_rate_weight_decay_and_freezing(row: str) -> None:
    expected = json.loads((REFERENCE / "optim" / f"{row}.json").read_text())
    with torch.device("meta"):
        model = build_model(PARAMS.rows[row].model)
    names = {id(parameter): reference_name(name) for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, PARAMS.rows[row].train.optimizer)
    own = {names[id(p)]: [group["lr"], group["weight_decay"]] for group in groups for p in group["params"]}
    assert own == {name: pytest.approx(setting) for name, setting in expected["groups"].items()}
    frozen = {reference_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == set(expected["frozen"])


@pytest.mark.parametrize("row", SEMANTIC)
def test_every_state_dict_entry_has_exactly_one_reference_name_and_its_shape(row: str) -> None:
    entries = json.loads((REFERENCE / "names" / f"{row}.json").read_text())
    entries = {name: entry for name, entry in entries.items() if not name.endswith("relative_position_index")}
    with torch.device("meta"):
        state = build_model(PARAMS.rows[row].model).state_dict()
    assert {reference_name(name): [list(t.shape), str(t.dtype)[6:]] for name, t in state.items()} == entries


def test_rows_of_the_authors_recipe_have_their_batch_norm() -> None:
    with torch.device("meta"):
        models = {name: build_model(PARAMS.rows[f"{name}_r50_authors"].model) for name in ("cityscapes", "ade20k")}
    norm = models["cityscapes"].backbone.bn1
    groups = parameter_groups(models["cityscapes"], PARAMS.rows["cityscapes_r50_authors"].train.optimizer)
    (group,) = [group for group in groups if any(parameter is norm.weight for parameter in group["params"])]
    assert (group["lr"], group["weight_decay"]) == (1e-5, 0.0)  # SyncBN that learns, without decay
    assert models["cityscapes"].train().backbone.bn1.training
    frozen = models["ade20k"].train().backbone.bn1
    assert not frozen.weight.requires_grad and not frozen.training  # detectron2's FrozenBN


def test_a_pixel_decoder_in_float32_stays_so_under_autocast() -> None:
    images, mask_features = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), {}
    for float32 in (True, False):
        torch.manual_seed(0)
        decoder = dataclasses.replace(TINY.pixel_decoder, float32=float32)
        model = build_model(dataclasses.replace(TINY, pixel_decoder=decoder)).eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            maps = [x.float() for x in model.backbone(images)]
            mask_features[float32], levels = model.features(images, None)
        assert all(x.dtype == torch.float32 for x in levels) or not float32
        if float32:
            with torch.inference_mode():
                expected, _ = model.pixel_decoder(maps)
            assert torch.equal(mask_features[True], expected)
    assert mask_features[False].dtype == torch.bfloat16 and mask_features[True].dtype == torch.float32


def test_the_tiny_row_is_the_same_network_with_group_norm_and_fewer_channels() -> None:
    model = build_model(TINY)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    prediction = model(torch.zeros(2, 3, 64, 96))
    assert prediction.class_logits.shape == (2, TINY.query_decoder.queries, TINY.num_classes + 1)
    assert prediction.mask_logits.shape == (2, TINY.query_decoder.queries, 16, 24)
    assert len(prediction.auxiliary) == TINY.query_decoder.layers


def test_a_pictures_prediction_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    torch.manual_seed(0)
    model = build_model(TINY).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        together, alone = model(images), model(images[1:2])
    torch.testing.assert_close(together.mask_logits[1:2], alone.mask_logits, atol=1e-4, rtol=1e-4)


def test_leaving_out_auxiliary_predictions_changes_nothing_else() -> None:
    torch.manual_seed(0)
    model = build_model(TINY).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        full, short = model(images), model(images, auxiliary=False)
    assert len(full.auxiliary) == 3 and short.auxiliary == ()
    assert torch.equal(full.class_logits, short.class_logits) and torch.equal(full.mask_logits, short.mask_logits)


def test_padding_is_zero_after_normalising() -> None:
    images = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    out = normalise(images, torch.tensor([[2, 3]]))
    assert out[0, :, :2, :3].min() > 2  # (255 - mean) / std is at least 2.24
    assert out[0, :, 2:].abs().max() == 0 and out[0, :, :, 3:].abs().max() == 0
    # (255 - 123.675) / 58.395 = 2.24891
    assert out[0, 0, 0, 0].item() == pytest.approx(2.24891, abs=1e-5)


def test_batch_norm_follows_the_row_in_training() -> None:
    images = torch.randn(2, 3, 64, 64)
    for batch_statistics in (True, False):
        torch.manual_seed(0)
        config = ModelConfig(
            num_classes=3,
            backbone=BackboneConfig(name="r50", batch_statistics=batch_statistics),
            pixel_decoder=PixelDecoderConfig(channels=32, layers=1),
            query_decoder=QueryDecoderConfig(queries=5, layers=1),
        )
        model = build_model(config).train()
        before = model.backbone.bn1.running_mean.clone()
        model(images)
        assert torch.equal(before, model.backbone.bn1.running_mean) != batch_statistics
        assert not model.backbone.bn1.weight.requires_grad


@pytest.mark.parametrize("backbone", ["tiny", "r50", "swin-tiny"])
def test_a_picture_of_any_size_has_levels_that_are_rounded_up_and_padding_it_changes_the_answer(backbone: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        num_classes=3,
        backbone=BackboneConfig(name=backbone, drop_path_rate=0.0),
        pixel_decoder=PixelDecoderConfig(channels=32, layers=1),
        query_decoder=QueryDecoderConfig(queries=5, layers=3),
    )
    model = build_model(config).eval()
    images = torch.randn(2, 3, 37, 83)
    with torch.inference_mode():
        maps, prediction, padded = model.backbone(images), model(images), model(pad(images))
    assert [tuple(x.shape[2:]) for x in maps] == [(10, 21), (5, 11), (3, 6), (2, 3)]
    assert prediction.mask_logits.shape == (2, 5, 10, 21)
    assert padded.mask_logits.shape == (2, 5, 16, 24)
    assert prediction.mask_logits.isfinite().all() and prediction.class_logits.isfinite().all()
    assert (prediction.mask_logits - padded.mask_logits[..., :10, :21]).abs().amax(dim=(1, 2, 3)).min() > 0.01
    assert (prediction.class_logits - padded.class_logits).abs().amax(dim=(1, 2)).min() > 1e-4


@pytest.mark.parametrize("backbone", ["tiny", "swin-tiny"])
def test_the_smallest_picture_is_32_by_32_and_smaller_ones_are_refused_with_the_remedy(backbone: str) -> None:
    model = build_model(dataclasses.replace(TINY, backbone=BackboneConfig(name=backbone))).eval()
    assert model(torch.zeros(1, 3, 32, 32), auxiliary=False).mask_logits.shape[2:] == (8, 8)
    with pytest.raises(ValueError, match="31 x 64 pixels where the network needs 32 x 32 or more"):
        model(torch.zeros(1, 3, 31, 64))


def test_an_unknown_backbone_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'r52'; known: r50, r101, tiny"):
        build_model(dataclasses.replace(TINY, backbone=BackboneConfig(name="r52")))


def test_the_gradient_of_masks_is_that_of_the_product_with_rows_of_zeros_left_out() -> None:
    """3 queries of 2 images; queries 0 and 2 of the first image have a gradient, none of the second."""
    generator = torch.Generator().manual_seed(0)
    embedding, features = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 4, 5, 6, generator=generator)
    to_masks = torch.randn(2, 3, 5, 6, generator=generator)
    to_masks[0, 1] = to_masks[1] = 0
    found = []
    for product in (masks_of, lambda e, f: torch.einsum("bqc,bchw->bqhw", e, f)):
        inputs = embedding.clone().requires_grad_(), features.clone().requires_grad_()
        product(*inputs).backward(to_masks)
        found.append([x.grad for x in inputs])
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1][1].eq(0).all()  # type: ignore[index]


def test_a_resnets_maps_are_the_same_bits_with_and_without_gradients() -> None:
    backbone = build_model(ModelConfig(num_classes=3, backbone=BackboneConfig(name="r50"))).backbone.eval()
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    kept = backbone(images)
    with torch.inference_mode():
        predicted = backbone(images)
    assert len(kept) == 4
    assert all(torch.equal(a, b) for a, b in zip(kept, predicted, strict=True))
