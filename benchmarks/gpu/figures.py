"""What the CUDA engine reaches on a device: rates, costs, and what others on the device lose. No vLLM.

A figure is a function of a Bench, or of a Bench and a pool; it returns what the report keeps, by name, and says
its unit in the name. Rates are GB/s of 10^9 bytes.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.streams.rows import Rows
from async_tier.text import format_size
from benchmarks.gpu.facts import EMULATED, MIB, VOLUME, Bench
from tests.rows import zero_rows

# KV of 16 tokens of a model of 8B parameters: two bytes, K and V, 32 layers, 8 heads of 128.
ROW_BYTES = 64 << 10 if EMULATED else 2 * MIB
JOB_ROWS = 32
JOB_SIZES = [MIB, 4 * MIB] if EMULATED else [2 * MIB, 8 * MIB, 32 * MIB, 128 * MIB, 512 * MIB]
POLLED_EVERY_MS = (10, 50, 200)
SCATTERED_ROWS, SCATTERED_BYTES = (256, 4 << 10) if EMULATED else (4096, 64 << 10)
OTHER_STREAMS = 16
# Of memory that is pinned while somebody else launches kernels.
PINNED_BYTES = 8 * MIB if EMULATED else 4 << 30
ROUNDS = 3
# Far beyond what anything here takes.
PATIENCE_S = 30


@contextmanager
def opened(pool: str, count: int, row_bytes: int) -> Iterator[BlockStore]:
    """A store of `count` rows over a primary of as many, all pinned."""
    primary = zero_rows(count, row_bytes)
    primary[:] = 1  # memory that was never written is one page of zeros
    options = {"engine": "cuda", "pool": pool, "bytes_to_use": count * row_bytes}
    store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))
    try:
        if store.statistics().engine != "cuda":
            raise RuntimeError("CUDA refused to pin the memory of this check: see the warning above")
        until(lambda: store.arena.ready == count, "all of the tier's memory is pinned")
        yield store
    finally:
        store.close()


def until(condition: Callable[[], object], what: str) -> None:
    """Ask without a pause, as an idle scheduler does; a part that gets nowhere must not keep the others from it."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE_S} s: {what}")


def key(row: int, turn: int = 0) -> bytes:
    return b"%d %d" % (turn, row)


def fill(store: BlockStore, count: int) -> None:
    """Store rows 0 to `count`, under the keys of turn 0."""
    end_all(store, store.submit_store, [key(row) for row in range(count)], list(range(count)))


def end_all(
    store: BlockStore, submit: Callable[..., None], keys: list[bytes], rows: Sequence[int], every_s: float = 0.0
) -> float:
    """Seconds until jobs of 32 blocks have all ended, polled as an idle scheduler does, or every so many seconds."""
    started = time.perf_counter()
    jobs = range(0, len(keys), JOB_ROWS)
    for job in jobs:
        submit(job, keys[job : job + JOB_ROWS], rows[job : job + JOB_ROWS])
    open_jobs = set(jobs)

    def is_over() -> bool:
        time.sleep(every_s)
        for end in store.poll():
            if not end.success:
                raise RuntimeError(f"job {end.job_id} failed: {end.reason}")
            open_jobs.remove(end.job_id)
        return not open_jobs

    until(is_over, "the jobs ended")
    return time.perf_counter() - started


def _rates(
    store: BlockStore, count: int, row_bytes: int, every_s: float = 0.0, rounds: int = ROUNDS
) -> dict[str, float]:
    draw = np.random.default_rng(3)
    took: dict[str, list[float]] = {"store": [], "load": []}
    for turn in range(rounds):
        keys = [key(row, turn) for row in range(count)]
        took["store"].append(end_all(store, store.submit_store, keys, draw.permutation(count).tolist(), every_s))
        store.end_step()
        took["load"].append(end_all(store, store.submit_load, keys, draw.permutation(count).tolist(), every_s))
        store.clear()
    return {name: count * row_bytes / statistics.median(each) / 1e9 for name, each in took.items()}


# --------------------------------------------------------------------------------------------------------- raw copies


