"""The cap inside one process, at size: the real sender over a mock transport, on a virtual clock."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import httpx
import pytest

from batchrun import accounts
from batchrun.budget import Budget, Cap
from batchrun.chat import ChatSender
from batchrun.errors import ExitCode, Stop
from batchrun.ledger import Ledger
from batchrun.ledger_view import Run
from batchrun.money import from_pico, to_pico
from batchrun.prices import Price, Pricing
from batchrun.providers import resolve
from batchrun.rates import Rates
from batchrun.records import Asked, Request, Slot
from batchrun.runner import Runner

from .virtual import VirtualLoop

PRICING = Pricing.fixed("provider_list", Price(Decimal("3.9"), Decimal("19.5"), rounds_to_credits=True))


class Provider:
    """Answers, refuses, hangs up, and keeps its bill."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.billed: dict[str, Decimal] = {}

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        chance = self.chance
        await asyncio.sleep(chance.expovariate(2))
        fate = chance.random()
        if fate < 0.02:
            raise httpx.ConnectError("refused", request=request)
        if fate < 0.04:
            return httpx.Response(429, headers={"retry-after": "1"}, json={"message": "Too Many Requests"})
        if fate < 0.06:
            return httpx.Response(500, json={"message": "Internal server error"})
        if fate < 0.07:
            return httpx.Response(400, json={"message": "Body validation error!"})
        body = json.loads(request.content)
        prompt, completion = len(request.content) // 4, chance.randrange(1, body["max_tokens"] + 1)
        credits_used = -(-prompt * 78 // 10) + -(-completion * 39)
        usd = Decimal(credits_used) / 2_000_000
        name = request.headers["x-client-request-id"]
        self.billed[name] = usd
        if fate < 0.08:
            raise httpx.ReadError("reset", request=request)
        if fate < 0.09:
            return httpx.Response(200, content=b'{"choices": [')
        document = {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        }
        how = chance.randrange(4)
        headers = {"x-aimlapi-usd-spent": f"{usd:.9f}"} if how == 0 else {}
        if how == 1:
            document["meta"] = {"usage": {"credits_used": credits_used, "usd_spent": float(usd)}}  # type: ignore[assignment]
        elif how == 2:
            document["meta"] = {"usage": {"credits_used": credits_used}}  # type: ignore[assignment]
        return httpx.Response(200, headers=headers, json=document)


def storm(seed: int, folder: Path, rows: int) -> None:
    """Two capped invocations: at 37 % and at 70 % of what the whole would cost."""
    chance = random.Random(seed)
    random.seed(seed)  # tenacity's jitter
    requests = [_request(index, chance) for index in range(rows)]
    mean = Decimal(sum(json.loads(request.body)["max_tokens"] for request in requests)) / 2
    whole = mean * Decimal("19.5e-6")
    provider = Provider(chance)
    for share in ("0.37", "0.70"):
        cap = Cap(to_pico(whole * Decimal(share)), "run")
        ledger = Ledger.open(folder / "l.sqlite", job_name="j", job_path=folder / "j.yaml", is_durable=True)
        run = ledger.current_run()
        ledger.begin_invocation(run, job={}, endpoint="e")
        ledger.place(run, [Asked(len(requests), [(request.slot, request.key) for request in requests])], dict)
        budget = Budget({"m": PRICING}, cap=cap, held=accounts.held(ledger, run, 0).pico)
        stop = _invoke(ledger, run, provider, requests, budget)
        assert stop is not None
        assert (stop.exit_code, stop.reason) == (ExitCode.LIMIT, "budget"), stop.message
        bill = sum(provider.billed.values(), Decimal(0))
        taken = accounts.held(ledger, run, 0)
        assert bill <= from_pico(cap.pico)
        dearest = max(budget.worst["m"].pico(request, 0) or 0 for request in requests)
        assert cap.pico - dearest < taken.pico <= cap.pico
        totals = accounts.totals(ledger, run)
        unknown = {name for (name,) in ledger.rows("SELECT client_request_id FROM charged WHERE usd_pico IS NULL")}
        assert bill - totals.usd == sum((provider.billed.get(name, Decimal(0)) for name in unknown), Decimal(0))
        ledger.close()


def _request(index: int, chance: random.Random) -> Request:
    most = chance.randrange(1, 1000)
    content = f"row {index} " + "x" * chance.randrange(200)
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": most}).encode()
    return Request(Slot(index, "m"), f"k{index}", body, most_completion_tokens=most)


def _invoke(ledger: Ledger, run: Run, provider: Provider, requests: list[Request], budget: Budget) -> Stop | None:
    def pending() -> Iterator[Request]:
        for start in range(0, len(requests), 1000):
            states = ledger.states(run, start, start + 1000)
            for request in requests[start : start + 1000]:
                state = states.get(request.slot)
                if state is None or not (state.is_answered or state.is_failed):
                    yield request

    async def drive() -> Stop | None:
        endpoint = resolve("mine", environ={}, base_url="http://127.0.0.1:1/v1")
        async with ChatSender(
            endpoint, concurrency=200, timeout_seconds=60, max_response_bytes=10**6, streamed=False,
            pricings={"m": PRICING}, transport=httpx.MockTransport(provider),
        ) as sender:  # fmt: skip
            runner = Runner(
                ledger, run, sender, pending(), budget, Rates(None, None), concurrency=200, max_attempts=6,
                max_seconds=900, stop_seconds=60, clock=asyncio.get_running_loop().time,
            )  # fmt: skip
            return await runner.run()

    loop = VirtualLoop()
    try:
        return loop.run_until_complete(drive())
    finally:
        loop.close()


def test_a_cap_holds_over_every_failure(tmp_path: Path) -> None:
    storm(1000, tmp_path, 600)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_a_cap_holds_over_10000_rows(tmp_path: Path, seed: int) -> None:
    storm(seed, tmp_path, 10_000)
