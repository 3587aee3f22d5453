"""Every conformance case through the command line: a server replays the bytes, the Parquet row tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from .conftest import FakeProvider, Workspace, fake_providers
from .test_wire import CASES


def replay(case: dict[str, Any]) -> dict[str, Any]:
    chunks = case["chunks"] if case["kind"] == "sse" else [case["body"].encode().decode("latin-1")]
    headers = dict(case["headers"])
    return {"status": case["status"], "headers": headers, "chunks": chunks, "usd": case["expect"].get("usd")}


def stops_the_run(case: dict[str, Any]) -> bool:
    expect = case["expect"]
    return bool(expect.get("fatal_run")) or expect.get("error") in ("rate_limit", "overloaded")


def answered_between(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases in an order in which, two at a time, no three rows fail without an answer between them."""
    failing = [case for case in cases if "error" in case["expect"]]
    answered = [case for case in cases if case not in failing]
    pairs = [case for pair in zip(failing, answered, strict=False) for case in pair]
    assert len(failing) < len(answered)
    return pairs + answered[len(failing) :]


@dataclass
class Replayed:
    """What the command line made of one case."""

    row: dict[str, Any]
    code: int
    stderr: str
    billed: Decimal


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], Replayed]]:
    """Cases that leave the run going share one; the others have one each."""
    folder = tmp_path_factory.mktemp("replayed")
    together: dict[str, Replayed] = {}
    with fake_providers(folder) as provide:

        def run(cases: list[dict[str, Any]]) -> dict[str, Replayed]:
            work = Workspace(folder / cases[0]["id"])
            work.folder.mkdir()
            provider = provide()
            work.write_rows([f"{case['id']} <<{json.dumps({'replay': replay(case)})}>>" for case in cases])
            retry = {"max_attempts": 1, "max_seconds": 0}
            # A model without a price: what the provider does not report is then not derived either.
            streamed = cases[0]["kind"] == "sse"
            work.write_job(provider.base_url, model="nobody/has-a-price", stream=streamed, retry=retry, concurrency=2)
            result = work.run("--json")
            billed = {request["text"]: Decimal(request["usd"]) for request in provider.requests}
            return {
                case["id"]: Replayed(row, result.code, result.stderr, billed[row["prompt"]])
                for case, row in zip(cases, work.rows(), strict=True)
            }

        for streamed in (False, True):
            going_on = [case for case in CASES if not stops_the_run(case) and (case["kind"] == "sse") is streamed]
            together |= run(answered_between(going_on))
        yield lambda case: together[case["id"]] if case["id"] in together else run([case])[case["id"]]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_conformance_through_the_command_line(
    replayed: Callable[[dict[str, Any]], Replayed], case: dict[str, Any]
) -> None:
    found = replayed(case)
    row = found.row
    expect = case["expect"]
    if "error" in expect:
        assert row["error"].startswith(expect["error"]), row["error"]
        assert row["status"] == ("pending" if stops_the_run(case) else "failed")
        assert found.code == (4 if stops_the_run(case) else 1)
        assert row["response"] is None
        if "request_id" in expect:
            assert row["request_id"] == expect["request_id"]
        assert str(expect.get("code", "")) in row["error"]
        return
    assert (row["status"], row["error"]) == ("ok", None), found.stderr
    names = {
        "text": "response", "finish": "finish_reason", "finish_raw": "finish_reason_raw", "inp": "prompt_tokens",
        "out": "completion_tokens", "total": "total_tokens", "cached": "cached_tokens",
        "reasoning_tokens": "reasoning_tokens", "model": "model", "inference_id": "request_id",
    }  # fmt: skip
    for name, column in names.items():
        if name in expect:
            assert row[column] == expect[name], column
    if "reasoning" in expect:
        assert (row["reasoning"] or "") == expect["reasoning"]
    if "tool_calls" in expect:
        calls = json.loads(row["tool_calls"])
        assert len(calls) == expect["tool_calls"]
        assert calls[0]["function"]["arguments"] == expect.get("tool_args", "{}")
    if "usd" in expect:
        usd = None if row["usd_spent"] is None else Decimal(repr(row["usd_spent"]))
        assert usd == (None if expect["usd"] is None else Decimal(expect["usd"]))
        assert found.billed == (usd or 0)
        assert row["unknown_attempts"] == (usd is None)
    if "cost_source" in expect:
        assert row["cost_source"] == ("credits" if expect["cost_source"].endswith("2e6") else "reported")


def test_a_withdrawn_model_is_named_with_its_successor(work: Workspace, provide: Callable[..., FakeProvider]) -> None:
    listed = [{"id": "claude-sonnet-4", "aliases": ["anthropic/claude-sonnet-4"], "status": "withdrawn",
               "replaced_by": "anthropic/claude-sonnet-4.6"}]  # fmt: skip
    provider = provide(deprecations=listed)
    work.write_rows(['<<{"fail": [404]}>>'])
    work.write_job(provider.base_url)
    result = work.run("--json")
    assert result.code == 1
    said = "model 'anthropic/claude-sonnet-4' is withdrawn, use 'anthropic/claude-sonnet-4.6'"
    assert said in result.stderr
    assert result.json["advice"] == said


