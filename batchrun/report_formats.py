"""A report as a table, Markdown, CSV, JSON or Parquet. Every figure is the ledger's, to the last digit."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.exports import UnixLines
from batchrun.money import exact_json, usd_text
from batchrun.report import Report, records
from batchrun.tables import aligned, columns, shown

_PRICE_DIGITS = 4
_MONEY = pa.decimal128(38, 12)


@dataclass(frozen=True)
class _Column:
    header: str
    cell: Callable[[dict[str, Any]], str]
    rank: int = 0
    """The highest are left out first where a table is too wide."""


def _number(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: str(row[name] or "")


def _usd(name: str) -> Callable[[dict[str, Any]], str]:
    def cell(row: dict[str, Any]) -> str:
        value = row[name]
        return "" if value is None or pd.isna(value) or not value else usd_text(value)

    return cell


def _ratio(name: str) -> Callable[[dict[str, Any]], str]:
    """An average, which no bill holds: to some digits."""

    def cell(row: dict[str, Any]) -> str:
        value = row[name]
        return "" if value is None or pd.isna(value) else usd_text(Decimal(f"{value:.{_PRICE_DIGITS}g}"))

    return cell


def _unknown(row: dict[str, Any]) -> str:
    if not row["unknown_attempts"]:
        return ""
    most = row["usd_unknown_at_most"]
    return f"{row['unknown_attempts']}×?" if most is None or pd.isna(most) else f"≤{usd_text(most)}"


def _in_flight(row: dict[str, Any]) -> str:
    if not row["in_flight"]:
        return ""
    most = row["usd_in_flight_at_most"]
    return f"{row['in_flight']}×?" if most is None or pd.isna(most) else f"{row['in_flight']}≤{usd_text(most)}"


def _budget(row: dict[str, Any]) -> str:
    cap, used = row["budget_usd"], row["budget_used"]
    if cap is None or pd.isna(cap):
        return ""
    return f"{float(used / cap):.0%} of {usd_text(cap)}/{row['budget_per']}" if cap else f"{usd_text(used)} of 0"


def _change(row: dict[str, Any]) -> str:
    return "" if pd.isna(row["change"]) else f"{row['change']:+.0%}"


def _took(row: dict[str, Any]) -> str:
    if pd.isna(row["seconds"]):
        return ""
    seconds = round(row["seconds"])
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}"
    return f"{seconds // 60}m{seconds % 60:02}" if seconds >= 60 else f"{row['seconds']:.1f}s"


_SUMS = (
    _Column("ok", lambda row: str(row["ok"])),
    _Column("failed", _number("failed"), 3),
    _Column("pending", _number("pending"), 3),
    _Column("reused", _number("reused"), 5),
    _Column("tokens in", _number("prompt_tokens"), 7),
    _Column("out", _number("completion_tokens"), 7),
    _Column("cached", _number("cached_tokens"), 9),
    _Column("$ spent", lambda row: usd_text(row["usd_spent"])),
    _Column("reported", _usd("usd_reported"), 8),
    _Column("estimated", _usd("usd_estimated"), 4),
    _Column("unknown", _unknown, 1),
    _Column("in flight", _in_flight, 1),
    _Column("$/1000 rows", _ratio("usd_per_1000_rows"), 2),
    _Column("$/ok row", _ratio("usd_per_ok_row"), 6),
    _Column("wasted", _usd("usd_wasted"), 5),
)
_RUN = (
    _Column("run", lambda row: row["run_id"]),
    _Column("job", lambda row: shown(row["job"], 24)),
    _Column("started", lambda row: f"{row['started_at']:%Y-%m-%d %H:%M}", 10),
    _Column("took", _took, 6),
    _Column("model", lambda row: shown(row["model"], 32), 5),
    *_SUMS,
    _Column("budget", _budget, 4),
    _Column("trend", _change, 2),
    _Column("state", lambda row: "" if row["state"] == "finished" else row["state"], 3),
)
_GROUP = (
    _Column("ok", lambda row: str(row["ok"])),
    _Column("attempts", _number("attempts"), 3),
    _Column("tokens in", _number("prompt_tokens"), 5),
    _Column("out", _number("completion_tokens"), 5),
    _Column("cached", _number("cached_tokens"), 6),
    _Column("$ spent", lambda row: usd_text(row["usd_spent"])),
    _Column("$/1000 ok", _ratio("usd_per_1000_ok"), 1),
    _Column("unknown", _number("unknown_attempts"), 2),
)
_TOP = (
    _Column("run", lambda row: row["run_id"]),
    _Column("job", lambda row: shown(row["job"], 24), 2),
    _Column("row", lambda row: "(gone)" if pd.isna(row["row"]) else str(row["row"])),
    _Column("model", lambda row: shown(row["model"], 32), 3),
    _Column("sample", _number("sample"), 4),
    _Column("attempts", _number("attempts"), 1),
    _Column("tokens", _number("total_tokens"), 1),
    _Column("$ spent", lambda row: usd_text(row["usd_spent"])),
)


@dataclass(frozen=True)
class Views:
    """What is to be shown of a report."""

    report: Report
    by: str | None = None
    groups: pd.DataFrame | None = None
    """With `by`: its columns are `by`, sums, and `usd_per_1000_ok`."""
    top: pd.DataFrame | None = None
    """The costliest rows."""


def lines(views: Views, width: int | None) -> list[str]:
    """Tables for a terminal. `width`: its columns; None where nothing is to be left out for them."""
    return [line for title, table in _tables(views, width) for line in (*title, *aligned(table), "")][:-1]


def markdown(views: Views) -> str:
    """Tables of Markdown."""
    parts = []
    for title, table in _tables(views, None):
        head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
        rule = ["---", *["---:"] * (len(head) - 1)]
        parts += [*title, *("| " + " | ".join(row) + " |" for row in (head, rule, *rows)), ""]
    return "\n".join(parts[:-1])


def document(views: Views) -> str:
    """One JSON object; dollars are numbers with all their digits."""
    report = views.report
    found: dict[str, Any] = {"runs": _plain(report.runs), "totals": report.totals}
    if views.groups is not None:
        found |= {"by": views.by, "groups": _plain(views.groups)}
    if views.top is not None:
        found["top"] = _plain(views.top)
    return exact_json(found | {"notes": report.notes})


def csv_text(views: Views) -> str:
    """The runs, or the groups, with a line for each."""
    frame = views.groups if views.groups is not None else views.report.runs
    buffer = io.StringIO()
    writer = csv.writer(UnixLines(buffer), lineterminator="\r\n")
    writer.writerow(frame.columns)
    for row in _plain(frame):
        writer.writerow([_cell(value) for value in row.values()])
    return buffer.getvalue()


def parquet_bytes(views: Views) -> bytes:
    """The runs, or the groups; dollars as decimal(38, 12)."""
    frame = views.groups if views.groups is not None else views.report.runs
    rows = records(frame)
    arrays = {name: _array([_blank(row[name]) for row in rows], name) for name in frame.columns}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays), sink)
    return bytes(sink.getvalue())


def _tables(views: Views, width: int | None) -> list[tuple[list[str], list[list[str]]]]:
    report = views.report
    tables: list[tuple[list[str], list[list[str]]]] = []
    if views.groups is not None:
        by = str(views.groups.columns[0])
        group = (_Column(by, lambda row: shown(_cell(row[by]) or "(none)", 40)), *_GROUP)
        tables.append(_table(group, records(views.groups), width))
    else:
        rows = records(report.runs)
        total = {"run_id": f"{len(rows)} runs", "job": "", "model": "", "state": "finished", **report.totals}
        tables.append(_table(_RUN, rows, width, total if len(rows) > 1 else None))
    if views.top is not None:
        title, table = _table(_TOP, records(views.top), width)
        tables.append((["the costliest rows:", *title], table))
    return tables


_TOTAL_LACKS = ("started", "took", "budget", "trend")


def _table(
    chosen: Sequence[_Column], rows: Sequence[dict[str, Any]], width: int | None, total: dict[str, Any] | None = None
) -> tuple[list[str], list[list[str]]]:
    """The cells of a table, header first; columns without anything in them are left out."""
    found = []
    for column in chosen:
        cells = [column.cell(row) for row in rows]
        if total is not None:
            cells.append("" if column.header in _TOTAL_LACKS else column.cell(total))
        if any(cells) or column.rank == 0:
            found.append((column, [column.header, *cells]))
    left_out = []
    while width is not None and _width([cells for _, cells in found]) > width:
        most = max(column.rank for column, _ in found)
        if most == 0:
            break
        place = max(index for index, (column, _) in enumerate(found) if column.rank == most)
        left_out.append(found.pop(place)[0].header)
    table = [list(row) for row in zip(*(cells for _, cells in found), strict=True)]
    title = [f"left out for want of width: {', '.join(reversed(left_out))}; --format csv has all"] if left_out else []
    return title, table


def _width(cells: Sequence[Sequence[str]]) -> int:
    return sum(max(map(columns, column)) for column in cells) + 2 * (len(cells) - 1)


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{name: _json_value(value) for name, value in row.items()} for row in records(frame)]


def _blank(value: Any) -> Any:
    if isinstance(value, str):
        # Paths may hold bytes that are no text.
        return value.encode("utf-8", "backslashreplace").decode()
    return None if not isinstance(value, dict | list) and pd.isna(value) else value


def _json_value(value: Any) -> Any:
    value = _blank(value)
    if isinstance(value, datetime):
        return value.isoformat()
    return value.isoformat() if isinstance(value, date) else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Decimal):
        return usd_text(value)
    return exact_json(value) if isinstance(value, dict | list) else str(value)


def _array(values: list[Any], name: str) -> pa.Array:
    if name.startswith("usd_") or name in ("budget_usd", "budget_used"):
        return pa.array(values, _MONEY)
    if any(isinstance(value, dict) for value in values):
        return pa.array([None if value is None else json.dumps(value, default=str) for value in values])
    return pa.array(values)
