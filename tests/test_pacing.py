"""Pacing, retries and the health of a provider, on a clock of their own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from batchrun.accounts import totals
from batchrun.budget import Budget
from batchrun.errors import ExitCode, Stop
from batchrun.health import Health
from batchrun.ledger import Ledger
from batchrun.pacing import Pacing
from batchrun.prices import Pricing
from batchrun.rates import Rates
from batchrun.records import Action, Answer, Asked, Exchange, Failure, Intent, Request, Slot
from batchrun.retry import Retries
from batchrun.runner import Runner


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def answers(pacing: Pacing, clock: Clock, number: int, *, ok: bool) -> None:
    for _ in range(number):
        pacing.note(sent_at=clock.now, is_ok=ok, is_rate_limit=not ok, retry_after=0.5)


def test_a_few_rate_limits_cut_nothing() -> None:
    clock = Clock()
    pacing = Pacing(32, clock)
    for _ in range(20):
        answers(pacing, clock, 9, ok=True)
        answers(pacing, clock, 1, ok=False)
    assert pacing.allowed == 32


def walled(concurrency: int = 10) -> tuple[Clock, Pacing]:
    """A controller that was refused everything, and whose requests may probe now."""
    clock = Clock()
    pacing = Pacing(concurrency, clock)
    answers(pacing, clock, 60, ok=False)
    clock.now += 1
    return clock, pacing


@pytest.mark.parametrize("is_server_error", [False, True])
def test_what_fails_behind_a_wall_is_no_answer(is_server_error: bool) -> None:
    clock, pacing = walled()
    # Nothing was ever answered, so that no latency is known: a broken connection, or a row that is refused.
    pacing.note(sent_at=clock.now, is_ok=False, is_rate_limit=False, is_server_error=is_server_error)
    assert pacing._is_wall
    sent_at = clock.now
    clock.now += 1
    pacing.note(sent_at=sent_at, is_ok=True, is_rate_limit=False)
    assert not pacing._is_wall
    assert 1 <= pacing.allowed < 10


def test_where_nothing_is_taken_the_pauses_double() -> None:
    clock, pacing = walled()
    pauses = []
    for _ in range(6):
        clock.now = max(clock.now, pacing._next)
        began = clock.now
        pacing.note(sent_at=began, is_ok=False, is_rate_limit=True)
        pauses.append(pacing._next - began)
    assert sorted(pauses) == pauses
    assert pauses[-3:] == [16, 16, 16]


def test_an_idle_bound_does_not_grow_and_a_5xx_pauses_growth() -> None:
    clock, pacing = walled()
    sent_at, clock.now = clock.now, clock.now + 1
    pacing.note(sent_at=sent_at, is_ok=True, is_rate_limit=False)
    cut = list(pacing._bounds)

    def answered(number: int, *, troubled: bool = False) -> None:
        for _ in range(number):
            sent_at, clock.now = clock.now, clock.now + 1
            if troubled:
                pacing.note(sent_at=clock.now - 0.1, is_ok=False, is_rate_limit=False, is_server_error=True)
            pacing.note(sent_at=sent_at, is_ok=True, is_rate_limit=False)

    answered(300)
    assert pacing._bounds == cut
    pacing.in_flight = 10
    answered(300, troubled=True)
    assert pacing._bounds == cut
    clock.now += 1
    answered(600)
    assert pacing.allowed == 10
    assert pacing._borne is None


def failed(kind: str, action: Action, retry_after: float | None = None, message: str = "x") -> Exchange:
    return Exchange("failed", failure=Failure(kind, action, message, retry_after=retry_after))


OK = Exchange("ok", answer=Answer("x", "stop"))


def test_retries_are_bounded_in_attempts_and_time_and_heed_the_provider() -> None:
    clock = Clock()
    retries = Retries(3, 100, clock)
    state = retries.begin(clock.now)
    assert retries.wait(state, failed("server", Action.RETRY)) is not None
    assert retries.wait(state, failed("server", Action.RETRY)) is not None
    assert retries.wait(state, failed("server", Action.RETRY)) is None
    state = retries.begin(clock.now)
    for _ in range(20):
        wait = retries.wait(state, failed("rate_limit", Action.PACE, retry_after=2.0))
        assert wait is not None
        assert 2.0 <= wait <= 2.1
    clock.now += 99
    assert retries.wait(state, failed("rate_limit", Action.PACE, retry_after=2.0)) is None
    assert retries.wait(retries.begin(clock.now), failed("rate_limit", Action.PACE, retry_after=101.0)) is None


def test_an_outage_is_told_from_rows_that_fail_each_for_itself() -> None:
    health = Health(6, 900, 0.0)
    for moment in range(0, 890, 10):
        assert health.note("m", failed("server", Action.RETRY), moment, 1) is None
    assert health.note("m", OK, 891, 1) is None
    assert health.note("m", failed("server", Action.RETRY), 1790, 1) is None
    stop = health.note("m", failed("server", Action.RETRY), 1792, 1)
    assert stop is not None
    assert (stop.exit_code, stop.reason) == (ExitCode.PROVIDER, "outage")


def test_a_server_that_was_never_reached_stops_the_run_early() -> None:
    health = Health(6, 900, 0.0)
    stops = [health.note("m", failed("connect", Action.RETRY), 1, 1) for _ in range(20)]
    assert stops[:19] == [None] * 19
    assert stops[19] is not None
    assert stops[19].reason == "unreachable"
    one_row = Health(3, 900, 0.0)
    assert [one_row.note("m", failed("connect", Action.RETRY), 1, tries) is None for tries in (1, 2, 3)] == [
        True, True, False,
    ]  # fmt: skip


def test_the_first_rows_refused_in_the_same_words_stop_the_run() -> None:
    def stopped(messages: list[str]) -> bool:
        health = Health(6, 900, 0.0)
        stop = None
        for number, message in enumerate(messages):
            exchange = failed("not_found", Action.REJECT, message=message)
            assert exchange.failure is not None
            health.note("m", exchange, number, 1)
            stop = stop or health.note_rejected("m", exchange.failure)
        return stop is not None

    assert stopped([f"no model (request {number})" for number in range(20)])
    assert not stopped([f"row {'abcdefghijklmnopqrst'[number]} is bad" for number in range(20)])


def test_one_backends_long_wait_does_not_hold_all_rows() -> None:
    clock = Clock()
    pacing = Pacing(8, clock, longest_pause=60)
    for _ in range(60):
        pacing.note(sent_at=clock.now, is_ok=False, is_rate_limit=True, retry_after=7200)

    async def enter() -> None:
        async with asyncio.timeout(0.2):
            await pacing.enter()

    clock.now += 59
    with pytest.raises(TimeoutError):
        asyncio.run(enter())
    clock.now += 2
    asyncio.run(enter())


def test_two_signals_at_once_are_no_bug(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "l.sqlite", job_name="j", job_path=tmp_path / "j.yaml")
    run = ledger.current_run()
    ledger.begin_invocation(run, job={}, endpoint="e")
    requests = [Request(Slot(index, "m"), f"k{index}", b"") for index in range(2)]
    ledger.place(run, [Asked(len(requests), [(request.slot, request.key) for request in requests])], dict)

    class Never:
        async def send(self, intent: Intent) -> Exchange:
            raise AssertionError("nothing is to be sent")

    async def drive() -> Stop | None:
        runner = Runner(
            ledger,
            run,
            Never(),
            iter(requests),
            Budget({"m": Pricing()}),
            Rates(None, None),
            concurrency=2,
            max_attempts=1,
            max_seconds=1,
            clock=asyncio.get_running_loop().time,
            stop_seconds=1,
        )
        loop = asyncio.get_running_loop()
        loop.call_soon(runner.interrupt, ExitCode.INTERRUPTED)
        loop.call_soon(runner.interrupt, ExitCode.INTERRUPTED)
        return await runner.run()

    stop = asyncio.run(drive())
    assert stop is not None
    assert (stop.exit_code, stop.is_immediate) == (ExitCode.INTERRUPTED, True)
    assert totals(ledger, run).attempts == 0
    ledger.close()
