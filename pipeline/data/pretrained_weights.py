"""Weights that backbones or whole networks start from, stored in m2f's names."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.download import downloaded
from pipeline.params.parse import pick
from pipeline.params.shorthand import trained_classes
from pipeline.storage.digests import checkpoint_digest
from pipeline.storage.files import copy_file, local_file, sha256
from pipeline.storage.results.data import ConvertedWeights
from pipeline.storage.results.folder import made_by, read_result
from pipeline.storage.results.rows import TrainingResult
from pipeline.storage.root import in_project, storage_root, stored

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.params.schema import Params, Row, WeightsConfig
    from pipeline.storage.stores import StoredPath


def convert_weights(name: str, config: WeightsConfig) -> ConvertedWeights:
    """Download published backbone weights and store them as safetensors in m2f's names."""
    from m2f.weights import backbone_from_swin, backbone_from_torchvision, read_checkpoint

    convert = {"torchvision": backbone_from_torchvision, "swin": backbone_from_swin}[config.layout]
    source = downloaded(config.url, sha256_prefix=config.sha256_prefix)
    with local_file(source.path, source.sha256) as published:
        tensors = convert(read_checkpoint(published))
    digest, path = _stored(tensors)
    return ConvertedWeights(name=name, url=config.url, source_sha256=source.sha256, sha256=digest, path=path)


def convert_network(name: str, config: WeightsConfig, params: Params) -> ConvertedWeights:
    """Fetch a whole network and store what the rows that name it start from (m2f.weights.start).

    ValueError: no row names it, or they have other networks or classes; the checkpoint is not here or does not fit;
    it has another number of classes and the entry does not say what becomes of them.
    """
    from m2f.weights import load_whole
    from m2f.weights.start import start_tensors

    row, classes = _row_of(name, params)
    url, folder, file = _checkpoint(name, config, params)
    with nullcontext(file) if isinstance(file, Path) else local_file(file, folder) as local:
        loaded = load_whole(local, row.model, partial=config.partial, any_classes=True)
        source_sha256 = folder or checkpoint_digest(local)
    if config.classes == "same" and loaded.num_classes != len(classes):
        raise ValueError(
            f"weights.{name}: {url} has {loaded.num_classes} classes, and row {row.name} has {len(classes)}; write "
            "classes: anew, or classes: match with the file's class_names"
        )
    known = config.class_names or (_classes(params.row(config.row), params) if config.row else ())
    try:
        tensors, said = start_tensors(loaded, classes, known=known, rule=config.classes)
    except ValueError as error:
        raise ValueError(f"weights.{name}: {error}") from None
    digest, path = _stored(tensors)
    network = f"kept of a checkpoint of {loaded.origin}: {said}"
    return ConvertedWeights(name=name, url=url, source_sha256=source_sha256, sha256=digest, path=path, network=network)


def _stored(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Write tensors into the storage root; their file's SHA-256 and path there."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="m2f-") as folder:
        file = Path(folder) / "weights.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        digest = sha256(file)
        path = f"weights/{digest}.safetensors"
        copy_file(file, storage_root() / path)
    return digest, path


def _row_of(name: str, params: Params) -> tuple[Row, tuple[str, ...]]:
    """A row that starts from these weights, and its classes, which all that do have in common."""
    rows = [row for row in params.rows.values() if row.weights == name]
    if not rows:
        raise ValueError(f"no row starts from weights.{name}; name it in a row: weights: {name}")
    first, classes = rows[0], _classes(rows[0], params)
    for row in rows[1:]:
        if (row.model, _classes(row, params)) != (first.model, classes):
            raise ValueError(
                f"rows {first.name} and {row.name} start from weights.{name} with another network or other classes; "
                "give each an entry of its own"
            )
    return first, classes


def _classes(row: Row, params: Params) -> tuple[str, ...]:
    return trained_classes(params.dataset(row.dataset), row.task)[1]


def _checkpoint(name: str, config: WeightsConfig, params: Params) -> tuple[str, str, Path | StoredPath]:
    """Where a whole network comes from in words, its file's SHA-256 (empty: not known) and the file."""
    if config.url:
        source = downloaded(config.url, sha256_prefix=config.sha256_prefix)
        return config.url, source.sha256, source.path
    if config.path:
        return config.path, "", in_project(config.path)
    row, wanted = pick(params.rows, config.row, "row", f"weights.{name}.row"), config.seed or 0
    trained = read_result(TrainingResult, row.name)
    seed = next((seed for seed in trained.seeds if seed.seed == wanted), None)
    if seed is None or seed.checkpoints is None:
        raise ValueError(
            f"weights.{name} is seed {wanted} of row {row.name}, which is not trained here; "
            f"dvc repro train@{row.name} first"
        )
    checkpoint = seed.checkpoints["best" if row.checkpoint_rule == "best" else "last"]
    file = stored(f"{seed.run_dir}/{checkpoint.path}", made_by=made_by(TrainingResult, row.name))
    return f"train@{row.name}, seed {wanted}, step {checkpoint.step}", checkpoint.sha256, file
