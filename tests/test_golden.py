"""A ledger of any earlier version is opened and gone on with: no answer in it is paid for again."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

from .conftest import FakeProvider, Workspace, spent
from .golden import PORT, ROWS, write

GOLDEN = Path(__file__).parent / "data" / "golden"


def test_every_golden_ledger_is_gone_on_with(tmp_path: Path, provide: Callable[..., FakeProvider]) -> None:
    # One after the other: the provider's address is a part of the keys.
    folders = sorted(GOLDEN.iterdir())
    assert [int(folder.name) for folder in folders] == list(range(1, len(folders) + 1))
    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name)
        work = Workspace(tmp_path / folder.name)
        db = sqlite3.connect(work.ledger)
        assert db.execute("PRAGMA user_version").fetchone() == (int(folder.name),)
        known, pico = db.execute("SELECT count(*), sum(usd_pico) FROM attempt WHERE outcome = 'ok'").fetchone()
        db.close()
        provider = provide(port=PORT, bill="mix")
        write(work, provider, ROWS)
        result = work.run("--json")
        provider.stop()
        assert result.code == 1, result.stderr  # the rows that had failed
        assert f"going on with run {result.json['run_id']}" in result.stderr
        assert (result.json["ok"], result.json["failed"]) == (27, 3)
        asked = [request["text"] for request in provider.requests]
        assert len(asked) == len(set(asked)) == 27 - (known - result.json["unplaced"])
        assert result.json["usd_spent"] == Decimal(pico).scaleb(-12) + provider.bill
        assert spent(work.rows()) + result.json["unplaced_usd"] == result.json["usd_spent"]
        assert result.json["unknown_outcomes"] == 2
        assert work.batchrun("verify", "job.yaml").code == 0
