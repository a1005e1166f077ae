"""vLLM's server with no offloading, with its primary tier alone, with its fs tier on tmpfs, and with this tier.

Conversations of several turns over a working set several times the KV cache and the primary: when a conversation goes
on, its blocks have left both. Also the floor, a prompt that is still in vLLM's own KV cache, and what a tier costs
where nothing is ever asked for again. The four servers take turns, so that a noisy machine is as noisy to each, and all
but one are paused: an idle one would take a core for seconds after each answer, because its processes look for work
without sleeping. All are asked the same, one request at a time, and all answers must be equal to the letter.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import BUILD, Figure, Run, Spread, arguments, figure
from benchmarks.demo import BLOCK_TOKENS, FLOAT32_BYTES, documents
from benchmarks.model import kv_bytes_per_token, smollm2
from benchmarks.server import Server, serve
from benchmarks.tiers import TMPFS

CONVERSATIONS, TURNS, TOKENS = 5, 4, 1800
# Of an answer: enough to see that texts are equal, few, because decoding is not what is measured.
MAX_TOKENS = 12
# Prompts that are asked once, of fewer tokens: on two cores each takes half a second. They are asked in rounds, a few
# on one server and the same on the next; servers change places, so a multiple of their number.
ROUNDS, PROMPTS_A_ROUND, UNIQUE_TOKENS = 8, 5, 500
# At most, that a turn adds to a conversation: the question, the answer.
TURN_TOKENS = 60
QUESTION = "\nTurn {turn}: which warehouse is named next, and what does it hold?\nAnswer:"
NO_OFFLOAD, PRIMARY, FS, OURS = "no offloading", "primary alone", "fs", "ours"
VS_RECOMPUTE, VS_KV_CACHE, VS_FS, OVERHEAD = 0.15, 1.3, 1.0, 0.02
# Of prompts that share nothing, or whose blocks are gone: less than one block of a prompt.
NO_HITS = 0.05
# Of the interval around a median.
RESAMPLES = 5000
# Of a GPU's memory, for each of the four servers that share it.
GPU_SHARE = "0.2"
COLORS = {NO_OFFLOAD: "#8c8c8c", PRIMARY: "#c44e52", FS: "#dd8452", OURS: "#4c72b0"}


@dataclass(frozen=True)
class Answer:
    """A greedy completion of MAX_TOKENS tokens. Times in seconds from the request."""

    first: float
    last: float
    text: str
    prompt_tokens: int
    cached_tokens: int  # of the prompt: from the KV cache and from the tiers

    @classmethod
    def of(cls, server: Server, prompt: str) -> Answer:
        from openai import OpenAI

        first = usage = None
        text = ""
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            started = time.perf_counter()
            for part in client.completions.create(
                model="model",
                prompt=prompt,
                max_tokens=MAX_TOKENS,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            ):
                if part.choices:
                    last = time.perf_counter() - started
                    first = first or last
                    text += part.choices[0].text
                usage = part.usage or usage
        if first is None or usage is None or usage.prompt_tokens_details is None:
            raise RuntimeError("the server sent no token, or does not say how many of the prompt it had")
        return cls(first, last, text, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0)


@dataclass
class Contender:
    """A server, and what it answered, in the order of asking."""

    server: Server
    turns: list[list[Answer]] = field(default_factory=list)
    repeated: list[Answer] = field(default_factory=list)
    unique: list[Answer] = field(default_factory=list)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the server run, and ask it something short first, which pays for what waking up costs."""
        self.server.resume()
        Answer.of(self.server, "Hello.")
        yield
        self.server.pause()

    @property
    def later(self) -> list[Answer]:
        return [answer for turn in self.turns[1:] for answer in turn]

    @property
    def texts(self) -> list[str]:
        answers = [*(answer for turn in self.turns for answer in turn), *self.repeated, *self.unique]
        return [answer.text for answer in answers]

    def converse(self, contexts: list[str]) -> None:
        """The next turn of all conversations; a later one at once again, for the floor. Extends `contexts`."""
        self.turns.append([])
        for number, context in enumerate(contexts):
            prompt = context + QUESTION.format(turn=len(self.turns))
            answer = Answer.of(self.server, prompt)
            self.turns[-1].append(answer)
            if len(self.turns) > 1:
                self.repeated.append(Answer.of(self.server, prompt))
            contexts[number] = prompt + answer.text

    def hit_ratio(self) -> float | None:
        """Of the second tier's lookups, by vLLM's own count; None if there were none."""
        metrics = self.server.metrics()

        def total(name: str) -> float:
            prefix = f"vllm:kv_offload_tiering_{name}"
            return sum(value for (metric, tier), value in metrics.items() if metric == prefix and tier.startswith("1:"))

        queries = total("chunk_queries_total")
        return total("chunk_hits_total") / queries if queries else None


