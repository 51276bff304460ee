"""A plugin with which tests on a CPU take the kernels of a GPU, run by Triton's interpreter:
pytest -p tests.helpers.interpreted_kernels tests/m2f"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read where Triton and a kernel are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as tests/conftest.py, which is read later

import pytest

from m2f.kernels import build, gpu, triton_attention, triton_labels, triton_masked_attention

_LARGER = {
    triton_attention: {"_ROWS": 2048, "_GATHERED_ROWS": 4096},
    triton_masked_attention: {"_QUERIES": 128, "_PIXELS": 4096},
    triton_labels: {"_PIXELS": 128, "_QUERIES_AT_ONCE": 128},
}
"""Parts of a kernel's work: the interpreter's time is by program, whatever a program does."""

_KERNELS = ("deformable_attention", "mask_words", "masked_attention", "labels")
_calls = dict.fromkeys(_KERNELS, 0)


def pytest_configure() -> None:
    """Before the first test is read."""
    for module, constants in _LARGER.items():
        for name, value in constants.items():
            assert hasattr(module, name)
            setattr(module, name, value)
    gpu._DEVICES = ("cpu", "meta")
    build.use("plain")
    for name in _KERNELS:
        setattr(gpu, name, _counted(name))


def _counted(name: str) -> Callable[..., Any]:
    kernel = getattr(gpu, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        _calls[name] += 1
        return kernel(*arguments, **options)

    return counted


@pytest.fixture(autouse=True)
def _kernels_are_in_use() -> Iterator[None]:
    with gpu.as_if(True):
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How often each kernel was called: a run without any of one says nothing of it."""
    said = ", ".join(f"{name} {count}" for name, count in _calls.items())
    terminalreporter.write_line(f"calls of kernels: {said}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A kernel that no test called is an error."""
    if exitstatus == 0 and not all(_calls.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
