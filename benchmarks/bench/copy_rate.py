"""How fast the tier copies, next to one large memmove and to vLLM's fs tier on tmpfs.

Against the size of rows, the blocks of a job, the number of copy threads (every power of two up to the cores), with the
scheduler's thread idle or busy in Python, and awaited from asyncio. Every load is checked to bring back what was
stored. Rates are medians of one run. Memory may be twice as fast in one second as in the next, so our rates are divided
by those of memmoves just before and after, and the medians of these ratios are what has a goal.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import harmonic_mean
from typing import Any

import numpy as np

from async_tier.aio import AsyncBlockStore
from async_tier.config import TierConfig
from async_tier.streams.host import default_threads
from async_tier.text import format_size
from benchmarks.shared import tiers
from benchmarks.shared.common import QUARTILES, Figure, Run, Spread, arguments, figure, plot_spreads

KIB, MIB = 1 << 10, 1 << 20
GB = 1e-9
ROW_BYTES = (16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB)
# A job of 1,024 blocks of the default size is a row of the sweep.
BLOCKS_A_JOB = (1, 4, 32, 256, 1024)
DEFAULT_ROW_BYTES = 256 * KIB
# What one measurement moves: far beyond the caches.
MOVED = 512 * MIB
REPETITIONS = 5
# Of them, with the fs tier, whose passes take most of the time.
FS_REPETITIONS = 3
# The most files of a pass with it: of rows below LARGE_ROW_BYTES it moves less.
FS_ROWS = 8192
# Of ours in each, before and after the fs tier.
TURNS = 2
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


@dataclass(frozen=True)
class Passes:
    """GB/s of a store of every row of the primary and of a load into other rows, and of memmoves around each."""

    store: float
    load: float
    around_store: float
    around_load: float


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

    def store_and_load(self, name: str, blocks: int = tiers.JOB_BLOCKS, busy: bool = True) -> Passes:
        """A store and a load of everything, of FS_ROWS at most with fs; checks what came back."""
        tier = self.tiers[name]
        keys, sources, targets = self._stamped(blocks, FS_ROWS if name == "fs" else None)
        stores = [self._jobs.store(*each) for each in zip(keys, sources, strict=True)]
        # In the order of the stores' sets, in which they have their sources.
        loads = [self._jobs.load(list(job.keys), rows) for job, rows in zip(stores, targets, strict=True)]
        moved = sum(map(len, sources)) * self.primary.shape[1]
        passes = self._passes(moved, *(lambda jobs=jobs: tiers.move(tier, jobs, busy) for jobs in (stores, loads)))
        self._check(name, sources, targets)
        if name == "fs" and self._fs is not None:
            self._fs.remove_blocks()
        return passes

    def store_and_load_awaited(self, runner: asyncio.Runner, store: AsyncBlockStore) -> Passes:
        """The same with asyncio: every job an await, JOBS_IN_FLIGHT at a time."""
        keys, sources, targets = self._stamped(tiers.JOB_BLOCKS)

        async def all_of(call: Callable[..., Awaitable[object]], rows: list[np.ndarray]) -> None:
            waiting = iter(zip(keys, rows, strict=True))

            async def some() -> None:
                for each in waiting:
                    await call(*each)

            await asyncio.gather(*(some() for _ in range(tiers.JOBS_IN_FLIGHT)))

        passes = self._passes(
            self.primary.nbytes,
            lambda: tiers.timed(lambda: runner.run(all_of(store.store, sources))),
            lambda: tiers.timed(lambda: runner.run(all_of(store.load, targets))),
        )
        self._check("asyncio", sources, targets)
        return passes

    def _stamped(
        self, blocks: int, most: int | None = None
    ) -> tuple[list[list[bytes]], list[np.ndarray], list[np.ndarray]]:
        """Keys, and rows to store from and to load into, by job, `most` or all; every row has its number in it."""
        self._stamps[:] = np.arange(len(self._stamps))
        sources, targets = self._rows(blocks, most), self._rows(blocks, most)
        return tiers.groups(tiers.block_keys(sum(map(len, sources))), blocks), sources, targets

    def _passes(self, moved: int, store: Callable[[], float], load: Callable[[], float]) -> Passes:
        """Of calls that move so many bytes each and return the seconds they took."""
        memmoves, rates = [self.memmove()], []
        for call in (store, load):
            rates.append(moved * GB / call())
            memmoves.append(self.memmove())
        before, between, after = memmoves
        return Passes(*rates, harmonic_mean((before, between)), harmonic_mean((between, after)))

    def _check(self, name: str, sources: list[np.ndarray], targets: list[np.ndarray]) -> None:
        if not np.array_equal(self._stamps[np.concatenate(targets)], np.concatenate(sources)):
            raise RuntimeError(f"{name} loaded other bytes than it stored")

    def warm_up(self) -> None:
        self.memmove()
        for name in self.tiers:
            # The fs tier has no rows of its own to touch.
            for _ in range(1 if name == "fs" else TIER_TO_PRIMARY):
                self.store_and_load(name)

    def _rows(self, blocks: int, most: int | None) -> list[np.ndarray]:
        """Rows of the primary in random order, none twice, `most` or all, by job."""
        rows = self._draw.permutation(len(self._stamps)).astype(np.int32)[:most]
        return [rows[at : at + blocks] for at in range(0, len(rows), blocks)]


class Rates:
    """GB/s as they are measured."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}

    def add(self, name: str, passes: Passes) -> None:
        for kind, rate, memmove in (
            ("store", passes.store, passes.around_store),
            ("load", passes.load, passes.around_load),
        ):
            self._note(f"{name}: {kind}", rate)
            self._note("memmove", memmove)
            self._note(f"{name}: {kind} / memmove", rate / memmove)

    def spreads(self) -> dict[str, Spread]:
        return {name: Spread.of(each) for name, each in self._found.items()}

    def _note(self, name: str, value: float) -> None:
        self._found.setdefault(name, []).append(value)


