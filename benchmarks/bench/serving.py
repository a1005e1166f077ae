"""vLLM's server with no offloading, with its primary tier alone, with its fs tier on tmpfs, and with this tier.

Conversations of several turns over a working set several times the KV cache and the primary: when a conversation goes
on, its blocks have left both. Also the floor, a prompt that is still in vLLM's own KV cache, and what a tier costs
where nothing is ever asked for again. Two servers that are started alike differ by some percent for as long as they
run, so our server alone tells the last as well, by prompts of which half are not to be offloaded.

Of a CPU build one core is left to the server's processes other than the model's, as vLLM does by itself where there
are more. On two cores that is half of them, and so the model takes longer; but the same prompt takes the same time.

The servers take turns, prompt by prompt and in an order drawn anew for each, so that a noisy machine is as noisy to
each, and all but one are paused: an idle one would take a core for seconds after each answer, because its processes
look for work without sleeping. All are asked the same, one request at a time, and all answers must be equal to the
letter; a server on which no figure depends is asked less.

For later turns it also says where the time to the first token went, by vLLM's own metrics (see serving_parts).
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bench import serving_parts, serving_report
from benchmarks.bench.serving_parts import Parts
from benchmarks.bench.serving_report import FS, NO_OFFLOAD, OURS, PRIMARY
from benchmarks.demo.demo import BLOCK_TOKENS, FLOAT32_BYTES, documents
from benchmarks.demo.model import kv_bytes_per_token, smollm2
from benchmarks.demo.server import Server, launch
from benchmarks.shared.common import BUILD, TMPFS, Run, arguments

CONVERSATIONS, TURNS, TOKENS = 4, 6, 1800
# Of an answer: enough to see that texts are equal, few, because decoding is not what is measured.
MAX_TOKENS = 6
# Of the answer that a server is woken with, and of one to a prompt that is repeated: its first token is what counts.
SHORT_TOKENS = 2
# Prompts that are asked once, of two blocks and a little: on two cores each takes a second or two. A few on one
# server, then the same on the next; ours is asked as many more that it does not offload.
ROUNDS, PROMPTS_A_ROUND, UNIQUE_TOKENS = 12, 2, 272
# vLLM's parameter for that (0.32).
NOT_OFFLOADED = {"kv_transfer_params": {"max_offload_tokens": 0}}
# At most, that a turn adds to a conversation: the question, the answer.
TURN_TOKENS = 60
QUESTION = "\nTurn {turn}: which warehouse is named next, and what does it hold?\nAnswer:"
# Every prompt of these servers is computed from its start, and takes seconds. No figure depends on the primary's turns:
# enough to see that it has lost them. Nor on what prompts that share nothing take with it and with fs.
NO_OFFLOAD_TURNS = 3
PRIMARY_CONVERSATIONS, PRIMARY_TURNS = 3, 2
SOME_ROUNDS, OF_ROUNDS = (PRIMARY, FS), 6
# The floor is ours; of fs a repeated prompt shows that the turn before it came from the tier.
REPEATING = (FS, OURS)
# What vLLM counts follows an answer by some milliseconds.
METRICS_TIMEOUT_S = 10.0
# Of a GPU's memory, for each of the four servers that share it.
GPU_SHARE = "0.2"


@dataclass(frozen=True)
class Answer:
    """A greedy completion. Times in seconds from the request."""

    first: float
    last: float
    text: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int  # of the prompt: from the KV cache and from the tiers

    @classmethod
    def of(cls, server: Server, prompt: str, tokens: int = MAX_TOKENS, offload: bool = True) -> Answer:
        from openai import OpenAI

        first = usage = None
        text = ""
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            started = time.perf_counter()
            for part in client.completions.create(
                model="model",
                prompt=prompt,
                max_tokens=tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True} if offload else {"ignore_eos": True, **NOT_OFFLOADED},
            ):
                if part.choices:
                    last = time.perf_counter() - started
                    first = first or last
                    text += part.choices[0].text
                usage = part.usage or usage
        if first is None or usage is None or usage.prompt_tokens_details is None:
            raise RuntimeError("the server sent no token, or does not say how many of the prompt it had")
        cached = usage.prompt_tokens_details.cached_tokens or 0
        return cls(first, last, text, usage.completion_tokens, usage.prompt_tokens, cached)


@dataclass
class Contender:
    """A server, and what it answered. `turns` by turn and conversation, `unique` by the number of the prompt.

    contexts: the conversations so far. repeats: whether it is asked each prompt of a later turn again at once; then
    those answers are `repeated`. parts: of later turns. not_offloaded: to other prompts than `unique`, as many.
    copying, written: what copy threads had of CPU time, in seconds, and the secondary tier took of bytes, while it was
    asked both of these.
    """

    server: Server
    contexts: list[str]
    repeats: bool
    turns: list[list[Answer]] = field(default_factory=list)
    repeated: list[Answer] = field(default_factory=list)
    unique: dict[int, Answer] = field(default_factory=dict)
    not_offloaded: dict[int, Answer] = field(default_factory=dict)
    parts: list[Parts] = field(default_factory=list)
    copying: float = 0.0
    written: int = 0
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
        before = self._metrics() if turn else {}
        answer = self.ask(prompt)
        self.turns[turn].append(answer)
        if turn:
            self.parts.append(Parts.between(before, self._metrics(), answer.first))
            if self.repeats:
                self.repeated.append(self.ask(prompt, SHORT_TOKENS))
        self.contexts[number] = prompt + answer.text

    def ask_once(self, prompts: Mapping[int, str], not_offloaded: Mapping[int, str], order: random.Random) -> None:
        """Prompts that share nothing, by number, and others with the same numbers, just before or after them."""
        copying, written = self.server.copy_thread_seconds(), serving_parts.written(self._metrics())
        for number, prompt in prompts.items():
            kinds = [(self.unique, prompt, True)]
            if number in not_offloaded:
                kinds.append((self.not_offloaded, not_offloaded[number], False))
            for answers, each, offload in order.sample(kinds, len(kinds)):
                answers[number] = self.ask(each, offload=offload)
        self.copying += self.server.copy_thread_seconds() - copying
        self.written += serving_parts.written(self._metrics()) - written

    def ask(self, prompt: str, tokens: int = MAX_TOKENS, offload: bool = True) -> Answer:
        self._asked += 1
        return Answer.of(self.server, prompt, tokens, offload)

    def _metrics(self) -> serving_parts.Metrics:
        """What vLLM has counted, everything asked included. Between requests: it takes some milliseconds."""
        deadline = time.monotonic() + METRICS_TIMEOUT_S
        while serving_parts.answered(metrics := self.server.metrics()) < self._asked:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server's metrics do not have all of its {self._asked} answers")
        return metrics


def settings(
    token_bytes: int, tokens: int, turns: int, working_set: int, folder: str, on_cpu: bool
) -> tuple[list[str], dict[str, dict[str, Any] | None]]:
    """Arguments of all servers, and what is behind the KV cache of each.

    token_bytes: of KV cache, of a token. working_set: bytes of all conversations. folder: for the fs tier.

    The tiers' own settings are their defaults: of ours as many copy threads as fit the cores, of fs 16 readers and 16
    writers. The copies between KV cache and primary are the same for all: vLLM's on a GPU, one thread of ours on a CPU.
    """
    block_bytes = token_bytes * BLOCK_TOKENS
    # One conversation fits in the KV cache, and its blocks in the primary; two do not.
    blocks = -(-(tokens + turns * TURN_TOKENS) // BLOCK_TOKENS) + 3
    options = ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_TOKENS), "--max-num-seqs", "2"]
    options += ["--max-model-len", str((blocks - 1) * BLOCK_TOKENS), "--num-gpu-blocks-override", str(blocks)]
    options += ["--enable-prompt-tokens-details", "--shutdown-timeout", "30"]
    offloading: dict[str, Any] = {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": blocks * block_bytes}
    if on_cpu:
        offloading |= {"spec_name": "CPUBackendTieringSpec", "spec_module_path": "async_tier.cpu_backend"}
    else:
        options += ["--gpu-memory-utilization", GPU_SHARE]
    return options, {
        NO_OFFLOAD: None,
        PRIMARY: {**offloading, "secondary_tiers": []},
        FS: {**offloading, "secondary_tiers": [{"type": "fs", "root_dir": folder}]},
        OURS: {**offloading, "secondary_tiers": [{"type": "async", "bytes_to_use": 2 * working_set}]},
    }


def model_cores() -> str:
    """All cores but the first, which is left to the server's other processes, as vLLM itself does with enough of them.

    Its scheduler looks for results without sleeping. Where that has to share a core with the forward pass, the same
    prompt takes one time and a half as long as another time.
    """
    _, *others = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, others)) or "nobind"


def measure(run: Run, contenders: dict[str, Contender], turns: int, others: list[str], more: list[str]) -> None:
    """Ask all servers everything. others, more: prompts that share nothing; ours does not offload `more`."""
    order = random.Random(1)

    def in_turns(names: Sequence[str]) -> Iterator[Contender]:
        for name in order.sample(names, len(names)):
            with contenders[name].awake():
                yield contenders[name]

    conversations = len(contenders[OURS].contexts)
    for turn in range(turns):
        for number in range(conversations):
            takes_part = {
                NO_OFFLOAD: turn < NO_OFFLOAD_TURNS,
                PRIMARY: turn < PRIMARY_TURNS and number < PRIMARY_CONVERSATIONS,
            }
            names = [name for name in contenders if takes_part.get(name, True)]
            for contender in in_turns(names):
                contender.converse(number)
            told = ", ".join(f"{name} {contenders[name].turns[turn][number].first:.2f}" for name in names)
            run.progress(f"turn {turn + 1}, conversation {number + 1} of {conversations}, first token: {told} s")
    for begin in range(0, len(others), PROMPTS_A_ROUND):
        names = [name for name in contenders if name not in SOME_ROUNDS or begin % (OF_ROUNDS * PROMPTS_A_ROUND) == 0]
        end = min(begin + PROMPTS_A_ROUND, len(others))
        for contender in in_turns(names):
            of_round, besides = ({number: each[number] for number in range(begin, end)} for each in (others, more))
            contender.ask_once(of_round, besides if contender is contenders[OURS] else {}, order)
        told = ", ".join(f"{name} {contenders[name].unique[begin].last:.2f}" for name in names)
        run.progress(f"prompts asked once, {end} of {len(others)}: {told} s")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="", help="a folder, or a name that vLLM knows (default: SmolLM2-135M)")
    options = parser.parse_args()
    conversations, turns, tokens, rounds = (3, 2, 500, 2) if options.quick else (CONVERSATIONS, TURNS, TOKENS, ROUNDS)
    from transformers import AutoTokenizer
    from vllm.platforms import current_platform

    run = Run(
        "serving",
        f"{conversations} conversations of {tokens} tokens and {turns} turns, round robin; the first turn warms up; "
        f"then every turn, and of {' and '.join(REPEATING)} at once the same prompt again. {NO_OFFLOAD} has "
        f"{min(turns, NO_OFFLOAD_TURNS)} turns, {PRIMARY} "
        f"{min(turns, PRIMARY_TURNS)} of {min(conversations, PRIMARY_CONVERSATIONS)} conversations. Then "
        f"{rounds} rounds of {PROMPTS_A_ROUND} prompts of {UNIQUE_TOKENS} tokens that share nothing, of which "
        f"{' and '.join(SOME_ROUNDS)} take one of {OF_ROUNDS}; {OURS} is asked as many more that it is not to offload. "
        "Servers change after every conversation's turn and after every round, in random order; all but one are "
        "paused, and a short request after each change is not measured. "
        f"On a CPU the model's cores: {model_cores()}. "
        f"One request at a time; {MAX_TOKENS} tokens an answer, {SHORT_TOKENS} when asked again, float32; "
        "tokens a second include the wait for the first. vLLM's metrics are read before and after each prompt of a "
        "later turn.",
        options.output,
    )
    run.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        model = options.model or smollm2(BUILD.parent / "SmolLM2-135M-Instruct")
        tokenizer = AutoTokenizer.from_pretrained(model)
        token_bytes = kv_bytes_per_token(model, FLOAT32_BYTES)
    except (OSError, ValueError) as error:
        neither = "neither a folder with a model and its tokenizer nor the name of one that can be fetched"
        parser.error(f"--model {options.model} is {neither}" if options.model else str(error))
    texts = documents(conversations, tokens, tokenizer)
    prompts = rounds * PROMPTS_A_ROUND
    others = documents(conversations + 2 * prompts, UNIQUE_TOKENS, tokenizer)[conversations:]
    # Each begins with a number of its own, so that not even their first block is shared.
    others = [f"{at} {text}" for at, text in enumerate(others)]
    working_set = conversations * (tokens + turns * TURN_TOKENS) * token_bytes
    servers: dict[str, Server] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="async-tier-serving-", dir=TMPFS))
        on_cpu = current_platform.is_cpu()
        server_options, configurations = settings(token_bytes, tokens, turns, working_set, folder, on_cpu)
        try:
            for name, server in started(run, stack, model, server_options, configurations, on_cpu):
                servers[name] = server
            contenders = {name: Contender(each, list(texts), name in REPEATING) for name, each in servers.items()}
            for contender in contenders.values():
                with contender.awake():
                    pass  # the first request of a server pays for what it builds on first use
            measure(run, contenders, turns, others[:prompts], others[prompts:])
        except RuntimeError as error:  # a server that does not come up, or does not answer as it should
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
        finally:
            for server in servers.values():  # before any of them is waited for
                server.ask_to_stop()
    serving_report.report(run, contenders, token_bytes * BLOCK_TOKENS)
    return run.finish()


def started(
    run: Run,
    stack: ExitStack,
    model: Path | str,
    arguments: list[str],
    configurations: dict[str, dict[str, Any] | None],
    on_cpu: bool,
) -> Iterator[tuple[str, Server]]:
    """The servers as they are started; when all are had, all are up and paused. They end with `stack`.

    As many are started at once as there are cores: more would disturb what a tier measures when it is made (copy
    kernels). On a GPU one after the other, because vLLM measures what memory is free.
    """
    at_once = len(os.sched_getaffinity(0)) if on_cpu else 1
    starting: list[Server] = []
    for number, (name, configuration) in enumerate(configurations.items()):
        run.progress(f"starting a server: {name}")
        server = launch(
            model,
            run.output.with_name(f"serving-{number}.log"),
            name=f"async-tier-serving-{os.getpid()}-{number}",
            offloading=configuration,
            arguments=arguments,
            model_cores=model_cores(),
        )
        starting.append(stack.enter_context(server))
        yield name, starting[-1]
        if len(starting) == at_once or number == len(configurations) - 1:
            for each in starting:
                each.wait_until_healthy()
                each.pause()
            starting.clear()


if __name__ == "__main__":
    sys.exit(main())
