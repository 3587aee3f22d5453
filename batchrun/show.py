"""Everything that is known of a run, or of one of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from batchrun.errors import JobError
from batchrun.job import Job
from batchrun.ledger_view import LedgerView, Run
from batchrun.lookup import Lookup, prompt_text
from batchrun.money import exact_json, from_pico, usd_text
from batchrun.records import utc
from batchrun.spend import RunSpend, read_ledger
from batchrun.spend_details import Failures, Seconds, failures, seconds


@dataclass(frozen=True)
class Invocation:
    """One call of batchrun that worked on a run."""

    started_at: datetime
    """UTC."""
    ended_at: datetime | None
    """None while it is at work, or if it died."""
    exit_code: int | None
    reason: str | None
    version: str
    host: str
    pid: int


@dataclass(frozen=True)
class ShownRun:
    """A run."""

    spend: RunSpend
    invocations: list[Invocation]
    failures: list[Failures]
    seconds: list[Seconds]
    settings: dict[str, Any]
    """The job, as its last invocation had it."""

    def lines(self) -> list[str]:
        """A text."""
        spend = self.spend
        lines = [
            f"run {spend.run_id} of {spend.job}: {spend.state}",
            f"asked: {spend.model} at {spend.provider}",
            f"rows: {spend.ok} ok ({spend.reused} reused), {spend.failed} failed, {spend.pending} pending "
            f"of {spend.rows}",
            f"attempts: {spend.attempts}",
            f"tokens: {spend.prompt_tokens} prompt ({spend.cached_tokens} cached), "
            f"{spend.completion_tokens} completion, {spend.total_tokens} total",
            f"spent: ${usd_text(spend.usd_spent)}: reported ${usd_text(spend.usd_reported)}, estimated "
            f"${usd_text(spend.usd_estimated)}; wasted ${usd_text(spend.usd_wasted or Decimal(0))}",
        ]
        if spend.in_flight:
            most = spend.usd_in_flight_at_most
            known = f"at most ${usd_text(most)}" if most is not None else "nobody knows how much"
            lines.append(f"in flight: {spend.in_flight} attempts, {known}")
        if spend.unknown_attempts:
            most = spend.usd_unknown_at_most
            known = f"at most ${usd_text(most)}" if most is not None else "nobody knows how much"
            lines.append(f"unknown: {spend.unknown_attempts} attempts, {known}")
        if spend.budget_usd is not None and spend.budget_used is not None:
            lines.append(
                f"budget: ${usd_text(spend.budget_used)} of ${usd_text(spend.budget_usd)} per {spend.budget_per}"
            )
        for one in self.invocations:
            end = f"ended {_time(one.ended_at)}" if one.ended_at is not None else "has not ended"
            why = f", exit {one.exit_code}" if one.exit_code is not None else ""
            why += f" ({one.reason})" if one.reason else ""
            lines.append(
                f"invocation: {_time(one.started_at)}, {end}{why}; process {one.pid} on {one.host}, {one.version}"
            )
        if self.failures:
            kinds = ", ".join(f"{failure.attempts} {failure.kind}" for failure in self.failures)
            lines.append(f"attempts that failed: {kinds}")
        for took in self.seconds:
            first = f"; first token {took.first_p50} / {took.first_p95} / {took.first_p99}" if took.first_p50 else ""
            lines.append(f"seconds of {took.model} (half, 95 %, 99 %): {took.p50} / {took.p95} / {took.p99}{first}")
        return lines

    def to_json(self) -> str:
        """One JSON object."""
        return exact_json(_plain({
            "run": asdict(self.spend),
            "invocations": [asdict(one) for one in self.invocations],
            "failures": [one._asdict() for one in self.failures],
            "seconds": [one._asdict() for one in self.seconds],
            "settings": self.settings,
        }))  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """One request for a row. Dollars are exact."""

    attempt_id: int
    run_id: str
    """Another run's, where the row took an answer that was there."""
    number: int
    repair: int
    """For the how many-th time it asked again for an answer that fits; 0: it did not."""
    sent_at: datetime
    waited_seconds: float | None
    """Since the attempt before it was over."""
    outcome: str | None
    """None while it is under way."""
    status: int | None
    error: str | None
    latency_seconds: float | None
    first_token_seconds: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    cached_tokens: int | None
    usd: Decimal | None
    """None: not known."""
    usd_at_most: Decimal | None
    """What was reserved for it."""
    cost_source: str | None
    request_id: str | None
    client_request_id: str
    key: str
    answer: str | None
    is_pruned: bool
    """The answer was dropped."""


