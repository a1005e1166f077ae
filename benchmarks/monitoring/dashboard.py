"""The dashboard of docs/monitoring: its panels, their queries as Grafana would ask them, and a picture of them.

Grafana itself is not needed: the picture has what the panels ask Prometheus for.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.monitoring.prometheus import Prometheus

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "monitoring"
DASHBOARD = FOLDER / "dashboard.json"
# What the variables of the dashboard stand for when all is chosen.
EVERYTHING = {"model_name": ".*", "instance": ".*", "tier": ".*"}
# Points per curve. More than a panel has pixels would only take time.
POINTS = 300
# Samples for a rate, as Grafana chooses them.
RATE_SAMPLES = 4
UNITS = {"percentunit": "share", "s": "s", "Bps": "bytes/s", "bytes": "bytes", "short": "", "none": ""}


@dataclass(frozen=True)
class Query:
    """expression: with Grafana's variables. legend: with labels in {{}}."""

    expression: str
    legend: str

    def ask(self, rate_s: float, range_s: float) -> str:
        """What Grafana would ask Prometheus, with everything chosen. rate_s, range_s: of the variables that Grafana
        sets itself."""
        values = EVERYTHING | {"__rate_interval": f"{rate_s:.0f}s", "__range": f"{range_s:.0f}s"}
        return re.sub(r"\$(\w+)", lambda found: values[found[1]], self.expression)

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


def draw(server: Prometheus, periods: Sequence[Period], output: Path, scrape_s: float = 1.0) -> None:
    """Draw the panels over these periods, one behind the other. scrape_s: how often Prometheus asks the servers."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [each for each in panels() if each.queries]
    columns, rows = 24, sorted({each.place[1] for each in shown})
    heights = [max(each.place[3] for each in shown if each.place[1] == row) for row in rows]
    with pyplot.rc_context({"font.size": 7, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(14, 0.27 * sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for each in shown:
            x, y, width, _ = each.place
            axes = figure.add_subplot(grid[rows.index(y), x : x + width])
            axes.set_title(each.title, loc="left", fontweight="bold")
            (_draw_numbers if each.kind == "stat" else _draw_curves)(axes, each, server, periods, scrape_s)
        figure.savefig(output, dpi=90)
        pyplot.close(figure)


def _draw_numbers(axes: Any, each: Panel, server: Prometheus, periods: Sequence[Period], scrape_s: float) -> None:
    axes.axis("off")
    for place, period in enumerate(periods):
        (query,) = each.queries
        found = server.instant(query.ask(RATE_SAMPLES * scrape_s, period.seconds), period.end)
        text = ", ".join(_number(value, each.unit) for _, value in found) or "no data"
        height = 0.75 - 0.55 * place
        axes.text(0, height, f"{period.label}:", transform=axes.transAxes, color="gray")
        axes.text(0.5, height, text, transform=axes.transAxes, fontsize=12, color=f"C{place}")


def _number(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "percentunit" else f"{value:.3g}"


def _draw_curves(axes: Any, each: Panel, server: Prometheus, periods: Sequence[Period], scrape_s: float) -> None:
    """Each period begins where the one before it ends; a curve has one colour in all of them."""
    colors: dict[str, str] = {}
    begin = 0.0
    for place, period in enumerate(periods):
        curves = dict(_curves(each, server, period, scrape_s))
        for name in curves:
            colors.setdefault(name, f"C{len(colors)}")
        if each.is_stacked and curves:
            times = sorted({at for curve in curves.values() for at in curve})
            axes.stackplot(
                [begin + at for at in times],
                [[curve.get(at, 0.0) for at in times] for curve in curves.values()],
                colors=[colors[name] for name in curves],
                alpha=0.7,
                linewidth=0,
            )
        else:
            for name, curve in curves.items():
                at = [begin + moment for moment in curve]
                axes.plot(at, list(curve.values()), colors[name], linewidth=1.2, marker=".", markersize=1.5)
        axes.axvspan(begin, begin + period.seconds, color="black", alpha=0.05 * (place % 2), linewidth=0)
        axes.text(
            *(begin + period.seconds / 2, 0.99, period.label),
            **{"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "color": "gray"},
        )
        begin += period.seconds
    for name, color in colors.items():
        axes.plot([], [], color, label=name or each.title)
    axes.set_xlim(0, begin)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.15 if axes.get_ylim()[1] > 0.06 or colors and _has_height(axes) else 1)
    axes.set_ylabel(UNITS[each.unit])
    axes.set_xlabel("seconds")
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0.93), frameon=False, fontsize=6, ncols=2 if len(colors) > 3 else 1
    )


def _has_height(axes: Any) -> bool:
    """Whether anything in it is above 0."""
    return bool(axes.collections) or any(max(line.get_ydata(), default=0) > 0 for line in axes.lines)


def _curves(
    each: Panel, server: Prometheus, period: Period, scrape_s: float
) -> Iterator[tuple[str, dict[float, float]]]:
    """The name of each curve, and its value by seconds since the period began."""
    step = max(scrape_s, period.seconds / POINTS)
    for query in each.queries:
        asked = query.ask(RATE_SAMPLES * step, period.seconds)
        for labels, values in server.range(asked, period.start, period.end, step):
            yield query.name(labels), {at - period.start: value for at, value in values}


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
