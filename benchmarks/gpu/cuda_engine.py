"""What the CUDA engine asks of the scheduler's thread, and what it does without it: `make bench-cuda`.

On the emulator a figure is a ratio within one run and no rate means anything; with ASYNC_TIER_CUDA=real it runs on a
GPU. The emulator's threads stand for hardware: they have what processor time is left.

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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

import numpy as np
import torch

from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.streams.base import CopyEvent
from benchmarks.gpu import EMULATED, emulator
from benchmarks.shared.common import Figure, Run, Spread, arguments
from benchmarks.shared.stores import opened

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


def make_hardware_idle() -> None:
    """The emulator's threads, which copy in the place of copy engines, are not to take the scheduler's processor."""
    for thread in os.listdir("/proc/self/task") if EMULATED else ():
        with open(f"/proc/self/task/{thread}/comm") as name:
            if name.read().startswith("cuda-stream"):
                os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))


@contextmanager
def slow_hardware() -> Iterator[None]:
    """The emulator's copies take the time that real ones would."""
    if emulator is not None:
        emulator.set_bandwidth(BANDWIDTH_GBPS)
    try:
        yield
    finally:
        if emulator is not None:
            emulator.set_bandwidth(0)


def keys_of(name: object, blocks: range) -> list[bytes]:
    return [f"{name} {block}".encode() for block in blocks]


def store_all(store: BlockStore, name: object, count: int, wait: bool = True) -> None:
    """Store blocks 0 to `count` of that name, in jobs of BLOCKS."""
    for at in range(0, count, BLOCKS):
        store.submit_store(at, keys_of(name, range(at, at + BLOCKS)), range(BLOCKS))
    if wait:
        store.drain()
        store.poll()


class Submits:
    """A store, and how long its submits take, in us."""

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self.took: list[float] = []
        self._draw = np.random.default_rng(1)

    def run(self) -> None:
        keys = keys_of(len(self.took), range(BLOCKS))
        rows = self._draw.permutation(self.store.primary.count)[:BLOCKS].astype(np.int32)
        started = time.perf_counter()
        self.store.submit_store(1, keys, rows)
        self.took.append((time.perf_counter() - started) * 1e6)
        self.store.drain()
        if [end.success for end in self.store.poll()] != [True]:
            raise RuntimeError("a store has failed")
        self.store.clear()


