"""The one file that knows that vLLM has versions: 0.25 to 0.33.

It asks for features, not for version numbers, and gives the rest of the package one shape of vLLM:

    what                              0.25   0.26   0.27   0.28   0.30   0.31   0.33
    a job's row numbers               block_ids ................. chunk_ids ........
    Medium, Locality                  -      -      yes ............................
    JobResult.successful_keys         -      -      -      yes .....................
    JobResult.transfer_bytes          -      -      -      -      -      yes .......
    backpressure_detector, the
      signal of a reset               -      -      -      -      -      yes .......
    touch in prefix order             yes ....................... yes    - .........
    positions of keys                 -      -      -      -      -      yes .......
"""

from __future__ import annotations

import inspect
import itertools
import operator
import re
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import numpy as np

from async_tier.block_store import Finished
from async_tier.order import SequenceOrder

try:
    import vllm.platforms
    import vllm.v1.kv_offload.base as vllm_base
    import vllm.v1.kv_offload.tiering.base as vllm_tiering
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
    from vllm.v1.kv_offload.base import ReqContext
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
except ImportError as error:
    raise ImportError(
        "async-tier needs a vLLM with KV-offload tiering (vllm.v1.kv_offload.tiering), version 0.25 or later; install "
        "the extra 'vllm' or 'cpu'"
    ) from error

Config = TypeVar("Config")

# What `Finished` calls the fields of vLLM's JobResult, of which a version has the first ones.
_RESULT_FIELDS = {
    "job_id": "job_id",
    "success": "success",
    "successful_keys": "loaded_keys",
    "transfer_time": "seconds",
    "transfer_bytes": "bytes",
}
_result_values = operator.attrgetter(
    *(_RESULT_FIELDS[name] for name in itertools.takewhile(_RESULT_FIELDS.__contains__, JobResult.__dataclass_fields__))
)
_Job = vars(vllm_tiering).get("TransferJob") or vars(vllm_tiering)["JobMetadata"]  # that before 0.28
# The rows of the primary of a job, in the order of its keys.
row_numbers: Callable[[Any], np.ndarray] = operator.attrgetter(
    "chunk_ids" if "chunk_ids" in _Job.__dataclass_fields__ else "block_ids"
)
_BASE_TAKES_DETECTOR = "backpressure_detector" in inspect.signature(SecondaryTierManager.__init__).parameters
_HAS_POSITIONS = hasattr(ReqContext, "get_offload_key_position")

# The KV group of a key.
group_of: Callable[[Any], int] = vllm_base.get_offload_group_idx

# Whether `drain_jobs` is vLLM's only word of a reset, because there is no detector to tell of it.
DRAIN_MEANS_RESET = not _BASE_TAKES_DETECTOR


class TierBase(SecondaryTierManager):
    """vLLM's base class, with the constructor and class attributes of its version."""

    if hasattr(vllm_base, "Medium"):
        medium = vllm_base.Medium.CPU

    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, detector: ResetListener | None
    ) -> None:
        options: dict[str, Any] = {"backpressure_detector": detector} if _BASE_TAKES_DETECTOR else {}
        super().__init__(
            offloading_spec=offloading_spec, primary_kv_view=primary_kv_view, tier_type=tier_type, **options
        )


def locality(name: str | None) -> Any:
    """vLLM's Locality called `name`; the name itself where vLLM has none."""
    if name is None or not hasattr(vllm_base, "Locality"):
        return name
    return vllm_base.Locality(name)


def job_result(finished: Finished) -> JobResult:
    """vLLM's JobResult, with those of its fields that this version has."""
    return JobResult(*_result_values(finished))


