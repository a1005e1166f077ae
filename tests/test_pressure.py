"""R15 under vLLM's whole engine: a primary that cannot hold all that is asked for at once. See tests/engine.py."""

from __future__ import annotations

import logging

import pytest

from async_tier.vllm.promises import RESUMED_STEPS, STALE_STEPS
from tests.engine import Engine
from tests.test_engine import ENOUGH_STEPS, FULL, GROUPS, HYBRID, SCHEDULING, random_runs, text

BLOCK_TOKENS = 4


def prompts_in_the_tier(engine: Engine, count: int, blocks: int) -> list[list[int]]:
    """So many prompts of so many full blocks, all of which the tier holds, and nobody else."""
    prompts = [text(seed, blocks * BLOCK_TOKENS + 1) for seed in range(count)]
    for prompt in prompts:
        engine.add(prompt)
        engine.settle()
    assert engine.evict_gpu()
    engine.evict_primary()
    held = [sum(map(engine.tier.block_store.has, engine.blocks_of(prompt))) for prompt in prompts]
    assert held == [blocks] * count
    return prompts


def moved(engine: Engine) -> int:
    return engine.statistics().blocks_loaded


@SCHEDULING
@pytest.mark.parametrize("copies", ["prompt", "random"])
@pytest.mark.parametrize(("blocks", "primary"), [(20, 26), (18, 25), (20, 20), (20, 45), (20, 200)])
def test_waiting_requests_get_all_their_blocks_from_the_tier_each_moved_once(blocks, primary, copies, async_scheduling):
    sizes = {"gpu_blocks": 8 * (blocks + 3), "primary_blocks": primary, "max_num_batched_tokens": 16}
    with Engine(**sizes, copies=copies, async_scheduling=async_scheduling) as engine:
        prompts = prompts_in_the_tier(engine, 8, blocks)
        requests = [engine.add(prompt) for prompt in prompts]
        engine.run(ENOUGH_STEPS)
        assert [engine.served[request].from_tier for request in requests] == [blocks] * 8
        assert moved(engine) == 8 * blocks
        engine.check_quiet()


@SCHEDULING
@pytest.mark.parametrize("copies", ["prompt", "random"])
def test_in_a_long_queue_too(copies, async_scheduling):
    sizes = {"gpu_blocks": 400, "primary_blocks": 26, "tier_blocks": 2100, "max_num_batched_tokens": 16}
    with Engine(**sizes, max_num_seqs=16, copies=copies, async_scheduling=async_scheduling) as engine:
        prompts = prompts_in_the_tier(engine, 100, 20)
        requests = [engine.add(prompt) for prompt in prompts]
        engine.run(ENOUGH_STEPS)
        assert [engine.served[request].from_tier for request in requests] == [20] * 100
        assert moved(engine) == 100 * 20
        engine.check_quiet()


@SCHEDULING
def test_requests_that_need_a_window_alone_get_it(async_scheduling):
    """Of 30 blocks the last 20. vLLM asks for them from the end on."""
    sizes = {"gpu_blocks": 300, "primary_blocks": 26, "max_num_batched_tokens": 16, "groups": (20 * BLOCK_TOKENS,)}
    with Engine(**sizes, async_scheduling=async_scheduling) as engine:
        prompts = [text(seed, 30 * BLOCK_TOKENS + 1) for seed in range(8)]
        for prompt in prompts:
            engine.add(prompt)
            engine.settle()
        assert engine.evict_gpu()
        engine.evict_primary()
        requests = [engine.add(prompt) for prompt in prompts]
        engine.run(ENOUGH_STEPS)
        assert [engine.served[request].from_tier for request in requests] == [20] * 8
        assert moved(engine) < 2 * 8 * 20
        engine.check_quiet()


@SCHEDULING
@pytest.mark.parametrize("blocks", [21, 60, 300])
def test_a_prompt_longer_than_the_primary_gets_as_much_as_that_holds(blocks, async_scheduling):
    sizes = {"gpu_blocks": 310, "primary_blocks": 20, "tier_blocks": 320, "max_num_batched_tokens": 16}
    with Engine(**sizes, async_scheduling=async_scheduling) as engine:
        (prompt,) = prompts_in_the_tier(engine, 1, blocks)
        request = engine.add(prompt)
        engine.run(ENOUGH_STEPS)
        assert engine.served[request].from_tier == 20
        assert moved(engine) == 20
        engine.check_quiet()


@SCHEDULING
def test_of_a_prompt_whose_start_is_in_the_primary_the_rest_comes_too(async_scheduling):
    sizes = {"gpu_blocks": 60, "primary_blocks": 20, "max_num_batched_tokens": 16}
    with Engine(**sizes, async_scheduling=async_scheduling) as engine:
        (prompt,) = prompts_in_the_tier(engine, 1, 30)
        engine.add(prompt[: 10 * BLOCK_TOKENS + 1])
        engine.run(ENOUGH_STEPS)
        assert engine.evict_gpu()
        request = engine.add(prompt)
        engine.run(ENOUGH_STEPS)
        assert engine.served[request].blocks == 20
        engine.check_quiet()


