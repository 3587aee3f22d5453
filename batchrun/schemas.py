"""A job's JSON Schema: checked, as shapes and columns, and as providers take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from math import isfinite
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from batchrun.documents import sound
from batchrun.errors import JobError
from batchrun.shapes import Boolean, Choice, Free, Integer, Items, Number, Record, Shape, Text
from batchrun.tolerant import shown

if TYPE_CHECKING:
    import jsonschema_rs

_DEEPEST = 64
_MOST_SHAPES = 5000
_SHOWN_PATH = 100


def as_json(part: Any, path: str = "schema", depth: int = 0) -> Any:
    """A schema, or a part of one, as JSON has it: YAML also gives exact decimals, dates and names that are no text.

    Raises:
        JobError: JSON has no such thing.
    """
    if depth > _DEEPEST:
        raise JobError(f"{path[:_SHOWN_PATH]}…: nested deeper than {_DEEPEST}")
    if isinstance(part, Mapping):
        for name in part:
            if not isinstance(name, str):
                raise JobError(f"{path}: {shown(name)} is no text; write it in quotes")
        return {sound(name): as_json(item, f"{path}.{name}", depth + 1) for name, item in part.items()}
    if isinstance(part, (list, tuple)):
        return [as_json(item, f"{path}[{place}]", depth + 1) for place, item in enumerate(part)]
    if isinstance(part, str):
        return sound(part)
    if part is None or isinstance(part, (bool, int)):
        return part
    if isinstance(part, (float, Decimal)) and isfinite(number := float(part)):
        return int(part) if number.is_integer() and abs(number) < 2**63 else number
    raise JobError(f"{path}: {shown(part)} is no JSON; write it in quotes")


def validator_of(schema: dict[str, Any]) -> jsonschema_rs.Validator:
    """What checks values against a schema; of draft 2020-12, if it names no other in `$schema`.

    Raises:
        JobError: it is no JSON Schema, or refers to another document.
    """
    import jsonschema_rs

    try:
        return jsonschema_rs.validator_for(schema, retriever=_not_fetched)
    except jsonschema_rs.ValidationError as exc:
        raise JobError(f"schema: {placed(exc)}") from None
    except ValueError as exc:
        raise JobError(f"schema: {exc}") from None


def _not_fetched(uri: str) -> Any:
    raise ValueError("a $ref leads outside of the schema, and nothing is fetched")


def placed(error: jsonschema_rs.ValidationError) -> str:
    """What is wrong, and where."""
    path = ""
    for step in error.instance_path:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return f"{path}: {error.message}" if path else error.message


def shape_of(schema: Any) -> Shape:
    """The shape of what a valid JSON Schema describes.

    Raises:
        JobError: it has more properties than a table can have columns.
    """
    return _Reader(schema).shape(schema, ())


class _Reader:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._shapes = 0

    def shape(self, schema: Any, trail: tuple[str, ...], *, is_nullable: bool = False, depth: int = 0) -> Shape:
        """The shape of a part of the schema.

        Args:
            trail: the references that led here; one that comes again is a recursion, which no column can hold.
        """
        self._shapes += 1
        if self._shapes > _MOST_SHAPES:
            raise JobError(f"schema: it describes more than {_MOST_SHAPES} columns and fields")
        while isinstance(schema, Mapping) and "$ref" in schema:
            reference = schema["$ref"]
            target = self._target(reference)
            if reference in trail or target is None:
                return Free()
            trail = (*trail, reference)
            schema = {**target, **{name: part for name, part in schema.items() if name != "$ref"}}
        # An $id gives the references below it another root.
        if not isinstance(schema, Mapping) or depth > _DEEPEST or (depth and "$id" in schema):
            return Free()
        # Beside a type they are conditions, which the validator checks.
        if not schema.keys() & {"type", "properties", "enum", "const"}:
            for name in ("anyOf", "oneOf", "allOf"):
                if name in schema:
                    return self._combined(schema, name, trail, is_nullable, depth)
        if "const" in schema or "enum" in schema:
            return _chosen(schema, is_nullable)
        kinds = schema.get("type", "object" if "properties" in schema else [])
        kinds = {kinds} if isinstance(kinds, str) else set(kinds)
        is_nullable = is_nullable or "null" in kinds
        kinds.discard("null")
        if kinds == {"object"} and schema.get("properties"):
            shapes = {name: self.shape(part, trail, depth=depth + 1) for name, part in schema["properties"].items()}
            return Record(shapes, frozenset(schema.get("required", ())), is_nullable=is_nullable)
        if kinds == {"array"} and isinstance(schema.get("items"), Mapping) and "prefixItems" not in schema:
            return Items(self.shape(schema["items"], trail, depth=depth + 1), is_nullable=is_nullable)
        simple = _SIMPLE.get(frozenset(kinds))
        return simple(is_nullable=is_nullable) if simple else Free()

    def _combined(
        self, schema: Mapping[str, Any], name: str, trail: tuple[str, ...], is_nullable: bool, depth: int
    ) -> Shape:
        """One branch beside null, or branches of strings alone; nothing else is one type."""
        branches = schema[name]
        others = [branch for branch in branches if not (isinstance(branch, Mapping) and branch.get("type") == "null")]
        has_null = len(others) < len(branches)
        rest = {key: part for key, part in schema.items() if key != name}
        if len(others) == 1 and isinstance(others[0], Mapping):
            merged = {**rest, **others[0]}
            return self.shape(merged, trail, is_nullable=is_nullable or has_null, depth=depth)
        shapes = [self.shape(branch, trail, depth=depth + 1) for branch in others] if name != "allOf" else []
        if shapes and all(isinstance(shape, Choice) for shape in shapes):
            members = [member for shape in shapes if isinstance(shape, Choice) for member in shape.members]
            has_null = has_null or any(shape.is_nullable for shape in shapes)
            return Choice(list(dict.fromkeys(members)), is_nullable=is_nullable or has_null)
        return Free()

    def _target(self, reference: Any) -> Mapping[str, Any] | None:
        """What `#/…` points at; None for an anchor or another document, which the validator alone follows."""
        if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
            return None
        target = self._root
        for step in unquote(reference[1:]).split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, Sequence) and not isinstance(target, str) and name.isdecimal():
                target = target[int(name)]
            elif isinstance(target, Mapping):
                target = target.get(name)
        return target if isinstance(target, Mapping) else None


def _chosen(schema: Mapping[str, Any], is_nullable: bool) -> Shape:
    values = [schema["const"]] if "const" in schema else schema["enum"]
    others = [value for value in values if value is not None]
    is_nullable = is_nullable or len(others) < len(values)
    kinds = {type(value) for value in others}
    if kinds == {str}:
        return Choice(list(dict.fromkeys(others)), is_nullable=is_nullable)
    names = frozenset({bool: "boolean", int: "integer", float: "number"}.get(kind, "") for kind in kinds)
    simple = _SIMPLE.get(names)
    return simple(is_nullable=is_nullable) if simple else Free()


_SIMPLE: Mapping[frozenset[str], type[Text | Integer | Number | Boolean]] = {
    frozenset({"string"}): Text,
    frozenset({"integer"}): Integer,
    frozenset({"number"}): Number,
    frozenset({"integer", "number"}): Number,
    frozenset({"boolean"}): Boolean,
}


def object_of(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with one property, which references of this property's schema still lead into."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    inner = {key: _moved(part, f"#/properties/{name}") for key, part in schema.items() if key not in definitions}
    return {
        "type": "object",
        "properties": {name: inner},
        "required": [name],
        "additionalProperties": False,
        **{key: _moved(part, f"#/properties/{name}") for key, part in definitions.items()},
    }


def _moved(part: Any, root: str) -> Any:
    if isinstance(part, list):
        return [_moved(item, root) for item in part]
    if not isinstance(part, dict):
        return part
    moved = {name: _moved(item, root) for name, item in part.items()}
    reference = part.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        is_kept = reference.startswith(("#/$defs/", "#/definitions/"))
        moved["$ref"] = reference if is_kept else root + reference[1:]
    return moved


# What OpenAI's strict mode takes: https://platform.openai.com/docs/guides/structured-outputs#supported-schemas
_NOT_STRICT = {
    "allOf", "oneOf", "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "patternProperties",
    "unevaluatedProperties", "propertyNames", "minProperties", "maxProperties", "contains", "prefixItems",
}  # fmt: skip


def is_strict(schema: Mapping[str, Any]) -> bool:
    """True where a provider can hold the answer to the schema strictly: every object is closed and complete."""
    return schema.get("type") == "object" and all(_is_closed(part) for part in _parts(schema))


def _is_closed(schema: Mapping[str, Any]) -> bool:
    if schema.keys() & _NOT_STRICT or not schema.keys() & {"type", "enum", "const", "anyOf", "$ref"}:
        return False
    kinds = schema.get("type")
    if "properties" not in schema and kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        return True
    names = schema.get("properties", {}).keys()
    return schema.get("additionalProperties") is False and set(schema.get("required", ())) == names


def _parts(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A schema and all within it."""
    yield schema
    for name, part in schema.items():
        inner = part.values() if name in {"properties", "$defs", "definitions"} else part if name == "anyOf" else ()
        for item in [*inner, part] if name == "items" else inner:
            if isinstance(item, Mapping):
                yield from _parts(item)
