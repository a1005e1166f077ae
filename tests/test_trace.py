"""The trace that a tier writes, and what the timeline makes of it."""

from __future__ import annotations

import errno
import gc
import io
import itertools
import json
import os
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.observe import timeline, trace
from async_tier.observe.trace import TraceWriter
from async_tier.streams.rows import Rows
from async_tier.testing import store_gate
from tests import helpers
from tests.helpers import job, keys, make_tier, until
from tests.rows import primary_rows

ROW_BYTES = 4096
MS = 10**6
# A device's clock is compared with the host's once, and this thread may not run in the middle of that.
CLOCKS_APART_S = 0.1


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def events(path: Path, name: str) -> list[dict]:
    return [event for event in json.loads(path.read_text()) if event["name"] == name]


@pytest.fixture
def by_hand(monkeypatch) -> None:
    """Writers write when told to, and when closed."""
    monkeypatch.setattr(trace, "WRITE_INTERVAL_S", 3600.0)


@pytest.mark.each_engine
def test_a_tier_traces_its_jobs_and_steps(path):
    tier = make_tier(primary_rows(32, ROW_BYTES), blocks=16, trace_path=str(path))
    started = time.monotonic_ns()
    with store_gate(tier):
        tier.submit_store(job(1, keys(0, 1, 2), [0, 1, 2]))
        helpers.end_step(tier)
    helpers.finish(tier)
    tier.get_stats()
    tier.submit_load(job(2, keys(0), [9], load=True))
    helpers.finish(tier)
    took = (time.monotonic_ns() - started) / 1e9
    tier.shutdown()
    drawn = timeline.read(path, shortest_step_s=0.0)
    legs = ["in", "out"] if "store in" in drawn.lanes else ["copy"]
    assert set(drawn.lanes) == {"steps"} | {f"{kind} {leg}" for kind in ("store", "load") for leg in ["queued", *legs]}
    assert all(len(spans) == 1 for spans in drawn.lanes.values())
    assert 0 < drawn.duration <= took + CLOCKS_APART_S
    ((queued, copied),) = drawn.lanes["store queued"]
    ((copying, end),) = drawn.lanes[f"store {legs[0]}"]
    assert queued <= copied <= copying + CLOCKS_APART_S <= end + 2 * CLOCKS_APART_S
    (slice_,) = [event for event in events(path, "store queued") if event["ph"] == "b"]
    assert slice_["args"] == {"job": 1, "blocks": 3, "bytes": 3 * ROW_BYTES, "outcome": "success"}
    in_flight = [event["args"] for event in events(path, "bytes in flight")]
    assert {"load": 0, "store": 3 * ROW_BYTES} in in_flight
    assert in_flight[-1] == {"load": 0, "store": 0}
    assert events(path, "rows used")[-1]["args"] == {"rows": 3}


def test_off_by_default():
    store = BlockStore(Rows.of_view(memoryview(primary_rows(2))))
    assert not helpers.threads("async-tier-trace")
    store.close()


def test_the_name_may_have_the_process_in_it(tmp_path):
    writer = TraceWriter(str(tmp_path / "trace-{pid}.json"))
    writer.close()
    assert writer.path.name == f"trace-{os.getpid()}.json"
    assert writer.path.exists()


@pytest.mark.parametrize("value", ["", 3, True, ["x"]])
def test_a_path_that_is_none_is_refused_in_words(value):
    with pytest.raises(ValueError, match=r"^trace_path must be null or the name of a file, not "):
        TierConfig.parse({"trace_path": value})


def test_a_file_that_cannot_be_made_is_refused_in_words(tmp_path):
    primary = primary_rows(2)
    with pytest.raises(ValueError, match=r"^trace_path '.*/none/trace.json' cannot be written: No such file"):
        BlockStore(Rows.of_view(memoryview(primary)), TierConfig(trace_path=str(tmp_path / "none" / "trace.json")))


def test_a_disk_that_is_full_at_the_start_is_refused_in_words(path, monkeypatch):
    full = open("/dev/full", "w")  # noqa: SIM115 - closed by the writer
    full.truncate = lambda size: None  # a device has no length
    monkeypatch.setattr(trace.Path, "open", lambda path, mode: full)
    with pytest.raises(ValueError, match=r"^trace_path '.*' cannot be written: No space left"):
        TraceWriter(str(path))


