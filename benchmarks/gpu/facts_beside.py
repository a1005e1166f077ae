"""Facts about calls beside others: streams that do not move, threads that capture, and a context that is lost."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.streams.rows import Rows
from benchmarks.gpu import EMULATED
from benchmarks.gpu.asking import Facts, Seen, listed
from benchmarks.gpu.device import (
    DISABLE_TIMING,
    GATE_SECONDS,
    HOST_FUNCTION,
    MIB,
    NON_BLOCKING,
    NOT_READY,
    ROOT,
    SHORT_GATE_SECONDS,
    SUCCESS,
    Bench,
    Rig,
    scattered,
)
from tests.rows import zero_rows

FACTS = Facts()
fact = FACTS.note

_CAPTURE_MODES = {"GLOBAL": 0, "THREAD_LOCAL": 1, "RELAXED": 2}  # CUstreamCaptureMode
# Calls that may wait for streams that have nothing to do with them.
_MAY_WAIT = {"cuMemHostUnregister", "cuMemFree"}

Call = Callable[[], int]


def calls_of_memory(bench: Bench, memory: np.ndarray) -> dict[str, Call]:
    """Calls that make and unmake things, each right before the one that takes it back."""
    made, size = ctypes.c_void_p(), ctypes.c_size_t()
    new = ctypes.byref(made)
    return {
        "cuMemHostRegister": lambda: bench.ask("cuMemHostRegister_v2", memory.ctypes.data, MIB, 1),
        "cuMemHostUnregister": lambda: bench.ask("cuMemHostUnregister", memory.ctypes.data),
        "cuMemAlloc": lambda: bench.ask("cuMemAlloc_v2", new, MIB),
        "cuMemFree": lambda: bench.ask("cuMemFree_v2", made),
        "cuStreamCreate": lambda: bench.ask("cuStreamCreate", new, NON_BLOCKING),
        "cuStreamDestroy": lambda: bench.ask("cuStreamDestroy_v2", made),
        "cuEventCreate": lambda: bench.ask("cuEventCreate", new, DISABLE_TIMING),
        "cuEventDestroy": lambda: bench.ask("cuEventDestroy_v2", made),
        "cuMemGetInfo": lambda: bench.ask("cuMemGetInfo_v2", ctypes.byref(size), ctypes.byref(size)),
    }


def calls_of_streams(bench: Bench, rig: Rig, stream: int) -> dict[str, Call]:
    """Calls that are made for every piece, on that stream."""
    return {
        "cuMemcpyAsync": lambda: bench.ask("cuMemcpyAsync", rig.device, rig.at, 4096, stream),
        "cuEventRecord": lambda: bench.ask("cuEventRecord", rig.event, stream),
        "cuEventQuery": lambda: bench.ask("cuEventQuery", rig.event),
        "cuStreamQuery": lambda: bench.ask("cuStreamQuery", stream),
        "cuStreamSynchronize": lambda: bench.ask("cuStreamSynchronize", stream),
    }


@fact("F2", "queries of streams and events", in_child=True)
def queries(bench: Bench) -> Seen:
    codes = {}

    def see(what: str, function: str, handle: int) -> None:
        print(what, end=": ", flush=True)  # it may crash
        codes[what] = bench.ask(function, handle)
        print(codes[what], flush=True)

    stream = bench.create_stream()
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
    bench.do("cuStreamDestroy_v2", stream)
    see("a destroyed stream", "cuStreamQuery", stream)
    return is_right, listed(codes)


@fact("F28", "calls in a host function", in_child=True)
def calls_in_a_host_function(bench: Bench) -> Seen:
    def in_our_context(call: Call) -> int:
        code = bench.ask("cuCtxPushCurrent_v2", bench.context.handle)
        if code == SUCCESS:
            code = call()
            bench.ask("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        return code

    codes = {}
    with bench.rig() as rig:
        others = calls_of_streams(bench, rig, rig.other)
        calls: dict[str, Call] = {
            "cuEventQuery": others["cuEventQuery"],
            "cuCtxPushCurrent": lambda: in_our_context(lambda: SUCCESS),
            "cuEventQuery in a context": lambda: in_our_context(others["cuEventQuery"]),
            **{name: others[name] for name in ("cuStreamQuery", "cuEventRecord", "cuMemcpyAsync")},
            "cuMemGetInfo": calls_of_memory(bench, rig.host)["cuMemGetInfo"],
        }
        for name, call in calls.items():
            answers: list[int] = []
            function = HOST_FUNCTION(lambda _, call=call, answers=answers: answers.append(call()))
            print(name, flush=True)  # it may hang
            bench.do("cuLaunchHostFunc", rig.stream, function, 0)
            bench.synchronize(rig.stream)
            (codes[name],) = answers
    return True, listed(codes)


@fact("F38", "calls while others capture", in_child=True)
def calls_while_others_capture(bench: Bench) -> Seen:
    if not bench.has("cuStreamBeginCapture_v2"):
        return True, "this driver captures nothing"
    said = []
    with bench.rig() as rig:
        bench.do("cuEventRecord", rig.event, rig.stream)
        bench.synchronize(rig.stream)
        nothing = HOST_FUNCTION(lambda _: None)
        calls: dict[str, Call] = {
            **calls_of_streams(bench, rig, rig.stream),
            "cuMemcpyBatchAsync": lambda: bench.batch(scattered(rig.device, rig.at, 2), rig.stream),
            "cuLaunchHostFunc": lambda: bench.ask("cuLaunchHostFunc", rig.stream, nothing, 0),
            "cuStreamWaitEvent": lambda: bench.ask("cuStreamWaitEvent", rig.stream, rig.event, 0),
            "cuEventSynchronize": lambda: bench.ask("cuEventSynchronize", rig.event),
            **calls_of_memory(bench, zero_rows(1, MIB)[0]),
            "cuCtxPushCurrent": lambda: bench.ask("cuCtxPushCurrent_v2", bench.context.handle),
            "cuCtxPopCurrent": lambda: bench.ask("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p())),
        }
        for ours in ("GLOBAL", "RELAXED"):
            for mode in _CAPTURE_MODES:
                groups: dict[tuple[int, int], list[str]] = {}
                for function, call in calls.items():
                    codes = _under_capture(bench, mode, ours, call)
                    if codes[0] != SUCCESS:
                        call()  # now it is allowed: what comes next undoes it
                    groups.setdefault(codes, []).append(function)
                for (code, end), functions in groups.items():
                    what = "all" if len(functions) == len(calls) else ", ".join(functions)
                    said.append(f"{mode}{', ours RELAXED' * (ours == 'RELAXED')}: {code}, end {end}: {what}")
                    print(said[-1], flush=True)
    return True, "; ".join(said)


def _under_capture(bench: Bench, mode: str, ours: str, call: Call) -> tuple[int, int]:
    """(code of the call, in our mode, while another thread captures on its stream; code of that capture's end)."""
    began, asked, codes = threading.Event(), threading.Event(), [0, 0]

    def capture(stream: int) -> None:
        graph = ctypes.c_void_p()
        with bench.context:
            codes[0] = bench.ask("cuStreamBeginCapture_v2", stream, _CAPTURE_MODES[mode])
            began.set()
            asked.wait(GATE_SECONDS)
            codes[1] = bench.ask("cuStreamEndCapture", stream, ctypes.byref(graph))
            if graph.value:
                bench.ask("cuGraphDestroy", graph)

    exchanged = ctypes.c_int(_CAPTURE_MODES[ours])
    with bench.stream() as stream:
        thread = threading.Thread(target=capture, args=(stream,))
        thread.start()
        began.wait(GATE_SECONDS)
        bench.do("cuThreadExchangeStreamCaptureMode", ctypes.byref(exchanged))
        try:
            code = call()
        finally:
            bench.do("cuThreadExchangeStreamCaptureMode", ctypes.byref(exchanged))
            asked.set()
            thread.join()
    if codes[0] != SUCCESS:
        raise RuntimeError(f"cuStreamBeginCapture returned {codes[0]}")
    return code, codes[1]


@fact("F39", "what a stream's launch queue takes")
def a_full_launch_queue(bench: Bench) -> Seen:
    limit = 64 if EMULATED else 5000
    said, took = [], {}
    with bench.rig(4 * MIB) as rig, bench.event() as ahead:
        copy = calls_of_streams(bench, rig, rig.stream)["cuMemcpyAsync"]
        calls: dict[str, Callable[[], object]] = {"copies": copy}
        for count in (2, 32, 512) if bench.has_batch else ():
            calls[f"batches of {count}"] = bench.prepared_batch(scattered(rig.device, rig.at, count), rig.stream)
        calls["event records"] = lambda: bench.do("cuEventRecord", rig.event, rig.stream)
        for name, call in calls.items():
            with bench.gate(rig.stream) as opened:
                said.append(f"{name}: {_taken(opened, call, limit)}")
        with bench.gate(rig.other) as opened:
            bench.do("cuEventRecord", ahead, rig.other)
            waits = _taken(opened, lambda: bench.do("cuStreamWaitEvent", rig.stream, ahead, 0), limit)
        said.append(f"event waits: {waits}")
        # While one thread waits for room, what do others' calls take?
        with bench.gate(rig.stream) as opened:

            def fill() -> None:
                with bench.context:
                    _taken(opened, copy, limit)

            thread = threading.Thread(target=fill)
            thread.start()
            thread.join(GATE_SECONDS / 4)  # long enough to fill it, and no more
            others = calls_of_streams(bench, rig, rig.other)
            others["cuStreamQuery of the full one"] = lambda: bench.ask("cuStreamQuery", rig.stream)
            for name, call in others.items():
                started = time.perf_counter()
                call()
                took[name] = time.perf_counter() - started
            full = thread.is_alive()
        thread.join()
    beside = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in took.items())
    return True, "; ".join(said) + f"; beside a stream that is {'full' if full else 'not full'}: {beside}"


