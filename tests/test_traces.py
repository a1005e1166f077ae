"""The reader of traces: what people's files look like, and what of it is replayed, refused or told of."""

from __future__ import annotations

import codecs
import gzip
import json
import re

import pytest

from benchmarks.bench import replay
from benchmarks.shared import tiering, traces

# What a refusal of ids begins with.
IDS = "'hash_ids' must be a list of integers or of strings that are hexadecimal numbers"


def write(path, *lines: str):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_trace_in_mooncakes_format_is_read(tmp_path):
    line = {"timestamp": 0, "input_length": 700, "output_length": 3, "hash_ids": [0, 1]}
    path = write(tmp_path / "trace.jsonl", json.dumps(line), "", json.dumps({"hash_ids": [0, 5, 6]}), "not read")
    assert traces.read_trace(path, most=2) == [[0, 1], [0, 5, 6]]


# By what is said of them.
REFUSED = {
    "not JSON": [b"{", b'\xef\xbb\xbf{"hash_ids": [1]}'],
    "NaN is not JSON": [b'{"hash_ids": [1], "input_length": NaN}', b'{"hash_ids": [1], "timestamp": NaN}'],
    "-Infinity is not JSON": [b'{"hash_ids": [-Infinity]}'],
    "nested too deeply": [b"[" * 100_000],
    "1e999 is too large for a number": [b'{"hash_ids": [1e999]}', b'{"hash_ids": [1], "timestamp": 1e999}'],
    "an integer of 641 digits, and 640 is the most": [b'{"hash_ids": [' + b"9" * 641 + b"]}"],
    "an integer of 5000 digits, and 640 is the most": [b'{"hash_ids": [' + b"9" * 5000 + b"]}"],
    "not UTF-8": [b'{"hash_ids": [1], "tenant": "\xe9\xff"}', '{"hash_ids": [1]}'.encode("utf-16-le") + b"\xff"],
    "not a JSON object with 'hash_ids'": [b"[1]", b"null", b'"hash_ids"', b"{}"],
    IDS: [
        *(b'{"hash_ids": %b}' % ids for ids in (b"3", b"null", b'"ab"')),
        *(b'{"hash_ids": [%b]}' % each for each in (b'1, "2"', b"true", b"1.0", b"1e3", b"null", b"[1]")),
        *(b'{"hash_ids": ["%b"]}' % each for each in (b"xyz", b"", b"0x", b"1_0", b"\\ud800")),
    ],
    "'hash_ids' must be all integers or all strings, as in line 1": [b'{"hash_ids": ["ab", "cd"]}'],
    "'hash_ids' is there twice": [b'{"hash_ids": [1], "hash_ids": [2]}'],
    "'timestamp' must be a number from 0 on": [
        b'{"hash_ids": [1], "timestamp": %b}' % time for time in (b"true", b"-1", b'"2023-11-16 18:15:46"')
    ],
    "'input_length' must be a number from 0 on": [
        b'{"hash_ids": [1], "input_length": %b}' % length for length in (b'"many"', b"-5")
    ],
}


@pytest.mark.parametrize(
    ("line", "what"),
    [(line, what) for what, lines in REFUSED.items() for line in lines],
    ids=lambda value: value[:40].decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_a_line_that_is_none_is_refused_in_one_sentence_with_file_and_line(tmp_path, line, what):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b'{"hash_ids": [1]}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 2: {re.escape(what)}$"):
        traces.read_trace(path, most=10)


def test_ids_may_be_of_any_size(tmp_path):
    ids = [0, 1 << 63, (1 << 64) - 1, 1 << 64, (1 << 256) + 1]
    path = write(tmp_path / "trace.jsonl", json.dumps({"hash_ids": ids}), json.dumps({"hash_ids": ids}))
    requests = traces.read_trace(path, most=2)
    assert requests == [ids, ids]
    hits = tiering.replay(requests, 2 * len(ids), len(ids))
    assert hits.primary + hits.tier == len(ids) == replay.infinite_hits(requests)


TRACE = b'{"timestamp": 0, "hash_ids": [1, 2]}\n{"timestamp": 9, "hash_ids": [1, 3]}\n'


@pytest.mark.parametrize(
    "content",
    [
        TRACE.replace(b"\n", b"\r\n"),
        TRACE.replace(b"\n", b" \t\n \n\n"),
        TRACE.rstrip(),
        codecs.BOM_UTF8 + TRACE,
        gzip.compress(TRACE),
        gzip.compress(codecs.BOM_UTF8 + TRACE),
        gzip.compress(TRACE[:20]) + gzip.compress(TRACE[20:]) + bytes(100),
    ],
    ids=["CRLF", "blanks", "no newline at the end", "BOM", "gzip", "gzip with BOM", "gzip in several members"],
)
@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz", "trace"])
def test_a_trace_is_read_however_it_is_packed_and_called(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert traces.read_trace(tmp_path / name, most=10) == [[1, 2], [1, 3]]


@pytest.mark.parametrize("damage", [lambda packed: packed[:-12], lambda packed: packed[:-8] + bytes(8)])
def test_a_damaged_gzip_file_is_refused_unless_it_is_behind_what_was_asked_for(tmp_path, damage):
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(TRACE) + damage(gzip.compress(TRACE)))
    assert traces.read_trace(path, most=2) == [[1, 2], [1, 3]]
    with pytest.raises(ValueError, match=rf"^{path}, line \d: the gzip data is cut off or damaged$"):
        traces.read_trace(path, most=10)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n", "not JSON"),
        (json.dumps([{"hash_ids": [1]}, {"hash_ids": [1]}]).encode(), "not a JSON object with 'hash_ids'"),
        (json.dumps([{"hash_ids": [1]}], indent=1).encode(), "not JSON"),
        (b'{"hash_ids": [1]}\n'.decode().encode("utf-16"), "not UTF-8"),
        (b"\x28\xb5\x2f\xfd\x24\x00", "not UTF-8"),
        (
            b'{"id": "a", "hash_id_scope": "local", "requests": [{"t": 0, "in": 9, "hash_ids": [1]}]}',
            "not a JSON object",
        ),
        (b'{"timestamp": 0, "text_input": "Hello", "output_length": 4}', "not a JSON object with 'hash_ids'"),
    ],
    ids=["Azure", "an array", "an array over lines", "UTF-16", "zstd", "Weka", "AIPerf with texts"],
)
def test_another_format_is_refused_with_what_a_trace_is(tmp_path, content, why):
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}, line 1: {why}.*; a trace has a JSON object on every line$"):
        traces.read_trace(path, most=10)


