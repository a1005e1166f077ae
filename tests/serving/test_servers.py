"""Settings of a server, each with the tier and beside the same server without any offloading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from benchmarks.demo.server import Metrics, Server
from tests.serving.servers import (
    CACHE_BLOCKS,
    DOCUMENT_BLOCKS,
    TIER_BLOCKS,
    block_bytes,
    blocks_read,
    complete,
    ours,
    running,
    settle,
    texts,
)


def assert_same_with_the_tier(
    folder: Path,
    model: Path,
    ask: Callable[[Server], Any],
    *arguments: str,
    expected: Any = None,
    element_bytes: int = 4,
    **spec: Any,
) -> Metrics:
    """The metrics of the server with the tier, when nothing is under way any more.

    expected: what the server without the tier answers, None to ask one. spec: keys beside `secondary_tiers`.
    """
    if expected is None:
        with running(model, folder / "plain.log", None, *arguments) as server:
            expected = ask(server)
    size = block_bytes(model, element_bytes)
    tiers = [ours(model, bytes_to_use=TIER_BLOCKS * size)]
    spec = {"cpu_bytes_to_use": CACHE_BLOCKS * size, **spec}
    with running(model, folder / "tier.log", tiers, *arguments, spec=spec) as server:
        assert ask(server) == expected
        return settle(server)


def test_two_api_servers(tmp_path, model, prompts, reference):
    metrics = assert_same_with_the_tier(
        tmp_path, model, lambda server: texts(server, prompts * 2), *("--api-server-count", "2"), expected=reference * 2
    )
    assert blocks_read(metrics, model) == len(prompts) * DOCUMENT_BLOCKS


def test_two_engines_each_with_a_tier(tmp_path, model, prompts, reference):
    def ask(server: Server) -> list[str]:
        answers = []
        for rank in ("0", "1"):
            for prompt in prompts * 2:
                answer = complete(server, prompt, {"X-data-parallel-rank": rank})
                answers.append(answer["choices"][0]["text"])
        return answers

    metrics = assert_same_with_the_tier(tmp_path, model, ask, *("--data-parallel-size", "2"), expected=reference * 4)
    assert blocks_read(metrics, model) == 2 * len(prompts) * DOCUMENT_BLOCKS


def test_chunks_of_four_blocks(tmp_path, model, prompts, reference):
    ask = lambda server: texts(server, prompts * 2)  # noqa: E731
    metrics = assert_same_with_the_tier(tmp_path, model, ask, expected=reference * 2, blocks_per_chunk=4)
    assert blocks_read(metrics, model) == len(prompts) * DOCUMENT_BLOCKS


def make_adapter(folder: Path, model: Path, rank: int = 8) -> Path:
    """A LoRA adapter of random weights, as peft writes them."""
    config = AutoConfig.from_pretrained(model)
    head = config.hidden_size // config.num_attention_heads
    outputs = {"q_proj": config.num_attention_heads * head, "v_proj": config.num_key_value_heads * head}
    draw = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(config.num_hidden_layers):
        for name, outs in outputs.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{module}.lora_A.weight"] = torch.randn(rank, config.hidden_size, generator=draw) * 0.05
            weights[f"{module}.lora_B.weight"] = torch.randn(outs, rank, generator=draw) * 0.05
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    settings |= {"target_modules": list(outputs), "lora_dropout": 0.0, "base_model_name_or_path": "model"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_a_lora_adapter_has_blocks_of_its_own(tmp_path, model, prompts):
    adapter = make_adapter(tmp_path / "adapter", model)
    rounds: list[list[str]] = []

    def ask(server: Server) -> list[list[str]]:
        return [texts(server, prompts, model=name) for name in ("model", "adapter", "model", "adapter")]

    def ask_and_keep(server: Server) -> list[list[str]]:
        rounds[:] = ask(server)
        return rounds

    arguments = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={adapter}")
    metrics = assert_same_with_the_tier(tmp_path, model, ask_and_keep, *arguments)
    assert rounds[0] != rounds[1], "the adapter changes the answers"
    assert rounds[:2] == rounds[2:]
    # The adapter's first round has found nothing, although the tier had all prompts of the model without it.
    assert blocks_read(metrics, model) == 2 * len(prompts) * DOCUMENT_BLOCKS


def test_a_kv_cache_in_fp8(tmp_path, model, prompts):
    metrics = assert_same_with_the_tier(
        tmp_path, model, lambda server: texts(server, prompts * 2), *("--kv-cache-dtype", "fp8"), element_bytes=1
    )
    assert blocks_read(metrics, model) * 4 == len(prompts) * DOCUMENT_BLOCKS


def test_speculative_decoding_by_ngrams(tmp_path, model, prompts):
    settings = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    metrics = assert_same_with_the_tier(
        tmp_path, model, lambda server: texts(server, prompts * 2), *("--speculative-config", json.dumps(settings))
    )
    assert metrics["vllm:spec_decode_num_accepted_tokens_total", ""] > 0
    assert blocks_read(metrics, model) == len(prompts) * DOCUMENT_BLOCKS
