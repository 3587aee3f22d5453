"""What a page draws of a report: a bounded number of series and lines, whatever the number of runs, models and days."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from batchrun.money import usd_text
from batchrun.page_text import average, given, label, month, name, usd
from batchrun.page_text import day as day_text
from batchrun.report import Report, records
from batchrun.spend import IN_FLIGHT
from batchrun.spend_details import Details

MOST_MODELS = 6
MOST_BUCKETS = 36
MOST_LINES = 10
MOST_METRICS = 6
OTHER = "other"
_TOKENS = ("in", "in, cached", "out")
_EVALUATED = {
    "right_by", "right", "rows", "unparsed", "metrics", "usd_per_correct", "without_expected", "unanswered",
    "confusion",
}  # fmt: skip
_BELOW = "below $0.0000001"
NO_TIME = datetime.fromtimestamp(0, UTC)
"""When a run is said to have begun whose id tells no time."""


class Stack(NamedTuple):
    """Amounts over time, by series."""

    unit: str
    """`day`, `week`, `month` or `year`: the finest of which there are not too many. UTC."""
    years: str
    buckets: list[str]
    """All from the first to the last, also those with nothing in them."""
    series: list[str]
    """The largest first."""
    values: list[list[Decimal]]
    """By bucket, by series. Exact."""
    not_drawn: Decimal
    """Of older times than fit, or of runs whose day is not known."""

    @property
    def total(self) -> Decimal:
        """Of all that is drawn."""
        return sum((value for row in self.values for value in row), Decimal(0))


class Line(NamedTuple):
    """A line of a chart: a label with marks below it."""

    label: str
    """For the chart: short enough for a phone."""
    more: str
    """A second line of it, or nothing."""
    name: str
    """For a table."""
    values: list[float]


class Table(NamedTuple):
    """Cells as text; the first of each row names it."""

    head: list[str]
    rows: list[list[str]]


class Step(NamedTuple):
    """Rows that cost about as much."""

    label: str
    rows: int


class Metric(NamedTuple):
    """One metric over the newest runs that have it: value, low and high end of the 95 % interval."""

    name: str
    lines: list[Line]


class _Sum(NamedTuple):
    day: date | None
    model: str
    usd: Decimal
    fresh: int
    cached: int
    completion: int


def over_time(report: Report) -> tuple[Stack | None, Stack | None]:
    """Dollars by model, and tokens by kind. None: nothing to draw."""
    sums = list(_sums(report))
    by_model: dict[str, Decimal] = {}
    for one in sums:
        by_model[one.model] = by_model.get(one.model, Decimal(0)) + one.usd
    dear = sorted((model for model, amount in by_model.items() if amount), key=lambda model: (-by_model[model], model))
    most = dear if len(dear) <= MOST_MODELS + 1 else dear[:MOST_MODELS]
    places = {model: place for place, model in enumerate(most)}
    names = [name(model) for model in most] + ([OTHER] if len(dear) > len(most) else [])

    def dollars(one: _Sum) -> Iterator[tuple[int, Decimal]]:
        if one.usd:
            yield places.get(one.model, len(most)), one.usd

    def tokens(one: _Sum) -> Iterator[tuple[int, Decimal]]:
        yield from enumerate(map(Decimal, (one.fresh, one.cached, one.completion)))

    return _stack(sums, names, dollars), _stack(sums, list(_TOKENS), tokens)


def seconds(report: Report, details: Details, *, is_first: bool) -> list[Line]:
    """50th, 95th and 99th percentile of the newest runs and models, the newest first.

    Args:
        is_first: to the first token, instead of to the end.
    """
    runs = _Runs(report)
    known = []
    for one in details.seconds:
        values = (one.first_p50, one.first_p95, one.first_p99) if is_first else (one.p50, one.p95, one.p99)
        measured = [value for value in values if value is not None]
        if len(measured) == len(values):
            known.append((-runs.place(one.run_id), one.model, one.run_id, measured))
    return [Line(*runs.named(run_id, model), measured) for _, model, run_id, measured in sorted(known)[:MOST_LINES]]


def causes(details: Details) -> list[Line]:
    """Attempts without an answer, by cause, the most frequent first."""
    counts: Counter[str] = Counter()
    for one in details.failures:
        counts[one.kind] += one.attempts
    ordered = counts.most_common()
    most = ordered if len(ordered) <= MOST_LINES else ordered[: MOST_LINES - 1]
    lines = [Line(label(kind), "", name(kind), [number]) for kind, number in most]
    if left := sum(number for _, number in ordered[len(most) :]):
        lines.append(Line(OTHER, "", f"{OTHER} ({len(ordered) - len(most)} causes)", [left]))
    return lines


def budgets(report: Report) -> list[Line]:
    """The share of its budget that each of the newest runs has used, the newest first."""
    lines = []
    for row in reversed(records(report.runs)):
        cap, used = given(row["budget_usd"]), given(row["budget_used"])
        # No share of nothing can be drawn.
        if not cap or used is None:
            continue
        per = name(row["budget_per"], 10)
        share = float(used / cap)
        short = f"{min(share, 99.99):.0%}: {average(used)} of {usd(cap)} per {label(per, 10)}"
        exact = f"{usd(used)} of {usd(cap)} per {per}"
        lines.append(Line(_run_label(row), short, f"{_run_name(row)}: {exact}", [share]))
        if len(lines) == MOST_LINES:
            break
    return lines


def steps(details: Details) -> list[Step]:
    """How many rows cost how much, over all runs; all steps from the lowest to the highest."""
    counts: Counter[Decimal] = Counter()
    for one in details.costs:
        counts[one.usd_from] += one.rows
    found = sorted(start for start, rows in counts.items() if rows)
    if not found:
        return []
    listed = [found[0]]
    while listed[-1] < found[-1]:
        listed.append(found[1] if listed[-1] == 0 else min(_next(listed[-1]), _above(found, listed[-1])))
    return [Step(f"{usd(start)}–{usd_text(_next(start))}" if start else _BELOW, counts[start]) for start in listed]


def metrics(report: Report) -> list[Metric]:
    """Of the newest runs that were evaluated, the newest first."""
    found: dict[str, list[Line]] = {}
    for evaluated in evaluations(report):
        for metric, (value, low, high) in evaluated.measures.items():
            lines = found.setdefault(metric, [])
            if len(lines) < MOST_LINES:
                text = f"{value:.3f} ({low:.3f} to {high:.3f}){evaluated.kind}"
                lines.append(Line(evaluated.label, text, evaluated.name, [value, low, high]))
    return [Metric(name(metric, 30), lines) for metric, lines in list(found.items())[:MOST_METRICS]]


class Evaluated(NamedTuple):
    """The answers of a run, or their votes, against what was expected."""

    label: str
    kind: str
    name: str
    document: dict[str, Any]
    """As `batchrun.evaluate.Evaluation.document`."""
    measures: dict[str, tuple[float, float, float]]
    """By metric: value, low and high end."""


def evaluations(report: Report) -> list[Evaluated]:
    """The newest first."""
    found = []
    for row in reversed(records(report.runs)):
        document = row["evaluation"]
        if not isinstance(document, dict):
            continue
        for kind, one in (("", document), (" by vote", document.get("votes"))):
            # Another version of batchrun may have written it.
            if isinstance(one, dict) and _EVALUATED.issubset(one):
                measures = {
                    str(metric): (float(measure["value"]), float(measure["low"]), float(measure["high"]))
                    for metric, measure in one["metrics"].items()
                    if measure is not None
                }
                found.append(Evaluated(_run_label(row), kind, _run_name(row) + kind, one, measures))
        if len(found) >= MOST_LINES:
            break
    return found


class _Runs:
    """The runs of a report, by their id."""

    def __init__(self, report: Report) -> None:
        self._rows = {row["run_id"]: (place, row) for place, row in enumerate(records(report.runs))}

    def place(self, run_id: str) -> int:
        """The newest has the highest."""
        return self._rows[run_id][0] if run_id in self._rows else -1

    def named(self, run_id: str, model: str) -> tuple[str, str, str]:
        """As a `Line` is."""
        if run_id not in self._rows:
            return label(run_id), label(model), f"{name(run_id)} · {name(model)}"
        row = self._rows[run_id][1]
        return _run_label(row), label(model), f"{_run_name(row)} · {name(model)}"


def _run_label(row: dict[str, Any]) -> str:
    began = f" · {day_text(row['started_at'])}" if row["started_at"] != NO_TIME else ""
    return f"{label(row['job'], 24)}{began}"


def _run_name(row: dict[str, Any]) -> str:
    return f"{name(row['job'])} · {name(row['run_id'], 40)}"


def _sums(report: Report) -> Iterator[_Sum]:
    spend = report.spend
    columns = ("outcome", "day", "model", "usd_spent", "prompt_tokens", "cached_tokens", "completion_tokens")
    for outcome, day, model, amount, prompt, cached, completion in zip(*(spend[one] for one in columns), strict=True):
        if outcome != IN_FLIGHT:
            yield _Sum(day, model, amount, max(0, prompt - cached), cached, completion)
    in_parts = set(spend["run_id"])
    for row in records(report.runs):
        if row["run_id"] not in in_parts:
            # Known by its output alone: all of it counts for the day on which it began.
            began = row["started_at"]
            yield _Sum(
                began.date() if began != NO_TIME else None, row["model"], row["usd_spent"],
                max(0, row["prompt_tokens"] - row["cached_tokens"]), row["cached_tokens"], row["completion_tokens"],
            )  # fmt: skip


def _stack(
    sums: Sequence[_Sum], series: list[str], parts: Callable[[_Sum], Iterable[tuple[int, Decimal]]]
) -> Stack | None:
    by_day: dict[date, list[Decimal]] = {}
    not_drawn = Decimal(0)
    for one in sums:
        for place, value in parts(one):
            if not value:
                continue
            if one.day is None:
                not_drawn += value
            else:
                by_day.setdefault(one.day, [Decimal(0)] * len(series))[place] += value
    if not by_day:
        return None
    first, last = min(by_day), max(by_day)
    unit = next((unit for unit in _UNITS if _UNITS[unit](last) - _UNITS[unit](first) < MOST_BUCKETS), "year")
    start, end = _UNITS[unit](first), _UNITS[unit](last)
    start = max(start, end - MOST_BUCKETS + 1)
    values = [[Decimal(0)] * len(series) for _ in range(start, end + 1)]
    for when, amounts in by_day.items():
        place = _UNITS[unit](when) - start
        if place < 0:
            not_drawn += sum(amounts)
        else:
            values[place] = [one + other for one, other in zip(values[place], amounts, strict=True)]
    years = f"{first.year}" if first.year == last.year else f"{first.year} – {last.year}"
    return Stack(unit, years, [_bucket(unit, index) for index in range(start, end + 1)], series, values, not_drawn)


# Days, weeks (from Monday), months and years as numbers that count up. Day 1 of the calendar was a Monday.
_UNITS: dict[str, Callable[[date], int]] = {
    "day": lambda day: day.toordinal(),
    "week": lambda day: (day.toordinal() - 1) // 7,
    "month": lambda day: day.year * 12 + day.month - 1,
    "year": lambda day: day.year,
}


def _bucket(unit: str, index: int) -> str:
    if unit == "year":
        return str(index)
    if unit == "month":
        return f"{month(index % 12 + 1)} {index // 12}"
    day = date.fromordinal(index if unit == "day" else index * 7 + 1)
    return f"{day.day} {month(day.month)}"


def _next(step: Decimal) -> Decimal:
    """The step after one: 1, 2, 5, 10, …"""
    return step * (Decimal("2.5") if step.normalize().as_tuple().digits == (2,) else 2)


def _above(found: Sequence[Decimal], step: Decimal) -> Decimal:
    return next(one for one in found if one > step)
