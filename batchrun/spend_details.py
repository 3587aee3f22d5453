"""What of a run a page shows besides its sums: failures by cause, seconds, what rows cost, the costliest of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from batchrun.ledger_view import GROUP_COLUMNS, NO_ROW, LedgerView
from batchrun.money import from_pico

_GROUP = ", ".join(GROUP_COLUMNS)
_PERCENTILES = (0.5, 0.95, 0.99)
# From a ten-millionth of a dollar on: 1, 2, 5, 10, …
_STEPS = [step * 10**power for power in range(5, 15) for step in (1, 2, 5)]


class Failures(NamedTuple):
    """Attempts of a run that brought no answer, by cause."""

    run_id: str
    kind: str
    """As `Failure.kind`."""
    attempts: int


class Seconds(NamedTuple):
    """How long a model took to answer in a run. Seconds, to a thousandth; None: not measured."""

    run_id: str
    model: str
    answers: int
    p50: float | None
    p95: float | None
    p99: float | None
    first_p50: float | None
    """To the first token; of streamed answers alone."""
    first_p95: float | None
    first_p99: float | None


class Costs(NamedTuple):
    """How many rows of a run cost at least `usd_from`, and less than the next step: 1, 2, 5, 10, …"""

    run_id: str
    usd_from: Decimal
    """0 for those below the first step."""
    rows: int


class CostlyRow(NamedTuple):
    """One of the costliest rows, to be shown."""

    job: str
    spend: RowSpend
    prompt: str | None
    """What was asked; None if that cannot be told any more, or is not to be shown."""
    answer: str | None
    """Likewise."""


@dataclass(frozen=True)
class Details:
    """Of all runs of a report."""

    failures: list[Failures]
    seconds: list[Seconds]
    costs: list[Costs]
    top: list[CostlyRow]


class RowSpend(NamedTuple):
    """A row (with its model and sample) and what it took."""

    run_id: str
    row: int | None
    """Of the input, counted from 1; None if the input has it no more."""
    model: str
    sample: int
    attempts: int
    total_tokens: int
    usd_spent: Decimal
    """Of what is known."""
    attempt_id: int
    """Its newest one."""


def failures(ledger: LedgerView, run_ids: Iterable[str]) -> list[Failures]:
    """The most frequent first."""
    return [
        Failures(*row)
        for row in ledger.rows(
            "SELECT run_id, coalesce(error_kind, outcome), count(*) AS number FROM attempt JOIN run USING (run) "
            f"WHERE outcome <> 'ok' AND run_id IN ({_listed(run_ids)}) GROUP BY 1, 2 ORDER BY number DESC, 1, 2"
        )
    ]


def seconds(ledger: LedgerView, run_ids: Iterable[str]) -> list[Seconds]:
    """Percentiles of each run and model; the memory is that of the distinct milliseconds."""
    run_ids = list(run_ids)
    whole, first = _milliseconds(ledger, "latency_us", run_ids), _milliseconds(ledger, "first_token_us", run_ids)
    return [
        Seconds(
            run_id, model, sum(number for _, number in counts),
            *_percentiles(counts), *_percentiles(first.get((run_id, model), [])),
        )
        for (run_id, model), counts in whole.items()
    ]  # fmt: skip


def costs(ledger: LedgerView, run_ids: Iterable[str]) -> list[Costs]:
    """What the rows of each run cost, in steps; rows of which an amount is not known are left out."""
    cases = " ".join(f"WHEN pico < {step} THEN {index}" for index, step in enumerate(_STEPS))
    rows = ledger.rows(
        f"SELECT run_id, CASE {cases} ELSE {len(_STEPS)} END AS step, count(*) FROM ("
        "SELECT run, sum(usd_pico) AS pico FROM charged WHERE outcome IS NOT NULL "
        f"AND run IN (SELECT run FROM run WHERE run_id IN ({_listed(run_ids)})) "
        f"GROUP BY {_GROUP} HAVING count(*) = count(usd_pico)"
        ") JOIN run USING (run) GROUP BY 1, 2 ORDER BY 1, 2"
    )
    return [Costs(run_id, from_pico(_STEPS[step - 1]) if step else Decimal(0), number) for run_id, step, number in rows]


def costliest(ledger: LedgerView, run_ids: Iterable[str], most: int) -> list[RowSpend]:
    """The rows that cost most, the dearest first."""
    rows = ledger.rows(
        "SELECT run_id, 1 + CASE WHEN moved.run IS NULL THEN row_index ELSE to_row END, model, sample, number, tokens, "
        f"pico, newest FROM (SELECT {_GROUP}, count(*) AS number, coalesce(sum(total_tokens), 0) AS tokens, "
        "sum(usd_pico) AS pico, max(attempt_id) AS newest FROM charged "
        f"WHERE outcome IS NOT NULL AND row_index <> {NO_ROW} "
        f"AND run IN (SELECT run FROM run WHERE run_id IN ({_listed(run_ids)})) "
        f"GROUP BY {_GROUP} HAVING pico > 0 ORDER BY pico DESC, run, row_index LIMIT {int(most)}"
        f") JOIN run USING (run) LEFT JOIN moved USING ({_GROUP}) ORDER BY pico DESC, run, row_index"
    )
    return [
        RowSpend(run_id, row, model, sample, attempts, tokens, from_pico(pico), newest)
        for run_id, row, model, sample, attempts, tokens, pico, newest in rows
    ]


def _milliseconds(
    ledger: LedgerView, column: str, run_ids: Sequence[str]
) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """How many answers took each number of milliseconds, in order, by run and model."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for run_id, model, milliseconds, number in ledger.rows(
        f"SELECT run_id, model, ({column} + 500) / 1000 AS ms, count(*) FROM attempt JOIN run USING (run) "
        f"WHERE outcome = 'ok' AND {column} IS NOT NULL AND run_id IN ({_listed(run_ids)}) "
        "GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    ):
        found.setdefault((run_id, model), []).append((milliseconds, number))
    return found


def _percentiles(counts: Sequence[tuple[int, int]]) -> list[float | None]:
    """The smallest number that at least that share of the values does not exceed."""
    if not counts:
        return [None] * len(_PERCENTILES)
    total = sum(number for _, number in counts)
    found: list[float | None] = []
    for share in _PERCENTILES:
        left = share * total
        for milliseconds, number in counts:
            left -= number
            if left <= 1e-9:
                found.append(milliseconds / 1000)
                break
    return found


def _listed(run_ids: Iterable[str]) -> str:
    """Run ids as SQL text."""
    return ", ".join("'" + run_id.replace("'", "''") + "'" for run_id in run_ids)
