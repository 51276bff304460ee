"""The package as it is installed: its wheel, and a project in a folder of its own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.images import encoded, image, put
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S

PACKAGES = ("m2f", "pipeline", "stages")
BUILD = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOR_PROJECTS = ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/plots/page.html")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel, built in a copy: building leaves folders behind."""
    copy = tmp_path_factory.mktemp("sources")
    for name in (*PACKAGES, ".dvc"):
        ignored = shutil.ignore_patterns("__pycache__", "tmp", "cache", "config.local")
        shutil.copytree(PROJECT / name, copy / name, ignore=ignored)
    for name in (*BUILD, *FOR_PROJECTS):
        shutil.copy(PROJECT / name, copy / name)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir"]
    subprocess.run([sys.executable, *build, copy / "made", copy], check=True, timeout=LIMIT_S)
    (made,) = (copy / "made").glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    for package in PACKAGES:
        for path in (PROJECT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(PROJECT).as_posix()
                assert held.get(name) == path.read_bytes(), f"{name} is not in the wheel"
    for name in FOR_PROJECTS:
        assert held.get(f"pipeline/project/repository/{name}") == (PROJECT / name).read_bytes()
    tops = {name.partition("/")[0] for name in held}
    assert {top for top in tops if not top.endswith(".dist-info")} == {*PACKAGES}  # no tests, no benchmarks


class Installed:
    """An environment in which the wheel is installed, over the libraries of this one, and a folder to work in."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.environment, self.project = folder / "environment", folder / "project"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.environment], check=True, timeout=LIMIT_S)
        self.programs = self.environment / "bin"
        (site,) = (self.environment / "lib").glob("python*/site-packages")
        (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])  # not the packages that it links to
        self.package = site
        install = ["-m", "pip", "--python", self.programs / "python", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([sys.executable, *install, wheel], check=True, timeout=LIMIT_S)
        self.project.mkdir()

    def run(self, *command: str) -> str:
        """What a command prints in the project's folder, with the environment activated."""
        settings = {"M2F_WORKERS": "0", "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}
        settings |= {"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": str(self.environment)}
        done = subprocess.run(command, cwd=self.project, env=settings, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def m2f(self, *words: str) -> str:
        return self.run(str(self.programs / "m2f"), *words)

    def dvc(self, *words: str) -> str:
        return self.run(str(self.programs / "python"), "-m", "dvc", *words)

    def params(self) -> dict[str, Any]:
        tree: dict[str, Any] = yaml.safe_load((self.project / "params.yaml").read_text())
        return tree


@pytest.mark.long
def test_a_project_without_the_code_trains_reports_predicts_and_notices_an_update(tmp_path: Path, wheel: Path) -> None:
    installed = Installed(tmp_path, wheel)
    assert "m2f check shapes_tiny" in installed.m2f("init")
    found = installed.run("python", "-c", "import stages, m2f, pipeline as p; print(stages.__file__, m2f.__file__)")
    assert all(Path(path).is_relative_to(installed.package) for path in found.split())

    params = installed.params()
    params["datasets"]["shapes"]["generate"] |= {"train": 8, "val": 2}
    row = params["rows"]["shapes_tiny"]
    row["train"] |= {"steps": 2, "val_interval": 2, "checkpoint_interval": 2, "log_every": 1}
    row["seeds"] = [0]
    (installed.project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    assert "shapes_tiny has all it needs" in installed.m2f("check", "shapes_tiny")
    ran = re.findall(r"Running stage '([^']+)'", installed.dvc("repro", "evaluate@shapes_tiny"))
    assert {*ran} >= {"package", "shard@shapes", "train@shapes_tiny", "evaluate@shapes_tiny"}
    assert "shapes_tiny  no verdict" in installed.m2f("report")
    assert (installed.project / "reports/index.html").is_file()

    put(installed.project / "images/a.png", encoded(image(48, 64)))
    shown = installed.m2f("predict", "shapes_tiny", "images", "--out", "predictions")
    assert shown.startswith("predictions/index.html shows the predictions of seed 0 of shapes_tiny")
    assert (installed.project / "predictions/labels/a.png").is_file()

    assert {path.name for path in installed.project.iterdir()} <= {
        "params.yaml", "dvc.yaml", "dvc.lock", ".gitignore", ".dvcignore", ".dvc", "images", "predictions",
        "results", "reports", "storage", "mlflow.db", "mlruns", "mlartifacts",
    }  # fmt: skip
    (seed,) = json.loads((installed.project / "results/train/shapes_tiny.json").read_text())["seeds"]
    package = json.loads((installed.project / "results/package.json").read_text())
    assert seed["environment"]["libraries"][package["name"]] == package["version"]

    # an update of the package makes stages run again
    assert stale(installed) == set()
    with open(installed.package / "stages/report.py", "a") as file:
        file.write("# changed\n")
    installed.m2f("package")
    assert stale(installed) >= {"shard@shapes", "train@shapes_tiny", "evaluate@shapes_tiny"}


def stale(installed: Installed) -> set[str]:
    """The stages of the row that DVC would run, besides those that it always runs."""
    status = json.loads(installed.dvc("status", "--json", "evaluate@shapes_tiny", "--with-deps"))
    return {stage for stage in status if stage.partition("@")[0] not in ("package", "ready", "fetch", "weights")}
