"""Old answers are dropped, and no figure with them."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing

from .conftest import FakeProvider, Workspace

Provide = Callable[..., FakeProvider]
LABELS = ["positive", "negative"]
BIG = random.Random(1).randbytes(10_000).hex()


def age(work: Workspace, run_id: str, days: int) -> None:
    """Make a run so many days older."""
    with closing(sqlite3.connect(work.ledger)) as db, db:
        db.execute("UPDATE run SET ended_at = ended_at - ? WHERE run_id = ?", (days * 86_400_000_000, run_id))


def test_answers_go_and_every_figure_stays(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="mix")
    work.write_rows([f'{number} <<{{"say": "{number}{BIG}"}}>>' for number in range(40)])
    work.write_job(provider.base_url)
    old = work.run("--json").json
    new = work.run("--json").json
    age(work, old["run_id"], 40)
    before = work.batchrun("report", ".", "--format", "json").json
    size = work.ledger.stat().st_size
    found = work.batchrun("prune", "job.yaml", "--older-than", "30d", "--json")
    assert found.code == 0, found.stderr
    assert (found.json["runs"], found.json["answers"], found.json["kept"]) == ([old["run_id"]], 40, 0)
    assert found.json["bytes_before"] >= size
    assert found.json["bytes_after"] == work.ledger.stat().st_size < size
    assert "MB freed" in found.stderr
    assert work.batchrun("report", ".", "--format", "json").json == before
    assert work.batchrun("verify", "job.yaml").code == 0
    # The newest run is as it was, and twice is as once.
    assert work.batchrun("export", "job.yaml").code == 0
    again = work.batchrun("prune", "job.yaml", "--older-than", "30d", "--json")
    assert (again.json["runs"], again.json["answers"]) == ([], 0)
    assert new["run_id"] in work.batchrun("show", "job.yaml").stdout
    shown = work.batchrun("show", "job.yaml", "--run", old["run_id"], "--row", "1", "--json").json
    assert shown["slots"][0]["attempts"][0]["answer"] is None
    refused = work.batchrun("compare", f"job.yaml@{old['run_id']}", "job.yaml")
    assert (refused.code, "were pruned on" in refused.stderr) == (2, True), refused.stderr


def test_what_was_pruned_is_neither_exported_nor_gone_on_with_nor_taken(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(['0 <<{"say": "positive"}>>', '1 <<{"say": "negative"}>>', '2 <<{"fail": [400]}>>'])
    work.write_job(provider.base_url, labels=LABELS, reuse=True)
    run_id = work.run("--json").json["run_id"]
    age(work, run_id, 40)
    assert work.batchrun("prune", "job.yaml", "--older-than", "30d").code == 0
    for command in (("export", "job.yaml"), ("job.yaml", "--retry-failed"), ("export", "job.yaml", "--to", "x.csv")):
        refused = work.batchrun(*command)
        assert (refused.code, f"run {run_id} were pruned on" in refused.stderr) == (2, True), refused.stderr
    verified = work.batchrun("verify", "job.yaml")
    assert (verified.code, "were pruned" in verified.stdout) == (0, True), verified.stdout
    asked = len(provider.requests)
    result = work.run("--json")
    assert "2 rows were answered by runs that have been pruned" in result.stderr
    assert (result.json["ok"], len(provider.requests)) == (3, asked + 3)
    assert work.batchrun("verify", "job.yaml").code == 0


def test_answers_that_newer_runs_have_taken_stay(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b", "c"])
    work.write_job(provider.base_url, reuse=True)
    first = work.run("--json").json
    work.write_rows(["a", "b"])
    assert work.run("--json").json["sent"] == 0
    age(work, first["run_id"], 40)
    found = work.batchrun("prune", "job.yaml", "--older-than", "4w", "--json").json
    assert (found["answers"], found["kept"]) == (1, 2)
    assert work.batchrun("export", "job.yaml").code == 0
    # They are still offered.
    result = work.run("--json")
    assert (result.code, result.json["sent"], result.json["reused"]) == (0, 0, 2)
    work.write_rows(["a", "b", "c"])
    assert work.run("--json").json["sent"] == 1
    assert work.batchrun("verify", "job.yaml").code == 0


def test_a_pruned_ledger_that_is_damaged_is_salvaged(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b", "c"])
    work.write_job(provider.base_url)
    first = work.run("--json").json
    age(work, first["run_id"], 40)
    second = work.run("--json").json
    assert work.batchrun("prune", "job.yaml", "--older-than", "30d").code == 0
    with closing(sqlite3.connect(work.ledger)) as db, db:
        db.execute("UPDATE attempt SET latency_us = 1 WHERE attempt_id = 5")
    assert work.batchrun("verify", "job.yaml").code == 1
    saved = work.batchrun("salvage", "job.yaml")
    assert (saved.code, "1 attempts are lost" in saved.stderr + saved.stdout) == (1, True), saved.stderr
    shown = work.batchrun("show", "job.yaml", "--run", first["run_id"], "--json").json
    assert shown["run"]["usd_spent"] == first["usd_spent"]
    assert second["run_id"] in work.batchrun("show", "job.yaml").stdout


def test_an_age_that_is_none_is_refused(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url)
    refused = work.batchrun("prune", "job.yaml", "--older-than", "30d")
    assert (refused.code, "there is nothing to prune" in refused.stderr) == (2, True)
    work.run()
    refused = work.batchrun("prune", "job.yaml", "--older-than", "old")
    assert (refused.code, "--older-than old: should be" in refused.stderr) == (2, True)
    assert work.batchrun("prune", "job.yaml", "--older-than", "1d").code == 0
