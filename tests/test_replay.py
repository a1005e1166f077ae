"""The replay of traces: what it reads, what it compares with, and that vLLM's manager hits what it should."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import multiprocessing
import os
import random
import re
import select
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest

from benchmarks.bench import policies, replay
from benchmarks.bench.plain_lru import PlainLru
from benchmarks.shared import tiering

WAIT_S = 30


def write(path, *lines: str):
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Runs the program in this process, returns its report, and takes back what a Run does to a process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*options: str, of=replay):
        output = tmp_path / "report.json"
        monkeypatch.setattr("sys.argv", ["program", "--quick", "--output", str(output), *options])
        assert of.main() == 0
        return json.loads(output.read_text())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.unfreeze()


def test_a_refused_trace_ends_the_program_without_a_traceback(program, tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b'{"hash_ids": [1]}\n\xff\n')
    with pytest.raises(SystemExit):
        program("--trace", str(path))
    assert capsys.readouterr().err.endswith(f"error: {path}, line 2: not UTF-8\n")


def test_ids_that_agree_in_their_last_64_bits_are_different_blocks():
    hits = tiering.replay([[1], [1 + (1 << 64)], [1 + (1 << 256)]], 4, 4)
    assert hits.primary + hits.tier == 0


def test_a_made_trace_is_the_same_for_the_same_seed():
    assert replay.synthetic_trace(50, seed=3) == replay.synthetic_trace(50, seed=3)
    assert replay.synthetic_trace(50, seed=3) != replay.synthetic_trace(50, seed=4)
    assert replay.infinite_hits(replay.synthetic_trace(200)) > 0


def best(accesses: tuple[int, ...], capacity: int) -> int:
    """The most hits of all ways to choose what to hold, by trying them all."""
    states = {frozenset(): 0}
    for block in accesses:
        after: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            hits += block in held
            candidates = held | {block}
            for size in range(min(capacity, len(candidates)) + 1):
                for kept in map(frozenset, itertools.combinations(candidates, size)):
                    after[kept] = max(after.get(kept, 0), hits)
        states = after
    return max(states.values())


@pytest.mark.parametrize("seed", range(40))
def test_nothing_beats_the_optimum_and_it_can_be_had(seed):
    draw = random.Random(seed)
    accesses = tuple(draw.randrange(5) for _ in range(10))
    capacity = draw.randint(1, 3)
    requests = [accesses[:4], accesses[4:]]
    assert replay.optimal_hits(requests, capacity) == best(accesses, capacity)


def test_a_plain_lru_cache_hits_prefixes_only():
    assert replay.lru_hits([[1, 2, 3], [1, 2, 3]], capacity=3) == 3
    assert replay.lru_hits([[1, 2, 3], [4], [1, 2, 3]], capacity=3) == 0  # 1 is gone, so 2 and 3 are of no use
    assert replay.lru_hits([[1, 2], [3], [1, 4], [1, 2]], capacity=3) == 2
    assert replay.lru_hits([[1, 2, 3], [1, 2, 3]], capacity=2) == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_plain_lru_cache_never_beats_the_optimum(seed):
    requests = replay.synthetic_trace(80, seed)
    for capacity in (3, 30, 300):
        assert replay.lru_hits(requests, capacity) <= replay.optimal_hits(requests, capacity)


def test_the_primary_alone_hits_only_what_it_has_itself():
    requests = replay.synthetic_trace(120)
    primary = 2 * max(map(len, requests))
    hits = tiering.replay(requests, primary, 0)
    assert hits.tier == 0
    assert 0 < hits.primary <= replay.optimal_hits(requests, primary)


def test_the_capacities_depend_on_the_number_of_blocks_alone():
    assert replay.capacities(640) == {"1/64": 10, "1/32": 20, "1/16": 40, "1/8": 80, "1/4": 160, "1/2": 320}


def pairs(path, count: int):
    """A trace of `count` pairs of blocks, each asked for again after 20 others, for a primary of 4 blocks."""
    order = [pair for at in range(0, count, 20) for _ in range(2) for pair in range(at, min(at + 20, count))]
    return write(path, *(json.dumps({"hash_ids": [2 * pair, 2 * pair + 1]}) for pair in order))


def test_the_figure_is_the_mean_over_all_capacities(program, tmp_path, capsys):
    report = program("--trace", str(pairs(tmp_path / "trace.jsonl", 400)))
    points = report["results"]["by_capacity"]
    assert len({point["ours_to_optimum"] for point in points}) > 1  # or any of them would do
    assert [point["share"] for point in points] == list(replay.capacities(1))
    ratio = sum(point["ours"] / point["optimum"] for point in points) / len(points)
    assert report["summary"]["replay.hit_ratio_vs_optimal"]["ratio"] == pytest.approx(ratio)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"replay.hit_ratio_vs_optimal": pytest.approx(ratio)}
    for point in points:
        assert any(line.split()[:2] == [point["share"], str(point["blocks"])] for line in lines)


def test_a_compressed_trace_gives_the_same_report(program, tmp_path):
    plain = pairs(tmp_path / "plain.jsonl", 300)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert program("--trace", str(packed))["results"] == program("--trace", str(plain))["results"]


@pytest.mark.parametrize(
    ("requests", "why"), [([[1, 2], [3]], "no block of .* is asked for twice"), ([[1, 2], [1, 2]], "too few")]
)
def test_a_trace_of_which_nothing_can_be_said_is_refused(program, tmp_path, capsys, requests, why):
    path = write(tmp_path / "trace.jsonl", *(json.dumps({"hash_ids": ids}) for ids in requests))
    with pytest.raises(SystemExit):
        program("--trace", str(path))
    assert re.search(why, capsys.readouterr().err)
    assert re.search(why, replay.objection(path, quick=False))


def test_whether_a_trace_gives_the_figure_is_known_beforehand(tmp_path):
    assert replay.objection(pairs(tmp_path / "large.jsonl", 400), quick=False) is None
    small = replay.objection(pairs(tmp_path / "small.jsonl", 100), quick=False)
    assert small.startswith("small.jsonl has too few different blocks, 200: all capacities, 1/64, 1/32, ")


def test_a_trace_that_cannot_be_read_is_refused_without_a_traceback(program, tmp_path, capsys):
    with pytest.raises(SystemExit):
        program("--trace", str(tmp_path))
    assert capsys.readouterr().err.endswith(f"error: {tmp_path} cannot be read: Is a directory\n")


def test_processes_count_what_this_one_does():
    requests = replay.synthetic_trace(40)
    with replay.processes() as pool:
        found = [pool.submit(replay.optimal_hits, requests, capacity) for capacity in (3, 30, 300)]
        assert [each.result() for each in found] == [replay.optimal_hits(requests, each) for each in (3, 30, 300)]


def test_processes_end_at_once_when_their_work_is_given_up():
    before = multiprocessing.active_children()
    work = []

    def give_up() -> None:
        with replay.processes() as pool:
            work.append(pool.submit(select.select, [], [], [], WAIT_S))
            raise KeyError("given up")

    with pytest.raises(KeyError, match="given up"):
        give_up()
    assert isinstance(work[0].exception(), BrokenProcessPool), "the work was waited for"
    assert multiprocessing.active_children() == before


ORPHANS = """
import multiprocessing, os, signal
from benchmarks.bench import replay
with replay.processes() as pool:
    worker = pool.submit(os.getpid).result()
    pool.submit(signal.pause)
    print(worker, flush=True)
    signal.pause()
