"""TierMetrics: what vLLM publishes about a tier at /metrics, in addition to its own metrics of every tier.

vLLM asks for the definitions in the API server's process, and for the values after each step, in the engine's. A value
without a definition would end the server's output loop, so the two have one table.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingMetricMetadata,
)

from async_tier.block_store import BlockStore
from async_tier.jobs import REFUSALS, Finished, Statistics
from async_tier.vllm.promises import Promises

logger = logging.getLogger(__name__)

# vLLM's own begin with vllm:kv_offload. Those that do not begin with vllm: are not removed when an engine is restarted.
PREFIX = "vllm:async_tier_"
# In seconds: from a block of a small model on an idle machine to a queue that is minutes long.
_BUCKETS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0)
# Jobs that ended since the last step whose times are kept. More would mean that nobody asks for them.
MAX_TIMES = 4096
# How many refused blocks, or requests that were turned away, are worth a warning, and how often.
WARNING_SHARE = 0.01
# Fewer lookups in that time say nothing.
LEAST_ASKED = 10
# A tier is too small if fewer than one block was loaded for four that were evicted, and blocks stay for less time than
# people take between two questions. As in docs/monitoring/rules.yml.
THRASHING_SHARE = 0.25
THRASHING_AGE_S = 600
WARNING_INTERVAL_S = 60.0

# By name, and second label ("" for none).
Values = dict[tuple[str, str], int]
_Metric = tuple[type[OffloadingMetricMetadata], str, str]
_GAUGE, _COUNTER, _HISTOGRAM = OffloadingGaugeMetadata, OffloadingCounterMetadata, OffloadingHistogramMetadata
# By name: its kind, the label that it has besides the tier's ("" for none), and what it tells. Prometheus appends
# "_total" to the names of counters.
METRICS: dict[str, _Metric] = {
    "blocks": (_GAUGE, "", "Blocks that can be loaded."),
    "capacity_blocks": (_GAUGE, "", "Blocks that fit."),
    "usable_blocks": (_GAUGE, "", "Blocks that fit by now, while the tier's memory is still being pinned for CUDA."),
    "pinned_blocks": (_GAUGE, "", "Blocks that cannot be evicted, because copies or lookups of this step need them."),
    "promised_blocks": (_GAUGE, "", "Blocks of the primary that waiting requests were promised."),
    "inflight_jobs": (_GAUGE, "direction", "Jobs submitted whose copies have not ended."),
    "inflight_bytes": (_GAUGE, "direction", "Bytes of these jobs."),
    "oldest_block_age_seconds": (_GAUGE, "", "Time since the last use of the block that would be evicted next."),
    "jobs": (_COUNTER, "direction", "Jobs submitted."),
    "failed_jobs": (_COUNTER, "direction", "Jobs that failed. Each kind of failure has a line in the log."),
    "copied_blocks": (_COUNTER, "direction", "Blocks that were copied."),
    "copied_bytes": (_COUNTER, "direction", "Bytes that were copied."),
    "present_blocks": (_COUNTER, "", "Blocks offered to a store that were here, or on their way."),
    "refused_blocks": (_COUNTER, "reason", "Blocks offered to a store that were not stored."),
    "evicted_blocks": (_COUNTER, "", "Blocks that were evicted to make room."),
    "lost_blocks": (_COUNTER, "", "Blocks of loads that did not arrive. Their requests compute them."),
    "peers": (_GAUGE, "", "Other files of the pool, each of an engine that runs or ran, whose blocks can be loaded."),
    "peer_blocks": (_GAUGE, "", "Blocks in these."),
    "restored_blocks": (_GAUGE, "", "Blocks that were in the pool's file when the tier started."),
    "borrowed_blocks": (_COUNTER, "", "Blocks that were loaded from peers; they also count as copied."),
    "borrowed_bytes": (_COUNTER, "", "Bytes that were loaded from peers."),
    "lookups": (_COUNTER, "result", "Lookups of blocks."),
    "turned_away": (_COUNTER, "answer", "Lookups of blocks that are here, but the primary has no room for them."),
    "promises_taken_up": (_COUNTER, "", "Requests that were scheduled with the blocks that they were promised."),
    "resets": (_COUNTER, "", "How often the tier forgot everything."),
    "faults": (_COUNTER, "", "Unexpected errors, and jobs that were refused as wrong or too late."),
    "queue_seconds": (_HISTOGRAM, "direction", "Time of a job from its submission to the start of its first copy."),
    "copy_seconds": (_HISTOGRAM, "direction", "Time of a job from the start of its first copy to the end of its last."),
}


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """See vLLM's `build_metric_definitions`."""
    found = {}
    for name, (kind, label, documentation) in METRICS.items():
        more: dict[str, Any] = {"buckets": _BUCKETS} if kind is _HISTOGRAM else {}
        found[PREFIX + name] = kind(documentation, ("tier", label) if label else ("tier",), **more)
    return found


