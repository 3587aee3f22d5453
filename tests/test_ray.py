"""The same job on the workers of a Ray cluster: what is sent, what is lost, and who is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import batchrun

from .conftest import KEY, FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (uv run --group ray)"
)


class Cluster:
    """Nodes of a Ray cluster on this machine."""

    def __init__(self, nodes: int, cpus: float = 2, **environment: str) -> None:
        script = Path(__file__).with_name("cluster.py")
        env = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
        env |= {"AIML_API_KEY": KEY, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"} | environment
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(nodes), str(cpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=env, start_new_session=True,
        )  # fmt: skip
        self.address, session = self._line().split()
        self.session = Path(session)

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self._line() == "done"

    def stop(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with_group(self.process.pid)
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def with_group(pid: int) -> None:
    """End what is left of a process and all that it has started."""
    for found in _processes():
        if found.session == pid:
            with suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)


class _Found:
    def __init__(self, folder: Path) -> None:
        self.pid = int(folder.name)
        self.command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        self.parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        self.session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])


def _processes() -> list[_Found]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append(_Found(folder))
        except (OSError, IndexError):
            continue
    return found


def workers_of(cluster: Cluster) -> list[int]:
    """Processes of batchrun's workers in a cluster."""
    return [
        one.pid for one in _processes() if one.session == cluster.process.pid and one.command.startswith("ray::Worker")
    ]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes that stay."""
    started = Cluster(2)
    yield started
    started.stop()


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    """Clusters of a test's own."""
    started: list[Cluster] = []

    def make(*args: Any, **kwargs: Any) -> Cluster:
        started.append(Cluster(*args, **kwargs))
        return started[-1]

    yield make
    for one in started:
        one.stop()


def engine(cluster: Cluster, **more: Any) -> dict[str, Any]:
    return {"name": "ray", "address": cluster.address, "worker_cpus": 0.5} | more


def call(work: Workspace, *args: str) -> Any:
    """The command line in a process of its own: Ray bears no fork."""
    with work.start("job.yaml", *args) as process:
        return ended(process)


