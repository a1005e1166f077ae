"""CPUBackendTieringSpec: offloading for vLLM's CPU backend, which `TieringOffloadingSpec` refuses.

Configured in `kv_connector_extra_config`:

    {"spec_name": "CPUBackendTieringSpec", "spec_module_path": "async_tier.cpu_backend", "cpu_copy_threads": 1, ...}

The scheduler's side is vLLM's own. The worker's side copies between the KV cache and the primary tier on native
threads, so that transfers overlap with the forward pass. Written for vLLM 0.32, the newest version with a CPU build.

vLLM gets the order of its accesses from CUDA streams; here it follows from the calls. The forward pass and the zeroing
of blocks are synchronous, so what they wrote is in memory when vLLM submits a transfer. Transfers of one direction run
in the order of submission. `wait` is the only fence before a block that is being stored is used for something else.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingManager,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from async_tier.config import SPEC_KEYS, check_keys, parse_threads
from async_tier.streams.base import CopyEvent
from async_tier.streams.host import HostEngine, HostStream
from async_tier.text import brief, format_size, parse_size
from async_tier.vllm import compat
from async_tier.vllm.logs import adopt_vllms_logging
from async_tier.vllm.openmp import cpus_before_openmp
from async_tier.vllm.primary_file import PrimaryFile

logger = logging.getLogger(__name__)

DEFAULT_COPY_THREADS = 1


class CPUBackendTieringSpec(TieringOffloadingSpec):
    """`TieringOffloadingSpec` with a worker for KV caches in host memory.

    Its own key: `cpu_copy_threads`, native copy threads of each worker process, 1 to 64, default 1. `cpu_bytes_to_use`
    may be text with a unit, like a tier's `bytes_to_use`.

    Raises ValueError for a number out of range, a primary of less than one block, and a key that is misspelt or in the
    wrong place; also for what would be served wrong: `canonical_layout`, pipeline parallelism, and several blocks per
    chunk with a KV group of sliding-window, local-attention or Mamba layers.
    """

    def __init__(self, config: OffloadingConfig) -> None:
        adopt_vllms_logging()
        for key in check_keys(config.extra_config):
            logger.warning(
                "Key %s of kv_connector_extra_config is not known and has no effect; the known keys are %s",
                brief(key),
                ", ".join(SPEC_KEYS),
            )
        primary_bytes = parse_size("cpu_bytes_to_use", config.extra_config.get("cpu_bytes_to_use"))
        self.cpu_copy_threads = parse_threads(
            "cpu_copy_threads", config.extra_config.get("cpu_copy_threads", DEFAULT_COPY_THREADS)
        )
        if config.canonical_layout:
            raise ValueError(
                "canonical_layout must be false with CPUBackendTieringSpec, not true: it copies whole pages"
            )
        if config.parallel.pp_size > 1:
            raise ValueError(
                f"pipeline_parallel_size must be 1 with CPUBackendTieringSpec, not {config.parallel.pp_size}: vLLM "
                "takes all ranks' parts of a block for equally large, but ranks can differ in their number of layers"
            )
        super().__init__(replace(config, extra_config={**config.extra_config, "cpu_bytes_to_use": primary_bytes}))
        if self.num_chunks < 1:
            raise ValueError(
                f"cpu_bytes_to_use must be at least {brief(self.kv_bytes_per_chunk)} bytes "
                f"({format_size(self.kv_bytes_per_chunk)}), which is one block of all workers, not {primary_bytes}"
            )
        wrong = compat.partial_chunk_problem(self)
        if wrong:
            raise ValueError(wrong)
        self._host_worker: HostOffloadingWorker | None = None

    def get_manager(self) -> OffloadingManager:
        """vLLM's manager. Raises ValueError if the primary's file belongs to another engine, and as the tiers do."""
        if self._manager is None:
            with self._primary_file(None) as file:
                super().get_manager()
                region: Any = self._scheduler_mmap
                region.__class__ = _MemberRegion  # vLLM made it; it must end as a worker's region does
                region.join(file)
        return super().get_manager()

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker of this process, created at the first call."""
        if self._host_worker is None:
            self._host_worker = self.create_worker(kv_caches)
        return self._host_worker

    def create_worker(self, kv_caches: CanonicalKVCaches) -> HostOffloadingWorker:  # type: ignore[override]
        """A worker over this process's part of the primary tier.

        Raises ValueError for KV caches not on the CPU, and if the primary's file belongs to another engine.
        """
        rank = self.config.parallel.rank
        with self._primary_file(rank) as file:
            region = _MemberRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                # A replicated layout keeps one copy for all workers, in the place of the first one.
                rank=0 if self.replicated_layout else rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            region.join(file)
        try:
            return HostOffloadingWorker(kv_caches, self.blocks_per_chunk, region, self.cpu_copy_threads)
        except BaseException:
            region.cleanup()
            raise

    def _primary_file(self, rank: int | None) -> PrimaryFile:
        size = self.num_chunks * self.kv_bytes_per_chunk
        return PrimaryFile(self.config.engine_id, size, self.config.parallel.world_size, rank)


