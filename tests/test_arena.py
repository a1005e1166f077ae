"""Rows, the arena's memory as the kernel sees it, and the refusal to ask for more than there is."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from async_tier.memory import host
from async_tier.memory.host import Arena
from async_tier.streams import _native
from async_tier.streams.host import HostEngine
from async_tier.streams.rows import Rows

HUGE_PAGE = 2 << 20
MIB = 1 << 20


# --------------------------------------------------------------------------------------------------------------- rows


def test_rows_of_a_two_dimensional_view():
    array = np.zeros((5, 48), np.uint8)
    assert Rows.of_view(memoryview(array)) == Rows(array.ctypes.data, count=5, row_bytes=48, stride=48)


def test_rows_of_a_three_dimensional_view_with_wider_items():
    array = np.zeros((5, 3, 4), np.int32)
    assert Rows.of_view(memoryview(array)) == Rows(array.ctypes.data, count=5, row_bytes=48, stride=48)


def test_rows_of_a_one_dimensional_view_are_its_items():
    array = np.zeros(6, np.uint16)
    assert Rows.of_view(memoryview(array)) == Rows(array.ctypes.data, count=6, row_bytes=2, stride=2)


def test_rows_may_lie_apart():
    array = np.zeros((5, 64), np.uint8)
    assert Rows.of_view(memoryview(array[1::2, 16:48])) == Rows(array.ctypes.data + 80, 2, row_bytes=32, stride=128)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0,), ()])
def test_a_view_without_rows_is_refused(shape: tuple[int, ...]):
    view = memoryview(np.zeros(shape, np.uint8) if shape else np.array(1, np.uint8))
    with pytest.raises(ValueError, match="must hold at least one row, not shape"):
        Rows.of_view(view)


def test_a_read_only_view_is_refused():
    with pytest.raises(ValueError, match="must be writable"):
        Rows.of_view(memoryview(bytes(64)))
    with pytest.raises(ValueError, match="must be writable"):
        Rows.of_view(memoryview(np.zeros((4, 4), np.uint8)).toreadonly())


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 64), np.uint8)[:, ::2],
        np.zeros((4, 3, 64), np.uint8)[:, :, :32],
        np.zeros((4, 4, 64), np.uint8)[:, ::2],
        np.zeros((4, 3, 5), np.uint8).transpose(0, 2, 1),
    ],
)
def test_rows_with_gaps_inside_are_refused(array: np.ndarray):
    with pytest.raises(ValueError, match=r"must be contiguous, not strides \("):
        Rows.of_view(memoryview(array))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 64), np.uint8)[::-1],
        np.lib.stride_tricks.as_strided(np.zeros(128, np.uint8), (4, 32), (16, 1)),
        np.lib.stride_tricks.as_strided(np.zeros(128, np.uint8), (4, 32), (0, 1)),
    ],
)
def test_rows_that_overlap_are_refused(array: np.ndarray):
    with pytest.raises(ValueError, match="must not overlap: stride"):
        Rows.of_view(memoryview(array))


def test_rows_do_not_keep_the_view_from_its_owner():
    memory = mmap.mmap(-1, 4096)
    view = memoryview(memory)
    inner = view.cast("B", (4, 1024))
    rows = Rows.of_view(inner)
    inner.release()
    view.release()
    memory.close()  # BufferError while exported
    assert rows.count == 4


# ------------------------------------------------------------------------------------------------------ arena's memory


@dataclass(frozen=True)
class Mapping:
    """A mapping in /proc/self/smaps."""

    private: bool
    path: str
    rss: int
    flags: frozenset[str]


def mapping_at(address: int) -> Mapping | None:
    """The mapping that holds `address`."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        header, fields = line.split(maxsplit=5), {}
        for field in lines:
            name, _, value = field.partition(":")
            fields[name] = value.strip()
            if name == "VmFlags":
                break
        if start <= address < end:
            return Mapping(
                private=header[1].endswith("p"),
                path=header[5] if len(header) > 5 else "",
                rss=int(fields["Rss"].split()[0]) * 1024,
                flags=frozenset(fields["VmFlags"].split()),
            )
    return None