def ended(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, Any, str]:
    """Exit code, summary and talk of a process that must come to its end."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert "Traceback" not in stderr, stderr
    return process.returncode, (json.loads(stdout, parse_float=Decimal) if stdout else None), stderr


NOT_THE_SAME = ["run_id", "client_request_id", "request_id", "latency_seconds", "finished_at"]


def same(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.drop(columns=[name for name in NOT_THE_SAME if name in frame])
    return frame.assign(error=frame["error"].str.replace(r" \[request .*", "", regex=True))


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
def test_the_same_job_gives_the_same_parquet(
    work: Workspace, provide: Provide, cluster: Cluster, streamed: bool
) -> None:
    noise = random.Random(7)
    prompts = []
    for number in range(150):
        script: dict[str, Any] = {"say": noise.choice(["yes", "grün 🎈", "", "a\nb", "x" * 3000])}
        if noise.random() < 0.2:
            script["fail"] = [noise.choice([500, 429, 400])]
        prompts.append(f"row {number} <<{json.dumps(script)}>>")
    work.write_rows(prompts)
    outputs, bills = [], []
    for name in ("local", "ray"):
        provider = provide(bill="none" if streamed else "meta", retry_after=0.1)
        how = engine(cluster, workers=2) if name == "ray" else "local"
        work.write_job(
            provider.base_url, engine=how, stream=streamed, name=name, output=f"{name}.parquet", concurrency=16,
            prices={"input_mtok": 3, "output_mtok": 15},
        )  # fmt: skip
        code, summary, stderr = call(work, "--json")
        assert code == 1, stderr
        assert summary["usd_spent"] == spent(work.rows(work.folder / f"{name}.parquet"))
        frame = pd.read_parquet(work.folder / f"{name}.parquet")
        if streamed:
            frame["first_token_seconds"] = frame["first_token_seconds"].notna()
        outputs.append(same(frame))
        bills.append(provider.bill)
        assert work.batchrun("verify", "job.yaml").code == 0
    # The keys are those of the addresses, which differ by their ports.
    pd.testing.assert_frame_equal(*(output.drop(columns="request_key") for output in outputs))
    assert bills[0] == bills[1]


def test_a_cluster_for_the_run_alone(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="meta")
    work.write_rows([f"row {number}" for number in range(20)])
    work.write_job(provider.base_url)
    began = time.monotonic()
    code, summary, stderr = call(work, "--engine", "ray", "--json")
    assert (code, summary["ok"], summary["usd_spent"]) == (0, 20, provider.bill), stderr
    assert "1 of 1 workers have begun" in stderr
    assert time.monotonic() - began < 120
    # Without it, the job is as it was: the engine shapes no request.
    work.write_rows([f"row {number}" for number in range(21)])
    work.write_job(provider.base_url, reuse=True)
    code, summary, stderr = call(work, "--json")
    assert (code, summary["sent"]) == (0, 1), stderr


def test_a_cap_and_the_bound_hold_over_all_workers(work: Workspace, provide: Provide, cluster: Cluster) -> None:
    provider = provide(bill="meta", latency=0.05)
    work.write_rows([f"row {number}" for number in range(200)])
    budget = {"usd": "0.003"}
    work.write_job(provider.base_url, engine=engine(cluster, workers=3), concurrency=6, budget=budget)
    code, summary, stderr = call(work, "--json")
    assert (code, summary["reason"]) == (3, "budget"), stderr
    assert summary["usd_spent"] == provider.bill <= Decimal("0.003")
    assert 0 < summary["ok"] < 200
    assert 1 < max(request["in_flight"] for request in provider.requests) <= 6


def test_a_rate_and_a_pause_hold_over_all_workers(work: Workspace, provide: Provide, cluster: Cluster) -> None:
    provider = provide(bill="meta")
    work.write_rows([f"row {number}" for number in range(12)])
    how = {"engine": engine(cluster, workers=3), "concurrency": 6}
    work.write_job(provider.base_url, **how, requests_per_minute=120)
    code, _, stderr = call(work, "--json")
    assert code == 0, stderr
    came = [request["came"] for request in provider.requests]
    # One every half second, after the first two; on its way, one may be later than the next.
    assert max(came) - min(came) > 0.5 * 10 - 0.4
    provider = provide(bill="meta", retry_after=3)
    work.write_rows([f'limit {number} <<{{"fail": [429]}}>>' for number in range(40)])
    work.write_job(provider.base_url, **how)
    code, summary, stderr = call(work, "--json")
    assert (code, summary["usd_spent"]) == (0, provider.bill), stderr
    came = sorted(request["came"] for request in provider.requests)
    # Refused, no worker asks: neither the same rows nor others.
    first = next(index for index, (one, other) in enumerate(pairwise(came)) if other - one > 2)
    assert first < 30


def test_python_calls_it_and_breaks_it_off_before_it_has_begun(
    work: Workspace, provide: Provide, cluster: Cluster
) -> None:
    provider = provide(bill="meta")
    work.write_rows(["a", "b", "c"])
    work.write_job(provider.base_url, engine=engine(cluster))
    script = work.folder / "call.py"
    script.write_text(
        "import os, signal, threading, time, batchrun\n"
        "result = batchrun.run('job.yaml')\n"
        "assert (result.ok, result.pending, result.reason) == (3, 0, None), result\n"
        "started = time.monotonic()\n"
        "full = {'engine.worker_cpus': 900, 'engine.start_seconds': 300}\n"
        "threading.Timer(8, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    batchrun.run('job.yaml', overrides=full, new=True)\n"
        "except KeyboardInterrupt:\n"
        "    assert 7 < time.monotonic() - started < 60\n"
        "    print('interrupted')\n",
        encoding="utf-8",
    )
    found = subprocess.run(
        [sys.executable, script.name], cwd=work.folder, env=work.environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (0, "interrupted\n"), found.stderr
    assert len(provider.requests) == 3


def test_workers_that_are_killed_lose_nothing_but_the_knowledge(
    work: Workspace, provide: Provide, cluster: Cluster
) -> None:
    provider = provide(bill="meta", latency=0.05)
    work.write_rows([f"row {number}" for number in range(600)])
    budget = {"usd": 1}
    work.write_job(provider.base_url, engine=engine(cluster, workers=2), concurrency=16, budget=budget)
    with work.start("job.yaml", "--json") as process:
        for count in (60, 200, 350):
            provider.wait_for(count, 120)
            victims = workers_of(cluster)
            if victims:
                os.kill(random.choice(victims), signal.SIGKILL)
        code, summary, stderr = ended(process)
    assert code == 0, said(stderr)
    assert summary["ok"] == 600
    assert summary["unknown_outcomes"] > 0
    assert "was lost" in stderr
    check_bill(work, provider, summary)


def said(stderr: str) -> str:
    """What batchrun has said, without Ray's own words."""
    return "\n".join(line for line in stderr.splitlines() if line.startswith("batchrun:"))


def check_bill(work: Workspace, provider: FakeProvider, summary: dict[str, Any]) -> None:
    """What the provider billed beyond what we know is what we say that nobody knows."""
    rows = work.rows()
    assert {row["status"] for row in rows} == {"ok"}
    assert spent(rows) == summary["usd_spent"]
    unknown = provider.bill - summary["usd_spent"]
    assert 0 <= unknown <= summary["unknown_usd_at_most"]
    answered = len(rows)
    assert len(provider.requests) <= answered + summary["unknown_outcomes"]
    assert work.batchrun("verify", "job.yaml").code == 0


