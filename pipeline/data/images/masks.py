"""Masks as run lengths, checked before compiled code reads them."""

from __future__ import annotations


def check_run_lengths(counts: bytes, size: tuple[int, int]) -> None:
    """ValueError unless compressed run lengths cover a mask of `size` (height, width) exactly.

    pycocotools leaves memory as it was where they cover less. The format (its maskApi.c, rleToString): numbers of 5
    bits a character from 48 on, low bits first, 32 says that more follow, 16 in the last is the sign; from the
    fourth number on it is the difference to the last but one.
    """
    import numpy as np

    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = codes & 32 == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        raise ValueError("its compressed run lengths are not as pycocotools writes them")
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(codes)) - np.repeat(starts, np.diff([*starts, len(codes)]))
    if place.max() > 6:  # 5 * 7 bits are more than 32
        raise ValueError("its compressed run lengths hold a number of more than 32 bits")
    lengths = np.add.reduceat((codes & 31) << 5 * place, starts)
    lengths -= np.where(codes[last] & 16, 1 << 5 * (place[last] + 1), 0)
    for first in (1, 2):
        lengths[first::2] = np.cumsum(lengths[first::2])
    if lengths.min() < 0 or lengths.sum() != size[0] * size[1]:
        raise ValueError(f"its run lengths do not cover {size[0]} x {size[1]} (height x width) pixels")
