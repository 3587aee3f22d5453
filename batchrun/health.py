"""Tells from what comes back whether the provider is there, and whether the job can work at all."""

from __future__ import annotations

import re

from batchrun.errors import ExitCode, Stop
from batchrun.records import Action, Exchange, Failure, Request, Slot

_FIRST = 20
"""Attempts or rows that must not all fail alike at the start of a run."""
_SHORTEST_OUTAGE = 60.0
_ROWS_OWN = ("bad_request", "not_found", "forbidden", "redirect", "malformed", "timeout", "disconnect")


class Health:
    """Tells an outage or a job that cannot work from rows that fail each for itself."""

    def __init__(self, max_attempts: int, max_seconds: float, now: float) -> None:
        self._max_attempts = max_attempts
        self._max_seconds = max_seconds
        self._last_success = now
        self._failed_since = 0
        self._walls: set[Slot] = set()
        self._refused_in_a_row = 0
        self._attempts = 0
        self._only_unreachable = True
        self._rejected: dict[str, set[str]] = {}
        """The words in which each model has refused rows; the empty ones for a row that it has not."""
        self._settled_rows: dict[str, int] = {}

    def note(self, model: str, exchange: Exchange, now: float, tries: int) -> Stop | None:
        """Take an exchange; a Stop if the provider seems to be gone. `tries`: of this row, in this invocation."""
        self._attempts += 1
        failure = exchange.failure
        if failure is None or (failure.action is Action.REJECT and failure.kind in _ROWS_OWN):
            # An answer, or a refusal of this very row: the provider is there.
            if failure is None:
                self._rejected.setdefault(model, set()).add("")
            self._settled_rows[model] = self._settled_rows.get(model, 0) + 1
            self._last_success, self._failed_since, self._only_unreachable = now, 0, False
            self._walls.clear()
            self._refused_in_a_row = 0
            return None
        self._failed_since += 1
        self._refused_in_a_row = self._refused_in_a_row + 1 if failure.action is Action.REJECT else 0
        if self._refused_in_a_row >= _FIRST:
            # A server in trouble that forbids retries would use up row after row.
            return Stop(ExitCode.PROVIDER, "outage", f"{_FIRST} rows in a row: {failure}; run again later")
        self._only_unreachable = self._only_unreachable and failure.kind == "connect"
        if self._only_unreachable and (self._attempts >= _FIRST or tries >= self._max_attempts):
            return Stop(
                ExitCode.PROVIDER,
                "unreachable",
                f"the provider cannot be reached: {failure.message}; if its address is right, run again later",
            )
        silence = now - self._last_success
        if self._failed_since > 1 and silence >= max(self._max_seconds, _SHORTEST_OUTAGE):
            return Stop(ExitCode.PROVIDER, "outage", f"no answer for {silence:.0f} s: {failure}; run again later")
        return None

    def note_wall(self, request: Request) -> int:
        """Take a row that may not wait for as long as it is told; how many such rows there were since an answer."""
        self._walls.add(request.slot)
        return len(self._walls)

    def has_answered_since(self, moment: float | None) -> bool:
        """True if any row was answered or refused after a moment by the clock."""
        return moment is not None and self._last_success > moment

    def note_rejected(self, model: str, failure: Failure) -> Stop | None:
        """Take a refused row; a Stop if the first rows of its model were all refused in the same words."""
        settled, words = self._settled_rows.get(model, 0), self._rejected.setdefault(model, set())
        if settled <= _FIRST:
            words.add(re.sub(r"\d+", "#", f"{failure.kind} {failure.message}"))
        if settled == _FIRST and len(words) == 1:
            return Stop(ExitCode.PROVIDER, "refused", f"the first {_FIRST} rows of {model} were all refused: {failure}")
        return None
