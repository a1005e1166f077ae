"""What there is to check on the day there is a GPU: `make gpu-check`, some minutes.

Three parts: the facts that the CUDA engine and its emulator take from NVIDIA's documentation (the numbers are those of
tests/cuda_emulator/README.md), the tier's contract on the device, and figures: copy rates as ratios of raw pinned
copies in the same run, what a submit costs, what compute loses while copies run. Exits with 1 if a fact or the contract
is not as expected.

With ASYNC_TIER_CUDA=emulated it runs on the emulator, which shows that it runs; its figures mean nothing there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EMULATED = os.environ.get("ASYNC_TIER_CUDA") == "emulated"
if EMULATED:  # before anything imports torch
    from tests import cuda_emulator

    emulator = cuda_emulator.load()

import numpy as np
import torch

from async_tier.arena import Rows
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig, format_size
from async_tier.streams.cuda_driver import ALREADY_REGISTERED, CudaError, DeviceContext, Driver
from tests.helpers import zero_rows

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
# Bytes that a figure moves: enough for half a second on a GPU.
VOLUME = 16 * MIB if EMULATED else 1 << 30
ROW_BYTES = 64 << 10 if EMULATED else MIB
# A row of the largest submit.
SUBMIT_SIZES = [MIB, 4 * MIB, 16 * MIB] if EMULATED else [MIB, 16 * MIB, 128 * MIB, 1 << 30]
SUBMIT_BLOCKS = 32
ROUNDS = 3
COPY_CHUNK = 16 * MIB
# A call that returns within this share of the time its copies take has not waited for them.
ASYNCHRONOUS = 0.2
INVALID_VALUE, INVALID_CONTEXT, NOT_READY = 1, 201, 600


class Bench:
    """A device, a stream, and pinned memory, by the driver alone."""

    def __init__(self) -> None:
        torch.cuda.init()
        self.driver = Driver()
        self.library = self.driver._library
        self.context = DeviceContext(self.driver, torch.cuda.current_device())

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

    def synchronize(self, stream: int) -> None:
        self.driver._check("cuStreamSynchronize", self.library.cuStreamSynchronize(ctypes.c_void_p(stream)))

    def copy(self, destination: int, source: int, size: int, stream: int) -> None:
        self.driver._check("cuMemcpyAsync", self.driver._copy(destination, source, size, stream))

    def timed(self, call: Callable[[], None], stream: int) -> tuple[float, float]:
        """(seconds until `call` returned, seconds until the stream was empty)."""
        started = time.perf_counter()
        call()
        returned = time.perf_counter() - started
        self.synchronize(stream)
        return returned, time.perf_counter() - started


# --------------------------------------------------------------------------------------------------------------- facts


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


def fact_pageable_blocks(bench: Bench) -> tuple[bool, str]:
    pageable = np.zeros(VOLUME, dtype=np.uint8)
    with bench.device(VOLUME) as device, bench.stream() as stream:
        returned, done = bench.timed(lambda: bench.copy(pageable.ctypes.data, device, VOLUME, stream), stream)
    return returned > done / 2, f"device to host returned after {returned / done:.1%} of the copy's time"


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


def fact_one_page_in_two_registrations(bench: Bench) -> tuple[bool, str]:
    memory = zero_rows(1, 4 * MIB)[0]
    bench.driver.register(memory.ctypes.data, MIB + 100)
    code = _code(lambda: bench.driver.register(memory.ctypes.data + MIB + 100, MIB))
    bench.driver.unregister(memory.ctypes.data)
    if code == 0:
        bench.driver.unregister(memory.ctypes.data + MIB + 100)
    return True, f"code {code}; the tier's ranges share no page, so either is fine"


def fact_no_context(bench: Bench) -> tuple[bool, str]:
    import threading

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
        for chunk in range(0, VOLUME, COPY_CHUNK):
            bench.copy(device + chunk, host.ctypes.data + chunk, min(COPY_CHUNK, VOLUME - chunk), one)
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


def fact_loads_wait_behind_stores_in_flight(bench: Bench) -> tuple[bool, str]:
    with (
        bench.pinned(VOLUME + MIB) as host,
        bench.device(VOLUME + MIB) as device,
        bench.stream() as stores,
        bench.stream() as loads,
    ):
        alone = bench.timed(lambda: bench.copy(device + VOLUME, host.ctypes.data + VOLUME, MIB, loads), loads)[1]
        started = time.perf_counter()
        for chunk in range(0, VOLUME, COPY_CHUNK):
            bench.copy(device + chunk, host.ctypes.data + chunk, min(COPY_CHUNK, VOLUME - chunk), stores)
        behind = bench.timed(lambda: bench.copy(device + VOLUME, host.ctypes.data + VOLUME, MIB, loads), loads)[1]
        bench.synchronize(stores)
        whole = time.perf_counter() - started
    seen = f"1 MiB took {alone * 1e3:.2f} ms alone, {behind * 1e3:.2f} ms behind {format_size(VOLUME)} "
    return True, seen + f"({whole * 1e3:.2f} ms); the tier bounds what is ahead, so either is fine"


_LOST = """
import os, sys
if os.environ.get("ASYNC_TIER_CUDA") == "emulated":
    from tests import cuda_emulator
    emulator = cuda_emulator.load()
