"""A device as checks ask it: by the driver alone, of which any function can be called from Python."""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from async_tier.streams.cuda_driver import DeviceContext, Driver
from benchmarks.gpu import EMULATED
from tests.rows import zero_rows

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
# Bytes that a copy under observation moves: a good part of a second on a GPU that others use, too.
VOLUME = 16 * MIB if EMULATED else 1 << 30
COPY_CHUNK = 16 * MIB
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 0, 1, 2, 3
INVALID_CONTEXT, INVALID_HANDLE, NOT_READY = 201, 400, 600
ALREADY_REGISTERED, NOT_REGISTERED = 712, 713
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
DISABLE_TIMING, BLOCKING_SYNC = 2, 1  # CU_EVENT_*
# Nothing that waits for a gate waits for longer.
GATE_SECONDS = 2.0
# Of a gate that shows whether a call waits.
SHORT_GATE_SECONDS = 0.2
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# The version whose cuMemcpyBatchAsync has a `failIdx`.
_BATCH_VERSION = 12080
_ORDER_STREAM = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM

# (destination, source, size) of a copy.
Copy = tuple[int, int, int]


class _BatchAttributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("source_access_order", ctypes.c_uint),
        ("source_location", ctypes.c_int * 2),
        ("destination_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


@dataclass
class Rig:
    """Registered memory of the host, at address `at`, as much on the device, two streams and an event."""

    host: np.ndarray
    at: int
    device: int
    stream: int
    other: int
    event: int


class Bench:
    """A device and its primary context, which has to be current where it is asked."""

    def __init__(self) -> None:
        torch.cuda.init()
        self.driver = Driver()
        self.context = DeviceContext(self.driver, torch.cuda.current_device())
        self._library = ctypes.CDLL("libcuda.so.1")
        found = ctypes.c_void_p()
        code = self.ask("cuGetProcAddress_v2", b"cuMemcpyBatchAsync", ctypes.byref(found), _BATCH_VERSION, 0, 0)
        signature = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_void_p,) * 9)
        self._batch = signature(found.value) if code == SUCCESS and found.value else None

    @property
    def has_batch(self) -> bool:
        """Whether the driver has cuMemcpyBatchAsync: 12.8 and later."""
        return self._batch is not None

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

    def create_stream(self) -> int:
        stream = ctypes.c_void_p()
        self.do("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        return stream.value or 0

    @contextmanager
    def stream(self) -> Iterator[int]:
        handle = self.create_stream()
        try:
            yield handle
        finally:
            self.synchronize(handle)
            self.do("cuStreamDestroy_v2", handle)

    @contextmanager
    def event(self, flags: int = DISABLE_TIMING) -> Iterator[int]:
        event = ctypes.c_void_p()
        self.do("cuEventCreate", ctypes.byref(event), flags)
        try:
            yield event.value or 0
        finally:
            self.ask("cuEventDestroy_v2", event)

    @contextmanager
    def rig(self, size: int = MIB) -> Iterator[Rig]:
        with ExitStack() as stack:
            host = stack.enter_context(self.pinned(size))
            device = stack.enter_context(self.device(size))
            one, two = (stack.enter_context(self.stream()) for _ in range(2))
            yield Rig(host, host.ctypes.data, device, one, two, stack.enter_context(self.event()))

    @contextmanager
    def gate(self, stream: int, seconds: float = GATE_SECONDS) -> Iterator[threading.Event]:
        """What is queued on the stream from here on waits until the event is set: by the end, or after a time."""
        opened = threading.Event()

        def wait(_: object) -> None:
            opened.wait(seconds)
            opened.set()

        function = HOST_FUNCTION(wait)
        self.do("cuLaunchHostFunc", stream, function, 0)
        try:
            yield opened
        finally:
            opened.set()
            self.ask("cuStreamSynchronize", stream)  # the function has to be there until it has run

    def copy(self, destination: int, source: int, size: int, stream: int) -> None:
        """Queue one copy."""
        self.do("cuMemcpyAsync", destination, source, size, stream)

    def copy_in_chunks(self, destination: int, source: int, size: int, stream: int) -> None:
        """Queue one copy in parts, between which a copy engine may turn to another stream."""
        for at in range(0, size, COPY_CHUNK):
            self.copy(destination + at, source + at, min(COPY_CHUNK, size - at), stream)

    def batch(self, copies: Sequence[Copy], stream: int) -> int:
        """The code of one call for all of them; of calls one by one without `has_batch`."""
        return self.prepared_batch(copies, stream)()

    def prepared_batch(self, copies: Sequence[Copy], stream: int) -> Callable[[], int]:
        """`batch`, of which nothing is left to do but the call."""
        if self._batch is None:
            return lambda: max(self.ask("cuMemcpyAsync", *each, stream) for each in copies)
        columns = np.ascontiguousarray(np.array(copies, dtype=np.uint64).T)
        attributes, first, failed = _BatchAttributes(_ORDER_STREAM), ctypes.c_size_t(0), ctypes.c_size_t(0)
        arrays = [column.ctypes.data for column in columns]
        by = [ctypes.addressof(each) for each in (attributes, first)]
        arguments = [*arrays, len(copies), *by, 1, ctypes.addressof(failed), stream]
        call = functools.partial(self._batch, *arguments)
        call.memory = (columns, attributes, first, failed)  # that the arguments point to
        return call

    def is_idle(self, stream: int) -> bool:
        """Whether all that was queued on the stream has ended."""
        return self.ask("cuStreamQuery", stream) == SUCCESS

    def synchronize(self, stream: int) -> None:
        self.do("cuStreamSynchronize", stream)

    def timed(self, call: Callable[[], object], stream: int) -> tuple[float, float]:
        """(seconds until `call` returned, seconds until the stream was empty)."""
        started = time.perf_counter()
        call()
        returned = time.perf_counter() - started
        self.synchronize(stream)
        return returned, time.perf_counter() - started


def scattered(destination: int, source: int, count: int, size: int = 4096) -> list[Copy]:
    """Copies of `size` bytes between which as much is left out, so that none can be joined with the next."""
    return [(destination + at, source + at, size) for at in range(0, 2 * count * size, 2 * size)]
