"""What the tier takes from the scheduler's thread: submit, poll, lookup, end of step.

Against blocks a job, jobs in flight and blocks held, next to vLLM's fs tier, to its example tier, which moves no data,
and to a bare dict. Nothing here waits for copies: what is timed are the calls.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import LookupResult

from async_tier.arena import Rows
from async_tier.block_store import BlockStore
from async_tier.index import BlockIndex
from benchmarks import tiers
from benchmarks.common import Figure, Run, Spread, arguments, figure

US, NS = 1e6, 1e9  # from seconds
# A page: what O_DIRECT, which the fs tier prefers, can write.
SUBMIT_ROW_BYTES = 4096
# Of rows that are only there to be counted.
SMALL_ROW_BYTES = 64
HELD_BLOCKS = 10_000
SUBMIT_JOBS = 300
BLOCKS_A_JOB = (1, 4, 16, 32, 128, 512, 1024)
# Submissions of each of those: so many blocks in all, and no fewer than this.
SWEEP_BLOCKS, SWEEP_JOBS = 4096, 12
IN_FLIGHT = (1, 10, 100, 1000)
POLLS = 1000
LOOKUP_BLOCKS, LOOKUP_STEPS, LOOKUP_REQUESTS, LOOKUPS_A_REQUEST = 100_000, 30, 32, 128
FEW_BLOCKS, MANY_BLOCKS = 10_000, 10_000_000
BETWEEN = (100_000, 1_000_000)
GROWTH_REPETITIONS, GROWTH_JOBS, GROWTH_LOOKUPS = 7, 200, 16_384
MEMORY_BLOCKS = 1_000_000
SUBMIT_VS_FS, GROWTH_VS_DICT, BYTES_A_BLOCK = 0.6, 1.3, 300


# ---------------------------------------------------------------------------------------------------------- submissions


def measure_submissions(run: Run, repetitions: int) -> dict[str, float]:
    """Microseconds (median) of a submission of 32 blocks, the tiers in turns, all caches warm or cold alike."""
    jobs = tiers.Jobs()
    primary = np.ones((tiers.JOB_BLOCKS, SUBMIT_ROW_BYTES), dtype=np.uint8)
    rows = np.arange(tiers.JOB_BLOCKS, dtype=np.int32)
    times: dict[str, list[float]] = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        room = HELD_BLOCKS + repetitions * tiers.JOB_BLOCKS
        compared = {
            "ours": tiers.ours(stack, primary, room),
            "ours, evicting": tiers.ours(stack, primary, HELD_BLOCKS),
            "ours, tracing": tiers.ours(stack, primary, room, trace_path=f"{folder}/trace.json"),
            "fs": tiers.FileSystem(stack, primary).tier,
            "example": tiers.example(stack, primary),
        }
        for keys in tiers.groups(tiers.block_keys(HELD_BLOCKS)):
            for name, tier in compared.items():
                if name.startswith("ours"):
                    tiers.submit_alone(tier, jobs.store(keys, rows[: len(keys)]))
        order, draw = list(compared.items()), random.Random(1)
        for keys in tiers.groups(tiers.block_keys(repetitions * tiers.JOB_BLOCKS)):
            draw.shuffle(order)  # whoever follows the fs tier's threads finds the caches cold
            for name, tier in order:
                times.setdefault(f"store, {name}", []).append(tiers.submit_alone(tier, jobs.store(keys, rows)))
                times.setdefault(f"load, {name}", []).append(tiers.submit_alone(tier, jobs.load(keys, rows)))
    spreads = {name: Spread.of([value * US for value in each]) for name, each in times.items()}
    run.results["submission_of_32_us"] = {name: asdict(spread) for name, spread in spreads.items()}
    return {name: spread.median for name, spread in spreads.items()}


def measure_blocks_a_job(run: Run) -> dict[str, dict[int, float]]:
    """Microseconds (median) of a submit_store with room, by tier and blocks a job."""
    jobs = tiers.Jobs()
    most = max(BLOCKS_A_JOB)
    primary = np.ones((most, SUBMIT_ROW_BYTES), dtype=np.uint8)
    found: dict[str, dict[int, float]] = {"ours": {}, "fs": {}, "example": {}}
    with ExitStack() as stack:
        fs = tiers.FileSystem(stack, primary)
        # Room for every block of the sweep.
        room = sum(max(SWEEP_BLOCKS, SWEEP_JOBS * blocks) for blocks in BLOCKS_A_JOB)
        compared = {"ours": tiers.ours(stack, primary, room), "fs": fs.tier, "example": tiers.example(stack, primary)}
        for blocks in BLOCKS_A_JOB:
            run.progress(f"jobs of {blocks} blocks")
            rows = np.arange(blocks, dtype=np.int32)
            times: dict[str, list[float]] = {name: [] for name in compared}
            order, draw = list(compared.items()), random.Random(1)
            for _ in range(min(SUBMIT_JOBS, max(SWEEP_JOBS, SWEEP_BLOCKS // blocks))):
                keys = tiers.block_keys(blocks)
                draw.shuffle(order)
                for name, tier in order:
                    times[name].append(tiers.submit_alone(tier, jobs.store(keys, rows)))
            for name, each in times.items():
                found[name][blocks] = statistics.median(each) * US
            fs.remove_blocks()
    run.results["submit_store_us_by_blocks"] = found
    return found


# -------------------------------------------------------------------------------------------------- polls and lookups


def measure_polls(run: Run) -> None:
    """get_finished_jobs with jobs in flight and none done."""
    jobs = tiers.Jobs()
    primary = np.ones((1, SMALL_ROW_BYTES), dtype=np.uint8)
    row = np.zeros(1, dtype=np.int32)
    found = {}
    for in_flight in IN_FLIGHT:
        with ExitStack() as stack:
            tier = tiers.ours(stack, primary, in_flight)
            stream = tier._store._store_stream
            stream.hold()
            for key in tiers.block_keys(in_flight):
                tier.submit_store(jobs.store([key], row))
            times = [tiers.timed(tier.get_finished_jobs) * US for _ in range(POLLS)]
            if tier.statistics().jobs_in_flight != in_flight:
                raise RuntimeError("a job ended while the stream was held")
            stream.release()
            tiers.wait(tier, in_flight)
        found[in_flight] = asdict(Spread.of(times))
    run.results["get_finished_jobs_us_by_jobs_in_flight"] = found


def measure_lookups(run: Run) -> None:
    """lookup of random keys by requests that know their positions, and what it leaves to the end of the step."""
    jobs = tiers.Jobs()
    size = 1000
    primary = np.ones((size, SMALL_ROW_BYTES), dtype=np.uint8)
    rows = np.arange(size, dtype=np.int32)
    keys = tiers.block_keys(LOOKUP_BLOCKS)
    draw = random.Random(LOOKUP_BLOCKS)
    asked_a_step = LOOKUP_REQUESTS * LOOKUPS_A_REQUEST
    hits, misses, ends = [], [], []
    with ExitStack() as stack:
        tier = tiers.ours(stack, primary, LOOKUP_BLOCKS)
        for some in tiers.groups(keys, size):
            tiers.submit_alone(tier, jobs.store(some, rows))
        for step in range(LOOKUP_STEPS):
            known = tiers.groups(draw.sample(keys, asked_a_step), LOOKUPS_A_REQUEST)
            unknown = tiers.groups(tiers.block_keys(asked_a_step), LOOKUPS_A_REQUEST)
            contexts = [tiers.request(f"asks {step}.{number}", some) for number, some in enumerate(known)]
            for context in contexts:
                tier.on_new_request(context)
            hits.append(tiers.timed(_look_up, tier, known, contexts, LookupResult.HIT) / asked_a_step * US)
            ends.append(tiers.timed(tiers.end_step, tier) / asked_a_step * US)
            misses.append(tiers.timed(_look_up, tier, unknown, contexts, LookupResult.MISS) / asked_a_step * US)
            for context in contexts:
                tier.on_request_finished(context)
    run.results["lookup_us"] = {
        "hit": asdict(Spread.of(hits)),
        "miss": asdict(Spread.of(misses)),
        "end of step, a hit": asdict(Spread.of(ends)),
        "blocks_held": LOOKUP_BLOCKS,
    }


def _look_up(tier: Any, asked: Sequence[Sequence[bytes]], contexts: Sequence[Any], expected: LookupResult) -> None:
    for keys, context in zip(asked, contexts, strict=True):
        for key in keys:
            if tier.lookup(key, context) is not expected:
                raise RuntimeError(f"a lookup did not answer {expected}")


# ---------------------------------------------------------------------------------------------------------- blocks held


class NullStream:
    """Takes every copy, and makes none."""

    _DONE = SimpleNamespace(is_done=True, failed=False, seconds=0.0, synchronize=lambda: None)

    def copy_rows(self, *_: object) -> Any:
        return self._DONE


class NullEngine:
    """So that millions of blocks need no memory but the index's."""

    name = "null"
    broken = None

    def __init__(self) -> None:
        self.load_stream = self.store_stream = NullStream()

    def advance(self) -> None:
        pass

    def close(self) -> None:
        pass


