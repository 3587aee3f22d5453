"""Answers against expected values: scores, intervals, slices, votes and two runs side by side."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from decimal import Decimal
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from batchrun.comparison import Compared, Comparison
from batchrun.errors import MissingHereError
from batchrun.evaluate import Evaluation, Evaluator
from batchrun.intervals import paired_proportions, proportion, require
from batchrun.money import exact_json
from batchrun.scores import METRICS, Scorer, decisive, identity, score_names, scored, vote
from batchrun.tables import WIDTH, aligned, columns, shown

CENT = Decimal("0.01")
# Few classes, some that only one side has, and answers that did not parse.
PAIRS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["a", "b", "c", "x", None])), min_size=1, max_size=60
)
TRIPLES = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", None]), st.sampled_from(["a", "b", "x", None])),
    min_size=1,
    max_size=60,
)


def score(metric: str, expected: Any, answered: Any) -> float | None:
    return Scorer([metric]).score(expected, answered)[0]


def evaluated(
    pairs: Sequence[tuple[Any, Any]], metrics: Sequence[str] = ("accuracy", "f1"), usd: Decimal | None = CENT
) -> Evaluation:
    evaluator = Evaluator(metrics, [])
    evaluator.take([one for one, _ in pairs], [other for _, other in pairs], {}, [usd] * len(pairs))
    return evaluator.evaluation()


def compared(triples: Sequence[tuple[Any, Any, Any]], metrics: Sequence[str] = ("accuracy", "f1")) -> Compared:
    comparison = Comparison(metrics)
    for row, (expected, one, other) in enumerate(triples, 1):
        comparison.take(row, expected, one, other, True, CENT, 2 * CENT, 1.0, 2.0)
    return comparison.result()


# --- one row ------------------------------------------------------------------------------------------------

RIGHT, WRONG, NOTHING = 1.0, 0.0, None


@pytest.mark.parametrize(
    ("expected", "answered", "found"),
    [
        ("yes", "yes", RIGHT),
        ("yes ", "\nyes", RIGHT),
        ("yes", "Yes", WRONG),
        ("yes", None, WRONG),
        ("yes", "  ", WRONG),
        ("yes", math.nan, WRONG),
        (None, "yes", NOTHING),
        ("", "yes", NOTHING),
        (math.nan, "yes", NOTHING),
        (5, "5", RIGHT),
        (5.0, "5", RIGHT),
        (5.5, 5.5, RIGHT),
        (Decimal("5.00"), 5, RIGHT),
        (True, "true", RIGHT),
        (False, False, RIGHT),
        (0, "0", RIGHT),
        ("5", "5.0", WRONG),
        (["a", 1], '["a", 1]', RIGHT),
        (1e300, 1e300, RIGHT),
        (Decimal("1e999999"), "x", WRONG),
        (Decimal("NaN"), "x", NOTHING),
        ({"a": Decimal("0.10")}, '{"a": 0.1}', RIGHT),
    ],
)
def test_accuracy_compares_classes_letter_for_letter(expected: Any, answered: Any, found: float | None) -> None:
    assert score("accuracy", expected, answered) == found


@pytest.mark.parametrize(
    ("expected", "answered", "found"),
    [
        ("café", "cafe\u0301 ", RIGHT),
        ("a  b", "a b", WRONG),
        ("A", "a", WRONG),
        ("a\nb", "\ufeffa\nb", WRONG),
        ("日本", "日本", RIGHT),
        ("x", None, WRONG),
        (None, None, NOTHING),
        (12, "12", RIGHT),
    ],
)
def test_exact_match_is_that_of_composed_text(expected: Any, answered: Any, found: float | None) -> None:
    assert score("exact_match", expected, answered) == found


@pytest.mark.parametrize(
    ("expected", "answered", "found"),
    [
        ("Paris", "It is PARIS, of course", RIGHT),
        ("strasse", "Die Straße", RIGHT),
        ("É", "cafe\u0301", RIGHT),
        ("Berlin", "It is Paris", WRONG),
        (" ", "anything", NOTHING),
        ("a", None, WRONG),
        (7, "about 17", RIGHT),
        ("a", {"b": "a"}, RIGHT),
    ],
)
def test_contains_folds_case(expected: Any, answered: Any, found: float | None) -> None:
    assert score("contains", expected, answered) == found


@pytest.mark.parametrize(
    ("expected", "answered", "found"),
    [
        (r"^(yes|no)\b", "no, never", RIGHT),
        (r"^(yes|no)\b", "nobody", WRONG),
        (r"(?i)paris", "PARIS", RIGHT),
        (r"(?=.*a)(?=.*b)", "b and a", RIGHT),
        (r"^\d+$", 12, RIGHT),
        (r"x?", None, WRONG),
        ("(", "(", NOTHING),
        ("(", None, NOTHING),
        ("a{99999999999999999999}", "a", NOTHING),
        ("(?:" * 300 + "a" + ")" * 300, "a", NOTHING),
        ("a" * 1001, "a" * 1001, NOTHING),
        ("a", "b" * 100_001, NOTHING),
        (None, "a", NOTHING),
        (12, "12", RIGHT),
    ],
)
def test_regex_searches_for_the_expected_pattern(expected: Any, answered: Any, found: float | None) -> None:
    assert score("regex", expected, answered) == found


@pytest.mark.parametrize(
    ("expected", "answered", "found"),
    [
        ('{"a": 1, "b": [1, 2]}', '{"b": [1.0, 2e0], "a": 1}', RIGHT),
        ('{"a": 0.1}', {"a": 0.1}, RIGHT),
        ({"a": Decimal("0.10")}, '{"a": 0.1}', RIGHT),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', WRONG),
        ('{"a": 1}', '{"a": true}', WRONG),
        ('{"a": 1}', '{"a": "1"}', WRONG),
        ('{"a": null}', "{}", WRONG),
        ('{"a": {"b": {"c": [{}]}}}', ' {"a":{"b":{"c":[{}]}}}\n', RIGHT),
        ('{"a": 1}', '{"a": 1', WRONG),
        ('{"a": 1}', 'It is {"a": 1}', WRONG),
        ('{"a": 1', '{"a": 1', NOTHING),
        ('{"a": 1}', None, WRONG),
        ("", "{}", NOTHING),
        ("positive", "positive", RIGHT),
        ('"positive"', "positive", RIGHT),
        ("12", 12.0, RIGHT),
        ('{"a": 1e999999}', '{"a": 1}', WRONG),
        ('{"a": 1}', "[" * 100_000, WRONG),
        ('{"a": 1}', "[" * 400 + "]" * 400, WRONG),
        ('{"a": "caf\\u00e9"}', '{"a": "café"}', RIGHT),
        ("12345678901234567890123", "12345678901234567890124", WRONG),
    ],
)
def test_json_match_is_deep_and_by_value(expected: Any, answered: Any, found: float | None) -> None:
    assert score("json_match", expected, answered) == found


@pytest.mark.parametrize(
    ("expected", "answered", "found"),
    [
        (1234.5, "about 1,234.5 kg", RIGHT),
        (1234.5, "1\u202f234.5", RIGHT),
        ("1,234.5", 1234.5, RIGHT),
        (1_000_000, "1'000'000", RIGHT),
        (-5, "−5 °C", RIGHT),
        (-5, "-$5.00", RIGHT),
        (5, "- 5 apples", RIGHT),
        (5, "+5", RIGHT),
        (10, "10-20", RIGHT),
        (12, "GPT-4 says 12", RIGHT),
        (8, "CO2 is **8**", RIGHT),
        (5, "The answer is...5.", RIGHT),
        (0.5, "=.5", RIGHT),
        (1500, "1.5e3", RIGHT),
        (0.0015, "1.5E−3", RIGHT),
        (45, "45%", RIGHT),
        (0.45, "45 %", RIGHT),
        (0.45, "45 percent", RIGHT),
        ("45%", "0.45", RIGHT),
        ("45%", "45%", RIGHT),
        ("45%", "0.45%", WRONG),
        (12, "１２", RIGHT),
        (12, "12.00001", RIGHT),
        (12, "12.0001", WRONG),
        (0, "0.0", RIGHT),
        (0, 1e-10, RIGHT),
        (12, "twelve", WRONG),
        (12, None, WRONG),
        (12, "1,2", WRONG),
        (1, True, WRONG),
        (12, [12], WRONG),
        ("twelve", "12", NOTHING),
        ("twelve", None, NOTHING),
        (math.inf, "12", NOTHING),
        ("1e999", "12", NOTHING),
        (10**400, "12", NOTHING),
        (True, "1", NOTHING),
        (None, "12", NOTHING),
        (3, "3rd of 1,000", RIGHT),
        (2024, "2024-05-01", RIGHT),
        (12, "1" * 1_000_000, WRONG),
    ],
)
def test_numeric_close_takes_the_first_number(expected: Any, answered: Any, found: float | None) -> None:
    assert score("numeric_close", expected, answered) == found


def test_a_pattern_that_would_never_end_costs_a_moment_once() -> None:
    scorer = Scorer(["regex"])
    start = time.monotonic()
    for _ in range(1000):
        assert scorer.score("(a|aa)+$", "a" * 60 + "b") == [None]
    assert time.monotonic() - start < 2
    assert scorer.score("a+b", "aab") == [1.0]


def test_many_patterns_that_would_never_end_are_given_up() -> None:
    evaluator = Evaluator(["regex", "contains"], [])
    patterns = [f"(a|aa)+${'x' * index}" for index in range(12)]
    start = time.monotonic()
    found = evaluator.take([*patterns, "a"], ["a" * 60 + "b"] * 13, {}, [None] * 13)
    assert time.monotonic() - start < 5
    assert found["score_regex"] == [None] * 13
    assert evaluator.evaluation().unusable == {"regex": 13}


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_breaks_a_score(expected: str, answered: str) -> None:
    names = scored(METRICS)
    for found in (Scorer(names).score(expected, answered), Scorer(names).score(expected, None)):
        assert set(found) <= {0.0, 1.0, None}
        assert expected.strip() or found == [None] * len(names)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)


@given(VALUES)
def test_a_value_matches_its_own_json(value: Any) -> None:
    text = json.dumps(value)
    assert score("json_match", text, json.dumps(value, sort_keys=True, indent=1)) == 1
    if not isinstance(value, str) and value is not None:
        assert score("json_match", text, value) == 1
        assert identity(value) == identity(json.loads(text))
        assert hash(identity(value)) == hash(identity(json.loads(text)))


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["{}", "it is {}!", "\n{} or 7", "{:,}"]))
def test_a_number_is_close_to_itself_in_any_words(number: float, words: str) -> None:
    assert score("numeric_close", number, words.format(number)) == 1


def test_an_answer_nested_without_end_is_like_no_other() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert Scorer(scored(METRICS)).score("1", deep) == [0.0] * 6
    assert vote([deep, "a", deep, "a"]) == ("a", 1 / 2)


def test_the_columns_are_those_with_a_value_per_row() -> None:
    assert score_names(METRICS) == [
        "score_accuracy",
        "score_exact_match",
        "score_contains",
        "score_regex",
        "score_json_match",
        "score_numeric_close",
    ]
    assert (decisive(["f1"]), decisive(["f1", "contains"])) == ("accuracy", "contains")


# --- votes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([], (None, None)),
        ([None, None], (None, None)),
        (["a", "b", "b"], ("b", 2 / 3)),
        (["b", "a"], ("b", 1 / 2)),
        (["a", "b", "b", "a"], ("a", 1 / 2)),
        ([None, "a", None], ("a", 1.0)),
        (["a ", "a"], ("a ", 1.0)),
        ([1, True, 1.0], (1, 2 / 3)),
        ([{"a": 1, "b": 2}, {"c": 1}, {"b": 2, "a": 1.0}], ({"a": 1, "b": 2}, 2 / 3)),
        ([0, None, 0], (0, 1.0)),
    ],
)
def test_the_most_votes_win_and_the_first_of_a_tie(answers: list[Any], found: tuple[Any, float | None]) -> None:
    assert vote(answers) == found


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=12), st.randoms())
def test_a_vote_is_a_majority_whatever_the_order(answers: list[str | None], chance: random.Random) -> None:
    winner, agreement = vote(answers)
    voted = [answer for answer in answers if answer is not None]
    if not voted:
        assert (winner, agreement) == (None, None)
        return
    assert agreement == voted.count(winner) / len(voted) == max(map(voted.count, voted)) / len(voted)
    chance.shuffle(answers)
    assert vote(answers)[1] == agreement


# --- a run --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(PAIRS)
def test_all_is_as_scikit_learn_has_it_on_the_rows(pairs: list[tuple[str, str | None]]) -> None:
    found = evaluated(pairs)
    expected = [one for one, _ in pairs]
    answered = [other or "(none)" for _, other in pairs]
    labels = sorted(set(expected) | {other for _, other in pairs if other})
    assert found.confusion is not None
    assert found.confusion.labels == labels
    with_none = confusion_matrix(expected, answered, labels=[*labels, "(none)"])
    assert found.confusion.counts == with_none[:-1, :-1].tolist()
    assert found.confusion.unparsed == with_none[:-1, -1].tolist()
    columns_ = precision_recall_fscore_support(expected, answered, labels=labels, zero_division=0)
    by_class = [
        [getattr(one, name) for one in found.confusion.measures] for name in ("precision", "recall", "f1", "support")
    ]
    assert by_class == [column.tolist() for column in columns_]
    accuracy, f1 = found.whole.metrics["accuracy"], found.whole.metrics["f1"]
    assert accuracy is not None
    assert f1 is not None
    assert accuracy.value == accuracy_score(expected, answered)
    # The sum of the mean may be taken in another order.
    reference = f1_score(expected, answered, labels=labels, average="macro", zero_division=0)
    assert f1.value == pytest.approx(reference, rel=1e-12)
    for measure in (accuracy, f1):
        assert 0 <= measure.low <= measure.value <= measure.high <= 1
    right = sum(one == other for one, other in pairs)
    per_correct = found.whole.usd_per_correct
    assert (per_correct is None) == (right == 0)
    if per_correct is not None:
        assert abs(per_correct * right - CENT * len(pairs)) < right * Decimal("1e-12")


@settings(max_examples=30)
@given(PAIRS, st.randoms(), st.integers(1, 20))
def test_neither_order_nor_batches_matter(
    pairs: list[tuple[str, str | None]], chance: random.Random, size: int
) -> None:
    metrics = ("accuracy", "f1", "contains")
    whole = Evaluator(metrics, ["first"])
    rows = [(one, other, index % 3, Decimal(index).scaleb(-9)) for index, (one, other) in enumerate(pairs)]

    def take(evaluator: Evaluator, batch: Sequence[tuple[Any, Any, Any, Any]]) -> dict[str, list[float | None]]:
        expected, answered, values, usd = map(list, zip(*batch, strict=True))
        return evaluator.take(expected, answered, {"first": values, "other": expected}, usd)

    scores = take(whole, rows)
    batched = Evaluator(metrics, ["first"])
    parts = [take(batched, rows[start : start + size]) for start in range(0, len(rows), size)]
    assert scores == {name: [value for part in parts for value in part[name]] for name in scores}
    chance.shuffle(rows)
    shuffled = Evaluator(metrics, ["first"])
    take(shuffled, rows)
    assert whole.evaluation() == batched.evaluation() == shuffled.evaluation()


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_the_interval_of_a_share_is_wilsons(rows: int, share: float) -> None:
    right = round(rows * share)
    found = proportion(right, rows)
    reference = binomtest(right, rows).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1e-15)
    z = NormalDist().inv_cdf(0.975)
    centre = (right + z * z / 2) / (rows + z * z)
    margin = z / (rows + z * z) * math.sqrt(right * (rows - right) / rows + z * z / 4)
    assert (found.low, found.high) == pytest.approx((centre - margin, centre + margin), abs=1e-9)
    assert found.low <= found.value <= found.high


def test_the_interval_of_f1_is_that_of_rows_drawn_again() -> None:
    chance = np.random.default_rng(5)
    expected = chance.choice(["a", "b", "c"], p=[0.6, 0.3, 0.1], size=400)
    answered = np.where(chance.random(400) < 0.75, expected, chance.choice(["a", "b", "c"], size=400))
    found = evaluated(list(zip(expected.tolist(), answered.tolist(), strict=True))).whole.metrics["f1"]
    assert found is not None
    draws = []
    for _ in range(400):
        rows = chance.integers(0, 400, size=400)
        draws.append(f1_score(expected[rows], answered[rows], average="macro"))
    low, high = np.percentile(draws, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.015)


def test_slices_are_the_evaluation_of_their_rows() -> None:
    chance = random.Random(3)
    rows = [
        (chance.choice("ab"), chance.choice(["a", "b", None]), chance.choice(["de", "en", None])) for _ in range(300)
    ]
    evaluator = Evaluator(["accuracy", "f1"], ["language", "n"])
    evaluator.take(
        [row[0] for row in rows],
        [row[1] for row in rows],
        {"language": [row[2] for row in rows], "n": list(range(300))},
        [CENT] * 300,
    )
    found = evaluator.evaluation()
    assert list(found.slices["language"].groups) == ["de", "en", None]
    for value, group in found.slices["language"].groups.items():
        assert group == evaluated([row[:2] for row in rows if row[2] == value]).whole
    assert (len(found.slices["n"].groups), found.slices["n"].other_rows) == (100, 200)
    text = "\n".join(found.lines())
    assert "… and 80 more values" in text
    assert "… and 200 rows of values after the first 100" in text


def test_what_has_no_expected_value_is_in_no_number() -> None:
    found = evaluated([("a", "a"), (None, "a"), ("", None), ("a", None)])
    assert (found.whole.rows, found.without_expected, found.whole.unparsed, found.whole.right) == (2, 2, 1, 1)
    assert found.whole.usd == 2 * CENT == found.whole.usd_per_correct


def test_a_cost_that_nobody_knows_is_no_cost_per_correct_answer() -> None:
    evaluator = Evaluator(["accuracy"], [])
    evaluator.take(["a", "a", "a"], ["a", "a", "b"], {}, [CENT, None, CENT])
    found = evaluator.evaluation()
    assert (found.whole.usd, found.whole.unknown_cost, found.whole.usd_per_correct) == (2 * CENT, 1, None)
    assert "cost per correct answer: not known, as 1 rows have no known cost" in found.lines()
    assert "cost per correct answer: none is right ($0.01 spent)" in evaluated([("a", "b")]).lines()


def test_no_rows_are_no_error() -> None:
    found = evaluated([], METRICS)
    assert found.whole.metrics == dict.fromkeys(METRICS)
    assert found.confusion is None
    assert json.loads(exact_json(found.document()))["rows"] == 0
    assert found.lines()[1] == "accuracy: none"


def test_the_document_and_the_lines_of_a_run() -> None:
    pairs = [("yes", "yes")] * 6 + [("no", "no")] * 2 + [("no", "yes"), ("yes", None)]
    found = evaluated(pairs)
    document = json.loads(exact_json(found.document()), parse_float=Decimal)
    assert document["usd"] == Decimal("0.1")
    assert document["usd_per_correct"] == Decimal("0.0125")
    assert document["confusion"]["labels"] == ["no", "yes"]
    assert document["confusion"]["matrix"] == [[2, 1], [0, 6]]
    assert document["confusion"]["unparsed"] == [0, 1]
    assert found.lines() == [
        "evaluated: 10 rows, 1 of them without a readable answer",
        "accuracy: 0.800 (0.490 to 0.943), 95 % interval",
        found.lines()[2],
        "cost per correct answer: $0.0125 ($0.1 for 8 right by accuracy)",
        "expected ↓ answered →  no  yes  (none)",
        "no                      2    1       0",
        "yes                     0    6       1",
        "class  precision  recall     f1  rows",
        "no         1.000   0.667  0.800     3",
        "yes        0.857   0.857  0.857     7",
    ]
    assert found.lines()[2].startswith("f1: 0.829 (")


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (40, "confusion matrix: 40 classes do not fit here; the summary in JSON has it"),
        (60, "confusion matrix: 60 classes are more than the 50 that it may have"),
        (250, "by class: 250 classes are more than the 200 that are listed"),
        (1200, "note: no confusion matrix and no F1: there are more than 1000 classes"),
    ],
)
def test_many_classes_are_left_out_and_it_is_said(classes: int, said: str) -> None:
    found = evaluated([(f"class {index}", f"class {index - index % 2}") for index in range(classes)])
    assert any(line.startswith(said) for line in found.lines())
    assert found.whole.metrics["accuracy"] is not None
    assert found.whole.metrics["accuracy"].value == 0.5
    assert (found.confusion is None) == (found.whole.metrics["f1"] is None) == (classes > 1000)


def test_a_slice_with_too_many_classes_has_no_f1() -> None:
    evaluator = Evaluator(["f1"], ["part"])
    names = [f"class {index}" for index in range(400)]
    assert evaluator.take(names, names, {"part": ["one"] * 350 + ["two"] * 50}, [CENT] * 400) == {}
    found = evaluator.evaluation()
    one, two = found.slices["part"].groups.values()
    assert (one.metrics["f1"], one.right) == (None, 350)
    assert two.metrics["f1"] is not None
    assert "note: no F1 in 1 slices by part: they have too many classes" in found.lines()


@given(st.lists(st.tuples(st.text(min_size=1, max_size=150), st.text(max_size=150)), max_size=8), st.text(max_size=80))
@settings(max_examples=30)
def test_no_text_widens_or_steers_the_terminal(pairs: list[tuple[str, str]], column: str) -> None:
    evaluator = Evaluator(["f1", "exact_match"], [column])
    evaluator.take(
        *map(list, zip(*pairs, strict=True)) if pairs else ([], []),
        {column: [two for _, two in pairs]},
        [CENT] * len(pairs),
    )
    lines = [*evaluator.evaluation().lines(), *compared([(one, one, two) for one, two in pairs], ["f1"]).lines()]
    for line in lines:
        assert columns(line) <= WIDTH
        assert line.isprintable()


def test_long_answers_are_classes_by_their_beginning_and_a_hash() -> None:
    found = evaluated([("x" * 500 + "a", "x" * 500 + "b"), ("x" * 500 + "a", "x" * 500 + "a")])
    assert found.confusion is not None
    assert found.confusion.counts == [[1, 1], [0, 0]] or found.confusion.counts == [[0, 0], [1, 1]]
    assert all(len(label) < 100 for label in found.confusion.labels)


_MEASURE = """
import resource, sys, time
from decimal import Decimal
from batchrun.evaluate import Evaluator
from batchrun.intervals import macro_f1, Crossed
macro_f1(Crossed(["a"], [(0, 0)], [1]))
import regex
evaluator = Evaluator(["accuracy", "f1", "exact_match", "contains"], ["hundred", "all"])
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for first in range(0, int(sys.argv[1]), 10_000):
    index = range(first, first + 10_000)
    answers = [f"a free answer with the number {number} in it" for number in index]
    slices = {"hundred": [number % 100 for number in index], "all": list(index)}
    evaluator.take([f"answer {number % 7}" for number in index], answers, slices, [Decimal("0.000001")] * 10_000)
