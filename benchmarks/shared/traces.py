"""Reads request traces as people have them: a JSON object per line, in UTF-8, plain or compressed with gzip.

Of a request a replay needs its blocks and its place among the others, and takes nothing else from a line:

- `hash_ids`, one id per block of the whole prompt: integers of any size and sign, or hexadecimal numbers as strings,
  where "0xAB", "ab" and "00ab" are the same id. In Mooncake's traces an id stands for the whole prefix that its block
  ends, as vLLM's keys do. In others, such as Alibaba's Bailian traces, it may stand for the block's own tokens, which
  shows where it follows different blocks; then each prefix gets an id.
- The order of the lines, which must be that of arrival. `timestamp` (Mooncake: ms, Bailian: s), where there is one, has
  to agree; its unit does not matter. Times that count from another request's are not replayed: which of two requests of
  different sessions comes first would depend on the server.

What is written in another way is refused in one sentence. Lengths that no one block size explains are logged. What does
not show: ids that mean different blocks in different sessions of a file, unless `hash_id_scope` says so, and times that
count from another request's but never decrease. If they count from the line before, the order is right all the same.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import logging
import math
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of an integer in a trace: as many as Python reads whatever its settings (sys.set_int_max_str_digits).
MOST_DIGITS = sys.int_info.str_digits_check_threshold
# A prompt of a million tokens in blocks of one has 20 MB of ids. Larger lines are whole files in some other format.
LONGEST_LINE = 64 << 20
GZIP = b"\x1f\x8b"
HEXADECIMAL = re.compile("-?(0x)?[0-9a-f]+", re.IGNORECASE)
DECIMAL = re.compile(r"[0-9]{1,40}(\.[0-9]{1,40})?")
# Names of fields that tell when a request comes by another request: AIPerf's and Dynamo's `delay`, Dynamo's `wait_for`
# and `dependencies`, and deltas.
RELATIVE_TIME = re.compile("delay|delta|wait|dependenc|(^|_)gap|think_?time|inter_?arriv|^iat", re.IGNORECASE)
# Names under which others note a time: without a `timestamp`, one of these may order the lines differently.
OTHER_TIME = re.compile("time|(^|_)date|arriv|interval|start|begin|creat|offset|_at$|^ts?$", re.IGNORECASE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """A request of a trace: the ids of its prompt's blocks, and what shows that it is to be replayed like that."""

    number: int
    ids: list[int]
    # None without an id.
    ids_are_strings: bool | None
    # In the file's unit.
    timestamp: float | None
    tokens: float | None
    session: str | None

    def refused(self, why: str) -> ValueError:
        return ValueError(f"line {self.number}: {why}")


def read_trace(path: Path, most: int) -> list[list[int]]:
    """The block ids of at most that many requests, in order of arrival; nothing behind them is read.

    Raises ValueError that says in which line what is wrong, OSError if there is no file to read.
    """
    lines: list[Line] = []
    try:
        for number, text in _numbered(path):
            if text.strip():
                lines.append(_parsed(number, text))
            if len(lines) == most:
                break
        _check_types(lines)
        _check_order(lines)
        _check_sessions(lines)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    if not any(line.ids for line in lines):
        raise ValueError(f"{path}: no request has a block")
    if line := _without_block_size(lines):
        lengths = f"{len(line.ids)} 'hash_ids' for an 'input_length' of {line.tokens}"
        logger.warning("%s, line %d: no one block size gives %s and what is above", path, line.number, lengths)
    return _of_prefixes([line.ids for line in lines])


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """A file's lines with their numbers, unpacked if they are packed, without a byte order mark."""
    with path.open("rb") as file:
        lines = gzip.GzipFile(fileobj=file) if file.peek(len(GZIP)).startswith(GZIP) else file
        for number in itertools.count(1):
            try:
                line = lines.readline(LONGEST_LINE + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"line {number}: the gzip data is cut off or damaged") from error
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise ValueError(f"line {number}: longer than {LONGEST_LINE >> 20} MiB")
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _parsed(number: int, text: bytes) -> Line:
    """Raises ValueError that says what is wrong with the line by itself."""
    try:
        fields = _fields(text)
    except ValueError as error:
        # A file in another format shows in its first line.
        hint = "; a trace has a JSON object on every line" if number == 1 else ""
        raise ValueError(f"line {number}: {error}{hint}") from error
    try:
        ids, ids_are_strings = _ids(fields["hash_ids"])
        timestamp = _number(fields, "timestamp")
        for name, value in fields.items():
            if value and (RELATIVE_TIME.search(name) or (timestamp is None and OTHER_TIME.search(name))):
                raise ValueError(f"{name!r} is not understood; only 'timestamp' may tell when a request came")
        if fields.get("hash_id_scope") not in (None, "global"):
            raise ValueError("'hash_id_scope' must be 'global': equal ids are equal blocks in the whole file")
        session = fields.get("session_id")
        return Line(
            number=number,
            ids=ids,
            ids_are_strings=ids_are_strings,
            timestamp=timestamp,
            tokens=_number(fields, "input_length"),
            session=None if session is None else str(session),
        )
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _fields(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(
            text.decode(),
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
            object_pairs_hook=_each_once,
        )
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError("not JSON") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(fields, dict) or "hash_ids" not in fields:
        raise ValueError("not a JSON object with 'hash_ids'")
    return fields


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits, and {MOST_DIGITS} is the most")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is too large for a number")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name!r} is there twice")
        fields[name] = value
    return fields


