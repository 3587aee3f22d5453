"""A cap that holds: nothing is sent that could exceed it, whatever fails, and it is used up."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.budget import Budget, Cap, PromptBound, WorstCase
from batchrun.ledger import Ledger
from batchrun.money import Cost
from batchrun.prices import Price, Pricing
from batchrun.records import Exchange, Request, Slot
from batchrun.usage import Usage

from .conftest import FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]


def worst(body: int, most: int) -> Decimal:
    """No request of so many bytes can cost more by the fake's prices."""
    return (body + 16 + 32) * Decimal("4.875e-6") + most * Decimal("19.5e-6") + Decimal("0.0000025")


@pytest.mark.parametrize("streamed", [False, True])
def test_the_cap_stops_the_run_and_the_next_call_goes_on(work: Workspace, provide: Provide, streamed: bool) -> None:
    provider = provide(wordy=True, latency=0.01)
    work.write_rows([f"row {index}" for index in range(200)])
    job = {"parameters": {"max_tokens": 400}, "concurrency": 16, "stream": streamed}
    work.write_job(provider.base_url, **job, budget={"usd": 0.2})
    result = work.run("--json")
    assert result.code == 3, result.stderr
    assert result.json["reason"] == "budget"
    rows = work.rows()
    done = [row["status"] == "ok" for row in rows]
    assert provider.bill == spent(rows) == result.json["usd_spent"]
    # It is used up: not even one more request would have been sure to fit.
    assert Decimal("0.2") - worst(200, 400) < provider.bill <= Decimal("0.2")
    # Rows are taken in order, so that all that is left is at the end.
    assert done == sorted(done, reverse=True)
    assert result.json["pending"] == done.count(False) > 0
    for said in ("the cap of $0.2 for this run", f"{done.count(False)} rows are left", "they would cost $"):
        assert said in result.stderr
    asked = len(provider.requests)
    again = work.run()
    assert (again.code, len(provider.requests)) == (3, asked)
    work.write_job(provider.base_url, **job, budget={"usd": 5})
    assert work.run().code == 0
    assert provider.bill == spent(work.rows()) <= 5
    assert len(provider.requests) == 200


