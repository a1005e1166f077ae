"""The main job, smaller than `make demo`: vLLM's server, over HTTP, through `{"type": "async"}`."""

from __future__ import annotations

import os

import pytest

from benchmarks.demo import demo
from benchmarks.demo.model import smollm2

pytestmark = pytest.mark.end_to_end


def test_vllm_serves_documents_back_from_the_tier(tmp_path):
    model = smollm2(demo.BUILD / "SmolLM2-135M-Instruct")
    report = demo.run(model, count=4, tokens=600, tier="async", output=tmp_path / "demo.json")
    assert demo.failures(report) == []
    # All of the first question's full blocks come back for the second.
    assert report["promoted_blocks"] == 4 * (600 // demo.BLOCK_TOKENS)
    assert report["stored_blocks"] >= report["promoted_blocks"]
    assert report["hit_ratio"] > 0.5
    assert report["hidden_share_two_at_a_time"]["loads"] is not None
    ours = f"vllm_offload_async-tier-{os.getpid()}-"  # others may serve on this machine
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(ours)]
