"""How much of copying is hidden under compute, and what it takes from whoever computes.

A fixed compute loop alone, copies alone, both together. Overlap efficiency is (compute + copies - both) / min(compute,
copies): 1 if the shorter of the two costs nothing, 0 if they run one after the other. The products' thread also makes
the calls to the tier, which are part of what is lost. What is lost without them, because cores share memory and caches,
is measured too: the same bytes, handed to a copy thread all at once before the products begin. Blocks and products of
two sizes each; the figure is the worst of the four.

Two loops: matrix products (a model's forward passes; torch on one thread, one copy thread, so that two cores suffice),
and pure Python that submits and polls as vLLM's scheduler does. The latter also makes the same calls while the copies
are held back: what slows it then is the calls, and not that anything is copied.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from async_tier.streams.base import CopyEvent
from async_tier.streams.host import HostEngine
from async_tier.streams.rows import Rows
from async_tier.testing import load_gate, store_gate
from benchmarks.shared import tiers
from benchmarks.shared.common import QUARTILES, Figure, Run, Spread, arguments

KIB, MIB = 1 << 10, 1 << 20
# Blocks of 16 tokens: of an 8B model (Llama 3.1, bfloat16: 128 KiB a token), and of one eight times smaller.
BLOCK_BYTES = (256 * KIB, 2 * MIB)
# Of what is copied from and to, and half of the tier: a set of blocks is used again only when it is out of the caches.
PRIMARY_BYTES = 1 << 30
# n x n of float32, three at a time: some 1 MiB, for a core's own caches, and 3 MiB, for one that cores share.
MATRICES = (256, 512)
# Of one measurement.
COMPUTE_S = 0.5
REPETITIONS = 9
WARM_UPS = 2
# Copied during several products, between which jobs are submitted and polled: copies are never out of work.
IN_FLIGHT_BYTES = 256 * MIB
# A step of the scheduler: this much Python, and in it one store and one load of 32 blocks.
STEP_S = 0.010
STEPS, STEPS_IN_TURN = 50, 5


class Copies:
    """Jobs of stores and loads over one primary, made in advance and submitted one by one."""

    def __init__(self, stack: ExitStack, block_bytes: int) -> None:
        self._count = PRIMARY_BYTES // block_bytes
        primary = np.ones((self._count, block_bytes), dtype=np.uint8)
        self._rows_of_primary = Rows.of_view(memoryview(primary))
        self._thread = HostEngine(1)
        stack.callback(self._thread.close)
        self.tier = tiers.ours(stack, primary, 2 * self._count, copy_threads=1)
        self._make = tiers.Jobs()
        self._draw = np.random.default_rng(1)
        self._kept = tiers.groups(tiers.block_keys(self._count // 2))
        for keys in self._kept:
            tiers.submit_alone(self.tier, self._make.store(keys, self._rows()))
        self._made = 0
        self._jobs: deque[Any] = deque()
        self.in_flight = 0
        self.most_in_flight = IN_FLIGHT_BYTES // (tiers.JOB_BLOCKS * block_bytes)

    def prepare(self, jobs: int) -> None:
        """Make the next jobs: a store, a load, a store, ... What vLLM does for them is not ours to measure."""
        for number in range(self._made, self._made + jobs):
            if number % 2:
                keys = self._kept[number // 2 % len(self._kept)]
                self._jobs.append(self._make.load(keys, self._rows()))
            else:
                self._jobs.append(self._make.store(tiers.block_keys(tiers.JOB_BLOCKS), self._rows()))
        self._made += jobs

    def forget(self) -> None:
        """The jobs that were made and not submitted."""
        self._jobs.clear()

    @property
    def is_over(self) -> bool:
        """Whether all jobs that were made have ended."""
        return not (self._jobs or self.in_flight)

    def submit(self, most: int) -> None:
        """Submit jobs until `most` are in flight or none is left."""
        while self._jobs and self.in_flight < most:
            job = self._jobs.popleft()
            self.tier.on_new_request(job.req_context)
            if job.is_promotion:
                for key in job.keys:
                    self.tier.lookup(key, job.req_context)
            tiers.submit(self.tier, job)
            self.tier.on_request_finished(job.req_context)
            self.in_flight += 1

    def poll(self) -> None:
        self.in_flight -= tiers.collect(self.tier)
        tiers.end_step(self.tier)

    def queue_at_once(self, jobs: int) -> CopyEvent:
        """Copies of as many bytes by a thread that nobody asks anything: from one half of the primary to the other."""
        half, size = self._count // 2, jobs * tiers.JOB_BLOCKS
        sources, targets = self._draw.integers(half, size=size), half + self._draw.integers(half, size=size)
        rows = self._rows_of_primary
        return self._thread.store_stream.copy_rows(rows, targets.tolist(), rows, sources.tolist())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is copied until the end."""
        with store_gate(self.tier), load_gate(self.tier):
            yield

    def wait(self) -> None:
        """Until all that was submitted has been copied, without taking a core."""
        self.tier.block_store.drain()
        self.poll()

    def _rows(self) -> np.ndarray:
        return self._draw.choice(self._count, tiers.JOB_BLOCKS, replace=False).astype(np.int32)


