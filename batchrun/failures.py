"""An error answer, in any of the envelopes that providers use, read as a `Failure`.

Status first, then the words: the same text can mean the user's empty account or the gateway's own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from batchrun.documents import parse_json, sound, unwrapped
from batchrun.records import Action, Failure

_MESSAGE_LENGTH = 500
_READ_FOR_WAITS = 4000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

_NO_CREDIT = re.compile(
    r"\bout of credits?\b|\bexhausted the available\b|\binsufficient[ _](balance|funds|credits?)\b"
    r"|\bcredit balance is too low\b|\bkey limit exceeded\b|\btop up your\b"
    r"|\bbilling[ _](hard[ _]limit|not[ _]active)\b",
    re.IGNORECASE,
)
_QUOTA_CODE = re.compile(r"insufficient_quota|enforced_spend_limit|billing_hard_limit|quota_exceeded", re.IGNORECASE)
_QUOTA_TEXT = re.compile(
    r"free[- ]tier limit|free limit for|exceeded your current quota|check your plan and billing|spend(ing)? limit",
    re.IGNORECASE,
)
_CONTEXT = re.compile(
    r"context_length_exceeded|exceed_context_size|maximum context length|context (length|window|size) (is )?exceed"
    r"|exceeds? the (available |maximum )?context",
    re.IGNORECASE,
)
# Some say of a bad key with 400 or 403 what others say with 401. Anchored: a message can quote the prompt.
_BAD_KEY = re.compile(
    r"(api key not valid|incorrect api key provided|invalid api key|your api key was reported as leaked)", re.IGNORECASE
)
_TOO_LARGE = re.compile(r"\brequest too large\b", re.IGNORECASE)
_LONGEST_WAIT = 30 * 86_400.0
_ABOUT_THE_PROMPT = re.compile(r"content|filter|safety|policy|context|validation|moderation", re.IGNORECASE)

# A refusal that a setting of the job mends.
_MENDS = (
    (
        re.compile(r"not support '?\"?system|system role (is )?not|role '?\"?system'?\"? (is )?not", re.IGNORECASE),
        "set provider: {system: top_level}",
    ),
    (re.compile(r"stream_options", re.IGNORECASE), "set provider: {include_usage: false}"),
)

# An error's type where no status tells: the names that OpenAI, Anthropic, Google, vLLM, llama.cpp and Ollama use.
_TYPES: tuple[tuple[str, int], ...] = (
    (r"overloaded", 529),
    (r"rate_?limit|resource_?exhausted|too_?many_?requests|throttl", 429),
    (r"insufficient_quota|enforced_spend_limit", 429),
    (r"billing|payment|insufficient_(balance|credits|funds)", 402),
    (r"auth|unauthenticated|invalid_api_key", 401),
    (r"permission|forbidden", 403),
    (r"not_?found", 404),
    (r"too_large", 413),
    (r"time_?out|deadline_?exceeded", 504),
    (r"unavailable", 503),
    (r"invalid_?(request|argument|prompt)|bad_?request|validation|exceed_context_size|context_length|failed_precondition",
     400),
    (r"content_(filter|policy)", 400),
    (r"server|internal|api_error|upstream|provider|unknown|disconnect", 500),
)  # fmt: skip


class _Words(NamedTuple):
    """What an error document says, wherever it says it."""

    message: str
    code: str | None
    kind: str | None
    upstream_type: str | None
    status: int | None
    request_id: str | None
    retry_after: float | None

    @property
    def named(self) -> str:
        """Every name that it gives the error, without the words that may quote the prompt."""
        return f"{self.kind or ''} {self.code or ''} {self.upstream_type or ''}"


def read_failure(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """Read an HTTP error answer (status 300 and above). `headers` has lower-case names."""
    text = body[:1_000_000].decode("utf-8", errors="replace").strip()
    try:
        document = parse_json(text)
    except ValueError:
        document = None
    if not isinstance(document, (dict, list)):
        document = {"message": document if isinstance(document, str) else _plain(text)}
    return failure_of(document, headers, status=status)


def failure_of(document: object, headers: Mapping[str, str], *, status: int | None = None) -> Failure:
    """Classify an error document. `status` None: it came inside a 200, and its own code or words tell."""
    words = _words(document)
    effective = status if status is not None else words.status
    if effective is None:
        effective = _status_of_type(words.named) or _status_of_words(words.message)
    kind, action = _classify(effective, words)
    should_retry = headers.get("x-should-retry", "").strip().lower()
    if should_retry == "false" and action in (Action.RETRY, Action.PACE):
        # The provider itself will not have this again: a limit that no wait lifts, or a row that it cannot do.
        action = Action.STOP if action is Action.PACE else Action.REJECT
    elif should_retry == "true" and action is Action.REJECT:
        action = Action.RETRY
    retry_after = _retry_after(headers, words) if action in (Action.RETRY, Action.PACE) else None
    if effective == 503 and retry_after is not None and action is Action.RETRY:
        action = Action.PACE
    message = words.message
    if not message and 300 <= effective < 400:
        message = f"redirected to {headers.get('location', '?')}, which is never followed: check base_url"
    message = message[:_MESSAGE_LENGTH]
    if kind == "bad_request":
        message += "".join(f" ({mend})" for pattern, mend in _MENDS if pattern.search(message))
    return Failure(
        kind=kind,
        action=action,
        message=message or f"HTTP {effective}",
        code=words.code or str(effective),
        upstream_type=words.upstream_type,
        retry_after=retry_after,
        request_id=words.request_id or request_id_of(headers),
    )


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """The provider's own id of a request, under any of the usual names."""
    for name in (
        "x-inference-id",
        "x-request-id",
        "request-id",
        "x-generation-id",
        "x-amzn-requestid",
        "cf-ray",
    ):
        if headers.get(name):
            return headers[name][:200]
    return None


