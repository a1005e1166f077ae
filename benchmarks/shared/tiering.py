"""vLLM's real tiering manager with our tier behind its primary, and no model: blocks are stamps in rows.

Apart from what asks it (replay), because importing vLLM takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, make_offload_key
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

from async_tier.manager import AsyncSecondaryTierManager
from benchmarks.shared import tiers

ROW_BYTES = 256
# Blocks that are stored as vLLM does after a chunk of prefill.
CHUNK_BLOCKS = 16


class Region:
    """What vLLM's primary tier asks of its SharedOffloadRegion, over an array."""

    def __init__(self, primary: np.ndarray) -> None:
        self._primary = primary

    def create_kv_memoryview(self) -> memoryview:
        return memoryview(self._primary)

    def cleanup(self) -> None:
        pass


@dataclass
class Hits:
    """Blocks asked for, and how many of them the primary and the tier had."""

    blocks: int = 0
    primary: int = 0
    tier: int = 0

    @property
    def ratio(self) -> float:
        return (self.primary + self.tier) / self.blocks


class Replay:
    """vLLM's manager and primary, and the tier behind them, if it has blocks; the forward pass is a stamp in each row.

    Blocks are numbered as they are first asked for: ids may be larger than what a row or a name has room for.
    """

    def __init__(self, primary_blocks: int, tier_blocks: int, policy: str = "lru", **options: Any) -> None:
        """options: of the tier."""
        self._primary_blocks, self._tier_blocks = primary_blocks, tier_blocks
        self._options = {"eviction_policy": policy, **options}
        self._numbers: dict[int, int] = {}
        self._requests = 0
        self.hits = Hits()
        self._open()

    def _open(self) -> None:
        self._rows = np.zeros((self._primary_blocks, ROW_BYTES // 8), dtype=np.uint64)
        primary = CPUPrimaryTierOffloadingManager(num_chunks=self._primary_blocks, mmap_region=Region(self._bytes))
        self._tier: AsyncSecondaryTierManager | None = None
        if self._tier_blocks:
            size = self._tier_blocks * ROW_BYTES
            self._tier = AsyncSecondaryTierManager(
                SimpleNamespace(), primary.get_kv_memoryview(), "async", bytes_to_use=size, **self._options
            )
        self._manager = TieringOffloadingManager(
            primary_tier=primary, secondary_tiers=[self._tier] if self._tier is not None else []
        )

    def restart(self) -> None:
        """End the engine, and begin a new one: what is not in a pool is lost."""
        self._manager.shutdown()
        self._open()

    @property
    def _bytes(self) -> np.ndarray:
        return self._rows.view(np.uint8)

    def request(self, ids: Sequence[int]) -> None:
        """One request: what is there of its prefix is loaded and checked, the rest computed and stored."""
        self._requests += 1
        blocks = [self._numbers.setdefault(each, len(self._numbers)) for each in ids]
        names = [make_offload_key(block.to_bytes(32, "big"), 0) for block in blocks]
        context = tiers.request(f"request {self._requests}", names)
        self._manager.on_new_request(context)
        found, in_primary = self._found(names, context)
        self.hits.blocks += len(names)
        self.hits.primary += in_primary
        self.hits.tier += found - in_primary
        if found:
            rows = self._manager.prepare_load(names[:found], context).block_ids
            if not np.array_equal(self._rows[rows, 0], self._stamps(blocks[:found])):
                raise RuntimeError("a hit with wrong bytes")
            self._manager.complete_load(names[:found], context)
        for at in range(found, len(names), CHUNK_BLOCKS):
            self._store(names[at : at + CHUNK_BLOCKS], blocks[at : at + CHUNK_BLOCKS], context)
        self._manager.on_request_finished(context)
        self._step()

    def close(self) -> None:
        self._manager.shutdown()

    @property
    def held(self) -> int:
        """Blocks in the tier."""
        return self._tier.get_num_blocks() if self._tier is not None else 0

    def _found(self, names: Sequence[bytes], context: object) -> tuple[int, int]:
        """(blocks of the prefix that are there, those of them that were in the primary); now all of them are."""
        in_primary = None
        while True:
            answers = []
            for name in names:
                answers.append(self._manager.lookup(name, context))
                if answers[-1] is LookupResult.MISS:
                    answers.pop()
                    break
            if in_primary is None:
                in_primary = sum(answer is LookupResult.HIT for answer in answers)
            if all(answer is LookupResult.HIT for answer in answers):
                return len(answers), min(in_primary, len(answers))
            self._step()

    def _store(self, names: list[bytes], blocks: Sequence[int], context: object) -> None:
        prepared = self._manager.prepare_store(names, context)
        if prepared is None or not prepared.keys_to_store:
            return
        stamp = dict(zip(names, self._stamps(blocks), strict=True))
        for name, row in zip(prepared.keys_to_store, prepared.store_spec.block_ids, strict=True):
            self._rows[row] = stamp[name]
        self._manager.complete_store(set(prepared.keys_to_store), context)
        self._step()

    def _step(self) -> None:
        tiers.end_step(self._manager)
        self._manager.get_stats()
        list(self._manager.take_events())
        if self._tier is not None:
            self._tier.block_store.drain()

    @staticmethod
    def _stamps(blocks: Sequence[int]) -> np.ndarray:
        # A multiplication by an odd number: different for different blocks, and none is what a row begins with.
        return (np.array(blocks, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def replay(requests: Sequence[Sequence[int]], primary_blocks: int, tier_blocks: int, policy: str = "lru") -> Hits:
    """The hits of a whole trace; without a tier if that has no blocks. policy: the tier's `eviction_policy`."""
    world = Replay(primary_blocks, tier_blocks, policy)
    try:
        for blocks in requests:
            world.request(blocks)
    finally:
        world.close()
    return world.hits
