"""A random workload on vLLM's real manager, with an oracle of the bytes of every hit.

Requests share prefixes, hits are promoted and read as a worker would, blocks are evicted in both tiers all the time,
and now and then the weights change: then a block's right bytes change with them, and a stale one is a wrong answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from async_tier.testing import load_gate, store_gate
from tests.helpers import World, end_step, key, request, until

pytestmark = pytest.mark.contract

ROW_BYTES = 192


def content(name: bytes, weights: int) -> np.ndarray:
    """The bytes that a block has under these weights."""
    digest = hashlib.sha256(name + weights.to_bytes(4, "big")).digest()
    return np.frombuffer(digest * (ROW_BYTES // len(digest)), dtype=np.uint8)


class Workload:
    """Conversations that grow turn by turn, of which some begin alike."""

    def __init__(self, seed: int, **sizes: int) -> None:
        self.draw = random.Random(seed)
        self.world = World(row_bytes=ROW_BYTES, **sizes)
        self.weights = 0
        self.turns = 0
        self.hits = 0
        # Each a list of block numbers; they branch off each other.
        self.conversations = [[number * 1000] for number in range(6)]

    def grow(self) -> list[bytes]:
        """The next turn of some conversation: its blocks in prefix order."""
        blocks = self.draw.choice(self.conversations)
        if self.draw.random() < 0.2:
            blocks = blocks[: self.draw.randint(1, len(blocks))]
            self.conversations[self.draw.randrange(len(self.conversations))] = blocks = list(blocks)
        for _ in range(self.draw.randint(0, 3)):
            blocks.append(self.draw.randrange(10**9))
        if len(blocks) > 12:
            del blocks[1:]
        return [key(number) for number in blocks]

    def turn(self) -> None:
        """One request: load the longest prefix there is, check its bytes, offload the rest in chunks."""
        names = self.grow()
        context = request(f"request {self.turns}", names)
        self.turns += 1
        self.world.start(context, names)
        found = 0
        for name in names:
            fetched = self.world.fetch(context, name)
            if fetched is None:
                break
            assert np.array_equal(fetched, content(name, self.weights)), "a hit with wrong bytes"
            found += 1
        self.hits += found
        rest = names[found:]
        while rest:
            chunk = self.draw.randint(1, 4)
            self.world.offload(context, rest[:chunk], lambda name: content(name, self.weights))
            rest = rest[chunk:]
            if self.draw.random() < 0.5:
                self.world.step()
        self.world.manager.on_request_finished(context)
        # Mostly the transfers end before the next request, so that what is covered does not hang on how fast the
        # machine copies; else they go on under it.
        if self.draw.random() < 0.7:
            self.settle()

    def settle(self) -> None:
        """Let the transfers end, and vLLM hear of it."""
        self.world.tier.block_store.drain()
        self.world.step()

    def reset(self) -> None:
        """New weights."""
        self.world.manager.reset_cache()
        self.weights += 1
        end_step(self.world.manager)
        if hasattr(self.world.manager, "on_reset_flushed"):
            self.world.manager.on_reset_flushed()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tier_blocks", [6, 24, 200])
def test_every_hit_has_the_right_bytes(seed, tier_blocks):
    workload = Workload(seed, primary_blocks=8, tier_blocks=tier_blocks, copy_threads=1 + seed % 3)
    for turn in range(120):
        workload.turn()
        if turn % 40 == 39:
            workload.reset()
    tier = workload.world.tier
    for _ in range(3):
        workload.settle()
    figures = tier.statistics()
    assert workload.hits > 0
    assert figures.blocks_loaded > 0 or tier_blocks == 6  # so few may all be evicted before they are asked for
    assert figures.evictions > 0 or tier_blocks == 200
    assert figures.faults == figures.failed_jobs == figures.jobs_in_flight == 0
    assert figures.rows_used == figures.blocks, "a row was lost"
    assert not tier.has_pending_work()
    workload.world.close()


def test_the_oracle_sees_a_stale_block():
    # The control: a tier that keeps its blocks over a change of weights must be caught.
    workload = Workload(0, primary_blocks=8, tier_blocks=200)
    workload.world.tier.config = workload.world.tier.config.__class__(keep_on_reset=True)

    def turns() -> None:
        for turn in range(120):
            workload.turn()
            if turn % 20 == 19:
                workload.reset()

    with pytest.raises(AssertionError, match="wrong bytes"):
        turns()
    workload.world.close()


# ---------------------------------------------------------------------------------------------- steps planned ahead


@dataclass
class Step:
    """What the worker is told to do: rows to write and to read, and what they are to hold."""

    resets: int
    writes: list[tuple[int, np.ndarray]] = field(default_factory=list)
    reads: list[tuple[int, np.ndarray, str]] = field(default_factory=list)
    stored: list[tuple[Any, set[bytes]]] = field(default_factory=list)
    loaded: list[tuple[Any, list[bytes]]] = field(default_factory=list)


@dataclass
class Client:
    """A request: its blocks, and how many of them it has, from the tiers or computed."""

    context: Any
    names: list[bytes]
    done: int = 0
    is_loading: bool = False
    runs: bool = False


class Peer(SecondaryTierManager):
    """As vLLM's p2p tier: on the poll thread of 0.33 it asks the others for blocks on behalf of another server."""

    tolerates_off_thread_polling = True

    def __init__(self, view: memoryview) -> None:
        super().__init__(
            offloading_spec=MagicMock(), primary_kv_view=view, tier_type="peer", backpressure_detector=None
        )
        self.wanted: deque[list[bytes]] = deque(maxlen=8)
        self.served = 0
        self.failure: BaseException | None = None
        self._ended: list[Any] = []

    def serve_external_requests(self, parent: Any) -> None:
        try:
            if self.wanted:
                names = self.wanted.popleft()
                self.served += 1
                context = request(f"peer's {self.served}", names)
                parent.on_new_request(context)
                for name in names:
                    if parent.lookup(name, context) is LookupResult.MISS:
                        break
                parent.on_request_finished(context)
        except BaseException as error:
            self.failure = error

    def lookup(self, name: bytes, context: Any) -> LookupResult:
        return LookupResult.MISS

    def submit_store(self, job: Any) -> None:
        self._ended.append(JobResult(job.job_id, True))

    def submit_load(self, job: Any) -> None:
        raise AssertionError("it has nothing")

    def get_finished_jobs(self) -> list[Any]:
        ended, self._ended = self._ended, []
        return ended

    def on_new_request(self, context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def drain_jobs(self) -> None:
        pass


class Pipeline:
    """vLLM's scheduler and worker around the real manager, step by step, in any order that they may take.

    Up to `ahead` steps are planned before the worker has run the first of them, and results come after that. A reset
    may come between any two of these; what the worker was told before it, it still does.
    """

    def __init__(self, seed: int, ahead: int, keep: bool, peer: Callable[[memoryview], Any] | None = None) -> None:
        self.draw = random.Random(seed)
        self.world = World(
            primary_blocks=self.draw.choice([6, 10, 16]),
            tier_blocks=self.draw.choice([8, 24, 60]),
            row_bytes=ROW_BYTES,
            peer=peer,
            keep_on_reset=keep,
        )
        self.manager, self.tier = self.world.manager, self.world.tier
        self.lock = getattr(self.manager, "lock", None) or contextlib.nullcontext()
        self.ahead, self.keep = ahead, keep
        self.weights = self.resets = 0
        self.planned: deque[Step] = deque()
        self.ran: deque[Step] = deque()
        self.clients: list[Client] = []
        self.names = [[key(1000 * family + at) for at in range(14)] for family in range(5)]
        self.started = 0
        self.seen: Counter[str] = Counter()

    def content(self, name: bytes) -> np.ndarray:
        return content(name, self.weights)

    def run(self, turns: int) -> None:
        actions: list[Callable[[], None]] = [self.begin, self.plan, self.plan, self.work, self.work, self.results]
        actions += [self.results, self.copies, self.copies, self.abort]
        for _ in range(turns):
            with self.lock:
                (self.reset if self.draw.random() < 0.01 else self.draw.choice(actions))()

    def begin(self) -> None:
        if len(self.clients) < 5:
            family = self.draw.choice(self.names)
            self.started += 1
            names = family[: self.draw.randint(1, len(family))]
            if self.draw.random() < 0.3:
                names += [key(10**6 + 100 * self.started + at) for at in range(self.draw.randint(1, 3))]
            client = Client(request(f"r{self.started}", names), names)
            self.world.start(client.context, names)
            self.clients.append(client)
            if peers := self.manager.secondary_tiers[1:]:
                peers[0].wanted.append(list(self.draw.choice(self.names)))

    def abort(self) -> None:
        if self.clients and self.draw.random() < 0.3:
            self.finish(self.clients[self.draw.randrange(len(self.clients))])
            self.seen["aborts"] += 1

    def finish(self, client: Client) -> None:
        if not client.is_loading:  # vLLM keeps what is being loaded until that has ended
            self.clients.remove(client)
            self.manager.on_request_finished(client.context)

    def plan(self) -> None:
        if len(self.planned) + len(self.ran) > self.ahead:
            return
        step = Step(self.resets)
        new = []
        for client in list(self.clients):
            if client.is_loading:
                continue
            if not client.runs:
                if not self.look_up(client, step):
                    continue
                if client.is_loading:
                    continue
                client.runs = True
                new.append(client.context.req_id)
            self.compute(client, step)
        end_step(self.manager, new)
        self.planned.append(step)

    def look_up(self, client: Client, step: Step) -> bool:
        """Whether the request needs not be asked about again. What was found is loaded, to go on after."""
        rest = client.names[client.done :]
        answers = []
        for name in rest:
            answer = self.manager.lookup(name, client.context)
            if answer is LookupResult.MISS:
                break
            answers.append(answer)
        if any(answer is not LookupResult.HIT for answer in answers):
            return False
        if found := rest[: len(answers)]:
            rows = self.manager.prepare_load(found, client.context).block_ids
            step.reads += [
                (int(row), self.content(name), client.context.req_id) for row, name in zip(rows, found, strict=True)
            ]
            step.loaded.append((client, found))
            client.is_loading = True
            client.done += len(found)
            self.seen["blocks loaded"] += len(found)
        return True

    def compute(self, client: Client, step: Step) -> None:
        chunk = client.names[client.done : client.done + self.draw.randint(1, 4)]
        if not chunk:
            self.finish(client)
            return
        client.done += len(chunk)
        prepared = self.manager.prepare_store(chunk, client.context)
        if prepared is not None and prepared.keys_to_store:
            for name, row in zip(prepared.keys_to_store, prepared.store_spec.block_ids, strict=True):
                step.writes.append((int(row), self.content(name)))
            step.stored.append((client, set(prepared.keys_to_store)))

    def work(self) -> None:
        """The worker runs the oldest step that it was given."""
        if self.planned:
            step = self.planned.popleft()
            for row, expected, who in step.reads:
                assert np.array_equal(self.world.primary[row], expected), f"{who} would read wrong bytes in row {row}"
            for row, written in step.writes:
                self.world.primary[row] = written
            self.ran.append(step)

    def results(self) -> None:
        if not self.ran:
            return
        step = self.ran.popleft()
        for client, names in step.loaded:
            client.is_loading = False
            if step.resets == self.resets:
                self.manager.complete_load(names, client.context)
        for client, names in step.stored:
            if step.resets == self.resets:  # else vLLM drops the report
                self.manager.complete_store(names, client.context)
        if step.resets == self.resets and self.resets and hasattr(self.manager, "on_reset_flushed"):
            self.manager.on_reset_flushed()
        self.manager.get_stats()
        list(self.manager.take_events())

    def copies(self) -> None:
        """The tier's copies are held, let go, or all made."""
        choice = self.draw.random()
        gates = [load_gate(self.tier), store_gate(self.tier)]
        if choice < 0.3:
            self.draw.choice(gates).hold()
        elif choice < 0.6:
            self.draw.choice(gates).release()
        else:
            self.end_copies()

    def end_copies(self) -> None:
        for gate in (load_gate(self.tier), store_gate(self.tier)):
            gate.release()
        self.tier.block_store.drain()

    def reset(self) -> None:
        for gate in (load_gate(self.tier), store_gate(self.tier)):
            gate.release()
        self.manager.reset_cache()
        self.resets += 1
        self.seen["resets"] += 1
        if not self.keep:
            self.weights += 1

    def end(self) -> None:
        """All requests end, and nothing is left."""
        for gate in (load_gate(self.tier), store_gate(self.tier)):
            gate.release()
        for _ in range(3000):
            with self.lock:
                if self.clients or self.manager.has_pending_work():
                    self.plan()
                elif not (self.planned or self.ran):
                    break
                self.work()
                self.results()
                self.tier.block_store.drain()
        else:
            raise AssertionError(f"{len(self.clients)} requests have not ended, or what they left behind")
        figures = self.tier.statistics()
        assert figures.faults == figures.failed_jobs == figures.jobs_in_flight == 0
        assert figures.rows_used == figures.blocks
        self.seen["blocks promoted"] += figures.blocks_loaded
        self.world.close()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_r10_steps_planned_ahead_and_resets_in_any_order(ahead, keep):
    seen: Counter[str] = Counter()
    for seed in range(20):
        pipeline = Pipeline(seed, ahead, keep)
        pipeline.run(800)
        pipeline.end()
        seen += pipeline.seen
    for what in ("blocks loaded", "blocks promoted", "aborts", "resets"):
        assert seen[what] > 50, what


def test_the_pipeline_sees_a_promotion_into_a_row_that_a_worker_still_uses():
    """The control: without a hold, the tier's and from vLLM 0.33 on the manager's, it must be caught."""

    def runs() -> None:
        for seed in range(20):
            pipeline = Pipeline(seed, ahead=2, keep=True)
            tier, reset = pipeline.tier, pipeline.reset

            def reset_without_a_hold(
                tier: Any = tier, manager: Any = pipeline.manager, reset: Callable[[], None] = reset
            ) -> None:
                reset()
                for _ in range(4):  # the results of so many steps that never were
                    tier.get_stats()
                if hasattr(manager, "_promotions_held"):
                    manager._promotions_held = False

            def plan_and_copy(pipeline: Pipeline = pipeline) -> None:
                """What is promoted is written at once, before the worker takes its turn."""
                Pipeline.plan(pipeline)
                Pipeline.end_copies(pipeline)

            pipeline.reset = reset_without_a_hold
            pipeline.plan = plan_and_copy
            pipeline.run(800)

    with pytest.raises(AssertionError, match="would read wrong bytes"):
        runs()


@pytest.mark.skipif(
    not hasattr(SecondaryTierManager, "tolerates_off_thread_polling"),
    reason="vLLM polls tiers in a thread from 0.33 on",
)
@pytest.mark.parametrize("keep", [False, True])
def test_r5_a_peer_asks_on_the_poll_thread_meanwhile(keep):
    served = 0
    for seed in range(6):
        pipeline = Pipeline(seed, 1, keep, peer=Peer)
        peer = pipeline.manager.secondary_tiers[1]
        pipeline.run(800)
        until(lambda peer=peer: not peer.wanted, "the peer's requests are served")
        pipeline.end()
        assert peer.failure is None
        served += peer.served
    assert served > 50
