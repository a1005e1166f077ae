"""vLLM's server on this machine's CPU with a tier that is too small, then with one that is not, beside Prometheus.

Both are asked the same: three documents in turn, which push each other out of vLLM's KV cache. The first one is also
asked twice in a row, with the KV cache forgotten in between.

The small tier holds fewer blocks than a document. So it refuses the end of each, it evicts each for the next, and its
primary is too small even for what is left. The other has room for all.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.demo.demo import BUILD, FLOAT32_BYTES, documents, prompt
from benchmarks.demo.model import kv_bytes_per_token, smollm2
from benchmarks.demo.server import Server, serve
from benchmarks.monitoring.dashboard import Period, draw
from benchmarks.monitoring.prometheus import SCRAPE_S, Prometheus, prometheus

# The smallest that vLLM's CPU backend takes.
BLOCK_TOKENS = 32
DOCUMENT_TOKENS, ANSWER_TOKENS = 400, 4
QUESTION = "Which is the last?"
# With the question, and full: vLLM offloads no others.
DOCUMENT_BLOCKS = DOCUMENT_TOKENS // BLOCK_TOKENS
# Two documents do not fit in the KV cache.
KV_BLOCKS = DOCUMENT_BLOCKS + 4
# As many as the small primary has, or vLLM would store nothing.
STEP_BLOCKS = 6
# By document; FORGET: vLLM's KV cache is emptied, and the tiers are not.
FORGET = -1
ASKED = (0, FORGET, 0, 1, 2, 0, 1, 2, 0, FORGET, 0, 1, 2, 0)
# So many of them until each tier has had hits, if it ever has.
WARM_UP = 6


@dataclass(frozen=True)
class Sizes:
    """label: in the picture. primary, tier: in blocks."""

    label: str
    primary: int
    tier: int


SMALL = Sizes("too small", STEP_BLOCKS, DOCUMENT_BLOCKS - 2)
LARGE = Sizes("large enough", DOCUMENT_BLOCKS + 2, 6 * DOCUMENT_BLOCKS)


@dataclass
class Seen:
    """One run. instance: the server's address, which is its label in Prometheus.

    before, after: what /metrics said at the ends of `measured`, by name and labels as Prometheus writes them. By then
    Prometheus had asked for the same, and nothing was going on. `measured` is shorter than `period`: vLLM's counters of
    hits only appear with the first hit, and Prometheus cannot know how that has raised them.
    """

    sizes: Sizes
    instance: str
    period: Period
    measured: Period
    before: dict[str, float]
    after: dict[str, float]
    tracebacks: list[str] = field(default_factory=list)

    def growth(self, name: str, **labels: str) -> float:
        """By how much the sum of the metric's series with these labels has grown."""
        parts = [f'{label}="{value}"' for label, value in labels.items()]

        def total(values: dict[str, float]) -> float:
            return sum(
                value
                for series, value in values.items()
                if series.partition("{")[0] == name and all(part in series for part in parts)
            )

        return total(self.after) - total(self.before)


def ask_all(sizes: Sizes, server: Server, watcher: Prometheus, texts: list[str]) -> Seen:
    """Ask it everything, while Prometheus watches."""
    instance = server.url.removeprefix("http://")
    watcher.scrape(instance)
    # The first request of a server pays for what it builds on first use.
    server.ask("Hello.", ANSWER_TOKENS)
    _, start = _as_prometheus_sees(server, watcher)
    for number in ASKED[:WARM_UP]:
        _ask(sizes, server, number, texts)
    before, middle = _as_prometheus_sees(server, watcher)
    for number in ASKED[WARM_UP:]:
        _ask(sizes, server, number, texts)
    after, _ = _as_prometheus_sees(server, watcher)
    end = time.time()
    period, measured = (Period(sizes.label, begin, end) for begin in (start, middle))
    return Seen(sizes, instance, period, measured, before, after)


