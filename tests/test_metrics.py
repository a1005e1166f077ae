"""What vLLM publishes about the tier: its metrics, by vLLM's own code and prometheus_client, and its KV events."""

from __future__ import annotations

import ast
import functools
import logging
import pickle
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import prometheus_client
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadPromMetrics
from vllm.v1.kv_offload.base import LookupResult
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from async_tier import eviction, plugin
from async_tier.jobs import REFUSALS
from async_tier.manager import AsyncSecondaryTierManager
from async_tier.testing import load_gate, store_gate
from async_tier.vllm import compat, metrics
from async_tier.vllm.promises import Promises
from tests import helpers
from tests.helpers import World, end_step, finish, job, key, keys, load, make_tier, remember, request, store
from tests.rows import primary_rows
from tests.test_pool import ROW_BYTES, folder, loaded, open_store, stored

__all__ = ["folder", "open_store"]  # fixtures
pytestmark = pytest.mark.contract
plugin.register()
TIERS = [{"type": "async"}, {"type": "example"}, {"type": "async"}]


class Server:
    """vLLM's side of /metrics in the API server."""

    def __init__(self, tiers: list[dict[str, Any]] = TIERS[:1]) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        kinds = (prometheus_client.Gauge, prometheus_client.Counter, prometheus_client.Histogram)
        settings = {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 1 << 20, "secondary_tiers": tiers}
        self.vllms = OffloadPromMetrics(
            SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=settings)),
            {kind: functools.partial(kind, registry=self.registry) for kind in kinds},
            ["model_name", "engine"],
            {0: ["model", "0"]},
        )

    def take(self, *tiers: AsyncSecondaryTierManager) -> None:
        """As after a step; the payload goes from one process to another."""
        for tier in tiers:
            stats = tier.get_stats()
            if stats is not None:
                self.vllms.observe(pickle.loads(pickle.dumps(stats.data)), 0)

    def values(self, label: str = "1:async") -> dict[str, float]:
        """What a scrape would say of the tier: by name without prefix, and further labels."""
        found = {}
        for family in self.registry.collect():
            for sample in family.samples:
                labels = dict(sample.labels)
                if sample.name.startswith(metrics.PREFIX) and labels.pop("tier", "") == label:
                    assert labels.pop("model_name") == "model"
                    assert labels.pop("engine") == "0"
                    if not sample.name.endswith(("_bucket", "_created")):
                        name = ", ".join([sample.name.removeprefix(metrics.PREFIX), *labels.values()])
                        found[name] = sample.value
        return found

    def changed(self, *tiers: AsyncSecondaryTierManager) -> dict[str, float]:
        """By how much the values have changed, those in seconds aside."""
        before = self.values()
        self.take(*tiers)
        return {
            name: value - before.get(name, 0)
            for name, value in self.values().items()
            if value != before.get(name, 0) and "seconds" not in name
        }


@pytest.fixture
def primary() -> np.ndarray:
    return primary_rows(32)


@pytest.fixture
def server() -> Server:
    return Server()


def tier_of(primary: np.ndarray, spec: Any, tier_type: str = "async", blocks: int = 8) -> AsyncSecondaryTierManager:
    size = blocks * primary.shape[1]
    tier = AsyncSecondaryTierManager(spec, memoryview(primary), tier_type, bytes_to_use=size, engine="host")
    remember(tier.block_store, primary)
    return tier


def test_names_are_nobody_elses_and_follow_prometheus():
    settings = {"secondary_tiers": [], "cpu_bytes_to_use": 1}
    without = TieringOffloadingSpec.build_metric_definitions(settings)
    with_tiers = TieringOffloadingSpec.build_metric_definitions({**settings, "secondary_tiers": TIERS})
    ours = AsyncSecondaryTierManager.build_metric_definitions({})
    assert with_tiers == {**without, **ours}
    assert not without.keys() & ours.keys()
    for name, definition in ours.items():
        assert name.startswith("vllm:async_tier_")
        assert definition.labelnames[0] == "tier"
        assert not name.endswith(("_total", "_count", "_sum", "_ms"))
        assert name.endswith(("_seconds", "_bytes")) or not {"seconds", "bytes"} & set(name.split("_"))


