"""What a job will take, before anything is paid: from all its rows, and from what earlier answers took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from batchrun.accounts import Measured
from batchrun.money import usd_text
from batchrun.prices import Pricing
from batchrun.projection import Interval, dollars, project, rounded
from batchrun.records import Request

_ENOUGH = 5
"""Answers from which on they say more than a rule of thumb."""
# Without any answer: bytes of text per token at the least, likely and at the most; tokens around each message; and
# the length of an answer as a part of its bound, or of what most answers stay below.
_BYTES_PER_TOKEN = (6.0, 4.0, 2.0)
_TOKENS_PER_MESSAGE = 8
_LOW, _LIKELY = (0.02, 5), (0.5, 300)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What all rows of a job take. Dollars None: nobody knows a price."""

    measured: int
    """Answers that it is derived from; 0 for a rule of thumb."""
    prompt_tokens: Interval
    completion_tokens: Interval | None
    """None if nothing was measured, and nothing bounds the answers."""
    usd: Interval | None
    price_source: str | None

    def document(self) -> dict[str, Any]:
        """As plain values, dollars rounded."""
        return {
            "measured_answers": self.measured,
            "prompt_tokens": rounded(self.prompt_tokens),
            "completion_tokens": self.completion_tokens and rounded(self.completion_tokens),
            "usd": self.usd and dollars(self.usd),
            "price_source": self.price_source,
        }

    def lines(self) -> list[str]:
        """A short text."""
        basis = (
            f"from {self.measured} earlier answers"
            if self.measured
            else "by rule of thumb, as too little was measured yet: --sample measures"
        )
        tokens = f"tokens: {_range(self.prompt_tokens)} prompt"
        if self.completion_tokens is not None:
            tokens += f", {_range(self.completion_tokens)} completion"
        else:
            tokens += "; nothing bounds the answers: set parameters: {max_tokens: …}"
        if self.usd is not None:
            ends = map(usd_text, dollars(self.usd).values())
            label = "estimated from library prices" if self.price_source == "library" else f"{self.price_source} price"
            cost = "dollars: low ${}, likely ${}, high ${}".format(*ends) + f" ({label})"
        elif self.price_source is None:
            cost = "dollars: no price is known: set prices: {input_mtok: …, output_mtok: …}"
        else:
            cost = "dollars: not known, as the answers are not"
        return [f"estimate for all rows, {basis}", f"{tokens} (low, likely, high)", cost]


def together(estimates: Sequence[Estimate]) -> Estimate:
    """What several models take. What is not known of one is not known of all."""
    if len(estimates) == 1:
        return estimates[0]
    sources = list(dict.fromkeys(estimate.price_source for estimate in estimates))
    return Estimate(
        # By rule of thumb, as soon as that is all that there is for one of them.
        min(estimate.measured for estimate in estimates),
        _sum([estimate.prompt_tokens for estimate in estimates]),
        _sum_known([estimate.completion_tokens for estimate in estimates]),
        _sum_known([estimate.usd for estimate in estimates]),
        None if None in sources else " and ".join(source for source in sources if source is not None),
    )


def _sum(intervals: Sequence[Interval]) -> Interval:
    return Interval(*(sum(getattr(interval, name) for interval in intervals) for name in Interval.__slots__))


def _sum_known(intervals: Sequence[Interval | None]) -> Interval | None:
    known = [interval for interval in intervals if interval is not None]
    return _sum(known) if len(known) == len(intervals) else None


@dataclass
class Estimator:
    """Takes the requests of a job one by one."""

    pricing: Pricing
    measured: Sequence[Measured]
    requests: int = 0
    _bytes: int = 0
    _text_bytes: int = 0
    _messages: int = 0
    _bounds: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    _is_bounded: bool = True

    def take(self, request: Request) -> None:
        """The next request."""
        self.requests += 1
        self._bytes += len(request.body)
        self._messages += request.messages
        if len(self.measured) >= _ENOUGH:
            return
        self._text_bytes += sum(len(text.encode()) for text in _texts(json.loads(request.body)["messages"]))
        most = request.most_completion_tokens or self.pricing.limits.completion_tokens
        if most is None:
            self._is_bounded = False
            return
        for index, (share, usual) in enumerate((_LOW, _LIKELY)):
            self._bounds[index] += max(1.0, min(most * share, usual))
        self._bounds[2] += most

    def estimate(self, now: int) -> Estimate:
        """For all requests taken. `now`: microseconds since 1970, UTC; prices have dates."""
        if len(self.measured) >= _ENOUGH:
            number, prompt, completion = len(self.measured), *self._from_answers()
        else:
            number = 0
            ends = [
                self._text_bytes / per_token + _TOKENS_PER_MESSAGE * self._messages for per_token in _BYTES_PER_TOKEN
            ]
            prompt = Interval(*ends)
            completion = Interval(*self._bounds) if self._is_bounded else None
        return Estimate(number, prompt, completion, self._usd(prompt, completion, now), self.pricing.source)

    def _from_answers(self) -> tuple[Interval, Interval | None]:
        per_byte = sum(answer.prompt_tokens for answer in self.measured) / sum(
            answer.request_bytes for answer in self.measured
        )
        # The ratio is that of the sums; what single answers differ from it makes the interval.
        apart = [answer.prompt_tokens - per_byte * answer.request_bytes for answer in self.measured]
        spread = project(apart, self.requests)
        likely = per_byte * self._bytes
        margin = spread.high - spread.likely if spread is not None else 0.0
        prompt = Interval(max(0.0, likely - margin), likely, likely + margin)
        return prompt, project([float(answer.completion_tokens) for answer in self.measured], self.requests)

    def _usd(self, prompt: Interval, completion: Interval | None, now: int) -> Interval | None:
        price = self.pricing.price_at(now)
        if price is None or completion is None or not self.requests:
            return Interval(0.0, 0.0, 0.0) if price is not None and not self.requests else None
        return Interval(
            *(
                price.likely_usd(getattr(prompt, name), getattr(completion, name), self.requests)
                for name in Interval.__slots__
            )
        )


def _texts(value: Any) -> list[str]:
    """What of messages the model reads."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    if isinstance(value, dict):
        return [text for name, item in value.items() if name not in ("role", "type") for text in _texts(item)]
    return []


def _range(interval: Interval) -> str:
    return " / ".join(map(str, rounded(interval).values()))
