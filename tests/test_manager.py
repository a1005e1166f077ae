"""The tier's contract, rule by rule, on vLLM's own objects. Runs on every supported vLLM (`make test-versions`)."""

from __future__ import annotations

import gc
import operator
import os
import subprocess
import sys
import threading
import time
import uuid
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from vllm.config import VllmConfig
from vllm.v1.kv_offload.base import LookupResult

from async_tier.jobs import Finished
from async_tier.manager import AsyncSecondaryTierManager
from async_tier.testing import load_gate, store_gate
from async_tier.vllm import compat
from tests import helpers
from tests.helpers import (
    PATIENCE_S,
    World,
    end_step,
    finish,
    held,
    job,
    key,
    keys,
    load,
    make_tier,
    request,
    returns,
    store,
    until,
)
from tests.rows import primary_rows

HIT, MISS = LookupResult.HIT, LookupResult.MISS
pytestmark = pytest.mark.contract


@pytest.fixture
def primary() -> np.ndarray:
    return primary_rows(32)


@pytest.fixture
def tier(primary):
    tier = make_tier(primary, blocks=16)
    yield tier
    tier.shutdown()  # also with a stream held


class FailingStream:
    """A stream whose copies end badly, or that takes none."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses

    def copy_rows(self, destination, destination_rows, source, source_rows):
        if self.refuses:
            raise RuntimeError("no copies today")
        return SimpleNamespace(
            is_done=True, failed=True, reason=None, seconds=0.0, spans=[], synchronize=lambda seconds: True
        )


# ---------------------------------------------------------------------------------------------------- store and load


def test_blocks_come_back_into_other_rows(tier, primary):
    before = primary.copy()
    assert store(tier, 1, keys(0, 1, 2), [5, 6, 7]).success
    primary[:] = 0
    assert load(tier, 2, keys(2, 0, 1), [20, 21, 22]).success
    assert np.array_equal(primary[[20, 21, 22]], before[[7, 5, 6]])
    assert not primary[:20].any()
    assert not primary[23:].any()


def test_keys_handed_over_as_a_set_keep_their_rows(tier, primary):
    before = primary.copy()
    names = set(keys(*range(8)))
    assert store(tier, 1, names, list(range(8))).success
    for row, name in enumerate(names):
        primary[:] = 0
        assert load(tier, 10 + row, [name], [31]).success
        assert np.array_equal(primary[31], before[row])


@pytest.mark.parametrize("shuffle", range(4))
def test_keys_of_a_request_whose_order_is_known_keep_their_rows(tier, primary, shuffle):
    before = primary.copy()
    names = keys(*range(12))
    context = request("r", names)
    tier.on_new_request(context)
    tier.touch(names, context)
    offered = names[shuffle::2] + names[:shuffle] + names[1 + shuffle :: 2]
    rows = np.random.default_rng(shuffle).permutation(32)[: len(offered)]
    assert store(tier, 1, offered, rows, context=context).success
    for name, row in zip(offered, rows, strict=True):
        primary[:] = 0
        assert load(tier, 10 + row, [name], [31]).success
        assert np.array_equal(primary[31], before[row])


def test_constructs_where_the_reference_tier_does():
    view = memoryview(np.zeros((10, 16), dtype=np.int8))
    tier = AsyncSecondaryTierManager(MagicMock(), view, "example", 67)
    assert tier.lookup(key(0), request("r")) is MISS
    assert tier.get_num_blocks() == tier.get_num_chunks() == 0
    assert tier.statistics().capacity == 20, "by default twice the primary"
    assert tier.custom_param == 67
    tier.shutdown()


def test_counts_blocks_that_are_ready(tier):
    with store_gate(tier):
        tier.submit_store(job(1, keys(0, 1), [0, 1]))
        assert tier.get_num_blocks() == 0
    finish(tier)
    assert tier.get_num_blocks() == tier.get_num_chunks() == 2


def test_medium_and_locality_are_vllms(primary):
    tier = make_tier(primary, blocks=1, locality="REMOTE")
    base = pytest.importorskip("vllm.v1.kv_offload.base")
    if hasattr(base, "Medium"):
        assert tier.medium is base.Medium.CPU
        assert tier.locality is base.Locality.REMOTE
    tier.shutdown()


# ------------------------------------------------------------------------------------------------------ rules 1 to 4


def test_r1_nothing_waits_for_bytes_to_move(tier, primary):
    store(tier, 1, keys(0, 1), [0, 1])
    load_gate(tier).hold()
    store_gate(tier).hold()

    def a_step():
        context = request("r")
        tier.on_new_request(context)
        answer = tier.lookup(key(0), context)
        tier.submit_load(job(2, keys(0), [9], context, load=True))
        tier.submit_store(job(3, keys(5), [3], context))
        finished = list(tier.get_finished_jobs())
        tier.touch(keys(0, 1), context)
        tier.on_request_finished(context)
        end_step(tier)
        return answer, finished, tier.has_pending_work()

    assert returns(a_step) == (HIT, [], True)


def test_r1_drain_is_what_waits(tier):
    with store_gate(tier):
        tier.submit_store(job(1, keys(0), [0]))
        draining = threading.Thread(target=tier.drain_jobs, daemon=True)
        draining.start()
        # It cannot have returned: its stream is held. Let go, it must.
        assert tier.has_pending_work()
        assert draining.is_alive()
    draining.join(PATIENCE_S)
    assert not draining.is_alive()
    assert [result.job_id for result in tier.get_finished_jobs()] == [1]


@pytest.mark.parametrize("is_load", [False, True])
def test_r2_every_job_is_reported_once(tier, is_load):
    store(tier, 1, keys(*range(4)), range(4))
    submit = tier.submit_load if is_load else tier.submit_store
    cases = [
        (keys(0, 1), [0, 1]),  # all present
        ([], []),
        (keys(2, 99), [2, 3]),  # some
        (keys(100), [4]),
        (keys(3), [0, 1]),  # unequal
        (keys(3), [32]),  # out of range
        (keys(3), [-1]),
    ]
    for job_id, (names, rows) in enumerate(cases, start=10):
        submit(job(job_id, names, rows, load=is_load))
    assert sorted(finish(tier)) == list(range(10, 10 + len(cases)))
    assert finish(tier) == {}
    assert not tier.has_pending_work()


def test_r2_a_failed_job_is_reported_once(tier):
    store(tier, 1, keys(0), [0])
    tier.block_store.engine.store_stream = tier.block_store.engine.load_stream = FailingStream()
    tier.submit_store(job(2, keys(1), [1]))
    tier.submit_load(job(3, keys(0), [2], load=True))
    results = finish(tier)
    assert {job_id: result.success for job_id, result in results.items()} == {2: False, 3: False}
    assert finish(tier) == {}


@pytest.mark.parametrize("is_load", [False, True])
def test_r2_a_job_whose_end_meets_an_error_is_reported_as_failed(tier, is_load):
    store(tier, 1, keys(0), [0])
    name = "unpin" if is_load else "mark_ready"
    setattr(tier.block_store.index, name, MagicMock(side_effect=OSError("out of luck")))
    (tier.submit_load if is_load else tier.submit_store)(job(2, keys(0) if is_load else keys(1), [1], load=is_load))
    tier.submit_store(job(3, [], []))
    tier.block_store.drain()
    assert {result.job_id: result.success for result in tier.get_finished_jobs()} == {2: False, 3: True}
    assert tier.statistics().faults == 1
    assert not tier.has_pending_work()
    assert tier.lookup(key(1), request("r")) is MISS
    assert tier.lookup(key(0), request("r")) is (MISS if is_load else HIT)
    delattr(tier.block_store.index, name)


def test_r2_jobs_cut_off_by_shutdown_are_reported_as_failed(primary):
    tier = make_tier(primary, blocks=4)
    store_gate(tier).hold()
    tier.submit_store(job(1, keys(0), [0]))
    returns(lambda: tier.shutdown() or True)
    tier.submit_store(job(2, keys(1), [1]))
    assert {result.job_id: result.success for result in tier.get_finished_jobs()} == {1: False, 2: False}


def test_r3_no_method_raises_when_the_engine_does(tier, primary):
    store(tier, 1, keys(0), [0])
    tier.block_store.engine.store_stream = tier.block_store.engine.load_stream = FailingStream(refuses=True)
    with pytest.raises(TypeError, match="engines, not a FailingStream"):
        store_gate(tier)
    tier.submit_store(job(2, keys(1), [1]))
    tier.submit_load(job(3, keys(0), [2], load=True))
    assert {job_id: result.success for job_id, result in finish(tier).items()} == {2: False, 3: False}
    assert tier.get_num_blocks() == 0
    figures = tier.statistics()
    assert figures.faults == figures.failed_jobs == 2
    assert (figures.store_jobs, figures.load_jobs) == (2, 1), "failed ones count too"
    assert figures.rows_used == 0


def test_r3_hooks_do_not_raise_either(tier):
    tier.block_store.index.finish = tier.block_store.index.clear = MagicMock(side_effect=OSError)
    tier.on_new_request(object())
    tier.on_request_finished(request("r"))
    reset(tier)
    assert tier.statistics().faults == 3
    del tier.block_store.index.finish, tier.block_store.index.clear


@pytest.mark.parametrize(
    "method", ["lookup", "poll", "drain", "close", "end_step", "touch", "submit_store", "submit_load"]
)
def test_r3_an_unexpected_error_is_counted_and_does_not_get_out(primary, method, caplog):
    tier = make_tier(primary, blocks=4)
    real = getattr(tier.block_store, method)
    setattr(tier.block_store, method, MagicMock(side_effect=OSError("out of luck")))
    assert tier.lookup(key(0), request("r")) is MISS
    tier.submit_store(job(1, keys(0), [0]))
    tier.submit_load(job(2, keys(9), [0], load=True))
    tier.touch(keys(0), request("r"))
    end_step(tier)
    tier.drain_jobs()
    reported = list(tier.get_finished_jobs())
    tier.shutdown()
    setattr(tier.block_store, method, real)
    tier.shutdown()
    met = 2 if method == "drain" else 1  # shutdown drains too
    assert tier.statistics().faults == met
    assert sum("out of luck" in record.getMessage() for record in caplog.records) == met
    assert sorted(result.job_id for result in [*reported, *tier.get_finished_jobs()]) == [1, 2]


@pytest.mark.parametrize("is_load", [False, True])
@pytest.mark.parametrize("rows", [[0, 1], [], [[0]], [32], [-1], [2**31 - 1]])
def test_r3_unequal_lengths_and_rows_out_of_range_fail(tier, is_load, rows):
    store(tier, 1, keys(0), [0])
    for job_id, names in ((2, keys(0)), (3, keys(9))):
        assert not (load if is_load else store)(tier, job_id, names, rows).success
    assert tier.statistics().faults == 2
    assert held(tier, keys(0, 9)) == [not is_load, False]


@pytest.mark.parametrize("is_load", [False, True])
@pytest.mark.parametrize(
    "rows", [[0, True], [0, 1.0], [0, None], np.array([0.0, 1.0]), np.array([False, True]), np.array([[0], [1]])]
)
def test_r3_rows_that_are_no_integers_fail_in_words(tier, caplog, is_load, rows):
    """Of which the tier below vLLM's manager is asked by anyone: lists too, with a wrong one behind a right one."""
    store(tier, 1, keys(0, 1), [0, 1])
    submit = tier.block_store.submit_load if is_load else tier.block_store.submit_store
    submit(2, keys(0, 1) if is_load else keys(8, 9), rows)
    assert not finish(tier)[2].success
    assert "row numbers must be integers" in caplog.text
    assert held(tier, keys(0, 1, 8, 9)) == [not is_load] * 2 + [False] * 2