class NullArena:
    """Rows of an address that nobody touches."""

    def __init__(self, count: int) -> None:
        self.rows = Rows(address=1 << 40, count=count, row_bytes=SMALL_ROW_BYTES, stride=SMALL_ROW_BYTES)
        self.ready = count

    def close(self) -> None:
        pass


class Growing:
    """A tier and a bare dict of as many blocks, that are asked the same of, with keys of their own.

    Blocks leave in groups of 32, in an order that has nothing to do with where they lie in memory.
    """

    def __init__(self, blocks: int) -> None:
        self._draw = random.Random(blocks)
        self.times: dict[str, list[float]] = {}
        blocks -= blocks % tiers.JOB_BLOCKS
        primary = Rows(address=1 << 41, count=tiers.JOB_BLOCKS, row_bytes=SMALL_ROW_BYTES, stride=SMALL_ROW_BYTES)
        self._rows = np.arange(tiers.JOB_BLOCKS, dtype=np.int32)
        self._store = BlockStore(primary, engine=NullEngine(), arena=NullArena(blocks))  # type: ignore[arg-type]
        self._keys, dict_keys = tiers.block_keys(blocks), tiers.block_keys(blocks)
        sequences = tiers.groups(self._keys)
        self._stores(sequences)
        for keys in self._shuffled(sequences):
            self._store.touch(keys)  # from now on the least recently used goes first in this order
        self._dict_keys = dict_keys
        # Not the literals that the fill leaves in one place: rows, as the index has them.
        self._dict = {key: row for row, key in enumerate(dict_keys)}
        self._oldest = deque(self._shuffled(tiers.groups(dict_keys)))

    def _shuffled(self, sequences: list[list[bytes]]) -> list[list[bytes]]:
        return self._draw.sample(sequences, len(sequences))

    def look_up(self) -> None:
        """Time lookups of random keys, before any turnover."""
        asked = self._draw.choices(self._keys, k=GROWTH_LOOKUPS)
        self._note("lookup, ours", GROWTH_LOOKUPS, lambda: self._lookups(asked))
        asked = self._draw.choices(self._dict_keys, k=GROWTH_LOOKUPS)
        self._note("lookup, dict", GROWTH_LOOKUPS, lambda: self._dict_lookups(asked))

    def turn_over(self) -> None:
        """Time stores of 32 blocks for which 32 go."""
        fresh = tiers.groups(tiers.block_keys(GROWTH_JOBS * tiers.JOB_BLOCKS))
        self._note("store, ours", GROWTH_JOBS, lambda: self._stores(fresh))
        fresh = tiers.groups(tiers.block_keys(GROWTH_JOBS * tiers.JOB_BLOCKS))
        self._note("store, dict", GROWTH_JOBS, lambda: self._dict_stores(fresh))

    def median(self, what: str) -> float:
        """Nanoseconds an operation."""
        return statistics.median(self.times[what]) * NS

    def _note(self, what: str, operations: int, call: Callable[[], None]) -> None:
        self.times.setdefault(what, []).append(tiers.timed(call) / operations)

    def _lookups(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._store.lookup(key)
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


def measure_growth(run: Run, sizes: Sequence[int]) -> dict[int, dict[str, float]]:
    """Nanoseconds of an operation, by blocks held."""
    found: dict[int, dict[str, float]] = {}
    for blocks in sizes:
        run.progress(f"{blocks:,} blocks held")
        growing = Growing(blocks)
        gc.collect()
        gc.freeze()
        for ask in (growing.look_up, growing.turn_over):
            for _ in range(GROWTH_REPETITIONS):
                ask()
        found[blocks] = {what: growing.median(what) for what in growing.times}
        del growing
        gc.unfreeze()
        gc.collect()
    run.results["ns_by_blocks_held"] = found
    return found


def measure_memory(blocks: int) -> float:
    """Bytes of this process that a block of a full index takes, key included. To be called before memory is freed."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gc.collect()
    before = resident()
    index = BlockIndex(blocks)
    for number in range(blocks // tiers.JOB_BLOCKS):
        name = f"request {number}"
        index.fill(index.reserve(tiers.block_keys(tiers.JOB_BLOCKS), name, None)[1])
        index.finish(name)
    gc.collect()
    return (resident() - before) / len(index)


# ---------------------------------------------------------------------------------------------------------- the report


def main() -> int:
    options = arguments(__doc__).parse_args()
    logging.getLogger("vllm").setLevel(logging.WARNING)
    sizes = (FEW_BLOCKS, BETWEEN[0]) if options.quick else (FEW_BLOCKS, *BETWEEN, MANY_BLOCKS)
    jobs = 30 if options.quick else SUBMIT_JOBS
    run = Run(
        "scheduler_cost",
        f"Calls of one thread, medians. Submissions: {HELD_BLOCKS:,} blocks stored to warm up, then {jobs} jobs of 32 "
        f"blocks, the tiers in turns. Growth: {GROWTH_REPETITIONS} rounds of {GROWTH_LOOKUPS} lookups and "
        f"{GROWTH_JOBS} stores of 32 blocks into a full tier with an arena that has no memory.",
        options.output,
    )
    run.progress("memory of the index")
    memory = measure_memory(MEMORY_BLOCKS // (10 if options.quick else 1))
    run.results["index_bytes_a_block"] = memory
    run.progress("submissions")
    submissions = measure_submissions(run, jobs)
    by_blocks = measure_blocks_a_job(run)
    run.progress("polls and lookups")
    measure_polls(run)
    measure_lookups(run)
    held = measure_growth(run, sizes)
    few, many = held[sizes[0]], held[sizes[-1]]
    growth = {name: many[name] / few[name] for name in few}
    run.results["growth"] = growth
    worse = max(("lookup", "store"), key=lambda what: growth[f"{what}, ours"] / growth[f"{what}, dict"])
    run.figures = [
        Figure(
            key="scheduler_cost.submit_vs_fs",
            what="submit_store of 32 blocks, with room",
            unit="us",
            ratio=submissions["store, ours"] / submissions["store, fs"],
            goal=SUBMIT_VS_FS,
            goal_is="<=",
            ours=submissions["store, ours"],
            fs=submissions["store, fs"],
            example=submissions["store, example"],
        ),
        Figure(
            key="scheduler_cost.growth",
            what=f"growth of a {worse} from {sizes[0]:,} to {sizes[-1]:,} blocks / a dict's (limit: the dict's)",
            unit="times",
            ratio=growth[f"{worse}, ours"] / growth[f"{worse}, dict"],
            goal=GROWTH_VS_DICT,
            goal_is="<=",
            ours=growth[f"{worse}, ours"],
            limit=growth[f"{worse}, dict"],
        ),
        Figure(
            key="scheduler_cost.bytes_per_block",
            what="memory of the index, key included",
            unit="bytes",
            ratio=memory,
            goal=BYTES_A_BLOCK,
            goal_is="<=",
            ours=memory,
        ),
    ]
    for name, value in submissions.items():
        print(f"submit_{name:24} {value:8.1f} us")
    draw(run, by_blocks, held)
    run.finish()
    return 0


def draw(run: Run, by_blocks: dict[str, dict[int, float]], held: dict[int, dict[str, float]]) -> None:
    with figure(run.picture, ncols=2, figsize=(11, 4)) as (_, (left, right)):
        for name, color in (("ours", "#4c72b0"), ("fs", "#dd8452"), ("example", "#8c8c8c")):
            left.plot(list(by_blocks[name]), list(by_blocks[name].values()), "o-", color=color, label=name)
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_xlabel("blocks a job")
        left.set_ylabel("submit_store, us")
        left.set_title("What a store takes from the scheduler")
        left.legend()
        sizes = list(held)
        for what, color in (("lookup", "#4c72b0"), ("store", "#55a868")):
            for whose, style in (("ours", "o-"), ("dict", "o:")):
                first = held[sizes[0]][f"{what}, {whose}"]
                values = [held[size][f"{what}, {whose}"] / first for size in sizes]
                right.plot(sizes, values, style, color=color, label=f"{what}, {whose}")
        right.set_xscale("log")
        right.set_xlabel("blocks held")
        right.set_ylabel(f"time, relative to {sizes[0]:,} blocks")
        right.set_title("Growth with the blocks held")
        right.legend()
        for axes in (left, right):
            axes.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
