"""What a folder promises: names that survive a power cut, and room on its disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from batchrun.remote import AnyPath

_CHUNK = 1024 * 1024


def fill(path: Path, size: int) -> None:
    """Make a file that takes up so many bytes of the disk.

    Raises:
        OSError: there is no such room; what there was is taken up.
    """
    if path.exists() and path.stat().st_size >= size:
        return
    chunk = os.urandom(_CHUNK)  # zeros take up nothing where the disk compresses
    with path.open("wb") as fp:
        for start in range(0, size, _CHUNK):
            fp.write(chunk[: size - start])


def sync_folder(folder: Path) -> None:
    """Bring to the disk which names a folder has.

    Raises:
        OSError: it cannot be opened.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def appearing(path: AnyPath) -> Iterator[IO[bytes]]:
    """A file that appears whole or not at all: written beside its place, and put into it at the end.

    Raises:
        OSError: it cannot be; what stood there before is untouched.
    """
    beside = hidden(path)
    with written_beside(beside) as fp:
        yield fp
    try:
        beside.replace(path)  # type: ignore[arg-type]
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if isinstance(path, Path):
        sync_folder(path.parent)


@contextmanager
def written_beside(beside: AnyPath) -> Iterator[IO[bytes]]:
    """A file that is on the disk, whole, or not there; its folder is made.

    Raises:
        OSError: it cannot be written.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as fp:
            yield fp
            fp.flush()
            if isinstance(beside, Path):
                os.fsync(fp.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def hidden(path: AnyPath) -> AnyPath:
    """Where a file is written before it is put into its place; readers of folders pass it by."""
    return path.with_name(f".{path.name}.part")
