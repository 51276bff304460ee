from __future__ import annotations

import tomllib
from pathlib import Path

from pipeline.provenance.package import DISTRIBUTION, package_digest, package_version
from tests.helpers.shared import PROJECT


def test_the_digest_follows_names_and_contents_of_all_files_but_compiled_ones(tmp_path: Path) -> None:
    for file, text in (("m2f/a.py", "1"), ("pipeline/b/c.html", "2"), ("stages/d.py", "3"), ("other/e.py", "4")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    first = package_digest(tmp_path)
    (tmp_path / "other/e.py").write_text("5")
    (tmp_path / "m2f/__pycache__").mkdir()
    (tmp_path / "m2f/__pycache__/a.pyc").write_text("6")
    assert package_digest(tmp_path) == first
    (tmp_path / "pipeline/b/c.html").write_text("7")
    changed = package_digest(tmp_path)
    (tmp_path / "pipeline/b/c.html").write_text("2")
    assert changed != first == package_digest(tmp_path)
    (tmp_path / "stages/d.py").rename(tmp_path / "stages/e.py")
    assert package_digest(tmp_path) not in (first, changed)


def test_the_version_is_that_of_the_installed_package() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert (DISTRIBUTION, package_version()) == (project["name"], project["version"])
