"""Loads the emulated CUDA in front of NVIDIA's libraries, and drives it: see README.md.

    emulator = load()  # before torch is imported
    emulator.hold(stream.cuda_stream)

Streams are given by their handles, integers; times are in microseconds.
"""

from __future__ import annotations

import ctypes
import enum
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BUILD = Path(__file__).parents[2] / "build" / "cuda_emulator"
_LIBRARIES = ("libcuda.so.1", "libcudart.so.13", "libnvidia-ml.so.1")
_OTHER_LIBRARIES = "nvidia"
_ALL_KINDS = -1
_VIOLATION_BYTES = 512
_OWN_DELAY = -1.0  # of a stream: none of its own


class Kind(enum.IntEnum):
    """What an operation on a stream does."""

    H2D = 0
    D2H = 1
    D2D = 2
    H2H = 3
    MEMSET = 4
    KERNEL = 5
    HOSTFN = 6


# Where an error may be injected while an operation runs. Where a call may be refused is called as `count` calls it.
ASYNCHRONOUS_POINTS = frozenset({"exec_h2d", "exec_d2h", "exec_d2d", "exec_h2h", "exec_copy", "event_record"})

_int, _u64, _double, _text, _handle = (ctypes.c_int, ctypes.c_uint64, ctypes.c_double, ctypes.c_char_p, ctypes.c_void_p)
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "is_forked": (_int, ()),
    "set_delay": (None, (_int, _double)),
    "set_stream_delay": (_int, (_handle, _double)),
    "set_bandwidth": (None, (_double,)),
    "set_shared_bandwidth": (None, (_double,)),
    "set_jitter": (None, (_double, _u64)),
    "set_poison": (None, (_int,)),
    "ignore_kernels": (None, (_int,)),
    "hold_new_streams": (None, (_int,)),
    "set_unregister_waits": (None, (_int,)),
    "hold": (_int, (_handle,)),
    "step": (_int, (_handle, _u64)),
    "release": (_int, (_handle,)),
    "pending": (ctypes.c_int64, (_handle,)),
    "inject": (None, (_text, ctypes.c_long, _int, _int)),
    "hide": (None, (_text,)),
    "set_attribute": (None, (_int, _int)),
    "reset": (_int, ()),
    "sticky": (_int, ()),
    "violations": (_u64, ()),
    "violation_text": (_int, (_u64, ctypes.c_char_p, ctypes.c_size_t)),
    "count": (_u64, (_text,)),
    "copies": (None, (_int, ctypes.POINTER(_u64), ctypes.POINTER(_u64))),
    "copies_pageable": (_u64, ()),
    "peek": (_int, (_handle, _handle, ctypes.c_size_t)),
    "poke": (_int, (_handle, _handle, ctypes.c_size_t)),
}


