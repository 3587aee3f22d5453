"""Data where it lives: input and output in stores, and outputs in parts, here and there."""

from __future__ import annotations

import glob
import gzip
import http.server
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import FileSelector, S3FileSystem

import batchrun
from batchrun import sink, stores
from batchrun.errors import StorageError
from batchrun.remote import RemotePath, check_url
from batchrun.sink import Destination, check_writable, write_parquet, write_parts
from batchrun.written import Written, manifest_of

from .conftest import FakeProvider, Workspace, spent

Provide = Callable[..., FakeProvider]
KEYS = {"AWS_ACCESS_KEY_ID": "an-access-key", "AWS_SECRET_ACCESS_KEY": "a-secret-of-s3", "AWS_REGION": "us-east-1"}


class Bucket:
    """A bucket of an S3 server on loopback."""

    name = "answers"

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        """The server; at the same port, if it was there before. It forgets all when it is stopped."""
        command = [sys.executable, str(Path(__file__).with_name("s3_server.py")), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **KEYS})
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.fs = S3FileSystem(
            access_key=KEYS["AWS_ACCESS_KEY_ID"], secret_key=KEYS["AWS_SECRET_ACCESS_KEY"], region="us-east-1",
            endpoint_override=self.endpoint, allow_bucket_creation=True, allow_bucket_deletion=True,
        )  # fmt: skip
        self.fs.create_dir(self.name)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def clear(self) -> None:
        self.fs.delete_dir_contents(self.name)
        self.abort_uploads()

    def abort_uploads(self) -> None:
        for upload in self._client.list_multipart_uploads(Bucket=self.name).get("Uploads", []):
            self._client.abort_multipart_upload(Bucket=self.name, Key=upload["Key"], UploadId=upload["UploadId"])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {**KEYS, "AWS_ENDPOINT_URL": self.endpoint}

    def put(self, key: str, data: bytes) -> str:
        with self.fs.open_output_stream(f"{self.name}/{key}", compression=None) as fp:
            fp.write(data)
        return self.url(key)

    def get(self, key: str) -> bytes:
        with self.fs.open_input_file(f"{self.name}/{key}") as fp:
            return bytes(fp.read())

    def url(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    @property
    def keys(self) -> list[str]:
        infos = self.fs.get_file_info(FileSelector(self.name, recursive=True))
        return sorted(info.path.removeprefix(f"{self.name}/") for info in infos if info.is_file)

    @property
    def uploads(self) -> int:
        """Uploads under way."""
        return len(self._client.list_multipart_uploads(Bucket=self.name).get("Uploads", []))

    @property
    def _client(self) -> Any:
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="y"
        )


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    if importlib.util.find_spec("moto") is None:
        pytest.skip("there is no S3 server here: moto is not installed (uv run --group s3)")
    bucket = Bucket()
    yield bucket
    bucket.stop()


@pytest.fixture
def bucket(server: Bucket, work: Workspace) -> Bucket:
    server.clear()
    work.env |= server.environment
    return server


def csv_of(prompts: list[str]) -> bytes:
    return "\n".join(["prompt", *prompts, ""]).encode()


