"""One invocation of a job: wires the rooms together, from the job file to the exit code."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from batchrun import local
from batchrun.answers import Results, result_schema
from batchrun.errors import BatchrunError, BrokenPromiseError, ExitCode, JobError, StorageError
from batchrun.job import Job
from batchrun.ledger import Ledger, Run
from batchrun.money import Price, usd_text
from batchrun.progress import Progress
from batchrun.providers import Endpoint, resolve
from batchrun.records import Request, RowFault, Slot
from batchrun.runner import Runner, Stop
from batchrun.sink import check_writable, write_parquet
from batchrun.source import Source
from batchrun.summary import Summary, exact_json
from batchrun.template import NotRenderedError, Template

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the command line sets for one invocation."""

    retry_failed: bool = False
    adopt_ledger: bool = False


@dataclass(frozen=True)
class Preview:
    """What `check` shows."""

    job: Job
    rows: int
    faults: list[RowFault]
    """The first few rows that give no request."""
    fault_count: int
    samples: list[tuple[int, list[dict[str, Any]]]]
    """Row index and rendered messages of the first rows."""
    warnings: list[str]


class _Plan:
    """A job with everything that turns its rows into requests; nothing is sent yet."""

    def __init__(self, job: Job, endpoint: Endpoint, model: str) -> None:
        self.job = job
        self.endpoint = endpoint
        self.model = model
        self.source = Source(job)
        self.template = Template(job, self.source.columns, endpoint, model)
        self.result_schema = result_schema(streamed=job.stream, prefix=job.output.prefix)
        self._refuse_collisions()

    def shape(self) -> str:
        """Unchanged, with unchanged input files: the same requests in the same slots."""
        parts = [self.job.request_shape(), self.endpoint.identity, self.endpoint.system, self.model]
        return blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def requests(self) -> Iterator[Request | RowFault]:
        """Every slot of the input, in order."""
        for batch in self.source.batches(self.template.columns):
            for offset, row in enumerate(batch.rows.to_pylist()):
                yield self._request(batch.start + offset, row)

    def pending(self, ledger: Ledger, run: Run, *, retry_failed: bool) -> Iterator[Request]:
        """The slots that the ledger lacks an answer to, in order."""
        for batch in self.source.batches(self.template.columns):
            stop = batch.start + batch.rows.num_rows
            states = ledger.states(run, batch.start, stop)
            wanted = {}
            for row_index in range(batch.start, stop):
                state = states.get(Slot(row_index, self.model))
                if state is None or not (state.is_answered or (state.is_failed and not (retry_failed and state.tries))):
                    wanted[row_index] = state.tries if state else 0
            if not wanted:
                continue
            for row_index, row in enumerate(batch.rows.to_pylist(), batch.start):
                if row_index in wanted:
                    request = self._request(row_index, row)
                    if isinstance(request, Request):
                        yield replace(request, tries=wanted[row_index])

    def _request(self, row_index: int, row: Mapping[str, Any]) -> Request | RowFault:
        try:
            return self.template.request(row_index, row)
        except NotRenderedError as exc:
            return RowFault(Slot(row_index, self.model), str(exc))

    def _refuse_collisions(self) -> None:
        doubled = [name for name in self.result_schema.names if name in self.source.schema.names]
        if not doubled:
            return
        mend = "set output: {path: …, prefix: answer_}"
        if self.source.is_own_output:
            mend += f", or drop them by input: {{columns: {{{doubled[0]}: null, …}}}}"
        raise JobError(f"the input has columns named like results ({', '.join(doubled)}): {mend}")


