"""Answers with JSON in them → JSON values. What can be read in two ways is not read.

Three readers, the next where one fails: the JSON of the standard; the near-JSON that models write and that means one
thing (single quotes, trailing commas, bare words, comments, Python's literals); and the library json-repair, whose
result counts only if it holds the text of the answer, all of it and nothing else: the library alone drops what it does
not understand, and closes what was cut.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

LONGEST = 2_000_000
"""Characters of an answer that is read at all."""
_LONGEST_REPAIRED = 4_000
"""Characters that json-repair is given: its time grows with the square."""
_DEEPEST = 100
_MOST_DOCUMENTS = 1000
_MOST_FAILURES = 32
_MOST_REPAIRS = 4
_SHOWN = 60


class NoJSONError(ValueError):
    """Text that is no JSON, or none that can be read surely."""


class BrokenError(NoJSONError):
    """Text that was meant as JSON, and is cut or cannot be read surely."""


class RefusedError(NoJSONError):
    """JSON whose content cannot stand: no other way of reading makes it better."""


def shown(value: Any) -> str:
    """A value, short, for a message."""
    text = repr(value[: _SHOWN + 1]) if isinstance(value, str) else _REPR.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def decode(text: str) -> Any:
    """JSON of the standard.

    Raises:
        NoJSONError, json.JSONDecodeError: it is none; NaN, a number beyond all bounds, a name twice in one object.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise RefusedError("nested too deeply") from None


def documents_in(text: str) -> list[Any]:
    """The objects and lists that a text holds, the outermost ones, in order; what stands around them is prose.

    Raises:
        NoJSONError: there is none; as BrokenError, one is cut or broken, or brackets are left over.

    >>> documents_in("Sure! ```json\\n{'label': positive, score: .5,}\\n``` Anything else?")
    [{'label': 'positive', 'score': 0.5}]
    """
    found: list[Any] = []
    end, failures = 0, 0
    while (opener := _OPENER.search(text, end)) is not None:
        start = opener.start()
        # A closing bracket outside of what was read shows that it was read wrongly: `{"a": "he said "}" to me"}`.
        _refuse_brackets(text[end:start])
        if len(found) >= _MOST_DOCUMENTS or failures >= _MOST_FAILURES:
            raise NoJSONError("too many brackets")
        try:
            value, end = _read(text, start, is_repaired=failures < _MOST_REPAIRS)
            found.append(value)
        except RefusedError:
            raise
        except NoJSONError:
            failures += 1
            end = _end_of_prose(text, start)
    _refuse_brackets(text[end:])
    if not found:
        raise NoJSONError(f"holds no JSON: {shown(text.strip())}")
    return found


def without_reasoning(text: str) -> str:
    """What follows the reasoning, where a model writes it into its answer.

    >>> without_reasoning("<think>positive? no.</think> negative")
    ' negative'
    """
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return text.partition("<think>")[0]


def undecorated(text: str) -> Iterator[str]:
    """A text with less and less around it: a fence, quotes and brackets, Markdown, punctuation.

    >>> list(undecorated("**Yes!**"))[-1]
    'Yes'
    """
    plain = text.strip()
    yield plain
    plain = _FENCE.sub(r"\1", plain).strip()
    yield plain
    plain = _BULLET.sub("", plain)
    yield plain
    yield plain.strip(_QUOTES)
    yield plain.strip(_DECORATION)


