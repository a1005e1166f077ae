"""The CPU backend's worker, byte for byte against vLLM's own transfer handler, and as vLLM's connector drives it."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingConnectorMetadata, TransferJob
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor, GPULoadStoreSpec
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu import gpu_worker
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from async_tier.config import SPEC_KEYS, TIER_KEYS
from async_tier.cpu_backend import CPUBackendTieringSpec, HostOffloadingWorker
from async_tier.testing import Gate, load_gate, store_gate
from async_tier.text import brief
from async_tier.vllm.primary_file import PrimaryFile
from tests.engine import Engine
from tests.helpers import PATIENCE_S, returns

# Bytes of a block in each KV cache tensor, and by KV group (tensor, bytes that the layer uses of the page). The groups
# share tensor 0, as vLLM's do where layers overlay each other; two layers leave padding at the end of their pages.
PAGES = (96, 160, 64)
GROUPS = (((0, 96), (1, 120)), ((2, 64), (0, 80)))
BLOCKS_PER_CHUNK = 3
BLOCKS, CHUNKS = 40, 20
# A copy thread takes this much at a time.
PIECE = 2 << 20


def new_engine_id() -> str:
    """Unique, and of this process, should it be killed."""
    return f"async-tier-test-{os.getpid()}-{uuid.uuid4().hex}"


def shared_memory_path(engine_id: str) -> str:
    return f"/dev/shm/vllm_offload_{engine_id}.mmap"


def make_config(
    engine_id: str,
    pages: Sequence[int] = PAGES,
    chunks: int = CHUNKS,
    blocks_per_chunk: int = BLOCKS_PER_CHUNK,
    rank: int = 0,
    world_size: int = 1,
    pp_size: int = 1,
    replicated_layout: bool = False,
    canonical_layout: bool = False,
    **extra_config: Any,
) -> OffloadingConfig:
    copies = 1 if replicated_layout else world_size
    row_bytes = -(-sum(pages) * blocks_per_chunk * copies // 4096) * 4096
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(16, ("layer",), 0),),
        worker_kv_bytes_per_block=sum(pages),
        enable_kv_cache_events=False,
        extra_config={"cpu_bytes_to_use": chunks * row_bytes, **extra_config},
        engine_id=engine_id,
        model=OffloadingModelConfig("model", "float16"),
        cache=OffloadingCacheConfig(16, blocks_per_chunk),
        parallel=OffloadingParallelConfig(rank, world_size, world_size, pp_size, 1, 1, 0, 1, None, False),
        replicated_layout=replicated_layout,
        canonical_layout=canonical_layout,
    )


def tier_config(**options: Any) -> dict[str, Any]:
    return {
        "type": "AsyncSecondaryTierManager",
        "module_path": "async_tier.manager",
        "engine": "host",
        "bytes_to_use": "1MiB",
        **options,
    }


def make_kv_caches(
    pages: Sequence[int] = PAGES,
    groups: Sequence[Sequence[tuple[int, int]]] = GROUPS,
    blocks: int = BLOCKS,
    devices: Sequence[str] = (),
) -> CanonicalKVCaches:
    """KV caches of random bytes."""
    devices = devices or ["cpu"] * len(pages)
    return CanonicalKVCaches(
        [
            CanonicalKVCacheTensor(torch.randint(-128, 128, (blocks, page), dtype=torch.int8).to(device), page)
            for page, device in zip(pages, devices, strict=True)
        ],
        [[CanonicalKVCacheRef(tensor, used) for tensor, used in group] for group in groups],
    )


@dataclass
class Memory:
    """What the KV caches and the primary hold. One row of `primary`, int8, is one chunk of all workers."""

    caches: list[np.ndarray]
    primary: np.ndarray

    def copy(self) -> Memory:
        return Memory([cache.copy() for cache in self.caches], np.array(self.primary))

    def assert_equals(self, other: Memory) -> None:
        for number, (ours, theirs) in enumerate(zip(self.caches, other.caches, strict=True)):
            assert np.array_equal(ours, theirs), f"KV cache tensor {number} differs"
        assert np.array_equal(self.primary, other.primary), "the primary differs"


class World:
    """A CPUBackendTieringSpec and its worker, between KV caches and a primary tier full of random bytes.

    `memory` looks at both as another process would: the primary through its own mapping of the shared file.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[tuple[int, int]]] = GROUPS,
        blocks: int = BLOCKS,
        pages: Sequence[int] = PAGES,
        **options: Any,
    ) -> None:
        self.path = shared_memory_path(engine_id := new_engine_id())
        self.spec = CPUBackendTieringSpec(make_config(engine_id, pages, **options))
        self.kv_caches = make_kv_caches(pages, groups, blocks)
        worker = self.spec.get_worker(self.kv_caches)
        assert isinstance(worker, HostOffloadingWorker)
        self.worker = worker
        shape = (self.spec.num_chunks, self.spec.kv_bytes_per_chunk)
        primary = np.memmap(self.path, np.int8, "r+", shape=shape)
        primary[:] = np.random.default_rng(7).integers(-128, 128, shape, dtype=np.int8)
        self.memory = Memory([cache.tensor.numpy() for cache in self.kv_caches.tensors], primary)

    def store(self, job_id: int, blocks: Sequence[int], chunks: Sequence[int]) -> None:
        """Submit a store, of the first and only group."""
        self.worker.submit_store(job_id, blocks_of(blocks), CPULoadStoreSpec(list(chunks)))

    def load(self, job_id: int, chunks: Sequence[int], blocks: Sequence[int]) -> None:
        """Submit a load, of the first and only group."""
        self.worker.submit_load(job_id, CPULoadStoreSpec(list(chunks)), blocks_of(blocks))

    def reported(self) -> list[int]:
        return [result.job_id for result in returns(self.worker.get_finished)]

    def finish(self, *job_ids: int) -> list[int]:
        """Wait for these jobs; the ids reported."""
        returns(lambda: self.worker.wait(set(job_ids)))
        return self.reported()

    def close(self) -> None:
        self.worker.shutdown()
        if os.path.exists(self.path):  # only after a failure
            os.unlink(self.path)


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**options: Any) -> World:
        worlds.append(World(**options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()  # also with a stream held


@pytest.fixture
def make_flat(make_world) -> Callable[..., World]:
    """Worlds of one layer and one block a chunk, where `memory.caches[0]` and `memory.primary` are rows of `page`."""

    def make(page: int = 4096, **options: Any) -> World:
        return make_world(pages=(page,), groups=(((0, page),),), blocks_per_chunk=1, **options)

    return make


@pytest.fixture
def flat(make_flat) -> World:
    return make_flat()


def blocks_of(blocks: Sequence[int]) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(list(blocks), [len(blocks)], [0])


# ----------------------------------------------------------------------------------------------- vLLM's own semantics


class VllmHandler(gpu_worker.SingleDirectionOffloadingHandler):
    """vLLM's own transfer handler over `memory`. Its constructor wants a GPU; its copies are made at once here."""

    def __init__(self, world: World, memory: Memory, is_store: bool) -> None:
        factor = world.spec.blocks_per_chunk
        place = 0 if world.spec.replicated_layout else world.spec.config.parallel.rank
        offset = place * world.spec.cpu_page_size_per_worker
        caches = [torch.from_numpy(cache) for cache in memory.caches]
        chunks = []
        for cache in caches:
            width = cache.shape[1] * factor
            chunks.append(torch.from_numpy(memory.primary)[:, offset : offset + width])
            offset += width
        self.gpu_to_cpu = is_store
        self.src_tensors, self.dst_tensors = (caches, chunks) if is_store else (chunks, caches)
        self.src_blocks_per_chunk, self.dst_blocks_per_chunk = (1, factor) if is_store else (factor, 1)
        self.layer_refs_per_group = world.kv_caches.group_data_refs
        self._canonical_copy_plans = None
        self._fill_group_ops = self._fill_direct_ops
        self._swap_blocks_batch = self._move
        self._transfer_events = {}
        self._transfers = deque()
        self._stream_pool, self._event_pool, self._buffer_pool = [MagicMock()], [MagicMock(), MagicMock()], []

    @staticmethod
    def _move(src: torch.Tensor, dst: torch.Tensor, sizes: torch.Tensor, is_src_access_order_any: bool) -> None:
        for source, destination, size in zip(src.tolist(), dst.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(destination, source, size)


@dataclass(frozen=True)
class Shape:
    """A transfer: the number of blocks of each KV group, and the place of its first one in the request."""

    sizes: tuple[int, int]
    indices: tuple[int, int]

    def specs(self, seed: int) -> tuple[GPULoadStoreSpec, CPULoadStoreSpec]:
        """At random blocks and chunks, each at most once."""
        rng = np.random.default_rng(seed)
        chunks = sum(
            -(-(index % BLOCKS_PER_CHUNK + size) // BLOCKS_PER_CHUNK)
            for size, index in zip(self.sizes, self.indices, strict=True)
            if size
        )
        return (
            GPULoadStoreSpec(rng.permutation(BLOCKS)[: sum(self.sizes)].tolist(), self.sizes, self.indices),
            CPULoadStoreSpec(rng.permutation(CHUNKS)[:chunks].tolist()),
        )


SHAPES = {
    "whole chunks": Shape((6, 9), (0, 3)),
    "partial first chunks": Shape((5, 4), (1, 5)),
    "partial last chunks": Shape((4, 5), (3, 0)),
    "both ends partial": Shape((9, 6), (2, 4)),
    "one block inside a chunk": Shape((1, 1), (4, 7)),
    "one partial chunk and many": Shape((2, 13), (1, 2)),
    "only the first group": Shape((7, 0), (1, 4)),
    "only the second group": Shape((0, 7), (5, 1)),
    "no block at all": Shape((0, 0), (1, 2)),
}


def random_shape(seed: int) -> Shape:
    sizes, indices = np.random.default_rng(seed).integers(0, 12, (2, 2)).tolist()
    return Shape(tuple(sizes), tuple(indices))


def submit(worker: Any, job_id: int, is_store: bool, blocks: GPULoadStoreSpec, chunks: CPULoadStoreSpec) -> None:
    if is_store:
        assert worker.submit_store(job_id, blocks, chunks)
    else:
        assert worker.submit_load(job_id, chunks, blocks)


def assert_copies_what_vllm_does(
    world: World, is_store: bool, blocks: GPULoadStoreSpec, chunks: CPULoadStoreSpec
) -> None:
    """Bytes copied, bytes left alone, and the size reported."""
    expected = world.memory.copy()
    handler = VllmHandler(world, expected, is_store)
    with patch.object(gpu_worker, "current_platform", MagicMock(**{"is_xpu.return_value": False})):
        handler.transfer_async(1, *((blocks, chunks) if is_store else (chunks, blocks)))
    submit(world.worker, 1, is_store, blocks, chunks)
    returns(lambda: world.worker.wait({1}))
    (result,) = world.worker.get_finished()
    world.memory.assert_equals(expected)
    assert (result.success, result.transfer_size) == (True, handler._transfers[0].num_bytes)


is_store_or_load = pytest.mark.parametrize("is_store", [True, False], ids=["store", "load"])


@is_store_or_load
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_bytes_are_those_of_vllms_own_handler(make_world, shape, seed, is_store):
    assert_copies_what_vllm_does(make_world(), is_store, *shape.specs(seed))


@is_store_or_load
def test_bytes_are_those_of_vllms_own_handler_for_random_transfers(make_world, is_store):
    world = make_world(cpu_copy_threads=3)
    for seed in range(60):
        assert_copies_what_vllm_does(world, is_store, *random_shape(seed).specs(seed))


@is_store_or_load
def test_the_second_worker_has_its_own_place_in_each_chunk(make_world, is_store):
    world = make_world(rank=1, world_size=2)
    assert_copies_what_vllm_does(world, is_store, *SHAPES["both ends partial"].specs(1))


@is_store_or_load
def test_workers_of_a_replicated_layout_share_the_first_place(make_world, is_store):
    world = make_world(rank=1, world_size=2, replicated_layout=True)
    assert_copies_what_vllm_does(world, is_store, *SHAPES["both ends partial"].specs(1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_stored_blocks_come_back_into_other_blocks(make_world, shape, seed):
    world = make_world()
    blocks, chunks = shape.specs(seed)
    unused = np.setdiff1d(np.arange(BLOCKS), blocks.block_ids)
    others = GPULoadStoreSpec(unused[: len(blocks.block_ids)].tolist(), shape.sizes, shape.indices)
    before = world.memory.copy()
    submit(world.worker, 1, True, blocks, chunks)
    assert world.finish(1) == [1]
    for cache in world.memory.caches:
        cache[:] = 0
    submit(world.worker, 2, False, others, chunks)
    assert world.finish(2) == [2]

    expected = [np.zeros_like(cache) for cache in before.caches]
    starts = (0, shape.sizes[0])
    for refs, start, size in zip(GROUPS, starts, shape.sizes, strict=True):
        for tensor, used in refs:
            old, new = (spec.block_ids[start : start + size] for spec in (blocks, others))
            expected[tensor][new, :used] = before.caches[tensor][old, :used]
    for number, cache in enumerate(expected):
        assert np.array_equal(world.memory.caches[number], cache), f"KV cache tensor {number} differs"


@pytest.mark.parametrize("surplus", ["blocks", "chunks"])
@is_store_or_load
def test_a_transfer_that_names_more_than_its_groups_is_refused(make_world, is_store, surplus):
    world = make_world()
    blocks, chunks = SHAPES["whole chunks"].specs(1)
    spec = blocks if surplus == "blocks" else chunks
    spec.block_ids = np.append(spec.block_ids, np.int32(0))
    before = world.memory.copy()
    with pytest.raises(AssertionError, match="beyond those of"):
        submit(world.worker, 1, is_store, blocks, chunks)
    assert world.finish(1) == []
    world.memory.assert_equals(before)


# ---------------------------------------------------------------------------------------------------------- reporting


def held_jobs(world: World) -> dict[str, Callable[[], None]]:
    """Hold both streams and submit jobs 1 and 2, one a stream, of one and two pages; how to let each go."""
    engine = world.worker.engine
    streams = {"store": engine.store_stream, "load": engine.load_stream}
    for stream in streams.values():
        Gate(stream).hold()
    world.store(1, [0], [0])
    world.load(2, [1, 2], [1, 2])
    return {name: Gate(stream).release for name, stream in streams.items()}


def test_a_job_is_not_reported_before_its_bytes_have_moved(flat):
    before = flat.memory.copy()
    held_jobs(flat)
    assert flat.reported() == []
    flat.memory.assert_equals(before)


@pytest.mark.parametrize(("stream", "job_id", "pages"), [("store", 1, 1), ("load", 2, 2)])
def test_a_job_whose_stream_lets_go_is_reported_once_whatever_else_is_held(flat, stream, job_id, pages):
    held_jobs(flat)[stream]()
    returns(lambda: flat.worker.wait({job_id}))
    (result,) = returns(flat.worker.get_finished)
    assert (result.job_id, result.success, result.transfer_size) == (job_id, True, pages * 4096)
    assert result.transfer_time > 0
    assert flat.reported() == []


def test_a_job_is_not_reported_with_a_part_of_its_bytes(make_flat):
    world = make_flat(page=PIECE)
    with store_gate(world.worker) as gate:
        world.store(1, [0, 2], [0, 5])  # two pieces
        gate.step()
        assert world.reported() == []
    assert world.finish(1) == [1]


def test_a_transfer_of_nothing_is_reported_too(flat):
    flat.store(1, [], [])
    flat.load(2, [], [])
    assert sorted(flat.finish(1, 2)) == [1, 2]
    assert flat.reported() == []


# --------------------------------------------------------------------------------------------------------------- wait


class MovesWhenAwaited:
    """A held stream that lets go only when one of its events is waited for."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        Gate(stream).hold()

    def copy(self, destinations: np.ndarray, sources: np.ndarray, size: Any) -> Any:
        return _AwaitedEvent(self._stream, self._stream.copy(destinations, sources, size))

    def limit(self, pieces: int) -> None:
        self._stream.limit(pieces)


class _AwaitedEvent:
    def __init__(self, stream: Any, event: Any) -> None:
        self._stream = stream
        self._event = event

    def synchronize(self) -> None:
        Gate(self._stream).release()
        self._event.synchronize()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._event, name)


def move_only_when_awaited(world: World) -> None:
    engine = world.worker.engine
    for name in ("store_stream", "load_stream"):
        setattr(engine, name, MovesWhenAwaited(getattr(engine, name)))


def test_wait_blocks_while_the_stream_is_held(make_flat):
    world = make_flat(page=PIECE)
    stream = world.worker.engine.store_stream
    before = world.memory.copy()
    with Gate(stream) as gate:
        world.store(1, [0, 2, 4], [0, 5, 9])
        calling = threading.Event()
        landed: list[bool] = []

        def wait() -> None:
            calling.set()
            world.worker.wait({1})
            landed.append(np.array_equal(world.memory.primary[[0, 5, 9]], before.caches[0][[0, 2, 4]]))

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        assert calling.wait(PATIENCE_S)
        gate.step(2)  # of three pieces
        assert waiting.is_alive()
    waiting.join(PATIENCE_S)
    assert landed == [True]


@pytest.mark.parametrize("job_id", [1, 2], ids=["store", "load"])
def test_wait_returns_when_the_job_has_ended(flat, job_id):
    move_only_when_awaited(flat)
    flat.store(1, [0], [0])
    flat.load(2, [1], [1])
    assert flat.finish(job_id) == [job_id]


def test_wait_waits_for_every_job_of_the_set(flat):
    move_only_when_awaited(flat)
    flat.store(1, [0], [0])
    flat.load(2, [1], [1])
    assert sorted(flat.finish(1, 2)) == [1, 2]


def test_wait_passes_over_ids_it_does_not_know(flat):
    move_only_when_awaited(flat)
    flat.store(1, [0], [0])
    returns(lambda: flat.worker.wait({98, 99}))
    assert flat.reported() == []
    assert flat.finish(97, 1, 99) == [1]


def test_wait_for_a_job_already_reported_returns(flat):
    flat.store(1, [0], [0])
    assert flat.finish(1) == [1]
    assert flat.finish(1) == []


def test_a_job_waited_for_twice_is_still_reported_once(flat):
    flat.store(1, [0], [0])
    returns(lambda: flat.worker.wait({1}))
    assert flat.finish(1) == [1]
    assert flat.reported() == []


# -------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("round_", range(10))
@is_store_or_load
def test_of_two_jobs_that_write_one_place_the_later_wins(make_flat, is_store, round_):
    """The first job's last page is the contested one, at the end of a piece; the second job is that page alone."""
    page = 64 << 10
    count = 3 * PIECE // page
    world = make_flat(page=page, blocks=count + 1, chunks=count + 1, cpu_copy_threads=4)
    engine, before = world.worker.engine, world.memory.copy()
    stream = engine.store_stream if is_store else engine.load_stream
    places = np.random.default_rng(round_).permutation(count)
    contested = places[-1]
    with Gate(stream):
        if is_store:
            world.store(1, places[::-1], places)
            world.store(2, [count], [contested])
            written, source = world.memory.primary, before.caches[0]
        else:
            world.load(1, places[::-1], places)
            world.load(2, [count], [contested])
            written, source = world.memory.caches[0], before.primary
    assert world.finish(2) == [1, 2]
    assert np.array_equal(written[contested], source[count])
    assert np.array_equal(written[places[:-1]], source[places[:0:-1]])


def test_a_load_does_not_queue_behind_stores(flat):
    before = flat.memory.copy()
    store_gate(flat.worker).hold()
    flat.store(1, [0], [0])
    flat.load(2, [7], [7])
    assert flat.finish(2) == [2]
    assert np.array_equal(flat.memory.caches[0][7], before.primary[7])


def test_a_store_does_not_queue_behind_loads(flat):
    before = flat.memory.copy()
    load_gate(flat.worker).hold()
    flat.load(1, [7], [7])
    flat.store(2, [0], [0])
    assert flat.finish(2) == [2]
    assert np.array_equal(flat.memory.primary[0], before.caches[0][0])


def test_a_free_thread_takes_a_load_before_a_store(make_flat):
    """The store reads the block that the load fills, so the primary tells which went first."""
    page, pieces = 256 << 10, 16
    count = pieces * PIECE // page
    world = make_flat(page=page, blocks=count + 1, chunks=count + 2, cpu_copy_threads=1)
    engine, block, chunk = world.worker.engine, count, count + 1
    busy = False
    for job_id in range(0, 90, 3):
        with Gate(engine.load_stream), Gate(engine.store_stream):
            world.memory.caches[0][block] = 1
            world.memory.primary[count] = 2
            world.store(job_id, range(count)[::-1], range(count))
            world.store(job_id + 1, [block], [chunk])
            world.load(job_id + 2, [count], [block])
        # Only if the one thread was still busy with the first store did it find both.
        busy = world.worker.get_finished() == []
        world.finish(job_id, job_id + 1, job_id + 2)
        if busy:
            break
    assert busy, "the thread never found both queued"
    assert (world.memory.primary[chunk] == 2).all()


# ------------------------------------------------------------------------------------------- as vLLM's connector drives


def make_connector(world: World) -> OffloadingConnectorWorker:
    """vLLM's real connector over the world's worker."""
    connector = OffloadingConnectorWorker(world.spec, MagicMock(), MagicMock())
    connector._init_worker(world.kv_caches)
    assert connector.worker is world.worker
    return connector


def metadata(
    loads: dict[int, tuple[int, int]] | None = None,
    stores: dict[int, tuple[int, int]] | None = None,
    flush: set[int] | None = None,
) -> OffloadingConnectorMetadata:
    """A step's jobs by id: a load as (chunk, block), a store as (block, chunk)."""
    return OffloadingConnectorMetadata(
        load_jobs={
            job_id: TransferJob(f"request {job_id}", CPULoadStoreSpec([chunk]), blocks_of([block]))
            for job_id, (chunk, block) in (loads or {}).items()
        },
        store_jobs={
            job_id: TransferJob(f"request {job_id}", blocks_of([block]), CPULoadStoreSpec([chunk]))
            for job_id, (block, chunk) in (stores or {}).items()
        },
        jobs_to_flush=flush,
    )


def store_then_give_its_block_away(world: World) -> None:
    """Block 3, being stored to chunk 5, is flushed and overwritten by its next owner; then all copies end."""
    move_only_when_awaited(world)
    connector = make_connector(world)
    connector.prepare_store_kv(metadata(stores={1: (3, 5)}))
    connector.handle_preemptions(metadata())  # the next step submits it
    connector.handle_preemptions(metadata(flush={1}))
    world.memory.caches[0][3] = 77
    store_gate(world.worker).release()
    world.worker.events[1].synchronize()


def test_the_fence_a_block_given_away_after_the_flush_was_stored_whole(flat):
    before = flat.memory.copy()
    store_then_give_its_block_away(flat)
    assert np.array_equal(flat.memory.primary[5], before.caches[0][3])


def test_the_fence_without_wait_the_next_owners_bytes_are_stored(flat):
    """The control: what the test above sees where `wait` does not wait."""
    flat.worker.wait = lambda job_ids: None
    store_then_give_its_block_away(flat)
    assert (flat.memory.primary[5] == 77).all()


def test_the_fence_holds_for_a_store_of_the_step_that_flushes_it(flat):
    before = flat.memory.copy()
    move_only_when_awaited(flat)
    make_connector(flat).handle_preemptions(metadata(stores={1: (3, 5)}, flush={1}))
    flat.memory.caches[0][3] = 77
    assert np.array_equal(flat.memory.primary[5], before.caches[0][3])


def test_the_fence_holds_while_the_connector_blocks_in_another_thread(flat):
    before = flat.memory.copy()
    stream, connector = flat.worker.engine.store_stream, make_connector(flat)
    with Gate(stream):
        connector.prepare_store_kv(metadata(stores={1: (3, 5), 2: (4, 6)}))
        calling = threading.Event()

        def flush_and_reuse() -> None:
            calling.set()
            connector.handle_preemptions(metadata(flush={1, 2}))
            flat.memory.caches[0][[3, 4]] = 77

        step = threading.Thread(target=flush_and_reuse, daemon=True)
        step.start()
        assert calling.wait(PATIENCE_S)
        assert step.is_alive()
    step.join(PATIENCE_S)
    assert not step.is_alive()
    assert (flat.memory.caches[0][[3, 4]] == 77).all()
    assert np.array_equal(flat.memory.primary[[5, 6]], before.caches[0][[3, 4]])


def test_the_connector_gets_a_store_that_it_flushed_reported_once(flat):
    connector = make_connector(flat)
    connector.handle_preemptions(metadata(stores={1: (3, 5)}, flush={1}))
    assert connector.get_finished(set()) == (set(), set())
    done = connector.build_connector_worker_meta()
    assert done.completed_jobs == {1: 1}
    assert done.transfer_stats.store.bytes == 4096
    connector.get_finished(set())
    assert connector.build_connector_worker_meta() is None


def test_the_connector_resumes_a_request_only_when_its_load_has_landed(flat):
    before = flat.memory.copy()
    connector, stream = make_connector(flat), flat.worker.engine.load_stream
    with Gate(stream):
        flat.memory.caches[0][8] = 0  # as the step zeroes new blocks, before it starts transfers
        connector.start_kv_transfers(metadata(loads={1: (2, 8)}))
        assert returns(lambda: connector.get_finished(set())) == (set(), set())
    flat.worker.wait({1})
    assert connector.get_finished(set()) == (set(), {"request 1"})
    assert np.array_equal(flat.memory.caches[0][8], before.primary[2])


def test_a_store_reads_what_the_step_wrote_after_announcing_it(flat):
    connector = make_connector(flat)
    connector.prepare_store_kv(metadata(stores={1: (3, 5)}))
    flat.memory.caches[0][3] = 42
    connector.start_kv_transfers(metadata())
    assert flat.finish(1) == [1]
    assert (flat.memory.primary[5] == 42).all()


# ----------------------------------------------------------------------------------------------------------- the spec


@pytest.mark.parametrize("value", [0, 65, -1, "2", True, 1.0, None])
def test_a_bad_number_of_threads_is_refused_by_name(value):
    with pytest.raises(ValueError, match="cpu_copy_threads must be an integer from 1 to 64") as refusal:
        CPUBackendTieringSpec(make_config(new_engine_id(), cpu_copy_threads=value))
    assert str(refusal.value).endswith(f"not {value!r}")


def test_a_canonical_layout_is_refused_by_name():
    with pytest.raises(ValueError, match="canonical_layout must be false"):
        CPUBackendTieringSpec(make_config(new_engine_id(), canonical_layout=True))


@pytest.mark.parametrize("value", [None, 0, -1, -(5 << 30), True, "", "a lot", "1 parsec", [], {}])
def test_a_bad_size_of_the_primary_is_refused_by_name(value):
    with pytest.raises(ValueError, match="cpu_bytes_to_use must be an integer number of bytes or text with a unit"):
        CPUBackendTieringSpec(make_config(new_engine_id(), cpu_bytes_to_use=value))


@pytest.mark.parametrize("value", [40960, "40960", "40KiB"])
def test_the_primarys_size_is_written_as_a_tiers(value):
    assert CPUBackendTieringSpec(make_config(new_engine_id(), cpu_bytes_to_use=value)).num_chunks == 10


def test_a_primary_of_less_than_one_block_is_refused():
    with pytest.raises(
        ValueError, match=r"at least 8192 bytes \(8.0 KiB\), which is one block of all workers, not 8191"
    ):
        CPUBackendTieringSpec(make_config(new_engine_id(), (4096,), 1, 1, world_size=2, cpu_bytes_to_use=8191))
    assert CPUBackendTieringSpec(make_config(new_engine_id(), (4096,), 1, 1, cpu_bytes_to_use=4096)).num_chunks == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_pipeline_parallelism_is_refused(rank):
    with pytest.raises(ValueError, match=r"pipeline_parallel_size must be 1 .*, not 2: "):
        CPUBackendTieringSpec(make_config(new_engine_id(), rank=rank, world_size=2, pp_size=2))


# ------------------------------------------------------------------------------------------------------------ its keys


@pytest.mark.parametrize("key", sorted(set(TIER_KEYS) - set(SPEC_KEYS)))
def test_a_tiers_key_beside_the_tiers_is_refused(key):
    with pytest.raises(ValueError, match=f"'{key}' is a key of a tier and belongs into its dictionary"):
        CPUBackendTieringSpec(make_config(new_engine_id(), **{key: 1}))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("cpu_byte_to_use", "'cpu_bytes_to_use'?"),
        ("cpu_bytes", "'cpu_bytes_to_use'?"),
        ("cpu_copy_thread", "'cpu_copy_threads'?"),
        ("secondary_tier", "'secondary_tiers'?"),
        ("blocks_per_chunks", "'blocks_per_chunk'?"),
        ("byte_to_use", "'bytes_to_use', in the dictionary of a tier in secondary_tiers?"),
        ("copy_thread", "'copy_threads', in the dictionary of a tier in secondary_tiers?"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_right_one(key, nearest):
    with pytest.raises(ValueError, match=f"unknown key '{key}' in kv_connector_extra_config") as refusal:
        CPUBackendTieringSpec(make_config(new_engine_id(), **{key: 1}))
    assert str(refusal.value).endswith(f"did you mean {nearest}")


def test_a_tiers_number_of_threads_beside_the_tiers_could_have_been_the_workers():
    with pytest.raises(ValueError, match=r"did you mean 'cpu_copy_threads'\?"):
        CPUBackendTieringSpec(make_config(new_engine_id(), copy_threads=2))


@pytest.mark.parametrize("key", sorted(set(SPEC_KEYS) - set(TIER_KEYS) - {"backpressure"}))
def test_a_key_of_the_spec_in_a_tier_is_refused(key):
    spec = CPUBackendTieringSpec(make_config(new_engine_id(), secondary_tiers=[tier_config(**{key: 1})]))
    with pytest.raises(ValueError, match=f"'{key}' is no key of a tier and belongs beside secondary_tiers"):
        spec.get_manager()


def test_a_misspelt_key_of_a_tier_is_refused_with_the_nearest_right_one():
    spec = CPUBackendTieringSpec(make_config(new_engine_id(), secondary_tiers=[tier_config(byte_to_use=1)]))
    with pytest.raises(
        ValueError, match="unknown key 'byte_to_use' in the tier's configuration; did you mean 'bytes_to"
    ):
        spec.get_manager()


@pytest.mark.parametrize(
    "value", [None, "async", {"type": "async"}, ["async"], [tier_config(), None], [10**5000], ["x" * 10**5]]
)
def test_tiers_that_are_no_list_of_dictionaries_are_refused(value):
    with pytest.raises(ValueError, match="secondary_tiers must be a list of dictionaries, one per tier, not") as error:
        CPUBackendTieringSpec(make_config(new_engine_id(), secondary_tiers=value))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"offloading_spec": 1}, "'offloading_spec' is no key of a tier: vLLM hands that over itself"),
        ({"tier_type": "x"}, "'tier_type' is no key of a tier: vLLM hands that over itself"),
        ({"type": 5}, "type of a tier must be a name, not 5"),
        ({"module_path": ""}, "module_path of a tier must be a name, not ''"),
        ({"backpressure": 1}, "backpressure must be a dictionary, not 1"),
    ],
)
def test_what_vllm_would_stumble_over_is_refused_in_words(options, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        CPUBackendTieringSpec(
            make_config(new_engine_id(), secondary_tiers=[tier_config(), {**tier_config(), **options}])
        )


def test_a_block_larger_than_any_memory_is_told_in_words():
    with pytest.raises(ValueError, match="which is one block of all workers, not"):
        CPUBackendTieringSpec(make_config(new_engine_id(), blocks_per_chunk=10**400, cpu_bytes_to_use="1GiB"))


@pytest.mark.parametrize("key", ["bytesToUse", "BYTES_TO_USE", "cpuBytesToUse", "Cpu-Bytes-To-Use"])
def test_a_key_in_another_case_is_refused_with_the_right_one(key):
    with pytest.raises(ValueError, match=f"unknown key '{key}' .*did you mean '(cpu_)?bytes_to_use'"):
        CPUBackendTieringSpec(make_config(new_engine_id(), **{key: 1}))


def test_a_key_that_is_like_none_is_logged(caplog):
    CPUBackendTieringSpec(make_config(new_engine_id(), zzz=1))
    assert "Key 'zzz' of kv_connector_extra_config is not known and has no effect" in caplog.text


def test_vllms_keys_are_taken_in_silence(caplog):
    keys = {"eviction_policy": "arc", "offload_prompt_only": False, "store_threshold": 0, "backpressure": None}
    CPUBackendTieringSpec(make_config(new_engine_id(), spec_name="CPUBackendTieringSpec", **keys))
    assert not caplog.text


# ------------------------------------------------------------------------------------------------------ parts of chunks


ATTENTION = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float16}
FULL = FullAttentionSpec(**ATTENTION)
WINDOW = SlidingWindowSpec(**ATTENTION, sliding_window=64)
LOCAL = ChunkedLocalAttentionSpec(**ATTENTION, attention_chunk_size=64)
MAMBA = MambaSpec(block_size=16, shapes=((8, 8),), dtypes=(torch.float16,))
WITH_PARTS = {
    "window": [WINDOW],
    "full and window (Gemma 3, gpt-oss)": [FULL, WINDOW],
    "window of MLA": [SlidingWindowMLASpec(**ATTENTION, sliding_window=64)],
    "layers of several sizes, with windows": [UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"layer": WINDOW})],
    "local attention (Llama 4)": [FULL, LOCAL],
    "Mamba": [MAMBA],
    "full and Mamba (Jamba)": [FULL, MAMBA],
}
WITHOUT_PARTS = {
    "full": [FULL],
    "windows without the hybrid manager": [FullAttentionSpec(**ATTENTION, sliding_window=64)],
    "MLA": [MLAAttentionSpec(**ATTENTION)],
    "layers of several sizes": [UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"layer": FULL})],
}


