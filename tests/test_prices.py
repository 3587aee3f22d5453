"""Where a price comes from, and what it makes of an answer's tokens."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.catalog import model_entry
from batchrun.documents import parse_json
from batchrun.money import CREDITS_PER_USD
from batchrun.price_sources import library_price, listed_pricing
from batchrun.prices import Price
from batchrun.providers import resolve
from batchrun.usage import Usage

from .conftest import SONNET, FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]
AIMLAPI = resolve("aimlapi", environ=None)
NOW = int(datetime(2026, 11, 21, tzinfo=UTC).timestamp() * 1e6)


def listed(entry: dict[str, Any], provider: str = "aimlapi") -> Price | None:
    return listed_pricing(parse_json(json.dumps(entry)), resolve(provider, environ=None)).price_at(NOW)


def library(model: str, provider: str = "aimlapi") -> Price | None:
    found = library_price(resolve(provider, environ=None), model)
    return found(NOW) if found is not None else None


# --- the provider's list ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prices", "usage", "credits_used"),
    [
        ((3.9, 19.5), Usage(27, 35), 1576),
        ((3.9, 19.5), Usage(16, 264), 10421),
        ((6.5, 32.5), Usage(16, 264), 17368),
        ((6.5, 32.5), Usage(24, 414), 27222),
        ((6.5, 39), Usage(15, 182), 14391),
        ((2.6, 15.6), Usage(9, 566, 1521, reasoning_tokens=946), 47223),
    ],
)
def test_the_credits_of_aimlapi_are_reproduced(prices: tuple[float, float], usage: Usage, credits_used: int) -> None:
    units = [
        {"name": "token", "measure": measure, "price": price, "per": 1_000_000}
        for measure, price in zip(("input", "output"), prices, strict=True)
    ]
    price = listed({"id": "m", "pricing": {"kind": "fixed", "currency": "USD", "units": units}})
    assert price is not None
    usd = price.usd(usage)
    assert usd is not None
    assert usd * CREDITS_PER_USD == credits_used


def test_units_are_matched_by_measure_and_origin_and_divided_by_per() -> None:
    price = listed(SONNET)
    assert price == Price(
        Decimal("3.9"), Decimal("19.5"), cache_read_mtok=Decimal("0.39"), cache_write_mtok=Decimal("4.875"),
        rounds_to_credits=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "pricing",
    [
        None,
        {},
        {"kind": "variants", "units": []},
        {"kind": "fixed", "currency": "EUR", "units": SONNET["pricing"]["units"]},  # type: ignore[index]
        {"kind": "fixed", "units": "none"},
        {"kind": "fixed", "units": [None, {"name": "token"}, {"name": "image", "measure": "output", "price": 1}]},
        {"kind": "fixed", "units": [{"name": "token", "measure": "input", "price": -1, "per": 0}]},
        {"kind": "fixed", "units": [{"name": "token", "measure": "input", "price": 3, "per": 1_000_000}]},
        {"kind": "fixed", "units": [{"name": "token", "measure": ["input"], "origin": {}, "price": 3, "per": "x"}]},
    ],
)
def test_a_list_without_a_usable_price_has_none(pricing: Any) -> None:
    assert listed({"id": "m", "pricing": pricing}) is None


def test_an_image_price_is_not_that_of_text() -> None:
    units = [
        {"name": "token", "measure": "input", "content": "image", "price": 99, "per": 1_000_000},
        {"name": "token", "measure": "input", "content": "text", "price": 3, "per": 1_000_000},
        {"name": "token", "measure": "output", "price": 15, "per": 1_000_000},
    ]
    price = listed({"id": "m", "pricing": {"units": units}})
    assert price is not None
    assert price.input_mtok == 3


def test_openrouter_lists_dollars_per_token() -> None:
    entry = {
        "id": "anthropic/claude-sonnet-4", "context_length": 1_000_000,
        "pricing": {"prompt": "0.000003", "completion": "0.000015", "input_cache_read": "0.0000003", "request": "0"},
        "top_provider": {"max_completion_tokens": 64_000},
    }  # fmt: skip
    price = listed(entry, "openrouter")
    assert price == Price(Decimal(3), Decimal(15), cache_read_mtok=Decimal("0.3"))
    limits = listed_pricing(parse_json(json.dumps(entry)), resolve("openrouter", environ=None)).limits
    assert (limits.completion_tokens, limits.context_tokens) == (64_000, 1_000_000)


def test_a_model_is_found_by_its_id_before_an_alias() -> None:
    document = json.dumps({"data": [{"id": "b", "aliases": ["a"]}, {"id": "a"}, {"id": None, "aliases": "a"}]}).encode()
    assert (model_entry(document, "a") or {})["id"] == "a"
    assert (model_entry(document, "b") or {})["id"] == "b"
    assert model_entry(document, "c") is None
    assert model_entry(b"no json", "a") is None


# --- the library --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["anthropic/claude-sonnet-4", "claude-sonnet-4", "claude-sonnet-4-20250514"])
def test_the_list_price_of_claude_sonnet_4(model: str) -> None:
    price = library(model)
    assert price is not None
    assert price.usd(Usage(1000, 500)) == Decimal("0.0105")
    assert price.usd(Usage(1000, 500, cached_tokens=800)) == Decimal("0.00834")
    assert price.usd(Usage(1200, 500, cached_tokens=800, cache_write_tokens=200)) == Decimal("0.00909")


@pytest.mark.parametrize(
    "model",
    ["anthropic/claude-sonnet-4.6", "anthropic/claude-opus-4-7", "openai/gpt-5", "openai/gpt-4o",
     "google/gemini-2.5-flash", "deepseek/deepseek-chat-v3.1", "x-ai/grok-4"],
)  # fmt: skip
def test_a_vendors_prefix_does_not_hide_a_model(model: str) -> None:
    assert library(model) is not None


def test_tiers_are_the_whole_requests() -> None:
    price = library("google/gemini-2.5-pro")
    assert price is not None
    assert price.usd(Usage(200_000, 100)) == Decimal("0.251")
    assert price.usd(Usage(200_001, 100)) == Decimal("0.5015025")


@given(prompt=st.integers(1, 400_000), completion=st.integers(0, 100_000), cached=st.integers(0, 400_000))
def test_our_reading_of_the_library_is_the_librarys_own(prompt: int, completion: int, cached: int) -> None:
    from genai_prices import Usage as TheirUsage
    from genai_prices import calc_price

    cached = min(cached, prompt)
    for model in ("claude-sonnet-4", "gemini-2.5-pro", "gpt-5"):
        ours = library(model)
        assert ours is not None
        theirs = calc_price(
            TheirUsage(input_tokens=prompt, output_tokens=completion, cache_read_tokens=cached), model,
            genai_request_timestamp=datetime.fromtimestamp(NOW / 1e6, UTC),
        )  # fmt: skip
        assert ours.usd(Usage(prompt, completion, cached_tokens=cached)) == theirs.total_price


def test_a_price_is_that_of_the_requests_date() -> None:
    at = library_price(resolve("deepseek", environ=None), "deepseek-chat")
    assert at is not None
    day, night = (datetime(2025, 3, 1, hour, tzinfo=UTC) for hour in (8, 20))
    found = [at(int(moment.timestamp() * 1e6)) for moment in (day, night)]
    assert None not in found
    assert found[0] != found[1]


def test_a_model_elsewhere_is_not_taken_for_its_namesake() -> None:
    assert library_price(resolve("mine", environ=None, base_url="https://llm.example.com/v1"), "gpt-4o") is None
    assert library_price(AIMLAPI, "nobody/has-a-price") is None


# --- laws ---------------------------------------------------------------------------------------------------

RATE = st.decimals(0, 100, places=4)


@given(
    rates=st.tuples(RATE, RATE, RATE, RATE, RATE, RATE), tier=st.tuples(RATE, RATE), start=st.integers(0, 2000),
    prompt=st.integers(1, 2000), completion=st.integers(1, 2000), parts=st.tuples(st.integers(0), st.integers(0)),
    reasoning=st.integers(0, 2000), rounds=st.booleans(),
)  # fmt: skip
def test_no_answer_costs_more_than_the_worst_case(
    rates: tuple[Decimal, ...], tier: tuple[Decimal, Decimal], start: int, prompt: int, completion: int,
    parts: tuple[int, int], reasoning: int, rounds: bool,
) -> None:  # fmt: skip
    read, write, _, reason = rates[2:]
    price = Price(
        rates[0], rates[1], cache_read_mtok=read, cache_write_mtok=write, reasoning_mtok=reason,
        tiers=((start, Price(*tier, rounds_to_credits=rounds)),), rounds_to_credits=rounds,
    )  # fmt: skip
    cached = parts[0] % (prompt + 1)
    written = parts[1] % (prompt - cached + 1)
    usage = Usage(prompt, completion, cached_tokens=cached, cache_write_tokens=written,
                  reasoning_tokens=min(reasoning, completion))  # fmt: skip
    usd, most = price.usd(usage), price.most_usd(prompt, completion)
    assert usd is not None
    assert most is not None
    assert usd <= most
    assert most <= (price.most_usd(prompt + 1, completion + 1) or 0)


# --- through the command line -------------------------------------------------------------------------------


def snapshot(work: Workspace) -> dict[str, Any]:
    db = sqlite3.connect(work.ledger)
    (text,) = db.execute("SELECT prices FROM invocation ORDER BY invocation DESC LIMIT 1").fetchone()
    db.close()
    (of_model,) = json.loads(text).values()
    assert isinstance(of_model, dict)
    return of_model


def test_the_published_price_makes_up_for_what_is_not_reported(work: Workspace, provide: Provide) -> None:
    provider = provide(
        bill="none",
    )
    work.write_rows(["a", "a rather longer prompt than that"])
    work.write_job(provider.base_url, model="claude-sonnet-4")  # an alias
    result = work.run("--json")
    assert result.code == 0, result.stderr
    assert {row["cost_source"] for row in work.rows()} == {"provider_list"}
    # Rounded to credits for each part, as the provider does, it is the bill to the last digit.
    assert provider.bill == spent(work.rows()) == result.json["usd_spent"]
    assert snapshot(work) == {
        "source": "provider_list", "input_mtok": "3.9", "output_mtok": "19.5", "cache_read_mtok": "0.39",
        "cache_write_mtok": "4.875", "rounds_to_credits": True, "factor": "1",
    }  # fmt: skip


def test_the_list_is_asked_for_once_without_the_key_and_again_only_by_its_etag(
    work: Workspace, provide: Provide
) -> None:
    provider = provide(
        bill="none",
    )
    work.write_rows([str(index) for index in range(30)])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    (asked,) = provider.gets
    assert asked["path"] == "/v1/models?include=pricing"
    assert "authorization" not in asked["headers"]
    assert work.run().code == 0
    _, again = provider.gets
    assert again["headers"]["if-none-match"].startswith('W/"')
    assert {row["cost_source"] for row in work.rows()} == {"provider_list"}


def test_the_jobs_price_comes_before_the_list_and_the_list_before_the_library(
    work: Workspace, provide: Provide
) -> None:
    work.write_rows(["a"])
    for keys, options, source in (
        ({"prices": {"input_mtok": 3, "output_mtok": 15}}, {}, "job"),
        ({}, {}, "provider_list"),
        ({}, {"models": None}, "library"),
        ({}, {"models": [{"id": "anthropic/claude-sonnet-4", "pricing": None}]}, "library"),
    ):
        work.write_job(provide(bill="none", **options).base_url, **keys)
        result = work.run()
        assert result.code == 0
        assert work.rows()[0]["cost_source"] == source
        assert ("estimated from library prices" in result.stderr) is (source == "library")


def test_without_the_library_a_price_is_unknown(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide(bill="none", models=None).base_url)
    script = work.folder / "without.py"
    script.write_text(
        "import sys\nsys.modules['genai_prices'] = None\nfrom batchrun.cli import main\n"
        "sys.argv = ['batchrun', 'job.yaml']\nmain()\n"
    )
    work.command = lambda *args: [sys.executable, str(script)]  # type: ignore[method-assign]
    assert work.run().code == 0
    assert work.rows()[0]["usd_spent"] is None


def test_an_amount_far_from_its_tokens_is_flagged(work: Workspace, provide: Provide) -> None:
    # The answers of 2025: credits in the token fields.
    work.write_rows(['<<{"usage": {"prompt_tokens": 50000, "completion_tokens": 63000, "total_tokens": 113000}}>>'])
    work.write_job(provide().base_url)
    assert work.run().code == 0
    (row,) = work.rows()
    assert (row["cost_source"], row["flags"]) == ("reported", ["suspicious_cost"])


def test_reprice_derives_what_nobody_reported_anew(work: Workspace, provide: Provide) -> None:
    provider = provide(
        bill="mix",
    )
    work.write_rows([f"row {index}" for index in range(40)])
    work.write_job(provider.base_url, prices={"input_mtok": 1, "output_mtok": 1})
    assert work.run().code == 0
    before = {row["prompt"]: row for row in work.rows()}
    sources = {row["cost_source"] for row in before.values()}
    assert sources == {"reported", "credits", "job"}
    assert provider.bill > spent(work.rows())
    work.write_job(provider.base_url)  # the prices were wrong: the provider's list is right
    result = work.batchrun("export", "job.yaml", "--reprice", "--json")
    assert result.code == 0, result.stderr
    assert "(provider_list prices)" in result.stderr
    after = {row["prompt"]: row for row in work.rows()}
    for prompt, row in after.items():
        if before[prompt]["cost_source"] == "job":
            assert row["cost_source"] == "provider_list"
            assert row["usd_spent"] > before[prompt]["usd_spent"]
        else:
            assert row == before[prompt]
    assert provider.bill == spent(work.rows()) == result.json["usd_spent"] == work.manifest()["usd_spent"]
    assert work.batchrun("verify", "job.yaml").code == 0
    # A second time changes nothing, and a plain export keeps it.
    assert work.batchrun("export", "job.yaml").code == 0
    assert provider.bill == spent(work.rows())


def test_reprice_without_a_price_says_what_to_add(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide(bill="none").base_url, model="nobody/has-a-price")
    assert work.run().code == 0
    result = work.batchrun("export", "job.yaml", "--reprice")
    assert result.code == 2
    assert "add prices:" in result.stderr


def test_reprice_prices_each_answer_by_the_model_that_was_asked(work: Workspace, provide: Provide) -> None:
    cheap = json.loads(json.dumps(SONNET).replace("3.9", "0.1").replace("0.0195", "0.0001"))
    cheap |= {"id": "cheap/model", "aliases": []}
    provider = provide(bill="none", models=[SONNET, cheap])
    work.write_rows(["a", "b"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    work.write_job(provider.base_url, model="cheap/model")
    result = work.batchrun("export", "job.yaml", "--reprice")
    assert result.code == 0, result.stderr
    assert "repriced 0 attempts (provider_list prices)" in result.stderr
    assert provider.bill == spent(work.rows())


def test_reprice_between_two_invocations_breaks_no_promise(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="none", refuse_after=20)
    work.write_rows([f"row {index}" for index in range(60)])
    prices = {"input_mtok": 4, "output_mtok": 20}
    work.write_job(provider.base_url, prices=prices, budget={"usd": 0.03}, concurrency=2)
    assert work.run().code == 4
    work.write_job(provider.base_url, prices={"input_mtok": 1, "output_mtok": 5}, budget={"usd": 0.03}, concurrency=2)
    assert work.batchrun("export", "job.yaml", "--reprice").code == 0
    again = provide(bill="none", port=0)
    work.write_job(again.base_url, prices=prices, budget={"usd": 0.03}, concurrency=2)
    assert work.run().code in (0, 3)
    assert work.batchrun("export", "job.yaml", "--reprice").code == 0
    result = work.batchrun("verify", "job.yaml")
    assert result.code == 0, result.stdout


def test_a_list_that_cannot_be_had_is_told(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="none")
    work.write_rows(["a"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    provider.stop()
    provide(bill="none", models=None, port=provider.port)
    result = work.run()
    assert "the price list of aimlapi cannot be had: prices are those of 20" in result.stderr
    assert work.rows()[0]["cost_source"] == "provider_list"


def test_an_answer_for_nothing_is_suspicious(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide(charge=0).base_url)
    assert work.run().code == 0
    assert work.rows()[0]["flags"] == ["suspicious_cost"]


def test_an_odd_list_stops_nobody(work: Workspace, provide: Provide) -> None:
    units = [
        {"name": "token", "measure": measure, "price": "1e16", "per": "1e-999990"} for measure in ("input", "output")
    ]
    odd = {"id": SONNET["id"], "info": {"outputMax": 10**15}, "pricing": {"units": units}}
    provider = provide(models=[odd], etag="\u00e9")
    work.write_rows(["a"])
    work.write_job(provider.base_url, parameters={})
    for _ in range(2):
        result = work.run()
        assert result.code == 0, result.stderr
    assert work.batchrun("check", "job.yaml").code == 0
