"""What the runs of a ledger came to: rows, tokens, dollars by what told them, seconds. Summed by SQLite, exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from batchrun.ledger_view import LedgerView, Run
from batchrun.money import DERIVED, REPORTED, from_pico, to_pico

IN_FLIGHT = "in flight"
_DAY = 86_400_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """Attempts of one run with one model that were sent on one day (UTC) and ended alike. Dollars are exact."""

    run_id: str
    model: str
    day: date
    outcome: str
    """`ok`, `failed` or `unknown`; `in flight`, while the run is going on."""
    is_repair: bool
    """They asked again for an answer that fits."""
    cost_source: str | None
    """As in the output; None: not known."""
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    usd_spent: Decimal
    """Of what is known."""
    unknown_attempts: int
    """Whose cost is not known, and not in `usd_spent`."""
    usd_unknown_at_most: Decimal | None
    """What those can have cost at most; None if nothing was reserved for one of them."""


@dataclass(frozen=True, slots=True)
class RunSpend:
    """What a run came to, from its ledger; its figures are those of `batchrun JOB --json`. Dollars are exact."""

    job: str
    run_id: str
    provider: str
    model: str
    """The models asked, with commas between."""
    state: str
    """`open`, `finished` or `abandoned`."""
    reason: str | None
    """Why the last invocation ended, if it was not because all was done."""
    exit_code: int | None
    """Of the last invocation; None while it is at work, or if it died."""
    started_at: datetime
    """UTC."""
    ended_at: datetime | None
    """Of the last invocation; the last answer's, where it has not ended."""
    seconds: float
    """Of all invocations."""
    rows: int
    """Rows of the output: rows of the input times models times samples."""
    ok: int
    failed: int
    pending: int
    reused: int
    """Of those that are ok: they took an answer that was there."""
    attempts: int
    """That are over."""
    in_flight: int
    """Attempts under way."""
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    usd_spent: Decimal
    """Of what is known."""
    usd_reported: Decimal
    """Of it: what the provider has told."""
    usd_estimated: Decimal
    """Of it: what is derived from tokens and prices."""
    unknown_attempts: int
    """Whose cost nobody has told; it is in no other amount."""
    usd_unknown_at_most: Decimal | None
    """What those can have cost at most; None if that is not known for all."""
    usd_wasted: Decimal
    """Of what is known: attempts that brought no answer, and those that asked again for one that fits."""
    budget_usd: Decimal | None
    """The job's cap; None for none."""
    budget_per: str | None
    """What the cap is for: `run`, `day` or `month`."""
    budget_used: Decimal | None
    """What the job spent in the run, or in the last day or month (UTC) that the run worked in."""

    @property
    def settled(self) -> int:
        """Rows that are ok or failed."""
        return self.ok + self.failed

    @property
    def usd_per_1000_rows(self) -> Decimal | None:
        """Dollars for a thousand settled rows, to 1e-12; None without any."""
        return share(self.usd_spent * 1000, self.settled)

    @property
    def usd_per_ok_row(self) -> Decimal | None:
        """Dollars for each row with an answer, to 1e-12; None without any."""
        return share(self.usd_spent, self.ok)

    @property
    def rows_per_second(self) -> float | None:
        """Rows that were asked and settled, by the time that the run took; None without any."""
        asked = self.settled - self.reused
        return asked / self.seconds if asked > 0 and self.seconds > 0 else None


class Spend(NamedTuple):
    """What a ledger holds."""

    runs: list[RunSpend]
    """From the oldest to the newest."""
    parts: list[Part]


class _Known(NamedTuple):
    run: Run
    ended_at: int | None
    rows: int
    job: dict[str, Any]
    exit_code: int | None
    reason: str | None
    seconds: float


def read_ledger(ledger: LedgerView, *, number: int | None = None) -> Spend:
    """The runs of a ledger that have sent something or have seen their input.

    Args:
        number: `Run.run` of the only one that is wanted; None for all.

    Raises:
        StorageError: the ledger cannot be read.
    """
    with ledger.snapshot():
        return _read(ledger, number)


def worked_seconds(ledger: LedgerView, run: Run) -> float:
    """How long the invocations of a run have worked; of those without an end, until their last attempt."""
    return next((one.seconds for one in _known(ledger, run.run)), 0.0)


