"""Peers: engines of one node that read each other's files in a pool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from async_tier.memory import peers
from async_tier.order import SequenceOrder
from async_tier.testing import Gate
from tests import helpers
from tests.helpers import key, keys
from tests.rows import primary_rows
from tests.test_pool import PRIMARY, ROW_BYTES, file_of, folder, here, loaded, open_store, store_target, stored

__all__ = ["folder", "open_store"]  # fixtures
pytestmark = pytest.mark.each_engine("host", "cuda, pool host")


def empty() -> np.ndarray:
    """The memory of another engine's primary."""
    return primary_rows(64, ROW_BYTES, seed=9)


def step(store: Any) -> None:
    """A new request has come, and the step has ended."""
    store.begin_sequence("a request", SequenceOrder({}))
    store.end_step()
    store.finish_sequence("a request")


def test_blocks_of_a_peer_are_seen_within_a_step_and_loaded(open_store):
    ours, theirs = open_store(primary=empty()), open_store()
    stored(theirs, 1, 2)
    step(ours)
    assert here(ours) == [1, 2]
    assert ours.lookup(key(1))
    assert loaded(ours, 1, 2) == [1, 2]
    stored(theirs, 3)
    ours.end_step()  # of known files also without a request
    assert here(ours) == [1, 2, 3]
    statistics = ours.statistics()
    assert (statistics.blocks, statistics.peers, statistics.peer_blocks) == (0, 1, 3)
    assert (statistics.blocks_loaded, statistics.blocks_borrowed) == (2, 2)
    assert theirs.statistics().blocks_loaded == 0


def test_who_has_no_steps_finds_them_by_a_lookup(open_store):
    ours = open_store()
    theirs = open_store()
    stored(theirs, 1)
    assert ours.lookup(key(1))
    assert not ours.lookup(key(2))


def test_a_load_of_own_and_of_borrowed_blocks(open_store):
    ours, first, second = open_store(primary=primary_rows(64, ROW_BYTES)), open_store(), open_store()
    stored(ours, 1, 2)
    stored(first, 11, 12)
    stored(second, 21)
    step(ours)
    assert ours.statistics().peers == 2
    ours.submit_load(7, keys(11, 1, 21, 40, 2, 12), [50, 51, 52, 53, 54, 55])
    in_flight = ours.statistics()
    assert (in_flight.loads_in_flight, in_flight.load_bytes_in_flight) in ((1, 5 * ROW_BYTES), (0, 0))
    ours.drain()
    (end,) = ours.poll()
    assert (end.success, set(end.loaded_keys or ())) == (False, set(keys(11, 1, 21, 2, 12)))
    assert end.reason == "the tier lacks 1 of its blocks"
    assert (end.bytes, end.seconds > 0) == (5 * ROW_BYTES, True)
    target = store_target(ours)
    for row, number in zip((50, 51, 52, 54, 55), (11, 1, 21, 2, 12), strict=True):
        assert np.array_equal(target[row], PRIMARY[number])
    after = ours.statistics()
    assert (after.loads_in_flight, after.load_bytes_in_flight, after.rows_pinned) == (0, 0, 0)


def test_what_a_peer_evicts_while_it_is_read_fails_alone(open_store):
    ours, theirs = open_store(primary=empty()), open_store(4)
    stored(ours, 50)
    stored(theirs, 1)
    stored(theirs, 2, 3, 4)
    step(ours)
    with Gate(ours.peers.stream):
        ours.submit_load(7, keys(1, 2, 50), [0, 1, 2])
        stored(theirs, 11)  # for which the first one goes
        assert here(theirs, range(10)) == [2, 3, 4]
    ours.drain()
    (end,) = ours.poll()
    assert (end.success, set(end.loaded_keys or ())) == (False, set(keys(2, 50)))
    assert not ours.has(key(1)), "it is gone before its failure is reported"
    assert ours.has(key(2))


def test_what_is_evicted_is_no_hit_from_the_next_step_on(open_store):
    ours, theirs = open_store(), open_store(2)
    stored(theirs, 1, 2)
    step(ours)
    with helpers.store_gate(theirs):
        theirs.submit_store(7, keys(3, 4), [3, 4])
        step(ours)
        assert here(ours) == []
    theirs.drain()
    theirs.poll()
    theirs.index.drop(keys(3))
    step(ours)
    assert here(ours) == [4]


