"""Offline proof that a ledger and its output say the same, and that no promise was broken. Nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from batchrun.budget import Cap
from batchrun.delivery import expected_batches, results_of, summarise
from batchrun.errors import JobError, StorageError
from batchrun.job import Job
from batchrun.ledger_view import INTENT_COLUMNS, SEAL_MASK, SETTLEMENT_COLUMNS, LedgerView, Run, digest, seal
from batchrun.money import COST_SOURCES, from_pico, to_pico, usd_text
from batchrun.plan import Plan
from batchrun.records import Answer
from batchrun.sink import manifest_of
from batchrun.summary import exact_json
from batchrun.wire import read_answer

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
    rows: int = 0

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
        lines += [f"note: {what}" for what in self.notes]
        if not self.wrong:
            lines.append(f"verified: {self.attempts} attempts and {self.rows} rows agree, and no promise was broken")
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
            return verdict
        _check_references(ledger, verdict)
        _check_attempts(ledger, verdict)
        _check_states(ledger, verdict)
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
    decompress = zstandard.ZstdDecompressor().decompress
    for *values, sealed, size, packed in ledger.each(
        f"SELECT {columns}, seal, size, body FROM attempt LEFT JOIN answer USING (attempt_id) ORDER BY attempt_id"
    ):
        verdict.attempts += 1
        attempt = dict(zip((*INTENT_COLUMNS, *SETTLEMENT_COLUMNS), values, strict=True))
        counts = counted.setdefault(attempt["run"], [0, 0, 0])
        counts[0] += 1
        if attempt["outcome"] is None:
            continue
        counts[1] += 1
        counts[2] = (counts[2] + (sealed or 0)) & SEAL_MASK
        try:
            body = decompress(packed) if packed is not None else b""
        except zstandard.ZstdError as exc:
            verdict.blame(f"{_named(attempt)}: its answer cannot be unpacked: {exc}")
            continue
        if sealed is None:
            _check_unsealed(attempt, body, verdict)
        elif sealed != seal((*values, digest(body))) or len(body) != (size or 0):
            verdict.blame(f"{_named(attempt)} was altered after it was settled")
        for what in _contradictions(attempt, body):
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


def _check_unsealed(attempt: dict[str, Any], body: bytes, verdict: Verdict) -> None:
    """An attempt of a ledger from before there were seals, by its answer."""
    if attempt["outcome"] != "ok":
        return
    answer = read_answer(body, {}, streamed=bool(attempt["streamed"]))
    counts = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens")
    if not isinstance(answer, Answer) or any(getattr(answer.usage, name) != attempt[name] for name in counts):
        verdict.blame(f"{_named(attempt)} has other counts than its answer")
    elif answer.usd is not None and to_pico(answer.usd) != attempt["usd_pico"]:
        verdict.blame(f"{_named(attempt)} has another cost than its answer")


def _contradictions(attempt: dict[str, Any], body: bytes) -> Iterator[str]:
    usd, source = attempt["usd_pico"], attempt["cost_source"]
    if attempt["outcome"] == "ok" and not body:
        yield "is ok and has no answer"
    if (usd is None) != (source is None) or (source is not None and source not in COST_SOURCES):
        yield f"has an amount of {usd} and the cost source {source!r}"
    if usd is not None and usd < 0:
        yield "has a cost below zero"


def _named(attempt: dict[str, Any]) -> str:
    return f"attempt {attempt['attempt_id']} (row {attempt['row_index'] + 1})"


def _check_states(ledger: LedgerView, verdict: Verdict) -> None:
    """No answer was paid for twice within a run, and a finished run has nothing left."""
    for run_id, row_index, number in ledger.rows(
        "SELECT run_id, row_index, count(*) FROM attempt JOIN run USING (run) WHERE outcome = 'ok' "
        "GROUP BY run, row_index, model, sample, key HAVING count(*) > 1 LIMIT 100"
    ):
        verdict.blame(f"row {row_index + 1} of run {run_id} was answered {number} times (promise 2)")
    for attempt_id in ledger.rows(
        "SELECT attempt_id FROM correction JOIN attempt USING (attempt_id) "
        "WHERE correction.usd_pico < 0 OR correction.cost_source NOT IN "
        f"({', '.join(repr(source) for source in COST_SOURCES)}) OR outcome IS NULL"
    ):
        verdict.blame(f"the correction of attempt {attempt_id[0]} makes no sense")


def _check_caps(ledger: LedgerView, verdict: Verdict) -> None:
    """Replay what was reserved, settled and corrected: at no request was more taken than its cap allowed."""
    caps = {
        invocation: Cap(to_pico(Decimal(str(budget["usd"]))), budget.get("per", "run"))
        for invocation, text in ledger.rows("SELECT invocation, job FROM invocation")
        if (budget := json.loads(text).get("budget"))
    }
    if not caps:
        return
    taken: dict[tuple[str, int], int] = {}
    overcharged = dict.fromkeys(
        run for (run,) in ledger.rows("SELECT DISTINCT run FROM charged WHERE usd_pico > reserved_pico")
    )
    for _, kind, run, invocation, sent_at, row_index, delta, _ in ledger.each(
        """
        SELECT sent_at AS at, 2 AS kind, run, invocation, sent_at, row_index, coalesce(reserved_pico, 0) AS delta,
            attempt_id
        FROM attempt
        UNION ALL SELECT settled_at, 0, run, invocation, sent_at, row_index, usd_pico - coalesce(reserved_pico, 0),
            attempt_id
        FROM attempt WHERE usd_pico IS NOT NULL
        UNION ALL SELECT corrected_at, 1, run, invocation, sent_at, row_index,
            correction.usd_pico - coalesce(attempt.usd_pico, reserved_pico, 0), attempt_id
        FROM correction JOIN attempt USING (attempt_id)
        ORDER BY at, kind, attempt_id
        """
    ):
        for per in ("run", "day", "month"):
            place = (per, run if per == "run" else Cap(0, per).began(sent_at))
            taken[place] = taken.get(place, 0) + delta
        cap = caps.get(invocation)
        if kind != 2 or cap is None or run in overcharged:
            continue
        place = (cap.per, run if cap.per == "run" else cap.began(sent_at))
        if taken[place] > cap.pico:
            verdict.blame(
                f"the cap of ${usd_text(from_pico(cap.pico))} was exceeded when row {row_index + 1} was sent: "
                f"${usd_text(from_pico(taken[place]))} were taken (promise 4)"
            )
    if overcharged:
        verdict.notes.append(
            "the provider charged more than was to be expected: what that exceeded is no broken promise"
        )


# --- the output ---------------------------------------------------------------------------------------------


def _check_output(job: Job, ledger: LedgerView, verdict: Verdict) -> None:
    run = ledger.last_run()
    known = ledger.last_snapshot(run) if run is not None else None
    if run is None or known is None:
        return
    try:
        plan = Plan.to_read(job.with_shape_of(known.job), known.endpoint)
        output = plan.output_path(run)
    except JobError as exc:
        verdict.notes.append(f"the output was not compared: {exc}")
        return
    manifest = manifest_of(output)
    (attempts,) = ledger.rows("SELECT count(outcome) FROM attempt WHERE run = ?", (run.run,))[0]
    if manifest is None:
        if output.exists():
            verdict.blame(f"{output} is no output of batchrun, or its metadata is damaged")
        else:
            verdict.notes.append(f"there is no output {output}: `batchrun export` writes it")
        return
    is_older = manifest.get("run_id") != run.run_id or manifest.get("attempts", 0) < attempts
    if is_older and run.state == "open":
        verdict.notes.append(f"{output} is older than the ledger: `batchrun export` writes it anew")
        return
    if manifest.get("run_id") != run.run_id:
        verdict.blame(f"{output} is of run {manifest.get('run_id')}, and the newest is {run.run_id}")
        return
    placed = ledger.placed_input(run)
    if placed is None or plan.source.fingerprint() != placed["files"]:
        verdict.notes.append("the input has changed since: the rows of the output were not compared")
        _check_manifest(
            summarise(plan, ledger, run, int(manifest.get("rows", 0))).manifest(), manifest, output, verdict
        )
        return
    summary = summarise(plan, ledger, run, int(placed["rows"]))
    _check_manifest(summary.manifest(), manifest, output, verdict)
    _check_rows(plan, ledger, run, output, verdict)


def _check_manifest(ours: dict[str, Any], manifest: dict[str, Any], output: Path, verdict: Verdict) -> None:
    """What the file says of its run against what the ledger does; how it ended is for the file alone."""
    said = json.loads(exact_json(manifest), parse_float=Decimal)
    known = json.loads(exact_json(ours), parse_float=Decimal)
    for name, value in known.items():
        if name not in ("batchrun", "reason", "over_cap") and said.get(name) != value:
            verdict.blame(f"{output.name}: its manifest says {name} {said.get(name)!r}, the ledger {value!r}")


def _check_rows(plan: Plan, ledger: LedgerView, run: Run, output: Path, verdict: Verdict) -> None:
    """Every value of the file against what input and ledger give now."""
    results = results_of(plan, run)
    try:
        with pq.ParquetFile(output) as file:
            if not file.schema_arrow.equals(plan.schema):
                verdict.blame(f"{output.name} has other columns than the job gives")
                return
            written = _aligned(file)
            for expected in expected_batches(plan, ledger, run, results):
                verdict.rows += expected.num_rows
                actual = written(expected.num_rows)
                if actual.num_rows < expected.num_rows:
                    verdict.blame(f"{output.name} ends after {verdict.rows - expected.num_rows + actual.num_rows} rows")
                    return
                _compare(expected, actual, verdict.rows - expected.num_rows, output, verdict)
            if written(1).num_rows:
                verdict.blame(f"{output.name} has more rows than the input ({verdict.rows})")
    except (OSError, pa.ArrowException) as exc:
        verdict.blame(f"{output.name} cannot be read: {exc}")


def _aligned(file: pq.ParquetFile) -> Any:
    """A function that gives the next so many rows of a file."""
    batches = file.iter_batches(batch_size=8192)
    held: list[pa.RecordBatch] = []

    def take(rows: int) -> pa.Table:
        while sum(batch.num_rows for batch in held) < rows and (batch := next(batches, None)) is not None:
            held.append(batch)
        table = pa.Table.from_batches(held, schema=file.schema_arrow)
        rest = table.slice(rows)
        held[:] = rest.to_batches()
        return table.slice(0, rows)

    return take


def _compare(expected: pa.RecordBatch, actual: pa.Table, start: int, output: Path, verdict: Verdict) -> None:
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