def _read(ledger: LedgerView, number: int | None) -> Spend:
    known = _known(ledger, number)
    parts = _parts(ledger, {one.run.run: one.run.run_id for one in known})
    by_day = _spent_by_day(ledger) if any(_cap(one).get("per") in ("day", "month") for one in known) else {}
    reused = _reused(ledger)
    ((job,),) = ledger.rows("SELECT job_name FROM owner")
    return Spend([_run_spend(ledger, job, one, parts, reused, by_day) for one in known], parts)


def _known(ledger: LedgerView, number: int | None) -> list[_Known]:
    chosen = {"number": number}
    last_settled = dict(
        ledger.rows(
            # What was lost is settled by the next invocation, perhaps days later.
            "SELECT invocation, max(CASE outcome WHEN 'unknown' THEN sent_at ELSE coalesce(settled_at, sent_at) END) "
            "FROM attempt WHERE (run = :number OR :number IS NULL) AND invocation IN "
            "(SELECT invocation FROM invocation WHERE ended_at IS NULL) GROUP BY invocation",
            chosen,
        )
    )
    worked: dict[int, list[tuple[int, int, int | None, int | None, str | None, str]]] = {}
    for of_run, invocation, began, ended, exit_code, reason, job in ledger.rows(
        "SELECT run, invocation, started_at, ended_at, exit_code, reason, job FROM invocation "
        "WHERE run = :number OR :number IS NULL ORDER BY invocation",
        chosen,
    ):
        end = ended if ended is not None else last_settled.get(invocation, began)
        worked.setdefault(of_run, []).append((began, end, ended, exit_code, reason, job))
    known = []
    for run, run_id, started_at, state, placed in ledger.rows(
        "SELECT run, run_id, started_at, state, input FROM run WHERE (run = :number OR :number IS NULL) AND "
        "(input IS NOT NULL OR EXISTS (SELECT 1 FROM attempt WHERE attempt.run = run.run)) ORDER BY run",
        chosen,
    ):
        document = ledger.document(placed) if placed is not None else {}
        rows = int(document.get("rows", 0)) * int(document.get("slots_per_row", 1))
        invocations = worked.get(run, [])
        *_, exit_code, reason, job = invocations[-1] if invocations else (0, 0, None, None, None, "{}")
        known.append(
            _Known(
                Run(run, run_id, started_at, state, is_new=False),
                max((end for _, end, *_ in invocations), default=None),
                rows,
                ledger.document(job),
                exit_code,
                reason,
                sum(end - began for began, end, *_ in invocations) / 1e6,
            )
        )
    return known


def _parts(ledger: LedgerView, run_ids: dict[int, str]) -> list[Part]:
    numbers = ", ".join(map(str, run_ids))
    rows = ledger.rows(
        f"SELECT run, model, sent_at / {_DAY} AS day, coalesce(outcome, '{IN_FLIGHT}') AS became, repair > 0 AS again, "
        "cost_source, count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), "
        "coalesce(sum(total_tokens), 0), coalesce(sum(cached_tokens), 0), coalesce(sum(usd_pico >> 30), 0), "
        "coalesce(sum(usd_pico & 1073741823), 0), sum(usd_pico IS NULL), "
        "sum(usd_pico IS NULL AND reserved_pico IS NULL), "
        "coalesce(sum(CASE WHEN usd_pico IS NULL THEN reserved_pico >> 30 END), 0), "
        "coalesce(sum(CASE WHEN usd_pico IS NULL THEN reserved_pico & 1073741823 END), 0) "
        f"FROM charged WHERE run IN ({numbers}) GROUP BY run, model, day, became, again, cost_source "
        "ORDER BY run, model, day, became, again, cost_source"
    )
    return [
        Part(
            run_ids[run], model, datetime.fromtimestamp(day * 86_400, UTC).date(), became, bool(again), cost_source,
            attempts, prompt, completion, total, cached, from_pico((high << 30) + low), unknown,
            from_pico((most_high << 30) + most_low) if not boundless else None,
        )
        for (
            run, model, day, became, again, cost_source, attempts, prompt, completion, total, cached, high, low,
            unknown, boundless, most_high, most_low,
        ) in rows
    ]  # fmt: skip


