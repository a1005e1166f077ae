"""TraceWriter: what the tier did and when, as a trace that Perfetto and chrome://tracing load.

    lane            what a slice is
    steps           from the end of vLLM's scheduling to the model's results
    store queued    a job from its submission to the start of its first copy; the same for loads
    store ...       its copies: "copy" on copy threads or one CUDA stream, "in" and "out" where there are two legs
    counters        bytes in flight by direction; rows used

The format is the JSON array of the Trace Event Format (Google's document of that name); a file that was cut off loads
as well. Times are on the clock of torch's profiler, so that a trace of its loads beside this one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_tier.streams.base import CopyEvent, CopyStream

logger = logging.getLogger(__name__)

# torch's profiler (kineto) counts from the last full three months, a month being 1/4800 of 400 Gregorian years, so that
# microseconds since then fit a double to the nanosecond.
_TRIMESTER_S = 3 * 2_629_746
# Of the file. A job takes some 600 bytes: that is a hundred thousand of them.
MAX_BYTES = 64 << 20
# How often the file is brought up to date.
_WRITE_INTERVAL_S = 1.0

_STEPS_THREAD = 1


def clock_base_ns(now_ns: int) -> int:
    """The time, in ns since the epoch, that a trace made at `now_ns` counts from."""
    return now_ns // (_TRIMESTER_S * 10**9) * _TRIMESTER_S * 10**9


class TraceWriter:
    """Writes a trace to `path`, in which "{pid}" stands for the number of this process.

    Times are given in ns of CLOCK_MONOTONIC (time.monotonic_ns). Slices may be given in any order. A thread formats and
    writes them; what is given costs the caller an append. Raises ValueError, in words, where the file cannot be made.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path.replace("{pid}", str(os.getpid())))
        try:
            self._file = self.path.open("w")
        except OSError as error:
            raise ValueError(f"trace_path {path!r} cannot be written: {error.strerror}") from error
        now = time.time_ns()
        self._offset_ns = now - time.monotonic_ns() - clock_base_ns(now)
        self._pid = os.getpid()
        self._events: list[dict[str, Any]] = []
        self._written = 0
        self._is_full = False
        self._slices = 0
        self._stop = threading.Event()
        self._file.write("[\n")
        self._name("process_name", "async-tier", 0)
        self._name("thread_name", "steps", _STEPS_THREAD)
        self._file.flush()  # a forked child must not have it to write
        self._writer = threading.Thread(target=self._write_often, name="async-tier-trace", daemon=True)
        self._writer.start()

    def step(self, started_ns: int, ended_ns: int) -> None:
        """A step of the scheduler."""
        self._add("X", "step", started_ns, tid=_STEPS_THREAD, dur=(ended_ns - started_ns) / 1000)

    def slice(self, lane: str, started_ns: int, ended_ns: int, **arguments: int | str) -> None:
        """Something that took its time in `lane`. Slices of a lane may overlap."""
        self._slices += 1
        self._add("b", lane, started_ns, cat=lane, id=self._slices, args=arguments)
        self._add("e", lane, max(started_ns, ended_ns), cat=lane, id=self._slices)

    def counter(self, name: str, at_ns: int, **values: int) -> None:
        """What `name` has come to."""
        self._add("C", name, at_ns, args=values)

    def close(self) -> None:
        """Write what is left. Idempotent. Does nothing in a forked child: the file is the parent's."""
        if not self._file.closed and os.getpid() == self._pid:
            self._stop.set()
            if self._writer is not threading.current_thread():  # the garbage collector runs wherever it likes
                self._writer.join()
            self._write()
            with contextlib.suppress(OSError):
                self._file.write("{}]\n")
                self._file.close()

    # ------------------------------------------------------------------------------------------------------- details

    def _add(self, phase: str, name: str, at_ns: int, **more: Any) -> None:
        if not self._is_full:
            self._events.append(
                {"ph": phase, "name": name, "ts": (at_ns + self._offset_ns) / 1000, "pid": self._pid, **more}
            )

    def _name(self, what: str, name: str, thread: int) -> None:
        self._events.append({"ph": "M", "name": what, "pid": self._pid, "tid": thread, "args": {"name": name}})

    def _write_often(self) -> None:
        while not self._stop.wait(_WRITE_INTERVAL_S):
            self._write()

    def _write(self) -> None:
        events, self._events = self._events, []
        try:
            for event in events:
                if self._written > MAX_BYTES:
                    self._is_full = True
                    break
                self._written += self._file.write(json.dumps(event) + ",\n")
            self._file.flush()
        except OSError as error:  # the disk is full
            self._is_full = True
            logger.warning("The trace %s ends here: %s", self.path, error)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job's submission: "store" or "load", its size, and when (ns of CLOCK_MONOTONIC)."""

    kind: str
    blocks: int
    bytes: int
    at_ns: int


class TierTrace:
    """What a tier's jobs and steps are in a trace. `streams` by kind of job."""

    # Steps that were scheduled and have no results yet: with asynchronous scheduling two. More are lost track of.
    _MAX_STEPS = 8

    def __init__(self, writer: TraceWriter, streams: Mapping[str, CopyStream]) -> None:
        self._writer = writer
        self._streams = streams
        self._in_flight = dict.fromkeys(streams, 0)
        self._scheduled: deque[int] = deque(maxlen=self._MAX_STEPS)
        self._last_results_ns = 0
        for stream in streams.values():
            stream.keep_times()

    def submitted(self, kind: str, blocks: int, size: int) -> Submitted:
        """A job was queued."""
        now = time.monotonic_ns()
        self._in_flight[kind] += size
        self._writer.counter("bytes in flight", now, **self._in_flight)
        return Submitted(kind, blocks, size, now)

    def ended(self, job: Submitted, job_id: int, event: CopyEvent, rows_used: int) -> None:
        """The job's event was seen done."""
        now = time.monotonic_ns()
        self._in_flight[job.kind] -= job.bytes
        self._writer.counter("bytes in flight", now, **self._in_flight)
        self._writer.counter("rows used", now, rows=rows_used)
        spans = self._streams[job.kind].spans(event)
        size = {"job": job_id, "blocks": job.blocks, "bytes": job.bytes}
        started = min((start for _, start, _ in spans), default=now)
        self._writer.slice(f"{job.kind} queued", job.at_ns, started, **size)
        for leg, start, end in spans:
            self._writer.slice(f"{job.kind} {leg}", start, end, **size)

    def scheduled(self) -> None:
        """A step was planned, and the model is about to run it."""
        self._scheduled.append(time.monotonic_ns())

    def results(self) -> None:
        """The results of the oldest step under way have arrived."""
        if self._scheduled:
            now = time.monotonic_ns()
            # Where the next step is planned before the results of the last, its computation begins after them.
            self._writer.step(max(self._scheduled.popleft(), self._last_results_ns), now)
            self._last_results_ns = now
