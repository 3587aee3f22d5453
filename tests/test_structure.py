"""Answers → labels and values of a schema: read right or refused with the reason, and columns of the job's types."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from decimal import Decimal
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import JobError
from batchrun.structure import Parsed, Structure

MOOD = Structure.of_labels(["positive", "negative", "neutral"])
NEGATED = Structure.of_labels(["positive", "not positive"])
WORDS = Structure.of_labels(["yes", "no", "on", "off", "true", "false", "null"])
STARS = Structure.of_labels(["1", "2", "3"])
LETTERS = Structure.of_labels(["A", "B", "C"])
ODD = Structure.of_labels(["👍", "C", "C++", "n/a", "Größe", "ΣΊΣΥΦΟΣ", "New  York", "न"])
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mood": {"type": "string", "enum": ["good", "bad"]},
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "score": {"type": ["number", "null"]},
        "is_adult": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "home": {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"type": "integer"}}},
        "more": {"type": "object"},
    },
    "required": ["name"],
}
ANY = Structure.of_schema(PERSON)
STRICT = Structure.of_schema({**PERSON, "additionalProperties": False})
COUNT = Structure.of_schema({"type": "integer"})
NUMBER = Structure.of_schema({"type": ["number", "null"]})
BOOL = Structure.of_schema({"type": ["boolean", "null"]})
ITEM = {"type": ["object", "null"], "properties": {"a": {}}}
NESTED = Structure.of_schema({
    "type": ["object", "null"], "properties": {"value": {"type": ["array", "null"], "items": ITEM}},
})  # fmt: skip
ANYTHING = Structure.of_schema({})
MIXED = Structure.of_schema({"anyOf": [{"type": "integer"}, {"type": "boolean"}]})
LIST = Structure.of_schema({"type": "array", "items": {"type": "number"}})
TEXT = Structure.of_schema({"type": "string"})
KIND = Structure.of_schema({"enum": ["cat", "dog"]})


class Refused(str):
    """Part of the reason."""


MESSY: list[tuple[Structure, str | None, Any]] = [
    # labels: what stands around them
    (MOOD, "positive", "positive"),
    (MOOD, " POSITIVE!\n", "positive"),
    (MOOD, "**Positive**.", "positive"),
    (MOOD, "```text\nneutral\n```", "neutral"),
    (MOOD, "“Negative”", "negative"),
    (MOOD, "- positive", "positive"),
    (MOOD, '["positive"]', "positive"),
    (MOOD, '{"label": "Positive."}', "positive"),
    (MOOD, "{'label': positive,}", "positive"),
    (MOOD, '{"sentiment": "positive", "why": "not negative"}', "positive"),
    (MOOD, 'Sure!\n```json\n[{"label": "neutral", "why": "positive and negative"}]\n```', "neutral"),
    (MOOD, '{"label": "positive", "why": "he said "negative" twice"}', "positive"),
    (MOOD, "The sentiment is positive.", "positive"),
    (MOOD, "It has positive and negative sides.\n\nFinal answer: **negative**.", "negative"),
    (MOOD, "Label: positive\nNo: wait.\nLabel: negative", "negative"),
    (MOOD, "Positive or negative? The tone is warm.\npositive", "positive"),
    (MOOD, "positive\n\nThere is nothing negative in it.", "positive"),
    (MOOD, "<think>negative? no, neutral</think>\n\npositive", "positive"),
    # labels: refused
    (MOOD, "positive or negative", Refused("names several labels: 'positive', 'negative'")),
    (MOOD, "positive\nnegative", Refused("several labels")),
    (MOOD, "It may be positive. Answer: unclear", Refused("none of the labels: 'unclear'")),
    (MOOD, "This is not positive.", Refused("does not clearly name 'positive'")),
    (MOOD, "It isn’t positive", Refused("does not clearly name 'positive'")),
    (MOOD, "Label: not positive", Refused("does not clearly name 'positive'")),
    (MOOD, '{"label": "hardly positive"}', Refused("does not clearly name 'positive'")),
    (MOOD, "Das ist nicht positive", Refused("does not clearly name 'positive'")),
    (MOOD, "Not bad at all. I would say positive.", "positive"),
    (MOOD, "non-positive", Refused("none of the labels: 'non-positive'")),
    (MOOD, "positives", Refused("none of the labels")),
    (MOOD, '{"positive": false}', Refused("none of the labels")),
    (MOOD, '{"positive": fal', Refused("ends before its JSON does")),
    (MOOD, '{"label": null}', Refused("none of the labels: 'null'")),
    (MOOD, '{"label": ["positive", "negative"]}', Refused("several labels")),
    (MOOD, "<think>positive", Refused("empty")),
    (MOOD, "\n \t", Refused("empty")),
    (MOOD, None, Refused("empty")),
    # labels: words inside of others, words that are JSON, numbers, letters, other scripts
    (NEGATED, "It is NOT\npositive.", "not positive"),
    (NEGATED, "positive", "positive"),
    (NEGATED, "It is positive.", "positive"),
    (NEGATED, "It is not really positive.", Refused("does not clearly name 'positive'")),
    (NEGATED, '{"label": "not pos', Refused("ends before")),
    (NEGATED, '{"label": "positive", "why": "it is not', "positive"),
    (WORDS, "No.", "no"),
    (WORDS, "On", "on"),
    (WORDS, "true", "true"),
    (WORDS, '{"label": true}', "true"),
    (WORDS, "null", "null"),
    (WORDS, "Yes, based on the text.", Refused("several labels: 'yes', 'on'")),
    (WORDS, "There is no doubt", Refused("does not clearly name 'no'")),
    (WORDS, "No idea", Refused("does not clearly name 'no'")),
    (WORDS, "on the one hand", Refused("does not clearly name 'on'")),
    (WORDS, "The switch is on.", "on"),
    (WORDS, "The switch is not on.", Refused("does not clearly name 'on'")),
    (WORDS, "no-one", Refused("none of the labels")),
    (WORDS, "None", Refused("none of the labels")),
    (MOOD, "**Answer:**\nIt is positive, I think.", "positive"),
    (Structure.of_labels(["'", "' 1"]), "so: '", "'"),
    (STARS, "2.", "2"),
    (STARS, '{"label": 3}', "3"),
    (STARS, "I give it 2 stars.", "2"),
    (STARS, "1.5", Refused("none of the labels")),
    (STARS, "-1", Refused("none of the labels")),
    (STARS, "1/3", Refused("none of the labels")),
    (STARS, "<3", Refused("none of the labels")),
    (LETTERS, "(b)", "B"),
    (LETTERS, "The answer is B.", "B"),
    (LETTERS, "A matter of taste", Refused("does not clearly name 'A'")),
    (ODD, "I say 👍!", "👍"),
    (ODD, "👍🏽", Refused("none of the labels")),
    (ODD, "It is c++.", "C++"),
    (ODD, "GRÖSSE", "Größe"),
    (ODD, "gro\u0308ße", "Größe"),
    (ODD, "σίσυφος", "ΣΊΣΥΦΟΣ"),
    (ODD, "new york", "New  York"),
    (ODD, "ना", Refused("none of the labels")),
    # objects: what stands around them, and near-JSON
    (ANY, '{"name": "Ann", "age": 42}', {"name": "Ann", "age": 42}),
    (ANY, 'Sure, here it is:\n```json\n{"name": "Ann"}\n```\nAnything else?', {"name": "Ann"}),
    (ANY, 'It\'s [sic] {"name": "Ann"}, as in [1].', {"name": "Ann"}),
    (ANY, "{'name': 'O\\'Hara', 'is_adult': True, 'score': None,}",
     {"name": "O'Hara", "is_adult": True, "score": None}),
    (ANY, "{name: Ann, /* years */ age: 42, // so far\n}", {"name": "Ann", "age": 42}),
    (ANY, '{"name": "two\nlines \\_ \\x41"}', {"name": "two\nlines \\_ A"}),
    (ANY, '{“name”: “Zoë”, "score": .5}', {"name": "Zoë", "score": 0.5}),
    (ANY, '{"name": "He said "hi" to me"}', {"name": 'He said "hi" to me'}),
    (ANY, "{'age': 1, 'name': 'it's'}", Refused("broken JSON")),
    (ANY, '{"name": "5" 6"}', Refused("broken JSON")),
    (ANY, '{"name": "x" "age": 3}', {"name": "x", "age": 3}),
    (ANY, '[{"name": "Ann"}]', {"name": "Ann"}),
    (ANY, '"{\\"name\\": \\"Ann\\"}"', {"name": "Ann"}),
    (ANY, '{"name": "a"} or rather {"name": "a"}', {"name": "a"}),
    (ANY, "<think>{}</think>{\"name\": \"\\ud83d\\ude00\"}", {"name": "😀"}),
    # objects: values of another kind
    (ANY, '{"name": "a", "age": "42", "score": " 1e3 ", "is_adult": "TRUE"}',
     {"name": "a", "age": 42, "score": 1000.0, "is_adult": True}),
    (ANY, '{"name": 7, "age": 3.0, "mood": "Good."}', {"name": "7", "age": 3, "mood": "good"}),
    (ANY, '{"NAME": "a", "age": null, "score": "null"}', {"name": "a", "score": None}),
    (ANY, '{"name": "a", "home": {"city": "Kyōto", "zip": "0012"}}',
     {"name": "a", "home": {"city": "Kyōto", "zip": 12}}),
    (ANY, '{"name": "a", "home": "{\'city\': \'b\'}", "tags": "[\\"x\\"]"}',
     {"name": "a", "home": {"city": "b"}, "tags": ["x"]}),
    (ANY, '{"name": "2026-01-02", "unknown": 1}', {"name": "2026-01-02", "unknown": 1}),
    # objects: refused
    (STRICT, '{"name": "a", "unknown": 1}', Refused("('unknown' was unexpected)")),
    (ANY, "I cannot help with that.", Refused("holds no JSON: 'I cannot help with that.'")),
    (ANY, '{"age": 3}', Refused('"name" is a required property')),
    (ANY, '{"name": null}', Refused("name: is null")),
    (ANY, '{"name": "a", "age": -1}', Refused("age: -1 is less than the minimum of 0")),
    (ANY, '{"name": "a", "age": "forty"}', Refused("age: 'forty' is no whole number")),
    (ANY, '{"name": "a", "age": 1.5}', Refused("age: 1.5 is no whole number")),
    (ANY, '{"name": "a", "age": 9223372036854775808}', Refused("age: 9223372036854775808 is beyond 64 bits")),
    (ANY, '{"name": "a", "age": true}', Refused("age: True is no whole number")),
    (ANY, '{"name": "a", "score": "1,000"}', Refused("score: '1,000' is no number")),
    (ANY, '{"name": "a", "score": NaN}', Refused("NaN is no number")),
    (ANY, "{'name': 'a', 'score': -Infinity}", Refused("-Infinity is no number")),
    (ANY, '{"name": "a", "score": 1%s}' % ("0" * 400), Refused("score: 1000000000")),
    (ANY, '{"name": "a", "score": 1e999}', Refused("'1e999' is beyond the range of numbers")),
    (ANY, '{"name": "a", "is_adult": "yes"}', Refused("is_adult: 'yes' is no true or false")),
    (ANY, '{"name": "a", "mood": "ugly"}', Refused("mood: 'ugly' is none of ['good', 'bad']")),
    (ANY, '{"name": "a", "tags": ["x", null]}', Refused("tags[1]: is null")),
    (ANY, '{"name": "a", "home": {"zip": "x"}}', Refused("home.zip: 'x' is no whole number")),
    (ANY, '{"name": "a", "age": 1', Refused("ends before its JSON does")),
    (ANY, '{"name": "a", "tags": ["x"}', Refused("ends before its JSON does")),
    (ANY, '{"name": "a", "age": 3 of 5}', Refused("holds broken JSON")),
    (ANY, "{'name': 'it''s'}", Refused("holds broken JSON")),
    (ANY, '{"name": , "age": 1}', Refused("holds broken JSON")),
    (ANY, '{"name": "a", "name": "b"}', Refused("'name' stands twice")),
    (ANY, '{"Name": "a", "NAME": "b"}', Refused("'name' stands twice")),
    (ANY, '{"name": "a", "home": "at home"}', Refused("home: 'at home' is no object")),
    (ANY, '{"name": "a", "home": "{} {}"}', Refused("home: '{} {}' is no object")),
    (ANY, '{"name": "he said "}" to me"}', Refused("brackets do not match")),
    (ANY, '{"name": "a"} or {"name": "b"}', Refused("2 different answers")),
    (ANY, '[{"name": "a"}, {"name": "b"}]', Refused("is no object")),
    # other roots
    (COUNT, "42", 42),
    (COUNT, '{"value": "42"}', 42),
    (COUNT, "**42**.", 42),
    (COUNT, "about 42", Refused("'about 42' is no whole number")),
    (NUMBER, "**0.5**", 0.5),
    (NUMBER, "null", None),
    (NUMBER, "about 0.5", Refused("'about 0.5' is no number")),
    (BOOL, "True.", True),
    (BOOL, "none", None),
    (BOOL, 'So: {"value": "false"}', False),
    (NESTED, "null", None),
    (NESTED, '{"value": {"value": [null]}}', {"value": [None]}),
    (NESTED, '{"value": null}', {"value": None}),
    (ANYTHING, '{"value": 1}', {"value": 1}),
    (MIXED, '{"value": 1}', 1),
    (ANYTHING, '{"value": [{"a": "\\ud800"}]}', {"value": [{"a": "\ufffd"}]}),
    (LIST, "The numbers: [1, '2', 3.5,]", [1.0, 2.0, 3.5]),
    (LIST, '{"value": [1]}', [1.0]),
    (LIST, "1, 2", Refused("holds no JSON")),
    (TEXT, "Some {curly} text", "Some {curly} text"),
    (TEXT, "1.50", "1.50"),
    (TEXT, '"quoted"', "quoted"),
    (KIND, "It's a Dog.", "dog"),
    (KIND, '{"value": "CAT"}', "cat"),
    (KIND, "cat or dog", Refused("several labels")),
]  # fmt: skip


@pytest.mark.parametrize(("structure", "answer", "expected"), MESSY, ids=[repr(row[1])[:60] for row in MESSY])
def test_an_answer_is_read_right_or_refused_right(structure: Structure, answer: str | None, expected: Any) -> None:
    parsed = structure.parse(answer)
    if isinstance(expected, Refused):
        assert parsed.value is None
        assert expected in str(parsed.error)
    else:
        assert parsed == Parsed(expected, None)
    batch = pa.RecordBatch.from_arrays(structure.arrays([parsed]), schema=structure.columns)
    assert batch["parse_error"].to_pylist() == [parsed.error]


def test_columns_come_from_the_job_alone() -> None:
    text, choice = pa.string(), pa.dictionary(pa.int32(), pa.string())
    assert MOOD.columns == pa.schema([("label", choice), ("parse_error", text)])
    assert ANY.columns == pa.schema([
        ("mood", choice), ("name", text), ("age", pa.int64()), ("score", pa.float64()), ("is_adult", pa.bool_()),
        ("tags", pa.list_(text)), ("home", pa.struct([("city", text), ("zip", pa.int64())])), ("more", text),
        ("parse_error", text),
    ])  # fmt: skip
    empty = pa.RecordBatch.from_arrays(ANY.arrays([]), schema=ANY.columns)
    assert empty.num_rows == 0


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "integer"}, "int64"),
        ({"type": ["string", "null"]}, "string"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "int64"),
        ({"anyOf": [{"const": "a"}, {"enum": ["b", None]}]}, "dictionary<values=string, indices=int32, ordered=0>"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "string"),
        ({"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"type": "boolean"}}}, "bool"),
        ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "boolean"}}}, "bool"),
        ({"type": "string", "anyOf": [{"minLength": 3}, {"maxLength": 1}]}, "string"),
        ({"type": ["integer", "number"]}, "double"),
        ({"enum": [1, 2, None]}, "int64"),
        ({"const": True}, "bool"),
        ({"enum": [1, "a"]}, "string"),
        ({"type": "array", "items": {"type": "array", "items": {"type": "number"}}}, "list<item: list<item: double>>"),
        ({"type": "array"}, "string"),
        ({"type": "array", "prefixItems": [{}], "items": {"type": "string"}}, "string"),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}},
         "struct<next: string>"),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "integer"}}}, "int64"),
        ({"$ref": "#here", "$defs": {"a": {"$anchor": "here", "type": "integer"}}}, "string"),
        ({"$ref": "#"}, "string"),
        ({}, "string"),
        ({"type": "string", "format": "date"}, "string"),
    ],
)  # fmt: skip
def test_the_type_of_a_schema(schema: dict[str, Any], kind: str) -> None:
    columns = Structure.of_schema({"type": "object", "properties": {"x": schema}} | {
        "$defs": schema.get("$defs", {})
    }).columns  # fmt: skip
    root = Structure.of_schema(schema).columns
    found = str(root.field("value").type) if "value" in root.names else str(pa.struct(list(root)[:-1]))
    assert found == kind
    assert columns.names == ["x", "parse_error"]


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([], "at least one"), (["a", " A "], "'a' and ' A ' are the same but for case and spaces"), ([" "], "blank"),
        ([True], "True is no text; write it in quotes"), (["ö", "o\u0308"], "are the same"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_told_apart_are_refused(labels: list[Any], why: str) -> None:
    with pytest.raises(JobError, match=why):
        Structure.of_labels(labels)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "strin"}, 'schema: type: "strin" is not valid'),
        ({"properties": {"a": {"minimum": "x"}}}, "schema: properties.a.minimum: "),
        ({"pattern": "(["}, "regex"),
        ({"$ref": "https://example.org/x.json"}, "nothing is fetched"),
        ({"$ref": "other.json"}, "other.json"),
        ({"$ref": "#/$defs/missing"}, "does not exist"),
        ({"$schema": "https://example.org/draft"}, "meta-schema"),
        ({"type": "object", "properties": {"parse_error": {}}}, "cannot be named 'parse_error'"),
        ({"type": "object", "properties": {"": {}}}, "cannot be named ''"),
        ({"properties": {True: {}}}, "True is no text"),
        ({"const": {1, 2}}, r"schema.const: \{1, 2\} is no JSON"),
        ({"const": float("nan")}, "is no JSON"),
        ([], "should be a mapping"),
        ({f"a{n}": 1 for n in range(0)} | {"type": "object", "properties": {str(n): {} for n in range(6000)}}, "5000"),
        ({"$ref": "#/$defs/9", "$defs": {"0": {}} | {
            str(n): {"type": "object", "properties": {k: {"$ref": f"#/$defs/{n - 1}"} for k in "abcd"}}
            for n in range(1, 10)}}, "more than 5000"),
    ],
)  # fmt: skip
def test_a_schema_that_gives_no_columns_is_refused(schema: Any, why: str) -> None:
    with pytest.raises(JobError, match=why):
        Structure.of_schema(schema)


def test_a_schema_nested_without_end_is_refused() -> None:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    with pytest.raises(JobError, match="nested deeper than 64"):
        Structure.of_schema(schema)


def test_exact_decimals_of_yaml_are_numbers() -> None:
    found = Structure.of_schema({"type": "number", "minimum": Decimal("0.5"), "maximum": Decimal("2")})
    assert found.parse("0.5") == Parsed(0.5, None)
    assert found.document("bare")["json_schema"]["schema"] == {"type": "number", "minimum": 0.5, "maximum": 2}


LABEL = {"type": "string", "enum": ["positive", "negative", "neutral"]}
WRAPPED = {
    "type": "object", "properties": {"label": LABEL}, "required": ["label"], "additionalProperties": False,
}  # fmt: skip


def test_what_is_sent_where_the_provider_holds_the_answer_to_its_form() -> None:
    def sent(schema: Any, *, strict: bool) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "answer", "strict": strict, "schema": schema}}

    assert MOOD.document("json_schema") == sent(WRAPPED, strict=True)
    assert MOOD.document("bare") == sent(LABEL, strict=False)
    assert MOOD.document("json_object") == {"type": "json_object"}
    assert ANY.document("json_schema") == sent(PERSON, strict=False)
    closed = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert Structure.of_schema(closed).document("json_schema") == sent(closed, strict=False)
    closed["additionalProperties"] = False
    assert Structure.of_schema(closed).document("json_schema") == sent(closed, strict=True)
    nested = {**closed, "properties": {"a": {"type": "array", "items": {"type": "object"}}}}
    assert Structure.of_schema(nested).document("json_schema") == sent(nested, strict=False)
    tree = {"type": "array", "items": {"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/n"}]}, "$defs": {"n": {"const": 1}}}
    wrapped = Structure.of_schema(tree).document("json_schema")["json_schema"]["schema"]
    assert wrapped["properties"]["value"]["items"]["anyOf"] == [{"$ref": "#/properties/value"}, {"$ref": "#/$defs/n"}]
    jsonschema.validate({"value": [1, [1, [1]]]}, wrapped)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"value": [1, [2]]}, wrapped)


def test_what_is_asked_for_in_words_where_the_provider_does_not() -> None:
    for structure in (MOOD, ANY, COUNT):
        assert structure.instruction("json_schema") is None
        assert structure.instruction("bare") is None
    assert str(MOOD.instruction(None)).endswith("\npositive\nnegative\nneutral")
    assert str(MOOD.instruction("json_object")).endswith("\n" + json.dumps(WRAPPED, separators=(",", ":")))
    assert str(ANY.instruction(None)).endswith(json.dumps(PERSON, separators=(",", ":")))
    assert '"value"' in str(COUNT.instruction("json_object"))
    assert '"value"' not in str(COUNT.instruction(None))


def test_an_error_is_short() -> None:
    parsed = ANY.parse(json.dumps({"name": "a", "age": "x" * 10_000, "y" * 10_000: 1}))
    assert len(str(parsed.error)) <= 200
    assert len(str(STRICT.parse(json.dumps({"name": "a", "y" * 10_000: 1})).error)) == 200


def test_columns_survive_a_parquet_file(tmp_path: Any) -> None:
    nested = Structure.of_schema({
        "type": "object",
        "properties": {
            "kinds": {"type": "array", "items": {"enum": ["x", "y"]}},
            "all": {"type": "array", "items": {"type": "object", "properties": {"kind": {"enum": ["x", "y"]}}}},
        },
    })  # fmt: skip
    answers = ['{"kinds": ["x", "Y"], "all": [{"kind": "y"}, {}]}', '{"kinds": []}', "x", "{}"]
    parsed = [nested.parse(answer) for answer in answers]
    table = pa.Table.from_arrays(nested.arrays(parsed), schema=nested.columns)
    pq.write_table(table, tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == table.to_pylist() == [
        {"kinds": ["x", "y"], "all": [{"kind": "y"}, {"kind": None}], "parse_error": None},
        {"kinds": [], "all": None, "parse_error": None},
        {"kinds": None, "all": None, "parse_error": "holds no JSON: 'x'"},
        {"kinds": None, "all": None, "parse_error": None},
    ]  # fmt: skip


def test_neither_pandas_nor_an_unused_library_is_loaded() -> None:
    program = """
