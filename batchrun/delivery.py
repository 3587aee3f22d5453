"""Ledger and input → the output file and the summary, with the sums checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from batchrun import accounts
from batchrun.answers import Results
from batchrun.errors import BrokenPromiseError, ExitCode, Promise
from batchrun.ledger_view import LedgerView, Run
from batchrun.money import usd_text
from batchrun.plan import Plan
from batchrun.sink import write_parquet
from batchrun.spending import over_cap
from batchrun.summary import Summary, exact_json

_PIECE_BYTES = 32 * 1024 * 1024


def summarise(plan: Plan, ledger: LedgerView, run: Run, rows: int) -> Summary:
    """What the ledger says of a run; how it ended is for the caller to fill in."""
    return Summary(
        job=plan.job.name,
        run_id=run.run_id,
        provider=plan.endpoint.name,
        model=plan.job.model,
        rows=rows,
        totals=accounts.totals(ledger, run),
        exit_code=ExitCode.OK,
        reason=None,
        output=None,
        ledger=str(ledger.path),
        seconds=0.0,
        sent=0,
        over_cap=over_cap(plan, ledger, run),
    )


def write_output(plan: Plan, ledger: LedgerView, run: Run, output: Path, summary: Summary) -> None:
    """Write the Parquet of a run.

    Raises:
        StorageError: it cannot be written.
        BrokenPromiseError: its rows do not add up to the ledger.
    """
    results = results_of(plan, run)
    placed = ledger.placed_input(run)

    def manifest() -> str:
        # An input that changes while it is read again is the user's doing, and no broken promise.
        if plan.is_placed_as(placed):
            _check_sums(summary, results)
        return exact_json(summary.manifest())

    write_parquet(output, plan.schema, expected_batches(plan, ledger, run, results), manifest)


def results_of(plan: Plan, run: Run) -> Results:
    """What builds the result columns of a run."""
    return Results(
        plan.result_schema,
        run_id=run.run_id,
        models=[plan.model],
        requested={plan.model: plan.job.model},
        prefix=plan.job.output.prefix,
    )


def expected_batches(plan: Plan, ledger: LedgerView, run: Run, results: Results) -> Iterator[pa.RecordBatch]:
    """The rows of a run's output, from its input and what the ledger holds now."""
    for batch in plan.source.batches():
        for start, stop in _pieces(ledger, run, batch.start, batch.start + batch.rows.num_rows):
            columns = results.batch(
                start, stop - start, ledger.standing(run, start, stop), ledger.row_faults(run, start, stop)
            )
            rows = batch.rows.slice(start - batch.start, stop - start)
            yield pa.RecordBatch.from_arrays([*rows.columns, *columns.columns], schema=plan.schema)


def _pieces(ledger: LedgerView, run: Run, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose answers fit into memory together, halved until they do."""
    if stop - start > 1 and ledger.answer_bytes(run, start, stop) > _PIECE_BYTES:
        middle = (start + stop) // 2
        yield from _pieces(ledger, run, start, middle)
        yield from _pieces(ledger, run, middle, stop)
    else:
        yield start, stop


def _check_sums(summary: Summary, results: Results) -> None:
    """Promises 1 and 5, on every output that is written."""
    counts, totals = results.counts, summary.totals
    wrote = (counts.rows, counts.ok, counts.failed, counts.pending)
    should = (summary.rows, totals.ok, totals.failed, summary.pending)
    if wrote != should:
        raise BrokenPromiseError(
            Promise.ONE_STATE,
            f"the output has {wrote} rows (all, ok, failed, pending), the ledger {should}",
            summary.ledger,
        )
    if counts.usd + totals.unplaced_usd != totals.usd:
        raise BrokenPromiseError(
            Promise.EXACT,
            f"the rows add up to ${usd_text(counts.usd)}, those without a row to ${usd_text(totals.unplaced_usd)}, "
            f"the ledger to ${usd_text(totals.usd)}",
            summary.ledger,
        )
