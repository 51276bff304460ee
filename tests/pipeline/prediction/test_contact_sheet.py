"""The contact sheet finds its pictures, whatever they are called, and stays of a size that opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest

from pipeline.prediction import contact_sheet
from pipeline.prediction.folder import Entry, open_folder
from pipeline.prediction.network import TrainedNetwork
from tests.helpers.registered import CLASSES

Make = Callable[..., TrainedNetwork]


def entry(name: str, **classes: int) -> Entry:
    return Entry(name=name, file=f"{name}.png", digest="", height=2, width=3, classes=classes, annotations=())


def page(network: TrainedNetwork, out: Path, entries: list[Entry], videos: dict[str, list[Entry]] | None = None) -> str:
    folder = open_folder(out, {}, class_names=CLASSES, task="semantic", palette=False)
    contact_sheet.write_contact_sheet(folder, network, entries, source="<in>", failures={}, videos=videos or {})
    return (out / "index.html").read_text()


def test_names_with_signs_that_addresses_reserve_are_quoted(network_of: Make, tmp_path: Path) -> None:
    name = 'a#b?c%20"<d>'
    text = page(network_of("semantic"), tmp_path / "out", [entry(name, sky=1)])
    source = text.partition('src="')[2].partition('"')[0]
    assert unquote(source) == f"overlays/{name}.jpg" and not set('#?"<') & set(source)
    assert "<d>" not in text and "&lt;in&gt;" in text


def test_a_class_is_counted_in_pictures(network_of: Make, tmp_path: Path) -> None:
    text = page(network_of("semantic"), tmp_path / "out", [entry("a", sky=1, car=3), entry("b", car=1)])
    assert "></i>sky <small>1</small></button>" in text and "></i>car <small>2</small></button>" in text
    assert "road" not in text  # nothing shows it
    assert "car × 3" in text


def test_many_pictures_are_cut_off_with_a_sentence(
    network_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact_sheet, "MOST", 2)
    text = page(network_of("semantic"), tmp_path / "out", [entry(name) for name in "abcd"])
    assert text.count("<figure") == 2 and "2 more are in summary.csv" in text


def test_of_a_video_the_video_and_some_frames_are_shown(network_of: Make, tmp_path: Path) -> None:
    frames = [entry(f"v/{number:06d}") for number in range(1, 101)]
    text = page(network_of("semantic"), tmp_path / "out", [entry("a"), *frames], {"v": frames})
    assert text.count("<figure") == 1 + 1 + contact_sheet.FRAMES
    assert "overlays/v/000001.jpg" in text and "overlays/v/000100.jpg" in text
