"""Stops a run whose rows fail, or do not parse, before it has spent what all of them cost."""

from __future__ import annotations

from collections import deque

from batchrun.errors import ExitCode, Stop

_LAST, _ENOUGH = 100, 50
"""Rows that are looked at, and from how many on they say something."""


class ErrorRate:
    """A breaker for the runner.

    Args:
        most: share of the last rows that may be bad.
        canary: rows that are asked and settled before any other; 0 for none.
    """

    def __init__(self, most: float, canary: int = 0) -> None:
        self._most = most
        self._canary = canary
        self._last: deque[bool] = deque(maxlen=max(_LAST, canary))
        self._settled = 0

    def note(self, *, fits: bool) -> Stop | None:
        """Take a row that is settled."""
        self._settled += 1
        self._last.append(fits)
        if self._settled < self._canary:
            return None
        rows = list(self._last) if self._settled == self._canary else list(self._last)[-_LAST:]
        if len(rows) < _ENOUGH and self._settled != self._canary:
            return None
        bad = rows.count(False)
        if bad <= self._most * len(rows):
            return None
        which = "first" if self._settled == self._canary else "last"
        return Stop(
            ExitCode.LIMIT,
            "error_rate",
            f"{bad} of the {which} {len(rows)} rows failed or did not parse, and max_error_rate is {self._most:g}; "
            "look at parse_error and error in the output",
        )

    def is_shut(self, drawn: int) -> bool:
        """True while the first rows are under way."""
        return drawn >= self._canary > self._settled
