"""What makes two pools different: every fact changes the digest, with vLLM's real configurations."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    LoadConfig,
    LoRAConfig,
    ModelConfig,
    MultiModalConfig,
    ParallelConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.model_executor.models import registry
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.kv_offload.base import OffloadingSpec

from async_tier.memory.pool_files import DIGEST_MARK
from async_tier.vllm import namespace

# On every supported vLLM; but once is enough, as no engine is involved.
pytestmark = [pytest.mark.contract, pytest.mark.host_only]

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
ROW_BYTES = 4096
FULL, WINDOW = FullAttentionSpec, SlidingWindowSpec
_HAS_FIXED_SEED = hasattr(kv_cache_utils, "resolve_none_hash_seed")


class Spec(OffloadingSpec):
    """vLLM's spec, as the connector makes it."""

    def get_manager(self) -> Any: ...

    def get_worker(self, kv_caches: Any) -> Any: ...

    def create_worker(self, kv_caches: Any) -> Any: ...


class OtherSpec(Spec):
    pass


def write_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MODEL, **changes}))
    (folder / "model.safetensors").write_bytes(bytes(100))
    return folder


def know_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM would ask the model's class in another process, which needs a GPU's libraries, and takes seconds."""
    names = [field.name for field in dataclasses.fields(registry._ModelInfo)]
    known = {"architecture": "LlamaForCausalLM", "is_text_generation_model": True, "attn_type": "decoder"}
    known |= {"default_seq_pooling_type": "LAST", "default_tok_pooling_type": "ALL", "score_type": "bi-encoder"}
    known |= {"supports_pp": True, "supports_lora": True, "supported_video_pruning_methods": ()}
    info = registry._ModelInfo(**{name: known.get(name, False) for name in names})
    monkeypatch.setattr(registry._LazyRegisteredModel, "inspect_model_cls", lambda self: info)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model's."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    know_llama(monkeypatch)
    return write_model(tmp_path / "model")


def make_config(
    folder: Path, model: Any = None, cache: Any = None, parallel: Any = None, extra: Any = None, **parts: Any
) -> VllmConfig:
    """vLLM's configuration; model, cache, parallel, extra: further arguments of its parts."""
    return VllmConfig(
        model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, **{"dtype": "bfloat16", **(model or {})}),
        cache_config=CacheConfig(**{"block_size": 16, **(cache or {})}),
        parallel_config=ParallelConfig(**{"distributed_executor_backend": "mp", **(parallel or {})}),
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            engine_id="test",
            kv_connector_extra_config={"cpu_bytes_to_use": 1 << 20, **(extra or {})},
        ),
        device_config=DeviceConfig("cpu"),
        **parts,
    )


