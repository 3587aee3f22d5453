"""Record batches → a Parquet file, or a folder of them, that appears whole or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.documents import parse_json
from batchrun.errors import JobError, StorageError
from batchrun.folders import appearing, hidden, sync_folder, written_beside
from batchrun.money import exact_json
from batchrun.remote import AnyPath, RemotePath
from batchrun.written import (
    MANIFEST_KEY,
    MANIFEST_NAME,
    PART_KEY,
    PART_NAME,
    Written,
    label_of,
    part_files,
    part_name,
    writer_of,
)

_GROUP_ROWS = 65_536
_GROUP_BYTES = 32 * 1024 * 1024
_GROUPS_IN_PART = 8
"""At least, so that parts come near to their size."""


@dataclass(frozen=True)
class Destination:
    """Where an output goes.

    Attributes:
        path: the file, or the folder of parts.
        replaces: the job whose output may stand there before; None for any job.
        part_bytes: the most of a part, and only a single row may be longer; None for a file.
        label: what parts say of themselves: the job and the run.
    """

    path: AnyPath
    replaces: str | None = None
    part_bytes: int | None = None
    label: dict[str, str] = field(default_factory=dict)

    @property
    def manifest(self) -> AnyPath:
        """The file that holds the manifest."""
        return self.path if self.part_bytes is None else self.path / MANIFEST_NAME


def write_parquet(
    path: AnyPath, schema: pa.Schema, batches: Iterable[pa.RecordBatch], manifest: Callable[[], str]
) -> None:
    """Write a file beside its place, bring it to the disk, and rename it into place.

    Args:
        manifest: called after the last batch; its text, JSON, goes into the file's metadata under `batchrun`.

    Raises:
        StorageError: it cannot be written; what stood at `path` before is untouched.
    """
    try:
        with appearing(path) as fp, pq.ParquetWriter(fp, schema, compression="zstd") as writer:
            for group in _groups(batches, schema, _GROUP_BYTES):
                writer.write_table(group, row_group_size=max(1, group.num_rows))
                del group  # before the next one is made
            writer.add_key_value_metadata({MANIFEST_KEY: manifest()})
    except (OSError, pa.ArrowException) as exc:
        raise _unwritten(path, exc) from exc


def write_parts(
    destination: Destination, schema: pa.Schema, batches: Iterable[pa.RecordBatch], manifest: Callable[[], str]
) -> None:
    """Write `part-….parquet` files, hidden until the last is whole, and at the end a manifest that names them.

    What stood there before goes once all is written: the manifest, then the parts, one by one as new ones take their
    places.

    Raises:
        StorageError: it cannot be written. If that happens while the parts are shown, there is no manifest.
    """
    folder, part_bytes = destination.path, destination.part_bytes
    assert part_bytes is not None
    most = min(_GROUP_BYTES, part_bytes // _GROUPS_IN_PART)
    try:
        for beside in _hidden_parts(folder):  # of a process that was killed
            beside.unlink(missing_ok=True)
        try:
            written = list(_write_hidden(folder, schema, _groups(batches, schema, most), part_bytes, destination.label))
            told = {**parse_json(manifest()), "parts": [part_name(number) for number in range(len(written))]}
            # Since the check before the run, another process may have come to the same folder.
            check_owned(destination)
        except BaseException:
            for beside in _hidden_parts(folder):
                beside.unlink(missing_ok=True)
            raise
        if any(label_of(beside) != destination.label for beside in written):
            raise StorageError(f"another job writes to the output {folder}: name another folder")
        destination.manifest.unlink(missing_ok=True)
        if isinstance(folder, Path):
            sync_folder(folder)
        for number, beside in enumerate(written):
            beside.replace(folder / part_name(number))  # type: ignore[arg-type]
        for part in part_files(folder):
            if part.name not in told["parts"]:
                part.unlink(missing_ok=True)
        if isinstance(folder, Path):
            sync_folder(folder)
        with appearing(destination.manifest) as fp:
            fp.write(f"{exact_json(told)}\n".encode())
    except (OSError, pa.ArrowException, JobError) as exc:
        raise _unwritten(folder, exc) from exc


def check_schema(schema: pa.Schema) -> None:
    """Find out before anything is sent whether Parquet can hold the columns.

    Raises:
        JobError: it cannot; such as a struct without fields.
    """
    with suppress(pa.ArrowException), pq.ParquetWriter(pa.BufferOutputStream(), schema):
        return
    for column in schema:
        try:
            with pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([column])):
                pass
        except pa.ArrowException as exc:
            raise JobError(
                f"the column {column.name!r} ({column.type}) cannot be written to Parquet: {exc}: leave it out with "
                f"input: {{columns: {{{column.name}: null}}}}"
            ) from None


def check_writable(destination: Destination) -> None:
    """Find out before anything is sent whether the output can be written.

    Raises:
        StorageError: it cannot.
        JobError: something stands there that would be lost.
    """
    path, file = destination.path, destination.manifest
    try:
        if destination.part_bytes is not None and path.is_file():
            raise StorageError(
                f"the output {path} is a file: it should be a folder of parts; name another, or remove it"
            )
        probe = hidden(file)
        probe.parent.mkdir(parents=True, exist_ok=True)
        for place in (file, probe):
            # A bucket may hold both a file and what looks like a folder of that name.
            if isinstance(place, Path) and place.exists() and not place.is_file():
                what = "a folder" if place.is_dir() else "no file"
                raise StorageError(f"the output {place} is {what}: name another file, or remove it")
        with written_beside(probe):
            pass
        # Not every store can put a file into its place.
        moved = hidden(probe)
        probe.replace(moved)  # type: ignore[arg-type]
        moved.unlink()
    except (OSError, RuntimeError) as exc:  # the latter for links that lead round in a circle
        raise StorageError(f"the output {path} cannot be written: {getattr(exc, 'strerror', None) or exc}") from exc
    check_owned(destination)


def check_owned(destination: Destination) -> None:
    """Refuse to replace what is not the job's.

    Raises:
        StorageError: it cannot be read.
        JobError: another job's output stands there, or something that batchrun has not written.
    """
    path, file = destination.path, destination.manifest
    in_parts = destination.part_bytes is not None
    writers: dict[AnyPath, str | None] = {}
    try:
        if file.is_file() and file.stat().st_size:
            written = Written.at(path)
            known = (file, *written.files) if written is not None else (file,)
            writers = dict.fromkeys(known, str(written.manifest.get("job")) if written is not None else None)
        for part in part_files(path) if in_parts else ():
            if part not in writers:  # the manifest names it not: it may be anybody's
                writers[part] = writer_of(part)
    except OSError as exc:
        raise StorageError(f"the output {path} cannot be read: {exc}") from exc
    for file, writer in writers.items():
        if writer is None:
            raise JobError(
                f"the output {path} holds {file.name}, which batchrun has not written: name another folder"
                if in_parts
                else f"the output {path} is there already, and batchrun has not written it, or it is damaged: name "
                "another file, or remove it"
            )
        if destination.replaces is not None and writer != destination.replaces:
            raise JobError(
                f"the output {path} is that of the job {writer!r}: name another output; or, if this is that job under "
                f"a new file name, set `name: {writer}` and add --adopt-ledger, so that its answers are not paid for "
                "again"
            )


def _unwritten(path: AnyPath, exc: Exception) -> StorageError:
    return StorageError(f"the output {path} cannot be written: {exc}; `batchrun export` writes it again")


def _groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema, most: int) -> Iterator[pa.Table]:
    """Batches as row groups."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        for piece in _pieces(batch, most):
            if held and (rows + piece.num_rows > _GROUP_ROWS or size + piece.nbytes > most):
                yield _group(held, schema)
                held, rows, size = [], 0, 0
            held.append(piece)
            rows += piece.num_rows
            size += piece.nbytes
    if held:
        yield _group(held, schema)


