"""Attempts of the ledger → the result columns of the output. Everything here can be derived again for nothing."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

import pyarrow as pa

from batchrun.columns import build
from batchrun.kept import read_kept
from batchrun.money import COST_SOURCES, PICO_PER_USD, from_pico
from batchrun.records import Answer, RowSlots, Slot, StandingAttempt, seconds

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

    def note(self, status: str) -> None:
        """One row more."""
        if status == "ok":
            self.ok += 1
        elif status == "failed":
            self.failed += 1
        else:
            self.pending += 1

    @property
    def usd(self) -> Decimal:
        """Dollars, exact."""
        return from_pico(self.usd_pico)

    @property
    def rows(self) -> int:
        """All of them."""
        return self.ok + self.failed + self.pending


class ResultRow(NamedTuple):
    """One row of an output, by the names of its result columns; in each of them None is null."""

    response: str | None
    finish_reason: str | None
    finish_reason_raw: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    usd_spent: float | None
    cost_source: str | None
    unknown_attempts: int
    requested_model: str
    model: str | None
    status: str
    error: str | None
    flags: Sequence[str]
    reasoning: str | None
    tool_calls: str | None
    attempts: int
    latency_seconds: float | None
    request_id: str | None
    client_request_id: str | None
    request_key: str | None
    run_id: str
    finished_at: int | None
    """Microseconds since 1970, UTC."""
    first_token_seconds: float | None
    sample: int
    reused: bool
    usd_pico: int | None
    """What the slot took, exactly; None if that is not known. No column."""

    @property
    def text(self) -> str | None:
        """The answer's; None if it has none that counts."""
        return self.response if self.is_ok else None

    @property
    def is_ok(self) -> bool:
        """Something can be made of it."""
        return self.status == "ok"

    @property
    def is_cut(self) -> bool:
        """It ended because it was as long as allowed."""
        return "truncated" in self.flags


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
    ) -> tuple[pa.RecordBatch, list[ResultRow]]:
        """The result columns of input rows `start` ≤ index < `start + rows`, a row per slot; and those rows.

        Args:
            attempts: as `LedgerView.standing` gives them.
            faults: why slots cannot be asked.
            unrepaired: slots that are to be asked again, because their answers do not fit.
        """
        left = iter(attempts)
        attempt = next(left, None)
        result_rows: list[ResultRow] = []
        for row_index in range(start, start + rows):
            of_row: dict[tuple[int, str, int], list[StandingAttempt]] = {}
            while attempt is not None and attempt.row_index <= row_index:
                of_row.setdefault(attempt[:3], []).append(attempt)
                attempt = next(left, None)
            # Attempts of another model than the job's have no row here.
            result_rows += [
                self._row(slot, of_row.get(slot, ()), faults.get(slot), slot in unrepaired)
                for slot in self._slots.of(row_index)
            ]
        columns = dict(zip(ResultRow._fields, zip(*result_rows, strict=True), strict=True)) if result_rows else {}
        arrays = [build(columns.get(field.name.removeprefix(self._prefix), ()), field.type) for field in self.schema]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema), result_rows

    def _row(
        self, slot: Slot, attempts: Sequence[StandingAttempt], fault: str | None, is_unrepaired: bool
    ) -> ResultRow:
        made = unknown = pico = 0
        is_reused = False
        answered = None
        for attempt in attempts:
            is_reused = is_reused or bool(attempt.is_reused)
            made += not attempt.is_reused
            if attempt.usd_pico is None:
                unknown += not attempt.is_reused
            else:
                pico += attempt.usd_pico
            if attempt.outcome == "ok":
                answered = attempt  # the last, where it was asked again for one that fits
        self.counts.usd_pico += pico
        decisive = answered
        if answered is not None:
            status, error = ("pending", _UNREPAIRED) if is_unrepaired else ("ok", None)
        elif fault is not None:
            status, error = "failed", f"not_rendered: {fault}"
        elif attempts:
            decisive = attempts[-1]
            status, error = "failed" if decisive.final else "pending", decisive.error
        else:
            status, error = "pending", None
        self.counts.note(status)
        usd_spent, cost_source = _spent(attempts)
        prompt = completion = total = cached = reasoning = latency = first_token = None
        said = _NOTHING_SAID
        if answered is not None:
            said = _said(answered)
            prompt, completion, total = answered.prompt_tokens, answered.completion_tokens, answered.total_tokens
            cached, reasoning = answered.cached_tokens, answered.reasoning_tokens
            latency, first_token = seconds(answered.latency_us), seconds(answered.first_token_us)
        request_id = client_request_id = key = settled_at = None
        if decisive is not None:
            request_id, client_request_id = decisive.request_id, decisive.client_request_id
            key, settled_at = decisive.key, decisive.settled_at
        return ResultRow(
            said.text, said.finish_reason, said.finish_reason_raw, prompt, completion, total, cached, reasoning,
            usd_spent, cost_source, unknown, self._requested[slot.model], said.model, status, error, said.flags,
            said.reasoning, said.tool_calls, made, latency, request_id, client_request_id, key, self._run_id,
            settled_at, first_token, slot.sample, is_reused,
            pico if attempts and not unknown else None,
        )  # fmt: skip


_UNREPAIRED = "its answer does not fit, and it is to be asked again"


class _Said(NamedTuple):
    """What an answer says."""

    flags: Sequence[str] = ()
    text: str | None = None
    finish_reason: str | None = None
    finish_reason_raw: str | None = None
    model: str | None = None
    reasoning: str | None = None
    tool_calls: str | None = None


_NOTHING_SAID = _Said()


def _said(attempt: StandingAttempt) -> _Said:
    flags = attempt.flags.split(",") if attempt.flags else []
    if attempt.body is None:
        return _Said(flags)
    answer = read_kept(attempt.body, streamed=bool(attempt.streamed))
    if not isinstance(answer, Answer):
        # It could be read when it came: it was damaged since, or this version reads it no more.
        return _Said([*flags, "unreadable"])
    tool_calls = json.dumps(answer.tool_calls, ensure_ascii=False) if answer.tool_calls else None
    return _Said(
        flags, answer.text, answer.finish_reason, answer.finish_reason_raw, answer.model, answer.reasoning, tool_calls
    )


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
