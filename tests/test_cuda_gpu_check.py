"""`make gpu-check` runs, on the emulator; what it measures there means nothing, and it says so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.emulated
def test_it_checks_the_facts_and_marks_what_means_nothing(tmp_path):
    output = tmp_path / "report.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", "--json", str(output)]
    environment = {**os.environ, "ASYNC_TIER_CUDA": "emulated"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "EMULATED: the figures below mean nothing" in ran.stdout
    report = json.loads(output.read_text())
    assert report["emulated"]
    assert all(fact["as_expected"] for fact in report["facts"].values())
    for pool in ("pool host", "pool cuda:0"):
        assert min(report[pool]["of_raw"].values()) > 0


def test_every_fact_of_the_emulators_readme_is_asked_or_said_not_to_be():
    from benchmarks.gpu_facts import FACTS

    readme = (ROOT / "tests" / "cuda_emulator" / "README.md").read_text()
    stated = {int(number) for number in re.findall(r"^- \*\*F(\d+)\*\*", readme, flags=re.MULTILINE)}
    (left_out,) = re.findall(r"all of them but (.*?)the runtime\.", readme, flags=re.DOTALL)
    asked = {int(number) for number in re.findall(r"F(\d+)", left_out)}
    for numbers in FACTS:
        first, _, last = numbers.removeprefix("F").partition("-")
        asked.update(range(int(first), int(last or first) + 1))
    assert asked - {0} == stated
