"""Opens the copy engine and the memory for the tier's rows, as configured and as this machine allows."""

from __future__ import annotations

import hashlib
import logging
import sys
from typing import Protocol

from async_tier.config import TierConfig, device_number
from async_tier.memory.host import Arena
from async_tier.memory.pool import PoolArena
from async_tier.memory.pool_files import Identity
from async_tier.memory.registration import Registration
from async_tier.streams.base import CopyEngine
from async_tier.streams.host import HostEngine, default_threads
from async_tier.streams.rows import Rows

logger = logging.getLogger(__name__)


class RowMemory(Protocol):
    """The tier's rows. Copies may touch the first `ready` of them; the others are not prepared yet."""

    @property
    def rows(self) -> Rows: ...

    @property
    def ready(self) -> int: ...

    @property
    def pool(self) -> PoolArena | None:
        """The file that holds the rows, if that outlives the process."""

    def close(self) -> None:
        """Free the memory, after the engine was closed. Idempotent."""


def open_engine(
    primary: Rows, config: TierConfig, capacity: int, identity: Identity | None = None
) -> tuple[CopyEngine, RowMemory]:
    """The engine, and memory for `capacity` rows like the primary's. identity: see BlockStore.

    Raises ValueError if CUDA is configured but torch does not see that GPU, or any, and MemoryError if the memory
    cannot be had. If CUDA refuses anything, such as to start, or to pin the primary or the tier's memory, a warning is
    logged, and copy threads and host memory are used instead.
    """
    if uses_cuda(config):
        try:
            return _open_cuda(primary, config, capacity, identity, _ordinal(config))
        except (RuntimeError, OSError) as error:  # refused by the driver or by torch; no such library
            logger.warning(
                "CUDA cannot be used for the tier's copies, so copy threads and host memory are used instead: %s", error
            )
    engine = HostEngine(default_threads() if config.copy_threads is None else config.copy_threads)
    arena = None
    try:
        arena = _open_host_memory(primary, config, capacity, identity, allocate=True)
        engine.populate(arena.rows)
        return engine, arena
    except BaseException:
        engine.close()
        if arena is not None:
            arena.close()
        raise


def _open_host_memory(
    primary: Rows, config: TierConfig, capacity: int, identity: Identity | None, *, allocate: bool
) -> Arena | PoolArena:
    """allocate: see PoolArena."""
    folder = config.pool_folder
    if folder is None:
        return Arena(capacity, primary.row_bytes)
    if identity is None:
        facts = {"namespace": str(config.namespace), "row_bytes": str(primary.row_bytes)}
        what = "\n".join(facts.values()).encode()
        identity = Identity(hashlib.sha256(what).digest(), {"namespace": facts["namespace"]}, facts)
    on_disk = config.pool_on_disk
    return PoolArena(folder, identity, capacity, primary.row_bytes, on_disk=on_disk, allocate=allocate)


def uses_cuda(config: TierConfig) -> bool:
    """Whether to use CUDA in this process.

    "auto" means yes if there is a CUDA context already: creating one would cost 400 to 800 MB of device memory.
    """
    if config.engine == "auto" and not config.is_on_device:
        torch = sys.modules.get("torch")  # without torch there is no context of torch's
        return torch is not None and torch.cuda.is_initialized()
    return config.engine != "host"


def _ordinal(config: TierConfig) -> int:
    """The number of the device to use. Raises ValueError if torch does not see it."""
    import torch

    device = config.pool if config.is_on_device else config.device
    key = "pool" if config.is_on_device else "engine" if device is None else "device"
    asked = f"{key} {getattr(config, key)!r}"
    if not torch.cuda.is_available():
        raise ValueError(f"{asked} needs a GPU that torch can use, and this process has none; use engine 'host'")
    if device is None:
        return torch.cuda.current_device()
    ordinal = device_number(device)
    count = torch.cuda.device_count()
    if ordinal >= count:
        raise ValueError(f"{asked} names a GPU that is not there: this process has cuda:0 to cuda:{count - 1}")
    return ordinal


def _open_cuda(
    primary: Rows, config: TierConfig, capacity: int, identity: Identity | None, ordinal: int
) -> tuple[CopyEngine, RowMemory]:
    # Imported here, because importing torch takes seconds, which programs without CUDA need not pay.
    from async_tier.memory.device import DeviceArena
    from async_tier.memory.pinned import PinnedArena
    from async_tier.streams.cuda import CudaEngine

    on_device = config.is_on_device
    engine = CudaEngine(
        ordinal,
        staging_bytes=0 if on_device else config.staging_bytes,
        max_inflight_store_bytes=config.max_inflight_store_bytes,
        batch_copies=config.batch_copies,
    )
    try:
        registration = Registration(engine.driver, engine.context, primary)
        registration.register_all()
        engine.add_pinned(registration)
        engine.add_rows(primary, registration)
        if on_device:
            return engine, DeviceArena(engine, capacity, primary.row_bytes)
        # Pinning allocates the memory, and is refused where there is none left.
        return engine, PinnedArena(engine, _open_host_memory(primary, config, capacity, identity, allocate=False))
    except BaseException:
        engine.close()
        raise
