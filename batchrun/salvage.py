"""A damaged ledger → a whole one with all of it that can still be read, and what could not be told.

Attempts are numbered without gaps, so that what is lost can be counted: a lost attempt stays on record as one of
unknown outcome and cost, without a row. Each attempt that is read is held against its seal.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchrun.errors import JobError, StorageError
from batchrun.folders import sync_folder
from batchrun.job import Job
from batchrun.ledger_view import (
    INTENT_COLUMNS,
    NO_ROW,
    SEAL_MASK,
    SETTLEMENT_COLUMNS,
    attempt_seal,
    log_of,
    same_group,
    seal,
    storage,
)
from batchrun.migrations import create
from batchrun.records import now_us
from batchrun.stored import Unpacker, UnpackError, digest

_BESIDE = ("-wal", "-shm")
_SMALLEST_ROW = 64
"""Bytes that an attempt takes at least: a bound on how many there can be."""
_AT_ONCE = 1024
_NOT_ITS_FAULT = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM)
_STATES = ("open", "finished", "abandoned")
_COUNTS = ("attempts", "settled", "seals")
_LOST = "what became of it was lost with a damaged ledger"
_HAS: dict[str, dict[str, type]] = {
    "owner": {"job_name": str, "job_path": str},
    "run": {"run": int, "run_id": str, "started_at": int, "state": str},
    "invocation": {
        "invocation": int, "run": int, "started_at": int, "version": str, "pid": int, "host": str, "job": str,
        "endpoint": str,
    },
    "attempt": {
        "attempt_id": int, "run": int, "invocation": int, "row_index": int, "model": str, "sample": int, "key": str,
        "number": int, "client_request_id": str, "sent_at": int, "final": int,
    },
    "amendment": {
        "amendment": int, "origin": str, "amended_at": int, "after_attempt": int, "corrections": int, "seals": int,
    },
    "correction": {"attempt_id": int, "amendment": int, "usd_pico": int, "cost_source": str},
    "moved": {"run": int, "row_index": int, "model": str, "sample": int, "key": str},
    "repair_wanted": {"run": int, "row_index": int, "model": str, "sample": int, "key": str, "repair": int},
    "reused": {
        "run": int, "row_index": int, "model": str, "sample": int, "key": str, "source_run": int, "source_row": int,
    },
    "row_fault": {"run": int, "row_index": int, "model": str, "sample": int, "error": str},
}  # fmt: skip
"""What a row of a table cannot be without."""
_NUMBERED_BY = {
    "correction": "attempt_id",
    "moved": "row_index",
    "repair_wanted": "row_index",
    "reused": "row_index",
    "row_fault": "row_index",
}
"""Of tables whose rows have no numbers of their own: the number that they are read by."""
_Row = dict[str, Any]
_BLANK: _Row = dict.fromkeys((*INTENT_COLUMNS, *SETTLEMENT_COLUMNS, "seal")) | {"repair": 0}


@dataclass
class Salvage:
    """What was saved."""

    kept: Path | None = None
    """Where the damaged ledger is; None if it was whole."""
    attempts: int = 0
    lost_attempts: int = 0
    lost_answers: int = 0
    lost_corrections: int = 0
    is_as_told: bool = True
    """What was read is what the runs say that they did."""

    @property
    def is_all(self) -> bool:
        """True if nothing is lost."""
        return not (self.lost_attempts or self.lost_answers or self.lost_corrections)

    def lines(self) -> list[str]:
        """A short text."""
        if self.kept is None:
            return ["the ledger is whole: there is nothing to salvage"]
        lines = [f"saved {self.attempts} attempts; the damaged ledger is kept as {self.kept}"]
        if self.lost_attempts:
            lines.append(
                f"{self.lost_attempts} attempts are lost: they count as unknown, and the rows that they answered will "
                "be asked and paid for again"
            )
        if self.lost_answers:
            lines.append(
                f"the answers of {self.lost_answers} more are lost: their rows will be asked and paid for again"
            )
        if self.lost_corrections:
            lines.append(
                f"{self.lost_corrections} corrections of costs are lost: `batchrun reconcile` or `batchrun export "
                "--reprice` learns them again"
            )
        return lines


def salvage(job: Job, *, adopt: bool = False) -> Salvage:
    """Put a whole ledger in the place of a damaged one. The caller holds its lock.

    Raises:
        JobError: there is none, or it is another job's.
        StorageError: nothing of it can be read, or the new one cannot be written.
    """
    path = Path(os.path.realpath(job.ledger_path))  # its log stands beside the file, not beside a link to it
    if not path.exists():
        raise JobError(f"there is nothing to salvage: no run of this job is in {path}")
    with storage(path):
        _undo(path)
    with storage(path), closing(_Damaged(path)) as damaged:
        beside = path.with_name(f".{path.name}.new")
        try:
            with closing(create(beside)) as db:
                db.execute("BEGIN")
                saved = _fill(db, damaged, job, adopt=adopt)
                db.execute("COMMIT")
            if saved.is_all and saved.is_as_told and damaged.is_whole():
                return Salvage()
            saved.kept = _put_aside(path)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        sync_folder(path.parent)
    return saved


def _put_aside(path: Path) -> Path:
    """Keep the damaged file with its log under another name: a log must never meet a ledger that is not its own."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    kept = path.with_name(f"{path.name}.damaged-{stamp}")
    os.link(path, kept)
    for ending in _BESIDE:
        with suppress(FileNotFoundError):
            path.with_name(f"{path.name}{ending}").replace(kept.with_name(f"{kept.name}{ending}"))
    return kept


