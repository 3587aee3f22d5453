"""One invocation of a job: wires the rooms together, from the job to the exit code."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from batchrun import accounts, local
from batchrun.announce import Before, announce
from batchrun.breaker import ErrorRate, looked_at
from batchrun.budget import Budget
from batchrun.delivery import EarlyOutput, summarise, with_derived, write_output
from batchrun.derive import shift
from batchrun.errors import BrokenPromiseError, ExitCode, JobError, Promise, Stop, StorageError, exit_code_of
from batchrun.job import Job
from batchrun.ledger import Ledger
from batchrun.ledger_view import Run, known_input
from batchrun.money import usd_text
from batchrun.options import Options
from batchrun.plan import Plan, place
from batchrun.prices import Pricing
from batchrun.process import allow_connections
from batchrun.progress import Watch, Watcher
from batchrun.projection import Projection, project
from batchrun.rates import Rates
from batchrun.records import Request, now_us, utc
from batchrun.remote import AnyPath
from batchrun.runner import ASKED_AGAIN, NO_ROOM, Runner, Sender
from batchrun.sink import check_writable
from batchrun.spending import cap_reached, check_cap, open_budget, pricings_of, rows_left
from batchrun.stopper import Beginning, Stopper
from batchrun.summary import Summary
from batchrun.trend import trend_of
from batchrun.written import manifest_of

_EVER = 2**62
_BROKEN = (ExitCode.STORAGE, ExitCode.BUG)
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Ended:
    """How the sending ended."""

    stop: Stop | None = None
    sent: int = 0
    refused_pico: int | None = None
    """What the row could cost that did not fit into the budget."""


@dataclass(frozen=True)
class _Context:
    """What an invocation works with."""

    plan: Plan
    ledger: Ledger
    run: Run
    options: Options
    say: Say
    watch: Watch | None
    stopper: Stopper | None
    before: Before | None
    deadline: datetime | None


def run(
    job: Job,
    options: Options,
    environ: Mapping[str, str],
    *,
    deadline: datetime | None = None,
    say: Say,
    watch: Watch | None,
    stopper: Stopper | None = None,
) -> Summary:
    """Run a job, or go on with its unfinished run. The caller holds the ledger's lock.

    Args:
        deadline: by which it is to be done.
        say: takes lines of talk.
        watch: whom the progress is told; None for nobody.
        stopper: stops it; without one, signals do.

    Raises:
        BatchrunError: whatever keeps the job from being run; its `exit_code` is the process's.
    """
    began = time.monotonic()
    plan = Plan.to_run(job, environ, known_input(job.ledger_path))
    if job.engine.name == "local":
        allow_connections(job.concurrency)
    opened = Ledger.open(
        job.ledger_path,
        job_name=job.name,
        job_path=job.path,
        adopt=options.adopt_ledger,
        is_durable=job.budget is not None,
    )
    with closing(opened) as ledger:
        if ledger.has_lost_log:
            say(
                f"warning: the last process died at work, and its write-ahead log {ledger.path.name}-wal is gone: "
                "unless another program has folded it into the ledger, the last answers are missing and will be paid "
                "for again"
            )
        current = _choose_run(ledger, options)
        destination = plan.destination(current, adopts=options.adopt_ledger)
        check_writable(destination)
        before = Before.of(ledger)
        context = _Context(plan, ledger, current, options, say, watch, stopper, before, deadline)
        ledger.begin_invocation(current, job=job.record(), endpoint=plan.endpoint.identity)
        with _end_recorded(ledger, current):
            rows = place(plan, ledger, current)
            settled = announce(plan, ledger, current, rows, before, say, is_sample=options.sample is not None)
            early = EarlyOutput(plan, current, destination, retry_failed=options.retry_failed)
            try:
                ended = _ask(context, rows, settled, early)
                if ended.stop is not None and ended.stop is not NO_ROOM:
                    say(ended.stop.message)
                if ended.stop is not None and ended.stop.reason == "auth":
                    variable = plan.endpoint.key_variable
                    key = f"look at the key in {variable}" if variable else "no key was sent: set provider.api_key_env"
                    say(f"{key}, then run again to go on")
                summary = _finish(context, rows, ended, early)
            finally:
                early.give_up()
        summary = replace(summary, seconds=time.monotonic() - began)
    return _with_advice(plan, summary)


def _choose_run(ledger: Ledger, options: Options) -> Run:
    last = ledger.last_run()
    if options.retry_failed and last is not None and last.state == "finished":
        ledger.refuse_pruned(last, "be gone on with any more; without --retry-failed a new run begins")
        ledger.reopen(last)
    if options.is_new:
        return ledger.current_run(abandoned_before=_EVER)
    if options.max_age is None:
        return ledger.current_run()
    return ledger.current_run(abandoned_before=now_us() - options.max_age // timedelta(microseconds=1))


def _abandon_others(context: _Context) -> None:
    """Now that the run of this invocation takes their place."""
    for run in context.ledger.abandon_others(context.run):
        usd, _ = accounts.spent(context.ledger, run)
        context.say(f"run {run.run_id} is abandoned unfinished; the ${usd_text(usd)} that it has spent still count")


def _ask(context: _Context, rows: int, settled: int, early: EarlyOutput) -> _Ended:
    """Send what is missing."""
    plan, ledger, current, options = context.plan, context.ledger, context.run, context.options
    _change_repairs(context, rows)
    only = None
    if options.sample is not None:
        only = _draw(plan.pending_rows(ledger, current, rows, retry_failed=options.retry_failed), options.sample)
    pending = plan.pending(ledger, current, rows, retry_failed=options.retry_failed, only=only)
    first = next(pending, None)
    if first is None:
        _abandon_others(context)
        return _Ended()
    ledger.reserve_room(plan.job.concurrency)
    pricings = pricings_of(plan.job, plan.endpoint, plan.slots.models, ledger, say=context.say)
    budget = open_budget(plan, ledger, current, pricings)
    server = None
    if plan.weights is not None:
        server, address = local.start(plan.weights, plan.job.concurrency)
        plan.endpoint = replace(plan.endpoint, base_url=address)
    progress = None
    if context.watch is not None:
        usd, tokens = accounts.spent(ledger, current)
        slots = rows * plan.slots.number
        total = slots if only is None else min(slots, settled + len(only) * plan.slots.number)
        progress = context.watch(total=total, rows=slots, settled=settled, usd=usd, tokens=tokens)
    try:
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            ended = runner.run(_drive(context, itertools.chain([first], pending), pricings, budget, progress, early))
        if ended.stop is None or ended.stop.exit_code not in _BROKEN:
            check_cap(plan, ledger, current, budget)
        return ended
    finally:
        if progress is not None:
            progress.close()
        del server
        ledger.release_room()


def _change_repairs(context: _Context, rows: int) -> None:
    """Bring what is to be asked again in line with the job of now."""
    ledger, current = context.ledger, context.run
    before = context.before
    is_raised = before is not None and context.plan.job.repair > int(before.job.get("repair", 0))
    all_rows = context.plan.job.repair > 0 and (context.options.retry_failed or (is_raised and not current.is_new))
    changes = context.plan.reviews.changes(ledger, current, rows, all_rows=all_rows)
    ledger.change_repairs(current, changes.needless, changes.wanted)
    ledger.drop_reused(current, changes.unreused)


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it could be installed: requests cost less on it, streamed ones by a quarter."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _draw(rows: Iterator[int], number: int) -> set[int]:
    """So many of the rows, each with the same chance; memory is bounded by their number."""
    drawn: list[int] = []
    for count, row in enumerate(rows):
        if count < number:
            drawn.append(row)
        elif (place := random.randrange(count + 1)) < number:
            drawn[place] = row
    return set(drawn)


async def _drive(
    context: _Context,
    requests: Iterator[Request],
    pricings: Mapping[str, Pricing],
    budget: Budget,
    progress: Watcher | None,
    early: EarlyOutput,
) -> _Ended:
    job, deadline = context.plan.job, context.deadline
    async with AsyncExitStack() as stack:
        sender = await _begin(stack, context, _sender(context, pricings))
        _abandon_others(context)
        runner = Runner(
            context.ledger,
            context.run,
            sender,
            requests,
            budget,
            Rates(job.requests_per_minute, job.tokens_per_minute),
            concurrency=job.concurrency,
            max_attempts=job.retry.max_attempts,
            max_seconds=job.retry.max_seconds,
            stop_seconds=job.stop_seconds,
            clock=asyncio.get_running_loop().time,
            models=context.plan.slots.models,
            review=context.plan.reviews.review,
            breaker=_breaker(context),
            seconds_left=(lambda: (deadline - utc(now_us())).total_seconds()) if deadline is not None else None,
            on_settled=progress.settle if progress is not None else lambda settlement: None,
            on_drained=early.start,
        )
        ticking = asyncio.create_task(_tick(progress)) if progress is not None else None
        stopper = context.stopper
        with stopper.stopping(runner) if stopper is not None else _signals_to(runner, job.stop_seconds, context.say):
            try:
                stop = await runner.run()
            finally:
                if ticking is not None:
                    ticking.cancel()
    return _Ended(stop, runner.sent, budget.refused_pico)


async def _begin(stack: AsyncExitStack, context: _Context, sender: AbstractAsyncContextManager[Sender]) -> Sender:
    """Enter the sender, which may take a while; a stop does not wait for it."""
    if context.stopper is None:  # signals raise
        return await stack.enter_async_context(sender)
    with Beginning() as beginning, context.stopper.stopping(beginning):
        try:
            return await stack.enter_async_context(sender)
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


def _sender(context: _Context, pricings: Mapping[str, Pricing]) -> AbstractAsyncContextManager[Sender]:
    """What sends the requests: this process, or the workers of a cluster."""
    job, endpoint = context.plan.job, context.plan.endpoint
    if job.engine.name == "ray":
        from batchrun.cluster import RayCluster
        from batchrun.hands import ClusterSender

        return ClusterSender(job, endpoint, pricings, context.say, RayCluster(job))
    from batchrun.chat import ChatSender

    return ChatSender(
        endpoint,
        concurrency=job.concurrency,
        timeout_seconds=job.timeout_seconds,
        max_response_bytes=job.max_response_bytes,
        streamed=job.stream,
        pricings=pricings,
    )


def _breaker(context: _Context) -> ErrorRate | None:
    plan = context.plan
    if plan.job.max_error_rate is None:
        return None
    canary = (plan.job.canary or 0) * plan.slots.number
    is_new = context.run.is_new
    earlier = [] if is_new else plan.reviews.latest(context.ledger, context.run, looked_at(canary))
    return ErrorRate(plan.job.max_error_rate, canary, earlier)


@contextmanager
def _signals_to(runner: Runner, stop_seconds: float, say: Say) -> Iterator[None]:
    """SIGINT and SIGTERM stop the runner, and afterwards do what they did before."""
    loop = asyncio.get_running_loop()
    numbers = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}
    before = {number: signal.getsignal(number) for number in numbers}

    def interrupt(exit_code: ExitCode) -> None:
        if runner.stop is None:
            say(
                f"stopping: waiting up to {stop_seconds:g} s for {runner.in_flight} requests in flight; "
                "a second signal drops them, and they may be on the bill"
            )
        runner.interrupt(exit_code)

    for number, exit_code in numbers.items():
        loop.add_signal_handler(number, interrupt, exit_code)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


async def _tick(progress: Watcher) -> None:
    while True:
        await asyncio.sleep(1)
        progress.tick()


def _finish(context: _Context, rows: int, ended: _Ended, early: EarlyOutput) -> Summary:
    """Write the output and settle how the invocation ended."""
    plan, ledger, current, say = context.plan, context.ledger, context.run, context.say
    stop = ended.stop
    if stop is not None and stop.reason == ASKED_AGAIN and _has_changed(plan, ledger, current):
        stop = Stop(ExitCode.ROWS_FAILED, "input_changed", "the input was changed, and changed back, under the run")
    is_broken = stop is not None and stop.exit_code in _BROKEN
    is_changed = stop is not None and stop.reason == "input_changed"
    is_readable = True
    if not is_broken:
        placed = ledger.placed_input(current)
        try:
            if is_changed or not plan.is_placed_as(placed):
                is_changed = True
                plan = plan.again()
                rows = place(plan, ledger, current)
                say("the input has changed under the run: answers were placed in the rows that ask for them now")
        except JobError as exc:
            # It cannot be read any more; the answers are in the ledger, for `export` once it can.
            is_readable = False
            stop = stop or Stop(ExitCode.ROWS_FAILED, "input_changed", str(exc))
            say(f"{exc}; the answers are kept, and `batchrun export` writes them once the input can be read")
    summary = replace(summarise(plan, ledger, current, rows), sent=ended.sent)
    is_sample = context.options.sample is not None
    exit_code, reason = _outcome(summary, stop, is_changed=is_changed, is_sample=is_sample)
    summary = replace(
        summary,
        exit_code=exit_code,
        reason=reason,
        trend=trend_of(ledger, current, summary.totals),
        projection=_projected(summary, ledger, plan.job.concurrency) if is_sample else None,
    )
    if stop is NO_ROOM and plan.job.budget is not None:
        say(cap_reached(plan, ledger, current, ended.refused_pico))
        say(rows_left(summary, plan.job.budget.per))
    is_whole = summary.pending == 0
    is_wanted = (is_whole or plan.job.output.partial) and not (stop is not None and stop.is_immediate)
    # Not that of the beginning: the input, as it is now, must not be what it replaces.
    destination = plan.destination(current, adopts=context.options.adopt_ledger)
    output = destination.path
    has_nothing = not (summary.totals.ok or summary.totals.failed or is_whole)
    if is_wanted and has_nothing and (other := _whole_of_another(output, current)) is not None:
        is_wanted = False
        say(f"{output} stays as run {other} has left it: this one has nothing yet")
    if is_wanted and is_readable and not is_broken:
        if is_changed:
            early.give_up()
        derivation = early.finish(summary) or write_output(plan, ledger, current, destination, lambda: summary)
        ledger.note_output(current)
        summary = replace(with_derived(summary, derivation), output=str(output))
        summary = replace(summary, warnings=_label_warnings(ledger, current, summary))
    # A call that reads less of the input than there is does not end a run whose answers the others await.
    is_part = plan.job.has_other_input and summary.totals.unplaced > 0
    ledger.end_invocation(
        current,
        exit_code=summary.exit_code,
        reason=summary.reason,
        is_finished=is_whole and stop is None and not is_part,
    )
    return summary


def _whole_of_another(output: AnyPath, run: Run) -> str | None:
    """The id of the run whose whole output stands there, if that is another one."""
    manifest = manifest_of(output) or {}
    is_another = bool(manifest.get("complete")) and manifest.get("run_id") != run.run_id
    return str(manifest.get("run_id")) if is_another else None


def _label_warnings(ledger: Ledger, run: Run, summary: Summary) -> list[str]:
    """What there is to say of the labels beside those of the last run; it is noted for the next one."""
    if not summary.labels:
        return []
    before = ledger.earlier_labels(run)
    if not summary.pending:
        ledger.note_labels(run, summary.labels)
    warning = shift(summary.labels, before) if before is not None else None
    return [warning] if warning is not None else []


def _has_changed(plan: Plan, ledger: Ledger, current: Run) -> bool:
    try:
        return not plan.is_placed_as(ledger.placed_input(current))
    except JobError:
        return True  # it cannot even be read any more


def _projected(summary: Summary, ledger: Ledger, concurrency: int) -> Projection:
    """What the whole run will take, by the rows that this invocation has asked."""
    costs = accounts.row_costs(ledger, ledger.invocation)
    left = summary.pending
    dollars = [float(cost.usd) for cost in costs if cost.usd is not None]
    usd = project(dollars, left)
    tokens = project([float(cost.total_tokens) for cost in costs], left)
    seconds = project([cost.seconds for cost in costs], left)
    return Projection(
        rows=len(costs),
        usd=usd.plus(float(summary.totals.usd)) if usd is not None else None,
        total_tokens=tokens.plus(summary.totals.total_tokens) if tokens is not None else None,
        seconds=seconds.times(1 / concurrency) if seconds is not None else None,
    )


def _outcome(summary: Summary, stop: Stop | None, *, is_changed: bool, is_sample: bool) -> tuple[ExitCode, str | None]:
    if stop is not None:
        return stop.exit_code, stop.reason
    if is_changed:
        return ExitCode.ROWS_FAILED, "input_changed"
    if summary.pending and is_sample:
        return (ExitCode.ROWS_FAILED if summary.totals.failed else ExitCode.OK), "sample"
    if summary.pending:
        raise BrokenPromiseError(
            Promise.ONE_STATE,
            f"{summary.pending} of {summary.rows} rows are neither answered nor failed, and nothing stopped the run",
            summary.ledger,
        )
    return (ExitCode.ROWS_FAILED, "rows_failed") if summary.totals.failed else (ExitCode.OK, None)


@contextmanager
def _end_recorded(ledger: Ledger, current: Run) -> Iterator[None]:
    """Note in the ledger how an invocation broke off; if even that fails, the first error is the one to show."""
    try:
        yield
    except BaseException as exc:
        exit_code = exit_code_of(exc)
        with suppress(StorageError):
            # A run that has sent nothing must not stand before the last that has.
            ledger.forget_input(current)
            ledger.end_invocation(current, exit_code=exit_code, reason=type(exc).__name__, is_finished=False)
        raise


def _with_advice(plan: Plan, summary: Summary) -> Summary:
    """Ask the provider what to use instead of a model that it does not know; all else is done by now."""
    is_unknown = any(kind == "not_found" for kind, _, _ in summary.totals.failures)
    if not is_unknown or not summary.sent or plan.weights is not None:
        return summary
    from batchrun.catalog import model_advice

    advice = [text for model in plan.job.models if (text := model_advice(plan.endpoint, model))]
    return replace(summary, advice="; ".join(advice) or None)
