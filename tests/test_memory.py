"""What memory a tier can have: limits of machine and container, and that each byte is given once."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from async_tier import machine as system
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.eviction import LeastRecentlyUsed
from async_tier.memory import claims, host
from async_tier.memory.claims import refuse_if_unavailable
from async_tier.memory.host import Arena
from async_tier.streams import _native
from async_tier.streams.host import HostEngine
from async_tier.streams.rows import Rows

MIB = 1 << 20
PATIENCE_S = 30.0


# ------------------------------------------------------------------------------------------------- more than there is


class Machine:
    """A file system that says how much memory there is."""

    def __init__(self, root: Path, available_kib: int = 64 << 20) -> None:
        self.root = root
        self.write("proc/net/unix", "Num       RefCount Protocol Flags    Type St Inode Path")
        self.write("proc/meminfo", f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {available_kib} kB\n")

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def in_group(self, *lines: str) -> None:
        self.write("proc/self/cgroup", "\n".join(lines))

    def group_v2(self, path: str, limit: int | str, usage: int, inactive: int = 0) -> None:
        folder = f"sys/fs/cgroup/{path}"
        self.write(f"{folder}/memory.max", limit)
        self.write(f"{folder}/memory.current", usage)
        self.write(f"{folder}/memory.stat", f"anon 5\ninactive_file {inactive}\ntotal_inactive_file 1")

    def group_v1(self, path: str, limit: int, usage: int, inactive: int = 0) -> None:
        folder = f"sys/fs/cgroup/memory/{path}"
        self.write(f"{folder}/memory.limit_in_bytes", limit)
        self.write(f"{folder}/memory.usage_in_bytes", usage)
        self.write(f"{folder}/memory.stat", f"cache 5\ninactive_file 1\ntotal_inactive_file {inactive}")

    def tier(
        self,
        process: int,
        *sizes: int,
        pages: int = 0,
        group: str = "0::/",
        inode: int = 77,
        descriptor: str = "socket:[77]",
    ) -> None:
        """A process with a tier of each of these sizes, one after the other in one mapping, `pages` bytes in memory."""
        start = 0x7F0000000000
        places = [(start + sum(sizes[:at]), size) for at, size in enumerate(sizes)]
        with (self.root / "proc/net/unix").open("a") as names:
            for address, size in places:
                claim = f"@{claims.NAME}/{process}/5/{inode}/{address}/{size}"
                names.write(f"00000000dc58f9c3: 00000002 00000000 00000000 0001 01 {inode} {claim}\n")
        mapping = f"{start:x}-{start + sum(sizes):x} rw-p 00000000 00:00 0\nSize: 1 kB\nRss: {pages // 1024} kB\n"
        other = "{:x}-{:x} rw-p 00000000 00:00 0\nSize: 9999999 kB\nRss: 9999999 kB\n"
        around = other.format(0x1000, 0x2000), other.format(0x7FFF00000000, 0x7FFFFF000000)
        self.write(f"proc/{process}/smaps", around[0] + mapping + around[1])
        self.write(f"proc/{process}/comm", f"engine-{process}")
        self.write(f"proc/{process}/cgroup", group)
        (self.root / f"proc/{process}/fd").mkdir()
        (self.root / f"proc/{process}/fd/5").symlink_to(descriptor)

    def available(self) -> list[tuple[str, int]]:
        return [(limit, available) for limit, available, _ in system.available_memory()]

    def groups(self) -> list[int]:
        return [available for limit, available in self.available() if limit == "the memory cgroup"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """All that `memory` sees, other tiers included."""
    monkeypatch.setattr(system, "ROOT", tmp_path)
    return Machine(tmp_path)


UNLIMITED_V1 = 9223372036854771712


def test_without_cgroups_the_machine_is_the_limit(machine: Machine):
    assert machine.available() == [("the machine", 64 << 30)]


def test_a_version_2_cgroup_leaves_its_limit_less_its_use(machine: Machine):
    machine.in_group("0::/app")
    machine.group_v2("app", limit=1000 * MIB, usage=300 * MIB)
    assert machine.available() == [("the machine", 64 << 30), ("the memory cgroup", 700 * MIB)]


def test_a_version_1_cgroup_leaves_its_limit_less_its_use(machine: Machine):
    machine.in_group("7:pids:/other", "4:cpu,memory:/app", "0::/")
    machine.group_v1("app", limit=1000 * MIB, usage=300 * MIB)
    assert machine.groups() == [700 * MIB]


def test_inactive_file_cache_is_not_in_use(machine: Machine):
    machine.in_group("4:memory:/app", "0::/app")
    machine.group_v1("app", limit=1000 * MIB, usage=300 * MIB, inactive=100 * MIB)
    machine.group_v2("app", limit=1000 * MIB, usage=300 * MIB, inactive=200 * MIB)
    assert sorted(machine.groups()) == [800 * MIB, 900 * MIB]


def test_every_parent_of_a_version_2_cgroup_counts(machine: Machine):
    machine.in_group("0::/pod/container/worker")
    machine.group_v2("pod/container/worker", "max", usage=1 * MIB)
    machine.group_v2("pod/container", limit=900 * MIB, usage=100 * MIB)
    machine.group_v2("pod", limit=500 * MIB, usage=200 * MIB)
    assert machine.groups() == [800 * MIB, 300 * MIB]


def test_every_parent_of_a_version_1_cgroup_counts_and_the_mount_itself(machine: Machine):
    machine.in_group("4:memory:/pod/container")
    machine.group_v1("pod/container", UNLIMITED_V1, usage=0)
    machine.group_v1("pod", limit=500 * MIB, usage=200 * MIB)
    machine.group_v1("", limit=400 * MIB, usage=300 * MIB)
    assert machine.groups() == [UNLIMITED_V1, 300 * MIB, 100 * MIB]


@pytest.mark.parametrize("path", ["/docker/0123", "/../outside", "/"])
def test_a_container_sees_its_own_group_at_the_mount(machine: Machine, path: str):
    """/proc/self/cgroup may name a path of the host, which is not there."""
    machine.in_group(f"4:memory:{path}", f"0::{path}")
    machine.group_v1("", limit=600 * MIB, usage=100 * MIB)
    machine.group_v2("", limit=500 * MIB, usage=100 * MIB)
    assert set(machine.groups()) == {400 * MIB, 500 * MIB}


def test_a_cgroup_without_a_limit_leaves_everything(machine: Machine):
    machine.in_group("0::/app")
    machine.group_v2("app", "max", usage=300 * MIB)
    assert machine.groups() == []


def test_a_cgroup_over_its_limit_leaves_nothing(machine: Machine):
    machine.in_group("0::/app")
    machine.group_v2("app", limit=100 * MIB, usage=300 * MIB)
    assert machine.groups() == [0]


def test_cgroups_of_other_controllers_do_not_count(machine: Machine):
    machine.in_group("3:cpuset:/app", "2:memory_not:/app", "1:name=systemd:/app")
    machine.group_v1("app", limit=1 * MIB, usage=0)
    machine.group_v2("app", limit=1 * MIB, usage=0)
    assert machine.groups() == []


def test_more_than_the_machine_has_is_refused_with_both_numbers(machine: Machine):
    refuse_if_unavailable(64 << 30)
    with pytest.raises(MemoryError) as error:
        refuse_if_unavailable((64 << 30) + 1)
    assert str(error.value) == (
        "the tier asks for 64.0 GiB (68719476737 bytes), but the machine has 64.0 GiB (68719476736 bytes) available; "
        "set bytes_to_use to less"
    )


@pytest.mark.parametrize("version", [1, 2])
def test_more_than_the_cgroup_has_is_refused_with_both_numbers(machine: Machine, version: int):
    """The parent's limit is the one that binds."""
    machine.in_group("4:memory:/pod/app" if version == 1 else "0::/pod/app")
    make_group = machine.group_v1 if version == 1 else machine.group_v2
    make_group("pod/app", limit=10_000 * MIB, usage=0)
    make_group("pod", limit=1000 * MIB, usage=500 * MIB, inactive=12 * MIB)
    refuse_if_unavailable(512 * MIB)
    with pytest.raises(MemoryError) as error:
        refuse_if_unavailable(1024 * MIB)
    assert str(error.value) == (
        "the tier asks for 1.0 GiB (1073741824 bytes), but the memory cgroup has 512.0 MiB (536870912 bytes) "
        "available; set bytes_to_use to less"
    )