def test_the_first_values_are_all_that_there_is(primary, server):
    """Also those that are 0: a rate of what was never there cannot be alerted on."""
    tier = make_tier(primary, blocks=8)
    server.take(tier)
    values = server.values()
    assert {name.split(",")[0].removesuffix("_total") for name in values} == {
        name for name, (kind, _, _) in metrics.METRICS.items() if kind is not metrics.OffloadingHistogramMetadata
    }
    assert {name.split(", ")[1] for name in values if name.startswith("refused")} == set(REFUSALS)
    assert values["capacity_blocks"] == values["usable_blocks"] == 8


def test_what_was_copied_and_what_was_here(primary, server):
    tier = make_tier(primary, blocks=8)
    server.take(tier)
    row = primary.shape[1]
    store(tier, 1, keys(0, 1, 2), [0, 1, 2])
    assert server.changed(tier) == {
        "blocks": 3,
        "jobs_total, store": 1,
        "copied_blocks_total, store": 3,
        "copied_bytes_total, store": 3 * row,
    }
    store(tier, 2, keys(1, 2, 3), [1, 2, 3])
    assert server.changed(tier) == {
        "blocks": 1,
        "jobs_total, store": 1,
        "copied_blocks_total, store": 1,
        "copied_bytes_total, store": row,
        "present_blocks_total": 2,
    }
    assert load(tier, 3, keys(0, 3), [8, 9]).success
    assert server.changed(tier) == {
        "jobs_total, load": 1,
        "copied_blocks_total, load": 2,
        "copied_bytes_total, load": 2 * row,
    }
    assert tier.get_stats() is None, "nothing has changed"
    assert server.values()["copy_seconds_count, store"] == 2
    assert server.values()["queue_seconds_count, load"] == 1


def test_times_are_the_copies_own(primary, server):
    tier = make_tier(primary, blocks=8)
    with store_gate(tier):
        tier.submit_store(job(1, keys(0), [0]))
        tier.block_store.stores_in_flight[0].synchronize(0.01)
    finish(tier)
    server.take(tier)
    values = server.values()
    assert 0.01 <= values["queue_seconds_sum, store"] < 10
    assert 0 < values["copy_seconds_sum, store"] < values["queue_seconds_sum, store"] + 10


def test_jobs_in_flight_and_what_they_pin(primary, server):
    tier = make_tier(primary, blocks=8)
    row = primary.shape[1]
    store(tier, 1, keys(0, 1), [0, 1])
    server.take(tier)
    with store_gate(tier), load_gate(tier):
        tier.submit_store(job(2, keys(2, 3, 4), [2, 3, 4]))
        tier.submit_load(job(3, keys(0), [9], load=True))
        tier.lookup(key(1), request("asks"))
        changed = server.changed(tier)
        assert {name: changed[name] for name in changed if "inflight" in name or "pinned" in name} == {
            "inflight_jobs, store": 1,
            "inflight_bytes, store": 3 * row,
            "inflight_jobs, load": 1,
            "inflight_bytes, load": row,
            "pinned_blocks": 5,
        }
    finish(tier)
    end_step(tier)
    server.take(tier)
    assert not any(value for name, value in server.values().items() if "inflight" in name or "pinned" in name)


