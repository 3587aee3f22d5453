"""Offline proof that a ledger and its output say the same, and that no promise was broken. Nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa

from batchrun.budget import Cap
from batchrun.delivery import expected_batches, results_of, summarise, with_derived
from batchrun.derive import Derivation
from batchrun.errors import JobError, StorageError
from batchrun.job import Job
from batchrun.ledger_view import (
    INTENT_COLUMNS,
    SEAL_MASK,
    SETTLEMENT_COLUMNS,
    LedgerView,
    Run,
    attempt_seal,
    seal,
)
from batchrun.money import COST_SOURCES, exact_json, from_pico, to_pico, usd_text
from batchrun.plan import Plan
from batchrun.records import Answer
from batchrun.remote import AnyPath
from batchrun.stored import Unpacker, UnpackError, digest
from batchrun.wire import read_answer
from batchrun.written import Written

_SHOWN = 20


@dataclass
class Verdict:
    """What was found."""

    wrong: list[str] = field(default_factory=list)
    """The first of what contradicts something else; empty if all is well."""
    notes: list[str] = field(default_factory=list)
    """What could not be compared, and why."""
    hidden: int = 0
    """What is wrong besides."""
    attempts: int = 0
    pruned: int = 0
    """Attempts whose answers were dropped."""
    rows: int = 0
    is_damaged: bool = False
    """The ledger itself is not as it was written."""

    def blame(self, what: str) -> None:
        """Something is wrong."""
        if len(self.wrong) < _SHOWN:
            self.wrong.append(what)
        else:
            self.hidden += 1

    def lines(self) -> list[str]:
        """A short text."""
        lines = [f"wrong: {what}" for what in self.wrong]
        if self.hidden:
            lines.append(f"… and {self.hidden} more")
        if self.is_damaged:
            lines.append("note: `batchrun salvage JOB` makes a ledger of what is as it was settled")
        lines += [f"note: {what}" for what in self.notes]
        if not self.wrong:
            pruned = f", {self.pruned} of them without their pruned answers," if self.pruned else ""
            lines.append(
                f"verified: {self.attempts} attempts{pruned} and {self.rows} rows agree, and no promise was broken"
            )
        return lines

    def to_json(self) -> str:
        """One JSON object."""
        wrong = [*self.wrong, *([f"{self.hidden} more"] if self.hidden else [])]
        return exact_json({"wrong": wrong, "notes": self.notes, "attempts": self.attempts, "rows": self.rows})


def verify(job: Job) -> Verdict:
    """Compare all that the ledger says with itself and with the output of the newest run.

    The caller holds the ledger's lock.

    Raises:
        JobError: there is no ledger.
        StorageError: it cannot be read at all.
    """
    if not job.ledger_path.exists():
        raise JobError(f"there is nothing to verify: no run of this job is in {job.ledger_path}")
    verdict = Verdict()
    with closing(LedgerView.read(job.ledger_path)) as ledger:
        damage = [text for (text,) in ledger.rows("PRAGMA integrity_check") if text != "ok"]
        for text in damage:
            verdict.blame(f"the file is damaged: {text}")
        if damage:
            verdict.is_damaged = True
            return verdict
        _check_references(ledger, verdict)
        _check_attempts(ledger, verdict)
        verdict.is_damaged = bool(verdict.wrong)
        _check_runs(ledger, verdict)
        _check_amendments(ledger, verdict)
        _check_caps(ledger, verdict)
        try:
            _check_output(job, ledger, verdict)
        except StorageError as exc:
            verdict.blame(str(exc))
    return verdict


# --- the ledger against itself ------------------------------------------------------------------------------


def _check_references(ledger: LedgerView, verdict: Verdict) -> None:
    for table, row, parent, _ in ledger.rows("PRAGMA foreign_key_check"):
        verdict.blame(f"row {row} of the table {table} belongs to no {parent}")


def _check_attempts(ledger: LedgerView, verdict: Verdict) -> None:
    """Each attempt by its seal, and each run by its own count."""
    counted: dict[int, list[int]] = {}
    columns = ", ".join(f"attempt.{name}" for name in (*INTENT_COLUMNS, *SETTLEMENT_COLUMNS))
    unpack = Unpacker().unpack
    for *values, sealed, size, packed, pruned in ledger.each(
        f"SELECT {columns}, seal, size, body, digest FROM attempt LEFT JOIN answer USING (attempt_id) "
        "ORDER BY attempt_id"
    ):
        verdict.attempts += 1
        attempt = dict(zip((*INTENT_COLUMNS, *SETTLEMENT_COLUMNS), values, strict=True))
        counts = counted.setdefault(attempt["run"], [0, 0, 0])
        counts[0] += 1
        if attempt["outcome"] is None:
            continue
        counts[1] += 1
        counts[2] = (counts[2] + (sealed or 0)) & SEAL_MASK
        if pruned is not None:
            verdict.pruned += 1
            if sealed is not None and sealed != attempt_seal(
                values[: len(INTENT_COLUMNS)], values[len(INTENT_COLUMNS) :], pruned
            ):
                verdict.blame(f"{_named(attempt)} was altered after it was settled")
            continue
        try:
            body = unpack(packed) if packed is not None else b""
        except UnpackError as exc:
            verdict.blame(f"{_named(attempt)}: its answer cannot be unpacked: {exc}")
            continue
        is_ok = attempt["outcome"] == "ok"
        answer = read_answer(body, {}, streamed=bool(attempt["streamed"])) if is_ok else None
        if is_ok and not isinstance(answer, Answer):
            verdict.blame(f"{_named(attempt)} is ok, and its answer cannot be read")
        if sealed is None:
            if isinstance(answer, Answer):
                _check_unsealed(attempt, answer, verdict)
        elif len(body) != (size or 0) or sealed != attempt_seal(
            values[: len(INTENT_COLUMNS)], values[len(INTENT_COLUMNS) :], digest(body)
        ):
            verdict.blame(f"{_named(attempt)} was altered after it was settled")
        for what in _contradictions(attempt):
            verdict.blame(f"{_named(attempt)} {what}")
    for run, run_id, attempts, settled, seals in ledger.rows("SELECT run, run_id, attempts, settled, seals FROM run"):
        found = counted.get(run, [0, 0, 0])
        if found[0] != attempts or found[1] != settled:
            verdict.blame(
                f"run {run_id} made {attempts} attempts and settled {settled}; the ledger holds {found[0]} and "
                f"{found[1]}: some are missing, or were put in"
            )
        elif found[2] != seals:
            verdict.blame(f"the attempts of run {run_id} are not those that it made")


def _check_unsealed(attempt: dict[str, Any], answer: Answer, verdict: Verdict) -> None:
    """An attempt of a ledger from before there were seals, by its answer."""
    counts = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens")
    if any(getattr(answer.usage, name) != attempt[name] for name in counts):
        verdict.blame(f"{_named(attempt)} has other counts than its answer")
    elif (
        answer.usd is not None
        and answer.usd_source == attempt["cost_source"]
        and to_pico(answer.usd) != attempt["usd_pico"]
    ):
        verdict.blame(f"{_named(attempt)} has another cost than its answer")


def _contradictions(attempt: dict[str, Any]) -> Iterator[str]:
    usd, source = attempt["usd_pico"], attempt["cost_source"]
    if (usd is None) != (source is None) or (source is not None and source not in COST_SOURCES):
        yield f"has an amount of {usd} and the cost source {source!r}"
    if usd is not None and usd < 0:
        yield "has a cost below zero"


def _named(attempt: dict[str, Any]) -> str:
    return f"attempt {attempt['attempt_id']} (row {attempt['row_index'] + 1})"


def _check_runs(ledger: LedgerView, verdict: Verdict) -> None:
    """No run is missing, no answer was paid for twice within one, and a finished run has nothing left."""
    owners = ledger.rows("SELECT runs, amendments FROM owner")
    if len(owners) != 1:
        verdict.blame("the ledger does not say whose it is")
        verdict.is_damaged = True
    ((runs, amendments),) = owners or [(0, 0)]
    ((found_runs, found_amendments),) = ledger.rows(
        "SELECT (SELECT count(*) FROM run), (SELECT count(*) FROM amendment)"
    )
    if runs != found_runs:
        verdict.blame(f"the ledger began {runs} runs and holds {found_runs}")
    if amendments != found_amendments:
        verdict.blame(f"costs were corrected {amendments} times, and {found_amendments} of them are here")
    for run_id, row_index, number in ledger.rows(
        "SELECT run_id, row_index, count(*) FROM attempt JOIN run USING (run) WHERE outcome = 'ok' "
        "GROUP BY run, row_index, model, sample, key, repair HAVING count(*) > 1 LIMIT 100"
    ):
        verdict.blame(f"row {row_index + 1} of run {run_id} was answered {number} times (promise 2)")
    for invocation, run, job, endpoint, sealed in ledger.rows(
        "SELECT invocation, run, job, endpoint, seal FROM invocation WHERE seal IS NOT NULL"
    ):
        if sealed != seal((run, job, endpoint)):
            verdict.blame(f"the job of invocation {invocation} was altered")
    for number, run_id, started_at, state in ledger.rows("SELECT run, run_id, started_at, state FROM run"):
        run = Run(number, run_id, started_at, state, is_new=False)
        placed = ledger.placed_input(run)
        slots = placed["rows"] * placed.get("slots_per_row", 1) if placed is not None else 0
        if state == "finished" and placed is not None and (left := slots - sum(ledger.counts(run))):
            verdict.blame(
                f"run {run_id} is finished, and {left} of its rows are neither answered nor failed (promise 1)"
            )


def _check_amendments(ledger: LedgerView, verdict: Verdict) -> None:
    """What was learnt after the attempts were settled."""
    sums: dict[int, list[int]] = {}
    for attempt_id, amendment, pico, source, outcome in ledger.each(
        "SELECT attempt_id, amendment, correction.usd_pico, correction.cost_source, outcome FROM correction "
        "LEFT JOIN attempt USING (attempt_id)"
    ):
        found = sums.setdefault(amendment, [0, 0])
        found[0] += 1
        found[1] = (found[1] + seal((attempt_id, amendment, pico, source))) & SEAL_MASK
        if pico < 0 or source not in COST_SOURCES or outcome is None:
            verdict.blame(f"the correction of attempt {attempt_id} makes no sense")
    for amendment, corrections, seals in ledger.rows("SELECT amendment, corrections, seals FROM amendment"):
        if sums.pop(amendment, [0, 0]) != [corrections, seals]:
            verdict.blame(f"the corrections of amendment {amendment} are not those that it made")
    for amendment in sums:
        verdict.blame(f"there are corrections of an amendment {amendment} that never was")


def _check_caps(ledger: LedgerView, verdict: Verdict) -> None:
    """Replay what was reserved, settled and corrected: at no request was more taken than its cap allowed.

    The order is that of the attempts' numbers, which no clock can turn. An attempt that cost more than was reserved
    is excused, and what came with it: the cap gives way by what it was too dear.
    """
    caps = {
        invocation: Cap(to_pico(Decimal(str(budget["usd"]))), budget.get("per", "run"))
        for invocation, text in ledger.rows("SELECT invocation, job FROM invocation")
        if (budget := ledger.document(text).get("budget"))
    }
    if not caps:
        return
    taken: dict[tuple[str, int], int] = {}
    excused: dict[tuple[str, int], int] = {}
    for _, kind, attempt_id, run, invocation, sent_at, row_index, pico, excess in ledger.each(
        """
        SELECT attempt_id AS at, 0 AS kind, attempt_id, run, invocation, sent_at, row_index,
            coalesce(reserved_pico, 0) AS pico, 0 AS excess
        FROM attempt
        UNION ALL SELECT coalesce(settled_after, attempt_id), 1, attempt_id, run, invocation, sent_at, row_index,
            coalesce(held_pico, usd_pico, reserved_pico, 0) - coalesce(reserved_pico, 0),
            max(0, coalesce(usd_pico, 0) - coalesce(reserved_pico, usd_pico, 0))
        FROM attempt WHERE outcome IS NOT NULL
        UNION ALL SELECT after_attempt, 1 + amendment, attempt_id, run, invocation, sent_at, row_index,
            CASE origin WHEN 'reconcile' THEN correction.usd_pico ELSE max(correction.usd_pico, coalesce(
                held_pico, attempt.usd_pico, reserved_pico, 0)) END - coalesce((
                    SELECT CASE earlier_amendment.origin WHEN 'reconcile' THEN earlier.usd_pico ELSE max(
                        earlier.usd_pico, coalesce(held_pico, attempt.usd_pico, reserved_pico, 0)) END
                    FROM correction AS earlier
                    JOIN amendment AS earlier_amendment ON earlier_amendment.amendment = earlier.amendment
                    WHERE earlier.attempt_id = attempt.attempt_id AND earlier.amendment < correction.amendment
                    ORDER BY earlier.amendment DESC LIMIT 1
                ), held_pico, attempt.usd_pico, reserved_pico, 0),
            max(0, correction.usd_pico - coalesce(reserved_pico, correction.usd_pico))
        FROM correction JOIN attempt USING (attempt_id) JOIN amendment USING (amendment)
        ORDER BY at, kind, attempt_id
        """
    ):
        for per in ("run", "day", "month"):
            place = (per, run if per == "run" else Cap(0, per).began(sent_at))
            taken[place] = taken.get(place, 0) + pico
            excused[place] = excused.get(place, 0) + excess
        cap = caps.get(invocation)
        if kind or cap is None:
            continue
        place = (cap.per, run if cap.per == "run" else cap.began(sent_at))
        if taken[place] > cap.pico + excused[place]:
            verdict.blame(
                f"the cap of ${usd_text(from_pico(cap.pico))} was exceeded when row {row_index + 1} was sent (attempt "
                f"{attempt_id}): ${usd_text(from_pico(taken[place]))} were taken (promise 4)"
            )
    if any(excused.values()):
        verdict.notes.append("some attempts cost more than was reserved for them: what that exceeded breaks no promise")


# --- the output ---------------------------------------------------------------------------------------------


def _check_output(job: Job, ledger: LedgerView, verdict: Verdict) -> None:
    found = ledger.last_placed()
    if found is None:
        return
    run, known = found
    try:
        plan = Plan.to_read(job.with_shape_of(known.job), known.endpoint)
        output = plan.output_path(run)
    except JobError as exc:
        verdict.notes.append(f"the output was not compared: {exc}")
        return
    written = Written.at(output)
    ((is_written,),) = ledger.rows("SELECT is_written FROM run WHERE run = ?", (run.run,))
    if written is None:
        if output.exists():
            verdict.blame(f"{output} is no output of batchrun, or its metadata is damaged")
        else:
            verdict.notes.append(f"there is no output {output}: `batchrun export` writes it")
        return
    manifest = written.manifest
    if not is_written:
        verdict.notes.append(f"{output} is older than the ledger: `batchrun export` writes it anew")
        return
    if manifest.get("run_id") != run.run_id:
        verdict.blame(f"{output} is of run {manifest.get('run_id')}, and the newest is {run.run_id}")
        return
    now = plan.job.output_settings()
    then = manifest.get("settings") or known.job
    if changed := [name for name, value in now.items() if exact_json(value) != exact_json(then.get(name))]:
        verdict.notes.append(
            f"the job file has changed since ({', '.join(changed)}): the output was not compared; `batchrun export` "
            "writes it as the job says now"
        )
        return
    placed = ledger.placed_input(run)
    ((pruned_at,),) = ledger.rows("SELECT pruned_at FROM run WHERE run = ?", (run.run,))
    if pruned_at is not None and placed is not None:
        verdict.notes.append("the answers of the newest run were pruned: the rows of its output were not compared")
        known_summary = summarise(plan, ledger, run, int(placed["rows"])).manifest()
        _check_manifest(_without_derived(known_summary), manifest, output, verdict)
        return
    if placed is None or not plan.is_placed_as(placed):
        verdict.notes.append("the input has changed since: the rows of the output were not compared")
        _check_manifest(
            _without_derived(summarise(plan, ledger, run, int(manifest.get("input_rows", 0))).manifest()),
            manifest,
            output,
            verdict,
        )
        return
    for path in written.unnamed:
        verdict.blame(f"{output.name} holds {path.name}, which its manifest does not name: it is read with the others")
    derivation = plan.derivation()
    _check_rows(plan, ledger, run, derivation, written, verdict)
    summary = with_derived(summarise(plan, ledger, run, int(placed["rows"])), derivation)
    _check_manifest(summary.manifest(), manifest, output, verdict)


def _check_manifest(ours: dict[str, Any], manifest: dict[str, Any], output: AnyPath, verdict: Verdict) -> None:
    """What the file says of its run against what the ledger does; how it ended is for the file alone."""
    said = json.loads(exact_json(manifest), parse_float=Decimal)
    known = json.loads(exact_json(ours), parse_float=Decimal)
    for name, value in known.items():
        if name not in ("batchrun", "reason", "over_cap") and said.get(name) != value:
            verdict.blame(f"{output.name}: its manifest says {name} {said.get(name)!r}, the ledger {value!r}")


def _without_derived(manifest: dict[str, Any]) -> dict[str, Any]:
    """Without what is known only once all rows were looked at."""
    return {name: value for name, value in manifest.items() if name not in ("labels", "parse_errors", "evaluation")}


def _check_rows(
    plan: Plan, ledger: LedgerView, run: Run, derivation: Derivation, written: Written, verdict: Verdict
) -> None:
    """Every value of the file against what input and ledger give now."""
    results, output = results_of(plan, run), written.path
    try:
        if not written.schema.equals(plan.schema):
            verdict.blame(f"{output.name} has other columns than the job gives")
            return
        rows_of = _aligned(written)
        for expected in expected_batches(plan, ledger, run, results, derivation):
            verdict.rows += expected.num_rows
            actual = rows_of(expected.num_rows)
            if actual.num_rows < expected.num_rows:
                verdict.blame(f"{output.name} ends after {verdict.rows - expected.num_rows + actual.num_rows} rows")
                return
            _compare(expected, actual, verdict.rows - expected.num_rows, output, verdict)
        if rows_of(1).num_rows:
            verdict.blame(f"{output.name} has more rows than the input ({verdict.rows})")
    except (OSError, pa.ArrowException) as exc:
        verdict.blame(f"{output.name} cannot be read: {exc}")


def _aligned(written: Written) -> Any:
    """A function that gives the next so many rows of an output."""
    batches = written.batches(8192)
    held: list[pa.RecordBatch] = []

    def take(rows: int) -> pa.Table:
        while sum(batch.num_rows for batch in held) < rows and (batch := next(batches, None)) is not None:
            held.append(batch)
        table = pa.Table.from_batches(held, schema=written.schema)
        rest = table.slice(rows)
        held[:] = rest.to_batches()
        return table.slice(0, rows)

    return take


def _compare(expected: pa.RecordBatch, actual: pa.Table, start: int, output: AnyPath, verdict: Verdict) -> None:
    ours = pa.Table.from_batches([expected])
    if actual.equals(ours):
        return
    for name in ours.schema.names:
        if actual[name].equals(ours[name]):
            continue
        for row, (theirs, right) in enumerate(zip(actual[name], ours[name], strict=True)):
            if not theirs.equals(right) and str(theirs) != str(right):  # a NaN equals itself here
                verdict.blame(
                    f"{output.name}, row {start + row + 1}: {name} is {_short(theirs)}, and should be {_short(right)}"
                )


def _short(value: pa.Scalar) -> str:
    text = repr(value.as_py())
    return text if len(text) <= 60 else f"{text[:57]}…"