@dataclass(frozen=True)
class ShownSlot:
    """A row with one of its models and samples."""

    row: int
    """Counted from 1."""
    model: str
    sample: int
    prompt: list[dict[str, Any]] | None
    """None if it cannot be told."""
    fault: str | None
    """Why the row gives no request."""
    attempts: list[Attempt]


@dataclass(frozen=True)
class ShownRow:
    """A row of a run."""

    run_id: str
    slots: list[ShownSlot]
    why_no_prompts: str | None

    def lines(self) -> list[str]:
        """A text."""
        lines = []
        for slot in self.slots:
            sample = f", sample {slot.sample}" if slot.sample else ""
            lines.append(f"row {slot.row} of run {self.run_id}: {slot.model}{sample}")
            if slot.prompt is not None:
                lines += [f"  {line}" for line in prompt_text(slot.prompt).splitlines()]
            elif self.why_no_prompts is not None:
                lines.append(f"  the prompt cannot be told: {self.why_no_prompts}")
            if slot.fault is not None:
                lines.append(f"  gives no prompt: {slot.fault}")
            if not slot.attempts:
                lines.append("  has not been asked")
            for attempt in slot.attempts:
                lines += _attempt_lines(attempt, self.run_id)
        return lines

    def to_json(self) -> str:
        """One JSON object."""
        return exact_json(_plain(asdict(self)))


def _attempt_lines(attempt: Attempt, run_id: str) -> list[str]:
    again = f" (repair {attempt.repair})" if attempt.repair else ""
    taken = f", of run {attempt.run_id}" if attempt.run_id != run_id else ""
    waited = f" after {attempt.waited_seconds:.1f} s" if attempt.waited_seconds is not None else ""
    status = f", HTTP {attempt.status}" if attempt.status is not None else ""
    lines = [
        f"  attempt {attempt.number}{again}{taken}: sent {_time(attempt.sent_at)}{waited}; "
        f"{attempt.outcome or 'in flight'}{status}"
    ]
    pairs = [
        ("took", None if attempt.latency_seconds is None else f"{attempt.latency_seconds} s"),
        ("first token", None if attempt.first_token_seconds is None else f"{attempt.first_token_seconds} s"),
        ("tokens", _tokens(attempt)),
        ("cost", _cost(attempt)),
        ("error", attempt.error),
        ("request", attempt.request_id),
        ("client request", attempt.client_request_id),
        ("key", attempt.key),
    ]
    lines += [f"    {name}: {value}" for name, value in pairs if value]
    if attempt.answer is not None:
        lines.append("    answer:")
        lines += [f"      {line}" for line in attempt.answer.splitlines()]
    if attempt.is_pruned:
        lines.append("    answer: was pruned")
    return lines


def show_run(job: Job, run_id: str | None) -> ShownRun:
    """A run of a job: the newest, or the one whose id begins so.

    Raises:
        JobError: there is none.
        StorageError: the ledger cannot be read.
    """
    with closing(_open(job)) as ledger:
        run = _run(job, ledger, run_id)
        spend = next(iter(read_ledger(ledger, number=run.run).runs), None)
        if spend is None:
            raise JobError(f"run {run.run_id} has not got as far as its input: there is nothing to show of it")
        invocations = [
            Invocation(utc(began), utc(ended) if ended is not None else None, *rest)
            for began, ended, *rest in ledger.rows(
                "SELECT started_at, ended_at, exit_code, reason, version, host, pid FROM invocation WHERE run = ? "
                "ORDER BY invocation",
                (run.run,),
            )
        ]
        known = ledger.last_snapshot(run)
        return ShownRun(
            spend,
            invocations,
            failures(ledger, [run.run_id]),
            seconds(ledger, [run.run_id]),
            known.job if known is not None else {},
        )


def show_row(job: Job, run_id: str | None, row: int) -> ShownRow:
    """A row of a run.

    Args:
        row: of the input, counted from 1.

    Raises:
        JobError: there is no such run, or it has no such row.
        StorageError: the ledger cannot be read.
    """
    with closing(_open(job)) as ledger:
        run = _run(job, ledger, run_id)
        placed = ledger.placed_input(run)
        rows = int(placed["rows"]) if placed is not None else 0
        if not 1 <= row <= rows:
            raise JobError(f"--row {row}: run {run.run_id} has the rows 1 to {rows}")
        lookup = Lookup(ledger, run)
        faults = ledger.row_faults(run, row - 1, row)
        attempts = _attempts(ledger, run, row - 1, lookup)
        asked = dict.fromkeys((*lookup.slots(row - 1), *attempts, *((one.model, one.sample) for one in faults)))
        by_name = {(slot.model, slot.sample): error for slot, error in faults.items()}
        slots = [
            ShownSlot(
                row, model, sample, lookup.prompt(row - 1, model), by_name.get((model, sample)),
                attempts.get((model, sample), []),
            )
            for model, sample in asked
        ]  # fmt: skip
        return ShownRow(run.run_id, slots, lookup.why_no_prompts)


