"""`batchrun salvage`: a damaged ledger gives what is left of it, counts what is not, and nothing else is paid again."""

from __future__ import annotations

import sqlite3
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
