"""What the CUDA engine asks of the scheduler's thread, and what it does without it: `make bench-cuda`.

It runs on the emulator, where a figure is a ratio within one run and no rate means anything; with
ASYNC_TIER_CUDA=real on a GPU. The emulator's threads stand for hardware: they have what processor time is left.

Submits are timed of jobs of as many blocks, large and small ones and those of the host engine in turn. Copies go
through the processor's caches here and leave little there: before each submit these are filled with something else.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

EMULATED = os.environ.get("ASYNC_TIER_CUDA") != "real"
if EMULATED:  # before anything imports torch
    from tests import cuda_emulator

    emulator = cuda_emulator.load()

import numpy as np
import torch

from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.streams.base import CopyEvent
from async_tier.streams.rows import Rows
from benchmarks.gpu.figures import until
from benchmarks.shared.common import Figure, Run, Spread, arguments
from tests.rows import zero_rows

KIB, MIB = 1 << 10, 1 << 20
BLOCKS = 64
SMALL, LARGE = 4 * KIB, 4 * MIB
SUBMITS = 60
CACHES_BYTES = 128 * MIB
POOLS = ("host", "cuda:0")
# Stores and loads that are queued at once, half of each; by the second they have all ended.
UNATTENDED_BYTES = 4 << 30
# A load of so many blocks behind so many bytes of stores, on copy engines that make so many GB/s.
LOAD_BLOCKS = 16
QUEUED_BYTES = 2 << 30
BANDWIDTH_GBPS = 2.0
LOADS = 5
WAKES, WAKE_US = 200, 50.0


@contextmanager
def opened(engine: str, pool: str, row_bytes: int, tier_rows: int, primary_rows: int) -> Iterator[BlockStore]:
    """A store, all of whose memory can be used."""
    primary = zero_rows(primary_rows, row_bytes)
    primary[:] = 1  # memory that was never written is one page of zeros
    options = {"engine": engine, "pool": pool, "bytes_to_use": tier_rows * row_bytes}
    store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))
    try:
        if store.statistics().engine != engine:
            raise RuntimeError("CUDA cannot be used here: see the warning above")
        until(lambda: store.arena.ready == tier_rows, "all of the tier's memory is pinned")
        yield store
    finally:
        store.close()


def make_hardware_idle() -> None:
    """The emulator's threads, which copy in the place of copy engines, are not to take the scheduler's processor."""
    for thread in os.listdir("/proc/self/task") if EMULATED else ():
        with open(f"/proc/self/task/{thread}/comm") as name:
            if name.read().startswith("cuda-stream"):
                os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))


class Submits:
    """A store, and how long its submits take, in us."""

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self.took: list[float] = []
        self._draw = np.random.default_rng(1)
        self._jobs = 0

    def run(self, timed: bool = True) -> None:
        self._jobs += 1
        keys = [b"%d %d" % (self._jobs, block) for block in range(BLOCKS)]
        rows = self._draw.permutation(self.store.primary.count)[:BLOCKS].astype(np.int32)
        started = time.perf_counter()
        self.store.submit_store(self._jobs, keys, rows)
        took = time.perf_counter() - started
        if timed:
            self.took.append(took * 1e6)
        self.store.drain()
        if [end.success for end in self.store.poll()] != [True]:
            raise RuntimeError("a store has failed")
        self.store.clear()


def measure_submits(run: Run, quick: bool) -> None:
    """Jobs of large and of small blocks, on both pools and on copy threads."""
    sizes = {"small": SMALL, "large": LARGE}
    caches = np.zeros(CACHES_BYTES, np.uint8)
    for pool in POOLS:
        run.progress(f"submits of {BLOCKS} blocks, pool {pool}")
        with (
            opened("cuda", pool, SMALL, BLOCKS, 2 * BLOCKS) as small,
            opened("cuda", pool, LARGE, BLOCKS, 2 * BLOCKS) as large,
            opened("host", "host", SMALL, BLOCKS, 2 * BLOCKS) as host_small,
            opened("host", "host", LARGE, BLOCKS, 2 * BLOCKS) as host_large,
        ):
            ours = {"small": Submits(small), "large": Submits(large)}
            host = {"small": Submits(host_small), "large": Submits(host_large)}
            for engine in (ours, host):
                engine["large"].run(timed=False)
            make_hardware_idle()
            for _ in range(SUBMITS // (10 if quick else 1)):
                for engine in (ours, host):
                    for size in sizes:
                        caches[:] = 1
                        engine[size].run()
        spreads = {
            f"{name}, {size}": Spread.of(engine[size].took)
            for name, engine in (("cuda", ours), ("host", host))
            for size in sizes
        }
        run.results[f"submit us, pool {pool}"] = {name: asdict(spread) for name, spread in spreads.items()}
        what = f"submit of {BLOCKS} scattered blocks, pool {pool}"
        of_large, of_small = spreads["cuda, large"], spreads["cuda, small"]
        of_host = Spread.of([*host["small"].took, *host["large"].took])
        run.figures += [
            ratio(f"submit_large_vs_small.{pool}", f"{what}: 4 MiB each / 4 KiB each", of_large, of_small, 1.2),
            ratio(
                f"submit_vs_host_engine.{pool}",
                f"{what}, of both sizes: cuda engine / host engine",
                Spread.of([*ours["small"].took, *ours["large"].took]),
                of_host,
                1.3,
            ),
        ]


def ratio(key: str, what: str, ours: Spread, baseline: Spread, goal: float) -> Figure:
    return Figure(
        key=f"cuda_engine.{key}",
        what=what + " (medians; interval: quartiles of the one over the median of the other)",
        unit="us",
        ratio=ours.median / baseline.median,
        goal=goal,
        goal_is="<=",
        ours=ours.median,
        limit=baseline.median,
        low=ours.low / baseline.median,
        high=ours.high / baseline.median,
    )


def measure_wakes(run: Run, quick: bool) -> None:
    """From a submit to the moment at which the engine's thread begins with the job, which had nothing to do before."""
    run.progress("wake-ups")
    took = []
    with opened("cuda", "cuda:0", LARGE, BLOCKS, BLOCKS) as store:
        if EMULATED:
            emulator.set_bandwidth(BANDWIDTH_GBPS)
        make_hardware_idle()
        for turn in range(WAKES // (10 if quick else 1)):
            started = time.perf_counter()
            store.submit_store(turn, [b"%d" % turn], [turn % BLOCKS])
            while not (under_way := store.engine.seconds_under_way):
                if store._stores[-1].event.is_done:
                    raise RuntimeError("a copy of 4 MiB took no time")
            took.append((time.perf_counter() - under_way - started) * 1e6)
            store.drain()
            store.poll()
        if EMULATED:
            emulator.set_bandwidth(0)
    spread = Spread.of(took)
    run.results["wake us"] = asdict(spread)
    run.figures.append(
        Figure(
            key="cuda_engine.wake",
            what="from the call of a submit to the moment at which the engine's idle thread begins / 50 us "
            "(median; interval: quartiles)",
            unit="us",
            ratio=spread.median / WAKE_US,
            goal=1.0,
            goal_is="<=",
            ours=spread.median,
            limit=WAKE_US,
            low=spread.low / WAKE_US,
            high=spread.high / WAKE_US,
        )
    )


def measure_unattended(run: Run, quick: bool) -> None:
    """How much of what is queued has ended when the scheduler calls again after a second.

    With pool "host" each byte is copied twice: on a machine of two cores that is what the emulator's copies take.
    """
    total = UNATTENDED_BYTES // (8 if quick else 1)
    count = total // 2 // LARGE  # blocks of each
    for pool in POOLS:
        run.progress(f"stores and loads that nobody looks after, pool {pool}")
        with opened("cuda", pool, LARGE, 2 * count, BLOCKS) as store:
            done, took = unattended(store, count)
            if not all(end.success for end in store.poll()):
                run.failures.append("a job that nobody looked after has failed")
        run.results[f"unattended, pool {pool}"] = {
            "bytes": total,
            "ended within a second": done,
            "seconds for all": took,
        }
        run.figures.append(
            Figure(
                key=f"cuda_engine.unattended.{pool}",
                what=f"of {total >> 20} MiB of stores and loads, queued at once, what has ended after a second of no "
                f"call; pool {pool}",
                unit="share",
                ratio=done,
                goal=1.0,
                goal_is=">=",
                ours=done,
                limit=1.0,
            )
        )


def unattended(store: BlockStore, count: int) -> tuple[float, float]:
    """The share of jobs that have ended after a second without a call, and the seconds that all of them take."""

    def store_blocks(name: bytes, blocks: int) -> None:
        for at in range(0, blocks, BLOCKS):
            store.submit_store(at, [b"%b %d" % (name, block) for block in range(at, at + BLOCKS)], range(BLOCKS))
        store.drain()
        store.poll()

    store_blocks(b"first", 2 * count)  # so that all memory has its pages
    store.clear()
    store_blocks(b"old", count)
    events: list[CopyEvent] = []
    for at in range(0, count, BLOCKS):
        store.submit_store(1000 + at, [b"new %d" % block for block in range(at, at + BLOCKS)], range(BLOCKS))
        events.append(store._stores[-1].event)
        store.submit_load(2000 + at, [b"old %d" % block for block in range(at, at + BLOCKS)], range(BLOCKS))
        events.append(store._loads[-1].event)
    started = time.perf_counter()
    threading.Event().wait(1.0)  # the scheduler is busy with something else
    done = sum(event.is_done for event in events) / len(events)
    for event in events:
        event.synchronize()
    return done, time.perf_counter() - started


def measure_load_behind_stores(run: Run, quick: bool) -> None:
    """The latency of a load behind queued stores, less that on an idle engine, in times of the bound."""
    count = QUEUED_BYTES // (8 if quick else 1) // LARGE
    bound = TierConfig().max_inflight_store_bytes
    for pool in POOLS:
        run.progress(f"loads behind {count * LARGE >> 20} MiB of stores, pool {pool}")
        with opened("cuda", pool, LARGE, count + LOAD_BLOCKS, BLOCKS) as store:
            idle, behind = [], []
            wanted = [b"wanted %d" % block for block in range(LOAD_BLOCKS)]
            if EMULATED:
                emulator.set_bandwidth(BANDWIDTH_GBPS)
            for turn in range(1 if quick else LOADS):
                store.submit_store(0, wanted, range(LOAD_BLOCKS))
                store.drain()
                idle.append(load(store, wanted))
                for at in range(0, count, BLOCKS):
                    keys = [b"%d %d" % (turn, block) for block in range(at, at + BLOCKS)]
                    store.submit_store(1 + at, keys, range(BLOCKS))
                behind.append(load(store, wanted))
                if store._stores[-1].event.is_done:
                    run.failures.append("the stores ended before the load")
                if EMULATED:
                    emulator.set_bandwidth(0)
                store.drain()
                store.poll()
                store.clear()
                if EMULATED:
                    emulator.set_bandwidth(BANDWIDTH_GBPS)
            if EMULATED:
                emulator.set_bandwidth(0)
        idle_s, behind_s = statistics.median(idle), statistics.median(behind)
        rate = BANDWIDTH_GBPS * 1e9 if EMULATED else LOAD_BLOCKS * LARGE / idle_s
        run.results[f"load behind stores, pool {pool}"] = {"idle s": idle, "behind s": behind, "bound s": bound / rate}
        run.figures.append(
            Figure(
                key=f"cuda_engine.load_behind_stores.{pool}",
                what=f"what {LOAD_BLOCKS} blocks of 4 MiB take longer behind {count * LARGE >> 20} MiB of stores / "
                f"what the {bound >> 20} MiB take that may be under way; pool {pool}",
                unit="ms",
                ratio=(behind_s - idle_s) / (bound / rate),
                goal=1.0,
                goal_is="<=",
                ours=(behind_s - idle_s) * 1e3,
                limit=bound / rate * 1e3,
            )
        )


def load(store: BlockStore, keys: list[bytes]) -> float:
    started = time.perf_counter()
    store.submit_load(10_000, keys, range(LOAD_BLOCKS))
    store._loads[-1].event.synchronize()
    return time.perf_counter() - started


def main() -> int:
    options = arguments(__doc__).parse_args()
    run = Run("cuda_engine", "submits, what nobody looks after, and loads behind stores", options.output)
    torch.cuda.init()
    measure_submits(run, options.quick)
    measure_wakes(run, options.quick)
    measure_unattended(run, options.quick)
    measure_load_behind_stores(run, options.quick)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