def test_a_node_that_goes_takes_its_workers_with_it(
    work: Workspace, provide: Provide, make_cluster: Callable[..., Cluster]
) -> None:
    cluster = make_cluster(2)
    provider = provide(bill="meta", latency=0.05)
    work.write_rows([f"row {number}" for number in range(500)])
    work.write_job(provider.base_url, engine=engine(cluster, workers=2), concurrency=16)
    with work.start("job.yaml", "--json") as process:
        provider.wait_for(100, 120)
        cluster.tell("kill")
        code, summary, stderr = ended(process)
    assert code == 0, said(stderr)
    assert (summary["ok"], "was lost" in stderr) == (500, True), said(stderr)
    check_bill(work, provider, summary)


def test_a_cluster_that_is_gone_is_an_error_and_the_ledger_is_whole(
    work: Workspace, provide: Provide, make_cluster: Callable[..., Cluster]
) -> None:
    cluster = make_cluster(1)
    provider = provide(bill="meta", latency=0.1)
    work.write_rows([f"row {number}" for number in range(300)])
    work.write_job(provider.base_url, engine=engine(cluster, start_seconds=15), concurrency=8)
    with work.start("job.yaml", "--json") as process:
        provider.wait_for(40, 120)
        cluster.tell("gone")
        code, summary, stderr = ended(process)
    assert code == 4, stderr
    assert (summary["reason"], summary["exit_code"]) == ("cluster", 4), (summary, stderr)
    assert "cluster" in stderr
    assert summary["ok"] > 0
    # It goes on without it.
    provider.hurry()
    code, after, stderr = call(work, "--engine", "local", "--json")
    assert (code, after["ok"]) == (0, 300), stderr
    check_bill(work, provider, after)


def test_the_head_is_killed_and_goes_on(work: Workspace, provide: Provide, cluster: Cluster) -> None:
    provider = provide(bill="meta", latency=0.1)
    work.write_rows([f"row {number}" for number in range(200)])
    work.write_job(provider.base_url, engine=engine(cluster), concurrency=8)
    with work.start("job.yaml") as process:
        provider.wait_for(30, 120)
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 60
    while workers_of(cluster):
        assert time.monotonic() < deadline, "the workers of a head that is gone go on"
        time.sleep(0.1)
    provider.hurry()
    code, summary, stderr = call(work, "--json")
    assert (code, summary["ok"]) == (0, 200), stderr
    assert 0 < summary["unknown_outcomes"] <= 8
    check_bill(work, provider, summary)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_awaits_what_is_in_flight(
    work: Workspace, provide: Provide, cluster: Cluster, number: signal.Signals
) -> None:
    provider = provide(bill="meta", latency=0.5)
    work.write_rows([f"row {count}" for count in range(60)])
    work.write_job(provider.base_url, engine=engine(cluster), concurrency=4)
    with work.start("job.yaml", "--json") as process:
        provider.wait_for(4, 120)
        process.send_signal(number)
        code, summary, stderr = ended(process)
    assert code == 128 + number, stderr
    assert (summary["unknown_outcomes"], summary["ok"]) == (0, len(provider.requests))
    assert summary["usd_spent"] == provider.bill


def test_a_signal_while_it_connects_ends_it(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url, engine="ray")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with work.start("job.yaml") as process:
            deadline = time.monotonic() + 60
            while not any("gcs_server" in one.command and one.parent == process.pid for one in _processes()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)
            found, _, stderr = ended(process)
        assert found == code, stderr


@pytest.mark.parametrize(
    ("keys", "code", "said"),
    [
        ({"engine": {"name": "ray", "address": "127.0.0.1:9", "start_seconds": 5}}, 4, "that can be reached"),
        ({"engine": {"name": "ray", "address": "ray://127.0.0.1:10001"}}, 2, "call batchrun on a node of it"),
        ({"engine": {"name": "ray", "worker_cpus": 1.5}}, 2, "should be a part of 1"),
        ({"engine": {"name": "spark"}}, 2, "engine.name"),
        ({"engine": {"workers": 3}}, 2, "is for the engine ray"),
        (
            {"engine": {"name": "ray", "runtime_env": {"env_vars": {"MY_API_KEY": "x"}}}},
            2,
            "writes these into its logs",
        ),
        ({"engine": "ray", "provider": "local", "model": "smollm2-135m"}, 2, "set engine: local"),
    ],
    ids=["nobody there", "client", "cpus", "no engine", "local with workers", "secret", "local model"],
)
def test_what_is_wrong_is_named_before_anything_is_sent(
    work: Workspace, provide: Provide, keys: dict[str, Any], code: int, said: str
) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url, **keys)
    found, document, stderr = call(work, "--json")
    assert (found, said in stderr) == (code, True), stderr
    assert document["exit_code"] == code
    assert provider.requests == []