def kv_cache_config_of(groups: Sequence[KVCacheSpec]) -> KVCacheConfig:
    return KVCacheConfig(10, [], [KVCacheGroupSpec(["layer"], spec) for spec in groups])


def construct(kind: type, kv_cache_config: KVCacheConfig, **options: Any) -> Any:
    """A spec, made as vLLM's connector does: below a frame that has `kv_cache_config`."""
    return kind(make_config(new_engine_id(), **options))


@pytest.mark.parametrize("groups", WITH_PARTS.values(), ids=WITH_PARTS.keys())
def test_several_blocks_a_chunk_are_refused_where_vllm_frees_blocks_of_one(groups):
    kind = r"\((sliding window|sliding window mla|chunked local attention|mamba)\)"
    with pytest.raises(ValueError, match=f"blocks_per_chunk must be 1, not 2 .* {kind}: vLLM stores a chunk"):
        construct(CPUBackendTieringSpec, kv_cache_config_of(groups), blocks_per_chunk=2)


@pytest.mark.parametrize("groups", WITH_PARTS.values(), ids=WITH_PARTS.keys())
def test_one_block_a_chunk_serves_every_kind_of_group(groups):
    construct(CPUBackendTieringSpec, kv_cache_config_of(groups), blocks_per_chunk=1)


