"""Input files → Arrow record batches, streamed, types kept.

CSV and TSV columns are text and an empty cell is the empty string; Parquet and JSONL keep their types.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
import stat
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchrun.casts import TYPES, cast
from batchrun.errors import InputError, listed
from batchrun.files import CsvInput, InputFile, JsonlInput, ParquetInput, reading, refuse_duplicates
from batchrun.job import Job
from batchrun.remote import AnyPath, RemotePath
from batchrun.settings import ColumnSetting, InputSetting
from batchrun.textfile import Place
from batchrun.written import MANIFEST_KEY, PART_KEY

_OWN = (MANIFEST_KEY.encode(), PART_KEY.encode())
_LOOK_SECONDS, _LOOK_SHARE = 5.0, 20
"""Between two looks at a store: so long at least, and so many times as long as a look takes."""

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
        self._job_path = job.place_of(job.input.path)
        self._files = _find(job)
        self._next_look = time.monotonic() + _LOOK_SECONDS
        # Before anything is read: what was read of them later may be of other files.
        self.seen = self.fingerprint()
        self._read_as = [self._setting.encoding, self._setting.format]
        with suppress(KeyError, TypeError, ValueError, pa.ArrowException):  # without it, all is learnt anew
            self._know(known or {})
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
    def is_remote(self) -> bool:
        """True if the files are in a store."""
        return isinstance(self._job_path, RemotePath)

    @property
    def file_names(self) -> str:
        """The files, for a message."""
        first = str(self._files[0].path)
        return first if len(self._files) == 1 else f"{first} and {len(self._files) - 1} more"

    @property
    def paths(self) -> set[AnyPath]:
        """The files, with links resolved."""
        return {file.path.resolve() if isinstance(file.path, Path) else file.path for file in self._files}

    def would_read(self, path: AnyPath) -> bool:
        """True if the input is a pattern that a file at `path` would match."""
        read = self._job_path
        if isinstance(read, RemotePath):
            return isinstance(path, RemotePath) and read.is_pattern and path.matches(read)
        if isinstance(path, RemotePath):
            return False
        pattern = str(read)
        if not glob.has_magic(pattern):
            return False
        if "**" in pattern:
            return fnmatch.fnmatch(str(path), pattern)
        parts, wanted = path.parts, read.parts
        return len(parts) == len(wanted) and all(map(fnmatch.fnmatch, parts, wanted))

    def fingerprint(self) -> list[list[Any]]:
        """Path, size and modification time of each file: unchanged, they are not read again to be checked."""
        found: list[list[Any]] = []
        for file in self._files:
            with reading(file.path):
                status = file.path.stat()
            name = str(file.path)
            if isinstance(file.path, Path) and file.path.is_relative_to(self._folder):
                name = str(file.path.relative_to(self._folder))
            found.append([name, status.st_size, status.st_mtime_ns])
        return found

    def _know(self, known: Mapping[str, Any]) -> None:
        if (known["files"], known["reading"]) != (self.seen, self._read_as):
            return
        schemas = [pa.ipc.read_schema(pa.py_buffer(b64decode(schema))) for schema in known["schemas"]]
        places = [[Place(*map(int, place)) for place in places] for places in known["places"]]
        rows = [int(rows) if rows is not None else None for rows in known["file_rows"]]
        for file, *known_of_it in zip(self._files, schemas, rows, places, strict=True):
            file.know(*known_of_it)

    def knowledge(self) -> dict[str, Any]:
        """What was learnt by reading the files to their end, for JSON; it spares the next reader of them the same."""
        return {
            "reading": self._read_as,
            "schemas": [b64encode(file.schema.serialize().to_pybytes()).decode() for file in self._files],
            "file_rows": [file.rows for file in self._files],
            "places": [[[place.row, place.offset, place.line] for place in file.places] for file in self._files],
        }

    def refuse_change(self) -> None:
        """Whoever reads on in other files than those that were placed asks the wrong rows.

        A store, where a look is a request for each file, is looked at now and again.

        Raises:
            InputError: the files are not those that were first looked at.
        """
        began = time.monotonic()
        if self.is_remote and began < self._next_look:
            return
        found = self.fingerprint()
        ended = time.monotonic()
        self._next_look = ended + max(_LOOK_SECONDS, _LOOK_SHARE * (ended - began))
        if found != self.seen:
            raise InputError(f"{self.file_names} has changed while the run went on")

    def batches(self, only: Sequence[str] | None = None, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Read the rows `start` ≤ index < `stop`, or `only` some columns of them.

        Of files that were read to their end before, what lies before `start` is passed over.
        """
        plan = [entry for entry in self._plan if only is None or entry[1].name in only] or self._plan[:1]
        stop = min((end for end in (stop, self._setting.limit) if end is not None), default=None)
        first = 0
        raw = pa.schema([self._raw_schema.field(name) for name, _ in plan])
        for file in self._files:
            known = file.rows
            if known is not None and first + known <= start:
                first += known
                continue
            in_file = max(0, start - first) if known is not None else 0
            for rows in file.read(raw, in_file):
                at, end = first + in_file, first + in_file + rows.num_rows
                wanted = rows.slice(
                    max(0, start - at), max(0, (end if stop is None else min(stop, end)) - max(at, start))
                )
                if wanted.num_rows:
                    yield Batch(max(at, start), self._shape(wanted, plan, file.path, max(at, start) - first))
                in_file += rows.num_rows
                if stop is not None and end >= stop:
                    return
            file.rows = in_file
            first += in_file

    # --- schema ---------------------------------------------------------------------------------------------

    def _read_schema(self) -> tuple[pa.Schema, bool]:
        first_file, schema = self._files[0], self._files[0].schema
        is_own = any(key in (schema.metadata or {}) for key in _OWN)
        refuse_duplicates(schema.names, str(first_file.path))
        for file in self._files[1:]:
            other = file.schema
            if other.names != schema.names:
                raise InputError(
                    f"{file.path}: its columns ({listed(other.names)}) differ from those of "
                    f"{first_file.path} ({listed(schema.names)})"
                )
            try:
                schema = pa.unify_schemas([schema, other], promote_options="permissive")
            except (pa.ArrowInvalid, pa.ArrowTypeError) as exc:
                raise InputError(f"{file.path}: its column types differ from those of the other files: {exc}") from exc
        too_exact = {name: where for file in reversed(self._files) for name, where in file.too_exact.items()}
        for name, where in too_exact.items():
            if pa.types.is_floating(schema.field(name).type):
                raise InputError(f"{where} would change in a column that also has fractions: write it as text")
        return pa.schema([_wide(field) for field in schema]), is_own

    def _shape(
        self, rows: pa.RecordBatch, plan: Sequence[tuple[str, pa.Field]], path: AnyPath, first: int
    ) -> pa.RecordBatch:
        """Put columns into the schema's names and types; a value that does not fit is named with its row."""
        arrays = []
        for name, field in plan:
            column = rows.column(rows.schema.get_field_index(name))
            if column.type != field.type:
                column = cast(column, field, name, f"{path}: row", first)
            arrays.append(column)
        return pa.RecordBatch.from_arrays(arrays, schema=pa.schema([field for _, field in plan]))


