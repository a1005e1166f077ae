"""Who is compared in `serving`: a server each, and what it answered."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.demo.server import Answer, Metrics, Server, of_tier

NO_OFFLOAD, FS, OURS = "no offloading", "fs", "ours"
# Of an answer: enough to see that texts are equal, few, because decoding is not what is measured.
MAX_TOKENS = 6
# Of the answer that a server is woken with, and of one to a prompt that is repeated: its first token is what counts.
SHORT_TOKENS = 2
QUESTION = "\nTurn {turn}: which warehouse is named next, and what does it hold?\nAnswer:"
# What vLLM counts follows an answer by some milliseconds.
METRICS_TIMEOUT_S = 10.0


@dataclass
class Contender:
    """A server. `turns` by turn and conversation, `unique` by the number of the prompt.

    contexts: the conversations so far. repeats: whether it is asked each prompt of a later turn again at once; then
    those answers are `repeated`. read, written: bytes that its secondary tier gave in all conversations, and took of
    `unique`.
    """

    server: Server
    contexts: list[str]
    repeats: bool
    turns: list[list[Answer]] = field(default_factory=list)
    repeated: list[Answer] = field(default_factory=list)
    unique: dict[int, Answer] = field(default_factory=dict)
    read: float = 0.0
    written: float = 0.0
    _asked: int = 0

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the server run, and ask it something short first, which pays for what waking up costs."""
        self.server.resume()
        self.ask("Hello.", SHORT_TOKENS)
        yield
        self.server.pause()

    @property
    def later(self) -> list[Answer]:
        return [answer for turn in self.turns[1:] for answer in turn]

    def converse(self, number: int) -> None:
        """The next turn of a conversation; a later one at once again, if it `repeats`."""
        turn = sum(number < len(answers) for answers in self.turns)
        if turn == len(self.turns):
            self.turns.append([])
        prompt = self.contexts[number] + QUESTION.format(turn=turn + 1)
        answer = self.ask(prompt)
        self.turns[turn].append(answer)
        if turn and self.repeats:
            self.repeated.append(self.ask(prompt, SHORT_TOKENS))
        self.contexts[number] = prompt + answer.text

    def ask_once(self, prompts: Iterable[tuple[int, str]]) -> None:
        """Prompts that share nothing, by number."""
        before = self.metrics()
        for number, prompt in prompts:
            self.unique[number] = self.ask(prompt)
        self.written += of_tier(self.metrics(), "write_bytes_total") - of_tier(before, "write_bytes_total")

    def ask(self, prompt: str, tokens: int = MAX_TOKENS) -> Answer:
        self._asked += 1
        return self.server.ask(prompt, tokens, ignore_eos=True)

    def metrics(self) -> Metrics:
        """What vLLM has counted, everything asked included. Between requests: it takes some milliseconds."""
        deadline = time.monotonic() + METRICS_TIMEOUT_S
        while True:
            metrics = self.server.metrics()
            if round(metrics.get(("vllm:request_prefill_time_seconds_count", ""), 0.0)) >= self._asked:
                return metrics
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server's metrics do not have all of its {self._asked} answers")
