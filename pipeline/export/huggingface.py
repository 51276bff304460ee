"""A folder that Hugging Face's transformers opens: its settings, the weights by its names, and its preprocessing."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m2f.backbones.swin import SWINS
from m2f.model import MEAN_RGB, STD_RGB, normalise
from pipeline.export.graph import STRIDE
from pipeline.params.sentences import error_shown

if TYPE_CHECKING:
    from m2f.config import ModelConfig
    from pipeline.export.check import Run
    from pipeline.prediction.network import TrainedNetwork

_RESNET_DEPTHS = {"r50": [3, 4, 6, 3], "r101": [3, 4, 23, 3]}
_STAGES = [f"stage{i}" for i in range(1, 5)]


def require_transformers(config: ModelConfig) -> None:
    """ValueError unless transformers can be imported and knows the row's backbone."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the format huggingface needs transformers ({error_shown(error)}); install it with: "
            "pip install 'transformers>=5.0'"
        ) from None
    if config.backbone.name not in {*_RESNET_DEPTHS, *SWINS}:
        raise ValueError(
            f"transformers has no backbone like {config.backbone.name}; it has those of rows with "
            f"{', '.join([*_RESNET_DEPTHS, *SWINS])}"
        )
    if config.pixel_decoder.name != "deformable":
        raise ValueError(
            f"transformers has no pixel decoder like {config.pixel_decoder.name}; export the row for another library, "
            "with --format torch.export"
        )


def write_folder(source: TrainedNetwork, folder: Path, metadata: Mapping[str, str]) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json into an empty folder."""
    from safetensors.torch import save_file
    from transformers import Mask2FormerConfig, Mask2FormerImageProcessor

    from m2f.weights import to_huggingface

    row = source.row
    assert row is not None
    names = dict(enumerate(source.class_names))
    settings = Mask2FormerConfig(
        **_settings(row.model), id2label=names, label2id={name: place for place, name in names.items()}
    )
    settings.architectures = ["Mask2FormerForUniversalSegmentation"]
    settings.save_pretrained(folder)
    tensors = to_huggingface(source.network.state_dict(), row.model)
    # a shared tensor is written once for each of its names
    copies = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(copies, folder / "model.safetensors", {"format": "pt", **metadata})
    Mask2FormerImageProcessor(
        size={"shortest_edge": row.test.short_side, "longest_edge": row.test.long_side_max},
        size_divisor=STRIDE,
        image_mean=[value / 255 for value in MEAN_RGB],
        image_std=[value / 255 for value in STD_RGB],
        ignore_index=255,
        num_labels=row.model.num_classes,
    ).save_pretrained(folder)


def _settings(config: ModelConfig) -> dict[str, Any]:
    """The network's settings by transformers' names."""
    pixel, query, loss = config.pixel_decoder, config.query_decoder, config.loss
    return {
        "backbone_config": _backbone(config.backbone.name),
        "feature_size": pixel.channels,
        "mask_feature_size": pixel.channels,
        "hidden_dim": pixel.channels,
        "encoder_feedforward_dim": pixel.feedforward,
        "encoder_layers": pixel.layers,
        "decoder_layers": query.layers + 1,  # transformers counts the prediction before the first
        "num_attention_heads": query.heads,
        "dim_feedforward": query.feedforward,
        "num_queries": query.queries,
        "dropout": 0.0,
        "no_object_weight": loss.no_object_weight,
        "class_weight": loss.class_weight,
        "mask_weight": loss.mask_weight,
        "dice_weight": loss.dice_weight,
        "train_num_points": loss.points,
        "oversample_ratio": loss.oversample,
        "importance_sample_ratio": loss.importance,
    }


def _backbone(name: str) -> dict[str, Any]:
    if name in _RESNET_DEPTHS:
        return {
            "model_type": "resnet",
            "depths": _RESNET_DEPTHS[name],
            "layer_type": "bottleneck",
            "out_features": _STAGES,
        }
    swin = SWINS[name]
    return {
        "model_type": "swin",
        "embed_dim": swin.channels,
        "depths": list(swin.depths),
        "num_heads": list(swin.heads),
        "window_size": swin.window,
        "drop_path_rate": 0.0,
        "out_features": _STAGES,
    }


def open_folder(folder: Path) -> Run:
    """The folder as transformers loads it. ValueError where a weight is missing or left over."""
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.utils import logging

    logging.set_verbosity_error()
    with contextlib.redirect_stdout(None):
        opened: Any = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    network, found = opened
    wrong = [*found["missing_keys"], *found["unexpected_keys"]]
    if wrong:
        raise ValueError(f"transformers finds {len(wrong)} weights missing or left over, first {min(wrong)}")
    network.eval()

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            made = network(pixel_values=normalise(images, sizes))
        return made.class_queries_logits, made.masks_queries_logits

    return run
