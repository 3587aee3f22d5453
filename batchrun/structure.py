"""What a job wants to know of each answer, its labels or its schema: asked for, read, and put into typed columns."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import pyarrow as pa

from batchrun.columns import build
from batchrun.documents import sound
from batchrun.errors import JobError
from batchrun.labels import Labels, NoLabelError
from batchrun.providers import ResponseFormat
from batchrun.schemas import as_json, is_strict, object_of, placed, shape_of, validator_of
from batchrun.shapes import Choice, Free, Items, MisfitError, Record, Shape
from batchrun.tolerant import LONGEST, NoJSONError, decode, shown, without_reasoning

PARSE_ERROR = "parse_error"
_LONGEST_ERROR = 200


class Parsed(NamedTuple):
    """An answer, read.

    Attributes:
        value: the label as the job writes it, or the value that fits the schema; None if it does not fit.
        error: why it does not fit, naming the path and the value, in at most 200 characters.
    """

    value: Any
    error: str | None


class Structure(ABC):
    """What is wanted of each answer.

    Attributes:
        columns: what the answers become, from the job alone; `parse_error` is the last.
        has_properties: the columns are the properties of a value, not the value itself.
    """

    columns: pa.Schema
    has_properties = False

    @staticmethod
    def of_labels(labels: Sequence[str]) -> Structure:
        """One of several labels.

        Raises:
            JobError: none; one that is no text or blank; two that differ in case or spaces alone.
        """
        return _OfLabels(labels)

    @staticmethod
    def of_schema(schema: Mapping[str, Any]) -> Structure:
        """A value that fits a JSON Schema.

        Raises:
            JobError: it is none, refers to another document, or gives no columns.
        """
        return _OfSchema(schema)

    @abstractmethod
    def parse(self, text: str | None, *, is_cut: bool = False) -> Parsed:
        """What an answer says; never raises. `is_cut`: it ended because it was as long as allowed."""

    @abstractmethod
    def arrays(self, parsed: Sequence[Parsed]) -> list[pa.Array]:
        """The columns of some answers, in the order of `columns`."""

    @abstractmethod
    def shape_of(self, name: str) -> Shape:
        """Of one of the columns but the last."""

    @abstractmethod
    def _schema(self, style: ResponseFormat) -> dict[str, Any]:
        """The schema that is sent; except with `bare`, that of an object."""

    @abstractmethod
    def _wish(self) -> str:
        """The same in words, where the answer need not be JSON."""

    def document(self, style: ResponseFormat) -> dict[str, Any]:
        """The value of `response_format`."""
        if style == "json_object":
            return {"type": "json_object"}
        schema = self._schema(style)
        return {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": is_strict(schema), "schema": schema},
        }

    def instruction(self, style: ResponseFormat | None) -> str | None:
        """Text for the end of the prompt, where the provider does not hold the answer to its form."""
        if style is None:
            return self._wish()
        return _in_words(self._schema(style)) if style == "json_object" else None

    def reminder(self, style: ResponseFormat | None) -> str:
        """Text for a request that asks again: the form of the answer, as `style` has asked for it."""
        return self._wish() if style in (None, "bare") else _in_words(self._schema(style))


class _OfLabels(Structure):
    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = Labels(labels)
        self._choice = Choice(self._labels.names, is_nullable=True)
        self._known = {label: Parsed(label, None) for label in self._labels.names}
        self.columns = pa.schema([("label", self._choice.type), (PARSE_ERROR, pa.string())])

    def parse(self, text: str | None, *, is_cut: bool = False) -> Parsed:
        if is_cut:
            if (whole := self._labels.whole(text or "")) is not None:
                return self._known[whole]
            # Its last word may be the beginning of another.
            text = "".join((text or "").rsplit(maxsplit=1)[:-1]) or None
            if text is None:
                return _CUT
        if text in self._known:
            return self._known[text]
        try:
            return self._known[self._labels.find(text or "")]
        except NoLabelError as exc:
            return _refused(exc)

    def arrays(self, parsed: Sequence[Parsed]) -> list[pa.Array]:
        return [self._choice.array([answer.value for answer in parsed]), _errors(parsed)]

    def shape_of(self, name: str) -> Shape:
        return self._choice

    def _schema(self, style: ResponseFormat) -> dict[str, Any]:
        label = {"type": "string", "enum": list(self._labels.names)}
        return label if style == "bare" else object_of("label", label)

    def _wish(self) -> str:
        names = "\n".join(self._labels.names)
        return f"Answer with exactly one of these labels, as it stands here, and with nothing else:\n{names}"


class _OfSchema(Structure):
    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._document = as_json(schema)
        if not isinstance(self._document, dict):
            raise JobError(f"schema: {shown(schema)} is no JSON Schema; it should be a mapping")
        self._validator = validator_of(self._document)
        self._shape = shape_of(self._document)
        self._record = self._shape if isinstance(self._shape, Record) and not self._shape.is_nullable else None
        self.has_properties = self._record is not None
        fields = list(self._record.type) if self._record else [pa.field("value", self._shape.type)]
        for field in fields:
            if field.name in {PARSE_ERROR, ""}:
                raise JobError(
                    f"schema: a property cannot be named {field.name!r}: its column needs a name, and {PARSE_ERROR} is "
                    "the one that says why an answer did not fit"
                )
        self.columns = pa.schema([*fields, pa.field(PARSE_ERROR, pa.string())])

    def parse(self, text: str | None, *, is_cut: bool = False) -> Parsed:
        """What an answer says; never raises.

        Read as JSON, else as near-JSON anywhere in the text: what fits the schema must be one value and no other.
        Numbers and booleans may be text, enums and names in another case, an object alone in a list; an optional
        property that is null is absent. Unknown properties have no column; where `additionalProperties` is false they
        are an error. What is cut is refused: JSON that does not end, and what may go on without any sign of it.
        """
        if not text or not text.strip():
            return Parsed(None, "the answer is empty")
        if len(text) > LONGEST:
            return Parsed(None, f"too long: {len(text)} characters")
        if is_cut and not isinstance(self._shape, (Record, Items)) and text.rstrip()[-1] not in _ENDS:
            return _CUT
        try:
            value = decode(text)
        except ValueError:
            return self._searched(sound(without_reasoning(text)))
        try:
            return Parsed(self._fitted(value), None)
        except MisfitError as exc:
            # Text is also an answer where it looks like JSON: 1.50, true, {…}.
            return _refused(exc) if isinstance(self._shape, (Record, Items, Free)) else self._searched(text)

    def _searched(self, text: str) -> Parsed:
        fitting: dict[str, Any] = {}
        fault: MisfitError | None = None
        try:
            for reading in self._shape.readings(text):
                try:
                    value = self._fitted(reading)
                except MisfitError as exc:
                    fault = exc
                else:
                    fitting[json.dumps(value, sort_keys=True)] = value
        except (MisfitError, NoJSONError) as exc:
            return _refused(exc)
        if len(fitting) > 1:
            return Parsed(None, f"holds {len(fitting)} different answers that fit")
        if not fitting and fault is not None:
            return _refused(fault)
        return Parsed(next(iter(fitting.values())), None)

    def _fitted(self, value: Any) -> Any:
        if self._record is None and isinstance(value, dict) and value.keys() == {"value"}:
            # What is no object is wrapped into one, because most providers take only those; this may also be itself.
            if isinstance(self._shape, Free) or (isinstance(self._shape, Record) and "value" in self._shape.shapes):
                with suppress(MisfitError):
                    return self._checked(value)
            value = value["value"]
        return self._checked(value)

    def _checked(self, value: Any) -> Any:
        fitted = self._shape.fit(value)
        try:
            if self._validator.is_valid(fitted):
                return fitted
            why = placed(next(self._validator.iter_errors(fitted)))
        except ValueError as exc:
            # What the validator cannot take.
            why = str(exc)
        raise MisfitError(why)

    def arrays(self, parsed: Sequence[Parsed]) -> list[pa.Array]:
        values = [answer.value for answer in parsed]
        columns = self._record.columns(values) if self._record else [self._shape.array(values)]
        return [*columns, _errors(parsed)]

    def shape_of(self, name: str) -> Shape:
        return self._record.shapes[name] if self._record else self._shape

    def _schema(self, style: ResponseFormat) -> dict[str, Any]:
        document: dict[str, Any] = self._document
        is_object = self._record is not None or document.get("type") == "object"
        return document if is_object or style == "bare" else object_of("value", document)

    def _wish(self) -> str:
        return _in_words(self._document)


_CUT = Parsed(None, "the answer was cut off: raise max_tokens")
_ENDS = ('"', "}", "]", "`")


def _refused(error: ValueError) -> Parsed:
    why = sound(str(error))
    return Parsed(None, why if len(why) <= _LONGEST_ERROR else f"{why[: _LONGEST_ERROR - 1]}…")


def _errors(parsed: Sequence[Parsed]) -> pa.Array:
    return build([answer.error for answer in parsed], pa.string())


def _in_words(schema: Mapping[str, Any]) -> str:
    document = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return (
        "Answer with JSON that fits this JSON Schema, and with nothing else: no prose, no Markdown, not the schema "
        f"itself.\n{document}"
    )
