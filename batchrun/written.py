"""Outputs as they stand: one Parquet file, or a folder of parts whose manifest says which they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.documents import parse_json
from batchrun.errors import StorageError
from batchrun.remote import AnyPath, RemotePath, for_arrow

MANIFEST_KEY = "batchrun"
"""In a file's metadata: its manifest."""
PART_KEY = "batchrun.part"
"""In a part's metadata: the job and the run that it is of."""
MANIFEST_NAME = "_manifest.json"
"""In a folder of parts, written last; readers of datasets pass by names with an underscore."""
PART_NAME = re.compile(r"part-\d{5,}\.parquet")


def part_name(number: int) -> str:
    """The name of a part, counted from 0."""
    return f"part-{number:05d}.parquet"


@dataclass(frozen=True)
class Written:
    """An output of batchrun.

    Attributes:
        manifest: what it says of its run; amounts are exact decimals.
        files: its Parquet files, in the order of the rows.
    """

    path: AnyPath
    manifest: dict[str, Any]
    files: tuple[AnyPath, ...]

    @classmethod
    def at(cls, path: AnyPath) -> Written | None:
        """The output that stands at a path; None if there is none, or it is not batchrun's.

        Raises:
            StorageError: its store does not answer.
        """
        manifest = _in_metadata(path, MANIFEST_KEY)
        if manifest is not None:
            return cls(path, manifest, (path,))
        manifest = _manifest_in_folder(path)
        names = manifest.get("parts") if manifest is not None else None
        if manifest is None or not isinstance(names, list) or not names:
            return None
        if not all(PART_NAME.fullmatch(str(name)) for name in names):
            return None
        return cls(path, manifest, tuple(path / name for name in names))

    @property
    def unnamed(self) -> list[AnyPath]:
        """What stands among its parts, looks like one, and is none."""
        return [path for path in part_files(self.path) if path not in self.files] if self.path not in self.files else []

    @cached_property
    def schema(self) -> pa.Schema:
        """Of all files.

        Raises:
            OSError, pa.ArrowException: the first one cannot be read.
        """
        with for_arrow(self.files[0]) as source:
            return pq.read_schema(source)

    @cached_property
    def rows(self) -> int:
        """Of all files together.

        Raises:
            OSError, pa.ArrowException: one cannot be read.
        """
        rows = 0
        for path in self.files:
            with for_arrow(path) as source:
                rows += int(pq.read_metadata(source).num_rows)
        return rows

    def batches(self, size: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows, so many at a time at most.

        Raises:
            OSError, pa.ArrowException: a file cannot be read.
        """
        for path in self.files:
            with ExitStack() as stack:
                file = stack.enter_context(pq.ParquetFile(stack.enter_context(for_arrow(path))))
                yield from file.iter_batches(size, columns=list(columns) if columns is not None else None)


def manifest_of(path: AnyPath) -> dict[str, Any] | None:
    """The manifest of the output at a path; None if there is none, or it is not batchrun's.

    Raises:
        StorageError: its store does not answer.
    """
    written = Written.at(path)
    return written.manifest if written is not None else None


def part_files(folder: AnyPath) -> list[AnyPath]:
    """All that are named like parts."""
    if isinstance(folder, RemotePath) or folder.is_dir():
        return [path for path in folder.iterdir() if PART_NAME.fullmatch(path.name)]
    return []


def label_of(path: AnyPath) -> dict[str, Any] | None:
    """What a part says of itself; None for any other file.

    Raises:
        StorageError: its store does not answer.
    """
    return _in_metadata(path, PART_KEY)


def writer_of(path: AnyPath) -> str | None:
    """The job that has written a part; None for any other file.

    Raises:
        StorageError: its store does not answer.
    """
    label = label_of(path)
    return str(label.get("job")) if label is not None else None


def _in_metadata(path: AnyPath, key: str) -> dict[str, Any] | None:
    """What a Parquet file's metadata holds under a key; None if it is no such file, or has nothing there."""
    try:
        with for_arrow(path) as source:
            told = parse_json((pq.read_metadata(source).metadata or {})[key.encode()])
    except (pa.ArrowException, KeyError, ValueError):
        return None
    except OSError as exc:
        _refuse_silence(path, exc)
        return None
    return told if isinstance(told, dict) else None


def _refuse_silence(path: AnyPath, exc: OSError) -> None:
    """What a store does not show may be anybody's."""
    if isinstance(path, RemotePath) and not isinstance(exc, FileNotFoundError | IsADirectoryError):
        raise StorageError(f"{path}: cannot be read: {exc}") from exc


def _manifest_in_folder(path: AnyPath) -> dict[str, Any] | None:
    try:
        with (path / MANIFEST_NAME).open("rb") as fp:
            manifest = parse_json(fp.read())
    except ValueError:
        return None
    except OSError as exc:
        _refuse_silence(path, exc)
        return None
    return manifest if isinstance(manifest, dict) else None
