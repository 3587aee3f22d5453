"""Jinja templates that can do no harm: no escape, bounded time and memory, and only text ends up in a prompt.

A template is the user's program, often copied from somewhere, and it runs over rows that anybody may have written.
"""

from __future__ import annotations

import json
import re
from collections.abc import (
    Callable,
    Collection,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from datetime import date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from functools import wraps
from typing import Any
from uuid import UUID

from jinja2 import StrictUndefined, Undefined, meta, nodes, pass_context
from jinja2.environment import TemplateExpression
from jinja2.exceptions import SecurityError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MOST_STEPS = 1_000_000
_MOST_TEXT = 10_000_000
"""Characters that an operation may make; what a column holds may be longer."""
_MOST_ITEMS = 1_000_000
_MOST_BITS = 10_000
_MOST_NUMBER = 10_000
"""For widths, counts and places."""
MOST_OUTPUT = 100_000_000
"""Characters that a row's templates may write together."""
_PRINTF_WIDTH = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(?:\d{0,3}\.)?(?:\*|\d{4,})")
_BRACE_WIDTH = re.compile(r"\{[^{}]*:[^{}]*\d{4,}")
_PLAIN = (str, int, float, bool, Decimal, date, datetime, time, timedelta, bytes, UUID, range, tzinfo)
_VIEWS = (KeysView, ValuesView, ItemsView)
_SIZED = {"center", "batch", "slice", "round"}
_TAKES_NULL = {"default", "d", "tojson", "int", "float"}
_OTHER_TEMPLATES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class NullError(Exception):
    """A null would become text."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one job's templates.

    Args:
        columns: their names come before those of Jinja's own functions.
        to_json: what JSON has no word for, as something that it has.
    """

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, columns: Collection[str], to_json: Callable[[Any], Any]) -> None:
        super().__init__(
            undefined=StrictUndefined, autoescape=False, finalize=_finalize, keep_trailing_newline=True,
            optimized=False,
        )  # fmt: skip
        # What differs from one rendering to the next would give a row a new key each time, and have it paid for again.
        del self.filters["random"], self.globals["lipsum"]
        self._has_self = "self" in columns
        for name in columns:
            self.globals.pop(name, None)
        self.steps = 0
        self.written = 0
        for name, function in list(self.filters.items()):
            if name not in _TAKES_NULL:
                self.filters[name] = _guarded(name, function, self.step)

        def tojson(value: Any, indent: int | None = None) -> str:
            _check_numbers([100 * (indent or 0)])
            return json.dumps(value, ensure_ascii=False, default=to_json, indent=indent)

        self.filters["tojson"] = tojson
        self.filters[_COUNTED] = self._counted
        self.filters[_JOINED] = _joined

    def begin(self) -> None:
        """One row's template is about to be rendered."""
        self.steps = self.written = 0

    def step(self, number: int = 1) -> None:
        """Turns of a loop, calls, or items that a filter goes through.

        Raises:
            SecurityError: there were too many in this rendering.
        """
        self.steps += number
        if self.steps > _MOST_STEPS:
            raise SecurityError(f"it takes more than {_MOST_STEPS} steps")

    def _prepare(self, text: str) -> tuple[nodes.Template, set[str]]:
        """A template's tree, its loops counted, and the names that it takes from the row.

        Raises:
            TemplateSyntaxError: it does not parse, or uses what is not there.
        """
        tree = self.parse(text)
        for node in tree.find_all(_OTHER_TEMPLATES):
            raise TemplateSyntaxError("a prompt cannot include or extend other templates", node.lineno)
        for known, kind, what in ((self.filters, nodes.Filter, "filter"), (self.tests, nodes.Test, "test")):
            for used in tree.find_all(kind):
                if used.name not in known:
                    raise TemplateSyntaxError(f"there is no {what} {used.name!r}", used.lineno)
        if self._has_self:
            for name in tree.find_all(nodes.Name):
                if name.name == "self":
                    raise TemplateSyntaxError("`self` is a word of Jinja's own: write {{ row['self'] }}", name.lineno)
        names = meta.find_undeclared_variables(tree)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno, environment=self)
        for joined in list(tree.find_all(nodes.Concat)):
            parts = nodes.List(joined.nodes, lineno=joined.lineno, environment=self)
            joined.nodes = [nodes.Filter(parts, _JOINED, [], [], None, None, lineno=joined.lineno, environment=self)]
        return tree, names

    def text_of(self, text: str) -> tuple[Callable[[Mapping[str, Any]], str], set[str]]:
        """A function row → text, and the names that it takes from the row.

        Raises:
            TemplateSyntaxError: it does not parse, or uses what is not there.
        """
        tree, names = self._prepare(text)
        return self._filling_of(tree) or self.from_string(tree).render, names

    def _filling_of(self, tree: nodes.Template) -> Filling | None:
        parts: list[tuple[bool, str]] = []
        for output in tree.body:
            for node in output.nodes if isinstance(output, nodes.Output) else [output]:
                if isinstance(node, nodes.TemplateData):
                    parts.append((False, node.data))
                elif isinstance(node, nodes.Name) and node.name not in self.globals:
                    parts.append((True, node.name))
                else:
                    return None
        return Filling(parts, self._count)

    def _count(self, value: Any) -> None:
        """Something is written."""
        self.written += len(value) if isinstance(value, (str, bytes, list, dict, tuple)) else 1
        _check_size(self.written, MOST_OUTPUT)

    def value_of(self, text: str) -> Callable[[Mapping[str, Any]], Any] | None:
        """A function row → value, for a text that is one expression and nothing else; else None."""
        tree, _ = self._prepare(text.strip())
        output = tree.body[0] if len(tree.body) == 1 else None
        if not isinstance(output, nodes.Output) or len(output.nodes) != 1:
            return None
        if isinstance(output.nodes[0], nodes.TemplateData):
            return None
        result = nodes.Assign(nodes.Name("result", "store", lineno=1), output.nodes[0], lineno=1)
        whole = nodes.Template([result], lineno=1)
        whole.set_environment(self)
        return TemplateExpression(self.from_string(whole), undefined_to_none=False)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call inside of a template."""
        self.step()
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps `str.format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes)):
            _check_method(owner, getattr(method, "__name__", ""), args, kwargs)
        return _checked(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operation inside of a template, its result bounded before it is made."""
        match operator:
            case "*":
                _check_product(left, right)
            case "**":
                _check_power(left, right)
            case "+" if isinstance(left, str) and isinstance(right, str):
                _check_size(len(left) + len(right), MOST_OUTPUT)
            case "+" if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
                self.step(len(left) + len(right))
            case "%" if isinstance(left, str):
                values = right.values() if isinstance(right, Mapping) else right
                _check_format(left, values if isinstance(right, (tuple, Mapping)) else (right,))
        return _checked(super().call_binop(context, operator, left, right))

    def _counted(self, items: Any) -> Iterator[Any]:
        if items is None:
            raise NullError
        for item in items:
            self.step()
            yield item


