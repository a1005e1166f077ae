"""`async-tier pool`: what it says of the files in a folder, what it removes, and who notices."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from async_tier import cli, machine
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.memory import pool, pool_files
from async_tier.memory.pool_files import Description, find_pools, remove_pool, room_in
from async_tier.operate import pools
from async_tier.order import SequenceOrder
from async_tier.streams.rows import Rows
from async_tier.text import enumerate_some
from tests.rows import zero_rows

ROW_BYTES, ROWS = 4096, 8
PRIMARY = zero_rows(ROWS, ROW_BYTES)
NAMES = [b"%036d" % number for number in range(4)]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="async-tier-pool-") as name:
        yield Path(name)


@pytest.fixture
def opened() -> Iterator[list[BlockStore]]:
    """Stores that are closed after the test."""
    stores: list[BlockStore] = []
    yield stores
    for store in stores:
        store.close()


def make_store(folder: Path, opened: list[BlockStore], rows: int = ROWS, **options: Any) -> BlockStore:
    options = {
        "bytes_to_use": rows * ROW_BYTES,
        "pool": str(folder),
        "namespace": "a test",
        "engine": "host",
        **options,
    }
    opened.append(BlockStore(Rows.of_view(memoryview(PRIMARY)), TierConfig.parse({**options, "copy_threads": 1})))
    return opened[-1]


# The rows may have been put into a huge page by now, or not yet.
ALLOCATED = r"[24]\.0 MiB allocated"


def fill(store: BlockStore) -> BlockStore:
    store.submit_store(1, NAMES, range(len(NAMES)), "a request")
    store.drain()
    store.poll()
    return store


def leave_behind(folder: Path, rows: int = ROWS, **options: Any) -> Path:
    """A file with four blocks that nobody owns."""
    store = fill(make_store(folder, [], rows, **options))
    path = store.arena.pool.path
    store.close()
    return path


def said(capsys, *arguments: str | Path, code: int = 0) -> list[str]:
    assert cli.main(["pool", *map(str, arguments)]) == code
    return capsys.readouterr().out.splitlines()


def found(capsys, *arguments: str | Path, code: int = 0) -> list[dict[str, Any]]:
    return json.loads("\n".join(said(capsys, *arguments, "--json", code=code)))["files"]


# ----------------------------------------------------------------------------------------------------------------- list


def test_a_file_that_an_engine_owns(capsys, folder, opened):
    path = fill(make_store(folder, opened)).arena.pool.path
    name = Path("/proc/self/comm").read_text().strip()
    what, whose, owner, last = said(capsys, "list", folder)
    assert what.startswith(f"{path.name}: 4 of 8 rows of 4.0 KiB hold a block; 32.0 KiB, ")
    assert re.fullmatch(ALLOCATED, what.rpartition(", ")[2])
    assert whose == "  namespace 'a test'"
    assert owner.startswith(f"  owned by process {os.getpid()} ({name}) for ")
    assert owner.endswith(" s; last used 0 s ago")
    assert last.startswith(f"1 files; the mount of {folder} has ")
    assert last.endswith(" left")


def test_a_file_that_nobody_owns(capsys, folder):
    leave_behind(folder)
    assert said(capsys, "list", folder)[2] == "  owned by nobody; last taken 0 s ago; last used 0 s ago"


def test_files_of_different_pools_say_in_what_they_differ(capsys, folder):
    first = leave_behind(folder)
    leave_behind(folder, namespace="another")
    lines = said(capsys, "list", folder)
    different = [line for line in lines if line.startswith("  differs")]
    listed = [line.partition(":")[0] for line in lines if ".pool: " in line]
    here, there = ("another", "a test") if listed[0] == first.name else ("a test", "another")
    assert different == [f"  differs from {listed[0]} in namespace ('{here}' here, '{there}' there)"]


def test_only_the_first_file_of_another_pool_says_so(capsys, folder):
    for namespace in ("a test", "another"):
        for rows in (ROWS, 2 * ROWS):
            leave_behind(folder, rows, namespace=namespace)
    assert len([line for line in said(capsys, "list", folder) if line.startswith("  differs")]) == 1


@pytest.mark.parametrize("action", ["list", "clear"])
def test_a_folder_without_pools(capsys, folder, action):
    (folder / "notes.txt").touch()
    (line,) = said(capsys, action, folder)
    assert line.startswith({"list": "no files of pools; ", "clear": "0 removed, 0 left; "}[action])


def test_differences_are_counted_where_there_are_many():
    here = {"a": "1", "b": "#12", "c": "3", "d": "4", "e": "5"}
    there = {"a": "1", "b": "#34", "c": "4", "e": "6", "f": "7"}
    reasons = ["b", "c ('3' here, '4' there)", "d ('4' here, 'absent' there)", "e ('5' here, '6' there)"]
    assert pool_files.differences(here, there) == [*reasons, "f ('absent' here, '7' there)"]
    assert enumerate_some(pool_files.differences(here, there)) == ", ".join(reasons[:3]) + ", and 2 more"
    assert pool_files.differences(here, {}) == []


def test_a_list_for_programs(capsys, folder):
    path = leave_behind(folder)
    (file,) = found(capsys, "list", folder)
    times = file.pop("since"), file.pop("idle_s")
    assert all(isinstance(each, float) for each in times)
    assert file == {
        "name": path.name,
        "allocated": path.stat().st_blocks * 512,
        "problem": None,
        "owner": None,
        "blocks": 4,
        "rows": ROWS,
        "row_bytes": ROW_BYTES,
        "is_reset": False,
        "about": {"namespace": "a test"},
        "facts": {"namespace": "a test", "row_bytes": str(ROW_BYTES)},
    }


def test_a_list_changes_nothing(capsys, folder, opened):
    path = leave_behind(folder)
    before = path.read_bytes()
    said(capsys, "list", folder)
    assert path.read_bytes() == before
    assert make_store(folder, opened).statistics().restored == 4


def test_an_engine_that_cannot_be_seen_from_here(capsys, folder, opened, monkeypatch):
    make_store(folder, opened)
    real = os.stat
    other = SimpleNamespace(st_ino=1)
    monkeypatch.setattr(os, "stat", lambda path, **more: other if path == "/proc/self/ns/pid" else real(path, **more))
    assert found(capsys, "list", folder)[0]["owner"] == "an engine in another container"


def test_an_engine_that_has_not_said_who_it_is(capsys, folder, opened, monkeypatch, tmp_path):
    make_store(folder, opened)
    monkeypatch.setattr(machine, "ROOT", tmp_path)  # where the process that is written in the file is not
    assert found(capsys, "list", folder)[0]["owner"] == "an engine that is starting"


def test_a_file_that_was_emptied_by_a_reset(capsys, folder):
    store = fill(make_store(folder, []))
    store.clear()
    store.close()
    what, _, owner, _ = said(capsys, "list", folder)
    assert ": 0 of 8 rows " in what
    assert owner.endswith(" ago; emptied by a reset")


def rewrite(path: Path, **changes: Any) -> None:
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, dataclasses.replace(Description.read(fd), **changes).pack()[0], 0)
    os.close(fd)


def damage(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\7")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILED = [
    (lambda path: damage(path, 0), "it is no pool"),
    (lambda path: damage(path, 16), "it has version 7 of the format, not 1"),
    (lambda path: damage(path, 60), "its description is damaged"),
    (lambda path: os.truncate(path, 100), "it is too short"),
    (lambda path: os.truncate(path, 2 << 20), "it has 2097152 bytes and not 4194304"),
    (lambda path: rewrite(path, boot="0" * 36), "it is from before the machine was started, and may lack what"),
    (replace_by_folder, "Is a directory"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILED, ids=[says for _, says in SPOILED])
def test_a_file_that_cannot_be_used(capsys, folder, spoil, says):
    path = leave_behind(folder)
    spoil(path)
    allocated = path.stat().st_blocks * 512
    what, _ = said(capsys, "list", folder, code=1)
    assert what.startswith(f"{path.name}: cannot be used: {says}")
    assert found(capsys, "list", folder, code=1)[0]["allocated"] == allocated


def test_a_file_of_another_user(capsys, folder, monkeypatch):
    path = leave_behind(folder)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    what, _ = said(capsys, "list", folder, code=1)
    says = f"it belongs to another user (number {os.getuid()})"
    assert what.startswith(f"{path.name}: cannot be used: {says}; ")
    assert re.fullmatch(ALLOCATED, what.rpartition("; ")[2])
    assert said(capsys, "clear", folder, code=1)[0] == f"left {path.name}: {says}"
    assert path.exists()


def test_a_damaged_file_that_an_engine_owns(capsys, folder, opened):
    damage(make_store(folder, opened).arena.pool.path, 60)
    assert said(capsys, "list", folder, code=1)[1] == "  owned by an engine"
    assert said(capsys, "clear", folder)[0].endswith(".pool: owned by an engine")


def test_files_that_are_not_ours_are_neither_listed_nor_removed(capsys, folder):
    others = [folder / name for name in ("notes.txt", "others.pool", "0123456789abcdef-1-0.pool.bak")]
    for path in others:
        path.write_text("what somebody needs")
    for action in ("list", "clear"):
        assert len(said(capsys, action, folder)) == 1
    assert all(path.exists() for path in others)


def test_a_file_that_is_truncated_while_it_is_looked_at(capsys, folder, monkeypatch):
    path, real = leave_behind(folder), Description.read

    def read(fd: int) -> Description:
        description = real(fd)
        os.truncate(path, 8192)
        return description

    monkeypatch.setattr(Description, "read", read)
    assert found(capsys, "list", folder, code=1)[0]["problem"] == "it has 8192 bytes, less than its table"


def test_a_file_that_goes_while_it_is_looked_at(folder, monkeypatch):
    path, real = leave_behind(folder), os.listdir

    def listdir(where: Path) -> list[str]:
        names = real(where)
        path.unlink()
        return names

    monkeypatch.setattr(os, "listdir", listdir)
    assert find_pools(folder) == []


@pytest.mark.parametrize(
    ("name", "says"), [("none", "No such file or directory"), ("file", "Not a directory"), ("0" * 300, "name too long")]
)
@pytest.mark.parametrize("action", ["list", "clear"])
def test_what_is_no_folder(capsys, tmp_path, action, name, says):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        cli.main(["pool", action, str(tmp_path / name)])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"async-tier: error: pool {tmp_path / name}: ")
    assert last.endswith(says)


# ---------------------------------------------------------------------------------------------------------------- clear


def test_what_nobody_owns_is_removed_and_the_rest_is_left(capsys, folder, opened):
    owned = make_store(folder, opened, rows=1).arena.pool.path
    free = leave_behind(folder)
    lines = said(capsys, "clear", folder)
    assert f"left {owned.name}: owned by process {os.getpid()} " in lines[0]
    assert lines[1].startswith(f"removed {free.name}: 4 of 8 rows ")
    assert lines[-1].startswith("1 removed, 1 left; ")
    assert [path.name for path in folder.iterdir()] == [owned.name]


def test_a_clear_for_programs(capsys, folder):
    leave_behind(folder)
    (file,) = found(capsys, "clear", folder)
    assert (file["left"], file["blocks"]) == (None, 4)


@pytest.mark.parametrize(("spoil", "says"), SPOILED[:-1], ids=[says for _, says in SPOILED[:-1]])
def test_files_that_cannot_be_used_are_removed(capsys, folder, spoil, says):
    path = leave_behind(folder)
    spoil(path)
    assert says in said(capsys, "clear", folder)[0]
    assert not path.exists()


def test_what_is_no_file_is_left(capsys, folder):
    path = leave_behind(folder)
    replace_by_folder(path)
    said(capsys, "clear", folder, code=1)
    assert path.is_dir()


def test_an_engine_that_reads_a_removed_file_lets_go_of_it(capsys, folder, opened):
    gone = leave_behind(folder)
    reader = make_store(folder, opened, rows=1)
    assert reader.lookup(NAMES[0])
    assert reader.statistics().peers == 1
    said(capsys, "clear", folder)
    reader.begin_sequence("the next request", SequenceOrder({}))
    assert not any(reader.lookup(name) for name in NAMES)
    assert (reader.statistics().peers, reader.statistics().peer_blocks) == (0, 0)
    assert gone.name not in Path("/proc/self/maps").read_text(), "its memory is free"


def test_a_file_that_an_engine_has_just_taken_is_left(folder, opened):
    path = leave_behind(folder)
    files = find_pools(folder)
    make_store(folder, opened)
    ((file, why),) = pools.clear(files)
    assert (file.path, why) == (path, "owned by an engine that has just taken it")
    assert path.exists()


def test_a_file_that_has_the_name_by_now_is_left(folder, monkeypatch):
    """Between opening a file and locking it, an engine may remove it and give its name to a file of its own."""
    path, real = leave_behind(folder), pool_files.lock

    def lock(fd: int, start: int) -> None:
        path.unlink()
        path.write_text("another engine's")
        real(fd, start)

    monkeypatch.setattr(pool_files, "lock", lock)
    assert remove_pool(path)
    assert path.read_text() == "another engine's"


def test_a_file_that_is_gone_is_gone(folder):
    assert remove_pool(folder / "0123456789abcdef-1-0.pool")


# ------------------------------------------------------------------------------------------------------------- the rest


def test_no_engine_reads_a_file_from_before_the_machine_was_started(folder, opened):
    rewrite(leave_behind(folder), boot="0" * 36)
    assert make_store(folder, opened, rows=1).statistics().peer_blocks == 0


def mounted(root: Path, folder: Path, kind: str, options: str) -> None:
    device = folder.stat().st_dev
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    line = f"30 25 {os.major(device)}:{os.minor(device)} / {folder} rw - {kind} none {options}\n"
    (root / "proc/self/mountinfo").write_text(line)


def blocks(monkeypatch, **changes: int) -> None:
    """What statvfs tells of every mount."""
    fields = {"f_blocks": 0, "f_bavail": 0, "f_frsize": 4096, **changes}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**fields))


def test_a_mount_without_a_limit_takes_a_pool(folder, opened, monkeypatch, capsys):
    blocks(monkeypatch)
    assert room_in(folder) is None
    make_store(folder, opened)
    assert said(capsys, "list", folder)[-1] == f"1 files; the mount of {folder} has no limit but memory's"


def test_hugetlbfs_has_as_much_room_as_there_are_pages(folder, opened, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    mounted(tmp_path, folder, "hugetlbfs", "rw,pagesize=2M")
    pages = tmp_path / "sys/kernel/mm/hugepages/hugepages-2048kB"
    pages.mkdir(parents=True)
    (pages / "free_hugepages").write_text("8\n")
    (pages / "resv_hugepages").write_text("3\n")
    blocks(monkeypatch, f_frsize=2 << 20)
    assert room_in(folder) == 5 * (2 << 20)
    blocks(monkeypatch, f_frsize=2 << 20, f_blocks=4, f_bavail=1)
    assert room_in(folder) == 2 << 20, "a mount's own limit counts, too"


def test_pages_of_hugetlbfs_are_not_asked_of_available_memory(folder, opened, monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "refuse_if_unavailable", lambda size: pytest.fail("they were set apart"))
    monkeypatch.setattr(pool, "room_in", lambda folder: None)
    monkeypatch.setattr(pool, "file_system", lambda device: "hugetlbfs")
    make_store(folder, opened)


@pytest.mark.starts_process
def test_it_needs_neither_vllm_nor_torch(folder):
    leave_behind(folder)
    program = "import sys; sys.modules['vllm'] = sys.modules['torch'] = None; from async_tier.cli import main; "
    run = [sys.executable, "-c", f"{program}sys.exit(main(sys.argv[1:]))", "pool", "list", str(folder)]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "4 of 8 rows" in ended.stdout
