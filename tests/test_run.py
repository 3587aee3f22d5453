"""A whole run through the command line, against the fake provider."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.money import usd_text

from .conftest import KEY, FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]


def test_every_row_is_answered_and_the_bill_is_the_servers(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True)
    work.write_rows([f"question {number} – ünïcødé 😀" for number in range(30)])
    work.write_job(provider.base_url)
    result = work.run("--json")
    assert result.code == 0, result.stderr
    rows = work.rows()
    assert [row["response"] for row in rows] == [f"answer to: {row['prompt']}" for row in rows]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["cost_source"] for row in rows} == {"reported"}
    assert {row["requested_model"] for row in rows} == {"anthropic/claude-sonnet-4"}
    assert {row["model"] for row in rows} == {"anthropic/claude-sonnet-4-20250514"}
    assert all(row["total_tokens"] == row["prompt_tokens"] + row["completion_tokens"] for row in rows)
    assert spent(rows) == provider.bill == result.json["usd_spent"] == work.manifest()["usd_spent"]
    assert [row["client_request_id"] for row in rows] == [
        request["id"] for request in sorted(provider.requests, key=lambda request: int(request["id"].split(":")[1]))
    ]
    assert all(request["headers"]["authorization"] == f"Bearer {KEY}" for request in provider.requests)
    assert "30 ok, 0 failed, 0 pending of 30 rows" in result.stderr


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bill", ["meta", "credits", "header"])
def test_cost_is_exact_wherever_it_is_reported(work: Workspace, provide: Provide, bill: str, stream: bool) -> None:
    provider = provide(bill=bill)
    work.write_rows([f"question {number}" for number in range(12)])
    work.write_job(provider.base_url, stream=stream)
    assert work.run().code == 0
    rows = work.rows()
    assert spent(rows) == provider.bill
    assert {row["cost_source"] for row in rows} == {"credits" if bill == "credits" else "reported"}
    assert ("first_token_seconds" in rows[0]) is stream
    assert {row["finish_reason"] for row in rows} == {"stop"}


def test_unknown_cost_is_null_and_counted(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="none")
    work.write_rows(["a", "b"])
    work.write_job(provider.base_url, model="nobody/has-a-price")
    result = work.run("--json")
    assert [row["usd_spent"] for row in work.rows()] == [None, None]
    assert [row["unknown_attempts"] for row in work.rows()] == [1, 1]
    assert result.json["unknown_attempts"] == 2
    assert result.json["usd_spent"] == 0
    assert "2 attempts whose cost nobody reported" in result.stderr
    assert result.json["unknown_usd_at_most"] is None
    totals = work.batchrun("report", ".", "--format", "json").json["totals"]
    assert (totals["usd_unknown_at_most"], totals["usd_per_1000_rows"], totals["usd_per_ok_row"]) == (None, None, None)


def test_the_jobs_prices_are_used_where_nothing_is_reported(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="none")
    usage = '<<{"usage": {"prompt_tokens": 1000, "completion_tokens": 500}}>>'
    work.write_rows([usage])
    work.write_job(provider.base_url, prices={"input_mtok": 3, "output_mtok": 15})
    assert work.run().code == 0
    (row,) = work.rows()
    assert (row["usd_spent"], row["cost_source"], row["total_tokens"]) == (0.0105, "job", 1500)


def test_failures_are_retried_and_each_answer_is_paid_once(work: Workspace, provide: Provide) -> None:
    provider = provide(p429=0.05, p500=0.02, retry_after=0.01, seed=3)
    work.write_rows([f"question {number}" for number in range(400)])
    work.write_job(provider.base_url, concurrency=32)
    result = work.run("--json")
    assert result.code == 0, result.stderr
    rows = work.rows()
    assert {row["status"] for row in rows} == {"ok"}
    answered = [request for request in provider.requests if request["answered"]]
    assert len(answered) == 400
    assert spent(rows) == provider.bill
    assert sum(row["attempts"] for row in rows) == len(provider.requests) > 400
    assert max(request["in_flight"] for request in provider.requests) <= 32


def test_a_refused_row_fails_alone_and_the_run_ends_1(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["fine", '<<{"fail": [400], "message": "the image is too large"}>>', "fine too"])
    work.write_job(provider.base_url)
    result = work.run()
    assert result.code == 1
    rows = work.rows()
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert rows[1]["error"] == f"bad_request (400): the image is too large [request {rows[1]['request_id']}]"
    assert (rows[1]["usd_spent"], rows[1]["cost_source"], rows[1]["response"]) == (0.0, "not_billed", None)
    assert f"failed: 1 × bad_request, such as: {rows[1]['error']}" in result.stderr


def test_failed_rows_stay_failed_until_they_are_asked_for(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["fine", '<<{"fail": [400]}>>'])
    work.write_job(provider.base_url)
    assert work.run().code == 1
    result = work.run("--retry-failed")
    assert result.code == 0, result.stderr
    assert [row["status"] for row in work.rows()] == ["ok", "ok"]
    assert [row["attempts"] for row in work.rows()] == [1, 2]
    assert len(provider.requests) == 3


def test_retries_are_bounded_by_attempts(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(['<<{"fail": [500, 500, 500, 500]}>>', "fine"])
    work.write_job(provider.base_url, retry={"max_attempts": 2})
    assert work.run().code == 1
    assert len(provider.requests) == 3
    assert work.rows()[0]["error"].startswith("server (500): Something wrong")


def test_rate_limits_do_not_use_up_attempts(work: Workspace, provide: Provide) -> None:
    provider = provide(retry_after=0.01)
    work.write_rows(['<<{"fail": [429, 429, 429, 429, 429]}>>', *(f"q{number}" for number in range(60))])
    work.write_job(provider.base_url, retry={"max_attempts": 2})
    assert work.run().code == 0
    assert work.rows()[0]["attempts"] == 6


@pytest.mark.parametrize("how", ["hangup", "half", "silent", "drip"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_never_comes_is_an_unknown_outcome(
    work: Workspace, provide: Provide, how: str, stream: bool
) -> None:
    if stream and how == "drip":
        pytest.skip("a stream that drips after its finish reason is a whole answer")
    provider = provide()
    work.write_rows([f'<<{{"fail": ["{how}"]}}>>', "fine"])
    work.write_job(provider.base_url, timeout_seconds=1, stream=stream)
    result = work.run("--json")
    assert result.code == 0, result.stderr
    row = work.rows()[0]
    assert (row["status"], row["attempts"], row["unknown_attempts"]) == ("ok", 2, 1)
    assert result.json["unknown_outcomes"] == 1
    if how != "silent":  # whose request is not over yet, so that the fake has not logged it
        provider.wait_for(3)
        lost = next(request for request in provider.requests if request["nth"] == 1 and "fail" in request["text"])
        assert provider.bill - spent(work.rows()) == Decimal(lost["usd"]) > 0
    assert "unknown: 1 attempts in 1 rows (1) got no answer" in result.stderr


def test_an_endless_answer_is_cut_and_fails_its_row(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(['<<{"fail": ["flood"]}>>', "fine"])
    work.write_job(provider.base_url, max_response_bytes=100_000)
    assert work.run().code == 1
    assert [row["status"] for row in work.rows()] == ["failed", "ok"]
    assert "max_response_bytes (100000)" in work.rows()[0]["error"]


def test_a_stream_that_stays_open_after_its_end_counts_as_whole(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(['<<{"fail": ["drip"], "say": "whole"}>>'])
    work.write_job(provider.base_url, timeout_seconds=1, stream=True)
    assert work.run().code == 0
    (row,) = work.rows()
    assert (row["response"], row["finish_reason"], row["flags"]) == ("whole", "stop", ["incomplete_tail"])
    provider.wait_for(1)
    assert spent([row]) == provider.bill


def test_the_key_is_in_nothing_that_the_run_wrote(work: Workspace, provide: Provide) -> None:
    provider = provide(key="another", body=f'{{"message": "Incorrect API key provided: {KEY}"}}')
    work.write_rows(["a"])
    work.write_job(provider.base_url)
    result = work.run("--json")
    assert result.code == 4
    assert "[secret]" in result.stderr
    assert KEY not in result.stdout + result.stderr
    for path in work.folder.iterdir():
        assert KEY.encode() not in path.read_bytes(), path
    with sqlite3.connect(work.ledger) as db:
        assert KEY not in "\n".join(db.iterdump())


def test_the_ledger_is_its_owners_alone(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    assert work.ledger.stat().st_mode & 0o777 == 0o600


def test_export_rebuilds_the_output_for_nothing(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    before = work.rows()
    work.output.unlink()
    provider.stop()
    work.env["AIML_API_KEY"] = ""
    assert work.batchrun("export", "job.yaml").code == 0
    assert work.rows() == before


def test_a_fresh_run_says_what_it_will_pay_for_again(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    first = work.rows()
    work.write_rows(["a", "c", "b"])
    result = work.run()
    assert f"2 rows that run {first[0]['run_id']} answered will be asked and paid for again" in result.stderr
    assert f"about ${usd_text(spent(first))}; `reuse: true`" in result.stderr
    assert len(provider.requests) == 5


def test_zero_rows_give_an_empty_file_with_the_whole_schema(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows([])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    table = pq.read_table(work.output)
    assert table.num_rows == 0
    assert table.schema.names[:3] == ["prompt", "response", "finish_reason"]
    assert table.schema.field("usd_spent").type == pa.float64()
    assert work.manifest()["complete"] is True
    assert provider.requests == []


def test_rows_that_give_no_prompt_fail_for_nothing(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "   ", "b"])
    work.write_job(provider.base_url)
    result = work.run()
    assert result.code == 1
    rows = work.rows()
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert rows[1]["error"] == "not_rendered: the prompt is blank"
    assert (rows[1]["attempts"], rows[1]["usd_spent"]) == (0, None)
    assert len(provider.requests) == 2
    check = work.batchrun("check", "job.yaml")
    assert "1 of which give no prompt and would fail" in check.stdout


def test_the_inputs_columns_and_types_survive_to_the_output(work: Workspace, provide: Provide) -> None:
    table = pa.table(
        {
            "prompt": pa.array(["a", "b"], pa.large_string()),
            "id": pa.array([2**63 - 1, -(2**63)], pa.int64()),
            "unsigned": pa.array([2**64 - 1, 0], pa.uint64()),
            "money": pa.array([Decimal("1.10"), None], pa.decimal128(20, 2)),
            "when": pa.array([datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC), None], pa.timestamp("us", tz="UTC")),
            "nanos": pa.array([1, None], pa.timestamp("ns")),
            "day": pa.array([date(2026, 1, 2), None]),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "nested": pa.array([{"a": [1, 2], "b": {"c": "d"}}, None]),
            "raw": pa.array([b"\x00\xff", None]),
            "nothing": pa.nulls(2),
            'odd "name"\n😀': pa.array([1.5, float("nan")]),
        }
    )
    pq.write_table(table, work.folder / "in.parquet")
    work.write_job(
        provide().base_url, input="in.parquet", prompt="{{ prompt }} {{ id }} {{ money or '' }} {{ nested }}"
    )
    result = work.run()
    assert result.code == 1, result.stderr  # the second row's nested value is null
    found = pq.read_table(work.output).select(table.schema.names)
    assert found.schema.remove_metadata() == table.schema.remove_metadata()
    assert found.drop_columns([table.schema.names[-1]]).equals(table.drop_columns([table.schema.names[-1]]))
    first, second = work.rows()
    assert first["response"] == f"answer to: a {2**63 - 1} 1.10 {{'a': [1, 2], 'b': {{'c': 'd'}}}}"
    assert (second["status"], second["error"]) == (
        "failed",
        "not_rendered: the prompt would show a null (null in this row: money, nested); write {{ column or '' }}",
    )  # fmt: skip
