"""Shapes of values: the type of their column, how what a model wrote becomes one of them, and arrays of them."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import pyarrow as pa

from batchrun.columns import build
from batchrun.documents import sound
from batchrun.errors import JobError
from batchrun.labels import Labels, NoLabelError
from batchrun.tolerant import NoJSONError, decode, documents_in, shown, undecorated

_DEEPEST = 64
_EXACT = 2**53
"""Up to here every whole number is a double."""


class MisfitError(ValueError):
    """A value that does not fit, and where it stands."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.path = ""

    def at(self, place: str | int) -> MisfitError:
        """The same, seen from one level further out."""
        step = f"[{place}]" if isinstance(place, int) else place
        self.path = step + ("." if self.path and self.path[0] != "[" else "") + self.path
        return self

    def __str__(self) -> str:
        return f"{self.path}: {self.args[0]}" if self.path else str(self.args[0])


class Shape(ABC):
    """What a schema says of one value.

    Attributes:
        type: of its column.
        noun: what it is called in a message.
        is_nullable: null is a value.
    """

    type: pa.DataType
    noun: ClassVar[str]

    def __init__(self, *, is_nullable: bool) -> None:
        self.is_nullable = is_nullable

    @abstractmethod
    def fit(self, value: Any) -> Any:
        """A value as the column wants it, repaired where it can mean one thing only.

        Raises:
            MisfitError: it does not fit.
        """

    def readings(self, text: str) -> list[Any]:
        """What an answer that is no JSON may mean, each to be fitted.

        Raises:
            NoJSONError, MisfitError: nothing.
        """
        return documents_in(text)

    def array(self, values: Sequence[Any]) -> pa.Array:
        """A column of values that fit, or None."""
        return build(values, self.type)

    def misfit(self, value: Any) -> MisfitError:
        """The error for a value of another kind."""
        return MisfitError("is null" if value is None else f"{shown(value)} is no {self.noun}")

    def _is_null(self, value: Any) -> bool:
        if not self.is_nullable:
            return False
        return value is None or (isinstance(value, str) and value.strip().lower() in {"", "null", "none"})


class Text(Shape):
    """A string; a whole number is taken as its digits."""

    type = pa.string()
    noun = "text"

    def fit(self, value: Any) -> Any:
        if type(value) is str:
            return sound(value)
        if type(value) is int:
            return str(value)
        if value is None and self.is_nullable:
            return None
        raise self.misfit(value)

    def readings(self, text: str) -> list[Any]:
        return [list(undecorated(text))[1]]


class Choice(Shape):
    """One of several strings, in any case."""

    type = pa.dictionary(pa.int32(), pa.string())
    noun = "choice"

    def __init__(self, members: Sequence[str], *, is_nullable: bool) -> None:
        super().__init__(is_nullable=is_nullable)
        self.members = tuple(sound(member) for member in members)
        self._places = {member: place for place, member in enumerate(self.members)}
        self._names = build(self.members, pa.string())
        self._labels: Labels | None = None
        # Members that differ in case alone, or blank ones, are taken only as they are written.
        with suppress(JobError):
            self._labels = Labels(self.members)

    def fit(self, value: Any) -> Any:
        if type(value) is str and value in self._places:
            return value
        if isinstance(value, (str, int)):
            text = value if isinstance(value, str) else json.dumps(value)
            member = text if text in self._places else self._labels and self._labels.alike(text)
            if member is not None:
                return member
        if self._is_null(value):
            return None
        if value is None:
            raise self.misfit(value)
        raise MisfitError(f"{shown(value)} is none of {shown(list(self.members))}")

    def readings(self, text: str) -> list[Any]:
        if self._labels is None:
            return _undressed(text)
        try:
            return [self._labels.find(text)]
        except NoLabelError as exc:
            raise MisfitError(str(exc)) from None

    def array(self, values: Sequence[Any]) -> pa.Array:
        places = build([None if value is None else self._places[value] for value in values], pa.int32())
        return pa.DictionaryArray.from_arrays(places, self._names)


class Scalar(Shape):
    """A value that may be the whole answer without being JSON."""

    def readings(self, text: str) -> list[Any]:
        return _undressed(text)


class Integer(Scalar):
    """A whole number of 64 bits; also as text, also as 3.0."""

    type = pa.int64()
    noun = "whole number"

    def fit(self, value: Any) -> Any:
        if type(value) is not int:
            if self._is_null(value):
                return None
            value = self._whole(value)
        if not -(2**63) <= value < 2**63:
            raise MisfitError(f"{shown(value)} is beyond 64 bits")
        return value

    def _whole(self, value: Any) -> int:
        number = value
        if isinstance(value, str):
            if _DIGITS.fullmatch(value):
                return int(value)
            number = _number_of(value)
        if isinstance(number, float) and number.is_integer() and abs(number) <= _EXACT:
            return int(number)
        raise self.misfit(value)


class Number(Scalar):
    """A double; also as text."""

    type = pa.float64()
    noun = "number"

    def fit(self, value: Any) -> Any:
        if type(value) is float:
            return value
        if self._is_null(value):
            return None
        number: Any = _number_of(value) if isinstance(value, str) else value
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            try:
                return float(number)
            except OverflowError:
                raise MisfitError(f"{shown(value)} is beyond the range of a double") from None
        raise self.misfit(value)


