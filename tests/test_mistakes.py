"""Mistakes that users make: found before anything is sent, named with their mend; never a traceback."""

from __future__ import annotations

import gzip
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import FakeProvider, Workspace

Provide = Callable[..., FakeProvider]


@pytest.mark.parametrize("value", ["hidden 4711", "hidden4711#", "[hidden4711", "h:hidden4711"])
def test_an_address_that_is_none_is_shown_as_it_is_written(work: Workspace, value: str) -> None:
    work.write_rows(["a"])
    work.env["GATEWAY"] = value
    work.write_job("http://${GATEWAY}/v1")
    result = work.run()
    assert (result.code, "${GATEWAY}" in result.stderr, "4711" in result.stderr) == (2, True, False), result.stderr


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"ledger": "out.parquet"}, "is the ledger too"),
        ({"output": "sub/o.parquet", "input": "sub/*.parquet"}, "is part of the input too"),
        ({"mySetting": 1}, "mySetting: there is no such key"),
        ({"provider": {"name": "x", "base_url": "http://127.0.0.1:1/\u0007v1"}}, "holds a blank or a #"),
        ({"provider": {"name": "x", "base_url": "http://.a..b/v1"}}, "is no host"),
        ({"provider": {"name": "x", "base_url": "http://127.0.0.1/v1", "headers": {"X-T": "Größe"}}}, "cannot carry"),
        ({"output": "out-{date:%Y}.parquet"}, "is no placeholder"),
        ({"output": "~nosuchuser4711/o.parquet"}, "there is no such user"),
        ({"output": "a\u0000.parquet"}, "holds a NUL character"),
        ({"input": "x" * 300 + ".csv"}, "cannot be read"),
        ({"input": {"path": "in.csv", "columns": ["prompt", "prompt"]}}, "'prompt' stands twice"),
        ({"input": {"path": "in.csv", "encoding": "utf-16"}}, "is not utf-16"),
        ({"input": "bad.csv.gz"}, "cannot be read"),
        ({"input": "blank.csv"}, "line 1 is blank"),
        ({"prompt": "{{ " + "9" * 5000 + " }}"}, "prompt.user: "),
        ({"prompt": "{% if %}"}, "prompt.user: template line 1"),
        ({"timeout_seconds": "1e999"}, "timeout_seconds"),
        ({"input": {"path": "key.jsonl"}}, "a text or key has half of a surrogate pair"),
        ({"concurrency": 10**6}, "should be less than or equal to 10000"),
    ],
)
def test_what_cannot_work_ends_2_and_sends_nothing(work: Workspace, keys: dict[str, Any], said: str) -> None:
    work.write_rows(["a"])
    (work.folder / "sub").mkdir()
    pq.write_table(pa.table({"prompt": ["a"]}), work.folder / "sub" / "a.parquet")
    (work.folder / "bad.csv.gz").write_bytes(gzip.compress(b"prompt\n" + b"abc\n" * 5000)[:60] + b"\xff" * 50)
    (work.folder / "blank.csv").write_text("\nprompt\na\n")
    (work.folder / "key.jsonl").write_text('{"prompt": "a", "\\ud800": 1}\n')
    work.write_job(**keys)
    result = work.run()
    assert result.code == 2, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "prompt", ["{{ prompt | truncate(1) }}", "{{ cycler() }}", "{{ prompt.nothing.at_all }}", "{{ prompt + 1 }}"]
)
def test_a_template_that_breaks_on_a_row_fails_that_row(work: Workspace, provide: Provide, prompt: str) -> None:
    work.write_rows(["abcdef"])
    work.write_job(provide().base_url, prompt=prompt)
    result = work.run()
    assert result.code == 1, result.stderr
    assert work.rows()[0]["error"].startswith("not_rendered: ")


def test_a_column_that_the_prompt_does_not_use_is_checked_too(work: Workspace, provide: Provide) -> None:
    provider = provide()
    (work.folder / "in.csv").write_text("prompt,stars\na,1\nb,x\n")
    work.write_job(provider.base_url, input={"path": "in.csv", "columns": {"stars": "int64"}})
    for args in (("check", "job.yaml"), ("job.yaml",)):
        result = work.batchrun(*args)
        assert result.code == 2
        assert "row 2: column 'stars': 'x' is no int64" in result.stderr
    assert provider.requests == []


