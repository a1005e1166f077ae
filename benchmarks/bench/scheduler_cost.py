"""What the tier takes from the scheduler's thread: submit, poll, lookup, end of step.

Against blocks a job, jobs in flight and blocks held, next to vLLM's fs tier, to its example tier, which moves no data,
and to a bare dict. Nothing here waits for copies: what is timed are the calls. Times are medians with their quartiles,
and ratios are those of medians of the same run.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import LookupResult

from async_tier.block_store import BlockStore
from async_tier.index import BlockIndex
from async_tier.streams.rows import Rows
from benchmarks.shared import tiers
from benchmarks.shared.common import QUARTILES, Figure, Run, Spread, arguments, figure, plot_spreads

US, NS = 1e6, 1e9  # from seconds
# A page: what O_DIRECT, which the fs tier prefers, can write.
SUBMIT_ROW_BYTES = 4096
# Of rows that are only there to be counted.
SMALL_ROW_BYTES = 64
HELD_BLOCKS = 10_000
SUBMIT_JOBS = 300
BLOCKS_A_JOB = (1, 4, 16, 32, 128, 512, 1024)
KINDS = ("store", "load")
# Submissions of each of those: so many blocks in all, and no fewer than this.
SWEEP_BLOCKS, SWEEP_JOBS = 4096, 12
IN_FLIGHT = (0, 1, 10, 100, 1000)
POLLS = 1000
HOOK_CALLS = 100_000
# Between two polls of a tier that has a job: long enough that most jobs have ended at the first.
POLL_PAUSE_S = 500e-6
LOOKUP_BLOCKS, LOOKUP_STEPS, LOOKUP_REQUESTS, LOOKUPS_A_REQUEST = 100_000, 30, 32, 128
# For the fs tier's thread to have looked for a step's files.
FS_LOOKUPS_S = 30.0
FEW_BLOCKS, MANY_BLOCKS = 10_000, 10_000_000
BETWEEN = (100_000, 1_000_000)
GROWTH_REPETITIONS, GROWTH_JOBS, GROWTH_LOOKUPS = 7, 200, 16_384
MEMORY_BLOCKS = 1_000_000
# Of the index's memory: blocks of a request.
MEMORY_REQUESTS = (1, 2, 32)
# Blocks before the one that is stored, and of a request that ends.
PREFIXES = (100, 62_500)
PREFIX_REPETITIONS, POLICY_JOBS = 15, 400
SUBMIT_VS_FS, GROWTH_VS_DICT, BYTES_A_BLOCK = 0.6, 1.3, 300
STORE_VS_PLAIN, BEHIND_LONG_PREFIX, END_OF_LONG_REQUEST = 1.2, 2, 2


# ---------------------------------------------------------------------------------------------------------- submissions


def measure_submissions(run: Run, repetitions: int) -> dict[str, Spread]:
    """Microseconds of submissions of 32 blocks, the tiers in turns.

    A store, another one right behind it, as for a second request of a step, and a load of the first; the two calls that
    a request begins and ends with; and of first stores, what it takes to hand the copies to the copy threads.
    """
    jobs = tiers.Jobs()
    primary = np.ones((tiers.JOB_BLOCKS, SUBMIT_ROW_BYTES), dtype=np.uint8)
    rows = np.arange(tiers.JOB_BLOCKS, dtype=np.int32)
    times: dict[str, list[float]] = {}

    def note(what: str, call: Callable[..., object], *arguments: object) -> None:
        times.setdefault(what, []).append(tiers.timed(call, *arguments))

    def measure(name: str, tier: Any, keys: list[bytes], more: list[bytes]) -> None:
        first, second, load = jobs.store(keys, rows), jobs.store(more, rows), jobs.load(keys, rows)
        note(f"a request begins, {name}", tier.on_new_request, first.req_context)
        tier.on_new_request(second.req_context)
        note(f"store, {name}", tiers.submit, tier, first)
        note(f"a second store, {name}", tiers.submit, tier, second)
        tiers.wait(tier, 2)
        note(f"a request ends, {name}", tier.on_request_finished, first.req_context)
        tier.on_request_finished(second.req_context)
        times.setdefault(f"load, {name}", []).append(tiers.submit_alone(tier, load))

    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        room = HELD_BLOCKS + 2 * repetitions * tiers.JOB_BLOCKS
        compared = {
            "ours": tiers.ours(stack, primary, room),
            "evicting, ours": tiers.ours(stack, primary, HELD_BLOCKS),
            "tracing, ours": tiers.ours(stack, primary, room, trace_path=f"{folder}/trace.json"),
            "taken apart, ours": tiers.ours(stack, primary, room),
            "fs": tiers.FileSystem(stack, primary).tier,
            "example": tiers.example(stack, primary),
        }
        for keys in tiers.groups(tiers.block_keys(HELD_BLOCKS)):
            for name, tier in compared.items():
                if name.endswith("ours"):
                    tiers.submit_alone(tier, jobs.store(keys, rows[: len(keys)]))
        # Of a tier of its own: a clock takes time too.
        stream = compared["taken apart, ours"].block_store.engine.store_stream
        copy_rows = stream.copy_rows
        handed_over: list[float] = []

        def timed_copy_rows(*arguments: object) -> object:
            started = time.perf_counter()
            event = copy_rows(*arguments)
            handed_over.append(time.perf_counter() - started)
            return event

        stream.copy_rows = timed_copy_rows
        order, draw = list(compared.items()), random.Random(1)
        fresh = iter(tiers.groups(tiers.block_keys(2 * repetitions * tiers.JOB_BLOCKS)))
        for keys, more in zip(fresh, fresh, strict=True):
            draw.shuffle(order)  # whoever follows the fs tier's threads finds the caches cold
            for name, tier in order:
                measure(name, tier, keys, more)
        times["store, handing over, ours"] = handed_over[::2]
    spreads = {name: microseconds(each) for name, each in times.items()}
    run.results["submission_of_32_us"] = {name: asdict(spread) for name, spread in spreads.items()}
    return spreads


def measure_hooks(run: Run) -> float:
    """Nanoseconds a job of what asks whether there is a trace, where there is none: when it is submitted and ends."""
    with ExitStack() as stack:
        store: Any = tiers.ours(stack, np.ones((1, SMALL_ROW_BYTES), dtype=np.uint8), 1).block_store

        def ask() -> None:
            for _ in range(HOOK_CALLS):
                if store._trace is not None:
                    raise RuntimeError("there is a trace")
                if store._trace is not None:
                    raise RuntimeError("there is a trace")

        def nothing() -> None:
            for _ in range(HOOK_CALLS):
                pass

        asked, looped = (min(tiers.timed(call) for _ in range(GROWTH_REPETITIONS)) for call in (ask, nothing))
    found = (asked - looped) / HOOK_CALLS * NS
    run.results["tracing_off_ns_a_job"] = found
    return found


def measure_blocks_a_job(run: Run) -> dict[str, dict[int, Spread]]:
    """Microseconds, by tier and kind and then blocks a job: "submit" a job, with room, and the "poll" that ends it."""
    jobs = tiers.Jobs()
    measures = {"submit": tiers.submit_alone, "poll": ending_poll}
    primary = np.ones((max(BLOCKS_A_JOB), SUBMIT_ROW_BYTES), dtype=np.uint8)
    found: dict[str, dict[int, Spread]] = {}
    with ExitStack() as stack:
        fs = tiers.FileSystem(stack, primary)
        # Room for every block of the sweep: half of the jobs show a submission, half a poll.
        room = 2 * sum(max(SWEEP_BLOCKS, SWEEP_JOBS * blocks) for blocks in BLOCKS_A_JOB)
        compared = {"ours": tiers.ours(stack, primary, room), "fs": fs.tier, "example": tiers.example(stack, primary)}
        for blocks in BLOCKS_A_JOB:
            run.progress(f"jobs of {blocks} blocks")
            rows = np.arange(blocks, dtype=np.int32)
            times: dict[str, list[float]] = {
                f"{what} {kind}, {name}": [] for what in measures for kind in KINDS for name in compared
            }
            order, draw = list(compared.items()), random.Random(1)
            for _ in range(min(SUBMIT_JOBS, max(SWEEP_JOBS, SWEEP_BLOCKS // blocks))):
                for what, measure in measures.items():
                    keys = tiers.block_keys(blocks)
                    draw.shuffle(order)
                    for name, tier in order:
                        both = (jobs.store(keys, rows), jobs.load(keys, rows))
                        for kind, job in zip(KINDS, both, strict=True):
                            times[f"{what} {kind}, {name}"].append(measure(tier, job))
            for name, each in times.items():
                found.setdefault(name, {})[blocks] = microseconds(each)
            fs.remove_blocks()
    run.results["us_by_blocks_a_job"] = {
        name: {blocks: asdict(spread) for blocks, spread in by_blocks.items()} for name, by_blocks in found.items()
    }
    return found


def ending_poll(tier: Any, job: Any) -> float:
    """Seconds of the poll that reports a job's end, on a tier that has no other."""
    tier.on_new_request(job.req_context)
    tiers.submit(tier, job)
    ended = 0
    while not ended:
        time.sleep(POLL_PAUSE_S)
        started = time.perf_counter()
        ended = tiers.collect(tier)
        took = time.perf_counter() - started
    tier.on_request_finished(job.req_context)
    return took