def test_unknown_outcomes_hold_what_they_can_have_cost(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows([f'{index} <<{{"fail": ["hangup"]}}>>' for index in range(3)] + [f"row {n}" for n in range(50)])
    cap = Decimal("0.012")
    work.write_job(provider.base_url, parameters={"max_tokens": 100}, retry={"max_attempts": 1}, budget={"usd": 0.012})
    result = work.run("--json")
    assert result.code == 3, result.stderr
    found = result.json
    assert found["unknown_outcomes"] == found["unknown_rows"] == 3
    held = found["unknown_usd_at_most"]
    assert 3 * worst(0, 100) < held <= 3 * worst(250, 100)
    assert found["usd_spent"] + held <= cap
    assert found["usd_spent"] + held > cap - worst(250, 100)
    assert provider.bill <= cap
    assert "3 attempts of unknown cost hold up to $" in result.stderr
    assert "batchrun reconcile job.yaml" in result.stderr
    assert "unknown: 3 attempts in 3 rows (1, 2, 3) got no answer, and up to $" in result.stderr
    assert work.manifest()["unknown_usd_at_most"] == held


def test_after_kill_the_reservations_stand(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=30)
    work.write_rows([f"row {index}" for index in range(40)])
    work.write_job(provider.base_url, parameters={"max_tokens": 1000}, concurrency=4, budget={"usd": 0.08})
    process = work.start("job.yaml")
    deadline = time.monotonic() + 60
    while count(work) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert count(work) == 3  # the fourth would not have fitted
    result = work.run("--json")
    assert result.code == 3, result.stderr
    assert result.json["unknown_outcomes"] == 3
    assert result.json["usd_spent"] == 0
    assert Decimal("0.06") < result.json["unknown_usd_at_most"] <= Decimal("0.08")


def count(work: Workspace) -> int:
    try:
        db = sqlite3.connect(f"file:{work.ledger}?mode=ro", uri=True)
        (number,) = db.execute("SELECT count(*) FROM attempt").fetchone()
        db.close()
    except sqlite3.Error:
        return 0
    return int(number)


@pytest.mark.parametrize("per", ["day", "month"])
def test_a_cap_per_period_counts_all_runs(work: Workspace, provide: Provide, per: str) -> None:
    provider = provide()
    work.write_rows([f"row {index}" for index in range(10)])
    work.write_job(provider.base_url, budget={"usd": 0.006, "per": per})
    first = work.run("--json")
    assert first.code == 0, first.stderr
    codes = [first.code]
    while codes[-1] == 0:
        codes.append(work.run().code)
    assert codes[-1] == 3
    assert len(codes) > 2
    assert provider.bill <= Decimal("0.006")
    # Yesterday's do not count.
    db = sqlite3.connect(work.ledger)
    db.execute("UPDATE attempt SET sent_at = sent_at - 32 * 86400 * 1000000")
    db.commit()
    db.close()
    assert work.run().code == 0


def test_a_provider_that_charges_more_than_its_prices_is_found_out(work: Workspace, provide: Provide) -> None:
    provider = provide(charge=30)
    work.write_rows([f"row {index}" for index in range(50)])
    work.write_job(provider.base_url, concurrency=2, budget={"usd": 0.02})
    result = work.run("--json")
    assert result.code == 3, result.stderr
    assert "the provider charged $" in result.stderr
    assert len(provider.requests) <= 4
    assert result.json["over_cap"] == max(Decimal(0), provider.bill - Decimal("0.02"))
    asked = len(provider.requests)
    again = work.run()
    assert (again.code, len(provider.requests)) == (3, asked)
    assert "budget: {factor: " in again.stderr
    work.write_job(provider.base_url, concurrency=2, budget={"usd": 5, "factor": 60})
    assert work.run().code == 0


@pytest.mark.parametrize(
    ("options", "keys", "said"),
    [
        ({}, {"model": "nobody/has-a-price"}, "no price is known for the model 'nobody/has-a-price' at aimlapi"),
        ({"models": None}, {"parameters": {}}, "nothing bounds the answer to row 1"),
        ({"models": None}, {"parameters": {"max_tokens": "{{ prompt }}"}}, "nothing bounds the answer to row 2"),
        (
            {"models": None},
            {"prompt": {"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "https://x.example/{{ prompt }}"}}]}]}},
            "something elsewhere",
        ),
    ],
)  # fmt: skip
def test_a_cap_that_cannot_hold_is_refused(
    work: Workspace, provide: Provide, options: dict[str, Any], keys: dict[str, Any], said: str
) -> None:
    provider = provide(**options)
    work.write_rows(["12", "many"])
    work.write_job(provider.base_url, **({"budget": {"usd": 1}} | keys))
    result = work.run()
    assert (result.code, provider.requests) == (2, []), result.stderr
    assert said in result.stderr


def test_the_published_limit_bounds_an_answer(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"] * 5)
    work.write_job(provider.base_url, parameters={}, budget={"usd": 2})
    assert work.run().code == 0
    work.write_job(provider.base_url, parameters={}, budget={"usd": 1})  # 64,000 tokens could cost $1.248
    assert work.run().code == 3


def test_costs_of_unknown_size_from_before_the_cap_are_refused(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="none", refuse_after=1)
    work.write_rows(["a", "b"])
    work.write_job(provider.base_url, model="nobody/has-a-price", concurrency=1)
    assert work.run().code == 4
    prices = {"input_mtok": 3, "output_mtok": 15}
    work.write_job(provider.base_url, model="nobody/has-a-price", prices=prices, budget={"usd": 1})
    result = work.run()
    assert result.code == 2
    assert "1 earlier attempts of this run have an unknown cost" in result.stderr


def test_a_retry_that_no_longer_fits_leaves_its_row_pending(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(['<<{"fail": ["hangup", "hangup", "hangup"]}>>'])
    work.write_job(provider.base_url, parameters={"max_tokens": 100}, budget={"usd": 0.004})
    result = work.run("--json")
    assert result.code == 3, result.stderr
    assert (result.json["pending"], result.json["attempts"]) == (1, 1)
    assert work.rows()[0]["status"] == "pending"


@pytest.mark.parametrize(
    "keys",
    [
        {"parameters": {"max_tokens": 5, "tools": [{"type": "web_search_20250305", "max_uses": 50}]}},
        {"parameters": {"max_tokens": 5, "web_search_options": {}}},
        {"prompt": {"messages": [{"role": "user", "content": [
            {"type": "image_url", "text": "x", "image_url": {"url": " HTTPS://example.com/x.png"}}]}]}},
        {"prompt": {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}},
    ],
)  # fmt: skip
def test_what_the_model_fetches_counts_for_its_whole_context(
    work: Workspace, provide: Provide, keys: dict[str, Any]
) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url, budget={"usd": 0.9}, **keys)  # 200,000 tokens written to a cache: $0.975
    result = work.run()
    assert result.code == 3, result.stderr
    assert provider.requests == []
    work.write_job(provider.base_url, budget={"usd": 1.1}, **keys)
    assert work.run().code == 0


def test_an_image_in_the_message_counts_for_more_than_its_bytes(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    prompt = {"messages": [{"role": "user", "content": [image]}]}
    work.write_job(provider.base_url, budget={"usd": 0.03}, prompt=prompt)
    assert work.run().code == 3
    work.write_job(provider.base_url, budget={"usd": 0.05}, prompt=prompt)
    assert work.run().code == 0


def test_a_refusal_leaves_the_finished_run_in_its_place(work: Workspace, provide: Provide) -> None:
    provider = provide(models=None)
    work.write_rows(["a", '<<{"fail": [400]}>>'])
    work.write_job(provider.base_url, model="nobody/x")
    assert work.run().code == 1
    before = work.output.read_bytes()
    work.write_job(provider.base_url, model="nobody/x", budget={"usd": 1})
    assert work.run().code == 2
    assert work.batchrun("verify", "job.yaml").code == 0
    assert work.output.read_bytes() == before
    work.write_job(provider.base_url, model="nobody/x")
    assert work.run("--retry-failed").code == 0
    assert len(provider.requests) == 3


def test_a_free_model_needs_no_price_and_no_bound(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="none")
    work.write_rows(["a", "b"])
    server = {"name": "vllm", "base_url": provider.base_url}
    work.write_job(provider=server, parameters={}, budget={"usd": 0})
    assert work.run().code == 0


def test_under_a_cap_every_commit_waits_for_the_disk(tmp_path: Path) -> None:
    for is_durable, synchronous in ((True, 2), (False, 1)):
        ledger = Ledger.open(tmp_path / "l.sqlite", job_name="j", job_path=tmp_path, is_durable=is_durable)
        assert ledger.rows("PRAGMA synchronous") == [(synchronous,)]
        ledger.close()


@pytest.mark.parametrize("charge", [4, 30])
def test_calling_again_does_not_raise_the_factor(work: Workspace, provide: Provide, charge: int) -> None:
    provider = provide(charge=charge, wordy=True)
    work.write_rows([f"row {index}" for index in range(100)])
    work.write_job(provider.base_url, parameters={"max_tokens": 400}, budget={"usd": 8}, concurrency=1)
    assert work.run().code == 3
    asked = len(provider.requests)
    for _ in range(3):
        result = work.run()
        assert result.code == 3
        assert "set budget: {factor: " in result.stderr
    assert len(provider.requests) == asked


def test_a_bound_beyond_all_bounds(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url, parameters={"max_tokens": 10**12})
    assert work.run().code == 0
    work.write_job(provider.base_url, parameters={"max_tokens": 10**12}, budget={"usd": 1})
    result = work.run()
    assert result.code == 3
    assert "the next row, which has no bound" in result.stderr


def test_a_new_day_begins_anew_and_a_clock_set_back_does_not() -> None:
    price = Price(Decimal(0), Decimal(0), request_usd=Decimal(1))
    midnight = 1795219200_000_000
    now = midnight - 1_000_000
    budget = Budget({"m": Pricing.fixed("job", price)}, cap=Cap(2 * 10**12, "day"), clock=lambda: now)
    request = Request(Slot(0, "m"), "k", b"x")
    exchange = Exchange("ok", cost=Cost(Decimal(1), "reported"))

    async def drive() -> None:
        nonlocal now
        first = await budget.reserve(request)
        assert first is not None
        now = midnight + 1
        second = await budget.reserve(request)
        assert second is not None
        # What was sent yesterday is settled today, and counts yesterday.
        budget.settle(request, first, exchange)
        budget.settle(request, second, exchange)
        now = midnight - 1
        assert await budget.reserve(request) is None
        now = midnight + 86_400_000_000
        assert await budget.reserve(request) is not None

    asyncio.run(drive())


# --- laws -------------------------------------------------------------------------------------------------


def tokens_of(text: bytes, lengths: list[int]) -> list[bytes]:
    """Some way to cut a text into tokens, at least a byte each."""
    tokens, start = [], 0
    for position in range(len(text)):
        if start >= len(text):
            break
        length = max(1, lengths[position % len(lengths)])
        tokens.append(text[start : start + length])
        start += length
    return tokens


@given(
    shared=st.binary(min_size=1, max_size=200),
    rows=st.lists(st.binary(max_size=30), min_size=2, max_size=6),
    tail=st.binary(max_size=60),
    width=st.integers(1, 6),
)
def test_what_was_measured_tightens_the_bound_and_never_breaks_it(
    shared: bytes, rows: list[bytes], tail: bytes, width: int
) -> None:
    bound = PromptBound()
    for row in rows:
        body = shared + row + tail
        # A tokenizer with words of a fixed width: the shared parts fall apart alike, whatever stands between them.
        actual = sum(-(-len(part) // width) for part in (shared, row, tail))
        request = Request(Slot(0, "m"), "k", body)
        most = bound.prompt_tokens(request)
        assert actual <= most <= len(body) + 48
        bound.learn(request, Usage(prompt_tokens=actual))


def test_the_long_fixed_part_of_a_prompt_counts_by_its_measure() -> None:
    bound = PromptBound()
    fixed = b"These are the instructions. " * 200

    def request(row: bytes) -> Request:
        return Request(Slot(0, "m"), "k", fixed + row + b'","max_tokens":5')

    before = bound.prompt_tokens(request(b"first row"))
    bound.learn(request(b"first row"), Usage(prompt_tokens=1210))
    after = bound.prompt_tokens(request(b"another row"))
    assert before > 5600
    assert 1210 < after < 1210 + 100


def test_a_library_price_counts_half_as_much_again_until_a_cost_was_reported() -> None:
    price = Price(Decimal(3), Decimal(15))
    worst = WorstCase(Pricing("library", lambda at: price), None)
    assert worst.factor == Decimal("1.5")
    worst.learn(Usage(1000, 500), 0, Decimal("0.0105"))
    assert worst.factor == 1
    # AI/ML API charges 1.3 of the list: that is measured, with a margin.
    worst.learn(Usage(1000, 500), 0, Decimal("0.01365"))
    assert worst.factor == Decimal("1.43")
    # Credits in the token fields say nothing about the price.
    worst.learn(Usage(50000, 63000), 0, Decimal("0.0000001"))
    assert worst.factor == Decimal("1.43")


def test_the_factor_of_the_job_is_taken_at_its_word() -> None:
    worst = WorstCase(Pricing("library", lambda at: Price(Decimal(3), Decimal(15))), Decimal(1))
    assert worst.factor == 1


def test_a_period_begins_at_midnight_utc() -> None:
    now = 1795219200_000_000 + 3_600_000_000  # 2026-11-21, 01:00
    assert Cap(0, "day").began(now) == 1795219200_000_000
    assert Cap(0, "month").began(now) == 1793491200_000_000
    assert Cap(0, "run").began(now) == 0


def test_the_worst_case_covers_tiers_cache_writes_and_reasoning() -> None:
    price = Price(
        Decimal(1), Decimal(10), cache_write_mtok=Decimal(2), reasoning_mtok=Decimal(20),
        tiers=((1000, Price(Decimal(3), Decimal(5))),),
    )  # fmt: skip
    rounding = Decimal("0.0000025")
    assert price.most_usd(1000, 100) == Decimal("0.004") + rounding
    # Above the tier's start; but a prompt may turn out to be shorter, and then the base price is what counts.
    assert price.most_usd(1001, 100) == Decimal("0.001001") * 2 + Decimal("0.002") + rounding
    assert price.most_usd(2000, 100) == Decimal("0.0065") + rounding
    assert price.most_usd(10, None) is None
