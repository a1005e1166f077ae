"""From row numbers to the fewest copies: arrays in, arrays out, no Python object a row. No CUDA.

Here the bytes of a job have an *offset*: row i of the job's n rows has the offsets from i * row_bytes on. A *segment*
is a range of offsets that is one range of addresses on each side of a copy. A *piece* is a range of offsets that is
queued at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from async_tier.arena import Rows


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments in order of their offsets, piece by piece.

    addresses: one array a side, shape (segments,), uint64. offsets: of the segments in their piece, uint64. sizes: in
    bytes, uint64. pieces: index of the first segment of each piece, and the number of segments.
    """

    addresses: tuple[np.ndarray, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    pieces: list[int]


def segments(
    sides: Sequence[tuple[Rows, np.ndarray]],
    piece_bytes: int,
    range_starts: Sequence[np.ndarray | None],
) -> Segments:
    """The segments of a job, merged where rows are neighbours on every side, cut into pieces of `piece_bytes`.

    sides: (rows, row numbers of shape (n,), int64) of equal `row_bytes`, n at least 1. range_starts: by side the
    sorted addresses, int64, at which a segment must not go on, because another registration begins there; None for
    none. The driver refuses a copy that spans two ("invalid argument", sgl-project/sglang#36798).
    """
    row_bytes = sides[0][0].row_bytes
    count = len(sides[0][1])
    starts = [rows.address + numbers * rows.stride for rows, numbers in sides]
    begins = np.ones(count, dtype=bool)
    if count > 1:
        apart = np.zeros(count - 1, dtype=bool)
        for addresses in starts:
            apart |= addresses[1:] != addresses[:-1] + row_bytes
        begins[1:] = apart
    first = np.flatnonzero(begins)
    total = count * row_bytes
    runs = first * row_bytes
    piece_starts = np.arange(0, total, piece_bytes)
    offsets = runs if len(piece_starts) == 1 else _merged(runs, piece_starts)
    for addresses, cuts in zip(starts, range_starts, strict=True):
        if cuts is not None:
            inside = _offsets_of(cuts, addresses[first], runs, np.diff(runs, append=total))
            if len(inside):
                offsets = _merged(offsets, inside)
    sizes = np.diff(offsets, append=total)
    run = np.searchsorted(runs, offsets, side="right") - 1
    within = offsets - runs[run]
    return Segments(
        addresses=tuple((addresses[first[run]] + within).astype(np.uint64) for addresses in starts),
        offsets=(offsets % piece_bytes).astype(np.uint64),
        sizes=sizes.astype(np.uint64),
        pieces=[*np.searchsorted(offsets, piece_starts).tolist(), len(offsets)],
    )


def _offsets_of(cuts: np.ndarray, addresses: np.ndarray, runs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The offsets of those `cuts` that are inside of runs, which have these addresses, offsets and sizes."""
    low = np.searchsorted(cuts, addresses, side="right")
    counts = np.searchsorted(cuts, addresses + sizes, side="left") - low
    if not counts.any():
        return counts[:0]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return cuts[np.repeat(low, counts) + within] + np.repeat(runs - addresses, counts)


def _merged(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The numbers in either, sorted, each once. (numpy.union1d imports numpy.ma at its first call, for 80 ms.)"""
    merged = np.concatenate((some, others))
    merged.sort()
    new = np.ones(len(merged), dtype=bool)
    np.not_equal(merged[1:], merged[:-1], out=new[1:])
    return merged[new]