def _taken(opened: threading.Event, call: Callable[[], object], limit: int) -> str:
    """How many calls are taken before one waits for a gate."""
    for number in range(limit):
        started = time.perf_counter()
        call()
        if opened.is_set():
            waited = time.perf_counter() - started > GATE_SECONDS / 20
            return f"{number}" if waited else f"{number} until the gate opened, none waited"
    return f"{limit}, none waited"


@fact("F42", "calls beside a stream that does not move")
def calls_beside_a_stream_that_does_not_move(bench: Bench) -> Seen:
    """Which of them wait for it: each has a gate of its own."""
    said, waited = [], set()
    ahead = ctypes.c_void_p()
    with bench.rig() as rig:
        others = calls_of_streams(bench, rig, rig.other)
        calls: dict[str, Call] = {
            **calls_of_memory(bench, zero_rows(1, MIB)[0]),
            "cuEventDestroy of one ahead": lambda: bench.ask("cuEventDestroy_v2", ahead),
            "cuMemcpyAsync on another stream": others["cuMemcpyAsync"],
            "cuEventRecord on another stream": others["cuEventRecord"],
            "cuStreamSynchronize of another stream": others["cuStreamSynchronize"],
        }
        for name, call in calls.items():
            with bench.gate(rig.stream, SHORT_GATE_SECONDS if name in _MAY_WAIT else GATE_SECONDS) as opened:
                bench.copy(rig.device + 8192, rig.at + 8192, 4096, rig.stream)
                if name.endswith("one ahead"):
                    bench.do("cuEventCreate", ctypes.byref(ahead), DISABLE_TIMING)
                    bench.do("cuEventRecord", ahead, rig.stream)
                started = time.perf_counter()
                code = call()
                took = time.perf_counter() - started
                if opened.is_set():
                    waited.add(name)
            what = "waited" if name in waited else f"{took * 1e6:.0f} us"
            said.append(f"{name}: {what}{f', code {code}' if code else ''}")
    return waited <= _MAY_WAIT, "; ".join(said)


