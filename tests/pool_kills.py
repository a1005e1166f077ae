"""Kills the owner of a pool's file at random instants, again and again, and reads what it left.

    python -m tests.pool_kills [kills] [seed]

One process stays: a peer, which loads blocks while the owner works, and all of them after each kill. The owners are its
children. Each takes over what the one before has left, and stores, evicts, forgets and resets at random. The bytes of a
block are made from its key, so that any byte of another block, or of none, is seen.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.order import SequenceOrder
from async_tier.streams.rows import Rows

ROW_BYTES, ROWS, KEYS = 4096, 48, 128
# An owner is killed after at most so many operations; one of ten within its first milliseconds, while it starts.
OPERATIONS = 60
START_S = 0.006
PATIENCE_S = 30.0


def key_of(number: int) -> bytes:
    return b"%036d" % number


def content(number: int) -> np.ndarray:
    """The row of a key, shape (ROW_BYTES,): each of its words names the key and the place."""
    words = np.arange(ROW_BYTES // 8, dtype=np.uint64)
    return (words * np.uint64(KEYS) + np.uint64(number)).view(np.uint8)


CONTENTS = np.stack([content(number) for number in range(KEYS)])


def open_store(folder: Path, primary: np.ndarray, rows: int = ROWS) -> BlockStore:
    options = {"bytes_to_use": rows * ROW_BYTES, "pool": str(folder), "namespace": "kills", "engine": "host"}
    return BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse({**options, "copy_threads": 1}))


def own(folder: Path, seed: int, done: mmap.mmap) -> None:
    """Be an owner until somebody ends us. done: its first byte is set to how many operations were made."""
    dice = random.Random(seed)
    store = open_store(folder, CONTENTS)
    job = 0
    while True:
        done[0] = min(job, 255)
        job += 1
        first, count = dice.randrange(KEYS), dice.randrange(1, 24)
        numbers = [(first + at) % KEYS for at in range(count)]
        what = dice.random()
        if what < 0.75:
            store.submit_store(job, [key_of(number) for number in numbers], numbers, "a request")
        elif what < 0.85:
            store.fail(job, "load", RuntimeError("the test drops them"), [key_of(number) for number in numbers])
        elif what < 0.853:
            store.clear()
        elif what < 0.86:
            store.close()
            store = open_store(folder, CONTENTS)
        elif what < 0.88:
            store.finish_sequence("a request")
        if what < 0.4:  # so that copies also end where there are few processors
            store.drain()
        store.poll()
        store.end_step()


def signal_of_parent(number: int) -> None:
    """Have this process sent a signal when its parent ends, so that none is left behind."""
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


class Reader:
    """A peer of the owners. wrong: the blocks that were loaded with other bytes. right: how many were not."""

    def __init__(self, folder: Path) -> None:
        self.primary = np.zeros((KEYS, ROW_BYTES), dtype=np.uint8)
        self.store = open_store(folder, self.primary, rows=1)
        self.wrong: list[int] = []
        self.right = 0
        self._jobs = 0

    def read(self) -> int:
        """Load what there seems to be, and compare it. Returns how many blocks arrived."""
        self.store.finish_sequence("a request")
        self.store.begin_sequence("a request", SequenceOrder({}))  # as a server does, which then looks for peers
        numbers = [number for number in range(KEYS) if self.store.has(key_of(number))]
        if not numbers:
            return 0
        self.primary[numbers] = 0xFF
        self._jobs += 1
        self.store.submit_load(self._jobs, [key_of(number) for number in numbers], numbers)
        self.store.drain()
        (finished,) = self.store.poll()
        arrived = numbers if finished.success else [int(key) for key in finished.loaded_keys or ()]
        wrong = [number for number in arrived if not np.array_equal(self.primary[number], CONTENTS[number])]
        self.wrong += wrong
        self.right += len(arrived) - len(wrong)
        return len(arrived)


def run(folder: Path, kills: int, seed: int) -> Reader:
    """Kill so many owners; the reader that saw it all, which the caller closes. Raises if an owner ends by itself."""
    reader = Reader(folder)
    dice = random.Random(seed)
    done = mmap.mmap(-1, mmap.PAGESIZE)
    for number in range(kills):
        done[0] = 0
        child = os.fork()
        if child == 0:
            try:
                signal_of_parent(signal.SIGKILL)
                own(folder, seed + number, done)
            finally:  # it came here by an exception, which pytest must not see
                os._exit(1)
        is_early = dice.random() < 0.1
        enough = 255 if is_early else dice.randrange(OPERATIONS)
        end = time.monotonic() + (dice.random() * START_S if is_early else PATIENCE_S)
        while done[0] < enough and time.monotonic() < end:
            reader.read()
        assert is_early or done[0] >= enough, f"the owner has not done anything for {PATIENCE_S} s"
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the owner ended by itself (kill {number} of seed {seed})"
        reader.read()
    return reader


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="async-tier-kills-") as folder:
        began = time.monotonic()
        reader = run(Path(folder), kills, seed)
        statistics = reader.store.statistics()
        print(
            f"{kills} kills in {time.monotonic() - began:.0f} s (seed {seed}): {reader.right} blocks read right, "
            f"{len(reader.wrong)} wrong, {statistics.blocks_lost} lost while they were read"
        )
        reader.store.close()
    return bool(reader.wrong)


if __name__ == "__main__":
    sys.exit(main())