def _classify(status: int, words: _Words) -> tuple[str, Action]:
    if status == 401 or (status in (400, 403) and _BAD_KEY.match(words.message)):
        return "auth", Action.STOP
    if status == 402:
        return "billing", Action.STOP
    if status == 403:
        return ("billing", Action.STOP) if _is_out_of_credit(words) else ("forbidden", Action.REJECT)
    if status == 429:
        if _TOO_LARGE.search(words.message):
            return "bad_request", Action.REJECT  # one request above the limit of a minute never fits
        # Google words its rate limits as a quota, and adds when to come back; a quota that is spent does not.
        is_spent = _QUOTA_CODE.search(words.named) or (_QUOTA_TEXT.search(words.message) and words.retry_after is None)
        return ("quota", Action.STOP) if is_spent or _is_out_of_credit(words) else ("rate_limit", Action.PACE)
    if status == 529:
        return "overloaded", Action.PACE
    if _CONTEXT.search(f"{words.named} {words.message}") and status != 404:
        return "bad_request", Action.REJECT  # llama.cpp says so with 500 as well
    if status in (408, 504):
        return "timeout", Action.RETRY
    if status in (409, 425) or status >= 500:
        return "server", Action.RETRY
    if _is_out_of_credit(words):
        # What an upstream says of its own caller is about the gateway's account, not the user's.
        return ("server", Action.RETRY) if words.upstream_type is not None else ("billing", Action.STOP)
    if status == 404:
        return "not_found", Action.REJECT
    if 300 <= status < 400:
        return "redirect", Action.REJECT
    return "bad_request", Action.REJECT


def _is_out_of_credit(words: _Words) -> bool:
    """Never by words that may quote the prompt: a filter's message can hold any text of the user's."""
    if _ABOUT_THE_PROMPT.search(f"{words.code or ''} {words.kind or ''}"):
        return False
    return bool(_NO_CREDIT.search(f"{words.code or ''} {words.kind or ''} {words.message}"))


