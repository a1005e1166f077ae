"""Replays a request trace through vLLM's real tiering manager and the tier: how often is a block there?

Traces are in Mooncake's format or Bailian's, plain or gzip, a JSON object per line: `hash_ids`, one id per block of the
prompt, `timestamp` in order of arrival, `input_length` (tokens). benchmarks/shared/traces.py has what is taken and what
is refused. A block is hit if it is in the primary or in the tier together with all blocks before it. Rows are a few
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

from benchmarks.shared.common import Figure, Run, arguments
from benchmarks.shared.traces import read_trace

# Of the primary, by the largest request: so that one request's blocks are never in each other's way.
PRIMARY_TO_REQUEST = 2
# What the trace's different blocks are divided by: the capacities, primary and tier together.
DIVISORS = (64, 32, 16, 8, 4, 2)
# At most; with --quick so many that the least capacity is more than the primary.
REQUESTS, QUICK_REQUESTS = 20_000, 2000
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
    """Requests, and the capacities at which they are replayed."""

    def __init__(self, name: str, requests: list[list[int]]) -> None:
        self.name = name
        self.requests = requests
        self.accesses = sum(map(len, requests))
        self.different = len({block for blocks in requests for block in blocks})
        self.primary_blocks = PRIMARY_TO_REQUEST * max(map(len, requests))
        self.grid = capacities(self.different)

    @classmethod
    def read(cls, path: Path | None, quick: bool) -> Trace:
        """The file's requests, or as many made ones. Raises ValueError, in words, if it is none."""
        most = QUICK_REQUESTS if quick else REQUESTS
        if path is None:
            return cls("a synthetic trace", synthetic_trace(most))
        try:
            return cls(path.name, read_trace(path, most))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error

    def objection(self) -> str | None:
        """Why this trace gives no figure, in one sentence; None if it does."""
        if not infinite_hits(self.requests):
            return f"no block of {self.name} is asked for twice, so there is nothing to hit"
        if min(self.grid.values()) > self.primary_blocks:
            return None
        return (
            f"{self.name} has too few different blocks, {self.different}: all capacities, {', '.join(self.grid)} of "
            f"them, have to be more than the primary, which is {self.primary_blocks}, {PRIMARY_TO_REQUEST} times the "
            "largest request"
        )


def objection(path: Path, quick: bool) -> str | None:
    """Why this file gives no figure, in one sentence; None if it does."""
    try:
        trace = Trace.read(path, quick)
    except ValueError as error:
        return str(error)
    return trace.objection()


def replay_hits(
    requests: Sequence[Sequence[int]], primary_blocks: int, tier_blocks: int, policy: str = "lru"
) -> tuple[int, int]:
    """Blocks that vLLM's manager had (in the primary, in the tier) of a whole trace; without a tier if it has none."""
    from benchmarks.shared.tiering import replay  # with vLLM, which takes seconds

    hits = replay(requests, primary_blocks, tier_blocks, policy)
    return hits.primary, hits.tier


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


def counted(run: Run, work: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]], here: bool) -> dict[Any, Any]:
    """What the calls return, by their keys: made in processes, or in this one, for less work than it is to start them.

    The longest comes first.
    """
    if here:
        return {key: call(*arguments) for key, (call, arguments) in work.items()}
    with processes() as pool:
        asked: dict[Any, Future[Any]] = {key: pool.submit(call, *each) for key, (call, each) in work.items()}
        for done, _ in enumerate(as_completed(asked.values()), start=1):
            run.progress(f"{done} of {len(asked)} replays are done")
        return {key: future.result() for key, future in asked.items()}


def measure(run: Run, trace: Trace, quick: bool) -> tuple[float, list[dict[str, Any]]]:
    """(hit ratio of the primary alone, what was hit at each capacity)."""
    requests, primary = trace.requests, trace.primary_blocks
    work: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for share, blocks in reversed(trace.grid.items()):
        work["ours", share] = replay_hits, (requests, primary, blocks - primary)
    work["alone", ""] = replay_hits, (requests, primary, 0)
    for share, blocks in trace.grid.items():
        work["optimum", share] = optimal_hits, (requests, blocks)
        work["lru", share] = lru_hits, (requests, blocks)
    found = counted(run, work, here=quick)
    points = []
    for share, blocks in trace.grid.items():
        in_primary, in_tier = found["ours", share]
        hits = {
            "primary": in_primary,
            "tier": in_tier,
            "ours": in_primary + in_tier,
            "lru": found["lru", share],
            "optimum": found["optimum", share],
        }
        ratios: dict[str, Any] = {what: count / trace.accesses for what, count in hits.items()}
        points.append({"share": share, "blocks": blocks, **ratios, "ours_to_optimum": hits["ours"] / hits["optimum"]})
    return sum(found["alone", ""]) / trace.accesses, points


def main() -> int:
    parser = arguments(__doc__)
    help_of_trace = "in Mooncake's or Bailian's format, plain or gzip (default: one is made)"
    parser.add_argument("--trace", type=Path, help=help_of_trace)
    options = parser.parse_args()
    try:
        trace = Trace.read(options.trace, options.quick)
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
    alone, points = measure(run, trace, options.quick)
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
        f"{trace.accesses} accesses to {trace.different} blocks. Hit ratios; the primary has {trace.primary_blocks} "
        f"blocks, and alone hits {alone:.4f}; an infinite cache {infinite:.4f}:"
    )
    print(hit_ratios(points))
    run.figures.append(figure(points))
    return run.finish()


def figure(points: Sequence[dict[str, Any]]) -> Figure:
    ratios = [point["ours_to_optimum"] for point in points]
    return Figure(
        "replay.hit_ratio_vs_optimal",
        "hit ratio / the optimum's, which knows the future (baseline): the mean over 1/64, 1/32, ... 1/2 of the blocks "
        "(interval: the least and the most of them)",
        "hits",
        statistics.mean(ratios),
        ">= 0.5",
        ours=statistics.mean(point["ours"] for point in points),
        limit=statistics.mean(point["optimum"] for point in points),
        low=min(ratios),
        high=max(ratios),
    )


def hit_ratios(points: Sequence[dict[str, Any]]) -> str:
    """All that was measured, as a table: a line a capacity."""
    columns = ("primary", "tier", "ours", "lru", "optimum", "ours_to_optimum")
    lines = [f"{'blocks held':>18}" + "".join(f"{column:>17}" for column in columns)]
    for point in points:
        cells = "".join(f"{point[column]:>17.4f}" for column in columns)
        lines.append(f"{point['share']:>8} {point['blocks']:>9}{cells}")
    lines.append("ours: primary and tier. lru: one plain cache of as many blocks as both.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