def table(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


LEDGER = {"ledger": "job.ledger.sqlite"}
FOLDER = {"path": "answers", "part_mb": 1}
"""An output in parts."""


# --- in a store -----------------------------------------------------------------------------------------------------


def test_input_and_output_in_a_bucket(work: Workspace, provide: Provide, bucket: Bucket) -> None:
    provider = provide(bill="meta")
    source = bucket.put("in/rows.csv", csv_of([f"row {number}" for number in range(20)]))
    work.write_job(provider.base_url, input=source, output=bucket.url("out/{run_id}.parquet"), **LEDGER)
    result = work.run("--json")
    assert result.code == 0, result.stderr
    (key,) = (key for key in bucket.keys if key != "in/rows.csv")
    assert key == f"out/{result.json['run_id']}.parquet"
    assert result.json["output"] == bucket.url(key)
    rows = table(bucket.get(key)).to_pylist()
    assert [row["prompt"] for row in rows] == [f"row {number}" for number in range(20)]
    assert spent(rows) == provider.bill == result.json["usd_spent"]
    assert json.loads((work.folder / "job.last-run.json").read_text())["output"] == bucket.url(key)
    assert work.batchrun("verify", "job.yaml").stdout.startswith("verified: 20 attempts and 20 rows agree")
    bucket.fs.delete_file(f"{bucket.name}/{key}")
    assert work.batchrun("export", "job.yaml").code == 0
    assert table(bucket.get(key)).to_pylist() == rows
    assert "verified" in work.batchrun("verify", "job.yaml").stdout
    shown = work.batchrun("report", ".", "--format", "json").json["totals"]
    assert shown["usd_spent"] == provider.bill
    for text in (work.ledger.read_bytes(), bucket.get(key)):
        assert KEYS["AWS_SECRET_ACCESS_KEY"].encode() not in text


def test_a_store_of_ones_own_is_named_in_the_address(work: Workspace, provide: Provide, bucket: Bucket) -> None:
    del work.env["AWS_ENDPOINT_URL"]
    bucket.put("in/rows.csv", csv_of(["a", "b"]))
    where = f"?endpoint_override={bucket.endpoint}"
    output = {"path": bucket.url("out/") + where, "part_mb": 1}
    work.write_job(provide().base_url, input=bucket.url("in/*.csv") + where, output=output, **LEDGER)
    result = work.run("--json")
    assert (result.code, result.json["ok"]) == (0, 2), result.stderr
    assert bucket.keys == ["in/rows.csv", "out/_manifest.json", "out/part-00000.parquet"]
    assert "verified: 2 attempts and 2 rows agree" in work.batchrun("verify", "job.yaml").stdout


@pytest.mark.parametrize("form", ["csv", "csv.gz", "jsonl", "jsonl.gz", "parquet", "*.csv", "**/*.parquet"])
def test_every_form_of_input_in_a_bucket(work: Workspace, provide: Provide, bucket: Bucket, form: str) -> None:
    prompts = ["plain", "grün 🎈", "with, comma", "last"]
    rows = [{"prompt": prompt, "n": number} for number, prompt in enumerate(prompts)]
    text = "prompt,n\n" + "".join(f'"{row["prompt"]}",{row["n"]}\n' for row in rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    content = {"csv": text.encode(), "jsonl": lines, "parquet": sink.getvalue()}
    kind = "csv" if "csv" in form else "jsonl" if "jsonl" in form else "parquet"
    data = gzip.compress(content[kind]) if form.endswith(".gz") else content[kind]
    names = [f"deep/a.{form}"] if "*" not in form else [f"deep/1/a.{kind}", f"deep/2/b.{kind}", "deep/c.txt"]
    if form == "*.csv":
        names = ["deep/a.csv", "deep/b.csv", "deep/below/c.csv", "deep/c.txt"]
    for name in names:
        bucket.put(name, data)
    work.write_job(provide().base_url, input=bucket.url(f"deep/{form}" if "*" in form else names[0]))
    result = work.run("--json")
    assert result.code == 0, result.stderr
    assert [row["prompt"] for row in work.rows()] == prompts * (2 if "*" in form else 1)


def test_a_run_is_gone_on_with_where_its_data_lives(work: Workspace, provide: Provide, bucket: Bucket) -> None:
    provider = provide(latency=0.3)
    source = bucket.put("rows.csv", csv_of([f"row {number}" for number in range(12)]))
    work.write_job(provider.base_url, input=source, output=bucket.url("out.parquet"), concurrency=2, **LEDGER)
    with work.start("job.yaml") as process:
        provider.wait_for(3)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    states = table(bucket.get("out.parquet"))["status"].to_pylist()
    assert "pending" in states
    provider.hurry()
    result = work.run("--json")
    assert (result.code, result.json["ok"], len(provider.requests)) == (0, 12, 12)
    assert set(table(bucket.get("out.parquet"))["status"].to_pylist()) == {"ok"}
    # And the next run reads the input as it is then.
    bucket.put("rows.csv", csv_of(["another"]))
    assert work.run("--json").json["rows"] == 1


def test_an_input_that_changes_in_its_bucket_is_told(work: Workspace, provide: Provide, bucket: Bucket) -> None:
    provider = provide(latency=0.3)
    source = bucket.put("rows.csv", csv_of([f"row {number}" for number in range(8)]))
    work.write_job(provider.base_url, input=source, concurrency=2)
    with work.start("job.yaml", "--json") as process:
        provider.wait_for(2)
        bucket.put("rows.csv", csv_of(["new", *(f"row {number}" for number in range(8))]))
        stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, json.loads(stdout)["reason"]) == (1, "input_changed")
    provider.hurry()
    assert work.run().code == 0
    assert len(provider.requests) == 9


def test_overrides_lead_into_a_bucket(work: Workspace, provide: Provide, bucket: Bucket) -> None:
    work.write_rows(["here"])
    work.write_job(provide().base_url)
    source = bucket.put("rows.csv", csv_of(["there", "and there"]))
    result = work.run("--input", source, "--output", bucket.url("o.parquet"), "--json")
    assert (result.code, result.json["rows"], result.json["ledger"]) == (0, 2, str(work.ledger)), result.stderr
    assert table(bucket.get("o.parquet")).num_rows == 2
    assert "row 2, user: and there" in work.batchrun("check", "job.yaml", "--input", source).stdout


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"input": "s3://answers/nothing.csv"}, "there is no file s3://answers/nothing.csv"),
        ({"input": "s3://answers/*.csv"}, "there is no file s3://answers/*.csv"),
        ({"input": "s3://answers/in"}, "is a folder: name its files, such as s3://answers/in/*.parquet"),
        ({"input": "s3://nowhere-at-all/x.csv"}, "there is no file"),
        ({"input": "s3:///x.csv"}, "names no bucket"),
        ({"input": "s3://me:secret-word@answers/x.csv"}, "holds a user name or a key"),
        ({"input": "s3://answers/x.csv?secret_key=secret-word"}, "looks like a secret"),
        ({"input": "nope://answers/x.csv"}, "is no kind of address"),
        ({"output": "s3://answers/out.parquet"}, "set ledger:"),
        ({"output": "s3://answers/out.csv", **LEDGER}, "does not end in .parquet"),
        ({"output": "s3://answers/out", **LEDGER}, "a folder of parts needs part_mb"),
        ({"output": "s3://nowhere-at-all/out.parquet", **LEDGER}, "cannot be written"),
        ({"output": {"path": "s3://answers/in", "part_mb": 1}, **LEDGER}, "holds the input too"),
        ({"output": "s3://answers/in/part-00000.parquet", **LEDGER}, "is the input too"),
        ({"ledger": "s3://answers/l.sqlite"}, "is not on this machine, and has to be"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_wrong_is_named_before_anything_is_sent(
    work: Workspace, provide: Provide, bucket: Bucket, keys: dict[str, Any], said: str
) -> None:
    provider = provide()
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a"]}), sink)
    source = bucket.put("in/part-00000.parquet", sink.getvalue())
    work.write_job(provider.base_url, **{"input": source} | keys)
    result = work.run()
    assert result.code in (2, 6), result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert "secret-word" not in result.stderr
    assert provider.requests == []
    assert bucket.keys == ["in/part-00000.parquet"]


def test_another_jobs_output_in_a_bucket_is_not_written_over(work: Workspace, provide: Provide, bucket: Bucket) -> None:
    base = provide().base_url
    work.write_rows(["a"])
    for output in (bucket.url("o.parquet"), {"path": bucket.url("parts"), "part_mb": 1}):
        work.write_job(base, output=output, name="one", ledger="one.sqlite")
        assert work.run().code == 0
        work.write_job(base, output=output, name="two", ledger="two.sqlite")
        refused = work.run()
        assert (refused.code, "is that of the job 'one'" in refused.stderr) == (2, True), refused.stderr


def test_a_store_that_goes_away_loses_nothing(work: Workspace, provide: Provide) -> None:
    if importlib.util.find_spec("moto") is None:
        pytest.skip("there is no S3 server here: moto is not installed (uv run --group s3)")
    bucket = Bucket()
    work.env |= bucket.environment
    try:
        provider = provide(latency=0.5)
        work.write_rows([f"row {number}" for number in range(6)])
        work.write_job(provider.base_url, output=bucket.url("out.parquet"), concurrency=3, **LEDGER)
        with work.start("job.yaml", "--json") as process:
            provider.wait_for(1)
            bucket.stop()
            stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 6, stderr
        assert "`batchrun export` writes it again" in stderr
        assert json.loads(stdout)["ok"] == 6
        bucket.start()
        assert work.batchrun("export", "job.yaml").code == 0
        assert set(table(bucket.get("out.parquet"))["status"].to_pylist()) == {"ok"}
        assert len(provider.requests) == 6
    finally:
        with suppress(ValueError):
            bucket.stop()


@pytest.mark.parametrize("in_parts", [False, True], ids=["one object", "parts"])
def test_a_kill_during_the_upload_leaves_no_half_output(
    work: Workspace, provide: Provide, bucket: Bucket, in_parts: bool
) -> None:
    # What does not pack, so that there are many pieces to be sent.
    noise = random.Random(3)
    prompts = [noise.randbytes(30_000).hex() for _ in range(600)]
    work.write_rows(prompts)
    output: Any = {"path": bucket.url("out"), "part_mb": 6} if in_parts else bucket.url("out.parquet")
    provider = provide()
    work.write_job(provider.base_url, output=output, **LEDGER)
    killed = 0
    for chance in (0.0, 0.05, 0.2, 0.5):
        bucket.abort_uploads()
        with work.start("job.yaml") as process:
            while process.poll() is None and not bucket.uploads:
                time.sleep(0.005)
            time.sleep(chance)
            process.kill()
            process.communicate(timeout=60)
        if process.returncode == -signal.SIGKILL:
            killed += 1
            assert [key for key in bucket.keys if not key.rpartition("/")[2].startswith(".")] == []
    assert killed > 0
    result = work.run("--json")
    assert (result.code, result.json["ok"]) == (0, 600), result.stderr
    # One that was killed before it was sent is unknown to us, and nothing to the provider.
    assert 600 <= len(provider.requests) <= 600 + result.json["unknown_outcomes"]
    assert [key for key in bucket.keys if key.rpartition("/")[2].startswith(".")] == []
    assert "verified" in work.batchrun("verify", "job.yaml").stdout


# --- in parts -------------------------------------------------------------------------------------------------------


def parts_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_an_output_in_parts_of_bounded_size(
    work: Workspace, provide: Provide, where: str, request: pytest.FixtureRequest
) -> None:
    noise = random.Random(4)
    prompts = [noise.randbytes(10_000).hex() for _ in range(300)]
    work.write_rows(prompts)
    provider = provide(bill="meta")
    folder = work.folder / "answers"
    path = str(folder)
    if where == "bucket":
        bucket: Bucket = request.getfixturevalue("bucket")
        path = bucket.url("answers")
    work.write_job(provider.base_url, output={"path": path, "part_mb": 1}, **LEDGER)
    result = work.run("--json")
    assert (result.code, result.json["output"]) == (0, path), result.stderr
    if where == "bucket":
        folder.mkdir()
        for key in bucket.keys:
            (folder / key.rpartition("/")[2]).write_bytes(bucket.get(key))
    parts = parts_in(folder)
    assert len(parts) > 3
    assert all(part.stat().st_size <= 1_010_000 for part in parts)
    assert sorted(file.name for file in folder.iterdir()) == ["_manifest.json", *(part.name for part in parts)]
    manifest = json.loads((folder / "_manifest.json").read_text(), parse_float=Decimal)
    assert manifest["parts"] == [part.name for part in parts]
    assert (manifest["run_id"], manifest["usd_spent"]) == (result.json["run_id"], provider.bill)
    # As any reader of datasets finds it.
    frame = pd.read_parquet(folder)
    assert frame["prompt"].tolist() == prompts
    assert "verified: 300 attempts and 300 rows agree" in work.batchrun("verify", "job.yaml").stdout
    # Fewer rows give fewer parts: those of before do not stay.
    work.write_rows(prompts[:20])
    assert work.run().code == 0
    left = bucket.keys if where == "bucket" else [str(file) for file in folder.iterdir()]
    assert sorted(name.rpartition("/")[2] for name in left) == ["_manifest.json", "part-00000.parquet"]
    assert "verified" in work.batchrun("verify", "job.yaml").stdout


def test_parts_are_read_wherever_an_output_is(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="meta")
    work.write_rows([f"row {number} <<{json.dumps({'say': 'ab'[number % 2]})}>>" for number in range(10)])
    work.write_job(provider.base_url, output=FOLDER, labels=["a", "b"])
    assert work.run().code == 0
    one = work.batchrun("report", "answers", "--format", "json").json
    assert (one["totals"]["usd_spent"], one["runs"][0]["ok"]) == (provider.bill, 10)
    both = work.batchrun("report", ".", "--format", "json", "--by", "label").json
    assert both["totals"]["runs"] == 1
    assert {group["label"]: group["ok"] for group in both["groups"]} == {"a": 5, "b": 5}
    assert work.batchrun("compare", "answers", "job.yaml", "--json").code == 0
    result = batchrun.run(work.job, environ={"AIML_API_KEY": "k" * 9})
    frame = result.to_pandas()
    assert (len(frame), str(frame["prompt_tokens"].dtype)) == (10, "Int64")
    # As an input, it is known for batchrun's own.
    work.write_job(provider.base_url, input="answers/part-*.parquet", output="judged.parquet", name="judge")
    refused = work.run()
    assert (refused.code, "or drop them by input" in refused.stderr) == (2, True), refused.stderr


def test_a_part_too_many_is_blamed_and_goes(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a", "b"])
    work.write_job(provide().base_url, output=FOLDER)
    assert work.run().code == 0
    folder = work.folder / "answers"
    shutil.copy(folder / "part-00000.parquet", folder / "part-00001.parquet")
    blamed = work.batchrun("verify", "job.yaml")
    assert (blamed.code, "holds part-00001.parquet, which its manifest does not name" in blamed.stdout) == (1, True)
    assert work.batchrun("export", "job.yaml").code == 0
    assert work.batchrun("verify", "job.yaml").code == 0


def test_killed_while_its_parts_are_shown_a_folder_has_no_manifest(work: Workspace, provide: Provide) -> None:
    noise = random.Random(5)
    work.write_rows([noise.randbytes(10_000).hex() for _ in range(200)])
    work.write_job(provide().base_url, output=FOLDER)
    assert work.run().code == 0
    folder = work.folder / "answers"
    parts = parts_in(folder)
    assert len(parts) > 2
    # As it is then: no manifest, and the last of the parts hidden as yet.
    (folder / "_manifest.json").unlink()
    parts[-1].rename(folder / f".{parts[-1].name}.part")
    blamed = work.batchrun("verify", "job.yaml")
    assert (blamed.code, "is no output of batchrun" in blamed.stdout) == (1, True), blamed
    assert work.batchrun("export", "job.yaml").code == 0
    assert parts_in(folder) == parts
    assert not list(folder.glob(".*"))
    assert "verified: 200 attempts and 200 rows agree" in work.batchrun("verify", "job.yaml").stdout


def test_what_batchrun_has_not_written_is_left_alone(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url, output=FOLDER)
    folder = work.folder / "answers"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    pq.write_table(pa.table({"x": [1]}), folder / "part-00007.parquet")
    refused = work.run()
    assert (refused.code, "which batchrun has not written" in refused.stderr) == (2, True), refused.stderr
    assert provider.requests == []
    (folder / "part-00007.parquet").unlink()
    assert work.run().code == 0
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            {"path": "o.parquet", "part_mb": 5},
            "part_mb writes a folder of parts: 'o.parquet' should not end in .parquet",
        ),
        ({"path": "o"}, "does not end in .parquet; a folder of parts needs part_mb"),
        ({"path": "o", "part_mb": 0}, "output.part_mb"),
        ({"path": ".", "part_mb": 5}, "holds the input too"),
    ],
)
def test_parts_that_cannot_be_are_refused(work: Workspace, provide: Provide, output: Any, said: str) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url, output=output)
    result = work.run()
    assert (result.code, said in result.stderr) == (2, True), result.stderr


