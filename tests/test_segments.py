"""Rows to segments and pieces, against a model that goes byte by byte. No CUDA."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from async_tier.arena import Rows
from async_tier.streams.segments import segments


def numbers(*rows: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


def spans(plan) -> list[tuple[int, ...]]:
    """(address of each side, offset, size) of each segment."""
    return list(zip(*(side.tolist() for side in (*plan.addresses, plan.offsets, plan.sizes)), strict=True))


def test_neighbours_on_every_side_become_one_copy():
    some, other = Rows(1000, 50, 10, 10), Rows(9000, 50, 10, 10)
    plan = segments([(some, numbers(3, 4, 5, 9)), (other, numbers(0, 1, 7, 8))], 1000, [None, None])
    assert spans(plan) == [(1030, 9000, 0, 20), (1050, 9070, 20, 10), (1090, 9080, 30, 10)]
    assert plan.pieces == [0, 3]


def test_one_side_alone_merges_by_itself():
    plan = segments([(Rows(1000, 50, 10, 10), numbers(3, 4, 5, 9))], 1000, [None])
    assert spans(plan) == [(1030, 0, 30), (1090, 30, 10)]


def test_rows_with_a_gap_between_them_are_no_neighbours():
    plan = segments([(Rows(1000, 50, 10, 12), numbers(3, 4))], 1000, [None])
    assert spans(plan) == [(1036, 0, 10), (1048, 10, 10)]


def test_no_copy_goes_from_one_registration_into_the_next():
    plan = segments([(Rows(1000, 50, 10, 10), numbers(3, 4, 5, 6))], 1000, [np.array([1000, 1050])])
    assert spans(plan) == [(1030, 0, 20), (1050, 20, 20)]


def test_a_row_may_be_in_several_registrations():
    cuts = np.array([1000, 1034, 1040, 1046, 1047, 1090])
    plan = segments([(Rows(1000, 50, 10, 10), numbers(8, 3, 4, 9))], 1000, [cuts])
    assert spans(plan) == [
        *((1080, 0, 10), (1030, 10, 4), (1034, 14, 6), (1040, 20, 6), (1046, 26, 1), (1047, 27, 3), (1090, 30, 10)),
    ]


def test_pieces_cut_rows_that_are_larger():
    plan = segments([(Rows(1000, 50, 10, 10), numbers(8, 2))], 8, [None])
    assert spans(plan) == [(1080, 0, 8), (1088, 0, 2), (1020, 2, 6), (1026, 0, 4)]
    assert plan.pieces == [0, 1, 3, 4]


@pytest.mark.parametrize("seed", range(300))
def test_every_byte_goes_where_it_belongs(seed):
    draw = random.Random(seed)
    row_bytes, count = draw.randint(1, 40), draw.randint(1, 30)
    one = Rows(1000, 50, row_bytes, row_bytes + draw.choice([0, 0, 3]))
    two = Rows(100_000, 60, row_bytes, row_bytes)
    of = np.array(draw.choices(range(50), k=count)) if draw.random() < 0.5 else np.arange(count)
    to = np.array(draw.sample(range(60), count)) if draw.random() < 0.5 else np.arange(count) + 5
    cuts = np.array(sorted({two.address + draw.randrange(60 * row_bytes) for _ in range(draw.choice([1, 3, 100]))}))
    piece_bytes = draw.randint(1, 100)
    plan = segments([(one, of), (two, to)], piece_bytes, [None, cuts])
    moved = {}
    for piece, (first, last) in enumerate(itertools.pairwise(plan.pieces)):
        assert first < last
        for source, target, offset, size in spans(plan)[first:last]:
            assert 0 < size <= piece_bytes - offset
            assert np.searchsorted(cuts, target, "right") == np.searchsorted(cuts, target + size - 1, "right")
            for at in range(size):
                moved[piece * piece_bytes + offset + at] = (source + at, target + at)
    assert moved == {
        at * row_bytes + byte: (one.address + of[at] * one.stride + byte, two.address + to[at] * row_bytes + byte)
        for at in range(count)
        for byte in range(row_bytes)
    }
