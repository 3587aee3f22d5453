"""Attempts of the ledger → the result columns of the output. Everything here can be derived again for nothing."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa

from batchrun.columns import build
from batchrun.money import COST_SOURCES, PICO_PER_USD, from_pico
from batchrun.records import Answer, Outcome, RowSlots, Slot, StandingAttempt
from batchrun.wire import read_answer

_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("response", pa.string()),
    ("finish_reason", pa.string()),
    ("finish_reason_raw", pa.string()),
    ("prompt_tokens", pa.int64()),
    ("completion_tokens", pa.int64()),
    ("total_tokens", pa.int64()),
    ("cached_tokens", pa.int64()),
    ("reasoning_tokens", pa.int64()),
    ("usd_spent", pa.float64()),
    ("cost_source", pa.string()),
    ("unknown_attempts", pa.int64()),
    ("requested_model", pa.string()),
    ("model", pa.string()),
    ("status", pa.string()),
    ("error", pa.string()),
    ("flags", pa.list_(pa.string())),
    ("reasoning", pa.string()),
    ("tool_calls", pa.string()),
    ("attempts", pa.int64()),
    ("latency_seconds", pa.float64()),
    ("request_id", pa.string()),
    ("client_request_id", pa.string()),
    ("request_key", pa.string()),
    ("run_id", pa.string()),
    ("finished_at", pa.timestamp("us", tz="UTC")),
)
_FIRST_TOKEN = ("first_token_seconds", pa.float64())
_SAMPLE = ("sample", pa.int64())
_REUSED = ("reused", pa.bool_())
_PICO = "usd_pico"
"""Of a record: what its slot took, exactly; no column."""


def result_schema(*, streamed: bool, sampled: bool = False, reuses: bool = False, prefix: str = "") -> pa.Schema:
    """The result columns: from the job alone, so that every run of a job has the same."""
    optional = ((streamed, _FIRST_TOKEN), (sampled, _SAMPLE), (reuses, _REUSED))
    columns = (*_COLUMNS, *(column for is_wanted, column in optional if is_wanted))
    return pa.schema([(prefix + name, kind) for name, kind in columns])


@dataclass
class Counts:
    """What the rows of an output add up to."""

    ok: int = 0
    failed: int = 0
    pending: int = 0
    usd_pico: int = 0

    @property
    def usd(self) -> Decimal:
        """Dollars, exact."""
        return from_pico(self.usd_pico)

    @property
    def rows(self) -> int:
        """All of them."""
        return self.ok + self.failed + self.pending


class Results:
    """Builds result columns, batch by batch.

    Args:
        slots: those of each row.
        requested: what the job calls each model.
    """

    def __init__(
        self,
        schema: pa.Schema,
        *,
        run_id: str,
        slots: RowSlots,
        requested: Mapping[str, str],
        prefix: str = "",
    ) -> None:
        self.schema = schema
        self.counts = Counts()
        self._run_id = run_id
        self._slots = slots
        self._requested = requested
        self._prefix = prefix

    def batch(
        self,
        start: int,
        rows: int,
        attempts: Iterable[StandingAttempt],
        faults: Mapping[Slot, str],
        unrepaired: Container[Slot] = (),
    ) -> tuple[pa.RecordBatch, list[Outcome]]:
        """The result columns of input rows `start` ≤ index < `start + rows`, a row per slot.

        Args:
            attempts: as `LedgerView.standing` gives them.
            faults: why slots cannot be asked.
            unrepaired: slots that are to be asked again, because their answers do not fit.
        """
        left = iter(attempts)
        attempt = next(left, None)
        records = []
        for row_index in range(start, start + rows):
            of_row: dict[Slot, list[StandingAttempt]] = {}
            while attempt is not None and attempt.slot.row_index <= row_index:
                of_row.setdefault(attempt.slot, []).append(attempt)
                attempt = next(left, None)
            # Attempts of another model than the job's have no row here.
            records += [
                self._record(slot, of_row.get(slot, []), faults.get(slot), slot in unrepaired)
                for slot in self._slots.of(row_index)
            ]
        columns = []
        for field in self.schema:
            name = field.name.removeprefix(self._prefix)
            columns.append(build([record.get(name) for record in records], field.type))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema), list(map(_outcome, records))

    def _record(
        self, slot: Slot, attempts: list[StandingAttempt], fault: str | None, is_unrepaired: bool
    ) -> dict[str, Any]:
        answered = None
        unknown = 0
        for attempt in attempts:
            if attempt.usd_pico is None:
                unknown += not attempt.is_reused
            else:
                self.counts.usd_pico += attempt.usd_pico
            if attempt.outcome == "ok":
                answered = attempt  # the last, where it was asked again for one that fits
        usd_spent, cost_source = _spent(attempts)
        record: dict[str, Any] = {
            "requested_model": self._requested[slot.model],
            "sample": slot.sample,
            "run_id": self._run_id,
            "attempts": sum(not attempt.is_reused for attempt in attempts),
            "unknown_attempts": unknown,
            "reused": any(attempt.is_reused for attempt in attempts),
            "flags": [],
            "usd_spent": usd_spent,
            "cost_source": cost_source,
            _PICO: sum(attempt.usd_pico for attempt in attempts if attempt.usd_pico is not None)
            if attempts and not unknown
            else None,
        }
        if fault is not None and answered is None:
            self.counts.failed += 1
            record["status"], record["error"] = "failed", f"not_rendered: {fault}"
            return record
        if not attempts:
            self.counts.pending += 1
            record["status"] = "pending"
            return record
        decisive = answered or attempts[-1]
        record["request_id"] = decisive.request_id
        record["client_request_id"] = decisive.client_request_id
        record["request_key"] = decisive.key
        record["finished_at"] = decisive.settled_at
        if answered is not None:
            self.counts.ok += not is_unrepaired
            self.counts.pending += is_unrepaired
            record["status"] = "pending" if is_unrepaired else "ok"
            record["error"] = "its answer does not fit, and it is to be asked again" if is_unrepaired else None
            record.update(_answer_columns(answered))
            return record
        is_failed = decisive.is_final
        self.counts.failed += is_failed
        self.counts.pending += not is_failed
        record["status"], record["error"] = "failed" if is_failed else "pending", decisive.error
        return record


def _outcome(record: Mapping[str, Any]) -> Outcome:
    is_ok = record["status"] == "ok"
    return Outcome(record.get("response") if is_ok else None, is_ok, "truncated" in record["flags"], record[_PICO])


def _answer_columns(attempt: StandingAttempt) -> dict[str, Any]:
    prompt, completion, total, cached, reasoning = attempt.usage
    columns: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total,
        "cached_tokens": cached,
        "reasoning_tokens": reasoning,
        "flags": list(attempt.flags),
        "latency_seconds": attempt.latency_seconds,
        "first_token_seconds": attempt.first_token_seconds,
    }
    if attempt.body is None:
        return columns
    answer = read_answer(attempt.body, {}, streamed=attempt.streamed, counts=False)
    if isinstance(answer, Answer):
        columns |= {
            "response": answer.text,
            "finish_reason": answer.finish_reason,
            "finish_reason_raw": answer.finish_reason_raw,
            "model": answer.model,
            "reasoning": answer.reasoning,
            "tool_calls": json.dumps(answer.tool_calls, ensure_ascii=False) if answer.tool_calls else None,
        }
    else:
        # It could be read when it came: it was damaged since, or this version reads it no more.
        columns["flags"] = [*attempt.flags, "unreadable"]
    return columns


def _spent(attempts: Sequence[StandingAttempt]) -> tuple[float | None, str | None]:
    """A row's dollars, and where they come from: the weakest source among the attempts that cost something."""
    if len(attempts) == 1:
        pico = attempts[0].usd_pico
        return (pico / PICO_PER_USD, attempts[0].cost_source) if pico is not None else (None, None)
    known = [(attempt.usd_pico, attempt.cost_source) for attempt in attempts if attempt.usd_pico is not None]
    total = sum(pico for pico, _ in known)
    is_answer_known = all(attempt.usd_pico is not None for attempt in attempts if attempt.outcome == "ok")
    if not known or (total == 0 and not is_answer_known):
        # An answer at an unknown price after refusals for nothing did not cost nothing.
        return None, None
    sources = [source for pico, source in known if pico] or [
        attempt.cost_source for attempt in attempts if attempt.outcome == "ok" and attempt.usd_pico is not None
    ] or [source for _, source in known]  # fmt: skip
    # Of whole numbers Python's quotient is the nearest double: the one whose shortest repr is the exact amount.
    return total / PICO_PER_USD, max(sources, key=lambda source: COST_SOURCES.index(source or "not_billed"))
