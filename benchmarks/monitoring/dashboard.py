"""The dashboard of docs/monitoring: its panels, their queries as Grafana would ask them, and a picture of them.

Grafana itself is not needed: the picture has what the panels ask Prometheus for.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.monitoring.prometheus import Prometheus

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "monitoring"
DASHBOARD = FOLDER / "dashboard.json"
# Points per curve. More than a panel has pixels would only take time.
POINTS = 300
# Samples for a rate, as Grafana chooses them.
RATE_SAMPLES = 4
# Of what is drawn: at least that long is a rate's window, or a picture of a short run has only peaks.
RATE_SHARE = 0.08
COLUMNS = 24
UNITS = {"percentunit": "", "s": "s", "Bps": "B/s", "bytes": "B", "short": "", "none": ""}


Variables = dict[str, str]


@dataclass(frozen=True)
class Query:
    """expression: with Grafana's variables. legend: with labels in {{}}."""

    expression: str
    legend: str

    def ask(self, variables: Variables, rate_s: float, range_s: float) -> str:
        """What Grafana would ask Prometheus. rate_s, range_s: of the variables that Grafana sets itself."""
        return fill(self.expression, variables | {"__rate_interval": f"{rate_s:.0f}s", "__range": f"{range_s:.0f}s"})

    def name(self, labels: dict[str, str]) -> str:
        return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), self.legend)


@dataclass(frozen=True)
class Panel:
    """kind: Grafana's type. place: (x, y, width, height) in Grafana's grid of 24 columns."""

    title: str
    description: str
    kind: str
    unit: str
    is_stacked: bool
    place: tuple[int, int, int, int]
    queries: tuple[Query, ...]


def fill(text: str, variables: Variables) -> str:
    """Raises KeyError for a variable without a value."""
    return re.sub(r"\$(\w+)", lambda found: variables[found[1]], text)


def all_chosen(server: Prometheus) -> Variables:
    """The variables as Grafana sets them when all that Prometheus knows is chosen."""
    values: Variables = {}
    for each in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if each["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", each["query"]["query"]).groups()  # type: ignore[union-attr]
            names = server.label_values(fill(metric, values), label)
            values[each["name"]] = "|".join(re.escape(name).replace("\\", "\\\\") for name in names)
    return values


def panels() -> list[Panel]:
    """Those that show something; the headings of rows do not."""
    found = []
    for each in json.loads(DASHBOARD.read_text())["panels"]:
        if each["type"] == "row":
            continue
        defaults = each.get("fieldConfig", {}).get("defaults", {})
        grid = each["gridPos"]
        found.append(
            Panel(
                each["title"],
                each.get("description", ""),
                each["type"],
                defaults.get("unit", ""),
                "stacking" in defaults.get("custom", {}),
                (grid["x"], grid["y"], grid["w"], grid["h"]),
                tuple(Query(target["expr"], target["legendFormat"]) for target in each.get("targets", ())),
            )
        )
    return found


def panel(title: str) -> Panel:
    (found,) = [each for each in panels() if each.title == title]
    return found


@dataclass(frozen=True)
class Period:
    """What is drawn: a label, and from when to when, in seconds since 1970."""

    label: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


Curves = dict[str, dict[float, float]]


def curves(server: Prometheus, each: Panel, variables: Variables, period: Period, scrape_s: float = 1.0) -> Curves:
    """By legend: the values by seconds since the period began. scrape_s: how often Prometheus asks the servers."""
    step = max(scrape_s, period.seconds / POINTS)
    rate_s = max(RATE_SAMPLES * step, period.seconds * RATE_SHARE)
    found: Curves = {}
    for query in each.queries:
        for labels, values in server.range(
            query.ask(variables, rate_s, period.seconds), period.start, period.end, step
        ):
            if values:
                found[query.name(labels)] = {at - period.start: value for at, value in values}
    return found


def numbers(server: Prometheus, each: Panel, variables: Variables, period: Period) -> list[float]:
    """What a panel of one number per series shows at the end of the period."""
    (query,) = each.queries
    return [value for _, value in server.instant(query.ask(variables, period.seconds, period.seconds), period.end)]


