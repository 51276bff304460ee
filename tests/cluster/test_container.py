"""The container image: what goes in, and its steps in a fresh Debian."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.container import Image, context, instructions
from tests.helpers.shared import PROJECT

DOCKERFILE = (PROJECT / "Dockerfile").read_text()


def test_the_image_has_the_code_and_nothing_that_is_not_named(tmp_path: Path) -> None:
    taken = set(context())
    assert {"Makefile", "dvc.yaml", "params.yaml", "requirements.lock", "m2f/kernels/cpu.c", ".dvc/config"} <= taken
    assert "pipeline/report/html/style.css" in taken and ".dvc/plots/page.html" in taken
    tops = {path.partition("/")[0] for path in taken}
    assert not tops & {"tests", "storage", "results", "reports", "data", "docs", ".git", ".venv"}
    assert not [path for path in taken if "__pycache__" in path or path.endswith((".pyc", ".db", ".pem"))]
    # a key or a database that somebody has left in the project stays out
    for name in (".dockerignore", ".netrc", "id_ed25519", "mlflow.db"):
        (tmp_path / name).write_text((PROJECT / ".dockerignore").read_text() if name == ".dockerignore" else "secret")
    assert list(context(tmp_path)) == []


def test_the_image_runs_as_a_user_and_holds_no_secret() -> None:
    steps = instructions(DOCKERFILE)
    assert [rest for word, rest in steps if word == "USER"] == ["m2f"]
    words = [word for word, _ in steps]
    assert words.index("USER") < words.index("COPY")
    for word, rest in steps:
        if word in ("ENV", "ARG"):
            assert not any(part in rest for part in ("TOKEN", "SECRET", "PASSWORD", "CERT", "INDEX")), rest
    assert ("ARG", "COMMIT=") in steps


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    if os.geteuid() != 0 or shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("needs root and debootstrap")
    folder = Path(tempfile.mkdtemp(prefix="m2f-image-"))
    image = Image(folder / "root")
    try:
        image.build(DOCKERFILE)
        yield image
    finally:
        shutil.rmtree(folder)


@pytest.mark.cluster
@pytest.mark.full
@pytest.mark.timeout(2700)
def test_the_image_is_made_in_a_fresh_debian_and_holds_the_pinned_packages(image: Image) -> None:
    assert image.run(["id", "-un"]).stdout == "m2f\n"
    frozen = image.run(["python", "-m", "pip", "freeze", "--exclude-editable"]).stdout.lower().replace("_", "-")
    pinned = (PROJECT / "requirements.lock").read_text().lower().replace("_", "-")
    wanted = [line for line in pinned.splitlines() if line and not line.startswith("#")]
    assert sorted(frozen.splitlines()) == sorted(wanted)
    assert "train" in image.run(image.command).stdout
    assert list((image.root / "var/lib/apt/lists").iterdir()) == []
    caches = [path for path in (image.root / "m2f", image.root / "home") if list(path.rglob(".cache/pip"))]
    assert caches == []
    assert not (image.root / "m2f/tests").exists() and not (image.root / "m2f/.git").exists()


@pytest.mark.cluster
@pytest.mark.full
@pytest.mark.timeout(2700)
def test_the_demo_passes_in_the_image(image: Image) -> None:
    answer = image.run(["make", "demo"])
    assert answer.returncode == 0, answer.stdout[-5000:]
    assert "shapes_tiny" in answer.stdout and (image.root / "m2f/reports/index.html").is_file()
    assert (image.root / "m2f/results/register/shapes_tiny.json").is_file()
