"""Secrets out of whatever a server says: it may echo the key, as it is or written in another way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

_ESCAPED = re.compile(rb"\\(?:\\|u00([2-7][0-9a-fA-F]))")
_MASK = "[secret]"


class Scrubber:
    """Replaces secrets.

    >>> Scrubber(["sk-1/2"]).raw(b'{"said": "sk-1\\\\/2 \\\\u0073k-1/2"}')
    b'{"said": "[secret] [secret]"}'
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = [secret for secret in secrets if secret]
        self._keys = [secret for secret in self._secrets if len(secret) >= 12 and re.search(r"\d", secret)]
        # As they are, and as a JSON document would write them.
        self._forms = [
            form.encode()
            for secret in self._secrets
            for form in {secret, json.dumps(secret)[1:-1], secret.replace("/", "\\/")}
        ]

    def raw(self, raw: bytes) -> bytes:
        """Bytes without secrets; of JSON, also without those that are spelt in `\\u` escapes."""
        if not self._forms:
            return raw
        if b"\\u00" in raw:
            plain = _ESCAPED.sub(_unescaped, raw)
            if (scrubbed := self._replaced(plain)) != plain:
                return scrubbed
        return self._replaced(raw)

    def text(self, text: str) -> str:
        """Text without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, _MASK)
        return text

    def is_in(self, texts: Iterable[str | None]) -> bool:
        """True if any of the texts holds a secret that is no word: one that nobody writes by chance."""
        return bool(self._keys) and any(secret in text for text in texts if text for secret in self._keys)

    def _replaced(self, raw: bytes) -> bytes:
        for form in self._forms:
            raw = raw.replace(form, _MASK.encode())
        return raw


def _unescaped(match: re.Match[bytes]) -> bytes:
    if match[1] is None:
        return match[0]
    character = bytes([int(match[1], 16)])
    return match[0] if character in b'"\\\x7f' else character
