"""Values with their 95 % intervals, by scikit-learn and scipy: the only room that knows them.

Everything is derived from counts, never from rows. The two are heavy (3 s, 180 MB), and loaded when the first value is
asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from batchrun.errors import MissingHereError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Weights = NDArray[np.int64]

_Z = 1.959963984540054
"""Of 95 %."""
_RESAMPLES = 2_000
_SEED = 20_260_101
_CELLS_AT_ONCE = 1_000_000


@dataclass(frozen=True, slots=True)
class Measure:
    """A value, and the ends of the interval that holds the true one with 95 %."""

    value: float
    low: float
    high: float

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two paired values are apart, with the 95 % interval, and the p value of their being the same."""

    value: float
    low: float
    high: float
    p_value: float

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {"value": self.value, "low": self.low, "high": self.high, "p_value": self.p_value}

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f}), p = {self.p_value:.2g}"


@dataclass(frozen=True, slots=True)
class ClassMeasure:
    """How well one class is found. A quotient by nothing is 0, as in scikit-learn."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    """Rows that are expected to be of it."""

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Crossed:
    """Distinct tuples of classes (the expected, then an answer or two), each with its number of rows.

    A class is an index in `names`; an answer that did not parse is -1.
    """

    names: Sequence[str]
    tuples: Sequence[tuple[int, ...]]
    rows: Sequence[int]


def require(metrics: Sequence[str]) -> None:
    """Look for what `metrics` need, and load nothing; to be called before anything is paid for.

    Raises:
        MissingHereError: the extra `evaluate` is not installed.
    """
    needed = {"numpy": "numpy", "scipy": "scipy", "sklearn": "scikit-learn"}
    if "regex" in metrics:
        needed["regex"] = "regex"
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise MissingHereError(f"evaluate: needs {', '.join(missing)}: pip install 'batchrun[evaluate]'")


def proportion(right: int, rows: int) -> Measure:
    """A share of rows, with Wilson's score interval."""
    from scipy.stats import binomtest

    value = right / rows
    interval = binomtest(right, rows).proportion_ci(method="wilson")
    # At the ends it misses the value by a rounding.
    return Measure(value, min(float(interval.low), value), max(float(interval.high), value))


def paired_proportions(gained: int, lost: int, rows: int) -> Difference:
    """The change of a share between two answers to the same rows, from those that went right and those that went wrong.

    The p value is McNemar's exact one. The interval is Wald's with half a row more in each of the four cells (Agresti
    and Min, 2005, Statistics in Medicine 24, 729-740): it stays honest where few rows change, or none.
    """
    from scipy.stats import binomtest

    changed = gained + lost
    p_value = float(binomtest(gained, changed).pvalue) if changed else 1.0
    up, down = (gained + 0.5) / (rows + 2), (lost + 0.5) / (rows + 2)
    margin = _Z * math.sqrt((up + down - (up - down) ** 2) / (rows + 2))
    low, high = max(-1.0, up - down - margin), min(1.0, up - down + margin)
    value = (gained - lost) / rows
    return Difference(value, min(low, value), max(high, value), p_value)


def by_class(crossed: Crossed) -> list[ClassMeasure]:
    """Precision, recall, F1 and support of each class."""
    from sklearn.metrics import precision_recall_fscore_support

    expected, answered = zip(*crossed.tuples, strict=True)
    columns = precision_recall_fscore_support(
        expected, answered, labels=range(len(crossed.names)), sample_weight=crossed.rows, zero_division=0
    )
    return [
        ClassMeasure(name, float(precision), float(recall), float(f1), int(support))
        for name, precision, recall, f1, support in zip(crossed.names, *columns, strict=True)
    ]


def matrix(crossed: Crossed) -> list[list[int]]:
    """Rows of the expected classes; columns of the answered ones, and a last one of answers that did not parse."""
    from sklearn.metrics import confusion_matrix

    expected, answered = zip(*crossed.tuples, strict=True)
    labels = [*range(len(crossed.names)), -1]
    counts = confusion_matrix(expected, answered, labels=labels, sample_weight=crossed.rows)
    return [[int(number) for number in row] for row in counts[:-1]]


