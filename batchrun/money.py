"""Exact dollars: Decimal in Python, integer pico-dollars (1e-12 USD) in the ledger."""

from __future__ import annotations

import json
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from typing import Any, NamedTuple

PICO_PER_USD = 10**12
CREDITS_PER_USD = 2_000_000
"""AI/ML API: $1 = 2,000,000 credits."""

_MOST_USD = Decimal(9_000_000)  # a 64-bit integer of pico-dollars ends at 9.2 million
_MOST = Decimal(10**18)
_PICO = Decimal(PICO_PER_USD)
_WIDE = Context(prec=60)

REPORTED = ("reported", "credits")
"""Sources of an amount that the provider has told."""
DERIVED = ("job", "provider_list", "library")
"""Sources of an amount that we derive from tokens; the provider's own word beats it."""

# From the best known to the least: a row's cost_source is its weakest.
COST_SOURCES = (
    "reported",
    "credits",
    "job",
    "provider_list",
    "library",
    "local",
    "reused",
    "not_billed",
)


class Cost(NamedTuple):
    """What one attempt cost; `usd` None is unknown, which is never 0."""

    usd: Decimal | None = None
    source: str | None = None


UNKNOWN = Cost()
NOT_BILLED = Cost(Decimal(0), "not_billed")
LOCAL = Cost(Decimal(0), "local")


def amount(value: object) -> Decimal | None:
    """Read a non-negative amount of dollars or credits from the wire; None if it is none.

    >>> amount("0.001240000"), amount(Decimal("-1")), amount("nan")
    (Decimal('0.001240000'), None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, str, Decimal)):
        return None
    try:
        number = Decimal(value.strip() if isinstance(value, str) else value)
    except InvalidOperation:
        return None
    return number if number.is_finite() and 0 <= number < _MOST else None


def usd_from_wire(value: object) -> Decimal | None:
    """An amount of dollars that the ledger can hold; finer than 1e-12 is rounded half-even."""
    usd = amount(value)
    return from_pico(to_pico(usd)) if usd is not None and usd < _MOST_USD else None


def usd_from_credits(value: object) -> Decimal | None:
    """Credits of AI/ML API as dollars.

    >>> usd_from_credits(17368)
    Decimal('0.008684')
    """
    credits_used = amount(value)
    if credits_used is None or credits_used >= _MOST_USD * CREDITS_PER_USD:
        return None
    return usd_from_wire(credits_used / CREDITS_PER_USD)


def to_pico(usd: Decimal) -> int:
    """Dollars as whole pico-dollars, rounded half-even.

    >>> to_pico(Decimal("0.000788"))
    788000000
    """
    return int(_WIDE.multiply(usd, _PICO).to_integral_value(ROUND_HALF_EVEN, _WIDE))


def from_pico(pico: int) -> Decimal:
    """Whole pico-dollars as dollars, without trailing zeros.

    >>> from_pico(788000000)
    Decimal('0.000788')
    """
    usd = Decimal(pico).scaleb(-12)
    return usd.quantize(Decimal(1)) if usd == usd.to_integral_value() else usd.normalize()


def usd_text(usd: Decimal) -> str:
    """An exact amount as plain text, never in exponent form.

    >>> usd_text(Decimal("1E-7")), usd_text(Decimal("10.50"))
    ('0.0000001', '10.5')
    """
    text = format(usd, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def exact_json(value: Any) -> str:
    """JSON whose Decimals are numbers with every digit, which a float would not keep."""
    if isinstance(value, Decimal):
        return usd_text(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {exact_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(exact_json, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
