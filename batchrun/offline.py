"""What is done with a job without sending a prompt: `check` and `export`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from batchrun import accounts
from batchrun.delivery import summarise, with_derived, write_output
from batchrun.errors import ExitCode, JobError, MissingHereError, StorageError
from batchrun.estimate import Estimate, Estimator, together
from batchrun.exports import check_export
from batchrun.job import Job
from batchrun.ledger import Ledger
from batchrun.ledger_view import LedgerView, Run, Snapshot
from batchrun.money import exact_json, usd_text
from batchrun.plan import Plan, place
from batchrun.prices import Pricing
from batchrun.providers import resolve
from batchrun.records import RowFault, now_us
from batchrun.sink import Destination, check_owned
from batchrun.spending import pricings_of, refuse_boundless
from batchrun.summary import Summary
from batchrun.template import NotRenderedError
from batchrun.written import manifest_of

_MOST_FAULTS = 5
_Changes = Iterator[tuple[int, Decimal, str]]


@dataclass(frozen=True)
class Preview:
    """What `check` shows."""

    job: Job
    rows: int
    faults: list[RowFault]
    """The first few rows that give no request."""
    fault_count: int
    samples: list[tuple[int, list[dict[str, Any]]]]
    """Row index and rendered messages of the first rows."""
    estimate: Estimate
    """What all rows take."""
    warnings: list[str]
    """What a run would lack here."""

    def lines(self) -> list[str]:
        """Prompts, faults, the number of rows and the estimate."""
        lines = []
        for row_index, messages in self.samples:
            for message in messages:
                content = message.get("content")
                text = content if isinstance(content, str) else repr(content)
                lines.append(f"row {row_index + 1}, {message.get('role')}: {_shortened(text.strip())}")
        lines += [f"row {fault.slot.row_index + 1} would fail: {fault.error}" for fault in self.faults]
        if self.fault_count > len(self.faults):
            lines.append(f"… and {self.fault_count - len(self.faults)} more rows would fail")
        failing = f", {self.fault_count} of which give no prompt and would fail" if self.fault_count else ""
        lines.append(f"{self.job.name}: {self.rows} rows{failing}; {self._asked()} at {self.job.provider.name}")
        lines += self.estimate.lines()
        if self.job.repair:
            lines.append(f"not in the estimate: up to {self.job.repair} repairs of each row whose answer does not fit")
        if self.job.reuse:
            lines.append("not in the estimate: answers that are there already, which reuse takes for nothing")
        return lines

    def _asked(self) -> str:
        models = f"model{'s' * (len(self.job.models) > 1)} {', '.join(self.job.models)}"
        return f"{models}, {self.job.samples} samples each" if self.job.samples > 1 else models

    def to_json(self) -> str:
        """One JSON object."""
        document = {
            "job": self.job.name,
            "provider": self.job.provider.name,
            "model": self.job.model,
            "rows": self.rows,
            "would_fail": self.fault_count,
            "estimate": self.estimate.document(),
            "warnings": self.warnings,
        }
        return exact_json(document)


def check(job: Job, environ: Mapping[str, str], *, samples: int = 3, is_offline: bool = False) -> Preview:
    """Validate a job, read its whole input and estimate what it takes; no prompt is sent and nothing is written.

    Args:
        is_offline: do not ask for the provider's price list either.

    Raises:
        JobError: what a run would refuse.
    """
    warnings = []
    try:
        plan = Plan.to_run(job, environ)
    except MissingHereError as exc:
        # Without its key, or the model on this machine, a job can still be checked.
        plan = Plan.to_read(job, "unchecked")
        warnings.append(f"a run would stop here: {exc}")
    with _history(job, warnings) as ledger:
        models = plan.slots.models
        pricings = pricings_of(job, plan.endpoint, models, ledger, is_offline=is_offline, say=warnings.append)
        parameters = json.dumps(job.snapshot()["parameters"])
        estimators = {
            model: Estimator(
                pricings[model], accounts.measured(ledger, model, parameters) if ledger is not None else []
            )
            for model in models
        }
    rows = fault_count = 0
    faults: list[RowFault] = []
    for request in plan.requests():
        rows = request.slot.row_index + 1
        if isinstance(request, RowFault):
            fault_count += 1
            if len(faults) < _MOST_FAULTS:
                faults.append(request)
        else:
            estimators[request.slot.model].take(request)
    if job.budget is not None:
        try:
            refuse_boundless(plan, pricings, now_us())
        except JobError as exc:
            warnings.append(f"a run would stop here: {exc}")
    shown = []
    for batch in plan.source.batches(plan.columns):
        for offset, row in enumerate(batch.rows.slice(0, samples).to_pylist()):
            with suppress(NotRenderedError):
                shown.append((batch.start + offset, plan.templates[0].messages(row)))
        break
    estimate = together([estimator.estimate(now_us()) for estimator in estimators.values()])
    return Preview(job, rows, faults, fault_count, shown, estimate, warnings)


@contextmanager
def _history(job: Job, warnings: list[str]) -> Iterator[LedgerView | None]:
    """The job's ledger, if there is one that can be read."""
    if not job.ledger_path.exists():
        yield None
        return
    try:
        ledger = LedgerView.read(job.ledger_path)
    except StorageError as exc:
        warnings.append(f"earlier answers are left out of the estimate: {exc}")
        yield None
        return
    with closing(ledger):
        yield ledger