@pytest.mark.parametrize("groups", WITHOUT_PARTS.values(), ids=WITHOUT_PARTS.keys())
def test_several_blocks_a_chunk_serve_groups_whose_blocks_stay(groups):
    construct(CPUBackendTieringSpec, kv_cache_config_of(groups), blocks_per_chunk=2)


@pytest.mark.parametrize("groups", [(8,), (None, 8), (8, 20)])
def test_vllms_engine_does_not_start_with_several_blocks_a_chunk_and_a_sliding_window(groups):
    with pytest.raises(ValueError, match=r"blocks_per_chunk must be 1, not 2 .*\(sliding window\)"):
        Engine(groups=groups, blocks_per_chunk=2)


@pytest.mark.parametrize(("groups", "warns"), [([FULL, WINDOW], True), ([FULL], False)])
def test_on_a_gpu_the_tier_warns_of_it(groups, warns, caplog):
    """There the spec and the worker are vLLM's."""
    spec = construct(TieringOffloadingSpec, kv_cache_config_of(groups), secondary_tiers=[tier_config()])

    def connect(kv_cache_config: KVCacheConfig) -> None:
        spec.get_manager().shutdown()

    connect(kv_cache_config_of(groups))
    assert ("blocks_per_chunk must be 1, not 3" in caplog.text) is warns


