"""What the answers of the servers say: see serving, which asks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.bench.conversations import FS, NO_OFFLOAD, OURS, Contender
from benchmarks.demo.demo import BLOCK_TOKENS
from benchmarks.demo.server import Answer
from benchmarks.shared.common import Figure, Run, Spread, chance_interval

# Of prompts that share nothing, or whose blocks are gone: less than one block of a prompt.
NO_HITS = 0.05
CHANCE = "interval: 90 %, by the bootstrap of prompts"


def cached_share(answers: Sequence[Answer]) -> float:
    """Of the tokens of these prompts, how many were not computed."""
    return sum(answer.cached_tokens for answer in answers) / sum(answer.prompt_tokens for answer in answers)


def compared(mine: Sequence[float], theirs: Sequence[float], less: float = 0.0) -> dict[str, Any]:
    """The median of ratios, prompt by prompt, and what it may be but for chance; `less` is taken off each of these.

    By the prompt, because prompts differ: of some vLLM has to compute three times as many tokens as of others.
    """

    def estimate(mine: np.ndarray, theirs: np.ndarray) -> Any:
        return np.median(mine / theirs, axis=-1) - less

    low, high = chance_interval(estimate, mine, theirs, paired=True)
    return {"ratio": float(estimate(np.array(mine), np.array(theirs))), "low": low, "high": high, "paired": True}


def overhead(mine: Mapping[int, Answer], theirs: Mapping[int, Answer]) -> dict[str, Any]:
    """What the prompts that both have by number take more of `mine`."""
    asked = [number for number in mine if number in theirs]
    return compared([mine[number].last for number in asked], [theirs[number].last for number in asked], less=1.0)


def results(contender: Contender) -> dict[str, Any]:
    def spread(answers: Sequence[Answer]) -> dict[str, Any] | None:
        times = [answer.first * 1e3 for answer in answers]
        return {**asdict(Spread.of(times)), "largest": max(times), "each": times} if times else None

    unique = list(contender.unique.values())
    return {
        "ttft_ms_first_turn": spread(contender.turns[0]),
        "ttft_ms_later_turns": spread(contender.later),
        "ttft_ms_kv_cache_hit": spread(contender.repeated),
        "ttft_ms_unique_prompts": spread(unique),
        "tokens_a_second": asdict(Spread.of([answer.tokens / answer.last for answer in contender.later])),
        "cached_share_of_later_turns": cached_share(contender.later),
        "cached_share_of_unique_prompts": cached_share(unique),
        "seconds_unique_prompts": asdict(Spread.of([answer.last for answer in unique])),
    }


def report(run: Run, contenders: dict[str, Contender], block_bytes: int) -> None:
    """Fill in results, figures and failures, and print what the table of figures does not say."""
    run.results = {name: results(contender) for name, contender in contenders.items()}
    run.failures = failures(contenders, block_bytes)
    print_results(run)
    p50 = {name: found["ttft_ms_later_turns"]["median"] for name, found in run.results.items()}
    # The prompts of all servers' later turns are in the same order; one server was asked the first of them only.
    first = {name: [answer.first for answer in each.later] for name, each in contenders.items()}
    again = [answer.first for answer in contenders[OURS].repeated]
    once = {name: found["seconds_unique_prompts"]["median"] for name, found in run.results.items()}
    for key, what, goal, baseline, shown in (
        (
            "ttft_vs_recompute",
            "the same recomputed (baseline",
            "<= 0.15",
            first[NO_OFFLOAD],
            {"limit": p50[NO_OFFLOAD], "fs": p50[FS]},
        ),
        (
            "ttft_vs_kv_cache_hit",
            "the same prompts in the KV cache (limit",
            "<= 1.3",
            again,
            {"limit": run.results[OURS]["ttft_ms_kv_cache_hit"]["median"]},
        ),
        ("ttft_vs_fs", "the same from the fs tier (fs", "<= 1", first[FS], {"fs": p50[FS]}),
    ):
        run.figures.append(
            Figure(
                key=f"serving.{key}",
                what=f"time to first token of later turns / of {what}; {CHANCE})",
                unit="ms",
                goal=goal,
                ours=p50[OURS],
                **shown,
                **compared(first[OURS][: len(baseline)], baseline),
            )
        )
    run.figures.append(
        Figure(
            key="serving.no_reuse_overhead",
            what=f"seconds of a prompt that shares nothing / with no offloading (baseline), less 1 ({CHANCE})",
            unit="s",
            goal="<= 0.02",
            ours=once[OURS],
            fs=once[FS],
            limit=once[NO_OFFLOAD],
            **overhead(contenders[OURS].unique, contenders[NO_OFFLOAD].unique),
        )
    )


def print_results(run: Run) -> None:
    heads = f"{'first turn':>12}{'later, p50':>12}{'largest':>9}{'again':>9}{'tokens/s':>10}{'cached':>9}"
    print(f"{'time to first token, ms':24}{heads}")
    for name, found in run.results.items():
        later, again = found["ttft_ms_later_turns"], found["ttft_ms_kv_cache_hit"]
        print(
            f"  {name:22}{found['ttft_ms_first_turn']['median']:12.0f}{later['median']:12.0f}{later['largest']:9.0f}"
            f"{'-' if again is None else format(again['median'], '.0f'):>9}"
            f"{found['tokens_a_second']['median']:10.1f}{found['cached_share_of_later_turns']:9.2f}"
        )
    print("again: the same prompt at once. cached: of later prompts' tokens, not computed.")


def failures(contenders: dict[str, Contender], block_bytes: int) -> list[str]:
    """What makes the figures worthless, in words: other texts, or hits where there should be none and the reverse."""
    wrong = []
    base, mine = contenders[NO_OFFLOAD], contenders[OURS]
    # Of turns that were not computed from their start by anyone, ours and fs are compared with each other.
    computed = base.turns + mine.turns[len(base.turns) :]
    for name, contender in contenders.items():
        turns = [
            pair
            for turn, of_base in zip(contender.turns, computed, strict=False)
            for pair in zip(turn, of_base, strict=True)
        ]
        again = list(zip(contender.later, contender.repeated, strict=contender.repeats))
        once = [(answer, base.unique[number]) for number, answer in contender.unique.items()]
        differing = sum(one.text != other.text for one, other in (*turns, *once))
        differing += sum(not answer.text.startswith(shorter.text) for answer, shorter in again)
        if differing:
            wrong.append(f"{name}: {differing} of its texts differ from another server's, or when asked again")
        if (share := cached_share(list(contender.unique.values()))) > NO_HITS:
            wrong.append(f"{name}: {share:.0%} of prompts that share nothing were cached")
        # But for a block that the question or the answer before it has filled.
        short = sum(shorter.cached_tokens - answer.cached_tokens > BLOCK_TOKENS for answer, shorter in again)
        if short:
            wrong.append(f"{name}: {short} of {len(again)} later turns did not come from the tier")
        if any(answer.cached_tokens < answer.prompt_tokens - BLOCK_TOKENS for answer in contender.repeated):
            wrong.append(f"{name}: a prompt that was repeated at once was not in the KV cache")
        if tracebacks := contender.server.tracebacks():
            wrong.append(f"{name}: the server's log has {len(tracebacks)} tracebacks")
    if (share := cached_share(base.later)) > NO_HITS:
        wrong.append(f"{NO_OFFLOAD}: {share:.0%} of later turns were not recomputed")
    # Neither the KV cache nor the primary had them.
    hits = sum(answer.cached_tokens for answer in mine.later) // BLOCK_TOKENS * block_bytes
    if mine.read < (1 - NO_HITS) * hits:
        wrong.append(f"{OURS}: the tier gave {mine.read:.0f} bytes of the {hits} that later turns hit")
    blocks = sum(answer.prompt_tokens // BLOCK_TOKENS for answer in mine.unique.values())
    if mine.written != blocks * block_bytes:
        expected = f"{blocks * block_bytes} of {blocks} blocks"
        wrong.append(f"{OURS}: stored {mine.written:.0f} bytes of prompts that share nothing, not the {expected}")
    return wrong
