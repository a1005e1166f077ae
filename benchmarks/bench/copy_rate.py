"""How fast the tier copies, next to one large memmove and to vLLM's fs tier on tmpfs.

Against the size of rows, the blocks of a job, and the number of copy threads (every power of two up to the cores),
with the scheduler's thread busy in Python. Every load is checked to bring back what was stored. Rates are medians of
one run. Memory may be twice as fast in one second as in the next, so our rates are divided by those of memmoves just
before and after, and the medians of these ratios are what has a goal.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from statistics import harmonic_mean
from typing import Any

import numpy as np

from async_tier.streams.host import default_threads
from async_tier.text import format_size
from benchmarks.shared import tiers
from benchmarks.shared.common import QUARTILES, Figure, Run, Spread, arguments, figure

KIB, MIB = 1 << 10, 1 << 20
GB = 1e-9
ROW_BYTES = (16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB)
BLOCKS_A_JOB = (1, 4, 32, 256, 1024)
DEFAULT_ROW_BYTES = 256 * KIB
# What one measurement moves: far beyond the caches.
MOVED = 512 * MIB
REPETITIONS = 5
# Of them, with the fs tier, whose passes take most of the time.
FS_REPETITIONS = 3
# The most files of a pass with it: of rows below LARGE_ROW_BYTES it moves less.
FS_ROWS = 8192
# The tier's default. As many passes touch every row of it, so that no measurement pays for page faults.
TIER_TO_PRIMARY = 2
# Goals are for rows from here on: smaller ones are in the table and the picture.
LARGE_ROW_BYTES = 64 * KIB
KINDS = ("store", "load")
# Every power of two up to the cores; 64 is the most that the tier takes.
THREADS = [1 << power for power in range(min(len(os.sched_getaffinity(0)), 64).bit_length())]
SHADES = ("#4c72b0", "#55a868", "#8172b3", "#937860", "#da8bc3", "#64b5cd", "#ccb974")

# By what was measured: "WHO: KIND", "memmove", and "WHO: KIND / memmove", pair by pair.
Rates = dict[str, list[float]]


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
        for name in self.tiers:  # to warm up; the fs tier has no rows of its own to touch
            for _ in range(1 if name == "fs" else TIER_TO_PRIMARY):
                self.measure(name, {})

    def memmove(self) -> float:
        """GB/s of one memmove of everything, with nothing else to do."""
        size = self.primary.nbytes
        return size * GB / tiers.timed(ctypes.memmove, self._other.ctypes.data, self.primary.ctypes.data, size)

    def measure(self, name: str, rates: Rates, blocks: int = tiers.JOB_BLOCKS) -> None:
        """Add the rates of a store and a load of everything, of FS_ROWS at most with fs; check what came back."""
        self._stamps[:] = np.arange(len(self._stamps))
        sources, targets = (self._rows(blocks, FS_ROWS if name == "fs" else None) for _ in KINDS)
        keys = tiers.groups(tiers.block_keys(sum(map(len, sources))), blocks)
        stores = [self._jobs.store(*each) for each in zip(keys, sources, strict=True)]
        # In the order of the stores' sets, in which they have their sources.
        loads = [self._jobs.load(list(job.keys), rows) for job, rows in zip(stores, targets, strict=True)]
        moved = sum(map(len, sources)) * self.primary.shape[1]
        before = self.memmove()
        for kind, jobs in zip(KINDS, (stores, loads), strict=True):
            rate = moved * GB / tiers.move(self.tiers[name], jobs)
            after = self.memmove()
            around = harmonic_mean((before, after))
            found = {f"{name}: {kind}": rate, "memmove": around, f"{name}: {kind} / memmove": rate / around}
            for what, value in found.items():
                rates.setdefault(what, []).append(value)
            before = after
        if not np.array_equal(self._stamps[np.concatenate(targets)], np.concatenate(sources)):
            raise RuntimeError(f"{name} loaded other bytes than it stored")
        if name == "fs" and self._fs is not None:
            self._fs.remove_blocks()

    def _rows(self, blocks: int, most: int | None) -> list[np.ndarray]:
        """Rows of the primary in random order, none twice, `most` or all, by job."""
        rows = self._draw.permutation(len(self._stamps)).astype(np.int32)[:most]
        return [rows[at : at + blocks] for at in range(0, len(rows), blocks)]


def spreads(rates: Rates) -> dict[str, Spread]:
    return {name: Spread.of(each) for name, each in rates.items()}


def measure_row_size(row_bytes: int, moved: int, repetitions: int) -> dict[str, Spread]:
    """Of ours two passes in each repetition, before and after the fs tier's."""
    rates: Rates = {}
    with ExitStack() as stack:
        size = RowSize(stack, row_bytes, moved, with_fs=True)
        mine = [name for name in size.tiers if name != "fs"]
        for repetition in range(repetitions):
            for name in [*mine, *["fs"] * (repetition < FS_REPETITIONS), *reversed(mine)]:
                size.measure(name, rates)
    return spreads(rates)