def _undo(path: Path) -> None:
    """Take back what a salvage that was killed has put aside: its log belongs to the ledger that still stands."""
    for kept in path.parent.glob(f"{path.name}.damaged-*"):
        if kept.name.endswith(_BESIDE) or not kept.samefile(path):
            continue
        for ending in _BESIDE:
            with suppress(FileNotFoundError):
                kept.with_name(f"{kept.name}{ending}").replace(path.with_name(f"{path.name}{ending}"))
        kept.unlink()


class _Damaged:
    """A ledger of which some pages cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        log = log_of(path)
        size = path.stat().st_size + (log.stat().st_size if log.exists() else 0)
        self.plausible = 1024 + size // _SMALLEST_ROW
        """No row has a higher number, unless it is broken."""
        self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        # Otherwise a file that was cut short is refused as a whole.
        self._db.execute("PRAGMA writable_schema = ON")
        self._db.row_factory = lambda cursor, row: dict(
            zip([name for name, *_ in cursor.description], row, strict=True)
        )

    def close(self) -> None:
        self._db.close()

    def is_whole(self) -> bool:
        """True if SQLite finds nothing wrong with the file."""
        try:
            self._db.execute("PRAGMA writable_schema = OFF")
            found = [next(iter(row.values())) for row in self._db.execute("PRAGMA integrity_check(1)")]
        except sqlite3.DatabaseError:
            return False
        else:
            return found == ["ok"]
        finally:
            self._db.execute("PRAGMA writable_schema = ON")

    def columns(self, table: str) -> list[str]:
        """Of a table as it is in this file; older ones have fewer."""
        try:
            return [row["name"] for row in self._db.execute(f"PRAGMA table_info({table})")]
        except sqlite3.DatabaseError:
            return []

    def rows(self, table: str, most: int = 0) -> Iterator[_Row]:
        """What can be read of a table, by the numbers of its rows; where a page is broken, around it.

        Args:
            most: a number that there was at least.
        """
        if not self.columns(table):
            return
        most = min(self.plausible, max(most, self.newest(table)))
        start = 0
        while start <= most:
            for row in self._between(table, start, min(most + 1, start + _AT_ONCE)):
                # A broken page can hold rows that never were.
                if all(isinstance(row.get(name), kind) for name, kind in _HAS[table].items()):
                    yield row
            start += _AT_ONCE

    def count(self, table: str) -> int | None:
        """How many rows a table has; None if that cannot be read."""
        try:
            return int(self._db.execute(f"SELECT count(*) AS number FROM {table}").fetchone()["number"])
        except sqlite3.DatabaseError:
            return None

    def answer(self, attempt_id: int) -> _Row | None:
        """An attempt's answer, if it can be read and unpacked."""
        try:
            row: _Row | None = self._db.execute("SELECT * FROM answer WHERE attempt_id = ?", (attempt_id,)).fetchone()
        except sqlite3.DatabaseError:
            return None
        return row if row is not None and (row.get("digest") or _body(row) is not None) else None

    def _between(self, table: str, start: int, stop: int) -> Iterator[_Row]:
        try:
            number = _NUMBERED_BY.get(table, "rowid")
            sql = f"SELECT * FROM {table} WHERE {number} >= ? AND {number} < ? ORDER BY {number}"
            found = self._db.execute(sql, (start, stop)).fetchall()
        except sqlite3.DatabaseError as exc:
            if getattr(exc, "sqlite_errorcode", None) in _NOT_ITS_FAULT:
                raise
            if stop - start > 1:
                middle = (start + stop) // 2
                yield from self._between(table, start, middle)
                yield from self._between(table, middle, stop)
            return
        yield from found

    def newest(self, table: str) -> int:
        """The highest number of its rows."""
        try:
            number = _NUMBERED_BY.get(table, "rowid")
            return int(self._db.execute(f"SELECT max({number}) AS newest FROM {table}").fetchone()["newest"] or 0)
        except sqlite3.DatabaseError:
            return self.plausible


