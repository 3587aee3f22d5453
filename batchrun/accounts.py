"""Sums over the ledger: what was spent, what may still be on the bill, what an answer takes. Dollars are exact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

from batchrun.ledger_view import LedgerView, Run, everywhere, pico_sum, summed
from batchrun.money import DERIVED, REPORTED, from_pico
from batchrun.records import Totals, seconds
from batchrun.usage import Usage

_SHOWN_ROWS = 20
_MEASURED = 10_000


_USD, _RESERVED = pico_sum("usd_pico"), pico_sum("CASE WHEN usd_pico IS NULL THEN reserved_pico END")
_MARGIN = pico_sum("CASE WHEN usd_pico IS NOT NULL THEN held_pico - usd_pico END")


class Held(NamedTuple):
    """What of a cap is taken, in pico-dollars."""

    settled: int
    margin: int
    """By which amounts that are derived from tokens are counted higher than they are."""
    unknown: int
    """Reserved by attempts whose cost is not known."""
    unknown_attempts: int
    unbounded: int
    """Attempts whose cost is not known, and for which nothing was reserved."""

    @property
    def pico(self) -> int:
        """All of it."""
        return self.settled + self.margin + self.unknown


def held(ledger: LedgerView, run: Run | None, since: int) -> Held:
    """What the attempts of a run (of all runs if None) that were sent since a moment have taken."""
    ((*sums, unknown, unbounded),) = ledger.rows(
        f"SELECT {_USD}, {_MARGIN}, {_RESERVED}, coalesce(sum(usd_pico IS NULL), 0), "
        "coalesce(sum(usd_pico IS NULL AND reserved_pico IS NULL), 0) "
        "FROM charged WHERE (run = :run OR :run IS NULL) AND sent_at >= :since",
        {"run": run.run if run is not None else None, "since": since},
    )
    return Held(summed(*sums[:2]), summed(*sums[2:4]), summed(*sums[4:]), unknown, unbounded)


def overcharge(ledger: LedgerView, run: Run | None, since: int) -> tuple[Decimal, Decimal, dict[str, Any]] | None:
    """The newest attempt that cost more than was reserved: dollars, what was reserved, and the job of then."""
    rows = ledger.rows(
        "SELECT usd_pico, reserved_pico, job FROM charged JOIN invocation USING (invocation) "
        "WHERE usd_pico > reserved_pico AND (charged.run = :run OR :run IS NULL) AND sent_at >= :since "
        "ORDER BY attempt_id DESC LIMIT 1",
        {"run": run.run if run is not None else None, "since": since},
    )
    if not rows:
        return None
    usd, reserved, job = rows[0]
    return from_pico(usd), from_pico(reserved), json.loads(job)


def reported(ledger: LedgerView, run: Run, model: str) -> Iterator[tuple[Usage, int, Decimal]]:
    """Counts, time and dollars of a model's newest answers in a run whose cost the provider has told."""
    for *counts, sent_at, usd in ledger.rows(
        "SELECT prompt_tokens, completion_tokens, total_tokens, cached_tokens, cache_write_tokens, reasoning_tokens, "
        "sent_at, usd_pico FROM charged WHERE run = ? AND model = ? AND outcome = 'ok' "
        f"AND cost_source IN {REPORTED} ORDER BY attempt_id DESC LIMIT 200",
        (run.run, model),
    ):
        yield Usage(*counts), sent_at, from_pico(usd)


def spent(ledger: LedgerView, run: Run) -> tuple[Decimal, int]:
    """Dollars and tokens of a run so far."""
    ((high, low, tokens),) = ledger.rows(
        f"SELECT {_USD}, coalesce(sum(total_tokens), 0) FROM charged WHERE run = ?", (run.run,)
    )
    return from_pico(summed(high, low)), tokens


class Compared(NamedTuple):
    """An attempt beside the lines that the provider's log has of it."""

    attempt_id: int
    run: int
    row_index: int
    client_request_id: str
    ours: Decimal | None
    cost_source: str | None
    origin: str | None
    """What told our amount after the attempt was settled: `reconcile`, `reprice`, or nothing."""
    reserved: Decimal | None
    sent_at: int
    """Microseconds since 1970, UTC."""
    seconds: float | None
    """Until it was over; None if that is not known."""
    theirs: Decimal | None
    """None if the log has no line of it."""
    is_elsewhere: bool = False
    """It was sent to another endpoint than the log is of."""