@pytest.mark.parametrize("names", [[["unhashable"]], [key(0), ["unhashable"]], None, 5])
def test_r3_keys_that_are_none_fail_the_job_and_leave_nothing_behind(tier, names):
    store(tier, 1, keys(0), [0])
    rows = [1] * (len(names) if isinstance(names, list) else 0)
    tier.submit_store(job(2, names, rows))
    tier.submit_load(job(3, names, rows, load=True))
    assert {job_id: result.success for job_id, result in finish(tier).items()} == {2: False, 3: False}
    end_step(tier)
    store(tier, 4, keys(*range(20, 36)), range(16))
    assert tier.get_num_blocks() == 16, "a pin was left on a row"


def test_r3_a_full_tier_and_present_keys_are_successes_of_no_bytes(primary):
    tier = make_tier(primary, blocks=2)
    with store_gate(tier):
        tier.submit_store(job(1, keys(0, 1), [0, 1]))
        tier.submit_store(job(2, keys(0, 1), [0, 1]))
        tier.submit_store(job(3, keys(2), [2]))
        now = {result.job_id: result for result in tier.get_finished_jobs()}
        assert {job_id: result.success for job_id, result in now.items()} == {2: True, 3: True}
    now |= finish(tier)
    if "transfer_bytes" in helpers.RESULT_FIELDS:
        assert {job_id: result.transfer_bytes for job_id, result in now.items()} == {1: 128, 2: 0, 3: 0}
    assert tier.statistics().blocks_refused == 1
    assert tier.statistics().blocks_present == 2
    tier.shutdown()


