"""How fast the tier copies, next to one large memmove and to vLLM's fs tier on tmpfs.

Against the size of rows, the blocks of a job, the number of copy threads, and with the scheduler's thread idle or busy
in Python. Every load is checked to bring back what was stored.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np

from async_tier.config import format_size
from benchmarks import tiers
from benchmarks.common import Figure, Run, Spread, arguments, figure

KIB, MIB = 1 << 10, 1 << 20
GB = 1e-9
ROW_BYTES = (16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB)
# A job of 1,024 blocks of the default size is a row of the sweep.
BLOCKS_A_JOB = (1, 4, 32, 256, 1024)
DEFAULT_ROW_BYTES = 256 * KIB
# What one measurement moves: far beyond the caches.
MOVED = 512 * MIB
REPETITIONS = 5
# The tier's default. As many passes touch every row of it, so that no measurement pays for page faults.
TIER_TO_PRIMARY = 2
# Rows from here on are to come near memmove: smaller ones are in the table.
LARGE_ROW_BYTES = 64 * KIB
THREAD_VS_MEMMOVE, STORE_VS_FS, LOAD_VS_FS = 0.9, 2.5, 1.6
CORES = len(os.sched_getaffinity(0))


class RowSize:
    """One primary that all tiers store from and load to, in turns."""

    def __init__(self, stack: ExitStack, row_bytes: int, moved: int, with_fs: bool) -> None:
        blocks = moved // row_bytes
        # Not zeros: those would be pages yet to be made.
        self.primary = np.ones((blocks, row_bytes), dtype=np.uint8)
        self._stamps = self.primary[:, : np.dtype(np.uint64).itemsize].view(np.uint64)[:, 0]
        self._other = np.ones_like(self.primary)
        self._jobs = tiers.Jobs()
        self._draw = np.random.default_rng(row_bytes)
        capacity = TIER_TO_PRIMARY * blocks
        self.tiers: dict[str, Any] = {
            f"ours, {threads} thread{'s' * (threads > 1)}": tiers.ours(
                stack, self.primary, capacity, copy_threads=threads
            )
            for threads in sorted({1, CORES})
        }
        self._fs = tiers.FileSystem(stack, self.primary) if with_fs else None
        if self._fs is not None:
            self.tiers["fs"] = self._fs.tier

    def memmove(self) -> float:
        """GB/s of one memmove of everything, with nothing else to do."""
        size = self.primary.nbytes
        return size * GB / tiers.timed(ctypes.memmove, self._other.ctypes.data, self.primary.ctypes.data, size)

    def store_and_load(self, name: str, blocks: int = tiers.JOB_BLOCKS, busy: bool = True) -> tuple[float, float]:
        """GB/s of a store of every row of the primary and of a load into other rows; checks what came back."""
        tier = self.tiers[name]
        self._stamps[:] = np.arange(len(self._stamps))
        keys = tiers.groups(tiers.block_keys(len(self._stamps)), blocks)
        sources, targets = self._rows(blocks), self._rows(blocks)
        stores = [self._jobs.store(*each) for each in zip(keys, sources, strict=True)]
        # In the order of the stores' sets, in which they have their sources.
        loads = [self._jobs.load(list(job.keys), rows) for job, rows in zip(stores, targets, strict=True)]
        rates = [self.primary.nbytes * GB / tiers.move(tier, jobs, busy) for jobs in (stores, loads)]
        if not np.array_equal(self._stamps[np.concatenate(targets)], np.concatenate(sources)):
            raise RuntimeError(f"{name} loaded other bytes than it stored")
        if name == "fs" and self._fs is not None:
            self._fs.remove_blocks()
        return rates[0], rates[1]

    def warm_up(self) -> None:
        self.memmove()
        for name in self.tiers:
            for _ in range(TIER_TO_PRIMARY):
                self.store_and_load(name)

    def _rows(self, blocks: int) -> list[np.ndarray]:
        """Every row of the primary once, in random order, by job."""
        rows = self._draw.permutation(len(self._stamps)).astype(np.int32)
        return [rows[at : at + blocks] for at in range(0, len(rows), blocks)]


class Rates:
    """GB/s as they are measured."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}

    def add(self, name: str, pair: tuple[float, float]) -> None:
        for kind, rate in zip(("store", "load"), pair, strict=True):
            self._found.setdefault(f"{name}: {kind}", []).append(rate)

    def add_one(self, name: str, rate: float) -> None:
        self._found.setdefault(name, []).append(rate)

    def spreads(self) -> dict[str, Spread]:
        return {name: Spread.of(each) for name, each in self._found.items()}


