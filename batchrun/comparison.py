"""Two runs over the same rows: what changed, whether it is more than chance, and what each took."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from batchrun.bill import Bill, per_text
from batchrun.confusion import TOO_MANY, ClassCounts, class_of
from batchrun.intervals import Difference, paired_f1, paired_proportions
from batchrun.money import usd_text
from batchrun.scores import Scorer, decisive, identity, is_stated, scored
from batchrun.tables import aligned, shown

_FIRST_ROWS, _SHOWN_ROWS = 20, 10
_STEP = math.log(1.001)
"""Latencies are counted in steps of 0.1 %: a quantile is exact to half of one, without its rows or any chance."""
_SHORTEST_SECONDS = 1e-6

Row = int | str
"""A row's number, or its id."""


@dataclass(frozen=True, slots=True)
class Paired:
    """One metric of both runs, over the rows that have it in both."""

    rows: int
    a: float
    b: float
    difference: Difference
    """B − A."""

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {"rows": self.rows, "a": self.a, "b": self.b, "difference": self.difference.document()}


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rows, and the first twenty."""

    number: int
    first: Sequence[Row]

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {"number": self.number, "first": list(self.first)}

    def __str__(self) -> str:
        if not self.number:
            return "0 rows"
        more = ", …" if self.number > _SHOWN_ROWS else ""
        return f"{self.number} rows ({', '.join(map(str, self.first[:_SHOWN_ROWS]))}{more})"


@dataclass(frozen=True, slots=True)
class Side:
    """What one of the runs took for the rows compared."""

    unparsed: int
    usd: Decimal
    unknown_cost: int
    """Rows whose cost is not known, and not in `usd`."""
    usd_per_correct: Decimal | None
    """Over the rows with an expected value; None if nothing is right, or a cost is not known."""
    median_seconds: float | None
    p95_seconds: float | None

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Compared:
    """What two runs differ in."""

    rows: int
    unanswered: int
    """Of these, failed or pending in one of the runs: they count for dollars and seconds alone."""
    changed: Rows
    """Rows whose answers differ; without an expected value too."""
    right_by: str
    """The metric that says whether an answer is right."""
    metrics: Mapping[str, Paired | None]
    """None: no row has it in both runs, or there are too many classes for F1."""
    gained: Rows
    """Wrong in A, right in B."""
    lost: Rows
    """Right in A, wrong in B."""
    a: Side
    b: Side
    notes: Sequence[str]
    """What was left out."""

    @property
    def agreement(self) -> float | None:
        """The share of answered rows with the same answer; None without any."""
        answered = self.rows - self.unanswered
        return (answered - self.changed.number) / answered if answered else None

    def document(self) -> dict[str, Any]:
        """As plain values; dollars are exact decimals."""
        return {
            "rows": self.rows,
            "unanswered": self.unanswered,
            "agreement": self.agreement,
            "changed": self.changed.document(),
            "right_by": self.right_by,
            "metrics": {name: paired and paired.document() for name, paired in self.metrics.items()},
            "wrong_to_right": self.gained.document(),
            "right_to_wrong": self.lost.document(),
            "a": self.a.document(),
            "b": self.b.document(),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """A short text, at most 100 columns wide."""
        rows = [["", "A", "B", "B − A, 95 % interval"]]
        for name, paired in self.metrics.items():
            if paired is None:
                rows.append([name, "none", "none", ""])
            else:
                rows.append([name, f"{paired.a:.3f}", f"{paired.b:.3f}", str(paired.difference)])
        rows += self._sides()
        left_out = f", {self.unanswered} of them failed or pending in one, and not judged" if self.unanswered else ""
        lines = [f"compared: {self.rows} rows{left_out}", f"changed answers: {self.changed}"]
        if any(self.metrics.values()):
            lines += [
                f"wrong → right by {self.right_by}: {self.gained}",
                f"right → wrong by {self.right_by}: {self.lost}",
            ]
        return [shown(line) for line in (*lines, *aligned(rows), *(f"note: {note}" for note in self.notes))]

    def _sides(self) -> list[list[str]]:
        sides = (self.a, self.b)
        rows = [
            ["dollars", *(usd_text(side.usd) for side in sides), f"{self.b.usd - self.a.usd:+f}"],
            ["$ per correct", *(per_text(side.usd_per_correct) for side in sides), ""],
            ["median seconds", *(_seconds(side.median_seconds) for side in sides), ""],
            ["p95 seconds", *(_seconds(side.p95_seconds) for side in sides), ""],
            ["no answer", *(str(side.unparsed) for side in sides), ""],
        ]
        if self.a.unknown_cost or self.b.unknown_cost:
            rows.append(["unknown cost", *(str(side.unknown_cost) for side in sides), ""])
        return rows


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


class Comparison:
    """Takes pairs of rows that stand for the same question, and keeps counts, never rows."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self._metrics = metrics
        self._scorer = Scorer(scored(metrics) or [decisive(metrics)])
        self._rows = self._unanswered = 0
        # By metric: how many pairs are (A wrong or right, B wrong or right).
        self._pairs: dict[str, Counter[tuple[bool, bool]]] = {metric: Counter() for metric in self._scorer.metrics}
        self._classes = ClassCounts()
        self._crossed_rows = 0
        self._changed, self._gained, self._lost = _Rows(), _Rows(), _Rows()
        self._a, self._b = _Side(), _Side()

    def take(
        self,
        row: Row,
        expected: Any,
        answered_a: Any,
        answered_b: Any,
        is_answered: bool,
        usd_a: Decimal | None,
        usd_b: Decimal | None,
        latency_a: float | None,
        latency_b: float | None,
    ) -> None:
        """The next pair.

        Args:
            answered_a, answered_b: None for what did not parse.
            is_answered: False if a row failed or is pending in one of the runs: it is not judged.
            latency_a, latency_b: seconds.
        """
        self._rows += 1
        self._a.take(usd_a, latency_a)
        self._b.take(usd_b, latency_b)
        if not is_answered:
            self._unanswered += 1
            return
        scores_a, scores_b = self._scorer.score(expected, answered_a), self._scorer.score(expected, answered_b)
        is_expected = is_stated(expected)
        for side, answered, scores, usd in (
            (self._a, answered_a, scores_a, usd_a), (self._b, answered_b, scores_b, usd_b),
        ):  # fmt: skip
            side.take_answer(answered)
            if is_expected:
                side.take_score(scores[0], usd)
        if _answer(answered_a) != _answer(answered_b):
            self._changed.take(row)
        for metric, one, other in zip(self._scorer.metrics, scores_a, scores_b, strict=True):
            if one is not None and other is not None:
                self._pairs[metric][one > 0, other > 0] += 1
        if (scores_a[0], scores_b[0]) == (0.0, 1.0):
            self._gained.take(row)
        elif (scores_a[0], scores_b[0]) == (1.0, 0.0):
            self._lost.take(row)
        if "f1" in self._metrics and is_expected:
            self._crossed_rows += 1
            self._classes.take((class_of(expected), class_of(answered_a), class_of(answered_b)))

    def result(self) -> Compared:
        """Of all pairs taken."""
        is_given_up = self._classes.is_given_up
        return Compared(
            self._rows,
            self._unanswered,
            self._changed.rows(),
            decisive(self._metrics),
            {metric: self._paired(metric) for metric in self._metrics},
            self._gained.rows(),
            self._lost.rows(),
            self._a.side(),
            self._b.side(),
            [f"no F1: {TOO_MANY}"] if is_given_up else [],
        )

    def _paired(self, metric: str) -> Paired | None:
        if metric == "f1":
            crossed = self._classes.crossed()
            return Paired(self._crossed_rows, *paired_f1(crossed)) if crossed is not None else None
        pairs = self._pairs[metric]
        rows = pairs.total()
        if not rows:
            return None
        both, gained, lost = pairs[True, True], pairs[False, True], pairs[True, False]
        return Paired(rows, (both + lost) / rows, (both + gained) / rows, paired_proportions(gained, lost, rows))


