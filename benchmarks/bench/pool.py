"""What a pool in a folder costs beside private memory, and what it saves: a restart, and a block held by two engines.

Calls and copies are measured on tiers of both kinds in turns, and the ratios are of medians of the same run. A start is
timed with a million rows, and with eight other files of the pool. The replay is that of `replay`, its second half, with
and without a restart between the halves.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from async_tier.index import BlockIndex
from async_tier.memory.peers import Peers
from async_tier.memory.pool import PoolArena
from async_tier.memory.pool_files import Identity
from benchmarks.bench.copy_rate import MIB, RowSize, spreads
from benchmarks.bench.growth import US, Times
from benchmarks.bench.replay import Trace
from benchmarks.shared import tiers
from benchmarks.shared.common import QUARTILES, TMPFS, Figure, Run, Spread, arguments
from benchmarks.shared.tiering import Replay

JOBS, HELD_BLOCKS = 300, 10_000
ROW_BYTES = 4096
# Of a start: rows, of a size that fits here; and what other engines of the node hold.
START_ROWS, PEERS, PEER_ROWS = 1_000_000, 8, 100_000
START_ROW_BYTES = 64
# What two engines are asked.
PROMPTS, PROMPT_BLOCKS = 400, 12
IDENTITY = Identity(bytes(32), {})


def measure_calls(folder: str, jobs: int) -> dict[str, Spread]:
    """Microseconds of the calls of both kinds: a store of 32 blocks, with and without room; lookups; a step's end."""
    made, times = tiers.Jobs(), Times(US)
    primary = np.ones((2 * tiers.JOB_BLOCKS, ROW_BYTES), dtype=np.uint8)
    rows = np.arange(tiers.JOB_BLOCKS, dtype=np.int32)
    room = HELD_BLOCKS + jobs * tiers.JOB_BLOCKS
    with ExitStack() as stack:
        compared = {
            "private": tiers.ours(stack, primary, room),
            "pool": tiers.ours(stack, primary, room, pool=folder, namespace="room"),
            "private, full": tiers.ours(stack, primary, HELD_BLOCKS),
            "pool, full": tiers.ours(stack, primary, HELD_BLOCKS, pool=folder, namespace="full"),
        }
        for keys in tiers.groups(tiers.block_keys(HELD_BLOCKS)):
            for tier in compared.values():
                tiers.submit_alone(tier, made.store(keys, rows[: len(keys)]))
        order, draw = list(compared.items()), random.Random(1)
        for keys in tiers.groups(tiers.block_keys(jobs * tiers.JOB_BLOCKS)):
            absent = tiers.block_keys(tiers.JOB_BLOCKS)
            draw.shuffle(order)
            for whose, tier in order:
                store = made.store(keys, rows)
                tier.on_new_request(store.req_context)
                times.call(f"store, {whose}", tiers.submit, tier, store)
                tiers.wait(tier, 1)
                times.call(f"hits, {whose}", _look_up, tier, keys, store.req_context)
                times.call(f"misses, {whose}", _look_up, tier, absent, store.req_context)
                tiers.end_step(tier)
                times.call(f"end of a step, {whose}", tiers.end_step, tier)
                tier.on_request_finished(store.req_context)
    return times.spreads()


def _look_up(tier: Any, keys: list[bytes], context: Any) -> None:
    for key in keys:
        tier.lookup(key, context)


def measure_copies(folder: str, moved: int, repetitions: int) -> dict[str, Spread]:
    """GB/s of stores and loads of rows of 256 KiB by one copy thread."""
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        size = RowSize(stack, 256 << 10, moved, with_fs=False)
        blocks = 2 * len(size.primary)
        size.tiers = {
            "private": tiers.ours(stack, size.primary, blocks, copy_threads=1),
            "pool": tiers.ours(stack, size.primary, blocks, copy_threads=1, pool=folder, namespace="copies"),
        }
        size.tiers["pool"].block_store.arena.pool.settled.wait()
        for name in size.tiers:  # to warm up
            for _ in range(2):
                size.measure(name, {})
        for _ in range(repetitions):
            for name in ("private", "pool", "pool", "private"):
                size.measure(name, rates)
    return spreads(rates)


def fill(folder: str, rows: int, first: int = 0) -> PoolArena:
    """A file of the pool in which every row holds a block."""
    arena = PoolArena(Path(folder), IDENTITY, rows, START_ROW_BYTES, allocate=False)
    for at in range(0, rows, tiers.JOB_BLOCKS):
        taken = list(range(at, min(rows, at + tiers.JOB_BLOCKS)))
        arena.table.take(taken, [b"%036d" % (first + row) for row in taken], -1)
        arena.table.publish(taken)
    return arena


def measure_start(folder: str, rows: int) -> float:
    """Seconds that a start takes longer for the blocks that it finds."""
    fill(folder, rows).close()
    began = time.perf_counter()
    BlockIndex(rows)
    empty = time.perf_counter() - began
    began = time.perf_counter()
    arena = PoolArena(Path(folder), IDENTITY, rows, START_ROW_BYTES, allocate=False)
    index = BlockIndex(rows)
    index.keep_in(arena.table, *arena.restored)
    took = time.perf_counter() - began
    if len(index) != rows:
        raise RuntimeError(f"{len(index)} of {rows} blocks were restored")
    arena.close()
    return took - empty