def test_evicted_lost_and_reset(primary, server):
    tier = make_tier(primary, blocks=4)
    store(tier, 1, keys(0, 1, 2, 3), range(4))
    server.take(tier)
    store(tier, 2, keys(4), [4])
    assert server.changed(tier)["evicted_blocks_total"] == 1
    gone = next(number for number in range(4) if not tier.block_store.has(key(number)))
    assert not load(tier, 3, keys(gone, 4), [8, 9]).success
    changed = server.changed(tier)
    assert changed["lost_blocks_total"] == changed["failed_jobs_total, load"] == 1
    assert changed["copied_blocks_total, load"] == 1
    assert "faults_total" not in changed
    tier.bp_detector.reset() if not compat.DRAIN_MEANS_RESET else tier.drain_jobs()
    changed = server.changed(tier)
    assert changed["resets_total"] == 1
    assert changed["blocks"] == -4


@pytest.mark.each_engine("host", "cuda, pool host")
def test_peers_and_what_was_copied_from_them(open_store, server):
    before = open_store()
    stored(before, 1, 2)
    before.close()
    ours, theirs = open_store(), open_store()
    stored(theirs, 5, 6, 7)
    assert ours.lookup(key(5))
    assert loaded(ours, 5, 6) == [5, 6]
    values = metrics.TierMetrics("1:async", ours, Promises(64, ours.has, compat.group_of))
    server.take(SimpleNamespace(get_stats=values.take))
    assert {name: value for name, value in server.values().items() if re.search("peer|borrowed|restored", name)} == {
        "peers": 1,
        "peer_blocks": 3,
        "restored_blocks": 2,
        "borrowed_blocks_total": 2,
        "borrowed_bytes_total": 2 * ROW_BYTES,
    }


class TestRefused:
    def begin(self, tier: AsyncSecondaryTierManager) -> tuple[list[bytes], Any]:
        """A request of 6 blocks, in their order."""
        prompt = keys(*range(6))
        asks = request("long", prompt)
        tier.on_new_request(asks)
        tier.touch(prompt, asks)
        return prompt, asks

    def test_for_want_of_a_row_because_a_request_is_longer_than_the_tier(self, primary, server):
        tier = make_tier(primary, blocks=4)
        server.take(tier)
        prompt, asks = self.begin(tier)
        store(tier, 1, prompt, range(6), context=asks)
        changed = server.changed(tier)
        assert changed["refused_blocks_total, own_request"] == 2
        assert changed["copied_blocks_total, store"] == 4

    def test_its_own_copies_in_flight_do_not_change_that(self, primary, server):
        tier = make_tier(primary, blocks=4)
        server.take(tier)
        prompt, asks = self.begin(tier)
        with store_gate(tier):
            tier.submit_store(job(1, prompt[:3], [0, 1, 2], context=asks))
            tier.submit_store(job(2, prompt[3:], [3, 4, 5], context=asks))
        finish(tier)
        assert server.changed(tier)["refused_blocks_total, own_request"] == 2

    def test_because_copies_of_others_need_the_rows(self, primary, server):
        tier = make_tier(primary, blocks=4)
        server.take(tier)
        with store_gate(tier):
            tier.submit_store(job(1, keys(0, 1, 2), [0, 1, 2]))
            tier.submit_store(job(2, keys(3, 4, 5), [3, 4, 5]))
        finish(tier)
        changed = server.changed(tier)
        assert changed["refused_blocks_total, in_use"] == 2
        assert changed["copied_blocks_total, store"] == 4

    def test_because_hits_of_this_step_need_them(self, primary, server):
        tier = make_tier(primary, blocks=2)
        store(tier, 1, keys(0, 1), [0, 1])
        server.take(tier)
        for number in (0, 1):
            tier.lookup(key(number), request("asks"))
        store(tier, 2, keys(2), [2])
        assert server.changed(tier)["refused_blocks_total, in_use"] == 1

    def test_because_memory_is_not_ready(self, primary, server):
        tier = make_tier(primary, blocks=4)
        tier.block_store.index.usable = 1
        arena = tier.block_store.arena
        tier.block_store.arena = SimpleNamespace(rows=arena.rows, ready=1, pool=arena.pool)
        server.take(tier)
        store(tier, 1, keys(0, 1, 2), [0, 1, 2])
        assert server.values()["usable_blocks"] == 1
        assert server.changed(tier)["refused_blocks_total, not_ready"] == 2

    def test_because_the_job_failed(self, primary, server):
        tier = make_tier(primary, blocks=4)
        server.take(tier)
        store(tier, 1, keys(0, 1), [0, 99])
        changed = server.changed(tier)
        assert changed["refused_blocks_total, failed"] == 2
        assert changed["failed_jobs_total, store"] == changed["faults_total"] == 1
        tier.shutdown()
        store(tier, 2, keys(0, 1, 2), [0, 1, 2])
        assert server.changed(tier)["refused_blocks_total, failed"] == 3

    @pytest.mark.host_only  # an engine of CUDA's waits for what is held
    def test_because_its_copies_failed_and_only_those_that_were_copied(self, primary, server):
        tier = make_tier(primary, blocks=4)
        store(tier, 1, keys(0), [0])
        server.take(tier)
        with store_gate(tier):
            tier.submit_store(job(2, keys(0, 1, 2), [0, 1, 2]))
            tier.shutdown()
        list(tier.get_finished_jobs())
        changed = server.changed(tier)
        assert changed["refused_blocks_total, failed"] == 2
        assert changed["present_blocks_total"] == 1

    def test_what_is_offered_is_copied_or_here_or_refused(self, primary):
        chance = random.Random(5)
        tier = make_tier(primary, blocks=6)
        offered = 0
        for number in range(300):
            names = chance.sample(range(40), chance.randint(0, 9))
            offered += len(names)
            tier.submit_store(job(number, keys(*names), [chance.randrange(40) for _ in names]))
            if chance.random() < 0.3:
                tier.submit_load(job(1000 + number, keys(chance.randrange(40)), [0], load=True))
            if chance.random() < 0.3:
                finish(tier)
        finish(tier)
        now = tier.statistics()
        assert now.blocks_stored + now.blocks_present + now.blocks_refused == offered
        assert min(now.blocks_stored, now.blocks_present, now.refused["failed"], now.refused["in_use"]) > 0


