"""One call of `batchrun report`: reads what is asked for, and gives it the form that is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from batchrun.errors import JobError, StorageError
from batchrun.folders import appearing
from batchrun.ledger_view import LedgerView, Run
from batchrun.lookup import Lookup, prompt_text
from batchrun.moments import moment_of
from batchrun.report import Report, load, records
from batchrun.report_formats import Views, csv_text, document, lines, markdown, parquet_bytes
from batchrun.report_groups import grouped
from batchrun.report_places import begins_as_ledger
from batchrun.spend_details import (
    CostlyRow,
    Costs,
    Details,
    Failures,
    RowSpend,
    Seconds,
    costliest,
    costs,
    failures,
    seconds,
)
from batchrun.written import manifest_of

_USUAL_TOP = 20


@dataclass(frozen=True)
class Made:
    """A report, ready to be written."""

    data: bytes
    notes: list[str]
    """What could not be read."""


def make(
    paths: Sequence[Path],
    *,
    by: str | None,
    since: str | None,
    runs: Sequence[str],
    top: int | None,
    form: str,
    width: int | None,
) -> Made:
    """A report of what stands in some places.

    Args:
        by: what its sums are by; None for the runs.
        since: as `moments.moment_of` reads it.
        runs: ids of runs, or how they begin; none for all.
        top: so many of the costliest rows too.
        form: table, json, csv, parquet or markdown.
        width: of the terminal; None where nothing is to be left out for it.

    Raises:
        JobError: a path or an option is wrong.
        StorageError: a file cannot be read.
    """
    report = _loaded(paths, since, runs)
    views = Views(
        report,
        by,
        grouped(report, by) if by is not None else None,
        _frame(_costliest(report, top)) if top is not None else None,
    )
    match form:
        case "json":
            text = document(views)
        case "csv":
            text = csv_text(views).removesuffix("\n")
        case "markdown":
            text = markdown(views)
        case "parquet":
            return Made(parquet_bytes(views), report.notes)
        case _:
            text = "\n".join(lines(views, width))
    return Made(text.encode("utf-8", "replace"), report.notes)


def _loaded(paths: Sequence[Path], since: str | None, runs: Sequence[str]) -> Report:
    began = moment_of(since, datetime.now(UTC), "--since") if since is not None else None
    report = load(*paths, since=began, runs=runs)
    if runs and report.runs.empty:
        raise JobError(f"--run {', '.join(runs)}: there is no such run")
    return report


def _costliest(report: Report, most: int) -> list[tuple[str, RowSpend]]:
    """The rows that cost most, with their jobs."""
    found = [(jobs[row.run_id], row) for ledger, jobs in _ledgers(report) for row in costliest(ledger, jobs, most)]
    return sorted(found, key=lambda one: -one[1].usd_spent)[:most]


def make_page(paths: Sequence[Path], *, since: str | None, runs: Sequence[str], top: int | None, content: bool) -> Made:
    """A page of what stands in some places.

    Args:
        top: so many of the costliest rows; None for the usual number.
        content: with their prompts and answers.

    Raises:
        JobError: a path or an option is wrong.
        MissingHereError: the extra `report` is not installed.
        StorageError: a file cannot be read.
    """
    from batchrun.report_page import MOST_ROWS, page, require

    require()
    report = _loaded(paths, since, runs)
    details = details_of(report, top if top is not None else _USUAL_TOP, texts=MOST_ROWS if content else 0)
    return Made(page(report, details, made_at=datetime.now(UTC)).encode("utf-8", "replace"), report.notes)


def write(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all; a link is followed.

    Raises:
        JobError: what stands there is a ledger, an output or no file.
        StorageError: it cannot be written.
    """
    real = Path(os.path.realpath(path))
    if not path.name or real.is_dir():
        raise JobError(f"{str(path)!r} is a folder: name a file")
    if real.exists() and not real.is_file():
        raise JobError(f"{path} is no regular file: name another")
    try:
        if real.exists() and (begins_as_ledger(real) or manifest_of(real) is not None):
            raise JobError(f"{path} is a ledger or an output of a run: name another file")
        with appearing(real) as fp:
            fp.write(data)
    except OSError as exc:
        raise StorageError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def details_of(report: Report, most: int, *, texts: int) -> Details:
    """What a page shows besides.

    Args:
        most: rows to be shown.
        texts: so many of them with their prompts and answers.
    """
    failed: list[Failures] = []
    took: list[Seconds] = []
    cost: list[Costs] = []
    for ledger, jobs in _ledgers(report):
        failed += failures(ledger, jobs)
        took += seconds(ledger, jobs)
        cost += costs(ledger, jobs)
    top = _costliest(report, most)
    told: dict[RowSpend, tuple[str | None, str | None]] = {}
    for ledger, jobs in _ledgers(report) if texts else ():
        lookups: dict[str, Lookup] = {}
        for _, row in top[:texts]:
            if row.run_id in jobs:
                lookup = lookups.get(row.run_id) or Lookup(ledger, _named(ledger, row.run_id))
                lookups[row.run_id] = lookup
                told[row] = _texts(lookup, row)
    return Details(failed, took, cost, [CostlyRow(job, row, *told.get(row, (None, None))) for job, row in top])


def _ledgers(report: Report) -> Iterator[tuple[LedgerView, dict[str, str]]]:
    """Each ledger, open for reading, with the jobs of its runs by their ids."""
    # Not by pandas: it makes text of names that may be none.
    found: dict[str, dict[str, str]] = {}
    for run in records(report.runs[report.runs["ledger"].notna()]):
        found.setdefault(run["ledger"], {})[run["run_id"]] = run["job"]
    for path, jobs in found.items():
        with closing(LedgerView.read(Path(path))) as ledger:
            yield ledger, jobs


def _named(ledger: LedgerView, run_id: str) -> Run:
    run = ledger.run_named(run_id)
    assert run is not None
    return run


def _texts(lookup: Lookup, row: RowSpend) -> tuple[str | None, str | None]:
    place = lookup.place(row.attempt_id)
    prompt = lookup.prompt(place, row.model) if place is not None else None
    answer = lookup.answer(row.attempt_id)
    return prompt_text(prompt) if prompt is not None else None, answer.text if answer is not None else None


def _frame(rows: Sequence[tuple[str, RowSpend]]) -> pd.DataFrame:
    names = [name for name in RowSpend._fields if name != "attempt_id"]
    records: list[dict[str, Any]] = [{"job": job, **{name: getattr(row, name) for name in names}} for job, row in rows]
    return pd.DataFrame({
        name: pd.Series([record[name] for record in records], dtype="object") for name in ("job", *names)
    })  # fmt: skip
