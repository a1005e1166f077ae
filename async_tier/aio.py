"""AsyncBlockStore: the tier for asyncio programs. No vLLM.

Everything runs on the event loop's thread; there is no lock.

- A job is in `_open` from its beginning until its end was polled, whatever became of whoever awaits it. `drain` and
  `close` wait for that, not for futures: an error while asking reaches those who wait, and ends no job.
- A future in `_waiting` belongs to this class: awaits of it are shielded.
- A load of a key that is on its way here begins when the stores of it have ended: `_storing`. BlockStore would do as
  vLLM needs it, which still has the block: fail the key and forget it.

The engine's threads write to an eventfd, which the loop watches, whenever a job has ended.
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
from async_tier.block_store import BlockStore, Finished, Statistics
from async_tier.config import TierConfig
from async_tier.engines import RowMemory
from async_tier.streams.base import CopyEngine
from async_tier.streams.rows import Rows

if TYPE_CHECKING:  # it takes seconds to import, which programs without it need not pay
    import torch

# How long after an error of asking it is tried again: what has ended before signals no more.
RETRY_S = 1e-3


class TransferError(RuntimeError):
    """A store of which not all bytes have arrived, and why; the tier has forgotten its keys."""


class AsyncBlockStore:
    """A BlockStore whose jobs are awaited.

        primary = torch.zeros(64, 16, 8, 128, dtype=torch.bfloat16)  # 64 rows
        async with AsyncBlockStore(primary) as store:
            loaded = await store.load([b"first", b"second"], [0, 1], "request 7")
            ...  # compute what was not loaded, here the second
            await store.store([b"second"], [1], "request 7")
            store.finish_sequence("request 7")

    primary: an array, torch tensor or memoryview of shape (rows, ...) in host memory, of any type but objects, each row
    contiguous. Its memory is kept until the store is closed, or it is the Rows of memory that the caller keeps until
    then. torch does not say whether a tensor's memory may be written to: a load into what may not ends the process.
    Keys are bytes, rows are row numbers of the primary; both are read when the await begins, and may be changed from
    then on.

    Sequences are as in BlockStore. Tasks that use one name at once share the sequence, and its end.

    Cancelling an await does not cancel the copy: what is in the rows must stay as it is until `drain` or `close` has
    returned. Only a load that still waits for a store of its keys is withdrawn.

    Belongs to the event loop that it was made in: what is awaited, `lookup` and `finish_sequence` raise RuntimeError,
    in words, in another one, and all but `close` and `finish_sequence` also once it is closing. Making one blocks the
    loop: the first time for a quarter of a second, in which copy kernels are measured; with CUDA while the primary is
    pinned. Raises as BlockStore does, and RuntimeError where no loop runs. One that nobody closes lives as long as its
    loop, then warns (ResourceWarning).
    """

    def __init__(
        self,
        primary: Rows | memoryview | np.ndarray | torch.Tensor,
        config: TierConfig | None = None,
        *,
        engine: CopyEngine | None = None,
        arena: RowMemory | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        # What copies touch until the engine has ended, unless it is the caller's to keep.
        self._memory: memoryview | None = None
        if not isinstance(primary, Rows):
            self._memory = _view_of(primary)
            primary = Rows.of_view(self._memory)
        self.block_store = BlockStore(primary, config, engine=engine, arena=arena)
        self._jobs = 0
        # Job -> the keys that it stores, oldest job first.
        self._open: OrderedDict[int, Sequence[bytes]] = OrderedDict()
        # Key -> the open jobs that store it.
        self._storing: dict[bytes, list[int]] = {}
        self._waiting: dict[int, asyncio.Future[Finished]] = {}
        # (the last job that it waits for, what is done when that and all before it have ended), oldest first.
        self._drains: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._closing: asyncio.Task[None] | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._retry: asyncio.Handle | None = None
        # Of jobs that do not end nobody wakes the loop.
        self._watch: asyncio.Handle | None = None
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._abandoned = weakref.finalize(self, _abandon, self.block_store, self._eventfd, os.getpid())
        self.block_store.signal(self._eventfd)
        self._loop.add_reader(self._eventfd, self._woken)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def store(
        self, keys: Collection[bytes], rows: np.ndarray | Sequence[int], sequence: str | None = None
    ) -> int:
        """Copy primary rows `rows` (shape (n,)) into the tier under `keys` (n of them); the bytes that were moved.

        Fewer than offered where keys were here or on their way already, or there was no room: a sequence makes none at
        the cost of its own blocks, until it is finished. Raises TransferError if it failed; ValueError, in words, and
        does nothing, for rows that are none or not as many as the keys; TypeError for keys that are no bytes.
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
        """Copy the blocks under `keys` into primary rows `rows`; the keys that were loaded, in the order given.

        Waits first for stores of these keys that have not ended. Those that are missing were not here, or failed, and
        are gone; their rows are as they were, or worthless. Counts as a use by `sequence`. ValueError and TypeError as
        in `store`.
        """
        keys, numbers = self._checked(keys, rows)
        job = self._begin()
        here: list[bytes] = []

        def submit() -> None:
            self.block_store.touch(keys, sequence)
            # That one is missing is an answer here, and no failure for the log.
            found = [at for at, key in enumerate(keys) if self.block_store.has(key)]
            here.extend(keys[at] for at in found)
            self.block_store.submit_load(job, here, numbers[np.array(found, dtype=np.intp)], sequence)

        end = await self._run(job, submit, after=keys)
        return tuple(here) if end.success else end.loaded_keys or ()

    def lookup(self, key: bytes, sequence: str | None = None) -> bool:
        """Whether `key` could be loaded now. It may be evicted before it is: `load` says what it found.

        Counts as a use by `sequence`. TypeError for a key that is no bytes.
        """
        self._check_usable()
        _check_key(key)
        return self.block_store.lookup(key, sequence)

    def finish_sequence(self, sequence: str) -> None:
        """Nothing more will be stored for the sequence; its name may come again for another.

        Its jobs in flight go on, and its blocks stay. Idempotent, also of a store that is closed.
        """
        self._check_loop()
        self.block_store.finish_sequence(sequence)

    async def drain(self) -> None:
        """Wait until every job that was begun before has ended."""
        self._check_usable()
        await self._drained()

    async def close(self) -> None:
        """Wait for the jobs in flight, end the engine and free the memory. Idempotent.

        A copy that never ends is waited for; the log says that there is one.

        Goes on if the await is cancelled. Blocks the loop while memory is given back, the longer the larger the arena,
        and also until copies have ended where the loop ends before them or their events could not be asked.
        """
        self._check_loop()
        if self._closing is None:
            self._closing = self._loop.create_task(self._until_ended())
            # asyncio.run cancels every task before it ends the loop, this one perhaps before its first turn.
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
        """The number of a new job, which stores `stored`."""
        self._jobs += 1
        self._open[self._jobs] = stored
        for key in stored:
            self._storing.setdefault(key, []).append(self._jobs)
        if self._watch is None:
            self._watch = self._loop.call_later(block_store.LATE_S, _look, weakref.ref(self))
        return self._jobs

    async def _run(self, job: int, submit: Callable[[], None], after: Sequence[bytes] = ()) -> Finished:
        """Submit the job, once the stores of the keys `after` have ended, and wait for its end."""
        try:
            while stores := {store for key in after for store in self._storing.get(key, ())}:
                done, _ = await asyncio.wait([self._end_of(store) for store in stores])
                for end in done:
                    end.result()  # raises if they could not be asked
            submit()
        except BaseException:
            self._end(job)
            raise
        ended = self._end_of(job)
        if self.block_store.has_results:  # there was nothing to copy
            self._collect()
        # Not the future itself: cancelling it would cancel it for loads that wait for this store.
        return await asyncio.shield(ended)

    def _end_of(self, job: int) -> asyncio.Future[Finished]:
        """What will be told of the end of an open job."""
        if job not in self._waiting:
            self._waiting[job] = self._loop.create_future()
        return self._waiting[job]

    def _end(self, job: int) -> None:
        """The job is over, or was never submitted."""
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

    def _drained(self) -> asyncio.Future[None]:
        """Done when all jobs begun so far have ended, or with the error if they cannot be asked."""
        drained: asyncio.Future[None] = self._loop.create_future()
        if self._open:
            self._drains.append((self._jobs, drained))
        else:
            drained.set_result(None)
        return drained

    # ------------------------------------------------------------------------------------------------------ the end

    async def _until_ended(self) -> None:
        await self._drained()

    def _close(self, closing: asyncio.Task[None]) -> None:
        """Nothing is in flight any more, or it cannot be awaited: the task was cancelled, or jobs not asked."""
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
        self._abandoned.detach()
        try:
            self._loop.remove_reader(self._eventfd)
            self.block_store.signal(-1)  # before its number can be another file's
            self.block_store.close()
            self._memory = None
            self._collect()  # the ends of jobs that nobody was told yet
        finally:
            for timer in (self._retry, self._watch):
                if timer is not None:
                    timer.cancel()
            os.close(self._eventfd)

    # ------------------------------------------------------------------------------------------------------- asking

    def _woken(self) -> None:
        os.eventfd_read(self._eventfd)  # before asking: a job that ends from here on wakes the loop again
        self._collect()

    def _collect(self) -> None:
        """Hand the ends of jobs to whoever awaits them."""
        try:
            ends = self.block_store.poll()
        except Exception as error:
            self._could_not_ask(error)
            return
        for end in ends:
            waiting = self._waiting.pop(end.job_id, None)
            if waiting is not None:
                waiting.set_result(end)
            self._end(end.job_id)

    def _could_not_ask(self, error: Exception) -> None:
        """Tell whoever waits, who would not be told otherwise. The jobs go on."""
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
        """Copies of both. What is wrong is refused here: BlockStore would fail the job, and forget a load's keys."""
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
    """The primary's rows, and their memory, which it keeps. Raises ValueError or TypeError, in words."""
    tensor_type: Any = getattr(sys.modules.get("torch"), "Tensor", ())  # whoever has a tensor has imported torch
    if isinstance(primary, tensor_type):
        primary = _bytes_of(primary)
    if isinstance(primary, np.ndarray):
        if primary.dtype.hasobject:
            raise ValueError("the primary must hold plain values, not Python objects")
        primary = primary.view(f"V{primary.itemsize}")  # not every type of numpy's is one of memoryview's
    try:
        return memoryview(primary)
    except TypeError:
        raise TypeError(
            f"the primary must be an array, a torch tensor, a memoryview or Rows, not {type(primary).__name__}"
        ) from None


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's rows as bytes, shape (rows, bytes per row), on its memory, which torch then refuses to resize.

    `Tensor.numpy` would lack bfloat16 and float8.
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


def _look(reference: weakref.ref[AsyncBlockStore]) -> None:
    """A copy that does not end is for the log; to ask for jobs looks after that, too."""
    if (store := reference()) is not None:
        store._watch = store._loop.call_later(block_store.LATE_S, _look, reference) if store._open else None
        store._collect()


def _abandon(store: BlockStore, eventfd: int, owner: int) -> None:
    """Nobody has closed the store, and nobody can any more."""
    if os.getpid() != owner:  # a forked child: all of it is the parent's
        return
    try:
        store.signal(-1)
        store.close()
    finally:
        os.close(eventfd)
    warnings.warn("an AsyncBlockStore was not closed", ResourceWarning, stacklevel=2)
