"""The only file that knows about the differences between vLLM's versions, 0.25 to 0.33.

It tests for features, not for version numbers, and gives the rest of the package one interface:

    what                              0.25   0.26   0.27   0.28   0.30   0.31   0.33
    a job's row numbers               block_ids ................. chunk_ids ........
    Medium, Locality                  -      -      yes ............................
    JobResult.successful_keys         -      -      -      yes .....................
    JobResult.transfer_bytes          -      -      -      -      -      yes .......
    backpressure_detector, the
      signal of a reset               -      -      -      -      -      yes .......
    touch in prefix order             yes ....................... yes    - .........
    positions of keys                 -      -      -      -      -      yes .......
    events with an owner              -      -      -      -      yes (0.29) .......
    config_info                       -      -      -      -      -      -      yes
    a fixed seed of block hashes      -      -      -      -      yes (0.29) .......
    the KV layout in the configuration -     -      -      -      yes ..............
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import os
import re
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch

from async_tier.jobs import Finished
from async_tier.order import SequenceOrder
from async_tier.sizes import KVSizes

try:
    import vllm.platforms
    import vllm.v1.kv_offload.base as vllm_base
    import vllm.v1.kv_offload.tiering.base as vllm_tiering
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheTensor
    from vllm.v1.kv_offload.base import ReqContext
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
except ImportError as error:
    raise ImportError(
        "async-tier needs a vLLM with KV-offload tiering (vllm.v1.kv_offload.tiering), version 0.25 or later; install "
        "the extra 'vllm' or 'cpu'"
    ) from error

try:
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
except ImportError:  # up to 0.30, whose tiers are given none
    BackpressureDetector = object  # type: ignore[assignment,misc]

Config = TypeVar("Config")

# The fields of vLLM's JobResult, and their names in `Finished`. A version may lack some, and have others in between.
_RESULT_FIELDS = {
    "job_id": "job_id",
    "success": "success",
    "successful_keys": "loaded_keys",
    "transfer_time": "seconds",
    "transfer_bytes": "bytes",
}
_result_names = [name for name in JobResult.__dataclass_fields__ if name in _RESULT_FIELDS]
_result_values = operator.attrgetter(*(_RESULT_FIELDS[name] for name in _result_names))
# Required fields that a later version may add. Nothing is known of them here, so they are None.
_UNKNOWN_FIELDS = dict.fromkeys(
    name
    for name, field in JobResult.__dataclass_fields__.items()
    if name not in _RESULT_FIELDS and field.init and field.default is field.default_factory is dataclasses.MISSING
)
_Job = vars(vllm_tiering).get("TransferJob") or vars(vllm_tiering)["JobMetadata"]  # JobMetadata before 0.28
# row_numbers(job): the job's rows of the primary, in the order of its keys, shape (n,).
row_numbers: Callable[[Any], np.ndarray] = operator.attrgetter(
    "chunk_ids" if "chunk_ids" in _Job.__dataclass_fields__ else "block_ids"
)
_base_keywords = {
    name
    for name, parameter in list(inspect.signature(SecondaryTierManager.__init__).parameters.items())[1:]
    if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
}
_BASE_TAKES_DETECTOR = "backpressure_detector" in _base_keywords
_HAS_POSITIONS = hasattr(ReqContext, "get_offload_key_position")

# group_of(key): the number of its KV group.
group_of: Callable[[Any], int] = vllm_base.get_offload_group_idx

# Whether `drain_jobs` is the only sign of a reset, because this vLLM has no detector whose `reset` is called.
DRAIN_MEANS_RESET = not _BASE_TAKES_DETECTOR


class TierBase(SecondaryTierManager):
    """vLLM's base class, with the constructor and class attributes of its version."""

    if hasattr(vllm_base, "Medium"):
        medium = vllm_base.Medium.CPU

    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, detector: Detector | None, **more: Any
    ) -> None:
        if _BASE_TAKES_DETECTOR:
            more["backpressure_detector"] = detector
        super().__init__(offloading_spec=offloading_spec, primary_kv_view=primary_kv_view, tier_type=tier_type, **more)