import torch
from benchmarks.gpu_check import small_store
from async_tier.streams.cuda_driver import CudaError
store, primary = small_store()
store.submit_store(1, [b"a"], [0]); store.drain(); assert [end.success for end in store.poll()] == [True]
if os.environ.get("ASYNC_TIER_CUDA") == "emulated":
    emulator.inject("exec_h2d", 1, 700, asynchronous=True)
    try:
        torch.zeros(4).pin_memory().to("cuda", non_blocking=True); torch.cuda.synchronize()
    except RuntimeError:
        pass
else:
    try:  # an index out of range: a device-side assertion, which the context does not survive
        torch.zeros(4, device="cuda")[torch.tensor([1 << 40], device="cuda")]; torch.cuda.synchronize()
    except RuntimeError:
        pass
with store._engine.context:
    try:
        store._engine.driver.is_idle(store._engine.load_stream.handles[0]); print("cuStreamQuery says nothing")
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


def small_store() -> tuple[BlockStore, np.ndarray]:
    """A store of a few rows, and its primary."""
    primary = zero_rows(16, ROW_BYTES)
    config = TierConfig.parse({"engine": "cuda", "bytes_to_use": 16 * ROW_BYTES, "staging_bytes": 8 * ROW_BYTES})
    return BlockStore(Rows.of_view(memoryview(primary)), config), primary


FACTS: dict[str, tuple[str, Callable[[Bench], tuple[bool, str]]]] = {}


# ------------------------------------------------------------------------------------------------------------- figures


def raw_rates(bench: Bench) -> dict[str, float]:
    """GB/s of raw pinned copies: each direction alone, and each while both run."""
    with (
        bench.pinned(VOLUME) as up,
        bench.pinned(VOLUME) as down,
        bench.device(VOLUME) as target,
        bench.device(VOLUME) as source,
        bench.stream() as one,
        bench.stream() as two,
    ):

        def to_device() -> None:
            for chunk in range(0, VOLUME, COPY_CHUNK):
                bench.copy(target + chunk, up.ctypes.data + chunk, min(COPY_CHUNK, VOLUME - chunk), one)

        def to_host() -> None:
            for chunk in range(0, VOLUME, COPY_CHUNK):
                bench.copy(down.ctypes.data + chunk, source + chunk, min(COPY_CHUNK, VOLUME - chunk), two)

        def both() -> None:
            to_device()
            to_host()
            bench.synchronize(one)

        rates = {
            "host to device": (to_device, one),
            "device to host": (to_host, two),
            "each, both at once": (both, two),
        }
        return {
            name: statistics.median(VOLUME / bench.timed(call, stream)[1] / 1e9 for _ in range(ROUNDS))
            for name, (call, stream) in rates.items()
        }


def run_jobs(store: BlockStore, submit: Callable[..., None], keys: list[bytes], rows: list[int]) -> float:
    """Seconds until jobs of 32 blocks have all ended, polled as an idle scheduler does."""
    started = time.perf_counter()
    jobs = range(0, len(keys), SUBMIT_BLOCKS)
    for job in jobs:
        submit(job, keys[job : job + SUBMIT_BLOCKS], rows[job : job + SUBMIT_BLOCKS])
    ended = 0
    while ended < len(jobs):
        for end in store.poll():
            assert end.success
            ended += 1
    return time.perf_counter() - started


def tier_rates(pool: str) -> dict[str, float]:
    """GB/s of the tier: stores and loads of rows in random order."""
    count = VOLUME // ROW_BYTES
    primary = zero_rows(count, ROW_BYTES)
    options = {"engine": "cuda", "pool": pool, "bytes_to_use": VOLUME}
    store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))
    if store.statistics().engine != "cuda":
        raise SystemExit("CUDA refused to pin the memory of this check: see the warning above")
    while store._arena.ready < count:
        time.sleep(0.01)
    draw = np.random.default_rng(3)
    stores, loads = [], []
    for turn in range(ROUNDS):
        keys = [b"%d %d" % (turn, row) for row in range(count)]
        stores.append(run_jobs(store, store.submit_store, keys, draw.permutation(count).tolist()))
        store.end_step()
        loads.append(run_jobs(store, store.submit_load, keys, draw.permutation(count).tolist()))
        store.clear()
    store.close()
    return {name: VOLUME / statistics.median(took) / 1e9 for name, took in (("store", stores), ("load", loads))}