found = evaluator.evaluation()
assert found.whole.rows == int(sys.argv[1]) and found.confusion is None
print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("rows", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_free_answers_fill_neither_memory_nor_time(rows: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(rows)], capture_output=True, text=True, check=True, timeout=100
    )
    seconds, megabytes = map(float, result.stdout.split())
    assert seconds < max(5, 20 * rows / 1_000_000)
    assert megabytes < 50


# --- two runs -----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(TRIPLES)
def test_two_runs_are_each_as_alone_and_paired_by_row(triples: list[tuple[str, str | None, str | None]]) -> None:
    found = compared(triples)
    alone = [evaluated([(row[0], row[side]) for row in triples]).whole for side in (1, 2)]
    for metric in ("accuracy", "f1"):
        paired = found.metrics[metric]
        assert paired is not None
        values = [group.metrics[metric] for group in alone]
        assert [paired.a, paired.b] == pytest.approx([one.value for one in values if one is not None], rel=1e-12)
        difference = paired.difference
        assert difference.value == pytest.approx(paired.b - paired.a, abs=1e-12)
        assert -1 <= difference.low <= difference.value <= difference.high <= 1
        assert 0 < difference.p_value <= 1
    gained = sum(one != two == three for two, one, three in triples)
    lost = sum(one == two != three for two, one, three in triples)
    assert (found.gained.number, found.lost.number) == (gained, lost)
    accuracy = found.metrics["accuracy"]
    assert accuracy is not None
    mcnemar = min(1.0, 2 * binom.cdf(min(gained, lost), gained + lost, 0.5)) if gained + lost else 1.0
    assert accuracy.difference.p_value == pytest.approx(mcnemar, rel=1e-9)
    assert found.changed.number == sum(one != other for _, one, other in triples)
    assert (found.a.usd, found.b.usd) == (CENT * len(triples), 2 * CENT * len(triples))


