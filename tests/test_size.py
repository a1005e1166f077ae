"""`async-tier size`: what a model's KV takes, beside what vLLM makes of such layers, and how memory is divided."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec, SlidingWindowSpec

from async_tier.cpu_backend import CPUBackendTieringSpec
from async_tier.operate import settings, size
from async_tier.sizes import KVSizes
from async_tier.vllm import kv_sizes

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BF16 = torch.bfloat16

_DENSE = {"vocab_size": 1024, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6, "max_position_embeddings": 8192}
LLAMA_8B = {
    **_DENSE,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MHA = {**LLAMA_8B, "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "torch_dtype": "float16"}
del MHA["num_key_value_heads"]
QWEN = {
    **LLAMA_8B,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "head_dim": 128,
}
DEEPSEEK = {
    **_DENSE,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
}
GEMMA = {
    **_DENSE,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 1024,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "layer_types": ["sliding_attention" if layer % 6 != 5 else "full_attention" for layer in range(34)],
}
GPT_OSS = {
    **_DENSE,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 640,
    "intermediate_size": 64,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
# A configuration within another, as of models that also see or hear.
NESTED = {
    "architectures": ["Qwen2AudioForConditionalGeneration"],
    "model_type": "qwen2_audio",
    "torch_dtype": "bfloat16",
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "encoder_layers": 2,
        "d_model": 64,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
    },
    "text_config": {
        **_DENSE,
        "model_type": "qwen2",
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
}
MAMBA = {
    **_DENSE,
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "hidden_size": 768,
    "num_hidden_layers": 2,
    "state_size": 16,
    "intermediate_size": 1536,
    "time_step_rank": 48,
    "conv_kernel": 4,
    "expand": 2,
}


@pytest.fixture
def measure(tmp_path):
    def measure(config: dict[str, Any], *, on_cpu: bool = True, **options: Any) -> KVSizes:
        options = {"block_size": 16, **options}  # every CPU has blocks of that size, for every kind of attention
        if options["block_size"] is None:
            del options["block_size"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        chunks = {key: options.pop(key) for key in ("blocks_per_chunk",) if key in options}
        return kv_sizes.measure(str(tmp_path), on_cpu=on_cpu, chunks=chunks, **options)

    return measure


# --------------------------------------------------------------------------------------- what vLLM computes for layers


def full(heads: int, head: int, dtype: torch.dtype = BF16) -> KVCacheSpec:
    return FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=head, dtype=dtype)


def window(heads: int, head: int, tokens: int) -> KVCacheSpec:
    return SlidingWindowSpec(block_size=16, num_kv_heads=heads, head_size=head, dtype=BF16, sliding_window=tokens)


def latent(dtype: torch.dtype = BF16) -> KVCacheSpec:
    return MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=dtype)


def of_vllm(
    folder: Path, layers: list[KVCacheSpec], workers: int = 1, block_size: int = 16, **chunks: int
) -> tuple[int, tuple[int, ...]]:
    """(bytes, tokens by group) of a block of CPUBackendTieringSpec. layers: of each worker, written by hand."""
    extra = {"cpu_bytes_to_use": 64 * GIB, **chunks}
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        tensor_parallel_size=workers,
        distributed_executor_backend="mp",
        block_size=block_size,
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra
        ),
    ).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"
    specs = {f"layers.{number}": dataclasses.replace(spec, block_size=block_size) for number, spec in enumerate(layers)}
    planned = get_kv_cache_configs(config, [specs] * workers, [1 << 40] * workers)
    spec = CPUBackendTieringSpec(build_offloading_config(config, generate_scheduler_kv_cache_config(planned)))
    factor = spec.blocks_per_chunk
    return spec.kv_bytes_per_chunk, tuple(tokens * factor for tokens in spec.tokens_per_block)


SAME = {
    "grouped heads": (LLAMA_8B, {}, [full(8, 128)] * 32),
    "a head for each": (MHA, {"block_size": 32}, [full(16, 64, torch.float16)] * 4),
    "a head's size of its own": (QWEN, {}, [full(8, 128)] * 28),
    "another dtype": (QWEN, {"dtype": "float32"}, [full(8, 128, torch.float32)] * 28),
    "fp8": (QWEN, {"kv_cache_dtype": "fp8"}, [full(8, 128, torch.uint8)] * 28),
    "several blocks a chunk": (QWEN, {"blocks_per_chunk": 4}, [full(8, 128)] * 28),
    "two workers": (LLAMA_8B, {"tensor_parallel_size": 2}, [full(4, 128)] * 32),
    "more workers than heads": (LLAMA_8B, {"tensor_parallel_size": 16}, [full(1, 128)] * 32),
    "latent": (DEEPSEEK, {}, [latent()] * 27),
    "latent, two workers": (DEEPSEEK, {"tensor_parallel_size": 2}, [latent()] * 27),
    "windows": (GEMMA, {"block_size": 32}, [full(4, 256) if n % 6 == 5 else window(4, 256, 1024) for n in range(34)]),
    "every other a window": (GPT_OSS, {"block_size": 32}, [window(8, 64, 128), full(8, 64)] * 12),
    "nested": (NESTED, {}, [full(2, 64)] * 6),
}


@pytest.mark.parametrize(("config", "options", "layers"), SAME.values(), ids=SAME.keys())
def test_a_block_is_what_vllm_makes_of_the_layers(measure, tmp_path, config, options, layers):
    sizes = measure(config, **options)
    workers = options.get("tensor_parallel_size", 1)
    chunks = {key: options[key] for key in ("blocks_per_chunk",) if key in options}
    expected = of_vllm(tmp_path, layers, workers, options.get("block_size", 16), **chunks)
    assert (sizes.block_bytes, sizes.tokens_per_block) == expected


@pytest.mark.parametrize(
    ("config", "options", "token_bytes"),
    [
        (LLAMA_8B, {}, 128 * KIB),
        (LLAMA_8B, {"tensor_parallel_size": 16}, 256 * KIB),
        (LLAMA_8B, {"pipeline_parallel_size": 4, "tensor_parallel_size": 2}, 128 * KIB),
        (DEEPSEEK, {"block_size": 128}, 27 * 576 * 2),
    ],
)
def test_bytes_per_token_that_are_known(measure, config, options, token_bytes):
    assert measure(config, on_cpu=False, **options).token_bytes == token_bytes


@pytest.mark.parametrize("config", [LLAMA_8B, MHA, QWEN, DEEPSEEK, GEMMA], ids=["8B", "MHA", "QWEN", "MLA", "windows"])
@pytest.mark.parametrize("workers", [2, 8])
def test_workers_have_the_heads_that_their_layers_say(measure, tmp_path, monkeypatch, config, workers):
    """vLLM's layers divide heads by the size of their process group, which is put up here."""
    real = kv_sizes.initialize_model

    def initialize(of: Any) -> None:
        monkeypatch.setattr(parallel_state.get_tp_group(), "world_size", workers)
        real(of)

    expected = measure(config, tensor_parallel_size=workers)
    monkeypatch.setattr(kv_sizes, "initialize_model", initialize)
    monkeypatch.setattr(kv_sizes, "split_heads", lambda config, layers: layers)
    assert measure(config, tensor_parallel_size=workers) == expected


