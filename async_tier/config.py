"""TierConfig: a tier's dictionary in `secondary_tiers`, parsed and checked.

Every mistake is a ValueError of one sentence that names the key, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from async_tier.eviction import EvictionPolicy, LeastRecentlyUsed

ENGINES = ("auto", "cuda", "host")
LOCALITIES = ("LOCAL", "REMOTE")
MAX_COPY_THREADS = 64
# Less than this would make pieces so small that queueing them costs more than copying them.
MIN_STAGING_BYTES = 64 << 10

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
# Digits without end would overflow a float, or int() itself, in an error that names no key.
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*")
_SIZE_HELP = "an integer number of bytes or text with a unit, such as 68719476736, '64GiB' or '500 MB'"


def parse_size(key: str, value: object) -> int:
    """Bytes in `value`: an int, or text with one of the units B, KB to TB (powers of 1000), KiB to TiB (of 1024).

    Raises ValueError that names `key`.
    """
    size: float | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number, unit = match.groups()
        scale = {name.lower(): factor for name, factor in _UNITS.items()}.get(unit.lower())
        if scale is not None:
            # Whole numbers stay exact beyond the 53 bits of a float.
            size = int(number) * scale if number.isdigit() else float(number) * scale
    if size is None or size < 1:
        raise ValueError(f"{key} must be {_SIZE_HELP}, and at least 1 byte, not {value!r}")
    return int(size)


def format_size(size: int) -> str:
    """`size` bytes for a person: "1.5 GiB"."""
    for unit, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def parse_threads(key: str, value: object) -> int:
    """A number of copy threads, 1 to 64. Raises ValueError that names `key`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COPY_THREADS:
        raise ValueError(f"{key} must be an integer from 1 to {MAX_COPY_THREADS}, not {value!r}")
    return value


def load_policy(name: str) -> type[EvictionPolicy]:
    """The policy called `name`: "lru", or "module:Class". Raises ValueError that names `eviction_policy`."""
    if name == "lru":
        return LeastRecentlyUsed
    module, _, attribute = name.partition(":")
    try:
        policy = getattr(importlib.import_module(module), attribute)
        why = "a class over async_tier.eviction.EvictionPolicy with all its methods"
        if isinstance(policy, type) and issubclass(policy, EvictionPolicy) and not inspect.isabstract(policy):
            return policy
    except Exception as error:  # whatever a module raises that is imported
        why = f"one that can be imported ({type(error).__name__}: {error})".replace("\n", " ")
    raise ValueError(f"eviction_policy must be 'lru' or 'module:Class', and that {why}, not {name!r}")


def nearest_key(key: object, known: Sequence[str]) -> str | None:
    """The one of the known keys that `key` is likely a misspelling of."""
    return next(iter(difflib.get_close_matches(str(key), known, n=1, cutoff=0.7)), None)


@dataclasses.dataclass(frozen=True)
class TierConfig:
    """The checked configuration of one tier.

    bytes_to_use: capacity in bytes; None is twice the primary tier.
    engine: "cuda" (CUDA streams), "host" (native copy threads), or "auto": "cuda" where this process uses a GPU.
    pool: where the tier's rows lie: "host", or "cuda:N" for memory of that device.
    copy_threads: of the host engine, native threads that copy, 1 to 64; None is `streams.host.default_threads`.
    staging_bytes: of the cuda engine with pool "host", device memory that copies pass through, half a direction.
    max_inflight_store_bytes: of the cuda engine, bytes of stores on the device's streams, at most; a load waits for
        that many.
    keep_on_reset: keep serving blocks stored before vLLM's `reset_cache` (block hashes do not cover the weights).
    eviction_policy: "lru", or "module:Class" of an eviction.EvictionPolicy.
    locality: None, "LOCAL" or "REMOTE": what vLLM matches against a request's tier filter.
    trace_path: a file to write a trace to (see trace.TraceWriter), in which "{pid}" stands for the process; None: none.
    """

    bytes_to_use: int | None = None
    engine: str = "auto"
    pool: str = "host"
    copy_threads: int | None = None
    staging_bytes: int = 64 << 20
    max_inflight_store_bytes: int = 256 << 20
    keep_on_reset: bool = False
    eviction_policy: str = "lru"
    locality: str | None = None
    trace_path: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> TierConfig:
        """Check `options`; raises ValueError naming the key, the value and what is allowed."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                if key in SPEC_KEYS:
                    raise ValueError(
                        f"{key!r} is no key of a tier and belongs beside secondary_tiers, in kv_connector_extra_config"
                    )
                near = nearest_key(key, [*known, "custom_param"])
                raise ValueError(
                    f"unknown key {key!r} in the tier's configuration; "
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

    def _check(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, not {self.engine!r}")
        if not isinstance(self.pool, str) or not re.fullmatch(r"host|cuda:\d{1,4}", self.pool):
            raise ValueError(f"pool must be 'host' or 'cuda:N' with a device's number N, not {self.pool!r}")
        if self.pool != "host" and self.engine == "host":
            raise ValueError(f"pool {self.pool!r} needs engine 'cuda' or 'auto', not 'host'")
        if self.staging_bytes < MIN_STAGING_BYTES:
            raise ValueError(
                f"staging_bytes must be at least {MIN_STAGING_BYTES} bytes ({format_size(MIN_STAGING_BYTES)}), "
                f"not {self.staging_bytes}"
            )
        if not isinstance(self.keep_on_reset, bool):
            raise ValueError(f"keep_on_reset must be true or false, not {self.keep_on_reset!r}")
        if not isinstance(self.eviction_policy, str) or not re.fullmatch(r"lru|[\w.]+:\w+", self.eviction_policy):
            raise ValueError(f"eviction_policy must be 'lru' or 'module:Class', not {self.eviction_policy!r}")
        if self.locality is not None and self.locality not in LOCALITIES:
            raise ValueError(f"locality must be null, 'LOCAL' or 'REMOTE', not {self.locality!r}")
        if self.trace_path is not None and (not isinstance(self.trace_path, str) or not self.trace_path):
            raise ValueError(f"trace_path must be null or the name of a file, not {self.trace_path!r}")


# Keys of a tier's dictionary in `secondary_tiers`, and those of vLLM's and our spec, which lie beside that list.
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
