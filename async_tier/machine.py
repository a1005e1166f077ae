"""What the machine and the container around this process let it have: memory and processors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Where the system tells of itself. Tests have their own.
ROOT = Path("/")


def available_memory() -> Iterator[tuple[str, int, Path | None]]:
    """(who sets a limit, bytes that it leaves, its folder), for the machine and for each memory cgroup around this."""
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
            # The kernel drops inactive file cache before it kills, so that is not in use.
            yield "the memory cgroup", max(0, limit - usage + int(stat.get(inactive_name, 0))), group


def cgroups(process: str, controller: str) -> Iterator[Path]:
    """The folders of a process's cgroup for "memory" or "cpu", version 1 or 2, and of all its parents."""
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
    """The whole cores that each CPU cgroup around this process pays for, where it has a quota."""
    for group in cgroups("self", "cpu"):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            try:
                quota, period = (int(number) for name in names for number in (group / name).read_text().split())
            except (OSError, ValueError):  # the other version's name, "max", or no permission
                continue
            if quota > 0:  # version 1 says -1 for none
                yield quota // period
