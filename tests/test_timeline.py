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

from async_tier.observe import timeline, trace
from async_tier.observe.trace import TraceWriter

MS = 10**6
# torch counts a processor's cycles, and finds out once how long one takes.
CLOCKS_APART_US = 1000


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def test_a_trace_has_the_clock_of_torchs_profiler(tmp_path):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        before = time.monotonic_ns()
        torch.ones(4) @ torch.ones(4)
        after = time.monotonic_ns()
    profiler.export_chrome_trace(str(tmp_path / "torch.json"))
    writer = TraceWriter(str(tmp_path / "ours.json"))
    writer.step(before, after)
    writer.close()
    # As the docstring of trace.py says.
    both = json.loads((tmp_path / "torch.json").read_text())
    assert both["baseTimeNanoseconds"] == trace.clock_base_ns(time.time_ns())
    both["traceEvents"] += json.loads((tmp_path / "ours.json").read_text())
    slices = {event["name"]: event for event in both["traceEvents"] if event.get("ph") == "X"}
    ours, theirs = slices["step"], slices["aten::dot"]
    assert ours["pid"] == theirs["pid"]
    assert ours["dur"] == (after - before) / 1000
    assert ours["ts"] - CLOCKS_APART_US < theirs["ts"]
    assert theirs["ts"] + theirs["dur"] < ours["ts"] + ours["dur"] + CLOCKS_APART_US


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


def test_stores_and_loads_are_told_apart():
    drawn = timeline.Timeline(
        {"steps": [(0.0, 4.0)], "store in": [(0.0, 2.0)], "store out": [(1.0, 4.0)], "load copy": [(3.0, 7.0)]}
    )
    assert [drawn.hidden_share(kind) for kind in ("", "store", "load")] == [pytest.approx(x) for x in (4 / 7, 1, 0.25)]
    assert timeline.hidden(drawn) == "57% of transfer time hidden under compute (stores 100%, loads 25%)"
    assert timeline.hidden(drawn.between(0.0, 2.0)).endswith("(stores 100%, no loads)")
    assert timeline.hidden(drawn.between(8.0, 9.0)) == "no transfers"


@pytest.mark.parametrize(("shortest_ms", "share"), [(None, 0.0), (4.0, 0.0), (2.0, 0.75)])
def test_steps_without_work_hide_nothing(path, shortest_ms, share):
    # A scheduler that has nothing to run and waits for a load steps every few milliseconds on a busy machine.
    writer = TraceWriter(str(path))
    for at in range(0, 1000, 4):
        writer.step(at * MS, (at + 3) * MS)
    writer.slice("load copy", 0, 1000 * MS)
    writer.close()
    options = {} if shortest_ms is None else {"shortest_step_s": shortest_ms / 1000}
    drawn = timeline.read(path, **options)
    assert drawn.hidden_share("load") == pytest.approx(share)
    assert len(drawn.lanes["steps" if share else "empty steps"]) == 250


def test_a_part_begins_with_what_counters_had_come_to():
    drawn = timeline.Timeline(
        {"steps": [(0.0, 9.0)]}, {"rows used: rows": [(1.0, 10), (2.0, 20), (5.0, 50), (9.0, 90)]}
    )
    assert drawn.between(4.0, 8.0).counters == {"rows used: rows": [(4.0, 20), (5.0, 50)]}
    assert drawn.between(2.0, 4.0).counters == {"rows used: rows": [(2.0, 10), (2.0, 20)]}
    assert drawn.between(0.0, 1.5).counters == {"rows used: rows": [(1.0, 10)]}


def test_the_command_draws_and_sums_up(path, tmp_path):
    writer = TraceWriter(str(path))
    writer.step(0, 20 * MS)
    writer.slice("store queued", 0, 5 * MS, blocks=3)
    writer.slice("store copy", 5 * MS, 30 * MS, blocks=3)
    writer.counter("bytes in flight", 0, store=1 << 20, load=0)
    writer.close()
    picture = tmp_path / "overlap.png"
    command = [sys.executable, "-m", "async_tier.timeline", str(path), "-o", str(picture)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert f"{path}, all 0.03 s; steps of less than 5 ms are taken for empty" in ran.stdout
    assert "\n60% of transfer time hidden under compute (stores 60%, no loads)" in ran.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def step_of_20_ms(path: Path) -> str:
    writer = TraceWriter(str(path))
    writer.step(0, 20 * MS)
    writer.slice("store copy", 5 * MS, 30 * MS)
    writer.close()
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says before it gives up."""
    with pytest.raises(SystemExit) as end:
        timeline.main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_of_a_part_it_says_that_it_is_one(path, capsys):
    trace_file = step_of_20_ms(path)
    assert timeline.main([trace_file, "--start", "0.01", "--end", "0.02"]) == 0
    said = capsys.readouterr().out
    assert f"{path}, second 0.01 to 0.02 of 0.03;" in said
    assert "\n100% of transfer time" in said


def test_the_shortest_step_is_an_option(path, capsys):
    assert timeline.main([step_of_20_ms(path), "--shortest-step", "21"]) == 0
    said = capsys.readouterr().out
    assert "steps of less than 21 ms are taken for empty" in said
    assert "\n0% of transfer time" in said
    assert "--shortest-step must be at least 0 ms, not -1" in refusal(capsys, str(path), "--shortest-step=-1")
    assert "not nan" in refusal(capsys, str(path), "--shortest-step=nan")


STEP = {"ph": "X", "name": "step", "ts": 0.0, "dur": 1.0}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no events"),
        ("{}", "holds no events"),
        (None, "No such file"),
        ("[1]", "holds no events"),
        (json.dumps([STEP, 1]), "is not a trace of the tier: it holds 1"),
        (json.dumps([{"ph": "X"}]), """is not a trace of the tier: it holds {"ph": "X"}"""),
        (
            json.dumps([{"ph": "e", "cat": "load copy", "id": 1}]),
            """it holds {"ph": "e", "cat": "load copy", "id": 1}""",
        ),
        (json.dumps([{"ph": "M", "name": "process_name"}]), "holds no steps and no jobs that have ended"),
        (b"\x89PNG", "can't decode"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_in_words(path, content, words, capsys):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refusal(capsys, str(path))


def test_a_range_outside_of_the_trace_is_refused_in_words(path, capsys):
    words = "--start 5 must be at least 0 and before the end, 0.03"
    assert words in refusal(capsys, step_of_20_ms(path), "--start", "5")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("overlap.xyz", "Format 'xyz' is not supported (supported formats: "),
        ("trace.json/overlap.png", "Not a directory"),
        ("sub/overlap.png", "No such file or directory"),
        ("trace.json/sub/overlap.png", "Not a directory"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_in_words(path, output, words, capsys):
    said = refusal(capsys, step_of_20_ms(path), "-o", str(path.parent / output))
    assert f"{path.parent / output} cannot be drawn: " in said
    assert words in said
    assert not (path.parent / "sub").exists(), "no folder is made"


def test_without_matplotlib_it_says_what_to_install(path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert timeline.main([step_of_20_ms(path)]) == 0, "summing up needs none"
    said = refusal(capsys, str(path), "-o", str(path.with_suffix(".png")))
    assert "drawing needs matplotlib: install the extra 'timeline'" in said
