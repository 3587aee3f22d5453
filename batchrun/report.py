"""What runs cost, as pandas DataFrames.

    >>> import batchrun.report
    >>> report = batchrun.report.load("outputs/")
    >>> report.runs[["job", "run_id", "usd_spent"]].columns.tolist()
    ['job', 'run_id', 'usd_spent']
    >>> int(report.spend.groupby("day")["attempts"].sum().iloc[0])
    2

Dollars are exact: columns of `decimal.Decimal`, whose sums are those of the ledger to the last digit.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from batchrun.errors import JobError, StorageError
from batchrun.ledger_view import LedgerView
from batchrun.money import DERIVED, REPORTED
from batchrun.report_places import Places
from batchrun.spend import Part, RunSpend, read_ledger, share
from batchrun.written import Written

RATIOS = ("usd_per_1000_rows", "usd_per_ok_row", "rows_per_second")
_FIGURES = (*(one.name for one in dataclasses.fields(RunSpend)), *RATIOS)
RUN_COLUMNS = (*_FIGURES, "change", "ledger", "output", "evaluation")
SPEND_COLUMNS = ("job", *(one.name for one in dataclasses.fields(Part)))


@dataclass(frozen=True)
class Report:
    """Runs, and what they are made of.

    Attributes:
        runs: a row for each run, from the oldest to the newest. Its columns are the fields of `batchrun.spend.RunSpend`
            and: `usd_per_1000_rows` and `usd_per_ok_row` (exact dollars; None without such rows), `rows_per_second`,
            `change` (of dollars per 1,000 rows against the job's run before it: 0.1 is a tenth more), `ledger` and
            `output` (the files; None where there is none), `evaluation` (the manifest's, a dict; None without).
        spend: a row for each run, model, day (UTC), outcome, kind and cost source of attempts. Its columns are `job`
            and the fields of `batchrun.spend.Part`. Runs that are known by their Parquet alone are not here.
        notes: what could not be read, and why.
    """

    runs: pd.DataFrame
    spend: pd.DataFrame
    notes: list[str]

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all runs; None where that is not known of one of them."""
        sums = {name: int(self.runs[name].sum()) for name in _COUNTED}
        usd = {name: _total(self.runs[name]) for name in _SUMMED}
        spent = sum(self.runs["usd_spent"], Decimal(0))
        return {
            "runs": len(self.runs),
            **sums,
            **usd,
            "usd_per_1000_rows": share(spent * 1000, sums["ok"] + sums["failed"], sums["unknown_attempts"]),
            "usd_per_ok_row": share(spent, sums["ok"], sums["unknown_attempts"]),
        }


_COUNTED = (
    "rows", "ok", "failed", "pending", "reused", "attempts", "in_flight", "prompt_tokens", "completion_tokens",
    "total_tokens", "cached_tokens", "unknown_attempts",
)  # fmt: skip
_SUMMED = (
    "usd_spent", "usd_reported", "usd_estimated", "usd_unknown_at_most", "usd_in_flight_at_most", "usd_wasted",
)  # fmt: skip


def _total(amounts: Iterable[Decimal | None]) -> Decimal | None:
    known = [amount for amount in amounts if amount is not None]
    return sum(known, Decimal(0)) if len(known) == len(list(amounts)) else None


def load(*paths: str | os.PathLike[str], since: datetime | None = None, runs: Sequence[str] = ()) -> Report:
    """What the runs cost that are on record in some places.

    Args:
        paths: ledgers, outputs (Parquet), or folders; in a folder all ledgers are read, and outputs only of runs that
            none of them has. `outputs` if there are none.
        since: runs that began before it are left out.
        runs: run ids, or how they begin; only those runs.

    Raises:
        JobError: a path is none of these, or `since` has no time zone.
        StorageError: a file that was named cannot be read.
    """
    if since is not None and since.tzinfo is None:
        raise JobError(f"since: {since} has no time zone: say `{since!r}.astimezone()` if it is this machine's")
    runs = (runs,) if isinstance(runs, str) else runs
    places = Places([Path(path) for path in paths or ("outputs",)])
    found: dict[str, _Found] = {}
    twice: dict[tuple[Path | None, Path], int] = {}
    for path in places.ledgers:
        try:
            with closing(LedgerView.read(path)) as ledger:
                spend = read_ledger(ledger)
        except StorageError as exc:
            if path in places.named:
                raise
            places.notes.append(f"left out: {exc}")
            continue
        for run in spend.runs:
            known = found.get(run.run_id)
            if known is not None:
                twice[known.ledger, path] = twice.get((known.ledger, path), 0) + 1
            if known is None or run.attempts > known.run.attempts:
                parts = [part for part in spend.parts if part.run_id == run.run_id]
                found[run.run_id] = _Found(run, path, parts)
    for (ledger_path, path), number in twice.items():
        places.notes.append(f"{number} runs are in {ledger_path} and in {path}: each counts once, as the longer has it")
    for path in places.outputs:
        written = Written.at(path)
        if written is None:
            if path in places.named:
                raise JobError(f"{path}: is no output that batchrun has written")
            continue
        try:
            manifest = written.manifest
            run_id, told = str(manifest["run_id"]), _of_manifest(manifest)
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as exc:
            places.notes.append(f"left out: {path} is no output of this batchrun: {type(exc).__name__}: {exc}")
            continue
        one = found.setdefault(run_id, _Found(told, None, []))
        # One that holds some columns or rows alone has the whole run's manifest all the same.
        if one.output is None and _is_whole(written):
            one.output, one.manifest = path, manifest
    ordered = sorted(found.values(), key=lambda one: (one.run.started_at, one.run.run_id))
    frame = _runs_frame(ordered)
    # Only now: a run is held beside the one before it, whether that is wanted or not.
    wanted = [one for one in ordered if _is_wanted(one.run, since, runs)]
    is_wanted = frame["run_id"].isin([one.run.run_id for one in wanted])
    return Report(frame[is_wanted].reset_index(drop=True), _spend_frame(wanted), places.notes)


def _is_whole(written: Written) -> bool:
    """True if an output has all columns and rows that its manifest is of."""
    own = (written.manifest.get("columns") or {}).get("own", ["status", "usd_spent"])
    try:
        return written.rows == written.manifest.get("rows") and set(written.schema.names).issuperset(own)
    except (OSError, pa.ArrowException):
        return False


@dataclass
class _Found:
    run: RunSpend
    ledger: Path | None
    parts: list[Part]
    output: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)


def _is_wanted(run: RunSpend, since: datetime | None, runs: Sequence[str]) -> bool:
    is_late = since is None or run.started_at >= since
    return is_late and (not runs or any(run.run_id.startswith(beginning) for beginning in runs))


def _began(run_id: str) -> datetime:
    """When a run began: its id says it."""
    try:
        return datetime.strptime(run_id[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)


def _of_manifest(manifest: dict[str, Any]) -> RunSpend:
    """A run that only its output tells of."""
    models = manifest["model"]
    sources: dict[str, Any] = manifest.get("usd_by_source") or {}
    usd = {source: Decimal(str(amount)) for source, amount in sources.items()}
    # Only of those whose outcome is not known.
    most = manifest.get("unknown_usd_at_most")
    unknown = manifest["unknown_attempts"]
    if most is None or unknown != manifest["unknown_outcomes"]:
        most = None if unknown else 0
    began = _began(str(manifest["run_id"]))
    return RunSpend(
        job=manifest["job"],
        run_id=manifest["run_id"],
        provider=manifest["provider"],
        model=", ".join(models) if isinstance(models, list) else str(models),
        state="finished" if manifest.get("complete") else "open",
        reason=manifest.get("reason"),
        exit_code=None,
        started_at=began,
        ended_at=None,
        seconds=None,
        rows=manifest["rows"],
        ok=manifest["ok"],
        failed=manifest["failed"],
        pending=manifest["pending"],
        reused=manifest.get("reused", 0),
        attempts=manifest["attempts"],
        in_flight=0,
        usd_in_flight_at_most=Decimal(0),
        prompt_tokens=manifest["prompt_tokens"],
        completion_tokens=manifest["completion_tokens"],
        total_tokens=manifest["total_tokens"],
        cached_tokens=manifest["cached_tokens"],
        usd_spent=Decimal(str(manifest["usd_spent"])),
        usd_reported=sum((usd.get(source, Decimal(0)) for source in REPORTED), Decimal(0)),
        usd_estimated=sum((usd.get(source, Decimal(0)) for source in DERIVED), Decimal(0)),
        unknown_attempts=unknown,
        usd_unknown_at_most=Decimal(str(most)) if most is not None else None,
        usd_wasted=None,
        budget_usd=None,
        budget_per=None,
        budget_used=None,
    )


def _runs_frame(found: Sequence[_Found]) -> pd.DataFrame:
    rows = []
    before: dict[tuple[str, Path | None], Decimal | None] = {}
    for one in found:
        run = one.run
        # Two jobs of one name, each with a ledger of its own, are two.
        history = (run.job, one.ledger)
        cost, earlier = run.usd_per_1000_rows, before.get(history)
        rows.append({
            **{name: getattr(run, name) for name in _FIGURES},
            "change": float(cost / earlier - 1) if cost is not None and earlier else None,
            "ledger": str(one.ledger) if one.ledger is not None else None,
            "output": str(one.output) if one.output is not None else None,
            "evaluation": one.manifest.get("evaluation"),
        })  # fmt: skip
        if cost is not None:
            before[history] = cost
    return _frame(rows, RUN_COLUMNS)


def _spend_frame(found: Sequence[_Found]) -> pd.DataFrame:
    rows = [
        {"job": one.run.job, "provider": one.run.provider, **dataclasses.asdict(part)}
        for one in found
        for part in one.parts
    ]
    return _frame(rows, SPEND_COLUMNS)


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    # Column by column: pandas would make floats of None and NaT of no moment.
    return pd.DataFrame(
        {name: pd.Series([row[name] for row in rows], dtype=_DTYPES.get(name, "object")) for name in columns}
    )


_DTYPES = dict.fromkeys(
    ("rows", "ok", "failed", "pending", "reused", "attempts", "in_flight", "prompt_tokens", "completion_tokens",
     "total_tokens", "cached_tokens", "unknown_attempts"),
    "int64",
) | {"seconds": "float64", "started_at": "datetime64[us, UTC]", "ended_at": "datetime64[us, UTC]", "is_repair": "bool",
     "rows_per_second": "float64", "change": "float64"}  # fmt: skip


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a DataFrame, by the names of its columns."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
