"""Servers and inputs that mean harm, or are merely broken: the right class, bounded, and the run goes on."""

from __future__ import annotations

import gzip
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import KEY, FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]


def script(**keys: Any) -> str:
    return f"<<{json.dumps(keys)}>>"


def http(status: int, body: bytes, **headers: str) -> str:
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    length = "" if "Content_Length" in headers else f"Content-Length: {len(body)}\r\n"
    return (f"HTTP/1.1 {status} X\r\n{length}{head}\r\n".encode() + body).decode("latin-1")


ANSWER = {"id": "c", "model": "m", "choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}]}


def answer(**more: Any) -> bytes:
    return json.dumps(ANSWER | more).encode()


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (http(400, b'{"message": "bad \\ud83d", "code": "\\ud800"}'), "bad_request (\ufffd): bad \ufffd"),
        (http(400, b'{"message": "x", "n": 1e99999999999999999999}'), "bad_request (400): x"),
        (http(400, b"\xff\xfe nonsense"), "bad_request (400): \ufffd\ufffd nonsense"),
        (http(400, b"[" * 100_000), "bad_request (400): ["),
        (http(400, b"", Content_Encoding="br"), "bad_request (400): HTTP 400"),
        (http(404, gzip.compress(b'{"message": "zipped"}'), Content_Encoding="gzip"), "not_found (404): zipped"),
    ],
)
def test_an_error_of_any_bytes_fails_its_row_alone(work: Workspace, provide: Provide, raw: str, error: str) -> None:
    work.write_rows([script(bytes=raw), *(f"q{number}" for number in range(20))])
    work.write_job(provide().base_url)
    result = work.run()
    assert result.code == 1, result.stderr
    rows = work.rows()
    assert rows[0]["error"].startswith(error)
    assert {row["status"] for row in rows[1:]} == {"ok"}


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (http(200, answer()[:20], Content_Length="500"), "disconnect"),
        (http(200, b"not gzip", Content_Encoding="gzip"), "disconnect"),
        (http(200, b"x", Content_Encoding="zstd"), "malformed"),
        (http(204, b""), "incomplete_stream"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "disconnect"),
        ("nonsense\r\n\r\n", "disconnect"),
        (http(200, answer(), X_Bomb="x" * 100_000), "disconnect"),
    ],
)
def test_a_broken_answer_is_tried_again(work: Workspace, provide: Provide, raw: str, kind: str) -> None:
    work.write_rows([script(bytes=raw)])
    work.write_job(provide().base_url, retry={"max_attempts": 1})
    assert work.run().code == 1
    assert work.rows()[0]["error"].startswith(kind), work.rows()[0]["error"]
    work.write_rows([script(bytes=raw, n=2)])
    work.write_job(provide().base_url)
    assert work.run().code == 0


def test_text_that_no_utf_8_can_carry_is_mended_and_written(work: Workspace, provide: Provide) -> None:
    call = {"id": "\ud800", "type": "function", "function": {"name": "f\udc00", "arguments": "\ud83d"}}
    message = {"content": "a \ud800 \u0000 b", "tool_calls": [call], "reasoning": "\udfff"}
    body = answer(choices=[{"index": 0, "message": message, "finish_reason": "st\ud800"}], model="m\ud800")
    refusal = answer(choices=[{"index": 0, "message": {"content": None, "refusal": "no \ud800"}}])
    work.write_rows([script(bytes=http(200, body)), script(bytes=http(200, refusal))])
    work.write_job(provide().base_url)
    result = work.run()
    assert result.code == 0, result.stderr
    first, second = work.rows()
    assert (first["response"], first["finish_reason"], first["model"]) == ("a \ufffd \u0000 b", "st\ufffd", "m\ufffd")
    assert "\ufffd" in first["tool_calls"]
    assert second["response"] == "no \ufffd"


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_key_is_written_nowhere(work: Workspace, provide: Provide, stream: bool) -> None:
    echo = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY} and tok/0815/hidden", "code": 400}})
    raw = f"data: {echo}\n\n" if stream else echo
    work.env["MY_TOKEN"] = "tok/0815/hidden"
    work.env["MY_PATH"] = "secret-path-4711"
    provider = provide(bytes=http(200, raw.encode(), X_Request_Id=KEY))
    work.write_rows(["a"])
    where = {
        "name": "mine", "base_url": f"{provider.base_url}/${{MY_PATH}}", "api_key_env": "AIML_API_KEY",
        "headers": {"X-Auth": "Bearer ${MY_TOKEN}"},
    }  # fmt: skip
    work.write_job(provider=where, stream=stream)
    result = work.run("--json")
    assert (result.code, result.json["reason"]) == (4, "auth")
    assert "[secret]" in work.rows()[0]["error"]
    assert provider.requests[0]["path"] == "/v1/secret-path-4711/chat/completions"
    for secret in (KEY, "tok/0815/hidden", "secret-path-4711"):
        assert secret not in result.stdout + result.stderr
        for path in work.folder.iterdir():
            assert secret.encode() not in path.read_bytes(), (secret, path)
    assert work.batchrun("export", "job.yaml").code == 0


