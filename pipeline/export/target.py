"""Where an exported file goes: looked at before the minutes that it takes, and attached to its registered version."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.params.sentences import error_shown
from pipeline.storage.files import sha256
from pipeline.storage.root import storage_root

if TYPE_CHECKING:
    from pipeline.prediction.network import Version
    from pipeline.storage.results.data import Manifest

TAG = "export."
"""How the tag of a registered version begins that names a file: export.onnx is `model.onnx, sha256 ...`."""


def check_target(out: Path, *, force: bool, folder: bool = False) -> None:
    """ValueError where `out` cannot be written, or is there already without `force`. `folder`: it is to be one."""
    if out.exists() and not force:
        raise ValueError(f"{out} exists; choose another --out, or replace it with --force")
    if folder and out.exists() and not (out / "config.json").is_file():
        raise ValueError(f"{out} is no folder of an exported network, so that --force does not replace it")
    if out.is_dir() and not folder:
        raise ValueError(f"{out} is a folder; give --out the name of a file")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"the folder of {out} does not exist; make it first: mkdir -p {out.parent}")
    try:
        with tempfile.TemporaryFile(dir=out.absolute().parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{out} cannot be written: {error.strerror or error}; choose an --out in a folder where this user may write"
        ) from None


def has_validation_images(manifest: Manifest) -> bool:
    """Whether the shards of the validation images are under the storage root."""
    shards = manifest.splits["val"].shards if "val" in manifest.splits else ()
    root = storage_root()
    return bool(shards) and all((root / shard.path).exists() for shard in shards)


def attach(version: Version, out: Path, form: str) -> None:
    """Put a file beside the files of a registered version, and its name and digest into a tag of the version.

    ValueError when the server does not take it; the file stays.
    """
    from pipeline.tracking.client import mlflow_client, shown_uri

    client = mlflow_client()
    from mlflow.exceptions import MlflowException

    try:
        client.log_model_artifact(version.model_id, str(out))
        client.set_model_version_tag(version.name, version.version, f"{TAG}{form}", f"{out.name}, sha256 {sha256(out)}")
    except MlflowException as error:
        raise ValueError(
            f"{out} is written, but {shown_uri()} did not take it as a file of {version.name}, version "
            f"{version.version} ({error_shown(error)}); run the command again with --force"
        ) from None