def cached_share(answers: list[Answer]) -> float:
    """Of the tokens of these prompts, how many were not computed."""
    return sum(answer.cached_tokens for answer in answers) / sum(answer.prompt_tokens for answer in answers)


def overhead(mine: list[Answer], theirs: list[Answer]) -> Spread:
    """What `mine` took more than `theirs`, prompt by prompt: the median, and what it may be but for chance (90 %).

    An answer's time varies by a fifth here with nothing changed, so the interval is wider than the goal.
    """
    ratios = np.array([one.last / other.last for one, other in zip(mine, theirs, strict=True)]) - 1
    medians = np.median(np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    return Spread(float(np.median(ratios)), float(np.percentile(medians, 5)), float(np.percentile(medians, 95)))


def settings(
    model: Path | str, tokens: int, turns: int, working_set: int, folder: str
) -> tuple[list[str], dict[str, dict[str, Any] | None]]:
    """Arguments of all servers, and what is behind the KV cache of each. working_set: bytes of all conversations.

    The tiers' own settings are their defaults: 2 copy threads of ours, 16 readers and 16 writers of fs. The copies
    between KV cache and primary are the same for all: vLLM's on a GPU, one thread of ours on a CPU.
    """
    from vllm.platforms import current_platform

    block_bytes = kv_bytes_per_token(model, FLOAT32_BYTES) * BLOCK_TOKENS
    # One conversation fits in the KV cache, and its blocks in the primary; two do not.
    blocks = -(-(tokens + turns * TURN_TOKENS) // BLOCK_TOKENS) + 3
    options = ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_TOKENS), "--max-num-seqs", "2"]
    options += ["--max-model-len", str((blocks - 1) * BLOCK_TOKENS), "--num-gpu-blocks-override", str(blocks)]
    options += ["--enable-prompt-tokens-details", "--shutdown-timeout", "30"]
    offloading: dict[str, Any] = {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": blocks * block_bytes}
    if current_platform.is_cpu():
        offloading |= {"spec_name": "CPUBackendTieringSpec", "spec_module_path": "async_tier.cpu_backend"}
    else:
        options += ["--gpu-memory-utilization", GPU_SHARE]
    return options, {
        NO_OFFLOAD: None,
        PRIMARY: {**offloading, "secondary_tiers": []},
        FS: {**offloading, "secondary_tiers": [{"type": "fs", "root_dir": folder}]},
        OURS: {**offloading, "secondary_tiers": [{"type": "async", "bytes_to_use": 2 * working_set}]},
    }


def in_turns(contenders: dict[str, Contender], first: int) -> Iterator[tuple[str, Contender]]:
    """Each server once, awake while it is its turn; the one that begins is number `first`."""
    names = list(contenders)
    for at in range(len(names)):
        name = names[(first + at) % len(names)]
        with contenders[name].awake():
            yield name, contenders[name]


def measure(run: Run, contenders: dict[str, Contender], texts: list[str], turns: int, others: list[str]) -> None:
    """Ask all servers everything. texts: of the conversations; others: prompts that share nothing."""
    contexts = {name: list(texts) for name in contenders}
    hits: dict[str, float | None] = {}
    for turn in range(turns):
        for name, contender in in_turns(contenders, turn):
            contender.converse(contexts[name])
            told = ", ".join(f"{answer.first * 1e3:.0f}" for answer in contender.turns[-1])
            run.progress(f"turn {turn + 1}, {name}: {told} ms to the first token")
            hits[name] = contender.hit_ratio()
    rounds = range(0, len(others), PROMPTS_A_ROUND)
    for at, begin in enumerate(rounds):
        for _, contender in in_turns(contenders, at):
            prompts = others[begin : begin + PROMPTS_A_ROUND]
            contender.unique += [Answer.of(contender.server, prompt) for prompt in prompts]
        told = ", ".join(
            f"{name} {statistics.median(answer.last for answer in contender.unique[begin:]):.2f}"
            for name, contender in contenders.items()
        )
        run.progress(f"prompts asked once, round {at + 1} of {len(rounds)}: {told} s each")
    run.results = {name: results(contender, hits[name]) for name, contender in contenders.items()}


def results(contender: Contender, hit_ratio: float | None) -> dict[str, Any]:
    def spread(answers: list[Answer]) -> dict[str, Any]:
        times = [answer.first * 1e3 for answer in answers]
        return {**asdict(Spread.of(times)), "p99": float(np.percentile(times, 99)), "samples": len(times)}

    return {
        "ttft_ms_first_turn": spread(contender.turns[0]),
        "ttft_ms_later_turns": spread(contender.later),
        "ttft_ms_by_turn": [spread(turn) for turn in contender.turns],
        "ttft_ms_kv_cache_hit": spread(contender.repeated),
        "ttft_ms_unique_prompts": spread(contender.unique),
        "tokens_a_second": asdict(Spread.of([MAX_TOKENS / answer.last for answer in contender.later])),
        "hit_ratio_of_the_tier": hit_ratio,
        "cached_share_of_later_turns": cached_share(contender.later),
        "cached_share_when_repeated": cached_share(contender.repeated),
        "cached_share_of_unique_prompts": cached_share(contender.unique),
        "seconds_unique_prompts": asdict(Spread.of([answer.last for answer in contender.unique])),
    }


def report(run: Run, contenders: dict[str, Contender]) -> None:
    print(f"{'time to first token, ms':24}{'first turn':>12}{'later, p50':>12}{'p99':>9}{'again':>9}{'tokens/s':>10}")
    for name, found in run.results.items():
        print(
            f"{name:24}{found['ttft_ms_first_turn']['median']:12.0f}{found['ttft_ms_later_turns']['median']:12.0f}"
            f"{found['ttft_ms_later_turns']['p99']:9.0f}{found['ttft_ms_kv_cache_hit']['median']:9.0f}"
            f"{found['tokens_a_second']['median']:10.1f}"
        )
    print("of later prompts' tokens, not computed, and of the second tier's lookups, hits:")
    for name, found in run.results.items():
        ratio = found["hit_ratio_of_the_tier"]
        print(f"  {name:22}{found['cached_share_of_later_turns']:12.2f}{'-' if ratio is None else f'{ratio:.2f}':>12}")
    overheads = {
        name: overhead(contender.unique, contenders[NO_OFFLOAD].unique)
        for name, contender in contenders.items()
        if name != NO_OFFLOAD
    }
    print("what prompts that share nothing take more than with no offloading, median and 90 % interval:")
    for name, found in overheads.items():
        run.results[name]["no_reuse_overhead"] = asdict(found)
        print(f"  {name:22}{found}")
    p50 = {name: found["ttft_ms_later_turns"]["median"] for name, found in run.results.items()}
    floor = run.results[OURS]["ttft_ms_kv_cache_hit"]["median"]
    once = {name: found["seconds_unique_prompts"]["median"] for name, found in run.results.items()}
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
            ratio=overheads[OURS].median,
            goal=OVERHEAD,
            goal_is="<=",
            ours=once[OURS],
            fs=once[FS],
            limit=once[NO_OFFLOAD],
        ),
    ]