def test_one_row_that_is_always_rate_limited_stops_nobody_else(work: Workspace, provide: Provide) -> None:
    work.write_rows([script(fail=[429] * 500, retry_after=0.05), *(script(wait=0.02, n=n) for n in range(200))])
    work.write_job(provide().base_url, concurrency=2, retry={"max_seconds": 0.5})
    result = work.run()
    assert result.code == 1, result.stderr
    rows = work.rows()
    assert rows[0]["status"] == "failed"
    assert rows[0]["error"].startswith("rate_limit")
    assert {row["status"] for row in rows[1:]} == {"ok"}


def test_a_request_above_the_limit_of_a_minute_is_refused(work: Workspace, provide: Provide) -> None:
    provider = provide()
    said = "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 40000."
    work.write_rows([script(fail=[429] * 9, message=said)])
    work.write_job(provider.base_url)
    assert work.run().code == 1
    assert len(provider.requests) == 1


def test_a_refused_account_in_unreadable_words_still_stops_the_run(work: Workspace, provide: Provide) -> None:
    work.write_rows([script(bytes=http(401, b"x", Content_Encoding="br")), "b"])
    work.write_job(provide().base_url, concurrency=1)
    result = work.run("--json")
    assert (result.code, result.json["reason"]) == (4, "auth")


def test_an_interrupted_retry_of_failed_rows_goes_on_and_pays_for_nothing_again(
    work: Workspace, provide: Provide
) -> None:
    provider = provide()
    work.write_rows(["fine", *(script(fail=[400], wait=0.3, n=n) for n in range(4))])
    work.write_job(provider.base_url, concurrency=1)
    assert work.run().code == 1
    asked = len(provider.requests)
    with work.start("job.yaml", "--retry-failed") as process:
        while len(provider.requests) < asked + 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    before = len(provider.requests)
    assert work.run().code == 1  # the open run has nothing left to ask
    assert len(provider.requests) == before
    assert work.run("--retry-failed").code == 1 or len(provider.requests) > before
    assert sum(request["text"] == "fine" for request in provider.requests) <= 2


def test_an_export_over_another_input_does_not_confuse_the_run(work: Workspace, provide: Provide) -> None:
    provider = provide(refuse_after=2)
    work.write_rows(["a", "b", "c", "d"])
    work.write_job(provider.base_url, concurrency=1)
    assert work.run().code == 4
    kept = work.folder / "kept.csv"
    (work.folder / "in.csv").rename(kept)
    work.write_rows(["x", "b"])
    assert work.batchrun("export", "job.yaml").code == 0
    assert [row["response"] for row in work.rows()] == [None, "answer to: b"]
    kept.rename(work.folder / "in.csv")
    assert work.run().code == 4
    assert [row["response"] for row in work.rows()] == ["answer to: a", "answer to: b", None, None]


