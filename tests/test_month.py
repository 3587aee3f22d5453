"""A month of nights: the same job on a growing input, with crashes, an overlap, a deadline and a change of prices."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pandas as pd
import pytest

import batchrun
import batchrun.report

from .accounting import books
from .conftest import KEY, FakeProvider, Workspace
from .fake_provider import SONNET

Provide = Callable[..., FakeProvider]
ENVIRON = {"AIML_API_KEY": KEY}
FIRST = datetime(2026, 6, 1, 2, 30, tzinfo=UTC)
NIGHTS = 33  # into July
NEW_ROWS = 5
CAP = Decimal("0.055")
CRASHES, OVERLAP, DEADLINE, DEARER = (6, 14), 9, 11, 18
_SLOW = (*CRASHES, OVERLAP, DEADLINE)
# What a scheduler's process does, so that it can be killed.
_PROCESS = """
import sys, time
import batchrun
began, start = float(sys.argv[2]), time.monotonic()
batchrun.run(sys.argv[1], clock=lambda: began + time.monotonic() - start)
"""


def rows_of(night: int) -> list[str]:
    """Those that are new; on some nights they take their time."""
    script = json.dumps({"wait": 0.4} if night in _SLOW else {})
    return [f"night {night}, row {row} <<{script}>>" for row in range(NEW_ROWS)]


def prices(factor: int) -> dict[str, object]:
    model = copy.deepcopy(SONNET)
    for unit in model["pricing"]["units"]:  # type: ignore[index]
        unit["price"] *= factor
    return {"models": [model], "charge": factor}


@pytest.mark.slow
def test_report_and_bill_agree_on_every_night_and_the_cap_holds(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="mix", seed=3, p500=0.03, p_hangup=0.02, **prices(1))
    providers = [provider]
    rows: list[str] = []
    reasons: dict[int, str | None] = {}
    lost = 0
    for night in range(NIGHTS):
        at = FIRST + timedelta(days=night)
        if night == DEARER:
            port = provider.port
            provider.stop()
            provider = provide(bill="mix", seed=4, p500=0.03, p_hangup=0.02, port=port, **prices(2))
            providers.append(provider)
        rows += rows_of(night)
        work.write_rows(rows)
        work.write_job(
            provider.base_url, reuse=True, concurrency=2, budget={"usd": float(CAP), "per": "month"},
            output="out/run_date={date}/answers.parquet", ledger="job.ledger.sqlite",
        )  # fmt: skip
        if night in (*CRASHES, OVERLAP):
            with subprocess.Popen(
                [sys.executable, "-c", _PROCESS, str(work.job), str(at.timestamp())], env=work.environment()
            ) as process:
                while work.in_flight < 2:
                    assert process.poll() is None
                    time.sleep(0.01)
                if night == OVERLAP:
                    skipped = batchrun.run(work.job, environ=ENVIRON, if_running="skip")
                    assert (skipped.exit_code, skipped.reason) == (0, "skipped")
                    assert process.wait(30) == 0
                else:
                    process.send_signal(signal.SIGKILL)
        at += timedelta(hours=1)
        began, start = at.timestamp(), time.monotonic()
        seconds = 0.9 if night == DEADLINE else 3600
        result = batchrun.run(
            work.job,
            environ=ENVIRON,
            deadline=at + timedelta(seconds=seconds),
            clock=lambda began=began, start=start: began + time.monotonic() - start,  # type: ignore[misc]
        )
        reasons[night] = result.reason
        lost += result.summary["unknown_outcomes"]
        assert result.exit_code == (3 if result.reason in ("deadline", "budget") else 0), result.summary

        # Our books, their bill, the report and the run's own figures are one.
        ours = books(work)
        billed = {request["id"]: Decimal(request["usd"]) for one in providers for request in one.requests}
        assert set(billed) <= set(ours)
        known = sum((usd for usd, _ in ours.values() if usd is not None), Decimal(0))
        bill = sum(billed.values(), Decimal(0))
        unknown = sum((billed.get(name, Decimal(0)) for name, (usd, _) in ours.items() if usd is None), Decimal(0))
        assert bill == known + unknown
        shown = batchrun.report.load(work.folder)
        assert shown.totals["usd_spent"] == known
        assert shown.totals["unknown_attempts"] == sum(usd is None for usd, _ in ours.values())
        assert unknown <= shown.totals["usd_unknown_at_most"]
        newest = shown.runs.iloc[-1]
        assert (newest["run_id"], newest["usd_spent"], newest["ok"]) == (result.run_id, result.usd_spent, result.ok)

        # The cap: what the month has spent and what it may still be billed for.
        spent = sum(shown.spend["usd_held"][[day.month == at.month for day in shown.spend["day"]]], Decimal(0))
        assert newest["budget_used"] == spent <= CAP
        if reasons[night] is None:
            frame = result.to_pandas()
            assert list(frame["status"]) == ["ok"] * len(rows)
            assert list(frame["prompt"]) == rows

    assert reasons[DEADLINE] == "deadline"
    assert [reasons[night] for night in CRASHES] == [None, None]
    assert lost > 0
    # The cap was reached in June, and July had one of its own.
    assert reasons[29] == "budget"
    assert reasons[NIGHTS - 1] is None
    # No row was paid for twice: every answer that came is some row's.
    answered = [request["text"] for one in providers for request in one.requests if request["status"] == 200]
    assert len(answered) - len(set(answered)) <= lost
    # All nights are one dataset.
    dataset = pd.read_parquet(work.folder / "out")
    assert dataset["run_date"].nunique() == len({path.parent for path in (work.folder / "out").rglob("*.parquet")})
