"""Row → request: strict templates, typed parameters, keys that cover what changes the answer and nothing else."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import JobError
from batchrun.job import Job
from batchrun.providers import resolve
from batchrun.template import NotRenderedError, Template

COLUMNS = ["review", "n", "my column", "messages"]
ROW = {"review": "good", "n": 3, "my column": "x", "messages": None}


def template(base_url: str = "http://127.0.0.1/v1", *, provider: str = "openai", **keys: Any) -> Template:
    base: dict[str, Any] = {"input": "a.csv", "provider": provider, "model": "m", "output": "o.parquet"}
    job = Job.model_validate({**base, "prompt": "{{ review }}"} | keys)
    job._path = Path("/job.yaml")
    return Template(job, COLUMNS, resolve(provider, environ=None, base_url=base_url), "m")


def body(row: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    found = json.loads(template(**keys).request(0, row or ROW).body)
    assert isinstance(found, dict)
    return found


def refusal(row: dict[str, Any] | None = None, **keys: Any) -> str:
    with pytest.raises(NotRenderedError) as caught:
        template(**keys).request(0, row or ROW)
    return str(caught.value)


def test_a_prompt_is_one_user_message() -> None:
    assert body() == {"model": "m", "messages": [{"role": "user", "content": "good"}]}


def test_prompts_of_every_form() -> None:
    assert body(prompt={"system": "s {{ n }}", "user": "u"})["messages"] == [
        {"role": "system", "content": "s 3"}, {"role": "user", "content": "u"},
    ]  # fmt: skip
    parts = [{"role": "user", "content": [{"type": "text", "text": "{{ row['my column'] }}"}]}]
    assert body(prompt={"messages": parts})["messages"][0]["content"] == [{"type": "text", "text": "x"}]
    stored = [{"role": "user", "content": "hi", "name": None}]
    for value in (stored, json.dumps(stored)):
        found = body({**ROW, "messages": value}, prompt={"messages_column": "messages"})
        assert found["messages"] == [{"role": "user", "content": "hi"}]
    assert body({**ROW, "messages": stored}, prompt=None)["messages"] == [{"role": "user", "content": "hi"}]


def test_a_parameter_that_is_wholly_a_template_keeps_its_type() -> None:
    found = body(parameters={"max_tokens": "{{ n }}", "stop": ["{{ review }}!"], "deep": {"a": ["{{ n + 1 }}"]}})
    assert (found["max_tokens"], found["stop"], found["deep"]) == (3, ["good!"], {"a": [4]})
    row = {**ROW, "n": Decimal("0.5"), "review": date(2026, 1, 2)}
    assert body(row, parameters={"temperature": "{{ n }}", "day": "{{ review }}"})["temperature"] == 0.5
    assert body(row, parameters={"day": "{{ review }}"})["day"] == "2026-01-02"


def test_the_seeds_parameters_go_out_as_they_stand() -> None:
    parameters = {
        "max_tokens": 512, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "stop_sequences": ["END"],
        "metadata": {"user": "x"}, "thinking": {"type": "enabled", "budget_tokens": 1024}, "anything": None,
    }  # fmt: skip
    found = body(parameters=parameters)
    assert {name: found[name] for name in parameters} == parameters
    assert body(prompt={"system": "s", "user": "u"}, provider="aimlapi")["messages"][0]["role"] == "system"


def test_streams_ask_for_usage_where_the_dialect_knows_it() -> None:
    assert body(stream=True)["stream_options"] == {"include_usage": True}
    found = body(stream=True, provider="aimlapi")
    assert found["stream"] is True
    assert "stream_options" not in found


def test_all_missing_columns_are_named_at_once() -> None:
    with pytest.raises(JobError) as caught:
        template(prompt={"system": "{{ a }}", "user": "{{ b }} {{ range(3) }}"}, parameters={"x": "{{ c }}"})
    assert "no such column: 'a' (prompt.system), 'b' (prompt.user), 'c' (parameters.x)" in str(caught.value)
    with pytest.raises(JobError, match=r"prompt.user: template line 2: unexpected '}'"):
        template(prompt="a\n{{ review }")


def test_a_row_that_gives_no_prompt_says_why() -> None:
    row = {**ROW, "review": None}
    assert "would show a null (null in this row: review); write {{ review or '' }}" in refusal(row)
    assert body(row, prompt="{{ review or 'nothing' }}")["messages"][0]["content"] == "nothing"
    assert refusal({**ROW, "review": " \n"}) == "the prompt is blank"
    assert "has no attribute" in refusal(prompt="{{ review.x.y }}")
    assert "ZeroDivisionError" in refusal(prompt="{{ n / 0 }}")
    assert "holds no valid JSON" in refusal({**ROW, "messages": "{"}, prompt={"messages_column": "messages"})
    assert "should hold a list of messages (is null)" in refusal(prompt={"messages_column": "messages"})
    assert "surrogate" in refusal({**ROW, "review": "\ud800"})
    assert "cannot be sent as JSON" in refusal({**ROW, "n": float("nan")}, parameters={"x": "{{ n }}"})


@pytest.mark.parametrize(
    "prompt",
    ["{{ ''.__class__.__mro__ }}", "{{ review.__init__.__globals__ }}", "{{ row.update({'a': 1}) }}",
     "{% for x in range(10000000) %}x{% endfor %}"],
)  # fmt: skip
def test_templates_cannot_leave_the_sandbox(prompt: str) -> None:
    assert "cannot be rendered" in refusal(prompt=prompt)


def test_a_key_covers_what_changes_the_answer_and_nothing_else() -> None:
    def key(**keys: Any) -> str:
        return template(**keys).request(0, ROW).key

    base = key()
    assert base.startswith("b2:")
    same = [
        key(stream=True), key(concurrency=1), key(timeout_seconds=1), key(retry={"max_attempts": 1}), key(name="x"),
        key(base_url="http://127.0.0.1:80/v1/"), template().request(7, ROW).key,
    ]  # fmt: skip
    assert set(same) == {base}
    others = [
        key(prompt="{{ review }}."), key(parameters={"max_tokens": 1}), key(base_url="http://127.0.0.1:81/v1"),
        key(base_url="https://127.0.0.1/v1"), key(base_url="http://127.0.0.1/v2"),
        key(prompt={"system": "s", "user": "{{ review }}"}),
    ]  # fmt: skip
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize("depth", [300, 900, 5000])
def test_a_message_nested_deeply_fails_its_row_alone(depth: int) -> None:
    content = '[{"type": "text", "text": "x", "more": ' + "[" * depth + "]" * depth + "}]"
    row = {**ROW, "messages": f'[{{"role": "user", "content": {content}}}]'}
    made = template(prompt={"messages_column": "messages"})
    try:
        assert made.request(0, row).body
    except NotRenderedError as exc:
        assert depth > 300, exc


def test_a_request_without_its_key_is_the_same_request() -> None:
    made = template(parameters={"max_tokens": "{{ n }}"})
    assert made.request(3, ROW, keyed=False) == made.request(3, ROW)._replace(key="")


TEXTS = st.one_of(st.none(), st.text(alphabet=st.sampled_from("a \n\x1c\u3000é{}"), max_size=4))


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.sampled_from([
        "{{ review }}", " {{ n }}", "Review: {{ review }}", "{{ review }} {{ n }}", "{{ review or 'x' }}", " ",
        "{{ row }}", "{{ review }}{{ review }}", {"system": "s {{ review }}", "user": "{{ n }}"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "{{ review }}"}]}]},
        {"messages_column": "messages"},
    ]),
    parameters=st.sampled_from([{}, {"max_tokens": 5}, {"max_tokens": "{{ n }}"}, {"stop": "{{ review }}"}]),
    values=st.lists(st.tuples(TEXTS, st.one_of(st.none(), st.integers(0, 3))), min_size=1, max_size=4),
    whole=st.booleans(),
)  # fmt: skip
def test_rows_that_never_fail_never_fail(prompt: Any, parameters: Any, values: list[Any], whole: bool) -> None:
    made = template(prompt=prompt, parameters=parameters)
    numbers: Any = [n for _, n in values] if whole else [float(n) if n is not None else None for _, n in values]
    columns: dict[str, Any] = {"review": [text for text, _ in values], "n": numbers}
    columns |= {"my column": ["x"] * len(values), "messages": [None] * len(values)}
    rows = pa.RecordBatch.from_pydict(columns)
    if not made.never_fails(rows):
        # It may know less than there is to know, but not of the most usual job.
        assert prompt != "Review: {{ review }}" or parameters.keys() - {"max_tokens"} or None in columns["review"] or (
            parameters == {"max_tokens": "{{ n }}"}
        )  # fmt: skip
        return
    bounds = {made.request(index, row, keyed=False)[4:] for index, row in enumerate(rows.to_pylist())}
    assert len(bounds) == 1


def test_text_that_is_none_is_looked_at_closely() -> None:
    raw = pa.array([b"\xff", b"b"], pa.binary())
    rows = pa.RecordBatch.from_arrays([raw.view(pa.string())], names=["review"])
    assert not template().never_fails(rows)


def test_what_json_cannot_carry_fails_its_row_or_the_job() -> None:
    stored = [{"role": "user", "content": "hi", "x": float("nan")}]
    assert "cannot be sent as JSON" in refusal({**ROW, "messages": stored}, prompt={"messages_column": "messages"})
    with pytest.raises(JobError, match="cannot be sent as JSON"):
        template(parameters={"x": float("inf")})


def test_a_text_is_written_as_json_itself_writes_it() -> None:
    """Character by character: the keys of the answers that ledgers hold depend on it."""
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    asked = template(prompt="<{{ review }}>")
    for start in range(0, len(every), 8192):
        text = "".join(every[start : start + 8192])
        document = {"model": "m", "messages": [{"role": "user", "content": f"<{text}>"}]}
        expected = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        assert asked.request(0, {**ROW, "review": text}).body == expected


def test_half_of_a_surrogate_pair_fails_its_row_wherever_it_stands() -> None:
    stored = [{"role": "user", "content": "\ud800"}]
    assert "surrogate" in refusal({**ROW, "messages": stored}, prompt={"messages_column": "messages"})
    assert "surrogate" in refusal({**ROW, "review": "\ud800"}, parameters={"stop": "{{ review }}"})
