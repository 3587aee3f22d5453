"""One end-to-end test per exit code; stdout carries data, stderr carries talk."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import FakeProvider, Workspace

Provide = Callable[..., FakeProvider]


def test_0_every_row_has_an_answer(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url)
    result = work.run("--json")
    assert (result.code, result.json["exit_code"], result.json["reason"]) == (0, 0, None)
    assert result.stdout.count("\n") == 1
    assert "1 ok, 0 failed" in result.stderr


def test_0_quiet_says_nothing(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url)
    result = work.run("--quiet")
    assert (result.code, result.stdout, result.stderr) == (0, "", "")


def test_1_some_rows_failed(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a", '<<{"fail": [422]}>>'])
    work.write_job(provide().base_url)
    result = work.run("--json")
    assert (result.code, result.json["exit_code"], result.json["reason"]) == (1, 1, "rows_failed")
    assert result.json["failures"][0]["kind"] == "bad_request"


def test_2_the_job_is_wrong(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url, prompt="{{ promt }} {{ other }}")
    result = work.run()
    assert (result.code, result.stdout) == (2, "")
    assert "no such column: 'other' (prompt.user), 'promt' (prompt.user); the columns are prompt" in result.stderr
    assert provider.requests == []


def test_2_no_key(work: Workspace) -> None:
    work.write_rows(["a"])
    work.write_job()
    job = work.job.read_text().replace(', "base_url": "http://127.0.0.1:9/v1"', "")
    work.job.write_text(job.replace('"base_url": "http://127.0.0.1:9/v1"', '"system": "message"'))
    work.env["AIML_API_KEY"] = ""
    result = work.run()
    assert result.code == 2
    assert "set the environment variable AIML_API_KEY" in result.stderr


def test_2_command_line(work: Workspace) -> None:
    result = work.batchrun("job.yaml", "--no-such-option")
    assert (result.code, result.stdout) == (2, "")
    assert "No such option" in result.stderr


@pytest.mark.parametrize(("status", "reason"), [(401, "auth"), (402, "billing"), (403, "billing")])
def test_4_the_account_is_refused(work: Workspace, provide: Provide, status: int, reason: str) -> None:
    provider = provide(refuse_after=5) if status == 403 else provide()
    script = "" if status == 403 else f'<<{{"fail": [{status}]}}>>'
    work.write_rows([f"{script if number >= 5 else ''}q{number}" for number in range(200)])
    work.write_job(provider.base_url, concurrency=2)
    result = work.run("--json")
    assert (result.code, result.json["reason"]) == (4, reason)
    rows = work.rows()
    assert sum(row["status"] == "ok" for row in rows) == 5
    assert {row["status"] for row in rows} == {"ok", "pending"}
    stopped = [row for row in rows if row["status"] == "pending" and row["error"]]
    assert stopped
    assert stopped[0]["error"].startswith(f"{reason} ({status})")
    assert len(provider.requests) <= 5 + 2
    assert not work.manifest()["complete"]
    assert work.manifest()["reason"] == reason


def test_4_free_tier_limit_is_not_retried(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["<<" + '{"fail": [429], "message": "Free-tier limit: You\'ve reached your free limit"}' + ">>"])
    work.write_job(provider.base_url)
    result = work.run("--json")
    assert (result.code, result.json["reason"]) == (4, "quota")
    assert len(provider.requests) == 1


def test_4_the_provider_cannot_be_reached(work: Workspace) -> None:
    work.write_rows([f"q{number}" for number in range(100)])
    work.write_job("http://127.0.0.1:9/v1", concurrency=30)
    result = work.run("--json")
    assert (result.code, result.json["reason"]) == (4, "unreachable")
    assert {row["status"] for row in work.rows()} == {"pending"}
    assert result.json["unknown_outcomes"] == 0
    assert result.json["usd_spent"] == 0


def test_4_the_first_rows_are_all_refused_in_the_same_words(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows([f'q{number} <<{{"fail": [404]}}>>' for number in range(500)])
    work.write_job(provider.base_url, concurrency=4)
    result = work.run("--json")
    assert (result.code, result.json["reason"]) == (4, "refused")
    assert len(provider.requests) <= 24
    assert sum(row["status"] == "pending" for row in work.rows()) >= 476


def test_5_another_process_holds_the_ledger(work: Workspace, provide: Provide) -> None:
    work.write_rows([f"q{number}" for number in range(40)])
    provider = provide(latency=0.3)
    work.write_job(provider.base_url, concurrency=2)
    with work.start("job.yaml") as holder:
        _wait_for(lambda: work.ledger.exists())
        began = time.monotonic()
        result = work.run()
        assert result.code == 5
        assert f"is in use by process {holder.pid} on " in result.stderr
        assert time.monotonic() - began < 3
        holder.send_signal(signal.SIGTERM)
        holder.communicate(timeout=60)
        assert holder.returncode == 143
    provider.hurry()
    assert work.run().code == 0


def test_6_the_output_cannot_be_written(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url, output="taken/out.parquet", ledger="job.ledger.sqlite")
    (work.folder / "taken").write_text("a file where a folder should be")
    result = work.run()
    assert result.code == 6
    assert "taken/out.parquet cannot be written" in result.stderr
    assert provider.requests == []


def test_6_the_ledger_is_no_ledger(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url)
    work.ledger.write_bytes(b"this is no database" * 100)
    result = work.run()
    assert result.code == 6
    assert str(work.ledger) in result.stderr
    assert provider.requests == []
    assert work.ledger.read_bytes().startswith(b"this is no database")


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_6_a_full_disk_stops_the_sending_and_loses_nothing(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows([f"q{number} " + "x" * 500 for number in range(2000)])
    work.write_job(provider.base_url)
    script = work.folder / "limited.py"
    script.write_text(
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'batchrun', 'job.yaml'])\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    original = work.command
    work.command = lambda *args: [sys.executable, str(script)]  # type: ignore[method-assign]
    result = work.run()
    assert result.code == 6, result.stderr
    assert str(work.ledger) in result.stderr
    first = len(provider.requests)
    assert 0 < first < 2000
    work.command = original  # type: ignore[method-assign]
    result = work.run("--json")
    assert result.code == 0, result.stderr
    unknown = int(result.json["unknown_outcomes"])
    assert unknown <= 8
    assert len(provider.requests) <= 2000 + unknown
    assert {row["status"] for row in work.rows()} == {"ok"}


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        ("usd=found.usd + 1", "a promise was broken, 'money is exact': the rows add up to"),
        ("ok=found.ok - 1", "a promise was broken, 'every row ends in one state': "),
    ],
)
def test_70_a_broken_promise_is_told_and_the_output_not_written(
    work: Workspace, provide: Provide, defect: str, said: str
) -> None:
    work.write_rows(["a", "b"])
    work.write_job(provide().base_url)
    script = work.folder / "defect.py"
    script.write_text(
        "import sys\n"
        "from dataclasses import replace\n"
        "from batchrun.cli import main\n"
        "from batchrun import accounts\n"
        "right = accounts.totals\n"
        "def wrong(self, run):\n"
        "    found = right(self, run)\n"
        f"    return replace(found, {defect})\n"
        "accounts.totals = wrong\n"
        "sys.argv = ['batchrun', 'job.yaml']\n"
        "main()\n"
    )
    original = work.command
    work.command = lambda *args: [sys.executable, str(script)]  # type: ignore[method-assign]
    result = work.run()
    assert result.code == 70, result.stderr
    assert said in result.stderr
    assert f"keep {work.ledger} as it is" in result.stderr
    assert not work.output.exists()
    work.command = original  # type: ignore[method-assign]
    assert work.run().code == 0
    assert len(work.rows()) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_130_and_143_interrupted_after_what_is_in_flight(
    work: Workspace, provide: Provide, number: signal.Signals, code: int
) -> None:
    provider = provide(latency=0.4)
    work.write_rows([f"q{number}" for number in range(60)])
    work.write_job(provider.base_url, concurrency=4)
    with work.start("job.yaml", "--json") as process:
        _wait_for(lambda: len(provider.requests) >= 4)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert "stopping: waiting up to 60 s for 4 requests in flight; a second signal drops them" in stderr
    assert process.returncode == code
    rows = work.rows()
    answered = sum(row["status"] == "ok" for row in rows)
    assert answered == len(provider.requests) < 60
    assert sum(row["unknown_attempts"] for row in rows) == 0
    assert '"complete": false' in stdout
    provider.hurry()
    assert work.run().code == 0
    assert len(provider.requests) == 60


def test_130_a_second_signal_stops_at_once_and_the_ledger_tells_the_truth(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=30)
    work.write_rows([f"q{number}" for number in range(20)])
    work.write_job(provider.base_url, concurrency=4)
    with work.start("job.yaml", "--json") as process:
        _wait_for(lambda: work.in_flight == 4)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 130, stderr
    assert not work.output.exists()
    assert '"unknown_outcomes": 4' in stdout


def _wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_the_working_directory_decides_nothing(work: Workspace, provide: Provide, tmp_path: Path) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    here = Workspace(elsewhere)
    assert here.batchrun(str(work.job)).code == 0
    assert not list(elsewhere.iterdir())
    assert work.output.exists()
    assert work.ledger.exists()
