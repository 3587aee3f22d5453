"""Row → request: Jinja2 templates over the row's columns, sandboxed and strict. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from hashlib import blake2b
from typing import Any
from uuid import UUID

from jinja2 import TemplateError, Undefined
from jinja2.exceptions import SecurityError, TemplateSyntaxError, UndefinedError

from batchrun.errors import JobError, listed
from batchrun.job import Job, PromptSetting
from batchrun.jobfile import walk_text
from batchrun.providers import Endpoint
from batchrun.records import Request, Slot
from batchrun.sandbox import NullError, Sandbox
from batchrun.wire import inline_media, is_self_contained, most_completion_tokens, request_body, stream_fields


class NotRenderedError(Exception):
    """This row gives no request; the message says why. The row fails, and costs nothing."""


_Renderer = Callable[[Mapping[str, Any]], Any]


class Template:
    """A job's prompt and parameters, compiled once.

    Attributes:
        columns: the columns that the templates use; what else a row has need not be read.

    Raises:
        JobError: a template that does not parse, or all the columns that it names and the input lacks.
    """

    def __init__(self, job: Job, columns: Sequence[str], endpoint: Endpoint, model: str) -> None:
        self._sandbox = Sandbox(columns, plain_json)
        self._available = list(columns)
        self._used: set[str] = set()
        self._unknown: dict[str, str] = {}
        self._faults: list[str] = []
        self._endpoint = endpoint
        self._model = model
        prompt = job.prompt or _default_prompt(columns)
        self._messages_column = prompt.messages_column
        self._messages: list[_Renderer] = []
        if prompt.messages_column is not None:
            if prompt.messages_column not in columns:
                self._unknown[prompt.messages_column] = "prompt.messages_column"
            self._used.add(prompt.messages_column)
        elif prompt.messages is not None:
            for index, message in enumerate(prompt.messages):
                self._messages.append(self._compile(message, f"prompt.messages.{index}"))
        else:
            for role, text in (("system", prompt.system), ("user", prompt.user)):
                if text is not None:
                    self._messages.append(self._message(role, text, f"prompt.{role}"))
        self._parameters = self._compile(job.parameters, "parameters", keeps_type=True)
        self._stream = stream_fields(endpoint.include_usage) if job.stream else {}
        if self._unknown:
            named = ", ".join(f"{name!r} ({place})" for name, place in self._unknown.items())
            self._faults.append(f"no such column: {named}; the columns are {listed(columns)}")
        if self._faults:
            raise JobError("\n".join(["the prompt does not fit the input:", *(f"  {fault}" for fault in self._faults)]))
        self.columns = [name for name in columns if name in self._used]

    def request(self, row_index: int, row: Mapping[str, Any]) -> Request:
        """The request of a row; its key covers everything that changes the answer.

        Raises:
            NotRenderedError: the row gives no request.
        """
        body = self._body(row)
        try:
            canonical = json.dumps(
                [self._endpoint.identity, body],
                sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=plain_json,
            )  # fmt: skip
            wire = json.dumps(
                body | self._stream,
                ensure_ascii=False,
                separators=(",", ":"),
                allow_nan=False,
                default=plain_json,
            )
            digest = blake2b(canonical.encode(), digest_size=16).hexdigest()
            encoded = wire.encode()
        except UnicodeEncodeError:
            raise NotRenderedError("the prompt has half of a surrogate pair, which no UTF-8 can carry") from None
        except (ValueError, TypeError, RecursionError, MemoryError) as exc:
            raise NotRenderedError(f"a parameter cannot be sent as JSON: {exc}") from None
        return Request(
            Slot(row_index, self._model),
            f"b2:{digest}",
            encoded,
            messages=len(body["messages"]) + ("system" in body),
            most_completion_tokens=most_completion_tokens(body),
            is_self_contained=is_self_contained(body),
            media=inline_media(body),
        )

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rendered conversation of a row."""
        if self._messages_column is not None:
            messages = _conversation(row.get(self._messages_column), self._messages_column)
        else:
            messages = [self._render(render, row) for render in self._messages]
        asked = [message for message in messages if message.get("role") == "user"]
        if asked and all(_is_blank(message.get("content")) for message in asked):
            raise NotRenderedError("the prompt is blank")
        return messages

    def _body(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return request_body(
            self._model, self.messages(row), self._render(self._parameters, row), system=self._endpoint.system
        )

    def _render(self, render: _Renderer, row: Mapping[str, Any]) -> Any:
        self._sandbox.begin()
        try:
            return render(row)
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

    def _message(self, role: str, text: str, place: str) -> _Renderer:
        # A YAML block ends with a line end that nobody means to send.
        content = self._compile(text.removesuffix("\n"), place)
        return lambda row: {"role": role, "content": content(row)}

    def _compile(self, value: Any, place: str, *, keeps_type: bool = False) -> _Renderer:
        """A function row → value for nested lists and mappings whose texts are templates."""
        if not any("{" in text for text in walk_text(value)):
            return lambda row: value
        if isinstance(value, str):
            return self._compile_text(value, place, keeps_type)
        if isinstance(value, list):
            items = [self._compile(item, f"{place}.{index}", keeps_type=keeps_type) for index, item in enumerate(value)]
            return lambda row: [item(row) for item in items]
        fields = {key: self._compile(item, f"{place}.{key}", keeps_type=keeps_type) for key, item in value.items()}
        return lambda row: {key: field(row) for key, field in fields.items()}

    def _compile_text(self, text: str, place: str, keeps_type: bool) -> _Renderer:
        try:
            render, names = self._sandbox.text_of(text)
            expression = self._sandbox.value_of(text) if keeps_type else None
        except TemplateSyntaxError as exc:
            self._faults.append(f"{place}: template line {exc.lineno}: {exc.message}")
            return lambda row: ""
        except (TemplateError, RecursionError, SyntaxError, ValueError) as exc:
            self._faults.append(f"{place}: {exc}")
            return lambda row: ""
        for name in sorted(names):
            if name in self._available:
                self._used.add(name)
            elif name == "row":
                self._used.update(self._available)
            elif name not in self._sandbox.globals:
                self._unknown.setdefault(name, place)
        has_row = "row" in names and "row" not in self._available
        if expression is not None:
            return lambda row: _typed(expression(_named(row, has_row)))
        return lambda row: render(_named(row, has_row))


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
