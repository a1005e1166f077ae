"""Draws a trace of the tier: compute steps above, transfers below, and how much of them is hidden under compute.

    python -m async_tier.timeline TRACE.json -o overlap.png

The trace is what `trace_path` in the tier's configuration writes. A scheduler that waits for transfers makes steps with
nothing to compute, and in the trace only their length tells them apart: set --shortest-step between the length of an
empty step, some ms on a busy machine, and that of a token. Drawing needs matplotlib (the extra "timeline").
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
_EMPTY_STEPS = "empty steps"
# Longer than an empty step (1 to 5 ms were seen on a busy machine), and shorter than a token takes in most models.
SHORTEST_STEP_S = 0.005
_QUEUED = "queued"
_COLORS = {_STEPS: "#4c72b0", "load": "#dd8452", "store": "#55a868"}
_OTHER_COLOR = "#8c8c8c"


@dataclass
class Timeline:
    """The slices and counters of a trace. Times are in seconds from the start of the first slice.

    lanes: (start, end) by lane, sorted; "steps" are those with something to compute, "empty steps" the others.
    counters: (time, value) by "name: series".
    """

    lanes: dict[str, list[Span]] = field(default_factory=dict)
    counters: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def duration(self) -> float:
        """Seconds to the end of the last slice."""
        return max((end for spans in self.lanes.values() for _, end in spans), default=0.0)

    def copying(self, kind: str = "") -> list[Span]:
        """When anything was copied, or anything of the kind ("load", "store"), as spans that do not touch."""
        lanes = (lane for lane in self.lanes if lane not in (_STEPS, _EMPTY_STEPS) and not lane.endswith(_QUEUED))
        return union(span for lane in lanes if lane.startswith(kind) for span in self.lanes[lane])

    def hidden_share(self, kind: str = "") -> float | None:
        """The share of the time of `copying` during which steps computed; None without copies."""
        copying = self.copying(kind)
        computing = union(self.lanes.get(_STEPS, []))
        total = length(copying)
        return length(intersection(copying, computing)) / total if total else None

    def between(self, start: float, end: float) -> Timeline:
        """The part from `start` to `end`, on the same clock."""
        parts = {
            lane: [(max(start, a), min(end, b)) for a, b in spans if a < end and b > start]
            for lane, spans in self.lanes.items()
        }
        return Timeline(
            {lane: spans for lane, spans in parts.items() if spans},
            {
                # The last value before the start holds from the start on.
                name: [(start, value) for at, value in points if at < start][-1:]
                + [(at, value) for at, value in points if start <= at <= end]
                for name, points in self.counters.items()
            },
        )


def read(path: Path, shortest_step_s: float = SHORTEST_STEP_S) -> Timeline:
    """The timeline of a trace, also of a truncated one. Steps shorter than `shortest_step_s` (seconds) are empty.

    Raises OSError for a file that cannot be read, ValueError for one that is no trace of the tier or has neither steps
    nor jobs.
    """
    text = path.read_text()
    try:
        events: list[dict[str, Any]] = json.loads(text)
    except json.JSONDecodeError:  # the process was killed, so the list has no end
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
        try:
            kind, at = event.get("ph"), event.get("ts", 0.0) / 1e6
            if kind == "X":
                took = event["dur"] / 1e6
                lanes[_STEPS if took >= shortest_step_s else _EMPTY_STEPS].append((at, at + took))
            elif kind == "b":
                begun[event["cat"], event["id"]] = at
            elif kind == "e":
                lanes[event["cat"]].append((begun.pop((event["cat"], event["id"])), at))
            elif kind == "C":
                for series, value in event["args"].items():
                    counters[f"{event['name']}: {series}"].append((at, value))
        except (AttributeError, KeyError, TypeError) as error:  # such as a slice that ends but never began
            raise ValueError(f"{path} is not a trace of the tier: it holds {json.dumps(event)}") from error
    if not lanes:
        raise ValueError(f"{path} holds no steps and no jobs that have ended")
    zero = min(start for spans in lanes.values() for start, _ in spans)
    return Timeline(
        {lane: sorted((a - zero, b - zero) for a, b in spans) for lane, spans in sorted(lanes.items())},
        {name: sorted((at - zero, value) for at, value in points) for name, points in counters.items()},
    )


def union(spans: Iterable[Span]) -> list[Span]:
    """The times in any of the spans, as sorted spans that do not touch."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersection(some: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """The times in both; each argument is a `union`."""
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
    """The sum of the spans' seconds; they must not overlap."""
    return sum(end - start for start, end in spans)