def make_caches(
    kind: type = FULL, layers: tuple[str, ...] = ("a", "b"), blocks: int = 10, **spec: Any
) -> KVCacheConfig:
    values = {"block_size": 16, "num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}
    values |= {"sliding_window": 64} if kind is WINDOW else {}
    page = kind(**{**values, **spec})
    tensor: dict[str, Any] = {"size": blocks * page.page_size_bytes}
    if "layers" in inspect.signature(KVCacheTensor).parameters:
        strides = {"layer_stride": page.page_size_bytes * blocks, "block_stride": page.page_size_bytes}
        tensors = [KVCacheTensor(**tensor, **strides, layers=list(layers))]
    else:
        tensors = [KVCacheTensor(**tensor, shared_by=[layer]) for layer in layers]
    return KVCacheConfig(blocks, tensors, [KVCacheGroupSpec(list(layers), page)])


def make_spec(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, kind: type = Spec) -> OffloadingSpec:
    if len(inspect.signature(OffloadingSpec.__init__).parameters) == 3:  # up to 0.26
        return kind(vllm_config, kv_cache_config)
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config

    return kind(build_offloading_config(vllm_config, kv_cache_config))


def facts_of(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig | None = None, kind: type = Spec, row_bytes: int = ROW_BYTES
) -> dict[str, Any]:
    """As in vLLM: the configurations are variables of a caller."""
    kv_cache_config = kv_cache_config or make_caches()
    return namespace.facts(make_spec(vllm_config, kv_cache_config, kind), row_bytes)


def name_of(*arguments: Any, **more: Any) -> bytes:
    return namespace.digest(facts_of(*arguments, **more), "a pool")


# ------------------------------------------------------------------------------------------------ what makes pools two

CHANGES: dict[str, dict[str, Any]] = {
    "dtype": {"model": {"dtype": "float32"}},
    "length": {"model": {"max_model_len": 1024}},
    "overrides": {"model": {"hf_overrides": {"rms_norm_eps": 1e-3}}},
    "rope": {"model": {"hf_overrides": {"rope_theta": 20000.0}}},
    "revision": {"model": {"revision": "v2"}},
    "code": {"model": {"code_revision": "v2"}},
    "the KV's dtype": {"cache": {"cache_dtype": "fp8"}},
    "layers of another dtype": {"cache": {"kv_cache_dtype_skip_layers": ["0"]}},
    "a state's dtype": {"cache": {"mamba_cache_dtype": "float32"}},
    "hash algorithm": {"cache": {"prefix_caching_hash_algo": "sha256_cbor"}},
    "tensor parallel": {"parallel": {"tensor_parallel_size": 2}},
    "pipeline parallel": {"parallel": {"pipeline_parallel_size": 2}},
    "blocks per chunk": {"extra": {"block_size": 32}},
    "LoRA's dtype": {"lora_config": LoRAConfig(max_lora_rank=8, max_cpu_loras=1, lora_dtype="float16")},
    "load format": {"load_config": LoadConfig(load_format="dummy")},
    "options of the loader": {"load_config": LoadConfig(model_loader_extra_config={"concurrency": 2})},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_other_arguments_of_vllm_are_another_pool(folder, change):
    if "tensor_parallel_size" in change.get("parallel", {}):
        write_model(folder, num_attention_heads=2)
    base = {"lora_config": LoRAConfig(max_lora_rank=8, max_cpu_loras=1)} if "lora_config" in change else {}
    assert name_of(make_config(folder, **base)) != name_of(make_config(folder, **change))


def _set(part: str, **values: Any) -> Callable[[VllmConfig], None]:
    def change(config: VllmConfig) -> None:
        for name, value in values.items():
            setattr(getattr(config, part), name, value)

    return change


# What cannot be asked of this machine, or only of another model.
SETTINGS: dict[str, Callable[[VllmConfig], None]] = {
    "name": _set("model_config", model="/"),
    "quantization": _set("model_config", quantization="awq"),
    "implementation": _set("model_config", model_impl="transformers"),
    "layout": _set("cache_config", kv_cache_layout="BLHNC"),
    "prefill context": _set("parallel_config", prefill_context_parallel_size=2),
    "decode context": _set("parallel_config", decode_context_parallel_size=2),
    "interleaving": _set("parallel_config", cp_kv_cache_interleave_size=16),
    "backend": _set("attention_config", backend=AttentionBackendEnum.FLASHINFER),
    "processor": _set("model_config", multimodal_config=MultiModalConfig(mm_processor_kwargs={"max_pixels": 100})),
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS.keys())
def test_another_configuration_is_another_pool(folder, monkeypatch, change):
    monkeypatch.setattr(namespace, "fingerprint", lambda path: "the same")
    config = make_config(folder)
    if change is SETTINGS["layout"] and not hasattr(config.cache_config, "kv_cache_layout"):
        pytest.skip("up to 0.28 the layout is in no configuration")
    if change is SETTINGS["processor"]:
        config.model_config.multimodal_config = MultiModalConfig()
    spec = make_spec(config, make_caches())  # which must not change with it

    def name(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> bytes:
        return namespace.digest(namespace.facts(spec, ROW_BYTES), "")

    before = name(config, make_caches())
    change(config)
    assert name(config, make_caches()) != before


CACHES: dict[str, dict[str, Any]] = {
    "kind": {"kind": WINDOW},
    "layers": {"layers": ("a", "c")},
    "order of layers": {"layers": ("b", "a")},
    "number of layers": {"layers": ("a", "b", "c")},
    "tokens": {"block_size": 32},
    "heads": {"num_kv_heads": 2},
    "head size": {"head_size": 32},
    "dtype": {"dtype": torch.float16},
}


@pytest.mark.parametrize("change", CACHES.values(), ids=CACHES.keys())
def test_other_kv_groups_are_another_pool(folder, change):
    tokens = {"block_size": change.get("block_size", 16)}
    assert name_of(make_config(folder)) != name_of(make_config(folder, cache=tokens), make_caches(**change))


def test_layers_in_other_tensors_are_another_pool(folder):
    config, caches, other = make_config(folder), make_caches(), make_caches()
    other.kv_cache_tensors = make_caches(layers=("b", "a")).kv_cache_tensors
    assert name_of(config, caches) != name_of(config, other)


def test_other_rows_are_another_pool(folder):
    config = make_config(folder)
    assert name_of(config) != name_of(config, row_bytes=2 * ROW_BYTES)
    assert name_of(config) != name_of(config, kind=OtherSpec)


@pytest.mark.parametrize("field", ["canonical_layout", "replicated_layout"])
def test_rows_in_another_order_are_another_pool(folder, field):
    vllm_config, kv_cache_config = make_config(folder), make_caches()
    spec = make_spec(vllm_config, kv_cache_config)
    if field not in getattr(getattr(spec, "config", None), "__dataclass_fields__", ()):
        pytest.skip("this vLLM has one order")
    before = namespace.digest(namespace.facts(spec, ROW_BYTES), "")
    spec.config = dataclasses.replace(spec.config, **{field: True})
    assert namespace.digest(namespace.facts(spec, ROW_BYTES), "") != before


@pytest.mark.parametrize(
    ("target", "value"),
    [
        ("vllm.__version__", "0.99.0"),
        ("async_tier.vllm.compat.vllm.platforms.current_platform.get_device_name", lambda: "another GPU"),
        ("async_tier.vllm.compat.torch.cpu._is_amx_tile_supported", lambda: "unheard of"),
        ("importlib.metadata.version", lambda name: "9.9"),
    ],
)
def test_other_software_or_hardware_is_another_pool(folder, monkeypatch, target, value):
    config = make_config(folder)
    is_cpu = "amx" in target
    monkeypatch.setattr("async_tier.vllm.compat.vllm.platforms.current_platform.is_cpu", lambda: is_cpu)
    before = name_of(config)
    monkeypatch.setattr(target, value)
    assert name_of(config) != before


def test_another_model_runner_is_another_pool(folder, monkeypatch):
    config = make_config(folder)
    before = name_of(config)
    other = not config.use_v2_model_runner
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", property(lambda self: other))
    assert name_of(config) != before


def test_the_environment_counts(folder, monkeypatch):
    config = make_config(folder)
    before = name_of(config)
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    assert name_of(config) != before


def test_facts_are_shown_by_their_names(folder):
    config = make_config(folder, cache={"cache_dtype": "fp8"})
    shown = namespace.plain_facts(facts_of(config))
    assert (shown["cache.cache_dtype"], shown["model.max_model_len"]) == ("fp8", str(config.model_config.max_model_len))
    assert shown["groups"].startswith(DIGEST_MARK), "it is long"
    assert all(len(text) <= 60 for text in shown.values())


def test_a_password_is_not_shown():
    shown = namespace.plain_facts({"load": {"model_loader_extra_config": {"key": "secret"}, "load_format": "auto"}})
    assert shown["load.load_format"] == "auto"
    assert shown["load.model_loader_extra_config"].startswith(DIGEST_MARK)
    assert "secret" not in str(shown)


def test_another_namespace_is_another_pool(folder):
    found = facts_of(make_config(folder))
    assert namespace.digest(found, "a") != namespace.digest(found, "b")
    assert len(namespace.digest(found, "a")) == 32


# ---------------------------------------------------------------------------------------------------------- the weights


def test_a_model_written_again_is_another_pool(folder):
    config, weights = make_config(folder), folder / "model.safetensors"
    names = [name_of(config)]
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    names.append(name_of(config))
    status = weights.stat()
    weights.write_bytes(bytes(101))
    os.utime(weights, ns=(0, status.st_mtime_ns))
    names.append(name_of(config))
    weights.rename(folder / "other.safetensors")
    names.append(name_of(config))
    (folder / "part").mkdir()
    (folder / "part" / "more.safetensors").touch()
    names.append(name_of(config))
    assert len(set(names)) == len(names)


def test_hidden_files_do_not_count(folder):
    config = make_config(folder)
    before = name_of(config)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    (folder / ".gitattributes").touch()
    assert name_of(config) == before


def test_links_are_followed(tmp_path):
    blob, folder = tmp_path / "blob", tmp_path / "snapshot"
    folder.mkdir()
    blob.write_bytes(bytes(1))
    (folder / "model.safetensors").symlink_to(blob)
    before = namespace.fingerprint(str(folder))
    blob.write_bytes(bytes(2))
    assert namespace.fingerprint(str(folder)) != before
    assert namespace.fingerprint(str(blob)) != before, "a single file"


def test_files_that_cannot_be_seen_are_refused(folder):
    config = make_config(folder)
    with pytest.raises(FileNotFoundError):
        namespace.fingerprint(str(folder / "nowhere"))
    (folder / "lost.safetensors").symlink_to(folder / "nowhere")
    with pytest.raises(ValueError, match=r"^the files of the model '.*' must be readable for a pool: .*lost"):
        facts_of(config)


COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


@pytest.fixture
def hub_config(folder, tmp_path):
    """Of a model with a name, as if it came from a hub."""
    config = make_config(folder)
    config.load_config.download_dir = str(tmp_path / "hub")
    config.model_config.model = "some/model"
    return config


def download(config: VllmConfig, commit: str, revision: str = "main") -> None:
    references = Path(config.load_config.download_dir, "models--some--model", "refs")
    references.mkdir(parents=True, exist_ok=True)
    (references / revision).write_text(commit)


def weights_of(config: VllmConfig) -> dict[str, Any]:
    return facts_of(config)["model"]["weights"]


def test_a_model_of_a_hub_has_a_commit(hub_config):
    hub_config.model_config.hf_config._commit_hash = COMMIT
    before = name_of(hub_config)
    assert weights_of(hub_config) == {"commit": COMMIT}
    hub_config.model_config.hf_config._commit_hash = OTHER_COMMIT
    assert name_of(hub_config) != before


@pytest.mark.parametrize("name", ["some/model", "some/model:Q4_K_M"])
def test_a_config_that_does_not_know_its_commit(hub_config, name):
    hub_config.model_config.model = name
    download(hub_config, COMMIT)
    assert weights_of(hub_config) == {"commit": COMMIT}
    hub_config.model_config.revision = "v2"
    download(hub_config, OTHER_COMMIT, "v2")
    assert weights_of(hub_config) == {"commit": OTHER_COMMIT}
    hub_config.model_config.revision = "c" * 40
    assert weights_of(hub_config) == {"commit": "c" * 40}


def test_a_config_of_another_repository_does_not_tell_the_commit(hub_config):
    hub_config.model_config.hf_config._commit_hash = COMMIT
    hub_config.model_config.hf_config_path = "some/config"
    download(hub_config, OTHER_COMMIT)
    assert weights_of(hub_config) == {"commit": OTHER_COMMIT}


@pytest.mark.parametrize("place", ["a hub", "an object store", "ModelScope"])
def test_weights_of_which_nothing_is_known_are_refused(hub_config, folder, monkeypatch, place):
    model = hub_config.model_config
    if place == "an object store":
        model.model, model.model_weights = str(folder), "s3://bucket/model"
    if place == "ModelScope":
        download(hub_config, COMMIT)  # of the hub's model of that name
        monkeypatch.setenv("VLLM_USE_MODELSCOPE", "true")
    with pytest.raises(ValueError, match=r"^revision must be given to vLLM with a pool, because .* cannot be known"):
        facts_of(hub_config)
    model.revision = "2026-05"
    before = name_of(hub_config)
    model.revision = "2026-06"
    assert name_of(hub_config) != before


def test_a_draft_model_counts_as_the_model_does(folder, tmp_path):
    config, draft = make_config(folder), write_model(tmp_path / "draft", num_hidden_layers=1)
    names = [name_of(config)]
    config.speculative_config = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=2,
        prompt_lookup_max=2,
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
    )
    names.append(name_of(config))
    config.speculative_config.method = "eagle"
    names.append(name_of(config))
    config.speculative_config.draft_model_config = ModelConfig(model=str(draft), skip_tokenizer_init=True)
    names.append(name_of(config))
    (draft / "model.safetensors").write_bytes(bytes(3))
    names.append(name_of(config))
    config.speculative_config.draft_load_config = LoadConfig(load_format="dummy")
    names.append(name_of(config))
    assert len(set(names)) == len(names)


# -------------------------------------------------------------------------------------------------- what does not count

SAME: dict[str, dict[str, Any]] = {
    "memory": {"cache": {"gpu_memory_utilization": 0.5, "num_gpu_blocks_override": 77}},
    "names": {"model": {"served_model_name": "another name"}},
    "seed of sampling": {"model": {"seed": 7}},
    "size of the primary": {"extra": {"cpu_bytes_to_use": 2 << 20}},
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_what_does_not_change_kv_is_the_same_pool(folder, change):
    assert name_of(make_config(folder)) == name_of(make_config(folder, **change), make_caches(blocks=99))


def test_replicas_share_a_pool(folder):
    config = make_config(folder)
    names = {name_of(config)}
    for rank in range(2):
        _set("parallel_config", data_parallel_size=2, data_parallel_rank=rank, data_parallel_index=rank)(config)
        _set("parallel_config", data_parallel_rank_local=rank, data_parallel_master_port=1000 + rank, rank=rank)(config)
        config.kv_transfer_config.engine_id = f"engine {rank}"
        names.add(name_of(config))
    assert len(names) == 1


def test_a_length_cut_to_fit_the_memory_is_the_same_pool(folder):
    config = make_config(folder, model={"max_model_len": -1})
    before = name_of(config)
    config.model_config.max_model_len = 1234
    assert name_of(config) == before
    assert name_of(make_config(folder, model={"max_model_len": 1234})) != before


def test_the_digest_is_of_what_json_has(folder):
    found = facts_of(make_config(folder))

    def turn(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turn(each) for key, each in reversed(value.items())}
        return [turn(each) for each in value] if isinstance(value, list) else value

    assert list(turn(found)) != list(found)
    assert namespace.digest(turn(found), "") == namespace.digest(json.loads(json.dumps(found)), "")
    assert namespace.digest(turn(found), "") == namespace.digest(found, "")


@pytest.mark.starts_process
def test_another_process_finds_the_same(folder, monkeypatch):
    script = (
        "import sys, pathlib, pytest; from tests import conftest, test_namespace as t; "
        "t.know_llama(pytest.MonkeyPatch()); "
        "print('digest', t.name_of(t.make_config(pathlib.Path(sys.argv[1]))).hex())"
    )
    arguments = [sys.executable, "-c", script, str(folder)]
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    assert f"digest {name_of(make_config(folder)).hex()}" in output


# ------------------------------------------------------------------------------------------------- what is not known


@pytest.mark.parametrize("spec", [MagicMock(), MagicMock(spec=OffloadingSpec)], ids=["a mock", "a mock of a spec"])
def test_nothing_of_a_mock_counts(spec):
    found = namespace.facts(spec, 64)
    assert found.keys() == {"vllm", "row_bytes", "device"}
    assert namespace.digest(found, "") == namespace.digest(namespace.facts(MagicMock(), 64), "")
    namespace.check_seed(spec)


def test_a_spec_without_vllms_configuration_is_refused(folder):
    spec = make_spec(make_config(folder), make_caches())
    for name in ("vllm_config", "kv_cache_config"):
        vars(spec).pop(name, None)
    with pytest.raises(ValueError, match=r"^vLLM's VllmConfig cannot be found, so nobody knows what"):
        namespace.facts(spec, ROW_BYTES)
    vllm_config = make_config(folder)
    with pytest.raises(ValueError, match=r"^vLLM's KVCacheConfig cannot be found, so nobody knows what"):
        namespace.facts(spec, ROW_BYTES)
    del vllm_config


def test_a_field_that_a_later_vllm_lacks_is_refused(folder):
    config = make_config(folder)
    facts_of(config)
    vllm_config, kv_cache_config = config, make_caches()
    spec = make_spec(vllm_config, kv_cache_config)
    config.attention_config = object()
    with pytest.raises(ValueError, match=r"^vLLM .* cannot have a pool: nobody knows its attention config's 'backend'"):
        namespace.facts(spec, ROW_BYTES)


def test_a_value_that_differs_from_run_to_run_is_refused(folder):
    config = make_config(folder)
    config.load_config.model_loader_extra_config = {"reader": object()}
    with pytest.raises(ValueError, match=r"^model_loader_extra_config must be numbers, text and the like with a pool"):
        facts_of(config)


def test_scales_that_differ_from_run_to_run_are_refused(folder):
    config = make_config(folder)
    config.cache_config.calculate_kv_scales = True
    with pytest.raises(ValueError, match=r"^calculate_kv_scales must be false with a pool, not True"):
        facts_of(config)


def test_weights_that_are_sent_to_the_engine_are_refused(folder):
    config = make_config(folder)
    config.weight_transfer_config = object()
    with pytest.raises(ValueError, match=r"^weight_transfer_config must not be set with a pool"):
        facts_of(config)


# ------------------------------------------------------------------------------------------------------------ the seed


def check_seed_of(vllm_config: VllmConfig) -> None:
    kv_cache_config = make_caches()
    namespace.check_seed(make_spec(vllm_config, kv_cache_config))


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"])
def test_a_seed_that_differs_from_run_to_run_is_refused(folder, monkeypatch, algorithm):
    config = make_config(folder)
    config.cache_config.prefix_caching_hash_algo = algorithm
    if algorithm.startswith("sha256") and _HAS_FIXED_SEED:
        check_seed_of(config)
        assert facts_of(config)["seed"] == kv_cache_utils.DEFAULT_NONE_HASH_SEED
    else:
        with pytest.raises(ValueError, match=f"^PYTHONHASHSEED must be set with a pool, .* blocks by {algorithm} "):
            check_seed_of(config)
    for seed in ("0", "7", "random", ""):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        check_seed_of(config)
        assert facts_of(config)["seed"] == seed


@pytest.mark.parametrize("seed", ["0", "random", "", None])
def test_the_seed_is_the_one_that_vllm_hashes_with(folder, monkeypatch, seed):
    if seed is not None:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    found = facts_of(make_config(folder))["seed"]
    kv_cache_utils.init_none_hash(get_hash_fn_by_name("sha256"))
    if found is not None:
        assert get_hash_fn_by_name("sha256")(found) == kv_cache_utils.NONE_HASH
    else:
        before = kv_cache_utils.NONE_HASH
        kv_cache_utils.init_none_hash(get_hash_fn_by_name("sha256"))
        assert before != kv_cache_utils.NONE_HASH


def test_another_seed_is_another_pool(folder, monkeypatch):
    config = make_config(folder)
    names = []
    for seed in ("0", "1"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        names.append(name_of(config))
    assert names[0] != names[1]
