"""The commands beside `run`, and how light the program is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.loading import load_job
from batchrun.money import Cost
from batchrun.progress import Progress
from batchrun.records import Exchange, Intent, Request, Settlement, Slot
from batchrun.usage import Usage

from .conftest import FakeProvider, Workspace

Provide = Callable[..., FakeProvider]


def test_help_names_every_command_and_exit_code(work: Workspace) -> None:
    result = work.batchrun("--help")
    assert result.code == 0
    for word in ("run", "check", "export", "init", "schema", "130, 143", "another process holds"):
        assert word in result.stdout


def test_help_takes_at_most_twice_what_click_takes(work: Workspace) -> None:
    def seconds(*command: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, cwd=work.folder)
        return time.perf_counter() - began

    ratios = [seconds("-m", "batchrun", "--help") / seconds("-c", "import click") for _ in range(7)]
    assert median(ratios) <= 2


def test_a_small_job_does_not_import_pandas(work: Workspace, provide: Provide) -> None:
    work.write_rows([f"q{number}" for number in range(10)])
    work.write_job(provide().base_url)
    original = work.command
    work.command = lambda *args: [sys.executable, "-X", "importtime", "-m", "batchrun", *args]  # type: ignore[method-assign]
    result = work.run()
    work.command = original  # type: ignore[method-assign]
    assert result.code == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "httpx" in imported
    assert "pandas" not in imported


def test_check_shows_prompts_and_rows_and_sends_nothing(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["first ü", "second", "third", "fourth", ""])
    work.write_job(provider.base_url, prompt={"system": "Be brief.", "user": "Say: {{ prompt }}"})
    result = work.batchrun("check", "job.yaml", "--rows", "2")
    assert result.code == 0, result.stderr
    assert result.stdout.splitlines()[:5] == [
        "row 1, system: Be brief.",
        "row 1, user: Say: first ü",
        "row 2, system: Be brief.",
        "row 2, user: Say: second",
        "job: 5 rows; model anthropic/claude-sonnet-4 at aimlapi",
    ]
    assert provider.requests == []
    assert not work.ledger.exists()


def test_check_refuses_what_a_run_refuses(work: Workspace) -> None:
    work.write_rows(["a"])
    work.write_job(prompt="{{ promt }}")
    result = work.batchrun("check", "job.yaml")
    assert (result.code, result.stdout) == (2, "")
    assert "no such column: 'promt'" in result.stderr


def test_a_doubled_id_is_refused_before_anything_is_sent(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b", "a"])
    work.write_job(provider.base_url, input={"path": "in.csv", "id": "prompt"})
    for args in (("job.yaml",), ("check", "job.yaml")):
        result = work.batchrun(*args)
        assert result.code == 2
        assert "the value 'a' of the column 'prompt' stands twice: in the rows 1 and 3" in result.stderr
    assert provider.requests == []


def test_a_ragged_last_row_is_found_before_anything_is_sent(work: Workspace, provide: Provide) -> None:
    provider = provide()
    (work.folder / "in.csv").write_text("prompt,b\n" + "x,y\n" * 3000 + "z\n")
    work.write_job(provider.base_url)
    result = work.run()
    assert result.code == 2
    assert "line 3002: 1 cells where the header has 2" in result.stderr
    assert provider.requests == []


@pytest.mark.parametrize("name", ["data.csv", "data.parquet", "data.jsonl", "my data.tsv"])
def test_init_writes_a_job_that_can_be_checked(work: Workspace, name: str) -> None:
    path = work.folder / name
    rows = [{"id": "1", "a text": "a long text to be labeled", "k": "v"}]
    match path.suffix:
        case ".csv":
            path.write_text("id,a text,k\n1,a long text to be labeled,v\n")
        case ".tsv":
            path.write_text("id\ta text\tk\n1\ta long text to be labeled\tv\n")
        case ".jsonl":
            path.write_text(json.dumps(rows[0]))
        case _:
            pq.write_table(pa.Table.from_pylist(rows), path)
    result = work.batchrun("init", name)
    assert result.code == 0, result.stderr
    job = Path(result.stdout.strip())
    load_job(work.folder / job)
    check = work.batchrun("check", str(job))
    assert check.code == 0, check.stderr
    assert "a text: a long text to be labeled" in check.stdout
    again = work.batchrun("init", name)
    assert again.code == 2
    assert "is there already" in again.stderr


def test_init_on_an_output_of_batchrun_settles_its_columns(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b"])
    work.write_job(provider.base_url)
    assert work.run().code == 0
    assert work.batchrun("init", "out.parquet", "-o", "judge.yaml").code == 0
    check = work.batchrun("check", "judge.yaml")
    assert check.code == 0, check.stderr
    work.write_job(provider.base_url, input="out.parquet", name="judge", output="judged.parquet")
    result = work.run()
    assert result.code == 2
    assert "drop them by input: {columns:" in result.stderr
    text = (work.folder / "judge.yaml").read_text()
    assert "response: {name: earlier_response}" in text


def test_result_columns_do_not_overwrite_the_inputs(work: Workspace, provide: Provide) -> None:
    provider = provide()
    (work.folder / "in.csv").write_text("prompt,response,model\na,gold,x\n")
    work.write_job(provider.base_url)
    result = work.run()
    assert result.code == 2
    assert "(response, model): set output: {path: …, prefix: answer_}" in result.stderr
    work.write_job(provider.base_url, output={"path": "out.parquet", "prefix": "answer_"})
    assert work.run().code == 0
    (row,) = work.rows()
    assert (row["response"], row["answer_response"], row["answer_status"]) == ("gold", "answer to: a", "ok")


def test_partial_false_keeps_the_last_whole_file(work: Workspace, provide: Provide) -> None:
    provider = provide(refuse_after=3)
    work.write_rows(["a", "b"])
    output = {"path": "out.parquet", "partial": False}
    work.write_job(provider.base_url, output=output, concurrency=1)
    assert work.run().code == 0
    before = work.output.read_bytes()
    assert work.run().code == 4
    assert work.output.read_bytes() == before


def test_outputs_per_run_keep_one_ledger(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a"])
    work.write_job(provider.base_url, output="runs/run_date={date}/{run_id}.parquet")
    assert work.run().code == 0
    assert work.run().code == 0
    assert len(list((work.folder / "runs").glob("run_date=*/*.parquet"))) == 2
    assert [path.relative_to(work.folder) for path in work.folder.rglob("*.sqlite")] == [Path("job.ledger.sqlite")]


def test_the_parquet_has_every_column_of_the_readme_and_opens_in_pandas(work: Workspace, provide: Provide) -> None:
    import pandas as pd

    provider = provide()
    (work.folder / "in.csv").write_text("prompt\na\n")
    work.write_job(
        provider.base_url, stream=True, samples=2, reuse=True, labels=["answer", "other"],
        evaluate={"expected": "prompt", "metrics": ["accuracy"]},
    )  # fmt: skip
    assert work.run().code == 0
    frame = pd.read_parquet(work.output)
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Output columns")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = [name.replace("score_…", "score_accuracy") for cell in cells for name in cell.split("`")[1::2]]
    assert list(frame.columns)[1:] == documented
    assert str(frame["finished_at"].dtype).startswith("datetime64[us, UTC")


def test_a_gzipped_parquet_and_a_missing_input_are_clear(work: Workspace) -> None:
    (work.folder / "a.parquet.gz").write_bytes(b"x")
    for name, said in (("none.csv", "there is no file"), ("a.parquet.gz", "a gzipped Parquet file cannot be read")):
        work.write_job(input=name)
        result = work.run()
        assert result.code == 2
        assert said in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_a_bar_with_rows_retries_tokens_and_dollars(work: Workspace, provide: Provide) -> None:
    import pty

    work.write_rows(['<<{"fail": [500]}>>', *(f"<<{json.dumps({'wait': 0.2, 'n': n})}>>" for n in range(20))])
    work.write_job(provide().base_url, concurrency=4)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        work.command("job.yaml"), cwd=work.folder, env=work.environment(), stderr=theirs, stdin=subprocess.DEVNULL
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end has gone
                break
            if not piece:
                break
            seen += piece
    os.close(ours)
    assert process.returncode == 0
    text = seen.decode()
    assert "21/21" in text
    assert "$0.00" in text
    assert "0 failed, 1 retries, " in text


def test_elsewhere_a_plain_line_is_shown_every_30_seconds() -> None:
    now = 0.0
    stream = io.StringIO()
    progress = Progress(stream, total=10, rows=10, settled=4, usd=Decimal(1), clock=lambda: now)
    exchange = Exchange("ok", usage=Usage(1, 2, 3), cost=Cost(Decimal("0.5"), "reported"))
    request = Request(Slot(0, "m"), "k", b"")
    progress.settle(Settlement(Intent(1, request, 0, "c"), exchange, 0, is_final=True))
    for second in range(65):
        now = float(second)
        progress.tick()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "batchrun: 5/10 rows, 0.0 rows/s, $1.5, 0 failed, 0 retries, 3 tokens, 150 s left",
        "batchrun: 5/10 rows, 0.0 rows/s, $1.5, 0 failed, 0 retries, 3 tokens, 300 s left",
    ]