def test_an_input_that_is_gone_at_the_end_loses_no_answer(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3)
    rows = ["a", "b", "c"]
    work.write_rows(rows)
    work.write_job(provider.base_url, concurrency=1)
    with work.start("job.yaml") as process:
        while not provider.requests:
            time.sleep(0.02)
        content = (work.folder / "in.csv").read_bytes()
        (work.folder / "in.csv").unlink()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert "`batchrun export` writes them once the input can be read" in stderr
    (work.folder / "in.csv").write_bytes(content)
    assert work.batchrun("export", "job.yaml").code == 0
    assert spent(work.rows()) == provider.bill


def test_the_output_never_replaces_the_input(work: Workspace, provide: Provide) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), work.folder / "d.parquet")
    before = (work.folder / "d.parquet").read_bytes()
    work.write_job(provide().base_url, input="d.parquet", output="d.parquet")
    result = work.run()
    assert result.code == 2
    assert "is the input too" in result.stderr
    assert (work.folder / "d.parquet").read_bytes() == before


def test_the_output_never_replaces_what_has_become_the_input(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3)
    pq.write_table(pa.table({"prompt": ["a", "b", "c"]}), work.folder / "before.parquet")
    (work.folder / "in.parquet").symlink_to("before.parquet")
    work.write_job(provider.base_url, input="in.parquet", output="out.parquet", concurrency=1)
    with work.start("job.yaml") as process:
        provider.wait_for(1)
        pq.write_table(pa.table({"prompt": ["a", "b", "c", "d"]}), work.folder / "out.parquet")
        (work.folder / "link").symlink_to("out.parquet")
        (work.folder / "link").replace(work.folder / "in.parquet")
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert "is the input too" in stderr
    assert pq.read_table(work.folder / "out.parquet").to_pydict() == {"prompt": ["a", "b", "c", "d"]}
    (work.folder / "out.parquet").rename(work.folder / "in.parquet")
    assert work.run().code == 0
    assert sorted(request["text"] for request in provider.requests) == ["a", "b", "c", "d"]


def test_a_column_that_parquet_cannot_hold_is_found_before_anything_is_sent(work: Workspace, provide: Provide) -> None:
    provider = provide()
    (work.folder / "in.jsonl").write_text('{"prompt": "a", "meta": {}}\n')
    work.write_job(provider.base_url, input="in.jsonl")
    result = work.run()
    assert result.code == 2
    assert "the column 'meta' (struct<>) cannot be written to Parquet" in result.stderr
    assert provider.requests == []
    work.write_job(provider.base_url, input={"path": "in.jsonl", "columns": {"meta": None}})
    assert work.run().code == 0


@pytest.mark.parametrize(
    ("base_url", "said"),
    [
        ("http://h:99999/v1", "is no address"),
        ("http://[::1/v1", "is no address"),
        ("ftp://h/v1", "is no address"),
        ("http://u:p@127.0.0.1/v1", "holds a user name or password"),
        ("http://127.0.0.1/v1#x", "holds a blank or a #"),
        ("http://${NOT_SET_ANYWHERE}/v1", "names NOT_SET_ANYWHERE, which is not set"),
    ],
)
def test_an_address_that_is_none_is_refused(work: Workspace, base_url: str, said: str) -> None:
    work.write_rows(["a"])
    work.write_job(base_url)
    result = work.run()
    assert result.code == 2
    assert said in result.stderr


