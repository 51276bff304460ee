"""What commands load before they know what is asked of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages import GOES_ON, run
from tests.helpers.images import write_folder, zipped
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S

HEAVY = ("albumentations", "cv2", "dvc", "matplotlib", "mlflow", "numpy", "pandas", "pyarrow", "ray", "scipy", "torch")

CPU_S = 2.0
"""Most CPU time of a process that shows its help; it takes about 0.1 s."""

COMMANDS = sorted(
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__main__")
    for folder in ("stages", "benchmarks")
    for path in (PROJECT / folder).rglob("*.py")
    if "ArgumentParser(" in path.read_text()
)

SHOWS_HELP = """
import json, resource, runpy, sys
module, heavy = sys.argv[1], sys.argv[2:]
sys.argv = [module, "--help"]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as ended:
    code = ended.code
used = resource.getrusage(resource.RUSAGE_SELF)
loaded = [name for name in heavy if name in sys.modules]
print(json.dumps({"code": code, "loaded": loaded, "cpu_s": used.ru_utime + used.ru_stime}))
"""

WITHOUT = """
import runpy, sys
blocked, module = sys.argv[1], sys.argv[2]
sys.modules[blocked] = None  # importing it is an error
sys.argv = sys.argv[2:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def test_every_stage_is_among_the_commands() -> None:
    assert {"stages.fetch", "stages.train", "stages.report", "benchmarks.loader"} <= set(COMMANDS)
    assert len(COMMANDS) >= 19


@pytest.mark.parametrize("module", [*COMMANDS, "pipeline.submit"])
def test_a_command_shows_its_help_without_loading_what_takes_seconds(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOWS_HELP, module, *HEAVY],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    *shown, last = done.stdout.splitlines()
    found = json.loads(last)
    assert found["code"] in (0, None) and len(shown) > 3
    assert found["loaded"] == []
    assert found["cpu_s"] < CPU_S


def test_fetch_gets_an_archive_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "storage"))
    archive = zipped(write_folder(tmp_path / "mine"), tmp_path / "mine.zip")
    entry = {"layout": "folder", "sources": [str(archive)], "class_names": ["sky", "road", "car"], "ignore_label": 9}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"datasets": {"mine": entry}}))
    command = [sys.executable, "-c", WITHOUT, "torch", "stages.fetch", "mine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mine: mine.zip, ")
    assert [path.name for path in (tmp_path / "storage/archives").glob("*/*")] == ["mine.zip"]
    # a module that fetch does load is blocked by the same means
    blocked = subprocess.run([*command[:3], "argparse", *command[4:]], capture_output=True, text=True, timeout=LIMIT_S)
    assert "import of argparse halted" in blocked.stderr


def test_a_command_that_is_stopped_says_what_becomes_of_its_work(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    for words, said in (({}, GOES_ON), ({"stopped": "nothing was written"}, "nothing was written")):
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                run(main, **words)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert ended.value.code == 130 and capsys.readouterr().err == f"stopped; {said}\n"
