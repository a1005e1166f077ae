"""The main job, end to end: vLLM's server on this machine's CPU answers questions on documents that left its caches.

Every document is asked about twice. Between the two questions its KV blocks leave the KV cache and the primary tier,
both made too small on purpose; with the tier they come back, without it they are computed again.

Those times are measured with one document at a time, when the server has nothing to compute while its blocks come back.
Then two clients ask about all documents once more, and it draws when the server computed and when the tier copied.

The tier's memory is a pool in a folder. So at last the server is killed and started again, and a second one is started
beside it. Both are asked, and have the blocks that the killed one computed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_tier.observe import timeline
from benchmarks.demo.model import kv_bytes_per_token, smollm2
from benchmarks.demo.server import Answer, Metrics, Server, of_tier, pool_folder, serve

BUILD = Path(__file__).resolve().parents[2] / "build"
BLOCK_TOKENS = 128
FLOAT32_BYTES = 4
MAX_TOKENS = 24
# More would be too thin to see.
SECONDS_DRAWN = 5.0
# How long a trace may take to be written to its end. It is written every second.
TRACE_TIMEOUT_S = 30
# What the tier logs at start.
QUESTIONS = ("Which warehouse is named first?", "What is the last item in the list?")
TIERS = {
    "async": {"type": "async"},
    "module": {"type": "AsyncSecondaryTierManager", "module_path": "async_tier.manager"},
}


def documents(count: int, tokens: int, tokenizer: Any) -> list[str]:
    """`count` different texts of `tokens` tokens each, the same on every run."""
    words = ["copper", "linen", "amber", "quartz", "cedar", "indigo", "saffron", "granite", "velvet", "walnut"]
    texts = []
    for number in range(count):
        draw = random.Random(number)
        lines = [f"Stock list number {number} of the northern warehouses."]
        while len(tokenizer.encode("\n".join(lines))) < tokens:
            lines.append(
                f"The {draw.choice(words)} warehouse holds {draw.randrange(2, 999)} crates of {draw.choice(words)} "
                f"and {draw.choice(words)}, checked on day {draw.randrange(1, 365)}."
            )
        texts.append(tokenizer.decode(tokenizer.encode("\n".join(lines))[:tokens]))
    return texts


def prompt(text: str, question: str) -> str:
    return f"{text}\n\nQuestion: {question}\nAnswer:"


def ask(server: Server, label: str, question: int, texts: list[str]) -> list[Answer]:
    """Ask the question with this number, counted from 0, on every text."""
    answers = []
    for number, text in enumerate(texts):
        answers.append(server.ask(prompt(text, QUESTIONS[question]), MAX_TOKENS))
        print(
            f"  {label}, question {question + 1}, document {number + 1} of {len(texts)}: "
            f"first token after {answers[-1].first:.2f} s",
            flush=True,
        )
    return answers


def rounds(server: Server, label: str, texts: list[str]) -> list[list[Answer]]:
    """Ask the first question on every text, then the second on every text."""
    return [ask(server, label, question, texts) for question in range(len(QUESTIONS))]


def two_at_a_time(server: Server, texts: list[str]) -> tuple[list[Answer], float]:
    """Ask the first question on every text again, by two clients; the answers, and how many seconds that took."""
    print("  the first question again, two documents at a time ...", flush=True)
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as clients:
        # Each then asks in the middle of the other's answer.
        clients.submit(server.ask, "Hello.", MAX_TOKENS // 2)
        answers = list(clients.map(lambda text: server.ask(prompt(text, QUESTIONS[0]), MAX_TOKENS), texts))
    return answers, time.perf_counter() - started


@dataclass
class Servers:
    """Servers that differ in their tiers alone. log: where they log, with their names before the suffix."""

    model: Path | str
    log: Path
    arguments: list[str]
    primary_bytes: int
    started: list[Server] = field(default_factory=list)

    @contextlib.contextmanager
    def start(self, label: str, name: str, tiers: list[dict[str, Any]]) -> Iterator[Server]:
        """A server that has answered once, which pays for what it builds on first use. label: shown to the user."""
        print(f"Starting vLLM's server {label} ...", flush=True)
        with serve(
            self.model,
            self.log.with_name(f"{self.log.stem}-{name}.log"),
            name=f"async-tier-{os.getpid()}-{len(self.started)}",
            offloading={
                "spec_name": "CPUBackendTieringSpec",
                "spec_module_path": "async_tier.cpu_backend",
                "cpu_bytes_to_use": self.primary_bytes,
                "secondary_tiers": tiers,
            },
            arguments=self.arguments,
        ) as server:
            self.started.append(server)
            server.ask("Hello.", MAX_TOKENS)
            yield server


@dataclass
class InPool:
    """What servers of one pool answered. again: to two clients, which took `seconds`.

    restarted: the first server's answers after it was killed, to the first question; it began with `restored` blocks.
    second: those of another server, to the second question. The metrics are from after that.
    """

    rounds: list[list[Answer]]
    again: list[Answer]
    seconds: float
    metrics: Metrics
    restarted: list[Answer]
    restored: int
    restarted_metrics: Metrics
    second: list[Answer]
    second_metrics: Metrics

    def is_as(self, recomputed: list[list[Answer]]) -> bool:
        """Whether all texts are those of a server without a tier."""
        found = [*self.rounds, self.again, self.restarted, self.second]
        expected = [*recomputed, recomputed[0], *recomputed]
        return all([a.text for a in one] == [a.text for a in other] for one, other in zip(found, expected, strict=True))


def ask_in_a_pool(servers: Servers, texts: list[str], tier: dict[str, Any], trace: Path) -> InPool:
    """Ask a server, kill it, start it again, and ask it and a second one. trace: of the first until it is killed."""
    with servers.start("with the tier", "tier", [{**tier, "trace_path": str(trace)}]) as server:
        answers = rounds(server, "with the tier", texts)
        metrics = server.metrics()
        again, seconds = two_at_a_time(server, texts)
        end_trace(trace)
        print("  kill -9", flush=True)
        server.kill()
    with servers.start("again", "restarted", [tier]) as server:
        restarted = ask(server, "after the restart", 0, texts)
        with servers.start("a second time, beside the first", "second", [tier]) as other:
            second = ask(other, "the second server", 1, texts)
            second_metrics = other.metrics()
        restarted_metrics = server.metrics()
        return InPool(
            *(answers, again, seconds, metrics),
            *(restarted, restored_blocks(restarted_metrics), restarted_metrics, second, second_metrics),
        )


def end_trace(trace: Path) -> None:
    """Have a tier write its trace to the end. A server that is killed would leave out the last second."""
    switch = Path(f"{trace}.off")
    switch.touch()
    try:
        deadline = time.monotonic() + TRACE_TIMEOUT_S
        while not trace.read_bytes().endswith(b"]\n"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the trace {trace} was not ended")
            time.sleep(0.1)
    finally:
        switch.unlink()


def restored_blocks(metrics: Metrics) -> int:
    """With how many blocks of its pool a server began."""
    return int(sum(value for (name, _), value in metrics.items() if name == "vllm:async_tier_restored_blocks"))


def run(model: Path | str, count: int, tokens: int, tier: str, output: Path) -> dict[str, Any]:
    """Serve with the tier and without it; the report, also written to `output`."""
    from transformers import AutoTokenizer

    texts = documents(count, tokens, AutoTokenizer.from_pretrained(model))
    block_bytes = kv_bytes_per_token(model, FLOAT32_BYTES) * BLOCK_TOKENS
    # Two requests fit in the KV cache, which keeps one block for itself, and their blocks in the primary tier; three do
    # not, so at least four documents are needed for each to be gone when its turn comes again.
    request_blocks = -(-(tokens + 100) // BLOCK_TOKENS)
    blocks = 2 * request_blocks + 1
    arguments = ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_TOKENS)]
    arguments += ["--max-model-len", str(request_blocks * BLOCK_TOKENS), "--max-num-seqs", "2"]
    # By default vLLM kills its engine at once when asked to stop, and says so with a traceback.
    arguments += ["--num-gpu-blocks-override", str(blocks), "--shutdown-timeout", "30"]
    servers = Servers(model, output, arguments, blocks * block_bytes)
    trace = output.with_name(f"{output.stem}-trace.json")
    Path(f"{trace}.off").unlink(missing_ok=True)  # of a demo that was killed
    with pool_folder() as folder:
        keys = {"pool": str(folder), "namespace": "demo", "bytes_to_use": count * request_blocks * block_bytes}
        ours = ask_in_a_pool(servers, texts, {**TIERS[tier], **keys}, trace)
    with servers.start("without the tier", "recompute", []) as server:
        recomputed = rounds(server, "without", texts)
    report = summarize(ours, recomputed, block_bytes)
    report |= {"model": str(Path(model).name), "documents": count, "tokens": tokens}
    report["tracebacks"] = sum(len(server.tracebacks()) for server in servers.started)
    # Half of what a token takes: an empty step, while a document is on its way, takes a few milliseconds.
    token_s = [b - a for part in ours.rounds for answer in part for a, b in itertools.pairwise(answer.times)]
    shortest_step_s = statistics.median(token_s) / 2 if token_s else timeline.SHORTEST_STEP_S
    report |= picture(trace, output.with_name(f"{output.stem}-timeline.png"), ours.seconds, shortest_step_s)
    output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def picture(trace: Path, output: Path, last_s: float, shortest_step_s: float) -> dict[str, Any]:
    """Draw how the last `last_s` seconds of the trace begin; what these and the whole trace say."""
    whole = timeline.read(trace, shortest_step_s)
    start = whole.duration - last_s
    last, drawn = whole.between(start, whole.duration), whole.between(start, start + SECONDS_DRAWN)
    title = f"vLLM's server, two documents at a time, the first {min(last_s, SECONDS_DRAWN):.1f} of {last_s:.1f} s"
    timeline.draw(drawn, output, f"{title} (compute: steps of {shortest_step_s * 1000:.0f} ms and more)")
    return {
        "hidden_share": shares(whole),
        "hidden_share_two_at_a_time": shares(last),
        "shortest_step_ms": shortest_step_s * 1000,
        "trace": str(trace),
        "timeline": str(output),
    }


def shares(part: timeline.Timeline) -> dict[str, float | None]:
    return {"all": part.hidden_share(), "stores": part.hidden_share("store"), "loads": part.hidden_share("load")}


def summarize(ours: InPool, recomputed: list[list[Answer]], block_bytes: int) -> dict[str, Any]:
    """What the answers and vLLM's own metrics say."""

    def median(answers: list[Answer]) -> float:
        return statistics.median(answer.first for answer in answers)

    def metric(name: str) -> float:
        return of_tier(ours.metrics, name)

    def blocks(metrics: Metrics, name: str) -> int:
        return round(of_tier(metrics, name) / block_bytes)

    tier = ours.rounds
    queries, read, wrote = metric("chunk_queries_total"), metric("read_bytes_total"), metric("write_bytes_total")
    read_time, write_time = metric("read_time_total"), metric("write_time_total")
    return {
        "ttft_s": {
            "cold": median(tier[0]),
            "recompute": median(recomputed[1]),
            "tier": median(tier[1]),
            "restarted": median(ours.restarted),
            "second_server": median(ours.second),
        },
        "ttft_ratio": median(tier[1]) / median(recomputed[1]),
        "ttft_ratio_after_restart": median(ours.restarted) / median(tier[1]),
        "requests": len(tier[1]),
        "stored_blocks": blocks(ours.metrics, "write_bytes_total"),
        "promoted_blocks": blocks(ours.metrics, "read_bytes_total"),
        "hit_ratio": metric("chunk_hits_total") / queries if queries else 0.0,
        "stored_bytes": int(wrote),
        "promoted_bytes": int(read),
        "store_gb_s": wrote / write_time / 1e9 if write_time else 0.0,
        "promote_gb_s": read / read_time / 1e9 if read_time else 0.0,
        "restored_blocks": ours.restored,
        "promoted_blocks_after_restart": blocks(ours.restarted_metrics, "read_bytes_total"),
        # The second server was asked about each document once, so these are the first server's.
        "shared_blocks": blocks(ours.second_metrics, "read_bytes_total"),
        "stored_twice_blocks": blocks(ours.second_metrics, "write_bytes_total"),
        "identical_outputs": ours.is_as(recomputed),
    }


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    ttft = report["ttft_s"]

    def hidden(shares: dict[str, float | None]) -> str:
        return ", ".join(f"no {name}" if share is None else f"{name} {share:.0%}" for name, share in shares.items())

    rows = [
        ("time to first token, cold", f"{ttft['cold']:.2f} s"),
        ("time to first token, recomputed", f"{ttft['recompute']:.2f} s"),
        ("time to first token, from the tier", f"{ttft['tier']:.2f} s"),
        ("from the tier / recomputed", f"{report['ttft_ratio']:.2f}"),
        (
            "blocks stored",
            f"{report['stored_blocks']} ({report['stored_bytes'] / 1e6:.0f} MB, {report['store_gb_s']:.1f} GB/s)",
        ),
        (
            "blocks promoted",
            f"{report['promoted_blocks']} ({report['promoted_bytes'] / 1e6:.0f} MB, {report['promote_gb_s']:.1f} GB/s)",
        ),
        ("hit ratio of the tier's lookups", f"{report['hit_ratio']:.2f}"),
        ("after kill -9 and a restart: first token", f"{ttft['restarted']:.2f} s"),
        ("  to that from the tier before", f"{report['ttft_ratio_after_restart']:.2f}"),
        ("  blocks found in the pool", f"{report['restored_blocks']}"),
        ("  blocks promoted", f"{report['promoted_blocks_after_restart']}"),
        ("a second server on the pool: first token", f"{ttft['second_server']:.2f} s"),
        ("  blocks promoted, of the first one's", f"{report['shared_blocks']}"),
        ("  blocks stored", f"{report['stored_twice_blocks']}"),
        ("texts equal to the letter", "yes" if report["identical_outputs"] else "NO"),
        ("transfer time hidden, whole run", hidden(report["hidden_share"])),
        ("  two documents at a time", hidden(report["hidden_share_two_at_a_time"])),
    ]
    title = f"{report['model']}, {report['documents']} documents of {report['tokens']} tokens, medians"
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, "-" * len(title), *(f"{name:<{width}}  {value}" for name, value in rows)])


