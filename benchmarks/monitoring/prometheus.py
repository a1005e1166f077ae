"""A Prometheus of our own, as a child process on loopback, always ended; and questions to its API."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As often as Prometheus can reasonably ask, so that a run of a minute has enough samples.
SCRAPE_S = 1
# Far beyond what anything here takes, also on a machine that does much else.
PATIENCE_S = 180
POLL_S = 0.1
JOB = "vllm"

# Labels, and (time, value) pairs.
Series = tuple[dict[str, str], list[tuple[float, float]]]


@dataclass(frozen=True)
class Prometheus:
    """url: without a path. folder: its configuration, data and log are there."""

    url: str
    folder: Path

    def scrape(self, *targets: str) -> None:
        """From now on ask these ("host:port") for their metrics, and no others."""
        write_targets(self.folder, targets)

    def instant(self, query: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series at that time, which is now by default."""
        arguments = {"query": query} | ({} if at is None else {"time": str(at)})
        return [(each["metric"], float(each["value"][1])) for each in self._get("query", arguments)["result"]]

    def range(self, query: str, start: float, end: float, step: float = SCRAPE_S) -> list[Series]:
        """Each series between these times. Values that are no numbers are left out: Grafana draws none either."""
        found = self._get("query_range", {"query": query, "start": start, "end": end, "step": step})["result"]
        pairs = [(each["metric"], [(float(at), float(value)) for at, value in each["values"]]) for each in found]
        return [(labels, [pair for pair in values if not math.isnan(pair[1])]) for labels, values in pairs]

    def label_values(self, metric: str, label: str) -> list[str]:
        """The values of the label in all series of the metric that there ever were."""
        return self._get(f"label/{label}/values", {"match[]": metric})

    def alerts(self) -> list[dict[str, str]]:
        """The labels of the alerts that are pending or firing."""
        return [each["labels"] for each in self._get("alerts", {})["alerts"]]

    def rules(self) -> list[dict[str, Any]]:
        """What Prometheus knows of each rule, with the error of its last evaluation."""
        return [rule for group in self._get("rules", {})["groups"] for rule in group["rules"]]

    def wait_until(self, what: str, condition: Callable[[], bool]) -> None:
        """Poll until `condition`. Raises TimeoutError that says what was awaited."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {PATIENCE_S} s there is still not: {what}")
            time.sleep(POLL_S)

    def _get(self, path: str, arguments: dict[str, Any]) -> Any:
        """Raises ValueError with Prometheus' own words for a query that it cannot run."""
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}", timeout=PATIENCE_S
            ) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{json.load(error)['error']}: {arguments.get('query')}") from error


def write_targets(folder: Path, targets: tuple[str, ...]) -> None:
    """Complete or not there: Prometheus may read the file at any time."""
    unfinished = folder / "targets.unfinished"
    unfinished.write_text(json.dumps([{"targets": targets}]))
    unfinished.rename(folder / "targets.json")


@contextlib.contextmanager
def prometheus(folder: Path, rules: Path | None = None) -> Iterator[Prometheus]:
    """Run it while in the block, on a free port. Raises RuntimeError with its log if it does not come up."""
    folder.mkdir(parents=True, exist_ok=True)
    write_targets(folder, ())
    settings = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": [str(rules)] if rules else [],
        "scrape_configs": [
            {"job_name": JOB, "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": f"{SCRAPE_S}s"}]}
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(settings))  # which is YAML, too
    log = folder / "prometheus.log"
    arguments = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            ["prometheus", *arguments, "--web.listen-address=127.0.0.1:0"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone
        )
    try:
        yield Prometheus(_url_when_ready(process, log), folder)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()


def _url_when_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        text = log.read_text()
        found = re.search(r'msg="Listening on" address=(\S+)', text)
        if found and "Server is ready" in text:
            return f"http://{found[1]}"
        time.sleep(POLL_S)
    raise RuntimeError(f"Prometheus did not come up; its log:\n{log.read_text()}")