def _answer(value: Any) -> Any:
    return identity(value) if is_stated(value) else None


@dataclass(slots=True)
class _Rows:
    number: int = 0
    first: list[Row] = field(default_factory=list)

    def take(self, row: Row) -> None:
        self.number += 1
        if len(self.first) < _FIRST_ROWS:
            self.first.append(row)

    def rows(self) -> Rows:
        return Rows(self.number, tuple(self.first))


class _Side:
    """What one run took, so far."""

    def __init__(self) -> None:
        self._unparsed = 0
        self._right = 0
        self._bill = Bill()
        self._expected_bill = Bill()
        self._latencies: Counter[int] = Counter()

    def take(self, usd: Decimal | None, latency: float | None) -> None:
        """The next row of it."""
        self._bill.take(usd)
        if latency is not None:
            self._latencies[round(math.log(max(latency, _SHORTEST_SECONDS)) / _STEP)] += 1

    def take_answer(self, answered: Any) -> None:
        """That row has an answer in both."""
        self._unparsed += not is_stated(answered)

    def take_score(self, score: float | None, usd: Decimal | None) -> None:
        """That row has an expected value."""
        self._right += score == 1
        self._expected_bill.take(usd)

    def side(self) -> Side:
        """All of it."""
        return Side(
            self._unparsed,
            self._bill.usd,
            self._bill.unknown,
            self._expected_bill.per(self._right),
            self._quantile(0.5),
            self._quantile(0.95),
        )

    def _quantile(self, share: float) -> float | None:
        """The smallest latency that at least this share of rows does not exceed."""
        left = share * self._latencies.total()
        for step, rows in sorted(self._latencies.items()):
            left -= rows
            if left <= 0:
                return math.exp(step * _STEP)
        return None
