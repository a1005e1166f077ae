"""vLLM's engine in one process, around the tier, with a model that knows which KV it should read.

Real: the engine core's step (with its batch queue under asynchronous scheduling), scheduler, KV cache manager,
connector in both roles, the mixin by which vLLM's model runner drives it, CPUBackendTieringSpec with its worker and its
file in /dev/shm, TieringOffloadingManager, and our tier. Replaced: the executor and the model. The KV of a token is a
*stamp*: a hash of its whole prefix, its layer and the weights. A step writes the stamps of the tokens it was scheduled
for, as vLLM's model runner does, and then looks at every slot that attention would read.

Everything but the copies happens on the caller's thread, at points that the seed decides. The streams of worker and
tier are held, and `Copies` lets their jobs go one by one. So a run repeats itself, as far as vLLM does: it iterates
over sets of hashes, whose order PYTHONHASHSEED decides.

Written for vLLM 0.32, the newest with a CPU build.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import pickle
import queue
import random
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm.v1.worker.utils import allocate_kv_cache

from async_tier.cpu_backend import HostOffloadingWorker
from async_tier.manager import AsyncSecondaryTierManager
from async_tier.streams.host import HostStream
from async_tier.testing import Gate
from tests.helpers import until

# Tokens are 0 to VOCABULARY - 1. One in so many that the model samples ends its request.
VOCABULARY = 50
END_OF_TEXT = 0
# A slot holds the stamp and its complement.
SLOT_WORDS = 2
# vLLM's rows of the primary are whole pages of memory.
PAGE_BYTES = 4096
# What lies where a copy, or the model, is to write. A stamp is never one of these but by a chance of one in 2 ** 62.
POISON = {
    0xDEAD_0001_DEAD_0001: "nothing: a worker's load is to fill it",
    0xDEAD_0002_DEAD_0002: "nothing: a worker's store was to fill the row that it came from",
    0xDEAD_0003_DEAD_0003: "nothing: a load of the tier was to fill the row that it came from",
    0xDEAD_0004_DEAD_0004: "nothing: the block is new, and the model has not got that far",
}
TO_LOAD, TO_STORE, TO_PROMOTE, NEW = POISON
# Steps that a pause may take until nothing is under way any more.
PAUSE_STEPS = 2000

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E37_79B9_7F4A_7C15


# -------------------------------------------------------------------------------------------------------- the model


def _mix(number: int) -> int:
    """The finalizer of splitmix64: 64 bits to 64 bits, one to one."""
    number = (number ^ number >> 30) * 0xBF58_476D_1CE4_E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D0_49BB_1331_11EB & _MASK
    return number ^ number >> 31


def _mix_all(numbers: np.ndarray) -> np.ndarray:
    """`_mix` of each of an array of uint64."""
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58_476D_1CE4_E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D0_49BB_1331_11EB)
    return numbers ^ numbers >> np.uint64(31)


def _extend(before: int, token: int) -> int:
    """The hash of a prefix and one more token."""
    return _mix(before + (token + 1) * _GOLDEN & _MASK)


def sample(prefix: int) -> int:
    """The token that the model continues a prefix with, given the prefix's hash."""
    return _mix(prefix ^ 0x5A5A) % VOCABULARY


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What the model answers to a prompt: `count` tokens, or fewer if it ends by itself."""
    prefix = functools.reduce(_extend, prompt, 0)
    tokens: list[int] = []
    while len(tokens) < count and END_OF_TEXT not in tokens:
        tokens.append(sample(prefix))
        prefix = _extend(prefix, tokens[-1])
    return tokens


def stamps(prefixes: np.ndarray, layer: int, weights: int) -> np.ndarray:
    """The KV of tokens, shape (n,), given the hashes of their prefixes, themselves included."""
    return _mix_all(prefixes ^ np.uint64(_mix(layer * 1000 + weights + 1)))


@dataclass(frozen=True)
class WrongSlot:
    """A slot that attention would have read, and what it held."""

    step: int
    request_id: str
    position: int
    group: int
    layer: str
    block: int
    expected: int
    found: int
    meaning: str

    def __str__(self) -> str:
        return (
            f"step {self.step}: request {self.request_id} would read, for its token {self.position}, group "
            f"{self.group}, layer {self.layer}, block {self.block}, {self.found:#018x} and not "
            f"{self.expected:#018x}: {self.meaning}"
        )


class WrongKV(AssertionError):
    """Attention would have read KV of something else."""

    def __init__(self, slots: Sequence[WrongSlot]) -> None:
        self.slots = tuple(slots)
        more = f"\nand {len(slots) - 3} more" if len(slots) > 3 else ""
        super().__init__("\n".join(map(str, slots[:3])) + more)


class _Tokens:
    """What the worker knows of a request: its tokens, the hashes of their prefixes, and its block tables by group."""

    def __init__(self, tokens: Sequence[int], blocks: Sequence[Sequence[int]]) -> None:
        self.tokens: list[int] = []
        self._prefixes = np.empty(0, dtype=np.uint64)
        self._last = 0
        self.blocks = [list(group) for group in blocks]
        self.replace(tokens)

    @property
    def prefixes(self) -> np.ndarray:
        return self._prefixes[: len(self.tokens)]

    @property
    def last(self) -> int:
        """The hash of all tokens."""
        return self._last

    def append(self, token: int) -> None:
        self._last = _extend(self._last, token)
        count = len(self.tokens)
        if count == len(self._prefixes):
            self._prefixes = np.resize(self._prefixes, max(64, 2 * count))
        self._prefixes[count] = self._last
        self.tokens.append(token)

    def replace(self, tokens: Sequence[int]) -> None:
        """The request's tokens are these."""
        if self.tokens == tokens:
            return
        self.tokens.clear()
        self._last = 0
        for token in tokens:
            self.append(token)


