"""What is made of the answers besides themselves: labels or values of a schema, votes, scores. Free to make again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import pi, sqrt
from typing import Any, NamedTuple

import pyarrow as pa

from batchrun.answers import ResultRow
from batchrun.columns import build
from batchrun.errors import JobError, listed
from batchrun.evaluate import UNANSWERED, Evaluation, Evaluator
from batchrun.intervals import require
from batchrun.job import Job
from batchrun.money import from_pico
from batchrun.plain import plain_column
from batchrun.records import RowSlots
from batchrun.scores import score_names, vote
from batchrun.settings import EvaluateSetting
from batchrun.shapes import Choice, Shape
from batchrun.structure import Parsed, Structure

_VOTE, _AGREEMENT = "vote", "agreement"
_MOST_LABELS = 1000
_ENOUGH = 50
"""Labels from which on their shares say something."""
_SHIFT = 0.1
"""Share of the rows that must have other labels than before, for it to be told."""
_RESPONSE, _MODEL = "response", "requested_model"


class Evaluations(NamedTuple):
    """Of the single answers, and of the votes where there are several of them to a row."""

    answers: Evaluation
    votes: Evaluation | None

    def document(self) -> dict[str, Any]:
        """As plain values."""
        votes = {"votes": self.votes.document()} if self.votes is not None else {}
        return {**self.answers.document(), **votes}

    def lines(self) -> list[str]:
        """A short text."""
        lines = self.answers.lines()
        return lines if self.votes is None else [*lines, "by vote:", *self.votes.lines()]


def structure_of(job: Job) -> Structure | None:
    """What a job wants of each answer.

    Raises:
        JobError: its labels or its schema are none.
    """
    if job.labels is not None:
        return Structure.of_labels(job.labels)
    return Structure.of_schema(job.schema_) if isinstance(job.schema_, Mapping) else None


def columns_of(job: Job) -> dict[str, Any]:
    """Where in the output of a job stands what two runs are compared by."""
    structure, setting = structure_of(job), job.evaluate
    if structure is None:
        answers = [f"{job.output.prefix}{_RESPONSE}"]
    elif setting is not None and setting.answer is not None:
        answers = [job.output.prefix_of_answers + setting.answer]
    else:
        answers = [job.output.prefix_of_answers + name for name in structure.columns.names[:-1]]
    return {
        "prefix": job.output.prefix,
        "answers": answers,
        "id": job.input.id,
        "expected": setting.expected if setting is not None else None,
        "metrics": metrics_of(job),
    }


def metrics_of(job: Job) -> list[str]:
    """By which the answers of a job are judged; none without `evaluate`."""
    if job.evaluate is None:
        return []
    return job.evaluate.metrics or (["accuracy", "f1"] if job.labels is not None else ["exact_match"])


class Derivation:
    """The columns that are made of answers, batch by batch.

    Attributes:
        schema: from the job alone.
        labels: how often each label was given.
        misfits: answers without the form that is wanted.

    Raises:
        JobError: `evaluate` names a column that is not there, or what is compared is none.
        MissingHereError: the libraries that `evaluate` needs are not installed.
    """

    def __init__(self, job: Job, slots: RowSlots, input_schema: pa.Schema) -> None:
        self._structure = structure_of(job)
        self._slots = slots
        self._setting = job.evaluate
        self._columns = list(self._structure.columns) if self._structure is not None else []
        self._answer = self._answer_name()
        self._metrics = metrics_of(job)
        if self._setting is not None:
            _check_columns(self._setting, input_schema)
            require(self._metrics)
        self._votes = slots.number > 1
        self._group = slots.samples if slots.samples > 1 else slots.number
        fields = list(self._columns)
        self._compared_shape = self._shape_of(self._answer)
        if self._votes:
            kind = self._compared_shape.type if self._compared_shape is not None else pa.string()
            fields += [pa.field(_VOTE, kind), pa.field(_AGREEMENT, pa.float64())]
        fields += [pa.field(name, pa.float64()) for name in score_names(self._metrics)]
        prefix = job.output.prefix_of_answers
        self.schema = pa.schema([field.with_name(prefix + field.name) for field in fields])
        if twice := [name for name, number in Counter(self.schema.names).items() if number > 1]:
            raise JobError(
                f"schema: a property cannot be named {twice[0]!r} in this job, because a column of its output is: "
                "name it otherwise"
            )
        self._counted = self._counted_column()
        self.labels: Counter[str] = Counter()
        self.misfits = 0
        self._by_model = len(slots.models) > 1
        self._evaluators = self._evaluators_of(self._setting) if self._setting is not None else []

    def batch(self, rows: pa.RecordBatch, result_rows: Sequence[ResultRow]) -> list[pa.Array]:
        """The columns of some slots, all those of each row among them.

        Args:
            rows: of the input, one for each slot.
        """
        arrays: list[pa.Array] = []
        values: list[Any] | None = None
        if self._structure is not None:
            parsed = [self._parsed(row) for row in result_rows]
            arrays += self._structure.arrays(parsed)
            values = [self._compared(answer.value) for answer in parsed]
            self._count(parsed)
        if self._setting is None and not self._votes:
            return arrays
        if values is None:
            values = [row.text for row in result_rows]
        votes = [vote(values[start : start + self._group]) for start in range(0, len(values), self._group)]
        if self._votes:
            arrays += self._vote_arrays(votes)
        if self._setting is not None:
            arrays += self._score_arrays(self._setting, rows, result_rows, values, [value for value, _ in votes])
        return arrays

    @cached_property
    def evaluations(self) -> Evaluations | None:
        """Of all slots, once they have gone through; None if the job wants none."""
        if not self._evaluators:
            return None
        answers, *votes = (evaluator.evaluation() for evaluator in self._evaluators)
        return Evaluations(answers, votes[0] if votes else None)

    # --- inside ---------------------------------------------------------------------------------------------

    def _evaluators_of(self, setting: EvaluateSetting) -> list[Evaluator]:
        """One for the single answers, and one for the votes."""
        by_model = [*setting.by, _MODEL] if self._by_model else setting.by
        answers = Evaluator(self._metrics, by_model)
        if not self._votes:
            return [answers]
        return [answers, Evaluator(self._metrics, by_model if self._votes_within_model else setting.by)]

    @property
    def _votes_within_model(self) -> bool:
        return self._slots.samples > 1

    def _answer_name(self) -> str | None:
        """The column that is compared; None for the text of the answer, or the whole value of a schema."""
        wanted = self._setting.answer if self._setting is not None else None
        names = [field.name for field in self._columns[:-1]]
        if wanted is None:
            return names[0] if len(names) == 1 else None
        if wanted == _RESPONSE and self._structure is None:
            return None
        if wanted not in names:
            raise JobError(f"evaluate.answer: there is no {wanted!r}: it is one of {listed([*names] or [_RESPONSE])}")
        return wanted

    def _parsed(self, row: ResultRow) -> Parsed:
        if not row.is_ok:
            return Parsed(None, None)
        assert self._structure is not None
        return self._structure.parse(row.text, is_cut=row.is_cut)

    def _compared(self, value: Any) -> Any:
        if value is None or self._structure is None or not self._structure.has_properties:
            return value
        if self._answer is not None:
            return value.get(self._answer)
        return json.dumps(value, ensure_ascii=False, sort_keys=True)

    def _shape_of(self, name: str | None) -> Shape | None:
        return self._structure.shape_of(name) if self._structure is not None and name is not None else None

    def _counted_column(self) -> str | None:
        """The column that holds labels: what is compared, if it is one of several words; else the only one that is."""
        names = [field.name for field in self._columns[:-1]]
        choices = [name for name in names if isinstance(self._shape_of(name), Choice)]
        return self._answer if self._answer in choices else choices[0] if len(choices) == 1 else None

    def _count(self, parsed: Sequence[Parsed]) -> None:
        for answer in parsed:
            self.misfits += answer.error is not None
            if self._counted is None or answer.value is None or self._structure is None:
                continue
            label = answer.value.get(self._counted) if self._structure.has_properties else answer.value
            if label is not None and (label in self.labels or len(self.labels) < _MOST_LABELS):
                self.labels[label] += 1

    def _vote_arrays(self, votes: Sequence[tuple[Any, float | None]]) -> Iterator[pa.Array]:
        winners = [value for value, _ in votes for _ in range(self._group)]
        shape = self._compared_shape
        yield shape.array(winners) if shape is not None else build(winners, pa.string())
        yield build([share for _, share in votes for _ in range(self._group)], pa.float64())

    def _score_arrays(
        self,
        setting: EvaluateSetting,
        rows: pa.RecordBatch,
        result_rows: Sequence[ResultRow],
        values: Sequence[Any],
        votes: Sequence[Any],
    ) -> Iterator[pa.Array]:
        wanted = self._input_column(rows, setting.expected)
        # What has no answer yet, or will have none, is neither right nor wrong.
        expected = [
            value if row.is_ok or value is None else UNANSWERED for value, row in zip(wanted, result_rows, strict=True)
        ]
        slices = {name: self._input_column(rows, name) for name in setting.by}
        usd = [None if row.usd_pico is None else from_pico(row.usd_pico) for row in result_rows]
        if self._by_model:
            models = [slot.model for slot in self._slots.of(0)]
            slices[_MODEL] = models * (len(wanted) // len(models))
        scores = self._evaluators[0].take(expected, values, slices, usd)
        if self._votes:
            if not self._votes_within_model:
                slices.pop(_MODEL, None)
            self._take_votes(expected, votes, slices, usd)
        for name in score_names(self._metrics):
            yield build(scores[name], pa.float64())

    def _input_column(self, rows: pa.RecordBatch, name: str) -> list[Any]:
        return plain_column(rows.column(rows.schema.get_field_index(name)), name, 0)

    def _take_votes(
        self, expected: Sequence[Any], votes: Sequence[Any], slices: Mapping[str, Sequence[Any]], usd: Sequence[Any]
    ) -> None:
        step = self._group
        firsts = range(0, len(expected), step)
        costs = [usd[first : first + step] for first in firsts]
        self._evaluators[1].take(
            # One sample that was answered is enough for its row to be right or wrong.
            [
                next((value for value in expected[first : first + step] if value is not UNANSWERED), UNANSWERED)
                for first in firsts
            ],
            votes,
            {name: [column[first] for first in firsts] for name, column in slices.items()},
            [None if None in cost else sum(cost) for cost in costs],
        )


def shift(now: Mapping[str, int], before: Mapping[str, int]) -> str | None:
    """What to say of labels that are given in other shares than they were; None if chance can have done it."""
    sums = sum(now.values()), sum(before.values())
    if min(sums) < _ENOUGH:
        return None
    names = sorted(now.keys() | before.keys())
    apart = {name: now.get(name, 0) / sums[0] - before.get(name, 0) / sums[1] for name in names}
    distance = sum(map(abs, apart.values())) / 2
    # Half the sum of what so many shares of so many rows differ by chance, and as much again.
    chance = len(names) * sqrt((1 / sums[0] + 1 / sums[1]) / (2 * pi * len(names)))
    if distance < max(_SHIFT, 2 * chance):
        return None
    most = sorted(names, key=lambda name: -abs(apart[name]))[:3]
    told = ", ".join(f"{name} {before.get(name, 0) / sums[1]:.0%} → {now.get(name, 0) / sums[0]:.0%}" for name in most)
    return f"the labels have shifted since the last run: {told}"


def _check_columns(setting: EvaluateSetting, schema: pa.Schema) -> None:
    for key, names in (("expected", [setting.expected]), ("by", setting.by)):
        for name in names:
            if name not in schema.names:
                raise JobError(f"evaluate.{key}: there is no column {name!r}: the columns are {listed(schema.names)}")
