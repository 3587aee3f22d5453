"""Python values → Arrow arrays of a known type.

`pyarrow.array` does the same for more types, but it imports pandas at its first call, which takes longer than a small
job does.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from itertools import accumulate
from typing import Any

import pyarrow as pa

_EPOCH_DAY = date(1970, 1, 1).toordinal()


def build(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """An array of text, int32, int64, float64, bool, date32, timestamp[us] or list<string>; None is null.

    A moment may also be a number of microseconds since 1970.

    Raises:
        TypeError, OverflowError, ValueError: a value that is not of this type.

    >>> build(["a", None, "ü"], pa.string()).to_pylist()
    ['a', None, 'ü']
    """
    nulls = values.count(None)
    if nulls == len(values):
        return pa.nulls(nulls, kind)
    validity = None if not nulls else pa.py_buffer(_bits([value is not None for value in values]))
    if pa.types.is_string(kind):
        texts: Sequence[str] = [value if value is not None else "" for value in values] if nulls else values
        if all(map(str.isascii, texts)):  # a character is a byte
            offsets, data = _offsets(texts), "".join(texts).encode()
        else:
            encoded = [text.encode("utf-8", "replace") for text in texts]
            offsets, data = _offsets(encoded), b"".join(encoded)
        return pa.Array.from_buffers(
            kind, len(values), [validity, pa.py_buffer(offsets), pa.py_buffer(data)], null_count=nulls
        )
    if pa.types.is_list(kind):
        lists = [value if value is not None else [] for value in values]
        items = build([item for value in lists for item in value], kind.value_type)
        offsets = pa.py_buffer(_offsets(lists))
        return pa.Array.from_buffers(kind, len(values), [validity, offsets], null_count=nulls, children=[items])
    if pa.types.is_boolean(kind):
        return pa.Array.from_buffers(
            kind, len(values), [validity, pa.py_buffer(_bits([bool(value) for value in values]))], null_count=nulls
        )
    code, number = _NUMBERS[kind]
    numbers = values if number is None else [number(value) if value is not None else None for value in values]
    plain = array(code, [value if value is not None else 0 for value in numbers] if nulls else numbers)
    return pa.Array.from_buffers(kind, len(values), [validity, pa.py_buffer(plain)], null_count=nulls)


def _microseconds(moment: datetime | int) -> int:
    if isinstance(moment, int):
        return moment
    # Not timestamp(): a float of seconds has no room for all microseconds.
    days = moment.toordinal() - _EPOCH_DAY
    seconds = days * 86_400 + moment.hour * 3600 + moment.minute * 60 + moment.second
    offset = moment.utcoffset()
    shift = 0 if offset is None else (offset.days * 86_400 + offset.seconds) * 1_000_000 + offset.microseconds
    return seconds * 1_000_000 + moment.microsecond - shift


_NUMBERS: Mapping[pa.DataType, tuple[str, Callable[[Any], Any] | None]] = {
    pa.int32(): ("i", None),
    pa.int64(): ("q", None),
    pa.float64(): ("d", None),
    pa.date32(): ("i", lambda day: day.toordinal() - _EPOCH_DAY),
    pa.timestamp("us", tz="UTC"): ("q", _microseconds),
}


def _offsets(items: Sequence[Any]) -> array[int]:
    return array("i", accumulate(map(len, items), initial=0))


def _bits(flags: Sequence[bool]) -> bytes:
    """Least significant bit first, as Arrow packs them."""
    text = "".join("1" if flag else "0" for flag in reversed(flags))
    return int(text or "0", 2).to_bytes((len(flags) + 7) // 8, "little")