def test_an_arena_larger_than_any_machine_is_refused_in_words():
    with pytest.raises(MemoryError, match=r"the tier asks for 1024.0 TiB \(1125899906842624 bytes\), but the .* has"):
        Arena(1 << 20, 1 << 30)


def test_what_the_system_refuses_is_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    """More than the address space, on a machine that does not say how much memory it has."""
    monkeypatch.setattr(system, "available_memory", lambda: iter(()))
    with pytest.raises(MemoryError, match=r"the system refuses the tier .* \(1152921504606846976 bytes\)"):
        Arena(1 << 30, 1 << 30)


def test_an_arena_asks_for_exactly_its_rows(machine: Machine):
    machine.in_group("0::/app")
    machine.group_v2("app", limit=5000, usage=0)
    Arena(5, 1000).close()
    with pytest.raises(MemoryError, match=r"\(5005 bytes\)"):
        Arena(5, 1001)


# ------------------------------------------------------------------------------------------ what other tiers were given


def test_what_other_tiers_were_given_is_not_available_and_the_refusal_says_who_has_it(machine: Machine):
    machine.tier(11, 40 << 30)
    machine.tier(12, 10 << 30, inode=78, descriptor="socket:[78]")
    refuse_if_unavailable(14 << 30)
    with pytest.raises(MemoryError) as error:
        refuse_if_unavailable((14 << 30) + 1)
    assert str(error.value) == (
        "the tier asks for 14.0 GiB (15032385537 bytes), but the machine has 64.0 GiB (68719476736 bytes) available, "
        "of which 50.0 GiB (53687091200 bytes) are promised to tiers that do not use it yet; process 11 (engine-11) "
        "has 40.0 GiB for its tiers; process 12 (engine-12) has 10.0 GiB for its tiers; set bytes_to_use to less"
    )


