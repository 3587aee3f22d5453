"""What runs cost: every figure is the ledger's, and the provider's bill."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun import accounts, report
from batchrun.ledger_view import LedgerView
from batchrun.money import usd_text

from .conftest import FakeProvider, Workspace, fake_providers

Provide = Callable[..., FakeProvider]
LABELS = ["positive", "negative", "neutral"]
RUNS = 12


def made(folder: Path, count: int) -> tuple[Workspace, Decimal]:
    """Runs of three jobs with failures, repairs, reuse, resumes and unknown outcomes; and what was billed."""
    chance = random.Random(8)
    bill = Decimal(0)
    with fake_providers(folder) as start:
        for index in range(count):
            provider = start(
                bill=chance.choice(["meta", "credits", "mix"]), p400=0.08, p500=0.04, p_hangup=0.03, seed=index,
                latency=0.02 if index % 7 == 3 else 0,
            )  # fmt: skip
            work = Workspace(folder / "jobs" / f"job{index % 3}")
            work.folder.mkdir(parents=True, exist_ok=True)
            answers = [chance.choice([["hmm", "positive"], "negative", "?", "neutral"]) for _ in range(12)]
            prompts = [f"{number} <<{json.dumps({'say': says})}>>" for number, says in enumerate(answers)]
            work.write_rows([*prompts, *(f"{number + 20} <<{{}}>>" for number in range(index % 4))])
            work.write_job(
                provider.base_url, labels=LABELS, repair=1, reuse=index % 5 == 4, samples=1 + index % 2,
                retry={"max_attempts": 4, "max_seconds": 30}, concurrency=4, budget={"usd": 9, "per": "month"},
                output="../../outputs/{run_id}.parquet", name=f"job {index % 3}",
            )  # fmt: skip
            if index % 7 == 3:
                with work.start("job.yaml") as process:
                    provider.wait_for(3)
                    process.send_signal(signal.SIGKILL)
                    process.communicate(timeout=60)
            assert work.run().code in (0, 1)
            bill += provider.bill
            provider.stop()
    return Workspace(folder), bill


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Decimal]:
    return made(tmp_path_factory.mktemp("history"), RUNS)


def test_every_figure_is_that_of_the_ledger(history: tuple[Workspace, Decimal]) -> None:
    check_figures(*history, RUNS)


@pytest.mark.slow
def test_every_figure_of_thirty_runs_is_that_of_the_ledger(tmp_path: Path) -> None:
    check_figures(*made(tmp_path, 30), 30)


def check_figures(work: Workspace, bill: Decimal, count: int) -> None:
    found = work.batchrun("report", "--format", "json")
    assert found.code == 0, found.stderr
    runs = {run["run_id"]: run for run in found.json["runs"]}
    assert len(runs) == count
    usd = unknown = Decimal(0)
    for path in sorted((work.folder / "outputs").glob("*.sqlite")):
        with closing(LedgerView.read(path)) as ledger:
            for run_id in ledger.run_ids():
                run = ledger.run_named(run_id)
                assert run is not None
                totals = accounts.totals(ledger, run)
                shown = runs.pop(run_id)
                assert (shown["ok"], shown["failed"], shown["pending"]) == (totals.ok, totals.failed, 0)
                assert (shown["reused"], shown["attempts"]) == (totals.reused, totals.attempts)
                assert (shown["usd_spent"], shown["unknown_attempts"]) == (totals.usd, totals.unknown_cost)
                assert shown["usd_reported"] + shown["usd_estimated"] == totals.usd
                for name in ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"):
                    assert shown[name] == getattr(totals, name)
                assert shown["usd_wasted"] >= totals.repair_usd
                usd += totals.usd
                unknown += shown["unknown_attempts"]
    assert runs == {}
    totals_shown = found.json["totals"]
    assert (totals_shown["runs"], totals_shown["usd_spent"]) == (count, usd)
    assert totals_shown["usd_spent"] <= bill
    assert unknown > 0
    assert bill - usd <= totals_shown["usd_unknown_at_most"]


@pytest.mark.parametrize("by", ["job", "model", "provider", "day", "month", "label"])
def test_groups_add_up_to_the_whole(history: tuple[Workspace, Decimal], by: str) -> None:
    found = history[0].batchrun("report", "--format", "json", "--by", by).json
    groups, totals = found["groups"], found["totals"]
    assert sum(group["usd_spent"] for group in groups) == totals["usd_spent"]
    assert sum(group["attempts"] for group in groups) == totals["attempts"]
    if by == "job":
        assert {group["job"] for group in groups} == {"job 0", "job 1", "job 2"}
    if by == "label":
        assert {group["label"] for group in groups} >= {*LABELS, None}


def test_every_format_tells_the_same(history: tuple[Workspace, Decimal], tmp_path: Path) -> None:
    work, _ = history
    runs = work.batchrun("report", "--format", "json").json["runs"]
    spent = [run["usd_spent"] for run in runs]
    rows = list(csv.DictReader(io.StringIO(work.batchrun("report", "--format", "csv").stdout)))
    assert [Decimal(row["usd_spent"]) for row in rows] == spent
    assert [row["run_id"] for row in rows] == [run["run_id"] for run in runs]
    assert work.batchrun("report", "--format", "parquet").code == 2
    path = tmp_path / "runs.parquet"
    assert work.batchrun("report", "--format", "parquet", "--output", str(path)).code == 0
    assert pq.read_table(path)["usd_spent"].to_pylist() == spent
    for form in ("table", "markdown"):
        text = work.batchrun("report", "--format", form).stdout
        for run in runs:
            (line,) = (line for line in text.splitlines() if run["run_id"] in line)
            assert f" {format(run['usd_spent'].normalize(), 'f')} " in line


def test_some_runs_and_the_costliest_rows(history: tuple[Workspace, Decimal]) -> None:
    work, _ = history
    runs = work.batchrun("report", "--format", "json").json["runs"]
    one = work.batchrun("report", "--format", "json", "--run", runs[7]["run_id"], "--top", "3").json
    # Beside the run before it, though that is not shown.
    assert one["runs"] == [runs[7]]
    assert one["runs"][0]["change"] is not None
    costs = [row["usd_spent"] for row in one["top"]]
    assert len(costs) == 3
    assert costs == sorted(costs, reverse=True)
    assert work.batchrun("report", "--format", "json", "--since", "1d").json["totals"]["runs"] == RUNS
    assert work.batchrun("report", "--format", "json", "--since", "2100-01-01").json["runs"] == []
    for options, told in (
        (("--run", "nothing"), "there is no such run"), (("--since", "soon"), "should be 24h, 7d"),
        (("--by", "nothing"), "no output has such a column"), (("nowhere",), "there is no such file or folder"),
        (("job.yaml",), "is neither a ledger nor a Parquet nor a folder"),
    ):  # fmt: skip
        (work.folder / "job.yaml").write_text("x: y", encoding="utf-8")
        refused = work.batchrun("report", *options)
        assert (refused.code, told in refused.stderr) == (2, True), refused.stderr


def test_an_output_counts_only_where_no_ledger_has_its_run(history: tuple[Workspace, Decimal], tmp_path: Path) -> None:
    work, _ = history
    runs = work.batchrun("report", "--format", "json").json["runs"]
    outputs = sorted((work.folder / "outputs").glob("*.parquet"))
    alone = Workspace(tmp_path)
    found = alone.batchrun("report", str(outputs[0]), "--format", "json").json["runs"]
    (known,) = (run for run in runs if run["run_id"] == outputs[0].stem)
    names = ("usd_spent", "ok", "failed", "attempts", "total_tokens", "usd_reported", "usd_estimated", "reused")
    assert [found[0][name] for name in names] == [known[name] for name in names]
    assert (found[0]["ledger"], known["output"]) == (None, f"outputs/{outputs[0].name}")
    both = alone.batchrun("report", str(work.folder / "outputs"), str(outputs[0]), "--format", "json").json
    assert both["totals"]["runs"] == RUNS


def test_notebooks_get_frames(history: tuple[Workspace, Decimal]) -> None:
    found = report.load(history[0].folder / "outputs")
    assert list(found.runs.columns) == list(report.RUN_COLUMNS)
    assert list(found.spend.columns) == list(report.SPEND_COLUMNS)
    assert found.runs["usd_spent"].sum() == found.spend["usd_spent"].sum() == found.totals["usd_spent"]
    assert str(found.runs["started_at"].dtype) == "datetime64[us, UTC]"
    by_day = found.spend.groupby("day")["usd_spent"].sum()
    assert by_day.sum() == found.totals["usd_spent"]


def test_a_report_is_made_while_a_run_goes_on(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.2)
    work.write_rows([f"row {number}" for number in range(60)])
    work.write_job(provider.base_url, concurrency=2)
    with work.start("job.yaml") as process:
        provider.wait_for(4)
        found = work.batchrun("report", ".", "--format", "json").json
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    (run,) = found["runs"]
    assert (run["state"], run["rows"]) == ("open", 60)
    assert run["pending"] == 60 - run["ok"]
    assert run["ok"] >= 3
    assert run["in_flight"] <= 2
    assert run["usd_spent"] == run["usd_per_ok_row"] * run["ok"]


def test_a_run_is_shown_beside_the_one_before(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b"])
    work.write_job(provider.base_url)
    first = work.run("--json")
    assert first.json["previous"] is None
    work.write_rows(["a", "b", 'c <<{"fail": [400]}>>'])
    second = work.run("--json")
    before: dict[str, Any] = second.json["previous"]
    assert (before["run_id"], before["usd_spent"]) == (first.json["run_id"], first.json["usd_spent"])
    assert f"beside run {first.json['run_id']}: $" in second.stderr
    assert "failed 1 after 0" in second.stderr
    third: dict[str, Any] = work.run("--json").json["previous"]
    # What a run said of its own speed is what the next one says of it.
    assert third["rows_per_second"] == before["now"]["rows_per_second"] > 0
    assert third["usd_per_1000_rows"] == before["now"]["usd_per_1000_rows"] > 0


def test_a_row_and_a_run_are_shown_with_all_that_is_known(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(['zero <<{"say": "positive", "fail": [500]}>>', 'one <<{"say": ["hmm", "negative"]}>>'])
    work.write_job(provider.base_url, labels=LABELS, repair=1)
    run_id = work.run("--json").json["run_id"]
    row = work.batchrun("show", "job.yaml", "--row", "1").stdout
    for told in ("user: zero", "attempt 1: sent", "HTTP 500", "attempt 2", "HTTP 200", "positive", "$0.0"):
        assert told in row, row
    found = work.batchrun("show", "job.yaml", "--row", "2", "--json").json
    (slot,) = found["slots"]
    assert [attempt["repair"] for attempt in slot["attempts"]] == [0, 1]
    assert [attempt["answer"] for attempt in slot["attempts"]] == ["hmm", "negative"]
    assert slot["prompt"][-1]["content"].startswith("one")
    run = work.batchrun("show", "job.yaml", "--run", run_id[:20], "--json").json
    assert (run["run"]["usd_spent"], run["failures"]) == (
        provider.bill,
        [{"run_id": run_id, "kind": "server", "attempts": 1}],
    )
    assert run["run"]["run_id"] in work.batchrun("show", "job.yaml").stdout
    # Without its input, all but the prompt.
    (work.folder / "in.csv").write_text("prompt\nother\n", encoding="utf-8")
    assert (
        "the prompt cannot be told: the input has changed since"
        in work.batchrun("show", "job.yaml", "--row", "1").stdout
    )
    for options, told in ((("--row", "9"), "has the rows 1 to 2"), (("--run", "x"), "there is no such run")):
        refused = work.batchrun("show", "job.yaml", *options)
        assert (refused.code, told in refused.stderr) == (2, True), refused.stderr


def test_a_page_has_every_figure_and_no_script(history: tuple[Workspace, Decimal]) -> None:
    pytest.importorskip("altair", reason="needs the extra `report`")
    work, _ = history
    made = work.batchrun("report", "--html", "report.html", "--top", "5")
    assert made.code == 0, made.stderr
    page = (work.folder / "report.html").read_text(encoding="utf-8")
    found = work.batchrun("report", "--format", "json", "--top", "5").json
    for run in found["runs"]:
        assert run["run_id"] in page
        assert f"${usd_text(run['usd_spent'])}" in page
    assert f"${usd_text(found['totals']['usd_spent'])}" in page
    for row in found["top"]:
        assert f"${usd_text(row['usd_spent'])}" in page
    assert "<script" not in page
    assert len(page.encode()) < 1_500_000


def test_a_page_shows_prompts_and_answers_unless_told_not_to(work: Workspace, provide: Provide) -> None:
    pytest.importorskip("altair", reason="needs the extra `report`")
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    work.write_rows([f"a prompt of ours <<{json.dumps({'say': hostile})}>>"])
    work.write_job(
        provide().base_url, model="</title><script>alert(3)</script>", prices={"input_mtok": 1, "output_mtok": 1}
    )
    assert work.run().code == 0
    assert work.batchrun("report", ".", "--html", "with.html").code == 0
    assert work.batchrun("report", ".", "--html", "without.html", "--no-content").code == 0
    shown, plain = ((work.folder / name).read_text(encoding="utf-8") for name in ("with.html", "without.html"))
    assert ("a prompt of ours" in shown, "a prompt of ours" in plain) == (True, False)
    assert ("onerror=alert(2)" in shown, "onerror" in plain) == (True, False)
    for page in (shown, plain):
        assert "<script" not in page
        assert "<img" not in page


def test_a_page_that_cannot_be_written_is_told(work: Workspace, provide: Provide) -> None:
    pytest.importorskip("altair", reason="needs the extra `report`")
    work.write_rows(["a"])
    work.write_job(provide().base_url)
    work.run()
    result = work.batchrun("report", ".", "--html", "/proc/report.html")
    assert (result.code, "/proc/report.html cannot be written" in result.stderr) == (6, True), result.stderr


def test_what_is_in_no_output_is_a_group_of_its_own(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(['0 <<{"say": "positive"}>>', '1 <<{"say": "negative"}>>'])
    work.write_job(provider.base_url, labels=LABELS)
    for _ in range(2):  # the second one takes the place of the first one's output
        assert work.run().code == 0
    # A part of the output, which has its manifest, is not taken for it.
    assert work.batchrun("export", "job.yaml", "--to", "zz.parquet", "--columns", "label,usd_spent").code == 0
    found = work.batchrun("report", ".", "--by", "label", "--format", "json").json
    groups = {group["label"]: group for group in found["groups"]}
    assert set(groups) == {"positive", "negative", "(not in an output)"}
    assert sum(group["usd_spent"] for group in groups.values()) == found["totals"]["usd_spent"] == provider.bill
    assert groups["(not in an output)"]["ok"] == 2
    counted = work.batchrun("report", ".", "--by", "attempts", "--format", "json").json["groups"]
    assert {group["attempts (value)"] for group in counted} == {"1", "(not in an output)"}


def test_what_cannot_be_read_is_left_out_with_a_word(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url, ledger="my.ledger")
    assert work.run().code == 0
    (work.folder / "empty.sqlite").write_bytes(b"")
    (work.folder / "loop.parquet").symlink_to("loop.parquet")
    os.mkfifo(work.folder / "pipe.sqlite")
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"batchrun": '{"a": 1}'}), work.folder / "odd.parquet")
    found = work.batchrun("report", ".", "--format", "json")
    assert found.code == 0, found.stderr
    assert [run["ledger"] for run in found.json["runs"]] == ["my.ledger"]
    notes = "\n".join(found.json["notes"])
    assert ("empty.sqlite is empty" in notes, "odd.parquet is no output" in notes) == (True, True), notes
    assert work.batchrun("report", "my.ledger").code == 0
    refused = work.batchrun("report", "pipe.sqlite")
    assert (refused.code, "neither a file nor a folder" in refused.stderr) == (2, True), refused.stderr


def test_options_that_do_not_go_together_and_files_that_must_stay(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url)
    assert work.run().code == 0
    kept = {name: (work.folder / name).read_bytes() for name in ("job.ledger.sqlite", "out.parquet")}
    for options, told in (
        (("--html", "x.html", "--by", "job"), "leave out --by"), (("--no-content",), "add --html FILE"),
        (("--top", "3", "--format", "csv"), "--top has no place"), (("--output", "."), "is a folder"),
        (("--output", "job.ledger.sqlite"), "is a ledger or an output"),
        (("--html", "out.parquet"), "an output of a run"),
    ):  # fmt: skip
        refused = work.batchrun("report", ".", *options)
        assert (refused.code, told in refused.stderr) == (2, True), (options, refused.stderr)
    assert {name: (work.folder / name).read_bytes() for name in kept} == kept
    # A body that cannot be unpacked is shown without.
    with closing(sqlite3.connect(work.ledger)) as db, db:
        db.execute("UPDATE answer SET body = x'0102030405'")
    shown = work.batchrun("show", "job.yaml", "--row", "1", "--json").json
    assert shown["slots"][0]["attempts"][0]["answer"] is None


def test_what_a_terminal_would_obey_is_not_shown_to_it(work: Workspace, provide: Provide) -> None:
    work.write_rows([f"a prompt\x9b <<{json.dumps({'say': chr(27) + ']0;owned' + chr(7)})}>>"])
    work.write_job(provide().base_url)
    assert work.run().code == 0
    shown = work.batchrun("show", "job.yaml", "--row", "1").stdout
    assert "owned" in shown
    checked = work.batchrun("check", "job.yaml").stdout
    assert "a prompt" in checked
    assert not any(char in shown + checked for char in "\x1b\x07\x9b")


def test_the_hours_between_a_kill_and_the_next_call_are_no_work(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.1)
    work.write_rows([f"row {number}" for number in range(12)])
    work.write_job(provider.base_url, concurrency=2)
    with work.start("job.yaml") as process:
        provider.wait_for(4)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    hours = 10 * 3600 * 1_000_000
    with closing(sqlite3.connect(work.ledger)) as db, db:
        db.execute("UPDATE invocation SET started_at = started_at - ?", (hours,))
        db.execute("UPDATE attempt SET sent_at = sent_at - ?, settled_at = settled_at - ?", (hours, hours))
    assert work.run().code == 0
    (run,) = work.batchrun("report", ".", "--format", "json").json["runs"]
    assert 0 < run["seconds"] < 600
    assert run["rows_per_second"] > 0.01