def test_r4_a_load_that_failed_is_not_tried_again(open_store):
    """Whole, because the copy of an own block failed, or because it was refused."""
    ours, theirs = open_store(), open_store()
    stored(ours, 50)
    stored(theirs, 1, 2)
    step(ours)
    ours.submit_load(6, keys(2), [1000])
    assert (ours.poll()[0].success, here(ours, range(10))) == (False, [1])
    helpers.load_gate(ours).hold()
    ours.submit_load(7, keys(1, 50), [0, 1])
    ours.close()
    (end,) = ours.poll()
    assert (end.success, end.loaded_keys) == (False, None)
    assert here(ours) == []


def test_a_row_that_was_filled_again_is_not_read_under_its_old_name(open_store):
    """What we know of a peer is as old as our last step."""
    ours, theirs = open_store(primary=empty()), open_store(2)
    stored(theirs, 1, 2)
    step(ours)
    stored(theirs, 3, 4)
    assert loaded(ours, 1, 2) == []
    step(ours)
    assert loaded(ours, 3, 4) == [3, 4]


def test_what_a_peer_holds_is_not_stored_again(open_store):
    ours, theirs = open_store(), open_store()
    stored(theirs, 1, 2)
    step(ours)
    assert stored(ours, 1, 2, 3) == 1
    statistics = ours.statistics()
    assert (statistics.blocks, statistics.blocks_present, statistics.blocks_refused) == (1, 2, 0)


def test_what_a_peer_has_just_evicted_is_stored(open_store):
    ours, theirs = open_store(), open_store(2)
    stored(theirs, 1, 2)
    step(ours)
    stored(theirs, 3, 4)
    assert stored(ours, 1, 2) == 2


def test_two_engines_with_the_same_prompts_hold_each_block_once(open_store):
    first, second = open_store(32), open_store(32)
    stores = [(first, second), (second, first)]
    for number in range(24):
        one, other = stores[number % 2]
        stored(one, number)
        step(other)
        stored(other, number)
    assert first.statistics().blocks + second.statistics().blocks == 24


def test_a_hit_at_a_peer_can_be_taken_back(open_store):
    ours, theirs = open_store(), open_store()
    stored(ours, 5)
    stored(theirs, 1)
    step(ours)
    for number in (1, 5):
        assert ours.lookup(key(number), "a request", pin=True)
        ours.undo_last_hit("a request")
    statistics = ours.statistics()
    assert (statistics.hits, statistics.rows_pinned) == (0, 0)
    assert ours.lookup(key(1), "a request", pin=True)
    ours.end_step()
    assert ours.statistics().hits == 1


# ---------------------------------------------------------------------------------- peers that die, reset, and return


def test_a_peer_that_has_closed_leaves_its_blocks(open_store):
    ours, theirs = open_store(primary=empty()), open_store()
    stored(theirs, 1)
    step(ours)
    theirs.close()
    step(ours)
    assert loaded(ours, 1) == [1]


def test_a_peer_that_restarts_goes_on_in_its_file(open_store):
    ours, theirs = open_store(primary=empty()), open_store()
    stored(theirs, 1)
    step(ours)
    theirs.close()
    theirs = open_store()
    stored(theirs, 2)
    step(ours)
    assert (here(ours), ours.statistics().peers) == ([1, 2], 1)
    assert loaded(ours, 1, 2) == [1, 2]


def test_r10_a_peer_that_resets_costs_its_blocks_and_nothing_else(open_store):
    ours, first, second = open_store(primary=empty()), open_store(), open_store()
    stored(first, 1)
    stored(second, 2)
    step(ours)
    first.clear()
    assert loaded(ours, 1, 2) == [2], "also before the next step"
    stored(first, 3)
    step(ours)
    assert here(ours) == [2], "nor what is stored with what may be other weights"
    first.close()
    again = open_store()
    stored(again, 4)
    step(ours)
    assert here(ours) == [2, 4]


def test_r4_a_borrowed_block_whose_copy_was_not_made_has_not_arrived(open_store):
    ours, theirs = open_store(primary=empty()), open_store()
    stored(theirs, 1)
    step(ours)
    before = store_target(ours)[0].copy()
    Gate(ours.peers.stream).hold()
    ours.submit_load(7, keys(1), [0])
    ours.close()
    (end,) = ours.poll()
    assert (end.success, end.loaded_keys, end.bytes) == (False, (), 0)
    assert np.array_equal(store_target(ours)[0], before)


def test_r10_a_peer_that_resets_while_it_is_read(open_store):
    ours, theirs = open_store(primary=empty()), open_store()
    stored(theirs, 1)
    step(ours)
    with Gate(ours.peers.stream):
        ours.submit_load(7, keys(1), [0])
        theirs.clear()
    ours.drain()
    (end,) = ours.poll()
    assert (end.success, end.loaded_keys) == (False, ())


