"""What the runs of a ledger came to: rows, tokens, dollars by what told them, seconds. Summed by SQLite, exact."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from batchrun.errors import StorageError
from batchrun.ledger_view import LedgerView, Run, pico_sum, summed
from batchrun.money import DERIVED, REPORTED, from_pico, to_pico
from batchrun.records import utc

IN_FLIGHT = "in flight"
_DAY = 86_400_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """Attempts of one run with one model that were sent on one day (UTC) and ended alike. Dollars are exact."""

    run_id: str
    provider: str
    model: str
    day: date
    outcome: str
    """`ok`, `failed` or `unknown`; `in flight` while a process may still be waiting for the answer."""
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
    usd_held: Decimal
    """What counts against a cap: of a cost that is derived its upper bound, of one not known what was reserved."""


@dataclass(frozen=True, slots=True)
class RunSpend:
    """What a run came to, from its ledger; its figures are those of `batchrun JOB --json`. Dollars are exact."""

    job: str
    run_id: str
    provider: str
    """The providers asked, with commas between."""
    model: str
    """Likewise the models."""
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
    seconds: float | None
    """Of all invocations; None: not known, as in every field of a run that only its output tells of."""
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
    usd_in_flight_at_most: Decimal | None
    """What those can cost; None if that is not known for all."""
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
    usd_wasted: Decimal | None
    """Of what is known: attempts that brought no answer, and those that asked again for one that fits."""
    budget_usd: Decimal | None
    """The job's cap; None for none."""
    budget_per: str | None
    """What the cap is for: `run`, `day` or `month`."""
    budget_used: Decimal | None
    """What of it is taken: by the run, or by the job in the last day or month (UTC) that the run worked in."""

    @property
    def settled(self) -> int:
        """Rows that are ok or failed."""
        return self.ok + self.failed

    @property
    def usd_per_1000_rows(self) -> Decimal | None:
        """Dollars for a thousand settled rows, to 1e-12; None without any, or where no cost is known."""
        return share(self.usd_spent * 1000, self.settled, self.unknown_attempts)

    @property
    def usd_per_ok_row(self) -> Decimal | None:
        """Dollars for each row with an answer, to 1e-12; None without any, or where no cost is known."""
        return share(self.usd_spent, self.ok, self.unknown_attempts)

    @property
    def rows_per_second(self) -> float | None:
        """Rows that were asked and settled, by the time that the run took; None without any."""
        asked = self.settled - self.reused
        return asked / self.seconds if asked > 0 and self.seconds else None


class Spend(NamedTuple):
    """What a ledger holds."""

    runs: list[RunSpend]
    """From the oldest to the newest."""
    parts: list[Part]


class _Invocation(NamedTuple):
    invocation: int
    began: int
    ended: int | None
    end: int
    """The end, or when the last attempt was over."""
    exit_code: int | None
    reason: str | None
    job: dict[str, Any]
    is_at_work: bool
    """It may be."""


class _Known(NamedTuple):
    run: Run
    rows: int
    invocations: list[_Invocation]

    @property
    def job(self) -> dict[str, Any]:
        return self.invocations[-1].job if self.invocations else {}

    @property
    def seconds(self) -> float:
        return sum(one.end - one.began for one in self.invocations) / 1e6


def read_ledger(ledger: LedgerView, *, number: int | None = None) -> Spend:
    """The runs of a ledger that have sent something or have seen their input.

    Args:
        number: `Run.run` of the only one that is wanted; None for all.

    Raises:
        StorageError: the ledger cannot be read.
    """
    try:
        with ledger.snapshot():
            return _read(ledger, number)
    except (ValueError, TypeError, KeyError, ArithmeticError) as exc:
        raise StorageError(
            f"the ledger {ledger.path} holds what batchrun has not written ({type(exc).__name__}: {exc}): "
            "`batchrun salvage JOB` saves what can be read"
        ) from exc


# What was lost is settled by the next invocation, perhaps days later.
_LAST_SETTLED = "max(CASE outcome WHEN 'unknown' THEN sent_at ELSE coalesce(settled_at, sent_at) END)"


def asking_seconds(ledger: LedgerView, run_id: str) -> float:
    """How long the invocations of a run have asked, each from its beginning to its last answer."""
    (pair,) = ledger.rows(
        "SELECT coalesce(sum(last - started_at), 0) FROM (SELECT started_at, "
        f"{_LAST_SETTLED} AS last FROM attempt "
        "JOIN invocation USING (invocation) WHERE attempt.run = (SELECT run FROM run WHERE run_id = ?) "
        "GROUP BY invocation)",
        (run_id,),
    )
    return max(0, int(pair[0])) / 1e6


