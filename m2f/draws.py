"""Random numbers that belong to a sample: functions of (seed, stream, index) alone.

A counter-based hash in 32-bit integer tensor operations, which wrap around alike on every device, so
a draw does not depend on the worker, the batch or the order in which it is made. The finaliser is
Wellons's "lowbias32" (github.com/skeeto/hash-prospector), applied once per key word.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def mix(*words: int) -> int:
    """Hash integers to one non-negative 63-bit seed (splitmix64's finaliser, chained)."""
    state = 0
    for word in words:
        state = (state ^ (word & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state >> 1


def _signed32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 16)) * 0x7FEB352D
    x = (x ^ _shift(x, 15)) * _signed32(0x846CA68B)
    return x ^ _shift(x, 16)


def uniform(seeds: Sequence[int], stream: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform draws in [0, 1), (B, count) float32 with 24 random bits.

    `seeds`: one int per picture. `stream` tells apart the uses of one seed (layer, mask, purpose):
    same seed and stream, same numbers; a longer draw begins with the shorter one.
    """
    keys = [mix(seed, stream) for seed in seeds]
    low = torch.tensor([_signed32(key) for key in keys], dtype=torch.int32, device=device)
    high = torch.tensor([_signed32(key >> 32) for key in keys], dtype=torch.int32, device=device)
    counter = torch.arange(count, dtype=torch.int32, device=device)
    bits = _finalise(_finalise(counter[None] ^ low[:, None]) + high[:, None])
    return _shift(bits, 8).to(torch.float32) * 2.0**-24