@settings(max_examples=20)
@given(TRIPLES)
def test_a_run_compared_with_itself_differs_in_nothing(triples: list[tuple[str, str | None, str | None]]) -> None:
    found = compared([(one, two, two) for one, two, _ in triples])
    assert (found.changed.number, found.agreement) == (0, 1.0)
    for paired in found.metrics.values():
        assert paired is not None
        assert paired.difference.value == 0
        assert paired.difference.p_value == 1


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 1000))
def test_the_paired_interval_is_that_of_agresti_and_min(gained: int, lost: int, same: int) -> None:
    rows = gained + lost + same
    found = paired_proportions(gained, lost, rows)
    # Their own code, as published for R.
    centre = (gained - lost) / (rows + 2)
    deviation = math.sqrt((gained + lost + 1) - (lost - gained) ** 2 / (rows + 2)) / (rows + 2)
    margin = NormalDist().inv_cdf(0.975) * deviation
    assert found.low == pytest.approx(min(found.value, max(-1, centre - margin)), abs=1e-12)
    assert found.high == pytest.approx(max(found.value, min(1, centre + margin)), abs=1e-12)


@pytest.mark.parametrize(("both", "gained", "lost"), [(0.6, 0.1, 0.1), (0.8, 0.06, 0.02), (0.3, 0.3, 0.1)])
def test_the_paired_interval_holds_in_95_of_100(both: float, gained: float, lost: float) -> None:
    chance = np.random.default_rng(11)
    draws = chance.multinomial(60, [both, gained, lost, 1 - both - gained - lost], size=1000)
    held = 0
    for _, up, down, _ in draws.tolist():
        found = paired_proportions(up, down, 60)
        held += found.low <= gained - lost <= found.high
    assert 0.93 <= held / 1000 <= 0.99


