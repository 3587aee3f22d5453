"""Job files and data that mean harm or are merely odd: named with their place, in bounded memory and time."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.documents import parse_json
from batchrun.errors import JobError
from batchrun.loading import load_job
from batchrun.records import Answer, Failure
from batchrun.sse import EventParser
from batchrun.wire import read_answer

from .conftest import FakeProvider, Workspace
from .test_bombs import MOST_MEMORY, run_bounded

Provide = Callable[..., FakeProvider]
HEAD = "input: in.csv\nprompt: '{{ prompt }}'\nprovider: local\nmodel: m\noutput: out.parquet\n"


# --- job files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("parameters: {x: &a " + "A" * 1_000_000 + ", y: [" + "*a, " * 5000 + "]}", "unfolds to more than"),
        ("parameters: [" + "1," * 900_000 + "]", "more than 50000 values"),
        ("# " + "x" * 2_000_000, "longer than 2000000 bytes"),
        ("".join(f"k{number}: 1\n" for number in range(5000)), "… and 4980 more"),
        ("a" * 900 + ": 1", "there is no such key"),
        ('parameters: {"stop": "\\ud800"}', "half of a surrogate pair"),
        ('parameters: {"\\ud800": 1}', "half of a surrogate pair"),
        ("retry: {max_attempts: 1e9999}", "retry.max_attempts"),
        ("max_response_bytes: 1e9999", "max_response_bytes"),
        ("concurrency: true", "concurrency: should be a number (is true)"),
        ("timeout_seconds: false", "timeout_seconds: should be a number (is false)"),
        ("x: !!python/object:os.system ls", "the tag"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_job_file_takes_bounded_memory_time_and_words(work: Workspace, more: str, said: str) -> None:
    work.write_rows(["a"])
    work.job.write_text(HEAD + more, encoding="utf-8")
    code, stderr, memory, seconds = run_bounded(work, "check", "job.yaml")
    assert code == 2, stderr
    assert said in stderr
    assert "Traceback" not in stderr
    assert len(stderr) < 30_000
    assert memory < MOST_MEMORY
    assert seconds < 30


def test_a_job_that_json_has_written_keeps_its_emoji(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url, prompt="😀 {{ prompt }}", parameters={"max_tokens": 9, "stop": "😀"})
    text = work.job.read_text(encoding="utf-8")
    work.job.write_text(json.dumps(json.loads(text), ensure_ascii=True), encoding="utf-8")
    assert work.run().code == 0
    assert work.rows()[0]["response"] == "answer to: 😀 a"


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(HEAD)), st.binary(max_size=6)), max_size=6))
def test_any_bytes_are_a_job_or_a_fault(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]]
) -> None:
    raw = HEAD.encode()
    for place, piece in edits:
        raw = raw[:place] + piece + raw[place + len(piece) // 2 :]
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(raw)
    try:
        load_job(path)
    except JobError as exc:
        assert str(path) in str(exc) or repr(str(path)) in str(exc)


# --- data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"prompt":"a"}'] * 3000 + ['{"prompt":"a","prompt":"b"}'], "line 3001: no valid JSON: the key 'prompt'"),
        (['{"prompt":"a"}', '{"prompt":"\\ud800"}'], "line 2: no valid JSON: a text or key has half"),
        (['{"prompt":"a","m":{"\\ud800":1}}'], "line 1: no valid JSON: a text or key has half"),
        (['{"prompt":"a","n":1e999}'], "line 1: no valid JSON: 1e999 is beyond all numbers"),
        (
            ['{"prompt":"a","id":9007199254740993}', '{"prompt":"b","id":1.5}'],
            "line 1: column 'id': 9007199254740993 would change in a column that also has fractions",
        ),
    ],
)  # fmt: skip
def test_a_line_of_json_that_cannot_be_kept_is_named(work: Workspace, lines: list[str], said: str) -> None:
    (work.folder / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    work.write_job(input="in.jsonl")
    result = work.run()
    assert result.code == 2
    assert said in result.stderr


def test_a_file_is_read_once_however_many_links_lead_to_it(work: Workspace, provide: Provide) -> None:
    provider = provide()
    (work.folder / "data").mkdir()
    (work.folder / "data" / "a.csv").write_text("prompt\na\n")
    (work.folder / "data" / "loop").symlink_to(".")
    (work.folder / "data" / "latest.csv").symlink_to("a.csv")
    work.write_job(provider.base_url, input="data/**/*.csv")
    assert work.run().code == 0
    assert len(provider.requests) == 1


def test_small_files_that_unpack_to_big_rows_fit_into_memory(work: Workspace, provide: Provide) -> None:
    docs = pa.DictionaryArray.from_arrays(pa.array([0] * 400), pa.array(["x" * 1_000_000]))
    table = pa.table({"prompt": [f"q{number}" for number in range(400)], "doc": docs})
    pq.write_table(table, work.folder / "in.parquet", store_schema=False)
    work.write_job(provide().base_url, input="in.parquet", prompt="{{ doc[:5] }} {{ prompt }}")
    code, stderr, memory, _ = run_bounded(work, "check", "job.yaml")
    assert code == 0, stderr
    assert memory < MOST_MEMORY


def test_a_line_without_an_end_is_refused(work: Workspace) -> None:
    with gzip.open(work.folder / "in.csv.gz", "wb") as fp:
        fp.write(b"prompt\n")
        for _ in range(110):
            fp.write(b"x" * 1_000_000)
    work.write_job(input="in.csv.gz")
    code, stderr, memory, _ = run_bounded(work, "check", "job.yaml")
    assert code == 2, stderr
    assert "line 2: is longer than 100000000 characters" in stderr
    assert memory < 2 * MOST_MEMORY


def test_a_cell_of_fifty_megabytes_is_a_prompt_like_any_other(work: Workspace, provide: Provide) -> None:
    (work.folder / "in.csv").write_text("prompt,doc\na," + "x" * 50_000_000 + "\n")
    work.write_job(provide().base_url, prompt="{{ prompt }} {{ doc|length }}")
    assert work.run().code == 0
    assert work.rows()[0]["response"] == "answer to: a 50000000"


def test_a_column_name_of_any_bytes_is_a_fault_of_the_file(work: Workspace) -> None:
    path = work.folder / "in.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "zqxj": ["b"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"zqxj", b"zq\xffj"))
    work.write_job(input="in.parquet")
    result = work.run()
    assert result.code == 2, result.stderr
    assert "cannot be read" in result.stderr


@pytest.mark.parametrize(
    "column", ["range", "dict", "a b", "a.b", "{{ x }}", "if", "row", "self", "loop", "é", "'", '"', "", " ", "😀", "1"]
)
def test_a_column_of_any_name_is_sent_and_written(work: Workspace, provide: Provide, column: str) -> None:
    (work.folder / "in.jsonl").write_text(json.dumps({column: "value", "other": 1}) + "\n", encoding="utf-8")
    prompt = f"{{{{ row[{column!r}] }}}}" if column != "row" else "{{ row }}"
    work.write_job(provide().base_url, input="in.jsonl", prompt=prompt)
    result = work.run()
    assert result.code == 0, result.stderr
    row = work.rows()[0]
    assert (row["response"], row[column], row["other"]) == ("answer to: value", "value", 1)
    (work.folder / "init").mkdir()
    assert work.batchrun("init", "in.jsonl", "-o", "init/job.yaml").code == 0
    assert work.batchrun("check", "init/job.yaml").code == 0


def test_a_value_that_python_has_no_word_for_is_named(work: Workspace) -> None:
    column = pa.array([0, 2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["a", "b"], "at": column}), work.folder / "in.parquet")
    work.write_job(input="in.parquet", prompt="{{ prompt }} {{ at }}")
    result = work.run()
    assert result.code == 2, result.stderr
    assert "row 2: the column 'at'" in result.stderr


@pytest.mark.parametrize("seed", [*range(15), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(15, 90))])
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    """In one process each, as Arrow may fail in C: nothing but an answer or a fault with the file's name."""
    from random import Random

    from .conftest import forks

    chance = Random(seed)
    path = tmp_path / "in.parquet"
    table = pa.table({"prompt": [f"q{n}" * 9 for n in range(2000)], "n": list(range(2000)), "l": [[1, 2]] * 2000})
    pq.write_table(table, path, compression=chance.choice(["zstd", "snappy", "none"]), row_group_size=500)
    raw = bytearray(path.read_bytes())
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(raw)) if chance.random() < 0.5 else chance.randrange(len(raw) - 400, len(raw))
        raw[place] = chance.randrange(256)
    if seed % 5 == 0:
        del raw[chance.randrange(len(raw)) :]
    path.write_bytes(raw)
    job = {
        "input": "in.parquet",
        "prompt": "{{ prompt }} {{ n }}",
        "provider": "local",
        "model": "m",
        "output": "o.parquet",
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    code, _, stderr = forks().function("tests.test_bad_inputs:read_all", job=str(tmp_path / "job.yaml"))
    assert code == 0, stderr


def read_all(job: str) -> None:
    """Read the input of a job whole; a fault names its file."""
    from batchrun.errors import InputError
    from batchrun.source import Source

    try:
        for _ in Source(load_job(Path(job))).batches():
            pass
    except InputError as exc:
        assert "in.parquet" in str(exc), exc


# --- answers ------------------------------------------------------------------------------------------------

NAMES = [
    "choices",
    "message",
    "delta",
    "content",
    "usage",
    "prompt_tokens",
    "completion_tokens",
    "meta",
    "usd_spent",
    "credits_used",
    "error",
    "code",
    "tool_calls",
    "function",
    "arguments",
    "index",
    "finish_reason",
    "x_groq",
    "event",
    "state",
    "reasoning_details",
    "text",
    "total_tokens",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=20,
)
BITS = [
    *(b"data:", b"event:", b"id: 1", b"\n", b"\r", b"\r\n", b" ", b'{"a":1}', b"[DONE]", b":", b"\xef\xbb\xbf", b"x"),
    *(b"\xff", b"{", b"}"),
]


def outcome(raw: bytes, *, streamed: bool) -> Answer | Failure:
    result = read_answer(raw, {"x-aimlapi-usd-spent": "nan"}, streamed=streamed)
    assert isinstance(result, (Answer, Failure))
    if isinstance(result, Answer):
        counts = (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.total_tokens)
        assert all(count is None or count >= 0 for count in counts)
        assert result.usd is None or result.usd >= 0
        (result.text or "").encode()
    return result


@settings(max_examples=500)
@given(JSON, st.booleans())
def test_any_document_is_an_answer_or_a_failure(document: Any, streamed: bool) -> None:
    raw = json.dumps(document).encode()
    outcome(b"data: " + raw + b"\n\n" if streamed else raw, streamed=streamed)
    outcome(json.dumps({"choices": [document], "usage": document, "meta": document}).encode(), streamed=streamed)


@settings(max_examples=500)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_an_answer_or_a_failure(raw: bytes, streamed: bool) -> None:
    outcome(raw, streamed=streamed)
    outcome(b'data: {"choices":[{"delta":{"content":"' + raw + b'"}}]}\n\n', streamed=streamed)


@settings(max_examples=500)
@given(st.lists(st.sampled_from(BITS), max_size=40), st.data())
def test_how_events_are_cut_never_matters(pieces: list[bytes], data: st.DataObject) -> None:
    raw = b"".join(pieces)
    whole = EventParser()
    expected = whole.feed(raw) + whole.close()
    cut = EventParser()
    found = []
    start = 0
    while start < len(raw):
        stop = data.draw(st.integers(start + 1, len(raw)))
        found += cut.feed(raw[start:stop])
        start = stop
    assert found + cut.close() == expected


@settings(max_examples=500)
@given(st.binary(max_size=100) | JSON.map(lambda document: json.dumps(document).encode()))
def test_any_bytes_are_json_or_a_value_error(raw: bytes) -> None:
    with suppress(ValueError):
        parse_json(raw)