@SCHEDULING
def test_a_prompt_longer_than_the_primary_whose_window_is_not_there_is_not_promised_for_ever(async_scheduling):
    """Of a sliding window vLLM stores the end of a prompt alone, which is behind what the primary can hold."""
    sizes = {"gpu_blocks": 140, "primary_blocks": 20, "max_num_batched_tokens": 16, "groups": HYBRID}
    with Engine(**sizes, async_scheduling=async_scheduling) as engine:
        prompt = text(1, 40 * BLOCK_TOKENS + 1)
        engine.add(prompt)
        engine.settle()
        assert engine.evict_gpu()
        engine.evict_primary()
        request = engine.add(prompt)
        assert engine.run(ENOUGH_STEPS) < 50
        assert request not in engine.served
        assert moved(engine) <= 20
        engine.check_quiet()


@SCHEDULING
def test_who_was_promised_blocks_and_is_aborted_holds_nobody_up(async_scheduling):
    sizes = {"gpu_blocks": 120, "primary_blocks": 26, "max_num_batched_tokens": 16, "copies": "manual"}
    with Engine(**sizes, async_scheduling=async_scheduling) as engine:
        first, second = (engine.add(prompt) for prompt in prompts_in_the_tier(engine, 2, 20))
        for _ in range(10):
            engine.step()
        assert engine.copies["tier.load"].waiting
        engine.abort(first)
        assert engine.settle() < STALE_STEPS // 2
        assert engine.served[second].from_tier == 20
        assert first not in engine.served
        engine.check_quiet()


def test_a_request_that_was_preempted_and_resumed_holds_nobody_up():
    """vLLM does not name it among those that were scheduled."""
    sizes = {"gpu_blocks": 120, "primary_blocks": 26, "max_num_batched_tokens": 32}
    with Engine(**sizes) as engine:
        one, other = prompts_in_the_tier(engine, 2, 20)
        preempted = engine.add(one, 100)
        engine.run(condition=lambda: engine.requests[preempted].num_output_tokens > 2)
        engine.evict_primary()
        assert engine.core.reset_prefix_cache(reset_running_requests=True)
        engine.run(condition=lambda: engine.served[preempted].from_tier > 20)
        last = engine.add(other)
        assert engine.run(condition=lambda: last in engine.finished) < 3 * RESUMED_STEPS
        assert preempted in engine.live
        assert engine.served[last].from_tier == 20
        engine.run()
        engine.check_quiet()


@SCHEDULING
@GROUPS
def test_under_random_pressure_everybody_ends_and_reads_the_right_kv(groups, async_scheduling):
    """Prompts longer than the primary, aborts, preemptions, priorities, resets, copies held and let go."""
    small = {"primary_blocks": 6 * len(groups), "max_num_batched_tokens": 16}
    seen = random_runs(range(1000, 1012), groups=groups, async_scheduling=async_scheduling, **small)
    for what in ("blocks from the tier", "aborts", "resets", "preemptions", "steps with loads held", "evictions"):
        assert seen[what] > 0, what
    if groups == FULL:
        assert seen["blocks loaded by the tier"] < 3 * seen["blocks from the tier"], "moved again and again"


# ------------------------------------------------------------------------------------------------- what fits, at start


def log_of(caplog, **sizes) -> list[str]:
    with caplog.at_level(logging.INFO, "async_tier"), Engine(**sizes):
        pass
    return [record.getMessage() for record in caplog.records if record.name == "async_tier.manager"]


@pytest.mark.parametrize(
    ("groups", "per_row", "tokens"), [(FULL, 1, 160), (HYBRID, 1, 80), (FULL, 3, 480)], ids=["full", "hybrid", "chunks"]
)
def test_the_log_says_at_start_what_the_primary_holds_in_tokens(caplog, groups, per_row, tokens):
    line, *_ = log_of(caplog, primary_blocks=40, groups=groups, blocks_per_chunk=per_row)
    assert f"the primary before it holds 40 blocks, {tokens} tokens" in line
    assert "holds 256 blocks of" in line
    assert f", {256 * tokens // 40} tokens); the primary" in line


@pytest.mark.parametrize(
    ("primary", "says"),
    [
        (15, "one step of max_num_batched_tokens=64 would take 16: vLLM stores nothing of such a step"),
        (16, "2 steps of max_num_batched_tokens=64 would take 32: vLLM gives up stores"),
        (31, "2 steps of max_num_batched_tokens=64 would take 32: vLLM gives up stores"),
        (32, "beside them a prompt of max_model_len="),
        (4096, None),
    ],
)
def test_the_log_warns_of_what_the_primary_cannot_hold(caplog, primary, says):
    sizes = {"primary_blocks": primary, "tier_blocks": 8 * primary, "max_num_batched_tokens": 64}
    lines = [line for line in log_of(caplog, **sizes) if "of less use" in line]
    assert len(lines) == (says is not None)
    assert all(says in line and "set cpu_bytes_to_use to at least" in line for line in lines)


def test_the_log_warns_of_a_tier_that_is_smaller_than_a_prompt(caplog):
    lines = log_of(caplog, primary_blocks=4096, tier_blocks=50, max_num_batched_tokens=64)
    assert any("less than one prompt of max_model_len=" in line for line in lines)
    assert any("so nearly all that the tier holds is in the primary, too" in line for line in lines)


def test_of_a_step_that_the_primary_cannot_hold_vllm_stores_nothing():
    """What the warning says."""
    with Engine(primary_blocks=8, max_num_batched_tokens=64) as engine:
        engine.add(text(1, 64))
        engine.run()
        assert engine.statistics().store_jobs == 0
