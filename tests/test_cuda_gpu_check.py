"""`make gpu-check` runs, on the emulator; what it measures there means nothing, and it says so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.emulated
def test_it_checks_the_facts_and_marks_what_means_nothing(tmp_path):
    output = tmp_path / "report.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.check", "--json", str(output)]
    environment = {**os.environ, "ASYNC_TIER_CUDA": "emulated"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "EMULATED: the figures below mean nothing" in ran.stdout
    report = json.loads(output.read_text())
    assert report.pop("emulated")
    assert {part["verdict"] for part in report.values()} == {"ok"}
    assert list(report)[:3] == ["wrong blocks, pool host", "wrong blocks, pool cuda:0", "machine"], "bytes come first"
    for pool in ("host", "cuda:0"):
        assert min(report[f"pool {pool}: rates, GB/s"]["seen"].values()) > 0


@pytest.mark.emulated
def test_what_fails_or_lacks_something_does_not_end_the_rest(tmp_path):
    from benchmarks.gpu.check import NotRunError, Report

    def lacks() -> None:
        raise NotRunError("there is no vllm")

    file = tmp_path / "report.json"
    report = Report(file)
    report.ask("lacks something", lacks)
    assert json.loads(file.read_text()).keys() == {"lacks something"}, "what has been seen is not lost"
    assert report.good
    report.ask("fails", lambda: 1 / 0)
    assert not report.good
    report.ask("is right", lambda: {"rate": 1.0})
    verdicts = {name: (part["verdict"], part["seen"]) for name, part in report.content.items()}
    assert verdicts == {
        "lacks something": ("not run", "there is no vllm"),
        "fails": ("FAILED", "ZeroDivisionError: division by zero"),
        "is right": ("ok", {"rate": 1.0}),
    }


def test_a_wait_that_gets_nowhere_ends(monkeypatch):
    from benchmarks.shared import stores

    monkeypatch.setattr(stores, "PATIENCE_S", 0)
    with pytest.raises(TimeoutError, match="not within 0 s: the job ended"):
        stores.until(lambda: False, "the job ended")


@pytest.mark.emulated
def test_blocks_that_come_back_wrong_are_counted(monkeypatch):
    """Copies that are said to have ended before they have."""
    from async_tier.streams import cuda
    from benchmarks.gpu import bytes as gpu_bytes

    copy_rows = cuda.CudaStream.copy_rows
    early = SimpleNamespace(is_done=True, failed=False, seconds=0.0, synchronize=lambda seconds: True)
    monkeypatch.setattr(cuda.CudaStream, "copy_rows", lambda *rows: (copy_rows(*rows), early)[1])
    monkeypatch.setattr(gpu_bytes, "EMULATED", True)
    monkeypatch.setattr(gpu_bytes, "ROW_BYTES", [4096])
    (said,) = gpu_bytes.wrong_blocks("host").values()
    assert not said.startswith("0 of ")


@pytest.mark.emulated
def test_it_imports_neither_vllm_nor_pytest():
    imports = "import sys; sys.modules.update(vllm=None, pytest=None, hypothesis=None)\n"
    environment = {**os.environ, "ASYNC_TIER_CUDA": "emulated"}
    command = [sys.executable, "-W", "ignore", "-c", f"{imports}import benchmarks.gpu.check"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def test_every_fact_of_the_emulators_readme_is_asked_or_said_not_to_be():
    from benchmarks.gpu.facts import FACTS

    readme = (ROOT / "tests" / "cuda_emulator" / "README.md").read_text()
    stated = {int(number) for number in re.findall(r"^- \*\*F(\d+)\*\*", readme, flags=re.MULTILINE)}
    (left_out,) = re.findall(r"all of them except (.*?) confirm them\.", readme, flags=re.DOTALL)
    asked = {int(number) for number in re.findall(r"F(\d+)", left_out)}
    for numbers in FACTS:
        first, _, last = numbers.removeprefix("F").partition("-")
        asked.update(range(int(first), int(last or first) + 1))
    assert asked - {0} == stated