def test_r3_only_a_load_failed_in_part_names_the_keys_that_came(tier, primary):
    store(tier, 1, keys(0, 1), [0, 1])
    before = primary.copy()
    primary[:] = 0
    result = load(tier, 2, keys(0, 77, 1), [10, 11, 12])
    assert not result.success
    assert np.array_equal(primary[[10, 12]], before[[0, 1]])
    assert not primary[11].any()
    if "successful_keys" in helpers.RESULT_FIELDS:
        assert set(result.successful_keys) == set(keys(0, 1))
        assert load(tier, 3, keys(0), [10]).successful_keys is None
        assert store(tier, 4, keys(5), [10]).successful_keys is None
        assert load(tier, 5, keys(78), [10]).successful_keys is None


@pytest.mark.parametrize("rows", [[1, 2], [32], [-1]])
def test_r4_a_key_whose_load_failed_is_gone(tier, rows):
    store(tier, 1, keys(0), [0])
    assert not load(tier, 2, keys(0), rows).success
    assert held(tier, keys(0)) == [False]


@pytest.mark.parametrize("refuses", [False, True])
def test_r4_a_key_whose_copy_failed_is_gone_before_the_report(tier, refuses):
    store(tier, 1, keys(0), [0])
    tier.block_store.engine.load_stream = FailingStream(refuses)
    tier.submit_load(job(2, keys(0), [3], load=True))
    results = list(tier.get_finished_jobs())
    assert [result.success for result in results] == [False]
    assert tier.lookup(key(0), request("r")) is MISS


# ------------------------------------------------------------------------------------------------------ rules 5 to 9


def test_r5_a_hit_stays_loadable_until_the_step_has_ended(primary):
    tier = make_tier(primary, blocks=4)
    before = primary.copy()
    store(tier, 1, keys(0, 1), [0, 1])
    store(tier, 2, keys(2, 3), [2, 3])
    assert tier.lookup(key(0), request("r")) is HIT
    store(tier, 3, keys(4, 5, 6, 7), [4, 5, 6, 7])
    assert load(tier, 4, keys(0), [20]).success
    assert np.array_equal(primary[20], before[0])
    tier.shutdown()


def test_r5_the_pin_ends_with_the_step_also_if_no_load_came(primary):
    tier = make_tier(primary, blocks=2)
    store(tier, 1, keys(0, 1), [0, 1])
    tier.lookup(key(0), request("r"))
    tier.lookup(key(1), request("r"))
    store(tier, 2, keys(2), [2])
    assert tier.get_num_blocks() == 2
    assert tier.statistics().blocks_refused == 1
    end_step(tier)
    store(tier, 3, keys(3), [3])
    assert held(tier, keys(3)) == [True]
    tier.shutdown()


def test_r5_a_load_may_follow_the_end_of_its_request(tier, primary):
    before = primary.copy()
    context = request("r")
    store(tier, 1, keys(0), [0])
    tier.on_new_request(context)
    assert tier.lookup(key(0), context) is HIT
    tier.on_request_finished(context)
    assert load(tier, 2, keys(0), [9], context=context).success
    assert np.array_equal(primary[9], before[0])


def test_r5_unpinning_a_key_that_is_gone_does_nothing(tier):
    store(tier, 1, keys(0), [0])
    tier.lookup(key(0), request("r"))
    load(tier, 2, keys(0), [99])  # fails: the key is gone while its hit is pinned
    end_step(tier)
    assert tier.statistics().rows_used == 0
    assert tier.statistics().faults == 1


def test_r6_a_row_that_a_load_reads_is_not_reused(primary):
    tier = make_tier(primary, blocks=2)
    before = primary.copy()
    store(tier, 1, keys(0, 1), [0, 1])
    with load_gate(tier):
        tier.submit_load(job(2, keys(0, 1), [10, 11], load=True))
        tier.submit_load(job(3, keys(0, 1), [99, 99], load=True))  # fails, so the keys are gone while they are read
        assert tier.get_num_blocks() == 0
        tier.submit_store(job(4, keys(2, 3), [2, 3]))
    results = finish(tier)
    assert results[2].success
    assert np.array_equal(primary[[10, 11]], before[[0, 1]])
    assert tier.statistics().blocks_refused == 2
    store(tier, 5, keys(2, 3), [2, 3])
    assert held(tier, keys(2, 3)) == [True, True]
    tier.shutdown()


def test_r6_a_row_that_a_store_fills_is_not_reused(primary):
    tier = make_tier(primary, blocks=1)
    with store_gate(tier):
        tier.submit_store(job(1, keys(0), [0]))
        tier.submit_load(job(2, keys(0), [9], load=True))  # fails, so the key is gone while it is filled
        tier.submit_store(job(3, keys(1), [1]))
        assert {result.job_id: result.success for result in tier.get_finished_jobs()} == {2: False, 3: True}
    finish(tier)
    assert tier.get_num_blocks() == 0
    assert tier.statistics().rows_used == 0
    tier.shutdown()


def test_r6_a_job_failed_in_part_is_reported_after_its_copies(tier):
    store(tier, 1, keys(0), [0])
    with load_gate(tier):
        tier.submit_load(job(2, keys(0, 77), [10, 11], load=True))
        assert list(tier.get_finished_jobs()) == []
    assert not finish(tier)[2].success


def test_r6_a_failed_store_leaves_no_key_and_no_row(tier):
    tier.block_store.engine.store_stream = FailingStream()
    assert not store(tier, 1, keys(0, 1), [0, 1]).success
    assert held(tier, keys(0, 1)) == [False, False]
    assert tier.statistics().rows_used == 0


