"""The ledger: one SQLite file per job, the only state there is.

An attempt is inserted as an intent before its request is sent, completed once when it is settled, and never altered
after. Everything else (what is answered, what was spent, what must be asked) is read from the attempts.

Attempts with the same (run, row index, model, sample, key) are a *group*. A group stands in the slot of its own row
index as long as that row still asks for its key. Where rows were inserted, deleted or edited since, `place` finds the
groups a new row, or none, and writes the exceptions down in the table `moved`.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from batchrun import __version__
from batchrun.errors import JobError, StorageError
from batchrun.migrations import migrate
from batchrun.money import from_pico, to_pico
from batchrun.records import Intent, Request, RowFault, Settlement, Slot, StandingAttempt, Totals


class Run(NamedTuple):
    """A run: the invocations that together answer every slot once."""

    run: int
    run_id: str
    started_at: int
    state: str
    is_new: bool
    """Nothing has been sent for it yet."""


class SlotState(NamedTuple):
    """What the ledger knows of a slot before it is asked."""

    is_answered: bool
    is_failed: bool
    tries: int


class EarlierAnswers(NamedTuple):
    """Slots of a new run that earlier runs have answered."""

    slots: int
    run_id: str
    usd: Decimal | None
    """What those answers cost then; None if that is not known for all."""


def now_us() -> int:
    """Microseconds since 1970, UTC."""
    return int(datetime.now(UTC).timestamp() * 1_000_000)


class Ledger:
    """One job's ledger, open for writing; its lock is the caller's business.

    Raises:
        StorageError: from every method, when the file cannot be read or written.
        JobError: from `open`, when the ledger is another job's.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = connection
        self.path = path
        status = path.stat()
        self._file = (status.st_dev, status.st_ino)
        self._next_attempt = 1 + (self._value("SELECT max(attempt_id) FROM attempt") or 0)
        self._compressor = zstandard.ZstdCompressor(level=3)
        self._invocation = 0
        self.is_dirty = False
        """True if commits since the last `sync` would be lost with the power."""

    @classmethod
    def open(cls, path: Path, *, job_name: str, job_path: Path, adopt: bool = False) -> Ledger:
        """Open a ledger, or create it readable by its owner alone."""
        with _storage(path):
            is_new = not path.exists()
            if is_new:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            db = sqlite3.connect(path, isolation_level=None)
            try:
                mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
                if mode != "wal":
                    raise StorageError(
                        f"{path}: this disk grants no write-ahead log (mode {mode}): a network share? "
                        "Set `ledger:` in the job to a path on a local disk"
                    )
                db.execute("PRAGMA synchronous=NORMAL")
                db.execute("PRAGMA busy_timeout=10000")
                db.execute("PRAGMA cache_size=-16000")
                migrate(db, path)
                ledger = cls(db, path)
                ledger._own(job_name, job_path, adopt)
                ledger._settle_orphans()
            except BaseException:
                db.close()
                raise
            return ledger

    def close(self) -> None:
        """Close the file; SQLite folds the write-ahead log into it."""
        with _storage(self.path):
            self._db.close()

    # --- runs and invocations -------------------------------------------------------------------------------

    def current_run(self) -> Run:
        """The open run, or a new one."""
        with self._transaction():
            row = self._db.execute(
                "SELECT run, run_id, started_at, NOT EXISTS (SELECT 1 FROM attempt WHERE attempt.run = run.run) "
                "FROM run WHERE state = 'open' ORDER BY run DESC LIMIT 1"
            ).fetchone()
            if row is not None:
                return Run(row[0], row[1], row[2], "open", is_new=bool(row[3]))
            started = now_us()
            stamp = datetime.fromtimestamp(started / 1e6, UTC).strftime("%Y%m%dT%H%M%SZ")
            run_id = f"{stamp}-{secrets.token_hex(3)}"
            cursor = self._db.execute(
                "INSERT INTO run (run_id, started_at, state) VALUES (?, ?, 'open')", (run_id, started)
            )
            assert cursor.lastrowid is not None
            return Run(cursor.lastrowid, run_id, started, "open", is_new=True)

    def last_run(self) -> Run | None:
        """The newest run that has got as far as its input, open or not; None if there never was one."""
        with _storage(self.path):
            row = self._db.execute(
                "SELECT run, run_id, started_at, state FROM run WHERE input IS NOT NULL ORDER BY run DESC LIMIT 1"
            ).fetchone()
        return Run(row[0], row[1], row[2], row[3], is_new=False) if row else None

    def reopen(self, run: Run) -> None:
        """Make a finished run the open one, so that its failed rows can be asked again."""
        with self._transaction():
            # A newer one that is open has sent nothing: it never got as far as its input.
            self._db.execute("UPDATE run SET state = 'abandoned' WHERE state = 'open'")
            self._db.execute("UPDATE run SET state = 'open', ended_at = NULL WHERE run = ?", (run.run,))

    def begin_invocation(self, run: Run, *, job: dict[str, Any], endpoint: str, prices: dict[str, Any] | None) -> None:
        """Record that a process works on a run."""
        with self._transaction():
            cursor = self._db.execute(
                "INSERT INTO invocation (run, started_at, version, pid, host, job, endpoint, prices) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    run.run, now_us(), __version__, os.getpid(), socket.gethostname(), _json(job), endpoint,
                    _json(prices) if prices else None,
                ),
            )  # fmt: skip
            assert cursor.lastrowid is not None
            self._invocation = cursor.lastrowid

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

    def last_snapshot(self, run: Run) -> tuple[dict[str, Any], str, str | None] | None:
        """Job, endpoint identity and end reason of a run's newest invocation that had checked its input."""
        with _storage(self.path):
            row = self._db.execute(
                "SELECT job, endpoint, reason FROM invocation WHERE run = ? AND input IS NOT NULL "
                "ORDER BY invocation DESC LIMIT 1",
                (run.run,),
            ).fetchone()
        return (json.loads(row[0]), row[1], row[2]) if row else None

    # --- what the input asks for ----------------------------------------------------------------------------

    def placed_input(self, run: Run) -> dict[str, Any] | None:
        """The input that the run's groups are placed by, with its number of `rows`; None before the first `place`."""
        text = self._value("SELECT input FROM run WHERE run = ?", run.run)
        found = json.loads(text) if text is not None else None
        assert found is None or isinstance(found, dict)
        return found

    def keep_input(self, run: Run) -> None:
        """Note that this invocation found the input as it had been placed."""
        with self._transaction():
            self._keep_input(run)

    def _keep_input(self, run: Run) -> None:
        self._db.execute(
            "UPDATE invocation SET input = (SELECT input FROM run WHERE run = ?) WHERE invocation = ?",
            (run.run, self._invocation),
        )

    def has_answers(self) -> bool:
        """True if any run of the job has an attempt: only then do the keys of the input matter."""
        return self._value("SELECT 1 FROM attempt LIMIT 1") is not None

    def place(self, run: Run, slots: Iterable[Request | RowFault], found: dict[str, Any]) -> int:
        """Take what the input asks for now, and find every group of the run the row that it stands in.

        Args:
            slots: drawn once, in the order of the input; only their keys are kept, on disk and for this call.
            found: what the input is known by; kept in the same transaction, with the number of rows.

        Returns:
            The number of slots.
        """
        needs_keys = self.has_answers()
        rows = 0
        self._execute_script(
            "DROP TABLE IF EXISTS temp.asked; CREATE TEMP TABLE asked ("
            "row_index INTEGER, model TEXT, sample INTEGER, key TEXT, PRIMARY KEY (row_index, model, sample)"
            ") WITHOUT ROWID;"
        )
        with self._transaction():
            self._db.execute("DELETE FROM row_fault WHERE run = ?", (run.run,))
            for chunk in _chunks(slots, 1024):
                rows += len(chunk)
                faults = [(run.run, *item.slot, item.error) for item in chunk if isinstance(item, RowFault)]
                self._db.executemany("INSERT INTO row_fault VALUES (?, ?, ?, ?, ?)", faults)
                if needs_keys:
                    keys = [(*item.slot, item.key) for item in chunk if isinstance(item, Request)]
                    self._db.executemany("INSERT INTO temp.asked VALUES (?, ?, ?, ?)", keys)
            self._db.execute("DELETE FROM moved WHERE run = ?", (run.run,))
            if needs_keys:
                for statement in _PLACE.format(run=run.run).split(";"):
                    self._db.execute(statement)
            self._db.execute("UPDATE run SET input = ? WHERE run = ?", (_json({**found, "rows": rows}), run.run))
            self._keep_input(run)
        return rows

    def earlier_answers(self, run: Run) -> EarlierAnswers | None:
        """Slots that the last `place` saw and that earlier runs have answered."""
        with _storage(self.path):
            row = self._db.execute(
                """
                WITH earlier AS (
                    SELECT key, sample, max(run) AS run, avg(usd_pico) AS usd_pico
                    FROM attempt WHERE outcome = 'ok' AND run <> :run GROUP BY key, sample
                )
                SELECT count(*), max(earlier.run), sum(usd_pico), count(usd_pico)
                FROM temp.asked JOIN earlier USING (key, sample)
                """,
                {"run": run.run},
            ).fetchone()
            if not row[0]:
                return None
            run_id = self._value("SELECT run_id FROM run WHERE run = ?", row[1])
        return EarlierAnswers(row[0], run_id, from_pico(round(row[2])) if row[3] == row[0] else None)

    def states(self, run: Run, start: int, stop: int) -> dict[Slot, SlotState]:
        """The slots of rows `start` ≤ index < `stop` that have been asked, or cannot be."""
        found: dict[Slot, SlotState] = {}
        with _storage(self.path):
            rows = self._db.execute(
                f"SELECT at, model, sample, max(outcome = 'ok'), {_NEWEST_IS_FINAL}, count(*) "
                f"FROM ({self._standing(run)}) GROUP BY at, model, sample",
                {"run": run.run, "start": start, "stop": stop},
            )
            for at, model, sample, is_ok, is_final, tries in rows:
                found[Slot(at, model, sample)] = SlotState(bool(is_ok), bool(is_final) and not is_ok, tries)
            faults = self._db.execute(
                "SELECT row_index, model, sample FROM row_fault WHERE run = ? AND row_index >= ? AND row_index < ?",
                (run.run, start, stop),
            )
            for fault in faults:
                found[Slot(*fault)] = SlotState(False, True, 0)
        return found

    # --- attempts -------------------------------------------------------------------------------------------

    def intent(self, run: Run, request: Request, number: int) -> Intent:
        """A new attempt, not yet recorded: `commit` it before it is sent."""
        attempt_id = self._next_attempt
        self._next_attempt += 1
        return Intent(attempt_id, request, number, now_us(), f"{run.run_id}:{request.slot.row_index}:{attempt_id}")

    def commit(self, run: Run, settlements: Sequence[Settlement], intents: Sequence[Intent]) -> None:
        """Settle what arrived and record what goes next, in one transaction."""
        with self._transaction():
            if settlements:
                self._db.executemany(_SETTLE, [_settled(settlement) for settlement in settlements])
                self._db.executemany(
                    "INSERT INTO answer VALUES (?, ?, ?)",
                    [
                        (
                            settlement.intent.attempt_id,
                            len(settlement.exchange.body),
                            self._compressor.compress(settlement.exchange.body),
                        )
                        for settlement in settlements
                        if settlement.exchange.body
                    ],
                )
            if intents:
                self._db.executemany(
                    "INSERT INTO attempt (attempt_id, run, invocation, row_index, model, sample, key, number, "
                    "client_request_id, sent_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        (
                            intent.attempt_id, run.run, self._invocation, *intent.request.slot, intent.request.key,
                            intent.number, intent.client_request_id, intent.sent_at,
                        )
                        for intent in intents
                    ],
                )  # fmt: skip
        self.is_dirty = True

    def sync(self) -> None:
        """Bring the write-ahead log to the disk: what was committed before survives a power cut."""
        self.is_dirty = False
        self._refuse_replaced()
        wal = self.path.with_name(f"{self.path.name}-wal")
        with _storage(self.path):
            try:
                fd = os.open(wal, os.O_RDONLY)
            except FileNotFoundError:
                return
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _refuse_replaced(self) -> None:
        """What is written to a file that has been deleted or replaced is lost with this process."""
        try:
            status = self.path.stat()
        except OSError as exc:
            raise StorageError(f"the ledger {self.path} has gone while the run went on: {exc.strerror}") from exc
        if (status.st_dev, status.st_ino) != self._file:
            raise StorageError(f"the ledger {self.path} has been replaced while the run went on")

    # --- reading --------------------------------------------------------------------------------------------

    def standing(self, run: Run, start: int, stop: int) -> Iterator[StandingAttempt]:
        """Settled attempts of the slots in rows `start` ≤ index < `stop`, slot by slot, oldest first."""
        decompress = zstandard.ZstdDecompressor().decompress
        with _storage(self.path):
            rows = self._db.execute(
                f"""
                SELECT at, model, sample, standing.attempt_id, key, client_request_id, settled_at, outcome, final,
                    error, prompt_tokens, completion_tokens, total_tokens, cached_tokens, reasoning_tokens, usd_pico,
                    cost_source, request_id, latency_us, first_token_us, streamed, flags,
                    CASE outcome WHEN 'ok' THEN body END
                FROM ({self._standing(run)}) AS standing LEFT JOIN answer USING (attempt_id)
                ORDER BY at, model, sample, standing.attempt_id
                """,
                {"run": run.run, "start": start, "stop": stop},
            )
            for row in rows:
                at, model, sample, attempt_id, key, client_request_id, settled_at, outcome, final, error = row[:10]
                usd_pico, cost_source, request_id, latency_us, first_token_us, streamed, flags, body = row[15:]
                yield StandingAttempt(
                    slot=Slot(at, model, sample),
                    attempt_id=attempt_id,
                    key=key,
                    client_request_id=client_request_id,
                    settled_at=settled_at,
                    outcome=outcome,
                    is_final=bool(final),
                    error=error,
                    usage=row[10:15],
                    usd=_usd(usd_pico),
                    cost_source=cost_source,
                    request_id=request_id,
                    latency_seconds=_seconds(latency_us),
                    first_token_seconds=_seconds(first_token_us),
                    streamed=bool(streamed),
                    flags=tuple(flags.split(",")) if flags else (),
                    body=decompress(body) if body is not None else None,
                )

    def answer_bytes(self, run: Run, start: int, stop: int) -> int:
        """Size of the answers in rows `start` ≤ index < `stop`."""
        with _storage(self.path):
            size: int = self._db.execute(
                f"SELECT coalesce(sum(size), 0) FROM ({self._standing(run)}) AS standing "
                "JOIN answer USING (attempt_id) WHERE outcome = 'ok'",
                {"run": run.run, "start": start, "stop": stop},
            ).fetchone()[0]
        return size

    def row_faults(self, run: Run, start: int, stop: int) -> dict[Slot, str]:
        """Rows that give no request, with the reason."""
        with _storage(self.path):
            rows = self._db.execute(
                "SELECT row_index, model, sample, error FROM row_fault "
                "WHERE run = ? AND row_index >= ? AND row_index < ?",
                (run.run, start, stop),
            ).fetchall()
        return {Slot(*row[:3]): row[3] for row in rows}

    def spent(self, run: Run) -> tuple[Decimal, int]:
        """Dollars and tokens of a run so far."""
        with _storage(self.path):
            high, low, tokens = self._db.execute(
                f"SELECT {_USD_SUM}, coalesce(sum(total_tokens), 0) FROM attempt WHERE run = ?", (run.run,)
            ).fetchone()
        return _summed(high, low), tokens

    def counts(self, run: Run) -> tuple[int, int]:
        """Rows of a run that are ok, and that are failed."""
        with _storage(self.path):
            ok, failed = self._db.execute(
                f"SELECT coalesce(sum(ok), 0), coalesce(sum(final AND NOT ok), 0) FROM ("
                f"SELECT max(outcome = 'ok') AS ok, {_NEWEST_IS_FINAL} AS final FROM ({self._standing(run)}) "
                f"GROUP BY at, model, sample)",
                _everywhere(run),
            ).fetchone()
        faults = self._value("SELECT count(*) FROM row_fault WHERE run = ?", run.run)
        return ok, failed + faults

    def totals(self, run: Run) -> Totals:
        """Sums over a run, computed by SQLite."""
        ok, failed = self.counts(run)
        with _storage(self.path):
            faults = self._db.execute(
                "SELECT 'not_rendered', count(*), min(error) FROM row_fault WHERE run = ?", (run.run,)
            ).fetchone()
            by_source = self._db.execute(
                f"SELECT cost_source, {_USD_SUM} FROM attempt "
                f"WHERE run = ? AND outcome IS NOT NULL AND cost_source IS NOT NULL "
                f"GROUP BY cost_source ORDER BY cost_source",
                (run.run,),
            ).fetchall()
            sums = self._db.execute(
                f"SELECT {_USD_SUM}, coalesce(sum(usd_pico IS NULL), 0), "
                "coalesce(sum(outcome = 'unknown'), 0), coalesce(sum(prompt_tokens), 0), "
                "coalesce(sum(completion_tokens), 0), coalesce(sum(total_tokens), 0), "
                "coalesce(sum(cached_tokens), 0), count(*), max(CASE outcome WHEN 'ok' THEN latency_us END) "
                "FROM attempt WHERE run = ? AND outcome IS NOT NULL",
                (run.run,),
            ).fetchone()
            unplaced = self._db.execute(
                f"SELECT {_USD_SUM}, coalesce(sum(outcome = 'ok'), 0) FROM moved "
                "JOIN attempt USING (run, row_index, model, sample, key) WHERE run = ? AND to_row IS NULL",
                (run.run,),
            ).fetchone()
            failures = self._db.execute(
                f"SELECT error_kind, count(*), min(error) FROM ("
                f"SELECT at, model, sample, max(attempt_id) AS attempt_id, max(outcome = 'ok') AS ok "
                f"FROM ({self._standing(run)}) GROUP BY at, model, sample) "
                f"JOIN attempt USING (attempt_id) WHERE attempt.final AND NOT ok GROUP BY error_kind "
                f"ORDER BY 2 DESC",
                _everywhere(run),
            ).fetchall()
            flags = self._db.execute(
                "SELECT flags, count(*) FROM attempt WHERE run = ? AND outcome = 'ok' AND flags IS NOT NULL "
                "GROUP BY flags",
                (run.run,),
            ).fetchall()
        counted: dict[str, int] = {}
        for names, number in flags:
            for name in names.split(","):
                counted[name] = counted.get(name, 0) + number
        return Totals(
            ok=ok,
            failed=failed,
            usd=_summed(*sums[:2]),
            usd_by_source={source: _summed(high, low) for source, high, low in by_source},
            unknown_cost=sums[2],
            unknown_outcomes=sums[3],
            prompt_tokens=sums[4],
            completion_tokens=sums[5],
            total_tokens=sums[6],
            cached_tokens=sums[7],
            attempts=sums[8],
            unplaced=unplaced[2],
            unplaced_usd=_summed(*unplaced[:2]),
            failures=[*((kind or "", number, error or "") for kind, number, error in failures),
                      *([faults] if faults[1] else [])],
            flags=dict(sorted(counted.items())),
            slowest_seconds=_seconds(sums[9]),
        )  # fmt: skip

    # --- inside ---------------------------------------------------------------------------------------------

    def _standing(self, run: Run) -> str:
        """SQL of the settled attempts in rows :start ≤ at < :stop of run :run, each `at` the row it stands in."""
        own = (
            "SELECT row_index AS at, attempt.* FROM attempt WHERE run = :run AND row_index >= :start "
            "AND row_index < :stop AND outcome IS NOT NULL"
        )
        if self._value("SELECT 1 FROM moved WHERE run = ? LIMIT 1", run.run) is None:
            return own
        return (
            f"{own} AND NOT EXISTS (SELECT 1 FROM moved WHERE moved.run = attempt.run "
            "AND moved.row_index = attempt.row_index AND moved.model = attempt.model "
            "AND moved.sample = attempt.sample AND moved.key = attempt.key) "
            "UNION ALL SELECT moved.to_row AS at, attempt.* FROM moved "
            "JOIN attempt USING (run, row_index, model, sample, key) "
            "WHERE moved.run = :run AND moved.to_row >= :start AND moved.to_row < :stop AND outcome IS NOT NULL"
        )

    def _own(self, job_name: str, job_path: Path, adopt: bool) -> None:
        """Refuse a ledger that is another job's. The path is kept relative: a moved project keeps its ledgers."""
        relative = os.path.relpath(job_path, self.path.parent)
        with self._transaction():
            owner = self._db.execute("SELECT job_name, job_path FROM owner").fetchone()
            if owner is None:
                self._db.execute("INSERT INTO owner VALUES (?, ?)", (job_name, relative))
            elif owner != (job_name, relative):
                if not adopt:
                    raise JobError(
                        f"{self.path} is the ledger of the job {owner[0]!r} in {self.path.parent / owner[1]}: give "
                        "this job another `name:` or `ledger:`; or, if the job file has moved, add --adopt-ledger"
                    )
                self._db.execute("UPDATE owner SET job_name = ?, job_path = ?", (job_name, relative))

    def _settle_orphans(self) -> None:
        """What a dead process left in flight has an unknown outcome: nobody else can be sending, under the lock."""
        with self._transaction():
            self._db.execute(
                "UPDATE attempt SET outcome = 'unknown', settled_at = ?, error_kind = 'interrupted', "
                "error = 'interrupted: the process ended before an answer came' WHERE outcome IS NULL",
                (now_us(),),
            )

    def _value(self, sql: str, *parameters: Any) -> Any:
        with _storage(self.path):
            row = self._db.execute(sql, parameters).fetchone()
        return row[0] if row else None

    def _execute_script(self, sql: str) -> None:
        with _storage(self.path):
            self._db.executescript(sql)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _storage(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


# Of a slot's attempts only the newest tells whether it is failed: one that is asked again is pending meanwhile.
_NEWEST_IS_FINAL = "max(attempt_id * 2 + final) & 1"

# Two sums that no number of rows makes too large for 64 bits.
_USD_SUM = "coalesce(sum(usd_pico >> 30), 0), coalesce(sum(usd_pico & 1073741823), 0)"


def _summed(high: int, low: int) -> Decimal:
    return from_pico((high << 30) + low)


_SETTLE = """
    UPDATE attempt SET settled_at = ?, outcome = ?, final = ?, status = ?, error_kind = ?, error = ?,
        prompt_tokens = ?, completion_tokens = ?, total_tokens = ?, cached_tokens = ?, cache_write_tokens = ?,
        reasoning_tokens = ?, usd_pico = ?, cost_source = ?, request_id = ?, latency_us = ?, first_token_us = ?,
        streamed = ?, flags = ?
    WHERE attempt_id = ? AND outcome IS NULL
"""

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


def _everywhere(run: Run) -> dict[str, int]:
    return {"run": run.run, "start": 0, "stop": 2**62}


def _settled(settlement: Settlement) -> tuple[Any, ...]:
    exchange = settlement.exchange
    usage, failure, usd = exchange.usage, exchange.failure, exchange.cost.usd
    return (
        settlement.settled_at, exchange.outcome, int(settlement.is_final), exchange.status,
        failure.kind if failure else None, str(failure) if failure else None,
        usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.cached_tokens,
        usage.cache_write_tokens, usage.reasoning_tokens,
        to_pico(usd) if usd is not None else None, exchange.cost.source, exchange.request_id,
        _microseconds(exchange.latency_seconds), _microseconds(exchange.first_token_seconds),
        int(exchange.streamed), ",".join(exchange.flags) or None, settlement.intent.attempt_id,
    )  # fmt: skip


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Errors of SQLite and the file system as ours."""
    try:
        yield
    except (sqlite3.Error, zstandard.ZstdError) as exc:
        raise StorageError(f"the ledger {path}: {exc}") from exc
    except OSError as exc:
        raise StorageError(f"the ledger {path}: {exc.strerror or exc}") from exc


def _chunks(items: Iterable[Request | RowFault], size: int) -> Iterator[list[Request | RowFault]]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _usd(pico: int | None) -> Decimal | None:
    return from_pico(pico) if pico is not None else None


def _seconds(microseconds: int | None) -> float | None:
    return microseconds / 1e6 if microseconds is not None else None


def _microseconds(seconds: float | None) -> int | None:
    return round(seconds * 1e6) if seconds is not None else None
