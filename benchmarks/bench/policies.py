"""Replays request traces against the tier's eviction policy and a plain LRU one, behind the same primary.

As in `replay`, through vLLM's real tiering manager, with the bytes of every hit checked. At each of six capacities of
the tier (1/64, 1/32, ... 1/2 of a trace's different blocks) and with a primary of 1/8, 1/4 and 1/2 of the tier: the
share of block accesses that the primary or the tier hits, with "lru" and with PlainLru, tail first. Nowhere may ours be
more than 0.01 below. Where the primary holds less than the largest request, that request is not hit as a whole.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

from benchmarks.bench.replay import QUICK_REQUESTS, REQUESTS, Trace, processes
from benchmarks.shared.common import Figure, Run, arguments, figure

PRIMARY_DIVISORS = (8, 4, 2)
POLICIES = {"ours": "lru", "plain": "benchmarks.bench.plain_lru:PlainLru"}
# Hit ratio that ours may be below the plain one.
MOST_BELOW = 0.01


def replay_ratio(requests: Sequence[Sequence[int]], primary_blocks: int, tier_blocks: int, policy: str) -> float:
    """Hits of primary and tier together, by block accesses, of a whole trace."""
    from benchmarks.shared.tiering import replay

    return replay(requests, primary_blocks, tier_blocks, policy).ratio


def measure(run: Run, traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """A point for each trace, capacity and primary."""
    points = []
    with processes() as pool:
        asked: dict[Future[float], tuple[dict[str, Any], str]] = {}
        for trace in traces:
            for share, blocks in reversed(trace.grid.items()):  # the longest first
                for divisor in PRIMARY_DIVISORS:
                    point = {"trace": trace.name, "share": share, "blocks": blocks, "primary": blocks // divisor}
                    points.append(point)
                    for name, policy in POLICIES.items():
                        asked[pool.submit(replay_ratio, trace.requests, point["primary"], blocks, policy)] = point, name
        for done, future in enumerate(as_completed(asked), start=1):
            point, name = asked[future]
            point[name] = future.result()
            run.progress(f"{done} of {len(asked)} replays are done")
    return points


def table(points: Sequence[dict[str, Any]]) -> str:
    """All points, and by how much ours is above the plain policy."""
    lines = [f"{'trace':32}{'tier':>8}{'blocks':>9}{'primary':>9}{'ours':>9}{'plain':>9}{'above':>9}"]
    for point in points:
        above = point["ours"] - point["plain"]
        lines.append(
            f"{point['trace'][:31]:32}{point['share']:>8}{point['blocks']:>9}{point['primary']:>9}"
            f"{point['ours']:>9.4f}{point['plain']:>9.4f}{above:>+9.4f}{'  MISSED' if above < -MOST_BELOW else ''}"
        )
    return "\n".join(lines)


def draw(run: Run, points: Sequence[dict[str, Any]], traces: Sequence[Trace]) -> None:
    with figure(run.picture, ncols=len(traces), figsize=(6 * len(traces), 4.5), squeeze=False) as (_, grid):
        for axes, trace in zip(grid[0], traces, strict=True):
            for divisor, color in zip(PRIMARY_DIVISORS, ("#4c72b0", "#dd8452", "#55a868"), strict=True):
                of = [p for p in points if p["trace"] == trace.name and p["primary"] == p["blocks"] // divisor]
                blocks = [point["blocks"] for point in of]
                axes.plot(
                    blocks, [point["ours"] for point in of], "o-", color=color, label=f"ours, primary 1/{divisor}"
                )
                axes.plot(blocks, [point["plain"] for point in of], "s:", color=color, label="plain LRU")
            axes.set_xscale("log", base=2)
            axes.set_ylim(0, None)
            axes.set_xlabel("blocks of the tier")
            axes.set_ylabel("hit ratio of blocks")
            axes.set_title(f"{len(trace.requests)} requests of {trace.name}")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "traces", nargs="*", type=Path, help="in Mooncake's or Bailian's format, plain or gzip (default: one is made)"
    )
    options = parser.parse_args()
    most = QUICK_REQUESTS if options.quick else REQUESTS
    try:
        traces = [Trace.read(path, most) for path in options.traces or [None]]
    except ValueError as error:
        parser.error(str(error))
    names = ", ".join(trace.name for trace in traces)
    run = Run(
        "policies", f"Requests of {names}. Transfers end before the next step. No times are measured.", options.output
    )
    points = measure(run, traces)
    run.results = {"points": points, "most_below": MOST_BELOW}
    print(table(points))
    worst = min(points, key=lambda point: point["ours"] - point["plain"])
    run.figures.append(
        Figure(
            key="policies.above_plain_lru",
            what="hit ratio above that of a plain LRU (baseline), where it is least",
            unit="hits",
            ratio=worst["ours"] - worst["plain"],
            goal=-MOST_BELOW,
            goal_is=">=",
            ours=worst["ours"],
            limit=worst["plain"],
        )
    )
    draw(run, points, traces)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