def test_r6_a_block_on_its_way_is_a_miss_and_its_load_fails(tier):
    store_gate(tier).hold()
    tier.submit_store(job(1, keys(0), [0]))
    assert tier.lookup(key(0), request("r")) is MISS
    tier.submit_load(job(2, keys(0), [9], load=True))
    assert [(result.job_id, result.success) for result in tier.get_finished_jobs()] == [(2, False)]


def test_r7_loads_do_not_wait_for_stores(tier, primary):
    before = primary.copy()
    store(tier, 1, keys(0), [0])
    store_gate(tier).hold()
    tier.submit_store(job(2, keys(1, 2, 3), [1, 2, 3]))
    tier.submit_load(job(3, keys(0), [20], load=True))
    tier.block_store.loads_in_flight[0].synchronize()
    assert [result.job_id for result in tier.get_finished_jobs()] == [3]
    assert np.array_equal(primary[20], before[0])


def test_r8_lookup_asks_the_index_alone(tier):
    store(tier, 1, keys(0), [0])
    engine, arena = tier.block_store.engine, tier.block_store.arena
    tier.block_store.engine = tier.block_store.arena = None
    assert tier.lookup(key(0), request("r")) is HIT
    assert tier.lookup(key(1), request("r")) is MISS
    tier.block_store.engine, tier.block_store.arena = engine, arena
    assert tier.statistics().faults == 0


# --------------------------------------------------------------------------------------------------- rules 10 to 12


def reset(tier) -> None:
    """vLLM's word of a reset, in the words of its version."""
    tier.drain_jobs()
    if helpers.HAS_DETECTOR:
        tier.bp_detector.reset()


def test_r10_a_reset_forgets_what_was_stored_before(tier):
    store(tier, 1, keys(0, 1), [0, 1])
    reset(tier)
    assert held(tier, keys(0, 1)) == [False, False]
    assert tier.statistics().rows_used == 0
    store(tier, 2, keys(0), [5])
    assert held(tier, keys(0)) == [True]


@pytest.mark.skipif(not helpers.HAS_DETECTOR, reason="before 0.31 a drain cannot be told from a reset")
def test_r10_a_drain_alone_loses_nothing(tier):
    store(tier, 1, keys(0), [0])
    tier.submit_store(job(2, keys(1), [1]))
    tier.drain_jobs()
    assert [result.job_id for result in tier.get_finished_jobs()] == [2]
    assert held(tier, keys(0, 1)) == [True, True]


def test_r10_keep_on_reset_keeps_but_holds_promotions_back_for_a_step(primary):
    tier = make_tier(primary, blocks=4, keep_on_reset=True)
    store(tier, 1, keys(0), [0])
    reset(tier)
    assert tier.lookup(key(0), request("r")) is MISS
    end_step(tier)
    assert tier.lookup(key(0), request("r")) is MISS
    tier.get_stats()
    assert tier.lookup(key(0), request("r")) is HIT
    tier.shutdown()


def test_r10_kept_blocks_are_held_back_until_the_results_of_all_steps_planned_before_are_in(primary):
    tier = make_tier(primary, blocks=4, keep_on_reset=True)
    store(tier, 1, keys(0), [0])
    for _ in range(5):  # results come after the next step was planned
        end_step(tier)
        end_step(tier)
        tier.get_stats()
        tier.get_stats()
    end_step(tier)
    end_step(tier)
    reset(tier)
    answers = []
    for _ in range(4):
        end_step(tier)
        answers.append(tier.lookup(key(0), request("r")))
        tier.get_stats()
        answers.append(tier.lookup(key(0), request("r")))
    # Two steps were under way, and the first after the reset has to end.
    assert answers == [MISS] * 5 + [HIT] * 3
    tier.shutdown()


def test_r10_after_a_reset_nothing_is_promised_that_was_before_it():
    primary = primary_rows(4)
    tier = make_tier(primary, blocks=8, keep_on_reset=True)
    store(tier, 1, keys(0, 1, 2, 3), [0, 1, 2, 3])
    store(tier, 2, keys(4, 5, 6, 7), [0, 1, 2, 3])
    contexts = [request("r", keys(0, 1, 2, 3)), request("s", keys(4, 5, 6, 7))]
    for context in contexts:
        tier.on_new_request(context)
    assert [tier.lookup(name, contexts[0]) for name in keys(0, 1, 2, 3)] == [HIT] * 4
    tier.submit_load(job(3, keys(0, 1, 2, 3), [0, 1, 2, 3], contexts[0], load=True))
    end_step(tier)
    assert tier.lookup(key(4), contexts[1]) is LookupResult.RETRY
    finish(tier)
    reset(tier)
    for _ in range(2):
        end_step(tier)
        tier.get_stats()
        tier.get_stats()
    assert tier.lookup(key(4), contexts[1]) is HIT
    tier.shutdown()


@pytest.mark.parametrize("keep", [False, True])
def test_r10_vllms_reset_cache_is_heard(keep):
    world = World(primary_blocks=4, tier_blocks=16, keep_on_reset=keep)
    context = request("old", keys(0))
    world.start(context, keys(0))
    world.offload(context, keys(0), lambda name: np.full(64, 7, np.uint8))
    world.tier.block_store.drain()
    world.step()
    world.manager.reset_cache()
    world.step()
    if hasattr(world.manager, "on_reset_flushed"):
        world.manager.on_reset_flushed()
    fetched = world.fetch(context, key(0))
    assert (fetched is not None) == keep
    world.close()


