"""What the calls of a tier cost with millions of blocks held, next to a bare dict, and what memory its index takes."""

from __future__ import annotations

import gc
import os
import random
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from async_tier.block_store import BlockStore
from async_tier.index import BlockIndex
from async_tier.streams.rows import Rows
from benchmarks.shared import tiers
from benchmarks.shared.common import Figure, Run, Spread

US, NS = 1e6, 1e9  # from seconds
# Of rows that are only there to be counted.
SMALL_ROW_BYTES = 64
SIZES, QUICK_SIZES = (10_000, 100_000, 1_000_000, 10_000_000), (10_000, 100_000)
GROWTH_REPETITIONS, GROWTH_JOBS, GROWTH_LOOKUPS = 7, 200, 16_384
MEMORY_BLOCKS = 1_000_000
# Of the index's memory: blocks of a request.
MEMORY_REQUESTS = (1, 2, 32)


class Times:
    """Measurements by what was called and of whom: "WHAT, WHOSE"."""

    def __init__(self, unit: float) -> None:
        self._unit = unit
        self._seconds: dict[str, list[float]] = {}

    def add(self, what: str, seconds: float) -> None:
        self._seconds.setdefault(what, []).append(seconds)

    def call(self, what: str, call: Callable[..., object], *arguments: object, operations: int = 1) -> None:
        self.add(what, tiers.timed(call, *arguments) / operations)

    def spreads(self) -> dict[str, Spread]:
        return {what: Spread.of([each * self._unit for each in found]) for what, found in self._seconds.items()}


class NullStream:
    """Takes every copy, and makes none."""

    _DONE = SimpleNamespace(
        is_done=True, failed=False, reason=None, seconds=0.0, spans=[], synchronize=lambda seconds: True
    )

    def copy_rows(self, *_: object) -> Any:
        return self._DONE


def store_without_memory(blocks: int) -> BlockStore:
    """So that millions of blocks need no memory but the index's: rows of addresses that nobody touches."""

    def rows(address: int, count: int) -> Rows:
        return Rows(address=address, count=count, row_bytes=SMALL_ROW_BYTES, stride=SMALL_ROW_BYTES)

    stream = NullStream()
    engine: Any = SimpleNamespace(
        name="null", broken=None, seconds_under_way=0.0, load_stream=stream, store_stream=stream, close=lambda: None
    )
    arena: Any = SimpleNamespace(rows=rows(1 << 40, blocks), ready=blocks, pool=None, close=lambda: None)
    return BlockStore(rows(1 << 41, tiers.JOB_BLOCKS), engine=engine, arena=arena)


class Growing:
    """A tier and a bare dict of as many blocks, that are asked the same of, with keys of their own.

    Blocks leave in groups of 32, in an order that has nothing to do with where they lie in memory.
    """

    def __init__(self, blocks: int) -> None:
        self._draw = random.Random(blocks)
        self.times = Times(NS)
        blocks -= blocks % tiers.JOB_BLOCKS
        self._rows = np.arange(tiers.JOB_BLOCKS, dtype=np.int32)
        self._store = store_without_memory(blocks)
        self._keys, self._dict_keys = tiers.block_keys(blocks), tiers.block_keys(blocks)
        sequences = tiers.groups(self._keys)
        self._stores(sequences)
        for keys in self._draw.sample(sequences, len(sequences)):
            self._store.touch(keys)  # from now on the least recently used goes first in this order
        # Not the literals that the fill leaves in one place: rows, as the index has them.
        self._dict = {key: row for row, key in enumerate(self._dict_keys)}
        groups = tiers.groups(self._dict_keys)
        self._oldest = deque(self._draw.sample(groups, len(groups)))

    def look_up(self) -> None:
        """Time lookups of random keys, before any turnover."""
        for whose, keys, lookups in (
            ("ours", self._keys, self._lookups),
            ("dict", self._dict_keys, self._dict_lookups),
        ):
            asked = self._draw.choices(keys, k=GROWTH_LOOKUPS)
            self.times.call(f"lookup, {whose}", lookups, asked, operations=GROWTH_LOOKUPS)

    def turn_over(self) -> None:
        """Time stores of 32 blocks for which 32 go."""
        for whose, stores in (("ours", self._stores), ("dict", self._dict_stores)):
            fresh = tiers.groups(tiers.block_keys(GROWTH_JOBS * tiers.JOB_BLOCKS))
            self.times.call(f"store, {whose}", stores, fresh, operations=GROWTH_JOBS)

    def _lookups(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._store.lookup(key, None, True)  # pinned, as the tier does
        self._store.end_step()

    def _dict_lookups(self, keys: Sequence[bytes]) -> None:
        get = self._dict.get
        for key in keys:
            get(key)

    def _stores(self, fresh: Sequence[list[bytes]]) -> None:
        for job, keys in enumerate(fresh):
            self._store.submit_store(job, keys, self._rows)
            self._store.poll()

    def _dict_stores(self, fresh: Sequence[list[bytes]]) -> None:
        table, oldest = self._dict, self._oldest
        for keys in fresh:
            for key, victim in zip(keys, oldest.popleft(), strict=True):
                table[key] = table.pop(victim)
            oldest.append(keys)


def measure_growth(run: Run, sizes: Sequence[int]) -> dict[int, dict[str, Spread]]:
    """Nanoseconds of an operation, by blocks held."""
    found: dict[int, dict[str, Spread]] = {}
    for blocks in sizes:
        run.progress(f"{blocks:,} blocks held")
        gc.disable()  # while so much is made; what is measured has it
        growing = Growing(blocks)
        gc.enable()
        gc.collect()
        gc.freeze()
        for ask in (growing.look_up, growing.turn_over):
            for _ in range(GROWTH_REPETITIONS):
                ask()
        found[blocks] = growing.times.spreads()
        del growing
        gc.unfreeze()
        gc.collect()
    return found


def measure_memory(blocks: int) -> dict[int, float]:
    """Bytes of this process that a block of a full index takes, key included, by the blocks of a request.

    To be called before memory is freed.
    """

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    found = {}
    kept = []  # memory that one gives back would be used again by the next, and not show
    for of_request in MEMORY_REQUESTS:
        before = resident()
        index = BlockIndex(blocks)
        for number in range(blocks // of_request):
            name = f"request {number}"
            index.mark_ready(index.reserve(tiers.block_keys(of_request), name, None)[1])
            index.finish(name, None)
        found[of_request] = (resident() - before) / len(index)
        kept.append(index)
    return found


def growth_figure(held: dict[int, dict[str, Spread]]) -> Figure:
    few, many = min(held), max(held)
    growth = {name: held[many][name].median / held[few][name].median for name in held[few]}
    worse = max(("lookup", "store"), key=lambda what: growth[f"{what}, ours"] / growth[f"{what}, dict"])
    ours, of_dict = growth[f"{worse}, ours"], growth[f"{worse}, dict"]
    what = f"growth of a {worse} from {few:,} to {many:,} blocks / a dict's (limit: the dict's)"
    return Figure("scheduler_cost.growth", what, "times", ours / of_dict, "<= 1.3", ours=ours, limit=of_dict)