def _plan(
    job: Job, environ: Mapping[str, str] | None, identity: str | None = None
) -> tuple[_Plan, local.Weights | None]:
    """`identity`: of the endpoint that a run was sent to, where it is not to be looked for again."""
    setting = job.provider
    endpoint = resolve(**setting.model_dump(), environ=environ)
    weights = None
    model = job.model
    if setting.name == "local":
        if identity is None:
            weights = local.find_weights(job.model, job.resolve(job.model))
            identity, model = weights.identity, weights.name
        else:
            model = job.model if job.model == local.DEFAULT_MODEL else Path(job.model).stem
    if identity is not None:
        endpoint = replace(endpoint, identity=identity)
    return _Plan(job, endpoint, model), weights


# --- check --------------------------------------------------------------------------------------------------


def check(job: Job, environ: Mapping[str, str], *, samples: int = 3) -> Preview:
    """Validate a job and read its whole input; nothing is sent and nothing is written.

    Raises:
        JobError: what a run would refuse.
    """
    warnings = []
    try:
        plan, _ = _plan(job, environ)
    except JobError as exc:
        # Without its key, or the model on this machine, a job can still be checked.
        plan, _ = _plan(job, None, identity="unchecked")
        warnings.append(f"a run would stop here: {exc}")
    if job.input.id is not None:
        _refuse_doubled_ids(plan)
    rows = fault_count = 0
    faults: list[RowFault] = []
    for request in plan.requests():
        rows += 1
        if isinstance(request, RowFault):
            fault_count += 1
            if len(faults) < 5:
                faults.append(request)
    shown = []
    for batch in plan.source.batches(plan.template.columns):
        for offset, row in enumerate(batch.rows.slice(0, samples).to_pylist()):
            with suppress(NotRenderedError):
                shown.append((batch.start + offset, plan.template.messages(row)))
        break
    return Preview(job, rows, faults, fault_count, shown, warnings)


def _refuse_doubled_ids(plan: _Plan) -> None:
    from batchrun.uniqueness import first_duplicate

    name = plan.job.input.id
    assert name is not None
    values = (
        (batch.start + offset, value.as_py())
        for batch in plan.source.batches([name])
        for offset, value in enumerate(batch.rows.column(0))
    )
    found = first_duplicate(values)
    if found is not None:
        row, earlier, value = found
        raise JobError(
            f"input.id: the value {value!r} of the column {name!r} stands twice: in the rows {earlier + 1} and "
            f"{row + 1} of {plan.source.file_names}"
        )


# --- run ----------------------------------------------------------------------------------------------------


