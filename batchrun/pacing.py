"""How many requests may be in flight, and from when on: finds what the provider bears.

A single 429 holds its own row only. When a fifth of the last answers were 429 it is a limit: all rows wait for the
time that the provider names, and the bound is cut once per episode; it grows back while it is used up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

_WINDOW = 50
_LIMIT_SHARE = 0.2
_CUT = 0.8
_PAUSE = 1.0


class Pacing:
    """The gate that every request passes.

    Args:
        concurrency: the bound, and where it starts.
        clock: seconds, monotonic.
        longest_pause: seconds; a longer wait is the row's own, and must not hold all the others.
    """

    def __init__(self, concurrency: int, clock: Callable[[], float], longest_pause: float = 900.0) -> None:
        self._most = concurrency
        self._allowed = float(concurrency)
        self._clock = clock
        self._longest_pause = longest_pause
        self._answers: deque[bool] = deque(maxlen=max(_WINDOW, concurrency))
        self._limited = 0
        self._not_before = 0.0
        self._episode_from = 0.0
        self._grow_from = 0.0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._stopped = asyncio.Event()
        self.in_flight = 0

    @property
    def allowed(self) -> int:
        """The present bound on requests in flight."""
        return max(1, int(self._allowed))

    async def enter(self) -> None:
        """Wait for a place in flight; not any longer once the run is stopping."""
        while not self._stopped.is_set():
            pause = self._not_before - self._clock()
            if pause > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._stopped.wait()
            elif self.in_flight < self.allowed:
                break
            else:
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiters.append(waiter)
                try:
                    await waiter
                finally:
                    if waiter.cancelled() and waiter in self._waiters:
                        self._waiters.remove(waiter)
        self.in_flight += 1

    def stop(self) -> None:
        """Let nobody wait any longer: the run is stopping, and who enters now leaves at once."""
        self._stopped.set()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def leave(self) -> None:
        """Give the place back."""
        self.in_flight -= 1
        self._wake()

    def note(
        self,
        *,
        sent_at: float,
        is_rate_limit: bool,
        is_ok: bool,
        is_server_error: bool = False,
        retry_after: float | None = None,
    ) -> None:
        """Take what an answer says about the provider's limits, while its place is still taken.

        Args:
            sent_at: by the clock.
        """
        if len(self._answers) == self._answers.maxlen and self._answers[0]:
            self._limited -= 1
        self._answers.append(is_rate_limit)
        self._limited += is_rate_limit
        if is_rate_limit:
            recent = len(self._answers)
            # A few answers prove nothing: by chance alone, two of the first eight can be 429.
            if recent >= _WINDOW and self._limited >= _LIMIT_SHARE * recent:
                self._limit(sent_at, retry_after)
        elif is_server_error:
            # A server in trouble is no reason to send less, and none to send more.
            self._grow_from = self._clock() + _PAUSE
        elif (
            is_ok and self._allowed < self._most and self.in_flight >= self.allowed and self._clock() >= self._grow_from
        ):
            self._allowed = min(float(self._most), self._allowed + 1 / max(1.0, self._allowed))
            self._wake()

    def _limit(self, sent_at: float, retry_after: float | None) -> None:
        now = self._clock()
        pause = min(self._longest_pause, _PAUSE if retry_after is None else retry_after)
        self._not_before = max(self._not_before, now + pause)
        if sent_at >= self._episode_from:
            # What is still in flight belongs to this episode, and says nothing new.
            self._allowed = max(1.0, self._allowed * _CUT)
            self._episode_from = self._not_before

    def _wake(self) -> None:
        free = self.allowed - self.in_flight
        while free > 0 and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                free -= 1
