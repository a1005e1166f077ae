"""A pool in a folder: what survives the process, what a start does with what it finds, and what it refuses."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from async_tier import machine
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.eviction import LeastRecentlyUsed
from async_tier.index import FILLING, FREE, READY, BlockIndex
from async_tier.memory import pool, pool_files
from async_tier.memory.pool import PoolArena
from async_tier.order import SequenceOrder
from async_tier.streams import _native
from async_tier.streams.rows import Rows
from tests import helpers, pool_kills
from tests.helpers import key, keys
from tests.rows import primary_rows

ROW_BYTES = 4096
PRIMARY = primary_rows(64, ROW_BYTES)
PATIENCE_S = 30.0
pytestmark = pytest.mark.each_engine("host", "cuda, pool host")


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="async-tier-pool-", dir="/dev/shm"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def open_store(folder: Path) -> Any:
    """open_store(rows, **options): a store in the folder, of the test's engine."""

    def make(rows: int = 8, primary: np.ndarray | None = None, **more: Any) -> BlockStore:
        primary = primary_rows(64, ROW_BYTES) if primary is None else primary
        pool = {"bytes_to_use": rows * ROW_BYTES, "pool": str(folder), "namespace": "tests"}
        given = {**helpers.engine_options(), **pool, **more}
        store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(given))
        helpers.remember(store, primary)
        return store

    return make


def stored(store: BlockStore, *numbers: int, sequence: str | None = None) -> int:
    """Store block n from row n; how many bytes were copied, in blocks."""
    store.submit_store(1, keys(*numbers), list(numbers), sequence)
    store.drain()
    (end,) = store.poll()
    assert end.success, end.reason
    return end.bytes // ROW_BYTES


def here(store: BlockStore, numbers: range = range(64)) -> list[int]:
    return [number for number in numbers if store.has(key(number))]


def loaded(store: BlockStore, *numbers: int) -> list[int]:
    """Load these blocks; those that arrived, each of which has the right bytes."""
    target = store_target(store)
    store.submit_load(2, keys(*numbers), list(range(len(numbers))))
    store.drain()
    (end,) = store.poll()
    arrived = [n for n in numbers if end.success or key(n) in (end.loaded_keys or ())]
    for at, number in enumerate(numbers):
        if number in arrived:
            assert np.array_equal(target[at], PRIMARY[number]), f"block {number} has other bytes"
    return arrived


def store_target(store: BlockStore) -> np.ndarray:
    """The memory of the store's primary, shape (rows, ROW_BYTES)."""
    rows = store.primary
    buffer = (ctypes.c_char * (rows.count * rows.stride)).from_address(rows.address)
    return np.frombuffer(buffer, dtype=np.uint8).reshape(rows.count, rows.stride)


def file_of(store: BlockStore) -> Path:
    assert store.arena.pool is not None
    return store.arena.pool.path


