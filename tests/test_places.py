"""Rows from the middle of a file are found again without reading it from the top."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun import files
from batchrun.job import Job
from batchrun.source import Source

CELLS = st.text(alphabet=st.sampled_from("ab,\"'\n\r ;é漢😀\t"), max_size=12)


def _files(folder: Path, form: str, tables: list[list[list[str]]], encoding: str, mark: bool) -> str:
    """The tables as files of a format, and a pattern that names them."""
    for number, rows in enumerate(tables):
        path = folder / f"part{number}.{form}"
        if form == "parquet":
            table = pa.table({name: [row[place] for row in rows] for place, name in enumerate(("a", "b"))},
                             schema=pa.schema([("a", pa.string()), ("b", pa.string())]))  # fmt: skip
            pq.write_table(table, path, row_group_size=5)
            continue
        with path.open("w", newline="", encoding="utf-8-sig" if mark and encoding == "utf-8" else encoding) as fp:
            if form == "csv":
                csv.writer(fp, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
            else:
                for row in rows:
                    fp.write(json.dumps({"a": row[0], "b": row[1]}, ensure_ascii=False) + "\n\n")
    return str(folder / f"part*.{form}")


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(["csv", "jsonl", "parquet"]),
    tables=st.lists(st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=30), min_size=1, max_size=3),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "gb18030"]),
    mark=st.booleans(),
    ends=st.tuples(st.integers(0, 100), st.integers(0, 100)),
)
def test_rows_from_the_middle_are_those_of_the_whole(
    form: str, tables: list[list[list[str]]], encoding: str, mark: bool, ends: tuple[int, int]
) -> None:
    start, stop = sorted(ends)
    if form == "jsonl" and not any(tables):
        tables = [[["x", "y"]]]
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_PLACE_ROWS", 4)
        patch.setattr(files, "_BATCH_ROWS", 3)
        tables = [rows or [["x", "y"]] for rows in tables]
        pattern = _files(Path(name), form, tables, encoding, mark)
        job = Job.model_validate(
            {"input": {"path": pattern, "encoding": encoding}, "prompt": "x", "provider": "openai", "model": "m",
             "output": "o.parquet"}
        )  # fmt: skip
        job._path = Path(name) / "job.yaml"
        first = Source(job)
        whole = [row for batch in first.batches() for row in batch.rows.to_pylist()]
        assert len(whole) == sum(map(len, tables))
        # Through JSON, as the ledger keeps it.
        known = json.loads(json.dumps({"files": first.fingerprint(), **first.knowledge()}))
        for reader in (first, Source(job, known), Source(job)):
            found = list(reader.batches(None, start, stop))
            assert [row for batch in found for row in batch.rows.to_pylist()] == whole[start:stop]
            position = start
            for batch in found:
                assert batch.start == position
                position += batch.rows.num_rows


def test_what_is_known_of_a_file_is_not_used_once_it_has_changed(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("a\n" + "old\n" * 20_000)
    job = Job.model_validate(
        {"input": "in.csv", "prompt": "x", "provider": "openai", "model": "m", "output": "o.parquet"}
    )
    job._path = tmp_path / "job.yaml"
    first = Source(job)
    assert sum(batch.rows.num_rows for batch in first.batches()) == 20_000
    known = {"files": first.fingerprint(), **first.knowledge()}
    assert known["file_rows"] == [20_000]
    assert len(known["places"][0]) == 2
    (tmp_path / "in.csv").write_text("a\n" + "newer\n" * 9_000)
    second = Source(job, known)
    assert second.knowledge()["file_rows"] == [None]
    assert [row for batch in second.batches(None, 8_999) for row in batch.rows.to_pylist()] == [{"a": "newer"}]


def test_a_row_near_the_end_is_read_without_what_stands_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.csv").write_text("a\n" + "".join(f"{number}\n" for number in range(50_000)))
    job = Job.model_validate(
        {"input": "in.csv", "prompt": "x", "provider": "openai", "model": "m", "output": "o.parquet"}
    )
    job._path = tmp_path / "job.yaml"
    first = Source(job)
    assert sum(batch.rows.num_rows for batch in first.batches()) == 50_000
    lines = 0

    def counted(*args: Any) -> Iterator[str]:
        nonlocal lines
        for line in read(*args):
            lines += 1
            yield line

    read = files.lines_of
    monkeypatch.setattr(files, "lines_of", counted)
    known = {"files": first.fingerprint(), **first.knowledge()}
    found = [row for batch in Source(job, known).batches(None, 49_990, 49_992) for row in batch.rows.to_pylist()]
    assert found == [{"a": "49990"}, {"a": "49991"}]
    assert lines <= files._PLACE_ROWS + files._BATCH_ROWS