class MatrixProducts:
    """Compute of a fixed amount, and copies of a fixed amount, that take about as long when alone."""

    def __init__(self, copies: Copies, size: int) -> None:
        self._copies = copies
        torch.set_num_threads(1)
        self._left, self._right, self._out = torch.rand(size, size), torch.rand(size, size), torch.empty(size, size)
        self.products, self.jobs = 100, 4 * copies.most_in_flight
        # The first ones build what they need, and touch memory for the first time.
        self.products = round(100 * COMPUTE_S / min(tiers.timed(self._multiply) for _ in range(5)))
        self.jobs = round(self.jobs * COMPUTE_S / min(self._copy() for _ in range(5)))

    def measure(self, first: int) -> dict[str, float]:
        """Seconds of each alone and of both together, with a tier and without; number `first` of these begins."""
        calls: dict[str, Callable[[], float]] = {
            "compute": lambda: tiers.timed(self._multiply),
            "copy": self._copy,
            "both": self._both,
            "both, at once": lambda: tiers.timed(self._both_at_once),
        }
        names = list(calls)
        return {name: calls[name]() for name in names[first % 4 :] + names[: first % 4]}

    def _copy(self) -> float:
        self._copies.prepare(self.jobs)
        return tiers.timed(self._finish)

    def _both(self) -> float:
        """Jobs are submitted and polled between the products."""
        copies = self._copies
        copies.prepare(self.jobs)

        def between() -> None:
            copies.poll()
            copies.submit(copies.most_in_flight)

        return tiers.timed(lambda: (self._multiply(between), self._finish()))

    def _both_at_once(self) -> None:
        event = self._copies.queue_at_once(self.jobs)
        self._multiply()
        event.synchronize()

    def _multiply(self, between: Callable[[], None] = lambda: None) -> None:
        for _ in range(self.products):
            torch.mm(self._left, self._right, out=self._out)
            between()

    def _finish(self) -> None:
        while not self._copies.is_over:
            self._copies.submit(self._copies.most_in_flight)
            self._copies.poll()


def efficiency(seconds: dict[str, float], both: str) -> float:
    compute, copy = seconds["compute"], seconds["copy"]
    return (compute + copy - seconds[both]) / min(compute, copy)


