"""JSON and text from the wire, made safe: exact numbers, no exception but ValueError, text that UTF-8 can carry."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

_MOST_CONTAINERS = 2_000_000
"""Of one document: each takes some hundred bytes of memory, and as little as three of the text."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


class TooManyError(ValueError):
    """A document that would fill the memory."""


def _containers(text: str) -> int:
    number = text.count("[") + text.count("{")
    if number <= _MOST_CONTAINERS:
        return number
    plain = _STRING.sub("", text)
    return plain.count("[") + plain.count("{")


def parse_json(raw: bytes | str) -> Any:
    """JSON with exact decimals; NaN, infinities and numbers beyond all bounds are null.

    Raises:
        ValueError: it is no JSON.

    >>> parse_json(b'\\xef\\xbb\\xbf {"a": 0.10, "b": 1e99999999999999999999}')
    {'a': Decimal('0.10'), 'b': None}
    """
    text = raw.decode("utf-8", errors="replace") if isinstance(raw, bytes) else raw
    if len(text) > _MOST_CONTAINERS and _containers(text) > _MOST_CONTAINERS:
        raise TooManyError(f"it holds more than {_MOST_CONTAINERS} lists and objects")
    if not text.startswith("{"):
        text = text.lstrip("\ufeff \t\r\n\x00")
    try:
        document, end = _DECODER.raw_decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if end < len(text) and text[end:].strip(" \t\r\n"):
        raise ValueError(f"something follows it: {text[end:][:60]!r}")
    return document


def sound(text: str) -> str:
    """Text that UTF-8 can carry: halves of a surrogate pair joined, lone ones replaced.

    >>> sound("\\ud83d\\ude00 \\ud800")
    '😀 \ufffd'
    """
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def unwrapped(document: Any) -> Any:
    """The first object of an array of objects: Gemini's compatible endpoint wraps its errors so."""
    if isinstance(document, list):
        return next((item for item in document if isinstance(item, dict)), document)
    return document


def is_error(document: Any) -> bool:
    """True for an object that says that something went wrong and holds nothing of an answer."""
    if not isinstance(document, dict):
        return False
    if document.get("choices") or document.get("usage") or document.get("meta") or document.get("x_groq"):
        return False
    if document.get("error") or document.get("errors") or document.get("object") == "error":
        return True
    return any(
        isinstance(document.get(name), (str, list)) and document[name] for name in ("message", "detail", "title")
    )


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def _nothing(name: str) -> None:
    return None


_DECODER = json.JSONDecoder(parse_float=_decimal, parse_constant=_nothing)