def measure_submits(run: Run, quick: bool, pool: str) -> None:
    """Jobs of large and of small blocks, by this engine and by copy threads."""
    run.progress(f"submits of {BLOCKS} blocks, pool {pool}")
    caches = np.zeros(CACHES_BYTES, np.uint8)
    submits: dict[tuple[str, str], Submits] = {}
    with ExitStack() as stack:
        for engine, where in (("cuda", pool), ("host", "host")):
            for size, row_bytes in (("small", SMALL), ("large", LARGE)):
                store = stack.enter_context(opened(where, BLOCKS, row_bytes, 2 * BLOCKS, engine))
                submits[engine, size] = Submits(store)
        for each in submits.values():
            each.run()
        make_hardware_idle()
        for _ in range(SUBMITS // (10 if quick else 1)):
            for each in submits.values():
                caches[:] = 1
                each.run()
    times = {key: each.took[1:] for key, each in submits.items()}
    spreads = {key: Spread.of(each) for key, each in times.items()}
    run.results[f"submit us, pool {pool}"] = {", ".join(key): asdict(spread) for key, spread in spreads.items()}
    what = f"submit of {BLOCKS} scattered blocks, pool {pool}"
    of_cuda, of_host = (Spread.of(times[engine, "small"] + times[engine, "large"]) for engine in ("cuda", "host"))
    for key, text, ours, baseline, goal in (
        ("large_vs_small", "4 MiB each / 4 KiB each", spreads["cuda", "large"], spreads["cuda", "small"], "<= 1.2"),
        ("vs_host_engine", "both sizes, cuda engine / host engine", of_cuda, of_host, "<= 1.3"),
    ):
        run.figures.append(ratio(f"submit_{key}.{pool}", f"{what}: {text}", ours, baseline.median, goal))


def ratio(key: str, what: str, ours: Spread, baseline: float, goal: str) -> Figure:
    return Figure(
        key=f"cuda_engine.{key}",
        what=what + " (median; interval: its quartiles over the same)",
        unit="us",
        ratio=ours.median / baseline,
        goal=goal,
        ours=ours.median,
        limit=baseline,
        low=ours.low / baseline,
        high=ours.high / baseline,
    )


def measure_wakes(run: Run, quick: bool) -> None:
    """From a submit to the moment at which the engine's thread begins with the job, which had nothing to do before."""
    run.progress("wake-ups")
    took = []
    with opened("cuda:0", BLOCKS, LARGE) as store, slow_hardware():
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
    spread = Spread.of(took)
    run.results["wake us"] = asdict(spread)
    what = f"from a submit to the moment at which the engine's idle thread begins / {WAKE_US:.0f} us"
    run.figures.append(ratio("wake", what, spread, WAKE_US, "<= 1"))


def measure_unattended(run: Run, quick: bool, pool: str) -> None:
    """How much of what is queued has ended when the scheduler calls again after a second.

    With pool "host" each byte is copied twice: on a machine of two cores that is what the emulator's copies take.
    """
    run.progress(f"stores and loads that nobody looks after, pool {pool}")
    total = UNATTENDED_BYTES // (8 if quick else 1)
    count = total // 2 // LARGE  # blocks of each
    with opened(pool, 2 * count, LARGE, BLOCKS) as store:
        store_all(store, "first", 2 * count)  # so that all memory has its pages
        store.clear()
        store_all(store, "old", count)
        events: list[CopyEvent] = []
        for at in range(0, count, BLOCKS):
            blocks = range(at, at + BLOCKS)
            store.submit_store(1000 + at, keys_of("new", blocks), range(BLOCKS))
            store.submit_load(2000 + at, keys_of("old", blocks), range(BLOCKS))
            events += [store._stores[-1].event, store._loads[-1].event]
        started = time.perf_counter()
        threading.Event().wait(1.0)  # the scheduler is busy with something else
        done = sum(event.is_done for event in events) / len(events)
        for event in events:
            event.synchronize()
        took = time.perf_counter() - started
        if not all(end.success for end in store.poll()):
            run.failures.append("a job that nobody looked after has failed")
    run.results[f"unattended, pool {pool}"] = {"bytes": total, "ended within a second": done, "seconds for all": took}
    run.figures.append(
        Figure(
            key=f"cuda_engine.unattended.{pool}",
            what=f"of {total >> 20} MiB of stores and loads, queued at once, what has ended after a second of no "
            f"call; pool {pool}",
            unit="share",
            ratio=done,
            goal=">= 1",
            ours=done,
            limit=1.0,
        )
    )


def measure_load_behind_stores(run: Run, quick: bool, pool: str) -> None:
    """The latency of a load behind queued stores, less that on an idle engine, in times of the bound."""
    count = QUEUED_BYTES // (8 if quick else 1) // LARGE
    bound = TierConfig().max_inflight_store_bytes
    run.progress(f"loads behind {count * LARGE >> 20} MiB of stores, pool {pool}")
    idle, behind = [], []
    wanted = keys_of("wanted", range(LOAD_BLOCKS))

    def load(store: BlockStore) -> float:
        started = time.perf_counter()
        store.submit_load(10_000, wanted, range(LOAD_BLOCKS))
        store._loads[-1].event.synchronize()
        return time.perf_counter() - started

    with opened(pool, count + LOAD_BLOCKS, LARGE, BLOCKS) as store:
        for turn in range(1 if quick else LOADS):
            with slow_hardware():
                store.submit_store(0, wanted, range(LOAD_BLOCKS))
                store.drain()
                idle.append(load(store))
                store_all(store, turn, count, wait=False)
                behind.append(load(store))
                if store._stores[-1].event.is_done:
                    run.failures.append("the stores ended before the load")
            store.drain()
            store.poll()
            store.clear()
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
            goal="<= 1",
            ours=(behind_s - idle_s) * 1e3,
            limit=bound / rate * 1e3,
        )
    )


def main() -> int:
    options = arguments(__doc__).parse_args()
    run = Run("cuda_engine", "submits, what nobody looks after, and loads behind stores", options.output)
    torch.cuda.init()
    for pool in POOLS:
        measure_submits(run, options.quick, pool)
    measure_wakes(run, options.quick)
    for measure in (measure_unattended, measure_load_behind_stores):
        for pool in POOLS:
            measure(run, options.quick, pool)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
