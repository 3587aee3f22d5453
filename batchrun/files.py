"""The files of an input, a class for each format: what columns they have, and their rows as Arrow record batches.

Whatever is wrong with a file is an `InputError` that names the file and the line or row.
"""

from __future__ import annotations

import csv
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.json as json_format
import pyarrow.parquet as pq

from batchrun.columns import build
from batchrun.errors import InputError, StorageError
from batchrun.jsonl import Record, infer, records
from batchrun.remote import AnyPath, RemotePath, for_arrow
from batchrun.textfile import MOST_CHARACTERS, Place, has_places, lines_of, open_text

_BATCH_ROWS = 1024
_PROBED_ROWS = 8
_BATCH_BYTES = 4 * 1024 * 1024
_BUFFER_BYTES, _REMOTE_BUFFER_BYTES = 256 * 1024, 4 * 1024 * 1024
"""Of each column, read at a time: a store is asked for each."""
_PLACE_ROWS = 8192
"""Rows between the places that are noted in a text file, so that a row is found again without reading from the top."""


class InputFile(ABC):
    """One file, readable any number of times.

    Attributes:
        rows: how many it has; None until it was read to its end.
        places: where some of its rows begin, in order; empty for formats that find them by themselves.
        too_exact: columns with a whole number that a float has no room for, and where it stands.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.rows: int | None = None
        self.places: list[Place] = []
        self.too_exact: Mapping[str, str] = {}
        self._schema: pa.Schema | None = None

    @property
    def schema(self) -> pa.Schema:
        """Its columns, as they stand in the file."""
        if self._schema is None:
            with reading(self.path):
                self._schema = self._read_schema()
        return self._schema

    def know(self, schema: pa.Schema, rows: int | None, places: list[Place]) -> None:
        """Take what was learnt of this very file before."""
        self._schema, self.rows, self.places = schema, rows, places

    def read(self, schema: pa.Schema, skipped: int) -> Iterator[pa.RecordBatch]:
        """Its rows from the row `skipped` on.

        Args:
            schema: the columns that are wanted; where the format itself has no types, they come in these.
        """
        with reading(self.path):
            yield from self._read(schema, skipped)

    @abstractmethod
    def _read_schema(self) -> pa.Schema: ...

    @abstractmethod
    def _read(self, schema: pa.Schema, skipped: int) -> Iterator[pa.RecordBatch]: ...


class ParquetInput(InputFile):
    """Rows are found by row groups."""

    def _read_schema(self) -> pa.Schema:
        with for_arrow(self.path) as file, pq.ParquetFile(file) as parquet:
            return parquet.schema_arrow.with_metadata(parquet.metadata.metadata)

    def _read(self, schema: pa.Schema, skipped: int) -> Iterator[pa.RecordBatch]:
        names = schema.names
        # A buffered stream per column: a row group of any size is never held whole.
        buffered = _BUFFER_BYTES if isinstance(self.path, Path) else _REMOTE_BUFFER_BYTES
        with for_arrow(self.path) as file, pq.ParquetFile(file, buffer_size=buffered) as parquet:
            for group in range(parquet.num_row_groups):
                in_group = parquet.metadata.row_group(group).num_rows
                if in_group <= skipped:
                    skipped -= in_group
                    continue
                rows = _batch_rows(parquet, group, names)
                for batch in parquet.iter_batches(rows, row_groups=[group], columns=names, use_threads=False):
                    wanted = batch.slice(skipped)
                    skipped = max(0, skipped - batch.num_rows)
                    if wanted.num_rows:
                        yield wanted


class _TextInput(InputFile):
    """Rows are found from the nearest place before them."""

    _newline = ""

    def __init__(self, path: AnyPath, encoding: str, *, is_gzip: bool) -> None:
        super().__init__(path)
        self._encoding = encoding
        self._is_gzip = is_gzip
        self._has_places = not is_gzip and has_places(encoding)

    def _lines(self, fp: IO[str], place: Place) -> Iterator[str]:
        return lines_of(fp, self.path, place, self._encoding)

    def _open(self, offset: int = 0) -> AbstractContextManager[IO[str]]:
        return open_text(self.path, self._encoding, self._newline, offset, is_gzip=self._is_gzip)

    def _place_before(self, row: int) -> Place:
        """Where to begin to read for a row: a place noted before it, or the top of the file."""
        is_early = not self.places or row < _PLACE_ROWS
        return replace(Place() if is_early else self.places[min(len(self.places), row // _PLACE_ROWS) - 1])

    def _pass_row(self, place: Place) -> None:
        """Count a row that was just read."""
        place.row += 1
        is_next = place.row % _PLACE_ROWS == 0 and len(self.places) == place.row // _PLACE_ROWS - 1
        if is_next and self._has_places:
            self.places.append(replace(place))


class CsvInput(_TextInput):
    """All columns are text, and an empty cell is the empty string."""

    def __init__(self, path: AnyPath, encoding: str, *, is_gzip: bool, delimiter: str) -> None:
        super().__init__(path, encoding, is_gzip=is_gzip)
        self._delimiter = delimiter

    def _read_schema(self) -> pa.Schema:
        with self._open() as fp:
            header = next(self._cells(self._lines(fp, Place())), None)
        if header == []:
            raise InputError(f"{self.path}: line 1 is blank: it should be the header")
        if header is None:
            raise InputError(f"{self.path}: is empty: it has no header line")
        refuse_duplicates(header, f"{self.path}: line 1")
        return pa.schema([(name, pa.string()) for name in header])

    def _read(self, schema: pa.Schema, skipped: int) -> Iterator[pa.RecordBatch]:
        header = self.schema.names
        wanted = [header.index(name) for name in schema.names]
        place = self._place_before(skipped)
        with self._open(place.offset) as fp:
            first_line = place.line
            reader = self._cells(self._lines(fp, place))
            if not first_line:
                next(reader)
            held: list[list[str]] = []
            size = 0
            for cells in self._checked(reader, first_line):
                if not cells:
                    continue  # a blank line is no row
                if len(cells) != len(header):
                    raise InputError(
                        f"{self.path}: line {first_line + reader.line_num}: {len(cells)} cells where the header has "
                        f"{len(header)}: a comma or a quote too many or too few?"
                    )
                self._pass_row(place)
                if place.row <= skipped:
                    continue
                held.append(cells)
                size += sum(map(len, cells))
                if len(held) >= _BATCH_ROWS or size >= _BATCH_BYTES:
                    yield _text_batch(held, wanted, schema.names)
                    held, size = [], 0
            if held:
                yield _text_batch(held, wanted, schema.names)

    def _cells(self, lines: Iterator[str]) -> Any:
        # The module's own limit of 128 kB a cell is below what a long prompt takes.
        csv.field_size_limit(MOST_CHARACTERS)
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def _checked(self, reader: Any, first_line: int) -> Iterator[list[str]]:
        try:
            yield from reader
        except csv.Error as exc:
            raise InputError(f"{self.path}: line {first_line + reader.line_num}: no valid CSV: {exc}") from exc


class JsonlInput(_TextInput):
    """Types are those that hold all values of a column."""

    _newline = "\n"

    def _read_schema(self) -> pa.Schema:
        inferred = infer(self._records(Place()), self.path)
        self.too_exact = {
            name: f"{self.path}: line {number}: column {name!r}: {value}"
            for name, (number, value) in inferred.too_exact.items()
        }
        return inferred.schema

    def _read(self, schema: pa.Schema, skipped: int) -> Iterator[pa.RecordBatch]:
        lines: list[bytes] = []
        size = 0
        place = self._place_before(skipped)
        for record in self._records(place):
            self._pass_row(place)
            if place.row <= skipped:
                continue
            lines.append(record.text.encode())
            size += len(lines[-1])
            if len(lines) >= _BATCH_ROWS or size >= _BATCH_BYTES:
                yield _json_batch(lines, schema)
                lines, size = [], 0
        if lines:
            yield _json_batch(lines, schema)

    def _records(self, place: Place) -> Iterator[Record]:
        first_line = place.line
        with self._open(place.offset) as fp:
            yield from records(self._lines(fp, place), self.path, first_line)


@contextmanager
def reading(path: AnyPath) -> Iterator[None]:
    """Errors of files and formats as ours."""
    try:
        yield
    except csv.Error as exc:
        raise InputError(f"{path}: line 1: no valid CSV: {exc}") from exc
    except (OSError, EOFError, zlib.error, UnicodeError, pa.ArrowException) as exc:
        if isinstance(path, RemotePath) and isinstance(exc, OSError) and not isinstance(exc, FileNotFoundError):
            # The store does not do as it should, which says nothing of the input.
            raise StorageError(f"{path}: cannot be read: {exc}") from exc
        raise InputError(f"{path}: cannot be read: {exc}") from exc


def refuse_duplicates(names: Sequence[str], where: str) -> None:
    """Column names must differ.

    Raises:
        InputError: one stands twice.
    """
    doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if doubled:
        raise InputError(f"{where}: the column name {doubled[0]!r} stands twice")


def _batch_rows(parquet: pq.ParquetFile, group: int, names: list[str]) -> int:
    """Rows a batch, fewer where rows are big.

    What the file says of its size is packed, and a text that stands in many rows may be there once: some rows are read.
    """
    known = parquet.metadata.row_group(group)
    size = known.total_byte_size / max(1, known.num_rows)
    for batch in parquet.iter_batches(_PROBED_ROWS, row_groups=[group], columns=names, use_threads=False):
        size = max(size, batch.nbytes / max(1, batch.num_rows))
        break
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(1.0, size))))


def _text_batch(rows: list[list[str]], wanted: list[int], names: Sequence[str]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True))
    return pa.RecordBatch.from_arrays([build(columns[index], pa.string()) for index in wanted], names=list(names))


def _json_batch(lines: list[bytes], schema: pa.Schema) -> pa.RecordBatch:
    parsing = json_format.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    size = sum(map(len, lines)) + len(lines) + 1
    options = json_format.ReadOptions(use_threads=False, block_size=size)
    table = json_format.read_json(BytesIO(b"\n".join(lines)), options, parsing).select(schema.names)
    return table.combine_chunks().to_batches()[0].cast(schema)
