"""AsyncBlockStore: the tier for asyncio programs. No vLLM.

Everything runs on the event loop's thread; there is no lock.

- A job is in `_open` from its beginning until its end was polled, even if its await was cancelled. `drain` and `close`
  wait for that and not for futures: an error in polling is raised to those who await, but ends no job.
- A future in `_waiting` belongs to this class: awaits of it are shielded.
- A load of a key that is still being stored begins when the stores of that key have ended (`_storing`). BlockStore
  alone would fail the key and forget it, as suits vLLM, where the block is still in the primary.

Whenever a job has ended, the engine's threads write to an eventfd, which the event loop watches.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from async_tier import block_store
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.engines import RowMemory
from async_tier.jobs import Finished, Statistics
from async_tier.memory.pool_files import Identity
from async_tier.streams.base import CopyEngine
from async_tier.streams.rows import Rows

if TYPE_CHECKING:  # importing torch takes seconds, which programs without it need not pay
    import torch

# Pause before polling again after an error: jobs that have ended already signal no more.
RETRY_S = 1e-3


class TransferError(RuntimeError):
    """A store failed, for the reason in the message; the tier has forgotten its keys."""


class AsyncBlockStore:
    """A BlockStore whose jobs are awaited.

        primary = torch.zeros(64, 16, 8, 128, dtype=torch.bfloat16)  # 64 rows
        async with AsyncBlockStore(primary) as store:
            loaded = await store.load([b"first", b"second"], [0, 1], "request 7")
            ...  # compute what was not loaded, here the second
            await store.store([b"second"], [1], "request 7")
            store.finish_sequence("request 7")

    primary: an array, torch tensor or memoryview of shape (rows, ...) in host memory, of any type but objects, each row
    contiguous; its memory is kept until the store is closed. Or Rows, whose memory the caller keeps until then. torch
    does not tell whether a tensor's memory is writable: a load into read-only memory ends the process. Keys are bytes,
    rows are row numbers of the primary; both are read when the await begins, and may be changed afterwards.

    Sequences are as in BlockStore. Tasks that use the same name at the same time share the sequence, and its end.

    Cancelling an await does not cancel the copy: leave the rows alone until `drain` or `close` has returned. Only a
    load that still waits for a store of its keys is withdrawn.

    A store belongs to the event loop in which it was made. In another loop, awaited methods, `lookup` and
    `finish_sequence` raise RuntimeError; while it is closing, so do all but `close` and `finish_sequence`. Construction
    blocks the loop: the first time for a quarter of a second, to measure copy kernels; with CUDA while the primary is
    pinned. It raises as BlockStore does, and RuntimeError without a running loop. A store that nobody closes lives as
    long as its loop, and then warns (ResourceWarning).
    """

    def __init__(
        self,
        primary: Rows | memoryview | np.ndarray | torch.Tensor,
        config: TierConfig | None = None,
        *,
        engine: CopyEngine | None = None,
        arena: RowMemory | None = None,
        identity: Identity | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        # Keeps the memory that copies touch until the engine has ended; None if the caller does.
        self._memory: memoryview | None = None
        if not isinstance(primary, Rows):
            self._memory = _view_of(primary)
            primary = Rows.of_view(self._memory)
        self.block_store = BlockStore(primary, config, engine=engine, arena=arena, identity=identity)
        self._jobs = 0
        # By job, the keys that it stores; oldest job first.
        self._open: OrderedDict[int, Sequence[bytes]] = OrderedDict()
        # By key, the open jobs that store it.
        self._storing: dict[bytes, list[int]] = {}
        self._waiting: dict[int, asyncio.Future[Finished]] = {}
        # (a job, the future that is done when this and all older jobs have ended), oldest first.
        self._drains: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._closing: asyncio.Task[None] | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._retry: asyncio.Handle | None = None
        # A timer, because jobs that do not end never wake the loop.
        self._watch: asyncio.Handle | None = None
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._finalizer = weakref.finalize(self, _close_unclosed, self.block_store, self._eventfd, os.getpid())
        self.block_store.signal(self._eventfd)
        self._loop.add_reader(self._eventfd, self._on_signal)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def store(
        self, keys: Collection[bytes], rows: np.ndarray | Sequence[int], sequence: str | None = None
    ) -> int:
        """Copy primary rows `rows` (shape (n,)) into the tier under `keys` (n of them). Returns the bytes moved.

        They are fewer than given if keys were already stored or being stored, or if there was no room: an unfinished
        sequence evicts none of its own blocks. Raises TransferError if the store failed. Raises ValueError for rows out
        of range or not as many as the keys, and TypeError for keys that are not bytes; then nothing is stored.
        """
        keys, numbers = self._checked(keys, rows)
        job = self._begin(keys)
        end = await self._run(job, lambda: self.block_store.submit_store(job, keys, numbers, sequence))
        if not end.success:
            raise TransferError(f"the store of {len(keys)} blocks failed: {end.reason}")
        return end.bytes

    async def load(
        self, keys: Collection[bytes], rows: np.ndarray | Sequence[int], sequence: str | None = None
    ) -> tuple[bytes, ...]:
        """Copy the blocks under `keys` into primary rows `rows`. Returns the keys that were loaded, in the order given.

        Waits first for unfinished stores of these keys. Missing keys were not in the tier, or their load failed; the
        tier has forgotten them, and what is in their rows is undefined. Counts as a use by `sequence`. Raises
        ValueError and TypeError as `store` does.
        """
        keys, numbers = self._checked(keys, rows)
        job = self._begin()
        here: list[bytes] = []

        def submit() -> None:
            self.block_store.touch(keys, sequence)
            # A missing key is a normal answer here, not a failure to be logged.
            found = [at for at, key in enumerate(keys) if self.block_store.has(key)]
            here.extend(keys[at] for at in found)
            self.block_store.submit_load(job, here, numbers[np.array(found, dtype=np.intp)], sequence)

        end = await self._run(job, submit, after=keys)
        return tuple(here) if end.success else end.loaded_keys or ()

    def lookup(self, key: bytes, sequence: str | None = None) -> bool:
        """Whether `key` could be loaded now. It may be evicted before it is loaded: `load` returns what it found.

        Counts as a use by `sequence`. Raises TypeError for a key that is not bytes.
        """
        self._check_usable()
        _check_key(key)
        return self.block_store.lookup(key, sequence)

    def finish_sequence(self, sequence: str) -> None:
        """Nothing more will be stored for the sequence; the name may be used again for another one.

        Its jobs in flight go on, and its blocks stay. Idempotent, and allowed on a closed store.
        """
        self._check_loop()
        self.block_store.finish_sequence(sequence)

    async def drain(self) -> None:
        """Wait until every job that was begun before this call has ended."""
        self._check_usable()
        await self._drain_future()

    async def close(self) -> None:
        """Wait for the jobs in flight, end the engine and free the memory. Idempotent.

        A copy that never ends is waited for, and logged. Closing goes on if the await is cancelled.

        Blocks the loop while memory is freed, longer for a larger arena. It also blocks until all copies have ended
        if the loop ends before they do, or if polling raised an error.
        """
        self._check_loop()
        if self._closing is None:
            self._closing = self._loop.create_task(self._wait_for_jobs())
            # A callback, because asyncio.run may cancel the task before it has run at all.
            self._closing.add_done_callback(self._close)
        await asyncio.shield(self._closed)

    @property
    def num_blocks(self) -> int:
        """Blocks that can be loaded."""
        return self.block_store.num_blocks

    @property
    def is_idle(self) -> bool:
        """Whether every job has ended and nobody waits for one: as if there had never been any."""
        return not (self._open or self._storing or self._waiting or self._drains)

    def statistics(self) -> Statistics:
        """A snapshot; see block_store.Statistics."""
        return self.block_store.statistics()

    # --------------------------------------------------------------------------------------------------------- jobs

    def _begin(self, stored: Sequence[bytes] = ()) -> int:
        """The number of a new job. stored: the keys that it stores."""
        self._jobs += 1
        self._open[self._jobs] = stored
        for key in stored:
            self._storing.setdefault(key, []).append(self._jobs)
        if self._watch is None:
            self._watch = self._loop.call_later(block_store.LATE_S, _poll_if_late, weakref.ref(self))
        return self._jobs

    async def _run(self, job: int, submit: Callable[[], None], after: Sequence[bytes] = ()) -> Finished:
        """Submit the job once the stores of the keys `after` have ended, and wait for its end."""
        try:
            while stores := {store for key in after for store in self._storing.get(key, ())}:
                done, _ = await asyncio.wait([self._future_of(store) for store in stores])
                for end in done:
                    end.result()  # raises if polling failed
            submit()
        except BaseException:
            self._forget_job(job)
            raise
        ended = self._future_of(job)
        if self.block_store.has_results:  # there was nothing to copy
            self._collect()
        # Shielded, because loads that wait for this store share the future.
        return await asyncio.shield(ended)

    def _future_of(self, job: int) -> asyncio.Future[Finished]:
        """The future of an open job's end."""
        if job not in self._waiting:
            self._waiting[job] = self._loop.create_future()
        return self._waiting[job]

    def _forget_job(self, job: int) -> None:
        """Forget a job that has ended or was never submitted, and complete the drains that it held up."""
        for key in self._open.pop(job, ()):
            jobs = self._storing[key]
            jobs.remove(job)
            if not jobs:
                del self._storing[key]
        oldest = next(iter(self._open), math.inf)
        while self._drains and self._drains[0][0] < oldest:
            _, drained = self._drains.popleft()
            if not drained.done():  # its await was cancelled
                drained.set_result(None)

    def _drain_future(self) -> asyncio.Future[None]:
        """A future that is done when all jobs begun so far have ended, or has the error if polling fails."""
        drained: asyncio.Future[None] = self._loop.create_future()
        if self._open:
            self._drains.append((self._jobs, drained))
        else:
            drained.set_result(None)
        return drained

    # ------------------------------------------------------------------------------------------------------ the end

    async def _wait_for_jobs(self) -> None:
        await self._drain_future()

    def _close(self, closing: asyncio.Task[None]) -> None:
        """All jobs have ended, or they cannot be awaited because the task was cancelled or polling failed."""
        try:
            try:
                if closing.cancelled() or closing.exception() is not None:
                    self.block_store.drain()
            finally:
                self._release()
        except Exception as error:
            self._closed.set_exception(error)
        else:
            self._closed.set_result(None)

    def _release(self) -> None:
        self._finalizer.detach()
        try:
            self._loop.remove_reader(self._eventfd)
            self.block_store.signal(-1)  # before the number can become another file's
            self.block_store.close()
            self._memory = None
            self._collect()  # jobs whose end was not reported yet
        finally:
            for timer in (self._retry, self._watch):
                if timer is not None:
                    timer.cancel()
            os.close(self._eventfd)

    # -------------------------------------------------------------------------------------------------------- polls

    def _on_signal(self) -> None:
        os.eventfd_read(self._eventfd)  # before polling: a job that ends from here on wakes the loop again
        self._collect()

    def _collect(self) -> None:
        """Poll, and set the results of jobs that have ended."""
        try:
            ends = self.block_store.poll()
        except Exception as error:
            self._fail_waiting(error)
            return
        for end in ends:
            waiting = self._waiting.pop(end.job_id, None)
            if waiting is not None:
                waiting.set_result(end)
            self._forget_job(end.job_id)

    def _fail_waiting(self, error: Exception) -> None:
        """Raise the error where jobs or drains are awaited, and poll again later. The jobs go on."""
        futures: list[asyncio.Future[Any]] = [*self._waiting.values(), *(drained for _, drained in self._drains)]
        self._waiting.clear()
        self._drains.clear()
        for future in futures:
            if not future.done():
                future.set_exception(error)
        if self._retry is not None:
            self._retry.cancel()
        self._retry = self._loop.call_later(RETRY_S, self._collect)

    # ------------------------------------------------------------------------------------------------------- checks

    def _checked(self, keys: Collection[bytes], rows: np.ndarray | Sequence[int]) -> tuple[list[bytes], np.ndarray]:
        """Checked copies of both. Checked here, because BlockStore would fail the job and forget a load's keys."""
        self._check_usable()
        keys, numbers = list(keys), np.array(rows)
        for key in keys:
            _check_key(key)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise ValueError(f"rows must be row numbers in a list, not {numbers.dtype} of shape {numbers.shape}")
        if len(numbers) != len(keys):
            raise ValueError(f"rows must be as many as the {len(keys)} keys, not {len(numbers)}")
        last = self.block_store.primary.count - 1
        wrong = numbers[(numbers < 0) | (numbers > last)]
        if len(wrong):
            raise ValueError(f"rows must be from 0 to {last}, not {wrong[0]}")
        return keys, numbers

    def _check_usable(self) -> None:
        self._check_loop()
        if self._closing is not None:
            raise RuntimeError("the store is closed")

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("the store belongs to another event loop: make one in each")


