"""The CUDA driver, as far as checks of a GPU call it and the package does not: streams, and copies from Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from async_tier.streams.cuda_driver import SUCCESS, Driver

NOT_READY = 600
# Entries of one batch, at most; the engine makes smaller ones.
MAX_BATCH = 4096
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_ORDER_STREAM = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
# The version whose cuMemcpyBatchAsync has a `failIdx`.
_BATCH_VERSION = 12080

_handle, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "cuStreamCreate": (ctypes.POINTER(_handle), ctypes.c_uint),
    "cuStreamDestroy_v2": (_handle,),
    "cuStreamQuery": (_handle,),
    "cuMemcpyAsync": (_handle, _handle, _size, _handle),
    "cuGetProcAddress_v2": (ctypes.c_char_p, ctypes.POINTER(_handle), _int, ctypes.c_uint64, _handle),
}
_BATCH_SIGNATURE = (_handle, _handle, _handle, _size, _handle, _handle, _size, _handle, _handle)


class _BatchAttributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("source_access_order", ctypes.c_uint),
        ("source_location", ctypes.c_int * 2),
        ("destination_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class StreamDriver(Driver):
    """Driver, and streams. Its methods raise CudaError."""

    def __init__(self) -> None:
        super().__init__()
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = _int
        self._attributes = _BatchAttributes(source_access_order=_ORDER_STREAM)
        self._attributes_from = _size(0)
        self._failed_at = _size(0)
        self._batch = self._find_batch()

    @property
    def has_batch(self) -> bool:
        """Whether the driver has cuMemcpyBatchAsync: 12.8 and later."""
        return self._batch is not None

    def create_stream(self) -> int:
        """The handle of a new stream."""
        stream = _handle()
        self._check("cuStreamCreate", self._library.cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING))
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        self._check("cuStreamDestroy", self._library.cuStreamDestroy_v2(stream))

    def is_idle(self, stream: int) -> bool:
        """Whether all that was queued on the stream has ended."""
        code = self._library.cuStreamQuery(stream)
        if code != NOT_READY:
            self._check("cuStreamQuery", code)
        return code == SUCCESS

    def copy(self, destinations: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        """Queue copies between addresses, arrays of shape (n,) and dtype uint64, contiguous."""
        count = len(sizes)
        if self._batch is None or count == 1:
            for each in zip(destinations.tolist(), sources.tolist(), sizes.tolist(), strict=True):
                self._check("cuMemcpyAsync", self._library.cuMemcpyAsync(*each, stream))
            return
        to, of, by = (array.ctypes.data for array in (destinations, sources, sizes))
        for at in range(0, count, MAX_BATCH):
            arrays = (to + at * 8, of + at * 8, by + at * 8, min(MAX_BATCH, count - at))
            attributes = (ctypes.byref(self._attributes), ctypes.byref(self._attributes_from), 1)
            code = self._batch(*arrays, *attributes, ctypes.byref(self._failed_at), stream)
            self._check("cuMemcpyBatchAsync", code)

    def _find_batch(self) -> Callable[..., int] | None:
        found = _handle()
        code = self._library.cuGetProcAddress_v2(b"cuMemcpyBatchAsync", ctypes.byref(found), _BATCH_VERSION, 0, None)
        if code != SUCCESS or not found.value:
            return None
        return ctypes.CFUNCTYPE(_int, *_BATCH_SIGNATURE)(found.value)
