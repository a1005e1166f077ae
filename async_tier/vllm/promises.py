"""Promises: how much of the tier vLLM is told of at once, so that the primary can hold what it was told of.

A hit has a side effect in vLLM: it takes a row of the primary at once, the block is loaded into it ("promoted"), and
the request is asked about again in the next step. Whoever is given the rows that others were promised makes them ask
again, for ever: a prompt of more blocks than the primary has, or several waiting requests of together more (vLLM
#50014, #42371, #49902).

So account is kept by request of what it was promised and has not taken up. vLLM says when a request is scheduled for
the first time, which is after its blocks have arrived, and when it is over. That it resumes one after a preemption it
does not say: it shows by what the request stores, or by asking no more.

    KEEP     the block fits beside what its request was promised before, and beside what others were
    WAIT     it does not fit beside the others, who will take theirs up
    REFUSE   it does not fit beside what comes before it in its own request, or the wait has lasted too long

- A request is promised all of its blocks that are here, or none yet: with parts of two, neither could go on.
- Who asks first in a step has precedence: while it waits, nothing is promised to those behind it.
- Who waits is told so once a step for each KV group, and that the rest is not here: else vLLM would ask for all of it.
- Every wait ends: promises that nobody has asked about for STALE_STEPS (after a preemption: RESUMED_STEPS) are void,
  and who has waited PATIENCE_STEPS in which nobody took up anything, or LONGEST_WAIT_STEPS, is refused.
- A request that loses what it was promised, because running ones take the rows, is promised it again MOST_RENEWALS
  times.

No vLLM. Called by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from async_tier.order import SequenceOrder

KEEP, WAIT, REFUSE = range(3)

# In steps, because what is waited for takes steps: blocks that are here go on to the GPU, and the request is scheduled.
# A step in which nothing can run takes a millisecond or less.
STALE_STEPS = 128
RESUMED_STEPS = 16
PATIENCE_STEPS = 512
LONGEST_WAIT_STEPS = 1 << 14
# What a step counts while promised blocks are on their way, which may take long, but not for ever.
_LOADING_STEP = 1 / 16
MOST_RENEWALS = 8


class _Promise:
    """What one request was promised. `step`, `answer`, `beyond` and `room` are of the last step that it asked in."""

    __slots__ = (
        *("answer", "beyond", "firsts", "keys", "last", "order", "patience", "renewals", "renewed", "room", "size"),
        *("step", "take_ups", "waited"),
    )

    def __init__(self, order: SequenceOrder | None) -> None:
        self.order = order
        # Promised, and their load was submitted.
        self.keys: set[bytes] = set()
        self.last: bytes | None = None
        # The rows of the primary that it has a right to: for these, and for what was promised in this step.
        self.size = 0
        self.step = -1
        # What the rest of the step's questions are answered, if that is decided.
        self.answer: int | None = None
        # How many more blocks may be promised, and, of a request with several KV groups, from which one on none.
        self.room = 0
        self.beyond: bytes | None = None
        # While it waits: by KV group, what it asked for first in this step; steps in all; what is left of its patience,
        # which is new whenever others have taken up theirs.
        self.firsts: dict[int, bytes] = {}
        self.waited = 0
        self.patience = 0.0
        self.take_ups = -1
        self.renewals = 0
        self.renewed = -1


class Promises:
    """The account of a primary with `rows` rows.

    is_here: whether a block can be loaded. group_of: the KV group of a key.
    """

    def __init__(self, rows: int, is_here: Callable[[bytes], bool], group_of: Callable[[bytes], int]) -> None:
        self._rows = rows
        self._is_here = is_here
        self._group_of = group_of
        self._promises: dict[str, _Promise] = {}
        # The sum of their sizes.
        self._total = 0
        # Load job -> its request.
        self._loads: dict[int, str] = {}
        self._step = 0
        self._asked: list[_Promise] = []
        self._preempted: set[str] = set()
        # How often a request had what it was promised.
        self._take_ups = 0
        # Somebody waits for room in this step.
        self._is_short = False
        # The request that asks now, of whose blocks so many more are KEEP, whatever their keys: whoever tells it that
        # one is here takes one off `room`. To ask for each would take longer than to look for it.
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
        """KEEP, WAIT or REFUSE: may the request be told that `key` is here, which it is?"""
        self._settle()
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
        if promise.beyond is not None and order is not None and not order.precedes(key, promise.beyond):
            return REFUSE
        promise.room -= 1
        self._resize(promise, promise.size + 1)
        if not promise.keys and promise.beyond is None:
            self.asking, self.room = request, promise.room
        return KEEP

    def note_load(self, job: int, request: str, keys: Collection[bytes]) -> None:
        """Of what was promised in this step, in the order of asking, only what is loaded stays so when it ends."""
        self._settle()
        promise = self._promises.get(request)
        if promise is not None and keys:
            promise.keys.update(keys)
            *_, promise.last = keys
            self._loads[job] = request

    def note_end(self, job: int, success: bool) -> None:
        """A job has ended. Blocks whose load failed are not here any more, and not promised."""
        promise = self._promises.get(self._loads.pop(job, ""))
        if promise is not None and not success:
            promise.keys = set(filter(self._is_here, promise.keys))
            self._resize(promise, len(promise.keys))

    def end_step(self, scheduled: Iterable[str] = (), preempted: Iterable[str] = ()) -> None:
        """The end of a scheduler step, in which requests were scheduled for the first time, and others preempted."""
        self.asking = None  # what was promised to it without a question counts as the rest: if it is loaded
        for promise in self._asked:
            self._resize(promise, len(promise.keys))
        self._asked.clear()
        self._is_short = False
        for request in scheduled:
            if request in self._promises and self._promises[request].keys:
                self._take_ups += 1
            self.release(request)
        self._preempted.update(preempted)
        self._step += 1
        if self._step % STALE_STEPS == 0:
            self._release_stale()

    def release(self, request: str) -> None:
        """The request has what it was promised, or needs it no more."""
        self._settle()
        promise = self._promises.pop(request, None)
        if promise is not None:
            promise.keys.clear()  # the end of the step, if it was asked about, counts what it has
            self._resize(promise, 0)

    def finish(self, request: str) -> None:
        """The request is over; its name may come again for another."""
        self.release(request)
        self._preempted.discard(request)

    def clear(self) -> None:
        """Nothing is promised any more."""
        self.asking = None
        self._promises.clear()
        self._loads.clear()
        self._asked.clear()
        self._total = 0

    # ------------------------------------------------------------------------------------------------------- details

    def _settle(self) -> None:
        """Count what the request that asks was promised without a question."""
        if self.asking is not None:
            promise = self._promises[self.asking]
            self._resize(promise, promise.size + promise.room - self.room)
            promise.room = self.room
            self.asking = None

    def _begin(self, request: str, key: bytes, order: SequenceOrder | None) -> _Promise:
        """The first question of a request in this step."""
        promise = self._promises.get(request)
        if promise is None:
            promise = self._promises[request] = _Promise(order)
        promise.step, promise.answer, promise.beyond = self._step, None, None
        promise.firsts.clear()
        self._asked.append(promise)
        others = self._total - promise.size
        promise.room = self._rows - self._total
        if others and not promise.keys and (self._is_short or self._beyond(promise, key) is not None):
            promise.answer = self._wait(promise)
        elif order is not None and self._group_of(key) != self._group_of(order.last_noted or key):
            promise.beyond = self._beyond(promise, key)
        return promise

    def _beyond(self, promise: _Promise, key: bytes) -> bytes | None:
        """The first block of the request, from `key` on, that is here and for which there is no room; None: all fit.

        Up to the first that is not here, of the KV group that is asked about: what comes behind cannot be used.
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

    def _release_stale(self) -> None:
        """Void what nobody asks about any more."""
        loading = set(self._loads.values())
        for request, promise in list(self._promises.items()):
            most = RESUMED_STEPS if request in self._preempted else STALE_STEPS
            if promise.step < self._step - most and request not in loading:
                self.release(request)

    def _wait(self, promise: _Promise) -> int:
        if not self._is_short and self._step % RESUMED_STEPS == 0:
            self._release_stale()
        if promise.take_ups != self._take_ups:
            promise.take_ups, promise.patience = self._take_ups, PATIENCE_STEPS
        promise.waited += 1
        promise.patience -= _LOADING_STEP if self._loads else 1
        if promise.patience < 0 or promise.waited > LONGEST_WAIT_STEPS:
            return REFUSE
        self._is_short = True
        return WAIT

    def _renew(self, promise: _Promise) -> int:
        """The primary gave the row of a block away before the request could use it."""
        if promise.renewed != self._step:
            promise.renewed = self._step
            promise.renewals += 1
            if promise.renewals > MOST_RENEWALS:
                promise.answer = REFUSE
                return REFUSE
        return KEEP

    def _make_room(self, promise: _Promise, key: bytes) -> bool:
        """Take back what the request was promised, in earlier steps, behind `key`: without that it is of no use."""
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
