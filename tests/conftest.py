"""Which engines the tests run on, and what they hold them with.

ASYNC_TIER_CUDA says what CUDA is: "emulated" (`make test-cuda`), "real" (`make test-gpu`), or unset for none
(the host engine alone). Tests marked `contract` or `each_engine` run on every engine there is; those marked `host_only`
or `emulated` say themselves what they need.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from typing import Any

import pytest

CUDA = os.environ.get("ASYNC_TIER_CUDA", "")
if CUDA not in ("", "emulated", "real"):
    raise pytest.UsageError(f"ASYNC_TIER_CUDA must be 'emulated', 'real' or unset, not {CUDA!r}")

_emulator: Any = None
if CUDA == "emulated":  # before anything imports torch
    from tests import cuda_emulator

    _emulator = cuda_emulator.load()

collect_ignore_glob = [] if CUDA else ["test_cuda_*.py", "cuda_emulator/*"]
if CUDA == "real":
    collect_ignore_glob = ["cuda_emulator/*"]

POOL = f"/dev/shm/async-tier-tests-{os.getpid()}"
ENGINES = {
    "host": {"engine": "host"},
    "host, pool in a folder": {"engine": "host", "pool": POOL, "namespace": ""},
    "cuda, pool host": {"engine": "cuda", "staging_bytes": "64KiB"},
    "cuda, pool cuda:0": {"engine": "cuda", "pool": "cuda:0"},
    "cuda, pool in a folder": {"engine": "cuda", "staging_bytes": "64KiB", "pool": POOL, "namespace": ""},
}
# Those that there are.
HERE = [name for name in ENGINES if CUDA or name.startswith("host")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of the contract, and others of every engine, run once per engine."""
    marks = metafunc.definition
    asked = marks.get_closest_marker("contract") or marks.get_closest_marker("each_engine")
    if asked and not marks.get_closest_marker("host_only"):
        names = [name for name in asked.args or ENGINES if name in HERE]
        metafunc.parametrize("engine", names, indirect=True, scope="function")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Those that start a process which imports everything take seconds: last, so that what fails fails soon.
    items.sort(key=lambda item: item.get_closest_marker("starts_process") is not None)
    if CUDA == "real":
        for item in items:
            if item.get_closest_marker("emulated"):
                item.add_marker(pytest.mark.skip(reason="needs the emulator's controls"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]):
    """A teardown that skips, or that is expected to fail, has left its work undone: that is a failure."""
    report = yield
    if report.when == "teardown" and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"the teardown did not do its work: {call.excinfo.exconly()}"
    return report


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Whatever becomes of a test, on every engine, the stores that `helpers` made for it are closed after it.

    CUDA emulated is at its worst: destinations are poison while a copy is under way, copies take their time, by a seed
    of the test's name, and to unpin memory waits for them.
    """
    if _emulator is not None:
        _hold_on_the_device(monkeypatch)
    with contextlib.ExitStack() as ends:
        # Each is done whatever becomes of the others; the last one first.
        ends.callback(_of_helpers, "free_primaries")
        if _emulator is not None:
            _emulator.reset()
            _emulator.set_poison(True)
            _emulator.set_jitter(50.0, sum(request.node.name.encode()))
            _emulator.set_unregister_waits(True)
            ends.callback(_emulator.reset)
            ends.callback(_assert_no_violations)
        ends.callback(_of_helpers, "close_stores")
        yield


def _of_helpers(name: str) -> None:
    """Call a function of `helpers`; a test module that did not import it, nor vLLM, needs none."""
    helpers = sys.modules.get("tests.helpers")
    if helpers is not None:
        getattr(helpers, name)()


def _assert_no_violations() -> None:
    violations = _emulator.violation_texts()
    assert not violations, violations


@pytest.fixture(autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _leaves_nothing: None) -> str:
    """The name of the engine that `helpers.make_tier` and `helpers.World` build on."""
    name: str = getattr(request, "param", "host")
    if CUDA or hasattr(request, "param"):
        monkeypatch.setattr("tests.helpers.ENGINE_OPTIONS", ENGINES[name])
    yield name
    shutil.rmtree(POOL, ignore_errors=True)


@pytest.fixture
def emulator():
    """The emulator's controls; reset before and after every test, which fails if it saw a violation."""
    return _emulator


def _hold_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate of a CudaStream holds the device: the engine queues what it may, and that waits."""
    from async_tier.streams import cuda

    def limit(stream: cuda.CudaStream, pieces: int) -> None:
        for handle in stream.handles:
            if pieces > 0:
                _emulator.step(handle, pieces)
            else:
                (_emulator.release if pieces else _emulator.hold)(handle)

    monkeypatch.setattr(cuda.CudaStream, "limit", limit)
    # Else a test that shuts down with a stream held takes that long.
    monkeypatch.setattr(cuda, "CLOSE_TIMEOUT_S", 0.2)