def _find(job: Job) -> list[InputFile]:
    path = job.place_of(job.input.path)
    with reading(path):
        paths = _stored(path) if isinstance(path, RemotePath) else _on_this_machine(job, path)
        return [_opened(found, job.input) for found in paths]


def _stored(path: RemotePath) -> list[RemotePath]:
    if path.is_pattern and not path.is_file():
        paths = path.found()
        if not paths:
            raise InputError(f"input: there is no file {path}")
        return paths
    if not path.is_file():
        if path.is_dir():
            raise InputError(f"input: {path} is a folder: name its files, such as {path / '*.parquet'}")
        raise InputError(f"input: there is no file {path}")
    return [path]


def _on_this_machine(job: Job, path: Path) -> list[Path]:
    if job.input.path == "-":
        raise InputError("input: standard input cannot be the input: it is read more than once; write it to a file")
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
    for found in paths:
        if found.is_dir():
            raise InputError(f"input: {found} is a folder: name its files, such as {found}/*.parquet")
        if not stat.S_ISREG(found.stat().st_mode):
            raise InputError(f"input: {found} is no regular file: the input is read more than once; write it to a file")
    return paths


def _opened(path: AnyPath, setting: InputSetting) -> InputFile:
    is_gzip = path.suffix == ".gz"
    suffix = Path(path.stem).suffix if is_gzip else path.suffix
    form = setting.format or _BY_SUFFIX.get(suffix.lower())
    if form is None:
        raise InputError(
            f"input: {path}: {suffix or 'a name without an ending'} does not say what it is: "
            "set input: {format: csv | tsv | parquet | jsonl}"
        )
    if form == "parquet" and is_gzip:
        raise InputError(f"input: {path}: a gzipped Parquet file cannot be read in place: unpack it")
    match form:
        case "parquet":
            return ParquetInput(path)
        case "jsonl":
            return JsonlInput(path, setting.encoding, is_gzip=is_gzip)
        case _:
            return CsvInput(path, setting.encoding, is_gzip=is_gzip, delimiter="\t" if form == "tsv" else ",")


def _plan(setting: InputSetting, schema: pa.Schema) -> list[tuple[str, pa.Field]]:
    """Which raw column becomes which field."""
    chosen = setting.columns
    names = list(schema.names)
    for name in chosen or ():
        if name not in names:
            raise InputError(f"input.columns: {_no_column(name, names)}")
    if isinstance(chosen, list):
        refuse_duplicates(chosen, "input.columns")
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
    refuse_duplicates([field.name for _, field in plan], "input.columns")
    return plan


def _no_column(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    mend = f"did you mean {near[0]!r}?" if near else f"the columns are {listed(names)}"
    return f"there is no column {name!r}: {mend}"


def _wide(field: pa.Field) -> pa.Field:
    """A dictionary column whose indices have room for the values of all its batches together."""
    kind = field.type
    if pa.types.is_dictionary(kind):
        field = field.with_type(pa.dictionary(pa.int32(), kind.value_type, kind.ordered))
    return field
