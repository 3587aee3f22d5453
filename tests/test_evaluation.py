"""Answers beside what was expected: in the output, the summary and the manifest; and two runs beside each other."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.loading import load_job

from .conftest import FakeProvider, Workspace

Provide = Callable[..., FakeProvider]
LABELS = ["positive", "negative", "neutral"]


def write(work: Workspace, rows: list[tuple[str, str, Any]]) -> None:
    """Rows of an id, an expected value and what the fake says, which may differ from sample to sample."""
    with (work.folder / "in.csv").open("w", newline="", encoding="utf-8") as fp:
        writer = csv.writer(fp)
        writer.writerow(["id", "gold", "source", "prompt"])
        for index, (name, gold, says) in enumerate(rows):
            writer.writerow([name, gold, "ab"[index % 2], f"{name} <<{json.dumps({'say': says})}>>"])


def drawn(number: int, seed: int) -> list[tuple[str, str, str]]:
    chance = random.Random(seed)
    return [(f"r{index}", chance.choice(LABELS), chance.choice([*LABELS, "?"])) for index in range(number)]


def test_scores_and_summary_are_those_of_scikit_learn(work: Workspace, provide: Provide) -> None:
    from scipy.stats import binomtest
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    provider = provide(bill="credits")
    write(work, drawn(120, 1))
    work.write_job(provider.base_url, labels=LABELS, evaluate={"expected": "gold", "by": ["source"]})
    result = work.run("--json")
    rows = work.rows()
    gold, said = [row["gold"] for row in rows], [row["label"] or "(none)" for row in rows]
    right = sum(one == other for one, other in zip(gold, said, strict=True))
    found = result.json["evaluation"]
    accuracy, f1 = found["metrics"]["accuracy"], found["metrics"]["f1"]
    assert float(accuracy["value"]) == pytest.approx(accuracy_score(gold, said))
    interval = binomtest(right, len(rows)).proportion_ci(0.95, "wilson")
    assert (float(accuracy["low"]), float(accuracy["high"])) == pytest.approx((interval.low, interval.high))
    assert float(f1["value"]) == pytest.approx(f1_score(gold, said, labels=LABELS, average="macro"))
    assert f1["low"] < f1["value"] < f1["high"]
    names = found["confusion"]["labels"]
    assert found["confusion"]["matrix"] == confusion_matrix(gold, said, labels=names).tolist()
    assert found["usd_per_correct"] == pytest.approx(provider.bill / right, abs=Decimal("1e-11"))
    assert [row["score_accuracy"] for row in rows] == [
        float(one == other) for one, other in zip(gold, said, strict=True)
    ]
    assert {group["value"] for group in found["slices"]["source"]["values"]} == {"a", "b"}
    assert work.manifest()["evaluation"] == found
    assert "accuracy" in result.stderr
    assert work.batchrun("verify", "job.yaml").code == 0


def test_votes_of_samples_and_of_models_are_evaluated_too(work: Workspace, provide: Provide) -> None:
    provider = provide(by_count=True)
    rows = [("a", "positive", ["positive", "negative", "positive"]), ("b", "neutral", ["?", "neutral", "?"])]
    write(work, rows)
    work.write_job(provider.base_url, labels=LABELS, samples=3, concurrency=1, evaluate={"expected": "gold"})
    result = work.run("--json")
    assert [row["vote"] for row in work.rows()] == ["positive"] * 3 + ["neutral"] * 3
    assert [row["agreement"] for row in work.rows()] == pytest.approx([2 / 3] * 3 + [1.0] * 3)
    assert (result.json["evaluation"]["rows"], result.json["evaluation"]["right"]) == (6, 3)
    assert (result.json["evaluation"]["votes"]["rows"], result.json["evaluation"]["votes"]["right"]) == (2, 2)
    work.write_job(
        provider.base_url, labels=LABELS, model=["m/one", "m/two"], evaluate={"expected": "gold"}, name="models",
        ledger="models.sqlite", output="models.parquet",
    )  # fmt: skip
    result = work.run("--json")
    by_model = result.json["evaluation"]["slices"]["requested_model"]["values"]
    assert [group["value"] for group in by_model] == ["m/one", "m/two"]
    assert result.json["evaluation"]["votes"]["rows"] == 2


def test_text_is_evaluated_by_what_it_says(work: Workspace, provide: Provide) -> None:
    provider = provide()
    write(work, [("a", "42", "It is 42.0 in all"), ("b", "7", "eight"), ("c", "", "no gold")])
    metrics = ["exact_match", "contains", "numeric_close"]
    work.write_job(provider.base_url, evaluate={"expected": "gold", "metrics": metrics})
    result = work.run("--json")
    assert result.code == 0
    rows = work.rows()
    assert [row["score_contains"] for row in rows] == [1.0, 0.0, None]
    assert [row["score_numeric_close"] for row in rows] == [1.0, 0.0, None]
    assert result.json["evaluation"]["without_expected"] == 1


def test_two_runs_are_compared(work: Workspace, provide: Provide) -> None:
    provider = provide(bill="credits")
    first, second = drawn(80, 2), drawn(80, 3)
    write(work, first)
    keys: dict[str, Any] = {"labels": LABELS, "evaluate": {"expected": "gold"}, "output": "{run_id}.parquet"}
    work.write_job(provider.base_url, input={"path": "in.csv", "id": "id"}, **keys)
    one = work.run("--json").json
    # Another prompt, other answers, other order; the same ids and expected values.
    other = [(name, gold, says) for (name, gold, _), (_, _, says) in zip(first, second, strict=True)]
    random.Random(1).shuffle(other)
    write(work, other)
    two = work.run("--json").json
    found = work.batchrun("compare", one["output"], two["output"], "--json").json
    assert (found["rows"], found["only_a"], found["only_b"]) == (80, 0, 0)
    right = [{name: gold == says for name, gold, says in rows} for rows in (first, other)]
    assert found["wrong_to_right"]["number"] == sum(right[1][name] > right[0][name] for name in right[0])
    assert found["right_to_wrong"]["number"] == sum(right[1][name] < right[0][name] for name in right[0])
    assert (found["a"]["usd"], found["b"]["usd"]) == (one["usd_spent"], two["usd_spent"])
    accuracy = found["metrics"]["accuracy"]
    assert float(accuracy["a"]) == pytest.approx(sum(right[0].values()) / 80)
    assert 0 <= accuracy["difference"]["p_value"] <= 1
    shown = work.batchrun("compare", one["output"], "job.yaml")
    assert "wrong → right by accuracy" in shown.stdout
    # The first run's input is gone, and only its Parquet still has the rows.
    lost = work.batchrun("compare", f"job.yaml@{one['run_id']}", "job.yaml")
    assert (lost.code, "the input has changed since run" in lost.stderr) == (2, True)
    assert (
        work.batchrun("compare", f"job.yaml@{two['run_id'][:18]}", "job.yaml", "--json").json["changed"]["number"] == 0
    )


def test_what_cannot_be_compared_is_told(work: Workspace, provide: Provide) -> None:
    work.write_rows(["a"])
    work.write_job(provide().base_url)
    for name, told in (("job.yaml", "has no run yet"), ("nowhere.parquet", "no output that batchrun has written")):
        result = work.batchrun("compare", name, "job.yaml")
        assert (result.code, told in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("column", ["label", "response"])
def test_a_judge_reads_what_another_job_has_written(work: Workspace, provide: Provide, column: str) -> None:
    provider = provide()
    write(work, drawn(4, 4))
    work.write_job(provider.base_url, labels=LABELS)
    work.run()
    made = work.batchrun("init", "out.parquet")
    assert made.code == 0, made.stderr
    judge = work.folder / "out.yaml"
    text = judge.read_text(encoding="utf-8")
    assert column in text
    edited = text.replace("provider: local", f"provider: {{name: aimlapi, base_url: {provider.base_url!r}}}")
    judge.write_text(edited, encoding="utf-8")
    checked = work.batchrun("check", "out.yaml")
    assert checked.code == 0, checked.stderr
    assert Path(work.folder / "out.parquet").exists()
    assert Decimal(0) <= provider.bill


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_labels_are_exported_to_a_file_of_their_own(work: Workspace, provide: Provide, ending: str) -> None:
    import pandas as pd

    provider = provide()
    write(work, [("r,1", "positive", "positive"), ("r2", "neutral", "?"), ("rö", "negative", "negative")])
    work.write_job(provider.base_url, labels=LABELS)
    work.run()
    before = work.output.read_bytes()
    path = work.folder / f"labels.{ending}"
    result = work.batchrun("export", "job.yaml", "--to", str(path), "--columns", "id,label,flags,usd_spent")
    assert result.code == 0, result.stderr
    read = {"csv": pd.read_csv, "jsonl": lambda name: pd.read_json(name, lines=True), "parquet": pd.read_parquet}[
        ending
    ]
    with path.open("rb") as fp:
        frame = read(fp)
    assert list(frame.columns) == ["id", "label", "flags", "usd_spent"]
    assert list(frame["id"]) == ["r,1", "r2", "rö"]
    assert list(frame["label"].astype(object).fillna("none")) == ["positive", "none", "negative"]
    assert sum(map(Decimal, map(repr, map(float, frame["usd_spent"])))) == provider.bill
    assert work.output.read_bytes() == before
    assert len(provider.requests) == 3


def test_an_export_that_cannot_be_is_told(work: Workspace, provide: Provide) -> None:
    write(work, [("a", "b", "positive")])
    work.write_job(provide().base_url, labels=LABELS)
    work.run()
    for options, told in (
        (("--to", "x.xlsx"), "should end in .csv, .jsonl, .parquet"), (("--columns", "id"), "add --to FILE"),
        (("--to", "x.csv", "--columns", "nothing"), "there is no column 'nothing'"),
        (("--to", "in.csv"), "is the input too"), (("--to", "out.parquet"), "is the output of the job itself"),
        (("--to", "/proc/x.csv"), "cannot be written"),
    ):  # fmt: skip
        result = work.batchrun("export", "job.yaml", *options)
        assert (result.code in (2, 6), told in result.stderr) == (True, True), (options, result.stderr)


def test_what_failed_is_left_out_of_the_evaluation_and_told(work: Workspace, provide: Provide) -> None:
    provider = provide()
    write(work, [("a", "positive", "positive"), ("b", "", "positive")])
    with (work.folder / "in.csv").open("a", newline="", encoding="utf-8") as fp:
        csv.writer(fp).writerow(["c", "positive", "a", 'c <<{"fail": [400]}>>'])
    work.write_job(provider.base_url, labels=LABELS, evaluate={"expected": "gold"})
    result = work.run("--json")
    found = result.json["evaluation"]
    assert (found["rows"], found["unanswered"], found["without_expected"]) == (1, 1, 1)
    assert "left out: 1 failed or pending, 1 without an expected value" in result.stderr


def test_dates_are_compared_and_an_output_of_some_columns_is_refused(work: Workspace, provide: Provide) -> None:
    provider = provide()
    with (work.folder / "in.csv").open("w", newline="", encoding="utf-8") as fp:
        csv.writer(fp).writerows([["prompt", "when"], ["a", "2024-01-01"], ["b", "2024-01-02"]])
    source = {"path": "in.csv", "columns": {"when": "date"}, "id": "when"}
    evaluate = {"expected": "when", "metrics": ["exact_match"]}
    work.write_job(provider.base_url, input=source, evaluate=evaluate)
    assert work.run().code == 0
    found = work.batchrun("compare", "job.yaml", "out.parquet", "--json")
    assert (found.code, found.json["rows"]) == (0, 2), found.stderr
    assert work.batchrun("export", "job.yaml", "--to", "some.parquet", "--columns", "when").code == 0
    refused = work.batchrun("compare", "some.parquet", "job.yaml")
    assert (refused.code, "has no column" in refused.stderr) == (2, True), refused.stderr


def test_the_same_models_in_another_order_are_compared(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a", "b"])
    for name, models in (("one", ["m1", "m2"]), ("two", ["m2", "m1"])):
        work.write_job(provider.base_url, model=models, output=f"{name}.parquet")
        assert work.run().code == 0
    found = work.batchrun("compare", "one.parquet", "two.parquet", "--json")
    assert (found.code, found.json["rows"], found.json["changed"]["number"]) == (0, 4, 0), found.stderr


def test_a_file_for_a_judge_leaves_the_users_own_columns(work: Workspace, provide: Provide) -> None:
    provider = provide()
    with (work.folder / "in.csv").open("w", newline="", encoding="utf-8") as fp:
        csv.writer(fp).writerows([["prompt", "vote", "sample"], ['0 <<{"say": "positive"}>>', "v", "s"]])
    output = {"path": "out.parquet", "prefix": "r_", "answer_prefix": "judged_"}
    work.write_job(provider.base_url, labels=LABELS, samples=2, output=output)
    assert work.run().code == 0
    assert work.batchrun("init", "out.parquet").code == 0
    settled = load_job(work.folder / "out.yaml").input.columns or {}
    dropped = {name for name, setting in settled.items() if setting is None}
    assert {"r_request_key", "judged_vote", "judged_agreement", "judged_parse_error"} <= dropped
    assert not {"prompt", "vote", "sample"} & settled.keys()
    assert work.batchrun("check", "out.yaml").code == 0


def test_what_json_has_no_number_for_is_null_in_an_export(work: Workspace, provide: Provide) -> None:
    (work.folder / "in.csv").write_text("prompt,x\na,nan\nb,1.5\n", encoding="utf-8")
    work.write_job(provide().base_url, input={"path": "in.csv", "columns": {"x": "float64"}})
    work.run()
    assert work.batchrun("export", "job.yaml", "--to", "x.jsonl", "--columns", "x").code == 0
    lines = (work.folder / "x.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == ['{"x": null}', '{"x": 1.5}']


def test_what_failed_in_one_of_two_runs_is_not_judged(work: Workspace, provide: Provide) -> None:
    provider = provide()
    with (work.folder / "in.csv").open("w", newline="", encoding="utf-8") as fp:
        csv.writer(fp).writerow(["id", "gold", "prompt"])
        for index in range(6):
            script = {"say": "positive", "fail": [400] if index % 2 else []}
            csv.writer(fp).writerow([index, "positive", f"{index} <<{json.dumps(script)}>>"])
    work.write_job(provider.base_url, labels=LABELS, evaluate={"expected": "gold"})
    result = work.run("--json")
    assert result.json["evaluation"]["metrics"]["accuracy"]["value"] == 1
    found = work.batchrun("compare", "out.parquet", "job.yaml", "--json").json
    assert (found["rows"], found["unanswered"], found["metrics"]["accuracy"]["a"]) == (6, 3, 1)
    assert found["a"]["usd"] == provider.bill


@pytest.mark.parametrize("key", ["expected", "by"])
def test_a_value_that_cannot_be_judged_is_told_before_anything_is_sent(
    work: Workspace, provide: Provide, key: str
) -> None:
    provider = provide()
    far = pa.array([0, 10_000_000], pa.int32()).cast(pa.date32())
    table = pa.table({"prompt": ["a", "b"], "when": far, "gold": ["x", "y"]})
    pq.write_table(table, work.folder / "in.parquet")
    evaluate = {"expected": "when"} if key == "expected" else {"expected": "gold", "by": ["when"]}
    work.write_job(provider.base_url, input="in.parquet", evaluate=evaluate)
    result = work.run()
    assert (result.code, "row 2: the column 'when' (date32[day]) cannot be used" in result.stderr) == (2, True)
    assert provider.requests == []
    # Parquet keeps it; a text has no words for it.
    work.write_job(provider.base_url, input="in.parquet")
    assert work.run().code == 0
    assert work.batchrun("export", "job.yaml", "--to", "x.parquet").code == 0
    refused = work.batchrun("export", "job.yaml", "--to", "x.csv")
    assert (refused.code, "'when'" in refused.stderr) == (2, True), refused.stderr


def test_a_lone_carriage_return_tears_no_row_of_an_export(work: Workspace, provide: Provide) -> None:
    work.write_rows([f"0 <<{json.dumps({'say': chr(13).join('ab')})}>>", "1"])
    work.write_job(provide().base_url)
    assert work.run().code == 0
    assert work.batchrun("export", "job.yaml", "--to", "x.csv", "--columns", "response,status").code == 0
    with (work.folder / "x.csv").open(newline="", encoding="utf-8") as fp:
        rows = list(csv.reader(fp))
    assert rows[1] == ["a\rb", "ok"]
    assert len(rows) == 3
    assert b"\r\n" not in (work.folder / "x.csv").read_bytes()


def test_a_judge_of_a_judge_has_columns_of_its_own(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(['0 <<{"say": "positive"}>>'])
    work.write_job(provider.base_url, labels=LABELS)
    assert work.run().code == 0
    for data, name in (("out.parquet", "one"), ("outputs/one.parquet", "two")):
        judge = work.folder / f"{name}.yaml"
        assert work.batchrun("init", data, "--output", judge.name).code == 0
        aimlapi = f"provider: {{name: aimlapi, base_url: {provider.base_url!r}}}"
        judge.write_text(judge.read_text(encoding="utf-8").replace("provider: local", aimlapi), encoding="utf-8")
        result = work.batchrun(judge.name)
        assert result.code == 0, result.stderr
    names = pq.read_schema(work.folder / "outputs" / "two.parquet").names
    assert {"earlier_response", "earlier_response_2", "response"} <= set(names)
