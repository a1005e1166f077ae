"""The documents: what they name exists, what exists is in them, and their programs run."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from async_tier.config import TierConfig
from async_tier.jobs import REFUSALS, Statistics
from async_tier.manager import AsyncSecondaryTierManager
from async_tier.vllm import metrics
from tests.mutants import MUTANTS
from tests.mutants_cuda import MUTANTS_CUDA

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "async_tier"
VLLM = Path(str(importlib.util.find_spec("vllm").origin)).parent  # type: ignore[union-attr]
DOCS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
PROGRAMS = re.findall(r"^```python\n(.*?)^```", "\n".join(DOCS.values()), re.DOTALL | re.MULTILINE)
LOGS = ("debug", "info", "warning", "error", "exception", "critical")


def rows(doc: str, width: int) -> list[list[str]]:
    """The rows of all tables of that many columns."""
    lines = [line[2:].removesuffix(" |") for line in DOCS[doc].splitlines() if line.lstrip().startswith("| ")]
    return [cells for cells in (line.split(" | ") for line in lines) if len(cells) == width]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def source_of(path: Path, name: str) -> str:
    """The lines of a function, class or method, by its dotted name; of C, of a function."""
    text = path.read_text()
    if path.suffix == ".c":
        found = re.search(rf"^[\w *]*\b{name}\([^;]*?\{{.*?^\}}", text, re.DOTALL | re.MULTILINE)
        assert found, f"{path} has no {name}"
        return found[0]
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        inside = {getattr(each, "name", ""): each for each in ast.iter_child_nodes(node)}
        assert part in inside, f"{path} has no {name}"
        node = inside[part]
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]) + "\n"  # type: ignore[attr-defined]


RULES = [row for row in rows("docs/rules.md", 5) if row[0].startswith("**R")]


def test_every_rule_has_a_row():
    numbers = [int(re.findall(r"^\*\*R(\d+)\*\*", row[0])[0]) for row in RULES]
    assert sorted(set(numbers)) == list(range(1, 16))


@pytest.mark.parametrize("row", RULES, ids=lambda row: row[4])
def test_a_rule_has_its_source_its_line_its_test_and_its_mutant(row: list[str]):
    said = [each.split("::") for each in code(row[1]) if "::" in each]
    assert said or "Ours" in row[1]
    for file, name in said:
        source_of(VLLM / file, name)
    (kept_by,), (test,), (rule,) = map(code, row[2:])
    file, name = kept_by.split("::")
    source_of(ROOT / test.split("::")[0], test.split("::")[1])
    found = [mutant for mutant in [*MUTANTS, *MUTANTS_CUDA] if mutant.rule == rule and mutant.file == file]
    assert len(found) == 1, f"mutants of that name in {file}"
    assert found[0].before in source_of(PACKAGE / file, name), "the mutant breaks a line that is elsewhere"


def anchors(text: str) -> set[str]:
    """Those of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("doc", [*DOCS, "tests/cuda_emulator/README.md", "docs/monitoring/README.md"])
def test_links_lead_somewhere(doc: str):
    text = (ROOT / doc).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"\w+:", target):
            name, _, anchor = target.partition("#")
            path = (ROOT / doc).parent / name if name else ROOT / doc
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("doc", DOCS)
def test_commands_and_files_that_are_named_exist(doc: str):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", DOCS[doc], re.MULTILINE)) <= targets
    for name in re.findall(r"`(\w+/[\w/]+\.(?:py|c|h|md))\b", DOCS[doc]):
        assert any((folder / name).exists() for folder in (ROOT, PACKAGE, VLLM)), name


def test_the_readme_is_short_and_there_are_programs():
    assert len(DOCS["README.md"].splitlines()) <= 150
    assert len(PROGRAMS) >= 2


def test_every_key_is_documented_with_its_default():
    stated = {code(key)[0]: code(default)[0] for key, default, _ in rows("docs/configuration.md", 3) if code(default)}
    for key, default in dataclasses.asdict(TierConfig()).items():
        assert key in stated
        assert getattr(TierConfig.parse({key: json.loads(stated[key])}), key) == default, key


def test_every_file_of_the_package_is_listed():
    files = [path for suffix in ("py", "c") for path in PACKAGE.rglob(f"*.{suffix}") if path.name != "__init__.py"]
    listed = {name for file, _ in rows("docs/design.md", 2) for name in code(file)}
    assert {path.relative_to(PACKAGE).as_posix() for path in files} <= listed


def messages() -> list[str]:
    """How the package's log messages begin, and what `report_fault` says that the tier could not do."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
            receiver, _, method = ast.unparse(call.func).rpartition(".")
            if (receiver == "logger" and method in LOGS) or method == "report_fault":
                found.add(re.sub(r"%[a-z]", "…", ast.literal_eval(call.args[0]))[:60])
    return sorted(found)


@pytest.mark.parametrize("message", messages())
def test_every_log_message_is_documented(message: str):
    assert message in DOCS["docs/operations.md"]


def test_statistics_and_metrics_are_as_documented():
    named = set(code(DOCS["docs/operations.md"]))
    assert {field.name for field in dataclasses.fields(Statistics)} | set(REFUSALS) <= named
    ours = {name for name in named if name.startswith(metrics.PREFIX)}
    assert ours == {metrics.PREFIX + name for name in metrics.METRICS}
    assert set(AsyncSecondaryTierManager.config_info_keys({})) <= named
    files = ("v1/kv_offload/tiering/base.py", "v1/kv_offload/cpu/common.py")
    files += ("distributed/kv_transfer/kv_connector/v1/offloading/metrics.py",)
    text = "".join((VLLM / name).read_text() for name in files)
    assert {name for name in named if name.startswith("vllm:")} - ours <= set(re.findall(r'"(.*)"', text))


@pytest.mark.starts_process
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_run_as_printed(program: str):
    run = [sys.executable, "-W", "default::ResourceWarning", "-c", program]
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "ResourceWarning" not in ended.stderr, "it closes what it opens"
    assert ended.stdout, "it shows what it does"