def test_on_a_gpu_workers_share_one_copy_of_what_all_have(measure):
    one, shared = (measure(DEEPSEEK, on_cpu=False, tensor_parallel_size=workers) for workers in (1, 2))
    apart = measure(DEEPSEEK, on_cpu=True, tensor_parallel_size=2)
    assert shared.block_bytes == one.block_bytes
    assert apart.block_bytes == 2 * 27 * 576 * 2 * 16


def test_defaults_are_those_of_the_platform_that_is_asked_about(measure):
    for on_cpu, tokens, step in ((True, 128, 2048), (False, 16, 8192)):
        sizes = measure(LLAMA_8B, on_cpu=on_cpu, block_size=None)
        assert (sizes.tokens_per_block, sizes.max_num_batched_tokens, sizes.max_model_len) == ((tokens,), step, 8192)
    assert measure(LLAMA_8B, max_model_len=4096, max_num_batched_tokens=512).max_model_len == 4096


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (MAMBA, {}, "layer .* keeps a state of kind Mamba, whose size depends on the server"),
        ({"model_type": "nosuch"}, {}, "says: "),
        ({**LLAMA_8B, "architectures": ["NoSuchForCausalLM"]}, {}, "says: .*NoSuchForCausalLM"),
        (LLAMA_8B, {"tensor_parallel_size": 3}, r"attention heads \(32\) must be divisible"),
        (
            {**LLAMA_8B, "num_attention_heads": 36, "num_key_value_heads": 6, "hidden_size": 36 * 128},
            {"tensor_parallel_size": 4},
            "tensor_parallel_size 4 does not divide the 6 KV heads of layer model.layers.0",
        ),
        (
            LLAMA_8B,
            {"pipeline_parallel_size": 3, "on_cpu": False},
            "pipeline_parallel_size 3 gives its ranks layers of different sizes",
        ),
    ],
)
def test_what_cannot_be_known_is_refused_in_one_sentence(measure, config, options, says):
    with pytest.raises(
        ValueError, match=f"^the KV of '.*' cannot be known; vLLM .* says: .*{says.split('says: ')[-1]}"
    ) as refused:
        measure(config, **options)
    assert "\n" not in str(refused.value)