@pytest.mark.skipif(not helpers.HAS_DETECTOR, reason="vLLM has no back-pressure before 0.31")
class TestDetector:
    def configured(self, **options):
        from vllm.v1.kv_offload.tiering.backpressure import DropStorePolicy, EMABackpressureDetector

        return EMABackpressureDetector(high_water_s=0.01, low_water_s=0.001, policy=DropStorePolicy(), **options)

    def test_r10_a_configured_detector_keeps_its_effects(self, primary):
        detector = self.configured(warmup_completions=1)
        tier = make_tier(primary, blocks=4, backpressure_detector=detector)
        assert tier.bp_detector.should_store(1)
        for _ in range(20):
            tier.bp_detector.on_store_completed(1.0, 1 << 20)
        assert detector.is_under_pressure()
        assert not tier.bp_detector.should_store(3)
        assert tier.bp_detector.policy.pop_stores_dropped() == (1, 3)
        assert tier.bp_detector.stats == detector.stats
        tier.bp_detector.store_latency_ema = 0.25
        assert detector.store_latency_ema == 0.25
        store(tier, 1, keys(0), [0])
        tier.bp_detector.reset()
        assert not detector.is_under_pressure()
        assert tier.get_num_blocks() == 0
        tier.shutdown()

    def test_r10_a_configured_detector_is_taken_whatever_its_truth_value(self, primary):
        detector = MagicMock()
        detector.__bool__.return_value = False
        tier = make_tier(primary, blocks=4, backpressure_detector=detector)
        tier.bp_detector.reset()
        detector.reset.assert_called_once_with()
        tier.shutdown()

    def test_r10_a_detector_that_fails_to_reset_does_not_keep_the_blocks(self, primary):
        detector = MagicMock()
        detector.reset.side_effect = RuntimeError
        tier = make_tier(primary, blocks=4, backpressure_detector=detector)
        store(tier, 1, keys(0), [0])
        with pytest.raises(RuntimeError):
            tier.bp_detector.reset()
        assert tier.get_num_blocks() == 0
        tier.shutdown()

    def test_r10_it_is_told_what_the_copies_took_and_not_when_that_was_seen(self, primary, monkeypatch):
        """vLLM sees an end once a step, and here a step seems to take 1,000 s."""
        clock, later, told = time.monotonic, [0.0], []
        monkeypatch.setattr(time, "monotonic", lambda: clock() + later[0])
        detector = compat.NoPressure()
        detector.update = lambda submitted, size: told.append((time.monotonic() - submitted, size))
        world = World(primary_blocks=8, tier_blocks=8, backpressure_detector=detector)
        for turn in range(3):
            asks = request(f"request {turn}")
            world.start(asks, keys(turn, 10 + turn))
            for name in (turn, 10 + turn):
                world.offload(asks, keys(name), lambda _: np.zeros(64, dtype=np.uint8))
            world.tier.block_store.drain()
            later[0] += 1000
            world.step()
        world.step()
        assert [size for _, size in told] == [64] * 6
        assert all(0 <= seconds < 1000 for seconds, _ in told), told
        world.close()

    def test_r10_what_it_is_told_is_the_stores_own_whatever_ends_with_it(self, primary, monkeypatch):
        told = []
        detector = MagicMock()
        detector.update = lambda submitted, size: told.append(time.monotonic() - submitted)
        tier = make_tier(primary, blocks=8, backpressure_detector=detector)
        with monkeypatch.context() as patched:  # a poll after which nobody told the detector
            patched.setattr(tier.block_store, "poll", lambda: [Finished(0, True, bytes=64, seconds=100.0)])
            tier.get_finished_jobs()
        store(tier, 1, keys(0), [0])
        tier.bp_detector.update(time.monotonic() - 500, 1)
        assert told.pop() < 100
        tier.submit_load(job(2, keys(0), [1], load=True))
        tier.submit_load(job(3, keys(5), [1], load=True))  # not here
        tier.submit_store(job(4, keys(1), [40]))  # no such row
        tier.submit_store(job(5, keys(1), [1]))
        assert [result.success for result in finish(tier).values()].count(True) == 2
        tier.bp_detector.update(time.monotonic() - 500, 1)
        assert told.pop() < 100
        tier.bp_detector.update(time.monotonic() - 500, 1)  # of a store that nothing is known of
        assert told.pop() == pytest.approx(500, abs=100)
        tier.shutdown()

    def test_r10_without_one_nothing_is_ever_held_back(self, tier):
        detector = tier.bp_detector
        for _ in range(100):
            detector.update(0.0, 1)  # a store of one byte that seems to have taken days
            assert detector.should_store(5)
        assert not detector.is_under_pressure()
        assert detector.stats == {}
        assert detector.policy.pop_stores_dropped() == (0, 0)
        detector.reset()


def threads() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


def test_r11_shutdown_is_idempotent_and_lets_go_of_the_primary(primary):
    before = threads()
    views = [memoryview(primary)]
    tier = AsyncSecondaryTierManager(MagicMock(), views[0], "async")
    store(tier, 1, keys(0), [0])
    tier.shutdown()
    tier.shutdown()
    until(lambda: threads() <= before, "the tier's threads are gone")
    assert views[0].nbytes, "vLLM's memoryview is not ours to release"
    assert tier.lookup(key(0), request("r")) is MISS
    is_alive = weakref.ref(views[0])
    views.clear()
    assert is_alive() is None


def test_r11_vllms_region_closes_after_shutdown(caplog, monkeypatch):
    region_module = pytest.importorskip("vllm.v1.kv_offload.cpu.shared_offload_region")
    unique = f"async-tier-test-{os.getpid()}-{uuid.uuid4().hex}"
    name = {"engine_id" if helpers._COUNT == "num_chunks" else "instance_id": unique}
    if (
        helpers._COUNT == "num_blocks"
        and "engine_id" in region_module.SharedOffloadRegion.__init__.__code__.co_varnames
    ):
        name = {"engine_id": unique}
    bytes_name = (
        "kv_bytes_per_chunk"
        if "kv_bytes_per_chunk" in region_module.SharedOffloadRegion.__init__.__code__.co_varnames
        else "kv_bytes_per_block"
    )
    region = region_module.SharedOffloadRegion(
        **name, **{helpers._COUNT: 4, bytes_name: 4096}, rank=None, cpu_page_size=4096
    )
    primary_tier = helpers.CPUPrimaryTierOffloadingManager(**{helpers._COUNT: 4, "mmap_region": region})
    tier = AsyncSecondaryTierManager(MagicMock(), primary_tier.get_kv_memoryview(), "async")
    manager = helpers.TieringOffloadingManager(primary_tier=primary_tier, secondary_tiers=[tier])
    mapped = region.mmap_obj
    store(tier, 1, keys(0), [0])
    manager.shutdown()
    assert mapped.closed
    assert not os.path.exists(region.mmap_path)
    assert "exported pointers" not in caplog.text


def named_memory() -> set[str]:
    """Paths of what this process has mapped and shares: others find it, and it can outlive the process."""
    mappings = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    return {path for _, access, *_, path in mappings if access.endswith("s") and not path.endswith(" (deleted)")}