def measure_row_size(row_bytes: int, moved: int, repetitions: int) -> dict[str, Spread]:
    with ExitStack() as stack:
        size = RowSize(stack, row_bytes, moved, with_fs=True)
        size.warm_up()
        rates = Rates()
        mine = [name for name in size.tiers if name != "fs"]
        for repetition in range(repetitions):
            between = ["fs"] if repetition < FS_REPETITIONS else []
            for name in [*mine, *between, *reversed(mine)]:
                rates.add(name, size.store_and_load(name))
        return rates.spreads()


def measure_default(moved: int, repetitions: int) -> tuple[dict[int, dict[str, Spread]], dict[str, Spread]]:
    """(by blocks a job, by what the scheduler's thread does), with rows of the default size."""
    with ExitStack() as stack:
        size = RowSize(stack, DEFAULT_ROW_BYTES, moved, with_fs=False)
        size.warm_up()
        by_blocks = {blocks: Rates() for blocks in BLOCKS_A_JOB}
        by_scheduler = Rates()
        config = TierConfig(bytes_to_use=TIER_TO_PRIMARY * moved, copy_threads=1)
        with asyncio.Runner() as runner:
            store = runner.run(_opened(size.primary, config))
            try:
                for _ in range(TIER_TO_PRIMARY):
                    size.store_and_load_awaited(runner, store)
                for _ in range(repetitions):
                    for blocks, rates in by_blocks.items():
                        rates.add(ours(1), size.store_and_load(ours(1), blocks))
                    for name in size.tiers:
                        by_scheduler.add(f"{name}, scheduler busy", size.store_and_load(name))
                        by_scheduler.add(f"{name}, scheduler idle", size.store_and_load(name, busy=False))
                    by_scheduler.add(f"{ours(1)}, asyncio", size.store_and_load_awaited(runner, store))
            finally:
                runner.run(store.close())
        return {blocks: rates.spreads() for blocks, rates in by_blocks.items()}, by_scheduler.spreads()


async def _opened(primary: np.ndarray, config: TierConfig) -> AsyncBlockStore:
    return AsyncBlockStore(primary, config)


