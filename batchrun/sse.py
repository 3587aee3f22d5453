"""A tolerant parser of server-sent events.

It accepts what providers really send: LF, CRLF or CR, cut anywhere between reads; a byte order mark; `data:`
without the space; comments; events that are separated by one newline only; a last event without its blank line;
a bare JSON line where an event should be.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import NamedTuple

_LINE_END = re.compile(r"\r\n|\n|\r")


class Event(NamedTuple):
    """One event: its name (empty if it has none) and its data."""

    name: str
    data: str


class EventParser:
    """Bytes in, events out; how the bytes are cut into reads never matters.

    >>> parser = EventParser()
    >>> parser.feed(b'data: {"a":1}\\r') + parser.feed(b'\\n\\r\\ndata: x') + parser.close()
    [Event(name='', data='{"a":1}'), Event(name='', data='x')]
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._parts: list[str] = []
        self._held_return = False
        self._at_start = True
        self._name = ""
        self._data: list[str] = []
        self._is_whole: bool | None = None
        """Whether the first line of data is complete on its own; None if that was not looked at yet."""

    def feed(self, raw: bytes) -> list[Event]:
        """Take the next bytes; return the events that they complete."""
        return self._take(self._decoder.decode(raw))

    def close(self) -> list[Event]:
        """The end of the stream: return what a missing line end or blank line has held back."""
        events = self._take(self._decoder.decode(b"", final=True))
        last = "".join(self._parts)
        self._parts = []
        if last:
            self._line(last, events)
        self._dispatch(events)
        return events

    def _take(self, text: str) -> list[Event]:
        events: list[Event] = []
        if not text:
            return events
        if self._at_start:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        if self._held_return and text.startswith("\n"):
            text = text[1:]  # the second half of a CRLF whose first half has ended the line already
        self._held_return = text.endswith("\r") if text else False
        if not (self._parts or self._data or self._name) and "\r" not in text:
            text = _take_usual(text, events)
        lines = _LINE_END.split(text)
        for line in lines[:-1]:
            if self._parts:
                line = "".join((*self._parts, line))
                self._parts = []
            self._line(line, events)
        if lines[-1]:
            self._parts.append(lines[-1])
        return events

    def _line(self, line: str, events: list[Event]) -> None:
        if not line:
            self._dispatch(events)
            return
        if line.startswith("{"):
            name, value = "data", line  # a JSON line without its `data:`: some gateways send errors so
        else:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
        if name == "data":
            # One newline between events instead of two: what is complete on its own is an event of its own.
            if self._has_whole_line():
                self._dispatch(events)
            self._data.append(value)
        elif name == "event":
            if self._has_whole_line():
                self._dispatch(events)
            self._name = value

    def _has_whole_line(self) -> bool:
        if len(self._data) != 1:
            return False
        if self._is_whole is None:
            self._is_whole = _is_complete(self._data[0])
        return self._is_whole

    def _dispatch(self, events: list[Event]) -> None:
        if self._data:
            events.append(Event(self._name, "\n".join(self._data)))
        self._data = []
        self._is_whole = None
        self._name = ""


def _take_usual(text: str, events: list[Event]) -> str:
    """Take events off the front of a text that are one line of JSON each, as nearly all are; return the rest."""
    blocks = text.split("\n\n")
    last = blocks.pop()
    for number, block in enumerate(blocks):
        if not block.startswith("data: {") or "\n" in block:
            return "\n\n".join((*blocks[number:], last))
        events.append(Event("", block[6:]))
    return last


def _is_complete(data: str) -> bool:
    if data.strip() == "[DONE]":
        return True
    if not data.rstrip().endswith("}"):
        return False
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True
