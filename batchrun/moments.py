"""Moments as a command line names them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from batchrun.errors import JobError

_AGO = re.compile(r"(\d{1,6})([hdw])")
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def moment_of(text: str, now: datetime, option: str) -> datetime:
    """A date or a moment (UTC, where it says nothing else), or how long ago: 24h, 7d, 4w.

    Args:
        option: names it in an error.

    Raises:
        JobError: it is none of these.

    >>> moment_of("7d", datetime(2026, 1, 8, tzinfo=UTC), "--since")
    datetime.datetime(2026, 1, 1, 0, 0, tzinfo=datetime.timezone.utc)
    """
    if match := _AGO.fullmatch(text.strip()):
        number, unit = match.groups()
        try:
            return now - timedelta(**{_UNITS[unit]: int(number)})
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise JobError(f"{option} {text}: should be 24h, 7d, 4w, or a date such as 2026-11-01") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
