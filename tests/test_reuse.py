"""`reuse`: answers that are there are taken for nothing, across runs and within one."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from decimal import Decimal

import pytest

from .conftest import FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]


def test_a_second_run_asks_what_is_new_and_nothing_else(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="mix")
    rows = [f"row {index}" for index in range(20)]
    work.write_rows(rows)
    work.write_job(provider.base_url, reuse=True)
    first = work.run("--json")
    assert first.code == 0
    before = provider.bill
    again = work.run("--json")
    assert (again.code, again.json["ok"], again.json["reused"], again.json["attempts"]) == (0, 20, 20, 0)
    assert len(provider.requests) == 20
    assert (again.json["usd_spent"], again.json["saved_usd"]) == (0, before)
    assert {(row["status"], row["reused"], row["cost_source"], row["usd_spent"], row["attempts"])
            for row in work.rows()} == {("ok", True, "reused", 0.0, 0)}  # fmt: skip
    assert [row["response"] for row in work.rows()] == [f"answer to: {row}" for row in rows]
    assert "20 rows are answered by earlier runs, for nothing" in again.stderr
    # One edited, five more, and all of them in another order.
    changed = ["row 3, edited" if row == "row 3" else row for row in rows] + [f"new {index}" for index in range(5)]
    random.Random(1).shuffle(changed)
    work.write_rows(changed)
    third = work.run("--json")
    assert (third.code, third.json["ok"], third.json["reused"], third.json["attempts"]) == (0, 25, 19, 6)
    assert len(provider.requests) == 26
    assert [row["response"] for row in work.rows()] == [f"answer to: {row}" for row in changed]
    assert third.json["usd_spent"] == spent(work.rows()) == provider.bill - before
    assert work.batchrun("verify", "job.yaml").code == 0
    assert work.batchrun("export", "job.yaml").code == 0
    assert [row["response"] for row in work.rows()] == [f"answer to: {row}" for row in changed]


def test_without_it_every_run_asks_anew(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "a"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    assert work.run().code == 0
    assert len(provider.requests) == 4
    assert "reused" not in work.rows()[0]


def test_equal_requests_are_asked_once_for_each_sample(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b", "a", "a", "b", "c"])
    work.write_job(provider.base_url, reuse=True, samples=2)
    result = work.run("--json")
    assert (result.code, result.json["ok"], result.json["reused"]) == (0, 12, 6)
    assert sorted(request["text"] for request in provider.requests) == ["a", "a", "b", "b", "c", "c"]
    assert [row["response"][-1] for row in work.rows()] == [text for text in "abaabc" for _ in range(2)]
    assert [row["reused"] for row in work.rows()][::2] == [False, False, True, True, True, False]
    assert provider.bill == spent(work.rows()) == result.json["usd_spent"]
    assert work.batchrun("verify", "job.yaml").code == 0


def test_what_follows_a_row_that_fails_fails_with_it(work: Workspace, provide: Provide) -> None:
    provider = provide(p400=1)
    work.write_rows(["a", "a", "a"])
    work.write_job(provider.base_url, reuse=True)
    result = work.run("--json")
    assert (result.code, result.json["failed"]) == (1, 3)
    assert len(provider.requests) == 1
    assert {row["error"] for row in work.rows()} == {work.rows()[0]["error"]}
    # And is asked again with it.
    provider.stop()
    again = provide(port=provider.port)
    result = work.run("--json", "--retry-failed")
    assert (result.code, result.json["ok"]) == (0, 3), result.stderr
    assert len(again.requests) == 1
    assert work.batchrun("verify", "job.yaml").code == 0


@pytest.mark.parametrize("seed", range(3))
def test_killed_and_gone_on_with_every_row_has_its_answer(work: Workspace, provide: Provide, seed: int) -> None:
    provider = provide(latency=0.03, bill="credits")
    chance = random.Random(seed)
    rows = [f"row {chance.randrange(40)}" for _ in range(90)]
    work.write_rows(rows)
    work.write_job(provider.base_url, reuse=True, concurrency=4)
    ever = set(rows)
    for _ in range(3):
        with work.start("job.yaml") as process:
            provider.wait_for(len(provider.requests) + chance.randrange(1, 8))
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
        # Rows come and go meanwhile.
        rows.pop(chance.randrange(len(rows)))
        rows.insert(chance.randrange(len(rows)), f"row {chance.randrange(50)}")
        work.write_rows(rows)
        ever |= set(rows)
    result = work.run("--json")
    assert result.code == 0, result.stderr
    assert [row["response"] for row in work.rows()] == [f"answer to: {row}" for row in rows]
    assert len([request for request in provider.requests if request["status"] == 200]) <= len(ever) + 3 * 4
    assert result.json["usd_spent"] <= provider.bill
    assert spent(work.rows()) + result.json["unplaced_usd"] == result.json["usd_spent"]
    verified = work.batchrun("verify", "job.yaml")
    assert verified.code == 0, verified.stdout


def test_a_cap_counts_what_was_paid_and_not_what_was_taken(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows([f"row {index}" for index in range(10)])
    work.write_job(provider.base_url, reuse=True, budget={"usd": 1, "per": "month"})
    first = work.run("--json").json["usd_spent"]
    assert first > 0
    tight = str(first + Decimal("0.00000001"))
    work.write_job(provider.base_url, reuse=True, budget={"usd": float(tight), "per": "month"})
    result = work.run("--json")
    assert (result.code, result.json["reused"]) == (0, 10), result.stderr


def test_a_row_that_failed_takes_an_answer_that_is_there(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b", "c"])
    work.write_job(provider.base_url, concurrency=1)
    assert work.run().code == 0
    provider.stop()
    provider = provide(port=provider.port, p400=1.0, refuse_after=1)
    work.write_rows(["a", "b", "c", "d"])
    assert work.run().code == 4
    provider.stop()
    provider = provide(port=provider.port)
    work.write_job(provider.base_url, concurrency=1, reuse=True)
    result = work.run("--json")
    assert (result.code, result.json["ok"], result.json["reused"]) == (0, 4, 3), result.stderr
    assert [request["text"] for request in provider.requests] == ["d"]
    assert work.batchrun("verify", "job.yaml").code == 0


def test_a_repaired_answer_is_one_row_that_was_taken(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(['0 <<{"say": ["hmm", "yes"]}>>', '1 <<{"say": "no"}>>'])
    work.write_job(provider.base_url, labels=["yes", "no"], repair=1, reuse=True)
    assert work.run().code == 0
    result = work.run("--json")
    assert (result.json["reused"], result.json["saved_usd"], result.json["sent"]) == (2, provider.bill, 0)
