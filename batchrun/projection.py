"""From a few rows to all of them: what is still to come, with a 90 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import NormalDist, fmean, stdev
from typing import Any

from batchrun.money import usd_text

_Z = NormalDist().inv_cdf(0.95)
# Student's t at 0.95 for 1 and 2 degrees of freedom, where the series below is too coarse.
_FEW = {1: 6.313752, 2: 2.919986}


@dataclass(frozen=True, slots=True)
class Interval:
    """The likely value, and the ends of the interval that holds it with 90 %."""

    low: float
    likely: float
    high: float

    def plus(self, known: float) -> Interval:
        """With what is certain already."""
        return Interval(self.low + known, self.likely + known, self.high + known)

    def times(self, factor: float) -> Interval:
        """In another measure."""
        return Interval(self.low * factor, self.likely * factor, self.high * factor)


def project(values: Sequence[float], remaining: int) -> Interval | None:
    """The sum over `remaining` further rows, from the values of rows drawn at random; None from fewer than two.

    The interval is that of a prediction: the mean is uncertain, and the further rows vary for themselves.

    >>> project([2.0, 2.0, 2.0], 10)
    Interval(low=20.0, likely=20.0, high=20.0)
    """
    number = len(values)
    if number < 2:
        return None
    likely = fmean(values) * remaining
    # stdev loses digits to nothing worse than rounding, and a constant must have none.
    spread = stdev(values) if min(values) != max(values) else 0.0
    margin = _student(number - 1) * spread * math.sqrt(remaining * (remaining + number) / number)
    return Interval(max(0.0, likely - margin), likely, likely + margin)


def _student(degrees: int) -> float:
    """Student's t at 0.95, by the Cornish-Fisher series (Abramowitz and Stegun 26.7.5)."""
    if degrees in _FEW:
        return _FEW[degrees]
    z = _Z
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


@dataclass(frozen=True, slots=True)
class Projection:
    """What a whole run will take.

    Attributes:
        rows: that it is derived from.
        usd: of the run; None if the cost of those rows is not known.
        total_tokens: of the run.
        seconds: that the rest of it will take.
    """

    rows: int
    usd: Interval | None
    total_tokens: Interval | None
    seconds: Interval | None

    def document(self) -> dict[str, Any]:
        """As plain values, dollars rounded."""
        return {
            "rows": self.rows,
            "usd": self.usd and dollars(self.usd),
            "total_tokens": self.total_tokens and rounded(self.total_tokens),
            "seconds": self.seconds and rounded(self.seconds),
        }

    def lines(self) -> list[str]:
        """A short text."""
        parts = []
        if self.usd is not None:
            low, likely, high = map(usd_text, dollars(self.usd).values())
            parts.append(f"${likely} (${low} to ${high})")
        for interval, unit in ((self.total_tokens, "tokens"), (self.seconds, "s left")):
            if interval is not None:
                parts.append(f"{interval.likely:.0f} {unit} ({interval.low:.0f} to {interval.high:.0f})")
        if not parts:
            return ["projection: too few answers"]
        return [f"projection for the whole run, from {self.rows} rows, with 90 % intervals: {', '.join(parts)}"]


def rounded(interval: Interval) -> dict[str, int]:
    """Whole tokens or seconds, by name."""
    return {name: round(getattr(interval, name)) for name in Interval.__slots__}


def dollars(interval: Interval) -> dict[str, Decimal]:
    """Dollars by name: to a hundredth of a cent, or to two digits where they are fewer."""
    return {name: _dollars(getattr(interval, name)) for name in Interval.__slots__}


def _dollars(value: float) -> Decimal:
    return Decimal(f"{value:.4f}" if value >= 0.01 or not value else f"{value:.2g}")
