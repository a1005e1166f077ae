"""AsyncBlockStore: the tier for asyncio programs. No vLLM.

Everything runs on the event loop's thread; there is no lock. A job that was submitted is in `_waiting` until its end
was polled, whatever became of whoever awaited it. Where the engine can signal, its threads write to an eventfd that the
loop watches; where it can only be asked, a timer asks it, at first soon and then less and less often, while jobs are
open.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Self

import numpy as np

from async_tier.arena import Rows
from async_tier.block_store import BlockStore, Finished, Statistics
from async_tier.config import TierConfig
from async_tier.engines import RowMemory
from async_tier.streams.base import CopyEngine

# Where events have to be asked: the pause before the first question, in which a copy of 1 MiB ends, and the longest.
# epoll counts whole milliseconds, so a loop with nothing else to do rounds each up to 1 ms, and a longer one would only
# make jobs late; a busy loop looks at its timers in every turn, and has the shorter ones.
FIRST_POLL_S = 50e-6
LONGEST_POLL_S = 1e-3
# A job is noticed late by at most half of the time that it took.
_POLL_GROWTH = 1.5


class TransferError(RuntimeError):
    """A store of which not all bytes have arrived; the tier has forgotten its keys."""


class AsyncBlockStore:
    """A BlockStore whose jobs are awaited. Use as `async with AsyncBlockStore(rows, config) as store`.

    Keys are bytes, rows are row numbers of the primary. Cancelling an await does not cancel the copy: memory of the
    rows must stay as it is until `drain` or `close` has returned. Belongs to the event loop that it was made in: what
    is awaited, and `lookup`, raise RuntimeError, in words, in another one, and all but `close` also once it is closing.
    Raises as BlockStore does, and RuntimeError where no loop runs.
    """

    def __init__(
        self,
        primary: Rows,
        config: TierConfig | None = None,
        *,
        engine: CopyEngine | None = None,
        arena: RowMemory | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._store = BlockStore(primary, config, engine=engine, arena=arena)
        self._waiting: dict[int, asyncio.Future[Finished]] = {}
        self._jobs = 0
        self._closing: asyncio.Task[None] | None = None
        self._timer: asyncio.Handle | None = None
        self._pause_s = FIRST_POLL_S
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_signalled = self._store.signal(self._eventfd)
        if self._is_signalled:
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

        Fewer than offered where keys were here already, or there was no room. Raises TransferError if it failed.
        """
        end = await self._run(lambda job: self._store.submit_store(job, keys, rows, sequence))
        if not end.success:
            raise TransferError(f"the store of {len(keys)} blocks failed; the log says why")
        return end.bytes

    async def load(self, keys: Collection[bytes], rows: np.ndarray | Sequence[int]) -> tuple[bytes, ...]:
        """Copy the blocks under `keys` into primary rows `rows`; the keys that were loaded, in the order given.

        Those that are missing were not here, or failed, and are gone; their rows are as they were, or worthless.
        """
        keys = list(keys)
        end = await self._run(lambda job: self._store.submit_load(job, keys, rows))
        return tuple(keys) if end.success else end.loaded_keys or ()

    def lookup(self, key: bytes, sequence: str | None = None) -> bool:
        """Whether `key` could be loaded now. It may be evicted before it is: `load` says what it found.

        Counts as a use by `sequence`.
        """
        self._check_usable()
        hit = self._store.lookup(key, sequence)
        self._store.end_step()
        return hit

    async def drain(self) -> None:
        """Wait until every job that was submitted before has ended."""
        self._check_usable()
        await self._until_ended()

    async def close(self) -> None:
        """Wait for the jobs in flight, end the engine and free the memory. Idempotent.

        Goes on if the await is cancelled. Where the loop ends before the jobs do, its thread waits for them.
        """
        self._check_loop()
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        await asyncio.shield(self._closing)

    @property
    def num_blocks(self) -> int:
        """Blocks that can be loaded."""
        return self._store.num_blocks

    def statistics(self) -> Statistics:
        """A snapshot; see block_store.Statistics."""
        return self._store.statistics()

    # ------------------------------------------------------------------------------------------------------- details

    async def _run(self, submit: Callable[[int], None]) -> Finished:
        self._check_usable()
        self._jobs += 1
        job = self._jobs
        ended: asyncio.Future[Finished] = self._loop.create_future()
        submit(job)
        self._waiting[job] = ended
        if self._store.has_results:  # there was nothing to copy
            self._collect()
        if not (ended.done() or self._is_signalled):
            self._ask_soon()
        # Not the future itself: cancelling it would lose track of the job.
        return await asyncio.shield(ended)

    async def _until_ended(self) -> None:
        if self._waiting:
            await asyncio.wait(list(self._waiting.values()))

    async def _close(self) -> None:
        try:
            await self._until_ended()
        except asyncio.CancelledError:
            # By asyncio.run, which cancels every task before it ends the loop: nobody would close the store later.
            self._store.drain()
        finally:
            self._release()

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._is_signalled:
            self._loop.remove_reader(self._eventfd)
            self._store.signal(-1)  # before its number can be another file's
        try:
            self._store.close()
            self._collect()  # the ends of jobs that nobody was told yet
        finally:
            os.close(self._eventfd)

    def _woken(self) -> None:
        os.eventfd_read(self._eventfd)  # before asking: a job that ends from here on wakes the loop again
        self._collect()

    def _ask_soon(self) -> None:
        """A job was submitted: the pauses start again, unless the next question is as near already."""
        if self._timer is None or self._pause_s > FIRST_POLL_S:
            self._ask_after(FIRST_POLL_S)

    def _ask_after(self, pause_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._pause_s = pause_s
        self._timer = self._loop.call_later(pause_s, self._asked)

    def _asked(self) -> None:
        self._timer = None
        self._collect()
        if self._waiting:
            self._ask_after(min(self._pause_s * _POLL_GROWTH, LONGEST_POLL_S))

    def _collect(self) -> None:
        """Hand the ends of jobs to whoever awaits them."""
        try:
            ends = self._store.poll()
        except Exception as error:  # nobody would be told otherwise
            waiting, self._waiting = self._waiting, {}
            for future in waiting.values():
                future.set_exception(error)
            return
        for end in ends:
            if end.job_id in self._waiting:
                self._waiting.pop(end.job_id).set_result(end)

    def _check_usable(self) -> None:
        self._check_loop()
        if self._closing is not None:
            raise RuntimeError("the store is closed")

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("the store belongs to another event loop: make one in each")
