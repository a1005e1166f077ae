"""Promises: limits how many blocks the tier reports as hits at a time, so that the primary can hold them.

A hit has a side effect in vLLM: it reserves a row of the primary at once, the block is loaded into it ("promoted"),
and the request's blocks are looked up again in the next step. If the rows promised to a request are then taken by
another one, the request starts over, and this can go on forever: with a prompt of more blocks than the primary has, or
with several waiting requests that together have more (vLLM #50014, #42371, #49902).

So this class keeps account, by request, of the blocks that were promised and not taken up yet. vLLM reports when a
request is scheduled for the first time, by when its blocks have arrived, and when it has ended. vLLM does not report
that a preempted request resumes: it shows when the request stores blocks, or is no longer looked up.

    KEEP     a hit: the block fits beside those promised earlier to its own request and to the others
    WAIT     vLLM's RETRY: it does not fit beside the blocks promised to others, which they will take up
    REFUSE   a miss: it does not fit beside the earlier blocks of its own request, or the wait has lasted too long

- A request is promised all of its blocks that are here, or none yet: if two had a part each, neither could go on.
- The request that is looked up first in a step goes first: while it waits, nothing is promised to later ones.
- A waiting request gets one WAIT per step and KV group, then REFUSE, so that vLLM does not look up all its blocks.
- Every wait ends. A promise is void once its request was not looked up for STALE_STEPS (after a preemption, for
  RESUMED_STEPS). A request is refused after PATIENCE_STEPS in which no promise was taken up, or MAX_WAIT_STEPS.
- A request whose promised rows were taken by running requests is promised them again, up to MAX_RENEWALS times.

No vLLM. Called by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from async_tier.order import SequenceOrder

KEEP, WAIT, REFUSE = range(3)

# Counted in steps, because steps are what a request waits for: blocks move on to the GPU, and requests are scheduled.
# A step in which nothing can run takes a millisecond or less.
STALE_STEPS = 128
RESUMED_STEPS = 16
PATIENCE_STEPS = 512
MAX_WAIT_STEPS = 1 << 14
# How much of a step is counted while promised blocks are being loaded, which may take long, but not forever.
_LOADING_STEP = 1 / 16
MAX_RENEWALS = 8


class _Promise:
    """One request's promise. `step`, `answer`, `overflow`, `room`: of the last step in which it was looked up."""

    __slots__ = (
        *("answer", "overflow", "firsts", "keys", "last", "order", "patience", "renewals", "renewed", "room", "size"),
        *("step", "take_ups", "waited"),
    )

    def __init__(self, order: SequenceOrder | None) -> None:
        self.order = order
        # Promised keys whose load was submitted; and the last of them in the request.
        self.keys: set[bytes] = set()
        self.last: bytes | None = None
        # The rows of the primary promised to it: those of `keys`, and those promised in this step.
        self.size = 0
        self.step = -1
        # The answer to all further lookups of this step, once it is decided.
        self.answer: int | None = None
        # How many more blocks may be promised. With several KV groups also the first block that does not fit.
        self.room = 0
        self.overflow: bytes | None = None
        # While it waits: by KV group, the first key looked up in this step; how many steps it has waited; and how many
        # more it will wait, which starts anew whenever another request takes up its promise (`take_ups`).
        self.firsts: dict[int, bytes] = {}
        self.waited = 0
        self.patience = 0.0
        self.take_ups = -1
        self.renewals = 0
        self.renewed = -1