def _words(document: object) -> _Words:
    document = unwrapped(document)
    outer: Mapping[str, Any] = document if isinstance(document, Mapping) else {}
    error = outer.get("error")
    inner: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    message = (
        _text(inner.get("message"))
        or (_text(error) if not inner else "")
        or _text(outer.get("message"))
        or _detail(inner.get("detail"))
        or _detail(outer.get("detail"))
        or _detail(outer.get("errors"))
        or _text(outer.get("title"))
    )
    status = next(
        (
            number
            for number in map(
                _http_status,
                (
                    inner.get("code"),
                    inner.get("status"),
                    inner.get("status_code"),
                    outer.get("statusCode"),
                    outer.get("status"),
                    outer.get("status_code"),
                    outer.get("code"),
                ),
            )
            if number is not None
        ),
        None,
    )
    code = next(
        (
            sound(str(value))
            for value in (inner.get("code"), outer.get("code"), outer.get("statusCode"))
            if isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
        ),
        None,
    )
    details = inner.get("details")
    if isinstance(details, Mapping) and isinstance(details.get("error_code"), str):
        code = sound(details["error_code"])
    outer_type = None if outer.get("type") in ("error", "about:blank") else outer.get("type")
    kind = next(
        (
            value
            for value in (inner.get("type"), inner.get("status"), inner.get("name"), outer_type)
            if isinstance(value, str) and value
        ),
        None,
    )
    upstream_type, upstream_message = _embedded(message)
    metadata = inner.get("metadata")
    if not upstream_message and isinstance(metadata, Mapping) and isinstance(metadata.get("raw"), str):
        raw = _text(metadata["raw"])
        message = f"{message}: {raw}" if raw not in message else message
    return _Words(
        message=upstream_message or message,
        code=code[:100] if code else None,
        kind=kind,
        upstream_type=upstream_type,
        status=status,
        request_id=next(
            (
                sound(value[:200])
                for value in (outer.get("requestId"), outer.get("request_id"), inner.get("request_id"))
                if isinstance(value, str) and value
            ),
            None,
        ),
        retry_after=_told_in_body(inner, message),
    )


def _text(value: object) -> str:
    """Words on one line, without what a terminal would take for orders."""
    return sound(_CONTROL.sub("", " ".join(value.split()))) if isinstance(value, str) else ""


def _detail(value: object) -> str:
    """FastAPI's `detail`: a string, or a list of `{msg, loc}`."""
    if isinstance(value, list):
        parts = []
        for item in value[:5]:
            if isinstance(item, Mapping):
                place = ".".join(map(str, item["loc"])) if isinstance(item.get("loc"), list) else ""
                said = _text(item.get("msg") or item.get("message"))
                parts.append(f"{place}: {said}" if place else said)
            else:
                parts.append(_text(item))
        return "; ".join(part for part in parts if part)
    if isinstance(value, Mapping):
        return _text(value.get("message") or value.get("msg") or value.get("error"))
    return _text(value)


def _embedded(message: str) -> tuple[str | None, str]:
    """An upstream's error document that a gateway has put into its message as text."""
    start = message.find("{")
    if start < 0 or '"' not in message[start:]:
        return None, ""
    try:
        document, _ = json.JSONDecoder().raw_decode(message, start)
    except (ValueError, RecursionError):
        return None, ""
    error = document.get("error", document) if isinstance(document, dict) else None
    if not isinstance(error, dict):
        return None, ""
    kind = error.get("type") or error.get("status") or error.get("code")
    said = _text(error.get("message"))
    if not said and kind is None:
        return None, ""
    prefix = message[:start].strip(" :-")
    return sound(str(kind)) if kind is not None else "upstream", f"{prefix}: {said}" if prefix else said


def _plain(text: str) -> str:
    """Some words of an answer that is no JSON, HTML stripped to its text."""
    if text.startswith("<"):
        text = re.sub(r"<(script|style)\b.*?</\1>", " ", text[:20_000], flags=re.DOTALL | re.IGNORECASE)
        text = re.sub(r"<[^>]*>", " ", text)
    return _text(text)[:_MESSAGE_LENGTH]


