"""Replays a request trace through vLLM's real tiering manager and the tier: how often is a block there?

Traces are in Mooncake's format or Bailian's, plain or gzip, a JSON object per line: `hash_ids`, one id per block of the
prompt, `timestamp` in order of arrival, `input_length` (tokens). benchmarks/traces.py has what is taken and what is
refused. A block is hit if it is in the primary or in the tier together with all blocks before it. Rows are a few
hundred bytes, and the bytes of every hit are checked.

Beside it, for as many blocks: one plain LRU cache, which hits by the same rule, and the optimum: Belady's choice by the
future, with the right not to keep a block at all. The optimum is asked block by block, also for those behind a miss, so
no policy with that many blocks can hit more. And whatever the capacity: the primary alone, with no tier behind it, and
an infinite cache, which hits every block that it has seen.

The capacities, primary and tier together, are fixed: 1/64, 1/32, ... 1/2 of the trace's different blocks. The figure is
the mean over all of them of our hits divided by the optimum's, so nobody chooses where it is taken, and the table shows
every one.
"""

from __future__ import annotations

import heapq
import multiprocessing
import os
import random
import signal
import statistics
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.shared.common import Figure, Run, arguments, figure
from benchmarks.shared.traces import read_trace

# Of the primary, by the largest request: so that one request's blocks are never in each other's way.
PRIMARY_TO_REQUEST = 2
# What the trace's different blocks are divided by: the capacities, primary and tier together.
DIVISORS = (64, 32, 16, 8, 4, 2)
# At most.
REQUESTS = 20_000
# So many that the least capacity is more than the primary.
QUICK_REQUESTS = 2000
GOAL = 0.5
# As many as there are cores, but each has a vLLM of its own: 0.6 GB.
PROCESSES = min(len(os.sched_getaffinity(0)), 4)


def synthetic_trace(count: int, seed: int = 1) -> list[list[int]]:
    """Conversations of several turns, some of which begin with the same document; the same for the same seed."""
    draw = random.Random(seed)
    fresh = iter(range(1 << 30))
    documents = [[next(fresh) for _ in range(draw.randint(4, 24))] for _ in range(20)]
    open_conversations: list[list[int]] = []
    requests = []
    for _ in range(count):
        if open_conversations and draw.random() < 0.7:
            conversation = draw.choice(open_conversations[-60:])
        else:
            document = documents[min(int(draw.expovariate(0.3)), len(documents) - 1)]
            conversation = list(document) if draw.random() < 0.6 else [next(fresh) for _ in range(draw.randint(2, 10))]
            open_conversations.append(conversation)
        conversation += [next(fresh) for _ in range(draw.randint(1, 4))]
        requests.append(list(conversation))
    return requests


def infinite_hits(requests: Iterable[Sequence[int]]) -> int:
    """Block accesses that an infinite cache hits."""
    seen: set[int] = set()
    hits = 0
    for blocks in requests:
        hits += sum(1 for block in blocks if block in seen)
        seen.update(blocks)
    return hits


