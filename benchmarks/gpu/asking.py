"""How facts are noted and asked, some of them in a process of their own."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from benchmarks.gpu import EMULATED
from benchmarks.gpu.device import ROOT, Bench

# (whether it is as expected, what was seen)
Seen = tuple[bool, str]
Fact = Callable[[Bench], Seen]
# A process that a fact may damage is ended then.
CHILD_SECONDS = 120 if EMULATED else 20

_CHILD = """
import json, os, sys
from benchmarks.gpu import device, facts
bench = device.Bench()
with bench.context:
    print(json.dumps(facts.FACTS[sys.argv[1]][1].__wrapped__(bench)))
sys.stdout.flush(); os._exit(0)
"""


class Facts(dict[str, tuple[str, Fact]]):
    """By number: what it is called, and the question."""

    def note(self, number: str, name: str, in_child: bool = False) -> Callable[[Fact], Fact]:
        """Decorates a fact. in_child: it may damage the process that asks, so that one of its own does."""

        def noted(question: Fact) -> Fact:
            self[number] = name, functools.wraps(question)(lambda _: _in_child(number)) if in_child else question
            return question

        return noted


def needs_batch(question: Fact) -> Fact:
    @functools.wraps(question)
    def ask(bench: Bench) -> Seen:
        return question(bench) if bench.has_batch else (True, "this driver has no batch call")

    return ask


def _in_child(number: str) -> Seen:
    """It prints what it has seen so far, and last the answer."""
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, number]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode()
        return not EMULATED, f"did not end in {CHILD_SECONDS} s; before: {_one_line(said)}"
    if ran.returncode < 0:
        return not EMULATED, f"ended by signal {-ran.returncode}; before: {_one_line(ran.stdout)}"
    if ran.returncode:
        return False, f"exit status {ran.returncode}; before: {_one_line(ran.stdout)}; {ran.stderr.strip()[-300:]}"
    right, seen = json.loads(ran.stdout.splitlines()[-1])
    return right, seen


def _one_line(said: str) -> str:
    return "; ".join(said.strip().splitlines())


def listed(codes: dict[str, Any]) -> str:
    return ", ".join(f"{what}: {code}" for what, code in codes.items())


def on_a_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
