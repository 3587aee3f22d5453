"""What a job will take, said before it is paid for: `check`, `--sample` and the projected total."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.money import Cost
from batchrun.progress import Progress
from batchrun.projection import project
from batchrun.records import Exchange, Intent, Request, Settlement, Slot
from batchrun.usage import Usage

from .conftest import FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]


def test_check_estimates_by_rule_of_thumb_and_sends_no_prompt(work: Workspace, provide: Provide) -> None:
    provider = provide(wordy=True)
    work.write_rows([f"Is the word number {index} a good word for it?" for index in range(500)])
    work.write_job(provider.base_url, parameters={"max_tokens": 200})
    result = work.batchrun("check", "job.yaml", "--json")
    assert result.code == 0, result.stderr
    assert provider.requests == []
    assert len(provider.gets) == 1
    found = result.json["estimate"]
    assert (result.json["rows"], found["measured_answers"], found["price_source"]) == (500, 0, "provider_list")
    assert found["usd"]["low"] < found["usd"]["likely"] < found["usd"]["high"]
    assert found["completion_tokens"] == {"low": 500 * 4, "likely": 500 * 100, "high": 500 * 200}
    assert work.run().code == 0
    assert found["usd"]["low"] < provider.bill < found["usd"]["high"]
    assert found["prompt_tokens"]["low"] < sum(row["prompt_tokens"] for row in work.rows())


def test_check_offline_asks_nobody(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url)
    result = work.batchrun("check", "job.yaml", "--offline")
    assert result.code == 0
    assert provider.gets == []
    assert "estimated from library prices" in result.stdout
    # The list of an earlier run is known offline too.
    assert work.run().code == 0
    result = work.batchrun("check", "job.yaml", "--offline")
    assert "(provider_list price)" in result.stdout
    assert len(provider.gets) == 1


def test_check_measures_by_earlier_answers(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows([f"row number {index}" for index in range(40)])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    work.write_rows([f"row number {index}" for index in range(1000)])
    result = work.batchrun("check", "job.yaml", "--json")
    found = result.json["estimate"]
    assert found["measured_answers"] == 40
    before = provider.bill
    assert work.run().code == 0
    actual = provider.bill - before
    assert abs(found["usd"]["likely"] - actual) < actual / 10
    assert found["usd"]["low"] <= actual * Decimal("1.05")
    assert found["usd"]["high"] >= actual * Decimal("0.95")
    assert "from 1" in work.batchrun("check", "job.yaml").stdout


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model": "nobody/has-a-price"}, "no price is known: set prices:"),
        ({"model": "nobody/x", "parameters": {}, "prices": {"input_mtok": 1, "output_mtok": 1}}, "nothing bounds the"),
        ({"model": "nobody/x", "budget": {"usd": 1}}, "a run would stop here: budget: no price is known"),
    ],
)
def test_check_says_what_is_lacking(work: Workspace, provide: Provide, keys: dict[str, object], said: str) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url, **keys)
    result = work.batchrun("check", "job.yaml")
    assert result.code == 0
    assert said in result.stdout + result.stderr


def test_check_of_nothing_costs_nothing(work: Workspace, provide: Provide) -> None:
    work.write_rows([])
    work.write_job(provide().base_url)
    result = work.batchrun("check", "job.yaml", "--json")
    assert result.code == 0, result.stderr
    assert result.json["estimate"]["usd"] == {"low": 0, "likely": 0, "high": 0}


def test_a_sample_projects_and_the_next_call_goes_on(work: Workspace, provide: Provide) -> None:
    provider = provide(wordy=True)
    work.write_rows([f"row {index}" for index in range(600)])
    work.write_job(provider.base_url, parameters={"max_tokens": 300})
    result = work.run("--sample", "60", "--json")
    assert result.code == 0, result.stderr
    assert (result.json["reason"], result.json["ok"], result.json["pending"]) == ("sample", 60, 540)
    asked = [int(request["text"].split()[1]) for request in provider.requests]
    assert len(asked) == 60
    assert max(asked) > 300  # at random, and not from the top
    assert work.manifest()["complete"] is False
    assert provider.bill == spent(work.rows())
    found = result.json["projection"]
    assert found["rows"] == 60
    assert "projection for the whole run, from 60 rows, with 90 % intervals: $" in result.stderr
    whole = work.run("--json")
    assert whole.code == 0
    assert f"going on with run {result.json['run_id']}: 60 of 600 rows are answered" in whole.stderr
    assert len(provider.requests) == 600
    assert provider.bill == spent(work.rows()) == whole.json["usd_spent"]
    # Wide of the mark only in one case of ten thousand.
    width = found["usd"]["high"] - found["usd"]["low"]
    assert abs(found["usd"]["likely"] - provider.bill) < 2 * width
    tokens = found["total_tokens"]
    assert abs(tokens["likely"] - whole.json["total_tokens"]) < 2 * (tokens["high"] - tokens["low"])


def test_a_sample_of_more_than_is_left_is_the_whole(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b", "c"])
    work.write_job(provider.base_url)
    result = work.run("--sample", "10", "--json")
    assert (result.code, result.json["complete"], result.json["reason"]) == (0, True, None)
    assert work.run("--sample", "0").code == 2


def test_a_sample_with_failures_says_so(work: Workspace, provide: Provide) -> None:
    work.write_rows([f'{index} <<{{"fail": [400]}}>>' for index in range(5)])
    work.write_job(provide().base_url)
    result = work.run("--sample", "2", "--json")
    assert (result.code, result.json["failed"], result.json["pending"]) == (1, 2, 3)


def test_the_progress_carries_the_projected_total() -> None:
    now = 0.0
    stream = io.StringIO()
    progress = Progress(stream, total=100, rows=100, settled=0, usd=Decimal(0), tokens=0, clock=lambda: now)
    request = Request(Slot(0, "m"), "k", b"")
    exchange = Exchange("ok", usage=Usage(1, 1, 2), cost=Cost(Decimal("0.02"), "reported"))
    for _ in range(25):
        progress.settle(Settlement(Intent(1, request, 0, "i"), exchange, 0, is_final=True))
    now = 31.0
    progress.tick()
    assert "$0.5 of about $2, " in stream.getvalue()


def test_an_estimate_is_called_one_while_it_grows() -> None:
    now = 0.0
    stream = io.StringIO()
    progress = Progress(stream, total=9, rows=9, settled=0, usd=Decimal(0), tokens=0, clock=lambda: now)
    exchange = Exchange("ok", usage=Usage(1, 1, 2), cost=Cost(Decimal("0.02"), "library"))
    progress.settle(Settlement(Intent(1, Request(Slot(0, "m"), "k", b""), 0, "i"), exchange, 0, is_final=True))
    now = 31.0
    progress.tick()
    assert "$0.02 estimated, " in stream.getvalue()


# --- laws ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50), st.integers(0, 10_000))
def test_a_projection_is_ordered_and_grows_with_what_remains(values: list[float], remaining: int) -> None:
    found, more = project(values, remaining), project(values, remaining + 1)
    assert found is not None
    assert more is not None
    assert 0 <= found.low <= found.likely <= found.high
    assert more.likely >= found.likely
    assert more.high >= found.high


@pytest.mark.parametrize("size", [2, 5, 30])
def test_the_interval_holds_nine_times_in_ten(size: int) -> None:
    chance = random.Random(7)
    held = 0
    for _ in range(2000):
        values = [chance.gauss(100, 20) for _ in range(size)]
        remaining = sum(chance.gauss(100, 20) for _ in range(200))
        found = project(values, 200)
        assert found is not None
        held += found.low <= remaining <= found.high
    assert 0.88 <= held / 2000 <= 0.92


def test_one_row_projects_nothing() -> None:
    assert project([1.0], 10) is None
