"""Replays a request trace through vLLM's real tiering manager and the tier: how often is a block there?

Traces are in Mooncake's format, a JSON object a line: `timestamp` (ms), `input_length`, `output_length` (tokens) and
`hash_ids`, one id a block of the prompt, equal ids for equal prefixes. A block is hit if it is in the primary or in the
tier together with all blocks before it. Rows are a few hundred bytes, and the bytes of every hit are checked.

Beside it an infinite cache, which hits every block that it has seen, and the optimum for as many blocks: Belady's
choice by the future, with the right not to keep a block at all. It is asked block by block, also for those behind a
miss, so no policy with that many blocks can hit more.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, make_offload_key
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

from async_tier.manager import AsyncSecondaryTierManager
from benchmarks import tiers
from benchmarks.common import Figure, Run, arguments, figure

ROW_BYTES = 256
# Blocks that are stored as vLLM does after a chunk of prefill.
CHUNK_BLOCKS = 16
# Of the primary, by the largest request: so that one request's blocks are never in each other's way.
PRIMARY_TO_REQUEST = 2
# Capacities, primary and tier together, by the number of different blocks in the trace.
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)
# At most: a minute's work.
REQUESTS = 20_000
# Where the figure is taken.
FIGURE_SHARE = 0.1
GOAL = 0.5


def read_trace(path: Path, most: int) -> list[list[int]]:
    """The block ids of at most that many requests. Raises ValueError, in words, for a line that is none."""
    requests: list[list[int]] = []
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            if len(requests) == most:
                break
            if not line.strip():
                continue
            try:
                ids = json.loads(line)["hash_ids"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a JSON object with 'hash_ids'") from error
            if not isinstance(ids, list) or not all(type(each) is int for each in ids):
                raise ValueError(f"{path}, line {number}: 'hash_ids' must be a list of integers")
            requests.append(ids)
    if not any(requests):
        raise ValueError(f"{path}: no request has a block")
    return requests


def synthetic_trace(count: int, seed: int = 1) -> list[list[int]]:
    """Conversations of several turns, some of which begin with the same document; the same for the same seed."""
    draw = random.Random(seed)
    fresh = iter(range(1 << 30))
    documents = [[next(fresh) for _ in range(draw.randint(4, 24))] for _ in range(20)]
    open_conversations: list[list[int]] = []
    requests = []
    for _ in range(count):
        if open_conversations and draw.random() < 0.7:
            conversation = draw.choice(open_conversations[-60:])
        else:
            document = documents[min(int(draw.expovariate(0.3)), len(documents) - 1)]
            conversation = list(document) if draw.random() < 0.6 else [next(fresh) for _ in range(draw.randint(2, 10))]
            open_conversations.append(conversation)
        conversation += [next(fresh) for _ in range(draw.randint(1, 4))]
        requests.append(list(conversation))
    return requests


def infinite_hits(requests: Iterable[Sequence[int]]) -> int:
    """Block accesses that an infinite cache hits."""
    seen: set[int] = set()
    hits = 0
    for blocks in requests:
        hits += sum(1 for block in blocks if block in seen)
        seen.update(blocks)
    return hits


def optimal_hits(requests: Iterable[Sequence[int]], capacity: int) -> int:
    """Block accesses that the best choice of `capacity` blocks hits; see above."""
    accesses = [block for blocks in requests for block in blocks]
    never = len(accesses)
    next_use = [never] * len(accesses)
    last: dict[int, int] = {}
    for at in range(len(accesses) - 1, -1, -1):
        next_use[at] = last.get(accesses[at], never)
        last[accesses[at]] = at
    held: dict[int, int] = {}  # block -> its next use
    furthest: list[tuple[int, int]] = []  # (-next use, block), some of them stale
    hits = 0
    for at, block in enumerate(accesses):
        hits += block in held
        held[block] = next_use[at]
        heapq.heappush(furthest, (-next_use[at], block))
        while len(held) > capacity:
            use, victim = heapq.heappop(furthest)
            if held.get(victim) == -use:
                del held[victim]
    return hits


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
    """vLLM's manager and primary, and the tier behind them; the forward pass is a stamp in each row."""

    def __init__(self, primary_blocks: int, tier_blocks: int) -> None:
        self._rows = np.zeros((primary_blocks, ROW_BYTES // 8), dtype=np.uint64)
        primary = CPUPrimaryTierOffloadingManager(num_chunks=primary_blocks, mmap_region=Region(self._bytes))
        self.tier = AsyncSecondaryTierManager(
            SimpleNamespace(), primary.get_kv_memoryview(), "async", bytes_to_use=tier_blocks * ROW_BYTES
        )
        self._manager = TieringOffloadingManager(primary_tier=primary, secondary_tiers=[self.tier])
        self._requests = 0
        self.hits = Hits()

    @property
    def _bytes(self) -> np.ndarray:
        return self._rows.view(np.uint8)

    def request(self, blocks: Sequence[int]) -> None:
        """One request: what is there of its prefix is loaded and checked, the rest computed and stored."""
        self._requests += 1
        names = [make_offload_key(block.to_bytes(32, "big", signed=True), 0) for block in blocks]
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
        self.tier._store.drain()

    @staticmethod
    def _stamps(blocks: Sequence[int]) -> np.ndarray:
        # A multiplication by an odd number: different for different blocks, and none is what a row begins with.
        return (np.array(blocks, dtype=np.int64).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def replay(requests: Sequence[Sequence[int]], primary_blocks: int, tier_blocks: int) -> Hits:
    """The hits of a whole trace."""
    world = Replay(primary_blocks, tier_blocks)
    try:
        for blocks in requests:
            world.request(blocks)
    finally:
        world.close()
    return world.hits


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--trace", type=Path, help="in Mooncake's format (default: one is made)")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="at most (%(default)s)")
    options = parser.parse_args()
    most = min(options.requests, 200) if options.quick else options.requests
    requests = _requests(parser, options.trace, most)
    name = options.trace.name if options.trace else "a synthetic trace"
    run = Run(
        "replay",
        f"{len(requests)} requests of {name} through vLLM's TieringOffloadingManager; transfers end before the next "
        "step. No times are measured.",
        options.output,
    )
    different = len({block for blocks in requests for block in blocks})
    accesses = sum(map(len, requests))
    primary_blocks = PRIMARY_TO_REQUEST * max(map(len, requests))
    infinite = infinite_hits(requests) / accesses
    points = []
    for share in SHARES:
        capacity = max(round(share * different), primary_blocks + 1)
        run.progress(f"{capacity} blocks of {different}")
        hits = replay(requests, primary_blocks, capacity - primary_blocks)
        points.append(
            {
                "blocks": capacity,
                "primary": hits.primary / hits.blocks,
                "tier": hits.tier / hits.blocks,
                "ours": hits.ratio,
                "optimum": optimal_hits(requests, capacity) / accesses,
            }
        )
    run.results = {
        "requests": len(requests),
        "accesses": accesses,
        "different_blocks": different,
        "primary_blocks": primary_blocks,
        "infinite": infinite,
        "by_capacity": points,
    }
    at = points[SHARES.index(FIGURE_SHARE)]
    run.figures.append(
        Figure(
            key="replay.hit_ratio_vs_optimal",
            what=f"hit ratio / the optimum's, which knows the future, with {at['blocks']} blocks of {different}",
            unit="hits",
            ratio=at["ours"] / at["optimum"],
            goal=GOAL,
            goal_is=">=",
            ours=at["ours"],
            limit=at["optimum"],
        )
    )
    with figure(run.picture, figsize=(8, 4.5)) as (_, axes):
        blocks = [point["blocks"] for point in points]
        axes.axhline(infinite, color="#8c8c8c", linestyle=":", label="infinite")
        axes.plot(blocks, [point["optimum"] for point in points], "o--", color="#55a868", label="the optimum")
        axes.plot(blocks, [point["ours"] for point in points], "o-", color="#4c72b0", label="primary and tier")
        axes.plot(blocks, [point["primary"] for point in points], "o-", color="#dd8452", label="of them, the primary")
        axes.set_xscale("log")
        axes.set_ylim(0, None)
        axes.set_xlabel(f"blocks held, primary ({primary_blocks}) and tier together")
        axes.set_ylabel("hit ratio of blocks")
        axes.set_title(f"{len(requests)} requests of {name}")
        axes.grid(alpha=0.3)
        axes.legend()
    run.finish()
    return 0


def _requests(parser: argparse.ArgumentParser, trace: Path | None, most: int) -> list[list[int]]:
    if most < 1:
        parser.error("--requests must be at least 1")
    if trace is None:
        return synthetic_trace(most)
    try:
        return read_trace(trace, most)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
