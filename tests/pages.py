"""Reports as `batchrun.report.load` gives them, made up: of any number of runs, and of hostile names and texts."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pandas as pd

from batchrun.money import from_pico
from batchrun.report import RUN_COLUMNS, SPEND_COLUMNS, Report
from batchrun.spend_details import CostlyRow, Costs, Details, Failures, RowSpend, Seconds

MADE_AT = datetime(2026, 6, 30, 12, 0, tzinfo=UTC)
NOTHING = Details([], [], [], [])
_MODELS = ("openai/gpt-5-mini", "anthropic/claude-sonnet-4", "google/gemini-2.5-flash", "deepseek/deepseek-chat")
_INT = (
    "rows", "ok", "failed", "pending", "reused", "attempts", "in_flight", "prompt_tokens", "completion_tokens",
    "total_tokens", "cached_tokens", "unknown_attempts",
)  # fmt: skip
_DTYPES = dict.fromkeys(_INT, "int64") | {
    "seconds": "float64", "started_at": "datetime64[us, UTC]", "ended_at": "datetime64[us, UTC]", "is_repair": "bool",
    "rows_per_second": "float64", "change": "float64",
}  # fmt: skip


def run(**columns: Any) -> dict[str, Any]:
    """A row of `Report.runs`."""
    started_at = columns.get("started_at", datetime(2026, 6, 1, 2, tzinfo=UTC))
    return {
        "job": "labels", "run_id": f"{started_at:%Y%m%dT%H%M%SZ}-ab12", "provider": "aimlapi", "model": _MODELS[0],
        "state": "finished", "reason": None, "exit_code": 0, "started_at": started_at,
        "ended_at": started_at + timedelta(seconds=95), "seconds": 95.25, "rows": 1000, "ok": 990, "failed": 10,
        "pending": 0, "reused": 0, "attempts": 1015, "in_flight": 0, "prompt_tokens": 812_345,
        "completion_tokens": 40_321, "total_tokens": 852_666, "cached_tokens": 120_000,
        "usd_spent": Decimal("1.234567890123"), "usd_reported": Decimal("1.2"),
        "usd_estimated": Decimal("0.034567890123"), "unknown_attempts": 0, "usd_unknown_at_most": Decimal(0),
        "usd_in_flight_at_most": Decimal(0),
        "usd_wasted": Decimal("0.0123"), "budget_usd": None, "budget_per": None, "budget_used": None,
        "usd_per_1000_rows": Decimal("1.234567890123"), "usd_per_ok_row": Decimal("0.001247038273"),
        "rows_per_second": 10.5, "change": float("nan"), "ledger": "outputs/labels.ledger.sqlite", "output": None,
        "evaluation": None,
    } | columns  # fmt: skip


def part(of: dict[str, Any], **columns: Any) -> dict[str, Any]:
    """A row of `Report.spend`: all of a run, if nothing else is said."""
    same = ("job", "provider", "run_id", "model", "attempts", "prompt_tokens", "completion_tokens", "total_tokens")
    return {
        **{name: of[name] for name in (*same, "cached_tokens", "usd_spent", "unknown_attempts", "usd_unknown_at_most")},
        "day": of["started_at"].date(), "outcome": "ok", "is_repair": False, "cost_source": "reported",
        "usd_held": of["usd_spent"],
    } | columns  # fmt: skip


def report(
    runs: list[dict[str, Any]], parts: list[dict[str, Any]] | None = None, notes: tuple[str, ...] = ()
) -> Report:
    """With frames of the documented types."""
    spend = [part(one) for one in runs] if parts is None else parts
    return Report(_frame(runs, RUN_COLUMNS), _frame(spend, SPEND_COLUMNS), list(notes))


def _frame(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    return pd.DataFrame(
        {name: pd.Series([row[name] for row in rows], dtype=_DTYPES.get(name, "object")) for name in columns}
    )


def many(number: int, *, text: int = 900, seed: int = 1) -> tuple[Report, Details]:
    """Nightly runs of three jobs, with something of everything; the texts of rows have so many words."""
    chance = random.Random(seed)
    runs, parts, failures, seconds, costs = [], [], [], [], []
    before: dict[str, Decimal] = {}
    for place in range(number):
        job = ("nightly-labels", "support-tickets", "translations-de")[place % 3]
        rows = chance.randint(200, 3000)
        failed = chance.randint(0, rows // 20)
        usd = from_pico(chance.randint(10**8, 4 * 10**9) * rows)
        estimated, wasted = from_pico(int(usd * 10**12 // 4)), from_pico(int(usd * 10**12 // 50))
        per = from_pico(int(usd * 1000 / rows * 10**12))
        unknown = chance.randint(1, 4) if place % 7 == 3 else 0
        started_at = datetime(2026, 6, 29, 2, 5 * (place % 3), tzinfo=UTC) - timedelta(days=(number - place) // 3)
        is_open = place == number - 1 and number > 3
        one = run(
            job=job, model=_MODELS[place % len(_MODELS)], rows=rows, ok=rows - failed - (40 if is_open else 0),
            failed=failed,
            pending=40 if is_open else 0, reused=chance.choice((0, 0, 25)), state="open" if is_open else "finished",
            reason="stopped by SIGINT" if is_open else None, seconds=chance.uniform(4, 5000),
            prompt_tokens=rows * 410, completion_tokens=rows * 37, total_tokens=rows * 447, cached_tokens=rows * 90,
            usd_spent=usd, usd_reported=usd - estimated, usd_estimated=estimated, usd_wasted=wasted,
            started_at=started_at, usd_per_1000_rows=per, usd_per_ok_row=from_pico(int(per * 10**9)),
            unknown_attempts=unknown,
            usd_unknown_at_most=(Decimal("0.0042") * unknown if place % 2 else None) if unknown else Decimal(0),
            budget_usd=Decimal("5") if place % 3 == 0 else None, budget_per="day" if place % 3 == 0 else None,
            budget_used=usd if place % 3 == 0 else None,
            change=float(per / before[job] - 1) if job in before else float("nan"),
            evaluation=evaluation(0.8 + place % 17 / 100) if place % 3 == 0 else None,
        )  # fmt: skip
        one["run_id"] = f"{one['started_at']:%Y%m%dT%H%M%SZ}-{place:04x}"
        before[job] = per
        runs.append(one)
        parts += [
            part(one, usd_spent=usd - wasted),
            part(one, usd_spent=wasted, outcome="failed", prompt_tokens=0, completion_tokens=0, cached_tokens=0),
        ]
        kinds = ("rate_limited", "timeout", "server_error", "content_filter", "unparsable")
        failures += [Failures(one["run_id"], kind, chance.randint(1, 90) // rank) for rank, kind in enumerate(kinds, 1)]
        p50 = chance.uniform(0.6, 2.5)
        seconds.append(Seconds(one["run_id"], one["model"], rows, p50, p50 * 2.1, p50 * 4, p50 / 3, p50 / 2, p50))
        steps = ("0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.01")
        costs += [Costs(one["run_id"], Decimal(step), chance.randint(1, rows)) for step in steps]
    words = ["Which", "of", "the", "labels", "fits", "this", "message", "of", "a", "customer?", "it", "says:", "late"]
    top = [
        CostlyRow(
            one["job"],
            RowSpend(
                one["run_id"],
                17 + place,
                one["model"],
                0,
                1 + place % 3,
                4321,
                from_pico(42_100_000_000 // (place + 1)),
                1,
            ),
            " ".join(chance.choice(words) for _ in range(text)),
            "complaint" if place % 2 else " ".join(chance.choice(words) for _ in range(text)),
        )
        for place, one in enumerate(runs[:20])
    ]
    notes = ("left out: outputs/old.sqlite: is no ledger",) if number > 3 else ()
    return report(runs, parts, notes), Details(failures, seconds, costs, top)


def evaluation(value: float, labels: tuple[str, ...] = ("complaint", "praise", "question")) -> dict[str, Any]:
    """As `Evaluation.document` gives it."""
    size = len(labels)
    measure = {"value": value, "low": value - 0.031, "high": min(1.0, value + 0.027)}
    return {
        "right_by": "accuracy", "rows": 900, "unparsed": 4, "right": round(900 * value),
        "metrics": {"accuracy": measure, "f1": {name: end - 0.02 for name, end in measure.items()}, "regex": None},
        "usd": Decimal("1.1"), "unknown_cost": 0, "usd_per_correct": Decimal("0.001358024691"), "without_expected": 3,
        "unanswered": 7, "unusable": {},
        "confusion": {
            "classes": size, "labels": list(labels),
            "matrix": [[280 if row == column else 7 + row for column in range(size)] for row in range(size)],
            "unparsed": [4] + [0] * (size - 1), "by_class": None,
        },
        "slices": {}, "notes": [],
    }  # fmt: skip
