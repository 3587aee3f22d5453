"""Names, texts and numbers as a page shows them: bounded, on one line or few, free of what none may hold."""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

import pandas as pd

from batchrun.money import usd_text
from batchrun.tables import columns

_DIGITS = 4
_NAME, _LABEL = 80, 40
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# What HTML forbids: controls but tab and line feed, surrogates (UTF-8 has no bytes for them), the two noncharacters.
# And the overrides, by which a text is read as another than it is.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff\ufffe\uffff]")
_BREAKS = re.compile(r"\r\n?")
_BLANKS = re.compile(r"\s+")


class Cut(NamedTuple):
    """The beginning of a text."""

    text: str
    left_out: int
    """Characters after it."""

    @property
    def is_long(self) -> bool:
        """It is to be folded away until somebody asks for it."""
        return len(self.text) > 400 or self.text.count("\n") > 6

    @property
    def beginning(self) -> str:
        """On one line."""
        return name(self.text[:400], 110)


def cut(text: str, most: int) -> Cut:
    """At most so many characters of a text.

    >>> cut("a\\x00b\\r\\nc", 9), cut("abc", 2)
    (Cut(text='a�b\\nc', left_out=0), Cut(text='ab', left_out=1))
    """
    # Cut first: what is dropped need not be cleaned.
    return Cut(_FORBIDDEN.sub("\ufffd", _BREAKS.sub("\n", text[:most])), max(0, len(text) - most))


def name(text: Any, most: int = _NAME) -> str:
    """A name on one line, of at most so many characters.

    >>> name("a\\n b"), name("abcdef", 4)
    ('a b', 'abc…')
    """
    line = _BLANKS.sub(" ", cut(str(text), 4 * most).text).strip()
    return line if len(line) <= most else line[: most - 1] + "…"


def label(text: Any, most: int = _LABEL) -> str:
    """A name within a chart, where nothing wraps; what is written from right to left keeps to itself."""
    line = name(text, most)
    if columns(line) > most:
        while columns(line) >= most:
            line = line[:-1]
        line += "…"
    return line if line.isascii() else f"\u2068{line}\u2069"


def usd(amount: Decimal) -> str:
    """Exact dollars, to the last digit.

    >>> usd(Decimal("1E-7"))
    '$0.0000001'
    """
    return f"${usd_text(amount)}"


def average(amount: Decimal) -> str:
    """Dollars that no bill holds, to some digits.

    >>> average(Decimal("0.123456"))
    '$0.1235'
    """
    return usd(Decimal(f"{amount:.{_DIGITS}g}"))


def percent(share: float) -> str:
    """A change, with its sign."""
    return f"{share:+.0%}".replace("-", "−")


def day(moment: datetime) -> str:
    """Day and time (UTC), within a chart. No strftime: its months are those of the machine's language."""
    return f"{moment.day} {month(moment.month)} {moment:%H:%M}"


def month(number: int) -> str:
    """The short name of a month from 1 to 12."""
    return _MONTHS[number - 1]


def took(seconds: float) -> str:
    """How long something took; it is not broken into lines.

    >>> took(5.04), took(125), took(7325)
    ('5.0\\xa0s', '2\\xa0m\\xa005\\xa0s', '2\\xa0h\\xa002\\xa0m')
    """
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}\xa0h\xa0{whole % 3600 // 60:02}\xa0m"
    return f"{whole // 60}\xa0m\xa0{whole % 60:02}\xa0s" if whole >= 60 else f"{seconds:.1f}\xa0s"


def given(value: Any) -> Any:
    """A value of a frame; None where pandas has put its word for nothing."""
    return None if not isinstance(value, dict | list) and pd.isna(value) else value
