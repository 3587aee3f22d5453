"""Columns of an input as other types; a value that does not fit is named with its row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa

from batchrun.columns import build
from batchrun.errors import InputError

TYPES: Mapping[str, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}


def cast(column: pa.Array, field: pa.Field, name: str, where: str, first: int) -> pa.Array:
    """A column as a field wants it.

    Args:
        name: of the column in its file.
        where: what its rows are called in a message, such as `data.csv: row`.
        first: rows of the file before these.

    Raises:
        InputError: a value that does not fit.
    """
    if pa.types.is_string(column.type) and field.type in _FROM_TEXT:
        return _cast_text(column, field.type, name, where, first)
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    for index in range(len(column)):
        try:
            column.slice(index, 1).cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise InputError(
                f"{where} {first + index + 1}: column {name!r}: {str(column[index].as_py())[:60]!r} is no {field.type}"
            ) from None
    raise InputError(f"{where}s from {first + 1}: column {name!r} ({column.type}) cannot become {field.type}")


def _cast_text(column: pa.Array, kind: pa.DataType, name: str, where: str, first: int) -> pa.Array:
    """Text as another type; an empty cell is null."""
    convert = _FROM_TEXT[kind]
    values = []
    for index, text in enumerate(column.to_pylist()):
        try:
            values.append(convert(text.strip()) if text and text.strip() else None)
        except (ValueError, KeyError):
            raise InputError(f"{where} {first + index + 1}: column {name!r}: {text[:60]!r} is no {kind}") from None
    return build(values, kind)


def _int64(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError
    return value


def _timestamp(text: str) -> datetime:
    """A time without an offset is UTC."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


_FROM_TEXT: Mapping[pa.DataType, Callable[[str], Any]] = {
    pa.int64(): _int64,
    pa.float64(): float,
    pa.bool_(): lambda text: {"true": True, "false": False, "1": True, "0": False}[text.lower()],
    pa.date32(): date.fromisoformat,
    pa.timestamp("us", tz="UTC"): _timestamp,
}