class StampModel:
    """vLLM's model runner, as far as KV is concerned. Called by one thread, that of the executor."""

    def __init__(
        self, kv_cache_config: KVCacheConfig, layout: Any, connector: Any, between: Callable[[], None]
    ) -> None:
        self.connector = connector
        self.weights = 0
        self.step = 0
        self.slots_checked = 0
        self.wrong: list[WrongSlot] = []
        self.requests: dict[str, _Tokens] = {}
        self._between = between
        self._context = ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={})
        kv_caches = allocate_kv_cache(kv_cache_config, torch.device("cpu"), layout)
        self._slots: dict[str, np.ndarray] = {}
        self._groups: list[tuple[int, int | None, list[tuple[int, str, np.ndarray]]]] = []
        numbers = itertools.count()
        for group in kv_cache_config.kv_cache_groups:
            spec = group.kv_cache_spec
            layers = []
            for name in group.layer_names:
                shape = (kv_cache_config.num_blocks, spec.block_size, SLOT_WORDS)
                slots = kv_caches[name].view(shape).numpy().view(np.uint64)
                assert np.shares_memory(slots, kv_caches[name].numpy())
                slots[:] = NEW
                layers.append((next(numbers), name, slots))
            window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None
            self._groups.append((spec.block_size, window, layers))
        connector.register_kv_caches(kv_caches)

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """One step, in the order of vLLM's GPUModelRunner.execute_model."""
        self.step += 1
        # The worker is another process.
        metadata = output.kv_connector_metadata = pickle.loads(pickle.dumps(output.kv_connector_metadata))
        self.connector.handle_preemptions(metadata)
        for job in metadata.load_jobs.values():
            self._poison_blocks(job.dst_spec.block_ids)
        self._between()
        self._update(output)
        agent, kv_transfer_state._KV_CONNECTOR_AGENT = kv_transfer_state._KV_CONNECTOR_AGENT, self.connector
        try:
            with override_forward_context(self._context):
                if not output.total_num_scheduled_tokens:
                    return KVConnectorModelRunnerMixin.kv_connector_no_forward(output, self.connector._vllm_config)
                with KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(output) as connector_output:
                    sampled = self._forward(output)
                    self._between()
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = agent
        return ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={request_id: at for at, request_id in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()),
            kv_connector_output=connector_output,
        )

    def _update(self, output: SchedulerOutput) -> None:
        """As GPUModelRunner._update_states."""
        assert not output.kv_cache_block_copies, "the groups that are used here have no copies on write"
        for request_id in output.finished_req_ids:
            self.requests.pop(request_id, None)
        self._poison_blocks(output.new_block_ids_to_zero or (), NEW)
        for new in output.scheduled_new_reqs:
            self.requests[new.req_id] = _Tokens(new.prompt_token_ids, new.block_ids)
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            request = self.requests[request_id]
            if request_id in cached.all_token_ids:
                request.replace(cached.all_token_ids[request_id])
            if request_id in cached.resumed_req_ids:
                request.blocks = [list(group) for group in blocks]
            elif blocks is not None:
                for known, more in zip(request.blocks, blocks, strict=True):
                    known.extend(more)

    def _forward(self, output: SchedulerOutput) -> dict[str, list[int]]:
        """Write KV, then attend, then sample: the sampled tokens by request, none where the prompt goes on."""
        ranges: dict[str, tuple[int, int]] = {}
        cached = output.scheduled_cached_reqs
        for new in output.scheduled_new_reqs:
            ranges[new.req_id] = (new.num_computed_tokens, 0)
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            ranges[request_id] = (computed, 0)
        for request_id, count in output.num_scheduled_tokens.items():
            start = ranges[request_id][0]
            assert start + count <= len(self.requests[request_id].tokens), f"tokens of {request_id} are not known yet"
            ranges[request_id] = (start, start + count)
        for request_id, (start, end) in ranges.items():
            self._write(request_id, start, end)
        for request_id, (start, end) in ranges.items():
            self._attend(request_id, start, end)
        sampled: dict[str, list[int]] = {}
        for request_id, (_, end) in ranges.items():
            request = self.requests[request_id]
            sampled[request_id] = []
            if end == len(request.tokens):
                sampled[request_id].append(sample(request.last))
                request.append(sampled[request_id][0])
        return sampled

    def _write(self, request_id: str, start: int, end: int) -> None:
        request = self.requests[request_id]
        for group, (block_size, _, layers) in enumerate(self._groups):
            positions = np.arange(start, end)
            table = np.asarray(request.blocks[group])
            blocks, offsets = table[positions // block_size], positions % block_size
            assert blocks.all(), f"{request_id} has no block for one of its tokens {start} to {end} in group {group}"
            for number, _, slots in layers:
                # Nobody has written to the rest of a block that begins here.
                slots[blocks[offsets == 0]] = NEW
                values = stamps(request.prefixes[start:end], number, self.weights)
                slots[blocks, offsets, 0] = values
                slots[blocks, offsets, 1] = ~values

    def _attend(self, request_id: str, start: int, end: int) -> None:
        request = self.requests[request_id]
        for group, (block_size, window, layers) in enumerate(self._groups):
            first = 0 if window is None else max(0, start - window + 1)
            positions = np.arange(first, end)
            blocks, offsets = np.asarray(request.blocks[group])[positions // block_size], positions % block_size
            assert blocks.all(), f"{request_id} has no block for one of its tokens {first} to {end} in group {group}"
            self.slots_checked += len(positions) * len(layers)
            for number, name, slots in layers:
                expected = stamps(request.prefixes[first:end], number, self.weights)
                found = slots[blocks, offsets]
                good = (found[:, 0] == expected) & (found[:, 1] == ~expected)
                for at in np.flatnonzero(~good):
                    value = int(found[at, 0]) if found[at, 0] != expected[at] else ~int(found[at, 1]) & _MASK
                    self.wrong.append(
                        WrongSlot(
                            self.step,
                            request_id,
                            int(positions[at]),
                            group,
                            name,
                            int(blocks[at]),
                            int(expected[at]),
                            value,
                            self._meaning(value),
                        )
                    )

    def _poison_blocks(self, blocks: Iterable[int], poison: int = TO_LOAD) -> None:
        numbers = list(blocks)
        if numbers:
            for _, _, layers in self._groups:
                for _, _, slots in layers:
                    slots[numbers] = poison

    def _meaning(self, value: int) -> str:
        """Whose KV that is, as far as the requests under way tell."""
        if value in POISON:
            return POISON[value]
        for request_id, request in self.requests.items():
            for (_, _, layers), weights in itertools.product(self._groups, range(self.weights + 1)):
                for number, name, _ in layers:
                    same = np.flatnonzero(stamps(request.prefixes, number, weights) == np.uint64(value))
                    if len(same):
                        return f"token {same[0]} of request {request_id}, layer {name}, weights {weights}"
        return "of no request under way"


# ------------------------------------------------------------------------------------------------------- the copies


class _Early:
    """An event that says that its copies have ended, whatever they do."""

    is_done, failed, reason, seconds = True, False, None, 0.0

    def synchronize(self, seconds: float = 0.0) -> bool:
        return True


class Copies:
    """The jobs of one stream, which is held: they go one by one, when the test says so.

    early: report jobs that are queued from now on as ended at once. The fault that the tests have to see.
    """

    def __init__(self, name: str, stream: HostStream) -> None:
        self.name = name
        self.early = False
        self.stalled = 0
        self._gate = Gate(stream)
        self._events: deque[Any] = deque()
        self._held = False
        for method in ("copy", "copy_rows"):
            setattr(stream, method, self._listening(getattr(stream, method)))
        self.hold()

    def _listening(self, submit: Callable[..., Any]) -> Callable[..., Any]:
        def listen(*args: Any) -> Any:
            event = submit(*args)
            if self._held:
                self._events.append(event)
            return _Early() if self.early else event

        return listen

    @property
    def waiting(self) -> int:
        """Jobs that are held."""
        while self._events and self._events[0].is_done:
            self._events.popleft()
        return len(self._events)

    def hold(self) -> None:
        self._held = True
        self._gate.hold()

    def release(self) -> None:
        """Let everything go, and what comes, at the threads' pace."""
        self._held = False
        self._events.clear()
        self._gate.release()

    def go(self, jobs: int | None = None) -> int:
        """Let `jobs` jobs go, by default all, and wait for their ends; how many there were."""
        gone = 0
        while self.waiting and gone != jobs:
            # A job of the sizes that are used here is one piece.
            self._gate.step(1)
            self._events.popleft().synchronize()
            gone += 1
        return gone

    def start(self, awaited: Sequence[Any] | None = None) -> list[Any]:
        """Let the jobs go up to the last of the events `awaited`, by default all, without waiting; their events."""
        events = list(self._events) if self.waiting else []
        if awaited is not None:
            events = events[: max((at + 1 for at, event in enumerate(events) if event in awaited), default=0)]
        if events:
            self._gate.step(len(events))
        return events


# ------------------------------------------------------------------------------------------------------ the executor


class _Batch:
    def __init__(self, scheduled: SchedulerOutput) -> None:
        self.scheduled = scheduled
        self.result: ModelRunnerOutput | None = None


class _Result(Future):
    """The result of a step, which is made at the latest when it is asked for."""

    def __init__(self, get: Callable[[], Any]) -> None:
        super().__init__()
        self._get = get

    def result(self, timeout: float | None = None) -> Any:
        return self._get()


class _Executor:
    """Runs steps in order, each between its submission and the request for its result: when is `is_early`'s choice."""

    supported_tasks = ("generate",)
    is_sleeping = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: deque[_Batch] = deque()
        self._last: _Batch | None = None
        self.is_early: Callable[[], bool] = lambda: True
        # Called before the worker begins a step.
        self.before_run: Callable[[], object] = lambda: None

    def get_kv_cache_specs(self) -> list[dict[str, KVCacheSpec]]:
        return [self._engine.layer_specs]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["LBHNC"]]

    def set_kv_cache_layout(self, name: str) -> None:
        self._engine.vllm_config.cache_config.kv_cache_layout = name

    def determine_available_memory(self) -> list[int]:
        return [1 << 30]  # `num_gpu_blocks_override` decides

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        self._engine.make_model(kv_cache_configs[0])

    def compile_or_warm_up_model(self) -> None:
        pass

    def execute_model(self, scheduled: SchedulerOutput, non_block: bool = False) -> Future:
        batch = self._last = _Batch(scheduled)
        self._queue.append(batch)
        if self.is_early():
            self.catch_up()
        if scheduled.total_num_scheduled_tokens:
            return _Result(lambda: None)  # the rest comes from `sample_tokens`
        return _Result(lambda: self._run_to(batch))

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        batch = self._last
        assert batch is not None
        return _Result(lambda: self._run_to(batch)) if non_block else self._run_to(batch)

    def catch_up(self) -> None:
        """Run all steps that were submitted."""
        while self._queue:
            self._run_next()

    def _run_to(self, batch: _Batch) -> ModelRunnerOutput:
        while batch.result is None:
            self._run_next()
        return batch.result

    def _run_next(self) -> None:
        self.before_run()
        batch = self._queue.popleft()
        batch.result = self._engine.model.execute(batch.scheduled)

    @property
    def steps_submitted(self) -> int:
        return len(self._queue)

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Comes after the steps that were submitted."""
        self.catch_up()
        return [None]

    def reset_mm_cache(self) -> None:
        pass

    def reset_encoder_cache(self) -> None:
        pass


class _Core(EngineCore):
    """vLLM's engine core, with its methods as they are. Its constructor freezes the garbage collector's heap and the
    environment, which a process that runs other tests does not want; this one leaves that out."""

    def __init__(self, vllm_config: VllmConfig, executor: Any) -> None:
        self.vllm_config = vllm_config
        self.model_executor = executor
        self.log_stats = False
        self._weight_version = "default"
        self._pooler_config_logged = False
        kv_cache_config = self._initialize_kv_caches(vllm_config)
        self.structured_output_manager = StructuredOutputManager(vllm_config)
        block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
        self.scheduler = vllm_config.scheduler_config.get_scheduler_cls()(
            vllm_config=vllm_config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=self.structured_output_manager,
            include_finished_set=False,
            log_stats=False,
            block_size=block_size,
            hash_block_size=hash_block_size,
        )
        self.use_spec_decode = self.check_for_draft_tokens = False
        self.is_mm_encoder_only = self.is_pooling_model = False
        self.mm_receiver_cache = None
        self.batch_queue_size = vllm_config.max_concurrent_batches
        self.batch_queue = deque(maxlen=self.batch_queue_size) if self.batch_queue_size > 1 else None
        hash_function = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self.request_block_hasher = get_request_block_hasher(hash_block_size, hash_function)
        self.step_fn = self.step if self.batch_queue is None else self.step_with_batch_queue
        self.async_scheduling = vllm_config.scheduler_config.async_scheduling
        self.aborts_queue = queue.Queue()

    def has_work(self) -> bool:
        """As EngineCoreProc's."""
        return self.scheduler.has_requests() or bool(self.batch_queue)


# -------------------------------------------------------------------------------------------------------- the engine


@dataclass
class Served:
    """Blocks that a request's loads took from the primary, and those of them that a promotion had brought there."""

    blocks: int = 0
    from_tier: int = 0


@dataclass(frozen=True)
class InFlight:
    """What is under way, or held by somebody, by who knows of it."""

    requests: int
    batches: int
    connector_jobs: int
    worker_jobs: int
    manager_jobs: int
    manager_requests: int
    tier_jobs: int
    primary_pinned: int
    gpu_blocks: int


@dataclass(frozen=True)
class Finished:
    """The end of a request."""

    tokens: tuple[int, ...]
    reason: str


@functools.cache
def _model_folder() -> tempfile.TemporaryDirectory:
    """A model without weights, which goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="stamp_model_")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1 << 20,
        "torch_dtype": "float32",
    }
    Path(folder.name, "config.json").write_text(json.dumps(config))
    return folder


class Engine:
    """vLLM's engine around the tier; a context manager, which leaves nothing in /dev/shm.

    gpu_blocks, primary_blocks, tier_blocks: sizes, in blocks of `block_size` tokens of one KV group. vLLM keeps one of
    `gpu_blocks` for itself. max_model_len: by default what the KV cache holds. async_scheduling: plan a step before
    the results of the one before it have come. groups: KV groups, None for full attention, a number of tokens for a
    sliding window; each of `layers` layers. tier: further keys of the tier's configuration. other_tiers: the tiers
    behind it.

    copies: when the copies of worker and tier are made. "prompt": all between two steps. "random": some, at random
    points, also within the worker's step. "manual": when the test says so (`copies[...].go()`), or when somebody
    waits for them. "free": by their threads, at any time.

    worker: when the worker runs a step under asynchronous scheduling. "early": when it is submitted. "late": when its
    result is asked for, which is after the next step was planned. "random": either, or in between.
    """

    def __init__(
        self,
        *,
        gpu_blocks: int = 65,
        primary_blocks: int = 64,
        tier_blocks: int = 256,
        block_size: int = 4,
        max_num_batched_tokens: int = 64,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        async_scheduling: bool = False,
        groups: Sequence[int | None] = (None,),
        layers: int = 1,
        blocks_per_chunk: int = 1,
        policy: Literal["fcfs", "priority"] = "fcfs",
        tier: dict[str, Any] | None = None,
        other_tiers: Sequence[dict[str, Any]] = (),
        copies: Literal["prompt", "random", "manual", "free"] = "prompt",
        worker: Literal["early", "late", "random"] = "early",
        seed: int = 0,
    ) -> None:
        self.random = random.Random(seed)
        self.steps = 0
        self.resets = 0
        self.requests: dict[str, Request] = {}
        self.finished: dict[str, Finished] = {}
        self.aborted: list[str] = []
        self.served: dict[str, Served] = {}
        self._outputs: dict[str, list[int]] = {}
        self._ids = itertools.count()
        self._promoted: set[bytes] = set()
        self._mode = copies
        self.keeps_on_reset = bool((tier or {}).get("keep_on_reset", False))
        self.block_size = block_size
        self.layer_specs = _layer_specs(groups, layers, block_size)
        page = next(iter(self.layer_specs.values())).page_size_bytes
        row_bytes = -(-page * layers * blocks_per_chunk // PAGE_BYTES) * PAGE_BYTES
        engine_id = f"test-{uuid.uuid4().hex}"
        self.shared_memory = Path(f"/dev/shm/vllm_offload_{engine_id}.mmap")
        self.vllm_config = _make_config(
            engine_id,
            gpu_blocks,
            block_size,
            max_num_batched_tokens,
            max_num_seqs,
            max_model_len or (gpu_blocks - len(groups)) // len(groups) * block_size,
            async_scheduling,
            policy,
            {
                "spec_name": "CPUBackendTieringSpec",
                "spec_module_path": "async_tier.cpu_backend",
                "blocks_per_chunk": blocks_per_chunk,
                "cpu_bytes_to_use": primary_blocks * row_bytes,
                "secondary_tiers": [
                    {
                        "type": "AsyncSecondaryTierManager",
                        "module_path": "async_tier.manager",
                        "engine": "host",
                        "copy_threads": 1,
                        "bytes_to_use": tier_blocks * row_bytes,
                        **(tier or {}),
                    },
                    *other_tiers,
                ],
            },
        )
        self.copies: dict[str, Copies] = {}
        self.model: Any = None  # the StampModel, from when the engine core has decided on the KV cache
        self.executor = _Executor(self)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._remove_shared_memory)
            on_failure.callback(self._shut_down_worker)
            self.core = _Core(self.vllm_config, self.executor)
            on_failure.pop_all()
        self.executor.is_early = {
            "early": lambda: True,
            "late": lambda: False,
            "random": lambda: self.random.random() < 0.3,
        }[worker]
        self._hold_copies()
        self._listen()

    def make_model(self, kv_cache_config: KVCacheConfig) -> None:
        """Called by the executor, when the engine core has decided on the KV cache."""
        connector = KVConnectorFactory.create_connector(self.vllm_config, KVConnectorRole.WORKER, kv_cache_config)
        layout = self.vllm_config.cache_config.get_resolved_kv_cache_layout()
        self.model = StampModel(kv_cache_config, layout, connector, self._between)

    def _hold_copies(self) -> None:
        """Hold the streams of worker and tier; but whoever waits for a copy gets it."""
        worker, tier = self.worker, self.tier
        store = tier.block_store
        # The arena's memory is backed at the copy threads' pace, and only rows that are backed are used.
        until(lambda: store.arena.ready == store.statistics().capacity, "all of the arena is usable")
        if self._mode == "free":
            return
        streams = {
            "worker.load": worker.engine.load_stream,
            "worker.store": worker.engine.store_stream,
            "tier.load": store.engine.load_stream,
            "tier.store": store.engine.store_stream,
        }
        self.copies = {name: Copies(name, stream) for name, stream in streams.items()}
        wait, drain_jobs = worker.wait, tier.drain_jobs

        def wait_for_held(job_ids: set[int]) -> None:
            events = [worker.events[job_id] for job_id in job_ids & worker.events.keys()]
            for name in ("worker.load", "worker.store"):
                self.copies[name].start(events)
            wait(job_ids)
            assert all(event.is_done for event in events), "the worker's wait has not waited"

        def drain_held() -> None:
            events = self.copies["tier.load"].start() + self.copies["tier.store"].start()
            drain_jobs()
            assert all(event.is_done for event in events), "drain_jobs has not waited"

        worker.wait, tier.drain_jobs = wait_for_held, drain_held

    def _listen(self) -> None:
        """Take note of what passes between manager, worker and tier, and poison what is to be filled."""
        worker, tier, manager = self.worker, self.tier, self.manager
        submit_store, submit_load = worker.submit_store, tier.submit_load
        prepare_load, prepare_store = manager.prepare_load, manager.prepare_store
        # Dropped in `close`: vLLM closes the memory map.
        self._primary = np.asarray(manager.primary_tier.get_kv_memoryview()).view(np.uint64)

        def poison_store(job_id: int, source: Any, destination: Any) -> bool:
            self._primary[destination.block_ids] = TO_STORE
            return submit_store(job_id, source, destination)

        def poison_promotion(job: Any) -> None:
            self._primary[job.chunk_ids] = TO_PROMOTE
            self._promoted.update(job.keys)
            submit_load(job)

        def note_load(keys: Sequence[bytes], context: ReqContext) -> Any:
            served = self.served.setdefault(context.req_id, Served())
            served.blocks += len(keys)
            served.from_tier += sum(key in self._promoted for key in keys)
            return prepare_load(keys, context)

        def note_store(keys: Sequence[bytes], context: ReqContext) -> Any:
            prepared = prepare_store(keys, context)
            if prepared is not None:
                self._promoted.difference_update(prepared.keys_to_store)
            return prepared

        worker.submit_store, tier.submit_load = poison_store, poison_promotion
        manager.prepare_load, manager.prepare_store = note_load, note_store

    # ------------------------------------------------------------------------------------------------------ its parts

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def manager(self) -> Any:
        return self.scheduler.connector.connector_scheduler.manager

    @property
    def tier(self) -> AsyncSecondaryTierManager:
        return self.manager.secondary_tiers[0]

    @property
    def worker(self) -> HostOffloadingWorker:
        return self.model.connector.connector_worker.worker

    # ------------------------------------------------------------------------------------------------------- requests

    def add(self, prompt: Sequence[int], max_tokens: int = 1, request_id: str | None = None, priority: int = 0) -> str:
        """A new request; its id. Prompt and answer must fit into `max_model_len`, which vLLM's front end checks."""
        assert len(prompt) + max_tokens <= self.vllm_config.model_config.max_model_len, "too long for the KV cache"
        number = next(self._ids)
        request_id = request_id or f"r{number}"
        assert request_id not in self.requests, f"there was a request {request_id}"
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        sampling.update_from_generation_config({}, END_OF_TEXT)
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=float(number),
            priority=priority,
            block_hasher=self.core.request_block_hasher,
        )
        self.requests[request_id] = request
        self._outputs[request_id] = []
        self.core.add_request(request)
        return request_id

    def abort(self, request_id: str, during_step: bool = False) -> None:
        """The client has gone: seen between two steps, or before the results of the next ones are taken in."""
        if during_step:
            self.core.aborts_queue.put([request_id])
        else:
            self.core.abort_requests([request_id])
            self._note_aborts()

    @property
    def live(self) -> list[str]:
        """Requests that have not ended."""
        return [request_id for request_id in self.requests if request_id not in self.finished]

    @property
    def preemptions(self) -> int:
        return sum(request.num_preemptions for request in self.requests.values())

    def blocks_of(self, prompt: Sequence[int], group: int = 0) -> list[bytes]:
        """The keys of a prompt's full blocks, in order."""
        request = Request("keys", list(prompt), SamplingParams(), None, block_hasher=self.core.request_block_hasher)
        return [make_offload_key(block_hash, group) for block_hash in request.block_hashes]

    # ---------------------------------------------------------------------------------------------------------- steps

    def step(self) -> bool:
        """One turn of the engine core's loop; whether there was anything to do. Raises WrongKV."""
        if not self.core.has_work():
            return False
        self.steps += 1
        self._between()
        if self._mode == "prompt":
            self.let_go()
        if self.executor.steps_submitted and self.executor.is_early():
            self.executor.catch_up()
        outputs, _ = self.core.step_fn()
        for output in (outputs or {}).values():
            for each in output.outputs:
                self._outputs[each.request_id].extend(each.new_token_ids)
                if each.finish_reason is not None:
                    self._end(each.request_id, str(each.finish_reason))
        self._note_aborts()
        if self.model.wrong:
            raise WrongKV(self.model.wrong)
        return True

    def run(self, max_steps: int = 1000, condition: Callable[[], object] | None = None) -> int:
        """Step until nothing is left to do, or the condition holds; the number of steps.

        Raises AssertionError, which says what has not ended, if that takes more than `max_steps`.
        """
        for steps in range(max_steps + 1):
            if condition is not None and condition():
                return steps
            if steps == max_steps or not self.step():
                break
        assert condition is None, f"after {steps} steps, the condition does not hold: {self.describe()}"
        assert not self.core.has_work(), f"after {steps} steps: {self.describe()}"
        return steps

    def describe(self) -> str:
        """What is under way, for a failed test."""
        waiting = ", ".join(
            f"{request_id} has not finished ({self.requests[request_id].status.name}, "
            f"{self.requests[request_id].num_computed_tokens} of {self.requests[request_id].num_tokens} tokens)"
            for request_id in self.live
        )
        held = {name: copies.waiting for name, copies in self.copies.items()}
        return f"{waiting or 'all requests have finished'}; {self.in_flight()}; held copies {held}; {self.statistics()}"

    def settle(self, max_steps: int = 1000, but: Sequence[str] = ()) -> int:
        """`run`, but let all held copies go before each step, except those of the streams named in `but`."""
        for steps in range(max_steps):
            self.let_go(but)
            if not self.step():
                return steps
        raise AssertionError(f"after {max_steps} steps: {self.describe()}")

    def let_go(self, but: Sequence[str] = ()) -> None:
        """Let the copies that are held now go, except those of the streams named in `but`."""
        for name, copies in self.copies.items():
            if name not in but:
                copies.go()

    def _between(self) -> None:
        """A point at which copies may have got further."""
        if self._mode != "random":
            return
        for copies in self.copies.values():
            if copies.stalled:
                copies.stalled -= 1
                continue
            choice = self.random.random()
            if choice < 0.1:
                copies.stalled = self.random.randrange(30)
            elif choice < 0.5:
                copies.go(self.random.randrange(1, 3))
            elif choice < 0.75:
                copies.go()

    def _note_aborts(self) -> None:
        for request_id in self.live:
            if self.requests[request_id].status is RequestStatus.FINISHED_ABORTED:
                self.aborted.append(request_id)
                self._end(request_id, "abort")

    def _end(self, request_id: str, reason: str) -> None:
        tokens = self._outputs[request_id]
        prompt = self.requests[request_id].prompt_token_ids
        assert tokens == continuation(prompt, len(tokens)), f"{request_id} has lost tokens, or has them twice: {tokens}"
        self.finished[request_id] = Finished(tuple(tokens), reason)

    # --------------------------------------------------------------------------------------------------------- caches

    def reset(self, mode: Literal["keep", "abort", "wait", "now", "connector"] = "keep") -> bool:
        """Reset all caches; whether that could be done.

        "keep", "abort", "wait": as EngineCoreProc.pause_scheduler does, which lets what is under way end first, and
        then go on. "now": as the endpoint /reset_prefix_cache?reset_running_requests=true&reset_external=true does,
        between two steps. vLLM refuses both while a request that was not aborted waits for a load, and the latter while
        a step is under way. "connector": without `reset_running_requests`, so that requests go on, and with them a
        step under way; the KV cache is then reset only if nothing uses it.

        If all caches were reset there are new weights, unless the tier is to keep what it has.
        """
        scheduler = self.scheduler
        if scheduler.connector.connector_scheduler._current_batch_jobs_to_flush:
            return False  # vLLM asserts that a step has been planned since the last reset
        if mode in ("keep", "abort", "wait"):
            if mode == "abort":
                scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
                self._note_aborts()
            scheduler.set_pause_state(PauseState.PAUSED_ALL if mode == "keep" else PauseState.PAUSED_NEW)
            for _ in range(PAUSE_STEPS):
                if not self.step():
                    break
                if self._mode == "manual":
                    self.let_go()
            else:
                raise AssertionError(f"no pause after {PAUSE_STEPS} steps: {self.describe()}")
            done = not self._would_be_refused()
            if done:
                self.core._finish_pause(clear_cache=True)
            self.core.resume_scheduler()
        elif mode == "now":
            done = not self._would_be_refused() and self.core.reset_prefix_cache(
                reset_running_requests=True, reset_connector=True
            )
        else:
            done = self.core.reset_prefix_cache(reset_connector=True)
        if done:
            self.executor.catch_up()
            self.resets += 1
            if not self.keeps_on_reset:
                self.model.weights += 1
        return done

    def _would_be_refused(self) -> bool:
        """Whether vLLM would raise, because blocks of the KV cache are in use that it cannot free at once.

        Not tried, for it preempts all requests first, and fails an assertion when one of those takes a load in the
        next step.
        """
        scheduler = self.scheduler
        return bool(scheduler.deferred_frees) or any(
            not scheduler._request_blocks_can_be_freed(request)
            if request.status is RequestStatus.RUNNING
            else request.is_finished() or scheduler._holds_kv_blocks(request)
            for request in scheduler.requests.values()
        )

    def evict_gpu(self) -> bool:
        """Reset the prefix cache of the KV cache only; False while it is in use."""
        return self.core.reset_prefix_cache()

    def evict_primary(self) -> None:
        """Evict all blocks of the primary that are not in use."""
        primary, context = self.manager.primary_tier, ReqContext(req_id="evicts")
        others = [make_offload_key(number.to_bytes(32, "big"), 0) for number in range(primary._num_chunks)]
        taken = []
        for other in others:
            if primary.prepare_store([other], context) is None:
                break
            taken.append(other)
        primary.complete_store(taken, context, success=False)

    # ------------------------------------------------------------------------------------------------------- accounts

    def statistics(self) -> Any:
        """The tier's own; see async_tier.block_store.Statistics."""
        return self.tier.statistics()

    def in_flight(self) -> InFlight:
        """What is under way; all zero when nothing is."""
        scheduler, connector = self.scheduler, self.scheduler.connector.connector_scheduler
        pool, primary = scheduler.kv_cache_manager.block_pool, self.manager.primary_tier
        return InFlight(
            requests=len(scheduler.requests),
            batches=len(self.core.batch_queue or ()) + self.executor.steps_submitted,
            connector_jobs=len(connector._jobs),
            worker_jobs=len(self.worker.events) + len(self.model.connector.connector_worker._unsubmitted_store_jobs),
            manager_jobs=len(self.manager._jobs),
            manager_requests=len(self.manager._req_state),
            tier_jobs=self.statistics().jobs_in_flight,
            primary_pinned=primary._num_allocated_chunks
            - len(primary._free_list)
            - primary._num_evictable_cache_chunks,
            gpu_blocks=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        )

    def check_quiet(self) -> None:
        """Nothing is under way, nothing is held, and the tier has met no fault."""
        if self.scheduler.connector.connector_scheduler._current_batch_jobs_to_flush:
            # After a reset the worker's jobs are nobody's until the next step, which waits for them.
            self.add([1])
            self.run()
        assert self.in_flight() == InFlight(*[0] * 9), self.describe()
        statistics = self.statistics()
        assert not statistics.faults, statistics
        assert not statistics.failed_jobs, statistics
        promises = self.tier.promises
        assert not promises.total, f"still promised: {promises.by_request}"
        assert not promises.known_requests
        assert not self.live, self.describe()

    # ------------------------------------------------------------------------------------------------------------ end

    def close(self) -> None:
        for copies in self.copies.values():
            copies.release()
        self._primary = np.empty(0)
        with contextlib.ExitStack() as ends:
            ends.callback(self._remove_shared_memory)
            ends.callback(self.core.scheduler.shutdown)
            ends.callback(self._shut_down_worker)

    def _shut_down_worker(self) -> None:
        if self.model is not None:
            self.model.connector.shutdown()

    def _remove_shared_memory(self) -> None:
        self.shared_memory.unlink(missing_ok=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _layer_specs(groups: Sequence[int | None], layers: int, block_size: int) -> dict[str, KVCacheSpec]:
    """By layer: the layers take turns, as in models with several kinds of attention."""
    common = {"block_size": block_size, "num_kv_heads": 1, "head_size": 1, "dtype": torch.int64}
    return {
        f"model.layers.{number}.self_attn.attn": (
            FullAttentionSpec(**common) if window is None else SlidingWindowSpec(**common, sliding_window=window)
        )
        for number, window in enumerate(list(groups) * layers)
    }


def _make_config(
    engine_id: str,
    gpu_blocks: int,
    block_size: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    async_scheduling: bool,
    policy: Any,
    extra_config: dict[str, Any],
) -> VllmConfig:
    model = ModelConfig(
        model=_model_folder().name, skip_tokenizer_init=True, dtype="float32", max_model_len=max_model_len
    )
    config = VllmConfig(
        model_config=model,
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            policy=policy,
        ),
        cache_config=CacheConfig(block_size=block_size, enable_prefix_caching=True, num_gpu_blocks_override=gpu_blocks),
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            engine_id=engine_id,
            kv_connector_extra_config=extra_config,
        ),
        device_config=DeviceConfig("cpu"),
    )
    # vLLM's CPU platform turns it off; nothing here depends on the platform.
    config.scheduler_config.async_scheduling = async_scheduling
    return config
