"""How long a load waits behind stores: its latency while 2 GiB of stores are queued, against an idle tier.

A prompt whose blocks lie in the tier waits for a load of 16 blocks. The stores queued ahead of it are those of other
requests, and nobody waits for them. Some loads on the idle tier, then some behind stores, and so on: what the machine
does otherwise falls on both.

Queued are the bytes of stores that are submitted and not yet reported, by a poll immediately before the load is
submitted; a job counts whole until it is reported. A sample with less than 2 GiB then, or with no store left when the
load's end is seen, is refused and counted. A tier on which too few samples are left is not measured, and the table says
why; if that tier is ours, the benchmark fails. The same rule holds for vLLM's fs tier, whose threads copy in C but are
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
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.shared.common import Figure, Lazily, Run, arguments, chance_interval, figure

if TYPE_CHECKING:
    from benchmarks.shared import tiers
else:
    tiers = Lazily("benchmarks.shared.tiers")

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
# A tier on which the queue is not full by then ends stores as fast as they are submitted.
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
P99_VS_IDLE = 2.0
# The thread that polls takes a core; copy threads that have to share it wait for their turn in the middle of a piece.
COPY_THREADS = max(1, min(2, len(os.sched_getaffinity(0)) - 1))


class NotFilled(Exception):
    """The queue of stores could not be filled."""


class Contender:
    """A tier, what is queued on it, and the loads that are measured."""

    def __init__(self, tier: Any, fs: tiers.FileSystem | None, queued_bytes: int, warm_up_blocks: int = 0) -> None:
        self.tier = tier
        self.fs = fs
        self._jobs = tiers.Jobs()
        self._draw = random.Random(1)
        self._queued_bytes = queued_bytes
        self._job_bytes = tiers.JOB_BLOCKS * ROW_BYTES
        # Not yet reported: stores, and loads that have ended but are not yet taken note of.
        self._stores: set[int] = set()
        self._ended_loads: set[int] = set()
        # Bytes of stores that ended since the fs tier's files were removed.
        self._written = 0
        self.store(warm_up_blocks)
        self._kept = [tiers.block_keys(LOAD_BLOCKS) for _ in range(KEPT_JOBS)]
        for keys in self._kept:
            tiers.submit_alone(tier, self._jobs.store(keys, self._rows(LOAD_BLOCKS)))
        if fs is not None:
            fs.keep_blocks()

    @property
    def queued(self) -> int:
        """Bytes of stores that are submitted and not reported."""
        return len(self._stores) * self._job_bytes

    def idle_load(self) -> float:
        """Seconds from a load's submission until its end is seen."""
        self._look_up()
        return self._load()[0]

    def load_behind_stores(self) -> tuple[float, int, int]:
        """(seconds, bytes queued at the load's submission, bytes queued when its end was seen).

        Raises NotFilled, in words, if the queue cannot be filled.
        """
        self._look_up()
        self._fill(self._queued_bytes)
        return self._load()

    def store(self, blocks: int) -> None:
        """Store that many blocks, and wait."""
        for _ in range(blocks // tiers.JOB_BLOCKS):
            self._submit_store()
            self.drain()

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

    def _look_up(self) -> None:
        """As vLLM does before a load. Until the step has ended, stores do not evict what was hit."""
        if self.fs is None:  # which never evicts, and looks for files in its own time
            context = tiers.request("asks")
            for keys in self._kept:
                for key in keys:
                    self.tier.lookup(key, context)

    def _load(self) -> tuple[float, int, int]:
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

    def _fill(self, size: int) -> None:
        """Store until that many bytes are queued, and a little more."""
        deadline = time.monotonic() + FILL_S
        size += SPARE_JOBS * self._job_bytes
        most = 0
        while self.queued < size:
            self._submit_store()
            if self.queued >= size:
                self._collect()
            most = max(most, self.queued)
            if time.monotonic() > deadline:
                raise NotFilled(f"stores end as they are submitted, {most / MIB:.0f} MiB were the most queued")

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
                self._written += self._job_bytes
            else:
                self._ended_loads.add(result.job_id)

    def _rows(self, count: int) -> np.ndarray:
        return np.array(self._draw.sample(range(SOURCE_ROWS), count), dtype=np.int32)


@dataclass
class Latencies:
    """Of one tier, in seconds; and what was queued while they were taken, in bytes.

    least_at_submission, least_at_end: of the samples that count. too_short, ended: samples refused, because less was
    queued than asked for at the load's submission, or nothing any more at its end. tried, took_s: of all samples behind
    stores. not_filled: why the queue was not filled any more.
    """

    idle: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    least_at_submission: float = math.inf
    least_at_end: float = math.inf
    too_short: int = 0
    ended: int = 0
    tried: int = 0
    took_s: float = 0.0
    not_filled: str = ""

    def take_behind_stores(self, contender: Contender, most: int, queued_bytes: int, seconds: float) -> None:
        """Until `most` samples count, or all of these took `seconds`."""
        started = time.monotonic()
        deadline = started + seconds - self.took_s
        try:
            contender.load_behind_stores()  # to warm up
            while len(self.loaded) < most and time.monotonic() < deadline:
                took, at_submission, at_end = contender.load_behind_stores()
                self.tried += 1
                if at_submission < queued_bytes:
                    self.too_short += 1
                elif not at_end:
                    self.ended += 1
                else:
                    self.loaded.append(took)
                    self.least_at_submission = min(at_submission, self.least_at_submission)
                    self.least_at_end = min(at_end, self.least_at_end)
                contender.make_room(REMOVE_FROM_BYTES)
        except NotFilled as error:
            self.not_filled = f"; then {error}"
        self.took_s += time.monotonic() - started

    def objection(self, queued_bytes: int) -> str | None:
        """Why there are too few samples behind stores; None if there are enough."""
        if len(self.loaded) >= FEWEST_FOR_QUARTILES:
            return None
        return (
            f"of {self.tried} loads in {self.took_s:.0f} s, {self.too_short} had less than "
            f"{queued_bytes / MIB:.0f} MiB queued before them and {self.ended} nothing at their end; "
            f"{FEWEST_FOR_QUARTILES} have to be left{self.not_filled}"
        )


def measure_tier(contender: Contender, samples: int, queued_bytes: int, seconds: float) -> Latencies:
    """`samples` loads on the idle tier, and as many behind stores if they do not take more than `seconds`."""
    found = Latencies()
    for _ in range(WARM_UPS):
        contender.idle_load()
    while len(found.idle) < samples:
        contender.idle_load()  # after the stores before it
        found.idle += [contender.idle_load() for _ in range(min(TURN, samples - len(found.idle)))]
        if found.took_s < seconds and not found.not_filled:
            found.take_behind_stores(contender, len(found.idle), queued_bytes, seconds)
            contender.drain()
    return found


def measure(run: Run, samples: dict[str, tuple[int, float]], queued_bytes: int) -> dict[str, Latencies]:
    """Latencies by tier. samples: how many, and seconds for those behind stores."""
    found: dict[str, Latencies] = {}
    primary = np.ones((SOURCE_ROWS + TARGET_ROWS, ROW_BYTES), dtype=np.uint8)
    for name, (count, seconds) in samples.items():
        with ExitStack() as stack:
            # Room for what is queued and kept, and a little more.
            blocks = 5 * queued_bytes // ROW_BYTES // 4 + (KEPT_JOBS * LOAD_BLOCKS) + SPARE_JOBS * tiers.JOB_BLOCKS
            if name == "ours":
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


def p99_ratio(found: Latencies) -> tuple[float, float, float]:
    """Behind stores / idle, and the chance interval around it."""

    def ratio(loaded: np.ndarray, idle: np.ndarray) -> np.ndarray:
        return np.percentile(loaded, 99, axis=-1) / np.percentile(idle, 99, axis=-1)

    return float(ratio(np.array(found.loaded), np.array(found.idle))), *chance_interval(ratio, found.loaded, found.idle)


def latency_table(found: dict[str, Latencies], queued_bytes: int) -> str:
    """What was measured, a line a tier and state."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    head = f"load of {LOAD_BLOCKS} blocks, ms"
    lines = [
        f"{head:24}" + "".join(f"{each:>9}" for each in ("p25", "p50", "p75", "p99", "samples", "refused")),
    ]
    lines[0] += f"{'least MiB queued before':>25}{'at its end':>12}"
    for name, each in found.items():
        cells = "".join(f"{cell(value):>9}" for value in milliseconds(each.idle).values())
        lines.append(f"{name + ', idle':24}{cells}{len(each.idle):9}")
        line = f"{name + ', behind stores':24}"
        if (objection := each.objection(queued_bytes)) is None:
            line += "".join(f"{cell(value):>9}" for value in milliseconds(each.loaded).values())
            line += f"{len(each.loaded):9}{each.too_short + each.ended:9}"
            line += f"{each.least_at_submission / MIB:25.0f}{each.least_at_end / MIB:12.0f}"
        else:
            line += f" not measured: {objection}"
        lines.append(line)
    return "\n".join(lines)


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
    print(latency_table(found, queued))
    run.results["by_tier"] = {
        name: {
            "idle_ms": milliseconds(each.idle),
            "behind_stores_ms": milliseconds(each.loaded),
            "samples": {"idle": len(each.idle), "behind_stores": len(each.loaded)},
            "refused": {"less_queued_at_submission": each.too_short, "nothing_queued_at_end": each.ended},
            "least_bytes_queued": {"at_submission": each.least_at_submission, "at_end": each.least_at_end}
            if each.loaded
            else None,
            "not_measured": each.objection(queued),
        }
        for name, each in found.items()
    }
    loaded, idle = milliseconds(found["ours"].loaded)["p99"], milliseconds(found["ours"].idle)["p99"]
    if loaded is None or idle is None:
        few = f"{len(found['ours'].loaded)} samples, and {FEWEST_FOR_P99} are needed"
        reason = found["ours"].objection(queued) or few
        run.failures.append(f"no 99th percentile of ours behind stores: {reason}")
    else:
        ratio, low, high = p99_ratio(found["ours"])
        run.figures.append(
            Figure(
                key="head_of_line.p99_vs_idle",
                what=f"p99 of a {LOAD_BLOCKS}-block load behind {queued / MIB:.0f} MiB of stores / on an idle tier "
                "(baseline: idle; interval: 90 %, by the bootstrap)",
                unit="ms",
                ratio=ratio,
                goal=P99_VS_IDLE,
                goal_is="<=",
                ours=loaded,
                fs=milliseconds(found["fs"].loaded)["p99"],
                limit=idle,
                low=low,
                high=high,
            )
        )
    draw(run, found, queued)
    return run.finish()


def draw(run: Run, found: dict[str, Latencies], queued: int) -> None:
    with figure(run.picture, figsize=(8, 4.8)) as (drawn, axes):
        for name, color in (("ours", "#4c72b0"), ("fs", "#dd8452")):
            each = found[name]
            behind = f"{name}, behind {queued / MIB:.0f} MiB of stores"
            for seconds, style, label in ((each.idle, "--", f"{name}, idle"), (each.loaded, "-", behind)):
                if seconds is each.loaded and each.objection(queued) is not None:
                    axes.plot([], [], style, color=color, label=f"{behind}: not measured")
                    continue
                values = np.sort(seconds) * 1e3
                share = np.arange(1, len(values) + 1) / len(values)
                axes.plot(values, share, style, color=color, label=f"{label} ({len(values)})")
        for share, text in ((0.5, "p50"), (0.99, "p99")):
            axes.axhline(share, color="#8c8c8c", linestyle=":", linewidth=0.8)
            axes.annotate(
                text, (1, share), xycoords=("axes fraction", "data"), xytext=(3, -3), textcoords="offset points"
            )
        axes.set_xscale("log")
        axes.set_xlabel(f"latency of a load of {LOAD_BLOCKS} blocks, ms")
        axes.set_ylabel("share of loads")
        axes.set_title("A load behind queued stores")
        axes.grid(alpha=0.3)
        drawn.legend(loc="outside lower center", ncols=2)


if __name__ == "__main__":
    sys.exit(main())