"""


def test_processes_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    with parent, parent.stdout:
        worker = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        ended, _, _ = select.select([worker], [], [], WAIT_S)
        os.close(worker)
    assert ended, f"the process is still there after {WAIT_S} s"


def test_with_room_for_all_the_tier_hits_what_an_infinite_cache_does():
    requests = replay.synthetic_trace(60)
    different = len({block for blocks in requests for block in blocks})
    primary = 2 * max(map(len, requests))
    hits = tiering.replay(requests, primary, different)
    assert hits.blocks == sum(map(len, requests))
    assert hits.primary + hits.tier == replay.infinite_hits(requests)
    assert hits.tier > 0


def test_with_little_room_it_hits_less_and_never_more_than_the_optimum():
    requests = replay.synthetic_trace(120)
    primary = 2 * max(map(len, requests))
    hits = tiering.replay(requests, primary, 20)
    assert 0 < hits.primary + hits.tier < replay.infinite_hits(requests)
    assert hits.primary + hits.tier <= replay.optimal_hits(requests, primary + 20)


def test_wrong_bytes_are_noticed():
    world = tiering.Replay(8, 8)
    world.request([1, 2])
    world._rows[:, 0] = 7
    with pytest.raises(RuntimeError, match="wrong bytes"):
        world.request([1, 2])
    world.close()


def test_the_policy_is_compared_with_a_plain_one_at_all_sizes(program, tmp_path, capsys):
    """In few requests, of which some are longer than the primary."""
    requests = replay.synthetic_trace(150)
    trace = write(tmp_path / "trace.jsonl", *(json.dumps({"hash_ids": ids}) for ids in requests))
    report = program(str(trace), of=policies)
    points = report["results"]["points"]
    assert len(points) == len(replay.DIVISORS) * len(policies.PRIMARY_DIVISORS)
    assert min(point["primary"] for point in points) < max(map(len, requests))
    worst = min(point["ours"] - point["plain"] for point in points)
    assert report["summary"]["policies.above_plain_lru"]["ratio"] == worst >= -policies.MOST_BELOW
    out = capsys.readouterr().out
    assert all(f"{point['ours']:.4f}" in out for point in points)


def test_a_worse_policy_would_be_seen(monkeypatch):
    """The comparison is of two policies and not of one with itself."""
    requests = replay.synthetic_trace(150)
    monkeypatch.setattr(PlainLru, "use", lambda *arguments: None)
    monkeypatch.setattr(PlainLru, "finish", lambda *arguments: None)
    ours, plain = (sum(replay.replay_hits(requests, 60, 120, each)) for each in policies.POLICIES.values())
    assert ours > plain + 0.01 * sum(map(len, requests))
