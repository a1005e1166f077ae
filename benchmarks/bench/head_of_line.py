"""How long a load waits behind stores: its latency while 2 GiB of stores are queued, against an idle tier.

A prompt whose blocks lie in the tier waits for a load of 16 blocks. The stores queued ahead of it are those of other
requests, and nobody waits for them. Some loads on the idle tier, then some behind stores, and so on: what the machine
does otherwise falls on both.

Queued are the bytes of stores that are submitted and not yet reported, by a poll immediately before the load is
submitted; a job counts whole until it is reported. A sample with less than 2 GiB then, or with no store left when the
load's end is seen, is refused and counted. Of too few samples nothing is said; if they are ours, the benchmark fails.
The same rule holds for vLLM's fs tier, whose threads copy in C but are
Python between copies: the thread that polls here, as a busy scheduler does, holds the GIL that they need.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.shared import tiers
from benchmarks.shared.common import Figure, Run, arguments, chance_interval

KIB, MIB = 1 << 10, 1 << 20
ROW_BYTES = 256 * KIB
LOAD_BLOCKS = 16
QUEUED_BYTES = 2 << 30
# Loads that are measured, if those behind stores fit in so many seconds. No figure depends on the fs tier's.
SAMPLES = {"ours": (300, 110.0), "fs": (100, 60.0)}
# Of the samples that are taken idle, then as many loaded, and so on.
TURN = 25
# Of fewer than these there are no quartiles and no 99th percentile.
FEWEST_FOR_QUARTILES, FEWEST_FOR_P99 = 20, 100
# With --quick.
QUICK_SAMPLES, QUICK_QUEUED_BYTES = {"ours": (100, 15.0), "fs": (25, 15.0)}, 256 * MIB
# Jobs beyond those asked for that are queued before the poll that counts: some end before it.
SPARE_JOBS = 8
# A queue that is not full by then does not fill: stores end as they are submitted.
FILL_S = 5.0
# The fs tier's files are removed when it has written so much: tmpfs is memory. Not more often: it takes a second or
# two, in which most of what is queued ends.
REMOVE_FROM_BYTES = 2 << 30
# Idle samples before the measured ones.
WARM_UPS = 20
# The stored blocks that loads ask for.
KEPT_JOBS = 16
# Rows that are stored from, and then those that are loaded to.
SOURCE_ROWS, TARGET_ROWS = 1024, 64
JOB_BYTES = tiers.JOB_BLOCKS * ROW_BYTES
# The thread that polls takes a core; copy threads that have to share it wait for their turn in the middle of a piece.
COPY_THREADS = max(1, min(2, len(os.sched_getaffinity(0)) - 1))


class Contender:
    """A tier, what is queued on it, and the loads that are measured."""

    def __init__(self, tier: Any, fs: tiers.FileSystem | None, queued_bytes: int, warm_up_blocks: int = 0) -> None:
        self.tier = tier
        self.fs = fs
        self._jobs = tiers.Jobs()
        self._draw = random.Random(1)
        self._queued_bytes = queued_bytes
        # Not yet reported: stores, and loads that have ended but are not yet taken note of.
        self._stores: set[int] = set()
        self._ended_loads: set[int] = set()
        # Bytes of stores that ended since the fs tier's files were removed.
        self._written = 0
        for _ in range(warm_up_blocks // tiers.JOB_BLOCKS):
            self._submit_store()
            self.drain()
        self._kept = [tiers.block_keys(LOAD_BLOCKS) for _ in range(KEPT_JOBS)]
        for keys in self._kept:
            tiers.submit_alone(tier, self._jobs.store(keys, self._rows(LOAD_BLOCKS)))
        if fs is not None:
            fs.keep_blocks()

    @property
    def queued(self) -> int:
        """Bytes of stores that are submitted and not reported."""
        return len(self._stores) * JOB_BYTES

    def load(self, is_behind_stores: bool) -> tuple[float, int, int]:
        """(seconds until a load's end is seen, bytes queued at its submission, bytes queued when its end was seen)."""
        if self.fs is None:  # which never evicts, and looks for files in its own time
            # As vLLM does before a load. Until the step has ended, stores do not evict what was hit.
            context = tiers.request("asks")
            for keys in self._kept:
                for key in keys:
                    self.tier.lookup(key, context)
        if is_behind_stores:
            self._fill()
        targets = np.arange(SOURCE_ROWS, SOURCE_ROWS + LOAD_BLOCKS, dtype=np.int32)
        job = self._jobs.load(self._draw.choice(self._kept), targets)
        self.tier.on_new_request(job.req_context)
        self._collect()
        queued = self.queued
        started = time.perf_counter()
        self.tier.submit_load(job)
        while job.job_id not in self._ended_loads:
            self._collect()
        took = time.perf_counter() - started
        self._ended_loads.clear()
        self.tier.on_request_finished(job.req_context)
        tiers.end_step(self.tier)
        return took, queued, self.queued

    def drain(self) -> None:
        while self._stores:
            self._collect()
        self.make_room(0)

    def make_room(self, written: int) -> None:
        """Remove what the fs tier has written, if it is so many bytes."""
        if self.fs is not None and self._written >= written:
            self.fs.remove_blocks()
            self._collect()  # what has ended meanwhile, of which most is removed too
            self._written = 0

    def _fill(self) -> None:
        """Store until as many bytes are queued as are asked for, and a little more, or for FILL_S."""
        deadline = time.monotonic() + FILL_S
        size = self._queued_bytes + SPARE_JOBS * JOB_BYTES
        while self.queued < size and time.monotonic() < deadline:
            self._submit_store()
            if self.queued >= size:
                self._collect()

    def _submit_store(self) -> None:
        job = self._jobs.store(tiers.block_keys(tiers.JOB_BLOCKS), self._rows(tiers.JOB_BLOCKS))
        self._stores.add(job.job_id)
        self.tier.submit_store(job)

    def _collect(self) -> None:
        for result in self.tier.get_finished_jobs():
            if not result.success:
                raise RuntimeError(f"job {result.job_id} of {type(self.tier).__name__} failed")
            if result.job_id in self._stores:
                self._stores.remove(result.job_id)
                self._written += JOB_BYTES
            else:
                self._ended_loads.add(result.job_id)

    def _rows(self, count: int) -> np.ndarray:
        return np.array(self._draw.sample(range(SOURCE_ROWS), count), dtype=np.int32)


@dataclass
class Latencies:
    """Of one tier, in seconds; and the least that was queued while they were taken, in bytes.

    too_short, ended: samples refused, because less was queued than asked for at the load's submission, or nothing any
    more at its end. took_s: of all samples behind stores.
    """

    idle: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    least_queued: float = math.inf
    too_short: int = 0
    ended: int = 0
    took_s: float = 0.0

    def take_behind_stores(self, contender: Contender, most: int, queued_bytes: int, seconds: float) -> None:
        """Until `most` samples count, or all of these took `seconds`."""
        started = time.monotonic()
        deadline = started + seconds - self.took_s
        contender.load(True)  # to warm up
        while len(self.loaded) < most and time.monotonic() < deadline:
            took, at_submission, at_end = contender.load(True)
            if at_submission < queued_bytes:
                self.too_short += 1
            elif not at_end:
                self.ended += 1
            else:
                self.loaded.append(took)
                self.least_queued = min(at_submission, self.least_queued)
            contender.make_room(REMOVE_FROM_BYTES)
        self.took_s += time.monotonic() - started

    def as_json(self) -> dict[str, Any]:
        return {
            "idle_ms": milliseconds(self.idle),
            "behind_stores_ms": milliseconds(self.loaded),
            "samples": {"idle": len(self.idle), "behind_stores": len(self.loaded)},
            "refused": {"less_queued_at_submission": self.too_short, "nothing_queued_at_end": self.ended},
            "least_bytes_queued": self.least_queued if self.loaded else None,
        }


def measure_tier(contender: Contender, samples: int, queued_bytes: int, seconds: float) -> Latencies:
    """`samples` loads on the idle tier, and as many behind stores if they do not take more than `seconds`."""
    found = Latencies()
    for _ in range(WARM_UPS):
        contender.load(False)
    while len(found.idle) < samples:
        contender.load(False)  # after the stores before it
        found.idle += [contender.load(False)[0] for _ in range(min(TURN, samples - len(found.idle)))]
        if found.took_s < seconds:
            found.take_behind_stores(contender, len(found.idle), queued_bytes, seconds)
            contender.drain()
    return found


def measure(run: Run, samples: dict[str, tuple[int, float]], queued_bytes: int) -> dict[str, Latencies]:
    """Latencies by tier. samples: how many, and seconds for those behind stores."""
    found: dict[str, Latencies] = {}
    primary = np.ones((SOURCE_ROWS + TARGET_ROWS, ROW_BYTES), dtype=np.uint8)
    for name, (count, seconds) in samples.items():
        with ExitStack() as stack:
            if name == "ours":
                # Room for what is queued and kept, and a little more.
                blocks = 5 * queued_bytes // ROW_BYTES // 4 + (KEPT_JOBS * LOAD_BLOCKS) + SPARE_JOBS * tiers.JOB_BLOCKS
                tier = tiers.ours(stack, primary, blocks, copy_threads=COPY_THREADS)
                # Every row once: the first touch of memory is slow, most of all on a virtual machine.
                contender = Contender(tier, None, queued_bytes, warm_up_blocks=2 * blocks)
            else:
                fs = tiers.FileSystem(stack, primary)
                contender = Contender(fs.tier, fs, queued_bytes)
            run.progress(f"{name}: {count} loads on an idle tier, and behind {queued_bytes / MIB:.0f} MiB of stores")
            found[name] = measure_tier(contender, count, queued_bytes, seconds)
    return found


def milliseconds(seconds: list[float]) -> dict[str, float | None]:
    """Quartiles and the 99th percentile; None where there are too few samples for it."""
    fewest = {25: FEWEST_FOR_QUARTILES, 50: FEWEST_FOR_QUARTILES, 75: FEWEST_FOR_QUARTILES, 99: FEWEST_FOR_P99}
    return {
        f"p{which}": float(np.percentile(seconds, which)) * 1e3 if len(seconds) >= least else None
        for which, least in fewest.items()
    }


def latency_table(found: dict[str, Latencies]) -> str:
    """What was measured, a line a tier and state."""
    heads = ("p25", "p50", "p75", "p99", "samples", "refused")
    lines = [f"{f'load of {LOAD_BLOCKS} blocks, ms':24}" + "".join(f"{each:>9}" for each in heads)]
    for name, each in found.items():
        states = (("idle", each.idle, 0), ("behind stores", each.loaded, each.too_short + each.ended))
        for state, seconds, refused in states:
            values = milliseconds(seconds).values()
            cells = "".join(f"{'-' if value is None else format(value, '.3f'):>9}" for value in values)
            lines.append(f"{f'{name}, {state}':24}{cells}{len(seconds):9}{refused:9}")
    return "\n".join(lines)


def p99_figure(found: dict[str, Latencies], queued: int) -> Figure | str:
    """Ours; why there is none, if there is none."""
    ours = found["ours"]
    loaded, idle = milliseconds(ours.loaded)["p99"], milliseconds(ours.idle)["p99"]
    if loaded is None or idle is None:
        return (
            f"no 99th percentile of ours behind stores: {len(ours.loaded)} samples, and {FEWEST_FOR_P99} are needed; "
            f"{ours.too_short} had less than {queued / MIB:.0f} MiB queued before, {ours.ended} nothing at their end"
        )

    def ratio(loaded: np.ndarray, idle: np.ndarray) -> np.ndarray:
        return np.percentile(loaded, 99, axis=-1) / np.percentile(idle, 99, axis=-1)

    low, high = chance_interval(ratio, ours.loaded, ours.idle)
    what = (
        f"p99 of a {LOAD_BLOCKS}-block load behind {queued / MIB:.0f} MiB of stores / on an idle tier (baseline: idle; "
        "interval: 90 %, by the bootstrap)"
    )
    fs = milliseconds(found["fs"].loaded)["p99"]
    shown: dict[str, Any] = {"ours": loaded, "fs": fs, "limit": idle, "low": low, "high": high}
    return Figure("head_of_line.p99_vs_idle", what, "ms", loaded / idle, "<= 2", **shown)


def main() -> int:
    options = arguments(__doc__).parse_args()
    samples, queued = (QUICK_SAMPLES, QUICK_QUEUED_BYTES) if options.quick else (SAMPLES, QUEUED_BYTES)
    counts = " and ".join(f"{count} of {name} (if they fit {limit:.0f} s)" for name, (count, limit) in samples.items())
    run = Run(
        "head_of_line",
        f"Loads of {LOAD_BLOCKS} blocks of {ROW_BYTES // KIB} KiB after {WARM_UPS} to warm up: {TURN} on an idle tier, "
        f"{TURN} with {queued / MIB:.0f} MiB of stores in jobs of {tiers.JOB_BLOCKS} blocks queued before each, and so "
        f"on, one more at each change; behind stores {counts}. {COPY_THREADS} copy thread(s). Latency: from "
        "submit_load until get_finished_jobs has reported it, polled without a pause: the poll holds the GIL that the "
        "fs tier's threads need between copies.",
        options.output,
    )
    found = measure(run, samples, queued)
    print(latency_table(found))
    run.results["by_tier"] = {name: each.as_json() for name, each in found.items()}
    figure = p99_figure(found, queued)
    if isinstance(figure, str):
        run.failures.append(figure)
    else:
        run.figures.append(figure)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
