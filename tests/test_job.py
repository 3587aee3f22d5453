"""The job file: YAML by 1.2 rules, every fault at once with its line, keys of later parts refused."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import JobError
from batchrun.job import Job
from batchrun.jobfile import Document
from batchrun.loading import json_schema, load_job

JOBS = Path(__file__).parent.parent / "jobs"
GOOD = "input: a.csv\nprovider: openai\nmodel: m\noutput: o.parquet\n"


def load(tmp_path: Path, text: str) -> Job:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_job(path)


def fault(tmp_path: Path, text: str) -> str:
    with pytest.raises(JobError) as caught:
        load(tmp_path, text)
    return str(caught.value)


def test_all_faults_come_at_once_with_line_and_nearest_name(tmp_path: Path) -> None:
    text = (
        "input: {path: data/x.csv, limt: 5}\npromt: hi\nprovider: aimlap\nmodel: m\nparameters: {n: 3}\n"
        "concurrency: 0\noutput: x.csv\nretry: {max_attempts: no}\nmodel: k\n"
    )
    lines = fault(tmp_path, text).splitlines()
    assert lines[0].endswith("job.yaml: the job is wrong:")
    assert [line.strip() for line in lines[1:]] == [
        "line 1: input.limt: there is no such key: did you mean 'limit'?",
        "line 2: promt: there is no such key: did you mean 'prompt'?",
        "line 3: provider: 'aimlap' is not a known provider: did you mean 'aimlapi'? Another one needs a base_url",
        "line 5: parameters: 'n' is not a parameter: use the key `samples` of the job",
        "line 6: concurrency: should be greater than or equal to 1 (is 0)",
        "line 7: output.path: 'x.csv' does not end in .parquet; a folder of parts needs part_mb",
        'line 8: retry.max_attempts: should be a valid integer, unable to parse string as an integer (is "no")',
        "line 9: the key 'model' stands twice: remove one",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("labels: yes", "labels: should be a valid list"),
        ("schema: 3", "schema"),
        ("evaluate: [x]", "evaluate: should be a mapping"),
        ("repair: -1", "repair: should be greater than or equal to 0"),
        ("reuse: perhaps", "reuse: should be a valid boolean"),
        ("samples: 0", "samples: should be greater than or equal to 1"),
    ],
)
def test_keys_with_values_of_other_kinds_are_refused(tmp_path: Path, line: str, said: str) -> None:
    assert f"line 5: {said}" in fault(tmp_path, f"{GOOD}{line}\n")


def test_a_list_of_models_names_each_once(tmp_path: Path) -> None:
    assert "model: 'a' stands in the list twice" in fault(tmp_path, GOOD.replace("model: m", "model: [a, b, a]"))
    assert "should be the id of a model, or a list of them (is [])" in fault(
        tmp_path, GOOD.replace("model: m", "model: []")
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a job is a mapping of keys"),
        ("- a\n", "a job is a mapping of keys"),
        ("input: [", "no valid YAML: line"),
        (GOOD.replace("model: m\n", ""), "model: is missing"),
        (GOOD + "prompt: {user: a, messages_column: b}\n", "it has user and messages_column"),
        (GOOD + "prompt: {system: a}\n", "it has none of them"),
        (GOOD + "provider_: x\n", "did you mean 'provider'?"),
        (GOOD.replace("o.parquet", "'{day}.parquet'"), "{day} is no placeholder"),
        (GOOD.replace("provider: openai", "provider: {name: local, base_url: 'http://x'}"), "takes no base_url"),
        (GOOD.replace("provider: openai", "provider: {name: x}"), "Another one needs a base_url"),
        (GOOD.replace("provider: openai", "provider: {name: openai, headers: {X-Api-Key: abc}}"), "written out"),
        (GOOD + "a: &x [1]\nb: *x\n", "there is no such key"),
        (GOOD + "x: !!python/object:os.system ls\n", "is not known here"),
        (GOOD + "name: ../../etc/passwd\n", "cannot name a file"),
        (GOOD.replace("input: a.csv", "input: {path: a.csv, encoding: utf-99}"), "no encoding that Python knows"),
        (GOOD + "parameters: {stream: true}\n", "use the key `stream` of the job"),
        (GOOD.replace("o.parquet", "s3://bucket/o.parquet"), "is not on this machine, and the ledger has to be"),
        (GOOD.replace("input: a.csv", "input: {path: a.csv, columns: 5}"), "input.columns: should be a list of names"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    assert said in fault(tmp_path, text)


def test_a_document_that_unfolds_without_bound_is_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    assert "unfolds to more than" in fault(tmp_path, bomb)
    assert "unfolds to more than" in fault(tmp_path, "a: &x [*x]\n")


def test_yaml_1_2_text_stays_text_and_money_is_exact() -> None:
    value = Document(
        "a: yes\nb: no\nc: on\nd: 16:00\ne: 007\nf: 0.10\ng: 1e-7\nh: 12\ni: true\nj: ~\nk: '5'\nl: 1_000"
    ).value
    assert value == {
        "a": "yes", "b": "no", "c": "on", "d": "16:00", "e": "007", "f": Decimal("0.10"), "g": Decimal("1e-7"),
        "h": 12, "i": True, "j": None, "k": "5", "l": "1_000",
    }  # fmt: skip
    assert str(value["f"]) == "0.10"


def test_paths_are_relative_to_the_job_file(tmp_path: Path) -> None:
    job = load(tmp_path, GOOD.replace("o.parquet", "../out/{date}/x.parquet"))
    assert job.ledger_path == tmp_path.parent / "out" / "job.ledger.sqlite"
    assert job.resolve("a.csv") == tmp_path / "a.csv"
    assert job.name == "job"
    hive = load(tmp_path, GOOD.replace("o.parquet", "runs/run_date={date}/x.parquet"))
    # Not among the data.
    assert hive.ledger_path == tmp_path / "job.ledger.sqlite"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "job.ledger.sqlite").touch()
    with pytest.raises(JobError, match=r"move it .* to .*, or set ledger: runs/job\.ledger\.sqlite"):
        load(tmp_path, GOOD.replace("o.parquet", "runs/run_date={date}/x.parquet"))
    plain = load(tmp_path, GOOD.replace("o.parquet", "runs/{date}/x.parquet"))
    assert plain.ledger_path == tmp_path / "runs" / "job.ledger.sqlite"


def test_prices_are_decimals_from_their_text(tmp_path: Path) -> None:
    job = load(tmp_path, GOOD + "prices: {input_mtok: 0.15, output_mtok: '0.60'}\n")
    assert job.prices is not None
    assert (job.prices.input_mtok, job.prices.output_mtok) == (Decimal("0.15"), Decimal("0.60"))


def test_a_snapshot_gives_the_job_back(tmp_path: Path) -> None:
    job = load(tmp_path, GOOD + "prompt: {system: s, user: u}\nparameters: {temperature: 0.2, stop: [a]}\n")
    snapshot = json.loads(json.dumps(job.snapshot()))
    assert job.with_shape_of(snapshot).snapshot() == job.snapshot()


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_example_jobs_fit_the_schema(path: Path) -> None:
    load_job(path)
    jsonschema.validate(Document(path.read_text(encoding="utf-8")).value, json_schema())
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=job.schema.json\n")


def test_the_schema_beside_the_examples_is_the_one_of_the_command() -> None:
    kept = json.loads((JOBS / "job.schema.json").read_text(encoding="utf-8"))
    assert kept == json_schema(), "run: uv run batchrun schema > jobs/job.schema.json"
    jsonschema.Draft202012Validator.check_schema(kept)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"input": "a", "provider": "local", "model": "m", "output": "o.parquet", "x": 1}, kept)


@given(st.text(max_size=80))
def test_no_text_breaks_the_loader(text: str) -> None:
    try:
        Document(text)
    except JobError:
        return