def measure_row_size(row_bytes: int, moved: int, repetitions: int) -> dict[str, Spread]:
    with ExitStack() as stack:
        size = RowSize(stack, row_bytes, moved, with_fs=row_bytes >= LARGE_ROW_BYTES)
        size.warm_up()
        rates = Rates()
        for repetition in range(repetitions):
            rates.add_one("memmove", size.memmove())
            for name in list(size.tiers) if repetition % 2 == 0 else reversed(list(size.tiers)):
                rates.add(name, size.store_and_load(name))
        return rates.spreads()


def measure_default(moved: int, repetitions: int) -> tuple[dict[int, dict[str, Spread]], dict[str, Spread]]:
    """(by blocks a job, by what the scheduler's thread does), with rows of the default size."""
    with ExitStack() as stack:
        size = RowSize(stack, DEFAULT_ROW_BYTES, moved, with_fs=False)
        size.warm_up()
        by_blocks = {blocks: Rates() for blocks in BLOCKS_A_JOB}
        idle = Rates()
        for _ in range(repetitions):
            for blocks, rates in by_blocks.items():
                rates.add("ours, 1 thread", size.store_and_load("ours, 1 thread", blocks))
            for name in size.tiers:
                idle.add(f"{name}, scheduler busy", size.store_and_load(name))
                idle.add(f"{name}, scheduler idle", size.store_and_load(name, busy=False))
        return {blocks: rates.spreads() for blocks, rates in by_blocks.items()}, idle.spreads()


def figures(by_row: dict[int, dict[str, Spread]]) -> list[Figure]:
    """The worst of the rows of at least LARGE_ROW_BYTES, for each goal."""

    def ratio(row_bytes: int, ours: str, theirs: str) -> float:
        return by_row[row_bytes][ours].median / by_row[row_bytes][theirs].median

    large = [row_bytes for row_bytes in by_row if row_bytes >= LARGE_ROW_BYTES]
    found = []
    threads = f"ours, {CORES} thread{'s' * (CORES > 1)}"
    for key, ours, kinds, theirs, goal in (
        ("thread_vs_memmove", "ours, 1 thread", ("store", "load"), "memmove", THREAD_VS_MEMMOVE),
        ("store_vs_fs", threads, ("store",), "fs: store", STORE_VS_FS),
        ("load_vs_fs", threads, ("load",), "fs: load", LOAD_VS_FS),
    ):
        worst, row_bytes, kind = min(
            (ratio(size, f"{ours}: {kind}", theirs), size, kind) for size in large for kind in kinds
        )
        spreads = by_row[row_bytes]
        found.append(
            Figure(
                key=f"copy_rate.{key}",
                what=f"{kind} of rows of {format_size(row_bytes)}, the worst size; {ours} (limit: memmove)",
                unit="GB/s",
                ratio=worst,
                goal=goal,
                goal_is=">=",
                ours=spreads[f"{ours}: {kind}"].median,
                fs=spreads[f"fs: {kind}"].median,
                limit=spreads["memmove"].median,
            )
        )
    return found


