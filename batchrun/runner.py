"""Send what the ledger lacks, N at a time; stop without losing what is in flight.

The runner knows a sender through one method (`Intent → Exchange`, a value), a ledger through its commits, and nothing
about HTTP, YAML or files. Each worker draws a row, records the intent, sends, and hands over the answer to be settled
with the next commit, so that an answer is on disk before its worker sends again.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from batchrun.budget import Budget
from batchrun.errors import BatchrunError, BrokenPromiseError, ExitCode, InputError, Promise, Stop
from batchrun.health import Health
from batchrun.journal import Journal
from batchrun.ledger import Ledger
from batchrun.ledger_view import Run
from batchrun.money import from_pico, usd_text
from batchrun.pacing import Pacing
from batchrun.rates import Rates
from batchrun.records import (
    Action,
    Answer,
    Exchange,
    Failure,
    Intent,
    Request,
    Reservation,
    Review,
    Settlement,
    now_us,
)

if TYPE_CHECKING:
    from batchrun.retry import Retries

_WAITING_PER_SLOT = 4
_RAMP_SECONDS = 0.3
_AT_ONCE = 32
_SYNC_SECONDS = 1.0
_DURABLE_GAP = 0.01
"""Seconds between commits that each wait for the disk."""
_WALLS = 3
"""Rows that are told to wait for longer than they may, without an answer between; or times that a lone row is."""
_WALL_PAUSE = 1.0
_LOSSES = 3
"""So often a row is sent again at once where its sender was lost; it may be what its senders are lost by."""
_LATELY = 100
"""Answers by which it is told how long one takes."""
_LEAST_LOOK_SECONDS, _MOST_LOOK_SECONDS = 0.01, 1.0
_LAST_TRIES = 3
"""Each makes more room on a full disk than the one before."""


class Breaker(Protocol):
    """Stops a run whose answers are bad."""

    def note(self, *, fits: bool) -> Stop | None:
        """Take a row that is settled; `fits`: it has the answer that is wanted."""

    def is_shut(self, drawn: int) -> bool:
        """True as long as no more rows than those `drawn` may be asked."""


class Sender(Protocol):
    """What sends requests: one process's HTTP client, or many machines."""

    async def send(self, intent: Intent) -> Exchange:
        """Send one request and return what became of it."""


ASKED_AGAIN = "asked_again"
"""The reason of a stop: an answered row was about to be asked."""
_DEADLINE = Stop(ExitCode.LIMIT, "deadline", "the deadline is near: no more rows are asked; run again to go on")
NO_ROOM = Stop(ExitCode.LIMIT, "budget", "the next row does not fit into the budget")


@dataclass(order=True, slots=True)
class _Work:
    due: float
    order: int
    request: Request = field(compare=False)
    started: float | None = field(default=None, compare=False)
    retry_state: Any = field(default=None, compare=False)
    tries: int = field(default=0, compare=False)
    walls: int = field(default=0, compare=False)
    """How often it was told to wait for longer than it may."""
    losses: int = field(default=0, compare=False)
    """How often whoever was to send it was lost."""


