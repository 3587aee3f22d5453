"""Record batches → a Parquet file that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.documents import parse_json
from batchrun.errors import JobError, StorageError
from batchrun.folders import appearing

_GROUP_ROWS = 65_536
_GROUP_BYTES = 32 * 1024 * 1024
MANIFEST_KEY = "batchrun"


def write_parquet(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], manifest: Callable[[], str]
) -> None:
    """Write a file beside its place, bring it to the disk, and rename it into place.

    Args:
        manifest: called after the last batch; its text, JSON, goes into the file's metadata under `batchrun`.

    Raises:
        StorageError: it cannot be written; what stood at `path` before is untouched.
    """
    try:
        with appearing(path) as beside, beside.open("wb") as fp:
            _write(fp, schema, batches, manifest)
            fp.flush()
            os.fsync(fp.fileno())
    except (OSError, pa.ArrowException) as exc:
        raise StorageError(f"the output {path} cannot be written: {exc}; `batchrun export` writes it again") from exc


def check_schema(schema: pa.Schema) -> None:
    """Find out before anything is sent whether Parquet can hold the columns.

    Raises:
        JobError: it cannot; such as a struct without fields.
    """
    with suppress(pa.ArrowException), pq.ParquetWriter(pa.BufferOutputStream(), schema):
        return
    for field in schema:
        try:
            with pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])):
                pass
        except pa.ArrowException as exc:
            raise JobError(
                f"the column {field.name!r} ({field.type}) cannot be written to Parquet: {exc}: leave it out with "
                f"input: {{columns: {{{field.name}: null}}}}"
            ) from None


def check_writable(path: Path, job_name: str | None) -> None:
    """Find out before anything is sent whether the output can be written.

    Args:
        job_name: whose output may stand there already; None for anybody's.

    Raises:
        StorageError: it cannot.
        JobError: another job's output stands there.
    """
    probe = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for place in (path, probe):
            if place.exists() and not place.is_file():
                what = "a folder" if place.is_dir() else "no file"
                raise StorageError(f"the output {place} is {what}: name another file, or remove it")
        probe.open("wb").close()
        probe.unlink()
        writer = (manifest_of(path) or {}).get("job")
    except (OSError, RuntimeError) as exc:  # the latter for links that lead round in a circle
        raise StorageError(f"the output {path} cannot be written: {getattr(exc, 'strerror', None) or exc}") from exc
    if job_name is not None and writer not in (None, job_name):
        raise JobError(
            f"the output {path} is that of the job {writer!r}: name another output; or, if this is that job under a "
            f"new file name, set `name: {writer}` and add --adopt-ledger, so that its answers are not paid for again"
        )


def manifest_of(path: Path) -> dict[str, Any] | None:
    """The manifest of a file, amounts as exact decimals; None if there is no such file, or it is not batchrun's."""
    try:
        manifest = parse_json((pq.read_metadata(path).metadata or {})[MANIFEST_KEY.encode()])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _write(fp: Any, schema: pa.Schema, batches: Iterable[pa.RecordBatch], manifest: Callable[[], str]) -> None:
    with pq.ParquetWriter(fp, schema, compression="zstd") as writer:
        held: list[pa.RecordBatch] = []
        rows = size = 0
        for batch in batches:
            held.append(batch)
            rows += batch.num_rows
            size += batch.nbytes
            if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
                _write_group(writer, held, schema)
                held, rows, size = [], 0, 0
        if held:
            _write_group(writer, held, schema)
        writer.add_key_value_metadata({MANIFEST_KEY: manifest()})


def _write_group(writer: pq.ParquetWriter, batches: list[pa.RecordBatch], schema: pa.Schema) -> None:
    table = pa.Table.from_batches(batches, schema=schema).unify_dictionaries()
    writer.write_table(table, row_group_size=max(1, table.num_rows))
