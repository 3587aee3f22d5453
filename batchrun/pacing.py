"""How many requests may be in flight, and how many a second: finds what the provider bears.

A single 429 holds its own row only. It is a limit once more than a fifth are refused, beyond what chance can do. That
is a wall: all rows wait for the time that the provider names, then one at a time asks until one is answered. What was
taken since the last wall, a second, is what was borne. From there on two bounds hold, a rate and a number of places,
since a provider may limit either. They grow in turns, and a refusal cuts the one that grew; then both rest until only
the sought share of requests is refused. A cut that makes no smaller a share be refused met chance, and is taken back.
Above the job's own bound the limit is forgotten.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from math import ceil, inf

from batchrun.evidence import Evidence

_CHANCE = 0.2
"""Share of refusals that cuts nothing."""
_LEAST_LIMIT = 0.25
"""Share that is a limit, if it goes on."""
_PAUSE = 1.0
"""Seconds, where the provider names none; doubled as long as nothing is answered after it."""
_LONGEST_PAUSE = 16.0
_DEEPEST_CUT = 1 / 8
"""By one wall: it may be the first for hours, or have lasted for long, and so tell little about the rate."""
_STEP = 0.1
"""What a refusal takes of the bound that grew."""
_SOUGHT = 0.012
"""The share of refusals: enough to see the limit, few enough to waste."""
_CREDIT = 20
"""Answers that may make up for a refusal in advance: where the sought share is high, refusals come in clusters."""
_GROWTH = (0.015, 0.05)
"""By an answer, and by the answers of as long as one takes: what they tell is late."""
_ROOM = 1.2
"""By which a bound may be above what is used or asked for, so that it does not hold it back."""
_APART = 2.0
"""Times that one bound may be the other, where only the other is the provider's."""
_FRUITLESS = 0.25
"""If some refusals go on below this part of what was borne, it is chance that refuses."""
_CLOSED = 5
"""Times a latency that a wall lasts, from which on the provider was closed: that says nothing about a rate."""
_DEEP = 0.75
"""What a cut leaves at most, for its effect to be told from none."""
_NO_HELP = 1.4
"""A cut that makes fewer be taken, up to so many times as few as it makes be sent, was no help."""
_MOST_CHANCE = 0.45
"""Share of refusals beyond which it is never chance."""
_RECENT = 50
"""Requests of which the share of refusals is taken, about."""
_TELLING = 30
"""Answers since a wall from which on they tell what share is refused."""
_LEAST = 1 / 60
"""Requests a second that are sent whatever is refused: growth goes by answers, and would have none to go by."""
_TIMED = 200
"""Answers whose latency is averaged, about."""


