"""requests_per_minute and tokens_per_minute: kept in every minute, used up, and fair."""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.budget import Budget, Cap
from batchrun.ledger import Ledger
from batchrun.money import Cost, to_pico
from batchrun.prices import Price, Pricing
from batchrun.rates import Rates
from batchrun.records import Answer, Asked, Exchange, Intent, Request, Slot
from batchrun.runner import Runner
from batchrun.usage import Usage

from .conftest import FakeProvider, Workspace
from .test_hostile import script
from .virtual import VirtualLoop

Provide = Callable[..., FakeProvider]
CHEAP = Cost(Decimal("0.0001"), "reported")


class Server:
    """Answers after a while, and notes when it was asked and how many tokens that took."""

    def __init__(self, latency: float, completion: int) -> None:
        self.asked: list[tuple[float, int, int]] = []
        self._latency = latency
        self._completion = completion

    async def send(self, intent: Intent) -> Exchange:
        # Real tokens are not those that the bytes let one expect.
        prompt = len(intent.request.body) // 3
        loop = asyncio.get_running_loop()
        self.asked.append((loop.time(), prompt + self._completion, intent.request.slot.row_index))
        await asyncio.sleep(self._latency)
        usage = Usage(prompt, self._completion, prompt + self._completion)
        return Exchange("ok", status=200, answer=Answer("x", "stop"), usage=usage, cost=CHEAP)

    def most_in_a_minute(self, weight: Callable[[int], int], after: float = 0.0, minute: float = 60.0) -> int:
        """Requests, or tokens, in the minute that had most of them."""
        most = held = first = 0
        for at, tokens, _ in self.asked:
            held += weight(tokens)
            while at - self.asked[first][0] >= minute - 1e-6:
                held -= weight(self.asked[first][1])
                first += 1
            most = max(most, held if at >= after else 0)
        return most


def play(
    folder: Path, server: Server, rates: Rates, sizes: Sequence[int], concurrency: int, budget: Budget | None = None
) -> float:
    """Send requests of so many bytes; how long it took, by the virtual clock."""
    path = folder / "ledger.sqlite"
    for old in folder.glob("ledger.sqlite*"):
        old.unlink()
    ledger = Ledger.open(path, job_name="j", job_path=folder / "j.yaml")
    run = ledger.current_run()
    ledger.begin_invocation(run, job={}, endpoint="e")
    requests = [
        Request(Slot(index, "m"), f"k{index}", b"x" * size, most_completion_tokens=200)
        for index, size in enumerate(sizes)
    ]
    ledger.place(run, [Asked(len(requests), [(request.slot, request.key) for request in requests])], dict)
    loop = VirtualLoop()

    async def drive() -> None:
        runner = Runner(
            ledger, run, server, iter(requests), budget or Budget({"m": Pricing()}), rates, concurrency=concurrency,
            max_attempts=6, max_seconds=900, stop_seconds=60, clock=loop.time,
        )  # fmt: skip
        assert await runner.run() is None

    try:
        loop.run_until_complete(drive())
    finally:
        loop.close()
        ledger.close()
    assert len(server.asked) == len(sizes)
    return loop.now


