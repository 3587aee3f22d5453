"""Which classes are taken for which: counted in bounded memory, shown as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from batchrun.intervals import ClassMeasure, Crossed, by_class, matrix
from batchrun.scores import as_text, is_stated
from batchrun.tables import WIDTH, aligned, columns, shown

NONE = "(none)"
"""How a missing value is shown: an answer that did not parse, an empty cell."""
_MOST_CLASSES, _MOST_TUPLES = 1_000, 10_000
MOST_SLICE_CLASSES, MOST_SLICE_TUPLES = 100, 500
TOO_MANY = f"there are more than {_MOST_CLASSES} classes, or {_MOST_TUPLES} ways of taking one for another"
_MOST_IN_MATRIX, _MOST_MEASURED, _MOST_SHOWN = 50, 200, 20
_LONGEST_NAME = 100


def class_of(value: Any) -> str | None:
    """The class that a value names; None if it names none. A long text keeps its beginning and a hash."""
    if not is_stated(value):
        return None
    name = as_text(value)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:80]}… {blake2b(name.encode(errors='surrogatepass'), digest_size=8).hexdigest()}"


class ClassCounts:
    """Counts rows by their classes: the expected, then an answer or two (None: did not parse).

    With more classes or tuples of them than it may hold it gives up, whatever their order.
    """

    def __init__(self, most_classes: int = _MOST_CLASSES, most_tuples: int = _MOST_TUPLES) -> None:
        self.is_given_up = False
        self._most_classes = most_classes
        self._most_tuples = most_tuples
        self._names: set[str] = set()
        self._rows: dict[tuple[str | None, ...], int] = {}

    def take(self, classes: tuple[str | None, ...]) -> None:
        """The next row."""
        if self.is_given_up:
            return
        rows = self._rows.get(classes, 0)
        self._rows[classes] = rows + 1
        if rows:
            return
        self._names.update(name for name in classes if name is not None)
        if len(self._names) > self._most_classes or len(self._rows) > self._most_tuples:
            self.is_given_up = True
            self._names.clear()
            self._rows.clear()

    def crossed(self) -> Crossed | None:
        """What was counted, in the order of the names; None if nothing was, or too much."""
        if not self._rows:
            return None
        names = sorted(self._names)
        codes: dict[str | None, int] = {name: code for code, name in enumerate(names)} | {None: -1}
        rows = sorted((tuple(codes[name] for name in classes), number) for classes, number in self._rows.items())
        return Crossed(names, [classes for classes, _ in rows], [number for _, number in rows])


@dataclass(frozen=True, slots=True)
class Confusion:
    """The confusion matrix, and how well each class is found."""

    labels: Sequence[str]
    """Sorted: all classes that were expected or answered."""
    counts: Sequence[Sequence[int]] | None
    """Rows of the expected classes, columns of the answered ones; None beyond 50 classes."""
    unparsed: Sequence[int]
    """Of each expected class, the answers that did not parse; none beyond 50 classes."""
    measures: Sequence[ClassMeasure]
    """By label; none beyond 200 classes."""

    def document(self) -> dict[str, Any]:
        """As plain values."""
        has_matrix = self.counts is not None
        return {
            "classes": len(self.labels),
            "labels": list(self.labels) if has_matrix else None,
            "matrix": [list(row) for row in self.counts] if self.counts is not None else None,
            "unparsed": list(self.unparsed) if has_matrix else None,
            "by_class": [measure.document() for measure in self.measures] or None,
        }

    def lines(self) -> list[str]:
        """The matrix, as far as a terminal has room for it, and the classes."""
        return [*self._matrix_lines(), *self._class_lines()]

    def _matrix_lines(self) -> list[str]:
        if self.counts is None:
            return [
                f"confusion matrix: {len(self.labels)} classes are more than the {_MOST_IN_MATRIX} that it may have"
            ]
        has_unparsed = any(self.unparsed)
        names = [shown(label, 20) for label in self.labels]
        header = ["expected ↓ answered →", *names, *([NONE] if has_unparsed else [])]
        rows = [
            [name, *map(str, row), *([str(number)] if has_unparsed else [])]
            for name, row, number in zip(names, self.counts, self.unparsed, strict=True)
        ]
        lines = aligned([header, *rows])
        if max(map(columns, lines)) > WIDTH:
            return [f"confusion matrix: {len(self.labels)} classes do not fit here; the summary in JSON has it"]
        return lines

    def _class_lines(self) -> list[str]:
        if not self.measures:
            return [f"by class: {len(self.labels)} classes are more than the {_MOST_MEASURED} that are listed"]
        most = sorted(self.measures, key=lambda measure: -measure.support)[:_MOST_SHOWN]
        chosen = [measure for measure in self.measures if measure in most]
        lines = aligned(
            [
                ["class", "precision", "recall", "f1", "rows"],
                *(
                    [
                        shown(one.name, 50),
                        *(f"{value:.3f}" for value in (one.precision, one.recall, one.f1)),
                        str(one.support),
                    ]
                    for one in chosen
                ),
            ]
        )
        left = len(self.measures) - len(chosen)
        return [*lines, f"… and {left} more classes"] if left else lines


def confusion(crossed: Crossed) -> Confusion:
    """The matrix of tuples of two: what was expected, what was answered."""
    size = len(crossed.names)
    rows = matrix(crossed) if size <= _MOST_IN_MATRIX else None
    return Confusion(
        crossed.names,
        [row[:-1] for row in rows] if rows is not None else None,
        [row[-1] for row in rows or ()],
        by_class(crossed) if size <= _MOST_MEASURED else [],
    )
