"""The stage browse, as a user calls it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.data.fetch import fetch, open_sources
from pipeline.data.shards.build import build
from pipeline.params.load import load_params
from pipeline.storage.results.folder import write_result
from stages import browse
from tests.helpers.shared import PROJECT


@pytest.fixture
def workspace(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml and six sharded pictures of the dataset shapes."""
    monkeypatch.chdir(tmp_path)
    generate = {"train": 4, "val": 2, "height": 64, "width": 96, "seed": 3}
    tree = yaml.safe_load((PROJECT / "params.yaml").read_text())
    tree["datasets"]["shapes"]["generate"] = generate
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    config = dataclasses.replace(load_params("params.yaml").dataset("shapes"), generate=generate)
    facts = fetch("shapes", config, base=tmp_path)
    manifest = build("shapes", config, open_sources(facts), facts=facts.sources, processes=0)
    write_result(manifest, "shapes")
    return tmp_path


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["browse", *words])
    browse.main()


@pytest.mark.slow
def test_the_page_shows_stored_and_augmented_pictures(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(monkeypatch, "shapes", "--count", "3")
    assert capsys.readouterr().out == "browse/shapes/index.html shows dataset shapes\n"
    page = (workspace / "browse/shapes/index.html").read_text()
    for title in ("The most crowded", "The smallest", "From the whole split", "As a training sees them"):
        assert f"<h2>{title}</h2>" in page
    images = sorted(path.name for path in (workspace / "browse/shapes/images").iterdir())
    assert images == [
        f"{section}-{number:03d}.jpg"
        for section in ("crowded", "smallest", "spread", "training")
        for number in range(3)
    ]


def test_what_is_wrong_is_said_in_a_sentence(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for sentence, words in (
        (r"no dataset is called 'shape'; did you mean 'shapes'\?", ["shape"]),
        (r"row camvid_tiny is of dataset camvid, not of shapes", ["shapes", "--row", "camvid_tiny"]),
        (r"results/shard/camvid\.json does not exist", ["camvid"]),
        (r"dataset shapes has no split test", ["shapes", "--split", "test"]),
        (r"results/train/shapes_tiny\.json does not exist; make it with", ["shapes", "--worst"]),
    ):
        with pytest.raises(ValueError, match=sentence):
            main(monkeypatch, *words)
    assert not (workspace / "browse").exists()
