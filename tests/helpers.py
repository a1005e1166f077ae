"""What the tests of the tier arrange with: real vLLM objects of whatever version is installed."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any
from unittest.mock import MagicMock

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.tiering import base as tiering_base
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

from async_tier.block_store import BlockStore
from async_tier.manager import AsyncSecondaryTierManager
from async_tier.testing import load_gate, store_gate
from tests.rows import zero_rows

# Far beyond what anything here takes; only a failure waits that long.
PATIENCE_S = 30

# Set by the fixture `engine`: what the tier's configuration says of the engine.
ENGINE_OPTIONS: dict[str, Any] = {}
_namespaces = itertools.count()


def engine_options() -> dict[str, Any]:
    """The options of the test's engine. Each tier in a pool has a namespace of its own, so that none is a peer."""
    own = {"namespace": str(next(_namespaces))} if "namespace" in ENGINE_OPTIONS else {}
    return {**ENGINE_OPTIONS, **own}


# Made by the test under way.
_stores: list[BlockStore] = []
_primaries: list[np.ndarray] = []

_JOB = getattr(tiering_base, "TransferJob", None) or tiering_base.JobMetadata
_ROWS = "chunk_ids" if "chunk_ids" in inspect.signature(_JOB).parameters else "block_ids"
_COUNT = "num_chunks" if "num_chunks" in inspect.signature(CPUPrimaryTierOffloadingManager).parameters else "num_blocks"
HAS_POSITIONS = hasattr(ReqContext, "set_offload_key_position")
HAS_DETECTOR = "backpressure_detector" in inspect.signature(tiering_base.SecondaryTierManager.__init__).parameters
RESULT_FIELDS = set(inspect.signature(tiering_base.JobResult).parameters)


def key(number: int, group: int = 0) -> bytes:
    """A key as vLLM makes them: 32 bytes of hash and the KV group."""
    return make_offload_key(hashlib.sha256(str(number).encode()).digest(), group)


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def request(name: str, ordered: Sequence[bytes] = ()) -> ReqContext:
    """A request's context; `ordered` are its keys in prefix order, where vLLM notes positions."""
    context = ReqContext(req_id=name)
    if HAS_POSITIONS:
        for place, each in enumerate(ordered, start=1):
            context.set_offload_key_position(each, place * 16)
    return context


def make_tier(primary: np.ndarray, blocks: int | None = None, **options: Any) -> AsyncSecondaryTierManager:
    """A tier that holds `blocks` blocks, over `primary`, on the test's engine."""
    if blocks is not None:
        options["bytes_to_use"] = blocks * primary.shape[1]
    tier = AsyncSecondaryTierManager(MagicMock(), memoryview(primary), "async", **{**engine_options(), **options})
    remember(tier.block_store, primary)
    return tier


def remember(store: BlockStore, primary: np.ndarray) -> None:
    """`close_stores` and `free_primaries` are to see to these."""
    _stores.append(store)
    _primaries.append(primary)


def forget() -> None:
    """What the test has made is its own to close."""
    _stores.clear()


def close_stores() -> None:
    """Close what the test has left open, also with a stream held, and also where another one cannot be closed."""
    still_open = [store for store in _stores if not store.is_closed]
    with contextlib.ExitStack() as ends:  # the last one first
        for store in still_open:
            ends.callback(store.close)
        for store in still_open:
            ends.callback(load_gate(store).release)
            ends.callback(store_gate(store).release)


def free_primaries() -> None:
    """Give back what engines had to leave as it was, because copies were held or failed. Nothing is held any more."""
    with contextlib.ExitStack() as ends:
        ends.callback(_primaries.clear)
        ends.callback(_stores.clear)
        for store in _stores:
            if store.engine.name == "cuda" and not store.engine.is_quiet:
                ends.callback(_close_again, store.engine)


def _close_again(engine: Any) -> None:
    engine.free_all(threading.Event(), None)
    engine.is_quiet = True


def job(
    job_id: int,
    names: Collection[bytes],
    rows: Sequence[int] | np.ndarray,
    context: ReqContext | None = None,
    load: bool = False,
) -> Any:
    """A job as vLLM's manager hands it over."""
    fields = {_ROWS: np.asarray(rows, dtype=np.int32), "req_context": context or request(f"request of job {job_id}")}
    return _JOB(job_id=job_id, keys=names, is_promotion=load, **fields)


def store(
    tier: AsyncSecondaryTierManager, job_id: int, names: Sequence[bytes], rows: Sequence[int], **more: Any
) -> Any:
    """Store and wait; the job's result."""
    tier.submit_store(job(job_id, names, rows, **more))
    return finish(tier)[job_id]