def failures(report: dict[str, Any]) -> list[str]:
    """What is wrong with the report, in words."""
    wrong = []
    if report["promoted_blocks"] == 0:
        wrong.append("no block was promoted from the tier")
    if report["restored_blocks"] == 0 or report["promoted_blocks_after_restart"] == 0:
        wrong.append("no block was there after the restart")
    if report["shared_blocks"] == 0:
        wrong.append("the second server found no block of the first one")
    if report["hidden_share"]["all"] is None:
        wrong.append("the trace shows no transfer")
    if not report["identical_outputs"]:
        wrong.append("a text differs from the recomputed one")
    if report["tracebacks"]:
        wrong.append(f"the servers' logs have {report['tracebacks']} tracebacks")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder, or a name that vLLM knows (default: SmolLM2-135M)")
    parser.add_argument("--documents", type=int, default=7, help="how many, 4 or more (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1800, help="tokens a document (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=BUILD / "demo.json", help="default: build/demo.json")
    options = parser.parse_args()
    if options.documents < 4:
        parser.error(f"--documents must be at least 4, so that each leaves the caches, not {options.documents}")
    # Being told to stop is like Ctrl-C: the server is ended first.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if not options.model:
        print("Preparing the model ...", flush=True)
    model = options.model or smollm2(BUILD / "SmolLM2-135M-Instruct")
    report = run(model, options.documents, options.tokens, "module", options.output)
    print("\n" + table(report) + f"\n\nWritten to {options.output}")
    print(f"Drawn: {report['timeline']}; Perfetto (ui.perfetto.dev) loads {report['trace']}")
    wrong = failures(report)
    for sentence in wrong:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the server is ended")
