"""Row → request: Jinja2 templates over the row's columns, sandboxed and strict. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from hashlib import blake2b
from typing import Any, NamedTuple
from uuid import UUID

import pyarrow as pa
from jinja2 import TemplateError, Undefined
from jinja2.exceptions import SecurityError, TemplateSyntaxError, UndefinedError

from batchrun.errors import JobError, listed
from batchrun.form import Form, escaped, filled, has_holes, text_hole, value_hole
from batchrun.job import Job
from batchrun.providers import Endpoint
from batchrun.records import Request, Slot
from batchrun.sandbox import MOST_OUTPUT, Filling, NullError, Sandbox
from batchrun.settings import PromptSetting
from batchrun.structure import Structure
from batchrun.wire import inline_media, is_self_contained, most_completion_tokens, request_body, stream_fields


class NotRenderedError(Exception):
    """This row gives no request; the message says why. The row fails, and costs nothing."""


_NO_JSON = (ValueError, TypeError, RecursionError, MemoryError)
"""What is raised for what JSON cannot carry."""
_HALF_A_PAIR = "the prompt has half of a surrogate pair, which no UTF-8 can carry"
_Renderer = Callable[[Mapping[str, Any]], Any]


class _Shape(NamedTuple):
    """What bounds the cost of a request."""

    messages: int
    most_completion_tokens: int | None
    is_self_contained: bool
    media: int


class _Requests:
    """Bodies of requests, with holes for the values of a row: how they are keyed, sent and bounded."""

    def __init__(self, body: dict[str, Any], endpoint: Endpoint, stream: dict[str, Any]) -> None:
        self._body = body
        self._canonical = Form([endpoint.identity, body], _encode_canonical)
        self._wire = Form(body | stream, _encode_wire)
        contents = [message.get("content") for message in body["messages"]]
        is_fixed = all(isinstance(content, str) for content in contents)
        is_fixed = is_fixed and not any(
            has_holes(value) for name, value in body.items() if name not in ("messages", "system")
        )
        self._shape = _shape_of(body) if is_fixed else None

    @property
    def is_alike(self) -> bool:
        """True if what bounds the cost is the same in every row."""
        return self._shape is not None

    def request(self, slot: Slot, values: Sequence[Any], *, keyed: bool) -> Request:
        """The request of a row.

        Raises:
            NotRenderedError: it cannot be sent.
        """
        try:
            texts = escaped(values)
            wire = self._wire.json(values, texts)
            canonical = self._canonical.json(values, texts) if keyed else b""
        except UnicodeEncodeError:
            raise NotRenderedError(_HALF_A_PAIR) from None
        except _NO_JSON as exc:
            raise NotRenderedError(f"a parameter cannot be sent as JSON: {exc}") from None
        shape = self._shape or _shape_of(filled(self._body, values))
        return Request(slot, _key(canonical) if keyed else "", wire, 0, *shape)


class Template:
    """A job's prompt and parameters, compiled once.

    Attributes:
        model: as requests call it.
        columns: the columns that the templates use; what else a row has need not be read.

    Raises:
        JobError: a template that does not parse, or all the columns that it names and the input lacks.
    """

    def __init__(
        self, job: Job, columns: Sequence[str], endpoint: Endpoint, model: str, structure: Structure | None = None
    ) -> None:
        self._sandbox = Sandbox(columns, plain_json)
        self._available = list(columns)
        self._used: set[str] = set()
        self._unknown: dict[str, str] = {}
        self._faults: list[str] = []
        self._endpoint = endpoint
        self.model = model
        self._renders: list[_Renderer] = []
        """What gives the values for the holes in the messages and parameters."""
        self._fillings: list[Filling] = []
        """Those of them that are nothing but text and columns."""
        prompt = job.prompt or _default_prompt(columns)
        self._messages_column = prompt.messages_column
        self._messages: list[dict[str, Any]] = []
        if prompt.messages_column is not None:
            if prompt.messages_column not in columns:
                self._unknown[prompt.messages_column] = "prompt.messages_column"
            self._used.add(prompt.messages_column)
        elif prompt.messages is not None:
            self._messages = self._compile(prompt.messages, "prompt.messages")
        else:
            for role, text in (("system", prompt.system), ("user", prompt.user)):
                if text is not None:
                    # A YAML block ends with a line end that nobody means to send.
                    content = self._compile(text.removesuffix("\n"), f"prompt.{role}")
                    self._messages.append({"role": role, "content": content})
        self._parameters = self._compile(job.parameters, "parameters", keeps_type=True)
        self._instruction = self._reminder = None
        if structure is not None:
            is_ours = "response_format" not in job.parameters
            style = endpoint.response_format if is_ours else None
            self._reminder = structure.reminder(style)
            if is_ours:
                self._instruction = structure.instruction(style)
            if style is not None:
                self._parameters["response_format"] = structure.document(style)
        self._messages = self._instructed(self._messages) if prompt.messages_column is None else []
        self._stream = stream_fields(endpoint.include_usage) if job.stream else {}
        if self._unknown:
            named = ", ".join(f"{name!r} ({place})" for name, place in self._unknown.items())
            self._faults.append(f"no such column: {named}; the columns are {listed(columns)}")
        if self._faults:
            raise JobError("\n".join(["the prompt does not fit the input:", *(f"  {fault}" for fault in self._faults)]))
        self.columns = [name for name in columns if name in self._used]
        self._compiled: _Requests | None = None
        # A text that is never blank need not be looked at in every row.
        least = [render.text if isinstance(render, Filling) else "" for render in self._renders]
        asked = _asked(self._messages)
        self._asked = asked if all(_is_blank(filled(content, least)) for content in asked) else []
        """What may be blank in a row."""
        if prompt.messages_column is None and not any(has_holes(message.get("role")) for message in self._messages):
            try:
                self._compiled = self._requests(self._messages)
            except NotRenderedError as exc:
                raise JobError(f"prompt and parameters: {exc}") from None

    def request(self, row_index: int, row: Mapping[str, Any], *, keyed: bool = True) -> Request:
        """The request of a row; its key covers everything that changes the answer.

        Args:
            keyed: False leaves the key empty, where it is only to be seen whether there is a request.

        Raises:
            NotRenderedError: the row gives no request.
        """
        values = self._values(row)
        if self._compiled is not None:
            _refuse_blank(self._asked, values)
            return self._compiled.request(Slot(row_index, self.model), values, keyed=keyed)
        # Where the roles come from the row, so does the form of the request.
        requests = self._requests(self._conversation(row, values))
        return requests.request(Slot(row_index, self.model), values, keyed=keyed)

    def repaired(self, request: Request, text: str | None, error: str) -> Request:
        """The request that asks again for an answer that does not fit, with what was wrong.

        Args:
            text: the answer.
        """
        document = json.loads(request.body)
        said = text if text and text.strip() else "(nothing)"
        document["messages"] += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": f"That does not fit: {error}. {self._reminder}"},
        ]
        asked = {name: value for name, value in document.items() if name not in self._stream}
        canonical = _encode_canonical([self._endpoint.identity, asked]).encode()
        return request._replace(
            body=_encode_wire(document).encode(),
            messages=request.messages + 2,
            repair=request.repair + 1,
            repair_key=_key(canonical),
        )

    def never_fails(self, rows: pa.RecordBatch) -> bool:
        """True if each of these rows surely gives a request, all of one shape.

        It is seen from whole columns. False means that the rows must be looked at one by one.
        """
        if self._compiled is None or not self._compiled.is_alike or len(self._fillings) < len(self._renders):
            return False
        names = {name for filling in self._fillings for name in filling.names}
        columns = {name: rows.column(name) for name in names}
        written = sum(columns[name].nbytes for filling in self._fillings for name in filling.names)
        if written > MOST_OUTPUT or not all(map(_always_has_text, columns.values())):
            return False
        if not self._asked:
            return True
        shown = {name for name in names if not _has_blank(columns[name])}
        try:
            _refuse_blank(self._asked, [filling.text + "x" * (not shown.isdisjoint(filling.names))
                                        for filling in self._fillings])  # fmt: skip
        except NotRenderedError:
            return False
        return True

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rendered conversation of a row."""
        return self._conversation(row, self._values(row))

    def _requests(self, messages: Sequence[Mapping[str, Any]]) -> _Requests:
        body = request_body(self.model, messages, self._parameters, system=self._endpoint.system)
        try:
            return _Requests(body, self._endpoint, self._stream)
        except UnicodeEncodeError:
            raise NotRenderedError(_HALF_A_PAIR) from None
        except _NO_JSON as exc:
            raise NotRenderedError(f"it cannot be sent as JSON: {exc}") from None

    def _conversation(self, row: Mapping[str, Any], values: Sequence[Any]) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]]
        if self._messages_column is None:
            messages = filled(self._messages, values)
            _refuse_blank(_asked(messages), values)
            return messages
        try:
            messages = _conversation(row.get(self._messages_column), self._messages_column)
            _refuse_blank(_asked(messages), values)
            messages = self._instructed(messages)
        except RecursionError:
            raise NotRenderedError(f"the column {self._messages_column} is nested too deeply") from None
        return messages

    def _instructed(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the words that tell the form of the answer, at the end of what the system says."""
        if self._instruction is None:
            return messages
        first = messages[0] if messages else {}
        if first.get("role") == "system" and isinstance(first.get("content"), str):
            return [{**first, "content": f"{first['content']}\n\n{self._instruction}"}, *messages[1:]]
        return [{"role": "system", "content": self._instruction}, *messages]

    def _values(self, row: Mapping[str, Any]) -> list[Any]:
        """What goes into the holes."""
        self._sandbox.begin()
        try:
            return [render(row) for render in self._renders]
        except NullError:
            nulls = [name for name in self.columns if row.get(name) is None]
            where = f"null in this row: {', '.join(nulls)}" if nulls else "a null inside a column"
            name = nulls[0] if len(nulls) == 1 else "column"
            mend = f"{{{{ {name if name.isidentifier() else f'row[{name!r}]'} or '' }}}}"
            raise NotRenderedError(f"the prompt would show a null ({where}); write {mend}") from None
        except (UndefinedError, SecurityError) as exc:
            raise NotRenderedError(f"the prompt cannot be rendered: {exc}") from None
        except Exception as exc:  # noqa: BLE001 - a template is the user's program, and may raise anything
            raise NotRenderedError(f"the prompt cannot be rendered: {type(exc).__name__}: {exc}") from None

    # --- compiling ------------------------------------------------------------------------------------------

    def _compile(self, value: Any, place: str, *, keeps_type: bool = False) -> Any:
        """Nested lists and mappings with a hole for each text that is a template."""
        if isinstance(value, list):
            return [self._compile(item, f"{place}.{index}", keeps_type=keeps_type) for index, item in enumerate(value)]
        if isinstance(value, dict):
            return {key: self._compile(item, f"{place}.{key}", keeps_type=keeps_type) for key, item in value.items()}
        return self._compile_text(value, place, keeps_type) if isinstance(value, str) and "{" in value else value

    def _compile_text(self, text: str, place: str, keeps_type: bool) -> str:
        """A hole for the value of a template."""
        try:
            render, names = self._sandbox.text_of(text)
            expression = self._sandbox.value_of(text) if keeps_type else None
        except TemplateSyntaxError as exc:
            self._faults.append(f"{place}: template line {exc.lineno}: {exc.message}")
            return ""
        except (TemplateError, RecursionError, SyntaxError, ValueError) as exc:
            self._faults.append(f"{place}: {exc}")
            return ""
        for name in sorted(names):
            if name in self._available:
                self._used.add(name)
            elif name == "row":
                self._used.update(self._available)
            elif name not in self._sandbox.globals:
                self._unknown.setdefault(name, place)
        has_row = "row" in names and "row" not in self._available
        number = len(self._renders)
        if expression is not None:
            self._renders.append(lambda row: _typed(expression(_named(row, has_row))))
            return value_hole(number)
        if isinstance(render, Filling) and names <= self._used:
            self._fillings.append(render)
            self._renders.append(render)
        else:
            self._renders.append(lambda row: render(_named(row, has_row)))
        return text_hole(number)


def _key(canonical: bytes) -> str:
    return f"b2:{blake2b(canonical, digest_size=16).hexdigest()}"


def _always_has_text(column: pa.Array) -> bool:
    kind = column.type
    if column.null_count or not any(is_it(kind) for is_it in (pa.types.is_string, pa.types.is_integer)):
        return False
    try:
        column.validate(full=True)  # a file may hold bytes as text that are none
    except pa.ArrowInvalid:
        return False
    return True


def _has_blank(column: pa.Array) -> bool:
    return pa.types.is_string(column.type) and not all(map(str.strip, column.to_pylist()))


def _shape_of(body: Mapping[str, Any]) -> _Shape:
    return _Shape(
        len(body["messages"]) + ("system" in body),
        most_completion_tokens(body),
        is_self_contained(body),
        inline_media(body),
    )


def _named(row: Mapping[str, Any], has_row: bool) -> Mapping[str, Any]:
    """The names that a template sees: the columns, and `row` for those whose names are no identifiers."""
    return {**row, "row": row} if has_row else row


def _typed(value: Any) -> Any:
    if value is None:
        raise NullError
    if isinstance(value, Undefined):
        return str(value)  # raises, naming what is undefined; an `if` without `else` gives the empty text
    return value


def _default_prompt(columns: Sequence[str]) -> PromptSetting:
    if "prompt" in columns:
        return PromptSetting(user="{{ prompt }}")
    if "messages" in columns:
        return PromptSetting(messages_column="messages")
    raise JobError(
        "the job has no prompt, and the input has neither a column `prompt` nor `messages`; "
        f"write one over its columns: {listed(columns)}"
    )


def _conversation(value: Any, column: str) -> list[dict[str, Any]]:
    """The messages of a column that holds them: a list of structs, or JSON text; null fields dropped."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as exc:
            raise NotRenderedError(f"the column {column} holds no valid JSON: {exc}") from None
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise NotRenderedError(f"the column {column} should hold a list of messages (is {_kind(value)})")
    messages = [_without_nulls(message) for message in value]
    if not all(isinstance(message.get("role"), str) for message in messages):
        raise NotRenderedError(f"a message in the column {column} has no role")
    return messages


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return "an empty list" if value == [] else type(value).__name__


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _asked(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What the user says in a conversation."""
    return [message.get("content") for message in messages if message.get("role") == "user"]


def _refuse_blank(asked: Sequence[Any], values: Sequence[Any]) -> None:
    if asked and all(_is_blank(filled(content, values)) for content in asked):
        raise NotRenderedError("the prompt is blank")


def _is_blank(content: Any) -> bool:
    if isinstance(content, str):
        return not content.strip()
    if isinstance(content, list):
        return all(isinstance(part, dict) and not str(part.get("text", part)).strip() for part in content)
    return content is None


def plain_json(value: Any) -> Any:
    """Arrow's values that JSON has no word for."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() and abs(value) < 2**63 else float(value)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, (UUID, timedelta)):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    raise ValueError(f"a {type(value).__name__} has no form in JSON")


_encode_canonical = json.JSONEncoder(
    sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=plain_json
).encode
_encode_wire = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=plain_json).encode