# --- into a new file ----------------------------------------------------------------------------------------


def _fill(db: sqlite3.Connection, damaged: _Damaged, job: Job, *, adopt: bool) -> Salvage:
    owner = next(iter(damaged.rows("owner")), None)
    own = {"job_name": job.name, "job_path": os.path.relpath(job.path, damaged.path.parent)}
    if owner is not None and not adopt and any(owner[name] != value for name, value in own.items()):
        raise JobError(
            f"{damaged.path} is the ledger of the job {owner['job_name']!r} in {owner['job_path']}, not of this one; "
            "if it is, add --adopt-ledger"
        )
    attempts = _Attempts(db, damaged)
    saved = attempts.copy()
    if not saved.attempts and not attempts.runs:
        raise StorageError(
            f"nothing of {damaged.path} can be read: bring it back from a backup; or, if its answers may be paid for "
            "again, delete it"
        )
    saved.is_as_told &= owner is not None
    for table, rows in (("run", attempts.runs), ("invocation", attempts.invocations)):
        for row in rows.values():
            _put(db, table, row)
    for table in ("moved", "repair_wanted", "reused", "row_fault"):
        for row in damaged.rows(table):
            _put(db, table, row)
    # What is to be asked again has an answer.
    db.execute(
        "DELETE FROM repair_wanted WHERE NOT EXISTS (SELECT 1 FROM attempt WHERE outcome = 'ok' "
        f"AND {same_group('attempt', 'repair_wanted')})"
    )
    known = (owner or {}).get("amendments") or 0
    amendments = _copy_corrections(db, damaged, known, saved)
    _put(db, "owner", own | {"runs": len(attempts.runs), "amendments": amendments})
    return saved


