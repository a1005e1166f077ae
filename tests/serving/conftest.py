"""Everything in this folder is marked `serving`: `make test-serving` runs it, and nothing else does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.demo import demo
from benchmarks.demo.model import smollm2
from tests.serving import servers

# The fewest that leave the caches between two rounds.
DOCUMENTS = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.serving)


@pytest.fixture(scope="session")
def model() -> Path:
    return smollm2(demo.BUILD / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def prompts(model: Path) -> list[servers.Prompt]:
    return servers.prompts(model, DOCUMENTS)


@pytest.fixture(scope="session")
def reference(model: Path, prompts: list[servers.Prompt], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a server without any offloading answers to the prompts."""
    with servers.running(model, tmp_path_factory.mktemp("reference") / "server.log", None) as server:
        return servers.texts(server, prompts)


@pytest.fixture(scope="module", autouse=True)
def _leaves_nothing_in_shared_memory():
    """Of a module, because some servers serve all of its tests."""
    yield
    mine = f"vllm_offload_async-tier-{os.getpid()}-"
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(mine)]
