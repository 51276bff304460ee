"""Kernels in Triton without a GPU: run by Triton's interpreter, or compiled for a GPU that is not here."""

from __future__ import annotations

import importlib
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.waiting import LIMIT_S

A100, H100 = 80, 90
"""Compute capabilities."""

INTERPRETS = (3, 9)
"""The oldest Triton whose interpreter has run all kernels here with NumPy 2.4; 3.6 takes its arrays for numbers."""


class Interpreter:
    """A process in which Triton's interpreter runs kernels on CPU tensors: about 0.1 s a program."""

    def __init__(self, module: str, **constants: int) -> None:
        """`constants`: of the module, to be changed."""
        self._module, self._constants = module, constants
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")  # read where Triton and a kernel are imported
            patch.setenv("OMP_NUM_THREADS", "1")
            self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            self._process.submit(int).result(LIMIT_S)

    def call(self, function: str, *arguments: Any) -> Any:
        """What a function of the module gives. Skips a test that an old interpreter cannot run."""
        import triton

        try:
            return self._process.submit(_called, self._module, self._constants, function, arguments).result(LIMIT_S)
        except triton.runtime.errors.InterpreterError as error:
            version = tuple(int(part) for part in triton.__version__.split(".")[:2])
            if version < INTERPRETS and "only 0-dimensional arrays can be converted" in str(error):
                pytest.skip(f"Triton {triton.__version__} cannot interpret a loop up to a tensor with this NumPy")
            raise

    def end(self) -> None:
        self._process.shutdown()


def _called(module: str, constants: Mapping[str, int], function: str, arguments: Sequence[Any]) -> Any:
    loaded = importlib.import_module(module)
    for name, value in constants.items():
        setattr(loaded, name, value)
    return getattr(loaded, function)(*arguments)


def resources(
    kernel: Any, arguments: Mapping[str, str], constants: Mapping[str, int], *, capability: int, warps: int = 4
) -> dict[str, int]:
    """Registers and bytes of stack of a kernel that is compiled for a GPU. `arguments`: Triton's names of their types,
    those of pointers with *; the others are 32-bit integers. A stack means that registers do not suffice."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else arguments.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=dict(constants))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        command = [tools / "cuobjdump", "-res-usage", binary.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S)
    return {name: int(re.findall(rf"{name}:(\d+)", said.stdout)[-1]) for name in ("REG", "STACK")}
