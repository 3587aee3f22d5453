"""Over runs of every kind, what is counted is the provider's bill to the last digit."""

from __future__ import annotations

import csv
import random
import signal
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from .accounting import assert_reconciled, taken
from .conftest import SONNET, FakeProvider, Workspace

Provide = Callable[..., FakeProvider]
FAILURES = {"p400": 0.02, "p429": 0.02, "p500": 0.02, "p_hangup": 0.02, "p_half": 0.01, "p_silent": 0.01}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("models", [[SONNET], None], ids=["listed", "estimated"])
def test_the_books_are_the_bill(
    work: Workspace, provide: Provide, streamed: bool, models: list[dict[str, Any]] | None
) -> None:
    """Reported dollars, credits only, headers only, estimates (without a list), unknown outcomes, rows that go."""
    provider = provide(models=models, bill="mix", seed=3, latency=0.01, **FAILURES)
    prompts = [f"row {index}" for index in range(150)]
    work.write_rows(prompts)
    work.write_job(provider.base_url, stream=streamed, retry={"max_attempts": 2}, timeout_seconds=2)
    process = work.start("job.yaml")
    provider.wait_for(40, seconds=60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    work.write_rows([*prompts[30:], "a new one"])  # so that answers lose their rows
    assert work.run().code in (0, 1)
    assert work.manifest()["unplaced_usd"] > 0
    assert_reconciled(work, provider)
    assert work.batchrun("verify", "job.yaml").code == 0
    # And once the provider's log was asked, nothing is left that differs.
    result = work.batchrun("reconcile", "job.yaml", "--settle-after", "0")
    assert result.code == 0, result.stderr
    assert work.manifest()["usd_spent"] == provider.bill
    assert_reconciled(work, provider)
    assert work.batchrun("verify", "job.yaml").code == 0


def storm(work: Workspace, provide: Provide, seed: int, rows: int, concurrency: int, **options: Any) -> None:
    """A capped job through failures, kills and rivals: the bill never exceeds the cap, and the cap is used up."""
    chance = random.Random(seed)
    with (work.folder / "in.csv").open("w", newline="", encoding="utf-8") as fp:
        writer = csv.writer(fp)
        writer.writerow(["prompt", "n"])
        writer.writerows(
            (f"row {index} " + "x" * chance.randrange(300), chance.randrange(1, 400)) for index in range(rows)
        )
    options = {"bill": "mix", "wordy": True, "seed": seed} | options
    keys = {
        "input": {"path": "in.csv", "columns": {"n": "int64"}}, "parameters": {"max_tokens": "{{ n }}"},
        "concurrency": concurrency, "timeout_seconds": 3,
    }  # fmt: skip
    whole = provide(**options)
    work.write_job(whole.base_url, **keys)
    assert work.run().code == 0
    for path in (work.ledger, work.output):
        path.unlink()
    cap = round(whole.bill * Decimal("0.37"), 4)
    provider = provide(**options, latency=0.05, **FAILURES)
    work.write_job(provider.base_url, **keys, budget={"usd": float(cap)})
    for _ in range(4):
        processes = [work.start("job.yaml"), work.start("job.yaml")]
        enough = len(provider.requests) + chance.randrange(1, max(2, rows // 16))
        deadline = time.monotonic() + 60
        while len(provider.requests) < enough and time.monotonic() < deadline:
            if all(process.poll() is not None for process in processes):
                break
            time.sleep(0.02)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.communicate()
            assert process.returncode in (-signal.SIGKILL, 3, 5)
        assert provider.bill <= cap
        assert taken(work) <= cap
    result = work.run("--json")
    assert result.code == 3, result.stderr
    assert provider.bill <= cap
    # By the dearest of the rates that are reserved by, those of the library with its factor.
    dearest = ((400 + 16 + 32 + 200) * Decimal("6e-6") + 400 * Decimal("15e-6") + Decimal("0.0000025")) * Decimal("1.5")
    assert cap - dearest < taken(work) <= cap
    assert_reconciled(work, provider)
    assert work.batchrun("verify", "job.yaml").code == 0
    work.write_job(provider.base_url, **keys)
    assert work.run().code == 1  # those that were refused with 400
    assert_reconciled(work, provider)
    assert work.batchrun("verify", "job.yaml").code == 0


def test_a_cap_weathers_a_storm(work: Workspace, provide: Provide) -> None:
    storm(work, provide, seed=0, rows=200, concurrency=50)


@pytest.mark.parametrize("bill", ["mix", "none"])
def test_a_cap_holds_where_the_cost_is_only_derived(work: Workspace, provide: Provide, bill: str) -> None:
    """The provider charges 1.3 of what the library says, and tells it now and then or never."""
    storm(work, provide, seed=1, rows=120, concurrency=30, bill=bill, models=None)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_cap_weathers_five_storms_of_2000_rows(work: Workspace, provide: Provide, seed: int) -> None:
    storm(work, provide, seed, rows=2000, concurrency=200)


@pytest.mark.slow
def test_reconcile_walks_a_long_log(work: Workspace, provide: Provide, tmp_path: Path) -> None:
    provider = provide(p_hangup=0.1, log_429=7)
    work.write_rows([f"row {index}" for index in range(5000)])
    work.write_job(provider.base_url, concurrency=100)
    assert work.run().code in (0, 1)
    result = work.batchrun("reconcile", "job.yaml", "--json", "--settle-after", "0")
    assert result.code == 0, result.stderr
    assert result.json["billed"] > 300
    assert provider.bill == work.manifest()["usd_spent"]
