"""vLLM's server with no offloading, with its fs tier on tmpfs, and with this tier.

Conversations of several turns over a working set several times the KV cache and the primary: when a conversation goes
on, its blocks have left both. Also the floor, a prompt that is still in vLLM's own KV cache, and what a tier costs
where nothing is ever asked for again.

One core is left to the server's processes other than the model's, as vLLM does by itself where there are more. On two
cores that is half of them, and so the model takes longer; but the same prompt takes the same time.

The servers take turns, prompt by prompt and in an order drawn anew for each, so that a noisy machine is as noisy to
each, and all but one are paused: an idle one would take a core for seconds after each answer, because its processes
look for work without sleeping. All are asked the same, one request at a time, and all answers must be equal to the
letter; a server on which no figure depends is asked less.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.bench import serving_report
from benchmarks.bench.conversations import FS, MAX_TOKENS, NO_OFFLOAD, OURS, SHORT_TOKENS, Contender
from benchmarks.demo.demo import BLOCK_TOKENS, FLOAT32_BYTES, documents
from benchmarks.demo.model import kv_bytes_per_token, smollm2
from benchmarks.demo.server import Server, of_tier, serve
from benchmarks.shared.common import BUILD, TMPFS, Run, arguments

CONVERSATIONS, TURNS, TOKENS = 4, 6, 1800
# Prompts that are asked once, of two blocks and a little: on two cores each takes a second or two. A few on one
# server, then the same on the next.
ROUNDS, PROMPTS_A_ROUND, UNIQUE_TOKENS = 12, 2, 272
# At most, that a turn adds to a conversation: the question, the answer.
TURN_TOKENS = 60
# Every prompt of this server is computed from its start, and takes seconds.
NO_OFFLOAD_TURNS = 3
# No figure depends on what prompts that share nothing take with fs.
FS_ROUNDS = 6
# The floor is ours; of fs a repeated prompt shows that the turn before it came from the tier.
REPEATING = (FS, OURS)


def settings(
    token_bytes: int, tokens: int, turns: int, working_set: int, folder: str
) -> tuple[list[str], dict[str, dict[str, Any] | None]]:
    """Arguments of all servers, and what is behind the KV cache of each.

    token_bytes: of KV cache, of a token. working_set: bytes of all conversations. folder: for the fs tier.

    The tiers' own settings are their defaults: of ours as many copy threads as fit the cores, of fs 16 readers and 16
    writers. The copies between KV cache and primary are the same for all, by one thread of ours.
    """
    # One conversation fits in the KV cache, and its blocks in the primary; two do not.
    blocks = -(-(tokens + turns * TURN_TOKENS) // BLOCK_TOKENS) + 3
    options = ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_TOKENS), "--max-num-seqs", "2"]
    options += ["--max-model-len", str((blocks - 1) * BLOCK_TOKENS), "--num-gpu-blocks-override", str(blocks)]
    options += ["--enable-prompt-tokens-details", "--shutdown-timeout", "30"]
    offloading = {
        "spec_name": "CPUBackendTieringSpec",
        "spec_module_path": "async_tier.cpu_backend",
        "cpu_bytes_to_use": blocks * token_bytes * BLOCK_TOKENS,
    }
    return options, {
        NO_OFFLOAD: None,
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


def measure(run: Run, contenders: dict[str, Contender], turns: int, others: list[str]) -> None:
    """Ask all servers everything. others: prompts that share nothing."""
    order = random.Random(1)

    def in_turns(names: Sequence[str]) -> Iterator[Contender]:
        for name in order.sample(names, len(names)):
            with contenders[name].awake():
                yield contenders[name]

    conversations = len(contenders[OURS].contexts)
    for turn in range(turns):
        names = [name for name in contenders if name != NO_OFFLOAD or turn < NO_OFFLOAD_TURNS]
        for number in range(conversations):
            for contender in in_turns(names):
                contender.converse(number)
            told = ", ".join(f"{name} {contenders[name].turns[turn][number].first:.2f}" for name in names)
            run.progress(f"turn {turn + 1}, conversation {number + 1} of {conversations}, first token: {told} s")
    for contender in in_turns(list(contenders)):
        contender.read = of_tier(contender.metrics(), "read_bytes_total")
    numbered = list(enumerate(others))
    for begin in range(0, len(others), PROMPTS_A_ROUND):
        names = [name for name in contenders if name != FS or begin % (FS_ROUNDS * PROMPTS_A_ROUND) == 0]
        for contender in in_turns(names):
            contender.ask_once(numbered[begin : begin + PROMPTS_A_ROUND])
        told = ", ".join(f"{name} {contenders[name].unique[begin].last:.2f}" for name in names)
        run.progress(f"prompts asked once, from {begin + 1} of {len(others)}: {told} s")


def main() -> int:
    options = arguments(__doc__).parse_args()
    conversations, turns, tokens, rounds = (3, 2, 500, 2) if options.quick else (CONVERSATIONS, TURNS, TOKENS, ROUNDS)
    from transformers import AutoTokenizer

    run = Run(
        "serving",
        f"{conversations} conversations of {tokens} tokens and {turns} turns, round robin; the first turn warms up; "
        f"then every turn, and of {' and '.join(REPEATING)} at once the same prompt again. {NO_OFFLOAD} has "
        f"{min(turns, NO_OFFLOAD_TURNS)} turns. Then {rounds} rounds of {PROMPTS_A_ROUND} prompts of {UNIQUE_TOKENS} "
        f"tokens that share nothing, of which {FS} takes one of {FS_ROUNDS}. Servers change after every "
        "conversation's turn and after every round, in random order; all but one are paused, and a short request "
        f"after each change is not measured. The model's cores: {model_cores()}. One request at a time; {MAX_TOKENS} "
        f"tokens an answer, {SHORT_TOKENS} when asked again, float32; tokens a second include the wait for the first.",
        options.output,
    )
    run.output.parent.mkdir(parents=True, exist_ok=True)
    model = smollm2(BUILD.parent / "SmolLM2-135M-Instruct")
    token_bytes = kv_bytes_per_token(model, FLOAT32_BYTES)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = documents(conversations, tokens, tokenizer)
    # Each begins with a number of its own, so that not even their first block is shared.
    others = documents(conversations + rounds * PROMPTS_A_ROUND, UNIQUE_TOKENS, tokenizer)[conversations:]
    others = [f"{at} {text}" for at, text in enumerate(others)]
    servers: dict[str, Server] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="async-tier-serving-", dir=TMPFS))
        working_set = conversations * (tokens + turns * TURN_TOKENS) * token_bytes
        server_options, configurations = settings(token_bytes, tokens, turns, working_set, folder)
        try:
            for number, (name, offloading) in enumerate(configurations.items()):
                run.progress(f"starting a server: {name}")
                servers[name] = start(run, stack, model, server_options, offloading, number)
            contenders = {name: Contender(each, list(texts), name in REPEATING) for name, each in servers.items()}
            for contender in contenders.values():
                with contender.awake():
                    pass  # the first request of a server pays for what it builds on first use
            measure(run, contenders, turns, others)
        except RuntimeError as error:  # a server that does not come up, or does not answer as it should
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
        finally:
            for server in servers.values():  # before any of them is waited for
                server.ask_to_stop()
    serving_report.report(run, contenders, token_bytes * BLOCK_TOKENS)
    return run.finish()


def start(
    run: Run, stack: ExitStack, model: Path, arguments: list[str], offloading: dict[str, Any] | None, number: int
) -> Server:
    """A server, which ends with `stack`: one after the other, or they disturb what a tier measures when it is made."""
    server = stack.enter_context(
        serve(
            model,
            run.output.with_name(f"serving-{number}.log"),
            name=f"async-tier-serving-{os.getpid()}-{number}",
            offloading=offloading,
            arguments=arguments,
            model_cores=model_cores(),
        )
    )
    server.pause()
    return server


if __name__ == "__main__":
    sys.exit(main())
