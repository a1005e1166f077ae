"""Replays a request trace through vLLM's real tiering manager and the tier: how often is a block there?

Traces are in Mooncake's format, a JSON object a line: `timestamp` (ms), `input_length`, `output_length` (tokens) and
`hash_ids`, one id a block of the prompt, equal ids for equal prefixes: integers from 0 on, of any size. A block is hit
if it is in the primary or in the tier together with all blocks before it. Rows are a few hundred bytes, and the bytes
of every hit are checked.

Beside it, for as many blocks: one plain LRU cache, which hits by the same rule, and the optimum: Belady's choice by the
future, with the right not to keep a block at all. The optimum is asked block by block, also for those behind a miss, so
no policy with that many blocks can hit more. And whatever the capacity: the primary alone, with no tier behind it, and
an infinite cache, which hits every block that it has seen.

The capacities, primary and tier together, are fixed: 1/64, 1/32, ... 1/2 of the trace's different blocks. The figure is
the mean over all of them of our hits divided by the optimum's, so nobody chooses where it is taken, and the table shows
every one.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import statistics
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
# What the trace's different blocks are divided by: the capacities, primary and tier together.
DIVISORS = (64, 32, 16, 8, 4, 2)
# At most: two minutes' work.
REQUESTS = 20_000
# So many that the least capacity is more than the primary.
QUICK_REQUESTS = 2000
GOAL = 0.5
# Of an integer in a trace: as many as Python reads whatever its settings (sys.set_int_max_str_digits).
MOST_DIGITS = sys.int_info.str_digits_check_threshold


def read_trace(path: Path, most: int) -> list[list[int]]:
    """The block ids of at most that many requests. Raises ValueError, in words, for a line that is none."""
    requests: list[list[int]] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if len(requests) == most:
                break
            if not line.strip():
                continue
            try:
                requests.append(_block_ids(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not any(requests):
        raise ValueError(f"{path}: no request has a block")
    return requests


def _block_ids(line: bytes) -> list[int]:
    """A request's block ids, each once. Raises ValueError that says what is wrong with the line."""
    try:
        request = json.loads(line.decode(), parse_int=_integer, parse_float=_finite, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError("not JSON") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(request, dict) or "hash_ids" not in request:
        raise ValueError("not a JSON object with 'hash_ids'")
    ids = request["hash_ids"]
    if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
        raise ValueError("'hash_ids' must be a list of integers from 0 on")
    # No two blocks of a request have the same prefix; a cache asked twice at once would count the second as a hit.
    return list(dict.fromkeys(ids))


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits, and {MOST_DIGITS} is the most")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is too large for a number")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


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