def bytes_at(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


@pytest.fixture
def make_arena() -> Iterator[Callable[..., Arena]]:
    """`Arena`, closed at the end."""
    made: list[Arena] = []

    def make(count: int, row_bytes: int) -> Arena:
        made.append(Arena(count, row_bytes))
        return made[-1]

    yield make
    for arena in made:
        arena.close()


@pytest.fixture
def engine() -> Iterator[HostEngine]:
    """With one thread."""
    engine = HostEngine(1)
    yield engine
    engine.close()


SIZES = [(1, 1), (3, 100), (1, 4096), (3, 4097), (7, 300_007), (1, HUGE_PAGE), (5, HUGE_PAGE + 1), (3, HUGE_PAGE - 1)]


@pytest.mark.parametrize(("count", "row_bytes"), SIZES)
def test_an_arena_has_the_rows_asked_for_and_all_can_be_written(make_arena, count: int, row_bytes: int):
    rows = make_arena(count, row_bytes).rows
    assert (rows.count, rows.row_bytes, rows.stride) == (count, row_bytes, row_bytes)
    memory = bytes_at(rows.address, count * row_bytes)
    assert not memory.any()
    memory[:] = 7
    for row in range(count):
        assert bytes_at(rows.address + row * rows.stride, row_bytes)[-1] == 7


@pytest.mark.parametrize(("count", "row_bytes"), [size for size in SIZES if size[0] * size[1] >= HUGE_PAGE])
def test_a_large_arena_begins_on_a_huge_page(make_arena, count: int, row_bytes: int):
    assert make_arena(count, row_bytes).rows.address % HUGE_PAGE == 0


def test_a_small_arena_begins_on_a_page(make_arena):
    assert make_arena(3, 100).rows.address % mmap.PAGESIZE == 0


def test_two_arenas_share_nothing(make_arena):
    first, second = (make_arena(2, HUGE_PAGE).rows for _ in range(2))
    bytes_at(first.address, 2 * HUGE_PAGE)[:] = 1
    bytes_at(second.address, 2 * HUGE_PAGE)[:] = 2
    assert (bytes_at(first.address, 2 * HUGE_PAGE) == 1).all()


def test_an_arena_is_private_and_has_no_name(make_arena):
    mapping = mapping_at(make_arena(4, HUGE_PAGE).rows.address)
    assert mapping is not None
    assert mapping.private
    assert mapping.path == ""


@pytest.mark.parametrize("end", ["first byte", "last byte"])
def test_an_arena_stays_out_of_core_dumps_and_children(make_arena, end: str):
    rows = make_arena(4, HUGE_PAGE).rows
    mapping = mapping_at(rows.address + (0 if end == "first byte" else 4 * HUGE_PAGE - 1))
    assert mapping is not None
    assert "dd" in mapping.flags
    assert "dc" in mapping.flags


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_huge_pages_are_advised(make_arena):
    mapping = mapping_at(make_arena(4, HUGE_PAGE).rows.address)
    assert mapping is not None
    assert "hg" in mapping.flags


def test_a_kernel_without_huge_pages_will_do(make_arena, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)  # as good as unknown to this one
    rows = make_arena(4, HUGE_PAGE).rows
    bytes_at(rows.address, 4 * HUGE_PAGE)[:] = 1


def test_memory_that_the_system_refuses_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "refuse_if_unavailable", lambda size: None)
    with pytest.raises(MemoryError, match=r"the system refuses the tier 1024.0 TiB .*Cannot allocate memory"):
        Arena(1 << 20, 1 << 30)


def test_an_arena_nobody_closes_gives_its_memory_back():
    arena = Arena(4, HUGE_PAGE)
    address = arena.rows.address
    del arena
    assert mapping_at(address) is None


def test_a_forked_child_does_not_unmap_what_it_has_at_the_arenas_addresses(make_arena):
    arena = make_arena(4, HUGE_PAGE)
    start, length = arena.rows.address, 4 * HUGE_PAGE
    child = os.fork()
    if child == 0:  # not kept for the child, so the place is free: something else comes to lie there
        fixed = 0x10
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed
        place = ctypes.c_void_p(start), ctypes.c_size_t(length)
        ctypes.CDLL(None).mmap(*place, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, ctypes.c_long(0))
        memory = bytes_at(start, length)
        memory[:] = 7
        arena.close()
        os._exit(0 if memory[-1] == 7 else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---------------------------------------------------------------------------------------------------------- population


def test_an_arena_is_only_reserved_at_first(make_arena):
    mapping = mapping_at(make_arena(16, HUGE_PAGE).rows.address)
    assert mapping is not None
    assert mapping.rss == 0


@pytest.mark.parametrize("whose", ["a copy thread's", "the caller's"])
@pytest.mark.parametrize(("count", "row_bytes"), [(1, 5000), (40, HUGE_PAGE + 4096), (1, 3 * HUGE_PAGE - 1)])
def test_population_backs_all_of_it(make_arena, engine: HostEngine, whose: str, count: int, row_bytes: int):
    rows = make_arena(count, row_bytes).rows
    if whose == "the caller's":
        _native.populate(rows.address, count * row_bytes)
    else:
        engine.populate(rows).synchronize()
    mapping = mapping_at(rows.address)
    assert mapping is not None
    assert mapping.rss >= count * row_bytes


def test_population_leaves_what_is_there(make_arena, engine: HostEngine):
    rows = make_arena(3, HUGE_PAGE).rows
    memory = bytes_at(rows.address, 3 * HUGE_PAGE)
    memory[HUGE_PAGE + 1] = 7
    engine.populate(rows).synchronize()
    assert memory[HUGE_PAGE + 1] == 7
    assert np.count_nonzero(memory) == 1


def test_memory_that_the_kernel_will_not_populate_ends_the_job_all_the_same(engine: HostEngine):
    nowhere = Rows(1 << 40, count=3, row_bytes=HUGE_PAGE, stride=HUGE_PAGE)
    engine.populate(nowhere).synchronize()
    _native.populate(nowhere.address, 3 * HUGE_PAGE)


@pytest.mark.parametrize("address", [0, 1, (1 << 40) + 64])
def test_memory_that_does_not_start_on_a_page_is_not_populated(engine: HostEngine, address: int):
    words = f"memory to populate must start on a page, not at {address}$"
    with pytest.raises(ValueError, match=words):
        engine.populate(Rows(address, count=1, row_bytes=64, stride=64))
    with pytest.raises(ValueError, match=words):
        _native.populate(address, 64)


def test_memory_that_is_kept_for_ever_stays_mapped():
    arena = Arena(4, HUGE_PAGE)
    address = arena.rows.address
    arena.abandon_memory()
    arena.close()
    assert mapping_at(address) is not None
    del arena
    gc.collect()
    assert mapping_at(address) is not None


def test_close_frees_the_memory_and_can_be_called_again():
    arena = Arena(16, HUGE_PAGE)
    arena.close()
    mapping = mapping_at(arena.rows.address)
    assert mapping is None or "dd" not in mapping.flags
    arena.close()
    arena.close()