def macro_f1(crossed: Crossed) -> Measure:
    """The mean F1 of all classes that were expected or answered, with the bootstrap's percentiles."""
    resampled = _Resampled(crossed)
    value = resampled.value(1)
    low, high = _ends(resampled.draw(1), value)
    return Measure(value, low, high)


def paired_f1(crossed: Crossed) -> tuple[float, float, Difference]:
    """The macro F1 of the first answers and of the second, and what they differ, by a bootstrap of whole rows."""
    import numpy as np

    resampled = _Resampled(crossed)
    first, second = resampled.value(1), resampled.value(2)
    apart = resampled.draw(2) - resampled.draw(1)
    low, high = _ends(apart, second - first)
    # The resamples on the far side of no difference, twice; one more, so that it is never 0.
    tail = min(np.count_nonzero(apart <= 0), np.count_nonzero(apart >= 0))
    p_value = min(1.0, 2 * (int(tail) + 1) / (_RESAMPLES + 1))
    return first, second, Difference(second - first, low, high, p_value)


def _ends(draws: Floats, value: float) -> tuple[float, float]:
    """The middle 95 % of the draws, widened to hold the value: with few rows of a class it may lie beside them."""
    import numpy as np

    low, high = np.percentile(draws, [2.5, 97.5])
    return min(float(low), value), max(float(high), value)


class _Resampled:
    """Macro F1 of the rows, and of rows drawn from them with replacement.

    How often each tuple of classes is drawn is multinomial: so no row is needed. The seed is fixed: the same counts
    give the same interval, and two answers see the same draws.
    """

    def __init__(self, crossed: Crossed) -> None:
        import numpy as np

        self._codes = np.array(crossed.tuples)
        self._rows = np.array(crossed.rows, dtype=np.int64)
        self._classes = len(crossed.names)

    def value(self, column: int) -> float:
        """Of the rows themselves; `column`: the answer in the tuple."""
        from sklearn.metrics import precision_recall_fscore_support

        expected, answered = self._codes[:, 0], self._codes[:, column]
        present = sorted({int(code) for code in (*expected, *answered) if code >= 0})
        _, _, f1, _ = precision_recall_fscore_support(
            expected, answered, labels=present, sample_weight=self._rows, average="macro", zero_division=0
        )
        return float(f1)

    def draw(self, column: int) -> Floats:
        """Of each resample."""
        import numpy as np

        expected, answered = self._codes[:, 0], self._codes[:, column]
        expects, answers, right = (
            self._membership(codes, held)
            for codes, held in ((expected, expected >= 0), (answered, answered >= 0), (expected, expected == answered))
        )
        values = []
        for weights in self._draws():
            total = weights @ expects + weights @ answers
            f1 = np.divide(2.0 * (weights @ right), total, out=np.zeros(total.shape), where=total > 0)
            values.append(f1.sum(axis=1) / np.count_nonzero(total, axis=1))
        return np.concatenate(values)

    def _draws(self) -> Iterator[Weights]:
        import numpy as np

        chance = np.random.default_rng(_SEED)
        rows = int(self._rows.sum())
        at_once = max(1, _CELLS_AT_ONCE // len(self._rows))
        for start in range(0, _RESAMPLES, at_once):
            yield chance.multinomial(rows, self._rows / rows, size=min(at_once, _RESAMPLES - start))

    def _membership(self, codes: NDArray[Any], held: NDArray[Any]) -> Any:
        """Tuples × classes, sparse: 1 where the tuple counts for the class."""
        import numpy as np
        from scipy.sparse import csr_array

        where = np.flatnonzero(held)
        return csr_array((np.ones(len(where), dtype=np.int64), (where, codes[where])), (len(codes), self._classes))