class _Attempts:
    """Attempts with their answers, one after the other, and the runs and invocations that they belong to."""

    def __init__(self, db: sqlite3.Connection, damaged: _Damaged) -> None:
        self._db = db
        self._damaged = damaged
        self.runs = {row["run"]: row for row in damaged.rows("run")}
        self.invocations = {row["invocation"]: row for row in damaged.rows("invocation") if not _is_other_job(row)}
        counts = [row.get("attempts") for row in self.runs.values()]
        self._known = min(damaged.plausible, sum(count for count in counts if isinstance(count, int)))
        self._lost_in: set[int] = set()
        self._told: dict[int, tuple[Any, ...]] = {}
        self._saved = Salvage()
        for table, found in (("run", self.runs), ("invocation", self.invocations)):
            self._saved.is_as_told &= damaged.count(table) == len(found)
        for invocation in self.invocations.values():
            if invocation["ended_at"] is None and invocation["reason"] is None:
                invocation["reason"] = "died"
        for run in self.runs.values():
            if run["state"] not in _STATES:
                run["state"] = "finished" if run["ended_at"] else "open"
                self._saved.is_as_told = False
            self._saved.is_as_told &= run["input"] is None or _is_object(run["input"])
            self._told[run["run"]] = tuple(run.get(name) for name in _COUNTS)
            run |= {"attempts": 0, "settled": 0, "seals": 0, "is_written": 0, "input": _to_be_placed(run["input"])}

    def copy(self) -> Salvage:
        """Copy what is as it was settled; what is missing becomes an attempt of unknown outcome."""
        before = self._before_the_first()
        next_id = 1
        for row in self._damaged.rows("attempt", self._known):
            attempt = _BLANK | row
            answer = self._damaged.answer(row["attempt_id"])
            if row["attempt_id"] < next_id or _is_altered(attempt, answer):
                continue  # no telling what of it is true
            for missing in range(next_id, row["attempt_id"]):
                self._put_lost(missing, before)
            next_id = row["attempt_id"]
            if self._put(attempt, answer):
                next_id, before = next_id + 1, attempt
                self._saved.attempts += 1
        for missing in range(next_id, self._known + 1):
            self._put_lost(missing, before)
        self._saved.is_as_told &= all(
            value in (None, self.runs[number][name])  # an old ledger does not tell
            for number, told in self._told.items()
            for name, value in zip(_COUNTS, told, strict=True)
        )
        newest = max((number for number, run in self.runs.items() if run["attempts"]), default=0)
        for number, run in self.runs.items():
            if number in self._lost_in:
                is_open = number == newest and run.get("pruned_at") is None
                run["state"] = "open" if is_open else "abandoned"
            elif number > newest and newest in self._lost_in:
                run["state"] = "abandoned"  # it has sent nothing, and must not stand before the one to be gone on with
        return self._saved

    def _before_the_first(self) -> _Row:
        """Where attempts belong that were lost before any that is left."""
        first = min(self.runs, default=1)
        run = self.runs.get(first, {"started_at": now_us()})
        return {"run": first, "invocation": min(self.invocations, default=1), "sent_at": run["started_at"]}

    def _put(self, attempt: _Row, answer: _Row | None) -> bool:
        if attempt["outcome"] == "ok" and answer is None:
            # It was paid for, and what it brought is gone: the row is to be asked again.
            attempt |= {"outcome": "failed", "final": 0, "error_kind": "lost", "error": f"lost: its answer, {_LOST}"}
            self._saved.lost_answers += 1
        if attempt["error_kind"] == "lost":
            self._lost_in.add(attempt["run"])
        if attempt["outcome"] is not None and (attempt["seal"] is not None or attempt["error_kind"] == "lost"):
            attempt["seal"] = _sealed(attempt, answer)
        if not _put(self._db, "attempt", attempt):
            return False
        if answer is not None:
            _put(self._db, "answer", answer)
        self._stand_in(attempt)
        run = self.runs[attempt["run"]]
        if answer is not None and answer.get("digest"):
            run["pruned_at"] = run.get("pruned_at") or now_us()
        run["attempts"] += 1
        run["settled"] += attempt["outcome"] is not None
        run["seals"] = (run["seals"] + (attempt["seal"] or 0)) & SEAL_MASK
        return True

    def _put_lost(self, attempt_id: int, beside: _Row) -> None:
        self._saved.lost_attempts += 1
        self._put(
            _BLANK | {
                "attempt_id": attempt_id, "run": beside["run"], "invocation": beside["invocation"],
                "row_index": NO_ROW, "model": "", "sample": 0, "key": "", "number": 1,
                "client_request_id": f"lost:{attempt_id}", "sent_at": beside["sent_at"], "settled_at": now_us(),
                "outcome": "unknown", "final": 0, "error_kind": "lost", "error": f"lost: {_LOST}",
            },
            None,
        )  # fmt: skip

    def _stand_in(self, attempt: _Row) -> None:
        """A run and an invocation for an attempt whose own are lost, by what the attempt says of them."""
        number, invocation = attempt["run"], attempt["invocation"]
        if number not in self.runs:
            run_id = attempt["client_request_id"].rpartition(":")[0].rpartition(":")[0] or f"lost-{number}"
            self.runs[number] = {
                "run": number, "run_id": run_id, "started_at": attempt["sent_at"], "ended_at": None, "state": "open",
                "input": None, "attempts": 0, "settled": 0, "seals": 0, "is_written": 0,
            }  # fmt: skip
            self._lost_in.add(number)
        if invocation not in self.invocations:
            self.invocations[invocation] = {
                "invocation": invocation, "run": number, "started_at": attempt["sent_at"], "ended_at": None,
                "exit_code": None, "reason": "lost", "version": "", "pid": 0, "host": "", "job": "{}", "endpoint": "",
            }  # fmt: skip


