"""How many requests may be in flight, and from when on: finds what the provider bears.

A single 429 holds its own row only. It is a limit once more than a fifth are refused, beyond what chance can do. Then
all rows wait for the time that the provider names, and the level is cut to what was borne. From there on requests are
spaced; each refusal takes a little of the level and each answer gives less, faster the longer none is refused, so that
few are wasted. When refusals no longer come at the job's own bound, the limit is forgotten.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from math import log

_CUT = 0.9
"""Of what was borne when a limit was met."""
_DEEPEST_CUT = 0.5
_PAUSE = 1.0
"""Seconds, where the provider names none; doubled as long as nothing is answered after it."""
_LONGEST_PROBE = 16.0
_STEP = 0.04
"""Of the level, that a single refusal takes where a limit is known."""
_SOUGHT = 0.015
"""The share of refusals at which these steps and the growth are even: enough to see the limit, few enough to waste."""
_QUIET = 60
"""Answers without a refusal after which growth gets faster: the limit may be gone."""
_AHEAD = 0.02
"""Growth in the time that an answer takes, before it gets faster."""
_FORGOTTEN = 300
"""Answers without a refusal, at the job's own bound, after which no limit is known any longer."""
_ROOM = 1.1
_FASTEST = (0.005, 0.03)
"""Growth by an answer, and by a second: at most."""
_TIMED = 50
"""Answers whose latency is averaged, about."""
_CHANCE = 0.4
"""If single refusals go on below this part of where the limit was met, it is chance that refuses."""


class _Evidence:
    """Tells a share of refusals from chance: Wald's likelihood ratio of `suspected` to `borne`, begun again regularly.

    Args:
        borne: share of refusals that means nothing.
        suspected: share that means a limit.
        odds: how many times likelier a limit must be. Chance passes this once in so many times `length` requests.
        length: requests after which it begins again, so that what is long past does not count.
    """

    def __init__(self, borne: float, suspected: float, odds: float, length: int) -> None:
        self._by_refused = log(suspected / borne)
        self._by_taken = log((1 - suspected) / (1 - borne))
        self._enough = log(odds)
        self._length = length
        self.begin(0.0, 0)

    def begin(self, now: float, entered: int) -> None:
        """Count requests from now on; `entered` were sent before."""
        self._since = now
        self._before = entered
        self._refused = 0
        self._heard = 0
        self._number = 0

    @property
    def refused_share(self) -> float:
        """Of the requests that were counted; of a few, less."""
        # As much as a handful of refusals in a row can prove about the share.
        return self._refused / max(self._number, 12)

    def note(self, sent_at: float, reached: int, *, is_refused: bool) -> bool:
        """Take an answer; True if there is a limit.

        Args:
            reached: requests sent up to `sent_at`. Those that are under way count as taken: a refusal is often quick,
                and the first answers that come are no sample of what was sent.
        """
        if sent_at < self._since:
            return False
        self._refused += is_refused
        self._heard += 1
        self._number = max(self._heard, self._number, reached - self._before)
        taken = self._number - self._refused
        return is_refused and self._refused * self._by_refused + taken * self._by_taken > self._enough

    def is_over(self) -> bool:
        """True if it is time to begin again."""
        return self._number >= self._length


