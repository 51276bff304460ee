"""Random numbers that belong to a sample: functions of (seed, stream, index) alone.

A counter-based hash in 32-bit integer tensor operations, which wrap around alike on every device, so
a draw does not depend on the worker, the batch or the order in which it is made. The finaliser is
Wellons's "lowbias32" (github.com/skeeto/hash-prospector), applied once per key word.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m2f.constants import to_device
from m2f.kernels import cpu

_MASK64 = (1 << 64) - 1
_CPU_BLOCK = 1 << 18
"""Draws made together on a CPU: 1 MiB each for the bits and the scratch space, so that they stay in its cache."""


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


def _finalise_(x: Tensor, scratch: Tensor) -> None:
    for bits, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        torch.bitwise_right_shift(x, bits, out=scratch)  # copies the sign in; the mask makes the shift logical
        x.bitwise_xor_(scratch.bitwise_and_((1 << 32 - bits) - 1))
        if factor != 1:
            x.mul_(_signed32(factor))


def words_of(keys: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """What `uniform_of` draws from, (2, R) int32: the low and the high word of every row's key (see `mix`)."""
    halves = [[_signed32(key) for key in keys], [_signed32(key >> 32) for key in keys]]
    return to_device(torch.tensor(halves, dtype=torch.int32), device)


def keys_of(seeds: Sequence[int], stream: int, device: torch.device | str = "cpu") -> Tensor:
    """The words of the keys that `uniform` makes of seeds and a stream, (2, B) int32."""
    return words_of([mix(seed, stream) for seed in seeds], device)


def uniform(seeds: Sequence[int], stream: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform draws in [0, 1), (B, count) float32 with 24 random bits.

    `seeds`: one int per row (a picture, or a mask of one: see `mix`). `stream` tells apart the uses of
    one seed: same seed and stream, same numbers; a longer draw begins with the shorter one.
    """
    return uniform_of(keys_of(seeds, stream, device), count)


def uniform_of(words_2R: Tensor, count: int) -> Tensor:
    """`uniform` for the words of keys, (R, count): one call for rows of several streams."""
    if cpu.takes(words_2R):
        return cpu.draw(words_2R, count)
    low, high = words_2R.unsqueeze(-1)
    device, total = words_2R.device, words_2R.shape[1]
    counter = torch.arange(count, dtype=torch.int32, device=device)
    result = torch.empty(total, count, device=device)
    rows = max(1, _CPU_BLOCK // max(1, count)) if device.type == "cpu" else max(1, total)
    for start in range(0, total, rows):
        bits = counter ^ low[start : start + rows]
        scratch = torch.empty_like(bits)
        _finalise_(bits, scratch)
        bits += high[start : start + rows]
        _finalise_(bits, scratch)
        bits.bitwise_right_shift_(8).bitwise_and_((1 << 24) - 1)
        torch.mul(bits, 2.0**-24, out=result[start : start + rows])
    return result