def unreconciled_since(ledger: LedgerView) -> int | None:
    """When the first attempt was sent that the log should be asked about: of the newest run, or of unknown cost."""
    ((since,),) = ledger.rows(
        "SELECT min(sent_at) FROM charged WHERE usd_pico IS NULL OR run = (SELECT max(run) FROM attempt)"
    )
    assert since is None or isinstance(since, int)
    return since


def compared(ledger: LedgerView, since: int, endpoint: str) -> Iterator[Compared]:
    """Attempts since a moment whose cost is not known, or that the log has; after `Ledger.take_billed`.

    Args:
        endpoint: identity of the one that the log is of.

    They are as they were when this was called, whatever is corrected while they are drawn.
    """
    ledger.rows("DROP TABLE IF EXISTS temp.compared")
    ledger.rows(
        "CREATE TEMP TABLE compared AS SELECT attempt_id, run, row_index, client_request_id, charged.usd_pico, "
        "cost_source, origin, reserved_pico, sent_at, latency_us, theirs, "
        "invocation NOT IN (SELECT invocation FROM invocation WHERE endpoint = ?) AS elsewhere "
        "FROM charged LEFT JOIN (SELECT attempt_id, "
        "client_request_id, sum(usd_pico) AS theirs FROM temp.billed GROUP BY attempt_id, client_request_id) "
        "USING (attempt_id, client_request_id) "
        "WHERE sent_at >= ? AND (charged.usd_pico IS NULL OR theirs IS NOT NULL) ORDER BY attempt_id",
        (endpoint, since),
    )
    for *named, ours, cost_source, origin, reserved, sent_at, latency_us, theirs, is_elsewhere in ledger.each(
        "SELECT * FROM temp.compared"
    ):
        attempt_id, run, row_index, client_request_id = named
        yield Compared(
            attempt_id, run, row_index, client_request_id, _usd(ours), cost_source, origin, _usd(reserved), sent_at,
            seconds(latency_us), _usd(theirs), bool(is_elsewhere),
        )  # fmt: skip


class InLog(NamedTuple):
    """What of a run the provider's log has; after `Ledger.take_billed`."""

    lines: int
    """Attempts with a line."""
    answered: int
    """Attempts that were answered, and so must be there."""
    missing: int
    """Attempts that the provider itself reported as billed, and that are not there."""


def in_log(ledger: LedgerView, since: int, until: int) -> dict[int, InLog]:
    """By run, for the attempts that were sent in a time."""
    rows = ledger.rows(
        "SELECT run, sum(is_there), sum(outcome = 'ok'), "
        f"sum(NOT is_there AND usd_pico > 0 AND cost_source IN {REPORTED}) FROM ("
        "SELECT run, outcome, usd_pico, cost_source, EXISTS ("
        "SELECT 1 FROM temp.billed WHERE billed.attempt_id = attempt.attempt_id "
        "AND billed.client_request_id = attempt.client_request_id) AS is_there FROM attempt "
        "WHERE sent_at >= ? AND sent_at <= ?) GROUP BY run",
        (since, until),
    )
    return {run: InLog(lines, answered, missing or 0) for run, lines, answered, missing in rows}


def unknown_before(ledger: LedgerView, moment: int) -> tuple[int, Decimal | None]:
    """Attempts of unknown cost that were sent before a moment, and the most that they can have cost."""
    ((number, unbounded, high, low),) = ledger.rows(
        f"SELECT count(*), coalesce(sum(reserved_pico IS NULL), 0), {_RESERVED} FROM charged "
        "WHERE usd_pico IS NULL AND sent_at < ?",
        (moment,),
    )
    return number, from_pico(summed(high, low)) if not unbounded else None


def unrecorded(ledger: LedgerView) -> tuple[int, Decimal]:
    """Requests of ours in the log that the ledger does not know, and their dollars; after `Ledger.take_billed`."""
    ((number, high, low),) = ledger.rows(
        f"SELECT count(DISTINCT client_request_id), {_USD} FROM temp.billed "
        "WHERE NOT EXISTS (SELECT 1 FROM attempt WHERE attempt.attempt_id = billed.attempt_id "
        "AND attempt.client_request_id = billed.client_request_id)"
    )
    return number, from_pico(summed(high, low))


