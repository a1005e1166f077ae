"""vLLM servers with tiers and without, so small that documents evict each other, and what is asked of them.

A document has DOCUMENT_BLOCKS full blocks, also with its answer. Two documents fit in the KV cache and in the primary;
there are more of them, and they are asked about in turn. So each has left both when its turn comes again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.demo import demo
from benchmarks.demo.model import kv_bytes_per_token
from benchmarks.demo.server import Metrics, Server, serve

# The smallest block of vLLM's CPU backend, in tokens.
BLOCK_TOKENS = 32
DOCUMENT_BLOCKS = 8
# More than the full blocks, or vLLM would compute the last one again for its logits.
PROMPT_TOKENS = DOCUMENT_BLOCKS * BLOCK_TOKENS + 8
ANSWER_TOKENS = 16
# Of one request, and two of them and the block that the KV cache keeps for itself.
REQUEST_BLOCKS = DOCUMENT_BLOCKS + 2
CACHE_BLOCKS = 2 * REQUEST_BLOCKS + 1
FLOAT32_BYTES = 4
TIER_BLOCKS = 400
# How long a failing test waits for a server to have done what it was asked to do.
PATIENCE_S = 60.0
# Variables of a server's environment, or it has no /reset_prefix_cache.
CAN_BE_RESET = {"VLLM_SERVER_DEV_MODE": "1"}

Prompt = list[int]
_numbers = itertools.count()


def prompts(model: Path, count: int, first: int = 0) -> list[Prompt]:
    """The tokens of `count` different documents, from the one with the number `first` on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = demo.documents(first + count, PROMPT_TOKENS + 50, tokenizer)[first:]
    return [tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]


def block_bytes(model: Path, element_bytes: int = FLOAT32_BYTES) -> int:
    return kv_bytes_per_token(model, element_bytes) * BLOCK_TOKENS


@contextlib.contextmanager
def running(
    model: Path,
    log: Path,
    tiers: list[dict[str, Any]] | None,
    *more: str,
    primary_blocks: int = CACHE_BLOCKS,
    spec: dict[str, Any] | None = None,
    variables: dict[str, str] | None = None,
) -> Iterator[Server]:
    """A server with these secondary tiers, None for no offloading at all; without tracebacks in its log at the end.

    spec: more keys beside `secondary_tiers`. more: arguments of vLLM's server. variables: more of its environment.
    """
    offloading = None
    if tiers is not None:
        offloading = {
            "spec_name": "CPUBackendTieringSpec",
            "spec_module_path": "async_tier.cpu_backend",
            "cpu_bytes_to_use": primary_blocks * block_bytes(model),
            "secondary_tiers": tiers,
            **(spec or {}),
        }
    arguments = ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_TOKENS)]
    arguments += ["--max-model-len", str(REQUEST_BLOCKS * BLOCK_TOKENS), "--max-num-seqs", "8"]
    arguments += ["--num-gpu-blocks-override", str(CACHE_BLOCKS), "--shutdown-timeout", "30"]
    name = f"async-tier-{os.getpid()}-{next(_numbers)}"
    # Threads that wait for each other in every layer are slow where two servers, or others, share the cores.
    variables = {"OMP_NUM_THREADS": "1", **(variables or {})}
    with serve(
        model, log, name=name, offloading=offloading, arguments=[*arguments, *more], variables=variables
    ) as server:
        yield server
    assert server.tracebacks() == []


def ours(model: Path, **keys: Any) -> dict[str, Any]:
    """The tier's own dictionary."""
    return {"type": "async", "bytes_to_use": TIER_BLOCKS * block_bytes(model), **keys}


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port of this machine that nobody else is given while in the block; who listens on it must allow reuse."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def post(server: Server, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None) -> Any:
    """What the server answers, from JSON. Raises HTTPError with vLLM's words if it refuses."""
    data = json.dumps(body or {}).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(f"{server.url}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
            return json.loads(reply.read() or "null")
    except urllib.error.HTTPError as error:
        error.add_note(error.read().decode())
        raise


def request_body(prompt: Prompt, **options: Any) -> dict[str, Any]:
    body = {"model": "model", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    return {**body, **options}


def complete(server: Server, prompt: Prompt, headers: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """A greedy completion as vLLM answers it. options: more of the request."""
    return post(server, "/v1/completions", request_body(prompt, **options), headers)


def texts(server: Server, asked: Sequence[Prompt], **options: Any) -> list[str]:
    """The answers, one request after the other; of each its first choice."""
    return [complete(server, prompt, **options)["choices"][0]["text"] for prompt in asked]


def reset(server: Server) -> None:
    """Have vLLM forget all blocks, also those of its tiers. The server was started with CAN_BE_RESET."""
    path = "/reset_prefix_cache?reset_external=true"
    wait_until(lambda: post(server, path)["success"], "vLLM does not reset its caches")


def wait_until(holds: Callable[[], Any], what: str | Callable[[], str]) -> None:
    """Ask until it holds, for PATIENCE_S at most. `what`: what did not happen, or tells it when the time is over."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------------- metrics


def blocks_read(metrics: Metrics, model: Path, tier: str = "1:async") -> float:
    """How many blocks vLLM has loaded from the tier with this label."""
    return metrics.get(("vllm:kv_offload_tiering_read_bytes_total", tier), 0.0) / block_bytes(model)


def blocks_stored(metrics: Metrics, model: Path, tier: str = "1:async") -> float:
    """How many blocks vLLM has stored in the tier with this label."""
    return metrics.get(("vllm:kv_offload_tiering_write_bytes_total", tier), 0.0) / block_bytes(model)


def of_ours(metrics: Metrics, name: str) -> float:
    """One of the tier's own metrics; 0 if it has not changed yet. Series of other labels are added up."""
    return metrics.get((f"vllm:async_tier_{name}", "1:async"), 0.0)


def busy_gauges(metrics: Metrics) -> dict[tuple[str, str], float]:
    """The gauges of what is under way that are not back to zero."""
    ours = [
        f"vllm:async_tier_{name}" for name in ("inflight_jobs", "inflight_bytes", "pinned_blocks", "promised_blocks")
    ]
    active = "vllm:kv_offload_tiering_active_"
    return {key: value for key, value in metrics.items() if value and (key[0] in ours or key[0].startswith(active))}


def failures(metrics: Metrics) -> dict[tuple[str, str], float]:
    """The counters of jobs that failed, blocks that were lost and unexpected errors that are not zero."""
    names = [f"vllm:async_tier_{name}_total" for name in ("failed_jobs", "lost_blocks", "faults")]
    names += [f"vllm:kv_offload_tiering_{name}_job_failures_total" for name in ("promotion", "cascade")]
    return {key: value for key, value in metrics.items() if value and key[0] in names}


def settle(server: Server) -> Metrics:
    """The metrics when nothing is under way any more. Fails if that does not come, or if a job has failed."""
    metrics: Metrics = {}

    def is_at_rest() -> bool:
        nonlocal metrics
        metrics = server.metrics()
        return not busy_gauges(metrics)

    wait_until(is_at_rest, lambda: f"gauges that are not back to zero: {busy_gauges(metrics)}")
    assert failures(metrics) == {}
    assert any(name == "vllm:async_tier_blocks" for name, _ in metrics), "the tier has published nothing"
    return metrics
