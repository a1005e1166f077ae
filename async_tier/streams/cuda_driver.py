"""The part of the CUDA driver that Python calls, by ctypes: registration, memory, contexts. native/cuda.c copies.

The driver and not torch or the runtime, because
- a driver call that fails leaves no state behind, whereas the runtime keeps a "last error" for which the next kernel
  launch of other code would be blamed (vLLM #51080);
- freeing memory after the context is lost only returns an error, whereas torch's tensors abort the process.

Every call releases the GIL. Importing this calls nothing.
"""

from __future__ import annotations

import ctypes
import os
import threading

SUCCESS = 0
OUT_OF_MEMORY = 2
ALREADY_REGISTERED = 712
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for every context
_MEMORY_TYPE = 2  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE
_MEMORY_TYPE_HOST = 1  # CU_MEMORYTYPE_HOST
_HOST_POINTERS = 91  # CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
_HOST_NUMA_ID = 134  # CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

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
    "cuMemHostRegister_v2": (_handle, _size, ctypes.c_uint),
    "cuMemHostUnregister": (_handle,),
    "cuMemAlloc_v2": (ctypes.POINTER(_handle), _size),
    "cuMemFree_v2": (_handle,),
    "cuMemGetInfo_v2": (ctypes.POINTER(_size), ctypes.POINTER(_size)),
    "cuPointerGetAttribute": (_handle, _int, _handle),
    "cuGetErrorName": (_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuGetErrorString": (_int, ctypes.POINTER(ctypes.c_char_p)),
}


class CudaError(RuntimeError):
    """A driver call failed. code: the CUresult."""

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        super().__init__(f"{call}: {text} ({name}, {code})")
        self.code = code


class Driver:
    """libcuda. Raises OSError if it cannot be loaded; the methods raise CudaError."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = _int
        self._check("cuInit", self._library.cuInit(0))

    def takes_host_pointers(self, ordinal: int) -> bool:
        """Whether registered memory has the same address on the device as on the host.

        Not on WSL2. There a batch call with such memory loses the context; for other copies the driver translates.
        """
        return self._attribute(ordinal, _HOST_POINTERS) != 0

    def host_node(self, ordinal: int) -> int:
        """The host's NUMA node that is closest to the device; -1 if there is none. CUDA 12.2 and later."""
        return self._attribute(ordinal, _HOST_NUMA_ID)

    # ----------------------------------------------------------------------------------------------------- contexts

    def retain_context(self, ordinal: int) -> tuple[int, int]:
        """(the device, its primary context), which is the context that torch uses."""
        device = _int()
        self._check("cuDeviceGet", self._library.cuDeviceGet(ctypes.byref(device), ordinal))
        context = _handle()
        self._check(
            "cuDevicePrimaryCtxRetain", self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device.value)
        )
        return device.value, context.value or 0

    def release_context(self, device: int) -> None:
        self._library.cuDevicePrimaryCtxRelease_v2(device)

    def push_context(self, context: int) -> None:
        self._check("cuCtxPushCurrent", self._library.cuCtxPushCurrent_v2(context))

    def pop_context(self) -> None:
        self._library.cuCtxPopCurrent_v2(ctypes.byref(_handle()))

    def exchange_capture_mode(self, mode: int) -> int:
        """Set the calling thread's stream-capture mode. Returns the previous one."""
        value = _int(mode)
        self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(value))
        return value.value

    # ------------------------------------------------------------------------------------------------------- memory

    def register(self, address: int, size: int) -> None:
        """Pin `size` bytes of host memory."""
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
        fits = _size(size).value == size  # otherwise ctypes would truncate it
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

    # ------------------------------------------------------------------------------------------------------ details

    def _attribute(self, ordinal: int, number: int) -> int:
        device, value = _int(), _int()
        self._check("cuDeviceGet", self._library.cuDeviceGet(ctypes.byref(device), ordinal))
        self._check(
            "cuDeviceGetAttribute", self._library.cuDeviceGetAttribute(ctypes.byref(value), number, device.value)
        )
        return value.value

    def _check(self, call: str, code: int) -> None:
        if code != SUCCESS:
            name, text = ctypes.c_char_p(), ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(name))
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(call, code, (name.value or b"unknown").decode(), (text.value or b"unknown error").decode())


class DeviceContext:
    """The device's primary context (`handle`). Within `with`, it is current on the calling thread.

    A thread has no current context until one is set, and driver calls then fail with 201; `torch.cuda.device` does not
    set one if the device is 0 already. May be entered several times at once, by any threads.

    Within `with`, the thread's stream-capture mode is RELAXED. Otherwise, while any thread captures a graph in mode
    GLOBAL, torch's default, calls that query, wait, pin or allocate would be refused, and would end that capture.
    """

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self.ordinal = ordinal
        self._driver = driver
        self._device, self.handle = driver.retain_context(ordinal)
        self._owner = os.getpid()
        self._of_thread = threading.local()

    def __enter__(self) -> None:
        self._driver.push_context(self.handle)
        modes = self._of_thread.__dict__.setdefault("modes", [])
        modes.append(self._driver.exchange_capture_mode(_RELAXED))

    def __exit__(self, *_: object) -> None:
        self._driver.exchange_capture_mode(self._of_thread.modes.pop())
        self._driver.pop_context()

    @property
    def is_forked(self) -> bool:
        """Whether this is a forked child of the process that made it; CUDA must not be called there."""
        return os.getpid() != self._owner

    def release(self) -> None:
        """Release the context. Must be called once only."""
        self._driver.release_context(self._device)
