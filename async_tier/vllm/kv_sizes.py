"""What the KV of a model takes, as vLLM itself computes it, without weights and without a GPU's memory.

vLLM builds the model on torch's device "meta", where tensors have shapes and no bytes. Its attention layers then tell
what KV they keep, vLLM puts them in groups, and its offloading spec tells the size of a block in the primary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.utils import get_pp_indices
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.attention.backends import utils as backends
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

from async_tier.sizes import KVSizes
from async_tier.text import brief
from async_tier.vllm import compat

# Where vLLM plans KV caches: from 0.33 on in a module of its own, which is given the groups.
_PLANNING = "vllm.v1.core.kv_cache_planning"
_planning: Any = importlib.import_module(_PLANNING) if importlib.util.find_spec(_PLANNING) else kv_cache_utils
# vLLM's defaults on the other platform than this one: those of its CPU build, and of a server's GPU.
_CPU_DEFAULTS = {"block_size": 128, "max_num_batched_tokens": 2048}
_GPU_DEFAULTS = {"block_size": 16, "max_num_batched_tokens": 8192}
# Bytes for KV in each worker, so many that every model has room. The result does not depend on it.
_PLENTY = 1 << 50


def measure(model: str, *, on_cpu: bool, chunks: Mapping[str, Any], **options: Any) -> KVSizes:
    """The KV of `model`, a folder or a name.

    on_cpu: for CPUBackendTieringSpec. chunks: `blocks_per_chunk` or `block_size` of kv_connector_extra_config, or
    neither. options: of vLLM's EngineArgs. Raises ValueError, in one sentence, if the sizes cannot be known.
    """
    stages = options.get("pipeline_parallel_size", 1)
    if on_cpu and stages > 1:
        raise ValueError(f"pipeline_parallel_size must be 1 with CPUBackendTieringSpec, not {stages}")
    if model.startswith(("/", "./", "../")) and not os.path.isdir(model):  # which is no name on a hub
        raise ValueError(f"model must be a name, or a folder that is there, not {brief(model)}")
    if current_platform.is_cpu() != on_cpu:
        options = {**(_CPU_DEFAULTS if on_cpu else _GPU_DEFAULTS), **options}
    extra = {"cpu_bytes_to_use": _PLENTY, **chunks}
    transfer = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    platform = f"vLLM {vllm.__version__} ({current_platform.device_type or 'no device'})"
    try:
        config = EngineArgs(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            distributed_executor_backend="mp",  # or vLLM counts this machine's GPUs
            kv_transfer_config=transfer,  # type: ignore[arg-type]
            **options,
        ).create_engine_config(UsageContext.OPENAI_API_SERVER)
        with _one_worker(config):
            with torch.device("meta"):
                initialize_model(config)
            layers = get_kv_cache_spec(config)
            _check_kinds(layers)
            layers = split_heads(config, layers)
            spec, problem = _offloading_spec(config, layers, on_cpu)
    except Exception as error:  # whatever vLLM and transformers raise
        raise ValueError(f"the KV of {brief(model)} cannot be known; {platform} says: {_reason(error)}") from error
    return KVSizes(
        block_bytes=spec.kv_bytes_per_chunk,
        tokens_per_block=compat.tokens_per_block(spec),
        max_model_len=config.model_config.max_model_len,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        platform=platform,
        problem=problem,
    )


@contextlib.contextmanager
def _one_worker(config: VllmConfig) -> Iterator[None]:
    """What vLLM's layers need to be made: a process group, of this process alone."""
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        try:
            parallel_state.init_distributed_environment(1, 0, f"file://{os.path.join(folder, 'store')}", 0, "gloo")
            parallel_state.initialize_model_parallel(1, 1, backend="gloo")
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def _check_kinds(layers: dict[str, KVCacheSpec]) -> None:
    if not layers:
        raise ValueError("the model has no KV cache")
    for name, spec in layers.items():
        if not isinstance(spec, AttentionSpec):
            kind = type(spec).__name__.removesuffix("Spec")
            raise ValueError(f"layer {name} keeps a state of kind {kind}, whose size depends on the server")


def split_heads(config: VllmConfig, layers: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """The layers as each of the tensor-parallel workers has them: vLLM divides KV heads, or repeats them."""
    workers = config.parallel_config.tensor_parallel_size
    split: dict[str, KVCacheSpec] = {}
    for name, spec in layers.items():
        assert isinstance(spec, AttentionSpec)
        heads = spec.num_kv_heads
        if heads % workers and workers % heads:
            raise ValueError(f"tensor_parallel_size {workers} does not divide the {heads} KV heads of layer {name}")
        split[name] = dataclasses.replace(spec, num_kv_heads=max(1, heads // workers))
    return split


def _offloading_spec(config: VllmConfig, layers: dict[str, KVCacheSpec], on_cpu: bool) -> tuple[Any, str | None]:
    """vLLM's offloading spec, and what is wrong with the blocks per chunk."""
    parallel = config.parallel_config
    stages = parallel.pipeline_parallel_size
    ends = [get_pp_indices(config.model_config.get_total_num_hidden_layers(), stage, stages) for stage in range(stages)]
    workers = [
        {name: spec for name, spec in layers.items() if first <= extract_layer_index(name) < last}
        for first, last in ends
        for _ in range(parallel.tensor_parallel_size)
    ]
    if hasattr(backends, "resolve_kv_cache_layout"):  # 0.30 and later
        layouts = [layout.name for layout in backends.get_supported_kv_cache_layouts(get_current_attn_backends(config))]
        backends.resolve_kv_cache_layout(config, [layouts] * len(workers), layers.values())
    groups = [_planning.get_global_kv_cache_groups(config, workers)] if _planning is not kv_cache_utils else []
    configs = _planning.get_kv_cache_configs(config, workers, [_PLENTY] * len(workers), *groups)
    if len({(each.kv_cache_tensors[0].size, each.num_blocks) for each in configs}) > 1:
        raise ValueError(f"pipeline_parallel_size {stages} gives its ranks layers of different sizes")
    kv_cache_config = kv_cache_utils.generate_scheduler_kv_cache_config(configs)
    spec = _make_spec(config, kv_cache_config, on_cpu)
    return spec, compat.partial_chunk_problem(spec)  # which finds kv_cache_config among our variables


def _make_spec(config: VllmConfig, kv_cache_config: Any, on_cpu: bool) -> Any:
    class Spec(CPUOffloadingSpec):
        def _uses_shared_region(self) -> bool:
            """Whether the workers share one copy where all would hold the same: on a GPU, which may be elsewhere."""
            return not on_cpu and (current_platform.is_cpu() or super()._uses_shared_region())

    return Spec(build_offloading_config(config, kv_cache_config))


def _reason(error: Exception) -> str:
    """The first sentence of an error, on one line; pydantic wraps vLLM's own."""
    found = getattr(error, "errors", None)
    text = str(found()[0]["msg"]) if callable(found) and found() else str(error)
    return " ".join(text.removeprefix("Value error, ").split("\n\n")[0].split()) or type(error).__name__
