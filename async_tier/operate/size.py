"""Divides memory between primary and tier, for a model whose KV has these sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from async_tier.operate.settings import CONNECTOR, CPU_SPEC, CPU_SPEC_MODULE, GPU_SPEC, TIER_TYPE
from async_tier.sizes import GOOD_RATIO, LEAST_RATIO, STEPS, KVSizes
from async_tier.text import format_size

# What the tier's index takes for a block, in bytes, besides the block.
INDEX_BYTES = 320


@dataclass(frozen=True)
class Plan:
    """primary_bytes, tier_bytes: to configure. prompt_tokens: the longest prompt that comes back as a whole."""

    primary_bytes: int
    tier_bytes: int
    prompt_tokens: int


def divide(sizes: KVSizes, memory: int) -> Plan:
    """The smallest primary that holds what it must, and the rest for the tier.

    Where the longest prompt would take the primary beyond an eighth of the tier, the primary holds a shorter one, but
    not a shorter one than the steps. Raises ValueError if `memory` (bytes) is too little.
    """
    steps, prompt = sizes.step_blocks, sizes.blocks(sizes.max_model_len)
    whole = memory // sizes.block_bytes
    rows = steps + min(prompt, max(steps, whole // (GOOD_RATIO + 1) - steps))
    tier = (memory - rows * sizes.block_bytes) // (sizes.block_bytes + INDEX_BYTES)
    if tier < LEAST_RATIO * rows:
        least = rows * (sizes.block_bytes + LEAST_RATIO * (sizes.block_bytes + INDEX_BYTES))
        raise ValueError(
            f"memory must be at least {least} bytes ({format_size(least)}), not {memory} ({format_size(memory)}): a "
            f"primary that holds {STEPS} steps of max_num_batched_tokens={sizes.max_num_batched_tokens} and beside "
            f"them a prompt of {sizes.prompt_tokens(rows * sizes.block_bytes)} tokens, and a tier of {LEAST_RATIO} "
            "times that"
        )
    primary = rows * sizes.block_bytes
    return Plan(primary, tier * sizes.block_bytes, sizes.prompt_tokens(primary))


def transfer_config(plan: Plan, on_cpu: bool, chunks: dict[str, int], pool: dict[str, str]) -> dict[str, Any]:
    """The value of `--kv-transfer-config`. chunks: `blocks_per_chunk`, if it is not 1. pool: keys of the tier."""
    extra: dict[str, Any] = {"spec_name": CPU_SPEC if on_cpu else GPU_SPEC}
    if on_cpu:
        extra["spec_module_path"] = CPU_SPEC_MODULE
    extra |= {"cpu_bytes_to_use": plan.primary_bytes, **chunks}
    extra["secondary_tiers"] = [{"type": TIER_TYPE, "bytes_to_use": plan.tier_bytes, **pool}]
    return {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": extra}