def test_a_better_run_is_told_from_chance() -> None:
    chance = random.Random(1)
    triples = []
    for _ in range(400):
        expected = chance.choice("abc")
        one = expected if chance.random() < 0.7 else chance.choice("abc")
        triples.append((expected, one, expected if chance.random() < 0.5 else one))
    found = compared(triples)
    for paired in found.metrics.values():
        assert paired is not None
        assert paired.difference.p_value < 0.01
        assert paired.difference.low > 0
    assert len(found.gained.first) == 20
    assert found.lost.first == ()


def test_the_cost_per_correct_answer_is_of_the_rows_with_an_expected_value() -> None:
    rows = [("a", "a", "b"), (None, "a", "a"), ("", "b", "a"), ("b", "b", "b")]
    found = compared(rows, ["contains"])
    assert (found.a.usd, found.a.usd_per_correct) == (4 * CENT, CENT)
    assert (found.b.usd, found.b.usd_per_correct) == (8 * CENT, 4 * CENT)
    assert (found.lost.first, found.gained.number, found.changed.first) == ((1,), 0, (1, 3))
    paired = found.metrics["contains"]
    assert paired is not None
    assert (paired.rows, paired.a, paired.b) == (2, 1.0, 0.5)
    assert any(line.startswith("contains") and "-0.500 (" in line for line in found.lines())


