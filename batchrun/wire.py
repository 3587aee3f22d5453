"""The chat-completions wire in both directions, pure: request bodies out, answers in.

Answers come as one JSON document or as a stream of events, in the dialects of AI/ML API (before and after February
13, 2026), OpenAI, Azure, vLLM, Groq, OpenRouter, DeepSeek, llama.cpp, Ollama and Gemini's compatible endpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from batchrun.documents import TooManyError, is_error, parse_json, sound, unwrapped
from batchrun.failures import failure_of, request_id_of
from batchrun.money import CREDITS_PER_USD, amount, usd_from_credits, usd_from_wire
from batchrun.records import Action, Answer, Failure
from batchrun.sse import Event, EventParser
from batchrun.usage import NO_USAGE, Usage, count, merge, read_usage, settle

_FINISH = {
    "stop": "stop", "end_turn": "stop", "stop_sequence": "stop", "eos": "stop",
    "length": "length", "max_tokens": "length", "model_context_window_exceeded": "length",
    "tool_calls": "tool_calls", "tool_use": "tool_calls", "function_call": "tool_calls",
    "content_filter": "content_filter", "refusal": "content_filter", "safety": "content_filter",
    "error": "error", "insufficient_system_resource": "error",
}  # fmt: skip


_MOST_TOOL_CALLS = 10_000
_READ_AT_ONCE = 64 * 1024
_DONE = b"[DONE]"
_PLAIN = {"role", "content"}


def normalise_finish(raw: str | None) -> str:
    """A provider's finish reason in the common words; an unknown one stays as it is.

    >>> normalise_finish("end_turn"), normalise_finish("MAX_TOKENS"), normalise_finish(None)
    ('stop', 'length', 'unknown')
    """
    return "unknown" if not raw else _FINISH.get(raw.lower(), raw)


# --- requests -----------------------------------------------------------------------------------------------


def request_body(
    model: str, messages: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any], *, system: str
) -> dict[str, Any]:
    """The JSON document of a request, without what asks for a stream.

    Args:
        system: `message`, or `top_level` for schemas whose messages know no system role.
    """
    body: dict[str, Any] = {"model": model}
    if system == "top_level":
        said = [message["content"] for message in messages if message.get("role") == "system" and "content" in message]
        messages = [message for message in messages if message.get("role") != "system"]
        if said:
            body["system"] = "\n\n".join(said) if all(isinstance(text, str) for text in said) else _parts_of(said)
    body["messages"] = list(messages)
    body.update(parameters)
    return body


def _parts_of(contents: Sequence[Any]) -> list[Any]:
    parts: list[Any] = []
    for content in contents:
        parts += content if isinstance(content, list) else [{"type": "text", "text": content}]
    return parts


def stream_fields(include_usage: bool) -> dict[str, Any]:
    """What a request adds to be answered as a stream."""
    return {"stream": True, "stream_options": {"include_usage": True}} if include_usage else {"stream": True}


def most_completion_tokens(body: Mapping[str, Any]) -> int | None:
    """The longest answer that a request allows; None if it sets no bound."""
    known = [value for name in ("max_tokens", "max_completion_tokens") if (value := count(body.get(name)))]
    if not known:
        return None
    reasoning = body.get("reasoning")
    return max(known) + ((count(reasoning.get("max_tokens")) or 0) if isinstance(reasoning, Mapping) else 0)


_FETCHING = ("web_search_options", "plugins", "previous_response_id")


def is_self_contained(body: Mapping[str, Any]) -> bool:
    """False for a request that has the model read what its bytes do not hold: a page, a file, an image elsewhere."""
    if any(name in body for name in _FETCHING) or any(name.startswith("search_") for name in body):
        return False
    tools = body.get("tools")
    if isinstance(tools, list) and any(isinstance(tool, Mapping) and _is_served(tool) for tool in tools):
        return False
    contents = [body.get("system"), *(message.get("content") for message in body["messages"])]
    return not any(_is_elsewhere(part) for content in contents if isinstance(content, list) for part in content)


def _is_served(tool: Mapping[str, Any]) -> bool:
    """True for a tool that the provider runs itself, such as a search: what it brings is read by the model."""
    return "function" not in tool and tool.get("type", "custom") not in ("function", "custom")


def inline_media(body: Mapping[str, Any]) -> int:
    """Images, files and sounds that stand in the messages themselves."""
    contents = [message.get("content") for message in body["messages"]]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(isinstance(part, Mapping) and part.get("type", "text") != "text" for part in parts)


def _is_elsewhere(part: Any) -> bool:
    if isinstance(part, Mapping):
        if part.get("type") == "text" or ("type" not in part and "text" in part):
            return False
        return "file_id" in part or any(_is_elsewhere(value) for value in part.values())
    if isinstance(part, list):
        return any(_is_elsewhere(item) for item in part)
    return isinstance(part, str) and re.match(r"\s*(?!data:)[a-z0-9+.-]+:", part, re.IGNORECASE) is not None


# --- answers ------------------------------------------------------------------------------------------------


def read_answer(
    raw: bytes, headers: Mapping[str, str], *, streamed: bool, cost_in_usage: bool = False
) -> Answer | Failure:
    """Read a whole successful (2xx) answer. `headers` has lower-case names; `{}` when read from the ledger."""
    reader = AnswerReader(headers, streamed=streamed, cost_in_usage=cost_in_usage)
    reader.feed(raw)
    return reader.close()


class AnswerReader:
    """Bytes of a 2xx answer in, an `Answer` or a `Failure` out.

    The same for a plain and a streamed answer: a server may ignore `stream: true` and send one document.
    """

    def __init__(self, headers: Mapping[str, str], *, streamed: bool, cost_in_usage: bool = False) -> None:
        self._headers = headers
        self._cost_in_usage = cost_in_usage
        self._events: EventParser | None = EventParser() if streamed else None
        self._head: list[bytes] = []
        self._is_sniffed = not streamed
        self._unread: list[bytes] = []
        self._unread_bytes = 0
        self._end = b""
        """The last bytes that came, in which the end may have begun."""
        self._merged = _Merged()
        self.is_done = False
        """True once `[DONE]` has come: nothing after it counts."""

    @property
    def has_content(self) -> bool:
        """True once the first piece of the answer has come."""
        return self._merged.has_content

    @property
    def usage(self) -> Usage:
        """The counts seen so far, also of an answer that failed."""
        return settle(self._merged.usage)

    @property
    def is_bare_error(self) -> bool:
        """True for a 2xx that holds an error and nothing of an answer: neither a piece of it nor counts."""
        merged = self._merged
        return merged.failure is not None and not merged.has_content and merged.usage == NO_USAGE

    def reported_cost(self) -> tuple[Decimal | None, str | None]:
        """Dollars that the provider reports, and `reported` or `credits`."""
        return self._reported()[:2]

    def feed(self, raw: bytes) -> None:
        """Take the next bytes."""
        if self.is_done:
            return
        if not self._is_sniffed:
            # What is blank before the answer is a keep-alive, and nothing hangs on it.
            raw = (b"".join(self._head) + raw).lstrip(b" \t\r\n")
            self._head = [raw]
            start = raw.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
            if not start or b"\xef\xbb\xbf".startswith(raw):
                return
            self._is_sniffed = True
            if start[:1] in b"{[<":
                self._events = None
                return
            self._head = []
        if self._events is None:
            self._head.append(raw)
            return
        self._unread.append(raw)
        self._unread_bytes += len(raw)
        # After its first piece nothing hangs on an answer but its end: many small reads are taken as one.
        end = self._end + raw
        self._end = end[1 - len(_DONE) :]
        if not self._merged.has_content or _DONE in end or self._unread_bytes >= _READ_AT_ONCE:
            self._read(self._events)

    def _read(self, events: EventParser) -> None:
        raw = b"".join(self._unread)
        self._unread, self._unread_bytes = [], 0
        self._feed_events(events, raw)

    def _feed_events(self, events: EventParser, raw: bytes) -> None:
        # Not all at once: of a few bytes each, the events of a whole answer would fill the memory.
        for start in range(0, len(raw), _READ_AT_ONCE):
            self._take(events.feed(raw[start : start + _READ_AT_ONCE]))

    def close(self, error: Failure | None = None) -> Answer | Failure:
        """The end of the answer. `error`: the connection broke; what had come may still be whole."""
        if self._events is None:
            return self._close_document(error)
        self._unread += self._head
        self._read(self._events)
        if not self.is_done:
            self._take(self._events.close())
        merged = self._merged
        if merged.failure is not None:
            return merged.failure
        if not self.is_done and merged.finish is None:
            return error or Failure(
                "incomplete_stream",
                Action.RETRY,
                "the stream ended without a finish reason" if merged.has_any else "the answer is empty",
                request_id=request_id_of(self._headers),
            )
        flags = ("incomplete_tail",) if error is not None and not self.is_done else ()
        return self._answer(merged, flags)

    def _close_document(self, error: Failure | None) -> Answer | Failure:
        if error is not None:
            return error  # half a document is no document
        raw = b"".join(self._head)
        try:
            document = parse_json(raw)
        except TooManyError as exc:
            return Failure("malformed", Action.REJECT, f"the answer cannot be read: {exc}")
        except ValueError:
            return self._close_undecodable(raw)
        document = unwrapped(document)
        if not isinstance(document, dict):
            return self._malformed("the answer is JSON, but no object")
        self._merged.take(document, self._headers)
        if self._merged.failure is None and not self._merged.has_choice:
            return self._malformed("the answer has no choices")
        return self._merged.failure or self._answer(self._merged, ())

    def _close_undecodable(self, raw: bytes) -> Answer | Failure:
        """No JSON: perhaps events that begin with a bare document, or a server that streams unasked."""
        start = raw.lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith((b"data:", b"event:", b":", b"id:", b"retry:")) or b"\ndata:" in start:
            self._events, self._head = EventParser(), [raw]
            return self.close()
        if not start:
            return self._malformed("the answer is empty", kind="incomplete_stream")
        what = "the answer is HTML" if start.startswith(b"<") else "the answer is no JSON"
        return self._malformed(f"{what}: {start[:120].decode('utf-8', errors='replace')}")

    def _malformed(self, message: str, kind: str = "malformed") -> Failure:
        return Failure(kind, Action.RETRY, message, request_id=request_id_of(self._headers))

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if self.is_done:
                return
            data = event.data.strip()
            if not data:
                continue
            if data == "[DONE]":
                self.is_done = True
                return
            try:
                document = parse_json(data)
            except ValueError:
                if event.name == "error":
                    self._merged.fail(failure_of({"message": data}, self._headers))
                continue  # a keep-alive in plain words, or a chunk that the end of the stream has cut
            document = unwrapped(document)
            if isinstance(document, dict):
                if event.name == "error" and not isinstance(document.get("choices"), list):
                    self._merged.fail(failure_of(document, self._headers))
                else:
                    self._merged.take(document, self._headers)

    def _answer(self, merged: _Merged, flags: tuple[str, ...]) -> Answer | Failure:
        finish = normalise_finish(merged.finish)
        if finish == "error":
            return Failure(
                "server",
                Action.RETRY,
                f"finish reason {merged.finish!r}",
                request_id=request_id_of(self._headers),
            )
        usage = settle(merged.usage)
        usd, source, credits_used, disagree = self._reported()
        text = merged.text()
        found = list(flags)
        if text is None and merged.refusal:
            text = sound("".join(merged.refusal))
        if merged.refusal or (merged.finish or "").lower() == "refusal":
            found.append("refusal")
        if finish == "length":
            found.append("truncated")
        if finish == "content_filter":
            found.append("filtered")
        if not (text or "").strip() and not merged.tools:
            found.append("empty")
        if usage.is_zero:
            found.append("zero_usage")
        if disagree:
            found.append("cost_mismatch")
        return Answer(
            text=text,
            finish_reason=finish,
            finish_reason_raw=merged.finish,
            usage=usage,
            usd=usd,
            usd_source=source,
            credits_used=credits_used,
            model=merged.model,
            answer_id=merged.answer_id,
            reasoning=sound("".join(merged.reasoning)) if merged.reasoning else None,
            tool_calls=tuple(_sound_tool(merged.tools[index]) for index in sorted(merged.tools)),
            flags=tuple(found),
        )

    def _reported(self) -> tuple[Decimal | None, str | None, Decimal | None, bool]:
        """Dollars, their source, credits, and whether the two disagree."""
        usd, source, credits_used, disagree = _reported(self._merged.meta, self._headers)
        if usd is None:
            cost = self._merged.cost if self._cost_in_usage else None
            usd = usd_from_wire(cost if cost is not None else self._headers.get("x-litellm-response-cost"))
            source = "reported" if usd is not None else None
        return usd, source, credits_used, disagree


def _reported(
    meta: Mapping[str, Any], headers: Mapping[str, str]
) -> tuple[Decimal | None, str | None, Decimal | None, bool]:
    """AI/ML API's own cost: dollars, source, credits, and whether the two disagree by more than a credit."""
    used = meta.get("usage")
    usage: dict[str, Any] = used if isinstance(used, dict) else {}
    credits_used = amount(usage.get("credits_used"))
    if credits_used is None:
        credits_used = amount(headers.get("x-aimlapi-credits-used"))
    if credits_used is None:
        credits_used = amount(usage.get("tokens_used"))  # the old name of the same
    usd = usd_from_wire(usage.get("usd_spent"))
    if usd is None:
        usd = usd_from_wire(headers.get("x-aimlapi-usd-spent"))
    if usd is not None:
        apart = credits_used is not None and abs(usd * CREDITS_PER_USD - credits_used) > 1
        return usd, "reported", credits_used, apart
    if credits_used is not None:
        return usd_from_credits(credits_used), "credits", credits_used, False
    return None, None, None, False


