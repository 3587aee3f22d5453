"""YAML 1.2 text → plain values that remember their lines.

`yes`, `no`, `on`, `16:00` and `007` stay text; a number with a point becomes a Decimal from its text, so that money
is exact; a doubled key, an unknown tag or a document that unfolds without bound is refused.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import Node, ScalarNode, SequenceNode

from batchrun.documents import sound
from batchrun.errors import JobError

_MOST_NODES = 50_000
_MOST_DEPTH = 50
_MOST_CHARACTERS = 5_000_000
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_A_NUMBER = re.compile(r"[-+]?0[0-9]+")
_WORDS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_TAG = "tag:yaml.org,2002:"
_KNOWN_TAGS = {
    _TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "value", "merge")
}

Path = tuple[str | int, ...]


class Document:
    """A YAML document.

    Attributes:
        value: mappings, lists, text, integers, Decimals, booleans and None.
        faults: what is wrong with it as YAML, each with its line.
    """

    def __init__(self, text: str) -> None:
        self.faults: list[str] = []
        self._lines: dict[Path, int] = {}
        self._nodes = 0
        self._characters = 0
        try:
            if len(text) > _MOST_NODES:  # a character begins at most three events: a shorter text cannot have as many
                _refuse_many(text)
            root = YAML(typ="safe", pure=True).compose(text)
        except YAMLError as exc:
            raise JobError(f"no valid YAML: {_reason(exc)}") from exc
        except ValueError as exc:
            raise JobError(f"no valid YAML: {exc}") from exc
        except RecursionError:
            raise JobError("no valid YAML: nested too deeply") from None
        self.value: Any = self._build(root, ()) if root is not None else None

    def line(self, path: Path) -> int | None:
        """The line, counted from 1, of the key or item at a path; of its nearest parent if it has none."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path)

    def _build(self, node: Node, path: Path) -> Any:
        self._nodes += 1
        if self._nodes > _MOST_NODES or len(path) > _MOST_DEPTH:
            raise JobError(
                f"line {node.start_mark.line + 1}: the document unfolds to more than {_MOST_NODES} values "
                f"or {_MOST_DEPTH} levels"
            )
        self._lines.setdefault(path, node.start_mark.line + 1)
        if node.tag and str(node.tag) not in _KNOWN_TAGS and str(node.tag) != "!":
            self.faults.append(f"line {node.start_mark.line + 1}: the tag {node.tag} is not known here: remove it")
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        if isinstance(node, SequenceNode):
            return [self._build(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._mapping(node, path)

    def _mapping(self, node: Node, path: Path) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self.faults.append(f"line {line}: a key must be plain text")
                continue
            key = self._sound(str(key_node.value), line)
            if key == "<<" and key_node.style is None:
                self.faults.append(f"line {line}: merge keys (<<) are not part of YAML 1.2: write the values out")
                continue
            if key in built:
                self.faults.append(f"line {line}: the key {key!r} stands twice: remove one")
                continue
            self._lines[(*path, key)] = line
            built[key] = self._build(value_node, (*path, key))
        return built

    def _sound(self, text: str, line: int) -> str:
        """Text that UTF-8 can carry; JSON writes an emoji as two halves, which belong together."""
        self._characters += len(text)
        if self._characters > _MOST_CHARACTERS:
            raise JobError(f"line {line}: the document unfolds to more than {_MOST_CHARACTERS} characters")
        whole = sound(text)
        if "\ufffd" in whole and "\ufffd" not in text:
            self.faults.append(f"line {line}: a text has half of a surrogate pair, which no UTF-8 can carry")
        return whole

    def _scalar(self, node: ScalarNode) -> Any:
        text = self._sound(str(node.value), node.start_mark.line + 1)
        if node.style is not None:
            return text
        if node.tag == f"{_TAG}str":
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text) and len(text) < 100:
            return int(text)
        if _DECIMAL.fullmatch(text) and not _NOT_A_NUMBER.fullmatch(text) and len(text) < 100:
            try:
                return Decimal(text)
            except InvalidOperation:
                return text  # an exponent beyond all numbers
        return text


def _refuse_many(text: str) -> None:
    """Before a tree is built of them."""
    for number, _ in enumerate(YAML(typ="safe", pure=True).parse(text)):
        if number > 3 * _MOST_NODES:
            raise JobError(f"it holds more than {_MOST_NODES} values: put data into the input")


def _reason(exc: YAMLError) -> str:
    mark = getattr(exc, "problem_mark", None)
    problem = getattr(exc, "problem", None) or str(exc).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark is not None else str(problem)