class Filling:
    """What a template of nothing but text and names does, without the machinery that Jinja needs for more.

    Attributes:
        names: those that it takes from the row, each as often as it stands there.
        text: the rest of it.

    Args:
        parts: in order, each a name or a text.
        count: called with every value.
    """

    def __init__(self, parts: Sequence[tuple[bool, str]], count: Callable[[Any], None]) -> None:
        self._texts = [part for _, part in parts]
        self._names = [(place, part) for place, (is_name, part) in enumerate(parts) if is_name]
        self._count = count
        self.names = [name for _, name in self._names]
        self.text = "".join(part for is_name, part in parts if not is_name)

    def __call__(self, row: Mapping[str, Any]) -> str:
        texts = self._texts.copy()
        for place, name in self._names:
            if name not in row:
                raise UndefinedError(f"{name!r} is undefined")
            value = row[name]
            self._count(value)
            texts[place] = value if type(value) is str else str(_text(value))
        return "".join(texts)


_COUNTED = "batchrun counted"
_JOINED = "batchrun joined"


@pass_context  # which also keeps Jinja from working outputs out when it compiles them
def _finalize(context: Any, value: Any) -> Any:
    context.environment._count(value)
    return _text(value)


def _text(value: Any) -> Any:
    """A value that has a text form, the same one each time.

    Raises:
        NullError: it is null.
        SecurityError: it is a function or the like, whose text form is an address in this process.
    """
    if value is None:
        raise NullError
    if isinstance(value, Undefined):
        str(value)  # raises, naming what is undefined
    if not isinstance(value, _PLAIN):
        _check_plain(value)
    return value


def _check_plain(value: Any) -> None:
    left = _MOST_ITEMS
    held = [value]
    while held:
        item = held.pop()
        left -= 1
        if left < 0:
            raise SecurityError(f"a list of more than {_MOST_ITEMS} items cannot be shown")
        if isinstance(item, Undefined):
            str(item)
        elif isinstance(item, Mapping):
            held += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset, *_VIEWS)):
            held += item
        elif item is not None and not isinstance(item, _PLAIN):
            kind = type(item).__name__
            mend = ": add |list or |join" if kind == "generator" else ""
            raise SecurityError(f"a {kind} is no text{mend}")


