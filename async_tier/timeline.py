"""Draws a trace of the tier: compute steps above, transfers below, and how much of them is hidden under compute.

    python -m async_tier.timeline TRACE.json -o overlap.png

The trace is what `trace_path` in the tier's configuration writes. Needs matplotlib (the extra "timeline").
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Span = tuple[float, float]
_STEPS = "steps"
# A scheduler without work that waits for transfers steps about every millisecond: nothing is computed in those.
_SHORTEST_STEP_S = 0.001
_QUEUED = "queued"
# Lanes from the top.
_COLORS = {_STEPS: "#4c72b0", "load": "#dd8452", "store": "#55a868"}


@dataclass
class Timeline:
    """The slices and counters of a trace. Times in seconds from the first of them.

    lanes: (start, end) by lane, sorted. counters: (time, value) by "name: series".
    """

    lanes: dict[str, list[Span]] = field(default_factory=dict)
    counters: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def duration(self) -> float:
        """Seconds from the first slice's start to the last one's end."""
        return max((end for spans in self.lanes.values() for _, end in spans), default=0.0)

    @property
    def transfers(self) -> list[str]:
        """The lanes of copies."""
        return [lane for lane in self.lanes if lane != _STEPS and not lane.endswith(_QUEUED)]

    def hidden_share(self) -> float | None:
        """The share of the time in which anything was copied that was under compute; None without copies."""
        copying = union(span for lane in self.transfers for span in self.lanes[lane])
        computing = union((a, b) for a, b in self.lanes.get(_STEPS, []) if b - a >= _SHORTEST_STEP_S)
        total = length(copying)
        return length(intersection(copying, computing)) / total if total else None

    def between(self, start: float, end: float) -> Timeline:
        """The part from `start` to `end`, on the same clock."""
        return Timeline(
            {
                lane: [(max(start, a), min(end, b)) for a, b in spans if a < end and b > start]
                for lane, spans in self.lanes.items()
            },
            {
                name: [(at, value) for at, value in points if start <= at <= end]
                for name, points in self.counters.items()
            },
        )


def read(path: Path) -> Timeline:
    """The timeline of a trace; one that was cut off counts as far as it goes.

    Raises ValueError, in words, for a file that is no trace of the tier.
    """
    text = path.read_text()
    try:
        events: list[dict[str, Any]] = json.loads(text)
    except json.JSONDecodeError:  # the process was killed: whole lines, and no end
        events = []
        for line in text.splitlines()[1:]:
            try:
                events.append(json.loads(line.rstrip(",")))
            except json.JSONDecodeError:
                break
    if not isinstance(events, list) or not any(isinstance(each, dict) and "ph" in each for each in events):
        raise ValueError(f"{path} is not a trace of the tier: it holds no events")
    begun: dict[tuple[str, int], float] = {}
    lanes: dict[str, list[Span]] = defaultdict(list)
    counters: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        kind, at = event.get("ph"), event.get("ts", 0.0) / 1e6
        if kind == "X":
            lanes[_STEPS].append((at, at + event["dur"] / 1e6))
        elif kind == "b":
            begun[event["cat"], event["id"]] = at
        elif kind == "e":
            lanes[event["cat"]].append((begun.pop((event["cat"], event["id"])), at))
        elif kind == "C":
            for series, value in event["args"].items():
                counters[f"{event['name']}: {series}"].append((at, value))
    zero = min((start for spans in lanes.values() for start, _ in spans), default=0.0)
    return Timeline(
        {lane: sorted((a - zero, b - zero) for a, b in spans) for lane, spans in sorted(lanes.items())},
        {name: sorted((at - zero, value) for at, value in points) for name, points in counters.items()},
    )


def union(spans: Iterable[Span]) -> list[Span]:
    """The same times, as spans that do not touch."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersection(some: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """The times in both; each is a `union`."""
    common: list[Span] = []
    at = 0
    for start, end in some:
        while at < len(others) and others[at][1] <= start:
            at += 1
        here = at
        while here < len(others) and others[here][0] < end:
            common.append((max(start, others[here][0]), min(end, others[here][1])))
            here += 1
    return common


def length(spans: Iterable[Span]) -> float:
    """Their seconds together; they do not overlap."""
    return sum(end - start for start, end in spans)


def summary(timeline: Timeline) -> str:
    """What there is, in a few lines."""
    lines = [f"{timeline.duration:.2f} s"]
    for lane, spans in timeline.lanes.items():
        lines.append(f"  {lane:14} {len(spans):6} slices, busy for {length(union(spans)):8.3f} s")
    hidden = timeline.hidden_share()
    lines.append("no transfers" if hidden is None else f"{hidden:.0%} of transfer time hidden under compute")
    return "\n".join(lines)


def draw(timeline: Timeline, output: Path, title: str = "") -> None:
    """Draw the timeline into a picture of matplotlib's formats, by the name's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lanes = [_STEPS] * (_STEPS in timeline.lanes)
    lanes += sorted((lane for lane in timeline.lanes if lane != _STEPS), key=lambda lane: (lane.split()[0], lane))
    series = {name: points for name, points in timeline.counters.items() if points}
    figure, (above, below) = pyplot.subplots(
        2,
        1,
        figsize=(12, 1.8 + 0.45 * len(lanes) + 2),
        height_ratios=[0.45 * len(lanes) + 0.6, 1.6],
        sharex=True,
        layout="constrained",
    )
    for row, lane in enumerate(lanes):
        spans = timeline.lanes[lane]
        above.broken_barh(
            [(start, end - start) for start, end in spans],
            (row - 0.4, 0.8),
            facecolors=_COLORS.get(lane.split()[0], "#8c8c8c"),
            alpha=0.35 if lane.endswith(_QUEUED) else 1.0,
            # So that what is shorter than a pixel shows.
            edgecolor=_COLORS.get(lane.split()[0], "#8c8c8c"),
            linewidth=0.0 if lane == _STEPS else 0.6,
        )
    above.set_yticks(range(len(lanes)), ["compute steps" if lane == _STEPS else lane for lane in lanes])
    above.set_ylim(len(lanes) - 0.4, -0.6)
    hidden = timeline.hidden_share()
    told = "no transfers" if hidden is None else f"{hidden:.0%} of transfer time hidden under compute"
    above.set_title(f"{title}: {told}" if title else told)
    for name, points in series.items():
        if name.startswith("bytes in flight"):
            direction = name.rpartition(" ")[2]
            times, values = zip(*points, strict=True)
            below.step(
                times,
                [value / 2**20 for value in values],
                where="post",
                label=direction,
                color=_COLORS.get(direction),
            )
    below.set_ylabel("MiB in flight")
    below.set_xlabel("seconds")
    if below.get_legend_handles_labels()[0]:
        below.legend(loc="upper right")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="what trace_path has written")
    parser.add_argument("-o", "--output", type=Path, help="the picture to draw (PNG, SVG or PDF)")
    parser.add_argument("--start", type=float, default=0.0, help="second to begin at (%(default)s)")
    parser.add_argument("--end", type=float, help="second to end at (the last)")
    options = parser.parse_args(arguments)
    try:
        timeline = read(options.trace)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    end = timeline.duration if options.end is None else options.end
    if not 0 <= options.start < end:
        parser.error(f"--start {options.start:g} must be at least 0 and before the end, {end:g}")
    part = timeline.between(options.start, end)
    print(summary(part))
    if options.output:
        try:
            draw(part, options.output, options.trace.stem)
        except ModuleNotFoundError:
            parser.error("drawing needs matplotlib: install the extra 'timeline'")
        print(f"drawn: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