def load(tier: AsyncSecondaryTierManager, job_id: int, names: Sequence[bytes], rows: Sequence[int], **more: Any) -> Any:
    """Load and wait; the job's result."""
    tier.submit_load(job(job_id, names, rows, load=True, **more))
    return finish(tier)[job_id]


def finish(tier: AsyncSecondaryTierManager) -> dict[int, Any]:
    """Wait for all jobs; their results by job id, each checked to be there once."""
    tier.block_store.drain()
    results = list(tier.get_finished_jobs())
    assert len({result.job_id for result in results}) == len(results), "a job was reported twice"
    return {result.job_id: result for result in results}


def end_step(tier: Any, new: Sequence[str] = ()) -> None:
    tier.on_schedule_end(ScheduleEndContext(new_req_ids=new, preempted_req_ids=()))


def held(tier: AsyncSecondaryTierManager, names: Sequence[bytes]) -> list[bool]:
    """Which of `names` the tier would serve, one by one."""
    answers = []
    for name in names:
        answers.append(tier.lookup(name, request("asks")) is LookupResult.HIT)
        if answers[-1]:
            tier.block_store.undo_last_hit("asks")  # only asking: does not count as a use
    end_step(tier)
    return answers


def returns(call: Callable[[], Any], within_s: float = PATIENCE_S) -> Any:
    """What `call` returns, in a thread of its own: a call that blocks fails the test and does not hang it."""
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(call()), daemon=True)
    thread.start()
    thread.join(within_s)
    assert outcome, "the call blocked or raised"
    return outcome[0]


def until(condition: Callable[[], object], what: str) -> None:
    """Poll `condition`, which another thread makes true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0)


def threads(name: str) -> list[threading.Thread]:
    """Python's threads of this name."""
    return [thread for thread in threading.enumerate() if thread.name == name]


class Region:
    """What vLLM's primary tier asks of its SharedOffloadRegion, over an array."""

    def __init__(self, primary: np.ndarray) -> None:
        self.primary = primary

    def create_kv_memoryview(self) -> memoryview:
        return memoryview(self.primary)

    def cleanup(self) -> None:
        pass


class World:
    """vLLM's real tiering manager and primary tier above our tier."""

    def __init__(
        self,
        primary_blocks: int,
        tier_blocks: int,
        row_bytes: int = 64,
        peer: Callable[[memoryview], Any] | None = None,
        **options: Any,
    ) -> None:
        """peer: makes another tier over the primary."""
        self.primary = zero_rows(primary_blocks, row_bytes)
        primary_tier = CPUPrimaryTierOffloadingManager(**{_COUNT: primary_blocks, "mmap_region": Region(self.primary)})
        self.tier = AsyncSecondaryTierManager(
            offloading_spec=MagicMock(),
            primary_kv_view=primary_tier.get_kv_memoryview(),
            tier_type="async",
            bytes_to_use=tier_blocks * row_bytes,
            **{**engine_options(), **options},
        )
        remember(self.tier.block_store, self.primary)
        peers = [peer(primary_tier.get_kv_memoryview())] if peer is not None else []
        self.manager = TieringOffloadingManager(primary_tier=primary_tier, secondary_tiers=[self.tier, *peers])

    def step(self) -> None:
        """The end of a scheduler step, with statistics and events taken as vLLM does."""
        end_step(self.manager)
        if hasattr(self.manager, "get_stats"):
            self.manager.get_stats()
        list(self.manager.take_events())

    def start(self, context: ReqContext, ordered: Sequence[bytes]) -> None:
        self.manager.on_new_request(context)
        if not HAS_POSITIONS:
            self.manager.touch(list(ordered), context)

    def offload(self, context: ReqContext, names: Sequence[bytes], content: Callable[[bytes], np.ndarray]) -> int:
        """As after a forward pass: write the blocks' bytes to the primary and cascade; the number newly stored."""
        prepared = self.manager.prepare_store(list(names), context)
        if prepared is None or not prepared.keys_to_store:
            return 0
        for name, row in zip(prepared.keys_to_store, prepared.store_spec.block_ids, strict=True):
            self.primary[row] = content(name)
        # A set, as vLLM's scheduler does.
        self.manager.complete_store(set(prepared.keys_to_store), context)
        return len(prepared.keys_to_store)

    def fetch(self, context: ReqContext, name: bytes) -> np.ndarray | None:
        """The bytes of a block as a worker would read them, promoted from the tier if need be; None for a miss."""
        for _ in range(1000):
            answer = self.manager.lookup(name, context)
            if answer is LookupResult.MISS:
                return None
            if answer is LookupResult.HIT:
                row = self.manager.prepare_load([name], context).block_ids[0]
                content = self.primary[row].copy()
                self.manager.complete_load([name], context)
                return content
            self.step()
            self.tier.block_store.drain()
        raise AssertionError("the block neither came nor was missed")

    def close(self) -> None:
        self.manager.shutdown()
