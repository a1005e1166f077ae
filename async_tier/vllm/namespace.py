"""What the blocks of a pool mean, beyond their keys.

vLLM's key of a block covers its tokens, images, LoRA name and cache salt. What the block's bytes mean also depends on
the model, its weights, and how KV lies in memory. All of that enters the digest of a pool, so that blocks with another
meaning are in another pool. A fact that counts without need costs a cold start, but one that is missing costs wrong
answers. So most of what is in doubt counts, and what must be known and is not is refused.

What does not count:

- The data-parallel rank, and the number of replicas: replicas share a pool. A worker's rank is of no use either,
  because a row has the parts of all workers.
- What follows from the memory that is free at start, such as the number of blocks in the KV cache.
- What changes no more than rounding, such as the choice of a kernel. That differs between the batches of one run, too.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import vllm
import vllm.envs
from huggingface_hub.constants import HF_HUB_CACHE

from async_tier.memory.pool_files import DIGEST_MARK
from async_tier.text import brief
from async_tier.vllm import compat

# What counts of vLLM's configuration, by its parts. First what every version has: what is missing there is refused.
_NEEDED = {
    "model": ("model", "revision", "dtype", "quantization", "max_model_len", "hf_config"),
    "cache": ("cache_dtype", "prefix_caching_hash_algo"),
    "parallel": tuple(f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "prefill_context", "decode_context")),
    "load": ("load_format", "model_loader_extra_config"),
    "speculative": ("method",),
    "attention": ("backend",),
}
# Then what only some versions have.
_OPTIONAL = {
    "model": (
        "model_weights",
        "code_revision",
        "quantization_config",
        "model_impl",
        "override_attention_dtype",
        "model_class_overrides",
        "disable_sliding_window",
        "config_format",
        "hf_config_path",
    ),
    "multimodal": (
        "language_model_only",
        "mm_processor_kwargs",
        "mm_encoder_attn_dtype",
        "mm_device_do_normalize",
        "video_pruning_rate",
        "video_pruning_method",
    ),
    "cache": (
        "kv_cache_dtype_skip_layers",
        "mamba_cache_dtype",
        "mamba_ssm_cache_dtype",
        "mamba_cache_mode",
        "sliding_window",
        "prefix_match_unit",
        "kv_sharing_fast_prefill",
        "swa_bounded_replay",
        "use_replayssm",
        "replayssm_buffer_len",
    ),
    "parallel": ("dcp_kv_cache_interleave_size", "cp_kv_cache_interleave_size"),
    "speculative": ("kv_cache_dtype", "attention_backend"),
    "attention": ("backend_per_kind", "use_trtllm_attention", "indexer_kv_dtype", "hisparse_config", "use_non_causal"),
    "lora": ("lora_dtype", "target_modules", "enable_tower_connector_lora"),
}
# Environment variables that decide how KV lies, what computes it, or where the weights come from.
_ENVIRONMENT = (
    "VLLM_KV_CACHE_LAYOUT",
    "VLLM_SSM_CONV_STATE_LAYOUT",
    "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT",
    "VLLM_MLA_DISABLE",
    "VLLM_ROCM_USE_AITER",
    "VLLM_PP_LAYER_PARTITION",
    "VLLM_USE_MODELSCOPE",
    "VLLM_TEST_FORCE_LOAD_FORMAT",
)
# What people are shown of a fact, in characters.
_LONGEST_FACT = 60
# Facts in which there may be passwords.
_SECRET = ("model_loader_extra_config",)
# Packages whose presence and version decide which attention backend vLLM chooses, and so the layout.
_PACKAGES = ("flashinfer-python", "flash-attn", "aiter")


def facts(offloading_spec: Any, row_bytes: int) -> dict[str, Any]:
    """What is known of the meaning of the blocks, as JSON has it. row_bytes: the size of a row of the primary.

    Reads no weights: it takes milliseconds. To be called while vLLM constructs the tier, as vLLM's configuration is
    found among the variables of the callers. Of a mock, little is known. Raises ValueError if a fact cannot be known.
    """
    found = {"vllm": vllm.__version__, "row_bytes": row_bytes, "device": compat.device()}
    configurations = compat.configurations(offloading_spec)
    if configurations is None:
        return found
    config, caches = configurations
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise ValueError("calculate_kv_scales must be false with a pool, not True: such scales differ from run to run")
    if getattr(config, "weight_transfer_config", None) is not None:
        raise ValueError(
            "weight_transfer_config must not be set with a pool, as blocks of other weights would be in it"
        )
    kind = type(offloading_spec)
    speculative = getattr(config, "speculative_config", None)
    return found | {
        "spec": f"{kind.__module__}.{kind.__qualname__}",
        "model": _model(config.model_config, config.load_config),
        "draft": speculative and _draft(speculative, config.load_config),
        "lora": _fields("lora", config.lora_config),
        "cache": _fields("cache", config.cache_config),
        "parallel": _fields("parallel", config.parallel_config),
        "attention": _fields("attention", config.attention_config),
        "layout": compat.kv_layout(config),
        "runner": "v2" if getattr(config, "use_v2_model_runner", False) else "v1",
        "block": _plain(compat.block_fields(offloading_spec), "the offloading spec"),
        "groups": _plain(caches.kv_cache_groups, "kv_cache_groups"),
        "tensors": _plain(compat.layers_of_tensors(caches), "kv_cache_tensors"),
        "seed": compat.hash_seed(config.cache_config.prefix_caching_hash_algo),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def check_seed(offloading_spec: Any) -> None:
    """Raises ValueError if the same tokens get other keys in the next run, so that a pool would never be of use."""
    configurations = compat.configurations(offloading_spec)
    if configurations is None:
        return
    algorithm = configurations[0].cache_config.prefix_caching_hash_algo
    if compat.hash_seed(algorithm) is None:
        raise ValueError(
            f"PYTHONHASHSEED must be set with a pool, to the same number in every run: without it, vLLM "
            f"{vllm.__version__} hashes blocks by {algorithm} with a seed that differs from run to run"
        )


def digest(facts: Mapping[str, Any], namespace: str) -> bytes:
    """The name of a pool, 32 bytes. facts: of `facts`. namespace: what the user says of all that they do not cover."""
    text = json.dumps([namespace, facts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def plain_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts by their full names, to be compared and shown. Long ones, and what may be secret, only as digests."""
    found: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping) and value and name not in _SECRET:
            found |= {f"{name}.{inner}": text for inner, text in plain_facts(value).items()}
            continue
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        if len(text) > _LONGEST_FACT or name in _SECRET:
            text = DIGEST_MARK + hashlib.sha256(text.encode()).hexdigest()[:16]
        found[name] = text
    return found


