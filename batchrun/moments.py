"""Moments and durations as a command line and a job name them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, time, timedelta, tzinfo

from batchrun.errors import JobError

_UNITS = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_DURATION = re.compile("".join(rf"(?:(?P<{name}>\d{{1,6}}(?:\.\d{{1,6}})?){unit})?" for unit, name in _UNITS.items()))
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?(Z|[+-]\d\d:\d\d)?")


def duration_of(text: str) -> timedelta | None:
    """How long something takes, such as 90m, 1h30m or 7d; None for any other text.

    >>> duration_of("1h30m"), duration_of("soon")
    (datetime.timedelta(seconds=5400), None)
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groupdict().values()):
        return None
    try:
        return timedelta(**{name: float(number) for name, number in match.groupdict().items() if number})
    except OverflowError:
        return timedelta.max


def age_of(text: str, option: str) -> timedelta:
    """A duration that an option takes.

    Raises:
        JobError: it is none.
    """
    found = duration_of(text)
    if found is None:
        raise JobError(f"{option} {text}: should be a duration such as 24h, 90m or 7d")
    return found


def moment_of(text: str, now: datetime, option: str) -> datetime:
    """A date or a moment (UTC, where it says nothing else), or how long ago: 24h, 7d, 4w.

    Args:
        option: names it in an error.

    Raises:
        JobError: it is none of these.

    >>> moment_of("7d", datetime(2026, 1, 8, tzinfo=UTC), "--since")
    datetime.datetime(2026, 1, 1, 0, 0, tzinfo=datetime.timezone.utc)
    """
    ago = duration_of(text)
    if ago is not None:
        try:
            return now - ago
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)
    moment = _moment(text, UTC)
    if moment is None:
        raise JobError(f"{option} {text}: should be 24h, 7d, 4w, or a date such as 2026-11-01")
    return moment


def deadline_of(text: str, now: datetime) -> datetime:
    """When a deadline is that is given as a duration from now, a time of day (the next one), or a moment.

    Times are this machine's local ones, unless they have an offset.

    Raises:
        ValueError: it is none of these.

    >>> deadline_of("2h", datetime(2026, 1, 8, 22, tzinfo=UTC)).isoformat()
    '2026-01-09T00:00:00+00:00'
    >>> deadline_of("06:00Z", datetime(2026, 1, 8, 22, tzinfo=UTC)).isoformat()
    '2026-01-09T06:00:00+00:00'
    """
    lasting = duration_of(text)
    if lasting is not None:
        try:
            return now + lasting
        except OverflowError:
            return datetime.max.replace(tzinfo=UTC)
    try:
        moment = _next(text, now) if _CLOCK.fullmatch(text.strip()) else _moment(text, None)
    except (OverflowError, ValueError):
        moment = None
    if moment is None:
        raise ValueError(f"{text!r} is no deadline: write 2h, 90m, 06:00, 06:00+02:00 or 2026-11-01T06:00")
    return moment


def _next(text: str, now: datetime) -> datetime | None:
    """The next time that clocks show this."""
    match = _CLOCK.fullmatch(text.strip())
    assert match is not None
    hour, minute, second, offset = match.groups()
    try:
        at = time(int(hour), int(minute), int(second or 0))
        zone = datetime.fromisoformat(f"2000-01-01T00:00{offset}").tzinfo if offset else None
    except ValueError:
        return None
    # Day by day on the clock, not by 24 hours: where it is put forward or back, they are not the same.
    today = now.astimezone(zone).replace(tzinfo=None).date()
    # Put back, they show a time twice.
    days = (datetime.combine(today + timedelta(days=more), at.replace(fold=fold)) for more in (0, 1) for fold in (0, 1))
    return next(moment for day in days if (moment := _at(day, zone)) > now)


def _moment(text: str, zone: tzinfo | None) -> datetime | None:
    """A moment as ISO 8601 writes it. `zone`: of one that does not say it; None for this machine's."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else _at(moment, zone)


def _at(clock: datetime, zone: tzinfo | None) -> datetime:
    """The moment at which clocks show this. `zone`: None for this machine's."""
    return clock.astimezone() if zone is None else clock.replace(tzinfo=zone)
