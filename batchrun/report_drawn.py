"""The figures of a page: charts with their words, and what they show as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from batchrun import report_charts, report_figures
from batchrun.page_text import usd
from batchrun.report import Report
from batchrun.report_charts import Drawing
from batchrun.report_figures import Line, Stack, Table
from batchrun.spend_details import Details

_PERCENTILES = ("half within", "95% within", "99% within")


@dataclass(frozen=True)
class Figure:
    """A chart with its words, and its figures as a table."""

    key: str
    title: str
    caption: str
    drawing: Drawing
    table: Table
    legend: Sequence[tuple[str, str, str]] = ()
    """Colour (as in the palette), sign, name."""

    @property
    def spoken(self) -> str:
        """For those who cannot see it."""
        return f"Chart: {self.title}. {self.caption} The figures follow as a table."


def figures(report: Report, details: Details) -> list[Figure]:
    """What was spent, on what, and how fast it was; those of which anything is known."""
    found = []
    dollars, tokens = report_figures.over_time(report)
    if dollars is not None:
        found.append(_over_time("spend", "Spend by model", dollars, is_usd=True))
    if tokens is not None:
        found.append(_over_time("tokens", "Tokens", tokens, is_usd=False))
    if steps := report_figures.steps(details):
        found.append(
            Figure(
                "costs", "Cost of a row", "Rows by what they cost, where all of it is known.",
                report_charts.histogram("costs", steps),
                Table(["$", "rows"], [[one.label, f"{one.rows:,}"] for one in steps]),
            )
        )  # fmt: skip
    if lines := report_figures.causes(details):
        found.append(
            Figure(
                "failures", "Failures by cause", "Attempts that brought no answer; most were asked again.",
                report_charts.bars("failures", lines), _table(lines, ["attempts"], "{:,}"),
            )
        )  # fmt: skip
    for key, title, is_first in (("latency", "Time to the answer", False), ("first", "Time to the first token", True)):
        if lines := report_figures.seconds(report, details, is_first=is_first):
            points = zip(report_charts.POINTS, _PERCENTILES, strict=True)
            found.append(
                Figure(
                    key, title, "Seconds, of the newest runs and models.", report_charts.ranges(key, lines),
                    _table(lines, list(_PERCENTILES), "{:.3f} s"),
                    [(colour, sign, text) for (colour, _, sign), text in points],
                )
            )  # fmt: skip
    if lines := report_figures.budgets(report):
        found.append(
            Figure(
                "budgets", "Spend against budget", "Of the newest runs that have one; the mark is the budget.",
                report_charts.shares("budgets", lines), _table(lines, ["used"], "{:.1%}"),
            )
        )  # fmt: skip
    return found


def _over_time(key: str, title: str, stack: Stack, *, is_usd: bool) -> Figure:
    def text(value: Decimal) -> str:
        return usd(value) if is_usd else f"{value:,}"

    caption = f"By {stack.unit} (UTC), {stack.years}; {text(stack.total)} in all."
    if stack.not_drawn:
        caption += f" {text(stack.not_drawn)} more, of earlier or unknown times, are not drawn."
    # In the order of the drawing, where the first lies at the bottom.
    legend = [(f"series-{place + 1}", "■", series) for place, series in enumerate(stack.series)]
    rows = [
        [bucket, *(text(value) for value in values), text(sum(values, Decimal(0)))]
        for bucket, values in zip(stack.buckets, stack.values, strict=True)
        if any(values)
    ]
    drawing = report_charts.stacked(key, stack, is_usd=is_usd)
    return Figure(key, title, caption, drawing, Table([stack.unit, *stack.series, "all"], rows), legend)


def _table(lines: Sequence[Line], head: list[str], form: str) -> Table:
    return Table(
        ["", *head],
        [[line.name, *("" if value is None else form.format(value) for value in line.values)] for line in lines],
    )


def scores(report: Report) -> list[Figure]:
    """How right the answers were, by metric."""
    return [
        Figure(
            f"metric-{place}", metric.name, "With 95% intervals; of the newest runs that were evaluated.",
            report_charts.intervals(f"metric-{place}", metric),
            _table(metric.lines, ["value", "from", "to"], "{:.4f}"),
        )
        for place, metric in enumerate(report_figures.metrics(report))
    ]  # fmt: skip
