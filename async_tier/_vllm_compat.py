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
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from async_tier.block_store import Finished
from async_tier.eviction import SequenceOrder

try:
    import vllm.platforms
    import vllm.v1.kv_offload.base as vllm_base
    import vllm.v1.kv_offload.tiering.base as vllm_tiering
    from vllm.v1.kv_offload.base import ReqContext
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
except ImportError as error:
    raise ImportError(
        "async-tier needs a vLLM with KV-offload tiering (vllm.v1.kv_offload.tiering), version 0.25 or later; install "
        "the extra 'vllm' or 'cpu'"
    ) from error

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


class RequestOrder:
    """The order of a request's blocks from the positions that vLLM 0.31 and later note in its ReqContext.

    vLLM notes them in prefix order in a dict that has no public name. Where it is found it is asked directly, which
    takes half the time of the public method; it is also the only way to what comes before a key.
    """

    __slots__ = ("_places", "position")

    def __init__(self, context: Any) -> None:
        places = getattr(context, "_offload_key_positions", None)
        self._places: dict[bytes, int] = places if isinstance(places, dict) else {}
        self.position: Callable[[bytes], int | None] = (
            places.get if isinstance(places, dict) else context.get_offload_key_position
        )

    def before(self, keys: Sequence[bytes]) -> list[bytes]:
        places = self._places
        if not places or next(iter(places)) in keys:  # the start of the request
            return []
        first = min((places[key] for key in keys if key in places), default=0)
        return [other for other, place in places.items() if place < first]


class TouchOrder:
    """The order of a request's blocks from `touch`, which vLLM up to 0.30 calls with all its keys in prefix order."""

    def __init__(self) -> None:
        self._places: dict[bytes, int] = {}

    def note(self, keys: Collection[bytes]) -> None:
        """`keys` are those of one KV group, in prefix order."""
        self._places.update(zip(keys, range(len(keys)), strict=True))

    def position(self, key: bytes) -> int | None:
        return self._places.get(key)

    def before(self, keys: Sequence[bytes]) -> tuple[bytes, ...]:
        return ()  # touch itself has refreshed all of the request's blocks


def order_of(context: Any) -> SequenceOrder:
    """A new order for the request of this ReqContext."""
    return RequestOrder(context) if _HAS_POSITIONS else TouchOrder()


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