# --------------------------------------------------------------------------------------- the primary's file in /dev/shm


@pytest.fixture
def engine_id() -> Iterator[str]:
    name = new_engine_id()
    yield name
    remove_files_of(name)


@pytest.fixture
def start(engine_id) -> Iterator[Callable[..., Any]]:
    """Starts a member of an engine: its spec, whose worker or manager has opened the primary."""
    ends: list[Callable[[], None]] = []

    def start(role: str = "worker", **options: Any) -> CPUBackendTieringSpec:
        spec = CPUBackendTieringSpec(make_config(engine_id, **options))
        member = spec.get_manager() if role == "scheduler" else spec.get_worker(make_kv_caches())
        ends.append(member.shutdown)
        return spec

    yield start
    for end in ends:
        end()


def files_of(engine_id: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if engine_id in name]


def remove_files_of(engine_id: str) -> None:
    """Only after a failure are there any."""
    for name in files_of(engine_id):
        Path("/dev/shm", name).unlink()


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left() -> Iterator[None]:
    yield
    remove_files_of(f"async-tier-test-{os.getpid()}-")


def refusal(call: Callable[[], object]) -> str:
    """What a call is refused with, soon."""
    refusals: list[str] = []

    def run() -> None:
        with pytest.raises(ValueError, match="the primary's file") as refused:
            call()
        refusals.append(str(refused.value))

    returns(run)
    return refusals[0]