def _read(text: str, start: int, *, is_repaired: bool) -> tuple[Any, int]:
    """The object or list that begins at `start`, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        pass
    except RecursionError:
        raise RefusedError("nested too deeply") from None
    try:
        return _read_near_json(text, start)
    except RefusedError:
        raise
    except NoJSONError:
        if not is_repaired:
            raise
        return _repaired(text, start)


def _read_near_json(text: str, start: int) -> tuple[Any, int]:
    pieces: list[str] = []
    depth, position = 0, start
    while depth or not pieces:
        match = _TOKEN.match(text, position)
        if match is None:
            raise NoJSONError("broken")
        position = match.end()
        kind, token = match.lastgroup, match.group()
        if kind == "mark":
            if token in "]}":
                depth -= 1
                if pieces[-1] == ",":
                    pieces.pop()
            elif token in "[{":
                depth += 1
                if depth > _DEEPEST:
                    raise RefusedError(f"nested deeper than {_DEEPEST}")
            pieces.append(token)
        elif kind != "space":
            pieces.append(_WRITERS[kind or ""](token))
    try:
        return _LAX_DECODER.decode(" ".join(pieces)), position
    except json.JSONDecodeError:
        raise NoJSONError("broken") from None


def _repaired(text: str, start: int) -> tuple[Any, int]:
    closer = "}" if text[start] == "{" else "]"
    end = text.rfind(closer, start) + 1
    source = text[start:end]
    # What is cut stays refused: `{"score": 1` may have been 10.
    if not source or any(source.count(left) != source.count(right) for left, right in ("{}", "[]")):
        raise NoJSONError("cut")
    if len(source) > _LONGEST_REPAIRED:
        raise NoJSONError("long")
    from json_repair import repair_json

    try:
        value = repair_json(source, return_objects=True, skip_json_loads=True)
    except (ValueError, RecursionError):
        raise NoJSONError("broken") from None
    leaves = list(_leaves(value))
    if not isinstance(value, (dict, list)) or leaves.count("") > len(_EMPTY.findall(source)):
        raise NoJSONError("broken")
    if any(leaf[-1:] in _CLOSERS or leaf[:1] in _CLOSERS for leaf in leaves if leaf):
        raise NoJSONError("broken")  # `'it's'` is not "it's'"
    if _ink(_ESCAPE.sub(_unescaped, source)) != _ink(" ".join(leaves)):
        raise NoJSONError("broken")
    return value, end


def _end_of_prose(text: str, start: int) -> int:
    """Where brackets end that hold no JSON and do not look like any.

    Raises:
        BrokenError: they look like JSON. Others beside it may be an example, and this one the answer.
    """
    depth = 0
    for bracket in _BRACKET.finditer(text, start):
        depth += 1 if bracket.group() in "[{" else -1
        if depth == 0:
            inside = text[start : bracket.end()]
            if ":" in inside if text[start] == "{" else '"' in inside or "{" in inside:
                raise BrokenError(f"holds broken JSON: {shown(inside)}")
            return bracket.end()
    raise BrokenError(f"ends before its JSON does: {shown(text[start:])}")


def _refuse_brackets(prose: str) -> None:
    if "}" in prose or "]" in prose:
        raise BrokenError(f"brackets do not match: {shown(prose.strip())}")


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _ink(text: str) -> list[str | float]:
    """What a text says, without the marks that JSON is written with."""
    words = _INK.findall(text.casefold().replace("none", "null"))
    return [float(word) if _NUMBER.fullmatch(word) else word for word in words]


def _unescaped(escape: re.Match[str]) -> str:
    code = escape.group(1)
    return chr(int(code, 16)) if code else " "


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise RefusedError(f"{shown(text)} is beyond the range of numbers")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RefusedError(f"a number of {len(text)} digits") from None


def _no_number(name: str) -> None:
    raise RefusedError(f"{name} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((doubled, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise RefusedError(f"{shown(doubled)} stands twice in one object")
    return found


def _quoted(token: str) -> str:
    return f'"{_MEANT.sub(_escaped, token[1:-1])}"'


def _escaped(match: re.Match[str]) -> str:
    code, other = match.groups()
    if code is not None:
        return "\\u00" + code
    if other is None:
        return '\\"' if match.group() == '"' else match.group()
    return other if other == "'" else "\\\\" + other


def _number(token: str) -> str:
    plain = token.removeprefix("+")
    if _NUMBER.fullmatch(plain):
        return plain
    if match := _LOOSE_NUMBER.fullmatch(plain):
        return f"{match[1]}{match[2] or 0}.{match[3] or 0}"
    # 007, 0x10, 1_000, 2026-01-02: text, which the schema may want or not.
    return json.dumps(token)


def _word(token: str) -> str:
    return _LITERALS.get(token.lower()) or json.dumps(token)


# Not repr: it fails on what is nested deeply, and takes its time on what is long.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = _SHOWN
_LITERALS = {
    "true": "true", "false": "false", "null": "null", "none": "null",
    "nan": "NaN", "inf": "Infinity", "infinity": "Infinity", "-inf": "-Infinity", "-infinity": "-Infinity",
}  # fmt: skip
_WRITERS: dict[str, Callable[[str], str]] = {"string": _quoted, "number": _number, "word": _word}
_DECODER = json.JSONDecoder(parse_float=_finite, parse_int=_whole, parse_constant=_no_number, object_pairs_hook=_object)
_LAX_DECODER = json.JSONDecoder(
    strict=False, parse_float=_finite, parse_int=_whole, parse_constant=_no_number, object_pairs_hook=_object
)
_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/|\#[ ][^\n]*)
    |(?P<mark>[][{},:])
    |(?P<string>"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*'|“[^”]*”)
    |(?P<number>[-+]?\.?\d[\w.+-]*)
    |(?P<word>-?[^\W\d][\w-]*)""",
    re.DOTALL | re.VERBOSE,
)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_LOOSE_NUMBER = re.compile(r"(-?)(0|[1-9][0-9]*)?\.([0-9]*)")
_MEANT = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})|\\(?:x([0-9a-fA-F]{2})|(.))|"', re.DOTALL)
_ESCAPE = re.compile(r"\\(?:[bfnrt]|u([0-9a-fA-F]{4}))")
_EMPTY = re.compile(r"\"\"|''|“”")
_INK = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|[^\x00-\x20\s\"'“”‘’\\\[\]{}(),:]")
_CLOSERS = ('"', "'", "“", "”")
_OPENER = re.compile(r"[\[{]")
_BRACKET = re.compile(r"[][{}]")
_FENCE = re.compile(r"^```[^\n`]*\n(.*?)\n?```$", re.DOTALL)
_BULLET = re.compile(r"^[-–—•*>]\s+")
_QUOTES = "\"'`“”‘’„«»‹› \t\r\n"
_DECORATION = _QUOTES + "*_#()[]{}.,;:!?…。，！、？：；"