import sys
from batchrun.structure import Structure
labels = Structure.of_labels(["a", "b"])
labels.arrays([labels.parse("a"), labels.parse("Label: b")])
assert not {"pandas", "json_repair", "jsonschema_rs"} & sys.modules.keys()
schema = Structure.of_schema({"properties": {"x": {"items": {"properties": {"y": {"enum": ["z"]}}}, "type": "array"}}})
schema.arrays([schema.parse('{"x": [{"y": "z"}]}'), schema.parse("?")])
assert not {"pandas", "json_repair"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# Laws.

LETTERS_OF_LABELS = "abcABC äöÄÖжЖ12-_+'"
DECORATIONS = [
    "{}", "{}.", " {}\n", "**{}**", '"{}"', "`{}`", "```\n{}\n```", "> {}", "({})", "Label: {}",
    "So:\n\nANSWER: **{}**.",
]  # fmt: skip


def distinct_labels(labels: list[str]) -> bool:
    try:
        Structure.of_labels(labels)
    except JobError:
        return False
    return True


label_sets = st.lists(
    st.text(LETTERS_OF_LABELS, min_size=1, max_size=6), min_size=1, max_size=4
).filter(distinct_labels)  # fmt: skip


@given(labels=label_sets, data=st.data())
def test_every_label_in_any_case_and_dress_is_itself(labels: list[str], data: st.DataObject) -> None:
    structure = Structure.of_labels(labels)
    label = data.draw(st.sampled_from(labels))
    written = data.draw(st.sampled_from([label, label.upper(), label.lower(), label.title()]))
    assert structure.parse(data.draw(st.text(LETTERS_OF_LABELS + "\n:.>", max_size=12))).value in {None, *labels}
    dress = data.draw(st.sampled_from([*DECORATIONS, '{{"label": {}}}', "Here: {{'label': {},}}", "[{}]"]))
    text = dress.format(json.dumps(written) if "{{" in dress or "[" in dress else written)
    found = structure.parse(text)
    # In a dress that hides where a label begins it may be refused; it is never another one.
    assert found.value in {label, None}
    if dress in {"{}", "{}.", " {}\n", '"{}"', "`{}`"} or (label.strip().isalnum() and len(label.strip()) > 1):
        assert found == Parsed(label, None)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
MARKS = st.text(st.sampled_from(list("{}[]\"',:\\`\n /*#<>-+.0123abcTrueNone“”\ud800😀")), max_size=60)
PIECES = st.lists(st.sampled_from([
    "name", "age", "positive", "negative", '"', "{", "}", "[", "]", ":", ",", " ", "\n", "label", "answer", "'", "```",
    "1", "null", "<think>", "</think>", "A",
]), max_size=25)  # fmt: skip
ANSWERS = st.text() | MARKS | PIECES.map("".join) | JSON_VALUES.map(json.dumps) | JSON_VALUES.map(repr)


@given(answers=st.lists(ANSWERS, max_size=4))
@settings(max_examples=150)
def test_no_answer_is_an_exception_and_every_answer_fits_its_columns(answers: list[str]) -> None:
    for structure in (MOOD, LETTERS, ODD, ANY, COUNT, LIST, TEXT, KIND, FREE):
        parsed = [structure.parse(answer) for answer in answers]
        batch = pa.RecordBatch.from_arrays(structure.arrays(parsed), schema=structure.columns)
        batch.validate(full=True)
        assert all(answer.error is None or (answer.value is None and len(answer.error) <= 200) for answer in parsed)


FREE = ANYTHING
NAMES = st.text(min_size=1, max_size=4).filter(lambda name: name != "parse_error")
SCALARS: list[tuple[dict[str, Any], st.SearchStrategy[Any]]] = [
    ({"type": "string"}, st.text()),
    ({"type": "integer"}, st.integers(-(2**63), 2**63 - 1)),
    ({"type": "number"}, st.floats(allow_nan=False, allow_infinity=False)),
    ({"type": "boolean"}, st.booleans()),
    ({"type": ["integer", "null"]}, st.none() | st.integers(-(2**63), 2**63 - 1)),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, st.none() | st.text()),
    ({"enum": ["red", "Green", "", None]}, st.sampled_from(["red", "Green", "", None])),
]


