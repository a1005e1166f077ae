"""Which engine the configuration means, where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from async_tier.arena import Rows
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.streams import host
from tests.rows import primary_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_engine.py has what is there with a GPU")


@pytest.mark.parametrize("options", [{}, {"engine": "auto"}, {"engine": "host"}])
def test_copy_threads_copy(options):
    store = BlockStore(Rows.of_view(memoryview(primary_rows(2))), TierConfig.parse(options))
    assert store.statistics().engine == "host"
    store.close()


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (2, 1), (3, 2), (64, 2)])
def test_a_core_is_left_to_the_scheduler(monkeypatch, cpus, threads):
    monkeypatch.setattr(host, "_allowed_cpus", lambda: set(range(cpus)))
    assert host.default_threads() == threads


@pytest.mark.parametrize("options", [{}, {"copy_threads": 3}])
def test_the_engine_has_as_many_copy_threads_as_the_configuration_says(options):
    store = BlockStore(Rows.of_view(memoryview(primary_rows(2))), TierConfig.parse({"engine": "host", **options}))
    assert len(store._engine.thread_ids) == options.get("copy_threads", host.default_threads())
    store.close()


def test_the_tiers_memory_is_populated_by_the_copy_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(host.HostEngine, "populate", lambda engine, rows: asked.append((engine, rows)))
    store = BlockStore(Rows.of_view(memoryview(primary_rows(2))), TierConfig.parse({"engine": "host"}))
    assert asked == [(store._engine, store._arena.rows)]
    store.close()


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"engine": "cuda"}, "engine 'cuda'"),
        ({"pool": "cuda:0"}, "pool 'cuda:0'"),
        ({"engine": "cuda", "pool": "cuda:1"}, "pool 'cuda:1'"),
    ],
)
def test_cuda_without_a_gpu_is_refused_in_words(options, asked):
    words = f"^{asked} needs a GPU that torch can use, and this process has none; use engine 'host'$"
    with pytest.raises(ValueError, match=words):
        BlockStore(Rows.of_view(memoryview(primary_rows(2))), TierConfig.parse(options))
