"""What a run came to: one object for machines, a few lines for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from batchrun import __version__
from batchrun.money import exact_json, usd_text
from batchrun.projection import Projection
from batchrun.records import Totals
from batchrun.tables import shown
from batchrun.trend import Trend

_SHOWN_LABELS = 12
# What the price library says is an estimate, and never shown without the word.
_ESTIMATED = {"library": "estimated from library prices"}


@dataclass(frozen=True)
class Summary:
    """The end of an invocation, with the totals of its whole run."""

    job: str
    run_id: str
    provider: str
    model: str | list[str]
    rows: int
    """Slots: rows of the input times models times samples."""
    input_rows: int
    totals: Totals
    exit_code: int
    reason: str | None
    output: str | None
    """Where the Parquet is; None if none was written."""
    ledger: str
    seconds: float
    """Of this invocation."""
    sent: int
    """Attempts of this invocation."""
    over_cap: Decimal | None = None
    """Dollars by which the job's cap was exceeded; None without a cap."""
    projection: Projection | None = None
    """What the whole run will take, after a sample."""
    settings: dict[str, Any] = field(default_factory=dict)
    """`Job.output_settings` of the job that it was written by."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Where in the output stands what two runs are compared by."""
    parse_errors: int = 0
    """Answers without the form that is wanted."""
    labels: dict[str, int] = field(default_factory=dict)
    """How often each label was given."""
    evaluation: dict[str, Any] | None = None
    evaluation_lines: list[str] = field(default_factory=list)
    trend: Trend | None = None
    """Beside the run before; None at the first."""
    warnings: list[str] = field(default_factory=list)
    advice: str | None = None
    """What would make the failed rows succeed, where the provider tells."""

    @property
    def pending(self) -> int:
        """Rows that no attempt has decided yet."""
        return max(0, self.rows - self.totals.ok - self.totals.failed)

    def manifest(self) -> dict[str, Any]:
        """What the output's metadata says of the run."""
        totals = self.totals
        return {
            "batchrun": __version__,
            "job": self.job,
            "run_id": self.run_id,
            "provider": self.provider,
            "model": self.model,
            "rows": self.rows,
            "input_rows": self.input_rows,
            "ok": totals.ok,
            "failed": totals.failed,
            "pending": self.pending,
            "complete": self.pending == 0,
            "reason": self.reason,
            "usd_spent": totals.usd,
            "usd_by_source": totals.usd_by_source,
            "unknown_attempts": totals.unknown_cost,
            "unknown_outcomes": totals.unknown_outcomes,
            "unknown_rows": totals.unknown_rows,
            # Of an attempt that was answered at a cost nobody told, no bound is known.
            "unknown_usd_at_most": totals.unknown_usd if totals.unknown_cost == totals.unknown_outcomes else None,
            "over_cap": self.over_cap,
            "unplaced": totals.unplaced,
            "unplaced_usd": totals.unplaced_usd,
            "parse_errors": self.parse_errors,
            "columns": self.columns,
            "settings": self.settings,
            "labels": self.labels,
            "evaluation": self.evaluation,
            "repairs": totals.repairs,
            "repair_usd": totals.repair_usd,
            "reused": totals.reused,
            "saved_usd": totals.saved_usd,
            "prompt_tokens": totals.prompt_tokens,
            "completion_tokens": totals.completion_tokens,
            "total_tokens": totals.total_tokens,
            "cached_tokens": totals.cached_tokens,
            "attempts": totals.attempts,
        }

    def to_json(self) -> str:
        """One JSON object; dollars are numbers with all their digits."""
        return exact_json(self.document())

    def document(self) -> dict[str, Any]:
        """What it tells machines, as plain values."""
        return {name: value for name, value in self.manifest().items() if name != "settings"} | {
            "exit_code": int(self.exit_code),
            "failures": [
                {"kind": kind, "rows": rows, "example": example} for kind, rows, example in self.totals.failures
            ],
            "first_unknown_rows": [row_index + 1 for row_index in self.totals.first_unknown_rows],
            "previous": self.trend.document() if self.trend is not None else None,
            "projection": self.projection.document() if self.projection is not None else None,
            "advice": self.advice,
            "warnings": self.warnings,
            "flags": self.totals.flags,
            "seconds": round(self.seconds, 3),
            "sent": self.sent,
            "slowest_seconds": self.totals.slowest_seconds,
            "output": self.output,
            "ledger": self.ledger,
        }

    def lines(self) -> list[str]:
        """A short text."""
        totals = self.totals
        rate = f", {self.sent / self.seconds:.1f} requests/s" if self.sent and self.seconds > 0 else ""
        lines = [
            f"run {self.run_id}: {totals.ok} ok, {totals.failed} failed, {self.pending} pending "
            f"of {self.rows} rows in {self.seconds:.1f} s{rate}",
            f"tokens: {totals.prompt_tokens} prompt ({totals.cached_tokens} cached), "
            f"{totals.completion_tokens} completion, {totals.total_tokens} total",
            f"spent: ${usd_text(totals.usd)}{self._sources()}",
        ]
        if self.trend is not None:
            lines.append(self.trend.line())
        if totals.repairs:
            lines.append(f"repairs: {totals.repairs} attempts, ${usd_text(totals.repair_usd)} of the amount above")
        if totals.reused:
            saved = f", which had cost ${usd_text(totals.saved_usd)}" if totals.saved_usd else ""
            lines.append(f"reused: {totals.reused} rows took answers that were there{saved}")
        if totals.unknown_outcomes:
            lines.append(self._unknown())
        if self.over_cap:
            lines.append(f"over the cap: ${usd_text(self.over_cap)}")
        if (uncounted := totals.unknown_cost - totals.unknown_outcomes) > 0:
            lines.append(
                f"unknown cost: {uncounted} attempts whose cost nobody reported: without prices in the job, or without "
                "counts of tokens in the answer, it cannot be derived"
            )
        if totals.unplaced:
            lines.append(
                f"unplaced: {totals.unplaced} answers (${usd_text(totals.unplaced_usd)}) whose row the input no "
                "longer has"
            )
        if totals.slowest_seconds is not None:
            lines.append(f"slowest answer: {totals.slowest_seconds:.1f} s")
        if totals.flags:
            lines.append("flags: " + ", ".join(f"{number} {name}" for name, number in totals.flags.items()))
        if self.labels:
            given = sum(self.labels.values())
            shares = [f"{shown(name, 40)} {number} ({number / given:.0%})" for name, number in self.labels.items()]
            lines.append(f"labels: {', '.join(shares[:_SHOWN_LABELS])}{', …' * (len(shares) > _SHOWN_LABELS)}")
        if self.parse_errors:
            lines.append(f"not parsed: {self.parse_errors} answers; parse_error in the output says why")
        lines += self.evaluation_lines
        lines += [f"warning: {warning}" for warning in self.warnings]
        for kind, rows, example in totals.failures:
            lines.append(f"failed: {rows} × {kind}, such as: {example[:200]}")
        if self.projection is not None:
            lines += self.projection.lines()
        if self.advice:
            lines.append(f"advice: {self.advice}")
        if totals.failed:
            lines.append("failed rows are asked again with --retry-failed")
        lines.append(
            f"output: {self.output}"
            if self.output
            else f"no output was written; `batchrun export` does it ({self.ledger})"
        )
        return lines

    def _unknown(self) -> str:
        totals = self.totals
        most = f"up to ${usd_text(totals.unknown_usd)}" if totals.unknown_usd is not None else "an amount not known"
        rows = ", ".join(str(row_index + 1) for row_index in totals.first_unknown_rows[:5])
        more = ", …" if totals.unknown_rows > 5 else ""
        where = f" in {totals.unknown_rows} rows ({rows}{more})" if totals.unknown_rows else ""
        return (
            f"unknown: {totals.unknown_outcomes} attempts{where} got no answer, "
            f"and {most} may be on the bill; it is not in the amount above"
        )

    def _sources(self) -> str:
        sources = self.totals.usd_by_source
        shown = {source: usd for source, usd in sources.items() if usd} or sources
        parts = [f"{_ESTIMATED.get(source, source)} ${usd_text(usd)}" for source, usd in shown.items()]
        return f" ({', '.join(parts)})" if parts else ""
