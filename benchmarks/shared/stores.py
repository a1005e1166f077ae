"""The tier's store of blocks without vLLM, as checks and benchmarks of engines use it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.streams.rows import Rows
from tests.rows import zero_rows

# Far beyond what anything takes that is waited for.
PATIENCE_S = 30


def until(condition: Callable[[], object], what: str) -> None:
    """Ask without a pause, as an idle scheduler does; a part that gets nowhere must not keep the others from it."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE_S} s: {what}")


@contextmanager
def opened(pool: str, count: int, row_bytes: int, primary_rows: int = 0, engine: str = "cuda") -> Iterator[BlockStore]:
    """A store of `count` rows over a primary of as many, or of `primary_rows`; all of its memory can be used."""
    primary = zero_rows(primary_rows or count, row_bytes)
    primary[:] = 1  # memory that was never written is one page of zeros
    options: dict[str, Any] = {"engine": engine, "pool": pool, "bytes_to_use": count * row_bytes}
    store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))
    try:
        if store.statistics().engine != engine:
            raise RuntimeError("CUDA refused to pin the memory of this check: see the warning above")
        until(lambda: store.arena.ready == count, "all of the tier's memory is pinned")
        yield store
    finally:
        store.close()
