"""What the answers of the servers say: see serving, which asks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.bench import serving_parts
from benchmarks.demo.demo import BLOCK_TOKENS
from benchmarks.shared.common import Figure, Run, Spread, chance_interval, figure

if TYPE_CHECKING:
    from benchmarks.bench.serving import Answer, Contender

NO_OFFLOAD, PRIMARY, FS, OURS = "no offloading", "primary alone", "fs", "ours"
# Of the overhead: our server and itself, with prompts that it does not offload.
WITHIN = "ours / not offloaded"
VS_RECOMPUTE, VS_KV_CACHE, VS_FS, OVERHEAD = 0.15, 1.3, 1.0, 0.02
# Of prompts that share nothing, or whose blocks are gone: less than one block of a prompt.
NO_HITS = 0.05
# Of fewer samples the 99th percentile is the largest one, and is called that.
FEWEST_FOR_P99 = 100
COLORS = {NO_OFFLOAD: "#8c8c8c", PRIMARY: "#c44e52", FS: "#dd8452", OURS: "#4c72b0"}


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


def overhead(mine: Mapping[int, Answer], theirs: Mapping[int, Answer]) -> dict[str, dict[str, Any]]:
    """What the prompts that both have by number take more of `mine`: in all, to the first token and after it."""
    asked = [number for number in mine if number in theirs]
    times: dict[str, Callable[[Answer], float]] = {
        "in_all": lambda answer: answer.last,
        "to_first_token": lambda answer: answer.first,
        "after_it": lambda answer: answer.last - answer.first,
    }
    return {
        what: compared(
            [seconds(mine[number]) for number in asked], [seconds(theirs[number]) for number in asked], less=1.0
        )
        for what, seconds in times.items()
    }


def results(contender: Contender) -> dict[str, Any]:
    def spread(answers: Sequence[Answer]) -> dict[str, Any] | None:
        if not answers:
            return None
        times = [answer.first * 1e3 for answer in answers]
        p99 = {"p99": float(np.percentile(times, 99))} if len(times) >= FEWEST_FOR_P99 else {"largest": max(times)}
        return {**asdict(Spread.of(times)), **p99, "samples": len(times), "each": times}

    unique = list(contender.unique.values())
    return {
        "ttft_ms_first_turn": spread(contender.turns[0]),
        "ttft_ms_later_turns": spread(contender.later),
        "ttft_ms_by_turn": [spread(turn) for turn in contender.turns],
        "ttft_ms_kv_cache_hit": spread(contender.repeated),
        "ttft_ms_unique_prompts": spread(unique),
        "ttft_ms_of_later_turns_by_part": serving_parts.medians_ms(contender.parts),
        "tokens_a_second": asdict(Spread.of([answer.tokens / answer.last for answer in contender.later])),
        "hit_ratio_of_the_tier": serving_parts.hit_ratio(contender.parts),
        "cached_share_of_later_turns": cached_share(contender.later),
        "cached_share_when_repeated": cached_share(contender.repeated) if contender.repeated else None,
        "cached_share_of_unique_prompts": cached_share(unique),
        "seconds_unique_prompts": asdict(Spread.of([answer.last for answer in unique])),
    }


def report(run: Run, contenders: dict[str, Contender], block_bytes: int) -> None:
    """Fill in results, figures and failures, print what the table of figures does not say, and draw."""
    run.results = {name: results(contender) for name, contender in contenders.items()}
    run.failures = failures(contenders, block_bytes)
    base = contenders[NO_OFFLOAD]
    overheads = {name: overhead(each.unique, base.unique) for name, each in contenders.items() if name != NO_OFFLOAD}
    for name, found in overheads.items():
        run.results[name]["no_reuse_overhead"] = found
    mine = contenders[OURS]
    offloading = overhead(mine.unique, mine.not_offloaded)
    run.results[OURS]["no_reuse_overhead_within_the_server"] = offloading
    within = offloading["in_all"]
    copying = mine.copying / len(mine.unique)
    run.results[OURS]["seconds_of_copy_threads_a_unique_prompt"] = copying
    print_results(run, {**overheads, WITHIN: offloading})
    print(f"of the time of such a prompt, the copy threads of {OURS} had a core for {copying * 1e3:.1f} ms")
    p50 = {name: found["ttft_ms_later_turns"]["median"] for name, found in run.results.items()}
    # The prompts of all servers' later turns are in the same order; some servers were asked the first of them only.
    first = {name: [answer.first for answer in each.later] for name, each in contenders.items()}
    again = [answer.first for answer in contenders[OURS].repeated]
    once = {name: found["seconds_unique_prompts"]["median"] for name, found in run.results.items()}
    shared = {"unit": "ms", "goal_is": "<=", "ours": p50[OURS]}
    chance = "interval: 90 %, by the bootstrap of prompts"
    run.figures = [
        Figure(
            key="serving.ttft_vs_recompute",
            what=f"time to first token of later turns / of the same recomputed (baseline; {chance})",
            goal=VS_RECOMPUTE,
            limit=p50[NO_OFFLOAD],
            fs=p50[FS],
            **compared(first[OURS][: len(first[NO_OFFLOAD])], first[NO_OFFLOAD]),
            **shared,
        ),
        Figure(
            key="serving.ttft_vs_kv_cache_hit",
            what=f"time to first token of later turns / of the same prompts in the KV cache (limit; {chance})",
            goal=VS_KV_CACHE,
            limit=run.results[OURS]["ttft_ms_kv_cache_hit"]["median"],
            **compared(first[OURS], again),
            **shared,
        ),
        Figure(
            key="serving.ttft_vs_fs",
            what=f"time to first token of later turns / of the same from the fs tier ({chance})",
            goal=VS_FS,
            fs=p50[FS],
            **compared(first[OURS], first[FS]),
            **shared,
        ),
        Figure(
            key="serving.no_reuse_overhead",
            what=f"seconds of a prompt that shares nothing / with no offloading (baseline), less 1 ({chance}); "
            f"within our server, offloaded or not: {within['ratio']:.3f} ({within['low']:.3f} to {within['high']:.3f})",
            unit="s",
            goal=OVERHEAD,
            goal_is="<=",
            ours=once[OURS],
            fs=once[FS],
            limit=once[NO_OFFLOAD],
            **overheads[OURS]["in_all"],
        ),
    ]
    draw(run)


def print_results(run: Run, overheads: dict[str, dict[str, dict[str, Any]]]) -> None:
    print(
        f"{'time to first token, ms':24}{'first turn':>12}{'later, p50':>12}{'largest':>9}{'of':>4}{'again':>9}"
        f"{'tokens/s':>10}{'cached':>9}{'tier hits':>11}"
    )
    for name, found in run.results.items():
        later, again, ratio = (
            found[key] for key in ("ttft_ms_later_turns", "ttft_ms_kv_cache_hit", "hit_ratio_of_the_tier")
        )
        print(
            f"  {name:22}{found['ttft_ms_first_turn']['median']:12.0f}{later['median']:12.0f}"
            f"{later.get('largest') or later['p99']:9.0f}{later['samples']:4}"
            f"{'-' if again is None else format(again['median'], '.0f'):>9}"
            f"{found['tokens_a_second']['median']:10.1f}{found['cached_share_of_later_turns']:9.2f}"
            f"{'-' if ratio is None else format(ratio, '.2f'):>11}"
        )
    print("again: the same prompt at once. cached: of later prompts' tokens, not computed. tier hits: of its lookups.")
    print(serving_parts.table({name: each["ttft_ms_of_later_turns_by_part"] for name, each in run.results.items()}))
    print("what prompts that share nothing take more than with no offloading (last: than others on the same server")
    print("that it does not offload), median and 90 % interval:")
    for name, found in overheads.items():
        told = (
            f"{what.replace('_', ' ')} {each['ratio']:.3f} ({each['low']:.3f} to {each['high']:.3f})"
            for what, each in found.items()
        )
        print(f"  {name:22}{', '.join(told)}")


def failures(contenders: dict[str, Contender], block_bytes: int) -> list[str]:
    """What makes the figures worthless, in words: other texts, or hits where there should be none and the reverse."""
    wrong = []
    base = contenders[NO_OFFLOAD]
    # Of turns that were not computed from their start by anyone, ours and fs are compared with each other.
    computed = base.turns + contenders[OURS].turns[len(base.turns) :]
    for name, contender in contenders.items():
        # The primary was asked less, but not other things.
        turns = [
            pair
            for mine, theirs in zip(contender.turns, computed, strict=False)
            for pair in zip(mine, theirs, strict=False)
        ]
        again = list(zip(contender.later, contender.repeated, strict=contender.repeats))
        once = [(answer, base.unique[number]) for number, answer in contender.unique.items()]
        differing = sum(one.text != other.text for one, other in (*turns, *once))
        differing += sum(not answer.text.startswith(shorter.text) for answer, shorter in again)
        if differing:
            wrong.append(f"{name}: {differing} of its texts differ from another server's, or when asked again")
        if (share := cached_share(list(contender.unique.values()))) > NO_HITS:
            wrong.append(f"{name}: {share:.0%} of prompts that share nothing were cached")
        if name in (NO_OFFLOAD, PRIMARY) and (share := cached_share(contender.later)) > NO_HITS:
            wrong.append(f"{name}: {share:.0%} of later turns were not recomputed")
        # But for a block that the question or the answer before it has filled.
        short = sum(shorter.cached_tokens - answer.cached_tokens > BLOCK_TOKENS for answer, shorter in again)
        if short:
            wrong.append(f"{name}: {short} of {len(again)} later turns did not come from the tier")
        if any(answer.cached_tokens < answer.prompt_tokens - BLOCK_TOKENS for answer in contender.repeated):
            wrong.append(f"{name}: a prompt that was repeated at once was not in the KV cache")
        if tracebacks := contender.server.tracebacks():
            wrong.append(f"{name}: the server's log has {len(tracebacks)} tracebacks")
    mine = contenders[OURS]
    if (share := cached_share(list(mine.not_offloaded.values()))) > NO_HITS:
        wrong.append(f"{OURS}: {share:.0%} of prompts that were not to be offloaded were cached")
    blocks = sum(answer.prompt_tokens // BLOCK_TOKENS for answer in mine.unique.values())
    if mine.written != blocks * block_bytes:
        expected = f"{blocks * block_bytes} of {blocks} blocks"
        wrong.append(f"{OURS}: stored {mine.written} bytes of prompts that share nothing, not the {expected}")
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