class TestWarning:
    """Of sizes that are too small: in the log, at most once a minute each."""

    @pytest.fixture
    def watch(self, monkeypatch):
        """A minute passes before each `check`, which is told by how much the values have grown since the start."""
        clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
        monkeypatch.setattr(metrics, "time", clock)
        zero = make_tier(primary_rows(8)).get_stats().data["data"]
        start = {(name.removeprefix(metrics.PREFIX), "".join(labels[1:])): 0 for name in zero for labels in zero[name]}
        watch = metrics.Watch("1:async", start)

        def check(seconds: float = 60, **grown: int) -> None:
            clock.now += seconds
            values = dict(start)
            for name, value in grown.items():
                found = [key for key in start if name in ("_".join(key).strip("_"), f"refused_{key[1]}")]
                values[found[0]] = value
            watch.check(values)

        return check

    def test_the_commonest_reason_is_named_with_what_helps(self, watch, caplog):
        watch(copied_blocks_store=90, refused_own_request=2, refused_in_use=8)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "1:async has refused 10 of the 100 blocks" in record.message
        assert "in the last 60 s, 8 of them because " + REFUSALS["in_use"] in record.message

    def test_one_in_a_hundred_is_none(self, watch, caplog):
        watch(copied_blocks_store=990, refused_in_use=10)
        watch(copied_blocks_store=990, refused_in_use=10)
        assert not caplog.records
        watch(copied_blocks_store=1080, refused_in_use=11)
        assert "1 of the 91 blocks" in caplog.text

    def test_it_is_said_once_a_minute_and_of_that_minute(self, watch, caplog):
        for second in range(1, 181):
            watch(seconds=1, refused_own_request=second)
        assert [record.args[1:3] for record in caplog.records] == [(60, 60)] * 3

    def test_a_tier_that_evicts_what_nobody_has_loaded_yet(self, watch, caplog):
        watch(evicted_blocks=400, copied_blocks_load=99, oldest_block_age_seconds=20)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "1:async has evicted 400 blocks in the last 60 s and loaded 99; a block stays for 20 s" in record.message
        assert "set bytes_to_use to more" in record.message

    @pytest.mark.parametrize(
        "grown",
        [
            {"evicted_blocks": 400, "copied_blocks_load": 100},
            {"evicted_blocks": 400, "oldest_block_age_seconds": metrics.THRASHING_AGE_S},
            {"copied_blocks_load": 100},
            {},
        ],
        ids=["it is used", "blocks stay for long", "nothing is evicted", "nothing happens"],
    )
    def test_a_tier_that_is_large_enough(self, watch, caplog, grown):
        watch(**grown)
        assert not caplog.records

    def test_requests_that_are_turned_away_for_want_of_a_primary(self, watch, caplog):
        watch(turned_away_miss=2, promises_taken_up=198, turned_away_wait=99)
        assert not caplog.records
        watch(turned_away_miss=5, promises_taken_up=398, turned_away_wait=999)
        (record,) = caplog.records
        assert "no room for blocks that tier 1:async has, 3 times in the last 60 s" in record.message
        assert "set cpu_bytes_to_use to more" in record.message

    def test_a_primary_that_is_too_small_for_a_step(self, watch, caplog):
        """Nothing is stored then, so nothing is refused, evicted or found."""
        watch(lookups_miss=metrics.LEAST_ASKED)
        (record,) = caplog.records
        assert "vLLM has asked tier 1:async for 10 blocks in the last 60 s, found none, and offered" in record.message
        assert "set cpu_bytes_to_use to more, or max_num_batched_tokens to less" in record.message

    @pytest.mark.parametrize(
        "grown",
        [{"jobs_store": 1}, {"lookups_hit": 1}, {"lookups_miss": metrics.LEAST_ASKED - 1}],
        ids=["something is stored", "something is found", "hardly anything is asked"],
    )
    def test_a_primary_that_has_room_for_a_step(self, watch, caplog, grown):
        watch(**{"lookups_miss": metrics.LEAST_ASKED, **grown})
        assert not caplog.records

    def test_the_alert_has_the_same_thresholds(self):
        rule = (Path(__file__).parents[1] / "docs/monitoring/rules.yml").read_text().partition("AsyncTierThrashes")[2]
        assert f"< {metrics.THRASHING_SHARE}" in rule
        assert f"vllm:async_tier_oldest_block_age_seconds < {metrics.THRASHING_AGE_S}" in rule

    def test_the_tier_looks_at_every_step(self, primary, monkeypatch, caplog):
        tier = make_tier(primary, blocks=4)
        store(tier, 1, keys(0), [99])
        tier.get_stats()
        assert "has refused" not in caplog.text
        monkeypatch.setattr(metrics, "WARNING_INTERVAL_S", 0.0)
        tier.get_stats()
        assert "Tier 1:async has refused 1 of the 1 blocks" in caplog.text