def _is_other_job(invocation: _Row) -> bool:
    sealed = invocation.get("seal")
    if sealed is None:
        return not _is_object(invocation["job"])
    return bool(sealed != seal((invocation["run"], invocation["job"], invocation["endpoint"])))


def _is_altered(attempt: _Row, answer: _Row | None) -> bool:
    if attempt["seal"] is None or attempt["outcome"] is None or (attempt["outcome"] == "ok" and answer is None):
        return False
    return bool(attempt["seal"] != _sealed(attempt, answer))


def _sealed(attempt: _Row, answer: _Row | None) -> int:
    answered = digest(b"")
    if answer is not None:
        answered = answer.get("digest") or digest(_body(answer) or b"")
    intended, settled = ([attempt[name] for name in columns] for columns in (INTENT_COLUMNS, SETTLEMENT_COLUMNS))
    return attempt_seal(intended, settled, answered)


def _body(answer: _Row) -> bytes | None:
    try:
        body = Unpacker().unpack(answer["body"])
    except (UnpackError, TypeError):
        return None
    return body if len(body) == answer["size"] else None


def _is_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, TypeError):
        return False


def _to_be_placed(text: str | None) -> str | None:
    """A run's input, so that its answers are placed in their rows anew."""
    if not _is_object(text):
        return None
    assert text is not None
    placed = json.loads(text)
    placed.pop("bounds", None)
    return json.dumps(placed)


def _copy_corrections(db: sqlite3.Connection, damaged: _Damaged, known: int, saved: Salvage) -> int:
    """What was learnt of costs, if all of an amendment is as it was; the number of amendments.

    A correction has no seal of its own: one that is lost or altered makes its whole amendment doubtful.
    """
    found: dict[int, list[_Row]] = {}
    for row in damaged.rows("correction"):
        found.setdefault(row["amendment"], []).append(row)
    read = kept = 0
    for amendment in damaged.rows("amendment"):
        read += 1
        rows = found.pop(amendment["amendment"], [])
        values = [(row["attempt_id"], row["amendment"], row["usd_pico"], row["cost_source"]) for row in rows]
        is_sound = (len(rows), sum(map(seal, values)) & SEAL_MASK) == (amendment["corrections"], amendment["seals"])
        if is_sound and _put(db, "amendment", amendment):
            kept += 1
            for row in rows:
                _put(db, "correction", row)
        else:
            saved.lost_corrections += max(1, len(rows), min(amendment["corrections"], damaged.plausible))
    # Of an amendment that cannot be read there was one correction at least.
    saved.lost_corrections += max(sum(map(len, found.values())), known - read, 0)
    return kept


def _put(db: sqlite3.Connection, table: str, row: _Row) -> bool:
    """Insert a row; False if it is one that never was."""
    try:
        db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", [*row.values()])
    except (sqlite3.IntegrityError, sqlite3.InterfaceError, OverflowError):
        return False
    return True
