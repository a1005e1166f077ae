"""The CUDA driver, as far as the tier calls it, by ctypes: copies, streams, registration, memory, contexts.

By the driver and not by torch or the runtime, because
- many rows go into one `cuMemcpyBatchAsync` whose arguments are numpy arrays, no Python object a row;
- torch hands out the same 32 streams in turn, so a stream from it may be one that vLLM's own transfers use;
- an error of a driver call leaves nothing pending: the runtime keeps a "last error" that the next kernel of somebody
  else would be blamed for (vLLM #51080);
- freeing memory fails with a code after an error that the context does not survive; torch's tensors abort the process.

Every call releases the GIL. Nothing here is called at import.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

import numpy as np

SUCCESS = 0
INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_READY = 600
ALREADY_REGISTERED = 712
# Those that a context does not survive, or that say that it, or the stream that is asked, is there no more.
_LOST = frozenset({3, 4, 201, 214, 220, 226, 400, 700, 702, 709, 710, *range(714, 720), 721, 810, 911, 999})
# What is refused because somebody captures a graph.
_CAPTURING = range(900, 908)

# Entries of one batch: one of 51,828 was seen to hang (vLLM #49276).
MAX_BATCH = 4096

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not ordered with the legacy default stream
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for every context
_ORDER_STREAM = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_MEMORY_TYPE = 2  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE
_MEMORY_TYPE_HOST = 1  # CU_MEMORYTYPE_HOST
_HOST_POINTERS = 91  # CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
# The version whose cuMemcpyBatchAsync has a `failIdx`; every later driver still has that one under this number.
_BATCH_VERSION = 12080

_handle = ctypes.c_void_p
_size = ctypes.c_size_t
_int = ctypes.c_int
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (ctypes.POINTER(_int), _int),
    "cuDeviceGetAttribute": (ctypes.POINTER(_int), _int, _int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_handle), _int),
    "cuDevicePrimaryCtxRelease_v2": (_int,),
    "cuCtxPushCurrent_v2": (_handle,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(_handle),),
    "cuThreadExchangeStreamCaptureMode": (ctypes.POINTER(_int),),
    "cuStreamCreate": (ctypes.POINTER(_handle), ctypes.c_uint),
    "cuStreamDestroy_v2": (_handle,),
    "cuStreamQuery": (_handle,),
    "cuMemHostRegister_v2": (_handle, _size, ctypes.c_uint),
    "cuMemHostUnregister": (_handle,),
    "cuMemAlloc_v2": (ctypes.POINTER(_handle), _size),
    "cuMemFree_v2": (_handle,),
    "cuMemGetInfo_v2": (ctypes.POINTER(_size), ctypes.POINTER(_size)),
    "cuMemcpyAsync": (_handle, _handle, _size, _handle),
    "cuPointerGetAttribute": (_handle, _int, _handle),
    "cuGetErrorName": (_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuGetErrorString": (_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuGetProcAddress_v2": (ctypes.c_char_p, ctypes.POINTER(_handle), _int, ctypes.c_uint64, _handle),
}
_BATCH_SIGNATURE = (_handle, _handle, _handle, _size, _handle, _handle, _size, _handle, _handle)


class CudaError(RuntimeError):
    """A driver call that was refused. code: CUresult."""

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        super().__init__(f"{call}: {text} ({name}, {code})")
        self.code = code


def asks_again(error: Exception) -> bool:
    """Whether the error, the driver's or torch's, says only that somebody captures a graph."""
    return getattr(error, "code", getattr(error, "error_code", None)) in _CAPTURING


class _BatchAttributes(ctypes.Structure):
    """CUmemcpyAttributes; location hints are for managed memory."""

    _fields_ = (
        ("source_access_order", ctypes.c_uint),
        ("source_location", ctypes.c_int * 2),
        ("destination_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class Driver:
    """libcuda. Raises OSError where there is none; its methods raise CudaError."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = _int
        self._copy = self._library.cuMemcpyAsync
        self._query = self._library.cuStreamQuery
        self._check("cuInit", self._library.cuInit(0))
        # ANY, the other order, would allow a source to be read before the copies ahead of it have written it
        # (vLLM #39306).
        self._attributes = _BatchAttributes(source_access_order=_ORDER_STREAM)
        self._attributes_from = _size(0)
        self._failed_at = _size(0)
        self._batch = self._find_batch()

    @property
    def has_batch(self) -> bool:
        """Whether the driver has cuMemcpyBatchAsync: 12.8 and later."""
        return self._batch is not None

    def forget_batch(self) -> None:
        """From now on `copy` queues one by one."""
        self._batch = None

    def takes_host_pointers(self, ordinal: int) -> bool:
        """Whether the device has registered memory at the host's address.

        On WSL2 it has not, and a batch call with such memory loses the context; other copies are translated.
        """
        device, value = _int(), _int()
        self._check("cuDeviceGet", self._library.cuDeviceGet(ctypes.byref(device), ordinal))
        self._check(
            "cuDeviceGetAttribute",
            self._library.cuDeviceGetAttribute(ctypes.byref(value), _HOST_POINTERS, device.value),
        )
        return value.value != 0

    # ----------------------------------------------------------------------------------------------------- contexts

    def retain_context(self, ordinal: int) -> tuple[int, int]:
        """(device, its primary context), the one that torch uses."""
        device = _int()
        self._check("cuDeviceGet", self._library.cuDeviceGet(ctypes.byref(device), ordinal))
        context = _handle()
        self._check(
            "cuDevicePrimaryCtxRetain",
            self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device.value),
        )
        return device.value, context.value or 0

    def release_context(self, device: int) -> None:
        self._library.cuDevicePrimaryCtxRelease_v2(device)

    def push_context(self, context: int) -> None:
        self._check("cuCtxPushCurrent", self._library.cuCtxPushCurrent_v2(context))

    def pop_context(self) -> None:
        self._library.cuCtxPopCurrent_v2(ctypes.byref(_handle()))

    def exchange_capture_mode(self, mode: int) -> int:
        """Set the calling thread's mode towards captures; the one it had."""
        value = _int(mode)
        self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(value))
        return value.value

    # ------------------------------------------------------------------------------------------------------- memory

    def register(self, address: int, size: int) -> None:
        """Pin a range of host memory."""
        self._check("cuMemHostRegister", self._library.cuMemHostRegister_v2(address, size, _PORTABLE))

    def unregister(self, address: int) -> None:
        self._check("cuMemHostUnregister", self._library.cuMemHostUnregister(address))

    def is_pinned(self, address: int) -> bool:
        """Whether the driver knows the address as host memory."""
        kind = ctypes.c_uint(0)
        code = self._library.cuPointerGetAttribute(ctypes.byref(kind), _MEMORY_TYPE, address)
        return code == SUCCESS and kind.value == _MEMORY_TYPE_HOST

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of device memory."""
        address = _handle()
        fits = _size(size).value == size  # else ctypes would ask for the part that does
        code = self._library.cuMemAlloc_v2(ctypes.byref(address), size) if fits else OUT_OF_MEMORY
        self._check("cuMemAlloc", code)
        return address.value or 0

    def free(self, address: int) -> None:
        self._check("cuMemFree", self._library.cuMemFree_v2(address))

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""
        free, total = _size(), _size()
        self._check("cuMemGetInfo", self._library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
        return free.value, total.value

    # ------------------------------------------------------------------------------------------- streams and copies

    def create_stream(self) -> int:
        """The handle of a new stream that nobody else has.

        Without a priority: the copy engines do not go by it (vLLM #31341).
        """
        stream = _handle()
        self._check("cuStreamCreate", self._library.cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING))
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        self._check("cuStreamDestroy", self._library.cuStreamDestroy_v2(stream))

    def is_idle(self, stream: int) -> bool:
        """Whether all that was queued on the stream is known to have ended.

        Raises CudaError only where the context is lost: the driver answers every question with the error then. What
        else it answers means to ask again.
        """
        code = self._query(stream)
        if code in _LOST:
            self._check("cuStreamQuery", code)
        return code == SUCCESS

    def copy(self, destinations: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        """Queue copies between addresses, arrays of shape (n,) and dtype uint64, contiguous.

        They may run in any order. When it raises, some of them may have been queued.
        """
        count = len(sizes)
        if self._batch is None or count == 1:
            copies = zip(destinations.tolist(), sources.tolist(), sizes.tolist(), strict=True)
            for destination, source, size in copies:
                self._check("cuMemcpyAsync", self._copy(destination, source, size, stream))
            return
        to, of, by = (array.ctypes.data for array in (destinations, sources, sizes))
        for at in range(0, count, MAX_BATCH):
            skip = at * 8
            code = self._batch(
                to + skip,
                of + skip,
                by + skip,
                min(MAX_BATCH, count - at),
                ctypes.byref(self._attributes),
                ctypes.byref(self._attributes_from),
                1,
                ctypes.byref(self._failed_at),
                stream,
            )
            self._check("cuMemcpyBatchAsync", code)

    # ------------------------------------------------------------------------------------------------------ details

    def _find_batch(self) -> Callable[..., int] | None:
        found = _handle()
        code = self._library.cuGetProcAddress_v2(b"cuMemcpyBatchAsync", ctypes.byref(found), _BATCH_VERSION, 0, None)
        if code != SUCCESS or not found.value:
            return None
        return ctypes.CFUNCTYPE(_int, *_BATCH_SIGNATURE)(found.value)

    def _check(self, call: str, code: int) -> None:
        if code != SUCCESS:
            name, text = ctypes.c_char_p(), ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(name))
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(call, code, (name.value or b"unknown").decode(), (text.value or b"unknown error").decode())


class DeviceContext:
    """`with` it, the device's primary context is current on the calling thread, whatever thread that is.

    A thread has none until something sets it, and driver calls then fail with 201; `torch.cuda.device` does not set
    one where the device is 0 already. Entered more than once at a time, by any threads.

    The thread is out of others' captures of graphs meanwhile: else to ask for an event, to wait, to pin and to allocate
    would be refused while some thread captures in mode GLOBAL, torch's default, and would end its capture.
    """

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self.ordinal = ordinal
        self._driver = driver
        self._device, self._context = driver.retain_context(ordinal)
        self._owner = os.getpid()
        self._of_thread = threading.local()

    def __enter__(self) -> None:
        self._driver.push_context(self._context)
        modes = self._of_thread.__dict__.setdefault("modes", [])
        modes.append(self._driver.exchange_capture_mode(_RELAXED))

    def __exit__(self, *_: object) -> None:
        self._driver.exchange_capture_mode(self._of_thread.modes.pop())
        self._driver.pop_context()

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that made it: there, CUDA must not be called."""
        return os.getpid() != self._owner

    def release(self) -> None:
        """Give the context back. To be called once."""
        self._driver.release_context(self._device)
