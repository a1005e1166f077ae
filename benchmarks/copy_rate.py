"""How fast the tier copies, next to one large memmove and to vLLM's fs tier on tmpfs.

Against the size of rows, the blocks of a job, the number of copy threads (every power of two up to the cores), and with
the scheduler's thread idle or busy in Python. Every load is checked to bring back what was stored. Rates are medians,
and ratios are those of medians of the same run.
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
from benchmarks.common import QUARTILES, Figure, Run, Spread, arguments, figure, plot_spreads

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
# Goals are for rows from here on: smaller ones are in the table and the picture.
LARGE_ROW_BYTES = 64 * KIB
THREAD_VS_MEMMOVE, STORE_VS_FS, LOAD_VS_FS = 0.9, 2.5, 1.6
# The most that the tier takes.
MOST_THREADS = 64
# Every power of two up to the cores.
THREADS = [1 << power for power in range(min(len(os.sched_getaffinity(0)), MOST_THREADS).bit_length())]


def ours(threads: int) -> str:
    """What our tier with so many copy threads is called."""
    return f"ours, {threads} thread{'s' * (threads > 1)}"


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
            ours(threads): tiers.ours(stack, self.primary, capacity, copy_threads=threads) for threads in THREADS
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
        size = RowSize(stack, row_bytes, moved, with_fs=True)
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
                rates.add(ours(1), size.store_and_load(ours(1), blocks))
            for name in size.tiers:
                idle.add(f"{name}, scheduler busy", size.store_and_load(name))
                idle.add(f"{name}, scheduler idle", size.store_and_load(name, busy=False))
        return {blocks: rates.spreads() for blocks, rates in by_blocks.items()}, idle.spreads()


def figures(by_row: dict[int, dict[str, Spread]]) -> list[Figure]:
    """The worst of the rows of at least LARGE_ROW_BYTES, for each goal."""

    def ratio(row_bytes: int, measured: str, other: str) -> float:
        return by_row[row_bytes][measured].median / by_row[row_bytes][other].median

    large = [row_bytes for row_bytes in by_row if row_bytes >= LARGE_ROW_BYTES]
    found = []
    most = ours(THREADS[-1])
    for key, name, kinds, other, goal in (
        ("thread_vs_memmove", ours(1), ("store", "load"), "memmove", THREAD_VS_MEMMOVE),
        ("store_vs_fs", most, ("store",), "fs: store", STORE_VS_FS),
        ("load_vs_fs", most, ("load",), "fs: load", LOAD_VS_FS),
    ):
        worst, row_bytes, kind = min(
            (ratio(size, f"{name}: {kind}", other), size, kind) for size in large for kind in kinds
        )
        spreads = by_row[row_bytes]
        found.append(
            Figure(
                key=f"copy_rate.{key}",
                what=f"{kind} of rows of {format_size(row_bytes)}, the worst size; {name} (limit: memmove)",
                unit="GB/s",
                ratio=worst,
                goal=goal,
                goal_is=">=",
                ours=spreads[f"{name}: {kind}"].median,
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
    print(rate_table(by_row, by_blocks, idle))
    draw(run, by_row, by_blocks)
    run.finish()
    return 0


def rate_table(
    by_row: dict[int, dict[str, Spread]], by_blocks: dict[int, dict[str, Spread]], idle: dict[str, Spread]
) -> str:
    """All rates; of the sizes of rows also the ratios to memmove and to the fs tier."""
    lines = [f"{'rows of':>8}  {'GB/s':22}{QUARTILES}{'/memmove':>10}{'/fs':>8}"]
    for row_bytes, spreads in by_row.items():
        memmove = spreads["memmove"].median
        for name, spread in spreads.items():
            line = f"{format_size(row_bytes):>8}  {name:22}{spread.cells()}{spread.median / memmove:10.3f}"
            who, _, kind = name.partition(": ")
            if who.startswith("ours"):
                line += f"{spread.median / spreads[f'fs: {kind}'].median:8.2f}"
            lines.append(line)
    lines.append(f"{'blocks':>8}  {f'a job, of {format_size(DEFAULT_ROW_BYTES)}':22}{QUARTILES}")
    for blocks, spreads in by_blocks.items():
        lines += [f"{blocks:>8}  {name:22}{spread.cells()}" for name, spread in spreads.items()]
    lines.append(f"{'scheduler busy or idle':42}{QUARTILES}")
    lines += [f"{name:42}{spread.cells()}" for name, spread in idle.items()]
    return "\n".join(lines)


def draw(run: Run, by_row: dict[int, dict[str, Spread]], by_blocks: dict[int, dict[str, Spread]]) -> None:
    shades = ("#4c72b0", "#55a868", "#8172b3", "#937860", "#da8bc3", "#64b5cd", "#ccb974")
    styles = {**{ours(threads): shades[at] for at, threads in enumerate(THREADS)}, "fs": "#dd8452"}
    with figure(run.picture, ncols=2, figsize=(11, 4.6), sharey=True) as (_, (left, right)):
        for name, color in styles.items():
            for kind, style in (("store", "o-"), ("load", "s--")):
                points = {size: each[f"{name}: {kind}"] for size, each in by_row.items()}
                plot_spreads(left, points, style, color, f"{name}, {kind}")
        sizes = list(by_row)
        plot_spreads(left, {size: by_row[size]["memmove"] for size in sizes}, ":", "black", "one large memmove")
        left.set_xlabel("bytes a row")
        left.set_xscale("log", base=2)
        left.set_xticks(sizes, [format_size(size) for size in sizes], rotation=30)
        left.set_ylabel("GB/s: median, quartiles as a band")
        left.set_title("Copy rate, scheduler busy in Python")
        left.legend(fontsize="small", ncols=2, loc="upper left")
        for kind, style in (("store", "o-"), ("load", "s--")):
            rates = {blocks: each[f"{ours(1)}: {kind}"] for blocks, each in by_blocks.items()}
            plot_spreads(right, rates, style, styles[ours(1)], f"{ours(1)}, {kind}")
        right.set_xscale("log", base=2)
        right.set_xticks(list(by_blocks), [str(blocks) for blocks in by_blocks])
        right.set_xlabel(f"blocks a job, of {format_size(DEFAULT_ROW_BYTES)}")
        right.set_title("Blocks a job")
        right.legend(fontsize="small")
        # Room for the legend, a line of it for two tiers and kinds.
        left.set_ylim(0, (1.15 + 0.08 * len(styles)) * left.get_ylim()[1])
        for axes in (left, right):
            axes.grid(alpha=0.3)


def _plain(spreads: dict[str, Spread]) -> dict[str, dict[str, float]]:
    return {name: asdict(spread) for name, spread in spreads.items()}


if __name__ == "__main__":
    sys.exit(main())