def microseconds(seconds: Sequence[float]) -> Spread:
    return Spread.of([each * US for each in seconds])


# -------------------------------------------------------------------------------------------------- polls and lookups


def measure_polls(run: Run) -> dict[str, Spread]:
    """Microseconds of a poll that finds nothing, with jobs in flight; of the fs tier, which nothing holds, none."""
    jobs = tiers.Jobs()
    primary = np.ones((1, SMALL_ROW_BYTES), dtype=np.uint8)
    row = np.zeros(1, dtype=np.int32)
    found = {}
    for in_flight in IN_FLIGHT:
        with ExitStack() as stack:
            tier = tiers.ours(stack, primary, max(IN_FLIGHT))
            stream = tier.block_store.engine.store_stream
            stream.hold()
            for key in tiers.block_keys(in_flight):
                tier.submit_store(jobs.store([key], row))
            found[f"{in_flight} in flight, ours"] = microseconds(
                [tiers.timed(tiers.collect, tier) for _ in range(POLLS)]
            )
            if tier.statistics().jobs_in_flight != in_flight:
                raise RuntimeError("a job ended while the stream was held")
            stream.release()
            tiers.wait(tier, in_flight)
    with ExitStack() as stack:
        fs = tiers.FileSystem(stack, primary).tier
        found["0 in flight, fs"] = microseconds([tiers.timed(tiers.collect, fs) for _ in range(POLLS)])
    run.results["poll_us"] = {name: asdict(spread) for name, spread in found.items()}
    return found


