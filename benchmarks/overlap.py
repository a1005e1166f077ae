"""How much of copying is hidden under compute, and what it takes from whoever computes.

A fixed compute loop alone, copies alone, both together. Overlap efficiency is (compute + copies - both) / min(compute,
copies): 1 if the shorter of the two costs nothing, 0 if they run one after the other.

Two loops: matrix products that fit a core's caches (a model's forward passes; torch on one thread, one copy thread, so
that two cores suffice), and pure Python that submits and polls as vLLM's scheduler does.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict

import numpy as np
import torch

from async_tier.manager import AsyncSecondaryTierManager
from benchmarks import tiers
from benchmarks.common import Figure, Run, Spread, arguments, figure

MIB = 1 << 20
# A block of 16 tokens of an 8B model (Llama 3.1, bfloat16): 128 KiB a token.
ROW_BYTES = 2 * MIB
PRIMARY_ROWS = 512
# 256 x 256 of float32: three of them are 768 KiB, which a core's second-level cache holds. What computes from main
# memory, or from a cache that cores share, competes for it with whatever copies; that is another question.
MATRIX = 256
# Of one measurement.
COMPUTE_S = 0.5
REPETITIONS = 9
WARM_UPS = 2
# 256 MiB: what is copied during several products, between which jobs are submitted and polled.
JOBS_IN_FLIGHT = 4
# A step of the scheduler: this much Python, and in it one store and one load of 32 blocks.
STEP_S = 0.010
STEPS, STEPS_IN_TURN = 50, 5
EFFICIENCY, SLOWDOWN = 0.9, 0.03


class Copies:
    """Jobs of stores and loads over one primary, submitted one by one."""

    def __init__(self, tier: AsyncSecondaryTierManager) -> None:
        self.tier = tier
        self._make = tiers.Jobs()
        self._draw = np.random.default_rng(1)
        self._kept = tiers.groups(tiers.block_keys(PRIMARY_ROWS // 2))
        for keys in self._kept:
            tiers.submit_alone(tier, self._make.store(keys, self._rows()))
        self.in_flight = 0
        self.submitted = 0

    def submit(self) -> None:
        """The next job: a store, a load, a store, ..."""
        if self.submitted % 2:
            keys = self._kept[self.submitted // 2 % len(self._kept)]
            context = tiers.request("asks", keys)
            for key in keys:
                self.tier.lookup(key, context)
            job = self._make.load(keys, self._rows())
        else:
            job = self._make.store(tiers.block_keys(tiers.JOB_BLOCKS), self._rows())
        self.tier.on_new_request(job.req_context)
        tiers.submit(self.tier, job)
        self.tier.on_request_finished(job.req_context)
        self.in_flight += 1
        self.submitted += 1

    def poll(self) -> None:
        self.in_flight -= tiers.collect(self.tier)
        tiers.end_step(self.tier)

    def wait(self) -> None:
        """Until all has been copied, without taking a core."""
        self.tier._store.drain()
        self.poll()

    def _rows(self) -> np.ndarray:
        return self._draw.choice(PRIMARY_ROWS, tiers.JOB_BLOCKS, replace=False).astype(np.int32)


class MatrixProducts:
    """Compute of a fixed amount, and copies of a fixed amount, that take about as long when alone."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        torch.set_num_threads(1)
        self._left = torch.rand(MATRIX, MATRIX)
        self._right = torch.rand(MATRIX, MATRIX)
        self._out = torch.empty(MATRIX, MATRIX)
        self.products, self.jobs = 100, 4 * JOBS_IN_FLIGHT
        # The first ones build what they need, and touch memory for the first time.
        self.products = round(100 * COMPUTE_S / min(self.compute() for _ in range(5)))
        self.jobs = round(self.jobs * COMPUTE_S / min(self.copy() for _ in range(5)))

    def compute(self) -> float:
        """Seconds of the products alone."""
        started = time.perf_counter()
        for _ in range(self.products):
            torch.mm(self._left, self._right, out=self._out)
        return time.perf_counter() - started

    def copy(self) -> float:
        """Seconds of the copies alone."""
        copies, started = self._copies, time.perf_counter()
        first = copies.submitted
        while copies.submitted - first < self.jobs or copies.in_flight:
            while copies.submitted - first < self.jobs and copies.in_flight < JOBS_IN_FLIGHT:
                copies.submit()
            copies.poll()
        return time.perf_counter() - started

    def both(self) -> tuple[float, float]:
        """Seconds of both together, and until the products were done: jobs are submitted and polled between them."""
        copies, started = self._copies, time.perf_counter()
        first = copies.submitted
        for _ in range(self.products):
            torch.mm(self._left, self._right, out=self._out)
            copies.poll()
            while copies.submitted - first < self.jobs and copies.in_flight < JOBS_IN_FLIGHT:
                copies.submit()
        computed = time.perf_counter() - started
        while copies.submitted - first < self.jobs or copies.in_flight:
            while copies.submitted - first < self.jobs and copies.in_flight < JOBS_IN_FLIGHT:
                copies.submit()
            copies.poll()
        return time.perf_counter() - started, computed