class TierMetrics:
    """The values of one tier. label: the tier's in vLLM's metrics, such as "1:async"."""

    def __init__(self, label: str, store: BlockStore, promises: Promises) -> None:
        self._label = label
        self._store = store
        self._promises = promises
        # What was sent last, by name and second label ("" for none).
        self._sent: Values = {}
        self._times: deque[Finished] = deque(maxlen=MAX_TIMES)
        self._watch = Watch(label, self._values(store.statistics()))

    def note_ends(self, ended: Iterable[Finished]) -> None:
        """Keep the times of jobs with copies for the next `take`."""
        self._times.extend(job for job in ended if job.seconds)

    def take(self) -> OffloadingConnectorStats | None:
        """What has changed since the last call, in an object of its own: counters by how much. None if nothing has."""
        values = self._values(self._store.statistics())
        self._watch.check(values)
        if values == self._sent and not self._times:
            return None
        stats = OffloadingConnectorStats()
        for (name, label), value in values.items():
            before = self._sent.get((name, label))
            if value == before:
                continue
            labels = (self._label, label) if label else (self._label,)
            if METRICS[name][0] is _GAUGE:
                stats.set_gauge(PREFIX + name, value, labels)
            else:
                stats.increase_counter(PREFIX + name, value - (before or 0), labels)
        self._sent = values
        while self._times:
            job = self._times.popleft()
            stats.observe_histogram(f"{PREFIX}queue_seconds", job.queued_seconds, (self._label, job.kind))
            stats.observe_histogram(f"{PREFIX}copy_seconds", job.seconds, (self._label, job.kind))
        return stats

    def _values(self, now: Statistics) -> Values:
        age = self._store.index.policy.oldest_age()
        return {
            ("blocks", ""): now.blocks,
            ("capacity_blocks", ""): now.capacity,
            ("usable_blocks", ""): now.rows_ready,
            ("pinned_blocks", ""): now.rows_pinned,
            ("promised_blocks", ""): self._promises.total,
            ("inflight_jobs", "store"): now.stores_in_flight,
            ("inflight_jobs", "load"): now.loads_in_flight,
            ("inflight_bytes", "store"): now.store_bytes_in_flight,
            ("inflight_bytes", "load"): now.load_bytes_in_flight,
            # In whole seconds, or it would change with every step.
            ("oldest_block_age_seconds", ""): int(age or 0),
            ("jobs", "store"): now.store_jobs,
            ("jobs", "load"): now.load_jobs,
            ("failed_jobs", "store"): now.failed_stores,
            ("failed_jobs", "load"): now.failed_loads,
            ("copied_blocks", "store"): now.blocks_stored,
            ("copied_blocks", "load"): now.blocks_loaded,
            ("copied_bytes", "store"): now.bytes_stored,
            ("copied_bytes", "load"): now.bytes_loaded,
            ("present_blocks", ""): now.blocks_present,
            **{("refused_blocks", reason): count for reason, count in now.refused.items()},
            ("evicted_blocks", ""): now.evictions,
            ("lost_blocks", ""): now.blocks_lost,
            ("peers", ""): now.peers,
            ("peer_blocks", ""): now.peer_blocks,
            ("restored_blocks", ""): now.restored,
            ("borrowed_blocks", ""): now.blocks_borrowed,
            ("borrowed_bytes", ""): now.blocks_borrowed * now.row_bytes,
            ("lookups", "hit"): now.hits,
            ("lookups", "miss"): now.misses,
            ("turned_away", "wait"): self._promises.waits,
            ("turned_away", "miss"): self._promises.refusals,
            ("promises_taken_up", ""): self._promises.take_ups,
            ("resets", ""): now.resets,
            ("faults", ""): now.faults,
        }


class Watch:
    """Warns, at most once in WARNING_INTERVAL_S, when the tier or the primary was too small in that time.

    label: the tier's name in the warnings.
    """

    def __init__(self, label: str, now: Values) -> None:
        self._label = label
        # The values when the interval began, and that time.
        self._last = now
        self._began = time.monotonic()

    def check(self, now: Values) -> None:
        """Look at the interval if it is over. An idle engine makes no steps, so it may have lasted longer."""
        at = time.monotonic()
        seconds = at - self._began
        if seconds < WARNING_INTERVAL_S:
            return
        grown = {key: value - self._last[key] for key, value in now.items()}
        self._last, self._began = now, at
        refused = {reason: grown["refused_blocks", reason] for reason in REFUSALS}
        offered = sum(refused.values()) + grown["copied_blocks", "store"] + grown["present_blocks", ""]
        if sum(refused.values()) > WARNING_SHARE * offered:
            worst = max(refused, key=refused.__getitem__)
            logger.warning(
                "Tier %s has refused %d of the %d blocks that it was offered in the last %d s, %d of them because %s",
                self._label,
                sum(refused.values()),
                offered,
                seconds,
                refused[worst],
                REFUSALS[worst],
            )
        evicted, loaded = grown["evicted_blocks", ""], grown["copied_blocks", "load"]
        age = now["oldest_block_age_seconds", ""]
        if loaded < THRASHING_SHARE * evicted and age < THRASHING_AGE_S:
            logger.warning(
                "Tier %s has evicted %d blocks in the last %d s and loaded %d; a block stays for %d s after its last "
                "use. If users take longer between two questions, set bytes_to_use to more",
                self._label,
                evicted,
                seconds,
                loaded,
                age,
            )
        asked, hits = grown["lookups", "miss"], grown["lookups", "hit"]
        if asked >= LEAST_ASKED and not hits and not grown["jobs", "store"]:
            logger.warning(
                "vLLM has asked tier %s for %d blocks in the last %d s, found none, and offered it none to store. It "
                "stores nothing of a step that does not fit the primary: set cpu_bytes_to_use to more, or "
                "max_num_batched_tokens to less",
                self._label,
                asked,
                seconds,
            )
        turned_away, taken_up = grown["turned_away", "miss"], grown["promises_taken_up", ""]
        if turned_away > WARNING_SHARE * (turned_away + taken_up):
            logger.warning(
                "The primary had no room for blocks that tier %s has, %d times in the last %d s, and they were "
                "computed again; set cpu_bytes_to_use to more",
                self._label,
                turned_away,
                seconds,
            )