def measure_blocks_a_job(moved: int, repetitions: int) -> dict[int, dict[str, Spread]]:
    """With one copy thread and rows of the default size."""
    by_blocks: dict[int, Rates] = {blocks: {} for blocks in BLOCKS_A_JOB}
    with ExitStack() as stack:
        size = RowSize(stack, DEFAULT_ROW_BYTES, moved, with_fs=False)
        for _ in range(repetitions):
            for blocks, rates in by_blocks.items():
                size.measure(ours(1), rates, blocks)
    return {blocks: spreads(rates) for blocks, rates in by_blocks.items()}


def figures(by_row: dict[int, dict[str, Spread]]) -> list[Figure]:
    """The worst of the rows of at least LARGE_ROW_BYTES, for each goal."""
    large = {row_bytes: found for row_bytes, found in by_row.items() if row_bytes >= LARGE_ROW_BYTES}

    def made(key: str, goal: str, name: str, kinds: tuple[str, ...], of: Callable[[dict[str, Spread], str], float]):
        size, kind = min(
            ((size, kind) for size in large for kind in kinds), key=lambda at: of(large[at[0]], f"{name}: {at[1]}")
        )
        found, what = large[size], f"{name}: {kind}"
        paired = found[f"{what} / memmove"] if of is to_memmove else None
        whose = "memmoves before and after (limit), and its quartiles" if paired else "the fs tier (limit: one memmove)"
        return Figure(
            f"copy_rate.{key}",
            f"{kind} of rows of {format_size(size)}, the worst size, {name} / {whose}",
            "GB/s",
            of(found, what),
            goal,
            ours=found[what].median,
            fs=found[f"fs: {kind}"].median,
            limit=found["memmove"].median,
            low=paired.low if paired else None,
            high=paired.high if paired else None,
            paired=paired is not None,
        )

    def to_memmove(found: dict[str, Spread], what: str) -> float:
        return found[f"{what} / memmove"].median

    def to_fs(found: dict[str, Spread], what: str) -> float:
        return found[what].median / found[f"fs: {what.split(': ')[1]}"].median

    default = ours(default_threads())
    return [
        made("thread_vs_memmove", ">= 0.9", ours(1), KINDS, to_memmove),
        made("store_vs_fs", ">= 2.5", default, ("store",), to_fs),
        made("load_vs_fs", ">= 1.6", default, ("load",), to_fs),
    ]