def test_promises_kept_and_turned_away(server):
    """Two prompts of 3 blocks, a primary of 4: one waits for the other. One of 6 blocks gets 4."""
    world = World(primary_blocks=4, tier_blocks=64)
    prompts = {name: keys(*(start + at for at in range(count))) for name, start, count in
               [("a", 0, 3), ("b", 10, 3), ("long", 20, 6)]}  # fmt: skip
    for name, prompt in prompts.items():
        asks = request(name, prompt)
        world.start(asks, prompt)
        for at in range(0, len(prompt), 3):
            world.offload(asks, prompt[at : at + 3], lambda _: np.zeros(64, dtype=np.uint8))
            world.tier.block_store.drain()
            world.step()
        world.manager.on_request_finished(asks)
    server.take(world.tier)

    def ask(name: str) -> int:
        """How many answers there were before the first MISS, after which vLLM asks no more."""
        asks = request(name, prompts[name])
        world.tier.on_new_request(asks)
        world.tier.touch(prompts[name], asks)
        answers = [world.tier.lookup(each, asks) for each in prompts[name]]
        return answers.index(LookupResult.MISS) if LookupResult.MISS in answers else len(answers)

    assert ask("a") == 3
    world.tier.submit_load(job(100, prompts["a"], [0, 1, 2], context=request("a"), load=True))
    ask("b")
    changed = server.changed(world.tier)
    assert changed["turned_away_total, wait"] == 1
    assert "turned_away_total, miss" not in changed, "it waits"
    assert server.values()["promised_blocks"] == 3
    end_step(world.tier, new=["a"])
    finish(world.tier)
    changed = server.changed(world.tier)
    assert changed["promises_taken_up_total"] == 1
    assert changed["promised_blocks"] == -3
    assert ask("long") == 4
    assert server.changed(world.tier)["turned_away_total, miss"] == 2
    world.close()


