"""TraceWriter: records what the tier did and when, as a trace for Perfetto and chrome://tracing.

    lane            what a slice is
    steps           from the end of vLLM's scheduling to the model's results
    store queued    a job from its submission to the start of its first copy; the same for loads
    store ...       its copies: "copy" on copy threads or one CUDA stream, "in" and "out" where there are two legs
    counters        bytes in flight by direction; rows used

A job's slices have its number, blocks, bytes, and `outcome`: "success", or why it failed.

The format is the JSON array of the Trace Event Format (Google's document of that name); a truncated file can be loaded,
too. Times are on the clock of torch's profiler, and processes have their real numbers. So a trace of torch's profiler
and this one can be seen together, by putting their events into one list:

    python -c 'import json, sys
    both, tier = (json.load(open(name)) for name in sys.argv[1:])
    both["traceEvents"] += tier
    json.dump(both, sys.stdout)' torch.json tier.json > both.json
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from async_tier.streams.base import CopyEvent
from async_tier.text import brief

logger = logging.getLogger(__name__)

# torch's profiler (kineto) counts time from the last multiple of three months, a month being 1/4800 of 400 Gregorian
# years, so that a double of microseconds is precise to the nanosecond.
_TRIMESTER_S = 3 * 2_629_746
# The size of a file, at most: 60 to 75 thousand jobs, of some 900 bytes with one leg and 1,150 with two.
MAX_BYTES = 64 << 20
# How often events are written to the file, and the switch is looked at.
WRITE_INTERVAL_S = 1.0
# Two clocks are compared: how far apart they may be read, and how often that is tried.
_CLOCK_ERROR_NS = 10_000
_CLOCK_TRIES = 5

# No thread has this number: it is Linux's PID_MAX_LIMIT.
_STEPS_THREAD = 4 << 20


def clock_base_ns(now_ns: int) -> int:
    """The time, in ns since the epoch, from which a trace made at `now_ns` counts."""
    return now_ns // (_TRIMESTER_S * 10**9) * _TRIMESTER_S * 10**9


def clock_offset_ns() -> int:
    """By how many ns the time since the epoch is ahead of CLOCK_MONOTONIC."""
    for _ in range(_CLOCK_TRIES):
        before = time.monotonic_ns()
        now = time.time_ns()
        after = time.monotonic_ns()
        if after - before < _CLOCK_ERROR_NS:  # otherwise this thread was interrupted
            break
    return now - (before + after) // 2


class TraceWriter:
    """Writes a trace to `path`, in which "{pid}" stands for the number of this process.

    A file that has MAX_BYTES is renamed to `path`.1, in place of an older one, and a new file is begun. While there is
    a file `path`.off, nothing is written or kept. When that file is removed, a new trace is begun in the same way.

    Times are in ns of CLOCK_MONOTONIC (time.monotonic_ns), and slices may come in any order. A thread formats and
    writes the events, so that the caller only pays for an append. Raises ValueError if the file cannot be opened, or if
    another tier is writing a trace to it.
    """

    def __init__(self, path: str) -> None:
        self._pid = os.getpid()
        self.path = Path(path.replace("{pid}", str(self._pid)))
        self._switch = Path(f"{self.path}.off")
        try:
            self._begin()
        except BlockingIOError as error:
            raise ValueError(
                f"trace_path {brief(path)} is being written by another tier; name another file, "
                "or put {pid} into the name where each process has one tier"
            ) from error
        except OSError as error:
            raise ValueError(f"trace_path {brief(path)} cannot be written: {error.strerror}") from error
        offset = clock_offset_ns()
        self._offset_ns = offset - clock_base_ns(time.monotonic_ns() + offset)
        # Appended to by the tier's thread, taken from by the writer.
        self.events: deque[dict[str, Any]] = deque()
        # Nobody writes what is given: the trace is over, because it cannot be written, or is switched off.
        self._is_over = False
        self._is_off = self._switch.exists()
        self._slices = 0
        self._stop = threading.Event()
        self._writer = threading.Thread(target=self._write_until_stopped, name="async-tier-trace", daemon=True)
        self._writer.start()

    def step(self, started_ns: int, ended_ns: int) -> None:
        """Record a step of the scheduler."""
        self._add(self._event("X", "step", started_ns, tid=_STEPS_THREAD, dur=(ended_ns - started_ns) / 1000))

    def slice(self, lane: str, started_ns: int, ended_ns: int, **arguments: int | str) -> None:
        """Record a slice of `lane`, with arguments to be shown. Slices of a lane may overlap."""
        self._slices += 1
        begin = self._event("b", lane, started_ns, cat=lane, id=self._slices, args=arguments)
        self._add(begin, self._event("e", lane, max(started_ns, ended_ns), cat=lane, id=self._slices))

    def counter(self, name: str, at_ns: int, **values: int) -> None:
        """Record the values of the counter `name`, by series."""
        self._add(self._event("C", name, at_ns, args=values))

    def close(self) -> None:
        """Write the remaining events. Idempotent. Does nothing in a forked child: the file is the parent's."""
        if os.getpid() == self._pid:  # a child lacks the thread, whose locks may still be held
            self._stop.set()
            # The garbage collector may call this on the writer's thread, amid a write; the thread then ends.
            if self._writer is not threading.current_thread():
                self._writer.join()

    # ------------------------------------------------------------------------------------------------------- details

    def _event(self, phase: str, name: str, at_ns: int, **more: Any) -> dict[str, Any]:
        return {"ph": phase, "name": name, "ts": (at_ns + self._offset_ns) / 1000, "pid": self._pid, **more}

    def _add(self, *events: dict[str, Any]) -> None:
        if not (self._is_over or self._is_off):
            self.events.extend(events)  # at once: a slice never ends in a file without its begin

    def _name(self, what: str, name: str, thread: int) -> str:
        return json.dumps({"ph": "M", "name": what, "pid": self._pid, "tid": thread, "args": {"name": name}})

    def _write_until_stopped(self) -> None:
        while not self._stop.wait(WRITE_INTERVAL_S):
            self.write()
        self.write()
        self._is_over = True
        with contextlib.suppress(OSError):
            self._complete()
        _let_go(self._file)

    def write(self) -> None:
        """Write what was given so far. By the writer's thread, every WRITE_INTERVAL_S."""
        if self._is_over:
            return
        try:
            self._is_off = self._switch.exists()
            if self._is_complete and not self._is_off:
                self._rotate()
            while self.events and not self._is_complete:
                event = self.events.popleft()
                # `default`: json does not accept numpy's integers.
                self._written += self._file.write(",\n" + json.dumps(event, default=int))
                self._has_events = True
                if self._written > MAX_BYTES and event["ph"] != "b":  # whose end comes next
                    self._rotate()
            self._file.flush()
            if self._is_off and self._has_events:
                self._complete()
        except Exception as error:  # such as a full disk
            self._end_early(error)

    def _begin(self) -> None:
        """Begin a file at `path`."""
        names = [self._name("process_name", "async-tier", 0), self._name("thread_name", "steps", _STEPS_THREAD)]
        self._file = _open_exclusively(self.path)
        self._written = self._file.write("[\n" + ",\n".join(names))
        self._file.flush()  # so that no forked child has it in a buffer
        self._has_events = self._is_complete = False

    def _complete(self) -> None:
        """Write the end of the file, once."""
        if not self._is_complete:
            self._is_complete = True
            self._file.write("\n]\n")
            self._file.flush()

    def _rotate(self) -> None:
        """Keep the file as `path`.1, and begin the next. Another tier may take the name in between: then this ends."""
        self._complete()
        os.replace(self.path, f"{self.path}.1")
        last = self._file
        self._begin()
        _let_go(last)

    def _end_early(self, why: object) -> None:
        """Drop all events from now on, because they cannot be written."""
        self._is_over = True
        self.events.clear()
        logger.warning("The trace %s ends here: %s", self.path, why)