def inode_of(spec: CPUBackendTieringSpec, role: str) -> int:
    """The file that a member has mapped."""
    region = spec._scheduler_mmap if role == "scheduler" else spec.get_worker(make_kv_caches()).region
    address = f"{region._base.data_ptr():x}-"
    (line,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(address)]
    return int(line.split()[4])


@pytest.mark.parametrize("order", [(0, 1, None), (1, 0, None), (None, 0, 1)])
def test_workers_and_scheduler_of_one_engine_share_the_file(start, order):
    inodes = []
    for rank in order:
        role = "scheduler" if rank is None else "worker"
        inodes.append(inode_of(start(role, rank=rank or 0, world_size=2), role))
    assert len(set(inodes)) == 1


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_a_second_connector_of_the_same_process_is_refused(start, engine_id, role):
    start(role)
    with pytest.raises(ValueError, match="is in use by") as refusal:
        start(role)
    assert shared_memory_path(engine_id) in str(refusal.value)
    assert f"process {os.getpid()} (" in str(refusal.value)
    assert ", this one)" in str(refusal.value)
    assert files_of(engine_id)


def test_a_connector_that_was_refused_leaves_the_first_its_file(make_flat):
    world = make_flat()
    before = world.memory.copy()
    with pytest.raises(ValueError, match="is in use by"):
        CPUBackendTieringSpec(world.spec.config).get_worker(make_kv_caches())
    world.store(1, [3], [5])
    assert world.finish(1) == [1]
    assert np.array_equal(world.memory.primary[5], before.caches[0][3])


