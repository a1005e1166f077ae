"""The whole data path on vLLM's own code: "GPU" KV cache -> vLLM's worker -> its shared region -> its tiering manager
-> this tier on the CUDA engine -> evicted from the primary -> promoted -> vLLM's worker -> "GPU", byte for byte."""

from __future__ import annotations

import hashlib
import os
import uuid
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
)
from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

from async_tier.manager import AsyncSecondaryTierManager
from async_tier.testing import Gate, load_gate
from tests import helpers
from tests.helpers import key, request

PAGE = 2048  # bytes of a GPU block in one tensor
LAYERS = 3
BLOCKS_PER_CHUNK = 2
CHUNK = PAGE * LAYERS * BLOCKS_PER_CHUNK
GPU_BLOCKS = 32
# Of this process alone: others may run at the same time.
NAME = f"async-tier-test-{os.getpid()}-{uuid.uuid4().hex}"

each_pool = pytest.mark.parametrize("pool", ["host", "cuda:0"])


class Machine:
    """A GPU's KV cache, vLLM's worker and region for it, and vLLM's manager with our tier behind its primary."""

    def __init__(self, pool: str, groups: int, primary_blocks: int = 4, tier_blocks: int = 64) -> None:
        self.groups = groups
        self.cache = [torch.empty((GPU_BLOCKS, PAGE), dtype=torch.int8, device="cuda") for _ in range(LAYERS)]
        for tensor in self.cache:
            tensor.copy_(torch.zeros((GPU_BLOCKS, PAGE), dtype=torch.int8))
        sizes = {"num_chunks": primary_blocks, "kv_bytes_per_chunk": CHUNK, "cpu_page_size": CHUNK}
        worker_region = SharedOffloadRegion(NAME, rank=0, **sizes)
        scheduler_region = SharedOffloadRegion(NAME, rank=None, **sizes)
        references = [CanonicalKVCacheRef(layer, PAGE) for layer in range(LAYERS)]
        caches = CanonicalKVCaches(
            tensors=[CanonicalKVCacheTensor(tensor, PAGE) for tensor in self.cache],
            group_data_refs=[references for _ in range(groups)],
        )
        self.worker = CPUOffloadingWorker(
            caches, blocks_per_chunk=BLOCKS_PER_CHUNK, num_cpu_chunks=primary_blocks, mmap_region=worker_region
        )
        assert worker_region.is_pinned
        primary = CPUPrimaryTierOffloadingManager(num_chunks=primary_blocks, mmap_region=scheduler_region)
        self.tier = AsyncSecondaryTierManager(
            offloading_spec=MagicMock(),
            primary_kv_view=primary.get_kv_memoryview(),
            tier_type="async",
            engine="cuda",
            pool=pool,
            staging_bytes="64KiB",
            bytes_to_use=tier_blocks * CHUNK,
        )
        helpers.remember(self.tier.block_store, np.zeros(0))
        assert self.tier.statistics().engine == "cuda"
        self.manager = TieringOffloadingManager(primary_tier=primary, secondary_tiers=[self.tier])
        self._jobs = 0

    def content(self, name: bytes, layer: int) -> np.ndarray:
        """What the GPU computed for a chunk in one layer: shape (BLOCKS_PER_CHUNK, PAGE)."""
        digest = hashlib.sha512(name + bytes([layer])).digest()
        size = BLOCKS_PER_CHUNK * PAGE
        return np.frombuffer(digest * (size // len(digest)), dtype=np.int8).reshape(BLOCKS_PER_CHUNK, PAGE)

    def gpu_blocks(self, names: list[bytes], first: int) -> GPULoadStoreSpec:
        """GPU blocks from `first` on for these chunks, which are in order of their groups."""
        count = len(names) * BLOCKS_PER_CHUNK
        each = count // self.groups
        return GPULoadStoreSpec(list(range(first, first + count)), [each] * self.groups, [0] * self.groups)

    def offload(self, names: list[bytes]) -> None:
        """As after a forward pass: the KV cache holds these chunks; store them, and let the manager cascade."""
        for layer, tensor in enumerate(self.cache):
            for at, name in enumerate(names):
                first = at * BLOCKS_PER_CHUNK
                tensor[first : first + BLOCKS_PER_CHUNK].copy_(torch.from_numpy(self.content(name, layer).copy()))
        context = request(f"store {self._jobs}", names)
        self.manager.on_new_request(context)
        prepared = self.manager.prepare_store(names, context)
        assert prepared is not None
        assert list(prepared.keys_to_store) == names
        self._transfer(self.worker.submit_store, self.gpu_blocks(names, 0), prepared.store_spec)
        self.manager.complete_store(set(names), context)
        self.manager.on_request_finished(context)
        self.step()

    def fetch(self, names: list[bytes], first: int) -> None:
        """As before a forward pass: bring chunks into GPU blocks from `first` on."""
        context = request(f"load {self._jobs}", names)
        self.manager.on_new_request(context)
        for _ in range(1000):
            answers = [self.manager.lookup(name, context) for name in names]
            assert LookupResult.MISS not in answers
            if all(answer is LookupResult.HIT for answer in answers):
                break
            self.step()
            self.tier.block_store.drain()
        else:
            raise AssertionError("the chunks were never promoted")
        self._transfer(
            self.worker.submit_load, self.manager.prepare_load(names, context), self.gpu_blocks(names, first)
        )
        self.manager.complete_load(names, context)
        self.manager.on_request_finished(context)
        self.step()

    def in_cache(self, names: list[bytes], first: int) -> list[bool]:
        """Whether each chunk's bytes are in the GPU blocks from `first` on, in all layers."""
        right = []
        for at, name in enumerate(names):
            block = first + at * BLOCKS_PER_CHUNK
            right.append(
                all(
                    np.array_equal(tensor.cpu().numpy()[block : block + BLOCKS_PER_CHUNK], self.content(name, layer))
                    for layer, tensor in enumerate(self.cache)
                )
            )
        return right

    def step(self) -> None:
        helpers.end_step(self.manager)
        self.manager.get_stats()
        list(self.manager.take_events())

    def close(self) -> None:
        self.worker.shutdown()
        self.manager.shutdown()

    def _transfer(self, submit, source, target) -> None:
        self._jobs += 1
        assert submit(self._jobs, source, target)
        self.worker.wait({self._jobs})
        assert [(end.job_id, end.success) for end in self.worker.get_finished()] == [(self._jobs, True)]


@pytest.fixture
def shm():
    def ours() -> list[str]:
        return [name for name in os.listdir("/dev/shm") if NAME in name]

    assert not ours()
    yield
    assert not ours()


@each_pool
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("delay_us", [0.0, 500.0])
def test_chunks_come_back_to_the_gpu_as_they_left_it(pool, groups, delay_us, emulator, shm):
    machine = Machine(pool, groups)
    if emulator is not None:
        emulator.set_delay(None, delay_us)
    requests = [
        [key(100 * number + place, group) for group in range(groups) for place in range(2)] for number in range(6)
    ]
    for names in requests:
        machine.offload(names)
        machine.tier.block_store.drain()
        machine.step()
    assert machine.tier.get_num_blocks() == 6 * 2 * groups
    for turn, names in enumerate(requests):
        assert machine.in_cache(names, first=16) == [False] * len(names), "there is nothing to show"
        machine.fetch(names, first=16)
        assert machine.in_cache(names, first=16) == [True] * len(names), f"request {turn} came back otherwise"
    statistics = machine.tier.statistics()
    assert statistics.blocks_loaded >= (6 - 4 // (2 * groups)) * 2 * groups, "the primary had most of them"
    assert statistics.failed_jobs == statistics.faults == 0
    machine.close()


@pytest.mark.emulated
@each_pool
def test_transfers_of_the_worker_and_of_the_tier_overlap(pool, emulator, shm):
    # A store of the tier is held; the worker's own transfers, on its own streams, go on.
    machine = Machine(pool, groups=1, primary_blocks=8)
    first, second = [key(1), key(2)], [key(3), key(4)]
    stream = machine.tier.block_store.engine.store_stream
    with Gate(stream):
        machine.offload(first)
        assert machine.tier.statistics().jobs_in_flight == 1
        machine.offload(second)
        machine.fetch(second, first=16)
        assert machine.in_cache(second, first=16) == [True, True]
        assert machine.tier.get_num_blocks() == 0
    machine.tier.block_store.drain()
    machine.step()
    assert machine.tier.get_num_blocks() == 4
    machine.close()


@pytest.mark.emulated
def test_the_control_sees_a_row_that_is_read_too_early(emulator, shm):
    # Without waiting for the load's event the worker takes bytes that are not there yet.
    machine = Machine("host", groups=1)
    names = [key(1), key(2)]
    machine.offload(names)
    machine.tier.block_store.drain()
    machine.step()
    machine.offload([key(number) for number in range(10, 14)])
    machine.tier.block_store.drain()
    machine.step()
    store = machine.tier.block_store
    with load_gate(store):
        copy_rows = store.engine.load_stream.copy_rows

        def impatient(*rows):
            copy_rows(*rows)
            return SimpleNamespace(is_done=True, failed=False, seconds=0.0)

        store.engine.load_stream.copy_rows = impatient
        store.drain = lambda: None
        machine.fetch(names, first=16)
        assert machine.in_cache(names, first=16) == [False, False]
        del store.engine.load_stream.copy_rows, store.drain
    torch.cuda.synchronize()
    machine.close()
