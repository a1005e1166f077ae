"""FaultLog: logs faults, but few enough lines to be read."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

# Between two lines of the same kind, at least.
INTERVAL_S = 1.0
# The parts in which similar reasons differ: addresses, numbers and quoted names.
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+|b?'[^']*'")
# Beyond so many kinds, reasons are ignored, because the text of some error may never repeat.
MAX_KINDS = 64


def one_line(text: object) -> str:
    """`text` on one line; torch's errors have several."""
    return " ".join(str(text).split())


class _Kind:
    __slots__ = ("held_back", "last_line", "logged_at")

    def __init__(self, logged_at: float) -> None:
        self.logged_at = logged_at
        # How many lines were held back since then, and the last of them.
        self.held_back = 0
        self.last_line = ""


class FaultLog:
    """Logs at most one line per second and kind. The first has the traceback, later ones the number of lines held back.

    A kind is what was being done, the type of the error, and the reason without its numbers. For one thread at a time.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._kinds: dict[tuple[str, type, str], _Kind] = {}
        # Whether `flush` may have lines to log. Others may read it.
        self.has_held_back = False

    def report(self, doing: str, line: str, error: BaseException | None = None, reason: str = "") -> None:
        """Log `line`, which includes the reason, or hold it back and count it. doing, error, reason: its kind."""
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
        """Log what was held back of kinds whose second is over or, with `now`, of all."""
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


def error_text(reason: object) -> str:
    """The error's type and message, on one line."""
    text = one_line(reason)
    if isinstance(reason, BaseException):
        text = f"{type(reason).__name__}: {text}" if text else type(reason).__name__
    return text
