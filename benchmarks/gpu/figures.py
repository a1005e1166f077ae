"""What the CUDA engine reaches on a device: rates, costs, and what others on the device lose. No vLLM.

A figure is a function of a Bench, or of a pool; it returns what the report keeps, by name, and says its unit in the
name. Rates are GB/s of 10^9 bytes.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from async_tier.block_store import BlockStore
from async_tier.text import format_size
from benchmarks.gpu import EMULATED
from benchmarks.gpu.device import MIB, VOLUME, Bench, scattered
from benchmarks.shared.stores import opened, until
from tests.rows import zero_rows

# KV of 16 tokens of a model of 8B parameters: two bytes, K and V, 32 layers, 8 heads of 128.
ROW_BYTES = 64 << 10 if EMULATED else 2 * MIB
ROWS = VOLUME // ROW_BYTES
JOB_ROWS = 32
JOB_SIZES = [MIB, 4 * MIB] if EMULATED else [2 * MIB, 8 * MIB, 32 * MIB, 128 * MIB, 512 * MIB]
POLLED_EVERY_MS = (10, 50, 200)
SCATTERED_ROWS, SCATTERED_BYTES = (256, 4 << 10) if EMULATED else (4096, 64 << 10)
OTHER_STREAMS = 16
# Of memory that is pinned while somebody else launches kernels.
PINNED_BYTES = 8 * MIB if EMULATED else 4 << 30
ROUNDS = 3


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# --------------------------------------------------------------------------------------------------------- raw copies


def raw_rates(bench: Bench) -> dict[str, float]:
    """Raw pinned copies: each direction alone, and each while both run."""
    with bench.rig(2 * VOLUME) as rig:
        rig.host[:] = 1

        def to_device() -> None:
            bench.copy_in_chunks(rig.device, rig.at, VOLUME, rig.stream)

        def to_host() -> None:
            bench.copy_in_chunks(rig.at + VOLUME, rig.device + VOLUME, VOLUME, rig.other)

        def both() -> None:
            to_device()
            to_host()
            bench.synchronize(rig.stream)

        rates = {
            "host to device": (to_device, rig.stream),
            "device to host": (to_host, rig.other),
            "each, both at once": (both, rig.other),
        }
        for call, stream in rates.values():
            bench.timed(call, stream)
        return {
            name: statistics.median(VOLUME / bench.timed(call, stream)[1] / 1e9 for _ in range(ROUNDS))
            for name, (call, stream) in rates.items()
        }


def calls_us(bench: Bench) -> dict[str, float]:
    """Microseconds of the host's time that calls of the driver take, on an idle device."""
    count, entries = 200, 32
    with bench.rig(4 * MIB) as rig:
        event, ours = torch.cuda.Event(enable_timing=True), torch.cuda.ExternalStream(rig.stream)
        calls: dict[str, Callable[[], object]] = {
            "cuMemcpyAsync of 4 KiB": lambda: bench.copy(rig.device, rig.at, 4096, rig.stream),
            f"batch of {entries} x 4 KiB": bench.prepared_batch(scattered(rig.device, rig.at, entries), rig.stream),
            "event record": lambda: event.record(ours),
            "event query": event.query,
            "stream wait event": lambda: ours.wait_event(event),
            "stream query": lambda: bench.is_idle(rig.stream),
        }
        took = {}
        for name, call in calls.items():
            call()
            took[name] = seconds_of(lambda call=call: [call() for _ in range(count)]) / count * 1e6
        return took


def launch_queue(bench: Bench) -> dict[str, float]:
    """How many copies a stream takes before a call blocks, and how long that takes, behind large copies."""
    took: list[float] = []
    with bench.rig(VOLUME) as rig:
        for _ in range(4):
            bench.copy(rig.device, rig.at, VOLUME, rig.stream)
        while len(took) < 4096 and max(took, default=0) <= 1000:
            took.append(seconds_of(lambda: bench.copy(rig.device, rig.at, 4096, rig.stream)) * 1e6)
    return {
        "calls until one took 1 ms": float(len(took)),
        "median us": statistics.median(took),
        "longest us": max(took),
    }