def draw(server: Prometheus, periods: Sequence[Period], output: Path, scrape_s: float = 1.0) -> None:
    """Draw the panels over these periods, one behind the other."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    variables = all_chosen(server)
    shown = [each for each in panels() if each.queries]
    tops = sorted({each.place[1] for each in shown})
    heights = [max(each.place[3] for each in shown if each.place[1] == top) for top in tops]
    with pyplot.rc_context({"font.size": 7, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(13, 0.24 * sum(heights)))
        grid = figure.add_gridspec(
            *(len(tops), COLUMNS),
            **{"height_ratios": heights, "hspace": 0.3, "wspace": 3},
            **{"left": 0.04, "right": 0.99, "top": 0.98, "bottom": 0.025},
        )
        for each in shown:
            x, y, width, _ = each.place
            axes = figure.add_subplot(grid[tops.index(y), x : x + width])
            axes.set_title(each.title, loc="left", fontweight="bold")
            if each.kind == "stat":
                _draw_numbers(axes, each, periods, [numbers(server, each, variables, period) for period in periods])
            else:
                _draw_curves(
                    axes, each, periods, [curves(server, each, variables, period, scrape_s) for period in periods]
                )
                axes.tick_params(labelbottom=y == tops[-1])
                axes.set_xlabel("seconds" if y == tops[-1] else "")
        figure.savefig(output, dpi=80)
        pyplot.close(figure)


def _draw_numbers(axes: Any, each: Panel, periods: Sequence[Period], found: Sequence[list[float]]) -> None:
    axes.axis("off")
    for place, (period, values) in enumerate(zip(periods, found, strict=True)):
        text = ", ".join(f"{value:.1%}" if each.unit == "percentunit" else f"{value:.3g}" for value in values)
        height = 0.7 - 0.5 * place
        axes.text(0, height, period.label, transform=axes.transAxes, color="gray")
        axes.text(0.45, height, text or "no data", transform=axes.transAxes, fontsize=12)


def _draw_curves(axes: Any, each: Panel, periods: Sequence[Period], found: Sequence[Curves]) -> None:
    """Each period begins where the one before it ends; a curve has one colour in all of them."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    names = sorted({name for curves in found for name in curves})
    colors = {name: f"C{number}" for number, name in enumerate(names)}
    begin, highest = 0.0, 0.0
    for place, (period, curves) in enumerate(zip(periods, found, strict=True)):
        below: dict[float, float] = {}
        for name, curve in curves.items():
            times = [begin + at for at in curve]
            if each.is_stacked:
                bottom = [below.get(at, 0.0) for at in curve]
                below |= {at: below.get(at, 0.0) + value for at, value in curve.items()}
                heights = [below[at] for at in curve]
                axes.fill_between(times, bottom, heights, color=colors[name], alpha=0.7, linewidth=0)
            else:
                heights = list(curve.values())
                axes.plot(times, heights, colors[name], linewidth=1.2)
            highest = max(highest, *heights)
        axes.axvspan(begin, begin + period.seconds, color="black", alpha=0.06 * (place % 2), linewidth=0)
        middle = begin + period.seconds / 2
        axes.text(middle, 0.98, period.label, transform=axes.get_xaxis_transform(), ha="center", va="top", color="gray")
        begin += period.seconds
    for name in names:
        axes.plot([], [], colors[name], label=name or each.title)
    axes.set_xlim(0, begin)
    top = 1.4 * highest or 1.0  # room for the legend
    axes.set_ylim(-0.02 * top, top)  # or a curve at 0 would not be seen
    if each.unit == "percentunit":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    elif UNITS[each.unit]:
        axes.yaxis.set_major_formatter(EngFormatter(UNITS[each.unit], sep=" "))
    if names:
        axes.legend(loc="upper left", bbox_to_anchor=(0, 0.92), frameon=False, fontsize=6, ncols=-(-len(names) // 3))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="a Prometheus that scrapes vLLM, such as http://localhost:9090")
    parser.add_argument("--minutes", type=float, default=60, help="how much is drawn (default: the last %(default)s)")
    parser.add_argument(
        "--scrape", type=float, default=15, help="its scrape interval in seconds (default: %(default)s)"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture")
    options = parser.parse_args()
    now = time.time()
    period = Period("", now - options.minutes * 60, now)
    draw(Prometheus(options.url.rstrip("/"), Path()), [period], options.output, options.scrape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
