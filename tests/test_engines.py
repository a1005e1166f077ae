"""Which engine the configuration means, where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from async_tier import machine
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.streams import host
from async_tier.streams.rows import Rows
from async_tier.vllm import compat
from tests.rows import primary_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_engine.py has what is there with a GPU")

CPUS = os.sched_getaffinity(0)


@pytest.mark.parametrize("options", [{}, {"engine": "auto"}, {"engine": "host"}])
def test_copy_threads_copy(options):
    store = BlockStore(Rows.of_view(memoryview(primary_rows(2))), TierConfig.parse(options))
    assert store.statistics().engine == "host"
    store.close()


def threads_with(monkeypatch: pytest.MonkeyPatch, root: Path, cpus: int, files: Mapping[str, str]) -> int:
    """The default number of copy threads on so many CPUs, with these files of /proc and /sys."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)))
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(machine, "ROOT", root)
    return host.default_threads()


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (2, 1), (3, 2), (64, 2)])
def test_a_core_is_left_to_the_scheduler(monkeypatch, tmp_path, cpus, threads):
    assert threads_with(monkeypatch, tmp_path, cpus, {}) == threads


VERSION_2 = {"proc/self/cgroup": "0::/pod/container\n"}
VERSION_1 = {"proc/self/cgroup": "7:memory:/elsewhere\n3:cpu,cpuacct:/pod/container\n0::/\n"}
GROUP_1 = "sys/fs/cgroup/cpu/pod/container"


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max", 2), ("300000", 2), ("299999", 1), ("250000", 1), ("200000", 1), ("100000", 1), ("50000", 1)],
)
@pytest.mark.parametrize("folder", ["sys/fs/cgroup/pod/container", "sys/fs/cgroup/pod", "sys/fs/cgroup"])
def test_a_core_that_the_quota_does_not_pay_for_whole_is_none(monkeypatch, tmp_path, folder, quota, threads):
    files = {**VERSION_2, "sys/fs/cgroup/pod/cpu.max": "max 100000\n", f"{folder}/cpu.max": f"{quota} 100000\n"}
    assert threads_with(monkeypatch, tmp_path, 64, files) == threads


@pytest.mark.parametrize(("quota", "threads"), [("-1", 2), ("150000", 2), ("149999", 1), ("100000", 1), ("20000", 1)])
@pytest.mark.parametrize("folder", [GROUP_1, "sys/fs/cgroup/cpu/pod", "sys/fs/cgroup/cpu"])
def test_a_quota_of_cgroups_of_version_1_counts(monkeypatch, tmp_path, folder, quota, threads):
    none = {f"{GROUP_1}/cpu.cfs_quota_us": "-1\n", f"{GROUP_1}/cpu.cfs_period_us": "100000\n"}
    its_own = {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "50000\n"}
    assert threads_with(monkeypatch, tmp_path, 64, {**VERSION_1, **none, **its_own}) == threads


def test_the_least_of_cpus_and_quotas_counts(monkeypatch, tmp_path):
    quotas = {"sys/fs/cgroup/pod/container/cpu.max": "800000 100000\n", "sys/fs/cgroup/pod/cpu.max": "1600000 100000\n"}
    assert threads_with(monkeypatch, tmp_path, 2, {**VERSION_2, **quotas}) == 1
    assert threads_with(monkeypatch, tmp_path, 64, {**VERSION_2, **quotas}) == 2
    quotas["sys/fs/cgroup/pod/cpu.max"] = "200000 100000\n"
    assert threads_with(monkeypatch, tmp_path, 64, {**VERSION_2, **quotas}) == 1


def test_quotas_of_other_cgroups_do_not_count(monkeypatch, tmp_path):
    files = {**VERSION_2, "sys/fs/cgroup/neighbour/cpu.max": "100000 100000\n"}
    assert threads_with(monkeypatch, tmp_path, 64, files) == 2


# What vLLM's executor does to start a worker of the CPU backend. This one has no KV caches, and says where it may run.
START_A_WORKER = """
import multiprocessing
from vllm.config import VllmConfig
from vllm.utils.ompmultiprocessing import OMPProcessManager
work = '''
import os
from vllm.v1.kv_offload.base import CanonicalKVCaches
from async_tier.cpu_backend import HostOffloadingWorker
worker = HostOffloadingWorker(CanonicalKVCaches([], []), 1, None, 1)
print([sorted(os.sched_getaffinity(thread)) for thread in (0, *worker.engine.thread_ids)])
'''
with OMPProcessManager(VllmConfig()).configure_omp_envs(rank=0, local_rank=0):
    process = multiprocessing.get_context("spawn").Process(target=exec, args=(work, {}))
    process.start()
process.join()
"""


@pytest.mark.skipif(not current_platform.is_cpu() or len(CPUS) == 1, reason="needs vLLM's CPU build and two CPUs")
def test_copy_threads_leave_the_cpu_that_vllms_cpu_backend_binds_its_worker_to():
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": str(max(CPUS))}
    command = [sys.executable, "-c", START_A_WORKER]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == f"[[{max(CPUS)}], {sorted(CPUS)}]"


