"""What tokens cost: a model's price, and whose word it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any

from batchrun.money import CREDITS_PER_USD, usd_from_wire, usd_text
from batchrun.usage import Usage


@dataclass(frozen=True, slots=True)
class Price:
    """What a model's tokens cost: dollars per million; a part without a rate of its own is priced as its whole is.

    Attributes:
        cache_write_1h_mtok: of cache entries that last an hour. Usage does not tell them from others, so this counts
            for the worst case alone.
        request_usd: dollars per request, whatever its tokens.
        tiers: (prompt tokens, price) in rising order; above that many prompt tokens all of a request has that price.
        rounds_to_credits: each part is rounded up to whole credits, as AI/ML API does.
    """

    input_mtok: Decimal
    output_mtok: Decimal
    cache_read_mtok: Decimal | None = None
    cache_write_mtok: Decimal | None = None
    cache_write_1h_mtok: Decimal | None = None
    reasoning_mtok: Decimal | None = None
    request_usd: Decimal = Decimal(0)
    tiers: tuple[tuple[int, Price], ...] = ()
    rounds_to_credits: bool = False

    @property
    def is_free(self) -> bool:
        """True if nothing costs anything."""
        return self.most_usd(1_000_000, 1_000_000) == 0

    def usd(self, usage: Usage) -> Decimal | None:
        """Price an answer's counts; None if they are unknown or all zero.

        >>> Price(Decimal(3), Decimal(15), cache_read_mtok=Decimal("0.3")).usd(Usage(1000, 500, cached_tokens=800))
        Decimal('0.00834')
        """
        output = usage.billable_output
        if usage.prompt_tokens is None or output is None or usage.is_zero:
            return None
        price = self._at(usage.prompt_tokens)
        cached, written = usage.cached_tokens or 0, usage.cache_write_tokens or 0
        reasoning = min(usage.reasoning_tokens or 0, output)
        parts = (
            (usage.prompt_tokens - cached - written, price.input_mtok),
            (cached, _first(price.cache_read_mtok, price.input_mtok)),
            (written, _first(price.cache_write_mtok, price.input_mtok)),
            (output - reasoning, price.output_mtok),
            (reasoning, _first(price.reasoning_mtok, price.output_mtok)),
        )
        costs = [tokens * rate / 1_000_000 for tokens, rate in parts]
        if price.rounds_to_credits:
            costs = [_whole_credits(usd) for usd in costs]
        return usd_from_wire(sum(costs, price.request_usd))

    def most_usd(self, prompt_tokens: int, completion_tokens: int | None) -> Decimal | None:
        """The most that a request can cost whose counts are at most these; None if they set no bound.

        All of the prompt may be written to a cache, and each part rounded up to a credit.
        """
        most = Decimal(0)
        for price in self._up_to(prompt_tokens):
            read = max(price.input_mtok, *(_first(rate, Decimal(0)) for rate in price._input_rates()))
            said = max(price.output_mtok, _first(price.reasoning_mtok, Decimal(0)))
            if completion_tokens is None and said:
                return None
            tokens = prompt_tokens * read + (completion_tokens or 0) * said
            most = max(most, tokens / 1_000_000 + price.request_usd)
        return most + _ROUNDED_UP if most else most

    def likely_usd(self, prompt_tokens: float, completion_tokens: float, requests: int) -> float:
        """What so many alike requests cost that have these tokens in all, nothing of them cached."""
        price = self._at(round(prompt_tokens / requests))
        each = float(price.request_usd) + (1 / CREDITS_PER_USD if price.rounds_to_credits else 0.0)
        tokens = prompt_tokens * float(price.input_mtok) + completion_tokens * float(price.output_mtok)
        return tokens / 1e6 + each * requests

    def _input_rates(self) -> tuple[Decimal | None, ...]:
        return self.cache_read_mtok, self.cache_write_mtok, self.cache_write_1h_mtok

    def _at(self, prompt_tokens: int) -> Price:
        return self._up_to(prompt_tokens)[-1]

    def _up_to(self, prompt_tokens: int) -> list[Price]:
        return [self, *(price for start, price in self.tiers if prompt_tokens > start)]


# Estimate ÷ reported beyond these: AI/ML API's answers of 2025 held credits in the token fields, for one.
_LEAST_RATIO, _MOST_RATIO = Decimal("0.2"), Decimal(5)


def is_plausible(estimate: Decimal, reported: Decimal) -> bool:
    """False for two amounts so far apart that the tokens, or one of the amounts, must be something else."""
    return bool(reported) and _LEAST_RATIO <= estimate / reported <= _MOST_RATIO


_PARTS = 5
_ROUNDED_UP = Decimal(_PARTS) / CREDITS_PER_USD


def _first(rate: Decimal | None, instead: Decimal) -> Decimal:
    return instead if rate is None else rate


def _whole_credits(usd: Decimal) -> Decimal:
    return (usd * CREDITS_PER_USD).to_integral_value(rounding=ROUND_CEILING) / CREDITS_PER_USD


@dataclass(frozen=True, slots=True)
class Limits:
    """The most tokens of an answer, and of prompt and answer together, where the provider publishes them."""

    completion_tokens: int | None = None
    context_tokens: int | None = None


@dataclass(frozen=True)
class Pricing:
    """The price of a model, and whose word it is.

    Attributes:
        source: `job`, `provider_list`, `library` or `local`; None if nobody knows a price.
        price_at: the price for a request sent at a moment (microseconds since 1970, UTC); prices have dates.
    """

    source: str | None = None
    price_at: Callable[[int], Price | None] = lambda sent_at: None
    limits: Limits = Limits()

    @classmethod
    def fixed(cls, source: str, price: Price, limits: Limits = Limits()) -> Pricing:
        """One price, whatever the date."""
        return cls(source, lambda sent_at: price, limits)

    @property
    def is_estimated(self) -> bool:
        """True if the provider itself did not say it."""
        return self.source == "library"

    def usd(self, usage: Usage, sent_at: int) -> Decimal | None:
        """Price an answer's counts; None if that cannot be done."""
        price = self.price_at(sent_at)
        return price.usd(usage) if price is not None else None

    def snapshot(self, at: int) -> dict[str, Any] | None:
        """The price at a moment as plain JSON values, for the record; amounts are text."""
        price = self.price_at(at)
        return {"source": self.source, **_plain(price)} if price is not None else None


def _plain(price: Price) -> dict[str, Any]:
    rates: dict[str, Any] = {
        name: usd_text(rate)
        for name in ("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok",
                     "reasoning_mtok", "request_usd")
        if (rate := getattr(price, name)) is not None and (rate or name != "request_usd")
    }  # fmt: skip
    tiers = [{"above_prompt_tokens": start, **_plain(tier)} for start, tier in price.tiers]
    if tiers:
        rates["tiers"] = tiers
    if price.rounds_to_credits:
        rates["rounds_to_credits"] = True
    return rates
