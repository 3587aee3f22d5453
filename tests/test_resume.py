"""Stopped at any moment, the same command goes on where it was; answers stand in their own rows."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun import accounts
from batchrun.ledger import Ledger
from batchrun.money import Cost, from_pico
from batchrun.records import Action, Asked, Exchange, Failure, Request, Reservation, Settlement, Slot, now_us
from batchrun.stored import Packer

from .conftest import FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]


def kill_and_resume(
    work: Workspace, provider: FakeProvider, *, kills: int, rows: int, concurrency: int, seed: int, longest: float
) -> None:
    """kill -9 at random moments, resume until done, and compare with what the provider saw."""
    chance = random.Random(seed)
    done = False
    killed = 0
    while not done:
        with work.start("job.yaml", "--quiet") as process:
            if killed < kills:
                time.sleep(chance.uniform(0.3, longest))
                process.kill()
                killed += 1
            _, stderr = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), stderr
        # It may have been killed when all was done but its exit: another call would begin another run.
        done = process.returncode == 0 or is_finished(work)
    found = work.rows()
    assert [row["response"] for row in found] == [f"answer to: {row['prompt']}" for row in found]
    assert len(found) == rows
    requests = provider.requests
    assert len(requests) <= rows + killed * concurrency
    # Every answer that reached the ledger was asked for once; the others are the unknown outcomes.
    known = {row["client_request_id"] for row in found}
    unknown = [request for request in requests if request["id"] not in known]
    assert len(unknown) <= work.manifest()["unknown_outcomes"] <= killed * concurrency
    assert sum(row["unknown_attempts"] for row in found) == work.manifest()["unknown_outcomes"]
    assert provider.bill - spent(found) == sum((Decimal(request["usd"]) for request in unknown), Decimal(0))


def is_finished(work: Workspace) -> bool:
    if not work.ledger.exists():
        return False
    db = sqlite3.connect(f"file:{work.ledger}?mode=ro", uri=True)
    try:
        return bool(db.execute("SELECT count(*) FROM run WHERE state = 'finished'").fetchone()[0])
    except sqlite3.Error:
        return False
    finally:
        db.close()


def test_kill_9_at_random_moments(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.05)
    work.write_rows([f"q{number}" for number in range(400)])
    work.write_job(provider.base_url, concurrency=8)
    kill_and_resume(work, provider, kills=5, rows=400, concurrency=8, seed=1, longest=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_kill_9_at_20_random_moments_of_2000_rows(work: Workspace, provide: Provide, stream: bool) -> None:
    provider = provide(latency=0.05)
    work.write_rows([f"q{number}" for number in range(2000)])
    work.write_job(provider.base_url, concurrency=8, stream=stream)
    kill_and_resume(work, provider, kills=20, rows=2000, concurrency=8, seed=2, longest=2.5)


@pytest.mark.slow
def test_5000_rows_with_failures_are_each_paid_once(work: Workspace, provide: Provide) -> None:
    provider = provide(p429=0.05, p500=0.02, retry_after=1, seed=11)
    work.write_rows([f"q{number}" for number in range(5000)])
    work.write_job(provider.base_url, concurrency=64)
    result = work.run("--json", timeout=300)
    assert result.code == 0, result.stderr
    rows = work.rows()
    assert {row["status"] for row in rows} == {"ok"}
    answered = Counter(request["text"] for request in provider.requests if request["answered"])
    assert len(answered) == 5000
    assert set(answered.values()) == {1}
    assert spent(rows) == provider.bill == result.json["usd_spent"]


def test_rows_inserted_deleted_edited_and_doubled_between_two_tries(work: Workspace, provide: Provide) -> None:
    before = [f"q{number}" for number in range(40)]
    provider = provide(latency=0.2)
    work.write_rows(before)
    work.write_job(provider.base_url, concurrency=4)
    with work.start("job.yaml") as process:
        while len(provider.requests) < 20:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    answered = {row["prompt"] for row in work.rows() if row["status"] == "ok"}
    assert 20 <= len(answered) < 40
    after = ["new at the top", *before]
    after.remove("q3")
    after[after.index("q5")] = "q5 edited"
    after.insert(9, "q7")  # doubled: one of the two has the answer
    work.write_rows(after)
    asked_before = len(provider.requests)
    result = work.run("--json")
    assert result.code == 0, result.stderr
    rows = work.rows()
    assert [row["response"] for row in rows] == [f"answer to: {prompt}" for prompt in after]
    asked = Counter(request["text"] for request in provider.requests[asked_before:])
    should = Counter(after)
    should.subtract(answered & set(after))
    assert asked == +should
    gone = [row for row in ("q3", "q5") if row in answered]
    assert result.json["unplaced"] == len(gone) == 2
    assert spent(rows) + result.json["unplaced_usd"] == provider.bill == result.json["usd_spent"]


def test_an_input_that_changes_under_the_run_ends_1(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3)
    work.write_rows([f"q{number}" for number in range(12)])
    work.write_job(provider.base_url, concurrency=4)
    with work.start("job.yaml", "--json") as process:
        while len(provider.requests) < 4:
            time.sleep(0.02)
        work.write_rows(["first", *(f"q{number}" for number in range(11))])
        stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert '"reason": "input_changed"' in stdout
    rows = work.rows()
    assert [row["prompt"] for row in rows][:2] == ["first", "q0"]
    for row in rows:
        assert row["response"] in (None, f"answer to: {row['prompt']}")
    assert spent(rows) + work.manifest()["unplaced_usd"] == provider.bill
    assert work.run().code == 0
    assert all(row["status"] == "ok" for row in work.rows())


def test_another_address_asks_every_row_again_and_keeps_the_money(work: Workspace, provide: Provide) -> None:
    provider = provide(refuse_after=3)
    work.write_rows([f"q{number}" for number in range(6)])
    work.write_job(provider.base_url, concurrency=1)
    assert work.run().code == 4
    second = provide()
    work.write_job(second.base_url, concurrency=1)
    result = work.run("--json")
    assert result.code == 0
    # Another address is another key: nothing is taken over from a server that may answer otherwise.
    assert len(second.requests) == 6
    assert result.json["unplaced"] == 3
    assert result.json["usd_spent"] == provider.bill + second.bill


def test_an_unchanged_input_is_not_read_again(work: Workspace, provide: Provide) -> None:
    provider = provide(refuse_after=2)
    work.write_rows(["a", "b", "c"])
    work.write_job(provider.base_url, concurrency=1)
    assert work.run().code == 4
    # A change that size and time do not show: only a new pass over the rows would find it.
    path = work.folder / "in.csv"
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"a\r\n", b"x\r\n"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    # What changes no request makes no new pass necessary either.
    work.write_job(provider.base_url, concurrency=2, retry={"max_attempts": 3}, timeout_seconds=5)
    result = work.run("--json")
    assert "2 of 3 rows are answered" in result.stderr
    assert (result.json["ok"], result.json["unplaced"]) == (2, 0)
    os.utime(path)
    result = work.run("--json")
    assert (result.json["ok"], result.json["unplaced"]) == (1, 1)


def test_another_model_is_another_question(work: Workspace, provide: Provide) -> None:
    provider = provide(refuse_after=3)
    work.write_rows(["a", "b", "c", "d"])
    work.write_job(provider.base_url, concurrency=1)
    assert work.run().code == 4
    work.write_job(provider.base_url, concurrency=1, model="openai/gpt-5")
    result = work.run("--json")
    assert (result.code, result.json["ok"], result.json["unplaced"]) == (4, 0, 3)
    assert {row["requested_model"] for row in work.rows()} == {"openai/gpt-5"}
    assert result.json["usd_spent"] == result.json["unplaced_usd"] == provider.bill


def test_another_jobs_ledger_is_refused_and_adopted(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url, ledger="the.sqlite")
    assert work.run().code == 0
    other = work.folder / "other.yaml"
    work.job.rename(other)
    result = work.batchrun("other.yaml")
    assert result.code == 2
    assert "is the ledger of the job 'job'" in result.stderr
    assert "--adopt-ledger" in result.stderr
    assert work.batchrun("other.yaml", "--adopt-ledger").code == 0


# --- the law of placement -------------------------------------------------------------------------------------


def _asked(keys: list[str]) -> list[Asked]:
    return [Asked(len(keys), [(Slot(index, "m"), key) for index, key in enumerate(keys)])]


@settings(max_examples=60)
@given(
    before=st.lists(st.sampled_from("abcdef"), max_size=12),
    after=st.lists(st.sampled_from("abcdefgh"), max_size=12),
    outcomes=st.lists(st.sampled_from(["ok", "failed", "open", "none"]), min_size=12, max_size=12),
)
def test_every_answer_finds_a_row_that_asks_for_it_or_is_unplaced(
    tmp_path_factory: pytest.TempPathFactory, before: list[str], after: list[str], outcomes: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    ledger = Ledger.open(folder / "l.sqlite", job_name="j", job_path=folder / "j.yaml")
    run = ledger.current_run()
    ledger.begin_invocation(run, job={}, endpoint="e")
    ledger.place(run, _asked(before), dict)
    for (index, key), outcome in zip(enumerate(before), outcomes, strict=False):
        if outcome == "none":
            continue
        intent = ledger.intent(run, Request(Slot(index, "m"), key, b"x"), 1, Reservation(None, now_us()))
        ledger.commit(run, [], [intent])
        failure = None if outcome == "ok" else Failure("server", Action.RETRY, "x")
        exchange = Exchange(
            "ok" if outcome == "ok" else "failed",
            body=Packer().pack(key.encode()),
            failure=failure,
            cost=Cost(Decimal(1), "reported"),
        )
        ledger.commit(run, [Settlement(intent, exchange, now_us(), outcome in ("ok", "failed"))], [])
    ledger.place(run, _asked(after), dict)
    standing = list(ledger.standing(run, 0, len(after)))
    for attempt in standing:
        assert attempt.key == after[attempt.slot.row_index]
    answered = Counter(attempt.key for attempt in standing if attempt.outcome == "ok")
    had = Counter(key for key, outcome in zip(before, outcomes, strict=False) if outcome == "ok")
    asked = Counter(after)
    per_slot = Counter(attempt.slot for attempt in standing if attempt.outcome == "ok")
    assert all(number == 1 for number in per_slot.values())
    assert answered == had & asked
    totals = accounts.totals(ledger, run)
    assert totals.ok == sum(answered.values())
    assert totals.unplaced == sum((had - asked).values())
    assert totals.usd == totals.unplaced_usd + from_pico(sum(attempt.usd_pico or 0 for attempt in standing))
    # And back again: the same input, the same places.
    ledger.place(run, _asked(before), dict)
    assert accounts.totals(ledger, run).unplaced == 0
    ledger.close()


def test_an_input_that_is_changed_and_changed_back_under_the_run_is_no_bug(work: Workspace, provide: Provide) -> None:
    """Rows that were answered ask for the same again, while their answers have lost their rows."""
    provider = provide(latency=0.01)
    texts = [f"row {number:05}" for number in range(3000)]
    work.write_rows(texts)
    work.write_job(provider.base_url, concurrency=32)
    with work.start("job.yaml") as process:
        provider.wait_for(2400)
        process.kill()
    asked = len(provider.requests)
    work.write_rows([text.replace("row", "ROW") for text in texts])
    with work.start("job.yaml") as process:
        provider.wait_for(asked + 100)
        work.write_rows(texts)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert "the input has changed under the run" in stderr
    assert work.run().code == 0
    assert sum(request["text"].startswith("row") for request in provider.requests) <= 3000 + 32