def _http_status(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[345]\d\d", value.strip()):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 300 <= value <= 599 else None


def _status_of_type(named: str) -> int | None:
    return next((status for pattern, status in _TYPES if re.search(pattern, named, re.IGNORECASE)), None)


def _status_of_words(message: str) -> int:
    """The last resort, for an error inside a 200 that has words only."""
    for pattern, status in (
        (_NO_CREDIT, 402),
        (re.compile(r"unauthori[sz]ed|(invalid|incorrect|missing) (api )?key", re.IGNORECASE), 401),
        (re.compile(r"rate limit|too many requests", re.IGNORECASE), 429),
        (re.compile(r"overloaded", re.IGNORECASE), 529),
    ):
        if pattern.search(message):
            return status
    return 500


# --- how long to wait ---------------------------------------------------------------------------------------

_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|ns|h|m|s|d)")
_LONGEST_DURATION = 40
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TOLD = re.compile(
    r"(?:retry|try again|retrying)\s+(?:after|in)\s+((?:\d+(?:\.\d+)?\s*(?:ms|milliseconds?|hours?|minutes?|seconds?"
    r"|h|m|s|d)\s*)+)",
    re.IGNORECASE,
)


def _duration(text: str) -> float | None:
    """Seconds of a Go-style duration such as `6m0s` or `12ms`."""
    if len(text) > _LONGEST_DURATION:
        return None
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(f"{number}{unit}" for number, unit in parts) != text:
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _told_in_body(error: Mapping[str, Any], message: str) -> float | None:
    details = error.get("details")
    for item in details if isinstance(details, list) else ():
        delay = item.get("retryDelay") if isinstance(item, Mapping) else None
        if isinstance(delay, str) and (seconds := _duration(delay)) is not None:
            return seconds
    told = _TOLD.search(message[:_READ_FOR_WAITS])
    if told is None:
        return None
    words = re.sub(r"\s+", "", told[1].lower())
    for long, short in (
        ("milliseconds", "ms"), ("millisecond", "ms"), ("hours", "h"), ("hour", "h"), ("minutes", "m"),
        ("minute", "m"), ("seconds", "s"), ("second", "s"),
    ):  # fmt: skip
        words = words.replace(long, short)
    return _duration(words)


def parse_retry_after(value: str, now: datetime | None = None) -> float | None:
    """Seconds of a Retry-After: a number or an HTTP date; past and negative are 0, garbage is None.

    >>> parse_retry_after("2"), parse_retry_after("-5"), parse_retry_after("inf"), parse_retry_after("soon")
    (2.0, 0.0, None, None)
    """
    text = value.strip()
    try:
        seconds = float(Decimal(text))
    except (InvalidOperation, ValueError, OverflowError):
        try:
            moment = parsedate_to_datetime(text)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        return _until(moment, now)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _until(moment: datetime, now: datetime | None = None) -> float:
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())


def _retry_after(headers: Mapping[str, str], words: _Words) -> float | None:
    """Header before body, and a limit's reset time where neither is there; never beyond a month."""
    wait = _told_wait(headers, words)
    return min(wait, _LONGEST_WAIT) if wait is not None and not math.isnan(wait) else None


def _told_wait(headers: Mapping[str, str], words: _Words) -> float | None:
    milliseconds = headers.get("retry-after-ms")
    if milliseconds and _is_number(milliseconds) and (wait := parse_retry_after(milliseconds)) is not None:
        return wait / 1000
    told = headers.get("retry-after")
    if told and (wait := parse_retry_after(told)) is not None:
        return wait
    if words.retry_after is not None:
        return words.retry_after
    waits = []
    for name, remaining in headers.items():
        openai = re.fullmatch(r"x-ratelimit-remaining-(.+)", name)
        anthropic = re.fullmatch(r"anthropic-ratelimit-(.+)-remaining", name)
        # Azure sends -1 where it does not know: only a plain 0 says that the limit is used up.
        if (openai or anthropic) and remaining.strip() == "0":
            reset = f"x-ratelimit-reset-{openai[1]}" if openai else f"anthropic-ratelimit-{anthropic[1]}-reset"  # type: ignore[index]
            waits.append(_reset(headers.get(reset, "").strip()))
    return max((wait for wait in waits if wait is not None), default=None)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[-+]?\d+(\.\d+)?\s*", text) is not None


def _reset(text: str) -> float | None:
    if not text:
        return None
    if (seconds := _duration(text)) is not None:
        return seconds
    if _is_number(text):
        # A number is seconds from now, or a moment in seconds since 1970.
        number = float(text)
        return max(0.0, number if number < 1e9 else number - datetime.now(UTC).timestamp())
    try:
        return _until(datetime.fromisoformat(text))
    except ValueError:
        return None
