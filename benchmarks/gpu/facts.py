"""The facts that the CUDA engine and its emulator take from NVIDIA's documentation, each as a question to the device.

The numbers are those of tests/cuda_emulator/README.md, which also says why some are not asked. A fact is a function of
a Bench that returns (whether it is as expected, what was seen).
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.streams.cuda_driver import CudaError, DeviceContext
from async_tier.streams.rows import Rows
from async_tier.text import format_size
from benchmarks.gpu.driver import StreamDriver
from tests.rows import zero_rows

EMULATED = os.environ.get("ASYNC_TIER_CUDA") == "emulated"
ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
# Bytes that a copy under observation moves: a good part of a second on a GPU that others use, too.
VOLUME = 16 * MIB if EMULATED else 1 << 30
COPY_CHUNK = 16 * MIB
# A call that returns within this share of the time its copies take has not waited for them.
ASYNCHRONOUS = 0.2
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 0, 1, 2, 3
INVALID_CONTEXT, INVALID_HANDLE, NOT_FOUND, NOT_READY = 201, 400, 500, 600
ALREADY_REGISTERED, NOT_REGISTERED = 712, 713
_DISABLE_TIMING = 2
_BLOCKING_SYNC = 1  # CU_EVENT_BLOCKING_SYNC
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_HOST_POINTER_OF_REGISTERED = 91  # CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
_CAPTURE_MODES = {"GLOBAL": 0, "THREAD_LOCAL": 1, "RELAXED": 2}  # CUstreamCaptureMode
_REGISTER_FLAGS = {"no flag": 0, "PORTABLE": 1, "DEVICEMAP": 2, "both": 3}
# Calls that may wait for streams that have nothing to do with them.
_MAY_WAIT = {"cuMemHostUnregister", "cuMemFree"}
# Nothing that waits for a gate waits for longer.
GATE_SECONDS = 2.0
# A process that a fact may damage is ended then.
CHILD_SECONDS = 120 if EMULATED else 20
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Bench:
    """A device, a stream, and pinned memory, by the driver alone."""

    def __init__(self) -> None:
        torch.cuda.init()
        self.driver = StreamDriver()
        self.context = DeviceContext(self.driver, torch.cuda.current_device())
        self._library = ctypes.CDLL("libcuda.so.1")

    def ask(self, function: str, *arguments: object) -> int:
        """The code that a driver function returns. Integers are pointers, handles and sizes: 64 bits."""
        converted = [ctypes.c_uint64(each) if isinstance(each, int) else each for each in arguments]
        return int(getattr(self._library, function)(*converted))

    def has(self, function: str) -> bool:
        """Whether the driver exports a function of that name."""
        return hasattr(self._library, function)

    def do(self, function: str, *arguments: object) -> None:
        """`ask`, expecting success."""
        code = self.ask(function, *arguments)
        if code != SUCCESS:
            raise RuntimeError(f"{function} returned {code}")

    @contextmanager
    def pinned(self, size: int) -> Iterator[np.ndarray]:
        """`size` bytes of registered host memory."""
        memory = zero_rows(1, size)[0]
        self.driver.register(memory.ctypes.data, size)
        try:
            yield memory
        finally:
            self.driver.unregister(memory.ctypes.data)

    @contextmanager
    def device(self, size: int) -> Iterator[int]:
        """The address of `size` bytes of device memory."""
        address = self.driver.allocate(size)
        try:
            yield address
        finally:
            self.driver.free(address)

    @contextmanager
    def stream(self) -> Iterator[int]:
        handle = self.driver.create_stream()
        try:
            yield handle
        finally:
            self.synchronize(handle)
            self.driver.destroy_stream(handle)

    @contextmanager
    def gate(self, stream: int, seconds: float = GATE_SECONDS) -> Iterator[threading.Event]:
        """What is queued on the stream from here on waits until the event is set: by the end, or after a time."""
        opened = threading.Event()

        def wait(_: object) -> None:
            opened.wait(seconds)
            opened.set()

        function = _HOST_FUNCTION(wait)
        self.do("cuLaunchHostFunc", stream, function, 0)
        try:
            yield opened
        finally:
            opened.set()
            self.ask("cuStreamSynchronize", stream)  # the function has to be there until it has run

    @contextmanager
    def event(self) -> Iterator[int]:
        event = ctypes.c_void_p()
        self.do("cuEventCreate", ctypes.byref(event), _DISABLE_TIMING)
        try:
            yield event.value or 0
        finally:
            self.ask("cuEventDestroy_v2", event)

    def batch(self, pairs: list[tuple[int, int, int]], stream: int) -> int:
        """The code of a batch of (destination, source, size)."""
        to, of, sizes = (np.array(column, dtype=np.uint64) for column in zip(*pairs, strict=True))
        return _code(lambda: self.driver.copy(to, of, sizes, stream))

    def synchronize(self, stream: int) -> None:
        self.do("cuStreamSynchronize", stream)

    def copy(self, destination: int, source: int, size: int, stream: int) -> None:
        """Queue one copy."""
        self.do("cuMemcpyAsync", destination, source, size, stream)

    def copy_in_chunks(self, destination: int, source: int, size: int, stream: int) -> None:
        """Queue one copy in parts, between which a copy engine may turn to another stream."""
        for at in range(0, size, COPY_CHUNK):
            self.copy(destination + at, source + at, min(COPY_CHUNK, size - at), stream)

    def timed(self, call: Callable[[], None], stream: int) -> tuple[float, float]:
        """(seconds until `call` returned, seconds until the stream was empty)."""
        started = time.perf_counter()
        call()
        returned = time.perf_counter() - started
        self.synchronize(stream)
        return returned, time.perf_counter() - started


_CHILD = """
import json, os, sys
if os.environ.get("ASYNC_TIER_CUDA") == "emulated":
    from tests import cuda_emulator
    cuda_emulator.load()
from benchmarks.gpu import facts as gpu_facts
bench = gpu_facts.Bench()
with bench.context:
    print(json.dumps(getattr(gpu_facts, sys.argv[1]).__wrapped__(bench)))
