"""Arrow's values → Python's, or an error that names the one that Python has no word for, such as a year beyond 9999."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from batchrun.errors import InputError


def plain_column(column: pa.Array, name: str, start: int) -> list[Any]:
    """The values of a column.

    Args:
        start: the row of the first value, counted from 0.

    Raises:
        InputError: one of them cannot be told.
    """
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as exc:
        raise _unusable(column, name, start) from exc
    return values


def plain_rows(rows: pa.RecordBatch, start: int) -> list[dict[str, Any]]:
    """The rows of a batch, each by its columns' names.

    Raises:
        InputError: a value cannot be told.
    """
    try:
        values: list[dict[str, Any]] = rows.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        for name, column in zip(rows.schema.names, rows.columns, strict=True):
            plain_column(column, name, start)
        raise
    return values or [{} for _ in range(rows.num_rows)]


def _unusable(column: pa.Array, name: str, start: int) -> InputError:
    for index in range(len(column)):
        try:
            column[index].as_py()
        except Exception as exc:  # noqa: BLE001 - whatever Arrow raises, this is the value
            return InputError(
                f"row {start + index + 1}: the column {name!r} ({column.type}) cannot be used: {exc}: cast it by "
                f"input: {{columns: {{{name}: string}}}}, or leave it out"
            )
    return InputError(f"the column {name!r} ({column.type}) cannot be used in the rows from {start + 1} on")
