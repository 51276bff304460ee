"""What a stage knows of the `dvc repro` that has started it, and what it keeps from its output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import stages
from pipeline.params.load import load_params
from pipeline.storage.results.folder import waiting, write_result
from pipeline.storage.results.rows import PublishedEvaluation, Ready
from stages import _targets, asked_rows, waits
from tests.helpers.shared import PROJECT


@pytest.mark.parametrize(
    ("command", "targets"),
    [
        ("dvc repro", []),
        ("/env/bin/python /env/bin/dvc repro -f", []),
        ("python -m dvc --wait-for-lock repro -k --no-run-cache", []),
        ("dvc --cd elsewhere repro", []),
        ("dvc repro -f train@a evaluate@b", ["train@a", "evaluate@b"]),
        ("dvc repro -s train@a", ["train@a"]),
        ("dvc repro --glob 'train@*'", ["'train@*'"]),
        ("dvc exp run", []),
        ("dvc exp run -S rows.a.seeds=[1] -n mine --queue", []),
        ("dvc exp run -S rows.a.seeds=[1] train@a", ["train@a"]),
        ("dvc repro dvc.yaml", []),
        ("dvc repro -R .", []),
        ("dvc repro -P", []),
        ("dvc --cprofile-dump out repro", []),
        ("python -u -m dvc repro", []),
        ("python3 -s /usr/bin/dvc repro -k", []),
        ("/env/bin/python3.12 -X dev -m dvc repro train@a", ["train@a"]),
        ("/Frameworks/Python.app/Contents/MacOS/Python /env/bin/dvc repro", []),
        ("python -m dvc exp exec-run --infofile .dvc/tmp/exps/run/1/1.run", None),  # of a queue: it does not say
        ("python -c dvc repro", None),
        ("python -m pytest dvc repro", None),
        ("dvc status train@a", None),
        ("python -m stages.train a", None),
        ("bash -c dvc repro", None),
        ("grep dvc repro", None),
        ("", None),
    ],
)
def test_the_targets_are_read_from_the_command_line(command: str, targets: list[str] | None) -> None:
    assert _targets(command.split()) == targets


@pytest.mark.parametrize(("named", "found"), [((), "[]"), (("look",), "['look']")])
def test_a_stage_finds_the_dvc_that_has_started_it(tmp_path: Path, named: tuple[str, ...], found: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); from stages import targets; print('found', targets())"
    (tmp_path / "look.py").write_text(code)
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  look:\n    cmd: {sys.executable} look.py\n")
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    answer = subprocess.run([*dvc, "repro", *named], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"found {found}\n" in answer.stdout


def test_opencvs_own_warnings_do_not_come_between_the_sentences() -> None:
    code = (
        "import io, sys\n"
        "from stages import run\n"
        "def main():\n"
        "    import cv2, numpy as np\n"
        "    from PIL import Image\n"
        "    Image.fromarray(np.ones((8, 8), np.float32)).save(file := io.BytesIO(), 'TIFF')\n"
        "    assert cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR) is None\n"
        "main() if sys.argv[1:] else run(main)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENCV_LOG_LEVEL"}
    said = [
        subprocess.run(
            [sys.executable, "-c", code, *alone], cwd=PROJECT, env=environment, capture_output=True, text=True
        )
        for alone in ((), ("alone",))
    ]
    assert [process.returncode for process in said] == [0, 0]
    assert said[0].stderr == "" and "TIFF" in said[1].stderr


def test_a_target_that_is_a_second_checkpoint_is_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "targets", lambda: ["published@ade20k_r50_authors", "train@ade20k_r50"])
    assert asked_rows(load_params(PROJECT / "params.yaml")) == {"ade20k_r50": {"published", "train"}}


def test_a_second_checkpoint_waits_to_be_asked_for_when_everything_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_result(Ready(row="first", run=True, needs=(), settings="s"), "first")
    monkeypatch.setattr(stages, "targets", list)
    assert not waits(PublishedEvaluation, "first", name="first")
    assert waits(PublishedEvaluation, "first", name="first_authors")
    assert waiting(PublishedEvaluation, "first_authors") == "being asked for by name"
    monkeypatch.setattr(stages, "targets", lambda: ["published@first_authors"])
    assert not waits(PublishedEvaluation, "first", name="first_authors")
