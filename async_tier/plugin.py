"""vLLM's plugin entry point: `{"type": "async"}` names the tier, without a `module_path`."""

from __future__ import annotations

TIER_TYPE = "async"
_MODULE, _CLASS = "async_tier.manager", "AsyncSecondaryTierManager"


def register() -> None:
    """Register the tier's short name with vLLM. Called in each of vLLM's processes, perhaps more than once.

    Does nothing if this vLLM has no tiers. Raises ValueError if the name belongs to another tier.
    """
    try:
        from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
    except ImportError:
        return
    try:
        SecondaryTierFactory.register_tier(TIER_TYPE, _MODULE, _CLASS)
    except ValueError:
        # This is a second call, unless another tier took the name.
        registered = SecondaryTierFactory.get_tier_class({"type": TIER_TYPE})
        if registered.__module__ != _MODULE:
            raise