def main() -> int:
    options = arguments(__doc__).parse_args()
    logging.getLogger("vllm").setLevel(logging.WARNING)
    moved, repetitions = (64 * MIB, 2) if options.quick else (MOVED, REPETITIONS)
    run = Run(
        "copy_rate",
        f"GB/s, medians of {repetitions} in turns after {TIER_TO_PRIMARY} passes to warm up; each moves "
        f"{moved // MIB} MiB of rows in random order, in jobs of {tiers.JOB_BLOCKS} blocks, {tiers.JOBS_IN_FLIGHT} in "
        "flight, the scheduler's thread busy in Python, unless said otherwise.",
        options.output,
    )
    by_row = {}
    for row_bytes in ROW_BYTES:
        run.progress(f"rows of {format_size(row_bytes)}")
        by_row[row_bytes] = measure_row_size(row_bytes, moved, repetitions)
    run.progress("blocks a job, and an idle scheduler")
    by_blocks, idle = measure_default(moved, repetitions)
    run.results = {
        "gb_s_by_row_bytes": {size: _plain(spreads) for size, spreads in by_row.items()},
        "gb_s_by_blocks_a_job": {blocks: _plain(spreads) for blocks, spreads in by_blocks.items()},
        "gb_s_by_scheduler": _plain(idle),
    }
    run.figures = figures(by_row)
    print(f"{'GB/s, rows of':24}" + "".join(f"{format_size(size):>12}" for size in by_row))
    for name in by_row[DEFAULT_ROW_BYTES]:
        rates = (f"{spreads[name].median:12.2f}" if name in spreads else f"{'-':>12}" for spreads in by_row.values())
        print(f"{name:24}" + "".join(rates))
    for name, spread in idle.items():
        print(f"{name:40}{spread.median:8.2f}")
    draw(run, by_row, by_blocks)
    run.finish()
    return 0


def draw(run: Run, by_row: dict[int, dict[str, Spread]], by_blocks: dict[int, dict[str, Spread]]) -> None:
    styles = {"ours, 1 thread": "#4c72b0", f"ours, {CORES} threads": "#55a868", "fs": "#dd8452"}
    with figure(run.picture, ncols=2, figsize=(11, 4.2), sharey=True) as (_, (left, right)):
        for name, color in styles.items():
            for kind, style in (("store", "o-"), ("load", "s--")):
                points = [
                    (size, each[f"{name}: {kind}"].median) for size, each in by_row.items() if f"{name}: {kind}" in each
                ]
                if points:
                    left.plot(*zip(*points, strict=True), style, color=color, label=f"{name}, {kind}")
        sizes = list(by_row)
        left.plot(sizes, [by_row[size]["memmove"].median for size in sizes], "k:", label="one large memmove")
        left.set_xlabel("bytes a row")
        left.set_xscale("log", base=2)
        left.set_xticks(sizes, [format_size(size) for size in sizes], rotation=30)
        left.set_ylabel("GB/s")
        left.set_title("Copy rate, scheduler busy in Python")
        left.legend(fontsize="small", ncols=2, loc="upper left")
        for kind, style in (("store", "o-"), ("load", "s--")):
            rates = [by_blocks[blocks][f"ours, 1 thread: {kind}"].median for blocks in by_blocks]
            right.plot(list(by_blocks), rates, style, color="#4c72b0", label=f"ours, 1 thread, {kind}")
        right.set_xscale("log", base=2)
        right.set_xlabel(f"blocks a job, of {format_size(DEFAULT_ROW_BYTES)}")
        right.set_title("Blocks a job")
        right.legend(fontsize="small")
        left.set_ylim(0, 1.3 * left.get_ylim()[1])  # room for the legend
        for axes in (left, right):
            axes.grid(alpha=0.3)


def _plain(spreads: dict[str, Spread]) -> dict[str, dict[str, float]]:
    return {name: asdict(spread) for name, spread in spreads.items()}


if __name__ == "__main__":
    sys.exit(main())
