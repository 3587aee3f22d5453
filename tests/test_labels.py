"""Labels and schemas: asked for, read, checked, repaired, and put into typed columns."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]
LABELS = ["positive", "negative", "neutral"]


def says(*answers: str | list[str]) -> list[str]:
    """Prompts that the fake answers so; with a list, one after the other, as often as it is asked again."""
    return [f"{index} <<{json.dumps({'say': answer})}>>" for index, answer in enumerate(answers)]


def test_labels_come_back_typed_and_what_is_none_says_why(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True)
    work.write_rows(says("Positive.", "**negative**", "I cannot tell", "positive or negative", "neutral"))
    work.write_job(provider.base_url, labels=LABELS)
    result = work.run("--json")
    assert (result.code, result.json["reason"], result.json["ok"]) == (1, "parse_errors", 5)
    rows = work.rows()
    assert [row["label"] for row in rows] == ["positive", "negative", None, None, "neutral"]
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert [row["parse_error"] is None for row in rows] == [True, True, False, False, True]
    assert result.json["parse_errors"] == 2
    assert result.json["labels"] == {"positive": 1, "negative": 1, "neutral": 1}
    assert pq.read_schema(work.output).field("label").type == pa.dictionary(pa.int32(), pa.string())
    assert work.batchrun("verify", "job.yaml").code == 0
    # The AI/ML API is asked in words: not all of its models take a response_format.
    body = provider.requests[0]["body"]
    assert "response_format" not in body
    assert "positive\nnegative\nneutral" in body["messages"][0]["content"]


def test_a_provider_that_takes_it_is_sent_the_form(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True)
    work.write_rows(says('{"label": "neutral"}'))
    target = {"name": "openai", "base_url": provider.base_url}
    work.write_job(provider={**target}, labels=LABELS)
    work.env["OPENAI_API_KEY"] = "sk-x"
    assert work.run().code == 0
    sent = provider.requests[0]["body"]["response_format"]["json_schema"]
    assert (sent["strict"], sent["schema"]["properties"]["label"]["enum"]) == (True, LABELS)
    assert len(provider.requests[0]["body"]["messages"]) == 1
    assert work.rows()[0]["label"] == "neutral"
    work.write_job(provider={**target, "response_format": "json_object"}, labels=LABELS)
    assert work.run().code == 0
    last = provider.requests[-1]["body"]
    assert last["response_format"] == {"type": "json_object"}
    assert "JSON" in last["messages"][0]["content"]


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "stars": {"type": "integer"},
        "topics": {"type": "array", "items": {"type": "string"}},
        "tone": {"enum": ["warm", "cold"]},
        "sure": {"type": "boolean"},
        "deep": {"type": "object", "properties": {"x": {"type": "number"}}},
    },
    "required": ["stars"],
}


def test_a_schema_becomes_typed_columns_and_can_change_for_nothing(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True)
    work.write_rows(says(
        '```json\n{"stars": "4", "topics": ["a", "b"], "tone": "WARM", "sure": true, "deep": {"x": 1}}\n```',
        "{'stars': 2, 'topics': [],}", '{"stars": 1.5}',
    ))  # fmt: skip
    (work.folder / "schema.json").write_text(json.dumps(SCHEMA))
    work.write_job(provider.base_url, schema="schema.json")
    assert work.run().code == 1
    rows = work.rows()
    assert [row["stars"] for row in rows] == [4, 2, None]
    assert (rows[0]["topics"], rows[0]["tone"], rows[0]["sure"], rows[0]["deep"]) == (
        ["a", "b"],
        "warm",
        True,
        {"x": 1.0},
    )
    assert rows[2]["parse_error"]
    # The columns are made again, from what is there.
    changed = {
        **SCHEMA,
        "properties": {"stars": {"type": "number"}, "topics": {"type": "array", "items": {"type": "string"}}},
    }
    (work.folder / "schema.json").write_text(json.dumps(changed))
    asked = len(provider.requests)
    result = work.batchrun("export", "job.yaml", "--json")
    assert result.code == 0, result.stderr
    assert len(provider.requests) == asked
    assert [row["stars"] for row in work.rows()] == [4.0, 2.0, 1.5]
    assert "tone" not in work.rows()[0]
    assert (result.json["ok"], result.json["unplaced"], result.json["parse_errors"]) == (3, 0, 0)


def test_a_run_after_a_change_of_labels_says_what_it_asks_again(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True, refuse_after=2)
    work.write_rows(says("positive", "negative", "neutral"))
    work.write_job(provider.base_url, labels=LABELS, concurrency=1)
    assert work.run().code == 4
    work.write_job(provider.base_url, labels=[*LABELS, "mixed"], concurrency=1)
    result = work.run()
    assert "2 answers are to other requests than the job makes now; their rows will be asked and paid for again" in (
        result.stderr
    )


@pytest.mark.parametrize("reuse", [False, True])
def test_so_does_one_after_a_finished_run(work: Workspace, provide: Provide, reuse: bool) -> None:
    provider = provide()
    work.write_rows(says("positive", "negative", "neutral"))
    work.write_job(provider.base_url, labels=LABELS, reuse=reuse)
    first = work.run("--json").json
    work.write_job(provider.base_url, labels=[*LABELS, "mixed"], reuse=reuse)
    result = work.run("--json")
    assert f"3 answers of run {first['run_id']} are to other requests than the job makes now" in result.stderr
    assert (result.json["sent"], len(provider.requests)) == (3, 6)
    # With nothing changed there is nothing to say.
    assert "are to other requests" not in work.run().stderr


def test_what_did_not_parse_is_told_by_the_run_and_not_by_the_export(work: Workspace, provide: Provide) -> None:
    work.write_rows(says("hmm"))
    work.write_job(provide().base_url, labels=LABELS)
    assert work.run("--json").json["exit_code"] == 1
    exported = work.batchrun("export", "job.yaml", "--json")
    assert (exported.code, exported.json["exit_code"], exported.json["parse_errors"]) == (0, 0, 1)


def test_an_estimate_says_what_it_leaves_out(work: Workspace, provide: Provide) -> None:
    work.write_rows(says("positive"))
    work.write_job(provide().base_url, labels=LABELS, repair=2, reuse=True)
    checked = work.batchrun("check", "job.yaml").stdout
    assert "not in the estimate: up to 2 repairs of each row" in checked
    assert "not in the estimate: answers that are there already" in checked


def test_what_does_not_fit_is_asked_again_with_what_was_wrong(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True, bill="credits")
    work.write_rows(says(["no idea", "positive"], "negative", ["x", "y", "z"]))
    work.write_job(provider.base_url, labels=LABELS, repair=2)
    result = work.run("--json")
    assert (result.code, result.json["ok"], result.json["repairs"], result.json["parse_errors"]) == (1, 3, 3, 1)
    rows = work.rows()
    assert [row["label"] for row in rows] == ["positive", "negative", None]
    assert [row["attempts"] for row in rows] == [2, 1, 3]
    assert len(provider.requests) == 6
    assert provider.bill == spent(rows) == result.json["usd_spent"]
    again = next(request["body"]["messages"] for request in provider.requests if len(request["body"]["messages"]) == 4)
    assert [message["role"] for message in again] == ["system", "user", "assistant", "user"]
    assert "That does not fit: " in again[3]["content"]
    assert 0 < result.json["repair_usd"] < result.json["usd_spent"]
    assert len({row["request_key"] for row in rows}) == 3
    assert work.batchrun("verify", "job.yaml").code == 0


def test_repairs_go_on_after_a_kill_and_are_counted_to_the_digit(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True, latency=0.1, bill="credits")
    work.write_rows(says(*(["?", "??", LABELS[index % 3]] for index in range(12))))
    work.write_job(provider.base_url, labels=LABELS, repair=2, samples=2, concurrency=4)
    for _ in range(3):
        with work.start("job.yaml") as process:
            provider.wait_for(len(provider.requests) + 12)
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
    result = work.run("--json")
    assert result.json["unknown_outcomes"] <= 12
    assert result.json["pending"] == 0
    unknown = {row["client_request_id"] for row in _unknown(work)}
    known = [request for request in provider.requests if request["id"] not in unknown]
    assert sum(request["status"] == 200 for request in known) == result.json["attempts"] - len(unknown)
    assert sum(Decimal(request["usd"]) for request in known) == result.json["usd_spent"]
    assert result.json["repair_usd"] < result.json["usd_spent"]
    assert spent(work.rows()) == result.json["usd_spent"]
    verified = work.batchrun("verify", "job.yaml")
    assert verified.code == 0, verified.stdout


def _unknown(work: Workspace) -> list[dict[str, Any]]:
    import sqlite3

    db = sqlite3.connect(work.ledger)
    found = [{"client_request_id": name} for (name,) in db.execute(
        "SELECT client_request_id FROM attempt WHERE outcome = 'unknown'")]  # fmt: skip
    db.close()
    return found


def test_fewer_repairs_settle_what_was_to_be_asked_again(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True, refuse_after=2)
    work.write_rows(says("?", "??"))
    work.write_job(provider.base_url, labels=LABELS, repair=1, concurrency=1)
    first = work.run("--json")
    assert (first.code, first.json["pending"]) == (4, 1), first.stdout
    asked = len(provider.requests)
    work.write_job(provider.base_url, labels=LABELS, concurrency=1)
    result = work.run("--json")
    assert result.json["pending"] <= 1
    assert len(provider.requests) - asked <= 1
    assert work.batchrun("verify", "job.yaml").code == 0


def test_a_canary_stops_before_the_rest_is_asked(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True)
    work.write_rows(says(*["?"] * 200))
    work.write_job(provider.base_url, labels=LABELS, canary=20, max_error_rate=0.5, concurrency=32)
    result = work.run("--json")
    assert (result.code, result.json["reason"]) == (3, "error_rate"), result.stderr
    assert len(provider.requests) == 20
    assert "20 of the first 20 rows failed or did not parse" in result.stderr


def test_a_breaker_stops_a_run_that_turns_bad(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True)
    texts = ["positive"] * 150 + ["?"] * 300
    work.write_rows(says(*texts))
    work.write_job(provider.base_url, labels=LABELS, max_error_rate=0.2, concurrency=4)
    result = work.run("--json")
    assert (result.code, result.json["reason"]) == (3, "error_rate"), result.stderr
    assert 165 <= len(provider.requests) <= 180


def test_a_shift_of_the_labels_is_told(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True)
    for shares in ((40, 40), (70, 10)):
        texts = ["positive"] * shares[0] + ["negative"] * shares[1]
        work.write_rows(says(*texts))
        work.write_job(provider.base_url, labels=LABELS)
        result = work.run("--json")
        assert result.code == 0
    (warning,) = result.json["warnings"]
    assert "positive 50% → 88%" in warning
    assert f"warning: {warning}" in result.stderr


def test_faults_of_labels_and_schemas_are_told_before_anything_is_sent(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"labels": ["a", "A"]}, "labels"),
        ({"labels": []}, "labels"),
        ({"labels": ["a", 1]}, "is no text"),
        ({"labels": ["a"], "schema": {"type": "object"}}, "exclude each other"),
        ({"schema": {"type": "nothing"}}, "schema"),
        ({"schema": "nowhere.json"}, "cannot be read"),
        ({"schema": {"type": "object", "properties": {"status": {"type": "string"}}}}, "answer_prefix"),
        ({"repair": 1}, "needs labels or a schema"),
        ({"canary": 5}, "canary needs max_error_rate"),
        ({"evaluate": {"expected": "gold"}}, "there is no column 'gold'"),
        ({"evaluate": {"expected": "prompt", "answer": "x"}}, "there is no 'x'"),
        ({"evaluate": {"expected": "prompt", "metrics": ["guess"]}}, "metrics"),
    ]
    for keys, told in cases:
        work.write_job(**keys)
        result = work.run()
        assert (result.code, told in result.stderr) == (2, True), (keys, result.stderr)


def test_a_repair_stays_with_its_answer_wherever_the_row_goes(work: Workspace, provide: Provide) -> None:
    (row,) = says(["hmm", "hmm", "positive"])
    provider = provide(refuse_after=1)
    work.write_rows([row])
    work.write_job(provider.base_url, labels=LABELS, repair=2, concurrency=1)
    assert work.run().code == 4
    bill = provider.bill
    for limit, rows in ((1, ['above <<{"say": "neutral"}>>', row]), (None, [*says("neutral"), row, "below"])):
        provider.stop()
        provider = provide(port=provider.port, **({"refuse_after": limit} if limit else {}))
        work.write_rows(rows)
        result = work.run("--json")
        bill += provider.bill
        assert result.json["usd_spent"] == bill, result.stderr
        assert work.batchrun("verify", "job.yaml").code == 0
    assert [row["label"] for row in work.rows()][1] == "positive"
    # All three of its answers are paid for in its row.
    assert work.rows()[1]["attempts"] >= 3
    assert result.json["repairs"] >= 2


@pytest.mark.parametrize("concurrency", [1, 2])
def test_what_is_salvaged_goes_on_where_a_repair_was_wanted(
    work: Workspace, provide: Provide, concurrency: int
) -> None:
    provider = provide(refuse_after=2)
    work.write_rows(says(["hmm", "hmm", "positive"], ["hm", "hm", "negative"]))
    work.write_job(provider.base_url, labels=LABELS, repair=3, concurrency=concurrency)
    assert work.run().code == 4
    lose_first_answer(work)
    provider.stop()
    provide(port=provider.port)
    result = work.run("--json")
    assert (result.code, result.json["ok"]) == (0, 2), result.stderr
    assert work.batchrun("verify", "job.yaml").code == 0


def test_more_repairs_are_made_where_an_answer_is_lost(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(says(["hmm", "hm", "positive"]))
    work.write_job(provider.base_url, labels=LABELS, repair=1)
    assert work.run().code == 1
    lose_first_answer(work)
    work.write_job(provider.base_url, labels=LABELS, repair=3)
    result = work.run("--retry-failed", "--json")
    # The provider answers by the conversation, in which the lost answer is missing.
    assert (result.code, result.json["repairs"], len(provider.requests)) == (0, 3, 4), result.stderr
    assert work.batchrun("verify", "job.yaml").code == 0


def lose_first_answer(work: Workspace) -> None:
    with closing(sqlite3.connect(work.ledger)) as db, db:
        db.execute("UPDATE attempt SET latency_us = 1 WHERE attempt_id = 1")
    assert work.batchrun("salvage", "job.yaml").code == 1


def test_more_repairs_are_made_for_answers_that_are_there_if_they_are_wanted(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(says(["hmm", "positive"], "negative"))
    work.write_job(provider.base_url, labels=LABELS)
    assert work.run().code == 1
    work.write_job(provider.base_url, labels=LABELS, repair=1, reuse=True)
    # What was taken for nothing is asked again by a user's word alone.
    result = work.run("--json")
    assert (result.code, result.json["sent"], result.json["parse_errors"]) == (1, 0, 1)
    result = work.run("--json", "--retry-failed")
    assert (result.code, result.json["sent"], result.json["parse_errors"]) == (0, 2, 0)
    # And so is an answer of the run's own.
    work.write_rows(says(["ha", "ha", "neutral"]))
    work.write_job(provider.base_url, labels=LABELS)
    assert work.run().code == 1
    work.write_job(provider.base_url, labels=LABELS, repair=2)
    result = work.run("--json", "--retry-failed")
    assert (result.code, result.json["sent"], result.json["repairs"]) == (0, 2, 2)
    assert work.rows()[0]["label"] == "neutral"


def test_a_stopped_breaker_lets_no_more_through_than_are_in_flight(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(says(*["hmm"] * 100, *["positive"] * 100))
    work.write_job(provider.base_url, labels=LABELS, canary=20, max_error_rate=0.1, concurrency=4)
    asked = []
    for _ in range(3):
        result = work.run("--json")
        assert (result.code, result.json["reason"]) == (3, "error_rate")
        asked.append(result.json["sent"])
    assert asked == [20, 4, 4]
    # Without the limit it goes on to the end.
    work.write_job(provider.base_url, labels=LABELS, concurrency=4)
    assert work.run().code == 1
    assert len(provider.requests) == 200


def test_a_canary_counts_rows_with_all_their_samples(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(says(*["hmm"] * 30))
    work.write_job(provider.base_url, labels=LABELS, canary=5, max_error_rate=0.1, samples=3)
    assert work.run().code == 3
    assert len(provider.requests) == 15


def test_a_repair_is_asked_for_in_the_form_that_was_asked_for(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True)
    work.write_rows(says(["hmm", '{"label": "positive"}']))
    work.env["OPENAI_API_KEY"] = "sk-x"
    work.write_job(provider={"name": "openai", "base_url": provider.base_url}, labels=LABELS, repair=1)
    assert work.run().code == 0
    assert '"enum":["positive","negative","neutral"]' in provider.requests[-1]["body"]["messages"][-1]["content"]


def test_a_property_named_like_another_column_is_refused(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    schema = {"type": "object", "properties": {"vote": {"type": "string"}, "n": {"type": "integer"}}}
    work.write_job(provider.base_url, schema=schema, samples=2)
    result = work.run()
    assert result.code == 2
    assert "'vote'" in result.stderr
    assert provider.requests == []


def test_a_vote_has_the_type_of_what_it_is_about(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(says('{"ok": true}'))
    work.write_job(provider.base_url, schema={"properties": {"ok": {"type": "boolean"}}}, samples=2)
    assert work.run().code == 0
    assert [row["vote"] for row in work.rows()] == [True, True]
    work.write_rows(says('{"xs": ["a"]}'))
    schema = {"properties": {"xs": {"type": "array", "items": {"type": "string"}}}}
    work.write_job(provider.base_url, schema=schema, samples=2)
    assert work.run().code == 0
    assert [row["vote"] for row in work.rows()] == [["a"], ["a"]]


def test_free_text_is_no_label_and_an_enum_in_an_object_is(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(says(*(f'{{"mood": "good", "why": "{index}"}}' for index in range(3))))
    schema = {"properties": {"mood": {"enum": ["good", "bad"]}, "why": {"type": "string"}}}
    work.write_job(provider.base_url, schema=schema)
    assert work.run("--json").json["labels"] == {"good": 3}
    work.write_job(provider.base_url, schema={"type": "string"})
    assert work.run("--json").json["labels"] == {}


def test_an_output_is_verified_by_what_it_was_written_by(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(says("positive"))
    work.write_job(provider.base_url, labels=LABELS)
    assert work.run().code == 0
    work.write_job(provider.base_url, labels=[*LABELS, "mixed"])
    assert work.batchrun("export", "job.yaml").code == 0
    result = work.batchrun("verify", "job.yaml")
    assert (result.code, "has changed" in result.stdout) == (0, False), result.stdout
    work.write_job(provider.base_url, labels=LABELS)
    result = work.batchrun("verify", "job.yaml")
    assert (result.code, "the job file has changed since (labels)" in result.stdout) == (0, True), result.stdout