def test_parts_without_rows(work: Workspace, provide: Provide) -> None:
    work.write_rows([])
    work.write_job(provide().base_url, output=FOLDER)
    assert work.run().code == 0
    assert pd.read_parquet(work.folder / "answers").empty


def test_a_job_of_another_name_takes_over_its_parts(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url, output=FOLDER, **LEDGER)
    assert work.run().code == 0
    work.write_rows(["a", "b"])
    work.job.rename(work.folder / "renamed.yaml")
    for _ in range(2):
        result = work.batchrun("renamed.yaml", "--adopt-ledger", "--json")
        assert result.code == 0, result.stderr
    assert len(provider.requests) == 1 + 2 + 2
    assert work.batchrun("verify", "renamed.yaml").code == 0


@pytest.mark.parametrize("in_parts", [False, True], ids=["a file", "a folder"])
def test_nothing_of_the_users_is_replaced(work: Workspace, provide: Provide, in_parts: bool) -> None:
    provider = provide()
    work.write_rows(["a"])
    mine = work.folder / ("answers/_manifest.json" if in_parts else "gold.parquet")
    mine.parent.mkdir(exist_ok=True)
    if in_parts:
        mine.write_text('{"entries": ["mine"]}')
    else:
        pq.write_table(pa.table({"gold": ["mine"]}), mine)
    before = mine.read_bytes()
    work.write_job(provider.base_url, output=FOLDER if in_parts else mine.name)
    for options in ((), ("--adopt-ledger",)):
        refused = work.run(*options)
        assert (refused.code, "batchrun has not written" in refused.stderr) == (2, True), refused.stderr
    assert (provider.requests, mine.read_bytes()) == ([], before)
    # Nor by an export, once the job file names it.
    work.write_job(provider.base_url)
    assert work.run().code == 0
    work.write_job(provider.base_url, output=FOLDER if in_parts else mine.name, ledger="out.ledger.sqlite")
    assert work.batchrun("export", "job.yaml").code == 2
    assert mine.read_bytes() == before


