"""What `make` takes from where: a package index has all but a few things, whose lack is said at once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "cuda_emulator"


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """The folder of headers of some CUDA's toolkit."""
    include = tmp_path / "toolkit" / "include"
    include.mkdir(parents=True)
    (include / "cuda.h").touch()
    return include


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without what a `make` that these tests run under was told."""
    ours = {name: value for name, value in os.environ.items() if name not in ("CUDA_INCLUDE", "MAKEFLAGS")}
    return subprocess.run(["make", *arguments], env={**ours, **environment}, capture_output=True, text=True)


def would_build(out: Path, goal: str, *variables: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `make` says that it would do for `goal`, where nothing was built."""
    arguments = ["--dry-run", "-C", str(EMULATOR), goal, f"OUT={out}", "PYTHON=the-python", *variables]
    return make(*arguments, **environment)


def folders_of_headers(commands: str) -> set[str]:
    return set(re.findall(r"-isystem (\S+)", commands))


@pytest.mark.parametrize("goal", ["all", "sanitize"])
def test_headers_come_from_the_package_index_also_where_there_is_a_toolkit(tmp_path, toolkit, goal):
    nvcc = toolkit.parent / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho '#$ INCLUDES=\"-I{toolkit}\"' >&2\n")
    nvcc.chmod(0o755)
    out = tmp_path / "out"
    done = would_build(out, goal, PATH=f"{nvcc.parent}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    (install,) = [line for line in done.stdout.splitlines() if " pip install " in line]
    assert install.startswith("the-python -m pip install ")
    assert f"--target {out}/headers " in install  # beside torch, it would open the libcudart that comes with them
    assert folders_of_headers(done.stdout) == {f"{out}/headers/nvidia/cu13/include"}
    assert done.stdout.index(install) < done.stdout.index("-isystem")


@pytest.mark.parametrize("goal", ["all", "sanitize"])
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_toolkits_headers_are_taken_where_it_is_named(tmp_path, toolkit, goal, how):
    if how == "argument":
        done = would_build(tmp_path / "out", goal, f"CUDA_INCLUDE={toolkit}")
    else:
        done = would_build(tmp_path / "out", goal, CUDA_INCLUDE=str(toolkit))
    assert done.returncode == 0, done.stderr
    assert " pip " not in done.stdout
    assert folders_of_headers(done.stdout) == {str(toolkit)}


def test_a_folder_without_headers_is_refused_in_words(tmp_path):
    done = make("-C", str(EMULATOR), f"OUT={tmp_path / 'out'}", f"CUDA_INCLUDE={tmp_path}")
    assert done.returncode != 0
    assert f"CUDA_INCLUDE names a folder without cuda.h: {tmp_path}\n" in done.stdout
    assert "g++" not in done.stdout


def test_what_the_machine_lacks_is_said_before_anything_is_installed(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho libnuma.so.1: cannot open shared object file >&2\nexit 1\n")
    python.chmod(0o755)
    done = make("-C", str(ROOT), "setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    assert done.returncode != 0
    assert "libnuma.so.1 for vLLM's CPU build (in libnuma1 or numactl-libs)" in done.stdout
    assert " venv " not in done.stdout
    assert not (tmp_path / "venv").exists()


def test_monitoring_says_that_it_needs_prometheus(tmp_path):
    found = shutil.which("make")
    assert found
    (tmp_path / "make").symlink_to(found)
    done = make("-C", str(ROOT), "test-monitoring", PATH=str(tmp_path))
    assert done.returncode != 0
    assert "\nprometheus and promtool are not in PATH; " in done.stdout
    assert "pytest" not in done.stdout


def test_a_wheel_has_the_package_and_nothing_else(tmp_path):
    """`make test-wheel` serves from it, in an environment of its own."""
    project = tmp_path / "project"
    shutil.copytree(
        ROOT / "async_tier", project / "async_tier", ignore=shutil.ignore_patterns("__pycache__", "*.so", "build")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        project,
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-linux_" in wheel.name, "one wheel for every later Python"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (points,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt")]
    sources = {str(path.relative_to(project)) for path in project.rglob("*.py") if "build" not in path.parts}
    extension = {"async_tier/streams/_native.abi3.so", "async_tier/streams/_native.pyi"}
    assert names == sources | extension | {"async_tier/py.typed"}
    assert "async_tier = async_tier.plugin:register" in points
