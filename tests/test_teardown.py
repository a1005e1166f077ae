"""What a test leaves behind is closed after it, on every engine; a teardown that leaves its work undone is a failure.

Shown by pytest, run by itself on the tests in `TESTS`; the emulator, if it is there, is a GPU to them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CUDA, HERE

pytestmark = pytest.mark.starts_process

ROOT = Path(__file__).resolve().parent.parent

TESTS = """
import unittest

import numpy as np
import pytest

from async_tier.testing import store_gate
from tests import helpers

made = []

def tiers(count=1):
    ours = [helpers.make_tier(np.zeros((4, 4096), np.uint8)) for _ in range(count)]
    made.extend(tier.block_store for tier in ours)
    return ours

@pytest.mark.each_engine
def test_leaves_it_open(engine):
    tiers()

@pytest.mark.each_engine
def test_leaves_a_stream_held(engine):
    (tier,) = tiers()
    store_gate(tier).hold()
    tier.submit_store(helpers.job(1, helpers.keys(0), [0]))

@pytest.mark.each_engine
@pytest.mark.parametrize("end", [pytest.skip, pytest.xfail, pytest.fail])
def test_leaves_one_that_cannot_be_closed(engine, end):
    other, tier, another = tiers(3)
    close = tier.block_store.close
    def close_and_end():
        close()
        end("badly")
    tier.block_store.close = close_and_end

def test_all_are_closed():
    assert made
    assert all(store._closed for store in made)
    assert helpers._stores == helpers._primaries == []

def skip_test(reason):
    raise unittest.SkipTest(reason)

@pytest.mark.parametrize("end", [pytest.skip, pytest.xfail, pytest.fail, skip_test])
def test_ends_badly(request, end):
    request.addfinalizer(lambda: end("badly"))

@pytest.mark.xfail(reason="the test is expected to fail, and not its teardown")
def test_fails_and_ends_badly(request):
    request.addfinalizer(lambda: pytest.fail("badly"))
    assert not request

def test_skips_and_ends_well():
    pytest.skip("which is no fault")
"""

# "real" takes for a GPU what the emulator is, if it is there.
RUN = """
import os, sys
if os.environ.pop("EMULATED", ""):
    from tests import cuda_emulator
    cuda_emulator.load()
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What pytest's summary says of each of `TESTS`: its outcome, and that of its teardown if that failed."""
    file = tmp_path_factory.mktemp("teardown") / "test_ends.py"
    file.write_text(TESTS)
    command = [sys.executable, "-W", "ignore", "-c", RUN, "-p", "tests.conftest", "-p", "no:cacheprovider", "-rA"]
    environment = {**os.environ, "ASYNC_TIER_CUDA": CUDA and "real", "EMULATED": "1" if CUDA == "emulated" else ""}
    ran = subprocess.run([*command, str(file)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout + ran.stderr
    found: dict[str, list[str]] = {}
    for outcome, name in re.findall(r"^([A-Z]+) \S*test_ends\.py::(test_.*?)(?: - .*)?$", ran.stdout, re.MULTILINE):
        found.setdefault(name, []).append(outcome)
    assert "which is no fault" in ran.stdout
    return found


def of(outcomes: dict[str, list[str]], test: str) -> list[list[str]]:
    return [sorted(each) for name, each in outcomes.items() if name.partition("[")[0] == test]


def test_what_a_test_leaves_open_is_closed(outcomes):
    assert of(outcomes, "test_leaves_it_open") == [["PASSED"]] * len(HERE)
    assert outcomes["test_all_are_closed"] == ["PASSED"]


def test_a_store_that_cannot_be_closed_fails_its_test(outcomes):
    assert of(outcomes, "test_leaves_one_that_cannot_be_closed") == [["ERROR", "PASSED"]] * 3 * len(HERE)


def test_a_teardown_that_skips_or_fails_fails_its_test(outcomes):
    assert of(outcomes, "test_ends_badly") == [["ERROR", "PASSED"]] * 4
    assert of(outcomes, "test_fails_and_ends_badly") == [["ERROR", "XFAIL"]]