def test_shards_add_up_in_one_report(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="meta")
    (work.folder / "state").mkdir()
    for shard in ("01", "02", "03"):
        (work.folder / f"shard-{shard}.csv").write_bytes(csv_of([f"{shard} row {number}" for number in range(5)]))
        work.write_job(
            provider.base_url, name=f"label-{shard}", input=f"shard-{shard}.csv",
            output={"path": f"out/{shard}", "part_mb": 1}, ledger=f"state/label-{shard}.ledger.sqlite",
        )  # fmt: skip
        assert work.run().code == 0
    totals = work.batchrun("report", "state", "--format", "json").json["totals"]
    assert (totals["runs"], totals["ok"], totals["usd_spent"]) == (3, 15, provider.bill)
    assert sum(len(pd.read_parquet(folder)) for folder in (work.folder / "out").glob("0*")) == 15


# --- other stores ---------------------------------------------------------------------------------------------------


class _Ranged(http.server.SimpleHTTPRequestHandler):
    """Serves files whole or in ranges, as object stores and web servers do."""

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        if path.is_dir():
            return self.list_directory(str(path))
        if not path.is_file():
            self.send_error(404)
            return None
        if path.with_name("refuse").exists():
            self.send_error(503)
            return None
        data = path.read_bytes()
        wanted = self.headers.get("Range", "")
        start, _, stop = wanted.removeprefix("bytes=").partition("-")
        piece = data[int(start) : int(stop) + 1 if stop else None] if wanted else data
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(data)}"')
        self.send_header("Content-Length", str(len(piece)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(piece) - 1}/{len(data)}")
        self.end_headers()
        return io.BytesIO(piece)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "web"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Ranged(*args, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_input_over_http(work: Workspace, provide: Provide, tmp_path: Path, web: str) -> None:
    provider = provide()
    (tmp_path / "web" / "rows.csv").write_bytes(csv_of(["a", "b"]))
    pq.write_table(pa.table({"prompt": ["c"]}), tmp_path / "web" / "with blank.parquet")
    for name, prompts in (("rows.csv", ["a", "b"]), ("with blank.parquet", ["c"])):
        work.write_job(provider.base_url, input=f"{web}/{name}")
        result = work.run()
        assert result.code == 0, result.stderr
        assert [row["prompt"] for row in work.rows()] == prompts
    work.write_job(provider.base_url, input=f"{web}/nothing.csv")
    assert "there is no file" in work.run().stderr
    # Changed since: by its mark, for the web has no times.
    work.write_job(provider.base_url, input=f"{web}/rows.csv")
    assert work.run().code == 0
    (tmp_path / "web" / "rows.csv").write_bytes(csv_of(["a", "x"]))
    assert "the input has changed since" in work.batchrun("verify", "job.yaml").stdout


def test_a_server_that_is_away_is_an_error_with_words(work: Workspace, provide: Provide) -> None:
    for url in ("http://127.0.0.1:9/rows.csv", "ftp://127.0.0.1:9/rows.csv"):
        work.write_job(provide().base_url, input=url)
        result = work.run()
        assert (result.code, url in result.stderr) == (6, True), result.stderr
        assert "Traceback" not in result.stderr


def test_a_web_server_that_refuses_says_nothing_of_the_file(
    work: Workspace, provide: Provide, tmp_path: Path, web: str
) -> None:
    provider = provide(latency=0.5)
    rows = tmp_path / "web" / "rows.csv"
    rows.write_bytes(csv_of([f"row {number}" for number in range(6)]))
    work.write_job(provider.base_url, input=f"{web}/rows.csv", concurrency=2)
    with work.start("job.yaml") as process:
        provider.wait_for(2)
        (tmp_path / "web" / "refuse").touch()
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, "it answers 503" in stderr) == (6, True), stderr
    (tmp_path / "web" / "refuse").unlink()
    provider.hurry()
    result = work.run("--json")
    assert (result.code, len(provider.requests)) == (0, 6), result.stderr


def test_a_pattern_over_http(work: Workspace, provide: Provide, tmp_path: Path, web: str) -> None:
    for name in ("a b.csv", "grün.csv"):
        (tmp_path / "web" / name).write_bytes(csv_of([name]))
    work.write_job(provide().base_url, input=f"{web}/*.csv")
    result = work.run()
    assert result.code == 0, result.stderr
    assert [row["prompt"] for row in work.rows()] == ["a b.csv", "grün.csv"]


def test_without_fsspec_it_is_named(work: Workspace, provide: Provide, web: str) -> None:
    (work.folder / "fsspec.py").write_text("raise ImportError('not installed')")
    work.env["PYTHONPATH"] = str(work.folder)
    work.write_job(provide().base_url, input=f"{web}/rows.csv")
    with work.start("job.yaml") as process:
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, "install batchrun[remote]" in stderr) == (2, True), stderr


