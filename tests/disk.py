"""The disk under the ledger and the Parquet: every write, truncation, sync, rename and deletion is a step.

At the Nth step the process can be killed, or the disk can fail (once, or be full from then on); or all steps are
recorded, so that what a power cut would have left after each can be laid out in a folder. SQLite writes through a file
layer of `apsw` (the same SQLite in another wrapping), the Parquet through Python's own files.
"""

from __future__ import annotations

import errno
import os
import pickle
import random
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw

STEPS = ("write", "truncate", "sync", "rename", "delete")


class Disk:
    """Where the steps of this process go.

    Args:
        folder: files outside of it are not looked at.
        at: the step at which something happens, counted from 1.
        what: `kill`, `tear` (half of a write reaches the file, then a kill), `fail` (that step alone), `full` (from
            then on files can only grow by what others give back).
    """

    def __init__(self, folder: Path, at: int = 0, what: str = "") -> None:
        self.folder = str(folder)
        self.at = at
        self.what = what
        self.count = 0
        self.free = 0
        self.steps: list[tuple[Any, ...]] = []

    def step(self, kind: str, path: str, *details: Any) -> str:
        """Take a step; what the caller is to do: nothing special (empty), `tear` or fail."""
        path = os.path.abspath(path)
        if not path.startswith(self.folder) or path.endswith("-shm") or path.endswith(".lock"):
            return ""
        if kind in STEPS:
            self.count += 1
        is_now = self.count == self.at and kind in STEPS
        if self.what == "kill" and is_now:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "tear" and is_now:
            if kind == "write":
                return "tear"
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "fail" and is_now:
            return "fail"
        if self.what == "full" and self.count >= self.at and not self._has_room(kind, path, details):
            return "full"
        self.steps.append((kind, os.path.relpath(path, self.folder), *details))
        return ""

    def _has_room(self, kind: str, path: str, details: tuple[Any, ...]) -> bool:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if kind == "delete":
            self.free += size
        elif kind == "truncate":
            self.free += size - details[0]
        elif kind == "write":
            more = max(0, details[0] + len(details[1]) - size)
            if more > self.free:
                return False
            self.free -= more
        return True

    def save(self, path: Path) -> None:
        """Keep what was recorded."""
        path.write_bytes(pickle.dumps(self.steps))


def install(disk: Disk) -> None:
    """Put a disk under the product in this process."""
    from batchrun import ledger, ledger_view, migrations

    apsw.config(apsw.SQLITE_CONFIG_LOG, lambda code, message: None)
    vfs = _Vfs(disk)
    library = SimpleNamespace(**{name: getattr(sqlite3, name) for name in ("Error", "Connection")})
    library.connect = lambda path, **keys: _Connection(str(path), vfs)
    ledger.sqlite3 = ledger_view.sqlite3 = migrations.sqlite3 = library  # type: ignore[attr-defined]
    _put_under_python(disk)


