"""TierConfig: a tier's dictionary in `secondary_tiers`, parsed and checked.

Every mistake raises a ValueError: one sentence that names the key, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from async_tier.eviction import EvictionPolicy, LeastRecentlyUsed
from async_tier.text import brief, format_size, nearest_key, parse_size

ENGINES = ("auto", "cuda", "host")
LOCALITIES = ("LOCAL", "REMOTE")
MAX_COPY_THREADS = 64
POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LeastRecentlyUsed}
_POLICY_HELP = f"{', '.join(map(repr, POLICIES))} or 'module:Class'"
MAX_NAMESPACE = 256
# With less, pieces would be so small that queueing them costs more than copying them.
MIN_STAGING_BYTES = 64 << 10


def parse_threads(key: str, value: object) -> int:
    """A number of copy threads, 1 to 64. Raises ValueError, naming `key`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COPY_THREADS:
        raise ValueError(f"{key} must be an integer from 1 to {MAX_COPY_THREADS}, not {brief(value)}")
    return value


def load_policy(name: str) -> type[EvictionPolicy]:
    """The policy called `name`: one of POLICIES, or "module:Class". Raises ValueError, naming `eviction_policy`."""
    if name in POLICIES:
        return POLICIES[name]
    module, _, attribute = name.partition(":")
    try:
        policy = getattr(importlib.import_module(module), attribute)
        why = "a class over async_tier.eviction.EvictionPolicy with all its methods"
        if isinstance(policy, type) and issubclass(policy, EvictionPolicy) and not inspect.isabstract(policy):
            return policy
    except (Exception, SystemExit) as error:  # whatever importing a module raises
        why = f"one that can be imported ({type(error).__name__}: {brief(str(error))})"
    raise ValueError(f"eviction_policy must be {_POLICY_HELP}, and that {why}, not {brief(name)}")


def device_number(name: str) -> int:
    """N of "cuda:N"."""
    return int(name.partition(":")[2])


