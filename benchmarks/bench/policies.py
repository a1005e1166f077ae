"""Replays request traces against the tier's eviction policy and a plain LRU one, behind the same primary.

As in `replay`, through vLLM's real tiering manager, with the bytes of every hit checked. At each of six capacities of
the tier (1/64, 1/32, ... 1/2 of a trace's different blocks) and with a primary of 1/8, 1/4 and 1/2 of the tier: the
share of block accesses that the primary or the tier hits, with "lru" and with PlainLru, tail first. Nowhere may ours be
more than 0.01 below. Where the primary holds less than the largest request, that request is not hit as a whole.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench.replay import Trace, counted, replay_hits
from benchmarks.shared.common import Figure, Run, arguments

PRIMARY_DIVISORS = (8, 4, 2)
POLICIES = {"ours": "lru", "plain": "benchmarks.bench.plain_lru:PlainLru"}
# Hit ratio that ours may be below the plain one.
MOST_BELOW = 0.01


def measure(run: Run, traces: Sequence[Trace], quick: bool) -> list[dict[str, Any]]:
    """A point for each trace, capacity and primary."""
    points, work = [], {}
    for trace in traces:
        for share, blocks in reversed(trace.grid.items()):
            for divisor in PRIMARY_DIVISORS:
                for name, policy in POLICIES.items():
                    work[len(points), name] = replay_hits, (trace.requests, blocks // divisor, blocks, policy)
                points.append({"trace": trace, "share": share, "blocks": blocks, "primary": blocks // divisor})
    for (at, name), hits in counted(run, work, here=quick).items():
        points[at][name] = sum(hits) / points[at]["trace"].accesses
    return [point | {"trace": point["trace"].name} for point in points]


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


def main() -> int:
    parser = arguments(__doc__)
    help_of_traces = "in Mooncake's or Bailian's format, plain or gzip (default: one is made)"
    parser.add_argument("traces", nargs="*", type=Path, help=help_of_traces)
    options = parser.parse_args()
    try:
        traces = [Trace.read(path, options.quick) for path in options.traces or [None]]
    except ValueError as error:
        parser.error(str(error))
    names = ", ".join(trace.name for trace in traces)
    about = f"Requests of {names}. Transfers end before the next step. No times are measured."
    run = Run("policies", about, options.output)
    points = measure(run, traces, options.quick)
    run.results = {"points": points, "most_below": MOST_BELOW}
    print(table(points))
    worst = min(points, key=lambda point: point["ours"] - point["plain"])
    run.figures.append(
        Figure(
            "policies.above_plain_lru",
            "hit ratio above that of a plain LRU (baseline), where it is least",
            "hits",
            worst["ours"] - worst["plain"],
            f">= {-MOST_BELOW}",
            ours=worst["ours"],
            limit=worst["plain"],
        )
    )
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
