"""Where the time to a first token went, by vLLM's own metrics, read before a request and after it.

    outside    HTTP, tokens from text and back: the client's time less the engine's
    lookups    from the first lookup that had to wait until the blocks are seen in the primary
    copies     of that, the tier's copies; the rest is waiting: for a copy thread, and for the step that sees their end
    loads      copies from the primary to the KV cache
    waiting    what else there was before the request's first step with tokens: steps without any, and their pauses
    computing  from that step's beginning to the first token

All but copies add up to the whole. vLLM's scheduler asks a tier once a step, and pauses for a millisecond after each
step in which nothing is computed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Metrics = Mapping[tuple[str, str], float]
TIMES = ("first", "outside", "lookups", "copies", "loads", "waiting", "computing")
_TIERING = "vllm:kv_offload_tiering_"


@dataclass(frozen=True)
class Parts:
    """Seconds of one request, and what it asked of the secondary tier. `first`: to its first token, at the client."""

    first: float
    outside: float
    lookups: float
    copies: float
    loads: float
    waiting: float
    computing: float
    queries: int
    hits: int

    @classmethod
    def between(cls, before: Metrics, after: Metrics, first: float) -> Parts:
        def grew(name: str, tier: str = "") -> float:
            return sum(
                value - before.get((metric, label), 0.0)
                for (metric, label), value in after.items()
                if metric == name and label.startswith(tier)
            )

        queued = grew("vllm:request_queue_time_seconds_sum")
        computing = grew("vllm:request_prefill_time_seconds_sum")
        lookups = grew("vllm:kv_offload_lookup_async_delay_seconds_sum")
        loads = grew("vllm:kv_offload_load_time_total")
        return cls(
            first=first,
            outside=first - queued - computing,
            lookups=lookups,
            copies=grew(f"{_TIERING}read_time_total", "1:"),
            loads=loads,
            waiting=queued - lookups - loads,
            computing=computing,
            queries=round(grew(f"{_TIERING}chunk_queries_total", "1:")),
            hits=round(grew(f"{_TIERING}chunk_hits_total", "1:")),
        )


def answered(metrics: Metrics) -> int:
    """Requests of which the metrics know everything."""
    return round(metrics.get(("vllm:request_prefill_time_seconds_count", ""), 0.0))


def written(metrics: Metrics) -> int:
    """Bytes that the secondary tier has taken."""
    name = f"{_TIERING}write_bytes_total"
    return round(sum(value for (each, tier), value in metrics.items() if each == name and tier.startswith("1:")))


def hit_ratio(parts: Sequence[Parts]) -> float | None:
    """Of the secondary tier's lookups; None if there were none."""
    queries = sum(each.queries for each in parts)
    return sum(each.hits for each in parts) / queries if queries else None


def medians_ms(parts: Sequence[Parts]) -> dict[str, float]:
    return {what: statistics.median(getattr(each, what) for each in parts) * 1e3 for what in TIMES}


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Medians of parts, in ms, by server."""
    lines = [f"{'of later turns, ms':24}" + "".join(f"{what:>11}" for what in TIMES)]
    for name, parts in found.items():
        lines.append(f"  {name:22}" + "".join(f"{parts[what]:11.1f}" for what in TIMES))
    return "\n".join(lines)