def _usd(pico: int | None) -> Decimal | None:
    return from_pico(pico) if pico is not None else None


class DerivedAttempt(NamedTuple):
    """An answer whose cost the provider has not told."""

    attempt_id: int
    usage: Usage
    sent_at: int
    usd: Decimal | None


def derived(ledger: LedgerView, run: Run, model: str) -> Iterator[DerivedAttempt]:
    """The answers of a model in a run whose cost is derived from their tokens, or not known.

    They are as they were when this was called, whatever is corrected while they are drawn.
    """
    ledger.rows("DROP TABLE IF EXISTS temp.derived")
    ledger.rows(
        "CREATE TEMP TABLE derived AS SELECT attempt_id, sent_at, usd_pico, prompt_tokens, completion_tokens, "
        "total_tokens, cached_tokens, cache_write_tokens, reasoning_tokens FROM charged WHERE run = ? AND model = ? "
        f"AND outcome = 'ok' AND (usd_pico IS NULL OR cost_source IN {DERIVED}) "
        "ORDER BY attempt_id",
        (run.run, model),
    )
    for attempt_id, sent_at, pico, *counts in ledger.each("SELECT * FROM temp.derived"):
        yield DerivedAttempt(attempt_id, Usage(*counts), sent_at, _usd(pico))


def models(ledger: LedgerView, run: Run) -> list[str]:
    """The models that a run has asked."""
    return [model for (model,) in ledger.rows("SELECT DISTINCT model FROM attempt WHERE run = ?", (run.run,))]


class RowCost(NamedTuple):
    """What a settled row took."""

    usd: Decimal | None
    """None if the cost of an attempt is not known."""
    total_tokens: int
    seconds: float
    """Of all its attempts."""


def row_costs(ledger: LedgerView, invocation: int) -> list[RowCost]:
    """What the rows took that an invocation settled."""
    return [
        RowCost(from_pico(pico) if not unknown else None, tokens, microseconds / 1e6)
        for pico, unknown, tokens, microseconds in ledger.rows(
            "SELECT coalesce(sum(usd_pico), 0), sum(usd_pico IS NULL), coalesce(sum(total_tokens), 0), "
            "coalesce(sum(latency_us), 0) FROM charged WHERE invocation = ? "
            "GROUP BY row_index, model, sample HAVING max(outcome = 'ok' OR final)",
            (invocation,),
        )
    ]


class Measured(NamedTuple):
    """What one answer took."""

    request_bytes: int
    prompt_tokens: int
    completion_tokens: int


def measured(ledger: LedgerView, model: str, parameters: str) -> list[Measured]:
    """The newest answers of a model in any run of the job with the same parameters (JSON text)."""
    return [
        Measured(*row)
        for row in ledger.rows(
            "SELECT request_bytes, prompt_tokens, completion_tokens FROM attempt JOIN invocation USING (invocation) "
            "WHERE model = ? AND json_extract(job, '$.parameters') = json(?) AND outcome = 'ok' "
            "AND request_bytes > 0 AND prompt_tokens > 0 AND completion_tokens IS NOT NULL "
            f"ORDER BY attempt_id DESC LIMIT {_MEASURED}",
            (model, parameters),
        )
    ]


class _OfSource(NamedTuple):
    """Sums over the attempts of a run whose costs have one source."""

    cost_source: str | None
    slowest_us: int | None
    usd_high: int
    usd_low: int
    unknown_cost: int
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    attempts: int

    @property
    def pico(self) -> int:
        return summed(self.usd_high, self.usd_low)