class TestSeveralTiers:
    def test_each_has_its_place_in_the_list(self, primary):
        server = Server(TIERS)
        spec = SimpleNamespace(secondary_tier_configs=TIERS)
        first, second = (tier_of(primary, spec, blocks=blocks) for blocks in (4, 8))
        server.take(first, second)
        assert server.values("1:async")["capacity_blocks"] == 4
        assert server.values("3:async")["capacity_blocks"] == 8

    def test_names_of_one_class_are_told_apart(self, primary):
        tiers = [{"type": "async"}, {"type": "AsyncSecondaryTierManager", "module_path": "async_tier.manager"}]
        spec = SimpleNamespace(secondary_tier_configs=tiers)
        labels = [compat.tier_label(spec, each["type"]) for each in tiers]
        assert labels == ["1:async", "2:AsyncSecondaryTierManager"]

    def test_another_engine_begins_anew(self):
        specs = [SimpleNamespace(secondary_tier_configs=TIERS) for _ in range(2)]
        assert [compat.tier_label(spec, "async") for spec in specs] == ["1:async"] * 2

    def test_labels_are_vllms(self):
        tracker = pytest.importorskip("vllm.v1.kv_offload.tiering.metrics").TieringMetricsTracker
        spec = SimpleNamespace(secondary_tier_configs=TIERS)
        vllms = tracker.tier_label.__wrapped__
        labels = [vllms(SimpleNamespace(_tier_types=[each["type"] for each in TIERS]), place) for place in (0, 2)]
        assert labels == [(compat.tier_label(spec, "async"),) for _ in range(2)]


def test_what_is_sent_is_nobodys_but_the_receivers(primary):
    """vLLM adds other tiers' values to the object."""
    tier = make_tier(primary, blocks=8)
    first = tier.get_stats()
    store(tier, 1, keys(0), [0])
    second = tier.get_stats()
    before = pickle.dumps(first.data)
    second.aggregate(first)
    store(tier, 2, keys(1), [1])
    third = tier.get_stats()
    assert pickle.dumps(first.data) == before
    assert third.data["data"]["vllm:async_tier_copied_blocks"] == {("1:async", "store"): 1}


def test_values_are_pythons_own_numbers(primary):
    tier = make_tier(primary, blocks=8)
    store(tier, 1, keys(0, 1), np.array([0, 1], dtype=np.int32))
    for series in tier.get_stats().data["data"].values():
        for labels, value in series.items():
            assert {type(label) for label in labels} == {str}
            assert {type(each) for each in (value if isinstance(value, list) else [value])} <= {int, float}


def test_times_that_nobody_asks_for_are_not_kept(primary, monkeypatch):
    tier = make_tier(primary, blocks=8)
    for number in range(20):
        store(tier, number, keys(number), [0])
    stats = tier.get_stats()
    assert len(stats.data["data"]["vllm:async_tier_copy_seconds"]["1:async", "store"]) == 20
    monkeypatch.setattr(metrics, "MAX_TIMES", 4)
    other = make_tier(primary, blocks=8)
    for number in range(20):
        store(other, number, keys(number), [0])
    assert len(other.get_stats().data["data"]["vllm:async_tier_copy_seconds"]["1:async", "store"]) == 4