def in_parts(folder: RemotePath, job: str = "j") -> Destination:
    return Destination(folder, job, part_bytes=10**6, label={"job": job, "run_id": "r"})


def test_outputs_in_a_store_of_fsspec() -> None:
    schema = pa.schema([("x", pa.int64())])
    batches = [pa.record_batch({"x": [1, 2, 3]}, schema=schema)]
    path = RemotePath.of("memory://store/deep/out.parquet")
    write_parquet(path, schema, batches, lambda: '{"run_id": "r"}')
    written = Written.at(path)
    assert written is not None
    assert (written.manifest, written.rows, written.schema.names) == ({"run_id": "r"}, 3, ["x"])
    folder = RemotePath.of("memory://store/deep/parts")
    write_parts(in_parts(folder), schema, batches, lambda: '{"run_id": "r"}')
    again = Written.at(folder)
    assert again is not None
    assert [batch.to_pydict() for batch in again.batches(10)] == [{"x": [1, 2, 3]}]
    assert sorted(file.name for file in folder.iterdir()) == ["_manifest.json", "part-00000.parquet"]


@pytest.mark.parametrize("name", ["run[12].parquet", "what?.parquet", "all*.parquet"])
def test_a_name_that_could_be_a_pattern_is_a_name(name: str) -> None:
    top = RemotePath.of("memory://names")
    others = {".run1.parquet.part", "whatx.parquet", "alls.parquet"}
    for other in others:
        with (top / other).open("wb") as fp:
            fp.write(b"mine")
    schema = pa.schema([("x", pa.int64())])
    check_writable(Destination(top / name, "j"))
    write_parquet(top / name, schema, [], lambda: '{"job": "j"}')
    assert manifest_of(top / name) == {"job": "j"}
    check_writable(Destination(top / name, "j"))
    (top / name).unlink()
    assert {path.name for path in top.iterdir()} == others


