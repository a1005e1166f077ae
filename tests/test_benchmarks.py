"""The benchmarks: how they are run together, stopped and refused, and what they do not count. No figure is measured."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import fcntl
import gc
import graphlib
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from async_tier.observe.trace import TraceWriter
from async_tier.streams.host import HostStream
from async_tier.streams.row_stream import UNLIMITED
from benchmarks.bench import conversations, copy_rate, growth, head_of_line, overlap, serving, serving_report
from benchmarks.bench import run as bench
from benchmarks.bench.conversations import FS, NO_OFFLOAD, OURS, Contender
from benchmarks.bench.head_of_line import Latencies
from benchmarks.demo import demo, model, server
from benchmarks.demo.demo import BLOCK_TOKENS
from benchmarks.demo.server import Answer
from benchmarks.shared import common, tiers
from benchmarks.shared.common import Figure, Run

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 30
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def signals():
    """None is ignored, as with nohup, in this process and its children; takes back what a test does to them."""
    handlers = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def make_run(signals, tmp_path):
    """Makes a Run in this process, and takes back what it does to it."""
    yield lambda name="benchmark": Run(name, "about", tmp_path / f"{name}.json")
    gc.unfreeze()


def a_figure(key: str, **fields) -> Figure:
    return Figure(**{"key": key, "what": "what", "unit": "s", "ratio": 1.5, "goal": "<= 2", **fields})


# ------------------------------------------------------------------------------------------------------- being stopped

# They speak by os.write: a handler that prints while another print is under way is refused.
# A benchmark that takes its time to end: four times what subprocess.run gives it after Ctrl-C.
SLOW = """
import os, pathlib, select, signal, sys
def end(number, frame):
    os.write(1, b"told\\n")
    select.select([], [], [], 1.0)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(0)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
os.write(1, b"ready\\n")
signal.pause()
"""
# One that only hurries when it is told by Ctrl-C, and says by what it was told.
HURRIED = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda number, frame: os.write(1, b"told\\n"))
signal.signal(signal.SIGINT, lambda number, frame: sys.exit(0))
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""
STUBBORN = """
import os, signal
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.write(1, b"told\\n"))
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""
RUNNER = "import sys; from benchmarks.bench.run import Runner; Runner().run([sys.executable, '-c', *sys.argv[1:]])"


def word(process: subprocess.Popen) -> str:
    """The next line that it, or what it started, prints."""
    ready, _, _ = select.select([process.stdout], [], [], WAIT_S)
    assert ready, f"not a word from the process in {WAIT_S} s"
    return process.stdout.readline().decode().strip()


@pytest.fixture
def runner():
    """Starts a Runner in a process of its own, as the leader of a group, with a benchmark of this source."""
    started: list[subprocess.Popen] = []

    def start(source: str, *arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-c", RUNNER, source, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
        started.append(process)
        assert word(process) == "ready"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", STOPS)
def test_a_benchmark_that_is_stopped_has_the_time_it_needs_to_end(runner, tmp_path, number):
    process = runner(SLOW, tmp_path / "cleaned up")
    if number == signal.SIGINT:  # as a terminal does
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert word(process) == "told"
    assert process.wait(WAIT_S) == 128 + number
    assert (tmp_path / "cleaned up").exists()


def test_a_second_signal_hurries_it(runner):
    process = runner(HURRIED)
    process.terminate()
    assert word(process) == "told"
    process.terminate()
    assert process.wait(WAIT_S) == 128 + signal.SIGTERM


def test_a_third_signal_kills_it(runner):
    process = runner(STUBBORN)
    for _ in range(2):
        process.terminate()
        assert word(process) == "told"
    process.terminate()
    assert process.wait(WAIT_S) == 128 + signal.SIGTERM


def test_a_benchmark_unwinds_when_its_terminal_closes(make_run, capfd):
    make_run()
    with pytest.raises(SystemExit, match=str(128 + signal.SIGHUP)):
        signal.raise_signal(signal.SIGHUP)
    assert capfd.readouterr().err == "stopped by SIGHUP\n"
    signal.raise_signal(signal.SIGTERM)  # from whoever waits for it: it is on its way already
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGINT)


def test_what_nohup_ignores_stays_ignored(make_run):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    make_run()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_signals_wait_until_a_new_server_is_in_our_hands(signals):
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    done = []

    def make() -> None:
        with server.signals_wait():
            signal.raise_signal(signal.SIGTERM)
            done.append("made")

    with pytest.raises(SystemExit):
        make()
    assert done == ["made"]
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)


