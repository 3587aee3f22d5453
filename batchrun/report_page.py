"""A report as one self-contained HTML page: charts, tables and texts, without a script and without anything to fetch.

All names and texts are data of users and models. Jinja2 escapes them in the page, and `report_charts` in the drawings;
the page's own policy forbids scripts and requests even so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from batchrun import __version__, page_text, report_figures
from batchrun.errors import MissingHereError
from batchrun.page_text import Cut, given, name, usd
from batchrun.palette import PALETTE
from batchrun.report import Report, records
from batchrun.report_figures import NO_TIME, Evaluated, Table
from batchrun.spend_details import CostlyRow, Details

if TYPE_CHECKING:
    from batchrun.report_drawn import Figure

FIRST_RUNS, MOST_RUNS = 20, 100
MOST_ROWS = 50
MOST_NOTES = 20
_MOST_CLASSES = 50
_LONGEST_TEXT, _ALL_TEXTS = 4_000, 100_000
"""Characters of one prompt or answer, and of all together."""


class RunRow(NamedTuple):
    """A run in the table of runs."""

    job: str
    run_id: str
    state: str
    reason: str
    started: str
    took: str
    model: str
    rows: list[str]
    tokens: list[str]
    usd: str
    sources: list[str]
    per_1000: str
    per_1000_exact: str
    trend: str
    is_dearer: bool


class TopRow(NamedTuple):
    """One of the costliest rows."""

    usd: str
    where: list[str]
    prompt: Cut | None
    answer: Cut | None


class Shade(NamedTuple):
    """A cell of the confusion matrix."""

    number: int
    level: int
    """From 0, for none, to 5, for all of its row."""
    is_right: bool


class Matrix(NamedTuple):
    """The confusion matrix of a run."""

    of: str
    head: list[str]
    rows: list[tuple[str, list[Shade]]]


@dataclass(frozen=True)
class _Content:
    title: str
    of: str
    made_at: str
    total: str
    sources: list[str]
    tiles: list[tuple[str, str, str]]
    """What it is, the figure, what to know of it."""
    figures: list[Figure]
    runs: list[RunRow]
    older: list[RunRow]
    """Folded away."""
    runs_note: str
    top: list[TopRow]
    top_note: str
    scores: list[Figure]
    evaluated: Table | None
    matrix: Matrix | None
    notes: list[str]


def page(report: Report, details: Details, *, made_at: datetime) -> str:
    """The page, as text for a file in UTF-8.

    It stays below 1.5 MB whatever it is of, and below 0.4 MB with names and texts as they mostly are. It takes about
    2 s, most of which go to the loading of the charts' libraries, and 0.2 ms more for each run; 150 MB of memory.

    Args:
        details: of the report's runs.
        made_at: shown in UTC.

    Raises:
        MissingHereError: the extra `report` is not installed.
    """
    require()
    # Not before: it needs the extra.
    from batchrun import report_drawn

    runs = [_run_row(row) for row in records(report.runs.tail(MOST_RUNS).iloc[::-1])]
    content = _Content(
        title="Spend report",
        of=_of(report),
        made_at=f"{made_at.astimezone(UTC):%Y-%m-%d %H:%M}",
        total=usd(report.totals["usd_spent"]),
        sources=[f"{source} {usd(report.totals[f'usd_{source}'])}" for source in ("reported", "estimated")],
        tiles=_tiles(report),
        figures=report_drawn.figures(report, details),
        runs=runs[:FIRST_RUNS],
        older=runs[FIRST_RUNS:],
        runs_note=_runs_note(report),
        top=_top(details.top),
        top_note=_more(len(details.top), MOST_ROWS, "rows are left out here"),
        scores=report_drawn.scores(report),
        evaluated=_evaluated(report),
        matrix=_matrix(report),
        notes=[name(note, 300) for note in report.notes[:MOST_NOTES]]
        + ([more] if (more := _more(len(report.notes), MOST_NOTES, "notes")) else []),
    )
    return _template().render(page=content, version=__version__, palette=PALETTE)


def require() -> None:
    """Look for what the charts need, and load nothing; to be called before anything is read.

    Raises:
        MissingHereError: the extra `report` is not installed.
    """
    needed = {"altair": "altair", "vl_convert": "vl-convert-python"}
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise MissingHereError(f"report --html: needs {', '.join(missing)}: pip install 'batchrun[report]'")


@cache
def _template() -> Template:
    loader = PackageLoader("batchrun", "page")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")


def _of(report: Report) -> str:
    runs = report.runs
    if not len(runs):
        return "No runs"
    jobs = list(dict.fromkeys(runs["job"]))
    named = ", ".join(name(job, 40) for job in jobs[:3]) + (f" and {len(jobs) - 3} more jobs" if len(jobs) > 3 else "")
    whole = f"{_counted(len(runs), 'run')} of {named}"
    known = runs["started_at"][runs["started_at"] != NO_TIME]
    if not len(known):
        return whole
    first, last = (f"{moment:%Y-%m-%d}" for moment in (known.min(), known.max()))
    return f"{whole}, {first if first == last else f'{first} to {last}'}"


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    totals = report.totals
    spent: Decimal = totals["usd_spent"]
    tiles = []
    if unknown := totals["unknown_attempts"]:
        most = totals["usd_unknown_at_most"]
        figure = f"at most {usd(most)}" if most is not None else "no upper bound"
        tiles.append(("Unknown cost", figure, f"{_counted(unknown, 'attempt')}; not in what was spent"))
    per_1000, per_ok = totals["usd_per_1000_rows"], totals["usd_per_ok_row"]
    if per_1000 is not None:
        note = f"{page_text.average(per_ok)} per row with an answer" if per_ok is not None else "no row has an answer"
        tiles.append(("Per 1,000 rows", page_text.average(per_1000), note))
    if under_way := totals["in_flight"]:
        most = totals["usd_in_flight_at_most"]
        figure = f"at most {usd(most)}" if most is not None else "no upper bound"
        tiles.append(("In flight", figure, f"{_counted(under_way, 'attempt')}; not in what was spent"))
    wasted: Decimal | None = totals["usd_wasted"]
    if wasted is not None:
        share = f"{wasted / spent:.1%} of what was spent: " if spent else ""
        tiles.append(("Wasted", usd(wasted), f"{share}failed attempts and repairs"))
    parts = [f"{totals[one]:,} {one}" for one in ("failed", "pending", "reused") if totals[one]]
    tiles.append(("Rows answered", f"{totals['ok']:,} of {totals['rows']:,}", " · ".join(parts)))
    parts = [f"{totals['cached_tokens']:,} of them cached", f"{totals['completion_tokens']:,} out"]
    tiles.append(("Tokens", f"{totals['prompt_tokens']:,} in", " · ".join(parts)))
    if len(report.runs):
        newest = records(report.runs.tail(1))[0]
        trend = page_text.percent(newest["change"]) if given(newest["change"]) is not None else "no run before it"
        against = f"{trend} per 1,000 rows" if given(newest["change"]) is not None else trend
        tiles.append(("Newest run", usd(newest["usd_spent"]), f"{name(newest['job'], 40)}: {against}"))
    return tiles


def _run_row(row: dict[str, Any]) -> RunRow:
    per_1000, change = given(row["usd_per_1000_rows"]), given(row["change"])
    sources = [
        f"{source} {usd(row[column])}"
        for source, column in (("reported", "usd_reported"), ("estimated", "usd_estimated"))
        if row[column]
    ]
    if row["unknown_attempts"]:
        most = given(row["usd_unknown_at_most"])
        figure = f" ≤ {usd(most)}" if most is not None else ""
        sources.append(f"unknown{figure} ({_counted(row['unknown_attempts'], 'attempt')})")
    if given(row["usd_wasted"]):
        sources.append(f"wasted {usd(row['usd_wasted'])}")
    counts = [f"{row[one]:,} {one}" for one in ("ok", "failed", "pending", "reused") if row[one] or one == "ok"]
    return RunRow(
        job=name(row["job"]),
        run_id=name(row["run_id"]),
        state="" if row["state"] == "finished" else name(row["state"], 20),
        reason=name(given(row["reason"]) or "", 160),
        started=f"{row['started_at']:%Y-%m-%d %H:%M}" if row["started_at"] != NO_TIME else "",
        took=page_text.took(row["seconds"]) if given(row["seconds"]) else "",
        model=name(row["model"]),
        rows=counts,
        tokens=[
            f"{row['prompt_tokens']:,} in",
            f"{row['completion_tokens']:,} out",
            *([f"{row['cached_tokens']:,} cached"] if row["cached_tokens"] else []),
        ],
        usd=usd(row["usd_spent"]),
        sources=sources,
        per_1000=page_text.average(per_1000) if per_1000 is not None else "",
        per_1000_exact=usd(per_1000) if per_1000 is not None else "",
        trend=page_text.percent(change) if change is not None else "",
        is_dearer=change is not None and change > 0,
    )


def _runs_note(report: Report) -> str:
    left = len(report.runs) - MOST_RUNS
    return f"The newest {MOST_RUNS} runs; {_counted(left, 'older run')} are in the totals only." if left > 0 else ""


def _top(shown: Sequence[CostlyRow]) -> list[TopRow]:
    most = min(_LONGEST_TEXT, _ALL_TEXTS // (2 * max(1, min(len(shown), MOST_ROWS))))
    return [
        TopRow(
            usd(one.spend.usd_spent),
            [
                name(one.job),
                f"row {one.spend.row:,}" if one.spend.row is not None else "a row that is gone",
                *([f"sample {one.spend.sample}"] if one.spend.sample else []),
                name(one.spend.model),
                _counted(one.spend.attempts, "attempt"),
                _counted(one.spend.total_tokens, "token"),
                f"run {name(one.spend.run_id, 40)}",
            ],
            page_text.cut(one.prompt, most) if one.prompt is not None else None,
            page_text.cut(one.answer, most) if one.answer is not None else None,
        )
        for one in shown[:MOST_ROWS]
    ]


def _evaluated(report: Report) -> Table | None:
    found = report_figures.evaluations(report)
    if not found:
        return None
    head = ["run", "right by", "right", "rows", "without readable answer", "left out", "$ per correct answer"]
    return Table(head, [_evaluated_row(one) for one in found])


def _evaluated_row(one: Evaluated) -> list[str]:
    document = one.document
    per_correct = document["usd_per_correct"]
    return [
        one.name,
        name(document["right_by"], 30),
        *(f"{document[key]:,}" for key in ("right", "rows", "unparsed")),
        f"{document['unanswered'] + document['without_expected']:,}",
        page_text.average(Decimal(str(per_correct))) if per_correct is not None else "not known",
    ]


def _matrix(report: Report) -> Matrix | None:
    for one in report_figures.evaluations(report):
        confusion = one.document["confusion"]
        if confusion is not None and confusion["matrix"] is not None:
            break
    else:
        return None
    labels = [name(label, 30) for label in confusion["labels"][:_MOST_CLASSES]]
    unparsed = confusion["unparsed"]
    head = [*labels, *(["(none)"] if any(unparsed) else [])]
    rows = []
    for place, (label, counts) in enumerate(zip(labels, confusion["matrix"], strict=False)):
        numbers = [*counts, *([unparsed[place]] if any(unparsed) else [])]
        whole = max(1, sum(numbers))
        cells = [
            Shade(number, -(-5 * number // whole), column == place) for column, number in enumerate(numbers)
        ]  # a fifth of a row or less is level 1
        rows.append((label, cells))
    return Matrix(one.name, head, rows)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _more(number: int, most: int, what: str) -> str:
    return f"… and {number - most:,} more {what}" if number > most else ""
