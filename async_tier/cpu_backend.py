"""CPUBackendTieringSpec: lets vLLM's CPU backend offload, which `TieringOffloadingSpec` refuses on that platform.

Configured in `kv_connector_extra_config`:

    {"spec_name": "CPUBackendTieringSpec", "spec_module_path": "async_tier.cpu_backend", "cpu_copy_threads": 1, ...}

The scheduler's side is vLLM's own. The worker's side copies between the KV cache and the primary tier on native
threads, so that transfers overlap with the forward pass. Written for vLLM 0.32, the newest with a CPU build.

Order, which vLLM gets from CUDA streams and a CPU has to keep itself: the forward pass and the zeroing of blocks are
synchronous here, so what they wrote is in memory when vLLM submits a transfer. Transfers of one direction run in the
order of submission. `wait` is the only fence before a block that is being stored is given to somebody else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from async_tier.config import parse_threads
from async_tier.streams.base import CopyEvent
from async_tier.streams.host import HostEngine, HostStream, cpus_before_openmp

DEFAULT_COPY_THREADS = 1


class CPUBackendTieringSpec(TieringOffloadingSpec):
    """`TieringOffloadingSpec` with a worker for KV caches in host memory.

    Its own key: `cpu_copy_threads`, native copy threads of each worker process, 1 to 64, default 1. Raises ValueError
    for a number out of range and for `canonical_layout`, which this worker does not have.
    """

    def __init__(self, config: OffloadingConfig) -> None:
        self.cpu_copy_threads = parse_threads(
            "cpu_copy_threads", config.extra_config.get("cpu_copy_threads", DEFAULT_COPY_THREADS)
        )
        if config.canonical_layout:
            raise ValueError(
                "canonical_layout must be false with CPUBackendTieringSpec, not true: it copies whole pages"
            )
        super().__init__(config)
        self._host_worker: HostOffloadingWorker | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker of this process, made at the first call."""
        if self._host_worker is None:
            self._host_worker = self.create_worker(kv_caches)
        return self._host_worker

    def create_worker(self, kv_caches: CanonicalKVCaches) -> HostOffloadingWorker:  # type: ignore[override]
        """A worker over this process's part of the primary tier. Raises ValueError for KV caches not on the CPU."""
        region = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            # A replicated layout keeps one copy for all workers, in the first one's place.
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        try:
            return HostOffloadingWorker(kv_caches, self.blocks_per_chunk, region, self.cpu_copy_threads)
        except BaseException:
            region.cleanup()
            raise


@dataclass(frozen=True)
class _Pages:
    """One KV cache tensor on both sides: where block b and chunk c lie, in bytes."""

    cache_address: int
    cache_stride: int
    primary_address: int
    primary_stride: int
    page_bytes: int


@dataclass(frozen=True)
class _Transfer:
    job_id: int
    event: CopyEvent
    size: int


