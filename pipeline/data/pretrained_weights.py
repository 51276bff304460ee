"""Published weights that backbones start from, stored in m2f's names."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.download import downloaded
from pipeline.storage.files import copy_file, local_file, sha256
from pipeline.storage.results import ConvertedWeights
from pipeline.storage.root import storage_root

if TYPE_CHECKING:
    from pipeline.params.schema import WeightsConfig


def convert_weights(name: str, config: WeightsConfig) -> ConvertedWeights:
    """Download published backbone weights and store them as safetensors in m2f's names."""
    from safetensors.torch import save_file

    from m2f.weights import backbone_from_swin, backbone_from_torchvision, read_checkpoint

    convert = {"torchvision": backbone_from_torchvision, "swin": backbone_from_swin}[config.layout]
    source = downloaded(config.url, sha256_prefix=config.sha256_prefix)
    with local_file(source.path, source.sha256) as published:
        tensors = {key: value.contiguous() for key, value in convert(read_checkpoint(published)).items()}
    with tempfile.TemporaryDirectory(prefix="m2f-") as folder:
        file = Path(folder) / "weights.safetensors"
        save_file(tensors, file)
        digest = sha256(file)
        path = f"weights/{digest}.safetensors"
        copy_file(file, storage_root() / path)
    return ConvertedWeights(name=name, url=config.url, source_sha256=source.sha256, sha256=digest, path=path)
