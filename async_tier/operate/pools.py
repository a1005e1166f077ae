"""The files of pools in a folder: what there is to say of them, which can go, and whether a new one has room."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from async_tier import machine
from async_tier.config import TierConfig
from async_tier.memory.pool_files import (
    HUGE,
    Description,
    FoundPool,
    differences,
    file_system,
    find_mount,
    find_pools,
    remove_pool,
    room_in,
)
from async_tier.operate import doctor
from async_tier.sizes import NOTE, OK, Finding
from async_tier.text import brief, enumerate_some, format_size, format_time


def describe(file: FoundPool) -> str:
    """What people are told of a file: some lines, of which the first begins with its name."""
    allocated = f"{format_size(file.allocated)} allocated"
    owner = f"  owned by {file.owner or 'nobody'}"
    if file.description is None:
        says = f"{file.path.name}: cannot be used: {file.problem}; {allocated}"
        return f"{says}\n{owner}" if file.owner else says  # who owns another user's is not known
    rows, row_bytes = file.description.capacity, file.description.row_bytes
    says = f"{file.path.name}: {file.blocks} of {rows} rows of {format_size(row_bytes)} hold a block; "
    says += f"{format_size(rows * row_bytes)}, {allocated}\n  "
    says += ", ".join(f"{key} {brief(value)}" for key, value in file.description.about.items())
    age = format_time(time.time() - file.since)
    says += f"\n{owner} for {age}" if file.owner else f"\n{owner}; last taken {age} ago"
    if file.is_reset:
        says += "; emptied by a reset"
    if file.idle_s is not None:
        says += f"; last used {format_time(file.idle_s)} ago"
    return says


def why_different(files: Sequence[FoundPool]) -> dict[Path, str]:
    """By path, of each file of another pool than those before it: in what it differs from the nearest of these."""
    found: dict[Path, str] = {}
    before: list[tuple[str, Description]] = []
    for file in files:
        here = file.description
        if here is None:
            continue
        if before and here.digest not in {there.digest for _, there in before}:
            reasons = [(differences(here.facts, there.facts), name) for name, there in before]
            nearest, name = min(reasons, key=lambda each: len(each[0]) or math.inf)
            if nearest:
                found[file.path] = f"  differs from {name} in {enumerate_some(nearest)}"
        before.append((file.path.name, here))
    return found


def as_json(file: FoundPool) -> dict[str, Any]:
    """The same for programs."""
    found = {key: getattr(file, key) for key in ("allocated", "problem", "owner")} | {"name": file.path.name}
    if file.description is None:
        return found
    found |= {key: getattr(file, key) for key in ("since", "blocks", "idle_s", "is_reset")}
    about, rows, row_bytes = file.description.about, file.description.capacity, file.description.row_bytes
    return {**found, "about": about, "facts": file.description.facts, "rows": rows, "row_bytes": row_bytes}


def clear(files: Sequence[FoundPool]) -> Iterator[tuple[FoundPool, str | None]]:
    """Remove those that nobody owns. Each of them, and why it is left; None if it is gone."""
    for file in files:
        try:
            if file.owner is None and not remove_pool(file.path):
                file = replace(file, owner="an engine that has just taken it")
        except (OSError, ValueError) as error:
            yield file, file.problem or getattr(error, "strerror", None) or str(error)
        else:
            yield file, f"owned by {file.owner}" if file.owner else None


def new_memory(config: TierConfig, size: int) -> int:
    """Of a tier of so many bytes in host memory: how many of them are yet to be taken from what is available."""
    folder = config.pool_folder
    if folder is None:
        return size
    if file_system(_mounted(folder).stat().st_dev) == HUGE:
        return 0  # its pages were set apart before
    return _missing(size, _left_behind(folder, config.namespace, size))


def look_at_pool(folder: Path, namespace: str | None, size: int, primary: int) -> Iterator[Finding]:
    """Whether a tier's file of so many bytes has room, beside a primary of so many. The folder is one for pools."""
    device, room = _mounted(folder).stat().st_dev, room_in(_mounted(folder))
    kind, options = find_mount(device)
    file = _left_behind(folder, namespace, size)
    needed = _missing(size, file)
    says = f"{folder} is on {kind}, which has {'no limit' if room is None else f'{format_size(room)} left'}; "
    says += f"the tier's file takes {format_size(needed)} more"
    if file is not None:
        says += f" if it is {file.path.name}, which nobody owns"
    running = 0
    with contextlib.suppress(OSError):  # it is not there yet
        running = sum(each.allocated for each in find_pools(folder) if each.owner is not None)
    with contextlib.suppress(OSError):  # without /dev/shm, which is a finding about the machine
        if os.stat(machine.ROOT / "dev/shm").st_dev == device:
            needed += primary
            running += doctor.primaries_in_use()
            says += f", and the primary, which is there, too, {format_size(primary)}"
    if room is not None and needed > room:
        advice = f"mount it with more, make bytes_to_use less, or try async-tier pool clear {folder}"
        yield doctor.lacks_room("pool", says, needed - room, running, advice)
    else:
        yield Finding(OK, "pool", says)
    if kind == "tmpfs":
        given = dict(each.partition("=")[::2] for each in options.split(",")).get("huge", "never")
        huge = {"deny": "never", "force": "always"}.get(machine.huge_pages("shmem_enabled") or "", given)
        if huge in ("always", "within_size"):  # memory that is allocated before it is touched gets no advice
            yield Finding(OK, "pool's pages", f"the memory of {folder} comes in huge pages (huge={huge})")
        else:
            says = f"the memory of {folder} comes in small pages (huge={huge}), with which copies take longer"
            advice = (
                "mount it with huge=within_size, or use hugetlbfs; from Linux 6.1 on, a host engine puts it into huge "
            )
            yield Finding(NOTE, "pool's pages", says, f"{advice}pages in the background")
    elif kind == HUGE:
        yield Finding(OK, "pool's pages", f"the memory of {folder} comes in huge pages ({options})")


def _mounted(folder: Path) -> Path:
    """The folder, or the one that it will be made in."""
    return folder if folder.exists() else folder.parent


def _left_behind(folder: Path, namespace: str | None, size: int) -> FoundPool | None:
    """The file that a tier of so many bytes would take over, as far as that can be known without its model."""
    with contextlib.suppress(OSError):  # it is not there yet
        for file in find_pools(folder):
            found = file.description
            if found is None or file.owner is not None or found.about.get("namespace") != namespace:
                continue
            if found.capacity == size // found.row_bytes:
                return file
    return None


def _missing(size: int, file: FoundPool | None) -> int:
    """The bytes that the mount has yet to give to a tier of `size`, in this file or in a new one."""
    if file is None or file.description is None:
        return size
    found = file.description
    return max(0, found.rows_offset + found.capacity * found.row_bytes - file.allocated)