def test_parts_of_two_jobs_in_one_folder_are_never_mixed() -> None:
    schema = pa.schema([("x", pa.int64())])
    batches = [pa.record_batch({"x": [1, 2, 3]}, schema=schema)]
    folder = RemotePath.of("memory://store/shared")

    def write(job: str, manifest: Callable[[], str]) -> None:
        write_parts(in_parts(folder, job), schema, batches, manifest)

    def meanwhile() -> str:
        """The other one writes its parts hidden, too, and has not shown them yet."""
        with pytest.raises(RuntimeError, match="killed"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sink, "check_owned", _killed)
            patch.setattr(RemotePath, "unlink", lambda *args, **kwargs: None)
            write("b", lambda: "{}")
        return "{}"

    with pytest.raises(StorageError, match="another job writes to the output"):
        write("a", meanwhile)
    assert Written.at(folder) is None


def _killed(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("killed")


def test_a_store_that_cannot_move_is_told_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*args: Any) -> None:
        raise NotImplementedError("move")

    path = RemotePath.of("memory://unmoved/out.parquet")
    monkeypatch.setattr(type(path._store), "move", lambda *args: stores._told(no))
    with pytest.raises(StorageError, match=r"cannot be written: NotImplementedError: move"):
        check_writable(Destination(path, "j"))


