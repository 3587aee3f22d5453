"""Input files → Arrow record batches, streamed, types kept.

CSV and TSV columns are text and an empty cell is the empty string; Parquet and JSONL keep their types. Whatever is
wrong with a file is an `InputError` that names the file and the line or row.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
import glob
import os
import stat
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.json as json_format
import pyarrow.parquet as pq

from batchrun.casts import TYPES, cast
from batchrun.columns import build
from batchrun.errors import InputError, listed
from batchrun.job import ColumnSetting, InputSetting, Job
from batchrun.jsonl import Record, infer, records
from batchrun.textfile import MOST_CHARACTERS, Place, has_places, lines_of, open_text

_BATCH_ROWS = 1024
_PROBED_ROWS = 8
_BATCH_BYTES = 4 * 1024 * 1024
_PLACE_ROWS = 8192
"""Rows between the places that are noted in a text file, so that a row is found again without reading from the top."""
_MANIFEST = b"batchrun"

_BY_SUFFIX = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


@dataclass(frozen=True)
class Batch:
    """Some consecutive rows; `start` is the index of the first, counted from 0 over all files."""

    start: int
    rows: pa.RecordBatch


@dataclass(frozen=True)
class _File:
    path: Path
    format: str
    is_gzip: bool


class Source:
    """The rows of a job's input, readable any number of times.

    Args:
        known: what `knowledge` gave when these files were read to their end; used if they have not changed since.

    Attributes:
        schema: the Arrow schema after `input.columns`.
        seen: the fingerprint of the files when they were first looked at.
        is_own_output: the input was written by batchrun.
    """

    def __init__(self, job: Job, known: Mapping[str, Any] | None = None) -> None:
        self._setting: InputSetting = job.input
        self._folder = job.path.parent
        self._job_path = job.resolve(job.input.path)
        self._files = _find(job)
        # Before anything is read: what was read of them later may be of other files.
        self.seen = self.fingerprint()
        self._read_as = [self._setting.encoding, *(file.format for file in self._files)]
        self._schemas: list[pa.Schema] = []
        self._rows: list[int | None] = [None] * len(self._files)
        """Of each file, once it was read to its end."""
        self._places: list[list[Place]] = [[] for _ in self._files]
        with suppress(KeyError, TypeError, ValueError, pa.ArrowException):  # without it, all is learnt anew
            self._know(known or {})
        self._too_exact: dict[str, str] = {}
        """Columns with a whole number that a float has no room for, and where it stands."""
        self._raw_schema, self.is_own_output = self._read_schema()
        self._plan = _plan(self._setting, self._raw_schema)
        if not self._plan:
            raise InputError(f"{self._files[0].path}: has no columns")
        self.schema = pa.schema([field for _, field in self._plan])
        if self._setting.id is not None and self._setting.id not in self.schema.names:
            raise InputError(f"input.id: {_no_column(self._setting.id, self.schema.names)}")

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self.schema.names)

    @property
    def file_names(self) -> str:
        """The files, for a message."""
        first = str(self._files[0].path)
        return first if len(self._files) == 1 else f"{first} and {len(self._files) - 1} more"

    @property
    def paths(self) -> set[Path]:
        """The files, with links resolved."""
        return {file.path.resolve() for file in self._files}

    def would_read(self, path: Path) -> bool:
        """True if the input is a pattern that a file at `path` would match."""
        pattern = str(self._job_path)
        if not glob.has_magic(pattern):
            return False
        if "**" in pattern:
            return fnmatch.fnmatch(str(path), pattern)
        parts, wanted = path.parts, self._job_path.parts
        return len(parts) == len(wanted) and all(map(fnmatch.fnmatch, parts, wanted))

    def fingerprint(self) -> list[list[Any]]:
        """Path, size and modification time of each file: unchanged, they are not read again to be checked."""
        found: list[list[Any]] = []
        for file in self._files:
            with _reading(file.path):
                status = file.path.stat()
            try:
                name = str(file.path.relative_to(self._folder))
            except ValueError:
                name = str(file.path)
            found.append([name, status.st_size, status.st_mtime_ns])
        return found

    def _know(self, known: Mapping[str, Any]) -> None:
        if (known["files"], known["reading"]) != (self.seen, self._read_as):
            return
        schemas = [pa.ipc.read_schema(pa.py_buffer(b64decode(schema))) for schema in known["schemas"]]
        places = [[Place(*map(int, place)) for place in places] for places in known["places"]]
        rows = [int(rows) if rows is not None else None for rows in known["file_rows"]]
        if len(schemas) == len(places) == len(rows) == len(self._files):
            self._schemas, self._places, self._rows = schemas, places, rows

    def knowledge(self) -> dict[str, Any]:
        """What was learnt by reading the files to their end, for JSON; it spares the next reader of them the same."""
        return {
            "reading": self._read_as,
            "schemas": [b64encode(schema.serialize().to_pybytes()).decode() for schema in self._schemas],
            "file_rows": self._rows,
            "places": [[[place.row, place.offset, place.line] for place in places] for places in self._places],
        }

    def refuse_change(self) -> None:
        """Whoever reads on in other files than those that were placed asks the wrong rows.

        Raises:
            InputError: the files are not those that were first looked at.
        """
        if self.fingerprint() != self.seen:
            raise InputError(f"{self.file_names} has changed while the run went on")

    def batches(self, only: Sequence[str] | None = None, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Read the rows `start` ≤ index < `stop`, or `only` some columns of them.

        Of files that were read to their end before, what lies before `start` is passed over.
        """
        plan = [entry for entry in self._plan if only is None or entry[1].name in only] or self._plan[:1]
        stop = min((end for end in (stop, self._setting.limit) if end is not None), default=None)
        first = 0
        for number, file in enumerate(self._files):
            known = self._rows[number]
            if known is not None and first + known <= start:
                first += known
                continue
            in_file = max(0, start - first) if known is not None else 0
            for rows in self._read(number, [name for name, _ in plan], in_file):
                at, end = first + in_file, first + in_file + rows.num_rows
                wanted = rows.slice(
                    max(0, start - at), max(0, (end if stop is None else min(stop, end)) - max(at, start))
                )
                if wanted.num_rows:
                    yield Batch(max(at, start), self._shape(wanted, plan, file, max(at, start) - first))
                in_file += rows.num_rows
                if stop is not None and end >= stop:
                    return
            self._rows[number] = in_file
            first += in_file

    # --- schema ---------------------------------------------------------------------------------------------

    def _read_schema(self) -> tuple[pa.Schema, bool]:
        self._schemas = self._schemas or [self._schema_of(file) for file in self._files]
        schemas = list(zip(self._files, self._schemas, strict=True))
        first_file, schema = schemas[0]
        is_own = bool(schema.metadata and _MANIFEST in schema.metadata)
        _refuse_duplicates(schema.names, str(first_file.path))
        for file, other in schemas[1:]:
            if other.names != schema.names:
                raise InputError(
                    f"{file.path}: its columns ({listed(other.names)}) differ from those of "
                    f"{first_file.path} ({listed(schema.names)})"
                )
            try:
                schema = pa.unify_schemas([schema, other], promote_options="permissive")
            except (pa.ArrowInvalid, pa.ArrowTypeError) as exc:
                raise InputError(f"{file.path}: its column types differ from those of the other files: {exc}") from exc
        for name, where in self._too_exact.items():
            if pa.types.is_floating(schema.field(name).type):
                raise InputError(f"{where} would change in a column that also has fractions: write it as text")
        return pa.schema([_wide(field) for field in schema]), is_own

    def _schema_of(self, file: _File) -> pa.Schema:
        match file.format:
            case "parquet":
                with _reading(file.path), pq.ParquetFile(file.path) as parquet:
                    return parquet.schema_arrow.with_metadata(parquet.metadata.metadata)
            case "jsonl":
                return self._infer_jsonl(file)
            case _:
                with _reading(file.path), self._text(file) as fp:
                    lines = lines_of(fp, file.path, Place(), self._setting.encoding)
                    header = next(self._csv(file, lines), None)
                if header == []:
                    raise InputError(f"{file.path}: line 1 is blank: it should be the header")
                if header is None:
                    raise InputError(f"{file.path}: is empty: it has no header line")
                _refuse_duplicates(header, f"{file.path}: line 1")
                return pa.schema([(name, pa.string()) for name in header])

    def _infer_jsonl(self, file: _File) -> pa.Schema:
        inferred = infer(self._records(file, Place()), file.path)
        for name, (number, value) in inferred.too_exact.items():
            self._too_exact.setdefault(name, f"{file.path}: line {number}: column {name!r}: {value}")
        return inferred.schema

    # --- reading --------------------------------------------------------------------------------------------

    def _read(self, number: int, names: Sequence[str], skipped: int) -> Iterator[pa.RecordBatch]:
        """The rows of a file from the row `skipped` on."""
        file = self._files[number]
        match file.format:
            case "parquet":
                yield from _read_parquet(file, list(names), skipped)
            case "jsonl":
                yield from self._read_jsonl(
                    number, pa.schema([self._raw_schema.field(name) for name in names]), skipped
                )
            case _:
                yield from self._read_csv(number, names, skipped)

    def _read_csv(self, number: int, names: Sequence[str], skipped: int) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([(name, pa.string()) for name in names])
        file, header = self._files[number], self._schemas[number].names
        wanted = [header.index(name) for name in names]
        place = self._place_before(number, skipped)
        with _reading(file.path), self._text(file, place.offset) as fp:
            first_line = place.line
            lines = lines_of(fp, file.path, place, self._setting.encoding)
            reader = self._csv(file, lines)
            if not first_line:
                next(reader)
            held: list[list[str]] = []
            size = 0
            for cells in _rows_of(reader, file.path, first_line):
                if not cells:
                    continue  # a blank line is no row
                if len(cells) != len(header):
                    raise InputError(
                        f"{file.path}: line {first_line + reader.line_num}: {len(cells)} cells where the header has "
                        f"{len(header)}: a comma or a quote too many or too few?"
                    )
                place.row += 1
                if place.row % _PLACE_ROWS == 0:
                    self._note_place(number, place)
                if place.row <= skipped:
                    continue
                held.append(cells)
                size += sum(map(len, cells))
                if len(held) >= _BATCH_ROWS or size >= _BATCH_BYTES:
                    yield _text_batch(held, wanted, schema)
                    held, size = [], 0
            if held:
                yield _text_batch(held, wanted, schema)

    def _csv(self, file: _File, lines: Iterator[str]) -> Any:
        # The module's own limit of 128 kB a cell is below what a long prompt takes.
        csv.field_size_limit(MOST_CHARACTERS)
        return csv.reader(lines, delimiter="\t" if file.format == "tsv" else ",", strict=True)

    def _read_jsonl(self, number: int, schema: pa.Schema, skipped: int) -> Iterator[pa.RecordBatch]:
        parsing = json_format.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        lines: list[bytes] = []
        size = 0

        def batch() -> pa.RecordBatch:
            reading = json_format.ReadOptions(use_threads=False, block_size=size + len(lines) + 1)
            table = json_format.read_json(BytesIO(b"\n".join(lines)), reading, parsing).select(schema.names)
            return table.combine_chunks().to_batches()[0].cast(schema)

        place = self._place_before(number, skipped)
        with _reading(self._files[number].path):
            for record in self._records(self._files[number], place):
                place.row += 1
                if place.row % _PLACE_ROWS == 0:
                    self._note_place(number, place)
                if place.row <= skipped:
                    continue
                lines.append(record.text.encode())
                size += len(lines[-1])
                if len(lines) >= _BATCH_ROWS or size >= _BATCH_BYTES:
                    yield batch()
                    lines, size = [], 0
            if lines:
                yield batch()

    def _records(self, file: _File, place: Place) -> Iterator[Record]:
        first_line = place.line
        with _reading(file.path), self._text(file, place.offset) as fp:
            lines = lines_of(fp, file.path, place, self._setting.encoding)
            yield from records(lines, file.path, first_line)

    def _place_before(self, number: int, row: int) -> Place:
        """Where to begin to read for a row: a place noted before it, or the top of the file."""
        places = self._places[number]
        found = places[min(len(places), row // _PLACE_ROWS) - 1] if places and row >= _PLACE_ROWS else Place()
        return replace(found)

    def _note_place(self, number: int, place: Place) -> None:
        file, places = self._files[number], self._places[number]
        if not file.is_gzip and has_places(self._setting.encoding) and len(places) == place.row // _PLACE_ROWS - 1:
            places.append(replace(place))

    def _text(self, file: _File, offset: int = 0) -> AbstractContextManager[IO[str]]:
        newline = "\n" if file.format == "jsonl" else ""
        return open_text(file.path, self._setting.encoding, newline, offset, is_gzip=file.is_gzip)

    def _shape(
        self, rows: pa.RecordBatch, plan: Sequence[tuple[str, pa.Field]], file: _File, first: int
    ) -> pa.RecordBatch:
        """Put columns into the schema's names and types; a value that does not fit is named with its row."""
        arrays = []
        for name, field in plan:
            column = rows.column(rows.schema.get_field_index(name))
            if column.type != field.type:
                column = cast(column, field, name, f"{file.path}: row", first)
            arrays.append(column)
        return pa.RecordBatch.from_arrays(arrays, schema=pa.schema([field for _, field in plan]))


def _find(job: Job) -> list[_File]:
    with _reading(job.resolve(job.input.path)):
        return _find_files(job)


def _find_files(job: Job) -> list[_File]:
    setting = job.input
    if setting.path == "-":
        raise InputError("input: standard input cannot be the input: it is read more than once; write it to a file")
    path = job.resolve(setting.path)
    if path.exists():
        paths = [path]
    else:
        found_paths = sorted(Path(found) for found in glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob wants a root
        # Links can lead to the same file by many ways: its rows are asked once.
        by_file: dict[str, Path] = {}
        for found in found_paths:
            by_file.setdefault(os.path.realpath(found), found)
        paths = list(by_file.values())
        if not paths:
            raise InputError(f"input: there is no file {path}")
    files = []
    for found in paths:
        if found.is_dir():
            raise InputError(f"input: {found} is a folder: name its files, such as {found}/*.parquet")
        if not stat.S_ISREG(found.stat().st_mode):
            raise InputError(f"input: {found} is no regular file: the input is read more than once; write it to a file")
        is_gzip = found.suffix == ".gz"
        suffix = Path(found.stem).suffix if is_gzip else found.suffix
        form = setting.format or _BY_SUFFIX.get(suffix.lower())
        if form is None:
            raise InputError(
                f"input: {found}: {suffix or 'a name without an ending'} does not say what it is: "
                "set input: {format: csv | tsv | parquet | jsonl}"
            )
        if form == "parquet" and is_gzip:
            raise InputError(f"input: {found}: a gzipped Parquet file cannot be read in place: unpack it")
        files.append(_File(found, form, is_gzip))
    return files


def _plan(setting: InputSetting, schema: pa.Schema) -> list[tuple[str, pa.Field]]:
    """Which raw column becomes which field."""
    chosen = setting.columns
    names = list(schema.names)
    for name in chosen or ():
        if name not in names:
            raise InputError(f"input.columns: {_no_column(name, names)}")
    if isinstance(chosen, list):
        _refuse_duplicates(chosen, "input.columns")
        return [(name, schema.field(name)) for name in chosen]
    plan = []
    for name in names:
        wanted = chosen.get(name, ColumnSetting()) if chosen is not None else ColumnSetting()
        if wanted is None:
            continue
        wanted = ColumnSetting(type=wanted) if isinstance(wanted, str) else wanted
        field = schema.field(name)
        if wanted.type is not None:
            if wanted.type not in TYPES:
                raise InputError(f"input.columns.{name}: {wanted.type!r} is no type: use {', '.join(TYPES)}")
            field = pa.field(name, TYPES[wanted.type])
        plan.append((name, field.with_name(wanted.name or name)))
    _refuse_duplicates([field.name for _, field in plan], "input.columns")
    return plan


def _no_column(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    mend = f"did you mean {near[0]!r}?" if near else f"the columns are {listed(names)}"
    return f"there is no column {name!r}: {mend}"


def _refuse_duplicates(names: Sequence[str], where: str) -> None:
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


def _rows_of(reader: Any, path: Path, first_line: int) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as exc:
        raise InputError(f"{path}: line {first_line + reader.line_num}: no valid CSV: {exc}") from exc


def _read_parquet(file: _File, names: list[str], skipped: int) -> Iterator[pa.RecordBatch]:
    with _reading(file.path), pq.ParquetFile(file.path, buffer_size=1 << 18) as parquet:
        # A buffered stream per column: a row group of any size is never held whole.
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


def _text_batch(rows: list[list[str]], wanted: list[int], schema: pa.Schema) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True))
    return pa.RecordBatch.from_arrays([build(columns[index], pa.string()) for index in wanted], schema=schema)


def _wide(field: pa.Field) -> pa.Field:
    """A dictionary column whose indices have room for the values of all its batches together."""
    kind = field.type
    if pa.types.is_dictionary(kind):
        field = field.with_type(pa.dictionary(pa.int32(), kind.value_type, kind.ordered))
    return field


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of files and formats as ours."""
    try:
        yield
    except csv.Error as exc:
        raise InputError(f"{path}: line 1: no valid CSV: {exc}") from exc
    except (OSError, EOFError, zlib.error, UnicodeError, pa.ArrowException) as exc:
        raise InputError(f"{path}: cannot be read: {exc}") from exc
