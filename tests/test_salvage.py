"""`batchrun salvage`: a damaged ledger gives what is left of it, counts what is not, and nothing else is paid again."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from decimal import Decimal

import pytest

from .conftest import FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]
PAGE = 4096


def damaged(work: Workspace, provider: FakeProvider, rows: int = 400) -> None:
    """A finished run whose ledger has lost a page of its attempts."""
    work.write_rows([f"q{number}" for number in range(rows)])
    work.write_job(provider.base_url, concurrency=32)
    assert work.run().code == 0
    db = sqlite3.connect(work.ledger)
    pages = [
        page
        for (page,) in db.execute(
            "SELECT pageno FROM dbstat WHERE name = 'attempt' AND pagetype = 'leaf' ORDER BY pageno"
        )
    ]
    db.close()
    raw = bytearray(work.ledger.read_bytes())
    place = (pages[len(pages) // 2] - 1) * PAGE
    raw[place : place + PAGE] = bytes(PAGE)
    work.ledger.write_bytes(raw)


def has_dbstat() -> bool:
    try:
        sqlite3.connect(":memory:").execute("SELECT * FROM dbstat")
    except sqlite3.OperationalError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_dbstat(), reason="this SQLite cannot tell what a page holds")


def test_what_is_left_is_kept_and_what_is_lost_is_told(work: Workspace, provide: Provide) -> None:
    provider = provide()
    damaged(work, provider)
    refused = work.run()
    before = work.ledger.read_bytes()
    assert refused.code == 6
    assert "`batchrun salvage JOB` saves what can be read" in refused.stderr
    assert len(provider.requests) == 400
    salvaged = work.batchrun("salvage", "job.yaml")
    assert salvaged.code == 1, salvaged.stderr
    assert "attempts are lost: they count as unknown" in salvaged.stderr
    (kept,) = work.folder.glob("job.ledger.sqlite.damaged-*[!lm]")
    assert kept.read_bytes() == before
    result = work.run("--json")
    assert result.code == 0, result.stderr
    lost = result.json["unknown_outcomes"]
    assert 0 < lost < 60
    assert result.json["unknown_rows"] == 0  # nobody knows which
    assert result.json["unknown_usd_at_most"] is None
    assert len(provider.requests) == 400 + lost
    assert len(work.rows()) == 400
    assert work.batchrun("verify", "job.yaml").code == 0
    # The provider's log tells what they cost, and then nothing is missing.
    assert work.batchrun("reconcile", "job.yaml").code == 0
    assert work.manifest()["usd_spent"] == provider.bill
    assert spent(work.rows()) < provider.bill
    assert work.batchrun("verify", "job.yaml").code == 0


def test_a_cap_is_not_trusted_to_what_is_lost(work: Workspace, provide: Provide) -> None:
    provider = provide()
    damaged(work, provider)
    assert work.batchrun("salvage", "job.yaml").code == 1
    work.write_job(provider.base_url, concurrency=32, budget={"usd": 1})
    result = work.run()
    assert result.code == 2
    assert "or they were lost" in result.stderr
    assert len(provider.requests) == 400
    assert work.batchrun("reconcile", "job.yaml").code == 0
    assert work.run().code == 0
    assert provider.bill < Decimal(1)


def test_a_whole_ledger_is_left_alone(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a", '<<{"fail": [400]}>>', '<<{"fail": ["hangup"]}>>'])
    work.write_job(provide().base_url)
    assert work.run().code == 1
    before = work.ledger.read_bytes()
    result = work.batchrun("salvage", "job.yaml")
    assert result.code == 0
    assert "the ledger is whole" in result.stderr
    assert work.ledger.read_bytes() == before
    assert not list(work.folder.glob("*damaged*"))


def test_what_there_is_nothing_of_is_said(work: Workspace) -> None:
    work.write_rows(["a"])
    work.write_job()
    result = work.batchrun("salvage", "job.yaml")
    assert result.code == 2
    assert "there is nothing to salvage" in result.stderr
    work.ledger.write_bytes(b"SQLite format 3\0" + b"\xff" * 9000)
    for command in ("salvage", "run", "export", "verify"):
        result = work.batchrun(command, "job.yaml")
        assert result.code == 6, (command, result.stderr)
        assert "Traceback" not in result.stderr


def test_a_ledger_without_tables_is_not_begun_anew(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    work.ledger.write_bytes(b"")
    result = work.run()
    assert result.code == 6
    assert "is empty, and a ledger never is" in result.stderr
    assert len(provider.requests) == 1


def test_a_ledger_that_is_missing_beside_its_log_is_not_begun_anew(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3)
    work.write_rows([f"q{number}" for number in range(50)])
    work.write_job(provider.base_url, concurrency=2)
    with work.start("job.yaml") as process:
        provider.wait_for(4)
        process.kill()
    moved = work.ledger.rename(work.folder / "elsewhere")
    result = work.run()
    assert result.code == 6
    assert "is missing, and its write-ahead log" in result.stderr
    moved.rename(work.ledger)
    work.ledger.with_name("job.ledger.sqlite-wal").unlink()
    result = work.run("--sample", "1")
    assert "the last process died at work, and its write-ahead log job.ledger.sqlite-wal is gone" in result.stderr
    assert "write-ahead log" not in work.run("--sample", "1").stderr


def zero_leaf(work: Workspace, table: str) -> None:
    db = sqlite3.connect(f"file:{work.ledger}?mode=ro", uri=True)  # so that its log stays
    ((page,),) = db.execute("SELECT min(pageno) FROM dbstat WHERE name = ? AND pagetype = 'leaf'", (table,))
    db.close()
    raw = bytearray(work.ledger.read_bytes())
    raw[(page - 1) * PAGE : page * PAGE] = bytes(PAGE)
    work.ledger.write_bytes(raw)


def alter(work: Workspace, sql: str) -> None:
    db = sqlite3.connect(work.ledger)
    db.execute("PRAGMA ignore_check_constraints = ON")
    db.execute(sql)
    db.commit()
    db.close()


def repriced(work: Workspace, provide: Provide) -> FakeProvider:
    """A run whose costs were derived, and derived again from other prices."""
    provider = provide(bill="none", models=None)
    work.write_rows([f"q{number}" for number in range(300)])
    work.write_job(provider.base_url, concurrency=32, prices={"input_mtok": 1, "output_mtok": 1})
    assert work.run().code == 0
    work.write_job(provider.base_url, concurrency=32, prices={"input_mtok": 500, "output_mtok": 500})
    assert work.batchrun("export", "job.yaml", "--reprice").code == 0
    return provider


@pytest.mark.parametrize("how", ["a lost page", "a lost amendment", "an altered correction"])
def test_corrections_that_are_lost_or_altered_are_told_and_learnt_again(
    work: Workspace, provide: Provide, how: str
) -> None:
    repriced(work, provide)
    right = work.manifest()["usd_spent"]
    if how == "an altered correction":
        alter(work, "UPDATE correction SET usd_pico = usd_pico + 1000000000000 WHERE attempt_id = 5")
    else:
        zero_leaf(work, "correction" if how == "a lost page" else "amendment")
    result = work.batchrun("salvage", "job.yaml")
    assert result.code == 1, result.stderr
    assert "corrections of costs are lost" in result.stderr
    assert work.batchrun("export", "job.yaml").code == 0
    assert work.manifest()["usd_spent"] < right
    assert work.batchrun("export", "job.yaml", "--reprice").code == 0
    assert work.manifest()["usd_spent"] == right
    assert work.batchrun("verify", "job.yaml").code == 0


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE run SET state = 'opem'",
        "UPDATE run SET attempts = 1000000000000",
        "UPDATE run SET input = 'no json'",
        "UPDATE run SET input = '[1]'",
        "UPDATE invocation SET job = 'no json'",
        "UPDATE owner SET job_name = CAST(X'ff' AS TEXT)",
        "DELETE FROM owner",
        "UPDATE attempt SET attempt_id = 1099511627776 WHERE attempt_id = 300",
        "UPDATE attempt SET usd_pico = usd_pico + 1 WHERE attempt_id = 7",
        "DELETE FROM attempt WHERE attempt_id BETWEEN 20 AND 30",
    ],
)
def test_what_was_altered_is_found_and_mended(work: Workspace, provide: Provide, sql: str) -> None:
    provider = provide()
    work.write_rows([f"q{number}" for number in range(300)])
    work.write_job(provider.base_url, concurrency=32)
    assert work.run().code == 0
    alter(work, sql)
    result = work.batchrun("salvage", "job.yaml", "--adopt-ledger", timeout=60)
    assert "Traceback" not in result.stderr
    assert result.code in (0, 1), result.stderr
    assert "the damaged ledger is kept as" in result.stderr
    verified = work.batchrun("verify", "job.yaml")
    assert verified.code == 0, verified.stdout
    again = work.run("--json")
    assert again.code == 0, again.stderr
    assert "write-ahead log" not in again.stderr
    verified = work.batchrun("verify", "job.yaml")
    assert verified.code == 0, verified.stdout


def test_a_price_list_that_cannot_be_read_is_asked_for_again(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url)
    assert work.run().code == 0
    alter(work, "UPDATE price_list SET body = X'00112233445566'")
    assert work.run().code == 0


@pytest.mark.parametrize("step", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3))])
def test_a_salvage_that_is_killed_is_begun_again(work: Workspace, provide: Provide, step: int) -> None:
    """Killed between the moving of its files: what was in the log is still found."""
    provider = provide(latency=0.02)
    work.write_rows([f"q{number}" for number in range(400)])
    work.write_job(provider.base_url, concurrency=8)
    assert work.run("--sample", "100").code == 0
    with work.start("job.yaml") as process:
        provider.wait_for(220)
        process.kill()
    zero_leaf(work, "answer")
    program = work.folder / "killed.py"
    program.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from batchrun import cli\n"
        "replace, count = Path.replace, 0\n"
        "def killing(self, target):\n"
        "    global count\n"
        "    count += 1\n"
        f"    if count == {step}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return replace(self, target)\n"
        "Path.replace = killing\n"
        "sys.argv = ['batchrun', 'salvage', 'job.yaml']\n"
        "cli.main()\n"
    )
    usual = work.command
    work.command = lambda *args: [sys.executable, str(program)]  # type: ignore[method-assign]
    assert work.batchrun().code == -9
    work.command = usual  # type: ignore[method-assign]
    result = work.batchrun("salvage", "job.yaml")
    assert result.code in (0, 1), result.stderr
    saved = int(result.stderr.split("saved ")[1].split()[0])
    assert saved >= 210
    asked = len(provider.requests)
    assert work.run().code == 0
    assert len(provider.requests) - asked < 400 - 150
    assert work.batchrun("verify", "job.yaml").code == 0


def test_a_ledger_whose_own_words_are_no_text_is_damaged_and_no_bug(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url)
    assert work.run().code == 0
    whole = work.ledger.read_bytes()
    # The name that SQLite repeats when it cannot read what belongs to it.
    place = whole.index(b"tablerunrun") + 5
    damaged = (whole[:place] + b"\x9e\x9e\x9e" + whole[place + 3 :]).replace(
        b"CREATE TABLE run (", b"CREATE TABLE run )"
    )
    work.ledger.write_bytes(damaged)
    for command in (("job.yaml",), ("verify", "job.yaml"), ("export", "job.yaml")):
        result = work.batchrun(*command)
        assert result.code == 6, result.stderr
        assert "Traceback" not in result.stderr
        assert "batchrun salvage JOB" in result.stderr + result.stdout