def test_a_comparison_without_expected_values_still_tells_what_changed() -> None:
    comparison = Comparison([])
    comparison.take("r1", None, "a", "a ", True, CENT, CENT, 1.0, 2.0)
    comparison.take("r2", None, 1, 1.0, True, CENT, None, None, 4.0)
    comparison.take("r3", None, None, "b", True, None, 3 * CENT, 3.0, 6.0)
    found = comparison.result()
    assert (found.rows, found.agreement, found.changed.first) == (3, 2 / 3, ("r3",))
    assert (found.a.usd, found.a.unknown_cost, found.b.usd, found.b.unknown_cost) == (2 * CENT, 1, 4 * CENT, 1)
    assert found.a.usd_per_correct is None
    assert found.b.median_seconds == pytest.approx(4, rel=0.0005)
    document = json.loads(exact_json(found.document()))
    assert document["changed"] == {"number": 1, "first": ["r3"]}
    assert document["metrics"] == {}
    assert found.lines() == [
        "compared: 3 rows",
        "changed answers: 1 rows (r3)",
        "                        A          B  B − A, 95 % interval",
        "dollars              0.02       0.04                 +0.02",
        "$ per correct   not known  not known",
        "median seconds          1          4",
        "p95 seconds             3          6",
        "no answer               1          0",
        "unknown cost            1          1",
    ]