def test_an_unknown_model_is_shown_the_nearest(work: Workspace, provide: Callable[..., FakeProvider]) -> None:
    provider = provide(models=[{"id": "openai/gpt-4o"}, {"id": "anthropic/claude-sonnet-4"}])
    work.write_rows(['<<{"fail": [404]}>>'])
    work.write_job(provider.base_url, model="claude-sonnet-4")
    result = work.run()
    assert "the provider has no model 'claude-sonnet-4'; the nearest are 'anthropic/claude-sonnet-4'" in result.stderr


@pytest.mark.parametrize(
    ("message", "mend"),
    [
        ("Unsupported value: 'messages[0].role' does not support 'system' with this model.", "{system: top_level}"),
        ("Unrecognized request argument supplied: stream_options", "{include_usage: false}"),
    ],
)
def test_a_refused_dialect_names_the_setting(
    work: Workspace, provide: Callable[..., FakeProvider], message: str, mend: str
) -> None:
    work.write_rows([f"<<{json.dumps({'fail': [400], 'message': message})}>>"])
    work.write_job(provide().base_url)
    assert work.run().code == 1
    assert f"(set provider: {mend})" in work.rows()[0]["error"]


def test_both_generations_of_one_model_can_be_written(work: Workspace, provide: Callable[..., FakeProvider]) -> None:
    provider = provide(keep_requests=True)
    work.write_rows(["a"])
    prompt = {"system": "s", "user": "{{ prompt }}"}
    first = {"max_tokens": 5, "stop_sequences": ["x"], "top_k": 3}
    second = {"max_completion_tokens": 5, "stop": ["x"], "unheard_of": {"a": [1]}}
    where = {"name": "aimlapi", "base_url": provider.base_url}
    work.write_job(provider=where | {"system": "top_level"}, prompt=prompt, parameters=first, stream=True)
    assert work.run().code == 0
    work.write_job(provider=where | {"include_usage": True}, prompt=prompt, parameters=second, stream=True)
    assert work.run().code == 0
    user = {"role": "user", "content": "a"}
    old, new = (request["body"] for request in provider.requests)
    model = "anthropic/claude-sonnet-4"
    assert old == {"model": model, "system": "s", "messages": [user], "stream": True} | first
    system = {"role": "system", "content": "s"}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    assert new == {"model": model, "messages": [system, user]} | usage | second


def test_a_redirect_is_never_followed_with_the_key(work: Workspace, provide: Callable[..., FakeProvider]) -> None:
    elsewhere = provide()
    moved = {"status": 307, "headers": {"Location": f"{elsewhere.base_url}/chat/completions"}, "chunks": [""]}
    work.write_rows(["a"])
    work.write_job(provide(replay=moved).base_url)
    assert work.run().code == 1
    assert work.rows()[0]["error"].startswith("redirect (307): redirected to http://127.0.0.1")
    assert elsewhere.requests == []


def test_secret_headers_are_read_from_the_environment_and_written_nowhere(
    work: Workspace, provide: Callable[..., FakeProvider]
) -> None:
    provider = provide(keep_requests=True)
    work.env["MY_TOKEN"] = "tok-0815-hidden"
    work.write_rows(["a"])
    headers = {"X-Api-Token": "Token ${MY_TOKEN}", "X-Plain": "p"}
    work.write_job(provider={"name": "mine", "base_url": provider.base_url, "headers": headers})
    result = work.run("--json")
    assert result.code == 0
    sent = provider.requests[0]["headers"]
    assert (sent["x-api-token"], sent["x-plain"]) == ("Token tok-0815-hidden", "p")
    assert "authorization" not in sent
    assert "tok-0815" not in result.stdout + result.stderr
    for path in work.folder.iterdir():
        assert b"tok-0815" not in path.read_bytes()
    del work.env["MY_TOKEN"]
    assert "names MY_TOKEN, which is not set in the environment" in work.run().stderr


def test_a_key_never_crosses_a_network_in_the_clear(work: Workspace) -> None:
    work.write_rows(["a"])
    elsewhere = {"name": "aimlapi", "base_url": "http://192.0.2.1/v1"}
    work.write_job(provider=elsewhere)
    result = work.run()
    assert result.code == 2
    assert "192.0.2.1 is another host: to send it there, write provider: {api_key_env: AIML_API_KEY}" in result.stderr
    work.write_job(provider=elsewhere | {"api_key_env": "AIML_API_KEY"})
    result = work.run()
    assert result.code == 2
    assert "over plain HTTP: use https" in result.stderr


def test_a_cost_far_from_the_tokens_is_flagged(work: Workspace, provide: Callable[..., FakeProvider]) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url, prices={"input_mtok": 300, "output_mtok": 1500})
    assert work.run().code == 0
    (row,) = work.rows()
    assert row["flags"] == ["suspicious_cost"]
    assert row["cost_source"] == "reported"
