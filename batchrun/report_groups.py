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

from batchrun.confusion import class_of
from batchrun.errors import JobError, StorageError, listed
from batchrun.money import from_pico, to_pico
from batchrun.report import Report, records
from batchrun.spend import IN_FLIGHT, share
from batchrun.written import Written

KEYS = ("job", "model", "provider", "day", "month")
_SUMS = ("ok", "attempts", "prompt_tokens", "completion_tokens", "cached_tokens", "total_tokens", "unknown_attempts")
NOT_THERE = "(not in an output)"
_READ = ("status", "reused", "attempts", "prompt_tokens", "completion_tokens", "cached_tokens", "total_tokens",
         "unknown_attempts", "usd_spent")  # fmt: skip
_ROWS_AT_ONCE = 4096
_MOST_VALUES = 10_000
_MOST_EXACT_USD = 4000.0
"""Up to here a double times 10^12, rounded, is the number of pico-dollars that it stands for."""


def grouped(report: Report, by: str) -> pd.DataFrame:
    """Sums by what an attempt was for.

    Args:
        by: one of `KEYS`, or a column of the outputs. What of a run's dollars is in no output, or in none that has the
            column, is in the group `NOT_THERE`.

    Returns:
        A row for each value, with a column named as `by`, and `runs`, `ok` (answers, each row once; none that was
        reused), `attempts`, `prompt_tokens`, `completion_tokens`, `cached_tokens`, `total_tokens`, `unknown_attempts`,
        `usd_spent` (exact) and `usd_per_1000_ok`.

    Raises:
        JobError: no output has such a column, or it holds more than 10,000 values.
        StorageError: an output cannot be read.
    """
    found: dict[Any, dict[str, Any]] = {}
    # A column may be named like one of the sums.
    name_of_value = f"{by} (value)" if by in ("runs", *_SUMS, "usd_spent", "usd_per_1000_ok") else by
    for row in _of_parts(report, by) if by in KEYS else _of_outputs(report, by):
        sums = found.setdefault(row["value"], {"runs": set(), **dict.fromkeys(_SUMS, 0), "usd_spent": Decimal(0)})
        sums["runs"].add(row["run_id"])
        for name in (*_SUMS, "usd_spent"):
            sums[name] += row[name]
        if len(found) > _MOST_VALUES:
            raise JobError(f"--by {by}: there are more than {_MOST_VALUES} values")
    ordered = sorted(found.items(), key=lambda item: _order(by, item[0], item[1]["usd_spent"]))
    rows = [
        {
            name_of_value: value,
            **sums,
            "runs": len(sums["runs"]),
            "usd_per_1000_ok": share(sums["usd_spent"] * 1000, sums["ok"], sums["unknown_attempts"]),
        }
        for value, sums in ordered
    ]
    names = [name_of_value, "runs", *_SUMS, "usd_spent", "usd_per_1000_ok"]
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=_dtype(name)) for name in names})


def _dtype(name: str) -> str:
    return "int64" if name in ("runs", *_SUMS) else "object"


def _order(by: str, value: Any, usd: Decimal) -> tuple[Any, ...]:
    """Days in their order, others by what they cost."""
    return (str(value),) if by in ("day", "month") else (-usd, value is None, str(value))


def _of_parts(report: Report, by: str) -> Iterator[dict[str, Any]]:
    for part in records(report.spend[report.spend["outcome"] != IN_FLIGHT]):
        is_answer = part["outcome"] == "ok" and not part["is_repair"]
        yield {**part, "value": _value(part, by, part["day"]), "ok": part["attempts"] if is_answer else 0}
    for run in records(report.runs[report.runs["ledger"].isna()]):
        yield {**run, "ok": run["ok"] - run["reused"], "value": _value(run, by, run["started_at"].date())}


def _value(row: dict[str, Any], by: str, day: date) -> str:
    if by == "day":
        return day.isoformat()
    return f"{day:%Y-%m}" if by == "month" else str(row[by])


def _of_outputs(report: Report, by: str) -> Iterator[dict[str, Any]]:
    names: dict[str, None] = {}
    has_column = False
    for run in records(report.runs):
        rest = {**run, "value": NOT_THERE, "ok": run["ok"] - run["reused"]}
        path = Path(run["output"]) if run["output"] is not None else None
        written = Written.at(path) if path is not None else None
        try:
            if written is not None:
                prefix = (written.manifest.get("columns") or {}).get("prefix", "")
                names |= dict.fromkeys(written.schema.names)
                if by in written.schema.names:
                    has_column = True
                    wanted = [name for name in _READ if f"{prefix}{name}" in written.schema.names]
                    columns = list(dict.fromkeys([by, *(f"{prefix}{name}" for name in wanted)]))
                    for batch in written.batches(_ROWS_AT_ONCE, columns):
                        for row in _of_batch(batch, by, prefix, run["run_id"]):
                            for name in (*_SUMS, "usd_spent"):
                                rest[name] -= row[name]
                            yield row
        except (OSError, pa.ArrowException) as exc:
            raise StorageError(f"{path} cannot be read: {exc}") from exc
        # Of rows whose output is older than the ledger, or without one; of answers that no row asks for any more.
        if rest["usd_spent"] or rest["unknown_attempts"]:
            yield {name: max(0, value) if name in _SUMS else value for name, value in rest.items()}
    if not has_column:
        has = f"; they have {listed([*names])}" if names else ", as there are none"
        raise JobError(f"--by {by}: is none of {', '.join(KEYS)}, and no output has such a column{has}")


def _of_batch(batch: pa.RecordBatch, by: str, prefix: str, run_id: str) -> Iterator[dict[str, Any]]:
    def column(name: str) -> pa.Array:
        return batch.column(batch.schema.get_field_index(f"{prefix}{name}"))

    values = batch.column(batch.schema.get_field_index(by))
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise JobError(f"--by {by}: is a column of {values.type}, which has no groups")
    is_own = pc.invert(pc.fill_null(column("reused"), False)) if f"{prefix}reused" in batch.schema.names else True
    counts = {name: pc.fill_null(column(name), 0) for name in _SUMS if name != "ok"}
    table = pa.table({
        "value": values.cast(pa.string()),
        # Tokens of answers that were reused are those of the run that paid for them.
        **{name: pc.if_else(is_own, count, 0) for name, count in counts.items()},
        "ok": pc.and_(pc.equal(column("status"), "ok"), is_own).cast(pa.int64()),
        "pico": _pico(column("usd_spent")).cast(pa.decimal128(20)),
    })  # fmt: skip
    sums = table.group_by("value").aggregate([(name, "sum") for name in (*_SUMS, "pico")])
    for row in sums.to_pylist():
        yield {
            "value": class_of(row["value"]),
            "run_id": run_id,
            **{name: row[f"{name}_sum"] for name in _SUMS},
            "usd_spent": from_pico(int(row["pico_sum"])),
        }


def _pico(usd: pa.Array) -> pa.Array:
    """Dollars of the output as whole pico-dollars; none where they are not known."""
    known = pc.fill_null(usd, 0.0)
    if len(known) and pc.max(known).as_py() > _MOST_EXACT_USD:
        return pa.array([to_pico(Decimal(repr(value))) for value in known.to_pylist()], pa.int64())
    return pc.round(pc.multiply(known, 1e12)).cast(pa.int64())
