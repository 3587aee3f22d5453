"""Where a price comes from: the job, else the provider's published list, else the bundled price library.

A list or the library is asked once per invocation; what it says is snapshotted in the ledger. The library is
`genai-prices` (extra `prices`); its amounts are estimates, and are called so wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from batchrun.money import amount
from batchrun.prices import Limits, Price, Pricing
from batchrun.providers import Endpoint
from batchrun.records import utc
from batchrun.settings import PricesSetting

_MTOK = 1_000_000
_MOST_RATE = 1_000_000
"""Dollars per million tokens, or per request; more is no price."""
FREE = Pricing.fixed("local", Price(Decimal(0), Decimal(0)))

# What the library calls our providers. AI/ML API's ids carry their vendor's prefix, which its `litellm` table knows.
_LIBRARY_PROVIDERS = {
    "openai": "openai", "openrouter": "openrouter", "deepseek": "deepseek", "groq": "groq", "together": "together",
    "mistral": "mistral", "gemini": "google",
}  # fmt: skip


def choose_pricing(
    prices: PricesSetting | None,
    endpoint: Endpoint,
    model: str,
    entry: Callable[[str], Mapping[str, Any] | None],
) -> Pricing:
    """The first of the sources that knows a price; a Pricing without a source if none does.

    Args:
        prices: of the job.
        entry: a model's entry in the provider's list, fetched when it is called; None if it has none.
    """
    listed = None
    if endpoint.price_query is not None:
        found = entry(model)
        listed = listed_pricing(found, endpoint) if found is not None else None
    limits = listed.limits if listed is not None else Limits()
    if endpoint.name == "local":
        return FREE
    if prices is not None:
        return Pricing.fixed("job", Price(**prices.model_dump()), limits)
    if endpoint.is_free:
        return FREE
    if listed is not None and listed.source is not None:
        return listed
    library = library_price(endpoint, model)
    if library is not None:
        return Pricing("library", library, limits)
    return Pricing(limits=limits)


# --- the provider's list ------------------------------------------------------------------------------------


def listed_pricing(entry: Mapping[str, Any], endpoint: Endpoint) -> Pricing:
    """The price and the limits that a model's entry of `GET /models` publishes; without a source if it has no price.

    AI/ML API: `pricing.units`, each with its `measure` and `origin`, a price `per` so many tokens; `info.outputMax`
    and `info.contextLength`. OpenRouter: `pricing.prompt` and its like, dollars per token; `top_provider`.
    """
    info, top = _mapping(entry.get("info")), _mapping(entry.get("top_provider"))
    limits = Limits(
        completion_tokens=_whole(info.get("outputMax")) or _whole(top.get("max_completion_tokens")),
        context_tokens=_whole(info.get("contextLength")) or _whole(entry.get("context_length")),
    )
    pricing = _mapping(entry.get("pricing"))
    try:
        price = _from_units(pricing, endpoint) if "units" in pricing else _from_fields(pricing)
        if price is not None and max(price.input_mtok, price.output_mtok, price.request_usd) > _MOST_RATE:
            price = None
    except ArithmeticError:  # numbers that no price has
        price = None
    return Pricing.fixed("provider_list", price, limits) if price is not None else Pricing(limits=limits)


def _from_units(pricing: Mapping[str, Any], endpoint: Endpoint) -> Price | None:
    units = pricing["units"]
    if pricing.get("kind", "fixed") != "fixed" or str(pricing.get("currency") or "USD").upper() != "USD":
        return None
    rates: dict[str, Any] = {}
    request_usd = Decimal(0)
    for unit in units if isinstance(units, list) else ():
        if not isinstance(unit, Mapping):
            continue
        price, per = amount(unit.get("price")), amount(unit.get("per", 1))
        if price is None or not per:
            continue
        if unit.get("name") == "request":
            request_usd = max(request_usd, price / per)
        elif unit.get("name") == "token" and (part := _part_of(unit)) is not None:
            # Of two rates for one part, the dearer: a cap must hold whichever is charged.
            rates[part] = max(rates.get(part, Decimal(0)), price / per * _MTOK)
    if "input_mtok" not in rates or "output_mtok" not in rates:
        return None
    return Price(**rates, request_usd=request_usd, rounds_to_credits=endpoint.name == "aimlapi")


_ORIGINS = {
    ("input", None): "input_mtok", ("input", "provided"): "input_mtok",
    ("input", "cached"): "cache_read_mtok", ("input", "cache_read"): "cache_read_mtok",
    ("input", "cache_write"): "cache_write_mtok",
    ("output", None): "output_mtok", ("output", "generated"): "output_mtok",
    ("output", "reasoning"): "reasoning_mtok",
}  # fmt: skip


def _part_of(unit: Mapping[str, Any]) -> str | None:
    """Which part of a request a unit prices; None for images, audio and what else is no text."""
    content, origin = unit.get("content"), unit.get("origin")
    if content == "reasoning" and unit.get("measure") == "output":
        return "reasoning_mtok"
    if content not in (None, "text") or not isinstance(origin, (str, type(None))):
        return None
    return _ORIGINS.get((str(unit.get("measure")), origin))


def _from_fields(pricing: Mapping[str, Any]) -> Price | None:
    """Dollars per token by name, as OpenRouter lists them."""

    def rate(name: str) -> Decimal | None:
        usd = amount(pricing.get(name))
        return usd * _MTOK if usd is not None else None

    input_mtok, output_mtok = rate("prompt"), rate("completion")
    if input_mtok is None or output_mtok is None:
        return None
    return Price(
        input_mtok, output_mtok, cache_read_mtok=rate("input_cache_read"), cache_write_mtok=rate("input_cache_write"),
        reasoning_mtok=rate("internal_reasoning") or None, request_usd=amount(pricing.get("request")) or Decimal(0),
    )  # fmt: skip


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _whole(value: object) -> int | None:
    number = amount(value)
    return int(number) if number else None


# --- the library --------------------------------------------------------------------------------------------


def library_price(endpoint: Endpoint, model: str) -> Callable[[int], Price | None] | None:
    """The library's price of a model by the date of the request; None if it knows none, or is not installed."""
    try:
        from genai_prices import Usage, calc_price
    except ImportError:
        return None
    for where in _places(endpoint, model):
        try:
            # It has no plainer way to find a model; the price of this one token is not used.
            found = calc_price(Usage(input_tokens=1, output_tokens=1), model, **where)
        except LookupError:
            continue
        known: dict[int, tuple[Any, Price | None]] = {}

        def price_at(sent_at: int, found: Any = found, known: dict[int, tuple[Any, Price | None]] = known) -> Any:
            dated = found.model.get_prices(utc(sent_at))
            if id(dated) not in known:
                known[id(dated)] = (dated, _from_library(dated))
            return known[id(dated)][1]

        return price_at
    return None


