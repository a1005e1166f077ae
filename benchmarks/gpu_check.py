"""What there is to check on the day there is a GPU: `make gpu-check`, some minutes.

Three parts: the facts that the CUDA engine and its emulator take from NVIDIA's documentation (the numbers are those of
tests/cuda_emulator/README.md), the tier's contract on the device, and figures: copy rates as ratios of raw pinned
copies in the same run, what a submit costs, what compute loses while copies run. Exits with 1 if a fact or the contract
is not as expected.

With ASYNC_TIER_CUDA=emulated it runs on the emulator, which shows that it runs; its figures mean nothing there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EMULATED = os.environ.get("ASYNC_TIER_CUDA") == "emulated"
if EMULATED:  # before anything imports torch
    from tests import cuda_emulator

    emulator = cuda_emulator.load()

import numpy as np
import torch

from async_tier.arena import Rows
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig, format_size
from benchmarks.gpu_facts import FACTS, MIB, ROOT, VOLUME, Bench
from tests.rows import zero_rows

ROW_BYTES = 64 << 10 if EMULATED else MIB
SUBMIT_SIZES = [MIB, 4 * MIB, 16 * MIB] if EMULATED else [MIB, 16 * MIB, 128 * MIB, 1 << 30]
SUBMIT_BLOCKS = 32
ROUNDS = 3


# ------------------------------------------------------------------------------------------------------------- figures


def raw_rates(bench: Bench) -> dict[str, float]:
    """GB/s of raw pinned copies: each direction alone, and each while both run."""
    with (
        bench.pinned(VOLUME) as up,
        bench.pinned(VOLUME) as down,
        bench.device(VOLUME) as target,
        bench.device(VOLUME) as source,
        bench.stream() as one,
        bench.stream() as two,
    ):

        def to_device() -> None:
            bench.copy_in_chunks(target, up.ctypes.data, VOLUME, one)

        def to_host() -> None:
            bench.copy_in_chunks(down.ctypes.data, source, VOLUME, two)

        def both() -> None:
            to_device()
            to_host()
            bench.synchronize(one)

        rates = {
            "host to device": (to_device, one),
            "device to host": (to_host, two),
            "each, both at once": (both, two),
        }
        return {
            name: statistics.median(VOLUME / bench.timed(call, stream)[1] / 1e9 for _ in range(ROUNDS))
            for name, (call, stream) in rates.items()
        }


def run_jobs(store: BlockStore, submit: Callable[..., None], keys: list[bytes], rows: list[int]) -> float:
    """Seconds until jobs of 32 blocks have all ended, polled as an idle scheduler does."""
    started = time.perf_counter()
    jobs = range(0, len(keys), SUBMIT_BLOCKS)
    for job in jobs:
        submit(job, keys[job : job + SUBMIT_BLOCKS], rows[job : job + SUBMIT_BLOCKS])
    ended = 0
    while ended < len(jobs):
        for end in store.poll():
            assert end.success
            ended += 1
    return time.perf_counter() - started


def tier_rates(pool: str) -> dict[str, float]:
    """GB/s of the tier: stores and loads of rows in random order."""
    count = VOLUME // ROW_BYTES
    primary = zero_rows(count, ROW_BYTES)
    options = {"engine": "cuda", "pool": pool, "bytes_to_use": VOLUME}
    store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))
    if store.statistics().engine != "cuda":
        raise SystemExit("CUDA refused to pin the memory of this check: see the warning above")
    while store._arena.ready < count:
        time.sleep(0.01)
    draw = np.random.default_rng(3)
    stores, loads = [], []
    for turn in range(ROUNDS):
        keys = [b"%d %d" % (turn, row) for row in range(count)]
        stores.append(run_jobs(store, store.submit_store, keys, draw.permutation(count).tolist()))
        store.end_step()
        loads.append(run_jobs(store, store.submit_load, keys, draw.permutation(count).tolist()))
        store.clear()
    store.close()
    return {name: VOLUME / statistics.median(took) / 1e9 for name, took in (("store", stores), ("load", loads))}


def submit_times(pool: str) -> dict[int, tuple[float, float]]:
    """Microseconds of a submit_store and a submit_load of 32 blocks, by the bytes of the job."""
    times = {}
    for size in SUBMIT_SIZES:
        row_bytes = size // SUBMIT_BLOCKS
        primary = zero_rows(SUBMIT_BLOCKS, row_bytes)
        options = {"engine": "cuda", "pool": pool, "bytes_to_use": size}
        store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))
        while store._arena.ready < SUBMIT_BLOCKS:
            time.sleep(0.01)
        took: dict[str, list[float]] = {"store": [], "load": []}
        for turn in range(2 * ROUNDS):
            keys = [b"%d %d" % (turn, row) for row in range(SUBMIT_BLOCKS)]
            for name, submit in (("store", store.submit_store), ("load", store.submit_load)):
                started = time.perf_counter()
                submit(1, keys, range(SUBMIT_BLOCKS))
                took[name].append((time.perf_counter() - started) * 1e6)
                store.drain()
                store.poll()
            store.clear()
        times[size] = (statistics.median(took["store"]), statistics.median(took["load"]))
        store.close()
    return times


def compute_loss(pool: str) -> float:
    """How much longer a fixed amount of compute takes while the tier stores and loads without a pause."""
    count = VOLUME // ROW_BYTES
    primary = zero_rows(count, ROW_BYTES)
    options = {"engine": "cuda", "pool": pool, "bytes_to_use": VOLUME}
    store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))
    while store._arena.ready < count:
        time.sleep(0.01)
    if EMULATED:  # no kernels there but these
        matrix = torch.zeros(MIB, device="cuda")
        work: Callable[[], Any] = matrix.zero_
        batches, each = 5, 1
    else:
        matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
        work = lambda: matrix @ matrix  # noqa: E731
        batches, each = 20, 20

    def compute(between: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(batches):
            for _ in range(each):
                work()
            event = torch.cuda.Event()
            event.record()
            while not event.query():
                between()
        return time.perf_counter() - started

    keys = [b"%d" % row for row in range(count)]
    store.submit_store(0, keys, range(count))
    store.drain()
    store.poll()
    jobs = iter(range(1, 1 << 30))

    def keep_copying() -> None:
        store.poll()
        if store.statistics().jobs_in_flight < 4:
            job = next(jobs)
            first = (job * SUBMIT_BLOCKS) % (count - SUBMIT_BLOCKS)
            part = keys[first : first + SUBMIT_BLOCKS]
            rows = range(first, first + SUBMIT_BLOCKS)
            if job % 2:
                store.submit_load(job, part, rows)
            else:
                store._index.drop(part)
                store.submit_store(job, part, rows)

    compute(lambda: None)
    alone, beside = [], []
    for _ in range(ROUNDS):
        alone.append(compute(lambda: None))
        beside.append(compute(keep_copying))
        store.drain()
        store.poll()
    store.close()
    return statistics.median(beside) / statistics.median(alone) - 1


# ---------------------------------------------------------------------------------------------------------------- main


def contract() -> tuple[bool, str]:
    """The tier's contract, on the device (emulated, `make test-cuda` runs it already)."""
    if EMULATED:
        return True, "is what `make test-cuda` runs"
    environment = {**os.environ, "ASYNC_TIER_CUDA": "real"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "contract", "tests/test_manager.py", "tests/test_oracle.py"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return ran.returncode == 0, ran.stdout.strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU in this process")
    bench = Bench()
    note = "EMULATED: the figures below mean nothing" if EMULATED else "a GPU"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__} ({note})\n\nfacts")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "emulated": EMULATED, "facts": {}}
    good = True
    with bench.context:
        for number, (name, check) in FACTS.items():
            right, seen = check(bench)
            good &= right
            report["facts"][number] = {"fact": name, "as_expected": right, "seen": seen}
            print(f"  {'ok   ' if right else 'WRONG'} {number:4} {name}: {seen}", flush=True)
    right, seen = contract()
    good &= right
    report["contract"] = {"as_expected": right, "seen": seen}
    print(f"\n{'ok   ' if right else 'WRONG'} the tier's contract: {seen}\n", flush=True)
    with bench.context:
        raw = raw_rates(bench)
    report["raw_gb_s"] = raw
    print("raw pinned copies, GB/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in raw.items()))
    for pool in ("host", f"cuda:{torch.cuda.current_device()}"):
        rates = tier_rates(pool)
        # Through the staging ring every byte goes both ways at once; into device memory only one.
        physical = (
            {"store": raw["each, both at once"], "load": raw["each, both at once"]}
            if pool == "host"
            else {"store": raw["host to device"], "load": raw["device to host"]}
        )
        submits = submit_times(pool)
        loss = compute_loss(pool)
        report[f"pool {pool}"] = {
            "gb_s": rates,
            "of_raw": {name: rates[name] / physical[name] for name in rates},
            "submit_us": {str(size): times for size, times in submits.items()},
            "compute_loss": loss,
        }
        print(f"\npool {pool}")
        for name in rates:
            print(f"  {name:5} {rates[name]:6.1f} GB/s, {rates[name] / physical[name]:.2f} of raw")
        for size, (store_us, load_us) in submits.items():
            print(f"  submitting {format_size(size):9} store {store_us:6.0f} us, load {load_us:6.0f} us")
        print(f"  compute takes {loss:+.1%} while copies run", flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\nall as expected" if good else "\nNOT AS EXPECTED: see above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