@pytest.mark.parametrize("role", ["worker", "scheduler"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"rank": 1, "world_size": 2}),
        ({"rank": 1, "world_size": 2}, {}),
        ({}, {"rank": 1, "world_size": 2, "chunks": 2 * CHUNKS}),
        ({}, {"chunks": 2 * CHUNKS}),
        ({"rank": 1, "world_size": 2}, {"rank": 0, "world_size": 2, "chunks": 2 * CHUNKS}),
    ],
    ids=["more workers, same size", "fewer workers, same size", "more workers", "larger", "larger, another rank"],
)
def test_an_engine_of_another_shape_is_refused_at_once(start, role, first, second):
    start(**first)
    assert "is in use by" in refusal(lambda: start(role, **second))


def test_a_file_that_a_spec_of_vllms_own_uses_is_refused(start, engine_id):
    region = SharedOffloadRegion(engine_id, 1, 0, 4096, 4096)
    try:
        assert f"is in use by process {os.getpid()}" in refusal(start)
        assert files_of(engine_id)
    finally:
        region.cleanup()


@pytest.mark.parametrize("size", [1, 4096, CHUNKS * 4096, 10 << 20])
@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_a_file_that_was_left_behind_is_replaced_with_a_line_in_the_log(start, engine_id, role, size, caplog):
    path = Path(shared_memory_path(engine_id))
    path.touch()
    os.truncate(path, size)
    left = path.stat().st_ino
    spec = returns(lambda: start(role))
    assert inode_of(spec, role) == path.stat().st_ino != left
    assert f"Replaced {path}" in caplog.text
    assert engine_id in caplog.text


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_a_file_that_its_maker_left_empty_is_used(start, engine_id, role):
    Path(shared_memory_path(engine_id)).touch()
    returns(lambda: start(role))