class Runner:
    """One invocation's work on a run.

    Args:
        requests: rows to be asked, drawn one by one as places get free.
        budget: what they may cost.
        rates: how many may go out in a minute.
        clock: seconds, monotonic.
        models: those that are asked; if one refuses all rows, the others go on.
        review: looks at each answer.
        breaker: stops a run whose answers are bad.
        seconds_left: until the deadline; None without one.
        on_settled: called with every settlement, for the progress display.
        on_drained: called once there are no more rows to draw.
    """

    def __init__(
        self,
        ledger: Ledger,
        run: Run,
        sender: Sender,
        requests: Iterator[Request],
        budget: Budget,
        rates: Rates,
        *,
        concurrency: int,
        max_attempts: int,
        max_seconds: float,
        stop_seconds: float,
        clock: Callable[[], float],
        models: Collection[str] = (),
        review: Callable[[Request, Answer], Review] = lambda request, answer: Review(),
        breaker: Breaker | None = None,
        seconds_left: Callable[[], float] | None = None,
        on_settled: Callable[[Settlement], None] = lambda settlement: None,
        on_drained: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger = ledger
        self._run = run
        self._sender = sender
        self._requests = requests
        self._budget = budget
        self._rates = rates
        self._concurrency = concurrency
        self._stop_seconds = stop_seconds
        self._on_settled = on_settled
        self._on_drained = on_drained
        self._clock = clock
        self._max_attempts = max_attempts
        self._max_seconds = max_seconds
        self._pacing = Pacing(concurrency, clock, longest_pause=max_seconds)
        self._journal = Journal(ledger, run, self._fail, gap=_DURABLE_GAP if budget.is_durable else 0.0)
        self._health = Health(max_attempts, max_seconds, clock())
        self._turn = asyncio.Lock()
        self._models = models
        self._review = review
        self._breaker = breaker
        self._seconds_left = seconds_left
        self._took: deque[float] = deque(maxlen=_LATELY)
        """Seconds of the last answers."""
        self._drawn = 0
        self._refused: dict[str, Stop] = {}
        """Models that refuse all rows, and why."""
        self._waiting: list[_Work] = []
        self._order = itertools.count()
        self._is_exhausted = False
        self._workers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._woken = asyncio.Event()
        self._signals = 0
        self._undecided = 0
        """Rows that were drawn and that no attempt has decided yet."""
        self._has_failed = False
        self.stop: Stop | None = None
        self.sent = 0
        """Attempts made."""

    async def run(self) -> Stop | None:
        """Work until every row is settled or the run is stopped; None if nothing stopped it."""
        try:
            beside = [asyncio.create_task(self._sync_regularly())]
            if self._seconds_left is not None:
                self._halt_in_time(self._seconds_left())
                beside.append(asyncio.create_task(self._watch_deadline(self._seconds_left)))
            # Many connections are opened over a moment, not all in one.
            gap = _RAMP_SECONDS / self._concurrency if self._concurrency > _AT_ONCE else 0.0
            self._workers = [asyncio.create_task(self._work(index * gap)) for index in range(self._concurrency)]
            await asyncio.wait(self._workers)
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)
        finally:
            for worker in self._workers:
                worker.cancel()
        for _ in range(_LAST_TRIES):
            try:
                self._journal.flush()
                self._ledger.sync()
                break
            except Exception as exc:  # noqa: BLE001 - how the run ended must be told all the same
                self._fail(exc)
        is_outer = self.stop is not None and (self.stop is _DEADLINE or self.stop.exit_code in _SIGNALLED)
        if is_outer and not self._has_left():
            self.stop = None  # it came when all was done
        if self.stop is None:
            self.stop = next(iter(self._refused.values()), None)
        return self.stop

    def _has_left(self) -> bool:
        if self._undecided or self._has_failed:
            return True
        try:
            return next(self._requests, None) is not None
        except InputError:
            return True  # the input has changed since; whoever reads it next will say so

    @cached_property
    def _retries(self) -> Retries:
        # Most runs never need it.
        from batchrun.retry import Retries

        return Retries(self._max_attempts, self._max_seconds, self._clock)

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return self._budget.in_flight

    def interrupt(self, exit_code: ExitCode) -> None:
        """A signal: the first draws no more rows and awaits what is in flight, the second stops at once."""
        self._signals += 1
        self._halt(Stop(exit_code, "interrupted", "interrupted; run again to go on"))
        if self._signals > 1:
            self.stop = replace(self.stop, is_immediate=True) if self.stop is not None else None
            self._cancel()

    # --- workers --------------------------------------------------------------------------------------------

    async def _work(self, delay: float) -> None:
        await self._nap(delay)
        try:
            while (work := await self._draw()) is not None:
                await self._attempt(work)
        except Exception as exc:  # noqa: BLE001 - a bug must not cancel what other workers have paid for
            self._fail(exc)

    async def _draw(self) -> _Work | None:
        """The next row: a retry that is due, else a new one; None if there is nothing left to wait for.

        Whoever leaves a row waiting comes back here, so that there is always a worker for it.
        """
        while not self._stopping.is_set():
            now = self._clock()
            if self._waiting and self._waiting[0].due <= now:
                return heapq.heappop(self._waiting)
            if self._breaker is not None and self._breaker.is_shut(self._drawn):
                # The first rows are looked at before any other is asked.
                await self._nap(self._waiting[0].due - now if self._waiting else None)
                continue
            if not self._is_exhausted and len(self._waiting) < _WAITING_PER_SLOT * self._concurrency:
                request = next(self._requests, None)
                if request is not None:
                    if request.slot.model in self._refused:
                        continue
                    self._undecided += 1
                    self._drawn += 1
                    return _Work(now, next(self._order), request, tries=request.tries)
                self._is_exhausted = True
                self._on_drained()
            if not self._waiting:
                return None
            await self._nap(self._waiting[0].due - now)
        return None

    async def _attempt(self, work: _Work) -> None:
        await self._pacing.enter()
        try:
            # One after the other: neither a long prompt nor a dear one must see others pass by for ever.
            async with self._turn:
                # A permit that waits for money would be used beside those of another minute.
                has_room = not self._rates.is_bounded or await self._budget.room(work.request) is not None
                waited_for = await self._rates.enter(work.request) if has_room else 0.0
                reservation = await self._budget.reserve(work.request) if has_room else None
            if self._stopping.is_set():
                return
            if reservation is None:
                # The row stays pending.
                self._halt(NO_ROOM)
                return
            intent = self._ledger.intent(self._run, work.request, work.tries + 1, reservation)
            await self._journal.intend(intent)
            if intent.attempt_id > self._ledger.newest_intended:
                raise BrokenPromiseError(
                    Promise.INTENT_FIRST, f"attempt {intent.attempt_id} is not committed", self._ledger.path
                )
            self.sent += 1
            work.tries += 1
            sent_at = self._clock()
            if work.started is None:
                work.started = sent_at
            exchange = await self._send(intent)
            self._rates.settle(work.request, waited_for, exchange)
            self._settle(work, intent, exchange, reservation, sent_at)
        finally:
            self._pacing.leave()

    async def _send(self, intent: Intent) -> Exchange:
        """Whatever happens on the way, the attempt is settled: what was sent may be on the bill."""
        try:
            return await self._sender.send(intent)
        except BaseException as exc:
            why = _INTERRUPTED if isinstance(exc, asyncio.CancelledError) else f"{type(exc).__name__} while it was read"
            failure = Failure("interrupted", Action.RETRY, why)
            self._journal.settle(
                Settlement(
                    intent, Exchange("unknown", failure=failure), now_us(), is_final=False,
                    settled_after=self._ledger.newest_attempt,
                )
            )  # fmt: skip
            raise

    def _settle(
        self, work: _Work, intent: Intent, exchange: Exchange, reservation: Reservation, sent_at: float
    ) -> None:
        failure = exchange.failure
        if failure is None or not failure.is_engines_fault:
            self._took.append(self._clock() - sent_at)
            self._pacing.note(
                sent_at=sent_at,
                is_ok=exchange.outcome == "ok",
                is_rate_limit=failure is not None and failure.kind == "rate_limit",
                is_server_error=exchange.status is not None and exchange.status >= 500,
                retry_after=failure.retry_after if failure is not None else None,
            )
        hold = self._budget.settle(work.request, reservation, exchange)
        if hold.is_over:
            self._halt(_overcharged(intent, exchange, hold.needed_factor))
        is_final, stop = self._decide(work, exchange)
        review = self._review(work.request, exchange.answer) if exchange.answer is not None else Review(fits=False)
        settlement = Settlement(
            intent, exchange, now_us(), is_final, hold.pico, self._ledger.newest_attempt,
            review.again.repair if review.again is not None else None,
        )  # fmt: skip
        self._journal.settle(settlement)
        self._on_settled(settlement)
        if settlement.decides:
            self._undecided -= 1
            if self._breaker is not None:
                was_shut = self._breaker.is_shut(self._drawn)
                stop = stop or self._breaker.note(fits=review.fits)
                if was_shut and not self._breaker.is_shut(self._drawn):
                    self._wake()
        elif review.again is not None:
            again = _Work(self._clock(), next(self._order), review.again, tries=work.tries)
            heapq.heappush(self._waiting, again)
        if stop is not None:
            self._halt(stop)

    def _decide(self, work: _Work, exchange: Exchange) -> tuple[bool, Stop | None]:
        """Whether the exchange decides its slot, and whether it ends the run."""
        failure = exchange.failure
        is_engines_fault = failure is not None and failure.is_engines_fault
        if failure is not None and is_engines_fault and (failure.action is Action.STOP or work.losses < _LOSSES):
            return False, self._send_elsewhere(work, failure)
        stop = self._health.note(work.request.slot.model, exchange, self._clock(), work.tries - work.request.tries)
        if failure is None:
            return True, None
        match failure.action:
            case Action.STOP:
                return False, _refused(failure)
            case Action.REJECT:
                return True, stop or self._note_rejected(work.request.slot.model, failure)
            case Action.RETRY | Action.PACE:
                if work.retry_state is None:
                    work.retry_state = self._retries.begin(work.started or self._clock())
                wait = self._retries.wait(work.retry_state, exchange)
                if stop is not None or self._stopping.is_set():
                    return False, stop
                if wait is not None:
                    work.due, work.order = self._clock() + wait, next(self._order)
                    heapq.heappush(self._waiting, work)
                    return False, None
                if failure.is_providers_fault and not self._health.has_answered_since(work.started):
                    work.walls += 1
                    is_alone = work.walls >= _WALLS and self._budget.in_flight == 0
                    if is_alone or self._health.note_wall(work.request) >= _WALLS:
                        # No row fares better: more of them would only be used up against the same wall.
                        return False, _unavailable(failure)
                    work.due, work.order = self._clock() + _WALL_PAUSE, next(self._order)
                    heapq.heappush(self._waiting, work)
                    return False, None
                return True, None

    def _send_elsewhere(self, work: _Work, failure: Failure) -> Stop | None:
        """Whoever was to send it was lost: it is sent again at once, and that is none of the row's tries."""
        if failure.action is Action.STOP:
            return Stop(ExitCode.PROVIDER, failure.kind, f"{failure.message}; run again to go on")
        work.losses += 1
        if not self._stopping.is_set():
            work.due, work.order, work.started = self._clock(), next(self._order), None
            heapq.heappush(self._waiting, work)
        return None

    def _note_rejected(self, model: str, failure: Failure) -> Stop | None:
        stop = self._health.note_rejected(model, failure)
        if stop is not None:
            self._refused[model] = stop
        return stop if len(self._refused) >= len(self._models) else None

    def _fail(self, exc: Exception) -> None:
        """An exception ends the sending, but never what is in flight."""
        match exc:
            case InputError():
                # It was read whole before the first request: it has changed since.
                stop = Stop(ExitCode.ROWS_FAILED, "input_changed", str(exc))
            case BrokenPromiseError(promise=Promise.PAID_ONCE):
                # Or an input that was changed back meanwhile: whoever reads it next will know.
                stop = Stop(exc.exit_code, ASKED_AGAIN, str(exc))
            case BatchrunError():
                stop = Stop(exc.exit_code, "storage" if exc.exit_code == ExitCode.STORAGE else "bug", str(exc))
            case _:
                frame = traceback.extract_tb(exc.__traceback__)[-1]
                where = f"{frame.filename}:{frame.lineno}"
                stop = Stop(
                    ExitCode.BUG,
                    "bug",
                    f"a bug in batchrun: {type(exc).__name__}: {exc} ({where}); please report it with this "
                    f"message, and keep {self._ledger.path} as it is (with its -wal)",
                )
        self._has_failed = True
        self._halt(stop)

    # --- stopping -------------------------------------------------------------------------------------------

    def _halt(self, stop: Stop) -> None:
        """Draw no more rows, drop the waits, and await what is in flight for a bounded time."""
        if self.stop is None or _RANK[stop.exit_code] > _RANK[self.stop.exit_code]:
            self.stop = stop
        if not self._stopping.is_set():
            self._stopping.set()
            self._wake()
            self._pacing.stop()
            self._rates.stop()
            self._budget.close()
            # A deadline was known ahead: what is in flight has the time until it, and what any stop leaves on top.
            seconds = self._stop_seconds + (self._awaited if stop is _DEADLINE else 0.0)
            asyncio.get_running_loop().call_later(seconds, self._cancel)

    def _cancel(self) -> None:
        for worker in self._workers:
            worker.cancel()

    async def _nap(self, seconds: float | None) -> None:
        """Sleep; less if it is to stop, or once the first rows are looked at. None: until then."""
        if (seconds is not None and seconds <= 0) or self._stopping.is_set():
            return
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            pass

    def _wake(self) -> None:
        self._woken.set()
        self._woken.clear()

    async def _watch_deadline(self, seconds_left: Callable[[], float]) -> None:
        # Looked at now and again: this machine may sleep meanwhile, its clock may be put right, and answers may take
        # longer than they did.
        while not self._stopping.is_set():
            self._halt_in_time(left := seconds_left())
            await asyncio.sleep(min(max((left - self._awaited) / 4, _LEAST_LOOK_SECONDS), _MOST_LOOK_SECONDS))

    def _halt_in_time(self, seconds_left: float) -> None:
        if seconds_left <= self._awaited:
            self._halt(_DEADLINE)

    @property
    def _awaited(self) -> float:
        """Seconds that what is in flight may need yet, by the slowest of the last answers."""
        return max(self._took, default=0.0)

    async def _sync_regularly(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            if self._ledger.is_dirty:
                try:
                    await asyncio.to_thread(self._ledger.sync)
                except BatchrunError as exc:
                    self._fail(exc)


# When several hold: a bug, storage, a signal, the provider, the input.
_RANK = {
    ExitCode.ROWS_FAILED: 1, ExitCode.LIMIT: 2, ExitCode.PROVIDER: 3, ExitCode.INTERRUPTED: 4,
    ExitCode.TERMINATED: 4, ExitCode.STORAGE: 5, ExitCode.BUG: 6,
}  # fmt: skip

_SIGNALLED = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
_INTERRUPTED = "interrupted before an answer came"


def _overcharged(intent: Intent, exchange: Exchange, factor: Decimal | None) -> Stop:
    assert exchange.cost.usd is not None
    assert intent.reserved_pico is not None
    return Stop(
        ExitCode.LIMIT,
        "budget",
        f"the provider charged ${usd_text(exchange.cost.usd)} for row {intent.request.slot.row_index + 1}, and at most "
        f"${usd_text(from_pico(intent.reserved_pico))} was to be expected: no cap holds at such prices; "
        f"set {f'budget: {{factor: {factor}}} or ' if factor else ''}the right prices: to go on",
    )


def _refused(failure: Failure) -> Stop:
    return Stop(ExitCode.PROVIDER, failure.kind, f"the provider refuses the account: {failure}")


def _unavailable(failure: Failure) -> Stop:
    wait = f"; it asks to wait {failure.retry_after:.0f} s" if failure.retry_after else ""
    return Stop(
        ExitCode.PROVIDER,
        "unavailable",
        f"the provider cannot be asked now: {failure}{wait}; run again later",
    )