class _MemberRegion(SharedOffloadRegion):
    """vLLM's view of the primary. The file's name is removed when the view is cleaned up or dropped."""

    def join(self, file: PrimaryFile) -> None:
        file.hand_over(self)
        self._file = file
        weakref.finalize(self, file.unlink)

    def cleanup(self) -> None:
        super().cleanup()
        self._file.unlink()


@dataclass(frozen=True)
class _Pages:
    """One KV cache tensor on both sides: the addresses, strides and size of its pages, in bytes."""

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
    its layers use. blocks_per_chunk: blocks of the KV cache in one block of the primary. region: the primary, which
    the worker then owns. threads: the number of copy threads.

    Called by one thread, vLLM's worker. Jobs of one direction run in the order of submission; loads go before stores.
    A worker that is dropped ends as if by `shutdown`.
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion, threads: int
    ) -> None:
        self._kv_caches = kv_caches  # so that their memory stays
        self._blocks_per_chunk = blocks_per_chunk
        self._tensors = [
            self._pages(kv_cache.tensor, kv_cache.page_size_bytes, region) for kv_cache in kv_caches.tensors
        ]
        self._groups = kv_caches.group_data_refs
        self.region: SharedOffloadRegion | None = region
        self.engine = HostEngine(threads, ordered=True, cpus=cpus_before_openmp())
        # The jobs not reported yet, by stream, oldest first.
        self._stores: deque[_Transfer] = deque()
        self._loads: deque[_Transfer] = deque()
        # Of the jobs not reported yet, by id. To be read by anyone, changed here only.
        self.events: dict[int, CopyEvent] = {}
        self._finalizer = weakref.finalize(self, _end, self.engine, region)

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

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Queue the copy of blocks of the primary to the KV cache."""
        cache, primary, sizes = self._addresses(dst_spec, src_spec)
        self._submit(self._loads, self.engine.load_stream, job_id, cache, primary, sizes)
        return True

    def get_finished(self) -> list[TransferResult]:
        """The jobs that ended since the last call, each once. Never blocks."""
        results = []
        for queue in (self._stores, self._loads):
            while queue and queue[0].event.is_done:
                transfer = queue.popleft()
                del self.events[transfer.job_id]
                results.append(TransferResult(transfer.job_id, True, transfer.size, transfer.event.seconds))
        return results

    def wait(self, job_ids: set[int]) -> None:
        """Block until these jobs have ended. Each is still reported; unknown and reported ids are ignored."""
        for job_id in job_ids:
            event = self.events.get(job_id)
            if event is not None:
                event.synchronize()

    def shutdown(self) -> None:
        """End the threads, then unmap the primary. Idempotent."""
        self._finalizer.detach()
        self.engine.close()
        for queue in (self._stores, self._loads):
            queue.clear()
        self.events.clear()
        if self.region is not None:
            self.region.cleanup()
            self.region = None

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
        self.events[job_id] = event
        queue.append(_Transfer(job_id, event, int(sizes.sum())))

    def _addresses(
        self, cache_spec: GPULoadStoreSpec, primary_spec: LoadStoreSpec
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(addresses in the KV cache, addresses in the primary, sizes in bytes), one entry per block and layer.

        The blocks of a KV group are consecutive in the request; the first is number `block_indices[group]`. If they do
        not begin or end on a chunk's boundary, only a part of the first or last chunk is copied.
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


def _end(engine: HostEngine, region: SharedOffloadRegion) -> None:
    """End a worker that was dropped: first its copies, then the memory that they touch."""
    engine.close()
    region.cleanup()
