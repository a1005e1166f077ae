"""The tier, the CPU backend's worker and vLLM's engine together: does attention read the KV that it should?

See tests/engine.py for what is real. Not covered, because vLLM 0.32 itself serves wrong KV there, whatever is below it:

- `reset_cache` of the connector while a request runs that has a group of sliding-window attention: the request's blocks
  are offered for storing again, also those that it has given back since and that hold somebody else's KV.
- Several blocks in one of the primary (`blocks_per_chunk`) together with sliding-window attention: a chunk is stored
  when its last block is there, and counts as whole when its first ones are not.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from tests.engine import VOCABULARY, Engine, WrongKV, continuation

FULL = (None,)
HYBRID = (None, 10)
# Far more steps than any run needs, so that one that goes on for ever ends.
ENOUGH_STEPS = 3000
SCHEDULING = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
GROUPS = pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])


def text(seed: int, tokens: int) -> list[int]:
    """Random tokens, none of which ends the text."""
    source = random.Random(seed)
    return [source.randrange(1, VOCABULARY) for _ in range(tokens)]


# ------------------------------------------------------------------------------------------------------- simple cases


@SCHEDULING
@GROUPS
def test_a_prompt_comes_back_from_the_tier(async_scheduling, groups):
    with Engine(async_scheduling=async_scheduling, groups=groups, layers=2) as engine:
        prompt = text(1, 41)
        engine.add(prompt, 5)
        engine.run()
        assert engine.evict_gpu()
        engine.evict_primary()
        again = engine.add(prompt, 5)
        engine.run()
        # Ten full blocks, and for the window of 10 tokens the last three of them.
        assert engine.served[again].from_tier == engine.served[again].blocks == (10 if groups == FULL else 13)
        assert engine.finished["r0"] == engine.finished[again]
        engine.check_quiet()


def test_a_prompt_comes_back_from_the_primary_while_it_is_there():
    with Engine() as engine:
        prompt = text(1, 41)
        engine.add(prompt)
        engine.run()
        assert engine.evict_gpu()
        again = engine.add(prompt)
        engine.run()
        assert (engine.served[again].blocks, engine.served[again].from_tier) == (10, 0)
        assert engine.statistics().load_jobs == 0


def test_a_higher_priority_preempts_and_both_end():
    with Engine(policy="priority", gpu_blocks=17, max_model_len=60) as engine:
        low = engine.add(text(1, 40), 12, priority=1)
        engine.step()
        high = engine.add(text(2, 20), 12, priority=0)
        engine.run()
        assert engine.requests[low].num_preemptions
        assert not engine.requests[high].num_preemptions
        engine.check_quiet()


@pytest.mark.parametrize("reset", ["keep", "abort", "wait", "now"])
def test_new_weights_are_not_served_old_blocks(reset):
    """R10."""
    with Engine() as engine:
        prompt = text(1, 41)
        engine.add(prompt)
        engine.run()
        assert engine.tier.get_num_blocks() == 10
        assert engine.reset(reset)
        assert engine.tier.get_num_blocks() == 0
        again = engine.add(prompt)
        engine.run()
        assert again not in engine.served
        engine.check_quiet()


# ----------------------------------------------------------------------------------------------------------- controls
# What the engine is there to see is brought about here. A check that never fails proves nothing.


def give_blocks_away_while_they_are_stored(engine: Engine) -> None:
    """A prompt's blocks go to another request while the worker's store of them is held; then the prompt returns."""
    prompt = text(1, 17)
    engine.add(prompt)
    engine.run(condition=lambda: engine.copies["worker.store"].waiting or not engine.step())
    engine.add(text(2, 28))
    engine.run(condition=lambda: not engine.live)
    engine.settle()
    assert engine.evict_gpu()
    again = engine.add(prompt)
    engine.settle()
    assert engine.served[again].blocks == 4


@SCHEDULING
def test_blocks_that_are_being_stored_may_be_given_away(async_scheduling):
    with Engine(gpu_blocks=9, copies="manual", async_scheduling=async_scheduling) as engine:
        give_blocks_away_while_they_are_stored(engine)
        engine.check_quiet()


@SCHEDULING
def test_control_without_the_workers_wait_another_requests_kv_is_stored(async_scheduling):
    with Engine(gpu_blocks=9, copies="manual", async_scheduling=async_scheduling) as engine:
        engine.worker.wait = lambda job_ids: None
        with pytest.raises(WrongKV):
            give_blocks_away_while_they_are_stored(engine)


def store_and_come_back(engine: Engine, held: Sequence[str] = ()) -> None:
    """A prompt is stored, another takes all rows of the primary, and the first returns from the tier."""
    prompt = text(1, 17)
    engine.add(prompt)
    engine.settle(but=held)
    assert engine.evict_gpu()
    engine.evict_primary()
    engine.add(text(2, 33))
    engine.settle(but=held)
    for name in held:
        engine.copies[name].go()
    assert engine.evict_gpu()
    engine.evict_primary()
    again = engine.add(prompt)
    engine.settle(but=held)
    assert engine.served[again].from_tier == 4


@SCHEDULING
def test_a_prompt_comes_back_when_its_copies_are_reported_in_time(async_scheduling):
    with Engine(gpu_blocks=17, primary_blocks=8, copies="manual", async_scheduling=async_scheduling) as engine:
        store_and_come_back(engine)
        engine.check_quiet()


@SCHEDULING
@pytest.mark.parametrize("stream", ["worker.store", "worker.load", "tier.store", "tier.load"])
def test_control_copies_that_are_reported_early_are_seen(stream, async_scheduling):
    with Engine(gpu_blocks=17, primary_blocks=8, copies="manual", async_scheduling=async_scheduling) as engine:
        engine.copies[stream].early = True
        with pytest.raises(WrongKV):
            store_and_come_back(engine, held=[stream])


@SCHEDULING
def test_control_blocks_that_are_kept_though_the_weights_are_new_are_seen(async_scheduling):
    with Engine(tier={"keep_on_reset": True}, async_scheduling=async_scheduling) as engine:
        engine.keeps_on_reset = False
        prompt = text(1, 41)
        engine.add(prompt)
        engine.run()
        assert engine.reset()
        # The tier's lookups are held back in the first step after a reset.
        engine.add(text(2, 5))
        engine.run()
        engine.add(prompt)
        with pytest.raises(WrongKV):
            engine.run()


# ------------------------------------------------------------------------- resets that keep blocks (R10, second half)


def reset_with_two_prompts_in_the_tier(engine: Engine) -> tuple[list[int], list[int]]:
    """Two prompts of eight blocks, which only the tier has; rows of the primary are given out from 0 on again."""
    prompts = text(1, 33), text(2, 33)
    for prompt in prompts:
        engine.add(prompt)
        engine.settle()
    assert engine.reset("connector")
    engine.add([1])  # a step, in which nothing is looked up
    engine.settle()
    assert engine.reset("connector")
    engine.add([2])
    engine.settle()
    return prompts


def reset_then_promote(engine: Engine, prompt: Sequence[int]) -> None:
    """Reset the connector with a step under way, and promote `prompt` as early as can be.

    The promotion's copies are made before the worker begins the first step that was planned after the reset, which
    waits for the worker's copies from before. Those are held as long as nobody waits for them.
    """
    engine.executor.before_run = engine.copies["tier.load"].go
    engine.reset("connector")
    engine.step()
    engine.add(prompt)
    engine.step()
    engine.step()
    engine.settle()


def test_a_promotion_does_not_fill_a_row_that_a_step_from_before_the_reset_writes_to():
    """R10. The store of a request that was aborted meanwhile is not made before the next step begins."""
    with Engine(async_scheduling=True, worker="late", copies="manual", tier={"keep_on_reset": True}) as engine:
        prompt, _ = reset_with_two_prompts_in_the_tier(engine)
        writer = engine.add(text(3, 33))
        engine.step()
        assert engine.in_flight().connector_jobs == engine.executor.steps_submitted == 1
        engine.abort(writer)
        reset_then_promote(engine, prompt)
        engine.check_quiet()


def test_a_promotion_does_not_fill_a_row_that_a_step_from_before_the_reset_reads():
    """R10. A load goes on across the reset, and its request with it."""
    with Engine(async_scheduling=True, worker="late", copies="manual", tier={"keep_on_reset": True}) as engine:
        prompt, other = reset_with_two_prompts_in_the_tier(engine)
        assert engine.evict_gpu()
        reader = engine.add(other)
        while not engine.served.get(reader):
            engine.let_go()
            assert engine.step()
        assert engine.executor.steps_submitted == 1
        reset_then_promote(engine, prompt)
        engine.check_quiet()


# --------------------------------------------------------------------------------------------------------- random load


class Clients:
    """Requests whose prompts share beginnings, and conversations of several turns. None is longer than `longest`."""

    def __init__(self, engine: Engine, source: random.Random, longest: int) -> None:
        self._engine = engine
        self._random = source
        self._longest = longest
        self.documents = [self._text(source.randrange(8, longest)) for _ in range(6)]
        self._prompts = list(self.documents)

    def _text(self, tokens: int) -> list[int]:
        return [self._random.randrange(1, VOCABULARY) for _ in range(tokens)]

    def ask(self) -> None:
        known = self._random.choice(self._prompts)
        answer = self._random.choice((1, 1, 2, 5, 12))
        choice = self._random.random()
        if choice < 0.4:  # the same again
            prompt = list(known)
        elif choice < 0.6:  # the same beginning
            prompt = known[: self._random.randrange(1, len(known) + 1)] + self._text(self._random.randrange(1, 9))
        elif choice < 0.85:  # the next turn
            prompt = known + continuation(known, answer) + self._text(self._random.randrange(1, 5))
        else:
            prompt = self._text(self._random.randrange(2, self._longest))
        if len(prompt) > self._longest:
            prompt = list(self._random.choice(self.documents))
        self._prompts.append(prompt)
        self._engine.add(prompt, answer, priority=self._random.randrange(3))


def random_run(seed: int, steps: int = 200, **options: Any) -> Counter[str]:
    """Clients, aborts, resets and evictions at random; in the end every document is asked for once more.

    The sizes are such that a request fits into the primary, but not all of them, nor all into the KV cache. Returns
    what came about.
    """
    source = random.Random(seed)
    groups = options.setdefault("groups", FULL)
    sizes = {
        "gpu_blocks": source.choice((19, 33)) * len(groups),
        "primary_blocks": source.choice((22, 30, 40)) * len(groups),
        "tier_blocks": source.choice((16, 30, 60, 90)) * len(groups),
        "max_num_batched_tokens": 32,
        "max_num_seqs": 6,
        "policy": source.choice(("fcfs", "priority")),
        "copies": "random",
        "worker": "random",
    }
    resets = ["keep", "abort", "wait", "now"] + ["connector"] * (groups == FULL)
    seen: Counter[str] = Counter()
    with Engine(seed=seed, **{**sizes, **options}) as engine:
        clients = Clients(engine, source, longest=44)
        for _ in range(steps):
            choice = source.random()
            if choice < 0.35:
                if len(engine.live) < 8:
                    clients.ask()
            elif choice < 0.38:
                if engine.live:
                    engine.abort(source.choice(engine.live), during_step=source.random() < 0.5)
            elif choice < 0.395:
                seen["resets"] += engine.reset(source.choice(resets))
            elif choice < 0.45:
                engine.evict_gpu()
            elif choice < 0.46:
                engine.evict_primary()
            seen["steps with loads held"] += any(
                copies.waiting for name, copies in engine.copies.items() if name.endswith(".load")
            )
            engine.step()
        engine.run(ENOUGH_STEPS)
        engine.check_quiet()
        for document in clients.documents:
            assert engine.evict_gpu()
            engine.evict_primary()
            again = engine.add(document)
            engine.run(ENOUGH_STEPS)
            seen["blocks that were asked for again"] += engine.served[again].from_tier if again in engine.served else 0
        engine.check_quiet()
        statistics = engine.statistics()
        seen["aborts"] += len(engine.aborted)
        seen["preemptions"] += engine.preemptions
        seen["blocks from the tier"] += sum(served.from_tier for served in engine.served.values())
        seen["blocks from the primary alone"] += sum(
            served.blocks - served.from_tier for served in engine.served.values()
        )
        seen["blocks loaded by the tier"] += statistics.blocks_loaded
        seen["evictions"] += statistics.evictions
        seen["slots checked"] += engine.model.slots_checked
    return seen


def random_runs(seeds: Iterable[int], **options: Any) -> Counter[str]:
    """`random_run` of each seed; a failure says which."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        try:
            seen += random_run(seed, **options)
        except Exception as error:
            error.add_note(f"random_run({seed}, {options}); the same again only with the same PYTHONHASHSEED")
            raise
    return seen