def test_a_query_of_the_address_stays_at_its_end(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(f"{provider.base_url}?api-version=1")
    assert work.run().code == 0
    assert provider.requests[0]["path"] == "/v1/chat/completions?api-version=1"


def test_netrc_and_proxies_are_not_asked_for_this_machine(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True)
    home = work.folder / "home"
    home.mkdir()
    netrc = home / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    netrc.chmod(0o600)
    work.env |= {"HOME": str(home), "HTTP_PROXY": "http://127.0.0.1:1", "http_proxy": "http://127.0.0.1:1"}
    work.write_rows(["a"])
    work.write_job(provider={"name": "mine", "base_url": provider.base_url})
    assert work.run().code == 0
    assert "authorization" not in provider.requests[0]["headers"]


def test_sigterm_while_the_output_is_written_leaves_no_half_of_it(work: Workspace, provide: Provide) -> None:
    provider = provide()
    rows = 3000
    work.write_rows([f"q{number} " + "x" * 2000 for number in range(rows)])
    work.write_job(provider.base_url, concurrency=64)
    with work.start("job.yaml") as process:
        while len(provider.requests) < rows:
            time.sleep(0.005)
        time.sleep(0.15)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    # At its very last Python gives the signals back.
    assert process.returncode in (0, 143, -signal.SIGTERM)
    assert not list(Path(work.folder).glob("*.part"))
    assert not list(Path(work.folder).glob(".*.part"))
    if work.output.exists():
        assert len(work.rows()) == rows
    assert work.batchrun("export", "job.yaml").code == 0
    assert len(work.rows()) == rows


@pytest.mark.parametrize(
    ("how", "stream", "kind"),
    [
        ("hangup", False, "disconnect"), ("half", False, "disconnect"), ("silent", False, "timeout"),
        ("drip", False, "timeout"), ("hangup", True, "disconnect"), ("half", True, "incomplete_stream"),
        ("silent", True, "timeout"),
    ],
)  # fmt: skip
def test_what_never_comes_has_its_class_and_ends_in_time(
    work: Workspace, provide: Provide, how: str, stream: bool, kind: str
) -> None:
    work.write_rows([script(fail=[how]), *(f"q{number}" for number in range(5))])
    work.write_job(provide().base_url, timeout_seconds=1, stream=stream, retry={"max_attempts": 1})
    began = time.monotonic()
    assert work.run().code == 1
    assert time.monotonic() - began < 15
    rows = work.rows()
    assert rows[0]["error"].startswith(f"{kind}: "), rows[0]["error"]
    assert (rows[0]["usd_spent"], rows[0]["unknown_attempts"]) == (None, 1)
    assert {row["status"] for row in rows[1:]} == {"ok"}


def test_gzipped_answers_are_read_and_bombs_are_bounded(work: Workspace, provide: Provide) -> None:
    zipped = http(200, gzip.compress(answer()), Content_Encoding="gzip", Content_Type="application/json")
    bomb = http(200, gzip.compress(b" " * 100_000_000), Content_Encoding="gzip")
    work.write_rows([script(bytes=zipped), script(bytes=bomb)])
    work.write_job(provide().base_url, max_response_bytes=1_000_000)
    assert work.run().code == 1
    first, second = work.rows()
    assert (first["status"], first["response"]) == ("ok", "hi")
    assert "the answer is longer than max_response_bytes (1000000)" in second["error"]


def test_cookies_are_never_sent_back(work: Workspace, provide: Provide) -> None:
    provider = provide(keep_requests=True)
    work.write_rows([script(bytes=http(200, answer(), Set_Cookie="track=me")), "b", "c"])
    work.write_job(provider.base_url, concurrency=1)
    assert work.run().code == 0
    assert all("cookie" not in request["headers"] for request in provider.requests)


def test_a_server_that_forbids_retries_in_trouble_does_not_use_up_the_rows(work: Workspace, provide: Provide) -> None:
    provider = provide(replay={"status": 500, "headers": {"x-should-retry": "false"}, "chunks": ["{}"]})
    work.write_rows([f"q{number}" for number in range(300)])
    work.write_job(provider.base_url, concurrency=4)
    result = work.run("--json")
    assert (result.code, result.json["reason"]) == (4, "outage")
    assert len(provider.requests) <= 24


def test_a_signal_is_what_ends_a_run_whose_input_has_gone(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.4)
    work.write_rows([f"q{number}" for number in range(30)])
    work.write_job(provider.base_url, concurrency=2)
    with work.start("job.yaml") as process:
        while len(provider.requests) < 2:
            time.sleep(0.02)
        (work.folder / "in.csv").unlink()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