def test_r10_after_its_own_reset_an_engine_reads_no_peer(open_store):
    ours, theirs = open_store(), open_store()
    stored(theirs, 1)
    step(ours)
    ours.clear()
    assert here(ours) == []
    stored(theirs, 2)
    step(ours)
    assert (here(ours), ours.lookup(key(2)), ours.statistics().peers) == ([], False, 0)
    assert stored(ours, 1) == 1


def test_a_peer_that_laps_us_is_read_anew(open_store):
    ours, theirs = open_store(), open_store()
    stored(theirs, 1, 2, 3)
    step(ours)
    theirs.index.drop(keys(2))
    for _ in range(70_000):  # more changes than a table remembers
        theirs.arena.pool.table.publish([0])
    for _ in range(3):
        step(ours)
    assert here(ours) == here(theirs) == [1, 3]


def test_a_file_that_is_removed_is_let_go(open_store):
    ours, theirs = open_store(), open_store()
    stored(theirs, 1)
    step(ours)
    path = file_of(theirs)
    theirs.close()
    assert f" {path}" in Path("/proc/self/maps").read_text()
    path.unlink()
    step(ours)
    assert (here(ours), ours.statistics().peers) == ([], 0)
    assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("what", ["the file", "the folder", "the folder, and another is made"])
def test_an_engine_says_once_that_its_file_is_gone(open_store, folder, what, caplog):
    """Else nobody knows why the others do not find its blocks, and why they are gone after a restart."""
    ours = open_store()
    stored(ours, 1)
    step(ours)
    assert "was removed" not in caplog.text
    path = file_of(ours)
    if what == "the file":
        path.unlink()
    else:
        shutil.rmtree(folder)
    if what == "the folder, and another is made":
        stored(open_store(), 2)
    for _ in range(3):
        step(ours)
    assert caplog.text.count(f"{path} was removed while its engine runs: the blocks in it end with this process") == 1
    assert loaded(ours, 1) == [1]


def test_a_peers_file_that_is_truncated_is_let_go(open_store, caplog):
    ours, theirs = open_store(), open_store()
    stored(theirs, 1)
    step(ours)
    with file_of(theirs).open("r+b") as file:
        file.truncate(0)
    step(ours)
    assert (here(ours), ours.statistics().peers) == ([], 0)
    assert caplog.text.count("are not used any more: it was truncated") == 1
    ours.submit_load(3, keys(1), [0])
    assert not ours.poll()[0].success
    theirs.close()


def test_a_file_that_is_truncated_between_a_step_and_a_load(open_store):
    ours, theirs = open_store(primary=empty()), open_store()
    stored(theirs, 1, 2)
    step(ours)
    with file_of(theirs).open("r+b") as file:
        file.truncate(0)
    assert loaded(ours, 1, 2) == []
    assert stored(ours, 1) == 1
    theirs.close()


def test_a_file_with_this_name_for_other_blocks_is_passed_over(open_store, caplog):
    theirs = open_store(namespace="others")
    stored(theirs, 1)
    path = file_of(theirs)
    theirs.close()
    ours = open_store()
    disguised = path.with_name(file_of(ours).name.replace("-0.pool", "-7.pool"))
    shutil.move(path, disguised)
    step(ours)
    assert here(ours) == []
    assert f"The blocks in {disguised} are not used: it is for other blocks" in caplog.text


def test_a_new_file_is_seen_though_the_folders_time_is_the_same(open_store, folder, monkeypatch):
    """The clock of a file system ticks some hundred times a second."""
    monkeypatch.setattr(peers, "COARSE_NS", 3600 * 10**9)
    ours = open_store()
    seen = folder.stat().st_mtime_ns
    stored(open_store(), 1)
    os.utime(folder, ns=(seen, seen))
    step(ours)
    assert here(ours) == [1]


def test_a_step_reads_only_so_much_of_what_is_new(open_store, monkeypatch):
    monkeypatch.setattr(peers, "REFRESH_RECORDS", 4)
    monkeypatch.setattr(peers.Peers.refresh, "__defaults__", (4,))
    theirs = open_store(16)
    ours = open_store(1)
    stored(theirs, *range(12))
    seen = []
    for _ in range(4):
        ours.end_step()
        seen.append(len(here(ours)))
    assert seen == [4, 8, 12, 12]


