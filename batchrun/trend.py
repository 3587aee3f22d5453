"""A run beside the one of its job before it."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from batchrun.ledger_view import LedgerView, Run
from batchrun.money import usd_text
from batchrun.records import Totals
from batchrun.spend import RunSpend, asking_seconds, read_ledger, share


@dataclass(frozen=True)
class Trend:
    """What has changed since the run before."""

    before: RunSpend
    usd: Decimal
    usd_per_1000_rows: Decimal | None
    failed: int
    rows_per_second: float | None
    rows_per_second_before: float | None
    """Of the run before; both by the time in which they asked."""

    def document(self) -> dict[str, Any]:
        """The figures of the run before, as plain values; and this run's that are nowhere else."""
        return {
            "run_id": self.before.run_id,
            "usd_spent": self.before.usd_spent,
            "usd_per_1000_rows": self.before.usd_per_1000_rows,
            "failed": self.before.failed,
            "rows_per_second": _rounded(self.rows_per_second_before),
            "now": {
                "usd_per_1000_rows": self.usd_per_1000_rows,
                "rows_per_second": _rounded(self.rows_per_second),
            },
        }

    def line(self) -> str:
        """A short text."""
        parts = [f"${usd_text(self.usd)} after ${usd_text(self.before.usd_spent)}"]
        now, then = self.usd_per_1000_rows, self.before.usd_per_1000_rows
        if now is not None and then is not None:
            change = f" ({now / then - 1:+.0%})" if then else ""
            parts.append(f"per 1,000 rows ${_short(now)} after ${_short(then)}{change}")
        parts.append(f"failed {self.failed} after {self.before.failed}")
        if self.rows_per_second is not None and self.rows_per_second_before is not None:
            parts.append(f"rows/s {self.rows_per_second:.1f} after {self.rows_per_second_before:.1f}")
        return f"beside run {self.before.run_id}: {'; '.join(parts)}"


def trend_of(ledger: LedgerView, run: Run, totals: Totals) -> Trend | None:
    """A run beside the newest one before it that settled any row; None if there is none, or the run has settled none.

    Args:
        totals: of the run.
    """
    settled = totals.ok + totals.failed
    if not settled:
        return None
    for number, run_id in ledger.rows(
        "SELECT run, run_id FROM run WHERE run < ? AND input IS NOT NULL ORDER BY run DESC LIMIT 5", (run.run,)
    ):
        before = next((one for one in read_ledger(ledger, number=number).runs if one.settled), None)
        if before is not None and before.run_id == run_id:
            break
    else:
        return None
    return Trend(
        before,
        totals.usd,
        share(totals.usd * 1000, settled, totals.unknown_cost),
        totals.failed,
        _rate(settled - totals.reused, asking_seconds(ledger, run.run_id)),
        _rate(before.settled - before.reused, asking_seconds(ledger, before.run_id)),
    )


def _rate(rows: int, seconds: float) -> float | None:
    return rows / seconds if rows > 0 and seconds > 0 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _short(usd: Decimal) -> str:
    return usd_text(Decimal(f"{usd:.4g}"))
