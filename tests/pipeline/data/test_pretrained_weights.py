from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2f import ModelConfig, build_model
from m2f.config import BackboneConfig
from m2f.weights import load_backbone
from pipeline.data.pretrained_weights import convert_weights
from pipeline.params.schema import WeightsConfig
from pipeline.storage.files import sha256


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A torchvision ResNet-50 checkpoint, as published but random."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    state = resnet50().state_dict()
    path = tmp_path_factory.mktemp("published") / "resnet50-random.pth"
    torch.save(state, path)
    return path, state


@pytest.fixture
def url(published: tuple[Path, dict[str, torch.Tensor]], served: tuple[Path, str]) -> str:
    shutil.copy(published[0], served[0])
    return f"{served[1]}/{published[0].name}"


def test_a_published_backbone_is_stored_in_our_names(
    storage: Path, url: str, published: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    prefix = sha256(published[0])[:8]
    facts = convert_weights("r50", WeightsConfig(url=url, sha256_prefix=prefix))
    path = storage / (facts.path or "")
    assert (facts.url, facts.source_sha256, facts.sha256) == (url, sha256(published[0]), sha256(path))
    assert facts.path == f"weights/{facts.sha256}.safetensors"
    tensors = load_file(path)
    assert all(name.startswith("backbone.") for name in tensors)
    model = build_model(ModelConfig(num_classes=3, backbone=BackboneConfig(name="r50")))
    load_backbone(model, tensors)
    # ours holds every published tensor but the classifier's two
    total = sum(float(value.double().abs().sum()) for name, value in published[1].items() if not name.startswith("fc."))
    assert sum(float(value.double().abs().sum()) for value in tensors.values()) == pytest.approx(total)
    assert convert_weights("r50", WeightsConfig(url=url, sha256_prefix=prefix)) == facts


def test_weights_of_another_digest_are_refused(storage: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"resnet50-random\.pth has sha256 .*, expected 00000000"):
        convert_weights("r50", WeightsConfig(url=url, sha256_prefix="00000000"))
