"""The ledger, made smaller: the bodies of old answers go, and every figure stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from batchrun.ledger import Ledger
from batchrun.ledger_view import Run, storage
from batchrun.records import now_us
from batchrun.stored import Unpacker, digest

_PRUNED_AT_ONCE = 1000
_FREE_SHARE = 50
# By the answers in their order: by the attempts of the runs, all of them would be sorted for each batch.
_TO_PRUNE = """
    SELECT answer.attempt_id, attempt.run, body FROM answer CROSS JOIN attempt USING (attempt_id)
    WHERE answer.attempt_id > ? AND attempt.run IN ({numbers}) AND digest IS NULL AND NOT EXISTS (
        SELECT 1 FROM temp.kept WHERE kept.run = attempt.run AND kept.row_index = attempt.row_index
        AND kept.model = attempt.model AND kept.sample = attempt.sample AND kept.key = attempt.key)
    ORDER BY answer.attempt_id LIMIT ?
"""
_UNMARK = """
    UPDATE run SET pruned_at = NULL WHERE run IN ({numbers}) AND NOT EXISTS (
        SELECT 1 FROM attempt JOIN answer USING (attempt_id) WHERE attempt.run = run.run AND digest IS NOT NULL)
    AND NOT EXISTS (
        SELECT 1 FROM reused JOIN attempt ON attempt.run = source_run AND attempt.row_index = source_row
            AND attempt.model = reused.model AND attempt.sample = reused.sample AND attempt.key = reused.key
        JOIN answer USING (attempt_id) WHERE reused.run = run.run AND digest IS NOT NULL)
"""


class PrunableLedger(Ledger):
    """A ledger whose answers may be dropped."""

    def prune(self, runs: Sequence[Run]) -> tuple[dict[int, int], int]:
        """Drop the bodies of the answers of some runs, but for those that other runs have taken.

        What is dropped leaves its digest, by which its attempt can still be told to be unaltered.

        Returns:
            How many were dropped, by `Run.run`; and how many answers of these runs stay.
        """
        numbers = ", ".join(str(run.run) for run in runs)
        with self._transaction():
            # First: where this is broken off, nobody takes the run for whole.
            self._db.execute(f"UPDATE run SET pruned_at = coalesce(pruned_at, ?) WHERE run IN ({numbers})", (now_us(),))
        self._execute_script(
            "DROP TABLE IF EXISTS temp.kept; CREATE TEMP TABLE kept (run INTEGER, row_index INTEGER, model TEXT, "
            "sample INTEGER, key TEXT, PRIMARY KEY (run, row_index, model, sample, key)) WITHOUT ROWID; "
            "INSERT OR IGNORE INTO temp.kept SELECT source_run, source_row, model, sample, key FROM reused "
            "WHERE run NOT IN (SELECT run FROM run WHERE pruned_at IS NOT NULL)"
        )
        unpack = Unpacker().unpack
        dropped: Counter[int] = Counter()
        newest = 0
        while True:
            with self._transaction():
                found = self._db.execute(_TO_PRUNE.format(numbers=numbers), (newest, _PRUNED_AT_ONCE)).fetchall()
                self._db.executemany(
                    "UPDATE answer SET digest = ?, body = x'' WHERE attempt_id = ?",
                    [(digest(unpack(body)), attempt_id) for attempt_id, _, body in found],
                )
            if not found:
                break
            dropped.update(run for _, run, _ in found)
            newest = found[-1][0]
        with self._transaction():
            # Of these all is there after all.
            self._db.execute(_UNMARK.format(numbers=numbers))
        kept = self._value(
            f"SELECT count(*) FROM attempt JOIN answer USING (attempt_id) WHERE digest IS NULL AND run IN ({numbers})"
        )
        return dict(dropped), int(kept)

    def compact(self) -> None:
        """Give back to the disk what is not used any more, if it is much; takes as much room as is left for a while."""
        free, pages = (self._value(f"PRAGMA {name}") for name in ("freelist_count", "page_count"))
        with storage(self.path):
            if free * _FREE_SHARE > pages:
                self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
