"""The log lines of the whole package look like vLLM's, and go where those go."""

from __future__ import annotations

import logging


def adopt_vllms_logging() -> None:
    """Give the package's loggers the handlers and the level of vLLM's, which vLLM configures for its own names only.

    To be called late: vLLM configures logging when a process of its own starts, not when it is imported. Nothing is
    changed where somebody has configured logging for `async_tier`, or for all loggers.
    """
    ours, theirs = logging.getLogger("async_tier"), logging.getLogger("vllm")
    if not ours.hasHandlers():
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