@dataclasses.dataclass(frozen=True)
class TierConfig:
    """The checked configuration of one tier.

    bytes_to_use: capacity in bytes; None means twice the primary tier.
    engine: "cuda" (CUDA streams), "host" (native copy threads), or "auto": "cuda" if this process uses a GPU.
    pool: where the tier's rows lie: "host", "cuda:N" for memory of that device, or the absolute path of a folder, in
        whose files the blocks survive this process, and are shared with others on this node.
    namespace: for such a folder, and only then: the name of what the blocks belong to, 1 to 256 characters. It stands
        for all that their keys do not tell, such as the model's revision.
    pool_on_disk: allow a folder that is not on tmpfs or hugetlbfs.
    device: for the cuda engine with pool "host": the GPU whose copy engines are used, "cuda:N". None means the first
        one of vLLM's workers, or torch's current one without vLLM.
    copy_threads: for the host engine: native copy threads, 1 to 64; None means `streams.host.default_threads`.
    staging_bytes: for the cuda engine with pool "host": device memory that copies pass through, half per direction.
    max_inflight_store_bytes: for the cuda engine: bytes of stores on the device's streams, at most, which a load may
        have to wait for.
    batch_copies: for the cuda engine: use the driver's call for many copies at once, if it has one.
    keep_on_reset: keep serving blocks stored before vLLM's `reset_cache` (block hashes do not cover the weights).
    eviction_policy: "lru", or "module:Class" of an eviction.EvictionPolicy.
    enable_kv_events: publish what the tier stores and evicts as KV cache events, if vLLM publishes any.
    locality: None, "LOCAL" or "REMOTE", which vLLM matches against a request's tier filter.
    trace_path: the file for a trace (see observe.trace); "{pid}" in it stands for the process; None: no trace.
    """

    bytes_to_use: int | None = None
    engine: str = "auto"
    pool: str = "host"
    namespace: str | None = None
    pool_on_disk: bool = False
    device: str | None = None
    copy_threads: int | None = None
    staging_bytes: int = 64 << 20
    max_inflight_store_bytes: int = 32 << 20
    batch_copies: bool = True
    keep_on_reset: bool = False
    eviction_policy: str = "lru"
    enable_kv_events: bool = False
    locality: str | None = None
    trace_path: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> TierConfig:
        """The configuration in `options`. Raises ValueError, naming the key, the value and what is allowed."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                if key in SPEC_KEYS:
                    raise ValueError(
                        f"{key!r} is no key of a tier and belongs beside secondary_tiers, in kv_connector_extra_config"
                    )
                near = nearest_key(key, [*known, "custom_param"])
                raise ValueError(
                    f"unknown key {brief(key)} in the tier's configuration; "
                    + (f"did you mean {near!r}? " if near else "")
                    + "the known keys are "
                    + ", ".join([*known, "custom_param"])
                )
        values = dict(options)
        for key in ("bytes_to_use", "staging_bytes", "max_inflight_store_bytes"):
            if key in values and not (key == "bytes_to_use" and values[key] is None):
                values[key] = parse_size(key, values[key])
        if values.get("copy_threads") is not None:
            values["copy_threads"] = parse_threads("copy_threads", values["copy_threads"])
        config = cls(**values)
        config._check()
        return config

    @property
    def is_on_device(self) -> bool:
        """Whether the rows lie in a GPU's memory."""
        return self.pool.startswith("cuda:")

    @property
    def pool_folder(self) -> Path | None:
        """The folder of a pool that outlives the process; None for another pool."""
        return Path(self.pool) if self.pool.startswith("/") else None

    def _check_pool(self) -> None:
        if not isinstance(self.pool, str) or not (
            re.fullmatch(r"host|cuda:[0-9]{1,4}", self.pool) or (self.pool.startswith("/") and _is_path(self.pool))
        ):
            raise ValueError(
                f"pool must be 'host' or 'cuda:N' with a device's number N, or the absolute path of a folder, not "
                f"{brief(self.pool)}"
            )
        if self.is_on_device and self.engine == "host":
            raise ValueError(f"pool {self.pool!r} needs engine 'cuda' or 'auto', not 'host'")
        name, allowed = self.namespace, "null unless pool is the absolute path of a folder"
        if self.pool_folder is not None:
            allowed = f"a name of 1 to {MAX_NAMESPACE} printable characters that are not all blanks, for what the "
            allowed += "blocks in the folder belong to, such as 'prod'"
            if isinstance(name, str) and name.isprintable() and 0 < len(name.strip()) <= len(name) <= MAX_NAMESPACE:
                return
        if name is not None or self.pool_folder is not None:
            raise ValueError(f"namespace must be {allowed}, not {brief(name)}")
        if self.pool_on_disk is True:
            raise ValueError("pool_on_disk must be false unless pool is the absolute path of a folder, not True")

    def _check(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, not {brief(self.engine)}")
        self._check_pool()
        if self.device is not None:
            if not isinstance(self.device, str) or not re.fullmatch(r"cuda:[0-9]{1,4}", self.device):
                raise ValueError(f"device must be null or 'cuda:N' with a device's number N, not {brief(self.device)}")
            if self.engine == "host":
                raise ValueError(f"device {self.device!r} needs engine 'cuda' or 'auto', not 'host'")
            if self.is_on_device and device_number(self.pool) != device_number(self.device):
                raise ValueError(f"device {self.device!r} must be the one of pool {self.pool!r}, or null")
        if self.staging_bytes < MIN_STAGING_BYTES:
            raise ValueError(
                f"staging_bytes must be at least {MIN_STAGING_BYTES} bytes ({format_size(MIN_STAGING_BYTES)}), "
                f"not {self.staging_bytes}"
            )
        for key in ("batch_copies", "keep_on_reset", "enable_kv_events", "pool_on_disk"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} must be true or false, not {brief(getattr(self, key))}")
        policy = self.eviction_policy
        if not isinstance(policy, str) or not (policy in POLICIES or re.fullmatch(r"[\w.]+:\w+", policy)):
            raise ValueError(f"eviction_policy must be {_POLICY_HELP}, not {brief(policy)}")
        if self.locality is not None and self.locality not in LOCALITIES:
            raise ValueError(f"locality must be null, 'LOCAL' or 'REMOTE', not {brief(self.locality)}")
        if self.trace_path is not None and not _is_path(self.trace_path):
            raise ValueError(f"trace_path must be null or the name of a file, not {brief(self.trace_path)}")


def _is_path(value: object) -> bool:
    """Whether the value can be the name of a file."""
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


# Keys of a tier's dictionary in `secondary_tiers`, and those that vLLM's and our spec read beside that list.
TIER_KEYS = ("type", "module_path", *(field.name for field in dataclasses.fields(TierConfig)), "custom_param")
SPEC_KEYS = (
    "spec_name",
    "spec_module_path",
    "cpu_bytes_to_use",
    "cpu_copy_threads",
    "secondary_tiers",
    "backpressure",
    "block_size",
    "blocks_per_chunk",
    "eviction_policy",
    "cache_policy_module_path",
    "store_threshold",
    "max_tracker_size",
    "offload_prompt_only",
    "self_describing_kv_events",
    "canonical_layout",
    "tier_poll_interval_s",
    "sync_load_budget_bytes",
)


def check_keys(extra_config: Mapping[str, Any]) -> list[str]:
    """The keys of `kv_connector_extra_config` that nobody knows and that resemble none.

    Raises ValueError for keys that are a tier's or misspelt, and for tiers that are no dictionaries.
    """
    check_tiers(extra_config)
    unknown = []
    for key in extra_config:
        if key in SPEC_KEYS:
            continue
        if key in TIER_KEYS:
            near = nearest_key(key, SPEC_KEYS)
            raise ValueError(
                f"{brief(key)} is a key of a tier and belongs into its dictionary in secondary_tiers, not beside it"
                + (f"; or did you mean {near!r}?" if near and near not in extra_config else "")
            )
        near = nearest_key(key, [*SPEC_KEYS, *TIER_KEYS])
        if near:
            place = "" if near in SPEC_KEYS else ", in the dictionary of a tier in secondary_tiers"
            raise ValueError(f"unknown key {brief(key)} in kv_connector_extra_config; did you mean {near!r}{place}?")
        unknown.append(key)
    return unknown


def check_tiers(extra_config: Mapping[str, Any]) -> None:
    """Refuse tiers on which vLLM, which constructs them, would fail unclearly. Raises ValueError."""
    tiers = extra_config.get("secondary_tiers", [])
    if not isinstance(tiers, list) or not all(isinstance(tier, dict) for tier in tiers):
        raise ValueError(f"secondary_tiers must be a list of dictionaries, one per tier, not {brief(tiers)}")
    for tier in tiers:
        for key in ("offloading_spec", "primary_kv_view", "tier_type", "backpressure_detector"):
            if key in tier:
                raise ValueError(f"{key!r} is no key of a tier: vLLM hands that over itself")
        for key in ("type", "module_path"):
            if key in tier and not (isinstance(tier[key], str) and tier[key]):
                raise ValueError(f"{key} of a tier must be a name, not {brief(tier[key])}")
    for settings in (extra_config, *tiers):
        if not isinstance(settings.get("backpressure") or {}, dict):
            raise ValueError(f"backpressure must be a dictionary, not {brief(settings['backpressure'])}")