def test_r11_r12_repeated_construction_leaks_nothing(primary):
    def census() -> tuple[int, int]:
        return threads(), len(os.listdir("/proc/self/fd"))

    make_tier(primary).shutdown()
    before, named = census(), named_memory()
    for _ in range(20):
        tier = make_tier(primary, blocks=4)
        store(tier, 1, keys(0), [0])
        assert named_memory() <= named
        tier.shutdown()
    # Threads of streams of the emulator's end when they find out.
    until(lambda: all(map(operator.le, census(), before)), "what the tiers had is gone")


@pytest.mark.host_only  # an engine of CUDA's waits for what is held
def test_a_tier_that_nobody_shuts_down_ends_with_its_object(primary):
    before = threads()
    tier = make_tier(primary, blocks=4)
    store_gate(tier).hold()
    tier.submit_store(job(1, keys(0), [0]))
    helpers.forget()
    del tier
    assert threads() <= before


# ------------------------------------------------------------------------------------------------------------ rule 13


def eviction_order(tier, names, filler=1000) -> list[int]:
    """Numbers of `names` in the order in which they go when others are stored one by one."""
    gone: list[int] = []
    for turn in range(len(names) + tier.statistics().capacity):
        store(tier, filler + turn, keys(filler + turn), [31])
        gone += [at for at, here in enumerate(held(tier, names)) if not here and at not in gone]
    return gone


def test_r13_later_blocks_of_a_request_go_first(primary):
    tier = make_tier(primary, blocks=6)
    names = keys(*range(6))
    context = request("r", names)
    tier.on_new_request(context)
    tier.touch(names, context)
    store(tier, 1, set(names[:3]), range(3), context=context)
    store(tier, 2, set(names[3:]), range(3), context=context)
    assert eviction_order(tier, names) == [5, 4, 3, 2, 1, 0]
    tier.shutdown()


def test_r13_a_later_job_never_evicts_an_earlier_one_of_its_request(primary):
    tier = make_tier(primary, blocks=4)
    names = keys(*range(6))
    context = request("r", names)
    tier.on_new_request(context)
    tier.touch(names, context)
    store(tier, 1, names[:3], range(3), context=context)
    assert store(tier, 2, names[3:], range(3), context=context).success
    assert held(tier, names) == [True] * 4 + [False] * 2
    tier.shutdown()


def test_a_policy_of_ones_own_is_used(primary):
    """Which this one is told by: it gives up a beginning that a held block continues."""
    tier = make_tier(primary, blocks=4, eviction_policy="benchmarks.bench.plain_lru:PlainLru")
    context = request("r")
    store(tier, 1, keys(0, 1), [0, 1], context=context)
    store(tier, 2, keys(2, 3), [2, 3], context=context)
    store(tier, 3, keys(50), [0])
    assert held(tier, keys(0, 1, 2, 3)) == [True, False, True, True]
    tier.shutdown()


def test_r13_without_an_order_that_of_the_jobs_counts(primary):
    tier = make_tier(primary, blocks=4)
    context = request("r")
    store(tier, 1, keys(0, 1), [0, 1], context=context)
    store(tier, 2, keys(2, 3), [2, 3], context=context)
    order = eviction_order(tier, keys(0, 1, 2, 3))
    assert order == [3, 2, 1, 0]
    tier.shutdown()


def test_r13_unrelated_requests_go_by_recency(primary):
    tier = make_tier(primary, blocks=6)
    for number in range(3):
        store(tier, number, keys(2 * number, 2 * number + 1), [0, 1])
    assert eviction_order(tier, keys(*range(6))) == [1, 0, 3, 2, 5, 4]
    tier.shutdown()


def test_r13_lookups_refresh_their_blocks_in_reverse(primary):
    tier = make_tier(primary, blocks=6)
    for number in range(3):
        store(tier, number, keys(2 * number, 2 * number + 1), [0, 1])
    context = request("again", keys(0, 1))
    for name in keys(0, 1):
        assert tier.lookup(name, context) is HIT
    end_step(tier)
    assert eviction_order(tier, keys(*range(6))) == [3, 2, 5, 4, 1, 0]
    tier.shutdown()


@pytest.mark.skipif(not helpers.HAS_POSITIONS, reason="touch refreshes the prefix up to 0.30")
def test_r13_lookups_from_the_end_on_refresh_their_blocks_in_reverse_too(primary):
    """As vLLM looks for a sliding window; here of blocks that do not follow each other in the tier."""
    tier = make_tier(primary, blocks=5)
    for number in range(3):
        store(tier, number, keys(number), [0])
    store(tier, 3, keys(50, 51), [0, 1])
    context = request("again", keys(0, 1, 2))
    tier.on_new_request(context)
    for name in reversed(keys(0, 1, 2)):
        assert tier.lookup(name, context) is HIT
    end_step(tier)
    assert eviction_order(tier, keys(0, 1, 2, 50, 51)) == [4, 3, 2, 1, 0]
    tier.shutdown()


@pytest.mark.skipif(not helpers.HAS_POSITIONS, reason="touch refreshes the prefix up to 0.30; see the next test")
def test_r13_a_prefix_that_the_primary_served_outlives_what_follows_it(primary):
    tier = make_tier(primary, blocks=6)
    names = keys(*range(4))
    first = request("turn 1", names[:2])
    tier.on_new_request(first)
    store(tier, 1, names[:2], [0, 1], context=first)
    tier.on_request_finished(first)
    store(tier, 2, keys(50, 51), [0, 1])
    second = request("turn 2", names)
    tier.on_new_request(second)
    store(tier, 3, names[2:], [2, 3], context=second)
    assert eviction_order(tier, [*names, *keys(50, 51)]) == [5, 4, 3, 2, 1, 0]
    tier.shutdown()


@pytest.mark.skipif(helpers.HAS_POSITIONS, reason="vLLM calls touch up to 0.30")
def test_r13_touch_refreshes_a_prefix_in_order(primary):
    tier = make_tier(primary, blocks=6)
    names = keys(*range(4))
    store(tier, 1, names[:2], [0, 1])
    store(tier, 2, keys(50, 51), [0, 1])
    second = request("turn 2")
    tier.on_new_request(second)
    tier.touch(names, second)
    store(tier, 3, set(names[2:]), [2, 3], context=second)
    assert eviction_order(tier, [*names, *keys(50, 51)]) == [5, 4, 3, 2, 1, 0]
    tier.shutdown()