def test_the_age_is_that_of_the_block_that_goes_next(primary, server, monkeypatch):
    tier = make_tier(primary, blocks=2)
    server.take(tier)
    assert server.values()["oldest_block_age_seconds"] == 0
    store(tier, 1, keys(0), [0])
    store(tier, 2, keys(1), [1])
    later = SimpleNamespace(
        monotonic=lambda: time.monotonic() + 90, monotonic_ns=lambda: time.monotonic_ns() + 90 * 10**9
    )
    monkeypatch.setattr(eviction, "time", later)
    tier.block_store.touch(keys(0))
    server.take(tier)
    assert server.values()["oldest_block_age_seconds"] in range(90, 120)
    store(tier, 3, keys(2), [2])  # instead of the older one
    server.take(tier)
    assert server.values()["oldest_block_age_seconds"] < 30


def test_a_policy_may_not_know_ages(primary):
    tier = make_tier(primary, blocks=4, eviction_policy="benchmarks.bench.plain_lru:PlainLru")
    store(tier, 1, keys(0), [0])
    assert tier.get_stats() is not None


def test_what_fails_is_reported_and_no_step_lost(primary, monkeypatch, caplog):
    tier = make_tier(primary, blocks=4)
    monkeypatch.setattr(tier.block_store, "statistics", MagicMock(side_effect=RuntimeError("broken")))
    assert tier.get_stats() is None
    assert "could not report its metrics: RuntimeError: broken" in caplog.text


@pytest.mark.host_only
@pytest.mark.starts_process
def test_the_api_server_imports_nothing_heavy_for_it():
    """Its process asks for the definitions; a CUDA context there would cost 400 MB and more of device memory."""
    script = """
import os, sys
if os.environ.get("ASYNC_TIER_CUDA") == "emulated":
    from tests import cuda_emulator
    cuda_emulator.load()
import vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics, vllm.v1.kv_offload.tiering.spec
before = set(sys.modules)
from async_tier.manager import AsyncSecondaryTierManager
assert AsyncSecondaryTierManager.build_metric_definitions({"bytes_to_use": 1})
AsyncSecondaryTierManager.config_info_keys({})
import torch
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}), torch.cuda.is_initialized(),
      "async_tier.streams.cuda" in sys.modules)
"""
    root = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    names, is_initialized, has_cuda = ended.stdout.splitlines()[-1].rpartition("]")[0] + "]", *ended.stdout.split()[-2:]
    assert is_initialized == has_cuda == "False"
    assert set(ast.literal_eval(names)) <= {"async_tier", *sys.stdlib_module_names}


def test_config_info_is_what_was_declared(primary):
    tier = make_tier(primary, blocks=4)
    info = tier.config_info()
    assert tuple(info) == tier.config_info_keys({})
    assert "tier" not in info, "vLLM adds it, and refuses ours"
    assert info["async_tier_blocks"] == 4
    assert info["async_tier_block_bytes"] == primary.shape[1]
    assert info["async_tier_pool"] == tier.config.pool
    assert info["async_tier_eviction_policy"] == "lru"


