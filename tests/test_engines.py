"""Which engine the configuration means, where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from async_tier.arena import Rows
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from tests.helpers import primary_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_engine.py has what is there with a GPU")


@pytest.mark.parametrize("options", [{}, {"engine": "auto"}, {"engine": "host"}])
def test_copy_threads_copy(options):
    store = BlockStore(Rows.of_view(memoryview(primary_rows(2))), TierConfig.parse(options))
    assert store.statistics().engine == "host"
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
