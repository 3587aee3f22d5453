"""Real processes killed at any moment, over several kinds of jobs: the ledger tells the truth, and nothing is lost."""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .accounting import assert_reconciled, books
from .conftest import FakeProvider, Workspace, forks

Provide = Callable[..., FakeProvider]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "streamed": {"stream": True},
    "capped": {"budget": {"usd": 5}},
    "failing": {},
}
FAILING = {"p429": 0.05, "p500": 0.05, "p_hangup": 0.03, "p_half": 0.02}


def prepare(work: Workspace, provide: Provide, kind: str, rows: int, seed: int) -> FakeProvider:
    failures = FAILING if kind == "failing" else {}
    provider = provide(latency=0.02, seed=seed, bill="mix", **failures)
    work.write_rows([f"row {number}" for number in range(rows)])
    work.write_job(provider.base_url, concurrency=8, timeout_seconds=5, retry={"max_attempts": 9}, **KINDS[kind])
    return provider


def check_books(work: Workspace, provider: FakeProvider) -> None:
    """After a kill: every request is known, none of an answered row was repeated, and at most 8 are open."""
    if not work.ledger.exists():
        assert provider.requests == []
        return
    db = sqlite3.connect(f"file:{work.ledger}?mode=ro", uri=True)
    try:
        attempts = dict(db.execute("SELECT client_request_id, outcome FROM attempt").fetchall())
        twice = db.execute(
            "SELECT 1 FROM attempt WHERE outcome = 'ok' GROUP BY run, key HAVING count(*) > 1"
        ).fetchall()
    except sqlite3.OperationalError:
        attempts, twice = {}, []
    finally:
        db.close()
    assert {request["id"] for request in provider.requests} <= set(attempts), "sent, and not on record"
    assert not twice
    assert sum(outcome is None for outcome in attempts.values()) <= 8


def is_finished(work: Workspace) -> bool:
    if not work.ledger.exists():
        return False
    db = sqlite3.connect(f"file:{work.ledger}?mode=ro", uri=True)
    try:
        return db.execute("SELECT 1 FROM run WHERE state = 'finished'").fetchone() is not None
    except sqlite3.OperationalError:
        return False
    finally:
        db.close()


def kill_until_done(work: Workspace, provider: FakeProvider, chance: random.Random, kills: int, rows: int) -> None:
    """Kill so many processes at random moments of their lives, then let one go to its end."""
    for _ in range(kills):
        forked = forks().start(("job.yaml",), work.folder, work.environment())
        time.sleep(chance.uniform(0, 0.6) if chance.random() < 0.8 else chance.uniform(0, 0.05))
        forked.kill()
        check_books(work, provider)
        if is_finished(work):
            break  # the next process would begin a new run
    else:
        result = work.run()
        assert result.code in (0, 1), result.stderr
    assert_reconciled(work, provider)
    answered = {request["text"] for request in provider.requests if request["answered"]}
    assert len(work.rows()) == rows
    assert {row["prompt"] for row in work.rows() if row["status"] == "ok"} <= answered
    verified = work.batchrun("verify", "job.yaml")
    assert verified.code == 0, verified.stdout
    # No answered row was asked again: what was asked more often than once has an attempt that brought nothing.
    asked = len(provider.requests)
    assert asked == len([name for name in books(work) if name in {request["id"] for request in provider.requests}])


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_kills(work: Workspace, provide: Provide, kind: str) -> None:
    provider = prepare(work, provide, kind, rows=150, seed=1)
    kill_until_done(work, provider, random.Random(kind), kills=4, rows=150)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_kills(work: Workspace, provide: Provide, kind: str) -> None:
    provider = prepare(work, provide, kind, rows=2000, seed=2)
    kill_until_done(work, provider, random.Random(f"{kind} slow"), kills=50, rows=2000)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_rounds_of_kills(tmp_path: Path, provide: Provide, part: int) -> None:
    """Killed and gone on with until done: the bill less ours is what is reported unknown; each row is answered once."""
    for number in range(10):
        seed = part * 10 + number
        folder = tmp_path / f"round {seed}"
        folder.mkdir()
        work = Workspace(folder)
        chance = random.Random(seed)
        rows = chance.randrange(20, 200)
        kind = chance.choice(list(KINDS))
        provider = prepare(work, provide, kind, rows, seed)
        kill_until_done(work, provider, chance, kills=30, rows=rows)
        provider.stop()