def test_what_a_store_does_not_show_is_not_taken_for_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = pa.schema([("x", pa.int64())])
    folder = RemotePath.of("memory://shy")
    write_parts(in_parts(folder), schema, [], lambda: '{"job": "j"}')

    def refused(*args: Any) -> None:
        raise PermissionError("403")

    monkeypatch.setattr(type(folder._store), "open_input", refused)
    with pytest.raises(StorageError, match="cannot be read: 403"):
        check_writable(in_parts(folder))
    with pytest.raises(StorageError, match="cannot be read: 403"):
        write_parts(in_parts(folder), schema, [], lambda: '{"job": "j"}')


def test_a_file_url_is_refused(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url, input=(work.folder / "in.csv").as_uri())
    assert "is on this machine: write the path alone" in work.run().stderr
    work.write_job(provide().base_url)
    for option in ("--input", "--output"):
        assert "is on this machine: write the path alone" in work.run(option, work.output.as_uri()).stderr
    assert "is not on this machine" in work.batchrun("export", "job.yaml", "--to", "s3://bucket/x.csv").stderr
    shown = work.batchrun("export", "job.yaml", "--to", "s3://me:hidden4711@bucket/x.csv")
    compared = work.batchrun("compare", "https://127.0.0.1:9/a.parquet?X-Amz-Signature=hidden4711", "b.parquet")
    for result in (shown, compared):
        assert (result.code, "hidden4711" in result.stderr) == (2, False), result.stderr


