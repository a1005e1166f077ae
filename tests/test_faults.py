"""Log lines about faults: how many there are, and what they say."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from async_tier.observe.faults import INTERVAL_S, MAX_KINDS, FaultLog


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> FaultLog:
    return FaultLog(logging.getLogger("test"), clock)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def raised(text: str, kind: type[Exception] = OSError) -> Exception:
    try:
        raise kind(text)
    except kind as error:
        return error


def test_the_first_has_its_traceback_and_later_ones_a_count(log, clock, caplog):
    for number in range(4):
        log.report("load", f"Job {number} failed: no luck", raised("no luck"))
    assert [record.exc_info is not None for record in caplog.records] == [True]
    assert "in raised" in caplog.text
    assert lines(caplog) == ["Job 0 failed: no luck"]
    clock.now += INTERVAL_S
    log.report("load", "Job 4 failed: no luck", raised("no luck"))
    assert [record.exc_info for record in caplog.records] == [None]
    assert lines(caplog) == ["Job 4 failed: no luck (and 3 more like it since the last such line)"]


def test_there_is_a_line_a_second_of_a_kind(log, clock, caplog):
    for _ in range(1000):
        log.report("look up", "lookup", raised("no luck"))
        log.flush()
        clock.now += INTERVAL_S / 100
    log.flush(now=True)
    said = lines(caplog)
    assert 10 <= len(said) <= 11 + 1
    counts = [int(line.split("(and ")[1].split()[0]) + 1 if "(and" in line else 1 for line in said]
    assert sum(counts) == 1000, "none is forgotten"


def test_kinds_are_what_was_done_and_the_error(log, caplog):
    log.report("load", "a load", raised("x"))
    log.report("store", "a store", raised("x"))
    log.report("load", "another load", raised("x", ValueError))
    log.report("load", "a load without an error")
    log.report("load", "an equal load", raised("y"))
    assert lines(caplog) == ["a load", "a store", "another load", "a load without an error"]


def test_what_was_held_back_is_said_once_it_may_be(log, clock, caplog):
    log.flush()
    assert not log.has_held_back
    for number in range(3):
        log.report("load", f"load {number}", raised("x"))
    assert lines(caplog) == ["load 0"]
    assert log.has_held_back
    log.flush()
    assert lines(caplog) == []
    assert log.has_held_back
    clock.now += INTERVAL_S
    log.flush()
    assert lines(caplog) == ["load 2 (and 1 more like it since the last such line)"]
    assert not log.has_held_back
    log.report("load", "load 3", raised("x"))
    log.flush(now=True)
    assert lines(caplog) == ["load 3"]


def test_reasons_that_differ_by_more_than_numbers_are_kinds_of_their_own(log, caplog):
    for number in range(100):
        log.report("load", f"Job {number}: lacks {number}", reason=f"the tier lacks {number} of its blocks")
        log.report("load", f"Job {number}: 'a{number}'", reason=f"no key 'a{number}' at 0x{number:x}")
    log.report("load", "Job 100: closed", reason="the tier is shut down")
    assert lines(caplog) == ["Job 0: lacks 0", "Job 0: 'a0'", "Job 100: closed"]


def test_reasons_that_never_repeat_do_not_fill_the_log(log, caplog):
    letters = str.maketrans("0123456789", "abcdefghij")
    for number in range(1000):
        log.report("load", f"load {number}", reason=f"no {str(number).translate(letters)} today")
    log.report("load", "load a known one", reason="no a today")
    said = lines(caplog)
    assert len(said) == MAX_KINDS + 1
    log.flush(now=True)
    assert "load a known one" in lines(caplog)


@pytest.mark.starts_process
@pytest.mark.parametrize("configured", [False, True])
def test_every_module_logs_as_vllm_does_unless_somebody_has_configured_it(configured):
    script = f"""
import logging, sys
from tests.helpers import make_tier
from tests.rows import primary_rows
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("vllm's: %(message)s"))
logging.getLogger("vllm").addHandler(handler)
logging.getLogger("vllm").setLevel("INFO")
if {configured}:
    logging.basicConfig(format="mine: %(message)s", level="INFO", stream=sys.stdout)
tier = make_tier(primary_rows(8, 4096))
logging.getLogger("async_tier.block_store").info("Job %d failed", 7)
tier.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    prefix = "mine: " if configured else "vllm's: "
    assert any(line.startswith(f"{prefix}Tier 'async'") for line in lines), done.stdout
    assert f"{prefix}Job 7 failed" in lines
    assert sum("Job 7 failed" in line for line in lines) == 1