def _number(fields: dict[str, Any], name: str) -> float | None:
    """A field's number, which may be a string: nanoseconds since 1970 do not fit JavaScript's."""
    value = fields.get(name)
    if type(value) is str and DECIMAL.fullmatch(value):
        value = float(value) if "." in value else int(value)
    if value is None or (type(value) in (int, float) and value >= 0):
        return value
    raise ValueError(f"{name!r} must be a number from 0 on")


def _ids(values: Any) -> tuple[list[int], bool | None]:
    """(ids, whether they are strings, None if there are none)."""
    if isinstance(values, list):
        if all(type(each) is int for each in values):
            return values, False if values else None
        if all(type(each) is str and HEXADECIMAL.fullmatch(each) for each in values):
            return [int(each, 16) for each in values], True
    raise ValueError("'hash_ids' must be a list of integers or of strings that are hexadecimal numbers")


def _check_types(lines: Sequence[Line]) -> None:
    """Whether "10" is 10 or 16 cannot be told."""
    with_ids = [line for line in lines if line.ids]
    for before, line in itertools.pairwise(with_ids):
        if line.ids_are_strings != before.ids_are_strings:
            raise line.refused(f"'hash_ids' must be all integers or all strings, as in line {before.number}")


def _check_order(lines: Sequence[Line]) -> None:
    """Times that decrease may be unsorted, or count from another request; which of them cannot be told."""
    timed = [(line.timestamp, line) for line in lines if line.timestamp is not None]
    for (earlier, before), (later, line) in itertools.pairwise(timed):
        if later < earlier:
            raise line.refused(
                f"'timestamp' {later} is less than {earlier} in line {before.number}; lines must be in order of "
                "arrival, with times that all count from one moment"
            )


def _check_sessions(lines: Sequence[Line]) -> None:
    """AIPerf sends a session's next line when the one before is answered, with what it adds to the prompt alone."""
    first: dict[str, Line] = {}
    later = []
    for line in lines:
        if line.session is not None and first.setdefault(line.session, line) is not line:
            if line.timestamp is None:
                raise line.refused(
                    f"a later line of session {line.session!r} must have a 'timestamp' that tells when it came"
                )
            later.append(line)
    if later and not any(line.ids[:1] == first[str(line.session)].ids[:1] for line in later):
        raise later[0].refused(
            f"'hash_ids' must be of the whole prompt, but no line of a session, such as {later[0].session!r}, begins "
            "as the session does"
        )


def _without_block_size(lines: Sequence[Line]) -> Line | None:
    """The first line whose number of ids no block size explains that explains all before it; None if there is none.

    There may be an id for the last block that is not full, or none.
    """
    least: float = 1
    most: float = math.inf
    for line in lines:
        if line.tokens is not None:
            count = len(line.ids)
            least = max(least, line.tokens // (count + 1) + 1)
            if count > 1:
                most = min(most, -(-line.tokens // (count - 1)) - 1)
            if least > most:
                return line
    return None


def _of_prefixes(requests: list[list[int]]) -> list[list[int]]:
    """The same requests with ids that stand for prefixes: their own, unless one follows different blocks."""
    before: dict[int, int | None] = {}
    # A prefix cannot be in a request twice; a cache asked twice at once would count the second as a hit.
    once = [list(dict.fromkeys(ids)) for ids in requests]
    if all(
        before.setdefault(each, last) == last for ids in once for last, each in zip([None, *ids], ids, strict=False)
    ):
        return once
    numbers: dict[tuple[int, int], int] = {}
    renumbered = []
    for ids in requests:
        prefix = -1
        renumbered.append([prefix := numbers.setdefault((prefix, each), len(numbers)) for each in ids])
    return renumbered