# ------------------------------------------------------------------------------------------------------------ together


@pytest.fixture
def benchmarks(monkeypatch, tmp_path, signals):
    """Pretends to run benchmarks. Yields {name: (exit status, figures it writes or None)}, and where they write."""
    found: dict[str, tuple[int, list[Figure] | None]] = {
        name: (0, [a_figure(f"{name}.{key}") for key in keys]) for name, keys in bench.FIGURES.items()
    }
    ran: list[list[str]] = []

    def run(_self, command: list[str]) -> int:
        ran.append(command)
        name = command[2].removeprefix("benchmarks.bench.")
        status, figures = found[name]
        output = Path(command[command.index("--output") + 1])
        if figures is not None:
            summary = {each.key: each.as_json() for each in figures}
            output.write_text(json.dumps({"summary": summary}))
        return status

    monkeypatch.setattr(bench.Runner, "run", run)
    monkeypatch.setattr(bench, "BUILD", tmp_path)
    monkeypatch.setattr(bench, "shortage", lambda names, quick: None)
    return SimpleNamespace(found=found, ran=ran, folder=tmp_path)


def call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
    return bench.main()


def test_the_figures_of_all_benchmarks_come_together(benchmarks, monkeypatch, capsys):
    assert call(monkeypatch) == 0
    summary = json.loads((benchmarks.folder / "summary.json").read_text())
    keys = {f"{name}.{key}" for name, found in bench.FIGURES.items() for key in found}
    assert set(summary["figures"]) == keys
    assert len(keys) == 28
    assert all(summary[key] == 1.5 and summary["figures"][key]["met"] for key in keys)
    assert summary["failed"] == {}
    assert list(summary["seconds"]) == list(bench.FIGURES)
    out = capsys.readouterr().out
    assert all(key in out for key in keys)
    assert "seconds: copy_rate 0, " in out


def test_a_figure_that_is_left_out_fails_the_run_by_name(benchmarks, monkeypatch, capsys):
    benchmarks.found["replay"] = (0, [])
    assert call(monkeypatch) == 1
    assert "FAILED: replay: it has no figure replay.hit_ratio_vs_optimal" in capsys.readouterr().err
    summary = json.loads((benchmarks.folder / "summary.json").read_text())
    assert list(summary["failed"]) == ["replay"]
    assert "serving.ttft_vs_fs" in summary["figures"]


def test_figures_of_a_benchmark_that_fails_are_not_shown(benchmarks, monkeypatch, capsys):
    benchmarks.found["serving"] = (1, benchmarks.found["serving"][1])
    benchmarks.found["overlap"] = (-signal.SIGKILL, None)
    benchmarks.found["copy_rate"] = (0, None)
    assert call(monkeypatch) == 1
    summary = json.loads((benchmarks.folder / "summary.json").read_text())
    assert summary["failed"] == {
        "copy_rate": "it left no copy_rate.json",
        "overlap": "exit status -9",
        "serving": "exit status 1",
    }
    assert not [key for key in summary["figures"] if key.startswith(("serving", "overlap", "copy_rate"))]
    assert "FAILED: serving: exit status 1" in capsys.readouterr().err


def test_what_an_earlier_run_left_is_gone_before_the_first_benchmark(benchmarks, monkeypatch):
    for name in ("summary.json", "replay.json", "replay.png", "serving.png"):
        (benchmarks.folder / name).write_text("{}")
    benchmarks.found["replay"] = (1, None)
    assert call(monkeypatch, "replay") == 1
    assert {file.name for file in benchmarks.folder.iterdir()} == {"summary.json", "serving.png"}
    assert json.loads((benchmarks.folder / "summary.json").read_text())["failed"] == {"replay": "exit status 1"}


def test_quick_results_never_take_the_place_of_real_ones(benchmarks, monkeypatch):
    assert call(monkeypatch, "--quick", "overlap") == 0
    assert [file.name for file in benchmarks.folder.iterdir()] == ["quick"]
    assert "--quick" in benchmarks.ran[0]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["sewing"], "no benchmark is called 'sewing'; there are copy_rate, "),
        (["--trace", "TRACE", "overlap"], "--trace is for replay, which is not among overlap"),
        (["--trace", "/nowhere/trace"], "--trace: /nowhere/trace cannot be read: No such file or directory"),
        (["--trace", "TRACE"], "trace.jsonl, line 1: not JSON"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_first_benchmark(
    benchmarks, monkeypatch, tmp_path, capsys, arguments, why
):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("no trace\n")
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, *(str(trace) if each == "TRACE" else each for each in arguments))
    assert why in capsys.readouterr().err
    assert not benchmarks.ran