def _ask(sizes: Sizes, server: Server, number: int, texts: list[str]) -> None:
    if number == FORGET:
        request = urllib.request.Request(f"{server.url}/reset_prefix_cache", method="POST")
        urllib.request.urlopen(request, timeout=60).close()
    else:
        answer = server.ask(prompt(texts[number], QUESTION), ANSWER_TOKENS)
        print(f"  {sizes.label}, document {number}: first token after {answer.first:.2f} s", flush=True)


def series(server: Server) -> dict[str, float]:
    """Everything at /metrics about the model, but for what changes although nothing happens."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    return {
        _name(sample.name, sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("vllm:") and not sample.name.endswith("_created")
    }


def _name(name: str, labels: dict[str, str]) -> str:
    return name + "{" + ", ".join(f'{label}="{labels[label]}"' for label in sorted(labels)) + "}"


def _as_prometheus_sees(server: Server, watcher: Prometheus) -> tuple[dict[str, float], float]:
    """What /metrics says once nothing happens any more and Prometheus has it, too; and since when that is so."""
    instance = server.url.removeprefix("http://")
    said: dict[str, float] = {}

    def is_seen() -> bool:
        said.clear()
        said.update(series(server))
        found = watcher.instant('{__name__=~"vllm:.+", instance="' + instance + '"}')
        ours = ("__name__", "job", "instance")
        seen = {
            _name(labels["__name__"], {each: labels[each] for each in labels if each not in ours}): value
            for labels, value in found
        }
        return {name: seen.get(name) for name in said} == said

    watcher.wait_until(f"what {server.url}/metrics says in Prometheus", is_seen)
    since = time.time()

    def was_asked_again() -> bool:
        return any(at > since + SCRAPE_S for _, at in watcher.instant(f'timestamp(up{{instance="{instance}"}})'))

    watcher.wait_until(f"samples of {server.url} in which nothing happens", was_asked_again)
    return said, since


def run(folder: Path, watcher: Prometheus, after_each: Callable[[Seen], None] = lambda seen: None) -> list[Seen]:
    """Serve with each of the two tiers in turn. after_each: called while that server still runs."""
    from transformers import AutoTokenizer

    model = smollm2(BUILD / "SmolLM2-135M-Instruct")
    texts = documents(3, DOCUMENT_TOKENS, AutoTokenizer.from_pretrained(model))
    block_bytes = kv_bytes_per_token(model, FLOAT32_BYTES) * BLOCK_TOKENS
    arguments = ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_TOKENS), "--max-num-seqs", "2"]
    arguments += ["--max-model-len", str((KV_BLOCKS - 1) * BLOCK_TOKENS), "--num-gpu-blocks-override", str(KV_BLOCKS)]
    arguments += ["--max-num-batched-tokens", str(STEP_BLOCKS * BLOCK_TOKENS), "--shutdown-timeout", "30"]
    found = []
    for sizes in (SMALL, LARGE):
        offloading: dict[str, Any] = {
            "spec_name": "CPUBackendTieringSpec",
            "spec_module_path": "async_tier.cpu_backend",
            "cpu_bytes_to_use": sizes.primary * block_bytes,
            "secondary_tiers": [{"type": "async", "bytes_to_use": sizes.tier * block_bytes}],
        }
        print(f"Starting vLLM's server with a tier that is {sizes.label} ...", flush=True)
        name = f"async-tier-{os.getpid()}-{len(found)}"
        log = folder / f"{sizes.label.replace(' ', '-')}.log"
        with serve(model, log, name=name, offloading=offloading, arguments=arguments) as server:
            seen = ask_all(sizes, server, watcher, texts)
            after_each(seen)
        seen.tracebacks = server.tracebacks()
        found.append(seen)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=BUILD / "monitoring.png", help="default: %(default)s")
    options = parser.parse_args()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # or there is no /reset_prefix_cache
    with tempfile.TemporaryDirectory() as folder, prometheus(Path(folder)) as watcher:
        found = run(Path(folder), watcher)
        draw(watcher, [seen.period for seen in found], options.output)
    print(f"Drawn: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