def test_what_the_cpu_backend_refuses_is_refused(measure):
    with pytest.raises(ValueError, match=r"^pipeline_parallel_size must be 1 with CPUBackendTieringSpec, not 2"):
        measure(LLAMA_8B, pipeline_parallel_size=2)


@pytest.mark.parametrize("model", ["/no/such/model", "./model"])
def test_a_folder_that_is_not_there_is_no_name(model):
    with pytest.raises(ValueError, match=rf"^model must be a name, or a folder that is there, not '{model}'$"):
        kv_sizes.measure(model, on_cpu=True, chunks={})


def test_chunks_of_windows_are_a_problem(measure):
    assert measure(GEMMA, block_size=32).problem is None
    assert "blocks_per_chunk must be 1, not 2" in measure(GEMMA, block_size=32, blocks_per_chunk=2).problem


# --------------------------------------------------------------------------------------------------- memory is divided

SIZES = KVSizes(2 * MIB, (16,), max_model_len=8192, max_num_batched_tokens=2048, platform="a test", problem=None)


def test_the_primary_holds_a_prompt_and_the_steps_and_the_tier_gets_the_rest():
    plan = size.divide(SIZES, 64 * GIB)
    assert plan.primary_bytes == (8192 + 2 * 2048) * 128 * KIB
    rows = plan.tier_bytes // SIZES.block_bytes
    index = rows * size.INDEX_BYTES
    assert plan.tier_bytes % SIZES.block_bytes == 0
    assert 0 <= 64 * GIB - plan.primary_bytes - plan.tier_bytes - index < SIZES.block_bytes + size.INDEX_BYTES
    assert plan.prompt_tokens == 8192


def test_of_several_groups_each_takes_a_block():
    sizes = dataclasses.replace(SIZES, tokens_per_block=(16, 32, 32))
    plan = size.divide(sizes, 64 * GIB)
    assert plan.primary_bytes == (8192 // 16 + 2 * 8192 // 32 + 2 * (2048 // 16 + 2 * 2048 // 32)) * 2 * MIB
    assert (plan.prompt_tokens, sizes.tokens(sizes.blocks(8192) * 2 * MIB)) == (8192, 8192)


def test_a_prompt_that_would_take_more_than_an_eighth_is_cut():
    sizes = dataclasses.replace(SIZES, max_model_len=131072)
    plan = size.divide(sizes, 18 * GIB)
    assert plan.primary_bytes == 2 * GIB
    assert plan.prompt_tokens == 2 * GIB // (128 * KIB) - 2 * 2048
    assert size.divide(sizes, 512 * GIB).prompt_tokens == 131072
    assert size.divide(sizes, 4 * GIB).primary_bytes == 4 * 2048 * 128 * KIB, "steps come first"


def test_too_little_memory_is_refused_and_enough_is_not():
    with pytest.raises(
        ValueError, match=r"^memory must be at least (\d+) bytes .*, not 1073741824 \(1.0 GiB\)"
    ) as refused:
        size.divide(SIZES, GIB)
    least = int(re.findall(r"least (\d+)", str(refused.value))[0])
    plan = size.divide(SIZES, least)
    assert plan.tier_bytes >= 2 * plan.primary_bytes
    with pytest.raises(ValueError, match=r"^memory must be at least"):
        size.divide(SIZES, least - 1)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_what_it_prints_is_what_doctor_accepts(monkeypatch, on_cpu):
    monkeypatch.setattr(settings.doctor, "vllm_version", lambda: None)
    monkeypatch.setattr(settings.doctor, "find_limits", lambda: [])
    monkeypatch.setattr(settings.machine, "shared_memory", lambda: (GIB << 10, GIB << 10))
    config = size.transfer_config(size.divide(SIZES, 64 * GIB), on_cpu, {"blocks_per_chunk": 2}, {})
    found = list(settings.look_at_settings(config, SIZES, []))
    assert {each.level for each in found} == {"ok"}
    assert settings.offloading(config)["blocks_per_chunk"] == 2
