"""batchrun.run and batchrun.arun: the promises of the command line, from Python."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import batchrun
from batchrun.errors import JobError, LedgerHeldError, ProviderError, StorageError

from .conftest import KEY, FakeProvider, Workspace

Provide = Callable[..., FakeProvider]
ENVIRON = {"AIML_API_KEY": KEY}


def ready(work: Workspace, provider: FakeProvider, rows: int = 6, **keys: Any) -> None:
    work.write_rows([f"row {number}" for number in range(rows)])
    work.write_job(provider.base_url, **{"concurrency": 2, **keys})


def reason(work: Workspace) -> str | None:
    found: str | None = json.loads((work.folder / "job.last-run.json").read_text(encoding="utf-8"))["reason"]
    return found


def test_a_result_has_what_the_command_line_tells(
    work: Workspace, provide: Provide, capfd: pytest.CaptureFixture[str]
) -> None:
    provider = provide(bill="meta")
    ready(work, provider)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    events: list[batchrun.Event] = []
    result = batchrun.run(work.job, overrides={"input.limit": 4}, on_event=events.append, environ=ENVIRON)
    assert (result.exit_code, result.reason, result.rows, result.ok, result.pending) == (0, None, 4, 4, 0)
    assert result.usd_spent == provider.bill > 0
    assert (result.output, result.ledger, result.job) == (work.output, work.ledger, "job")
    told = json.loads((work.folder / "job.last-run.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(result.summary, default=float)) == told
    assert events[-1] == batchrun.Progressed(4, 4, 0, provider.bill, result.summary["total_tokens"])
    frame = result.to_pandas()
    assert list(frame["status"]) == ["ok"] * 4
    assert str(frame["prompt_tokens"].dtype) == "Int64"
    again = batchrun.run(work.job, on_event=events.append, environ=ENVIRON)
    assert any(isinstance(event, batchrun.Said) and "paid for again" in event.text for event in events)
    assert again.ok == 6
    with pytest.raises(StorageError, match=f"is of run {again.run_id} by now"):
        result.to_pandas()
    assert capfd.readouterr() == ("", "")
    assert {number: signal.getsignal(number) for number in before} == before


def test_errors_are_raised_with_their_exit_codes(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider)
    with pytest.raises(JobError, match="no such key") as wrong:
        batchrun.run(work.job, overrides={"modell": "x"}, environ=ENVIRON)
    assert wrong.value.exit_code == 2
    with pytest.raises(JobError, match="should be fail, skip"):
        batchrun.run(work.job, environ=ENVIRON, if_running="often")
    for wrong_option in ({"dead_line": "2h"}, {"if_runing": "skip"}):
        with pytest.raises(TypeError, match="there is no option"):
            batchrun.run(work.job, environ=ENVIRON, **wrong_option)  # type: ignore[arg-type]
    for wrong_value in (
        {"max_age": "24h"}, {"sample": "3"}, {"sample": 0}, {"new": True, "retry_failed": True},
        {"new": True, "max_age": timedelta(1)}, {"overrides": {"prompt.user": "\ud800"}},
    ):  # fmt: skip
        with pytest.raises(JobError):
            batchrun.run(work.job, environ=ENVIRON, **wrong_value)  # type: ignore[arg-type]
    assert not (work.folder / "job.last-run.json").exists()
    assert provider.requests == []
    unmarked = batchrun.run(work.job, environ=ENVIRON, deadline=timedelta(0))
    assert (unmarked.exit_code, unmarked.reason, unmarked.pending) == (3, "deadline", 6)
    provider.stop()
    ready(work, provider, rows=30, retry={"max_seconds": 0})
    assert batchrun.run(work.job, environ=ENVIRON).exit_code == ProviderError.exit_code


def test_it_runs_inside_of_a_loop_that_goes_on(work: Workspace, provide: Provide) -> None:
    ready(work, provide(latency=0.2))
    threads: set[int] = set()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def main() -> batchrun.RunResult:
        ticking = asyncio.create_task(tick())
        result = await batchrun.arun(
            work.job, environ=ENVIRON, on_event=lambda event: threads.add(threading.get_ident())
        )
        ticking.cancel()
        # `run` too: a notebook's cells are run inside of a loop.
        assert batchrun.run(work.job, environ=ENVIRON).exit_code == 0
        return result

    result = asyncio.run(main())
    assert (result.exit_code, result.ok) == (0, 6)
    assert ticks > 10
    assert threads == {threading.get_ident()}


def test_two_jobs_at_once_in_one_loop(work: Workspace, provide: Provide, tmp_path: Any) -> None:
    provider = provide(latency=0.2)
    other = Workspace(tmp_path / "other")
    other.folder.mkdir()
    ready(work, provider)
    ready(other, provider)

    async def main() -> list[batchrun.RunResult]:
        return await asyncio.gather(*(batchrun.arun(one.job, environ=ENVIRON) for one in (work, other)))

    assert [result.ok for result in asyncio.run(main())] == [6, 6]
    assert len(provider.requests) == 12


def test_a_cancelled_call_keeps_what_was_paid_for(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3, bill="meta")
    ready(work, provider, rows=40)

    async def main() -> None:
        task = asyncio.create_task(batchrun.arun(work.job, environ=ENVIRON))
        while work.in_flight < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert (reason(work), work.in_flight) == ("interrupted", 0)
    assert len(provider.requests) >= 2
    provider.hurry()
    result = batchrun.run(work.job, environ=ENVIRON)
    assert (result.exit_code, len(provider.requests), result.usd_spent) == (0, 40, provider.bill)


def test_what_a_callback_raises_ends_the_run_and_is_raised(work: Workspace, provide: Provide) -> None:
    ready(work, provide(latency=0.4), rows=14)

    def heard(event: batchrun.Event) -> None:
        raise ZeroDivisionError(type(event).__name__)

    with pytest.raises(ZeroDivisionError, match="Progressed"):
        batchrun.run(work.job, environ=ENVIRON, on_event=heard)
    assert (reason(work), work.in_flight) == ("interrupted", 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(batchrun.arun(work.job, environ=ENVIRON, on_event=heard))
    assert batchrun.run(work.job, environ=ENVIRON).exit_code == 0


def test_ctrl_c_is_the_callers(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3, bill="meta")
    ready(work, provider, rows=40)
    program = "import batchrun, sys\ntry:\n    batchrun.run(sys.argv[1])\nexcept KeyboardInterrupt:\n    sys.exit(9)"
    with subprocess.Popen([sys.executable, "-c", program, str(work.job)], env=work.environment()) as process:
        provider.wait_for(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 9
    assert (reason(work), work.in_flight) == ("interrupted", 0)


def test_another_process_at_work(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.4)
    ready(work, provider, rows=10)
    with work.start("job.yaml") as process:
        provider.wait_for(1)
        with pytest.raises(LedgerHeldError, match=f"process {process.pid} "):
            batchrun.run(work.job, environ=ENVIRON)
        skipped = batchrun.run(work.job, environ=ENVIRON, if_running="skip")
        assert (skipped.exit_code, skipped.reason, skipped.run_id) == (0, "skipped", None)
        with pytest.raises(StorageError):
            skipped.to_pandas()

        async def give_up() -> None:
            task = asyncio.create_task(batchrun.arun(work.job, environ=ENVIRON, if_running="wait"))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        began = time.monotonic()
        asyncio.run(give_up())
        assert time.monotonic() - began < 2
        assert process.poll() is None
        provider.hurry()
        waited = batchrun.run(work.job, environ=ENVIRON, if_running="wait", new=True)
        process.communicate(timeout=60)
    assert (waited.exit_code, waited.summary["sent"], len(provider.requests)) == (0, 10, 20)


def test_a_clock_dates_all_that_is_dated(work: Workspace, provide: Provide) -> None:
    ready(work, provide(), output="out-{date}.parquet")
    began = datetime(2031, 5, 6, 7, 8, tzinfo=UTC)
    start = time.monotonic()
    result = batchrun.run(work.job, environ=ENVIRON, clock=lambda: began.timestamp() + time.monotonic() - start)
    assert result.run_id is not None
    assert result.run_id.startswith("20310506T0708")
    assert result.output == work.folder / "out-2031-05-06.parquet"
    with closing(sqlite3.connect(work.ledger)) as db:
        for column in ("sent_at", "settled_at"):
            ((least, most),) = db.execute(f"SELECT min({column}), max({column}) FROM attempt")
            assert began.timestamp() * 1e6 - 1 <= least <= most < (began.timestamp() + 60) * 1e6
    (row, *_) = work.rows(result.output)
    assert row["finished_at"].date() == began.date()


def test_whatever_a_signal_handler_raises_stops_the_run(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3, bill="meta")
    ready(work, provider, rows=40)
    program = (
        "import batchrun, signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\nbatchrun.run(sys.argv[1])"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(work.job)], env=work.environment()) as process:
        provider.wait_for(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 9
    assert (reason(work), work.in_flight) == ("interrupted", 0)
    assert len(provider.requests) < 12


def test_a_cancelled_call_ends_its_command(work: Workspace, provide: Provide) -> None:
    ready(work, provide(), on_finish=["sh", "-c", "touch begun; sleep 60"])

    async def main() -> float:
        task = asyncio.create_task(batchrun.arun(work.job, environ=ENVIRON))
        while not (work.folder / "begun").exists():
            await asyncio.sleep(0.02)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - began

    assert asyncio.run(main()) < 5


def test_deadlines_and_ages_of_any_size(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider, rows=8)
    for deadline in (timedelta(days=30), timedelta.max, datetime(9999, 1, 1, tzinfo=UTC)):
        assert batchrun.run(work.job, environ=ENVIRON, new=True, deadline=deadline).exit_code == 0
    work.write_rows([f"row {number} <<{json.dumps({'wait': 0.3})}>>" for number in range(8)])
    stopped = batchrun.run(work.job, environ=ENVIRON, deadline=timedelta(seconds=0.8))
    provider.hurry()
    assert stopped.reason == "deadline"
    assert batchrun.run(work.job, environ=ENVIRON, max_age=timedelta.max, sample=1).run_id == stopped.run_id
    finished = batchrun.run(work.job, environ=ENVIRON, max_age=timedelta(0))
    assert (finished.exit_code, finished.run_id != stopped.run_id) == (0, True)


def test_a_run_that_has_sent_nothing_is_not_gone_on_with_on_another_day(work: Workspace, provide: Provide) -> None:
    ready(work, provide(), output="out/{date}/o.parquet")
    nights = [datetime(2031, 5, day, 2, tzinfo=UTC).timestamp() for day in (6, 7)]
    none = batchrun.run(work.job, environ=ENVIRON, deadline=timedelta(0), clock=lambda: nights[0])
    assert (none.reason, none.summary["sent"]) == ("deadline", 0)
    result = batchrun.run(work.job, environ=ENVIRON, clock=lambda: nights[1])
    assert result.output == work.folder / "out" / "2031-05-07" / "o.parquet"
