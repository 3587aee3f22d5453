"""Record batches → a CSV, JSONL or Parquet file of some columns, that appears whole or not at all."""

from __future__ import annotations

import csv
import json
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from io import TextIOWrapper
from math import isfinite
from typing import IO, Any
from uuid import UUID

import pyarrow as pa

from batchrun.errors import JobError, StorageError, listed
from batchrun.folders import appearing
from batchrun.plain import plain_column
from batchrun.remote import AnyPath
from batchrun.sink import Destination, write_parquet, write_parts

ENDINGS = (".csv", ".jsonl", ".parquet")


def check_export(path: AnyPath, columns: Sequence[str] | None, schema: pa.Schema) -> list[str]:
    """The columns to write.

    Raises:
        JobError: the file's ending tells no format, or there is no such column.
    """
    if path.suffix.lower() not in ENDINGS:
        raise JobError(f"--to {path}: should end in {', '.join(ENDINGS)}")
    for name in columns or ():
        if name not in schema.names:
            raise JobError(f"--columns: there is no column {name!r}: the columns are {listed(schema.names)}")
    if columns and (twice := [name for name, number in Counter(columns).items() if number > 1]):
        raise JobError(f"--columns: {twice[0]!r} stands there twice")
    return list(columns) if columns else list(schema.names)


def write_table(
    destination: Destination, schema: pa.Schema, batches: Iterable[pa.RecordBatch], manifest: Callable[[], str]
) -> None:
    """Write batches of a schema.

    CSV and JSONL hold what has no form in them (bytes, moments, lists in CSV) as text, JSONL NaN and infinity as null.

    Raises:
        StorageError: it cannot be written; what stood there before is untouched.
    """
    if destination.part_bytes is not None:
        write_parts(destination, schema, batches, manifest)
        return
    path = destination.path
    match path.suffix.lower():
        case ".parquet":
            write_parquet(path, schema, batches, manifest)
        case ".csv":
            _write_text(path, batches, lambda fp: _CsvWriter(fp, schema.names))
        case _:
            _write_text(path, batches, lambda fp: _JsonlWriter(fp, schema.names))


def _write_text(path: AnyPath, batches: Iterable[pa.RecordBatch], writer_of: Callable[[IO[str]], Any]) -> None:
    try:
        with appearing(path) as raw:
            fp = TextIOWrapper(raw, encoding="utf-8", newline="", write_through=True)
            writer = writer_of(fp)
            for batch in batches:
                writer.write(batch)
            fp.detach()
    except OSError as exc:
        raise StorageError(f"{path} cannot be written: {exc.strerror or exc}") from exc


class UnixLines:
    """Ends lines with \\n. Of csv's own line ends only \\r\\n has it put texts with a lone \\r into quotes."""

    def __init__(self, fp: IO[str]) -> None:
        self._fp = fp

    def write(self, line: str) -> None:
        """The next line."""
        self._fp.write(f"{line[:-2]}\n")


class _CsvWriter:
    def __init__(self, fp: IO[str], names: Sequence[str]) -> None:
        self._writer = csv.writer(UnixLines(fp), lineterminator="\r\n")
        self._writer.writerow(names)

    def write(self, batch: pa.RecordBatch) -> None:
        """The next rows."""
        columns = [[_cell(value) for value in values] for values in _values(batch)]
        self._writer.writerows(zip(*columns, strict=True))


class _JsonlWriter:
    def __init__(self, fp: IO[str], names: Sequence[str]) -> None:
        self._fp = fp
        self._names = names

    def write(self, batch: pa.RecordBatch) -> None:
        """The next rows."""
        for values in zip(*_values(batch), strict=True):
            row = dict(zip(self._names, values, strict=True))
            try:
                line = json.dumps(row, ensure_ascii=False, default=_plain, allow_nan=False)
            except ValueError:
                line = json.dumps(_finite(row), ensure_ascii=False, default=_plain)
            self._fp.write(line)
            self._fp.write("\n")


def _values(batch: pa.RecordBatch) -> list[list[Any]]:
    pairs = zip(batch.columns, batch.schema.names, strict=True)
    return [plain_column(column, name, 0) for column, name in pairs]


def _finite(value: Any) -> Any:
    """Without the numbers that JSON has no word for: they become null."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | Decimal):
        return repr(value) if isinstance(value, float) else value
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if isinstance(value, Decimal | UUID | timedelta):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no form in text")
