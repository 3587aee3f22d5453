"""The ledger: one SQLite file per job, the only state there is.

An attempt is inserted as an intent before its request is sent, completed once when it is settled, and never altered
after. Everything else (what is answered, what was spent, what must be asked) is read from the attempts.

Attempts with the same (run, row index, model, sample, key) are a *group*. A group stands in the slot of its own row
index as long as that row still asks for its key. Where rows were inserted, deleted or edited since, `place` finds the
groups a new row, or none, and writes the exceptions down in the table `moved`.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

from batchrun import __version__
from batchrun.errors import BrokenPromiseError, JobError, Promise, StorageError
from batchrun.folders import fill, sync_folder
from batchrun.ledger_view import (
    GROUP_COLUMNS,
    INTENT_COLUMNS,
    NEWEST_IS_FINAL,
    SEAL_MASK,
    SETTLEMENT_COLUMNS,
    UNPRUNED,
    LedgerView,
    Run,
    attempt_seal,
    everywhere,
    log_of,
    same_group,
    seal,
    storage,
)
from batchrun.lock import lock_path
from batchrun.migrations import create, migrate
from batchrun.money import to_pico
from batchrun.records import (
    Action,
    Asked,
    Exchange,
    Failure,
    Group,
    Intent,
    Request,
    Reservation,
    Settlement,
    Slot,
    now_us,
    utc,
)
from batchrun.stored import NOTHING, Packer

_ROOM_PER_ANSWER = 128 * 1024
_LEAST_ROOM = 1024 * 1024
_MOST_ROOM = 64 * 1024 * 1024


class Ledger(LedgerView):
    """One job's ledger, open for writing; its lock is the caller's business.

    Raises:
        StorageError: from every method, when the file cannot be read or written.
        JobError: from `open`, when the ledger is another job's.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        super().__init__(connection, path)
        self._files = {file: _identity(file) for file in (path, lock_path(path)) if file.exists()}
        self._reserve = path.with_name(f"{path.name}.reserve")
        self._next_attempt = 1 + (self._value("SELECT max(attempt_id) FROM attempt") or 0)
        self._invocation = 0
        self.is_dirty = False
        """True if commits since the last `sync` would be lost with the power."""
        self.has_lost_log = False
        """True if the last process died and its write-ahead log is not there."""
        self.newest_intended = 0
        """The newest attempt of this process whose intent is committed."""

    @classmethod
    def open(cls, path: Path, *, job_name: str, job_path: Path, adopt: bool = False, is_durable: bool = False) -> Self:
        """Open a ledger, or create it readable by its owner alone.

        Args:
            is_durable: every commit survives a power cut, as a cap must.
        """
        with storage(path):
            if not path.exists():
                _create(Path(os.path.realpath(path)))
            wal = log_of(path)
            has_log = wal.exists() and wal.stat().st_size > 0
            db = sqlite3.connect(path, isolation_level=None)
            try:
                mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
                if mode != "wal":
                    raise StorageError(
                        f"{path}: this disk grants no write-ahead log (mode {mode}): a network share? "
                        "Set `ledger:` in the job to a path on a local disk"
                    )
                db.execute(f"PRAGMA synchronous={'FULL' if is_durable else 'NORMAL'}")
                db.execute("PRAGMA busy_timeout=10000")
                db.execute("PRAGMA cache_size=-8000")
                migrate(db, path)
                ledger = cls(db, path)
                ledger._own(job_name, job_path, adopt)
                ledger._settle_orphans()
                ledger.has_lost_log = ledger._has_died() and not has_log
                if not ledger.has_lost_log:
                    ledger._bury()
            except BaseException:
                db.close()
                raise
            return ledger

    @property
    def newest_attempt(self) -> int:
        """The id of the newest attempt that there is; 0 before the first."""
        return self._next_attempt - 1

    @property
    def invocation(self) -> int:
        """This process's; 0 before it began."""
        return self._invocation

    # --- runs and invocations -------------------------------------------------------------------------------

    def current_run(self, abandoned_before: int | None = None) -> Run:
        """The open run, or a new one.

        Args:
            abandoned_before: an open run that began no later than then is not gone on with. It stays open until
                `abandon_others`: what keeps the new one from sending anything must not cost the answers of the old.
        """
        with self._transaction():
            now = now_us()
            opened = self._db.execute(
                "SELECT run, run_id, started_at, "
                "EXISTS (SELECT 1 FROM attempt WHERE attempt.run = run.run) AS is_begun "
                "FROM run WHERE state = 'open' ORDER BY is_begun DESC, run DESC"
            ).fetchall()
            begun = [row for row in opened if row[3]]
            if begun:
                number, run_id, started_at, _ = begun[0]
                # One that is asked again had been finished: its answers are not thrown away for its age.
                if abandoned_before is None or started_at > abandoned_before or self._has_been_whole(number):
                    self._refuse_mixed(number, run_id)
                    return Run(number, run_id, started_at, "open", is_new=False)
            for number, run_id, started_at, _ in opened[len(begun) :]:
                # It has sent nothing. That of another day would put its output there.
                if abandoned_before is None and started_at // _DAY == now // _DAY:
                    return Run(number, run_id, started_at, "open", is_new=True)
            stamp = utc(now).strftime("%Y%m%dT%H%M%SZ")
            run_id = f"{stamp}-{secrets.token_hex(3)}"
            cursor = self._db.execute(
                "INSERT INTO run (run_id, started_at, state) VALUES (?, ?, 'open')", (run_id, now)
            )
            assert cursor.lastrowid is not None
            self._db.execute("UPDATE owner SET runs = runs + 1")
            return Run(cursor.lastrowid, run_id, now, "open", is_new=True)

    def _has_been_whole(self, run: int) -> bool:
        return bool(
            self._value(
                "SELECT 1 FROM invocation WHERE run = ? AND exit_code IN (0, 1) AND reason IS NOT 'sample' "
                "AND reason IS NOT 'input_changed' LIMIT 1",
                run,
            )
        )

    def abandon_others(self, run: Run) -> list[Run]:
        """Close the open runs but one; those that have sent anything. What they have spent stays."""
        with self._transaction():
            rows = self._db.execute(
                "SELECT run, run_id, started_at, EXISTS (SELECT 1 FROM attempt WHERE attempt.run = run.run) FROM run "
                "WHERE state = 'open' AND run <> ?",
                (run.run,),
            ).fetchall()
            self._db.execute(
                "UPDATE run SET state = 'abandoned', ended_at = ? WHERE state = 'open' AND run <> ?",
                (now_us(), run.run),
            )
        return [
            Run(number, run_id, began, "abandoned", is_new=False)
            for number, run_id, began, has_sent in rows
            if has_sent
        ]

    def reopen(self, run: Run) -> None:
        """Make a finished run the open one, so that its failed rows can be asked again."""
        with self._transaction():
            # A newer one that is open has sent nothing: it never got as far as its input.
            self._db.execute("UPDATE run SET state = 'abandoned' WHERE state = 'open'")
            self._db.execute("UPDATE run SET state = 'open', ended_at = NULL WHERE run = ?", (run.run,))

    def begin_invocation(self, run: Run, *, job: dict[str, Any], endpoint: str) -> None:
        """Record that a process works on a run."""
        self._bury()
        with self._transaction():
            text = _json(job)
            cursor = self._db.execute(
                "INSERT INTO invocation (run, started_at, version, pid, host, job, endpoint, seal) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (run.run, now_us(), __version__, os.getpid(), socket.gethostname(), text, endpoint,
                 seal((run.run, text, endpoint))),
            )  # fmt: skip
            assert cursor.lastrowid is not None
            self._invocation = cursor.lastrowid
        # That this process works on it must be in the file itself: it tells a lost log from one that never was. What
        # was in the log stays in it until it is overwritten.
        with storage(self.path):
            self._db.execute("PRAGMA wal_checkpoint(RESTART)")

    def reserve_room(self, answers: int) -> None:
        """Keep room on the disk for so many answers: where it gets full, those in flight must still find a place.

        Raises:
            StorageError: the disk is full already.
        """
        with storage(self.path):
            try:
                fill(self._reserve, min(_MOST_ROOM, max(_LEAST_ROOM, answers * _ROOM_PER_ANSWER)))
            except OSError as exc:
                if exc.errno != errno.EFBIG:  # a limit for each file is no full disk
                    raise

    def make_room(self) -> None:
        """Give back what was reserved: what is in flight is to be recorded yet.

        If that was not enough, the write-ahead log is folded in. Not before: it takes up more of a full disk, and helps
        only where the log itself may not grow.
        """
        with suppress(OSError, sqlite3.Error):
            if self._reserve.exists():
                self._reserve.unlink()
            else:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def release_room(self) -> None:
        """Nothing is in flight any more: what was reserved is for whoever needs it."""
        with suppress(OSError):
            self._reserve.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; SQLite folds the write-ahead log into it."""
        self.release_room()
        super().close()

    def keep_prices(self, prices: dict[str, Any]) -> None:
        """Record the prices that this invocation reckons with."""
        with self._transaction():
            self._db.execute("UPDATE invocation SET prices = ? WHERE invocation = ?", (_json(prices), self._invocation))

    def forget_input(self, run: Run) -> None:
        """Take back that a run has got as far as its input, if it has sent nothing."""
        with self._transaction():
            self._db.execute(
                "UPDATE run SET input = NULL WHERE run = ? AND attempts = 0 "
                "AND NOT EXISTS (SELECT 1 FROM attempt WHERE attempt.run = run.run)",
                (run.run,),
            )

    def note_output(self, run: Run) -> None:
        """Note that the output says what the ledger does."""
        with self._transaction():
            self._db.execute("UPDATE run SET is_written = 1 WHERE run = ?", (run.run,))

    def end_invocation(self, run: Run, *, exit_code: int, reason: str | None, is_finished: bool) -> None:
        """Record how the invocation ended, and the run with it if every slot is ok or failed."""
        with self._transaction():
            now = now_us()
            self._db.execute(
                "UPDATE invocation SET ended_at = ?, exit_code = ?, reason = ? WHERE invocation = ?",
                (now, int(exit_code), reason, self._invocation),
            )
            if is_finished:
                self._db.execute("UPDATE run SET state = 'finished', ended_at = ? WHERE run = ?", (now, run.run))

    # --- what the input asks for ----------------------------------------------------------------------------

    def keep_input(self, run: Run) -> None:
        """Note that this invocation found the input as it had been placed."""
        with self._transaction():
            self._keep_input(run)

    def _keep_input(self, run: Run) -> None:
        self._db.execute(
            "UPDATE invocation SET input = (SELECT input FROM run WHERE run = ?) WHERE invocation = ?",
            (run.run, self._invocation),
        )

    def place(
        self, run: Run, asked: Iterable[Asked], found: Callable[[], dict[str, Any]], *, reuses: bool = False
    ) -> int:
        """Take what the input asks for now, and find every group of the run the row that it stands in.

        Args:
            asked: drawn once, in the order of the input; only keys are kept, on disk and for this call. Without keys,
                if there are no groups and nothing is reused.
            reuses: slots without an answer take one that has the same key and sample, of this run or an earlier one;
                of those that have none, only the first is to be asked.
            found: called after the last row: what the input is known by; kept with the number of rows.

        Returns:
            The number of rows.
        """
        needs_keys = self.has_answers() or reuses
        rows = 0
        self._execute_script(
            "DROP TABLE IF EXISTS temp.asked; CREATE TEMP TABLE asked ("
            "row_index INTEGER, model TEXT, sample INTEGER, key TEXT, PRIMARY KEY (row_index, model, sample)"
            ") WITHOUT ROWID;"
        )
        with self._transaction():
            self._db.execute("DELETE FROM row_fault WHERE run = ?", (run.run,))
            for some in asked:
                rows += some.rows
                faults = [(run.run, *fault.slot, fault.error) for fault in some.faults]
                self._db.executemany("INSERT INTO row_fault VALUES (?, ?, ?, ?, ?)", faults)
                if needs_keys:
                    keys = [(*slot, key) for slot, key in some.keys]
                    self._db.executemany("INSERT INTO temp.asked VALUES (?, ?, ?, ?)", keys)
            self._db.execute("DELETE FROM moved WHERE run = ?", (run.run,))
            self._db.execute("DELETE FROM reused WHERE run = ?", (run.run,))
            if needs_keys:
                for statement in _PLACE.format(run=run.run).split(";"):
                    self._db.execute(statement)
            if reuses:
                unpruned = UNPRUNED if self.is_pruned() else ""
                for statement in _REUSE.format(run=run.run, unpruned=unpruned).split(";"):
                    self._db.execute(statement)
            if needs_keys:
                self._db.execute(
                    # What was answered or refused before is settled by that.
                    "DELETE FROM row_fault WHERE run = :run AND (row_index, model, sample) IN "
                    f"(SELECT at, model, sample FROM ({self.standing_sql(run)}) GROUP BY at, model, sample "
                    f"HAVING max(outcome = 'ok') OR {NEWEST_IS_FINAL})",
                    everywhere(run),
                )
            text = _json({**found(), "rows": rows})
            self._db.execute("UPDATE run SET input = ?, is_written = 0 WHERE run = ?", (text, run.run))
            self._keep_input(run)
        return rows

    # --- attempts -------------------------------------------------------------------------------------------

    def intent(self, run: Run, request: Request, number: int, reservation: Reservation) -> Intent:
        """A new attempt, not yet recorded: `commit` it before it is sent. `number`: counted from 1 within the slot."""
        attempt_id = self._next_attempt
        self._next_attempt += 1
        client_request_id = f"{run.run_id}:{request.slot.row_index}:{attempt_id}"
        recorded = (
            attempt_id, run.run, self._invocation, *request.group, request.key, number, client_request_id,
            reservation.made_at, len(request.body), reservation.pico, request.repair, request.repair_key,
        )  # fmt: skip
        return Intent(attempt_id, request, reservation.made_at, client_request_id, reservation.pico, recorded)

    def commit(self, run: Run, settlements: Sequence[Settlement], intents: Sequence[Intent]) -> None:
        """Settle what arrived and record what goes next, in one transaction.

        Raises:
            BrokenPromiseError: an attempt was settled twice or never recorded, or its slot is answered already.
        """
        settled = [self._sealed(settlement) for settlement in settlements]
        with self._transaction():
            if settled:
                if self._db.executemany(_SETTLE, settled).rowcount != len(settled):
                    self._refuse_replaced()  # another process has settled them, and may be at work
                    raise BrokenPromiseError(
                        Promise.INTENT_FIRST, "an answer belongs to no attempt that is in flight", self.path
                    )
                self._db.executemany(
                    "INSERT INTO answer (attempt_id, size, body) VALUES (?, ?, ?)",
                    [
                        (settlement.intent.attempt_id, settlement.exchange.body.size, settlement.exchange.body.packed)
                        for settlement in settlements
                        if settlement.exchange.body.size
                    ],
                )
                self._note_repairs(run, settlements)
            if intents:
                self._db.executemany(_INTEND, [intent.recorded for intent in intents])
                if self._db.execute(_IS_ANSWERED, (intents[0].attempt_id,)).fetchone() is not None:
                    raise BrokenPromiseError(
                        Promise.PAID_ONCE, "a row that has its answer was about to be asked again", self.path
                    )
            self._count(run, len(intents), [values[-2] for values in settled])
        self.is_dirty = True
        if intents:
            self.newest_intended = intents[-1].attempt_id

    def _note_repairs(self, run: Run, settlements: Sequence[Settlement]) -> None:
        for settlement in settlements:
            request = settlement.intent.request
            if settlement.repair_wanted is not None:
                values = (run.run, *request.group, request.key, settlement.repair_wanted)
                self._db.execute("INSERT OR REPLACE INTO repair_wanted VALUES (?, ?, ?, ?, ?, ?)", values)
            elif request.repair and settlement.is_final:
                self._db.execute(_FORGET_REPAIR, (run.run, *request.group, request.key))

    def change_repairs(self, run: Run, needless: Iterable[Group], wanted: Iterable[tuple[Group, int]]) -> None:
        """Record which answers are to be asked for again after all, for the how many-th time, and which are not."""
        with self._transaction():
            self._db.executemany(_FORGET_REPAIR, [(run.run, *slot, key) for slot, key in needless])
            self._db.executemany(
                "INSERT OR REPLACE INTO repair_wanted VALUES (?, ?, ?, ?, ?, ?)",
                [(run.run, *slot, key, repair) for (slot, key), repair in wanted],
            )

    def drop_reused(self, run: Run, slots: Iterable[Slot]) -> None:
        """These slots do not take another's answer: they are to be asked."""
        with self._transaction():
            self._db.executemany(
                "DELETE FROM reused WHERE run = ? AND row_index = ? AND model = ? AND sample = ?",
                [(run.run, *slot) for slot in slots],
            )

    def note_labels(self, run: Run, labels: dict[str, int]) -> None:
        """Record how often a run gave each label."""
        with self._transaction():
            self._db.execute("UPDATE run SET labels = ? WHERE run = ?", (_json(labels), run.run))

    def sync(self) -> None:
        """Bring the write-ahead log to the disk: what was committed before survives a power cut."""
        self.is_dirty = False
        self._refuse_replaced()
        with storage(self.path):
            try:
                fd = os.open(log_of(self.path), os.O_RDONLY)
            except FileNotFoundError:
                return
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    # --- what is learnt later -------------------------------------------------------------------------------

    def correct(
        self, origin: str, found: Iterable[tuple[int, Decimal, str]], prices: dict[str, Any] | None = None
    ) -> int:
        """Record what attempts cost, as it was learnt after they were settled; all of it or nothing. Their number.

        Args:
            origin: `reconcile` (the provider's word) or `reprice` (ours).
            found: attempt id, dollars, cost source; it may read the ledger, but not what is corrected here.
            prices: those used, by model.
        """
        with self._transaction():
            number = seals = 0
            cursor = self._db.execute(
                "INSERT INTO amendment (origin, amended_at, after_attempt, prices, corrections, seals) "
                "VALUES (?, ?, ?, ?, 0, 0)",
                (origin, now_us(), self.newest_attempt, _json(prices) if prices else None),
            )
            amendment = cursor.lastrowid
            for attempt_id, usd, cost_source in found:
                values = (attempt_id, amendment, to_pico(usd), cost_source)
                self._db.execute("INSERT INTO correction VALUES (?, ?, ?, ?)", values)
                number, seals = number + 1, (seals + seal(values)) & SEAL_MASK
            if number:
                self._db.execute(
                    "UPDATE amendment SET corrections = ?, seals = ? WHERE amendment = ?", (number, seals, amendment)
                )
                self._db.execute("UPDATE owner SET amendments = amendments + 1")
                self._db.execute("UPDATE run SET is_written = 0")
            else:
                self._db.execute("DELETE FROM amendment WHERE amendment = ?", (amendment,))
        return number

    def keep_price_list(self, url: str, etag: str | None, body: bytes) -> None:
        """Keep a provider's list for the next invocation."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO price_list VALUES (?, ?, ?, ?)",
                (url, etag, now_us(), Packer().pack(body).packed),
            )

    def take_billed(self, lines: Iterable[tuple[int, str, str, Decimal]]) -> int:
        """Hold lines of the provider's log in memory that spills to disk, for `accounts.compared`; their number.

        Args:
            lines: the attempt that it names, our request id, the line's identity, dollars.
        """
        self._execute_script(
            "DROP TABLE IF EXISTS temp.billed; CREATE TEMP TABLE billed (attempt_id INTEGER, client_request_id TEXT, "
            "identity TEXT, usd_pico INTEGER, PRIMARY KEY (attempt_id, client_request_id, identity)) WITHOUT ROWID;"
        )
        for attempt_id, client_request_id, identity, usd in lines:
            with storage(self.path):
                # A page may show a line again that the page before had.
                self._db.execute(
                    "INSERT OR IGNORE INTO temp.billed VALUES (?, ?, ?, ?)",
                    (attempt_id, client_request_id, identity, to_pico(usd)),
                )
        # What a salvaged ledger has lost is known by its number alone.
        self._execute_script(
            "UPDATE OR IGNORE temp.billed SET client_request_id = 'lost:' || attempt_id WHERE EXISTS (SELECT 1 FROM "
            "attempt WHERE attempt.attempt_id = billed.attempt_id "
            "AND attempt.client_request_id = 'lost:' || billed.attempt_id);"
        )
        return int(self._value("SELECT count(*) FROM temp.billed"))

    # --- inside ---------------------------------------------------------------------------------------------

    @staticmethod
    def _sealed(settlement: Settlement) -> tuple[Any, ...]:
        values = _outcome(
            settlement.exchange,
            settlement.settled_at,
            is_final=settlement.is_final,
            held_pico=settlement.held_pico,
            settled_after=settlement.settled_after,
        )
        sealed = attempt_seal(settlement.intent.recorded, values, settlement.exchange.body.digest)
        return (*values, sealed, settlement.intent.attempt_id)

    def _count(self, run: Run, intents: int, seals: Sequence[int]) -> None:
        """Keep the run's own count of its attempts, by which `verify` tells a missing one."""
        self._db.execute(
            "UPDATE run SET attempts = attempts + ?, settled = settled + ?, seals = (seals + ?) & ?, is_written = 0 "
            "WHERE run = ?",
            (intents, len(seals), sum(seals) & SEAL_MASK, SEAL_MASK, run.run),
        )

    def _refuse_replaced(self) -> None:
        """What is written to a file that has been deleted or replaced is lost with this process.

        And without its lock file nothing keeps another process away.
        """
        for file, identity in self._files.items():
            try:
                now = _identity(file)
            except OSError as exc:
                raise StorageError(f"{file} has gone while the run went on: {exc.strerror}") from exc
            if now != identity:
                raise StorageError(f"{file} has been replaced while the run went on")

    def _own(self, job_name: str, job_path: Path, adopt: bool) -> None:
        """Refuse a ledger that is another job's. The path is kept relative: a moved project keeps its ledgers."""
        relative = os.path.relpath(job_path, self.path.parent)
        with self._transaction():
            owner = self._db.execute("SELECT job_name, job_path FROM owner").fetchone()
            if owner is None:
                self._db.execute("INSERT INTO owner (job_name, job_path) VALUES (?, ?)", (job_name, relative))
            elif owner != (job_name, relative):
                if not adopt:
                    raise JobError(
                        f"{self.path} is the ledger of the job {owner[0]!r} in {self.path.parent / owner[1]}: give "
                        "this job another `name:` or `ledger:`; or, if the job file has moved, add --adopt-ledger"
                    )
                self._db.execute("UPDATE owner SET job_name = ?, job_path = ?", (job_name, relative))

    def _settle_orphans(self) -> None:
        """What a dead process left in flight has an unknown outcome: nobody else can be sending, under the lock."""
        never_came = Exchange("unknown", failure=Failure("interrupted", Action.RETRY, _ORPHANED))
        with self._transaction():
            orphans = self._db.execute(f"SELECT {', '.join(INTENT_COLUMNS)} FROM attempt WHERE outcome IS NULL")
            for intended in orphans.fetchall():
                values = _outcome(
                    never_came, now_us(), is_final=False, held_pico=None, settled_after=self.newest_attempt
                )
                sealed = attempt_seal(intended, values, NOTHING.digest)
                self._db.execute(_SETTLE, (*values, sealed, intended[0]))
                self._count(Run(intended[1], "", 0, "", is_new=False), 0, [sealed])

    def _refuse_mixed(self, run: int, run_id: str) -> None:
        """A write-ahead log that was cut can put old pages over new ones, and each for itself is sound."""
        counted, found = (
            self._value("SELECT attempts FROM run WHERE run = ?", run),
            self._value("SELECT count(*) FROM attempt WHERE run = ?", run),
        )
        if counted != found:
            raise StorageError(
                f"the ledger {self.path} has been damaged: run {run_id} made {counted} attempts, and {found} are "
                "there; `batchrun salvage JOB` saves what can be read"
            )

    def _has_died(self) -> bool:
        """True if the last process died at work, and nobody has noted it."""
        newest = "invocation = (SELECT max(invocation) FROM invocation)"
        return (
            self._value(f"SELECT 1 FROM invocation WHERE {newest} AND ended_at IS NULL AND reason IS NULL") is not None
        )

    def _bury(self) -> None:
        with self._transaction():
            self._db.execute("UPDATE invocation SET reason = 'died' WHERE ended_at IS NULL AND reason IS NULL")

    def _execute_script(self, sql: str) -> None:
        with storage(self.path):
            self._db.executescript(sql)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with storage(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


_INTEND = f"INSERT INTO attempt ({', '.join(INTENT_COLUMNS)}) VALUES ({', '.join('?' * len(INTENT_COLUMNS))})"
# Of all new attempts at once, before they are committed: what would be paid for twice is not even recorded.
_IS_ANSWERED = f"""
    SELECT 1 FROM attempt WHERE attempt_id >= ? AND EXISTS (
        SELECT 1 FROM attempt AS answered WHERE {same_group("answered", "attempt")}
        AND answered.outcome = 'ok' AND answered.repair >= attempt.repair)
    LIMIT 1
"""
_SETTLE = f"""
    UPDATE attempt SET {", ".join(f"{name} = ?" for name in SETTLEMENT_COLUMNS)}, seal = ?
    WHERE attempt_id = ? AND outcome IS NULL
"""
_FORGET_REPAIR = f"DELETE FROM repair_wanted WHERE {' AND '.join(f'{name} = ?' for name in GROUP_COLUMNS)}"
_DAY = 86_400_000_000
_ORPHANED = "the process ended before an answer came"

# Groups whose row asks for another key now, each given a row that asks for its key and has no answer: answered groups
# first, then failed ones, in the order of the rows. to_row stays null where no such row is left.
_PLACE = """
    DROP TABLE IF EXISTS temp.grouped;
    CREATE TEMP TABLE grouped (
        row_index INTEGER, model TEXT, sample INTEGER, key TEXT, ok INTEGER, final INTEGER,
        PRIMARY KEY (row_index, model, sample, key)
    ) WITHOUT ROWID;
    INSERT INTO temp.grouped
        SELECT row_index, model, sample, key, max(outcome = 'ok'), max(final) FROM attempt
        WHERE run = {run} GROUP BY row_index, model, sample, key;
    DROP TABLE IF EXISTS temp.displaced;
    CREATE TEMP TABLE displaced AS
        SELECT * FROM temp.grouped WHERE NOT EXISTS (
            SELECT 1 FROM temp.asked WHERE asked.row_index = grouped.row_index
            AND asked.model = grouped.model AND asked.sample = grouped.sample AND asked.key = grouped.key);
    INSERT INTO moved (run, row_index, model, sample, key, to_row)
        WITH wanting AS (
            SELECT row_index, model, sample, key FROM temp.asked
            WHERE key IN (SELECT key FROM temp.displaced) AND NOT EXISTS (
                SELECT 1 FROM temp.grouped WHERE grouped.row_index = asked.row_index
                AND grouped.model = asked.model AND grouped.sample = asked.sample
                AND grouped.key = asked.key AND grouped.ok)
        ),
        offered AS (
            SELECT *, row_number() OVER (
                PARTITION BY key, model, sample ORDER BY ok DESC, final DESC, row_index) AS place
            FROM temp.displaced
        ),
        open_slots AS (
            SELECT *, row_number() OVER (PARTITION BY key, model, sample ORDER BY row_index) AS place FROM wanting
        )
        SELECT {run}, offered.row_index, offered.model, offered.sample, offered.key, open_slots.row_index
        FROM offered LEFT JOIN open_slots USING (key, model, sample, place);
    DROP TABLE temp.grouped;
    DROP TABLE temp.displaced
"""

# Slots that are asked and not settled by attempts of their own: they take the newest answer with the same key and
# sample; where there is none, they follow the first of them. Its attempts will all stand in its own row.
_REUSE = """
    DROP TABLE IF EXISTS temp.wanting;
    CREATE TEMP TABLE wanting (
        key TEXT, sample INTEGER, row_index INTEGER, model TEXT, PRIMARY KEY (key, sample, row_index, model)
    ) WITHOUT ROWID;
    INSERT INTO temp.wanting SELECT key, sample, row_index, model FROM temp.asked WHERE NOT EXISTS (
            SELECT 1 FROM attempt WHERE run = {run} AND attempt.row_index = asked.row_index
            AND attempt.model = asked.model AND attempt.sample = asked.sample AND attempt.key = asked.key
            AND outcome = 'ok')
        AND NOT EXISTS (
            SELECT 1 FROM moved JOIN attempt USING (run, row_index, model, sample, key)
            WHERE moved.run = {run} AND to_row = asked.row_index AND moved.model = asked.model
            AND moved.sample = asked.sample AND moved.key = asked.key AND final);
    INSERT INTO reused
        SELECT {run}, wanting.row_index, wanting.model, sample, key, found.run, found.row_index
        FROM (
            SELECT attempt.key, attempt.sample, max(attempt_id), attempt.run, attempt.row_index
            FROM attempt WHERE outcome = 'ok' AND EXISTS (
                SELECT 1 FROM temp.wanting WHERE wanting.key = attempt.key AND wanting.sample = attempt.sample)
                {unpruned}
            GROUP BY attempt.key, attempt.sample
        ) AS found JOIN temp.wanting USING (key, sample);
    INSERT OR IGNORE INTO reused
        SELECT {run}, wanting.row_index, wanting.model, sample, key, {run}, first.row_index
        FROM (
            SELECT key, sample, min(row_index) AS row_index FROM temp.wanting GROUP BY key, sample HAVING count(*) > 1
        ) AS first JOIN temp.wanting USING (key, sample)
        WHERE wanting.row_index > first.row_index;
    DROP TABLE temp.wanting
"""


def _create(path: Path) -> None:
    """Make an empty ledger that appears with all its tables, or not at all: one without them has been damaged."""
    wal = log_of(path)
    if wal.exists() and wal.stat().st_size:
        raise StorageError(
            f"{path} is missing, and its write-ahead log {wal.name} is there: bring the ledger back; or, if its "
            f"answers may be paid for again, delete {wal.name}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    try:
        create(beside).close()
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _outcome(
    exchange: Exchange, settled_at: int, *, is_final: bool, held_pico: int | None, settled_after: int | None
) -> tuple[Any, ...]:
    """The values of SETTLEMENT_COLUMNS."""
    usage, failure, usd = exchange.usage, exchange.failure, exchange.cost.usd
    return (
        settled_at, exchange.outcome, int(is_final), exchange.status,
        failure.kind if failure else None, str(failure) if failure else None,
        usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.cached_tokens,
        usage.cache_write_tokens, usage.reasoning_tokens,
        to_pico(usd) if usd is not None else None, exchange.cost.source, exchange.request_id,
        _microseconds(exchange.latency_seconds or None), _microseconds(exchange.first_token_seconds),
        int(exchange.streamed), ",".join(exchange.flags) or None, held_pico, settled_after,
    )  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _microseconds(seconds: float | None) -> int | None:
    return round(seconds * 1e6) if seconds is not None else None
