"""The tier in front of vLLM's fs, obj and p2p tiers: what these have comes back, and then it is in memory.

Every answer is compared with that of a server that never offloads.
"""

from __future__ import annotations

import contextlib
import itertools
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo.server import Server
from tests.serving.servers import (
    DOCUMENT_BLOCKS,
    Prompt,
    blocks_read,
    complete,
    free_port,
    ours,
    running,
    settle,
    texts,
)

# Without it NIXL keeps no telemetry, and vLLM 0.32's obj tier ends the engine when it asks for that.
NIXL = {"NIXL_TELEMETRY_ENABLE": "y"}

# An engine with p2p makes steps also when it is idle. So a worker in a process of its own spins for the next step, and
# beside it NIXL's thread spins too. Linux 6.18 with two cores then gave other processes 1 % of the time: after six
# minutes the second server had run for 7 s, and a peer that says nothing for 10 s is dead for vLLM. With this, the
# worker is in the engine's process, as that of a server with one GPU is, and does not spin.
WORKER_IN_ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Such an engine always has work, so it is killed when the time is over in which it should end what it has begun.
STOPS_SOON = ("--shutdown-timeout", "1")


def assert_first_from_then_from_memory(
    server: Server, model: Path, tier: str, ask: Callable[[Server], list[str]], expected: list[str]
) -> None:
    """A server that has just started is asked twice: the first time the blocks come from `tier`, then from ours."""
    blocks = len(expected) * DOCUMENT_BLOCKS
    assert ask(server) == expected
    metrics = settle(server)
    assert (blocks_read(metrics, model, tier), blocks_read(metrics, model)) == (blocks, 0)
    assert ask(server) == expected
    metrics = settle(server)
    assert (blocks_read(metrics, model, tier), blocks_read(metrics, model)) == (blocks, blocks)


def assert_it_survives_a_restart(
    folder: Path, model: Path, prompts: list[Prompt], expected: list[str], kept_by: dict[str, Any], **options: Any
) -> None:
    tiers, tier = [ours(model), kept_by], f"2:{kept_by['type']}"
    with running(model, folder / "before.log", tiers, **options) as server:
        assert texts(server, prompts) == expected
        assert blocks_read(settle(server), model, tier) == 0
    with running(model, folder / "after.log", tiers, **options) as server:
        assert_first_from_then_from_memory(server, model, tier, lambda server: texts(server, prompts), expected)


def test_after_a_restart_blocks_come_from_disk_once_and_then_from_memory(tmp_path, model, prompts, reference):
    disk = {"type": "fs", "root_dir": str(tmp_path / "blocks")}
    assert_it_survives_a_restart(tmp_path, model, prompts, reference, disk)


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    """An S3 server in this process with an empty bucket; the `store_config` of vLLM's obj tier."""
    from moto.server import ThreadedMotoServer  # `make setup-serving` installs it, and NIXL

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/blocks", method="PUT"), timeout=30).close()
        yield {
            "bucket": "blocks",
            "endpoint_override": f"http://{host}:{port}",
            "access_key": "any",
            "secret_key": "any",
            "region": "us-east-1",
        }
    finally:
        server.stop()


def test_after_a_restart_blocks_come_from_s3_once_and_then_from_memory(tmp_path, model, prompts, reference, s3):
    bucket = {"type": "obj", "store_config": s3}
    assert_it_survives_a_restart(tmp_path, model, prompts, reference, bucket, variables=NIXL)


def test_a_peers_blocks_come_once_and_then_from_memory_also_after_a_restart(tmp_path, model, prompts, reference):
    """The peer's first documents have left its primary: it serves them out of our tier."""
    numbers = itertools.count()

    def beside_each_other(name: str, port: int) -> contextlib.AbstractContextManager[Server]:
        tiers = [ours(model), {"type": "p2p", "host": "127.0.0.1", "port": port, "num_threads": 1}]
        log = tmp_path / f"{name}.log"
        return running(model, log, tiers, *STOPS_SOON, variables=WORKER_IN_ENGINE)

    with free_port() as first_port, free_port() as second_port:

        def ask(server: Server) -> list[str]:
            answers = []
            for prompt in prompts:
                source = {"kv_request_id": str(next(numbers)), "remote_host": "127.0.0.1", "remote_port": first_port}
                answer = complete(server, prompt, kv_transfer_params={"remote_kv_source": source})
                answers.append(answer["choices"][0]["text"])
            return answers

        with beside_each_other("peer", first_port) as peer:
            assert texts(peer, prompts) == reference
            settle(peer)
            for name in ("first", "restarted"):
                with beside_each_other(name, second_port) as server:
                    assert_first_from_then_from_memory(server, model, "2:p2p", ask, reference)
            assert blocks_read(settle(peer), model) > 0
