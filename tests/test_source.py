"""Inputs: CSV, TSV, Parquet and JSONL, streamed, with types kept and faults named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.columns import build
from batchrun.errors import InputError
from batchrun.job import Job
from batchrun.source import Source


def source(folder: Path, **setting: Any) -> Source:
    job = Job.model_validate({"input": setting, "provider": "local", "model": "m", "output": "o.parquet"})
    job._path = folder / "job.yaml"
    return Source(job)


def rows(found: Source, only: list[str] | None = None) -> list[dict[str, Any]]:
    batches = list(found.batches(only))
    starts = [batch.start for batch in batches]
    assert starts == [sum(batch.rows.num_rows for batch in batches[:index]) for index in range(len(batches))]
    return [row for batch in batches for row in batch.rows.to_pylist()]


def fault(folder: Path, **setting: Any) -> str:
    with pytest.raises(InputError) as caught:
        rows(source(folder, **setting))
    return str(caught.value)


def test_csv_is_text_with_bom_quotes_newlines_and_gzip(tmp_path: Path) -> None:
    text = '\ufeffid,"a text"\n1,"x, ""y""\nz"\n\n2,\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
    expected = [{"id": "1", "a text": 'x, "y"\nz'}, {"id": "2", "a text": ""}]
    assert rows(source(tmp_path, path="a.csv")) == expected
    assert rows(source(tmp_path, path="a.csv.gz")) == expected
    assert rows(source(tmp_path, path="a.csv"), ["id"]) == [{"id": "1"}, {"id": "2"}]


def test_other_encodings_by_option(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes("näme\tb\nü\t1\n".encode("latin-1"))
    assert rows(source(tmp_path, path="a.tsv", encoding="latin-1")) == [{"näme": "ü", "b": "1"}]
    assert "is not utf-8" in fault(tmp_path, path="a.tsv")
    assert "encoding:" in fault(tmp_path, path="a.tsv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n3\n", "line 3: 1 cells where the header has 2"),
        ("a,b\n1,2,3\n", "line 2: 3 cells where the header has 2"),
        ("a,a\n1,2\n", "line 1: the column name 'a' stands twice"),
        ("", "is empty: it has no header line"),
        ('a,b\n1,"2\n', "no valid CSV"),
    ],
)
def test_a_csv_that_is_not_right_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    assert said in fault(tmp_path, path="a.csv")


def test_parquet_types_survive(tmp_path: Path) -> None:
    table = pa.table(
        {
            "big": pa.array([2**63 - 1, None], pa.int64()),
            "money": pa.array([Decimal("1.10"), None], pa.decimal128(10, 2)),
            "when": pa.array([datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC), None], pa.timestamp("us", tz="UTC")),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "nested": pa.array([{"a": [1, 2]}, None]),
            "u8": pa.array([255, 0], pa.uint8()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = source(tmp_path, path="a.parquet")
    assert found.schema == table.schema.remove_metadata()
    assert rows(found) == table.to_pylist()


def test_jsonl_keeps_types_and_64_bit_ids(tmp_path: Path) -> None:
    records = [{"id": 2**63 - 1, "t": "2026-01-01", "n": 1}, {"id": 1, "n": 1.5, "l": [{"a": "ü"}]}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    found = source(tmp_path, path="a.jsonl")
    assert rows(found) == [
        {"id": 2**63 - 1, "t": "2026-01-01", "n": 1.0, "l": None},
        {"id": 1, "t": None, "n": 1.5, "l": [{"a": "ü"}]},
    ]
    assert found.schema.field("t").type == pa.string()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}\n{"a": "x"}\n', "line 2: column 'a': is string here and int64 above"),
        ('{"a": 1}\n[1]\n', "line 2: should be an object"),
        ('{"a": 1}\n{"a": \n', "line 2: no valid JSON"),
        ('{"a": 9223372036854775808}\n', "line 1: column 'a': 9223372036854775808 does not fit into 64 bits"),
        ('{"a": NaN}\n', "line 1: no valid JSON: NaN is no JSON"),
    ],
)
def test_a_jsonl_that_is_not_right_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    assert said in fault(tmp_path, path="a.jsonl")


def test_globs_are_read_in_sorted_order_and_limits_hold(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.csv").write_text(f"x\n{name}1\n{name}2\n", encoding="utf-8")
    assert [row["x"] for row in rows(source(tmp_path, path="*.csv"))] == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert [row["x"] for row in rows(source(tmp_path, path="*.csv", limit=3))] == ["a1", "a2", "b1"]
    assert rows(source(tmp_path, path="*.csv", limit=0)) == []
    (tmp_path / "d.csv").write_text("y\n1\n", encoding="utf-8")
    assert "its columns (y) differ from those of" in fault(tmp_path, path="*.csv")


def test_columns_are_selected_cast_renamed_and_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b,c,d\n1,2026-01-02,x,true\n,,y,\n", encoding="utf-8")
    assert rows(source(tmp_path, path="a.csv", columns=["c", "a"])) == [{"c": "x", "a": "1"}, {"c": "y", "a": ""}]
    found = source(tmp_path, path="a.csv", columns={"a": "int64", "b": "date", "c": {"name": "k"}, "d": "bool"})
    assert rows(found) == [{"a": 1, "b": date(2026, 1, 2), "k": "x", "d": True},
                           {"a": None, "b": None, "k": "y", "d": None}]  # fmt: skip
    assert rows(source(tmp_path, path="a.csv", columns={"a": None, "b": None, "d": None})) == [{"c": "x"}, {"c": "y"}]
    assert "row 1: column 'c': 'x' is no int64" in fault(tmp_path, path="a.csv", columns={"c": "int64"})
    assert "did you mean 'a'" in fault(tmp_path, path="a.csv", columns=["aa"])
    assert "is no type" in fault(tmp_path, path="a.csv", columns={"a": "int65"})


def test_what_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    assert "is no regular file" in fault(tmp_path, path="pipe.csv")
    assert "standard input cannot be the input" in fault(tmp_path, path="-")
    assert "is a folder" in fault(tmp_path, path=".")
    assert "there is no file" in fault(tmp_path, path="none-*.csv")
    (tmp_path / "a.xlsx").write_text("x")
    assert "set input: {format:" in fault(tmp_path, path="a.xlsx")
    (tmp_path / "a.parquet").write_text("no parquet")
    assert "a.parquet: cannot be read" in fault(tmp_path, path="a.parquet")
    (tmp_path / "id.csv").write_text("a\n1\n")
    assert "input.id: there is no column 'b'" in fault(tmp_path, path="id.csv", id="b")


CELLS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\r"), max_size=12)


@settings(max_examples=60)
@given(st.lists(st.tuples(CELLS, CELLS), max_size=20))
def test_csv_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *table])
    (folder / "a.csv").write_text(text.getvalue(), encoding="utf-8", newline="")
    assert [(row["a"], row["b"]) for row in rows(source(folder, path="a.csv"))] == table


KINDS: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): st.text(st.characters(blacklist_categories=("Cs",)), max_size=8),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(allow_nan=False),
    pa.bool_(): st.booleans(),
    pa.date32(): st.dates(),
    pa.timestamp("us", tz="UTC"): st.datetimes(timezones=st.just(UTC)),
    pa.list_(pa.string()): st.lists(st.text(st.characters(blacklist_categories=("Cs",)), max_size=4), max_size=3),
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=50)
@given(data=st.data())
def test_columns_are_built_as_arrow_builds_them(kind: pa.DataType, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.none() | KINDS[kind], max_size=20))
    found = build(values, kind)
    found.validate(full=True)
    assert found.equals(pa.array(values, kind))