def test_a_trace_too_small_for_the_figure_is_refused_before_the_first_benchmark(
    benchmarks, monkeypatch, tmp_path, capsys
):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"hash_ids": [1, 2, 3]}\n' * 5)
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "--trace", trace)
    assert "too few different blocks, 3" in capsys.readouterr().err
    assert not benchmarks.ran


def test_what_the_machine_lacks_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr(bench, "NEEDS", {"overlap": (0, 0), "serving": (10**6, 3)})
    assert bench.shortage(["overlap"], quick=False) is None
    lacking = bench.shortage(["overlap", "serving"], quick=False)
    assert lacking.startswith("overlap, serving may need 1000000 GiB of memory, 3 GiB of it in /dev/shm; ")
    monkeypatch.setattr(bench, "NEEDS", {"serving": (0, 10**6)})
    assert "1000000 GiB of it in /dev/shm" in bench.shortage(["serving"], quick=False)


@pytest.mark.parametrize("arguments", [["serving"], ["--quick", "serving"]])
def test_too_small_a_machine_is_refused_before_the_first_benchmark(monkeypatch, capsys, arguments):
    monkeypatch.setitem(bench.NEEDS, "serving", (10**6, 0))
    monkeypatch.setattr(bench, "QUICK_NEEDS", (10**6, 0))
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("a benchmark was run"))
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, *arguments)
    assert "serving may need 1000000 GiB" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- common


def test_the_table_says_what_each_figure_is():
    text = common.table(
        [
            a_figure("one.ratio", what="the one / the other (baseline)", ours=3.0, limit=2000.0, low=1.25, high=1.75),
            a_figure("two.ratio", ratio=2.5, what="pairs", paired=True),
        ]
    )
    head, one, what_one, two, what_two = text.splitlines()
    assert "limit or baseline" in head
    assert " ".join(one.split()) == "one.ratio 3 - - 2000 s 1.500 1.250 to 1.750 <= 2 ok"
    assert what_one.strip() == "the one / the other (baseline)"
    assert " ".join(two.split()) == "two.ratio - - - - s 2.500 - <= 2 MISSED"
    assert what_two.strip() == "pairs; the median of ratios, pair by pair"


def test_a_chance_interval_holds_the_estimate_and_narrows_with_samples():
    draw = np.random.default_rng(0)

    def width(count: int) -> float:
        values = draw.normal(10, 1, count)
        low, high = common.chance_interval(lambda drawn: np.median(drawn, axis=-1), values)
        assert low <= np.median(values) <= high
        return high - low

    assert width(1000) < width(20) / 3