@st.composite
def schemas_with_values(draw: st.DrawFn, depth: int = 0) -> tuple[dict[str, Any], st.SearchStrategy[Any]]:
    """A schema and values that fit it."""
    kind = draw(st.sampled_from(["object"] if depth == 0 else ["scalar", "scalar", "array", "object"]))
    if kind == "scalar" or depth == 3:
        return draw(st.sampled_from(SCALARS))
    if kind == "array":
        schema, values = draw(schemas_with_values(depth + 1))
        return {"type": "array", "items": schema}, st.lists(values, max_size=3)
    parts = draw(st.dictionaries(NAMES, schemas_with_values(depth + 1), min_size=1, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(parts)), unique=True))
    values = st.fixed_dictionaries(
        {name: parts[name][1] for name in required},
        optional={name: part[1] for name, part in parts.items() if name not in required},
    )
    properties = {name: part[0] for name, part in parts.items()}
    return {"type": "object", "properties": properties, "required": required}, values


def filled(schema: dict[str, Any], value: Any) -> Any:
    """A value as a column gives it back: what is absent is null."""
    if value is None:
        return None
    if schema.get("type") == "array":
        return [filled(schema["items"], item) for item in value]
    if schema.get("type") == "object":
        return {name: filled(part, value.get(name)) for name, part in schema["properties"].items()}
    return value