# --- bounds -------------------------------------------------------------------------------------------------


def _joined(parts: list[Any]) -> str:
    """What stands between `~`."""
    texts = [str(_text(part)) for part in parts]
    _check_size(sum(map(len, texts)), MOST_OUTPUT)
    return "".join(texts)


def _checked(value: Any) -> Any:
    """A result, before it is used again: what doubles with each turn is stopped in time."""
    if isinstance(value, (str, bytes)):
        _check_size(len(value), MOST_OUTPUT)
    return value


def _check_size(size: int, most: int = _MOST_TEXT) -> None:
    if size > most:
        raise SecurityError(f"it makes a text of more than {most} characters")


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MOST_NUMBER:
            raise SecurityError(f"a number of more than {_MOST_NUMBER} where a width or a count is meant")


def _check_product(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, int) and isinstance(times, int):
            if value.bit_length() + times.bit_length() > _MOST_BITS:
                raise SecurityError("it makes a number beyond all bounds")
        elif isinstance(value, (str, bytes)) and isinstance(times, int):
            _check_size(len(value) * times)
        elif isinstance(value, (list, tuple)) and isinstance(times, int) and len(value) * times > _MOST_ITEMS:
            raise SecurityError(f"it makes a list of more than {_MOST_ITEMS} items")


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MOST_BITS:
        raise SecurityError("it makes a number beyond all bounds")


def _check_format(text: str, values: Iterable[Any]) -> None:
    """A format of printf or of `str.format`: no nulls, no width that fills the memory."""
    if _PRINTF_WIDTH.search(text.replace("%%", "")) or _BRACE_WIDTH.search(text):
        raise SecurityError("a format has a width of more than 999, or takes it from a value")
    for value in values:
        _text(value)


def _check_method(owner: str | bytes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    values = [*args, *kwargs.values()]
    if name in ("format", "format_map"):
        assert isinstance(owner, str)
        is_nested = re.search(r"\{[^}]*\{", owner) is not None
        _check_format(owner, values)
        if is_nested:
            _check_numbers(values)
    elif name == "join":
        _check_join(owner, args)
    elif name == "replace":
        _check_replace(owner, args)
    elif name == "translate":
        longest = max((len(text) for item in args for text in item.values() if isinstance(text, str)), default=1)
        _check_size(len(owner) * longest)
    elif name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        _check_numbers(values)


def _check_join(separator: Any, args: tuple[Any, ...]) -> None:
    items = args[0] if args else ()
    if isinstance(items, (list, tuple)):
        _check_size(sum(len(item) for item in items if isinstance(item, str)) + len(items) * len(separator))


def _check_replace(text: Any, args: tuple[Any, ...]) -> None:
    if isinstance(text, str) and len(args) >= 2 and all(isinstance(part, str) for part in args[:2]):
        times = text.count(args[0])
        _check_size(times * len(args[1]))


def _guarded(name: str, function: Callable[..., Any], step: Callable[[int], None]) -> Callable[..., Any]:
    """A filter that makes no text of null, and nothing too big; `step` is told how many items it goes through."""
    before = int(hasattr(function, "jinja_pass_arg"))  # a context comes first

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        value, *others = args[before:]
        if value is None:
            raise NullError
        if isinstance(value, (list, tuple, range)):
            step(len(value))
        if name == "join":
            if not isinstance(value, (str, Mapping)):
                value = [_text(item) for item in value]
            separator = others[0] if others else kwargs.get("d", "")
            _text(separator)
            step(len(value))
            _check_join(separator if isinstance(separator, str) else "", (value,))
        elif name == "replace":
            parts = [*others, *kwargs.values()]
            for part in parts[:2]:
                _text(part)
            _check_replace(value, tuple(parts))
        elif name == "format":
            _check_format(str(value), [*others, *kwargs.values()])
        elif name == "string":
            _text(value)
        elif name == "indent" and isinstance(value, str):
            _check_numbers([*others, *kwargs.values()])
            width = others[0] if others else kwargs.get("width", 4)
            _check_size(len(value) + value.count("\n") * (width if isinstance(width, int) else len(str(width))))
        elif name in _SIZED:
            _check_numbers([*others, *kwargs.values()])
        return _checked(function(*args[:before], value, *others, **kwargs))

    return guarded
