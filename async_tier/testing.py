"""Gates: decide in a test when the copies of a tier are made.

A program that uses a tier has states that last for microseconds: a block on its way, a load behind a store, a store cut
off by the end. With a gate each lasts as long as the test wants, without sleeping:

    store = BlockStore(Rows.of_view(memoryview(primary)))
    with store_gate(store) as gate:  # held
        store.submit_store(1, [b"key"], [0])
        assert not store.lookup(b"key")
        gate.step()  # the first piece of it may be copied
    store.drain()  # released: the rest may be, too
    assert store.lookup(b"key")

A piece is a part of a job: at most 2 MiB on the host engine, at most 4 MiB on the CUDA engine. All gates of one stream
are one: whether it is held is a state of the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

from async_tier.streams.base import CopyEngine, CopyStream
from async_tier.streams.row_stream import UNLIMITED


class HasEngine(Protocol):
    """A BlockStore."""

    @property
    def engine(self) -> CopyEngine: ...


class HasBlockStore(Protocol):
    """A tier (AsyncSecondaryTierManager) or an AsyncBlockStore."""

    @property
    def block_store(self) -> HasEngine: ...


class Gate:
    """What lets the copies of one stream begin. `with` it, the stream is held, and released at the end.

    Only beginnings: what has begun goes on, and ends. Calls of the tier do not wait for a held stream, except `drain`.
    `close` cuts held jobs off: they fail. Raises TypeError for a stream that is not of this package's engines.
    """

    def __init__(self, stream: CopyStream) -> None:
        limit: Callable[[int], None] | None = getattr(stream, "limit", None)
        if limit is None:
            raise TypeError(f"the stream must be one of this package's engines, not a {type(stream).__name__}")
        self._limit = limit

    def hold(self) -> None:
        """Let no further piece begin."""
        self._limit(0)

    def step(self, pieces: int = 1) -> None:
        """Let `pieces` pieces begin, from now on. What is left of an earlier `step` is void."""
        self._limit(pieces)

    def release(self) -> None:
        """Let everything begin."""
        self._limit(UNLIMITED)

    def __enter__(self) -> Self:
        self.hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def store_gate(owner: HasBlockStore | HasEngine) -> Gate:
    """The gate of what is copied into the tier, of a tier, a BlockStore or an AsyncBlockStore."""
    return Gate(_engine_of(owner).store_stream)


def load_gate(owner: HasBlockStore | HasEngine) -> Gate:
    """The gate of what is copied out of the tier, of a tier, a BlockStore or an AsyncBlockStore."""
    return Gate(_engine_of(owner).load_stream)


def _engine_of(owner: HasBlockStore | HasEngine) -> CopyEngine:
    store: Any = getattr(owner, "block_store", owner)
    engine: CopyEngine = store.engine
    return engine
