"""Facts about memory, contexts, and what the driver says of itself."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from async_tier.text import format_size
from benchmarks.gpu.asking import Facts, Seen, listed, on_a_thread
from benchmarks.gpu.device import (
    ALREADY_REGISTERED,
    INVALID_CONTEXT,
    INVALID_VALUE,
    MIB,
    NOT_INITIALIZED,
    NOT_READY,
    NOT_REGISTERED,
    OUT_OF_MEMORY,
    SUCCESS,
    VOLUME,
    Bench,
)
from tests.rows import zero_rows

FACTS = Facts()
fact = FACTS.note

_HOST_POINTER_OF_REGISTERED = 91  # CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
_POINTER_ATTRIBUTES = {  # CUpointer_attribute
    "memory type": 2,
    "device pointer": 3,
    "host pointer": 4,
    "managed": 8,
    "range start": 11,
    "range size": 12,
}
_REGISTER_FLAGS = {"no flag": 0, "PORTABLE": 1, "DEVICEMAP": 2, "both": 3}


@fact("F5", "a page in two registrations", in_child=True)
def one_page_in_two_registrations(bench: Bench) -> Seen:
    memory = zero_rows(1, 4 * MIB)[0]
    memory[:] = 7
    first, second = memory.ctypes.data, memory.ctypes.data + MIB + 100
    bench.driver.register(first, MIB + 100)
    codes = {"the second registration": bench.ask("cuMemHostRegister_v2", second, MIB, 1)}
    if codes["the second registration"] != SUCCESS:
        return True, listed(codes)
    with bench.rig() as rig:
        codes["unregistering the first"] = bench.ask("cuMemHostUnregister", first)
        codes["a copy from the second then"] = bench.ask("cuMemcpyAsync", rig.device, second, MIB, rig.stream)
        codes["the stream"] = bench.ask("cuStreamSynchronize", rig.stream)
        bench.copy(rig.at, rig.device, MIB, rig.stream)
        bench.synchronize(rig.stream)
        right = bool((rig.host == 7).all())
    codes["unregistering the second"] = bench.ask("cuMemHostUnregister", second)
    return True, f"{listed(codes)}; its bytes are {'right' if right else 'WRONG'}"


@fact("F6", "what is registered cannot be registered again")
def registered_twice(bench: Bench) -> Seen:
    with bench.pinned(4 * MIB) as host:
        codes = [
            bench.ask("cuMemHostRegister_v2", host.ctypes.data + at, size, 1) for at, size in ((0, 4 * MIB), (MIB, MIB))
        ]
    return codes == [ALREADY_REGISTERED] * 2, f"codes {codes[0]} and {codes[1]}"


@fact("F7-8", "codes of registration")
def codes_of_registration(bench: Bench) -> Seen:
    memory = zero_rows(1, MIB)[0]
    codes = {
        "unregister what is not": bench.ask("cuMemHostUnregister", memory.ctypes.data),
        "unregister null": bench.ask("cuMemHostUnregister", 0),
        "register null": bench.ask("cuMemHostRegister_v2", 0, MIB, 1),
    }
    return list(codes.values()) == [NOT_REGISTERED, INVALID_VALUE, INVALID_VALUE], listed(codes)


@fact("F9-10", "codes of memory")
def codes_of_memory(bench: Bench) -> Seen:
    with bench.rig() as rig:
        codes = {
            "a copy beyond the end": bench.ask("cuMemcpyAsync", rig.device, rig.at, 1 << 40, rig.stream),
            "free of what is no start": bench.ask("cuMemFree_v2", rig.device + 256),
            "too much": bench.ask("cuMemAlloc_v2", ctypes.byref(ctypes.c_void_p()), 1 << 50),
        }
    return list(codes.values()) == [INVALID_VALUE, INVALID_VALUE, OUT_OF_MEMORY], listed(codes)


@fact("F11", "freeing waits for copies")
def free_waits(bench: Bench) -> Seen:
    with bench.rig(VOLUME) as rig:
        device = bench.driver.allocate(VOLUME)
        for _ in range(2):
            bench.copy(device, rig.at, VOLUME, rig.stream)
        bench.driver.free(device)
        idle = bench.is_idle(rig.stream)
    return True, f"cuMemFree {'waited' if idle else 'did not wait'} for the copies; the tier frees only what is idle"


@fact("F20", "versions of the batch call")
def versions_of_the_batch_call(bench: Bench) -> Seen:
    version = ctypes.c_int()
    bench.do("cuDriverGetVersion", ctypes.byref(version))
    said, found = [], {}
    for asked in (11000, 12070, 12080, 13000, 99990, "an unknown name"):
        name, number = (b"cuNoSuchFunction", 12080) if isinstance(asked, str) else (b"cuMemcpyBatchAsync", asked)
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


@fact("F26", "a thread without a context is refused")
def no_context(bench: Bench) -> Seen:
    codes: list[int] = []
    on_a_thread(lambda: codes.append(bench.ask("cuMemAlloc_v2", ctypes.byref(ctypes.c_void_p()), MIB)))
    return codes == [INVALID_CONTEXT], f"code {codes[0]}"


@fact("F27", "contexts are a stack")
def contexts_are_a_stack(bench: Bench) -> Seen:
    codes: list[int] = []

    def memory() -> int:
        return bench.ask("cuMemGetInfo_v2", ctypes.byref(ctypes.c_size_t()), ctypes.byref(ctypes.c_size_t()))

    def run() -> None:
        with bench.context:
            with bench.context:
                pass
            codes.append(memory())
        codes.append(memory())
        codes.append(bench.ask("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p())))

    on_a_thread(run)
    is_right = codes == [SUCCESS, INVALID_CONTEXT, INVALID_CONTEXT]
    return is_right, f"inside {codes[0]}, outside {codes[1]}, empty {codes[2]}"


@fact("F29", "nothing works in a forked child")
def nothing_works_in_a_forked_child(bench: Bench) -> Seen:
    child = os.fork()
    if child == 0:
        os._exit(min(bench.ask("cuInit", 0), 200))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code == NOT_INITIALIZED, f"cuInit: code {code}; the tier calls nothing there"


@fact("F30-31", "registered memory is known as such")
def registered_memory_is_known(bench: Bench) -> Seen:
    pageable = zero_rows(1, MIB)[0]
    with bench.pinned(MIB) as host:
        pinned = bench.driver.is_pinned(host.ctypes.data) and bench.driver.is_pinned(host.ctypes.data + MIB - 1)
    return pinned and not bench.driver.is_pinned(pageable.ctypes.data), "registered: yes; pageable: no"


@fact("F31", "registered memory has one address")
def registered_memory_has_one_address(bench: Bench) -> Seen:
    attribute, pointer, value = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    device = torch.cuda.current_device()
    bench.do("cuDeviceGetAttribute", ctypes.byref(attribute), _HOST_POINTER_OF_REGISTERED, device)
    said, kinds = [], []
    with bench.pinned(MIB) as host:
        address = host.ctypes.data
        for where, at in {"start": 0, "last byte": MIB - 1, "first byte beyond": MIB}.items():
            for name, number in _POINTER_ATTRIBUTES.items():
                value.value = 0
                code = bench.ask("cuPointerGetAttribute", ctypes.byref(value), number, address + at)
                if name == "memory type":
                    kinds.append(value.value)
                relative = value.value - (address if name in ("device pointer", "host pointer", "range start") else 0)
                said.append(f"{where}, {name}: {f'code {code}' if code else relative}")
        code = bench.ask("cuMemHostGetDevicePointer_v2", ctypes.byref(pointer), address, 0)
        same = code == SUCCESS and pointer.value == address
    seen = f"attribute 91: {attribute.value}, device pointer {'the same' if same else f'another, code {code}'}; "
    return kinds[:2] == [1, 1] and same == (attribute.value == 1), seen + "; ".join(said)


@fact("F35", "queries leave nothing in the runtime")
def the_runtime_does_not_keep_not_ready(bench: Bench) -> Seen:
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


@fact("F40", "kinds of memory are registered")
def kinds_of_memory_are_registered(bench: Bench) -> Seen:
    size, said, is_right = 16 * MIB, [], True
    for kind in ("MAP_SHARED", "MAP_PRIVATE", "/dev/shm"):
        for populated in (False, True):
            for name, flags in _REGISTER_FLAGS.items():
                with tempfile.TemporaryFile(dir="/dev/shm") as file:
                    file.truncate(size)
                    is_file = kind.startswith("/")
                    how = mmap.MAP_SHARED if is_file else getattr(mmap, kind) | mmap.MAP_ANONYMOUS
                    pages = mmap.mmap(file.fileno() if is_file else -1, size, how)
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
