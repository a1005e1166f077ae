"""vLLM's server with no offloading, with its primary tier alone, with its fs tier on tmpfs, and with this tier.

Conversations of several turns over a working set several times the KV cache and the primary: when a conversation goes
on, its blocks have left both. Also the floor, a prompt that is still in vLLM's own KV cache, and what a tier costs
where nothing is ever asked for again. One server after the other: an idle one would take a core for seconds after each
answer, because its processes look for work without sleeping. All are asked the same, one request at a time, and all
answers must be equal to the letter.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import BUILD, Figure, Run, Spread, arguments, figure
from benchmarks.demo import BLOCK_TOKENS, FLOAT32_BYTES, documents
from benchmarks.model import kv_bytes_per_token, smollm2
from benchmarks.server import Server, serve
from benchmarks.tiers import TMPFS

CONVERSATIONS, TURNS, TOKENS = 5, 3, 1800
# Of an answer: enough to see that texts are equal, few, because decoding is not what is measured.
MAX_TOKENS = 12
# Prompts that are asked once, of fewer tokens: on two cores each takes a second.
UNIQUE_PROMPTS, UNIQUE_TOKENS = 24, 500
QUESTION = "\nTurn {turn}: which warehouse is named next, and what does it hold?\nAnswer:"
NO_OFFLOAD, PRIMARY, FS, OURS = "no offloading", "primary alone", "fs", "ours"
VS_RECOMPUTE, VS_KV_CACHE, VS_FS, OVERHEAD = 0.15, 1.3, 1.0, 0.02
COLORS = {NO_OFFLOAD: "#8c8c8c", PRIMARY: "#c44e52", FS: "#dd8452", OURS: "#4c72b0"}


@dataclass
class Contender:
    """A server and what it was measured to do. Times in seconds."""

    server: Server
    first_turns: list[float] = field(default_factory=list)
    later_turns: list[float] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)
    unique: list[float] = field(default_factory=list)
    tokens_a_second: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def ask(self, prompt: str) -> tuple[float, float, str]:
        """(time to first token, time to the last, the text) of a greedy completion of MAX_TOKENS tokens."""
        from openai import OpenAI

        client = OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0)
        started = time.perf_counter()
        first = None
        text = ""
        for part in client.completions.create(
            model="model",
            prompt=prompt,
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            first = first or time.perf_counter() - started
            text += part.choices[0].text if part.choices else ""
        if first is None:
            raise RuntimeError("the server sent no token")
        return first, time.perf_counter() - started, text

    def hit_ratio(self) -> float:
        """Of the second tier's lookups, by vLLM's own count."""
        metrics = self.server.metrics()

        def total(name: str) -> float:
            prefix = f"vllm:kv_offload_tiering_{name}"
            return sum(value for (metric, tier), value in metrics.items() if metric == prefix and tier.startswith("1:"))

        queries = total("chunk_queries_total")
        return total("chunk_hits_total") / queries if queries else 0.0


def converse(contender: Contender, texts: list[str], turns: int, answers: list[str]) -> None:
    """All conversations, turn by turn; each later turn at once again, for the floor.

    answers: what the first server said, with which conversations go on; of the first server itself still empty.
    """
    contexts = list(texts)
    for turn in range(turns):
        for number in range(len(contexts)):
            prompt = contexts[number] + QUESTION.format(turn=turn + 1)
            first, whole, text = contender.ask(prompt)
            said = answers[len(contender.texts)] if answers else text
            contender.texts.append(text)
            (contender.later_turns if turn else contender.first_turns).append(first)
            if turn:
                contender.tokens_a_second.append(MAX_TOKENS / whole)
                contender.repeated.append(contender.ask(prompt)[0])
            contexts[number] = prompt + said


def settings(
    model: Path | str, tokens: int, turns: int, working_set: int, folder: str
) -> tuple[list[str], dict[str, dict[str, Any] | None]]:
    """Arguments of all servers, and what is behind the KV cache of each. working_set: bytes of all conversations."""
    block_bytes = kv_bytes_per_token(model, FLOAT32_BYTES) * BLOCK_TOKENS
    # One conversation fits in the KV cache, and its blocks in the primary; two do not.
    blocks = -(-(tokens + turns * 60) // BLOCK_TOKENS) + 3
    options = ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_TOKENS), "--max-num-seqs", "2"]
    options += ["--max-model-len", str((blocks - 1) * BLOCK_TOKENS), "--num-gpu-blocks-override", str(blocks)]
    options += ["--shutdown-timeout", "30"]
    offloading = {
        "spec_name": "CPUBackendTieringSpec",
        "spec_module_path": "async_tier.cpu_backend",
        "cpu_bytes_to_use": blocks * block_bytes,
    }
    return options, {
        NO_OFFLOAD: None,
        PRIMARY: {**offloading, "secondary_tiers": []},
        FS: {**offloading, "secondary_tiers": [{"type": "fs", "root_dir": folder}]},
        OURS: {**offloading, "secondary_tiers": [{"type": "async", "bytes_to_use": 2 * working_set}]},
    }


def main() -> int:
    from transformers import AutoTokenizer

    parser = arguments(__doc__)
    parser.add_argument("--model", default="", help="a folder, or a name that vLLM knows (default: SmolLM2-135M)")
    options = parser.parse_args()
    conversations, turns, tokens, unique = (
        (2, 2, 500, 2) if options.quick else (CONVERSATIONS, TURNS, TOKENS, UNIQUE_PROMPTS)
    )
    run = Run(
        "serving",
        f"{conversations} conversations of {tokens} tokens and {turns} turns, round robin; the first turn and one "
        f"request a server warm up; then every turn, and at once the same prompt again. Then {unique} prompts of "
        f"{UNIQUE_TOKENS} tokens that share nothing. One server after the other, one request at a time; "
        f"{MAX_TOKENS} tokens an answer, float32.",
        options.output,
    )
    run.output.parent.mkdir(parents=True, exist_ok=True)
    model = options.model or smollm2(BUILD.parent / "SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = documents(conversations, tokens, tokenizer)
    others = documents(conversations + unique, UNIQUE_TOKENS, tokenizer)[conversations:]
    working_set = conversations * (tokens + turns * 60) * kv_bytes_per_token(model, FLOAT32_BYTES)
    contenders: dict[str, Contender] = {}
    hits = {}
    with tempfile.TemporaryDirectory(prefix="async-tier-serving-", dir=TMPFS) as folder:
        server_options, configurations = settings(model, tokens, turns, working_set, folder)
        for number, (name, configuration) in enumerate(configurations.items()):
            run.progress(f"a server: {name}")
            with serve(
                model,
                run.output.with_name(f"serving-{number}.log"),
                name=f"async-tier-serving-{os.getpid()}-{number}",
                offloading=configuration,
                arguments=server_options,
            ) as server:
                contenders[name] = contender = Contender(server)
                contender.ask("Hello.")  # the first request of a server pays for what it builds on first use
                converse(contender, texts, turns, contenders[NO_OFFLOAD].texts if number else [])
                if name in (FS, OURS):
                    hits[name] = contender.hit_ratio()
                # Each begins with a number of its own, so that not even their first block is shared.
                contender.unique = [contender.ask(f"{at} {text}")[1] for at, text in enumerate(others)]
            told = ", ".join(f"{each * 1e3:.0f}" for each in contender.later_turns)
            run.progress(f"{name}: later turns {told} ms to the first token")
    tracebacks = sum(len(contender.server.tracebacks()) for contender in contenders.values())
    report(run, contenders, hits)
    draw(run, contenders)
    run.finish()
    wrong = []
    if any(contender.texts != contenders[NO_OFFLOAD].texts for contender in contenders.values()):
        wrong.append("an answer differs between the servers")
    if tracebacks:
        wrong.append(f"the servers' logs have {tracebacks} tracebacks")
    for sentence in wrong:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def report(run: Run, contenders: dict[str, Contender], hits: dict[str, float]) -> None:
    def milliseconds(times: list[float]) -> dict[str, Any]:
        return {
            **{name: value * 1e3 for name, value in asdict(Spread.of(times)).items()},
            "p99": float(np.percentile(times, 99)) * 1e3,
            "samples": len(times),
        }

    run.results = {
        name: {
            "ttft_ms_first_turn": milliseconds(contender.first_turns),
            "ttft_ms_later_turns": milliseconds(contender.later_turns),
            "ttft_ms_kv_cache_hit": milliseconds(contender.repeated),
            "tokens_a_second": asdict(Spread.of(contender.tokens_a_second)),
            "hit_ratio_of_the_tier": hits.get(name),
            "seconds_unique_prompts": asdict(Spread.of(contender.unique)),
        }
        for name, contender in contenders.items()
    }
    p50 = {name: statistics.median(each.later_turns) * 1e3 for name, each in contenders.items()}
    floor = statistics.median(contenders[OURS].repeated) * 1e3
    pairs = list(zip(contenders[OURS].unique, contenders[NO_OFFLOAD].unique, strict=True))
    once = {name: statistics.median(contenders[name].unique) for name in (NO_OFFLOAD, OURS)}
    print(f"{'time to first token, ms':24}{'first turn':>12}{'later, p50':>12}{'p99':>9}{'again':>9}{'tokens/s':>10}")
    for name, found in run.results.items():
        print(
            f"{name:24}{found['ttft_ms_first_turn']['median']:12.0f}{found['ttft_ms_later_turns']['median']:12.0f}"
            f"{found['ttft_ms_later_turns']['p99']:9.0f}{found['ttft_ms_kv_cache_hit']['median']:9.0f}"
            f"{found['tokens_a_second']['median']:10.1f}"
        )
    print(f"hit ratios of the second tier: {', '.join(f'{name} {ratio:.2f}' for name, ratio in hits.items())}")
    shared = {"unit": "ms", "goal_is": "<=", "ours": p50[OURS]}
    run.figures = [
        Figure(
            key="serving.ttft_vs_recompute",
            what="p50 of later turns, from the tier / recomputed (limit: recomputed)",
            ratio=p50[OURS] / p50[NO_OFFLOAD],
            goal=VS_RECOMPUTE,
            limit=p50[NO_OFFLOAD],
            fs=p50[FS],
            **shared,
        ),
        Figure(
            key="serving.ttft_vs_kv_cache_hit",
            what="p50 of later turns, from the tier / the same prompt in the KV cache (limit)",
            ratio=p50[OURS] / floor,
            goal=VS_KV_CACHE,
            limit=floor,
            **shared,
        ),
        Figure(
            key="serving.ttft_vs_fs",
            what="p50 of later turns, from the tier / from the fs tier",
            ratio=p50[OURS] / p50[FS],
            goal=VS_FS,
            fs=p50[FS],
            **shared,
        ),
        Figure(
            key="serving.no_reuse_overhead",
            what="a prompt that shares nothing, with the tier / without offloading (limit), median, less 1",
            unit="s",
            ratio=statistics.median(ours / without for ours, without in pairs) - 1,
            goal=OVERHEAD,
            goal_is="<=",
            ours=once[OURS],
            limit=once[NO_OFFLOAD],
        ),
    ]


def draw(run: Run, contenders: dict[str, Contender]) -> None:
    with figure(run.picture, figsize=(8, 4.2)) as (_, axes):
        groups = ["first turn", "later turns", "again at once"]
        for place, (name, contender) in enumerate(contenders.items()):
            times = [contender.first_turns, contender.later_turns, contender.repeated]
            spreads = [Spread.of(each) for each in times]
            left = [at + (place - 1.5) * 0.2 for at in range(len(groups))]
            errors = [[each.median - each.low for each in spreads], [each.high - each.median for each in spreads]]
            axes.bar(left, [each.median for each in spreads], 0.19, yerr=errors, color=COLORS[name], label=name)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_yscale("log")
        axes.set_ylabel("time to first token, s")
        axes.set_title("Conversations that left the KV cache and the primary (median, quartiles)")
        axes.grid(alpha=0.3, axis="y")
        axes.legend()


if __name__ == "__main__":
    sys.exit(main())
