"""What a program finds around itself: streams that are closed, files that are none, a lock that somebody deletes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from .accounting import assert_reconciled
from .conftest import FakeProvider, Workspace

Provide = Callable[..., FakeProvider]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files and signals")


def shell(work: Workspace, after: str) -> subprocess.CompletedProcess[str]:
    command = " ".join(work.command("job.yaml"))
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {after}"], cwd=work.folder, env=work.environment(), timeout=60,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("after", [">&-", "2>&-", ">&- 2>&- <&-", "--json | true", "--json >&-"])
def test_closed_streams_decide_nothing(work: Workspace, provide: Provide, after: str) -> None:
    work.write_rows(["a", "b"])
    work.write_job(provide().base_url)
    ran = shell(work, after)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert len(work.rows()) == 2
    assert work.batchrun("verify", "job.yaml").code == 0  # nothing was written into the ledger's file by mistake


@pytest.mark.parametrize("name", ["out.parquet", ".out.parquet.part"])
def test_a_pipe_in_the_outputs_place_is_found_before_anything_is_sent(
    work: Workspace, provide: Provide, name: str
) -> None:
    provider = provide()
    os.mkfifo(work.folder / name)
    work.write_rows(["a"])
    work.write_job(provider.base_url)
    result = work.run(timeout=20)
    assert result.code == 6
    assert f"{name} is no file: name another file, or remove it" in result.stderr
    assert provider.requests == []


def test_a_link_in_a_circle_gives_way_to_the_output(work: Workspace, provide: Provide) -> None:
    work.output.symlink_to(work.output.name)
    work.write_rows(["a"])
    work.write_job(provide().base_url)
    result = work.run()
    assert result.code == 0, result.stderr
    assert len(work.rows()) == 1


def test_a_job_that_is_no_file_is_refused(work: Workspace) -> None:
    os.mkfifo(work.job)
    result = work.run(timeout=20)
    assert result.code == 2
    assert "a job is a file" in result.stderr


def test_a_lock_that_is_deleted_under_the_run_stops_it(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3)
    work.write_rows([f"q{number}" for number in range(300)])
    work.write_job(provider.base_url, concurrency=2)
    with work.start("job.yaml") as process:
        provider.wait_for(1)
        (work.folder / "job.ledger.sqlite.lock").unlink()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 6, stderr
    assert "job.ledger.sqlite.lock has gone while the run went on" in stderr
    assert len(provider.requests) < 40


def test_what_came_while_the_process_was_stopped_is_read(work: Workspace, provide: Provide) -> None:
    """Stopped for longer than every timeout: the answers that came meanwhile are paid for, and are kept."""
    provider = provide(latency=1.0)
    work.write_rows([f"q{number}" for number in range(16)])
    work.write_job(provider.base_url, concurrency=8, timeout_seconds=2, retry={"max_seconds": 2})
    with work.start("job.yaml") as process:
        deadline = time.monotonic() + 30
        while work.in_flight < 8:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.4)  # their connections are made, and none is answered yet
        process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        process.send_signal(signal.SIGCONT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert len(provider.requests) == 16
    assert_reconciled(work, provider)


def test_many_at_once_are_one_that_runs(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.2)
    work.write_rows([f"q{number}" for number in range(60)])
    work.write_job(provider.base_url, concurrency=4)
    processes = [work.start("job.yaml") for _ in range(8)]
    results = [(process.communicate(timeout=60)[1], process.returncode) for process in processes]
    codes = sorted(code for _, code in results)
    # One may have come after another had ended: then there is nothing left of the run, and a new one begins.
    assert codes == [0] + [5] * 7, results
    assert len(provider.requests) == 60
    assert all("is in use by process" in stderr for stderr, code in results if code == 5)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_who_comes_second_knows_it_within_a_second(work: Workspace, provide: Provide, is_stopped: bool) -> None:
    work.write_rows(["a"])
    provider = provide(latency=20)
    work.write_job(provider.base_url)
    with work.start("job.yaml") as holder:
        while not work.ledger.exists():
            time.sleep(0.02)
        if is_stopped:
            holder.send_signal(signal.SIGSTOP)
        seconds = []
        for _ in range(3):
            began = time.monotonic()
            with work.start("job.yaml") as loser:
                loser.communicate(timeout=30)
            assert loser.returncode == 5
            seconds.append(time.monotonic() - began)
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert min(seconds) < 1
    # The lock has died with its holder.
    provider.hurry()
    assert work.run().code == 0


def test_without_the_lock_two_processes_would_pay_twice(work: Workspace, provide: Provide) -> None:
    """The lock is what keeps them apart: taken away, the provider is asked twice, and the ledger notices."""
    provider = provide(latency=0.3)
    work.write_rows([f"q{number}" for number in range(30)])
    work.write_job(provider.base_url, concurrency=4)
    program = work.folder / "unlocked.py"
    program.write_text(
        "import contextlib, sys\n"
        "from batchrun import cli, lock\n"
        "lock.held = lambda ledger: contextlib.nullcontext()\n"
        "sys.argv = ['batchrun', 'job.yaml']\n"
        "cli.main()\n"
    )
    work.command = lambda *args: [sys.executable, str(program)]  # type: ignore[method-assign]
    processes = [work.start(), work.start()]
    codes = [process.communicate(timeout=60) and process.returncode for process in processes]
    assert len(provider.requests) > 30 or set(codes) - {0}
