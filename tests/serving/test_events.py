"""A router's view of the tier: an index made of the KV events of a real server, by a real ZMQ subscriber."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from benchmarks.demo.server import Server
from tests.serving import servers
from tests.serving.servers import (
    BLOCK_TOKENS,
    CAN_BE_RESET,
    DOCUMENT_BLOCKS,
    Prompt,
    block_bytes,
    blocks_read,
    of_ours,
    ours,
    reset,
    running,
    settle,
    texts,
    wait_until,
)

OURS = "1:async"
# Less than half of the documents.
TIER_BLOCKS = 2 * DOCUMENT_BLOCKS + 3


class Router:
    """What a router knows: which blocks each owner holds, and which tokens a block has and which block is before it."""

    def __init__(self) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        # The server connects to it: no port has to be known before, and no event is lost while the two find each other.
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._next: int | None = None
        self.held: dict[str | None, set[object]] = {}
        self.stored = self.removed = self.cleared = 0
        self._by_place: dict[tuple[object, tuple[int, ...]], object] = {}

    def close(self) -> None:
        self._socket.close(linger=0)

    def read(self) -> None:
        """Take in the events that have come."""
        while self._socket.poll(0):
            _, number, payload = self._socket.recv_multipart()
            found = int.from_bytes(number, "big")
            assert self._next in (None, found), "events were lost"
            self._next = found + 1
            for event in self._decoder.decode(payload).events:
                self._take(event)

    def _take(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        if isinstance(event, AllBlocksCleared):
            self.held.clear()
            self.cleared += 1
            return
        # Blocks of the KV cache itself ("GPU") are another matter.
        if event.medium != "CPU":
            return
        blocks = self.held.setdefault(event.ownership, set())
        if isinstance(event, BlockRemoved):
            self.removed += event.ownership == OURS
            # Before the first reset, the store may have been before the subscription.
            is_known = event.ownership != OURS or not self.cleared or blocks.issuperset(event.block_hashes)
            assert is_known, "removed, but never stored"
            blocks.difference_update(event.block_hashes)
            return
        self.stored += event.ownership == OURS
        before = event.parent_block_hash
        for number, block in enumerate(event.block_hashes):
            tokens = tuple(event.token_ids[number * event.block_size : (number + 1) * event.block_size])
            assert len(tokens) == BLOCK_TOKENS, "the event does not describe itself"
            self._by_place[before, tokens] = block
            blocks.add(block)
            before = block

    @property
    def has_heard(self) -> bool:
        return self._next is not None

    @property
    def ours(self) -> set[object]:
        return self.held.get(OURS, set())

    def expected_loads(self, prompt: Prompt) -> tuple[int, int]:
        """How many blocks of the prompt's start vLLM can have from the tiers, and how many of them from ours alone."""
        primary = set().union(*(blocks for owner, blocks in self.held.items() if owner != OURS))
        before, found, from_ours = None, 0, 0
        for start in range(0, DOCUMENT_BLOCKS * BLOCK_TOKENS, BLOCK_TOKENS):
            before = self._by_place.get((before, tuple(prompt[start : start + BLOCK_TOKENS])))
            if before is None or not (before in primary or before in self.ours):
                break
            found += 1
            from_ours += before not in primary
        return found, from_ours


@pytest.fixture
def router() -> Iterator[Router]:
    router = Router()
    yield router
    router.close()


@pytest.fixture
def server(tmp_path: Path, model: Path, router: Router) -> Iterator[Server]:
    """Without a KV cache of prefixes, and with a primary of one document: the rest can only come from the tier."""
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{router.port}"}
    tier = ours(model, bytes_to_use=TIER_BLOCKS * block_bytes(model), enable_kv_events=True)
    with running(
        model,
        tmp_path / "server.log",
        [tier],
        *("--kv-events-config", json.dumps(events), "--no-enable-prefix-caching"),
        primary_blocks=DOCUMENT_BLOCKS,
        spec={"self_describing_kv_events": True},
        variables=CAN_BE_RESET,
    ) as server:
        yield server


def assert_it_knows_what_is_held(server: Server, router: Router) -> None:
    def is_as_published() -> bool:
        router.read()
        return len(router.ours) == of_ours(server.metrics(), "blocks")

    settle(server)
    wait_until(is_as_published, "the router's index does not become as large as what the tier holds")


def test_a_router_knows_what_can_be_loaded(server, router, model, prompts, reference):
    new = servers.prompts(model, 1, first=20)
    # What is published before the subscription has arrived is lost: the router begins with what a reset leaves.
    router.read()

    def hears_of_it() -> bool:
        texts(server, new)
        router.read()
        return router.has_heard

    wait_until(hears_of_it, "no event has come")
    settle(server)
    reset(server)

    # Stores and evictions.
    assert texts(server, prompts) == reference
    assert_it_knows_what_is_held(server, router)
    assert 0 < len(router.ours) <= TIER_BLOCKS
    assert router.removed > 0

    # What it expects of each document is what vLLM then loads, also where it expects nothing.
    expected = []
    for number in (3, 2, 0, 1, 0, 3, 3, 2):
        before = server.metrics()
        expected.append(router.expected_loads(prompts[number]))
        assert texts(server, [prompts[number]]) == [reference[number]]
        loaded = blocks_read(settle(server), model) - blocks_read(before, model)
        assert loaded == expected[-1][1], f"of document {number}, after {expected}"
        assert_it_knows_what_is_held(server, router)
    assert (DOCUMENT_BLOCKS, DOCUMENT_BLOCKS) in expected, "all of a document from the tier"
    assert (0, 0) in expected, "nothing of a document"

    # A reset: everything is gone, and the router hears of that as of one event.
    removed, cleared = router.removed, router.cleared
    reset(server)
    before = server.metrics()
    texts(server, new)  # the events follow with the next step
    assert_it_knows_what_is_held(server, router)
    assert (router.removed, router.cleared) == (removed, cleared + 1)
    assert len(router.ours) == DOCUMENT_BLOCKS
    assert [router.expected_loads(prompt)[0] for prompt in prompts] == [0] * len(prompts)
    assert texts(server, prompts) == reference
    assert blocks_read(settle(server), model) == blocks_read(before, model)
    assert_it_knows_what_is_held(server, router)
