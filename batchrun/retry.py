"""Whether and when a failed attempt is tried again: one tenacity policy.

tenacity decides; the waiting is the runner's, so that a row that waits holds neither a slot nor a connection.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tenacity import DoSleep, RetryCallState, Retrying, retry_if_result
from tenacity.stop import stop_base
from tenacity.wait import wait_base, wait_random_exponential

from batchrun.records import Action, Exchange

_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 60.0
_TRUSTED = 20
"""Attempts after which a row backs off more than it is told: "at once" may be said for ever."""


class Retries:
    """The policy; one for all rows.

    Args:
        max_attempts: attempts a row may take. Rate limits and a server that cannot be reached are not counted.
        max_seconds: from the row's first attempt.
        clock: seconds, monotonic.
    """

    def __init__(self, max_attempts: int, max_seconds: float, clock: Callable[[], float]) -> None:
        self._max_seconds = max_seconds
        self._clock = clock
        self._policy = Retrying(
            retry=retry_if_result(_asks_for_retry),
            wait=_ToldOrBackoff(),
            stop=_Bounds(max_attempts, max_seconds, clock),
            retry_error_callback=lambda state: None,
        )
        self._policy.begin()

    def begin(self, started: float) -> RetryCallState:
        """The state of a row whose first attempt began at `started` and has just failed."""
        state = RetryCallState(self._policy, fn=None, args=(), kwargs={})
        state.start_time = started
        state.paced = 0  # type: ignore[attr-defined]  # attempts that do not count
        return state

    def wait(self, state: RetryCallState, exchange: Exchange) -> float | None:
        """Seconds to wait before the row's next attempt; None if it is not to be tried again."""
        if exchange.failure is not None and exchange.failure.is_providers_fault:
            # It says nothing about the row.
            state.paced += 1  # type: ignore[attr-defined]
        state.set_result(exchange)
        action: Any = self._policy.iter(retry_state=state)
        if not isinstance(action, DoSleep):
            return None
        state.prepare_for_next_attempt()
        return float(action)


def _asks_for_retry(exchange: Exchange) -> bool:
    return exchange.failure is not None and exchange.failure.action in (Action.RETRY, Action.PACE)


class _ToldOrBackoff(wait_base):
    """What the provider says, if it says more than "at once"; else exponential backoff with full jitter."""

    def __init__(self) -> None:
        self._backoff = wait_random_exponential(multiplier=_FIRST_BACKOFF, max=_LONGEST_BACKOFF)

    def __call__(self, retry_state: RetryCallState) -> float:
        failure = retry_state.outcome.result().failure if retry_state.outcome else None
        is_patient = retry_state.attempt_number <= _TRUSTED
        if failure is not None and failure.retry_after and is_patient:
            # A little jitter, so that rows told the same moment do not come back as one.
            return float(failure.retry_after) + random.uniform(0, 0.05)
        told = failure.retry_after if failure is not None and failure.retry_after else 0.0
        return max(told, self._backoff(retry_state))


class _Bounds(stop_base):
    """Attempts that count, and time: a wait that would end after the bound is not begun."""

    def __init__(self, max_attempts: int, max_seconds: float, clock: Callable[[], float]) -> None:
        self._max_attempts = max_attempts
        self._max_seconds = max_seconds
        self._clock = clock

    def __call__(self, retry_state: RetryCallState) -> bool:
        paced: int = retry_state.paced  # type: ignore[attr-defined]
        if retry_state.attempt_number - paced >= self._max_attempts:
            return True
        elapsed = self._clock() - retry_state.start_time
        return elapsed + retry_state.upcoming_sleep > self._max_seconds