sys.stdout.flush(); os._exit(0)
"""


def in_child(fact: Callable[[Bench], tuple[bool, str]]) -> Callable[[Bench], tuple[bool, str]]:
    """The fact, asked in a process of its own, which it may damage. It prints what it has seen so far."""

    @functools.wraps(fact)
    def ask(_: Bench) -> tuple[bool, str]:
        command = [sys.executable, "-W", "ignore", "-c", _CHILD, fact.__name__]
        try:
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS)
        except subprocess.TimeoutExpired as late:
            said = late.stdout or b""
            return not EMULATED, f"did not end in {CHILD_SECONDS} s; before: {_one_line(said.decode())}"
        if ran.returncode < 0:
            return not EMULATED, f"ended by signal {-ran.returncode}; before: {_one_line(ran.stdout)}"
        if ran.returncode:
            return False, f"exit status {ran.returncode}; before: {_one_line(ran.stdout)}; {ran.stderr.strip()[-300:]}"
        right, seen = json.loads(ran.stdout.splitlines()[-1])
        return right, seen

    return ask


def small_store(row_bytes: int = 64 << 10) -> tuple[BlockStore, np.ndarray]:
    """A store of a few rows, and its primary."""
    primary = zero_rows(16, row_bytes)
    config = TierConfig.parse({"engine": "cuda", "bytes_to_use": 16 * row_bytes, "staging_bytes": 8 * row_bytes})
    return BlockStore(Rows.of_view(memoryview(primary)), config), primary


def fact_pinned_copies_do_not_wait(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as host, bench.device(VOLUME) as device, bench.stream() as stream:
        bench.timed(lambda: bench.copy(device, host.ctypes.data, VOLUME, stream), stream)
        took = [
            bench.timed(lambda: bench.copy(device, host.ctypes.data, VOLUME, stream), stream),
            bench.timed(lambda: bench.copy(host.ctypes.data, device, VOLUME, stream), stream),
        ]
    shares = [returned / done for returned, done in took]
    return max(shares) < ASYNCHRONOUS or EMULATED, f"returned after {max(shares):.1%} of the copy's time"


def fact_host_to_host_blocks(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as one, bench.pinned(VOLUME) as other, bench.stream() as stream:
        returned, done = bench.timed(lambda: bench.copy(one.ctypes.data, other.ctypes.data, VOLUME, stream), stream)
    return returned > done / 2, f"returned after {returned / done:.1%} of the copy's time"


def fact_batch_refuses_the_legacy_stream(bench: Bench) -> tuple[bool, str]:
    if not bench.driver.has_batch:
        return True, "this driver has no batch call"
    with bench.pinned(MIB) as host, bench.device(MIB) as device:
        half = MIB // 2
        sizes = np.array([half, half], dtype=np.uint64)
        to = np.array([device, device + half], dtype=np.uint64)
        of = np.array([host.ctypes.data, host.ctypes.data + half], dtype=np.uint64)
        code = _code(lambda: bench.driver.copy(to, of, sizes, 0))
    return code == INVALID_VALUE, f"code {code}"


def fact_batch_copies_bytes(bench: Bench) -> tuple[bool, str]:
    if not bench.driver.has_batch:
        return True, "this driver has no batch call"
    count, size = 256, 4096
    with bench.pinned(2 * count * size) as host, bench.device(count * size) as device, bench.stream() as stream:
        host[: count * size] = np.random.default_rng(1).integers(0, 256, count * size, dtype=np.uint8)
        order = np.random.default_rng(2).permutation(count)
        sizes = np.full(count, size, dtype=np.uint64)
        near = (device + order * size).astype(np.uint64)
        bench.driver.copy(near, (host.ctypes.data + np.arange(count) * size).astype(np.uint64), sizes, stream)
        back = (host.ctypes.data + (count + np.arange(count)) * size).astype(np.uint64)
        bench.driver.copy(back, near, sizes, stream)
        bench.synchronize(stream)
        right = np.array_equal(host[: count * size], host[count * size :])
    return right, "the call of version 12080, with failIdx"


def fact_registered_twice(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(4 * MIB) as host:
        again = _code(lambda: bench.driver.register(host.ctypes.data, 4 * MIB))
        part = _code(lambda: bench.driver.register(host.ctypes.data + MIB, MIB))
    return again == part == ALREADY_REGISTERED, f"codes {again} and {part}"


def fact_no_context(bench: Bench) -> tuple[bool, str]:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(_code(lambda: bench.driver.allocate(MIB))))
    thread.start()
    thread.join()
    return codes == [INVALID_CONTEXT], f"code {codes[0]}"


def fact_events_capture_when_recorded(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as host, bench.device(VOLUME) as device, bench.stream() as stream:
        side = torch.cuda.ExternalStream(stream)
        event = torch.cuda.Event()
        event.record(side)
        for _ in range(4):
            bench.copy(device, host.ctypes.data, VOLUME, stream)
        event.synchronize()
        busy = not bench.driver.is_idle(stream)
    return busy or EMULATED, "complete before what was queued after it"


def fact_streams_overlap_and_order_by_events(bench: Bench) -> tuple[bool, str]:
    with (
        bench.pinned(2 * VOLUME) as host,
        bench.device(VOLUME) as device,
        bench.stream() as one,
        bench.stream() as two,
    ):
        host[:VOLUME] = 7
        event = torch.cuda.Event()
        bench.copy_in_chunks(device, host.ctypes.data, VOLUME, one)
        event.record(torch.cuda.ExternalStream(one))
        torch.cuda.ExternalStream(two).wait_event(event)
        bench.copy(host.ctypes.data + VOLUME, device, VOLUME, two)
        bench.synchronize(two)
        right = bool((host[VOLUME:] == 7).all())
    return right, "the second leg read what the first one wrote"


def fact_free_waits(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as host, bench.stream() as stream:
        device = bench.driver.allocate(VOLUME)
        for _ in range(2):
            bench.copy(device, host.ctypes.data, VOLUME, stream)
        bench.driver.free(device)
        idle = bench.driver.is_idle(stream)
    return True, f"cuMemFree {'waited' if idle else 'did not wait'} for the copies; the tier frees only what is idle"


def fact_codes_of_registration(bench: Bench) -> tuple[bool, str]:
    memory = zero_rows(1, MIB)[0]
    codes = {
        "unregister what is not": bench.ask("cuMemHostUnregister", memory.ctypes.data),
        "unregister null": bench.ask("cuMemHostUnregister", 0),
        "register null": bench.ask("cuMemHostRegister_v2", 0, MIB, 1),
    }
    return list(codes.values()) == [NOT_REGISTERED, INVALID_VALUE, INVALID_VALUE], _said(codes)


def fact_codes_of_memory(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(2 * MIB) as host, bench.device(MIB) as device, bench.stream() as stream:
        codes = {
            "a copy beyond the end": bench.ask("cuMemcpyAsync", device, host.ctypes.data, 1 << 40, stream),
            "free of what is no start": bench.ask("cuMemFree_v2", device + 256),
            "too much": _code(lambda: bench.driver.allocate(1 << 50)),
        }
    return list(codes.values()) == [INVALID_VALUE, INVALID_VALUE, OUT_OF_MEMORY], _said(codes)


def fact_batches_of_nothing_are_refused(bench: Bench) -> tuple[bool, str]:
    if not bench.driver.has_batch:
        return True, "this driver has no batch call"
    with bench.pinned(MIB) as host, bench.device(MIB) as device, bench.stream() as stream:
        two = np.array([4096, 0], dtype=np.uint64)
        to = np.array([device, device + 8192], dtype=np.uint64)
        of = np.array([host.ctypes.data, host.ctypes.data + 8192], dtype=np.uint64)
        code = _code(lambda: bench.driver.copy(to, of, two, stream))
    return True, f"an entry of 0 bytes: code {code}; the tier makes none"


def fact_destroyed_streams_finish(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as host, bench.device(VOLUME) as device:
        host[:] = 9
        stream = bench.driver.create_stream()
        bench.copy(device, host.ctypes.data, VOLUME, stream)
        started = time.perf_counter()
        bench.driver.destroy_stream(stream)
        returned = time.perf_counter() - started
        torch.cuda.synchronize()
        host[:] = 0
        with bench.stream() as other:
            bench.copy(host.ctypes.data, device, VOLUME, other)
        right = bool((host == 9).all())
    return right, f"destroying returned after {returned * 1e3:.2f} ms, and the copy was made"


def fact_contexts_are_a_stack(bench: Bench) -> tuple[bool, str]:
    codes: list[int] = []

    def run() -> None:
        popped = ctypes.c_void_p()
        with bench.context:
            with bench.context:
                pass
            codes.append(_code(bench.driver.memory))
        codes.append(_code(bench.driver.memory))
        codes.append(bench.ask("cuCtxPopCurrent_v2", ctypes.byref(popped)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return codes == [
        SUCCESS,
        INVALID_CONTEXT,
        INVALID_CONTEXT,
    ], f"inside {codes[0]}, outside {codes[1]}, empty {codes[2]}"


def fact_nothing_works_in_a_forked_child(bench: Bench) -> tuple[bool, str]:
    child = os.fork()
    if child == 0:
        os._exit(min(bench.ask("cuInit", 0), 200))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code == NOT_INITIALIZED, f"cuInit: code {code}; the tier calls nothing there"


def fact_registered_memory_is_known(bench: Bench) -> tuple[bool, str]:
    pageable = zero_rows(1, MIB)[0]
    with bench.pinned(MIB) as host:
        pinned = bench.driver.is_pinned(host.ctypes.data) and bench.driver.is_pinned(host.ctypes.data + MIB - 1)
    return pinned and not bench.driver.is_pinned(pageable.ctypes.data), "registered: yes; pageable: no"


def fact_both_directions_at_once(bench: Bench) -> tuple[bool, str]:
    with (
        bench.pinned(VOLUME) as up,
        bench.pinned(VOLUME) as down,
        bench.device(2 * VOLUME) as device,
        bench.stream() as one,
        bench.stream() as two,
    ):

        def both() -> None:
            bench.copy_in_chunks(device, up.ctypes.data, VOLUME, one)
            bench.copy_in_chunks(down.ctypes.data, device + VOLUME, VOLUME, two)
            bench.synchronize(one)

        bench.timed(both, two)
        alone = bench.timed(lambda: bench.copy_in_chunks(device, up.ctypes.data, VOLUME, one), one)[1]
        alone += bench.timed(lambda: bench.copy_in_chunks(down.ctypes.data, device + VOLUME, VOLUME, two), two)[1]
        together = bench.timed(both, two)[1]
    return together < 0.9 * alone or EMULATED, f"together {together / alone:.2f} of one after the other"


def fact_events_without_timing_have_no_times(bench: Bench) -> tuple[bool, str]:
    events = [ctypes.c_void_p() for _ in range(2)]
    milliseconds = ctypes.c_float()
    for event in events:
        bench.do("cuEventCreate", ctypes.byref(event), _DISABLE_TIMING)
    code = bench.ask("cuEventElapsedTime_v2", ctypes.byref(milliseconds), events[0], events[1])
    for event in events:
        bench.do("cuEventDestroy_v2", event)
    return code == INVALID_HANDLE, f"code {code}"


def fact_the_default_stream_does_not_wait_for_ours(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as host, bench.device(VOLUME) as device, bench.stream() as stream:
        for _ in range(4):
            bench.copy_in_chunks(device, host.ctypes.data, VOLUME, stream)
        torch.zeros(4, device="cuda").fill_(1)
        torch.cuda.default_stream().synchronize()
        busy = not bench.driver.is_idle(stream)
    return busy or EMULATED, "the default stream was done first" if busy else "our stream was done first"


def fact_pageable_copies(bench: Bench) -> tuple[bool, str]:
    """Each behind a gate: one that returns while it is closed has not waited for the stream."""
    said, is_right = [], True
    for size in (4 << 10, 64 << 10, MIB, 64 * MIB):
        pageable = np.full(size, 7, dtype=np.uint8)
        with bench.pinned(size) as host, bench.device(size) as device, bench.stream() as stream:
            with bench.gate(stream, 0.2) as opened:
                bench.copy(device, pageable.ctypes.data, size, stream)
                up = "waited" if opened.is_set() else "returned"
                pageable[:] = 8
            bench.copy(host.ctypes.data, device, size, stream)
            bench.synchronize(stream)
            read = np.mean(host == 7)
            with bench.gate(stream, 0.2) as opened:
                bench.copy(pageable.ctypes.data, device, size, stream)
                down = "waited" if opened.is_set() else "returned"
                arrived = np.mean(pageable == host)
        is_right &= bool(read == arrived == 1)
        said.append(
            f"{format_size(size)}: to the device {up}, {read:.0%} of the source read by then; "
            f"from the device {down}, {arrived:.0%} arrived by then"
        )
    return is_right, "; ".join(said)


@in_child
def fact_one_page_in_two_registrations(bench: Bench) -> tuple[bool, str]:
    memory = zero_rows(1, 4 * MIB)[0]
    memory[:] = 7
    first, second = memory.ctypes.data, memory.ctypes.data + MIB + 100
    bench.driver.register(first, MIB + 100)
    codes = {"the second registration": bench.ask("cuMemHostRegister_v2", second, MIB, 1)}
    if codes["the second registration"] != SUCCESS:
        return True, _said(codes)
    with bench.device(MIB) as device, bench.pinned(MIB) as back, bench.stream() as stream:
        codes["unregistering the first"] = bench.ask("cuMemHostUnregister", first)
        codes["a copy from the second then"] = bench.ask("cuMemcpyAsync", device, second, MIB, stream)
        codes["the stream"] = bench.ask("cuStreamSynchronize", stream)
        bench.copy(back.ctypes.data, device, MIB, stream)
        bench.synchronize(stream)
        right = bool((back == 7).all())
    codes["unregistering the second"] = bench.ask("cuMemHostUnregister", second)
    return True, f"{_said(codes)}; its bytes are {'right' if right else 'WRONG'}"


@in_child
def fact_copies_across_two_registrations(bench: Bench) -> tuple[bool, str]:
    """(The first 1 MiB and the second one are registered apart, what follows is not.)"""
    memory = zero_rows(1, 4 * MIB)[0]
    address, half = memory.ctypes.data, MIB // 2
    bench.driver.register(address, MIB)
    bench.driver.register(address + MIB, MIB)
    said = []
    with bench.device(2 * MIB) as device, bench.pinned(MIB) as back, bench.stream() as stream:
        for what, at in {"two registrations": half, "one and pageable": 3 * half, "pageable": 6 * half}.items():
            for way in ("up", "down"):
                for kind in ("batch", "copy"):
                    if kind == "batch" and not bench.driver.has_batch:
                        continue
                    memory[:] = np.random.default_rng(at).integers(0, 256, memory.size, dtype=np.uint8)
                    back[:] = memory[at : at + MIB][::-1] if way == "down" else 0
                    expected = memory[at : at + MIB].copy() if way == "up" else back.copy()
                    if way == "down":
                        bench.copy(device, back.ctypes.data, MIB, stream)
                    pair = (device, address + at, MIB) if way == "up" else (address + at, device, MIB)
                    with bench.gate(stream, 0.2) as opened:
                        if kind == "batch":
                            code = bench.batch([pair, (device + MIB, address, 4096)], stream)
                        else:
                            code = bench.ask("cuMemcpyAsync", *pair, stream)
                        waited = " waited" if opened.is_set() else ""
                    later = bench.ask("cuStreamSynchronize", stream)
                    seen = f"{what}, {kind} {way}: {code}{f' then {later}' if later else ''}{waited}"
                    print(seen, flush=True)
                    if code == later == SUCCESS:
                        if way == "up":
                            bench.copy(back.ctypes.data, device, MIB, stream)
                            bench.synchronize(stream)
                        right = np.array_equal(back if way == "up" else memory[at : at + MIB], expected)
                        seen += "" if right else " WRONG BYTES"
                    said.append(seen)
    return True, "; ".join(said)


def fact_versions_of_the_batch_call(bench: Bench) -> tuple[bool, str]:
    version = ctypes.c_int()
    bench.do("cuDriverGetVersion", ctypes.byref(version))
    said, found = [], {}
    for asked in (11000, 12070, 12080, 13000, 99990, "an unknown name"):
        name = b"cuMemcpyBatchAsync" if isinstance(asked, int) else b"cuNoSuchFunction"
        number = asked if isinstance(asked, int) else 12080
        pointer, status = ctypes.c_void_p(), ctypes.c_int(-1)
        code = bench.ask("cuGetProcAddress_v2", name, ctypes.byref(pointer), number, 0, ctypes.byref(status))
        alone = bench.ask("cuGetProcAddress_v2", name, ctypes.byref(ctypes.c_void_p()), number, 0, None)
        found[asked] = pointer.value
        what = "a function" if pointer.value else "null"
        said.append(f"{asked}: code {code}, {what}, status {status.value}, without status code {alone}")
    is_right = not (found[11000] or found[12070] or found["an unknown name"])
    if version.value >= 13000:
        is_right &= None not in (found[12080], found[13000]) and found[12080] != found[13000]
    return is_right, "; ".join(said)


def fact_loads_wait_behind_stores_in_flight(bench: Bench) -> tuple[bool, str]:
    """Both from host to device, on streams of the same and of the highest priority; medians."""
    lowest, highest = ctypes.c_int(), ctypes.c_int()
    bench.do("cuCtxGetStreamPriorityRange", ctypes.byref(lowest), ctypes.byref(highest))
    said = []
    with (
        bench.pinned(VOLUME + MIB) as host,
        bench.device(VOLUME + MIB) as device,
        bench.stream() as stores,
        bench.stream() as default,
    ):
        preferred = ctypes.c_void_p()
        bench.do("cuStreamCreateWithPriority", ctypes.byref(preferred), _NON_BLOCKING, highest.value)
        try:
            for piece in (VOLUME, 4 * MIB):
                for priority, loads in ((lowest.value, default), (highest.value, preferred.value or 0)):
                    waited, whole = [], []
                    for _ in range(3):
                        started = time.perf_counter()
                        for at in range(0, VOLUME, piece):
                            bench.copy(device + at, host.ctypes.data + at, piece, stores)
                        queued = time.perf_counter()
                        bench.copy(device + VOLUME, host.ctypes.data + VOLUME, MIB, loads)
                        bench.synchronize(loads)
                        waited.append(time.perf_counter() - queued)
                        bench.synchronize(stores)
                        whole.append(time.perf_counter() - started)
                    said.append(
                        f"priority {priority} behind {format_size(VOLUME)} in {format_size(piece)}: 1 MiB after "
                        f"{statistics.median(waited) * 1e3:.2f} of {statistics.median(whole) * 1e3:.2f} ms"
                    )
        finally:
            bench.do("cuStreamDestroy_v2", preferred)
    return True, "; ".join(said)


def fact_priorities(bench: Bench) -> tuple[bool, str]:
    lowest, highest = ctypes.c_int(), ctypes.c_int()
    bench.do("cuCtxGetStreamPriorityRange", ctypes.byref(lowest), ctypes.byref(highest))
    return highest.value <= lowest.value, f"lowest {lowest.value}, highest {highest.value}"


@in_child
def fact_calls_in_a_host_function(bench: Bench) -> tuple[bool, str]:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with (
        bench.pinned(MIB) as host,
        bench.device(MIB) as device,
        bench.stream() as stream,
        bench.stream() as other,
        bench.event() as event,
    ):

        def in_our_context() -> int:
            with bench.context:
                return bench.ask("cuEventQuery", event)

        def push() -> int:
            with bench.context:
                return SUCCESS

        calls: dict[str, Callable[[], int]] = {
            "cuEventQuery": lambda: bench.ask("cuEventQuery", event),
            "cuCtxPushCurrent": push,
            "cuEventQuery in a context": in_our_context,
            "cuStreamQuery": lambda: bench.ask("cuStreamQuery", other),
            "cuEventRecord": lambda: bench.ask("cuEventRecord", event, other),
            "cuMemcpyAsync": lambda: bench.ask("cuMemcpyAsync", device, host.ctypes.data, MIB, other),
            "cuMemGetInfo": lambda: bench.ask("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total)),
        }
        codes = {}
        for name, call in calls.items():
            answers: list[int] = []
            function = _HOST_FUNCTION(lambda _, call=call, answers=answers: answers.append(_answer(call)))
            print(name, flush=True)  # it may hang
            bench.do("cuLaunchHostFunc", stream, function, 0)
            bench.synchronize(stream)
            (codes[name],) = answers
    return True, _said(codes)


@in_child
def fact_queries(bench: Bench) -> tuple[bool, str]:
    codes = {}

    def see(what: str, function: str, handle: int) -> None:
        print(what, end=": ", flush=True)  # it may crash
        codes[what] = bench.ask(function, handle)
        print(codes[what], flush=True)

    stream = bench.driver.create_stream()
    with bench.event() as event:
        see("a new event", "cuEventQuery", event)
        see("an idle stream", "cuStreamQuery", stream)
        with bench.gate(stream):
            bench.do("cuEventRecord", event, stream)
            see("an event ahead", "cuEventQuery", event)
            see("a busy stream", "cuStreamQuery", stream)
        see("an event that was passed", "cuEventQuery", event)
    is_right = list(codes.values()) == [SUCCESS, SUCCESS, NOT_READY, NOT_READY, SUCCESS]
    see("a destroyed event", "cuEventQuery", event)
    bench.driver.destroy_stream(stream)
    see("a destroyed stream", "cuStreamQuery", stream)
    return is_right, _said(codes)


def fact_the_runtime_does_not_keep_not_ready(bench: Bench) -> tuple[bool, str]:
    """By the runtime that torch has loaded."""
    mapped = re.findall(r"/\S*/libcudart\S*\.so\S*", Path("/proc/self/maps").read_text())
    if not mapped:
        return True, "no runtime of its own to ask"
    runtime = ctypes.CDLL(mapped[0])
    runtime.cudaGetLastError()
    codes = {}
    with bench.stream() as stream, bench.event() as event, bench.gate(stream):
        bench.do("cuEventRecord", event, stream)
        for function, handle in (("cudaStreamQuery", stream), ("cudaEventQuery", event)):
            code = getattr(runtime, function)(ctypes.c_void_p(handle))
            codes[function] = code, runtime.cudaGetLastError()
    is_right = set(codes.values()) == {(NOT_READY, SUCCESS)}
    return is_right, "; ".join(f"{function}: {code}, last error {last}" for function, (code, last) in codes.items())


def fact_registered_memory_has_one_address(bench: Bench) -> tuple[bool, str]:
    attribute, pointer = ctypes.c_int(), ctypes.c_void_p()
    device = ctypes.c_int(torch.cuda.current_device())
    bench.do("cuDeviceGetAttribute", ctypes.byref(attribute), ctypes.c_int(_HOST_POINTER_OF_REGISTERED), device)
    asked = {
        "memory type": 2,
        "device pointer": 3,
        "host pointer": 4,
        "managed": 8,
        "range start": 11,
        "range size": 12,
    }
    said, values = [], {}
    with bench.pinned(MIB) as host:
        address = host.ctypes.data
        for where, at in {"start": 0, "last byte": MIB - 1, "first byte beyond": MIB}.items():
            for name, number in asked.items():
                value = ctypes.c_uint64()
                code = bench.ask(
                    "cuPointerGetAttribute", ctypes.byref(value), ctypes.c_int(number), ctypes.c_uint64(address + at)
                )
                values[where, name] = value.value
                relative = value.value - address if number in (3, 4, 11) else value.value
                said.append(f"{where}, {name}: {f'code {code}' if code else relative}")
        code = bench.ask("cuMemHostGetDevicePointer_v2", ctypes.byref(pointer), address, 0)
        same = code == SUCCESS and pointer.value == address
    is_host = values["start", "memory type"] == values["last byte", "memory type"] == 1
    seen = f"attribute 91: {attribute.value}, device pointer {'the same' if same else f'another, code {code}'}; "
    return is_host and same == (attribute.value == 1), seen + "; ".join(said)


def _under_capture(bench: Bench, mode: int, call: Callable[[], int]) -> tuple[int, int]:
    """(code of the call while another thread captures on a stream of its own, code of the end of that capture)."""
    began, asked, codes = threading.Event(), threading.Event(), [0, 0]

    def capture(stream: int) -> None:
        graph = ctypes.c_void_p()
        with bench.context:
            codes[0] = bench.ask("cuStreamBeginCapture_v2", stream, mode)
            began.set()
            asked.wait(GATE_SECONDS)
            codes[1] = bench.ask("cuStreamEndCapture", stream, ctypes.byref(graph))
            if graph.value:
                bench.ask("cuGraphDestroy", graph)

    with bench.stream() as stream:
        thread = threading.Thread(target=capture, args=(stream,))
        thread.start()
        began.wait(GATE_SECONDS)
        try:
            code = call()
        finally:
            asked.set()
            thread.join()
    if codes[0] != SUCCESS:
        raise RuntimeError(f"cuStreamBeginCapture returned {codes[0]}")
    return code, codes[1]


@in_child
def fact_calls_while_others_capture(bench: Bench) -> tuple[bool, str]:
    if not bench.has("cuStreamBeginCapture_v2"):
        return True, "this driver captures nothing"
    memory = zero_rows(1, MIB)[0]
    made = ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    said = []
    with (
        bench.pinned(MIB) as host,
        bench.device(MIB) as device,
        bench.stream() as stream,
        bench.event() as event,
    ):
        bench.do("cuEventRecord", event, stream)
        bench.synchronize(stream)
        pairs = [(device, host.ctypes.data, 4096), (device + 8192, host.ctypes.data + 8192, 4096)]
        nothing = _HOST_FUNCTION(lambda _: None)
        calls: dict[str, Callable[[], int]] = {
            "cuMemcpyAsync": lambda: bench.ask("cuMemcpyAsync", device, host.ctypes.data, 4096, stream),
            "cuMemcpyBatchAsync": lambda: bench.batch(pairs, stream),
            "cuLaunchHostFunc": lambda: bench.ask("cuLaunchHostFunc", stream, nothing, 0),
            "cuEventRecord": lambda: bench.ask("cuEventRecord", event, stream),
            "cuStreamWaitEvent": lambda: bench.ask("cuStreamWaitEvent", stream, event, 0),
            "cuEventSynchronize": lambda: bench.ask("cuEventSynchronize", event),
            "cuEventQuery": lambda: bench.ask("cuEventQuery", event),
            "cuStreamSynchronize": lambda: bench.ask("cuStreamSynchronize", stream),
            "cuStreamQuery": lambda: bench.ask("cuStreamQuery", stream),
            "cuMemHostRegister": lambda: bench.ask("cuMemHostRegister_v2", memory.ctypes.data, MIB, 1),
            "cuMemHostUnregister": lambda: bench.ask("cuMemHostUnregister", memory.ctypes.data),
            "cuMemAlloc": lambda: bench.ask("cuMemAlloc_v2", ctypes.byref(made), MIB),
            "cuMemFree": lambda: bench.ask("cuMemFree_v2", made),
            "cuStreamCreate": lambda: bench.ask("cuStreamCreate", ctypes.byref(made), _NON_BLOCKING),
            "cuStreamDestroy": lambda: bench.ask("cuStreamDestroy_v2", made),
            "cuEventCreate": lambda: bench.ask("cuEventCreate", ctypes.byref(made), _DISABLE_TIMING),
            "cuEventDestroy": lambda: bench.ask("cuEventDestroy_v2", made),
            "cuMemGetInfo": lambda: bench.ask("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total)),
            "cuCtxPushCurrent": lambda: _code(bench.context.__enter__),
            "cuCtxPopCurrent": lambda: bench.ask("cuCtxPopCurrent_v2", ctypes.byref(made)),
        }
        for exchanged in (False, True):
            for name, mode in _CAPTURE_MODES.items():
                groups: dict[tuple[int, int], list[str]] = {}
                for function, call in calls.items():
                    ours = ctypes.c_int(_CAPTURE_MODES["RELAXED"])
                    if exchanged:
                        bench.do("cuThreadExchangeStreamCaptureMode", ctypes.byref(ours))
                    try:
                        codes = _under_capture(bench, mode, call)
                    finally:
                        if exchanged:
                            bench.do("cuThreadExchangeStreamCaptureMode", ctypes.byref(ours))
                    if codes[0] != SUCCESS:
                        call()  # now it is allowed: what comes next undoes it
                    groups.setdefault(codes, []).append(function)
                for (code, end), functions in groups.items():
                    what = "all" if len(functions) == len(calls) else ", ".join(functions)
                    said.append(f"{name}{', ours RELAXED' if exchanged else ''}: {code}, end {end}: {what}")
                    print(said[-1], flush=True)
    return True, "; ".join(said)


def _taken(opened: threading.Event, call: Callable[[], None], limit: int) -> str:
    """How many calls are taken before one waits for a gate."""
    for number in range(limit):
        started = time.perf_counter()
        call()
        if opened.is_set():
            waited = time.perf_counter() - started > GATE_SECONDS / 20
            return f"{number}" if waited else f"{number} until the gate opened, none waited"
    return f"{limit}, none waited"


def fact_a_full_launch_queue(bench: Bench) -> tuple[bool, str]:
    limit = 64 if EMULATED else 5000
    said = []
    with (
        bench.pinned(4 * MIB) as host,
        bench.device(4 * MIB) as device,
        bench.stream() as stream,
        bench.stream() as other,
        bench.event() as event,
        bench.event() as ahead,
    ):

        def copy() -> None:
            bench.copy(device, host.ctypes.data, 4096, stream)

        def entries(count: int) -> Callable[[], None]:
            at = np.arange(count, dtype=np.uint64) * np.uint64(8192)
            sizes = np.full(count, 4096, dtype=np.uint64)
            return lambda: bench.driver.copy(at + np.uint64(device), at + np.uint64(host.ctypes.data), sizes, stream)

        calls: dict[str, Callable[[], None]] = {"copies": copy}
        if bench.driver.has_batch:
            calls |= {f"batches of {count}": entries(count) for count in (2, 32, 512)}
        calls["event records"] = lambda: bench.do("cuEventRecord", event, stream)
        for name, call in calls.items():
            with bench.gate(stream) as opened:
                said.append(f"{name}: {_taken(opened, call, limit)}")
        with bench.gate(other) as opened:
            bench.do("cuEventRecord", ahead, other)
            waits = _taken(opened, lambda: bench.do("cuStreamWaitEvent", stream, ahead, 0), limit)
        said.append(f"event waits: {waits}")
        # While one thread waits for room, what do others' calls take?
        took = {}
        with bench.gate(stream) as opened:

            def fill() -> None:
                with bench.context:
                    for _ in range(limit):
                        copy()
                        if opened.is_set():
                            return

            thread = threading.Thread(target=fill)
            thread.start()
            thread.join(GATE_SECONDS / 4)  # long enough to fill it, and no more
            for name, ask in {
                "cuMemcpyAsync": lambda: bench.copy(device + MIB, host.ctypes.data + MIB, 4096, other),
                "cuEventRecord": lambda: bench.do("cuEventRecord", event, other),
                "cuEventQuery": lambda: bench.ask("cuEventQuery", event),
                "cuStreamQuery": lambda: bench.ask("cuStreamQuery", other),
                "cuStreamQuery of the full one": lambda: bench.ask("cuStreamQuery", stream),
            }.items():
                started = time.perf_counter()
                ask()
                took[name] = time.perf_counter() - started
            full = thread.is_alive()
        thread.join()
    beside = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in took.items())
    return True, "; ".join(said) + f"; beside a stream that is {'full' if full else 'not full'}: {beside}"


def fact_calls_beside_a_stream_that_does_not_move(bench: Bench) -> tuple[bool, str]:
    """Which of them wait for it: each has a gate of its own."""
    memory = zero_rows(1, MIB)[0]
    made = ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    said, waited = [], set()
    with (
        bench.pinned(MIB) as host,
        bench.device(MIB) as device,
        bench.stream() as stream,
        bench.stream() as other,
        bench.event() as event,
    ):
        calls: dict[str, Callable[[], int]] = {
            "cuMemHostRegister": lambda: bench.ask("cuMemHostRegister_v2", memory.ctypes.data, MIB, 1),
            "cuMemHostUnregister": lambda: bench.ask("cuMemHostUnregister", memory.ctypes.data),
            "cuMemAlloc": lambda: bench.ask("cuMemAlloc_v2", ctypes.byref(made), MIB),
            "cuMemFree": lambda: bench.ask("cuMemFree_v2", made),
            "cuStreamCreate": lambda: bench.ask("cuStreamCreate", ctypes.byref(made), _NON_BLOCKING),
            "cuStreamDestroy": lambda: bench.ask("cuStreamDestroy_v2", made),
            "cuEventCreate": lambda: bench.ask("cuEventCreate", ctypes.byref(made), _DISABLE_TIMING),
            "cuEventDestroy": lambda: bench.ask("cuEventDestroy_v2", made),
            "cuEventDestroy of one ahead": lambda: bench.ask("cuEventDestroy_v2", made),
            "cuMemGetInfo": lambda: bench.ask("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total)),
            "cuMemcpyAsync on another stream": lambda: bench.ask(
                "cuMemcpyAsync", device, host.ctypes.data, 4096, other
            ),
            "cuEventRecord on another stream": lambda: bench.ask("cuEventRecord", event, other),
            "cuStreamSynchronize of another stream": lambda: bench.ask("cuStreamSynchronize", other),
        }
        for name, call in calls.items():
            with bench.gate(stream, 0.2 if name in _MAY_WAIT else GATE_SECONDS) as opened:
                bench.copy(device + 8192, host.ctypes.data + 8192, 4096, stream)
                if name.endswith("one ahead"):
                    bench.do("cuEventCreate", ctypes.byref(made), _DISABLE_TIMING)
                    bench.do("cuEventRecord", made, stream)
                started = time.perf_counter()
                code = call()
                took = time.perf_counter() - started
                what = "waited" if opened.is_set() else f"{took * 1e6:.0f} us"
                if opened.is_set():
                    waited.add(name)
            said.append(f"{name}: {what}{f', code {code}' if code else ''}")
    return waited <= _MAY_WAIT, "; ".join(said)


def fact_how_soon_an_end_is_seen(bench: Bench) -> tuple[bool, str]:
    """From a submit of 4 KiB to the end of a wait, median; what the waits for a long copy cost a processor."""
    blocking = ctypes.c_void_p()
    said = []
    with (
        bench.pinned(VOLUME) as host,
        bench.device(VOLUME) as device,
        bench.stream() as stream,
        bench.event() as event,
    ):
        bench.do("cuEventCreate", ctypes.byref(blocking), _DISABLE_TIMING | _BLOCKING_SYNC)

        def wait_for(recorded: object) -> Callable[[], None]:
            def wait() -> None:
                bench.do("cuEventRecord", recorded, stream)
                bench.do("cuEventSynchronize", recorded)

            return wait

        def query() -> None:
            bench.do("cuEventRecord", event, stream)
            while bench.ask("cuEventQuery", event) == NOT_READY:
                pass

        called = threading.Event()
        function = _HOST_FUNCTION(lambda _: called.set())

        def be_called() -> None:
            called.clear()
            bench.do("cuLaunchHostFunc", stream, function, 0)
            called.wait(GATE_SECONDS)

        waits: dict[str, Callable[[], None]] = {
            "cuStreamSynchronize": lambda: bench.synchronize(stream),
            "cuEventSynchronize": wait_for(event),
            "cuEventSynchronize, BLOCKING_SYNC": wait_for(blocking),
            "cuEventQuery in a loop": query,
            "a host function": be_called,
        }
        try:
            for name, wait in waits.items():
                took = []
                for _ in range(5 if EMULATED else 200):
                    started = time.perf_counter()
                    bench.copy(device, host.ctypes.data, 4096, stream)
                    wait()
                    took.append(time.perf_counter() - started)
                processor, started = time.process_time(), time.perf_counter()
                for _ in range(4):
                    bench.copy(device, host.ctypes.data, VOLUME, stream)
                wait()
                processor, whole = time.process_time() - processor, time.perf_counter() - started
                said.append(f"{name} {statistics.median(took) * 1e6:.0f} us, {processor / whole:.0%} of a processor")
        finally:
            bench.synchronize(stream)
            bench.do("cuEventDestroy_v2", blocking)
    return True, "; ".join(said)


def fact_kinds_of_memory_are_registered(bench: Bench) -> tuple[bool, str]:
    size, said, is_right = 16 * MIB, [], True
    anonymous = {"MAP_SHARED": mmap.MAP_SHARED, "MAP_PRIVATE": mmap.MAP_PRIVATE}
    for kind in (*anonymous, "/dev/shm"):
        for populated in (False, True):
            for name, flags in _REGISTER_FLAGS.items():
                with tempfile.TemporaryFile(dir="/dev/shm") as file:
                    file.truncate(size)
                    pages = (
                        mmap.mmap(-1, size, anonymous[kind] | mmap.MAP_ANONYMOUS)
                        if kind in anonymous
                        else mmap.mmap(file.fileno(), size)
                    )
                memory = np.frombuffer(pages, dtype=np.uint8)
                if populated:
                    memory[:: mmap.PAGESIZE] = 1
                started = time.perf_counter()
                code = bench.ask("cuMemHostRegister_v2", memory.ctypes.data, size, flags)
                took = time.perf_counter() - started
                if code == SUCCESS:
                    bench.do("cuMemHostUnregister", memory.ctypes.data)
                is_right &= code == SUCCESS
                del memory
                pages.close()
                what = f"{kind}{' written' if populated else ''}, {name}"
                said.append(f"{what}: {f'code {code}' if code else f'{took * 1e3:.2f} ms'}")
    return is_right, f"{format_size(size)} of " + "; ".join(said)


_LOST = """
import os, sys
if os.environ.get("ASYNC_TIER_CUDA") == "emulated":
    from tests import cuda_emulator
    emulator = cuda_emulator.load()
