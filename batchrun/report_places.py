"""The ledgers and outputs that paths stand for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from batchrun.errors import JobError, StorageError
from batchrun.written import MANIFEST_NAME

_MAGIC = b"SQLite format 3\0"
_LEDGERS = (".sqlite", ".sqlite3", ".db")
# What stands beside a ledger and belongs to it; and what `salvage` has put aside.
_NOT_LEDGERS = ("-wal", "-shm", ".lock", ".reserve")
_PUT_ASIDE = ".damaged-"


class Places:
    """What was found.

    Args:
        paths: ledgers, outputs (Parquet), or folders, whose folders are looked into too.

    Attributes:
        ledgers, outputs: each file once, however it was reached.
        named: those that were named themselves.
        notes: what could not be read, and why.

    Raises:
        JobError: a path is none of these.
        StorageError: a file that was named cannot be read.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.notes: list[str] = []
        self.named: set[Path] = set()
        ledgers: dict[str, Path] = {}
        outputs: dict[str, Path] = {}
        for path in paths:
            if path.is_dir():
                for file in self._files(path):
                    kind = self._kind(file)
                    if kind is not None:
                        if file.name == MANIFEST_NAME:
                            file = file.parent  # the output is the folder
                        (ledgers if kind == "ledger" else outputs).setdefault(os.path.realpath(file), file)
                continue
            if not path.is_file():
                what = (
                    "is neither a file nor a folder"
                    if path.exists()
                    else "there is no such file or folder: name ledgers, outputs or folders that hold them"
                )
                raise JobError(f"{path}: {what}")
            self.named.add(path)
            if path.suffix == ".parquet":
                outputs.setdefault(os.path.realpath(path), path)
                continue
            try:
                is_ledger = begins_as_ledger(path)
            except OSError as exc:
                raise StorageError(f"{path} cannot be read: {exc.strerror or exc}") from exc
            if not is_ledger and path.suffix not in _LEDGERS:
                raise JobError(f"{path}: is neither a ledger nor a Parquet nor a folder")
            ledgers.setdefault(os.path.realpath(path), path)
            # Its outputs are mostly beside it.
            for file in sorted(path.parent.glob("*.parquet")):
                if file.is_file():
                    outputs.setdefault(os.path.realpath(file), file)
            for file in sorted(path.parent.glob(f"*/{MANIFEST_NAME}")):
                outputs.setdefault(os.path.realpath(file.parent), file.parent)
        self.ledgers, self.outputs = list(ledgers.values()), list(outputs.values())

    def _files(self, folder: Path) -> Iterator[Path]:
        for top, _, names in os.walk(folder, onerror=self._note_error):
            for name in sorted(names):
                file = Path(top, name)
                # Not what has no end, such as a pipe, nor a link that leads round in a circle.
                if not name.startswith(".") and file.is_file():
                    yield file

    def _kind(self, file: Path) -> str | None:
        if file.suffix == ".parquet" or file.name == MANIFEST_NAME:
            return "output"
        if file.name.endswith(_NOT_LEDGERS) or _PUT_ASIDE in file.name:
            return None
        try:
            if begins_as_ledger(file):
                return "ledger"
        except OSError as exc:
            self._note_error(exc)
            return None
        if file.suffix in _LEDGERS:
            self.notes.append(f"left out: {file} is empty, or has been damaged: it does not begin as a ledger does")
        return None

    def _note_error(self, error: OSError) -> None:
        self.notes.append(f"left out: {error.filename} cannot be read: {error.strerror}")


def begins_as_ledger(file: Path) -> bool:
    """True if a file may be a ledger: it is SQLite's.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as fp:
        return fp.read(len(_MAGIC)) == _MAGIC
