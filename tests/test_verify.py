"""Offline proof: what was altered, removed or put in is found, and an honest ledger passes."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import FakeProvider, Result, Workspace, fake_providers

Provide = Callable[..., FakeProvider]


def verify(work: Workspace) -> Result:
    return work.batchrun("verify", "job.yaml")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A finished run over rows of every fate, after an earlier run."""
    folder = tmp_path_factory.mktemp("original")
    work = Workspace(folder / "work")
    work.folder.mkdir()
    with fake_providers(folder) as provide:
        _run(work, provide(bill="mix", p429=0.05, p500=0.05, p_hangup=0.05))
    return work


@pytest.fixture
def done(original: Workspace, tmp_path: Path) -> Workspace:
    """A copy of it, to be altered."""
    shutil.copytree(original.folder, tmp_path / "work")
    return Workspace(tmp_path / "work")


def _run(work: Workspace, provider: FakeProvider) -> None:
    bad = ['<<{"fail": [400]}>>', '<<{"fail": ["hangup"]}>>']
    work.write_rows(["first"])
    work.write_job(provider.base_url, budget={"usd": 1})
    assert work.run().code == 0
    work.write_rows([*bad, *(f"row {index}" for index in range(40))])
    assert work.run().code == 1
    result = verify(work)
    assert result.code == 0, result.stdout
    assert "42 rows agree, and no promise was broken" in result.stdout


def alter(work: Workspace, *statements: str) -> None:
    db = sqlite3.connect(work.ledger)
    for statement in statements:
        assert db.execute(statement).rowcount != 0, statement
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE attempt SET usd_pico = usd_pico + 1 WHERE attempt_id = 5 AND usd_pico >= 0", "attempt 5"),
        ("UPDATE attempt SET prompt_tokens = 1 WHERE attempt_id = 5", "was altered after it was settled"),
        ("UPDATE attempt SET outcome = 'failed' WHERE attempt_id = 1", "was altered"),
        ("UPDATE attempt SET reserved_pico = 1 WHERE attempt_id = 5", "was altered"),
        ("UPDATE attempt SET client_request_id = 'x' WHERE attempt_id = 5", "was altered"),
        ("UPDATE attempt SET cost_source = NULL WHERE attempt_id = 5", "the cost source None"),
        ("UPDATE attempt SET row_index = 3 WHERE attempt_id = 9", "was altered"),
        ("DELETE FROM attempt WHERE attempt_id = 7", "some are missing, or were put in"),
        ("DELETE FROM answer WHERE attempt_id IN (SELECT attempt_id FROM answer LIMIT 1)", "was altered"),
        ("UPDATE answer SET body = substr(body, 1, 10)", "cannot be unpacked"),
        ("UPDATE run SET seals = seals + 1", "are not those that it made"),
        ("INSERT INTO correction VALUES (5, 1, 1, 'reported')", "belongs to no amendment"),
        ("INSERT INTO correction VALUES (5000, 1, 1, 'reported')", "belongs to no attempt"),
        ("INSERT INTO correction VALUES (1, 1, 1, 'reported')", "an amendment 1 that never was"),
        ("INSERT INTO correction VALUES (1, 1, -1, 'reported')", "makes no sense"),
        (
            "UPDATE run SET state = 'finished', input = json_set(input, '$.rows', 50)",
            "of its rows are neither answered",
        ),
        ("UPDATE invocation SET job = json_set(job, '$.budget.usd', '5')", "the job of invocation 1 was altered"),
        ("UPDATE owner SET runs = runs + 1", "began 3 runs and holds 2"),
    ],
)
def test_an_edited_ledger_is_found(done: Workspace, statement: str, said: str) -> None:
    alter(done, statement)
    result = verify(done)
    assert result.code == 1, result.stdout
    assert said in result.stdout


def test_an_answer_that_was_swapped_is_found(done: Workspace) -> None:
    db = sqlite3.connect(done.ledger)
    (first, one), (second, two) = db.execute(
        "SELECT attempt_id, body FROM answer JOIN attempt USING (attempt_id) WHERE outcome = 'ok' LIMIT 2"
    ).fetchall()
    db.execute("UPDATE answer SET body = ? WHERE attempt_id = ?", (two, first))
    db.execute("UPDATE answer SET body = ? WHERE attempt_id = ?", (one, second))
    db.commit()
    db.close()
    result = verify(done)
    assert result.code == 1
    assert result.stdout.count("was altered") == 2


def test_an_answer_paid_twice_is_a_broken_promise(done: Workspace) -> None:
    columns = "run, invocation, row_index, model, sample, key, number, client_request_id, sent_at, settled_at, outcome"
    alter(
        done,
        f"INSERT INTO attempt ({columns}) SELECT {columns} FROM attempt WHERE outcome = 'ok' LIMIT 1",
    )
    result = verify(done)
    assert result.code == 1
    assert "was answered 2 times (promise 2)" in result.stdout


def test_a_cap_that_was_exceeded_is_found(done: Workspace) -> None:
    alter(done, """UPDATE invocation SET job = json_set(job, '$.budget.usd', '0.00001'), seal = NULL""")
    result = verify(done)
    assert result.code == 1
    assert "the cap of $0.00001 was exceeded when row 1 was sent" in result.stdout


