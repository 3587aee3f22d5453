"""Ledger and input → the output file and the summary, with the sums checked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace

import pyarrow as pa

from batchrun import accounts
from batchrun.answers import Results
from batchrun.columns import build
from batchrun.derive import Derivation, columns_of
from batchrun.errors import BrokenPromiseError, ExitCode, Promise
from batchrun.exports import write_table
from batchrun.ledger_view import LedgerView, Run
from batchrun.money import exact_json, usd_text
from batchrun.plan import Plan
from batchrun.sink import Destination
from batchrun.spending import over_cap
from batchrun.summary import Summary

_PIECE_BYTES = 32 * 1024 * 1024


def summarise(plan: Plan, ledger: LedgerView, run: Run, rows: int) -> Summary:
    """What the ledger says of a run; how it ended is for the caller to fill in."""
    return Summary(
        job=plan.job.name,
        run_id=run.run_id,
        provider=plan.endpoint.name,
        model=plan.job.model,
        rows=rows * plan.slots.number,
        input_rows=rows,
        totals=accounts.totals(ledger, run),
        exit_code=ExitCode.OK,
        reason=None,
        output=None,
        ledger=str(ledger.path),
        seconds=0.0,
        sent=0,
        over_cap=over_cap(plan, ledger, run),
        columns={**columns_of(plan.job), "own": plan.schema.names[len(plan.source.schema) :]},
        settings=plan.job.output_settings(),
    )


def write_output(
    plan: Plan,
    ledger: LedgerView,
    run: Run,
    destination: Destination,
    summary: Callable[[], Summary],
    wait: Callable[[int, int], None] = lambda start, stop: None,
    names: Sequence[str] | None = None,
) -> Derivation:
    """Write the Parquet of a run; what was made of its answers.

    Args:
        summary: called after the last row.
        names: the columns to write; None for all.
        wait: called before the rows `start` ≤ index < `stop` are looked up; returns when nothing more happens to them.

    Raises:
        StorageError: it cannot be written.
        BrokenPromiseError: its rows do not add up to the ledger.
    """
    results, derivation = results_of(plan, run), plan.derivation()
    placed = ledger.placed_input(run)

    def manifest() -> str:
        found = summary()
        # An input that changes while it is read again is the user's doing, and no broken promise.
        if plan.is_placed_as(placed):
            _check_sums(found, results)
        return exact_json(with_derived(found, derivation).manifest())

    batches = expected_batches(plan, ledger, run, results, derivation, wait)
    schema = plan.schema
    if names is not None:
        schema = pa.schema([schema.field(name) for name in names])
        batches = (batch.select(names) for batch in batches)
    write_table(destination, schema, batches, manifest)
    return derivation


def with_derived(summary: Summary, derivation: Derivation) -> Summary:
    """A summary with what was made of the answers."""
    evaluations = derivation.evaluations
    summary = replace(
        summary,
        parse_errors=derivation.misfits,
        labels=dict(derivation.labels.most_common()),
        evaluation=evaluations.document() if evaluations is not None else None,
        evaluation_lines=evaluations.lines() if evaluations is not None else [],
    )
    if derivation.misfits and summary.exit_code == ExitCode.OK:
        summary = replace(summary, exit_code=ExitCode.ROWS_FAILED, reason=summary.reason or "parse_errors")
    return summary


class _GivenUpError(Exception):
    """An output that is not wanted after all."""


class EarlyOutput:
    """Writes the output behind a run that has no more rows to draw, while its last answers are awaited.

    It goes as far as the first row that is not settled yet, waits there for the end of the run, and ends the file then.
    """

    def __init__(self, plan: Plan, run: Run, destination: Destination, *, retry_failed: bool) -> None:
        self._plan = plan
        self._retry_failed = retry_failed
        self._run = run
        self._destination = destination
        self._is_begun = False
        self._is_over = threading.Event()
        self._is_given_up = False
        self._is_done = threading.Event()
        self._summary: Summary | None = None
        self._derivation: Derivation | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin, in a thread of its own; without one, all of it is left for the end."""
        with suppress(RuntimeError):
            threading.Thread(target=self._write, name="output", daemon=True).start()
            self._is_begun = True

    def finish(self, summary: Summary) -> Derivation | None:
        """The run is over: end the file. What was made of its answers; None if there is no file, or it is not wanted.

        What went wrong on the way may go right now.

        Raises:
            BrokenPromiseError: its rows do not add up to the ledger.
        """
        self._summary = summary
        self._end()
        if isinstance(self._error, BrokenPromiseError):
            raise self._error
        return self._derivation if not self._is_given_up else None

    def give_up(self) -> None:
        """What was begun and not finished is not wanted; it leaves no trace."""
        self._is_given_up = True
        self._end()

    def _end(self) -> None:
        self._is_over.set()
        if self._is_begun:
            # Not join(): broken off by a signal, it takes a thread that still runs for one that has ended.
            self._is_done.wait()

    def _write(self) -> None:
        try:
            # SQLite's connections belong to their thread.
            with closing(LedgerView.read(self._plan.job.ledger_path)) as ledger:

                def wait(start: int, stop: int) -> None:
                    if self._is_over.is_set() or not ledger.is_settled(
                        self._run, self._plan.slots, start, stop, retry_failed=self._retry_failed
                    ):
                        self._last_word()

                self._derivation = write_output(self._plan, ledger, self._run, self._destination, self._last_word, wait)
        except _GivenUpError:
            pass
        except BaseException as exc:  # noqa: BLE001 - it is for whoever waits for the file
            self._error = exc
        finally:
            self._is_done.set()

    def _last_word(self) -> Summary:
        self._is_over.wait()
        if self._summary is None or self._is_given_up:
            raise _GivenUpError
        return self._summary


def results_of(plan: Plan, run: Run) -> Results:
    """What builds the result columns of a run."""
    return Results(
        plan.result_schema,
        run_id=run.run_id,
        slots=plan.slots,
        requested=plan.requested,
        prefix=plan.job.output.prefix,
    )


def expected_batches(
    plan: Plan,
    ledger: LedgerView,
    run: Run,
    results: Results,
    derivation: Derivation,
    wait: Callable[[int, int], None] = lambda start, stop: None,
) -> Iterator[pa.RecordBatch]:
    """The rows of a run's output, from its input and what the ledger holds when it comes to them."""
    for batch in plan.source.batches():
        wait(batch.start, batch.start + batch.rows.num_rows)
        for start, stop in _pieces(ledger, run, batch.start, batch.start + batch.rows.num_rows):
            columns, result_rows = results.batch(
                start,
                stop - start,
                ledger.standing(run, start, stop),
                ledger.row_faults(run, start, stop),
                ledger.repairs_wanted(run, start, stop),
            )
            rows = _repeated(batch.rows.slice(start - batch.start, stop - start), plan.slots.number)
            derived = derivation.batch(rows, result_rows)
            del result_rows  # before all is written
            yield pa.RecordBatch.from_arrays([*rows.columns, *columns.columns, *derived], schema=plan.schema)


def _repeated(rows: pa.RecordBatch, times: int) -> pa.RecordBatch:
    """Each row so often, one after the other."""
    if times == 1:
        return rows
    return rows.take(build([index for index in range(rows.num_rows) for _ in range(times)], pa.int64()))


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
