"""A random workload on vLLM's real manager, with an oracle of the bytes of every hit.

Requests share prefixes, hits are promoted and read as a worker would, blocks are evicted in both tiers all the time,
and now and then the weights change: then a block's right bytes change with them, and a stale one is a wrong answer.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from tests.helpers import World, end_step, key, request

pytestmark = pytest.mark.contract

ROW_BYTES = 192


def content(name: bytes, weights: int) -> np.ndarray:
    """The bytes that a block has under these weights."""
    digest = hashlib.sha256(name + weights.to_bytes(4, "big")).digest()
    return np.frombuffer(digest * (ROW_BYTES // len(digest)), dtype=np.uint8)


class Workload:
    """Conversations that grow turn by turn, of which some begin alike."""

    def __init__(self, seed: int, **sizes: int) -> None:
        self.draw = random.Random(seed)
        self.world = World(row_bytes=ROW_BYTES, **sizes)
        self.weights = 0
        self.turns = 0
        self.hits = 0
        # Each a list of block numbers; they branch off each other.
        self.conversations = [[number * 1000] for number in range(6)]

    def grow(self) -> list[bytes]:
        """The next turn of some conversation: its blocks in prefix order."""
        blocks = self.draw.choice(self.conversations)
        if self.draw.random() < 0.2:
            blocks = blocks[: self.draw.randint(1, len(blocks))]
            self.conversations[self.draw.randrange(len(self.conversations))] = blocks = list(blocks)
        for _ in range(self.draw.randint(0, 3)):
            blocks.append(self.draw.randrange(10**9))
        if len(blocks) > 12:
            del blocks[1:]
        return [key(number) for number in blocks]

    def turn(self) -> None:
        """One request: load the longest prefix there is, check its bytes, offload the rest in chunks."""
        names = self.grow()
        context = request(f"request {self.turns}", names)
        self.turns += 1
        self.world.start(context, names)
        found = 0
        for name in names:
            fetched = self.world.fetch(context, name)
            if fetched is None:
                break
            assert np.array_equal(fetched, content(name, self.weights)), "a hit with wrong bytes"
            found += 1
        self.hits += found
        rest = names[found:]
        while rest:
            chunk = self.draw.randint(1, 4)
            self.world.offload(context, rest[:chunk], lambda name: content(name, self.weights))
            rest = rest[chunk:]
            if self.draw.random() < 0.5:
                self.world.step()
        self.world.manager.on_request_finished(context)
        # Mostly the transfers end before the next request, so that what is covered does not hang on how fast the
        # machine copies; else they go on under it.
        if self.draw.random() < 0.7:
            self.settle()

    def settle(self) -> None:
        """Let the transfers end, and vLLM hear of it."""
        self.world.tier._store.drain()
        self.world.step()

    def reset(self) -> None:
        """New weights."""
        self.world.manager.reset_cache()
        self.weights += 1
        end_step(self.world.manager)
        if hasattr(self.world.manager, "on_reset_flushed"):
            self.world.manager.on_reset_flushed()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tier_blocks", [6, 24, 200])
def test_every_hit_has_the_right_bytes(seed, tier_blocks):
    workload = Workload(seed, primary_blocks=8, tier_blocks=tier_blocks, copy_threads=1 + seed % 3)
    for turn in range(120):
        workload.turn()
        if turn % 40 == 39:
            workload.reset()
    tier = workload.world.tier
    for _ in range(3):
        workload.settle()
    figures = tier.statistics()
    assert workload.hits > 0
    assert figures.blocks_loaded > 0 or tier_blocks == 6  # so few may all be evicted before they are asked for
    assert figures.evictions > 0 or tier_blocks == 200
    assert figures.faults == figures.failed_jobs == figures.jobs_in_flight == 0
    assert figures.rows_used == figures.blocks, "a row was lost"
    assert not tier.has_pending_work()
    workload.world.close()


def test_the_oracle_sees_a_stale_block():
    # The control: a tier that keeps its blocks over a change of weights must be caught.
    workload = Workload(0, primary_blocks=8, tier_blocks=200)
    workload.world.tier.config = workload.world.tier.config.__class__(keep_on_reset=True)

    def turns() -> None:
        for turn in range(120):
            workload.turn()
            if turn % 20 == 19:
                workload.reset()

    with pytest.raises(AssertionError, match="wrong bytes"):
        turns()
    workload.world.close()
