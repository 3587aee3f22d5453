"""Providers with limits, and a real Runner that works against one on a virtual clock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from batchrun.budget import Budget
from batchrun.errors import Stop
from batchrun.ledger import Ledger
from batchrun.prices import Pricing
from batchrun.rates import Rates
from batchrun.records import Action, Answer, Exchange, Failure, Intent, Request, Settlement, Slot
from batchrun.runner import Runner

from .virtual import VirtualLoop

SETTLING = 120.0
"""Seconds in which a run may still look for the limit."""
QUICK = 0.02
"""Seconds in which a gate refuses."""


class Limit(Protocol):
    """What a provider bears."""

    def admit(self, now: float, size: int) -> float | None:
        """None if a request is taken; else the seconds after which it would be, as far as the provider knows."""

    def done(self) -> None:
        """A request that was taken is answered."""


@dataclass
class Free:
    """Bears everything."""

    def admit(self, now: float, size: int) -> float | None:
        return None

    def done(self) -> None:
        pass


class Closed(Free):
    """Bears nothing."""

    def admit(self, now: float, size: int) -> float | None:
        return 1.0


@dataclass
class Doors(Free):
    """Bears everything for the first `opened` seconds of each period, and nothing in the rest."""

    opened: float
    period: float

    def admit(self, now: float, size: int) -> float | None:
        into = now % self.period
        return None if into < self.opened else self.period - into


@dataclass
class Bucket(Free):
    """So many requests a second on the average, `burst` at once. With `sized`, a request counts by its size."""

    rate: float
    burst: float
    sized: bool = False
    level: float = field(init=False)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.level = self.burst

    def admit(self, now: float, size: int) -> float | None:
        self.level = min(self.burst, self.level + self.rate * (now - self.at))
        self.at = now
        need = size if self.sized else 1
        # A hair less than whole: what is one short of 1 by rounding alone is 1.
        if self.level < need - 1e-9:
            return (need - self.level) / self.rate
        self.level -= need
        return None


@dataclass
class Concurrent(Free):
    """So many at a time."""

    most: int
    present: int = 0

    def admit(self, now: float, size: int) -> float | None:
        if self.present >= self.most:
            return 1.0
        self.present += 1
        return None

    def done(self) -> None:
        self.present -= 1


@dataclass
class Windows(Free):
    """So many in each minute by the provider's clock, which is not ours."""

    number: int
    offset: float = 23.0
    window: int = -1
    used: int = 0

    def admit(self, now: float, size: int) -> float | None:
        window, into = divmod(now + self.offset, 60.0)
        if window != self.window:
            self.window, self.used = int(window), 0
        if self.used >= self.number:
            return 60.0 - into
        self.used += 1
        return None


@dataclass
class Chance(Free):
    """Refuses by chance alone."""

    share: float
    chance: random.Random = field(default_factory=lambda: random.Random(7))

    def admit(self, now: float, size: int) -> float | None:
        return 1.0 if self.chance.random() < self.share else None


@dataclass
class Both(Free):
    """Two limits, one after the other."""

    first: Limit
    second: Limit

    def admit(self, now: float, size: int) -> float | None:
        wait = self.first.admit(now, size)
        return wait if wait is not None else self.second.admit(now, size)

    def done(self) -> None:
        self.first.done()
        self.second.done()


@dataclass
class Changing(Free):
    """One limit, and from a moment on another."""

    before: Limit
    after: Limit
    at: float

    def admit(self, now: float, size: int) -> float | None:
        return (self.before if now < self.at else self.after).admit(now, size)

    def done(self) -> None:
        self.before.done()


Latency = Callable[[random.Random], float]


def constant(mean: float) -> Latency:
    return lambda chance: mean


def exponential(mean: float) -> Latency:
    return lambda chance: chance.expovariate(1 / mean)


def lognormal(mean: float) -> Latency:
    """Half of them below 0.88 of the mean, one in a hundred above 2.8 times the mean."""
    return lambda chance: mean * chance.lognormvariate(-0.125, 0.5)