def raw_rates(bench: Bench) -> dict[str, float]:
    """Raw pinned copies: each direction alone, and each while both run."""
    with (
        bench.pinned(VOLUME) as up,
        bench.pinned(VOLUME) as down,
        bench.device(VOLUME) as target,
        bench.device(VOLUME) as source,
        bench.stream() as one,
        bench.stream() as two,
    ):
        up[:], down[:] = 1, 2

        def to_device() -> None:
            bench.copy_in_chunks(target, up.ctypes.data, VOLUME, one)

        def to_host() -> None:
            bench.copy_in_chunks(down.ctypes.data, source, VOLUME, two)

        def both() -> None:
            to_device()
            to_host()
            bench.synchronize(one)

        rates = {
            "host to device": (to_device, one),
            "device to host": (to_host, two),
            "each, both at once": (both, two),
        }
        for call, stream in rates.values():
            bench.timed(call, stream)
        return {
            name: statistics.median(VOLUME / bench.timed(call, stream)[1] / 1e9 for _ in range(ROUNDS))
            for name, (call, stream) in rates.items()
        }


def calls_us(bench: Bench) -> dict[str, float]:
    """Microseconds of the host's time that calls of the driver take, on an idle device."""
    count = 200

    def each(call: Callable[[], Any]) -> float:
        call()
        started = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - started) / count * 1e6

    with bench.pinned(4 * MIB) as host, bench.device(4 * MIB) as device, bench.stream() as stream:
        event = torch.cuda.Event(enable_timing=True)
        ours = torch.cuda.ExternalStream(stream)
        entries = 32
        sizes = np.full(entries, 4096, dtype=np.uint64)
        to = (device + 2 * 4096 * np.arange(entries)).astype(np.uint64)
        of = (host.ctypes.data + 2 * 4096 * np.arange(entries)).astype(np.uint64)
        return {
            "cuMemcpyAsync of 4 KiB": each(lambda: bench.copy(device, host.ctypes.data, 4096, stream)),
            f"batch of {entries} x 4 KiB": each(lambda: bench.driver.copy(to, of, sizes, stream)),
            "event record": each(lambda: event.record(ours)),
            "event query": each(event.query),
            "stream wait event": each(lambda: ours.wait_event(event)),
            "stream query": each(lambda: bench.driver.is_idle(stream)),
        }


def launch_queue(bench: Bench) -> dict[str, float]:
    """How many copies a stream takes before a call blocks, and how long that takes, behind large copies."""
    most = 4096
    with bench.pinned(VOLUME) as host, bench.device(VOLUME) as device, bench.stream() as stream:
        for _ in range(4):
            bench.copy(device, host.ctypes.data, VOLUME, stream)
        took = []
        for _ in range(most):
            started = time.perf_counter()
            bench.copy(device, host.ctypes.data, 4096, stream)
            took.append((time.perf_counter() - started) * 1e6)
            if took[-1] > 1000:
                break
    return {
        "calls until one took 1 ms": float(len(took)),
        "median us": statistics.median(took),
        "longest us": max(took),
    }


