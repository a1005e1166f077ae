"""Runs all benchmarks, one after the other, and puts their figures into one table: `make bench`.

Each writes its JSON under build/bench/ (build/bench/quick/ with --quick), copy_rate a picture beside it. All figures
together are summary.json there: {"machine", "quick", "minutes", "seconds", "failed", "figures": {key: figure}, key:
ratio, ...}. `seconds` and `failed` are by benchmark; `failed` says why, in words. Exits with 1 if a benchmark fails or
leaves one of its figures out; a goal that is missed is in the table.

Told to stop, it lets the benchmark that runs end in good order, however long that takes: there are servers to stop and
files to remove. Told again, that hurries; the third time it is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.bench import replay
from benchmarks.shared.common import BUILD, TMPFS, Figure, machine, on_stop, table

# By benchmark, in the order that they run in: the figures that it must have, without its name.
FIGURES = {
    "copy_rate": ("thread_vs_memmove", "store_vs_fs", "load_vs_fs"),
    "scheduler_cost": (
        "submit_vs_fs",
        "growth",
        "store_vs_plain_lru",
        "store_behind_prefix",
        "request_end",
        "bytes_per_block",
    ),
    "head_of_line": ("p99_vs_idle",),
    "overlap": ("efficiency", "scheduler_slowdown"),
    "replay": ("hit_ratio_vs_optimal",),
    "pool": (
        *("submit", "submit_full", "hits", "misses", "end_of_step", "store_rate", "load_rate", "start", "attach"),
        *("sharing", "restart"),
    ),
    "serving": ("ttft_vs_recompute", "ttft_vs_kv_cache_hit", "ttft_vs_fs", "no_reuse_overhead"),
}
GIB = 1 << 30
# GiB of memory, and of it on the tmpfs. head_of_line: the fs tier's files, usually 4 (they are removed after a load
# that finds 2), but more where stores end as they are submitted. serving: three servers of some 2.5. copy_rate: a tier
# of 1 for every number of threads.
NEEDS = {
    "copy_rate": (4 + len(os.sched_getaffinity(0)).bit_length(), 1),
    "scheduler_cost": (8, 1),
    "head_of_line": (12, 10),
    "overlap": (5, 0),
    "replay": (4, 0),
    "pool": (6, 3),
    "serving": (10, 2),
}
# What --quick has of it, at most: servers and imports are as large as ever.
QUICK_NEEDS = (10, 3)
# What hurries a benchmark on its way out, and what ends it at once.
HURRY, KILL = 2, 3


class Runner:
    """Runs commands one after the other, and sees to it that they end in good order when we are told to stop."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._told: list[int] = []
        on_stop(self._stop)

    def run(self, command: list[str]) -> int:
        """The command's exit status. Raises SystemExit when it has ended, if we were told to stop."""
        self._process = subprocess.Popen(command)
        if self._told:  # when there was nobody to tell
            self._process.terminate()
        status = self._process.wait()
        if self._told:
            raise SystemExit(128 + self._told[0])
        return status

    def _stop(self, number: int, frame: object) -> None:
        self._told.append(number)
        if self._process is None:
            return
        if len(self._told) >= KILL:
            self._process.kill()
        elif number != signal.SIGINT:  # which the terminal sends to the whole group
            self._process.send_signal(signal.SIGINT if len(self._told) == HURRY else signal.SIGTERM)


def figures_of(name: str, output: Path) -> tuple[dict[str, Figure], str | None]:
    """(figures, what is wrong with them) of a benchmark that has ended well."""
    try:
        summary = json.loads(output.read_text())["summary"]
    except OSError:
        return {}, f"it left no {output.name}"
    figures = {key: Figure.of_json(found) for key, found in summary.items()}
    missing = [key for key in (f"{name}.{each}" for each in FIGURES[name]) if key not in figures]
    return figures, f"it has no figure {', '.join(missing)}" if missing else None


def shortage(names: list[str], quick: bool) -> str | None:
    """What this machine lacks for these benchmarks, in one sentence; None if it has enough."""
    most = QUICK_NEEDS if quick else (sys.maxsize, sys.maxsize)
    memory, on_tmpfs = (min(most[which], max(NEEDS[name][which] for name in names)) for which in (0, 1))
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024 / GIB
    free = shutil.disk_usage(TMPFS).free / GIB
    if available >= memory and free >= on_tmpfs:
        return None
    return (
        f"{', '.join(names)} may need {memory} GiB of memory, {on_tmpfs} GiB of it in {TMPFS}; "
        f"{available:.1f} GiB are available here, and {free:.1f} GiB in {TMPFS}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (all): {', '.join(FIGURES)}")
    parser.add_argument("--quick", action="store_true", help="little work: shows that they run, not how fast")
    parser.add_argument("--trace", type=Path, help="for replay: a request trace in Mooncake's format")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in FIGURES]:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(FIGURES)}")
    names = list(dict.fromkeys(options.names)) or list(FIGURES)
    if options.trace is not None:
        if "replay" not in names:
            parser.error(f"--trace is for replay, which is not among {', '.join(names)}")
        if wrong := replay.objection(options.trace, options.quick):
            parser.error(f"--trace: {wrong}")
    if lacking := shortage(names, options.quick):
        parser.error(lacking)
    return run(names, BUILD / "quick" if options.quick else BUILD, options.quick, options.trace)


def run(names: list[str], folder: Path, quick: bool, trace: Path | None) -> int:
    """Run them, write summary.json and print the table; the exit status."""
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    summary_path = folder / "summary.json"
    for left in (summary_path, *(folder / f"{name}{suffix}" for name in names for suffix in (".json", ".png"))):
        left.unlink(missing_ok=True)
    runner = Runner()
    figures: dict[str, Figure] = {}
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in names:
        print(f"== {name}", flush=True)
        output = folder / f"{name}.json"
        command = [sys.executable, "-m", f"benchmarks.bench.{name}", "--output", str(output)]
        command += ["--quick"] * quick
        if name == "replay" and trace is not None:
            command += ["--trace", str(trace.resolve())]
        begun = time.perf_counter()
        status = runner.run(command)
        seconds[name] = round(time.perf_counter() - begun, 1)
        found, wrong = figures_of(name, output) if status == 0 else ({}, f"exit status {status}")
        figures |= found
        if wrong:
            failed[name] = wrong
    minutes = (time.perf_counter() - started) / 60
    summary = {
        "machine": machine(),
        "quick": quick,
        "minutes": round(minutes, 1),
        "seconds": seconds,
        "failed": failed,
        "figures": {key: figure.as_json() for key, figure in figures.items()},
        **{key: figure.ratio for key, figure in figures.items()},
    }
    # Whole or not there, whatever happens to us meanwhile.
    unfinished = summary_path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(unfinished, summary_path)
    print(f"\n{table(list(figures.values()))}")
    print("seconds: " + ", ".join(f"{name} {each:.0f}" for name, each in seconds.items()))
    if quick:
        print("with --quick: these figures show only that the benchmarks run")
    print(f"{minutes:.0f} minutes; written to {summary_path}")
    for name, why in failed.items():
        print(f"FAILED: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