def test_what_has_pages_already_counts_once(machine: Machine):
    machine.tier(11, 40 << 30, pages=30 << 30)
    refuse_if_unavailable(54 << 30)
    with pytest.raises(MemoryError, match=r"of which 10\.0 GiB .* process 11 \(engine-11\) has 40\.0 GiB"):
        refuse_if_unavailable((54 << 30) + 1)


def test_tiers_that_are_in_memory_are_told_of_as_well(machine: Machine):
    machine.tier(11, 40 << 30, pages=40 << 30)
    refuse_if_unavailable(64 << 30)
    with pytest.raises(MemoryError, match=r"\(68719476736 bytes\) available; process 11 \(engine-11\) has 40\.0 GiB"):
        refuse_if_unavailable((64 << 30) + 1)


def test_pages_beyond_a_claim_are_nobodys_loss(machine: Machine):
    """A huge page may reach beyond the end."""
    machine.tier(11, 5 << 30, pages=(5 << 30) + 4096)
    refuse_if_unavailable(64 << 30)


def test_tiers_of_one_process_may_lie_in_one_mapping(machine: Machine):
    machine.tier(11, 10 << 30, 20 << 30, pages=4 << 30)
    refuse_if_unavailable(38 << 30)
    with pytest.raises(MemoryError, match=r"of which 26\.0 GiB .* process 11 \(engine-11\) has 30\.0 GiB"):
        refuse_if_unavailable((38 << 30) + 1)


@pytest.mark.parametrize("instead", ["socket:[78]", "/dev/null", "pipe:[77]"])
def test_a_claim_that_its_process_does_not_hold_is_none(machine: Machine, instead: str):
    """It has closed it, and a forked child still has it open; or the number is another process's by now."""
    machine.tier(11, 64 << 30, descriptor=instead)
    refuse_if_unavailable(64 << 30)


def test_a_claim_of_a_process_that_is_not_to_be_seen_is_none(machine: Machine):
    machine.tier(11, 64 << 30)
    for file in ("smaps", "comm"):
        (machine.root / f"proc/11/{file}").unlink()
        refuse_if_unavailable(64 << 30)
    (machine.root / "proc/11/fd/5").unlink()
    refuse_if_unavailable(64 << 30)