def test_what_a_request_leaves_behind_ends_with_it(tier):
    for number in range(50):
        context = request(f"r{number}", keys(number))
        tier.on_new_request(context)
        tier.touch(keys(number), context)
        tier.lookup(key(number), context)
        store(tier, number, keys(number), [0], context=context)
        assert tier.lookup(key(number), context) is HIT
        tier.on_request_finished(context)
        end_step(tier)
    assert tier.block_store.orders == {}
    assert tier.block_store.index.policy.sequences == 0


# ------------------------------------------------------------------------------------------------- refusals, in words


def test_workers_on_several_nodes_are_refused(primary):
    spec = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(nnodes=2)))
    with pytest.raises(ValueError, match="spread over 2 nodes"):
        AsyncSecondaryTierManager(spec, memoryview(primary), "async")


@pytest.mark.parametrize(("workers", "gpus", "refused"), [(16, 8, True), (8, 8, False), (9, 8, True)])
def test_more_workers_than_this_node_has_gpus_are_refused(primary, monkeypatch, workers, gpus, refused):
    # What the spec of vLLM 0.27 and later shows.
    spec = SimpleNamespace(config=SimpleNamespace(parallel=SimpleNamespace(world_size=workers)))
    platform = SimpleNamespace(is_cuda_alike=lambda: True, device_count=lambda: gpus)
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    if refused:
        with pytest.raises(ValueError, match="spread over 2 nodes"):
            AsyncSecondaryTierManager(spec, memoryview(primary), "async")
    else:
        AsyncSecondaryTierManager(spec, memoryview(primary), "async").shutdown()


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_where_workers_are_is_unknown_to_a_process_without_gpus(primary, monkeypatch, caplog, workers):
    """Ray gives an engine's process none. That is not "several nodes"; but nor is it known to be one."""
    spec = SimpleNamespace(config=SimpleNamespace(parallel=SimpleNamespace(world_size=workers)))
    platform = SimpleNamespace(is_cuda_alike=lambda: True, device_count=lambda: 0)
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    AsyncSecondaryTierManager(spec, memoryview(primary), "async").shutdown()
    assert caplog.text.count("cannot check that all workers are on this node") == 1


def test_workers_on_several_nodes_show_in_the_configuration_that_callers_hold(primary, monkeypatch):
    """vLLM 0.27 and later: the spec does not have it, and here every node has GPUs to spare."""
    vllm_config = MagicMock(spec=VllmConfig)
    vllm_config.parallel_config = SimpleNamespace(nnodes=2, nnodes_within_dp=2)
    spec = SimpleNamespace(config=SimpleNamespace(parallel=SimpleNamespace(world_size=8)))
    platform = SimpleNamespace(is_cuda_alike=lambda: True, device_count=lambda: 8)
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    with pytest.raises(ValueError, match="spread over 2 nodes"):
        AsyncSecondaryTierManager(spec, memoryview(primary), "async")


def test_replicas_on_several_nodes_are_not(primary):
    parallel = SimpleNamespace(nnodes=2, nnodes_within_dp=1)
    spec = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
    AsyncSecondaryTierManager(spec, memoryview(primary), "async").shutdown()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bytes_to_us": 1}, "unknown key 'bytes_to_us'.*bytes_to_use.*copy_threads"),
        ({"bytes_to_use": "much"}, "bytes_to_use must be .*'much'"),
        ({"bytes_to_use": 63}, "bytes_to_use must hold at least one block of 64 bytes"),
        ({"engine": "gpu"}, "engine must be one of 'auto', 'cuda', 'host', not 'gpu'"),
        ({"pool": "cuda"}, "pool must be 'host' or 'cuda:N'.*'cuda'"),
        ({"engine": "host", "pool": "cuda:0"}, "pool 'cuda:0' needs engine 'cuda' or 'auto'"),
        ({"engine": "cuda", "pool": "cuda:99"}, "pool 'cuda:99' n"),
        ({"copy_threads": 0}, "copy_threads must be an integer from 1 to 64, not 0"),
        ({"keep_on_reset": "yes"}, "keep_on_reset must be true or false, not 'yes'"),
        ({"eviction_policy": "mru"}, "eviction_policy must be .*'mru'"),
        ({"eviction_policy": "no_such_module:Class"}, "eviction_policy must be .*'no_such_module:Class'"),
        ({"locality": "HERE"}, "locality must be .*'HERE'"),
        ({"custom_param": "x"}, "custom_param must be an integer, not 'x'"),
        ({"custom_param": "x" * 5000}, r"custom_param must be an integer, not 'x*\.\.\. \(5002 characters\)$"),
        ({"bytes_to_use": "10Ki", "self": 1}, "unknown key 'self'"),
        ({"a\0b\ud800": 1}, r"unknown key 'a\\x00b\\ud800'"),
    ],
)
def test_r14_a_bad_configuration_fails_in_one_sentence(primary, options, words):
    before = threads()
    with pytest.raises(ValueError, match=words) as error:
        AsyncSecondaryTierManager(MagicMock(), memoryview(primary), "async", **options)
    assert "\n" not in str(error.value)
    until(lambda: threads() <= before, "the tier's threads are gone")


def test_r14_more_memory_than_there_is_is_refused(primary):
    with pytest.raises(MemoryError, match=r"the tier asks for [0-9.]+ TiB .* set bytes_to_use to less"):
        make_tier(primary, bytes_to_use=1 << 50)


# ------------------------------------------------------------------------------------------------ vLLM of tomorrow

