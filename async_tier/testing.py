"""Gates: let a test decide when the copies of a tier begin.

Some states of a tier last for microseconds: a block is being stored, a load waits behind a store, `close` cuts a store
off. With a gate such a state lasts as long as the test wants, without sleeping:

    store = BlockStore(Rows.of_view(memoryview(primary)))
    with store_gate(store) as gate:  # held
        store.submit_store(1, [b"key"], [0])
        assert not store.lookup(b"key")
        gate.step()  # the first piece of it may be copied
    store.drain()  # released: the rest may be, too
    assert store.lookup(b"key")

A piece is a part of a job: at most 2 MiB on the host engine, at most 4 MiB on the CUDA engine. Whether a stream is held
is a state of the stream, so all gates of one stream act alike.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from async_tier.streams.base import CopyStream
from async_tier.streams.row_stream import UNLIMITED


class Gate:
    """Decides when the copies of one stream begin. In a `with` block the stream is held; it is released at the end.

    Copies that have begun continue and end. Calls of the tier do not wait for a held stream, except `drain`.
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
        """Let `pieces` more pieces begin. Replaces what is left of an earlier `step`."""
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


def store_gate(owner: Any) -> Gate:
    """The gate of the copies into the tier. owner: a tier, a BlockStore or an AsyncBlockStore."""
    return Gate(getattr(owner, "block_store", owner).engine.store_stream)


def load_gate(owner: Any) -> Gate:
    """The gate of the copies out of the tier. owner: a tier, a BlockStore or an AsyncBlockStore."""
    return Gate(getattr(owner, "block_store", owner).engine.load_stream)