def measure_lookups(run: Run) -> dict[str, Spread]:
    """Microseconds of a lookup of random keys by requests that know their positions, and of its part in the step's end.

    Beside it a dict, and the fs tier, whose thread looks for files after the end of the step: asked first, it answers
    RETRY, and asked again what the thread has found, here that there is none.
    """
    jobs = tiers.Jobs()
    size = LOOKUP_REQUESTS * LOOKUPS_A_REQUEST  # hits of a step are no more than the primary can hold
    primary = np.ones((size, SMALL_ROW_BYTES), dtype=np.uint8)
    keys = tiers.block_keys(LOOKUP_BLOCKS)
    table = {key: LookupResult.HIT for key in keys}
    draw = random.Random(LOOKUP_BLOCKS)
    times: dict[str, list[float]] = {}

    def note(what: str, call: Callable[..., object], *arguments: object) -> None:
        times.setdefault(what, []).append(tiers.timed(call, *arguments) / (LOOKUP_REQUESTS * LOOKUPS_A_REQUEST))

    with ExitStack() as stack:
        tier = tiers.ours(stack, primary, LOOKUP_BLOCKS)
        fs = tiers.FileSystem(stack, primary).tier
        for some in tiers.groups(keys, size):
            tiers.submit_alone(tier, jobs.store(some, np.arange(len(some), dtype=np.int32)))
        for step in range(LOOKUP_STEPS):
            known = tiers.groups(draw.sample(keys, LOOKUP_REQUESTS * LOOKUPS_A_REQUEST), LOOKUPS_A_REQUEST)
            unknown = tiers.groups(tiers.block_keys(LOOKUP_REQUESTS * LOOKUPS_A_REQUEST), LOOKUPS_A_REQUEST)
            contexts = [tiers.request(f"asks {step}.{number}", some) for number, some in enumerate(known)]
            for context in contexts:
                tier.on_new_request(context)
            note("hit, ours", _look_up, tier.lookup, known, contexts, LookupResult.HIT)
            note("end of step, ours", tiers.end_step, tier)
            note("miss, ours", _look_up, tier.lookup, unknown, contexts, LookupResult.MISS)
            note("hit, dict", _look_up, lambda key, _: table.get(key), known, contexts, LookupResult.HIT)
            note("miss, dict", _look_up, lambda key, _: table.get(key), unknown, contexts, None)
            note("first asked, fs", _look_up, fs.lookup, unknown, contexts, LookupResult.RETRY)
            note("end of step, fs", tiers.end_step, fs)
            _wait_for_files(fs, unknown[-1][-1], contexts[-1])
            note("miss, fs", _look_up, fs.lookup, unknown, contexts, LookupResult.MISS)
            for context in contexts:
                tier.on_request_finished(context)
                fs.on_request_finished(context)
    found = {name: microseconds(each) for name, each in times.items()}
    run.results["lookup_us"] = {name: asdict(spread) for name, spread in found.items()}
    return found