class Promises:
    """The promises for a primary with `rows` rows.

    is_here(key): whether the block can be loaded. group_of(key): its KV group.
    """

    def __init__(self, rows: int, is_here: Callable[[bytes], bool], group_of: Callable[[bytes], int]) -> None:
        self._rows = rows
        self._is_here = is_here
        self._group_of = group_of
        self._promises: dict[str, _Promise] = {}
        # The sum of their sizes, in rows.
        self._total = 0
        # By load job, its request.
        self._loads: dict[int, str] = {}
        self._step = 0
        self._asked: list[_Promise] = []
        self._preempted: set[str] = set()
        # How often a request took up its promise, was told to wait, and was refused a block that is here. Others may
        # read these; only this class changes them.
        self.take_ups = self.waits = self.refusals = 0
        # Whether a request waits for room in this step.
        self._has_waiting = False
        # A shortcut: the next `room` blocks of the request `asking` are KEEP, whatever their keys. The caller then
        # decrements `room` and does not call `ask`, which would take longer than the lookup itself.
        self.asking: str | None = None
        self.room = 0

    @property
    def total(self) -> int:
        """Rows that are promised."""
        return self._total

    @property
    def by_request(self) -> dict[str, int]:
        """Rows that each request is promised: a copy."""
        return {request: promise.size for request, promise in self._promises.items()}

    @property
    def known_requests(self) -> set[str]:
        """Requests that account is kept of, for whatever reason: a copy."""
        return {*self._promises, *self._loads.values(), *self._preempted}

    def ask(self, request: str, key: bytes, order: SequenceOrder | None) -> int:
        """KEEP, WAIT or REFUSE: the answer to the request's lookup of `key`, a block that is here."""
        answer = self._answer(request, key, order)
        if answer == WAIT:
            self.waits += 1
        elif answer == REFUSE and self._promises[request].answer != WAIT:  # it was not told to wait in this step
            self.refusals += 1
        return answer

    def note_load(self, job: int, request: str, keys: Collection[bytes]) -> None:
        """A load was submitted. Promises of this step are void at its end unless their blocks are being loaded."""
        self._count_granted()
        promise = self._promises.get(request)
        if promise is not None and keys:
            promise.keys.update(keys)
            *_, promise.last = keys
            self._loads[job] = request

    def note_end(self, job: int, success: bool) -> None:
        """A job has ended. If it was a load that failed, its blocks are gone and not promised any more."""
        promise = self._promises.get(self._loads.pop(job, ""))
        if promise is not None and not success:
            promise.keys = set(filter(self._is_here, promise.keys))
            self._resize(promise, len(promise.keys))

    def end_step(self, scheduled: Iterable[str] = (), preempted: Iterable[str] = ()) -> None:
        """End a scheduler step. scheduled: requests scheduled in it for the first time. preempted: those preempted."""
        self.asking = None  # its shortcut promises are like all others: void unless their blocks are being loaded
        for promise in self._asked:
            self._resize(promise, len(promise.keys))
        self._asked.clear()
        self._has_waiting = False
        for request in scheduled:
            if request in self._promises and self._promises[request].keys:
                self.take_ups += 1
            self.void(request)
        self._preempted.update(preempted)
        self._step += 1
        if self._step % STALE_STEPS == 0:
            self._void_stale()

    def void(self, request: str) -> None:
        """Void the request's promise: it has the blocks, or no longer needs them."""
        self._count_granted()
        promise = self._promises.pop(request, None)
        if promise is not None:
            promise.keys.clear()  # because `end_step` may still set its size to their number
            self._resize(promise, 0)

    def finish(self, request: str) -> None:
        """The request has ended; the name may be used again for another one."""
        self.void(request)
        self._preempted.discard(request)

    def clear(self) -> None:
        """Void all promises."""
        self.asking = None
        self._promises.clear()
        self._loads.clear()
        self._asked.clear()
        self._total = 0

    # ------------------------------------------------------------------------------------------------------- details

    def _answer(self, request: str, key: bytes, order: SequenceOrder | None) -> int:
        self._count_granted()
        promise = self._promises.get(request)
        if promise is None or promise.step != self._step:
            promise = self._begin(request, key, order)
        if promise.answer is None and promise.keys and key in promise.keys:
            return self._renew(promise)
        if promise.answer is None and promise.room <= 0 and not self._make_room(promise, key):
            promise.answer = self._wait(promise) if self._total > promise.size else REFUSE
        if promise.answer is not None:
            is_first = promise.firsts.setdefault(self._group_of(key), key) == key
            return promise.answer if is_first else REFUSE
        if promise.overflow is not None and order is not None and not order.precedes(key, promise.overflow):
            return REFUSE
        promise.room -= 1
        self._resize(promise, promise.size + 1)
        if not promise.keys and promise.overflow is None:
            self.asking, self.room = request, promise.room
        return KEEP

    def _count_granted(self) -> None:
        """Count the blocks that were promised by the shortcut."""
        if self.asking is not None:
            promise = self._promises[self.asking]
            self._resize(promise, promise.size + promise.room - self.room)
            promise.room = self.room
            self.asking = None

    def _begin(self, request: str, key: bytes, order: SequenceOrder | None) -> _Promise:
        """The request's promise, at its first lookup in this step."""
        promise = self._promises.get(request)
        if promise is None:
            promise = self._promises[request] = _Promise(order)
        promise.step, promise.answer, promise.overflow = self._step, None, None
        promise.firsts.clear()
        self._asked.append(promise)
        others = self._total - promise.size
        promise.room = self._rows - self._total
        if others and not promise.keys and (self._has_waiting or self._first_overflow(promise, key) is not None):
            promise.answer = self._wait(promise)
        elif order is not None and self._group_of(key) != self._group_of(order.last_noted or key):
            promise.overflow = self._first_overflow(promise, key)
        return promise

    def _first_overflow(self, promise: _Promise, key: bytes) -> bytes | None:
        """The request's first block from `key` on that is here but does not fit; None if all fit.

        Stops at the first block of the key's KV group that is not here: those behind it cannot be used.
        """
        group, room = self._group_of(key), promise.room
        for each in (key,) if promise.order is None else promise.order.following(key):
            if self._is_here(each):
                if room <= 0:
                    return each
                room -= 1
            elif self._group_of(each) == group:
                break
        return None

    def _void_stale(self) -> None:
        """Void the promises of requests that are no longer looked up."""
        loading = set(self._loads.values())
        for request, promise in list(self._promises.items()):
            most = RESUMED_STEPS if request in self._preempted else STALE_STEPS
            if promise.step < self._step - most and request not in loading:
                self.void(request)

    def _wait(self, promise: _Promise) -> int:
        if not self._has_waiting and self._step % RESUMED_STEPS == 0:
            self._void_stale()
        if promise.take_ups != self.take_ups:
            promise.take_ups, promise.patience = self.take_ups, PATIENCE_STEPS
        promise.waited += 1
        promise.patience -= _LOADING_STEP if self._loads else 1
        if promise.patience < 0 or promise.waited > MAX_WAIT_STEPS:
            return REFUSE
        self._has_waiting = True
        return WAIT

    def _renew(self, promise: _Promise) -> int:
        """Promise again a block whose row of the primary was taken before the request could use it."""
        if promise.renewed != self._step:
            promise.renewed = self._step
            promise.renewals += 1
            if promise.renewals > MAX_RENEWALS:
                promise.answer = REFUSE
                return REFUSE
        return KEEP

    def _make_room(self, promise: _Promise, key: bytes) -> bool:
        """Take back what the request was promised behind `key` in earlier steps: without `key` that is useless."""
        order = promise.order
        if order is None or promise.last is None or not order.precedes(key, promise.last):
            return False
        behind = [each for each in promise.keys if order.precedes(key, each)]
        promise.keys.difference_update(behind)
        promise.room += len(behind)
        self._resize(promise, promise.size - len(behind))
        return promise.room > 0

    def _resize(self, promise: _Promise, size: int) -> None:
        self._total += size - promise.size
        promise.size = size
