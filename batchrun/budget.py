"""Reserve, settle, refuse: a cap that holds while many requests are under way.

Before a request is sent, the most that it can cost is reserved; when its answer has come, the reservation gives way
to the cost; when none comes, it stays. Without a cap the same is done, so that what an unknown outcome can have cost
is on record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from batchrun.money import DERIVED, REPORTED, to_pico
from batchrun.prices import Pricing, is_plausible
from batchrun.records import Exchange, Request, Reservation, now_us, utc
from batchrun.usage import Usage

_TOKENS_PER_MESSAGE = 16
_TOKENS_PER_REQUEST = 32
_TOKENS_PER_MEDIUM = 8192
"""Besides its bytes: a small image can be many tokens."""
_LIBRARY_FACTOR = Decimal("1.5")
_MEASURED_MARGIN = Decimal("1.1")
_MOST_PICO = 2**62
"""What the ledger can hold."""


@dataclass(frozen=True)
class Cap:
    """The most that may be spent.

    Attributes:
        pico: in pico-dollars.
        per: `run`, `day` or `month` (UTC).
    """

    pico: int
    per: str

    def began(self, now: int) -> int:
        """The beginning of the period that a moment is in; 0 for a run. Microseconds since 1970, UTC."""
        if self.per == "run":
            return 0
        day = utc(now).replace(hour=0, minute=0, second=0, microsecond=0)
        first = day.replace(day=1) if self.per == "month" else day
        return int(first.timestamp()) * 1_000_000


class Hold(NamedTuple):
    """What a settled attempt leaves behind."""

    pico: int | None
    """What the cap counts it as, where that is neither its cost nor its reservation."""
    is_over: bool
    """It cost more than was reserved: no cap can hold at such a cost."""
    needed_factor: Decimal | None = None
    """With what factor enough would have been reserved; None if none does."""


def needed_factor(cost: int, reserved: int, factor: Decimal) -> Decimal | None:
    """A factor with which enough would have been reserved for a request of such a cost, with some room.

    None if nothing was reserved: no factor helps then.
    """
    return (Decimal(cost) / reserved * factor).quantize(Decimal("0.1")) + 1 if reserved else None


class Budget:
    """What the requests of an invocation may cost, together and each.

    Attributes:
        worst: the worst case of a request, by model.

    Args:
        pricings: by model.
        factor: of the job, on each worst case; None for 1, or 1.5 where the price is the library's.
        held: pico-dollars of the cap's period that are taken already.
        clock: microseconds since 1970, UTC.
    """

    def __init__(
        self,
        pricings: Mapping[str, Pricing],
        *,
        cap: Cap | None = None,
        factor: Decimal | None = None,
        held: int = 0,
        clock: Callable[[], int] = now_us,
    ) -> None:
        self.worst = {model: WorstCase(pricing, factor) for model, pricing in pricings.items()}
        self._cap = cap
        self._held = held
        self._clock = clock
        self._now = clock()
        self._period = cap.began(self._now) if cap is not None else 0
        self.checked_from: int | None = self._period if cap is not None else None
        """Since when no more than `most_held` can be taken, in microseconds since 1970, UTC; None if that is not known:
        there is no cap, a new period has begun, or an answer cost more than was reserved."""
        self.most_held = max(held, cap.pico) if cap is not None else 0
        self._settled = asyncio.Event()
        self._is_closed = False
        self.in_flight = 0
        """Reservations that wait for their answer."""
        self.refused_pico: int | None = None
        """What a request could cost that did not fit."""

    @property
    def is_durable(self) -> bool:
        """True if a reservation must survive a power cut: what is forgotten would be spent again."""
        return self._cap is not None

    async def reserve(self, request: Request) -> Reservation | None:
        """Set aside the most that a request can cost, once there is room for it; None if there will be none."""
        reservation = await self.room(request)
        if reservation is not None:
            self._held += reservation.pico or 0
            self.in_flight += 1
        return reservation

    async def room(self, request: Request) -> Reservation | None:
        """Wait until the most that a request can cost would fit. For one request at a time.

        What is in flight mostly costs less than was reserved. None if it does not fit with nothing in flight, or the
        run is stopping.
        """
        while not self._is_closed:
            now = self._now = max(self._now, self._clock())  # a clock that is set back begins no day anew
            most = self.worst[request.slot.model].pico(request, now)
            if self._fits(most, now):
                return Reservation(most, now)
            if self.in_flight == 0:
                self.refused_pico = most
                return None
            self._settled.clear()
            await self._settled.wait()
        return None

    def settle(self, request: Request, reservation: Reservation, exchange: Exchange) -> Hold:
        """Give a reservation way to the cost, if that is known."""
        self.in_flight -= 1
        worst = self.worst[request.slot.model]
        usd = exchange.cost.usd
        reserved = reservation.pico or 0
        cost = held = to_pico(usd) if usd is not None else reserved
        if usd is not None and exchange.cost.source in DERIVED and worst.factor > 1:
            # What the provider really charges may be as far above the price that we know as is reserved for.
            held = max(cost, min(reserved, to_pico(usd * worst.factor)))
        if self._cap is None or self._cap.began(reservation.made_at) == self._period:
            self._held += held - reserved
        if exchange.cost.source in REPORTED and usd is not None:
            worst.learn(exchange.usage, reservation.made_at, usd)
        if exchange.outcome == "ok" and not {"suspicious_cost", "zero_usage"} & set(exchange.flags):
            worst.bound.learn(request, exchange.usage)
        self._settled.set()
        is_over = self._cap is not None and cost > reserved
        if is_over:
            self.checked_from = None
        needed = needed_factor(cost, reserved, worst.factor) if is_over else None
        return Hold(held if held != cost else None, is_over, needed)

    def close(self) -> None:
        """Let nobody wait any longer: the run is stopping."""
        self._is_closed = True
        self._settled.set()

    def _fits(self, most: int | None, now: int) -> bool:
        if self._cap is None:
            return True
        if (period := self._cap.began(now)) != self._period:
            # A new day: what is still in flight was sent on the old one, and counts there.
            self._period, self._held, self.checked_from = period, 0, None
        return most is not None and self._held + most <= self._cap.pico


class WorstCase:
    """The most that a request of one model can cost.

    Args:
        factor: of the job; None for 1, or 1.5 where the price is the library's.
    """

    def __init__(self, pricing: Pricing, factor: Decimal | None) -> None:
        self._pricing = pricing
        self._factor = factor or Decimal(1)
        self._is_guessing = factor is None and pricing.is_estimated
        self._measured_factor = Decimal(0)
        self.bound = PromptBound()

    @property
    def factor(self) -> Decimal:
        """What it is multiplied by."""
        guess = _LIBRARY_FACTOR if self._is_guessing else Decimal(1)
        return max(self._factor, guess, self._measured_factor)

    def learn(self, usage: Usage, sent_at: int, usd: Decimal) -> None:
        """Take a cost that the provider reported: it tells how far its prices are from those that we know."""
        ours = self._pricing.usd(usage, sent_at)
        if ours and is_plausible(ours, usd):
            self._is_guessing = False
            # A price that is right needs no margin.
            if usd > ours:
                self._measured_factor = max(self._measured_factor, usd / ours * _MEASURED_MARGIN)

    def pico(self, request: Request, now: int) -> int | None:
        """In pico-dollars, sent at `now`; None if nothing bounds it."""
        price = self._pricing.price_at(now)
        if price is None:
            return None
        prompt = self.bound.prompt_tokens(request)
        if not request.is_self_contained and not price.is_free:
            # What stands elsewhere is bounded by the model alone.
            if self._pricing.limits.context_tokens is None:
                return None
            prompt = max(prompt, self._pricing.limits.context_tokens)
        most = price.most_usd(prompt, request.most_completion_tokens or self._pricing.limits.completion_tokens)
        pico = to_pico(most * self.factor) if most is not None else None
        return pico if pico is None or pico <= _MOST_PICO else None


class PromptBound:
    """The most tokens that a prompt can have: one for each byte of the request, and some for each message.

    Most jobs put the same long text before every row. Where an answer has told how many tokens a request has, that
    number covers what another request shares with it, from the front and from the back; only what differs counts by
    its bytes.
    """

    def __init__(self) -> None:
        self._body = b""
        self._tokens: int | None = None

    def learn(self, request: Request, usage: Usage) -> None:
        """Take an answer's count; the shortest prompt says most about what all of them share."""
        tokens = usage.prompt_tokens
        if tokens and request.is_self_contained and (self._tokens is None or tokens < self._tokens):
            self._body, self._tokens = request.body, tokens

    def prompt_tokens(self, request: Request) -> int:
        """The bound for a request."""
        body = request.body
        size = len(body)
        if self._tokens is not None:
            shared = _shared(body, self._body)
            shared += _shared(body[shared:][::-1], self._body[shared:][::-1])
            size = min(size, self._tokens + len(body) - shared)
        return size + _TOKENS_PER_MESSAGE * request.messages + _TOKENS_PER_MEDIUM * request.media + _TOKENS_PER_REQUEST


def _shared(first: bytes, second: bytes) -> int:
    """How many bytes two texts have in common at their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
