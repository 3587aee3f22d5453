"""Hard rates: no more requests or tokens in any minute than the job allows, evenly spread, first come first served."""

from __future__ import annotations

import asyncio

from aiolimiter import AsyncLimiter

from batchrun.records import Exchange, Request

_BYTES_PER_TOKEN = 4.0
_CREDIT_SECONDS = 3
_UNBOUNDED_COMPLETION = 1024
"""Tokens of an answer that nothing bounds, until some have come."""


def prompt_tokens(request: Request) -> int:
    """About how many tokens a request has, before any answer has told."""
    return round(len(request.body) / _BYTES_PER_TOKEN)


class Rates:
    """What an invocation may send in a minute.

    Tokens are known only afterwards: a request waits for as many as it will take by what the answers so far took, and
    by how much that was wrong is made up for by the next ones.

    Args:
        requests, tokens: in any 60 s; None for no limit.
    """

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        self._requests = _limiter(requests) if requests is not None else None
        self._tokens = _limiter(tokens) if tokens is not None else None
        self._waiting: asyncio.Task[None] | None = None
        self._is_stopped = False
        self._owed = 0.0
        """Tokens that were used and not waited for; below zero, those that were waited for and not used."""
        self._sent_bytes = self._prompt_tokens = self._completion_tokens = self._answers = 0

    @property
    def is_bounded(self) -> bool:
        """True if there is any limit."""
        return self._requests is not None or self._tokens is not None

    async def enter(self, request: Request) -> float:
        """Wait until a request may be sent; the tokens that were waited for. At once when the run is stopping.

        For one request at a time.
        """
        if self._requests is not None:
            await self._take(self._requests, 1)
        if self._tokens is None:
            return 0.0
        expected = self._expected(request)
        needed = max(0.0, expected + self._owed)
        self._owed += expected - needed
        while needed > 0 and not self._is_stopped:
            piece = min(needed, self._tokens.max_rate)
            await self._take(self._tokens, piece)
            needed -= piece
        return expected

    def settle(self, request: Request, waited_for: float, exchange: Exchange) -> None:
        """Count what a request really used."""
        usage = exchange.usage
        if self._tokens is None:
            return
        if exchange.outcome == "ok" and usage.prompt_tokens:
            self._answers += 1
            self._sent_bytes += len(request.body)
            self._prompt_tokens += usage.prompt_tokens
            self._completion_tokens += usage.completion_tokens or 0
        if exchange.cost.source == "not_billed":
            self._owed -= waited_for
        elif usage.total_tokens is not None:
            self._owed += usage.total_tokens - waited_for
        # What was waited for in vain is not to be spent in one go later.
        self._owed = max(self._owed, -_CREDIT_SECONDS * self._tokens.max_rate)

    def stop(self) -> None:
        """Let nobody wait any longer: the run is stopping, and who enters now leaves at once."""
        self._is_stopped = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def _take(self, limiter: AsyncLimiter, amount: float) -> None:
        if self._is_stopped:
            return
        if limiter.has_capacity(amount):
            await limiter.acquire(amount)
            return
        self._waiting = asyncio.create_task(limiter.acquire(amount))
        try:
            await asyncio.wait([self._waiting])
        finally:
            self._waiting.cancel()
            self._waiting = None

    def _expected(self, request: Request) -> float:
        most = request.most_completion_tokens
        if not self._answers:
            return prompt_tokens(request) + (most if most is not None else _UNBOUNDED_COMPLETION)
        completion = self._completion_tokens / self._answers
        prompt = len(request.body) * self._prompt_tokens / self._sent_bytes
        return prompt + (completion if most is None else min(completion, most))


def _limiter(per_minute: int) -> AsyncLimiter:
    """So many in any minute; no more than a second's worth at once."""
    burst = max(1.0, per_minute / 60)
    per_second = (per_minute + 1 - burst) / 60
    return AsyncLimiter(burst, burst / per_second)
