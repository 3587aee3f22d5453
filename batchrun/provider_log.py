"""The provider's own log of what it billed: `GET /v2/logs` of AI/ML API, read to its end or not at all.

It cannot be asked for one request: it is paged, newest first, and matched on our side. Lines that arrive meanwhile
shift the pages, so that a line may be seen twice. Lines appear some time after their answer, so that none says nothing
about a request that is young.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)
from tenacity.stop import stop_base

from batchrun.documents import parse_json, sound
from batchrun.errors import ProviderError
from batchrun.failures import parse_retry_after
from batchrun.fetch import Fetcher, FetchError
from batchrun.money import usd_from_credits, usd_from_wire
from batchrun.providers import Endpoint
from batchrun.usage import count

_PAGE = 100
_SECONDS = 60.0
"""For one page."""
_MOST_BYTES = 8 * 1024 * 1024
_MOST_LINES = 10_000_000
"""Of a window; at 200 calls a minute they take more than eight hours."""
_ATTEMPTS = 5
"""Of one page, if the provider is in trouble or cannot be reached."""
_PATIENCE = 600.0
"""Seconds that one page is tried for, if the provider asks for fewer calls: it allows 200 in 60 s."""
_LONGEST_WAIT = 120.0
_MOST_USD = 1_000_000
"""Of one request; more is no cost that can be read."""
_LONGEST_WINDOW = timedelta(days=92)
_MOST_SKEW = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class BilledLine:
    """A line of the log."""

    client_request_id: str
    identity: str
    """What tells it from another line of the same request."""
    usd: Decimal | None
    """None if the line has no cost that can be read."""


class _TryAgainError(Exception):
    """Another call may bring the page."""


class _TooManyError(_TryAgainError):
    """The provider asks for fewer calls."""

    def __init__(self, wait: float | None) -> None:
        super().__init__("it refuses more calls (429)")
        self.wait = wait


def window(first: datetime, now: datetime) -> tuple[datetime, datetime]:
    """The part of the log to be read for requests sent since `first`; it reaches back 92 days at most."""
    return max(first - _MOST_SKEW, now - _LONGEST_WINDOW), now


def read_log(
    endpoint: Endpoint, start: datetime, end: datetime, on_page: Callable[[int], None] = lambda lines: None
) -> Iterator[BilledLine]:
    """Every line of the window that carries an id of a client.

    Args:
        on_page: called with the number of lines read so far.

    Raises:
        ProviderError: a page could not be had, so that lines may be missing: nothing must be concluded.
    """
    url = httpx.URL(re.sub(r"/v1$", "", endpoint.base_url.rstrip("/")) + "/v2/logs")
    with Fetcher(endpoint.base_url, endpoint.headers, seconds=_SECONDS, most_bytes=_MOST_BYTES) as fetcher:
        offset = 0
        earlier: list[Any] = []
        while True:
            query: dict[str, str | int] = {"start": _iso(start), "end": _iso(end), "limit": _PAGE, "offset": offset}
            document = _page(fetcher, url.copy_merge_params(query), endpoint)
            lines, pagination = document.get("data"), document.get("pagination")
            if not isinstance(lines, list) or not isinstance(pagination, Mapping):
                raise ProviderError(f"{url} answers in a form that is not known; nothing was changed")
            if lines and lines == earlier:
                raise ProviderError(f"{url} gives the same page again and again (line {offset}); nothing was changed")
            earlier = lines
            for line in lines:
                if isinstance(line, Mapping) and isinstance(line.get("client_request_id"), str):
                    yield _line(line)
            offset += len(lines)
            on_page(offset)
            total = count(pagination.get("total"))
            if max(offset, total or 0) > _MOST_LINES:
                raise ProviderError(
                    f"{url} says that it has {max(offset, total or 0)} lines, and more than {_MOST_LINES} cannot be "
                    "read; nothing was changed"
                )
            is_full = len(lines) >= (count(pagination.get("limit")) or _PAGE)
            has_more = pagination.get("has_more", is_full if total is None else False)
            if not has_more and (total is None or offset >= total):
                return
            if not lines:
                raise ProviderError(f"{url} ends before its end (at line {offset}); nothing was changed")


def _page(fetcher: Fetcher, url: httpx.URL, endpoint: Endpoint) -> Mapping[str, Any]:
    policy = Retrying(
        retry=retry_if_exception_type(_TryAgainError),
        wait=_told_or_backoff,
        stop=_Patience(),
        reraise=True,
    )
    try:
        document: Mapping[str, Any] = policy(_get, fetcher, url, endpoint)
    except _TryAgainError as exc:
        raise ProviderError(f"the provider's log cannot be read to its end: {exc}; nothing was changed") from exc
    return document


class _Patience(stop_base):
    def __call__(self, retry_state: RetryCallState) -> bool:
        if isinstance(_error_of(retry_state), _TooManyError):
            return stop_after_delay(_PATIENCE)(retry_state)
        return stop_after_attempt(_ATTEMPTS)(retry_state)


def _told_or_backoff(state: RetryCallState) -> float:
    exc = _error_of(state)
    told = exc.wait if isinstance(exc, _TooManyError) else None
    return min(_LONGEST_WAIT, told) if told else wait_random_exponential(multiplier=0.5, max=30)(state)


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _get(fetcher: Fetcher, url: httpx.URL, endpoint: Endpoint) -> Mapping[str, Any]:
    try:
        fetched = fetcher.get(url)
        body = endpoint.scrubber.raw(fetched.body)
    except FetchError as exc:
        raise _TryAgainError(endpoint.scrubber.text(str(exc))) from exc
    if fetched.status == 429:
        raise _TooManyError(parse_retry_after(fetched.headers.get("retry-after", "")))
    if fetched.status >= 500:
        raise _TryAgainError(f"it answers {fetched.status}")
    if fetched.status != 200:
        said = endpoint.scrubber.text(sound(body[:1000].decode("utf-8", "replace")))[:200]
        raise ProviderError(f"the provider's log answers {fetched.status}: {said}; nothing was changed")
    _refuse_skew(fetched.headers.get("date"))
    try:
        document = parse_json(body)
    except ValueError as exc:
        raise _TryAgainError(f"it answers no JSON ({exc})") from exc
    return document if isinstance(document, Mapping) else {}


def _refuse_skew(date: str | None) -> None:
    """With clocks apart, the window would not hold what was sent in it."""
    try:
        theirs = parsedate_to_datetime(date or "")
    except (ValueError, OverflowError):
        return
    skew = theirs.replace(tzinfo=theirs.tzinfo or UTC) - datetime.now(UTC)
    if abs(skew) > _MOST_SKEW:
        raise ProviderError(
            f"this machine's clock is {abs(skew)} away from the provider's: set it right; nothing was changed"
        )


def _line(line: Mapping[str, Any]) -> BilledLine:
    cost = line.get("cost")
    usd = None
    if isinstance(cost, Mapping):
        usd = usd_from_wire(cost.get("usd"))
        usd = usd if usd is not None else usd_from_credits(cost.get("credits"))
    if usd is not None and usd > _MOST_USD:
        usd = None
    is_failed = line.get("status") == "failed"
    identity = [str(line.get(name)) for name in ("inference_id", "request_id", "created")]
    free = Decimal(0) if is_failed else None
    return BilledLine(sound(line["client_request_id"]), "|".join(identity), usd if usd is not None else free)


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
