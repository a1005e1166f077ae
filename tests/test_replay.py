"""The replay of traces: what it reads, what it compares with, and that vLLM's manager hits what it should."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from benchmarks import replay


def write(path, *lines: str):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_trace_in_mooncakes_format_is_read(tmp_path):
    line = {"timestamp": 0, "input_length": 700, "output_length": 3, "hash_ids": [0, 1]}
    path = write(tmp_path / "trace.jsonl", json.dumps(line), "", json.dumps({"hash_ids": [0, 5, 6]}), "not read")
    assert replay.read_trace(path, most=2) == [[0, 1], [0, 5, 6]]


@pytest.mark.parametrize(
    "line", ["{", "[1]", "{}", '{"hash_ids": 3}', '{"hash_ids": [1, "2"]}', '{"hash_ids": [true]}']
)
def test_a_line_that_is_none_is_refused_by_file_and_line(tmp_path, line):
    path = write(tmp_path / "trace.jsonl", '{"hash_ids": [1]}', line)
    with pytest.raises(ValueError, match=r"trace.jsonl, line 2: (not a JSON object|'hash_ids' must be a list)"):
        replay.read_trace(path, most=10)


@pytest.mark.parametrize("lines", [[""], ['{"hash_ids": []}']])
def test_a_trace_without_a_block_is_refused(tmp_path, lines):
    with pytest.raises(ValueError, match="no request has a block"):
        replay.read_trace(write(tmp_path / "trace.jsonl", *lines), most=10)


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


def test_with_room_for_all_the_tier_hits_what_an_infinite_cache_does():
    requests = replay.synthetic_trace(60)
    different = len({block for blocks in requests for block in blocks})
    primary = 2 * max(map(len, requests))
    hits = replay.replay(requests, primary, different)
    assert hits.blocks == sum(map(len, requests))
    assert hits.primary + hits.tier == replay.infinite_hits(requests)
    assert hits.tier > 0


def test_with_little_room_it_hits_less_and_never_more_than_the_optimum():
    requests = replay.synthetic_trace(120)
    primary = 2 * max(map(len, requests))
    hits = replay.replay(requests, primary, 20)
    assert 0 < hits.primary + hits.tier < replay.infinite_hits(requests)
    assert hits.primary + hits.tier <= replay.optimal_hits(requests, primary + 20)


def test_wrong_bytes_are_noticed():
    world = replay.Replay(8, 8)
    world.request([1, 2])
    world._rows[:, 0] = 7
    with pytest.raises(RuntimeError, match="wrong bytes"):
        world.request([1, 2])
    world.close()