class TestEvents:
    @pytest.fixture
    def spec(self):
        if not compat.HAS_OWNED_EVENTS:
            pytest.skip("this vLLM's events do not name a tier")
        return SimpleNamespace(
            secondary_tier_configs=TIERS, kv_events_config=SimpleNamespace(enable_kv_cache_events=True)
        )

    def make(self, primary: np.ndarray, spec: Any, blocks: int, **options: Any) -> AsyncSecondaryTierManager:
        options = {**helpers.engine_options(), "enable_kv_events": True, **options}
        size = blocks * primary.shape[1]
        tier = AsyncSecondaryTierManager(spec, memoryview(primary), "async", bytes_to_use=size, **options)
        remember(tier.block_store, primary)
        return tier

    def test_stored_with_its_result_and_removed_when_evicted(self, primary, spec):
        tier = self.make(primary, spec, blocks=2, locality="LOCAL")
        tier.submit_store(job(1, keys(0, 1), [0, 1]))
        tier.block_store.drain()
        list(tier.get_finished_jobs())
        (stored,) = tier.take_events()
        assert sorted(stored.keys) == sorted(keys(0, 1))
        assert (stored.removed, stored.removal_expected) == (False, True)
        assert (stored.medium, stored.ownership, stored.locality) == (tier.medium, "1:async", tier.locality)
        assert tier.locality is not None
        store(tier, 2, keys(2), [2])
        removed, stored = tier.take_events()
        assert (removed.removed, removed.removal_expected, removed.ownership) == (True, False, "1:async")
        assert len(removed.keys) == 1
        assert stored.keys == keys(2)
        assert not list(tier.take_events())

    def test_there_is_none_of_what_was_never_stored(self, primary, spec):
        tier = self.make(primary, spec, blocks=8)
        with store_gate(tier):
            tier.submit_store(job(1, keys(0), [0]))
            tier.submit_load(job(2, keys(0, 5), [8, 9], load=True))  # drops both keys
            list(tier.get_finished_jobs())
            assert not list(tier.take_events())
        finish(tier)
        assert not tier.block_store.has(key(0))
        assert not list(tier.take_events())

    def test_a_reset_has_none_and_forgets_those_before_it(self, primary, spec):
        tier = self.make(primary, spec, blocks=8)
        store(tier, 1, keys(0, 1), [0, 1])
        tier.block_store.clear()
        assert not list(tier.take_events())
        store(tier, 2, keys(1), [1])
        (stored,) = tier.take_events()
        assert stored.keys == keys(1)

    def test_who_follows_them_knows_what_can_be_loaded(self, primary, spec):
        chance = random.Random(7)
        tier = self.make(primary, spec, blocks=12)
        known: set[bytes] = set()
        removals = 0
        for number in range(600):
            what = chance.random()
            names = keys(*chance.sample(range(40), chance.randint(1, 6)))
            rows = chance.sample(range(32), len(names))
            if what < 0.6:
                tier.submit_store(job(number, names, rows))
            elif what < 0.9:
                tier.submit_load(job(number, names, rows, load=True))
            elif what < 0.95:  # refused, and its keys are forgotten
                tier.submit_load(job(number, names, [99] * len(names), load=True))
            elif what < 0.96:
                tier.block_store.clear()
                known.clear()
            if chance.random() < 0.5:
                finish(tier)
            list(tier.get_finished_jobs())
            for event in tier.take_events():
                if event.removed:
                    assert known.issuperset(event.keys), "removed, but not announced"
                    known.difference_update(event.keys)
                    removals += 1
                else:
                    assert known.isdisjoint(event.keys), "announced twice"
                    known.update(event.keys)
            assert known == {each for each in map(key, range(40)) if tier.block_store.has(each)}
        assert removals > 50, "there were some"

    def test_without_the_key_there_are_none(self, primary, spec):
        tier = self.make(primary, spec, blocks=8, enable_kv_events=False)
        store(tier, 1, keys(0), [0])
        assert not list(tier.take_events())

    @pytest.mark.parametrize("config", [SimpleNamespace(enable_kv_cache_events=False), None])
    def test_where_vllm_publishes_none_a_line_says_so(self, primary, spec, caplog, config):
        spec.kv_events_config = config
        tier = self.make(primary, spec, blocks=8)
        store(tier, 1, keys(0), [0])
        assert not list(tier.take_events())
        assert "enable_kv_events of tier 'async' has no effect" in caplog.text