def _read(ledger: LedgerView, number: int | None) -> Spend:
    known = _known(ledger, number)
    # What a day or a month has taken, all runs have taken together.
    needs_all = number is not None and any(_cap(one).get("per") in ("day", "month") for one in known)
    by_run: dict[str, list[Part]] = {one.run.run_id: [] for one in known}
    held: dict[date, Decimal] = {}
    for part in _parts(ledger, _known(ledger, None) if needs_all else known):
        held[part.day] = held.get(part.day, Decimal(0)) + part.usd_held
        if part.run_id in by_run:
            by_run[part.run_id].append(part)
    reused = _reused(ledger, number)
    ((job,),) = ledger.rows("SELECT job_name FROM owner")
    runs = [_run_spend(ledger, str(job), one, by_run[one.run.run_id], held, reused) for one in known]
    return Spend(runs, [part for parts in by_run.values() for part in parts])


def _known(ledger: LedgerView, number: int | None) -> list[_Known]:
    invocations: dict[int, list[_Invocation]] = {}
    for run, one in _invocations(ledger, number):
        invocations.setdefault(run, []).append(one)
    known = []
    for run, run_id, started_at, state, placed in ledger.rows(
        "SELECT run, run_id, started_at, state, input FROM run WHERE (run = :number OR :number IS NULL) AND "
        "(input IS NOT NULL OR EXISTS (SELECT 1 FROM attempt WHERE attempt.run = run.run)) ORDER BY run",
        {"number": number},
    ):
        document = ledger.document(placed) if placed is not None else {}
        rows = int(document.get("rows", 0)) * int(document.get("slots_per_row", 1))
        known.append(_Known(Run(run, run_id, started_at, state, is_new=False), rows, invocations.get(run, [])))
    return known


def _invocations(ledger: LedgerView, number: int | None) -> Iterable[tuple[int, _Invocation]]:
    """With their runs, from the oldest to the newest."""
    last_settled = dict(
        ledger.rows(
            f"SELECT invocation, {_LAST_SETTLED} "
            "FROM attempt WHERE (run = :number OR :number IS NULL) AND invocation IN "
            "(SELECT invocation FROM invocation WHERE ended_at IS NULL) GROUP BY invocation",
            {"number": number},
        )
    )
    for run, invocation, began, ended, exit_code, reason, job, host, pid, is_newest in ledger.rows(
        "SELECT run, invocation, started_at, ended_at, exit_code, reason, job, host, pid, "
        "invocation = (SELECT max(invocation) FROM invocation) FROM invocation "
        "WHERE run = :number OR :number IS NULL ORDER BY invocation",
        {"number": number},
    ):
        end = ended if ended is not None else last_settled.get(invocation, began)
        is_at_work = ended is None and bool(is_newest) and _may_run(host, pid)
        yield run, _Invocation(
            invocation, began, ended, end, exit_code, reason, ledger.document(job), is_at_work
        )  # fmt: skip


def _may_run(host: str, pid: int) -> bool:
    """False if a process is known to be gone."""
    if host != socket.gethostname() or os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _parts(ledger: LedgerView, known: Sequence[_Known]) -> list[Part]:
    run_ids = {one.run.run: one.run.run_id for one in known}
    invocations = {each.invocation: each for one in known for each in one.invocations}
    found: dict[tuple[Any, ...], list[int]] = {}
    for run, invocation, *rest in ledger.rows(
        f"SELECT run, invocation, model, sent_at / {_DAY} AS day, outcome, repair > 0 AS again, cost_source, "
        "count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), "
        "coalesce(sum(total_tokens), 0), coalesce(sum(cached_tokens), 0), sum(usd_pico IS NULL), "
        f"sum(usd_pico IS NULL AND reserved_pico IS NULL), {pico_sum('usd_pico')}, "
        f"{pico_sum('CASE WHEN usd_pico IS NULL THEN reserved_pico END')}, "
        f"{pico_sum('CASE WHEN usd_pico IS NULL THEN reserved_pico ELSE coalesce(held_pico, usd_pico) END')} "
        f"FROM charged WHERE run IN ({', '.join(map(str, run_ids))}) "
        "GROUP BY run, invocation, model, day, outcome, again, cost_source "
        "ORDER BY run, invocation, model, day, outcome, again, cost_source"
    ):
        model, day, outcome, again, cost_source, *counts, high, low, most_high, most_low, held_high, held_low = rest
        of = invocations.get(invocation)
        became = outcome or (IN_FLIGHT if of is not None and of.is_at_work else "unknown")
        kind = (run_ids[run], _provider(of.job if of is not None else {}), model, day, became, bool(again), cost_source)
        sums = (*counts, summed(high, low), summed(most_high, most_low), summed(held_high, held_low))
        found[kind] = [one + more for one, more in zip(found.get(kind, [0] * len(sums)), sums, strict=True)]
    return [
        Part(
            run_id, provider, model, datetime.fromtimestamp(day * 86_400, UTC).date(), became, again, cost_source,
            attempts, prompt, completion, total, cached, from_pico(usd), unknown,
            from_pico(most) if not boundless else None, from_pico(held),
        )
        for (run_id, provider, model, day, became, again, cost_source), (
            attempts, prompt, completion, total, cached, unknown, boundless, usd, most, held,
        ) in found.items()
    ]  # fmt: skip