def rewritten(work: Workspace, change: Callable[[pa.Table], pa.Table]) -> None:
    table, manifest = pq.read_table(work.output), pq.read_metadata(work.output).metadata[b"batchrun"]
    write(work, change(table), manifest)


def write(work: Workspace, table: pa.Table, manifest: bytes) -> None:
    with pq.ParquetWriter(work.output, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"batchrun": manifest.decode()})


def with_value(name: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        return table.set_column(table.schema.get_field_index(name), name, pa.array(values, table[name].type))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_value("usd_spent", 5, 0.5), "row 6: usd_spent is 0.5, and should be "),
        (with_value("usd_spent", 5, None), "row 6: usd_spent is None"),
        (with_value("response", 8, "forged"), "row 9: response is 'forged'"),
        (with_value("status", 0, "ok"), "row 1: status is 'ok', and should be 'failed'"),
        (with_value("prompt", 3, "forged"), "row 4: prompt is 'forged'"),
        (lambda table: table.slice(1), "ends after 41 rows"),
        (lambda table: table.slice(0, 30), "ends after 30 rows"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "has more rows than the input (42)"),
        (lambda table: table.drop_columns(["status"]), "has other columns"),
    ],
)
def test_a_tampered_output_is_found(done: Workspace, change: Callable[[pa.Table], pa.Table], said: str) -> None:
    rewritten(done, change)
    result = verify(done)
    assert result.code == 1, result.stdout
    assert said in result.stdout
    # And mended for nothing.
    assert done.batchrun("export", "job.yaml").code == 0
    assert verify(done).code == 0


def test_a_forged_manifest_is_found(done: Workspace) -> None:
    table, manifest = pq.read_table(done.output), pq.read_metadata(done.output).metadata[b"batchrun"]
    write(done, table, manifest.replace(b'"failed": ', b'"failed": 1'))
    result = verify(done)
    assert result.code == 1
    assert "its manifest says failed" in result.stdout


def test_damage_is_found(done: Workspace) -> None:
    data = bytearray(done.output.read_bytes())
    data[len(data) // 3] ^= 0xFF
    done.output.write_bytes(data)
    assert verify(done).code == 1
    done.output.write_bytes(b"PAR1")
    result = verify(done)
    assert result.code == 1
    assert "is no output of batchrun" in result.stdout


def test_what_cannot_be_compared_is_noted_and_not_wrong(done: Workspace) -> None:
    done.output.unlink()
    result = verify(done)
    assert (result.code, "there is no output" in result.stdout) == (0, True)
    assert done.batchrun("export", "job.yaml").code == 0
    done.write_rows(["something else"])
    result = verify(done)
    assert result.code == 0, result.stdout
    assert "the input has changed since" in result.stdout


def test_an_unfinished_run_verifies(work: Workspace, provide: Provide) -> None:
    provider = provide(refuse_after=10)
    work.write_rows([f"row {index}" for index in range(30)])
    work.write_job(provider.base_url)
    assert work.run().code == 4
    assert verify(work).code == 0
    assert verify(work).stdout.count("note:") == 0


def test_verify_changes_nothing_and_needs_a_ledger(done: Workspace) -> None:
    before = done.ledger.read_bytes(), done.output.read_bytes()
    assert verify(done).code == 0
    assert (done.ledger.read_bytes(), done.output.read_bytes()) == before
    done.ledger.unlink()
    result = verify(done)
    assert result.code == 2
    assert "there is nothing to verify" in result.stderr


def test_a_ledger_of_the_first_version_is_brought_up_to_date(done: Workspace) -> None:
    manifest = done.manifest()
    alter_all = [
        "DROP VIEW charged",
        *(f"DROP TABLE {name}" for name in ("reused", "repair_wanted", "correction", "amendment", "price_list")),
        *(f"ALTER TABLE attempt DROP COLUMN {name}"
          for name in ("request_bytes", "reserved_pico", "seal", "held_pico", "settled_after", "repair",
                       "repair_key")),
        *(f"ALTER TABLE owner DROP COLUMN {name}" for name in ("runs", "amendments")),
        "ALTER TABLE invocation DROP COLUMN seal",
        *(f"ALTER TABLE run DROP COLUMN {name}" for name in ("attempts", "settled", "seals", "is_written", "labels",
                                                          "pruned_at")),
        "ALTER TABLE answer DROP COLUMN digest",
        "PRAGMA user_version = 1",
    ]  # fmt: skip
    db = sqlite3.connect(done.ledger)
    for statement in alter_all:
        db.execute(statement)
    db.commit()
    db.close()
    result = verify(done)
    assert result.code == 6
    assert "`batchrun export` brings it up to date" in result.stderr
    assert done.batchrun("export", "job.yaml").code == 0
    assert verify(done).code == 0
    assert {name: value for name, value in done.manifest().items() if name != "unknown_usd_at_most"} == {
        name: value for name, value in manifest.items() if name != "unknown_usd_at_most"
    }
    # Without seals, an answer still speaks for its own counts.
    alter(done, "UPDATE attempt SET prompt_tokens = 1 WHERE attempt_id = 5")
    assert "other counts than its answer" in verify(done).stdout