def _open(job: Job) -> LedgerView:
    if not job.ledger_path.exists():
        raise JobError(f"there is nothing to show: no run of this job is in {job.ledger_path}")
    return LedgerView.read(job.ledger_path)


def _run(job: Job, ledger: LedgerView, run_id: str | None) -> Run:
    run = ledger.run_named(run_id) if run_id is not None else ledger.last_run()
    if run is None:
        runs = ", ".join(sorted(ledger.run_ids())[-5:]) or "none"
        what = f"--run {run_id}: there is no such run, or there are several" if run_id else "there is nothing to show"
        raise JobError(f"{what}; the newest in {job.ledger_path} are {runs}")
    return run


def _attempts(ledger: LedgerView, run: Run, row_index: int, lookup: Lookup) -> dict[tuple[str, int], list[Attempt]]:
    """By model and sample, oldest first; those that are under way too."""
    found: dict[tuple[str, int], list[Attempt]] = {}
    ended: dict[tuple[str, int], int] = {}
    for (
        attempt_id, run_id, model, sample, number, repair, sent_at, settled_at, outcome, status, error, latency,
        first_token, prompt, completion, total, cached, pico, reserved, source, request_id, client_request_id, key,
    ) in ledger.rows(
        "SELECT attempt_id, run_id, model, sample, number, repair, sent_at, settled_at, outcome, status, error, "
        "latency_us, first_token_us, prompt_tokens, completion_tokens, total_tokens, cached_tokens, usd_pico, "
        "reserved_pico, cost_source, request_id, client_request_id, coalesce(repair_key, key) FROM ("
        "SELECT attempt_id, run, model, sample, number, repair, sent_at, settled_at, outcome, status, error, "
        "latency_us, first_token_us, prompt_tokens, completion_tokens, total_tokens, cached_tokens, usd_pico, "
        f"reserved_pico, cost_source, request_id, client_request_id, repair_key, key FROM ({ledger.standing_sql(run)}) "
        "UNION ALL SELECT attempt_id, run, model, sample, number, repair, sent_at, settled_at, outcome, status, error, "
        "latency_us, first_token_us, prompt_tokens, completion_tokens, total_tokens, cached_tokens, usd_pico, "
        "reserved_pico, cost_source, request_id, client_request_id, repair_key, key FROM charged "
        "WHERE run = :run AND row_index = :start AND outcome IS NULL"
        ") JOIN run USING (run) ORDER BY attempt_id",
        {"run": run.run, "start": row_index, "stop": row_index + 1},
    ):  # fmt: skip
        slot = (model, sample)
        before = ended.get(slot)
        answer = lookup.answer(attempt_id) if outcome == "ok" else None
        found.setdefault(slot, []).append(
            Attempt(
                attempt_id, run_id, number, repair, utc(sent_at),
                max(0.0, (sent_at - before) / 1e6) if before is not None else None, outcome, status, error,
                latency / 1e6 if latency is not None else None, first_token / 1e6 if first_token is not None else None,
                prompt, completion, total, cached, from_pico(pico) if pico is not None else None,
                from_pico(reserved) if reserved is not None else None, source, request_id, client_request_id, key,
                answer.text if answer is not None else None, outcome == "ok" and lookup.is_pruned(attempt_id),
            )
        )  # fmt: skip
        if settled_at is not None:
            ended[slot] = settled_at
    return found


def _tokens(attempt: Attempt) -> str | None:
    if attempt.total_tokens is None:
        return None
    cached = f" ({attempt.cached_tokens} cached)" if attempt.cached_tokens else ""
    return f"{attempt.prompt_tokens}{cached} + {attempt.completion_tokens} = {attempt.total_tokens}"


def _cost(attempt: Attempt) -> str | None:
    if attempt.outcome is None:
        return None
    if attempt.usd is not None:
        return f"${usd_text(attempt.usd)} ({attempt.cost_source})"
    return "not known" + (f", at most ${usd_text(attempt.usd_at_most)}" if attempt.usd_at_most is not None else "")


def _time(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" if moment is not None else ""


def _plain(value: Any) -> Any:
    """With moments as text."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
