"""What there is to check on the day there is a GPU: `make gpu-check`, less than five minutes.

In this order: bytes (rows in random order through each pool, compared, while kernels run), the machine, the facts that
the CUDA engine and its emulator take from NVIDIA's documentation (by their numbers in tests/cuda_emulator/README.md),
the tier's contract, and figures. It needs torch and numpy. What lacks something says "not run", and what fails does not
end the rest. Exits with 1 if bytes, a fact or the contract are not as expected, or if anything failed.

With ASYNC_TIER_CUDA=emulated it runs on the emulator, which shows that it runs; its figures mean nothing there.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import EMULATED, figures
from benchmarks.gpu.bytes import wrong_blocks
from benchmarks.gpu.device import ROOT, Bench
from benchmarks.gpu.facts import FACTS

# Attributes of a device that explain what was measured, by CUdevice_attribute.
ATTRIBUTES = {
    40: "copy engines",
    88: "pageable memory access",
    91: "registered memory under its host pointer",
    99: "host register supported",
    100: "pageable memory access by the host's page tables",
}
NVIDIA_SMI = (
    "driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max,"
    "mig.mode.current,pci.bus_id,clocks.sm,clocks.mem"
)


class NotRunError(Exception):
    """Says what is missing."""


def machine(bench: Bench) -> dict[str, Any]:
    """What people need to explain a figure."""
    value, version, device = ctypes.c_int(), ctypes.c_int(), torch.cuda.current_device()
    attributes = {}
    for number, name in ATTRIBUTES.items():
        bench.do("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        attributes[f"{number} {name}"] = value.value
    bench.do("cuDriverGetVersion", ctypes.byref(version))
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "CUDA of the driver": version.value,
        "kernel": platform.release(),
        "processors": len(os.sched_getaffinity(0)),
        "NUMA nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
        "attributes": attributes,
    }
    try:
        asked = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader", "--id=0"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        report |= dict(zip(NVIDIA_SMI.split(","), said, strict=True))
        bus = report["pci.bus_id"].lower()[-12:]
        report["NUMA node of the GPU"] = Path(f"/sys/bus/pci/devices/{bus}/numa_node").read_text().strip()
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        report["nvidia-smi"] = f"not run: {error}"
    try:
        asked = ["nvidia-smi", "conf-compute", "-f"]
        report["confidential computing"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except OSError as error:
        report["confidential computing"] = f"not run: {error}"
    return report


def contract() -> tuple[bool, str]:
    """The tier's contract, on the device (emulated, `make test-cuda` runs it already)."""
    if EMULATED:
        return True, "is what `make test-cuda` runs"
    lacking = [name for name in ("vllm", "pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if lacking:
        raise NotRunError(f"there is no {' and no '.join(lacking)}")
    environment = {**os.environ, "ASYNC_TIER_CUDA": "real"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "contract", "tests/test_manager.py", "tests/test_oracle.py"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return ran.returncode == 0, ran.stdout.strip().splitlines()[-1]


class Report:
    """What was seen, printed as it comes, and in the file as far as it has come, whatever ends this process."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.content: dict[str, Any] = {}
        self.good = True

    def ask(self, name: str, call: Callable[[], Any], is_right: Callable[[Any], bool] = lambda seen: True) -> None:
        """Keep under `name` what `call` returns."""
        started = time.perf_counter()
        verdict = "ok"
        try:
            seen = call()
            if not is_right(seen):
                verdict, self.good = "WRONG", False
        except NotRunError as error:
            verdict, seen = "not run", str(error)
        except Exception as error:  # whatever one part meets, the rest is worth having
            verdict, seen, self.good = "FAILED", f"{type(error).__name__}: {error}", False
        seconds = time.perf_counter() - started
        self.content[name] = {"verdict": verdict, "seen": seen, "seconds": round(seconds, 2)}
        print(f"{verdict:7} {name} ({seconds:.1f} s): {_said(seen)}", flush=True)
        if self._path is not None:
            self._path.write_text(json.dumps(self.content, indent=2) + "\n")


def _none_is_wrong(seen: dict[str, str]) -> bool:
    return all(said.startswith("0 of ") for said in seen.values())


def _said(seen: Any) -> str:
    """A line or some, for a person."""
    if isinstance(seen, dict):
        rows = [
            f"{name}: {_said(value) if not isinstance(value, dict) else _flat(value)}" for name, value in seen.items()
        ]
        return "".join(f"\n          {row}" for row in rows)
    return f"{seen:.3g}" if isinstance(seen, float) else str(seen)


def _flat(seen: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_said(value)}" for name, value in seen.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU in this process")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    note = "EMULATED: the figures below mean nothing" if EMULATED else "a GPU"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__} ({note})\n")
    bench = Bench()
    pools = ("host", f"cuda:{torch.cuda.current_device()}")
    report = Report(arguments.json)
    report.content["emulated"] = EMULATED
    for pool in pools:
        report.ask(f"wrong blocks, pool {pool}", lambda pool=pool: wrong_blocks(pool), _none_is_wrong)
    with bench.context:
        report.ask("machine", lambda: machine(bench))
        for number, (name, check) in FACTS.items():
            report.ask(f"{number} {name}", lambda check=check: check(bench), lambda seen: seen[0])
    report.ask("contract", contract, lambda seen: seen[0])
    with bench.context:
        for name, figure in figures.RAW.items():
            report.ask(name, lambda figure=figure: figure(bench))
    for pool in pools:
        for name, tier_figure in figures.TIER.items():
            report.ask(f"pool {pool}: {name}", lambda pool=pool, figure=tier_figure: figure(pool))
    print("\nall as expected" if report.good else "\nNOT AS EXPECTED: see above")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