# --- SQLite -------------------------------------------------------------------------------------------------


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: Any) -> None:
        self.disk = disk
        self.name = name.filename() if isinstance(name, apsw.URIFilename) else name or ""
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        what = self.disk.step("write", self.name, offset, bytes(data))
        if what == "tear":
            super().xWrite(data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        _fail(what)
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        _fail(self.disk.step("truncate", self.name, newsize))
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802
        _fail(self.disk.step("sync", self.name))
        super().xSync(flags)


class _Vfs(apsw.VFS):
    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        super().__init__("disk", "")

    def xOpen(self, name: Any, flags: Any) -> _File:  # noqa: N802
        return _File(self.disk, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        _fail(self.disk.step("delete", filename))
        super().xDelete(filename, syncdir)


def _fail(what: str) -> None:
    if what == "fail":
        raise apsw.IOError("the disk failed")
    if what == "full":
        raise apsw.FullError("the disk is full")


class _Connection:
    """What the ledger uses of `sqlite3.Connection`."""

    def __init__(self, path: str, vfs: _Vfs) -> None:
        self._vfs = vfs
        if path.startswith("file:"):
            path = path.removeprefix("file://").partition("?")[0]
        with _errors():
            self._db = apsw.Connection(path, vfs="disk")

    @property
    def in_transaction(self) -> bool:
        return self._db.in_transaction

    def execute(self, sql: str, parameters: Any = ()) -> _Cursor:
        before = self._db.total_changes()
        with _errors():
            cursor = self._db.execute(sql, parameters)
        return _Cursor(cursor, self._db.last_insert_rowid(), self._db.total_changes() - before)

    def executemany(self, sql: str, rows: Any) -> _Cursor:
        before = self._db.total_changes()
        with _errors():
            cursor = self._db.executemany(sql, rows)
        return _Cursor(cursor, 0, self._db.total_changes() - before)

    def executescript(self, sql: str) -> None:
        self.execute(sql)

    def close(self) -> None:
        with _errors():
            self._db.close()


class _Cursor:
    def __init__(self, cursor: Any, lastrowid: int, rowcount: int) -> None:
        self._cursor = cursor
        self.lastrowid = lastrowid
        self.rowcount = rowcount

    def fetchone(self) -> Any:
        with _errors():
            return self._cursor.fetchone()

    def fetchall(self) -> list[Any]:
        with _errors():
            return list(self._cursor)

    def __iter__(self) -> Iterator[Any]:
        with _errors():
            yield from self._cursor


class _errors:  # noqa: N801
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, exc: Any, trace: Any) -> None:
        if isinstance(exc, apsw.Error):
            raise sqlite3.OperationalError(str(exc)) from exc


# --- Python's own files -------------------------------------------------------------------------------------


class _Written:
    """A file that is written from its beginning to its end."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._path = str(path)
        self._fp = open(path, "wb", buffering=0)  # noqa: SIM115
        disk.step("create", self._path)
        self.closed = False

    def write(self, data: Any) -> int:
        raw = bytes(data)
        what = self._disk.step("write", self._path, self._fp.tell(), raw)
        if what == "tear":
            self._fp.write(raw[: len(raw) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        _fail_in_python(what, self._path)
        self._fp.write(raw)
        return len(raw)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fp, name)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *args: Any) -> None:
        self._fp.close()


def _put_under_python(disk: Disk) -> None:
    open_file, replace, unlink, fsync = Path.open, Path.replace, Path.unlink, os.fsync

    def opened(self: Path, mode: str = "r", *args: Any, **keys: Any) -> Any:
        return _Written(disk, self) if mode == "wb" else open_file(self, mode, *args, **keys)

    def replaced(self: Path, target: Any) -> Any:
        _fail_in_python(disk.step("rename", str(self), os.path.relpath(target, disk.folder)), str(self))
        return replace(self, target)

    def unlinked(self: Path, missing_ok: bool = False) -> None:
        if self.exists():
            _fail_in_python(disk.step("delete", str(self)), str(self))
        unlink(self, missing_ok)

    def synced(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        _fail_in_python(disk.step("sync", str(path)), str(path))
        fsync(fd)

    Path.open, Path.replace, Path.unlink = opened, replaced, unlinked  # type: ignore[method-assign,assignment]
    os.fsync = synced  # type: ignore[assignment]


def _fail_in_python(what: str, path: str) -> None:
    if what:
        number = errno.ENOSPC if what == "full" else errno.EIO
        raise OSError(number, os.strerror(number), path)


# --- a power cut --------------------------------------------------------------------------------------------


def lay_out(steps: list[tuple[Any, ...]], folder: Path, chance: random.Random, keep: str) -> None:
    """What is on the disk when the power goes after these steps.

    What was synced is there. Of what was written to a file since: nothing (`keep` is "none"), all ("all"), or some of
    it, the last in half ("some"). A rename, a deletion and a creation are there as soon as they were asked for, which
    may be before what was written: so the file systems of the day do it.
    """
    durable: dict[str, bytearray] = {}
    pending: dict[str, list[tuple[Any, ...]]] = {}
    for kind, path, *details in steps:
        match kind:
            case "create":
                durable[path], pending[path] = bytearray(), []
            case "write" | "truncate":
                durable.setdefault(path, bytearray())
                pending.setdefault(path, []).append((kind, *details))
            case "sync":
                for step in pending.pop(path, []):
                    _apply(durable[path], step)
            case "rename":
                (target,) = details
                durable[target], pending[target] = durable.pop(path), pending.pop(path, [])
            case "delete":
                durable.pop(path, None)
                pending.pop(path, None)
    for path, content in durable.items():
        left = pending.get(path, [])
        for index, step in enumerate(left):
            if keep == "all":
                _apply(content, step)
            elif keep == "some" and chance.random() < 0.5:
                is_torn = index == len(left) - 1 and step[0] == "write" and len(step[2]) > 512
                _apply(content, (*step[:2], step[2][:512]) if is_torn else step)
        (folder / path).write_bytes(content)


def _apply(content: bytearray, step: tuple[Any, ...]) -> None:
    if step[0] == "truncate":
        del content[step[1] :]
    else:
        _, offset, data = step
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data