def wait_until(holds: Any, what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, f"not in {PATIENCE_S} s: {what}"


# ------------------------------------------------------------------------------------------------- what survives


def test_blocks_survive_a_close(open_store):
    store = open_store()
    assert stored(store, 1, 2, 3) == 3
    store.close()
    again = open_store(primary=primary_rows(64, ROW_BYTES, seed=2))
    assert again.statistics().restored == 3
    wait_until(lambda: again.poll() is not None and again.num_blocks == 3, "all rows are ready")
    assert here(again) == [1, 2, 3]
    assert loaded(again, 1, 2, 3) == [1, 2, 3]
    assert stored(again, 1, 2, 3, 4) == 1, "they are not stored again"


@pytest.mark.host_only
def test_a_killed_owner_leaves_whole_blocks_or_none(folder):
    reader = pool_kills.run(folder, 120, seed=7)
    with contextlib.closing(reader.store):
        assert reader.wrong == []
        assert reader.right > 1000, "there was something to read"
        assert reader.store.statistics().faults == 0


def test_a_block_that_is_being_stored_does_not_survive(open_store, folder):
    store = open_store()
    stored(store, 1)
    with helpers.store_gate(store):
        store.submit_store(2, keys(2), [2])
        again = _at_this_moment(folder)
    assert again == keys(1)


def _at_this_moment(folder: Path) -> list[bytes]:
    """What a new owner would find if the present one died now: of a copy of its file."""
    (path,) = folder.glob("*.pool")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        _own(shutil.copy(path, other), 0)
        description = pool_files.find_pools(Path(other))[0].description
        assert description is not None
        arena = PoolArena(
            Path(other),
            pool_files.Identity(description.digest, {}),
            description.capacity,
            description.row_bytes,
            allocate=False,
        )
        found = arena.restored[1]
        arena.close()
        return sorted(found)


def _own(path: str | Path, process: int, since: float | None = None) -> None:
    """Write into a file that this process owns it; 0: that nobody does."""
    with open(path, "r+b") as file:
        file.seek(pool_files.OWNER_OFFSET)
        file.write(pool_files.OWNER.pack(process, pool_files.pid_namespace(), time.time() if since is None else since))


def test_a_block_that_was_dropped_does_not_survive(open_store):
    store = open_store()
    stored(store, 1, 2)
    store.fail(3, "load", RuntimeError("as a test wants it"), keys(1))
    store.close()
    assert here(open_store()) == [2]


@pytest.mark.parametrize("policy", ["lru", "benchmarks.bench.plain_lru:PlainLru"])
def test_the_order_of_eviction_survives(open_store, policy):
    """Also of uses that were no stores."""
    store = open_store(4, eviction_policy=policy)
    for number in (9, 1, 2, 3):
        stored(store, number)
    store.index.drop(keys(9))
    stored(store, 4)  # in the first row
    assert store.lookup(key(1))
    store.close()
    store = open_store(4, eviction_policy=policy)
    wait_until(lambda: store.poll() is not None and store.num_blocks == 4, "all rows are ready")
    stored(store, 5)
    kept = [1, 3, 4, 5] if policy == "lru" else [2, 3, 4, 5]  # a policy without times knows when they were stored
    assert here(store) == kept


def test_r13_a_prefix_stays_longer_than_what_continues_it_after_a_restart_too(open_store):
    order = SequenceOrder({name: at for at, name in enumerate(keys(*range(1, 5)))})
    store = open_store(5)
    store.begin_sequence("a request", order)
    stored(store, 1, 2, sequence="a request")
    stored(store, 3, 4, sequence="a request")
    store.finish_sequence("a request")
    stored(store, 9)
    assert store.lookup(key(9))
    store.close()
    store = open_store(5)
    wait_until(lambda: store.poll() is not None and store.num_blocks == 5, "all rows are ready")
    left = []
    for number in (11, 12, 13, 14):
        stored(store, number)
        left.append(here(store, range(10)))
    assert left == [[1, 2, 3, 9], [1, 2, 9], [1, 9], [9]]


def test_uses_reach_the_file_before_the_end(open_store, folder):
    """For a kill leaves no time for it."""
    store = open_store(2)
    stored(store, 1)
    stored(store, 2)
    assert store.lookup(key(1))
    for _ in range(16):
        store.end_step()
    (path,) = folder.glob("*.pool")
    data = path.read_bytes()
    used_at = np.frombuffer(data, dtype=np.int64, offset=_native.Table.bytes(8) - 8 * (8 + 64), count=2)
    assert used_at[0] > used_at[1] > 0


def test_a_store_that_nobody_closes_gives_up_its_file(open_store):
    store = open_store()
    stored(store, 1)
    path = file_of(store)
    helpers.forget()
    del store
    assert file_of(open_store()) == path


@pytest.mark.host_only
def test_a_file_is_free_when_its_store_is_closed(open_store, monkeypatch):
    """The system keeps a file open, and its lock, while a call works on its memory."""
    began, may_end, closed = threading.Event(), threading.Event(), threading.Event()

    def collapse(address: int, size: int) -> None:
        began.set()
        assert may_end.wait(PATIENCE_S)

    monkeypatch.setattr(pool, "collapse_memory", collapse)
    store = open_store()
    assert began.wait(PATIENCE_S)
    closer = threading.Thread(target=lambda: (store.close(), closed.set()))
    closer.start()
    try:
        assert not closed.wait(0.3), "it waits for the call"
    finally:
        may_end.set()
        closer.join(PATIENCE_S)
    assert closed.is_set()


def test_a_forked_child_does_not_keep_the_file(open_store):
    store = open_store()
    stored(store, 1)
    path = file_of(store)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)  # until the parent is done
        os._exit(0)
    try:
        os.close(reading)
        store.close()
        assert file_of(open_store()) == path
    finally:
        os.close(writing)
        os.waitpid(child, 0)


