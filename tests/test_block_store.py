"""BlockStore as programs without vLLM use it."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest

from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.streams.rows import Rows
from tests import helpers
from tests.helpers import key, keys
from tests.rows import primary_rows

ROW_BYTES = 256


@pytest.fixture
def store() -> BlockStore:
    """A store of four blocks, which holds blocks 0 to 3."""
    primary = primary_rows(16, ROW_BYTES)
    made = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse({"bytes_to_use": 4 * ROW_BYTES}))
    helpers.remember(made, primary)
    assert moved(made, 0, 1, 2, 3) == 4
    return made


def moved(store: BlockStore, *numbers: int, sequence: str | None = None) -> int:
    """How many of these blocks could be stored."""
    store.submit_store(1, keys(*numbers), range(len(numbers)), sequence)
    store.drain()
    (end,) = store.poll()
    assert end.success
    return end.bytes // ROW_BYTES


def is_here(store: BlockStore, *numbers: int) -> list[bool]:
    return [store.has(key(number)) for number in numbers]


def test_a_lookup_pins_nothing(store: BlockStore):
    assert all(store.lookup(key(number)) for number in range(4))
    assert moved(store, 10, 11, 12, 13) == 4
    assert not store.lookup(key(0))
    assert (store.statistics().hits, store.statistics().misses) == (4, 1)


def test_a_hit_is_pinned_for_those_who_ask_until_the_step_ends(store: BlockStore):
    assert all(store.lookup(key(number), pin=True) for number in range(3))
    assert store.lookup(key(0)), "a lookup does not take another's pin"
    assert moved(store, 10, 11, 12, 13) == 1
    store.end_step()
    assert moved(store, 14, 15, 16, 17) == 4


@pytest.mark.parametrize("pin", [False, True])
def test_a_lookup_is_a_use(store: BlockStore, pin: bool):
    store.clear()
    for number in range(4):
        assert moved(store, number) == 1
    assert store.lookup(key(0), pin=pin)
    store.end_step()
    assert moved(store, 5) == 1
    assert is_here(store, 0, 1) == [True, False]


@pytest.mark.parametrize("pin", [False, True])
def test_what_a_sequence_stores_continues_what_it_has_looked_up(store: BlockStore, pin: bool):
    store.clear()
    for number in (0, 1, 2):
        assert moved(store, number) == 1
    assert store.lookup(key(0), "request", pin)
    assert moved(store, 3, sequence="request") == 1
    store.end_step()
    for number in (1, 2):
        assert store.lookup(key(number))
    assert moved(store, 4) == 1
    assert is_here(store, 0, 1, 2, 3, 4) == [True, True, True, False, True], "block 3 continues block 0"


def test_lookups_of_those_who_end_no_step_leave_nothing_behind(store: BlockStore):
    for number in range(1000):
        store.lookup(key(number % 4), f"request {number}")
    store.index.use = store.index.unpin = MagicMock()
    store.end_step()
    store.index.use.assert_not_called()


def test_a_sequence_that_is_finished_makes_room_at_its_own_cost(store: BlockStore):
    store.clear()
    assert moved(store, 0, 1, 2, 3, sequence="request") == 4
    assert moved(store, 4, sequence="request") == 0
    store.finish_sequence("request")
    store.finish_sequence("request")
    assert moved(store, 4, sequence="request") == 1
    store.close()
    store.finish_sequence("request")