def _look_up(
    lookup: Callable[[bytes, Any], object],
    asked: Sequence[Sequence[bytes]],
    contexts: Sequence[Any],
    expected: LookupResult | None,
) -> None:
    for keys, context in zip(asked, contexts, strict=True):
        for key in keys:
            if lookup(key, context) is not expected:
                raise RuntimeError(f"a lookup did not answer {expected}")


def _wait_for_files(fs: Any, last: bytes, context: Any) -> None:
    """Until the fs tier's thread has looked for the last key of a step."""
    deadline = time.monotonic() + FS_LOOKUPS_S
    while fs.lookup(last, context) is LookupResult.RETRY:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the fs tier has not looked for a file in {FS_LOOKUPS_S:.0f} s")
        time.sleep(POLL_PAUSE_S)
        tiers.end_step(fs)


# ---------------------------------------------------------------------------------------------------------- blocks held


class NullStream:
    """Takes every copy, and makes none."""

    _DONE = SimpleNamespace(
        is_done=True, failed=False, reason=None, seconds=0.0, spans=[], synchronize=lambda seconds: True
    )

    def copy_rows(self, *_: object) -> Any:
        return self._DONE


class NullEngine:
    """So that millions of blocks need no memory but the index's."""

    name = "null"
    broken = None
    seconds_under_way = 0.0

    def __init__(self) -> None:
        self.load_stream = self.store_stream = NullStream()

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

    def spread(self, what: str) -> Spread:
        """Nanoseconds an operation."""
        return Spread.of([each * NS for each in self.times[what]])

    def _note(self, what: str, operations: int, call: Callable[[], None]) -> None:
        self.times.setdefault(what, []).append(tiers.timed(call) / operations)

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
        found[blocks] = {what: growing.spread(what) for what in growing.times}
        del growing
        gc.unfreeze()
        gc.collect()
    run.results["ns_by_blocks_held"] = {
        blocks: {what: asdict(spread) for what, spread in each.items()} for blocks, each in found.items()
    }
    return found