class Boolean(Scalar):
    """true or false, also as text; not yes or no, which are words."""

    type = pa.bool_()
    noun = "true or false"

    def fit(self, value: Any) -> Any:
        if type(value) is bool:
            return value
        if isinstance(value, str) and value.strip().lower() in {"true", "false"}:
            return value.strip().lower() == "true"
        if self._is_null(value):
            return None
        raise self.misfit(value)


class Items(Shape):
    """A list of one shape; also as JSON text."""

    noun = "list"

    def __init__(self, item: Shape, *, is_nullable: bool) -> None:
        super().__init__(is_nullable=is_nullable)
        self._item = item
        self.type = pa.list_(item.type)

    def fit(self, value: Any) -> Any:
        if isinstance(value, str):
            value = _inner(value, self)
        if value is None and self.is_nullable:
            return None
        if type(value) is not list:
            raise self.misfit(value)
        fit = self._item.fit
        place = 0
        try:
            for place, item in enumerate(value):
                value[place] = fit(item)
        except MisfitError as exc:
            raise exc.at(place) from None
        return value

    def array(self, values: Sequence[Any]) -> pa.Array:
        lengths = [0]
        for value in values:
            lengths.append(lengths[-1] + len(value or ()))
        items = self._item.array([item for value in values for item in value or ()])
        return pa.ListArray.from_arrays(build(lengths, pa.int32()), items, type=self.type, mask=_nulls(values))


class Record(Shape):
    """An object with properties; also as JSON text, or alone in a list."""

    noun = "object"

    def __init__(self, shapes: Mapping[str, Shape], required: frozenset[str], *, is_nullable: bool) -> None:
        super().__init__(is_nullable=is_nullable)
        self.shapes = shapes
        self._fits = [(name, shape.fit) for name, shape in shapes.items()]
        self._optional = {name for name, shape in shapes.items() if name not in required and not shape.is_nullable}
        self._names = {name.casefold(): name for name in reversed(list(shapes))}
        self.type = pa.struct([pa.field(name, shape.type) for name, shape in shapes.items()])

    def fit(self, value: Any) -> Any:
        if isinstance(value, str):
            value = _inner(value, self)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None and self.is_nullable:
            return None
        if type(value) is not dict:
            raise self.misfit(value)
        if not value.keys() <= self.shapes.keys():
            value = self._renamed(value)
        name = ""
        try:
            for name, fit in self._fits:
                if name in value:
                    if value[name] is None and name in self._optional:
                        # Models write null for what they leave out.
                        del value[name]
                    else:
                        value[name] = fit(value[name])
        except MisfitError as exc:
            raise exc.at(name) from None
        return value

    def array(self, values: Sequence[Any]) -> pa.Array:
        return pa.StructArray.from_arrays(self.columns(values), fields=list(self.type), mask=_nulls(values))

    def columns(self, values: Sequence[Any]) -> list[pa.Array]:
        """One array for each property; what a value lacks is null."""
        rows = [value or {} for value in values]
        return [shape.array([row.get(name) for row in rows]) for name, shape in self.shapes.items()]

    def _renamed(self, value: dict[str, Any]) -> dict[str, Any]:
        """Names in another case as the schema writes them; values of unknown names made safe."""
        found: dict[str, Any] = {}
        for name, item in value.items():
            known = name if name in self.shapes else self._names.get(name.casefold(), name)
            if known != name and known in value:
                known = name
            if known in found:
                raise MisfitError(f"{shown(known)} stands twice in one object")
            found[sound(known)] = item if known in self.shapes else _plain(item)
        return found


class Free(Shape):
    """Anything else; its column holds JSON text."""

    type = pa.string()
    noun = "JSON"

    def __init__(self) -> None:
        super().__init__(is_nullable=True)

    def fit(self, value: Any) -> Any:
        return _plain(value)

    def array(self, values: Sequence[Any]) -> pa.Array:
        return build([None if value is None else json.dumps(value, ensure_ascii=False) for value in values], self.type)


_DIGITS = re.compile(r"\s*[-+]?[0-9]{1,4000}\s*")
_NUMERAL = re.compile(r"\s*[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\s*")


def _number_of(text: str) -> float | None:
    """The number that a text is; not 1,000, which is another one in every second country."""
    number = float(text) if _NUMERAL.fullmatch(text) else None
    return number if number is not None and abs(number) != float("inf") else None


def _inner(text: str, shape: Shape) -> Any:
    """The JSON that stands in a JSON string."""
    try:
        return decode(text)
    except ValueError:
        pass
    try:
        found = documents_in(text)
    except NoJSONError:
        raise shape.misfit(text) from None
    if len(found) != 1:
        raise shape.misfit(text)
    return found[0]


def _undressed(text: str) -> list[Any]:
    """The objects in a text, else the text itself without what stands around it."""
    return documents_in(text) if "{" in text else [list(undecorated(text))[-1]]


def _plain(value: Any, depth: int = 0) -> Any:
    """A value of no shape: bounded, and of text that UTF-8 can carry."""
    if isinstance(value, str):
        return sound(value)
    if depth > _DEEPEST:
        raise MisfitError(f"nested deeper than {_DEEPEST}")
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {sound(name): _plain(item, depth + 1) for name, item in value.items()}
    return value


def _nulls(values: Sequence[Any]) -> pa.Array | None:
    return build([value is None for value in values], pa.bool_()) if None in values else None
