"""A report by job, model, provider, day, month, or by any column of the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchrun.errors import JobError, StorageError, listed
from batchrun.money import from_pico, to_pico
from batchrun.report import Report, records
from batchrun.sink import manifest_of
from batchrun.spend import share

KEYS = ("job", "model", "provider", "day", "month")
_SUMS = ("ok", "attempts", "prompt_tokens", "completion_tokens", "cached_tokens", "total_tokens", "unknown_attempts")
_MOST_VALUES = 10_000
_MOST_EXACT_USD = 4000.0
"""Up to here a double times 10^12, rounded, is the number of pico-dollars that it stands for."""


def grouped(report: Report, by: str) -> pd.DataFrame:
    """Sums by what an attempt was for.

    Args:
        by: one of `KEYS`, or a column of the outputs; runs without an output are not in its groups.

    Returns:
        A row for each value, with the columns `by`, `runs`, `ok` (answers, each row once), `attempts`,
        `prompt_tokens`, `completion_tokens`, `cached_tokens`, `total_tokens`, `unknown_attempts`, `usd_spent` (exact)
        and `usd_per_1000_ok`.

    Raises:
        JobError: no output has such a column, or it holds more than 10,000 values.
        StorageError: an output cannot be read.
    """
    found: dict[Any, dict[str, Any]] = {}
    for row in _of_parts(report, by) if by in KEYS else _of_outputs(report, by):
        sums = found.setdefault(row["value"], {"runs": set(), **dict.fromkeys(_SUMS, 0), "usd_spent": Decimal(0)})
        sums["runs"].add(row["run_id"])
        for name in (*_SUMS, "usd_spent"):
            sums[name] += row[name]
        if len(found) > _MOST_VALUES:
            raise JobError(f"--by {by}: there are more than {_MOST_VALUES} values")
    ordered = sorted(found.items(), key=lambda item: _order(by, item[0], item[1]["usd_spent"]))
    rows = [
        {by: value, **sums, "runs": len(sums["runs"]), "usd_per_1000_ok": share(sums["usd_spent"] * 1000, sums["ok"])}
        for value, sums in ordered
    ]
    names = [by, "runs", *_SUMS, "usd_spent", "usd_per_1000_ok"]
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=_dtype(name)) for name in names})


def _dtype(name: str) -> str:
    return "int64" if name in ("runs", *_SUMS) else "object"


def _order(by: str, value: Any, usd: Decimal) -> tuple[Any, ...]:
    """Days in their order, others by what they cost."""
    return (str(value),) if by in ("day", "month") else (-usd, value is None, str(value))


def _of_parts(report: Report, by: str) -> Iterator[dict[str, Any]]:
    for part in records(report.spend):
        is_answer = part["outcome"] == "ok" and not part["is_repair"]
        yield {**part, "value": _value(part, by, part["day"]), "ok": part["attempts"] if is_answer else 0}
    for run in records(report.runs[report.runs["ledger"].isna()]):
        yield {**run, "value": _value(run, by, run["started_at"].date())}


def _value(row: dict[str, Any], by: str, day: date) -> str:
    if by == "day":
        return day.isoformat()
    return f"{day:%Y-%m}" if by == "month" else str(row[by])


def _of_outputs(report: Report, by: str) -> Iterator[dict[str, Any]]:
    names: dict[str, None] = {}
    has_column = False
    for run in records(report.runs[report.runs["output"].notna()]):
        path = Path(run["output"])
        prefix = ((manifest_of(path) or {}).get("columns") or {}).get("prefix", "")
        try:
            with pq.ParquetFile(path) as file:
                names |= dict.fromkeys(file.schema_arrow.names)
                if by not in file.schema_arrow.names:
                    continue
                has_column = True
                wanted = ("status", "attempts", "prompt_tokens", "completion_tokens", "cached_tokens", "total_tokens")
                columns = [by, *(f"{prefix}{name}" for name in (*wanted, "usd_spent"))]
                for batch in file.iter_batches(65_536, columns=columns):
                    yield from _of_batch(batch, by, prefix, run["run_id"])
        except (OSError, pa.ArrowException) as exc:
            raise StorageError(f"{path} cannot be read: {exc}") from exc
    if not has_column:
        raise JobError(
            f"--by {by}: is none of {', '.join(KEYS)}, and no output has such a column; they have {listed([*names])}"
        )


def _of_batch(batch: pa.RecordBatch, by: str, prefix: str, run_id: str) -> Iterator[dict[str, Any]]:
    def column(name: str) -> pa.Array:
        return batch.column(batch.schema.get_field_index(f"{prefix}{name}"))

    values = batch.column(batch.schema.get_field_index(by))
    if pa.types.is_nested(values.type):
        raise JobError(f"--by {by}: is a column of {values.type}, which has no groups")
    counts = {name: column(name) for name in _SUMS if name not in ("ok", "unknown_attempts")}
    usd = column("usd_spent")
    is_asked = pc.greater(pc.fill_null(counts["attempts"], 0), 0)
    table = pa.table({
        "value": values.cast(pa.string()),
        **{name: pc.fill_null(count, 0) for name, count in counts.items()},
        "ok": pc.equal(column("status"), "ok").cast(pa.int64()),
        "unknown_attempts": pc.and_(is_asked, pc.is_null(usd)).cast(pa.int64()),
        "pico": _pico(usd),
    })  # fmt: skip
    sums = table.group_by("value").aggregate([(name, "sum") for name in (*_SUMS, "pico")])
    for row in sums.to_pylist():
        yield {
            "value": row["value"],
            "run_id": run_id,
            **{name: row[f"{name}_sum"] for name in _SUMS},
            "usd_spent": from_pico(row["pico_sum"]),
        }


def _pico(usd: pa.Array) -> pa.Array:
    """Dollars of the output as whole pico-dollars; none where they are not known."""
    known = pc.fill_null(usd, 0.0)
    if len(known) and pc.max(known).as_py() > _MOST_EXACT_USD:
        return pa.array([to_pico(Decimal(repr(value))) for value in known.to_pylist()], pa.int64())
    return pc.round(pc.multiply(known, 1e12)).cast(pa.int64())
