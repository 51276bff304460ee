"""What is compared before an exported file gets its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m2f.kernels.build import use
from pipeline.export import export as module
from pipeline.export.check import BATCHES, SIZES, compare_figure, parity
from pipeline.export.export import export
from pipeline.export.graph import TRACED, ExportedNetwork
from pipeline.params.schema import Row
from tests.helpers.registered import CLASSES, decided_network, manifest_of, row_of
from tests.helpers.trained import trained


@pytest.fixture(autouse=True)
def kernels_as_before() -> None:
    yield
    use("auto")


def network_of(row: Row) -> torch.nn.Module:
    """This project's network in the place of an exported one."""
    return ExportedNetwork(decided_network(row)).eval()


def changed(row: Row, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]):  # type: ignore[no-untyped-def]
    """An exported network whose logits are changed."""
    network = network_of(row)
    return lambda images, sizes: change(*network(images, sizes))


def test_nothing_that_is_compared_is_what_was_traced() -> None:
    assert TRACED[0] not in BATCHES and TRACED[1:] not in SIZES
    assert len(SIZES) == 3 and set(BATCHES) == {1, 3}
    assert all(side % 32 == 0 for size in SIZES for side in size)


def test_equal_logits_have_no_difference(small_row: Row) -> None:
    row = row_of("semantic", small_row)
    with torch.no_grad():
        near = parity(decided_network(row), network_of(row), "uint8")
    assert near.largest == {"class_logits": 0.0, "mask_logits": 0.0}
    assert (near.apart, near.queries) == (0, 3 * (1 + 3) * 12)  # sizes, batches of 1 and 3, queries


@pytest.mark.parametrize(
    "change",
    [
        lambda classes, masks: (classes + 0.1, masks),
        lambda classes, masks: (classes, masks.flip(3)),
        lambda classes, masks: (classes * torch.nan, masks),
        lambda classes, masks: (classes, masks[:, :, 1:]),
    ],
    ids=["other classes", "mirrored masks", "nan", "another size"],
)
def test_other_logits_are_refused(small_row: Row, change: Callable[..., tuple[Tensor, Tensor]]) -> None:
    row = row_of("semantic", small_row)
    with pytest.raises(ValueError, match="no file is left"), torch.no_grad():
        parity(decided_network(row), changed(row, change), "float32")


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_images_padded_before_normalisation_have_the_figure_of_this_projects_own(
    storage: Path, small_row: Row, task: str
) -> None:
    # heights and widths that are no multiples of 32, and one that the row itself does not pad
    row, manifest = row_of(task, small_row, pad_multiple=1 if task == "semantic" else 32), manifest_of(storage)
    compared = compare_figure(decided_network(row), network_of(row), "uint8", row, manifest, images=99)
    assert compared.images == 5
    assert compared.before == compared.after
    assert compared.before > 0 or task == "panoptic"  # random masks match no segment


def test_another_figure_is_refused(storage: Path, small_row: Row) -> None:
    row = row_of("semantic", small_row)
    wrong = changed(row, lambda classes, masks: (classes.roll(1, 2), masks))
    with pytest.raises(ValueError, match=r"mIoU on 5 validation images: \d+\.\d\d before, \d+\.\d\d after; no file"):
        compare_figure(decided_network(row), wrong, "uint8", row, manifest_of(storage), images=99)


def test_a_check_that_fails_leaves_no_file(small_row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of("semantic", small_row)
    monkeypatch.setattr(module, "traced", lambda network, pixels: None)
    monkeypatch.setattr(module, "write_pt2", lambda graph, path, about: path.write_bytes(b"whole"))
    monkeypatch.setattr(module, "open_pt2", lambda path: changed(row, lambda classes, masks: (classes + 1, masks)))
    source = trained(decided_network(row), row, CLASSES)
    with pytest.raises(ValueError, match="does not give this project's numbers"), torch.no_grad():
        export(source, tmp_path / "it.pt2", form="torch.export")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "open_pt2", lambda path: network_of(row))
    with torch.no_grad():
        made = export(source, tmp_path / "it.pt2", form="torch.export")
    assert (tmp_path / "it.pt2").read_bytes() == b"whole" and made.compared is None