def pieces(bench: Bench) -> dict[str, float]:
    """GB/s of one direction by the bytes of a copy, one batch of copies an event, as the tier's pieces are."""
    rates = {}
    with bench.pinned(VOLUME) as host, bench.device(VOLUME) as device, bench.stream() as stream:
        host[:] = 1
        event = torch.cuda.Event()
        ours = torch.cuda.ExternalStream(stream)
        for size in (VOLUME // 256, VOLUME // 128, VOLUME // 64, VOLUME // 16):

            def run(size: int = size) -> None:
                for at in range(0, VOLUME, size):
                    bench.copy(device + at, host.ctypes.data + at, size, stream)
                    event.record(ours)

            bench.timed(run, stream)
            rates[f"pieces of {format_size(size)}"] = VOLUME / bench.timed(run, stream)[1] / 1e9
    return rates


def pinning(bench: Bench) -> dict[str, float]:
    """Pinning and unpinning, in s/GB, and what launching somebody else's kernel takes meanwhile, in us."""
    small = torch.zeros(1, device="cuda")

    def launches(during: threading.Thread | None) -> list[float]:
        took: list[float] = []
        while not took or (len(took) < 1000 if during is None else during.is_alive()):
            started = time.perf_counter()
            small.zero_()
            torch.cuda.current_stream().synchronize()
            took.append((time.perf_counter() - started) * 1e6)
        return took

    quiet = launches(None)
    seconds: dict[str, float] = {}
    report = {"launch alone us": statistics.median(quiet), "launch alone, longest us": max(quiet)}
    for name, part, populated in (
        ("in 16 MiB, populated", 16 * MIB, True),
        ("in 256 MiB, populated", 256 * MIB, True),
        ("in 256 MiB, not populated", 256 * MIB, False),
    ):
        part = min(part, PINNED_BYTES // 2)
        memory = zero_rows(1, PINNED_BYTES)[0]
        if populated:
            memory[::4096] = 1

        def pin(part: int = part, memory: np.ndarray = memory) -> None:
            with bench.context:
                started = time.perf_counter()
                for at in range(0, PINNED_BYTES, part):
                    bench.driver.register(memory.ctypes.data + at, part)
                pinned = time.perf_counter()
                for at in range(0, PINNED_BYTES, part):
                    bench.driver.unregister(memory.ctypes.data + at)
                seconds["pin"], seconds["unpin"] = pinned - started, time.perf_counter() - pinned

        thread = threading.Thread(target=pin)
        thread.start()
        took = launches(thread)
        thread.join()
        for what in ("pin", "unpin"):
            report[f"{what} {name}, s/GB"] = seconds[what] / PINNED_BYTES * 1e9
        report[f"launch while {name}, median us"] = statistics.median(took)
        report[f"launch while {name}, 99th us"] = float(np.percentile(took, 99))
        report[f"launch while {name}, longest us"] = max(took)
    return report


# ------------------------------------------------------------------------------------------------------------ the tier


def tier_rates(bench: Bench, pool: str) -> dict[str, float]:
    """Jobs of 32 rows in random order."""
    count = VOLUME // ROW_BYTES
    with opened(pool, count, ROW_BYTES) as store:
        return _rates(store, count, ROW_BYTES)


def jobs_alone(bench: Bench, pool: str) -> dict[str, dict[str, float]]:
    """One job at a time, by its bytes: ms from submit to its end seen, and GB/s."""
    report = {}
    count = max(JOB_SIZES) // ROW_BYTES or 1
    with opened(pool, count, ROW_BYTES) as store:
        for size in JOB_SIZES:
            rows = max(1, size // ROW_BYTES)
            for name, submit in (("store", store.submit_store), ("load", store.submit_load)):
                took = []
                for turn in range(2 * ROUNDS):
                    if name == "store":
                        store.clear()
                    keys = [key(row, turn if name == "store" else 2 * ROUNDS - 1) for row in range(rows)]
                    started = time.perf_counter()
                    submit(1, keys, range(rows))
                    until(store.poll, "the job ended")
                    took.append(time.perf_counter() - started)
                best = statistics.median(took)
                report[f"{name} {format_size(rows * ROW_BYTES)}"] = {
                    "ms": best * 1e3,
                    "gb_s": rows * ROW_BYTES / best / 1e9,
                }
            store.clear()
    return report


def polled_seldom(bench: Bench, pool: str) -> dict[str, dict[str, float]]:
    """GB/s where the scheduler polls only once in so many ms, as vLLM does."""
    count = VOLUME // ROW_BYTES
    with opened(pool, count, ROW_BYTES) as store:
        return {f"every {every} ms": _rates(store, count, ROW_BYTES, every / 1e3, 1) for every in POLLED_EVERY_MS}


def scattered(bench: Bench, pool: str) -> dict[str, float]:
    """A job of 4,096 rows of 64 KiB in random order: us that submitting takes, GB/s of it."""
    report = {}
    with opened(pool, SCATTERED_ROWS, SCATTERED_BYTES) as store:
        order = np.random.default_rng(1).permutation(SCATTERED_ROWS).tolist()
        keys = [key(row) for row in range(SCATTERED_ROWS)]
        for name, submit in (("store", store.submit_store), ("load", store.submit_load)):
            started = time.perf_counter()
            submit(1, keys, order)
            report[f"{name}, submit us"] = (time.perf_counter() - started) * 1e6
            until(store.poll, "the job ended")
            report[f"{name}, GB/s"] = SCATTERED_ROWS * SCATTERED_BYTES / (time.perf_counter() - started) / 1e9
    return report


def submits_us(bench: Bench, pool: str) -> dict[str, float]:
    """Microseconds of a submit of 32 blocks, by the bytes of the job."""
    report = {}
    for size in JOB_SIZES[1:]:
        row_bytes = size // JOB_ROWS
        with opened(pool, JOB_ROWS, row_bytes) as store:
            took: dict[str, list[float]] = {"store": [], "load": []}
            for turn in range(2 * ROUNDS):
                keys = [key(row, turn) for row in range(JOB_ROWS)]
                for name, submit in (("store", store.submit_store), ("load", store.submit_load)):
                    started = time.perf_counter()
                    submit(1, keys, range(JOB_ROWS))
                    took[name].append((time.perf_counter() - started) * 1e6)
                    store.drain()
                    store.poll()
                store.clear()
            for name, each in took.items():
                report[f"{name} {format_size(size)}"] = statistics.median(each)
    return report


def load_behind_stores(bench: Bench, pool: str) -> dict[str, float]:
    """A load of 32 rows, alone and behind 1 GiB of stores: ms until its end is seen, the store polled all the time."""
    count = VOLUME // ROW_BYTES
    with opened(pool, count + JOB_ROWS, ROW_BYTES) as store:
        wanted = [key(row, -1) for row in range(JOB_ROWS)]
        store.submit_store(1, wanted, range(JOB_ROWS))
        store.drain()
        store.poll()

        def load(job: int) -> float:
            started = time.perf_counter()
            store.submit_load(job, wanted, range(JOB_ROWS))
            until(lambda: any(end.job_id == job for end in store.poll()), "the load ended")
            return (time.perf_counter() - started) * 1e3

        alone = statistics.median(load(10 + turn) for turn in range(ROUNDS))
        started = time.perf_counter()
        store.submit_store(2, [key(row) for row in range(count)], range(count))
        behind = load(3)
        store.drain()
        whole = (time.perf_counter() - started) * 1e3
    return {"alone ms": alone, "behind ms": behind, "the stores ms": whole}


def compute_loss(bench: Bench, pool: str) -> dict[str, float]:
    """How much longer kernels take while the tier stores and loads, one batch of kernels always queued ahead."""
    count = VOLUME // ROW_BYTES
    if EMULATED:  # no kernels there but these
        matrix = torch.zeros(MIB, device="cuda")
        work: Callable[[], Any] = matrix.zero_
        batches, each = 5, 1
    else:
        matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
        product = torch.empty_like(matrix)
        work = lambda: torch.matmul(matrix, matrix, out=product)  # noqa: E731
        batches, each = 150, 20

    def compute(between: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        ahead: torch.cuda.Event | None = None
        for _ in range(batches):
            for _ in range(each):
                work()
            event = torch.cuda.Event()
            event.record()
            while ahead is not None and not ahead.query():
                between()
            ahead = event
        torch.cuda.synchronize()
        return time.perf_counter() - started

    with opened(pool, count, ROW_BYTES) as store:
        keys = [key(row) for row in range(count)]
        fill(store, count)
        jobs = iter(range(count, 1 << 30))
        moved = 0

        def keep_copying() -> None:
            nonlocal moved
            moved += sum(end.bytes for end in store.poll())
            if store.statistics().jobs_in_flight < 4:
                job = next(jobs)
                first = (job * JOB_ROWS) % max(1, count - JOB_ROWS)
                part, rows = keys[first : first + JOB_ROWS], range(first, first + JOB_ROWS)
                if job % 2:
                    store.submit_load(job, part, rows)
                else:
                    store.index.drop(part)
                    store.submit_store(job, part, rows)

        compute(lambda: None)
        alone, beside, rate = [], [], []
        for _ in range(ROUNDS):
            alone.append(compute(lambda: None))
            moved = 0
            beside.append(compute(keep_copying))
            rate.append(moved / beside[-1] / 1e9)
            store.drain()
            store.poll()
    return {"loss": statistics.median(beside) / statistics.median(alone) - 1, "GB/s meanwhile": statistics.median(rate)}


def beside_other_streams(bench: Bench, pool: str) -> dict[str, float]:
    """GB/s of the tier while 16 other streams each have kernels and small copies queued."""
    count = VOLUME // ROW_BYTES
    stop = threading.Event()

    def keep_busy() -> None:
        streams = [torch.cuda.Stream() for _ in range(OTHER_STREAMS)]
        tensors = [torch.zeros(MIB // 4, device="cuda") for _ in streams]
        while not stop.is_set():
            for stream, tensor in zip(streams, tensors, strict=True):
                with torch.cuda.stream(stream):
                    for _ in range(4):
                        tensor.zero_()
            for stream in streams:
                stream.synchronize()

    with ExitStack() as stack:
        store = stack.enter_context(opened(pool, count, ROW_BYTES))
        thread = threading.Thread(target=keep_busy)
        thread.start()
        try:
            return _rates(store, count, ROW_BYTES, rounds=1)
        finally:
            stop.set()
            thread.join()


RAW: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "raw pinned copies, GB/s": raw_rates,
    "calls of the driver, us": calls_us,
    "a stream's launch queue": launch_queue,
    "raw copies by their size, GB/s": pieces,
    "pinning": pinning,
}
TIER: dict[str, Callable[[Bench, str], dict[str, Any]]] = {
    "rates, GB/s": tier_rates,
    "jobs alone": jobs_alone,
    "polled seldom, GB/s": polled_seldom,
    "scattered rows": scattered,
    "submits of 32 blocks, us": submits_us,
    "a load behind stores": load_behind_stores,
    "compute": compute_loss,
    "beside 16 other streams, GB/s": beside_other_streams,
}