@pytest.mark.usefixtures("by_hand")
def test_of_a_long_trace_two_files_are_kept_and_the_newest_events(path, monkeypatch, caplog):
    monkeypatch.setattr(trace, "MAX_BYTES", 10_240)
    writer = TraceWriter(str(path))
    for at in range(1000):
        writer.slice("store copy", at, at + 1, number=at)
    writer.close()
    files = [Path(f"{path}.1"), path]
    assert sorted(path.parent.iterdir()) == sorted(files)
    assert 10_240 < files[0].stat().st_size < 11_000
    assert path.stat().st_size < 11_000
    numbers = [event["args"]["number"] for each in files for event in events(each, "store copy") if event["ph"] == "b"]
    assert numbers == list(range(numbers[0], 1000))
    for each in files:
        assert [event["ph"] for event in json.loads(each.read_text())][:2] == ["M", "M"]
        assert len(timeline.read(each).lanes["store copy"]) == len(events(each, "store copy")) / 2 > 5
    assert not caplog.messages


@pytest.mark.usefixtures("by_hand")
def test_the_next_file_is_this_traces_alone_too(path, monkeypatch):
    monkeypatch.setattr(trace, "MAX_BYTES", 1)
    writer = TraceWriter(str(path))
    writer.step(0, MS)
    writer.write()
    with pytest.raises(ValueError, match="is being written by another tier"):
        TraceWriter(str(path))
    TraceWriter(f"{path}.1").close()
    writer.close()


@pytest.mark.usefixtures("by_hand")
def test_another_tier_that_takes_the_name_ends_the_trace_and_nothing_else(path, monkeypatch, caplog):
    monkeypatch.setattr(trace, "MAX_BYTES", 1)
    writer = TraceWriter(str(path))
    path.rename(path.with_name("elsewhere"))
    other = TraceWriter(str(path))
    writer.step(0, MS)
    monkeypatch.setattr(trace.os, "replace", lambda *names: None)  # it was renamed a moment ago
    writer.write()
    writer.close()
    other.close()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"The trace {path} ends here: ")
    assert len(events(path.with_name("elsewhere"), "step")) == 1


@pytest.mark.usefixtures("by_hand")
def test_a_trace_is_switched_off_and_on_by_a_file(path):
    switch = Path(f"{path}.off")
    writer = TraceWriter(str(path))
    writer.step(1, 2)
    switch.touch()
    writer.write()
    assert len(events(path, "step")) == 1, "it is complete"
    for at in (3, 5):
        writer.step(at, at + 1)
        assert not writer.events, "nothing is kept that nobody would write"
        writer.write()
    assert len(events(path, "step")) == 1
    switch.unlink()
    writer.write()
    writer.step(7, 8)
    writer.close()
    assert len(events(Path(f"{path}.1"), "step")) == 1, "what was traced before is kept"
    assert [event["dur"] for event in events(path, "step")] == [0.001]


@pytest.mark.usefixtures("by_hand")
def test_a_trace_may_be_off_at_the_start(path):
    switch = Path(f"{path}.off")
    switch.touch()
    earlier = Path(f"{path}.1")
    earlier.write_text("an earlier trace")
    writer = TraceWriter(str(path))
    writer.step(1, 2)
    writer.write()
    switch.unlink()
    writer.write()
    writer.step(3, 4)
    writer.close()
    assert len(events(path, "step")) == 1
    assert earlier.read_text() == "an earlier trace", "nothing was traced that would take its place"


@pytest.mark.usefixtures("by_hand")
def test_what_comes_in_the_middle_of_switching_off_is_in_the_next_file(path):
    switch = Path(f"{path}.off")
    writer = TraceWriter(str(path))
    append = writer.events.append  # the caller has come that far
    writer.step(0, MS)
    switch.touch()
    writer.write()
    append({"ph": "X", "name": "late", "ts": 0.0, "dur": 1.0})
    writer.write()
    assert len(events(path, "step")) == 1
    switch.unlink()
    writer.close()
    assert len(events(path, "late")) == 1


@pytest.mark.usefixtures("by_hand")
def test_a_disk_that_is_full_ends_the_trace_and_nothing_else(path, caplog):
    writer = TraceWriter(str(path))
    (descriptor,) = (
        each for each in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{each}") == str(path)
    )
    with open("/dev/full", "w") as full:
        os.dup2(full.fileno(), int(descriptor))
    for at in range(2):
        writer.step(at, at + 1)
        writer.write()
        assert not writer.events
    writer.close()
    assert len(caplog.messages) == 1
    assert "No space left" in caplog.text