def main() -> int:
    options = arguments(__doc__).parse_args()
    logging.getLogger("vllm").setLevel(logging.WARNING)
    moved, repetitions = (64 * MIB, 2) if options.quick else (MOVED, REPETITIONS)
    run = Run(
        "copy_rate",
        f"GB/s, medians of {min(repetitions, FS_REPETITIONS)} of the fs tier and {2 * repetitions} of ours by the "
        f"size of rows, else of {repetitions}, in turns after {TIER_TO_PRIMARY} passes (fs: 1) to warm up, a memmove "
        f"before and after. Each moves {moved // MIB} MiB (fs: {FS_ROWS} rows at most) of rows in random order, in "
        f"jobs of {tiers.JOB_BLOCKS} blocks, {tiers.JOBS_IN_FLIGHT} in flight, the scheduler's thread busy in Python.",
        options.output,
    )
    by_row = {}
    for row_bytes in ROW_BYTES:
        run.progress(f"rows of {format_size(row_bytes)}")
        by_row[row_bytes] = measure_row_size(row_bytes, moved, repetitions)
    run.progress("blocks a job")
    by_blocks = measure_blocks_a_job(moved, repetitions)
    run.results = {
        key: {at: {name: asdict(each) for name, each in found.items()} for at, found in by.items()}
        for key, by in (("gb_s_by_row_bytes", by_row), ("gb_s_by_blocks_a_job", by_blocks))
    }
    run.figures = figures(by_row)
    print("\n".join(rate_table("rows of", {format_size(size): found for size, found in by_row.items()})))
    print("\n".join(rate_table("blocks", {str(blocks): found for blocks, found in by_blocks.items()})))
    draw(run, by_row, by_blocks)
    return run.finish()


def rate_table(head: str, by: dict[str, dict[str, Spread]]) -> list[str]:
    """All rates; of ours also the ratios to memmove, pair by pair, and to the fs tier."""
    lines = [f"{head:>8}  {'GB/s':38}{QUARTILES}{'/memmove':>10}{'/fs':>8}"]
    for first, found in by.items():
        for name, spread in found.items():
            if name.endswith("/ memmove"):
                continue
            line = f"{first:>8}  {name:38}{spread.cells()}"
            who, _, kind = name.partition(": ")
            if who.startswith("ours"):
                line += f"{found[f'{name} / memmove'].median:10.3f}"
                if fs := found.get(f"fs: {kind}"):
                    line += f"{spread.median / fs.median:8.2f}"
            lines.append(line)
    return lines


def draw(run: Run, by_row: dict[int, dict[str, Spread]], by_blocks: dict[int, dict[str, Spread]]) -> None:
    names = {**{ours(threads): shade for threads, shade in zip(THREADS, SHADES, strict=False)}, "fs": "#dd8452"}
    panels = (
        ("Copy rate, scheduler busy in Python", "bytes a row", by_row, names, format_size),
        ("Blocks a job", f"blocks a job, of {format_size(DEFAULT_ROW_BYTES)}", by_blocks, [ours(1)], str),
    )
    with figure(run.picture, ncols=2, figsize=(11, 4.6), sharey=True) as (_, both):
        for axes, (title, label, by, shown, tick) in zip(both, panels, strict=True):
            for name in shown:
                for kind, style in zip(KINDS, ("o-", "s--"), strict=True):
                    points = {at: found[f"{name}: {kind}"] for at, found in by.items()}
                    plot_spreads(axes, points, style, names[name], f"{name}, {kind}")
            plot_spreads(axes, {at: found["memmove"] for at, found in by.items()}, ":", "black", "one large memmove")
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(by), [tick(each) for each in by])
            axes.set_xlabel(label)
            axes.set_title(title)
            axes.legend(fontsize="small", ncols=2, loc="upper left")
            axes.grid(alpha=0.3)
        both[0].set_ylabel("GB/s: median, quartiles as a band")
        # Room for the legend, a line of it for two tiers and kinds.
        both[0].set_ylim(0, (1.15 + 0.08 * len(names)) * both[0].get_ylim()[1])


def plot_spreads(axes: Any, points: dict[int, Spread], style: str, color: str, label: str) -> None:
    """The medians, with the quartiles as a band around them."""
    axes.plot(list(points), [each.median for each in points.values()], style, color=color, label=label)
    low, high = [each.low for each in points.values()], [each.high for each in points.values()]
    axes.fill_between(list(points), low, high, color=color, alpha=0.2, linewidth=0)


if __name__ == "__main__":
    sys.exit(main())
