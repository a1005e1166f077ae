"""What the tier takes from the scheduler's thread: submit, poll, lookup, a request's end.

Next to vLLM's fs tier, to its example tier, which moves no data, to a plain LRU policy and to a bare dict; also against
the blocks held and the blocks of a request. Nothing here waits for copies: what is timed are the calls. Times are
medians with their quartiles, and ratios are those of medians of the same run.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import LookupResult

from benchmarks.bench.growth import (
    GROWTH_JOBS,
    GROWTH_LOOKUPS,
    GROWTH_REPETITIONS,
    MEMORY_BLOCKS,
    NS,
    QUICK_SIZES,
    SIZES,
    SMALL_ROW_BYTES,
    US,
    NullStream,
    Times,
    growth_figure,
    measure_growth,
    measure_memory,
)
from benchmarks.shared import tiers
from benchmarks.shared.common import QUARTILES, Figure, Run, Spread, arguments

# A page: what O_DIRECT, which the fs tier prefers, can write.
SUBMIT_ROW_BYTES = 4096
HELD_BLOCKS = 10_000
SUBMIT_JOBS = 300
POLLS = 1000
HOOK_CALLS = 100_000
LOOKUP_BLOCKS, LOOKUP_STEPS, LOOKUPS_A_STEP = 100_000, 30, 4096
# Blocks before the one that is stored, and of a request that ends.
PREFIXES = (100, 62_500)
PREFIX_REPETITIONS = 15


# ---------------------------------------------------------------------------------------------------------- submissions


def measure_jobs(repetitions: int) -> dict[str, Spread]:
    """Microseconds of a store of 32 blocks, of a load of the same and of the end of its request, the tiers in turns.

    Two of them are full, so that 32 blocks go for a store: "evicting" with our policy, "plain" with a plain LRU one. Of
    one tier also what of a store it takes to hand the copies to the copy threads: one of its own, because a clock takes
    time too.
    """
    jobs, times = tiers.Jobs(), Times(US)
    primary = np.ones((tiers.JOB_BLOCKS, SUBMIT_ROW_BYTES), dtype=np.uint8)
    rows = np.arange(tiers.JOB_BLOCKS, dtype=np.int32)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        room = HELD_BLOCKS + repetitions * tiers.JOB_BLOCKS
        plain = "benchmarks.bench.plain_lru:PlainLru"
        ours = {
            "ours": tiers.ours(stack, primary, room),
            "tracing": tiers.ours(stack, primary, room, trace_path=f"{folder}/trace.json"),
            "taken apart": tiers.ours(stack, primary, room),
            "evicting": tiers.ours(stack, primary, HELD_BLOCKS),
            "plain": tiers.ours(stack, primary, HELD_BLOCKS, eviction_policy=plain),
        }
        for keys in tiers.groups(tiers.block_keys(HELD_BLOCKS)):
            for tier in ours.values():
                tiers.submit_alone(tier, jobs.store(keys, rows[: len(keys)]))
        stream: Any = ours["taken apart"].block_store.engine.store_stream
        copy_rows = stream.copy_rows

        def timed_copy_rows(*arguments: object) -> object:
            events: list[object] = []
            times.call("of it, handing over, taken apart", lambda: events.append(copy_rows(*arguments)))
            return events[0]

        stream.copy_rows = timed_copy_rows
        compared = {**ours, "fs": tiers.FileSystem(stack, primary).tier, "example": tiers.example(stack, primary)}
        order, draw = list(compared.items()), random.Random(1)
        for keys in tiers.groups(tiers.block_keys(repetitions * tiers.JOB_BLOCKS)):
            draw.shuffle(order)  # whoever follows the fs tier's threads finds the caches cold
            for name, tier in order:
                store, load = jobs.store(keys, rows), jobs.load(keys, rows)
                tier.on_new_request(store.req_context)
                times.call(f"store, {name}", tiers.submit, tier, store)
                tiers.wait(tier, 1)
                times.call(f"a request ends, {name}", tier.on_request_finished, store.req_context)
                times.add(f"load, {name}", tiers.submit_alone(tier, load))
    return times.spreads()


def measure_prefixes(run: Run) -> dict[str, dict[int, Spread]]:
    """By the blocks of a request: "store", microseconds of a store of its last one, for which another one goes, where
    the others are here and nobody has spoken of it before; "end", nanoseconds a block of the call that it ends with.

    Before each store as many keys are handled, whatever the request: to find the caches cold is not what is measured.
    """
    jobs = tiers.Jobs()
    primary, row = np.ones((1, SMALL_ROW_BYTES), dtype=np.uint8), np.zeros(1, dtype=np.int32)
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
                job.req_context = tiers.request(f"request {job.job_id}", [*before, key])
                tier.on_new_request(job.req_context)
                tiers.request("another one", others[:longest])
                stores.append(tiers.timed(tier.submit_store, job) * US)
                tiers.collect(tier)
                ends.append(tiers.timed(tier.on_request_finished, job.req_context) / (prefix + 1) * NS)
        found["store"][prefix], found["end"][prefix] = Spread.of(stores), Spread.of(ends)
    return found


# -------------------------------------------------------------------------------------------------- polls and lookups


def measure_polls_and_lookups() -> dict[str, Spread]:
    """Microseconds of a poll of an idle tier, and of lookups of random keys by a request that knows their positions."""
    jobs, times = tiers.Jobs(), Times(US)
    # Hits of a step are no more than the primary can hold.
    primary = np.ones((LOOKUPS_A_STEP, SMALL_ROW_BYTES), dtype=np.uint8)
    keys = tiers.block_keys(LOOKUP_BLOCKS)
    table = {key: LookupResult.HIT for key in keys}
    draw = random.Random(LOOKUP_BLOCKS)

    def look_up(lookup: Callable[[bytes, Any], object], asked: Sequence[bytes], context: Any, expected: object) -> None:
        for key in asked:
            if lookup(key, context) is not expected:
                raise RuntimeError(f"a lookup did not answer {expected}")

    with ExitStack() as stack:
        tier = tiers.ours(stack, primary, LOOKUP_BLOCKS)
        for some in tiers.groups(keys, LOOKUPS_A_STEP):
            tiers.submit_alone(tier, jobs.store(some, np.arange(len(some), dtype=np.int32)))
        for _ in range(POLLS):
            times.call("a poll, idle, ours", tiers.collect, tier)
        for step in range(LOOKUP_STEPS):
            known, unknown = draw.sample(keys, LOOKUPS_A_STEP), tiers.block_keys(LOOKUPS_A_STEP)
            context = tiers.request(f"asks {step}", known)
            tier.on_new_request(context)
            for what, lookup, asked, expected in (
                ("hit, ours", tier.lookup, known, LookupResult.HIT),
                ("end of step, ours", lambda _key, _context: tiers.end_step(tier), [b""], None),
                ("miss, ours", tier.lookup, unknown, LookupResult.MISS),
                ("hit, dict", lambda key, _: table.get(key), known, LookupResult.HIT),
                ("miss, dict", lambda key, _: table.get(key), unknown, None),
            ):
                times.call(what, look_up, lookup, asked, context, expected, operations=LOOKUPS_A_STEP)
            tier.on_request_finished(context)
    return times.spreads()


def measure_hooks() -> float:
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
    return (asked - looped) / HOOK_CALLS * NS


# ---------------------------------------------------------------------------------------------------------- the report


def figures(submissions: dict[str, Spread], prefixes: dict[str, dict[int, Spread]]) -> list[Figure]:
    """Those that are ratios of two medians."""
    short, long = PREFIXES
    stores = {name: submissions[f"store, {name}"] for name in ("ours", "fs", "example")}
    found = [
        Figure(
            "scheduler_cost.submit_vs_fs",
            "submit_store of 32 blocks, with room",
            "us",
            stores["ours"].median / stores["fs"].median,
            "<= 0.6",
            **{name: each.median for name, each in stores.items()},
        )
    ]
    for key, what, unit, goal, ours, baseline in (
        (
            "store_vs_plain_lru",
            "submit_store of 32 blocks for which 32 go / with a plain LRU (baseline)",
            "us",
            "<= 1.2",
            submissions["store, evicting"],
            submissions["store, plain"],
        ),
        (
            "store_behind_prefix",
            f"a store of one block behind {long:,} / behind {short} (baseline)",
            "us",
            "<= 2",
            prefixes["store"][long],
            prefixes["store"][short],
        ),
        (
            "request_end",
            f"the end of a request of {long:,} blocks, a block / of {short} (baseline)",
            "ns",
            "<= 2",
            prefixes["end"][long],
            prefixes["end"][short],
        ),
    ):
        ratio = ours.median / baseline.median
        shown = {"ours": ours.median, "limit": baseline.median}
        found.append(Figure(f"scheduler_cost.{key}", what, unit, ratio, goal, **shown))
    return found


def table(head: str, spreads: dict[str, Spread]) -> str:
    return "\n".join([f"{head:44}{QUARTILES}", *(f"  {what:42}{each.cells()}" for what, each in spreads.items())])


def main() -> int:
    options = arguments(__doc__).parse_args()
    logging.getLogger("vllm").setLevel(logging.WARNING)
    jobs = 30 if options.quick else SUBMIT_JOBS
    run = Run(
        "scheduler_cost",
        f"Calls of one thread, medians. Submissions: {HELD_BLOCKS:,} blocks stored to warm up, then {jobs} jobs of 32 "
        f"blocks, the tiers in turns. Growth: {GROWTH_REPETITIONS} rounds of {GROWTH_LOOKUPS} lookups and "
        f"{GROWTH_JOBS} stores of 32 blocks into a full tier with an arena that has no memory.",
        options.output,
    )
    run.progress("memory of the index")
    memories = measure_memory(MEMORY_BLOCKS // (10 if options.quick else 1))
    run.progress("submissions")
    submissions = measure_jobs(jobs)
    run.progress("polls and lookups")
    hooks, calls = measure_hooks(), measure_polls_and_lookups()
    prefixes = measure_prefixes(run)
    held = measure_growth(run, QUICK_SIZES if options.quick else SIZES)
    growth = {f"{what}, {blocks:,} held": each for blocks, found in held.items() for what, each in found.items()}
    by_prefix = {
        f"{what}, {blocks:,} blocks": each for what, found in prefixes.items() for blocks, each in found.items()
    }
    tables = {
        "jobs of 32 blocks, us": submissions,
        f"calls, {LOOKUP_BLOCKS:,} blocks held, us": calls,
        "a store behind blocks, us, and a request's end, ns a block": by_prefix,
        "stores are of 32 blocks, ns": growth,
    }
    run.results = {head: {what: asdict(each) for what, each in found.items()} for head, found in tables.items()}
    run.results |= {"index_bytes_a_block": memories, "tracing_off_ns_a_job": hooks}
    worst = max(memories.values())
    of_index = "memory of the index, key included, whatever the blocks of a request"
    run.figures = [
        *figures(submissions, prefixes),
        growth_figure(held),
        Figure("scheduler_cost.bytes_per_block", of_index, "bytes", worst, "<= 300", ours=worst),
    ]
    print("\n".join(table(head, found) for head, found in tables.items()))
    print(f"asking whether there is a trace, where there is none: {hooks:.0f} ns a job")
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