def test_what_cannot_be_written_ends_the_trace_and_nothing_else(path, monkeypatch, caplog):
    monkeypatch.setattr(trace, "WRITE_INTERVAL_S", 0.001)
    writer = TraceWriter(str(path))
    writer.step(0, MS)
    writer.counter("rows used", 0, rows=object())
    until(lambda: caplog.messages, "it is said")
    writer.step(1, 2)
    assert not writer.events, "nothing is kept that nobody would write"
    writer.close()
    (message,) = caplog.messages
    assert message.startswith(f"The trace {path} ends here: ")
    assert len(events(path, "step")) == 1


@pytest.mark.usefixtures("by_hand")
def test_what_is_given_in_the_middle_of_a_write_is_not_lost(path):
    writer = TraceWriter(str(path))
    append = writer.events.append  # the caller has come that far
    writer.step(0, MS)
    writer.write()
    append({"ph": "X", "name": "late", "ts": 0.0, "dur": 1.0})
    writer.close()
    assert len(events(path, "late")) == len(events(path, "step")) == 1


def test_numbers_may_be_numpys(path):
    writer = TraceWriter(str(path))
    writer.counter("rows used", 0, rows=np.int64(7))
    writer.close()
    assert events(path, "rows used")[0]["args"] == {"rows": 7}


def test_everything_in_the_file_is_an_event(path):
    # Perfetto reports an error for what has no phase.
    writer = TraceWriter(str(path))
    writer.step(0, MS)
    writer.close()
    assert [event["ph"] for event in json.loads(path.read_text())] == ["M", "M", "X"]


def test_the_lane_of_steps_is_no_threads(path):
    writer = TraceWriter(str(path))
    writer.step(0, MS)
    writer.close()
    assert events(path, "step")[0]["tid"] >= int(Path("/proc/sys/kernel/pid_max").read_text())


def test_a_file_is_one_traces_alone(path):
    writer = TraceWriter(str(path))
    writer.step(0, MS)
    with pytest.raises(ValueError, match=r"^trace_path '.*/trace.json' is being written by another tier; name another"):
        TraceWriter(str(path))
    writer.close()
    assert len(events(path, "step")) == 1
    TraceWriter(str(path)).close()
    assert events(path, "step") == [], "a trace that has ended may be written over"