def pieces(bench: Bench) -> dict[str, float]:
    """GB/s of one direction by the bytes of a copy, an event for each, as the tier's pieces are."""
    rates = {}
    with bench.rig(VOLUME) as rig:
        rig.host[:] = 1
        for size in (VOLUME // 256, VOLUME // 128, VOLUME // 64, VOLUME // 16):

            def run(size: int = size) -> None:
                for at in range(0, VOLUME, size):
                    bench.copy(rig.device + at, rig.at + at, size, rig.stream)
                    bench.do("cuEventRecord", rig.event, rig.stream)

            bench.timed(run, rig.stream)
            rates[f"pieces of {format_size(size)}"] = VOLUME / bench.timed(run, rig.stream)[1] / 1e9
    return rates


def pinning(bench: Bench) -> dict[str, float]:
    """Pinning and unpinning, in s/GB, and what launching somebody else's kernel takes meanwhile, in us."""
    small = torch.zeros(1, device="cuda")
    seconds: dict[str, float] = {}

    def launch() -> float:
        started = time.perf_counter()
        small.zero_()
        torch.cuda.current_stream().synchronize()
        return (time.perf_counter() - started) * 1e6

    def pin(part: int, address: int) -> None:
        ranges = [address + at for at in range(0, PINNED_BYTES, part)]
        with bench.context:
            seconds["pin"] = seconds_of(lambda: [bench.driver.register(each, part) for each in ranges])
            seconds["unpin"] = seconds_of(lambda: [bench.driver.unregister(each) for each in ranges])

    quiet = [launch() for _ in range(1000)]
    report = {"launch alone us": statistics.median(quiet), "launch alone, longest us": max(quiet)}
    for part, is_populated in ((16 * MIB, True), (256 * MIB, True), (256 * MIB, False)):
        name = f"in {part // MIB} MiB, {'' if is_populated else 'not '}populated"
        memory = zero_rows(1, PINNED_BYTES)[0]
        if is_populated:
            memory[::4096] = 1
        thread = threading.Thread(target=pin, args=(min(part, PINNED_BYTES // 2), memory.ctypes.data))
        thread.start()
        took = [launch()]
        while thread.is_alive():
            took.append(launch())
        thread.join()
        report |= {f"{what} {name}, s/GB": each / PINNED_BYTES * 1e9 for what, each in seconds.items()}
        for what, each in zip(("median", "99th", "longest"), np.percentile(took, (50, 99, 100)), strict=True):
            report[f"launch while {name}, {what} us"] = float(each)
    return report


# ------------------------------------------------------------------------------------------------------------ the tier


def key(row: int, turn: int = 0) -> bytes:
    return b"%d %d" % (turn, row)


def keys_of(count: int, turn: int = 0) -> list[bytes]:
    return [key(row, turn) for row in range(count)]


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


def rates(store: BlockStore, every_s: float = 0.0, rounds: int = ROUNDS) -> dict[str, float]:
    """GB/s of jobs of 32 rows in random order."""
    draw = np.random.default_rng(3)
    took: dict[str, list[float]] = {"store": [], "load": []}
    for turn in range(rounds):
        keys = keys_of(ROWS, turn)
        took["store"].append(end_all(store, store.submit_store, keys, draw.permutation(ROWS).tolist(), every_s))
        store.end_step()
        took["load"].append(end_all(store, store.submit_load, keys, draw.permutation(ROWS).tolist(), every_s))
        store.clear()
    return {name: ROWS * ROW_BYTES / statistics.median(each) / 1e9 for name, each in took.items()}


def tier_rates(pool: str) -> dict[str, float]:
    with opened(pool, ROWS, ROW_BYTES) as store:
        return rates(store)


def polled_seldom(pool: str) -> dict[str, dict[str, float]]:
    """GB/s where the scheduler polls only once in so many ms, as vLLM does."""
    with opened(pool, ROWS, ROW_BYTES) as store:
        return {f"every {every} ms": rates(store, every / 1e3, 1) for every in POLLED_EVERY_MS}


def job_s(store: BlockStore, submit: Callable[..., None], keys: list[bytes], rows: Sequence[int]) -> tuple[float, ...]:
    """Seconds of a job's submit, and until its end is seen, on a store that has no other."""
    started = time.perf_counter()
    submit(1, keys, rows)
    submitted = time.perf_counter() - started
    until(store.poll, "the job ended")
    return submitted, time.perf_counter() - started


def jobs_alone(pool: str) -> dict[str, dict[str, float]]:
    """One job at a time, by its bytes: ms from submit to its end seen, and GB/s."""
    report = {}
    with opened(pool, max(JOB_SIZES) // ROW_BYTES, ROW_BYTES) as store:
        for size in JOB_SIZES:
            count = max(1, size // ROW_BYTES)
            took: dict[str, list[float]] = {"store": [], "load": []}
            for turn in range(2 * ROUNDS):
                store.clear()
                for name, submit in (("store", store.submit_store), ("load", store.submit_load)):
                    took[name].append(job_s(store, submit, keys_of(count, turn), range(count))[1])
            for name, each in took.items():
                median = statistics.median(each)
                moved = count * ROW_BYTES
                report[f"{name} {format_size(moved)}"] = {"ms": median * 1e3, "gb_s": moved / median / 1e9}
    return report


def scattered_rows(pool: str) -> dict[str, float]:
    """A job of 4,096 rows of 64 KiB in random order: us that submitting takes, GB/s of it."""
    report = {}
    with opened(pool, SCATTERED_ROWS, SCATTERED_BYTES) as store:
        order = np.random.default_rng(1).permutation(SCATTERED_ROWS).tolist()
        for name, submit in (("store", store.submit_store), ("load", store.submit_load)):
            submitted, ended = job_s(store, submit, keys_of(SCATTERED_ROWS), order)
            report[f"{name}, submit us"] = submitted * 1e6
            report[f"{name}, GB/s"] = SCATTERED_ROWS * SCATTERED_BYTES / ended / 1e9
    return report


def submits_us(pool: str) -> dict[str, float]:
    """Microseconds of a submit of 32 blocks, by the bytes of the job."""
    report = {}
    for size in JOB_SIZES[1:]:
        with opened(pool, JOB_ROWS, size // JOB_ROWS) as store:
            took: dict[str, list[float]] = {"store": [], "load": []}
            for turn in range(2 * ROUNDS):
                for name, submit in (("store", store.submit_store), ("load", store.submit_load)):
                    took[name].append(job_s(store, submit, keys_of(JOB_ROWS, turn), range(JOB_ROWS))[0] * 1e6)
                store.clear()
        report |= {f"{name} {format_size(size)}": statistics.median(each) for name, each in took.items()}
    return report


def load_behind_stores(pool: str) -> dict[str, float]:
    """A load of 32 rows, alone and behind 1 GiB of stores: ms until its end is seen, the store polled all the time."""
    wanted, rows = keys_of(JOB_ROWS, -1), range(JOB_ROWS)
    with opened(pool, ROWS + JOB_ROWS, ROW_BYTES) as store:
        job_s(store, store.submit_store, wanted, rows)

        def load() -> None:
            store.submit_load(3, wanted, rows)
            until(lambda: any(end.job_id == 3 for end in store.poll()), "the load ended")

        alone = statistics.median(seconds_of(load) for _ in range(ROUNDS))
        started = time.perf_counter()
        store.submit_store(2, keys_of(ROWS), range(ROWS))
        behind = seconds_of(load)
        store.drain()
        whole = time.perf_counter() - started
    return {"alone ms": alone * 1e3, "behind ms": behind * 1e3, "the stores ms": whole * 1e3}


def compute_loss(pool: str) -> dict[str, float]:
    """How much longer kernels take while the tier stores and loads, one batch of kernels always queued ahead."""
    if EMULATED:  # no kernels there but these
        work: Callable[[], Any] = torch.zeros(MIB, device="cuda").zero_
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

    alone, beside, rate = [], [], []
    with opened(pool, ROWS, ROW_BYTES) as store:
        copying = Copying(store)
        compute(lambda: None)
        for _ in range(ROUNDS):
            alone.append(compute(lambda: None))
            copying.moved = 0
            beside.append(compute(copying.go_on))
            rate.append(copying.moved / beside[-1] / 1e9)
            store.drain()
            store.poll()
    return {"loss": statistics.median(beside) / statistics.median(alone) - 1, "GB/s meanwhile": statistics.median(rate)}


class Copying:
    """A full store of which four jobs, stores and loads, are always under way; `moved` counts bytes."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._keys = keys_of(ROWS)
        self._job = ROWS
        self.moved = 0
        end_all(store, store.submit_store, self._keys, range(ROWS))

    def go_on(self) -> None:
        store = self._store
        self.moved += sum(end.bytes for end in store.poll())
        if store.statistics().jobs_in_flight >= 4:
            return
        self._job += 1
        first = (self._job * JOB_ROWS) % max(1, ROWS - JOB_ROWS)
        keys, rows = self._keys[first : first + JOB_ROWS], range(first, first + JOB_ROWS)
        if self._job % 2:
            store.submit_load(self._job, keys, rows)
        else:
            store.index.drop(keys)
            store.submit_store(self._job, keys, rows)


def beside_other_streams(pool: str) -> dict[str, float]:
    """GB/s of the tier while 16 other streams each have kernels and small copies queued."""
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

    with opened(pool, ROWS, ROW_BYTES) as store:
        thread = threading.Thread(target=keep_busy)
        thread.start()
        try:
            return rates(store, rounds=1)
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
TIER: dict[str, Callable[[str], dict[str, Any]]] = {
    "rates, GB/s": tier_rates,
    "jobs alone": jobs_alone,
    "polled seldom, GB/s": polled_seldom,
    "scattered rows": scattered_rows,
    "submits of 32 blocks, us": submits_us,
    "a load behind stores": load_behind_stores,
    "compute": compute_loss,
    "beside 16 other streams, GB/s": beside_other_streams,
}
