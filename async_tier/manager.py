"""AsyncSecondaryTierManager: what vLLM sees of the tier. Translates jobs and results; decides nothing about rows."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from vllm.v1.kv_offload.base import LookupResult, OffloadPolicy, RequestOffloadingContext

from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.jobs import Statistics
from async_tier.memory.pool_files import Identity, differences, other_pools
from async_tier.sizes import PROBLEM, WARNING, KVSizes, judge_primary, judge_tier
from async_tier.streams.rows import Rows
from async_tier.text import brief, enumerate_some, format_size
from async_tier.vllm import compat, namespace
from async_tier.vllm.logs import adopt_vllms_logging
from async_tier.vllm.metrics import TierMetrics, definitions
from async_tier.vllm.promises import KEEP, REFUSE, WAIT, Promises

logger = logging.getLogger(__name__)
# Needed once per block, and looking up an enum's member is slow (Python 3.11).
_HIT, _MISS = LookupResult.HIT, LookupResult.MISS
# What vLLM is answered for a block that is here.
_ANSWERS = {KEEP: _HIT, WAIT: LookupResult.RETRY, REFUSE: _MISS}


class AsyncSecondaryTierManager(compat.TierBase):
    """A secondary tier in memory. Its stores and loads are queued on streams and never hold up the scheduler.

    Configured by a dictionary in `secondary_tiers` (see TierConfig for the keys and README.md for an example):

        {"type": "AsyncSecondaryTierManager", "module_path": "async_tier.manager", "bytes_to_use": "64GiB"}

    All methods are called in vLLM's scheduler process, by one thread at a time. Only `drain_jobs` and `shutdown` wait
    for bytes to move. None raises after construction: a fault becomes `success=False` in the job's result, a count in
    `statistics()` and a line in the log (at most one line per second and kind, see `observe.faults`).
    """

    def __init__(
        self,
        /,  # so that a key "self" is refused as unknown
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        custom_param: int = 0,
        *,
        backpressure_detector: Any = None,
        **options: Any,
    ) -> None:
        """Args:
        offloading_spec: vLLM's spec, or a mock of it.
        primary_kv_view: the primary tier, shape (blocks, bytes per block), writable.
        tier_type: the name in the configuration.
        custom_param: an int without effect, as in vLLM's reference tier.
        backpressure_detector: vLLM's detector, if one is configured.
        options: the keys of TierConfig. Other keywords that a later vLLM's base class takes are passed on to it.

        Raises ValueError for a bad configuration and for workers on several nodes, MemoryError if the arena cannot
        be had.
        """
        adopt_vllms_logging()
        if isinstance(custom_param, bool) or not isinstance(custom_param, int):
            raise ValueError(f"custom_param must be an integer, not {brief(custom_param)}")
        for_base = compat.base_keywords(options)
        for name in for_base.keys() - TierConfig.__dataclass_fields__.keys():
            del options[name]
        self.config = TierConfig.parse(options)
        _check_nodes(offloading_spec, tier_type)
        detector = compat.NoPressure() if backpressure_detector is None else backpressure_detector
        self._detector = compat.Detector(detector, self._on_reset)
        super().__init__(offloading_spec, primary_kv_view, tier_type, self._detector, **for_base)
        self.locality = compat.locality(self.config.locality)
        self.custom_param = custom_param
        self.config = _resolve_engine(self.config, offloading_spec)
        primary = Rows.of_view(primary_kv_view)
        identity = None if self.config.pool_folder is None else _identity(self.config, offloading_spec, primary)
        self.block_store = BlockStore(primary, self.config, identity=identity)
        self._promises = Promises(self.block_store.primary.count, self.block_store.has, compat.group_of)
        self._label = compat.tier_label(offloading_spec, tier_type)
        self._metrics = TierMetrics(self._label, self.block_store, self._promises)
        if self.config.enable_kv_events:
            self._note_events(offloading_spec)
        # vLLM offers to no tier what it loads from another one, unless a tier asks for all blocks of a request. Without
        # that, after a restart memory would stay empty for good, and every load come from the disk behind it.
        self._offloading = RequestOffloadingContext()
        if compat.has_other_tiers(offloading_spec):
            self._offloading.policy = OffloadPolicy.REQUEST_LEVEL
        # Steps whose results have not arrived; and, after a reset that keeps blocks, for how many more steps lookups
        # answer MISS. Until the first step planned after the reset has ended, workers may write to rows of the primary
        # that a promotion would fill.
        self._steps_under_way = self._miss_steps = 0
        wrong = compat.partial_chunk_problem(offloading_spec)
        if wrong:
            logger.warning("Tier '%s' will serve wrong KV: %s", tier_type, wrong)
        self._log_sizes(compat.kv_sizes(offloading_spec, primary.row_bytes))

    # ------------------------------------------------------------------------------------------ jobs and their ends

    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        """HIT if the block can be loaded, which stays true until the next `on_schedule_end`; otherwise MISS.

        RETRY while the primary has no room for the request's blocks beside those promised to other requests, and MISS
        for those that it could never hold: see `vllm.promises`. A block that is still being stored is a MISS, because
        RETRY would defer the whole request, and the block is still in the primary tier.
        """
        if self._miss_steps:
            return _MISS
        try:
            request, promises = req_context.req_id, self._promises
            if not self.block_store.lookup(key, request, True):  # True: pin
                return _MISS
            if request == promises.asking and promises.room > 0:
                promises.room -= 1
                return _HIT
            answer = promises.ask(request, key, self.block_store.orders.get(request))
            if answer != KEEP:
                self.block_store.undo_last_hit(request)
            return _ANSWERS[answer]
        except Exception as error:
            self.block_store.report_fault("look up a block", error)
            return _MISS

    def submit_store(self, job_metadata: Any) -> None:
        """Queue the copy of a job's blocks from the primary tier. The cost depends on the number of keys, not bytes."""
        try:
            context = job_metadata.req_context
            self._promises.void(context.req_id)  # it runs, so it has what it was promised
            self.block_store.submit_store(
                job_metadata.job_id,
                job_metadata.keys,
                compat.row_numbers(job_metadata),
                context.req_id,
                self.block_store.orders.get(context.req_id) or compat.order_of(context),
            )
        except Exception as error:
            self._fail_job(job_metadata, "store", error)

    def submit_load(self, job_metadata: Any) -> None:
        """Queue the copy of a job's blocks to the primary tier. Keys that are not here fail; the rest is loaded."""
        try:
            request = job_metadata.req_context.req_id
            self._promises.note_load(job_metadata.job_id, request, job_metadata.keys)
            self.block_store.submit_load(
                job_metadata.job_id, job_metadata.keys, compat.row_numbers(job_metadata), request
            )
        except Exception as error:
            self._fail_job(job_metadata, "load", error)

    def get_finished_jobs(self) -> Iterable[Any]:
        """The JobResults of the jobs that ended since the last call, each once. Polls events, never blocks."""
        try:
            ended = self.block_store.poll()
            for finished in ended:
                try:
                    self._promises.note_end(finished.job_id, finished.success)
                except Exception as error:  # no result may be lost because of this
                    self.block_store.report_fault("keep account of a promise", error)
            self._metrics.note_ends(ended)
            self._detector.set_store_seconds(each.seconds for each in ended if each.kind == "store" and each.success)
            return [compat.job_result(finished) for finished in ended]
        except Exception as error:
            self.block_store.report_fault("poll jobs", error)
            return []

    def has_pending_work(self) -> bool:
        """Whether vLLM should go on stepping, because the end of a job is not reported yet."""
        return self.block_store.has_pending_work

    def drain_jobs(self) -> None:
        """Block until every job has ended; `get_finished_jobs` then reports them."""
        try:
            self.block_store.drain()
        except Exception as error:
            self.block_store.report_fault("drain jobs", error)
        if compat.DRAIN_MEANS_RESET:
            self._on_reset()

    # ---------------------------------------------------------------------------------------------- requests, steps

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        """Note the request. Beside other tiers, ours is also to be offered blocks that are in the primary already."""
        try:
            self._promises.finish(req_context.req_id)  # of an earlier request with this name
            self.block_store.begin_sequence(req_context.req_id, compat.order_of(req_context))
        except Exception as error:
            self.block_store.report_fault("take note of a request", error)
        return self._offloading

    def on_request_finished(self, req_context: Any) -> None:
        """Nothing more will be stored for the request."""
        try:
            self._promises.finish(req_context.req_id)
            self.block_store.finish_sequence(req_context.req_id)
        except Exception as error:
            self.block_store.report_fault("end a request", error)

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        """Count `keys`, given in prefix order, as used by the request. Called by vLLM up to 0.30."""
        try:
            sequence = req_context.req_id
            order = self.block_store.orders.get(sequence)
            if order is not None:
                order.note(keys)
            self.block_store.touch(keys, sequence)
        except Exception as error:
            self.block_store.report_fault("touch blocks", error)

    def on_schedule_end(self, context: Any) -> None:
        """End a scheduler step: blocks that were hit in it may be evicted again."""
        self._steps_under_way += 1
        try:
            self._promises.end_step(context.new_req_ids, context.preempted_req_ids)
            self.block_store.end_step()
        except Exception as error:
            self.block_store.report_fault("end a step", error)

    def get_stats(self) -> Any:
        """What has changed in the tier's metrics; None if nothing has.

        vLLM calls this when a step's results have arrived, which is counted here.
        """
        self._steps_under_way = max(0, self._steps_under_way - 1)
        self._miss_steps = max(0, self._miss_steps - 1)
        try:
            self.block_store.note_results()
            return self._metrics.take()
        except Exception as error:
            self.block_store.report_fault("report its metrics", error)
            return None

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """The definitions of the tier's metrics, which are the same for every configuration."""
        return definitions()

    def take_events(self) -> Iterable[Any]:
        """vLLM's events for what was stored and evicted since the last call, in order; see `enable_kv_events`."""
        try:
            return [
                compat.event(change.keys, change.is_stored, self.locality, self._label)
                for change in self.block_store.index.take_changes()
            ]
        except Exception as error:
            self.block_store.report_fault("report its events", error)
            return []

    @classmethod
    def config_info_keys(cls, tier_config: dict[str, Any]) -> tuple[str, ...]:
        """The names in `config_info`."""
        return tuple(f"async_tier_{name}" for name in ("engine", "pool", "blocks", "block_bytes", "eviction_policy"))

    def config_info(self) -> dict[str, str | int]:
        """What does not change, as labels of vLLM's info metric (0.33 and later)."""
        statistics = self.block_store.statistics()
        values = (
            *(statistics.engine, self.config.pool, statistics.capacity, statistics.row_bytes),
            self.config.eviction_policy,
        )
        return dict(zip(self.config_info_keys({}), values, strict=True))

    def shutdown(self) -> None:
        """End the threads, free the memory and drop the view of the primary. Unfinished jobs fail. Idempotent."""
        try:
            self.block_store.close()
        except Exception as error:
            self.block_store.report_fault("shut down", error)
        # Only dropped and not released: the view belongs to vLLM, which closes its mapping after us.
        self._primary_kv_view = memoryview(b"")

    # --------------------------------------------------------------------------------------------------- inspection

    def get_num_blocks(self) -> int:
        """The number of blocks that can be loaded."""
        return self.block_store.num_blocks

    def get_num_chunks(self) -> int:
        """`get_num_blocks`, as vLLM 0.30 and later call it."""
        return self.get_num_blocks()

    @property
    def promises(self) -> Promises:
        """The hits that vLLM was promised and has not used yet. Only for reading."""
        return self._promises

    def statistics(self) -> Statistics:
        """Counts since construction; see Statistics."""
        return self.block_store.statistics()

    def _fail_job(self, job_metadata: Any, kind: str, error: Exception) -> None:
        """Report a job that could not be submitted as failed."""
        request = getattr(getattr(job_metadata, "req_context", None), "req_id", None)
        self.block_store.fail(job_metadata.job_id, kind, error, getattr(job_metadata, "keys", ()), request)

    def _note_events(self, offloading_spec: Any) -> None:
        """Have what changes noted for `take_events`, if vLLM asks for it."""
        if compat.are_events_published(offloading_spec):
            self.block_store.index.note_changes()
        else:
            logger.warning(
                "enable_kv_events of tier '%s' has no effect: vLLM publishes no KV cache events (see its "
                "kv_events_config), or is older than 0.29, and its events do not name a tier",
                self.tier_type,
            )

    def _log_sizes(self, sizes: KVSizes | None) -> None:
        """Log what fits, and warn of what does not. sizes: of the model's KV, None if unknown."""
        statistics = self.block_store.statistics()
        row_bytes, primary = statistics.row_bytes, self.block_store.primary.count
        tier_bytes, primary_bytes = statistics.capacity * row_bytes, primary * row_bytes
        tokens = [f", {sizes.tokens(size)} tokens" if sizes else "" for size in (tier_bytes, primary_bytes)]
        logger.info(
            "Tier '%s' (%s engine, pool %s) holds %d blocks of %s (%s%s); the primary before it holds %d blocks%s",
            self.tier_type,
            statistics.engine,
            self.config.pool,
            statistics.capacity,
            format_size(row_bytes),
            format_size(tier_bytes),
            tokens[0],
            primary,
            tokens[1],
        )
        if (pool := self.block_store.arena.pool) is not None:
            logger.info(
                "Tier '%s' begins with %d blocks that were in its file %s; other files: %d, with %d blocks",
                self.tier_type,
                statistics.restored,
                pool.path,
                statistics.peers,
                statistics.peer_blocks,
            )
            if not statistics.restored and not statistics.peers:
                self._log_other_pools(pool.path.parent, pool.identity)
        if sizes is not None:
            for found in (judge_primary(primary_bytes, sizes), *judge_tier(primary_bytes, tier_bytes, sizes)):
                if found.level in (WARNING, PROBLEM):
                    logger.warning(
                        "Tier '%s' is of less use than it could be: %s; %s", self.tier_type, found.says, found.advice
                    )

    def _log_other_pools(self, folder: Path, identity: Identity) -> None:
        """Say why the blocks in the folder are of no use, if there are any."""
        with contextlib.suppress(OSError):
            others = other_pools(folder, identity)
            if others:
                reasons = [differences(identity.facts, description.facts) for _, description in others]
                nearest, (path, _) = min(zip(reasons, others, strict=True), key=lambda each: len(each[0]) or math.inf)
                logger.info(
                    "Tier '%s' begins empty, but its folder has files of other pools: %d. The nearest, %s, differs "
                    'in %s. See "What makes two pools different" in docs/pool.md',
                    self.tier_type,
                    len(others),
                    path.name,
                    enumerate_some(nearest) or "what it does not say",
                )

    def _on_reset(self) -> None:
        """Called when vLLM has reset its caches: the weights may have changed, and block hashes do not cover them."""
        try:
            self._promises.clear()
            if self.config.keep_on_reset:
                self._miss_steps = self._steps_under_way + 1
            else:
                self.block_store.clear()
        except Exception as error:
            self.block_store.report_fault("forget its blocks", error)


