"""Runs all benchmarks, one after the other, and puts their figures into one table: `make bench`.

Each writes its JSON and its picture under build/bench/, and all figures together are build/bench/summary.json:
{"machine", "figures": {key: figure}, key: ratio, ...}. Exits with 1 if a benchmark fails; a goal that is missed is in
the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import BUILD, Figure, machine, table

NAMES = ("copy_rate", "scheduler_cost", "head_of_line", "overlap", "replay", "serving")


def run(name: str, quick: bool, more: list[str]) -> dict[str, Figure] | None:
    """The figures of a benchmark, None if it failed."""
    print(f"== {name}", flush=True)
    output = BUILD / f"{name}.json"
    output.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{name}",
        "--output",
        str(output),
        *(["--quick"] if quick else []),
        *more,
    ]
    failed = subprocess.run(command).returncode != 0
    if failed or not output.exists():
        return None
    summary = json.loads(output.read_text())["summary"]
    return {
        key: Figure(**{field: value for field, value in found.items() if field != "met"})
        for key, found in summary.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (all): {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="little work: shows that they run, not how fast")
    parser.add_argument("--trace", type=Path, help="for replay: a request trace in Mooncake's format")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(NAMES)}")
    started = time.perf_counter()
    figures: dict[str, Figure] = {}
    failed = []
    for name in options.names or NAMES:
        more = ["--trace", str(options.trace.resolve())] if name == "replay" and options.trace else []
        found = run(name, options.quick, more)
        if found is None:
            failed.append(name)
        else:
            figures |= found
    summary = {
        "machine": machine(),
        "quick": options.quick,
        "figures": {key: vars(figure) | {"met": figure.is_met} for key, figure in figures.items()},
        **{key: figure.ratio for key, figure in figures.items()},
    }
    path = BUILD / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{table(list(figures.values()))}")
    if options.quick:
        print("with --quick: these figures show only that the benchmarks run")
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes; written to {path}, pictures beside it")
    for name in failed:
        print(f"FAILED: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