def test_dictionary_columns_of_several_files_are_written_together(work: Workspace, provide: Provide) -> None:
    for name in ("a", "b"):
        values = pa.array([f"{name}{number}" for number in range(100)])
        table = pa.table({"prompt": values.dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string()))})
        pq.write_table(table, work.folder / f"{name}.parquet")
    work.write_job(provide().base_url, input="?.parquet", output="sub/out.parquet")
    assert work.run().code == 0
    table = pq.read_table(work.folder / "sub" / "out.parquet")
    assert table.num_rows == 200
    assert pa.types.is_dictionary(table.schema.field("prompt").type)


def test_a_linked_folder_leads_to_the_same_ledger(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url, output="../out/o.parquet")
    (work.folder.parent / "deep").mkdir()
    link = work.folder.parent / "deep" / "link"
    link.symlink_to(work.folder, target_is_directory=True)
    assert work.run().code == 0
    result = work.batchrun(str(link / "job.yaml"))
    assert result.code == 0
    assert "will be asked and paid for again" in result.stderr
    assert len(list(work.folder.parent.glob("**/*.sqlite"))) == 1


def test_a_short_key_is_no_secret_that_answers_lose_words_to(work: Workspace, provide: Provide) -> None:
    work.env["MY_KEY"] = "null"
    work.write_rows(["null and void"])
    work.write_job(provider={"name": "x", "base_url": provide().base_url, "api_key_env": "MY_KEY"})
    assert work.run().code == 0
    assert work.rows()[0]["response"] == "answer to: null and void"


def test_a_failed_start_hides_no_run_from_export_and_retry(work: Workspace, provide: Provide) -> None:
    provider = provide()
    rows = ["a", '<<{"fail": [400]}>>']
    work.write_rows(rows)
    work.write_job(provider.base_url, input={"path": "in.csv", "id": "prompt"})
    assert work.run().code == 1
    work.write_rows([*rows, "a"])
    assert work.run().code == 2
    work.write_rows(rows)
    assert work.batchrun("export", "job.yaml").code == 0
    assert work.run("--retry-failed").code == 0
    assert len(provider.requests) == 3