def _let_go(file: TextIO) -> None:
    """Unlock and close a file."""
    with contextlib.suppress(OSError):  # explicitly, because forked children have the file open, too
        fcntl.flock(file, fcntl.LOCK_UN)
    with contextlib.suppress(OSError):
        file.close()


def _open_exclusively(path: Path) -> TextIO:
    """The file, empty and locked. Raises BlockingIOError if another writer has it, OSError if it cannot be opened."""
    file = path.open("a")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            logger.info("Whether another tier writes to %s cannot be known here: %s", path, error)
        file.truncate(0)
    except BaseException:
        file.close()
        raise
    return file


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job's submission: "store" or "load", its size, and when (ns of CLOCK_MONOTONIC)."""

    kind: str
    blocks: int
    bytes: int
    at_ns: int


class TierTrace:
    """Records a tier's jobs and steps in a trace."""

    # Steps that are scheduled and have no results yet, at most. Asynchronous scheduling has two. The oldest is dropped.
    MAX_STEPS = 8

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._in_flight = {"load": 0, "store": 0}
        self._scheduled: deque[int] = deque(maxlen=self.MAX_STEPS)
        self._last_results_ns = 0

    def submitted(self, kind: str, blocks: int, size: int) -> Submitted:
        """Record that a job was queued."""
        now = time.monotonic_ns()
        self._in_flight[kind] += size
        self._writer.counter("bytes in flight", now, **self._in_flight)
        return Submitted(kind, blocks, size, now)

    def ended(self, job: Submitted, job_id: int, event: CopyEvent, rows_used: int, reason: str | None) -> None:
        """Record that the job's event was seen done. reason: why it failed; None for a success."""
        now = time.monotonic_ns()
        self._in_flight[job.kind] -= job.bytes
        self._writer.counter("bytes in flight", now, **self._in_flight)
        self._writer.counter("rows used", now, rows=rows_used)
        spans = event.spans
        about: dict[str, int | str] = {
            "job": job_id,
            "blocks": job.blocks,
            "bytes": job.bytes,
            "outcome": reason or "success",
        }
        started = min((start for _, start, _ in spans), default=now)
        self._writer.slice(f"{job.kind} queued", job.at_ns, started, **about)
        for leg, start, end in spans:
            self._writer.slice(f"{job.kind} {leg}", start, end, **about)

    def ended_without_copies(self, kind: str, blocks: int, job_id: int, reason: str | None) -> None:
        """Record a job without copies: it failed for this reason or, with None, had nothing to copy."""
        now = time.monotonic_ns()
        self._writer.slice(f"{kind} queued", now, now, job=job_id, blocks=blocks, bytes=0, outcome=reason or "success")

    def scheduled(self) -> None:
        """Record that a step was planned, which the model is about to run."""
        self._scheduled.append(time.monotonic_ns())

    def results(self) -> None:
        """Record that the results of the oldest step under way have arrived."""
        if self._scheduled:
            now = time.monotonic_ns()
            # If a step is planned before the results of the last one, its computation begins after these.
            self._writer.step(max(self._scheduled.popleft(), self._last_results_ns), now)
            self._last_results_ns = now
