"""Our tier before vLLM's fs tier, under vLLM's whole engine: what comes from the disk is taken into memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.kv_offload.base import OffloadPolicy, RequestOffloadingContext

from async_tier.manager import AsyncSecondaryTierManager
from tests.engine import Engine, Served
from tests.helpers import make_tier, remember, request
from tests.rows import primary_rows
from tests.test_engine import ENOUGH_STEPS, SCHEDULING, text

PROMPT = text(1, 25 * 4 + 1)


def ask(engine: Engine) -> tuple[int, int]:
    """Ask with nothing in KV cache and primary: (blocks that were loaded, those of them from our tier)."""
    before = engine.statistics().blocks_loaded
    name = engine.add(PROMPT)
    engine.settle(ENOUGH_STEPS)
    assert engine.evict_gpu()
    engine.evict_primary()
    served = engine.served.get(name, Served())
    return served.blocks, engine.statistics().blocks_loaded - before


@SCHEDULING
def test_after_a_restart_the_first_ask_comes_from_the_disk_and_the_second_from_memory(tmp_path, async_scheduling):
    disk = [{"type": "fs", "root_dir": str(tmp_path)}]
    with Engine(other_tiers=disk, async_scheduling=async_scheduling) as engine:
        assert ask(engine) == (0, 0)
        assert ask(engine) == (25, 25)
        engine.manager.secondary_tiers[1].drain_jobs()
    with Engine(other_tiers=disk, async_scheduling=async_scheduling) as engine:
        assert ask(engine) == (25, 0)
        assert ask(engine) == (25, 25)
        engine.check_quiet()


@pytest.mark.parametrize("tiers", [[{"type": "async"}], None])
def test_alone_it_asks_for_no_more_than_is_new(tiers):
    """What it is offered again would cost each request, for nothing."""
    primary = primary_rows(8)
    spec = SimpleNamespace(secondary_tier_configs=tiers)
    tier = AsyncSecondaryTierManager(spec, memoryview(primary), "async", bytes_to_use=4096, engine="host")
    remember(tier.block_store, primary)
    assert tier.on_new_request(request("asks")) == RequestOffloadingContext()
    assert RequestOffloadingContext().policy is not OffloadPolicy.REQUEST_LEVEL


def test_on_vllms_mocks_too():
    assert make_tier(primary_rows(8), blocks=4).on_new_request(request("asks")) == RequestOffloadingContext()
