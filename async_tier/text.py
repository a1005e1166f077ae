"""Reads sizes and keys as people write them in a configuration, and writes values as people read them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fractions import Fraction

# Units as in Kubernetes ("Gi", "M"), and as people write them ("GiB", "MB").
_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", start=1):
    _UNITS |= {_prefix: 1000**_power, f"{_prefix}b": 1000**_power}
    _UNITS |= {f"{_prefix}i": 1024**_power, f"{_prefix}ib": 1024**_power}
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?(?:[eE][+-]?\d{1,2})?)\s*([A-Za-z]*)\s*", re.ASCII)
_SIZE_HELP = (
    "an integer number of bytes or text with a unit, such as 68719476736, '64Gi', '64GiB' or '500 MB', and at least "
    "1 byte and at most 2^100"
)
# More than any machine has. Larger numbers would overflow when they are formatted.
_MAX_SIZE = 1 << 100
# In characters. Longer values would hide the message around them.
_MAX_BRIEF = 100


def brief(value: object) -> str:
    """`value` as it appears in messages: on one line, printable, and shortened."""
    try:
        text = repr(value).replace("\n", " ")
    except Exception:  # Python refuses integers of more than 4300 digits
        return f"a value of type {type(value).__name__} that is too long to be shown"
    return text if len(text) <= _MAX_BRIEF else f"{text[:_MAX_BRIEF]}... ({len(text)} characters)"


def parse_size(key: str, value: object) -> int:
    """The number of bytes that `value` means: a whole number, or text with or without a unit.

    Units are B, k to T and KB to TB (powers of 1000), and Ki to Ti and KiB to TiB (powers of 1024), in any case except
    for "m". Text may have an exponent, because Helm turns large numbers into "3.4359738368e+10". Raises ValueError,
    naming `key`.
    """
    size: int | Fraction | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, float) and value.is_integer():
        size = int(value)
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number, unit = match.groups()
        # In Kubernetes "m" is a thousandth. Nobody wants a thousandth of a byte, so it is refused and not read as "M".
        scale = None if unit == "m" else _UNITS.get(unit.lower())
        if scale is not None:
            size = Fraction(number) * scale
    if size is None or not 1 <= size <= _MAX_SIZE:
        raise ValueError(f"{key} must be {_SIZE_HELP}, not {brief(value)}")
    return int(size)


def format_size(size: int) -> str:
    """`size` bytes as people read it, such as "1.5 GiB"."""
    if size > _MAX_SIZE:
        return "more than 2^100 bytes"
    for unit, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def format_time(seconds: float) -> str:
    """`seconds` as people read it, such as "1.5 h"."""
    for unit, scale in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def nearest_key(key: object, known: Sequence[str]) -> str | None:
    """The known key of which `key` is probably a misspelling; None if there is none."""
    if not isinstance(key, str):
        return None
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()  # bytesToUse, BYTES_TO_USE
    return next(iter(difflib.get_close_matches(words, known, n=1, cutoff=0.7)), None)


def enumerate_some(items: Sequence[str], count: int = 3) -> str:
    """The first items, and how many more there are."""
    more = len(items) - count
    return ", ".join(items[:count]) + (f", and {more} more" if more > 0 else "")
