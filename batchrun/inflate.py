"""Compressed bytes → the bytes that they stand for, never more than was allowed."""

from __future__ import annotations

import zlib

ACCEPTED = "gzip, deflate"
"""For the header Accept-Encoding."""


class TooLongError(Exception):
    """More came than was allowed."""


class UnaskedError(Exception):
    """An encoding that was not asked for."""


class Inflater:
    """The body of one HTTP answer.

    Args:
        encoding: the header Content-Encoding.
        most: bytes, on the wire and unpacked.

    Raises:
        UnaskedError: none of gzip, deflate, identity.
    """

    def __init__(self, encoding: str, most: int) -> None:
        name = encoding.strip().lower()
        if name not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise UnaskedError(f"the answer's encoding {name[:40]!r} was not asked for")
        self._wbits = zlib.MAX_WBITS if name == "deflate" else zlib.MAX_WBITS | 16
        self._inflate = zlib.decompressobj(self._wbits) if name not in ("", "identity") else None
        self._is_first = True
        self._left = most
        self._wire_left = most

    def feed(self, piece: bytes) -> bytes:
        """Take the next bytes of the wire; what follows the end of what is packed is dropped.

        Raises:
            TooLongError: there are more than allowed.
            ValueError: they are not packed as they say.
        """
        self._wire_left -= len(piece)
        if self._wire_left < 0:
            raise TooLongError
        if self._inflate is not None:
            piece = self._unpacked(self._inflate, piece)
        self._left -= len(piece)
        if self._left < 0:
            raise TooLongError
        return piece

    def _unpacked(self, inflate: zlib._Decompress, piece: bytes) -> bytes:
        if inflate.eof or not piece:
            return b""
        try:
            try:
                unpacked = inflate.decompress(piece, self._left + 1)
            except zlib.error:
                # Some servers say deflate and leave out zlib's frame.
                if not self._is_first or self._wbits != zlib.MAX_WBITS:
                    raise
                self._inflate = inflate = zlib.decompressobj(-zlib.MAX_WBITS)
                unpacked = inflate.decompress(piece, self._left + 1)
        except zlib.error as exc:
            raise ValueError(f"the answer cannot be unpacked: {exc}") from exc
        self._is_first = False
        return unpacked