def test_a_cluster_without_room_is_told(work: Workspace, provide: Provide, cluster: Cluster) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url, engine=engine(cluster, worker_cpus=900, start_seconds=15))
    code, document, stderr = call(work, "--json")
    assert (code, "no worker has begun within 15 s" in stderr) == (4, True), stderr
    assert (document["reason"], provider.requests) == ("cluster", [])


def test_a_node_with_another_key_is_refused(
    work: Workspace, provide: Provide, make_cluster: Callable[..., Cluster]
) -> None:
    provider = provide()
    work.write_rows(["a"])
    cluster = make_cluster(1, AIML_API_KEY="another-key-than-ours")
    work.write_job(provider.base_url, engine=engine(cluster))
    code, _, stderr = call(work)
    assert (code, "would ask with another key" in stderr) == (2, True), stderr
    assert "another-key" not in stderr
    assert provider.requests == []


def test_a_node_with_another_batchrun_is_refused(
    work: Workspace, provide: Provide, make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    provider = provide()
    work.write_rows(["a"])
    other = tmp_path / "other"
    package = Path(batchrun.__file__).parent
    subprocess.run(["cp", "-r", str(package), str(other)], check=True)
    (tmp_path / "batchrun").symlink_to(other)
    init = other / "__init__.py"
    init.write_text(re.sub(r'__version__ = "[^"]+"', '__version__ = "0.0.9"', init.read_text()))
    cluster = make_cluster(1, PYTHONPATH=str(tmp_path))
    work.write_job(provider.base_url, engine=engine(cluster))
    code, _, stderr = call(work)
    assert (code, "has batchrun 0.0.9 (" in stderr) == (2, True), stderr
    assert provider.requests == []


@pytest.mark.slow
def test_a_wheel_is_shipped_to_nodes_with_another_batchrun(
    work: Workspace, provide: Provide, make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    root = Path(batchrun.__file__).parent.parent
    subprocess.run(["uv", "build", "--quiet", "--wheel", "--out-dir", str(work.folder / "dist"), str(root)], check=True)
    (wheel,) = (work.folder / "dist").glob("*.whl")
    (tmp_path / "batchrun").mkdir()
    (tmp_path / "batchrun" / "__init__.py").write_text('__version__ = "0.0.9"\n')
    cluster = make_cluster(1, PYTHONPATH=str(tmp_path))
    work.write_rows(["a", "b"])
    provider = provide()
    work.write_job(provider.base_url, engine=engine(cluster))
    code, _, stderr = call(work)
    assert (code, "install batchrun with all that it needs on every node" in stderr) == (2, True), stderr
    # Its path is relative to the job file.
    shipped = {"py_modules": [f"dist/{wheel.name}"]}
    work.write_job(provider.base_url, engine=engine(cluster, runtime_env=shipped))
    code, summary, stderr = call(work, "--json")
    assert (code, summary["ok"]) == (0, 2), stderr


def test_the_key_is_in_no_file_of_ray(work: Workspace, provide: Provide, cluster: Cluster) -> None:
    work.write_rows(["a", "b"])
    work.write_job(provide().base_url, engine=engine(cluster))
    code, _, stderr = call(work)
    assert code == 0, stderr
    read = 0
    for path in cluster.session.rglob("*"):
        if path.is_file():
            read += 1
            assert KEY.encode() not in path.read_bytes(), path
    assert read > 5
    for one in _processes():
        assert KEY not in one.command


@pytest.mark.slow
def test_twenty_thousand_rows_while_workers_and_a_node_are_killed(
    work: Workspace, provide: Provide, make_cluster: Callable[..., Cluster]
) -> None:
    cluster = make_cluster(2)
    chance = random.Random(5)
    provider = provide(bill="meta", p429=0.01, p500=0.01, latency=0.02, seed=5)
    work.write_rows([f"row {number}" for number in range(20_000)])
    work.write_job(
        provider.base_url,
        engine=engine(cluster, workers=3),
        concurrency=64,
        budget={"usd": 20},
        retry={"max_seconds": 300},
    )
    with work.start("job.yaml", "--json") as process:
        for count in range(1500, 18_000, 1500):
            provider.wait_for(count, 300)
            if count == 9000:
                cluster.tell("kill")
            elif victims := workers_of(cluster):
                os.kill(chance.choice(victims), signal.SIGKILL)
        code, summary, stderr = ended(process, 900)
    assert code == 0, said(stderr)
    assert summary["ok"] == 20_000
    assert summary["unknown_outcomes"] > 0
    assert provider.bill <= 20
    rows = work.rows()
    assert spent(rows) == summary["usd_spent"]
    assert 0 <= provider.bill - summary["usd_spent"] <= summary["unknown_usd_at_most"]
    assert work.batchrun("verify", "job.yaml", timeout=300).code == 0
