"""Whether bytes are right: stores and loads at random, over each other, as fast as they go. No vLLM.

What is read is overwritten, and what is written is compared, in the moment in which a job is said to have ended, so a
job that is said to have ended too early shows.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.streams.rows import Rows
from benchmarks.gpu import EMULATED
from benchmarks.gpu.device import MIB
from tests.rows import zero_rows

# Bytes of a row: some cache lines, small ones, one that is no multiple of anything, and a real model's.
ROW_BYTES = [192, 4096] if EMULATED else [192, 4096, 64 << 10, 1_000_003, 2 * MIB]
PRIMARY_ROWS, TIER_ROWS = 64, 48
JOB_ROWS = 16
# Of staging: so little that slots are used again all the time.
STAGING_BYTES = 64 << 10
SECONDS = 0.2 if EMULATED else 2.0
POISON = 0xA5


class Work:
    """A store, and what its primary and its blocks must hold."""

    def __init__(self, pool: str, row_bytes: int, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        self.primary = zero_rows(PRIMARY_ROWS, row_bytes)
        options: dict[str, Any] = {"engine": "cuda", "pool": pool, "bytes_to_use": TIER_ROWS * row_bytes}
        if pool == "host":
            options["staging_bytes"] = max(STAGING_BYTES, 8 * row_bytes)
        self.store = BlockStore(Rows.of_view(memoryview(self.primary)), TierConfig.parse(options))
        # One row of random bytes; a block's content is that, turned by its number.
        self.pattern = self.draw.integers(0, 256, row_bytes, dtype=np.uint8)
        self.free = list(range(PRIMARY_ROWS))
        self.stored: list[int] = []
        self.jobs: dict[int, tuple[bool, list[int], list[int]]] = {}
        self.blocks = self.submitted = self.compared = self.wrong = 0

    def content(self, block: int) -> np.ndarray:
        return np.roll(self.pattern, block) ^ np.uint8(block % 251)

    def take_rows(self, most: int) -> list[int]:
        count = min(int(self.draw.integers(1, JOB_ROWS + 1)), most, len(self.free))
        self.draw.shuffle(self.free)
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def submit(self) -> None:
        """A store of new blocks, or a load of some that are there."""
        self.stored = [block for block in self.stored if self.store.has(b"%d" % block)]
        loads = bool(self.stored) and self.draw.random() < 0.5
        rows = self.take_rows(len(self.stored) if loads else JOB_ROWS)
        if not rows:
            return
        if loads:
            blocks = self.draw.choice(self.stored, len(rows), replace=False).tolist()
            self.primary[rows] = POISON
        else:
            blocks = list(range(self.blocks, self.blocks + len(rows)))
            self.blocks += len(rows)
            for row, block in zip(rows, blocks, strict=True):
                self.primary[row] = self.content(block)
        job, self.submitted = self.submitted, self.submitted + 1
        self.jobs[job] = loads, blocks, rows
        (self.store.submit_load if loads else self.store.submit_store)(job, [b"%d" % each for each in blocks], rows)

    def collect(self) -> None:
        for end in self.store.poll():
            loads, blocks, rows = self.jobs.pop(end.job_id)
            if loads:
                # A block may have been evicted meanwhile; what is said to be there must be right.
                arrived = {*(b"%d" % each for each in blocks)} if end.success else {*(end.loaded_keys or ())}
                for row, block in zip(rows, blocks, strict=True):
                    if b"%d" % block in arrived:
                        self.compared += 1
                        self.wrong += not np.array_equal(self.primary[row], self.content(block))
            elif end.success:
                self.stored = [*self.stored, *blocks][-TIER_ROWS:]
            self.primary[rows] = POISON
            self.free.extend(rows)


def wrong_blocks(pool: str) -> dict[str, str]:
    """By the bytes of a row, how many of the blocks that were loaded were wrong; kernels run meanwhile."""
    report = {}
    matrix = torch.ones(256, 256, device="cuda")
    for row_bytes in ROW_BYTES:
        work = Work(pool, row_bytes, seed=row_bytes)
        try:
            if work.store.statistics().engine != "cuda":
                raise RuntimeError("CUDA refused to pin the memory of this check: see the warning above")
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                work.submit()
                if not EMULATED and work.draw.random() < 0.1:
                    torch.matmul(matrix, matrix)
                if work.draw.random() < 0.7:
                    work.collect()
                if work.draw.random() < 0.2:
                    work.store.end_step()
                if work.draw.random() < 0.02:
                    work.store.drain()
            work.store.drain()
            work.collect()
        finally:
            work.store.close()
        if not work.compared:
            raise RuntimeError(f"no block of {row_bytes} bytes was loaded")
        report[f"rows of {row_bytes}"] = f"{work.wrong} of {work.compared}"
    return report