import torch
from benchmarks.gpu.driver import StreamDriver
from benchmarks.gpu.facts import small_store
from async_tier.streams.cuda_driver import CudaError
store, primary = small_store()
store.submit_store(1, [b"a"], [0]); store.drain(); assert [end.success for end in store.poll()] == [True]
if os.environ.get("ASYNC_TIER_CUDA") == "emulated":
    emulator.inject("exec_h2d", 1, 700, asynchronous=True)
    pinned = torch.zeros(4).pin_memory()  # kept: freed once the copy has failed, it would end the process
    try:
        pinned.to("cuda", non_blocking=True); torch.cuda.synchronize()
    except RuntimeError:
        pass
else:
    try:  # an index out of range: a device-side assertion, which the context does not survive
        torch.zeros(4, device="cuda")[torch.tensor([1 << 40], device="cuda")]; torch.cuda.synchronize()
    except RuntimeError:
        pass
with store.engine.context:
    try:
        StreamDriver().is_idle(store.engine.load_stream.handles[0]); print("cuStreamQuery says nothing")
    except CudaError as error:
        print("cuStreamQuery says", error.code)
store.submit_load(2, [b"a"], [1]); store.drain()
assert [end.success for end in store.poll()] == [False], "the job was not reported as failed"
assert not store.lookup(b"a")
store.close()
assert store.statistics().faults == 1
print("alive")
sys.stdout.flush(); os._exit(0)
"""


def fact_the_process_survives_a_lost_context(bench: Bench) -> tuple[bool, str]:
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", _LOST], cwd=ROOT, capture_output=True, text=True)
    said = ran.stdout.strip().splitlines()
    alive = ran.returncode == 0 and said[-1:] == ["alive"]
    return alive, "; ".join(said) if alive else f"exit status {ran.returncode}: {ran.stderr.strip()[-300:]}"


def _code(call: Callable[[], object]) -> int:
    """The driver's code for a call: 0 if it was taken."""
    try:
        call()
    except CudaError as error:
        return error.code
    return SUCCESS


