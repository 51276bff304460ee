"""A GPU that computes on the CPU: finds tensors on the wrong device, and counts how often the host waits for it.

Its tensors say that they lie on cuda:0 and hold a CPU tensor, with which every operation is computed. An operation that
mixes them with tensors of the host fails, as it would on a GPU. `PretendGpu.waits` names the operations after which a
GPU's host has to wait: values that go to the host, and results whose size depends on values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten

_WAITS = (
    aten._local_scalar_dense.default,  # item(), int(), bool()
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.bincount.default,  # looks at the largest value
    aten.equal.default,
    aten.repeat_interleave.Tensor,
)
"""Operations for which the host waits, whatever they are given."""

_MASKS = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
"""Operations for which the host waits if they are given booleans as an index."""


class GpuTensor(Tensor):
    """A tensor of the pretended GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[no-any-return]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="cuda:0"
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"GpuTensor({self.inner})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # what Tensor.tolist does, but not for subclasses

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{operation} of a tensor of the pretended GPU outside of `with PretendGpu()`")


class PretendGpu(TorchDispatchMode):
    """Where cuda:0 is pretended. Not for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # so that PyTorch does not look for a driver
        if not torch.cuda.is_available():
            torch._C._ensureCUDADeviceGuardSet()
        self.waits: list[str] = []

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor of the host on the GPU."""
        return GpuTensor(tensor.clone())

    def waits_of(self, work: Callable[[], Any]) -> tuple[Any, list[str]]:
        """What work gives, and for what the host has waited."""
        before = len(self.waits)
        return work(), self.waits[before:]

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        here = [isinstance(tensor, GpuTensor) for tensor in tensors]
        if operation is aten._pin_memory.default:
            return args[0]
        if operation is aten.is_pinned.default:
            return False
        if operation in (aten._to_copy.default, aten.copy_.default):
            return self._copied(operation, args, kwargs)
        if any(here) and not all(h or tensor.dim() == 0 for h, tensor in zip(here, tensors, strict=True)):
            raise AssertionError(f"{operation} mixes tensors of the GPU and of the host")
        device = kwargs.get("device")
        on_gpu = any(here) if device is None else torch.device(device).type == "cuda"
        if any(here) and (operation in _WAITS or (operation in _MASKS and _has_mask(args[1]))):
            self.waits.append(str(operation))
        result = operation(*_inner(args), **self._on_cpu(kwargs))
        return self._outer(args, result) if on_gpu else result

    def _copied(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """A copy between host and GPU, or to another type."""
        if operation is aten.copy_.default:
            target, source = args[:2]
            to_gpu, from_gpu = isinstance(target, GpuTensor), isinstance(source, GpuTensor)
            waits = to_gpu != from_gpu and not kwargs.get("non_blocking", len(args) > 2 and args[2])
        else:
            from_gpu, device = isinstance(args[0], GpuTensor), kwargs.get("device")
            to_gpu = from_gpu if device is None else torch.device(device).type == "cuda"
            waits = to_gpu != from_gpu and (from_gpu or not kwargs.get("non_blocking"))
        if waits:
            self.waits.append(f"copy {'to the GPU' if to_gpu else 'to the host'}")
        result = operation(*_inner(args), **self._on_cpu(kwargs))
        if operation is aten.copy_.default:
            return args[0]
        return GpuTensor(result) if to_gpu else result

    @staticmethod
    def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
        on_cpu = {name: _inner(value) for name, value in kwargs.items()}
        if on_cpu.get("device") is not None:
            on_cpu["device"] = torch.device("cpu")
        return on_cpu

    @staticmethod
    def _outer(args: Any, result: Any) -> Any:
        """The result on the GPU; of an operation in place, the tensor itself."""
        known = {id(leaf.inner): leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, GpuTensor)}

        def outer(leaf: Any) -> Any:
            return known[id(leaf)] if id(leaf) in known else GpuTensor(leaf) if isinstance(leaf, Tensor) else leaf

        return tree_map(outer, result)


def _inner(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.inner if isinstance(leaf, GpuTensor) else leaf, values)


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