def test_a_file_without_lines_is_not_read_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(traces, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(TRACE + b" " * (1 << 20) + b"\n"))
    with pytest.raises(ValueError, match=r", line 3: longer than 1 MiB$"):
        traces.read_trace(path, most=10)


def trace_of(tmp_path, *requests: dict):
    return traces.read_trace(write(tmp_path / "trace.jsonl", *map(json.dumps, requests)), most=len(requests))


def test_negative_ids_are_ids(tmp_path):
    requests = trace_of(tmp_path, {"hash_ids": [-1, 1, -(1 << 70)]}, {"hash_ids": [-1, 1]})
    assert requests == [[-1, 1, -(1 << 70)], [-1, 1]]
    assert tiering.replay(requests, 6, 6).ratio == 2 / 5


def test_hexadecimal_ids_are_equal_as_numbers(tmp_path):
    long = "9f" * 32
    requests = trace_of(
        tmp_path,
        {"hash_ids": ["ab", long, "-0x1"]},
        {"hash_ids": ["0xAB", long.upper()]},
        {"hash_ids": ["00ab", f"0X{long}", "10"]},
        {"hash_ids": []},
    )
    assert requests == [[0xAB, int(long, 16), -1], [0xAB, int(long, 16)], [0xAB, int(long, 16), 16], []]


def test_bailian_traces_are_read(tmp_path):
    """Seconds, blocks of 16 tokens, turns that have the whole prompt, and a chat's number instead of a session."""
    turns = [(0, -1, 0.31, 20, [5, 6], 1), (1, -1, 0.31, 16, [5], 1), (2, 0, 61.114, 48, [5, 7, 8], 2)]
    names = ("chat_id", "parent_chat_id", "timestamp", "input_length", "hash_ids", "turn")
    lines = [{**dict(zip(names, turn, strict=True)), "type": "text", "output_length": 9} for turn in turns]
    requests = trace_of(tmp_path, *lines)
    assert requests == [[5, 6], [5], [5, 7, 8]]


def test_ids_of_a_block_alone_become_ids_of_prefixes(tmp_path):
    """As in vLLM, where a block with other blocks before it has another key, and so is no hit."""
    requests = trace_of(
        tmp_path, {"hash_ids": [1, 9]}, {"hash_ids": [2, 9]}, {"hash_ids": [1, 9, 9]}, {"hash_ids": [2]}
    )
    assert requests == [[0, 1], [2, 3], [0, 1, 4], [2]]


@pytest.mark.parametrize(
    "times",
    [
        [0, 0, 27482, 1_800_000],
        [0.5, 0.5, 61.114, 7200],
        ["1753780607550317897", "1753780607550317897", "1753780607550317898", "1753780607550317898"],
        ["0.25", "0.5", "0.5", "1.5"],
        [None, None, None, None],
        [None, 3, None, 3.5],
    ],
)
def test_whatever_unit_times_have_lines_are_replayed_in_their_order(tmp_path, times):
    assert trace_of(tmp_path, *({"timestamp": time, "hash_ids": [at]} for at, time in enumerate(times))) == [
        [0], [1], [2], [3]
    ]  # fmt: skip


@pytest.mark.parametrize("times", [[0, 120, 80], [0.0, 5.5, 5.25], ["1753780607550317898", 1753780607550317897]])
def test_times_that_decrease_are_refused(tmp_path, times):
    """From one line to the next, from the session's begin, or unsorted: which of them cannot be told."""
    before, last = times[-2:]
    why = (
        f"line {len(times)}: 'timestamp' {last} is less than {before} in line {len(times) - 1}; lines must be in order"
    )
    with pytest.raises(ValueError, match=re.escape(why)):
        trace_of(tmp_path, *({"timestamp": time, "hash_ids": [1]} for time in times))