def test_talk_that_nobody_can_hear_decides_nothing(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url)
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    for _ in range(2):
        with full.open("w") as stderr:
            ran = subprocess.run(
                work.command("job.yaml"), cwd=work.folder, env=work.environment(), stderr=stderr, check=False
            )
        assert ran.returncode == 0
    with full.open("w") as stdout:
        ran = subprocess.run(
            work.command("job.yaml", "--json"), cwd=work.folder, env=work.environment(), stdout=stdout,
            stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert ran.returncode == 6
    assert b"stdout cannot be written" in ran.stderr


def test_a_ledger_that_is_deleted_under_the_run_stops_it(work: Workspace, provide: Provide) -> None:
    provider = provide(latency=0.3)
    work.write_rows([f"q{number}" for number in range(200)])
    work.write_job(provider.base_url, concurrency=2)
    with work.start("job.yaml") as process:
        while not provider.requests:
            time.sleep(0.02)
        work.ledger.unlink()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 6, stderr
    assert "has gone while the run went on" in stderr
    assert len(provider.requests) < 40


def test_another_programs_database_is_no_ledger(work: Workspace) -> None:
    with sqlite3.connect(work.folder / "app.db") as db:
        db.execute("CREATE TABLE t (a)")
    work.write_rows(["a"])
    work.write_job(ledger="app.db")
    result = work.run()
    assert result.code == 6
    assert "is another program's database" in result.stderr


def test_tool_arguments_keep_their_types(work: Workspace, provide: Provide) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": {"b": 1.5, "c": [1]}}}
    choice = {"index": 0, "message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}
    chunk = json.dumps({"choices": [choice]})
    work.write_rows(["a"])
    work.write_job(provide(replay={"status": 200, "chunks": [chunk]}).base_url)
    assert work.run().code == 0
    (stored,) = json.loads(work.rows()[0]["tool_calls"])
    assert json.loads(stored["function"]["arguments"]) == {"b": 1.5, "c": [1]}


def test_amounts_beyond_all_bounds_are_unknown_and_big_ones_add_up(work: Workspace, provide: Provide) -> None:
    def replay(meta: str) -> str:
        body = json.dumps({"choices": [{"message": {"content": "x"}}], "meta": {"usage": "@"}}).replace('"@"', meta)
        return f"<<{json.dumps({'replay': {'status': 200, 'chunks': [body]}})}>>"

    amounts = ['{"usd_spent": 8000000}', '{"usd_spent": 8000000.5}', '{"credits_used": 1e1000000, "usd_spent": 0.1}']
    work.write_rows([replay(meta) for meta in amounts])
    work.write_job(provide().base_url)
    result = work.run("--json")
    assert result.code == 0, result.stderr
    assert result.json["usd_spent"] == Decimal("16000000.6")


def test_a_column_named_self_is_not_sent_as_something_else(work: Workspace, provide: Provide) -> None:
    (work.folder / "in.csv").write_text("self,t\nme,x\n")
    work.write_job(provide().base_url, prompt="{{ self }} {{ t }}")
    result = work.run()
    assert result.code == 2
    assert "write {{ row['self'] }}" in result.stderr
    work.write_job(provide().base_url, prompt="{{ row['self'] }} {{ t }}", parameters={"user": "{{ row['self'] }}"})
    assert work.run().code == 0
    assert work.rows()[0]["response"] == "answer to: me x"


def test_init_writes_a_good_job_for_odd_columns_and_refuses_what_is_no_file(work: Workspace) -> None:
    (work.folder / "my data: #1.csv").write_text('"a\nb",if,none,self\n' + ",".join(["long text"] * 4) + "\n")
    (work.folder / "jobs").mkdir()
    result = work.batchrun("init", "my data: #1.csv", "-o", "jobs/x.yaml")
    assert result.code == 0, result.stderr
    assert work.batchrun("check", "jobs/x.yaml").code == 0
    for name in (".", "/", "none.csv"):
        result = work.batchrun("init", name)
        assert result.code == 2
        assert "Traceback" not in result.stderr


def test_check_shows_what_the_terminal_cannot(work: Workspace) -> None:
    work.env["PYTHONIOENCODING"] = "latin-1"
    work.write_rows(["emoji 😀"])
    work.write_job()
    result = work.batchrun("check", "job.yaml")
    assert result.code == 0
    assert "emoji \\U0001f600" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit is POSIX")
def test_more_connections_than_files_is_named_with_its_mend(work: Workspace) -> None:
    work.write_rows(["a"])
    work.write_job(concurrency=300)
    command = "ulimit -n 100; exec " + " ".join(work.command("job.yaml"))
    ran = subprocess.run(
        ["sh", "-c", command], cwd=work.folder, env=work.environment(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "set concurrency to 36, or raise ulimit -n" in ran.stderr


def test_a_renamed_job_does_not_pay_again_in_silence(work: Workspace, provide: Provide) -> None:
    provider = provide(refuse_after=2)
    work.write_rows(["a", "b", "c"])
    work.write_job(provider.base_url, concurrency=1)
    assert work.run().code == 4
    work.job.rename(work.folder / "renamed.yaml")
    result = work.batchrun("renamed.yaml")
    assert result.code == 2
    assert "is that of the job 'job'" in result.stderr
    assert "set `name: job` and add --adopt-ledger" in result.stderr
    assert len(provider.requests) == 3
    text = (work.folder / "renamed.yaml").read_text()
    (work.folder / "renamed.yaml").write_text('{"name": "job",' + text[1:])
    result = work.batchrun("renamed.yaml", "--adopt-ledger")
    assert "2 of 3 rows are answered" in result.stderr


def test_init_sees_the_text_of_pandas_files(work: Workspace) -> None:
    import pandas as pd

    frame = pd.DataFrame({"n": [1, 2], "body": ["a long text", None], "k": ["v", "w"]})
    frame.to_parquet(work.folder / "p.parquet", index=False)
    assert work.batchrun("init", "p.parquet").code == 0
    text = (work.folder / "p.yaml").read_text()
    assert "body: {{ body or '' }}" in text
    assert "k: {{" not in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("chekc", "job.yaml"), "there is no command 'chekc': did you mean 'check'?"),
        (("in.csv",), "is data, not a job: `batchrun init in.csv`"),
        (("none.yaml",), "there is no such job file"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_named(work: Workspace, args: tuple[str, ...], said: str) -> None:
    work.write_rows(["a"])
    result = work.batchrun(*args)
    assert result.code == 2
    assert said in result.stderr


def test_a_refused_key_is_named_by_its_variable(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide(key="another").base_url)
    result = work.run()
    assert result.code == 4
    assert "look at the key in AIML_API_KEY" in result.stderr


def test_check_ends_1_when_no_row_gives_a_prompt(work: Workspace) -> None:
    work.write_rows([" ", " "])
    work.write_job()
    assert work.batchrun("check", "job.yaml").code == 1