class Pacing:
    """The gate that every request passes.

    Args:
        concurrency: the bound, and where it starts.
        clock: seconds, monotonic.
        longest_pause: seconds; a longer wait is the row's own, and must not hold all the others.
    """

    def __init__(self, concurrency: int, clock: Callable[[], float], longest_pause: float = 900.0) -> None:
        self._most = concurrency
        self._level = float(concurrency)
        self._met_at: float | None = None
        """The level that was borne when a limit was met; None while none is known."""
        self._clock = clock
        self._longest_pause = longest_pause
        self._proofs = (
            _Evidence(0.2, 0.6, 1e7, max(100, 2 * concurrency)),
            _Evidence(0.2, 0.25, 1e4, 4000),
        )
        self._hints = (_Evidence(0.08, 0.35, 1000, 60),)
        self._is_chance = False
        self._quiet = 0
        self._stepped_at = 0.0
        self._entries: deque[float] = deque()
        """When requests entered that are sent later than any that is answered."""
        self._entered = 0
        self._latency = 0.0
        self._timed = 0
        self._next = 0.0
        """The earliest moment for the next request."""
        self._since = 0.0
        """Requests sent before tell nothing new about a limit."""
        self._fruitless = 0
        self._answered = 0
        self._grown_at = 0.0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopped = False
        self.in_flight = 0

    @property
    def allowed(self) -> int:
        """The present bound on requests in flight."""
        return 1 if self._fruitless else min(self._most, max(1, round(self._level)))

    async def enter(self) -> None:
        """Wait for a place in flight; not any longer once the run is stopping."""
        if self._is_stopped or not (self._waiters or self.in_flight >= self.allowed or self._next > self._clock()):
            self._admit()
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._wake()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.leave()
            raise

    def stop(self) -> None:
        """Let nobody wait any longer: the run is stopping, and who enters now leaves at once."""
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()
        while self._waiters:
            self._let_in(self._waiters.popleft())

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
        now = self._clock()
        while self._entries and self._entries[0] <= sent_at:
            self._entries.popleft()
        reached = self._entered - len(self._entries)
        is_limit = False
        share = 0.0
        for evidence in self._hints if self._met_at is not None and not self._is_chance else self._proofs:
            if evidence.note(sent_at, reached, is_refused=is_rate_limit):
                is_limit, share = True, max(share, evidence.refused_share)
            elif evidence.is_over():
                evidence.begin(now, self._entered)
        if is_rate_limit:
            self._quiet = 0
            if is_limit or (self._fruitless and sent_at >= self._since):
                self._limit(now, retry_after, share)
            elif sent_at >= self._since and self._met_at is not None and not self._is_chance:
                if sent_at >= self._stepped_at:
                    self._step_down(now, self._met_at)
            elif retry_after is not None and now < self._since:
                self._pause(now + min(self._longest_pause, retry_after))
        elif is_server_error:
            # A server in trouble is no reason to send less, and none to send more.
            self._grown_at = now + _PAUSE
        elif is_ok:
            self._timed += 1
            self._latency += (now - sent_at - self._latency) / min(self._timed, _TIMED)
            if sent_at >= self._since:
                self._answered += 1
                self._fruitless = 0
                if self._met_at is not None and (self._waiters or self.in_flight >= self.allowed):
                    self._grow(now)

    def _grow(self, now: float) -> None:
        if now <= self._grown_at:
            return
        self._quiet += 1
        haste = max(1.0, self._quiet / max(_QUIET, 2 * self._level)) ** 2
        by_answer = min(_FASTEST[0], _STEP * _SOUGHT * haste)
        # An answer tells of a level that was a latency ago: growth must not run ahead of it.
        by_second = min(_FASTEST[1], _AHEAD * haste / max(self._latency, 0.01))
        self._level *= 1 + min(by_answer, by_second * (now - self._grown_at))
        self._grown_at = now
        # A little above the bound, so that spacing does not hold back what is allowed.
        self._level = min(self._level, _ROOM * self._most)
        if self._level >= self._most and self._quiet >= _FORGOTTEN:
            self._level, self._met_at, self._is_chance = float(self._most), None, False
            self._begin(now)
        self._wake()

    def _step_down(self, now: float, met_at: float) -> None:
        # What was sent before this step says nothing about the level after it.
        self._stepped_at = now
        self._level *= 1 - _STEP
        if self._level < _CHANCE * met_at:
            self._level, self._is_chance = met_at, True

    def _limit(self, now: float, retry_after: float | None, share: float) -> None:
        if self._met_at is not None and not self._answered:
            # Nothing at all was taken, so this tells no level: try again with one at a time, ever more rarely.
            self._fruitless += 1
        else:
            borne = max(1.0, self._level * max(_DEEPEST_CUT, 1 - share))
            # Never below one at a time: growth goes by answers, and would have none to go by.
            self._met_at, self._level, self._is_chance = borne, max(1.0, borne * _CUT), False
        wait = min(_PAUSE * 2**self._fruitless, _LONGEST_PROBE) if retry_after is None else retry_after
        self._pause(now + min(self._longest_pause, wait))
        self._answered = 0
        self._begin(self._since)

    def _begin(self, since: float) -> None:
        for evidence in (*self._proofs, *self._hints):
            evidence.begin(since, self._entered)

    def _pause(self, until: float) -> None:
        self._next = max(self._next, until)
        self._since = self._grown_at = self._next

    def _admit(self) -> None:
        now = self._clock()
        self.in_flight += 1
        self._entered += 1
        self._entries.append(now)
        if self._met_at is not None:
            self._next = max(self._next, now) + self._latency / self._level

    def _let_in(self, waiter: asyncio.Future[None]) -> None:
        if not waiter.done():
            self._admit()
            waiter.set_result(None)

    def _wake(self) -> None:
        while self._waiters and self.in_flight < self.allowed:
            pause = self._next - self._clock()
            if pause > 1e-6:
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(pause, self._ring)
                return
            self._let_in(self._waiters.popleft())

    def _ring(self) -> None:
        self._timer = None
        self._wake()