@pytest.mark.parametrize("is_reaped", [True, False])
def test_an_owner_that_is_still_ending_is_waited_for(open_store, monkeypatch, is_reaped):
    """As one that dies gives up its memory before its GPU."""
    store = open_store()
    stored(store, 1)
    sleeper = subprocess.Popen(["sleep", "1000"])
    path = file_of(store)
    store.close()
    _own(path, sleeper.pid)
    waited = threading.Event()

    def sleep(seconds: float) -> None:
        waited.set()
        os.kill(sleeper.pid, signal.SIGKILL)  # Popen's own way would reap it
        if is_reaped:
            sleeper.wait()

    monkeypatch.setattr(pool.time, "sleep", sleep)
    monkeypatch.setattr(pool, "ENDING_S", 5)
    assert open_store().statistics().restored == 1
    assert waited.is_set()
    monkeypatch.undo()
    sleeper.wait()


def test_another_process_with_its_number_is_not_the_owner(open_store):
    store = open_store()
    path = file_of(store)
    store.close()
    _own(path, os.getpid(), since=1.0)
    assert file_of(open_store()) == path


def test_a_file_whose_owner_does_not_end_is_passed_over(open_store, folder, monkeypatch, caplog):
    store = open_store()
    path = file_of(store)
    store.close()
    _own(path, os.getpid())
    monkeypatch.setattr(pool, "ENDING_S", 0)
    assert file_of(open_store()) != path
    assert "its owner has not ended in 0 s" in caplog.text


# --------------------------------------------------------------------------------------------------------- resets


def test_r10_nothing_from_before_a_reset_survives(open_store):
    store = open_store()
    stored(store, 1)
    store.clear()
    assert here(store) == []
    stored(store, 2)
    assert here(store) == [2]
    store.close()
    again = open_store()
    assert here(again) == [], "and nothing from after it, as weights may have been others"
    stored(again, 3)
    again.close()
    assert here(open_store()) == [3]


def test_what_a_reset_means_for_a_pool_is_said_once(open_store, caplog):
    caplog.set_level("INFO")
    store = open_store()
    store.clear()
    store.clear()
    assert caplog.text.count("from now on it keeps its blocks to itself") == 1


# ------------------------------------------------------------------------------------------ what is another pool


@pytest.mark.parametrize("other", [{"namespace": "others"}, {"rows": 9}])
def test_other_blocks_or_another_size_are_another_file(open_store, other):
    store = open_store()
    stored(store, 1)
    path = file_of(store)
    store.close()
    again = open_store(**other)
    assert (file_of(again) == path, again.statistics().restored) == (False, 0)
    again.close()
    assert open_store().statistics().restored == 1, "and the first one is left as it was"