def _reused(ledger: LedgerView, number: int | None) -> dict[int, int]:
    """How many slots of each run took an answer that was there."""
    return dict(
        ledger.rows(
            "SELECT run, count(*) FROM reused WHERE (run = :number OR :number IS NULL) AND (source_run <> run "
            "OR EXISTS (SELECT 1 FROM attempt "
            "WHERE attempt.run = source_run AND attempt.row_index = source_row AND attempt.model = reused.model "
            "AND attempt.sample = reused.sample AND attempt.key = reused.key AND outcome = 'ok')) GROUP BY run",
            {"number": number},
        )
    )


def _run_spend(
    ledger: LedgerView,
    job: str,
    known: _Known,
    sent: Sequence[Part],
    held: dict[date, Decimal],
    reused: dict[int, int],
) -> RunSpend:
    run = known.run
    own = [part for part in sent if part.outcome != IN_FLIGHT]
    under_way = [part for part in sent if part.outcome == IN_FLIGHT]
    newest = known.invocations[-1] if known.invocations else None
    ok, failed = ledger.counts(run)
    asked = known.job.get("model")
    models = list(dict.fromkeys(part.model for part in sent)) or (asked if isinstance(asked, list) else [str(asked)])
    providers = list(dict.fromkeys(part.provider for part in sent)) or [_provider(known.job)]
    budget = _cap(known)
    return RunSpend(
        job=job,
        run_id=run.run_id,
        provider=", ".join(providers),
        model=", ".join(models),
        state=run.state,
        reason=newest.reason if newest is not None else None,
        exit_code=newest.exit_code if newest is not None else None,
        started_at=utc(run.started_at),
        ended_at=utc(max(one.end for one in known.invocations)) if known.invocations else None,
        seconds=known.seconds,
        rows=known.rows,
        ok=ok,
        failed=failed,
        pending=max(0, known.rows - ok - failed),
        reused=reused.get(run.run, 0),
        attempts=sum(part.attempts for part in own),
        in_flight=sum(part.attempts for part in under_way),
        usd_in_flight_at_most=_at_most(under_way),
        prompt_tokens=sum(part.prompt_tokens for part in own),
        completion_tokens=sum(part.completion_tokens for part in own),
        total_tokens=sum(part.total_tokens for part in own),
        cached_tokens=sum(part.cached_tokens for part in own),
        usd_spent=sum((part.usd_spent for part in own), Decimal(0)),
        usd_reported=sum((part.usd_spent for part in own if part.cost_source in REPORTED), Decimal(0)),
        usd_estimated=sum((part.usd_spent for part in own if part.cost_source in DERIVED), Decimal(0)),
        unknown_attempts=sum(part.unknown_attempts for part in own),
        usd_unknown_at_most=_at_most(own),
        usd_wasted=sum((part.usd_spent for part in own if part.outcome != "ok" or part.is_repair), Decimal(0)),
        budget_usd=from_pico(to_pico(Decimal(str(budget["usd"])))) if "usd" in budget else None,
        budget_per=budget.get("per"),
        budget_used=_used(budget.get("per"), known, sent, held) if budget else None,
    )


def _at_most(parts: Sequence[Part]) -> Decimal | None:
    most = [part.usd_unknown_at_most for part in parts]
    return sum((one for one in most if one is not None), Decimal(0)) if None not in most else None


def _used(per: str | None, known: _Known, sent: Sequence[Part], held: dict[date, Decimal]) -> Decimal:
    if per not in ("day", "month"):
        return sum((part.usd_held for part in sent), Decimal(0))
    ends = [utc(one.end).date() for one in known.invocations]
    last = max([part.day for part in sent] or ends or [utc(known.run.started_at).date()])
    in_time = [
        usd for day, usd in held.items()
        if day == last or (per == "month" and (day.year, day.month) == (last.year, last.month))
    ]  # fmt: skip
    return sum(in_time, Decimal(0))


def _provider(job: dict[str, Any]) -> str:
    provider = job.get("provider")
    return str(provider.get("name")) if isinstance(provider, dict) else str(provider)


def share(usd: Decimal, number: int, unknown: int) -> Decimal | None:
    """The dollars for each of a number of things, to 1e-12; None for nothing, or for nothing known.

    Args:
        unknown: how many attempts' cost is not among the dollars.
    """
    return from_pico(to_pico(usd / number)) if number and (usd or not unknown) else None


def _cap(known: _Known) -> dict[str, Any]:
    budget = known.job.get("budget")
    return budget if isinstance(budget, dict) else {}