def test_pairs_are_drawn_together():
    values = [1.0, 10.0, 100.0, 1000.0]
    low, high = common.chance_interval(
        lambda mine, theirs: np.median(mine / theirs, axis=-1), [2 * each for each in values], values, paired=True
    )
    assert low == high == 2.0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x.png", "is where the picture would go"),
        (".", "cannot be written: Is a directory"),
        ("/proc/x.json", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_is_refused_at_once(name, why, capsys):
    with pytest.raises(SystemExit):
        common.arguments("about").parse_args(["--output", name])
    assert why in capsys.readouterr().err


def test_a_quick_run_by_itself_does_not_write_over_real_results_either(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/bench/overlap.py", "--quick"])
    assert common.arguments("about").parse_args().output == common.BUILD / "quick" / "overlap.json"
    assert common.arguments("about").parse_args([]).output is None


def test_a_run_with_failures_writes_them_and_fails(make_run, capsys):
    run = make_run()
    run.failures.append("nothing was measured")
    assert run.finish() == 1
    assert json.loads(run.output.read_text())["failures"] == ["nothing was measured"]
    assert capsys.readouterr().err == "FAILED: nothing was measured\n"
    assert make_run("other").finish() == 0


@pytest.mark.parametrize("name", ["run", "replay", "serving"])
def test_help_does_not_wait_for_vllm(name):
    source = f"import sys, benchmarks.bench.{name}; sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT).returncode == 0


# -------------------------------------------------------------------------------------------------------------- server


def test_memory_that_killed_benchmarks_left_is_removed_and_no_other(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [f"vllm_offload_async-tier-{dead.pid}-0.mmap", f"vllm_offload_async-tier-serving-{dead.pid}-3.mmap"]
    others = [
        f"vllm_offload_async-tier-{os.getpid()}-0.mmap",
        f"vllm_offload_async-tier-serving-{os.getpid()}-1.mmap",
        f"vllm_offload_engine-{dead.pid}-0.mmap",
        f"vllm_offload_async-tier-{dead.pid}-0.mmap.kept",
    ]
    for name in (*left, *others):
        (tmp_path / name).touch()
    pools = [tmp_path / f"async-tier-demo-{process}" for process in (dead.pid, os.getpid())]
    for pool in pools:
        pool.mkdir()
        (pool / "0.pool").touch()
    server.remove_what_the_dead_left(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*others, pools[1].name}


def test_the_folder_of_a_pool_is_removed_whatever_happens(tmp_path):
    def use() -> None:
        with server.pool_folder(tmp_path) as folder:
            folder.mkdir()
            (folder / "0.pool").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert not [*tmp_path.iterdir()]
    with server.pool_folder(tmp_path):
        pass  # nobody has made it


def a_server(tmp_path: Path, source: str) -> server.Server:
    process = subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=ROOT,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert word(process) == "ready"
    return server.Server("http://127.0.0.1:1", tmp_path / "log", process)


def test_a_paused_server_hears_that_it_is_to_stop_and_is_asked_once(tmp_path):
    source = """
import os, signal, sys
def end(number, frame):
    os.write(1, b"told\\n")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("told twice"))
    signal.sigtimedwait([signal.SIGUSR1], 30)
    sys.exit(0)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
signal.signal(signal.SIGTERM, end)
os.write(1, b"ready\\n")
signal.pause()
"""
    found = a_server(tmp_path, source)
    with found.process:
        found.pause()
        found.ask_to_stop()
        assert word(found.process) == "told"
        found.ask_to_stop()
        found.process.send_signal(signal.SIGUSR1)
        assert found.process.wait(WAIT_S) == 0


def test_a_server_is_killed_with_its_children_and_leaves_no_shared_memory(tmp_path):
    source = """
import os, signal, subprocess, sys
from multiprocessing import get_context, shared_memory
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
lock, memory = get_context("spawn").Lock(), shared_memory.SharedMemory(create=True, size=1)
os.write(1, b"ready\\n")
signal.pause()
"""
    found = a_server(tmp_path, source)
    with found.process:
        processes = server.living(found.process.pid)
        files = server.shared_memory(processes)
        assert {file.name[:4] for file in files} == {"sem.", "psm_"}
        assert len(processes) == 3  # one is Python's resource tracker
        found.kill()
        assert server.living(found.process.pid) == []
        assert not [file for file in files if file.exists()]


def test_a_server_that_does_not_come_up_is_told_of_with_its_log(tmp_path):
    found = a_server(tmp_path, "print('ready', flush=True)")
    with found.process:
        found.log.write_text("all is well\nno such model\n")
        with pytest.raises(RuntimeError, match=r"did not come up; the end of .*\n.*\nno such model"):
            found.wait_until_healthy()


def test_a_server_is_ended_also_when_what_follows_its_start_is_interrupted(tmp_path, monkeypatch, signals):
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    started = []
    popen = subprocess.Popen

    def interrupted(command, **options):
        started.append(popen([sys.executable, "-c", "import signal; signal.pause()"], **options))
        signal.raise_signal(signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(server.subprocess, "Popen", interrupted)
    with pytest.raises(SystemExit), server.serve("model", tmp_path / "log", name="x", offloading=None, arguments=[]):
        pytest.fail("the signal came before the block")
    assert started[0].returncode is not None


def a_report(**changes: Any) -> dict[str, Any]:
    found = {"promoted_blocks": 1, "restored_blocks": 1, "promoted_blocks_after_restart": 1, "shared_blocks": 1}
    found |= {"identical_outputs": True, "tracebacks": 0, "hidden_share": {"all": 0.5}}
    return found | changes


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        ({"restored_blocks": 0}, ["no block was there after the restart"]),
        ({"promoted_blocks_after_restart": 0}, ["no block was there after the restart"]),
        ({"shared_blocks": 0}, ["the second server found no block of the first one"]),
        ({"identical_outputs": False}, ["a text differs from the recomputed one"]),
    ],
)
def test_the_demo_fails_if_nothing_survives_the_kill_or_is_shared(changes, wrong):
    assert demo.failures(a_report(**changes)) == wrong


@pytest.mark.parametrize("place", ["rounds", "again", "restarted", "second"])
def test_the_demo_compares_the_texts_of_all_servers(place):
    def an_answer(text: str) -> Answer:
        return Answer(text, [0.1], 1, 1, 0)

    recomputed = [[an_answer("first")], [an_answer("second")]]
    found = demo.InPool(recomputed, recomputed[0], 1.0, {}, recomputed[0], 1, {}, recomputed[1], {})
    assert found.is_as(recomputed)
    other: Any = [an_answer("other")]
    assert not dataclasses.replace(found, **{place: [recomputed[0], other] if place == "rounds" else other}).is_as(
        recomputed
    )


def test_a_trace_is_complete_before_its_server_is_killed(tmp_path):
    writer = TraceWriter(str(tmp_path / "trace.json"))
    writer.step(1, 2)
    demo.end_trace(writer.path)
    assert "step" in [event["name"] for event in json.loads(writer.path.read_text())]
    assert [*tmp_path.iterdir()] == [writer.path]
    writer.close()


def test_one_process_converts_the_model_and_others_wait(tmp_path, monkeypatch):
    folder = tmp_path / "build" / "model"
    converted = []

    def convert(_folder: Path) -> None:
        (lock,) = folder.parent.iterdir()
        with lock.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        converted.append(_folder)

    def flock(file, operation) -> None:
        """Another process had it first."""
        real_flock(file, operation)
        folder.mkdir()

    real_flock = fcntl.flock
    monkeypatch.setattr(model, "_convert", convert)
    model.smollm2(folder)
    monkeypatch.setattr(model.fcntl, "flock", flock)
    assert model.smollm2(folder) == folder
    assert converted == [folder]


@pytest.mark.parametrize(("cores", "expected"), [({0, 1}, "1"), ({5, 2, 7}, "5,7"), ({3}, "nobind")])
def test_a_core_is_left_to_what_of_a_server_is_not_the_model(monkeypatch, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores)
    assert serving.model_cores() == expected


# ----------------------------------------------------------------------------------------------------------- copy rate


def test_the_fs_tier_moves_fewer_small_rows_and_its_rate_is_of_those(monkeypatch):
    monkeypatch.setattr(copy_rate, "FS_ROWS", 8)
    moved: list[int] = []

    def a_second(tier: object, jobs: list[Any]) -> float:
        move(tier, jobs)
        moved.append(sum(len(job.keys) for job in jobs))
        return 1.0

    move = tiers.move
    monkeypatch.setattr(tiers, "move", a_second)
    with ExitStack() as stack:
        size = copy_rate.RowSize(stack, row_bytes=4096, moved=20 * 4096, with_fs=True)
        for name, rows in (("fs", 8), (copy_rate.ours(1), 20)):
            rates: dict[str, list[float]] = {}
            size.measure(name, rates, blocks=3)
            assert moved[-2:] == [rows, rows]
            assert rates[f"{name}: store"] == rates[f"{name}: load"] == [rows * 4096 * copy_rate.GB]


# -------------------------------------------------------------------------------------------------------- head of line


class Loads:
    """A contender whose loads behind stores are given: bytes queued before them and at their end."""

    def __init__(self, *loads: tuple[int, int]) -> None:
        self._loads = iter(loads)
        self.order: list[str] = []
        self.drain = self.make_room = Mock()

    def load(self, is_behind_stores: bool) -> tuple[float, int, int]:
        self.order.append("behind" if is_behind_stores else "idle")
        return (0.002, *next(self._loads)) if is_behind_stores else (0.001, 0, 0)


FULL = (200, 100)


def test_loads_with_too_little_queued_before_them_or_nothing_at_their_end_do_not_count():
    loads = [FULL, FULL, (99, 50), (100, 1), (100, 0), (300, 200)]  # the first is to warm up
    found = Latencies()
    found.take_behind_stores(Loads(*loads), most=3, queued_bytes=100, seconds=WAIT_S)
    assert len(found.loaded) == 3
    assert (found.too_short, found.ended, found.least_queued) == (1, 1, 100)


def test_idle_loads_and_those_behind_stores_take_turns():
    loads = Loads(*[FULL] * 60)
    found = head_of_line.measure_tier(loads, samples=50, queued_bytes=100, seconds=WAIT_S)
    assert len(found.idle) == len(found.loaded) == 50
    changes = [one for one, other in zip(loads.order, [*loads.order[1:], ""], strict=True) if one != other]
    assert changes == ["idle", "behind"] * 2


def test_without_a_99th_percentile_of_ours_the_figure_is_a_sentence():
    found = {"ours": Latencies([0.001] * 120, [0.0015] * 120), "fs": Latencies([0.1] * 30)}
    figure = head_of_line.p99_figure(found, 1 << 31)
    assert figure.low == figure.ratio == figure.high == pytest.approx(1.5)
    found["ours"].loaded = [0.0015] * 99
    sentence = head_of_line.p99_figure(found, 1 << 31)
    assert sentence.startswith("no 99th percentile of ours behind stores: 99 samples, and 100 are needed")


# ------------------------------------------------------------------------------------------------------------- serving

PROMPT = 1000
BLOCK_BYTES = 1000


def an_answer(text: str = "text", first: float = 0.1, cached: int = 0) -> Answer:
    return Answer(text, [first, first + 0.1], tokens=12, prompt_tokens=PROMPT, cached_tokens=cached)


def a_contender(name: str) -> Contender:
    """What it should have answered."""
    hit, from_cache = (0, 0) if name == NO_OFFLOAD else (PROMPT - 100, PROMPT - 50)
    contender = Contender(SimpleNamespace(tracebacks=lambda: []), [], name in serving.REPEATING)
    contender.turns = [
        [an_answer(f"{turn} {at}", cached=hit if turn else 0) for at in range(2)]
        for turn in range(2 if name == NO_OFFLOAD else 3)
    ]
    if contender.repeats:
        contender.repeated = [an_answer(answer.text[:2], cached=from_cache) for answer in contender.later]
    asked = (0, 1) if name == FS else range(4)
    contender.unique = {number: an_answer(f"unique {number}", first=0.2) for number in asked}
    contender.written = len(asked) * (PROMPT // BLOCK_TOKENS) * BLOCK_BYTES
    contender.read = 4 * hit // BLOCK_TOKENS * BLOCK_BYTES
    return contender


@pytest.fixture
def contenders() -> dict[str, Contender]:
    return {name: a_contender(name) for name in (NO_OFFLOAD, FS, OURS)}


def test_servers_that_answer_as_they_should_make_no_failures(contenders):
    assert serving_report.failures(contenders, BLOCK_BYTES) == []


def change(answers: Any, which: Any, **fields: Any) -> None:
    answers[which] = dataclasses.replace(answers[which], **fields)


def other_text(contenders, turn: int = 1) -> None:
    change(contenders[FS].turns[turn], 0, text=f"{turn} other")
    change(contenders[FS].repeated, 2 * (turn - 1), text=f"{turn} ")


def hits_of_prompts_asked_once(contenders) -> None:
    for number in contenders[OURS].unique:
        change(contenders[OURS].unique, number, cached_tokens=60)


def hits_without_offloading(contenders) -> None:
    for at in range(2):
        change(contenders[NO_OFFLOAD].turns[1], at, cached_tokens=400)


def no_floor(contenders) -> None:
    for answers in (contenders[FS].turns[1], contenders[FS].repeated):
        change(answers, 0, cached_tokens=500)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (other_text, "fs: 1 of its texts differ"),
        # One that nobody computed from its start.
        (lambda each: other_text(each, turn=2), "fs: 1 of its texts differ"),
        (lambda each: change(each[FS].unique, 1, text="other"), "fs: 1 of its texts differ"),
        (lambda each: change(each[OURS].repeated, 0, text="other"), "ours: 1 of its texts differ"),
        (hits_of_prompts_asked_once, "ours: 6% of prompts that share nothing were cached"),
        (lambda each: vars(each[OURS]).update(written=56000), "ours: stored 56000 bytes of prompts that share nothing"),
        (hits_without_offloading, "no offloading: 40% of later turns were not recomputed"),
        # The others were in the primary.
        (lambda each: vars(each[OURS]).update(read=14000), "ours: the tier gave 14000 bytes of the 28000 that later"),
        (
            lambda each: change(each[OURS].turns[2], 1, cached_tokens=PROMPT - 500),
            "ours: 1 of 4 later turns did not come from the tier",
        ),
        (no_floor, "fs: a prompt that was repeated at once was not in the KV cache"),
        (
            lambda each: setattr(each[OURS].server, "tracebacks", lambda: ["Traceback"]),
            "ours: the server's log has 1 tracebacks",
        ),
    ],
)
def test_what_makes_figures_worthless_is_said(contenders, spoil, why):
    spoil(contenders)
    (sentence,) = serving_report.failures(contenders, BLOCK_BYTES)
    assert sentence.startswith(why)


class Counting:
    """A server that answers, and counts its answers one look late."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.asked: list[tuple[str, int]] = []
        self._told = 0

    def ask(self, prompt: str, tokens: int, ignore_eos: bool) -> Answer:
        self.asked.append((prompt, tokens))
        return an_answer(f" answer {len(self.asked)}")

    def pause(self) -> None:
        pass

    resume = pause

    def metrics(self) -> dict[tuple[str, str], float]:
        told, self._told = self._told, len(self.asked)
        return {
            ("vllm:request_prefill_time_seconds_count", ""): told,
            ("vllm:kv_offload_tiering_write_bytes_total", "1:async"): 100 * told,
            ("vllm:kv_offload_tiering_write_bytes_total", "0:cpu"): 7 * told,
            ("vllm:kv_offload_tiering_read_bytes_total", "1:async"): 10 * told,
        }


@pytest.mark.parametrize("repeats", [False, True])
def test_a_conversation_goes_on_with_its_answers_and_only_later_turns_are_asked_again(repeats):
    counting = Counting()
    contender = Contender(counting, ["one", "two"], repeats)
    for _ in range(2):
        for number in range(2):
            contender.converse(number)
    prompts = [prompt for prompt, tokens in counting.asked if tokens == conversations.MAX_TOKENS]
    again = [prompt for prompt, tokens in counting.asked if tokens == conversations.SHORT_TOKENS]
    assert [prompt.split("\n")[0] for prompt in prompts] == ["one", "two"] * 2
    assert prompts[2].startswith(f"{prompts[0]} answer 1\nTurn 2: ")
    assert again == prompts[2:] * repeats
    assert len(contender.repeated) == 2 * repeats
    assert [len(turn) for turn in contender.turns] == [2, 2]


def test_all_are_asked_the_same_and_bytes_of_the_tier_are_counted_by_phase(make_run):
    contenders = {name: Contender(Counting(name), ["text"], name in serving.REPEATING) for name in (NO_OFFLOAD, OURS)}
    others = [f"other {at}" for at in range(2 * serving.PROMPTS_A_ROUND)]
    serving.measure(make_run("serving"), contenders, turns=2, others=others)
    for contender in contenders.values():
        assert [prompt for prompt, _ in contender.server.asked if prompt.startswith("other")] == others
        assert contender.written == 100 * len(others)  # and not of what wakes it in between
        assert [*contender.unique] == [*range(len(others))]
    # Two turns, one of them asked again, and what woke it for each of these and for the metrics.
    assert contenders[OURS].read == 10 * (3 + 3)


def test_metrics_that_never_count_an_answer_are_told_of(monkeypatch):
    counting = Counting()
    monkeypatch.setattr(conversations, "METRICS_TIMEOUT_S", 0.0)
    monkeypatch.setattr(counting, "metrics", dict)
    contender = Contender(counting, ["one"], False)
    contender.converse(0)
    with pytest.raises(RuntimeError, match="do not have all of its 1 answers"):
        contender.metrics()


def test_the_report_has_the_four_figures_and_the_failures(contenders, make_run):
    run = make_run("serving")
    other_text(contenders)
    serving_report.report(run, contenders, BLOCK_BYTES)
    assert run.finish() == 1
    report = json.loads(run.output.read_text())
    assert [*report["summary"]] == [f"serving.{key}" for key in bench.FIGURES["serving"]]
    assert len(report["failures"]) == 1
    assert report["results"][OURS]["ttft_ms_later_turns"]["largest"] == pytest.approx(100)


def test_times_are_compared_by_the_prompt(contenders, make_run):
    """A prompt that takes longer everywhere changes no ratio, and what no other server was asked none either."""
    for name, factor in {NO_OFFLOAD: 10.0, FS: 2.0, OURS: 1.0}.items():
        for turn in contenders[name].turns:
            turn[:] = [dataclasses.replace(answer, times=[factor * (1 + at)]) for at, answer in enumerate(turn)]
        for number in contenders[name].unique:
            change(contenders[name].unique, number, times=[(1.2 if name == OURS else 1.0) * (1 + number)])
    for at in range(2):
        change(contenders[OURS].turns[2], at, times=[100.0])
        change(contenders[FS].turns[2], at, times=[200.0])
    change(contenders[FS].turns[1], 1, times=[40.0])  # one that was disturbed
    for at, answer in enumerate(contenders[OURS].later):
        change(contenders[OURS].repeated, at, times=[answer.first / 1.25])
    run = make_run("serving")
    serving_report.report(run, contenders, BLOCK_BYTES)
    ratios = {figure.key.removeprefix("serving."): figure.ratio for figure in run.figures}
    expected = {"ttft_vs_recompute": 0.1, "ttft_vs_kv_cache_hit": 1.25, "ttft_vs_fs": 0.5, "no_reuse_overhead": 0.2}
    assert ratios == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------- overlap


@pytest.fixture
def copies(monkeypatch):
    """Of small blocks."""
    monkeypatch.setattr(overlap, "PRIMARY_BYTES", 64 * 4 * overlap.KIB * overlap.tiers.JOB_BLOCKS)
    with contextlib.ExitStack() as stack:
        yield overlap.Copies(stack, 4 * overlap.KIB)


@pytest.mark.parametrize("fails", [False, True])
def test_both_streams_wait_while_copies_are_held_back(copies, monkeypatch, fails):
    store = copies.tier.block_store
    told, limit = [], HostStream.limit
    monkeypatch.setattr(HostStream, "limit", lambda *of: (told.append(of), limit(*of)))
    copies.prepare(4)
    with contextlib.suppress(ZeroDivisionError), copies.held():
        assert set(told) == {(store.engine.store_stream, 0), (store.engine.load_stream, 0)}
        told.clear()
        copies.submit(4)
        if fails:
            raise ZeroDivisionError
    assert set(told) == {(store.engine.store_stream, UNLIMITED), (store.engine.load_stream, UNLIMITED)}
    copies.wait()
    assert copies.is_over


def test_a_scheduler_is_measured_without_a_tier_with_copies_and_with_copies_held_back(copies, monkeypatch):
    held = []
    monkeypatch.setattr(overlap, "STEP_S", 1e-5)
    monkeypatch.setattr(copies, "held", lambda held_back=copies.held: held.append(copies.in_flight) or held_back())
    turns = overlap.SchedulerLoop(copies).measure()
    assert len(turns) == overlap.STEPS // overlap.STEPS_IN_TURN
    for turn in turns:
        assert set(turn) == {"alone", "together", "calls", "held", "calls while held"}
        assert turn["calls"] < turn["together"]
        assert turn["calls while held"] < turn["held"]
    assert held == [0] * len(turns)  # what was submitted before has ended
    assert copies.is_over


# --------------------------------------------------------------------------------------------------------------- rooms

ROOMS = {"shared": set(), "demo": {"shared"}, "gpu": {"shared"}, "bench": {"shared", "demo"}, "monitoring": {"demo"}}


def imported(path: Path) -> set[str]:
    """The modules of benchmarks that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("benchmarks"):
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "benchmarks").glob("*/[a-z]*.py")
}


def test_the_rooms_of_benchmarks_import_from_below_and_no_module_from_itself():
    graph = {}
    for name, path in MODULES.items():
        room = name.split(".")[1]
        graph[name] = {each for each in imported(path) if each in MODULES}
        assert {each.split(".")[1] for each in graph[name]} <= ROOMS[room] | {room}, name
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises where there is a circle


def test_a_tier_without_memory_is_asked_as_a_dict_is(monkeypatch):
    """It needs all that a store asks of an engine and of memory."""
    monkeypatch.setattr(growth, "GROWTH_LOOKUPS", 10)
    monkeypatch.setattr(growth, "GROWTH_JOBS", 2)
    growing = growth.Growing(4 * tiers.JOB_BLOCKS)
    growing.look_up()
    growing.turn_over()
    assert growing.times.spreads().keys() == {
        f"{what}, {whose}" for what in ("lookup", "store") for whose in ("ours", "dict")
    }
