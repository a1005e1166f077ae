"""docs/monitoring: the dashboard and the alerts ask for what exists, and show what happens.

Those marked `monitoring` need Debian's package prometheus, and the last ones take minutes: `make test-monitoring`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import numpy as np
import prometheus_client
import pytest
import yaml
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from async_tier.config import TierConfig
from async_tier.jobs import REFUSALS
from async_tier.vllm import metrics
from benchmarks.monitoring import servers
from benchmarks.monitoring.dashboard import (
    DASHBOARD,
    FOLDER,
    Panel,
    Period,
    all_chosen,
    curves,
    draw,
    fill,
    numbers,
    panel,
    panels,
)
from benchmarks.monitoring.prometheus import Prometheus, prometheus
from tests.helpers import keys, load, make_tier, store
from tests.rows import primary_rows
from tests.test_metrics import Server

RULES = FOLDER / "rules.yml"
ALERTS = {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
VLLM = Path(str(importlib.util.find_spec("vllm").origin)).parent  # type: ignore[union-attr]
EXPRESSIONS = {each.title: [query.expression for query in each.queries] for each in panels()} | {
    name: [rule["expr"]] for name, rule in ALERTS.items()
}
# vLLM's arguments and its key of the spec, beside the keys of the tier.
KEYS = {"cpu_bytes_to_use", "max_num_batched_tokens", *TierConfig.__dataclass_fields__}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}

needs_prometheus = pytest.mark.monitoring


def existing_series() -> set[str]:
    """The names that Prometheus has of our metrics and vLLM's."""
    # Not in all versions of vLLM on which this module is collected.
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import get_connector_metric_definitions

    text = (VLLM / "v1/metrics/loggers.py").read_text()
    kinds = {name: kind for kind, name in re.findall(r'_(counter|gauge|histogram)_cls\(\s*name="(.*?)"', text)}
    settings = {"secondary_tiers": [], "cpu_bytes_to_use": 1}
    definitions = TieringOffloadingSpec.build_metric_definitions(settings) | get_connector_metric_definitions()
    for name, definition in (definitions | metrics.definitions()).items():
        is_gauge = isinstance(definition, OffloadingGaugeMetadata)
        is_counter = isinstance(definition, OffloadingCounterMetadata)
        kinds[name] = "gauge" if is_gauge else "counter" if is_counter else "histogram"
    return {name + suffix for name, kind in kinds.items() for suffix in SUFFIXES[kind]}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_what_is_asked_for_exists(name: str):
    asked = {each for expression in EXPRESSIONS[name] for each in re.findall(r"vllm:\w+", expression)}
    assert asked <= existing_series()
    assert asked or name == "Why does the tier not help?"


def test_the_dashboard_has_all_metrics_of_the_tier_but_lookups_and_jobs():
    """vLLM counts each lookup once, and jobs are of different sizes; what is shown instead tells more."""
    asked = set(re.findall(rf"{metrics.PREFIX}(\w+?)(?:_total|_bucket)?[{{\[]", DASHBOARD.read_text()))
    assert asked == metrics.METRICS.keys() - {"lookups", "jobs"}


@pytest.mark.parametrize("each", panels(), ids=lambda each: each.title)
def test_a_panel_says_what_is_good_and_what_to_do(each: Panel):
    x, y, width, height = each.place
    assert x + width <= 24
    others = [other for other in panels() if other.title != each.title]
    assert len(others) == len(panels()) - 1, "titles are different"
    for other in others:
        left, top, wide, high = other.place
        assert x + width <= left or left + wide <= x or y + height <= top or top + high <= y, other.title
    if each.queries:
        assert re.search(r"good|normal|should", each.description, re.IGNORECASE)
        assert re.search(r"\b(If|if|when|Compare)\b", each.description)


def test_panels_that_are_named_exist():
    titles = {each.title for each in panels()}
    (table,) = [each for each in json.loads(DASHBOARD.read_text())["panels"] if each["type"] == "text"]
    assert set(re.findall(r"\*([A-Z].*?)\*", table["options"]["content"])) <= titles
    for each in panels():
        assert set(re.findall(r"'([A-Z].*?)'", each.description)) <= titles, each.title


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_change(name: str):
    rule = ALERTS[name]
    assert set(rule["annotations"]) == {"summary", "description"}
    assert KEYS & set(re.findall(r"\w+", rule["annotations"]["description"]))
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert f"`{name}`" in (FOLDER / "README.md").read_text()


