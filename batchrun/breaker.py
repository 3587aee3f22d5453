"""Stops a run whose rows fail, or do not parse, before it has spent what all of them cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from fractions import Fraction

from batchrun.errors import ExitCode, Stop

_LAST, _ENOUGH = 100, 50
"""Rows that are looked at, and from how many on they say something."""


def looked_at(canary: int) -> int:
    """How many of the newest settled rows of a run a breaker must know of."""
    return max(_LAST, canary)


class ErrorRate:
    """A breaker for the runner.

    Args:
        most: share of the last rows that may be bad.
        canary: rows that are asked and settled before any other; 0 for none.
        earlier: what is known of the run's newest settled rows, oldest first: whether each is good.
    """

    def __init__(self, most: float, canary: int = 0, earlier: Sequence[bool] = ()) -> None:
        self._most = Fraction(repr(most))
        self._canary = canary
        self._last: deque[bool] = deque(earlier, maxlen=looked_at(canary))
        self._earlier = self._settled = len(earlier)
        # The run has stopped for this before: it may show that it has got better, row by row.
        self._is_on_trial = self._settled >= (canary or _ENOUGH) and self._is_over(earlier)

    def note(self, *, fits: bool) -> Stop | None:
        """Take a row that is settled."""
        self._settled += 1
        self._last.append(fits)
        if self._settled < self._canary:
            return None
        is_first = self._settled == self._canary
        rows = list(self._last) if is_first else list(self._last)[-_LAST:]
        if not self._is_over(rows):
            self._is_on_trial = False
            return None
        is_telling = not fits if self._is_on_trial else is_first or len(rows) >= _ENOUGH
        if not is_telling:
            return None
        return Stop(
            ExitCode.LIMIT,
            "error_rate",
            f"{rows.count(False)} of the {'first' if is_first else 'last'} {len(rows)} rows failed or did not parse, "
            f"and max_error_rate is {float(self._most):g}; look at parse_error and error in the output",
        )

    def is_shut(self, drawn: int) -> bool:
        """True while the first rows are under way. `drawn`: by this invocation."""
        return self._earlier + drawn >= self._canary > self._settled

    def _is_over(self, rows: Sequence[bool]) -> bool:
        return rows.count(False) > self._most * len(rows)