def run(job: Job, options: Options, environ: Mapping[str, str], *, say: Say, stream: IO[str] | None) -> Summary:
    """Run a job, or go on with its unfinished run. The caller holds the ledger's lock.

    Args:
        say: takes lines of talk.
        stream: where the progress is shown; None for nowhere.

    Raises:
        BatchrunError: whatever keeps the job from being run; its `exit_code` is the process's.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        plan, weights = _plan(job, environ)
        ledger = Ledger.open(job.ledger_path, job_name=job.name, job_path=job.path, adopt=options.adopt_ledger)
        stack.callback(ledger.close)
        current = _choose_run(ledger, options)
        output = _output_path(job, current)
        check_writable(output)
        price = Price(**job.prices.model_dump()) if job.prices else None
        ledger.begin_invocation(
            current,
            job=job.snapshot(),
            endpoint=plan.endpoint.identity,
            prices=job.prices.model_dump(mode="json") if job.prices else None,
        )
        stop: Stop | None = None
        sent = 0
        try:
            rows = _check_input(plan, ledger, current, say)
            stop, sent = _ask(plan, weights, ledger, current, rows, price, options, stream)
            summary = _finish(plan, ledger, current, stop, output, began, sent, say)
        except BaseException as exc:
            _record_end(ledger, current, exc)
            raise
    return summary


def _choose_run(ledger: Ledger, options: Options) -> Run:
    last = ledger.last_run()
    if options.retry_failed and last is not None and last.state == "finished":
        ledger.reopen(last)
    return ledger.current_run()


def _check_input(plan: _Plan, ledger: Ledger, current: Run, say: Say) -> int:
    """Read the whole input once before anything is sent, unless nothing has changed since; return its rows."""
    found = {"files": plan.source.fingerprint(), "shape": plan.shape()}
    known = ledger.checked_input(current)
    if known is not None and {name: known[name] for name in found} == found:
        ledger.keep_checked_input(known)
        rows = int(known["rows"])
    else:
        rows = _place(plan, ledger, current, found)
        if current.is_new and (earlier := ledger.earlier_answers(current)) is not None:
            cost = f"about ${usd_text(round(earlier.usd, 6))}" if earlier.usd is not None else "at a cost not known"
            say(
                f"{earlier.slots} rows that run {earlier.run_id} answered will be asked and paid for again, "
                f"{cost}; reuse is off"
            )
    if not current.is_new:
        totals = ledger.totals(current)
        say(f"going on with run {current.run_id}: {totals.ok} of {rows} rows are answered, {totals.failed} failed")
    return rows


def _place(plan: _Plan, ledger: Ledger, current: Run, found: dict[str, Any]) -> int:
    if plan.job.input.id is not None:
        _refuse_doubled_ids(plan)
    rows = 0

    def counted() -> Iterator[Request | RowFault]:
        nonlocal rows
        for request in plan.requests():
            rows += 1
            yield request

    ledger.place(current, counted())
    ledger.keep_checked_input({**found, "rows": rows})
    return rows


def _ask(
    plan: _Plan,
    weights: local.Weights | None,
    ledger: Ledger,
    current: Run,
    rows: int,
    price: Price | None,
    options: Options,
    stream: IO[str] | None,
) -> tuple[Stop | None, int]:
    """Send what is missing; return what stopped it and how many attempts were made."""
    pending = plan.pending(ledger, current, retry_failed=options.retry_failed)
    first = next(pending, None)
    if first is None:
        return None, 0
    endpoint = plan.endpoint
    server = None
    if weights is not None:
        server, address = local.start(weights, plan.job.concurrency)
        endpoint = replace(endpoint, base_url=address)
    totals = ledger.totals(current)
    progress = Progress(stream, total=rows, settled=totals.ok + totals.failed, usd=totals.usd) if stream else None
    try:
        return asyncio.run(_drive(plan, endpoint, ledger, current, _chain(first, pending), price, progress))
    finally:
        if progress is not None:
            progress.close()
        del server


def _chain(first: Request, rest: Iterator[Request]) -> Iterator[Request]:
    yield first
    yield from rest


async def _drive(
    plan: _Plan,
    endpoint: Endpoint,
    ledger: Ledger,
    current: Run,
    requests: Iterator[Request],
    price: Price | None,
    progress: Progress | None,
) -> tuple[Stop | None, int]:
    from batchrun.chat import ChatSender

    job = plan.job
    sent = 0

    def settled(settlement: Any) -> None:
        nonlocal sent
        sent += 1
        if progress is not None:
            progress.settle(settlement)

    async with ChatSender(
        endpoint,
        concurrency=job.concurrency,
        timeout_seconds=job.timeout_seconds,
        max_response_bytes=job.max_response_bytes,
        streamed=job.stream,
        price=price,
    ) as sender:
        runner = Runner(
            ledger,
            current,
            sender,
            requests,
            concurrency=job.concurrency,
            max_attempts=job.retry.max_attempts,
            max_seconds=job.retry.max_seconds,
            stop_seconds=job.stop_seconds,
            on_settled=settled,
        )
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, runner.interrupt, ExitCode.INTERRUPTED)
        loop.add_signal_handler(signal.SIGTERM, runner.interrupt, ExitCode.TERMINATED)
        ticking = asyncio.create_task(_tick(progress)) if progress is not None else None
        try:
            stop = await runner.run()
        finally:
            if ticking is not None:
                ticking.cancel()
            loop.remove_signal_handler(signal.SIGINT)
            loop.remove_signal_handler(signal.SIGTERM)
    return stop, sent


async def _tick(progress: Progress) -> None:
    while True:
        await asyncio.sleep(1)
        progress.tick()


def _finish(
    plan: _Plan,
    ledger: Ledger,
    current: Run,
    stop: Stop | None,
    output: Path,
    began: float,
    sent: int,
    say: Say,
) -> Summary:
    """Write the output and settle how the invocation ended."""
    if stop is not None:
        say(stop.message)
    checked = ledger.checked_input(current)
    assert checked is not None
    is_changed = stop is not None and stop.reason == "input_changed"
    if stop is None or stop.exit_code not in (ExitCode.STORAGE, ExitCode.BUG):
        now = {"files": plan.source.fingerprint(), "shape": plan.shape()}
        if now["files"] != checked["files"]:
            # Answers are placed in the rows that ask for them now.
            is_changed = True
            plan = _Plan(plan.job, plan.endpoint, plan.model)
            _place(plan, ledger, current, now)
            checked = ledger.checked_input(current)
            assert checked is not None
            say("the input has changed under the run: answers were placed in the rows that ask for them now")
    summary = Summary(
        job=plan.job.name,
        run_id=current.run_id,
        model=plan.job.model,
        rows=int(checked["rows"]),
        totals=ledger.totals(current),
        exit_code=ExitCode.OK,
        reason=None,
        output=None,
        ledger=str(ledger.path),
        seconds=0.0,
        sent=sent,
    )
    exit_code, reason = _outcome(summary, stop, is_changed)
    advice = None
    if any(kind == "not_found" for kind, _, _ in summary.totals.failures) and plan.endpoint.name != "local":
        from batchrun.catalog import model_advice

        advice = model_advice(plan.endpoint, plan.job.model)
    summary = replace(summary, exit_code=exit_code, reason=reason, advice=advice)
    is_whole = summary.pending == 0
    is_asked_for = is_whole or plan.job.output.partial
    if is_asked_for and exit_code not in (ExitCode.STORAGE, ExitCode.BUG) and not (stop and stop.is_immediate):
        _write_output(plan, ledger, current, output, summary)
        summary = replace(summary, output=str(output))
    ledger.end_invocation(current, exit_code=exit_code, reason=reason, is_finished=is_whole)
    return replace(summary, seconds=time.monotonic() - began)


def _outcome(summary: Summary, stop: Stop | None, is_changed: bool) -> tuple[ExitCode, str | None]:
    signalled = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
    if stop is not None and not (stop.exit_code in signalled and summary.pending == 0):
        return stop.exit_code, stop.reason
    if is_changed:
        return ExitCode.ROWS_FAILED, "input_changed"
    if summary.pending:
        raise BrokenPromiseError(
            f"promise 1 (every slot ends in one state): {summary.pending} of {summary.rows} rows are neither answered "
            f"nor failed, and nothing stopped the run; keep {summary.ledger} for a bug report"
        )
    return (ExitCode.ROWS_FAILED, "rows_failed") if summary.totals.failed else (ExitCode.OK, None)


def _record_end(ledger: Ledger, current: Run, exc: BaseException) -> None:
    """Note in the ledger how an invocation broke off; if even that fails, the first error is the one to show."""
    exit_code = exc.exit_code if isinstance(exc, BatchrunError) else ExitCode.BUG
    if isinstance(exc, KeyboardInterrupt):
        exit_code = ExitCode.INTERRUPTED
    elif isinstance(exc, SystemExit):
        exit_code = ExitCode.TERMINATED
    with suppress(StorageError):
        ledger.end_invocation(current, exit_code=exit_code, reason=type(exc).__name__, is_finished=False)


# --- output -------------------------------------------------------------------------------------------------


def export(job: Job, *, adopt: bool = False) -> Summary:
    """Write the output of the newest run again, from the ledger, for nothing. The caller holds the ledger's lock.

    Raises:
        BatchrunError: there is no run, or the output cannot be written.
    """
    began = time.monotonic()
    if not job.ledger_path.exists():
        raise JobError(f"there is nothing to export: no run of this job is in {job.ledger_path}")
    with ExitStack() as stack:
        ledger = Ledger.open(job.ledger_path, job_name=job.name, job_path=job.path, adopt=adopt)
        stack.callback(ledger.close)
        current = ledger.last_run()
        known = ledger.last_snapshot(current) if current is not None else None
        if current is None or known is None:
            raise JobError(
                f"there is nothing to export: no run of this job has got as far as its input ({ledger.path})"
            )
        snapshot, identity = known
        plan, _ = _plan(job.with_shape_of(snapshot), None, identity)
        found = {"files": plan.source.fingerprint(), "shape": plan.shape()}
        checked = ledger.checked_input(current)
        if checked is None or {name: checked[name] for name in found} != found:
            rows = _place(plan, ledger, current, found)
        else:
            rows = int(checked["rows"])
        output = _output_path(job, current)
        summary = Summary(
            job=job.name,
            run_id=current.run_id,
            model=plan.job.model,
            rows=rows,
            totals=ledger.totals(current),
            exit_code=ExitCode.OK,
            reason=None,
            output=str(output),
            ledger=str(ledger.path),
            seconds=0.0,
            sent=0,
        )
        _write_output(plan, ledger, current, output, summary)
    return replace(summary, seconds=time.monotonic() - began)


def _output_path(job: Job, current: Run) -> Path:
    started = datetime.fromtimestamp(current.started_at / 1e6, UTC)
    return job.resolve(job.output.path.format(run_id=current.run_id, date=started.strftime("%Y-%m-%d")))


def _write_output(plan: _Plan, ledger: Ledger, current: Run, output: Path, summary: Summary) -> None:
    results = Results(
        plan.result_schema,
        run_id=current.run_id,
        models=[plan.model],
        requested={plan.model: plan.job.model},
        prefix=plan.job.output.prefix,
    )
    schema = pa.schema([*plan.source.schema, *plan.result_schema])

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in plan.source.batches():
            stop = batch.start + batch.rows.num_rows
            columns = results.batch(
                batch.start,
                batch.rows.num_rows,
                ledger.standing(current, batch.start, stop),
                ledger.row_faults(current, batch.start, stop),
            )
            yield pa.RecordBatch.from_arrays([*batch.rows.columns, *columns.columns], schema=schema)

    def manifest() -> str:
        if plan.source.fingerprint() == _placed_files(ledger, current):
            _check_sums(summary, results)
        return exact_json(summary.manifest())

    write_parquet(output, schema, batches(), manifest)


def _placed_files(ledger: Ledger, current: Run) -> Any:
    """The input files as they were when the ledger's groups were placed."""
    checked = ledger.checked_input(current)
    return checked["files"] if checked else None


def _check_sums(summary: Summary, results: Results) -> None:
    """Promises 1 and 5, on every output that is written."""
    counts, totals = results.counts, summary.totals
    wrote = (counts.rows, counts.ok, counts.failed, counts.pending)
    should = (summary.rows, totals.ok, totals.failed, summary.pending)
    if wrote != should:
        raise BrokenPromiseError(
            f"promise 1 (every slot ends in one state): the output has {wrote} rows (all, ok, failed, pending), the "
            f"ledger {should}; keep {summary.ledger} for a bug report"
        )
    if counts.usd + totals.unplaced_usd != totals.usd:
        raise BrokenPromiseError(
            f"promise 5 (money is exact): the rows add up to ${usd_text(counts.usd)}, those without a row to "
            f"${usd_text(totals.unplaced_usd)}, the ledger to ${usd_text(totals.usd)}; keep {summary.ledger} for a "
            "bug report"
        )
