"""FaultLog: log lines about what goes wrong, few enough to be read."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

# Between two lines of one kind.
INTERVAL_S = 1.0
# What differs between reasons that are alike.
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+|b?'[^']*'")
# Beyond so many, kinds are told apart by the error's type alone: there may be one whose text never repeats.
MAX_KINDS = 64


def one_line(text: object) -> str:
    """`text` without line breaks, of which torch's errors have some."""
    return " ".join(str(text).split())


class _Kind:
    __slots__ = ("held_back", "last_line", "logged_at")

    def __init__(self, logged_at: float) -> None:
        self.logged_at = logged_at
        # Not said since then, and the last of them.
        self.held_back = 0
        self.last_line = ""


class FaultLog:
    """At most one line a second of a kind: the first with its traceback, later ones with how many there were between.

    A kind is what was being done, the type of the error, and the reason but for its numbers. For one thread at a time.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._kinds: dict[tuple[str, type, str], _Kind] = {}
        # Whether `flush` may have something to say. To be read by anyone.
        self.has_held_back = False

    def report(self, doing: str, line: str, error: BaseException | None = None, reason: str = "") -> None:
        """Say `line`, which has the reason in it, now, or count it and say that later."""
        now = self._clock()
        name = doing, type(error), _VARYING.sub("#", reason)
        if name not in self._kinds and len(self._kinds) >= MAX_KINDS:
            name = doing, type(error), ""
        kind = self._kinds.get(name)
        if kind is None:
            self._kinds[name] = _Kind(now)
            self._logger.error("%s", line, exc_info=error)
        else:
            kind.held_back += 1
            kind.last_line = line
            self._log_held_back(kind, now)

    def flush(self, *, now: bool = False) -> None:
        """Say what was counted, of kinds whose second is over, or of all."""
        at = self._clock()
        self.has_held_back = False
        for kind in self._kinds.values():
            if kind.held_back:
                self._log_held_back(kind, at, now)

    def _log_held_back(self, kind: _Kind, at: float, now: bool = False) -> None:
        if at - kind.logged_at < INTERVAL_S and not now:
            self.has_held_back = True
            return
        more = f" (and {kind.held_back - 1} more like it since the last such line)" if kind.held_back > 1 else ""
        self._logger.error("%s%s", kind.last_line, more)
        kind.logged_at, kind.held_back = at, 0
