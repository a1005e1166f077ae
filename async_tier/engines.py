"""Opens the copy engine and the memory for the tier's rows, as configured and as this machine allows."""

from __future__ import annotations

import logging
import sys
from typing import Protocol

from async_tier.config import TierConfig, device_number
from async_tier.memory.host import Arena
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

    def close(self) -> None:
        """Free the memory, after the engine was closed. Idempotent."""


def open_engine(primary: Rows, config: TierConfig, capacity: int) -> tuple[CopyEngine, RowMemory]:
    """The engine, and memory for `capacity` rows like the primary's.

    Raises ValueError if CUDA is configured but torch does not see that GPU, or any, and MemoryError if the memory
    cannot be had. If CUDA refuses anything, such as to start, or to pin the primary or the tier's memory, a warning is
    logged, and copy threads and host memory are used instead.
    """
    if uses_cuda(config):
        try:
            return _open_cuda(primary, config, capacity, _ordinal(config))
        except (RuntimeError, OSError) as error:  # refused by the driver or by torch; no such library
            logger.warning(
                "CUDA cannot be used for the tier's copies, so copy threads and host memory are used instead: %s", error
            )
    engine = HostEngine(default_threads() if config.copy_threads is None else config.copy_threads)
    arena = None
    try:
        arena = Arena(capacity, primary.row_bytes)
        engine.populate(arena.rows)
        return engine, arena
    except BaseException:
        engine.close()
        if arena is not None:
            arena.close()
        raise


def uses_cuda(config: TierConfig) -> bool:
    """Whether to use CUDA in this process.

    "auto" means yes if there is a CUDA context already: creating one would cost 400 to 800 MB of device memory.
    """
    if config.engine == "auto" and config.pool == "host":
        torch = sys.modules.get("torch")  # without torch there is no context of torch's
        return torch is not None and torch.cuda.is_initialized()
    return config.engine != "host"


def _ordinal(config: TierConfig) -> int:
    """The number of the device to use. Raises ValueError if torch does not see it."""
    import torch

    device = config.device if config.pool == "host" else config.pool
    key = "pool" if config.pool != "host" else "engine" if device is None else "device"
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


def _open_cuda(primary: Rows, config: TierConfig, capacity: int, ordinal: int) -> tuple[CopyEngine, RowMemory]:
    # Imported here, because importing torch takes seconds, which programs without CUDA need not pay.
    from async_tier.memory.device import DeviceArena
    from async_tier.memory.pinned import PinnedArena
    from async_tier.streams.cuda import CudaEngine

    on_device = config.pool != "host"
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
        return engine, (DeviceArena if on_device else PinnedArena)(engine, capacity, primary.row_bytes)
    except BaseException:
        engine.close()
        raise