def export(
    job: Job,
    environ: Mapping[str, str],
    *,
    adopt: bool = False,
    reprices: bool = False,
    is_offline: bool = False,
    to: Path | None = None,
    columns: Sequence[str] | None = None,
    say: Callable[[str], None],
) -> tuple[Summary, Repriced | None]:
    """Write the output of the newest run again, from the ledger, for nothing. The caller holds the ledger's lock.

    What shapes the requests is taken from the run, so that a job file that has changed since finds its answers.

    Args:
        reprices: derive the amounts that nobody reported anew, from the prices of now and each request's date.
        is_offline: take the provider's price list as it came last.
        to: write another file instead: .csv, .jsonl or .parquet.
        columns: of it; None for all.

    Raises:
        BatchrunError: there is no run, or the output cannot be written.
    """
    began = time.monotonic()
    if not job.ledger_path.exists():
        raise JobError(f"there is nothing to export: no run of this job is in {job.ledger_path}")
    with closing(Ledger.open(job.ledger_path, job_name=job.name, job_path=job.path, adopt=adopt)) as ledger:
        found = ledger.last_placed()
        if found is None:
            raise JobError(
                f"there is nothing to export: no run of this job has got as far as its input ({ledger.path})"
            )
        run, known = found
        ledger.refuse_pruned(run, "be exported any more")
        shaped = job.with_shape_of(known.job)
        repriced = _reprice(shaped, environ, ledger, run, is_offline, say) if reprices else None
        summary = rewrite(job, ledger, run, known, to, columns, adopts=adopt)
    return replace(summary, seconds=time.monotonic() - began), repriced