def _places(endpoint: Endpoint, model: str) -> Iterator[dict[str, Any]]:
    if endpoint.name == "aimlapi":
        yield {"provider_id": "litellm"} if "/" in model else {}
    elif endpoint.name in _LIBRARY_PROVIDERS:
        yield {"provider_id": _LIBRARY_PROVIDERS[endpoint.name]}
    else:
        # A server of another name is known by its address alone: a model of the same name elsewhere costs otherwise.
        yield {"provider_api_url": endpoint.base_url}


def _from_library(dated: Any) -> Price | None:
    """The library's price of one date in our form."""
    names = {
        "input_mtok": "input_mtok", "output_mtok": "output_mtok", "cache_read_mtok": "cache_read_mtok",
        "cache_write_mtok": "cache_write_mtok", "cache_write_1h_mtok": "cache_write_1h_mtok",
        "output_reasoning_mtok": "reasoning_mtok",
    }  # fmt: skip
    rates = {ours: getattr(dated, theirs, None) for theirs, ours in names.items()}
    if rates["input_mtok"] is None or rates["output_mtok"] is None:
        return None
    starts = sorted({tier.start for rate in rates.values() for tier in getattr(rate, "tiers", ())})
    fee = getattr(dated, "requests_kcount", None)
    request_usd = _rate_at(fee, 0) / 1000 if fee is not None else Decimal(0)

    def price(prompt_tokens: int, tiers: Iterable[tuple[int, Price]] = ()) -> Price:
        at: dict[str, Any] = {ours: _rate_at(rate, prompt_tokens) for ours, rate in rates.items() if rate is not None}
        return Price(**at, request_usd=request_usd, tiers=tuple(tiers))

    return price(0, [(start, price(start + 1)) for start in starts])


def _rate_at(rate: Any, prompt_tokens: int) -> Decimal:
    """A rate, or that of the highest tier below a number of prompt tokens."""
    found = rate
    if hasattr(rate, "tiers"):
        found = rate.base
        for tier in rate.tiers:
            if prompt_tokens > tier.start:
                found = tier.price
    assert isinstance(found, Decimal)
    return found