def test_a_file_system_without_locks_will_do(path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(trace.fcntl, "flock", flock)
    writer = TraceWriter(str(path))
    writer.step(0, MS)
    writer.close()
    assert len(events(path, "step")) == 1


def test_a_forked_child_does_not_hold_the_file(path, monkeypatch):
    writer = TraceWriter(str(path))
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(theirs)
        os.read(ours, 1)  # until the parent has closed its end
        os._exit(0)
    os.close(ours)
    try:
        monkeypatch.setattr(trace, "MAX_BYTES", 1)
        writer.step(0, MS)
        writer.close()
        for each in (path, f"{path}.1"):
            TraceWriter(str(each)).close()
    finally:
        os.close(theirs)
        os.waitpid(child, 0)


def test_the_clocks_are_compared_when_nothing_ran_in_between(monkeypatch):
    now, ahead = 5 * MS, 777
    delays = iter([900_000, 20_000, 500, 900_000])

    class Clock:
        @staticmethod
        def monotonic_ns() -> int:
            return now

        @staticmethod
        def time_ns() -> int:
            nonlocal now
            now += next(delays)
            return now + ahead

    monkeypatch.setattr(trace, "time", Clock)
    assert trace.clock_offset_ns() == ahead + 500 // 2
    assert next(delays) == 900_000, "the third time was good"


def test_a_trace_that_was_cut_off_is_read_as_far_as_it_goes(path):
    writer = TraceWriter(str(path))
    writer.step(0, MS)
    writer.step(2 * MS, 3 * MS)
    writer.close()
    whole = path.read_text()
    path.write_text(whole[: whole.rindex("dur") - 5])
    assert timeline.read(path, shortest_step_s=0.0).lanes["steps"] == [(0.0, pytest.approx(0.001))]


def test_what_is_given_is_written_while_the_tier_lives(path, monkeypatch):
    monkeypatch.setattr(trace, "WRITE_INTERVAL_S", 0.001)
    writer = TraceWriter(str(path))
    writer.step(0, 1)
    until(lambda: '"step"' in path.read_text(), "the step is in the file")
    writer.close()
    writer.close()


def test_a_forked_child_leaves_the_file_to_its_parent(path):
    writer = TraceWriter(str(path))
    writer.step(0, MS)
    child = os.fork()
    if child == 0:
        try:
            # Its lock may have been another thread's when the child was forked.
            threading.Event.set = lambda event: os._exit(1)
            writer.close()
            for each in gc.get_objects():
                if isinstance(each, io.TextIOWrapper) and each.name == str(path):
                    each.close()
                    os._exit(0)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert status == 0
    writer.close()
    assert timeline.read(path, shortest_step_s=0.0).lanes["steps"] == [(0.0, pytest.approx(0.001))]
    assert len(events(path, "step")) == 1


def test_the_garbage_collector_may_end_it_on_its_own_thread(path, monkeypatch):
    monkeypatch.setattr(trace, "WRITE_INTERVAL_S", 0.001)
    writer = TraceWriter(str(path))
    real = json.dumps

    def dumps(event, **more):
        if threading.current_thread() in helpers.threads("async-tier-trace"):
            writer.close()
        return real(event, **more)

    monkeypatch.setattr(trace.json, "dumps", dumps)
    writer.slice("store copy", 0, MS)
    until(lambda: not helpers.threads("async-tier-trace"), "its thread has ended")
    assert [event["ph"] for event in events(path, "store copy")] == ["b", "e"]


def test_a_trace_that_fails_does_not_lose_the_job(path, monkeypatch):
    monkeypatch.setattr(trace.TierTrace, "ended", MagicMock(side_effect=KeyError("store")))
    tier = make_tier(primary_rows(4), blocks=2, trace_path=str(path))
    tier.submit_store(job(1, keys(0), [0]))
    assert helpers.finish(tier)[1].success
    assert tier.statistics().faults == 1
    tier.submit_store(job(2, keys(1), [1]))
    assert helpers.finish(tier)[2].success


def test_a_trace_that_fails_when_a_job_is_submitted_does_not_report_it_twice(path, monkeypatch):
    monkeypatch.setattr(trace.TierTrace, "submitted", MagicMock(side_effect=MemoryError("out of luck")))
    tier = make_tier(primary_rows(4), blocks=2, trace_path=str(path))
    tier.submit_store(job(1, keys(0), [0]))
    tier.block_store.drain()
    assert [(result.job_id, result.success) for result in tier.get_finished_jobs()] == [(1, True)]
    assert tier.statistics().faults == 1
    tier.submit_load(job(2, keys(0), [1], load=True))
    assert helpers.finish(tier)[2].success


def test_steps_that_are_planned_ahead_do_not_overlap(path):
    # With asynchronous scheduling a step is planned before the results of the last have arrived.
    tier = make_tier(primary_rows(4), blocks=2, trace_path=str(path))
    tier.get_stats()
    for _ in range(4):
        helpers.end_step(tier)
        helpers.end_step(tier)
        tier.get_stats()
        tier.get_stats()
    tier.shutdown()
    spans = timeline.read(path, shortest_step_s=0.0).lanes["steps"]
    assert len(spans) == 8
    rounding = 1e-8  # a double's, in microseconds since the clock's base
    assert all(before[1] <= after[0] + rounding for before, after in itertools.pairwise(spans))


def test_of_steps_without_results_the_last_few_are_kept(path):
    tier = make_tier(primary_rows(4), blocks=2, trace_path=str(path))
    for _ in range(100):
        helpers.end_step(tier)
    for _ in range(100):
        tier.get_stats()
    tier.shutdown()
    assert len(timeline.read(path, shortest_step_s=0.0).lanes["steps"]) == trace.TierTrace.MAX_STEPS


def test_the_trace_says_what_became_of_each_job(path):
    tier = make_tier(primary_rows(32, ROW_BYTES), blocks=8, trace_path=str(path))
    helpers.store(tier, 1, keys(0, 1), [0, 1])
    helpers.load(tier, 2, keys(0, 9), [2, 3])  # one is missing
    helpers.load(tier, 3, keys(8), [2])
    helpers.store(tier, 4, keys(2), [0, 1])  # never queued
    helpers.store(tier, 5, keys(0), [0])  # nothing to copy
    tier.shutdown()
    outcomes = {
        event["args"]["job"]: event["args"]["outcome"]
        for lane in ("store queued", "load queued")
        for event in events(path, lane)
        if event["ph"] == "b"
    }
    assert outcomes == {
        1: "success",
        2: "the tier lacks 1 of its blocks",
        3: "the tier lacks 1 of its blocks",
        4: "1 keys but 2 row numbers",
        5: "success",
    }