def rewrite(
    job: Job,
    ledger: Ledger,
    run: Run,
    known: Snapshot,
    to: Path | None = None,
    columns: Sequence[str] | None = None,
    *,
    adopts: bool = False,
) -> Summary:
    """Write the output of a run, or some columns of it to another file, from what the ledger holds of it.

    Args:
        adopts: that of another job may be replaced.
    """
    ledger.refuse_pruned(run, "be exported any more")
    plan = Plan.to_read(job.with_shape_of(known.job), known.endpoint)
    destination = plan.destination(run, adopts=adopts)
    output = destination.path
    if to is not None:
        if isinstance(output, Path) and to.absolute().resolve() == output.resolve():
            raise JobError(f"--to: {to} is the output of the job itself: name another file, or leave --to out")
        if to.absolute().parent == output:
            raise JobError(f"--to: {to} is in the folder of the job's own output: name another place")
        destination = Destination(plan.refuse_own(to.absolute(), "--to"))
    names = check_export(to, columns, plan.schema) if to is not None else plan.schema.names
    rows = place(plan, ledger, run)
    summary = replace(summarise(plan, ledger, run, rows), output=str(destination.path), reason=known.reason)
    if to is None:
        check_owned(destination)
    derivation = write_output(plan, ledger, run, destination, lambda: summary, names=names)
    if to is None:
        ledger.note_output(run)
    # Answers that do not fit were told of by the run.
    return replace(with_derived(summary, derivation), exit_code=ExitCode.OK)


def refresh(job: Job, ledger: Ledger) -> str:
    """Write the newest run's output again, if it is there and its input is as it was; tell what became of it."""
    found = ledger.last_placed()
    placed = ledger.placed_input(found[0]) if found is not None else None
    if found is None or placed is None:
        return "no output was written"
    run, known = found
    try:
        plan = Plan.to_read(job.with_shape_of(known.job), known.endpoint)
        output = plan.output_path(run)
        manifest = manifest_of(output)
        if manifest is None or manifest.get("run_id") != run.run_id:
            return f"{output} is not that of the newest run: `batchrun export` writes it"
        if not plan.is_placed_as(placed):
            return f"{output} was left as it is, as the input has changed since: `batchrun export` writes it anew"
        return f"output: {rewrite(job, ledger, run, known).output}"
    except (JobError, StorageError) as exc:
        # What was learnt is in the ledger.
        return f"the output was left as it is: {exc}; `batchrun export` writes it once that is mended"


@dataclass(frozen=True)
class Repriced:
    """What new prices have changed."""

    attempts: int
    before: Decimal
    after: Decimal
    sources: tuple[str, ...]

    def line(self) -> str:
        """A short text."""
        sources = ", ".join(self.sources) or "no"
        return (
            f"repriced {self.attempts} attempts ({sources} prices): ${usd_text(self.before)} before, "
            f"${usd_text(self.after)} now; reported amounts are as they were"
        )


def _reprice(
    job: Job, environ: Mapping[str, str], ledger: Ledger, run: Run, is_offline: bool, say: Callable[[str], None]
) -> Repriced:
    """Derive the amounts of a run anew, each at the price of its own model and date."""
    try:
        endpoint = resolve(**job.provider.model_dump(), environ=environ)
    except MissingHereError:
        endpoint = resolve(**job.provider.model_dump(), environ=None)
    attempts = 0
    before = after = Decimal(0)
    sources: dict[str, None] = {}
    unpriced: list[str] = []
    models = accounts.models(ledger, run)
    for model, pricing in pricings_of(job, endpoint, models, ledger, is_offline=is_offline, say=say).items():
        if pricing.source is None:
            if any(True for _ in accounts.derived(ledger, run, model)):
                unpriced.append(model)
            continue
        source = pricing.source
        sources[source] = None

        def changed(pricing: Pricing = pricing, source: str = source, model: str = model) -> _Changes:
            nonlocal before, after
            for attempt in accounts.derived(ledger, run, model):
                usd = pricing.usd(attempt.usage, attempt.sent_at)
                if usd is not None and usd != attempt.usd:
                    before, after = before + (attempt.usd or 0), after + usd
                    yield attempt.attempt_id, usd, source

        attempts += ledger.correct("reprice", changed(), {model: pricing.snapshot(now_us())})
    if unpriced:
        raise JobError(
            f"no price is known for {', '.join(map(repr, unpriced))} at {endpoint.name}: add prices: {{input_mtok: …, "
            "output_mtok: …} (dollars per million tokens)"
        )
    return Repriced(attempts, before, after, tuple(sources))


def _shortened(text: str, most: int = 500) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
