"""Raw answers as the ledger keeps them: packed by whoever takes them, so that a head need not for its workers."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import NamedTuple

import zstandard

UnpackError = zstandard.ZstdError
"""What is stored was damaged since."""


def digest(raw: bytes) -> str:
    """What of an answer goes into its attempt's seal."""
    return blake2b(raw, digest_size=16).hexdigest()


class Stored(NamedTuple):
    """An answer, packed."""

    size: int
    """Bytes, as it came."""
    packed: bytes
    """Compressed by zstd."""
    digest: str


NOTHING = Stored(0, b"", digest(b""))
"""Of what brought no answer."""


class Packer:
    """Packs answers, one after the other."""

    def __init__(self) -> None:
        self._compress = zstandard.ZstdCompressor(level=3).compress

    def pack(self, raw: bytes) -> Stored:
        """An answer as it is kept."""
        return Stored(len(raw), self._compress(raw), digest(raw)) if raw else NOTHING


class Unpacker:
    """Unpacks answers, one after the other."""

    def __init__(self) -> None:
        self.unpack: Callable[[bytes], bytes] = zstandard.ZstdDecompressor().decompress
        """An answer as it came; an UnpackError if it was damaged."""