@given(data=st.data())
def test_what_fits_a_schema_comes_back_from_its_columns(data: st.DataObject) -> None:
    schema, values = data.draw(schemas_with_values())
    documents = data.draw(st.lists(values, min_size=1, max_size=3))
    dress = data.draw(st.sampled_from(["{}", "Sure:\n```json\n{}\n```\nIt's done.", "[{}]", "\n {}\n{}"]))
    structure = Structure.of_schema(schema)
    parsed = [structure.parse(dress.replace("{}", json.dumps(document))) for document in documents]
    assert [answer.error for answer in parsed] == [None] * len(documents)
    batch = pa.RecordBatch.from_arrays(structure.arrays(parsed), schema=structure.columns).drop_columns("parse_error")
    assert batch.to_pylist() == [filled(schema, document) for document in documents]


@given(document=st.dictionaries(
    st.text("ab 'ü\\", max_size=4), st.none() | st.booleans() | st.integers() | st.text("ab \"'\\\n{}[],:ü", max_size=9)
))  # fmt: skip
def test_a_literal_of_python_is_read_as_what_it_means(document: dict[str, Any]) -> None:
    assert FREE.parse(repr(document)) == Parsed(document, None)


# Bounds.

HOSTILE = {
    "10 MB": '{"name": "' + "x" * 10_000_000 + '"}',
    "2 MB of prose": "positive " * 220_000,
    "200 kB of prose": "A positive, " * 16_000,
    "200 kB of lines": "positive\n" * 22_000,
    "a million braces": "{" * 1_000_000,
    "a million pairs": "{}" * 900_000,
    "nested 100,000 deep": "[" * 100_000 + "]" * 100_000,
    "nested 100,000 objects deep": '{"more":' * 100_000 + "1" + "}" * 100_000,
    "nested 900 deep": '{"name": "a", "more": ' + "[" * 900 + "]" * 900 + "}",
    "nested deeply where text is wanted": '{"name": ' + "[" * 900 + "]" * 900 + "}",
    "many lists": '{"name": "a", "more": [' + "[]," * 100_000 + "]}",
    "unclosed strings": '{"' * 900_000,
    "unclosed comments": "{/*}" * 450_000,
    "unclosed quotes": "{“}" * 600_000,
    "what json-repair takes the square for": "{" + '["' * 2000 + '"]' * 2000 + "}",
    "nested deeply where a label is wanted": '{"label": ' + "[" * 900 + "]" * 900 + "}",
    "nested objects where a label is wanted": '{"label": ' * 900 + "1" + "}" * 900,
    "digits that run on": "3" * 100_000 + " stars",
    "many keys, the last one twice": "{" + "".join(f'"k{number}":0,' for number in range(40_000)) + '"k39999":1}',
    "a long number": '{"name": "a", "age": ' + "1" * 1_000_000 + "}",
    "a long number as text": '{"name": "a", "age": "' + "1" * 100_000 + '"}',
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("structure", [MOOD, ANY, FREE, COUNT], ids=["labels", "schema", "free", "count"])
def test_no_answer_takes_long(structure: Structure, answer: str) -> None:
    began = time.process_time()
    parsed = structure.parse(answer)
    structure.arrays([parsed])
    assert time.process_time() - began < 5
    assert len(parsed.error or "") <= 200


def test_clean_answers_are_read_in_microseconds() -> None:
    def microseconds(structure: Structure, answer: str) -> float:
        best = float("inf")
        for _ in range(5):
            began = time.process_time()
            for _ in range(1000):
                structure.parse(answer)
            best = min(best, (time.process_time() - began) * 1000)
        return best

    person = {"mood": "good", "name": "Ann", "age": 4, "score": 0.5, "is_adult": False, "tags": ["a", "b"]}
    # 0.05 and 6 on a quiet machine: it is to show what makes them slower.
    assert microseconds(MOOD, "positive") < 3
    assert microseconds(ANY, json.dumps(person)) < 40


@pytest.mark.parametrize(
    ("structure", "text", "expected"),
    [
        (MOOD, "positive", "positive"),
        (MOOD, "Positive", "positive"),
        (NEGATED, "not positive", "not positive"),
        (Structure.of_labels(["pos", "positive"]), "pos", None),
        (MOOD, "posi", None),
        (MOOD, "It is neutral, becau", "neutral"),
        (Structure.of_schema({"type": "integer"}), "12", None),
        (Structure.of_schema({"type": "integer"}), '{"value": 12}', 12),
        (Structure.of_schema({"enum": ["pos", "positive"]}), "pos", None),
        (Structure.of_schema({"enum": ["pos", "positive"]}), '"pos"', "pos"),
        (Structure.of_schema({"type": "string"}), "It goes o", None),
        (ANY, '{"name": "Ann"}', {"name": "Ann"}),
        (ANY, '{"name": "Ann", "age": 4', None),
    ],
)
def test_what_was_cut_off_counts_only_where_nothing_can_have_followed(
    structure: Structure, text: str, expected: Any
) -> None:
    found = structure.parse(text, is_cut=True)
    assert found.value == expected
    assert (found.error is None) == (expected is not None)
