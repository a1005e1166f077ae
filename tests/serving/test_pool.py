"""A pool in a folder: servers that are killed and started again, and servers beside each other, have its blocks.

Every answer is compared with that of a server that never offloads.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo.demo import restored_blocks
from benchmarks.demo.server import Server, living, pool_folder, shared_memory
from tests.serving.servers import (
    CAN_BE_RESET,
    DOCUMENT_BLOCKS,
    Prompt,
    block_bytes,
    blocks_read,
    blocks_stored,
    complete,
    ours,
    reset,
    running,
    settle,
    texts,
)

# All documents fit.
TIER_BLOCKS = 6 * DOCUMENT_BLOCKS
_numbers = itertools.count()


def in_pool(model: Path, folder: Path, namespace: str = "tests") -> dict[str, Any]:
    return ours(model, bytes_to_use=TIER_BLOCKS * block_bytes(model), pool=str(folder), namespace=namespace)


def of_rank(server: Server, rank: int, prompts: list[Prompt]) -> list[str]:
    """What one of the data-parallel replicas answers."""
    answers = [complete(server, prompt, {"X-data-parallel-rank": str(rank)}) for prompt in prompts]
    return [answer["choices"][0]["text"] for answer in answers]


@pytest.fixture(scope="module")
def parent() -> Iterator[Path]:
    with pool_folder() as folder:
        folder.mkdir(0o700)
        yield folder


@pytest.fixture(scope="module")
def left(parent, model, prompts, reference, tmp_path_factory) -> Path:
    """What a server left behind that was asked about all documents, and then killed."""
    folder = parent / "left"
    with running(model, tmp_path_factory.mktemp("killed") / "server.log", [in_pool(model, folder)]) as server:
        assert texts(server, prompts) == reference
        metrics = settle(server)
        assert (blocks_stored(metrics, model), blocks_read(metrics, model)) == (len(prompts) * DOCUMENT_BLOCKS, 0)
        server.kill()
    return folder


@pytest.fixture
def pool(parent: Path, left: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(left, parent / f"copy-{next(_numbers)}")


def test_a_killed_server_begins_with_its_blocks_and_others_read_them_until_and_after_it_is_killed_again(
    tmp_path, model, prompts, reference, pool
):
    blocks = len(prompts) * DOCUMENT_BLOCKS
    tiers = [in_pool(model, pool)]
    with running(model, tmp_path / "restarted.log", tiers) as first:
        assert texts(first, prompts) == reference
        metrics = settle(first)
        assert (restored_blocks(metrics), blocks_read(metrics, model)) == (blocks, blocks)
        with running(model, tmp_path / "second.log", tiers) as second:
            for times in (1, 2):
                assert texts(second, prompts) == reference
                metrics = settle(second)
                assert (blocks_read(metrics, model), blocks_stored(metrics, model)) == (times * blocks, 0)
                assert restored_blocks(metrics) == 0
                if times == 1:
                    first.kill()
    assert len([*pool.iterdir()]) == 2


def test_another_namespace_finds_nothing(tmp_path, model, prompts, reference, pool):
    with running(model, tmp_path / "server.log", [in_pool(model, pool, "another")]) as server:
        assert texts(server, prompts) == reference
        metrics = settle(server)
        assert (blocks_read(metrics, model), blocks_stored(metrics, model)) == (0, len(prompts) * DOCUMENT_BLOCKS)
        assert restored_blocks(metrics) == 0


def test_r10_what_was_stored_before_a_reset_is_not_served_and_not_after_a_restart_either(
    tmp_path, model, prompts, reference, pool
):
    blocks = len(prompts) * DOCUMENT_BLOCKS
    tiers = [in_pool(model, pool)]
    with running(model, tmp_path / "reset.log", tiers, variables=CAN_BE_RESET) as server:
        assert texts(server, prompts) == reference
        assert blocks_read(settle(server), model) == blocks
        reset(server)
        assert texts(server, prompts) == reference
        metrics = settle(server)
        assert (blocks_read(metrics, model), blocks_stored(metrics, model)) == (blocks, blocks)
        # What it has stored since is its own.
        assert texts(server, prompts) == reference
        assert blocks_read(settle(server), model) == 2 * blocks
        server.kill()
    with running(model, tmp_path / "restarted.log", tiers) as server:
        assert texts(server, prompts) == reference
        metrics = settle(server)
        assert (restored_blocks(metrics), blocks_read(metrics, model)) == (0, 0)


def test_two_replicas_keep_each_block_once_also_after_a_kill(tmp_path, model, prompts, reference, parent):
    blocks = len(prompts) * DOCUMENT_BLOCKS
    folder = parent / "replicas"
    tiers, arguments = [in_pool(model, folder)], ("--data-parallel-size", "2")
    with running(model, tmp_path / "before.log", tiers, *arguments) as server:
        assert of_rank(server, 0, prompts) == reference
        settle(server)
        assert of_rank(server, 1, prompts) == reference
        metrics = settle(server)
        assert (blocks_read(metrics, model), blocks_stored(metrics, model)) == (blocks, blocks)
        server.kill()
    with running(model, tmp_path / "after.log", tiers, *arguments) as server:
        assert [of_rank(server, rank, prompts) for rank in (0, 1)] == [reference] * 2
        metrics = settle(server)
        assert (blocks_read(metrics, model), blocks_stored(metrics, model)) == (2 * blocks, 0)
        shared = shared_memory(living(server.process.pid))
    assert not [file for file in shared if file.exists()]
    assert sorted(file.suffix for file in folder.iterdir()) == [".pool"] * 2
