"""What a request may ask for, each on a server with the tier and on the same server without any offloading."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo.server import Server
from tests.serving import servers
from tests.serving.servers import (
    BLOCK_TOKENS,
    DOCUMENT_BLOCKS,
    Prompt,
    blocks_read,
    complete,
    of_ours,
    ours,
    request_body,
    running,
    settle,
    texts,
    wait_until,
)

# Requests may then have priorities; without one they are served as usual.
ARGUMENTS = ("--scheduling-policy", "priority")
CLIENTS = 60


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(model, tmp_path_factory.mktemp("plain") / "server.log", None, *ARGUMENTS) as server:
        yield server


@pytest.fixture(scope="module")
def tiered(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(model, tmp_path_factory.mktemp("tiered") / "server.log", [ours(model)], *ARGUMENTS) as server:
        yield server


@pytest.fixture(scope="module")
def expected(plain: Server, prompts: list[Prompt]) -> list[str]:
    """What the server without the tier answers to the prompts."""
    return texts(plain, prompts)


@pytest.fixture
def kept(tiered: Server, prompts: list[Prompt], expected: list[str]) -> list[str]:
    """The same, when the tier has the blocks of all prompts."""
    assert texts(tiered, prompts) == expected
    settle(tiered)
    return expected


class Loads:
    """How many blocks have come from the tier since the last look."""

    def __init__(self, server: Server, model: Path) -> None:
        self._server, self._model = server, model
        self._last = blocks_read(settle(server), model)

    def more(self) -> float:
        before, self._last = self._last, blocks_read(settle(self._server), self._model)
        return self._last - before


def all_of(prompts: list[Prompt]) -> int:
    return len(prompts) * DOCUMENT_BLOCKS


def test_requests_of_another_cache_salt_find_nothing(model, prompts, plain, tiered, kept):
    loads = Loads(tiered, model)
    assert texts(tiered, prompts, cache_salt="one") == texts(plain, prompts, cache_salt="one")
    assert loads.more() == 0
    assert texts(tiered, prompts, cache_salt="one") == kept
    assert loads.more() == all_of(prompts)
    assert texts(tiered, prompts, cache_salt="another") == kept
    assert loads.more() == 0


def test_four_choices_of_one_prompt(model, prompts, plain, tiered, kept):
    def choices(server: Server) -> list[list[str]]:
        answers = [complete(server, prompt, n=4, temperature=1.0, seed=7) for prompt in prompts]
        return [[choice["text"] for choice in answer["choices"]] for answer in answers]

    loads = Loads(tiered, model)
    found = choices(tiered)
    # vLLM makes four requests of it, and each block is loaded for the first one alone.
    assert loads.more() == all_of(prompts)
    assert found == choices(plain)
    assert all(len(set(each)) > 1 for each in found), "the choices are not alike"


def test_prompt_logprobs_are_those_of_computed_prompts(model, prompts, plain, tiered, kept):
    def logprobs(server: Server) -> list[list[float]]:
        answers = [complete(server, prompt, prompt_logprobs=0)["choices"][0]["prompt_logprobs"] for prompt in prompts]
        return [[next(iter(each.values()))["logprob"] for each in answer[1:]] for answer in answers]

    loads = Loads(tiered, model)
    found, computed = logprobs(tiered), logprobs(plain)
    assert [len(each) for each in found] == [len(prompt) - 1 for prompt in prompts]
    for each, other in zip(found, computed, strict=True):
        assert each == pytest.approx(other, abs=1e-3)
    # vLLM reads such a prompt from no cache: it needs the logits of all its tokens.
    assert loads.more() == 0
    assert texts(tiered, prompts) == kept
    assert loads.more() == all_of(prompts)


def test_requests_of_different_priorities_that_preempt_each_other(model, prompts, plain, tiered, kept):
    # They fit together when they start, and then not any more: the least urgent ones are preempted.
    short = [prompt[: 3 * BLOCK_TOKENS + 1] for prompt in prompts]

    def answers(server: Server) -> list[str]:
        def ask(number: int) -> str:
            answer = complete(server, short[number], priority=-number, max_tokens=4 * BLOCK_TOKENS)
            return answer["choices"][0]["text"]

        with ThreadPoolExecutor(len(short)) as clients:
            return list(clients.map(ask, range(len(short))))

    loads = Loads(tiered, model)
    assert answers(tiered) == answers(plain)
    assert loads.more() > 0
    assert tiered.metrics()["vllm:num_preemptions_total", ""] > 0


def test_sixty_clients_that_go_in_the_middle_of_their_answers(model, prompts, tiered, kept):
    address = urllib.parse.urlsplit(tiered.url).netloc

    def ask_and_go(number: int) -> bytes:
        body = request_body(prompts[number % len(prompts)], stream=True, max_tokens=50)
        connection = http.client.HTTPConnection(address, timeout=servers.PATIENCE_S)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            return connection.getresponse().readline()
        finally:
            connection.close()

    def under_way() -> float:
        metrics = tiered.metrics()
        return metrics["vllm:num_requests_running", ""] + metrics["vllm:num_requests_waiting", ""]

    loads = Loads(tiered, model)
    with ThreadPoolExecutor(8) as clients:
        assert all(line.startswith(b"data: {") for line in clients.map(ask_and_go, range(CLIENTS)))
    wait_until(lambda: not under_way(), "vLLM has not ended the requests of clients that are gone")
    assert loads.more() > 0
    assert texts(tiered, prompts) == kept
    settle(tiered)


def kv_params(**params: Any) -> dict[str, Any]:
    return {"kv_transfer_params": params}


@pytest.mark.parametrize(
    ("tiers", "is_asked"),
    [
        ([], False),
        ([{"medium": "STORAGE"}], False),
        ([{"locality": "REMOTE"}], True),  # ours has no locality here, so it is of any
        ([{"medium": "CPU"}], True),
        ([{"medium": "STORAGE"}, {"medium": "CPU"}], True),
    ],
    ids=str,
)
def test_a_request_names_the_tiers_it_is_loaded_from(model, prompts, tiered, kept, tiers, is_asked):
    loads = Loads(tiered, model)
    assert texts(tiered, prompts, **kv_params(kv_load_tiers=tiers)) == kept
    assert loads.more() == (all_of(prompts) if is_asked else 0)


def test_a_request_loads_no_more_than_max_load_tokens(model, prompts, tiered, kept):
    loads = Loads(tiered, model)
    assert texts(tiered, prompts, **kv_params(max_load_tokens=3 * BLOCK_TOKENS - 1)) == kept
    assert loads.more() == 2 * len(prompts)


def test_a_request_stores_no_more_than_max_offload_tokens(model, prompts, plain, tiered, kept):
    new = servers.prompts(model, len(prompts), first=len(prompts))
    before = of_ours(settle(tiered), "copied_blocks_total")
    answers = texts(plain, new)
    loads = Loads(tiered, model)
    limit = kv_params(max_offload_tokens=3 * BLOCK_TOKENS - 1)
    assert texts(tiered, new, **limit) == answers
    assert of_ours(settle(tiered), "copied_blocks_total") - before == 2 * len(new)
    # These few blocks all fit in the primary: others push them out of it.
    assert texts(tiered, prompts) == kept
    loads.more()
    assert texts(tiered, new, **limit) == answers
    assert loads.more() == 2 * len(new)