# What a run may be without, by reason of its size or kind, comes last.
COVERED = (
    "resets",
    "aborts",
    "blocks from the tier",
    "blocks from the primary alone",
    "blocks loaded by the tier",
    "blocks that were asked for again",
    "slots checked",
    "steps with loads held",
    "evictions",
    "preemptions",
)
ALWAYS_COVERED = COVERED[:-3]


@SCHEDULING
@GROUPS
@pytest.mark.parametrize("first_seed", range(0, 48, 12))
def test_random_load(first_seed, groups, async_scheduling):
    seen = random_runs(range(first_seed, first_seed + 12), groups=groups, async_scheduling=async_scheduling)
    assert all(seen[what] for what in COVERED), seen


@SCHEDULING
def test_random_load_with_several_blocks_in_one_of_the_primary(async_scheduling):
    options = {"block_size": 2, "layers": 2, "blocks_per_chunk": 3, "gpu_blocks": 33}
    seen = random_runs(range(12), async_scheduling=async_scheduling, **options)
    assert all(seen[what] for what in ALWAYS_COVERED), seen


@SCHEDULING
@GROUPS
def test_random_load_with_resets_that_keep_blocks(groups, async_scheduling):
    """R10."""
    options = {"groups": groups, "async_scheduling": async_scheduling, "tier": {"keep_on_reset": True}}
    seen = random_runs(range(100, 112), **options)
    assert all(seen[what] for what in COVERED), seen


@SCHEDULING
@GROUPS
def test_random_load_with_copies_at_the_threads_pace(groups, async_scheduling):
    seen = random_runs(range(6), groups=groups, async_scheduling=async_scheduling, copies="free")
    assert all(seen[what] for what in ALWAYS_COVERED), seen
