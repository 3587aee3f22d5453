"""What a report shows when things went wrong, or other than usual."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from batchrun import accounts, report
from batchrun.errors import JobError
from batchrun.ledger_view import LedgerView

from .conftest import FakeProvider, Workspace

Provide = Callable[..., FakeProvider]


def change(ledger: Path, sql: str) -> None:
    with closing(sqlite3.connect(ledger)) as db, db:
        db.execute(sql)


def test_after_kill_9_what_may_be_on_the_bill_is_shown(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.5)
    work.write_rows([f"row {number}" for number in range(20)])
    work.write_job(provider.base_url, concurrency=4, budget={"usd": 5, "per": "day"})
    with work.start("job.yaml") as process:
        provider.wait_for(6)
        going = work.batchrun("report", ".", "--format", "json").json["runs"][0]
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert going["in_flight"] == 4
    assert going["usd_in_flight_at_most"] > 0
    found = work.batchrun("report", ".", "--format", "json").json
    (run,), totals = found["runs"], found["totals"]
    assert (run["in_flight"], totals["unknown_attempts"]) == (0, run["unknown_attempts"])
    assert run["unknown_attempts"] >= 3
    assert run["usd_spent"] <= provider.bill <= run["usd_spent"] + run["usd_unknown_at_most"] == run["budget_used"]
    assert f"≤{run['usd_unknown_at_most'].normalize():f}" in work.batchrun("report", ".").stdout
    assert f"at most ${run['usd_unknown_at_most'].normalize():f}" in work.batchrun("show", "job.yaml").stdout
    for by in ("model", "day"):
        groups = work.batchrun("report", ".", "--format", "json", "--by", by).json["groups"]
        assert sum(group["attempts"] for group in groups) == run["attempts"]
    # The next call settles them as unknown, and nothing that was shown was wrong.
    work.run()
    (after,) = work.batchrun("report", ".", "--format", "json").json["runs"]
    assert after["unknown_attempts"] == run["unknown_attempts"]


def test_a_budget_is_shown_as_it_binds(work: Workspace, provide: Provide) -> None:
    provider = provide(p_hangup=0.3)
    work.write_rows([f"row {number}" for number in range(12)])
    work.write_job(provider.base_url, budget={"usd": 5, "per": "day"}, reuse=True, retry={"max_attempts": 9})
    first = work.run("--json").json
    second = work.run("--json").json
    with closing(LedgerView.read(work.ledger)) as ledger:
        held = accounts.held(ledger, None, 0)
    assert held.unknown > 0
    runs = work.batchrun("report", ".", "--format", "json").json["runs"]
    assert [run["run_id"] for run in runs] == [first["run_id"], second["run_id"]]
    assert second["sent"] == 0
    # A run that sends nothing has a day too.
    assert {run["budget_used"] for run in runs} == {Decimal(held.pico).scaleb(-12)}


def test_rows_that_moved_are_each_told_where_they_stand(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="meta")
    work.write_rows(["first", 'second <<{"fail": [401]}>>'])
    work.write_job(provider.base_url, concurrency=1)
    assert work.run().code == 4
    work.write_rows(["put in before", "first", "second"])
    assert work.run().code == 0
    top = work.batchrun("report", ".", "--format", "json", "--top", "9").json["top"]
    assert sorted((row["row"], row["attempts"]) for row in top) == [(1, 1), (2, 1), (3, 1)]


def test_each_attempt_belongs_to_the_provider_that_was_asked(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="meta")
    for name, last in (("one", 'c <<{"fail": [401]}>>'), ("two", "c")):
        work.write_rows(["a", "b", last])
        work.write_job(None, provider={"name": name, "base_url": provider.base_url}, concurrency=1)
        work.run()
    (run,) = work.batchrun("report", ".", "--format", "json").json["runs"]
    assert run["provider"] == "one, two"
    groups = work.batchrun("report", ".", "--format", "json", "--by", "provider").json["groups"]
    assert {group["provider"]: group["ok"] for group in groups} == {"one": 2, "two": 1}


@pytest.mark.parametrize(
    "sql", ["DELETE FROM owner", "UPDATE run SET started_at = 1 << 60", "UPDATE attempt SET sent_at = 1 << 60"]
)
def test_a_ledger_with_what_none_holds_is_left_out_with_a_word(work: Workspace, provide: Provide, sql: str) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    shutil.copy(work.ledger, work.folder / "good.sqlite")
    change(work.ledger, sql)
    os.remove(work.output)
    found = work.batchrun("report", ".", "--format", "json")
    assert (found.code, len(found.json["runs"])) == (0, 1), found.stderr
    assert f"{work.ledger.name} holds what batchrun has not written" in found.stderr
    named = work.batchrun("report", str(work.ledger))
    assert named.code == 6
    assert "salvage" in named.stderr


def test_copies_of_a_ledger_count_once(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="meta")
    work.write_rows(["a"])
    work.write_job(provider.base_url)
    for _ in range(2):
        assert work.run().code == 0
    shutil.copy(work.ledger, work.folder / "copy.sqlite")
    found = work.batchrun("report", ".", "--format", "json")
    assert found.json["totals"]["usd_spent"] == provider.bill
    assert found.stderr.count("2 runs are in ") == 1


def test_a_ledger_is_read_where_nothing_may_be_written(work: Workspace, provide: Provide, tmp_path: Path) -> None:
    work.write_rows(["a"])
    work.write_job(provide(bill="meta").base_url)
    assert work.run().code == 0
    closed = tmp_path / "closed"
    closed.mkdir()
    command = " ".join(work.command("report", str(closed), "--format", "json"))
    script = f"mount --bind {work.folder} {closed} && mount -o remount,bind,ro {closed} && touch {closed}/x; {command}"
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, env=work.environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if "Read-only file system" not in ran.stderr:
        pytest.skip(f"no read-only folder can be made here: {ran.stderr[:200]}")
    assert ran.returncode == 0, ran.stderr
    assert '"ok": 1' in ran.stdout
    assert "left out" not in ran.stderr


def test_paths_that_are_no_text_and_budgets_finer_than_any_bill(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide(bill="meta").base_url, budget={"usd": 0.5000000000000001})
    assert work.run().code == 0
    folder = os.fsencode(work.folder) + b"/caf\xe9"
    os.mkdir(folder)
    shutil.copy(os.fsencode(work.ledger), folder + b"/l.sqlite")
    for form in ("json", "csv", "markdown", "table"):
        found = work.batchrun("report", os.fsdecode(folder), "--format", form)
        assert found.code == 0, found.stderr
    assert work.batchrun("report", os.fsdecode(folder), "--format", "parquet", "--output", "r.parquet").code == 0
    assert work.batchrun("report", os.fsdecode(folder), "--html", "r.html").code == 0


def test_what_only_an_output_tells_is_not_made_up(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a", 'b <<{"fail": [500]}>>'])
    work.write_job(provide(bill="meta").base_url)
    assert work.run().code == 0
    os.remove(work.ledger)
    (run,) = work.batchrun("report", ".", "--format", "json").json["runs"]
    assert (run["seconds"], run["usd_wasted"], run["ok"], run["ledger"]) == (None, None, 2, None)
    assert work.batchrun("report", ".").code == 0
    assert work.batchrun("report", ".", "--html", "r.html").code == 0


def test_arguments_of_load(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide(bill="meta").base_url)
    run_id = work.run("--json").json["run_id"]
    assert len(report.load(work.folder, runs=run_id).runs) == 1
    assert len(report.load(work.folder, since=datetime(2020, 1, 1, tzinfo=UTC)).runs) == 1
    with pytest.raises(JobError, match="no time zone"):
        report.load(work.folder, since=datetime(2020, 1, 1))  # noqa: DTZ001
