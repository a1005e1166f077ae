"""The plugin's entry point, and what importing the package does and does not."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

from async_tier import plugin
from async_tier.manager import AsyncSecondaryTierManager

pytestmark = pytest.mark.contract


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(SecondaryTierFactory, "_registry", dict(SecondaryTierFactory._registry))
    SecondaryTierFactory._registry.pop(plugin.TIER_TYPE, None)


def test_vllm_finds_the_plugin():
    (entry,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "async_tier"]
    assert entry.load() is plugin.register


def test_the_short_name_is_registered_once_however_often_it_is_called():
    plugin.register()
    plugin.register()
    assert SecondaryTierFactory.get_tier_class({"type": "async"}) is AsyncSecondaryTierManager


def test_a_name_that_belongs_to_another_tier_is_not_taken():
    SecondaryTierFactory.register_tier("async", "types", "SimpleNamespace")
    with pytest.raises(ValueError, match="already registered"):
        plugin.register()


@pytest.mark.parametrize("module", ["async_tier", "async_tier.block_store", "async_tier.plugin"])
def test_importing_starts_nothing_and_needs_neither_vllm_nor_cuda(module):
    script = f"""
import sys, os, {module}
assert not [name for name in sys.modules if name.split('.')[0] in ('vllm', 'torch')], sorted(sys.modules)
assert len(os.listdir('/proc/self/task')) == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={"OPENBLAS_NUM_THREADS": "1"})