class Emulator:
    """The emulated driver of this process. All settings hold until `reset`."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        """Not to be called: see `load`."""
        self._call: dict[str, Callable[..., Any]] = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(driver, f"cudaemu_{name}")
            function.restype = result
            function.argtypes = arguments
            self._call[name] = function
        os.register_at_fork(after_in_child=self._refuse_in_child)

    def _refuse_in_child(self) -> None:
        # The emulator's lock may be held for ever, by a thread of the parent's. Before CUDA's start there is none.
        if self._call["is_forked"]():
            self._call.update(dict.fromkeys(_SIGNATURES, _refuse))

    # ---------------------------------------------------------------------------------------------------------- time

    def set_delay(self, kind: Kind | None, microseconds: float) -> None:
        """How long every operation of a kind takes, at least. None: of any kind."""
        self._call["set_delay"](_ALL_KINDS if kind is None else kind, microseconds)

    def set_stream_delay(self, stream: int, microseconds: float | None) -> None:
        """How long every operation of a stream takes, whatever its kind. None: the kind's delay again."""
        self._on_stream("set_stream_delay", stream, _OWN_DELAY if microseconds is None else microseconds)

    def set_bandwidth(self, gigabytes_per_second: float) -> None:
        """What each copy engine moves, in 10^9 bytes per second. 0: no limit."""
        self._call["set_bandwidth"](gigabytes_per_second)

    def set_shared_bandwidth(self, fraction: float) -> None:
        """The part of `set_bandwidth` that each of the two directions has while the other one's engine is busy, too.

        0.5: as where both share one link or one memory. 1: they do not disturb each other. A copy that is under way
        changes its rate whenever the other direction begins or ends.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"no part of a bandwidth: {fraction}")
        self._call["set_shared_bandwidth"](fraction)

    def set_jitter(self, microseconds: float, seed: int = 0) -> None:
        """Operations take up to this much longer, at random. The seed also decides the order within batches."""
        self._call["set_jitter"](microseconds, seed)

    def hold(self, stream: int) -> None:
        """Start no more operations of a stream, until `step` or `release`. What runs already goes on."""
        self._on_stream("hold", stream)

    def step(self, stream: int, n: int = 1) -> None:
        """Let a held stream run its next n operations: copies, batches, kernels, host functions, records, waits.

        A wait for an event that is done already is no operation.
        """
        self._on_stream("step", stream, n)

    def release(self, stream: int) -> None:
        """Undo `hold`."""
        self._on_stream("release", stream)

    def hold_new_streams(self, on: bool) -> None:
        """Whether streams are held from their creation on."""
        self._call["hold_new_streams"](on)

    def pending(self, stream: int) -> int:
        """Operations of a stream that have not ended: those that `step` counts."""
        pending: int = self._call["pending"](stream)
        if pending < 0:
            raise _no_stream(stream)
        return pending

    # ------------------------------------------------------------------------------------------------------- hazards

    def set_poison(self, on: bool) -> None:
        """Whether a copy's destination is filled with 0xDB from the copy's start to its end."""
        self._call["set_poison"](on)

    def set_unregister_waits(self, on: bool) -> None:
        """Whether unregistering host memory waits for all work of the device, as an H100 did, or for none.

        It never waits under a copy of the same memory, which is a violation. With a stream that is held it does not
        return before the stream is released.
        """
        self._call["set_unregister_waits"](on)

    def ignore_kernels(self, on: bool) -> None:
        """Whether kernels that are not emulated do nothing, instead of being refused."""
        self._call["ignore_kernels"](on)

    def inject(self, point: str, nth: int, code: int, asynchronous: bool = False) -> None:
        """Make the nth call from now fail with a code, once.

        point: an API's name as `count` knows it. asynchronous: the call succeeds, the operation fails when it runs,
        and the context is lost (`sticky`); point is one of ASYNCHRONOUS_POINTS then.
        """
        if asynchronous and point not in ASYNCHRONOUS_POINTS:
            raise ValueError(f"no point for asynchronous errors: {point}; there are {sorted(ASYNCHRONOUS_POINTS)}")
        self._call["inject"](point.encode(), nth, code, asynchronous)

    def hide(self, symbol: str) -> None:
        """Make cuGetProcAddress not find a function: a driver that is older than it."""
        self._call["hide"](symbol.encode())

    def set_attribute(self, attribute: int, value: int) -> None:
        """What devices say of themselves, by CUdevice_attribute.

        With 91 (host pointers of registered memory) at 0 a batch that copies from or to such memory loses the context.
        """
        self._call["set_attribute"](attribute, value)

    def reset(self) -> None:
        """Everything as it was when the emulator was loaded, and all streams empty.

        Holds are released and delays cut short, then what is queued runs to its end, then errors, violations, counts
        and rules are forgotten. Settings are what the environment says. Allocations, registrations, streams and events
        stay. Raises TimeoutError if an operation does not end.
        """
        if self._call["reset"]():
            raise TimeoutError("an operation on some stream does not end")

    # ------------------------------------------------------------------------------------------------ what has happened

    def sticky(self) -> int:
        """The error that has lost the context, 0 for none."""
        code: int = self._call["sticky"]()
        return code

    def violations(self) -> int:
        """How often CUDA was used in a way that only happens to work."""
        count: int = self._call["violations"]()
        return count

    def violation_texts(self) -> list[str]:
        """One line for each of `violations`."""
        texts: list[str] = []
        text = ctypes.create_string_buffer(_VIOLATION_BYTES)
        while self._call["violation_text"](len(texts), text, _VIOLATION_BYTES) == 0:
            texts.append(text.value.decode(errors="replace"))
        return texts

    def count(self, api: str) -> int:
        """Calls of an API, by driver or runtime: "malloc", "memcpy_async", "event_record", "host_register" ..."""
        count: int = self._call["count"](api.encode())
        return count

    def copies(self, kind: Kind) -> tuple[int, int]:
        """(entries, bytes) of copies submitted; each entry of a batch and each row of a 2D copy counts."""
        entries, size = _u64(), _u64()
        self._call["copies"](kind, ctypes.byref(entries), ctypes.byref(size))
        return entries.value, size.value

    def copies_pageable(self) -> int:
        """Entries submitted that had a host side which was not pinned."""
        count: int = self._call["copies_pageable"]()
        return count

    # ------------------------------------------------------------------------------------------------- device memory

    def peek(self, device_ptr: int, n: int) -> bytes:
        """n bytes of device memory as they are now, past all streams."""
        buffer = ctypes.create_string_buffer(n)
        if self._call["peek"](device_ptr, buffer, n):
            raise ValueError(f"{device_ptr:#x} + {n} bytes is not within one device allocation")
        return buffer.raw

    def poke(self, device_ptr: int, data: bytes) -> None:
        """Write to device memory, past all streams."""
        if self._call["poke"](device_ptr, data, len(data)):
            raise ValueError(f"{device_ptr:#x} + {len(data)} bytes is not within one device allocation")

    def _on_stream(self, name: str, stream: int, *arguments: float) -> None:
        if self._call[name](stream, *arguments):
            raise _no_stream(stream)


def _refuse(*_: object) -> None:
    raise RuntimeError("the emulator's controls are not for forked children")


def _no_stream(stream: int) -> ValueError:
    return ValueError(f"{stream:#x} is no stream, or not a held one for step()")


_loaded: Emulator | None = None


def load(build_dir: str | os.PathLike[str] | None = None) -> Emulator:
    """Open the emulated libraries so that torch, imported later, gets these instead of NVIDIA's.

    build_dir: where `make` put them, by default build/cuda_emulator in the project. A second call returns the same
    object. Raises FileNotFoundError if they are not built, RuntimeError if torch is there already.
    """
    global _loaded
    if _loaded is not None:
        return _loaded
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: the CUDA emulator has to be loaded before it")
    build = _BUILD if build_dir is None else Path(build_dir)
    missing = [name for name in _LIBRARIES if not (build / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)} not found in {build}: build the CUDA emulator with "
            "`make -C tests/cuda_emulator TORCH_LIB=<site-packages>/torch/lib`"
        )
    # The dynamic linker takes a library that is loaded already for every one of the same name, whatever the path.
    libraries = {name: ctypes.CDLL(str(build / name), mode=ctypes.RTLD_GLOBAL) for name in _LIBRARIES}
    for path in sorted((build / _OTHER_LIBRARIES).iterdir()):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    _loaded = Emulator(libraries["libcuda.so.1"])
    return _loaded
