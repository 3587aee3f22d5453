"""Lists of models and samples: a row of the output for each row of the input, model and sample."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from decimal import Decimal

from .conftest import FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]
MODELS = ["anthropic/claude-sonnet-4", "openai/gpt-5"]


def slots(work: Workspace) -> list[tuple[str, str, int]]:
    return [(row["prompt"], row["requested_model"], row["sample"]) for row in work.rows()]


def test_every_row_is_asked_of_each_model_as_often_as_it_says(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="credits")
    work.write_rows(["a", "b", "c"])
    work.write_job(provider.base_url, model=MODELS, samples=2)
    result = work.run("--json")
    assert result.code == 0, result.stderr
    assert slots(work) == [(prompt, model, sample) for prompt in "abc" for model in MODELS for sample in (0, 1)]
    assert len(provider.requests) == result.json["rows"] == result.json["ok"] == 12
    assert (result.json["input_rows"], result.json["model"]) == (3, MODELS)
    keys = {(row["prompt"], row["requested_model"]): row["request_key"] for row in work.rows()}
    assert len(set(keys.values())) == 6  # samples ask the same question
    assert provider.bill == spent(work.rows()) == result.json["usd_spent"]
    assert "12 ok, 0 failed, 0 pending of 12 rows" in result.stderr
    assert work.batchrun("verify", "job.yaml").code == 0


def test_one_model_and_one_sample_have_no_column_for_it(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url, model=MODELS[:1])
    assert work.run().code == 0
    assert "sample" not in work.rows()[0]


def test_killed_and_gone_on_with_no_slot_is_paid_for_twice(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.05, bill="credits", p500=0.1)
    work.write_rows([f"row {index}" for index in range(20)])
    work.write_job(provider.base_url, model=MODELS, samples=3, concurrency=6)
    chance = random.Random(3)
    for _ in range(4):
        with work.start("job.yaml") as process:
            provider.wait_for(len(provider.requests) + chance.randrange(5, 25))
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
    result = work.run("--json")
    assert (result.code, result.json["ok"]) == (0, 120), result.stderr
    # Only what was in flight when the process died was asked again.
    answered = [request for request in provider.requests if request["status"] == 200]
    assert 120 <= len(answered) <= 120 + 4 * 6
    assert len({(row["prompt"], row["requested_model"], row["sample"]) for row in work.rows()}) == 120
    assert work.batchrun("verify", "job.yaml").code == 0


def test_more_samples_ask_only_what_is_missing(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.2)
    work.write_rows(["a", "b", "c", "d"])
    work.write_job(provider.base_url, concurrency=1)
    with work.start("job.yaml") as process:
        provider.wait_for(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    asked = len(provider.requests)
    work.write_job(provider.base_url, model=MODELS, samples=2)
    result = work.run("--json")
    assert (result.code, result.json["ok"], result.json["unplaced"]) == (0, 16, 0)
    assert len(provider.requests) == 16
    assert sum(row["sample"] == 0 and row["requested_model"] == MODELS[0] for row in work.rows()) == 4
    assert asked >= 2


def test_a_model_that_is_taken_out_leaves_its_answers_unplaced(work: Workspace, provide: Provide) -> None:
    provider = provide(refuse_after=3)
    work.write_rows(["a", "b"])
    work.write_job(provider.base_url, model=MODELS, concurrency=1)
    assert work.run().code == 4
    assert [row["status"] for row in work.rows()] == ["ok", "ok", "ok", "pending"]
    work.write_job(provider.base_url, model=MODELS[:1], concurrency=1)
    result = work.run("--json")
    assert (result.json["ok"], result.json["unplaced"]) == (2, 1)
    assert result.json["usd_spent"] == provider.bill


def test_a_model_that_is_not_there_stops_its_own_rows_alone(work: Workspace, provide: Provide) -> None:
    provider = provide(withdrawn=[MODELS[1]])
    work.write_rows([f"row {index}" for index in range(60)])
    work.write_job(provider.base_url, model=MODELS, concurrency=4)
    result = work.run("--json")
    assert (result.code, result.json["reason"]) == (4, "refused")
    assert f"the first 20 rows of {MODELS[1]} were all refused" in result.stderr
    by_model = {model: [row["status"] for row in work.rows() if row["requested_model"] == model] for model in MODELS}
    assert by_model[MODELS[0]] == ["ok"] * 60
    assert by_model[MODELS[1]].count("failed") <= 25
    assert by_model[MODELS[1]].count("pending") >= 35
    # The other one is not asked again.
    work.run()
    assert sum(request["status"] == 200 for request in provider.requests) == 60


def test_one_model_of_the_cap_is_as_good_as_another(work: Workspace, provide: Provide) -> None:
    provider = provide(wordy=True)
    work.write_rows([f"row {index}" for index in range(200)])
    work.write_job(provider.base_url, model=MODELS, samples=2, budget={"usd": 0.02})
    result = work.run("--json")
    assert (result.code, result.json["reason"]) == (3, "budget"), result.stderr
    assert Decimal("0.015") < provider.bill <= Decimal("0.02")
    assert work.batchrun("verify", "job.yaml").code == 0


def test_check_estimates_all_models_together(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b"])
    work.write_job(provider.base_url, model=MODELS[0])
    one = work.batchrun("check", "job.yaml", "--json").json["estimate"]
    work.write_job(provider.base_url, model=MODELS, samples=3)
    result = work.batchrun("check", "job.yaml")
    assert f"models {', '.join(MODELS)}, 3 samples each" in result.stdout
    both = work.batchrun("check", "job.yaml", "--json").json["estimate"]
    assert abs(both["prompt_tokens"]["likely"] - 6 * one["prompt_tokens"]["likely"]) <= 6  # each is rounded


def test_the_local_server_has_one_model(work: Workspace) -> None:
    work.write_rows(["a"])
    work.write_job(provider="local", model=["smollm2-135m", "other"])
    result = work.run()
    assert result.code == 2
    assert "the provider local serves one model at a time" in result.stderr