class Pacing:
    """The gate that every request passes.

    Args:
        concurrency: the bound, and where it starts.
        clock: seconds, monotonic.
        longest_pause: seconds; a longer wait is the row's own, and must not hold all the others.
    """

    def __init__(self, concurrency: int, clock: Callable[[], float], longest_pause: float = 900.0) -> None:
        self._most = concurrency
        self._clock = clock
        self._longest_pause = longest_pause
        self._bounds = [inf, inf]
        """Requests a second, and places per second of latency."""
        self._turn = 0
        """Which of them grows."""
        self._borne: float | None = None
        """Requests a second when the latest wall was met; None while no limit is known."""
        self._top = inf
        """The same, however far it was stepped down since."""
        self._cut: tuple[float, float, float] | None = None
        """By the latest wall: requests a second sent at most before it, taken then, and sent at most after it."""
        self._is_wall = False
        self._met = 0.0
        """When the latest wall was met."""
        self._pauses = 0
        """At this wall."""
        self._since = -inf
        """What was sent before tells nothing new about the bounds."""
        self._wall_ended = clock()
        self._taken = 0
        self._debt = 0.0
        """Refusals beyond the sought share."""
        self._sought = _SOUGHT
        self._share = 0.0
        """Of recent requests, that were refused."""
        self._calm_at = -inf
        self._latency = 0.0
        self._timed = 0
        self._entries: deque[float] = deque()
        """When requests entered that are sent later than any that is answered."""
        self._entered = 0
        self._latest = -inf
        """When the latest request was sent that is answered."""
        self._next = -inf
        """The earliest moment for the next request."""
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopped = False
        self.in_flight = 0
        self._seek_proof()

    def _seek_proof(self) -> None:
        # Chance passes these once in more than ten million requests if it refuses 18 of 100.
        self._tests: tuple[Evidence, ...] = (
            Evidence(_CHANCE, 0.6, 1e5, self._latest, self._entered),
            Evidence(_CHANCE, _LEAST_LIMIT, 300, self._latest, self._entered),
        )

    @property
    def allowed(self) -> int:
        """The present bound on requests in flight."""
        return self._most if self._borne is None else min(self._most, ceil(self._bounds[1] * self._latency))

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
        self._latest = max(self._latest, sent_at)
        reached = self._entered - len(self._entries)
        is_limit = False
        for test in self._tests:
            is_limit |= test.note(sent_at, self._latest, reached, is_refused=is_rate_limit)
        self._share += (is_rate_limit - self._share) / _RECENT
        if is_rate_limit:
            if self._is_wall and sent_at < self._since:
                if retry_after is not None:
                    self._pause(now, retry_after)
            elif self._is_wall or is_limit:
                self._meet_wall(now, retry_after)
            elif self._borne is not None:
                self._debt = min(self._debt, self._bounds[0] * self._latency / 2) + 1
                if sent_at >= self._since and self._debt > 0:
                    self._step_down(now, self._borne)
        elif is_server_error:
            # A server in trouble is no reason to send less, and none to send more.
            self._calm_at = now + _PAUSE
        elif is_ok:
            self._timed += 1
            self._latency += (max(now - sent_at, 1e-3) - self._latency) / min(self._timed, _TIMED)
            self._taken += 1
            self._debt = max(-_CREDIT * self._sought, self._debt - self._sought)
            if self._is_wall and sent_at >= self._since:
                self._resume(now)
            elif (
                self._borne is not None and sent_at >= self._since and (self._waiters or self.in_flight >= self.allowed)
            ):
                self._grow(now)

    def _meet_wall(self, now: float, retry_after: float | None) -> None:
        if not self._is_wall:
            self._is_wall, self._met = True, now
        self._pause(now, min(_PAUSE * 2**self._pauses, _LONGEST_PAUSE) if retry_after is None else retry_after)
        self._pauses += 1

    def _pause(self, now: float, seconds: float) -> None:
        self._since = self._next = max(self._next, now + min(self._longest_pause, seconds))

    def _resume(self, now: float) -> None:
        before = min(*self._bounds, self._most / self._latency)
        # What is still under way was taken: refusals have come by now.
        seconds = min(now, self._met + _CLOSED * self._latency) - self._wall_ended
        rate = (self._taken + self.in_flight) / max(seconds, self._latency)
        uncut = self._uncut(rate) if self._taken >= _TELLING else None
        if uncut is not None:
            self._take_for_chance(uncut)
        else:
            self._borne = self._top = max(_LEAST, min(before, max(rate, before * _DEEPEST_CUT)))
            self._cut = before, rate, self._borne
            self._bounds = [self._borne, self._borne * _ROOM]
            self._debt, self._sought = 0.0, _SOUGHT
            # A limit is known: less is enough to see that it is far exceeded.
            self._tests = (Evidence(_CHANCE, 0.6, 1000, self._since, self._entered),)
        self._is_wall, self._pauses = False, 0
        self._wall_ended, self._taken = now, 0
        self._next = now
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()

    def _uncut(self, rate: float) -> float | None:
        """The bound before the latest wall's cut, if that made as many fewer be taken as be sent: it is no number then
        that refuses. None if it was of help.
        """
        if self._cut is None:
            return None
        before, taken, after = self._cut
        return before if after < _DEEP * before and rate < _NO_HELP * taken * after / before else None

    def _take_for_chance(self, bound: float) -> None:
        """Go back to a bound, and look for more refusals than there are."""
        share = min(0.9, self._share)
        self._bounds, self._borne, self._top, self._cut = [bound, bound * _ROOM], bound, bound, None
        self._debt, self._sought = 0.0, _SOUGHT + share / (1 - share)
        self._tests = (Evidence(max(_CHANCE, share), (1 + max(_CHANCE, share)) / 2, 1e5, self._latest, self._entered),)

    def _step_down(self, now: float, borne: float) -> None:
        self._since = now
        self._bounds[self._turn] *= 1 - _STEP
        self._turn = 1 - self._turn
        if self._debt > 1:
            # The other was cut of late, and that was not enough.
            self._bounds[self._turn] *= 1 - _STEP
        if min(self._bounds) < _FRUITLESS * borne:
            self._borne = min(self._bounds)
            is_far = self._borne < _FRUITLESS**2 * self._top
            if self._taken >= _TELLING and 3 * _SOUGHT < self._share < (_MOST_CHANCE if is_far else _CHANCE):
                self._take_for_chance(self._top if is_far else borne)
        self._bounds = [max(_LEAST, bound) for bound in self._bounds]

    def _grow(self, now: float) -> None:
        if now < self._calm_at or self._debt > 0:
            return
        bound = self._bounds[self._turn]
        self._bounds[self._turn] = bound * (1 + min(_GROWTH[0], _GROWTH[1] / (bound * self._latency)))
        if bound > _APART * self._bounds[1 - self._turn]:
            self._turn = 1 - self._turn
        if min(self._bounds) * self._latency > _ROOM * self._most:
            self._bounds, self._borne, self._cut = [inf, inf], None, None
            self._seek_proof()
        self._wake()

    def _admit(self) -> None:
        now = self._clock()
        self.in_flight += 1
        self._entered += 1
        self._entries.append(now)
        if self._is_wall:
            self._next = now + max(_PAUSE, self._latency)
        elif self._borne is not None:
            self._next = max(self._next, now) + 1 / self._bounds[0]

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
