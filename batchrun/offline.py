"""What is done with a job without sending anything: `check` and `export`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any

from batchrun.delivery import summarise, write_output
from batchrun.errors import JobError, MissingHereError
from batchrun.job import Job
from batchrun.ledger import Ledger
from batchrun.plan import Plan, place
from batchrun.records import RowFault
from batchrun.summary import Summary
from batchrun.template import NotRenderedError

_MOST_FAULTS = 5


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
    warning: str | None
    """What a run would lack here."""


def check(job: Job, environ: Mapping[str, str], *, samples: int = 3) -> Preview:
    """Validate a job and read its whole input; nothing is sent and nothing is written.

    Raises:
        JobError: what a run would refuse.
    """
    warning = None
    try:
        plan = Plan.to_run(job, environ)
    except MissingHereError as exc:
        # Without its key, or the model on this machine, a job can still be checked.
        plan = Plan.to_read(job, "unchecked")
        warning = f"a run would stop here: {exc}"
    rows = fault_count = 0
    faults: list[RowFault] = []
    for request in plan.requests():
        rows += 1
        if isinstance(request, RowFault):
            fault_count += 1
            if len(faults) < _MOST_FAULTS:
                faults.append(request)
    shown = []
    for batch in plan.source.batches(plan.template.columns):
        for offset, row in enumerate(batch.rows.slice(0, samples).to_pylist()):
            with suppress(NotRenderedError):
                shown.append((batch.start + offset, plan.template.messages(row)))
        break
    return Preview(job, rows, faults, fault_count, shown, warning)


def export(job: Job, *, adopt: bool = False) -> Summary:
    """Write the output of the newest run again, from the ledger, for nothing. The caller holds the ledger's lock.

    What shapes the requests is taken from the run, so that a job file that has changed since finds its answers.

    Raises:
        BatchrunError: there is no run, or the output cannot be written.
    """
    began = time.monotonic()
    if not job.ledger_path.exists():
        raise JobError(f"there is nothing to export: no run of this job is in {job.ledger_path}")
    with closing(Ledger.open(job.ledger_path, job_name=job.name, job_path=job.path, adopt=adopt)) as ledger:
        run = ledger.last_run()
        known = ledger.last_snapshot(run) if run is not None else None
        if run is None or known is None:
            raise JobError(
                f"there is nothing to export: no run of this job has got as far as its input ({ledger.path})"
            )
        snapshot, identity, reason = known
        plan = Plan.to_read(job.with_shape_of(snapshot), identity)
        output = plan.output_path(run)
        summary = replace(summarise(plan, ledger, run, place(plan, ledger, run)), output=str(output), reason=reason)
        write_output(plan, ledger, run, output, summary)
    return replace(summary, seconds=time.monotonic() - began)
