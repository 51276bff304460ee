"""Where an exported file may go."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.export.onnx_file import require_onnx
from pipeline.export.target import check_target, has_validation_images
from tests.helpers.manifests import made_up_manifest


def test_a_file_that_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    out = tmp_path / "it.onnx"
    check_target(out, force=False)
    out.write_text("a")
    with pytest.raises(ValueError, match="exists; choose another --out, or replace it with --force"):
        check_target(out, force=False)
    check_target(out, force=True)
    assert out.read_text() == "a" and list(tmp_path.iterdir()) == [out]  # looking leaves nothing


def test_a_folder_is_replaced_only_where_it_is_an_exported_network(tmp_path: Path) -> None:
    out = tmp_path / "it"
    out.mkdir()
    with pytest.raises(ValueError, match="is no folder of an exported network, so that --force does not replace it"):
        check_target(out, force=True, folder=True)
    (out / "config.json").write_text("{}")
    check_target(out, force=True, folder=True)


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it\.onnx does not exist; make it first: mkdir -p .*none"):
        check_target(tmp_path / "none" / "it.onnx", force=False)
    with pytest.raises(ValueError, match="is a folder; give --out the name of a file"):
        check_target(tmp_path, force=True)
    with pytest.raises(ValueError, match=r"^/proc/it\.onnx cannot be written: .*; choose an --out in a folder where"):
        check_target(Path("/proc/it.onnx"), force=False)


def test_without_the_extra_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnxscript.*; install it with: pip install onnx onnxscript onnxruntime"):
        require_onnx()


def test_validation_images_are_here_when_all_their_shards_are(storage: Path) -> None:
    manifest = made_up_manifest()
    assert not has_validation_images(manifest)
    path = storage / manifest.splits["val"].shards[0].path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert has_validation_images(manifest)
