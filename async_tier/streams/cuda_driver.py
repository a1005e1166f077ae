"""The CUDA driver, as far as Python calls it, by ctypes: registration, memory, contexts. Copies are native/cuda.c's.

By the driver and not by torch or the runtime, because
- an error of a driver call leaves nothing pending: the runtime keeps a "last error" that the next kernel of somebody
  else would be blamed for (vLLM #51080);
- freeing memory fails with a code after an error that the context does not survive; torch's tensors abort the process.

Every call releases the GIL. Nothing here is called at import.
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
    """A driver call that was refused. code: CUresult."""

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        super().__init__(f"{call}: {text} ({name}, {code})")
        self.code = code


class Driver:
    """libcuda. Raises OSError where there is none; its methods raise CudaError."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = _int
        self._check("cuInit", self._library.cuInit(0))

    def takes_host_pointers(self, ordinal: int) -> bool:
        """Whether the device has registered memory at the host's address.

        On WSL2 it has not, and a batch call with such memory loses the context; other copies are translated.
        """
        return self._attribute(ordinal, _HOST_POINTERS) != 0

    def host_node(self, ordinal: int) -> int:
        """The NUMA node of the host that is closest to the device; -1 where there is none. From CUDA 12.2 on."""
        return self._attribute(ordinal, _HOST_NUMA_ID)

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
    """`with` it, the device's primary context (`handle`) is current on the calling thread, whatever thread that is.

    A thread has none until something sets it, and driver calls then fail with 201; `torch.cuda.device` does not set
    one where the device is 0 already. Entered more than once at a time, by any threads.

    The thread is out of others' captures of graphs meanwhile: else to ask for an event, to wait, to pin and to allocate
    would be refused while some thread captures in mode GLOBAL, torch's default, and would end its capture.
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
        """Whether this is a child of the process that made it: there, CUDA must not be called."""
        return os.getpid() != self._owner

    def release(self) -> None:
        """Give the context back. To be called once."""
        self._driver.release_context(self._device)
