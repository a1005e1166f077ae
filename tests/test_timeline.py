"""The timeline of a trace, and the clock that it shares with torch's profiler."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from async_tier import timeline, trace
from async_tier.trace import TraceWriter
from tests import helpers

MS = 10**6


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def test_a_trace_has_the_clock_of_torchs_profiler(tmp_path):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(4) @ torch.ones(4)
    profiler.export_chrome_trace(str(tmp_path / "torch.json"))
    exported = json.loads((tmp_path / "torch.json").read_text())
    assert exported["baseTimeNanoseconds"] == trace.clock_base_ns(time.time_ns())
    theirs = max(event["ts"] for event in exported["traceEvents"] if event.get("ph") == "X")
    writer = TraceWriter(str(tmp_path / "ours.json"))
    now = time.monotonic_ns()
    writer.step(now, now + MS)
    writer.close()
    (ours,) = [event for event in json.loads((tmp_path / "ours.json").read_text()) if event.get("name") == "step"]
    assert 0 <= ours["ts"] - theirs < helpers.PATIENCE_S * 1e6
    assert ours["dur"] == 1000.0


def test_the_hidden_share_is_of_the_time_that_anything_is_copied():
    drawn = timeline.Timeline(
        {
            "steps": [(0.0, 2.0), (3.0, 5.0)],
            "store copy": [(1.0, 3.0), (1.5, 2.5)],
            "load copy": [(4.0, 6.0)],
            "load queued": [(0.0, 100.0)],
        }
    )
    # Copying from 1 to 3 and 4 to 6; of that, 1 to 2 and 4 to 5 under a step.
    assert drawn.hidden_share() == pytest.approx(0.5)
    assert timeline.Timeline({"steps": [(0.0, 1.0)]}).hidden_share() is None
    assert drawn.between(4.0, 5.0).hidden_share() == pytest.approx(1.0)


def test_steps_without_work_hide_nothing():
    # A scheduler that has nothing to run and waits for transfers steps every millisecond.
    idle = [(at / 1000, (at + 0.5) / 1000) for at in range(1000)]
    assert timeline.Timeline({"steps": idle, "store copy": [(0.0, 1.0)]}).hidden_share() == 0.0


def test_the_command_draws_and_sums_up(path, tmp_path):
    writer = TraceWriter(str(path))
    writer.step(0, 20 * MS)
    writer.slice("store queued", 0, 5 * MS, blocks=3)
    writer.slice("store copy", 5 * MS, 25 * MS, blocks=3)
    writer.counter("bytes in flight", 0, store=1 << 20, load=0)
    writer.close()
    picture = tmp_path / "sub" / "overlap.png"
    command = [sys.executable, "-m", "async_tier.timeline", str(path), "-o", str(picture)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "75% of transfer time hidden under compute" in ran.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "holds no events"), ("{}", "holds no events"), (None, "No such file"), ("[1]", "no events")],
)
def test_a_file_that_is_no_trace_is_refused_in_words(path, content, words, capsys):
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit):
        timeline.main([str(path)])
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_range_outside_of_the_trace_is_refused_in_words(path, capsys):
    writer = TraceWriter(str(path))
    writer.step(0, 20 * MS)
    writer.close()
    with pytest.raises(SystemExit):
        timeline.main([str(path), "--start", "5"])
    assert "--start 5 must be at least 0 and before the end, 0.02" in capsys.readouterr().err