def _pieces(batch: pa.RecordBatch, most: int) -> Iterator[pa.RecordBatch]:
    """A batch, halved until its pieces fit."""
    if batch.num_rows > 1 and batch.nbytes > most:
        middle = batch.num_rows // 2
        yield from _pieces(batch.slice(0, middle), most)
        yield from _pieces(batch.slice(middle), most)
    else:
        yield batch


def _group(batches: list[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_batches(batches, schema=schema).unify_dictionaries()


def _write_hidden(
    folder: AnyPath, schema: pa.Schema, groups: Iterator[pa.Table], part_bytes: int, label: dict[str, str]
) -> Iterator[AnyPath]:
    """Write parts, each where readers pass it by; their paths, each before it is begun. One part at least."""
    group = next(groups, None)
    for number in itertools.count():
        path = hidden(folder / part_name(number))
        yield path
        with written_beside(path) as fp, pq.ParquetWriter(fp, schema, compression="zstd") as writer:
            writer.add_key_value_metadata({PART_KEY: exact_json(label)})
            while group is not None:
                writer.write_table(group, row_group_size=max(1, group.num_rows))
                group = None  # before the next one is made
                group = next(groups, None)
                # On the disk a group takes no more than in memory, but for a little.
                if group is not None and fp.tell() + group.nbytes > part_bytes:
                    break
        if group is None:
            return


def _hidden_parts(folder: AnyPath) -> list[Any]:
    if isinstance(folder, RemotePath) or folder.is_dir():
        names = (path for path in folder.iterdir() if path.name.startswith(".") and path.name.endswith(".part"))
        return [path for path in names if PART_NAME.fullmatch(path.name[1 : -len(".part")])]
    return []
