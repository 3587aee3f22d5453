"""Unattended: overlap, fresh runs, deadlines, overrides, and outcomes that machines read."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from decimal import Decimal
from typing import Any

import duckdb
import pandas as pd
import pytest

from .conftest import FakeProvider, Workspace

Provide = Callable[..., FakeProvider]


def last_run(work: Workspace) -> dict[str, Any]:
    document = json.loads((work.folder / "job.last-run.json").read_text(encoding="utf-8"), parse_float=Decimal)
    assert isinstance(document, dict)
    return document


def ready(work: Workspace, provider: FakeProvider, rows: int = 20, **keys: Any) -> None:
    work.write_rows([f"row {number}" for number in range(rows)])
    work.write_job(provider.base_url, **{"concurrency": 2, **keys})


def states(work: Workspace) -> list[str]:
    with closing(sqlite3.connect(work.ledger)) as db:
        return [state for (state,) in db.execute("SELECT state FROM run ORDER BY run")]


def begun(work: Workspace, provide: Provide, rows: int = 20, **keys: Any) -> tuple[FakeProvider, int]:
    """A run that was left with some of its answers, by Ctrl-C: the provider, and how many rows are answered."""
    provider = provide(latency=0.4, bill="meta")
    ready(work, provider, rows=rows, **keys)
    with work.start("job.yaml") as process:
        provider.wait_for(3)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    answered = last_run(work)["ok"]
    assert 2 < answered < rows
    return provider, answered


# --- overlap --------------------------------------------------------------------------------------------------------


def test_two_at_once_fail_skip_or_wait(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3)
    ready(work, provider, rows=16)
    with work.start("job.yaml") as process:
        provider.wait_for(2)
        refused = work.run("--json")
        skipped = work.run("--if-running", "skip", "--json")
        impatient = work.run("--if-running=wait=0.2")
        assert process.poll() is None
        provider.hurry()
        patient = work.run("--if-running", "wait", "--json")
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert (refused.code, refused.json["reason"], refused.json["exit_code"]) == (5, "running", 5)
    assert f"process {process.pid} " in refused.json["error"]
    assert (skipped.code, skipped.json["reason"], skipped.json["exit_code"]) == (0, "skipped", 0)
    assert "skipped" in skipped.stderr
    assert impatient.code == 5
    assert f"waiting for process {process.pid} " in impatient.stderr
    assert (patient.code, patient.json["ok"], patient.json["sent"]) == (0, 16, 16)
    # Whoever was not at work has not told the outcome of whoever was.
    assert last_run(work)["run_id"] == patient.json["run_id"]
    assert last_run(work)["reason"] is None


def test_after_a_crash_nothing_is_to_be_unlocked(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.2)
    ready(work, provider)
    with work.start("job.yaml") as process:
        provider.wait_for(3)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    provider.hurry()
    assert work.run("--if-running", "skip").code == 0
    assert states(work) == ["finished"]


@pytest.mark.parametrize("policy", ["maybe", "wait=", "wait=-1", "wait=soon", "skip=3", ""])
def test_a_policy_that_is_none_is_refused(work: Workspace, provide: Provide, policy: str) -> None:
    ready(work, provide())
    result = work.run("--if-running", policy)
    assert result.code == 2
    assert "should be fail, skip, wait" in result.stderr


# --- a run that goes on, or a new one -------------------------------------------------------------------------------


def test_a_new_run_abandons_the_open_one_whose_money_still_counts(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="meta")
    ready(work, provider, budget={"usd": 1, "per": "month"})
    first = work.run("--deadline", "0s", "--json")
    assert (first.code, first.json["sent"]) == (3, 0)
    provider.stop()
    provider, _ = begun(work, provide, budget={"usd": 1, "per": "month"})
    spent = last_run(work)["usd_spent"]
    assert spent == provider.bill > 0
    old = work.run("--max-age", "1h", "--deadline", "0s", "--json")
    assert old.json["run_id"] == last_run(work)["run_id"]
    provider.hurry()
    new = work.run("--new", "--json")
    assert (new.code, new.json["ok"], new.json["sent"]) == (0, 20, 20)
    assert "is abandoned" in new.stderr
    assert f"${spent.normalize():f} that it has spent still count" in new.stderr
    assert states(work) == ["abandoned", "finished"]
    runs = work.batchrun("report", ".", "--format", "json").json["runs"]
    assert sum(run["usd_spent"] for run in runs) == provider.bill
    assert runs[-1]["budget_used"] == provider.bill
    assert work.batchrun("verify", "job.yaml").code == 0


def test_an_open_run_that_is_too_old_is_abandoned(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3)
    ready(work, provider)
    assert work.run("--deadline", "1s").code == 3
    with closing(sqlite3.connect(work.ledger)) as db, db:
        db.execute("UPDATE run SET started_at = started_at - 2 * 86400000000")
    assert work.run("--max-age", "3d", "--deadline", "0s").code == 3
    assert states(work) == ["open"]
    provider.hurry()
    assert work.run("--max-age", "24h").code == 0
    assert states(work) == ["abandoned", "finished"]


def test_what_has_changed_between_two_tries_is_told(work: Workspace, provide: Provide) -> None:
    provider, answered = begun(work, provide, rows=12)
    provider.hurry()
    ready(work, provider, rows=12, concurrency=4, parameters={"max_tokens": 17})
    changed = work.run("--json")
    assert "the job has changed since: parameters.max_tokens 16 → 17; concurrency 2 → 4" in changed.stderr
    assert f"{answered} answers are to other requests than the job makes now" in changed.stderr
    assert (changed.code, changed.json["sent"]) == (0, 12)


def test_unchanged_slots_keep_their_answers(work: Workspace, provide: Provide) -> None:
    provider, answered = begun(work, provide, rows=8)
    provider.hurry()
    ready(work, provider, rows=8, model=["anthropic/claude-sonnet-4", "openai/gpt-4o-mini"])
    result = work.run("--json")
    assert (result.code, result.json["ok"], result.json["sent"]) == (0, 16, 16 - answered)


def test_what_is_asked_again_is_not_too_old(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider)
    work.write_rows(["a", "b", 'c <<{"fail": [400, 400]}>>'])
    assert work.run().code == 1
    with closing(sqlite3.connect(work.ledger)) as db, db:
        db.execute("UPDATE run SET started_at = started_at - 3 * 86400000000")
    assert work.run("--retry-failed", "--deadline", "0s").code == 3
    assert work.run("--max-age", "24h", "--json").json["sent"] == 0
    assert work.run("--retry-failed", "--max-age", "24h", "--json").json["sent"] == 1
    assert states(work) == ["finished"]
    assert len(provider.requests) == 4


def test_a_call_that_sends_nothing_abandons_nothing(work: Workspace, provide: Provide) -> None:
    provider, answered = begun(work, provide, rows=12)
    provider.hurry()
    for refused in (["--set", "budget={usd: 1}", "--model", "no/price"], ["--set", "parameters.x={{ nothing }}"]):
        result = work.run("--new", *refused)
        assert result.code == 2, result.stderr
        assert "abandoned" not in result.stderr
    assert "open" in states(work)
    result = work.run("--json")
    assert (result.code, result.json["sent"]) == (0, 12 - answered)
    assert states(work)[0] == "finished"


def test_less_input_for_a_while_does_not_end_a_run(work: Workspace, provide: Provide) -> None:
    provider, answered = begun(work, provide, rows=12)
    provider.hurry()
    part = work.run("--limit", "2", "--json")
    assert (part.code, part.json["rows"], part.json["ok"], part.json["sent"]) == (0, 2, 2, 0)
    assert "paid for again" not in part.stderr
    whole = work.run("--json")
    assert (whole.code, whole.json["ok"], whole.json["sent"]) == (0, 12, 12 - answered)


def test_a_whole_output_is_not_replaced_by_one_with_nothing(work: Workspace, provide: Provide) -> None:
    ready(work, provide(), rows=3)
    first = work.run("--json").json
    late = work.run("--deadline", "0s", "--json")
    assert (late.code, late.json["output"], late.json["pending"]) == (3, None, 3)
    assert f"stays as run {first['run_id']} has left it" in late.stderr
    assert {row["status"] for row in work.rows()} == {"ok"}
    assert work.run("--json").json["output"] == str(work.output)


# --- deadline -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["job", "call"])
def test_a_deadline_stops_in_time_and_finishes_what_is_in_flight(work: Workspace, provide: Provide, where: str) -> None:
    provider = provide(latency=0.5, bill="meta")
    ready(work, provider, rows=40, **({"deadline": "5s"} if where == "job" else {}))
    began = time.monotonic()
    result = work.run("--json", *(["--deadline", "5s"] if where == "call" else []))
    assert (result.code, result.json["reason"]) == (3, "deadline")
    # What was in flight was awaited, and by the deadline it was there.
    assert time.monotonic() - began < 9
    assert result.json["ok"] == len(provider.requests) >= 4
    assert result.json["unknown_outcomes"] == 0
    assert result.json["usd_spent"] == provider.bill
    assert {row["status"] for row in work.rows()} == {"ok", "pending"}
    provider.hurry()
    again = work.run("--deadline", "1h", "--json")
    assert (again.code, again.json["ok"], len(provider.requests)) == (0, 40, 40)


def test_a_deadline_after_the_last_row_changes_nothing(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=4)
    ready(work, provider, rows=2)
    # It comes while the last rows are in flight.
    assert work.run("--deadline", "3s").code == 0


def test_what_is_in_flight_at_the_deadline_has_the_time_that_it_needs(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=2)
    # Less than an answer takes, and more than one answer takes longer than another on a busy machine.
    ready(work, provider, rows=20, concurrency=4, stop_seconds=1.5)
    result = work.run("--deadline", "7s", "--json")
    assert (result.code, result.json["reason"], result.json["unknown_outcomes"]) == (3, "deadline", 0)
    assert result.json["ok"] == len(provider.requests) > 0


def test_a_model_that_refuses_all_is_told_at_the_deadline_too(work: Workspace, provide: Provide) -> None:
    provider = provide(withdrawn=["old/model"], latency=0.9)
    ready(work, provider, rows=31, concurrency=62, model=["anthropic/claude-sonnet-4", "old/model"])
    result = work.run("--deadline", "1s", "--json")
    assert result.code in (3, 4), result.stderr
    assert result.json["reason"] in ("deadline", "refused")


def test_what_a_deadline_means_does_not_change_by_waiting(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3)
    ready(work, provider, rows=16)
    with work.start("job.yaml") as process:
        provider.wait_for(2)
        soon = pd.Timestamp.now() + pd.Timedelta(seconds=1)
        late = work.run("--if-running", "wait", "--deadline", f"{soon:%H:%M:%S}", "--json")
        process.communicate(timeout=60)
    assert (late.code, late.json["reason"], late.json["sent"]) == (3, "deadline", 0)


@pytest.mark.parametrize("text", ["soon", "25:00", "2x", "", "06:61", "2026-13-01", "9999-12-31T23:59"])
def test_a_deadline_that_is_none_is_refused(work: Workspace, provide: Provide, text: str) -> None:
    provider = provide()
    ready(work, provider)
    work.env["TZ"] = "America/New_York"
    result = work.run("--deadline", text)
    assert result.code == 2
    assert "is no deadline: write 2h, 90m, 06:00" in result.stderr
    assert provider.requests == []


def test_a_time_of_day_is_local_and_the_next(work: Workspace, provide: Provide) -> None:
    ready(work, provide(), rows=2)
    for zone in ("UTC", "Pacific/Kiritimati", "America/St_Johns"):
        work.env["TZ"] = zone
        soon = pd.Timestamp.now(zone) + pd.Timedelta(hours=1)
        assert work.run("--deadline", f"{soon:%H:%M}", "--new").code == 0
    moment = (pd.Timestamp.now("UTC") - pd.Timedelta(minutes=1)).isoformat()
    assert work.run("--deadline", moment, "--json", "--new").json["reason"] == "deadline"


# --- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_are_in_force_and_on_record_and_the_ledger_stays(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True)
    ready(work, provider, rows=5)
    (work.folder / "sub").mkdir()
    other = work.folder / "sub" / "other.csv"
    other.write_text("prompt\nfrom elsewhere\nand more\nand last\n", encoding="utf-8")
    result = work.run(
        "--set", "parameters.temperature=0.25", "--model", "openai/gpt-4o-mini", "--limit", "2",
        "--input", "sub/other.csv", "--output", "sub/deep/er.parquet", "--json",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    assert (result.json["rows"], result.json["model"]) == (2, "openai/gpt-4o-mini")
    bodies = [request["body"] for request in provider.requests]
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in bodies} == {
        ("openai/gpt-4o-mini", 0.25, 16)
    }
    assert result.json["ledger"] == str(work.ledger)
    output = work.folder / "sub" / "deep" / "er.parquet"
    assert [row["prompt"] for row in work.rows(output)] == ["from elsewhere", "and more"]
    assert (work.folder / "job.last-run.json").exists()
    settings = work.batchrun("show", "job.yaml", "--json").json["settings"]
    assert settings["overrides"] == {
        "parameters.temperature": Decimal("0.25"), "model": "openai/gpt-4o-mini", "input.limit": 2,
        "input.path": str(other), "output.path": str(output),
    }  # fmt: skip
    # What a call has set holds for its run: it can be proven and written again.
    assert work.batchrun("verify", "job.yaml").stdout.startswith("verified: 2 attempts and 2 rows agree")
    output.unlink()
    assert work.batchrun("export", "job.yaml").code == 0
    assert len(work.rows(output)) == 2
    # And for no other.
    plain = work.run("--json")
    assert (plain.json["rows"], plain.json["output"]) == (5, str(work.output))
    assert "overrides" not in work.batchrun("show", "job.yaml", "--json").json["settings"]


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("x", "should be KEY=VALUE"),
        ("=3", "should be KEY=VALUE"),
        ("name=other", "says where the ledger is"),
        ("ledger=l.sqlite", "says where the ledger is"),
        ("parameters.=3", "is no key of a job"),
        ("modell=q", "set by this call: modell: there is no such key: did you mean 'model'?"),
        ("input.limit=-1", "set by this call: input.limit: should be greater than or equal to 0"),
        ("model.x=1", "model of the job is no mapping"),
        ("parameters.stop=[a", "no valid YAML"),
        ("budget.usd=much", "set by this call: budget.usd"),
        ("input=nope://bucket/x.csv", "is no kind of address"),
    ],
)
def test_an_override_that_is_wrong_is_named(work: Workspace, provide: Provide, assignment: str, said: str) -> None:
    provider = provide()
    ready(work, provider)
    result = work.run("--set", assignment)
    assert result.code == 2
    assert said in result.stderr
    assert provider.requests == []


def test_an_override_is_read_as_the_job_file_is(work: Workspace, provide: Provide) -> None:
    ready(work, provide(), rows=1)
    checked = work.batchrun(
        "check", "job.yaml", "--set", "model=a", "--set", "model=b"
    )  # fmt: skip
    assert "--set model: is set twice" in checked.stderr
    checked = work.batchrun("check", "job.yaml", "--set", "prompt.user='[{{ prompt }}]'", "--set", "budget=")
    assert checked.code == 0, checked.stderr
    assert "[row 0]" in checked.stdout


def test_no_override_begins_another_ledger(work: Workspace, provide: Provide) -> None:
    ready(work, provide(), output="runs/run_date={date}/answers.parquet")
    (work.folder / "runs").mkdir()
    (work.folder / "runs" / "job.ledger.sqlite").touch()
    for more in ([], ["--output", "o.parquet"], ["--set", "output.prefix=x_"]):
        result = work.run(*more)
        assert result.code == 2
        assert "is among the data" in result.stderr
    assert not work.ledger.exists()


def test_how_it_is_called_is_no_change_of_the_job(work: Workspace, provide: Provide) -> None:
    ready(work, provide(latency=0.3), rows=8)
    assert work.run("--deadline", "1s", "--output", "other.parquet").code == 3
    result = work.run("--deadline", "1h")
    assert 'the job has changed since: output.path "' in result.stderr
    assert "ledger" not in result.stderr
    assert "deadline" not in result.stderr


def test_a_secret_in_an_override_is_not_repeated(work: Workspace, provide: Provide) -> None:
    ready(work, provide())
    for text in ("provider.headers.X=[sk-verysecret123", "provider.headers.Authorization=Bearer sk-verysecret123"):
        result = work.run("--set", text, "--json")
        assert result.code == 2
        assert "verysecret" not in result.stderr + result.stdout


def test_a_log_says_nothing_of_what_another_provider_was_asked(work: Workspace, provide: Provide) -> None:
    own, other = provide(), provide(latency=5)
    ready(work, own, rows=4)
    with work.start("job.yaml", "--set", f"provider.base_url={other.base_url}") as process:
        while work.in_flight < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    result = work.batchrun("reconcile", "job.yaml", "--settle-after", "0", "--json")
    assert (result.code, result.json["not_billed"], result.json["still_unknown"]) == (1, 0, 2), result.stderr


# --- outcomes -------------------------------------------------------------------------------------------------------


def test_the_outcome_is_told_whatever_it_is(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="meta")
    ready(work, provider, rows=3)
    result = work.run("--json")
    assert last_run(work) == result.json
    assert (result.json["exit_code"], result.json["error"]) == (0, None)
    work.write_rows(["fine", 'bad <<{"fail": [400]}>>'])
    assert work.run("--json").json == last_run(work)
    assert (last_run(work)["exit_code"], last_run(work)["reason"]) == (1, "rows_failed")
    (work.folder / "in.csv").unlink()
    missing = work.run("--json")
    assert missing.code == last_run(work)["exit_code"] == 2
    assert "in.csv" in last_run(work)["error"]
    assert missing.json == last_run(work)
    work.write_rows(["fine"])
    provider.stop()
    ready(work, provider, rows=30, retry={"max_seconds": 0})
    unreachable = work.run("--json")
    assert unreachable.code == last_run(work)["exit_code"] == 4
    work.job.write_text("input: [", encoding="utf-8")
    broken = work.run("--json")
    assert (broken.code, broken.json["exit_code"], broken.json["job"]) == (2, 2, None)


def test_a_command_is_told_the_outcome(work: Workspace, provide: Provide) -> None:
    provider = provide()
    script = work.folder / "told.sh"
    script.write_text('#!/bin/sh\ncat > "$1"\necho heard\n', encoding="utf-8")
    script.chmod(0o755)
    ready(work, provider, rows=2, on_finish=["./told.sh", "with spaces.json"])
    result = work.run("--json")
    told = json.loads((work.folder / "with spaces.json").read_text(encoding="utf-8"), parse_float=Decimal)
    assert told == result.json == last_run(work)
    assert "heard" in result.stderr
    (work.folder / "in.csv").unlink()
    assert work.run().code == 2
    told = json.loads((work.folder / "with spaces.json").read_text(encoding="utf-8"))
    assert (told["exit_code"], told["run_id"]) == (2, None)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sh", "-c", "exit 7"], "ended with 7"),
        (["./no-such-program"], "cannot be started"),
        (["sh", "-c", "sleep 60 & sleep 60"], "did not end within 0.5 s"),
        (["sh", "-c", "trap '' TERM; exec <&-; kill -9 $$"], "ended with -9"),
    ],
)
def test_a_command_that_fails_is_told_and_changes_nothing(
    work: Workspace, provide: Provide, command: list[str], said: str
) -> None:
    ready(work, provide(), rows=2, on_finish={"command": command, "timeout_seconds": 0.5})
    began = time.monotonic()
    result = work.run("--json")
    assert result.code == result.json["exit_code"] == 0
    assert time.monotonic() - began < 30
    assert f"warning: on_finish: {command[0]} {said}" in result.stderr
    assert any(said in warning for warning in result.json["warnings"])


def test_a_command_may_call_batchrun(work: Workspace, provide: Provide) -> None:
    ready(work, provide(), rows=2, on_finish=work.command("verify", "job.yaml"))
    result = work.run()
    assert result.code == 0
    assert "verified: 2 attempts and 2 rows agree" in result.stderr
    assert "warning" not in result.stderr


def test_an_outcome_that_cannot_be_written_is_told(work: Workspace, provide: Provide) -> None:
    ready(work, provide(), rows=2)
    (work.folder / "job.last-run.json").mkdir()
    result = work.run("--json")
    assert result.code == 0
    assert "job.last-run.json cannot be written" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "input.limit=3", "--limit", "5"],
        ["--new", "--max-age", "1h"],
        ["--limit", "-1"],
        ["--no-such-option"],
        ["--set", "output=a.parquet", "--output", "b.parquet"],
    ],
)
def test_a_wrong_call_is_told_machines_too(work: Workspace, provide: Provide, options: list[str]) -> None:
    ready(work, provide())
    result = work.run("--json", *options)
    assert (result.code, result.json["exit_code"], result.json["reason"]) == (2, 2, "job")
    assert result.json["error"]


def test_an_error_after_money_was_spent_says_how_much(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.2, bill="meta")
    ready(work, provider, rows=8, output="out/o.parquet", ledger="job.ledger.sqlite")
    with work.start("job.yaml", "--json") as process:
        provider.wait_for(2)
        (work.folder / "out").mkdir(exist_ok=True)
        (work.folder / "out" / "o.parquet").mkdir()
        stdout, stderr = process.communicate(timeout=60)
    document = json.loads(stdout, parse_float=Decimal)
    told = json.loads((work.folder / "out" / "job.last-run.json").read_text(encoding="utf-8"), parse_float=Decimal)
    assert process.returncode == document["exit_code"] == told["exit_code"] == 6, stderr
    assert told["usd_spent"] == provider.bill > 0
    assert (told["ok"], told["run_id"]) == (8, work.batchrun("show", "job.yaml", "--json").json["run"]["run_id"])


def test_whose_ledger_it_is_not_tells_no_outcome(work: Workspace, provide: Provide) -> None:
    provider = provide()
    ready(work, provider, rows=2, output="../shared/o.parquet")
    assert work.run().code == 0
    outcome = work.folder.parent / "shared" / "job.last-run.json"
    before = outcome.read_text(encoding="utf-8")
    twin = Workspace(work.folder.parent / "twin")
    twin.folder.mkdir()
    ready(twin, provider, rows=2, output="../shared/o.parquet")
    assert twin.run().code == 2
    assert outcome.read_text(encoding="utf-8") == before


def test_a_failing_command_is_heard_when_all_else_is_quiet(work: Workspace, provide: Provide) -> None:
    ready(work, provide(), rows=2, on_finish=["false"])
    result = work.run("--quiet")
    assert (result.code, result.stderr) == (0, "batchrun: warning: on_finish: false ended with 1\n")


def test_all_that_a_command_has_started_ends_with_its_time(work: Workspace, provide: Provide) -> None:
    script = "(trap '' TERM; echo $$ > child; sleep 60) & wait"
    ready(work, provide(), rows=2, on_finish={"command": ["sh", "-c", script], "timeout_seconds": 0.5})
    began = time.monotonic()
    assert work.run().code == 0
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_command_and_change_nothing(work: Workspace, provide: Provide, number: signal.Signals) -> None:
    script = "trap '' TERM; touch begun; while :; do sleep 0.1; done"
    ready(work, provide(), rows=2, on_finish=["sh", "-c", script])
    with work.start("job.yaml", "--json") as process:
        while not (work.folder / "begun").exists():
            time.sleep(0.02)
        process.send_signal(number)
        time.sleep(0.5)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["warnings"] == ["on_finish: sh was interrupted"]


# --- an output for each run -----------------------------------------------------------------------------------------


def test_runs_in_hive_folders_are_one_dataset(work: Workspace, provide: Provide) -> None:
    ready(work, provide(), rows=3, output="runs/run_date={date}/eval-{run_id}.parquet")
    ids = [work.run("--json").json["run_id"] for _ in range(2)]
    frame = pd.read_parquet(work.folder / "runs")
    assert list(frame["run_id"].value_counts()) == [3, 3]
    assert set(frame["run_id"]) == set(ids)
    assert set(frame["run_date"].astype(str)) == {f"{run_id[:4]}-{run_id[4:6]}-{run_id[6:8]}" for run_id in ids}
    query = f"SELECT run_date, count(*) FROM read_parquet('{work.folder}/runs/**/*.parquet') GROUP BY run_date"
    assert [number for _, number in duckdb.sql(query).fetchall()] == [6]
    # The ledger is one, and not among the data.
    assert work.ledger.exists()
    assert (work.folder / "job.last-run.json").exists()
    assert {path.suffix for path in (work.folder / "runs").rglob("*") if path.is_file()} == {".parquet"}