def test_an_alert_about_refusals_tells_the_reasons_apart():
    """AsyncTierFails is about those that failed; what is not named is left to the last branch."""
    assert set(re.findall(r'\$labels.reason "(\w+)"', RULES.read_text())) == REFUSALS.keys() - {"failed", "not_ready"}


# -------------------------------------------------------------------------------------------------------- promtool


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)


@needs_prometheus
def test_the_rules_pass_their_own_tests():
    for action, file in (("check", RULES), ("test", FOLDER / "rules_test.yml")):
        done = promtool(action, "rules", file)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
@pytest.mark.parametrize("expression", ["vector(1) > 1", "vector(1)"], ids=["never", "always"])
@pytest.mark.parametrize("name", ALERTS)
def test_control_the_rules_tests_find_an_alert_that_does_not_work(tmp_path: Path, name: str, expression: str):
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        if rule["alert"] == name:
            rule["expr"] = expression
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "rules_test.yml").write_text((FOLDER / "rules_test.yml").read_text())
    done = promtool("test", "rules", tmp_path / "rules_test.yml")
    assert done.returncode != 0
    assert name in done.stdout + done.stderr


# ------------------------------------------------------------------------------ a tier in this process, and its faults


@pytest.fixture
def watcher(tmp_path: Path) -> Iterator[Prometheus]:
    with prometheus(tmp_path, RULES) as running:
        yield running


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(watcher: Prometheus) -> Iterator[Server]:
    """vLLM's side of /metrics, served to Prometheus as plain text, which is how vLLM serves it.

    Not by prometheus_client's own server: to Prometheus it would say vllm_ where it is vllm:.
    """
    found = Server()

    def answer(_: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain; version=0.0.4")])
        return [prometheus_client.generate_latest(found.registry)]

    with make_server("127.0.0.1", 0, answer, handler_class=Quiet) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        watcher.scrape(f"127.0.0.1:{http.server_port}")
        yield found
        http.shutdown()
        thread.join()


@pytest.fixture
def primary() -> np.ndarray:
    return primary_rows(32)


def in_seconds(name: str) -> str:
    """The alert's expression over seconds where it has minutes."""
    return re.sub(r"\[\d+m\]", "[8s]", ALERTS[name]["expr"])


@needs_prometheus
def test_prometheus_understands_every_query(watcher: Prometheus):
    variables = {"model_name": "m", "instance": "i", "tier": "t", "__rate_interval": "1m", "__range": "1h"}
    queries = [fill(each, variables) for expressions in EXPRESSIONS.values() for each in expressions]
    assert len(queries) > len(panels())
    for query in queries:
        assert watcher.instant(query) == [], "there is nothing yet"
    with pytest.raises(ValueError, match="parse error"):
        watcher.instant(queries[0] + ")")


@needs_prometheus
def test_a_broken_engine_is_told_from_one_whose_stores_fail(watcher: Prometheus, server: Server, primary: np.ndarray):
    tier = make_tier(primary, blocks=8)
    names = itertools.count()
    found: list[tuple[dict[str, str], float]] = []

    def work(row: int) -> None:
        """A store of a new block, from this row."""
        number = next(names)
        store(tier, number, keys(number), [row])
        server.take(tier)

    def is_broken() -> bool:
        found[:] = watcher.instant(in_seconds("AsyncTierBroken"))
        return bool(found)

    def fails() -> bool:
        return bool(watcher.instant(in_seconds("AsyncTierFails")))

    def is_seen() -> bool:
        return bool(watcher.instant(f"{metrics.PREFIX}copied_blocks_total{{direction='store'}} > 0"))

    def while_working(row: int, condition: Any) -> Any:
        def check() -> bool:
            work(row)
            return condition()

        return check

    server.take(tier)
    tier.block_store.clear()  # as vLLM's reset_cache does: not what breaks it
    watcher.wait_until("stores", while_working(0, is_seen))
    assert not fails()
    wrong_row = 99
    watcher.wait_until("failed stores", while_working(wrong_row, fails))
    assert not is_broken()
    tier.block_store.engine.broken = "an illegal memory access"
    watcher.wait_until("a broken engine", while_working(0, is_broken))
    assert tier.statistics().blocks == 0
    assert [labels["tier"] for labels, _ in found] == ["1:async"]


@needs_prometheus
def test_blocks_that_are_lost_are_shown(watcher: Prometheus, server: Server, primary: np.ndarray):
    tier = make_tier(primary, blocks=8)
    store(tier, 1, keys(0), [0])
    server.take(tier)
    variables = {"model_name": "model", "instance": ".*", "tier": "1:async", "__rate_interval": "5m"}
    queries = {
        query.legend: fill(query.expression, variables) for query in panel("Failed jobs and lost blocks").queries
    }

    def values(legend: str) -> dict[str, float]:
        return {labels.get("direction", ""): value for labels, value in watcher.instant(queries[legend])}

    watcher.wait_until("the first values", lambda: values("{{tier}} blocks lost") == {"": 0.0})
    assert values("{{tier}} {{direction}} failed") == {"load": 0.0, "store": 0.0}
    assert not load(tier, 2, keys(0, 1, 2), [8, 9, 10]).success
    server.take(tier)
    watcher.wait_until("lost blocks", lambda: values("{{tier}} blocks lost")[""] > 0)
    assert values("{{tier}} {{direction}} failed")["load"] > 0
    assert values("{{tier}} {{direction}} failed")["store"] == 0


# ------------------------------------------------------------------------------------------- vLLM's server, two tiers

# Panels that rightly show nothing.
EMPTY = {servers.SMALL.label: set(), servers.LARGE.label: {"Loads per evicted block"}}


class Runs:
    """What Prometheus has seen of both servers, and which alerts were pending at the end of each run."""

    def __init__(self, watcher: Prometheus) -> None:
        self.watcher = watcher
        self.alerts: dict[str, list[dict[str, str]]] = {}
        self.seen: dict[str, servers.Seen] = {}

    def note(self, seen: servers.Seen) -> None:
        found = [each for each in self.watcher.alerts() if each["instance"] == seen.instance]
        self.alerts[seen.sizes.label] = found

    def rates(self, seen: servers.Seen, title: str, legend: str) -> dict[str, float]:
        """What a panel's query says when its window is what was measured: by the values of its labels."""
        (query,) = [query for query in panel(title).queries if query.legend == legend]
        asked = query.ask(all_chosen(self.watcher), seen.measured.seconds, seen.measured.seconds)
        found = self.watcher.instant(asked, seen.measured.end)
        return {" ".join(labels[each] for each in sorted(labels)): value for labels, value in found}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("monitoring")
    with pytest.MonkeyPatch.context() as patch, prometheus(folder, RULES) as watcher:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # or there is no /reset_prefix_cache
        found = Runs(watcher)
        found.seen = {seen.sizes.label: seen for seen in servers.run(folder, watcher, found.note)}
        yield found


@pytest.fixture(params=[servers.SMALL.label, servers.LARGE.label])
def seen(runs: Runs, request: pytest.FixtureRequest) -> servers.Seen:
    return runs.seen[request.param]


@needs_prometheus
@pytest.mark.parametrize("each", [each for each in panels() if each.queries], ids=lambda each: each.title)
def test_every_panel_shows_something(runs: Runs, seen: servers.Seen, each: Panel):
    variables = all_chosen(runs.watcher)
    is_empty = each.title in EMPTY[seen.sizes.label]
    if each.kind == "stat":  # asked for at the end of the period alone
        assert bool(numbers(runs.watcher, each, variables, seen.period)) != is_empty
        return
    for query in each.queries:
        one = Panel(each.title, "", each.kind, each.unit, False, each.place, (query,))
        assert bool(curves(runs.watcher, one, variables, seen.period)) != is_empty, query.legend


@needs_prometheus
def test_the_hit_ratio_is_vllms(runs: Runs, seen: servers.Seen):
    shown = runs.rates(seen, "Hit ratio by tier", "{{tier}}")
    assert set(shown) == {"0:primary", "1:async"}
    for tier, ratio in shown.items():
        hits, queries = (
            seen.growth(f"vllm:kv_offload_tiering_chunk_{what}_total", tier=tier) for what in ("hits", "queries")
        )
        assert ratio == pytest.approx(hits / queries, rel=0.03)


@needs_prometheus
def test_refused_blocks_are_the_tiers_by_reason(runs: Runs, seen: servers.Seen):
    refused = {reason: seen.growth("vllm:async_tier_refused_blocks_total", reason=reason) for reason in REFUSALS}
    offered = sum(refused.values()) + seen.growth("vllm:async_tier_present_blocks_total")
    offered += seen.growth("vllm:async_tier_copied_blocks_total", direction="store")
    shown = runs.rates(seen, "Share of blocks refused", "{{tier}} {{reason}}")
    if not offered:  # every document is here already
        assert shown == {}
    else:
        assert shown == pytest.approx(
            {f"{reason} 1:async": count / offered for reason, count in refused.items()}, rel=0.03
        )
    if seen.sizes == servers.SMALL:
        assert refused["own_request"] / offered > 0.01
        assert refused["failed"] == refused["not_ready"] == 0
    else:
        assert sum(refused.values()) == 0


@needs_prometheus
@pytest.mark.parametrize("direction", ["store", "load"])
def test_bytes_are_those_that_the_tier_has_copied(runs: Runs, seen: servers.Seen, direction: str):
    rate = runs.rates(seen, "Bytes copied", "{{tier}} {{direction}}")[f"{direction} 1:async"]
    copied = seen.growth("vllm:async_tier_copied_bytes_total", direction=direction)
    # Per prompt token: by what share Prometheus extrapolates depends on which samples a busy machine has missed.
    tokens = ("computed", "vLLM's KV cache", "primary and tiers")
    token_rate = sum(sum(runs.rates(seen, "Prompt tokens by source", each).values()) for each in tokens)
    assert rate / token_rate == pytest.approx(copied / seen.growth("vllm:prompt_tokens_by_source_total"), rel=0.03)
    if direction == "load" and seen.sizes == servers.LARGE:
        assert copied > 0


@needs_prometheus
def test_prompt_tokens_are_vllms_by_source(runs: Runs, seen: servers.Seen):
    (share,) = runs.rates(seen, "Prompt tokens from the tiers", "").values()
    loaded = seen.growth("vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
    assert share == pytest.approx(loaded / seen.growth("vllm:prompt_tokens_by_source_total"), rel=0.03)
    assert (share > 0.5) == (seen.sizes == servers.LARGE)


@needs_prometheus
def test_the_residency_is_the_tiers(runs: Runs, seen: servers.Seen):
    here = runs.rates(seen, "Residency", "{{tier}} here")["1:async"]
    fit = runs.rates(seen, "Residency", "{{tier}} fit")["1:async"]
    assert fit == seen.sizes.tier
    assert here == min(seen.sizes.tier, 3 * servers.DOCUMENT_BLOCKS)


@needs_prometheus
def test_a_tier_that_is_too_small_is_alerted_on_and_the_other_is_not(runs: Runs):
    assert runs.alerts[servers.LARGE.label] == []
    found = {each["alertname"]: each for each in runs.alerts[servers.SMALL.label]}
    # Whether vLLM also gives stores up depends on how fast the copies are.
    expected = {"AsyncTierRefuses", "AsyncTierThrashes", "AsyncTierPrimaryTooSmall"}
    assert expected <= set(found) <= expected | {"AsyncTierNotOffered"}
    assert all(each["tier"] == "1:async" for name, each in found.items() if name in expected)
    assert found["AsyncTierRefuses"]["reason"] == "own_request"


@needs_prometheus
def test_prometheus_could_evaluate_every_rule(runs: Runs):
    rules = runs.watcher.rules()
    assert {rule["name"] for rule in rules} == set(ALERTS)
    assert [rule["lastError"] for rule in rules if rule["health"] != "ok" or rule.get("lastError")] == []


@needs_prometheus
def test_the_servers_ended_well_and_left_nothing(runs: Runs):
    assert [line for seen in runs.seen.values() for line in seen.tracebacks] == []
    ours = f"vllm_offload_async-tier-{os.getpid()}-"  # others may serve on this machine
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(ours)]


@needs_prometheus
def test_the_dashboard_can_be_drawn_without_grafana(runs: Runs, tmp_path: Path):
    picture = tmp_path / "dashboard.png"
    periods = [seen.period for seen in runs.seen.values()]
    draw(runs.watcher, periods, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    draw(runs.watcher, [Period("before", periods[0].start - 7200, periods[0].start - 3600)], tmp_path / "empty.png")
    assert picture.stat().st_size > 1.5 * (tmp_path / "empty.png").stat().st_size, "the curves are in it"
