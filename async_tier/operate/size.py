"""Divides memory between primary and tier, for a model whose KV has these sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from async_tier.operate.settings import CONNECTOR, CPU_SPEC, CPU_SPEC_MODULE, GPU_SPEC, TIER_TYPE
from async_tier.text import format_size

if TYPE_CHECKING:
    from async_tier.vllm.kv_sizes import KVSizes

# Steps whose blocks are in the primary at a time: one being stored, and the next one being computed.
STEPS = 2
# A primary of an eighth of the tier cost a replay 5 % of its hits; beyond that, prompts are rather cut.
TIER_PER_PRIMARY = 8
# What the tier's index takes for a block, in bytes, besides the block.
INDEX_BYTES = 320


@dataclass(frozen=True)
class Plan:
    """primary_bytes, tier_bytes: to configure. prompt_tokens: the longest prompt that comes back as a whole."""

    primary_bytes: int
    tier_bytes: int
    prompt_tokens: int


def divide(sizes: KVSizes, memory: int) -> Plan:
    """The smallest primary that is of use, and the rest for the tier.

    The primary holds the longest prompt beside the steps in flight; or a shorter prompt, if that would take more than
    an eighth of what the tier gets. Raises ValueError if `memory` (bytes) is too little.
    """
    steps = STEPS * sizes.blocks(sizes.max_num_batched_tokens)
    prompt = sizes.blocks(sizes.max_model_len)
    whole = memory // sizes.block_bytes
    rows = min(steps + prompt, max(2 * steps, whole // (TIER_PER_PRIMARY + 1)))
    tier = (memory - rows * sizes.block_bytes) // (sizes.block_bytes + INDEX_BYTES)
    if tier < 2 * rows:
        least = rows * (3 * sizes.block_bytes + 2 * INDEX_BYTES)
        raise ValueError(
            f"memory must be at least {least} bytes ({format_size(least)}), not {memory} ({format_size(memory)}): a "
            f"primary that holds {2 * STEPS} steps of max_num_batched_tokens={sizes.max_num_batched_tokens} tokens or "
            "all prompts, and a tier of twice that"
        )
    held = int((rows - steps) / sum(1 / tokens for tokens in sizes.tokens_per_block))
    return Plan(rows * sizes.block_bytes, tier * sizes.block_bytes, min(sizes.max_model_len, held))


def transfer_config(plan: Plan, on_cpu: bool, chunks: dict[str, int], pool: dict[str, str]) -> dict[str, Any]:
    """The value of `--kv-transfer-config`. chunks: `blocks_per_chunk`, if it is not 1. pool: keys of the tier."""
    extra: dict[str, Any] = {"spec_name": CPU_SPEC if on_cpu else GPU_SPEC}
    if on_cpu:
        extra["spec_module_path"] = CPU_SPEC_MODULE
    extra |= {"cpu_bytes_to_use": plan.primary_bytes, **chunks}
    extra["secondary_tiers"] = [{"type": TIER_TYPE, "bytes_to_use": plan.tier_bytes, **pool}]
    return {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": extra}
