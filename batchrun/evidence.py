"""Tells a limit from chance by the share of requests that are refused."""

from __future__ import annotations

from math import log

_ENOUGH_FOR_CHANCE = log(20)


class Evidence:
    """Wald's sequential test of two shares of refusals, begun again whenever it finds for chance.

    Args:
        chance: share of refusals that means nothing.
        limit: share that means a limit.
        odds: how many times likelier a limit must be.
        since: only requests that are sent later count;
        before: so many are not.
    """

    def __init__(self, chance: float, limit: float, odds: float, since: float, before: int) -> None:
        self._by_refused = log(limit / chance)
        self._by_taken = log((1 - chance) / (1 - limit))
        self._enough = log(odds)
        self._begin(since, before)

    def _begin(self, since: float, before: int) -> None:
        self._since = since
        self._before = before
        self._refused = 0
        self._heard = 0

    def note(self, sent_at: float, latest: float, reached: int, *, is_refused: bool) -> bool:
        """Take an answer; True if there is a limit.

        Args:
            latest: when the latest request was sent that is answered.
            reached: requests sent up to then. For a limit, those that are under way count as taken: a refusal is often
                quick, and the first answers that come are no sample of what was sent.
        """
        if sent_at <= self._since:
            return False
        self._heard += 1
        self._refused += is_refused
        refused = self._refused * self._by_refused
        if is_refused:
            taken = max(self._heard, reached - self._before) - self._refused
            return refused - taken * self._by_taken > self._enough
        if (self._heard - self._refused) * self._by_taken - refused > _ENOUGH_FOR_CHANCE:
            self._begin(latest, reached)
        return False