TOMORROW = """
import dataclasses
import os
if os.environ.get("ASYNC_TIER_CUDA") == "emulated":
    from tests import cuda_emulator
    cuda_emulator.load()
from unittest.mock import MagicMock
import numpy as np
from vllm.v1.kv_offload.tiering import base

@dataclasses.dataclass
class JobResult:
    job_id: int
    who: str  # new, and must be given
    success: bool
    queued_for: float = 0.0  # new
    successful_keys: object = None
    transfer_time: float | None = None
    reasons: list = dataclasses.field(default_factory=list)  # new
    transfer_bytes: int | None = None

init = base.SecondaryTierManager.__init__
def new_init(
    self, offloading_spec, primary_kv_view, tier_type, backpressure_detector=None, locality=None, *, pool_id=0
):
    more = {"backpressure_detector": backpressure_detector} if HAS_DETECTOR else {}
    init(self, offloading_spec, primary_kv_view, tier_type, **more)
    self.pool_id, self.base_locality = pool_id, locality

HAS_DETECTOR = "backpressure_detector" in init.__code__.co_varnames
base.JobResult, base.SecondaryTierManager.__init__ = JobResult, new_init

from async_tier.manager import AsyncSecondaryTierManager
primary = np.zeros((4, 64), dtype=np.uint8)
options = {"pool_id": 7, "locality": "LOCAL", "bytes_to_use": 256}
tier = AsyncSecondaryTierManager(MagicMock(), memoryview(primary), "async", **options)
assert (tier.pool_id, tier.base_locality, tier.config.locality) == (7, "LOCAL", "LOCAL")
from tests.helpers import finish, job, keys
tier.submit_store(job(1, keys(0), [0]))
tier.submit_load(job(2, keys(9), [0], load=True))
results = finish(tier)
assert results[1] == JobResult(1, None, True, 0.0, None, results[1].transfer_time, [], 64), results
assert results[1].transfer_time > 0 and not results[2].success
try:
    AsyncSecondaryTierManager(MagicMock(), memoryview(primary), "async", pool_idd=7)
except ValueError as error:
    print(error)
tier.shutdown()
"""


@pytest.mark.host_only
@pytest.mark.starts_process
def test_a_later_vllm_may_have_more_fields_and_keywords():
    """Fields between those of today, one that must be given, and what its factory passes on to its base class."""
    command = [sys.executable, "-W", "ignore", "-c", TOMORROW]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "unknown key 'pool_idd'" in ran.stdout


def test_the_tier_has_every_method_that_vllm_asks_of_one():
    """Fails with the names of what a later vLLM has added."""
    assert sorted(AsyncSecondaryTierManager.__abstractmethods__) == []


# -------------------------------------------------------------------------------------------------- what the log says


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def test_a_failed_job_has_a_line_with_its_request_and_why(tier, primary, caplog):
    store(tier, 1, keys(0), [0])
    assert said(caplog) == []
    assert not load(tier, 2, keys(0, 8, 9), [1, 2, 3]).success
    assert said(caplog) == ["Job 2 (load, request 'request of job 2', 3 blocks) failed: the tier lacks 2 of its blocks"]
    caplog.clear()
    assert not store(tier, 3, keys(1), [primary.shape[0]]).success
    assert said(caplog) == [
        "Job 3 (store, request 'request of job 3', 1 block) failed: a row number is not from 0 to 31"
    ]
    caplog.clear()
    tier.block_store.index.reserve = MagicMock(side_effect=OSError("out of luck"))
    assert not store(tier, 4, keys(1), [1]).success
    (line,) = said(caplog)
    assert line == "Job 4 (store, request 'request of job 4', 1 block) failed: OSError: out of luck"
    assert "Traceback" in caplog.text
    del tier.block_store.index.reserve


@pytest.mark.parametrize("is_load", [False, True])
def test_copies_that_fail_have_a_line_too(tier, is_load, caplog):
    store(tier, 1, keys(0), [0])
    stream = FailingStream(refuses=False)
    tier.block_store.engine.store_stream = tier.block_store.engine.load_stream = stream
    result = load(tier, 2, keys(0), [1]) if is_load else store(tier, 2, keys(1), [1])
    assert not result.success
    (line,) = said(caplog)
    assert line.startswith(f"Job 2 ({'load' if is_load else 'store'}, request 'request of job 2', 1 block) failed: ")


def test_a_job_that_is_cut_off_says_so(primary, caplog):
    tier = make_tier(primary, blocks=4)
    store_gate(tier).hold()
    for number in range(3):
        tier.submit_store(job(number, keys(number), [number]))
    returns(lambda: tier.shutdown() or True)
    first, last = [line for line in said(caplog) if line.startswith("Job ")]
    assert first.startswith("Job 0 (store, request 'request of job 0', 1 block) failed: ")
    assert last.startswith("Job 2 ")
    assert last.endswith(" (and 1 more like it since the last such line)")


def test_what_was_counted_is_said_when_a_tier_is_dropped(primary, caplog):
    tier = make_tier(primary, blocks=4)
    for number in range(3):
        load(tier, number, keys(9), [0])
    helpers.forget()
    del tier
    gc.collect()
    first, last = said(caplog)
    assert first.startswith("Job 0 ")
    assert last.startswith("Job 2 ")


def test_a_reason_is_one_line(tier, caplog):
    tier.block_store.index.reserve = MagicMock(side_effect=RuntimeError("no luck:\n\n  try again\n"))
    store(tier, 1, keys(1), [1])
    tier.block_store.index.reserve = MagicMock(side_effect=AssertionError)
    store(tier, 2, keys(1), [1], context=request("x" * 5000))
    first, second = said(caplog)
    assert first.endswith("failed: RuntimeError: no luck: try again")
    assert second.endswith("failed: AssertionError")
    assert len(second) < 300
    del tier.block_store.index.reserve


def test_r2_no_job_is_lost_for_its_promise(tier, caplog, monkeypatch):
    monkeypatch.setattr(tier.promises, "note_end", MagicMock(side_effect=[OSError("out of luck"), None]))
    tier.submit_store(job(1, keys(0), [0]))
    tier.submit_store(job(2, keys(1), [1]))
    assert {job_id: result.success for job_id, result in finish(tier).items()} == {1: True, 2: True}
    assert tier.statistics().faults == 1
    assert said(caplog) == ["The tier could not keep account of a promise: OSError: out of luck"]


@pytest.mark.parametrize("method", ["lookup", "end_step", "touch", "submit_load"])
def test_a_fault_that_goes_on_does_not_fill_the_log(tier, method, caplog):
    real = getattr(tier.block_store, method)
    setattr(tier.block_store, method, MagicMock(side_effect=OSError("out of luck")))
    for number in range(100):
        tier.lookup(key(0), request("r"))
        tier.touch(keys(0), request("r"))
        tier.submit_load(job(number, keys(0), [0], load=True))
        end_step(tier)
        tier.block_store.poll()
    setattr(tier.block_store, method, real)
    assert tier.statistics().faults == 100
    lines = [line for line in said(caplog) if "out of luck" in line]
    assert 1 <= len(lines) <= 1 + PATIENCE_S, "one a second at most"
    assert caplog.text.count("Traceback") == 1
    caplog.clear()
    tier.shutdown()
    assert [line for line in said(caplog) if "more like it since the last such line" in line], "the rest was counted"