class SchedulerLoop:
    """Steps of pure Python; with copies, each submits one store and one load of 32 blocks, and polls."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        rounds = 100_000
        took = min(tiers.timed(tiers.busy, rounds) for _ in range(5))
        self.rounds = round(rounds * STEP_S / took)

    def measure(self) -> list[dict[str, float]]:
        """By turn: seconds of some steps without a tier, of as many with it, and of its calls in those.

        In short turns, of which neighbours are compared: a processor's clock changes by more than what is measured.
        """
        ways = (self._alone, lambda: self._steps(is_held=False), lambda: self._steps(is_held=True))
        turns: list[dict[str, float]] = []
        for turn in range(STEPS // STEPS_IN_TURN):
            turns.append({})
            for at in range(len(ways)):
                turns[-1] |= ways[(turn + at) % len(ways)]()
        return turns

    def _begin_turn(self) -> None:
        """So that all begin alike: jobs are made, and the core is awake. One that has slept is faster at first."""
        self._copies.prepare(2 * STEPS_IN_TURN)
        tiers.busy(self.rounds)

    def _alone(self) -> dict[str, float]:
        self._begin_turn()
        alone = tiers.timed(lambda: [tiers.busy(self.rounds) for _ in range(STEPS_IN_TURN)])
        self._copies.forget()
        return {"alone": alone}

    def _steps(self, is_held: bool) -> dict[str, float]:
        self._begin_turn()
        with self._copies.held() if is_held else nullcontext():
            calls, started = 0.0, time.perf_counter()
            for _ in range(STEPS_IN_TURN):
                entered = time.perf_counter()
                self._copies.poll()
                self._copies.submit(self._copies.in_flight + 2)
                calls += time.perf_counter() - entered
                tiers.busy(self.rounds)
            together = time.perf_counter() - started
        self._copies.wait()
        return {"held" if is_held else "together": together, "calls while held" if is_held else "calls": calls}


def measure_products(run: Run, repetitions: int) -> dict[str, dict[str, Any]]:
    """By what is computed and copied: seconds of each, and the efficiency of each repetition."""
    found = {}
    for block_bytes in BLOCK_BYTES:
        with ExitStack() as stack:
            copies = Copies(stack, block_bytes)
            for size in MATRICES:
                name = f"blocks of {block_bytes // KIB} KiB, {size} x {size}"
                products = MatrixProducts(copies, size)
                run.progress(f"{name}: {products.products} products, {products.jobs} jobs")
                rounds = [products.measure(first) for first in range(WARM_UPS + repetitions)][WARM_UPS:]
                found[name] = {
                    "seconds": {what: asdict(Spread.of([each[what] for each in rounds])) for what in rounds[0]},
                    "bytes_copied": products.jobs * tiers.JOB_BLOCKS * block_bytes,
                    "efficiency": asdict(Spread.of([efficiency(each, "both") for each in rounds])),
                    "efficiency_at_once": asdict(Spread.of([efficiency(each, "both, at once") for each in rounds])),
                }
    run.results["products"] = found
    return found


def measure_scheduler(run: Run, repetitions: int) -> dict[str, Any]:
    run.progress("scheduler steps")
    with ExitStack() as stack:
        scheduler = SchedulerLoop(Copies(stack, max(BLOCK_BYTES)))
        turns = [turn for _ in range(WARM_UPS + repetitions) for turn in scheduler.measure()]
    turns = turns[WARM_UPS * STEPS // STEPS_IN_TURN :]

    def slowed(steps: str) -> dict[str, float]:
        return asdict(Spread.of([turn[steps] / turn["alone"] - 1 for turn in turns]))

    def milliseconds(what: str) -> dict[str, float]:
        return asdict(Spread.of([turn[what] / STEPS_IN_TURN * 1e3 for turn in turns]))

    run.results["scheduler"] = {
        "slowdown": slowed("together"),
        "slowdown_copies_held": slowed("held"),
        "ms_a_step": milliseconds("alone"),
        "ms_a_step_with_copies": milliseconds("together"),
        "ms_of_calls_a_step": milliseconds("calls"),
        "ms_of_calls_a_step_copies_held": milliseconds("calls while held"),
    }
    return run.results["scheduler"]


def report(products: dict[str, dict[str, Any]], scheduler: dict[str, Any]) -> None:
    print(f"{'':44}{QUARTILES}")
    for key, text in (
        ("efficiency", "efficiency"),
        ("efficiency_at_once", "efficiency of as many bytes, handed over at once"),
    ):
        print(text)
        for name, found in products.items():
            print(f"{f'  {name}':44}{Spread(**found[key]).cells()}")
    print("the scheduler")
    for name, spread in scheduler.items():
        print(f"{f'  {name}'.replace('_', ' '):44}{Spread(**spread).cells()}")


def figures(products: dict[str, dict[str, Any]], scheduler: dict[str, Any]) -> list[Figure]:
    worst = min(products, key=lambda name: products[name]["efficiency"]["median"])
    of_worst, slowdown = products[worst]["efficiency"], scheduler["slowdown"]
    seconds = {what: spread["median"] for what, spread in products[worst]["seconds"].items()}
    step, calls = (scheduler[name]["median"] for name in ("ms_a_step", "ms_of_calls_a_step"))
    return [
        Figure(
            "overlap.efficiency",
            f"(compute + copies - both) / min(compute, copies), quartiles: {worst}, the worst (ours: both; limit: "
            "both without a tier, the copies handed over at once, which makes "
            f"{products[worst]['efficiency_at_once']['median']:.3f})",
            "s",
            of_worst["median"],
            ">= 0.9",
            ours=seconds["both"],
            limit=seconds["both, at once"],
            low=of_worst["low"],
            high=of_worst["high"],
            paired=True,
        ),
        Figure(
            "overlap.scheduler_slowdown",
            f"steps of {step:.1f} ms with a store and a load of 32 blocks each / without (limit), less 1, and its "
            f"quartiles; the calls take {calls:.2f} ms a step; with the same calls and the copies held back it makes "
            f"{scheduler['slowdown_copies_held']['median']:.3f}",
            "ms",
            slowdown["median"],
            "<= 0.03",
            ours=scheduler["ms_a_step_with_copies"]["median"],
            limit=step,
            low=slowdown["low"],
            high=slowdown["high"],
            paired=True,
        ),
    ]


def main() -> int:
    options = arguments(__doc__).parse_args()
    repetitions = 3 if options.quick else REPETITIONS
    run = Run(
        "overlap",
        f"{WARM_UPS} rounds to warm up, then {repetitions}. Jobs of {tiers.JOB_BLOCKS} blocks, half stores and half "
        f"loads, one copy thread. Products of float32 on one thread. Scheduler: steps of {STEP_S * 1e3:.0f} ms of "
        f"Python, {STEPS_IN_TURN} without a tier, {STEPS_IN_TURN} with a store and a load of "
        f"{max(BLOCK_BYTES) // MIB} MiB blocks each, {STEPS_IN_TURN} with the same calls and the copies held back, and "
        f"so on, {STEPS} of each a round.",
        options.output,
    )
    products, scheduler = measure_products(run, repetitions), measure_scheduler(run, repetitions)
    run.figures = figures(products, scheduler)
    report(products, scheduler)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
