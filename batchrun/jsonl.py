"""JSON lines: checked records with their line numbers, and the Arrow types that hold them all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from batchrun.documents import sound
from batchrun.errors import InputError
from batchrun.remote import AnyPath

_EXACT = 2**53
"""Beyond it a float has no room for every whole number."""


class Record(NamedTuple):
    """One line that is not blank."""

    number: int
    """Of the line, counted from 1."""
    text: str
    content: dict[str, Any]


class Inferred(NamedTuple):
    """The columns of a file."""

    schema: pa.Schema
    too_exact: dict[str, tuple[int, int]]
    """Columns with a whole number that no float can hold: the line of the first, and the number."""


def records(lines: Iterable[str], path: AnyPath, first_line: int = 0) -> Iterator[Record]:
    """Every record of a file. `first_line`: the number of lines before these.

    Raises:
        InputError: a line is no JSON object, or one that cannot be carried on; it names the line.
    """
    for number, line in enumerate(lines, first_line + 1):
        if not line.strip():
            continue
        try:
            content = json.loads(
                line, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_without_doubles
            )
            line.encode()
            if "\\ud" in line or "\\uD" in line:
                _refuse_halves(content)
        except (ValueError, RecursionError) as exc:
            raise InputError(f"{path}: line {number}: no valid JSON: {exc}") from None
        if not isinstance(content, dict):
            raise InputError(f'{path}: line {number}: should be an object, such as {{"review": "…"}}')
        yield Record(number, line.strip(), content)


def infer(found: Iterable[Record], path: AnyPath) -> Inferred:
    """The types of all records: JSON has no schema, and the first record need not show every column.

    Raises:
        InputError: two records that no type holds; it names the line of the second.
    """
    types: dict[str, pa.DataType] = {}
    too_exact: dict[str, tuple[int, int]] = {}
    for record in found:
        for name, value in record.content.items():
            try:
                types[name] = _common(types.get(name, pa.null()), _type_of(value))
            except TypeError as exc:
                raise InputError(f"{path}: line {record.number}: column {name!r}: {exc}") from None
            if isinstance(value, int) and abs(value) > _EXACT:
                too_exact.setdefault(name, (record.number, value))
    return Inferred(pa.schema(list(types.items())), too_exact)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond all numbers")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {doubled!r} stands twice")
    return found


def _refuse_halves(value: Any) -> None:
    held = [value]
    while held:
        item = held.pop()
        if isinstance(item, dict):
            held += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            held += item
        elif isinstance(item, str) and item != sound(item):
            raise ValueError("a text or key has half of a surrogate pair")


def _type_of(value: Any) -> pa.DataType:
    """The Arrow type of a JSON value."""
    match value:
        case None:
            return pa.null()
        case bool():
            return pa.bool_()
        case int():
            if not -(2**63) <= value < 2**63:
                raise TypeError(f"{str(value)[:40]} does not fit into 64 bits: write it as text")
            return pa.int64()
        case float():
            return pa.float64()
        case str():
            return pa.string()
        case list():
            items = pa.null()
            for item in value:
                items = _common(items, _type_of(item))
            return pa.list_(items)
        case _:
            return pa.struct([(name, _type_of(item)) for name, item in value.items()])


def _common(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """The type that holds values of both; TypeError if there is none."""
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if {first, second} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(first) and pa.types.is_list(second):
        return pa.list_(_common(first.value_type, second.value_type))
    if pa.types.is_struct(first) and pa.types.is_struct(second):
        fields = {field.name: field.type for field in first}
        for field in second:
            fields[field.name] = _common(fields.get(field.name, pa.null()), field.type)
        return pa.struct(list(fields.items()))
    raise TypeError(f"is {second} here and {first} above: a column has one type")
