"""Facts about copies, streams and events."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from async_tier.text import format_size
from benchmarks.gpu import EMULATED
from benchmarks.gpu.asking import Facts, Seen, needs_batch
from benchmarks.gpu.device import (
    BLOCKING_SYNC,
    DISABLE_TIMING,
    GATE_SECONDS,
    HOST_FUNCTION,
    INVALID_HANDLE,
    INVALID_VALUE,
    MIB,
    NON_BLOCKING,
    NOT_READY,
    SHORT_GATE_SECONDS,
    SUCCESS,
    VOLUME,
    Bench,
    Rig,
    scattered,
)
from tests.rows import zero_rows

FACTS = Facts()
fact = FACTS.note

# A call that returns within this share of the time its copies take has not waited for them.
ASYNCHRONOUS = 0.2


@fact("F0", "pinned copies do not wait")
def pinned_copies_do_not_wait(bench: Bench) -> Seen:
    with bench.rig(VOLUME) as rig:
        up, down = (rig.device, rig.at, VOLUME, rig.stream), (rig.at, rig.device, VOLUME, rig.stream)
        _, *took = [bench.timed(lambda way=way: bench.copy(*way), rig.stream) for way in (up, up, down)]
    share = max(returned / done for returned, done in took)
    return share < ASYNCHRONOUS or EMULATED, f"returned after {share:.1%} of the copy's time"


@fact("F12", "host to host blocks")
def host_to_host_blocks(bench: Bench) -> Seen:
    with bench.rig(VOLUME) as rig, bench.pinned(VOLUME) as other:
        copy = (other.ctypes.data, rig.at, VOLUME, rig.stream)
        returned, done = bench.timed(lambda: bench.copy(*copy), rig.stream)
    return returned > done / 2, f"returned after {returned / done:.1%} of the copy's time"


@fact("F13-14", "copies of pageable memory, behind a gate")
def pageable_copies(bench: Bench) -> Seen:
    """One that returns while the gate is closed has not waited for the stream."""
    said, is_right = [], True
    for size in (4 << 10, 64 << 10, MIB, 64 * MIB):
        pageable = np.full(size, 7, dtype=np.uint8)
        with bench.rig(size) as rig:
            with bench.gate(rig.stream, SHORT_GATE_SECONDS) as opened:
                bench.copy(rig.device, pageable.ctypes.data, size, rig.stream)
                up = "waited" if opened.is_set() else "returned"
                pageable[:] = 8
            bench.copy(rig.at, rig.device, size, rig.stream)
            bench.synchronize(rig.stream)
            read = np.mean(rig.host == 7)
            with bench.gate(rig.stream, SHORT_GATE_SECONDS) as opened:
                bench.copy(pageable.ctypes.data, rig.device, size, rig.stream)
                down = "waited" if opened.is_set() else "returned"
                arrived = np.mean(pageable == rig.host)
        is_right &= bool(read == arrived == 1)
        said.append(
            f"{format_size(size)}: to the device {up}, {read:.0%} of the source read by then; "
            f"from the device {down}, {arrived:.0%} arrived by then"
        )
    return is_right, "; ".join(said)


@fact("F15", "a batch refuses the legacy default stream")
@needs_batch
def batch_refuses_the_legacy_stream(bench: Bench) -> Seen:
    with bench.rig() as rig:
        code = bench.batch(scattered(rig.device, rig.at, 2), 0)
    return code == INVALID_VALUE, f"code {code}"


@fact("F16", "a batch refuses an entry of no bytes")
@needs_batch
def batches_of_nothing_are_refused(bench: Bench) -> Seen:
    with bench.rig() as rig:
        code = bench.batch([(rig.device, rig.at, 4096), (rig.device + 8192, rig.at + 8192, 0)], rig.stream)
    return True, f"an entry of 0 bytes: code {code}; the tier makes none"


@fact("F18", "legs joined by an event read in order")
def streams_overlap_and_order_by_events(bench: Bench) -> Seen:
    with bench.rig(2 * VOLUME) as rig:
        rig.host[:VOLUME] = 7
        bench.copy_in_chunks(rig.device, rig.at, VOLUME, rig.stream)
        bench.do("cuEventRecord", rig.event, rig.stream)
        bench.do("cuStreamWaitEvent", rig.other, rig.event, 0)
        bench.copy(rig.at + VOLUME, rig.device, VOLUME, rig.other)
        bench.synchronize(rig.other)
        right = bool((rig.host[VOLUME:] == 7).all())
    return right, "the second leg read what the first one wrote"


@fact("F20-21", "the batch call of version 12080")
@needs_batch
def batch_copies_bytes(bench: Bench) -> Seen:
    count, size = 256, 4096
    half = count * size
    with bench.rig(2 * half) as rig:
        rig.host[:half] = np.random.default_rng(1).integers(0, 256, half, dtype=np.uint8)
        near = (rig.device + np.random.default_rng(2).permutation(count) * size).tolist()
        there = [(to, rig.at + at * size, size) for at, to in enumerate(near)]
        back = [(rig.at + half + at * size, of, size) for at, of in enumerate(near)]
        codes = bench.batch(there, rig.stream), bench.batch(back, rig.stream)
        bench.synchronize(rig.stream)
        right = codes == (SUCCESS, SUCCESS) and np.array_equal(rig.host[:half], rig.host[half:])
    return right, "the call of version 12080, with failIdx"


@fact("F22", "a load behind stores in flight")
def loads_wait_behind_stores_in_flight(bench: Bench) -> Seen:
    """Both from host to device, on streams of the same and of the highest priority; medians."""
    lowest, highest = priority_range(bench)
    said = []
    preferred = ctypes.c_void_p()
    with bench.rig(VOLUME + MIB) as rig:
        bench.do("cuStreamCreateWithPriority", ctypes.byref(preferred), NON_BLOCKING, highest)
        for piece in (VOLUME, 4 * MIB):
            for priority, loads in ((lowest, rig.other), (highest, preferred.value or 0)):
                waited, whole = [], []
                for _ in range(3):
                    started = time.perf_counter()
                    for at in range(0, VOLUME, piece):
                        bench.copy(rig.device + at, rig.at + at, piece, rig.stream)
                    queued = time.perf_counter()
                    bench.copy(rig.device + VOLUME, rig.at + VOLUME, MIB, loads)
                    bench.synchronize(loads)
                    waited.append(time.perf_counter() - queued)
                    bench.synchronize(rig.stream)
                    whole.append(time.perf_counter() - started)
                said.append(
                    f"priority {priority} behind {format_size(VOLUME)} in {format_size(piece)}: 1 MiB after "
                    f"{statistics.median(waited) * 1e3:.2f} of {statistics.median(whole) * 1e3:.2f} ms"
                )
        bench.do("cuStreamDestroy_v2", preferred)
    return True, "; ".join(said)


@fact("F23", "both directions at once")
def both_directions_at_once(bench: Bench) -> Seen:
    with bench.rig(2 * VOLUME) as rig:
        up = (rig.device, rig.at, VOLUME, rig.stream)
        down = (rig.at + VOLUME, rig.device + VOLUME, VOLUME, rig.other)

        def both() -> None:
            for way in (up, down):
                bench.copy_in_chunks(*way)
            bench.synchronize(rig.stream)

        bench.timed(both, rig.other)
        alone = sum(bench.timed(lambda way=way: bench.copy_in_chunks(*way), way[3])[1] for way in (up, down))
        together = bench.timed(both, rig.other)[1]
    return together < 0.9 * alone or EMULATED, f"together {together / alone:.2f} of one after the other"


@fact("F24", "events capture when they are recorded")
def events_capture_when_recorded(bench: Bench) -> Seen:
    with bench.rig(VOLUME) as rig:
        bench.do("cuEventRecord", rig.event, rig.stream)
        for _ in range(4):
            bench.copy(rig.device, rig.at, VOLUME, rig.stream)
        bench.do("cuEventSynchronize", rig.event)
        busy = not bench.is_idle(rig.stream)
    return busy or EMULATED, "complete before what was queued after it"


@fact("F25", "a destroyed stream finishes")
def destroyed_streams_finish(bench: Bench) -> Seen:
    with bench.rig(VOLUME) as rig:
        rig.host[:] = 9
        stream = bench.create_stream()
        bench.copy(rig.device, rig.at, VOLUME, stream)
        started = time.perf_counter()
        bench.do("cuStreamDestroy_v2", stream)
        returned = time.perf_counter() - started
        torch.cuda.synchronize()
        rig.host[:] = 0
        bench.copy(rig.at, rig.device, VOLUME, rig.other)
        bench.synchronize(rig.other)
        right = bool((rig.host == 9).all())
    return right, f"destroying returned after {returned * 1e3:.2f} ms, and the copy was made"


@fact("F33", "the default stream does not wait for ours")
def the_default_stream_does_not_wait_for_ours(bench: Bench) -> Seen:
    with bench.rig(VOLUME) as rig:
        for _ in range(4):
            bench.copy_in_chunks(rig.device, rig.at, VOLUME, rig.stream)
        torch.zeros(4, device="cuda").fill_(1)
        torch.cuda.default_stream().synchronize()
        busy = not bench.is_idle(rig.stream)
    return busy or EMULATED, f"{'the default' if busy else 'our'} stream was done first"


@fact("F34", "events without timing have no times")
def events_without_timing_have_no_times(bench: Bench) -> Seen:
    with bench.event() as one, bench.event() as other:
        code = bench.ask("cuEventElapsedTime_v2", ctypes.byref(ctypes.c_float()), one, other)
    return code == INVALID_HANDLE, f"code {code}"


@fact("F37", "copies across two registrations", in_child=True)
def copies_across_two_registrations(bench: Bench) -> Seen:
    """The first 1 MiB and the second one are registered apart, what follows is not."""
    memory = zero_rows(1, 4 * MIB)[0]
    for at in (0, MIB):
        bench.driver.register(memory.ctypes.data + at, MIB)
    said, half = [], MIB // 2
    with bench.rig(2 * MIB) as rig:
        for what, at in {"two registrations": half, "one and pageable": 3 * half, "pageable": 6 * half}.items():
            for way in ("up", "down"):
                for kind in ("batch", "copy")[not bench.has_batch :]:
                    said.append(f"{what}, {kind} {way}: {_copy_across(bench, rig, memory, at, way, kind)}")
                    print(said[-1], flush=True)
    return True, "; ".join(said)


def _copy_across(bench: Bench, rig: Rig, memory: np.ndarray, at: int, way: str, kind: str) -> str:
    """What comes of a copy between the device and 1 MiB of `memory`, behind a gate."""
    part, back = memory[at : at + MIB], rig.host[:MIB]
    memory[:] = np.random.default_rng(at).integers(0, 256, memory.size, dtype=np.uint8)
    back[:] = part[::-1] if way == "down" else 0
    expected = (part if way == "up" else back).copy()
    if way == "down":
        bench.copy(rig.device, rig.at, MIB, rig.stream)
    pair = (rig.device, part.ctypes.data) if way == "up" else (part.ctypes.data, rig.device)
    with bench.gate(rig.stream, SHORT_GATE_SECONDS) as opened:
        if kind == "batch":
            code = bench.batch([(*pair, MIB), (rig.device + MIB, memory.ctypes.data, 4096)], rig.stream)
        else:
            code = bench.ask("cuMemcpyAsync", *pair, MIB, rig.stream)
        waited = " waited" if opened.is_set() else ""
    later = bench.ask("cuStreamSynchronize", rig.stream)
    seen = f"{code}{f' then {later}' if later else ''}{waited}"
    if code == later == SUCCESS:
        if way == "up":
            bench.copy(rig.at, rig.device, MIB, rig.stream)
            bench.synchronize(rig.stream)
        seen += "" if np.array_equal(back if way == "up" else part, expected) else " WRONG BYTES"
    return seen


@fact("F41", "priorities")
def priorities(bench: Bench) -> Seen:
    lowest, highest = priority_range(bench)
    return highest <= lowest, f"lowest {lowest}, highest {highest}"


def priority_range(bench: Bench) -> tuple[int, int]:
    """(lowest, highest): the highest is the smaller number."""
    lowest, highest = ctypes.c_int(), ctypes.c_int()
    bench.do("cuCtxGetStreamPriorityRange", ctypes.byref(lowest), ctypes.byref(highest))
    return lowest.value, highest.value


@fact("F43", "how soon an end is seen")
def how_soon_an_end_is_seen(bench: Bench) -> Seen:
    """From a submit of 4 KiB to the end of a wait, median; what the waits for a long copy cost a processor."""
    said = []
    with bench.rig(VOLUME) as rig, bench.event(DISABLE_TIMING | BLOCKING_SYNC) as blocking:
        called = threading.Event()
        function = HOST_FUNCTION(lambda _: called.set())

        def wait_for(event: int) -> None:
            bench.do("cuEventRecord", event, rig.stream)
            bench.do("cuEventSynchronize", event)

        def query() -> None:
            bench.do("cuEventRecord", rig.event, rig.stream)
            while bench.ask("cuEventQuery", rig.event) == NOT_READY:
                pass

        def be_called() -> None:
            called.clear()
            bench.do("cuLaunchHostFunc", rig.stream, function, 0)
            called.wait(GATE_SECONDS)

        waits: dict[str, Callable[[], object]] = {
            "cuStreamSynchronize": lambda: bench.synchronize(rig.stream),
            "cuEventSynchronize": lambda: wait_for(rig.event),
            "cuEventSynchronize, BLOCKING_SYNC": lambda: wait_for(blocking),
            "cuEventQuery in a loop": query,
            "a host function": be_called,
        }
        for name, wait in waits.items():
            took = []
            for _ in range(5 if EMULATED else 200):
                started = time.perf_counter()
                bench.copy(rig.device, rig.at, 4096, rig.stream)
                wait()
                took.append(time.perf_counter() - started)
            processor, started = time.process_time(), time.perf_counter()
            for _ in range(4):
                bench.copy(rig.device, rig.at, VOLUME, rig.stream)
            wait()
            processor, whole = time.process_time() - processor, time.perf_counter() - started
            said.append(f"{name} {statistics.median(took) * 1e6:.0f} us, {processor / whole:.0%} of a processor")
        bench.synchronize(rig.stream)
    return True, "; ".join(said)