class HostOffloadingWorker(OffloadingWorker):
    """Moves blocks between KV caches in host memory and the primary tier, asynchronously.

    kv_caches: vLLM's canonical KV caches: tensors of shape (blocks, page bytes) and, by KV group, the tensors that
    its layers use. blocks_per_chunk: blocks of the KV cache in one block of the primary. region: the primary, of which
    the worker becomes the owner. threads: copy threads.

    Called by one thread, vLLM's worker. Jobs of a direction run in the order of submission; loads go before stores,
    and expedited loads before both.
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion, threads: int
    ) -> None:
        self._kv_caches = kv_caches  # keeps their memory
        self._blocks_per_chunk = blocks_per_chunk
        self._tensors = [
            self._pages(kv_cache.tensor, kv_cache.page_size_bytes, region) for kv_cache in kv_caches.tensors
        ]
        self._groups = kv_caches.group_data_refs
        self._region: SharedOffloadRegion | None = region
        self.engine = HostEngine(threads, ordered=True, cpus=cpus_before_openmp())
        # By stream, oldest first; together the jobs not yet reported.
        self._stores: deque[_Transfer] = deque()
        self._loads: deque[_Transfer] = deque()
        self._expedited_loads: deque[_Transfer] = deque()
        self._events: dict[int, CopyEvent] = {}

    def _pages(self, tensor: torch.Tensor, page_bytes: int, region: SharedOffloadRegion) -> _Pages:
        if tensor.device.type != "cpu":
            raise ValueError(f"CPUBackendTieringSpec needs KV caches in host memory, not on {tensor.device}")
        cache = tensor.view(torch.int8).view(-1, page_bytes)
        primary = region.create_next_worker_view(page_bytes * self._blocks_per_chunk)
        return _Pages(cache.data_ptr(), cache.stride(0), primary.data_ptr(), primary.stride(0), page_bytes)

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Queue the copy of blocks of the KV cache to the primary."""
        cache, primary, sizes = self._addresses(src_spec, dst_spec)
        self._submit(self._stores, self.engine.store_stream, job_id, primary, cache, sizes)
        return True

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        """Queue the copy of blocks of the primary to the KV cache.

        An expedited load (vLLM 0.33) is one that vLLM waits for within the step; it does not queue behind others.
        """
        cache, primary, sizes = self._addresses(dst_spec, src_spec)
        if expedited:
            self._submit(self._expedited_loads, self.engine.expedited_stream, job_id, cache, primary, sizes)
        else:
            self._submit(self._loads, self.engine.load_stream, job_id, cache, primary, sizes)
        return True

    def get_finished(self) -> list[TransferResult]:
        """The jobs that ended since the last call, each once. Never blocks."""
        results = []
        for queue in (self._stores, self._loads, self._expedited_loads):
            while queue and queue[0].event.is_done:
                transfer = queue.popleft()
                del self._events[transfer.job_id]
                results.append(TransferResult(transfer.job_id, True, transfer.size, transfer.event.seconds))
        return results

    def wait(self, job_ids: set[int]) -> None:
        """Block until these jobs have ended; each is still reported. Unknown and reported ids are passed over."""
        for job_id in job_ids:
            event = self._events.get(job_id)
            if event is not None:
                event.synchronize()

    def shutdown(self) -> None:
        """End the threads, then let go of the primary. Idempotent."""
        self.engine.close()
        for queue in (self._stores, self._loads, self._expedited_loads):
            queue.clear()
        self._events.clear()
        if self._region is not None:
            self._region.cleanup()
            self._region = None

    def _submit(
        self,
        queue: deque[_Transfer],
        stream: HostStream,
        job_id: int,
        destinations: np.ndarray,
        sources: np.ndarray,
        sizes: np.ndarray,
    ) -> None:
        event = stream.copy(destinations, sources, sizes)
        self._events[job_id] = event
        queue.append(_Transfer(job_id, event, int(sizes.sum())))

    def _addresses(
        self, cache_spec: GPULoadStoreSpec, primary_spec: LoadStoreSpec
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(addresses in the KV cache, addresses in the primary, sizes), one entry a block and layer.

        The blocks of a KV group are consecutive in the request, the first being number `block_indices[group]`. Where
        that, or the group's end, is not on a chunk's boundary, only a part of the first or last chunk is meant.
        """
        assert isinstance(primary_spec, BlockIDsLoadStoreSpec)
        factor = self._blocks_per_chunk
        cache: list[np.ndarray] = []
        primary: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        first_block = first_chunk = 0
        for refs, count, index in zip(self._groups, cache_spec.group_sizes, cache_spec.block_indices, strict=True):
            if count == 0:
                continue
            skipped = index % factor
            places = np.arange(skipped, skipped + count)
            chunk_count = -(-(skipped + count) // factor)
            blocks = cache_spec.block_ids[first_block : first_block + count].astype(np.uint64)
            chunks = primary_spec.block_ids[first_chunk : first_chunk + chunk_count].astype(np.uint64)
            first_block += count
            first_chunk += chunk_count
            chunk_of_block, part = chunks[places // factor], (places % factor).astype(np.uint64)
            for ref in refs:
                pages = self._tensors[ref.tensor_idx]
                cache.append(blocks * np.uint64(pages.cache_stride) + np.uint64(pages.cache_address))
                primary.append(
                    chunk_of_block * np.uint64(pages.primary_stride)
                    + part * np.uint64(pages.page_bytes)
                    + np.uint64(pages.primary_address)
                )
                sizes.append(np.full(count, ref.page_size_bytes, dtype=np.uint64))
        assert first_block == len(cache_spec.block_ids), "blocks of the KV cache beyond those of its groups"
        assert first_chunk == len(primary_spec.block_ids), "blocks of the primary beyond those of the KV groups"
        if not cache:
            nothing = np.empty(0, dtype=np.uint64)
            return nothing, nothing, nothing
        return np.concatenate(cache), np.concatenate(primary), np.concatenate(sizes)