def totals(ledger: LedgerView, run: Run) -> Totals:
    """Sums over a run, computed by SQLite."""
    ok, failed = ledger.counts(run)
    standing = ledger.standing_sql(run)
    (faults,) = ledger.rows("SELECT 'not_rendered', count(*), min(error) FROM row_fault WHERE run = ?", (run.run,))
    by_source = [
        _OfSource(*sums)
        for sums in ledger.rows(
            f"SELECT cost_source, max(CASE outcome WHEN 'ok' THEN latency_us END), {_USD}, sum(usd_pico IS NULL), "
            "coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), coalesce(sum(total_tokens), 0), "
            "coalesce(sum(cached_tokens), 0), count(*) FROM charged WHERE run = ? AND outcome IS NOT NULL "
            "GROUP BY cost_source ORDER BY cost_source",
            (run.run,),
        )
    ]
    never_came = "FROM charged WHERE run = ? AND outcome = 'unknown' AND usd_pico IS NULL"
    (unknown,) = ledger.rows(
        f"SELECT count(*), {_RESERVED}, coalesce(sum(reserved_pico IS NULL), 0) {never_came}", (run.run,)
    )
    unknown_rows, first_unknown = 0, []
    if unknown[0]:
        in_rows = f"FROM ({standing}) WHERE outcome = 'unknown' AND usd_pico IS NULL AND NOT is_reused"
        ((unknown_rows,),) = ledger.rows(
            f"SELECT count(*) FROM (SELECT DISTINCT at, model, sample {in_rows})", everywhere(run)
        )
        first_unknown = ledger.rows(f"SELECT DISTINCT at {in_rows} ORDER BY at LIMIT {_SHOWN_ROWS}", everywhere(run))
    (unplaced,) = ledger.rows(
        f"SELECT {_USD}, coalesce(sum(outcome = 'ok'), 0) FROM moved "
        "JOIN charged USING (run, row_index, model, sample, key) WHERE run = ? AND to_row IS NULL",
        (run.run,),
    )
    ((repairs, *repair_sums),) = ledger.rows(
        f"SELECT count(*), {_USD} FROM charged WHERE run = ? AND repair > 0 AND outcome IS NOT NULL", (run.run,)
    )
    ((reused, *saved, reused_unknown),) = ledger.rows(
        # Each answer has one attempt that is no repair.
        f"SELECT coalesce(sum(repair = 0), 0), {_USD}, coalesce(sum(usd_pico IS NULL), 0) FROM reused JOIN charged ON "
        "charged.run = source_run AND charged.row_index = source_row AND charged.model = reused.model "
        "AND charged.sample = reused.sample AND charged.key = reused.key WHERE reused.run = ? AND outcome = 'ok'",
        (run.run,),
    )
    failures = []
    if failed > faults[1]:
        failures = ledger.rows(
            "SELECT error_kind, count(*), min(error) FROM ("
            "SELECT at, model, sample, max(attempt_id) AS attempt_id, max(outcome = 'ok') AS ok "
            f"FROM ({standing}) GROUP BY at, model, sample) "
            "JOIN attempt USING (attempt_id) WHERE attempt.final AND NOT ok GROUP BY error_kind ORDER BY 2 DESC",
            everywhere(run),
        )
    flags: dict[str, int] = {}
    for names, number in ledger.rows(
        "SELECT flags, count(*) FROM attempt WHERE run = ? AND outcome = 'ok' AND flags IS NOT NULL GROUP BY flags",
        (run.run,),
    ):
        for name in names.split(","):
            flags[name] = flags.get(name, 0) + number
    return Totals(
        ok=ok,
        failed=failed,
        usd=from_pico(sum(one.pico for one in by_source)),
        usd_by_source={one.cost_source: from_pico(one.pico) for one in by_source if one.cost_source},
        unknown_cost=sum(one.unknown_cost for one in by_source),
        unknown_outcomes=unknown[0],
        unknown_rows=unknown_rows,
        first_unknown_rows=[row_index for (row_index,) in first_unknown],
        unknown_usd=from_pico(summed(*unknown[1:3])) if not unknown[3] else None,
        prompt_tokens=sum(one.prompt_tokens for one in by_source),
        completion_tokens=sum(one.completion_tokens for one in by_source),
        total_tokens=sum(one.total_tokens for one in by_source),
        cached_tokens=sum(one.cached_tokens for one in by_source),
        attempts=sum(one.attempts for one in by_source),
        unplaced=unplaced[2],
        unplaced_usd=from_pico(summed(*unplaced[:2])),
        repairs=repairs,
        repair_usd=from_pico(summed(*repair_sums)),
        reused=reused,
        saved_usd=from_pico(summed(*saved)) if not reused_unknown else None,
        failures=[*((kind or "", number, error or "") for kind, number, error in failures),
                  *([faults] if faults[1] else [])],
        flags=dict(sorted(flags.items())),
        slowest_seconds=seconds(max((one.slowest_us for one in by_source if one.slowest_us is not None), default=None)),
    )  # fmt: skip
