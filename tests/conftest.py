"""What the tests share: the fake provider, a way to call the command line, and small jobs."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings

from .fake_provider import SONNET as SONNET
from .forked import Fork, Forks

settings.register_profile("batchrun", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("batchrun")

KEY = "sk-test-4711-secret"

# Each of the many processes that the tests start would compile anew whatever it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three for two cores: a test waits for servers, timers and disks a third of its time, but the slow ones do not."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + (cores + 1) // 2 if config.option.markexpr == "not slow" else cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first: at the end, all would wait for it. What wants the machine for itself is last."""
    items.sort(key=lambda item: (item.get_closest_marker("alone") is not None, item.get_closest_marker("long") is None))


@pytest.fixture(autouse=True)
def _machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests share the machine, but for those that measure how fast something is: each of them has it alone."""
    if not hasattr(request.config, "workerinput"):
        yield
        return
    of_all_workers = tmp_path_factory.getbasetemp().parent
    is_alone = request.node.get_closest_marker("alone") is not None
    with (of_all_workers / "door").open("w") as door, (of_all_workers / "machine").open("w") as machine:
        # Whoever waits to be alone holds the door: otherwise others would come in for ever.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        if not is_alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        yield
        # To close them would not do: processes that were forked meanwhile have them open, too.
        fcntl.flock(machine, fcntl.LOCK_UN)
        fcntl.flock(door, fcntl.LOCK_UN)


@dataclass
class FakeProvider:
    """A running fake provider, seen through its own log."""

    process: Fork
    port: int
    log: Path

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def requests(self) -> list[dict[str, Any]]:
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def bill(self) -> Decimal:
        return sum((Decimal(request["usd"]) for request in self.requests), Decimal(0))

    def wait_for(self, number: int, seconds: float = 30) -> None:
        """Wait until so many requests are over, also on the provider's side."""
        deadline = time.monotonic() + seconds
        while len(self.requests) < number:
            assert time.monotonic() < deadline, f"{len(self.requests)} of {number} requests came"
            time.sleep(0.02)

    def hurry(self) -> None:
        """From now on, requests are answered at once."""
        self.log.with_name(f"{self.log.name}.hurry").touch()

    @property
    def gets(self) -> list[dict[str, Any]]:
        path = self.log.with_name(f"{self.log.name}.gets")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def stop(self) -> None:
        self.process.kill()


@dataclass
class Result:
    """What a call of the command line came to."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        document = json.loads(self.stdout, parse_float=Decimal)
        assert isinstance(document, dict)
        return document


@dataclass
class Workspace:
    """A folder with a job in it."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def job(self) -> Path:
        return self.folder / "job.yaml"

    @property
    def output(self) -> Path:
        return self.folder / "out.parquet"

    @property
    def ledger(self) -> Path:
        return self.folder / "job.ledger.sqlite"

    @property
    def in_flight(self) -> int:
        """Attempts that the ledger holds without an outcome."""
        if not self.ledger.exists():
            return 0
        with closing(sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True)) as db:
            try:
                number: int = db.execute("SELECT count(*) FROM attempt WHERE outcome IS NULL").fetchone()[0]
            except sqlite3.OperationalError:
                return 0
        return number

    def write_job(self, base_url: str = "http://127.0.0.1:9/v1", **keys: Any) -> None:
        """A job against a server; keys replace the defaults, None removes one. JSON is YAML."""
        job: dict[str, Any] = {
            "input": "in.csv",
            "prompt": "{{ prompt }}",
            "provider": {"name": "aimlapi", "base_url": base_url},
            "model": "anthropic/claude-sonnet-4",
            "parameters": {"max_tokens": 16},
            "concurrency": 8,
            "retry": {"max_seconds": 60},
            "output": "out.parquet",
        } | keys
        text = json.dumps({key: value for key, value in job.items() if value is not None}, indent=1)
        self.job.write_text(text, encoding="utf-8")

    def write_rows(self, prompts: list[str]) -> None:
        with (self.folder / "in.csv").open("w", newline="", encoding="utf-8") as fp:
            writer = csv.writer(fp)
            writer.writerow(["prompt"])
            writer.writerows([prompt] for prompt in prompts)

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "batchrun", *args]

    def environment(self) -> dict[str, str]:
        keep = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
        keep.pop("PYTHONUNBUFFERED", None)  # it would hide what is lost when the buffers are flushed at the end
        return keep | {"AIML_API_KEY": KEY} | self.env

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*args), cwd=self.folder, env=self.environment(), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def batchrun(self, *args: str, timeout: float = 120) -> Result:
        if "command" in vars(self):  # a test has put a program of its own there
            with self.start(*args) as process:
                stdout, stderr = process.communicate(timeout=timeout)
                return Result(process.returncode, stdout, stderr)
        result = Result(*forks().call(args, self.folder, self.environment(), timeout))
        if result.code == -signal.SIGKILL:
            pytest.fail(f"batchrun {args} did not end within {timeout} s:\n{result.stderr}")
        return result

    def run(self, *args: str, timeout: float = 120) -> Result:
        return self.batchrun("job.yaml", *args, timeout=timeout)

    def rows(self, path: Path | None = None) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(path or self.output).to_pylist()
        return rows

    def manifest(self) -> dict[str, Any]:
        metadata = pq.read_metadata(self.output).metadata
        document = json.loads(metadata[b"batchrun"], parse_float=Decimal)
        assert isinstance(document, dict)
        return document


@cache
def forks() -> Forks:
    return Forks()


def spent(rows: list[dict[str, Any]]) -> Decimal:
    """The dollars of some output rows, to the last digit."""
    return sum((Decimal(repr(row["usd_spent"])) for row in rows if row["usd_spent"] is not None), Decimal(0))


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    """An empty folder for a job."""
    folder = tmp_path / "work"
    folder.mkdir()
    return Workspace(folder)


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if there is room: for tests that write much, and bring their own disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 2**30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="batchrun-") as folder:
        yield Path(folder)


@pytest.fixture
def provide(tmp_path: Path) -> Iterator[Callable[..., FakeProvider]]:
    """Start fake providers; they end with the test."""
    with fake_providers(tmp_path) as start:
        yield start


@contextmanager
def fake_providers(folder: Path) -> Iterator[Callable[..., FakeProvider]]:
    """A function that starts fake providers, with their logs in a folder."""
    started: list[FakeProvider] = []

    def start(**options: Any) -> FakeProvider:
        log = folder / f"provider-{len(started)}.jsonl"
        out, err = log.with_suffix(".out"), log.with_suffix(".err")
        process = forks().start_function("tests.fake_provider:serve", out, err, log=str(log), options=options)
        deadline = time.monotonic() + 30
        while not (said := out.read_text() if out.exists() else "").endswith("\n"):
            assert process.is_alive and time.monotonic() < deadline, f"no provider: {err.read_text()}"
            time.sleep(0.002)
        provider = FakeProvider(process, int(said), log)
        started.append(provider)
        return provider

    try:
        yield start
    finally:
        for provider in started:
            provider.stop()