@pytest.mark.parametrize("name", ["@async-tier/x", "@someone/11/5/77/1/1", "/run/async-tier/11/5/77/1/1", "\udcff"])
def test_names_of_other_sockets_are_none_of_ours(machine: Machine, name: str):
    with (machine.root / "proc/net/unix").open("ab") as names:
        names.write(b"0: 00000002 00000000 00000000 0001 01 77 " + os.fsencode(name) + b"\n")
    refuse_if_unavailable(64 << 30)


@pytest.mark.parametrize(
    ("group", "counts"), [("0::/pod/other", True), ("0::/pod/app/inner", True), ("0::/pods", False)]
)
def test_a_cgroups_limit_is_for_the_tiers_in_it(machine: Machine, group: str, counts: bool):
    machine.in_group("0::/pod/app")
    machine.group_v2("pod", limit=1000 * MIB, usage=0)
    machine.tier(11, 900 * MIB, group=group)
    refuse_if_unavailable(100 * MIB)
    with pytest.raises(MemoryError, match="process 11") if counts else contextlib.nullcontext():
        refuse_if_unavailable(101 * MIB)
    with pytest.raises(MemoryError):
        refuse_if_unavailable(1001 * MIB)


def test_pages_that_come_while_it_is_looked_count_at_least_once(monkeypatch: pytest.MonkeyPatch):
    """Of 1000 bytes 600 are another tier's, who gets half of its pages between the two looks."""
    pages = 0

    def holders() -> Iterator[claims.Holder]:
        nonlocal pages
        without, pages = 600 - pages, 300
        yield claims.Holder(11, "engine", 600, without)

    def available() -> Iterator[tuple[str, int, None]]:
        nonlocal pages
        left, pages = 1000 - pages, 300
        yield "the machine", left, None

    monkeypatch.setattr(claims, "find_holders", holders)
    monkeypatch.setattr(system, "available_memory", available)
    with pytest.raises(MemoryError):
        refuse_if_unavailable(500)


# ------------------------------------------------------------------------------------- claims, and what is left of them


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container of 1000 MiB on this machine, in which only tiers of this test are seen. The kernel's own /proc.

    Its usage stays 0: nothing here has pages, but where a test says so.
    """
    folder = tmp_path / "root"
    machine = Machine(folder)
    machine.group_v1("", limit=1000 * MIB, usage=0)
    machine.group_v2("", limit=1000 * MIB, usage=0)
    (folder / "proc").rename(tmp_path / "unused")
    (folder / "proc").symlink_to("/proc")
    monkeypatch.setattr(system, "ROOT", folder)
    monkeypatch.setattr(claims, "NAME", f"async-tier-test-{os.getpid()}")
    return folder


def claimed() -> list[str]:
    return [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if f"@{claims.NAME}/" in line]


def descriptors() -> set[tuple[str, str]]:
    """Those of sockets and of folders."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:") or target == "/proc":
                found.add((name, target))
    return found


def refused() -> str:
    """What a second tier of 600 MiB is told."""
    with pytest.raises(MemoryError) as error:
        Arena(600, MIB)
    return str(error.value)


def test_the_same_bytes_are_not_given_twice(room: Path):
    before = descriptors()
    first = Arena(600, MIB)
    message = refused()
    assert "has 1000.0 MiB (1048576000 bytes) available, of which 600.0 MiB (629145600 bytes) are promised" in message
    name = Path("/proc/self/comm").read_text().strip()
    assert message.endswith(f"; process {os.getpid()} ({name}) has 600.0 MiB for its tiers; set bytes_to_use to less")
    second = Arena(400, MIB)
    second.close()
    first.close()
    assert not claimed()
    Arena(1000, MIB).close()
    assert descriptors() == before


def test_an_arena_nobody_closes_ends_its_claim(room: Path):
    arena = Arena(600, MIB)
    assert len(claimed()) == 1
    del arena
    gc.collect()
    assert not claimed()