@pytest.mark.starts_process
def test_a_file_is_refused_while_its_engine_lives_and_replaced_when_that_was_killed(start, engine_id, caplog):
    script = f"""
import time
from tests.test_cpu_backend import *
worker = CPUBackendTieringSpec(make_config({engine_id!r})).get_worker(make_kv_caches())
print("open", flush=True)
time.sleep({PATIENCE_S})
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(ValueError, match=f"is in use by process {other.pid} "):
            start()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    returns(start)
    assert f"Replaced {shared_memory_path(engine_id)}" in caplog.text


def claims_at_once(engine_id: str, ranks: Sequence[int | None]) -> list[int | ValueError]:
    """Members that claim their engine's file, and map it, at the same time: its inode by member, or the refusal."""
    barrier, all_claimed = threading.Barrier(len(ranks)), threading.Barrier(len(ranks))
    found: list[Any] = [None] * len(ranks)

    def claim(number: int, rank: int | None) -> None:
        barrier.wait(PATIENCE_S)
        region = None
        try:
            with PrimaryFile(engine_id, 8192, 2, rank) as file:
                region = SharedOffloadRegion(engine_id, 2, rank, 4096, 2048)
                file.hand_over(region)
            found[number] = os.stat(file.path).st_ino
        except ValueError as error:
            found[number] = error
        all_claimed.wait(PATIENCE_S)
        if region is not None:
            region.cleanup()

    threads = [threading.Thread(target=claim, args=each, daemon=True) for each in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return found


def test_members_that_start_at_once_over_a_file_left_behind_share_one(engine_id):
    for _ in range(30):  # the file of each round is left behind to the next
        found = claims_at_once(engine_id, (0, 1, None))
        assert len(set(found)) == 1, found


def test_of_two_engines_that_start_at_once_one_is_refused(engine_id):
    for _ in range(30):
        found = claims_at_once(engine_id, (0, 0))
        assert sorted(isinstance(each, ValueError) for each in found) == [False, True], found


def test_the_first_member_that_ends_takes_the_name_so_that_another_engine_can_start(start, engine_id):
    first = start("scheduler", rank=0, world_size=2)
    ending, staying = start(rank=0, world_size=2), start(rank=1, world_size=2)
    ending.get_worker(make_kv_caches()).shutdown()
    assert not files_of(engine_id)
    other = start(rank=0, world_size=2)
    assert inode_of(other, "worker") != inode_of(staying, "worker") == inode_of(first, "scheduler")
    # Nor does the end of the others take the new file's name.
    staying.get_worker(make_kv_caches()).shutdown()
    first.get_manager().shutdown()
    del first
    gc.collect()
    assert files_of(engine_id)


def test_a_forked_child_that_ends_leaves_its_parent_the_file(engine_id):
    with PrimaryFile(engine_id, 4096, 1, 0) as file:
        child = os.fork()
        if child == 0:
            file.unlink()
            os._exit(0)
        os.waitpid(child, 0)
        assert files_of(engine_id)
    file.unlink()
    assert not files_of(engine_id)


@pytest.mark.parametrize("engine_id", ["no/such/folder", "x" * 300, "a\0b", "\ud800"])
def test_an_engine_id_that_names_no_file_is_refused(engine_id):
    words = f"named after engine_id {re.escape(brief(engine_id))}, cannot be opened: "
    with pytest.raises(ValueError, match=words) as error:
        CPUBackendTieringSpec(make_config(engine_id)).get_worker(make_kv_caches())
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


@pytest.mark.parametrize("kind", ["folder", "link to nothing"])
def test_what_is_no_file_is_refused(start, engine_id, kind):
    path = Path(shared_memory_path(engine_id))
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/nothing")
    try:
        assert "cannot be opened: " in refusal(start)
    finally:
        path.rmdir() if kind == "folder" else path.unlink()


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_a_primary_that_dev_shm_has_no_room_for_leaves_no_file(start, engine_id, role):
    with pytest.raises(RuntimeError, match="Insufficient space in /dev/shm"):
        start(role, cpu_bytes_to_use="1000TiB")
    assert not files_of(engine_id)


# -------------------------------------------------------------------------------------------------- what a start leaves


@pytest.mark.parametrize("with_worker", [False, True], ids=["scheduler alone", "with its worker"])
def test_a_start_that_the_tiers_configuration_refuses_leaves_nothing(engine_id, with_worker):
    before = descriptors()
    for _ in range(3):
        spec = CPUBackendTieringSpec(make_config(engine_id, secondary_tiers=[tier_config(bytes_to_use="x")]))
        if with_worker:
            spec.get_worker(make_kv_caches())
        with pytest.raises(ValueError, match="bytes_to_use must be"):
            spec.get_manager()
        assert bool(files_of(engine_id)) is with_worker  # the worker has its file until it ends
        if with_worker:
            spec.get_worker(make_kv_caches()).shutdown()
    del spec
    assert not files_of(engine_id)
    assert descriptors() <= before


def test_a_start_that_the_spec_refuses_leaves_nothing(engine_id):
    before = descriptors()
    for options in ({"bytes_to_use": 1}, {"cpu_copy_threads": 0}, {"cpu_bytes_to_use": 1}, {"pp_size": 2}):
        with pytest.raises(ValueError, match=r"must be|is a key of a tier"):
            CPUBackendTieringSpec(make_config(engine_id, **options))
    assert not files_of(engine_id)
    assert descriptors() <= before


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("roles", [("worker",), ("scheduler",), ("worker", "scheduler")], ids="+".join)
def test_engines_that_are_dropped_without_shutdown_leave_no_descriptor_and_no_file(engine_id, roles):
    def start_and_drop(number: int) -> None:
        spec = CPUBackendTieringSpec(make_config(f"{engine_id}-{number}", secondary_tiers=[tier_config()]))
        if "worker" in roles:
            spec.get_worker(make_kv_caches())
        if "scheduler" in roles:
            spec.get_manager()
        assert files_of(engine_id)

    start_and_drop(0)  # what is opened once
    before = descriptors()
    for number in range(8):
        start_and_drop(number)
        gc.collect()
        assert not files_of(engine_id)
    assert descriptors() <= before


def test_a_worker_that_is_dropped_ends_its_copies_before_it_lets_go_of_the_primary(make_flat):
    world = make_flat()
    stream, ended = world.worker.engine.store_stream, []
    Gate(stream).hold()
    world.store(1, [0], [0])
    event, region = world.worker.events[1], world.worker.region
    cleanup = region.cleanup
    region.cleanup = lambda: (ended.append(event.is_done), cleanup())
    world.spec = world.worker = None
    gc.collect()
    assert ended == [True]
    world.worker = MagicMock()  # for the fixture


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_shutdown_lets_another_engine_of_the_same_name_start(start, engine_id, role):
    first = start(role)
    member = first.get_manager() if role == "scheduler" else first.get_worker(make_kv_caches())
    member.shutdown()
    assert not files_of(engine_id)
    start(role)


# ----------------------------------------------------------------------------------------------------------- the worker


@pytest.mark.parametrize("options", [{}, {"cpu_copy_threads": 1}, {"cpu_copy_threads": 5}])
def test_the_engine_has_the_threads_of_cpu_copy_threads(make_flat, options):
    world = make_flat(**options)
    assert len(world.worker.engine.thread_ids) == options.get("cpu_copy_threads", 1)


def test_the_worker_is_made_once(make_world):
    world = make_world()
    assert world.spec.get_worker(world.kv_caches) is world.worker


def test_the_worker_keeps_the_memory_of_the_kv_caches(flat):
    tensor = weakref.ref(flat.kv_caches.tensors[0].tensor)
    flat.kv_caches = None
    gc.collect()
    assert tensor() is not None


@pytest.mark.parametrize("devices", [("meta", "cpu", "cpu"), ("cpu", "cpu", "meta")])
def test_kv_caches_elsewhere_than_in_host_memory_are_refused_and_nothing_is_left(devices, caplog):
    engine_id = new_engine_id()
    spec = CPUBackendTieringSpec(make_config(engine_id))
    with pytest.raises(ValueError, match="needs KV caches in host memory, not on meta"):
        spec.get_worker(make_kv_caches(devices=devices))
    assert not os.path.exists(shared_memory_path(engine_id))
    assert "Failed to" not in caplog.text


def test_shutdown_leaves_nothing_in_shared_memory(make_world, caplog):
    world = make_world()
    blocks, chunks = SHAPES["both ends partial"].specs(1)
    submit(world.worker, 1, True, blocks, chunks)
    submit(world.worker, 2, False, blocks, chunks)
    world.finish(1, 2)
    mapping = world.worker.region.mmap_obj
    world.worker.shutdown()
    assert mapping.closed
    assert not os.path.exists(world.path)
    assert "Failed to" not in caplog.text  # vLLM only warns of a mapping that is still in use


def test_shutdown_can_be_called_again(make_world, caplog):
    world = make_world()
    world.worker.shutdown()
    world.worker.shutdown()
    assert world.reported() == []
    assert "Failed to" not in caplog.text


def test_shutdown_ends_copies_before_it_lets_go_of_the_primary(flat):
    store_gate(flat.worker).hold()
    flat.store(1, [0], [0])
    event, region = flat.worker.events[1], flat.worker.region
    ended: list[bool] = []
    flat.worker.region = SimpleNamespace(cleanup=lambda: (ended.append(event.is_done), region.cleanup()))
    returns(flat.worker.shutdown)
    assert ended == [True]
    assert not os.path.exists(flat.path)


def test_shutdown_does_not_report_jobs_that_it_cut_off(flat):
    held_jobs(flat)
    returns(flat.worker.shutdown)
    assert flat.finish(1, 2) == []
