"""Published weights that backbones start from, stored in m2f's names."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.download import download
from pipeline.files import sha256, whole_file
from pipeline.storage import storage_root

if TYPE_CHECKING:
    from pipeline.params import WeightsConfig


def convert_weights(name: str, config: WeightsConfig) -> dict[str, Any]:
    """Download published backbone weights and store them as safetensors in m2f's names.

    Returns the facts for results/weights/<name>.json; `sha256` is that of the stored file.
    """
    from safetensors.torch import save_file

    from m2f.weights import backbone_from_swin, backbone_from_torchvision, read_checkpoint

    convert = {"torchvision": backbone_from_torchvision, "swin": backbone_from_swin}[config.layout]
    source = download(config.url, sha256_prefix=config.sha256_prefix)
    tensors = {key: value.contiguous() for key, value in convert(read_checkpoint(source)).items()}
    folder = storage_root() / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting.", suffix=".part", dir=folder) as partial:
        file = Path(partial) / "weights.safetensors"
        save_file(tensors, file)
        digest = sha256(file)
        target = folder / f"{digest}.safetensors"
        with whole_file(target) as whole:
            shutil.copyfile(file, whole)
    path = target.relative_to(storage_root()).as_posix()
    return {"name": name, "url": config.url, "source_sha256": sha256(source), "sha256": digest, "path": path}