def failures(contenders: dict[str, Contender]) -> list[str]:
    """What makes the figures worthless, in words: other texts, or hits where there should be none and the reverse."""
    wrong = []
    for name, contender in contenders.items():
        texts = zip(contender.texts, contenders[NO_OFFLOAD].texts, strict=True)
        if differing := sum(one != other for one, other in texts):
            wrong.append(f"{name}: {differing} of {len(contender.texts)} answers differ from those with no offloading")
        if (share := cached_share(contender.unique)) > NO_HITS:
            wrong.append(f"{name}: {share:.0%} of prompts that share nothing were cached")
        if name in (NO_OFFLOAD, PRIMARY) and (share := cached_share(contender.later)) > NO_HITS:
            wrong.append(f"{name}: {share:.0%} of later turns were not recomputed")
        # But for a block that the question or the answer before it has filled.
        pairs = list(zip(contender.later, contender.repeated, strict=True))
        short = sum(again.cached_tokens - later.cached_tokens > BLOCK_TOKENS for later, again in pairs)
        if name in (FS, OURS) and short:
            wrong.append(f"{name}: {short} of {len(pairs)} later turns did not come from the tier")
        if any(again.cached_tokens < again.prompt_tokens - BLOCK_TOKENS for _, again in pairs):
            wrong.append(f"{name}: a prompt that was repeated at once was not in the KV cache")
        if tracebacks := contender.server.tracebacks():
            wrong.append(f"{name}: the server's log has {len(tracebacks)} tracebacks")
    return wrong


