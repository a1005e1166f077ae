"""Generates what is there by name only: functions that refuse to work.

torch and vLLM are linked with NVIDIA's libraries and load only where every function that they name exists. Whatever
they name and the emulator does not have becomes a *stub* that prints a line and returns an error:

    OUT/driver_stubs.c, OUT/runtime_stubs.c   the rest of libcuda.so.1 and libcudart.so.13, to be compiled into them
    OUT/nvidia/*.so*                          all other NVIDIA libraries: cuBLAS, cuDNN, NCCL ...

Usage: stubs.py OUT TORCH_LIB VLLM, after OUT/driver_api.o and OUT/runtime_api.o were built. VLLM may be "".
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

DRIVER = "libcuda.so.1"
RUNTIME = "libcudart.so.13"
NVIDIA_LIBRARY = re.compile(r"lib(cu|nv|nccl)")
DRIVER_NAME = re.compile(r"cu[A-Z]\w*")
# torch looks driver functions up by names that are in this library, and insists on finding most of them.
LOOKS_UP_DRIVER = "libc10_cuda.so"
LOOKED_UP_NAME = re.compile(rb"\0(cu(?:[A-Z][a-z0-9]+)+)(?=\0)")

# How the names of a library's functions begin, for those that are named without a version; the longest one decides.
PREFIXES = {
    "cublas": "libcublas.so.13",
    "cublasLt": "libcublasLt.so.13",
    "cudnn": "libcudnn.so.9",
    "cuFile": "libcufile.so.0",
    "cupti": "libcupti.so.13",
    "curand": "libcurand.so.10",
    "cusolver": "libcusolver.so.12",
    "cusparse": "libcusparse.so.12",
    "cusparseLt": "libcusparseLt.so.0",
    "nccl": "libnccl.so.2",
    "nvrtc": "libnvrtc.so.13",
    "nvshmem": "libnvshmem_host.so.3",
}
# vLLM's wrapper of the runtime looks these up when it is imported.
LOOKED_UP = {"cudaDeviceReset", "cudaIpcGetMemHandle", "cudaIpcOpenMemHandle"}


class Needs:
    """What a set of libraries wants from NVIDIA's: names by library and version, and names without a version."""

    def __init__(self) -> None:
        self.libraries: set[str] = set()
        self.versioned: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.plain: set[str] = set()

    def add(self, path: Path) -> None:
        headers = _run("objdump", "-p", str(path))
        self.libraries |= set(filter(NVIDIA_LIBRARY.match, re.findall(r"NEEDED\s+(\S+)", headers)))
        library_of: dict[str, str] = {}
        for section in headers.split("required from ")[1:]:
            library = section.split(":", 1)[0]
            library_of |= dict.fromkeys(re.findall(r"^\s+0x\w+ 0x\w+ \d+ (\S+)", section, re.MULTILINE), library)
        for line in _run("nm", "-D", "--undefined-only", str(path)).splitlines():
            name, _, version = line.split()[-1].partition("@")
            if not version:
                self.plain.add(name)
            elif version in library_of:
                self.versioned[library_of[version]][version].add(name)

    def names(self, library: str) -> dict[str, set[str]]:
        """Version ("" for none): names."""
        plain = {name for name in self.plain if _library_of(name) == library}
        return {**self.versioned[library], **({"": plain} if plain else {})}


def _library_of(name: str) -> str | None:
    """Where a function without a version belongs."""
    prefix = max(filter(name.startswith, PREFIXES), key=len, default=None)
    return PREFIXES[prefix] if prefix else None


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _defined(path: Path) -> set[str]:
    return {line.split()[-1] for line in _run("nm", "--defined-only", str(path)).splitlines()}


def _write_own(path: Path, names: set[str], refuse: str) -> None:
    """Stubs that become part of one of our libraries; `refuse` is its function that prints and returns the error."""
    lines = [f"extern int {refuse}(const char *);"]
    lines += [f'int {name}(void) {{ return {refuse}("{name}"); }}' for name in sorted(names)]
    path.write_text("\n".join(lines) + "\n")


def _build_library(folder: Path, library: str, names: dict[str, set[str]]) -> None:
    """A library of nothing but stubs."""
    source, script = folder / f"{library}.c", folder / f"{library}.map"
    refuse = 'fprintf(stderr, "[cuda emulator] {name} is not emulated\\n"); return 1;'
    everything = sorted(set().union(*names.values()))
    lines = ["#include <stdio.h>", *(f"long {name}(void) {{ {refuse.format(name=name)} }}" for name in everything)]
    source.write_text("\n".join(lines) + "\n")
    versions = {version: sorted(members) for version, members in names.items() if version}
    script.write_text(
        "".join(f"{version} {{ global: {'; '.join(members)}; }};\n" for version, members in versions.items())
    )
    flags = [f"-Wl,-soname,{library}", *([f"-Wl,--version-script={script}"] if versions else [])]
    _run("cc", "-shared", "-fPIC", "-w", "-O1", "-o", str(folder / library), *flags, str(source))
    source.unlink()
    script.unlink()


def main(out: Path, torch_lib: Path, vllm: Path | None) -> None:
    needs = Needs()
    for path in sorted(torch_lib.glob("lib*.so")) + (sorted(vllm.rglob("*.so")) if vllm else []):
        needs.add(path)
    folder = out / "nvidia"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for library in sorted(needs.libraries - {DRIVER, RUNTIME}):
        _build_library(folder, library, needs.names(library))

    driver = {name for name in needs.plain if DRIVER_NAME.fullmatch(name) and not _library_of(name)}
    looked_up = LOOKED_UP_NAME.findall((torch_lib / LOOKS_UP_DRIVER).read_bytes())
    there = _defined(out / "driver_api.o")
    there |= {re.sub(r"_v\d$", "", name) for name in there}
    driver = (driver | {name.decode() for name in looked_up}) - there
    _write_own(out / "driver_stubs.c", driver, "cudaemu_refuse")
    runtime = set().union(LOOKED_UP, *needs.names(RUNTIME).values()) - _defined(out / "runtime_api.o")
    _write_own(out / "runtime_stubs.c", runtime, "cudaemu_runtime_refuse")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if sys.argv[3] else None)
