"""Memory that tests and benchmarks copy from and to, as vLLM's primary tier is. No vLLM."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

# Of mmap; Python does not name it.
_MAP_FIXED = 0x10


def zero_rows(count: int, row_bytes: int) -> np.ndarray:
    """An array of shape (count, row_bytes), uint8, on pages of its own, as vLLM's primary tier is."""
    pages = mmap.mmap(-1, count * row_bytes)
    return np.frombuffer(pages, dtype=np.uint8).reshape(count, row_bytes)


def map_anew(rows: np.ndarray) -> None:
    """Put other memory, zeros, where that of `zero_rows` is."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    assert libc.mmap(rows.ctypes.data, rows.nbytes, access, kind, -1, 0) == rows.ctypes.data


def primary_rows(count: int, row_bytes: int = 64, seed: int = 1) -> np.ndarray:
    """A primary tier of random bytes, shape (count, row_bytes), uint8."""
    rows = zero_rows(count, row_bytes)
    rows[:] = np.random.default_rng(seed).integers(0, 256, (count, row_bytes), dtype=np.uint8)
    return rows