_LOST = """
import os, sys
from benchmarks.gpu import emulator
from benchmarks.gpu.device import Bench
from benchmarks.gpu.facts_beside import small_store
import torch
bench, (store, primary) = Bench(), small_store()
store.submit_store(1, [b"a"], [0]); store.drain(); assert [end.success for end in store.poll()] == [True]
if emulator is not None:
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
    print("cuStreamQuery says", bench.ask("cuStreamQuery", store.engine.load_stream.handles[0]))
store.submit_load(2, [b"a"], [1]); store.drain()
assert [end.success for end in store.poll()] == [False], "the job was not reported as failed"
assert not store.lookup(b"a")
store.close()
assert store.statistics().faults == 1
print("alive")
sys.stdout.flush(); os._exit(0)
"""


def small_store(row_bytes: int = 64 << 10) -> tuple[BlockStore, np.ndarray]:
    """A store of a few rows, and its primary, which has to be there as long."""
    primary = zero_rows(16, row_bytes)
    config = TierConfig.parse({"engine": "cuda", "bytes_to_use": 16 * row_bytes, "staging_bytes": 8 * row_bytes})
    return BlockStore(Rows.of_view(memoryview(primary)), config), primary


@fact("F1-3", "a lost context answers with its error, and the process lives")
def the_process_survives_a_lost_context(bench: Bench) -> Seen:
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", _LOST], cwd=ROOT, capture_output=True, text=True)
    said = ran.stdout.strip().splitlines()
    alive = ran.returncode == 0 and said[-1:] == ["alive"]
    return alive, "; ".join(said) if alive else f"exit status {ran.returncode}: {ran.stderr.strip()[-300:]}"
