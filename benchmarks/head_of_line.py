"""How long a load waits behind stores: its latency while 2 GiB of stores are queued, against an idle tier.

A prompt whose blocks lie in the tier waits for a load of 16 blocks. The stores queued ahead of it are those of other
requests, and nobody waits for them.
"""

from __future__ import annotations

import os
import random
import sys
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks import tiers
from benchmarks.common import Figure, Run, arguments, figure

KIB, MIB = 1 << 10, 1 << 20
ROW_BYTES = 256 * KIB
LOAD_BLOCKS = 16
QUEUED_BYTES = 2 << 30
# Loads that are measured in one go, while the queue of stores is kept full.
SAMPLES = 300
# But no longer than this on a tier on which each takes a second, and no fewer than these.
LOADED_S, FEWEST_SAMPLES = 45.0, 20
# Idle samples before the measured ones.
WARM_UPS = 20
# The stored blocks that loads ask for.
KEPT_JOBS = 16
# Rows that are stored from, and then those that are loaded to.
SOURCE_ROWS, TARGET_ROWS = 1024, 64
P99_VS_IDLE = 2.0
# The thread that polls takes a core; copy threads that have to share it wait for their turn in the middle of a piece.
COPY_THREADS = max(1, min(2, len(os.sched_getaffinity(0)) - 1))