def lru_hits(requests: Iterable[Sequence[int]], capacity: int) -> int:
    """Block accesses that one least recently used cache of `capacity` blocks hits, by our rule: with all before it."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for blocks in requests:
        hits += next((at for at, block in enumerate(blocks) if block not in held), len(blocks))
        for block in blocks:
            held[block] = None
            held.move_to_end(block)
            if len(held) > capacity:
                held.popitem(last=False)
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
    """vLLM's manager and primary, and the tier behind them, if it has blocks; the forward pass is a stamp in each row.

    Blocks are numbered as they are first asked for: ids may be larger than what a row or a name has room for.
    """

    def __init__(self, primary_blocks: int, tier_blocks: int) -> None:
        self._rows = np.zeros((primary_blocks, ROW_BYTES // 8), dtype=np.uint64)
        primary = CPUPrimaryTierOffloadingManager(num_chunks=primary_blocks, mmap_region=Region(self._bytes))
        self._tier: AsyncSecondaryTierManager | None = None
        if tier_blocks:
            self._tier = AsyncSecondaryTierManager(
                SimpleNamespace(), primary.get_kv_memoryview(), "async", bytes_to_use=tier_blocks * ROW_BYTES
            )
        self._manager = TieringOffloadingManager(
            primary_tier=primary, secondary_tiers=[self._tier] if self._tier is not None else []
        )
        self._numbers: dict[int, int] = {}
        self._requests = 0
        self.hits = Hits()

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
            self._tier._store.drain()

    @staticmethod
    def _stamps(blocks: Sequence[int]) -> np.ndarray:
        # A multiplication by an odd number: different for different blocks, and none is what a row begins with.
        return (np.array(blocks, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def replay(requests: Sequence[Sequence[int]], primary_blocks: int, tier_blocks: int) -> Hits:
    """The hits of a whole trace; without a tier if that has no blocks."""
    world = Replay(primary_blocks, tier_blocks)
    try:
        for blocks in requests:
            world.request(blocks)
    finally:
        world.close()
    return world.hits


def capacities(different: int) -> dict[str, int]:
    """The grid: blocks, by their share of `different` blocks."""
    return {f"1/{divisor}": different // divisor for divisor in DIVISORS}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--trace", type=Path, help="in Mooncake's format (default: one is made)")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="at most (%(default)s)")
    options = parser.parse_args()
    most = min(options.requests, QUICK_REQUESTS) if options.quick else options.requests
    requests = _requests(parser, options.trace, most)
    name = options.trace.name if options.trace else "a synthetic trace"
    different = len({block for blocks in requests for block in blocks})
    accesses = sum(map(len, requests))
    primary_blocks = PRIMARY_TO_REQUEST * max(map(len, requests))
    infinite = infinite_hits(requests) / accesses
    grid = capacities(different)
    measured = {share: blocks for share, blocks in grid.items() if blocks > primary_blocks}
    if not infinite:
        parser.error(f"no block of {name} is asked for twice, so there is nothing to hit")
    if not measured:
        parser.error(
            f"{name} has {different} different blocks: too few for a primary of {primary_blocks}, "
            f"{PRIMARY_TO_REQUEST} times the largest request, to be less than half of them"
        )
    run = Run(
        "replay",
        f"{len(requests)} requests of {name} through vLLM's TieringOffloadingManager; transfers end before the next "
        "step. No times are measured.",
        options.output,
    )
    run.progress("the primary alone")
    alone = replay(requests, primary_blocks, 0).ratio
    points = []
    for share, blocks in measured.items():
        run.progress(f"{blocks} blocks, {share} of {different}")
        hits = replay(requests, primary_blocks, blocks - primary_blocks)
        optimum = optimal_hits(requests, blocks)
        points.append(
            {
                "share": share,
                "blocks": blocks,
                "primary": hits.primary / accesses,
                "tier": hits.tier / accesses,
                "ours": hits.ratio,
                "lru": lru_hits(requests, blocks) / accesses,
                "optimum": optimum / accesses,
                "ours_to_optimum": (hits.primary + hits.tier) / optimum,
            }
        )
    run.results = {
        "requests": len(requests),
        "accesses": accesses,
        "different_blocks": different,
        "primary_blocks": primary_blocks,
        "primary_alone": alone,
        "infinite": infinite,
        "by_capacity": points,
    }
    print(f"{accesses} accesses to {different} blocks. Hit ratios; the primary has {primary_blocks} blocks:")
    print(hit_ratios(grid, points, alone, infinite))
    if len(points) == len(grid):
        run.figures.append(
            Figure(
                key="replay.hit_ratio_vs_optimal",
                what="hit ratio / the optimum's, which knows the future, mean over 1/64, 1/32, ... 1/2 of the blocks",
                unit="hits",
                ratio=statistics.mean(point["ours_to_optimum"] for point in points),
                goal=GOAL,
                goal_is=">=",
                ours=statistics.mean(point["ours"] for point in points),
                limit=statistics.mean(point["optimum"] for point in points),
            )
        )
    else:
        print("No figure: it is the mean over the whole grid, and the trace is too small for that.")
    draw(run, f"{len(requests)} requests of {name}", points, primary_blocks, alone, infinite)
    run.finish()
    return 0


def hit_ratios(grid: dict[str, int], points: Sequence[dict[str, Any]], alone: float, infinite: float) -> str:
    """All that was measured, as a table: a line a capacity."""
    found = {point["share"]: point for point in points}
    heads = ("primary", "tier", "together", "alone", "LRU", "optimum", "infinite", "/ optimum")
    lines = [f"{'blocks held':>18}" + "".join(f"{head:>10}" for head in heads)]
    for share, blocks in grid.items():
        line = f"{share:>8} {blocks:>9}"
        if share in found:
            point = found[share]
            both = (point["primary"], point["tier"], point["ours"], alone, point["lru"], point["optimum"], infinite)
            line += "".join(f"{value:>10.4f}" for value in (*both, point["ours_to_optimum"]))
        else:
            line += "  not measured: not more than the primary"
        lines.append(line)
    lines.append("alone: the primary without a tier. LRU: one plain cache of as many blocks as both.")
    return "\n".join(lines)


def draw(
    run: Run, title: str, points: Sequence[dict[str, Any]], primary_blocks: int, alone: float, infinite: float
) -> None:
    with figure(run.picture, figsize=(8, 4.5)) as (_, axes):
        blocks = [point["blocks"] for point in points]
        axes.axhline(infinite, color="#8c8c8c", linestyle=":", label="infinite")
        for key, style, color, label in (
            ("optimum", "o--", "#55a868", "the optimum"),
            ("ours", "o-", "#4c72b0", "primary and tier"),
            ("lru", "s:", "#c44e52", "one plain LRU cache"),
            ("primary", "o-", "#dd8452", "of ours, in the primary"),
        ):
            axes.plot(blocks, [point[key] for point in points], style, color=color, label=label)
        axes.axhline(alone, color="#dd8452", linestyle=":", label="the primary alone")
        axes.set_xscale("log", base=2)
        axes.set_xticks(blocks, [f"{point['blocks']}\n{point['share']}" for point in points])
        axes.set_ylim(0, None)
        axes.set_xlabel(f"blocks held, primary ({primary_blocks}) and tier together")
        axes.set_ylabel("hit ratio of blocks")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()


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