def _check_nodes(offloading_spec: Any, tier_type: str) -> None:
    """Raise ValueError if workers are on other nodes, and warn if that cannot be known."""
    nodes = compat.node_count(offloading_spec)
    if nodes is None:
        logger.warning(
            "The engine's process sees no GPU, so tier '%s' cannot check that all workers are on this node. They must "
            "be: of a worker elsewhere it would serve wrong bytes",
            tier_type,
        )
    elif nodes > 1:
        raise ValueError(
            f"the workers of this engine are spread over {nodes} nodes, but a tier in the scheduler's memory sees only "
            "its own node's part of each block; use one node per engine, or a tier on shared storage"
        )


def _identity(config: TierConfig, offloading_spec: Any, primary: Rows) -> Identity:
    """What the blocks of a pool belong to. Raises ValueError if that cannot be known, or is another in each run."""
    namespace.check_seed(offloading_spec)
    facts = namespace.facts(offloading_spec, primary.row_bytes)
    name, model = str(config.namespace), (facts.get("model") or {}).get("model", "")
    shown = {"namespace": name, "model": model, "vllm": facts["vllm"]}
    return Identity(namespace.digest(facts, name), shown, {"namespace": name, **namespace.plain_facts(facts)})


def _resolve_engine(config: TierConfig, offloading_spec: Any) -> TierConfig:
    """The configuration with "auto" and the default device settled by where this spec has vLLM's workers."""
    if config.is_on_device:
        return config
    if config.engine == "auto" and not compat.has_one_worker(offloading_spec):
        # The workers have processes of their own, so a CUDA context here would serve the tier alone.
        return dataclasses.replace(config, engine="host")
    if config.engine == "cuda" and config.device is None:
        gpu = compat.first_gpu(offloading_spec)
        if gpu is not None:
            return dataclasses.replace(config, device=f"cuda:{gpu}")
    return config
