"""Rows: memory as copies see it, equally spaced rows at an address. Describes both the primary tier and the arena."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """`count` rows of `row_bytes` bytes, `stride` bytes apart, from `address` on: row i is at address + i * stride."""

    address: int
    count: int
    row_bytes: int
    stride: int

    @classmethod
    def of_view(cls, view: memoryview) -> Rows:
        """The rows of a memoryview of shape (count, ...), such as vLLM's `primary_kv_view`.

        Keeps the address only and not the view, so the owner can release it. Raises ValueError for a view without
        rows, one that is read-only, and one with gaps inside a row or overlapping rows.
        """
        if view.ndim < 1 or view.strides is None or view.shape is None or view.nbytes == 0:
            raise ValueError(f"the primary view must hold at least one row, not shape {view.shape}")
        if view.readonly:
            raise ValueError("the primary view must be writable: loads are copied into it")
        count, stride = view.shape[0], view.strides[0]
        row_bytes = view.nbytes // count
        expected = view.itemsize
        for size, inner in zip(reversed(view.shape[1:]), reversed(view.strides[1:]), strict=True):
            if inner != expected:
                raise ValueError(f"rows of the primary view must be contiguous, not strides {view.strides}")
            expected *= size
        if stride < row_bytes:
            raise ValueError(f"rows of the primary view must not overlap: stride {stride}, row {row_bytes} bytes")
        array = np.asarray(view)
        return cls(address=array.ctypes.data, count=count, row_bytes=row_bytes, stride=stride)
