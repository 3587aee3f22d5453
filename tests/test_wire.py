"""The wire: every conformance case at the level of the parser, and the laws of streams."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun import wire
from batchrun.failures import parse_retry_after, read_failure
from batchrun.kept import read_kept
from batchrun.money import PICO_PER_USD, from_pico, to_pico, usd_text
from batchrun.prices import Price
from batchrun.records import Action, Answer, Failure
from batchrun.sse import EventParser
from batchrun.usage import Usage, count, merge, read_usage, settle
from batchrun.wire import AnswerReader, read_answer, request_body

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "conformance.jsonl").read_text(encoding="utf-8").splitlines()
]
STREAMS = [case for case in CASES if case["kind"] == "sse"]


def read_case(case: dict[str, Any]) -> Answer | Failure:
    headers = {name.lower(): value for name, value in case["headers"].items()}
    if case["kind"] == "error":
        return read_failure(case["status"], headers, case["body"].encode())
    if case["kind"] == "json":
        return read_answer(case["body"].encode(), headers, streamed=False)
    return read_pieces([chunk.encode("latin-1") for chunk in case["chunks"]], headers)


def read_pieces(pieces: list[bytes], headers: dict[str, str] | None = None) -> Answer | Failure:
    reader = AnswerReader(headers or {}, streamed=True)
    for piece in pieces:
        reader.feed(piece)
    return reader.close()


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_conformance(case: dict[str, Any]) -> None:
    expect, found = case["expect"], read_case(case)
    if "error" in expect:
        assert isinstance(found, Failure)
        assert found.kind == expect["error"]
        assert (found.action in (Action.RETRY, Action.PACE)) is expect["retryable"]
        if "fatal_run" in expect:
            assert (found.action is Action.STOP) is expect["fatal_run"]
        if "code" in expect:
            assert found.code == str(expect["code"])
        if "request_id" in expect:
            assert found.request_id == expect["request_id"]
        if expect.get("retry_after") == "date":
            assert found.retry_after is not None
            assert found.retry_after > 86_400
        elif "retry_after" in expect:
            assert found.retry_after == expect["retry_after"]
        return
    assert isinstance(found, Answer), found
    usage = found.usage
    facts: dict[str, Any] = {
        "text": found.text, "finish": found.finish_reason, "finish_raw": found.finish_reason_raw,
        "inp": usage.prompt_tokens, "out": usage.completion_tokens, "total": usage.total_tokens,
        "cached": usage.cached_tokens, "cache_write": usage.cache_write_tokens,
        "reasoning_tokens": usage.reasoning_tokens, "out_billable": usage.billable_output,
        "usd": usd_text(found.usd) if found.usd is not None else None,

        "credits": int(found.credits_used) if found.credits_used is not None else None,
        "reasoning": found.reasoning or "", "tool_calls": len(found.tool_calls), "id": found.answer_id,
        "model": found.model,
    }  # fmt: skip
    if "tool_args" in expect:
        facts["tool_args"] = found.tool_calls[0]["function"]["arguments"]  # type: ignore[index]
    for name in expect.keys() & facts.keys():
        assert facts[name] == expect[name], name
    if "cost_source" in expect:
        assert found.usd_source == ("credits" if expect["cost_source"].endswith("2e6") else "reported")


@pytest.mark.parametrize("case", STREAMS, ids=[case["id"] for case in STREAMS])
def test_a_stream_reads_the_same_byte_by_byte_and_cut_anywhere(case: dict[str, Any]) -> None:
    raw = "".join(case["chunks"]).encode("latin-1")
    whole = read_pieces([raw])
    assert read_pieces([raw[index : index + 1] for index in range(len(raw))]) == whole
    for end in range(len(raw)):
        found = read_pieces([raw[:end]])
        if isinstance(found, Answer) and isinstance(whole, Answer):
            assert found.text == whole.text  # a finish reason had been seen: nothing of the text is missing
        elif isinstance(found, Failure):
            assert found == whole or found.action in (Action.RETRY, Action.PACE)


@settings(max_examples=1000)
@given(data=st.data(), case=st.sampled_from(STREAMS))
def test_any_split_of_a_stream_gives_the_same_result(data: st.DataObject, case: dict[str, Any]) -> None:
    raw = "".join(case["chunks"]).encode("latin-1")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert read_pieces(pieces) == read_pieces([raw])


@settings(max_examples=1000)
@given(raw=st.binary(max_size=300), streamed=st.booleans(), status=st.sampled_from([200, 400, 429, 500]))
def test_random_bytes_raise_nothing(raw: bytes, streamed: bool, status: int) -> None:
    if status == 200:
        assert isinstance(read_answer(raw, {}, streamed=streamed), (Answer, Failure))
        assert isinstance(read_answer(b"data: " + raw, {}, streamed=streamed), (Answer, Failure))
    else:
        assert isinstance(read_failure(status, {}, raw), Failure)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["choices", "message", "delta", "content", "usage", "prompt_tokens", "total_tokens", "error", "code",
             "meta", "state", "event", "finish_reason", "index", "tool_calls", "function", "arguments", "usd_spent",
             "detail", "status", "details", "x_groq", "reasoning", "reasoning_details", "id", "model", "cost",
             "credits_used"]
        ),
        inner, max_size=6,
    ),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=1000)
@given(document=JSON)
def test_no_json_of_any_shape_raises(document: Any) -> None:
    raw = json.dumps(document).encode()
    for streamed in (False, True):
        assert isinstance(read_answer(raw, {}, streamed=streamed), (Answer, Failure))
    assert isinstance(read_answer(b"data: " + raw + b"\n\n", {}, streamed=True), (Answer, Failure))
    assert isinstance(read_failure(500, {}, raw), Failure)


def said(found: Answer | Failure) -> Answer | Failure:
    """Without what a kept answer need not tell."""
    if isinstance(found, Failure):
        return found
    flags = tuple(flag for flag in found.flags if flag not in ("zero_usage", "cost_mismatch"))
    return found._replace(usage=Usage(), usd=None, usd_source=None, credits_used=None, flags=flags)


@pytest.mark.parametrize("case", [case for case in CASES if case["kind"] == "json"], ids=lambda case: case["id"])
def test_a_kept_answer_says_what_it_said_when_it_came(case: dict[str, Any]) -> None:
    raw = case["body"].encode()
    assert said(read_kept(raw, streamed=False)) == said(read_answer(raw, {}, streamed=False))


UNUSUAL = [
    *(("message", name) for name in ("content", "refusal", "reasoning", "reasoning_content", "reasoning_details")),
    *(("message", name) for name in ("tool_calls", "function_call", "annotations")),
    *(("choice", name) for name in ("index", "finish_reason", "message", "delta", "text", "error", "logprobs")),
    *(("document", name) for name in ("id", "model", "choices", "usage", "meta", "error", "event", "state", "x_groq")),
    *(("document", name) for name in ("object", "message", "detail", "errors", "timings")),
]
VALUES = [
    None, "", " ", "text", "length", "\ud800", "\ud83d\ude00", 0, 1, False, 0.5, "0", [], {}, ["a"],
    {"content": "other"}, {"error": {"message": "no"}}, {"finishReason": "length"}, {"model": "other"},
    [{"id": "call", "function": {"name": "f", "arguments": "{}"}}], [{"text": "a thought"}],
]  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL, ids="-".join)
@settings(max_examples=100)
@given(value=st.sampled_from(VALUES), also=st.none() | st.tuples(st.sampled_from(UNUSUAL), st.sampled_from(VALUES)))
def test_a_kept_answer_that_is_a_little_unusual_says_what_it_said(
    name: tuple[str, str], value: Any, also: tuple[tuple[str, str], Any] | None
) -> None:
    message: dict[str, Any] = {"role": "assistant", "content": "Positive."}
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop"}
    document: dict[str, Any] = {"id": "x", "model": "m", "choices": [choice], "usage": {"prompt_tokens": 1}}
    holders = {"message": message, "choice": choice, "document": document}
    for (holder, key), new in [(name, value), *([also] if also is not None else [])]:
        holders[holder][key] = new
    raw = json.dumps(document).encode()
    assert said(read_kept(raw, streamed=False)) == said(read_answer(raw, {}, streamed=False))


@given(
    events=st.lists(st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=("Cs",)), max_size=20)),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 400), max_size=6),
)
def test_events_come_out_as_they_went_in(events: list[str], end: str, cuts: list[int]) -> None:
    raw = "".join(f"data: {event}{end}{end}" for event in events).encode()
    parser = EventParser()
    found = []
    places = sorted(min(cut, len(raw)) for cut in cuts)
    for start, stop in zip([0, *places], [*places, len(raw)], strict=True):
        found += parser.feed(raw[start:stop])
    found += parser.close()
    assert [event.data for event in found] == events


LINES = st.sampled_from(
    ['data: {"a": 1}', "data: {", 'data: {"b": 2}}', 'data:{"c": 3}', "data: }", '{"d": 4}', "event: error", ": note",
     "data: [DONE]", "data: é漢", "\n", "\n\n", "\r\n", "\r", " ", "\ufeff"]
)  # fmt: skip


@settings(max_examples=500)
@given(lines=st.lists(LINES, max_size=20))
def test_usual_events_are_taken_off_as_all_others_are(lines: list[str]) -> None:
    raw = "".join(lines).encode()
    whole, slow = EventParser(), EventParser()
    one_by_one = [event for index in range(len(raw)) for event in slow.feed(raw[index : index + 1])]
    assert whole.feed(raw) + whole.close() == one_by_one + slow.close()


DELTAS = st.fixed_dictionaries({}, optional={
    "content": st.sampled_from(["a", "", None, ["b"]]), "role": st.just("assistant"), "refusal": st.just("no"),
    "reasoning": st.just("hm"),
})  # fmt: skip
CHOICES = st.fixed_dictionaries({"delta": DELTAS}, optional={
    "index": st.sampled_from([0, 1, None, "0"]), "finish_reason": st.sampled_from([None, "stop", "length", ""]),
    "message": st.just({"content": "whole"}), "text": st.just("t"), "error": st.just({"message": "x"}),
    "logprobs": st.none(),
})  # fmt: skip
CHUNKS = st.fixed_dictionaries({"choices": st.lists(CHOICES, max_size=2)}, optional={
    "id": st.sampled_from(["i", "", None]), "model": st.sampled_from(["m", "n", ""]), "error": st.just("x"),
    "usage": st.sampled_from([None, {}, {"prompt_tokens": 3, "completion_tokens": 1}]), "object": st.just("error"),
    "x_groq": st.just({"usage": {"total_tokens": 9}}), "service_tier": st.just("default"),
})  # fmt: skip


@settings(max_examples=500)
@given(chunks=st.lists(CHUNKS, max_size=8))
def test_usual_chunks_are_read_as_all_others_are(chunks: list[Any]) -> None:
    raw = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks).encode() + b"data: [DONE]\n\n"
    found = read_answer(raw, {}, streamed=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "_usual_piece", lambda chunk: None)
        assert read_answer(raw, {}, streamed=True) == found


def test_a_byte_order_mark_and_a_missing_last_blank_line_lose_no_event() -> None:
    parser = EventParser()
    events = parser.feed('\ufeffdata: {"a": 1}\n\ndata: last'.encode()) + parser.close()
    assert [event.data for event in events] == ['{"a": 1}', "last"]


def test_halves_of_a_surrogate_pair_in_two_chunks_become_one_character() -> None:
    pieces = [
        json.dumps({"choices": [{"index": 0, "delta": {"content": half}}]}) for half in ("\ud83d", "\ude00 \ud800")
    ]
    done = json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    found = read_pieces([f"data: {piece}\n\n".encode() for piece in [*pieces, done]])
    assert isinstance(found, Answer)
    assert found.text == "😀 \ufffd"


# --- failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind", "action"),
    [
        (400, '{"message": "400 {\\"type\\":\\"error\\",\\"error\\":{\\"type\\":\\"invalid_request_error\\",'
              '\\"message\\":\\"Your credit balance is too low to access the Anthropic API.\\"}}"}', "server",
         Action.RETRY),
        (400, '{"error": {"message": "Your credit balance is too low to access the Anthropic API."}}', "billing",
         Action.STOP),
        (403, '{"message": "You have exhausted the available [plan.rule:api_token] resource limit."}', "billing",
         Action.STOP),
        (403, '{"error": {"type": "permission_error", "message": "no access to this model"}}', "forbidden",
         Action.REJECT),
        (429, '[{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "You exceeded your current quota, '
              'please check your plan and billing details.", "details": [{"retryDelay": "34s"}]}}]', "rate_limit",
         Action.PACE),
        (429, '{"error": {"details": {"error_code": "enforced_spend_limit_reached"}, "message": "spend"}}', "quota",
         Action.STOP),
        (500, '{"error": {"code": 500, "message": "the request exceeds the available context size", "type": '
              '"exceed_context_size_error"}}', "bad_request", Action.REJECT),
        (403, '{"error": {"message": "Key limit exceeded (total limit). Manage it using https://x"}}', "billing",
         Action.STOP),
        (400, '[{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "API key not valid. Please pass a '
              'valid API key."}}]', "auth", Action.STOP),
        (400, '{"error": {"message": "The prompt says: invalid api key"}}', "bad_request", Action.REJECT),
        (302, "", "redirect", Action.REJECT),
        (503, "<html><title>Bad</title><script>alert(1)</script><body>down for maintenance</body></html>", "server",
         Action.RETRY),
        (422, '{"detail": [{"loc": ["body", "model"], "msg": "field required"}]}', "bad_request", Action.REJECT),
    ],
)  # fmt: skip
def test_failures_are_judged_by_status_and_words(status: int, body: str, kind: str, action: Action) -> None:
    found = read_failure(status, {}, body.encode())
    assert (found.kind, found.action) == (kind, action)
    assert "alert" not in found.message
    assert found.message


@pytest.mark.parametrize(
    ("headers", "message", "wait"),
    [
        ({"retry-after": "7"}, "x", 7.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, "x", 1.5),
        ({"retry-after": "garbage"}, "Please retry after 38 seconds.", 38.0),
        ({}, "Rate limit reached. Please try again in 1m2.5s.", 62.5),
        ({}, "Please try again in 20ms.", 0.02),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, "x", 360.0),
        ({"x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "6m0s"}, "x", None),
        ({"retry-after": "inf"}, "x", None),
        ({"retry-after": "1e999"}, "x", None),
        ({"retry-after": "-3"}, "x", 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, "x", 0.0),
    ],
)
def test_how_long_to_wait(headers: dict[str, str], message: str, wait: float | None) -> None:
    found = read_failure(429, headers, json.dumps({"error": {"message": message}}).encode())
    assert found.retry_after == wait


@given(st.text(max_size=30))
def test_no_retry_after_raises(text: str) -> None:
    found = parse_retry_after(text)
    assert found is None or found >= 0


# --- usage and money ----------------------------------------------------------------------------------------

COUNTS = st.none() | st.integers(0, 10**9)
USAGES = st.builds(Usage, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS)


@given(USAGES, USAGES, USAGES)
def test_merging_sightings_is_a_maximum(first: Usage, second: Usage, third: Usage) -> None:
    assert merge(first, second) == merge(second, first)
    assert merge(merge(first, second), third) == merge(first, merge(second, third))
    assert merge(first, first) == first
    assert merge(first, Usage()) == first


@given(USAGES)
def test_a_settled_total_covers_both_sides(usage: Usage) -> None:
    found = settle(usage)
    if found.prompt_tokens is not None and found.completion_tokens is not None:
        assert found.total_tokens is not None
        assert found.total_tokens >= found.prompt_tokens + found.completion_tokens
    assert settle(found) == found


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"input_tokens": 10, "cache_read_input_tokens": 80, "cache_creation_input_tokens": 5, "output_tokens": 3},
         (95, 3, 80, 5)),
        ({"prompt_tokens": 100, "prompt_cache_hit_tokens": 60, "prompt_cache_miss_tokens": 40, "completion_tokens": 1},
         (100, 1, 60, None)),
        ({"input_tokens": 100, "input_tokens_details": {"cached_tokens": 60}, "output_tokens": 1}, (100, 1, 60, None)),
        ({"prompt_tokens": 16.0, "completion_tokens": Decimal("4.0")}, (16, 4, None, None)),
        ({"prompt_tokens": True, "completion_tokens": -4}, (None, None, None, None)),
        ("nonsense", (None, None, None, None)),
    ],
)  # fmt: skip
def test_usage_of_every_provider_has_one_form(usage: Any, expected: tuple[int | None, ...]) -> None:
    found = read_usage(usage)
    assert (found.prompt_tokens, found.completion_tokens, found.cached_tokens, found.cache_write_tokens) == expected


@given(st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.decimals(), st.booleans()))
def test_a_count_is_a_count_or_nothing(value: object) -> None:
    found = count(value)
    assert found is None or (type(found) is int and found >= 0)


@given(st.integers(0, 9 * 10**18))
def test_pico_dollars_come_back(pico: int) -> None:
    assert to_pico(from_pico(pico)) == pico
    assert Decimal(usd_text(from_pico(pico))) == from_pico(pico)


def test_list_price_of_claude_sonnet_4() -> None:
    price = Price(Decimal(3), Decimal(15), cache_read_mtok=Decimal("0.3"))
    assert price.usd(Usage(1000, 500)) == Decimal("0.0105")
    assert price.usd(Usage(1000, 500, cached_tokens=800)) == Decimal("0.00834")
    assert price.usd(Usage(0, 0, 0)) is None
    assert price.usd(Usage()) is None


def test_the_system_prompt_stands_where_the_dialect_wants_it() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert request_body("m", messages, {"top_k": 3}, system="message") == {
        "model": "m", "messages": messages, "top_k": 3,
    }  # fmt: skip
    assert request_body("m", messages, {}, system="top_level") == {
        "model": "m", "system": "s", "messages": messages[1:],
    }  # fmt: skip


@given(st.integers(0, 2**62))
def test_a_double_of_dollars_is_the_nearest_to_the_exact_amount(pico: int) -> None:
    assert pico / PICO_PER_USD == float(from_pico(pico))