def test_a_peer_is_unmapped_when_the_store_is_closed(open_store):
    ours, theirs = open_store(), open_store()
    stored(theirs, 1)
    step(ours)
    loaded(ours, 1)
    before = Path("/proc/self/maps").read_text().count(str(file_of(theirs)))
    ours.close()
    after = Path("/proc/self/maps").read_text().count(str(file_of(theirs)))
    assert before == after + 1


@pytest.mark.host_only
def test_a_process_may_end_while_a_peer_is_read(open_store, folder):
    """Nothing is unmapped under a copy."""
    theirs = open_store(64)
    stored(theirs, *range(64))
    script = (
        "import numpy as np\n"
        "from async_tier.block_store import BlockStore\n"
        "from async_tier.config import TierConfig\n"
        "from async_tier.streams.rows import Rows\n"
        "from async_tier.testing import Gate\n"
        f"keys = {keys(*range(64))!r}\n"
        f"primary = np.zeros((64, {ROW_BYTES}), dtype=np.uint8)\n"
        f"options = dict(bytes_to_use={ROW_BYTES}, pool={str(folder)!r}, namespace='tests', engine='host')\n"
        "store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))\n"
        "assert store.statistics().peer_blocks == 64\n"
        "gate = Gate(store.peers.stream)\n"
        "gate.hold()\n"
        "for job in range(500):\n"
        "    store.submit_load(job, keys, list(range(64)))\n"
        "gate.release()\n"
    )
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_signals_also_come_from_copies_of_borrowed_blocks(open_store):
    ours, theirs = open_store(primary=empty()), open_store()
    stored(theirs, 1)
    step(ours)
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        ours.signal(eventfd)
        ours.submit_load(1, keys(1), [0])
        end = time.monotonic() + helpers.PATIENCE_S
        while not ours.poll():
            assert time.monotonic() < end
        assert os.eventfd_read(eventfd) >= 1
        ours.signal(-1)
    finally:
        os.close(eventfd)


def test_a_folder_that_cannot_be_read_for_a_while_costs_nothing(open_store, monkeypatch):
    ours, theirs = open_store(), open_store()
    stored(theirs, 1)
    step(ours)

    def scandir(path: str) -> None:
        raise OSError(24, "Too many open files")

    stored(open_store(), 2)
    monkeypatch.setattr(os, "scandir", scandir)
    step(ours)
    assert here(ours) == [1]
    monkeypatch.undo()
    monkeypatch.setattr(peers, "COARSE_NS", 0)
    step(ours)
    assert here(ours) == [1, 2]


def test_a_bad_file_is_named_once(open_store, folder, caplog):
    ours = open_store()
    bad = folder / file_of(ours).name.replace("-0.pool", "-9.pool")
    bad.write_bytes(bytes(4096))
    for _ in range(10):
        step(ours)
    assert caplog.text.count(f"The blocks in {bad} are not used: it is no pool") == 1


@pytest.mark.parametrize("gone", [0, 1])
def test_what_two_peers_hold_stays_when_one_of_them_loses_it(open_store, gone):
    both = [open_store(2), open_store(2)]
    for theirs in both:  # neither knows of the other yet
        stored(theirs, 1)
    ours = open_store(primary=empty())
    assert (here(ours), len(ours.peers)) == ([1], 1)
    stored(both[gone], 2, 3)
    step(ours)
    assert loaded(ours, 1) == [1]
    both[1 - gone].clear()
    step(ours)
    assert here(ours) == [2, 3]


def test_what_changes_while_a_peer_is_read_for_the_first_time(open_store, monkeypatch):
    monkeypatch.setattr(peers.Peers.refresh, "__defaults__", (4,))
    ours = open_store()
    theirs = open_store(32)
    stored(theirs, *range(32))
    ours.begin_sequence("a request", SequenceOrder({}))  # finds the file, and reads a part of it
    assert 0 < len(here(ours)) < 32
    theirs.index.drop(keys(0, 1))
    stored(theirs, 40)
    for _ in range(60):
        ours.end_step()
    assert here(ours) == here(theirs) == [*range(2, 32), 40]


@pytest.mark.parametrize("which", [0, 1])
def test_no_peer_waits_for_what_others_have_to_tell(open_store, monkeypatch, which):
    monkeypatch.setattr(peers.Peers.refresh, "__defaults__", (8,))
    both = [open_store(32), open_store(32)]
    busy, quiet = both[which], both[1 - which]
    ours = open_store()
    for number in range(0, 60, 6):
        stored(busy, *range(number, number + 6))
    stored(quiet, 63)
    ours.end_step()
    assert ours.has(key(63))