def fingerprint(path: str) -> str:
    """Tells one state of a folder of weights, or of a file, from others: names, sizes and times of change.

    Not the contents: to read them takes minutes. So files that are written again, or copied without their times, are
    taken for others, which costs a cold start. A file of the same size and time of change is taken for the same.
    Hidden files do not count: they belong to what downloads and versions the others. Raises OSError.
    """
    if os.path.isfile(path):
        entries = [_entry(path, "")]
    else:
        entries = sorted(_entry(os.path.join(path, name), name) for name in _names(path))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _names(folder: str) -> Iterator[str]:
    """The files below `folder` that are not hidden, relative to it."""

    def give_up(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=give_up):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.relpath(os.path.join(place, n), folder) for n in files if not n.startswith("."))


def _entry(path: str, name: str) -> tuple[str, int, int]:
    status = os.stat(path)  # of the file that a link leads to
    return name, status.st_size, status.st_mtime_ns


def _model(model: Any, load: Any) -> dict[str, Any]:
    """What counts of a ModelConfig."""
    found = _fields("model", model)
    # Some kinds of RoPE are scaled by it. -1: vLLM loads the model with the length that its config has, and afterwards
    # cuts it down to the memory that is free.
    if getattr(model, "original_max_model_len", None) == -1:
        found["max_model_len"] = -1
    found["multimodal"] = _fields("multimodal", getattr(model, "multimodal_config", None))
    found["weights"] = _weights(model, load.download_dir or HF_HUB_CACHE)
    found["load"] = _fields("load", load)
    return found


def _draft(speculative: Any, load: Any) -> dict[str, Any]:
    """The draft model, whose layers are in the same blocks. load: of the main model."""
    found = _fields("speculative", speculative)
    draft, load = speculative.draft_model_config, getattr(speculative, "draft_load_config", None) or load
    found["model"] = draft and _model(draft, load)
    return found


def _weights(model: Any, cache: str) -> dict[str, str | None]:
    """Which weights: a fingerprint of local files, or the commit of a hub. cache: where the hub's files are kept."""
    name = model.model
    # With weights in an object store, the folder has only the config, and vLLM writes it again at every start.
    if os.path.exists(name) and not getattr(model, "model_weights", ""):
        try:
            return {"files": fingerprint(name)}
        except OSError as error:
            raise ValueError(f"the files of the model {brief(name)} must be readable for a pool: {error}") from error
    # ModelScope's commits are not known here, and the hub may have a model of the same name.
    commit = None if vllm.envs.VLLM_USE_MODELSCOPE else _commit(model, cache)
    if commit is None and model.revision is None:
        raise ValueError(
            f"revision must be given to vLLM with a pool, because that of the model {brief(name)} cannot be known, and "
            "other weights must not go unnoticed; or the model must be a local folder"
        )
    return {"commit": commit}


def _commit(model: Any, cache: str) -> str | None:
    """The commit that a model's weights are of; None if that cannot be known."""
    revision = model.revision or "main"
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    # With `hf_config_path` the config is of another repository than the weights.
    commit = None if model.hf_config_path else getattr(model.hf_config, "_commit_hash", None)
    if commit is None:  # a config that is not in the form of transformers: see what was downloaded last
        repository = model.model.partition(":")[0].replace("/", "--")  # "name:Q4_K_M" is one of several GGUF files
        reference = Path(cache, f"models--{repository}", "refs", revision)
        commit = reference.read_text().strip() if reference.is_file() else None
    return commit


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fields(part: str, config: Any) -> Any:
    """What counts of a part of vLLM's configuration, as a dict; None if there is no such part."""
    if config is None:
        return None
    needed = _NEEDED.get(part, ())
    for name in needed:
        if not hasattr(config, name):
            raise ValueError(f"vLLM {vllm.__version__} cannot have a pool: nobody knows its {part} config's {name!r}")
    names = [name for name in needed + _OPTIONAL.get(part, ()) if hasattr(config, name)]
    return {name: _plain(getattr(config, name), name) for name in names}


def _plain(value: Any, what: str) -> Any:
    """`value` as JSON has it. Raises ValueError for what would be another text in every run, such as an address."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, Path)):
        return str(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "to_dict"):  # a model's config
        return _plain(value.to_dict(), what)
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **_plain(fields, what)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each, what) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, what) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(each, what) for each in value), key=json.dumps)
    raise ValueError(f"{what} must be numbers, text and the like with a pool, not {brief(value)}")