def figures(by_row: dict[int, dict[str, Spread]]) -> list[Figure]:
    """The worst of the rows of at least LARGE_ROW_BYTES, for each goal."""
    large = {row_bytes: spreads for row_bytes, spreads in by_row.items() if row_bytes >= LARGE_ROW_BYTES}
    both = ("store", "load")
    to_memmove, row_bytes, kind = min(
        ((spreads[f"{ours(1)}: {kind} / memmove"], size, kind) for size, spreads in large.items() for kind in both),
        key=lambda found: found[0].median,
    )
    spreads = large[row_bytes]
    found = [
        Figure(
            key="copy_rate.thread_vs_memmove",
            what=f"{kind} of rows of {format_size(row_bytes)}, the worst size, {ours(1)} / memmoves before and after "
            "(limit), and its quartiles",
            unit="GB/s",
            ratio=to_memmove.median,
            low=to_memmove.low,
            high=to_memmove.high,
            paired=True,
            goal=THREAD_VS_MEMMOVE,
            goal_is=">=",
            ours=spreads[f"{ours(1)}: {kind}"].median,
            fs=spreads[f"fs: {kind}"].median,
            limit=spreads["memmove"].median,
        )
    ]
    name = ours(default_threads())
    for key, kind, goal in (("store_vs_fs", "store", STORE_VS_FS), ("load_vs_fs", "load", LOAD_VS_FS)):
        ratios = {
            size: spreads[f"{name}: {kind}"].median / spreads[f"fs: {kind}"].median for size, spreads in large.items()
        }
        row_bytes = min(ratios, key=lambda size: ratios[size])
        spreads = large[row_bytes]
        found.append(
            Figure(
                key=f"copy_rate.{key}",
                what=f"{kind} of rows of {format_size(row_bytes)}, the worst size, {name}, the default / the fs tier "
                "(limit: one memmove)",
                unit="GB/s",
                ratio=ratios[row_bytes],
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
        f"GB/s, medians of {min(repetitions, FS_REPETITIONS)} of the fs tier and {TURNS * repetitions} of ours by the "
        f"size of rows, else of {repetitions}, in turns after {TIER_TO_PRIMARY} passes (fs: 1) to warm up, a memmove "
        f"before and after. Each moves {moved // MIB} MiB (fs: {FS_ROWS} rows at most) of rows in random order, in "
        f"jobs of {tiers.JOB_BLOCKS} blocks, {tiers.JOBS_IN_FLIGHT} in flight, the scheduler's thread busy in Python, "
        "unless said otherwise.",
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
    """All rates; of ours also the ratios to memmove, pair by pair, and to the fs tier."""

    def rows(first: str, spreads: dict[str, Spread]) -> list[str]:
        lines = []
        for name, spread in spreads.items():
            if name.endswith("/ memmove"):
                continue
            line = f"{first:>8}  {name:38}{spread.cells()}"
            who, _, kind = name.partition(": ")
            if who.startswith("ours"):
                line += f"{spreads[f'{name} / memmove'].median:10.3f}"
                if fs := spreads.get(f"fs: {kind}"):
                    line += f"{spread.median / fs.median:8.2f}"
            lines.append(line)
        return lines

    lines = [f"{'rows of':>8}  {'GB/s':38}{QUARTILES}{'/memmove':>10}{'/fs':>8}"]
    for row_bytes, spreads in by_row.items():
        lines += rows(format_size(row_bytes), spreads)
    lines.append(f"{'blocks':>8}  {f'a job, of {format_size(DEFAULT_ROW_BYTES)}':38}{QUARTILES}{'/memmove':>10}")
    for blocks, spreads in by_blocks.items():
        lines += rows(str(blocks), spreads)
    lines.append(f"{'':8}  {'who submits and waits':38}{QUARTILES}{'/memmove':>10}")
    lines += rows("", idle)
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
        memmoves = {blocks: each["memmove"] for blocks, each in by_blocks.items()}
        plot_spreads(right, memmoves, ":", "black", "one large memmove")
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