def test_rows_of_another_size_are_another_file(open_store):
    store = open_store()
    stored(store, 1)
    store.close()
    other = open_store(rows=8, primary=primary_rows(64, ROW_BYTES // 2))
    assert here(other) == []


def test_two_stores_have_two_files(open_store):
    assert file_of(open_store()) != file_of(open_store())


def test_a_key_that_has_no_room_in_the_table_is_refused(open_store):
    store = open_store()
    store.submit_store(1, [b"x" * 40, b"y"], [0, 1])
    store.submit_store(2, [b"x" * 41, b"z"], [0, 1])
    store.submit_store(3, [b""], [0])
    store.drain()
    ends = {end.job_id: (end.success, end.reason) for end in store.poll()}
    refused = (False, "a key in a pool is 1 to 40 bytes")
    assert ends == {1: (True, None), 2: refused, 3: refused}


# --------------------------------------------------------------------------- files that are not as they should be


def damaged(path: Path, what: str) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        if what == "magic":
            file.write(b"something else..")
        elif what == "version":
            file.seek(16)
            file.write(b"\x09")
        elif what == "a number":
            file.seek(60)
            file.write(b"\xff")
        elif what == "a size that overflows":
            file.seek(52)
            file.write(b"\xff" * 16)
        elif what == "torn":
            file.seek(40)
            file.write(bytes(2000))
        elif what == "empty":
            file.truncate(0)
        elif what == "truncated":
            file.truncate(size - 4096)
        elif what == "without rows":
            file.truncate(4096)
        elif what == "longer":
            file.truncate(size + 4096)
        elif what == "boot":
            description = pool_files.Description.read(file.fileno())
            file.write(dataclasses.replace(description, boot="0" * 36).pack()[0])
        elif what == "a letter":
            file.seek(_native.Table.bytes(8) + 5)
            file.write(b"\xff")


@pytest.mark.parametrize(
    "what",
    [
        *("magic", "version", "a number", "a size that overflows", "torn", "empty", "truncated", "without rows"),
        *("longer", "boot", "a letter"),
    ],
)
def test_a_damaged_file_is_a_clean_start_with_one_line(open_store, what, caplog):
    store = open_store()
    stored(store, 1)
    path = file_of(store)
    store.close()
    damaged(path, what)
    again = open_store()
    assert here(again) == []
    assert stored(again, 1, 2) == 2
    lines = [record.getMessage() for record in caplog.records if str(path) in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(f"{path} is removed, and its blocks are lost: ")
    assert again.statistics().faults == 0


def test_facts_for_which_there_is_no_room_are_left_out(folder):
    many = {f"{number:070d}": "a fact" for number in range(1000)}
    PoolArena(folder, pool_files.Identity(bytes(32), {"namespace": "many"}, many), 8, ROW_BYTES, allocate=True).close()
    (found,) = pool_files.find_pools(folder)
    assert found.description is not None
    assert (found.description.about, found.description.facts) == ({"namespace": "many"}, {})


def test_a_tier_that_begins_empty_says_what_the_other_pools_are(folder, caplog):
    caplog.set_level(logging.INFO)
    options = {**helpers.engine_options(), "pool": str(folder)}
    helpers.make_tier(PRIMARY, 8, **{**options, "namespace": "before"}).shutdown()
    assert "begins empty" not in caplog.text
    (path,) = folder.iterdir()
    helpers.make_tier(PRIMARY, 8, **{**options, "namespace": "after"})
    assert f"begins empty, but its folder has files of other pools: 1. The nearest, {path.name}, " in caplog.text
    assert "differs in namespace ('after' here, 'before' there). See" in caplog.text
    caplog.clear()
    helpers.make_tier(PRIMARY, 8, **{**options, "namespace": "after"}).shutdown()
    assert "begins empty" not in caplog.text, "it has a peer"


def test_a_file_of_another_version_is_removed(open_store, monkeypatch, caplog):
    """Its name tells, but names can be changed."""
    monkeypatch.setattr(pool_files, "VERSION", 9)
    store = open_store()
    path = file_of(store)
    store.close()
    monkeypatch.undo()
    disguised = path.with_name(path.name.replace("-9-", "-1-"))
    path.rename(disguised)
    open_store()
    assert f"{disguised} is removed, and its blocks are lost: it has version 9 of the format, not 1" in caplog.text


def test_a_file_of_others_under_our_name_is_not_taken_over(open_store):
    theirs = open_store(namespace="others")
    stored(theirs, 1)
    path = file_of(theirs)
    theirs.close()
    ours = open_store()
    name = file_of(ours)
    ours.close()
    path.rename(name)
    again = open_store()
    assert (file_of(again) == name, here(again)) == (False, [])


@pytest.mark.parametrize("seed", range(20))
def test_a_table_of_random_bytes_ends_nothing(open_store, seed):
    """Its keys are nobody's, and its parents make no circles."""
    store = open_store(32)
    for number in range(32):
        stored(store, number, sequence="a request")
    path = file_of(store)
    store.close()
    dice = np.random.default_rng(seed)
    end = _native.Table.bytes(32)
    with path.open("r+b") as file:
        for _ in range(dice.integers(1, 400)):
            file.seek(int(dice.integers(pool_files.DESCRIPTION_BYTES, end)))
            file.write(dice.bytes(int(dice.integers(1, 9))))
    again = open_store(32)
    stored(again, *range(32, 64), sequence="another one")
    again.finish_sequence("another one")
    for number in here(again):
        assert number >= 32 or loaded(again, number) in ([number], [])


def test_what_is_not_a_file_is_passed_over(open_store, caplog):
    store = open_store()
    path = file_of(store)
    store.close()
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert file_of(open_store()) != path
    assert f"{path} is passed over" in caplog.text
    path.unlink()
    os.mkfifo(path)
    assert file_of(open_store()) != path


def test_a_file_of_another_user_is_passed_over(open_store, caplog):
    if os.geteuid() != 0:
        pytest.skip("needs to give a file away")
    store = open_store()
    stored(store, 1)
    path = file_of(store)
    store.close()
    os.chown(path, 12345, 12345)
    again = open_store()
    assert (file_of(again) == path, here(again)) == (False, [])
    assert f"{path} is passed over: it belongs to another user (number 12345)" in caplog.text


@pytest.mark.parametrize("name", ["x" * 256, "\u4e2d" * 256, "\U0001f600" * 256])
def test_a_file_names_what_it_is_for(open_store, folder, name):
    open_store(namespace=name).close()
    (found,) = pool_files.find_pools(folder)
    assert found.description is not None
    assert found.description.about["namespace"] == name


def test_memory_is_claimed_only_until_it_is_allocated(open_store):
    """Then the system counts it as used."""
    store = open_store()
    wait_until(lambda: store.poll() is not None and store.statistics().rows_ready == 8, "all rows have memory")
    wait_until(lambda: not _claims(store), "the claim has ended")
    store.close()
    assert not _claims(open_store()), "nor is there one for a file that has all its memory"


def _claims(store: BlockStore) -> list[int]:
    start = store.arena.rows.address
    claims = [line.split("/")[-2:] for line in Path("/proc/net/unix").read_text().splitlines() if "@async-tier" in line]
    return [int(size) for address, size in claims if int(address) == start]


def test_files_are_their_owners_alone(open_store):
    path = file_of(open_store())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_truncated_while_it_is_used_empties_the_tier(open_store, caplog):
    store = open_store()
    stored(store, 1, 2)
    with file_of(store).open("r+b") as file:
        file.truncate(0)
    store.end_step()
    store.submit_store(5, keys(3), [3])
    store.submit_load(6, keys(1), [1])
    reasons = {end.job_id: end.reason for end in store.poll()}
    assert set(reasons) == {5, 6}
    assert "was truncated" in str(reasons[5])
    assert here(store) == []
    assert caplog.text.count("it is empty and takes nothing more") == 1
    store.close()


def test_a_file_that_is_closed_is_not_taken_for_a_truncated_one(open_store, caplog):
    store = open_store()
    store.close()
    store.poll()
    store.submit_store(5, keys(3), [3])
    assert "truncated" not in caplog.text


def test_a_folder_that_vanishes_is_no_fault(open_store, folder):
    store = open_store()
    stored(store, 1)
    shutil.rmtree(folder)
    store.begin_sequence("a request", SequenceOrder({}))
    store.end_step()
    assert stored(store, 2) == 1
    assert loaded(store, 1, 2) == [1, 2]
    assert store.statistics().faults == 0
    store.close()


# ------------------------------------------------------------------------------------------------- what is refused


def refusal(open_store: Any, **options: Any) -> str:
    with pytest.raises((ValueError, MemoryError)) as error:
        open_store(**options)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_folder_is_made_for_its_owner_alone(open_store, folder):
    file_of(open_store(pool=str(folder / "new")))
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o700
    assert "must be a folder, or one that can be made (No such file or directory)" in refusal(
        open_store, pool=str(folder / "a" / "b")
    )


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(open_store, folder, mode):
    folder.chmod(mode)
    assert f"nobody else may write to, but its mode is {mode:o}; chmod it to 700" in refusal(open_store)


def test_a_folder_of_another_user_is_refused(open_store, monkeypatch):
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert f"must be a folder of this user (number {user + 1}), not of number {user}" in refusal(open_store)


def test_what_is_no_folder_is_refused(open_store, folder):
    (folder / "file").write_text("")
    assert "must be a folder" in refusal(open_store, pool=str(folder / "file"))


def test_a_disk_is_refused_unless_it_is_asked_for(open_store, tmp_path, monkeypatch):
    kind = pool_files.file_system(tmp_path.stat().st_dev)
    if kind in ("tmpfs", "hugetlbfs"):
        pytest.skip("there is no disk here")
    assert f"must be on tmpfs or hugetlbfs, such as /dev/shm, but is on {kind}" in refusal(
        open_store, pool=str(tmp_path)
    )
    store = open_store(pool=str(tmp_path), pool_on_disk=True)
    assert stored(store, 1) == 1
    store.close()
    assert here(open_store(pool=str(tmp_path), pool_on_disk=True)) == [1]


def test_a_mount_without_room_is_refused(open_store, folder, monkeypatch):
    monkeypatch.setattr(pool, "room_in", lambda _: 1 << 20)
    text = refusal(open_store)
    assert text.startswith("the tier asks for ")
    assert f"but pool {folder} has 1.0 MiB (1048576 bytes) left; set bytes_to_use to less" in text
    assert list(folder.iterdir()) == []


def test_more_than_the_machine_has_is_refused(open_store, monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "room_in", lambda _: 1 << 60)
    text = refusal(open_store, bytes_to_use=1 << 50)
    assert "but the machine has" in text or "but the memory cgroup has" in text


@contextlib.contextmanager
def mounted(kind: str, options: str) -> Iterator[Path]:
    """A file system of its own; skips where this user must not mount one."""
    place = Path(tempfile.mkdtemp())
    made = subprocess.run(["mount", "-t", kind, "-o", options, "none", str(place)], capture_output=True, text=True)
    try:
        if made.returncode:
            pytest.skip(f"cannot mount {kind}: {made.stderr.strip()}")
        try:
            yield place
        finally:
            helpers.close_stores()
            subprocess.run(["umount", str(place)], check=True)
    finally:
        place.rmdir()


def test_a_mount_that_fills_up_leaves_fewer_rows(open_store, monkeypatch, caplog):
    """Others may write to it after we have looked how much room there is."""
    monkeypatch.setattr(pool, "ALLOCATION_BYTES", 64 * ROW_BYTES)
    with mounted("tmpfs", "size=8m") as place:
        (place / "others").write_bytes(bytes(3 << 20))
        monkeypatch.setattr(pool, "room_in", lambda _: 1 << 30)
        store = open_store(2048, pool=str(place / "pool"))
        wait_until(lambda: "has no more room" in caplog.text or "could be pinned" in caplog.text, "its end is seen")
        store.poll()
        usable = store.statistics().rows_ready
        assert 0 < usable < 1024
        numbers = list(range(2000))
        store.submit_store(1, [b"%d" % number for number in numbers], [number % 64 for number in numbers])
        store.drain()
        (end,) = store.poll()
        assert (end.success, end.bytes // ROW_BYTES) == (True, usable)


def test_a_mount_that_is_full_at_once_is_refused(open_store, monkeypatch):
    for others in (2 << 20, 3 << 20):  # there is room for the table; nor for that
        with mounted("tmpfs", "size=4m") as place:
            (place / "others").write_bytes(bytes(others))
            monkeypatch.setattr(pool, "room_in", lambda _: 1 << 30)
            assert "has no room for the tier: No space left on device" in refusal(open_store, pool=str(place / "pool"))
            assert list((place / "pool").iterdir()) == []


@pytest.mark.host_only
def test_memory_is_put_into_huge_pages(open_store):
    """Also where the file system gives small ones."""
    version = tuple(int(number) for number in os.uname().release.split(".")[:2])
    chosen = machine.huge_pages("shmem_enabled")
    if version < (6, 1) or chosen in (None, "deny"):
        pytest.skip("this system does not do that")
    store = open_store(1024)

    def in_huge_pages() -> int:
        smaps = Path("/proc/self/smaps").read_text()
        mine = smaps[smaps.index(f" {store.arena.pool.inode} ") :]
        return int(mine.split("ShmemPmdMapped:")[1].split()[0])

    wait_until(lambda: in_huge_pages() >= 4096, "its rows are in huge pages")
    assert stored(store, 1, 2) == 2
    assert loaded(store, 1, 2) == [1, 2]


def test_huge_pages_are_used_where_they_are_mounted(open_store):
    pages = Path("/proc/sys/vm/nr_hugepages")
    before = pages.read_text()
    try:
        pages.write_text("6")
        if int(pages.read_text()) < 6:
            pytest.skip("the system has no huge pages left")
    except OSError as error:
        pytest.skip(f"cannot set huge pages aside: {error}")
    try:
        with mounted("hugetlbfs", "pagesize=2M") as place:
            store = open_store(pool=str(place / "pool"))
            assert stored(store, 1, 2) == 2
            assert int(Path("/proc/meminfo").read_text().split("HugePages_Free:")[1].split()[0]) <= 4
            store.close()
            again = open_store(pool=str(place / "pool"))
            assert loaded(again, 1, 2) == [1, 2]
            again.close()
            shutil.rmtree(place / "pool")
            too_much = refusal(open_store, rows=5000, pool=str(place / "pool"))
            assert "has 12.0 MiB (12582912 bytes) left" in too_much
    finally:
        pages.write_text(before)


# ----------------------------------------------------------------------------------------------- rows that sleep


def test_restored_rows_are_ready_as_their_memory_is():
    """With CUDA they are pinned bit by bit, and no copy may touch the others."""
    _memory, table = new_table()
    index = BlockIndex(8)
    index.usable = 2
    index.keep_in(table, [0, 3, 5], [b"a", b"b", b"c"], [-1, 0, 3], [5, 6, 7])
    assert [index.state(name) for name in (b"a", b"b", b"c")] == [READY, FILLING, FILLING]
    assert index.reserve([b"x"], None, None)[1] == [1], "only usable rows are taken"
    assert index.reserve([b"y"], None, None)[1] == [], "and none is evicted that a block continues"
    index.usable = 4
    assert [index.state(name) for name in (b"b", b"c")] == [READY, FILLING]
    index.clear()
    index.usable = 8
    assert (len(index), index.filling) == (0, 0)
    assert len(index.reserve([b"%d" % at for at in range(9)], None, None)[1]) == 7, (
        "all but the one that is being stored"
    )


def new_table() -> tuple[Any, _native.Table]:
    """(its memory, a table of eight rows)."""
    memory = (ctypes.c_char * _native.Table.bytes(8))()
    return memory, _native.Table(ctypes.addressof(memory), 8, -1, 0)


def test_a_key_that_is_there_twice_is_there_once():
    _memory, table = new_table()
    for row in (0, 1, 2):
        table.take([row], [b"a" if row < 2 else b"b"], -1)
        table.publish([row])
    index = BlockIndex(4)
    index.keep_in(table, *table.restore())
    assert (len(index), index.rows_used) == (2, 2)
    assert len(table.restore()[0]) == 2
    assert len(set(index.reserve([b"c", b"d"], None, None)[1])) == 2


def test_serials_go_on_whatever_the_file_says():
    memory, table = new_table()
    table.take([0, 1, 2], [b"a", b"b", b"c"], -1)
    table.publish([0, 1, 2])
    memory[2056:2064] = bytes(8)
    table.restore()
    before = table.scan(0, 8)[2]
    table.take([3], [b"d"], -1)
    table.publish([3])
    assert table.scan(3, 1)[2][0] > max(before)


def test_uses_that_are_later_than_now_are_not_the_newest():
    """The system's clock begins anew with the machine, and a disk does not."""
    _memory, table = new_table()
    table.take([0], [b"a"], -1)
    table.publish([0])
    index = BlockIndex(2)
    index.keep_in(table, [0], [b"a"], [-1], [1 << 60])
    index.mark_ready(index.reserve([b"b"], None, None)[1])
    index.mark_ready(index.reserve([b"c"], None, None)[1])
    assert [index.state(name) for name in (b"a", b"b", b"c")] == [FREE, READY, READY]


def test_parents_that_make_a_circle_are_none():
    """No owner writes such a file, but blocks of a circle would never be evicted."""
    memory, table = new_table()
    table.take([0], [b"a"], -1)
    table.take([1], [b"b"], 0)
    table.publish([0, 1])
    _, _, words = table.scan(0, 8)
    first = _native.Table.bytes(8) - 8 * 64  # a record: its word, its parent's serial, its parent
    memory[first + 8 : first + 20] = (words[1] >> 1).to_bytes(8, "little") + (1).to_bytes(4, "little")
    rows, _, parents, _ = table.restore()
    assert (rows, parents) == ([0, 1], [-1, 0])


def test_parents_that_are_gone_or_no_rows_are_none():
    memory, table = new_table()
    table.take([3], [b"a"], -1)
    table.take([4, 5], [b"b", b"c"], 3)
    table.publish([3, 4, 5])
    table.take([3], [b"d"], -1)
    table.publish([3])
    second = _native.Table.bytes(8) - (8 - 5) * 64
    memory[second + 16 : second + 20] = (1 << 30).to_bytes(4, "little")
    rows, _, parents, _ = table.restore()
    assert (rows, parents) == ([3, 4, 5], [-1, -1, -1])


def test_a_policy_that_cannot_be_restored_is_refused(open_store, monkeypatch):
    store = open_store()
    stored(store, 1)
    path = file_of(store)
    store.close()

    def restore(*_: object) -> None:
        raise RuntimeError("as a test wants it")

    monkeypatch.setattr(LeastRecentlyUsed, "restore", restore)
    assert "eviction_policy must be one that can be made (RuntimeError: 'as a test wants it')" in refusal(open_store)
    monkeypatch.undo()
    assert file_of(open_store()) == path, "it was closed"