def submit_times(pool: str) -> dict[int, tuple[float, float]]:
    """Microseconds of a submit_store and a submit_load of 32 blocks, by the bytes of the job."""
    times = {}
    for size in SUBMIT_SIZES:
        row_bytes = size // SUBMIT_BLOCKS
        primary = zero_rows(SUBMIT_BLOCKS, row_bytes)
        options = {"engine": "cuda", "pool": pool, "bytes_to_use": size}
        store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))
        while store._arena.ready < SUBMIT_BLOCKS:
            time.sleep(0.01)
        took: dict[str, list[float]] = {"store": [], "load": []}
        for turn in range(2 * ROUNDS):
            keys = [b"%d %d" % (turn, row) for row in range(SUBMIT_BLOCKS)]
            for name, submit in (("store", store.submit_store), ("load", store.submit_load)):
                started = time.perf_counter()
                submit(1, keys, range(SUBMIT_BLOCKS))
                took[name].append((time.perf_counter() - started) * 1e6)
                store.drain()
                store.poll()
            store.clear()
        times[size] = (statistics.median(took["store"]), statistics.median(took["load"]))
        store.close()
    return times


def compute_loss(pool: str) -> float:
    """How much longer a fixed amount of compute takes while the tier stores and loads without a pause."""
    count = VOLUME // ROW_BYTES
    primary = zero_rows(count, ROW_BYTES)
    options = {"engine": "cuda", "pool": pool, "bytes_to_use": VOLUME}
    store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))
    while store._arena.ready < count:
        time.sleep(0.01)
    if EMULATED:  # no kernels there but these
        matrix = torch.zeros(MIB, device="cuda")
        work: Callable[[], Any] = matrix.zero_
        batches, each = 5, 1
    else:
        matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
        work = lambda: matrix @ matrix  # noqa: E731
        batches, each = 20, 20

    def compute(between: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(batches):
            for _ in range(each):
                work()
            event = torch.cuda.Event()
            event.record()
            while not event.query():
                between()
        return time.perf_counter() - started

    keys = [b"%d" % row for row in range(count)]
    store.submit_store(0, keys, range(count))
    store.drain()
    store.poll()
    jobs = iter(range(1, 1 << 30))

    def keep_copying() -> None:
        store.poll()
        if store.statistics().jobs_in_flight < 4:
            job = next(jobs)
            first = (job * SUBMIT_BLOCKS) % (count - SUBMIT_BLOCKS)
            part = keys[first : first + SUBMIT_BLOCKS]
            rows = range(first, first + SUBMIT_BLOCKS)
            if job % 2:
                store.submit_load(job, part, rows)
            else:
                store._index.drop(part)
                store.submit_store(job, part, rows)

    compute(lambda: None)
    alone, beside = [], []
    for _ in range(ROUNDS):
        alone.append(compute(lambda: None))
        beside.append(compute(keep_copying))
        store.drain()
        store.poll()
    store.close()
    return statistics.median(beside) / statistics.median(alone) - 1


# ---------------------------------------------------------------------------------------------------------------- main


def _code(call: Callable[[], object]) -> int:
    """The driver's code for a call: 0 if it was taken."""
    try:
        call()
    except CudaError as error:
        return error.code
    return 0


def contract() -> tuple[bool, str]:
    """The tier's contract, on the device (emulated, `make test-cuda` runs it already)."""
    if EMULATED:
        return True, "is what `make test-cuda` runs"
    environment = {**os.environ, "ASYNC_TIER_CUDA": "real"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "contract", "tests/test_manager.py", "tests/test_oracle.py"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return ran.returncode == 0, ran.stdout.strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU in this process")
    bench = Bench()
    note = "EMULATED: the figures below mean nothing" if EMULATED else "a GPU"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__} ({note})\n\nfacts")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "emulated": EMULATED, "facts": {}}
    good = True
    with bench.context:
        for number, (name, check) in FACTS.items():
            right, seen = check(bench)
            good &= right
            report["facts"][number] = {"fact": name, "as_expected": right, "seen": seen}
            print(f"  {'ok   ' if right else 'WRONG'} {number:4} {name}: {seen}", flush=True)
    right, seen = contract()
    good &= right
    report["contract"] = {"as_expected": right, "seen": seen}
    print(f"\n{'ok   ' if right else 'WRONG'} the tier's contract: {seen}\n", flush=True)
    with bench.context:
        raw = raw_rates(bench)
    report["raw_gb_s"] = raw
    print("raw pinned copies, GB/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in raw.items()))
    for pool in ("host", f"cuda:{torch.cuda.current_device()}"):
        rates = tier_rates(pool)
        # Through the staging ring every byte goes both ways at once; into device memory only one.
        physical = (
            {"store": raw["each, both at once"], "load": raw["each, both at once"]}
            if pool == "host"
            else {"store": raw["host to device"], "load": raw["device to host"]}
        )
        submits = submit_times(pool)
        loss = compute_loss(pool)
        report[f"pool {pool}"] = {
            "gb_s": rates,
            "of_raw": {name: rates[name] / physical[name] for name in rates},
            "submit_us": {str(size): times for size, times in submits.items()},
            "compute_loss": loss,
        }
        print(f"\npool {pool}")
        for name in rates:
            print(f"  {name:5} {rates[name]:6.1f} GB/s, {rates[name] / physical[name]:.2f} of raw")
        for size, (store_us, load_us) in submits.items():
            print(f"  submitting {format_size(size):9} store {store_us:6.0f} us, load {load_us:6.0f} us")
        print(f"  compute takes {loss:+.1%} while copies run", flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\nall as expected" if good else "\nNOT AS EXPECTED: see above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