class Contender:
    """A tier, what is queued on it, and the loads that are measured."""

    def __init__(self, tier: Any, fs: tiers.FileSystem | None, queued_bytes: int, warm_up_blocks: int = 0) -> None:
        self.tier = tier
        self.fs = fs
        self._jobs = tiers.Jobs()
        self._draw = random.Random(1)
        self._queued_jobs = queued_bytes // ROW_BYTES // tiers.JOB_BLOCKS
        self._in_flight: set[int] = set()
        self._ended: set[int] = set()
        self.least_queued = queued_bytes
        self.store(warm_up_blocks)
        self._kept = [tiers.block_keys(LOAD_BLOCKS) for _ in range(KEPT_JOBS)]
        for keys in self._kept:
            tiers.submit_alone(tier, self._jobs.store(keys, self._rows(LOAD_BLOCKS)))
        if fs is not None:
            fs.keep_blocks()

    def latency(self, loaded: bool) -> float:
        """Seconds from a load's submission until its end is seen; `loaded`: behind a full queue of stores."""
        if loaded:
            self._fill(self._queued_jobs)
        if self.fs is None:  # as vLLM does before a load; so that the stores do not evict what is asked for
            context = tiers.request("asks")
            for keys in self._kept:
                for key in keys:
                    self.tier.lookup(key, context)
        targets = np.arange(SOURCE_ROWS, SOURCE_ROWS + LOAD_BLOCKS, dtype=np.int32)
        job = self._jobs.load(self._draw.choice(self._kept), targets)
        self.tier.on_new_request(job.req_context)
        started = time.perf_counter()
        self.tier.submit_load(job)
        while job.job_id not in self._ended:
            self._collect()
        took = time.perf_counter() - started
        self._ended.clear()
        self.tier.on_request_finished(job.req_context)
        tiers.end_step(self.tier)
        if loaded:
            still_queued = len(self._in_flight) * tiers.JOB_BLOCKS * ROW_BYTES
            self.least_queued = min(self.least_queued, still_queued)
        return took

    def store(self, blocks: int) -> None:
        """Store that many blocks, and wait."""
        for _ in range(blocks // tiers.JOB_BLOCKS):
            self._fill(1)
            self.drain()

    def drain(self) -> None:
        while self._in_flight:
            self._collect()
        if self.fs is not None:
            self.fs.remove_blocks()

    def _fill(self, jobs: int) -> None:
        """Store until that many jobs are in flight."""
        while len(self._in_flight) < jobs:
            job = self._jobs.store(tiers.block_keys(tiers.JOB_BLOCKS), self._rows(tiers.JOB_BLOCKS))
            self._in_flight.add(job.job_id)
            self.tier.submit_store(job)

    def _collect(self) -> None:
        for result in self.tier.get_finished_jobs():
            if not result.success:
                raise RuntimeError(f"job {result.job_id} of {type(self.tier).__name__} failed")
            if result.job_id in self._in_flight:
                self._in_flight.remove(result.job_id)
            else:
                self._ended.add(result.job_id)

    def _rows(self, count: int) -> np.ndarray:
        return np.array(self._draw.sample(range(SOURCE_ROWS), count), dtype=np.int32)


def measure(run: Run, samples: int, queued_bytes: int) -> dict[str, dict[str, list[float]]]:
    """Latencies in seconds: by tier, "idle" and "loaded"."""
    latencies: dict[str, dict[str, list[float]]] = {}
    primary = np.ones((SOURCE_ROWS + TARGET_ROWS, ROW_BYTES), dtype=np.uint8)
    for name in ("ours", "fs"):
        with ExitStack() as stack:
            # Room for what is queued and kept, and a little more.
            blocks = 5 * queued_bytes // ROW_BYTES // 4 + KEPT_JOBS * LOAD_BLOCKS
            if name == "ours":
                tier = tiers.ours(stack, primary, blocks, copy_threads=COPY_THREADS)
                # Every row once: the first touch of memory is slow, most of all on a virtual machine.
                contender = Contender(tier, None, queued_bytes, warm_up_blocks=2 * blocks)
            else:
                fs = tiers.FileSystem(stack, primary)
                contender = Contender(fs.tier, fs, queued_bytes)
            run.progress(f"{name}: {samples} loads on an idle tier")
            for _ in range(WARM_UPS):
                contender.latency(loaded=False)
            idle = [contender.latency(loaded=False) for _ in range(samples)]
            run.progress(f"{name}: {samples} loads behind {queued_bytes / MIB:.0f} MiB of stores")
            contender.latency(loaded=True)
            contender.least_queued = queued_bytes
            loaded: list[float] = []
            deadline = time.monotonic() + LOADED_S
            while len(loaded) < samples and (time.monotonic() < deadline or len(loaded) < FEWEST_SAMPLES):
                loaded.append(contender.latency(loaded=True))
                if contender.fs is not None and len(loaded) % 4 == 0:
                    contender.fs.remove_blocks()  # tmpfs is memory
            contender.drain()
            latencies[name] = {"idle": idle, "loaded": loaded}
            run.results.setdefault("least_queued_mib", {})[name] = contender.least_queued / MIB
            run.results.setdefault("samples", {})[name] = len(loaded)
    return latencies


def main() -> int:
    options = arguments(__doc__).parse_args()
    samples, queued = (20, 64 * MIB) if options.quick else (SAMPLES, QUEUED_BYTES)
    run = Run(
        "head_of_line",
        f"Loads of {LOAD_BLOCKS} blocks of {ROW_BYTES // KIB} KiB, {samples} on an idle tier after {WARM_UPS} to warm "
        f"up, then {samples} with {queued / MIB:.0f} MiB of stores queued before each (what fits {LOADED_S:.0f} s). "
        f"{COPY_THREADS} copy thread(s). Latency: from submit_load until get_finished_jobs has reported it, polled "
        "without a pause.",
        options.output,
    )
    latencies = measure(run, samples, queued)
    p99 = {name: {kind: percentile(each, 99) for kind, each in both.items()} for name, both in latencies.items()}
    run.results["milliseconds"] = {
        name: {
            kind: {
                "p50": percentile(each, 50) * 1e3,
                "p99": p99[name][kind] * 1e3,
                "quartiles": [percentile(each, 25) * 1e3, percentile(each, 75) * 1e3],
            }
            for kind, each in both.items()
        }
        for name, both in latencies.items()
    }
    run.figures.append(
        Figure(
            key="head_of_line.p99_vs_idle",
            what="p99 of a 16-block load behind 2 GiB of stores / on an idle tier (limit: idle)",
            unit="ms",
            ratio=p99["ours"]["loaded"] / p99["ours"]["idle"],
            goal=P99_VS_IDLE,
            goal_is="<=",
            ours=p99["ours"]["loaded"] * 1e3,
            fs=p99["fs"]["loaded"] * 1e3,
            limit=p99["ours"]["idle"] * 1e3,
        )
    )
    with figure(run.picture, figsize=(8, 4.5)) as (_, axes):
        for name, color in (("ours", "#4c72b0"), ("fs", "#dd8452")):
            for kind, style in (("idle", "--"), ("loaded", "-")):
                values = np.sort(latencies[name][kind]) * 1e3
                share = np.arange(1, len(values) + 1) / len(values)
                label = f"{name}, {'idle' if kind == 'idle' else f'behind {queued / MIB:.0f} MiB of stores'}"
                axes.plot(values, share, style, color=color, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("latency of a load of 16 blocks, ms")
        axes.set_ylabel("share of loads")
        axes.set_title("A load behind queued stores")
        axes.grid(alpha=0.3)
        axes.legend()
    run.finish()
    return 0


def percentile(values: list[float], which: float) -> float:
    return float(np.percentile(values, which))


if __name__ == "__main__":
    sys.exit(main())
