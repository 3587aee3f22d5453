"""Documents with holes: what is the same in every row is encoded once."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from msgspec.json import Encoder

# No text of a job can hold it by chance, or on purpose.
_MARK = f"\ue000{secrets.token_hex(8)}"
_HOLE = re.compile(rf"{_MARK}[tv](\d+)\ue001")
_ENCODED = re.compile(rf'"{_MARK}v(\d+)\ue001"|{_MARK}t(\d+)\ue001')
_escape = Encoder().encode


def text_hole(number: int) -> str:
    """Stands in a document for a text: alone, or within a longer one. `number`: its place among the values of a row."""
    return f"{_MARK}t{number}\ue001"


def value_hole(number: int) -> str:
    """Stands in a document for a value of any type."""
    return f"{_MARK}v{number}\ue001"


def has_holes(document: Any) -> bool:
    """True if a row's values go into a document of lists, mappings and texts."""
    if isinstance(document, str):
        return _MARK in document
    if isinstance(document, dict):
        return any(map(has_holes, document.values()))
    return isinstance(document, list) and any(map(has_holes, document))


def filled(document: Any, values: Sequence[Any]) -> Any:
    """A document with a row's values in its holes.

    >>> filled({"a": [value_hole(0), f"n = {text_hole(1)}"]}, [7, "8"])
    {'a': [7, 'n = 8']}
    """
    if isinstance(document, str):
        if _MARK not in document:
            return document
        whole = _HOLE.fullmatch(document)
        return values[int(whole[1])] if whole else _HOLE.sub(lambda hole: str(values[int(hole[1])]), document)
    if isinstance(document, dict):
        return {name: filled(item, values) for name, item in document.items()}
    return [filled(item, values) for item in document] if isinstance(document, list) else document


def escaped(values: Sequence[Any]) -> list[bytes | None]:
    """The texts of a row as they stand in JSON, within longer ones; None for what is no text.

    Raises:
        UnicodeEncodeError: one has half of a surrogate pair.
    """
    return [_escape(str(value))[1:-1] if isinstance(value, str) else None for value in values]


class Form:
    """A document with holes, as JSON.

    >>> import json
    >>> form = Form({"a": value_hole(0), "b": f"<{text_hole(1)}>"}, json.JSONEncoder(ensure_ascii=False).encode)
    >>> form.json([None, 'x"'], escaped([None, 'x"']))
    b'{"a": null, "b": "<x\\\\">"}'

    Args:
        encode: what makes JSON of the document and of values.
    """

    def __init__(self, document: Any, encode: Callable[[Any], str]) -> None:
        self._encode = encode
        first, *rest = _ENCODED.split(encode(document))
        self._first = first.encode()
        self._rest = [
            (int(value or text), value is not None, after.encode())
            for value, text, after in zip(rest[::3], rest[1::3], rest[2::3], strict=True)
        ]

    def json(self, values: Sequence[Any], texts: Sequence[bytes | None]) -> bytes:
        """The document with a row's values; the same as if it were encoded as a whole.

        Args:
            texts: those of them that are texts, `escaped`; it is the same for all forms.

        Raises:
            UnicodeEncodeError: a value has half of a surrogate pair.
        """
        parts = [self._first]
        for number, is_value, after in self._rest:
            text = self._encode(values[number]).encode() if is_value else texts[number]
            assert text is not None
            parts += (text, after)
        return b"".join(parts)
