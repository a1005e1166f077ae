"""How much memory and how many processors the machine and the container leave to this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Where /proc and /sys are found. Tests replace it.
ROOT = Path("/")


def available_memory() -> Iterator[tuple[str, int, Path | None]]:
    """For the machine and each memory cgroup around this process: (name, bytes available, the cgroup's folder)."""
    for line in (ROOT / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            yield "the machine", int(line.split()[1]) * 1024, None
    for group in cgroups("self", "memory"):
        for limit_name, usage_name, inactive_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                limit = int((group / limit_name).read_text())
                usage = int((group / usage_name).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # the other version's name, "max", or no permission
                continue
            # The kernel drops inactive file cache before it kills a process, so that memory counts as available.
            yield "the memory cgroup", max(0, limit - usage + int(stat.get(inactive_name, 0))), group


def cgroups(process: str, controller: str) -> Iterator[Path]:
    """The folders of a process's cgroup (version 1 or 2) and of all its parents. controller: "memory" or "cpu"."""
    try:
        lines = (ROOT / f"proc/{process}/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = ROOT / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = ROOT / "sys/fs/cgroup" / controller
        else:
            continue
        group = mount / path.lstrip("/")
        while True:
            yield group
            if group == mount:
                break
            group = group.parent


def cpu_quotas() -> Iterator[int]:
    """For each CPU cgroup around this process that has a quota, the number of whole cores that it pays for."""
    for group in cgroups("self", "cpu"):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            try:
                quota, period = (int(number) for name in names for number in (group / name).read_text().split())
            except (OSError, ValueError):  # the other version's name, "max", or no permission
                continue
            if quota > 0:  # version 1 has -1 for no quota
                yield quota // period


def shared_memory() -> tuple[int, int]:
    """/dev/shm: (its size, the room in it), in bytes. Raises OSError if there is none."""
    status = os.statvfs(ROOT / "dev/shm")
    return status.f_frsize * status.f_blocks, status.f_frsize * status.f_bavail


def numa_nodes() -> int:
    """The number of NUMA nodes; 0 if it is not known."""
    return len(list((ROOT / "sys/devices/system/node").glob("node[0-9]*")))


def huge_pages(name: str) -> str | None:
    """The kernel's choice of transparent huge pages. name: "enabled" or "shmem_enabled". None if it is not known."""
    try:
        text = (ROOT / "sys/kernel/mm/transparent_hugepage" / name).read_text()
    except OSError:
        return None
    return next((word[1:-1] for word in text.split() if word.startswith("[")), None)
