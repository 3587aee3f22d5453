"""Text in columns, for a terminal: aligned, bounded in width, and free of what a terminal would obey."""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import combining, east_asian_width

WIDTH = 100
"""Columns of a terminal that a table may take."""
_JOINERS = "\u200c\u200d"  # of Persian words and of emoji


def shown(text: str, width: int = WIDTH) -> str:
    """At most `width` columns of a text, on one line.

    >>> shown("positive", 5), shown("a\\nb"), shown("日本", 3)
    ('posi…', 'a�b', '日…')
    """
    clean = _plain(text[: 8 * width])
    if columns(clean) <= width:
        return clean
    while columns(clean) >= width:
        clean = clean[:-1]
    return clean + "…"


def harmless(text: str) -> str:
    r"""Lines without what a terminal would obey.

    >>> harmless("a\tb\nc\x1b[2J")
    'a       b\nc�[2J'
    """
    return "\n".join(_plain(line.expandtabs()) for line in text.split("\n"))


def _plain(line: str) -> str:
    return "".join(char if char.isprintable() or char in _JOINERS else "\ufffd" for char in line)


def columns(text: str) -> int:
    """How many columns a terminal takes for a text."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(char: str) -> int:
    return 0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line per row: the first cell to the left, the others to the right; all rows have as many cells.

    >>> aligned([["", "yes", "no"], ["yes", "12", "3"]])
    ['     yes  no', 'yes   12   3']
    """
    widths = [max(map(columns, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first + " " * (widths[0] - columns(first))]
        cells += [" " * (width - columns(cell)) + cell for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