@pytest.mark.parametrize(
    ("url", "kind", "inner"),
    [
        ("gs://anonymous@bucket/deep/x.csv", "gcs", "bucket/deep/x.csv"),
        ("abfs://box@account.dfs.core.windows.net/deep/x.csv", "abfs", "box/deep/x.csv"),
        ("s3://bucket/deep/gr%C3%BCn%20x.csv?region=eu-west-1&scheme=http", "s3", "bucket/deep/grün x.csv"),
        ("s3://bucket/deep/x/?endpoint_override=http://127.0.0.1:9&region=x", "s3", "bucket/deep/x"),
        ("http://host/deep/x%20y.csv", "py::fsspec", "http://host/deep/x%20y.csv"),
    ],
)
def test_an_address_leads_to_its_store(url: str, kind: str, inner: str) -> None:
    check_url(url)
    path = RemotePath.of(url)
    store = path._store
    assert store._filesystem.type_name.startswith(kind)
    assert store._inner(path._path) == inner
    again = RemotePath.of(str(path))
    assert (again, str(again)) == (path, str(path))


@pytest.mark.parametrize(
    "url",
    [
        "s3://me:secret@b/x", "s3://b/x?secretKey=1", "s3://b/x?X-Amz-Signature=1", "s3://b/x?sig=1", "s3://b/x?pwd=1",
        "s3://b/x?endpoint_override=http://me:secret@host", "https://h/x#token=1", "file:///x", "FILE:///x",
    ],
)  # fmt: skip
def test_addresses_that_show_a_secret_or_are_none_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"secret|holds|machine") as raised:
        check_url(url)
    assert "me:secret" not in str(raised.value)
    assert "token=1" not in str(raised.value)


@pytest.mark.parametrize("url", ["s3://[x", "nope://x/y", "s3://bucket/x?versionId=1"])
def test_addresses_that_nothing_opens_are_an_error_of_files(url: str) -> None:
    with pytest.raises(OSError, match=r"address|versionId"):
        RemotePath.of(url)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**/data.csv", ["1/2/data.csv", "1/data.csv", "data.csv"]),
        ("*/data.csv", ["1/data.csv"]),
        ("*.csv", ["data.csv", "old-data.csv"]),
        ("**", ["1/2/data.csv", "1/2/old-data.csv", "1/data.csv", "data.csv", "old-data.csv"]),
        ("[do]*.csv", ["data.csv", "old-data.csv"]),
        ("1/**/d*.csv", ["1/2/data.csv", "1/data.csv"]),
    ],
)
def test_patterns_find_what_they_would_on_this_machine(tmp_path: Path, pattern: str, found: list[str]) -> None:
    top = RemotePath.of("memory://patterns")
    for name in (
        "data.csv",
        "old-data.csv",
        ".data.csv",
        "1/data.csv",
        "1/2/data.csv",
        "1/2/old-data.csv",
        ".h/data.csv",
    ):
        with (top / name).open("wb") as fp:
            fp.write(b"x")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [str(path).removeprefix(f"{top}/") for path in (top / pattern).found()] == found
    here = [Path(path) for path in glob.glob(str(tmp_path / pattern), recursive=True)]
    assert sorted(str(path.relative_to(tmp_path)) for path in here if path.is_file()) == found


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("in_parts", [False, True], ids=["one object", "parts"])
def test_a_hundred_thousand_rows_from_bucket_to_bucket(
    work: Workspace, provide: Provide, bucket: Bucket, in_parts: bool
) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": [f"row {number} {'x' * 500}" for number in range(100_000)]}), sink)
    source = bucket.put("rows.parquet", sink.getvalue())
    provider = provide(bill="meta")
    output: Any = {"path": bucket.url("out"), "part_mb": 4} if in_parts else bucket.url("out.parquet")
    work.write_job(provider.base_url, input=source, output=output, concurrency=64, **LEDGER)
    told, script = work.folder / "used.json", Path(__file__).with_name("used.py")
    command = [sys.executable, str(script), str(told), *work.command("job.yaml", "--quiet")]
    subprocess.run(command, cwd=work.folder, env=work.environment(), check=True)
    code, _, peak_kb = json.loads(told.read_text())
    assert (code, peak_kb < 300 * 1024) == (0, True), peak_kb
    names = [key for key in bucket.keys if key.startswith("out") and key.endswith(".parquet")]
    assert len(names) == 1 or in_parts
    tables = [table(bucket.get(name)) for name in names]
    assert sum(one.num_rows for one in tables) == 100_000
    assert sum((spent(one.to_pylist()) for one in tables), Decimal(0)) == provider.bill