def lru_hits(requests: Iterable[Sequence[int]], capacity: int) -> int:
    """Block accesses that one least recently used cache of `capacity` blocks hits, by our rule: with all before it."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for blocks in requests:
        hits += next((at for at, block in enumerate(blocks) if block not in held), len(blocks))
        for block in blocks:
            held[block] = None
            held.move_to_end(block)
            if len(held) > capacity:
                held.popitem(last=False)
    return hits


def optimal_hits(requests: Iterable[Sequence[int]], capacity: int) -> int:
    """Block accesses that the best choice of `capacity` blocks hits; see above."""
    accesses = [block for blocks in requests for block in blocks]
    never = len(accesses)
    next_use = [never] * len(accesses)
    last: dict[int, int] = {}
    for at in range(len(accesses) - 1, -1, -1):
        next_use[at] = last.get(accesses[at], never)
        last[accesses[at]] = at
    held: dict[int, int] = {}  # block -> its next use
    furthest: list[tuple[int, int]] = []  # (-next use, block), some of them stale
    hits = 0
    for at, block in enumerate(accesses):
        hits += block in held
        held[block] = next_use[at]
        heapq.heappush(furthest, (-next_use[at], block))
        while len(held) > capacity:
            use, victim = heapq.heappop(furthest)
            if held.get(victim) == -use:
                del held[victim]
    return hits


def capacities(different: int) -> dict[str, int]:
    """The grid: blocks, by their share of `different` blocks."""
    return {f"1/{divisor}": different // divisor for divisor in DIVISORS}


class Trace:
    """Requests, and the capacities at which they can be replayed: those that are more than the primary."""

    def __init__(self, name: str, requests: list[list[int]]) -> None:
        self.name = name
        self.requests = requests
        self.accesses = sum(map(len, requests))
        self.different = len({block for blocks in requests for block in blocks})
        self.primary_blocks = PRIMARY_TO_REQUEST * max(map(len, requests))
        self.grid = capacities(self.different)
        self.measured = {share: blocks for share, blocks in self.grid.items() if blocks > self.primary_blocks}

    @classmethod
    def read(cls, path: Path | None, most: int) -> Trace:
        """At most so many requests of the file, or as many made ones. Raises ValueError, in words, if it is none."""
        if path is None:
            return cls("a synthetic trace", synthetic_trace(most))
        try:
            return cls(path.name, read_trace(path, most))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error

    def objection(self) -> str | None:
        """Why nothing can be said of this trace; None if something can."""
        if not infinite_hits(self.requests):
            return f"no block of {self.name} is asked for twice, so there is nothing to hit"
        return None if self.measured else self._too_few("all capacities")

    def objection_to_figure(self) -> str | None:
        """Why it gives no figure, which is the mean over the whole grid; None if it does."""
        return None if len(self.measured) == len(self.grid) else self._too_few("some capacities")

    def _too_few(self, which: str) -> str:
        return (
            f"{self.name} has too few different blocks, {self.different}: {which}, of {', '.join(self.grid)} of them, "
            f"are not more than the primary, which is {self.primary_blocks}, {PRIMARY_TO_REQUEST} times the largest "
            "request"
        )


def objection(path: Path, quick: bool) -> str | None:
    """Why this file gives no figure, in one sentence; None if it does."""
    try:
        trace = Trace.read(path, QUICK_REQUESTS if quick else REQUESTS)
    except ValueError as error:
        return str(error)
    return trace.objection() or trace.objection_to_figure()


def replay_hits(requests: Sequence[Sequence[int]], primary_blocks: int, tier_blocks: int) -> tuple[int, int]:
    """Blocks that vLLM's manager had (in the primary, in the tier) of a whole trace; without a tier if it has none."""
    from benchmarks.shared.tiering import replay

    hits = replay(requests, primary_blocks, tier_blocks)
    return hits.primary, hits.tier


