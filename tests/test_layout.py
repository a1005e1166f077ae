"""The floors of the package: which module may import which, and which names programs import."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "async_tier"

# From the top down. A module imports from its own floor or from below; the modules of one floor may be in a folder.
FLOORS = (
    ("__main__", "cli", "operate"),
    ("manager", "plugin", "cpu_backend"),
    ("vllm",),
    ("testing",),
    ("aio",),
    ("block_store",),
    ("jobs",),
    ("engines",),
    ("index", "config"),
    ("eviction",),
    ("order",),
    ("observe",),
    ("memory",),
    ("streams",),
    ("machine", "sizes", "text", "file_locks"),
)
# Old names, for those who import or call them: they are on no floor, and nothing here imports them.
ALIASES = ("arena", "timeline")
# Who may know vLLM, and who may know CUDA, by torch or by the driver.
VLLM_FLOORS = 3
CUDA = {"engines", "memory.device", "memory.pinned", "memory.registration", "streams.cuda", "streams.cuda_driver"}

# Private names that tests look into: each with its reason, by the file's name where it is for one file.
REACHED = {
    "_native": "the C core is tested as it is",
    "_jobs": "vLLM's manager and its connector have one, too",
    "_release": "a store's finalizer: what it raises the garbage collector keeps to itself",
    "test_benchmarks.py": "what is private there is the benchmarks'",
    "test_replay.py": "what is private there is the benchmarks'",
}

FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imports(path: Path) -> set[str]:
    """The full names of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(str(node.module))
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def ours(names: set[str]) -> set[str]:
    return {name.removeprefix("async_tier.") for name in names if name.startswith("async_tier.")}


MODULES = [(name, path) for name, path in modules() if name and name not in ALIASES]
by_name = pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])


@by_name
def test_arrows_go_down_only(name, path):
    floor = FLOOR_OF[name.split(".")[0]]
    for other in ours(imports(path)):
        first = other.split(".")[0]
        assert first not in ALIASES, f"{name} imports {other}, which is for others"
        assert FLOOR_OF[first] >= floor, f"{name} imports {other}, from a floor above it"


def test_no_two_modules_import_each_other():
    arrows = {name: {other for other, _ in MODULES if other in ours(imports(path))} for name, path in MODULES}
    while leaves := [name for name, targets in arrows.items() if not targets]:
        arrows = {name: targets - set(leaves) for name, targets in arrows.items() if name not in leaves}
    assert not arrows, f"these wait for each other: {arrows}"


@by_name
def test_only_the_first_floors_know_vllm(name, path):
    knows = any(other.split(".")[0] == "vllm" for other in imports(path))
    assert not knows or FLOOR_OF[name.split(".")[0]] < VLLM_FLOORS


@by_name
def test_only_these_rooms_know_cuda(name, path):
    text = path.read_text()
    knows = "torch.cuda" in text or any(
        other.startswith(("streams.cuda", "memory.device", "memory.pinned")) for other in ours(imports(path))
    )
    assert not knows or name in CUDA


def private_names() -> set[str]:
    """Those of the package: of functions, classes, attributes and variables."""
    nodes = [node for _, path in modules() for node in ast.walk(ast.parse(path.read_text()))]
    names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


def names_reached(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of what is looked up in something else than `self` and `cls`, imported from here, or patched."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("async_tier"):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr")):
            strings = [each.value for each in node.args if isinstance(each, ast.Constant)]
            yield from ((node.lineno, text.rpartition(".")[2]) for text in strings if isinstance(text, str))


def test_tests_look_at_what_is_public():
    names = private_names() - REACHED.keys()
    found = [
        f"{path.name}:{line}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path.name not in REACHED
        for line, name in names_reached(ast.parse(path.read_text()))
        if name in names
    ]
    assert not found


@pytest.mark.parametrize(
    "name",
    [
        "manager.AsyncSecondaryTierManager",
        "cpu_backend.CPUBackendTieringSpec",
        "block_store.BlockStore",
        "block_store.Finished",
        "block_store.Statistics",
        "aio.AsyncBlockStore",
        "config.TierConfig",
        "eviction.EvictionPolicy",
        "order.SequenceOrder",
        "testing.store_gate",
        "arena.Rows",
        "timeline.main",
    ],
)
def test_names_that_users_write_stay(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(f"async_tier.{module}"), attribute)


def test_every_folder_is_installed():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {f"async_tier.{name}" for name, path in modules() if path.name == "__init__.py" and name}
    assert set(settings["tool"]["setuptools"]["packages"]) == {"async_tier", *folders}
