"""Text files, read line by line, and from places that were noted before."""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import TextIOWrapper
from typing import IO

from batchrun.errors import InputError
from batchrun.remote import AnyPath

MOST_CHARACTERS = 100_000_000
"""Of a line or a cell."""
_PLACED = ("utf-8", "ascii")
_PLACED_KINDS = ("iso8859", "cp125")
"""Encodings in which a text can be cut anywhere between two characters."""


@dataclass
class Place:
    """Where a reader of a text file is."""

    row: int = 0
    offset: int = 0
    """Bytes before it."""
    line: int = 0
    """Lines before it."""


def has_places(encoding: str) -> bool:
    """True if a text in this encoding can be read from the middle."""
    name = codecs.lookup(encoding).name
    return name in _PLACED or name.startswith(_PLACED_KINDS)


@contextmanager
def open_text(path: AnyPath, encoding: str, newline: str, offset: int, *, is_gzip: bool) -> Iterator[IO[str]]:
    """Open a file to be read from a byte on, which is 0 or that of a `Place`.

    Raises:
        InputError: while it is read: it is not in this encoding.
    """
    is_top = offset == 0 and codecs.lookup(encoding).name == "utf-8"
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) if is_gzip else nullcontext(packed) as raw:
        raw.seek(offset)
        # The same, and a byte order mark is not part of the first column's name.
        with TextIOWrapper(raw, encoding="utf-8-sig" if is_top else encoding, newline=newline) as fp:
            try:
                yield fp
            except UnicodeError as exc:
                raise InputError(
                    f"{path}: is not {encoding} ({exc}): set input: {{encoding: …}}, such as latin-1 or cp1252"
                ) from None


def lines_of(fp: IO[str], path: AnyPath, place: Place, encoding: str) -> Iterator[str]:
    """Lines, none of them endless: a file of a few megabytes can unpack to one of many gigabytes.

    Args:
        place: where `fp` is; it is moved along.
    """
    if not place.offset:
        place.offset = _mark_bytes(path, encoding)
    while line := fp.readline(MOST_CHARACTERS):
        place.line += 1
        if len(line) >= MOST_CHARACTERS:
            raise InputError(f"{path}: line {place.line}: is longer than {MOST_CHARACTERS} characters")
        place.offset += len(line) if line.isascii() else len(line.encode(encoding))
        yield line


def _mark_bytes(path: AnyPath, encoding: str) -> int:
    """Bytes of the byte order mark at the top of a file."""
    if codecs.lookup(encoding).name != "utf-8":
        return 0
    with path.open("rb") as raw:
        return 3 if raw.read(3) == codecs.BOM_UTF8 else 0