def node_count(offloading_spec: Any) -> int:
    """The nodes that the workers of one engine are spread over, as far as a spec shows it; else 1.

    Up to 0.26 the spec has vLLM's configuration. Later ones have a number of workers only: if this node has fewer
    GPUs than that, some are elsewhere. (An engine on a part of each node's GPUs does not show.)
    """
    config = getattr(getattr(offloading_spec, "vllm_config", None), "parallel_config", None)
    for name in ("nnodes_within_dp", "nnodes"):
        nodes = getattr(config, name, None)
        if isinstance(nodes, int):  # vLLM's unit tests pass mocks
            return nodes
    workers = getattr(getattr(getattr(offloading_spec, "config", None), "parallel", None), "world_size", None)
    if isinstance(workers, int) and vllm.platforms.current_platform.is_cuda_alike():
        # Counted by the driver's management library: makes no CUDA context.
        return -(-workers // max(1, vllm.platforms.current_platform.device_count()))
    return 1


def has_one_worker(offloading_spec: Any) -> bool:
    """Whether the engine is known to have one worker, so that it may live in this process and share its context."""
    parallel = getattr(getattr(offloading_spec, "config", None), "parallel", None)
    if parallel is None:  # up to 0.26
        parallel = getattr(getattr(offloading_spec, "vllm_config", None), "parallel_config", None)
    workers = getattr(parallel, "world_size", None)
    return isinstance(workers, int) and workers == 1


def tokens_per_block(offloading_spec: Any) -> tuple[int, ...]:
    """The tokens of one of our blocks, by KV group; empty if the spec does not say (up to 0.26, and mocks)."""
    groups = getattr(offloading_spec, "tokens_per_block", None)
    factor = getattr(offloading_spec, "blocks_per_chunk", None)
    if not isinstance(groups, tuple) or not isinstance(factor, int):
        return ()
    return tuple(tokens * factor for tokens in groups)


def tokens_per_step(offloading_spec: Any) -> int | None:
    """vLLM's `max_num_batched_tokens`; None if that cannot be known.

    Up to 0.26 the spec has vLLM's configuration. Later ones hide it from tiers, whose constructors run below that of
    the connector, which was given it: it is among what these callers hold.
    """
    config = _vllms(VllmConfig, "vllm_config", offloading_spec)
    return None if config is None else config.scheduler_config.max_num_batched_tokens


def partial_chunks(offloading_spec: Any) -> str | None:
    """A sentence if vLLM serves wrong KV, because it takes parts of chunks for wholes; None as far as nothing shows.

    It frees blocks of such groups while the request runs, stores a chunk when its last block is there, and loads it
    whole. Seen with vLLM 0.32 and sliding windows, alone and beside full attention.
    """
    # The latter up to 0.26.
    factor = getattr(offloading_spec, "blocks_per_chunk", getattr(offloading_spec, "block_size_factor", None))
    config = _vllms(KVCacheConfig, "kv_cache_config", offloading_spec)
    if config is None or not isinstance(factor, int) or factor == 1:
        return None
    kinds = set()
    offloaded = getattr(config, "prefix_cacheable_group_ids", range(len(config.kv_cache_groups)))
    for group in offloaded:
        spec = config.kv_cache_groups[group].kv_cache_spec
        # Layers that differ in size have a spec each.
        for layer in getattr(spec, "kv_cache_specs", {"": spec}).values():
            if not isinstance(layer, FullAttentionSpec):
                words = re.sub("(?<=[a-z])(?=[A-Z])", " ", type(layer).__name__.removesuffix("Spec"))
                kinds.add(words.lower())  # "sliding window", "mamba"
    if not kinds:
        return None
    return (
        f"blocks_per_chunk must be 1, not {factor} (block_size: the KV cache's own), with this model's KV groups "
        f"({', '.join(sorted(kinds))}): vLLM stores a chunk of which it has freed blocks, and loads it as a whole"
    )


def _vllms(kind: type[Config], name: str, offloading_spec: Any) -> Config | None:
    """The configuration called `name` that the spec has, or a caller of the one who asks; None if there is none."""
    config = getattr(offloading_spec, name, None)
    frame: FrameType | None = sys._getframe(1)  # not this one, which would be in its own locals
    while frame is not None and not isinstance(config, kind):
        config = frame.f_locals.get(name)
        frame = frame.f_back
    return config if isinstance(config, kind) else None


def order_of(context: Any) -> SequenceOrder:
    """A new order for the request of this ReqContext.

    vLLM 0.31 and later note each key's end token, in a dict that has no public name. Before, `touch` tells the order.
    """
    return SequenceOrder(context._offload_key_positions if _HAS_POSITIONS else {})


class NeverDrop:
    """A back-pressure policy for a tier that nobody asked to hold stores back: it drops nothing."""

    def should_store(self, detector: Any) -> bool:
        return True

    def on_store_skipped(self, num_blocks: int) -> None:
        pass

    def pop_stores_dropped(self) -> tuple[int, int]:
        return 0, 0

    def reset(self) -> None:
        pass


class NoPressure:
    """A back-pressure detector that never holds a store back, with what vLLM asks of one (0.31 to 0.33)."""

    policy = NeverDrop()
    stats: dict[str, float] = {}  # noqa: RUF012 - read only, and vLLM's type for it

    def should_store(self, num_blocks: int) -> bool:
        return True

    def update(self, submit_time: float, num_bytes: int) -> None:
        pass

    def on_store_completed(self, elapsed_s: float, num_bytes: int) -> None:
        pass

    def on_store_failed(self) -> None:
        pass

    def is_under_pressure(self) -> bool:
        return False

    def reset(self) -> None:
        pass


class ResetListener:
    """A detector, seen through a wrapper that hears `reset`: vLLM's only word of `reset_cache` beyond a drain.

    `on_reset` is a method of the tier, which holds this object: kept weakly, so that a tier ends with its last user.
    """

    def __init__(self, detector: Any, on_reset: Callable[[], None]) -> None:
        self.__dict__["_detector"] = detector
        self.__dict__["_on_reset"] = weakref.WeakMethod(on_reset)

    def reset(self) -> None:
        on_reset = self._on_reset()
        try:
            if on_reset is not None:
                on_reset()
        finally:
            self._detector.reset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_detector"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__dict__["_detector"], name, value)
