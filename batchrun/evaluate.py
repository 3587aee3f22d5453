"""A run against its expected values: scores per row, and what they add up to, with intervals and by slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from batchrun.bill import Bill, per_text
from batchrun.confusion import (
    MOST_SLICE_CLASSES,
    MOST_SLICE_TUPLES,
    NONE,
    TOO_MANY,
    ClassCounts,
    Confusion,
    class_of,
    confusion,
)
from batchrun.intervals import Crossed, Measure, macro_f1, proportion
from batchrun.money import usd_text
from batchrun.scores import Scorer, decisive, is_stated, scored
from batchrun.tables import aligned, shown

UNANSWERED: Any = object()
"""In the place of the expected value of a row that failed or is pending: there is nothing to judge."""
_MOST_SLICES = 100
"""Values of one column."""
_MOST_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Group:
    """What a group of rows comes to: all of them, or a slice."""

    rows: int
    """With an expected value."""
    unparsed: int
    """Of these, without an answer: it counts as wrong."""
    right: int
    """By the metric that decides."""
    metrics: Mapping[str, Measure | None]
    """None: no row has it, or there are too many classes for F1."""
    usd: Decimal
    unknown_cost: int
    """Rows whose cost is not known, and not in `usd`."""
    usd_per_correct: Decimal | None
    """None if nothing is right, or a cost is not known."""

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "rows": self.rows,
            "unparsed": self.unparsed,
            "right": self.right,
            "metrics": {name: measure and measure.document() for name, measure in self.metrics.items()},
            "usd": self.usd,
            "unknown_cost": self.unknown_cost,
            "usd_per_correct": self.usd_per_correct,
        }


@dataclass(frozen=True, slots=True)
class Slices:
    """The rows by the values of one column."""

    groups: Mapping[str | None, Group]
    """By value, sorted; None for rows without one."""
    other_rows: int
    """Rows of values that came after the first hundred."""

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "values": [{"value": value, **group.document()} for value, group in self.groups.items()],
            "other_rows": self.other_rows,
        }

    def lines(self, column: str, metrics: Sequence[str]) -> list[str]:
        """A table of the largest slices, by some of the metrics."""
        ordered = sorted(self.groups.items(), key=lambda item: -item[1].rows)
        header = ["by " + shown(column, 20), "rows", *(f"{metric} (95 %)" for metric in metrics), "$ per correct"]
        rows = [
            [
                shown(NONE if value is None else value, 23),
                str(group.rows),
                *(str(group.metrics[metric] or "none") for metric in metrics),
                per_text(group.usd_per_correct),
            ]
            for value, group in ordered[:_MOST_SHOWN]
        ]
        lines = aligned([header, *rows])
        if left := len(ordered) - len(rows):
            lines.append(f"… and {left} more values")
        if self.other_rows:
            lines.append(f"… and {self.other_rows} rows of values after the first {_MOST_SLICES}")
        return lines


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a run came to."""

    right_by: str
    """The metric that decides whether a row is right."""
    whole: Group
    without_expected: int
    """Rows with nothing to compare with; they are in no other number."""
    unanswered: int
    """Rows that failed or are pending; they are in no other number either."""
    unusable: Mapping[str, int]
    """By metric: expected values that it cannot use (no pattern, no number), and searches that took too long."""
    confusion: Confusion | None
    """None without accuracy or F1, without rows, or with too many classes."""
    slices: Mapping[str, Slices]
    notes: Sequence[str]
    """What was left out."""

    def document(self) -> dict[str, Any]:
        """As plain values; dollars are exact decimals."""
        return {
            "right_by": self.right_by,
            **self.whole.document(),
            "without_expected": self.without_expected,
            "unanswered": self.unanswered,
            "unusable": dict(self.unusable),
            "confusion": self.confusion and self.confusion.document(),
            "slices": {column: slices.document() for column, slices in self.slices.items()},
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """A short text, at most 100 columns wide."""
        whole = self.whole
        lines = [f"evaluated: {whole.rows} rows, {whole.unparsed} of them without a readable answer"]
        if self.unanswered or self.without_expected:
            lines.append(
                f"left out: {self.unanswered} failed or pending, {self.without_expected} without an expected value"
            )
        for metric, measure in whole.metrics.items():
            text = f"{measure}, 95 % interval" if measure is not None else "none"
            if unusable := self.unusable.get(metric):
                text += f"; {unusable} rows could not be scored"
            lines.append(f"{metric}: {text}")
        lines.append(f"cost per correct answer: {self._cost()}")
        if self.confusion is not None:
            lines += self.confusion.lines()
        # The others are in the document: a table of all is for no terminal.
        chosen = [metric for metric in whole.metrics if metric in (self.right_by, "f1")]
        for column, slices in self.slices.items():
            lines += slices.lines(column, chosen)
        return [shown(line) for line in (*lines, *(f"note: {note}" for note in self.notes))]

    def _cost(self) -> str:
        whole = self.whole
        if whole.unknown_cost:
            return f"not known, as {whole.unknown_cost} rows have no known cost"
        if not whole.right:
            return f"none is right (${usd_text(whole.usd)} spent)"
        return f"{per_text(whole.usd_per_correct)} (${usd_text(whole.usd)} for {whole.right} right by {self.right_by})"


class Evaluator:
    """Takes settled rows batch by batch and keeps counts, never rows.

    Rows are taken as independent of each other: with several samples per row the interval of the single answers is too
    narrow, and that of their vote is right.

    Args:
        by: the columns to slice by; of each, the first hundred values.
    """

    def __init__(self, metrics: Sequence[str], by: Sequence[str]) -> None:
        self._metrics = metrics
        self._scorer = Scorer(scored(metrics) or [decisive(metrics)])
        self._has_classes = "accuracy" in metrics or "f1" in metrics
        self._without_expected = self._unanswered = 0
        self._unusable = dict.fromkeys(self._scorer.metrics, 0)
        self._whole = _Tally(self._scorer.metrics, ClassCounts() if self._has_classes else None)
        self._slices: dict[str, dict[str | None, _Tally]] = {column: {} for column in by}
        self._other_rows = dict.fromkeys(by, 0)

    def take(
        self,
        expected: Sequence[Any],
        answered: Sequence[Any],
        slices: Mapping[str, Sequence[Any]],
        usd: Sequence[Decimal | None],
    ) -> dict[str, list[float | None]]:
        """The next rows, as columns: their scores, by the name of the column (`score_names`).

        Args:
            expected: `UNANSWERED` for rows that have no answer to be judged.
            answered: None for what did not parse; it scores 0.
            slices: the columns to slice by.
            usd: None for a cost that is not known.
        """
        scores = []
        columns = [slices[column] for column in self._slices]
        for index, (wanted, said, cost) in enumerate(zip(expected, answered, usd, strict=True)):
            values = self._scorer.score(None if wanted is UNANSWERED else wanted, said)
            scores.append(values)
            if wanted is UNANSWERED:
                self._unanswered += 1
                continue
            if not is_stated(wanted):
                self._without_expected += 1
                continue
            for metric, value in zip(self._scorer.metrics, values, strict=True):
                self._unusable[metric] += value is None
            classes = (class_of(wanted), class_of(said)) if self._has_classes else ()
            row = _Row(values, is_stated(said), classes, cost)
            self._whole.take(row)
            self._slice([column[index] for column in columns], row)
        names = scored(self._metrics)
        return {f"score_{name}": [values[place] for values in scores] for place, name in enumerate(names)}

    def _slice(self, values: Sequence[Any], row: _Row) -> None:
        for (column, tallies), value in zip(self._slices.items(), values, strict=True):
            name = class_of(value)
            tally = tallies.get(name)
            if tally is None:
                if len(tallies) >= _MOST_SLICES:
                    self._other_rows[column] += 1
                    continue
                counts = ClassCounts(MOST_SLICE_CLASSES, MOST_SLICE_TUPLES) if "f1" in self._metrics else None
                tally = tallies[name] = _Tally(self._scorer.metrics, counts)
            tally.take(row)

    def evaluation(self) -> Evaluation:
        """Of all rows taken."""
        crossed = self._whole.crossed()
        return Evaluation(
            decisive(self._metrics),
            self._whole.group(self._metrics),
            self._without_expected,
            self._unanswered,
            {metric: number for metric, number in self._unusable.items() if number},
            confusion(crossed) if crossed is not None else None,
            {column: self._column(column) for column in self._slices},
            self._notes(),
        )

    def _column(self, column: str) -> Slices:
        tallies = sorted(self._slices[column].items(), key=lambda item: (item[0] is None, item[0] or ""))
        return Slices({value: tally.group(self._metrics) for value, tally in tallies}, self._other_rows[column])

    def _notes(self) -> list[str]:
        notes = []
        if self._whole.is_given_up:
            notes.append(f"no confusion matrix and no F1: {TOO_MANY}")
        for column, tallies in self._slices.items():
            if given_up := sum(tally.is_given_up for tally in tallies.values()):
                notes.append(f"no F1 in {given_up} slices by {shown(column, 40)}: they have too many classes")
        return notes


@dataclass(frozen=True, slots=True)
class _Row:
    scores: Sequence[float | None]
    is_parsed: bool
    classes: tuple[str | None, ...]
    usd: Decimal | None


class _Tally:
    """The counts of one group."""

    def __init__(self, metrics: Sequence[str], classes: ClassCounts | None) -> None:
        self._classes = classes
        self._metrics = metrics
        self._rows = 0
        self._unparsed = 0
        self._scored = [0] * len(metrics)
        self._right = [0] * len(metrics)
        self._bill = Bill()

    def take(self, row: _Row) -> None:
        """The next row."""
        self._rows += 1
        self._unparsed += not row.is_parsed
        self._bill.take(row.usd)
        for place, score in enumerate(row.scores):
            if score is not None:
                self._scored[place] += 1
                self._right[place] += score > 0
        if self._classes is not None:
            self._classes.take(row.classes)

    @property
    def is_given_up(self) -> bool:
        """Whether there are too many classes to count them."""
        return self._classes is not None and self._classes.is_given_up

    def crossed(self) -> Crossed | None:
        """Its counts of classes, if it has any."""
        return self._classes.crossed() if self._classes is not None else None

    def group(self, metrics: Sequence[str]) -> Group:
        """What they come to."""
        right = self._right[0]  # the first one is the one that decides
        return Group(
            self._rows,
            self._unparsed,
            right,
            {metric: self._measure(metric) for metric in metrics},
            self._bill.usd,
            self._bill.unknown,
            self._bill.per(right),
        )

    def _measure(self, metric: str) -> Measure | None:
        if metric == "f1":
            crossed = self.crossed()
            return macro_f1(crossed) if crossed is not None else None
        place = self._metrics.index(metric)
        return proportion(self._right[place], self._scored[place]) if self._scored[place] else None