class SchedulerLoop:
    """Steps of pure Python; with copies, each submits one store and one load of 32 blocks, and polls."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        rounds, took = 100_000, 0.0
        took = min(tiers.timed(tiers.busy, rounds) for _ in range(5))
        self.rounds = round(rounds * STEP_S / took)

    def measure(self) -> tuple[float, float, float]:
        """Seconds of STEPS steps without copies, of as many with them, and of the calls to the tier in those.

        A few of the ones, a few of the others: a processor's clock changes by more than what is measured.
        """
        alone = with_copies = calls = 0.0
        for _ in range(STEPS // STEPS_IN_TURN):
            alone += tiers.timed(lambda: [tiers.busy(self.rounds) for _ in range(STEPS_IN_TURN)])
            started = time.perf_counter()
            for _ in range(STEPS_IN_TURN):
                entered = time.perf_counter()
                self._copies.poll()
                self._copies.submit()
                self._copies.submit()
                calls += time.perf_counter() - entered
                tiers.busy(self.rounds)
            with_copies += time.perf_counter() - started
            self._copies.wait()
        return alone, with_copies, calls


def main() -> int:
    options = arguments(__doc__).parse_args()
    repetitions = 3 if options.quick else REPETITIONS
    run = Run(
        "overlap",
        f"{WARM_UPS} rounds to warm up, then {repetitions} of each in turns. Rows of {ROW_BYTES // MIB} MiB, jobs of "
        f"{tiers.JOB_BLOCKS} blocks, half stores and half loads, one copy thread. Products of {MATRIX} x {MATRIX} "
        f"float32 on one thread; scheduler steps of {STEP_S * 1e3:.0f} ms of Python with a store and a load each.",
        options.output,
    )
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        primary = np.ones((PRIMARY_ROWS, ROW_BYTES), dtype=np.uint8)
        copies = Copies(tiers.ours(stack, primary, 2 * PRIMARY_ROWS, copy_threads=1))
        products, scheduler = MatrixProducts(copies), SchedulerLoop(copies)
        run.progress(f"{products.products} products, {products.jobs} jobs; steps of {scheduler.rounds} rounds")
        for repetition in range(WARM_UPS + repetitions):
            both, computed = products.both()
            alone, steps, calls = scheduler.measure()
            found = {
                "compute": products.compute(),
                "copy": products.copy(),
                "both": both,
                "compute beside copies": computed,
                "steps": alone,
                "steps with copies": steps,
                "calls to the tier": calls,
            }
            if repetition >= WARM_UPS:
                for name, took in found.items():
                    seconds.setdefault(name, []).append(took)
            run.progress(f"round {repetition + 1} of {WARM_UPS + repetitions}")
    median = {name: Spread.of(each).median for name, each in seconds.items()}
    efficiency = (median["compute"] + median["copy"] - median["both"]) / min(median["compute"], median["copy"])
    slowdown = median["steps with copies"] / median["steps"] - 1
    run.results = {
        "seconds": {name: asdict(Spread.of(each)) for name, each in seconds.items()},
        "bytes_copied": products.jobs * tiers.JOB_BLOCKS * ROW_BYTES,
        "compute_slowed_by": median["compute beside copies"] / median["compute"] - 1,
        "scheduler_slowdown": slowdown,
        "scheduler_slowdown_without_calls": (median["steps with copies"] - median["calls to the tier"])
        / median["steps"]
        - 1,
    }
    run.figures = [
        Figure(
            key="overlap.efficiency",
            what="(compute + copies - both) / min(compute, copies) (ours: both, limit: the longer one)",
            unit="s",
            ratio=efficiency,
            goal=EFFICIENCY,
            goal_is=">=",
            ours=median["both"],
            limit=max(median["compute"], median["copy"]),
        ),
        Figure(
            key="overlap.scheduler_slowdown",
            what="scheduler steps with a store and a load of 32 blocks each / without, less 1 (limit: without)",
            unit="s",
            ratio=slowdown,
            goal=SLOWDOWN,
            goal_is="<=",
            ours=median["steps with copies"],
            limit=median["steps"],
        ),
    ]
    draw(run, median)
    run.finish()
    return 0


def draw(run: Run, median: dict[str, float]) -> None:
    with figure(run.picture, ncols=2, figsize=(10, 4)) as (_, (left, right)):
        left.barh("one after the other", median["compute"], color="#4c72b0", label="compute")
        left.barh("one after the other", median["copy"], left=median["compute"], color="#dd8452", label="copies")
        left.barh("together", median["both"], color="#55a868", label="both")
        left.barh("compute alone", median["compute"], color="#4c72b0")
        left.barh("copies alone", median["copy"], color="#dd8452")
        left.set_title(f"Matrix products: overlap efficiency {run.figures[0].ratio:.2f}")
        left.set_xlabel("seconds")
        left.legend(loc="lower right", fontsize="small")
        right.barh("without a tier", median["steps"], color="#4c72b0", label="steps")
        calls = median["calls to the tier"]
        right.barh("with copies", median["steps with copies"] - calls, color="#4c72b0")
        right.barh(
            "with copies", calls, left=median["steps with copies"] - calls, color="#c44e52", label="calls to the tier"
        )
        right.set_title(f"Scheduler in Python: slowed by {run.figures[1].ratio:.1%}")
        right.set_xlabel(f"seconds for {STEPS} steps")
        right.legend(loc="lower right", fontsize="small")


if __name__ == "__main__":
    sys.exit(main())