@settings(max_examples=12, deadline=None)
@given(per_minute=st.integers(1, 3000), concurrency=st.integers(1, 40), minutes=st.floats(1.2, 3))
def test_no_minute_has_more_requests_than_allowed_and_they_are_used_up(
    per_minute: int, concurrency: int, minutes: float
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(0.01, 10)
        number = max(2, int(per_minute * minutes))
        took = play(Path(folder), server, Rates(per_minute, None), [300] * number, concurrency)
    assert server.most_in_a_minute(lambda tokens: 1) <= per_minute
    assert took <= 1.05 * number * 60 / per_minute + 1


def test_tokens_are_counted_as_they_were_really_used(quick_path: Path) -> None:
    chance = random.Random(4)
    # One prompt in ten is a hundred times as long as the others.
    sizes = [chance.choice([30_000] + [300] * 9) for _ in range(1500)]
    server = Server(2.0, 60)
    allowed = 100_000
    took = play(quick_path, server, Rates(None, allowed), sizes, 32)
    used = sum(tokens for _, tokens, _ in server.asked)
    assert server.most_in_a_minute(lambda tokens: tokens, after=120) <= 1.1 * allowed
    # Before the first answers, tokens are guessed.
    assert server.most_in_a_minute(lambda tokens: tokens) <= 1.35 * allowed
    assert took <= 1.1 * used / allowed * 60


def test_a_long_prompt_is_not_passed_by_for_ever(quick_path: Path) -> None:
    sizes = [300] * 200
    sizes[20] = 60_000
    server = Server(0.5, 20)
    play(quick_path, server, Rates(None, 20_000), sizes, 8)
    order = [row for _, _, row in server.asked]
    assert order.index(20) <= 28


def test_rows_that_wait_for_money_do_not_come_all_at_once(quick_path: Path) -> None:
    pricing = Pricing.fixed("job", Price(Decimal(1), Decimal(0)))  # a dollar for a million bytes
    server = Server(90.0, 10)
    # As long as the first is under way, there is no money for any other.
    budget = Budget({"m": pricing}, cap=Cap(to_pico(Decimal(1)), "run"))
    play(quick_path, server, Rates(60, None), [999_000] + [3_000] * 200, 300, budget)
    assert server.asked[1][0] >= 90
    # Between its permit and its sending a request waits for the disk, some for longer than others.
    assert server.most_in_a_minute(lambda tokens: 1, minute=59.95) <= 60


def test_the_rates_of_a_job_are_kept(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="mix")
    work.write_rows([f"row {index}" for index in range(50)])
    work.write_job(provider.base_url, requests_per_minute=1200, concurrency=20)
    began = time.monotonic()
    assert work.run().code == 0
    assert time.monotonic() - began >= 30 / 20 - 0.1  # all but a second's worth come one after the other
    assert len(provider.requests) == 50


def test_a_prompt_that_no_minute_has_room_for_fails_before_anything_is_sent_for_it(
    work: Workspace, provide: Provide
) -> None:
    provider = provide()
    work.write_rows(["short", "long " * 8000, "short too"])
    work.write_job(provider.base_url, tokens_per_minute=9000)
    assert work.run().code == 1
    rows = work.rows()
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert "tokens_per_minute lets 9000 through" in rows[1]["error"]
    assert len(provider.requests) == 2
    # Raised, it is asked.
    work.write_job(provider.base_url, tokens_per_minute=100_000)
    assert work.run("--retry-failed").code == 0
    assert len(provider.requests) == 3


def test_an_answer_that_is_there_stays_where_a_lower_rate_would_not_ask_for_it(
    work: Workspace, provide: Provide
) -> None:
    provider = provide(refuse_after=2)
    work.write_rows(["long " * 8000, "short", "short too", "longer " * 8000])
    work.write_job(provider.base_url, concurrency=1)
    assert work.run().code == 4
    assert [row["status"] for row in work.rows()][:2] == ["ok", "ok"]
    # The row is there, and answered; it is only that nobody would ask it now.
    work.write_job(provider.base_url, concurrency=1, tokens_per_minute=9000)
    result = work.run("--json")
    assert (result.code, result.json["ok"], result.json["failed"], result.json["unplaced"]) == (4, 2, 1, 0)
    assert [row["status"] for row in work.rows()] == ["ok", "ok", "pending", "failed"]
    assert result.json["usd_spent"] == provider.bill
    assert work.batchrun("verify", "job.yaml").code == 0


def test_what_was_refused_before_fails_once(work: Workspace, provide: Provide) -> None:
    provider = provide(refuse_after=3)
    work.write_rows([script(fail=[400]) + " long" * 4000, "long " * 4000, "short", "b", "c"])
    work.write_job(provider.base_url, concurrency=1)
    assert work.run().code == 4
    work.write_job(provider.base_url, concurrency=1, tokens_per_minute=3000)
    for options in ((), ("--retry-failed",)):
        result = work.run("--json", *options)
        assert (result.code, result.json["ok"], result.json["failed"]) == (4, 2, 1), result.stderr
    assert work.batchrun("verify", "job.yaml").code == 0


def test_a_signal_ends_the_wait_for_the_next_minute(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b", "c"])
    work.write_job(provider.base_url, requests_per_minute=1)
    with work.start("job.yaml") as process:
        provider.wait_for(1)
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert time.monotonic() - began < 10
    assert [row["status"] for row in work.rows()] == ["ok", "pending", "pending"]
