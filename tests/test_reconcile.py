"""What unknown outcomes cost in truth: the provider's own log against ours."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from .conftest import KEY, FakeProvider, Result, Workspace, spent

Provide = Callable[..., FakeProvider]


def prompts(number: int) -> list[str]:
    kinds = ["hangup", "half", None, None]
    return [
        f'{index} <<{{"fail": ["{kind}"]}}>>' if (kind := kinds[index % 4]) else f"row {index}"
        for index in range(number)
    ]


def reconcile(work: Workspace, *args: str) -> Result:
    return work.batchrun("reconcile", "job.yaml", "--json", *args)


def ready(work: Workspace, provider: FakeProvider, number: int = 40, **keys: Any) -> None:
    """A run with unknown outcomes in half of its rows."""
    work.write_rows(prompts(number))
    work.write_job(provider.base_url, **({"retry": {"max_attempts": 1}} | keys))
    assert work.run().code == 1


def test_unknown_outcomes_become_the_providers_truth(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider)
    before = work.manifest()
    assert before["unknown_outcomes"] == 20
    assert provider.bill > spent(work.rows())
    result = reconcile(work)
    assert result.code == 0, result.stderr
    assert (result.json["billed"], result.json["still_unknown"], result.json["differing"]) == (20, 0, 0)
    assert result.json["billed_usd"] == provider.bill - before["usd_spent"]
    # The Parquet was written anew, and now it is the bill.
    assert provider.bill == spent(work.rows()) == work.manifest()["usd_spent"]
    assert {row["cost_source"] for row in work.rows()} == {"reported"}
    assert {row["unknown_attempts"] for row in work.rows()} == {0}
    assert work.manifest()["unknown_outcomes"] == 0
    assert work.batchrun("verify", "job.yaml").code == 0
    assert reconcile(work).json["billed"] == 0


def test_after_kill_the_log_tells_what_was_done(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3)
    work.write_rows([f"row {index}" for index in range(200)])
    work.write_job(provider.base_url, concurrency=16)
    process = work.start("job.yaml")
    provider.wait_for(40, seconds=60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(1)  # what was under way comes to its end there
    result = reconcile(work, "--settle-after", "0")
    assert result.code == 0, result.stderr
    db = sqlite3.connect(work.ledger)
    (pico,) = db.execute("SELECT sum(usd_pico) FROM charged").fetchone()
    db.close()
    assert Decimal(pico).scaleb(-12) == provider.bill
    assert work.run().code == 0
    assert provider.bill == spent(work.rows())


def test_failed_requests_are_not_billed(work: Workspace, provide: Provide) -> None:
    provider = provide(p500=0.1, p_hangup=0.2)
    work.write_rows([f"row {index}" for index in range(100)])
    work.write_job(provider.base_url, retry={"max_attempts": 2})
    assert work.run().code in (0, 1)
    assert reconcile(work).code == 0
    assert provider.bill == spent(work.rows())


def test_what_the_log_does_not_have_is_unknown_until_it_is_old(work: Workspace, provide: Provide) -> None:
    provider = provide(log_lag=3600)
    ready(work, provider)
    spent_before = work.manifest()["usd_spent"]
    result = reconcile(work)
    assert result.code == 1
    assert (result.json["billed"], result.json["not_billed"], result.json["still_unknown"]) == (0, 0, 20)
    assert "still unknown: 20 attempts, up to $" in result.stderr
    assert work.manifest()["unknown_outcomes"] == 20
    old = reconcile(work, "--settle-after", "0")
    assert old.code == 0
    assert old.json["not_billed"] == 20
    assert (work.manifest()["unknown_outcomes"], work.manifest()["usd_spent"]) == (0, spent_before)


def test_pages_limits_and_lines_seen_twice(work: Workspace, provide: Provide) -> None:
    provider = provide(log_429=3)
    ready(work, provider, 420, concurrency=32)
    result = reconcile(work)
    assert result.code == 0, result.stderr
    assert result.json["billed"] == 210
    assert result.json["lines"] == 420
    paths = [get["path"] for get in provider.gets if get["path"].startswith("/v2/logs")]
    assert len(paths) > 5
    assert all("limit=100" in path for path in paths)
    assert provider.bill == spent(work.rows())


def test_a_walk_that_does_not_reach_its_end_changes_nothing(work: Workspace, provide: Provide) -> None:
    provider = provide(log_breaks_at=100)
    ready(work, provider, 150)
    before = work.output.read_bytes()
    result = reconcile(work)
    assert result.code == 4
    assert "cannot be read to its end: it answers 500; nothing was changed" in result.stderr
    assert work.output.read_bytes() == before
    assert work.batchrun("export", "job.yaml").code == 0
    assert work.manifest()["unknown_outcomes"] == 76


def test_a_log_that_refuses_the_key_changes_nothing(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider)
    provider.stop()
    provide(key="another key", port=provider.port)
    result = reconcile(work)
    assert result.code == 4
    assert "the provider's log answers 401" in result.stderr
    assert work.manifest()["unknown_outcomes"] == 20


def test_lines_that_differ_are_shown(work: Workspace, provide: Provide) -> None:
    provider = provide(log_adds=0.01)
    work.write_rows(["a", "b"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    ours = work.manifest()["usd_spent"]
    result = reconcile(work)
    assert result.code == 1
    assert result.json["differing"] == 2
    assert all(found["theirs"] == found["ours"] + Decimal("0.01") for found in result.json["differences"])
    assert "differs: row 1: ours $0." in result.stderr
    assert work.manifest()["usd_spent"] == ours  # what the provider reported stands


def test_estimates_give_way_to_the_providers_own(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="none", models=None)
    work.write_rows(["a", "b"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    assert {row["cost_source"] for row in work.rows()} == {"library"}
    assert provider.bill != spent(work.rows())
    result = reconcile(work)
    assert result.code == 0, result.stderr
    assert result.json["derived_replaced"] == 2
    assert provider.bill == spent(work.rows())
    assert {row["cost_source"] for row in work.rows()} == {"reported"}
    # What the provider told stands above what would be derived.
    assert work.batchrun("export", "job.yaml", "--reprice").code == 0
    assert provider.bill == spent(work.rows())


def test_requests_that_the_ledger_lost_are_told(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b", "c"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    db = sqlite3.connect(work.ledger)
    db.execute("DELETE FROM answer WHERE attempt_id = 2")
    db.execute("DELETE FROM attempt WHERE attempt_id = 2")
    db.commit()
    db.close()
    result = reconcile(work)
    assert result.code == 1
    assert result.json["unrecorded"] == 1
    assert result.json["unrecorded_usd"] > 0
    assert "1 requests of ours" in result.stderr


def test_a_budget_gets_back_what_was_not_billed(work: Workspace, provide: Provide) -> None:
    provider = provide(log_missing=True)
    ready(work, provider, 8, budget={"usd": 0.026}, parameters={"max_tokens": 200}, concurrency=1)
    assert reconcile(work, "--settle-after", "0").json["not_billed"] == 4
    result = work.run("--retry-failed", "--json")
    assert result.code == 0, result.stderr


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"provider": "local", "model": "smollm2-135m"}, "has no log"),
        ({}, "there is nothing to reconcile"),
    ],
)
def test_what_cannot_be_reconciled_is_refused(
    work: Workspace, provide: Provide, keys: dict[str, Any], said: str
) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url, **keys)
    result = reconcile(work)
    assert result.code == 2
    assert said in result.stderr


def test_a_line_that_comes_late_is_believed(work: Workspace, provide: Provide) -> None:
    provider = provide(log_lag=4)
    ready(work, provider, 8)
    early = reconcile(work, "--settle-after", "0")
    assert (early.code, early.json["not_billed"]) == (0, 4)
    assert work.manifest()["usd_spent"] < provider.bill
    time.sleep(4.5)
    late = reconcile(work)
    assert (late.code, late.json["billed"]) == (0, 4), late.stderr
    assert provider.bill == spent(work.rows()) == work.manifest()["usd_spent"]
    assert work.batchrun("verify", "job.yaml").code == 0


def test_the_output_of_another_input_is_left_as_it_is(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider, 8)
    before = work.output.read_bytes()
    work.write_rows(["Tuesday's"])
    result = reconcile(work)
    assert (result.code, result.json["billed"]) == (0, 4), result.stderr
    assert "the input has changed since" in result.stderr
    assert work.output.read_bytes() == before
    (work.folder / "in.csv").unlink()
    again = reconcile(work)
    assert again.code == 0, again.stderr


def test_an_input_that_is_gone_hides_nothing_of_what_was_learnt(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider, 8)
    (work.folder / "in.csv").unlink()
    result = reconcile(work)
    assert (result.code, result.json["billed"]) == (0, 4), result.stderr
    assert "the output was left as it is" in result.stderr


def test_other_peoples_lines_are_none_of_our_business(work: Workspace, provide: Provide) -> None:
    provider = provide(log_extra=[{"client_request_id": "theirs"}, {"client_request_id": 7}, None, {}])
    ready(work, provider, 8)
    assert reconcile(work).code == 0


def test_a_line_of_ours_without_a_cost_changes_nothing(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider, 8)
    name = next(request["id"] for request in provider.requests)
    provider.stop()
    provide(port=provider.port, log_extra=[{"client_request_id": name, "status": "succeeded", "cost": {"usd": None}}])
    result = reconcile(work)
    assert result.code == 4
    assert "has no cost; nothing was changed" in result.stderr


def test_the_log_of_another_account_says_nothing_by_what_it_lacks(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider, 8)
    provider.stop()
    provide(port=provider.port)
    result = reconcile(work, "--settle-after", "0")
    assert result.code == 1
    assert (result.json["not_billed"], result.json["still_unknown"], result.json["missing"]) == (0, 4, 4)
    assert "is it that of another account or key?" in result.stderr


def test_a_key_that_the_log_echoes_is_not_shown(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider, 8)
    provider.stop()
    provide(port=provider.port, log_says=f"the key {KEY} is not allowed")
    result = reconcile(work)
    assert result.code == 4
    assert KEY not in result.stderr
    assert "[secret]" in result.stderr


@pytest.mark.parametrize(
    "pagination",
    [{"has_more": None, "total": 500}, {"limit": 50, "total": 500}, {"has_more": True}],
)
def test_a_log_that_is_not_read_to_its_end_settles_nothing(
    work: Workspace, provide: Provide, pagination: dict[str, Any]
) -> None:
    provider = provide()
    ready(work, provider, 8)
    provider.stop()
    lines = [{"client_request_id": f"theirs-{index}"} for index in range(50)]
    provide(port=provider.port, log_page={"data": lines, "pagination": pagination})
    result = reconcile(work, "--settle-after", "0")
    assert result.code == 4, result.stderr
    assert "nothing was changed" in result.stderr


@pytest.mark.parametrize("minutes", ["nan", "inf", "-1", "1e17"])
def test_settle_after_is_a_number(work: Workspace, minutes: str) -> None:
    work.write_rows(["a"])
    work.write_job()
    assert reconcile(work, f"--settle-after={minutes}").code == 2


def test_an_id_beyond_all_numbers_is_not_ours(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider, 4)
    run_id = provider.requests[0]["id"].partition(":")[0]
    provider.stop()
    extra = [{"client_request_id": f"{run_id}:0:{'9' * 30}", "cost": {"usd": 1}}]
    provide(port=provider.port, log_extra=extra)
    assert reconcile(work).code in (0, 1)


def test_an_empty_log_says_nothing_of_a_run_that_was_answered(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="none")  # so that all that is known of the costs is derived
    ready(work, provider, 8)
    provider.stop()
    provide(port=provider.port)
    result = reconcile(work, "--settle-after", "0")
    assert (result.json["not_billed"], result.json["still_unknown"]) == (0, 4)


def test_a_run_on_another_key_is_not_settled_by_what_this_ones_log_lacks(work: Workspace, provide: Provide) -> None:
    first = provide()
    ready(work, first, 8)
    first.stop()
    second = provide(port=first.port)
    work.write_rows([f"new {index}" for index in range(3)])
    assert work.run().code == 0
    assert len(second.requests) == 3
    result = reconcile(work, "--settle-after", "0")
    assert result.code == 1
    assert (result.json["not_billed"], result.json["still_unknown"], result.json["missing"]) == (0, 4, 4)


def test_a_line_that_says_failed_settles_even_a_young_attempt(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider, 1)
    (request,) = provider.requests
    provider.stop()
    provide(port=provider.port, log_extra=[{"client_request_id": request["id"], "status": "failed", "cost": None}])
    result = reconcile(work)  # of the last half hour
    assert (result.code, result.json["not_billed"], result.json["still_unknown"]) == (0, 1, 0), result.stderr
    assert work.rows()[0]["cost_source"] == "not_billed"
