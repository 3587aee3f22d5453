"""Token counts in one normal form, whatever names a provider gives them.

`prompt_tokens` is everything the model read: cached and cache-write tokens are parts of it. `completion_tokens`
is what the provider reports under that name; reasoning may stand inside or outside of it, so what is billed as
output is `billable_output`. A count that nobody reported is None, never 0.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, NamedTuple

_MOST = 10**12  # no context is as long; and a billion rows of them still add up in 64 bits


class Usage(NamedTuple):
    """Counts of one answer, in tokens; None where unknown."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None

    @property
    def is_zero(self) -> bool:
        """True for usage that was sent but says nothing: every count 0."""
        return self.prompt_tokens == 0 and self.completion_tokens == 0 and not self.total_tokens

    @property
    def billable_output(self) -> int | None:
        """Tokens billed as output, reasoning outside `completion_tokens` included.

        >>> Usage(prompt_tokens=9, completion_tokens=566, total_tokens=1521).billable_output
        1512
        """
        if self.completion_tokens is None:
            return None
        billed = self.completion_tokens
        if self.reasoning_tokens is not None and self.reasoning_tokens > self.completion_tokens:
            billed += self.reasoning_tokens
        if self.total_tokens is not None and self.prompt_tokens is not None:
            billed = max(billed, self.total_tokens - self.prompt_tokens)
        return billed


NO_USAGE = Usage()


def count(value: object) -> int | None:
    """Read one count from JSON: an integer, also as `16.0` or `"16"`; anything else is None.

    >>> count(Decimal("16.0")), count(True), count(-1), count(1.5)
    (16, None, None, None)
    """
    if type(value) is int:
        return value if 0 <= value <= _MOST else None
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) < 16 else None
    if isinstance(value, Decimal) and not value.is_finite():
        return None
    if isinstance(value, (int, float, Decimal)) and 0 <= value <= _MOST and value == int(value):
        return int(value)
    return None


def _most(first: int | None, second: int | None) -> int | None:
    if first is None or second is None:
        return second if first is None else first
    return max(first, second)


def _part(usage: dict[str, Any], outer: tuple[str, ...], inner: tuple[str, ...]) -> int | None:
    """The largest sighting of a count under any of its names: `outer.inner`, or `inner` at the top."""
    found = None
    for holder in (usage, *[usage.get(name) for name in outer]):
        if isinstance(holder, dict):
            for name in inner:
                if name in holder:
                    found = _most(found, count(holder[name]))
    return found


_PLAIN = {"prompt_tokens", "completion_tokens", "total_tokens"}
_READ_DETAILS = ("prompt_tokens_details", "input_tokens_details")
_WRITTEN_DETAILS = ("completion_tokens_details", "output_tokens_details")


def read_usage(usage: object) -> Usage:
    """One sighting of a `usage` object, names mapped, nothing added up between its sides."""
    if not isinstance(usage, dict):
        return NO_USAGE
    if usage.keys() <= _PLAIN:
        return Usage(*(count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens", "total_tokens")))
    cached = _part(usage, _READ_DETAILS, ("cached_tokens", "cache_read_input_tokens", "prompt_cache_hit_tokens"))
    written = _part(usage, _READ_DETAILS, ("cache_write_tokens", "cache_creation_input_tokens"))
    if written is None and isinstance(lifetimes := usage.get("cache_creation"), dict):
        known = [value for value in map(count, lifetimes.values()) if value is not None]
        written = sum(known) if known else None
    prompt, apart = count(usage.get("prompt_tokens")), count(usage.get("input_tokens"))
    if apart is not None and ("cache_read_input_tokens" in usage or "cache_creation_input_tokens" in usage):
        # Anthropic's `input_tokens` leaves out what the cache held; OpenAI's, of the same name, does not.
        apart += (cached or 0) + (written or 0)
    prompt = _most(prompt, apart)
    completion = _most(count(usage.get("completion_tokens")), count(usage.get("output_tokens")))
    return Usage(
        prompt_tokens=_with_parts(prompt, cached, written),
        completion_tokens=completion,
        total_tokens=count(usage.get("total_tokens")),
        cached_tokens=cached,
        cache_write_tokens=written,
        reasoning_tokens=_part(usage, _WRITTEN_DETAILS, ("reasoning_tokens",)),
    )


def _with_parts(prompt: int | None, cached: int | None, written: int | None) -> int | None:
    """Parts cannot exceed their whole: where they do, they were outside it."""
    parts = (cached or 0) + (written or 0)
    return prompt + parts if prompt is not None and parts > prompt else prompt


def merge(first: Usage, second: Usage) -> Usage:
    """Field-wise maximum of two sightings: neither the sum nor the last of a stream is right."""
    if first is NO_USAGE or second is NO_USAGE:
        return second if first is NO_USAGE else first
    return Usage(*map(_most, first, second))


def settle(usage: Usage) -> Usage:
    """The normal form after the last sighting: total at least prompt + completion, cached within the prompt."""
    prompt = _with_parts(usage.prompt_tokens, usage.cached_tokens, usage.cache_write_tokens)
    total = usage.total_tokens
    if prompt is not None and usage.completion_tokens is not None:
        total = max(total or 0, prompt + usage.completion_tokens)
    if prompt == usage.prompt_tokens and total == usage.total_tokens:
        return usage
    return usage._replace(prompt_tokens=prompt, total_tokens=total)