def test_nothing_compared_is_no_error() -> None:
    found = Comparison(["accuracy", "f1"]).result()
    assert (found.rows, found.agreement) == (0, None)
    assert found.metrics == {"accuracy": None, "f1": None}
    json.loads(exact_json(found.document()))
    assert "median seconds       none       none" in found.lines()


def test_too_many_classes_leave_f1_out_of_a_comparison() -> None:
    found = compared([(f"{index}", f"{index}", "x") for index in range(1200)])
    assert found.metrics["f1"] is None
    assert found.metrics["accuracy"] is not None
    assert found.lines()[-1].startswith("note: no F1: there are more than 1000 classes")


@settings(max_examples=50)
@given(st.lists(st.floats(1e-5, 1e5), min_size=1, max_size=200))
def test_quantiles_of_latency_are_true_to_a_twentieth_of_a_percent(latencies: list[float]) -> None:
    comparison = Comparison([])
    for seconds in latencies:
        comparison.take(0, None, None, None, True, None, None, seconds, None)
    side = comparison.result().a
    ordered = sorted(latencies)
    for share, found in ((0.5, side.median_seconds), (0.95, side.p95_seconds)):
        assert found == pytest.approx(ordered[math.ceil(share * len(ordered)) - 1], rel=0.000501)


# --- what it needs ------------------------------------------------------------------------------------------


def test_what_is_missing_is_said_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    require(METRICS)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "regex", None)
    with pytest.raises(MissingHereError, match=r"needs scikit-learn: pip install 'batchrun\[evaluate\]'$"):
        require(["accuracy"])
    with pytest.raises(MissingHereError, match=r"needs scikit-learn, regex: pip install"):
        require(["accuracy", "regex"])


def test_nothing_heavy_is_loaded_before_a_value_is_asked_for() -> None:
    code = (
        "import sys, batchrun.evaluate as e, batchrun.comparison as c, batchrun.intervals as i; "
        "i.require(['f1', 'regex']); "
        "x = e.Evaluator(['f1'], []); x.take(['a'], ['a'], {}, [None]); c.Comparison(['f1']); "
        "print([name for name in ('numpy', 'scipy', 'sklearn', 'regex') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_tables_are_aligned_by_what_is_seen() -> None:
    assert aligned([["", "日本", "x"], ["cafe\u0301", "1", "22"]]) == ["      日本   x", "cafe\u0301     1  22"]
    assert shown("\x1b[31mred\x1b[0m") == "\ufffd[31mred\ufffd[0m"