@pytest.mark.skipif(len(CPUS) == 1, reason="needs a second CPU to leave")
def test_a_store_stays_on_the_cpus_of_who_makes_it():
    os.sched_setaffinity(0, {max(CPUS)})
    try:
        store = BlockStore(Rows.of_view(memoryview(primary_rows(2))), TierConfig.parse({"engine": "host"}))
    finally:
        os.sched_setaffinity(0, CPUS)
    assert [os.sched_getaffinity(thread) for thread in store.engine.thread_ids] == [{max(CPUS)}]
    store.close()


@pytest.mark.parametrize("options", [{}, {"copy_threads": 3}])
def test_the_engine_has_as_many_copy_threads_as_the_configuration_says(options):
    store = BlockStore(Rows.of_view(memoryview(primary_rows(2))), TierConfig.parse({"engine": "host", **options}))
    assert len(store.engine.thread_ids) == options.get("copy_threads", host.default_threads())
    store.close()


def test_the_tiers_memory_is_populated_by_the_copy_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(host.HostEngine, "populate", lambda engine, rows: asked.append((engine, rows)))
    store = BlockStore(Rows.of_view(memoryview(primary_rows(2))), TierConfig.parse({"engine": "host"}))
    assert asked == [(store.engine, store.arena.rows)]
    store.close()


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"engine": "cuda"}, "engine 'cuda'"),
        ({"pool": "cuda:0"}, "pool 'cuda:0'"),
        ({"engine": "cuda", "pool": "cuda:1"}, "pool 'cuda:1'"),
        ({"engine": "cuda", "device": "cuda:1"}, "device 'cuda:1'"),
    ],
)
def test_cuda_without_a_gpu_is_refused_in_words(options, asked):
    words = f"^{asked} needs a GPU that torch can use, and this process has none; use engine 'host'$"
    with pytest.raises(ValueError, match=words):
        BlockStore(Rows.of_view(memoryview(primary_rows(2))), TierConfig.parse(options))


# ----------------------------------------------------------------------- the GPU of an engine among those of a node


def spec_of(version: str, **parallel: object) -> SimpleNamespace:
    """vLLM's spec: up to 0.26 it has vLLM's configuration, from 0.27 on a part of it."""
    if version == "0.25":
        return SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(**parallel)))
    return SimpleNamespace(config=SimpleNamespace(parallel=SimpleNamespace(**parallel)))


@pytest.mark.parametrize("version", ["0.25", "0.27"])
@pytest.mark.parametrize(
    ("workers", "index", "local", "gpu"),
    [
        (1, 0, None, 0),
        (4, 0, 0, 0),
        (1, 3, 3, 3),
        (2, 1, 1, 2),
        (2, 5, 1, 2),  # the second replica of the second node
        (2, 5, 0, 0),
        (2, 3, None, 6),
    ],
)
def test_an_engines_first_gpu_comes_after_those_of_the_replicas_before_it_on_the_node(
    version, workers, index, local, gpu
):
    parallel = {"world_size": workers, "data_parallel_index": index, "data_parallel_rank_local": local}
    assert compat.first_gpu(spec_of(version, **parallel)) == gpu


@pytest.mark.parametrize(
    "who", [{"distributed_executor_backend": "ray"}, {"distributed_executor_backend": "external_launcher"}]
)
def test_where_others_place_the_workers_an_engines_gpu_is_unknown(who):
    parallel = {"world_size": 2, "data_parallel_index": 1, "data_parallel_rank_local": 1}
    assert compat.first_gpu(spec_of("0.25", **parallel)) == 2
    assert compat.first_gpu(spec_of("0.25", **parallel, **who)) is None
    assert compat.first_gpu(spec_of("0.25", **parallel, data_parallel_backend="ray")) is None


def test_what_vllms_configuration_says_is_found_at_the_callers():
    """From 0.27 on. It says more than the spec does."""
    vllm_config = MagicMock(spec=VllmConfig)
    vllm_config.parallel_config = SimpleNamespace(
        world_size=2, data_parallel_rank_local=1, distributed_executor_backend="ray"
    )
    assert compat.first_gpu(spec_of("0.27", world_size=2, data_parallel_rank_local=1)) is None


@pytest.mark.parametrize(("visible", "gpu"), [(None, 5), ("", 5), ("4,5,6", 1), ("7,6,5", 2)])
def test_device_ids_are_the_machines(monkeypatch, visible, gpu):
    """vLLM's --device-ids, of which the engine's part comes after those of the replicas before it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    parallel = {"world_size": 2, "data_parallel_rank_local": 1, "assigned_physical_gpu_ids": [4, 6, 5, 7]}
    assert compat.first_gpu(spec_of("0.25", **parallel)) == gpu


@pytest.mark.parametrize("version", ["0.25", "0.27"])
def test_replicas_that_belong_together_have_more_than_one_worker(version):
    assert compat.has_one_worker(spec_of(version, world_size=1))
    assert compat.has_one_worker(spec_of(version, world_size=1, data_parallel_size=1))
    assert not compat.has_one_worker(spec_of(version, world_size=1, data_parallel_size=2))
    assert not compat.has_one_worker(spec_of(version, world_size=2, data_parallel_size=1))