def _check_key(key: object) -> None:
    if not isinstance(key, bytes):
        raise TypeError(f"keys must be bytes, not {type(key).__name__}")


def _view_of(primary: Any) -> memoryview:
    """A view of the primary's rows that keeps their memory. Raises ValueError or TypeError if there can be none."""
    tensor_type: Any = getattr(sys.modules.get("torch"), "Tensor", ())  # a caller with a tensor has imported torch
    if isinstance(primary, tensor_type):
        primary = _bytes_of(primary)
    if isinstance(primary, np.ndarray):
        if primary.dtype.hasobject:
            raise ValueError("the primary must hold plain values, not Python objects")
        primary = primary.view(f"V{primary.itemsize}")  # memoryview lacks some of numpy's types
    try:
        return memoryview(primary)
    except TypeError:
        raise TypeError(
            f"the primary must be an array, a torch tensor, a memoryview or Rows, not {type(primary).__name__}"
        ) from None


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as an array of shape (rows, bytes per row). torch then refuses to resize the tensor.

    `Tensor.numpy` knows neither bfloat16 nor float8.
    """
    torch = sys.modules["torch"]
    kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
    if kind != "torch.strided":
        raise ValueError(f"the primary must be a dense tensor, not a {kind.removeprefix('torch.')} one")
    if tensor.device.type != "cpu":
        raise ValueError(f"the primary must be a tensor in host memory, not on {tensor.device}")
    if tensor.requires_grad:
        raise ValueError("the primary must not require gradients, since loads are copied into it; pass its detach()")
    if not tensor.ndim or not tensor.numel():
        raise ValueError(f"the primary must hold at least one row, not shape {tuple(tensor.shape)}")
    row = tensor[0]
    if not row.is_contiguous():
        raise ValueError(f"rows of the primary must be contiguous, not strides {tensor.stride()}")
    try:
        storage = tensor.untyped_storage()
        has_memory = storage.data_ptr() != 0
    except RuntimeError:  # a class that wraps other tensors
        has_memory = False
    if not has_memory:
        raise ValueError(f"the primary must have memory of its own, which this {type(tensor).__name__} has not")
    memory = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy()
    size = tensor.element_size()
    offset, stride = tensor.storage_offset() * size, tensor.stride(0) * size
    return np.ndarray((len(tensor), row.numel() * size), np.uint8, memory, offset, (stride, 1))


def _poll_if_late(reference: weakref.ref[AsyncBlockStore]) -> None:
    """Poll while jobs are open, because polling also logs a copy that does not end."""
    if (store := reference()) is not None:
        store._watch = store._loop.call_later(block_store.LATE_S, _poll_if_late, reference) if store._open else None
        store._collect()


def _close_unclosed(store: BlockStore, eventfd: int, owner: int) -> None:
    """Close a store that was dropped without `close`."""
    if os.getpid() != owner:  # in a forked child all of it is the parent's
        return
    try:
        store.signal(-1)
        store.close()
    finally:
        os.close(eventfd)
    warnings.warn("an AsyncBlockStore was not closed", ResourceWarning, stacklevel=2)