def _spent_by_day(ledger: LedgerView) -> dict[date, Decimal]:
    """Dollars of all runs of a ledger, by the day (UTC) on which attempts were sent."""
    rows = ledger.rows(
        f"SELECT sent_at / {_DAY}, coalesce(sum(usd_pico >> 30), 0), coalesce(sum(usd_pico & 1073741823), 0) "
        "FROM charged GROUP BY 1"
    )
    return {datetime.fromtimestamp(day * 86_400, UTC).date(): from_pico((high << 30) + low) for day, high, low in rows}


def _reused(ledger: LedgerView) -> dict[int, int]:
    """How many slots of each run took an answer that was there."""
    return dict(
        ledger.rows(
            "SELECT run, count(*) FROM reused WHERE source_run <> run OR EXISTS (SELECT 1 FROM attempt "
            "WHERE attempt.run = source_run AND attempt.row_index = source_row AND attempt.model = reused.model "
            "AND attempt.sample = reused.sample AND attempt.key = reused.key AND outcome = 'ok') GROUP BY run"
        )
    )


def _run_spend(
    ledger: LedgerView,
    job: str,
    known: _Known,
    parts: Sequence[Part],
    reused: dict[int, int],
    by_day: dict[date, Decimal],
) -> RunSpend:
    run = known.run
    sent = [part for part in parts if part.run_id == run.run_id]
    own = [part for part in sent if part.outcome != IN_FLIGHT]
    ok, failed = ledger.counts(run)
    asked = known.job.get("model")
    models = list(dict.fromkeys(part.model for part in sent)) or (asked if isinstance(asked, list) else [str(asked)])
    most = [part.usd_unknown_at_most for part in own]
    budget = _cap(known)
    usd = sum((part.usd_spent for part in own), Decimal(0))
    return RunSpend(
        job=job,
        run_id=run.run_id,
        provider=str((known.job.get("provider") or {}).get("name")),
        model=", ".join(models),
        state=run.state,
        reason=known.reason,
        exit_code=known.exit_code,
        started_at=_moment(run.started_at),
        ended_at=_moment(known.ended_at) if known.ended_at is not None else None,
        seconds=known.seconds,
        rows=known.rows,
        ok=ok,
        failed=failed,
        pending=max(0, known.rows - ok - failed),
        reused=reused.get(run.run, 0),
        attempts=sum(part.attempts for part in own),
        in_flight=sum(part.attempts for part in sent) - sum(part.attempts for part in own),
        prompt_tokens=sum(part.prompt_tokens for part in own),
        completion_tokens=sum(part.completion_tokens for part in own),
        total_tokens=sum(part.total_tokens for part in own),
        cached_tokens=sum(part.cached_tokens for part in own),
        usd_spent=usd,
        usd_reported=sum((part.usd_spent for part in own if part.cost_source in REPORTED), Decimal(0)),
        usd_estimated=sum((part.usd_spent for part in own if part.cost_source in DERIVED), Decimal(0)),
        unknown_attempts=sum(part.unknown_attempts for part in own),
        usd_unknown_at_most=sum((one for one in most if one is not None), Decimal(0)) if None not in most else None,
        usd_wasted=sum((part.usd_spent for part in own if part.outcome != "ok" or part.is_repair), Decimal(0)),
        budget_usd=Decimal(str(budget["usd"])) if "usd" in budget else None,
        budget_per=budget.get("per"),
        budget_used=_used(budget.get("per"), usd, own, by_day) if budget else None,
    )


def _used(per: str | None, usd: Decimal, own: Sequence[Part], by_day: dict[date, Decimal]) -> Decimal:
    if per == "run" or not own:
        return usd
    last = max(part.day for part in own)
    days = [
        day for day in by_day if day == last or (per == "month" and (day.year, day.month) == (last.year, last.month))
    ]
    return sum((by_day[day] for day in days), Decimal(0))


def share(usd: Decimal, number: int) -> Decimal | None:
    """The dollars for each of a number of things, to 1e-12; None for nothing."""
    return from_pico(to_pico(usd / number)) if number else None


def _moment(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


def _cap(known: _Known) -> dict[str, Any]:
    budget = known.job.get("budget")
    return budget if isinstance(budget, dict) else {}
