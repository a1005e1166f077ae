"""The tier in front of vLLM's fs, obj and p2p tiers: what these have kept comes back, and then it is in memory."""

from __future__ import annotations

from pathlib import Path

from benchmarks.demo.server import Server
from tests.serving.servers import DOCUMENT_BLOCKS, Prompt, blocks_read, ours, running, settle, texts


def assert_first_from_then_from_memory(
    server: Server, model: Path, prompts: list[Prompt], expected: list[str], tier: str
) -> None:
    """A server that has just started is asked twice: the first time the blocks come from `tier`, then from ours."""
    blocks = len(prompts) * DOCUMENT_BLOCKS
    assert texts(server, prompts) == expected
    settle(server)
    assert (blocks_read(server, tier, model), blocks_read(server, "1:async", model)) == (blocks, 0)
    assert texts(server, prompts) == expected
    settle(server)
    assert (blocks_read(server, tier, model), blocks_read(server, "1:async", model)) == (blocks, blocks)


def test_after_a_restart_blocks_come_from_disk_once_and_then_from_memory(tmp_path, model, prompts, reference):
    tiers = [ours(model), {"type": "fs", "root_dir": str(tmp_path / "blocks")}]
    with running(model, tmp_path / "before.log", tiers) as server:
        assert texts(server, prompts) == reference
        settle(server)
        assert blocks_read(server, "2:fs", model) == 0
    with running(model, tmp_path / "after.log", tiers) as server:
        assert_first_from_then_from_memory(server, model, prompts, reference, "2:fs")