@dataclass
class Provider:
    """A Sender. `refusal`: seconds until a 429, or None for the usual latency; `tells`: with Retry-After."""

    limit: Limit
    latency: Latency
    refusal: float | None = QUICK
    tells: bool = False
    errors: float = 0.0
    """Share of what was taken that ends as 500."""
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    events: list[tuple[float, str]] = field(default_factory=list)
    """When each request was answered, by the clock, and how."""
    in_flight: int = 0
    most: int = 0

    async def send(self, intent: Intent) -> Exchange:
        loop = asyncio.get_running_loop()
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        wait = self.limit.admit(loop.time(), intent.request.messages)
        seconds = self.latency(self.chance)
        await asyncio.sleep(seconds if wait is None or self.refusal is None else self.refusal)
        self.in_flight -= 1
        if wait is not None:
            self.events.append((loop.time(), "429"))
            return _REFUSED._replace(failure=replace(_LIMITED, retry_after=wait if self.tells else None))
        self.limit.done()
        if self.chance.random() < self.errors:
            self.events.append((loop.time(), "500"))
            return _BROKEN
        self.events.append((loop.time(), "ok"))
        return _OK


_LIMITED = Failure("rate_limit", Action.PACE, "slower")
_REFUSED = Exchange("failed", status=429, failure=_LIMITED)
_BROKEN = Exchange("failed", status=500, failure=Failure("server", Action.RETRY, "broken"))
_OK = Exchange("ok", status=200, answer=Answer("x", "stop"))


@dataclass
class Course:
    """What a run came to.

    Attributes:
        events: when each request was answered, and how.
        lost: rows that failed.
        allowed: the bound at the end of each second.
        most: requests under way at a time.
    """

    seconds: float
    events: list[tuple[float, str]]
    lost: int
    allowed: list[int]
    most: int
    stop: Stop | None

    def rate(self, since: float = SETTLING, until: float | None = None) -> float:
        """Answers a second."""
        until = self.seconds if until is None else until
        return sum(how == "ok" and since <= at < until for at, how in self.events) / (until - since)

    def wasted(self, since: float = 0.0) -> float:
        """Share of the requests that were answered 429."""
        counted = [how for at, how in self.events if since <= at < self.seconds]
        return counted.count("429") / max(1, len(counted))


def course(
    folder: Path,
    provider: Provider,
    *,
    concurrency: int,
    seconds: float,
    sizes: Callable[[random.Random], int] = lambda chance: 1,
    rows: int | None = None,
    seed: int = 0,
) -> Course:
    """Run for so long, with more rows than can be done; those that were begun are brought to their end."""
    random.seed(seed)
    provider.chance = random.Random(seed + 1)
    loop = VirtualLoop()
    chance = random.Random(seed + 2)
    lost = 0
    allowed: list[int] = []

    def requests() -> Iterator[Request]:
        index = 0
        while loop.now < seconds and (rows is None or index < rows):
            yield Request(Slot(index, "m"), f"k{index}", b"", messages=sizes(chance))
            index += 1

    def settled(settlement: Settlement) -> None:
        nonlocal lost
        lost += settlement.is_final and settlement.exchange.outcome != "ok"

    path = folder / f"{id(loop)}.sqlite"
    ledger = Ledger.open(path, job_name="j", job_path=folder / "j.yaml")
    run = ledger.current_run()
    ledger.begin_invocation(run, job={}, endpoint="e")
    ledger.place(run, [], dict)

    async def drive() -> Stop | None:
        runner = Runner(
            ledger, run, provider, requests(), Budget({"m": Pricing()}), Rates(None, None), concurrency=concurrency,
            max_attempts=6, max_seconds=900.0, stop_seconds=60.0, clock=loop.time, on_settled=settled,
        )  # fmt: skip

        def look() -> None:
            allowed.append(runner._pacing.allowed)
            if loop.now < seconds - 1:
                loop.call_later(1.0, look)

        loop.call_later(1.0, look)
        return await runner.run()

    try:
        stop = loop.run_until_complete(drive())
    finally:
        loop.close()
        ledger.close()
    for file in folder.glob(f"{path.name}*"):
        file.unlink()
    return Course(seconds, provider.events, lost, allowed, provider.most, stop)