def measure_attach(folder: str, rows: int) -> float:
    """Seconds until the blocks of PEERS other files are known."""
    arenas = [fill(folder, rows, number * rows) for number in range(PEERS)]
    own = PoolArena(Path(folder), IDENTITY, 1, START_ROW_BYTES, allocate=True)
    began = time.perf_counter()
    peers = Peers(own)
    took = time.perf_counter() - began
    if len(peers) != PEERS * rows:
        raise RuntimeError(f"{len(peers)} of {PEERS * rows} blocks were found")
    peers.close()
    for arena in [own, *arenas]:
        arena.close()
    return took


def measure_sharing(folder: str, prompts: int) -> float:
    """Blocks that two engines hold together / different blocks, when both are asked the same prompts, one by one."""
    engines = [Replay(4 * PROMPT_BLOCKS, prompts * PROMPT_BLOCKS, pool=folder, namespace="shared") for _ in range(2)]
    try:
        for number in range(prompts):
            first = number * PROMPT_BLOCKS
            for engine in engines if number % 2 else reversed(engines):
                engine.request(range(first, first + PROMPT_BLOCKS))
        return sum(engine.held for engine in engines) / (prompts * PROMPT_BLOCKS)
    finally:
        for engine in engines:
            engine.close()


def measure_replay(folder: str, quick: bool) -> dict[str, float]:
    """Hit ratios of a trace's second half: by an engine that went on, and by one that was restarted before it."""
    trace = Trace.read(None, quick)
    blocks = trace.grid["1/4"]
    ratios = {}
    for what in ("went on", "restarted"):
        world = Replay(trace.primary_blocks, blocks - trace.primary_blocks, pool=folder, namespace=what)
        half = len(trace.requests) // 2
        for ids in trace.requests[:half]:
            world.request(ids)
        if what == "restarted":
            world.restart()
        before = world.hits.primary + world.hits.tier, world.hits.blocks
        for ids in trace.requests[half:]:
            world.request(ids)
        ratios[what] = (world.hits.primary + world.hits.tier - before[0]) / (world.hits.blocks - before[1])
        world.close()
    return ratios


def figures(calls: dict[str, Spread], copies: dict[str, Spread]) -> list[Figure]:
    """Those that compare with private memory."""
    found = []
    for key, what, name in (
        ("submit", "submit_store of 32 blocks, with room", "store, {}"),
        ("submit_full", "submit_store of 32 blocks for which 32 go", "store, {}, full"),
        ("hits", "32 lookups that hit", "hits, {}"),
        ("misses", "32 lookups that miss", "misses, {}"),
        ("end_of_step", "the end of a step", "end of a step, {}"),
    ):
        pool, private = (calls[name.format(whose)].median for whose in ("pool", "private"))
        what = f"{what} / in private memory (baseline)"
        found.append(Figure(f"pool.{key}", what, "us", pool / private, "<= 1.15", ours=pool, limit=private))
    for kind in ("store", "load"):
        pool, private = (copies[f"{whose}: {kind} / memmove"].median for whose in ("pool", "private"))
        what = f"rate of a {kind} of 256 KiB rows by one thread / in private memory (baseline); both / memmove"
        found.append(Figure(f"pool.{kind}_rate", what, "", pool / private, ">= 0.95", ours=pool, limit=private))
    return found


def main() -> int:
    options = arguments(__doc__).parse_args()
    logging.getLogger("vllm").setLevel(logging.WARNING)
    logging.getLogger("async_tier").setLevel(logging.WARNING)
    quick = options.quick
    jobs, rows = (30, START_ROWS // 10) if quick else (JOBS, START_ROWS)
    run = Run(
        "pool",
        f"Calls of one thread: {HELD_BLOCKS:,} blocks stored to warm up, then {jobs} jobs of 32 blocks, the tiers in "
        "turns. Copies: as in copy_rate. Starts: once each.",
        options.output,
    )
    with ExitStack() as stack:

        def folder() -> str:
            return stack.enter_context(tempfile.TemporaryDirectory(prefix="async-tier-bench-", dir=TMPFS))

        run.progress("calls")
        calls = measure_calls(folder(), jobs)
        run.progress("copies")
        copies = measure_copies(folder(), (32 if quick else 512) * MIB, 1 if quick else 5)
        run.progress("starts")
        start, attach = measure_start(folder(), rows), measure_attach(folder(), PEER_ROWS // (10 if quick else 1))
        run.progress("two engines")
        sharing = measure_sharing(folder(), PROMPTS // (10 if quick else 1))
        run.progress("a restart")
        ratios = measure_replay(folder(), quick)
    run.figures += figures(calls, copies)
    lost = ratios["went on"] - ratios["restarted"]
    run.figures += [
        Figure("pool.start", f"longer start for {rows:,} blocks that are found", "s", start, "<= 2", ours=start),
        Figure("pool.attach", f"finding {PEERS} files of {PEER_ROWS:,} blocks", "s", attach, "<= 1", ours=attach),
        Figure("pool.sharing", "blocks that two engines hold / different blocks", "", sharing, "<= 1.1", ours=sharing),
        Figure(
            "pool.restart",
            "hit ratio of an engine that went on, less that of one that was restarted; second half of a trace",
            "",
            lost,
            "<= 0.01",
            ours=ratios["restarted"],
            limit=ratios["went on"],
        ),
    ]
    run.results = {
        "calls": {what: vars(each) for what, each in calls.items()},
        "copies": {what: vars(each) for what, each in copies.items()},
        "hit_ratios": ratios,
    }
    print("\n".join([f"{'us':30}{QUARTILES}", *(f"  {what:28}{each.cells()}" for what, each in calls.items())]))
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
