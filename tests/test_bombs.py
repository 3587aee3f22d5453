"""Servers that mean to fill the memory, to take all the time, or to put one row's answer into another."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from .conftest import KEY, FakeProvider, Workspace, spent
from .test_hostile import ANSWER, answer, http, script

Provide = Callable[..., FakeProvider]
MEGABYTE = 1024 * 1024
USED = Path(__file__).with_name("used.py")
MOST_MEMORY = 600 * MEGABYTE
OPEN = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def run_bounded(work: Workspace, *args: str, seconds: float = 60) -> tuple[int, str, int, float]:
    """Exit code, stderr, peak memory in bytes and seconds of a call."""
    began = time.monotonic()
    told = work.folder.with_name("used.json")
    command = [sys.executable, "-S", str(USED), str(told), *work.command(*(args or ("job.yaml",)))]
    with subprocess.Popen(
        command, cwd=work.folder, env=work.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        killer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        _, stderr = process.communicate()
        killer.cancel()
    code, _, peak = json.loads(told.read_text()) if told.exists() else (-signal.SIGKILL, 0, 0)
    told.unlink(missing_ok=True)
    return code, stderr, peak * (1 if sys.platform == "darwin" else 1024), time.monotonic() - began


def serve_file(tmp_path: Path, name: str, raw: bytes) -> str:
    """A script whose bytes stand in a file: too many to be a prompt."""
    path = tmp_path / name
    path.write_bytes(raw)
    return script(file=str(path))


def bombs() -> Iterator[tuple[str, bytes, bool]]:
    """Name, the answer's bytes, and whether it is asked for as a stream."""

    def choice(message: str) -> bytes:
        return b'{"choices":[{"index":0,"message":' + message.encode() + b',"finish_reason":"stop"}]}'

    many = 8_000_000
    tools = ",".join(["{}"] * (many // 3))
    yield "tool calls", choice(f'{{"content":"x","tool_calls":[{tools}]}}'), False
    pieces = ",".join(['{"index":0,"function":{"arguments":"' + "a" * 60 + '"}}'] * (many // 100))
    yield "tool arguments", choice(f'{{"content":"x","tool_calls":[{pieces}]}}'), False
    yield "lists", choice('{"content":"x","junk":[' + ",".join(["[]"] * (many // 3)) + "]}"), False
    yield "depth", b"[" * many, False
    yield "digits", b'{"usage":{"prompt_tokens":' + b"1" * many + b"}}", False
    yield "braces", b"{\n" * (many // 2), True
    yield "event names", b'data: {"a":"' + b"x" * (many // 2) + b'"}}\n' + b"event:\n" * (many // 14), True
    yield "a line", b"data: " + b"x" * many, True
    yield "empty pieces", b'data: {"choices":[{"delta":{"content":""}}]}\n\n' * (many // 50), True
    error = b'{"error":{"message":"x","code":429,"details":[{"retryDelay":"' + b"1" * 900_000 + b'"}]}}'
    yield "a wait", error, False


@pytest.mark.parametrize(("name", "raw", "stream"), list(bombs()), ids=[name for name, _, _ in bombs()])
def test_an_answer_of_any_content_takes_bounded_memory_and_time(
    work: Workspace, provide: Provide, tmp_path: Path, name: str, raw: bytes, stream: bool
) -> None:
    work.write_rows([serve_file(tmp_path, "bomb", http(200, raw).encode("latin-1")), *(f"q{n}" for n in range(5))])
    work.write_job(provide().base_url, stream=stream, timeout_seconds=20, retry={"max_attempts": 1})
    code, stderr, memory, seconds = run_bounded(work)
    assert code in (0, 1), stderr
    assert memory < MOST_MEMORY
    assert seconds < 40
    assert [row["status"] for row in work.rows()[1:]] == ["ok"] * 5


@pytest.mark.parametrize("status", [429, 503])
def test_a_wait_of_any_length_is_read_in_no_time(
    work: Workspace, provide: Provide, tmp_path: Path, status: int
) -> None:
    error = json.dumps({"error": {"message": "x", "details": [{"retryDelay": "1" * 900_000}]}}).encode()
    head = {"x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_requests": "1" * 60_000}
    raw = http(status, error, **head).encode("latin-1")
    work.write_rows([serve_file(tmp_path, "bomb", raw), "b"])
    work.write_job(provide().base_url, retry={"max_attempts": 2, "max_seconds": 20})
    code, stderr, _, seconds = run_bounded(work)
    assert code in (0, 1, 4), stderr
    assert seconds < 40


def test_what_follows_a_packed_answer_fills_no_memory(work: Workspace, provide: Provide, tmp_path: Path) -> None:
    raw = http(200, gzip.compress(answer()) + b"x" * 64 * MEGABYTE, Content_Encoding="gzip")
    work.write_rows([serve_file(tmp_path, "bomb", raw.encode("latin-1"))])
    work.write_job(provide().base_url, max_response_bytes=MEGABYTE, retry={"max_attempts": 1})
    code, _, memory, _ = run_bounded(work)
    assert code == 1
    assert memory < MOST_MEMORY
    assert "longer than max_response_bytes" in work.rows()[0]["error"]


def test_an_answer_that_nobody_asked_for_is_no_rows_answer(work: Workspace, provide: Provide) -> None:
    provider = provide(stray=answer().decode())
    work.write_rows([script(fail=[429], retry_after=0.3, say="mine")])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    assert work.rows()[0]["response"] == "mine"
    assert spent(work.rows()) == provider.bill


@pytest.mark.parametrize("status", [200, 400])
def test_a_reason_phrase_of_any_bytes_says_nothing(work: Workspace, provide: Provide, status: int) -> None:
    body = answer() if status == 200 else b'{"message": "no"}'
    raw = f"HTTP/1.1 {status} \xe9t\xe9\r\nContent-Length: {len(body)}\r\n\r\n{body.decode()}"
    provider = provide(bytes=raw)
    work.write_rows(["a"])
    work.write_job(provider.base_url)
    assert work.run().code == (0 if status == 200 else 1)
    assert len(provider.requests) == 1


@pytest.mark.parametrize(
    "get",
    [
        pytest.param({"bytes": "HTTP/1.1 200 OK\r\nX: ", "again": "y", "every": 0.2}, marks=pytest.mark.slow),
        {"bytes": OPEN + "Content-Length: 100000\r\n\r\n", "again": " ", "every": 0.2},
        pytest.param({"bytes": "", "again": "HTTP/1.1 103 Early Hints\r\n\r\n", "every": 0.01}, marks=pytest.mark.slow),
        {"bytes": OPEN + "Content-Encoding: zstd\r\n\r\nxxxx"},
        {"bytes": OPEN + "Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"[" + b"[]," * 3_000_000).decode("latin-1")},
        {"bytes": OPEN + "\r\n", "again": "[[[[[[[[[[[[[[[[" * 4096},
    ],
    ids=["a dripped head", "a dripped body", "hints", "zstd", "lists", "a flood"],
)
def test_a_price_list_takes_bounded_memory_and_time(work: Workspace, provide: Provide, get: dict[str, Any]) -> None:
    work.write_rows(["a"])
    work.write_job(provide(get=get).base_url, prices={"input_mtok": 1, "output_mtok": 1})
    code, stderr, memory, seconds = run_bounded(work)
    assert code == 0, stderr
    assert memory < MOST_MEMORY
    assert seconds < 20


@pytest.mark.parametrize(
    ("get", "said"),
    [
        ({"bytes": OPEN + "Content-Encoding: zstd\r\n\r\nxxxx"}, "was not asked for"),
        ({"bytes": OPEN + "\r\n", "again": "[[[[[[[[[[[[[[[[" * 4096}, "longer than"),
        ({"bytes": OPEN + "Date: Mon, 01 Jan 99999999999 00:00:00 GMT\r\n\r\n{}"}, "a form that is not known"),
        (
            {"bytes": OPEN + "\r\n" + json.dumps({"data": [{}], "pagination": {"total": 10**12, "has_more": True}})},
            "more than 10000000 cannot be read",
        ),
    ],
    ids=["zstd", "a flood", "a date", "no end"],
)
def test_a_log_that_cannot_be_read_ends_4(work: Workspace, provide: Provide, get: dict[str, Any], said: str) -> None:
    port = provide().port
    work.write_rows(["a"])
    work.write_job(f"http://127.0.0.1:{port}/v1", prices={"input_mtok": 1, "output_mtok": 1})
    assert work.run().code == 0
    work.write_job(provide(get=get).base_url, prices={"input_mtok": 1, "output_mtok": 1})
    code, stderr, memory, _ = run_bounded(work, "reconcile", "job.yaml")
    assert code == 4, stderr
    assert said in stderr
    assert memory < MOST_MEMORY


def test_a_key_that_is_spelt_otherwise_is_written_nowhere(work: Workspace, provide: Provide) -> None:
    spelt = "".join(f"\\u{ord(character):04x}" for character in KEY)
    said = json.dumps(ANSWER).replace('"hi"', f'"{spelt}"')
    refused = f'{{"message": "what is {spelt}?"}}'
    deltas = [{"choices": [{"index": 0, "delta": {"content": character}}]} for character in KEY]
    events = (
        "".join(f"data: {json.dumps(delta)}\n\n" for delta in [*deltas, ANSWER | {"choices": []}]) + "data: [DONE]\n\n"
    )
    raws = [http(200, said.encode()), http(400, refused.encode()), http(200, events.encode())]
    work.write_rows([script(bytes=raw) for raw in raws])
    models = [{"id": f"x/{KEY}"}]
    withdrawn = [{"id": "anthropic/claude-sonnet-4", "status": "withdrawn", "replaced_by": KEY}]
    provider = provide(models=models, deprecations=withdrawn)
    work.write_job(provider.base_url, retry={"max_attempts": 1}, prices={"input_mtok": 1, "output_mtok": 1})
    results = [work.run("--json")]
    work.write_job(provide(replay={"status": 404, "chunks": ["{}"]}, deprecations=withdrawn).base_url)
    work.write_rows(["new"])
    results.append(work.run("--json"))
    assert "use '[secret]'" in results[1].stderr
    for result in results:
        assert KEY not in result.stdout + result.stderr
    for path in work.folder.iterdir():
        assert KEY.encode() not in path.read_bytes(), path
    assert work.batchrun("export", "job.yaml").code == 0
    assert KEY.encode() not in work.output.read_bytes()


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_row_that_is_told_to_wait_for_ever_stops_nobody_else(
    work: Workspace, provide: Provide, concurrency: int
) -> None:
    rows = [f"q{number}" for number in range(10)]
    work.write_rows([*rows, script(fail=[429] * 9, retry_after=1e9), *(f"r{number}" for number in range(10))])
    work.write_job(provide().base_url, concurrency=concurrency)
    assert work.run().code == 1
    assert sum(row["status"] == "ok" for row in work.rows()) == 20


@contextmanager
def tls_server(certificate: trustme.LeafCert) -> Iterator[tuple[int, list[bytes]]]:
    """A server that answers over TLS; its port, and what it got after the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    got: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                try:
                    plain, _ = listening.accept()
                    plain.settimeout(5)
                    with context.wrap_socket(plain, server_side=True) as connection:
                        got.append(connection.recv(65536))
                        connection.sendall(http(200, answer(), Connection="close").encode("latin-1"))
                except (TimeoutError, OSError):
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1], got
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize(("host", "is_good"), [("127.0.0.1", True), ("example.org", False)])
def test_nothing_is_sent_to_a_host_with_anothers_certificate(
    work: Workspace, tmp_path: Path, host: str, is_good: bool
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    work.env["SSL_CERT_FILE"] = str(tmp_path / "ca.pem")
    work.write_rows(["a"])
    with tls_server(authority.issue_cert(host)) as (port, got):
        work.write_job(
            f"https://127.0.0.1:{port}/v1", prices={"input_mtok": 1, "output_mtok": 1}, retry={"max_attempts": 1}
        )
        result = work.run("--json")
        prompts = [raw for raw in got if raw.startswith(b"POST")]
    if is_good:
        assert result.code == 0, result.stderr
        assert len(prompts) == 1
    else:
        assert (result.code, prompts) == (4, [])
        assert result.json["unknown_outcomes"] == 0


def test_certificates_that_are_not_there_are_named(work: Workspace, provide: Provide) -> None:
    work.env["SSL_CERT_FILE"] = "/nonexistent.pem"
    work.write_rows(["a"])
    provider = provide()
    work.write_job(provider.base_url.replace("http:", "https:"))
    result = work.run()
    assert result.code == 2, result.stderr
    assert "SSL_CERT_FILE" in result.stderr
    # Nobody asks for them without TLS.
    work.write_job(provider.base_url)
    assert work.run().code == 0
