"""The ledger, read: runs, slots, attempts and sums. What writes it is `ledger`.

Every amount comes from the view `charged`: what an attempt was settled with, or what has been learnt of it since.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from batchrun.errors import JobError, StorageError
from batchrun.migrations import check_version
from batchrun.money import from_pico
from batchrun.records import Group, RowSlots, Slot, StandingAttempt, utc
from batchrun.stored import Unpacker, UnpackError


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
    is_reused: bool = False
    """It takes what becomes of another slot, and is never asked itself."""
    repair: int | None = None
    """It is to be asked again, for the so many-th time, because its answer does not fit."""
    home: int | None = None
    """The row that the answer was made for, then."""


class WantedRepair(NamedTuple):
    """A slot is to be asked again, because its answer does not fit."""

    repair: int
    """For the how many-th time."""
    group: Group


class Snapshot(NamedTuple):
    """What an invocation worked by."""

    job: dict[str, Any]
    endpoint: str
    """Its identity in the keys."""
    reason: str | None
    """Why it ended, if it was not because all was done."""


class StoredAnswer(NamedTuple):
    """The last answer of a slot."""

    slot: Slot
    group: Group
    answers: int
    """One more than its repairs, which is how many it has had, unless some are lost."""
    is_reused: bool
    body: bytes
    """As it arrived."""
    streamed: bool


class EarlierAnswers(NamedTuple):
    """Slots of a new run that earlier runs have answered."""

    slots: int
    run_id: str
    usd: Decimal | None
    """What those answers cost then; None if that is not known for all."""


class LedgerView:
    """One job's ledger, to be read.

    Raises:
        StorageError: from every method, when the file cannot be read.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = connection
        self.path = path

    @classmethod
    def read(cls, path: Path) -> LedgerView:
        """Open a ledger without changing anything in it.

        Raises:
            StorageError: it cannot be read, or another version of batchrun must bring it up to date first.
        """
        with storage(path):
            try:
                return cls(_opened(path, "mode=ro"), path)
            except sqlite3.OperationalError as exc:
                # Beside a write-ahead log SQLite must write, if only who reads; where nothing can be written, nobody is
                # at work either, and without a log the file alone is all there is.
                if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CANTOPEN or not path.is_file():
                    raise
                log = log_of(path)
                if log.exists() and log.stat().st_size:
                    raise StorageError(
                        f"the ledger {path} cannot be read with its write-ahead log where nothing may be written: "
                        f"copy it and {log.name} to a folder of yours"
                    ) from exc
                return cls(_opened(path, "immutable=1"), path)

    def close(self) -> None:
        """Close the file; SQLite folds the write-ahead log into it."""
        with storage(self.path):
            self._db.close()

    def last_run(self) -> Run | None:
        """The newest run that has got as far as its input, open or not; None if there never was one."""
        with storage(self.path):
            row = self._db.execute(
                "SELECT run, run_id, started_at, state FROM run WHERE input IS NOT NULL ORDER BY run DESC LIMIT 1"
            ).fetchone()
        return Run(row[0], row[1], row[2], row[3], is_new=False) if row else None

    def run_named(self, run_id: str) -> Run | None:
        """A run by its id, or by the beginning of one that no other has."""
        rows = self.rows(
            "SELECT run, run_id, started_at, state FROM run WHERE substr(run_id, 1, length(?1)) = ?1", (run_id,)
        )
        if len(rows) != 1:
            return None
        number, found, started_at, state = rows[0]
        return Run(number, found, started_at, state, is_new=False)

    def run_ids(self) -> set[str]:
        """Of all runs."""
        return {run_id for (run_id,) in self.rows("SELECT run_id FROM run")}

    def last_snapshot(self, run: Run) -> Snapshot | None:
        """Of a run's newest invocation that had checked its input."""
        with storage(self.path):
            row = self._db.execute(
                "SELECT job, endpoint, reason FROM invocation WHERE run = ? AND input IS NOT NULL "
                "ORDER BY invocation DESC LIMIT 1",
                (run.run,),
            ).fetchone()
        return Snapshot(self.document(row[0]), row[1], row[2]) if row else None

    def last_placed(self) -> tuple[Run, Snapshot] | None:
        """The newest run that has got as far as its input, and what it was worked by; None if there never was one."""
        run = self.last_run()
        known = self.last_snapshot(run) if run is not None else None
        return (run, known) if run is not None and known is not None else None

    def placed_input(self, run: Run) -> dict[str, Any] | None:
        """The input that the run's groups are placed by, with its number of `rows`; None before the first `place`."""
        text = self._value("SELECT input FROM run WHERE run = ?", run.run)
        return self.document(text) if text is not None else None

    def document(self, text: str) -> dict[str, Any]:
        """A column that holds a JSON object."""
        try:
            found = json.loads(text)
        except ValueError as exc:
            raise StorageError(f"the ledger {self.path}: {exc}{_MEND}") from exc
        if not isinstance(found, dict):
            raise StorageError(f"the ledger {self.path}: {text[:60]!r} should be an object{_MEND}")
        return found

    def has_answers(self) -> bool:
        """True if any run of the job has an attempt: only then do the keys of the input matter."""
        return self._value("SELECT 1 FROM attempt LIMIT 1") is not None

    def refuse_pruned(self, run: Run, what: str) -> None:
        """Refuse what needs the answers of a run that were pruned.

        Args:
            what: names it: "be exported any more".

        Raises:
            JobError: they were.
        """
        pruned_at = self._value("SELECT pruned_at FROM run WHERE run = ?", run.run)
        if pruned_at is not None:
            day = utc(pruned_at).date()
            raise JobError(f"the answers of run {run.run_id} were pruned on {day}: it cannot {what}")

    def prunable(self, before: int) -> list[Run]:
        """Runs that are over since before a moment, from the oldest on, but for those whose output is to be written."""
        return [
            Run(number, run_id, started_at, state, is_new=False)
            for number, run_id, started_at, state in self.rows(
                "SELECT run, run_id, started_at, state FROM run WHERE state <> 'open' AND is_written "
                "AND coalesce(ended_at, started_at) < ? ORDER BY run",
                (before,),
            )
        ]

    def is_pruned(self) -> bool:
        """True if the answers of any run were dropped."""
        return self._value("SELECT 1 FROM run WHERE pruned_at IS NOT NULL LIMIT 1") is not None

    def pruned_answers(self, run: Run) -> int:
        """Slots that the last `place` saw, and whose answers by earlier runs were dropped."""
        if not self.is_pruned():
            return 0
        number = self._value(
            "SELECT count(*) FROM temp.asked WHERE NOT EXISTS (SELECT 1 FROM reused WHERE reused.run = ? "
            "AND reused.row_index = asked.row_index AND reused.model = asked.model AND reused.sample = asked.sample) "
            "AND (key, sample) IN (SELECT key, sample FROM attempt JOIN answer USING (attempt_id) "
            "WHERE digest IS NOT NULL AND outcome = 'ok')",
            run.run,
        )
        return int(number)

    def is_of(self, job_name: str, job_path: Path) -> bool:
        """True if the ledger is that of a job, or nobody's yet."""
        owner = self.rows("SELECT job_name, job_path FROM owner")
        return not owner or owner[0] == (job_name, os.path.relpath(job_path, self.path.parent))

    def size(self) -> int:
        """Bytes of the ledger's files."""
        with storage(self.path):
            files = (Path(os.path.realpath(self.path)), log_of(self.path))
            return sum(file.stat().st_size for file in files if file.exists())

    def earlier_answers(self, run: Run) -> EarlierAnswers | None:
        """Slots that the last `place` saw and that earlier runs have answered."""
        with storage(self.path):
            row = self._db.execute(
                f"""
                WITH earlier AS (
                    SELECT key, sample, max(run) AS run, avg(usd_pico) AS usd_pico
                    FROM charged AS attempt WHERE outcome = 'ok' AND run <> :run
                    {UNPRUNED} GROUP BY key, sample
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
        with storage(self.path):
            rows = self._db.execute(
                f"SELECT at, model, sample, max(outcome = 'ok'), {NEWEST_IS_FINAL}, count(*) "
                f"FROM ({self.standing_sql(run)}) GROUP BY at, model, sample",
                {"run": run.run, "start": start, "stop": stop},
            )
            for at, model, sample, is_ok, is_final, tries in rows:
                found[Slot(at, model, sample)] = SlotState(bool(is_ok), bool(is_final) and not is_ok, tries)
            for slot in self._db.execute(
                "SELECT row_index, model, sample FROM reused WHERE run = ? AND row_index >= ? AND row_index < ?",
                (run.run, start, stop),
            ):
                state = found.get(Slot(*slot), SlotState(False, False, 0))
                found[Slot(*slot)] = state._replace(is_reused=True)
        for slot, wanted in self.repairs_wanted(run, start, stop).items():
            home = wanted.group[0].row_index
            state = found.get(slot, SlotState(False, False, 0))
            found[slot] = state._replace(is_answered=False, repair=wanted.repair, home=home)
        with storage(self.path):
            faults = self._db.execute(
                "SELECT row_index, model, sample FROM row_fault WHERE run = ? AND row_index >= ? AND row_index < ?",
                (run.run, start, stop),
            )
            for fault in faults:
                found[Slot(*fault)] = SlotState(False, True, 0)
        return found

    def unsettled(self, run: Run, slots: RowSlots, rows: int, *, retry_failed: bool) -> Iterator[tuple[int, int]]:
        """Ranges of rows, in order, that hold every row that is still to be asked, and few others.

        Args:
            slots: those of each row.
            rows: of the input.
            retry_failed: failed rows are to be asked too.
        """
        settled = self._settled_by_chunk(run, slots, retry_failed=retry_failed)
        start = None
        for first in range(0, rows, _CHUNK_ROWS):
            is_settled = settled.get(first // _CHUNK_ROWS, 0) >= min(_CHUNK_ROWS, rows - first) * slots.number
            if start is None and not is_settled:
                start = first
            elif start is not None and is_settled:
                yield start, first
                start = None
        if start is not None:
            yield start, rows

    def is_settled(self, run: Run, slots: RowSlots, start: int, stop: int, *, retry_failed: bool) -> bool:
        """True if the rows `start` ≤ index < `stop` are all settled for certain: none of them will be asked."""
        settled = self._settled_by_chunk(run, slots, start, stop, retry_failed=retry_failed)
        return sum(settled.values()) >= (stop - start) * slots.number

    def _settled_by_chunk(
        self, run: Run, slots: RowSlots, start: int = 0, stop: int = 2**62, *, retry_failed: bool
    ) -> dict[int, int]:
        """How many slots of each chunk are settled for certain."""
        if self._has_moved(run):
            return {}  # then the number of a row says little
        is_settled = "ok" if retry_failed else "(ok OR final)"
        rows = self.rows(
            f"SELECT row_index / {_CHUNK_ROWS}, count(*) FROM (SELECT row_index, max(outcome = 'ok') AS ok, "
            f"{NEWEST_IS_FINAL} AS final FROM attempt WHERE run = ? AND row_index >= ? AND row_index < ? "
            f"AND model IN ({', '.join('?' * len(slots.models))}) AND sample < ? "
            f"AND outcome IS NOT NULL GROUP BY row_index, model, sample) WHERE {is_settled} GROUP BY 1",
            (run.run, start, stop, *slots.models, slots.samples),
        )
        settled = dict(rows)
        # A slot that failed before it took another's answer is counted already.
        for table, sign in ((f"reused WHERE NOT ({_HAS_OWN})", 1), ("repair_wanted WHERE TRUE", -1)):
            for chunk, number in self.rows(
                f"SELECT row_index / {_CHUNK_ROWS}, count(*) FROM {table} AND run = ? AND row_index >= ? "
                "AND row_index < ? GROUP BY 1",
                (run.run, start, stop),
            ):
                settled[chunk] = settled.get(chunk, 0) + sign * number
        return settled

    def repairs_wanted(self, run: Run, start: int = 0, stop: int = 2**62) -> dict[Slot, WantedRepair]:
        """Slots in rows `start` ≤ index < `stop` that are to be asked again."""
        rows = self.rows(
            "SELECT at, model, sample, max(repair), row_index, key FROM ("
            "SELECT CASE WHEN moved.run IS NULL THEN row_index ELSE to_row END AS at, row_index, model, sample, key, "
            "repair FROM repair_wanted LEFT JOIN moved USING (run, row_index, model, sample, key) "
            "WHERE repair_wanted.run = ?) WHERE at >= ? AND at < ? GROUP BY at, model, sample",
            (run.run, start, stop),
        )
        return {
            Slot(at, model, sample): WantedRepair(repair, (Slot(home, model, sample), key))
            for at, model, sample, repair, home, key in rows
        }

    def standing(self, run: Run, start: int, stop: int) -> Iterator[StandingAttempt]:
        """Settled attempts of the slots in rows `start` ≤ index < `stop`, row by row, oldest first."""
        unpack = Unpacker().unpack
        with storage(self.path):
            rows = self._db.execute(
                f"""
                SELECT at, model, sample, standing.attempt_id, coalesce(repair_key, key), client_request_id, settled_at,
                    outcome, final, error, prompt_tokens, completion_tokens, total_tokens, cached_tokens,
                    reasoning_tokens, usd_pico, cost_source, request_id, latency_us, first_token_us, streamed, flags,
                    is_reused, CASE outcome WHEN 'ok' THEN body END
                FROM ({self.standing_sql(run)}) AS standing LEFT JOIN answer USING (attempt_id)
                ORDER BY at, standing.attempt_id
                """,
                {"run": run.run, "start": start, "stop": stop},
            )
            for *values, body in rows:
                yield StandingAttempt._make((*values, unpack(body) if body is not None else None))

    def answers(self, run: Run, start: int, stop: int) -> Iterator[StoredAnswer]:
        """The last answer of each slot in rows `start` ≤ index < `stop` that has one, in order."""
        unpack = Unpacker().unpack
        for at, home, model, sample, key, number, is_reused, body, streamed, _ in self.each(
            "SELECT at, row_index, model, sample, key, max(repair) + 1, is_reused, body, streamed, max(attempt_id) "
            f"FROM ({self.standing_sql(run)}) JOIN answer USING (attempt_id) WHERE outcome = 'ok' "
            "GROUP BY at, model, sample",
            {"run": run.run, "start": start, "stop": stop},
        ):
            group = (Slot(home, model, sample), key)
            yield StoredAnswer(Slot(at, model, sample), group, number, bool(is_reused), unpack(body), bool(streamed))

    def latest_decided(self, run: Run, number: int) -> list[tuple[bytes | None, bool]]:
        """The newest slots of a run that were settled by an attempt: its answer, if it is one, and whether streamed.

        Oldest first, so many of them.
        """
        rows = self.rows(
            # Backwards from the newest attempt: by its index, all those of the run would be sorted.
            "SELECT body, streamed FROM (SELECT attempt_id, outcome, streamed FROM attempt NOT INDEXED WHERE run = ? "
            f"AND final AND NOT EXISTS (SELECT 1 FROM attempt AS later WHERE {same_group('later', 'attempt')} "
            "AND later.attempt_id > attempt.attempt_id) "
            f"AND NOT EXISTS (SELECT 1 FROM repair_wanted WHERE {same_group('repair_wanted', 'attempt')}) "
            "ORDER BY attempt_id DESC LIMIT ?) AS decided LEFT JOIN answer ON outcome = 'ok' "
            "AND answer.attempt_id = decided.attempt_id ORDER BY decided.attempt_id DESC",
            (run.run, number),
        )
        unpack = Unpacker().unpack
        return [(unpack(body) if body is not None else None, bool(streamed)) for body, streamed in reversed(rows)]

    def answer_bytes(self, run: Run, start: int, stop: int) -> int:
        """Size of the answers in rows `start` ≤ index < `stop`."""
        with storage(self.path):
            size: int = self._db.execute(
                f"SELECT coalesce(sum(size), 0) FROM ({self.standing_sql(run)}) AS standing "
                "JOIN answer USING (attempt_id) WHERE outcome = 'ok'",
                {"run": run.run, "start": start, "stop": stop},
            ).fetchone()[0]
        return size

    def row_faults(self, run: Run, start: int, stop: int) -> dict[Slot, str]:
        """Rows that give no request, with the reason."""
        with storage(self.path):
            rows = self._db.execute(
                "SELECT row_index, model, sample, error FROM row_fault "
                "WHERE run = ? AND row_index >= ? AND row_index < ?",
                (run.run, start, stop),
            ).fetchall()
        return {Slot(*row[:3]): row[3] for row in rows}

    def counts(self, run: Run) -> tuple[int, int]:
        """Rows of a run that are ok, and that are failed."""
        is_plain = (
            not self._has_moved(run)
            and self._value("SELECT 1 FROM reused WHERE run = ? AND source_run = run LIMIT 1", run.run) is None
        )
        with storage(self.path):
            # Where each attempt stands in its own row, no slots need to be put together: a third of the time.
            sql = (
                _COUNTS
                if is_plain
                else (
                    f"SELECT coalesce(sum(ok), 0), coalesce(sum(final AND NOT ok), 0) FROM ("
                    f"SELECT max(outcome = 'ok') AS ok, {NEWEST_IS_FINAL} AS final FROM ({self.standing_sql(run)}) "
                    f"GROUP BY at, model, sample)"
                )
            )
            ok, failed = self._db.execute(sql, everywhere(run)).fetchone()
        faults = self._value("SELECT count(*) FROM row_fault WHERE run = ?", run.run)
        return ok - len(self.repairs_wanted(run)), failed + faults

    def unplaced_answers(self, run: Run) -> int:
        """Answers of a run that no row asks for any more."""
        number = self._value(
            "SELECT count(*) FROM moved JOIN attempt USING (run, row_index, model, sample, key) "
            "WHERE run = ? AND to_row IS NULL AND outcome = 'ok'",
            run.run,
        )
        return int(number)

    def earlier_labels(self, run: Run) -> dict[str, int] | None:
        """How often the last run before this one gave each label; None if no run did."""
        text = self._value("SELECT labels FROM run WHERE run < ? AND labels IS NOT NULL ORDER BY run DESC", run.run)
        return self.document(text) if text is not None else None

    def price_list(self, url: str) -> tuple[str | None, int, bytes] | None:
        """ETag, time and body of a provider's list as it came last; None if it never came."""
        for etag, fetched_at, body in self.rows("SELECT etag, fetched_at, body FROM price_list WHERE url = ?", (url,)):
            with suppress(UnpackError):  # it can be asked for again
                return etag, fetched_at, Unpacker().unpack(body)
        return None

    # --- inside ---------------------------------------------------------------------------------------------

    def standing_sql(self, run: Run) -> str:
        """SQL of the settled attempts in rows :start ≤ at < :stop of run :run, each `at` the row it stands in."""
        own = (
            "SELECT row_index AS at, 0 AS is_reused, charged.* FROM charged WHERE run = :run AND row_index >= :start "
            "AND row_index < :stop AND outcome IS NOT NULL"
        )
        if self._has_moved(run):
            own = self._with_moved(own)
        if self._value("SELECT 1 FROM reused WHERE run = ? LIMIT 1", run.run) is not None:
            own += f" UNION ALL {_REUSED}"
        return own

    @staticmethod
    def _with_moved(own: str) -> str:
        return (
            f"{own} AND NOT EXISTS (SELECT 1 FROM moved WHERE {same_group('moved', 'charged')}) "
            "UNION ALL SELECT moved.to_row AS at, 0 AS is_reused, charged.* FROM moved "
            "JOIN charged USING (run, row_index, model, sample, key) "
            "WHERE moved.run = :run AND moved.to_row >= :start AND moved.to_row < :stop AND outcome IS NOT NULL"
        )

    def _has_moved(self, run: Run) -> bool:
        return self._value("SELECT 1 FROM moved WHERE run = ? LIMIT 1", run.run) is not None

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """What is read inside of it is of one moment, though a run may go on meanwhile. Not within a transaction."""
        with storage(self.path):
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("COMMIT")

    def rows(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """What a query gives, all at once."""
        with storage(self.path):
            return self._db.execute(sql, parameters).fetchall()

    def each(self, sql: str, parameters: Any = ()) -> Iterator[tuple[Any, ...]]:
        """What a query gives, row by row."""
        with storage(self.path):
            yield from self._db.execute(sql, parameters)

    def _value(self, sql: str, *parameters: Any) -> Any:
        with storage(self.path):
            row = self._db.execute(sql, parameters).fetchone()
        return row[0] if row else None


GROUP_COLUMNS = ("run", "row_index", "model", "sample", "key")
"""By which the attempts of a group are one."""


def same_group(one: str, other: str) -> str:
    """SQL: a row of one table is of the same group as one of another."""
    return " AND ".join(f"{one}.{name} = {other}.{name}" for name in GROUP_COLUMNS)


# What decided the group that a slot takes its answer from; it has been paid for there.
_CHARGED = (
    "attempt_id", "run", "invocation", "row_index", "model", "sample", "key", "number", "client_request_id", "sent_at",
    "settled_at", "outcome", "final", "status", "error_kind", "error", "prompt_tokens", "completion_tokens",
    "total_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens", "request_id", "latency_us",
    "first_token_us", "streamed", "flags", "request_bytes", "reserved_pico", "repair", "repair_key", "origin",
)  # fmt: skip
_REUSED = (
    f"SELECT reused.row_index AS at, 1 AS is_reused, {', '.join(f'charged.{name}' for name in _CHARGED)}, "
    "CASE outcome WHEN 'ok' THEN 0 END AS usd_pico, CASE outcome WHEN 'ok' THEN 'reused' END AS cost_source, "
    "0 AS held_pico FROM reused JOIN charged ON charged.run = source_run AND charged.row_index = source_row "
    "AND charged.model = reused.model AND charged.sample = reused.sample AND charged.key = reused.key "
    "WHERE reused.run = :run AND reused.row_index >= :start AND reused.row_index < :stop AND final "
    # What is to be asked again decides nothing yet.
    "AND NOT (source_run = :run AND EXISTS (SELECT 1 FROM repair_wanted WHERE repair_wanted.run = :run "
    "AND repair_wanted.row_index = source_row AND repair_wanted.model = reused.model "
    "AND repair_wanted.sample = reused.sample AND repair_wanted.key = reused.key))"
)


def pico_sum(column: str) -> str:
    """SQL of two sums, for `summed`, that no number of rows makes too large for 64 bits."""
    return f"coalesce(sum(({column}) >> 30), 0), coalesce(sum(({column}) & 1073741823), 0)"


def summed(high: int, low: int) -> int:
    """The sum that `pico_sum` gives in two parts."""
    return (high << 30) + low


_CHUNK_ROWS = 1024
_HAS_OWN = (
    "EXISTS (SELECT 1 FROM attempt WHERE attempt.run = reused.run AND attempt.row_index = reused.row_index "
    "AND attempt.model = reused.model AND attempt.sample = reused.sample AND (outcome = 'ok' OR final))"
)
UNPRUNED = (
    "AND (attempt.run IN (SELECT run FROM run WHERE pruned_at IS NULL) OR NOT EXISTS ("
    "SELECT 1 FROM attempt AS dropped JOIN answer USING (attempt_id) WHERE dropped.run = attempt.run "
    "AND dropped.row_index = attempt.row_index AND dropped.model = attempt.model AND dropped.sample = attempt.sample "
    "AND dropped.key = attempt.key AND digest IS NOT NULL))"
)
"""SQL for attempts of groups that are whole: of an answer and its repairs none was dropped."""
_SAME_SLOT = (
    "{0}.run = attempt.run AND {0}.row_index = attempt.row_index AND {0}.model = attempt.model "
    "AND {0}.sample = attempt.sample"
)
_COUNTS = (
    "SELECT (SELECT count(*) FROM attempt WHERE run = :run AND outcome = 'ok' AND repair = 0) "
    "+ (SELECT count(*) FROM reused WHERE run = :run), "
    "(SELECT count(*) FROM attempt WHERE run = :run AND final AND outcome <> 'ok' "
    f"AND NOT EXISTS (SELECT 1 FROM attempt AS other WHERE {_SAME_SLOT.format('other')} "
    "AND (other.outcome = 'ok' OR (other.attempt_id > attempt.attempt_id AND other.outcome IS NOT NULL))) "
    f"AND NOT EXISTS (SELECT 1 FROM reused WHERE {_SAME_SLOT.format('reused')}))"
)
# Of a slot's attempts only the newest tells whether it is failed: one that is asked again is pending meanwhile.
NEWEST_IS_FINAL = "max(attempt_id * 2 + final) & 1"


def _opened(path: Path, how: str) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, isolation_level=None)
    try:
        check_version(db, path)
    except BaseException:
        db.close()
        raise
    return db


def known_input(path: Path) -> dict[str, Any] | None:
    """The input that a ledger's newest answers are placed by; None if there is none, or it cannot be told."""
    if not path.exists():
        return None
    with suppress(StorageError), closing(LedgerView.read(path)) as view:
        run = view.last_run()
        return view.placed_input(run) if run is not None else None
    return None


def everywhere(run: Run) -> dict[str, int]:
    """The bounds of `standing_sql` for all rows."""
    return {"run": run.run, "start": 0, "stop": 2**62}


def log_of(path: Path) -> Path:
    """The write-ahead log. SQLite puts it beside the file itself, not beside a link to it."""
    real = Path(os.path.realpath(path))
    return real.with_name(f"{real.name}-wal")


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Errors of SQLite and the file system as ours."""
    try:
        yield
    except (sqlite3.Error, UnpackError, UnicodeDecodeError) as exc:
        # SQLite's own message is no text where it repeats what it could not read.
        is_damaged = not isinstance(exc, sqlite3.Error) or any(word in str(exc) for word in _DAMAGED)
        raise StorageError(f"the ledger {path}: {exc}{_MEND if is_damaged else ''}") from exc
    except OSError as exc:
        raise StorageError(f"the ledger {path}: {exc.strerror or exc}") from exc


_MEND = "; it has been damaged: `batchrun salvage JOB` saves what can be read"
_DAMAGED = ("malformed", "not a database", "decode to UTF-8")
NO_ROW = -1
"""The row of an attempt whose row is not known any more."""
INTENT_COLUMNS = (
    "attempt_id", "run", "invocation", "row_index", "model", "sample", "key", "number", "client_request_id", "sent_at",
    "request_bytes", "reserved_pico", "repair", "repair_key",
)  # fmt: skip
SETTLEMENT_COLUMNS = (
    "settled_at", "outcome", "final", "status", "error_kind", "error", "prompt_tokens", "completion_tokens",
    "total_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens", "usd_pico", "cost_source", "request_id",
    "latency_us", "first_token_us", "streamed", "flags", "held_pico", "settled_after",
)  # fmt: skip
SEAL_MASK = 2**62 - 1


def seal(values: Sequence[Any]) -> int:
    """A hash of some values, below 2^62, by which `verify` tells whether they were altered since."""
    return int.from_bytes(blake2b(repr(tuple(values)).encode(), digest_size=8).digest()) >> 2


def attempt_seal(intended: Sequence[Any], settled: Sequence[Any], answered: str) -> int:
    """The seal of an attempt.

    Args:
        intended: the values of INTENT_COLUMNS.
        settled: those of SETTLEMENT_COLUMNS.
        answered: the digest of its answer's body; that of nothing without one.
    """
    # What is no repair is sealed as it was before there were any: without the last two columns.
    is_repair = intended[-2]
    return seal((*(intended if is_repair else intended[:-2]), *settled, answered))