def measure_policies(run: Run) -> dict[str, Spread]:
    """Microseconds of a store of 32 blocks for which 32 go, and of its request's end, with our policy and a plain LRU
    one, in turns.
    """
    jobs = tiers.Jobs()
    primary = np.ones((tiers.JOB_BLOCKS, SUBMIT_ROW_BYTES), dtype=np.uint8)
    rows = np.arange(tiers.JOB_BLOCKS, dtype=np.int32)
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        compared = {
            "ours": tiers.ours(stack, primary, HELD_BLOCKS),
            "plain": tiers.ours(stack, primary, HELD_BLOCKS, eviction_policy="benchmarks.bench.plain_lru:PlainLru"),
        }
        order, draw = list(compared.items()), random.Random(1)
        for number, keys in enumerate(tiers.groups(tiers.block_keys(HELD_BLOCKS + POLICY_JOBS * tiers.JOB_BLOCKS))):
            draw.shuffle(order)
            for name, tier in order:
                job = jobs.store(keys, rows[: len(keys)])
                tier.on_new_request(job.req_context)
                store = tiers.timed(tiers.submit, tier, job)
                tiers.wait(tier, 1)
                end = tiers.timed(tier.on_request_finished, job.req_context)
                if number * tiers.JOB_BLOCKS > HELD_BLOCKS:
                    times.setdefault(f"an evicting store, {name}", []).append(store)
                    times.setdefault(f"a request ends, {name}", []).append(end)
    found = {name: microseconds(each) for name, each in times.items()}
    run.results["by_policy_us"] = {name: asdict(spread) for name, spread in found.items()}
    return found


def measure_prefixes(run: Run) -> dict[str, dict[int, Spread]]:
    """By the blocks of a request: "store", microseconds of a store of its last one, for which another one goes, where
    the others are here and nobody has spoken of it before; "end", nanoseconds a block of the call that it ends with.

    Before each store as many keys are handled, whatever the request: to find the caches cold is not what is measured.
    """
    jobs = tiers.Jobs()
    primary = np.ones((1, SMALL_ROW_BYTES), dtype=np.uint8)
    row = np.zeros(1, dtype=np.int32)
    found: dict[str, dict[int, Spread]] = {"store": {}, "end": {}}
    longest = max(PREFIXES)
    for prefix in PREFIXES:
        run.progress(f"a store behind {prefix:,} blocks")
        stores, ends = [], []
        with ExitStack() as stack:
            tier = tiers.ours(stack, primary, 2 * longest)
            tier.block_store.engine.store_stream = NullStream()  # type: ignore[assignment]
            others, before = tiers.block_keys(2 * longest), tiers.block_keys(prefix)
            for some in (*tiers.groups(others, 1000), *tiers.groups(before, 1000)):
                tier.block_store.submit_store(0, some, np.zeros(len(some), dtype=np.int32))
                tiers.collect(tier)
            for key in tiers.block_keys(PREFIX_REPETITIONS):
                job = jobs.store([key], row)
                context = tiers.request(f"request {job.job_id}", [*before, key])
                job.req_context = context
                tier.on_new_request(context)
                tiers.request("another one", others[:longest])
                stores.append(tiers.timed(tier.submit_store, job))
                tiers.collect(tier)
                ends.append(tiers.timed(tier.on_request_finished, context) / (prefix + 1))
        found["store"][prefix] = microseconds(stores)
        found["end"][prefix] = Spread.of([each * NS for each in ends])
    run.results["by_prefix"] = {
        what: {prefix: asdict(spread) for prefix, spread in each.items()} for what, each in found.items()
    }
    return found