@pytest.mark.parametrize(
    "fields",
    [
        {"session_id": "a", "delay": 500},
        {"session_id": "a", "timestamp": 7, "delay_ms": 500},
        {"timestamp_delta": 3},
        {"timestamp": 9, "wait_for": ["a:0"]},
        {"request_id": "b", "dependencies": [{"on": "a"}]},
        {"created_time": 12},
        {"TIMESTAMP": "2023-11-16 18:15:46.6805900"},
        {"arrived_at": 1.5},
        {"t": 2.5},
        {"ts": 2.5},
        {"start_ms": 2.5},
        {"created": 7},
        {"timestamp": 9, "gap_ms": 5},
        {"timestamp": 9, "think_time": 5},
        {"iat": 0.5},
    ],
    ids=str,
)
def test_times_of_other_dialects_are_refused(tmp_path, fields):
    name = next(name for name in fields if name not in ("session_id", "timestamp", "request_id"))
    why = f"line 2: {name!r} is not understood; only 'timestamp' may tell when a request came"
    with pytest.raises(ValueError, match=re.escape(why)):
        trace_of(tmp_path, {"timestamp": 0, "hash_ids": [1]}, {**fields, "hash_ids": [1, 2]})


def test_fields_that_do_not_matter_do_not_matter(tmp_path):
    fields = {
        "ttft_time": 3.5,
        "wait_for": [],
        "delay": None,
        "hash_id_scope": "global",
        "session_id": None,
        "model": "m",
    }
    assert trace_of(tmp_path, {**fields, "timestamp": 0, "hash_ids": [1]}) == [[1]]


def test_ids_of_a_session_alone_are_refused(tmp_path):
    with pytest.raises(ValueError, match="line 1: 'hash_id_scope' must be 'global'"):
        trace_of(tmp_path, {"hash_id_scope": "local", "session_id": "a", "hash_ids": [1]})


def session(name: str, *ids: int, **fields: object) -> dict:
    return {"session_id": name, "hash_ids": ids, **fields}


def test_sessions_whose_lines_have_the_whole_prompt_are_replayed(tmp_path):
    """Also if one of them begins anew, as an agent's do."""
    lines = [("a", 1, 2), ("b", 1, 3), ("a", 7), ("a", 1, 2, 4), ("b", 1, 3, 5)]
    requests = trace_of(tmp_path, *(session(*line, timestamp=at) for at, line in enumerate(lines)))
    assert requests == [[1, 2], [1, 3], [7], [1, 2, 4], [1, 3, 5]]


def test_sessions_whose_lines_have_only_what_is_new_are_refused(tmp_path):
    lines = [("a", 1, 2), ("b", 1, 3), ("a", 4), ("b", 5)]
    with pytest.raises(ValueError, match="line 3: 'hash_ids' must be of the whole prompt, but no line of a session"):
        trace_of(tmp_path, *(session(*line, timestamp=at) for at, line in enumerate(lines)))


def test_sessions_whose_later_lines_have_no_time_are_refused(tmp_path):
    with pytest.raises(ValueError, match="line 3: a later line of session 'a' must have a 'timestamp'"):
        trace_of(tmp_path, session("a", 1, timestamp=0), session("b", 2, timestamp=1), session("a", 1, 3))


@pytest.mark.parametrize(
    "lengths",
    [[(1, 1), (512, 1), (513, 2), (1024, 2), (6758, 14), (0, 0)], [(15, 0), (16, 1), (31, 1), (32, 2), (521.0, 32)]],
    ids=["the last block may be a part", "whole blocks alone"],
)
def test_a_block_size_that_explains_the_lengths_is_not_spoken_of(tmp_path, caplog, lengths):
    trace_of(tmp_path, *({"input_length": tokens, "hash_ids": list(range(count))} for tokens, count in lengths))
    assert not caplog.records


@pytest.mark.parametrize("last", [(1024, 1), (512, 3), (10**400, 2)])
def test_ids_that_no_one_block_size_explains_are_told_of(tmp_path, caplog, last):
    lengths = [(512, 1), (513, 2), last, (1, 100)]
    trace_of(tmp_path, *({"input_length": tokens, "hash_ids": list(range(count))} for tokens, count in lengths))
    (record,) = caplog.records
    assert f"line 3: no one block size gives {last[1]} 'hash_ids' for an 'input_length' of {last[0]} " in record.message


def test_a_block_that_a_request_names_twice_is_asked_for_once(tmp_path):
    path = write(tmp_path / "trace.jsonl", '{"hash_ids": [4, 5, 4]}')
    assert traces.read_trace(path, most=1) == [[4, 5]]


@pytest.mark.parametrize("lines", [[""], ['{"hash_ids": []}']])
def test_a_trace_without_a_block_is_refused(tmp_path, lines):
    with pytest.raises(ValueError, match="no request has a block"):
        traces.read_trace(write(tmp_path / "trace.jsonl", *lines), most=10)