def draw(run: Run) -> None:
    with figure(run.picture, figsize=(10, 4.4), ncols=2, width_ratios=(3, 2), sharey=True) as (drawn, (by_turn, bars)):
        for name, found in run.results.items():
            spreads = found["ttft_ms_by_turn"]
            turns = range(1, len(spreads) + 1)
            lows, highs = [each["low"] for each in spreads], [each["high"] for each in spreads]
            by_turn.fill_between(turns, lows, highs, color=COLORS[name], alpha=0.2, linewidth=0)
            by_turn.plot(turns, [each["median"] for each in spreads], "o-", color=COLORS[name], label=name)
        by_turn.set_xticks(turns)
        by_turn.set_xlabel("turn of the conversations")
        by_turn.set_ylabel("time to first token, ms")
        by_turn.legend()
        shown = {
            "recomputed": (NO_OFFLOAD, "ttft_ms_later_turns"),
            "fs tier": (FS, "ttft_ms_later_turns"),
            "this tier": (OURS, "ttft_ms_later_turns"),
            "KV cache\n(the floor)": (OURS, "ttft_ms_kv_cache_hit"),
        }
        for at, (name, key) in enumerate(shown.values()):
            each = run.results[name][key]
            errors = [[each["median"] - each["low"]], [each["high"] - each["median"]]]
            hatch = "//" if "hit" in key else None
            bars.bar(at, each["median"], 0.7, yerr=errors, color=COLORS[name], hatch=hatch, edgecolor="white")
            bars.annotate(f"{each['median']:.0f}", (at, each["high"]), (0, 3), textcoords="offset points", ha="center")
        bars.set_xticks(range(len(shown)), list(shown))
        bars.set_xlabel("later turns")
        for axes in (by_turn, bars):
            axes.set_yscale("log")
            axes.grid(alpha=0.3, axis="y")
        drawn.suptitle("Conversations that have left the KV cache and the primary (median, quartiles)")


def main() -> int:
    from transformers import AutoTokenizer

    parser = arguments(__doc__)
    parser.add_argument("--model", default="", help="a folder, or a name that vLLM knows (default: SmolLM2-135M)")
    options = parser.parse_args()
    conversations, turns, tokens, rounds = (3, 2, 500, 1) if options.quick else (CONVERSATIONS, TURNS, TOKENS, ROUNDS)
    run = Run(
        "serving",
        f"{conversations} conversations of {tokens} tokens and {turns} turns, round robin; the first turn warms up; "
        f"then every turn, and at once the same prompt again. Then {rounds} rounds of {PROMPTS_A_ROUND} prompts of "
        f"{UNIQUE_TOKENS} tokens that share nothing. Servers change after every turn and round, all but "
        f"one are paused, and a short request after each change is not measured. One request at a time; {MAX_TOKENS} "
        f"tokens an answer, float32; tokens a second include the wait for the first.",
        options.output,
    )
    run.output.parent.mkdir(parents=True, exist_ok=True)
    model = options.model or smollm2(BUILD.parent / "SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = documents(conversations, tokens, tokenizer)
    others = documents(conversations + rounds * PROMPTS_A_ROUND, UNIQUE_TOKENS, tokenizer)[conversations:]
    # Each begins with a number of its own, so that not even their first block is shared.
    others = [f"{at} {text}" for at, text in enumerate(others)]
    working_set = conversations * (tokens + turns * TURN_TOKENS) * kv_bytes_per_token(model, FLOAT32_BYTES)
    contenders: dict[str, Contender] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="async-tier-serving-", dir=TMPFS))
        server_options, configurations = settings(model, tokens, turns, working_set, folder)
        for number, (name, configuration) in enumerate(configurations.items()):
            run.progress(f"a server: {name}")
            server = stack.enter_context(
                serve(
                    model,
                    run.output.with_name(f"serving-{number}.log"),
                    name=f"async-tier-serving-{os.getpid()}-{number}",
                    offloading=configuration,
                    arguments=server_options,
                )
            )
            contenders[name] = Contender(server)
            with contenders[name].awake():
                pass  # the first request of a server pays for what it builds on first use
        measure(run, contenders, texts, turns, others)
    report(run, contenders)
    draw(run)
    run.finish()
    wrong = failures(contenders)
    for sentence in wrong:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