def _sound_tool(call: dict[str, Any]) -> dict[str, object]:
    function = {"name": sound(call["name"]), "arguments": sound("".join(call["arguments"]))}
    return {"id": call["id"] and sound(call["id"]), "type": sound(call["type"]), "function": function}


class _Merged:
    """What the documents of one answer add up to; a plain answer is a stream of one."""

    def __init__(self) -> None:
        self.usage = NO_USAGE
        self.meta: dict[str, Any] = {}
        self.cost: Any = None
        self.model: str | None = None
        self.answer_id: str | None = None
        self.finish: str | None = None
        self.failure: Failure | None = None
        self.content: list[str] | None = None
        self.reasoning: list[str] = []
        self.refusal: list[str] = []
        self.tools: dict[int, dict[str, Any]] = {}
        self.has_choice = False
        self.has_any = False
        self._has_text = False

    @property
    def has_content(self) -> bool:
        return self._has_text or bool(self.reasoning) or bool(self.tools)

    def fail(self, failure: Failure) -> None:
        """The first error of an answer is its result."""
        self.failure = self.failure or failure

    def text(self) -> str | None:
        return None if self.content is None else sound("".join(self.content))

    def take(self, document: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """Take one document: a whole answer, or one chunk, also in the wrapper from before February 13, 2026."""
        if self._has_text and self.model and self.answer_id and (piece := _usual_piece(document)) is not None:
            self._say(piece)
            return
        self.has_any = True
        if isinstance(state := document.get("state"), dict):
            self.usage = merge(self.usage, read_usage(state.get("usage")))
            if isinstance(reason := state.get("finishReason"), str) and reason and self.finish is None:
                self.finish = sound(reason)
        if isinstance(wrapped := document.get("event"), dict):
            self._take_outside(document, headers)
            document = wrapped
        self._take_outside(document, headers)
        if self.model is None and isinstance(name := document.get("model"), str) and name:
            self.model = sound(name)
        if self.answer_id is None and isinstance(answer_id := document.get("id"), str) and answer_id:
            self.answer_id = sound(answer_id)
        choices = document.get("choices")
        choice = _first_choice(choices) if isinstance(choices, list) else None
        if choice is not None:
            self.has_choice = True
            self._take_choice(choice, headers)

    def _take_outside(self, document: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """What stands beside the choices: errors, counts, cost."""
        if document.get("error") or is_error(document):
            self.fail(failure_of(document, headers))
        if isinstance(groq := document.get("x_groq"), dict):
            self.usage = merge(self.usage, read_usage(groq.get("usage")))
            if groq.get("error"):
                self.fail(failure_of({"error": groq["error"]}, headers))
        if isinstance(usage := document.get("usage"), dict):
            self.usage = merge(self.usage, read_usage(usage))
            if usage.get("cost") is not None:
                self.cost = usage["cost"]
        if isinstance(meta := document.get("meta"), dict):
            for name, value in meta.items():
                earlier = self.meta.get(name)
                if isinstance(earlier, dict) and isinstance(value, dict):
                    earlier.update({key: said for key, said in value.items() if said is not None})
                elif value is not None:
                    self.meta[name] = dict(value) if isinstance(value, dict) else value

    def _take_choice(self, choice: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        if choice.get("error"):
            self.fail(failure_of({"error": choice["error"]}, headers))
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finish = sound(reason)
        delta, message = choice.get("delta"), choice.get("message")
        if isinstance(delta, dict) and (delta or not isinstance(message, dict)):
            self._take_message(delta)
        elif isinstance(message, dict) and not self.has_content:
            # A last chunk may repeat the whole message; it adds nothing to the pieces that came before.
            self._take_message(message)
        elif isinstance(text := choice.get("text"), str):
            self._say(text)

    def _take_message(self, message: Mapping[str, Any]) -> None:
        content = message.get("content")
        if isinstance(content, str):
            self._say(content)
        elif isinstance(content, (list, dict)):
            for part in content if isinstance(content, list) else [content]:
                self._take_part(part)
        if message.keys() <= _PLAIN:
            return
        for name in ("reasoning_content", "reasoning"):
            if isinstance(thought := message.get(name), str) and thought:
                self.reasoning.append(thought)
                break
        else:
            details = message.get("reasoning_details")
            for detail in details if isinstance(details, list) else ():
                if isinstance(detail, dict) and isinstance(said := detail.get("text"), str):
                    self.reasoning.append(said)
        if isinstance(refusal := message.get("refusal"), str) and refusal:
            self.refusal.append(refusal)
        calls = message.get("tool_calls")
        for position, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict):
                self._take_tool_call(position, call)
        function = message.get("function_call")
        if isinstance(function, dict):
            self._take_tool_call(0, {"type": "function", "function": function})

    def _take_part(self, part: object) -> None:
        if isinstance(part, str):
            self._say(part)
        elif isinstance(part, dict):
            said = part.get("text")
            if isinstance(said, dict):
                said = said.get("value")
            if isinstance(said, str):
                self._say(said)
            elif isinstance(thought := part.get("thinking"), str):
                self.reasoning.append(thought)

    def _take_tool_call(self, position: int, call: Mapping[str, Any]) -> None:
        index = call.get("index")
        index = index if isinstance(index, int) and not isinstance(index, bool) else position
        if index not in self.tools and len(self.tools) >= _MOST_TOOL_CALLS:
            self.fail(Failure("malformed", Action.REJECT, f"the answer has more than {_MOST_TOOL_CALLS} tool calls"))
            return
        tool = self.tools.setdefault(index, {"id": None, "type": "function", "name": "", "arguments": []})
        if isinstance(call.get("id"), str) and call["id"]:
            tool["id"] = call["id"]
        if isinstance(call.get("type"), str):
            tool["type"] = call["type"]
        function = call.get("function")
        if isinstance(function, dict):
            if isinstance(name := function.get("name"), str) and name:
                tool["name"] = name
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                tool["arguments"].append(arguments)
            elif arguments is not None:
                tool["arguments"].append(json.dumps(arguments, ensure_ascii=False, default=float))

    def _say(self, text: str) -> None:
        if self.content is None:
            self.content = []
        self.content.append(text)
        self._has_text = self._has_text or bool(text)


_CHUNK = {"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"}
_CHUNK_CHOICE = {"index", "delta", "finish_reason", "logprobs"}


def _usual_piece(document: Mapping[str, Any]) -> str | None:
    """The text of a chunk that brings nothing else, as nearly all do; what it repeats was in an earlier one."""
    if not document.keys() <= _CHUNK or document.get("usage") is not None:
        return None
    choices = document.get("choices")
    if type(choices) is not list or len(choices) != 1 or type(choice := choices[0]) is not dict:
        return None
    if choice.get("index") != 0 or choice.get("finish_reason") is not None or not choice.keys() <= _CHUNK_CHOICE:
        return None
    delta = choice.get("delta")
    if type(delta) is not dict or not delta.keys() <= _PLAIN:
        return None
    content = delta.get("content")
    return content if type(content) is str else None


def _first_choice(choices: Sequence[object]) -> Mapping[str, Any] | None:
    """The choice with index 0, or without one; in a whole answer the only choice, whatever its index."""
    if len(choices) == 1 and isinstance(only := choices[0], dict) and only.get("index") in (0, None, "0"):
        return only
    found = [choice for choice in choices if isinstance(choice, dict)]
    first = next((choice for choice in found if choice.get("index") in (0, None, "0")), None)
    is_only = len(found) == 1 and "message" in found[0]
    return found[0] if first is None and is_only else first