class Here(Executor):
    """Does at once what it is given: for work that is less than starting processes."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*arguments, **options))
        return done


@contextmanager
def processes() -> Iterator[Executor]:
    """An executor of PROCESSES processes, which end with the block, at once if it is left by an exception."""
    others = multiprocessing.active_children()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn, initializer=_begin_process) as pool:
        try:
            yield pool
        except BaseException:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise


def _begin_process() -> None:
    # Ctrl-C reaches us as well, but it is the parent that ends us; a parent that was killed does not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def measure(run: Run, trace: Trace, pool: Executor) -> tuple[float, list[dict[str, Any]]]:
    """(hit ratio of the primary alone, what was hit at each capacity)."""
    run.progress(f"{len(trace.measured)} capacities, and the primary alone")
    asked: dict[tuple[str, str], Future[Any]] = {}
    for share, blocks in reversed(trace.measured.items()):  # the longest first
        asked["ours", share] = pool.submit(
            replay_hits, trace.requests, trace.primary_blocks, blocks - trace.primary_blocks
        )
    asked["alone", ""] = pool.submit(replay_hits, trace.requests, trace.primary_blocks, 0)
    for share, blocks in trace.measured.items():
        asked["optimum", share] = pool.submit(optimal_hits, trace.requests, blocks)
        asked["lru", share] = pool.submit(lru_hits, trace.requests, blocks)
    for done, _ in enumerate(as_completed(asked.values()), start=1):
        run.progress(f"{done} of {len(asked)} replays, optima and plain caches are done")
    points = []
    for share, blocks in trace.measured.items():
        in_primary, in_tier = asked["ours", share].result()
        optimum = asked["optimum", share].result()
        points.append(
            {
                "share": share,
                "blocks": blocks,
                "primary": in_primary / trace.accesses,
                "tier": in_tier / trace.accesses,
                "ours": (in_primary + in_tier) / trace.accesses,
                "lru": asked["lru", share].result() / trace.accesses,
                "optimum": optimum / trace.accesses,
                "ours_to_optimum": (in_primary + in_tier) / optimum,
            }
        )
    return sum(asked["alone", ""].result()) / trace.accesses, points


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "--trace", type=Path, help="in Mooncake's or Bailian's format, plain or gzip (default: one is made)"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=REQUESTS,
        help=f"how many of the trace's requests to replay, at most; with --quick never more than {QUICK_REQUESTS} "
        "(default: %(default)s)",
    )
    options = parser.parse_args()
    if options.requests < 1:
        parser.error("--requests must be at least 1")
    most = min(options.requests, QUICK_REQUESTS) if options.quick else options.requests
    try:
        trace = Trace.read(options.trace, most)
    except ValueError as error:
        parser.error(str(error))
    if wrong := trace.objection():
        parser.error(wrong)
    run = Run(
        "replay",
        f"{len(trace.requests)} requests of {trace.name} through vLLM's TieringOffloadingManager; transfers end before "
        "the next step. No times are measured.",
        options.output,
    )
    if options.quick:
        alone, points = measure(run, trace, Here())
    else:
        with processes() as pool:
            alone, points = measure(run, trace, pool)
    infinite = infinite_hits(trace.requests) / trace.accesses
    run.results = {
        "requests": len(trace.requests),
        "accesses": trace.accesses,
        "different_blocks": trace.different,
        "primary_blocks": trace.primary_blocks,
        "primary_alone": alone,
        "infinite": infinite,
        "by_capacity": points,
    }
    print(
        f"{trace.accesses} accesses to {trace.different} blocks. Hit ratios; the primary has "
        f"{trace.primary_blocks} blocks:"
    )
    print(hit_ratios(trace.grid, points, alone, infinite))
    if wrong := trace.objection_to_figure():
        print(f"No figure: {wrong}.")
    else:
        run.figures.append(
            Figure(
                key="replay.hit_ratio_vs_optimal",
                what="hit ratio / the optimum's, which knows the future (baseline): the mean over 1/64, 1/32, ... 1/2 "
                "of the blocks (interval: the least and the most of them)",
                unit="hits",
                ratio=statistics.mean(point["ours_to_optimum"] for point in points),
                goal=GOAL,
                goal_is=">=",
                ours=statistics.mean(point["ours"] for point in points),
                limit=statistics.mean(point["optimum"] for point in points),
                low=min(point["ours_to_optimum"] for point in points),
                high=max(point["ours_to_optimum"] for point in points),
            )
        )
    draw(run, f"{len(trace.requests)} requests of {trace.name}", points, trace.primary_blocks, alone, infinite)
    return run.finish()


def hit_ratios(grid: dict[str, int], points: Sequence[dict[str, Any]], alone: float, infinite: float) -> str:
    """All that was measured, as a table: a line a capacity."""
    found = {point["share"]: point for point in points}
    heads = ("primary", "tier", "together", "alone", "LRU", "optimum", "infinite", "/ optimum")
    lines = [f"{'blocks held':>18}" + "".join(f"{head:>10}" for head in heads)]
    for share, blocks in grid.items():
        line = f"{share:>8} {blocks:>9}"
        if share in found:
            point = found[share]
            both = (point["primary"], point["tier"], point["ours"], alone, point["lru"], point["optimum"], infinite)
            line += "".join(f"{value:>10.4f}" for value in (*both, point["ours_to_optimum"]))
        else:
            line += "  not measured: not more than the primary"
        lines.append(line)
    lines.append("alone: the primary without a tier. LRU: one plain cache of as many blocks as both.")
    return "\n".join(lines)


def draw(
    run: Run, title: str, points: Sequence[dict[str, Any]], primary_blocks: int, alone: float, infinite: float
) -> None:
    with figure(run.picture, figsize=(8, 4.5)) as (_, axes):
        blocks = [point["blocks"] for point in points]
        axes.axhline(infinite, color="#8c8c8c", linestyle=":", label="infinite")
        for key, style, color, label in (
            ("optimum", "o--", "#55a868", "the optimum"),
            ("ours", "o-", "#4c72b0", "primary and tier"),
            ("lru", "s:", "#c44e52", "one plain LRU cache"),
            ("primary", "o-", "#dd8452", "of ours, in the primary"),
        ):
            axes.plot(blocks, [point[key] for point in points], style, color=color, label=label)
        axes.axhline(alone, color="#dd8452", linestyle=":", label="the primary alone")
        axes.set_xscale("log", base=2)
        axes.set_xticks(blocks, [f"{point['blocks']}\n{point['share']}" for point in points])
        axes.set_ylim(0, None)
        axes.set_xlabel(f"blocks held, primary ({primary_blocks}) and tier together")
        axes.set_ylabel("hit ratio of blocks")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()


if __name__ == "__main__":
    sys.exit(main())