def base_keywords(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that the constructor of vLLM's base class takes, in this or a later version."""
    return {name: value for name, value in options.items() if name in _base_keywords}


def locality(name: str | None) -> Any:
    """vLLM's Locality called `name`, or the name itself if this vLLM has no Locality."""
    if name is None or not hasattr(vllm_base, "Locality"):
        return name
    return vllm_base.Locality(name)


def job_result(finished: Finished) -> JobResult:
    """vLLM's JobResult, with the fields that this version has."""
    values: dict[str, Any] = {**_UNKNOWN_FIELDS, **dict(zip(_result_names, _result_values(finished), strict=True))}
    return JobResult(**values)


def tier_label(offloading_spec: Any, tier_type: str) -> str:
    """What vLLM's metrics call a tier that is being constructed: its place in the list and its type, as in "1:async".

    A tier is not told its place. vLLM constructs the tiers of a list in order, so it is that of the next of this type.
    How many there were is kept with the spec, and ends with it.
    """
    counts: Counter[str] = vars(offloading_spec).setdefault("_async_tiers", Counter())
    nth = counts[tier_type]
    counts[tier_type] += 1
    tiers = getattr(offloading_spec, "secondary_tier_configs", None)
    if not isinstance(tiers, list):  # vLLM's unit tests pass mocks
        return f"{nth + 1}:{tier_type}"
    places = [at for at, tier in enumerate(tiers) if isinstance(tier, dict) and tier.get("type") == tier_type]
    return f"{(places[nth] if nth < len(places) else nth) + 1}:{tier_type}"


def has_other_tiers(offloading_spec: Any) -> bool:
    """Whether there is another secondary tier in the list, of whatever kind."""
    tiers = getattr(offloading_spec, "secondary_tier_configs", None)
    return isinstance(tiers, list) and len(tiers) > 1


# Whether events can name their owner. Without, any removal would also be taken for one from the primary.
HAS_OWNED_EVENTS = "ownership" in getattr(getattr(vllm_base, "OffloadingEvent", None), "__dataclass_fields__", ())


def are_events_published(offloading_spec: Any) -> bool:
    """Whether vLLM publishes KV cache events, and can publish those of a tier."""
    config = getattr(offloading_spec, "kv_events_config", None)
    return HAS_OWNED_EVENTS and getattr(config, "enable_kv_cache_events", False) is True


def event(keys: list[bytes], is_stored: bool, locality: Any, owner: str) -> Any:
    """vLLM's OffloadingEvent: `keys` can be loaded from the tier `owner` from now on (is_stored), or no more."""
    return vllm_base.OffloadingEvent(
        keys=keys,  # type: ignore[arg-type]
        medium=vllm_base.Medium.CPU,
        removed=not is_stored,
        locality=locality,
        ownership=owner,
        removal_expected=is_stored,
    )


def node_count(offloading_spec: Any) -> int | None:
    """The number of nodes that the workers of one engine are spread over; None if that cannot be known.

    vLLM's configuration has it, unless Ray or torchrun places the workers. Then the number of workers is compared with
    the number of GPUs of this node. (That misses workers on a part of each node's GPUs.) None if the engine's process
    sees no GPU, as under Ray.
    """
    config = getattr(offloading_spec, "vllm_config", None) or _find_config(VllmConfig, "vllm_config", offloading_spec)
    parallel = getattr(config, "parallel_config", None)
    for name in ("nnodes_within_dp", "nnodes"):
        nodes = getattr(parallel, name, None)
        if isinstance(nodes, int):  # vLLM's unit tests pass mocks
            if nodes > 1:
                return nodes
            break
    workers = getattr(getattr(getattr(offloading_spec, "config", None), "parallel", None), "world_size", None)
    if isinstance(workers, int) and vllm.platforms.current_platform.is_cuda_alike():
        # NVML counts them, so this makes no CUDA context.
        devices = vllm.platforms.current_platform.device_count()
        return -(-workers // devices) if devices else None
    return 1


def has_one_worker(offloading_spec: Any) -> bool:
    """Whether there is exactly one worker, so that it may live in this process and share its CUDA context.

    Replicas of a dense model do not know of each other, so each counts its own worker only.
    """
    parallel = getattr(getattr(offloading_spec, "config", None), "parallel", None)
    if parallel is None:  # up to 0.26
        parallel = getattr(getattr(offloading_spec, "vllm_config", None), "parallel_config", None)
    workers, replicas = getattr(parallel, "world_size", None), getattr(parallel, "data_parallel_size", 1)
    return isinstance(workers, int) and workers == replicas == 1


def first_gpu(offloading_spec: Any) -> int | None:
    """The first GPU of the engine's workers, as torch numbers it in this process; None if that cannot be known.

    Computed as vLLM's GPU workers do. The engine's process sees the GPUs of all engines of its node.
    """
    config = getattr(offloading_spec, "vllm_config", None) or _find_config(VllmConfig, "vllm_config", offloading_spec)
    parallel = getattr(config, "parallel_config", None)
    if parallel is None:  # from 0.27 on, if no caller holds it
        parallel = getattr(getattr(offloading_spec, "config", None), "parallel", None)
    if getattr(parallel, "distributed_executor_backend", None) in ("ray", "external_launcher"):
        return None  # they place the workers
    if getattr(parallel, "data_parallel_backend", None) == "ray":
        return None
    workers, replica = getattr(parallel, "world_size", None), getattr(parallel, "data_parallel_rank_local", None)
    if replica is None:
        replica = getattr(parallel, "data_parallel_index", None)
    if not isinstance(workers, int) or not isinstance(replica, int):
        return None
    gpu = replica * workers
    assigned = getattr(parallel, "assigned_physical_gpu_ids", None)  # vLLM's --device-ids, numbered as on the machine
    if isinstance(assigned, list):
        platform = vllm.platforms.current_platform
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpu = assigned[gpu]
        if visible:
            gpu = [platform.device_control_id_to_physical_device_id(each) for each in visible.split(",")].index(gpu)
    return gpu


def tokens_per_block(offloading_spec: Any) -> tuple[int, ...]:
    """The tokens of one of our blocks, by KV group; empty if the spec has no such field (up to 0.26, and mocks)."""
    groups = getattr(offloading_spec, "tokens_per_block", None)
    factor = getattr(offloading_spec, "blocks_per_chunk", None)
    if not isinstance(groups, tuple) or not isinstance(factor, int):
        return ()
    return tuple(tokens * factor for tokens in groups)


def kv_sizes(offloading_spec: Any, row_bytes: int) -> KVSizes | None:
    """What the KV in a row of `row_bytes` is for, and vLLM's limits on prompts and steps; None if unknown."""
    config = _find_config(VllmConfig, "vllm_config", offloading_spec)
    tokens = tokens_per_block(offloading_spec)
    if config is None or not tokens:
        return None
    return KVSizes(row_bytes, tokens, config.model_config.max_model_len, config.scheduler_config.max_num_batched_tokens)


def partial_chunk_problem(offloading_spec: Any) -> str | None:
    """Why vLLM would serve wrong KV with this configuration, in one sentence; None if no reason is found.

    With several blocks per chunk, vLLM frees blocks of such KV groups while the request runs, but stores a chunk once
    its last block is there, and loads it whole. Seen with vLLM 0.32 and sliding windows, also beside full attention.
    """
    # block_size_factor: up to 0.26.
    factor = getattr(offloading_spec, "blocks_per_chunk", getattr(offloading_spec, "block_size_factor", None))
    config = _find_config(KVCacheConfig, "kv_cache_config", offloading_spec)
    if config is None or not isinstance(factor, int) or factor == 1:
        return None
    kinds = set()
    offloaded = getattr(config, "prefix_cacheable_group_ids", range(len(config.kv_cache_groups)))
    for group in offloaded:
        spec = config.kv_cache_groups[group].kv_cache_spec
        # A group of layers that differ in size has a spec for each layer.
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


def configurations(offloading_spec: Any) -> tuple[VllmConfig, KVCacheConfig] | None:
    """vLLM's configurations of this spec; None for a mock.

    Raises ValueError if they cannot be found for a spec of vLLM's.
    """
    config = _find_config(VllmConfig, "vllm_config", offloading_spec)
    caches = _find_config(KVCacheConfig, "kv_cache_config", offloading_spec)
    if config is not None and caches is not None:
        return config, caches
    # The type itself: a mock may claim to be an instance.
    if issubclass(type(offloading_spec), vllm_base.OffloadingSpec):
        missing = "VllmConfig" if config is None else "KVCacheConfig"
        raise ValueError(f"vLLM's {missing} cannot be found, so nobody knows what the blocks of a pool would mean")
    return None


# What the spec, or its `config`, knows of a block. The first three: up to 0.26.
_BLOCK_FIELDS = (
    *("gpu_block_size", "hash_block_size", "block_size_factor"),
    *("tokens_per_block", "tokens_per_hash", "blocks_per_chunk", "canonical_layout", "replicated_layout"),
)


def block_fields(offloading_spec: Any) -> dict[str, Any]:
    """What this version's spec says of a block: its tokens, by KV group, and how the workers' parts lie in it."""
    found = {}
    for holder in (offloading_spec, getattr(offloading_spec, "config", None)):  # the second one has the last word
        for name in _BLOCK_FIELDS:
            value = getattr(holder, name, None)
            if isinstance(value, (int, tuple)):  # vLLM's unit tests pass mocks
                found[name] = value
    return found


def layers_of_tensors(caches: KVCacheConfig) -> list[list[str]]:
    """By tensor of the KV cache, the layers in it: in this order their pages lie in a row."""
    name = "layers" if "layers" in KVCacheTensor.__dataclass_fields__ else "shared_by"  # the first from 0.30 on
    return [getattr(tensor, name) for tensor in caches.kv_cache_tensors]


def kv_layout(config: VllmConfig) -> str | None:
    """In which order the numbers of a layer's KV lie, as far as vLLM has decided; None if it has not."""
    if hasattr(config.cache_config, "kv_cache_layout"):
        return config.cache_config.kv_cache_layout
    # Not at the top: the API server would import the models' layers with it.
    from vllm.distributed.kv_transfer.kv_connector.utils import get_kv_connector_cache_layout

    with set_current_vllm_config(config):  # what the connectors ask for; backends may ask for something else
        return get_kv_connector_cache_layout()


def device() -> dict[str, Any]:
    """What computes. The name of a GPU decides which attention backend vLLM chooses, the CPU's tiles the layout."""
    platform = vllm.platforms.current_platform
    if platform.is_cpu():
        return {"type": "cpu", "machine": os.uname().machine, "amx": torch.cpu._is_amx_tile_supported()}
    try:
        name = platform.get_device_name()
    except Exception:  # whatever the driver's library raises where this process sees no GPU, as under Ray
        name = None
    return {"type": platform.device_type, "name": name}


def hash_seed(algorithm: str) -> str | None:
    """The seed of vLLM's block hashes, for this prefix_caching_hash_algo; None if every process draws its own.

    vLLM takes PYTHONHASHSEED as a text, so "random" and "" are seeds, too. Its `get_none_hash_seed` is of no use: vLLM
    sets the seed after tiers are constructed.
    """
    # Not at the top: up to 0.28 it brings vLLM's scheduler, which the API server, asking for metrics, does without.
    from vllm.v1.core import kv_cache_utils

    resolve = getattr(kv_cache_utils, "resolve_none_hash_seed", None)
    if resolve is None:  # up to 0.28
        return os.environ.get("PYTHONHASHSEED")
    first, second = (resolve(get_hash_fn_by_name(algorithm)) for _ in range(2))
    return first if first == second else None


def _find_config(kind: type[Config], name: str, offloading_spec: Any) -> Config | None:
    """vLLM's configuration called `name`; None if it cannot be found.

    Up to 0.26 the spec has it. Later versions hide it from tiers. But a tier is constructed by the connector, which was
    passed the configuration, so it is found among the local variables of the callers.
    """
    config = getattr(offloading_spec, name, None)
    frame: FrameType | None = sys._getframe(1)  # the caller: this function's own locals would hold it
    while frame is not None and not isinstance(config, kind):
        config = frame.f_locals.get(name)
        frame = frame.f_back
    return config if isinstance(config, kind) else None


def order_of(context: Any) -> SequenceOrder:
    """A new order for the request of this ReqContext.

    vLLM 0.31 and later note each key's end token, in a dict without a public name. Before, `touch` gives the order.
    """
    return SequenceOrder(context._offload_key_positions if _HAS_POSITIONS else {})


class NoPressure(BackpressureDetector):
    """A back-pressure detector that never holds a store back, for a tier that has none configured."""

    def should_store(self, num_blocks: int) -> bool:
        return True

    def on_store_completed(self, elapsed_s: float, num_bytes: int) -> None:
        pass

    def is_under_pressure(self) -> bool:
        return False

    def reset(self) -> None:
        pass


class Detector:
    """A wrapper around vLLM's detector.

    It calls `on_reset` when vLLM calls `reset`, which is the only sign of `reset_cache` besides a drain. And it gives
    the detector the time that a store's copies took. vLLM would measure until it sees the end: with steps of 100 ms,
    some 50 ms for a copy of 0.2 ms, so that an idle tier would look slow and have its stores dropped.

    `on_reset` is a method of the tier that holds this object. It is kept weakly, so that there is no reference cycle.
    """

    def __init__(self, detector: Any, on_reset: Callable[[], None]) -> None:
        self.__dict__["_detector"] = detector
        self.__dict__["_on_reset"] = weakref.WeakMethod(on_reset)
        self.__dict__["_seconds"] = deque()

    def set_store_seconds(self, seconds: Iterable[float]) -> None:
        """seconds: per store being reported, the time of its copies. vLLM calls `update` for them in this order."""
        self._seconds.clear()
        self._seconds.extend(seconds)

    def update(self, submit_time: float, num_bytes: int) -> None:
        """See vLLM's BackpressureDetector.update."""
        if self._seconds:
            submit_time = time.monotonic() - self._seconds.popleft()
        self._detector.update(submit_time, num_bytes)

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