def test_memory_that_is_kept_for_ever_stays_claimed(room: Path):
    before = descriptors()
    arena = Arena(600, MIB)
    ((claim, _),), address = descriptors() - before, arena.rows.address
    arena.abandon_memory()
    arena.close()
    del arena
    gc.collect()
    assert "process" in refused()
    os.close(int(claim))
    ctypes.CDLL(None).munmap(ctypes.c_void_p(address), ctypes.c_size_t(600 * MIB))


def test_an_arena_has_all_its_pages_when_it_was_populated(room: Path):
    def without_pages() -> list[int]:
        return [holder.without_pages for holder in claims.find_holders()]

    first, second = Arena(7, 300_007), Arena(3, 2 * MIB)
    sizes = 7 * 300_007, 6 * MIB
    assert without_pages() == [sum(sizes)]
    _native.populate(second.rows.address, sizes[1])
    assert without_pages() == [sizes[0]]
    _native.populate(first.rows.address, sizes[0])
    assert without_pages() == [0]
    first.close()
    second.close()


def test_a_forked_child_keeps_no_claim_alive(room: Path):
    """It has the descriptor, and may live for long."""
    arena = Arena(600, MIB)
    go, gone = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(gone)
        arena.close()  # in a child does nothing
        os.read(go, 1)
        os._exit(0)
    assert len(claimed()) == 1
    assert "promised" in refused()
    arena.close()
    again = Arena(600, MIB)  # at the same place, perhaps
    again.close()
    os.close(gone)
    os.waitpid(child, 0)
    os.close(go)


def test_a_mapping_that_the_system_refuses_is_not_claimed(room: Path, monkeypatch: pytest.MonkeyPatch):
    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(host, "refuse_if_unavailable", lambda size: None)
        with pytest.raises(MemoryError, match="the system refuses"):
            Arena(1 << 20, 1 << 30)
    assert not claimed()
    assert descriptors() == before
    Arena(600, MIB).close()


def test_without_sockets_there_are_a_warning_and_a_tier(room: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(claims.socket, "socket", refuse)
    Arena(600, MIB).close()
    assert caplog.messages == [
        "Other tiers may be given the memory of this one until it is in use: [Errno 1] Operation not permitted"
    ]


def test_a_store_whose_memory_cannot_be_populated_leaves_nothing(room: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: HostEngine, rows: Rows) -> None:
        raise RuntimeError("no more jobs")

    monkeypatch.setattr(HostEngine, "populate", refuse)
    before = descriptors()
    primary = np.zeros((4, 4096), np.uint8)
    with pytest.raises(RuntimeError) as error:
        BlockStore(Rows.of_view(memoryview(primary)), TierConfig(bytes_to_use=600 * MIB, engine="host"))
    assert not claimed()  # while the error is there, and with it the frames it came through
    assert descriptors() == before
    del error


class UnmadePolicy(LeastRecentlyUsed):
    def __init__(self, row_of: object, pins: object) -> None:
        raise OSError("no such\nlist")


def test_a_store_whose_policy_cannot_be_made_leaves_nothing_and_says_so(room: Path):
    before = descriptors()
    primary = np.zeros((4, 4096), np.uint8)
    config = TierConfig.parse(
        {"bytes_to_use": "600Mi", "engine": "host", "eviction_policy": "tests.test_memory:UnmadePolicy"}
    )
    with pytest.raises(ValueError, match=r"^eviction_policy must be .*OSError.*not 'tests.*Policy'$") as error:
        BlockStore(Rows.of_view(memoryview(primary)), config)
    assert str(error.value).isprintable()
    assert not claimed()
    assert descriptors() == before


# -------------------------------------------------------------------------------------- several that start at once


def test_threads_that_start_at_once_are_given_each_byte_once(room: Path):
    gate = threading.Barrier(3)
    given: list[Arena] = []
    told: list[str] = []

    def start() -> None:
        gate.wait(PATIENCE_S)
        try:
            given.append(Arena(600, MIB))
        except MemoryError as error:
            told.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given) == 1
    assert len(told) == 2
    assert all(f"process {os.getpid()} (" in words for words in told)
    given[0].close()


