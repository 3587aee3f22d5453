"""Shapes near the conformance cases: what other servers of the same kind send."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from batchrun.records import Action, Answer, Failure
from batchrun.wire import AnswerReader, read_answer


def document(message: Any = None, *, finish: Any = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "x"} if message is None else message
    return {"id": "c", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": finish}], **more}


def answer(body: Any, headers: dict[str, str] | None = None, **how: Any) -> Answer:
    found = read_answer(json.dumps(body).encode(), headers or {}, streamed=False, **how)
    assert isinstance(found, Answer), found
    return found


def stream(*events: Any, done: bool = True, cost_in_usage: bool = False) -> Answer | Failure:
    reader = AnswerReader({}, streamed=True, cost_in_usage=cost_in_usage)
    for event in events:
        text = event if isinstance(event, str) else f"data: {json.dumps(event)}"
        reader.feed(f"{text}\n\n".encode())
    if done:
        reader.feed(b"data: [DONE]\n\n")
    return reader.close()


def chunk(delta: Any = None, *, finish: Any = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


@pytest.mark.parametrize(
    ("message", "text", "flags"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, "c"]}, "abc", ()),
        ({"content": {"type": "text", "text": "a"}}, "a", ()),
        ({"content": None, "refusal": "I cannot help."}, "I cannot help.", ("refusal",)),
        ({"content": "  \n"}, "  \n", ("empty",)),
        ({"content": None}, None, ("empty",)),
        ({"content": 5}, None, ("empty",)),
        ({"content": "nul \u0000 stays"}, "nul \u0000 stays", ()),
    ],
)
def test_content_of_every_form(message: dict[str, Any], text: str | None, flags: tuple[str, ...]) -> None:
    found = answer(document(message))
    assert (found.text, found.flags) == (text, flags)


@pytest.mark.parametrize(
    ("raw", "normal", "flag"),
    [
        ("stop_sequence", "stop", None),
        ("eos", "stop", None),
        ("STOP", "stop", None),
        ("MAX_TOKENS", "length", "truncated"),
        ("model_context_window_exceeded", "length", "truncated"),
        ("tool_use", "tool_calls", None),
        ("function_call", "tool_calls", None),
        ("refusal", "content_filter", "filtered"),
        ("SAFETY", "content_filter", "filtered"),
        ("pause_turn", "pause_turn", None),
        ("something_new", "something_new", None),
        (None, "unknown", None),
        ("", "unknown", None),
    ],
)
def test_finish_reasons(raw: str | None, normal: str, flag: str | None) -> None:
    found = answer(document(finish=raw))
    assert (found.finish_reason, found.finish_reason_raw) == (normal, raw or None)
    assert flag is None or flag in found.flags


def test_a_finish_that_means_an_error_is_tried_again() -> None:
    for raw in ("error", "insufficient_system_resource"):
        found = read_answer(json.dumps(document(finish=raw)).encode(), {}, streamed=False)
        assert isinstance(found, Failure)
        assert (found.kind, found.action) == ("server", Action.RETRY)


def test_reasoning_in_any_field() -> None:
    assert answer(document({"content": "x", "reasoning": "r"})).reasoning == "r"
    assert answer(document({"content": "x", "reasoning_content": "r", "reasoning": "r"})).reasoning == "r"
    assert answer(document({"content": "x", "reasoning_details": [{"text": "a"}, {"text": "b"}]})).reasoning == "ab"
    parts = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "x"}]
    found = answer(document({"content": parts}))
    assert (found.text, found.reasoning) == ("x", "t")


def test_tool_calls_old_and_new() -> None:
    old = answer(document({"content": None, "function_call": {"name": "f", "arguments": "{}"}}, finish="function_call"))
    assert old.tool_calls[0]["function"] == {"name": "f", "arguments": "{}"}
    # Ollama sends the arguments as an object, Gemini without an index.
    calls = [{"id": "a", "function": {"name": "f", "arguments": {"q": 1}}}, {"id": "b", "function": {"name": "g"}}]
    found = answer(document({"content": None, "tool_calls": calls}, finish="tool_calls"))
    assert [call["function"]["name"] for call in found.tool_calls] == ["f", "g"]  # type: ignore[index]
    assert found.tool_calls[0]["function"]["arguments"] == '{"q": 1}'  # type: ignore[index]


def test_the_first_choice_is_the_answer() -> None:
    body = document()
    body["choices"] = [
        {"index": 1, "message": {"content": "second"}, "finish_reason": "stop"},
        {"index": 0, "message": {"content": "first"}, "finish_reason": "stop"},
    ]
    assert answer(body).text == "first"
    body["choices"] = [{"text": "old completions", "finish_reason": "stop"}]
    assert answer(body).text == "old completions"


@pytest.mark.parametrize(
    ("body", "kind", "retried"),
    [
        ({"error": {"message": "x", "type": "overloaded_error"}}, "overloaded", True),
        ({"error": {"message": "x", "code": "rate_limit_exceeded"}}, "rate_limit", True),
        ({"error": "model is loading"}, "server", True),
        ({"error": {"code": 401, "message": "bad key"}}, "auth", False),
        ({"error": {"code": "insufficient_quota", "message": "x"}}, "quota", False),
        ({"error": {"status": "UNAVAILABLE", "message": "x"}}, "server", True),
        ({"error": {"status": "INVALID_ARGUMENT", "message": "x"}}, "bad_request", False),
        ({"object": "error", "message": "too long", "code": 400}, "bad_request", False),
        ({"message": "Too Many Requests", "statusCode": "429"}, "rate_limit", True),
        ({"detail": "Not Found", "status": 404}, "not_found", False),
        ([{"error": {"code": 503, "message": "x"}}], "server", True),
        ({"choices": [{"error": {"code": 429, "message": "x"}, "message": {"content": ""}}]}, "rate_limit", True),
        ({"choices": None}, "malformed", True),
        ({"choices": "x"}, "malformed", True),
        ({}, "malformed", True),
        ([], "malformed", True),
        ("text", "malformed", True),
        (None, "malformed", True),
    ],
)
def test_errors_inside_a_200(body: Any, kind: str, retried: bool) -> None:
    found = read_answer(json.dumps(body).encode(), {}, streamed=False)
    assert isinstance(found, Failure)
    assert (found.kind, found.action in (Action.RETRY, Action.PACE)) == (kind, retried)


def test_html_and_nothing_and_halves_are_malformed() -> None:
    for raw in (b"<html>hello</html>", b"", b"  \n", b'{"choices": [', b"\xff\xfe", b"[" * 100_000):
        found = read_answer(raw, {}, streamed=False)
        assert isinstance(found, Failure)
        assert found.action is Action.RETRY


def test_openrouters_error_in_the_middle_of_a_stream() -> None:
    broken = chunk({"content": ""}, finish="error", error={"code": "server_error", "message": "disconnected"})
    found = stream(": OPENROUTER PROCESSING", chunk({"content": "par"}), broken)
    assert isinstance(found, Failure)
    assert (found.kind, found.action, found.message) == ("server", Action.RETRY, "disconnected")


def test_openrouters_own_cost_counts_and_an_upstreams_does_not() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.00014}
    assert answer(document(usage=usage), cost_in_usage=True).usd == Decimal("0.00014")
    assert answer(document(usage=usage)).usd is None


def test_a_litellm_proxy_reports_in_a_header() -> None:
    found = answer(document(), {"x-litellm-response-cost": "3.5e-05"})
    assert (found.usd, found.usd_source) == (Decimal("0.000035"), "reported")


@pytest.mark.parametrize("amount", ["-1", "NaN", "1e400", "true", '"x"', "[]", "99999999999"])
def test_no_amount_is_made_up(amount: str) -> None:
    raw = json.dumps(document(meta={"usage": {"usd_spent": "@"}})).replace('"@"', amount).encode()
    found = read_answer(raw, {}, streamed=False)
    assert isinstance(found, Answer)
    assert found.usd is None


def test_dollars_keep_every_digit_and_finer_ones_are_rounded() -> None:
    for text, usd in (("0.123456789012", "0.123456789012"), ("1E-13", "0"), ("0.0000000000005", "0"), ("0.1", "0.1")):
        raw = json.dumps(document(meta={"usage": {"usd_spent": "@"}})).replace('"@"', text).encode()
        found = read_answer(raw, {}, streamed=False)
        assert isinstance(found, Answer)
        assert found.usd == Decimal(usd)


def test_dollars_and_credits_that_differ_are_flagged() -> None:
    assert answer(document(meta={"usage": {"usd_spent": 0.001, "credits_used": 2000}})).flags == ()
    assert answer(document(meta={"usage": {"usd_spent": 0.001, "credits_used": 2002}})).flags == ("cost_mismatch",)


def test_zero_usage_is_flagged() -> None:
    assert answer(document(usage={"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})).flags == (
        "zero_usage",
    )


def test_groq_says_its_usage_twice_and_azure_begins_with_an_empty_chunk() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    found = stream(
        {"choices": [], "created": 0, "id": "", "model": "", "prompt_filter_results": []},
        chunk({"content": "x"}, model="m"),
        chunk({}, finish="stop", x_groq={"usage": usage}),
        {"choices": [], "usage": usage},
    )
    assert isinstance(found, Answer)
    assert (found.text, found.model, found.usage.total_tokens) == ("x", "m", 7)


def test_a_finished_stream_without_finish_reason_counts_if_it_says_done() -> None:
    found = stream(chunk({"content": "x"}))
    assert isinstance(found, Answer)
    assert (found.text, found.finish_reason) == ("x", "unknown")
    assert isinstance(stream(chunk({"content": "x"}), done=False), Failure)


def test_a_connection_that_breaks_after_the_finish_reason_loses_no_answer() -> None:
    broke = Failure("disconnect", Action.RETRY, "gone")
    reader = AnswerReader({}, streamed=True)
    reader.feed(f"data: {json.dumps(chunk({'content': 'x'}, finish='stop'))}\n\ndata: {{".encode())
    found = reader.close(broke)
    assert isinstance(found, Answer)
    assert (found.text, found.flags) == ("x", ("incomplete_tail",))
    half = AnswerReader({}, streamed=True)
    half.feed(f"data: {json.dumps(chunk({'content': 'x'}))}\n\n".encode())
    assert half.close(broke) is broke


def test_a_last_chunk_that_repeats_the_whole_message_adds_nothing() -> None:
    last = {"choices": [{"index": 0, "message": {"content": "ab"}, "finish_reason": "stop"}]}
    found = stream(chunk({"content": "a"}), chunk({"content": "b"}), last)
    assert isinstance(found, Answer)
    assert found.text == "ab"


def test_a_bare_error_line_and_an_error_event_in_words_are_failures() -> None:
    found = stream(chunk({"content": "x"}), '{"error": {"code": 503, "message": "gone"}}', done=False)
    assert isinstance(found, Failure)
    assert found.kind == "server"
    words = stream("event: error\ndata: internal trouble", done=False)
    assert isinstance(words, Failure)
    assert words.message == "internal trouble"


def test_gemini_reasoning_outside_and_inside_of_completion() -> None:
    outside = {"prompt_tokens": 9, "completion_tokens": 566, "total_tokens": 1521,
               "completion_tokens_details": {"reasoning_tokens": 946}}  # fmt: skip
    inside = {"prompt_tokens": 6, "completion_tokens": 3050, "total_tokens": 3056,
              "completion_tokens_details": {"reasoning_tokens": 1097}}  # fmt: skip
    assert answer(document(usage=outside)).usage.billable_output == 1512
    assert answer(document(usage=inside)).usage.billable_output == 3050


def test_an_event_of_many_megabytes_is_read() -> None:
    text = "x" * 3_000_000
    found = stream(chunk({"content": text}, finish="stop"))
    assert isinstance(found, Answer)
    assert found.text == text
