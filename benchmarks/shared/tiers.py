"""The tiers that benchmarks compare, and the jobs that they give them: as vLLM's manager does."""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.example.manager import ExampleSecondaryTierManager
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from async_tier.manager import AsyncSecondaryTierManager

TMPFS = Path("/dev/shm")
# Tokens a block, for positions as vLLM notes them.
BLOCK_TOKENS = 16
# Blocks of a job unless said otherwise: 512 tokens.
JOB_BLOCKS = 32
# Enough that copy threads do not wait for the scheduler between two polls.
JOBS_IN_FLIGHT = 4
# Rounds of Python between two polls, some 0.1 ms: a scheduler that holds the GIL but for CPython's switches.
BUSY_ROUNDS = 2000
# The fs tier's folders are named by the first 20 bits of a hash. A tier that has run for long has made them all; a new
# one makes two for nearly every block, which is not what we compare with: keys share this many folders.
WARM_FOLDERS = 16


def block_keys(count: int) -> list[bytes]:
    """`count` random keys of 36 bytes as vLLM makes them: 32 of hash, 4 of KV group. See WARM_FOLDERS."""
    noise = os.urandom(32 * count)
    hashes = [noise[at : at + 32] for at in range(0, 32 * count, 32)]
    return [make_offload_key(bytes((each[0] % WARM_FOLDERS, 0, 0)) + each[3:], 0) for each in hashes]


def groups(keys: Sequence[bytes], size: int = JOB_BLOCKS) -> list[list[bytes]]:
    """`keys` by the job."""
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


def ours(stack: ExitStack, primary: np.ndarray, blocks: int, **options: Any) -> AsyncSecondaryTierManager:
    """Our tier over `primary`, with room for `blocks` blocks, shut down with `stack`."""
    size = blocks * primary.shape[1]
    tier = AsyncSecondaryTierManager(SimpleNamespace(), memoryview(primary), "async", bytes_to_use=size, **options)
    stack.callback(tier.shutdown)
    return tier


def example(stack: ExitStack, primary: np.ndarray) -> ExampleSecondaryTierManager:
    """vLLM's example tier, which keeps no data: the floor of bookkeeping."""
    tier = ExampleSecondaryTierManager(SimpleNamespace(), memoryview(primary), "example")
    stack.callback(tier.shutdown)
    return tier


class FileSystem:
    """vLLM's fs tier as it comes, on tmpfs; tier and folder are gone with `stack`."""

    def __init__(self, stack: ExitStack, primary: np.ndarray, tmpfs: Path = TMPFS) -> None:
        self._root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="async-tier-bench-", dir=tmpfs)))
        parallel = SimpleNamespace(
            tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, rank=0, world_size=1, is_parallelism_agnostic=True
        )
        config = SimpleNamespace(
            groups=(),
            canonical_layout=False,
            replicated_layout=False,
            parallel=parallel,
            model=SimpleNamespace(name="benchmark", dtype="bfloat16"),
            cache=SimpleNamespace(tokens_per_hash=BLOCK_TOKENS),
        )
        spec = SimpleNamespace(config=config, blocks_per_chunk=1)
        self.tier = FileSystemTierManager(spec, memoryview(primary), "fs", root_dir=str(self._root))
        stack.callback(self.tier.shutdown)
        self._kept: set[Path] = set()

    def keep_blocks(self) -> None:
        """`remove_blocks` is to spare those that are there now."""
        self._kept = set(self._root.rglob("*.bin"))

    def remove_blocks(self) -> None:
        """Give the memory of its files back; the folders stay."""
        for block in self._root.rglob("*.bin"):
            if block not in self._kept:
                block.unlink()


def submit(tier: Any, job: TransferJob) -> None:
    (tier.submit_load if job.is_promotion else tier.submit_store)(job)


def collect(tier: Any) -> int:
    """The number of jobs that have ended since the last call."""
    results = list(tier.get_finished_jobs())
    if failed := [result.job_id for result in results if not result.success]:
        raise RuntimeError(f"jobs {failed} of {type(tier).__name__} failed")
    return len(results)


def busy(rounds: int = BUSY_ROUNDS) -> int:
    """What the scheduler does between two polls: Python."""
    total = 0
    for number in range(rounds):
        total += number
    return total


def wait(tier: Any, count: int) -> None:
    """Until `count` jobs have ended, every one well. Busy in Python, as the scheduler's thread is."""
    while count:
        busy()
        count -= collect(tier)


def move(tier: Any, jobs: Sequence[TransferJob]) -> float:
    """Seconds to run `jobs`, JOBS_IN_FLIGHT at a time, on a thread that is busy in Python between polls."""
    for job in jobs:
        tier.on_new_request(job.req_context)
    waiting, in_flight = deque(jobs), 0
    started = time.perf_counter()
    while waiting or in_flight:
        while waiting and in_flight < JOBS_IN_FLIGHT:
            submit(tier, waiting.popleft())
            in_flight += 1
        busy()
        in_flight -= collect(tier)
    took = time.perf_counter() - started
    for job in jobs:
        tier.on_request_finished(job.req_context)
    return took


def timed(call: Callable[..., object], *arguments: object) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def submit_alone(tier: Any, job: TransferJob) -> float:
    """Seconds that the submission of a job takes; then its copies and its request end, untimed."""
    tier.on_new_request(job.req_context)
    took = timed(submit, tier, job)
    wait(tier, 1)
    tier.on_request_finished(job.req_context)
    return took


def end_step(tier: Any) -> None:
    tier.on_schedule_end(ScheduleEndContext(new_req_ids=(), preempted_req_ids=()))