def waits_for_its_turn(process: int) -> bool:
    return any(f"-> FLOCK  ADVISORY  WRITE {process} " in line for line in Path("/proc/locks").read_text().splitlines())


def test_nobody_looks_while_another_one_takes(room: Path, monkeypatch: pytest.MonkeyPatch):
    inside = 0
    most = 0

    def look(size: int) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        # Until the other one waits: in vain, the second time.
        while len(arenas) == 0 and most < 2 and not waits_for_its_turn(os.getpid()):
            os.sched_yield()
        inside -= 1

    arenas: list[Arena] = []
    monkeypatch.setattr(host, "refuse_if_unavailable", look)
    threads = [threading.Thread(target=lambda: arenas.append(Arena(1, MIB))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    for arena in arenas:
        arena.close()


def test_a_child_that_is_forked_while_one_takes_holds_nobody_up(room: Path, monkeypatch: pytest.MonkeyPatch):
    go, gone = os.pipe()
    children: list[int] = []

    def fork(size: int) -> None:
        children.append(os.fork())
        if children[-1] == 0:
            os.close(gone)
            os.read(go, 1)
            os._exit(0)

    monkeypatch.setattr(host, "refuse_if_unavailable", fork)
    Arena(1, MIB).close()
    monkeypatch.undo()
    folder = os.open("/proc", os.O_RDONLY)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # or somebody else on this machine has it
            assert time.monotonic() < deadline, "the child has it"
            os.sched_yield()
    os.close(folder)
    os.close(gone)
    os.waitpid(children[0], 0)
    os.close(go)


CHILD = """
import sys
from pathlib import Path
from async_tier import machine
from async_tier.memory import claims, host
machine.ROOT, claims.NAME = Path(sys.argv[1]), sys.argv[2]
if sys.argv[3] == "stuck":
    host.refuse_if_unavailable = lambda size: print("inside", flush=True) or sys.stdin.readline()
print("ready", flush=True)
sys.stdin.readline()
try:
    memory_of_mine = host.Arena(600, 1 << 20)
    print("given", flush=True)
except MemoryError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


class Child:
    """A process that asks for 600 MiB when it is told to, and keeps them until it ends."""

    def __init__(self, room: Path, how: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, room, claims.NAME, how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.pid = self.process.pid

    def hears(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE_S)[0], "the process says nothing"
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture
def make_child(room: Path) -> Iterator[Callable[..., Child]]:
    """`Child` that is ready, and killed at the end."""
    made: list[Child] = []

    def make(how: str = "") -> Child:
        made.append(Child(room, how))
        assert made[-1].hears() == "ready"
        return made[-1]

    yield make
    for child in made:
        child.kill()


@pytest.mark.starts_process
def test_processes_that_start_at_once_are_given_each_byte_once_and_a_kill_leaves_nothing(
    make_child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    children = [make_child() for _ in range(3)]
    for child in children:
        child.go()
    answers = {child: child.hears() for child in children}
    (holder,) = (child for child, answer in answers.items() if answer == "given")
    name = Path(f"/proc/{holder.pid}/comm").read_text().strip()
    for child, answer in answers.items():
        if child is not holder:
            assert answer.startswith(
                "the tier asks for 600.0 MiB (629145600 bytes), but the memory cgroup has 1000.0 MiB"
            )
            assert f"; process {holder.pid} ({name}) has 600.0 MiB for its tiers; set bytes_to_use to less" in answer
    assert f"process {holder.pid} (" in refused()
    assert "/dev/shm" not in Path(f"/proc/{holder.pid}/maps").read_text()
    holder.kill()
    assert not claimed()
    Arena(600, MIB).close()
    assert not list(temporary.iterdir())


@pytest.mark.starts_process
def test_one_that_is_killed_while_it_looks_holds_nobody_up(make_child):
    stuck, next_one = make_child("stuck"), make_child()
    stuck.go()
    assert stuck.hears() == "inside"
    next_one.go()
    while not waits_for_its_turn(next_one.pid):
        assert not select.select([next_one.process.stdout], [], [], 0)[0], "it did not wait"
    stuck.kill()
    assert next_one.hears() == "given"