def _answer(call: Callable[[], int]) -> int:
    """The driver's code for a call that may also raise it."""
    try:
        return call()
    except CudaError as error:
        return error.code


def _one_line(said: str) -> str:
    return "; ".join(said.strip().splitlines())


def _said(codes: dict[str, int]) -> str:
    return ", ".join(f"{what}: {code}" for what, code in codes.items())


FACTS: dict[str, tuple[str, Callable[[Bench], tuple[bool, str]]]] = {
    "F0": ("pinned copies do not wait", fact_pinned_copies_do_not_wait),
    "F1-3": ("a lost context answers with its error, and the process lives", fact_the_process_survives_a_lost_context),
    "F2": ("queries of streams and events", fact_queries),
    "F5": ("a page in two registrations", fact_one_page_in_two_registrations),
    "F6": ("what is registered cannot be registered again", fact_registered_twice),
    "F7-8": ("codes of registration", fact_codes_of_registration),
    "F9-10": ("codes of memory", fact_codes_of_memory),
    "F11": ("freeing waits for copies", fact_free_waits),
    "F12": ("host to host blocks", fact_host_to_host_blocks),
    "F13-14": ("copies of pageable memory, behind a gate", fact_pageable_copies),
    "F15": ("a batch refuses the legacy default stream", fact_batch_refuses_the_legacy_stream),
    "F16": ("a batch refuses an entry of no bytes", fact_batches_of_nothing_are_refused),
    "F18": ("legs joined by an event read in order", fact_streams_overlap_and_order_by_events),
    "F20": ("versions of the batch call", fact_versions_of_the_batch_call),
    "F20-21": ("the batch call of version 12080", fact_batch_copies_bytes),
    "F22": ("a load behind stores in flight", fact_loads_wait_behind_stores_in_flight),
    "F23": ("both directions at once", fact_both_directions_at_once),
    "F24": ("events capture when they are recorded", fact_events_capture_when_recorded),
    "F25": ("a destroyed stream finishes", fact_destroyed_streams_finish),
    "F26": ("a thread without a context is refused", fact_no_context),
    "F27": ("contexts are a stack", fact_contexts_are_a_stack),
    "F28": ("calls in a host function", fact_calls_in_a_host_function),
    "F29": ("nothing works in a forked child", fact_nothing_works_in_a_forked_child),
    "F30-31": ("registered memory is known as such", fact_registered_memory_is_known),
    "F31": ("registered memory has one address", fact_registered_memory_has_one_address),
    "F33": ("the default stream does not wait for ours", fact_the_default_stream_does_not_wait_for_ours),
    "F34": ("events without timing have no times", fact_events_without_timing_have_no_times),
    "F35": ("queries leave nothing in the runtime", fact_the_runtime_does_not_keep_not_ready),
    "F37": ("copies across two registrations", fact_copies_across_two_registrations),
    "F38": ("calls while others capture", fact_calls_while_others_capture),
    "F39": ("what a stream's launch queue takes", fact_a_full_launch_queue),
    "F40": ("kinds of memory are registered", fact_kinds_of_memory_are_registered),
    "F41": ("priorities", fact_priorities),
    "F42": ("calls beside a stream that does not move", fact_calls_beside_a_stream_that_does_not_move),
    "F43": ("how soon an end is seen", fact_how_soon_an_end_is_seen),
}