def signals(process: subprocess.Popen[str], numbers: list[signal.Signals], chance: random.Random) -> None:
    time.sleep(chance.uniform(0.6, 1.6))
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.15)


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]],
    ids=["TERM", "INT", "INT twice", "TERM twice"],
)
def test_signals_at_random_moments(work: Workspace, provide: Provide, numbers: list[signal.Signals]) -> None:
    provider = prepare(work, provide, "plain", rows=400, seed=3)
    chance = random.Random(str(numbers))
    with work.start("job.yaml") as process:
        signals(process, numbers, chance)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode in (128 + numbers[0], 0, -numbers[0]), stderr
    assert "Traceback" not in stderr
    check_books(work, provider)
    assert work.run().code == 0
    assert_reconciled(work, provider)


# --- full disks and folders that cannot be written ----------------------------------------------------------


@pytest.mark.parametrize("limit", [8, 64, 120, 400])
def test_a_file_that_may_not_grow_stops_the_sending_and_loses_nothing(
    work: Workspace, provide: Provide, limit: int
) -> None:
    """`ulimit -f`, in kilobytes: at the start, while the ledger grows, and while the Parquet is written."""
    provider = provide(latency=0.02)
    rows = 400
    with (work.folder / "in.csv").open("w", newline="", encoding="utf-8") as fp:
        chance = random.Random(0)
        csv.writer(fp).writerows([["prompt"], *([chance.randbytes(300).hex()] for _ in range(rows))])
    work.write_job(provider.base_url)
    command = f"ulimit -f {limit}; exec {' '.join(work.command('job.yaml'))}"
    ran = subprocess.run(
        ["bash", "-c", command], cwd=work.folder, env=work.environment(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 6, ran.stderr
    assert "Traceback" not in ran.stderr
    asked = len(provider.requests)
    assert asked < rows or limit == 400
    check_books(work, provider)
    assert work.run().code == 0
    assert len(provider.requests) == rows, "an answer was lost, and asked for again"
    assert_reconciled(work, provider)


def test_a_full_disk_stops_the_sending_and_loses_nothing(work: Workspace, provide: Provide) -> None:
    mounted = work.folder / "small"
    mounted.mkdir()
    probe = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=1m none {mounted}"], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip("needs to mount a tmpfs")
    provider = provide(latency=0.02)
    chance = random.Random(0)
    rows = 1000
    work.write_rows([chance.randbytes(600).hex() for _ in range(rows)])
    work.write_job(provider.base_url, ledger="small/job.sqlite")
    run = " ".join(work.command("job.yaml"))
    # Mounted for this one shell: the run fills it, room is made, and it goes on.
    script = (
        f"mount -t tmpfs -o size=2500k none {mounted} && {run}; echo first $?; "
        f"mount -o remount,size=64m {mounted} && {run}; echo second $?; {' '.join(work.command('verify', 'job.yaml'))}"
    )
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=work.folder, env=work.environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "first 6\nsecond 0\nverified" in ran.stdout, (ran.stdout, ran.stderr)
    assert "full" in ran.stderr
    assert len(provider.requests) == rows, "an answer was lost, and asked for again"


@pytest.mark.parametrize("what", ["ledger", "output"])
def test_a_folder_that_may_not_be_written_is_found_before_anything_is_sent(
    work: Workspace, provide: Provide, what: str
) -> None:
    if os.geteuid() == 0 and subprocess.run(["setpriv", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("root may write everywhere, and there is no setpriv")
    provider = provide()
    work.folder = Path(tempfile.mkdtemp(prefix="batchrun-closed-"))  # another user must get there
    closed = work.folder / "closed"
    closed.mkdir()
    work.write_rows(["a"])
    work.write_job(
        provider.base_url,
        **({"ledger": "closed/l.sqlite"} if what == "ledger" else {"output": "closed/o.parquet", "ledger": "l.sqlite"}),
    )
    closed.chmod(0o555)
    command = work.command("job.yaml")
    if os.geteuid() == 0:
        work.folder.chmod(0o777)
        closed.chmod(0o555)
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
    ran = subprocess.run(
        command, cwd=work.folder, env=work.environment() | {"HOME": str(work.folder)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    shutil.rmtree(work.folder)
    if "Permission denied: '/root" in ran.stderr or ran.returncode in (1, 126, 127):
        pytest.skip("another user cannot run this Python")
    assert ran.returncode == 6, ran.stderr
    assert "closed" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert provider.requests == []