def hidden(timeline: Timeline) -> str:
    """One line: how much of the transfer time was hidden under compute."""
    total = timeline.hidden_share()
    if total is None:
        return "no transfers"
    shares = {kind: timeline.hidden_share(kind) for kind in ("store", "load")}
    parts = [f"no {kind}s" if share is None else f"{kind}s {share:.0%}" for kind, share in shares.items()]
    return f"{total:.0%} of transfer time hidden under compute ({', '.join(parts)})"


def summary(timeline: Timeline) -> str:
    """The lanes and `hidden`, in a few lines."""
    lines = [
        f"  {lane:14} {len(spans):6} slices, busy for {length(union(spans)):8.3f} s"
        for lane, spans in timeline.lanes.items()
    ]
    return "\n".join([*lines, hidden(timeline)])


def draw(timeline: Timeline, output: Path, title: str) -> None:
    """Draw the timeline to a file in one of matplotlib's formats, by its suffix.

    Raises OSError if the file cannot be written, ValueError for an unknown suffix.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lanes = [lane for lane in (_STEPS, _EMPTY_STEPS) if lane in timeline.lanes]
    lanes += sorted(timeline.lanes.keys() - set(lanes), key=lambda lane: (lane.split()[0], lane))
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
        color = _COLORS.get(lane.split()[0], _OTHER_COLOR)
        above.broken_barh(
            [(start, end - start) for start, end in spans],
            (row - 0.4, 0.8),
            facecolors=color,
            alpha=0.35 if lane.endswith(_QUEUED) else 1.0,
            # So that spans shorter than a pixel are visible.
            edgecolor=color,
            linewidth=0.0 if lane == _STEPS else 0.6,
        )
    above.set_yticks(range(len(lanes)), ["compute steps" if lane == _STEPS else lane for lane in lanes])
    above.set_ylim(len(lanes) - 0.4, -0.6)
    above.set_title(f"{title}\n{hidden(timeline)}")
    for name, points in series.items():
        if name.startswith("bytes in flight"):
            direction = name.rpartition(" ")[2]
            times, values = zip(*points, strict=True)
            below.step(
                times, [value / 2**20 for value in values], where="post", label=direction, color=_COLORS.get(direction)
            )
    below.set_ylabel("MiB in flight")
    below.set_xlabel("seconds")
    if below.get_legend_handles_labels()[0]:
        below.legend(loc="upper right")
    try:
        figure.savefig(output, dpi=130, format=output.suffix[1:] or "png")
    finally:
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """The program; `program` is what it is called in its help and errors. Returns the exit code."""
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="what trace_path has written")
    parser.add_argument("-o", "--output", type=Path, help="the picture to draw (PNG, SVG or PDF)")
    parser.add_argument("--start", type=float, default=0.0, help="second to begin at (%(default)s)")
    parser.add_argument("--end", type=float, help="second to end at (the last)")
    parser.add_argument(
        "--shortest-step",
        type=float,
        default=SHORTEST_STEP_S * 1000,
        metavar="MS",
        help="milliseconds; shorter steps are taken for empty ones, under which nothing is hidden (%(default)g)",
    )
    options = parser.parse_args(arguments)
    if not options.shortest_step >= 0:
        parser.error(f"--shortest-step must be at least 0 ms, not {options.shortest_step:g}")
    try:
        whole = read(options.trace, options.shortest_step / 1000)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    end = whole.duration if options.end is None else options.end
    if not 0 <= options.start < end:
        parser.error(f"--start {options.start:g} must be at least 0 and before the end, {end:g}")
    part = whole.between(options.start, end)
    is_whole = options.start == 0 and end >= whole.duration
    of = f"all {whole.duration:.2f} s" if is_whole else f"second {options.start:g} to {end:g} of {whole.duration:.2f}"
    print(f"{options.trace}, {of}; steps of less than {options.shortest_step:g} ms are taken for empty")
    print(summary(part))
    if options.output:
        try:
            draw(part, options.output, f"{options.trace.stem}, {of}")
        except ModuleNotFoundError:
            parser.error("drawing needs matplotlib: install the extra 'timeline'")
        except (OSError, ValueError) as error:
            parser.error(f"{options.output} cannot be drawn: {error}")
        print(f"drawn: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