def measure_memory(blocks: int, blocks_a_request: int) -> tuple[float, BlockIndex]:
    """(bytes of this process that a block of a full index takes, key included; the index).

    To be called before memory is freed.
    """

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gc.collect()
    before = resident()
    index = BlockIndex(blocks)
    for number in range(blocks // blocks_a_request):
        name = f"request {number}"
        index.fill(index.reserve(tiers.block_keys(blocks_a_request), name, None)[1])
        index.finish(name, None)
    gc.collect()
    return (resident() - before) / len(index), index


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
    memories = {}
    kept = []  # memory that one gives back would be used again by the next, and not show
    for blocks_a_request in MEMORY_REQUESTS:
        took, index = measure_memory(MEMORY_BLOCKS // (10 if options.quick else 1), blocks_a_request)
        memories[blocks_a_request] = took
        kept.append(index)
    del kept
    memory = max(memories.values())
    run.results["index_bytes_a_block"] = memories
    run.progress("submissions")
    submissions = measure_submissions(run, jobs)
    by_blocks = measure_blocks_a_job(run)
    run.progress("polls and lookups")
    hooks = measure_hooks(run)
    policies = measure_policies(run)
    prefixes = measure_prefixes(run)
    polls = measure_polls(run)
    lookups = measure_lookups(run)
    held = measure_growth(run, sizes)
    few, many = held[sizes[0]], held[sizes[-1]]
    growth = {name: many[name].median / few[name].median for name in few}
    run.results["growth"] = growth
    worse = max(("lookup", "store"), key=lambda what: growth[f"{what}, ours"] / growth[f"{what}, dict"])
    run.figures = [
        Figure(
            key="scheduler_cost.submit_vs_fs",
            what="submit_store of 32 blocks, with room",
            unit="us",
            ratio=submissions["store, ours"].median / submissions["store, fs"].median,
            goal=SUBMIT_VS_FS,
            goal_is="<=",
            ours=submissions["store, ours"].median,
            fs=submissions["store, fs"].median,
            example=submissions["store, example"].median,
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
            key="scheduler_cost.store_vs_plain_lru",
            what="submit_store of 32 blocks for which 32 go / with a plain LRU (baseline)",
            unit="us",
            ratio=policies["an evicting store, ours"].median / policies["an evicting store, plain"].median,
            goal=STORE_VS_PLAIN,
            goal_is="<=",
            ours=policies["an evicting store, ours"].median,
            limit=policies["an evicting store, plain"].median,
        ),
        Figure(
            key="scheduler_cost.store_behind_prefix",
            what=f"a store of one block behind {PREFIXES[1]:,} / behind {PREFIXES[0]} (baseline)",
            unit="us",
            ratio=prefixes["store"][PREFIXES[1]].median / prefixes["store"][PREFIXES[0]].median,
            goal=BEHIND_LONG_PREFIX,
            goal_is="<=",
            ours=prefixes["store"][PREFIXES[1]].median,
            limit=prefixes["store"][PREFIXES[0]].median,
        ),
        Figure(
            key="scheduler_cost.request_end",
            what=f"the end of a request of {PREFIXES[1]:,} blocks, a block / of {PREFIXES[0]} (baseline)",
            unit="ns",
            ratio=prefixes["end"][PREFIXES[1]].median / prefixes["end"][PREFIXES[0]].median,
            goal=END_OF_LONG_REQUEST,
            goal_is="<=",
            ours=prefixes["end"][PREFIXES[1]].median,
            limit=prefixes["end"][PREFIXES[0]].median,
        ),
        Figure(
            key="scheduler_cost.bytes_per_block",
            what="memory of the index, key included, whatever the blocks of a request",
            unit="bytes",
            ratio=memory,
            goal=BYTES_A_BLOCK,
            goal_is="<=",
            ours=memory,
        ),
    ]
    print(cost_table(submissions, by_blocks, polls, lookups, held))
    print("\n".join(beside("policies, jobs of 32, us", policies, ("plain",))))
    print(f"asking whether there is a trace, where there is none: {hooks:.0f} ns a job")
    draw(run, by_blocks, held)
    run.finish()
    return 0


def cost_table(
    submissions: dict[str, Spread],
    by_blocks: dict[str, dict[int, Spread]],
    polls: dict[str, Spread],
    lookups: dict[str, Spread],
    held: dict[int, dict[str, Spread]],
) -> str:
    """Everything that was measured."""
    sweep, growth = {}, {}
    for name, each in by_blocks.items():
        what, _, whose = name.rpartition(", ")
        sweep |= {f"{what}, {blocks}, {whose}": spread for blocks, spread in each.items()}
    for blocks, found in held.items():
        for name, spread in found.items():
            what, _, whose = name.rpartition(", ")
            growth[f"{what}, {blocks:,} held, {whose}"] = spread
    return "\n".join(
        [
            *beside("jobs of 32 blocks, us", submissions, ("fs", "example")),
            *beside("jobs by their blocks, us", sweep, ("fs", "example")),
            "sums of these medians, us",
            *sums(by_blocks),
            *beside("polls that find nothing, us", polls, ("fs",)),
            *beside(f"lookups, {LOOKUP_BLOCKS:,} held, us", lookups, ("fs", "dict")),
            *beside("stores are of 32 blocks, ns", growth, ("dict",)),
        ]
    )


def sums(by_blocks: dict[str, dict[int, Spread]]) -> list[str]:
    """What a job of 32 blocks takes in all, its submission and its end."""
    lines = []
    for kind in KINDS:
        took = {
            whose: sum(by_blocks[f"{what} {kind}, {whose}"][tiers.JOB_BLOCKS].median for what in ("submit", "poll"))
            for whose in ("ours", "fs", "example")
        }
        told = ", ".join(f"{whose} {us:.0f}" for whose, us in took.items())
        lines.append(
            f"  {kind} of {tiers.JOB_BLOCKS}, submission and end: {told}, ours / fs {took['ours'] / took['fs']:.2f}"
        )
    return lines


def beside(head: str, spreads: dict[str, Spread], others: Sequence[str]) -> list[str]:
    """Lines of a table: spreads called "WHAT, WHOSE", ours beside others', and the ratio to the first of those."""
    rows: dict[str, dict[str, Spread]] = {}
    for name, spread in spreads.items():
        what, _, whose = name.rpartition(", ")
        rows.setdefault(what, {})[whose] = spread
    width = len(QUARTILES)
    lines = [
        f"{'':28}" + "".join(f"{whose:>{width}}" for whose in ("ours", *others)),
        f"{head:28}" + QUARTILES * (1 + len(others)) + f"{'/' + others[0]:>8}",
    ]
    for what, found in rows.items():
        line = f"{what:28}"
        line += "".join(found[whose].cells() if whose in found else " " * width for whose in ("ours", *others))
        if "ours" in found and others[0] in found:
            line += f"{found['ours'].median / found[others[0]].median:8.3f}"
        lines.append(line.rstrip())
    return lines


def draw(run: Run, by_blocks: dict[str, dict[int, Spread]], held: dict[int, dict[str, Spread]]) -> None:
    with figure(run.picture, ncols=3, figsize=(15, 4.4)) as (_, (left, middle, right)):
        for axes, what in ((left, "submit"), (middle, "poll")):
            for name, color in (("ours", "#4c72b0"), ("fs", "#dd8452"), ("example", "#8c8c8c")):
                for kind, style in (("store", "o-"), ("load", "s--")):
                    plot_spreads(axes, by_blocks[f"{what} {kind}, {name}"], style, color, f"{name}, {kind}")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("blocks a job")
            axes.legend(fontsize="small")
        left.set_ylabel("us: median, quartiles as a band")
        left.set_title("Submission")
        middle.set_ylabel("us")
        middle.set_title("The poll that ends a job")
        sizes = list(held)
        for what, color in (("lookup", "#4c72b0"), ("store", "#55a868")):
            for whose, style in (("ours", "o-"), ("dict", "o:")):
                first = held[sizes[0]][f"{what}, {whose}"].median
                spreads = {size: held[size][f"{what}, {whose}"].times(1 / first) for size in sizes}
                plot_spreads(right, spreads, style, color, f"{what}, {whose}")
        right.set_xscale("log")
        right.set_xlabel("blocks held")
        right.set_ylabel(f"time, relative to {sizes[0]:,} blocks")
        right.set_title("Growth with the blocks held")
        right.legend()
        for axes in (left, middle, right):
            axes.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
